#!/usr/bin/env python3
"""How a GPU starts, on the simulated device: ready kernels with and without NVRTC, and the self-test.

  test_start.py [--dsv4 ./dsv4] [--sim build/sim]
"""
import argparse
import glob
import os
import pty
import re
import shutil
import subprocess
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


def other_compiler(gpu, t, work):
    """A library that is the real NVRTC but for its version."""
    cache, lib = os.path.join(work, "versions"), os.path.join(work, "nvrtc-other.so")
    real = next((os.path.join(d, "libnvrtc.so.13") for d in gpu.libs.split(":")
                 if os.path.exists(os.path.join(d, "libnvrtc.so.13"))), None)
    source = os.path.join(work, "other.c")
    with open(source, "w") as f:
        f.write("int nvrtcVersion(int *a, int *b) { *a = 13; *b = 99; return 0; }\n")
    made = real and run(["gcc", "-shared", "-fPIC", "-o", lib, source, "-Wl,--no-as-needed", real])
    if not t.check(made and made.code == 0, "another NVRTC", made.tail() if made else "no libnvrtc.so.13"):
        return
    start = lambda **env: gpu.run(ARGS, DSV4_CACHE=cache, **env)
    first, again = start(), start()
    t.check("compiled" in first.err and "from the cache" in again.err, "compiled, then kept", again.tail())
    t.check(again.seconds < 1, "a second start is quick", f"{again.seconds:.2f} s")
    for what, env, how in (("another version compiles again", {"DSV4_NVRTC": lib}, "compiled"),
                           ("and keeps that", {"DSV4_NVRTC": lib}, "from the cache"),
                           ("without NVRTC what is kept is used", {"libs": gpu.sim, **NO_NVRTC}, "from the cache"),
                           ("the first one compiles again", {}, "compiled")):
        r = start(**env)
        t.check(r.code == 0 and r.out == first.out and how in r.err, what, r.tail())
    t.check(len(kept(cache)) == 1, "one file, whatever the version", str(kept(cache)))


def side_by_side(gpu, t, work):
    cache = os.path.join(work, "three")
    three = [*ARGS[:2], "--devices", "cuda:0,cuda:1,cuda:2", "--layers", "1,1,1", *ARGS[4:]]
    go = lambda **env: gpu.run(three, SIM_DEVICES=3, DSV4_CACHE=cache, **env)
    first, again = go(), go()
    t.check(first.code == 0 and first.out == gpu.run(ARGS).out, "three GPUs start", first.tail())
    t.check(first.err.count("compiled") == 1 and first.err.count("shared with another GPU") == 2 and
            first.err.count("self-test passed") == 3, "one of them compiles for all", first.tail())
    t.check(again.err.count("from the cache") == 1 and "self-test" not in again.err and again.out == first.out,
            "and again", again.tail())
    ids = ",".join(str(i * 37 % 200 + 5) for i in range(120))
    long = lambda args, seed: gpu.run([*args, "--ids", ids, "--chunk", 5], SIM_DEVICES=3, SIM_SEED=seed, DSV4_CACHE=cache)
    alone = long(ARGS, 0)
    for seed in range(4):
        r = long(three, seed)
        t.check(r.code == 0 and r.out == alone.out, f"many chunks on their way at once, order {seed}", r.tail())
    one_line(t, "one of three has too little memory", go(SIM_MEM="24G,1M,24G"), "cuda:1: out of memory")
    one_line(t, "all of three have", go(SIM_MEM="1M"), "out of memory")
    one_line(t, "one of three is lost", go(SIM_FAULT="lost:2:12=999"), "cuda:2: ")
    one_line(t, "a call fails on one of three", go(SIM_FAULT="cuDeviceGetAttribute:3=999"), "cuDeviceGetAttribute")
    one_line(t, "no memory to pin", go(SIM_FAULT="cuMemHostAlloc:7=2"), "cannot pin")
    env = {**os.environ, "LD_LIBRARY_PATH": gpu.libs, "DSV4_CACHE": cache, "SIM_DEVICES": "3"}
    ours, theirs = pty.openpty()
    p = subprocess.Popen([gpu.binary, *map(str, three)], env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    text = b""
    try:
        while chunk := os.read(ours, 65536):
            text += chunk
    except OSError:             # the other end is closed
        pass
    p.wait()
    percent = [int(x) for x in re.findall(rb"# loading \[[# ]*\] +(\d+) %", text)]
    t.check(p.returncode == 0 and percent and percent == sorted(percent) and percent[-1] == 100,
            "one progress bar for all three", str(percent[-20:]))
    t.check(not re.search(rb"%# ", text), "what is said does not run into the bar", str(text[-300:]))


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
        other_compiler(gpu, t, work)
        side_by_side(gpu, t, work)
        damaged_files(gpu, t, work)
        self_test(gpu, t, work)
        report(gpu, t, work)
    t.end("start")


if __name__ == "__main__":
    main()
