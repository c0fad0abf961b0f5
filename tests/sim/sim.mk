# The simulated CUDA device: build/sim/libcuda.so.1 and its tests.
# Included by the top Makefile; also works alone: make -f tests/sim/sim.mk sim-test
# With SIM_OUT=build/sim-tsan SIM_SAN=-fsanitize=thread: a copy under ThreadSanitizer.
SIM_DIR   := tests/sim
SIM_OUT   := build/sim
SIM_SRC   := $(filter-out $(SIM_DIR)/test_%,$(wildcard $(SIM_DIR)/*.c))
SIM_HDR   := $(wildcard $(SIM_DIR)/*.h)
SIM_OBJ   := $(SIM_SRC:$(SIM_DIR)/%.c=$(SIM_OUT)/%.o)
SIM_LIB   := $(SIM_OUT)/libcuda.so.1
# No contraction: the simulator's own C must round exactly as the PTX says.
SIM_FLAGS := -std=gnu11 -O3 -g -march=x86-64-v3 -ffp-contract=off -fno-math-errno -fno-trapping-math -fno-strict-aliasing \
             -fPIC -fvisibility=hidden -pthread -Wall -Wextra -Werror $(SIM_SAN)

.PHONY: sim sim-test
sim: $(SIM_LIB)

$(SIM_LIB): $(SIM_OBJ)
	$(CC) $(SIM_SAN) -shared -Wl,-soname,libcuda.so.1 -Wl,-z,defs,-Bsymbolic -o $@.new $(SIM_OBJ) -pthread -lm
	mv $@.new $@

$(SIM_OUT)/%.o: $(SIM_DIR)/%.c $(SIM_HDR)
	@mkdir -p $(SIM_OUT)
	$(CC) $(SIM_FLAGS) -c -o $@ $<

# Prototypes of what the library exports, for the tests.
$(SIM_OUT)/api_protos.h: $(SIM_SRC)
	@mkdir -p $(SIM_OUT)
	sed -E -n -e '/^(API|BODY)\(/ { :p' -e '/\),/!{ N; b p' -e '}; s/\n +/ /g' \
	    -e 's/^[A-Z]+\([A-Z]+, [0-9]+, (cu\w+), (\([^)]*\)),.*/CUresult \1\2;/p; }' \
	    -e '/^EXPORT/ s/^EXPORT (.*) \{$$/\1;/p' $(SIM_SRC) > $@

$(SIM_OUT)/test_api: $(SIM_DIR)/test_api.c $(SIM_OUT)/api_protos.h $(SIM_LIB)
	$(CC) $(SIM_FLAGS) -I$(SIM_OUT) -o $@ $< $(SIM_LIB) -Wl,-rpath,'$$ORIGIN' -pthread

# Other suites see the inside too.
$(SIM_OUT)/test_%: $(SIM_DIR)/test_%.c $(SIM_OBJ)
	$(CC) $(SIM_FLAGS) -I$(SIM_DIR) -I$(SIM_OUT) -o $@ $< $(SIM_OBJ) -pthread -lm -ldl

$(SIM_OUT)/test_occupancy: $(SIM_DIR)/test_occupancy.cc $(SIM_OBJ)
	$(CXX) -O1 -w -I$(CUDA_HOME)/include -o $@ $< $(SIM_OBJ) -pthread -lm -ldl

sim-test: sim
	sh $(SIM_DIR)/run_tests.sh
