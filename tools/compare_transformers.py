#!/usr/bin/env python3
"""A second opinion: HF transformers' DeepseekV4 and this engine on the same plain BF16 checkpoint (needs torch and transformers).

  compare_transformers.py [--dsv4 ./dsv4] [--tokens 300] [--presets odd,hc2,...]

transformers loads the checkpoint through its own loader and computes in float32 with eager attention. MTP layers do not exist there.
"""
import argparse
import subprocess
import sys
import tempfile

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import make_checkpoint as M
import reference


def transformers_logits(path, ids):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].double().numpy()


def engine_logits(dsv4, path, ids, vocab):
    with tempfile.NamedTemporaryFile() as f:
        subprocess.run([dsv4, "-m", path, "--ids", ",".join(map(str, ids)), "-n", "0", "--exact", "--logits", f.name],
                       check=True, stderr=subprocess.PIPE)
        return np.fromfile(f.name, "<f4").reshape(-1, vocab).astype(np.float64)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--dsv4", default="./dsv4")
    ap.add_argument("--tokens", type=int, default=300)
    ap.add_argument("--presets", default="tiny,odd,hc2,hca")
    a = ap.parse_args()
    ok = True
    for preset in a.presets.split(","):
        with tempfile.TemporaryDirectory() as d:
            # many indexer heads: with few, scores of exactly 0 are common and both sides break such ties in their own way
            cfg = M.make(d, "bf16", {**M.PRESETS[preset], "index_n_heads": 24})
            rng = np.random.default_rng(7)
            ids = [0] + rng.integers(3, cfg["vocab_size"], a.tokens - 1).tolist()
            theirs = transformers_logits(d, ids)
            ours = engine_logits(a.dsv4, d, ids, cfg["vocab_size"])
            third = reference.run(d, ids)[0]
        std, diff, ref = theirs.std(), np.abs(theirs - ours).max(1), np.abs(theirs - third).max(1)
        good = np.isfinite(ours).all() and (diff <= 0.005 * std).mean() >= 0.99
        ok &= bool(good)
        print(f"{preset}: {a.tokens} tokens, logit std {std:.3f}, largest difference dsv4 {diff.max():.2e} (median row {np.median(diff):.2e}),"
              f" reference.py {ref.max():.2e}: {'ok' if good else 'FAIL'}")
    sys.exit(not ok)


if __name__ == "__main__":
    main()
