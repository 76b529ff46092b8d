#!/usr/bin/env python3
"""The same requests through PyTorch Transformers' continuous batching, to stand beside `tandem bench`.

    tests/bench/bench_transformers.py --make trace.csv [--requests 1000] [--input 220] [--output 200] [--sigma 1.0]
                                   [--longest 1024]
    tests/bench/bench_transformers.py CONFIG_DIR trace.csv [--attention sdpa] [--limit SECONDS]
    tandem bench --trace trace.csv --warm-up 64                    # the same, on a running server

--make writes log-normal lengths of those means as a trace whose requests are all due at 0. The second form builds the model of
CONFIG_DIR/config.json with random bf16 weights on the GPU, warms up, sends all at once with the output lengths of the trace and
prints output tokens per second. What is not done after --limit seconds is stopped, and the tokens so far count. Needs torch and transformers (5.x); both are nowhere else needed.
"""
import argparse
import csv
import json
import math
import os
import random
import sys
import threading
import time


def make(path, args):
    rng = random.Random(1)

    def length(mean):
        mu = math.log(mean) - args.sigma**2 / 2
        return max(4, min(args.longest, round(rng.lognormvariate(mu, args.sigma))))

    with open(path, "w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["arrival_s", "prompt_tokens", "output_tokens"])
        for _ in range(args.requests):
            out.writerow([0, length(args.input), length(args.output)])


def run(config_dir, trace, args):
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    with open(trace, newline="") as f:
        lengths = [(int(r["prompt_tokens"]), int(r["output_tokens"])) for r in csv.DictReader(f)]
    with open(os.path.join(config_dir, "config.json")) as f:
        values = json.load(f)
    config = AutoConfig.for_model(values.pop("model_type", "llama"), **values)
    torch.manual_seed(1)
    start = time.monotonic()
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=args.attention)
    model.eval()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.cuda.get_device_name(0)}, "
          f"{args.attention}; {sum(p.numel() for p in model.parameters()) / 1e9:.2f} G parameters in "
          f"{time.monotonic() - start:.1f} s", flush=True)
    longest_in, longest_out = max(p for p, _ in lengths), max(o for _, o in lengths)
    hints = WorkloadHints(max_prompt_length=longest_in, max_generated_length=longest_out, num_requests=len(lengths))
    generation = GenerationConfig(max_new_tokens=longest_out, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(allow_block_sharing=False, default_compile_level=args.compile)
    if args.batch_tokens:
        batching.max_batch_tokens = args.batch_tokens
    rng = random.Random(2)
    prompts = [[rng.randrange(10, config.vocab_size - 1000) for _ in range(p)] for p, _ in lengths]
    ended = [0, 0]
    start = time.monotonic()
    with model.continuous_batching_context_manager(generation_config=generation, continuous_batching_config=batching,
                                                   workload_hints=hints, block=True, timeout=30) as manager:
        def burst(which, longest):
            for i in which:
                manager.add_request(prompts[i], max_new_tokens=min(longest, lengths[i][1]), eos_token_id=-1)
            done = tokens = 0
            begin = time.monotonic()
            while done < len(which):
                result = manager.get_result(timeout=1)
                if result is None:
                    if not manager.is_running():
                        break
                elif result.is_finished():
                    if result.error:
                        print(f"a request failed: {result.error}", file=sys.stderr, flush=True)
                        os._exit(1)
                    done += 1
                    tokens += len(result.generated_tokens)
                    ended[:] = done, tokens
            return done, tokens, time.monotonic() - begin

        def stop_at_limit():
            time.sleep(args.limit)
            # Of requests that have not ended; a copy, since the other thread goes on
            code = 1
            try:
                done, tokens = ended
                active = list(manager.batch_processor.scheduler.active_requests.values())
                tokens += sum(len(r.generated_tokens) for r in active)
                print(f"after the limit of {args.limit:.0f} s: {done} of {len(prompts)} ended, {len(active)} running; {tokens} "
                      f"output tokens: {tokens / args.limit:.0f} tokens/s", flush=True)
                code = 0
            finally:
                os._exit(code)  # the library's own stop waits for requests

        burst(range(min(64, len(prompts))), 16)
        print(f"warm after {time.monotonic() - start:.1f} s", flush=True)
        ended[:] = 0, 0
        threading.Thread(target=stop_at_limit, daemon=True).start()
        done, tokens, seconds = burst(range(len(prompts)), longest_out)
        print(f"{done} of {len(prompts)} ended: {tokens} output tokens in {seconds:.1f} s: {tokens / seconds:.0f} tokens/s",
              flush=True)
        os._exit(done != len(prompts))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("paths", nargs="*", metavar="CONFIG_DIR TRACE")
    p.add_argument("--make", metavar="TRACE")
    p.add_argument("--requests", type=int, default=1000)
    p.add_argument("--input", type=float, default=220)
    p.add_argument("--output", type=float, default=200)
    p.add_argument("--sigma", type=float, default=1.0)
    p.add_argument("--longest", type=int, default=1024, help="of prompts and of answers, as in ShareGPT's usual cut")
    p.add_argument("--attention", default="sdpa")
    p.add_argument("--compile", type=int, default=0)
    p.add_argument("--batch-tokens", type=int, default=0)
    p.add_argument("--limit", type=float, default=600, help="seconds")
    args = p.parse_args()
    if args.make:
        make(args.make, args)
    elif len(args.paths) == 2:
        run(*args.paths, args)
    else:
        p.error("CONFIG_DIR and TRACE, or --make TRACE")


if __name__ == "__main__":
    main()
