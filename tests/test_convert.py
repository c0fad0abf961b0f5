#!/usr/bin/env python3
"""dsv4 convert and dsv4 verify: the golden pairs, an independent requantiser on random and adversarial tensors, faults, kills.

  test_convert.py [--dsv4 ./dsv4] [--kills 12] [--only TEXT] [-v]

The requantiser below is written from the rules alone (spec: FP32, round half to even) and shares nothing with tools/formats.py,
which made the golden files. Files are compared whole, byte for byte, with what safetensors' own writer would give.
"""
import argparse
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import tempfile
import time

import numpy as np

from common import fault_library, GOLDEN, SANITIZERS, Tally, run

INDEX = "model.safetensors.index.json"
BITS = {"I64": 64, "F32": 32, "BF16": 16, "F8_E8M0": 8, "F8_E4M3": 8, "I8": 8}
ORDER = list(BITS)                      # the order of a file: wide types first, then by name
f32 = np.float32


# ---- an independent requantiser --------------------------------------------------------------------------------------

def powers(b):
    """E8M0 bytes as float32."""
    return np.ldexp(f32(1), b.astype(np.int32) - 127).astype(f32)


def fp8_value(b):
    e, m = (b >> 3 & 15).astype(np.int32), (b & 7).astype(f32)
    v = np.where(e == 0, m * f32(2) ** -9, np.ldexp(f32(8) + m, e - 10)).astype(f32)
    return np.where(b & 128, -v, v).astype(f32)


def to_bf16(x):
    """Nearest even, by way of float64: exact halves are seen as such."""
    bits = x.astype(f32).view(np.uint32)
    low = (bits & 0xFFFF0000).view(f32).astype(np.float64)
    high = ((bits & 0xFFFF0000) + np.uint32(0x10000)).view(f32).astype(np.float64)
    up = (x.astype(np.float64) - low > high - x) | ((x - low == high - x) & (bits >> 16 & 1 == 1))
    return ((bits >> 16) + up).astype(np.uint16)


def int4(w, b):
    """FP4 [N, K/2] with scale bytes [N, K/32] -> INT4 of the same shape, scales."""
    codes = np.array([0, .5, 1, 1.5, 2, 3, 4, 6], f32)
    n, half = w.shape
    q = np.empty((n, 2 * half), np.uint8)
    q[:, 0::2], q[:, 1::2] = w % 16, w // 16
    x = np.where(q >= 8, -codes[q % 8], codes[q % 8]).astype(f32).reshape(n, -1, 32) * powers(b)[:, :, None]
    s = np.maximum(np.abs(x).max(2), f32(2.0 ** -126)) / f32(7)
    v = np.clip(np.rint((x / s[:, :, None]).astype(f32)), -8, 7).astype(np.int32).reshape(n, -1) + 8
    return (v[:, 0::2] + 16 * v[:, 1::2]).astype(np.uint8), to_bf16(s)


def int8(w, b):
    """FP8 [N, K] with scale bytes per 128 x 128 -> INT8, scales."""
    out, scales = np.empty(w.shape, np.int8), np.empty(b.shape, f32)
    for i in range(b.shape[0]):
        for j in range(b.shape[1]):
            at = np.s_[128 * i:128 * i + 128, 128 * j:128 * j + 128]
            x = fp8_value(w[at]) * powers(b[i, j])
            s = np.maximum(np.abs(x).max(), f32(2.0 ** -126)) / f32(127)
            out[at], scales[i, j] = np.clip(np.rint((x / s).astype(f32)), -128, 127), s
    return out.view(np.uint8), to_bf16(scales)


# ---- files -----------------------------------------------------------------------------------------------------------

def file_bytes(tensors, metadata=None):
    """{name: (dtype, shape, bytes)} as safetensors' writer lays it out."""
    head, data = {}, []
    if metadata:
        head["__metadata__"] = metadata
    at = 0
    for name in sorted(tensors, key=lambda n: (ORDER.index(tensors[n][0]), n.encode())):
        dtype, shape, raw = tensors[name]
        assert len(raw) * 8 == BITS[dtype] * int(np.prod(shape))
        head[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(raw)]}
        at += len(raw)
        data.append(raw)
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data)


def write_checkpoint(path, shards, config=None, metadata=None, extra=True):
    """shards: {file: tensors}. A single file named model.safetensors gets no index."""
    os.makedirs(path)
    for f, t in shards.items():
        open(os.path.join(path, f), "wb").write(file_bytes(t, metadata))
    golden = json.load(open(os.path.join(GOLDEN, "aligned/native/config.json")))
    json.dump({**golden, **(config or {})}, open(os.path.join(path, "config.json"), "w"), indent=2)
    if list(shards) != ["model.safetensors"]:
        where = {n: f for f, t in shards.items() for n in t}
        json.dump({"metadata": {"total_size": 1}, "weight_map": where}, open(os.path.join(path, INDEX), "w"), indent=2)
    if extra:
        open(os.path.join(path, "tokenizer.json"), "w").write('{"x": 1}\n')
        os.makedirs(os.path.join(path, "encoding"))
        open(os.path.join(path, "encoding", "a.py"), "w").write("pass\n")


def tree(path):
    """Every file below path by its bytes, the converter's own manifest included."""
    return {os.path.relpath(os.path.join(d, f), path): open(os.path.join(d, f), "rb").read()
            for d, _, fs in os.walk(path) for f in fs}


def fp8(rng, n, k, top=125, lo=100, hi=140):
    w = rng.integers(0, top + 1, (n, k), np.uint8) | (rng.integers(0, 2, (n, k), np.uint8) << 7).astype(np.uint8)
    return w, rng.integers(lo, hi, (-(-n // 128), -(-k // 128)), np.uint8)


def fp4(rng, n, k, lo=100, hi=140):
    return rng.integers(0, 256, (n, k // 2), np.uint8), rng.integers(lo, hi, (n, k // 32), np.uint8)


def pair(base, w, s, kind):
    return {base + ".weight": (kind, w.shape, w.tobytes()), base + ".scale": ("F8_E8M0", s.shape, s.tobytes())}


def converted(base, w, s, rule):
    q, t = rule(w, s)
    return {base + ".weight": ("I8", w.shape, q.tobytes()), base + ".scale": ("BF16", s.shape, t.tobytes())}


def adversarial(rng):
    """Pairs (base, w, scale bytes, FP4?) that visit every scale byte with every largest code, edges, ties, zeros, outliers."""
    # FP4: for every scale byte and largest code a group that holds every code up to it, with both signs
    b, c = np.meshgrid(np.arange(253), np.arange(8), indexing="ij")
    q = (np.arange(32)[None, :] % (c.reshape(-1, 1) + 1)).astype(np.uint8)
    q[:, 1:] |= (rng.integers(0, 2, (len(q), 31), np.uint8) << 3).astype(np.uint8)
    q[:, 0] = c.reshape(-1)
    yield "layers.0.ffn.experts.0.w1", q[:, 0::2] | q[:, 1::2] << 4, b.reshape(-1, 1).astype(np.uint8), True
    big = np.array([[254, 253, 254]], np.uint8)           # the largest that FP32 can hold: 1.5 * 2^127, 3 * 2^126
    q = np.tile(np.array([0x30, 0x53, 0x32], np.uint8)[:, None], (1, 16)).reshape(1, -1)
    yield "layers.1.ffn.experts.7.w2", q, big, True
    yield "layers.0.ffn.experts.1.w3", *fp4(rng, 70, 96), True
    yield "mtp.0.ffn.experts.12.w2", np.zeros((3, 16), np.uint8) + 0x88, np.zeros((3, 1), np.uint8), True      # -0, 2^-127
    yield "layers.2.ffn.experts.0.w1", *fp4(rng, 600, 4096, 0, 253 - 3), True                                  # more than a piece
    # FP8: one row, a block of 128 columns for every scale byte and largest code
    m, b = np.meshgrid(np.arange(127), np.arange(247), indexing="ij")
    w = (np.arange(128)[None, :] % (m.reshape(-1, 1) + 1)).astype(np.uint8)
    w[:, 1:] |= (rng.integers(0, 2, (len(w), 127), np.uint8) << 7).astype(np.uint8)
    w[:, 0] = m.reshape(-1)
    yield "layers.0.attn.wq_a", w.reshape(1, -1), b.reshape(1, -1).astype(np.uint8), False
    for i, (name, n, k) in enumerate([("attn.wq_b", 1, 1), ("attn.wkv", 127, 129), ("attn.wo_a", 128, 128),
                                      ("attn.wo_b", 300, 8192 + 77), ("attn.indexer.wq_b", 257, 255),
                                      ("ffn.shared_experts.w1", 64, 40), ("ffn.shared_experts.w2", 129, 16500)]):
        yield f"layers.{i % 3}.{name}", *fp8(rng, n, k, lo=0, hi=246), False
    w, s = fp8(rng, 256, 256, top=20)
    w[0, 0], w[200, 3], w[130:, 128:] = 0x7e, 0xfe, 0                            # huge outliers, a block of zeros
    yield "mtp.0.ffn.shared_experts.w3", w, s, False


def passed_over(rng):
    """What no rule touches, whatever it looks like."""
    w, s = fp8(rng, 130, 140)
    t = {**pair("mtp.0.e_proj", w, s, "F8_E4M3"), **pair("layers.0.attn.other", w, s, "F8_E4M3")}
    for name, dtype, shape in [("embed.weight", "BF16", (5, 7)), ("layers.0.ffn.gate.tid2eid", "I64", (9, 2)), ("norm.weight", "BF16", (3,)),
                               ("layers.1.hc_attn_fn", "F32", (4, 4)), ("layers.2.attn.wq_a.weight", "BF16", (3, 5)), ("empty", "F32", (0, 4)),
                               ("one", "F32", ()), ("head.weight", "BF16", (1100, 1024))]:
        t[name] = dtype, shape, rng.bytes(BITS[dtype] // 8 * int(np.prod(shape)))
    return t


# libc with faults: FAULT=call:n:errno lets the n-th such call fail; FAULT=short:: halves reads and writes and interrupts every third
# ---- the suite -------------------------------------------------------------------------------------------------------

class Suite:
    def __init__(self, binary, work, tally):
        self.binary, self.work, self.t, self.n = binary, work, tally, 0

    def new(self, name):
        self.n += 1
        return os.path.join(self.work, f"{self.n}-{name}")

    def convert(self, src, dst, *args, **kw):
        return run([self.binary, "convert", src, dst, *args], **kw)

    def refused(self, name, r, *words):
        """Exit 1 or 2, one line, every word in it."""
        ok = r.code in (1, 2) and len(r.lines()) == 1 and r.lines()[0].startswith("dsv4: ") and not r.sanitizer()
        self.t.check(ok and all(w in r.err for w in words), name, r.tail())

    def same(self, name, got, want, skip=()):
        files = [f for f in sorted(set(got) | set(want)) if f not in skip and got.get(f) != want.get(f)]
        self.t.check(not files, name, f"differ: {files}")

    # -- results

    def golden(self):
        for name in ("aligned", "edge"):
            src, want, dst = (os.path.join(GOLDEN, name, f) for f in ("native", "int", ""))
            dst = self.new(name)
            r = self.convert(src, dst, "--verify")
            self.t.check(r.code == 0 and not r.lines() and not r.sanitizer(), f"golden {name}", r.tail())
            got, want = tree(dst), tree(want)
            self.same(f"golden {name}: every file but the index", got, want, (INDEX,))
            got, want = json.loads(got[INDEX]), json.loads(want[INDEX])
            size = sum(e["data_offsets"][1] - e["data_offsets"][0] for f in os.listdir(dst) if f.endswith(".safetensors")
                       for e in self.header(os.path.join(dst, f)).values())
            self.t.check(got["weight_map"] == want["weight_map"] and got["metadata"]["total_size"] == size, f"golden {name}: index")
            v = run([self.binary, "verify", dst])
            self.t.check(v.code == 0 and not v.lines(), f"golden {name}: verify", v.tail())

    def header(self, path):
        with open(path, "rb") as f:
            h = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        h.pop("__metadata__", None)
        return h

    def requantised(self):
        rng = np.random.default_rng(5)
        cases, other = list(adversarial(rng)), passed_over(rng)
        src, dst = self.new("random"), self.new("random-out")
        shards, want = {"model-1.safetensors": dict(other), "model-2.safetensors": {}}, [dict(other), {}]
        for i, (base, w, s, four) in enumerate(cases):
            new = converted(base, w, s, int4 if four else int8)
            old = pair(base, w, s, "I8" if four else "F8_E4M3")
            for j, name in enumerate(old):      # every third pair is split over the shards
                k = (i + j) % 2 if i % 3 == 0 else i % 2
                shards[f"model-{k + 1}.safetensors"][name], want[k][name] = old[name], new[name]
        write_checkpoint(src, shards, metadata={"format": "pt"})
        before = tree(src)
        r = self.convert(src, dst, "--verify")
        self.t.check(r.code == 0 and not r.lines() and not r.sanitizer(), "requantised", r.tail())
        got = tree(dst)
        for k in (0, 1):
            self.t.check(got.get(f"model-{k + 1}.safetensors") == file_bytes(want[k], {"format": "pt"}),
                         f"requantised: shard {k + 1} as the independent requantiser makes it",
                         self.first_difference(got.get(f"model-{k + 1}.safetensors", b""), want[k]))
        self.t.check(set(got) == set(before) and all(got[f] == before[f] for f in ("tokenizer.json", "encoding/a.py")), "other files carried over")
        self.t.check(tree(src) == before, "the source is as it was")

    def first_difference(self, got, want):
        if len(got) < 8:
            return "no file"
        n = struct.unpack("<Q", got[:8])[0]
        for name, e in json.loads(got[8:8 + n]).items():
            if name in want and got[8 + n + e["data_offsets"][0]:8 + n + e["data_offsets"][1]] != want[name][2]:
                return name
        return "header"

    def small(self, shards=3, rows=256, config=None):
        """A checkpoint of a few MB: experts and a dense matrix in every shard."""
        rng = np.random.default_rng(shards)
        files, want = {}, {}
        for i in range(shards):
            f = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            files[f], want[f] = {}, {}
            for base, w, s, four in [(f"layers.{i}.ffn.experts.0.w1", *fp4(rng, rows, 4096), True), (f"layers.{i}.attn.wkv", *fp8(rng, rows, 1024), False)]:
                files[f].update(pair(base, w, s, "I8" if four else "F8_E4M3"))
                want[f].update(converted(base, w, s, int4 if four else int8))
            files[f][f"layers.{i}.attn_norm.weight"] = want[f][f"layers.{i}.attn_norm.weight"] = "BF16", (rows * 2048,), rng.bytes(rows * 4096)
        src = self.new("small")
        write_checkpoint(src, files, config)
        return src, {f: file_bytes(t) for f, t in want.items()}

    def options(self):
        src, want = self.small(3, config={"compress_ratios": [0, 4, 128, 0], "num_hash_layers": 1})
        dst = self.new("remap")
        r = self.convert(src, dst, "--layer-remap", "0,2")
        got, cfg = tree(dst), json.load(open(os.path.join(dst, "config.json"))) if r.code == 0 else {}
        files = sorted(f for f in got if f.endswith(".safetensors"))
        self.t.check(files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 3)], "remap: shards of dropped layers are gone", r.tail())
        self.t.check((cfg.get("num_hidden_layers"), cfg.get("compress_ratios"), cfg.get("num_hash_layers")) == (2, [0, 128, 0], 1), "remap: config")
        index = json.loads(got.get(INDEX, b"{}")).get("weight_map", {})
        self.t.check(index.get("layers.1.attn.wkv.scale") == files[-1] and not any(n.startswith("layers.2") for n in index), "remap: index")
        names = self.header(os.path.join(dst, files[-1]))
        self.t.check(len(names) == 5 and all(n.startswith("layers.1.") for n in names), "remap: names in the shard")
        for bad in ("0,0", "3", "1,0", "x", "", "2-1", "0,,1", "-1"):
            self.refused(f"remap {bad!r}", self.convert(src, self.new("bad"), "--layer-remap=" + bad), "layer")
        one, dst = self.new("single"), self.new("single-out")
        rng = np.random.default_rng(1)
        w, s = fp4(rng, 8, 64)
        write_checkpoint(one, {"model.safetensors": pair("layers.0.ffn.experts.0.w1", w, s, "I8")})
        r = self.convert(one, dst, "--verify")
        want = file_bytes(converted("layers.0.ffn.experts.0.w1", w, s, int4))
        self.t.check(r.code == 0 and tree(dst).get("model.safetensors") == want and INDEX not in tree(dst), "a single file without an index", r.tail())
        for threads in ("1", "3", "16"):
            dst = self.new("threads")
            self.convert(one, dst, "-t", threads)
            self.t.check(tree(dst).get("model.safetensors") == want, f"{threads} threads")

    # -- faults

    def faults(self):
        src, _ = self.small(2)
        before = tree(src)
        self.refused("DST is SRC", self.convert(src, src), "is the source")
        self.refused("DST inside SRC", self.convert(src, os.path.join(src, "a")), "inside")
        link = self.new("link")
        os.symlink(src, link)
        self.refused("DST links to SRC", self.convert(src, link), "is the source")
        full = self.new("full")
        os.mkdir(full)
        open(os.path.join(full, "thesis.txt"), "w").write("x")
        self.refused("DST has other files", self.convert(src, full), "thesis.txt")
        self.t.check(tree(full) == {"thesis.txt": b"x"}, "and is left alone")
        self.refused("DST is a file", self.convert(src, os.path.join(full, "thesis.txt")), "directory")
        self.refused("no such parent", self.convert(src, self.new("x") + "/y/z"), "z")
        self.refused("no such source", self.convert(self.new("none"), self.new("x")), "none")
        done = self.new("done")
        self.convert(src, done)
        self.refused("DST is done", self.convert(src, done), "not empty")
        self.refused("SRC is dsv4_int", self.convert(done, self.new("x")), "dsv4_int")
        p = os.path.join(done, "model-00002-of-00002.safetensors")
        with open(p, "r+b") as f:
            f.seek(-5, 2)
            f.write(bytes([f.read(1)[0] ^ 1]))
        self.refused("--verify finds one wrong bit", self.convert(src, done, "--verify"), "model-00002-of-00002.safetensors", "byte", "found 0x")
        self.t.check(tree(src) == before, "the source is as it was")
        self.damage()
        self.limits(src)
        self.verify(done)

    def damage(self):
        """Sources that are not what they should be."""
        rng = np.random.default_rng(2)
        w4, s4 = fp4(rng, 4, 64)
        w8, s8 = fp8(rng, 200, 300)
        e, d = "layers.0.ffn.experts.0.w1", "layers.0.attn.wkv"
        def case(name, tensors, *words):
            src, dst = self.new("damage"), self.new("damage-out")
            write_checkpoint(src, {"model.safetensors": tensors})
            self.refused(name, self.convert(src, dst), *words)
            self.t.check(not os.path.isdir(dst) or not any(f.endswith((".safetensors", "safetensors.part")) for f in os.listdir(dst)), name + ": no result")
        bad = s4.copy()
        bad[2, 1] = 255
        case("FP4 scale is NaN", pair(e, w4, bad, "I8"), e, "[2, 32]", "0xff")
        bad = s8.copy()
        bad[1, 2] = 255
        case("FP8 scale is NaN", pair(d, w8, bad, "F8_E4M3"), d, "[128, 256]", "0xff")
        bad = w8.copy()
        bad[150, 299] = 0x7f
        case("FP8 weight is NaN", pair(d, bad, s8, "F8_E4M3"), d, "[128, 256]")
        case("FP4 overflows FP32", pair(e, w4 | 0x77, s4 * 0 + 253, "I8"), e, "finite")
        case("no scale", {e + ".weight": pair(e, w4, s4, "I8")[e + ".weight"]}, e, "scale")
        case("no weight", {e + ".scale": pair(e, w4, s4, "I8")[e + ".scale"]}, e, "weight")
        case("scale of another shape", pair(e, w4, s4[:, :1].copy(), "I8"), e, "FP4")
        case("FP8 experts", pair(e, w8, s8, "F8_E4M3"), e, "FP4")
        case("nothing to convert", {"norm.weight": ("BF16", (3,), b"abcdef")}, "nothing to convert")

    def limits(self, src):
        """No room, no permission, no second converter; what was begun can be ended."""
        def cap():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        dst = self.new("cap")
        p = subprocess.run([self.binary, "convert", src, dst], capture_output=True, preexec_fn=cap, env={**os.environ, **SANITIZERS})
        err = p.stderr.decode()
        self.t.check(p.returncode == 1 and "model-0000" in err and not any(f.endswith("safetensors.part") for f in os.listdir(dst)), "write error: one line, no part left", err)
        r = self.convert(src, dst, "--layer-remap", "0")
        self.refused("other options in a begun DST", r, "other options")
        r = self.convert(src, dst)
        ref = self.new("ref")
        self.convert(src, ref)
        self.t.check(r.code == 0, "goes on after the write error", r.tail())
        self.same("and ends the same", tree(dst), tree(ref))
        if os.geteuid() == 0:
            small = self.new("tmpfs")
            os.mkdir(small)
            if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", small], capture_output=True).returncode == 0:
                try:
                    self.refused("disk too small", self.convert(src, small + "/out"), "needed", "free")
                    self.t.check(not os.listdir(small), "disk too small: nothing was written")
                    subprocess.run(["mount", "-o", "remount,ro", small])
                    self.refused("read-only file system", self.convert(src, small + "/out"), "ead-only")
                finally:
                    subprocess.run(["umount", small])
            else:
                print("SKIP the small tmpfs (no right to mount one)")
        locked = self.new("locked")
        os.mkdir(locked, 0o555)
        def nobody():
            if os.geteuid() == 0:
                os.setuid(65534)
        os.chmod(self.work, 0o755)
        p = subprocess.run([self.binary, "convert", src, locked + "/out"], capture_output=True, preexec_fn=nobody, env={**os.environ, **SANITIZERS})
        self.t.check(p.returncode == 1 and b"ermission" in p.stderr and p.stderr.count(b"\n") == 1, "no permission", p.stderr.decode())

    def shim(self):
        """Every system call that can fail does, at every place; then the same command ends the work."""
        src, _ = self.small(2, 64)
        env = fault_library(self.work, self.t)
        self.twice(src, env)
        ref = self.new("ref")
        self.convert(src, ref)
        want = tree(ref)
        dst = self.new("short")
        r = self.convert(src, dst, "--verify", env={**env, "FAULT": "short"})
        self.t.check(r.code == 0 and tree(dst) == want, "short and interrupted reads and writes", r.tail())
        for call, error, text in [("pread", 5, "nput/output"), ("pwrite", 28, "No space"), ("fsync", 5, "nput/output"),
                                  ("rename", 13, "ermission"), ("mkdir", 28, "No space"), ("unlink", 13, "ermission")]:
            hits = 0
            for n in range(1, 40):
                dst = self.new(call)
                r = self.convert(src, dst, env={**env, "FAULT": f"{call}:{n}:{error}"})
                if r.code == 0:
                    break
                hits += 1
                whole = all(b == want.get(f) for f, b in tree(dst).items() if f in want) if os.path.isdir(dst) else True
                ok = r.code == 1 and len(r.lines()) == 1 and text in r.err and not r.sanitizer() and whole
                again = self.convert(src, dst)
                ok = ok and again.code == 0 and tree(dst) == want
                self.t.check(ok, f"{call} number {n} fails", r.tail() + again.tail())
            self.t.check(hits > 0 and r.code == 0, f"{call}: {hits} places")

    def twice(self, src, env):
        """A second conversion into a directory where one is at work, stopped at its first write."""
        dst = self.new("twice")
        p = subprocess.Popen([self.binary, "convert", src, dst], stderr=subprocess.DEVNULL,
                             env={**os.environ, **SANITIZERS, **env, "FAULT": "pwrite:1:stop"})
        stopped = os.WIFSTOPPED(os.waitpid(p.pid, os.WUNTRACED)[1])
        self.t.check(stopped, "two at once: the first is at work")
        if stopped:
            self.refused("two at once", self.convert(src, dst), "another dsv4 convert")
            p.send_signal(signal.SIGCONT)
            self.t.check(p.wait() == 0, "and the first one ends well")

    def verify(self, done):
        v = run([self.binary, "verify", self.new("none")])
        self.refused("verify: no directory", v, "none")
        for name in ("aligned/int", "edge/native"):
            d = self.new("verify")
            shutil.copytree(os.path.join(GOLDEN, name), d)
            for f in os.listdir(d):
                os.chmod(os.path.join(d, f), 0o644)
            os.chmod(d, 0o755)
            path = os.path.join(d, sorted(f for f in os.listdir(d) if f.startswith("model-00001"))[0])
            head = self.header(path)
            base = 8 + struct.unpack("<Q", open(path, "rb").read(8))[0]
            spots = {"layers.0.ffn.gate.tid2eid": (16, b"\xff" * 8), "layers.0.attn.attn_sink": (4, b"\0\0\xc0\x7f"), "embed.weight": (10, b"\x80\xff"),
                     next(n for n in head if n.endswith("w1.scale")): (0, b"\xff\xff")}
            with open(path, "r+b") as f:
                for n, (at, b) in spots.items():
                    f.seek(base + head[n]["data_offsets"][0] + at)
                    f.write(b)
            v = run([self.binary, "verify", d])
            self.t.check(v.code == 1 and len(v.lines()) == 1 and all(f"tensor {n} [" in v.err for n in spots) and f"{len(spots)} of" in v.err,
                         f"verify {name}: finds every damaged tensor", v.tail())
            os.truncate(path, os.path.getsize(path) - 1)
            self.refused(f"verify {name}: truncated", run([self.binary, "verify", d]), "download again")
            os.remove(path)
            self.refused(f"verify {name}: shard missing", run([self.binary, "verify", d]), os.path.basename(path))

    # -- kills and memory

    def kills(self, times):
        """kill -9 at random points; whatever bears a final name is whole; the end is always the same."""
        src, want = self.small(4, 1024)
        ref = self.new("ref")
        t = time.monotonic()
        r = self.convert(src, ref)
        whole = time.monotonic() - t
        want_tree = tree(ref)
        self.t.check(r.code == 0 and all(want_tree[f] == want[f] for f in want), "uninterrupted", r.tail())
        rnd, killed, torn, resumed = random.Random(1), 0, [], 0
        for i in range(times):
            dst = self.new("kill")
            for attempt in range(50):
                p = subprocess.Popen([self.binary, "convert", src, dst], stderr=subprocess.PIPE, env={**os.environ, **SANITIZERS})
                try:
                    p.wait(rnd.uniform(0, whole * (0.3 if attempt < 4 else 1.5)))
                except subprocess.TimeoutExpired:
                    p.kill()
                    p.wait()
                    killed += 1
                now = tree(dst) if os.path.isdir(dst) else {}
                torn += [f for f in now if f in want_tree and now[f] != want_tree[f]]
                if p.returncode == 0 or (now.keys() == want_tree.keys() and p.returncode == -9):    # killed after its last act
                    resumed += attempt > 0
                    break
                if p.returncode != -9:
                    self.t.check(False, "resume failed", p.stderr.read().decode())
                    return
            self.same(f"kill -9, run {i}", tree(dst), want_tree)
        self.t.check(not torn, "no half file bears its final name", str(torn[:3]))
        self.t.check(killed >= times and resumed > 0, f"{killed} kills, {resumed} conversions ended by a later run")

    def memory(self):
        src, _ = self.small(6, 4096)
        dst = self.new("memory")
        p = subprocess.Popen([self.binary, "convert", src, dst, "-t", "2"], stderr=subprocess.DEVNULL)
        peak = 0
        while p.poll() is None:         # of the program itself: what wait4 tells begins with the size of the parent
            try:
                peak = max([peak] + [int(line.split()[1]) for line in open(f"/proc/{p.pid}/status") if line.startswith("VmHWM")])
            except OSError:
                break
            time.sleep(0.002)
        size = sum(os.path.getsize(os.path.join(src, f)) for f in os.listdir(src))
        self.t.check(p.wait() == 0 and (0 < peak < 40 << 10 or "san" in self.binary), f"{peak >> 10} MiB of memory for {size >> 20} MiB of weights")


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--dsv4", default="./dsv4")
    ap.add_argument("--kills", type=int, default=12)
    ap.add_argument("--only", default="")
    ap.add_argument("-v", action="store_true")
    a = ap.parse_args()
    tally = Tally(a.v)
    with tempfile.TemporaryDirectory(prefix="dsv4-convert-") as work:
        s = Suite(os.path.abspath(a.dsv4), work, tally)
        for name, part in [("golden", s.golden), ("requantised", s.requantised), ("options", s.options), ("faults", s.faults),
                           ("shim", s.shim), ("kills", lambda: s.kills(a.kills)), ("memory", s.memory)]:
            if a.only in name:
                part()
    tally.end("convert")
