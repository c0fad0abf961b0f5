# The simulated CUDA device: build/sim/libcuda.so.1 and its tests.
# Included by the top Makefile; also works alone: make -f tests/sim/sim.mk
SIM_DIR   := tests/sim
SIM_OUT   := build/sim
SIM_SRC   := $(filter-out $(SIM_DIR)/test_%,$(wildcard $(SIM_DIR)/*.c))
SIM_HDR   := $(wildcard $(SIM_DIR)/*.h)
# No contraction: the simulator's own C must round exactly as the PTX says.
SIM_FLAGS := -std=gnu11 -O3 -g -march=x86-64-v3 -ffp-contract=off -fno-strict-aliasing \
             -fPIC -fvisibility=hidden -pthread -Wall -Wextra -Werror $(SIM_SAN)
SIM_OBJ   := $(SIM_SRC:$(SIM_DIR)/%.c=$(SIM_OUT)/%.o)

.PHONY: sim sim-test
sim: $(SIM_OUT)/libcuda.so.1

$(SIM_OUT)/libcuda.so.1: $(SIM_OBJ)
	$(CC) $(SIM_SAN) -shared -Wl,-soname,libcuda.so.1 -Wl,-z,defs -o $@ $(SIM_OBJ) -pthread -lm

$(SIM_OUT)/%.o: $(SIM_DIR)/%.c $(SIM_HDR)
	@mkdir -p $(SIM_OUT)
	$(CC) $(SIM_FLAGS) -c -o $@ $<

sim-test: sim
	sh $(SIM_DIR)/run_tests.sh
