#!/usr/bin/env python3
"""Compares the C tokenizer with HF `tokenizers` (PyPI): every code point in several surroundings, random
strings, random bytes (repaired with U+FFFD on the Python side), and decoding of random ids.

usage: compare_tokenizers.py PIPE_BINARY TOKENIZER_JSON [N_RANDOM=1000000] [SEED=1] [random]
With `random` the runs over every code point are left out.
PIPE_BINARY is tests/text/tokenizer_pipe.c built. Prints one line a part; exit 1 if there are differences.
"""
import random
import struct
import subprocess
import sys
import threading

from tokenizers import Tokenizer


def pump(binary, tokenizer, frames):
    """Sends all frames [(kind, n, bytes)], returns all answers (raw bytes, 4 per id or 1 per byte)."""
    p = subprocess.Popen([binary, tokenizer], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def feed():
        p.stdin.write(b"".join(struct.pack("II", k, n) + data for k, n, data in frames))
        p.stdin.close()

    thread = threading.Thread(target=feed)
    thread.start()
    out = p.stdout.read()
    thread.join()
    if p.wait() != 0:
        sys.exit(f"{binary} failed with {p.returncode}")
    answers, at = [], 0
    for kind, _, _ in frames:
        n = struct.unpack_from("I", out, at)[0] * (4 if kind < 2 else 1)
        answers.append(out[at + 4:at + 4 + n])
        at += 4 + n
    assert at == len(out)
    return answers


passed = failed = 0


def report(what, total, bad):
    global passed, failed
    passed, failed = passed + (not bad), failed + bool(bad)
    print(f"{'FAIL ' if bad else ''}{what}: {total} compared, {len(bad)} differences", flush=True)
    for item in bad[:5]:
        print("  ", item)


def compare_texts(what, args, hf, blobs):
    """blobs: texts as bytes; those that are not UTF-8 are repaired here for the reference."""
    bad = []
    for start in range(0, len(blobs), 50000):
        part = blobs[start:start + 50000]
        got = pump(*args, [(0, len(b), b) for b in part])
        texts = [b.decode("utf-8", "replace") for b in part]
        ref = hf.encode_batch(texts, add_special_tokens=False)
        for blob, text, mine, theirs in zip(part, texts, got, ref):
            ids = list(struct.unpack(f"{len(mine) // 4}i", mine))
            if ids != theirs.ids:
                bad.append((blob, ids, theirs.ids))
    report(what, len(blobs), bad)


def compare_decodings(what, args, hf, rows):
    bad = []
    for skip in (False, True):
        frames = [(3 if skip else 2, len(r), struct.pack(f"{len(r)}i", *r)) for r in rows]
        for row, mine in zip(rows, pump(*args, frames)):
            text = hf.decode(row, skip_special_tokens=skip)
            if mine != text.encode():
                bad.append((row, skip, mine, text))
    report(what, 2 * len(rows), bad)


def random_text(rng, added):
    """Alphabets chosen to make class changes, spaces, digits, CJK borders and added tokens frequent."""
    kinds = (
        lambda: rng.choice("aZbé \n\r\t.,;:!'\"()<>|_-=/\\#$%^&*@~`0123456789"),
        lambda: rng.choice(" \n\r\t\u3000\u00a0\u0085\u2028\u200b\ufeff\u200d\x00\x1c"),
        lambda: rng.choice("中一龥\u9fa6ぁアー・゛\u3040\u3097\u30a0\u309b〇"),
        lambda: rng.choice("0123456789½٣Ⅷ〇②७"),
        lambda: rng.choice("a\u0301\u0300\ufe0f❤👩💻🏽é\u0903ก\u0e31한글क्षि"),
        lambda: rng.choice("the quick brown fox jumps over THE lazy dog".split()) + " ",
        lambda: chr(rng.choice((rng.randrange(0x80), rng.randrange(0x3000), rng.randrange(0x10000),
                                rng.randrange(0x110000)))),
        lambda: rng.choice(added),
        lambda: (lambda a: a[:rng.randrange(1, len(a) + 1)])(rng.choice(added)),
        lambda: rng.choice("aA= -x") * rng.randrange(1, 40),
    )
    mix = rng.sample(kinds, rng.randrange(1, 5))
    text = "".join(rng.choice(mix)() for _ in range(rng.randrange(0, 24)))
    return "".join(c for c in text if not 0xd800 <= ord(c) < 0xe000)


def random_bytes(rng, added):
    data = bytearray(random_text(rng, added).encode())
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(data) + 1)
        if rng.random() < 0.5:
            data[at:at + 1] = bytes([rng.randrange(256)])
        else:
            del data[at:at + rng.randrange(1, 3)]
    return bytes(data)


def main():
    args = sys.argv[1], sys.argv[2]
    count = int(sys.argv[3]) if len(sys.argv) > 3 else 1000000
    rng = random.Random(int(sys.argv[4]) if len(sys.argv) > 4 else 1)
    hf = Tokenizer.from_file(sys.argv[2])
    added = [t.content for t in hf.get_added_tokens_decoder().values()]
    every = [chr(c) for c in range(0x110000) if not 0xd800 <= c < 0xe000]
    for form in () if len(sys.argv) > 5 else ("{0}", "a{0}b", ".{0} {0}1", "中{0}  {0}\n"):
        compare_texts(f"every code point as {form!r}", args, hf, [form.format(c).encode() for c in every])
    for start in range(0, count, 200000):
        n = min(200000, count - start)
        compare_texts(f"random strings {start}..", args, hf,
                      [random_text(rng, added).encode() for _ in range(n)])
    compare_texts("random bytes", args, hf, [random_bytes(rng, added) for _ in range(count // 5)])
    size = hf.get_vocab_size()
    rows = [[rng.randrange(size) for _ in range(rng.randrange(1, 12))] for _ in range(count // 20)]
    rows += [[rng.randrange(3, 259) for _ in range(rng.randrange(1, 12))] for _ in range(count // 20)]
    compare_decodings("decodings", args, hf, rows)
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
