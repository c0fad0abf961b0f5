/* test_ptx_cuda.c: CUDA C programs, compiled by NVRTC where there is one, against plain C: a
 * quantised matrix-vector product, a norm, a tensor-core product with asynchronous copies, the
 * mathematical functions, a histogram and scan. Each with several seeds. */
#include "sim.h"

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static const char source[] =
    "typedef unsigned int u32; typedef unsigned short u16;\n"
    "__device__ float warp_sum(float s) {\n"
    "  for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o); return s; }\n"
    "extern \"C\" __global__ void gemv(float *y, const int4 *w, const float *ws, const int4 *x,\n"
    "                                const float *xs, int K) {\n"
    "  int row = blockIdx.x * blockDim.y + threadIdx.y, lane = threadIdx.x; float s = 0;\n"
    "  for (int k = lane; k < K / 16; k += 32) {\n"
    "    int4 a = w[(size_t)row * (K / 16) + k], b = x[k];\n"
    "    int d = __dp4a(a.x, b.x, __dp4a(a.y, b.y, __dp4a(a.z, b.z, __dp4a(a.w, b.w, 0))));\n"
    "    s += d * (ws[row * (K / 32) + k / 2] * xs[k / 2]); }\n"
    "  s = warp_sum(s); if (!lane) y[row] = s; }\n"
    "extern \"C\" __global__ void rms_norm(float *y, const float *x, const float *g, int n) {\n"
    "  __shared__ float part[32]; float s = 0; int t = threadIdx.x;\n"
    "  x += (size_t)blockIdx.x * n; y += (size_t)blockIdx.x * n;\n"
    "  for (int i = t; i < n; i += blockDim.x) s += x[i] * x[i];\n"
    "  s = warp_sum(s); if (t % 32 == 0) part[t / 32] = s; __syncthreads();\n"
    "  s = 0; for (int i = 0; i < blockDim.x / 32; i++) s += part[i]; s = rsqrtf(s / n + 1e-6f);\n"
    "  for (int i = t; i < n; i += blockDim.x) y[i] = x[i] * s * g[i]; }\n"
    "__device__ void copy16(u16 *s, const u16 *g, bool real) {\n"
    "  asm volatile(\"cp.async.cg.shared.global [%0], [%1], 16, %2;\" ::\n"
    "    \"r\"((u32)__cvta_generic_to_shared(s)), \"l\"(g), \"r\"(real ? 16 : 0)); }\n"
    "extern \"C\" __global__ void gemm(float *C, const u16 *A, const u16 *B, int M, int N,\n"
    "                                int K) {\n"
    "  __shared__ __align__(16) u16 a[2][64][40], b[2][64][40];\n"
    "  int t = threadIdx.x, warp = t / 32, lane = t % 32;\n"
    "  int m0 = blockIdx.y * 64, n0 = blockIdx.x * 64;\n"
    "  float acc[8][4] = {};\n"
    "  auto load = [&](int s, int k0) {\n"
    "    for (int c = t; c < 256; c += 128) { int r = c / 4, q = c % 4 * 8;\n"
    "      copy16(&a[s][r][q], A + (size_t)min(m0 + r, M - 1) * K + k0 + q, m0 + r < M);\n"
    "      copy16(&b[s][r][q], B + (size_t)min(n0 + r, N - 1) * K + k0 + q, n0 + r < N); }\n"
    "    asm volatile(\"cp.async.commit_group;\"); };\n"
    "  load(0, 0);\n"
    "  for (int k0 = 0, s = 0; k0 < K; k0 += 32, s ^= 1) {\n"
    "    if (k0 + 32 < K) { load(s ^ 1, k0 + 32); asm volatile(\"cp.async.wait_group 1;\"); }\n"
    "    else asm volatile(\"cp.async.wait_group 0;\");\n"
    "    __syncthreads();\n"
    "    for (int kk = 0; kk < 32; kk += 16) { u32 f[4], h[2];\n"
    "      asm volatile(\"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\"\n"
    "        : \"=r\"(f[0]), \"=r\"(f[1]), \"=r\"(f[2]), \"=r\"(f[3]) : \"r\"((u32)\n"
    "        __cvta_generic_to_shared(&a[s][warp * 16 + (lane & 15)][kk + (lane >> 4) * 8])));\n"
    "      for (int j = 0; j < 8; j++) {\n"
    "        asm volatile(\"ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];\"\n"
    "          : \"=r\"(h[0]), \"=r\"(h[1]) : \"r\"((u32)\n"
    "          __cvta_generic_to_shared(&b[s][j * 8 + (lane & 7)][kk + (lane >> 3 & 1) * 8])));\n"
    "        asm volatile(\"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, \"\n"
    "          \"{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\" : \"+f\"(acc[j][0]), \"+f\"(acc[j][1]),\n"
    "          \"+f\"(acc[j][2]), \"+f\"(acc[j][3]) : \"r\"(f[0]), \"r\"(f[1]), \"r\"(f[2]),\n"
    "          \"r\"(f[3]), \"r\"(h[0]), \"r\"(h[1])); } }\n"
    "    __syncthreads(); }\n"
    "  for (int j = 0; j < 8; j++) for (int e = 0; e < 4; e++) {\n"
    "    int m = m0 + warp * 16 + lane / 4 + 8 * (e / 2);\n"
    "    int n = n0 + j * 8 + lane % 4 * 2 + (e & 1);\n"
    "    if (m < M && n < N) C[(size_t)m * N + n] = acc[j][e]; } }\n"
    "__device__ float series(float x, int n) {\n"
    "  float c[8]; for (int i = 0; i < 8; i++) c[i] = x + i; return c[n & 7] * n; }\n"
    "extern \"C\" __global__ void maths(float *y, const float *x, int n) {\n"
    "  int i = blockIdx.x * blockDim.x + threadIdx.x; float v = x[i]; if (i >= n) return;\n"
    "  y += i * 16; y[0] = expf(v); y[1] = logf(fabsf(v) + 1); y[2] = sinf(v * 1000);\n"
    "  y[3] = powf(fabsf(v), 1.7f); y[4] = tanhf(v); y[5] = v / 3.7f; y[6] = sqrtf(fabsf(v));\n"
    "  y[7] = erff(v); y[8] = (float)exp((double)v); y[9] = series(v, i); y[10] = fmodf(v, 0.3f);\n"
    "  y[11] = (float)((long long)(v * 1e6f) / 7 % 1000); y[12] = rintf(v * 10); y[13] = cosf(v);\n"
    "  y[14] = log1pf(fabsf(v)); y[15] = v > 0 ? floorf(v) : ceilf(v); }\n"
    "extern \"C\" __global__ void buckets(u32 *first, const u32 *x, int n) {\n"
    "  __shared__ u32 count[256], sum[256]; int t = threadIdx.x; count[t] = 0; __syncthreads();\n"
    "  for (int i = t; i < n; i += 256) atomicAdd(&count[x[i] & 255], 1u); __syncthreads();\n"
    "  sum[t] = count[t]; __syncthreads();\n"
    "  for (int o = 1; o < 256; o *= 2) { u32 v = t >= o ? sum[t - o] : 0; __syncthreads();\n"
    "    sum[t] += v; __syncthreads(); }\n"
    "  first[t] = sum[t] - count[t]; }\n";

static SimModule *module;
static char problem[1000];
static int passed, failed;

static void sink(void *user, const SimFinding *f) {
    (void)user;
    sim_finding_text(f, problem, sizeof problem);
}

static void *nvrtc(void) {
    const char *names[] = {getenv("DSV4_NVRTC"), "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so",
                           "/usr/local/cuda/lib64/libnvrtc.so"};
    void *lib = NULL;
    for (size_t k = 0; k < sizeof names / sizeof *names && !lib; k++)
        lib = names[k] ? dlopen(names[k], RTLD_NOW) : NULL;
    return lib;
}

/* NULL if anything fails; the log goes to stdout. */
static char *compile(void *lib, const char *option) {
    int (*create)(void **, const char *, const char *, int, const char *const *,
                  const char *const *) = dlsym(lib, "nvrtcCreateProgram");
    int (*run)(void *, int, const char *const *) = dlsym(lib, "nvrtcCompileProgram");
    int (*size)(void *, size_t *) = dlsym(lib, "nvrtcGetPTXSize");
    int (*get)(void *, char *) = dlsym(lib, "nvrtcGetPTX");
    int (*log)(void *, char *) = dlsym(lib, "nvrtcGetProgramLog");
    const char *options[] = {"--gpu-architecture=compute_86", "-lineinfo", option};
    static char text[100000];
    void *p;
    size_t n;
    if (!create || !run || !size || !get || create(&p, source, "t.cu", 0, NULL, NULL)) return NULL;
    if (run(p, 3, options)) {
        if (log && !log(p, text)) puts(text);
        return NULL;
    }
    if (size(p, &n)) return NULL;
    char *ptx = malloc(n + 1);
    return ptx && !get(p, ptx) ? ptx : NULL;
}

static uint64_t device(const void *from, size_t bytes) {
    uint64_t a = 0;
    sim_mem_alloc(0, bytes, &a);
    if (from) {
        memcpy(sim_mem_ptr(a), from, bytes);
        sim_mem_mark(a, bytes, true);
    }
    return a;
}

static bool launch(const char *name, unsigned gx, unsigned gy, unsigned bx, unsigned by,
                   const void *params) {
    SimCounters c = {0};
    struct timespec t0, t1;
    SimLaunch l = {sim_module_find(module, name), {gx, gy, 1}, {bx, by, 1}, 0, params};
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t0);
    int error = sim_launch(&l, &c);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t1);
    double s = (double)(t1.tv_sec - t0.tv_sec) + (double)(t1.tv_nsec - t0.tv_nsec) * 1e-9;
    printf("%s: %.0f M lane-instructions a second of CPU time\n", name,
           (double)sim_class_sum(c.lane) / s * 1e-6);
    return !error;
}

static void check(const char *name, bool ran, double error, double limit) {
    bool ok = ran && error <= limit;
    passed += ok;
    failed += !ok;
    printf("%s%s: error %g of %g %s\n", ok ? "" : "FAIL ", name, error, limit, problem);
    problem[0] = 0;
}

static double worse(double e, double got, double want) {
    double d = fabs(got - want) / (1 + fabs(want));
    return d <= e ? e : d == d ? d : INFINITY;
}

static void test_gemv(void) {
    enum { R = 256, K = 2048 };
    static int8_t w[R * K], x[K];
    static float ws[R * K / 32], xs[K / 32];
    double e = 0;
    for (int i = 0; i < R * K; i++) w[i] = (int8_t)rand();
    for (int i = 0; i < K; i++) x[i] = (int8_t)rand();
    for (int i = 0; i < R * K / 32; i++) ws[i] = (float)(rand() % 100) * 1e-4f;
    for (int i = 0; i < K / 32; i++) xs[i] = (float)(rand() % 100) * 1e-2f;
    struct {
        uint64_t y, w, ws, x, xs;
        int k;
    } p = {device(NULL, R * 4), device(w, sizeof w), device(ws, sizeof ws), device(x, sizeof x),
           device(xs, sizeof xs), K};
    bool ran = launch("gemv", R / 4, 1, 32, 4, &p);
    const float *y = sim_mem_ptr(p.y);
    for (int r = 0; r < R; r++) {
        double s = 0, size = 0, term;
        for (int i = 0; i < K; i++) {
            term = (double)(w[r * K + i] * x[i]) * (double)ws[(r * K + i) / 32];
            term *= (double)xs[i / 32];
            s += term;
            size += fabs(term);
        }
        e = worse(e, (double)y[r] / size, s / size);
    }
    check("gemv", ran, e, 3e-7);
}

static void test_norm(void) {
    enum { T = 8, N = 1000 };
    static float x[T * N], g[N];
    double e = 0;
    for (int i = 0; i < T * N; i++) x[i] = (float)(rand() % 1000) * 0.01f - 5;
    for (int i = 0; i < N; i++) g[i] = (float)(rand() % 100) * 0.01f;
    struct {
        uint64_t y, x, g;
        int n;
    } p = {device(NULL, sizeof x), device(x, sizeof x), device(g, sizeof g), N};
    bool ran = launch("rms_norm", T, 1, 128, 1, &p);
    const float *y = sim_mem_ptr(p.y);
    for (int t = 0; t < T; t++) {
        double s = 0;
        for (int i = 0; i < N; i++) s += (double)x[t * N + i] * (double)x[t * N + i];
        for (int i = 0; i < N; i++)
            e = worse(e, (double)y[t * N + i],
                      (double)x[t * N + i] * (double)g[i] / sqrt(s / N + 1e-6));
    }
    check("rms_norm", ran, e, 1e-6);
}

static float bf16(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static void test_gemm(void) {
    enum { M = 100, N = 72, K = 256 };
    static uint16_t a[M * K], b[N * K];
    double e = 0;
    for (int i = 0; i < M * K; i++) a[i] = (uint16_t)(0x3f00 + rand() % 256 + (rand() & 1) * 32768);
    for (int i = 0; i < N * K; i++) b[i] = (uint16_t)(0x3f00 + rand() % 256 + (rand() & 1) * 32768);
    struct {
        uint64_t c, a, b;
        int m, n, k;
    } p = {device(NULL, M * N * 4), device(a, sizeof a), device(b, sizeof b), M, N, K};
    bool ran = launch("gemm", 2, 2, 128, 1, &p);
    const float *c = sim_mem_ptr(p.c);
    for (int i = 0; i < M * N; i++) {
        double s = 0;
        for (int k = 0; k < K; k++)
            s += (double)bf16(a[i / N * K + k]) * (double)bf16(b[i % N * K + k]);
        e = worse(e, (double)c[i], s);
    }
    check("gemm", ran, e, 1e-5);
}

static void test_maths(void) {
    enum { N = 2048 };
    static float x[N];
    double e = 0;
    for (int i = 0; i < N; i++) x[i] = (float)(rand() % 20000 - 10000) * 3.7e-4f;
    struct {
        uint64_t y, x;
        int n;
    } p = {device(NULL, N * 64), device(x, sizeof x), N};
    bool ran = launch("maths", N / 128, 1, 128, 1, &p);
    const float *y = sim_mem_ptr(p.y);
    for (int i = 0; i < N; i++, y += 16) {
        double v = (double)x[i];
        double want[16] = {exp(v), log(fabs(v) + 1), sin((double)(x[i] * 1000)), pow(fabs(v), 1.7),
                           tanh(v), v / 3.7, sqrt(fabs(v)), erf(v), exp(v),
                           (v + (i & 7)) * i, fmod(v, (double)0.3f),
                           (double)((long long)(x[i] * 1e6f) / 7 % 1000), rint((double)(x[i] * 10)),
                           cos(v), log1p(fabs(v)), v > 0 ? floor(v) : ceil(v)};
        for (int k = 0; k < 16; k++) e = worse(e, (double)y[k], want[k]);
    }
    check("maths", ran, e, 3e-6);
}

static void test_buckets(void) {
    enum { N = 5000 };
    static uint32_t x[N], count[257];
    double e = 0;
    memset(count, 0, sizeof count);
    for (int i = 0; i < N; i++) {
        x[i] = (uint32_t)rand();
        count[(x[i] & 255) + 1]++;
    }
    struct {
        uint64_t first, x;
        int n;
    } p = {device(NULL, 1024), device(x, sizeof x), N};
    bool ran = launch("buckets", 1, 1, 256, 1, &p);
    const uint32_t *first = sim_mem_ptr(p.first);
    uint32_t s = 0;
    for (int k = 0; k < 256; k++) {
        s += count[k];
        e += first[k] != s;
    }
    check("buckets", ran, e, 0);
}

int main(void) {
    void *lib = nvrtc();
    char log[400];
    if (!lib) {
        printf("no NVRTC: skipped\n0 passed, 0 failed\n");
        return 0;
    }
    sim_set_sink(sink, NULL);
    for (int k = 0; k < 4; k++) {
        char *ptx = compile(lib, k & 1 ? "--use_fast_math" : "-fmad=false");
        sim_options.seed = (uint64_t)k;
        sim_options.threads = 1 + k / 2;
        if (!ptx || sim_module_load(0, ptx, strlen(ptx), &module, log, sizeof log)) {
            printf("FAIL %s\n0 passed, 1 failed\n", ptx ? log : "NVRTC");
            return 1;
        }
        test_gemv();
        test_norm();
        test_gemm();
        if (!(k & 1)) test_maths(); /* fast sin and pow are not meant to be this exact */
        test_buckets();
        sim_module_unload(module);
        free(ptx);
        sim_mem_reset(0);
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
