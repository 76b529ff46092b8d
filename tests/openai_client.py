"""The stock `openai` package against a server that runs; by hand, because the package is in no distribution that the tests
run on:

    python3 -m venv /tmp/venv && /tmp/venv/bin/pip install openai
    tandem serve --model tests/data/demo-model --chat-template chatml --http 127.0.0.1:8000
    /tmp/venv/bin/python tests/openai_client.py http://127.0.0.1:8000/v1
"""
import asyncio
import sys
import time

import openai

base = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
client = openai.OpenAI(base_url=base, api_key="unused-unless-the-server-has-tokens")
model = client.models.list().data[0].id
checks = 0


def check(what, holds, seen=None):
    global checks
    checks += 1
    if not holds:
        sys.exit(f"FAIL: {what}: {seen!r}")


def refused(what, kind, param, **fields):
    try:
        client.chat.completions.create(**{"model": model, "messages": MESSAGES, **fields})
    except kind as e:
        check(f"{what}: param", param is None or e.param == param, e.param)
    else:
        check(f"{what}: is refused", False)


MESSAGES = [{"role": "system", "content": "You tell stories."}, {"role": "user", "content": [
    {"type": "text", "text": "Once upon a time"}]}]
CHAT = dict(model=model, messages=MESSAGES, max_completion_tokens=24, temperature=0)

check("models.retrieve", client.models.retrieve(model).id == model)

whole = client.chat.completions.create(**CHAT)
text = whole.choices[0].message.content
check("chat: a role and text", whole.choices[0].message.role == "assistant" and len(text) > 10, whole)
check("chat: usage", whole.usage.completion_tokens == 24 and whole.usage.total_tokens ==
      whole.usage.prompt_tokens + 24, whole.usage)
check("chat: finish", whole.choices[0].finish_reason == "length", whole)

events = list(client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
check("stream: same text", "".join(e.choices[0].delta.content or "" for e in events if e.choices) == text, events)
check("stream: usage last", events[-1].usage.completion_tokens == 24 and not events[-1].choices, events[-1])
check("stream: several events", len(events) > 4, len(events))
check("stream: role first", events[0].choices[0].delta.role == "assistant", events[0])
scored = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3).choices[0]
tokens = scored.logprobs.content
check("logprobs: one a token, greedy is the likeliest", len(tokens) == 24 and all(
    t.top_logprobs[0].token == t.token and len(t.top_logprobs) == 3 for t in tokens), tokens[:2])
check("logprobs: their bytes are the text", b"".join(bytes(t.bytes) for t in tokens).decode() == text, text)

several = client.chat.completions.create(**{**CHAT, "temperature": 1}, n=3, seed=7)
again = client.chat.completions.create(**{**CHAT, "temperature": 1}, n=3, seed=7)
texts = [c.message.content for c in several.choices]
check("n and seed", len(set(texts)) == 3 and texts == [c.message.content for c in again.choices], texts)

stopped = client.chat.completions.create(**CHAT, stop=[text[8:11]])
check("stop", stopped.choices[0].message.content == text[:text.index(text[8:11])] and
      stopped.choices[0].finish_reason == "stop", stopped)
first = tokens[0].token
biased = client.completions.create(model=model, prompt="Once upon a time", max_tokens=4, temperature=0,
                                   logit_bias={"300": 100})
check("logit_bias", len(set(biased.choices[0].text.split())) <= 2, biased)
plain = client.completions.create(model=model, prompt="Once upon a time", max_tokens=8, temperature=0)
echoed = client.completions.create(model=model, prompt="Once upon a time", max_tokens=8, temperature=0, echo=True,
                                   logprobs=2)
check("echo", echoed.choices[0].text == "Once upon a time" + plain.choices[0].text, echoed)
scores = echoed.choices[0].logprobs
check("echo with logprobs", scores.token_logprobs[0] is None and len(scores.tokens) == echoed.usage.total_tokens and
      "".join(scores.tokens[1:]) == echoed.choices[0].text, scores)
ids = client.completions.create(model=model, prompt=[1, 2, 3], max_tokens=2)
check("ids as prompt", ids.usage.prompt_tokens == 3, ids)
extra = client.completions.create(model=model, prompt="Once", max_tokens=8, extra_body={
    "top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "min_tokens": 8})
check("vLLM's fields", extra.usage.completion_tokens == 8, extra)

refused("temperature", openai.BadRequestError, "temperature", temperature=500)
refused("limit", openai.BadRequestError, "max_completion_tokens", max_completion_tokens=10**6)
refused("messages", openai.BadRequestError, "messages", messages=[])
refused("an image", openai.BadRequestError, "messages[0].content[0]", messages=[
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
refused("unknown field", openai.BadRequestError, "colour", extra_body={"colour": 1})
refused("model", openai.NotFoundError, "model", model="no-such-model")

with client.chat.completions.create(**{**CHAT, "max_completion_tokens": 400}, stream=True) as s:
    next(iter(s))  # and away


async def many(n):
    a = openai.AsyncOpenAI(base_url=base, api_key="x")
    results = await asyncio.gather(*(a.completions.create(model=model, prompt="Once upon a time", max_tokens=16,
                                                          temperature=0) for _ in range(n)))
    return {r.choices[0].text for r in results}

begin = time.monotonic()
check("64 at once: one text", len(asyncio.run(many(64))) == 1)
print(f"openai {openai.__version__}: {checks} checks passed; 64 requests at once in {time.monotonic() - begin:.2f} s")
