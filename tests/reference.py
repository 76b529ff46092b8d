#!/usr/bin/python3
"""Engine against an independent reference: random models of many shapes, computed here in float64 with NumPy.

    reference.py --run PATH/engine_run [--quant-run PATH/quant_run] [--seed N] [--only NAME]     compare (what ctest does)
    reference.py --write DIR --only NAME [--seed N]                 leave one model folder, with expected.json, in DIR

The forward below is written from the published descriptions of Llama, Mistral, Qwen 2 and Qwen 3 and of the rotary
scalings (the formulas of the transformers library for the latter), and shares nothing with worker/: no KV cache, every step
is computed from scratch. Ids are compared up to the first step whose margin is under TOLERANCE, logits always.
"""
import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile

import numpy as np

import gguf_file

TOLERANCE = 2e-3  # logits here are of size 1 to 10; float32 arithmetic differs by 1e-5 or so
LOGITS_TOLERANCE = 2e-4
NEW_TOKENS = 24
ADJUSTED_TOKENS = 12

# hidden, inner, layers, heads, kv_heads, head_dim, vocab; dtype(s); files; options; config: fields as they stand in
# config.json, from which the reference takes biases, norms, windows and scalings too
MODELS = {
    "gqa_untied": dict(hidden=72, inner=100, layers=3, heads=8, kv_heads=2, head_dim=16, vocab=301, dtype="F32", files=1,
                       tied=False),
    "tied_sharded": dict(hidden=48, inner=130, layers=2, heads=6, kv_heads=3, head_dim=24, vocab=258, dtype="BF16",
                         files=3, tied=True),
    "odd_mqa": dict(hidden=45, inner=37, layers=3, heads=7, kv_heads=1, head_dim=8, vocab=97, dtype="F16", files=2,
                    tied=False),
    "mixed_dtypes": dict(hidden=100, inner=171, layers=2, heads=12, kv_heads=4, head_dim=64, vocab=513, dtype="mixed",
                         files=1, tied=False, rope_theta=500000.0, eps=1e-6),
    "wide_head": dict(hidden=33, inner=3, layers=1, heads=3, kv_heads=3, head_dim=256, vocab=61, dtype="F32", files=1,
                      tied=True),
    "default_head_dim": dict(hidden=64, inner=96, layers=4, heads=4, kv_heads=4, head_dim=None, vocab=200, dtype="BF16",
                             files=5, tied=False),
    "mistral": dict(hidden=56, inner=90, layers=3, heads=6, kv_heads=2, head_dim=16, vocab=199, dtype="BF16", files=1,
                    tied=False, arch="MistralForCausalLM", config=dict(sliding_window=9)),
    "qwen2": dict(hidden=48, inner=77, layers=3, heads=6, kv_heads=2, head_dim=None, vocab=211, dtype="F16", files=1,
                  tied=True, rope_theta=1000000.0, arch="Qwen2ForCausalLM",
                  config=dict(use_sliding_window=True, sliding_window=11, max_window_layers=2, use_mrope=False)),
    "qwen2_yarn": dict(hidden=48, inner=64, layers=2, heads=6, kv_heads=3, head_dim=16, vocab=140, dtype="mixed", files=1,
                       tied=True, rope_theta=1000000.0, arch="Qwen2ForCausalLM",
                       config=dict(use_sliding_window=False,
                                   rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=160))),
    "qwen3": dict(hidden=40, inner=66, layers=3, heads=4, kv_heads=2, head_dim=24, vocab=180, dtype="BF16", files=1,
                  tied=True, arch="Qwen3ForCausalLM",
                  config=dict(use_sliding_window=False, sliding_window=None, max_window_layers=3)),
    "qwen3_yarn": dict(hidden=40, inner=66, layers=3, heads=4, kv_heads=1, head_dim=32, vocab=150, dtype="mixed", files=1,
                       tied=False, arch="Qwen3ForCausalLM",
                       config=dict(attention_bias=True, use_sliding_window=True, sliding_window=8,
                                   layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                                   rope_scaling=dict(rope_type="yarn", factor=4.0, beta_fast=16,
                                                     original_max_position_embeddings=40))),
    "llama3_biases": dict(hidden=64, inner=101, layers=2, heads=4, kv_heads=2, head_dim=32, vocab=170, dtype="F32", files=1,
                          tied=False, rope_theta=500.0,
                          config=dict(attention_bias=True, mlp_bias=True,
                                      rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                                                        high_freq_factor=4.0, original_max_position_embeddings=64))),
    "yi_linear": dict(hidden=64, inner=96, layers=2, heads=8, kv_heads=1, head_dim=None, vocab=190, dtype="BF16", files=1,
                      tied=False, rope_theta=5000000.0, config=dict(rope_scaling=dict(type="linear", factor=2.5))),
    "smollm2_yarn": dict(hidden=72, inner=64, layers=3, heads=9, kv_heads=3, head_dim=8, vocab=130, dtype="BF16", files=1,
                         tied=True, rope_theta=100000.0,
                         config=dict(rope_interleaved=False, is_llama_config=True,
                                     rope_scaling=dict(type="yarn", factor=3.0, original_max_position_embeddings=50,
                                                       attention_factor=1.3, truncate=False))),
}
# ranks, rows per step, requests at a time, threads: of the shapes above, and of the families below
RUNS = [(1, 64, 1, 2), (1, 3, 4, 1), (2, 16, 2, 1), (3, 64, 4, 1), (4, 5, 3, 2), (5, 64, 4, 1), (6, 16, 4, 1), (7, 64, 2, 1),
        (8, 64, 4, 1)]
FAMILY_RUNS = [(1, 64, 1, 1), (2, 5, 3, 1), (3, 16, 4, 1)]

# Written as GGUF files too: those that such a file can describe.
GGUF_TOO = ("mixed_dtypes", "mistral", "qwen2_yarn", "qwen3", "llama3_biases", "yi_linear")
# Only as a GGUF file: each matrix quantised in another way. Columns of ranks end within blocks.
QUANTISED = dict(hidden=256, inner=256, layers=2, heads=8, kv_heads=4, head_dim=32, vocab=96, dtype="F32", files=1,
                 tied=False, config=dict(max_position_embeddings=160))


def to_bf16(x):
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def stored(x, dtype):
    """(bytes as in the file, what they stand for)"""
    if dtype == "F32":
        y = x.astype("<f4")
        return y.tobytes(), y.astype(np.float64)
    if dtype == "F16":
        y = x.astype("<f2")
        return y.tobytes(), y.astype(np.float64)
    y = to_bf16(x)
    return y.astype("<u2").tobytes(), (y.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def tensor_shapes(m):
    h, d = m["hidden"], m["head_dim"]
    yield "model.embed_tokens.weight", (m["vocab"], h)
    for i in range(m["layers"]):
        p = "model.layers.%d." % i
        yield p + "input_layernorm.weight", (h,)
        yield p + "self_attn.q_proj.weight", (m["heads"] * d, h)
        yield p + "self_attn.k_proj.weight", (m["kv_heads"] * d, h)
        yield p + "self_attn.v_proj.weight", (m["kv_heads"] * d, h)
        yield p + "self_attn.o_proj.weight", (h, m["heads"] * d)
        yield p + "post_attention_layernorm.weight", (h,)
        yield p + "mlp.gate_proj.weight", (m["inner"], h)
        yield p + "mlp.up_proj.weight", (m["inner"], h)
        yield p + "mlp.down_proj.weight", (h, m["inner"])
        if m["qkv_bias"]:
            yield p + "self_attn.q_proj.bias", (m["heads"] * d,)
            yield p + "self_attn.k_proj.bias", (m["kv_heads"] * d,)
            yield p + "self_attn.v_proj.bias", (m["kv_heads"] * d,)
        if m["o_bias"]:
            yield p + "self_attn.o_proj.bias", (h,)
        if m["mlp_bias"]:
            yield p + "mlp.gate_proj.bias", (m["inner"],)
            yield p + "mlp.up_proj.bias", (m["inner"],)
            yield p + "mlp.down_proj.bias", (h,)
        if m["qk_norm"]:
            yield p + "self_attn.q_norm.weight", (d,)
            yield p + "self_attn.k_norm.weight", (d,)
    yield "model.norm.weight", (h,)
    if not m["tied"]:
        yield "lm_head.weight", (m["vocab"], h)


def write_file(path, tensors):
    header, data, at = {"__metadata__": {"format": "pt"}}, b"", 0
    for name, dtype, shape, raw in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(raw)]}
        data += raw
        at += len(raw)
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + data)


def complete(m):
    """Defaults, and what the class and the options of config.json mean."""
    m.setdefault("rope_theta", 10000.0)
    m.setdefault("eps", 1e-5)
    m.setdefault("arch", "LlamaForCausalLM")
    m["explicit_head_dim"] = m["head_dim"] is not None
    m["head_dim"] = m["head_dim"] or m["hidden"] // m["heads"]
    c = m.setdefault("config", {})
    m["qkv_bias"] = m["arch"] == "Qwen2ForCausalLM" or c.get("attention_bias", False)
    m["o_bias"] = c.get("attention_bias", False)
    m["mlp_bias"] = c.get("mlp_bias", False)
    m["qk_norm"] = m["arch"] == "Qwen3ForCausalLM"
    windowed = range(0)
    if m["arch"] == "MistralForCausalLM":
        windowed = range(m["layers"])
    elif c.get("layer_types"):
        windowed = [i for i, kind in enumerate(c["layer_types"]) if kind == "sliding_attention"]
    elif c.get("use_sliding_window"):
        windowed = range(c["max_window_layers"], m["layers"])
    m["windows"] = [c["sliding_window"] if i in windowed else None for i in range(m["layers"])]


def make_model(folder, m, rng):
    """Writes the folder; returns the weights as float64."""
    complete(m)
    mixed = ["BF16", "F16", "F32"]
    weights, parts, all_tensors = {}, [[] for _ in range(m["files"])], {}
    for k, (name, shape) in enumerate(tensor_shapes(m)):
        if name.endswith(".bias"):
            x = 0.5 * rng.standard_normal(shape)
        elif len(shape) == 1:
            x = 1.0 + 0.2 * rng.standard_normal(shape)
        elif "embed" in name:
            x = rng.standard_normal(shape)
        else:
            x = rng.standard_normal(shape) * (1.6 / np.sqrt(shape[1]))
        if "embed" in name and m["tied"]:
            x *= 0.3
        dtype = mixed[k % 3] if m["dtype"] == "mixed" else m["dtype"]
        raw, weights[name] = stored(x, dtype)
        parts[k % m["files"]].append((name, dtype, shape, raw))
        all_tensors[name] = (dtype, shape, raw)
    if m["files"] == 1:
        write_file(folder + "/model.safetensors", parts[0])
    else:
        index = {}
        for i, part in enumerate(parts):
            name = "model-%05d-of-%05d.safetensors" % (i + 1, m["files"])
            write_file(folder + "/" + name, part)
            index.update({t[0]: name for t in part})
        with open(folder + "/model.safetensors.index.json", "w") as f:
            json.dump({"metadata": {}, "weight_map": index}, f)
    config = {
        "architectures": [m["arch"]], "hidden_size": m["hidden"],
        "intermediate_size": m["inner"], "num_hidden_layers": m["layers"], "num_attention_heads": m["heads"],
        "num_key_value_heads": m["kv_heads"], "vocab_size": m["vocab"], "max_position_embeddings": 160,
        "rms_norm_eps": m["eps"], "rope_theta": m["rope_theta"], "hidden_act": "silu", "rope_scaling": None,
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": m["tied"], "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if m["explicit_head_dim"]:
        config["head_dim"] = m["head_dim"]
    config.update(m["config"])
    with open(folder + "/config.json", "w") as f:
        json.dump(config, f)
    return weights, all_tensors


def gguf_values(m):
    arch = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2",
            "Qwen3ForCausalLM": "qwen3"}[m["arch"]]
    own = {
        "embedding_length": ("u32", m["hidden"]), "feed_forward_length": ("u32", m["inner"]),
        "block_count": ("u32", m["layers"]), "attention.head_count": ("u32", m["heads"]),
        "attention.head_count_kv": ("u32", m["kv_heads"]), "context_length": ("u32", 160),
        "attention.layer_norm_rms_epsilon": ("f32", m["eps"]), "rope.freq_base": ("f32", m["rope_theta"]),
    }
    if m["explicit_head_dim"]:
        own.update({"attention.key_length": ("u32", m["head_dim"]), "attention.value_length": ("u32", m["head_dim"])})
    if m["windows"][0]:
        own["attention.sliding_window"] = ("u32", m["windows"][0])
    scaling = m["config"].get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind in ("linear", "yarn"):
        own.update({"rope.scaling.type": ("string", kind), "rope.scaling.factor": ("f32", scaling["factor"])})
    if kind == "yarn":
        own["rope.scaling.original_context_length"] = ("u32", scaling["original_max_position_embeddings"])
    values = {"general.architecture": ("string", arch), "general.name": ("string", "a test"),
              "tokenizer.ggml.bos_token_id": ("u32", 1), "tokenizer.ggml.eos_token_id": ("u32", 2)}
    values.update({"%s.%s" % (arch, key): v for key, v in own.items()})
    return values


def write_gguf(path, m, tensors):
    """tensors: name: (type, shape, bytes as a folder's file has them)"""
    values, out = gguf_values(m), []
    for name, (kind, shape, raw) in tensors.items():
        if values["general.architecture"][1] == "llama" and ("q_proj" in name or "k_proj" in name):
            raw = gguf_file.paired(raw, m["heads" if "q_proj" in name else "kv_heads"], m["head_dim"])
        out.append((gguf_file.tensor_name(name), gguf_file.PLAIN[kind], shape, raw))
    if (m["config"].get("rope_scaling") or {}).get("rope_type") == "llama3":
        # a file of Llama 3 has the scaling as what each frequency is divided by
        d = m["head_dim"]
        divisor = m["rope_theta"] ** -(np.arange(0, d, 2) / d) / frequencies(m, d)[0]
        out.append(("rope_freqs.weight", 0, (d // 2,), divisor.astype("<f4").tobytes()))
    gguf_file.write(path, values, out)


def make_quantised(path, m, rng):
    complete(m)
    weights, out = {}, []
    kinds = list(gguf_file.QUANTS) * 2
    for name, shape in tensor_shapes(m):
        if len(shape) == 1:
            raw, weights[name] = stored(1.0 + 0.2 * rng.standard_normal(shape), "F32")
            out.append((gguf_file.tensor_name(name), 0, shape, raw))
            continue
        kind = kinds.pop(0)
        number, block = gguf_file.QUANTS[kind][:2]
        size = 1.0 if "embed" in name else 1.6 / np.sqrt(shape[1])
        raw = gguf_file.random_blocks(kind, shape[0] * shape[1] // block, size, rng)
        out.append((gguf_file.tensor_name(name), number, shape, raw))
        x = gguf_file.expand(kind, raw).reshape(shape)
        if "q_proj" in name or "k_proj" in name:
            x = gguf_file.unpaired(x, m["heads" if "q_proj" in name else "kv_heads"], m["head_dim"])
        weights[name] = x
    gguf_file.write(path, gguf_values(m), out)
    return weights


def rms_norm(x, w, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w


def frequencies(m, d):
    """Inverse frequencies, and what cosine and sine are multiplied by."""
    theta = m["rope_theta"]
    scaling = m["config"].get("rope_scaling") or {}
    plain = 1.0 / theta ** (np.arange(0, d, 2) / d)
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind is None:
        return plain, 1.0
    factor = scaling["factor"]
    if kind == "linear":
        return plain / factor, 1.0
    trained = scaling["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        wavelength = 2 * np.pi / plain
        smooth = (trained / wavelength - low) / (high - low)
        mixed = (1 - smooth) * plain / factor + smooth * plain
        slow = np.where(wavelength > trained / low, plain / factor, mixed)
        return np.where(wavelength < trained / high, plain, slow), 1.0
    assert kind == "yarn"

    def dimension(rotations):
        return d * np.log(trained / (rotations * 2 * np.pi)) / (2 * np.log(theta))
    first, last = dimension(scaling.get("beta_fast", 32)), dimension(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        first, last = np.floor(first), np.ceil(last)
    first, last = max(first, 0), min(last, d - 1)
    ramp = np.clip((np.arange(d // 2) - first) / (last - first or 0.001), 0, 1)
    return plain / factor * ramp + plain * (1 - ramp), scaling.get("attention_factor", 0.1 * np.log(factor) + 1)


def rotate(x, inverse, factor):
    """x: [T][heads][d]; pairs (i, i + d/2) as Hugging Face's Llama has them."""
    t, _, d = x.shape
    angle = np.outer(np.arange(t), inverse)[:, None, :]
    a, b = x[..., : d // 2], x[..., d // 2:]
    return factor * np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def linear(w, name, x):
    y = x @ w[name + ".weight"].T
    return y + w[name + ".bias"] if name + ".bias" in w else y


def all_logits(m, w, ids):
    t, d, group = len(ids), m["head_dim"], m["heads"] // m["kv_heads"]
    rope = frequencies(m, d)
    x = w["model.embed_tokens.weight"][ids]
    for i in range(m["layers"]):
        p = "model.layers.%d." % i
        h = rms_norm(x, w[p + "input_layernorm.weight"], m["eps"])
        q = linear(w, p + "self_attn.q_proj", h).reshape(t, -1, d)
        k = linear(w, p + "self_attn.k_proj", h).reshape(t, -1, d)
        v = linear(w, p + "self_attn.v_proj", h).reshape(t, -1, d)
        if m["qk_norm"]:
            q = rms_norm(q, w[p + "self_attn.q_norm.weight"], m["eps"])
            k = rms_norm(k, w[p + "self_attn.k_norm.weight"], m["eps"])
        q, k = rotate(q, *rope), rotate(k, *rope)
        distance = np.arange(t)[:, None] - np.arange(t)
        mask = np.where((distance >= 0) & (distance < (m["windows"][i] or t)), 0.0, -np.inf)
        out = np.empty((t, m["heads"], d))
        for head in range(m["heads"]):
            s = q[:, head] @ k[:, head // group].T / np.sqrt(d) + mask
            s = np.exp(s - s.max(-1, keepdims=True))
            out[:, head] = s / s.sum(-1, keepdims=True) @ v[:, head // group]
        x = x + linear(w, p + "self_attn.o_proj", out.reshape(t, -1))
        h = rms_norm(x, w[p + "post_attention_layernorm.weight"], m["eps"])
        gate, up = linear(w, p + "mlp.gate_proj", h), linear(w, p + "mlp.up_proj", h)
        x = x + linear(w, p + "mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
    head = w["model.embed_tokens.weight" if m["tied"] else "lm_head.weight"]
    return rms_norm(x, w["model.norm.weight"], m["eps"]) @ head.T


def last_logits(m, w, ids):
    return all_logits(m, w, ids)[-1]


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


# Greedy with every option that changes logits, by the definitions of vLLM.
OPTIONS = dict(repetition=1.25, frequency=0.3, presence=0.4)
BIAS = [[3, 1.5], [7, -2.0], [11, 0.75]]


def adjusted(x, prompt, out):
    x = x.copy()
    for i, bias in BIAS:
        x[i] += bias
    for i in set(prompt) | set(out):
        x[i] = x[i] / OPTIONS["repetition"] if x[i] > 0 else x[i] * OPTIONS["repetition"]
    for i in set(out):
        x[i] -= OPTIONS["frequency"] * out.count(i) + OPTIONS["presence"]
    return x


def expect_adjusted(m, w, prompt):
    """Greedy ids and margins with OPTIONS, and the log probabilities of all tokens but the first."""
    ids, out, margins = list(prompt), [], []
    for _ in range(ADJUSTED_TOKENS):
        logits = adjusted(last_logits(m, w, ids), prompt, out)
        top = np.sort(logits)[-2:]
        margins.append(float(top[1] - top[0]))
        out.append(int(logits.argmax()))
        ids.append(out[-1])
    return {"prompt_ids": list(prompt), "greedy_ids": out, "margins": margins,
            "logprobs": log_softmax(all_logits(m, w, ids[:-1]))}


def expect(m, w, prompt):
    ids, out, margins, first = list(prompt), [], [], None
    for _ in range(NEW_TOKENS):
        logits = last_logits(m, w, ids)
        first = logits if first is None else first
        top = np.sort(logits)[-2:]
        margins.append(float(top[1] - top[0]))
        out.append(int(logits.argmax()))
        ids.append(out[-1])
    return {"prompt_ids": list(prompt), "greedy_ids": out, "margins": margins, "first_logits": first.tolist()}


def make_cases(m, w, rng):
    lengths = [1, 5, 33, 18]
    return [expect(m, w, [int(i) for i in rng.integers(0, m["vocab"], n)]) for n in lengths]


def compare(label, cases, got):
    bad, compared = 0, 0
    for i, (case, ids, logits) in enumerate(zip(cases, got["ids"], got["logits"])):
        error = max(abs(a - b) for a, b in zip(logits, case["first_logits"]))
        if len(logits) != len(case["first_logits"]) or not error < LOGITS_TOLERANCE:
            print("%s prompt %d: first logits off by %g, allowed %g" % (label, i, error, LOGITS_TOLERANCE))
            bad += 1
        for k, (a, b, margin) in enumerate(zip(ids, case["greedy_ids"], case["margins"])):
            if margin < TOLERANCE:
                break
            compared += 1
            if a != b:
                print("%s prompt %d: token %d is %d, expected %d (margin %g)" % (label, i, k, a, b, margin))
                bad += 1
                break
    return bad, compared


def run_engine(run, folder, ranks, rows, concurrent, threads, tokens, prompts):
    p = subprocess.run([run, "%s,threads=%d" % (folder, threads), str(ranks), str(rows), str(concurrent), str(tokens)],
                       input=json.dumps(prompts), stdout=subprocess.PIPE, universal_newlines=True)
    return json.loads(p.stdout) if p.returncode == 0 else None


def score_error(got, logprobs, token):
    """How far one [logprob, rank, top ids, top logprobs] is from a row of the reference."""
    logprob, rank, top, values = got
    order = np.sort(logprobs)[::-1]
    errors = [abs(logprob - logprobs[token]), abs(order[rank - 1] - logprobs[token])]
    errors += [abs(v - logprobs[i]) for i, v in zip(top, values)] + [abs(v - o) for v, o in zip(values, order)]
    return max(errors) if len(top) == 3 == len(set(top)) else np.inf


def compare_scores(label, case, ids, scores, prompt_scores):
    tokens, bad = case["prompt_ids"] + ids, 0
    if len(prompt_scores) != len(case["prompt_ids"]) - 1 or len(scores) != len(ids):
        print("%s: %d and %d scores" % (label, len(prompt_scores), len(scores)))
        return 1
    for i, score in enumerate(prompt_scores + scores):
        error = score_error(score, case["logprobs"][i], tokens[i + 1])
        if not error < LOGITS_TOLERANCE:
            print("%s: log probability of token %d is off by %g" % (label, i + 1, error))
            bad += 1
    return bad


def check_options(run, folder, label, cases):
    bad = 0
    given = dict(OPTIONS, bias=BIAS, prompts=[c["prompt_ids"] for c in cases])
    for ranks, rows, concurrent, threads in [(1, 64, 1, 2), (2, 5, 3, 1), (3, 64, 4, 1), (4, 7, 4, 1)]:
        where = "%s with options, %d ranks, %d rows" % (label, ranks, rows)
        got = run_engine(run, folder, ranks, rows, concurrent, threads, ADJUSTED_TOKENS, given)
        if got is None:
            print(where + ": engine_run failed")
            bad += 1
            continue
        for i, case in enumerate(cases):
            sure = next((k for k, m in enumerate(case["margins"]) if m < TOLERANCE), ADJUSTED_TOKENS)
            if got["ids"][i][:sure] != case["greedy_ids"][:sure]:
                print("%s, prompt %d: %s, expected %s" % (where, i, got["ids"][i][:sure], case["greedy_ids"][:sure]))
                bad += 1
            elif sure == ADJUSTED_TOKENS:
                bad += compare_scores("%s, prompt %d" % (where, i), case, got["ids"][i], got["logprobs"][i],
                                      got["prompt_logprobs"][i])
    return bad


def check_model(run, name, seed):
    rng = np.random.default_rng([seed, list(MODELS).index(name) if name in MODELS else 1000])
    m = dict(MODELS.get(name, QUANTISED))
    bad = compared = 0
    with tempfile.TemporaryDirectory() as folder:
        path, twin = folder, None
        if name == "quantised":
            path = folder + "/model.gguf"
            weights = make_quantised(path, m, rng)
        else:
            weights, tensors = make_model(folder, m, rng)
        if name in GGUF_TOO:
            twin = folder + "/twin.gguf"
            write_gguf(twin, m, tensors)
        cases = make_cases(m, weights, rng)
        if not m["config"]:  # what follows the logits is the same for all families
            adjusted_cases = [expect_adjusted(m, weights, c["prompt_ids"]) for c in cases]
            bad += check_options(run, folder, name, adjusted_cases)
            if all(min(c["margins"]) < TOLERANCE for c in adjusted_cases):
                print("%s: no log probabilities were compared" % name)
                bad += 1
        prompts = [c["prompt_ids"] for c in cases]
        runs = FAMILY_RUNS if m["config"] else RUNS
        for ranks, rows, concurrent, threads in runs:
            label = "%s, %d ranks, %d rows, %d at a time, seed %d" % (name, ranks, rows, concurrent, seed)
            got = run_engine(run, path, ranks, rows, concurrent, threads, NEW_TOKENS, prompts)
            if got is None:
                print("%s: engine_run failed" % label)
                bad += 1
                continue
            b, c = compare(label, cases, got)
            bad += b
            compared += c
            if twin and ranks <= 3:
                bad += not same_as_twin(label, name, got, run_engine(run, twin, ranks, rows, concurrent, threads, NEW_TOKENS,
                                                                     prompts))
    print("%s: %d ids compared, %d differences" % (name, compared, bad))
    if compared < len(runs) * NEW_TOKENS:
        print("%s: too few margins are over %g to tell anything" % (name, TOLERANCE))
        bad += 1
    return bad


def same_as_twin(label, name, got, twin):
    """The same weights from a GGUF file: bit for bit, but where it has rotary angles by another way (divisors in F32)."""
    allowed = LOGITS_TOLERANCE if name == "llama3_biases" else 0.0
    if twin is None:
        print("%s: the GGUF file failed" % label)
        return False
    error = max(abs(a - b) for x, y in zip(got["logits"], twin["logits"]) for a, b in zip(x, y))
    if twin["ids"] != got["ids"] or error > allowed:
        print("%s: another result from the GGUF file: logits off by %g" % (label, error))
        return False
    return True


def check_quants(run, seed):
    """Blocks of random bits, value by value: the whole rows, and parts that begin and end within blocks."""
    rng = np.random.default_rng([seed, 2000])
    bad = 0
    for kind, (number, block, _, _) in gguf_file.QUANTS.items():
        cols, rows = 4 * block, 8
        raw = gguf_file.random_blocks(kind, rows * cols // block, 1.0, rng)
        want = gguf_file.expand(kind, raw).reshape(rows, cols)
        for first, count in ((0, cols), (block // 2 + 1, 2 * block), (3, 5), (2 * block, block), (cols - 1, 1)):
            p = subprocess.run([run, str(number), str(cols), str(first), str(count)], input=raw, stdout=subprocess.PIPE)
            got = np.frombuffer(p.stdout, np.float32).astype(np.float64)
            part = want[:, first:first + count].reshape(-1)
            # products of scales are rounded to float32 before they meet: an ulp or two of the largest term
            if p.returncode or got.shape != part.shape or not np.abs(got - part).max() <= 2.0 ** -22 * np.abs(want).max():
                print("%s, %d values from %d: not as the format defines them" % (kind, count, first))
                bad += 1
    print("quantised blocks: %d differences" % bad)
    return bad


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--run")
    args.add_argument("--write")
    args.add_argument("--quant-run")
    args.add_argument("--only", choices=sorted(MODELS) + ["quantised"])
    args.add_argument("--seed", type=int, default=1)
    args = args.parse_args()
    if args.write:
        rng = np.random.default_rng([args.seed, list(MODELS).index(args.only)])
        m = dict(MODELS[args.only])
        os.makedirs(args.write, exist_ok=True)
        weights, _ = make_model(args.write, m, rng)
        with open(args.write + "/expected.json", "w") as f:
            json.dump({"cases": make_cases(m, weights, rng)}, f)
        return 0
    bad = sum(check_model(args.run, n, args.seed) for n in ([args.only] if args.only else list(MODELS) + ["quantised"]))
    if args.quant_run:
        bad += check_quants(args.quant_run, args.seed)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
