#!/usr/bin/env python3
"""What a token costs at a growing position: decode on models of two thin layers that differ in the kind of the second one.

  context.py WORK [REPEATS]     makes the models in WORK (a few MB), runs `dsv4 bench` on each in turn, prints a table in Markdown

Thin layers (64 wide, 2 heads of 32, 2 indexer heads of 16) with the real window, top-k and ratios: what is constant is small, so
that what grows can be seen. Beyond 2048 positions the rows of the context are made up (see apps/bench.c).
"""
import os
import re
import statistics
import subprocess
import sys

DSV4 = os.environ.get("DSV4", "./dsv4")
KINDS = {"window only": 0, "HCA, ratio 128": 128, "CSA, ratio 4": 4}
DEPTHS = [1 << 10, 1 << 14, 1 << 17, 1 << 20]


def model(work, ratio):
    out = os.path.join(work, f"ratio{ratio}")
    if not os.path.exists(f"{out}/config.json"):
        subprocess.run([sys.executable, "tools/make_checkpoint.py", out, "--preset", "long", "--set", "num_hidden_layers=2",
                        "--set", "num_nextn_predict_layers=0", "--set", f"compress_ratios=0,{ratio}", "--set", "index_topk=512",
                        "--set", "sliding_window=128", "--set", f"max_position_embeddings={DEPTHS[-1] + 4096}"], check=True)
    return out


def run(path):
    """Milliseconds per decoded token at each depth."""
    out = subprocess.run([DSV4, "bench", "-m", path, "--devices", "cpu", "-c", str(DEPTHS[-1] + 64), "-n", "64"],
                         check=True, capture_output=True, text=True).stdout
    rows = {int(d): 1000 / float(t) for d, t in re.findall(r"^ *(\d+) +[\d.]+ +([\d.]+) ", out, re.M)}
    return [rows[d] for d in DEPTHS]


def main():
    work, repeats = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3
    paths = {kind: model(work, ratio) for kind, ratio in KINDS.items()}
    runs = {kind: [] for kind in KINDS}
    for _ in range(repeats):
        for kind in KINDS:
            runs[kind].append(run(paths[kind]))
    print(f"| ms per token at position | {' | '.join(f'{d:,}' for d in DEPTHS)} | slope per 1,000 positions |\n|---|---|---|---|---|---|")
    best = {}
    for kind in KINDS:
        best[kind] = [statistics.median(v) for v in zip(*runs[kind])]
        slope = (best[kind][-1] - best[kind][0]) / (DEPTHS[-1] - DEPTHS[0]) * 1e6
        print(f"| {kind} | {' | '.join(f'{v:.3f}' for v in best[kind])} | {slope:.2f} us |")
    keys, rows = DEPTHS[-1] // 4, DEPTHS[-1] // 128
    grown = {k: (best[k][-1] - best[k][0]) * 1e6 for k in best}
    print(f"\nThe CSA layer at {DEPTHS[-1]:,}: {grown['CSA, ratio 4'] / keys:.1f} ns for each of {keys:,} index keys; "
          f"the HCA layer: {grown['HCA, ratio 128'] / rows:.1f} ns for each of {rows:,} rows.")


if __name__ == "__main__":
    main()
