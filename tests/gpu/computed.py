#!/usr/bin/env python3
"""Gates and the table of computed times, from the simulated device's counters at the real shapes.

  computed.py DIR [--table FILE] [--quick]     DIR: what real_shapes wrote

Prints one line per gate and 'N passed, N failed'. All times are computed from counters and data sheet numbers: none is measured.
"""
import argparse
import json
import os
import sys

CARDS = ("RTX 3090", "RTX A5000")
LAYERS = {"0": 2, "4": 21, "128": 20}           # how many of each kind the model has
LAUNCHES = {"0": 15, "4": 17, "128": 15}
EXPERT_MB = 9.437184, 4.718592                  # w1 + w3, w2 of one expert, INT4 and scales
DISTINCT = {1: 6.0, 4: 23.2, 8: 44.2}           # experts that B rows reach, uniform choice of 6 in 256
GAP_US = 1.25
# weights and scales per layer in MB: the least that must be read
DENSE = {"wq_a, wkv": 6.29, "wq_b": 33.55, "wo_a": 33.55, "wo_b": 33.55}
EXTRA = {"0": 0, "4": 16.78 + 4.72 + 8.39, "128": 8.39}


def load(folder, what, rows, context):
    path = os.path.join(folder, f"{what}-{rows}-{context}.json")
    return json.load(open(path)) if os.path.exists(path) else None


def scaled(name, k, rows, card):
    """Microseconds of a kernel, corrected for what the test model has fewer of."""
    us, mb = k["computed_us"][card]["total"], k["unique_load_bytes"] / 1e6
    if name.startswith("expert_up") and mb:
        return us * DISTINCT[rows] * EXPERT_MB[0] / mb
    if name.startswith("expert_down") and mb:
        return us * (DISTINCT[rows] * EXPERT_MB[1] + 8.4) / mb
    return us


def layer_us(report, rows, card):
    return sum(scaled(n, k, rows, card) for n, k in report["kernels"].items()) + GAP_US * report["launches"]


def head_us(report, card):
    return sum(k["computed_us"][card]["total"] * (8 if n.startswith("gemv") else 1)
               for n, k in report["kernels"].items()) + GAP_US * report["launches"]


def token_ms(folder, rows, context, card):
    parts = [load(folder, kind, rows, context) for kind in LAYERS] + [load(folder, "head", rows, 0)]
    if None in parts:
        return None
    return (sum(n * layer_us(r, rows, card) for n, r in zip(LAYERS.values(), parts)) + head_us(parts[3], card)) / 1e3


class Gates:
    def __init__(self):
        self.passed = self.failed = 0

    def check(self, name, value, limit, least=False):
        ok = value >= limit if least else value <= limit
        self.passed, self.failed = self.passed + ok, self.failed + (not ok)
        print(f"  {'ok  ' if ok else 'FAIL'} {name}: {value:.4g} ({'at least' if least else 'at most'} {limit:.4g})")


# What streams weights, with its gates: warps resident, registers (64 leave room for four blocks of 8 warps, 80 for three, 128 for
# two), sectors asked of L1 and L2 beyond the weights once in %, at one row and at 8
STREAMS = {"gemv": (24, 80, 10, 45), "ffn_in": (24, 64, 10, 35), "expert_up_1": (24, 64, 15, 0), "expert_down_1": (24, 80, 15, 0),
           "expert_up_8": (16, 128, 0, 70), "expert_down_8": (16, 128, 0, 65)}
# Of the others: registers, shared memory passes over the ideal, barriers a block and warp
OTHERS = {"attend_16": (128, 1.02, 40), "attend_32": (168, 1.02, 40), "attend_combine": (64, 1, 0), "attn_latent": (64, 1, 4),
          "hc_mix": (128, 1, 4), "hc_norm": (48, 1, 5), "query_norm": (64, 1, 0), "index_scores": (96, 1, 2),
          "index_topk": (64, 1.5, 40), "route": (64, 1.5, 40)}


def again(k):
    """Sectors asked for beyond those of each byte once, in %: activations and scales, and what a block tells its warps."""
    return 100 * (sum(v["sectors"] for v in k["load"].values()) * 32 / k["unique_load_bytes"] - 1)


def wide(k):
    """Share of the bytes read that came 16 at a time, in %."""
    return 100 * k["load"]["16"]["bytes"] / sum(v["bytes"] for v in k["load"].values())


def per_weight(k, bytes_each):
    return 32 * k["warp_instructions"] / (k["unique_load_bytes"] / bytes_each)


def stream_gates(g, what, k, rows):
    for name, one in k.items():
        if name not in STREAMS:
            continue
        warps, registers, *limit = STREAMS[name]
        g.check(f"{what}, {name}: warps resident", one["occupancy_warps"], warps, True)
        g.check(f"{what}, {name}: registers", one["registers"], registers)
        g.check(f"{what}, {name}: shared memory, KB", (one["shared_static_bytes"] + one["shared_dynamic_bytes"]) / 1024, 33)
        # 4 loads of 16 bytes a lane before the first is used
        g.check(f"{what}, {name}: KB in flight a multiprocessor", one["occupancy_warps"] * 4 * 512 / 1024, 16, True)
        g.check(f"{what}, {name}: bytes read 16 at a time, %", wide(one), 75, True)
        g.check(f"{what}, {name}: sectors asked for again, %", again(one), limit[rows > 1])
        g.check(f"{what}, {name}: shared memory passes over the ideal", one["shared_passes"] / max(1, one["shared_ideal"]), 1)
        g.check(f"{what}, {name}: barriers a block", one["barriers"] * 32 / one["threads"], 3)


# Blocks of the launches of a layer of ratio 4 and of the head, and the KB of weights that each reads: 32 rows, or 32 rows of w1 and
# w3; 128 rows of wq_b, whose warps share no row
GRIDS = {"project": [(48, 128.0), (82, 256.0)], "query": [(320, 128.0)], "wo_a": [(256, 128.0)], "wo_b": [(128, 256.0)],
         "ffn_in": [(64, 256.0), (8, 256.0)], "expert_up_1": [(384, 147.5)], "expert_down_1": [(128, 280.0)], "head": [(4040, 256.0)]}


def fluid(blocks, sms, gbs, per_sm, per_us):
    """Time of a launch over that of its bytes at full speed: the resident blocks share the memory's bandwidth, none of them gets more
    than per_us KB/us (its bytes in flight over the latency), a block that ends makes room for the next."""
    waiting, running, t = list(blocks), [], 0.0
    while waiting or running:
        while waiting and len(running) < sms * per_sm:
            running.append(waiting.pop(0))
        rate = min(per_us, gbs / len(running))
        step = min(running) / rate
        t += step
        running = [left - step * rate for left in running if left - step * rate > 1e-9]
    return t * gbs / sum(blocks)


def balance_gates(g):
    for name, grid in GRIDS.items():
        blocks = [kb for n, kb in grid for _ in range(n)]
        for card, sms, gbs in (("RTX 3090", 82, 0.85 * 936), ("RTX A5000", 64, 0.85 * 768)):
            # 8 warps x 4 loads x 512 bytes in 0.65 us
            g.check(f"{name}, {card}: time over that of its bytes, by blocks", fluid(blocks, sms, gbs, 3, 16 / 0.65), 1.10)


def gates(folder, g):
    launches = 4
    for kind, count in LAYERS.items():
        r = load(folder, kind, 1, 8192)
        k = r["kernels"]
        g.check(f"ratio {kind}: launches", r["launches"], LAUNCHES[kind])
        launches += count * r["launches"]
        least = sum(DENSE.values()) + EXTRA[kind]
        g.check(f"ratio {kind}: bytes of the dense products over the least", k["gemv"]["unique_load_bytes"] / 1e6 / least, 1.005)
        g.check(f"ratio {kind}: bytes of w1, w3 over the least", k["expert_up_1"]["unique_load_bytes"] / 6e6 / EXPERT_MB[0], 1.005)
        g.check(f"ratio {kind}: bytes of w2 over the least",
                k["expert_down_1"]["unique_load_bytes"] / 1e6 / (6 * EXPERT_MB[1] + 8.39), 1.005)
        g.check(f"ratio {kind}: findings", sum(r["findings"].values()) if r["findings"] else 0, 0)
        stream_gates(g, f"ratio {kind}", k, 1)
        for name, one in k.items():
            g.check(f"ratio {kind}, {name}: local memory", one["local_bytes"], 0)
            if name in OTHERS:
                registers, passes, barriers = OTHERS[name]
                g.check(f"ratio {kind}, {name}: registers", one["registers"], registers)
                g.check(f"ratio {kind}, {name}: shared memory passes over the ideal",
                        one["shared_passes"] / max(1, one["shared_ideal"]), passes)
                g.check(f"ratio {kind}, {name}: barriers a block", one["barriers"] * 32 / one["threads"], barriers)
    eight = load(folder, "4", 8, 8192)
    if eight:
        stream_gates(g, "8 rows", eight["kernels"], 8)
        g.check("8 rows: findings", sum(eight["findings"].values()) if eight["findings"] else 0, 0)
    balance_gates(g)
    a = load(folder, "4", 1, 8192)["kernels"]
    # ratio 0: all of gemv is INT8; PTX instructions, of which moves between registers take no time
    g.check("instructions a weight: INT8", per_weight(load(folder, "0", 1, 8192)["kernels"]["gemv"], 1), 2.1)
    g.check("instructions a weight: INT4", per_weight(a["expert_up_1"], 0.5625), 2.1)
    g.check("instructions a weight: BF16", per_weight(load(folder, "head", 1, 0)["kernels"]["gemv"], 2), 4.2)
    g.check("attend: share of instructions that are mma", a["attend_16"]["mma_half"] / a["attend_16"]["warp_instructions"], 0.02, True)
    g.check("launches per token", launches, 700)
    g.check("ms per token computed, one row at 8k, RTX 3090, kernels only",
            token_ms(folder, 1, 8192, CARDS[0]) - launches * GAP_US / 1e3, 16)
    g.check("the same, RTX A5000", token_ms(folder, 1, 8192, CARDS[1]) - launches * GAP_US / 1e3, 19.5)


def table(folder, out):
    p = lambda *a: print(*a, file=out)
    p("# Computed GPU times\n")
    p("From the simulated device: the kernels' own counters at the shapes of the real model (`tests/gpu/run.sh --table`), turned")
    p("into time by data sheet numbers: per launch the largest of unique bytes / (0.85 x DRAM bandwidth), warp instructions /")
    p("issue rate, tensor operations / rate and 3 us, plus 1.25 us between launches. **Nothing here was measured on a GPU.** The model knows")
    p("no latency, no cache misses beyond the first touch and no clocks; real cards will be slower. MB asked for: the 32-byte sectors")
    p("of every load, from wherever they come.\n")
    p("Weights: dsv4_int. Hops between GPUs (25 us each in the model) are not included. Prefill's experts at 64 rows see 16 of 256.\n")
    p("## Whole token, sum over all layers and the head\n")
    p("| rows | context | RTX 3090: ms a step, tok/s | RTX A5000: ms a step, tok/s |\n|---|---|---|---|")
    for rows in (1, 4, 8):
        for context in (8192, 131072):
            ms = [token_ms(folder, rows, context, c) for c in CARDS]
            if None not in ms:
                p(f"| {rows} | {context} | " + " | ".join(f"{m:.1f}, {rows / m * 1e3:.0f}" for m in ms) + " |")
    for what, rows, context, title in (("4", 1, 8192, "one row at 8k"), ("4", 1, 131072, "one row at 128k"),
                                       ("4", 8, 8192, "8 rows at 8k"), ("4", 64, 8192, "64 rows (prefill), 16 experts"),
                                       ("128", 1, 131072, "one row at 128k"), ("0", 1, 8192, "one row")):
        r = load(folder, what, rows, context)
        if not r:
            continue
        p(f"\n## A layer of ratio {what}, {title}: {r['launches']} launches\n")
        p("| kernel | launches | MB read once | MB asked for | warp instr. (k) | registers | us 3090 | us A5000 | bound by |")
        p("|---|---|---|---|---|---|---|---|---|")
        for name, k in r["kernels"].items():
            asked = 32 * sum(v["sectors"] for v in k["load"].values()) / 1e6
            us = [k["computed_us"][c]["total"] for c in CARDS]
            bound = max(("dram", "issue", "tensor", "floor"), key=lambda b: k["computed_us"][CARDS[0]][f"bound_by_{b}"])
            p(f"| {name} | {k['launches']} | {k['unique_load_bytes'] / 1e6:.2f} | {asked:.2f} | "
              f"{k['warp_instructions'] / 1e3:.0f} | {k['registers']} | {us[0]:.1f} | {us[1]:.1f} | {bound} |")


def missed(folder, p):
    """What the kernels do not reach of what was aimed at, with the reasons."""
    one, eight, many = (load(folder, "4", rows, 8192)["kernels"] for rows in (1, 8, 64))
    int8, head = load(folder, "0", 1, 8192)["kernels"]["gemv"], load(folder, "head", 1, 0)["kernels"]["gemv"]
    # share of what L1 delivers in the computed time: 128 bytes a clock and multiprocessor
    l1 = lambda k: (100 * 32 * sum(v["sectors"] for v in k["load"].values()) /
                    (k["computed_us"][CARDS[0]]["total"] * 82 * 128 * 1695))
    issue = lambda k: 100 * k["warp_instructions"] / (k["computed_us"][CARDS[0]]["total"] * 82 * 4 * 1695)
    share = lambda k: 100 * (k["mma_half"] + k["mma_int"]) / k["warp_instructions"]
    p("\n## Aimed at and missed\n")
    p("| aim | is | why |\n|---|---|---|")
    p(f"| registers of the products <= 64 | gemv {one['gemv']['registers']}, expert_down_1 {one['expert_down_1']['registers']} (ffn_in "
      f"{one['ffn_in']['registers']}, expert_up_1 {one['expert_up_1']['registers']}), expert_up_8 {eight['expert_up_8']['registers']}, "
      f"expert_down_8 {eight['expert_down_8']['registers']} | what they are for is reached: {one['gemv']['occupancy_warps']} warps are "
      "resident where 24 were asked for, with 48 KB of weights in flight where 16 were. No loop spills; gemv keeps one or two numbers of "
      "its start in local memory where it also has FP8. The kernels for 8 rows of one expert keep 12 sums more: 16 warps, 32 KB in flight |")
    p(f"| sectors asked for again <= 10 % of the weights at one row | gemv {again(one['gemv']):.0f}, ffn_in {again(one['ffn_in']):.0f}, "
      f"expert_down_1 {again(one['expert_down_1']):.0f}, expert_up_1 {again(one['expert_up_1']):.0f}, head {again(head):.0f} % | the warps "
      "of w1 and of w3 read the same activations, the second time from L1: a warp for both would need twice the sums. FP32 activations "
      f"beside BF16 come as half sectors, twice. L1 is at {l1(one['expert_up_1']):.0f} % of what it can deliver |")
    p(f"| the same <= 25 % at 8 rows | gemv {again(eight['gemv']):.0f}, ffn_in {again(eight['ffn_in']):.0f}, expert_up_8 "
      f"{again(eight['expert_up_8']):.0f}, expert_down_8 {again(eight['expert_down_8']):.0f} % | 8 rows of INT8 and their scales are 9 bytes "
      "beside the 32 of 32 matrix rows: 28 %; of FP32 32 beside 64. Taller warps would leave fewer blocks than multiprocessors (wo_b: "
      f"128). L1 is at {l1(eight['gemv']):.0f}, {l1(eight['expert_up_8']):.0f} and {l1(eight['expert_down_8']):.0f} %, issue at "
      f"{issue(eight['gemv']):.0f}, {issue(eight['expert_up_8']):.0f} and {issue(eight['expert_down_8']):.0f} %. An expert of this test meets "
      f"{48 * EXPERT_MB[0] * 1e6 / eight['expert_up_8']['unique_load_bytes']:.1f} rows, one of 256 experts 1.1: it then asks for what one row does |")
    p(f"| instructions a weight: INT8 <= 1.1, INT4 <= 1.8, BF16 <= 1.0 | {per_weight(int8, 1):.1f}, "
      f"{per_weight(one['expert_up_1'], 0.5625):.1f}, {per_weight(head, 2):.1f} at one row | counted in PTX over the whole kernel, with the "
      "start and the end of a warp's short rows. A scale per 32 columns, its sums turned into floats and 64-bit addresses are most of it. "
      f"They cost {issue(one['gemv']):.0f}, {issue(one['expert_up_1']):.0f} and {issue(head):.0f} % of the issue slots, whatever the batch up "
      "to 8 (2 with 4-bit weights). FP32 activations as three BF16 numbers are half of BF16's: exact, where one would round |")
    p("| bytes on a multiprocessor <= 1.10 of the mean | wo_b 1.28, expert_down 1.28, ffn_in 1.28 on 82 | their 128 and 72 blocks are "
      "resident at once and share the memory's bandwidth, so that they end together: the time by blocks, which is tested, is 1.0 to "
      "1.09 of that of the bytes |")
    p("| bytes read 16 at a time >= 99 % | " + ", ".join(f"{n} {wide(one[n]):.0f}" for n in ("gemv", "ffn_in", "expert_up_1",
      "expert_down_1")) + " % | all weights are; the rest is scales, which come 4 and 8 bytes at a time |")
    p(f"| registers of attention <= 128 | attend_32: {many['attend_32']['registers']}, attend_16 (one or two rows): "
      f"{one['attend_16']['registers']} | queries (32) and results (64) of 32 heads stay in registers. Held to 128 by the compiler it spills "
      "52 to 72 bytes inside the loop, for nothing: its 68 KB of shared memory allow one block in any case |")
    p(f"| registers of the hyper-connections <= 48 | hc_mix: {one['hc_mix']['registers']} | 32 sums (4 rows of fn x 8 rows of the batch) "
      "and 16 numbers of fn in flight: that is what reads fn once for 8 rows |")
    p(f"| a quarter of the instructions of prefill are mma | gemm: {share(many['gemm']):.1f} %, attend_32: {share(many['attend_32']):.1f} %, "
      f"index_scores: {share(many['index_scores']):.1f} % | the aim does not fit the chip: an INT8 m16n8k32 keeps its tensor core busy for "
      "16 issue slots, a BF16 m16n8k16 for 16 (A5000) or 32 (3090), so 6 % (3 %) is all it can do. A scale per 32 columns costs 12 "
      "instructions (convert, scale, add) for each INT8 mma |")
    p("| launches per layer 12 / 18 / 14 | 15 / 17 / 15, 691 a token | one more product launch than aimed at where there is no indexer; "
      "the sum is within 700 |")


def main():
    a = argparse.ArgumentParser()
    a.add_argument("dir")
    a.add_argument("--table")
    a = a.parse_args()
    g = Gates()
    gates(a.dir, g)
    if a.table:
        with open(a.table, "w") as out:
            table(a.dir, out)
            missed(a.dir, lambda *words: print(*words, file=out))
    print(f"{g.passed} passed, {g.failed} failed")
    sys.exit(g.failed != 0)


if __name__ == "__main__":
    main()
