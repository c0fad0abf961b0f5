#!/usr/bin/env python3
"""The parts of peers.sh that are not shell.

  peers.py convert LLAMA SRC OUT.gguf     the peer's own converter on a checkpoint in the release's formats
  peers.py same WORK NAME                 the peer's logits of WORK/NAME.gguf against tests/golden/NAME
  peers.py measure WORK                   one round: dsv4_int, native and llama.cpp in turn, added to WORK/samples.jsonl
  peers.py decode WORK                    one round of decoding alone: dsv4_int and llama.cpp
  peers.py transformers WORK              one round of HF transformers, added to WORK/samples.jsonl
  peers.py table WORK                     the samples as a table
ISA=avx2 in the environment: dsv4 and llama.cpp both without AVX-512, added to WORK/samples-avx2.jsonl
"""
import collections
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import threading
import time

DSV4 = os.environ.get("DSV4", "./dsv4")
THREADS = len(os.sched_getaffinity(0))
STEPS = 32              # tokens of a decode sample, after DEPTH tokens
DEPTH = 128
LONG = 512
DISTURBED = float(os.environ.get("DISTURBED", .05))     # samples during which other processes took more of the processors do not count
ISA = os.environ.get("ISA", "")
SUFFIX = ISA and "-" + ISA


# ---- the peer's checkpoint ------------------------------------------------------------------------------------------

def convert(llama, src, out):
    """FP8 becomes Q8_0, FP4 becomes MXFP4, BF16 stays. Without a vocabulary: random weights have no text."""
    sys.path.insert(0, llama)
    import convert_hf_to_gguf
    from conversion.deepseek import DeepseekV4Model

    def set_vocab(self):
        self._set_vocab_none()
        self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    DeepseekV4Model.set_vocab = set_vocab
    sys.argv = ["convert_hf_to_gguf.py", "--outfile", out, src]
    convert_hf_to_gguf.main()


def same(work, name):
    """Prints how near the peer's logits are to the golden ones, and ours beside them."""
    import numpy as np
    sys.path.insert(0, "tests/golden")
    import check
    golden = f"tests/golden/{name}/native"
    with open(golden + ".json") as f:
        e = json.load(f)
    want = np.load(golden + ".logits.npy").astype(np.float64)
    ids = ",".join(map(str, e["prompt"] + e["continuation"]))
    out = os.path.join(work, "logits.f32")
    for who, command in (("llama.cpp", [f"{work}/peer_logits", f"{work}/{name}.gguf", ids, out]),
                         ("dsv4", [DSV4, "-m", golden, "--devices", "cpu", "--ids", ids, "-n", "0", "--logits", out])):
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        x = np.fromfile(out, "<f4").reshape(want.shape).astype(np.float64)
        cos = np.median(check.cosines(x, want))
        print(f"{name}/native, {len(want)} rows: {who}: median cosine {cos:.5f} to the FP32 reference, "
              f"the same first token in {(x.argmax(1) == want.argmax(1)).mean():.3f}")


def bytes_touched(work):
    """Bytes of weights a token reads in peer.gguf: every matrix of the layers and the output matrix, of the routed experts the
    active share, of the embedding and of the table of hashed experts one row."""
    sys.path.insert(0, f"{work}/llama.cpp/gguf-py")
    import gguf
    r = gguf.GGUFReader(f"{work}/peer.gguf")
    active, experts = (int(r.get_field(f"deepseek4.{k}").contents()) for k in ("expert_used_count", "expert_count"))
    total = 0
    for t in r.tensors:
        if t.name == "token_embd.weight" or "tid2eid" in t.name:
            total += t.n_bytes / int(t.shape[-1])
        else:
            total += t.n_bytes * (active / experts if "_exps" in t.name else 1)
    return total


# ---- measuring ------------------------------------------------------------------------------------------------------

def busy():
    """Seconds that all processors together were busy or taken away since the start of the machine."""
    with open("/proc/stat") as f:
        t = [int(v) for v in f.readline().split()[1:9]]
    return (sum(t) - t[3] - t[4]) / os.sysconf("SC_CLK_TCK")


def used():
    """Seconds of processor time of this process and its ended children."""
    return sum(resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime
               for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def read_bandwidth(buffers=[]):
    """GB/s: the best of five sequential reads of 2 GiB by all threads."""
    import numpy as np
    if not buffers:
        buffers += [np.ones((2 << 30) // 8 // THREADS, np.uint64) for _ in range(THREADS)]
    best = 0
    for _ in range(5):
        threads = [threading.Thread(target=np.bitwise_xor.reduce, args=(b,)) for b in buffers]
        start = time.time()
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        best = max(best, sum(b.nbytes for b in buffers) / (time.time() - start) / 1e9)
    return best


class Sample:
    """with Sample(work, who) as s: s.add(name=value)...: one line of WORK/samples.jsonl, with the read bandwidth right before and
    after it and the share of the processors that others took meanwhile."""

    def __init__(self, work, who):
        self.path, self.line = f"{work}/samples{SUFFIX}.jsonl", {"who": who}

    def add(self, **values):
        self.line.update(values)

    def __enter__(self):
        before = read_bandwidth()
        self.add(before=round(before, 1))
        self.start = time.time(), busy(), used()
        return self

    def __exit__(self, kind, *_):
        wall, all_, own = (b - a for a, b in zip(self.start, (time.time(), busy(), used())))
        if kind:
            return
        self.add(others=round(max(0, all_ - own) / wall / THREADS, 3), after=round(read_bandwidth(), 1))
        with open(self.path, "a") as f:
            f.write(json.dumps(self.line) + "\n")
        print("#", json.dumps(self.line), file=sys.stderr)


def dsv4(work, name, prompts=((DEPTH, STEPS), (LONG, 1))):
    model = f"{work}/{name}"
    subprocess.run([DSV4, "-m", model, "--devices", "cpu", "--ids", "5", "-n", "1"], capture_output=True, check=True)    # into memory
    info = subprocess.run([DSV4, "info", "-m", model], check=True, capture_output=True, text=True).stdout
    touched = float(re.search(r"([\d.]+) GB of weights read", info)[1])
    for prompt, steps in prompts:
        with Sample(work, name) as s:
            err = subprocess.run([DSV4, "-m", model, "--devices", "cpu", "-t", str(THREADS), "--temp", "0", "-n", str(steps),
                                  "--ids", ",".join(map(str, range(5, 5 + prompt))), *(["--isa", ISA] if ISA else [])],
                                 check=True, capture_output=True, text=True).stderr
            read, decode = re.search(r"prompt \d+ tokens, ([\d.]+) tok/s; generated \d+ tokens, ([\d.]+) tok/s", err).groups()
            s.add(**{"short" if prompt == DEPTH else "long": float(read)})
            if steps > 1:
                s.add(decode=float(decode), touched=touched)


def llama_bench(work, *options):
    out = subprocess.run([f"{work}/build{SUFFIX}/bin/llama-bench", "-m", f"{work}/peer.gguf", "-t", str(THREADS), "-r", "1",
                          "-o", "jsonl", *os.environ.get("PEER_OPTIONS", "").split(), *options],
                         check=True, capture_output=True, text=True).stdout
    return [json.loads(line)["avg_ts"] for line in out.splitlines() if line.startswith("{")]


def llama(work, prefill=True):
    subprocess.run(["cat", f"{work}/peer.gguf"], stdout=subprocess.DEVNULL, check=True)     # so that it is in memory
    touched = bytes_touched(work) / 1e9
    with Sample(work, "llama.cpp") as s:
        s.add(touched=touched, decode=llama_bench(work, "-p", "0", "-n", str(STEPS), "-d", str(DEPTH))[0])
    if not prefill:
        return
    with Sample(work, "llama.cpp") as s:
        short, long = llama_bench(work, "-n", "0", "-p", f"{DEPTH},{LONG}")
        s.add(short=short, long=long)


def transformers(work):
    """The model of WORK/native's config in BF16 with random weights, made in memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.set_num_threads(THREADS)
    with open(f"{work}/native/config.json") as f:
        settings = {k: v for k, v in json.load(f).items() if k not in ("quantization_config", "expert_dtype", "architectures")}
    os.makedirs(f"{work}/config", exist_ok=True)
    with open(f"{work}/config/config.json", "w") as f:
        json.dump(settings, f)
    config = AutoConfig.from_pretrained(f"{work}/config")
    blank = {n: getattr(torch.nn.init, n) for n in ("normal_", "uniform_", "kaiming_uniform_", "trunc_normal_")}
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    for n in blank:
        setattr(torch.nn.init, n, lambda t, *a, **k: t)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    pool = torch.randn(1 << 22, dtype=torch.float32).to(torch.bfloat16)
    active, touched = config.num_experts_per_tok / config.n_routed_experts, 0
    for name, p in model.named_parameters():
        flat = p.data.view(-1)
        for i in range(0, flat.numel(), pool.numel()):
            n = min(pool.numel(), flat.numel() - i)
            flat[i:i + n] = pool[:n].to(p.dtype) * p.shape[-1] ** -0.5
        row = "embed_tokens" in name
        touched += p.nbytes * (active if ".experts." in name else 1 / p.shape[0] if row else 1)
    for name, b in model.named_buffers():
        if "tid2eid" in name:
            b.copy_(torch.rand(b.shape[0], config.n_routed_experts, dtype=torch.float32).argsort(1)[:, :b.shape[1]])
    ids = torch.randint(config.vocab_size, (1, LONG + STEPS))

    def read(cache, at, n):
        start = time.time()
        out = model(ids[:, at:at + n], past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.past_key_values, time.time() - start

    with torch.no_grad():
        read(None, 0, 16)
        with Sample(work, "transformers") as s:
            cache, t = read(None, 0, DEPTH)
            s.add(short=DEPTH / t, touched=touched / 1e9)
            steps = []
            for i in range(STEPS):
                cache, t = read(cache, DEPTH + i, 1)
                steps.append(t)
            s.add(decode=STEPS / sum(steps))
        with Sample(work, "transformers") as s:
            s.add(long=LONG / read(None, 0, LONG)[1])


# ---- the table ------------------------------------------------------------------------------------------------------

NAMES = {"int": "dsv4, INT4 experts, INT8 dense (`dsv4_int`)", "native": "dsv4, FP4 experts, FP8 dense (the release's formats)",
         "llama.cpp": "llama.cpp, MXFP4 experts, Q8_0 dense", "transformers": "HF transformers, BF16"}


def machine():
    with open("/proc/cpuinfo") as f:
        info = dict(re.findall(r"^(model name|cpu family|model|flags)\s*: (.*)$", f.read(), re.M))
    with open("/proc/meminfo") as f:
        gb = int(re.search(r"MemTotal: +(\d+)", f.read())[1]) / 1e6
    return (f"{THREADS} cores of {info.get('model name', '?')} (family {info.get('cpu family')}, model {info.get('model')}), "
            f"{gb:.0f} GB, virtual" if "hypervisor" in info.get("flags", "") else f"{THREADS} cores of {info.get('model name')}, {gb:.0f} GB")


def memory_classes(samples):
    """The samples by what the memory gave: all together, or "slow" and "fast" where some reads are 1.5 times as fast as others
    (memory that other machines share). A sample between a slow and a fast read is in neither."""
    if not samples:
        return []
    reads = [s[k] for s in samples for k in ("before", "after")]
    cut = (max(reads) * min(reads)) ** .5 if max(reads) > 1.5 * min(reads) else 0
    classes = collections.defaultdict(list)
    for s in samples:
        if (s["before"] < cut) == (s["after"] < cut):
            classes[s["before"] >= cut].append(s)
    return [classes[k] for k in sorted(classes)]


def table(work):
    with open(f"{work}/samples{SUFFIX}.jsonl") as f:
        lines = [json.loads(line) for line in f]
    samples = [s for s in lines if s["others"] <= DISTURBED]
    middle = lambda x: f"{statistics.median(x):.1f} ({min(x):.1f} to {max(x):.1f}, {len(x)})"
    print(f"Machine: {machine()}. Medians (smallest to largest, number of runs), each run between two reads of the memory (best of 5 "
          f"sequential reads of 2 GiB by all threads); {len(lines) - len(samples)} runs during which other processes took more than "
          f"{DISTURBED:.0%} of the processors are left out.\n")
    decode = memory_classes([s for s in samples if "decode" in s])
    head = [f"decode, {statistics.median(max(s['before'], s['after']) for s in c):.0f} GB/s | share" for c in decode]
    print(f"| tok/s | {' | '.join(head)} | weights read a token | prefill of {DEPTH} | prefill of {LONG} |")
    print("|---" * (2 * len(decode) + 4) + "|")
    median = {}
    for who in NAMES:
        own = [s for s in samples if s["who"] == who]
        if not own:
            continue
        cells, median[who] = [], []
        for c in decode:
            runs = [s for s in c if s["who"] == who]
            median[who].append(statistics.median(s["decode"] for s in runs) if runs else 0)
            share = [100 * s["decode"] * s["touched"] / max(s["before"], s["after"]) for s in runs]
            cells += [middle([s["decode"] for s in runs]), f"{statistics.median(share):.0f} %"] if runs else ["-", "-"]
        cells.append(next((f"{s['touched']:.3f} GB" for s in lines if s["who"] == who and "touched" in s), "-"))
        for key in ("short", "long"):
            x = [s[key] for s in own if key in s]
            median[who].append(statistics.median(x) if x else 0)
            cells.append(middle(x) if x else "-")
        print(f"| {NAMES[who]} | {' | '.join(cells)} |")
    for ours in ("int", "native"):
        for peer in ("llama.cpp", "transformers"):
            if ours in median and peer in median:
                r = [f"{a / b:.2f}" if b else "-" for a, b in zip(median[ours], median[peer])]
                print(f"| {NAMES[ours].split(' (')[0]} / {NAMES[peer].split(',')[0]} | {' | | '.join(r[:-2])} | | | {' | '.join(r[-2:])} |")


def measure(work):
    dsv4(work, "int")
    llama(work)
    dsv4(work, "native")


def decode(work):
    dsv4(work, "int", ((DEPTH, STEPS),))
    llama(work, prefill=False)


if __name__ == "__main__":
    commands = {f.__name__: f for f in (convert, same, measure, decode, transformers, table)}
    if len(sys.argv) < 3 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])
