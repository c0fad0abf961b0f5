"""Reference of test_ptx_half.c: CRC-32 of the results of each operation on all 65536 halves.

    python tests/sim/test_ptx_half.py > tests/sim/test_ptx_half.ref      (needs numpy, ml_dtypes)

Conversions come from numpy and ml_dtypes; sums and products are computed in Python's unbounded
integers and rounded once, so nothing is shared with the simulator.
"""
import zlib

import ml_dtypes
import numpy as np

np.seterr(all="ignore")
X = np.arange(65536, dtype=np.uint32)
LOW = [0x0000, 0x0001, 0x1000, 0x2fff, 0x7fff, 0x8000, 0x8001, 0xffff]
F16 = dict(mant=10, bias=15, type=np.float16,
           b=[0x0000, 0x8000, 0x3c00, 0xbc01, 0x0001, 0x7bff, 0x7c00, 0x3555],
           c=[0x3c00, 0x0001, 0x8400, 0x7bff, 0x0000, 0xfc00, 0x1234, 0xb8a7])
BF16 = dict(mant=7, bias=127, type=ml_dtypes.bfloat16,
            b=[0x0000, 0x8000, 0x3f80, 0xbf81, 0x0001, 0x7f7f, 0x7f80, 0x3eab],
            c=[0x3f80, 0x0001, 0x8080, 0x0001, 0x0000, 0xff80, 0x1234, 0xb8a7])


def out(name, words):
    words = np.concatenate([np.asarray(w).astype(np.uint32) for w in words])
    print(f"{name} {zlib.crc32(words.astype('<u4').tobytes()):08x}")


def halves(bits, f):
    return np.asarray(bits).astype(np.uint16).view(f["type"])


def bits16(v):
    """Bits of a half array, any NaN as 7fff."""
    return np.where(np.isnan(v.astype(np.float32)), 0x7FFF, v.view(np.uint16)).astype(np.uint32)


def bits32(v):
    v = v.astype(np.float32)
    return np.where(np.isnan(v), 0x7FFFFFFF, v.view(np.uint32))


def split(h, f):
    """(kind, sign, integer, exponent): the value is (-1)^sign * integer * 2^exponent."""
    sign, exp, frac = h >> 15, h >> f["mant"] & (0x7FFF >> f["mant"]), h & ((1 << f["mant"]) - 1)
    if exp == 0x7FFF >> f["mant"]:
        return ("nan" if frac else "inf", sign, 0, 0)
    lead = 1 << f["mant"] if exp else 0
    return ("num", sign, lead + frac, max(exp, 1) - f["bias"] - f["mant"])


def rounded(sign, n, e, f):
    """The half nearest to (-1)^sign * n * 2^e, ties to even."""
    drop = max(n.bit_length() - f["mant"] - 1, 1 - f["bias"] - f["mant"] - e)
    if drop > 0:
        rest, half = n & ((1 << drop) - 1), 1 << (drop - 1)
        n >>= drop
        n += rest > half or (rest == half and n & 1)
        e += drop
    else:
        n <<= -drop
        e += drop
    # n has at most mant + 2 bits; without a leading one it is subnormal
    bits = n + ((e + f["bias"] + f["mant"] - 1) << f["mant"]) if n else 0
    return sign << 15 | min(bits, (0x7FFF >> f["mant"]) << f["mant"])


def fma(a, b, c, f):
    (ka, sa, na, ea), (kb, sb, nb, eb), (kc, sc, nc, ec) = split(a, f), split(b, f), split(c, f)
    sp = sa ^ sb
    if "nan" in (ka, kb, kc) or (ka == "inf" and nb == 0 and kb == "num") or \
       (kb == "inf" and na == 0 and ka == "num"):
        return 0x7FFF
    inf = (0x7FFF >> f["mant"]) << f["mant"]
    if "inf" in (ka, kb):
        return 0x7FFF if kc == "inf" and sc != sp else sp << 15 | inf
    if kc == "inf":
        return sc << 15 | inf
    e = min(ea + eb, ec)
    p, q = (na * nb) << (ea + eb - e), nc << (ec - e)
    total = (-p if sp else p) + (-q if sc else q)
    if total == 0:
        return (sp & sc) << 15 if p == q == 0 else 0
    return rounded(int(total < 0), abs(total), e, f)


def pairs(op, f):
    """op on the low half x and the high half x ^ 8001, for each k."""
    result = []
    for k in range(8):
        low = np.array([op(x, k, f) for x in range(65536)], dtype=np.uint32)
        result.append(low | low[X ^ 0x8001] << 16)
    return result


def min_max(f, largest):
    result = []
    for k in range(8):
        a, b = halves(X, f), halves(np.full(65536, f["b"][k]), f)
        x, y = a.astype(np.float32), b.astype(np.float32)
        r = np.fmax(x, y) if largest else np.fmin(x, y)
        zero = (x == 0) & (y == 0)  # -0 is below +0
        s = (np.signbit(x) & np.signbit(y)) if largest else (np.signbit(x) | np.signbit(y))
        r = np.where(zero, np.where(s, np.float32(-0.0), np.float32(0.0)), r)
        low = bits16(r.astype(np.float32).astype(f["type"]))
        result.append(low | low[X ^ 0x8001] << 16)
    return result


def toward_zero(f):
    result = []
    for low in LOW:
        v = (X << 16 | low).astype(np.uint32).view(np.float32)
        h = v.astype(f["type"])
        up = np.abs(h.astype(np.float32)) > np.abs(v)
        result.append(np.where(np.isnan(v), 0x7FFF, h.view(np.uint16).astype(np.uint32) - up))
    return result


def to_int(v, low, high, rounding):
    v = rounding(v.astype(np.float64))
    return np.where(np.isnan(v), 0, np.clip(v, low, high)).astype(np.int64) & 0xFFFFFFFF


for name, f in (("f16", F16), ("bf16", BF16)):
    h = halves(X, f)
    wide = [(X << 16 | low).astype(np.uint32).view(np.float32) for low in LOW]
    out(f"to_f32.{name}", [bits32(h)])
    out(f"from_f32.{name}", [bits16(v.astype(f["type"])) for v in wide])
    out(f"from_f32_rz.{name}", toward_zero(f))
    out(f"pair.{name}", [bits16(wide[0].astype(f["type"])) << 16 | bits16(v.astype(f["type"]))
                         for v in wide])
    if f is F16:  # a product plus a zero of its sign, a product with one
        out("add.f16x2", pairs(lambda x, k, f: fma(x, 0x3C00, f["b"][k], f), f))
        out("sub.f16x2", pairs(lambda x, k, f: fma(x, 0x3C00, f["b"][k] ^ 0x8000, f), f))
        out("mul.f16x2", pairs(lambda x, k, f: fma(x, f["b"][k], (x ^ f["b"][k]) & 0x8000, f), f))
    out(f"fma.{name}x2", pairs(lambda x, k, f: fma(x, f["b"][k], f["c"][k], f), f))
    out(f"fma_swap.{name}x2", pairs(lambda x, k, f: fma(f["b"][k], f["c"][k], x, f), f))
    out(f"min.{name}x2", min_max(f, False))
    out(f"max.{name}x2", min_max(f, True))
    out(f"neg.{name}", [X ^ 0x8000])
    out(f"abs.{name}", [X & 0x7FFF])

h = halves(X, F16)
out("rni.s32.f16", [to_int(h, -2**31, 2**31 - 1, np.rint)])
out("rzi.s8.f16", [to_int(h, -128, 127, np.trunc)])
out("rmi.u8.f16", [to_int(h, 0, 255, np.floor)])
out("f16.u16", [bits16(X.astype(np.float64).astype(np.float16))])
out("f16.s16", [bits16(X.astype(np.uint16).view(np.int16).astype(np.float64).astype(np.float16))])
out("f16.s8", [bits16(X.astype(np.uint8).view(np.int8).astype(np.float32).astype(np.float16))])
out("f16_f64", [bits32(h)])
