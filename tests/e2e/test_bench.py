"""`tandem bench` against a cluster: each of its modes, and that table, JSON and plot say what was done."""
import json
import os
import shutil
import tempfile
import unittest
import unittest.mock
import urllib.error
import urllib.request
import xml.etree.ElementTree as ElementTree

import grpc

from cluster import DEMO, SLOW, Cluster, free_port, inference_pb2, tandem

TIMES = ["ttft_s", "tbt_s", "tpot_s", "latency_s"]
ORDER = ["p50", "p90", "p95", "p99", "p999", "max"]
GENEROUS = ["--slo-ttft", 60000, "--slo-tbt", 60000, "--slo-stall", 60000]


class Bench(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.cluster = Cluster()
        cls.cluster.__enter__()

    @classmethod
    def tearDownClass(cls):
        cls.cluster.__exit__(None)

    def bench(self, *args, code=0):
        with tempfile.TemporaryDirectory() as folder:
            to, plot = os.path.join(folder, "r.json"), os.path.join(folder, "r.svg")
            got, table, errors = tandem("bench", "--address", self.cluster.address, "--json", to, "--plot", plot, *args)
            self.assertEqual(got, code, errors)
            with open(to) as f:
                r = json.load(f)
            svg = ElementTree.parse(plot).getroot()
        self.check(r, table, svg)
        return r

    def check(self, r, table, svg):
        done, failed = r["done"], r["failed"]
        self.assertEqual(done + failed, r["requests"])
        self.assertEqual(r["codes"].get("OK", 0), done)
        self.assertEqual(sum(r["codes"].values()), r["requests"])
        if not failed:  # slices also have what came of the others
            self.assertEqual(sum(r["output_tokens_of_slice"]), r["output_tokens"])
        self.assertIn(f"{done} done, {failed} failed", " ".join(table.split()))
        self.assertIn(f"{r['prompt_tokens']} of prompts, {r['output_tokens']} of answers", table)
        self.assertTrue(svg.tag.endswith("svg"))
        texts = [e.text for e in svg.iter() if e.tag.endswith("text")]
        self.assertIn("answer tokens a second", texts)
        if not done:
            return
        self.assertAlmostEqual(r["output_tokens_per_s"], r["output_tokens"] / r["duration_s"], delta=0.01 * r["output_tokens_per_s"])
        for name in TIMES:
            values = [r[name][p] for p in ORDER]
            self.assertEqual(values, sorted(values), name)
            self.assertLessEqual(r[name]["mean"], r[name]["max"] * 1.0001)
        for name in ("ttft_s", "latency_s"):
            self.assertEqual(r[name]["count"], done)
        self.assertLessEqual(r["ttft_s"]["p50"], r["latency_s"]["p50"])
        self.assertLessEqual(r["latency_s"]["max"], r["duration_s"] * 1.0001)

    def test_all_at_once_with_lengths_that_are_given(self):
        r = self.bench("--requests", 10, "--input-tokens", 7, "--output-tokens", 5, *GENEROUS)
        self.assertEqual((r["mode"], r["prompt_tokens"], r["output_tokens"], r["good"]), ("offline", 70, 50, 10))

    def test_random_lengths_are_those_of_the_seed(self):
        args = ["--requests", 8, "--input-tokens", "uniform:3-30", "--output-tokens", "lognormal:6,0.5,2-12", "--seed"]
        a, b, c = (self.bench(*args, seed) for seed in (5, 5, 6))
        self.assertEqual((a["prompt_tokens"], a["output_tokens"]), (b["prompt_tokens"], b["output_tokens"]))
        self.assertNotEqual((a["prompt_tokens"], a["output_tokens"]), (c["prompt_tokens"], c["output_tokens"]))
        self.assertTrue(24 <= a["prompt_tokens"] <= 240 and 16 <= a["output_tokens"] <= 96)

    def test_open_loop(self):
        r = self.bench("--rate", 40, "--requests", 20, "--input-tokens", 5, "--output-tokens", 4)
        self.assertEqual((r["mode"], r["rate"], r["output_tokens"]), ("rate", 40, 80))
        self.assertGreater(r["duration_s"], 0.1)  # 20 arrivals of 40 a second: about half a second

    def test_closed_loop(self):
        r = self.bench("--concurrency", 1, "--requests", 6, "--input-tokens", 5, "--output-tokens", 4)
        self.assertEqual((r["mode"], r["concurrency"], r["output_tokens"]), ("concurrency", 1, 24))
        # One after the other: their times add up to the run's, but for what lies between them.
        self.assertGreater(r["duration_s"], 0.9 * 6 * r["latency_s"]["mean"])

    def test_trace(self):
        with tempfile.NamedTemporaryFile("w", suffix=".csv") as f:
            f.write("arrival_s,prompt_tokens,output_tokens\n0,4,3\n0.3,9,2\n0.6,20,6\n")
            f.flush()
            r = self.bench("--trace", f.name, "--speed", 2)
            self.assertEqual((r["requests"], r["prompt_tokens"], r["output_tokens"]), (3, 33, 11))
            self.assertGreater(r["duration_s"], 0.3)
            f.write("0.7,none,6\n")
            f.flush()
            code, _, errors = tandem("bench", "--address", self.cluster.address, "--trace", f.name)
        self.assertEqual(code, 2)
        self.assertIn(f"{f.name}:5: \"none\"", errors)

    def test_goodput_counts_what_keeps_all_bounds(self):
        args = ["--requests", 6, "--input-tokens", 5, "--output-tokens", 8]
        self.assertEqual(self.bench(*args, *GENEROUS)["good"], 6)
        strict = self.bench(*args, "--slo-ttft", 60000, "--slo-tbt", 0.001)
        self.assertEqual((strict["good"], strict["goodput_requests_per_s"]), (0, 0))

    def test_what_fails_is_counted_with_its_code(self):
        r = self.bench("--requests", 3, "--input-tokens", 5, "--output-tokens", 1000, "--timeout", 0.02, code=1)
        self.assertEqual((r["done"], r["failed"], r["codes"]), (0, 3, {"DEADLINE_EXCEEDED": 3}))

    def refused(self, *args):
        code, _, errors = tandem("bench", "--address", self.cluster.address, *args)
        return code, errors

    def test_a_failed_warm_up_measures_nothing(self):
        code, errors = self.refused("--requests", 1, "--output-tokens", 1000, "--warm-up", 2, "--timeout", 0.02)
        self.assertEqual(code, 1)
        self.assertIn("2 of the 2 requests of --warm-up failed", errors)

    def test_options_that_a_trace_needs_or_has_no_use_for(self):
        with tempfile.NamedTemporaryFile("w", suffix=".csv") as f:
            f.write("arrival_s,prompt_tokens,output_tokens\n0,4,3\n")
            f.flush()
            for args, said in ((["--speed", 2], "--speed is of a trace: give --trace, too"),
                               (["--trace", f.name, "--output-tokens", 3], "--output-tokens: lengths come from --trace"),
                               (["--input-tokens", 3, "--trace", f.name], "--input-tokens: lengths come from --trace")):
                code, errors = self.refused(*args)
                self.assertEqual(code, 2, errors)
                self.assertIn(said, errors)

    def test_nobody_there(self):
        code, _, errors = tandem("bench", "--address", "127.0.0.1:1", "--requests", 1, "--timeout", 5 * SLOW)
        self.assertEqual(code, 3)
        self.assertIn("127.0.0.1:1", errors)


class Shape(unittest.TestCase):
    """`tandem serve --random-weights CONFIG`: a config.json is all there is."""

    IDS = [5, 6, 7]

    def refused(self, c, field, prompt, **options):
        with self.assertRaises(grpc.RpcError) as e:
            c.run(prompt, max_tokens=4, **options)
        self.assertEqual(e.exception.code(), grpc.StatusCode.FAILED_PRECONDITION)
        self.assertTrue(e.exception.details().startswith(field + ": "), e.exception.details())
        self.assertIn("no tokenizer", e.exception.details())

    def post(self, port, path="completions", **body):
        to = urllib.request.Request(f"http://127.0.0.1:{port}/v1/{path}", json.dumps(body).encode(),
                                    {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(to, timeout=60 * SLOW) as r:
                return r.status, r.read().decode()
        except urllib.error.HTTPError as e:
            return e.code, e.read().decode()

    def without_text(self, c):
        """Ids in, ids out; returns them. What is about text is refused by its name."""
        rc, out, err = tandem("bench", "--address", c.address, "--requests", 3, "--input-tokens", 20, "--output-tokens", 5)
        self.assertEqual(rc, 0, err)
        self.assertIn("3 done, 0 failed", out)
        self.assertIn("15 of answers", out)
        scores, text, ids = [], "", []
        for m in c.generate(self.IDS, temperature=0, ignore_eos=True, max_tokens=12, logprobs=2, prompt_logprobs=1):
            scores += m.logprobs
            text += m.text
            ids += m.token_ids
        self.assertEqual((len(ids), text), (12, ""))
        self.assertEqual([s.token_id for s in scores], ids)
        chat = inference_pb2.GenerateRequest()
        chat.chat.messages.add(role="user", content="hello")
        self.refused(c, "text", "Once upon a time")
        self.refused(c, "chat", chat)
        self.refused(c, "stopping.stop", self.IDS, stop=["."])
        self.refused(c, "output.echo", self.IDS, echo=True)
        c.wait_idle()
        return ids

    def over_http(self, port, ids):
        ask = dict(prompt=self.IDS, temperature=0, ignore_eos=True, max_tokens=12)
        code, body = self.post(port, **ask, logprobs=2)
        choice = json.loads(body)["choices"][0]
        self.assertEqual((code, choice["text"], choice["logprobs"]["tokens"]), (200, "", [f"token_id:{i}" for i in ids]))
        self.assertEqual(set(choice["logprobs"]["text_offset"]), {0})
        self.assertTrue(all(len(top) >= 2 for top in choice["logprobs"]["top_logprobs"]))
        code, body = self.post(port, **ask, stream=True)
        events = [json.loads(e[6:]) for e in body.split("\n\n") if e.startswith("data: {")]
        self.assertGreater(len(events), 1)
        self.assertEqual({e["choices"][0]["text"] for e in events}, {""})
        for param, bad in (("prompt", dict(prompt="x")), ("stop", dict(prompt=self.IDS, stop=["x"])),
                           ("echo", dict(prompt=self.IDS, echo=True))):
            code, body = self.post(port, **bad)
            self.assertEqual((code, json.loads(body)["error"]["param"]), (400, param))
        code, body = self.post(port, "chat/completions", messages=[{"role": "user", "content": "x"}])
        self.assertEqual(code, 400, body)

    def test_without_weights_and_without_a_tokenizer(self):
        with tempfile.TemporaryDirectory() as d:
            config = shutil.copy(os.path.join(DEMO, "config.json"), d)
            port = free_port()
            with Cluster(model=None, args=["--random-weights", config, "--http", f"127.0.0.1:{port}"]) as c:
                ids = self.without_text(c)
                self.over_http(port, ids)
                self.assertIn("no tokenizer.json in " + d, c.log())
                self.assertIn("no tokenizer: prompts are token ids", c.log())
            # The folder, by the environment; the line's --model counts more, whatever shape that says.
            with unittest.mock.patch.dict(os.environ, TANDEM_SERVE_RANDOM_WEIGHTS=d):
                with Cluster(model=None) as c:
                    self.assertEqual(self.without_text(c), ids)
                with Cluster() as c:
                    self.assertNotEqual(c.run("Once", max_tokens=4, ignore_eos=True).text, "")
            with unittest.mock.patch.dict(os.environ, TANDEM_SERVE_MODEL="/no/such"):
                with Cluster(model=None, args=["--random-weights", d]) as c:
                    self.assertEqual(self.without_text(c), ids)
            with Cluster(model=d, args=["--random-weights", 1]) as c:
                self.assertEqual(self.without_text(c), ids)

    def test_a_tokenizer_that_is_not_loaded_and_one_that_is_missing(self):
        with Cluster(args=["--random-weights", 1]) as c:
            r = c.run(self.IDS, temperature=0, ignore_eos=True, max_tokens=12)
            self.assertNotEqual(r.text, "")
        with Cluster(args=["--random-weights", 1, "--skip-tokenizer-init", "on"]) as c:
            self.assertEqual(self.without_text(c), r.ids)
            self.assertNotIn("no tokenizer.json", c.log())
        with tempfile.TemporaryDirectory() as d:
            shutil.copy(os.path.join(DEMO, "config.json"), d)
            rc, _, err = tandem("serve", "--random-weights", d, "--skip-tokenizer-init", "off", "--listen", f"unix:{d}/s")
            self.assertEqual(rc, 1, err)
            self.assertIn("tokenizer.json", err)


if __name__ == "__main__":
    unittest.main()
