#!/usr/bin/env python3
"""A full-size DeepSeek-V4-Flash checkpoint made of holes: 43 layers, 256 experts, 69,187 tensors, 46 shards, in seconds.

  sparse_checkpoint.py OUT [--format int|native] [--layers N] [--experts N]

Every file has its full length and a true header; the data are holes that read as zeros, so it takes little disk.
"""
import argparse
import os

import formats as F
from make_checkpoint import shard_names, write_config


def write_sparse(path, tensors):
    head, _, data = F.header_bytes(tensors)
    with open(path, "wb") as f:
        f.write(head)
        f.truncate(len(head) + data)


def shard_of(name, layers, shards):
    """The release keeps one layer per shard; embedding first, head and MTP last."""
    part = name.split(".")
    if part[0] == "layers":
        return 1 + int(part[1]) * (shards - 3) // layers
    return 0 if part[0] == "embed" else shards - 1 if part[0] == "mtp" else shards - 2


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("out")
    ap.add_argument("--format", choices=["int", "native"], default="int")
    ap.add_argument("--layers", type=int, default=43)
    ap.add_argument("--experts", type=int, default=256)
    ap.add_argument("--shards", type=int, default=46)
    a = ap.parse_args()
    cfg = F.config(a.format, num_hidden_layers=a.layers, n_routed_experts=a.experts)
    cfg["compress_ratios"] = cfg["compress_ratios"][:a.layers] + [0]
    shards = [{} for _ in range(a.shards)]
    for name, kind, shape in F.tensor_table(cfg):
        for n, dtype, sh in F.stored(name, kind, shape, a.format):
            shards[shard_of(name, a.layers, a.shards)][n] = F.Tensor(dtype, None, sh)
    write_config(a.out, cfg)
    where, total = {}, 0
    for f, s in zip(shard_names(a.shards), shards):
        write_sparse(os.path.join(a.out, f), s)
        where.update({n: f for n in s})
        total += sum(t.nbytes() for t in s.values())
    F.write_index(a.out, where, total)
    print(f"{len(where)} tensors, {a.shards} shards, {total / 2**30:.2f} GiB of data (holes)")


if __name__ == "__main__":
    main()
