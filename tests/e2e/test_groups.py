"""Several worker groups behind one coordinator: `tandem serve --groups 2`, with real ranks."""
import json
import os
import shutil
import signal
import tempfile
import threading
import time
import unittest
import unittest.mock

import grpc

from cluster import DEMO, FOREVER, SLOW, SLOW_ARGS, Cluster, Result, expected, process_name, slow_model, tandem, wait_for


class Groups(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.dir = tempfile.TemporaryDirectory()
        cls.model = slow_model(cls.dir.name)

    @classmethod
    def tearDownClass(cls):
        cls.dir.cleanup()

    def cluster(self, model=None, args=()):
        return Cluster(model=model or self.model, args=["--groups", 2, *SLOW_ARGS, *args])

    def both_serve(self, c):
        return wait_for("both groups serve", lambda: [g.serving for g in c.load().groups] == [True, True], 30)

    def pid_of(self, c, group):
        return next(r.pid for r in c.info().ranks if r.group == group)

    def test_streams_of_a_killed_group_go_on_in_the_other(self):
        with self.cluster() as c:
            self.both_serve(c)
            options = [dict(temperature=0), dict(temperature=1.0, seed=5), dict(temperature=0.7, seed=6, logprobs=1),
                       dict(temperature=0, repetition_penalty=1.2)]
            calls = [c.generate("Once upon a time", **{**FOREVER, **o}) for o in options]
            messages = [[next(call)] for call in calls]
            self.assertEqual(sorted(g.running_requests for g in c.load().groups), [2, 2])
            victim = self.pid_of(c, "g0")
            os.kill(victim, signal.SIGKILL)
            wait_for("the loss is seen", lambda: c.load().replays == 2)
            self.assertTrue(c.is_ready())
            self.assertEqual([(g.name, g.running_requests) for g in c.load().groups if g.running_requests], [("g1", 4)])
            until = time.monotonic() + 0.5 * SLOW
            for call, got in zip(calls, messages):
                while time.monotonic() < until or len(got) < 20:
                    got.append(next(call))
                call.cancel()
            for got, o in zip(messages, options):
                got = Result(got)
                quiet = c.run("Once upon a time", ignore_eos=True, max_tokens=len(got.ids), **o)
                self.assertEqual(quiet.ids, got.ids)
                self.assertTrue(quiet.text.startswith(got.text))
            self.both_serve(c)
            self.assertNotEqual(self.pid_of(c, "g0"), victim)
            c.wait_idle()

    def test_random_weights_and_timelines_are_options_of_serve(self):
        """A folder without weights, a timeline for each group; the environment says the seed, the line the file."""
        with tempfile.TemporaryDirectory() as d:
            for name in os.listdir(DEMO):
                if name.endswith(".json"):
                    shutil.copy(os.path.join(DEMO, name), d)
            trace = os.path.join(d, "steps")
            with unittest.mock.patch.dict(os.environ, TANDEM_SERVE_RANDOM_WEIGHTS="7"):
                args = ["--trace", trace, "--memory-fraction", "0.5", "--eager", "1"]  # the last two for ranks on CUDA
                with self.cluster(model=d, args=args) as c:
                    self.both_serve(c)
                    calls = [c.generate("Once upon a time", temperature=0, ignore_eos=True, max_tokens=20) for _ in "ab"]
                    ids = [Result(call).ids for call in calls]
                    self.assertEqual(len(ids[0]), 20)
                    self.assertEqual(ids[0], ids[1])
            steps = []
            for group in "g0", "g1":
                with open(f"{trace}.{group}") as f:
                    steps += [e["args"] for e in json.load(f) if e["name"].startswith("step")]
            self.assertGreaterEqual(len(steps), 20)
            self.assertGreater(sum(a["pages_us"] for a in steps), 0)  # the host back end maps on the way

    def test_rolling_restart_under_load(self):
        with Cluster(args=["--groups", 2, "--kv-memory", "64M", "--json"]) as c:
            self.both_serve(c)
            case, errors, answers, done = expected()[0], [], [0], threading.Event()

            def client():
                while not done.is_set():
                    try:
                        r = c.run(case["prompt_ids"], temperature=0, max_tokens=len(case["greedy_ids"]))
                    except grpc.RpcError as e:
                        errors.append(f"{e.code().name}: {e.details()}")
                        continue
                    answers[0] += 1
                    if r.ids != case["greedy_ids"]:
                        errors.append(r.ids)

            clients = [threading.Thread(target=client) for _ in range(4)]
            for t in clients:
                t.start()
            before = {name: self.pid_of(c, name) for name in ("g0", "g1")}
            rc, out, err = tandem("drain", "--address", c.address, "--rolling", "--timeout", 0.1)
            self.assertEqual((rc, err), (0, ""))
            self.assertEqual(out.count("serves again"), 2)
            events = c.events()
            self.assertEqual([e["event"] for e in events[:2]], ["starting", "listening"])
            self.assertEqual((events[0]["ranks"], events[0]["groups"], events[1]["addresses"]), (1, 2, [c.address]))
            phases = ["launching", "loading", "ready", "group-drained", "ended", "launching", "loading", "ready"]
            for name in ("g0", "g1"):
                self.assertEqual([e["event"] for e in events if e.get("group") == name], phases)
            seconds = [e["seconds"] for e in events]
            self.assertEqual(seconds, sorted(seconds))
            for name, pid in before.items():
                self.assertNotEqual(process_name(pid), "tandem-worker")
                self.assertNotEqual(self.pid_of(c, name), pid)
            done.set()
            for t in clients:
                t.join()
            self.assertEqual(errors, [])
            self.assertGreater(answers[0], 4)
            # drained for good: it stays away, and the last cannot be
            rc, out, _ = tandem("drain", "--address", c.address, "--group", "g0", "--timeout", 1, "--json")
            self.assertEqual((rc, json.loads(out)), (0, {"group": "g0", "done": "drained", "moved": 0}))
            rc, out, err = tandem("drain", "--address", c.address, "--group", "g1", "--json")
            self.assertEqual((rc, json.loads(out)["error"]["code"]), (1, "FAILED_PRECONDITION"))
            self.assertIn('no other than "g1" serves', json.loads(out)["error"]["message"])
            self.assertIn('no other than "g1" serves', err)
            wait_for("mpirun of g0 is gone", lambda: "was drained" in c.log())
            self.assertEqual(c.run(case["prompt_ids"], temperature=0, max_tokens=8).ids, case["greedy_ids"][:8])
            self.assertEqual([g.name for g in c.load().groups if g.serving], ["g1"])

    def mpirun(self, last_line):
        path = os.path.join(self.dir.name, "mpirun")
        with open(path, "w") as f:
            f.write("#!/bin/bash\n" + last_line + "\n")
        os.chmod(path, 0o755)
        return path

    @unittest.skipIf(SLOW > 1, "it waits: in one build")
    def test_group_whose_first_launch_fails_is_launched_again(self):
        once = os.path.join(self.dir.name, "once")
        mpirun = self.mpirun(f'[[ "$*" != *"--group g1"* || $(wc -c <{once}) = 2 ]] || {{ printf x >>{once}; exit 1; }}\nexec mpirun "$@"')
        open(once, "w").close()
        with self.cluster(DEMO, ["--mpirun", mpirun]) as c:
            self.both_serve(c)
            self.assertEqual(c.log().count("mpirun of group g1 ended with status 1; starting a new worker group"), 2)

    @unittest.skipIf(SLOW > 1, "it waits: in one build")
    def test_no_group_can_be_launched(self):
        """Nothing to wait for: it ends at once and says why."""
        rc, out, err = tandem("serve", "--model", DEMO, "--groups", 2, "--listen", "unix:" + os.path.join(self.dir.name, "s"),
                              "--mpirun", self.mpirun("echo no slots >&2; exit 1"))
        self.assertEqual((rc, out), (1, ""))
        self.assertIn("no slots", err)
        self.assertIn("mpirun ended with status 1; its message stands above", err)

    def test_wrong_usage(self):
        rc, _, err = tandem("serve", "--model", self.model, "--groups", 2, "--tp", 2, "--devices", "0,1,2")
        self.assertEqual(rc, 2)
        self.assertIn("--devices 0,1,2: expected 4", err)
        rc, _, err = tandem("serve", "--model", self.model, "--groups", 65)
        self.assertEqual(rc, 2)
        self.assertIn("--groups 65", err)


if __name__ == "__main__":
    unittest.main(verbosity=2)
