"""Broken models, broken options, dead and stuck ranks: a clear error in one line, nothing hung, nothing left behind."""
import json
import os
import shutil
import signal
import struct
import subprocess
import tempfile
import time
import unittest

from cluster import (DEMO, FOREVER, SLOW, SLOW_ARGS, TANDEM, Cluster, Result, children, copy_model, expected, free_port,
                     process_name, slow_model, tandem, wait_for)
from tandem.v1 import control_pb2


class BadStart(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.TemporaryDirectory()
        self.addCleanup(self.dir.cleanup)

    def fails(self, *texts, model=DEMO, args=(), tp=1):
        """`tandem serve` must end by itself with status 1 or 2, soon, saying all of texts, and leave no process."""
        p = subprocess.Popen([TANDEM, "serve", "--model", model, "--tp", str(tp), "--listen",
                              f"127.0.0.1:{free_port()}", "--threads", "1", *args], stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            out = p.communicate(timeout=30 * SLOW)[0].decode(errors="replace")
        except subprocess.TimeoutExpired:
            for c in children(p.pid) + [p.pid]:
                os.kill(c, signal.SIGKILL)
            self.fail("serve did not give up:\n" + p.communicate()[0].decode(errors="replace"))
        self.assertIn(p.returncode, (1, 2), out)
        for text in texts:
            self.assertIn(text, out)
        self.assertNotIn("Sanitizer", out)
        last = [line for line in out.splitlines() if line.startswith("tandem serve:")]
        self.assertTrue(last, out)

    def model(self):
        return copy_model(self.dir.name)

    def edit_config(self, **changes):
        m = self.model()
        path = os.path.join(m, "config.json")
        with open(path) as f:
            config = json.load(f)
        config.update(changes)
        with open(path, "w") as f:
            json.dump(config, f)
        return m

    def edit_header(self, change):
        """Rewrites the safetensors header; the data stay where they are."""
        m = self.model()
        path = os.path.join(m, "model.safetensors")
        with open(path, "rb") as f:
            blob = f.read()
        n = struct.unpack("<Q", blob[:8])[0]
        header = json.loads(blob[8:8 + n])
        change(header)
        text = json.dumps(header).encode()
        with open(path, "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text + blob[8 + n:])
        return m

    def test_model_folder_missing(self):
        self.fails("/no/such/folder", "No such file", model="/no/such/folder")

    def test_model_folder_empty(self):
        self.fails("tokenizer.json", model=self.dir.name)

    def test_no_weights(self):
        m = self.model()
        os.remove(os.path.join(m, "model.safetensors"))
        self.fails("model.safetensors", model=m)

    def test_weights_truncated(self):
        m = self.model()
        path = os.path.join(m, "model.safetensors")
        os.truncate(path, os.path.getsize(path) - 1000)
        self.fails("model.safetensors", model=m, tp=2)

    def test_weights_shorter_than_their_header(self):
        m = self.model()
        os.truncate(os.path.join(m, "model.safetensors"), 100)
        self.fails("model.safetensors", model=m)

    def test_header_lies_about_offsets(self):
        def change(h):
            h["model.norm.weight"]["data_offsets"] = [0, 1 << 60]
        self.fails("model.safetensors", "model.norm.weight", model=self.edit_header(change))

    def test_header_lies_about_shape(self):
        def change(h):
            t = h["model.layers.1.mlp.down_proj.weight"]
            t["shape"] = t["shape"][::-1]
        self.fails("down_proj", "192", "512", model=self.edit_header(change))

    def test_tensor_missing(self):
        def change(h):
            h["model.layers.2.self_attn.k_proj.other"] = h.pop("model.layers.2.self_attn.k_proj.weight")
        self.fails("model.layers.2.self_attn.k_proj.weight", model=self.edit_header(change))

    def test_dtype_not_supported(self):
        def change(h):
            t = h["model.layers.0.self_attn.q_proj.weight"]
            t["dtype"] = "I16"
        self.fails("I16", "q_proj", model=self.edit_header(change))

    def test_architecture_not_supported(self):
        self.fails("GPT2LMHeadModel", model=self.edit_config(architectures=["GPT2LMHeadModel"]))

    def test_rope_scaling_not_supported(self):
        self.fails("rope_scaling", model=self.edit_config(rope_scaling={"rope_type": "longrope", "factor": 2.0}))

    def test_config_out_of_range(self):
        self.fails("num_hidden_layers", model=self.edit_config(num_hidden_layers=-3))
        shutil.rmtree(os.path.join(self.dir.name, "model"))
        self.fails("num_key_value_heads", model=self.edit_config(num_key_value_heads=4))

    def test_config_is_not_json(self):
        m = self.model()
        with open(os.path.join(m, "config.json"), "w") as f:
            f.write("{]")
        self.fails("config.json", model=m)

    def test_tokenizer_broken(self):
        m = self.model()
        path = os.path.join(m, "tokenizer.json")
        os.truncate(path, os.path.getsize(path) // 2)
        self.fails("tokenizer.json", model=m)

    def test_tokenizer_of_an_unknown_kind(self):
        m = self.model()
        path = os.path.join(m, "tokenizer.json")
        with open(path) as f:
            t = json.load(f)
        t["model"]["type"] = "Unigram"
        with open(path, "w") as f:
            json.dump(t, f)
        self.fails("Unigram", model=m)

    def test_port_in_use(self):
        with Cluster() as c:
            self.fails(c.address, "in use", args=["--listen", c.address])

    def test_address_is_none(self):
        self.fails("nonsense", args=["--listen", "nonsense:port"])

    def test_too_many_ranks(self):
        rc, out, err = tandem("serve", "--model", DEMO, "--tp", 65)
        self.assertEqual((rc, out), (2, ""))
        self.assertIn("--tp 65", err)

    def test_kv_memory_too_small(self):
        self.fails("4096 bytes of KV memory", args=["--kv-memory", "4K", "--page-size", "64K"])

    def test_unknown_option(self):
        rc, out, err = tandem("serve", "--model", DEMO, "--frobnicate")
        self.assertEqual((rc, out), (2, ""))
        self.assertIn("--frobnicate", err)
        self.assertEqual(err.count("\n"), 1)

    def test_cuda_without_a_driver(self):
        if os.path.exists("/dev/nvidiactl"):
            self.skipTest("this machine has a GPU")
        self.fails("cuda", args=["--backend", "cuda"])

    def test_mpirun_missing(self):
        self.fails("/no/such/mpirun", args=["--mpirun", "/no/such/mpirun"])

    @unittest.skipIf(SLOW > 1, "it waits: in one build")
    def test_mpirun_that_hangs_is_started_again(self):
        mpirun = os.path.join(self.dir.name, "mpirun")
        with open(mpirun, "w") as f:
            f.write(f'#!/bin/bash\n[ -e {mpirun}.once ] && exec mpirun "$@"\ntouch {mpirun}.once\nsleep 1000\n')
        os.chmod(mpirun, 0o755)
        with Cluster(tp=2, args=["--mpirun", mpirun, "--launch-timeout", 2]) as c:
            self.assertIn("no rank attached within 2 s (--launch-timeout); starting mpirun again", c.log())
            self.assertEqual(len(c.run("Once", max_tokens=3, ignore_eos=True).ids), 3)

    def test_one_rank_cannot_load(self):
        """Rank 1 of 3 gets another, broken folder; the others are well and must not hang."""
        bad = self.model()
        os.truncate(os.path.join(bad, "model.safetensors"), 5000)
        mpirun = os.path.join(self.dir.name, "mpirun")
        shim = os.path.join(self.dir.name, "shim")
        with open(mpirun, "w") as f:  # puts the shim in front of the worker's command line
            f.write('#!/bin/bash\nargs=()\nfor a in "$@"; do\n'
                    f'  case $a in */tandem-worker) args+=({shim});; esac\n  args+=("$a")\ndone\n'
                    'exec mpirun "${args[@]}"\n')
        with open(shim, "w") as f:
            f.write('#!/bin/bash\nargs=()\nfor a in "$@"; do\n'
                    f'  [ "$OMPI_COMM_WORLD_RANK$a" != "1{DEMO}" ] || a={bad}\n  args+=("$a")\ndone\n'
                    'exec "${args[@]}"\n')
        for path in (mpirun, shim):
            os.chmod(path, 0o755)
        self.fails("rank 1", "model.safetensors", args=["--mpirun", mpirun], tp=3)


class LostRanks(unittest.TestCase):
    """The model is slow, so that a request is running for sure when its rank goes."""

    @classmethod
    def setUpClass(cls):
        cls.dir = tempfile.TemporaryDirectory()
        cls.model = slow_model(cls.dir.name)

    @classmethod
    def tearDownClass(cls):
        cls.dir.cleanup()

    def cluster(self, tp):
        return Cluster(model=self.model, tp=tp, args=SLOW_ARGS)

    # While these run, for longer than any test, a rank goes.
    REQUESTS = [dict(temperature=0), dict(temperature=1.0, seed=5, n=2, logprobs=1)]

    def start(self, c):
        """Running requests that have tokens, and the present epoch."""
        calls = [c.generate("Once upon a time", **{**FOREVER, **r}) for r in self.REQUESTS]
        return [(call, next(call)) for call in calls], c.info().epoch

    def after_loss(self, c, running, epoch):
        """The streams go on in the next group as if nothing had been; nothing is left behind."""
        wait_for("a new group", lambda: c.info().epoch > epoch, 30)
        c.wait_ready(30)
        load = c.load()
        self.assertEqual((load.running_requests, load.replays % 3), (3, 0))  # of three answers
        until = time.monotonic() + 0.3
        for (call, first), options in zip(running, self.REQUESTS):
            messages = [first, next(call)]
            while time.monotonic() < until or len(messages) < 20:
                messages.append(next(call))
            call.cancel()
            got = Result(messages)
            quiet = c.run("Once upon a time", ignore_eos=True, max_tokens=max(len(i) for i, _ in got.answers.values()),
                          **options)
            for index, (ids, text) in got.answers.items():
                self.assertEqual(quiet.answers[index][0][:len(ids)], ids)
                self.assertTrue(quiet.answers[index][1].startswith(text))
        c.wait_idle()

    def test_killed_ranks(self):
        with self.cluster(2) as c:
            for rank in (1, 0):
                running = self.start(c)
                os.kill(c.workers()[rank], signal.SIGKILL)
                self.after_loss(c, *running)

    def dump(self, path):
        rc, out, err = tandem("dump", "--json", "--all", path)
        self.assertEqual((rc, err), (0, ""))
        lines = [json.loads(line) for line in out.splitlines()]
        return lines[:-1], lines[-1]

    def test_stopped_rank_is_named(self):
        flight = os.path.join(self.dir.name, "flight")
        with Cluster(model=self.model, tp=2, args=(*SLOW_ARGS, "--flight-recorder", flight)) as c:
            running = self.start(c)
            pid = c.workers()[1]
            os.kill(pid, signal.SIGSTOP)
            wait_for("a record of its silence", lambda: self.dump(flight)[1]["ranks"][1]["silent_ms"])
            records, verdict = self.dump(flight)  # before anybody has given it up
            self.assertEqual((verdict["ranks"][0]["silent_ms"], verdict["lost"]), (0, None))
            self.assertIn("Rank 1 was silent", verdict["text"])
            kinds = {r["kind"] for r in records}
            self.assertLessEqual({"start", "attach", "ready", "admit", "plan", "result", "silent"}, kinds)
            self.after_loss(c, *running)
            lost = [r for r in self.dump(flight)[0] if r["kind"] == "lost"]
            self.assertEqual([(r["epoch"], r["text"][:33]) for r in lost], [(running[1], "rank 1 was lost: no heartbeat for")])
            self.assertIn("is lost: rank 1 was lost: no heartbeat", c.log())
            wait_for("end of the stopped process", lambda: process_name(pid) != "tandem-worker")

    def test_stopped_single_rank(self):
        with self.cluster(1) as c:
            running = self.start(c)
            os.kill(c.workers()[0], signal.SIGSTOP)
            self.after_loss(c, *running)

    def test_killed_while_idle(self):
        with Cluster(tp=2) as c:
            epoch = c.info().epoch
            os.kill(c.workers()[0], signal.SIGKILL)
            wait_for("a new group", lambda: c.info().epoch > epoch, 30)
            c.wait_ready(30)
            self.assertEqual(len(c.run("One day", temperature=0, max_tokens=4).ids), 4)

    def test_new_requests_wait_while_recovering(self):
        with Cluster(tp=2) as c:
            os.kill(c.workers()[1], signal.SIGSTOP)
            wait_for("not ready", lambda: not c.is_ready(), 8)
            self.assertEqual(len(c.run("One day", temperature=0, max_tokens=4).ids), 4)
            self.assertTrue(c.is_ready())

    def test_killed_coordinator_is_started_again(self):
        with Cluster(tp=2) as c:
            before = c.workers()
            old = c.coordinator_pid()
            os.kill(old, signal.SIGKILL)
            wait_for("a new coordinator", lambda: c.coordinator_pid() not in (old, None))
            c.wait_ready(30)
            case = expected()[0]
            self.assertEqual(c.run(case["prompt_ids"], temperature=0, max_tokens=32).ids, case["greedy_ids"][:32])
            self.assertEqual(c.workers(), before, "the ranks keep their weights")

    def test_coordinator_waits_for_a_file_on_its_way(self):
        """A secret that is being replaced: no reason to end, and the ranks keep their weights."""
        token = os.path.join(self.dir.name, "token")
        with open(token, "w") as f:
            f.write("a-token-of-some-length-0123\n")
        c = Cluster(args=["--listen", f"unix:{self.dir.name}/socket,token", "--token-file", token])
        c.command[c.command.index(c.address)] += ",open"
        with c:
            before = c.workers()
            os.rename(token, token + ".away")
            os.kill(c.coordinator_pid(), signal.SIGKILL)
            wait_for("a start that failed", lambda: c.log().count("starting it again") > 1)
            os.rename(token + ".away", token)
            c.wait_ready(30)
            self.assertEqual(c.workers(), before)

    def test_killed_serve_leaves_nothing(self):
        c = Cluster(tp=2)
        c.__enter__()
        pids = children(c.process.pid)
        self.assertGreaterEqual(len(pids), 4)
        c.process.kill()
        c.process.wait()
        wait_for("end of all processes", lambda: not any(
            process_name(p) in ("tandem-coordinator", "tandem-worker", "mpirun", "orterun") for p in pids), 15)
        c.log_file.close()


class ByHand(unittest.TestCase):
    """The programs without `tandem serve`, as the README shows them."""

    def test_mpirun_by_hand(self):
        with tempfile.TemporaryDirectory() as d:
            address = f"127.0.0.1:{free_port()}"
            control = f"unix:{d}/control"
            bindir = os.path.dirname(TANDEM)
            env = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
            coordinator = subprocess.Popen([f"{bindir}/tandem-coordinator", "--model", DEMO, "--tp", "3", "--listen",
                                            address, "--control-listen", control])
            ranks = subprocess.Popen(["mpirun", "-np", "3", "--oversubscribe", "--bind-to", "none", "--mca", "plm",
                                      "isolated", "--mca", "mpi_yield_when_idle", "1", f"{bindir}/tandem-worker",
                                      "--model", DEMO, "--coordinator", control, "--threads", "1"], env=env)
            try:
                rc, _, err = tandem("probe", "--address", address, "--wait", 30 * SLOW, timeout=60)
                self.assertEqual((rc, err), (0, ""))
                case = expected()[0]
                rc, out, _ = tandem("generate", "--address", address, "--greedy", "--print-ids", "--max-tokens", 96,
                                    case["prompt"])
                self.assertEqual(json.loads(out), case["greedy_ids"])
                coordinator.terminate()
                self.assertEqual(coordinator.wait(20 * SLOW), 0)
                self.assertEqual(ranks.wait(20 * SLOW), 0)
            finally:
                for p in (coordinator, ranks):
                    if p.poll() is None:
                        p.kill()
                        p.wait()

    def test_second_group_is_refused(self):
        with tempfile.TemporaryDirectory() as d:
            control = f"unix:{d}/control"
            with Cluster(args=["--control-listen", control]) as c:
                p = subprocess.run([os.path.join(os.path.dirname(TANDEM), "tandem-worker"), "--model", DEMO,
                                    "--coordinator", control, "--threads", "1", "--attach-timeout-ms", "3000"],
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30 * SLOW)
                self.assertNotEqual(p.returncode, 0)
                self.assertEqual(len(Result(c.generate("One day", temperature=0, max_tokens=4)).ids), 4)
                self.assertEqual(c.info().state, control_pb2.ServerInfo.READY)


if __name__ == "__main__":
    unittest.main(verbosity=2)
