"""The right tokens, whatever the number of ranks, the chunk budget and the batch."""
import json
import os
import shutil
import subprocess
import tempfile
import threading
import unittest

import grpc

from cluster import DEMO, SLOW, SOURCE, Cluster, Result, copy_model, expected, tandem, wait_for
from tandem.v1 import control_pb2, inference_pb2


class TokensOfTheDemoModel(unittest.TestCase):
    def check_all(self, tp, budget, concurrent):
        cases = expected()
        with Cluster(tp=tp, args=["--step-tokens", budget]) as c:
            streams = [c.generate(case["prompt_ids"], temperature=0, max_tokens=len(case["greedy_ids"]))
                       for _ in range(-(-concurrent // len(cases))) for case in cases][:concurrent]
            results = [Result(s) for s in streams]
            for i, r in enumerate(results):
                case = cases[i % len(cases)]
                self.assertEqual(r.ids, case["greedy_ids"], f"request {i}, tp {tp}, budget {budget}")
                self.assertEqual(case["prompt"] + r.text, case["text"])
                self.assertEqual(r.finish.usage.prompt_tokens, len(case["prompt_ids"]))
                self.assertEqual(r.finish.usage.completion_tokens, len(r.ids))
            c.wait_idle()

    def test_one_rank_one_request(self):
        self.check_all(1, 512, 1)

    def test_one_rank_64_requests_small_chunks(self):
        self.check_all(1, 16, 64)

    def test_two_ranks_64_requests(self):
        self.check_all(2, 64, 64)

    def test_three_ranks(self):
        self.check_all(3, 512, 6)

    def test_four_ranks_small_chunks(self):
        self.check_all(4, 16, 6)

    def test_eight_ranks_two_of_them_without_heads(self):
        case = expected()[0]
        with Cluster(tp=8) as c:
            self.assertEqual(c.run(case["prompt_ids"], temperature=0, max_tokens=12).ids, case["greedy_ids"][:12])
            c.wait_idle()


class Sampling(unittest.TestCase):
    def test_seed_decides_alone_and_not_batch_or_ranks(self):
        options = dict(temperature=0.9, top_p=0.95, top_k=50, seed=1234, max_tokens=48)
        seen = []
        for tp in (1, 2):
            with Cluster(tp=tp) as c:
                seen.append(c.run("Once upon a time", **options).ids)
                streams = [c.generate("Once upon a time", **options)] + [
                    c.generate("One day", temperature=1.0, max_tokens=32) for _ in range(8)]
                results = [Result(s) for s in streams]
                seen.append(results[0].ids)
                other = c.run("Once upon a time", **{**options, "seed": 99}).ids
        self.assertTrue(all(s == seen[0] for s in seen), seen)
        self.assertNotEqual(other, seen[0])

    def test_defaults_come_from_the_model(self):
        more = dict(min_p=0.02, typical_p=0.95, repetition_penalty=1.2)
        with tempfile.TemporaryDirectory() as folder:
            model = copy_model(folder)
            path = os.path.join(model, "generation_config.json")
            with open(path) as f:
                config = json.load(f)
            with open(path, "w") as f:
                json.dump({**config, **more}, f)
            self.check_defaults(model, more)

    def check_defaults(self, model, more):
        with Cluster(model=model) as c:
            # generation_config.json says temperature 0.8: two seeds differ, and no seed means a fresh one each time.
            a, b = (c.run("Once upon a time", max_tokens=40).ids for _ in range(2))
            self.assertNotEqual(a, b)
            same = [c.run("Once upon a time", max_tokens=40, seed=5).ids for _ in range(2)]
            self.assertEqual(same[0], same[1])
            explicit = c.run("Once upon a time", max_tokens=40, seed=5, temperature=0.8, top_p=0.95, **more).ids
            self.assertEqual(same[0], explicit)
            without = c.run("Once upon a time", max_tokens=40, seed=5, repetition_penalty=1.0, min_p=0, typical_p=1.0).ids
            self.assertNotEqual(same[0], without)
            d = c.control("GetModelInfo", control_pb2.ModelInfo, control_pb2.GetModelInfoRequest()).defaults
            for field, value in more.items():
                self.assertAlmostEqual(getattr(d, field), value, places=5)


class MemoryPressure(unittest.TestCase):
    def test_preempted_requests_give_the_same_tokens(self):
        case = expected()[0]
        # 12 pages of 64 KiB hold about 250 tokens of the demo model: a few of the 16 requests at a time.
        with Cluster(args=["--kv-memory", "768K", "--page-size", "64K"]) as c:
            streams = [c.generate(case["prompt_ids"], temperature=0, max_tokens=96) for _ in range(16)]
            results = [Result(s) for s in streams]
            for r in results:
                self.assertEqual(r.ids, case["greedy_ids"])
            load = c.load()
            self.assertGreater(load.preemptions, 0)
            self.assertEqual((load.suspensions, load.suspend_pages), (0, 0))
            c.wait_idle()

    def test_suspended_requests_give_the_same_tokens(self):
        case = expected()[0]
        # Greedy, and sampled with penalties: these look at tokens that the rank must still have when the slot comes back.
        kinds = [{"temperature": 0}, {"temperature": 0.8, "seed": 7, "frequency_penalty": 0.5}]
        memory = ["--kv-memory", "768K", "--page-size", "64K"]
        with Cluster() as c:
            alone = [c.run(case["prompt_ids"], max_tokens=96, **k).ids for k in kinds]
        self.assertEqual(alone[0], case["greedy_ids"])
        for tp in (1, 2):
            with Cluster(tp=tp, args=[*memory, "--suspend-memory", "16M"]) as c:
                streams = [c.generate(case["prompt_ids"], max_tokens=96, **kinds[i % 2]) for i in range(16)]
                for i, r in enumerate([Result(s) for s in streams]):
                    self.assertEqual(r.ids, alone[i % 2], f"request {i}, tp {tp}")
                load = c.load()
                self.assertGreater(load.suspensions, 0)
                self.assertGreater(load.resumptions, 0)
                self.assertEqual(load.suspend_pages, 256)
                c.wait_idle()
                load = c.load()
                self.assertEqual((load.suspended_slots, load.suspended_pages, load.used_pages), (0, 0, 0))


def pool_bytes(pid):
    """What the memory of a rank's KV pool takes of the machine."""
    folder = f"/proc/{pid}/fd"
    return sum(os.stat(os.path.join(folder, f)).st_blocks * 512 for f in os.listdir(folder)
               if "memfd:tandem-kv" in os.readlink(os.path.join(folder, f)))


class ElasticMemory(unittest.TestCase):
    def test_memory_goes_and_comes_while_tokens_flow(self):
        case = expected()[0]
        with Cluster(tp=2, args=["--kv-memory", "32M", "--page-size", "64K", "--prefix-cache", "off"]) as c:
            pids = list(c.workers().values())

            def pools(pages):
                load = c.load()
                return (not load.groups[0].goal_pages and load.total_pages == load.groups[0].kv.total_pages / 2 == pages
                        and all(pool_bytes(p) == pages * 65536 for p in pids))

            self.assertTrue(pools(512))
            streams = [c.generate(case["prompt_ids"], temperature=0, max_tokens=96) for _ in range(6)]
            first = next(iter(streams[0]))
            status, out, err = tandem("memory", "--address", c.address, "--kv-memory", "768K")
            self.assertEqual((status, err), (0, ""))
            self.assertIn("on the way to 12", out)
            results = [Result(s) for s in streams]
            self.assertEqual(list(first.token_ids) + results[0].ids, case["greedy_ids"])
            for r in results[1:]:
                self.assertEqual(r.ids, case["greedy_ids"])
            wait_for("12 pages a rank", lambda: pools(12), 20)
            self.assertEqual(c.load().kv.given_pages, 1000)
            status, out, err = tandem("memory", "--address", c.address)
            self.assertIn("default: 12 pages a rank, 0 in use\n", out)
            status, out, err = tandem("memory", "--address", c.address, "--json")
            got, = json.loads(out)["groups"]
            self.assertEqual((status, err, got["name"], got["total_pages"], got["used_pages"], got["goal_pages"]),
                             (0, "", "default", 12, 0, 0))
            kv = got["kv"]
            self.assertEqual((kv["given_pages"], kv["free_pages"], kv["mapped_pages"]), (1000, 24, 0))
            with self.assertRaises(grpc.RpcError) as e:  # 600 tokens of 2048 bytes on the larger rank
                c.run(case["prompt_ids"], max_tokens=600)
            self.assertIn("the KV memory has 12", e.exception.details())
            streams = [c.generate(case["prompt_ids"], temperature=0, max_tokens=96) for _ in range(6)]
            status, out, err = tandem("memory", "--address", c.address, "--kv-memory", "all", "--json")
            self.assertEqual((status, err), (0, ""))
            self.assertEqual((json.loads(out)["goal_pages"], json.loads(out)["page_bytes"]), (512, 65536))
            for s in streams:
                self.assertEqual(Result(s).ids, case["greedy_ids"])
            wait_for("512 pages a rank", lambda: pools(512), 20)
            status, out, err = tandem("memory", "--address", c.address, "--kv-memory", "33M")
            self.assertEqual(status, 1)
            self.assertIn("(what the ranks of group default came with)", err)
            self.assertEqual(tandem("memory", "--kv-memory", "12Q")[0], 2)
            self.assertEqual(tandem("memory", "--group", "a")[0], 2)


class RandomModel(unittest.TestCase):
    """Against an independent NumPy forward (tests/reference.py), through the whole cluster."""

    def test_random_weights_match_numpy(self):
        for name, ranks in (("gqa_untied", (1, 3)), ("mixed_dtypes", (2, 5))):
            with tempfile.TemporaryDirectory() as model:
                subprocess.run(["/usr/bin/python3", os.path.join(SOURCE, "tests/reference.py"), "--write", model,
                                "--only", name], check=True)
                for f in ("tokenizer.json", "tokenizer_config.json"):
                    shutil.copy(os.path.join(DEMO, f), model)
                for tp in ranks:
                    self.compare(model, tp)

    def compare(self, model, tp):
        with Cluster(model=model, tp=tp, args=["--step-tokens", 16]) as c:
            for case in expected(model):
                ids = c.run(case["prompt_ids"], temperature=0, ignore_eos=True,
                            max_tokens=len(case["greedy_ids"])).ids
                sure = next((i for i, m in enumerate(case["margins"]) if m < 2e-3), len(ids))
                self.assertGreater(sure, 4)
                self.assertEqual(ids[:sure], case["greedy_ids"][:sure], f"{model}, tp {tp}")


class GgufFile(unittest.TestCase):
    """Weights, configuration and tokenizer from one file."""

    def test_demo_model_in_one_file_gives_the_same_tokens_and_text(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "demo.gguf")
            subprocess.run(["/usr/bin/python3", os.path.join(SOURCE, "tests/gguf_file.py"), DEMO, path], check=True)
            with Cluster(model=path, tp=2) as c:
                for case in expected():
                    r = c.run(case["prompt"], temperature=0, max_tokens=len(case["greedy_ids"]))
                    self.assertEqual(r.finish.usage.prompt_tokens, len(case["prompt_ids"]))
                    self.assertEqual(r.ids, case["greedy_ids"])
                    self.assertEqual(case["prompt"] + r.text, case["text"])
                chat = inference_pb2.GenerateRequest()  # by the file's own template, which puts the first token in front
                chat.chat.messages.add(role="user", content=expected()[0]["prompt"])
                chat.sampling.temperature = 0
                chat.stopping.max_tokens = 12
                self.assertEqual(c.run(chat).ids, expected()[0]["greedy_ids"][:12])
                c.wait_idle()


class Stopping(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.c = Cluster()
        cls.c.__enter__()

    @classmethod
    def tearDownClass(cls):
        cls.c.__exit__(None, None, None)

    def test_stop_id_ends_and_its_text_is_left_out(self):
        from tandem.v1 import inference_pb2 as pb
        case = expected()[0]
        full = self.c.run(case["prompt_ids"], temperature=0, max_tokens=20)
        stop = case["greedy_ids"][7]
        first = case["greedy_ids"].index(stop)
        r = self.c.run(case["prompt_ids"], temperature=0, max_tokens=20, stop_token_ids=[stop])
        self.assertEqual(r.ids, case["greedy_ids"][:first + 1])
        self.assertEqual(r.finish.reason, pb.Finish.STOP)
        self.assertEqual(r.finish.stop_token_id, stop)
        self.assertTrue(full.text.startswith(r.text))
        self.assertLess(len(r.text), len(full.text))
        self.c.wait_idle()

    def test_length(self):
        from tandem.v1 import inference_pb2 as pb
        for n in (1, 2, 3):
            r = self.c.run("Once upon a time", temperature=0, max_tokens=n)
            self.assertEqual(len(r.ids), n)
            self.assertEqual(r.finish.reason, pb.Finish.LENGTH)

    def test_context_is_the_last_limit(self):
        r = self.c.run([2046] + [415] * 1019, temperature=0, ignore_eos=True)
        self.assertEqual(len(r.ids), 4)

    def test_special_tokens_are_added_unless_refused(self):
        with_bos = self.c.run("Once upon a time", temperature=0, max_tokens=1)
        without = self.c.run("Once upon a time", temperature=0, max_tokens=1, add_special_tokens=False)
        self.assertEqual(with_bos.finish.usage.prompt_tokens, without.finish.usage.prompt_tokens + 1)

    def test_command_prints_ids_text_and_statistics(self):
        case = expected()[1]
        a = ("--address", self.c.address)
        rc, out, err = tandem("generate", *a, "--greedy", "--max-tokens", 96, "--print-ids", case["prompt"])
        self.assertEqual((rc, err), (0, ""))
        self.assertEqual(json.loads(out), case["greedy_ids"])
        rc, out, err = tandem("generate", *a, "--greedy", "--max-tokens", 96, "--print-ids", "--prompt-ids",
                              json.dumps(case["prompt_ids"]))
        self.assertEqual(json.loads(out), case["greedy_ids"])
        rc, out, err = tandem("generate", *a, "--greedy", "--max-tokens", 96, "--stats", stdin=case["prompt"])
        self.assertEqual(rc, 0)
        self.assertEqual(out, case["text"][len(case["prompt"]):] + "\n")
        self.assertIn("96 new tokens", err)

    def test_many_threads_of_one_client(self):
        case = expected()[2]
        bad = []

        def one():
            if self.c.run(case["prompt_ids"], temperature=0, max_tokens=32).ids != case["greedy_ids"][:32]:
                bad.append(1)
        threads = [threading.Thread(target=one) for _ in range(24)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(120 * SLOW)
        self.assertEqual(bad, [])
        wait_for("idle", self.c.idle)


if __name__ == "__main__":
    unittest.main(verbosity=2)
