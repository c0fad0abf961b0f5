"""Checkpoint files of the small model: writes them in BF16, in the release's FP4/FP8 and in dsv4_int, reads all three.

Names and formats: the release's; dsv4_int is made from the FP4/FP8 tensors, as the converter does with the real model.
"""
import json, math, os, random, re, sys
import torch
from safetensors.torch import load_file, save_file
import tiny_corpus as corpus
import tiny_tokenizer
import train_tiny
from tiny_model import CONFIG, Model

DENSE = re.compile(r"\.(attn\.(wq_a|wq_b|wkv|wo_a|wo_b)|attn\.indexer\.wq_b|ffn\.shared_experts\.w[123])\.weight$")
FP8 = re.compile(DENSE.pattern[:-1] + r"|mtp\.\d+\.[eh]_proj\.weight$")
EXPERT = re.compile(r"\.ffn\.experts\.\d+\.w[123]\.weight$")
FP4 = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6])


def blocks(w, rows, cols):
    """[N, K] -> views of its blocks: [ceil(N/rows), rows, ceil(K/cols), cols], padded with zeros."""
    N, K = w.shape
    w = torch.nn.functional.pad(w, (0, -K % cols, 0, -N % rows))
    return w.view(w.shape[0] // rows, rows, w.shape[1] // cols, cols)


def unblock(b, N, K):
    return b.reshape(b.shape[0] * b.shape[1], -1)[:N, :K].contiguous()


def power_scale(absmax, top):
    """The smallest power of two that keeps absmax / scale <= top, and its e8m0 byte."""
    e = torch.where(absmax > 0, torch.ceil(torch.log2(absmax.double() / top)), -126.0).clamp(-126, 127)
    return torch.exp2(e).float(), (e + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def to_fp8(w):
    b = blocks(w.float(), 128, 128)
    scale, code = power_scale(b.abs().amax((1, 3)), 448)
    return unblock((b / scale[:, None, :, None]).to(torch.float8_e4m3fn).float(), *w.shape).to(torch.float8_e4m3fn), code


def to_fp4(w):
    b = w.float().view(w.shape[0], -1, 32)
    scale, code = power_scale(b.abs().amax(-1), 6)
    x = (b / scale[..., None]).flatten(1)
    middle = (FP4[1:] + FP4[:-1]) / 2
    low = torch.searchsorted(middle, x.abs().contiguous())                     # a tie goes to the lower code ...
    tie = (x.abs() == middle[low.clamp(max=6)]) & (low % 2 == 1) & (low < 7)  # ... unless that is odd
    nibble = (low + tie) | (x < 0).long() << 3
    return (nibble[:, ::2] | nibble[:, 1::2] << 4).to(torch.uint8).view(torch.int8), code


def from_fp8(w, scale):
    return unblock(blocks(w.float(), 128, 128) * scale.float()[:, None, :, None], *w.shape)


def nibbles(w):
    u = w.view(torch.uint8).long()
    return torch.stack((u & 15, u >> 4), -1).flatten(1)


def from_fp4(w, scale):
    n = nibbles(w)
    x = FP4[n & 7] * torch.where(n > 7, -1.0, 1.0)
    return (x.view(len(x), -1, 32) * scale.float()[..., None]).flatten(1)


def to_int8(w):
    b = blocks(w, 128, 128)
    s = b.abs().amax((1, 3)).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return unblock((b / s[:, None, :, None]).round().clamp(-128, 127), *w.shape).to(torch.int8), s.bfloat16()


def to_int4(w):
    b = w.view(len(w), -1, 32)
    s = b.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny) / 7
    n = (b / s[..., None]).round().clamp(-8, 7).long().flatten(1) + 8
    return (n[:, ::2] | n[:, 1::2] << 4).to(torch.uint8).view(torch.int8), s.bfloat16()


def from_int4(w, scale):
    return ((nibbles(w) - 8).float().view(len(w), -1, 32) * scale.float()[..., None]).flatten(1)


def plain(model):
    """{release name: tensor}, matrices and norms in BF16, the rest in FP32 (tid2eid I64)."""
    out, E = {}, model.c["n_routed_experts"]
    for name, p in model.state_dict().items():
        if ".ffn.experts." in name:
            for e, w in enumerate(p.chunk(E, 1 if name.endswith("w2") else 0)):
                out[name.replace("experts.", f"experts.{e}.") + ".weight"] = w.bfloat16().contiguous()
        else:
            out[name] = p.bfloat16() if name.endswith(".weight") else p.clone()
    return out


def native(t):
    out = {}
    for name, w in t.items():
        q = to_fp8 if FP8.search(name) else to_fp4 if EXPERT.search(name) else None
        if q:
            out[name], out[name.replace(".weight", ".scale")] = q(w)
        else:
            out[name] = w
    return out


def dsv4_int(t):
    out = dict(t)
    for name, w in t.items():
        scale = name.replace(".weight", ".scale")
        if DENSE.search(name):
            out[name], out[scale] = to_int8(from_fp8(w, t[scale]))
        elif EXPERT.search(name):
            out[name], out[scale] = to_int4(from_fp4(w, t[scale]))
    return out


def load(path, c=None):
    """A Model in FP32 from a checkpoint folder in any of the three formats."""
    if c is None:
        c = json.load(open(os.path.join(path, "config.json")))
    t, files = {}, sorted(f for f in os.listdir(path) if f.endswith(".safetensors"))
    for f in files:
        t.update(load_file(os.path.join(path, f)))
    model = Model(c)
    state = {}
    for name, w in t.items():
        if name.endswith(".scale") and name.replace(".scale", ".weight") in t:
            continue
        scale = t.get(name.replace(".weight", ".scale")) if name.endswith(".weight") else None
        if scale is not None:
            w = (from_fp8(w, scale) if w.dtype != torch.int8 or DENSE.search(name) else
                 from_int4(w, scale) if scale.dtype == torch.bfloat16 else from_fp4(w, scale))
        state[name] = w if w.dtype == torch.int64 else w.float()
    for name in model.state_dict():
        if ".ffn.experts." in name:
            parts = [state.pop(name.replace("experts.", f"experts.{e}.") + ".weight") for e in range(c["n_routed_experts"])]
            state[name] = torch.cat(parts, 1 if name.endswith("w2") else 0)
    model.load_state_dict(state)
    return model.eval()


def config(fmt):
    """config.json with every field of the release."""
    c = dict(architectures=["DeepseekV4ForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=0,
             eos_token_id=1, expert_dtype={"bf16": "bf16", "native": "fp4", "int": "int4"}[fmt], hidden_act="silu",
             initializer_range=0.02, model_type="deepseek_v4", n_shared_experts=1, norm_topk_prob=True,
             num_key_value_heads=1, num_nextn_predict_layers=1, scoring_func="sqrtsoftplus", tie_word_embeddings=False,
             topk_method="noaux_tc", torch_dtype="bfloat16", transformers_version="4.57.1", use_cache=True, **CONFIG)
    if fmt == "native":
        c["quantization_config"] = dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", scale_fmt="ue8m0",
                                        weight_block_size=[128, 128])
    if fmt == "bf16":
        del c["expert_dtype"]
    if fmt == "int":
        group = lambda bits, targets, **k: dict(weights=dict(num_bits=bits, type="int", symmetric=True, **k),
                                                input_activations=dict(num_bits=16, type="float"), targets=targets)
        c["quantization_config"] = dict(quant_method="dsv4_int", format="int_packed", config_groups=dict(
            experts_w4a16=group(4, [f"*.ffn.experts.*.w{i}" for i in (1, 2, 3)], group_size=32, strategy="group"),
            attention_w8a16=group(8, [f"*.attn.{k}" for k in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")] +
                                  [f"*.ffn.shared_experts.w{i}" for i in (1, 2, 3)], block_size=[128, 128], strategy="block")),
            ignore=["embed", "head", "norm", "lm_head", "*norm.weight", "attn.attn_sink", "*.gate.*", "hc_*", "*.hc_attn_*",
                    "*.hc_ffn_*"])
    return dict(sorted(c.items()))


def write(path, tensors, fmt, tokenizer):
    """A checkpoint folder: weights, index, config, generation_config, tokenizer."""
    os.makedirs(path, exist_ok=True)
    file = "model-00001-of-00001.safetensors"
    tensors = {k: v.contiguous() for k, v in sorted(tensors.items())}
    save_file(tensors, os.path.join(path, file), metadata=dict(format="pt"))
    dump = lambda name, x: open(os.path.join(path, name), "w").write(json.dumps(x, indent=2, ensure_ascii=False) + "\n")
    dump("model.safetensors.index.json", dict(
        metadata=dict(total_size=sum(v.numel() * v.element_size() for v in tensors.values())),
        weight_map={k: file for k in tensors}))
    dump("config.json", config(fmt))
    dump("generation_config.json", dict(_from_model_config=True, bos_token_id=0, eos_token_id=1, do_sample=True, temperature=1.0,
                                        top_p=1.0, transformers_version="4.57.1"))
    special = lambda s: dict(__type="AddedToken", content=s, lstrip=False, normalized=True, rstrip=False, single_word=False)
    bos, eos = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    dump("tokenizer_config.json", dict(
        add_bos_token=False, add_eos_token=False, bos_token=special(bos), clean_up_tokenization_spaces=False, eos_token=special(eos),
        legacy=True, model_max_length=CONFIG["max_position_embeddings"], pad_token=special(eos), sp_model_kwargs={}, unk_token=None,
        tokenizer_class="PreTrainedTokenizerFast"))
    tokenizer.save(os.path.join(path, "tokenizer.json"))


# ---- what is measured on the files

@torch.no_grad()
def perplexity(logits_of, ids, context=1024):
    """exp of the mean loss of all ids; contexts are [BOS] + the next context-1 ids, not overlapping, the last one short."""
    lost = 0.0
    for i in range(0, len(ids), context - 1):
        part = ids[i:i + context - 1]
        x = torch.tensor([[0] + part[:-1]])
        logits = logits_of(torch.nn.functional.pad(x, (0, -x.shape[1] % 128), value=2))[0, :x.shape[1]]
        lost += torch.nn.functional.cross_entropy(logits.double(), torch.tensor(part), reduction="sum").item()
    return math.exp(lost / len(ids))


def held_out_text(seed=10 ** 9, size=40000):
    """Stories that training never saw (its seeds are the step numbers), an empty line between them."""
    r, text = random.Random(seed), ""
    while len(text) < size:
        text += corpus.story(r)[0] + "\n\n"
    return text.rstrip("\n") + "\n"


def main():
    """tiny_export.py STATE DIR: DIR/bf16, DIR/native, DIR/int, DIR/heldout.txt, DIR/recall.jsonl and a table on stdout."""
    state, out = sys.argv[1:3]
    tok = tiny_tokenizer.build(CONFIG["vocab_size"])
    saved = torch.load(state, weights_only=True)
    model = Model()
    model.load_state_dict(saved["model"])
    p = plain(model)
    n = native(p)
    for fmt, t in dict(bf16=p, native=n, int=dsv4_int(n)).items():
        write(os.path.join(out, fmt), t, fmt, tok)
    text = held_out_text()
    open(os.path.join(out, "heldout.txt"), "w").write(text)
    items = train_tiny.recall_set(tok, 25)
    with open(os.path.join(out, "recall.jsonl"), "w") as f:
        for x in items:
            f.write(json.dumps(x) + "\n")
    if len(sys.argv) > 3:                                  # any third argument: only the files
        return
    ids, on = tok.encode(text).ids, dict(sparse=torch.tensor(True))
    print(f"step {saved['step']}, held-out text {len(text)} bytes, {len(ids)} tokens")
    for fmt in ("fp32", "bf16", "native", "int"):
        m = model.eval() if fmt == "fp32" else load(os.path.join(out, fmt))
        score = train_tiny.recall_score(m, items, tok, on)
        print(f"{fmt:7s} perplexity {perplexity(lambda x: m(x, mtp=False)[0], ids):.6f}  recall " +
              "  ".join(f"{d}: {s:.0%} {l:.3f}" for d, (s, l) in score.items()), flush=True)
    import transformers
    hf = transformers.AutoModelForCausalLM.from_pretrained(os.path.join(out, "bf16"), dtype=torch.float32, attn_implementation="eager").eval()
    mine = load(os.path.join(out, "bf16"))
    x = torch.tensor([[0] + ids[:1023]])
    with torch.no_grad():
        d = (hf(x).logits - mine(x)[0]).abs()
    print(f"transformers {transformers.__version__} (bf16 weights, fp32): perplexity {perplexity(lambda x: hf(x).logits, ids):.6f}, "
          f"largest logit difference {d.max():.2e}")


if __name__ == "__main__":
    main()
