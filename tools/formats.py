"""The file formats of a DeepSeek-V4-Flash checkpoint, for the other tools here (numpy only).

safetensors reading and writing, the tensor table, the number formats (BF16, FP8 e4m3, E8M0, FP4 e2m1, the INT4 / INT8 of
dsv4_int) and the requantisation from the release's FP4 / FP8 to dsv4_int. It shares no code with the engine or its converter.
"""
import json
import os
import struct

import numpy as np

ITEM = {"I64": 8, "F64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "U8": 1}
# the order in which safetensors' own writer puts dtypes into a file, then by name
FILE_ORDER = ["I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E8M0", "F8_E4M3", "I8", "U8"]
RAW = {8: np.uint64, 4: np.uint32, 2: np.uint16, 1: np.uint8}
FLT_MIN = np.float32(1.17549435e-38)


# ---- number formats -------------------------------------------------------------------------------------------------

def bf16_encode(x):
    """float32 -> BF16 bits, round to nearest even (finite values)."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def bf16_decode(b):
    return (b.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bf16_round(x):
    return bf16_decode(bf16_encode(x))


def _e4m3_values():
    v = np.zeros(256, np.float32)
    for b in range(256):
        e, m = b >> 3 & 15, b & 7
        a = m / 8 * 2.0 ** -6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)
        v[b] = np.nan if b & 127 == 127 else -a if b & 128 else a
    return v


E4M3 = _e4m3_values()
E8M0 = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan))
E2M1 = np.array([0, .5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])


def _nearest(x, grid):
    """Index of the nearest value of an ascending grid of magnitudes, ties to the even index."""
    mid = (grid[1:] + grid[:-1]) / 2
    i = np.searchsorted(mid, x, side="left")                   # x <= mid[i]: a tie goes to the lower neighbour
    tie = (i < len(mid)) & (x == mid[np.minimum(i, len(mid) - 1)]) & (i % 2 == 1)
    return (i + tie).astype(np.uint8)


def e4m3_encode(x):
    """float -> e4m3 bytes, nearest even, saturating at 448."""
    return _nearest(np.abs(x), E4M3[:127]) | (np.signbit(x).astype(np.uint8) << np.uint8(7))


def e2m1_encode(x):
    return _nearest(np.abs(x), E2M1[:8]) | (np.signbit(x).astype(np.uint8) << np.uint8(3))


def e8m0_for(absmax, top):
    """The E8M0 byte of the smallest power of two s with absmax / s <= top."""
    e = np.ceil(np.log2(np.maximum(absmax.astype(np.float64), 1e-30) / top))
    return (np.clip(e, -127, 127) + 127).astype(np.uint8)


def pack4(nib):
    """[N, K] nibbles -> [N, K/2] bytes, even column in the low half."""
    return (nib[:, 0::2] | (nib[:, 1::2] << 4)).astype(np.uint8)


def unpack4(b):
    out = np.empty((b.shape[0], b.shape[1] * 2), np.uint8)
    out[:, 0::2], out[:, 1::2] = b & 15, b >> 4
    return out


def cdiv(a, b):
    return -(-a // b)


def spread(s, shape, rows, cols):
    """A grid of block scales as a full matrix; edge blocks are short."""
    return np.repeat(np.repeat(s, rows, 0)[:shape[0]], cols, 1)[:, :shape[1]]


def block_absmax(w, rows, cols):
    n, k = w.shape
    p = np.zeros((cdiv(n, rows) * rows, cdiv(k, cols) * cols), np.float32)
    p[:n, :k] = np.abs(w)
    return p.reshape(p.shape[0] // rows, rows, p.shape[1] // cols, cols).max((1, 3))


def fp8_encode(w):
    """float32 [N, K] -> e4m3 bytes [N, K], E8M0 scales of 128 x 128 blocks."""
    s = e8m0_for(block_absmax(w, 128, 128), 448.0)
    return e4m3_encode(w / spread(E8M0[s], w.shape, 128, 128)), s


def fp8_decode(q, s):
    return E4M3[q] * spread(E8M0[s], q.shape, 128, 128)


def fp4_encode(w):
    """float32 [N, K] -> packed e2m1 [N, K/2], E8M0 scales of 32 columns."""
    s = e8m0_for(block_absmax(w, 1, 32), 6.0)
    return pack4(e2m1_encode(w / spread(E8M0[s], w.shape, 1, 32))), s


def fp4_decode(q, s):
    n = unpack4(q)
    return E2M1[n] * spread(E8M0[s], n.shape, 1, 32)


def int4_encode(w):
    """The dsv4_int rule for experts: [N, K/2] bytes of q + 8, BF16 scales of 32 columns."""
    s = np.maximum(block_absmax(w, 1, 32), FLT_MIN) / np.float32(7)
    q = np.clip(np.rint(w / spread(s, w.shape, 1, 32)), -8, 7)
    return pack4((q + 8).astype(np.uint8)), bf16_encode(s)


def int4_decode(q, s):
    n = unpack4(q)
    return (n.astype(np.float32) - 8) * spread(bf16_decode(s), n.shape, 1, 32)


def int8_encode(w):
    """The dsv4_int rule for dense matrices: int8 [N, K] as bytes, BF16 scales of 128 x 128 blocks."""
    s = np.maximum(block_absmax(w, 128, 128), FLT_MIN) / np.float32(127)
    q = np.clip(np.rint(w / spread(s, w.shape, 128, 128)), -128, 127)
    return q.astype(np.int8).view(np.uint8), bf16_encode(s)


def int8_decode(q, s):
    return q.view(np.int8).astype(np.float32) * spread(bf16_decode(s), q.shape, 128, 128)


# ---- safetensors ----------------------------------------------------------------------------------------------------

class Tensor:
    """A named array as it lies in a file: dtype string, shape, and the bits as unsigned integers."""
    def __init__(self, dtype, bits, shape=None):
        self.dtype, self.bits, self.shape = dtype, bits, tuple(bits.shape if shape is None else shape)

    def nbytes(self):
        n = ITEM[self.dtype]
        for d in self.shape:
            n *= d
        return n


def header_bytes(tensors):
    """The 8-byte length and the JSON of a file that holds {name: Tensor}; also the names in file order."""
    names = sorted(tensors, key=lambda n: (FILE_ORDER.index(tensors[n].dtype), n))
    head, at = {}, 0
    for n in names:
        t = tensors[n]
        head[n] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + t.nbytes()]}
        at += t.nbytes()
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, names, at


def write_file(path, tensors):
    """One safetensors file. A tensor's bits may be an array or a function that yields arrays (streaming)."""
    head, names, _ = header_bytes(tensors)
    with open(path, "wb") as f:
        f.write(head)
        for n in names:
            b = tensors[n].bits
            for part in b() if callable(b) else [b]:
                np.ascontiguousarray(part).tofile(f)


def write_index(path, where, total):
    with open(os.path.join(path, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}, f, indent=2)


def read_header(path):
    """name -> (dtype, shape, begin, end), offsets from the file's start."""
    with open(path, "rb") as f:
        n, = struct.unpack("<Q", f.read(8))
        head = json.loads(f.read(n))
    head.pop("__metadata__", None)
    return {k: (v["dtype"], v["shape"], 8 + n + v["data_offsets"][0], 8 + n + v["data_offsets"][1]) for k, v in head.items()}


def read_file(path):
    data = np.memmap(path, np.uint8, "r")
    out = {}
    for name, (dtype, shape, a, b) in read_header(path).items():
        out[name] = Tensor(dtype, np.frombuffer(data[a:b].tobytes(), RAW[ITEM[dtype]]).reshape(shape))
    return out


class Checkpoint:
    """A model directory: config and lazily read tensors."""
    def __init__(self, path):
        self.path = path
        self.config = json.load(open(os.path.join(path, "config.json")))
        self.where = {}
        for f in sorted(os.listdir(path)):
            if f.endswith(".safetensors"):
                self.where.update({n: (f, *t) for n, t in read_header(os.path.join(path, f)).items()})

    def raw(self, name):
        f, dtype, shape, a, b = self.where[name]
        with open(os.path.join(self.path, f), "rb") as fh:
            fh.seek(a)
            return Tensor(dtype, np.frombuffer(fh.read(b - a), RAW[ITEM[dtype]]).reshape(shape))

    def get(self, name):
        """A tensor as float32 (int64 for I64); a quantised weight is decoded with the scale that belongs to it."""
        t = self.raw(name)
        if t.dtype == "F32":
            return t.bits.view(np.float32)
        if t.dtype == "BF16":
            return bf16_decode(t.bits)
        if t.dtype == "I64":
            return t.bits.view(np.int64)
        s = self.raw(name.removesuffix(".weight") + ".scale")
        kind = t.dtype, s.dtype, ".experts." in name
        decode = {("F8_E4M3", "F8_E8M0", False): fp8_decode, ("I8", "F8_E8M0", True): fp4_decode,
                  ("I8", "BF16", True): int4_decode, ("I8", "BF16", False): int8_decode}[kind]
        return decode(t.bits, s.bits)

    def format(self, name):
        """bf16, f32, fp8, fp4, int4 or int8: how the weight `name` is stored."""
        d = self.where[name][1]
        if d in ("BF16", "F32"):
            return d.lower()
        s = self.where[name.removesuffix(".weight") + ".scale"][1]
        return "fp8" if d == "F8_E4M3" else "fp4" if s == "F8_E8M0" else "int4" if ".experts." in name else "int8"


# ---- the model's tensors --------------------------------------------------------------------------------------------

def ratio_of(cfg, i):
    r = cfg["compress_ratios"]
    return r[i] if i < len(r) else 0


def block_table(cfg, p, ratio, hashed):
    d, hc, H, hd = cfg["hidden_size"], cfg["hc_mult"], cfg["num_attention_heads"], cfg["head_dim"]
    q, g, o, mi = cfg["q_lora_rank"], cfg["o_groups"], cfg["o_lora_rank"], cfg["moe_intermediate_size"]
    E, k, nh, ih = cfg["n_routed_experts"], cfg["num_experts_per_tok"], cfg["index_n_heads"], cfg["index_head_dim"]
    mix = (2 + hc) * hc
    yield p + "attn_norm.weight", "norm", (d,)
    yield p + "ffn_norm.weight", "norm", (d,)
    for part in ("attn", "ffn"):
        yield f"{p}hc_{part}_fn", "f32", (mix, hc * d)
        yield f"{p}hc_{part}_base", "f32", (mix,)
        yield f"{p}hc_{part}_scale", "f32", (3,)
    a = p + "attn."
    yield a + "attn_sink", "f32", (H,)
    yield a + "wq_a.weight", "dense", (q, d)
    yield a + "wq_b.weight", "dense", (H * hd, q)
    yield a + "wkv.weight", "dense", (hd, d)
    yield a + "q_norm.weight", "norm", (q,)
    yield a + "kv_norm.weight", "norm", (hd,)
    yield a + "wo_a.weight", "dense", (g * o, H * hd // g)
    yield a + "wo_b.weight", "dense", (d, g * o)
    if ratio:
        yield from compressor_table(a + "compressor.", ratio, hd, d)
    if ratio == 4:
        yield a + "indexer.wq_b.weight", "dense", (nh * ih, q)
        yield a + "indexer.weights_proj.weight", "bf16", (nh, d)
        yield from compressor_table(a + "indexer.compressor.", ratio, ih, d)
    f = p + "ffn."
    yield f + "gate.weight", "bf16", (E, d)
    if hashed:
        yield f + "gate.tid2eid", "i64", (cfg["vocab_size"], k)
    else:
        yield f + "gate.bias", "f32", (E,)
    for e in [f"experts.{j}." for j in range(E)] + ["shared_experts."]:
        kind = "dense" if e[0] == "s" else "expert"
        yield f + e + "w1.weight", kind, (mi, d)
        yield f + e + "w2.weight", kind, (d, mi)
        yield f + e + "w3.weight", kind, (mi, d)


def compressor_table(p, ratio, dim, d):
    c = (2 if ratio == 4 else 1) * dim
    yield p + "ape", "f32", (ratio, c)
    yield p + "wkv.weight", "bf16", (c, d)
    yield p + "wgate.weight", "bf16", (c, d)
    yield p + "norm.weight", "norm", (dim,)


def head_table(p, d, hc):
    yield p + "hc_head_fn", "f32", (hc, hc * d)
    yield p + "hc_head_base", "f32", (hc,)
    yield p + "hc_head_scale", "f32", (1,)
    yield p + "norm.weight", "norm", (d,)


def tensor_table(cfg):
    """Every weight of the model: name, kind, shape. Kinds: norm, bf16, f32, i64, fp8 (stays FP8 in dsv4_int),
    dense (FP8 -> INT8) and expert (FP4 -> INT4); the last three have a `.scale` of their own when quantised."""
    d, hc, L = cfg["hidden_size"], cfg["hc_mult"], cfg["num_hidden_layers"]
    yield "embed.weight", "bf16", (cfg["vocab_size"], d)
    for i in range(L):
        yield from block_table(cfg, f"layers.{i}.", ratio_of(cfg, i), i < cfg["num_hash_layers"])
    yield from head_table("", d, hc)
    yield "head.weight", "bf16", (cfg["vocab_size"], d)
    for m in range(cfg["num_nextn_predict_layers"]):
        p = f"mtp.{m}."
        yield from block_table(cfg, p, ratio_of(cfg, L + m), False)
        yield from head_table(p, d, hc)
        yield p + "enorm.weight", "norm", (d,)
        yield p + "hnorm.weight", "norm", (d,)
        yield p + "e_proj.weight", "fp8", (d, d)
        yield p + "h_proj.weight", "fp8", (d, d)


def stored(name, kind, shape, fmt):
    """How a weight of the table lies in a checkpoint of format native | int | bf16: [(name, dtype, shape), ...]."""
    if kind in ("norm", "bf16") or (fmt == "bf16" and kind in ("fp8", "dense", "expert")):
        return [(name, "BF16", shape)]
    if kind in ("f32", "i64"):
        return [(name, kind.upper(), shape)]
    n, k = shape
    scale = name.removesuffix(".weight") + ".scale"
    grid = (n, cdiv(k, 32)) if kind == "expert" else (cdiv(n, 128), cdiv(k, 128))
    if kind == "expert":
        return [(name, "I8", (n, k // 2)), (scale, "BF16" if fmt == "int" else "F8_E8M0", grid)]
    if fmt == "int" and kind == "dense":
        return [(name, "I8", shape), (scale, "BF16", grid)]
    return [(name, "F8_E4M3", shape), (scale, "F8_E8M0", grid)]


def encode(name, kind, w, fmt):
    """float32 (or int64) values of one weight -> {name: Tensor} in the given format. dsv4_int is always made from the
    release's own FP4 / FP8 values, as the converter makes it."""
    parts = stored(name, kind, w.shape, fmt)
    if len(parts) == 1:
        dtype = parts[0][1]
        bits = bf16_encode(w) if dtype == "BF16" else w.astype(np.float32).view(np.uint32) if dtype == "F32" else w.astype(np.int64)
        return {name: Tensor(dtype, bits)}
    q, s = fp4_encode(w) if kind == "expert" else fp8_encode(w)
    if fmt == "int" and kind == "expert":
        q, s = int4_encode(fp4_decode(q, s))
    elif fmt == "int" and kind == "dense":
        q, s = int8_encode(fp8_decode(q, s))
    return {n: Tensor(dt, b.reshape(sh)) for (n, dt, sh), b in zip(parts, (q, s))}


def requantise(tensors):
    """{name: Tensor} of a native shard -> the same shard in dsv4_int. A weight whose scale is not in the same shard stays."""
    out = {}
    for name, t in tensors.items():
        pair = name.removesuffix(".weight") + ".scale"
        if pair == name or pair not in tensors:
            if not (name.endswith(".scale") and name in out):
                out[name] = t
            continue
        s = tensors[pair]
        if ".ffn.experts." in name and t.dtype == "I8" and s.dtype == "F8_E8M0":
            q = int4_encode(fp4_decode(t.bits, s.bits))
        elif t.dtype == "F8_E4M3" and not name.endswith(("e_proj.weight", "h_proj.weight")):
            q = int8_encode(fp8_decode(t.bits, s.bits))
        else:
            out[name] = t
            continue
        out[name], out[pair] = Tensor("I8", q[0]), Tensor("BF16", q[1])
    return out


# ---- config.json ----------------------------------------------------------------------------------------------------

REAL = dict(hidden_size=4096, num_attention_heads=64, head_dim=512, qk_rope_head_dim=64, q_lora_rank=1024, o_groups=8,
            o_lora_rank=1024, moe_intermediate_size=2048, n_routed_experts=256, num_experts_per_tok=6, vocab_size=129280,
            num_hidden_layers=43, num_hash_layers=3, hc_mult=4, index_n_heads=64, index_head_dim=128, index_topk=512,
            sliding_window=128, num_nextn_predict_layers=1, max_position_embeddings=1048576, swiglu_limit=10.0,
            routed_scaling_factor=1.5, compress_ratios=[0, 0] + [4, 128] * 20 + [4, 0], yarn_original=65536)


def config(fmt, **dims):
    """A config.json with the release's keys; dims override REAL."""
    v = {**REAL, **dims}
    cfg = {"architectures": ["DeepseekV4ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
           "eos_token_id": 1, "hc_eps": 1e-06, "hc_sinkhorn_iters": 20, "hidden_act": "silu", "initializer_range": 0.02,
           "model_type": "deepseek_v4", "n_shared_experts": 1, "norm_topk_prob": True, "num_key_value_heads": 1,
           "rms_norm_eps": 1e-06, "rope_theta": 10000, "compress_rope_theta": 160000, "scoring_func": "sqrtsoftplus",
           "tie_word_embeddings": False, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True,
           "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 16, "type": "yarn",
                            "original_max_position_embeddings": v.pop("yarn_original")}}
    cfg.update(v)
    if fmt != "bf16":
        cfg["expert_dtype"] = "int4" if fmt == "int" else "fp4"
        cfg["quantization_config"] = quantization_config(fmt)
    return cfg


def quantization_config(fmt):
    if fmt == "native":
        return {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
                "weight_block_size": [128, 128]}
    act = {"num_bits": 16, "type": "float"}
    four = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32, "strategy": "group"}
    eight = {"num_bits": 8, "type": "int", "symmetric": True, "block_size": [128, 128], "strategy": "block"}
    return {"quant_method": "dsv4_int", "format": "int_packed", "config_groups": {
        "experts_w4a16": {"weights": four, "input_activations": act,
                          "targets": [f"*.ffn.experts.*.w{i}" for i in (1, 2, 3)]},
        "attention_w8a16": {"weights": eight, "input_activations": act,
                            "targets": [f"*.attn.{n}" for n in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")]
                            + [f"*.ffn.shared_experts.w{i}" for i in (1, 2, 3)]}},
        "ignore": ["embed", "head", "norm", "lm_head", "*norm.weight", "attn.attn_sink", "*.gate.*", "hc_*", "*.hc_attn_*",
                   "*.hc_ffn_*"]}
