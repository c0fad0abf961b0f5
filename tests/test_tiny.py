"""The trained model end to end: perplexity per path against pinned figures, recall, chat, greedy text per chunk size.

  python tests/test_tiny.py [--dsv4 ./dsv4] [--per-distance 10] [--update]

The figures are in tests/tiny_figures.json; --update rewrites them after the weights changed.
"""
import argparse
import json
import os
import re

from common import ROOT, Tally, run

MODEL = os.path.join(ROOT, "models", "tiny")
FIGURES = os.path.join(ROOT, "tests", "tiny_figures.json")
PATHS = {"default": [], "default, 1 thread": ["-t", "1"], "default, 3 threads": ["-t", "3"], "chunk 7": ["--chunk", "7"],
         "exact": ["--exact"], "exact, 1 thread": ["--exact", "-t", "1"], "portable": ["--isa", "portable"]}


def nll(dsv4, options):
    r = run([dsv4, "ppl", "-m", MODEL, os.path.join(MODEL, "heldout.txt"), "-c", "1024", *options], timeout=300)
    m = re.search(rb"([0-9.]+) nats per token, (\d+) tokens", r.out)
    return (float(m[1]), int(m[2])) if m else (float("nan"), 0)


def answer(dsv4, prompt, *options):
    r = run([dsv4, "-m", MODEL, "-p", prompt, "--temp", "0", "-n", "40", *options])
    return r.out.decode("utf-8", "replace").strip()


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--dsv4", default=os.path.join(ROOT, "dsv4"))
    ap.add_argument("--per-distance", type=int, default=10)
    ap.add_argument("--update", action="store_true")
    a = ap.parse_args()
    t = Tally(verbose=True)

    measured = {name: nll(a.dsv4, options) for name, options in PATHS.items()}
    facts = [json.loads(line) for line in open(os.path.join(MODEL, "recall.jsonl"))]
    recall, chosen = {}, {}
    for f in facts:
        chosen.setdefault(f["distance"], []).append(f)
    for distance, list_ in sorted(chosen.items()):
        list_ = list_[:a.per_distance]
        recall[str(distance)] = sum(answer(a.dsv4, f["prompt"]) == f["answer"] for f in list_) / len(list_)
    often = [json.loads(line) for line in open(os.path.join(MODEL, "often.jsonl"))]
    recall["often"] = sum(answer(a.dsv4, f["prompt"]) == f["answer"] for f in often) / len(often)
    if a.update:
        json.dump({"nats": {k: v[0] for k, v in measured.items()}, "recall": recall}, open(FIGURES, "w"), indent=1)
    want = json.load(open(FIGURES))

    for name, (value, tokens) in measured.items():
        ref = want["nats"][name]
        t.check(tokens > 5000 and abs(value - ref) <= 2e-4, f"perplexity, {name}", f"{value:.5f} nats, pinned {ref:.5f}")
    for other in ("default, 1 thread", "default, 3 threads", "chunk 7"):
        t.check(measured[other] == measured["default"], f"the same perplexity: {other}")
    t.check(measured["exact, 1 thread"] == measured["exact"], "the same perplexity: exact, 1 thread")
    cost = measured["default"][0] - measured["exact"][0]
    t.check(cost <= 0.005, "INT8 activations cost at most 0.5 % of perplexity", f"{100 * cost:.3f} %")

    for distance, share in recall.items():
        ref = want["recall"][distance]
        t.check(share >= ref - 0.1, f"recall, {distance}", f"{share:.2f}, pinned {ref:.2f}")

    story = "Tell me a story about a fox."
    texts = {c: answer(a.dsv4, story, "-n", "120", "--chunk", c) for c in ("1", "3", "7", "512")}
    t.check(len(texts["1"]) > 100 and len(set(texts.values())) == 1, "greedy text is the same for every chunk size", texts["1"][:60])
    seeds = {s: run([a.dsv4, "-m", MODEL, "-p", story, "-s", s, "-n", "60"]).out for s in ("1", "2")}
    again = run([a.dsv4, "-m", MODEL, "-p", story, "-s", "1", "-n", "60", "-t", "1"]).out
    t.check(seeds["1"] == again and seeds["1"] != seeds["2"], "a seed fixes the text, whatever the threads")

    r = run([a.dsv4, "-m", MODEL, "--temp", "0", "-n", "40"], stdin=b"Who are you?\nTom has a red kite.\nWhat does Tom have?\n")
    said = r.out.decode("utf-8", "replace").strip().split("\n")
    t.check(r.code == 0 and len(said) == 3 and "red kite" in said[2], "chat: a fact of the turn before", repr(said))
    t.check("in place" in r.err, "chat: what was read stays read")
    r = run([a.dsv4, "-m", MODEL, "--temp", "0", "-n", "80", "--think", "-p", "What is 3 plus 4?"])
    t.check(r.code == 0 and "7" in r.out.decode() and len(r.err) > 60, "thinking: the reasoning apart from the answer", repr(r.out))
    t.end("tiny")
