"""Chats through the whole server: the template's text is the prompt, and bad chats get errors that name the field."""
import json
import os
import pty
import select
import shutil
import signal
import tempfile
import time
import unittest

import grpc

from cluster import DEMO, SLOW, SLOW_ARGS, TANDEM, Cluster, Result, copy_model, slow_model, tandem, wait_for
from tandem.v1 import inference_pb2


def chat(*messages, **options):
    r = inference_pb2.GenerateRequest()
    r.chat.SetInParent()
    for role, content in messages:
        r.chat.messages.add(role=role, content=content)
    for name, value in options.items():
        setattr(r.chat, name, value)
    r.sampling.temperature = 0
    r.stopping.max_tokens = 12
    return r


class Chats(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.model = tempfile.mkdtemp()
        for f in os.listdir(DEMO):
            os.symlink(os.path.join(DEMO, f), os.path.join(cls.model, f))
        with open(os.path.join(cls.model, "chat_template.jinja"), "w") as f:
            f.write("{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}"
                    "{% endif %}{{ m.content|trim ~ ' ' }}{% endfor %}{% if style %}{{ style }}{% endif %}"
                    "{% for t in tools or [] %}{{ t.name }}{% endfor %}{% if add_generation_prompt %}Once{% endif %}")
        cls.c = Cluster(model=cls.model)
        cls.c.__enter__()

    @classmethod
    def tearDownClass(cls):
        cls.c.__exit__(None, None, None)
        shutil.rmtree(cls.model)

    def same(self, request, text):
        """The chat's tokens are those of the text; the demo's tokenizer matches special tokens spelled in it."""
        got = self.c.run(request)
        want = self.c.run(text, temperature=0, max_tokens=12, add_special_tokens=False)
        self.assertEqual((got.ids, got.finish.usage.prompt_tokens), (want.ids, want.finish.usage.prompt_tokens))

    def test_the_prompt_is_the_templates_text(self):
        bos = "<|begin_of_text|>"
        self.same(chat(("user", " A dog \n"), ("assistant", "ran."), ("user", "Grüße")), bos + "A dog ran. Grüße Once")
        self.same(chat(("user", "A dog"), add_generation_prompt=False), bos + "A dog ")
        self.same(chat(("user", "A dog"), ("assistant", "It ran"), continue_final_message=True), bos + "A dog It ran")
        self.same(chat(("user", "A"), template_arguments_json='{"style": "S", "messages": []}',
                       tools_json='[{"name": "f"}]'), bos + "A SfOnce")

    def test_bad_chats_name_the_field(self):
        long = chat(("user", "word " * 5000))
        name = chat(("user", "x"))
        name.chat.messages[0].tool_calls_json = "{"
        code = grpc.StatusCode
        for request, want, says in (
                (chat(), code.INVALID_ARGUMENT, "chat.messages: 0"),
                (chat(("", "x")), code.INVALID_ARGUMENT, "chat.messages[0].role"),
                (chat(("tool", "x")), code.INVALID_ARGUMENT, "no tools here"),
                (chat(("user", "x"), tools_json="{}"), code.INVALID_ARGUMENT, "chat.tools_json: expected a JSON array"),
                (chat(("user", "x"), template_arguments_json="[]"), code.INVALID_ARGUMENT, "chat.template_arguments_json"),
                (name, code.INVALID_ARGUMENT, "chat.messages[0].tool_calls_json"),
                (chat(("user", "x"), continue_final_message=True, add_generation_prompt=True), code.INVALID_ARGUMENT,
                 "chat.continue_final_message"),
                (long, code.INVALID_ARGUMENT, "chat:")):
            with self.assertRaises(grpc.RpcError) as e:
                self.c.run(request)
            self.assertEqual(e.exception.code(), want, e.exception.details())
            self.assertIn(says, e.exception.details())
        self.c.wait_idle()


class Command(unittest.TestCase):
    """`tandem chat` with lines from a pipe."""

    @classmethod
    def setUpClass(cls):
        cls.c = Cluster(args=["--chat-template", "chatml"])
        cls.c.__enter__()

    @classmethod
    def tearDownClass(cls):
        cls.c.__exit__(None, None, None)

    def talk(self, text, *options):
        return tandem("chat", "--address", self.c.address, "--greedy", "--max-tokens", 8, *options, stdin=text)

    def ask(self, *messages):
        r = chat(*messages)
        r.stopping.max_tokens = 8
        return self.c.run(r)

    def test_answers_follow_from_the_whole_conversation(self):
        first = self.ask(("system", "Be brief."), ("user", "Hello"))
        second = self.ask(("system", "Be brief."), ("user", "Hello"), ("assistant", first.text), ("user", "/why?"))
        rc, out, err = self.talk("Hello\n\n//why?\n", "--system", "Be brief.", "--json")
        self.assertEqual((rc, err), (0, ""))
        got = [json.loads(line) for line in out.splitlines()]
        self.assertEqual([g["content"] for g in got], [first.text, second.text])
        self.assertEqual([g["usage"]["prompt_tokens"] for g in got],
                         [r.finish.usage.prompt_tokens for r in (first, second)])
        rc, out, err = self.talk("Hello", "--system", "Be brief.")
        self.assertEqual((rc, out.rstrip("\n"), err), (0, first.text.rstrip("\n"), ""))

    def test_commands_change_the_conversation(self):
        with tempfile.TemporaryDirectory() as d:
            path = os.path.join(d, "talk.json")
            rc, out, err = self.talk(f"/system Be kind.\nA\nB\n/undo\n/retry\n/save {path}\n/reset\nC\n/quit\nnot read\n",
                                     "--json")
            self.assertEqual((rc, err), (0, ""))
            texts = [json.loads(line)["content"] for line in out.splitlines()]
            self.assertEqual(len(texts), 4)
            self.assertEqual(texts[2], texts[0])
            self.assertEqual(texts[3], self.ask(("system", "Be kind."), ("user", "C")).text)
            with open(path) as f:
                self.assertEqual(json.load(f)["messages"], [{"role": "system", "content": "Be kind."},
                                                            {"role": "user", "content": "A"},
                                                            {"role": "assistant", "content": texts[0]}])
            rc, out, err = self.talk(f"/save {path}\n")
            self.assertEqual((rc, out), (2, ""))
            self.assertIn("File exists", err)
        for line in ("/retry", "/undo", "/nonsense", "/save"):
            self.assertEqual(self.talk(line + "\n")[:2], (2, ""))


class Terminal(unittest.TestCase):
    def test_interrupt_ends_the_answer_and_not_the_program(self):
        with tempfile.TemporaryDirectory() as d, \
                Cluster(model=slow_model(d), args=[*SLOW_ARGS, "--chat-template", "chatml"]) as c:
            pid, fd = pty.fork()
            if pid == 0:
                os.environ["TERM"] = "vt100"
                os.execv(TANDEM, [TANDEM, "chat", "--address", c.address, "--ignore-eos", "--max-tokens", "16000",
                                  "--stats"])
            seen = ""

            def until(text):
                nonlocal seen
                start = time.monotonic()
                while text not in seen:
                    if time.monotonic() - start > 30 * SLOW:
                        raise AssertionError(f"no {text!r} in {seen[-2000:]!r}")
                    if select.select([fd], [], [], 0.1)[0]:
                        seen += os.read(fd, 65536).decode(errors="replace")
                seen = seen[seen.index(text) + len(text):]
            try:
                until("> ")
                for _ in range(2):
                    os.write(fd, b"Hello\xc3\xa9\r")
                    wait_for("an answer", lambda: c.load().running_requests == 1, 20)
                    os.write(fd, b"\x03")
                    until(", interrupted]")
                    until("> ")
                    c.wait_idle()
                os.write(fd, b"half a line\x03")  # dropped, nothing is asked
                until("> ")
                os.write(fd, b"/nonsense\r")
                until("no such command")
                until("> ")
                self.assertTrue(c.idle())
                os.write(fd, b"\x04")
                wait_for("end", lambda: select.select([fd], [], [], 0)[0] and not self.drain(fd), 20)
                self.assertEqual(os.waitpid(pid, 0)[1], 0)
                pid = 0
            finally:
                os.close(fd)
                if pid:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)

    @staticmethod
    def drain(fd):
        """Nothing at the end: Linux gives EIO when nobody has the other side open."""
        try:
            return os.read(fd, 65536)
        except OSError:
            return b""


class Templates(unittest.TestCase):
    def test_a_model_without_one_says_so_and_takes_one_by_name(self):
        with Cluster() as c:
            with self.assertRaises(grpc.RpcError) as e:
                c.run(chat(("user", "x")))
            self.assertEqual(e.exception.code(), grpc.StatusCode.FAILED_PRECONDITION)
            self.assertIn("--chat-template", e.exception.details())
            rc, out, err = tandem("chat", "--address", c.address, stdin="Hello\n")
            self.assertEqual((rc, out, err.count("\n")), (1, "", 1))
            self.assertIn("--chat-template", err)
        with tempfile.TemporaryDirectory() as d:
            model = copy_model(d)
            with open(os.path.join(model, "chat_template.jinja"), "w") as f:
                f.write("{{ bos_token }}\n{% if %}")
            with Cluster(model=model) as c:
                with self.assertRaises(grpc.RpcError) as e:
                    c.run(chat(("user", "x")))
                self.assertEqual(e.exception.code(), grpc.StatusCode.FAILED_PRECONDITION)
                self.assertIn("chat_template.jinja: line 2: %}", e.exception.details())
                self.assertEqual(len(c.run("Once", max_tokens=2).ids), 2)
        with Cluster(args=["--chat-template", "llama2"]) as c:
            r = Result(c.generate(chat(("user", "Hello"))))
            self.assertEqual(len(r.ids), 12)
            with self.assertRaises(grpc.RpcError) as e:
                c.run(chat(("assistant", "x")))
            self.assertIn("roles must alternate", e.exception.details())


if __name__ == "__main__":
    unittest.main(verbosity=2)
