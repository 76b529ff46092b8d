#!/usr/bin/env python3
"""Random tokenizers: what `tandem tokenize` makes of random texts, against the Hugging Face library.

    pip install tokenizers
    tests/bench/compare_tokenizers.py --rounds 200 --texts 60 --seed 1

Each round makes a tokenizer.json of the types that coordinator/README.md lists: a BPE of a few hundred random merges with
random options, a random normalizer, pre-tokenizer, post-processor and decoder, random added tokens. Texts are made of words
of many scripts, odd spaces, the added tokens and parts of them, and characters from all of Unicode. Compared are ids, with
and without the post-processor, and what is decoded from them and from random ids, with and without special tokens.

A configuration that the library refuses is drawn again; one that tandem refuses is counted by its message, and never a
failure: refusing by name is allowed, another result is not. Exit status 1: something differs; the tokenizer.json of it and
a line that repeats it are printed. --keep DIR keeps those.
"""
import argparse
import collections
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import traceback

import tokenizers

RANGES = [(0, 0x80), (0x80, 0x250), (0x250, 0x370), (0x300, 0x370), (0x370, 0x600), (0x590, 0x700), (0x900, 0x980),
          (0xE00, 0xE80), (0x1100, 0x1200), (0x1E00, 0x2000), (0x2000, 0x2070), (0x2070, 0x2200), (0x2200, 0x2C00),
          (0x2E80, 0x3100), (0x3040, 0x3190), (0x4E00, 0x5200), (0xAC00, 0xAD00), (0xF900, 0xFB00), (0xFB00, 0xFE10),
          (0xFE20, 0x10000), (0x1D400, 0x1D800), (0x1F300, 0x1FA00), (0x1F1E6, 0x1F200), (0xE0000, 0xE0100)]
WORDS = ("the The don't I'M we'LL 'S 's hello WORLD foo_bar x86_64 1234567 3.14 1,000 \u00bd \u0663\u0664 naïve cafe\u0301 "
         "\u1e9b\u0323 \ufb01 \u2126 \u212b \u01c6 straße İstanbul \ufdfa नमस्ते สวัสดี 안녕 你好 👩‍👩‍👧 🇩🇪 -- ... ?! "
         "a@b.c <p> </p> // \\n $ ## \u2581 \u2581\u2581 \u0120 \u0120hello <0x0A> <0xFF> <unk> <s> </s> _a a_ Ab").split()
SPACES = [" ", "  ", "   ", "\t", "\n", "\r\n", "\n\n", " \n", "\n ", "\u00a0", "\u3000", "\u2003", "\u2028", "\u200b",
          "\ufeff", "\x0b", "\x85", "\0", "\u1680", " " * 9, ""]
PATTERNS = [r"\s+", r"\p{L}+", r"\p{N}{1,3}", r" ?\p{L}+", r"[^\s\p{L}\p{N}]+", r"\d", r"[a-z]+|[A-Z]", r"\s*[\r\n]+", r"\w+|[^\w\s]+",
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", r"\p{Han}+", r"[\u4e00-\u9fa5]+",
            r"\p{Lu}\p{Ll}*", r"\S+", r"(?<=a).", r"\n", r"."]
BEHAVIORS = ["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]


class Maker:
    """One random tokenizer and its texts, from one seed."""

    def __init__(self, seed):
        self.r = random.Random(seed)

    def maybe(self, p=0.5):
        return self.r.random() < p

    def char(self):
        while True:
            c = self.r.randrange(*(self.r.choice(RANGES) if self.maybe(0.95) else (0, 0x110000)))
            if not 0xD800 <= c < 0xE000:
                return chr(c)

    def some(self, n):
        return "".join(self.char() for _ in range(n))

    def sequence(self, kind, key, makers, least=0, most=4):
        """None, one, or a Sequence of several, which may hold another."""
        parts = [self.r.choice(makers)() for _ in range(self.r.randint(least, most))]
        if not parts and self.maybe():
            return None
        if len(parts) == 1 and self.maybe(0.8):
            return parts[0]
        if len(parts) > 2 and self.maybe(0.2):
            parts[:2] = [{"type": "Sequence", key: parts[:2]}]
        return {"type": "Sequence", key: parts}

    def pattern(self):
        if self.maybe(0.5):
            return {"Regex": self.r.choice(PATTERNS)}
        return {"String": self.r.choice([" ", "\u2581", "a", "  ", "\n", "é", "e", "th", "..", "l", self.some(1)])}

    # ---- parts ----

    def normalizer(self):
        r = self.r
        plain = ["NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt"]
        return self.sequence("normalizer", "normalizers", [
            lambda: {"type": r.choice(plain)}, lambda: {"type": r.choice(plain)},
            lambda: {"type": "Strip", "strip_left": self.maybe(), "strip_right": self.maybe()},
            lambda: {"type": "Replace", "pattern": self.pattern(), "content": r.choice(["", "\u2581", " ", "xy", "é", self.some(2)])},
            lambda: {"type": "Prepend", "prepend": r.choice(["\u2581", " ", "ab", self.some(1)])},
            lambda: {"type": "ByteLevel"} if self.maybe(0.2) else {"type": "NFC"}], 0, 3)

    def pre_tokenizer(self):
        r = self.r
        return self.sequence("pre_tokenizer", "pretokenizers", [
            lambda: {"type": "Split", "pattern": self.pattern(), "behavior": r.choice(BEHAVIORS), "invert": self.maybe(0.3)},
            lambda: {"type": "Split", "pattern": self.pattern(), "behavior": r.choice(BEHAVIORS), "invert": self.maybe(0.3)},
            lambda: {"type": "ByteLevel", "add_prefix_space": self.maybe(), "trim_offsets": True, "use_regex": self.maybe()},
            lambda: {"type": "Digits", "individual_digits": self.maybe()},
            lambda: {"type": "Metaspace", "replacement": r.choice("\u2581\u2581\u2581_"), "split": self.maybe(),
                     "prepend_scheme": r.choice(["always", "first", "never"])},
            lambda: {"type": r.choice(["Whitespace", "WhitespaceSplit", "BertPreTokenizer"])},
            lambda: {"type": "Punctuation", "behavior": r.choice(BEHAVIORS)},
            lambda: {"type": "CharDelimiterSplit", "delimiter": r.choice([" ", "e", "\u2581", "中"])},
            lambda: {"type": "FixedLength", "length": r.randint(1, 6)}], 0, 3)

    def post_processor(self, ids):
        r = self.r
        names = sorted(ids)

        def template():
            def special():
                return {"SpecialToken": {"id": r.choice(names), "type_id": 0}}
            single = [special() for _ in range(r.randint(0, 2))] + [{"Sequence": {"id": "A", "type_id": 0}}]
            single += [special() for _ in range(r.randint(0, 2))]
            used = {p["SpecialToken"]["id"] for p in single if "SpecialToken" in p}
            return {"type": "TemplateProcessing", "single": single,
                    "pair": single + [{"Sequence": {"id": "B", "type_id": 1}}],
                    "special_tokens": {n: {"id": n, "ids": [ids[n]], "tokens": [n]} for n in used}}

        def pair(kind, **more):
            cls, sep = r.choice(names), r.choice(names)
            return {"type": kind, "sep": [sep, ids[sep]], "cls": [cls, ids[cls]], **more}
        byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": self.maybe(), "use_regex": True}
        wraps = [template, template, lambda: pair("BertProcessing"),
                 lambda: pair("RobertaProcessing", trim_offsets=self.maybe(), add_prefix_space=self.maybe())]
        one = r.choice(wraps)()
        return r.choice([None, byte_level, one, one, {"type": "Sequence", "processors": [byte_level, one]},
                         {"type": "Sequence", "processors": [one, byte_level]}])

    def decoder(self):
        r = self.r
        strip = lambda: {"type": "Strip", "content": r.choice(" \u2581a"), "start": r.randint(0, 2), "stop": r.randint(0, 2)}
        replace = lambda: {"type": "Replace", "pattern": {"String": r.choice(["\u2581", "a", "th", " "])}, "content": r.choice([" ", "", "é"])}
        metaspace = lambda: {"type": "Metaspace", "replacement": "\u2581", "split": True,
                             "prepend_scheme": r.choice(["always", "first", "never"])}
        byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
        each = [f() for f in r.choices([strip, replace, metaspace], k=r.randint(0, 2))]
        if self.maybe(0.6):
            each.insert(r.randint(0, len(each)), {"type": "ByteFallback"})
        last = r.choice([[], [{"type": "Fuse"}], [{"type": "Fuse"}, strip()], [byte_level], [byte_level, strip()]])
        whole = each + last
        return None if not whole else whole[0] if len(whole) == 1 and self.maybe() else {"type": "Sequence", "decoders": whole}

    def model(self):
        """Vocabulary: the characters of the texts, all of ByteLevel's or <0xNN>, and random merges that texts really have."""
        r = self.r
        byte_chars = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        bytes_too, fallback = self.maybe(0.5), self.maybe(0.5)
        prefix = r.choice(["", "", "", "##"]) if not fallback else ""
        suffix = r.choice(["", "", "", "</w>"])
        corpus = [w for w in WORDS for _ in range(2)] + ["\u2581" + w for w in WORDS] + ["Ġ" + w for w in WORDS if w.isascii()]
        chars = sorted(set("".join(corpus)) | set(r.choices(byte_chars, k=60)) | {" ", "\u2581"})
        if self.maybe(0.5):
            chars = r.sample(chars, len(chars) * 3 // 4)  # some are unknown
        vocab = {}
        add = lambda s: vocab.setdefault(s, len(vocab))
        for s in ["<unk>", "<s>", "</s>"]:
            add(s)
        if fallback:
            for b in range(256):
                if self.maybe(0.98):
                    add(f"<0x{b:02X}>")
        if bytes_too:
            for c in byte_chars:
                add(c)
        for c in chars:
            add(c)
        plain = list(vocab)[3:]
        for c in plain:
            if prefix and len(c) == 1:
                add(prefix + c)
            if suffix and len(c) == 1:
                add(c + suffix)
                if prefix:
                    add(prefix + c + suffix)
        merges, seen = [], set()
        for _ in range(r.randint(0, 300)):
            w = r.choice(corpus)
            w = "".join(chr(c) if self.maybe(0.9) else self.char() for c in map(ord, w))
            if bytes_too and self.maybe(0.5):
                w = "".join(t for t, _ in tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(w))
            i = r.randrange(len(w))
            j = r.randint(i + 1, min(len(w), i + 8))
            parts = list(w[i:j])
            if prefix:
                parts = parts[:1] + [prefix + p for p in parts[1:]]
            if suffix and self.maybe():
                parts[-1] += suffix
            while len(parts) > 1:  # as a real training would: from known pieces to longer ones
                k = r.randrange(len(parts) - 1)
                a, b = parts[k], parts[k + 1]
                joined = a + (b[len(prefix):] if prefix and b.startswith(prefix) else b)
                if a not in vocab or b not in vocab:
                    break
                if (a, b) not in seen:
                    seen.add((a, b))
                    merges.append([a, b])
                    add(joined)
                parts[k:k + 2] = [joined]
        if self.maybe(0.2):
            r.shuffle(merges)
        return {"type": "BPE", "dropout": None, "unk_token": r.choice(["<unk>", "<unk>", None]),
                "continuing_subword_prefix": prefix or r.choice([None, None, ""]), "end_of_word_suffix": suffix or None,
                "fuse_unk": self.maybe(), "byte_fallback": fallback, "ignore_merges": self.maybe(0.3), "vocab": vocab,
                "merges": merges if self.maybe() or any(" " in a + b for a, b in merges) else [f"{a} {b}" for a, b in merges]}

    def added(self, vocab):
        r = self.r
        contents = r.sample(["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<|a|>", "ab", "é", "e\u0301",
                             "Hello", "hello", "\u2581x", " y ", "  ", "\n\n", "don't", "ÀÉ", "\ufb01", "中", "<|im_start|>user", "a b",
                             "I", "1", "<tool>", "</tool>", self.some(1), self.some(3)], r.randint(0, 8))
        next_id, out = len(vocab), []
        for c in dict.fromkeys(contents):
            if not c:
                continue
            token_id = vocab.get(c)
            if token_id is None:
                token_id, next_id = next_id, next_id + 1
            special = self.maybe()
            out.append({"id": token_id, "content": c, "single_word": self.maybe(0.3), "lstrip": self.maybe(0.3),
                        "rstrip": self.maybe(0.3), "normalized": self.maybe(0.5), "special": special})
        return sorted(out, key=lambda a: a["id"])

    def tokenizer(self):
        model = self.model()
        added = self.added(model["vocab"])
        ids = {"<s>": model["vocab"]["<s>"], "</s>": model["vocab"]["</s>"], **{a["content"]: a["id"] for a in added if a["special"]}}
        return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": self.normalizer(),
                "pre_tokenizer": self.pre_tokenizer(), "post_processor": self.post_processor(ids), "decoder": self.decoder(),
                "model": model}

    def text(self, added):
        r, out = self.r, []
        for _ in range(r.choice([1, 1, 2, 3, 5, 8, 13, 30])):
            k = r.random()
            if k < 0.3:
                out.append(r.choice(WORDS))
            elif k < 0.55:
                out.append(r.choice(SPACES))
            elif k < 0.7:
                out.append(self.some(r.randint(1, 5)))
            elif k < 0.85 and added:
                s = r.choice(added)
                out.append(r.choice([s, s, s[:-1], s[1:], s.upper(), s.lower(), s + s, " " + s + " ", "a" + s, s + "1"]))
            elif k < 0.93:
                out.append("".join(r.choice("abcdefghijklmnopqrstuvwxyzABCDEFGH0123456789'_-.") for _ in range(r.randint(1, 11))))
            else:
                out.append(r.choice("aA0 .\n=-_あ中é") * r.randint(1, 40))
        return "".join(out)


def run(tandem, folder, args, values):
    p = subprocess.run([tandem, "tokenize", "--model", folder, *args], input="".join(json.dumps(v) + "\n" for v in values).encode(),
                       stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return [json.loads(line) for line in p.stdout.decode().split("\n") if line], p.stderr.decode().strip()


def library(call):
    """None where the library panics, as it does on some texts; it tells stderr, which is of no use here."""
    try:
        return call()
    except BaseException as e:  # pyo3's PanicException is no Exception
        if isinstance(e, KeyboardInterrupt):
            raise
        return None


def differences(tandem, folder, hf, maker, texts, vocab_size):
    """(compared, (what, input, got, wanted) of all that differs, the message with which tandem refuses the file)"""
    rows = [[i for i in (maker.r.randrange(vocab_size) for _ in range(maker.r.randint(0, 12))) if hf.id_to_token(i) is not None]
            for _ in texts]
    compared, out = 0, []
    for special in (False, True):
        wanted = [library(lambda: hf.encode(t, add_special_tokens=special).ids) for t in texts]
        rows += [w for w in wanted if w is not None]
        jobs = [("ids", ["--add-special"] if special else [], [(t, w) for t, w in zip(texts, wanted) if w is not None])]
        if special:
            for skip in (False, True):
                decoded = [library(lambda: hf.decode(i, skip_special_tokens=skip)) for i in rows]
                jobs.append(("text", ["--decode"] + ["--skip-special"] * skip,
                             [(i, w) for i, w in zip(rows, decoded) if w is not None]))
        for what, args, pairs in jobs:
            got, err = run(tandem, folder, args, [given for given, _ in pairs])
            if err and not got and pairs and "line 1" not in err:
                return 0, [], err
            compared += len(got)
            out += [(" ".join([what, *args]), given, x, w) for (given, w), x in zip(pairs, got) if x != w]
            if len(got) < len(pairs):
                out.append((" ".join([what, *args]), pairs[len(got)][0], err, pairs[len(got)][1]))
    return compared, out, ""


def one_round(options, seed, folder):
    while True:
        maker = Maker(seed)
        config = maker.tokenizer()
        text = json.dumps(config, ensure_ascii=False)
        hf = library(lambda: tokenizers.Tokenizer.from_str(text))
        if hf is None:
            seed = str(seed) + "'"
            continue
        texts = [maker.text([a["content"] for a in config["added_tokens"]]) for _ in range(options.texts)]
        with open(os.path.join(folder, "tokenizer.json"), "w") as f:
            f.write(text)
        return differences(options.tandem, folder, hf, maker, texts, hf.get_vocab_size(True))


def in_child(options, seed, folder):
    """one_round in a process of its own: on some configurations the library takes memory without end. None: it died."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        signal.alarm(120)
        try:
            with os.fdopen(writing, "w") as f:
                json.dump(one_round(options, seed, folder), f)
        except Exception:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(3)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as f:
        text = f.read()
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit(2)
    return json.loads(text) if status == 0 else None


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--tandem", default=os.path.join(os.path.dirname(__file__), "../../build/release/bin/tandem"))
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--rounds", type=int, default=100)
    p.add_argument("--texts", type=int, default=40, help="texts for each tokenizer")
    p.add_argument("--keep", help="a folder for the tokenizer.json of each difference")
    options = p.parse_args()
    os.environ["TANDEM_CONFIG"] = ""
    sys.stderr = os.fdopen(os.dup(2), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where the library's panics go
    compared, bad, died = 0, 0, []
    refused = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seed, options.seed + options.rounds):
            result = in_child(options, seed, folder)
            if not result:
                died.append(seed)
                continue
            n, found, refusal = result
            compared += n
            if refusal:
                refused[refusal.replace(folder, "")] += 1
            elif found:
                bad += 1
                print(f"seed {seed} (--seed {seed} --rounds 1): {len(found)} differ")
                for what, given, got, wanted in sorted(found, key=lambda f: len(f[1]))[:3]:
                    print(f"  {what} of {given!r}\n    tandem  {got!r}\n    library {wanted!r}")
                with open(os.path.join(folder, "tokenizer.json")) as f:
                    config = f.read()
                if options.keep:
                    os.makedirs(options.keep, exist_ok=True)
                    with open(os.path.join(options.keep, f"{seed}.json"), "w") as f:
                        f.write(config)
                shown = json.loads(config)
                shown["model"].update(vocab=len(shown["model"]["vocab"]), merges=len(shown["model"]["merges"]))
                print("  " + json.dumps(shown, ensure_ascii=False))
    for message, n in refused.most_common(20):
        print(f"refused {n} times: {message}")
    print(f"tokenizers {tokenizers.__version__}, seeds {options.seed} to {options.seed + options.rounds - 1}: "
          f"{options.rounds - sum(refused.values()) - len(died)} tokenizers, {compared} results compared, {bad} tokenizers differ, "
          f"{sum(refused.values())} refused by name, {len(died)} left out since the library died {died[:5]}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
