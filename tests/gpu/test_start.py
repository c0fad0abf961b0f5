#!/usr/bin/env python3
"""How a GPU starts, on the simulated device: ready kernels with and without NVRTC, and the self-test.

  test_start.py [--dsv4 ./dsv4] [--sim build/sim]
"""
import argparse
import glob
import os
import shutil
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from suite import Gpu, one_line
from common import GOLDEN, ROOT, Tally, run

MODEL = os.path.join(GOLDEN, "edge/int")
ARGS = ["-m", MODEL, "--devices", "cuda:0", "--ids", "5,6,7", "-n", 3, "-c", 256, "--temp", 0]
NO_NVRTC = {"DSV4_NVRTC": "/nonexistent.so"}


def kept(folder):
    return sorted(glob.glob(os.path.join(folder, "*.ptx")))


def ready_kernels(gpu, t, work):
    good = gpu.run(ARGS)
    t.check(good.code == 0 and "compiled" in good.err and len(kept(gpu.cache)) == 1, "compiled and kept", good.tail())
    r = gpu.run(ARGS, libs=gpu.sim, **NO_NVRTC)
    t.check(r.code == 0 and r.out == good.out and "from the cache" in r.err, "kept kernels need no NVRTC", r.tail())
    other = gpu.run([*ARGS[:1], os.path.join(GOLDEN, "edge/native"), *ARGS[2:]])
    t.check(other.code == 0 and len(kept(gpu.cache)) == 2, "another model has its own kernels", other.tail())

    empty = os.path.join(work, "empty")
    one_line(t, "neither kept nor NVRTC", gpu.run(ARGS, libs=gpu.sim, DSV4_CACHE=empty, **NO_NVRTC), "NVRTC",
             "ready kernels", "/nonexistent.so")
    binary = os.path.join(ROOT, "build", "gpu", "embed", "dsv4")
    files = " ".join(kept(gpu.cache))
    made = run(["make", "-s", "CFLAGS=-O2", "PTX=" + files, "OUT=" + os.path.relpath(binary, ROOT)], timeout=300)
    if t.check(made.code == 0, "a program with embedded kernels", made.tail()):
        plain, gpu.binary = gpu.binary, binary
        for model, out in ((MODEL, good.out), (os.path.join(GOLDEN, "edge/native"), other.out)):
            r = gpu.run([*ARGS[:1], model, *ARGS[2:]], libs=gpu.sim, DSV4_CACHE=empty, **NO_NVRTC)
            t.check(r.code == 0 and r.out == out and "built in" in r.err, "embedded kernels need no NVRTC", r.tail())
        one_line(t, "embedded kernels are of one source", gpu.run([*ARGS, "--kernels", changed_source(work)], libs=gpu.sim,
                                                                  DSV4_CACHE=empty, **NO_NVRTC), "ready kernels")
        gpu.binary = plain


def changed_source(work):
    path = os.path.join(work, "changed.cu")
    with open(path, "w") as f:
        f.write(open(os.path.join(ROOT, "kernels.cu")).read() + "\n")
    return path


def damaged_files(gpu, t, work):
    good = gpu.run(ARGS)
    folder = os.path.join(work, "damaged")
    whole = {os.path.basename(p): open(p, "rb").read() for p in kept(gpu.cache)}
    for what, damage in (("a flipped bit", lambda b: b[:5000] + bytes([b[5000] ^ 1]) + b[5001:]),
                         ("cut in half", lambda b: b[:len(b) // 2]), ("cut in the head", lambda b: b[:30]),
                         ("empty", lambda b: b""), ("a wrong size", lambda b: b[:50] + b"ffffffff" + b[58:]),
                         ("another model's", lambda b: next(x for x in whole.values() if x != b))):
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        for name, data in whole.items():
            open(os.path.join(folder, name), "wb").write(damage(data))
        r = gpu.run(ARGS, libs=gpu.sim, DSV4_CACHE=folder, **NO_NVRTC)
        errors = [line for line in r.lines() if line.startswith("dsv4: ")]
        t.check(r.code == 1 and len(errors) == 1 and "NVRTC" in errors[0] and "damaged" in r.err and folder in r.err,
                f"{what}, no NVRTC: named", r.tail())
        if what in ("a flipped bit", "cut in half"):
            r = gpu.run(ARGS, DSV4_CACHE=folder)
            t.check(r.code == 0 and r.out == good.out and "compiled" in r.err, f"{what}: compiled again", r.tail())
            r = gpu.run(ARGS, DSV4_CACHE=folder)
            t.check(r.code == 0 and "from the cache" in r.err, f"{what}: and kept", r.tail())


def self_test(gpu, t, work):
    cache = os.path.join(work, "tested")
    go = lambda *args, **env: gpu.run([*ARGS, *args], DSV4_CACHE=cache, **env)
    tested = lambda r: r.code == 0 and "self-test passed" in r.err
    first = go()
    t.check(tested(first), "the first start tests the GPU", first.tail())
    t.check(not tested(go()), "a GPU that passed is remembered")
    t.check(tested(go(SIM_DRIVER=12000)), "but not for another driver")
    t.check(tested(go("--chunk", 1)), "nor for other kernels of the same source")
    two = ["--devices", "cuda:1"]
    t.check(tested(gpu.run([*ARGS[:2], *two, *ARGS[4:]], DSV4_CACHE=cache, SIM_DEVICES=2)), "nor for another GPU")
    graphs = gpu.run([*ARGS, "--graphs"], DSV4_CACHE=os.path.join(work, "graphs"))
    t.check(tested(graphs) and graphs.out == first.out, "with recorded graphs too", graphs.tail())
    source = open(os.path.join(ROOT, "kernels.cu")).read()
    for constant, value, operation in (("HC_ITERS", "1", "hc_pre"), ("WINDOW", "1", "attend"), ("ROUTE_SCALE", "9.0f", "route"),
                                       ("SWIGLU_LIMIT", "0.01f", "experts")):
        path = os.path.join(work, "wrong.cu")
        with open(path, "w") as f:
            f.write(f"#undef {constant}\n#define {constant} {value}\n" + source)
        for again in range(2):
            r = go("--kernels", path)
            one_line(t, f"kernels with another {constant}", r, "cuda:0: self-test: " + operation, "RTX 3090")


def report(gpu, t, work):
    r = gpu.run(["devices", "-m", MODEL], SIM_DEVICES=2)
    text = r.out.decode()
    t.check(r.code == 0 and text.count("  ok ") == 32 and "BAD" not in text and "arrive whole" in text and
            text.count("GB/s") == 16 and "all operations agree" in text, "the bring-up report", r.tail())
    cache = os.path.join(work, "report")
    r = gpu.run(["devices", "-m", MODEL], SIM_DEVICES=0, DSV4_CACHE=cache)
    t.check(r.code == 0 and len(kept(cache)) == 2 and all(p in r.out.decode() for p in kept(cache)), "kernels made without a GPU", r.tail())
    r = gpu.run(ARGS, libs=gpu.sim, DSV4_CACHE=cache, **NO_NVRTC)
    t.check(r.code == 0 and "from the cache" in r.err, "and used with one, without NVRTC", r.tail())
    r = gpu.run(["devices"], SIM_DEVICES=0)
    t.check(r.code == 1 and "no GPU" in r.out.decode(), "no GPU: said", r.tail())


def main():
    a = argparse.ArgumentParser()
    a.add_argument("--dsv4", default=os.path.join(ROOT, "dsv4"))
    a.add_argument("--sim", default=os.path.join(ROOT, "build", "sim"))
    a.add_argument("-v", action="store_true")
    a = a.parse_args()
    t = Tally(a.v)
    with tempfile.TemporaryDirectory() as work:
        gpu = Gpu(a, work)
        ready_kernels(gpu, t, work)
        damaged_files(gpu, t, work)
        self_test(gpu, t, work)
        report(gpu, t, work)
    t.end("start")


if __name__ == "__main__":
    main()
