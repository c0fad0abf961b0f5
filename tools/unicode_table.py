#!/usr/bin/env python3
"""Packs the code point classes of the pre-tokenizer into the C string unicode_runs of apps/unicode.c.

usage: unicode_table.py tests/golden/text/unicode_classes.txt
Input lines: START END CLASS (hex, inclusive; class L, N, P or W; what is not listed is class O).
Output: C string literals. Each run of equal class is the number (length - 1) * 4 + r, where
class = (class of the run before + 1 + r) % 5 with O = 0, L = 1, N = 2, P = 3, W = 4, written in 5-bit
digits, lowest first, 32 added to all but the last one; a digit d is the character '#' + d, the
backslash left out.
"""
import sys


def runs(path):
    """[(class 0..4, length)] from U+0000 to the end of the last range."""
    out, at = [], 0
    for line in open(path, encoding="ascii"):
        if line.startswith("#") or not line.strip():
            continue
        start, end, cls = line.split()
        start, end, cls = int(start, 16), int(end, 16), " LNPW".index(cls)
        if start > at:
            out.append([0, start - at])
        if out and out[-1][0] == cls and start == at:
            out[-1][1] += end + 1 - start
        else:
            out.append([cls, end + 1 - start])
        at = end + 1
    return out


def pack(runs):
    text, before = "", 4                    # so that the first run, class O, has r = 0
    for cls, length in runs:
        n = (length - 1) * 4 + (cls - before - 1) % 5
        assert cls != before
        before = cls
        while True:
            digit = n % 32 + (32 if n > 31 else 0)
            text += chr(ord("#") + digit + (digit >= ord("\\") - ord("#")))
            n //= 32
            if not n:
                break
    return text


def main():
    text = pack(runs(sys.argv[1]))
    width = 93
    for i in range(0, len(text), width):
        line = text[i:i + width]
        assert "??" not in line             # no trigraphs
        print(f'    "{line}"')


if __name__ == "__main__":
    main()
