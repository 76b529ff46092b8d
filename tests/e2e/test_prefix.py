"""Requests that begin alike: one copy of the common tokens, the same answers, the first token sooner, nothing between tenants.

TANDEM_PREFIX_REQUESTS: how many are compared with a server that shares nothing; 64 by hand, for the figures in
tests/README.md (they are printed).
"""
import os
import random
import statistics
import unittest

import grpc

from cluster import Cluster, Result, request, wait_for

COMPARED = int(os.environ.get("TANDEM_PREFIX_REQUESTS", "6"))
PREFIX, TAIL, NEW = 900, 20, 8
# Of the demo model on the host: 4 layers, K and V, 3 heads, 32 floats.
TOKEN_BYTES, PAGE = 3072, 16384
BLOCK = -(-PAGE // TOKEN_BYTES)  # tokens that are looked up together: what fills a page
ARGS = ["--page-size", PAGE, "--max-slots", 72]


def pages(tokens):
    return -(-tokens * TOKEN_BYTES // PAGE)


def full_pages(tokens):
    return tokens * TOKEN_BYTES // PAGE


def ids(n, seed):
    return random.Random(seed).choices(range(3, 2000), k=n)


def prompt(k):
    """The common prefix and a tail of its own."""
    return ids(PREFIX, 0) + [3 + k] + ids(TAIL - 1, 1 + k)


def options(k):
    """Greedy and sampled ones in turn."""
    return dict(max_tokens=NEW, ignore_eos=True, temperature=0.8 * (k % 2), seed=k, logprobs=2)


class Answer(Result):
    def __init__(self, stream):
        self.scores = []

        def keep(messages):
            for m in messages:
                self.scores += [(s.token_id, round(s.logprob, 3)) for s in m.logprobs]
                yield m
        super().__init__(keep(stream))
        self.ttft_ms = (self.finish.timing.queue_us + self.finish.timing.prefill_us) / 1000
        self.cached = self.finish.usage.cached_prompt_tokens


def ask_all(c, n):
    """The first one fills the cache, the others come at once."""
    first = Answer(c.generate(prompt(0), **options(0)))
    streams = [c.generate(prompt(k), **options(k)) for k in range(1, n)]
    return [first] + [Answer(s) for s in streams]


class OnePrefix(unittest.TestCase):
    def test_memory_answers_and_time(self):
        n = 64
        one = pages(PREFIX + TAIL + NEW - 1)
        own = one - full_pages(PREFIX)  # the rest of a page of the prefix, tail and answer
        # Room to grow is asked for at each admission, and nothing else: without sharing 3 requests fit.
        spare = pages(n * NEW)
        with Cluster(args=[*ARGS, "--kv-memory", (one + (n - 1) * own + spare) * PAGE]) as c:
            shared = ask_all(c, n)
            load = c.load()
            c.wait_idle()
            self.assertEqual([a.cached for a in shared], [0] + [PREFIX // BLOCK * BLOCK] * (n - 1))
            # All 64 are kept, in the memory of one and 63 tails.
            self.assertEqual((load.kept_slots, load.kept_pages), (n, one + (n - 1) * own))
            self.assertEqual(load.shared_pages, full_pages(PREFIX))
            # The coordinator counts what the rank's pool has mapped.
            self.assertEqual((load.kv.mapped_pages, load.kv.shared_pages), (load.kept_pages, load.shared_pages))
            self.assertEqual(load.kv.wasted_bytes, n * (one * PAGE - (PREFIX + TAIL + NEW - 1) * TOKEN_BYTES))
            self.assertEqual((load.cache_hits, load.cached_tokens), (n - 1, (n - 1) * PREFIX))
            self.assertEqual((load.preemptions, load.cache_evictions), (0, 0))
            self.assertEqual(load.prompt_tokens, n * (PREFIX + TAIL))
        with Cluster(args=[*ARGS, "--prefix-cache", "off"]) as c:
            alone = ask_all(c, COMPARED)
            load = c.load()
            self.assertEqual((load.kept_slots, load.kept_pages, load.cache_hits, load.cached_tokens), (0, 0, 0, 0))
        for a, b in zip(shared, alone):
            self.assertEqual(a.ids, b.ids)
            self.assertEqual(a.scores, b.scores)
            self.assertEqual((len(a.ids), b.cached), (NEW, 0))
        on, off = (statistics.median(a.ttft_ms for a in answers[1:COMPARED]) for answers in (shared, alone))
        print(f"median time to the first token of {COMPARED - 1} at once: {on:.0f} ms of {n - 1} with the prefix cache, "
              f"{off:.0f} ms without")
        self.assertLess(on, off)


class Tenants(unittest.TestCase):
    """One server; a prompt of its own for each test."""

    @classmethod
    def setUpClass(cls):
        cls.cluster = Cluster(args=ARGS)
        cls.cluster.__enter__()

    @classmethod
    def tearDownClass(cls):
        cls.cluster.wait_idle()
        cls.cluster.__exit__(None, None, None)

    def cached(self, tokens, salt="", no_read=False, no_write=False, **more):
        r = request(tokens, max_tokens=2, temperature=0, **more)
        r.prefix_cache.salt = salt
        r.prefix_cache.no_read = no_read
        r.prefix_cache.no_write = no_write
        self.answer = self.cluster.run(r)
        return self.answer.finish.usage.cached_prompt_tokens

    def test_salts_share_nothing(self):
        tokens = ids(120, 70)
        n = (120 - 1) // BLOCK * BLOCK  # at least one row is computed: the one that is sampled
        self.assertEqual(self.cached(tokens, "a"), 0)
        self.assertEqual(self.cached(tokens, "b"), 0)
        self.assertEqual(self.cached(tokens), 0)
        for salt in ("a", "b", ""):
            self.assertEqual(self.cached(tokens, salt), n)
        self.assertEqual(self.cached(tokens, "a\0"), 0)
        self.assertEqual(self.cached(tokens, "x" * 256), 0)
        with self.assertRaises(grpc.RpcError) as e:
            self.cached(tokens, "x" * 257)
        self.assertEqual(e.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
        self.assertEqual(e.exception.details(), "prefix_cache.salt: 257 bytes, expected at most 256")

    def test_each_request_can_stay_out(self):
        tokens = ids(120, 71)
        self.assertEqual(self.cached(tokens, no_write=True), 0)
        self.assertEqual(self.cached(tokens), 0)  # nothing was kept
        self.assertGreater(self.cached(tokens), 0)
        self.assertEqual(self.cached(tokens, no_read=True), 0)

    def test_what_needs_every_row_computes_it(self):
        tokens = ids(120, 72)
        self.cached(tokens)
        usual = self.answer.ids
        self.assertEqual(self.cached(tokens, prompt_logprobs=1), 0)
        self.assertEqual(self.answer.ids, usual)
        self.assertEqual(self.cached(tokens, repetition_penalty=1.3), 0)
        self.assertEqual(self.cached(tokens, presence_penalty=0.5), 0)
        self.assertGreater(self.cached(tokens, min_tokens=2, logit_bias={7: 1.0}), 0)

    def test_a_chat_goes_on_where_it_was(self):
        """The answer is in the cache, too: the next turn computes only what is new."""
        tokens = ids(60, 73)
        first = self.cluster.run(tokens, max_tokens=30, temperature=0, ignore_eos=True)
        second = tokens + first.ids + ids(10, 74)
        self.assertEqual(self.cached(second), (60 + 30 - 1) // BLOCK * BLOCK)
        self.assertEqual(self.cached(second[:70]), (70 - 1) // BLOCK * BLOCK)


class Pressure(unittest.TestCase):
    def test_the_oldest_goes_first_and_answers_stay_right(self):
        # 80 pages, 18 prompts of 23 pages each; the first is asked for again and again.
        asked = [ids(120, 100 + k % 6 * (k % 3 > 0)) for k in range(18)]
        with Cluster(args=["--page-size", PAGE, "--prefix-cache", "off"]) as c:
            expected = {tuple(p): c.run(p, max_tokens=NEW, temperature=0, ignore_eos=True).ids
                        for p in {tuple(p) for p in asked}}
        with Cluster(args=["--page-size", PAGE, "--kv-memory", 80 * PAGE]) as c:
            hits = 0
            for p in asked:
                r = c.run(p, max_tokens=NEW, temperature=0, ignore_eos=True)
                self.assertEqual(r.ids, expected[tuple(p)])
                cached = r.finish.usage.cached_prompt_tokens
                hits += cached > 0
                if p == asked[0] and p is not asked[0]:
                    self.assertGreater(cached, 0)
            self.assertGreater(c.load().cache_evictions, 0)
            self.assertEqual(c.load().cache_hits, hits)
            # All at once: more than there is room for.
            streams = [c.generate(p, max_tokens=3 * NEW, temperature=0, ignore_eos=True) for p in asked]
            for p, s in zip(asked, streams):
                self.assertEqual(Result(s).ids[:NEW], expected[tuple(p)])
            wait_for("idle", c.idle)


if __name__ == "__main__":
    unittest.main()
