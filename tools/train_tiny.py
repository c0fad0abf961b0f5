"""Trains the small model. `python train_tiny.py DIR` keeps its state in DIR, resumes from it and goes on to PLAN's end.

The corpus is generated (tiny_corpus.py), so every step sees new documents; seeds are fixed and budgets are steps.
`--export` writes DIR/bf16, DIR/native, DIR/int and the held-out files; `--eval` then measures these: perplexity and recall
of each format, the ablations, and transformers on the same BF16 weights.
"""
import argparse, json, math, os, random, signal, time
import torch
import torch.nn.functional as F
import tiny_corpus as corpus
from tiny_model import CONFIG, Model, load, save

# steps, rows, row length, mixture (repeat, recall, told facts, story reading, chat, story, parade), CSA sparse?, MTP?,
# rows of parades in which CSA is hidden, weight of the guide, learning rate from and to
PLAN = [(380, 16, 256, (1, 10, 2, 1, 1, 1), False, False, 0, 0.2, 1.0, 1.0),
        (160, 4, 1024, (1, 8, 3, 1, 1, 1), False, False, 1, 0.2, 0.9, 0.8),
        (460, 4, 1024, (0, 6, 3, 2, 3, 2, 1), True, False, 1, 0.1, 0.8, 0.8),
        (450, 4, 1024, (0, 6, 3, 2, 3, 3, 1), True, True, 1, 0.1, 0.8, 0.65),
        (650, 4, 1024, (0, 4, 2, 2, 3, 4, 5), True, True, 1, 0.1, 0.65, 0.2),
        (500, 4, 1024, (0, 3, 2, 3, 14, 6, 2), True, True, 1, 0.1, 0.4, 0.01),
        (120, 4, 1024, (0, 2, 1, 2, 30, 4, 1), True, True, 1, 0.1, 0.3, 0.01)]
MUON_LR, ADAM_LR, WARMUP = 0.012, 3e-3, 60


class Data:
    """Rows of documents, cut to S + 2 tokens, with a loss weight for every token."""

    def __init__(self, seed):
        self.r, self.tok, self.cache = random.Random(seed), corpus.tokenizer(CONFIG["vocab_size"]), {}

    def encode(self, doc):
        ids, weights = [], []
        for text, weight in doc:
            if text not in self.cache:
                self.cache[text] = self.tok.encode(text, add_special_tokens=False).ids
            ids += self.cache[text]
            weights += [weight] * len(self.cache[text])
        if len(self.cache) > 200000:
            self.cache.clear()
        return ids, weights

    def batch(self, rows, S, mix, parades=0):
        """-> tokens and weights [rows, S + 2], sources [rows, S]. The first `parades` rows begin with one and have no facts."""
        out, only = [], (0, 0, 0, 0, 1, 0, 40)
        for row in range(rows):
            i, w, names, animals = [], [], corpus.NAMES[:], corpus.ANIMALS[:]
            while len(i) < S + 2:
                some = only if row < parades else mix
                a, b = self.encode(corpus.document(self.r, S + 2 - len(i), some, names, animals))
                i += a
                w += b
            out.append((i[:S + 2], w[:S + 2], sources(i, w, S)))
        return [torch.tensor(x) for x in zip(*out)]


def sources(ids, weights, S):
    """For every t whose next word is to be recalled: where it stood before, after the same 3, 2, 1, 0 words; else -1."""
    last, out = {}, [-1] * S
    for t in range(S):
        for n in (3, 2, 1, 0):
            key = tuple(ids[max(0, t - n + 1):t + 2])
            if 2 <= weights[t + 1] <= corpus.KEY and out[t] < 0:
                out[t] = last.get(key, -1)
        for n in (3, 2, 1, 0):
            last[tuple(ids[max(0, t - n + 1):t + 2])] = t + 1
    return out


def weighted_loss(logits, target, weight):
    lost = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none") * weight.flatten()
    return lost.sum() / (weight.sum() + 1e-9)


class Optimizer:
    """Muon for the matrices inside the blocks (each expert on its own), Adam for all the rest."""

    def __init__(self, model):
        self.muon, self.adam, self.t = {}, [], 0
        E = CONFIG["n_routed_experts"]
        for name, p in model.named_parameters():
            if p.ndim == 2 and ("attn." in name or "ffn." in name or "_proj" in name) and not any(
                    k in name for k in ("gate.weight", "ape", "weights_proj", "hc_")):
                view = ((lambda x: x[None]) if ".experts." not in name or "shared" in name else
                        (lambda x: x.unflatten(1, (E, -1)).transpose(0, 1)) if name.endswith("w2") else
                        (lambda x: x.unflatten(0, (E, -1))))
                v = view(p)
                key = tuple(sorted(v.shape[1:]))
                self.muon.setdefault(key, []).append((p, view, torch.zeros_like(p)))
            else:
                self.adam.append((p, torch.zeros_like(p), torch.zeros_like(p)))

    def state(self):
        moments = [m for g in self.muon.values() for _, _, m in g] + [x for a in self.adam for x in a[1:]]
        return moments + [torch.tensor(self.t)]

    def load(self, state):
        for mine, saved in zip(self.state(), state):
            mine.copy_(saved)
        self.t = int(state[-1])

    @torch.no_grad()
    def step(self, scale):
        self.t += 1
        for group in self.muon.values():
            group, parts = [g for g in group if g[0].grad is not None], []
            for p, view, m in group:
                m.lerp_(p.grad, 0.05)
                v = view(p.grad.lerp(m, 0.95))
                parts.append(v if v.shape[1] <= v.shape[2] else v.transpose(1, 2))
            x = orthogonal(torch.cat(parts))
            for (p, view, m), u in zip(group, x.split([len(v) for v in parts])):
                v = view(p)
                u = u if v.shape[1] <= v.shape[2] else u.transpose(1, 2)
                step = MUON_LR * scale
                v.mul_(1 - 0.02 * step).sub_(u, alpha=step * max(1, v.shape[1] / v.shape[2]) ** 0.5)
        b1, b2 = 0.9, 0.98
        for p, m, v in self.adam:
            if p.grad is None:
                continue
            m.lerp_(p.grad, 1 - b1)
            v.lerp_(p.grad.square(), 1 - b2)
            p.sub_(m / (1 - b1 ** self.t) / ((v / (1 - b2 ** self.t)).sqrt() + 1e-10), alpha=ADAM_LR * scale)


def orthogonal(x):
    """[n, r, c], r <= c: the nearest matrices with orthogonal rows, roughly (Newton-Schulz, quintic)."""
    x = x.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        A = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * A + 2.0315 * A @ A) @ x
    return x.float()


def recall_set(tok, n=25, seed=10 ** 9 + 1):
    """Chat prompts whose answer was stated about 100, 200, 400, 800 tokens before: [{distance, prompt, answer}]."""
    r, out = random.Random(seed), []
    for distance in (100, 200, 400, 800):
        while sum(x["distance"] == distance for x in out) < n:
            fs, scene = corpus.facts(r, 6), r.choice(list(corpus.SCENES))
            target, rest = fs[0], fs[1:]
            early = [corpus.text_of(corpus.state(target, 1))]
            early += [corpus.scene_filler(r, scene) for _ in range(r.randint(0, 3))]
            r.shuffle(early)
            later = [corpus.text_of(corpus.state(f, 1)) for f in rest]
            ask = corpus.text_of(corpus.ask(target))[len(corpus.USER):]
            ask, answer = ask.split(corpus.BOT + corpus.DONE)
            answer = answer.replace(corpus.EOS, "")
            while True:
                tail = "".join(later) + " " + ask
                length = len(tok.encode(tail).ids)
                if length >= distance - 4:
                    break
                later.insert(r.randint(0, len(later)), corpus.scene_filler(r, scene))
            if length <= distance + 6:
                out.append(dict(distance=distance, prompt="Listen." + "".join(early) + tail, answer=answer))
    return out


def often_set(n=96, seed=10 ** 9 + 2):
    """Chat prompts that ask which of two visitors came more often: [{distance: the whole length, prompt, answer}]."""
    r, out = random.Random(seed), []
    while len(out) < n:
        size = (300, 500, 850)[len(out) % 3]
        text = corpus.text_of(corpus.parade(r, size, 1))[len(corpus.USER):]
        prompt, answer = text.split(corpus.BOT + corpus.DONE)
        if "Who came more often" in prompt and abs(len(prompt) / 4 - size) < size / 4:
            out.append(dict(distance=size, prompt=prompt, answer=answer.replace(corpus.EOS, "")))
    return out


@torch.no_grad()
def recall_score(model, items, tok, mode):
    """-> {distance: (share of exact answers, loss of the recalled words)}: teacher-forced argmax = greedy decoding."""
    got = {}
    for distance in sorted({x["distance"] for x in items}):
        rows, spans = [], []
        for x in (x for x in items if x["distance"] == distance):
            head = tok.encode(corpus.BOS + corpus.USER + x["prompt"] + corpus.BOT + corpus.DONE).ids
            tail = tok.encode(x["answer"] + corpus.EOS).ids
            rows.append(head + tail)
            spans.append((len(head), len(head) + len(tail)))
        S = -(-max(map(len, rows)) // 128) * 128
        x = torch.tensor([row + [2] * (S - len(row)) for row in rows])
        logits = torch.cat([model(part, mode, mtp=False)[0] for part in x.split(5)])
        hits, lost, count = 0, 0.0, 0
        for row, (a, b), lg in zip(rows, spans, logits):
            target = torch.tensor(row[a:b])
            hits += bool((lg[a - 1:b - 1].argmax(-1) == target).all())
            lost += F.cross_entropy(lg[a - 1:b - 1], target, reduction="sum").item()
            count += b - a
        got[distance] = (hits / len(rows), lost / count)
    return got


@torch.no_grad()
def held_out(model, data, mode, rows=8, S=1024, mix=(1, 4, 3, 2, 2, 2)):
    """Unweighted loss per token, the loss of the recalled words, and how often the MTP layer's guess is the main one."""
    ids, w, _ = data.batch(rows, S, mix)
    lost = keys = 0.0
    agree = n = 0
    for i in range(0, rows, 2):
        x, wx = ids[i:i + 2], w[i:i + 2]
        logits, draft, _, _ = model(x[:, :S], mode)
        each = F.cross_entropy(logits.flatten(0, 1), x[:, 1:S + 1].flatten(), reduction="none").view(len(x), S)
        lost += each.mean().item() * len(x)
        keys += (each * (wx[:, 1:S + 1] >= 4)).sum().item()
        n += (wx[:, 1:S + 1] >= 4).sum().item()
        agree += (draft[:, :-2].argmax(-1) == logits[:, 1:-1].argmax(-1)).float().mean().item() * len(x)
    return lost / rows, keys / max(n, 1), agree / rows


@torch.no_grad()
def perplexity(logits_of, ids, context=1024):
    """exp of the mean loss of all ids, in contexts of 1024 of them, each begun with BOS (`dsv4 ppl -c 1024`)."""
    lost = 0.0
    for i in range(0, len(ids), context):
        part = ids[i:i + context]
        x = torch.tensor([[0] + part[:-1]])
        logits = logits_of(F.pad(x, (0, -x.shape[1] % 128), value=2))[0, :x.shape[1]]
        lost += F.cross_entropy(logits.double(), torch.tensor(part), reduction="sum").item()
    return math.exp(lost / len(ids))


def held_out_text(seed=10 ** 9, size=40000):
    """Stories that training never saw (its seeds are the step numbers), an empty line between them."""
    r, text = random.Random(seed), ""
    while len(text) < size:
        text += corpus.story(r)[0] + "\n\n"
    return text.rstrip("\n") + "\n"


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("dir")
    ap.add_argument("--eval", action="store_true")
    ap.add_argument("--export", action="store_true")
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--steps", type=int, help="stop after this many steps")
    ap.add_argument("--compile", type=int, default=1)
    o = ap.parse_args()
    torch.set_num_threads(o.threads)
    torch.manual_seed(1)
    os.makedirs(o.dir, exist_ok=True)
    state_file = os.path.join(o.dir, "state.pt")
    model, start = Model(), 0
    opt = Optimizer(model)
    if os.path.exists(state_file):
        saved = torch.load(state_file, weights_only=True)
        model.load_state_dict(saved["model"])
        opt.load(saved["opt"])
        start = saved["step"]
    total = sum(p[0] for p in PLAN)
    if o.export or o.eval:
        if o.export:
            export(model, o.dir)
        if o.eval:
            evaluate(o.dir)
        return
    if o.compile:
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 256
        for block in [*model.layers, model.mtp[0]]:
            block.compile(dynamic=False)
        loss_of = torch.compile(weighted_loss, dynamic=False)
    else:
        loss_of = weighted_loss
    tok = corpus.tokenizer(CONFIG["vocab_size"])
    sets, saved_at, data = (recall_set(tok, 10), often_set(48)), time.time(), Data(0)
    log = open(os.path.join(o.dir, "log.txt"), "a", buffering=1)
    stop = []                                              # SIGTERM: finish the step, save, end
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    step, clock, tokens, sums = 0, time.time(), 0, torch.zeros(4)
    for count, rows, S, mix, sparse, mtp, blind, guide, lr, lr_end in PLAN:
        for i in range(count):
            step += 1
            if step <= start:
                continue
            data.r.seed(step)                              # so a resumed run sees the same documents
            ids, w, source = data.batch(rows, S, mix, blind)
            mode = dict(sparse=torch.tensor(sparse), source=source, guide=torch.tensor(guide),
                        blind=torch.arange(rows) < blind)
            logits, draft, kl, loads = model(ids[:, :S], mode, torch.bfloat16, mtp)
            main_loss = loss_of(logits, ids[:, 1:S + 1], w[:, 1:S + 1])
            w2 = w[:, 2:].clone()
            w2[:, -1] = 0
            mtp_loss = loss_of(draft, ids[:, 2:], w2) if mtp else torch.zeros(())
            (main_loss + 0.3 * mtp_loss + kl).backward()
            opt.step(min(1, step / WARMUP) * (lr + (lr_end - lr) * i / count))
            model.zero_grad(set_to_none=True)
            for block, load in zip([*model.layers, model.mtp[0]], loads):
                if not block.ffn.hashed:
                    block.ffn.gate.bias += 1e-3 * torch.sign(load.mean() - load)
            tokens += ids[:, :S].numel()
            key = w[:, 1:S + 1] >= 2
            with torch.no_grad():
                keyl = loss_of(logits, ids[:, 1:S + 1], key.float())
            sums += torch.tensor([main_loss.item(), mtp_loss.item(), float(kl), keyl.item()])
            if step % 25 == 0:
                v = sums / 25
                log.write(f"{time.strftime('%H:%M:%S')} step {step} S {S} loss {v[0]:.4f} mtp {v[1]:.4f} kl {v[2]:.4f} "
                          f"key {v[3]:.4f} {tokens / (time.time() - clock):.0f} tok/s\n")
                sums.zero_(); clock, tokens = time.time(), 0
            if step % 300 == 0:
                model.eval()
                with torch.compiler.set_stance("force_eager"):
                    for sparse_now in {sparse, True}:
                        for items in sets:
                            got = recall_score(model, items, tok, dict(sparse=torch.tensor(sparse_now)))
                            log.write(f"   sparse {sparse_now} " +
                                      " ".join(f"{d}: {s:.0%} {l:.3f}" for d, (s, l) in got.items()) + "\n")
                clock = time.time()
                model.train()
            if time.time() - saved_at > 600 or stop or step == o.steps or step == total:
                torch.save(dict(model=model.state_dict(), opt=opt.state(), step=step), state_file + ".new")
                os.replace(state_file + ".new", state_file)
                saved_at = time.time()
            if stop or step == o.steps:
                return


def export(model, out):
    tok = corpus.tokenizer(CONFIG["vocab_size"])
    for fmt in ("bf16", "native", "int"):
        save(model, os.path.join(out, fmt), fmt, tok)
    with open(os.path.join(out, "heldout.txt"), "w") as f:
        f.write(held_out_text())
    for name, items in dict(recall=recall_set(tok), often=often_set()).items():
        with open(os.path.join(out, name + ".jsonl"), "w") as f:
            f.writelines(json.dumps(x) + "\n" for x in items)


def evaluate(out):
    tok, on = corpus.tokenizer(CONFIG["vocab_size"]), torch.tensor(True)
    ids = tok.encode(open(os.path.join(out, "heldout.txt")).read()).ids
    sets = {k: [json.loads(line) for line in open(os.path.join(out, k + ".jsonl"))] for k in ("recall", "often")}

    def scores(m, mode):
        """Recall by distance, the mean loss per answer token of both sets."""
        got = recall_score(m, sets["recall"], tok, mode)
        most = recall_score(m, sets["often"], tok, mode)
        mean = lambda x, i: sum(v[i] for v in x.values()) / len(x)
        return (" ".join(f"{d}: {s:.0%}" for d, (s, _) in got.items()) +
                f" loss {mean(got, 1):.4f}, most often {mean(most, 0):.0%} loss {mean(most, 1):.4f}")

    print(f"{len(ids)} tokens of held-out text; recall: share of exact answers, loss per answer token")
    for fmt in ("bf16", "native", "int"):
        m = load(os.path.join(out, fmt))
        ppl = perplexity(lambda x: m(x, mtp=False)[0], ids)
        print(f"{fmt:15s} perplexity {ppl:.5f}  {scores(m, dict(sparse=on))}", flush=True)
    loss, key, agree = held_out(m, Data(10 ** 9), dict(sparse=on), 4)
    print(f"int, documents of all kinds: loss {loss:.4f}, recalled words {key:.4f}, "
          f"MTP draft = next greedy token {agree:.1%}", flush=True)
    for name, mode in dict(hide_csa=dict(hide4=1), hide_hca=dict(hide128=1), hide_both=dict(hide4=1, hide128=1),
                           random_indexer=dict(random=1), dense=dict(sparse=~on)).items():
        print(f"{name:15s} {scores(m, dict(dict(sparse=on), **mode))}", flush=True)
    import transformers
    torch.Tensor.topk = first_of_equals
    hf = transformers.AutoModelForCausalLM.from_pretrained(os.path.join(out, "bf16"), dtype=torch.float32,
                                                           attn_implementation="eager").eval()
    m, x = load(os.path.join(out, "bf16")), torch.tensor([[0] + ids[:1023]])
    with torch.no_grad():
        d = (hf(x).logits - m(x)[0]).abs().max()
    print(f"transformers {transformers.__version__}  perplexity {perplexity(lambda x: hf(x).logits, ids):.6f}, "
          f"largest logit difference {d:.2e}")


def first_of_equals(x, k, dim=-1, **_):
    """topk where the first of equal values wins, as in dsv4: index scores are often exactly 0, transformers takes any."""
    return torch.return_types.topk(tuple(y.narrow(dim, 0, k) for y in x.sort(dim=dim, descending=True, stable=True)))


if __name__ == "__main__":
    main()
