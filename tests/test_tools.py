#!/usr/bin/env python3
"""The tools themselves: number formats against ml_dtypes, files against the safetensors library, the requantiser's edge cases."""
import os
import tempfile

import ml_dtypes
import numpy as np
import safetensors

from common import GOLDEN, Tally
import formats as F
import make_checkpoint as M


def codecs(tally):
    e4m3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    tally.check(np.array_equal(F.E4M3, e4m3, equal_nan=True), "e4m3 values")
    e2m1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    tally.check(np.array_equal(F.E2M1, e2m1), "e2m1 values")
    e8m0 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    tally.check(np.array_equal(F.E8M0, e8m0, equal_nan=True), "e8m0 values")
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.standard_normal(100000) * s for s in (1e-3, .1, 1, 100)]).astype(np.float32)
    ties = (F.E4M3[1:127] + F.E4M3[:126]) / 2
    for what, v in (("random", x.clip(-448, 448)), ("ties", ties), ("negative ties", -ties)):
        tally.check(np.array_equal(F.e4m3_encode(v), v.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)), f"e4m3 encoding, {what}")
    ties = (F.E2M1[1:8] + F.E2M1[:7]) / 2
    for what, v in (("random", x.clip(-6, 6)), ("ties", ties), ("negative ties", -ties)):
        tally.check(np.array_equal(F.e2m1_encode(v), v.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)), f"e2m1 encoding, {what}")
    tally.check(np.array_equal(F.bf16_encode(x), x.astype(ml_dtypes.bfloat16).view(np.uint16)), "bf16 encoding")


def requantiser(tally):
    """Edge cases of the dsv4_int rules: zero groups, ties, outliers, short blocks."""
    zero = np.zeros((3, 64), np.float32)
    q, s = F.int4_encode(zero)
    tally.check((q == 0x88).all() and (s == F.bf16_encode(F.FLT_MIN / np.float32(7))).all(), "INT4 of a zero group")
    q, s = F.int8_encode(np.zeros((130, 5), np.float32))
    tally.check((q == 0).all() and s.shape == (2, 1), "INT8 of a zero block with a short edge")
    w = np.zeros((1, 32), np.float32)
    w[0, :5] = 7, -7, 0.5, 1.5, -2.5
    n = F.unpack4(F.int4_encode(w)[0])[0, :5].astype(int) - 8
    tally.check(n.tolist() == [7, -7, 0, 2, -2], "INT4 rounds half to even", str(n))
    w = np.full((128, 128), 1e-3, np.float32)
    w[0, 0] = 448
    tally.check((F.int8_encode(w)[0].view(np.int8).ravel()[1:] == 0).all(), "INT8 with an outlier")


def files(tally, work):
    """Every made checkpoint can be read by the safetensors library, with the table's names, dtypes and shapes."""
    for fmt in ("native", "int", "bf16"):
        d = os.path.join(work, fmt)
        cfg = M.make(d, fmt, M.PRESETS["odd"], shards=3)
        want = {n: (dt, sh) for row in F.tensor_table(cfg) for n, dt, sh in F.stored(*row, fmt)}
        got = {}
        for f in sorted(os.listdir(d)):
            if f.endswith(".safetensors"):
                with safetensors.safe_open(os.path.join(d, f), "numpy") as st:
                    for n in st.keys():
                        s = st.get_slice(n)
                        got[n] = s.get_dtype(), tuple(s.get_shape())
        tally.check(got == want, f"{fmt}: read by safetensors", f"{len(got)} of {len(want)} tensors")
    for model in ("aligned/int", "aligned/native", "edge/int", "edge/native"):
        ck = F.Checkpoint(os.path.join(GOLDEN, model))
        want = {n: (dt, list(sh)) for row in F.tensor_table(ck.config) for n, dt, sh in F.stored(*row, model.split("/")[1])}
        tally.check({n: (t[1], t[2]) for n, t in ck.where.items()} == want, f"{model}: the tensor table")


if __name__ == "__main__":
    tally = Tally()
    codecs(tally)
    requantiser(tally)
    with tempfile.TemporaryDirectory() as work:
        files(tally, work)
    tally.end("tools")
