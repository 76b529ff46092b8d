#!/usr/bin/env python3
"""What a GPU could do at best with the requests of a trace, all at once: the steps that they need, each at its limits.

    tests/bench/step_limits.py CONFIG_DIR trace.csv [--step-tokens 4096] [--slots 1024] [--tflops 790] [--tbps 4.3]
    tests/bench/step_limits.py CONFIG_DIR --requests 44 --input 16384 --output 1024 --step-tokens 1088 --slots 64

A step takes all decodes and fills up with prompts, in order of arrival, to --step-tokens rows; a prompt whose last row is in a step gives
its first token there. Products take the longer of their arithmetic and of reading the weights once, the head's for sampled rows alone;
attention has two sides, decodes, which read KV (bf16), and chunks, the longer of their arithmetic and of reading theirs once. Printed:
seconds of each, and tokens of answers per second where all is done one after the other, where in each step the shorter side of attention is
hidden under the longer one, and where all of attention is hidden under products.
"""
import argparse
import csv
import json
import os


class Shape:
    def __init__(self, config):
        hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        dim = config.get("head_dim", hidden // heads)
        self.weights = layers * (hidden * dim * (2 * heads + 2 * kv_heads) + 3 * hidden * inner)  # of the layers' products
        self.head = hidden * config["vocab_size"]
        self.kv_bytes = layers * 2 * kv_heads * dim * 2  # of a token
        self.key_flops = layers * 4 * heads * dim  # of a row, for each key that it sees


class Step:
    def __init__(self):
        self.rows = self.sampled = self.decode_keys = self.chunk_keys = self.chunk_sums = 0

    def all(self):
        return self.rows, self.sampled, self.decode_keys, self.chunk_keys, self.chunk_sums


def steps_of(lengths, step_tokens, slots):
    """decode_keys and chunk_keys: tokens of KV that are read; chunk_sums: keys that rows of chunks see, added up."""
    running, at, begun, done = [], 0, 0, []  # begun: rows of prompt number `at` so far
    while at < len(lengths) or running:
        s = Step()
        left, joined = [], []
        for context, more in running:  # tokens that it has, tokens to come
            s.rows, s.sampled, s.decode_keys = s.rows + 1, s.sampled + 1, s.decode_keys + context + 1
            if more > 1:
                left.append((context + 1, more - 1))
        while at < len(lengths) and s.rows < step_tokens and len(running) + len(joined) < slots:
            prompt, answer = lengths[at]
            chunk = min(prompt - begun, step_tokens - s.rows)
            s.chunk_sums += chunk * begun + chunk * (chunk + 1) // 2
            begun += chunk
            s.rows, s.chunk_keys = s.rows + chunk, s.chunk_keys + begun
            if begun < prompt:
                break
            s.sampled, at, begun = s.sampled + 1, at + 1, 0
            if answer > 1:
                joined.append((prompt, answer - 1))
        running = left + joined
        done.append(s)
    return done


def check():
    def steps(*args):
        return [s.all() for s in steps_of(*args)]

    assert steps([(3, 2), (5, 1)], 4, 9) == [(4, 1, 0, 4, 7), (4, 1, 4, 4, 9), (1, 1, 0, 5, 5)]
    assert steps([(3, 2), (3, 1)], 9, 1) == [(3, 1, 0, 3, 6), (1, 1, 4, 0, 0), (3, 1, 0, 3, 6)]
    lengths = [(1 + 37 * i % 90, 1 + 53 * i % 40) for i in range(200)]
    many = steps_of(lengths, 64, 20)
    assert sum(s.rows for s in many) == sum(i + o - 1 for i, o in lengths)
    assert sum(s.sampled for s in many) == sum(o for _, o in lengths)
    assert sum(s.chunk_sums + s.decode_keys for s in many) == sum((i + o - 1) * (i + o) // 2 for i, o in lengths)
    assert all(0 < s.rows <= 64 for s in many)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("config", nargs="?")
    p.add_argument("trace", nargs="?")
    p.add_argument("--check", action="store_true", help="of this program, on traces that can be counted by hand")
    p.add_argument("--requests", type=int, default=0)
    p.add_argument("--input", type=int, default=16384)
    p.add_argument("--output", type=int, default=1024)
    p.add_argument("--step-tokens", type=int, default=4096)
    p.add_argument("--slots", type=int, default=1024)
    p.add_argument("--tflops", type=float, default=790)
    p.add_argument("--tbps", type=float, default=4.3)
    args = p.parse_args()
    if args.check:
        return check()
    if not args.config or not (args.trace or args.requests):
        p.error("a folder with config.json, and a trace or --requests, are expected")
    with open(os.path.join(args.config, "config.json")) as f:
        shape = Shape(json.load(f))
    lengths = [(args.input, args.output)] * args.requests
    if args.trace:
        with open(args.trace, newline="") as f:
            lengths = [(int(r["prompt_tokens"]), int(r["output_tokens"])) for r in csv.DictReader(f)]
    flops, bps = args.tflops * 1e12, args.tbps * 1e12
    steps = steps_of(lengths, args.step_tokens, args.slots)
    products = sum(max(2 * shape.weights * s.rows / flops, 2 * shape.weights / bps) +
                   max(2 * shape.head * s.sampled / flops, 2 * shape.head / bps) for s in steps)
    sides = [(s.decode_keys * shape.kv_bytes / bps,
              max(s.chunk_sums * shape.key_flops / flops, s.chunk_keys * shape.kv_bytes / bps)) for s in steps]
    decodes, chunks, longer = (sum(x) for x in zip(*((d, c, max(d, c)) for d, c in sides)))
    answers = sum(o for _, o in lengths)
    print(json.dumps(dict(requests=len(lengths), rows=sum(s.rows for s in steps), steps=len(steps), products_s=round(products, 2),
                          decodes_s=round(decodes, 2), chunks_s=round(chunks, 2),
                          one_after_the_other=round(answers / (products + decodes + chunks)),
                          shorter_side_hidden=round(answers / (products + longer)), attention_hidden=round(answers / products))))
    return None


if __name__ == "__main__":
    main()
