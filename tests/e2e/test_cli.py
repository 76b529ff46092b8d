"""The command's edges that need no server."""
import json
import os
import subprocess
import unittest

from cluster import DEMO, TANDEM, tandem


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
                     ("probe", "--help")):
            rc, out, err = tandem(*args)
            self.assertEqual((rc, err), (0, ""), args)
            self.assertIn("usage:", out)
            self.assertGreater(len(out.splitlines()), 5)

    def test_help_of_the_programs(self):
        for name in ("tandem-coordinator", "tandem-worker"):
            p = subprocess.run([os.path.join(os.path.dirname(TANDEM), name), "--help"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, timeout=60)
            self.assertEqual((p.returncode, p.stderr), (0, b""))
            self.assertIn(b"usage:", p.stdout)

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
                     ("generate", "a", "b"), ("generate", "--nope"), ("generate", "--seed"), ("probe", "extra"),
                     ("probe", "--wait", "-1"), ("serve",), ("serve", "--model", DEMO, "--tp", "0"),
                     ("tokenize",), ("tokenize", "--nope")):
            rc, out, err = tandem(*args)
            self.assertEqual((rc, out), (2, ""), args)
            self.assertEqual(err.count("\n"), 1, (args, err))

    def test_no_server(self):
        rc, out, err = tandem("generate", "--address", "127.0.0.1:1", "--print-ids", "hello")
        self.assertEqual((rc, out), (3, ""))
        self.assertIn("127.0.0.1:1", err)

    def test_what_the_programs_link(self):
        """The coordinator links neither CUDA nor MPI, the worker no CUDA."""
        def libraries(name):
            return subprocess.run(["ldd", os.path.join(os.path.dirname(TANDEM), name)], stdout=subprocess.PIPE,
                                  check=True).stdout.decode()
        for name in ("tandem", "tandem-coordinator"):
            for lib in ("libmpi", "libcuda", "libcublas", "libnccl"):
                self.assertNotIn(lib, libraries(name))
        worker = libraries("tandem-worker")
        self.assertIn("libmpi", worker)
        for lib in ("libcuda", "libcublas", "libnccl"):
            self.assertNotIn(lib, worker)


if __name__ == "__main__":
    unittest.main(verbosity=2)
