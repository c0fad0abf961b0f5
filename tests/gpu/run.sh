#!/usr/bin/env bash
# The GPU suites on the simulated device: every operation against the CPU's and FP64, end to end with faults, gates at the real shapes.
# Ends with 'N passed, N failed'.   run.sh [--quick] [--table bench/gpu_computed.md]
set -u
cd "$(dirname "$0")/../.." || exit 1
PY=${PY:-.venv/bin/python}
[ -x "$PY" ] || PY=python3
OUT=build/gpu passed=0 failed=0 quick= table=
while [ $# -gt 0 ]; do
    case $1 in --quick) quick=quick ;; --table) table=$2; shift ;; *) echo "unknown option $1"; exit 2 ;; esac
    shift
done
mkdir -p $OUT
make -s sim || { echo "0 passed, 1 failed"; exit 1; }
libs=$PWD/build/sim
for d in /usr/local/cuda/lib64 /usr/local/cuda/lib; do [ -d $d ] && libs=$libs:$d; done
if ! LD_LIBRARY_PATH=$libs "$PY" -c 'import ctypes; [ctypes.CDLL("libnvrtc.so." + v) for v in ["13"]]' 2>/dev/null && [ -z "${DSV4_NVRTC:-}" ]; then
    echo "# no NVRTC here: the GPU path is not tested (install it, or set DSV4_NVRTC)"
    echo "0 passed, 0 failed"
    exit 0
fi
count() {           # count LOG CODE: adds the last 'N passed, N failed' of a log
    local c
    c=$(grep -aoE '[0-9]+ passed, [0-9]+ failed' "$1" | tail -n 1)
    if [ -z "$c" ]; then failed=$((failed + 1)); tail -5 "$1"; return; fi
    passed=$((passed + ${c%% passed*}))
    c=${c#*, }
    failed=$((failed + ${c%% failed*}))
}
build() {
    ${CC:-gcc} -std=gnu11 -O2 -g -ffp-contract=off -fno-math-errno -pthread -I. -o $OUT/$1 tests/gpu/$1.c $(ls apps/*.c) -ldl -lm
}
export DSV4_CACHE=$PWD/$OUT/cache
build test_kernels && LD_LIBRARY_PATH=$libs nice ./$OUT/test_kernels 2>$OUT/test_kernels.err | tee $OUT/test_kernels.log
count $OUT/test_kernels.log
build test_fp64 && LD_LIBRARY_PATH=$libs nice ./$OUT/test_fp64 2>$OUT/test_fp64.err | tee $OUT/test_fp64.log
count $OUT/test_fp64.log
nice "$PY" tests/gpu/suite.py ${quick:+--quick} 2>&1 | tee $OUT/suite.log
count $OUT/suite.log
nice "$PY" tests/gpu/test_start.py 2>&1 | tee $OUT/start.log
count $OUT/start.log
rm -rf $OUT/real && mkdir -p $OUT/real
if build real_shapes; then
    LD_LIBRARY_PATH=$libs SIM_PTXAS=$(command -v ptxas || echo /usr/local/cuda/bin/ptxas) \
        nice ./$OUT/real_shapes $OUT/real $([ -n "$table" ] || echo quick) 2>&1 | grep -v '^#'
fi
"$PY" tests/gpu/computed.py $OUT/real ${table:+--table "$table"} 2>&1 | tee $OUT/computed.log
count $OUT/computed.log
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
