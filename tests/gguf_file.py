#!/usr/bin/python3
"""GGUF files for tests: a writer, and the definition of each quantised type in NumPy.

    gguf_file.py FOLDER FILE     a Llama folder with a byte-level tokenizer as one file, as converters write it

The definitions are written from the format's description (struct by struct: where each bit of value i of a block stands) and
share nothing with worker/quant.c: here every field of a block is unpacked whole, and indices pick from it.
"""
import json
import struct
import sys

import numpy as np

KINDS = {"u32": (4, "<I"), "i32": (5, "<i"), "f32": (6, "<f"), "bool": (7, "<?"), "u64": (10, "<Q")}
PLAIN = {"F32": 0, "F16": 1, "BF16": 30}


def string(text):
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(v):
    """(kind, x); ("string", x); ("array", kind, [x, ...]) as the bytes of a value with its kind."""
    if v[0] == "string":
        return struct.pack("<I", 8) + string(v[1])
    if v[0] == "array":
        number = 8 if v[1] == "string" else KINDS[v[1]][0]
        items = b"".join(string(x) if v[1] == "string" else struct.pack(KINDS[v[1]][1], x) for x in v[2])
        return struct.pack("<IIQ", 9, number, len(v[2])) + items
    return struct.pack("<I", KINDS[v[0]][0]) + struct.pack(KINDS[v[0]][1], v[1])


def write(path, values, tensors, alignment=32):
    """values: {key: value}; tensors: [(name, type number, shape with rows first, bytes)]"""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    for key, v in values.items():
        out += string(key) + value(v)
    data = b""
    for name, kind, shape, raw in tensors:
        data += b"\0" * (-len(data) % alignment)
        out += string(name) + struct.pack("<I", len(shape)) + struct.pack("<%dQ" % len(shape), *reversed(shape))
        out += struct.pack("<IQ", kind, len(data))
        data += raw
    out += b"\0" * (-len(out) % alignment)
    with open(path, "wb") as f:
        f.write(out + data)


# ---- quantised types: fields of a block, and what value i is ----

def nibbles(q, low, high):
    """Values low of the low halves, then values high of the high halves, of the bytes q[..., n]."""
    return np.concatenate([q[..., low] & 15, q[..., high] >> 4], -1)


def bits(q):
    """[..., bytes] to [..., 8 * bytes]: the lowest bit of each byte first."""
    return np.unpackbits(q, axis=-1, bitorder="little")


def small(b, fifth=None, offset=0):
    q = nibbles(b["q"], slice(None), slice(None)).astype(int)
    if fifth is not None:
        q = q + 16 * bits(fifth)
    return b["d"] * (q - offset) + b.get("m", 0.0)


def quarters(q):
    """64 bytes to 256 values of two bits: bytes 0..31 give values 0..31 (lowest bits), 32..63, 64..95, 96..127."""
    h = q.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    return (h & 3).reshape(-1, 256).astype(int)


def halves(q):
    """128 bytes to 256 values of four bits: bytes 0..31 give values 0..31 and 32..63."""
    h = q.reshape(-1, 4, 1, 32) >> np.array([0, 4], np.uint8)[:, None]
    return (h & 15).reshape(-1, 256).astype(int)


def eight_scales(s):
    """12 bytes to 8 scales and 8 minima of 6 bits: the last four of each are split."""
    s = s.astype(int)
    first, second, third = s[:, 0:4], s[:, 4:8], s[:, 8:12]
    scales = np.concatenate([first & 63, (third & 15) + (first >> 6) * 16], 1)
    minima = np.concatenate([second & 63, (third >> 4) + (second >> 6) * 16], 1)
    return np.repeat(scales, 32, 1), np.repeat(minima, 32, 1)


def q2_k(b):
    s = np.repeat(b["s"].astype(int), 16, 1)
    return b["d"] * (s & 15) * quarters(b["q"]) - b["m"] * (s >> 4)


def q3_k(b):
    s = b["s"].astype(int)
    low = np.concatenate([s[:, 0:8] & 15, s[:, 0:8] >> 4], 1)
    top = np.concatenate([s[:, 8:12] >> shift & 3 for shift in (0, 2, 4, 6)], 1)
    third = bits(b["h"]).reshape(-1, 32, 8).swapaxes(1, 2).reshape(-1, 256).astype(int)
    return b["d"] * np.repeat(low + 16 * top - 32, 16, 1) * (quarters(b["q"]) - 4 * (1 - third))


def q4_k(b):
    scales, minima = eight_scales(b["s"])
    return b["d"] * scales * halves(b["q"]) - b["m"] * minima


def q5_k(b):
    scales, minima = eight_scales(b["s"])
    fifth = bits(b["h"]).reshape(-1, 32, 8).swapaxes(1, 2).reshape(-1, 256).astype(int)
    return b["d"] * scales * (halves(b["q"]) + 16 * fifth) - b["m"] * minima


def q6_k(b):
    q = b["q"].reshape(-1, 2, 64)
    low = np.concatenate([q & 15, q >> 4], 2).reshape(-1, 256).astype(int)
    s = np.repeat(b["s"].view(np.int8).astype(int), 16, 1)
    return b["d"] * s * (low + 16 * quarters(b["h"]) - 32)


# number, values of a block, fields in order (bytes; d and m are F16), values
QUANTS = {
    "Q4_0": (2, 32, dict(d=2, q=16), lambda b: small(b, offset=8)),
    "Q4_1": (3, 32, dict(d=2, m=2, q=16), small),
    "Q5_0": (6, 32, dict(d=2, h=4, q=16), lambda b: small(b, b["h"], 16)),
    "Q5_1": (7, 32, dict(d=2, m=2, h=4, q=16), lambda b: small(b, b["h"])),
    "Q8_0": (8, 32, dict(d=2, q=32), lambda b: b["d"] * b["q"].view(np.int8)),
    "Q2_K": (10, 256, dict(s=16, q=64, d=2, m=2), q2_k),
    "Q3_K": (11, 256, dict(h=32, q=64, s=12, d=2), q3_k),
    "Q4_K": (12, 256, dict(d=2, m=2, s=12, q=128), q4_k),
    "Q5_K": (13, 256, dict(d=2, m=2, s=12, h=32, q=128), q5_k),
    "Q6_K": (14, 256, dict(q=128, h=64, s=16, d=2), q6_k),
}


def expand(kind, raw):
    """Bytes of whole blocks to float64."""
    _, _, fields, definition = QUANTS[kind]
    blocks = np.frombuffer(raw, np.uint8).reshape(-1, sum(fields.values()))
    b, at = {}, 0
    for name, n in fields.items():
        b[name] = np.ascontiguousarray(blocks[:, at:at + n])
        if name in "dm":
            b[name] = b[name].view("<f2").astype(np.float64)
        at += n
    return definition(b).reshape(-1)


def random_blocks(kind, n, size, rng):
    """n blocks, every bit random but the F16 fields, which are such that values are about of the given size around 0."""
    _, _, fields, _ = QUANTS[kind]
    blocks = rng.integers(0, 256, (n, sum(fields.values())), dtype=np.uint8)
    at, where = 0, {}
    for name, bytes_ in fields.items():
        where[name] = slice(at, at + bytes_)
        at += bytes_

    def put(name, x):
        if name in where:
            blocks[:, where[name]] = np.asarray(x, "<f2").reshape(-1, 1).view(np.uint8)
    one, none = np.ones(n), np.zeros(n)
    put("d", one)
    put("m", none)
    plain = expand(kind, blocks.tobytes())
    d = size / plain.std() * (0.75 + 0.5 * rng.random(n))
    put("d", none)
    put("m", one)
    shift = expand(kind, blocks.tobytes()).mean() if "m" in where else 1.0
    put("d", d)
    put("m", -d * plain.mean() / shift)
    return blocks.tobytes()


# ---- a model folder's tensors as a GGUF file ----

LAYER_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


def tensor_name(name):
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
                "lm_head.weight": "output.weight"}[name]
    _, _, layer, rest = name.split(".", 3)
    module, what = rest.rsplit(".", 1)
    return "blk.%s.%s.%s" % (layer, LAYER_NAMES[module], what)


def paired(raw, heads, head_dim):
    """Rows i and i + D/2 of each head beside each other, as files of the architecture "llama" have q and k."""
    rows = np.frombuffer(raw, np.uint8).reshape(heads, 2, head_dim // 2, -1)
    return rows.swapaxes(1, 2).tobytes()


def unpaired(x, heads, head_dim):
    """The way back, of values [rows][cols]."""
    return x.reshape(heads, head_dim // 2, 2, -1).swapaxes(1, 2).reshape(x.shape)


def from_folder(folder, path):
    with open(folder + "/config.json") as f:
        c = json.load(f)
    with open(folder + "/tokenizer.json") as f:
        tokenizer = json.load(f)
    with open(folder + "/model.safetensors", "rb") as f:
        header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        data = f.read()
    tensors = []
    for name, t in header.items():
        if name == "__metadata__":
            continue
        raw = data[slice(*t["data_offsets"])]
        if "q_proj" in name or "k_proj" in name:
            raw = paired(raw, c["num_attention_heads" if "q_proj" in name else "num_key_value_heads"], c["head_dim"])
        tensors.append((tensor_name(name), PLAIN[t["dtype"]], t["shape"], raw))
    tokens, kinds = [""] * c["vocab_size"], [1] * c["vocab_size"]
    for token, i in tokenizer["model"]["vocab"].items():
        tokens[i] = token
    for t in tokenizer["added_tokens"]:
        tokens[t["id"]], kinds[t["id"]] = t["content"], 3
    numbers = {"embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
               "block_count": "num_hidden_layers", "attention.head_count": "num_attention_heads",
               "attention.head_count_kv": "num_key_value_heads", "context_length": "max_position_embeddings",
               "rope.dimension_count": "head_dim", "attention.key_length": "head_dim", "attention.value_length": "head_dim"}
    values = {"general.architecture": ("string", "llama")}
    values.update({"llama." + key: ("u32", c[field]) for key, field in numbers.items()})
    values.update({
        "llama.attention.layer_norm_rms_epsilon": ("f32", c["rms_norm_eps"]), "llama.rope.freq_base": ("f32", c["rope_theta"]),
        "tokenizer.ggml.model": ("string", "gpt2"), "tokenizer.ggml.pre": ("string", "llama-bpe"),
        "tokenizer.ggml.tokens": ("array", "string", tokens), "tokenizer.ggml.token_type": ("array", "i32", kinds),
        "tokenizer.ggml.merges": ("array", "string", tokenizer["model"]["merges"]),
        "tokenizer.chat_template": ("string", "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"),
        "tokenizer.ggml.bos_token_id": ("u32", c["bos_token_id"]), "tokenizer.ggml.eos_token_id": ("u32", c["eos_token_id"]),
    })
    write(path, values, tensors)


if __name__ == "__main__":
    from_folder(*sys.argv[1:])
