// test_occupancy.cc: occupancy_blocks() against NVIDIA's cuda_occupancy.h, where a toolkit has it.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <cuda_occupancy.h>

extern "C" int occupancy_blocks(int registers, int threads, uint64_t shared_bytes);

int main() {
    cudaOccDeviceProp p;
    memset(&p, 0, sizeof p); // compute capability 8.6
    p.computeMajor = 8;
    p.computeMinor = 6;
    p.warpSize = 32;
    p.numSms = 82;
    p.maxThreadsPerBlock = 1024;
    p.maxThreadsPerMultiprocessor = 1536;
    p.regsPerBlock = p.regsPerMultiprocessor = 65536;
    p.sharedMemPerBlock = 49152;
    p.sharedMemPerMultiprocessor = 102400;
    p.sharedMemPerBlockOptin = 101376;
    p.reservedSharedMemPerBlock = 1024;
    long passed = 0, failed = 0;
    for (int regs = 1; regs <= 255; regs++)
        for (int threads = 32; threads <= 1024; threads += 32)
            for (int shared = 0; shared <= 101376; shared += 3331) {
                cudaOccFuncAttributes a;
                cudaOccDeviceState s;
                cudaOccResult r;
                memset(&a, 0, sizeof a);
                memset(&s, 0, sizeof s);
                a.maxThreadsPerBlock = 1024;
                a.numRegs = regs;
                a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
                a.maxDynamicSharedSizeBytes = 101376;
                a.numBlockBarriers = 1;
                s.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
                int e = cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &a, &s, threads, shared);
                bool same = !e && r.activeBlocksPerMultiprocessor ==
                                      occupancy_blocks(regs, threads, (uint64_t)shared);
                same ? passed++ : failed++;
            }
    printf("%ld passed, %ld failed\n", passed, failed);
    return failed != 0;
}
