#!/bin/sh
# Builds the simulated device and runs its suites. The last line is "N passed, N failed".
# Each suite prints a line "N passed, N failed" of its own, which is added up.
cd "$(dirname "$0")/../.." || exit 2
out=${SIM_OUT:-build/sim}
log=$out/tests.log
mkdir -p "$out" && : > "$log"
passed=0 failed=0

# suite NAME COMMAND...: adds the suite's counts; one without counts or that crashes is a failure.
suite() {
    name=$1
    shift
    "$@" > "$out/suite.log" 2>&1
    status=$?
    cat "$out/suite.log" >> "$log"
    grep '^FAIL' "$out/suite.log"
    counts=$(grep -E '^[0-9]+ passed, [0-9]+ failed$' "$out/suite.log" | tail -n 1)
    p=${counts%% *} f=${counts#*, }
    f=${f%% *}
    if [ -z "$counts" ] || { [ "$status" != 0 ] && [ "$f" = 0 ]; }; then
        tail -n 20 "$out/suite.log"
        p=${p:-0} f=$((${f:-0} + 1))
    fi
    echo "$name: ${p:-0} passed, $f failed"
    passed=$((passed + p)) failed=$((failed + f))
}

# one NAME COMMAND...: a test by its exit status.
one() {
    name=$1
    shift
    if "$@" > "$out/suite.log" 2>&1; then
        passed=$((passed + 1)) && echo "ok   $name"
    else
        failed=$((failed + 1)) && echo "FAIL $name" && tail -n 20 "$out/suite.log"
    fi
    cat "$out/suite.log" >> "$log"
}

mk() { ${MAKE:-make} -s -f tests/sim/sim.mk "$@"; }

# Every prototype and structure is the one of cuda.h, every name one of the real library.
abi() {
    gcc -std=gnu11 -fsyntax-only -DSIM_ABI_CHECK -I"$1/include" -march=x86-64-v3 \
        tests/sim/api*.c tests/sim/stream.c || return 1
    nm -D --defined-only "$1"/lib*/stubs/libcuda.so | sed 's/.* //' | sort > "$out/real.txt"
    nm -D --defined-only "$out/libcuda.so.1" | sed 's/.* //' | grep '^cu' | sort > "$out/ours.txt"
    [ -s "$out/ours.txt" ] && [ -z "$(comm -13 "$out/real.txt" "$out/ours.txt")" ]
}

occupancy() {
    mk CUDA_HOME="$1" "$out/test_occupancy" && "$out/test_occupancy"
}

# tinygrad as a client, with the CUDA C and with the PTX that it writes.
client() {
    LD_LIBRARY_PATH=$out:$cuda/lib64:$LD_LIBRARY_PATH SIM_DEVICES=2 DEV=$1 \
        timeout 600 "$py" tests/sim/test_client.py
}

# The same work gives the same report, whatever the order and the number of threads.
same_report() {
    for seed in 0 1 2 3; do
        SIM_DEVICES=2 SIM_SEED=$seed SIM_THREADS=$((seed + 1)) SIM_REPORT=$out/report$seed.json \
            "$out/test_api" report || return 1
        cmp "$out/report0.json" "$out/report$seed.json" || return 1
    done
}

# A misspelt setting is refused, not ignored.
refused() {
    for bad in SIM_FAULT=cuMemAloc:1 SIM_FAULT=launch:0 SIM_DEVICES=99 SIM_MEM=2X SIM_CC=8; do
        env "$bad" "$out/test_api" errors
        [ $? = 2 ] || return 1
    done
}

# Two host threads and the whole API under ThreadSanitizer.
tsan() {
    mk SIM_OUT=build/sim-tsan SIM_SAN="-fsanitize=thread -O1" build/sim-tsan/test_api &&
        TSAN_OPTIONS=halt_on_error=1:exitcode=66 timeout 900 build/sim-tsan/test_api
}

mk sim "$out/test_api" > "$log" 2>&1 || { tail -n 20 "$log"; echo "0 passed, 1 failed"; exit 1; }
suite "Driver API" timeout 900 "$out/test_api"
one "the same report with every seed and number of threads" same_report
one "settings that make no sense are refused" refused
cuda=${CUDA_HOME:-/usr/local/cuda}
if [ -f "$cuda/include/cuda_occupancy.h" ]; then
    one "binary interface as in $cuda" abi "$cuda"
    one "occupancy as in $cuda" occupancy "$cuda"
else
    echo "skip binary interface, occupancy: no toolkit in $cuda (CUDA_HOME)"
fi
py=.venv/bin/python
[ -x $py ] || py=python3
if "$py" -c 'import tinygrad, numpy' 2> /dev/null; then
    suite "tinygrad, CUDA C" client CUDA
    suite "tinygrad, PTX" client CUDA:PTX
else
    echo "skip client: $py has no tinygrad"
fi
suite "Driver API under ThreadSanitizer" tsan
for t in tests/sim/test_*.c; do
    name=$(basename "$t" .c)
    [ "$name" = test_api ] && continue
    mk "$out/$name" >> "$log" 2>&1
    suite "$name" timeout 900 "$out/$name"
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
