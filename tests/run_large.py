#!/usr/bin/env python3
"""What needs size: a full-size checkpoint made of holes, and a context beyond 65,536 positions on a tiny model.

  run_large.py [--dsv4 ./dsv4] [--parts sparse,long] [--make] [-v]

--make computes tests/golden/long.npz anew with tools/reference.py (minutes).
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time
import zlib

import numpy as np

from common import GOLDEN, ROOT, Tally
import check
import formats as F
import make_checkpoint as M
import reference

LONG, ROWS = 66000, 64      # prompt tokens; the last rows that are compared
STORED = os.path.join(GOLDEN, "long.npz")


def measured(args):
    """Exit code, stdout, stderr, processor seconds and peak resident bytes of a command."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        p = subprocess.Popen(args, stdout=out, stderr=err, stdin=subprocess.DEVNULL)
        _, status, usage = os.wait4(p.pid, 0)
        p.returncode = os.waitstatus_to_exitcode(status)
        seconds = usage.ru_utime + usage.ru_stime
        out.seek(0), err.seek(0)
        return p.returncode, out.read(), err.read().decode("utf-8", "replace"), seconds, usage.ru_maxrss * 1024


def touched_bytes(cfg, fmt):
    """Weight bytes that one token of an all-zero model reads: every tensor but the embedding table, the tables of the
    hash layers, the MTP layer and the experts that are not chosen (all-zero tables choose expert 0 alone)."""
    total = 0
    for name, kind, shape in F.tensor_table(cfg):
        p = name.split(".")
        if p[0] in ("mtp", "embed") or kind == "i64":
            continue
        if kind == "expert":
            chosen = 1 if int(p[1]) < cfg["num_hash_layers"] else cfg["num_experts_per_tok"]
            if int(p[4]) >= chosen:
                continue
        if p[0] == "layers" and name.endswith("gate.weight") and int(p[1]) < cfg["num_hash_layers"]:
            continue
        total += sum(F.Tensor(d, None, sh).nbytes() for _, d, sh in F.stored(name, kind, shape, fmt))
    return total


def sparse(dsv4, tally, work):
    for fmt in ("int", "native"):
        d = os.path.join(work, "sparse-" + fmt)
        t = time.monotonic()
        subprocess.run([sys.executable, os.path.join(ROOT, "tools", "sparse_checkpoint.py"), d, "--format", fmt], check=True, stdout=subprocess.DEVNULL)
        tally.check(time.monotonic() - t < 30, f"sparse {fmt}: written in seconds", f"{time.monotonic() - t:.1f}")
        code, out, err, seconds, rss = measured([dsv4, "info", "-m", d])
        print(f"# info on 69,187 tensors ({fmt}): {seconds:.2f} s, peak {rss / 2**20:.0f} MiB")
        tally.check(code == 0, f"sparse {fmt}: info runs", err[-300:])
        tally.check(seconds < 2, f"sparse {fmt}: info in 2 s", f"{seconds:.2f}")
        tally.check(rss < 300e6, f"sparse {fmt}: info in 300 MB", f"{rss / 1e6:.0f} MB")
        if fmt == "native":
            continue
        code, out, err, seconds, rss = measured([dsv4, "-m", d, "--ids", "5", "-n", "0", "-c", "4096"])
        want = touched_bytes(F.config(fmt), fmt)
        print(f"# one token through it: {seconds:.1f} s, peak resident {rss / 1e9:.2f} GB, weights touched by the model {want / 1e9:.2f} GB")
        tally.check(code == 0, "sparse: one token runs", f"{code} {err[-300:]}")
        if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") > 180e9:
            continue                            # the model fits into this machine's memory, so all of it is loaded
        tally.check(abs(rss - want) < 0.08 * want, "sparse: touches the bytes of one token and no more", f"{rss / 1e9:.3f} GB, expected {want / 1e9:.3f} GB")


def long_model(work):
    """The tiny long-context checkpoint, a text of LONG - 1 ASCII characters, each one token, and the ids."""
    d = os.path.join(work, "long")
    M.make(d, "int", M.PRESETS["long"], seed=1)
    with open(os.path.join(d, "tokenizer.json"), "w", encoding="utf-8") as f:
        M.json.dump(M.small_tokenizer(merges=0), f, ensure_ascii=False)
    chars = np.random.default_rng(66).integers(33, 127, LONG - 1).astype(np.uint8)
    crc = 0
    for name in sorted(os.listdir(d)):
        if name.endswith(".safetensors"):
            crc = zlib.crc32(open(os.path.join(d, name), "rb").read(), crc)
    return d, bytes(chars), [0] + (chars.astype(int) - 33 + 3).tolist(), crc


def long_expected(d, ids, crc):
    """Exact rows and the default path's reference numbers, from the stored file if it belongs to this checkpoint."""
    if os.path.exists(STORED):
        z = np.load(STORED)
        if int(z["crc"]) == zlib.crc32(np.array(ids, np.int32).tobytes(), crc):
            return z["exact"].astype(np.float64), z["default"].astype(np.float64)
    print("# computing the reference, this takes minutes", flush=True)
    exact = reference.run(d, ids)[0][-ROWS:]
    soft = reference.run(d, ids, default=True)[0][-ROWS:]
    np.savez_compressed(STORED, exact=exact.astype(np.float32), default=soft.astype(np.float32),
                        crc=zlib.crc32(np.array(ids, np.int32).tobytes(), crc))
    return exact, soft


def long_context(dsv4, tally, work):
    d, text, ids, crc = long_model(work)
    want, soft = long_expected(d, ids, crc)
    prompt, short = os.path.join(work, "prompt.txt"), os.path.join(work, "short.txt")
    open(prompt, "wb").write(text)
    open(short, "wb").write(text[:1999])
    rule = float(np.median(check.cosines(soft, want))), float((soft.argmax(1) == want.argmax(1)).mean())
    rss = {}
    for mode in ([], ["--exact"]):
        name = "long " + (mode[0] if mode else "default")
        for f, n in ((short, 2000), (prompt, LONG)):
            out = os.path.join(work, "long.f32")
            code, _, err, seconds, rss[n] = measured([dsv4, "-m", d, "--raw", "-f", f, "-n", "0", "-c", "70000", "--logits", out, *mode])
            tally.check(code == 0, f"{name}: {n} tokens run", err[-300:])
        print(f"# {name}: {LONG} tokens in {seconds:.1f} s, peak resident {rss[LONG] / 2**20:.1f} MiB, {rss[2000] / 2**20:.1f} MiB with 2,000 tokens: "
              f"{(rss[LONG] - rss[2000]) / (LONG - 2000):.0f} bytes per token")
        tally.check(rss[LONG] - rss[2000] < 64 << 20, f"{name}: memory is bounded")
        size = os.path.getsize(out)
        if not tally.check(size == LONG * 512 * 4, f"{name}: logits file", str(size)):
            continue
        x = np.fromfile(out, "<f4", offset=(LONG - ROWS) * 512 * 4).reshape(ROWS, 512).astype(np.float64)
        verdict = check.judge_exact(x, want, want.std()) if mode else check.judge_default(x, want, *rule)
        tally.check(verdict[0], f"{name}: last {ROWS} of {LONG} rows", verdict[1])


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--dsv4", default="./dsv4")
    ap.add_argument("--parts", default="sparse,long")
    ap.add_argument("--make", action="store_true")
    ap.add_argument("-v", action="store_true")
    a = ap.parse_args()
    tally = Tally(a.v)
    with tempfile.TemporaryDirectory() as work:
        if a.make:
            if os.path.exists(STORED):
                os.unlink(STORED)
            d, _, ids, crc = long_model(work)
            long_expected(d, ids, crc)
            return
        for name, part in (("sparse", sparse), ("long", long_context)):
            if name in a.parts.split(","):
                part(os.path.abspath(a.dsv4), tally, work)
    tally.end("large")


if __name__ == "__main__":
    main()
