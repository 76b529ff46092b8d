#!/usr/bin/python3
"""Writes a random Llama model folder of a given shape: for speed, not for sense.

    make_model.py DIR                         100M class: hidden 768, 12 layers, 12/4 heads, vocab 32000, bf16, tied
    make_model.py DIR --hidden 2048 --inner 5632 --layers 22 --heads 32 --kv-heads 4 --untied     1.1B class

--tokenizer FROM copies tokenizer.json and tokenizer_config.json, so that the whole system can serve the folder; use one
whose vocabulary is not larger than --vocab. --repeat writes 16 GB as fast as the disk takes them (an 8B shape: --hidden 4096
--inner 14336 --layers 32 --heads 32 --kv-heads 8 --vocab 128256 --context 8192 --untied --repeat).
"""
import argparse
import json
import os
import shutil
import struct

import numpy as np


def shapes(a):
    yield "model.embed_tokens.weight", (a.vocab, a.hidden)
    for i in range(a.layers):
        p = "model.layers.%d." % i
        yield p + "input_layernorm.weight", (a.hidden,)
        yield p + "self_attn.q_proj.weight", (a.heads * a.head_dim, a.hidden)
        yield p + "self_attn.k_proj.weight", (a.kv_heads * a.head_dim, a.hidden)
        yield p + "self_attn.v_proj.weight", (a.kv_heads * a.head_dim, a.hidden)
        yield p + "self_attn.o_proj.weight", (a.hidden, a.heads * a.head_dim)
        yield p + "post_attention_layernorm.weight", (a.hidden,)
        yield p + "mlp.gate_proj.weight", (a.inner, a.hidden)
        yield p + "mlp.up_proj.weight", (a.inner, a.hidden)
        yield p + "mlp.down_proj.weight", (a.hidden, a.inner)
    yield "model.norm.weight", (a.hidden,)
    if a.untied:
        yield "lm_head.weight", (a.vocab, a.hidden)


def encode(x, dtype):
    if dtype == "F32":
        return x.astype("<f4").tobytes()
    if dtype == "F16":
        return x.astype("<f2").tobytes()
    return (x.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("dir")
    for name, default in [("hidden", 768), ("inner", 2048), ("layers", 12), ("heads", 12), ("kv-heads", 4),
                          ("head-dim", 0), ("vocab", 32000), ("context", 2048), ("seed", 1)]:
        p.add_argument("--" + name, type=int, default=default)
    p.add_argument("--dtype", choices=["F32", "F16", "BF16"], default="BF16")
    p.add_argument("--untied", action="store_true")
    p.add_argument("--tokenizer")
    p.add_argument("--repeat", action="store_true", help="the same numbers in all tensors of a shape: quickly written")
    a = p.parse_args()
    a.head_dim = a.head_dim or a.hidden // a.heads
    os.makedirs(a.dir, exist_ok=True)
    size = 4 if a.dtype == "F32" else 2
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes(a):
        n = int(np.prod(shape)) * size
        header[name] = {"dtype": a.dtype, "shape": list(shape), "data_offsets": [at, at + n]}
        at += n
    rng, blocks = np.random.default_rng(a.seed), {}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(a.dir + "/model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes(a):
            if len(shape) == 1:
                f.write(encode(np.ones(shape, np.float32), a.dtype))
                continue
            for row in range(0, shape[0], 4096):  # not the whole tensor in memory
                rows = min(4096, shape[0] - row)
                block = blocks.get((rows, shape[1]))
                if block is None:
                    x = rng.standard_normal((rows, shape[1]), dtype=np.float32) * np.float32(0.02)
                    block = encode(x, a.dtype)
                    if a.repeat:
                        blocks[rows, shape[1]] = block
                f.write(block)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": a.hidden,
        "intermediate_size": a.inner, "num_hidden_layers": a.layers, "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads, "head_dim": a.head_dim, "vocab_size": a.vocab,
        "max_position_embeddings": a.context, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "rope_scaling": None, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": not a.untied,
        "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[a.dtype],
    }
    with open(a.dir + "/config.json", "w") as f:
        json.dump(config, f, indent=1)
    if a.tokenizer:
        for name in ["tokenizer.json", "tokenizer_config.json"]:
            shutil.copy(os.path.join(a.tokenizer, name), a.dir)
    print("%s: %.1f million parameters, %.1f MB" % (a.dir, at / size / 1e6, at / 1e6))


if __name__ == "__main__":
    main()
