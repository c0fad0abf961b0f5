#!/usr/bin/env python3
"""The release's FP4 / FP8 checkpoint -> dsv4_int, in numpy: the yardstick for `dsv4 convert`, slow and in memory.

  requant.py SRC DST

Weights and scales follow the dsv4_int rules; a weight whose scale lies in another shard is found through the index and converted
too (its scale stays in the scale's shard).
"""
import argparse
import json
import os
import shutil

import formats as F


def convert(src, dst):
    os.makedirs(dst, exist_ok=True)
    ck = F.Checkpoint(src)
    total = 0
    for f in sorted(os.listdir(src)):
        a, b = os.path.join(src, f), os.path.join(dst, f)
        if not f.endswith(".safetensors"):
            if not os.path.isdir(a):
                shutil.copyfile(a, b)
            continue
        mine = F.read_file(a)
        both = dict(mine)
        for name in mine:           # bring in the other half of a pair that was split
            base = name.removesuffix(".weight").removesuffix(".scale")
            for pair in (base + ".weight", base + ".scale"):
                if pair in ck.where and base + ".scale" in ck.where:
                    both.setdefault(pair, ck.raw(pair))
        out = {n: t for n, t in F.requantise(both).items() if n in mine}
        total += sum(t.nbytes() for t in out.values())
        F.write_file(b, out)
    cfg = dict(ck.config, expert_dtype="int4", quantization_config=F.quantization_config("int"))
    json.dump(cfg, open(os.path.join(dst, "config.json"), "w"), indent=2)
    index = json.load(open(os.path.join(src, "model.safetensors.index.json")))
    index.setdefault("metadata", {})["total_size"] = total
    json.dump(index, open(os.path.join(dst, "model.safetensors.index.json"), "w"), indent=2)


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("src")
    ap.add_argument("dst")
    convert(**vars(ap.parse_args()))
