#!/usr/bin/env bash
# dsv4 against llama.cpp and HF transformers: the same layer shapes, on this machine, in turn, in one run. Ends with one table.
#
#   bench/peers.sh WORK                  everything into the directory WORK (about 30 GB on disk, 20 GB of memory)
#   bench/peers.sh WORK STEP...          some of the steps, in this order:
#     build        llama.cpp from the source package of PyPI's llama-cpp-python: llama-bench and its library
#     models       WORK/int (dsv4_int), WORK/native (the release's formats), WORK/peer.gguf (native, by the peer's converter);
#                  what is there already is kept
#     same         does the GGUF compute the same model? The peer's logits of a small checkpoint against the golden ones
#     measure      one round of all but transformers (about a minute and a half), added to WORK/samples.jsonl
#     decode       one round of decoding alone, by dsv4_int and llama.cpp (half a minute)
#     hf           one round of transformers (a few minutes; needs 14 GB of memory; not with ISA)
#     table        WORK/samples.jsonl -> a table in Markdown
#
# PYTHON: an interpreter with numpy, torch and transformers (default python3); ROUNDS: of the run without steps (default 5)
# ISA=avx2: dsv4 and llama.cpp as on a processor without AVX-512, in WORK/samples-avx2.jsonl and a table of their own
set -eu
cd "$(dirname "$0")/.."
work=$(mkdir -p "$1" && realpath "$1")
shift
python=${PYTHON:-python3}
llama=$work/llama.cpp

build=$work/build${ISA:+-$ISA}
[ -z "${ISA:-}" ] || [ "$ISA" = avx2 ] || { echo "peers.sh: ISA: only avx2" >&2; exit 2; }

build() {
    [ -x "$build/bin/llama-bench" ] && return
    if [ ! -e "$llama" ]; then
        $python -m venv "$work/pip"     # a venv of its own: the package's build needs come and go with it
        "$work/pip/bin/pip" download -q --no-binary :all: --no-deps -d "$work" llama-cpp-python
        tar xzf "$work"/llama_cpp_python-*.tar.gz -C "$work"
        ln -sfn "$work"/llama_cpp_python-*/vendor/llama.cpp "$llama"
    fi
    local sets=""
    [ -z "${ISA:-}" ] || sets="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"
    # every instruction set of this processor but AMX: with it version 0.3.36 stops at the first token of this architecture
    # ("GGML_ASSERT(*cur_backend_id != -1)": the three-dimensional attn_output_a in an AMX buffer)
    local no_amx="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    cmake -S "$llama/" -B "$build" -DCMAKE_BUILD_TYPE=Release $sets -DCMAKE_C_FLAGS="$no_amx" -DCMAKE_CXX_FLAGS="$no_amx" \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF \
        -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF >/dev/null
    make -s -C "$build" -j"$(nproc)" llama-bench
}

models() {
    local make="$python tools/make_checkpoint.py --real-shapes --layers 4 --experts 32"
    [ -f "$work/int/config.json" ] || $make "$work/int" --format int
    [ -f "$work/native/config.json" ] || $make "$work/native" --format native
    [ -f "$work/peer.gguf" ] || $python bench/peers.py convert "$llama" "$work/native" "$work/peer.gguf"
}

same() {
    gcc -O1 -o "$work/peer_logits" bench/peer_logits.c -I"$llama/include" -I"$llama/ggml/include" \
        -L"$build/bin" -lllama -lggml -lggml-base -Wl,-rpath,"$build/bin"
    for golden in aligned edge; do
        $python bench/peers.py convert "$llama" "tests/golden/$golden/native" "$work/$golden.gguf"
        $python bench/peers.py same "$work" "$golden"
    done
}

measure() { $python bench/peers.py measure "$work"; }
decode() { $python bench/peers.py decode "$work"; }
hf() { [ -n "${ISA:-}" ] || $python bench/peers.py transformers "$work"; }
table() { $python bench/peers.py table "$work"; }

if [ $# = 0 ]; then
    set -- build models same
    for ((i = 0; i < ${ROUNDS:-5}; i++)); do set -- "$@" measure; done
    set -- "$@" hf table
fi
make -s
for step; do
    case $step in
    build | models | same | measure | decode | hf | table) $step ;;
    *) echo "peers.sh: no step '$step'" >&2; exit 2 ;;
    esac
done
