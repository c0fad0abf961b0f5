#!/usr/bin/env python3
"""The GPU path end to end on the simulated device: golden rules, splits over devices and the CPU, faults, the compiled kernels.

  suite.py [--dsv4 ./dsv4] [--sim build/sim] [--quick]
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import numpy as np

from common import GOLDEN, ROOT, Tally, ids_arg, run
import check

NVRTC_DIRS = ("/usr/local/cuda/lib64", "/usr/local/cuda/lib", "/usr/lib/x86_64-linux-gnu")


class Gpu:
    """Runs the program in front of the simulated device."""
    def __init__(self, a, work):
        self.binary, self.sim, self.work, self.count = a.dsv4, os.path.abspath(a.sim), work, 0
        self.libs = ":".join([self.sim] + [d for d in NVRTC_DIRS if os.path.isdir(d)])
        self.cache = os.path.join(work, "cache")
        os.makedirs(self.cache)

    def run(self, args, timeout=600, libs=None, **env):
        base = {"LD_LIBRARY_PATH": self.libs if libs is None else libs, "DSV4_CACHE": self.cache}
        return run([self.binary, *map(str, args)], timeout=timeout, env={**base, **{k: str(v) for k, v in env.items()}})

    def logits(self, tally, name, model, ids, vocab, *args, mtp=False, **env):
        self.count += 1
        paths = [os.path.join(self.work, f"{kind}{self.count}.f32") for kind in ("main", "mtp")]
        extra = ["--mtp-logits", paths[1]] if mtp else []
        r = self.run(["-m", model, "--ids", ids_arg(ids), "-n", 0, "-c", 512, "--logits", paths[0], *extra, *args], **env)
        good = [line for line in r.lines() if "pending work runs unasked" not in line]
        if not tally.check(r.code == 0 and not good, f"{name}: runs clean", r.tail()):
            return None, None
        return [np.fromfile(p, "<f4").reshape(len(ids), vocab) if os.path.exists(p) else None for p in paths]


def golden(gpu, t, which):
    for name in which:
        path = os.path.join(GOLDEN, name + ".json")
        spec = json.load(open(path))
        model = os.path.join(GOLDEN, name)
        vocab = json.load(open(os.path.join(model, "config.json")))["vocab_size"]
        ids = spec["prompt"] + spec["continuation"]
        main, mtp = gpu.logits(t, name, model, ids, vocab, "--devices", "cuda:0", mtp=True)
        if main is None:
            continue
        files = [os.path.join(gpu.work, "g.f32"), os.path.join(gpu.work, "m.f32")]
        main.tofile(files[0]), mtp.tofile(files[1])
        r = run([sys.executable, os.path.join(GOLDEN, "check.py"), path, "--mode", "default", "--logits", files[0],
                 "--mtp", files[1]])
        t.check(r.code == 0, f"{name}: the default path's golden rule", r.out.decode()[-300:] + r.err[-200:])


def splits(gpu, t, name="edge/int"):
    spec = json.load(open(os.path.join(GOLDEN, name + ".json")))
    model = os.path.join(GOLDEN, name)
    vocab = json.load(open(os.path.join(model, "config.json")))["vocab_size"]
    ids = spec["prompt"][:100]
    go = lambda what, *args, **env: gpu.logits(t, what, model, ids, vocab, *args, **env)[0]
    one = go("one device", "--devices", "cuda:0")
    if one is None:
        return
    for devices, layers in (("cuda:0,cuda:1", "1,2"), ("cuda:0,cuda:1", "2,1"), ("cuda:0,cuda:1,cuda:2", "1,1,1"),
                            ("cuda:2,cuda:0,cuda:1,cuda:3,cuda:4", "1,0,1,0,1")):
        x = go(f"{devices} {layers}", "--devices", devices, "--layers", layers, SIM_DEVICES=5)
        t.check(x is not None and np.array_equal(x, one), f"{devices} {layers}: the same bits as one device")
    for seed in (1, 2, 3):
        x = go(f"order {seed}", "--devices", "cuda:0,cuda:1", SIM_DEVICES=2, SIM_SEED=seed)
        t.check(x is not None and np.array_equal(x, one), f"work in another order (seed {seed}): the same bits")
    x = go("chunks of 33", "--devices", "cuda:0", "--chunk", 33)
    t.check(x is not None and np.array_equal(x[:99], one[:99]), "chunks of 33: the same bits")
    by_one, by_five = [gpu.logits(t, f"chunks of {n}", model, ids, vocab, "--devices", "cuda:0", "--chunk", n, mtp=True) for n in (1, 5)]
    for what, a, b in zip(("rows", "drafts"), by_one, by_five):
        t.check(a is not None and b is not None and np.array_equal(a, b), f"{what} alone and 5 at a time: the same bits")
    by_one = by_one[0]
    cpu = go("cpu", "--devices", "cpu")
    for what, x in (("decode kernels", by_one), ("CPU and GPU stages", go("mixed", "--devices", "cuda:0,cpu", "--layers", "2,1")),
                    ("GPU after CPU", go("mixed", "--devices", "cpu,cuda:0", "--layers", "1,2"))):
        if x is None or cpu is None:
            continue
        cos = (x * cpu).sum(1) / np.sqrt((x * x).sum(1) * (cpu * cpu).sum(1))
        t.check(np.median(cos) > 0.9995, f"{what} against the CPU", f"median cosine {np.median(cos):.6f}")


def one_line(t, name, r, *words):
    lines = [line for line in r.lines() if not line.startswith("sim:")]
    ok = r.code == 1 and len(lines) == 1 and lines[0].startswith("dsv4: ") and all(w in lines[0] for w in words)
    t.check(ok and r.out == b"", name, r.tail())


def poison(folder, name, nan=b"\xc0\x7f"):
    """Makes a tensor's first value NaN: of a BF16 scale, unless `nan` is another format's."""
    for file in os.listdir(folder):
        if not file.endswith(".safetensors"):
            continue
        path = os.path.join(folder, file)
        os.chmod(path, 0o644)
        data = bytearray(open(path, "rb").read())
        n = int.from_bytes(data[:8], "little")
        entry = json.loads(data[8:8 + n]).get(name)
        if entry:
            at = 8 + n + entry["data_offsets"][0]
            data[at:at + len(nan)] = nan
            open(path, "wb").write(data)


def faults(gpu, t, work):
    model = os.path.join(GOLDEN, "edge/int")
    args = ["-m", model, "--devices", "cuda:0", "--ids", "5,6,7", "-n", 3, "-c", 256, "--temp", 0]
    good = gpu.run(args)
    t.check(good.code == 0, "a run that works", good.tail())
    one_line(t, "out of memory at the weights", gpu.run(args, SIM_MEM="1M"), "GB")
    one_line(t, "out of memory later", gpu.run(args, SIM_FAULT="cuMemAlloc_v2:9=2"), "out of memory")
    one_line(t, "a kernel faults", gpu.run(args, SIM_FAULT="launch:25=700"), "cuda:0", "ILLEGAL_ADDRESS", "last kernel: ")
    one_line(t, "the device is lost", gpu.run(args, SIM_FAULT="lost:0:60=999"), "cuda:0")
    one_line(t, "a launch is refused", gpu.run(args, SIM_FAULT="cuLaunchKernel:7=701"), "cuda:0")
    one_line(t, "no driver", gpu.run(args, libs="/nonexistent"), "libcuda.so.1")
    one_line(t, "the driver is too old", gpu.run(args, SIM_DRIVER=11020), "CUDA 11.2")
    one_line(t, "the GPU is too old", gpu.run(args, SIM_CC="7.5"), "8.0")
    for cc in ("8.0", "9.0", "12.0"):
        r = gpu.run(args, SIM_CC=cc)
        t.check(r.code == 0 and r.out == good.out, f"compute capability {cc}", r.tail())
    nan = os.path.join(work, "nan")
    shutil.copytree(model, nan)
    poison(nan, "layers.1.attn.wo_a.scale")
    for chunk in (1, 64):
        one_line(t, f"NaN in a scale, chunk {chunk}", gpu.run(["-m", nan, *args[2:], "--chunk", chunk]), "not finite")
    fp8 = os.path.join(work, "fp8")
    shutil.copytree(os.path.join(GOLDEN, "edge/native"), fp8)
    poison(fp8, "layers.1.attn.wo_b.weight", b"\xff")
    one_line(t, "NaN in an FP8 weight", gpu.run(["-m", fp8, *args[2:]]), "FP8", "dsv4 verify")
    one_line(t, "no such GPU", gpu.run(["-m", model, "--devices", "cuda:3", "--ids", "5", "-n", 1]), "cuda:3")
    r = gpu.run([a for a in args if a not in ("--devices", "cuda:0")], SIM_DEVICES=0)
    t.check(r.code == 0, "no GPU at all: the CPU runs", r.tail())
    r = gpu.run(args, SIM_PTX="7.4")
    t.check(r.code == 0 and r.out == good.out, "a driver that reads PTX 7.4 at most", r.tail())
    other = os.path.join(work, "old")
    os.makedirs(other)
    blob = open(os.path.join(gpu.sim, "libcuda.so.1"), "rb").read().replace(b"cuStreamCreate\0", b"xuStreamCreate\0")
    open(os.path.join(other, "libcuda.so.1"), "wb").write(blob)
    one_line(t, "the driver lacks a function", gpu.run(args, libs=other + ":" + gpu.libs), "cuStreamCreate")
    fresh = os.path.join(work, "fresh")
    os.makedirs(fresh)
    one_line(t, "no NVRTC", gpu.run(args, libs=gpu.sim, DSV4_CACHE=fresh, DSV4_NVRTC="/nonexistent.so"), "NVRTC", "/nonexistent.so")
    bad = os.path.join(work, "bad.cu")
    open(bad, "w").write("this is no kernel\n")
    r = gpu.run([*args, "--kernels", bad])
    t.check(r.code == 1 and "does not compile" in r.err and "bad" not in r.out.decode(), "kernels that do not compile", r.tail())
    for name in os.listdir(gpu.cache):
        path = os.path.join(gpu.cache, name)
        data = open(path, "rb").read()
        open(path, "wb").write(data[:len(data) // 2])
    r = gpu.run(args)
    t.check(r.code == 0 and r.out == good.out and "compiled" in r.err, "a truncated cache file is rebuilt", r.tail())
    r = gpu.run(args)
    t.check(r.code == 0 and "from the cache" in r.err, "the second start uses the cache", r.tail())
    r = gpu.run(args, DSV4_CACHE="/proc/nowhere")
    t.check(r.code == 0 and r.out == good.out, "a cache that cannot be written", r.tail())
    env = {**os.environ, "LD_LIBRARY_PATH": gpu.libs, "DSV4_CACHE": os.path.join(work, "two")}
    both = [subprocess.Popen([gpu.binary, *map(str, args)], env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            for _ in range(2)]
    outs = [p.communicate(timeout=300)[0] for p in both]
    t.check(all(o == good.out for o in outs), "two processes on one cache directory")


# Registers that a kernel may have; 64: four blocks of 8 warps a multiprocessor, 80: three, 128: two. gpu_computed.md has the reasons.
REGISTERS = {"gemv": 80, "ffn_in": 80, "expert_up_1": 80, "expert_down_1": 80, "expert_up_8": 128, "expert_down_8": 128,
             "gemm": 128, "expert_up": 128, "expert_down": 128, "attend_16": 128, "attend_32": 168, "index_scores": 96, "hc_mix": 128}


def kernels(gpu, t):
    """Registers and spills of the compiled kernels, for every target that ptxas knows. At most three numbers spill, outside of the
    loops; with the formats of one checkpoint none up to sm_90 (gpu_computed.md)."""
    ptxas = shutil.which("ptxas") or "/usr/local/cuda/bin/ptxas"
    if not os.path.exists(ptxas):
        print("# no ptxas: the compiled kernels are not looked at")
        return
    gpu.run(["-m", os.path.join(GOLDEN, "edge/int"), "--devices", "cuda:0", "--ids", "5", "-n", 0, "-c", 64], SIM_CC="8.0")
    texts = {}
    for name in sorted(os.listdir(gpu.cache)):
        if name.endswith(".ptx"):
            text = open(os.path.join(gpu.cache, name), errors="replace").read()
            texts.setdefault(re.search(r"\.target sm_(\d+)", text)[1], []).append(os.path.join(gpu.cache, name))
    t.check(set(texts) == {"80", "86"}, "compiled kernels were kept", str(texts))
    for sm, path in [("80", p) for p in texts["80"]] + [(sm, p) for sm in ("86", "89", "90", "120") for p in texts["86"][:2]]:
        r = run([ptxas, "-v", f"-arch=sm_{sm}", "-o", "/dev/null", path])
        if not t.check(r.code == 0 and "warning" not in r.err, f"ptxas sm_{sm}", r.err[-300:]):
            continue
        for name, spill, regs in re.findall(r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", r.err, re.S):
            t.check(int(spill) <= 12, f"sm_{sm} {name}: spills", spill)
            t.check(int(regs) <= REGISTERS.get(name, 64), f"sm_{sm} {name}: registers", regs)


def main():
    a = argparse.ArgumentParser()
    a.add_argument("--dsv4", default=os.path.join(ROOT, "dsv4"))
    a.add_argument("--sim", default=os.path.join(ROOT, "build", "sim"))
    a.add_argument("--quick", action="store_true")
    a.add_argument("-v", action="store_true")
    a = a.parse_args()
    t = Tally(a.v)
    with tempfile.TemporaryDirectory() as work:
        gpu = Gpu(a, work)
        golden(gpu, t, ["edge/int"] if a.quick else ["aligned/int", "aligned/native", "edge/int", "edge/native"])
        splits(gpu, t)
        kernels(gpu, t)
        faults(gpu, t, work)
    t.end("gpu")


if __name__ == "__main__":
    main()
