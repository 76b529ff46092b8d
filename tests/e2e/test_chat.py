"""Chats through the whole server: the template's text is the prompt, and bad chats get errors that name the field."""
import os
import shutil
import tempfile
import unittest

import grpc

from cluster import DEMO, Cluster, Result
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


class Templates(unittest.TestCase):
    def test_a_model_without_one_says_so_and_takes_one_by_name(self):
        with Cluster() as c:
            with self.assertRaises(grpc.RpcError) as e:
                c.run(chat(("user", "x")))
            self.assertEqual(e.exception.code(), grpc.StatusCode.FAILED_PRECONDITION)
            self.assertIn("--chat-template", e.exception.details())
        with Cluster(args=["--chat-template", "llama2"]) as c:
            r = Result(c.generate(chat(("user", "Hello"))))
            self.assertEqual(len(r.ids), 12)
            with self.assertRaises(grpc.RpcError) as e:
                c.run(chat(("assistant", "x")))
            self.assertIn("roles must alternate", e.exception.details())


if __name__ == "__main__":
    unittest.main(verbosity=2)
