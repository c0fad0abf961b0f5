#!/usr/bin/env bash
# dsv4 convert against cp of the same files, in turn, each ended by a sync: bytes written per second.
#   bench/convert.sh [DIR] [GB]     DIR: where to work (default: a new directory in /tmp), GB of weights (default 2)
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d "${1:-/tmp}/dsv4-bench-XXXXXX")
gb=${2:-2}
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-$( [ -x .venv/bin/python ] && echo .venv/bin/python || echo python3 )}

# 94 % experts, 6 % matrices, as in the release; four shards
PYTHONPATH=tests:tools $python - "$work/src" "$gb" <<'PY'
import sys
import numpy as np
import test_convert as T
rng, gb = np.random.default_rng(1), float(sys.argv[2])
shards = {}
for i in range(4):
    t = {}
    for e in range(max(1, round(gb * 235e6 / (2048 * 2048 * 17 / 16)))):
        t.update(T.pair(f"layers.{i}.ffn.experts.{e}.w1", rng.integers(0, 256, (2048, 2048), np.uint8),
                        np.full((2048, 128), 118, np.uint8), "I8"))
    rows = max(128, round(gb * 15e6 / 4096))
    t.update(T.pair(f"layers.{i}.attn.wq_b", *T.fp8(rng, rows, 4096), "F8_E4M3"))
    shards[f"model-{i + 1:05}-of-00004.safetensors"] = t
T.write_checkpoint(sys.argv[1], shards)
PY
TIMEFORMAT='%R %U %S'
bytes=$(du -sb "$work/src" | cut -f1)
threads=$(nproc)

seconds() {     # seconds NAME COMMAND...: run from cold caches if we may, time it with the final sync
    local name=$1
    shift
    rm -rf "$work/dst"
    sync
    { echo 1 >/proc/sys/vm/drop_caches; } 2>/dev/null || true
    { time { "$@" >/dev/null 2>&1; sync -f "$work"; }; } 2>"$work/time"
    awk -v name="$name" -v b="$bytes" \
        '{ printf "%-10s %7.2f s  %8.0f MB/s  %7.2f s of processor time\n", name, $1, b / $1 / 1e6, $2 + $3 }' "$work/time"
}

echo "$(awk -v b="$bytes" 'BEGIN { printf "%.2f", b / 1e9 }') GB in $work, $threads threads"
for round in 1 2 3; do
    seconds cp cp -r "$work/src" "$work/dst"
    seconds convert ${DSV4:-./dsv4} convert "$work/src" "$work/dst" -t "$threads"
done | tee "$work/times"
awk '{ if (!($1 in m) || $2 < m[$1]) m[$1] = $2; if (!($1 in c) || $6 < c[$1]) c[$1] = $6 }
     END { printf "convert runs at %.2f of the rate of cp and takes %.2f times its processor time (best of each)\n",
           m["cp"] / m["convert"], c["convert"] / c["cp"] }' "$work/times"
