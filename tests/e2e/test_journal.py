"""The coordinator is killed in the middle of streams: `tandem serve --journal`, real ranks, a stock grpcio client."""
import json
import os
import signal
import subprocess
import tempfile
import time
import unittest

import grpc

from cluster import Cluster, Result, SLOW, TANDEM, inference_pb2, wait_for

ATTACH = "/tandem.v1.Inference/Attach"
PROMPT = "Once upon a time, there was a little"
TOKENS = 700 if SLOW == 1 else 400  # more than are made until the coordinator is killed
LONG = dict(ignore_eos=True, max_tokens=TOKENS)


def attach(c, name, have):
    call = c.channel.unary_stream(ATTACH, inference_pb2.AttachRequest.SerializeToString,
                                  inference_pb2.GenerateResponse.FromString)
    offsets = [inference_pb2.AttachOffset(tokens=len(have.ids), text_bytes=len(have.text.encode()))]
    return call(inference_pb2.AttachRequest(request_id=name, offsets=offsets), timeout=120)


def until_lost(call, messages):
    """What comes until the call breaks."""
    try:
        for m in call:
            messages.append(m)
    except grpc.RpcError as e:
        return e.code()
    return grpc.StatusCode.OK


class Command:
    """`tandem generate` as it runs."""

    def __init__(self, options):
        self.process = subprocess.Popen([TANDEM, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.begun = b""

    def await_begin(self):
        self.begun = os.read(self.process.stdout.fileno(), 4096)

    def end(self):
        out, err = self.process.communicate(timeout=60 * SLOW)
        return self.process.returncode, (self.begun + out).decode(), err.decode()


def pieces(text):
    """Of generate --json: ids and text, however they were cut into messages, and how many ends."""
    messages = [json.loads(line) for line in text.splitlines()]
    return (sum((m.get("token_ids", []) for m in messages), []), "".join(m.get("text", "") for m in messages),
            sum("finish" in m for m in messages))


class Journal(unittest.TestCase):
    def test_streams_outlive_a_killed_coordinator(self):
        with tempfile.TemporaryDirectory() as where, Cluster(
                args=["--journal", os.path.join(where, "journal")]) as c:
            options = [dict(temperature=0), dict(temperature=1.0, seed=5), dict(temperature=0.7, seed=6, logprobs=1)]
            quiet = [c.run(PROMPT, **LONG, **o) for o in options]
            generate = ["generate", "--address", c.address, "--ignore-eos", "--max-tokens", str(TOKENS), PROMPT]
            sampled = ["--temperature", "1", "--seed", "5"]  # as in options
            commands = [Command([*generate, "--greedy"]), Command([*generate, *sampled, "--json"]),
                        Command([*generate, "--greedy", "--no-attach"])]
            calls = [c.generate(PROMPT, request_id=f"r{i}", **LONG, **o) for i, o in enumerate(options)]
            for command in commands:
                command.await_begin()
            messages = [[next(call)] for call in calls]
            self.assertGreater(messages[0][0].attach_ms, 0)
            time.sleep(0.05)  # the journal writes each 10 ms
            victim = c.coordinator_pid()
            os.kill(victim, signal.SIGKILL)
            for call, got in zip(calls, messages):
                self.assertEqual(until_lost(call, got), grpc.StatusCode.UNAVAILABLE)
            wait_for("another coordinator", lambda: c.coordinator_pid() not in (None, victim), 30)
            c.wait_ready(60)
            for i, (got, whole) in enumerate(zip(messages, quiet)):
                have = Result(got)
                self.assertIsNone(have.finish)
                rest = list(attach(c, f"r{i}", have))
                self.assertEqual(rest[0].request_id, f"r{i}")
                both = Result(got + rest)
                self.assertEqual(both.ids, whole.ids)
                self.assertEqual(both.text, whole.text)
                self.assertEqual(both.finish.reason, whole.finish.reason)
                self.assertEqual(both.finish.timing.replays, 1)
                self.assertEqual(list(attach(c, f"r{i}", both))[-1].token_ids, [])  # once more: nothing but the end
            text, parts, alone = [command.end() for command in commands]
            for status, _, err in (text, parts):
                self.assertEqual(status, 0, err)
                self.assertIn("taking the answer up again, for 60 s at most", err)
            self.assertEqual(text[1].rstrip("\n"), quiet[0].text.rstrip("\n"))
            self.assertEqual(pieces(parts[1]), (quiet[1].ids, quiet[1].text, 1))
            self.assertEqual(alone[0], 1)
            self.assertIn("UNAVAILABLE", alone[2])
            self.assertLess(len(alone[1]), len(text[1]))
            self.assertTrue(text[1].startswith(alone[1].rstrip("\n")))
            with self.assertRaises(grpc.RpcError) as e:
                list(attach(c, "nobody", Result([])))
            self.assertEqual(e.exception.code(), grpc.StatusCode.NOT_FOUND)
            self.assertIn("request_id", e.exception.details())
            c.wait_idle()


if __name__ == "__main__":
    unittest.main(verbosity=2)
