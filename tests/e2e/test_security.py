"""Stock grpcio clients against listeners that demand TLS, client certificates and tokens; rotation while serving; reflection.

One cluster has a listener of each kind. Certificates are made by openssl when the test starts.
"""
import os
import shutil
import subprocess
import tempfile
import threading
import unittest

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from cluster import DEMO, SLOW, SOURCE, TANDEM, Cluster, Result, free_port, request, tandem, wait_for
import health_pb2  # found through cluster's path
import reflection_pb2
from tandem.v1 import inference_pb2

GENERATE = "/tandem.v1.Inference/Generate"
TOKEN, NEW_TOKEN = "the-first-token-0123456789", "the-second-token-012345678"
CERTS = tempfile.mkdtemp(prefix="tandem-certs-")
KINDS = {"tls": "tls,open", "mtls": "mtls,open", "token": "plain,token", "both": None, "health": "plain,health"}


def setUpModule():
    subprocess.run([os.path.join(SOURCE, "tests/make_certs.sh"), CERTS], check=True)
    put("token", TOKEN + "\n")


def tearDownModule():
    shutil.rmtree(CERTS)


def path(name):
    return os.path.join(CERTS, name)


def read(name):
    with open(path(name), "rb") as f:
        return f.read()


def put(name, content):
    """Replaces a file as a whole."""
    with open(path(name + ".new"), "w" if isinstance(content, str) else "wb") as f:
        f.write(content)
    os.replace(path(name + ".new"), path(name))


def credentials(ca="ca", cert=None):
    pair = (read(cert + ".key"), read(cert + ".pem")) if cert else (None, None)
    return grpc.ssl_channel_credentials(read(ca + ".pem"), *pair)


class SecureCluster(Cluster):
    """self.at[kind] is the address of a listener; the usual one is plain and open. Ranks attach over mutual TLS."""

    def __init__(self, args=()):
        for name in ("server.pem", "server.key", "ca.pem"):
            put("live-" + name, read(name))
        super().__init__(tp=2, args=args)
        self.command[self.command.index(self.address)] += ",plain,open"
        self.at, self.control_address = {}, f"127.0.0.1:{free_port()}"
        for kind, words in KINDS.items():
            self.at[kind] = f"localhost:{free_port()}" if kind != "health" else f"127.0.0.1:{free_port()}"
            self.command += ["--listen", self.at[kind] + ("," + words if words else "")]
        self.command += ["--tls-cert", path("live-server.pem"), "--tls-key", path("live-server.key"),
                         "--tls-client-ca", path("live-ca.pem"), "--token-file", path("token"),
                         "--control-listen", self.control_address, "--control-tls-ca", path("ca.pem"),
                         "--control-tls-cert", path("renewed.pem"), "--control-tls-key", path("renewed.key"),
                         "--control-token-file", path("token"),
                         "--coordinator-arg", "--max-message-bytes", "--coordinator-arg", "65536"]

    def secure(self, kind, creds=None):
        """A connection of its own. creds None: plaintext."""
        options = [("grpc.use_local_subchannel_pool", 1)]
        c = grpc.secure_channel(self.at[kind], creds, options) if creds else grpc.insecure_channel(self.at[kind], options)
        self.channels.append(c)
        return c

    def ask(self, channel, metadata=None, prompt="Once upon a time", **options):
        call = channel.unary_stream(GENERATE, inference_pb2.GenerateRequest.SerializeToString,
                                    inference_pb2.GenerateResponse.FromString)
        return Result(call(request(prompt, **{"max_tokens": 4, **options}), timeout=30 * SLOW,
                           metadata=metadata))

    def tls_to_plain(self):
        c = grpc.secure_channel(self.address, credentials(), [("grpc.use_local_subchannel_pool", 1)])
        self.channels.append(c)
        return c


class Security(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.c = SecureCluster()
        cls.c.__enter__()

    @classmethod
    def tearDownClass(cls):
        cls.c.__exit__(None, None, None)

    def refused(self, code, part, function, *args, **kwargs):
        with self.assertRaises(grpc.RpcError) as e:
            function(*args, **kwargs)
        self.assertEqual(e.exception.code(), code, e.exception.details())
        self.assertIn(part, e.exception.details())

    def served(self, channel, **kwargs):
        self.assertEqual(len(self.c.ask(channel, **kwargs).ids), 4)

    # -- TLS --

    def test_tls(self):
        self.served(self.c.secure("tls", credentials()))
        self.refused(grpc.StatusCode.UNAVAILABLE, "certificate verify failed", self.c.ask,
                     self.c.secure("tls", credentials("other-ca")))
        self.refused(grpc.StatusCode.UNAVAILABLE, "", self.c.ask, self.c.secure("tls"))
        self.refused(grpc.StatusCode.UNAVAILABLE, "", self.c.ask, self.c.tls_to_plain())

    def test_mutual_tls(self):
        self.served(self.c.secure("mtls", credentials(cert="client")))
        for cert in (None, "stranger", "expired"):
            self.refused(grpc.StatusCode.UNAVAILABLE, "", self.c.ask, self.c.secure("mtls", credentials(cert=cert)))
        # Who is refused in a handshake has no call that could carry a reason: it is in the server's log.
        wait_for("both reasons in the log", lambda: "peer did not return a certificate" in self.c.log() and
                 "certificate verify failed. The certificate that was shown has expired" in self.c.log())

    def test_request_is_taken_up_by_the_same_names_only(self):
        """Who attaches must show the names of the certificate that began the request; a renewed certificate has them."""
        def attach(cert):
            call = self.c.secure("mtls", credentials(cert=cert)).unary_stream(
                "/tandem.v1.Inference/Attach", inference_pb2.AttachRequest.SerializeToString,
                inference_pb2.GenerateResponse.FromString)
            return Result(call(inference_pb2.AttachRequest(request_id="kept"), timeout=30 * SLOW))
        ids = self.c.ask(self.c.secure("mtls", credentials(cert="client")), request_id="kept", keep_ms=60000).ids
        self.refused(grpc.StatusCode.PERMISSION_DENIED, "another caller's", attach, "elsewhere")
        self.assertEqual(attach("renewed").ids, ids)

    # -- tokens --

    def test_token(self):
        channel = self.c.secure("token")
        self.served(channel, metadata=[("authorization", "Bearer " + TOKEN)])
        self.served(channel, metadata=[("authorization", "bearer " + TOKEN)])  # the scheme's case does not matter
        self.refused(grpc.StatusCode.UNAUTHENTICATED, "authorization: no such header", self.c.ask, channel)
        for value in ("Bearer " + TOKEN[:-1], "Bearer " + TOKEN + "0", "Bearer ", "Basic " + TOKEN, TOKEN, ""):
            self.refused(grpc.StatusCode.UNAUTHENTICATED, "authorization: not a token", self.c.ask, channel,
                         metadata=[("authorization", value)])
        self.assertEqual(self.health(channel), health_pb2.HealthCheckResponse.SERVING)
        self.assertNotIn(TOKEN, self.c.log())

    def test_certificate_and_token_together(self):
        both = grpc.composite_channel_credentials(credentials(cert="client"), grpc.access_token_call_credentials(TOKEN))
        self.served(self.c.secure("both", both))
        self.refused(grpc.StatusCode.UNAUTHENTICATED, "authorization", self.c.ask,
                     self.c.secure("both", credentials(cert="client")))
        wrong = grpc.composite_channel_credentials(credentials(), grpc.access_token_call_credentials(TOKEN))
        self.refused(grpc.StatusCode.UNAVAILABLE, "", self.c.ask, self.c.secure("both", wrong))

    def health(self, channel):
        check = channel.unary_unary("/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest.SerializeToString,
                                    health_pb2.HealthCheckResponse.FromString)
        return check(health_pb2.HealthCheckRequest(service="tandem.v1.Inference"), timeout=10 * SLOW).status

    def test_listener_for_probes(self):
        channel = self.c.secure("health")
        self.assertEqual(self.health(channel), health_pb2.HealthCheckResponse.SERVING)
        self.refused(grpc.StatusCode.PERMISSION_DENIED, "grpc.health.v1 only", self.c.ask, channel)

    # -- ranks --

    def test_rank_that_is_not_one_of_ours(self):
        """The group that serves has attached over mutual TLS and with a token; nobody else gets that far."""
        put("wrong-token", "not-the-token-0123456789")
        certificate = ["--tls-ca", path("ca.pem"), "--tls-cert", path("client.pem"), "--tls-key", path("client.key")]
        for args, part in ((["--attach-timeout-ms", "300"], "does the server expect TLS"),
                           (["--attach-timeout-ms", "300", *certificate[:2]], "demand a client certificate"),
                           (certificate, "authorization: no such header"),
                           ([*certificate, "--token-file", path("wrong-token")], "authorization: not a token"),
                           (["--tls-ca", path("none.pem")], "tls-ca")):
            p = subprocess.run([os.path.join(os.path.dirname(TANDEM), "tandem-worker"), "--model", DEMO, "--coordinator",
                                self.c.control_address, *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               timeout=60 * SLOW)
            self.assertNotEqual(p.returncode, 0)
            self.assertIn(part, p.stdout.decode())
        self.assertEqual(len(self.c.info().ranks), 2)

    # -- what a call may not be, over TLS as without --

    def test_oversized_message_and_unknown_model(self):
        channel = self.c.secure("tls", credentials())
        self.refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "65536", self.c.ask, channel, prompt="x" * 70000)
        self.refused(grpc.StatusCode.NOT_FOUND, "model: ", self.c.ask, channel, model="other")
        self.refused(grpc.StatusCode.INVALID_ARGUMENT, "sampling.top_p: ", self.c.ask, channel, top_p=2)
        self.served(channel, model="demo-model")

    # -- rotation --

    def test_rotation_while_serving(self):
        running = self.c.secure("mtls", credentials(cert="client"))
        self.served(running)
        stop, failures = threading.Event(), []

        def load():
            while not stop.is_set():
                try:
                    self.c.ask(running)
                except grpc.RpcError as e:
                    failures.append(e)
        thread = threading.Thread(target=load)
        thread.start()
        try:
            put("live-server.pem", read("expired.pem"))  # half, and of no use: nothing changes
            self.served(self.c.secure("mtls", credentials(cert="client")))
            put("live-server.key", read("expired.key"))
            self.served(self.c.secure("mtls", credentials(cert="client")))
            self.assertIn("expired on ", self.c.log())
            self.assertIn("stay in use", self.c.log())
            put("live-server.key", read("stranger.key"))
            put("live-server.pem", read("stranger.pem"))
            put("live-ca.pem", read("ca.pem") + read("other-ca.pem"))
            for client in ("client", "stranger"):
                self.served(self.c.secure("mtls", credentials("other-ca", client)))
            self.refused(grpc.StatusCode.UNAVAILABLE, "certificate verify failed", self.c.ask,
                         self.c.secure("mtls", credentials("ca", "client")))
            put("token", f"# rotated\n{NEW_TOKEN}\n{TOKEN}\n")
            channel = self.c.secure("token")
            new = [("authorization", "Bearer " + NEW_TOKEN)]

            def taken():
                try:
                    return bool(self.c.ask(channel, metadata=new).ids)
                except grpc.RpcError as e:
                    self.assertEqual(e.code(), grpc.StatusCode.UNAUTHENTICATED)
            wait_for("the new token", taken, 5)
            self.served(channel, metadata=[("authorization", "Bearer " + TOKEN)])
        finally:
            stop.set()
            thread.join()
            put("live-server.key", read("server.key"))
            put("live-server.pem", read("server.pem"))
            put("live-ca.pem", read("ca.pem"))
            put("token", TOKEN + "\n")
        self.assertEqual(failures, [])
        self.served(self.c.secure("mtls", credentials(cert="client")))

    # -- connections --

    def test_pinging_too_often_is_ended(self):
        eager = grpc.insecure_channel(self.c.address, [
            ("grpc.use_local_subchannel_pool", 1), ("grpc.keepalive_time_ms", 50), ("grpc.http2.max_pings_without_data", 0),
            ("grpc.http2.min_time_between_pings_ms", 50), ("grpc.keepalive_permit_without_calls", 1)])
        self.c.channels.append(eager)
        watch = eager.unary_stream("/grpc.health.v1.Health/Watch", health_pb2.HealthCheckRequest.SerializeToString,
                                   health_pb2.HealthCheckResponse.FromString)
        self.refused(grpc.StatusCode.UNAVAILABLE, "oo many pings", lambda: list(
            watch(health_pb2.HealthCheckRequest(), timeout=30 * SLOW)))

    # -- the command and the library --

    def test_command(self):
        mtls = ["--address", self.c.at["both"], "--tls-ca", path("ca.pem"), "--tls-cert", path("client.pem"),
                "--tls-key", path("client.key"), "--token-file", path("token")]
        rc, out, err = tandem("generate", *mtls, "--greedy", "--max-tokens", 8, "--print-ids", "Once upon a time")
        self.assertEqual((rc, err), (0, ""))
        plain = tandem("generate", "--address", self.c.address, "--greedy", "--max-tokens", 8, "--print-ids",
                       "Once upon a time")
        self.assertEqual(out, plain[1])
        self.assertEqual(tandem("probe", *mtls)[:2], (0, "SERVING\n"))
        self.assertEqual(tandem("probe", "--address", self.c.at["health"])[:2], (0, "SERVING\n"))
        put("wrong-token", "not-the-token-0123456789")
        for args, code, part in (
                (mtls[:4], 3, "demand a client certificate (tls-cert)"),
                (["--address", self.c.at["tls"]], 3, "does the server expect TLS (tls-ca)?"),
                (["--address", self.c.at["tls"], "--tls-ca", path("other-ca.pem")], 3, "was not signed by tls-ca"),
                (["--address", self.c.at["tls"], "--tls-ca", path("ca.pem"), "--tls-server-name", "elsewhere.test"], 3,
                 "tls-server-name"),
                (["--address", self.c.at["token"]], 1, "authorization: no such header"),
                (["--address", self.c.at["token"], "--token-file", path("wrong-token")], 1, "authorization: not a token"),
                (["--address", self.c.at["tls"], "--tls-ca", path("none.pem")], 1, "none.pem: No such file"),
                (["--address", self.c.at["mtls"], "--tls-ca", path("ca.pem"), "--tls-cert", path("expired.pem"),
                  "--tls-key", path("expired.key")], 1, "expired.pem: the certificate of /CN=expired expired on 20")):
            rc, out, err = tandem("generate", *args, "x")
            self.assertEqual((rc, out), (code, ""), (args, err))
            self.assertIn(part, err)

    def test_library_example_runs_and_is_in_the_readme(self):
        program = os.path.join(os.path.dirname(TANDEM), "client_example")
        for args in ([self.c.address], [self.c.at["tls"], path("ca.pem")]):
            out = subprocess.run([program, args[0], "Once upon a time", *args[1:]], stdout=subprocess.PIPE, check=True,
                                 timeout=60 * SLOW).stdout.decode()
            self.assertRegex(out, r"\n\[64 tokens\]\n$")
        with open(os.path.join(SOURCE, "tests/client_example.c")) as f, \
                open(os.path.join(SOURCE, "proto/README.md")) as readme:
            self.assertIn(f.read(), readme.read())

    # -- reflection --

    def reflect(self, version, **question):
        call = self.c.channel.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
                                            reflection_pb2.ServerReflectionRequest.SerializeToString,
                                            reflection_pb2.ServerReflectionResponse.FromString)
        answers = list(call(iter([reflection_pb2.ServerReflectionRequest(**question)]), timeout=20 * SLOW))
        self.assertEqual(len(answers), 1)
        return answers[0]

    def pool_of(self, version, services):
        """What a generic client does: files by the services' names, imports among them, into a pool of its own."""
        pool, files = descriptor_pool.DescriptorPool(), {}
        for s in services:
            answer = self.reflect(version, file_containing_symbol=s)
            for data in answer.file_descriptor_response.file_descriptor_proto:
                f = descriptor_pb2.FileDescriptorProto.FromString(data)
                files[f.name] = f

        def add(name):
            f = files.pop(name, None)
            if f:
                for d in f.dependency:
                    add(d)
                pool.Add(f)
        for name in list(files):
            add(name)
        return pool

    def test_reflection_browse_and_call(self):
        for version in ("v1", "v1alpha"):
            services = [s.name for s in self.reflect(version, list_services="").list_services_response.service]
            self.assertEqual(services, sorted(["grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection",
                                               "grpc.reflection.v1alpha.ServerReflection", "tandem.v1.Control",
                                               "tandem.v1.Inference"]))
            pool = self.pool_of(version, services)
            factory = message_factory.MessageFactory(pool)
            for s in services:  # every method that is described is served
                for m in pool.FindServiceByName(s).methods:
                    if m.name in ("Drain", "Watch", "ServerReflectionInfo"):
                        continue
                    call = self.c.channel.unary_stream(f"/{s}/{m.name}", bytes, bytes)
                    try:
                        list(call(b"", timeout=20 * SLOW))
                    except grpc.RpcError as e:
                        self.assertNotEqual(e.code(), grpc.StatusCode.UNIMPLEMENTED, m.full_name)
            method = pool.FindServiceByName("tandem.v1.Inference").FindMethodByName("Generate")
            call = self.c.channel.unary_stream(GENERATE, lambda r: r.SerializeToString(),
                                               factory.GetPrototype(method.output_type).FromString)
            message = factory.GetPrototype(method.input_type)(text="Once upon a time")
            message.stopping.max_tokens = 5
            self.assertEqual(sum(len(m.token_ids) for m in call(message, timeout=20 * SLOW)), 5)

    def test_reflection_finds_every_name(self):
        call = self.c.channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
                                            reflection_pb2.ServerReflectionRequest.SerializeToString,
                                            reflection_pb2.ServerReflectionResponse.FromString)
        names = {}

        def walk(scope, m):
            names[f"{scope}.{m.name}"] = f.name
            for part in [*m.field, *m.oneof_decl]:
                names[f"{scope}.{m.name}.{part.name}"] = f.name
            for e in m.enum_type:
                enum(f"{scope}.{m.name}", e)
            for n in m.nested_type:
                walk(f"{scope}.{m.name}", n)

        def enum(scope, e):
            names[f"{scope}.{e.name}"] = f.name
            for v in e.value:
                names[f"{scope}.{v.name}"] = f.name
        files = {}
        for s in ("tandem.v1.Inference", "tandem.v1.Control", "grpc.health.v1.Health",
                  "grpc.reflection.v1.ServerReflection"):
            for data in self.reflect("v1", file_containing_symbol=s).file_descriptor_response.file_descriptor_proto:
                f = descriptor_pb2.FileDescriptorProto.FromString(data)
                files[f.name] = data
                for m in f.message_type:
                    walk(f.package, m)
                for e in f.enum_type:
                    enum(f.package, e)
                for v in f.service:
                    names[f"{f.package}.{v.name}"] = f.name
                    for m in v.method:
                        names[f"{f.package}.{v.name}.{m.name}"] = f.name
        self.assertGreater(len(names), 150)
        questions = [reflection_pb2.ServerReflectionRequest(file_containing_symbol=n) for n in names]
        for (name, file), answer in zip(names.items(), call(iter(questions), timeout=60 * SLOW)):
            self.assertEqual(answer.original_request.file_containing_symbol, name)
            self.assertEqual(answer.file_descriptor_response.file_descriptor_proto[0], files[file], name)
        for name, data in files.items():
            answer = self.reflect("v1", file_by_filename=name)
            self.assertEqual(answer.file_descriptor_response.file_descriptor_proto[0], data)

    def test_reflection_answers_what_is_not_there(self):
        for version in ("v1", "v1alpha"):
            for question in (dict(file_by_filename="no.proto"), dict(file_containing_symbol="no.Such"),
                             dict(file_containing_symbol="tandem.v1.WorkerControl"),  # the inner service is not public
                             dict(file_containing_extension=dict(containing_type="tandem.v1.Load", extension_number=7)),
                             dict(all_extension_numbers_of_type="no.Such")):
                answer = self.reflect(version, host="h", **question)
                self.assertEqual(answer.error_response.error_code, grpc.StatusCode.NOT_FOUND.value[0], question)
                self.assertIn(next(iter(question)), answer.error_response.error_message)
                self.assertEqual(answer.valid_host, "h")
            none = self.reflect(version, all_extension_numbers_of_type="tandem.v1.Load")
            self.assertEqual(none.all_extension_numbers_response.base_type_name, "tandem.v1.Load")
            self.assertEqual(list(none.all_extension_numbers_response.extension_number), [])
        channel = self.c.secure("token")  # behind a token, too
        call = channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
                                     reflection_pb2.ServerReflectionRequest.SerializeToString,
                                     reflection_pb2.ServerReflectionResponse.FromString)
        self.refused(grpc.StatusCode.UNAUTHENTICATED, "authorization", lambda: list(call(iter([]), timeout=20 * SLOW)))


class Options(unittest.TestCase):
    """What the coordinator says of options before it serves."""

    def start(self, *args):
        p = subprocess.run([os.path.join(os.path.dirname(TANDEM), "tandem-coordinator"), "--model", DEMO, "--listen",
                            "127.0.0.1:0", "--control-listen", f"unix:{path('control')}", *args],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60 * SLOW)
        return p.returncode, p.stderr.decode()

    def test_wrong_options_are_named(self):
        cert, key = ["--tls-cert", path("server.pem")], ["--tls-key", path("server.key")]
        for args, code, part in (
                (cert, 2, "--tls-key: not given"), (key, 2, "--tls-cert: not given"),
                (["--tls-client-ca", path("ca.pem")], 2, "--tls-client-ca: needs"),
                (["--listen", "127.0.0.1:0,mtls", *cert, *key], 2, '"mtls" needs --tls-client-ca'),
                (["--listen", "127.0.0.1:0,token"], 2, '"token" needs --token-file'),
                (["--listen", "127.0.0.1:0,tsl"], 2, '"tsl": expected plain, tls'),
                (["--control-listen", "127.0.0.1:0,tls", *cert, *key], 2, '"tls" needs --control-tls-cert'),
                (["--control-listen", "127.0.0.1:0,health"], 2, "is for --listen"),
                (["--reflection", "maybe"], 2, "--reflection: maybe, expected on or off"),
                ([*cert, "--tls-key", path("client.key")], 1, "client.key: is not the key of tls-cert"),
                ([*cert, "--tls-key", path("none.key")], 1, "none.key: No such file"),
                (["--tls-cert", path("expired.pem"), "--tls-key", path("expired.key")], 1, "expired on 20"),
                ([*cert, *key, "--tls-client-ca", path("server.key")], 1, "tls-client-ca"),
                (["--token-file", path("none")], 1, "token-file"),
                (["--control-tls-cert", path("expired.pem"), "--control-tls-key", path("expired.key")], 1,
                 "--control-listen")):
            rc, err = self.start(*args)
            self.assertEqual(rc, code, (args, err))
            self.assertIn(part, err)
            self.assertEqual(err.count("\n"), 1, err)


if __name__ == "__main__":
    unittest.main(verbosity=2)
