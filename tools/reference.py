#!/usr/bin/env python3
"""DeepSeek-V4-Flash in numpy: the whole forward pass, written to be checked by eye and not to be fast.

  reference.py MODEL_DIR --ids 0,5,6 [--logits F] [--mtp-logits F] [--trace F.npz] [--default]

Every position is computed from scratch in float64 (no cache, no chunks). --default follows the engine's default path:
INT8 activations in groups of 32 before every INT4, INT8 and FP4 product, and BF16 queries, keys, values and probabilities.
Shapes: T tokens, S hyper-connection streams, D hidden, H heads, K head dim, E experts.
"""
import argparse
import sys

import numpy as np

from formats import Checkpoint, bf16_round, ratio_of


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def round_bf16(x):
    return bf16_round(x).astype(np.float64)


def quantise_act(x):
    """x [.., K] as INT8 in groups of 32 along K and back. float32 arithmetic: one division, round half to even."""
    x = x.astype(np.float32)
    out = np.empty_like(x)
    for k in range(0, x.shape[-1], 32):
        g = x[..., k:k + 32]
        top = np.abs(g).max(-1, keepdims=True)
        r = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
        out[..., k:k + 32] = np.clip(np.rint(g * r), -127, 127) * (top / np.float32(127))
    return out.astype(np.float64)


def rope_freqs(cfg, m):
    """One frequency per rotated pair; YaRN for layers with a compressor (m > 0)."""
    rd = cfg["qk_rope_head_dim"]
    i = np.arange(rd // 2)
    if not m:
        return cfg["rope_theta"] ** (-2 * i / rd)
    theta, y = cfg["compress_rope_theta"], cfg["rope_scaling"]

    def dim(turns):
        return rd * np.log(y["original_max_position_embeddings"] / (2 * np.pi * turns)) / (2 * np.log(theta))
    lo, hi = max(np.floor(dim(y["beta_fast"])), 0), min(np.ceil(dim(y["beta_slow"])), rd - 1)
    ramp = np.clip((i - lo) / (hi - lo if hi != lo else 0.001), 0, 1)
    g = theta ** (-2 * i / rd)
    return g / y["factor"] * ramp + g * (1 - ramp)


def rope(x, pos, freqs, sign=1):
    """Rotates the last 2 * len(freqs) dims of x [T, .., K], neighbouring dims as pairs. The angle is a float32 product:
    that is what every implementation uses, and far from the start of a text its rounding can be seen."""
    a = (pos[:, None].astype(np.float32) * freqs.astype(np.float32)).astype(np.float64)
    c, s = np.cos(a), sign * np.sin(a)
    for _ in range(x.ndim - 2):
        c, s = c[:, None], s[:, None]
    out = x.copy()
    r = out[..., -2 * len(freqs):]
    re, im = r[..., 0::2].copy(), r[..., 1::2].copy()
    r[..., 0::2], r[..., 1::2] = re * c - im * s, re * s + im * c
    return out


class Reference:
    def __init__(self, path, default=False):
        self.ck, self.default = Checkpoint(path), default
        self.cfg, self.cache = self.ck.config, {}
        self.trace = {}

    def w(self, name):
        if name not in self.cache:
            x = self.ck.get(name)
            self.cache[name] = x if x.dtype == np.int64 else x.astype(np.float64)
        return self.cache[name]

    def act(self, x, name):
        """The activation as the product with this weight sees it."""
        return quantise_act(x) if self.default and self.ck.format(name) in ("int4", "int8", "fp4") else x

    def half(self, x):
        return round_bf16(x) if self.default else x

    def linear(self, x, name):
        name += ".weight"
        return self.act(x, name) @ self.w(name).T

    def rms(self, x, name=None):
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.cfg["rms_norm_eps"])
        return y * self.w(name + ".weight") if name else y

    # ---- hyper-connections

    def hc_mix(self, X, p):
        T = len(X)
        return self.rms(X.reshape(T, -1)) @ self.w(p + "_fn").T

    def hc_pre(self, X, p):
        """Streams X [T,S,D] -> the block's input y [T,D], post [T,S] and the mixing matrix C [T,S,S]."""
        S, eps = self.cfg["hc_mult"], self.cfg["hc_eps"]
        mix, base, scale = self.hc_mix(X, p), self.w(p + "_base"), self.w(p + "_scale")
        pre = sigmoid(mix[:, :S] * scale[0] + base[:S]) + eps
        post = 2 * sigmoid(mix[:, S:2 * S] * scale[1] + base[S:2 * S])
        C = (mix[:, 2 * S:] * scale[2] + base[2 * S:]).reshape(-1, S, S)
        C = softmax(C) + eps
        C = C / (C.sum(1, keepdims=True) + eps)
        for _ in range(self.cfg["hc_sinkhorn_iters"] - 1):
            C = C / (C.sum(2, keepdims=True) + eps)
            C = C / (C.sum(1, keepdims=True) + eps)
        return np.einsum("ts,tsd->td", pre, X), post, C

    def hc_head(self, X, p):
        pre = sigmoid(self.hc_mix(X, p + "hc_head") * self.w(p + "hc_head_scale") + self.w(p + "hc_head_base"))
        return np.einsum("ts,tsd->td", pre + self.cfg["hc_eps"], X)

    # ---- attention

    def compress(self, x, p, m, freqs):
        """Normed inputs x [T,D] -> one entry for each complete window of m tokens."""
        ape, n = self.w(p + "ape"), len(x) // m
        kv = self.linear(x[:n * m], p + "wkv").reshape(n, m, ape.shape[1])
        gate = self.linear(x[:n * m], p + "wgate").reshape(n, m, ape.shape[1]) + ape
        if m == 4:      # overlap: the first half of the channels belongs to the next window
            d = kv.shape[2] // 2
            before = np.zeros((n, m, d)), np.full((n, m, d), -np.inf)
            before[0][1:], before[1][1:] = kv[:-1, :, :d], gate[:-1, :, :d]
            kv, gate = np.concatenate([before[0], kv[:, :, d:]], 1), np.concatenate([before[1], gate[:, :, d:]], 1)
        c = (softmax(gate, 1) * kv).sum(1) if n else np.zeros((0, self.w(p + "norm.weight").size))
        return rope(self.rms(c, p + "norm"), np.arange(n) * m, freqs)

    def index_queries(self, x, qr, p, freqs):
        """The indexer's queries [T,I,J], weights [T,I] and keys [W,J]."""
        nh, hd = self.cfg["index_n_heads"], self.cfg["index_head_dim"]
        q = self.linear(qr, p + "wq_b").reshape(len(x), nh, hd)
        q = self.half(rope(q, np.arange(len(x)), freqs))
        wt = self.linear(x, p + "weights_proj") * hd ** -0.5 * nh ** -0.5
        return q, wt, self.half(self.compress(x, p + "compressor.", 4, freqs))

    def index_mask(self, q, wt, keys, visible):
        """visible [T,W] reduced to the index_topk entries with the best scores (ties to the lowest index)."""
        score = np.zeros(visible.shape)
        for h in range(q.shape[1]):
            score += wt[:, h, None] * np.maximum(q[:, h] @ keys.T, 0)
        score[~visible] = -np.inf
        k = self.cfg["index_topk"]
        if k >= score.shape[1]:
            return visible
        last = -np.partition(-score, k - 1, 1)[:, k - 1:k]      # the k-th best score
        tie = score == last
        room = k - (score > last).sum(1, keepdims=True)
        return visible & ((score > last) | (tie & (np.cumsum(tie, 1) <= room)))

    def attention(self, x, p, m):
        cfg, T = self.cfg, len(x)
        H, hd, win, G = cfg["num_attention_heads"], cfg["head_dim"], cfg["sliding_window"], cfg["o_groups"]
        freqs, pos = rope_freqs(cfg, m), np.arange(T)
        qr = self.rms(self.linear(x, p + "wq_a"), p + "q_norm")
        q = self.half(rope(self.rms(self.linear(qr, p + "wq_b").reshape(T, H, hd)), pos, freqs))
        kv = self.half(rope(self.rms(self.linear(x, p + "wkv"), p + "kv_norm"), pos, freqs))
        entries = self.half(self.compress(x, p + "compressor.", m, freqs)) if m else kv[:0]
        index = self.index_queries(x, qr, p + "indexer.", freqs) if m == 4 else None
        o = np.empty((T, H, hd))
        for t0 in range(0, T, 512):     # in blocks of queries, for long prompts
            t, first = pos[t0:t0 + 512], max(0, t0 - win + 1)
            near = pos[first:t[-1] + 1]
            mask = (near <= t[:, None]) & (near > t[:, None] - win)
            visible = np.arange(len(entries)) < (t[:, None] + 1) // (m or 1)
            if m == 4:
                visible = self.index_mask(index[0][t], index[1][t], index[2], visible)
            keys, mask = np.concatenate([kv[near], entries]), np.concatenate([mask, visible], 1)
            for h in range(H):
                s = np.where(mask, q[t, h] @ keys.T * hd ** -0.5, -np.inf)
                sink = self.w(p + "attn_sink")[h]
                top = np.maximum(s.max(1, keepdims=True), sink)
                e = np.exp(s - top)
                o[t, h] = self.half(e) @ keys / (e.sum(1, keepdims=True) + np.exp(sink - top))
        o = rope(o, pos, freqs, -1).reshape(T, G, -1)
        wo_a = self.w(p + "wo_a.weight").reshape(G, -1, o.shape[2])
        u = np.concatenate([self.act(o[:, g], p + "wo_a.weight") @ wo_a[g].T for g in range(G)], 1)
        return self.linear(u, p + "wo_b")

    # ---- mixture of experts

    def expert(self, x, p, weight):
        lim = self.cfg["swiglu_limit"]
        g = np.minimum(self.linear(x, p + "w1"), lim)
        u = np.clip(self.linear(x, p + "w3"), -lim, lim)
        return self.linear(g * sigmoid(g) * u * weight, p + "w2")

    def route(self, x, p, tokens):
        """Chosen experts [T,k] and their weights."""
        k = self.cfg["num_experts_per_tok"]
        s = np.sqrt(np.logaddexp(0, self.linear(x, p + "gate")))
        if tokens is not None:
            chosen = self.w(p + "gate.tid2eid")[tokens]
        else:
            chosen = np.argsort(-(s + self.w(p + "gate.bias")), 1, kind="stable")[:, :k]
        w = np.take_along_axis(s, chosen, 1)
        return chosen, w / w.sum(1, keepdims=True) * self.cfg["routed_scaling_factor"]

    def moe(self, x, p, tokens):
        chosen, weight = self.route(x, p, tokens)
        y = self.expert(x, p + "shared_experts.", 1.0)
        for e in np.unique(chosen):
            t, slot = np.nonzero(chosen == e)
            np.add.at(y, t, self.expert(x[t], f"{p}experts.{e}.", weight[t, slot][:, None]))
        return y

    # ---- the model

    def block(self, X, p, m, tokens):
        y, post, C = self.hc_pre(X, p + "hc_attn")
        y = self.attention(self.rms(y, p + "attn_norm"), p + "attn.", m)
        X = post[:, :, None] * y[:, None] + np.einsum("tjk,tjd->tkd", C, X)
        self.trace[p + "attn_out"], self.trace[p + "after_attn"] = y, X
        y, post, C = self.hc_pre(X, p + "hc_ffn")
        y = self.moe(self.rms(y, p + "ffn_norm"), p + "ffn.", tokens)
        X = post[:, :, None] * y[:, None] + np.einsum("tjk,tjd->tkd", C, X)
        self.trace[p + "ffn_out"], self.trace[p + "after_ffn"] = y, X
        return X

    def streams(self, tokens):
        cfg, tokens = self.cfg, np.asarray(tokens)
        X = np.repeat(self.w("embed.weight")[tokens][:, None], cfg["hc_mult"], 1)
        for i in range(cfg["num_hidden_layers"]):
            hashed = tokens if i < cfg["num_hash_layers"] else None
            X = self.block(X, f"layers.{i}.", ratio_of(cfg, i), hashed)
        return X

    def head(self, X, p=""):
        return self.rms(self.hc_head(X, p), p + "norm") @ self.w("head.weight").T

    def mtp(self, X, tokens, logits):
        """Draft logits [T,V]: row t joins streams X_t and token t+1 (the last row: the argmax of its logits)."""
        p, L = "mtp.0.", self.cfg["num_hidden_layers"]
        following = np.append(np.asarray(tokens)[1:], logits[-1].argmax())
        e = self.linear(self.rms(self.w("embed.weight")[following], p + "enorm"), p + "e_proj")
        Y = e[:, None] + self.linear(self.rms(X, p + "hnorm"), p + "h_proj")
        return self.head(self.block(Y, p, ratio_of(self.cfg, L), None), p)


def run(path, tokens, default=False, mtp=False):
    """Logits [T,V] and, if asked for, MTP logits; float64."""
    r = Reference(path, default)
    X = r.streams(tokens)
    logits = r.head(X)
    return logits, r.mtp(X, tokens, logits) if mtp else None


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model")
    ap.add_argument("--ids", required=True)
    ap.add_argument("--logits")
    ap.add_argument("--mtp-logits")
    ap.add_argument("--trace")
    ap.add_argument("--default", action="store_true")
    a = ap.parse_args()
    ids = [int(t) for t in a.ids.split(",")]
    r = Reference(a.model, a.default)
    X = r.streams(ids)
    logits = r.head(X)
    print("logit std %.4f, greedy next token %d" % (logits.std(), logits[-1].argmax()), file=sys.stderr)
    if a.mtp_logits:
        r.mtp(X, ids, logits).astype("<f4").tofile(a.mtp_logits)
    if a.logits:
        logits.astype("<f4").tofile(a.logits)
    if a.trace:
        np.savez_compressed(a.trace, **{k: v.astype(np.float32) for k, v in r.trace.items()})


if __name__ == "__main__":
    main()
