/* test_api.c: conformance of the simulated Driver API, with known answers.
 *
 * Each case runs in a process of its own, because the library reads its settings when it is loaded:
 * the program starts itself again with the case's environment. */
#define _GNU_SOURCE
#include "api.h"
#include "api_protos.h" /* generated from the EXPORT lines: see sim.mk */
#include <ctype.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static int bad; /* failed checks of this case */

static void check(int line, const char *what, long long got, long long want) {
    if (got == want) return;
    fprintf(stderr, "test_api.c:%d: %s is %lld, should be %lld\n", line, what, got, want);
    bad++;
}
#define IS(got, want) check(__LINE__, #got, (long long)(got), (long long)(want))
#define GOOD(call) IS(call, OK)

static const char ptx[] =
    ".version 7.4\n.target sm_80\n.address_size 64\n"
    ".global .align 4 .b32 table[4] = {5, 6, 7, 8};\n"
    /* out[i] = value + i for i < n */
    ".visible .entry fill(.param .u64 out, .param .u32 value, .param .u32 n)\n{\n"
    "  .reg .pred %p<2>;\n  .reg .b32 %r<9>;\n  .reg .b64 %rd<5>;\n"
    "  ld.param.u64 %rd1, [out];\n  ld.param.u32 %r1, [value];\n  ld.param.u32 %r2, [n];\n"
    "  mov.u32 %r3, %ctaid.x;\n  mov.u32 %r4, %ntid.x;\n  mov.u32 %r5, %tid.x;\n"
    "  mad.lo.s32 %r6, %r3, %r4, %r5;\n  setp.ge.u32 %p1, %r6, %r2;\n  @%p1 bra DONE;\n"
    "  cvta.to.global.u64 %rd2, %rd1;\n  mul.wide.u32 %rd3, %r6, 4;\n"
    "  add.s64 %rd4, %rd2, %rd3;\n  add.s32 %r7, %r1, %r6;\n  st.global.u32 [%rd4], %r7;\n"
    "DONE:\n  ret;\n}\n"
    /* out[i] = in[i] + 1 for i < n */
    ".visible .entry add1(.param .u64 out, .param .u64 in, .param .u32 n)\n{\n"
    "  .reg .pred %p<2>;\n  .reg .b32 %r<9>;\n  .reg .b64 %rd<8>;\n"
    "  ld.param.u64 %rd1, [out];\n  ld.param.u64 %rd5, [in];\n  ld.param.u32 %r2, [n];\n"
    "  mov.u32 %r3, %ctaid.x;\n  mov.u32 %r4, %ntid.x;\n  mov.u32 %r5, %tid.x;\n"
    "  mad.lo.s32 %r6, %r3, %r4, %r5;\n  setp.ge.u32 %p1, %r6, %r2;\n  @%p1 bra DONE;\n"
    "  cvta.to.global.u64 %rd2, %rd1;\n  cvta.to.global.u64 %rd6, %rd5;\n"
    "  mul.wide.u32 %rd3, %r6, 4;\n  add.s64 %rd4, %rd2, %rd3;\n  add.s64 %rd7, %rd6, %rd3;\n"
    "  ld.global.u32 %r7, [%rd7];\n  add.s32 %r8, %r7, 1;\n  st.global.u32 [%rd4], %r8;\n"
    "DONE:\n  ret;\n}\n";

static CUcontext ctx[SIM_MAX_DEVICES];
static CUmodule module[SIM_MAX_DEVICES];
static CUfunction fill[SIM_MAX_DEVICES], add1[SIM_MAX_DEVICES];

/* Contexts, the module and its functions on the first n devices; device 0 is current. */
static void setup(int n) {
    GOOD(cuInit(0));
    for (int d = n - 1; d >= 0; d--) {
        GOOD(cuDevicePrimaryCtxRetain(&ctx[d], d));
        GOOD(cuCtxSetCurrent(ctx[d]));
        GOOD(cuModuleLoadData(&module[d], ptx));
        GOOD(cuModuleGetFunction(&fill[d], module[d], "fill"));
        GOOD(cuModuleGetFunction(&add1[d], module[d], "add1"));
    }
}

static CUresult do_fill(int d, CUdeviceptr out, unsigned value, unsigned n, CUstream s) {
    void *args[] = { &out, &value, &n };
    return cuLaunchKernel(fill[d], (n + 63) / 64, 1, 1, 64, 1, 1, 0, s, args, NULL);
}

static CUresult do_add1(int d, CUdeviceptr out, CUdeviceptr in, unsigned n, CUstream s) {
    void *args[] = { &out, &in, &n };
    return cuLaunchKernel(add1[d], (n + 63) / 64, 1, 1, 64, 1, 1, 0, s, args, NULL);
}

static CUdeviceptr alloc(size_t bytes) {
    CUdeviceptr p = 0;
    GOOD(cuMemAlloc_v2(&p, bytes));
    return p;
}

static CUstream stream(void) {
    CUstream s = NULL;
    GOOD(cuStreamCreate(&s, 1));
    return s;
}

static CUevent event(void) {
    CUevent e = NULL;
    GOOD(cuEventCreate(&e, 0));
    return e;
}

/* ------------------------------------------------------------------------------------------------
 * devices, contexts, errors */

static void case_init(void) {
    int n = 7, v = 0;
    char name[128] = "";
    CUdeviceptr p;
    IS(cuDeviceGetCount(&n), 3);
    IS(cuInit(1), 1);
    GOOD(cuInit(0));
    GOOD(cuDeviceGetCount(&n));
    IS(n, 3);
    IS(cuDeviceGet(&v, 3), 101);
    IS(cuDeviceGet(NULL, 0), 1);
    GOOD(cuDeviceGetName(name, sizeof name, 0));
    IS(strcmp(name, "Test card (SIMULATED)"), 0);
    GOOD(cuDeviceGetAttribute(&v, 75, 1));
    IS(v, 8);
    GOOD(cuDeviceGetAttribute(&v, 76, 1));
    IS(v, 9);
    GOOD(cuDeviceGetAttribute(&v, 97, 0));
    IS(v, 101376);
    GOOD(cuDeviceGetAttribute(&v, 8, 0));
    IS(v, 49152);
    size_t total = 0;
    GOOD(cuDeviceTotalMem_v2(&total, 2));
    IS(total, 3 << 20);
    GOOD(cuDriverGetVersion(&v));
    IS(v, 12040);
    GOOD(cuDeviceCanAccessPeer(&v, 0, 1));
    IS(v, 1);
    GOOD(cuDeviceCanAccessPeer(&v, 1, 1));
    IS(v, 0);
    IS(cuMemAlloc_v2(&p, 4), 201);
    IS(cuCtxSynchronize(), 201);
}

static void case_none(void) {
    int n;
    IS(cuInit(0), 100);
    IS(cuDeviceGetCount(&n), 3);
}

static void case_contexts(void) {
    CUcontext a, b, c;
    CUdevice d;
    GOOD(cuInit(0));
    GOOD(cuDevicePrimaryCtxRetain(&a, 0));
    GOOD(cuDevicePrimaryCtxRetain(&b, 1));
    GOOD(cuDevicePrimaryCtxRetain(&c, 0));
    IS(a == c, 1);
    GOOD(cuCtxGetCurrent(&c));
    IS(c == NULL, 1);
    IS(cuCtxGetDevice(&d), 201);
    GOOD(cuCtxSetCurrent(b));
    GOOD(cuCtxGetDevice(&d));
    IS(d, 1);
    GOOD(cuCtxSetCurrent(a));
    GOOD(cuCtxGetDevice(&d));
    IS(d, 0);
    IS(cuCtxEnablePeerAccess(b, 0), 217);
    CUstream s = stream();
    GOOD(cuDevicePrimaryCtxRelease_v2(0));
    GOOD(cuCtxSynchronize());
    GOOD(cuDevicePrimaryCtxRelease_v2(0));
    IS(cuCtxSynchronize(), 709);
    IS(cuDevicePrimaryCtxRelease_v2(0), 201);
    GOOD(cuDevicePrimaryCtxRetain(&a, 0));
    IS(cuStreamSynchronize(s), 400); /* it went with the context */
}

static void case_errors(void) {
    const char *s = NULL;
    GOOD(cuGetErrorName(700, &s));
    IS(strcmp(s, "CUDA_ERROR_ILLEGAL_ADDRESS"), 0);
    GOOD(cuGetErrorString(2, &s));
    IS(strcmp(s, "out of memory"), 0);
    IS(cuGetErrorName(12345, &s), 1);
    IS(s == NULL, 1);
}

static void case_getproc(void) {
    void *f;
    CUdriverProcAddressQueryResult status;
    GOOD(cuGetProcAddress_v2("cuMemAlloc", &f, 11040, 0, &status));
    IS(f == (void *)cuMemAlloc_v2, 1);
    GOOD(cuGetProcAddress_v2("cuEventElapsedTime", &f, 11040, 0, &status));
    IS(f == (void *)cuEventElapsedTime, 1);
    GOOD(cuGetProcAddress_v2("cuEventElapsedTime", &f, 13000, 0, &status));
    IS(f == (void *)cuEventElapsedTime_v2, 1);
    GOOD(cuGetProcAddress_v2("cuMemAlloc", &f, 3000, 0, &status));
    IS(status, 2);
    GOOD(cuGetProcAddress_v2("cuTexRefCreate", &f, 12000, 0, &status));
    IS(status, 1);
    IS(f == NULL, 1);
    IS(cuGetProcAddress("cuMemAlloc_v2", &f, 12000, 0), 500);
    GOOD(cuGetProcAddress("cuInit", &f, 12000, 0));
    IS(cuGetProcAddress("cuInit", &f, 14000, 0), 1);
}

/* ------------------------------------------------------------------------------------------------
 * memory and copies */

static void case_memory(void) {
    CUdeviceptr p = 0, q;
    size_t left, total;
    void *h;
    setup(1);
    GOOD(cuMemGetInfo_v2(&left, &total));
    IS(total, 1 << 20);
    IS(cuMemAlloc_v2(&q, 0), 1);
    IS(cuMemAlloc_v2(&q, 2 << 20), 2);
    p = alloc(512 << 10);
    IS(cuMemAlloc_v2(&q, 600 << 10), 2);
    IS(cuMemFree_v2(p + 4), 1);
    GOOD(cuMemFree_v2(p));
    IS(cuMemFree_v2(p), 1);
    GOOD(cuMemFree_v2(0));
    p = alloc(900 << 10);
    IS(cuMemcpyHtoD_v2(p + (900 << 10) - 4, &left, 8), 1);
    IS(cuMemcpyDtoH_v2(&left, 12345, 8), 1);
    IS(cuMemsetD32_v2(p + 1, 0, 1), 1);
    GOOD(cuMemHostAlloc(&h, 5000, 3));
    GOOD(cuMemFreeHost(h));
    IS(cuMemFreeHost(h), 1);
    char *own = aligned_alloc(4096, 8192);
    IS(cuMemHostRegister_v2(own + 8, 4096, 0), 1);
    IS(cuMemHostRegister_v2(own, 8192, 8), 801);
    GOOD(cuMemHostRegister_v2(own, 8192, 1));
    IS(cuMemHostRegister_v2(own + 4096, 4096, 0), 712);
    IS(cuMemFreeHost(own), 1);
    GOOD(cuMemHostUnregister(own));
    IS(cuMemHostUnregister(own), 713);
    free(own);
}

static void case_copies(void) {
    enum { N = 300 };
    unsigned a[N], b[N], *pinned;
    setup(2);
    CUdeviceptr p = alloc(sizeof a), q = alloc(sizeof a);
    CUstream s = stream();
    for (int i = 0; i < N; i++) a[i] = 7u * (unsigned)i;
    GOOD(cuMemcpyHtoD_v2(p, a, sizeof a));
    GOOD(cuMemcpyDtoD_v2(q, p, sizeof a));
    GOOD(cuMemcpyDtoH_v2(b, q, sizeof a));
    IS(memcmp(a, b, sizeof a), 0);
    GOOD(cuMemsetD8_v2(q, 0xAB, 5));
    GOOD(cuMemsetD32Async(q + 20, 0xDEADBEEF, 2, NULL));
    GOOD(cuMemcpyDtoH_v2(b, q, 28));
    IS(b[0], 0xABABABAB);
    IS(b[1] & 0xFFFF, 0x00AB);
    IS(b[5], 0xDEADBEEF);
    IS(b[6], 0xDEADBEEF);
    /* a pageable source is read at the call, a pinned one when the copy runs */
    GOOD(cuMemAllocHost_v2((void **)&pinned, sizeof a));
    IS(pinned[0], 0xFFFFFFFF); /* poison */
    pinned[0] = a[0] = 1;
    GOOD(cuMemcpyHtoDAsync_v2(p, a, 4, s));
    GOOD(cuMemcpyHtoDAsync_v2(q, pinned, 4, s));
    pinned[0] = a[0] = 2;
    GOOD(cuMemcpyDtoHAsync_v2(&pinned[1], p, 4, s));
    GOOD(cuMemcpyDtoHAsync_v2(&pinned[2], q, 4, s));
    IS(pinned[1], 0xFFFFFFFF); /* nothing ran yet */
    GOOD(cuStreamSynchronize(s));
    IS(pinned[1], 1);
    IS(pinned[2], 2);
    /* between devices, also without peer access; wrong owners are refused */
    GOOD(cuCtxSetCurrent(ctx[1]));
    CUdeviceptr r = alloc(sizeof a);
    CUstream t = stream();
    GOOD(cuMemcpyPeerAsync(r, ctx[1], p, ctx[0], sizeof a, t));
    GOOD(cuMemcpyDtoHAsync_v2(b, r, sizeof a, t));
    GOOD(cuStreamSynchronize(t));
    IS(b[9], 63);
    IS(cuMemcpyPeerAsync(r, ctx[0], p, ctx[1], 4, t), 1);
    IS(cuMemcpyHtoDAsync_v2(r, (void *)(uintptr_t)p, 4, t), 1);
    GOOD(cuMemcpyDtoHAsync_v2(&b[1], r, 4, t));
    GOOD(cuCtxSynchronize());
    IS(b[1], 1);
}

/* ------------------------------------------------------------------------------------------------
 * modules and launches */

static void case_modules(void) {
    CUmodule m;
    CUfunction f;
    char log[200] = "?", broken[sizeof ptx];
    CUjit_option options[] = { 5, 6 };
    void *values[] = { log, (void *)sizeof log };
    setup(1);
    memcpy(broken, ptx, sizeof ptx);
    memcpy(strstr(broken, "mad.lo"), "mud.lo", 6);
    IS(cuModuleLoadDataEx(&m, broken, 2, options, values), 218);
    IS(strstr(log, "mud") != NULL && strstr(log, "line ") != NULL, 1);
    IS((size_t)values[1], strlen(log) + 1);
    IS(cuModuleLoadData(&m, "\177ELF\2\1\1"), 209);
    IS(cuModuleLoadData(&m, "hello"), 200);
    memcpy(broken, ptx, sizeof ptx);
    memcpy(strstr(broken, "sm_80"), "sm_90", 5);
    IS(cuModuleLoadData(&m, broken), 209);
    memcpy(broken, ptx, sizeof ptx);
    memcpy(strstr(broken, "7.4"), "8.5", 3);
    IS(cuModuleLoadData(&m, broken), 222); /* SIM_PTX=7.8 */
    IS(cuModuleGetFunction(&f, module[0], "nothing"), 500);
    GOOD(cuModuleUnload(module[0]));
    IS(cuModuleUnload(module[0]), 400);
    IS(do_fill(0, 0, 0, 1, NULL), 400);
}

static void case_launch(void) {
    unsigned v[200], value = 5, n = 200;
    int attr;
    setup(2);
    CUdeviceptr p = alloc(sizeof v);
    void *args[] = { &p, &value, &n };
    CUfunction f = fill[0];
    GOOD(do_fill(0, p, 1000, 200, NULL));
    GOOD(cuMemcpyDtoH_v2(v, p, sizeof v));
    for (unsigned i = 0; i < 200; i++) IS(v[i], 1000 + i);
    struct { CUdeviceptr p; unsigned value, n; } block = { p, 3, 200 };
    size_t size = sizeof block;
    void *extra[] = { (void *)1, &block, (void *)2, &size, NULL };
    GOOD(cuLaunchKernel(f, 4, 1, 1, 50, 1, 1, 0, NULL, NULL, extra));
    GOOD(cuMemcpyDtoH_v2(v, p, sizeof v));
    IS(v[199], 202);
    IS(cuLaunchKernel(f, 1, 1, 1, 32, 1, 1, 0, NULL, NULL, NULL), 1);
    IS(cuLaunchKernel(f, 1, 1, 1, 32, 1, 1, 0, NULL, args, extra), 1);
    IS(cuLaunchKernel(f, 0, 1, 1, 32, 1, 1, 0, NULL, args, NULL), 1);
    IS(cuLaunchKernel(f, 1, 65536, 1, 32, 1, 1, 0, NULL, args, NULL), 1);
    IS(cuLaunchKernel(f, 1, 1, 1, 1025, 1, 1, 0, NULL, args, NULL), 1);
    IS(cuLaunchKernel(f, 1, 1, 1, 1, 1, 65, 0, NULL, args, NULL), 1);
    IS(cuLaunchKernel(f, 1, 1, 1, 512, 4, 1, 0, NULL, args, NULL), 1);
    IS(cuLaunchKernel(f, 1, 1, 1, 32, 1, 1, 49153, NULL, args, NULL), 1);
    IS(cuFuncSetAttribute(f, 8, 101377), 1);
    GOOD(cuFuncSetAttribute(f, 8, 101376));
    GOOD(cuFuncGetAttribute(&attr, 8, f));
    IS(attr, 101376);
    GOOD(cuLaunchKernel(f, 1, 1, 1, 32, 1, 1, 101376, NULL, args, NULL));
    IS(cuLaunchKernel(f, 1, 1, 1, 32, 1, 1, 101377, NULL, args, NULL), 1);
    IS(cuLaunchKernel(fill[1], 1, 1, 1, 32, 1, 1, 0, NULL, args, NULL), 400);
    IS(cuLaunchKernel((CUfunction)ctx[0], 1, 1, 1, 32, 1, 1, 0, NULL, args, NULL), 400);
    GOOD(cuCtxSynchronize());
}

/* A fault stops its own context for good, and no other. */
static void case_sticky(void) {
    unsigned v;
    setup(2);
    CUdeviceptr p = alloc(256);
    CUstream s = stream();
    GOOD(do_fill(0, p + 4096 * 4096, 0, 64, s));
    GOOD(cuMemAlloc_v2(&p, 4)); /* not run yet */
    IS(cuStreamSynchronize(s), 700);
    IS(cuMemAlloc_v2(&p, 4), 700);
    IS(cuCtxSynchronize(), 700);
    IS(cuMemcpyDtoH_v2(&v, p, 4), 700);
    IS(cuStreamQuery(s), 700);
    GOOD(cuCtxSetCurrent(ctx[1]));
    p = alloc(256);
    GOOD(do_fill(1, p, 9, 64, NULL));
    GOOD(cuMemcpyDtoH_v2(&v, p, 4));
    IS(v, 9);
    GOOD(cuDevicePrimaryCtxReset_v2(0)); /* only a new context helps */
    GOOD(cuDevicePrimaryCtxRetain(&ctx[0], 0));
    GOOD(cuCtxSetCurrent(ctx[0]));
    GOOD(cuCtxSynchronize());
    IS(do_fill(0, p, 0, 64, NULL), 400);
}

/* ------------------------------------------------------------------------------------------------
 * order */

static void case_streams(void) {
    unsigned v[64], polls = 0;
    setup(1);
    CUdeviceptr p = alloc(256), q = alloc(256);
    CUstream s, t, bad_flags;
    IS(cuStreamCreate(&bad_flags, 2), 1);
    GOOD(cuStreamCreate(&s, 0));
    GOOD(cuStreamCreate(&t, 0));
    GOOD(do_fill(0, p, 1, 64, s));
    while (cuStreamQuery(s) == 600) polls++;
    GOOD(cuMemcpyDtoH_v2(v, p, 256));
    IS(v[63], 64);
    IS(polls <= 1, 1);
    /* blocking streams and the legacy stream wait for each other */
    GOOD(do_fill(0, p, 100, 64, s));
    GOOD(do_add1(0, q, p, 64, NULL));
    GOOD(do_add1(0, p, q, 64, t));
    GOOD(cuMemcpyDtoHAsync_v2(v, p, 256, t));
    GOOD(cuStreamSynchronize(t));
    IS(v[63], 165);
    GOOD(cuStreamDestroy_v2(s));
    IS(cuStreamSynchronize(s), 400);
    IS(cuStreamSynchronize((CUstream)2), 801);
}

static void case_events(void) {
    float ms = -1;
    setup(2);
    CUdeviceptr p = alloc(1 << 20);
    CUstream s = stream();
    CUevent a = event(), b = event(), c;
    GOOD(cuEventCreate(&c, 2));
    IS(cuEventCreate(&c, 64), 1);
    GOOD(cuEventQuery(a));
    GOOD(cuEventSynchronize(a));
    GOOD(cuStreamWaitEvent(s, a, 0));
    IS(cuEventElapsedTime(&ms, a, b), 400);
    GOOD(cuEventRecord(a, s));
    for (int i = 0; i < 10; i++) GOOD(do_fill(0, p, 0, 64, s));
    GOOD(cuEventRecord(b, s));
    GOOD(cuEventRecord(c, s));
    IS(cuEventElapsedTime(&ms, a, b), 600);
    GOOD(cuEventSynchronize(b));
    GOOD(cuEventElapsedTime(&ms, a, b));
    IS(ms * 1e4 + 0.5, 300); /* ten kernels of the least computed time, 3 us */
    IS(cuEventElapsedTime(&ms, a, c), 400);
    void *pinned;
    GOOD(cuMemHostAlloc(&pinned, 1 << 20, 0));
    GOOD(cuMemsetD8Async(p, 0, 1 << 20, s));
    GOOD(cuEventRecord(a, s));
    GOOD(cuMemcpyDtoHAsync_v2(pinned, p, 1 << 20, s));
    GOOD(cuEventRecord(b, s));
    GOOD(cuEventSynchronize(b));
    GOOD(cuEventElapsedTime_v2(&ms, a, b));
    IS(ms * 1e6 + 0.5, (1 << 20) / 25); /* ns at 25 GB/s */
    GOOD(cuCtxSetCurrent(ctx[1]));
    CUstream t = stream();
    IS(cuEventRecord(a, t), 400);
    GOOD(cuStreamWaitEvent(t, a, 0));
    GOOD(cuEventDestroy_v2(a));
    IS(cuEventQuery(a), 400);
}

/* Two devices hand a buffer over `rounds` times. Exit status 1: a wrong number arrived.
 * skip 1: the consumer does not wait for the producer; 2: the producer not for the consumer. */
static void hand_off(int skip) {
    enum { N = 64, ROUNDS = 5 };
    unsigned *out;
    CUdeviceptr box, mine, copy;
    setup(2);
    CUstream s = stream(), t;
    CUevent full = event(), empty;
    mine = alloc(4 * N);
    GOOD(cuCtxSetCurrent(ctx[1]));
    box = alloc(4 * N);
    copy = alloc(4 * N);
    t = stream();
    empty = event();
    GOOD(cuMemHostAlloc((void **)&out, 4 * N * ROUNDS, 0));
    for (int i = 0; i < ROUNDS; i++) {
        GOOD(cuCtxSetCurrent(ctx[0]));
        GOOD(do_fill(0, mine, 100u * (unsigned)i, N, s));
        if (skip != 2) GOOD(cuStreamWaitEvent(s, empty, 0));
        GOOD(cuMemcpyPeerAsync(box, ctx[1], mine, ctx[0], 4 * N, s));
        GOOD(cuEventRecord(full, s));
        GOOD(cuCtxSetCurrent(ctx[1]));
        if (skip != 1) GOOD(cuStreamWaitEvent(t, full, 0));
        GOOD(do_add1(1, copy, box, N, t));
        GOOD(cuMemcpyDtoHAsync_v2(out + N * i, copy, 4 * N, t));
        GOOD(cuEventRecord(empty, t));
    }
    CUresult r = cuStreamSynchronize(t);
    if (r) exit(1); /* the check for uninitialised reads was first */
    for (unsigned i = 0; i < N * ROUNDS; i++)
        if (out[i] != 100 * (i / N) + i % N + 1) exit(1);
}

static void case_hand_off(void) { hand_off(0); }
static void case_no_wait(void) { hand_off(1); }
static void case_no_back_wait(void) { hand_off(2); }

/* Random work on six streams of two devices, ordered by events, against the same work done at once
 * on the host. Every eighth operation of the loose form does not wait. */
typedef struct {
    CUdeviceptr p;
    unsigned host[64];
    int op[6]; /* last use by each stream */
} Buffer;
static bool loose;

static void use(Buffer *b, CUstream s, int stream_, CUevent *done, int op, bool writes) {
    for (int t = 0; t < 6; t++) {
        bool wait = b->op[t] >= 0 && t != stream_ && !(loose && op % 8 == 0);
        if (wait) GOOD(cuStreamWaitEvent(s, done[b->op[t]], 0));
        if (writes) b->op[t] = -1;
    }
    b->op[stream_] = op;
}

static void case_random(void) {
    enum { OPS = 150 };
    static Buffer buf[2][4];
    CUstream s[6];
    CUevent done[OPS];
    unsigned x = 12345, v[64];
    setup(2);
    for (int d = 0; d < 2; d++) {
        GOOD(cuCtxSetCurrent(ctx[d]));
        for (int i = 0; i < 3; i++) s[3 * d + i] = stream();
        for (int i = 0; i < 4; i++) {
            buf[d][i].p = alloc(256);
            GOOD(cuMemsetD32_v2(buf[d][i].p, 0, 64));
            memset(buf[d][i].op, -1, sizeof buf[d][i].op);
        }
        GOOD(cuCtxSynchronize());
    }
    for (int op = 0; op < OPS; op++) {
        x = x * 1664525 + 1013904223;
        unsigned k = x >> 8;
        int t = (int)(k % 6), d = t / 3;
        Buffer *dst = &buf[d][k / 6 % 4], *src = &buf[k / 96 % 3 ? d : !d][k / 24 % 4];
        GOOD(cuCtxSetCurrent(ctx[d]));
        done[op] = event();
        use(dst, s[t], t, done, op, true);
        if (k / 288 % 3 == 0) {
            GOOD(do_fill(d, dst->p, (unsigned)op, 64, s[t]));
            for (unsigned i = 0; i < 64; i++) dst->host[i] = (unsigned)op + i;
        } else {
            if (src != dst) use(src, s[t], t, done, op, false);
            if (src >= buf[!d] && src < buf[!d] + 4)
                GOOD(cuMemcpyPeerAsync(dst->p, ctx[d], src->p, ctx[!d], 256, s[t]));
            else
                GOOD(do_add1(d, dst->p, src->p, 64, s[t]));
            for (int i = 0; i < 64; i++) dst->host[i] = src->host[i] + (src >= buf[d] &&
                                                                        src < buf[d] + 4);
        }
        GOOD(cuEventRecord(done[op], s[t]));
        if (k / 864 % 16 == 0) GOOD(cuStreamSynchronize(s[k / 13824 % 6]));
        if (k / 864 % 16 == 1) cuEventQuery(done[k / 13824 % (unsigned)(op + 1)]);
    }
    for (int d = 0; d < 2; d++) {
        GOOD(cuCtxSetCurrent(ctx[d]));
        GOOD(cuCtxSynchronize());
        for (int i = 0; i < 4; i++) {
            GOOD(cuMemcpyDtoH_v2(v, buf[d][i].p, 256));
            IS(memcmp(v, buf[d][i].host, 256), 0);
        }
    }
}

static void case_loose(void) {
    loose = true;
    case_random();
}

/* ------------------------------------------------------------------------------------------------
 * graphs */

static void case_graph(void) {
    unsigned v[64];
    CUgraph g, h;
    CUgraphExec e;
    setup(1);
    CUdeviceptr p = alloc(256), q = alloc(256), r = alloc(256);
    CUstream s = stream(), t = stream();
    CUevent fork = event(), join = event();
    GOOD(cuMemsetD32Async(p, 10, 64, s));
    for (int round = 0; round < 2; round++) {
        GOOD(cuStreamBeginCapture_v2(s, 1));
        GOOD(do_add1(0, p, p, 64, s));
        GOOD(cuEventRecord(fork, s));
        GOOD(cuStreamWaitEvent(t, fork, 0));
        GOOD(do_add1(0, q, p, 64, t));
        GOOD(do_add1(0, r, p, round ? 32 : 64, s));
        GOOD(cuEventRecord(join, t));
        GOOD(cuStreamWaitEvent(s, join, 0));
        GOOD(do_add1(0, q, q, 64, s));
        GOOD(cuStreamEndCapture(s, round ? &h : &g));
    }
    GOOD(cuGraphInstantiateWithFlags(&e, g, 0));
    for (int i = 0; i < 3; i++) GOOD(cuGraphLaunch(e, s));
    GOOD(cuStreamSynchronize(s));
    GOOD(cuMemcpyDtoH_v2(v, q, 256));
    IS(v[5], 15);
    GOOD(cuMemcpyDtoH_v2(v, r, 256));
    IS(v[63], 14);
    GOOD(cuGraphDestroy(g)); /* what was made from it stays */
    GOOD(cuGraphLaunch(e, s));
    GOOD(cuGraphExecDestroy(e));
    GOOD(cuGraphInstantiateWithFlags(&e, h, 0));
    GOOD(cuGraphLaunch(e, s));
    GOOD(cuStreamSynchronize(s));
    GOOD(cuMemcpyDtoH_v2(v, r, 256));
    IS(v[31], 16);
    IS(v[32], 15); /* the other graph's smaller n */
    GOOD(cuGraphDestroy(h));
    IS(cuGraphDestroy(h), 1);
}

/* What spoils a capture, and with which error. */
static void case_capture(void) {
    CUgraph g;
    CUstream s, t, u;
    CUdeviceptr p, q;
    char pageable[256];
    setup(1);
    p = alloc(256);
    GOOD(cuStreamCreate(&s, 0));
    t = stream();
    u = stream();
    CUevent e = event(), outside = event();
    IS(cuStreamBeginCapture_v2(NULL, 0), 900);
    IS(cuStreamEndCapture(s, &g), 401);
    GOOD(do_fill(0, p, 0, 64, t));
    GOOD(cuEventRecord(outside, t));
    for (int i = 0; i < 10; i++) {
        GOOD(cuStreamBeginCapture_v2(s, i == 9 ? 2 : 0));
        GOOD(do_fill(0, p, 0, 64, s));
        GOOD(cuEventRecord(e, s));
        if (i == 0) IS(cuStreamSynchronize(s), 900);
        if (i == 1) IS(cuMemAlloc_v2(&q, 4), 900);
        if (i == 2) IS(do_fill(0, p, 0, 64, NULL), 906);
        if (i == 3) IS(cuEventQuery(e), 907);
        if (i == 4) IS(cuStreamWaitEvent(s, outside, 0), 905);
        if (i == 5) IS(cuMemcpyHtoDAsync_v2(p, pageable, 256, s), 900);
        if (i == 6) {
            GOOD(cuStreamWaitEvent(t, e, 0));
            IS(cuStreamEndCapture(t, &g), 903);
        }
        if (i == 7) {
            GOOD(cuStreamBeginCapture_v2(u, 2));
            IS(cuStreamWaitEvent(u, e, 0), 902);
            IS(cuStreamEndCapture(u, &g), 901);
        }
        if (i == 8) IS(cuCtxSynchronize(), 900);
        if (i == 9) { /* relaxed, and a branch that does not come back */
            GOOD(cuMemAlloc_v2(&q, 4));
            GOOD(cuStreamWaitEvent(t, e, 0));
            GOOD(do_fill(0, p, 0, 64, t));
            IS(cuStreamEndCapture(s, &g), 904);
        } else {
            IS(do_fill(0, p, 0, 64, s), 901);
            IS(cuStreamEndCapture(s, &g), 901);
        }
        IS(g == NULL, 1);
        IS(cuStreamEndCapture(s, &g), 401);
    }
    IS(cuEventQuery(e), 907);
    GOOD(cuCtxSynchronize());
}

/* ------------------------------------------------------------------------------------------------
 * injected faults */

static void case_fault_call(void) {
    CUdeviceptr p;
    setup(1);
    alloc(4);
    alloc(4);
    IS(cuMemAlloc_v2(&p, 4), 2);
    alloc(4);
}

static void case_fault_launch(void) {
    setup(1);
    CUdeviceptr p = alloc(256);
    GOOD(do_fill(0, p, 0, 64, NULL));
    GOOD(cuCtxSynchronize());
    GOOD(do_fill(0, p, 0, 64, NULL));
    IS(cuCtxSynchronize(), 719);
    IS(cuMemFree_v2(p), 719);
}

static void case_fault_lost(void) {
    setup(2);
    CUdeviceptr p = alloc(256);
    GOOD(do_fill(0, p, 0, 64, NULL));
    GOOD(cuCtxSynchronize());
    GOOD(cuCtxSetCurrent(ctx[1]));
    p = alloc(256);
    GOOD(do_fill(1, p, 0, 64, NULL));
    GOOD(do_fill(1, p, 0, 64, NULL));
    IS(cuCtxSynchronize(), 999);
}

static void case_fault_memory(void) {
    CUdeviceptr p;
    setup(1);
    alloc(1000);
    IS(cuMemAlloc_v2(&p, 25), 2);
    IS(cuMemAlloc_v2(&p, 1), 2);
    setup(2);
    GOOD(cuCtxSetCurrent(ctx[1]));
    alloc(1000);
}

/* ------------------------------------------------------------------------------------------------
 * two host threads, one per device, and the report */

typedef struct { int device, rounds; CUstream stream; CUevent done[64]; CUdeviceptr buffer; } Stage;
static Stage stages[2];
static pthread_barrier_t gate;

static void *run_stage(void *arg) {
    Stage *s = arg;
    int d = s->device;
    GOOD(cuCtxSetCurrent(ctx[d]));
    for (int i = 0; i < s->rounds; i++) {
        pthread_barrier_wait(&gate); /* the other stage's event of the last round is recorded */
        if (i) GOOD(cuStreamWaitEvent(s->stream, stages[!d].done[i - 1], 0));
        if ((i & 1) == d) {
            CUdeviceptr other = stages[!d].buffer;
            if (i) GOOD(cuMemcpyPeerAsync(s->buffer, ctx[d], other, ctx[!d], 256, s->stream));
            GOOD(do_add1(d, s->buffer, s->buffer, 64, s->stream));
        }
        GOOD(cuEventRecord(s->done[i], s->stream));
        if (i % 10 == 9) GOOD(cuEventSynchronize(s->done[i]));
    }
    GOOD(cuStreamSynchronize(s->stream));
    return NULL;
}

static void case_threads(void) {
    unsigned v[64];
    pthread_t t[2];
    setup(2);
    pthread_barrier_init(&gate, NULL, 2);
    for (int d = 0; d < 2; d++) {
        GOOD(cuCtxSetCurrent(ctx[d]));
        stages[d] = (Stage){ .device = d, .rounds = 50, .stream = stream(), .buffer = alloc(256) };
        for (int i = 0; i < 50; i++) stages[d].done[i] = event();
        GOOD(cuMemsetD32_v2(stages[d].buffer, 7, 64));
        GOOD(cuCtxSynchronize());
    }
    for (int d = 0; d < 2; d++) pthread_create(&t[d], NULL, run_stage, &stages[d]);
    for (int d = 0; d < 2; d++) pthread_join(t[d], NULL);
    GOOD(cuMemcpyDtoH_v2(v, stages[1].buffer, 256));
    for (int i = 0; i < 64; i++) IS(v[i], 57);
}

static char report[1 << 16]; /* as written to the file */

static void read_report(void) {
    GOOD(sim_write_report("build/sim/test_report.json"));
    FILE *f = fopen("build/sim/test_report.json", "r");
    if (!f) return;
    report[fread(report, 1, sizeof report - 1, f)] = 0;
    fclose(f);
}

/* The file has the closed-form numbers of what ran. */
static void case_report(void) {
    char want[128];
    void *pinned;
    setup(2);
    CUdeviceptr p = alloc(4096), q = alloc(4096);
    GOOD(do_fill(0, p, 0, 1024, NULL));
    GOOD(do_add1(0, q, p, 1024, NULL));
    GOOD(do_add1(0, q, p, 1024, NULL));
    GOOD(cuCtxSynchronize());
    read_report();
    char *k = strstr(report, "\"add1\": {");
    IS(k != NULL, 1);
    if (!k) return;
    IS(strstr(k, "\"launches\": 2,") != NULL, 1);
    IS(strstr(k, "\"threads\": 2048,") != NULL, 1);
    IS(strstr(k, "\"unique_load_bytes\": 8192,") != NULL, 1);
    IS(strstr(k, "\"unique_store_bytes\": 8192,") != NULL, 1);
    IS(strstr(k, "\"4\": {\"warp\": 64, \"lane\": 2048, \"bytes\": 8192, \"sectors\": 256}")
       != NULL, 1);
    IS(strstr(k, "\"RTX 3090\": {\"total\": 6.000000") != NULL, 1);
    IS(strstr(report, "computed, not measured") != NULL, 1);
    IS(strstr(report, "\"hops\": 0,") != NULL, 1);
    /* 16 MB stored: bound by 0.85 of the card's bandwidth */
    sim_reset_counters();
    GOOD(do_fill(0, alloc(1 << 24), 0, 1 << 22, NULL));
    GOOD(cuCtxSynchronize());
    read_report();
    snprintf(want, sizeof want, "\"RTX A5000\": {\"total\": %.6f, \"bound_by_dram\": %.6f",
             (1 << 24) / (0.85 * 768e3), (1 << 24) / (0.85 * 768e3));
    IS(strstr(report, want) != NULL, 1);
    IS(strstr(report, "\"add1\"") == NULL, 1);
    /* a hop by event and one through pinned memory */
    CUevent e = event();
    GOOD(cuMemHostAlloc(&pinned, 4096, 1));
    GOOD(cuMemcpyDtoHAsync_v2(pinned, p, 4096, NULL));
    GOOD(cuEventRecord(e, NULL));
    GOOD(cuCtxSetCurrent(ctx[1]));
    GOOD(cuStreamWaitEvent(NULL, e, 0));
    GOOD(cuMemcpyHtoD_v2(alloc(4096), pinned, 4096));
    read_report();
    IS(strstr(report, "\"hops\": 2,") != NULL, 1);
    IS(sim_findings(), 0);
}

/* ------------------------------------------------------------------------------------------------
 * the cases */

static const struct {
    const char *name, *env; /* settings, separated by blanks */
    void (*run)(void);
    int seeds;              /* 0: one run; n: right with each of n seeds; -n: wrong with some */
} cases[] = {
    { "init", "SIM_DEVICES=3 SIM_NAME=Test_card SIM_CC=8.9 SIM_MEM=1M,3M SIM_DRIVER=12040 "
      "SIM_PEER=1", case_init, 0 },
    { "none", "SIM_DEVICES=0", case_none, 0 },
    { "contexts", "SIM_DEVICES=2", case_contexts, 0 },
    { "errors", "", case_errors, 0 },
    { "getproc", "", case_getproc, 0 },
    { "memory", "SIM_MEM=1M", case_memory, 0 },
    { "copies", "SIM_DEVICES=2", case_copies, 0 },
    { "modules", "SIM_PTX=7.8", case_modules, 0 },
    { "launch", "SIM_DEVICES=2", case_launch, 0 },
    { "sticky", "SIM_DEVICES=2", case_sticky, 0 },
    { "streams", "", case_streams, 8 },
    { "events", "SIM_DEVICES=2", case_events, 0 },
    { "hand_off", "SIM_DEVICES=2", case_hand_off, 16 },
    { "no_wait", "SIM_DEVICES=2", case_no_wait, -4 },
    { "no_wait, values only", "SIM_DEVICES=2 SIM_CHECK_INIT=0", case_no_wait, -4 },
    { "no_back_wait", "SIM_DEVICES=2", case_no_back_wait, -4 },
    { "random", "SIM_DEVICES=2", case_random, 16 },
    { "random, loose", "SIM_DEVICES=2 SIM_CHECK_INIT=0", case_loose, -4 },
    { "graph", "", case_graph, 8 },
    { "capture", "", case_capture, 0 },
    { "fault_call", "SIM_FAULT=cuMemAlloc_v2:3=2", case_fault_call, 0 },
    { "fault_launch", "SIM_FAULT=launch:2=719", case_fault_launch, 0 },
    { "fault_lost", "SIM_DEVICES=2 SIM_FAULT=lost:1:2", case_fault_lost, 0 },
    { "fault_memory", "SIM_DEVICES=2 SIM_FAULT=oom:0:1K", case_fault_memory, 0 },
    { "threads", "SIM_DEVICES=2", case_threads, 8 },
    { "report", "SIM_DEVICES=2", case_report, 0 },
};

/* Runs case i in a new process with its settings; true if it exits with 0. */
static bool spawn(char *self_, int i, int seed, bool quiet) {
    fflush(NULL);
    pid_t pid = fork();
    if (!pid) {
        char *list = strdup(cases[i].env), *item, number[16];
        while ((item = strsep(&list, " "))) {
            char *value = strchr(item, '=');
            if (!value) continue;
            *value++ = 0;
            for (char *c = value; *c; c++) *c = *c == '_' && !strcmp(item, "SIM_NAME") ? ' ' : *c;
            setenv(item, value, 1);
        }
        snprintf(number, sizeof number, "%d", seed);
        setenv("SIM_SEED", number, 1);
        if (quiet && !freopen("/dev/null", "w", stderr)) _exit(3);
        snprintf(number, sizeof number, "%d", i);
        alarm(300);
        execl("/proc/self/exe", self_, number, (char *)NULL);
        _exit(3);
    }
    int status = 0;
    if (waitpid(pid, &status, 0) != pid) return false;
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

int main(int argc, char **argv) {
    int passed = 0, n = (int)(sizeof cases / sizeof *cases);
    for (int i = 0; argc > 1 && i < n; i++) { /* one case, by name or number, as it is */
        if (strcmp(argv[1], cases[i].name) && (!isdigit(*argv[1]) || atoi(argv[1]) != i)) continue;
        cases[i].run();
        return bad != 0;
    }
    for (int i = 0; i < n; i++) {
        int seeds = abs(cases[i].seeds), right = 0, runs = seeds ? seeds : 1;
        for (int seed = 0; seed < runs; seed++)
            right += spawn(argv[0], i, seed, cases[i].seeds < 0);
        bool ok = cases[i].seeds < 0 ? right < runs : right == runs;
        printf("%s api %s", ok ? "ok  " : "FAIL", cases[i].name);
        if (seeds) printf(" (right with %d of %d seeds)", right, runs);
        putchar('\n');
        passed += ok;
    }
    printf("%d passed, %d failed\n", passed, n - passed);
    return passed != n;
}
