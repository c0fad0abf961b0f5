#!/usr/bin/env python3
"""The forward pass on small checkpoints against stored and computed values.

  run_golden.py [--dsv4 ./dsv4] [--quick] [--work DIR] [-v]

Golden files and checkpoints of other shapes, each in several formats: --exact and the default path at every prompt position, MTP
logits, greedy tokens; then bit-identity over chunk sizes, thread counts, decode against prefill, and layouts of the files.
--quick leaves out the large ones (for sanitizer builds).
"""
import argparse
import filecmp
import json
import os
import shutil
import struct
import tempfile

import numpy as np

from common import GOLDEN, Tally, ids_arg, run
import check
import formats as F
import make_checkpoint as M
import reference


class Engine:
    """Runs the program and reads the logits files that it wrote."""
    def __init__(self, binary, work, tally):
        self.binary, self.work, self.tally, self.count = binary, work, tally, 0

    def file(self):
        self.count += 1
        return os.path.join(self.work, f"out{self.count}.f32")

    def run(self, name, model, ids, *args, timeout=600):
        r = run([self.binary, "-m", model, "--ids", ids_arg(ids), *map(str, args)], timeout=timeout)
        good = r.code == 0 and not r.lines() and not r.sanitizer()
        self.tally.check(good, f"{name}: runs", "" if good else r.tail())
        return r

    def logits(self, name, model, ids, vocab, *args, mtp=False):
        """Logits [T,V] (and MTP logits), None if the run failed or a file has the wrong size. Also their paths."""
        paths = [self.file(), self.file() if mtp else None]
        extra = ["--mtp-logits", paths[1]] if mtp else []
        r = self.run(name, model, ids, "-n", 0, "--logits", paths[0], *extra, *args)
        self.tally.check(r.out == b"", f"{name}: -n 0 prints nothing", repr(r.out[:60]))
        got = [self.read(p, len(ids), vocab, name) if p else None for p in paths]
        return got, paths

    def read(self, path, rows, vocab, name):
        size = os.path.getsize(path) if os.path.exists(path) else -1
        if not self.tally.check(size == rows * vocab * 4, f"{name}: logits file", f"{size} bytes, expected {rows * vocab * 4}"):
            return None
        return np.fromfile(path, "<f4").reshape(rows, vocab).astype(np.float64)


def judged(tally, name, verdict):
    tally.check(verdict[0], name, verdict[1])


def golden(eng, tally):
    for model in ("aligned/int", "aligned/native", "edge/int", "edge/native"):
        path = os.path.join(GOLDEN, model)
        e = json.load(open(path + ".json"))
        want = np.load(path + ".logits.npy").astype(np.float64)
        mtp = np.load(path + ".mtp.npy")
        ids, V = e["prompt"] + e["continuation"], e["vocab"]
        (x, m), _ = eng.logits(f"{model} exact", path, ids, V, "--exact", mtp=True)
        if x is not None:
            judged(tally, f"{model} exact logits", check.judge_exact(x, want, e["logit_std"]))
        if m is not None:
            judged(tally, f"{model} exact MTP", check.judge_mtp(m, e, mtp))
            good = (np.abs(m - mtp).max(1) <= 0.02).mean() >= 0.97
            tally.check(good, f"{model} exact MTP within FP16 rounding of the stored values")
        (x, m), _ = eng.logits(f"{model} default", path, ids, V, mtp=True)
        if x is not None:
            judged(tally, f"{model} default logits", check.judge_default(x, want, *check.INT8[model]))
        default_mtp(tally, f"{model} default MTP", path, ids, m)
        r = eng.run(f"{model} greedy", path, e["prompt"], "-n", 32, "--temp", 0, "--exact")
        got = [int(t) for t in r.out.split()] if r.out.strip() else []
        judged(tally, f"{model} greedy tokens", check.judge_greedy(got, e))


def default_mtp(tally, name, path, ids, got):
    """The default path's MTP logits: the rule of the default path, against the reference with the same roundings."""
    if got is None:
        return
    want = reference.run(path, ids, mtp=True)[1]
    rounded = reference.run(path, ids, default=True, mtp=True)[1]
    judged(tally, name, check.judge_default(got, want, *rule_from(want, rounded)))


def rule_from(want, rounded):
    return float(np.median(check.cosines(rounded, want))), float((rounded.argmax(1) == want.argmax(1)).mean())


def made(eng, tally, work, presets, formats, tokens):
    """Checkpoints of other shapes: the expected values come from tools/reference.py."""
    for preset in presets:
        for fmt in ["bf16"] if preset == "ragged" else formats:
            path = os.path.join(work, f"{preset}-{fmt}")
            cfg = M.make(path, fmt, M.PRESETS[preset])
            V, has_mtp = cfg["vocab_size"], cfg["num_nextn_predict_layers"] > 0
            rng = np.random.default_rng(len(preset))
            ids = [0] + rng.integers(3, V, tokens - 1).tolist()
            want, wmtp = reference.run(path, ids, mtp=has_mtp)
            soft, smtp = reference.run(path, ids, default=True, mtp=has_mtp)
            name = f"{preset}/{fmt}"
            (x, m), _ = eng.logits(f"{name} exact", path, ids, V, "--exact", mtp=has_mtp)
            if x is not None:
                judged(tally, f"{name} exact logits", check.judge_exact(x, want, want.std()))
            if m is not None:
                judged(tally, f"{name} exact MTP", check.judge_exact(m, wmtp, wmtp.std()))
            (x, m), _ = eng.logits(f"{name} default", path, ids, V, mtp=has_mtp)
            if x is not None:
                judged(tally, f"{name} default logits", check.judge_default(x, want, *rule_from(want, soft)))
            if m is not None:
                judged(tally, f"{name} default MTP", check.judge_default(m, wmtp, *rule_from(wmtp, smtp)))


def same_bits(eng, tally, name, path, ids, vocab, base_args, variants, mtp=True):
    """Every variant of the options gives the same bytes as none."""
    _, first = eng.logits(f"{name}", path, ids, vocab, *base_args, mtp=mtp)
    for v in variants:
        _, other = eng.logits(f"{name} {' '.join(map(str, v))}", path, ids, vocab, *base_args, *v, mtp=mtp)
        for a, b, what in zip(first, other, ("logits", "MTP logits")):
            if a:
                same = os.path.exists(a) and os.path.exists(b) and filecmp.cmp(a, b, shallow=False)
                tally.check(same, f"{name} {' '.join(map(str, v))}: {what} identical")
                if os.path.exists(b):
                    os.unlink(b)


def identity(eng, tally, quick):
    """Chunk sizes and thread counts, bit for bit."""
    chunks = [("--chunk", c) for c in ((3, 128) if quick else (1, 2, 3, 7, 8, 9, 64, 128, 60000))]
    threads = [("-t", t) for t in ((1, 4) if quick else (1, 2, 3, 8))]
    both = [("--chunk", 5, "-t", 3)]
    for model in ("edge/int",) if quick else ("edge/int", "aligned/int", "edge/native", "aligned/native"):
        path = os.path.join(GOLDEN, model)
        e = json.load(open(path + ".json"))
        same_bits(eng, tally, model, path, e["prompt"], e["vocab"], [], chunks + threads + both)
        same_bits(eng, tally, f"{model} exact", path, e["prompt"], e["vocab"], ["--exact"], [chunks[0], chunks[-1], threads[-1]])


def available_levels():
    """The instruction-set levels of this processor, as --isa names them."""
    flags = set(open("/proc/cpuinfo").read().split("flags", 1)[-1].split("\n", 1)[0].split())
    need = {"portable": set(), "avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512bw", "avx512vl"}, "avx512-vnni": {"avx512_vnni", "avx512vl"}}
    return [k for k, v in need.items() if v <= flags]


def isa_levels(eng, tally, quick):
    """Every instruction-set level that this processor has keeps the rule of the default path, and its own bits over chunks."""
    r = eng.run("--isa portable", os.path.join(GOLDEN, "edge/int"), [0, 5], "-n", 1, "--isa", "portable")
    for level in available_levels() if r.code == 0 else []:
        for model in ("edge/int", "aligned/int", "aligned/native", "edge/native"):
            path = os.path.join(GOLDEN, model)
            e = json.load(open(path + ".json"))
            want = np.load(path + ".logits.npy").astype(np.float64)
            (x, _), _ = eng.logits(f"{model} {level}", path, e["prompt"] + e["continuation"], e["vocab"], "--isa", level)
            if x is not None:
                judged(tally, f"{model} {level}: default logits", check.judge_default(x, want, *check.INT8[model]))
            if not quick:
                same_bits(eng, tally, f"{model} {level}", path, e["prompt"], e["vocab"], ["--isa", level],
                          [("--chunk", 1), ("--chunk", 3), ("--chunk", 7), ("-t", 1)], mtp=False)


def decode_is_prefill(eng, tally, work, quick):
    """Generated tokens are the argmax of the logits that a prefill of the same tokens gives; seeds repeat."""
    models = [os.path.join(GOLDEN, "edge/int"), os.path.join(GOLDEN, "aligned/native")]
    for path in models[:1] if quick else models:
        e = json.load(open(path + ".json"))
        for mode in ([], ["--exact"]):
            name = f"{e['name']}/{e['format']} {' '.join(mode) or 'default'}"
            r = eng.run(f"{name} decode", path, e["prompt"][:50], "-n", 100, "--temp", 0, *mode)
            out = [int(t) for t in r.out.split()]
            (x, _), _ = eng.logits(f"{name} prefill of it", path, e["prompt"][:50] + out, e["vocab"], *mode)
            if x is not None:
                best = x.argmax(1)[49:-1].tolist()
                full = out == best and (len(out) == 100 or out[-1] == 1)
                tally.check(full, f"{name}: decode equals prefill", f"{out[:8]} {best[:8]} {len(out)}")
        texts = {run([eng.binary, "-m", path, "--ids", ids_arg(e["prompt"][:20]), "-n", "40", "--temp", "1", "-s", "7", *t]).out
                 for t in ([], ["-t", "1"], ["-t", "3"], ["--chunk", "3"])}
        tally.check(len(texts) == 1 and texts != {b""}, f"{e['name']}: one seed, one text", str(texts)[:200])
        other = run([eng.binary, "-m", path, "--ids", ids_arg(e["prompt"][:20]), "-n", "40", "--temp", "1", "-s", "8"]).out
        tally.check(other not in texts, f"{e['name']}: another seed, another text")


def relayout(src, dst, how):
    """A copy of a checkpoint with every shard written in another legal way."""
    os.makedirs(dst, exist_ok=True)
    for f in os.listdir(src):
        if not f.endswith(".safetensors"):
            shutil.copy(os.path.join(src, f), dst)
            continue
        tensors = F.read_file(os.path.join(src, f))
        names = list(tensors)
        if how == "shuffled":
            np.random.default_rng(3).shuffle(names)
        head, at = {}, 0
        for n in names:
            head[n] = {"data_offsets": [at, at + tensors[n].nbytes()], "shape": list(tensors[n].shape), "dtype": tensors[n].dtype}
            at += tensors[n].nbytes()
        if how == "shuffled":       # the header's order says nothing about the data's
            head = dict(sorted(head.items(), reverse=True))
            head["__metadata__"] = {"format": "pt", "note": "\u00e9\u20ac"}
        text = json.dumps(head, indent=1 if how == "shuffled" else None, ensure_ascii=how == "shuffled").encode()
        text += b" " * ({"odd": 9, "shuffled": 6, "even": 8}[how] - len(text) % 8)
        with open(os.path.join(dst, f), "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for n in names:
                tensors[n].bits.tofile(out)


def layouts(eng, tally, work):
    """Data at odd addresses, tensors in any order, one shard or many: the same logits."""
    for model in ("edge/int", "edge/native"):
        src = os.path.join(GOLDEN, model)
        e = json.load(open(src + ".json"))
        _, first = eng.logits(model, src, e["prompt"], e["vocab"], mtp=True)
        _, exact = eng.logits(model, src, e["prompt"], e["vocab"], "--exact")
        for how in ("even", "odd", "shuffled"):
            dst = os.path.join(work, f"layout-{how}-{e['format']}")
            relayout(src, dst, how)
            _, other = eng.logits(f"{model} {how}", dst, e["prompt"], e["vocab"], mtp=True)
            for a, b in zip(first, other):
                tally.check(os.path.exists(b) and filecmp.cmp(a, b, shallow=False), f"{model} {how} layout: identical")
            _, other = eng.logits(f"{model} {how}", dst, e["prompt"], e["vocab"], "--exact")
            tally.check(os.path.exists(other[0]) and filecmp.cmp(exact[0], other[0], shallow=False), f"{model} {how} layout, exact: identical")
    for shards, split in ((1, False), (7, False), (3, True)):
        dst = os.path.join(work, f"shards-{shards}")
        cfg = M.make(dst, "native", {}, shards=shards, split_pairs=split)
        ids = list(range(3, 60))
        _, other = eng.logits(f"{shards} shards", dst, ids, cfg["vocab_size"])
        if shards == 1:
            one = other
        same = os.path.exists(other[0]) and filecmp.cmp(one[0], other[0], shallow=False)
        tally.check(same, f"{shards} shards{', scales apart' if split else ''}: identical")


def converter_yardstick(tally, work):
    """tools/formats.py's requantiser gives the golden int shards byte for byte."""
    for name in ("aligned", "edge"):
        src = os.path.join(GOLDEN, name, "native")
        for f in sorted(os.listdir(src)):
            if f.endswith(".safetensors"):
                out = os.path.join(work, "requant.safetensors")
                F.write_file(out, F.requantise(F.read_file(os.path.join(src, f))))
                tally.check(filecmp.cmp(out, os.path.join(GOLDEN, name, "int", f), shallow=False), f"{name} {f}: requantised")


def reference_itself(tally):
    """tools/reference.py agrees with the golden values."""
    for model in ("aligned/int", "aligned/native", "edge/int", "edge/native"):
        path = os.path.join(GOLDEN, model)
        e = json.load(open(path + ".json"))
        got, mtp = reference.run(path, e["prompt"] + e["continuation"], mtp=True)
        diff = np.abs(got - np.load(path + ".logits.npy")).max()
        tally.check(diff < 2e-4, f"reference on {model}", f"{diff:.2e}")
        diff = np.abs(mtp - np.load(path + ".mtp.npy")).max()
        tally.check(diff < 0.03, f"reference's MTP on {model}", f"{diff:.2e}")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--dsv4", default="./dsv4")
    ap.add_argument("--quick", action="store_true")
    ap.add_argument("--only", help="names of parts, comma separated")
    ap.add_argument("-v", action="store_true")
    a = ap.parse_args()
    tally = Tally(a.v)
    with tempfile.TemporaryDirectory() as work:
        eng = Engine(os.path.abspath(a.dsv4), work, tally)
        parts = {
            "tools": lambda: (reference_itself(tally), converter_yardstick(tally, work)),
            "golden": lambda: golden(eng, tally),
            "made": lambda: made(eng, tally, work, ["odd"] if a.quick else list(M.PRESETS), ["int", "native", "bf16"], 150 if a.quick else 600),
            "long": lambda: a.quick or made(eng, tally, work, ["odd", "hc2", "hca"], ["int"], 700),
            "identity": lambda: identity(eng, tally, a.quick),
            "isa": lambda: isa_levels(eng, tally, a.quick),
            "decode": lambda: decode_is_prefill(eng, tally, work, a.quick),
            "layouts": lambda: layouts(eng, tally, work),
        }
        for name, part in parts.items():
            if not a.only or name in a.only.split(","):
                part()
    tally.end("golden")


if __name__ == "__main__":
    main()
