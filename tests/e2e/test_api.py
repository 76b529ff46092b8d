"""A stock grpcio client against the server: streaming, cancel, deadline, health, limits, every kind of bad input."""
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
import unittest

import grpc

from cluster import (FOREVER, GENERATE, PB, SLOW, SLOW_ARGS, SOURCE, Cluster, Result, request, slow_model, tandem,
                     wait_for)
import health_pb2  # found through cluster's path
from tandem.v1 import control_pb2, inference_pb2

SERVING = health_pb2.HealthCheckResponse.SERVING
LONG = dict(temperature=0, ignore_eos=True, max_tokens=1000)


def raw(channel, path, message, timeout=10):
    """A call with bytes that no generated class would make."""
    same = lambda x: x  # noqa: E731
    return channel.unary_stream(path, same, same)(message, timeout=timeout * SLOW)


def fields(message):
    """{number: value} of a protobuf message, as the wire has it: an int or bytes; the last of a repeated field."""
    found, at = {}, 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
    while at < len(message):
        key = varint()
        if key & 7 == 0:
            found[key >> 3] = varint()
        else:
            assert key & 7 == 2, key
            n = varint()
            found[key >> 3] = message[at:at + n]
            at += n
    return found


class Api(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.dir = tempfile.TemporaryDirectory()
        cls.spans = os.path.join(cls.dir.name, "spans")
        args = ["--slow-client-timeout-ms", "2000", "--spans", cls.spans]
        cls.c = Cluster(tp=2, args=["--max-queued", 600, *(w for a in args for w in ("--coordinator-arg", a))])
        cls.c.__enter__()

    @classmethod
    def tearDownClass(cls):
        cls.c.__exit__(None, None, None)
        cls.dir.cleanup()

    def tearDown(self):
        self.c.wait_idle()

    def code_of(self, call):
        with self.assertRaises(grpc.RpcError) as e:
            list(call)
        return e.exception.code(), e.exception.details()

    # -- streaming --

    def test_messages_come_one_by_one(self):
        shares = []
        for _ in range(5):  # a busy machine may hold the client up once
            seen = []
            start = time.monotonic()
            for m in self.c.generate("Once upon a time", **{**LONG, "max_tokens": 800}):
                seen.append((time.monotonic() - start, len(m.token_ids)))
            self.assertEqual(sum(n for _, n in seen), 800)
            self.assertGreater(len(seen), 30)
            shares.append(seen[0][0] / seen[-1][0])
            if shares[-1] < 0.5:
                break
        self.assertLess(min(shares), 0.5, "the first message came when most tokens were made")

    def test_first_message_names_the_request(self):
        r = self.c.run("Once", max_tokens=2, request_id="my-request.1")
        self.assertEqual(r.request_id, "my-request.1")
        self.assertTrue(self.c.run("Once", max_tokens=2).request_id)

    def test_512_concurrent_streams(self):
        calls = [self.c.generate("One day", temperature=0, max_tokens=8) for _ in range(512)]
        results = [Result(s) for s in calls]
        self.assertEqual(len({tuple(r.ids) for r in results}), 1)
        self.assertEqual(len(results[0].ids), 8)

    def test_spans_go_on_in_the_callers_trace(self):
        """traceparent in the call's metadata; a line of OTLP in the file, of that trace and below that span."""
        trace, parent = os.urandom(16).hex(), os.urandom(8).hex()
        call = self.c.channel.unary_stream(GENERATE, inference_pb2.GenerateRequest.SerializeToString,
                                           inference_pb2.GenerateResponse.FromString)
        self.code_of(call(request("Once", max_tokens=2, top_p=7), timeout=10 * SLOW))  # no trace of its own, no line
        r = Result(call(request("Once", max_tokens=3, ignore_eos=True), timeout=10 * SLOW,
                        metadata=(("traceparent", f"00-{trace}-{parent}-01"),)))
        self.assertEqual(len(r.ids), 3)

        def lines():
            with open(self.spans) as f:
                return [line for line in f if line.endswith("\n") and trace in line]
        wait_for("a line of spans", lines, 5)
        self.assertEqual(len(lines()), 1)
        spans = [s for rs in json.loads(lines()[0])["resourceSpans"] for ss in rs["scopeSpans"] for s in ss["spans"]]
        self.assertEqual({s["traceId"] for s in spans}, {trace})
        self.assertEqual({s["name"] for s in spans}, {"generate", "queue", "prefill", "decode"})
        whole = next(s for s in spans if s["name"] == "generate")
        self.assertEqual(whole["parentSpanId"], parent)
        self.assertEqual({s["parentSpanId"] for s in spans if s is not whole}, {whole["spanId"]})
        self.assertIn(r.request_id, lines()[0])

    # -- health and control --

    def test_health_names(self):
        for name in ("", "tandem.v1.Inference"):
            self.assertEqual(self.c.health(name), SERVING)
        with self.assertRaises(grpc.RpcError) as e:
            self.c.health("no.such.Service")
        self.assertEqual(e.exception.code(), grpc.StatusCode.NOT_FOUND)

    def test_health_watch_and_list(self):
        watch = self.c.channel.unary_stream("/grpc.health.v1.Health/Watch",
                                            health_pb2.HealthCheckRequest.SerializeToString,
                                            health_pb2.HealthCheckResponse.FromString)
        call = watch(health_pb2.HealthCheckRequest(service="tandem.v1.Inference"), timeout=20 * SLOW)
        self.assertEqual(next(call).status, SERVING)
        call.cancel()
        call = watch(health_pb2.HealthCheckRequest(service="no.such.Service"), timeout=20 * SLOW)
        self.assertEqual(next(call).status, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        call.cancel()
        listing = self.c.channel.unary_unary("/grpc.health.v1.Health/List",
                                             health_pb2.HealthListRequest.SerializeToString,
                                             health_pb2.HealthListResponse.FromString)
        statuses = listing(health_pb2.HealthListRequest(), timeout=10).statuses
        self.assertEqual(statuses["tandem.v1.Inference"].status, SERVING)

    def test_server_and_model_information(self):
        info = self.c.info()
        self.assertEqual((info.state, info.tensor_parallel_size), (control_pb2.ServerInfo.READY, 2))
        self.assertEqual([r.rank for r in info.ranks], [0, 1])
        self.assertNotIn("no device yet", [r.device for r in info.ranks])
        self.assertGreaterEqual(info.epoch, 1)
        m = self.c.control("GetModelInfo", control_pb2.ModelInfo, control_pb2.GetModelInfoRequest())
        self.assertEqual((m.name, m.architecture, m.vocab_size, m.max_context_tokens),
                         ("demo-model", "LlamaForCausalLM", 2048, 1024))
        self.assertEqual((m.layers, m.hidden_size, m.query_heads, m.kv_heads, m.head_dim), (4, 192, 6, 3, 32))
        self.assertEqual((m.bos_token_id, list(m.eos_token_ids)), (2046, [2047]))
        self.assertAlmostEqual(m.defaults.temperature, 0.8, places=5)

    def test_unknown_methods_answer_at_once(self):
        for path in ("/tandem.v1.Inference/Nope", "/no.such.Service/Method"):
            start = time.monotonic()
            code, _ = self.code_of(raw(self.c.channel, path, b""))
            self.assertEqual(code, grpc.StatusCode.UNIMPLEMENTED)
            self.assertLess(time.monotonic() - start, 1 * SLOW)

    def test_top_command(self):
        rc, out, err = tandem("top", "--address", self.c.address, "--once", "--json", "--interval", "0.1")
        self.assertEqual((rc, err), (0, ""))
        look = json.loads(out)
        self.assertEqual((look["state"], [r["rank"] for r in look["ranks"]]), ("READY", [0, 1]))
        self.assertGreater(look["pages_total"], 0)
        rc, out, err = tandem("top", "--address", self.c.address, "--once", "--interval", "0.1")
        self.assertEqual((rc, err), (0, ""))
        self.assertIn("READY", out)
        self.assertIn("rank 1", out)
        self.assertEqual(tandem("top", "--json")[0], 2)
        self.assertEqual(tandem("top", "--address", "unix:/nonexistent", "--once")[0], 3)

    def test_probe_command(self):
        self.assertEqual(tandem("probe", "--address", self.c.address), (0, "SERVING\n", ""))
        rc, out, err = tandem("probe", "--address", "127.0.0.1:1")
        self.assertEqual((rc, out), (3, ""))
        self.assertEqual(err.count("\n"), 1)

    # -- bad input --

    def refused(self, field, prompt="Once", code=grpc.StatusCode.INVALID_ARGUMENT, **options):
        got, details = self.code_of(self.c.generate(prompt, **options))
        self.assertEqual(got, code, details)
        self.assertIn(field, details)

    def test_options_out_of_range(self):
        for t in (-0.1, 100.5, math.nan, math.inf, -math.inf):
            self.refused("sampling.temperature", temperature=t)
        for p in (0.0, -1.0, 1.01, math.nan):
            self.refused("sampling.top_p", top_p=p)
        self.refused("stopping.max_tokens", max_tokens=0)
        self.refused("stopping.max_tokens", max_tokens=2000)
        self.refused("stopping.stop_token_ids", stop_token_ids=[1] * 65)
        self.refused("stopping.stop_token_ids", stop_token_ids=[2048])
        self.refused("model", code=grpc.StatusCode.NOT_FOUND, model="gpt")
        self.refused("request_id", request_id="no spaces please")
        self.refused("request_id", request_id="x" * 129)

    def test_the_field_is_there_for_programs_too(self):
        with self.assertRaises(grpc.RpcError) as e:
            self.c.run("Once", temperature=200)
        status = fields(dict(e.exception.trailing_metadata())["grpc-status-details-bin"])
        self.assertEqual((status[1], status[2].decode()), (3, e.exception.details()))
        detail = fields(status[3])
        self.assertEqual(detail[1], b"type.googleapis.com/google.rpc.BadRequest")
        violation = fields(fields(detail[2])[1])
        self.assertEqual(violation[1], b"sampling.temperature")
        self.assertIn(b"expected 0 to 100", violation[2])

    def test_scheduling(self):
        wishes = dict(ttft_target_ms=60000, tbt_target_ms=50, priority=-1, tenant="someone")
        quiet = self.c.run("Once", temperature=0, max_tokens=8).ids
        self.assertEqual(self.c.run("Once", temperature=0, max_tokens=8, **wishes).ids, quiet)
        self.refused("scheduling.priority: 3, expected -1, 0 or 1", priority=3)
        self.refused("scheduling.tbt_target_ms: 70000, expected at most 60000", tbt_target_ms=70000)
        options = ["--ttft-target-ms", 60000, "--tbt-target-ms", 50, "--priority", -1, "--tenant", "someone"]
        say = ["generate", "--address", self.c.address, "--greedy", "--max-tokens", 8]
        plain = tandem(*say, "Once")
        self.assertEqual(plain[0], 0)
        self.assertEqual(tandem(*say, *options, "Once"), plain)
        rc, _, err = tandem(*say, "--ttft-target-ms", 3600001, "Once")
        self.assertEqual(rc, 1, err)
        self.assertIn("scheduling.ttft_target_ms: 3600001, expected at most 3600000", err)
        self.assertIn("--priority 0.5: expected -1, 0 or 1", tandem(*say, "--priority", 0.5, "Once")[2])

    def test_bad_prompts(self):
        self.refused("prompt", prompt="")
        self.refused("prompt", prompt=[])
        self.refused("token_ids", prompt=[1, 2, 2048])
        self.refused("token_ids", prompt=[4294967295])
        self.refused("1024", prompt=[415] * 1025)
        self.refused("1024", prompt=[415] * 1024)
        self.refused("1024", prompt="word " * 4000)
        code, details = self.code_of(raw(self.c.channel, "/tandem.v1.Inference/Generate",
                                         inference_pb2.GenerateRequest().SerializeToString()))
        self.assertEqual(code, grpc.StatusCode.INVALID_ARGUMENT)
        self.assertIn("prompt", details)

    def test_text_that_is_not_utf8(self):
        for bad in (b"\xff", b"abc\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80"):
            message = b"\x12" + bytes([len(bad)]) + bad
            code, details = self.code_of(raw(self.c.channel, "/tandem.v1.Inference/Generate", message))
            self.assertEqual(code, grpc.StatusCode.INVALID_ARGUMENT)
            self.assertIn("UTF-8", details)

    def test_text_with_nul_is_not_cut(self):
        a = self.c.run("One\0day", temperature=0, max_tokens=1).finish.usage.prompt_tokens
        b = self.c.run("One", temperature=0, max_tokens=1).finish.usage.prompt_tokens
        self.assertGreater(a, b + 1)

    def test_messages_that_are_none(self):
        for path in ("/tandem.v1.Inference/Generate", "/tandem.v1.Control/GetLoad", "/tandem.v1.Control/Abort",
                     "/grpc.health.v1.Health/Check"):
            code, _ = self.code_of(raw(self.c.channel, path, b"\x0a\xff\xff\xff\xff\x0f"))
            self.assertEqual(code, grpc.StatusCode.INVALID_ARGUMENT, path)

    def test_oversized_message(self):
        code, _ = self.code_of(raw(self.c.channel, "/tandem.v1.Inference/Generate",
                                   request("x" * (17 << 20)).SerializeToString(), 60))
        self.assertEqual(code, grpc.StatusCode.RESOURCE_EXHAUSTED)

    def test_large_prompt_does_not_hold_up_others(self):
        big = request("word " * (3 << 20))
        call = self.c.generate(big)
        start = time.monotonic()
        self.assertEqual(self.c.health(), SERVING)
        self.c.run("One day", temperature=0, max_tokens=4)
        self.assertLess(time.monotonic() - start, 10 * SLOW)
        self.assertEqual(self.code_of(call)[0], grpc.StatusCode.INVALID_ARGUMENT)

    def test_oversized_metadata(self):
        own = self.c.connect()  # the server may cut the connection that brought it
        call = own.unary_stream("/tandem.v1.Inference/Generate", inference_pb2.GenerateRequest.SerializeToString,
                                inference_pb2.GenerateResponse.FromString)
        code, _ = self.code_of(call(request("Once", max_tokens=1), timeout=10 * SLOW,
                                    metadata=[("x-big", "y" * (64 << 10))]))
        self.assertEqual(code, grpc.StatusCode.RESOURCE_EXHAUSTED)


class Ending(unittest.TestCase):
    """Requests that end before their time; the model is slow, so that they are running for sure."""

    @classmethod
    def setUpClass(cls):
        cls.dir = tempfile.TemporaryDirectory()
        cls.model = slow_model(cls.dir.name)
        cls.c = Cluster(model=cls.model, tp=2, args=[*SLOW_ARGS, "--max-queued", 600, "--coordinator-arg",
                                                     "--slow-client-timeout-ms", "--coordinator-arg", "2000"])
        cls.c.__enter__()

    @classmethod
    def tearDownClass(cls):
        cls.c.__exit__(None, None, None)
        cls.dir.cleanup()

    def tearDown(self):
        self.c.wait_idle()

    def code_of(self, call):
        with self.assertRaises(grpc.RpcError) as e:
            list(call)
        return e.exception.code(), e.exception.details()

    def test_cancel_frees_the_slot(self):
        call = self.c.generate("Once upon a time", **FOREVER)
        next(call)
        self.assertEqual(self.c.load().running_requests, 1)
        call.cancel()
        self.assertLess(self.c.wait_idle(2), 1.5 * SLOW)

    def test_disconnect_frees_the_slot(self):
        channel = self.c.connect()
        call = self.c.generate("Once upon a time", channel=channel, **FOREVER)
        next(call)
        channel.close()
        self.assertLess(self.c.wait_idle(2), 1.5 * SLOW)

    def test_deadline_while_running(self):
        code, _ = self.code_of(self.c.generate("Once upon a time", timeout=0.15, **FOREVER))
        self.assertEqual(code, grpc.StatusCode.DEADLINE_EXCEEDED)

    def test_abort_by_name(self):
        call = self.c.generate("Once upon a time", request_id="victim", **FOREVER)
        next(call)
        reply = self.c.control("Abort", control_pb2.AbortResponse, control_pb2.AbortRequest(request_ids=["victim"]))
        self.assertEqual(reply.aborted, 1)
        code, details = self.code_of(call)
        self.assertEqual(code, grpc.StatusCode.CANCELLED)
        with self.assertRaises(grpc.RpcError) as e:
            self.c.control("Abort", control_pb2.AbortResponse, control_pb2.AbortRequest(request_ids=["victim"]))
        self.assertEqual(e.exception.code(), grpc.StatusCode.NOT_FOUND)

    def test_abort_all(self):
        calls = [self.c.generate("Once upon a time", **FOREVER) for _ in range(5)]
        for call in calls:
            next(call)
        reply = self.c.control("Abort", control_pb2.AbortResponse, control_pb2.AbortRequest(all=True))
        self.assertEqual(reply.aborted, 5)
        for call in calls:
            self.assertEqual(self.code_of(call)[0], grpc.StatusCode.CANCELLED)

    def test_client_that_never_reads_is_dropped_and_others_go_on(self):
        same = lambda x: x  # noqa: E731
        slow = self.c.connect([("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)])
        calls = [slow.unary_stream("/tandem.v1.Inference/Generate", same, same)(
            request("Once upon a time", **FOREVER).SerializeToString(), timeout=60 * SLOW) for _ in range(40)]
        r = self.c.run("One day", temperature=0, ignore_eos=True, max_tokens=16)
        self.assertEqual(len(r.ids), 16)
        self.c.wait_idle(30)
        slow.close()
        del calls

    def test_two_live_requests_of_one_name(self):
        call = self.c.generate("Once", request_id="twin", **FOREVER)
        next(call)
        code, details = self.code_of(self.c.generate("Once", request_id="twin"))
        self.assertEqual(code, grpc.StatusCode.ALREADY_EXISTS)
        self.assertIn("request_id", details)
        call.cancel()

    def test_storm_of_cancels(self):
        def one(i):
            call = self.c.generate("Once upon a time", **FOREVER)
            if i % 3:
                try:
                    next(call)
                except grpc.RpcError:
                    pass
            call.cancel()
        threads = [threading.Thread(target=one, args=(i,)) for i in range(60)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60 * SLOW)
        self.c.wait_idle(20)
        self.assertEqual(len(self.c.run("One", temperature=0, ignore_eos=True, max_tokens=4).ids), 4)

    def test_full_queue_refuses_at_once_with_a_hint(self):
        with Cluster(model=self.model, args=[*SLOW_ARGS, "--max-slots", 1, "--max-queued", 2]) as c:
            with self.assertRaises(grpc.RpcError) as e:  # not a matter of waiting
                c.run("Once", temperature=1.0, n=3)
            self.assertEqual(e.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
            self.assertIn("sampling.n: 3, expected at most 2", e.exception.details())
            running = c.generate("Once", **FOREVER)
            next(running)
            waiting = [c.generate("Once", **FOREVER) for _ in range(2)]
            wait_for("queue full", lambda: c.load().queued_requests == 2)
            start = time.monotonic()
            call = c.generate("Once", **FOREVER)
            with self.assertRaises(grpc.RpcError) as e:
                list(call)
            self.assertEqual(e.exception.code(), grpc.StatusCode.RESOURCE_EXHAUSTED)
            self.assertLess(time.monotonic() - start, 1 * SLOW)
            trailers = dict(e.exception.trailing_metadata())
            hint = fields(fields(fields(fields(trailers["grpc-status-details-bin"])[3])[2])[1])
            self.assertEqual(hint[1] * 1000 + hint[2] // 1000000, int(trailers["retry-after-ms"]))
            for call in [running] + waiting:
                call.cancel()
            c.wait_idle()

    def test_deadline_in_the_queue(self):
        with Cluster(model=self.model, args=[*SLOW_ARGS, "--max-slots", 2]) as c:
            busy = [c.generate("Once upon a time", **FOREVER) for _ in range(2)]
            for call in busy:
                next(call)
            with self.assertRaises(grpc.RpcError) as e:
                list(c.generate("Once", timeout=0.5 * SLOW, temperature=0, max_tokens=900))
            self.assertEqual(e.exception.code(), grpc.StatusCode.DEADLINE_EXCEEDED)
            for call in busy:
                call.cancel()
            c.wait_idle()


class ReadmeClient(unittest.TestCase):
    def test_it_runs_and_is_in_the_readme(self):
        path = os.path.join(SOURCE, "tests/e2e/readme_client.py")
        with open(path) as f, open(os.path.join(SOURCE, "README.md")) as readme:
            self.assertIn(f.read(), readme.read())
        with Cluster() as c:
            p = subprocess.run([sys.executable, path, c.address, "Once upon a time"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": PB}, timeout=60 * SLOW)
            self.assertEqual((p.returncode, p.stderr), (0, b""))
            self.assertIn(b" tokens]", p.stdout)


class Limits(unittest.TestCase):
    def test_request_that_can_never_fit_is_refused(self):
        with Cluster(args=["--kv-memory", "256K", "--page-size", "64K"]) as c:
            with self.assertRaises(grpc.RpcError) as e:
                c.run("Once", temperature=0, max_tokens=900)
            self.assertEqual(e.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
            self.assertEqual(len(c.run("Once", temperature=0, max_tokens=20).ids), 20)

    def test_unix_socket(self):
        with tempfile.TemporaryDirectory() as d:
            path = f"unix:{os.path.join(d, 'api')}"
            with Cluster(args=["--listen", path]) as c:
                rc, out, err = tandem("generate", "--address", path, "--greedy", "--max-tokens", 3, "Once upon a time")
                self.assertEqual((rc, err), (0, ""))
                self.assertTrue(out.strip())
                c.wait_idle()


class Draining(unittest.TestCase):
    def test_drain_ends_admission_and_lets_requests_finish(self):
        with Cluster() as c:
            running = c.generate("Once", **{**LONG, "max_tokens": 600})
            next(running)
            done = []
            t = threading.Thread(target=lambda: done.append(c.control(
                "Drain", control_pb2.DrainResponse, control_pb2.DrainRequest(timeout_ms=60000), timeout=90)))
            t.start()
            wait_for("draining", lambda: c.info().state == control_pb2.ServerInfo.DRAINING)
            self.assertFalse(c.is_ready())
            with self.assertRaises(grpc.RpcError) as e:
                c.run("Once", max_tokens=1)
            self.assertEqual(e.exception.code(), grpc.StatusCode.UNAVAILABLE)
            self.assertEqual(Result(running).finish.usage.completion_tokens, 600)
            t.join(60 * SLOW)
            self.assertEqual(done[0].remaining_requests, 0)

    def test_sigterm_drains(self):
        with Cluster() as c:
            running = c.generate("Once", **{**LONG, "max_tokens": 600})
            next(running)
            c.process.terminate()
            self.assertEqual(Result(running).finish.usage.completion_tokens, 600)
            self.assertEqual(c.process.wait(20 * SLOW), 0)


if __name__ == "__main__":
    unittest.main(verbosity=2)
