# dsv4: `make` needs a C compiler and nothing else. CUDA is looked for when the program runs.
#   make            the program ./dsv4            make run      build it and let the tiny model answer
#   make test       everything (./test.sh)        make bench    rates; MODEL=DIR: of another model
#   make sim        the simulated CUDA device     make fuzz     fuzz targets (clang)
#   make SAN=1      ASan + UBSan in build/san     make TSAN=1   TSan in build/tsan
#   make PTX="FILE..."  embeds ready GPU kernels (`dsv4 devices -m DIR` makes them): no NVRTC needed
CC      ?= gcc
CFLAGS  ?= -O3 -g
WARN     = -Wall -Wextra -Wshadow -Wvla
STD      = -std=gnu11 -ffp-contract=off -fno-math-errno -pthread
SOURCES  = dsv4.c $(wildcard apps/*.c)
OUT      = dsv4

ifdef SAN
OUT      = build/san/dsv4
CFLAGS   = -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
endif
ifdef TSAN
OUT      = build/tsan/dsv4
CFLAGS   = -O1 -g -fsanitize=thread
endif

ifdef PTX
STD     += -DDSV4_PTX='"build/ready.ptx"'
$(OUT): ready
ready:
	@mkdir -p build
	cat $(PTX) >build/ready.ptx
endif

$(OUT): $(SOURCES) $(wildcard apps/*.h models/tiny/*) kernels.cu Makefile
	@mkdir -p $(dir $@)
	$(CC) $(STD) $(WARN) $(CFLAGS) -o $@ $(SOURCES) -ldl -lm

run: dsv4
	./dsv4 -m models/tiny -p "Tell me a story about a fox." -s 1

test:
	./test.sh

bench: dsv4
	./dsv4 bench -m $(or $(MODEL),models/tiny)

FUZZ = $(patsubst tests/fuzz_%.c,build/fuzz/fuzz_%,$(wildcard tests/fuzz_*.c))
fuzz: $(FUZZ)
build/fuzz/fuzz_%: tests/fuzz_%.c $(SOURCES)
	@mkdir -p $(dir $@)
	clang $(STD) -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
	    -Wno-unused-function -o $@ $< $(wildcard apps/*.c) -ldl -lm

-include tests/sim/sim.mk

clean:
	rm -rf build dsv4

.PHONY: run test ready fuzz sim bench clean
.DEFAULT_GOAL := $(OUT)
