#!/usr/bin/env python3
"""Attention of hybrid batches on a GPU: ours, by every policy, against PyTorch's FlashAttention and cuDNN.

    tests/bench/bench_attention.py [--out DIR] [--seconds N] [--set NAME,...] [--case REGEX] [--only REGEX] [--rounds N]
                                   [--one-piece] [--flex] [--flashinfer] [--power MS] [--once] [--lib FILE] [--build FILE]

Builds the back ends with nvcc (or takes --lib), then measures in one process: every contender is a CUDA graph over as many
layers as make 2 GB of distinct KV or more, on the same random token-major KV: 32 layers side by side, or as many as memory
allows, in as many buffers as that takes (a chunk of 128: 128 buffers); dense is one layer, likewise. Replays take turns.
Prints a table; writes attention.csv and attention.svg to DIR. Needs PyTorch with NumPy; needs no model and no network.
Quantiles are of the rounds, linear between two of them: with few, p10 and p90 are near the least and the greatest. The plan,
once per step in a server, is not in the graphs (bench_attention_gpu has it in them, and times it alone).

"apart" is auto with one graph for all batches (ATTN_WAY_APART), as a caller has it who does not choose a way.

With --flex PyTorch's FlexAttention is a contender for decodes, compiled for each shape: seconds for each, so not for sweeps. Needs
Triton and a C compiler.

With --flashinfer the package of that name is a contender: "prefill" by its FlashAttention-3 kernel, "decode" by its batch wrapper,
with tensor cores where a group has more than one head, by the back end that it takes by itself and ("flashinfer-fa2") by the older one,
"pod" and "batch" (BatchAttention, persistent) for both sides at once, pod for one chunk only. KV is one layer by itself then, for all
contenders, as some of its strides are 32 bits; pages are of 16 tokens (8 where lengths want it), in order. Its pod clears a counter
outside of the stream that a graph is made of, and a graph of it computes nothing the second time: so pod is no graph, but launches that
wait for the GPU while the host makes them.

KV is in pages, as tandem's pool has it: 2 MiB each, made one by one and mapped in that order into one range. The range is kept
and only grows; a batch takes its front. With --one-piece KV is what torch.empty returns.

--case measures only cases whose name has a match, --only only contenders whose name has one ("sm90 prefill", "sm90 serial",
"fa2 decode"). The best pair is of those that are left then, and none where a side has none; a comparison of results needs both.

With --power each contender is then replayed without a pause for MS, and a line says what it draws; also in power.csv: us and mJ
per layer, watts, the SMs' clock, and in what share of the clock's samples which reason held the clock down. Watts are by NVML's
energy counter, from one of its steps to another, 20 to 100 ms apart: take 1000 or more. The clock is what the driver says, each
10 ms. The first fifth of MS is left out, in which the clock settles.

With --once nothing is timed: each contender runs layer 0 once to warm up, then once between cudaProfilerStart and
cudaProfilerStop, without a graph (ncu --profile-from-start off).

The best serial pair is of the fastest prefill and the fastest decode of all contenders that compute what is asked: cuDNN has no
causal mask at the lower right here, so its prefill counts only where each chunk is its whole context ("no mask" else).

Sets: alone (prefill and decode by themselves), small (steps that are all latency), layout (token-major against dense),
paper (C0 to C2, Table 8 and Figure 6 of POD-Attention), mixed (FlashInfer's mixed batches), sweep (POD-Attention's models,
chunks and contexts). limit is max(FLOP / 790e12, bytes of KV / 4.3e12).
"""
import argparse
import collections
import csv
import ctypes
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import types

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
D = 128
PEAK_FLOPS, PEAK_BYTES = 790e12, 4.3e12
MODELS = {  # query heads, KV heads of a rank
    "L3-8B TP1": (32, 8), "L3-8B TP2": (16, 4), "L3-8B TP4": (8, 2),
    "Yi-6B TP1": (32, 4), "Yi-6B TP2": (16, 2), "L2-7B TP1": (32, 32),
}
KV_BYTES = 100 << 30  # what a measurement may take
DISTINCT = 2 << 30
PAGE = 2 << 20
QUEUED_MS = 30  # of replays that wait while power is measured: asking the driver makes no pause
SAMPLE_MS = 10


# ---- the library ----

class Seq(ctypes.Structure):
    _fields_ = [("k", ctypes.c_void_p), ("v", ctypes.c_void_p), ("first_row", ctypes.c_uint32),
                ("rows", ctypes.c_uint32), ("kv_len", ctypes.c_uint32)]


class Config(ctypes.Structure):
    _fields_ = [("ops", ctypes.c_void_p), ("device", ctypes.c_int), ("dtype", ctypes.c_int),
                ("heads", ctypes.c_uint32), ("kv_heads", ctypes.c_uint32), ("head_dim", ctypes.c_uint32),
                ("scale", ctypes.c_float), ("soft_cap", ctypes.c_float), ("window", ctypes.c_uint32),
                ("token_stride", ctypes.c_uint64), ("head_stride", ctypes.c_uint64),
                ("max_seqs", ctypes.c_uint32), ("max_rows", ctypes.c_uint32), ("max_kv_len", ctypes.c_uint32),
                ("max_kv_tokens", ctypes.c_uint64), ("fixed_split_keys", ctypes.c_uint32),
                ("batch_invariant", ctypes.c_bool), ("policy", ctypes.c_int)]


class Step(ctypes.Structure):
    _fields_ = [("seq", ctypes.c_void_p), ("counts", ctypes.c_void_p), ("max_seqs", ctypes.c_uint32),
                ("max_rows", ctypes.c_uint32), ("max_seq_rows", ctypes.c_uint32), ("way", ctypes.c_int),
                ("stream", ctypes.c_void_p)]


class Io(ctypes.Structure):
    _fields_ = [("q", ctypes.c_void_p), ("out", ctypes.c_void_p), ("q_row_stride", ctypes.c_uint64),
                ("out_row_stride", ctypes.c_uint64), ("kv_offset", ctypes.c_uint64)]


class Status(ctypes.Structure):
    _fields_ = [("code", ctypes.c_int), ("message", ctypes.c_char * 512)]


def check_fields():
    """What is written out above has the members of attention.h, in its order."""
    with open(os.path.join(ROOT, "attention", "attention.h")) as f:
        header = re.sub(r"/\*.*?\*/", "", f.read(), flags=re.S)
    for ours, name in ((Seq, "attn_seq"), (Config, "attn_gpu_config"), (Step, "attn_gpu_step"), (Io, "attn_gpu_io")):
        body = re.search(r"struct " + name + r" \{(.*?)\};", header, re.S).group(1)
        members = [m for line in body.split(";") if line.strip()
                   for m in re.findall(r"(\w+)\s*(?:,|$)", line.strip())]
        fields = [f[0] for f in ours._fields_]
        if members != fields:
            sys.exit(f"bench_attention.py: struct {name} has {members}, {ours.__name__} here {fields}")


def check_sizes():
    """Every case computes on 2 GB of KV or more, and all of it fits."""
    for group, name, _, hk, chunks, decodes, layers in cases(SETS):
        tokens = sum(n for _, n in chunks) + sum(decodes)
        layer = tokens * 2 * hk * D * 2
        beside, buffers, used = layers_of(tokens, hk, layers)
        if used * layer < DISTINCT or used > beside * buffers or beside * buffers * layer > KV_BYTES + DISTINCT:
            sys.exit(f"bench_attention.py: {group}, {name}: {used} layers of {layer} bytes in {buffers} buffers of {beside}")


BF16 = 1
SETS = ("alone", "small", "layout", "paper", "mixed", "sweep")
OURS = ("auto", "apart", "fused")  # one call for both sides: what is compared with the best serial pair
POLICIES = {"fused": 1, "serial": 2, "streams": 3, "auto": 0, "apart": 0}
ALWAYS_APART = 0


def build(path):
    """The back ends as a shared library, for Hopper; sources are compiled side by side."""
    folder = os.path.join(ROOT, "attention")
    names = sorted(os.listdir(folder))
    sm90 = [n for n in names if n.startswith("attention_sm90") and n.endswith(".cu")]
    sources = [os.path.join(folder, n) for n in names if n.endswith(".cu")]
    sources += [os.path.join(folder, n) for n in ("attention_gpu.c", "attention_pick.c")]
    sources.append(os.path.join(ROOT, "proto", "status.c"))
    with tempfile.TemporaryDirectory() as temp:
        jobs = []
        for i, s in enumerate(sources):
            arch = "90a" if os.path.basename(s) in sm90 else "90"
            command = ["nvcc", "-O2", "-lineinfo", "-I", ROOT, "-Xcompiler", "-fPIC", "-D_GNU_SOURCE",
                       "-gencode", f"arch=compute_{arch},code=sm_{arch}", "-c", s, "-o", f"{temp}/{i}.o"]
            if s.endswith(".cu"):
                command += ["-std=c++17"]
            if sm90:
                command += ["-DTANDEM_ATTENTION_SM90"]
            jobs.append(subprocess.Popen(command))
        if any([j.wait() for j in jobs]):
            sys.exit("bench_attention.py: nvcc failed")
        objects = [f"{temp}/{i}.o" for i in range(len(sources))]
        subprocess.run(["nvcc", "-shared", "-cudart", "static", "-o", path] + objects, check=True)


class Library:
    def __init__(self, path):
        self.c = ctypes.CDLL(path)
        table = (ctypes.c_void_p * 16).in_dll(self.c, "attn_gpu_back_ends")
        self.back_ends = []
        for ops in table:
            if not ops:
                break
            name = ctypes.cast(ops, ctypes.POINTER(ctypes.c_char_p))[0].decode()  # the table's first field
            self.back_ends.append((name, ops))

    def must(self, name, *args):
        st = Status()
        if getattr(self.c, name)(*args, ctypes.byref(st)):
            raise RuntimeError(st.message.decode())


# ---- the driver ----

class Location(ctypes.Structure):  # this and the next three as in cuda.h
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class AllocFlags(ctypes.Structure):
    _fields_ = [("compression_type", ctypes.c_ubyte), ("gpu_direct_rdma_capable", ctypes.c_ubyte),
                ("usage", ctypes.c_ushort), ("reserved", ctypes.c_ubyte * 4)]


class AllocationProp(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("requested_handle_types", ctypes.c_int), ("location", Location),
                ("win32_handle_meta_data", ctypes.c_void_p), ("alloc_flags", AllocFlags)]


class AccessDesc(ctypes.Structure):
    _fields_ = [("location", Location), ("flags", ctypes.c_int)]


ADDRESS, INT, U64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64
CUDA_CALLS = {
    "cuCtxGetDevice": [ADDRESS], "cuDeviceGetPCIBusId": [ADDRESS, INT, INT],
    "cuMemGetAllocationGranularity": [ADDRESS, ADDRESS, INT], "cuMemAddressReserve": [ADDRESS, U64, U64, U64, U64],
    "cuMemCreate": [ADDRESS, U64, ADDRESS, U64], "cuMemRelease": [U64], "cuMemMap": [U64, U64, U64, U64, U64],
    "cuMemUnmap": [U64, U64], "cuMemSetAccess": [U64, U64, ADDRESS, U64],
}
NVML_CALLS = {
    "nvmlInit_v2": [], "nvmlDeviceGetHandleByPciBusId_v2": [ADDRESS, ADDRESS],
    "nvmlDeviceGetTotalEnergyConsumption": [ADDRESS, ADDRESS], "nvmlDeviceGetClockInfo": [ADDRESS, INT, ADDRESS],
}
REASON_CALLS = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
REASONS = {0x1: "idle", 0x2: "applications clocks", 0x4: "sw power cap", 0x8: "hw slowdown", 0x20: "sw thermal",
           0x40: "hw thermal", 0x80: "hw power brake"}


class Driver:
    """A library of the driver. A call that fails raises an error that names it."""

    def __init__(self, file, calls):
        self.c = ctypes.CDLL(file)
        for name, arguments in calls.items():
            getattr(self.c, name).argtypes = arguments

    def must(self, name, *args):
        rc = getattr(self.c, name)(*args)
        if rc:
            raise RuntimeError(f"{name} failed: {rc}")


class Cuda(Driver):
    def __init__(self, torch):
        super().__init__("libcuda.so.1", CUDA_CALLS)
        torch.cuda.init()
        torch.cuda.synchronize()  # the primary context is there, and current
        device = INT()
        self.must("cuCtxGetDevice", ctypes.byref(device))
        self.device = device.value


class Pages:
    """Memory as tandem's pool has it. It only grows; tensors are its front."""

    def __init__(self, torch, cuda):
        self.torch, self.cuda = torch, cuda
        here = Location(1, cuda.device)  # CU_MEM_LOCATION_TYPE_DEVICE
        self.prop = AllocationProp(type=1, location=here)  # CU_MEM_ALLOCATION_TYPE_PINNED
        self.access = AccessDesc(here, 3)  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        least, at = ctypes.c_size_t(), U64()
        cuda.must("cuMemGetAllocationGranularity", ctypes.byref(least), ctypes.byref(self.prop), 0)
        if least.value != PAGE:
            raise RuntimeError(f"least page of this driver: {least.value} bytes, expected {PAGE}")
        self.room = -(-(KV_BYTES + 2 * DISTINCT) // PAGE) * PAGE
        cuda.must("cuMemAddressReserve", ctypes.byref(at), self.room, PAGE, 0, 0)
        self.at, self.mapped = at.value, 0

    def grow(self, size):
        end, page = self.mapped, U64()
        try:
            while end < size:
                self.cuda.must("cuMemCreate", ctypes.byref(page), PAGE, ctypes.byref(self.prop), 0)
                try:
                    self.cuda.must("cuMemMap", self.at + end, PAGE, 0, page, 0)
                finally:
                    self.cuda.must("cuMemRelease", page)  # mapped, it lives on
                end += PAGE
            if end > self.mapped:
                self.cuda.must("cuMemSetAccess", self.at + self.mapped, end - self.mapped, ctypes.byref(self.access), 1)
        except RuntimeError:
            if end > self.mapped:
                self.cuda.must("cuMemUnmap", self.at + self.mapped, end - self.mapped)
            raise
        self.mapped = end

    def tensor(self, shape):
        size = math.prod(shape) * 2
        if size > self.room:
            raise RuntimeError(f"KV of {size} bytes: {self.room} are reserved")
        self.grow(size)
        front = types.SimpleNamespace(__cuda_array_interface__={
            "shape": shape, "typestr": "<i2", "data": (self.at, False), "version": 3})
        return self.torch.as_tensor(front, device=f"cuda:{self.cuda.device}").view(self.torch.bfloat16)


class Meter:
    """NVML, of the GPU that PyTorch runs on."""

    def __init__(self, cuda):
        self.nvml, self.device = Driver("libnvidia-ml.so.1", NVML_CALLS), ADDRESS()
        bus_id = ctypes.create_string_buffer(32)
        cuda.must("cuDeviceGetPCIBusId", bus_id, len(bus_id), cuda.device)
        self.nvml.must("nvmlInit_v2")
        self.nvml.must("nvmlDeviceGetHandleByPciBusId_v2", bus_id, ctypes.byref(self.device))
        self.energy_mj()
        self.sm_mhz()
        self.reasons_call = next((getattr(self.nvml.c, n) for n in REASON_CALLS if hasattr(self.nvml.c, n)), None)
        if self.reasons_call:
            self.reasons_call.argtypes = [ADDRESS, ADDRESS]

    def energy_mj(self):
        mj = U64()
        self.nvml.must("nvmlDeviceGetTotalEnergyConsumption", self.device, ctypes.byref(mj))
        return mj.value

    def sm_mhz(self):
        mhz = ctypes.c_uint()
        self.nvml.must("nvmlDeviceGetClockInfo", self.device, 1, ctypes.byref(mhz))  # NVML_CLOCK_SM
        return mhz.value

    def reasons(self):
        """A mask, None where the driver does not say."""
        mask = U64()
        if not self.reasons_call or self.reasons_call(self.device, ctypes.byref(mask)):
            return None
        return mask.value


# ---- a batch ----

def layers_of(tokens, kv_heads, layers):
    """Layers side by side, buffers of them, and layers that are computed: 2 GB or more. layers: 0: up to 32."""
    layer = tokens * 2 * kv_heads * D * 2
    layers = layers or max(1, min(32, KV_BYTES // layer))
    buffers = max(1, -(-DISTINCT // (layers * layer)))
    return layers, buffers, min(layers * buffers, max(1, -(-DISTINCT // layer)))


class Batch:
    """chunks: (rows, context) of prefills; decodes: lengths. KV token-major, `layers` side by side in each buffer."""

    def __init__(self, torch, heads, kv_heads, chunks, decodes, layers=0, pages=None):
        self.torch, self.heads, self.kv_heads = torch, heads, kv_heads
        self.chunks, self.decodes = chunks, decodes
        lengths = [context for _, context in chunks] + list(decodes)
        self.tokens = sum(lengths)
        self.layers, buffers, self.used = layers_of(self.tokens, kv_heads, layers)
        shape = (buffers, self.tokens, self.layers, 2, kv_heads, D)
        self.kv = pages.tensor(shape) if pages else torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        self.kv.normal_()
        self.rows = sum(r for r, _ in chunks) + len(decodes)
        self.q = torch.randn(self.rows, heads, D, dtype=torch.bfloat16, device="cuda")
        self.starts, at = [], 0
        for n in lengths:
            self.starts.append(at)
            at += n
        self.flops = sum(4 * heads * D * (c * (n - c) + c * (c + 1) / 2) for c, n in chunks)
        self.bytes = 4 * kv_heads * D * sum(decodes)
        self.prefill_rows = sum(r for r, _ in chunks)

    def at(self, l):
        """Buffer, and layer within it, of the l-th layer that is computed."""
        return divmod(l, self.layers)

    def sides(self):
        return [s for s, there in (("prefill", self.chunks), ("decode", self.decodes)) if there]


class Ours:
    """A back end with a policy, on the whole batch or one side of it; outputs stay in self.out."""

    def __init__(self, lib, ops, policy, batch, side="both"):
        torch = batch.torch
        self.lib, self.batch = lib, batch
        first, end = {"prefill": (0, batch.prefill_rows), "decode": (batch.prefill_rows, batch.rows)}.get(side, (0, batch.rows))
        self.rows = slice(first, end)
        seqs, row = [], 0
        base, token = batch.kv.data_ptr(), batch.kv.stride(1) * 2
        for i, (rows, n) in enumerate(batch.chunks + [(1, n) for n in batch.decodes]):
            k = base + batch.starts[i] * token
            if side == "both" or (side == "prefill") == (i < len(batch.chunks)):
                seqs.append(Seq(k, k + batch.kv_heads * D * 2, row, rows, n))
            row += rows
        config = Config(ops=ops, dtype=BF16, heads=batch.heads, kv_heads=batch.kv_heads, head_dim=D, scale=D ** -0.5,
                        token_stride=token, head_stride=D * 2, max_seqs=len(seqs), max_rows=row,
                        max_kv_len=max(s.kv_len for s in seqs), policy=POLICIES[policy])
        self.handle = ctypes.c_void_p()
        lib.must("attn_gpu_create", ctypes.byref(self.handle), ctypes.byref(config))
        raw = b"".join(bytes(s) for s in seqs)
        self.seq = torch.frombuffer(bytearray(raw), dtype=torch.uint8).cuda()
        self.count = torch.tensor([len(seqs)], dtype=torch.int32, device="cuda")
        self.out = torch.full_like(batch.q, float("nan"))
        way = ALWAYS_APART if policy == "apart" else lib.c.attn_gpu_choose(self.handle, raw, len(seqs))
        self.step = Step(self.seq.data_ptr(), self.count.data_ptr(), len(seqs), row, max(s.rows for s in seqs), way)

    def on_stream(self):
        self.step.stream = self.batch.torch.cuda.current_stream().cuda_stream
        return ctypes.byref(self.step)

    def plan(self):
        self.lib.must("attn_gpu_plan", self.handle, self.on_stream())

    def layer(self, l):
        b = self.batch
        buffer, l = b.at(l)
        io = Io(b.q.data_ptr(), self.out.data_ptr(), b.heads * D * 2, b.heads * D * 2,
                buffer * b.kv.stride(0) * 2 + l * 2 * b.kv_heads * D * 2)
        self.lib.must("attn_gpu_run", self.handle, self.on_stream(), ctypes.byref(io))

    def close(self):
        self.lib.c.attn_gpu_destroy(self.handle)


def compiled_flex(torch):
    """FlexAttention, compiled once for each shape that it gets."""
    import torch._dynamo
    from torch.nn.attention.flex_attention import flex_attention
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


class Torch:
    """PyTorch's FlashAttention ("fa2"), cuDNN or, for decodes, FlexAttention on one side. Decodes of equal length are one call; cuDNN has no lower-right
    causal mask here: chunks with a context run without one (a little more work, and not the right result)."""

    def __init__(self, batch, kind, side):
        self.batch, self.kind, self.side = batch, kind, side
        self.flex = compiled_flex(batch.torch) if kind == "flex" else None
        self.right = kind == "fa2" or side == "decode" or all(c == n for c, n in batch.chunks)
        self.out = batch.torch.empty_like(batch.q)

    def attend(self, q, k, v, causal):
        aten = self.batch.torch.ops.aten
        if self.flex:
            return self.flex(q, k, v, scale=D ** -0.5, enable_gqa=True)
        if self.kind == "fa2":
            return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=D ** -0.5)[0]
        return aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, 0.0, causal and self.right, False,
                                                        scale=D ** -0.5)[0]

    def layer(self, l):
        b = self.batch
        buffer, l = b.at(l)
        all_kv = b.kv[buffer]
        if self.side == "prefill":
            row = 0
            for i, (rows, n) in enumerate(b.chunks):
                kv = all_kv[b.starts[i]:b.starts[i] + n, l]
                k, v = (kv[:, s].transpose(0, 1).unsqueeze(0) for s in (0, 1))
                o = self.attend(b.q[row:row + rows].transpose(0, 1).unsqueeze(0), k, v, True)
                self.last = (row, rows, o)
                row += rows
            return
        first, row = len(b.chunks), b.prefill_rows
        lengths = list(b.decodes)
        while lengths:
            n = lengths[0]
            times = next((i for i, m in enumerate(lengths) if m != n), len(lengths))
            kv = all_kv[b.starts[first]:b.starts[first] + n * times]
            kv = kv.view(times, n, b.layers, 2, b.kv_heads, D)[:, :, l]
            k, v = (kv[:, :, s].transpose(1, 2) for s in (0, 1))
            o = self.attend(b.q[row:row + times].unsqueeze(2), k, v, False)
            self.last = (row, times, o)
            first, row, lengths = first + times, row + times, lengths[times:]

    def result(self):
        row, rows, o = self.last
        if self.side == "prefill":
            return row, rows, o[0].transpose(0, 1)
        return row, rows, o[:, :, 0]

    def close(self):
        pass


class FlashInfer(Torch):
    """FlashInfer on one side, or on both ("pod", "batch"). Plans are made once, outside of what is timed, as ours."""

    def __init__(self, batch, side, backend="auto"):
        import flashinfer
        torch, self.batch, self.side, self.right = batch.torch, batch, side, True
        self.eager = side == "pod"
        self.flashinfer = flashinfer
        self.page = math.gcd(16, *[n for _, n in batch.chunks], *batch.decodes)
        self.out = torch.empty_like(batch.q)
        self.work = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
        heads, layout = (batch.heads, batch.kv_heads, D, self.page), "NHD"
        bf16 = torch.bfloat16
        if side in ("decode", "pod"):
            if side == "pod" and len(batch.chunks) != 1:
                raise ValueError("FlashInfer's pod takes one chunk")
            first = len(batch.chunks)
            pages = self.pages_of(batch.starts[first:], batch.decodes)
            last = torch.full((len(batch.decodes),), self.page, dtype=torch.int32, device="cuda")
            if side == "pod":
                self.wrapper = flashinfer.PODWithPagedKVCacheWrapper(self.work, layout)
            else:
                self.wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                    self.work, layout, use_tensor_cores=batch.heads > batch.kv_heads, backend=backend)
            self.wrapper.plan(*pages, last, *heads, q_data_type=bf16, kv_data_type=bf16)
        elif side == "batch":
            lengths = [n for _, n in batch.chunks] + batch.decodes
            rows = [0]
            for n in [c for c, _ in batch.chunks] + [1] * len(batch.decodes):
                rows.append(rows[-1] + n)
            self.lse = torch.empty(batch.rows, batch.heads, dtype=torch.float32, device="cuda")
            self.wrapper = flashinfer.BatchAttention(layout)
            self.wrapper.plan(self.ints(rows), *self.pages_of(batch.starts, lengths), self.ints(lengths), *heads[:2], D, D,
                              self.page, causal=True, q_data_type=bf16, kv_data_type=bf16)

    def ints(self, values):
        return self.batch.torch.tensor(values, dtype=self.batch.torch.int32, device="cuda")

    def pages_of(self, starts, lengths):
        """(where each sequence's page numbers begin, page numbers)"""
        begin, pages = [0], []
        for start, n in zip(starts, lengths):
            pages += range(start // self.page, (start + n) // self.page)
            begin.append(len(pages))
        return self.ints(begin), self.ints(pages)

    def layer(self, l):
        b = self.batch
        buffer, l = b.at(l)
        k, v = b.kv[buffer][:, l, 0], b.kv[buffer][:, l, 1]
        paged = tuple(x.unflatten(0, (-1, self.page)) for x in (k, v))
        p = b.prefill_rows
        if self.side == "decode":
            self.wrapper.run(b.q[p:], paged, out=self.out[p:])
        elif self.side == "batch":
            self.wrapper.run(b.q, paged, out=self.out, lse=self.lse)
        elif self.side == "pod":
            n = b.chunks[0][1]
            self.parts = self.wrapper.run(b.q[:p], k[:n], v[:n], b.q[p:], paged, causal_p=True)
        else:
            row = 0
            for (rows, n), start in zip(b.chunks, b.starts):
                self.parts = (row, rows, self.flashinfer.single_prefill_with_kv_cache(
                    b.q[row:row + rows], k[start:start + n], v[start:start + n], causal=True, backend="fa3"))
                row += rows

    def result(self):
        b = self.batch
        if self.side == "decode":
            return b.prefill_rows, b.rows - b.prefill_rows, self.out[b.prefill_rows:]
        if self.side == "batch":
            return 0, b.rows, self.out
        if self.side == "pod":
            return 0, b.rows, b.torch.cat(self.parts)
        return self.parts


# ---- measuring ----

class Queued:
    """What stands for a graph where there can be none: launches, made while the GPU waits."""

    HOLD_CYCLES = 400_000  # for each layer: 200 us

    def __init__(self, torch, layer, layers):
        self.torch, self.layer, self.layers = torch, layer, layers

    def hold(self):
        self.torch.cuda._sleep(self.HOLD_CYCLES * self.layers)

    def replay(self):
        for l in range(self.layers):
            self.layer(l)


def capture(torch, fn):
    fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph


ORDER = random.Random(1)  # of contenders, another one in each round of each batch


def share_of(sorted_times, share):
    """A quantile, linear between two of the times."""
    at = share * (len(sorted_times) - 1)
    below = int(at)
    above = min(below + 1, len(sorted_times) - 1)
    return sorted_times[below] + (at - below) * (sorted_times[above] - sorted_times[below])


def contenders_of(lib, batch, only, flex=False, flashinfer=False):
    """{name: what makes it}; names "<back end> <policy>" and "<contender> <side>"."""
    contenders = {}
    for name, ops in lib.back_ends:
        if len(batch.sides()) == 2:
            for policy in ("auto", "fused", "serial", "streams", "apart"):
                contenders[f"{name} {policy}"] = lambda o=ops, p=policy: Ours(lib, o, p, batch)
        for side in batch.sides():
            contenders[f"{name} {side}"] = lambda o=ops, s=side: Ours(lib, o, "auto", batch, s)
    for kind in ("fa2", "cudnn"):
        for side in batch.sides():
            contenders[f"{kind} {side}"] = lambda k=kind, s=side: Torch(batch, k, s)
    if flex and batch.decodes:
        contenders["flex decode"] = lambda: Torch(batch, "flex", "decode")
    if flashinfer:
        for side in batch.sides() + (["pod", "batch"] if len(batch.sides()) == 2 else []):
            contenders[f"flashinfer {side}"] = lambda s=side: FlashInfer(batch, s)
        if batch.decodes and batch.heads > batch.kv_heads:
            contenders["flashinfer-fa2 decode"] = lambda: FlashInfer(batch, "decode", "fa2")
    return {n: make for n, make in contenders.items() if only.search(n)}


def once(torch, contenders):
    for name, make in contenders.items():
        try:
            x = make()
            if isinstance(x, Ours):
                x.plan()
            x.layer(0)
            torch.cuda.synchronize()
            print(f"  {name}", flush=True)
            torch.cuda.profiler.start()
            try:
                x.layer(0)
                torch.cuda.synchronize()
            finally:
                torch.cuda.profiler.stop()
            x.close()
        except RuntimeError as e:
            print(f"  {name}: {str(e).splitlines()[0][:110]}", flush=True)


def reasons_of(masks):
    """Each reason with the share of masks that have it."""
    masks = [m for m in masks if m is not None]
    if not masks:
        return "not known"
    shares = [(bit, sum(bool(m & bit) for m in masks) / len(masks)) for bit in (1 << i for i in range(64))]
    return "; ".join(f"{REASONS.get(bit, hex(bit))} {share * 100:.0f}%" for bit, share in shares if share) or "none"


def draw(torch, meter, graph, ms, us, layers):
    """us per layer, watts, MHz, mJ per layer, samples of the clock, reasons. us: what a layer takes, about."""
    depth = max(2, math.ceil(QUEUED_MS * 1e3 / (us * layers)))
    queue, first, last, replays = collections.deque(), None, None, 0
    steps, mj, clocks, masks = [], None, [], []
    begin = time.monotonic()
    settled, end = begin + 0.2 * ms * 1e-3, begin + ms * 1e-3
    sample = settled
    while True:
        while len(queue) < depth:
            graph.replay()
            queue.append(torch.cuda.Event(enable_timing=True))
            queue[-1].record()
        now = time.monotonic()
        if now >= end and replays:
            break
        while queue and queue[0].query():
            event = queue.popleft()
            if now < settled:
                continue
            if first is None:
                first = event
            else:
                last, replays = event, replays + 1
        if now >= settled:
            was, mj = mj, meter.energy_mj()
            if was is not None and was != mj:
                steps.append((time.monotonic(), mj))
        if now >= sample:
            clocks.append(meter.sm_mhz())
            masks.append(meter.reasons())
            sample = now + SAMPLE_MS * 1e-3
        time.sleep(5e-4)
    torch.cuda.synchronize()
    us = first.elapsed_time(last) * 1e3 / (replays * layers)
    watts = None
    if len(steps) > 1:
        watts = (steps[-1][1] - steps[0][1]) * 1e-3 / (steps[-1][0] - steps[0][0])
    return us, watts, sum(clocks) / len(clocks), watts and watts * us * 1e-3, len(clocks), reasons_of(masks)


def computing(ours, first, end):
    """The first of ours that computes these rows, or None."""
    return next((x for x in ours if x.rows.start <= first and end <= x.rows.stop), None)


def compare(lib, plain):
    """They all compute the same."""
    ours = [plain[f"{n} {p}"] for n, _ in lib.back_ends for p in ("fused", "auto", "serial", "streams", "apart", "prefill", "decode")
            if f"{n} {p}" in plain]
    for name, x in plain.items():
        if isinstance(x, Torch) and x.right:
            row, rows, o = x.result()
            ref = computing(ours, row, row + rows)
            if not ref:
                continue
            a, b = ref.out[row:row + rows].float(), o.float()
            error = float((a - b).norm() / b.norm())
            if not error < 1e-2:
                print(f"  {name}: differs from ours by {error:.3g}", flush=True)
    for name, x in plain.items():
        if isinstance(x, Ours):
            ref = computing(ours, x.rows.start, x.rows.stop)
            if ref is x:
                continue
            a, b = x.out[x.rows].float(), ref.out[x.rows].float()
            error = float((a - b).norm() / b.norm())
            if not error < 1e-2:
                sys.exit(f"{name}: differs from another of ours by {error:.3g}")


def measure(torch, contenders, lib, batch, rounds, meter, power_ms):
    """{name: (median, p10, p90, whether it computes what is asked)} in us per layer, and {name: draw's} with a meter."""
    graphs, times, alive, plain = {}, {}, [], {}
    for name, make in contenders.items():
        try:
            x = make()
            alive.append(x)
            if isinstance(x, Ours):
                x.plan()
            if getattr(x, "eager", False):
                graphs[name] = Queued(torch, x.layer, batch.used)
            else:
                graphs[name] = capture(torch, lambda: [x.layer(l) for l in range(batch.used)])
            x.layer(0)
            torch.cuda.synchronize()
            plain[name] = x
        except (RuntimeError, ValueError, ImportError) as e:
            print(f"  {name}: {str(e).splitlines()[0][:110]}", flush=True)
    compare(lib, plain)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    turns = list(graphs)
    for r in range(rounds + 2):
        ORDER.shuffle(turns)  # what a GPU at its power limit does depends on what came before
        for name in turns:
            if isinstance(graphs[name], Queued):
                graphs[name].hold()
            events[0].record()
            graphs[name].replay()
            events[1].record()
            events[1].synchronize()
            if r >= 2:
                times.setdefault(name, []).append(events[0].elapsed_time(events[1]) * 1e3 / batch.used)
    for t in times.values():
        t.sort()
    drawn = {n: draw(torch, meter, graphs[n], power_ms, share_of(t, 0.5), batch.used)
             for n, t in times.items()} if meter else {}
    graphs.clear()
    for x in alive:
        x.close()
    right = {n: not isinstance(x, Torch) or x.right for n, x in plain.items()}
    return {n: (share_of(t, 0.5), share_of(t, 0.1), share_of(t, 0.9), right[n]) for n, t in times.items()}, drawn


def balance(heads, kv_heads, chunk):
    """Decodes whose bytes take as long as the chunk's FLOP, at equal contexts."""
    return max(1, round(chunk * (heads / kv_heads) * PEAK_BYTES / PEAK_FLOPS))


def cases(wanted):
    """(set, name, heads, KV heads, chunks, decodes, layers)"""
    l3 = MODELS["L3-8B TP1"]
    if "alone" in wanted:
        for c, n in ((8192, 8192), (16384, 16384), (1024, 16384), (2048, 16384), (512, 16384)):
            yield ("alone", f"prefill {c} of {n}", *l3, [(c, n)], [], 0)
        for b, n in ((32, 8192), (64, 8192), (128, 4096), (16, 16384), (1, 131072), (4, 8192)):
            yield ("alone", f"decode {b} x {n}", *l3, [], [n] * b, 0)
    if "small" in wanted:
        yield ("small", "8 decodes of 1024", *l3, [], [1024] * 8, 32)
        yield ("small", "a chunk of 128", *l3, [(128, 128)], [], 32)
        yield ("small", "8 decodes of 1024, a chunk of 128", *l3, [(128, 128)], [1024] * 8, 32)
    if "layout" in wanted:
        for layers in (1, 32):
            side = "dense" if layers == 1 else f"{layers} layers side by side"
            yield ("layout", f"32 x 8192, {side}", *l3, [], [8192] * 32, layers)
            yield ("layout", f"2048 of 16384, {side}", *l3, [(2048, 16384)], [], layers)
    if "paper" in wanted:
        tp2 = MODELS["L3-8B TP2"]
        yield ("paper", "C0 1K of 12K, 80 x 12K", *tp2, [(1024, 12288)], [12288] * 80, 0)
        yield ("paper", "C1 12K of 12K, 220 x 12K", *tp2, [(12288, 12288)], [12288] * 220, 0)
        yield ("paper", "C2 16K of 16K, 250 x 12K", *tp2, [(16384, 16384)], [12288] * 250, 0)
        for i in (28, 29, 30, 31):
            yield ("paper", f"Table 8, chunk {i}", *l3, [(512, 512 * (i + 1))], [16384] * 64, 0)
        for b in (54, 55):
            for i in (0, 3, 7, 11, 15, 19, 23, 27, 31):
                yield ("paper", f"Figure 6, {b}, chunk {i}", *MODELS["Yi-6B TP1"], [(512, 512 * (i + 1))],
                       [16384] * b, 0)
    if "mixed" in wanted:
        for chunks, n in (([(512, 512)], 2048), ([(1536, 1536)], 2048), ([(2048, 2048)] * 2, 2048),
                          ([(2048, 2048)], 2048), ([(4096, 4096)], 4096), ([(4096, 4096)], 8192),
                          ([(6000, 7000)], 8192)):
            text = " + ".join(f"{c} of {k}" for c, k in chunks)
            yield ("mixed", f"{text}, 128 x {n}", *l3, chunks, [n] * 128, 0)
    if "sweep" in wanted:
        points = []
        for model, (h, hk) in MODELS.items():
            for chunk in (512, 1024, 2048):
                for context in (4096, 8192, 16384, 32768, 131072):
                    full = max(1, (90 << 30) // (32 * 2 * hk * D * 2) // context)  # of 32 layers in 90 GB
                    full = min(full, 256)  # decodes of a step
                    for b in sorted({min(balance(h, hk, chunk), full), min(3 * balance(h, hk, chunk), full), full}):
                        points.append(("sweep", f"{model}, {chunk} of {context}, {b} x {context}", h, hk,
                                       [(chunk, context)], [context] * b, 0))
        random.Random(1).shuffle(points)  # whatever the time allows is a fair sample
        yield from points


HEAD = ["set", "case", "contender", "us", "p10", "p90", "TFLOP/s", "TB/s", "of limit", "over our serial",
        "over best serial"]
POWER_HEAD = ["set", "case", "contender", "us", "W", "SM MHz", "mJ", "samples", "reasons"]


class Table:
    """A csv file, on disk row by row."""

    def __init__(self, folder, name, head):
        self.csv = csv.writer(open(os.path.join(folder, name), "w", 1, encoding="utf-8", newline=""), lineterminator="\n")
        self.add(head)

    def add(self, row):
        self.csv.writerow(["" if x is None else x if isinstance(x, str) else f"{x:.4g}" for x in row])


def best_of(got, side):
    """us of the fastest contender of a side that computes what is asked, or None."""
    return min((t[0] for n, t in got.items() if n.endswith(side) and t[3]), default=None)


def shown(name, right):
    return name + ("" if right else " (no mask)")


def rows_of(batch, got, back_ends):
    limit = max(batch.flops / PEAK_FLOPS, batch.bytes / PEAK_BYTES) * 1e6
    both = len(batch.sides()) == 2
    pair = None
    if both:
        sides = [best_of(got, side) for side in batch.sides()]
        pair = None if None in sides else sum(sides)
    out = []
    for name, (us, p10, p90, right) in got.items():
        whole = not both or name.split()[1] not in ("prefill", "decode")
        flops = batch.flops if whole or name.endswith("prefill") else 0
        size = batch.bytes if whole or name.endswith("decode") else 0
        of = limit if whole else max(flops / PEAK_FLOPS, size / PEAK_BYTES) * 1e6
        serial = got.get(f"{name.split()[0]} serial")
        out.append([shown(name, right), us, p10, p90, flops / us * 1e-6, size / us * 1e-6, of / us,
                    serial[0] / us if both and whole and serial else None,
                    pair / us if pair and whole else None])
    return out, pair


def plot(points, path):
    """Speed-up over the best serial pair, of ours and at the limit, a column per batch."""
    points = sorted(points, key=lambda p: p[1])
    width, height, top = 900, 360, 2.4
    def y(v):
        return height - 30 - min(v, top) / top * (height - 50)
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
           'font-size="11">', f'<rect width="{width}" height="{height}" fill="white"/>']
    for v in (0.5, 1.0, 1.5, 2.0):
        svg.append(f'<line x1="40" x2="{width - 10}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#ccc"/>'
                   f'<text x="8" y="{y(v) + 4:.1f}">{v:.1f}x</text>')
    for i, (name, bound, best) in enumerate(points):
        x = 45 + i * (width - 60) / max(1, len(points))
        svg.append(f'<circle cx="{x:.1f}" cy="{y(bound):.1f}" r="2" fill="#999"><title>{name}: limit {bound:.2f}x'
                   f'</title></circle><circle cx="{x:.1f}" cy="{y(best):.1f}" r="3" fill="#06c"><title>{name}: '
                   f'{best:.2f}x</title></circle>')
    svg.append(f'<text x="45" y="{height - 8}">hybrid batches, by what the limit allows (grey); blue: ours, one call, '
               'over the best serial pair of all contenders</text></svg>')
    with open(path, "w", encoding="utf-8") as f:
        f.write("\n".join(svg) + "\n")


def regex(text):
    try:
        return re.compile(text)
    except re.error as e:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {e}") from e


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", default=".")
    ap.add_argument("--seconds", type=float, default=600, help="no new case after that; those left out make the exit status 1")
    ap.add_argument("--set", default=",".join(SETS))
    ap.add_argument("--rounds", type=int, default=9)
    ap.add_argument("--case", type=regex, default="", metavar="REGEX", help="only cases whose name has a match")
    ap.add_argument("--only", type=regex, default="", metavar="REGEX", help="only contenders whose name has a match")
    ap.add_argument("--one-piece", action="store_true", help="KV of torch.empty, not of pages")
    ap.add_argument("--flex", action="store_true", help="FlexAttention for decodes, too, compiled for each shape")
    ap.add_argument("--flashinfer", action="store_true", help="FlashInfer, too, where it is installed; KV is one layer by itself then")
    ap.add_argument("--power", type=float, default=0, metavar="MS", help="then replay each for so long: watts, clock, energy")
    ap.add_argument("--once", action="store_true", help="time nothing, run each once, for a profiler")
    ap.add_argument("--lib", help="a library made with --build")
    ap.add_argument("--build", help="only build, to this file")
    ap.add_argument("--check", action="store_true", help="only compare the structures with attention.h, and add up KV")
    args = ap.parse_args()
    check_fields()
    if args.check:
        check_sizes()
        return
    if args.build:
        build(args.build)
        return
    if not any(args.case.search(name) for _, name, *_ in cases(args.set.split(","))):
        sys.exit("bench_attention.py: no case of --set has a match of --case")
    begin = time.monotonic()
    os.makedirs(args.out, exist_ok=True)
    path = args.lib or os.path.join(args.out, "libtandem_attention_bench.so")
    if not args.lib:
        build(path)
    import torch
    lib = Library(path)
    cuda = Cuda(torch)
    pages = None if args.one_piece else Pages(torch, cuda)
    meter = Meter(cuda) if args.power and not args.once else None
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, back ends: "
          f"{', '.join(n for n, _ in lib.back_ends)}; KV in {'pages' if pages else 'one piece'}", flush=True)
    if not args.once:
        print(f"{'case':52} {'contender':22} {'us':>9} {'p10':>9} {'p90':>9} TFLOP/s  TB/s  limit  serial  best")
        table = Table(args.out, "attention.csv", HEAD)
    power = Table(args.out, "power.csv", POWER_HEAD) if meter else None
    points, filtered, skipped, failed = [], [], 0, 0
    for group, name, h, hk, chunks, decodes, layers in cases(args.set.split(",")):
        if not args.case.search(name):
            continue
        if time.monotonic() - begin > args.seconds:
            skipped += 1
            continue
        batch = None
        torch.cuda.empty_cache()
        try:
            batch = Batch(torch, h, hk, chunks, decodes, 1 if args.flashinfer else layers, pages)
            if args.once:
                print(name, flush=True)
                once(torch, contenders_of(lib, batch, args.only, args.flex, args.flashinfer))
                continue
            contenders = contenders_of(lib, batch, args.only, args.flex, args.flashinfer)
            got, drawn = measure(torch, contenders, lib, batch, args.rounds, meter, args.power)
            rows, pair = rows_of(batch, got, lib.back_ends)
        except (torch.OutOfMemoryError, RuntimeError, ValueError) as e:
            print(f"{name}: {str(e).splitlines()[0][:120]}", flush=True)
            failed += 1
            continue
        for r in rows:
            table.add([group, name] + r)
            if group != "sweep" or r[0].endswith(" auto"):
                more = "".join(f"{x:7.2f}" if x else "      -" for x in r[7:])
                print(f"{name:52} {r[0]:22} {r[1]:9.1f} {r[2]:9.1f} {r[3]:9.1f} {r[4]:7.0f} {r[5]:5.2f} {r[6]:6.2f}"
                      f"{more}", flush=True)
        for n, (us, watts, mhz, mj, samples, reasons) in drawn.items():
            n = shown(n, got[n][3])
            power.add([group, name, n, us, watts, mhz, mj, samples, reasons])
            energy = f"{watts:5.0f} W, {mj:8.1f} mJ" if watts else "    - W,        - mJ"
            print(f"{name:52} {n:22} {us:9.1f} us, {energy}, {mhz:5.0f} MHz; {reasons}", flush=True)
        if pair:
            first = lib.back_ends[0][0]  # the back end that is picked
            ours = {p: got[f"{first} {p}"][0] for p in OURS if f"{first} {p}" in got}
            limit = max(batch.flops / PEAK_FLOPS, batch.bytes / PEAK_BYTES) * 1e6
            if "auto" in ours:
                points.append((name, pair / limit, pair / ours["auto"]))
            if group in ("sweep", "paper") and min(best_of(got, s) for s in batch.sides()) >= 0.2 * pair:
                filtered.append({p: (pair / us, limit / us) for p, us in ours.items()})
    if not args.once:
        plot(points, os.path.join(args.out, "attention.svg"))
    for policy in OURS:
        of = [f[policy] for f in filtered if policy in f]
        gains = sorted(gain for gain, _ in of)
        if gains:
            print(f"{policy} over the best serial pair, {len(gains)} batches with each side 20 % or more of serial: "
                  f"mean {sum(gains) / len(gains):.2f}, best {gains[-1]:.2f}, worst {gains[0]:.2f}; "
                  f"share of the limit: mean {sum(share for _, share in of) / len(of):.2f}")
    if skipped or failed:
        sys.exit(f"bench_attention.py: {skipped} cases left out as time was up (--seconds), {failed} could not be run: see above")


if __name__ == "__main__":
    main()
