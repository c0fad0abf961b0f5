#!/usr/bin/env python3
"""Bad input, bad surroundings: one case for each way in which files, options, prompts, pipes and signals can be wrong.

  faults.py [--dsv4 ./dsv4] [--slow 1] [--only TEXT] [-v]

A case damages a copy of a small checkpoint (untouched files are hard links), runs the program and checks the contract: the exit code,
exactly one line on stderr that begins `dsv4: ` (beside `# ` facts) and names the file and the thing, nothing on stdout, under
two seconds (times --slow for sanitizer builds), no sanitizer report, and no file of the model changed.
"""
import argparse
import hashlib
import json
import os
import pty
import resource
import shutil
import signal
import struct
import subprocess
import tempfile
import time

import numpy as np

from common import SANITIZERS, Tally, fault_library, run
import formats as F
import make_checkpoint as M

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"
SHARD2 = "model-00002-of-00002.safetensors"
IDS = ["--ids", "0,5,6,7", "-n", "2", "--temp", "0"]


class Suite:
    def __init__(self, binary, work, slow, only, tally):
        self.binary, self.work, self.slow, self.only, self.tally, self.count = binary, work, slow, only, tally, 0
        self.base = os.path.join(work, "base")
        M.make(self.base, "int", {}, seed=3)
        M.write_tokenizer(self.base)
        self.long = os.path.join(work, "long")      # for tests that need seconds of work, however fast the machine
        M.make(self.long, "int", {"max_position_embeddings": 65536}, seed=3)
        M.write_tokenizer(self.long)
        tensors(lambda ts: ts["head.weight"].bits[1].fill(0))(self.long)   # a logit of 0: never among the likeliest 40, so no answer ends
        self.base_state = self.state()

    def state(self):
        out = {}
        for f in sorted(os.listdir(self.base)):
            p = os.path.join(self.base, f)
            out[f] = hashlib.sha256(open(p, "rb").read()).hexdigest(), os.stat(p).st_mtime_ns
        return out

    def copy(self):
        """A new directory with hard links to the base checkpoint's files."""
        self.count += 1
        d = os.path.join(self.work, f"case{self.count}")
        os.mkdir(d)
        for f in os.listdir(self.base):
            os.link(os.path.join(self.base, f), os.path.join(d, f))
        return d

    def wanted(self, name):
        return not self.only or self.only in name

    def judge(self, name, r, code, words, limit=2.0):
        """The contract for a refused run."""
        t = self.tally
        lines = r.lines()
        t.check(r.code == code, f"{name}: exit {code}", r.tail())
        t.check(len(lines) == 1 and lines[0].startswith("dsv4: "), f"{name}: one line of error", r.tail())
        text = " ".join(lines).lower()
        for w in words:
            options = w if isinstance(w, tuple) else (w,)
            t.check(any(o.lower() in text for o in options), f"{name}: names {w}", f"{text[:300]!r}")
        t.check(r.out == b"", f"{name}: nothing on stdout", repr(r.out[:80]))
        t.check(not r.sanitizer(), f"{name}: no sanitizer report", r.tail())
        t.check(r.seconds < limit * self.slow, f"{name}: in time", f"{r.seconds:.1f} s")

    def refused(self, name, change, *words, args=IDS, code=1, env=None, stdin=b"", limit=2.0, command=()):
        """change(dir) damages the copy; then the program must refuse it, naming `words` (a tuple: any of them)."""
        if not self.wanted(name):
            return
        d = self.copy()
        change(d)
        r = run([self.binary, *command, "-m", d, *args], stdin=stdin, env=env, timeout=20 * self.slow)
        self.judge(name, r, code, words, limit)
        shutil.rmtree(d)

    def accepted(self, name, change, args=IDS, fact=None, env=None, stdin=b"", command=(), limit=2.0):
        """The program must run; with `fact`, say so in a `# ` line."""
        if not self.wanted(name):
            return None
        d = self.copy()
        change(d)
        r = run([self.binary, *command, "-m", d, *args], stdin=stdin, env=env, timeout=20 * self.slow)
        self.tally.check(r.code == 0 and not r.lines() and not r.sanitizer(), f"{name}: runs", r.tail())
        if fact:
            facts = [line for line in r.err.split("\n") if line.startswith("#") and fact.lower() in line.lower()]
            self.tally.check(len(facts) == 1, f"{name}: one `# ` line with '{fact}'", r.err[-300:])
        self.tally.check(r.seconds < limit * self.slow, f"{name}: in time", f"{r.seconds:.1f} s")
        shutil.rmtree(d)
        return r

    def usage(self, name, *args, words=(), code=2, model=True, stdin=b""):
        if not self.wanted(name):
            return
        where = ["-m", self.base] if model else []
        r = run([self.binary, *where, *args], stdin=stdin, timeout=20 * self.slow)
        self.judge(name, r, code, words)


# ---- ways to damage a file: always a new file, never through the hard link

def put(d, name, data):
    path = os.path.join(d, name)
    if os.path.lexists(path):
        os.unlink(path)
    with open(path, "wb") as f:
        f.write(data if isinstance(data, bytes) else data.encode())


def get(d, name):
    return open(os.path.join(d, name), "rb").read()


def cut(name, size):
    """Keeps `size` bytes; a negative or fractional size counts from the end or as a share."""
    def change(d):
        b = get(d, name)
        put(d, name, b[:int(len(b) * size)] if isinstance(size, float) else b[:size])
    return change


def header(shard, edit, raw=False):
    """edit(header dict) -> dict or JSON text (raw: bytes of the header as they stand -> bytes)."""
    def change(d):
        b = get(d, shard)
        n, = struct.unpack("<Q", b[:8])
        old = b[8:8 + n]
        new = edit(old) if raw else edit(json.loads(old))
        if isinstance(new, dict):
            new = json.dumps(new, separators=(",", ":"))
        new = new if isinstance(new, bytes) else new.encode()
        put(d, shard, struct.pack("<Q", len(new)) + new + b[8 + n:])
    return change


def entry(name, shard=SHARD, **fields):
    """Replaces fields of one tensor's entry in the header (data stay)."""
    def edit(h):
        h[name].update(fields)
        return h
    return header(shard, edit)


def jsonfile(name, edit):
    def change(d):
        new = edit(json.loads(get(d, name)))
        put(d, name, new if isinstance(new, (str, bytes)) else json.dumps(new, ensure_ascii=False))
    return change


def config(**keys):
    """Sets keys of config.json; None removes one. A dotted key reaches into an object."""
    def edit(c):
        for k, v in keys.items():
            at, parts = c, k.split("__")
            for p in parts[:-1]:
                at = at[p]
            if v is None:
                at.pop(parts[-1], None)
            else:
                at[parts[-1]] = v
        return c
    return jsonfile("config.json", edit)


def tensors(edit):
    """edit({name: Tensor}) of both shards together; they are written anew with a true index."""
    def change(d):
        ts = {**F.read_file(os.path.join(d, SHARD)), **F.read_file(os.path.join(d, SHARD2))}
        ts = {n: F.Tensor(t.dtype, t.bits.copy()) for n, t in ts.items()}
        edit(ts)
        for f in (SHARD, SHARD2, INDEX):
            os.unlink(os.path.join(d, f))
        M.write_shards(d, ts, 2)
    return change


def value(name, at, bits):
    def edit(ts):
        ts[name].bits.reshape(-1)[at] = bits
    return tensors(edit)


def remove(name):
    return lambda d: os.unlink(os.path.join(d, name))


def both(*changes):
    def change(d):
        for c in changes:
            c(d)
    return change


def nothing(d):
    pass


# ---- the cases, numbered as in the project's fault list

def shards(s):
    for size, what in ((-1, "one byte short"), (0.5, "half"), (0, "empty"), (7, "7 bytes"), (8, "8 bytes")):
        s.refused(f"1 shard {what}", cut(SHARD, size), SHARD, "download again")
    s.refused("1 shard with a byte too many", lambda d: put(d, SHARD, get(d, SHARD) + b"\0"), SHARD)
    s.refused("2 shard missing", remove(SHARD2), SHARD2)
    s.refused("2 shard is a directory", both(remove(SHARD2), lambda d: os.mkdir(os.path.join(d, SHARD2))), SHARD2)
    s.refused("2 index names a shard outside", jsonfile(INDEX, lambda i: (i["weight_map"].update(
        {"embed.weight": "../base/" + SHARD}), i)[1]), INDEX, "../base")
    s.refused("2 index points to the wrong shard", jsonfile(INDEX, lambda i: (i["weight_map"].update(
        {n: SHARD2 if f == SHARD else SHARD for n, f in i["weight_map"].items() if n == "embed.weight"}), i)[1]), "embed.weight", SHARD2)
    s.refused("2 index is empty", lambda d: put(d, INDEX, ""), INDEX)
    s.refused("2 index is no JSON", lambda d: put(d, INDEX, "hello"), INDEX)
    s.refused("2 index without weight_map", lambda d: put(d, INDEX, "{}"), INDEX, "weight_map")
    s.refused("2 weight_map of numbers", lambda d: put(d, INDEX, '{"weight_map":{"embed.weight":3}}'), INDEX)
    s.refused("2 neither index nor shard", both(remove(INDEX), remove(SHARD), remove(SHARD2)), "safetensors")
    s.refused("2 index lists a tensor that is nowhere", jsonfile(INDEX, lambda i: (i["weight_map"].update(
        {"layers.9.foo": SHARD}), i)[1]), "layers.9.foo", SHARD)

    def extra(ts):
        ts["layers.0.surprise.weight"] = F.Tensor("F32", np.zeros(4, np.uint32))
        ts["other.weight"] = F.Tensor("BF16", np.zeros((4, 4), np.uint16))
    s.accepted("2 tensors nobody asked for", tensors(extra), fact="2 tensors")
    s.accepted("2 index lacks a tensor of a shard", jsonfile(INDEX, lambda i: (i["weight_map"].pop("norm.weight"), i)[1]), fact="index")

    def stray(d):
        F.write_file(os.path.join(d, "model-00003-of-00002.safetensors"), {"x": F.Tensor("F32", np.zeros(1, np.uint32))})
    s.accepted("2 a shard that the index does not list", stray)


def single(d):
    """The checkpoint as one model.safetensors without an index."""
    ts = {**F.read_file(os.path.join(d, SHARD)), **F.read_file(os.path.join(d, SHARD2))}
    for f in (SHARD, SHARD2, INDEX):
        os.unlink(os.path.join(d, f))
    F.write_file(os.path.join(d, "model.safetensors"), ts)


def bind(s):
    s.accepted("3 one file without index", single)
    for name in ("embed.weight", "layers.1.attn.compressor.ape", "layers.2.ffn.experts.3.w2.scale", "hc_head_fn", "layers.0.attn.wq_a.weight"):
        s.refused(f"3 {name} missing", tensors(lambda ts, n=name: ts.pop(n)), name)
    u8, u16, u32 = (lambda *sh: np.zeros(sh, np.uint8)), (lambda *sh: np.zeros(sh, np.uint16)), (lambda *sh: np.zeros(sh, np.uint32))
    for name, t, want in (
            ("embed.weight", F.Tensor("F16", u16(512, 64)), "512, 64"), ("embed.weight", F.Tensor("BF16", u16(511, 64)), "512, 64"),
            ("norm.weight", F.Tensor("BF16", u16(65)), "[64]"), ("norm.weight", F.Tensor("BF16", u16(64, 1)), "[64]"),
            ("layers.0.attn.wq_a.weight", F.Tensor("I8", u8(64, 32)), "32, 64"),
            ("layers.0.attn.wq_a.weight", F.Tensor("I8", u8(2048)), "32, 64"),
            ("layers.0.attn.wq_a.scale", F.Tensor("F32", u32(1, 1)), "[1, 1]"),
            ("layers.0.attn.wq_b.scale", F.Tensor("BF16", u16(2, 1)), "[1, 1]"),
            ("layers.1.ffn.experts.0.w1.scale", F.Tensor("BF16", u16(32, 3)), "[32, 2]"),
            ("layers.1.ffn.experts.0.w1.weight", F.Tensor("I8", u8(32, 33)), "32"),
            ("layers.1.ffn.experts.0.w1.weight", F.Tensor("U8", u8(32, 32)), "32"),
            ("layers.0.ffn.gate.tid2eid", F.Tensor("I32", u32(512, 2)), "512, 2"),
            ("layers.0.ffn.gate.tid2eid", F.Tensor("I64", np.zeros((511, 2), np.uint64)), "512, 2"),
            ("layers.1.ffn.gate.bias", F.Tensor("F32", u32(5)), "[4]"),
            ("layers.2.attn.attn_sink", F.Tensor("F32", u32()), "[2]"),
            ("layers.2.hc_attn_scale", F.Tensor("F32", u32(1, 1, 1, 1, 1, 1, 1, 1, 3)), ""),
            ("layers.2.hc_attn_scale", F.Tensor("F32", u32(0)), "[3]")):
        s.refused(f"3 {name} as {t.dtype}{list(t.shape)}", tensors(lambda ts, n=name, t=t: ts.update({n: t})), name, want)


def offsets(s):
    def swap(h):
        a, b = h["embed.weight"]["data_offsets"], h["layers.0.attn_norm.weight"]
        b["data_offsets"] = [a[0], a[0] + 128]
        return h

    def hole(h):
        last = max(h, key=lambda n: h[n]["data_offsets"][1])
        del h[last]
        first = min(h, key=lambda n: h[n]["data_offsets"][1])
        h.pop(first)
        return h
    name = "embed.weight"
    s.refused("4 overlap", header(SHARD, swap), SHARD, name)
    s.refused("4 hole", header(SHARD, hole), SHARD)
    for what, at in (("reversed", [65536, 0]), ("past the end", [1 << 40, (1 << 40) + 65536]), ("negative", [-1, 65535]), ("huge", [0, 2**64 - 1]),
                     ("larger than 64 bits", [0, 2**64]), ("near 2^64", [2**64 - 65536, 2**64 - 1]), ("floats", [0.0, 65536.0]), ("strings", ["0", "65536"]),
                     ("one number", [0]), ("three numbers", [0, 1, 2]), ("no list", 7), ("null", None), ("empty", [])):
        s.refused(f"4 offsets {what}", entry(name, data_offsets=at), SHARD)
    for what, sh in (("huge product", [2**40, 2**40]), ("product that wraps to the right size", [2**63, 2, 512 * 64]), ("negative", [-512, -64]),
                     ("float", [512.0, 64]), ("string", "512"), ("2^64", [2**64, 64]), ("nested", [[512], 64]), ("10^5 dims", [1] * 100000)):
        s.refused(f"4 shape {what}", entry(name, shape=sh), SHARD)
    s.refused("4 dtype unknown", entry(name, dtype="BF17"), SHARD, name)
    s.refused("4 dtype a number", entry(name, dtype=5), SHARD)
    s.refused("4 entry without dtype", header(SHARD, lambda h: (h[name].pop("dtype"), h)[1]), SHARD, "dtype")
    s.refused("4 entry is a list", header(SHARD, lambda h: {**h, name: []}), SHARD)


def headers(s):
    def length(n):
        return lambda d: put(d, SHARD, struct.pack("<Q", n) + get(d, SHARD)[8:])
    size = len(get(s.base, SHARD))
    for n in (0, 1, 7, 2**63, 2**64 - 1, 100_000_001, size, size - 7, size - 8, 2**31, 2**32):
        s.refused(f"5 header length {n}", length(n), SHARD)
    s.refused("5 header starts with a space", header(SHARD, lambda b: b" " + b[:-1], raw=True), SHARD)
    s.refused("5 header starts with [", header(SHARD, lambda b: b"[" + b[1:], raw=True), SHARD)
    s.refused("5 header padded with NUL", header(SHARD, lambda b: b.rstrip() + b"\0" * 8, raw=True), SHARD)
    s.refused("5 header padded with newlines", header(SHARD, lambda b: b.rstrip() + b"\n" * 8, raw=True), SHARD)
    s.refused("5 header not UTF-8", header(SHARD, lambda b: b.replace(b"embed.weight", b"embed.\xffeight"), raw=True), SHARD)
    s.refused("5 header cut inside", header(SHARD, lambda b: b[:len(b) // 2], raw=True), SHARD)
    s.refused("5 header of random bytes", header(SHARD, lambda b: bytes(np.random.default_rng(1).integers(0, 256, len(b), np.uint8)), raw=True), SHARD)
    s.refused("5 a picture instead of a shard", lambda d: put(d, SHARD, b"\x89PNG\r\n\x1a\n" + bytes(5000)), SHARD)
    s.refused("5 a git-lfs pointer instead of a shard", lambda d: put(
        d, SHARD, "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 1234\n"), SHARD)


def duplicates(s):
    def twice(b):
        return b.replace(b'{"', b'{"norm.weight":{"dtype":"BF16","shape":[0],"data_offsets":[0,0]},"', 1)

    def two_shards(d):
        a, b = F.read_file(os.path.join(d, SHARD)), F.read_file(os.path.join(d, SHARD2))
        b["embed.weight"] = a["embed.weight"]
        os.unlink(os.path.join(d, SHARD2))
        F.write_file(os.path.join(d, SHARD2), b)
    where = json.load(open(os.path.join(s.base, INDEX)))["weight_map"]["norm.weight"]
    s.refused("6 tensor twice in one shard", header(where, twice, raw=True), where, "norm.weight")
    s.refused("6 tensor in two shards", two_shards, "embed.weight", SHARD2)
    s.refused("6 config key twice", lambda d: put(d, "config.json", get(d, "config.json").replace(b"{", b'{"hidden_size": 64,', 1)),
              "config.json", "hidden_size")
    s.refused("6 index entry twice", lambda d: put(d, INDEX, get(d, INDEX).replace(
        b'"weight_map": {', b'"weight_map": {"embed.weight": "%s",' % SHARD.encode(), 1)), INDEX, "embed.weight")
    s.refused("6 tensor field twice", header(where, lambda b: b.replace(b'"norm.weight":{', b'"norm.weight":{"dtype":"BF16",'), raw=True), where)


def json_rules(s):
    def with_key(text):
        return lambda d: put(d, "config.json", get(d, "config.json").replace(b"{", b'{"extra": ' + text + b",", 1))
    s.accepted("7 nesting of 60", with_key(b"[" * 60 + b"]" * 60))
    s.accepted("7 deep objects, 60", with_key(b'{"a":' * 60 + b"1" + b"}" * 60))
    s.refused("7 nesting of 65", with_key(b"[" * 65 + b"]" * 65), "config.json")
    s.refused("7 nesting of 10^6", with_key(b"[" * 10**6 + b"]" * 10**6), "config.json")
    s.refused("7 nesting of 10^6, never closed", with_key(b'{"a":' * 10**6), "config.json")
    s.refused("7 nesting of 10^6 in a shard", header(SHARD, lambda b: b'{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"," + b[1:], raw=True), SHARD)
    s.refused("7 nesting in the index", lambda d: put(d, INDEX, b"[" * 10**6), INDEX)
    s.refused("7 number of 10^7 digits", lambda d: put(d, "config.json", get(d, "config.json").replace(b'"hidden_size": 64', b'"hidden_size": ' + b"6" * 10**7)),
              "config.json")
    s.refused("7 exponent out of range", lambda d: put(d, "config.json", get(d, "config.json").replace(
        b'"swiglu_limit": 5.0', b'"swiglu_limit": 1e999999')), "config.json", "swiglu_limit")
    for what, text in (("lone surrogate", b'"\\ud800"'), ("reversed surrogates", b'"\\udc00\\ud800"'), ("trailing comma", b"[1,]"), ("NaN", b"NaN"), ("Infinity", b"-Infinity"),
                       ("comment", b"/* x */ 1"), ("hex", b"0x10"), ("leading zero", b"01"), ("plus", b"+1"), ("bare point", b"1."), ("raw newline", b'"a\nb"'),
                       ("raw NUL", b'"a\0b"'), ("bad escape", b'"\\x41"'), ("single quotes", b"'a'"), ("overlong UTF-8", b'"\xc0\x80"'), ("UTF-8 surrogate", b'"\xed\xa0\x80"'),
                       ("control character", b'"\x01"'), ("word", b"tru")):
        s.refused(f"7 {what}", with_key(text), "config.json")
    s.refused("7 text after the end", lambda d: put(d, "config.json", get(d, "config.json") + b"{}"), "config.json")
    s.refused("7 byte order mark", lambda d: put(d, "config.json", b"\xef\xbb\xbf" + get(d, "config.json")), "config.json")
    s.refused("7 UTF-16", lambda d: put(d, "config.json", get(d, "config.json").decode().encode("utf-16")), "config.json")


def tables(s):
    tid = "layers.0.ffn.gate.tid2eid"
    s.refused("8 tid2eid missing", tensors(lambda ts: ts.pop(tid)), tid)
    for what, v in (("too large", 4), ("negative", 2**64 - 1), ("huge", 2**40)):
        s.refused(f"8 tid2eid {what}", value(tid, 2 * 77 + 1, v), "layers.0", "tid2eid", "77")
    s.refused("8 tid2eid bad in the last row", value(tid, 2 * 511, 4), "layers.0", "511")
    where = {"embed": ("embed", "layers.0"), "norm": ("norm", "logits"), "head": ("head", "logits")}    # what the message may name
    nan32, inf32, nan16 = 0x7FC00000, 0x7F800000, 0x7FC0
    ids = ["--ids", "0," + ",".join(map(str, range(5, 65))), "-n", "8"]
    s.refused("9 gate of NaN", tensors(lambda ts: ts["layers.1.ffn.gate.weight"].bits.fill(nan16)), "layers.1", args=ids)
    s.refused("9 router bias NaN", value("layers.1.ffn.gate.bias", 1, nan32), "layers.1", args=ids)
    s.refused("9 router bias all -inf", tensors(lambda ts: ts["layers.2.ffn.gate.bias"].bits.fill(0xFF800000)), "layers.2", args=ids)
    s.refused("9 router bias inf", value("layers.1.ffn.gate.bias", 0, inf32), "layers.1", args=ids)
    for name, bits in (("embed.weight", nan16), ("norm.weight", nan16), ("head.weight", nan16), ("layers.0.attn.wkv.scale", nan16),
                       ("layers.1.ffn.shared_experts.w2.scale", 0x7F80), ("layers.1.attn.compressor.wkv.weight", nan16),
                       ("layers.1.attn.compressor.ape", nan32), ("layers.1.attn.indexer.weights_proj.weight", nan16),
                       ("layers.2.hc_ffn_base", nan32), ("layers.0.attn.attn_sink", nan32), ("layers.0.attn.q_norm.weight", 0x7F80)):
        for mode in ([], ["--exact"]):
            s.refused(f"10 {name} not finite {' '.join(mode)}", tensors(lambda ts, n=name, b=bits: ts[n].bits.fill(b)),
                      where[name.split(".")[0]] if name.split(".")[0] in where else ".".join(name.split(".")[:2]), args=ids + mode)


def configs(s):
    s.refused("11 config missing", remove("config.json"), "config.json")
    s.refused("11 config empty", lambda d: put(d, "config.json", ""), "config.json")
    s.refused("11 config is a list", lambda d: put(d, "config.json", "[]"), "config.json")
    s.refused("11 config is {}", lambda d: put(d, "config.json", "{}"), "config.json")
    s.refused("11 config is a directory", both(remove("config.json"), lambda d: os.mkdir(os.path.join(d, "config.json"))), "config.json")
    s.refused("11 config is a FIFO", both(remove("config.json"), lambda d: os.mkfifo(os.path.join(d, "config.json"))), "config.json", "regular")
    s.accepted("11 an optional key is null", jsonfile("config.json", lambda c: {**c, "bos_token_id": None, "expert_dtype": None}))
    s.refused("11 V4.1", config(model_type="deepseek_v41", architectures=["DeepseekV41ForCausalLM"]), "config.json", ("V4.1", "deepseek_v41"))
    s.refused("11 num_hidden_layers more than found", config(num_hidden_layers=4, compress_ratios=[0, 4, 128, 0, 0]), "layers.3")
    s.refused("11 num_hidden_layers fewer than found", config(num_hidden_layers=2, compress_ratios=[0, 4, 0]), "num_hidden_layers")
    s.refused("11 quant_method other", config(quantization_config={"quant_method": "awq", "bits": 4}), "quant_method", "awq")
    s.refused("11 quantization_config a string", config(quantization_config="int4"), "quantization_config")
    for ratios, word in (([0, 4], "3"), ([], ""), ([0, 8, 128, 0], "8"), ([0, -4, 128, 0], "-4"), ([0, 4.0, 128, 0], "4.0"), ("0,4,128", ""), ([0, "4", 128], ""),
                         ([0, 4, 128, 8], "8"), ([0, 2**32 + 4, 128, 0], "4294967300")):
        s.refused(f"11 compress_ratios {ratios}", config(compress_ratios=ratios), "config.json", "compress_ratios", word)
    s.accepted("11 compress_ratios with surplus entries", config(compress_ratios=[0, 4, 128, 0, 0, 0, 0]))
    s.accepted("11 compress_ratios without the MTP entry", config(compress_ratios=[0, 4, 128]))
    for key in ("hidden_size", "num_attention_heads", "head_dim", "vocab_size", "num_hidden_layers", "compress_ratios", "model_type",
                "n_routed_experts", "rope_scaling", "hc_mult", "sliding_window", "index_topk"):
        s.refused(f"11 {key} missing", config(**{key: None}), "config.json", key)
    dims = ("hidden_size", "num_attention_heads", "head_dim", "qk_rope_head_dim", "q_lora_rank", "o_groups", "o_lora_rank", "moe_intermediate_size",
            "n_routed_experts", "num_experts_per_tok", "vocab_size", "num_hidden_layers", "hc_mult", "index_n_heads", "index_head_dim", "index_topk",
            "sliding_window", "max_position_embeddings")
    for key in dims:
        for v in (0, -1, 1.5, 2**31, 2**63, "64", [64], True):
            s.refused(f"11 {key} = {v!r}", config(**{key: v}), "config.json", key)
        if key not in ("index_topk", "max_position_embeddings"):
            s.refused(f"11 {key} = 2^31 - 1", config(**{key: 2**31 - 1}))
    for key, v, word in (("model_type", "llama", "llama"), ("model_type", 4, ""), ("scoring_func", "softmax", "softmax"), ("topk_method", "greedy", "greedy"),
                         ("norm_topk_prob", False, "false"), ("rope_scaling__type", "linear", "linear"), ("hidden_act", "gelu", "gelu"), ("n_shared_experts", 2, "2"),
                         ("num_key_value_heads", 2, "2"), ("tie_word_embeddings", True, "true"), ("attention_bias", True, "true"), 
                         ("qk_rope_head_dim", 64, "64"), ("qk_rope_head_dim", 15, "15"), ("o_groups", 3, "3"), ("num_experts_per_tok", 5, "5"),
                         ("index_head_dim", 8, ""), ("num_hash_layers", -1, "-1"), ("num_hash_layers", 4, "4"), ("hc_sinkhorn_iters", 0, "0"),
                         ("rms_norm_eps", -1e-6, ""), ("rms_norm_eps", "x", ""), ("hc_eps", -1.0, ""), ("rope_theta", 0, "0"), ("rope_theta", -5, "-5"),
                         ("compress_rope_theta", 0, "0"), ("rope_scaling__factor", 0, "0"), ("rope_scaling__original_max_position_embeddings", 0, "0"),
                         ("rope_scaling__beta_fast", 0, "0"), ("swiglu_limit", -1.0, "-1"), ("swiglu_limit", 0, "0"), ("routed_scaling_factor", "a", ""), ("num_nextn_predict_layers", -1, "-1"),
                         ("eos_token_id", 512, "512"), ("eos_token_id", -1, "-1"), ("bos_token_id", 512, "512"), ("rope_scaling", 5, ""), ("rope_scaling", None, "")):
        s.refused(f"11 {key} = {v!r}", config(**{key: v}), "config.json", key.split("__")[-1], word)
    s.refused("11 expert_dtype other", config(expert_dtype="nf4"), "expert_dtype", "nf4")
    s.refused("11 two MTP layers asked, one there", config(num_nextn_predict_layers=2), "mtp.1")
    s.accepted("11 unknown keys", config(some_future_key={"a": [1, 2, {"b": None}]}, pad_token_id=1))
    s.accepted("11 dspark keys: MTP tensors skipped", config(dspark_num_layers=3, dspark_hidden=64), fact="mtp")
    s.refused("11 MTP logits without MTP", config(dspark_num_layers=3), "mtp", args=["--ids", "0,5", "-n", "0", "--mtp-logits", "/dev/null"])


def tokenizers(s):
    tok = "tokenizer.json"

    def model(edit):
        return jsonfile(tok, lambda t: (edit(t["model"]), t)[1])

    def added(edit):
        return jsonfile(tok, lambda t: (edit(t["added_tokens"]), t)[1])
    ways = [("tokenize", dict(command=["tokenize"], args=[], stdin=b"hello the AAAA")), ("prompt", dict(args=["-p", "hello", "-n", "1"]))]
    big = "A" * (10 << 20)
    for way, how in ways:
        def bad(name, change, *words, how=how, way=way):
            s.refused(f"12 {name} ({way})", change, *words, **how)
        bad("tokenizer missing", remove(tok), tok)
        bad("tokenizer empty", lambda d: put(d, tok, ""), tok)
        bad("tokenizer is {}", lambda d: put(d, tok, "{}"), tok)
        bad("tokenizer cut", cut(tok, 0.5), tok)
        bad("merge of an unknown token", model(lambda m: m["merges"].insert(3, "Ġthe Ġqqqq")), tok, "qqqq")
        bad("merge whose result is unknown", model(lambda m: m["merges"].append("Ġq uu")), tok)
        bad("merge of one part", model(lambda m: m["merges"].append("Ġthe")), tok, "Ġthe")
        bad("merge of three parts", model(lambda m: m["merges"].append("a b c")), tok)
        bad("merge a number", model(lambda m: m["merges"].append(5)), tok)
        bad("merge twice", model(lambda m: m["merges"].append(m["merges"][0])), tok)
        bad("merge loop", model(lambda m: (m["vocab"].update({"": 600}), m["merges"].append(" A"))), tok)
        bad("id twice in the vocabulary", model(lambda m: m["vocab"].update({"zzz": m["vocab"]["a"]})), tok, "zzz")
        bad("text twice in the vocabulary", lambda d: put(d, tok, get(d, tok).replace('"vocab": {'.encode(), '"vocab": {"a": 300,'.encode(), 1)), tok)
        bad("id twice among added tokens", added(lambda a: a.append({**a[-1], "content": "<zzz>"})), tok, "zzz")
        bad("text twice among added tokens", added(lambda a: a.append({**a[-1], "id": a[-1]["id"] + 1})), tok)
        bad("negative id", model(lambda m: m["vocab"].update({"zzz": -1})), tok, "zzz")
        bad("id of 2^31", model(lambda m: m["vocab"].update({"zzz": 2**31})), tok, "zzz")
        bad("id of 2^63", model(lambda m: m["vocab"].update({"zzz": 2**63})), tok, "zzz")
        bad("id a string", model(lambda m: m["vocab"].update({"zzz": "5"})), tok)
        bad("id a fraction", model(lambda m: m["vocab"].update({"zzz": 5.5})), tok)
        bad("a byte missing", model(lambda m: m["vocab"].pop("~")), tok)
        bad("text outside the byte alphabet", model(lambda m: m["vocab"].update({"\u4e2d": len(m["vocab"]) + 40})), tok)
        bad("invalid UTF-8", lambda d: put(d, tok, get(d, tok).replace('"~"'.encode(), b'"\xff~"', 1)), tok)
        bad("vocabulary a list", model(lambda m: m.update(vocab=[])), tok)
        bad("model not BPE", model(lambda m: m.update(type="WordPiece")), tok, "WordPiece")
        bad("normalizer that changes text", jsonfile(tok, lambda t: {**t, "normalizer": {"type": "NFKC"}}), tok, "normalizer")
        bad("other pre-tokenizer", jsonfile(tok, lambda t: {**t, "pre_tokenizer": {"type": "Whitespace"}}), tok, "pre_tokenizer")
        bad("byte_fallback", model(lambda m: m.update(byte_fallback=True)), tok, "byte_fallback")
        bad("added token with lstrip", added(lambda a: a[-1].update(lstrip=True)), tok, "lstrip")
        bad("added token empty", added(lambda a: a[-1].update(content="")), tok)
        bad("token of 10 MB", model(lambda m: m["vocab"].update({big: len(m["vocab"]) + 60})), tok)
    chat = dict(args=["-p", "hello", "-n", "1"])
    for content in ("<｜User｜>", "<｜Assistant｜>", "</think>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"):
        def rename(t, c=content):
            for a in t["added_tokens"]:
                if a["content"] == c:
                    a["content"] = "<other>"
            if c in t["model"]["vocab"]:
                i = t["model"]["vocab"].pop(c)
                t["model"]["vocab"]["<other>"] = i
            return t
        s.refused(f"12 control token {content} missing", jsonfile(tok, rename), tok, content, **chat)
    s.accepted("12 merges as pairs", model(lambda m: m.update(merges=[x.split(" ") for x in m["merges"]])), args=["-p", "the AAAA", "-n", "1", "--temp", "0"])
    s.refused("12 a gap in the ids", model(lambda m: m["vocab"].update({"zzz": len(m["vocab"]) + 60})), tok, "zzz", args=["-p", "hello", "-n", "1"])

    def many(a):        # up to id 519, while vocab_size is 512
        a.extend({**a[-1], "id": i, "content": f"<extra {i}>"} for i in range(a[-1]["id"] + 1, 520))
    s.accepted("12 larger than vocab_size", added(many), args=["-p", "hello", "-n", "1", "--temp", "0"], fact="520 tokens")
    s.accepted("12 a token beyond vocab_size in the prompt is plain text", added(many), args=["-p", "hello <extra 515>", "-n", "1", "--temp", "0"])
    text = ["--raw", "-p", "hello", "-n", "400", "--temp", "1.5", "-s", "1"]
    s.accepted("12 smaller than vocab_size, ids without a text", nothing, args=text)
    if s.wanted("12 1 MB of A"):
        rs = [run([s.binary, "tokenize", "-m", s.base], stdin=b"A" * (1 << 20), timeout=20 * s.slow) for _ in range(3)]
        s.tally.check(all(r.code == 0 and len(r.out.split()) == 1 << 19 for r in rs), "12 1 MB of A: all of it", rs[0].tail())
        s.tally.check(min(r.seconds for r in rs) < s.slow, "12 1 MB of A: under a second", str([r.seconds for r in rs]))
    s.accepted("12 1 MB of mixed bytes", nothing, command=["tokenize"], args=[], stdin=bytes(np.random.default_rng(2).integers(0, 256, 1 << 20, np.uint8)))
    s.accepted("12 no tokenizer, ids only", remove("tokenizer.json"))


def prompts(s):
    long = ",".join(["5"] * 100)
    s.usage("13 prompt longer than the context", "--ids", long, "-c", "64", "-n", "1", words=("100", "64"), code=1)
    s.usage("13 ids: empty", "--ids", "", "-n", "1")
    one = ["-n", "1", "--temp", "0"]
    s.usage("13 empty prompt", "-p", "", *one, words=["empty"])
    s.usage("13 empty raw prompt", "--raw", "-p", "", *one, words=["empty"])
    s.usage("13 empty stdin", "-f", "-", *one, words=["empty"])
    s.accepted("13 only special tokens", nothing, args=["-p", "<｜User｜><｜end▁of▁sentence｜><think>", *one])
    for what, data in (("NUL inside", b"a\0b\0"), ("invalid UTF-8", b"\xff\xfe\xc0\x80 abc \xe4\xbd"), ("half a character", b"\xf0\x9f\x98"), ("surrogate", b"\xed\xa0\x80"),
                       ("CR LF", b"a\r\nb\r\n"), ("all bytes", bytes(range(256)))):
        r = s.accepted(f"13 {what}", nothing, args=["-f", "-", "--show-ids", "-n", "4", "--temp", "0"], stdin=data)
        t = s.accepted(f"13 {what}, tokenized", nothing, command=["tokenize"], args=[], stdin=data)
        if t:
            back = s.accepted(f"13 {what}, decoded", nothing, command=["tokenize"], args=["--decode"], stdin=t.out)
            s.tally.check(back.out == data.decode("utf-8", "replace").encode(), f"13 {what}: survives the tokenizer", repr((t.out, back.out))[:300])
    s.refused("13 prompt file missing", nothing, "nofile.txt", args=["-f", "/nonexistent/nofile.txt"])
    s.refused("13 prompt file a directory", nothing, "/tmp", args=["-f", "/tmp"])


def options(s):
    u = s.usage
    u("opt unknown option", "--frobnicate", words=["--frobnicate"])
    u("opt unknown short option", "-Z", words=["-Z"])
    u("opt unknown subcommand", "frobnicate", words=["frobnicate"], model=False)
    r = run([s.binary, "-p", "x", "-n", "1", "-s", "1"], timeout=20 * s.slow, cwd="/")
    s.tally.check(r.code == 0 and not r.lines() and r.out and "built-in model" in r.err, "opt no model: the built-in one", r.tail())
    u("opt argument missing", "-n", words=["-n"])
    u("opt argument missing at the end", "--ids", "5", "--temp", words=["--temp"])
    ids = ["--ids", "5,6"]
    for opt, values in (("-n", ("-1", "x", "", "1.5", "99999999999999999999", "1e3", " 1", "1 ", "0x10")), ("-t", ("0", "-1", "x", "100000000")),
                        ("-c", ("0", "-1", "x", "99999999999")), ("-s", ("x", "-", "99999999999999999999999")), ("--temp", ("-1", "nan", "inf", "x", "1,5", "0x1p3")),
                        ("--top-p", ("0", "1.5", "-0.1", "nan", "x")), ("--min-p", ("-0.1", "1.5", "nan")), ("--top-k", ("-1", "x", "1.5")),
                        ("--effort", ("extreme", "")), ("--encoding", ("v9", "")), ("--devices", ("foo", "", "cuda:", "cuda:x", "cpu,,cpu", "cuda:99999999999", "cpu:", "cpu:x", "cpu:0x", "cpu:-1", "cpu: 0", "cuda:+1")),
                        ("--layers", ("x", "-1", "1,1", "4", "0x3", "")), ("--ids", ("x", "1,,2", "1,", "-1", "512", "99999999999999999999", "1;2", "1.0"))):
        for v in values:
            given = ids if opt != "--ids" else ["-n", "1"]
            u(f"opt {opt} {v!r}", *given, opt, v, words=[opt])
    u("opt --think and --nothink", "-p", "x", "--think", "--nothink")
    u("opt -p and -f", "-p", "x", "-f", "-", stdin=b"y")
    u("opt -p and --ids", "-p", "x", "--ids", "5")
    u("opt --exact on a GPU", *ids, "--exact", "--devices", "cuda:0")
    u("opt --devices a NUMA node that is not there", *ids, "--devices", "cpu:999", words=["cpu:999"], code=1)
    for path, what in (("/nonexistent", "does not exist"), ("/etc/passwd", "is a file"), ("", "is empty")):
        r = run([s.binary, "-m", path, *IDS], timeout=20)
        if s.wanted(f"opt model {what}"):
            s.judge(f"opt model {what}", r, 1 if path else r.code, [path])
    s.usage("opt --logits not writable", "--ids", "5", "-n", "0", "--logits", "/nonexistent/x", words=["/nonexistent/x"], code=1)
    s.usage("opt --logits on a full disk", "--ids", "5", "-n", "0", "--logits", "/dev/full", words=["/dev/full"], code=1)
    r = run([s.binary, "--help"], timeout=20)
    s.tally.check(r.code == 0 and b"-m" in r.out and not r.lines(), "opt --help", r.tail())


# ---- signals, pipes, other processes

class Running:
    """The program in the background, with its pipes."""
    def __init__(self, s, *args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=None):
        self.p = subprocess.Popen([s.binary, *args], stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, env={**os.environ, **SANITIZERS, **(env or {})})

    def finish(self, timeout):
        try:
            out, err = self.p.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.p.kill()
            out, err = self.p.communicate()
            return None, out or b"", err.decode("utf-8", "replace")
        return self.p.returncode, out or b"", err.decode("utf-8", "replace")


def stopped(s, name, sig, args, codes, delay, word=None):
    """Sends a signal after `delay` seconds; the program must end in time with one of the codes, and quietly."""
    if not s.wanted(name):
        return
    r, first = Running(s, *args), b""
    if callable(delay):
        first = delay(r)
    else:
        time.sleep(delay * s.slow)
    r.p.send_signal(sig)
    code, out, err = r.finish(5 * s.slow)
    s.tally.check(code in codes, f"{name}: exit {codes}", f"{code} {err[-300:]!r}")
    other = [line for line in err.split("\n") if line and not line.startswith("#") and not line.startswith("dsv4: ")]
    s.tally.check(not other, f"{name}: quiet", err[-300:])
    try:
        (first + out).decode("utf-8")
        whole = True
    except UnicodeDecodeError:
        whole = False
    s.tally.check(whole, f"{name}: no partial character on stdout", repr(out[-20:]))


def first_output(r):
    return os.read(r.p.stdout.fileno(), 1)


def wait_for_err(r, word):
    """Until the program has said `word` on stderr, or has ended."""
    seen = b""
    while word not in seen:
        part = os.read(r.p.stderr.fileno(), 4096)
        if not part:
            return
        seen += part


def signals(s):
    many = ",".join(["5", "9"] * 30000)
    slow = ["-m", s.long, "--ids", many, "-c", "65536", "-n", "0", "--exact", "-t", "1"]
    endless = ["-m", s.long, "--raw", "-p", "hello", "-n", "1000000", "-c", "65536", "--top-k", "40", "-s", "1", "-t", "1"]
    sigs = ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129))
    for sig, code in sigs:
        ok = (code, -sig, 130)
        n = "19" if sig == signal.SIGINT else "20"
        stopped(s, f"{n} {sig.name} at start", sig, slow, ok, 0.003)
        stopped(s, f"{n} {sig.name} in prefill", sig, slow, ok, 0.15)
        stopped(s, f"{n} {sig.name} in decode", sig, endless, ok, first_output)
    if s.wanted("19 two SIGINTs"):
        r = Running(s, "-m", s.long, "--ids", many, "-c", "65536", "-n", "0", "--exact", "-t", "1", "--chunk", "60000")
        wait_for_err(r, b"cpu:")                    # loading is over, the one chunk takes long
        r.p.send_signal(signal.SIGINT)
        r.p.send_signal(signal.SIGINT)
        code, _, err = r.finish(5 * s.slow)
        s.tally.check(code == 130, "19 two SIGINTs end it at once", f"{code} {err[-300:]!r}")
    pipes(s, endless)
    terminal(s)


def pipes(s, endless):
    if s.wanted("20 reader goes away"):
        r = Running(s, *endless)
        first_output(r)
        r.p.stdout.close()
        r.p.stdout = None
        code, _, err = r.finish(5 * s.slow)
        s.tally.check(code in (0, 1, 141, -signal.SIGPIPE), "20 reader goes away: ends", f"{code} {err[-300:]!r}")
    if s.wanted("20 stdout closed"):
        r = run(["sh", "-c", 'exec "$@" >&-', "sh", s.binary, "-m", s.base, *IDS], timeout=20 * s.slow)
        s.tally.check(r.code == 1 and len(r.lines()) == 1, "20 stdout closed: one line, exit 1", r.tail())
        state = s.state()
        s.tally.check(state == s.base_state, "20 stdout closed: nothing written over a file")
    if s.wanted("20 stdout full"):
        r = run(["sh", "-c", 'exec "$@" >/dev/full', "sh", s.binary, "-m", s.base, *IDS], timeout=20 * s.slow)
        s.tally.check(r.code == 1 and len(r.lines()) == 1 and r.lines()[0].startswith("dsv4: "), "20 stdout full: one line, exit 1", r.tail())
    if s.wanted("20 stderr closed"):
        r = run(["sh", "-c", 'exec "$@" 2>&-', "sh", s.binary, "-m", s.base, *IDS], timeout=20 * s.slow)
        s.tally.check(r.code == 0 and len(r.out.split()) == 2, "20 stderr closed: still answers", r.tail())
    if s.wanted("20 all descriptors closed"):
        r = run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", s.binary, "-m", s.base, *IDS], timeout=20 * s.slow)
        s.tally.check(r.code in (0, 1) and s.state() == s.base_state, "20 all descriptors closed: ends, model intact", r.tail())
    if s.wanted("32 prompt in small pieces"):
        r, w = os.pipe()
        run_ = Running(s, "-m", s.base, "-f", "-", "-n", "1", "--temp", "0", "--show-ids", stdin=r)
        os.close(r)
        for piece in (b"he", b"l\xe4", b"\xbd", b"\xa0", b"lo"):
            try:
                os.write(w, piece)
            except BrokenPipeError:
                break
            run_.p.send_signal(signal.SIGCONT)
            run_.p.send_signal(signal.SIGWINCH)
            time.sleep(0.03)
        os.close(w)
        code, out, err = run_.finish(10 * s.slow)
        whole = run([s.binary, "-m", s.base, "-f", "-", "-n", "1", "--temp", "0", "--show-ids"], stdin=b"hel\xe4\xbd\xa0lo")
        s.tally.check(code == 0 and out == whole.out, "32 prompt in small pieces: the same answer", f"{code} {out!r} {whole.out!r} {err[-200:]!r}")


def terminal(s):
    """Chat on a terminal: Ctrl-C stops the answer, the prompt comes back; end of input ends the program."""
    name = "19 chat"
    if not s.wanted(name):
        return
    pid, fd = pty.fork()
    if pid == 0:
        os.environ.update(SANITIZERS)
        os.execv(s.binary, [s.binary, "-m", s.long, "-c", "65536", "--top-k", "40", "-s", "1", "-t", "1"])
    seen = b""

    def read_for(seconds, stop=None):
        nonlocal seen
        end, got = time.time() + seconds * s.slow, b""
        os.set_blocking(fd, False)
        while time.time() < end:
            try:
                part = os.read(fd, 4096)
                if not part:
                    break
                got += part
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                break
            if stop and stop(got):
                break
        seen += got
        return got

    def alive():
        return os.waitpid(pid, os.WNOHANG)[0] == 0
    read_for(1.0)
    os.write(fd, b"hello\n")
    read_for(3, lambda g: len(g) > 60)
    os.write(fd, b"\x03")
    read_for(1.0)
    ok = alive()
    s.tally.check(ok, f"{name}: Ctrl-C stops the answer, not the program", repr(seen[-300:]))
    if ok:
        read_for(0.3)
        quiet = read_for(0.3)
        s.tally.check(len(quiet) < 200, f"{name}: the answer has stopped", repr(quiet[-200:]))
        os.kill(pid, signal.SIGWINCH)
        os.write(fd, b"again\n")
        got = read_for(3, lambda g: len(g) > 40)
        s.tally.check(len(got) > 10, f"{name}: a second turn answers", repr(got))
        os.write(fd, b"\x03")
        read_for(0.7)
        os.write(fd, b"\x04")
        end, status = time.time() + 5 * s.slow, None
        while time.time() < end and status is None:
            read_for(0.1)
            done, st = os.waitpid(pid, os.WNOHANG)
            status = os.waitstatus_to_exitcode(st) if done else None
        s.tally.check(status == 0, f"{name}: end of input ends it with 0", f"{status} {seen[-300:]!r}")
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    os.close(fd)
    if s.wanted("19 chat from a pipe"):
        r = run([s.binary, "-m", s.base, "--temp", "0", "-n", "3"], stdin=b"hello\nagain\n", timeout=20 * s.slow)
        s.tally.check(r.code == 0 and not r.sanitizer(), "19 chat from a pipe: ends with the input", r.tail())


def injected(s):
    """System calls that fail, by a preloaded library: the file is named, or the answer is what it should be."""
    env = fault_library(s.work, s.tally)
    text = ["-p", "hello", "-n", "2", "--temp", "0"]
    for f in ("config.json", INDEX, "tokenizer.json", "generation_config.json", SHARD, SHARD2):
        def there(d, f=f):
            if not os.path.exists(os.path.join(d, f)):
                put(d, f, "{}")
        for call, error, word in (("open", 5, "nput/output"), ("open", 24, "open files"), ("open", 13, "ermission"), ("fstat", 5, "nput/output"),
                                  ("mmap", 12, "annot allocate"), ("mmap", 5, "nput/output")):
            s.refused(f"32 {call} of {f} fails with {error}", there, f, word, args=text, env={**env, "FAULT": f"{call}@{f}:{error}"})
    for f in (INDEX, "tokenizer.json", SHARD):
        s.refused(f"32 {f} shrinks after it was opened", cut(f, 4096), f, "shrink", args=text, env={**env, "FAULT": f"fstat@{f}:grown"})
        s.refused(f"32 {f} is shorter than it says", nothing, f, args=text, env={**env, "FAULT": f"fstat@{f}:grown"})
    prompt = os.path.join(s.work, "prompt.txt")
    data = ("hello the area \u4f60\u597d! " * 200).encode()
    with open(prompt, "wb") as f:
        f.write(data)
    one = ["-n", "3", "--temp", "0", "--show-ids"]
    s.refused("32 reading the prompt's file fails", nothing, "prompt.txt", "nput/output", args=["-f", prompt, *one], env={**env, "FAULT": "read@prompt.txt:5"})
    s.refused("32 reading stdin fails", nothing, "standard input", "nput/output", args=["-f", "-", *one], stdin=data, env={**env, "FAULT": "read@]:5"})
    s.refused("32 reading stdin fails, tokenize", nothing, "standard input", "nput/output", command=["tokenize"], args=[], stdin=data, env={**env, "FAULT": "read@]:5"})
    for what, how in (("the prompt's file", dict(args=["--raw", "-f", prompt, *one])), ("stdin", dict(args=["--raw", "-f", "-", *one], stdin=data)),
                      ("stdin of tokenize", dict(command=["tokenize"], args=[], stdin=data))):
        whole = s.accepted(f"32 {what}, whole reads", nothing, **how)
        short = s.accepted(f"32 {what}, short and interrupted reads", nothing, env={**env, "FAULT": "short"}, **how)
        s.tally.check(not whole or whole.out == short.out and len(whole.out) > 4, f"32 {what}: the same from short reads", f"{whole and whole.out[:80]!r}")


def surroundings(s):
    if s.wanted("32 shrinking file"):
        d = os.path.join(s.work, "shrink")
        M.make(d, "int", {"vocab_size": 8192, "max_position_embeddings": 65536}, shards=1)
        f = "model-00001-of-00001.safetensors"
        many = ",".join(["5", "800"] * 15000)
        r = Running(s, "-m", d, "--ids", many, "-c", "65536", "-n", "35000", "--temp", "0", "-t", "2")
        time.sleep(0.25 * s.slow)
        os.truncate(os.path.join(d, f), 4096)
        code, _, err = r.finish(10 * s.slow)
        lines = [line for line in err.split("\n") if line and not line.startswith("#")]
        good = code == 1 and len(lines) == 1 and lines[0].startswith("dsv4: ") and f in lines[0]
        s.tally.check(good, "32 shrinking file: named, exit 1", f"{code} {err[-300:]!r}")
    plain = run([s.binary, "-m", s.base, *IDS, "-s", "3"]).out
    if s.wanted("34 two processes"):
        rs = [Running(s, "-m", s.base, *IDS, "-s", "3") for _ in range(4)]
        outs = [r.finish(20 * s.slow) for r in rs]
        s.tally.check(all(c == 0 and o == plain for c, o, _ in outs), "34 several processes on one model", str(outs)[:300])
    if s.wanted("34 decimal comma"):
        loc = os.path.join(s.work, "locales")
        os.mkdir(loc)
        made = run(["localedef", "-i", "tr_TR", "-f", "UTF-8", os.path.join(loc, "tr_TR.UTF-8")]) if shutil.which("localedef") else None
        s.tally.check(made is not None and os.path.exists(os.path.join(loc, "tr_TR.UTF-8")), "34 a locale with a decimal comma to test with")
        hot = ["--ids", "0,5,6,7", "-n", "6", "--temp", "0.7", "--top-p", "0.95", "-s", "3"]
        here = run([s.binary, "-m", s.base, *hot])
        there = run([s.binary, "-m", s.base, *hot], env={"LOCPATH": loc, "LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8"})
        s.tally.check(here.code == 0 and (here.code, here.out) == (there.code, there.out), "34 LANG=tr_TR: the same answer", there.tail())
    if s.wanted("34 read-only HOME"):
        ro = os.path.join(s.work, "ro")
        os.mkdir(ro)
        os.chmod(ro, 0o500)
        r = run([s.binary, "-m", s.base, *IDS, "-s", "3"], env={"HOME": ro, "XDG_CACHE_HOME": ro, "TMPDIR": ro}, cwd=ro)
        s.tally.check(r.code == 0 and r.out == plain and not os.listdir(ro), "34 read-only HOME: runs, writes nothing", r.tail())
        r = run(["env", "-i", *[f"{k}={v}" for k, v in SANITIZERS.items()], s.binary, "-m", s.base, *IDS, "-s", "3"])
        s.tally.check(r.code == 0 and r.out == plain, "34 empty environment: runs", r.tail())
    if s.wanted("34 few descriptors"):
        def limited():
            resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
        p = subprocess.run([s.binary, "-m", s.base, *IDS, "-s", "3"], capture_output=True, preexec_fn=limited, timeout=20 * s.slow,
                           env={**os.environ, **SANITIZERS})
        s.tally.check(p.returncode == 0 and p.stdout == plain, "34 sixteen descriptors are enough", p.stderr.decode()[-200:])
    if s.wanted("34 little memory") and s.slow == 1:
        def small():
            resource.setrlimit(resource.RLIMIT_AS, (64 << 20, 64 << 20))
        p = subprocess.run([s.binary, "-m", s.base, "--ids", "5", "-n", "1", "-c", "4096", "-t", "8"], capture_output=True, preexec_fn=small, timeout=20)
        lines = [x for x in p.stderr.decode().split("\n") if x and not x.startswith("#")]
        good = p.returncode == 0 or (p.returncode == 1 and len(lines) == 1 and lines[0].startswith("dsv4: "))
        s.tally.check(good, "34 64 MB of address space: runs or one line", f"{p.returncode} {p.stderr[-300:]!r}")
    if s.wanted("34 read-only checkpoint"):
        d = s.copy()
        os.chmod(d, 0o500)
        r = run([s.binary, "-m", d, *IDS, "-s", "3"])
        s.tally.check(r.code == 0 and r.out == plain, "34 read-only checkpoint: runs", r.tail())
        os.chmod(d, 0o700)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--dsv4", default="./dsv4")
    ap.add_argument("--slow", type=float, default=1, help="factor on every time limit")
    ap.add_argument("--only", help="only cases whose name contains this")
    ap.add_argument("--parts", help="only these groups, comma separated")
    ap.add_argument("-v", action="store_true")
    a = ap.parse_args()
    tally = Tally(a.v)
    parts = [shards, bind, offsets, headers, duplicates, json_rules, tables, configs, tokenizers, prompts, options, injected, signals, surroundings]
    with tempfile.TemporaryDirectory() as work:
        s = Suite(os.path.abspath(a.dsv4), work, a.slow, a.only, tally)
        for part in parts:
            if not a.parts or part.__name__ in a.parts.split(","):
                part(s)
        tally.check(s.state() == s.base_state, "no file of the model was changed")
    tally.end("faults")


if __name__ == "__main__":
    main()
