"""The small model: DeepSeek-V4 in plain PyTorch, fast enough to train on one CPU core.

Parameter names are the checkpoint's names, except that a layer's routed experts are stored together
(experts.w1 holds all w1 stacked by rows, experts.w2 all w2 side by side by columns). Sequences have a length
divisible by 128. `dtype` is the type of the matrix products: bfloat16 to train, float32 to evaluate.
"""
import ctypes, hashlib, json, math, os, subprocess, tempfile
import formats
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

CONFIG = dict(vocab_size=1024, hidden_size=128, num_hidden_layers=5, num_attention_heads=4, head_dim=128,
              qk_rope_head_dim=16, q_lora_rank=96, o_groups=2, o_lora_rank=64, sliding_window=32,
              compress_ratios=[0, 4, 128, 4, 128, 0], index_n_heads=4, index_head_dim=32, index_topk=16,
              n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, num_hash_layers=1,
              routed_scaling_factor=1.5, swiglu_limit=10.0, hc_mult=4, hc_sinkhorn_iters=20, hc_eps=1e-6,
              rms_norm_eps=1e-6, rope_theta=10000, compress_rope_theta=160000, max_position_embeddings=4096,
              rope_scaling=dict(type="yarn", factor=4, beta_fast=32, beta_slow=1,
                                original_max_position_embeddings=1024))
NEG = -1e30

# Sinkhorn on 4x4 matrices, 16 tokens side by side, forward and backward: as PyTorch operations it would take
# longer than the rest of the model.
SINKHORN = r"""
#include <math.h>
#include <stdint.h>
enum { L = 16, MAX = 64 };
static void rows(const float *x, float *y, float eps) {
    for (int i = 0; i < 4; i++) for (int l = 0; l < L; l++) {
        float r = 1 / (x[(4*i)*L+l] + x[(4*i+1)*L+l] + x[(4*i+2)*L+l] + x[(4*i+3)*L+l] + eps);
        for (int k = 0; k < 4; k++) y[(4*i+k)*L+l] = x[(4*i+k)*L+l] * r; } }
static void cols(const float *x, float *y, float eps) {
    for (int k = 0; k < 4; k++) for (int l = 0; l < L; l++) {
        float r = 1 / (x[k*L+l] + x[(4+k)*L+l] + x[(8+k)*L+l] + x[(12+k)*L+l] + eps);
        for (int i = 0; i < 4; i++) y[(4*i+k)*L+l] = x[(4*i+k)*L+l] * r; } }
// backward of one normalisation; a: stride between lines, b: inside a line
static void back(const float *x, const float *y, float *g, float eps, int a, int b) {
    for (int i = 0; i < 4; i++) for (int l = 0; l < L; l++) {
        float s = eps, d = 0;
        for (int k = 0; k < 4; k++) { s += x[(a*i+b*k)*L+l]; d += g[(a*i+b*k)*L+l] * y[(a*i+b*k)*L+l]; }
        for (int k = 0; k < 4; k++) g[(a*i+b*k)*L+l] = (g[(a*i+b*k)*L+l] - d) / s; } }
static int forward16(const float *in, int n, int iters, float eps, float s[MAX][16*L]) {
    int at = 1;
    for (int c = 0; c < 16; c++) for (int l = 0; l < L; l++) s[0][c*L+l] = l < n ? in[l*16+c] : 0;
    for (int i = 0; i < 4; i++) for (int l = 0; l < L; l++) {
        float m = -1e30f, sum = 0;
        for (int k = 0; k < 4; k++) m = fmaxf(m, s[0][(4*i+k)*L+l]);
        for (int k = 0; k < 4; k++) sum += s[0][(4*i+k)*L+l] = expf(s[0][(4*i+k)*L+l] - m);
        for (int k = 0; k < 4; k++) s[0][(4*i+k)*L+l] = s[0][(4*i+k)*L+l] / sum + eps; }
    cols(s[0], s[1], eps);
    for (int t = 1; t < iters; t++, at += 2) { rows(s[at], s[at+1], eps); cols(s[at+1], s[at+2], eps); }
    return at; }
void sinkhorn_forward(const float *in, float *out, int64_t n, int iters, float eps) {
    float s[MAX][16*L];
    for (int64_t t = 0; t < n; t += L) {
        int m = n - t < L ? n - t : L, at = forward16(in + t*16, m, iters, eps, s);
        for (int l = 0; l < m; l++) for (int c = 0; c < 16; c++) out[(t+l)*16+c] = s[at][c*L+l]; } }
void sinkhorn_backward(const float *in, const float *go, float *gi, int64_t n, int iters, float eps) {
    float s[MAX][16*L], g[16*L];
    for (int64_t t = 0; t < n; t += L) {
        int m = n - t < L ? n - t : L, at = forward16(in + t*16, m, iters, eps, s);
        for (int c = 0; c < 16; c++) for (int l = 0; l < L; l++) g[c*L+l] = l < m ? go[(t+l)*16+c] : 0;
        for (; at > 1; at -= 2) { back(s[at-1], s[at], g, eps, 1, 4); back(s[at-2], s[at-1], g, eps, 4, 1); }
        back(s[0], s[1], g, eps, 1, 4);
        for (int i = 0; i < 4; i++) for (int l = 0; l < L; l++) {          // softmax of the row: p = s[0] - eps
            float d = 0;
            for (int k = 0; k < 4; k++) d += g[(4*i+k)*L+l] * (s[0][(4*i+k)*L+l] - eps);
            for (int k = 0; k < 4; k++) g[(4*i+k)*L+l] = (g[(4*i+k)*L+l] - d) * (s[0][(4*i+k)*L+l] - eps); }
        for (int l = 0; l < m; l++) for (int c = 0; c < 16; c++) gi[(t+l)*16+c] = g[c*L+l]; } }
"""


def _build():
    path = os.path.join(tempfile.gettempdir(), f"sinkhorn-{hashlib.sha256(SINKHORN.encode()).hexdigest()[:12]}.so")
    if not os.path.exists(path):
        subprocess.run(["gcc", "-O3", "-march=native", "-ffast-math", "-shared", "-fPIC", "-x", "c", "-", "-o",
                        path + f".{os.getpid()}", "-lm"], input=SINKHORN.encode(), check=True)
        os.rename(path + f".{os.getpid()}", path)
    return ctypes.CDLL(path)


_lib = _build()
_ptr = lambda t: ctypes.c_void_p(t.data_ptr())
_args = lambda n, iters, eps: (ctypes.c_int64(n), ctypes.c_int(iters), ctypes.c_float(eps))


@torch.library.custom_op("tiny::sinkhorn", mutates_args=())
def sinkhorn(c: torch.Tensor, iters: int, eps: float) -> torch.Tensor:
    """[N, 16] float logits of the stream mixing -> [N, 16] nearly doubly stochastic matrices (spec 2.3)."""
    c = c.contiguous()
    out = torch.empty_like(c)
    _lib.sinkhorn_forward(_ptr(c), _ptr(out), *_args(len(c), iters, eps))
    return out


@torch.library.custom_op("tiny::sinkhorn_backward", mutates_args=())
def sinkhorn_backward(c: torch.Tensor, g: torch.Tensor, iters: int, eps: float) -> torch.Tensor:
    c, g = c.contiguous(), g.contiguous()
    out = torch.empty_like(c)
    _lib.sinkhorn_backward(_ptr(c), _ptr(g), _ptr(out), *_args(len(c), iters, eps))
    return out


sinkhorn.register_fake(lambda c, iters, eps: torch.empty_like(c, memory_format=torch.contiguous_format))
sinkhorn_backward.register_fake(lambda c, g, iters, eps: torch.empty_like(c, memory_format=torch.contiguous_format))


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.iters, ctx.eps = inputs[1:]


sinkhorn.register_autograd(lambda ctx, g: (sinkhorn_backward(ctx.saved_tensors[0], g, ctx.iters, ctx.eps), None, None),
                           setup_context=_save)


class Weight(nn.Module):
    """A matrix [out, in], or a norm's vector, under the name `.weight`."""

    def __init__(self, *shape, std=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape) if len(shape) == 1 else
                                   torch.randn(shape) * (std or shape[1] ** -0.5))

    def forward(self, x, dtype):
        return F.linear(x.to(dtype), self.weight.to(dtype))


def rms(x, w=None, eps=1e-6):
    x = x.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x if w is None else x * w.weight


def rope(x, cos, sin, rd):
    """Rotates pairs of the last rd dims; cos, sin broadcast to [..., rd/2]."""
    a, b = x[..., -rd::2].float(), x[..., 1 - rd::2].float()
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    return torch.cat((x[..., :-rd].float(), turned), -1)


def frequencies(c, m):
    rd, theta = c["qk_rope_head_dim"], c["compress_rope_theta"] if m else c["rope_theta"]
    i = torch.arange(rd // 2, dtype=torch.float64)
    f = theta ** (-2 * i / rd)
    if m:
        y = c["rope_scaling"]
        dim = lambda r: rd * math.log(y["original_max_position_embeddings"] / (2 * math.pi * r)) / (2 * math.log(theta))
        lo, hi = max(math.floor(dim(y["beta_fast"])), 0), min(math.ceil(dim(y["beta_slow"])), rd - 1)
        ramp = ((i - lo) / max(hi - lo, 1e-3)).clamp(0, 1)
        f = f / y["factor"] * ramp + f * (1 - ramp)
    return f.float()


class Compressor(nn.Module):
    def __init__(self, c, m, dim):
        super().__init__()
        self.m, self.dim, self.rd, width = m, dim, c["qk_rope_head_dim"], dim * (2 if m == 4 else 1)
        self.ape = nn.Parameter(torch.randn(m, width) * 0.02)
        self.wkv, self.wgate = Weight(width, c["hidden_size"]), Weight(width, c["hidden_size"], std=0.02)
        self.norm = Weight(dim)

    def forward(self, x, cos, sin, dtype):
        """x [B, S, d] -> entries [B, S/m, dim]."""
        B, S, _ = x.shape
        kv = self.wkv(x, dtype).float().view(B, S // self.m, self.m, -1)
        gate = self.wgate(x, dtype).float().view(B, S // self.m, self.m, -1) + self.ape
        if self.m == 4:                                    # first half of the channels: into the next window
            D = self.dim
            before = F.pad(kv[:, :-1, :, :D], (0, 0, 0, 0, 1, 0))
            before_gate = F.pad(gate[:, :-1, :, :D], (0, 0, 0, 0, 1, 0), value=NEG)
            kv, gate = torch.cat((before, kv[..., D:]), 2), torch.cat((before_gate, gate[..., D:]), 2)
        e = (gate - gate.amax(2, keepdim=True)).exp()
        pooled = (e * kv).sum(2) / e.sum(2)
        return rope(rms(pooled, self.norm), cos[::self.m], sin[::self.m], self.rd)


class Indexer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.h, self.dim, self.rd = c["index_n_heads"], c["index_head_dim"], c["qk_rope_head_dim"]
        self.wq_b = Weight(self.h * self.dim, c["q_lora_rank"])
        self.weights_proj = Weight(self.h, c["hidden_size"])
        self.compressor = Compressor(c, 4, self.dim)

    def forward(self, x, qr, cos, sin, dtype):
        """-> scores [B, S, S/4]; positive constants left out of wt are put into it here."""
        B, S, _ = x.shape
        q = rope(self.wq_b(qr, dtype).view(B, S, self.h, self.dim), cos[:, None], sin[:, None], self.rd).to(dtype)
        k = self.compressor(x, cos, sin, dtype).to(dtype)
        w = self.weights_proj(x, dtype).float() * (self.dim * self.h) ** -0.5
        dots = (q.reshape(B, S * self.h, self.dim) @ k.transpose(1, 2)).view(B, S, self.h, -1)
        return (dots.float().relu() * w[..., None]).sum(2)


class Attention(nn.Module):
    def __init__(self, c, m):
        super().__init__()
        self.c, self.m = c, m
        d, H, hd, ql = c["hidden_size"], c["num_attention_heads"], c["head_dim"], c["q_lora_rank"]
        self.wq_a, self.q_norm, self.wq_b = Weight(ql, d), Weight(ql), Weight(H * hd, ql)
        self.wkv, self.kv_norm = Weight(hd, d), Weight(hd)
        self.wo_a = Weight(c["o_groups"] * c["o_lora_rank"], H * hd // c["o_groups"])
        self.wo_b = Weight(d, c["o_groups"] * c["o_lora_rank"], std=0.02)
        self.attn_sink = nn.Parameter(torch.zeros(H))
        if m:
            self.compressor = Compressor(c, m, hd)
        if m == 4:
            self.indexer = Indexer(c)

    def forward(self, x, cos, sin, mode, dtype):
        """x [B, S, d] -> [B, S, d] and the losses of indexer and guide. mode: see Model.forward."""
        c, m = self.c, self.m
        B, S, _ = x.shape
        H, hd, rd, W, G = (c[k] for k in ("num_attention_heads", "head_dim", "qk_rope_head_dim", "sliding_window",
                                          "o_groups"))
        qr = rms(self.wq_a(x, dtype), self.q_norm)
        q = rms(self.wq_b(qr, dtype).view(B, S, H, hd))
        q = (rope(q, cos[:, None], sin[:, None], rd) * hd ** -0.5).to(dtype)
        kv = rope(rms(self.wkv(x, dtype), self.kv_norm), cos, sin, rd).to(dtype)

        # window keys: blocks of W queries against their own and the previous block
        k = kv.view(B, S // W, W, hd)
        k = torch.cat((F.pad(k[:, :-1], (0, 0, 0, 0, 1, 0)), k), 2)
        i, j = torch.arange(W)[:, None], torch.arange(2 * W)
        near = ((j > i) & (j <= i + W))[None, :, None] & ((torch.arange(S // W) > 0)[:, None] | (j >= W))[:, None, None]
        s = (q.view(B, S // W, W * H, hd) @ k.transpose(2, 3)).float().view(B, S // W, W, H, 2 * W)
        p = torch.where(near, s.clamp(max=60), NEG).exp()  # |s| <= sqrt(hd) * the norm's weight: no maximum needed
        total = p.sum(-1).view(B, S, H) + self.attn_sink.exp()
        o = (p.view(B, S // W, W * H, 2 * W).to(dtype) @ k).float().view(B, S, H, hd)

        loss = x.new_zeros((), dtype=torch.float32)
        if m and mode.get(f"hide{m}") is None:
            e = self.compressor(x, cos, sin, dtype).to(dtype)
            t, w = torch.arange(S)[:, None], torch.arange(S // m)
            seen = w < (t + 1) // m
            if m == 4:
                score = self.indexer(x.detach(), qr.detach(), cos, sin, dtype)
                if mode.get("random"):
                    score = torch.rand_like(score)
                score, keep = torch.where(seen, score, NEG), seen.expand(B, S, S // m)
                if "blind" in mode:
                    keep = keep & ~mode["blind"][:, None, None]
                if S // m > c["index_topk"] and not self.training:  # of equal scores the first wins
                    best = score.sort(dim=-1, descending=True, stable=True).indices[..., :c["index_topk"]]
                    chosen = torch.zeros(B, S, S // m, dtype=torch.bool).scatter(-1, best, True)
                    keep = keep & (chosen | ~mode["sparse"])
                elif S // m > c["index_topk"]:
                    least = score.detach().topk(c["index_topk"], -1).values[..., -1:]
                    keep = keep & ((score >= least) | ~mode["sparse"])
            else:
                keep = seen[None]
            s = (q.reshape(B, S * H, hd) @ e.transpose(1, 2)).float().view(B, S, H, S // m)
            pc = torch.where(keep[:, :, None], s.clamp(max=60), NEG).exp()
            mass = pc.sum(-1)
            total = total + mass
            o = o + (pc.view(B, S * H, S // m).to(dtype) @ e).float().view(B, S, H, hd)
            if "source" in mode:                           # where the word to recall was stated: look there
                source = mode["source"][..., None]
                hit = ((w == source // m) | (w == source // m + (m == 4))) & keep & (source >= 0)
                found = ((pc * hit[:, :, None]).sum(-1) / total).mean(-1)
                can = hit.any(-1).float()
                loss = loss - mode["guide"] * ((found + 1e-6).log() * can).sum() / (can.sum() + 1)
            if m == 4:                                     # KL(attention mass || softmax of the index scores)
                target = (pc / total[..., None]).sum(2).detach()
                weight = target.sum(-1, keepdim=True)      # rows that look far count by how much they do
                target = target / (weight + 1e-9)
                logp = F.log_softmax(torch.where(keep, score, NEG), -1)
                kl = (target * ((target + 1e-9).log() - logp)).sum(-1)
                loss = loss + (kl * weight[..., 0]).sum() / (weight.sum() + 1e-9)
        o = o / total[..., None]
        o = rope(o, cos[:, None], -sin[:, None], rd).to(dtype).view(B * S, G, H * hd // G).transpose(0, 1).contiguous()
        u = torch.bmm(o, self.wo_a.weight.view(G, c["o_lora_rank"], -1).transpose(1, 2).to(dtype).contiguous())
        return self.wo_b(u.transpose(0, 1).reshape(B, S, -1), dtype), loss


class MLP(nn.Module):
    """Stacked experts share this too: w1, w3 [n * mi, d], w2 [d, n * mi]."""

    def __init__(self, d, mi, n=1, plain=True):
        super().__init__()
        make = Weight if plain else (lambda *s, std=None: nn.Parameter(torch.randn(s) * (std or s[1] ** -0.5)))
        self.w1, self.w3, self.w2 = make(n * mi, d), make(n * mi, d), make(d, n * mi, std=0.02)


class MoE(nn.Module):
    def __init__(self, c, hashed):
        super().__init__()
        self.c, self.hashed = c, hashed
        d, E, mi = c["hidden_size"], c["n_routed_experts"], c["moe_intermediate_size"]
        self.gate = Weight(E, d, std=0.02)
        if hashed:                                         # k different experts per token, from a fixed seed
            draw = torch.rand(c["vocab_size"], E, generator=torch.Generator().manual_seed(4))
            self.gate.register_buffer("tid2eid", draw.argsort(-1)[:, :c["num_experts_per_tok"]].contiguous())
        else:
            self.gate.register_buffer("bias", torch.zeros(E))
        self.experts, self.shared_experts = MLP(d, mi, E, plain=False), MLP(d, mi)

    def forward(self, x, tokens, dtype):
        """x [N, d] -> [N, d] and the share of tokens each expert got. All experts run; the unchosen weigh 0."""
        c, lim = self.c, self.c["swiglu_limit"]
        E, k = c["n_routed_experts"], c["num_experts_per_tok"]
        s = F.softplus(self.gate(x, torch.float32)).sqrt()
        chosen = self.gate.tid2eid[tokens] if self.hashed else (s.detach() + self.gate.bias).topk(k, -1).indices
        on = F.one_hot(chosen, E).sum(-2).float()
        w = s * on
        w = w / w.sum(-1, keepdim=True) * c["routed_scaling_factor"]
        w = torch.cat((w, torch.ones_like(w[:, :1])), 1)   # the shared expert is expert E, with weight 1
        ex, sh = self.experts, self.shared_experts
        h = F.linear(x.to(dtype), torch.cat((ex.w1, sh.w1.weight, ex.w3, sh.w3.weight)).to(dtype))
        g, u = h.view(len(x), 2, E + 1, -1).float().unbind(1)
        h = F.silu(g.clamp(max=lim)) * u.clamp(-lim, lim) * w[..., None]
        return F.linear(h.flatten(1).to(dtype), torch.cat((ex.w2, sh.w2.weight), 1).to(dtype)), on.mean(0)


class Block(nn.Module):
    def __init__(self, c, m, hashed):
        super().__init__()
        self.c = c
        d, hc = c["hidden_size"], c["hc_mult"]
        self.attn_norm, self.ffn_norm = Weight(d), Weight(d)
        self.attn, self.ffn = Attention(c, m), MoE(c, hashed)
        for part in ("attn", "ffn"):                       # start: read every stream, keep streams apart, write to all
            base = torch.cat((torch.full((hc,), -1.0), torch.zeros(hc), 4 * torch.eye(hc).flatten() - 2))
            base[:hc] += torch.randn(hc) * 0.5
            base[hc:2 * hc] += torch.randn(hc) * 0.5
            self.register_parameter(f"hc_{part}_fn", nn.Parameter(torch.randn((2 + hc) * hc, hc * d) * 0.01))
            self.register_parameter(f"hc_{part}_base", nn.Parameter(base))
            self.register_parameter(f"hc_{part}_scale", nn.Parameter(torch.full((3,), 0.5)))

    def pre(self, X, part, dtype):
        """X [N, hc, d] -> what the sub-layer reads [N, d], post [N, hc], C [N, hc, hc]."""
        c, hc = self.c, self.c["hc_mult"]
        fn, base, scale = (getattr(self, f"hc_{part}_{k}") for k in ("fn", "base", "scale"))
        f = X.flatten(1)
        mix = F.linear(f.to(dtype), fn.to(dtype)).float() * torch.rsqrt(
            f.float().square().mean(-1, keepdim=True) + c["rms_norm_eps"])
        a, b, C = mix.split((hc, hc, hc * hc), 1)
        a = torch.sigmoid(a * scale[0] + base[:hc]) + c["hc_eps"]
        b = 2 * torch.sigmoid(b * scale[1] + base[hc:2 * hc])
        C = sinkhorn(C * scale[2] + base[2 * hc:], c["hc_sinkhorn_iters"], c["hc_eps"])
        return (a[..., None] * X.float()).sum(1), b, C.view(-1, hc, hc)

    def post(self, y, X, b, C, dtype):
        hc = self.c["hc_mult"]
        mixed = sum(C[:, j, :, None] * X[:, j, None].float() for j in range(hc))
        return (b[..., None] * y.float()[:, None] + mixed).to(dtype)

    def forward(self, X, tokens, cos, sin, mode, dtype):
        """X [B, S, hc, d], tokens [B, S] -> X, the indexer's loss, the experts' shares."""
        B, S = tokens.shape
        X = X.flatten(0, 1)
        y, b, C = self.pre(X, "attn", dtype)
        y, loss = self.attn(rms(y, self.attn_norm).view(B, S, -1), cos, sin, mode, dtype)
        X = self.post(y.flatten(0, 1), X, b, C, dtype)
        y, b, C = self.pre(X, "ffn", dtype)
        y, load = self.ffn(rms(y, self.ffn_norm), tokens.flatten(), dtype)
        return self.post(y, X, b, C, dtype).view(B, S, *X.shape[1:]), loss, load


class Model(nn.Module):
    def __init__(self, c=CONFIG):
        super().__init__()
        self.c = c
        d, hc, V, L = c["hidden_size"], c["hc_mult"], c["vocab_size"], c["num_hidden_layers"]
        self.embed, self.head, self.norm = Weight(V, d, std=0.5), Weight(V, d, std=0.02), Weight(d)
        self.layers = nn.ModuleList(Block(c, c["compress_ratios"][i], i < c["num_hash_layers"]) for i in range(L))
        self.mtp = nn.ModuleList([Block(c, 0, False)])
        m = self.mtp[0]
        m.enorm, m.hnorm, m.norm = Weight(d), Weight(d), Weight(d)
        m.e_proj, m.h_proj = Weight(d, d), Weight(d, d)
        for part in (self, m):
            part.hc_head_fn = nn.Parameter(torch.randn(hc, hc * d) * 0.01)
            part.hc_head_base = nn.Parameter(torch.full((hc,), -1.0))
            part.hc_head_scale = nn.Parameter(torch.full((1,), 0.5))
        for m in (0, 4):
            angle = torch.arange(c["max_position_embeddings"])[:, None].float() * frequencies(c, m)
            self.register_buffer(f"cos{m}", angle.cos(), persistent=False)
            self.register_buffer(f"sin{m}", angle.sin(), persistent=False)

    def logits(self, X, part, dtype):
        c = self.c
        f = X.flatten(-2)
        size = f.float().square().mean(-1, keepdim=True)
        mix = F.linear(f.float(), part.hc_head_fn) * torch.rsqrt(size + c["rms_norm_eps"])
        a = torch.sigmoid(mix * part.hc_head_scale + part.hc_head_base) + c["hc_eps"]
        y = rms((a[..., None] * X.float()).sum(-2), part.norm)
        return self.head(y, dtype)

    def forward(self, tokens, mode=dict(sparse=torch.tensor(True)), dtype=torch.float32, mtp=True):
        """tokens [B, S] -> logits [B, S, V], MTP logits (row t predicts t+2; row S-1 is void), index loss, loads.
        mode: sparse (a bool tensor; False: CSA sees every entry), source [B, S] (the position of the word that position t
        has to recall, or -1) with guide (the weight of the loss that pulls attention there), blind [B] (rows in which CSA
        sees nothing, so that HCA learns to count) and, for ablations, hide4 / hide128 / random."""
        B, S = tokens.shape
        X = self.embed.weight[tokens].to(dtype)[:, :, None].expand(-1, -1, self.c["hc_mult"], -1)
        loss, loads = 0, []
        for block, m in zip(self.layers, self.c["compress_ratios"]):
            cos, sin = (self.cos4[:S], self.sin4[:S]) if m else (self.cos0[:S], self.sin0[:S])
            X, kl, load = block(X, tokens, cos, sin, mode, dtype)
            loss = loss + kl
            loads.append(load)
        out = self.logits(X, self, dtype)
        if not mtp:
            return out, None, loss, loads
        m, following = self.mtp[0], tokens.roll(-1, 1)
        e = m.e_proj(rms(self.embed.weight[following], m.enorm), dtype)
        Y = (m.h_proj(rms(X, m.hnorm), dtype) + e[:, :, None]).to(dtype)
        Y, _, load = m(Y, following, self.cos0[:S], self.sin0[:S], mode, dtype)
        return out, self.logits(Y, m, dtype), loss, loads + [load]


# ---- checkpoint files

def per_tensor(state, c):
    """(name in the checkpoint, view of the model's values) for every tensor; the stacked experts one by one."""
    E = c["n_routed_experts"]
    for name, p in state.items():
        if ".ffn.experts." in name:
            for e, w in enumerate(p.chunk(E, 1 if name.endswith("w2") else 0)):
                yield name.replace("experts.", f"experts.{e}.") + ".weight", w
        else:
            yield name, p


def save(model, path, fmt, tokenizer):
    """A checkpoint folder in format bf16, native (FP4 / FP8) or int: weights, index, configuration, tokenizer. Matrices
    and norms are rounded to BF16 first, whatever the format."""
    os.makedirs(path, exist_ok=True)
    values = {k: v.numpy() for k, v in per_tensor(model.state_dict(), model.c)}
    tensors, file = {}, "model-00001-of-00001.safetensors"
    for name, kind, _ in formats.tensor_table({**model.c, "num_nextn_predict_layers": 1}):
        v = values.pop(name)
        tensors.update(formats.encode(name, kind, v if kind in ("i64", "f32") else formats.bf16_round(v), fmt))
    assert not values
    formats.write_file(os.path.join(path, file), tensors)
    formats.write_index(path, dict.fromkeys(tensors, file), sum(t.nbytes() for t in tensors.values()))
    text = lambda s: dict(__type="AddedToken", content=s, lstrip=False, normalized=True, rstrip=False,
                          single_word=False)
    bos, eos = text("<｜begin▁of▁sentence｜>"), text("<｜end▁of▁sentence｜>")
    # an answer is one line; some stories would go on with a second one, or with a question nobody asked
    ends = [1, tokenizer.encode("\n", add_special_tokens=False).ids[0], tokenizer.token_to_id("<｜User｜>")]
    files = dict(
        config=dict(formats.config(fmt), transformers_version="4.57.1", **model.c),
        generation_config=dict(_from_model_config=True, bos_token_id=0, eos_token_id=ends, do_sample=True, temperature=1.0,
                               top_p=1.0, transformers_version="4.57.1"),
        tokenizer_config=dict(add_bos_token=False, add_eos_token=False, bos_token=bos, eos_token=eos,
                              clean_up_tokenization_spaces=False, legacy=True, model_max_length=model.c["max_position_embeddings"],
                              pad_token=eos, sp_model_kwargs={}, unk_token=None,
                              tokenizer_class="PreTrainedTokenizerFast"))
    for name, x in files.items():
        with open(os.path.join(path, name + ".json"), "w") as f:
            f.write(json.dumps(x, indent=2, sort_keys=name == "config", ensure_ascii=False) + "\n")
    tokenizer.save(os.path.join(path, "tokenizer.json"))


@torch.no_grad()
def load(path):
    """A Model in FP32 from a checkpoint folder in any of the three formats."""
    checkpoint = formats.Checkpoint(path)
    model = Model(checkpoint.config)
    for name, p in per_tensor(model.state_dict(), model.c):
        p.copy_(torch.from_numpy(np.array(checkpoint.get(name))))
    return model.eval()
