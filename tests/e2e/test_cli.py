"""The command's edges that need no server, and what `tandem serve` shows on a terminal."""
import contextlib
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
import unittest
import unittest.mock

from cluster import BIN, DEMO, SLOW, TANDEM, children, free_port, process_name, tandem


class Tokenize(unittest.TestCase):
    def cases(self):
        with open(os.path.join(DEMO, "tokenizer_cases.json")) as f:
            return json.load(f)["cases"]

    def test_all_cases_both_ways(self):
        cases = self.cases()
        rc, out, err = tandem("tokenize", "--model", DEMO, stdin="".join(json.dumps(c["text"]) + "\n" for c in cases))
        self.assertEqual((rc, err), (0, ""))
        got = [json.loads(line) for line in out.rstrip("\n").split("\n")]
        self.assertEqual(got, [c["ids"] for c in cases])
        rc, out, err = tandem("tokenize", "--model", DEMO, "--decode",
                              stdin="".join(json.dumps(c["ids"]) + "\n" for c in cases))
        self.assertEqual([json.loads(line) for line in out.rstrip("\n").split("\n")], [c["text"] for c in cases])

    def test_add_and_skip_special(self):
        rc, out, _ = tandem("tokenize", "--model", DEMO, "--add-special", stdin='"Once"\n')
        ids = json.loads(out)
        self.assertEqual(ids[0], 2046)
        rc, out, _ = tandem("tokenize", "--model", DEMO, "--decode", "--skip-special", stdin=json.dumps(ids) + "\n")
        self.assertEqual(json.loads(out), "Once")

    def test_bad_lines_are_named(self):
        for options, text in (((), "not json\n"), ((), "[1]\n"), (("--decode",), '"x"\n'), (("--decode",), "[-1]\n"),
                              (("--decode",), "[99999]\n")):
            rc, out, err = tandem("tokenize", "--model", DEMO, *options, stdin=text)
            self.assertEqual(rc, 1, text)
            self.assertIn("line 1", err)
            self.assertEqual(err.count("\n"), 1, err)

    def test_model_missing(self):
        rc, out, err = tandem("tokenize", "--model", "/no/such", stdin='"x"\n')
        self.assertEqual((rc, out), (1, ""))
        self.assertIn("/no/such", err)
        self.assertEqual(err.count("\n"), 1)


class Usage(unittest.TestCase):
    def test_help_of_every_command(self):
        for args in (("--help",), ("serve", "--help"), ("generate", "--help"), ("tokenize", "--help"),
                     ("probe", "--help"), ("drain", "--help"), ("chat", "--help"), ("models", "--help"), ("config", "--help"), ("completion", "--help"), ("man", "--help")):
            rc, out, err = tandem(*args)
            self.assertEqual((rc, err), (0, ""), args)
            self.assertIn("usage:", out)
            self.assertGreater(len(out.splitlines()), 5)

    def test_help_of_the_programs(self):
        for name in ("tandem-coordinator", "tandem-worker"):
            p = subprocess.run([os.path.join(os.path.dirname(TANDEM), name), "--help"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, timeout=60)
            self.assertEqual((p.returncode, p.stderr), (0, b""), p.stderr.decode(errors="replace"))
            self.assertIn(b"usage:", p.stdout)

    def test_both_programs_know_the_log_levels_of_serve(self):
        levels = re.search("--log-level LEVEL +([a-z, ]+) \\(", tandem("serve", "--help")[1]).group(1)
        levels = levels.replace(" or ", ", ").split(", ")
        self.assertEqual(len(levels), 4)
        for name in ("tandem-coordinator", "tandem-worker"):
            for level in levels:
                p = subprocess.run([os.path.join(os.path.dirname(TANDEM), name), "--log-level", level, "--version"],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
                self.assertEqual((p.returncode, p.stderr), (0, b""), (name, level))

    def test_wrong_usage_is_one_line_and_status_2(self):
        for args in (("frobnicate",), ("generate", "--max-tokens", "0", "x"), ("generate", "--max-tokens", "ten", "x"),
                     ("generate", "--temperature", "hot", "x"), ("generate", "--top-p", "0", "x"),
                     ("generate", "--min-p", "2", "x"), ("generate", "--typical-p", "0", "x"),
                     ("generate", "--repetition-penalty", "0", "x"), ("generate", "--presence-penalty", "3", "x"),
                     ("generate", "--frequency-penalty", "-3", "x"), ("generate", "--logit-bias", "5", "x"),
                     ("generate", "--logit-bias", "5:101", "x"), ("generate", "--logit-bias", "x:1", "x"),
                     ("generate", "--allowed-ids", "[]", "x"), ("generate", "--n", "0", "x"),
                     ("generate", "--n", "2", "x"), ("generate", "--logprobs", "1", "x"),
                     ("generate", "--logprobs", "21", "--json", "x"), ("generate", "--stop", "", "x"),
                     ("generate", "--json", "--print-ids", "x"), ("generate", "--min-tokens", "-1", "x"),
                     ("generate", "--prompt-ids", "[]"), ("generate", "--prompt-ids", "[1,-2]"),
                     ("generate", "a", "b"), ("generate", "--nope"), ("generate", "--seed"), ("probe", "extra"), ("drain", "extra"), ("drain", "--restart"), ("drain", "--rolling", "--group", "a"), ("chat", "extra"), ("models",), ("models", "inspect"), ("models", "list", DEMO),
                     ("models", "inspect", DEMO, "--memory", "much"), ("models", "inspect", DEMO, "--backend", "x"), ("chat", "--n", "2"),
                     ("probe", "--wait", "-1"), ("serve",), ("serve", "--model", DEMO, "--tp", "0"),
                     ("serve", "--random-weights", "1"), ("serve", "--random-weights", "/no/such"),
                     ("serve", "--random-weights", DEMO, "--model", DEMO),
                     ("serve", "--random-weights", "tests"), ("serve", "--random-weights", "/etc/passwd"),
                     ("serve", "--model", DEMO, "--random-weights", "-1"),
                     ("serve", "--model", DEMO, "--skip-tokenizer-init", "1"),
                     ("serve", "--model", DEMO, "--trace-kernels", "1"),
                     ("serve", "--model", DEMO, "--trace-kernels", "1", "--trace", "f", "--backend", "host"),
                     ("serve", "--model", DEMO, "--trace", "f", "--trace-kernels", "2"),
                     ("tokenize",), ("tokenize", "--nope")):
            rc, out, err = tandem(*args)
            self.assertEqual((rc, out), (2, ""), args)
            self.assertEqual(err.count("\n"), 1, (args, err))

    def test_probe_without_a_server_in_json(self):
        rc, out, err = tandem("probe", "--address", "127.0.0.1:1", "--json")
        got = json.loads(out)
        self.assertEqual((rc, err, got["serving"], got["code"]), (3, "", False, "UNAVAILABLE"))

    def test_no_server(self):
        rc, out, err = tandem("generate", "--address", "127.0.0.1:1", "--print-ids", "hello")
        self.assertEqual((rc, out), (3, ""))
        self.assertIn("127.0.0.1:1", err)
        for args in (("generate", "--json", "hello"), ("drain", "--json"), ("memory", "--json"), ("top", "--once", "--json")):
            rc, out, err = tandem(*args, "--address", "127.0.0.1:1")
            got = json.loads(out)["error"]
            self.assertEqual((rc, got["code"], err), (3, "UNAVAILABLE", f"tandem {args[0]}: {got['message']} (UNAVAILABLE)\n"))

    def test_serve_that_does_not_start_says_why_in_json(self):
        with tempfile.TemporaryDirectory() as d:
            broken = os.path.join(d, "broken")
            shutil.copytree(DEMO, broken)
            with open(os.path.join(broken, "config.json"), "w") as f:
                f.write("{}")
            no_device = ("--model", DEMO, "--trace", os.path.join(d, "t"), "--trace-kernels", "1")
            cases = ((("--model", "/no/such"), [], "/no/such"),
                     (no_device, ["starting", "listening", "launching", "loading", "group-lost"], "--trace-kernels: "),
                     (("--model", d), ["starting", "ended"], "tokenizer.json"),
                     (("--model", DEMO, "--max-queued", "x"), ["starting", "ended"], "--max-queued: x"),
                     (("--model", broken), ["starting", "listening", "launching", "loading", "group-lost"], "architectures"))
            for args, events, says in cases:
                with unittest.mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
                    rc, out, err = tandem("serve", "--json", "--listen", f"unix:{d}/s", *args)
                got = [json.loads(line) for line in out.splitlines()]
                self.assertEqual((rc, [e["event"] for e in got]), (1, [*events, "error", "stopped"]), err)
                self.assertIn(says, got[-2]["message"])
                self.assertEqual(got[-1]["status"], 1)
                self.assertIn(says, err)

    def test_what_the_programs_link(self):
        """The coordinator links neither CUDA nor MPI, the worker no CUDA."""
        def libraries(name):
            return subprocess.run(["ldd", os.path.join(os.path.dirname(TANDEM), name)], stdout=subprocess.PIPE,
                                  check=True).stdout.decode()
        for name in ("tandem", "tandem-coordinator"):
            for lib in ("libmpi", "libcuda", "libcublas", "libnccl", "libcupti"):
                self.assertNotIn(lib, libraries(name))
        worker = libraries("tandem-worker")
        self.assertIn("libmpi", worker)
        for lib in ("libcuda", "libcublas", "libnccl", "libcupti"):
            self.assertNotIn(lib, worker)


class Terminal(unittest.TestCase):
    def serve(self, *args):
        """What a terminal gets until the server is ready, and what it is of lines."""
        ours, its = os.openpty()
        p = subprocess.Popen([TANDEM, "serve", "--model", DEMO, "--tp", "2", "--threads", "1", "--listen",
                              f"127.0.0.1:{free_port()}", *args], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                             stderr=its, start_new_session=True)
        os.close(its)
        text, stopping = "", False
        pids, end = [], time.monotonic() + 60 * SLOW
        try:
            while time.monotonic() < end:
                if not stopping and "Ctrl-C stops" in text:
                    stopping, pids = True, children(p.pid)
                    p.terminate()
                if select.select([ours], [], [], 0.2)[0]:
                    try:
                        text += os.read(ours, 65536).decode(errors="replace")
                    except OSError:  # nobody has the other side open any more
                        break
            self.assertTrue(stopping, text)
            self.assertEqual(p.wait(60 * SLOW), 0, text)
        finally:
            for pid in children(p.pid) + [q for q in pids if process_name(q).startswith("tandem")]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            p.kill()
            p.wait()
            os.close(ours)
        return text

    def test_a_bar_while_the_model_is_loaded_and_how_long_it_took(self):
        text = self.serve()
        self.assertEqual(len(re.findall(r"\rloading \[#{30}\] 100 % of [0-9.]+ MiB\r\n", text)), 1, text)
        self.assertNotIn("loading: ", text)
        self.assertRegex(text, r"tandem serve: ready on 127\.0\.0\.1:[0-9]+ after [0-9]+\.[0-9]+ s, 2 ranks; Ctrl-C stops")

    def test_no_bar_where_lines_are_asked_for(self):
        self.assertNotIn("loading [", self.serve("--log-level", "error"))


class Configuration(unittest.TestCase):
    """`tandem config` tells what a command would take; that all commands read through the same code, check_cli knows."""

    def run_with(self, text, *args, **env):
        with tempfile.NamedTemporaryFile("w", suffix=".conf") as f:
            f.write(text)
            f.flush()
            p = subprocess.run([TANDEM, *args], env={**os.environ, "TANDEM_CONFIG": f.name, **env},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
            return p.returncode, p.stdout.decode(), p.stderr.decode().replace(f.name, "FILE")

    def test_the_highest_origin_counts_and_is_named(self):
        rc, out, err = self.run_with("top-k = 1\nseed = 1\nmin-p = 0.1\n[generate]\ntop-k = 2\nseed = 2\nstop = a\nstop = b\n",
                                     "config", "--json", "generate", "--top-p", "0.5",
                                     TANDEM_SEED="3", TANDEM_GENERATE_TEMPERATURE="0.25", TANDEM_TEMPERATURE="0.75")
        self.assertEqual((rc, err), (0, ""))
        got = {k: (v["values"], v["origin"]) for k, v in json.loads(out)["generate"].items()}
        self.assertEqual(got["top-k"], (["2"], "file"))
        self.assertEqual(got["seed"], (["3"], "environment"))
        self.assertEqual(got["min-p"], (["0.1"], "file"))
        self.assertEqual(got["stop"], (["a", "b"], "file"))
        self.assertEqual(got["temperature"], (["0.25"], "environment"))
        self.assertEqual(got["top-p"], (["0.5"], "command line"))
        self.assertEqual(got["wait"], (["0"], "default"))
        self.assertEqual(got["max-tokens"], ([], "unset"))

    def test_what_it_prints_is_a_file_that_says_the_same(self):
        text = '[generate]\nstop = "a # b\\n\\"c\\""\nstop = x\nserved = 1\n'.replace("served = 1\n", "greedy = true\n")
        rc, first, err = self.run_with(text, "config", "generate")
        self.assertEqual((rc, err), (0, ""))
        again = self.run_with(first, "config", "generate")[1]
        values = [[line.rsplit("    # ", 1)[0] for line in t.splitlines()] for t in (first, again)]
        self.assertEqual(values[0], values[1])
        self.assertIn('stop = "a # b\\n\\"c\\""', values[0])

    def test_wrong_values_name_their_origin(self):
        for text, env, says in (("[generate]\ntop-p = 7\n", {}, "FILE:2: --top-p 7"), ("tops = 1\n", {}, "FILE:1: tops"),
                                ("[serve]\ntop-k = 1\n", {}, "FILE:2: top-k: no such option of serve"),
                                ("", {"TANDEM_N": "x"}, "TANDEM_N: --n x"), ("[x]\na = 1\n", {}, "FILE:2: [x]")):
            rc, out, err = self.run_with(text, "generate", "hello", **env)
            self.assertEqual((rc, out, err.count("\n")), (2, "", 1), err)
            self.assertIn(says, err)
        rc, out, err = self.run_with("", "probe", "--config", "/no/such.conf")
        self.assertEqual((rc, out), (2, ""))
        self.assertIn("/no/such.conf", err)


class Models(unittest.TestCase):
    def inspect(self, *args):
        rc, out, err = tandem("models", "inspect", *args, "--json")
        self.assertEqual((rc, err), (0, ""))
        return json.loads(out)

    def test_figures_of_the_demo_model(self):
        with open(os.path.join(DEMO, "config.json")) as f:
            config = json.load(f)
        with open(os.path.join(DEMO, "model.safetensors"), "rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        elements = sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
        got = self.inspect(DEMO, "--memory", "3M", "--context", "1000")
        self.assertEqual(got["parameters"], elements)
        self.assertEqual(got["layers"], config["num_hidden_layers"])
        self.assertEqual(len(got["groups"]), 8)
        for ranks, group in enumerate(got["groups"], 1):
            self.assertEqual(len(group["ranks"]), ranks)
            self.assertEqual(sum(r["heads"] for r in group["ranks"]), config["num_attention_heads"])
            # together no less than the whole, but for what is padded no more than copies of the norms
            total = sum(r["host"]["weight_bytes"] for r in group["ranks"])
            norms = 4 * config["hidden_size"] * (2 * config["num_hidden_layers"] + 1)
            self.assertGreaterEqual(total, 2 * (elements - norms // 4))
            self.assertLess(total, 2 * elements + ranks * (norms + 65536))
            token = max(r["kv_heads"] for r in group["ranks"]) * config["num_hidden_layers"] * 2 * 32 * 4
            self.assertEqual(group["kv_token_bytes"], token)
            self.assertEqual(group["fits"], group["weight_bytes"] + 1000 * token <= 3 << 20)
        self.assertEqual([g["fits"] for g in got["groups"]][:3], [False, False, True])
        rc, out, err = tandem("models", "inspect", DEMO, "--memory", "3M")
        self.assertEqual((rc, err, out.count("does not fit")), (0, "", 2))

    def test_a_folder_without_weights_and_one_that_is_refused(self):
        with tempfile.TemporaryDirectory() as d:
            with open(os.path.join(DEMO, "config.json")) as f:
                config = json.load(f)
            with open(os.path.join(d, "config.json"), "w") as f:
                json.dump(config, f)
            got = self.inspect(d, "--backend", "cuda")
            self.assertFalse(got["has_weights"])
            self.assertNotIn("fits", got["groups"][0])
            self.assertEqual(got["groups"][0]["kv_token_bytes"], self.inspect(DEMO, "--backend", "cuda")["groups"][0]["kv_token_bytes"])
            config["architectures"] = ["OtherForCausalLM"]
            with open(os.path.join(d, "config.json"), "w") as f:
                json.dump(config, f)
            rc, out, err = tandem("models", "inspect", d)
            self.assertEqual((rc, out, err.count("\n")), (1, "", 1))
            rc, out, err_json = tandem("models", "inspect", d, "--json")
            got = json.loads(out)["error"]
            self.assertEqual((rc, got["code"], err_json), (1, "UNIMPLEMENTED", err))
            self.assertEqual(err, f"tandem-worker: {got['message']}\n")
            self.assertIn("OtherForCausalLM", err)


class Generated(unittest.TestCase):
    COMMANDS = re.findall("^  (?!tandem)([a-z]+) +[a-z]", tandem("--help")[1], re.M)

    def complete(self, *words):
        script = ('source <("$0" completion bash); compopt() { :; }; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _tandem; '
                  'printf "%s\\n" "${COMPREPLY[@]}"')
        p = subprocess.run(["bash", "-c", script, TANDEM, "tandem", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           timeout=60)
        self.assertEqual(p.stderr, b"")
        return p.stdout.decode().split()

    def test_bash_completes_commands_options_and_values(self):
        self.assertEqual(self.complete("gen"), ["generate"])
        self.assertEqual(self.complete("generate", "--top"), ["--top-k", "--top-p"])
        self.assertEqual(self.complete("serve", "--backend", ""), ["auto", "cuda", "host"])
        self.assertEqual(self.complete("serve", "--model", os.path.join(DEMO, "config")), [os.path.join(DEMO, "config.json")])
        self.assertEqual(self.complete("completion", "z"), ["zsh"])
        commands = re.findall("^  (?!tandem)([a-z]+) +[a-z]", tandem("--help")[1], re.M)
        self.assertIn("simulate", commands)
        for command in ("config", "man"):
            self.assertEqual(sorted(self.complete(command, "")), sorted(commands))

    def test_each_shell_reads_its_completion(self):
        for shell in ("bash", "zsh", "fish"):
            rc, out, err = tandem("completion", shell)
            self.assertEqual((rc, err), (0, ""))
            self.assertIn("logit-bias", out)
            if shutil.which(shell):
                p = subprocess.run([shell, "-n"], input=out.encode(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   timeout=60)
                self.assertEqual((p.returncode, p.stdout), (0, b""), shell)
        self.assertEqual(tandem("completion", "csh")[0], 2)

    def test_man_and_help_say_the_same(self):
        for name in self.COMMANDS:
            options = {line.split()[0] for line in tandem(name, "--help")[1].splitlines() if line.startswith("  --")}
            rc, page, err = tandem("man", name)
            self.assertEqual((rc, err), (0, ""))
            in_page = set(re.findall(r"^\\fB(--[a-z0-9-]+)\\fR", page.replace("\\-", "-"), re.M))
            self.assertEqual(options, in_page, name)
        self.assertEqual(tandem("man", "nothing")[0], 2)

    def test_pages_of_the_programs_have_all_their_options(self):
        for name in ("tandem-coordinator", "tandem-worker"):
            text = subprocess.run([os.path.join(BIN, name), "--help"], stdout=subprocess.PIPE, check=True).stdout.decode()
            with open(os.path.join(BIN, "..", "share", name + ".1")) as f:
                page = f.read()
            options = re.findall(r"^  (--[a-z0-9-]+)", text, re.M)
            self.assertGreater(len(options), 15)
            bold = re.findall(r"^\.TP\n\\fB(.*?)\\fR", page, re.M)
            self.assertEqual([b.replace("\\-", "-") for b in bold], options)


if __name__ == "__main__":
    unittest.main(verbosity=2)
