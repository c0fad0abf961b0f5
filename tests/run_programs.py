#!/usr/bin/env python3
"""The command line around the forward pass: prompts in all their forms, tokenize, info, ppl, verify, bench.

  run_programs.py [--dsv4 ./dsv4] [--slow 1] [-v]
"""
import argparse
import json
import os
import re
import shutil
import tempfile

import numpy as np

from common import GOLDEN, Tally, ids_arg, run
import formats as F
import make_checkpoint as M
import reference

TEXT = "the cat and the hat is in the area of an inn, that is all you are to have. 12345 \u00e9\u4f60\u597d!\n" * 4


class Programs:
    def __init__(self, binary, work, tally, slow):
        self.binary, self.work, self.tally, self.slow = binary, work, tally, slow
        self.base = os.path.join(work, "base")
        self.cfg = M.make(self.base, "int", {}, seed=3)
        M.write_tokenizer(self.base)

    def ok(self, name, *args, stdin=b"", code=0):
        r = run([self.binary, *map(str, args)], stdin=stdin, timeout=60 * self.slow)
        good = r.code == code and not r.sanitizer() and len(r.lines()) == (code != 0)
        self.tally.check(good, f"{name}: exit {code}", r.tail())
        return r

    def ids(self, text, *args):
        r = self.ok("tokenize", "tokenize", "-m", self.base, *args, stdin=text)
        return [int(t) for t in r.out.split()]


def prompts(p):
    """-p, -f, stdin, --raw, --ids and a messages file name the same prompt."""
    greedy = ["-n", 12, "--temp", 0, "--show-ids"]
    said = p.ok("-p", "-m", p.base, "-p", "hello the area", *greedy).out
    path = os.path.join(p.work, "prompt.txt")
    open(path, "w").write("hello the area")
    same = {"-f FILE": p.ok("-f", "-m", p.base, "-f", path, *greedy).out,
            "-f -": p.ok("-f -", "-m", p.base, "-f", "-", *greedy, stdin=b"hello the area").out,
            "again": p.ok("again", "-m", p.base, "-p", "hello the area", *greedy, "-s", 9).out}
    messages = os.path.join(p.work, "messages.json")
    json.dump([{"role": "user", "content": "hello the area"}], open(messages, "w"))
    ids = p.ids(b"", "--chat", messages)
    same["--ids of the encoded chat"] = p.ok("--ids", "-m", p.base, "--ids", ids_arg(ids), *greedy[:4]).out
    for what, out in same.items():
        p.tally.check(out == said and said.strip(), f"{what}: the same answer as -p", f"{out!r} {said!r}")
    raw = p.ok("--raw", "-m", p.base, "--raw", "-p", "hello the area", *greedy).out
    plain = p.ok("--raw ids", "-m", p.base, "--ids", ids_arg([0] + p.ids(b"hello the area")), *greedy[:4]).out
    p.tally.check(raw == plain, "--raw is BOS and the text", f"{raw!r} {plain!r}")
    text = p.ok("text", "-m", p.base, "--raw", "-p", "hello the area", "-n", 12, "--temp", 0).out
    known = [t for t in raw.split() if int(t) < 323]        # the tokenizer has 323 tokens, the model 512
    back = p.ok("decode", "tokenize", "-m", p.base, "--decode", stdin=b" ".join(known)).out
    p.tally.check(text.rstrip(b"\n") == back.rstrip(b"\n"), "the text is the decoded ids", f"{text!r} {back!r}")
    system = p.ok("--system", "-m", p.base, "--system", "in the", "-p", "hello the area", *greedy).out
    json.dump([{"role": "system", "content": "in the"}, {"role": "user", "content": "hello the area"}], open(messages, "w"))
    other = p.ok("system ids", "-m", p.base, "--ids", ids_arg(p.ids(b"", "--chat", messages)), *greedy[:4]).out
    p.tally.check(system == other, "--system is the system message", f"{system!r} {other!r}")
    nothing = p.ok("-n 0", "-m", p.base, "-p", "hello", "-n", 0).out
    p.tally.check(nothing == b"", "-n 0 prints nothing", repr(nothing))
    r = p.ok("facts", "-m", p.base, "-p", "hello", "-n", 3, "-s", 5)
    p.tally.check("tok/s" in r.err and "first token" in r.err, "timing line", r.err)
    for think in (["--think"], ["--think", "--effort", "high"], ["--nothink"], ["--encoding", "0731", "--think", "--effort", "low"]):
        r = run([p.binary, "-m", p.base, "-p", "hello", "-n", "20", "--temp", "0", *think])     # reasoning goes to stderr
        p.tally.check(r.code == 0 and not r.sanitizer() and "dsv4: " not in r.err, " ".join(think), r.tail())
    full = p.ok("to the context's end", "-m", p.base, "--ids", "5,6", "-c", 40, "--temp", 0).out.split()
    p.tally.check(len(full) <= 39 and (len(full) == 39 or full[-1] == b"1"), "generation ends with the context", str(len(full)))


def sampling(p):
    """Sampler settings that leave one token equal greedy; the distribution of the first token is the model's."""
    greedy = p.ok("greedy", "-m", p.base, "--ids", "0,5,6", "-n", 30, "--temp", 0).out
    for args in (["--top-k", 1], ["--top-p", 1e-6], ["--min-p", 1]):
        out = p.ok(str(args), "-m", p.base, "--ids", "0,5,6", "-n", 30, "--temp", 1.5, "-s", 11, *args).out
        p.tally.check(out == greedy, f"{args}: greedy", f"{out!r} {greedy!r}")
    logits = reference.run(p.base, [0, 5, 6], default=True)[0][-1]
    prob = np.exp(logits - logits.max())
    prob /= prob.sum()
    runs, hits = 150, {}
    for s in range(runs):
        t = int(run([p.binary, "-m", p.base, "--ids", "0,5,6", "-n", "1", "--temp", "1", "--top-p", "1", "--top-k", "0", "--min-p", "0", "-s", str(s)]).out)
        hits[t] = hits.get(t, 0) + 1
    top = np.argsort(-prob)[:8]
    expect, got = prob[top].sum() * runs, sum(hits.get(int(t), 0) for t in top)
    spread = 4 * np.sqrt(max(expect * (1 - prob[top].sum()), 1))
    p.tally.check(abs(expect - got) < spread, "first token over 150 seeds follows the probabilities", f"{got} of the top 8, expected {expect:.1f} +- {spread:.1f}")


def perplexity(p):
    path = os.path.join(p.work, "text.txt")
    open(path, "w").write(TEXT)
    ids = [0] + p.ids(TEXT.encode())
    for mode in ([], ["--exact"]):
        logits = reference.run(p.base, ids, default=not mode)[0][:-1]
        top = logits.max(1)
        nll = np.log(np.exp(logits - top[:, None]).sum(1)) + top - logits[np.arange(len(ids) - 1), ids[1:]]
        r = p.ok(f"ppl {mode}", "ppl", "-m", p.base, *mode, path)
        numbers = re.findall(rb"[0-9]+\.[0-9]+", r.out)
        near = len(numbers) >= 2 and abs(float(numbers[1]) - nll.mean()) < (1e-3 if mode else 3e-2)
        p.tally.check(near, f"ppl {' '.join(mode)}: nats per token as the reference's {nll.mean():.5f}", repr(r.out))


def context_bytes(cfg):
    """Bytes of compressed rows and index keys per token (BF16)."""
    total = 0
    for m in cfg["compress_ratios"][:cfg["num_hidden_layers"]]:
        total += 2 * cfg["head_dim"] / m if m else 0
        total += 2 * cfg["index_head_dim"] / m if m == 4 else 0
    return total


def facts(p):
    for preset in ("tiny", "hc2", "long"):
        d = os.path.join(p.work, "info-" + preset)
        cfg = M.make(d, "native", M.PRESETS[preset])
        r = p.ok(f"info {preset}", "info", "-m", d)
        found = re.search(rb"([0-9.]+) bytes per token", r.out)
        good = found and abs(float(found.group(1)) - context_bytes(cfg)) <= 1
        p.tally.check(good, f"info {preset}: {context_bytes(cfg):.1f} bytes of context per token", r.out.decode()[-300:])
        p.tally.check(b"FP4" in r.out.upper() and b"FP8" in r.out.upper(), f"info {preset}: names the formats", r.out.decode()[:300])
    help_text = p.ok("--help", "--help").out
    for word in (b"--exact", b"--top-p", b"tokenize", b"DSV4_NVRTC"):
        p.tally.check(word in help_text, f"--help has {word.decode()}")
    p.ok("--version", "--version")
    r = p.ok("bench", "bench", "-m", p.base, "-c", 512)
    p.tally.check(b"tok/s" in r.out + r.err.encode(), "bench prints tok/s", r.tail())


def verify(p):
    """`dsv4 verify` finds every kind of damage in the data, which the loader does not read."""
    for d in (p.base, os.path.join(GOLDEN, "edge/int"), os.path.join(GOLDEN, "edge/native")):
        p.ok("verify an intact checkpoint", "verify", d)
    native = os.path.join(p.work, "native")
    M.make(native, "native", {}, seed=3, shards=2)
    cases = (("int", "embed.weight", 777, 0x7FC0), ("int", "layers.0.hc_attn_fn", 5, 0x7F800000), ("int", "layers.1.ffn.experts.2.w2.scale", 9, 0x7FC0),
             ("int", "layers.1.attn.wq_b.scale", 0, 0xFF80), ("int", "layers.0.ffn.gate.tid2eid", 1001, 4), ("int", "mtp.0.e_proj.weight", 100, 0x7F),
             ("int", "head.weight", 32767, 0x7F80), ("native", "layers.2.attn.wo_b.weight", 64, 0xFF), ("native", "layers.2.attn.wo_b.scale", 0, 0xFF),
             ("native", "layers.0.ffn.experts.0.w1.scale", 3, 0xFF), ("native", "mtp.0.h_proj.scale", 0, 0xFF))
    for n, (fmt, name, at, bits) in enumerate(cases):
        src = p.base if fmt == "int" else native
        d = os.path.join(p.work, f"verify{n}")
        os.mkdir(d)
        for f in os.listdir(src):
            if not f.endswith(".safetensors"):
                shutil.copy(os.path.join(src, f), d)
                continue
            ts = F.read_file(os.path.join(src, f))
            if name in ts:
                damaged, shape = ts[name].bits.copy(), ts[name].bits.shape
                damaged.reshape(-1)[at] = bits
                ts[name] = F.Tensor(ts[name].dtype, damaged)
            F.write_file(os.path.join(d, f), ts)
        r = p.ok(f"verify {name}", "verify", d, code=1)
        place = ", ".join(map(str, np.unravel_index(at, shape)))
        token = f"token {at // shape[-1]}" if name.endswith("tid2eid") else None
        p.tally.check(name in r.err and (f"[{place}]" in r.err or token and token in r.err), f"verify {name}: names tensor and element [{place}]", r.err[-300:])


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--dsv4", default="./dsv4")
    ap.add_argument("--slow", type=float, default=1)
    ap.add_argument("-v", action="store_true")
    a = ap.parse_args()
    tally = Tally(a.v)
    with tempfile.TemporaryDirectory() as work:
        p = Programs(os.path.abspath(a.dsv4), work, tally, a.slow)
        for part in (prompts, sampling, perplexity, facts, verify):
            part(p)
    tally.end("programs")


if __name__ == "__main__":
    main()
