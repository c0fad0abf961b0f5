#!/usr/bin/env python3
"""Random checkpoints of the true DeepSeek-V4-Flash architecture, in the release's FP4 / FP8, in dsv4_int or in plain BF16.

  make_checkpoint.py OUT --preset odd --format int            one format into OUT
  make_checkpoint.py OUT --preset hc2 --format all            OUT/native, OUT/int, OUT/bf16: the same model three times
  make_checkpoint.py OUT --set hidden_size=144 --set compress_ratios=0,4,128,0
  make_checkpoint.py OUT --real-shapes --layers 4 --experts 32 --format int      the real layer shapes for benchmarks

The BF16 checkpoint holds the FP4 / FP8 values exactly. With --tokenizer a small tokenizer.json is written too.
"""
import argparse
import json
import os
import zlib

import numpy as np

import formats as F

# small models for tests; what is not named here comes from `tiny`
TINY = dict(hidden_size=64, num_attention_heads=2, head_dim=32, qk_rope_head_dim=16, q_lora_rank=32, o_groups=2, o_lora_rank=32,
            moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, vocab_size=512, num_hidden_layers=3,
            num_hash_layers=1, hc_mult=4, index_n_heads=2, index_head_dim=16, index_topk=8, sliding_window=8,
            num_nextn_predict_layers=1, max_position_embeddings=4096, swiglu_limit=5.0, routed_scaling_factor=1.5,
            compress_ratios=[0, 4, 128, 0], yarn_original=256)
PRESETS = {
    "tiny": {},
    # no width a multiple of 128, few of 32: short last groups and blocks, three streams. FP4 and INT4 keep one scale per 32
    # columns of an expert, so hidden_size and moe_intermediate_size must be multiples of 32; in BF16 (`ragged`) of nothing
    "odd": dict(hidden_size=160, num_attention_heads=6, head_dim=40, qk_rope_head_dim=8, q_lora_rank=72, o_groups=3,
                o_lora_rank=24, moe_intermediate_size=96, n_routed_experts=7, num_experts_per_tok=3, vocab_size=331, hc_mult=3,
                index_n_heads=3, index_head_dim=24, index_topk=10, sliding_window=13, num_hidden_layers=4,
                compress_ratios=[4, 0, 4, 128, 0]),
    "ragged": dict(hidden_size=78, num_attention_heads=3, head_dim=22, qk_rope_head_dim=6, q_lora_rank=35, o_groups=3,
                   o_lora_rank=17, moe_intermediate_size=42, n_routed_experts=5, vocab_size=301, hc_mult=3, index_n_heads=3,
                   index_head_dim=10, index_topk=9, sliding_window=7, compress_ratios=[4, 128, 0, 0]),
    "hc2": dict(hidden_size=160, num_attention_heads=8, head_dim=64, qk_rope_head_dim=32, q_lora_rank=96, o_groups=4,
                o_lora_rank=48, moe_intermediate_size=96, n_routed_experts=9, num_experts_per_tok=4, hc_mult=2,
                num_hidden_layers=5, num_hash_layers=2, sliding_window=24, index_topk=24, index_n_heads=4, index_head_dim=32,
                compress_ratios=[4, 128, 0, 4, 128, 0, 0, 0]),
    # several 128 x 128 blocks each way, many heads in one group, no hash layer, one expert per token, no MTP layer
    "wide": dict(hidden_size=320, num_attention_heads=16, head_dim=48, qk_rope_head_dim=48, q_lora_rank=160, o_groups=1,
                 o_lora_rank=200, moe_intermediate_size=288, n_routed_experts=3, num_experts_per_tok=1, num_hash_layers=0, index_head_dim=64,
                 hc_mult=1, num_hidden_layers=2, num_nextn_predict_layers=0, sliding_window=32, compress_ratios=[128, 4]),
    # every layer compressed by 128, and every layer hash-routed
    "hca": dict(hidden_size=96, num_hidden_layers=3, num_hash_layers=3, compress_ratios=[128, 128, 128], sliding_window=16),
    # a long context: positions beyond the region where YaRN changes nothing
    "long": dict(num_hidden_layers=3, compress_ratios=[0, 4, 128, 0], max_position_embeddings=1048576, yarn_original=65536,
                 index_topk=32, sliding_window=16),
}


def std_of(name, k):
    """Standard deviation of a random matrix with k columns: outputs of order 1, logits of order 3."""
    gain = {"w1": 1.5, "w3": 1.5, "w2": 2.0, "wo_b": 2.0, "gate": 1.5, "head": 3.0, "e_proj": .7, "h_proj": .7}
    if name == "embed.weight":
        return 1.0
    part = name.removesuffix(".weight").split(".")[-1]
    return gain.get(part, 1.0) / np.sqrt(k)


def values(name, kind, shape, rng, cfg):
    """float32 values (int64 for the hash table) of one weight."""
    if kind == "i64":
        return rng.random((shape[0], cfg["n_routed_experts"])).argsort(1)[:, :shape[1]].astype(np.int64)
    x = rng.standard_normal(shape, np.float32)
    if kind == "norm":
        return (1.7 if "kv_norm" in name else 1.0) + 0.1 * x
    if name.endswith("_scale"):
        return 0.8 + 0.1 * x
    if name.endswith("_fn"):
        return x / np.sqrt(np.float32(shape[1]))
    if name.endswith("gate.bias"):
        return 0.1 * x
    if kind == "f32":       # attn_sink, ape, hc base
        return 0.5 * x
    if kind in ("dense", "expert", "fp8"):
        x *= np.exp(0.3 * rng.standard_normal((shape[0], 1), np.float32))   # rows of unequal size
    return x * np.float32(std_of(name, shape[1]))


def shard_names(n):
    return [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]


def write_shards(out, tensors, n, split_pairs=False):
    """Spreads {name: Tensor} over n files, a weight beside its scale unless split_pairs, and writes the index."""
    total = sum(t.nbytes() for t in tensors.values())
    shards, at = [{} for _ in range(n)], 0
    for name, t in tensors.items():
        i = min(at * n // max(total, 1), n - 1)
        if name.endswith(".scale"):
            w = name.removesuffix(".scale") + ".weight"
            home = next((j for j in range(n) if w in shards[j]), i)
            i = (home + 1) % n if split_pairs else home
        shards[i][name] = t
        at += t.nbytes()
    names = shard_names(n)
    for f, s in zip(names, shards):
        F.write_file(os.path.join(out, f), s)
    F.write_index(out, {t: f for f, s in zip(names, shards) for t in s}, total)


def write_config(out, cfg):
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, "config.json"), "w") as f:
        json.dump(cfg, f, indent=2)
    with open(os.path.join(out, "generation_config.json"), "w") as f:
        json.dump({"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 1.0, "top_p": 1.0}, f)


def make(out, fmt, dims, seed=1, shards=2, split_pairs=False):
    """A checkpoint in `out`; the same dims and seed give the same model in every format."""
    cfg = F.config(fmt, **{**TINY, **dims})
    tensors = {}
    for name, kind, shape in F.tensor_table(cfg):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        w = values(name, kind, shape, rng, cfg)
        if fmt == "bf16" and kind == "expert":
            w = F.fp4_decode(*F.fp4_encode(w))
        elif fmt == "bf16" and kind in ("dense", "fp8"):
            w = F.fp8_decode(*F.fp8_encode(w))
        tensors.update(F.encode(name, kind, w, fmt))
    write_config(out, cfg)
    write_shards(out, tensors, shards, split_pairs)
    return cfg


# ---- real shapes: gigabytes of random bits, cut from pools ----------------------------------------------------------

class Pools:
    """Blocks of random bits per number format; a tensor is a run of slices at random places."""
    SIZE = 1 << 24

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        n = self.rng.standard_normal(self.SIZE, np.float32)
        byte = self.rng.integers(0, 256, self.SIZE, np.uint8)
        self.bf16 = F.bf16_encode(np.where(np.abs(n) < 1e-3, np.float32(1e-3), n))
        self.fp8 = F.e4m3_encode(np.clip(n * 100, -448, 448))                     # std 100
        self.int8 = np.clip(np.rint(n * 35), -127, 127).astype(np.int8).view(np.uint8)      # std 35
        self.fp4 = byte                                                         # std 2.9
        self.int4 = np.where(byte & 15, byte, byte | 1) | np.where(byte >> 4, 0, 16).astype(np.uint8)   # q = -7..7, std 4.3

    def bits(self, pool, n, shift=0):
        """Yields n values; `shift` is subtracted from each (BF16: an exponent)."""
        while n:
            m = min(n, self.SIZE // 2)
            a = int(self.rng.integers(0, self.SIZE - m + 1))
            part = pool[a:a + m]
            yield part - part.dtype.type(shift) if shift else part
            n -= m

    def scales(self, dtype, n, mean):
        """n block scales around `mean`, within a factor of two."""
        if dtype == "F8_E8M0":
            yield (127 + int(np.round(np.log2(mean))) + self.rng.integers(-1, 2, n)).astype(np.uint8)
        else:
            yield F.bf16_encode(np.float32(mean) * self.rng.uniform(.5, 1.5, n).astype(np.float32))


STD = {"fp8": 100.0, "int8": 35.0, "fp4": 2.9, "int4": 4.3}


def make_real(out, fmt, cfg, seed, shards):
    """Streams a checkpoint of the real layer shapes; nothing larger than a pool is held in memory."""
    pools, tensors = Pools(seed), {}

    def add(name, dtype, shape, chunks):
        tensors[name] = F.Tensor(dtype, chunks, shape)

    for name, kind, shape in F.tensor_table(cfg):
        parts = F.stored(name, kind, shape, fmt)
        n = int(np.prod(parts[0][2]))
        std = std_of(name, shape[-1])
        if kind in ("dense", "expert", "fp8") and len(parts) == 2:
            how = ("int4" if fmt == "int" else "fp4") if kind == "expert" else "int8" if parts[0][1] == "I8" else "fp8"
            add(*parts[0], lambda p=getattr(pools, how), n=n: pools.bits(p, n))
            add(*parts[1], lambda d=parts[1][1], n=int(np.prod(parts[1][2])), m=std / STD[how]: pools.scales(d, n, m))
        elif kind in ("bf16", "dense", "expert", "fp8"):
            e = -int(np.round(np.log2(std))) << 7
            add(*parts[0], lambda n=n, e=e: pools.bits(pools.bf16, n, e))
        else:
            w = values(name, kind, shape, np.random.default_rng([seed, zlib.crc32(name.encode())]), cfg)
            tensors.update(F.encode(name, kind, w, fmt))
    write_config(out, cfg)
    write_shards(out, tensors, shards)


# ---- a small tokenizer ----------------------------------------------------------------------------------------------

CONTROL = ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜", "<｜begin▁sys｜>", "<｜end▁sys｜>",
           "<｜latest_reminder｜>", "<｜action｜>", "<｜query｜>", "<｜authority｜>", "<｜domain｜>", "<｜title｜>", "<｜search▁begin｜>",
           "<｜search▁end｜>", "<｜extracted_url｜>", "<｜read_url｜>", "<｜end_of_query｜>", "<|EOT|>", "<｜fim▁hole｜>",
           "<｜fim▁begin｜>", "<｜fim▁end｜>"]
STEP3 = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+").replace(r'\"', '"').replace(r"\r", "\r").replace(r"\n", "\n")


def byte_chars():
    """The 256 characters that stand for bytes in a byte-level vocabulary."""
    keep = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in keep]
    return [chr(b) for b in keep] + [chr(0x100 + i) for i in range(len(rest))]


def small_tokenizer(merges=100):
    """tokenizer.json of the same make as the model's: 3 + 256 + merges + control tokens."""
    vocab = {t: i for i, t in enumerate(["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"] + byte_chars())}
    pairs = []
    for word in "Ġthe Ġof Ġand Ġto Ġin Ġa he in er on an re nd at en ed is or it ar al ing ion Ġthat Ġis Ġyou ĠĠ ĠĠĠĠ AA AAAA".split():
        left = word[0]
        for c in word[1:]:
            if left + c not in vocab and len(pairs) < merges:
                pairs.append(f"{left} {c}")
                vocab[left + c] = len(vocab)
            left += c
    added = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
             for t, i in list(vocab.items())[:3]]
    for i, t in enumerate(CONTROL):
        added.append({"id": len(vocab) + i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
                      "normalized": True, "special": False})
    splits = [{"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": False}
              for r in (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", STEP3)]
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": []},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits + [{**level, "add_prefix_space": False, "use_regex": False}]},
            "post_processor": {**level, "trim_offsets": False}, "decoder": level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": pairs}}


def write_tokenizer(out):
    with open(os.path.join(out, "tokenizer.json"), "w", encoding="utf-8") as f:
        json.dump(small_tokenizer(), f, ensure_ascii=False, indent=1)


# ---- command line ---------------------------------------------------------------------------------------------------

def setting(text):
    key, value = text.split("=", 1)
    if key not in F.REAL:
        raise argparse.ArgumentTypeError(f"unknown dimension {key}; one of {', '.join(F.REAL)}")
    if key == "compress_ratios":
        return key, [int(v) for v in value.split(",")]
    return key, type(F.REAL[key])(value)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("out")
    ap.add_argument("--format", choices=["native", "int", "bf16", "all"], default="int")
    ap.add_argument("--preset", choices=list(PRESETS), default="tiny")
    ap.add_argument("--set", type=setting, action="append", default=[], metavar="KEY=VALUE", help="a config dimension")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--shards", type=int, default=2)
    ap.add_argument("--split-pairs", action="store_true", help="put every scale into another shard than its weight")
    ap.add_argument("--tokenizer", action="store_true", help="write a small tokenizer.json")
    ap.add_argument("--real-shapes", action="store_true", help="the real layer shapes with few layers and experts")
    ap.add_argument("--layers", type=int, default=4)
    ap.add_argument("--experts", type=int, default=32)
    a = ap.parse_args()
    for fmt in ("native", "int", "bf16") if a.format == "all" else (a.format,):
        out = os.path.join(a.out, fmt) if a.format == "all" else a.out
        if a.real_shapes:
            ratios = ([0, 4, 128, 4] * a.layers)[:a.layers] + [0]
            cfg = F.config(fmt, **{**dict(num_hidden_layers=a.layers, n_routed_experts=a.experts, compress_ratios=ratios,
                                          num_hash_layers=1), **dict(a.set)})
            make_real(out, fmt, cfg, a.seed, a.shards)
        else:
            make(out, fmt, {**PRESETS[a.preset], **dict(a.set)}, a.seed, a.shards, a.split_pairs)
        if a.tokenizer:
            write_tokenizer(out)


if __name__ == "__main__":
    main()
