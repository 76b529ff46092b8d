"""Every option of Sampling, Stopping and Output through a whole cluster: the same answer whatever the ranks, chunks and
batch, stop strings, log probabilities, several answers, and a refusal that names the field."""
import json
import math
import os
import shutil
import tempfile
import unittest

import grpc

from cluster import DEMO, SOURCE, Cluster, Result, expected, request, tandem
from tandem.v1 import inference_pb2 as pb

PROMPT = "Once upon a time"


def requests():
    """Sampled requests that use every option, alone or with others."""
    base = dict(temperature=1.0, max_tokens=56, ignore_eos=True)  # more than an admission keeps free
    yield dict(base, seed=1, min_p=0.05)
    yield dict(base, seed=2, typical_p=0.8)
    yield dict(base, seed=3, repetition_penalty=1.3)
    yield dict(base, seed=4, presence_penalty=1.0, frequency_penalty=0.5)
    yield dict(base, seed=5, logit_bias={415: 5.0, 300: -5.0})
    yield dict(base, seed=6, allowed_token_ids=list(range(200, 900)))
    yield dict(base, seed=7, min_tokens=10, stop_token_ids=[14, 16, 415], ignore_eos=False)
    yield dict(base, seed=8, temperature=0.7, top_k=100, top_p=0.95, min_p=0.01, typical_p=0.95, repetition_penalty=1.1,
               presence_penalty=0.3, frequency_penalty=0.2, logit_bias={20: 2.0}, logprobs=3, prompt_logprobs=2)
    yield dict(base, seed=9, temperature=0, repetition_penalty=1.2, frequency_penalty=0.1)
    yield dict(base, seed=10, n=3, presence_penalty=0.5)
    yield dict(base, seed=11, stop=[" the", "."], min_tokens=2)


class Answers:
    """What one call gave, answer by answer."""

    def __init__(self, stream):
        self.ids, self.text, self.finish, self.logprobs, self.prompt_logprobs, self.prompt_ids = {}, {}, {}, {}, [], {}
        for m in stream:
            i = m.index
            assert i not in self.finish, "a message after the last"
            self.ids.setdefault(i, []).extend(m.token_ids)
            self.text[i] = self.text.get(i, "") + m.text
            self.logprobs.setdefault(i, []).extend(m.logprobs)
            self.prompt_logprobs.extend(m.prompt_logprobs)
            self.prompt_ids.setdefault(i, []).extend(m.prompt_token_ids)
            if m.HasField("finish"):
                self.finish[i] = m.finish

    def same(self):
        return [(self.ids[i], self.text[i], self.finish[i].reason) for i in sorted(self.ids)]


class Everywhere(unittest.TestCase):
    def test_the_same_whatever_the_ranks_chunks_and_batch(self):
        alone = None
        for tp, args in ((1, []), (2, ["--step-tokens", 9]), (3, []), (4, ["--step-tokens", 16]),
                         (1, ["--step-tokens", 24, "--kv-memory", "768K", "--page-size", "64K"])):
            with Cluster(tp=tp, args=args) as c:
                if alone is None:
                    alone = [Answers(c.generate(PROMPT, **o)) for o in requests()]
                    self.assertEqual(len({str(a.same()) for a in alone}), len(alone))
                    several = alone[-2]
                    self.assertEqual(sorted(several.ids), [0, 1, 2])
                    self.assertEqual(len({tuple(ids) for ids in several.ids.values()}), 3)
                # all of them and others at once
                others = [c.generate("One day, a girl", temperature=1.0, max_tokens=100, repetition_penalty=1.5)
                          for i in range(6)]
                together = [Answers(s) for s in [c.generate(PROMPT, **o) for o in requests()]]
                for o, a, b in zip(requests(), alone, together):
                    self.assertEqual(a.same(), b.same(), f"tp {tp} {args} {o}")
                for a, b in zip(alone[7].logprobs[0] + alone[7].prompt_logprobs,
                                together[7].logprobs[0] + together[7].prompt_logprobs):
                    self.assertEqual((a.token_id, a.rank), (b.token_id, b.rank))
                    self.assertAlmostEqual(a.logprob, b.logprob, delta=1e-4)
                for s in others:
                    Result(s)
                if "--kv-memory" in args:
                    self.assertGreater(c.load().preemptions, 0)
                c.wait_idle()


class Reference(unittest.TestCase):
    """Log probabilities against NumPy, through the cluster."""

    def test_log_probabilities_match_numpy(self):
        import sys
        sys.path.insert(0, os.path.join(SOURCE, "tests"))
        import numpy as np
        import reference
        with tempfile.TemporaryDirectory() as model:
            m = dict(reference.MODELS["gqa_untied"])
            weights, _ = reference.make_model(model, m, np.random.default_rng(5))
            for f in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(os.path.join(DEMO, f), model)
            prompt = [int(i) for i in np.random.default_rng(6).integers(0, m["vocab"], 40)]
            for tp, budget in ((1, 512), (3, 7)):
                with Cluster(model=model, tp=tp, args=["--step-tokens", budget]) as c:
                    a = Answers(c.generate(prompt, temperature=1.3, seed=3, ignore_eos=True, max_tokens=20, logprobs=5,
                                           prompt_logprobs=1, repetition_penalty=1.3, top_k=50))
                    ids = prompt + a.ids[0]
                    exact = reference.log_softmax(reference.all_logits(m, weights, ids[:-1]))
                    scores = a.prompt_logprobs + a.logprobs[0]
                    self.assertEqual([s.token_id for s in scores], ids[1:])
                    for i, s in enumerate(scores):
                        top = 1 if i < len(prompt) - 1 else 5
                        self.assertAlmostEqual(s.logprob, exact[i][ids[i + 1]], delta=2e-4)
                        self.assertEqual(s.rank, 1 + (exact[i] > exact[i][ids[i + 1]]).sum())
                        self.assertEqual(list(s.top_token_ids), [int(k) for k in exact[i].argsort()[::-1][:top]])
                        for k, value in zip(s.top_token_ids, s.top_logprobs):
                            self.assertAlmostEqual(value, exact[i][k], delta=2e-4)


class Options(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.c = Cluster(tp=2)
        cls.c.__enter__()

    @classmethod
    def tearDownClass(cls):
        cls.c.__exit__(None, None, None)

    def tearDown(self):
        self.c.wait_idle()

    def answers(self, prompt=PROMPT, **options):
        return Answers(self.c.generate(prompt, **options))

    # -- stop strings --

    def test_stop_strings_end_the_text_wherever_tokens_end(self):
        full = self.answers(temperature=0, max_tokens=60, ignore_eos=True)
        text = full.text[0]
        self.assertGreater(len(text), 60)
        for at in range(3, 60, 7):
            for length in (1, 2, 5, 9):
                stop = text[at:at + length]
                first = text.index(stop)
                a = self.answers(temperature=0, max_tokens=60, ignore_eos=True, stop=["\u2603", stop])
                self.assertEqual(a.text[0], text[:first], stop)
                self.assertEqual((a.finish[0].reason, a.finish[0].stop_index), (pb.Finish.STOP, 1))
                self.assertFalse(a.finish[0].HasField("stop_token_id"))
                self.assertEqual(a.ids[0], full.ids[0][:len(a.ids[0])])
                self.assertEqual(a.finish[0].usage.completion_tokens, len(a.ids[0]))
                b = self.answers(temperature=0, max_tokens=60, ignore_eos=True, stop=[stop], include_stop_in_output=True)
                self.assertEqual(b.text[0], text[:first] + stop)

    def test_text_that_was_held_back_comes_in_the_end(self):
        full = self.answers(temperature=0, max_tokens=20, ignore_eos=True)
        a = self.answers(temperature=0, max_tokens=20, ignore_eos=True, stop=[full.text[0][-5:] + "\u2603"])
        self.assertEqual((a.text, a.finish[0].reason), (full.text, pb.Finish.LENGTH))

    def test_stop_strings_within_min_tokens_are_passed_over(self):
        full = self.answers(temperature=0, max_tokens=40, ignore_eos=True)
        pieces = self.answers(temperature=0, max_tokens=12, ignore_eos=True).text[0]
        a = self.answers(temperature=0, max_tokens=40, ignore_eos=True, stop=[" "], min_tokens=12)
        self.assertTrue(a.text[0].startswith(pieces.rstrip()))
        self.assertTrue(full.text[0].startswith(a.text[0]))
        self.assertEqual(a.finish[0].reason, pb.Finish.STOP)

    # -- tokens --

    def test_min_tokens_and_stop_ids(self):
        case = expected()[0]
        stop = case["greedy_ids"][4]
        a = self.answers(case["prompt_ids"], temperature=0, max_tokens=30, stop_token_ids=[stop])
        self.assertEqual(len(a.ids[0]), case["greedy_ids"].index(stop) + 1)
        b = self.answers(case["prompt_ids"], temperature=0, max_tokens=30, stop_token_ids=[stop], min_tokens=15)
        self.assertNotIn(stop, b.ids[0][:15])
        self.assertGreaterEqual(len(b.ids[0]), 15)

    def test_allowed_and_biased_ids(self):
        a = self.answers(temperature=2.0, max_tokens=30, allowed_token_ids=[100, 200, 300], ignore_eos=True)
        self.assertEqual(set(a.ids[0]), {100, 200, 300})
        b = self.answers(temperature=0, max_tokens=5, logit_bias={77: 100})
        self.assertEqual(b.ids[0], [77] * 5)

    def test_penalties_turn_away_from_repetition(self):
        plain = self.answers(temperature=0, max_tokens=200, ignore_eos=True).ids[0]
        varied = self.answers(temperature=0, max_tokens=200, ignore_eos=True, presence_penalty=2,
                              frequency_penalty=2).ids[0]
        self.assertGreater(len(set(varied)), 1.3 * len(set(plain)))

    # -- answers --

    def test_answers_are_those_of_their_seeds(self):
        three = self.answers(temperature=1.0, max_tokens=12, n=3, seed=42, ignore_eos=True)
        two = self.answers(temperature=1.0, max_tokens=12, n=2, seed=42, ignore_eos=True)
        one = self.answers(temperature=1.0, max_tokens=12, seed=42, ignore_eos=True)
        self.assertEqual(one.ids[0], three.ids[0])
        self.assertEqual([two.ids[i] for i in range(2)], [three.ids[i] for i in range(2)])
        self.assertEqual(set(three.finish), {0, 1, 2})
        self.assertEqual(three.finish[2].usage.completion_tokens, 12)

    def test_cancel_ends_all_answers(self):
        call = self.c.generate(PROMPT, temperature=1.0, max_tokens=900, n=8, ignore_eos=True)
        next(call)
        call.cancel()
        self.c.wait_idle(3)

    # -- output --

    def test_log_probabilities_of_every_answer(self):
        a = self.answers(temperature=1.0, max_tokens=9, n=2, seed=4, logprobs=0, ignore_eos=True)
        for i in range(2):
            self.assertEqual([s.token_id for s in a.logprobs[i]], a.ids[i])
            self.assertTrue(all(s.logprob < 0 and not s.top_token_ids for s in a.logprobs[i]))
        self.assertEqual(a.prompt_logprobs, [])

    def test_echo(self):
        for prompt, ids in ((PROMPT, None), (expected()[0]["prompt_ids"], expected()[0]["prompt_ids"])):
            plain = self.answers(prompt, temperature=1.0, seed=1, max_tokens=8, n=2)
            a = self.answers(prompt, temperature=1.0, seed=1, max_tokens=8, n=2, echo=True)
            for i in range(2):
                if ids is None:
                    self.assertEqual(a.text[i], prompt + plain.text[i])
                else:
                    self.assertEqual(a.prompt_ids[i], ids)
                    self.assertTrue(a.text[i].endswith(plain.text[i]) and a.text[i] != plain.text[i])
                self.assertEqual(a.ids[i], plain.ids[i])

    def test_scoring_a_prompt_makes_no_token(self):
        a = self.answers(temperature=0, max_tokens=0, echo=True, prompt_logprobs=1)
        self.assertEqual((a.text[0], a.ids[0], a.finish[0].reason), (PROMPT, [], pb.Finish.LENGTH))
        self.assertEqual(a.finish[0].usage.completion_tokens, 0)
        self.assertEqual([s.token_id for s in a.prompt_logprobs], a.prompt_ids[0][1:])

    # -- the command --

    def test_command_has_all_options(self):
        options = dict(temperature=0.9, top_k=80, top_p=0.97, min_p=0.01, typical_p=0.98, repetition_penalty=1.1,
                       presence_penalty=0.2, frequency_penalty=0.1, logit_bias={20: 2.0, 30: -1.5}, seed=6, min_tokens=3,
                       max_tokens=20, ignore_eos=True, stop=["zzz", "qqq"],
                       allowed_token_ids=list(range(2, 1500)))
        r = self.answers(**options)
        args = ["generate", "--address", self.c.address, "--temperature", 0.9, "--top-k", 80, "--top-p", 0.97, "--min-p",
                0.01, "--typical-p", 0.98, "--repetition-penalty", 1.1, "--presence-penalty", 0.2, "--frequency-penalty",
                0.1, "--logit-bias", "20:2", "--logit-bias", "30:-1.5", "--seed", 6, "--min-tokens", 3, "--max-tokens", 20,
                "--ignore-eos", "--stop", "zzz", "--stop", "qqq", "--allowed-ids", json.dumps(list(range(2, 1500)))]
        rc, out, err = tandem(*args, "--print-ids", PROMPT)
        self.assertEqual((rc, err), (0, ""))
        self.assertEqual(json.loads(out), r.ids[0])
        rc, out, err = tandem(*args, "--n", 2, "--logprobs", 2, "--prompt-logprobs", 1, "--echo", "--json", PROMPT)
        self.assertEqual((rc, err), (0, ""))
        lines = [json.loads(line) for line in out.splitlines()]
        text = "".join(m.get("text", "") for m in lines if m["index"] == 0)
        self.assertEqual(text, PROMPT + r.text[0])
        scores = [s for m in lines if m["index"] == 1 for s in m.get("logprobs", [])]
        self.assertEqual(len(scores), 20)
        self.assertEqual(len(scores[0]["top"]), 2)
        self.assertEqual(sum("finish" in m for m in lines), 2)

    # -- bad input --

    def test_options_out_of_range_and_contradictions_name_the_field(self):
        nan, inf = math.nan, math.inf
        cases = [("sampling." + f, {f: v}) for f, values in (
            ("min_p", (-0.1, 1.1, nan)), ("typical_p", (0, -1, 1.5, nan)),
            ("repetition_penalty", (0, -1, 101, nan, inf)), ("presence_penalty", (-2.1, 2.1, nan)),
            ("frequency_penalty", (-2.1, 2.1, inf)), ("n", (0, 65))) for v in values]
        cases += [
            ("sampling.logit_bias[0].token_id", dict(logit_bias={2048: 1})),
            ("sampling.logit_bias[0].bias", dict(logit_bias={5: 101})),
            ("sampling.logit_bias[0].bias", dict(logit_bias={5: nan})),
            ("sampling.logit_bias", dict(logit_bias={i: 1 for i in range(1025)})),
            ("sampling.allowed_token_ids[1]", dict(allowed_token_ids=[1, 5000])),
            ("sampling.allowed_token_ids", dict(allowed_token_ids=[1] * 2049)),
            ("sampling.n", dict(n=2, temperature=0)),
            ("stopping.stop", dict(stop=["x"] * 33)),
            ("stopping.stop[1]", dict(stop=["x", ""])),
            ("stopping.stop[0]", dict(stop=["x" * 1025])),
            ("stopping.include_stop_in_output", dict(include_stop_in_output=True)),
            ("stopping.min_tokens", dict(min_tokens=11, max_tokens=10)),
            ("stopping.min_tokens", dict(min_tokens=5000)),
            ("stopping.min_tokens", dict(min_tokens=1, allowed_token_ids=[5, 6], stop_token_ids=[6, 5])),
            ("stopping.max_tokens", dict(max_tokens=0)),
            ("output.logprobs", dict(logprobs=21)),
            ("output.prompt_logprobs", dict(prompt_logprobs=21)),
        ]
        for field, options in cases:
            with self.assertRaises(grpc.RpcError, msg=f"{options}") as e:
                self.answers(**{"temperature": 1.0, **options})
            self.assertEqual(e.exception.code(), grpc.StatusCode.INVALID_ARGUMENT, f"{options}")
            self.assertIn(field, e.exception.details())
        twice = request(PROMPT)
        for _ in range(2):
            twice.sampling.logit_bias.add(token_id=4, bias=1)
        with self.assertRaises(grpc.RpcError) as e:
            list(self.c.generate(twice))
        self.assertIn("sampling.logit_bias: token 4 is named twice", e.exception.details())
        bad = request(PROMPT, stop=["abc"]).SerializeToString().replace(b"abc", b"a\xffc")
        same = lambda x: x  # noqa: E731
        with self.assertRaises(grpc.RpcError) as e:
            list(self.c.channel.unary_stream("/tandem.v1.Inference/Generate", same, same)(bad, timeout=20))
        self.assertEqual(e.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
        self.assertIn("stopping.stop[0]: not valid UTF-8", e.exception.details())
        with self.assertRaises(grpc.RpcError):
            self.answers(max_tokens=0)
        self.assertEqual(len(self.answers(max_tokens=2, ignore_eos=True).ids[0]), 2)


if __name__ == "__main__":
    unittest.main(verbosity=2)
