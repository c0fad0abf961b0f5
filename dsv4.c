// dsv4: DeepSeek-V4-Flash from its published checkpoints, on CPUs and on NVIDIA GPUs, in one C file.
//
//     cc -O3 -std=gnu11 -ffp-contract=off -pthread -o dsv4 dsv4.c apps/*.c -ldl -lm      (or: make)
//     ./dsv4 -m MODEL_DIR -p "prompt"
//
// The file reads from top to bottom; nothing is used before it is shown but what apps/dsv4.h lists:
// small tools, mapped files, signals, JSON, config.json, safetensors, tokenizer, chat encoding and
// sampler (all in apps/).
//     types            Mat, Layer, Weights, Cache: every field with its shape
//     products         thread pool, number formats, matrix products (INT4, INT8, FP4, FP8, BF16, FP32)
//     weights          the table of tensors
//     devices          the list of operations that a device must offer
//     forward          these operations on the CPU: the model's specification in code
//     CUDA             the same operations as launches of kernels.cu; the self-test against the CPU
//     command line     the option table
//     model            the forward pass over stages of layers, sessions, snapshots, placement
//     main             the programs are in apps/: terminal.c answers prompts, info.c, bench.c, ...
// Sections in brackets, like (4.3), point into the model's description: 2 hyper-connections, 3 rope,
// 4 attention, 5 compressor, 6 indexer, 7 mixture of experts, 8 weight formats, 10 MTP.

#define _GNU_SOURCE
#include <errno.h>
#include <float.h>
#include <limits.h>
#include <linux/futex.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#if defined __x86_64__
#include <immintrin.h>
#endif
#include "apps/cuda.h"

// ---------------------------------------------------------------------------
// types. Letters used in every shape: T rows (tokens) of a batch, D model dim, S hyper-connection
// streams, H heads, K head dim, R rope dims, Q q_lora_rank, G o_groups, L o_lora_rank, E experts, A
// active experts, F expert hidden dim, V vocabulary, I index heads, J index dim, M compress ratio

typedef uint16_t bf16;      // the upper half of a float32

typedef enum { W_F32, W_BF16, W_INT8, W_INT4, W_FP8, W_FP4 } Format;
const char *const format_names[N_FORMATS] = {
    "F32", "BF16", "INT8 128x128", "INT4 group 32", "FP8 e4m3 128x128", "FP4 e2m1 group 32"
};

// A matrix [n, k] in the checkpoint's own layout, y = W x. May lie at any byte address.
//   F32, BF16   w [n, k]
//   INT8, FP8   w [n, k] bytes,  s [ceil(n/128), ceil(k/128)] BF16 / E8M0
//   INT4, FP4   w [n, k/2] bytes (low nibble = even column), s [n, k/32] BF16 / E8M0
struct Mat {
    const void *w, *s;
    int n, k;
    Format fmt;
};

// Rows of activations: FP32 always, and (fast path) as INT8 in groups of 32 along k, last group
// short. Row t: x + t*ld, q + t*ldq (ldq = 32 * groups, zero padded), s + t*lds (lds = groups of
// one row).
typedef struct {
    float *x;       // [T, k]
    int8_t *q;      // [T, groups, 32]
    float *s;       // [T, groups] scale = absmax / 127
    // groups = ceil(k / 32); several segments (o_groups) are each padded on their own
    int k, groups;
    size_t ld, ldq, lds;
} Act;

// One hyper-connection: how the S streams are mixed into a sublayer's input, and its output back.
typedef struct {
    Mat fn;         // [(2+S)*S, S*D]   (hc_head: [S, S*D])
    float *base;    // [(2+S)*S]        (hc_head: [S])
    float *scale;   // [3] pre, post, comb   (hc_head: [1])
} Hyper;

// Pools M tokens (overlap: 2M, for M = 4) into one row of `out` dims.  c = 2 with overlap, else 1
typedef struct {
    Mat wkv, wgate;     // [c*out, D]
    float *ape;         // [M, c*out]
    float *norm;        // [out]
    int ratio, out;
} Compressor;

typedef struct {
    char name[16];                      // "layers.7", "mtp.0"
    int ratio;                          // M: 0, 4 or 128
    Hyper hc_attn, hc_ffn;
    float *attn_norm, *ffn_norm;        // [D]
    Mat wq_a, wq_b;                     // [Q, D], [H*K, Q]
    Mat wkv;                            // [K, D]
    Mat wo_a, wo_b;                     // [G*L, H*K/G], [D, G*L]
    float *q_norm, *kv_norm;            // [Q], [K]
    float *attn_sink;                   // [H]
    Compressor comp;                    // M > 0: out = K
    Compressor icomp;                   // M = 4: the indexer's, out = J
    Mat iwq_b, iproj;                   // M = 4: indexer.wq_b [I*J, Q], indexer.weights_proj [I, D]
    Mat gate;                           // [E, D]
    float *gate_bias;                   // [E], NULL on hash layers
    const int64_t *tid2eid;             // [V, A], NULL on scored layers
    Mat *w1, *w2, *w3;                  // [E] of [F, D], [D, F], [F, D]
    Mat sw1, sw2, sw3;                  // the shared expert
    size_t bytes, expert_bytes;         // as stored: all of it, its routed experts
} Layer;

// The draft layer (spec 10): predicts token t+2 from the streams at t and token t+1.
typedef struct {
    Layer block;
    Mat e_proj, h_proj;                 // [D, D]
    float *enorm, *hnorm, *norm;        // [D]
    Hyper hc_head;
} Mtp;

typedef struct {
    Mat embed, head;                    // [V, D]
    float *norm;                        // [D]
    Hyper hc_head;
    Layer *layers;                      // [n_layers]
    Mtp *mtp;                           // [n_mtp], NULL if the checkpoint has none
} Weights;

// What one session keeps in one layer. Rows of K (keys = values) and J (index keys): BF16, or FP32
// with --exact. A ring of n slots holds position p in slot p % n; `ring` = window + rows per call +
// slack, `cring` likewise.
typedef struct {
    void *win;          // [ring, K]       window rows
    void *comp;         // [ctx/M, K]      compressed rows (append-only)
    void *ikeys;        // [ctx/M, J]      index keys (M = 4)
    float *cin;         // [cring, 2, c*K] compressor inputs: kv, gate + ape
    float *icin;        // [cring, 2, c*J]
} Cache;

// One row of a batch. Rows of one session are consecutive positions in ascending order.
typedef struct {
    int token, slot, pos;   // slot: which session's caches
    int next;               // MTP only: the token at pos + 1
} Row;

// ---------------------------------------------------------------------------
// threads: one pool; a parallel region hands out ranges of items, large ones first

#if defined(__x86_64__)
static void cpu_pause(void) { _mm_pause(); }
#else
static void cpu_pause(void) { }
#endif

struct Pool {
    int n_threads;              // the caller included
    double spin;                // seconds a thread looks for work before it sleeps
    pthread_t *threads;         // [n_threads - 1]
    _Atomic uint64_t state;     // region number << 32 | next item (between regions: UINT32_MAX)
    _Atomic(RangeFn *) fn;      // the region: read before, and valid only after, a claim on `state`
    _Atomic(void *) arg;
    _Atomic uint32_t n, grain;
    _Atomic uint32_t done;      // items finished
    _Atomic int sleepers;
    _Atomic bool stop;
    pthread_mutex_t caller;     // held by the thread that runs a region
    pthread_mutex_t lock;       // with `wake`: sleeping workers
    pthread_cond_t wake;
    void *scratch;              // matmul's packed activations, grown on demand
    size_t scratch_bytes;
};

static _Thread_local bool in_region;

// Claims ranges of region `id` until none is left. A late thread's claim fails: `state` has moved
// on.
static void pool_work(Pool *p, uint32_t id) {
    for (;;) {
        uint64_t s = atomic_load_explicit(&p->state, memory_order_acquire);
        uint32_t i = (uint32_t)s, n = atomic_load_explicit(&p->n, memory_order_acquire);
        if (s >> 32 != id || i >= n) return;
        uint32_t step = (n - i) / (2 * (uint32_t)p->n_threads);
        uint32_t grain = atomic_load_explicit(&p->grain, memory_order_acquire);
        RangeFn *f = atomic_load_explicit(&p->fn, memory_order_acquire);
        void *arg = atomic_load_explicit(&p->arg, memory_order_acquire);
        if (step < grain) step = grain;
        if (step > n - i) step = n - i;
        if (!atomic_compare_exchange_strong(&p->state, &s, s + step)) continue;
        f(arg, (int)i, (int)(i + step));
        atomic_fetch_add(&p->done, step);
    }
}

// Waits until the region number differs from `seen`: spins, then sleeps. Returns it.
static uint32_t pool_wait(Pool *p, uint32_t seen) {
    double until = p->spin > 0 ? now() + p->spin : 0;
    for (int i = 1; p->spin > 0 && (i % 64 || now() < until); i++) {
        uint32_t id = (uint32_t)(atomic_load_explicit(&p->state, memory_order_acquire) >> 32);
        if (id != seen || atomic_load_explicit(&p->stop, memory_order_relaxed)) return id;
        cpu_pause();
    }
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add(&p->sleepers, 1);      // before the test: a caller that we miss sees us
    while (atomic_load(&p->state) >> 32 == seen && !atomic_load(&p->stop))
        pthread_cond_wait(&p->wake, &p->lock);
    atomic_fetch_sub(&p->sleepers, 1);
    pthread_mutex_unlock(&p->lock);
    return (uint32_t)(atomic_load(&p->state) >> 32);
}

static void *pool_thread(void *arg) {
    Pool *p = arg;
    in_region = true;
    for (uint32_t seen = 0; !atomic_load(&p->stop); ) {
        seen = pool_wait(p, seen);
        pool_work(p, seen);
    }
    return NULL;
}

static void pool_wake(Pool *p) {
    if (!atomic_load(&p->sleepers)) return;
    pthread_mutex_lock(&p->lock);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
}

// Runs f(arg, begin, end) over ranges that cover [0, n), each at least `grain` items (the last may
// be shorter). Returns when all are done; the caller takes part. A call from inside a region runs
// serially.
void parallel(Pool *p, int n, int grain, RangeFn *f, void *arg) {
    if (n <= 0) return;
    if (p->n_threads == 1 || in_region || n <= grain) {
        f(arg, 0, n);
        return;
    }
    pthread_mutex_lock(&p->caller);
    in_region = true;
    uint64_t old = atomic_exchange(&p->state, atomic_load(&p->state) | UINT32_MAX);
    uint64_t id = (uint32_t)((old >> 32) + 1);
    atomic_store_explicit(&p->fn, f, memory_order_release);
    atomic_store_explicit(&p->arg, arg, memory_order_release);
    atomic_store_explicit(&p->n, (uint32_t)n, memory_order_release);
    atomic_store_explicit(&p->grain, (uint32_t)(grain > 0 ? grain : 1), memory_order_release);
    atomic_store_explicit(&p->done, 0, memory_order_release);
    atomic_store(&p->state, id << 32);
    pool_wake(p);
    pool_work(p, (uint32_t)id);
    for (int i = 1; atomic_load_explicit(&p->done, memory_order_acquire) != (uint32_t)n; i++) {
        cpu_pause();
        if (i % 256 == 0) sched_yield();    // somebody else may need this core to finish our work
    }
    in_region = false;
    pthread_mutex_unlock(&p->caller);
}

static void rouse_range(void *arg, int begin, int end) {
    (void)arg;
    for (double until = now() + 100e-6 * (end - begin); now() < until; ) cpu_pause();
}

// Work for longer than a thread takes to wake: a region that follows finds all of them awake.
static void pool_rouse(Pool *p) { parallel(p, 4 * p->n_threads, 1, rouse_range, NULL); }

void pool_free(Pool *p) {
    if (!p) return;
    atomic_store(&p->stop, true);
    pthread_mutex_lock(&p->lock);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
    for (int i = 0; i < p->n_threads - 1; i++) pthread_join(p->threads[i], NULL);
    pthread_mutex_destroy(&p->caller);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->wake);
    free(p->threads);
    free(p->scratch);
    free(p);
}

// Cores that this thread may use
static int usable_cores(void) {
    cpu_set_t set;
    if (!sched_getaffinity(0, sizeof set, &set)) return CPU_COUNT(&set);
    return (int)sysconf(_SC_NPROCESSORS_ONLN);
}

// n_threads < 1: one per core this thread may use. Threads beyond the cores do not spin.
Pool *pool_new(int n_threads) {
    int cores = usable_cores();
    Pool *p = xalloc(1, sizeof *p);
    p->n_threads = n_threads > 0 ? n_threads : cores > 0 ? cores : 1;
    p->spin = p->n_threads > cores ? 0 : 80e-6;
    p->threads = xalloc((size_t)p->n_threads, sizeof *p->threads);
    pthread_mutex_init(&p->caller, NULL);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    for (int i = 0; i < p->n_threads - 1; i++) {
        int err = pthread_create(&p->threads[i], NULL, pool_thread, p);
        if (err) die(1, "cannot start thread %d of %d: %s", i + 2, p->n_threads, strerror(err));
    }
    return p;
}

#define INLINE __attribute__((always_inline)) static inline

// ---------------------------------------------------------------------------
// number formats

INLINE float f32_of_bits(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
INLINE uint32_t bits_of_f32(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
INLINE float f32_of_bf16(bf16 h) { return f32_of_bits((uint32_t)h << 16); }

// Round to nearest even; a NaN stays one.
static bf16 bf16_of_f32(float f) {
    uint32_t u = bits_of_f32(f);
    if ((u & 0x7fffffff) > 0x7f800000) return (bf16)(u >> 16 | 0x40);
    return (bf16)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// e8m0: 2^(b-127), 255 is NaN
INLINE float f32_of_e8m0(uint8_t b) {
    return f32_of_bits(b == 255 ? 0x7fc00000 : b ? (uint32_t)b << 23 : 0x400000);
}

// e4m3fn: sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7f and 0xff are NaN
static float f32_of_e4m3(uint8_t b) {
    uint32_t sign = (uint32_t)(b & 0x80) << 24, mag = b & 0x7f;
    if (mag == 0x7f) return f32_of_bits(sign | 0x7fc00000);
    if (mag < 8) return (sign ? -1.0f : 1.0f) * (float)mag * 0x1p-9f;
    return f32_of_bits(sign | ((mag << 20) + (120u << 23)));
}

// e2m1, the value times two: an integer
static const int8_t e2m1_x2[16] = { 0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12 };

static size_t row_bytes(const Mat *m) {
    static const uint8_t bits[N_FORMATS] = {
        [W_F32] = 32, [W_BF16] = 16, [W_INT8] = 8, [W_INT4] = 4, [W_FP8] = 8, [W_FP4] = 4 };
    return (size_t)m->k * bits[m->fmt] / 8;
}

INLINE bf16 load_bf16(const void *p, size_t i) {
    bf16 h;
    memcpy(&h, (const char *)p + 2 * i, 2);
    return h;
}

// The scale of the 128 x 128 block of INT8 or FP8 weights that holds W[i][k]
INLINE float block_scale(const Mat *m, int i, int k) {
    size_t block = (size_t)(i / 128) * (size_t)((m->k + 127) / 128) + (size_t)(k / 128);
    if (m->fmt == W_INT8) return f32_of_bf16(load_bf16(m->s, block));
    return f32_of_e8m0(((const uint8_t *)m->s)[block]);
}

// The scale of W[i][k] (FP4: of the values themselves); 1 for formats without one.
static float scale_at(const Mat *m, int i, int k) {
    size_t group = (size_t)i * (size_t)(m->k / 32) + (size_t)(k / 32);
    switch (m->fmt) {
    case W_INT8: case W_FP8: return block_scale(m, i, k);
    case W_INT4: return f32_of_bf16(load_bf16(m->s, group));
    case W_FP4: return f32_of_e8m0(((const uint8_t *)m->s)[group]);
    default: return 1;
    }
}

// Row i of a matrix as FP32 [k]: the scales applied.
static void dequant_row(const Mat *m, int i, float *out) {
    const uint8_t *w = (const uint8_t *)m->w + (size_t)i * row_bytes(m);
    if (m->fmt == W_F32) memcpy(out, w, (size_t)m->k * 4);
    for (int k0 = 0; k0 < m->k && m->fmt != W_F32; k0 += 32) {
        float s = scale_at(m, i, k0);
        for (int k = k0; k < k0 + 32 && k < m->k; k++) {
            int nibble = m->fmt == W_INT4 || m->fmt == W_FP4 ? w[k / 2] >> (k % 2 * 4) & 15 : 0;
            switch (m->fmt) {
            case W_BF16: out[k] = f32_of_bf16(load_bf16(w, (size_t)k)); break;
            case W_INT8: out[k] = (float)(int8_t)w[k] * s; break;
            case W_INT4: out[k] = (float)(nibble - 8) * s; break;
            case W_FP8: out[k] = f32_of_e4m3(w[k]) * s; break;
            default: out[k] = (float)e2m1_x2[nibble] * 0.5f * s;
            }
        }
    }
}

// ---------------------------------------------------------------------------
// instruction sets

enum { CPU_PORTABLE, CPU_AVX2, CPU_AVX512, CPU_VNNI, N_CPU_LEVELS };
static const char *const cpu_names[N_CPU_LEVELS] = { "portable", "avx2", "avx512", "avx512-vnni" };

static int cpu_best(void) {
#if defined(__x86_64__)
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return CPU_PORTABLE;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw")
        || !__builtin_cpu_supports("avx512vl")) return CPU_AVX2;
    return __builtin_cpu_supports("avx512vnni") ? CPU_VNNI : CPU_AVX512;
#else
    return CPU_PORTABLE;
#endif
}

static int cpu_level = -1;      // set by cpu_init; a test may lower it

static void cpu_init(void) {
    if (cpu_level < 0) cpu_level = cpu_best();
}

#if defined(__x86_64__)
#define TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define TARGET_AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl")))
#endif

// ---------------------------------------------------------------------------
// activations as INT8 in groups of 32

static void quantise_group(const float *x, int n, int8_t *q, float *s) {
    uint32_t top = 0;           // compared as bits: a NaN counts as the largest and is not lost
    for (int i = 0; i < n; i++) {
        uint32_t u = bits_of_f32(x[i]) & 0x7fffffff;
        if (u > top) top = u;
    }
    float absmax = f32_of_bits(top), r = absmax ? 127 / absmax : 0;
    if (!(r <= FLT_MAX)) r = 0;
    for (int i = 0; i < 32; i++) {
        float v = i < n ? x[i] * r : 0;
        q[i] = (int8_t)(v >= -127 ? v <= 127 ? (int)rintf(v) : 127 : -127);
    }
    *s = absmax / 127;
}

#if defined(__x86_64__)
TARGET_AVX2 static void quantise_avx2(const float *x, int8_t *q, float *s) {
    __m256i abs = _mm256_set1_epi32(0x7fffffff), v[4], top = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_loadu_si256((const __m256i *)(x + 8 * i));
        top = _mm256_max_epi32(top, _mm256_and_si256(v[i], abs));
    }
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    float absmax = f32_of_bits((uint32_t)_mm_cvtsi128_si32(m)), r = absmax ? 127 / absmax : 0;
    if (!(r <= FLT_MAX)) r = 0;
    for (int i = 0; i < 4; i++) {
        __m256 p = _mm256_mul_ps(_mm256_castsi256_ps(v[i]), _mm256_set1_ps(r));
        v[i] = _mm256_max_epi32(_mm256_cvtps_epi32(p), _mm256_set1_epi32(-127));
    }
    __m256i w = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    w = _mm256_permutevar8x32_epi32(w, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i *)q, w);
    *s = absmax / 127;
}
#endif

// x [k] -> q [groups, 32], s [groups]. Per group: r = 127 / absmax, q = rint(x r) half to even, s =
// absmax / 127; the last group is padded with zeros. Groups below 127/FLT_MAX count as zero. A NaN
// or Inf ends up in s.
static void quantise(const float *x, int k, int8_t *q, float *s) {
    for (int g = 0; g * 32 < k; g++) {
#if defined(__x86_64__)
        if (cpu_level >= CPU_AVX2 && k - g * 32 >= 32) {
            quantise_avx2(x + g * 32, q + g * 32, s + g);
            continue;
        }
#endif
        quantise_group(x + g * 32, k - g * 32 < 32 ? k - g * 32 : 32, q + g * 32, s + g);
    }
}

// ---------------------------------------------------------------------------
// products y = W x. The unit of work is a tile: a few rows of W times some tokens. Every output is
// summed over its columns in ONE order, whatever the batch and the threads (the integer formats' are
// the same bits with every instruction set, the others' where fused products are the same):
//   INT8, INT4, FP4   an integer sum per group of 32 columns, scaled; groups 0 .. 15 mod 16 are
//                     added up apart, of each four in turn (0 + 1) + (2 + 3), of those again
//   FP8, BF16, F32    16 sums of every 16th column or so (float_place), then halved again and again;
//                     of FP8 the SIMD kernels scale the sums of a block of 128 columns

typedef struct {
    const Mat *w;
    const Act *a;
    const int *rows;        // [T] rows of `a`, NULL: 0 .. T-1
    int T;
    float *y;               // [T, n], row t at y + t*ldy
    size_t ldy;
} Product;

// AHEAD: bytes. FEW: tokens; with more, VNNI works on LANES rows. T_*: tokens of a tile at most.
enum { AHEAD = 6 << 10, LANES = 16, QUAD = 4, FEW = 4, T_BLOCK = 48, T_FLOATS = 32 };

// Packed activations of 512 columns: 4 blocks b of 4 groups g of 32, zero behind k. q[b][0] holds the
// columns that stand in the low half of a group's weights (INT8: the first 16, nibbles: the even ones).
typedef struct {
    int8_t q[4][2][4][16];
    int32_t c[4][4];        // [g][b] what the weights' bias adds, negated
    float s[4][4];          // [g][b]
} Packed;

typedef struct {
    const Mat *w;
    int row, rows;          // rows of W, 1 .. LANES; never across a multiple of LANES
    const void *a;          // packed, first token: Packed [k / 512, pitch] or float [k / 128, pitch, 128]
    size_t pitch;
    int T;
    float *acc;             // [T, LANES] the results
} Tile;

typedef struct {
    Product p;
    void *a;                // packed
    int tiles, rows, blocks, T;     // per token block: `tiles` of `rows` rows; `blocks` of T tokens
    int first;              // number of its first tile in the region
} Job;

static bool takes_int8(Format f) { return f == W_INT8 || f == W_INT4 || f == W_FP4; }
static int n_blocks(const Mat *m) { return (m->k + 127) / 128; }
static int n_packed(const Mat *m) { return (m->k + 511) / 512; }

// The SIMD kernels multiply unsigned weights w + bias with signed activations.
static int weight_bias(Format f) {
    if (cpu_level == CPU_PORTABLE) return 0;
    if (f == W_INT8) return cpu_level == CPU_VNNI ? 128 : 0;
    return f == W_INT4 ? 8 : 12;
}

static void pack_int(const Product *p, int t, Packed *out) {
    size_t r = p->rows ? (size_t)p->rows[t] : (size_t)t;
    const int8_t *q = p->a->q + r * p->a->ldq;
    const float *s = p->a->s + r * p->a->lds;
    bool nibbles = p->w->fmt != W_INT8, half = p->w->fmt == W_FP4;
    int bias = weight_bias(p->w->fmt), groups = (p->w->k + 31) / 32;
    for (int i = 0; i < 16 * n_packed(p->w); i++, q += 32) {
        Packed *o = out + (size_t)(i / 16) * (size_t)p->T + t;
        int g = i % 4, b = i / 4 % 4, sum = 0;
        int8_t *lo = o->q[b][0][g], *hi = o->q[b][1][g];
        if (i >= groups) {
            memset(lo, 0, 16), memset(hi, 0, 16);
            o->c[g][b] = 0;
            o->s[g][b] = 0;
            continue;
        }
        for (int j = 0; j < 32; j++) sum += q[j];
        for (int j = 0; j < 16; j++) {
            lo[j] = nibbles ? q[2 * j] : q[j];
            hi[j] = nibbles ? q[2 * j + 1] : q[16 + j];
        }
        o->c[g][b] = -bias * sum;
        o->s[g][b] = half ? s[i] * 0.5f : s[i];
    }
}

// The SIMD kernels see FP8 weights times 2^-120, activations times 2^60: those from 2^68 on become
// infinite, products below 2^-66 lose bits.
#define FP8_UP 0x1p60f

// Where column c of a block of 32 stands in packed activations: in vector place / 16, lane
// place % 16, as the instructions leave the weights that they unpack.
static int float_place(Format f, int c) {
    return f == W_BF16 ? c % 2 * 16 + c / 2 : c;
}

static void pack_float(const Product *p, int t, float *out) {
    const float *x = p->a->x + (p->rows ? (size_t)p->rows[t] : (size_t)t) * p->a->ld;
    int k = p->w->k;
    float up = p->w->fmt == W_FP8 && cpu_level > CPU_PORTABLE ? FP8_UP : 1;
    for (int b = 0; b < n_blocks(p->w); b++) {
        float *o = out + ((size_t)b * (size_t)p->T + (size_t)t) * 128;
        for (int c = 0; c < 128; c++)
            o[c / 32 * 32 + float_place(p->w->fmt, c % 32)] = 128 * b + c < k ? x[128 * b + c] * up : 0;
    }
}

static void pack_range(void *arg, int begin, int end) {
    const Job *j = arg;
    for (int t = begin; t < end; t++) {
        if (takes_int8(j->p.w->fmt)) pack_int(&j->p, t, j->a);
        else pack_float(&j->p, t, j->a);
    }
}

// ---------------------------------------------------------------------------
// portable tiles

static void tile_int(const Tile *t) {
    const Mat *m = t->w;
    for (int r = 0; r < t->rows; r++) {
        const uint8_t *w = (const uint8_t *)m->w + (size_t)(t->row + r) * row_bytes(m);
        float acc[T_BLOCK][4][4] = { 0 };
        for (int g = 0; g * 32 < m->k; g++) {
            int lo[16] = { 0 }, hi[16] = { 0 }, n = m->k - g * 32;
            for (int i = 0; i < 16 && m->fmt != W_INT8; i++) {
                int a = w[g * 16 + i] & 15, b = w[g * 16 + i] >> 4;
                lo[i] = m->fmt == W_INT4 ? a - 8 : e2m1_x2[a];
                hi[i] = m->fmt == W_INT4 ? b - 8 : e2m1_x2[b];
            }
            for (int i = 0; i < 32 && i < n && m->fmt == W_INT8; i++)
                (i < 16 ? lo : hi)[i % 16] = (int8_t)w[g * 32 + i];
            const Packed *a = (const Packed *)t->a + (size_t)(g / 16) * t->pitch;
            float s = scale_at(m, t->row + r, g * 32);
            int b = g / 4 % 4;
            for (int j = 0; j < t->T; j++) {
                int sum = 0;
                float *to = &acc[j][b][g % 4];
                for (int i = 0; i < 16; i++)
                    sum += lo[i] * a[j].q[b][0][g % 4][i] + hi[i] * a[j].q[b][1][g % 4][i];
                *to = fmaf((float)sum, s * a[j].s[g % 4][b], *to);
            }
        }
        for (int j = 0; j < t->T; j++) {
            float x[4];
            for (int b = 0; b < 4; b++)
                x[b] = (acc[j][b][0] + acc[j][b][1]) + (acc[j][b][2] + acc[j][b][3]);
            t->acc[j * LANES + r] = (x[0] + x[1]) + (x[2] + x[3]);
        }
    }
}

static void tile_float(const Tile *t) {
    const Mat *m = t->w;
    float *row = xalloc((size_t)m->k, sizeof *row);
    for (int r = 0; r < t->rows; r++) {
        dequant_row(m, t->row + r, row);
        for (int j = 0; j < t->T; j++) {
            float sum[16] = { 0 };
            for (int i = 0; i < m->k; i++) {
                const float *x = (const float *)t->a + ((size_t)(i / 128) * t->pitch + (size_t)j) * 128;
                int at = float_place(m->fmt, i % 32);
                sum[at % 16] += row[i] * x[i % 128 / 32 * 32 + at];
            }
            for (int w = 8; w; w /= 2)
                for (int l = 0; l < w; l++) sum[l] += sum[l + w];
            t->acc[j * LANES + r] = sum[0];
        }
    }
    free(row);
}

static void tile_portable(const Tile *t) {
    if (takes_int8(t->w->fmt)) tile_int(t);
    else tile_float(t);
}

// ---------------------------------------------------------------------------
// AVX2 and AVX-512 tiles. For one token row after row is read, in the order of memory and as fast as
// it gives them; for several, four rows side by side, which share the activations. For many tokens
// VNNI does better on 16 rows, 64 bytes of each transposed so that lane r of vector j holds dword j
// of row r: more work for a byte, less for a token.

#if defined(__x86_64__)

static const int8_t e2m1_biased[16] = { 12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0 };

// Four rows on their way, or, for one token, four blocks of one row, read from byte `at` on. What
// would be read behind the end of a row is read from copies.
typedef struct {
    const uint8_t *w[QUAD], *s[QUAD];
    const uint8_t *ahead;       // asked for: what comes AHEAD bytes later; of four rows, the next four
    size_t at, s_at;
} Quad;
typedef struct { uint8_t w[QUAD * 512], s[QUAD * 8]; } QuadEnd;

// Bytes of a block of 128 columns of a row, and of its own scales
INLINE size_t step_of(Format f) {
    return f == W_F32 ? 512 : f == W_BF16 ? 256 : f == W_INT8 || f == W_FP8 ? 128 : 64;
}
INLINE size_t scales_of(Format f) { return f == W_INT4 ? 8 : f == W_FP4 ? 4 : 0; }

// Rows r0 .. r0 + 3, those beyond the tile's its first; or row r0 alone.
INLINE void quad_open(Quad *q, const Tile *t, int r0, Format f, bool alone) {
    const Mat *m = t->w;
    size_t bytes = row_bytes(m), scales = (size_t)m->k / 32 * (scales_of(f) / 4);     // of a row
    for (int i = 0; i < QUAD; i++) {
        int r = alone ? r0 : r0 + i < t->rows ? r0 + i : 0;
        size_t row = (size_t)(t->row + r), block = alone ? (size_t)i : 0;
        q->w[i] = (const uint8_t *)m->w + row * bytes + block * step_of(f);
        if (scales_of(f)) q->s[i] = (const uint8_t *)m->s + row * scales + block * scales_of(f);
    }
    size_t rows = alone ? 1 : QUAD, far = AHEAD / step_of(f) * scales_of(f);
    q->ahead = q->w[0] + (!alone && QUAD * bytes > AHEAD ? QUAD * bytes : AHEAD);
    q->at = q->s_at = 0;
    if (!alone && QUAD * scales > far) far = QUAD * scales;
    for (size_t i = 0; i < rows * scales; i += 64)
        _mm_prefetch((const char *)q->s[0] + far + i, _MM_HINT_T1);
}

// Moves on to what is left of the rows, fewer bytes than a step takes. False: there are none.
INLINE bool quad_end(Quad *q, QuadEnd *end, const Tile *t, Format f, bool alone) {
    size_t left = row_bytes(t->w) - q->at, scales = left / 16 * (scales_of(f) / 4);
    if (!left) return false;
    memset(end->w, 0, QUAD * step_of(f));
    memset(end->s, 0, sizeof end->s);
    for (int i = 0; i < (alone ? 1 : QUAD); i++) {
        memcpy(end->w + (size_t)i * step_of(f), q->w[i] + q->at, left);
        if (scales) memcpy(end->s + (size_t)i * scales_of(f), q->s[i] + q->s_at, scales);
    }
    for (size_t i = 0; i < QUAD; i++) {
        q->w[i] = end->w + i * step_of(f);
        q->s[i] = end->s + i * scales_of(f);
    }
    q->at = q->s_at = 0;
    return true;
}

TARGET_AVX2 INLINE float sum_16(__m256 lo, __m256 hi) {
    __m256 a = _mm256_add_ps(lo, hi);
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

// The next block of each row, or the next four of one. As much is asked for of what comes later in
// the order of memory; not where loads of 64 bytes, one behind the other, keep the memory busy.
TARGET_AVX2 INLINE void quad_next(Quad *q, Format f, bool alone) {
    const char *ahead = (const char *)q->ahead + (alone ? 1 : QUAD) * q->at;
    bool busy = alone && f == W_INT8 && cpu_level > CPU_AVX2;
    for (size_t i = 0; i < QUAD * step_of(f) && !busy; i += 64)
        _mm_prefetch(ahead + i, _MM_HINT_T1);
    q->at += (alone ? QUAD : 1) * step_of(f);
    q->s_at += (alone ? QUAD : 1) * scales_of(f);
}

// BF16 bits of the scales of 4 groups of 4 rows, or of 4 blocks of one row: [group, row or block]
TARGET_AVX2 INLINE __m256i quad_scales(const Quad *q, bool fp4, bool one) {
    const uint8_t *s = q->s[0] + q->s_at;
    if (fp4) {          // E8M0: the exponent; 0 is 2^-127, 255 a NaN
        const __m128i turn = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        uint8_t rows[QUAD * 4];
        for (int i = 0; i < QUAD; i++) memcpy(rows + 4 * i, q->s[i] + q->s_at, 4);
        __m128i v = _mm_loadu_si128((const void *)(one ? s : rows));
        __m256i exponent = _mm256_cvtepu8_epi16(_mm_shuffle_epi8(v, turn));
        __m256i low = _mm256_set1_epi16(0x40);
        __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi16(exponent, _mm256_set1_epi16(255)), low);
        return _mm256_or_si256(_mm256_max_epu16(_mm256_slli_epi16(exponent, 7), low), nan);
    }
    const __m256i turn = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    __m128i v[QUAD];
    for (int i = 0; i < QUAD; i++) v[i] = _mm_loadl_epi64((const void *)(q->s[i] + q->s_at));
    __m256i all = _mm256_set_m128i(_mm_unpacklo_epi64(v[2], v[3]), _mm_unpacklo_epi64(v[0], v[1]));
    if (one) all = _mm256_loadu_si256((const void *)s);
    all = _mm256_shuffle_epi8(all, turn);
    return _mm256_permutevar8x32_epi32(all, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// 128 columns of a row, half h of the groups: lo, hi as in Packed, weights with their bias
TARGET_AVX2 INLINE void quad_weights_256(const uint8_t *w, int h, Format fmt, __m256i *lo,
                                         __m256i *hi) {
    const __m256i low = _mm256_set1_epi8(15);
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)e2m1_biased));
    if (fmt == W_INT8) {
        __m256i a = _mm256_loadu_si256((const void *)(w + 64 * h)),
                b = _mm256_loadu_si256((const void *)(w + 64 * h + 32));
        *lo = _mm256_permute2x128_si256(a, b, 0x20);
        *hi = _mm256_permute2x128_si256(a, b, 0x31);
        return;
    }
    __m256i v = _mm256_loadu_si256((const void *)(w + 32 * h));
    *lo = _mm256_and_si256(v, low);
    *hi = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
    if (fmt == W_INT4) return;
    *lo = _mm256_shuffle_epi8(table, *lo);
    *hi = _mm256_shuffle_epi8(table, *hi);
}

// Sums of 4 products each. INT8 is signed: |w| * (q with w's sign): 2 x 128 x 127 fits in 16 bits.
TARGET_AVX2 INLINE __m256i dot_256(__m256i lo, __m256i ql, __m256i hi, __m256i qh, bool is_signed) {
    const __m256i ones = _mm256_set1_epi16(1);
    if (!is_signed)         // 4 x 24 x 127 fits
        return _mm256_madd_epi16(
            _mm256_add_epi16(_mm256_maddubs_epi16(lo, ql), _mm256_maddubs_epi16(hi, qh)), ones);
    lo = _mm256_maddubs_epi16(_mm256_abs_epi8(lo), _mm256_sign_epi8(ql, lo));
    hi = _mm256_maddubs_epi16(_mm256_abs_epi8(hi), _mm256_sign_epi8(qh, hi));
    return _mm256_add_epi32(_mm256_madd_epi16(lo, ones), _mm256_madd_epi16(hi, ones));
}

// Four rows' sums of four lanes each: [.., row]
TARGET_AVX2 INLINE __m256i quad_sums_256(const __m256i v[QUAD]) {
    __m256i a = _mm256_add_epi32(_mm256_unpacklo_epi32(v[0], v[1]),
                                 _mm256_unpackhi_epi32(v[0], v[1]));
    __m256i b = _mm256_add_epi32(_mm256_unpacklo_epi32(v[2], v[3]),
                                 _mm256_unpackhi_epi32(v[2], v[3]));
    return _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
}

// Of [g][b], the groups of half h: block b's, each in four lanes
TARGET_AVX2 INLINE __m256i spread_256(const void *a, int h, int b) {
    const __m256i each = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4);
    return _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i *)a + h),
                                       _mm256_add_epi32(each, _mm256_set1_epi32(b)));
}

// The scales of blocks b .. b + 3 of INT8; 0 behind the last
TARGET_AVX2 INLINE __m128 block_scales(const Tile *t, int b) {
    const bf16 *s = (const bf16 *)t->w->s + (size_t)(t->row / 128) * (size_t)n_blocks(t->w) + b;
    bf16 of[4] = { 0 };
    if (b + 4 > n_blocks(t->w)) memcpy(of, s, (size_t)(n_blocks(t->w) - b) * sizeof *s);
    else memcpy(of, s, sizeof of);
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const void *)of)), 16));
}

// sums [T][half of the groups] += block b of four rows times T tokens; or blocks b .. b + 3 of one
TARGET_AVX2 INLINE void ints_block_256(Quad *q, const Tile *t, int b, int T, __m256 (*sums)[4][2],
                                       Format fmt, bool one) {
    const Packed *first = (const Packed *)t->a + (size_t)(b / 4) * t->pitch;
    __m256i s16 = scales_of(fmt) ? quad_scales(q, fmt == W_FP4, one) : _mm256_setzero_si256();
    __m128 of_block = fmt == W_INT8 && one ? block_scales(t, b) : _mm_setzero_ps();
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        __m128i half = h ? _mm256_extracti128_si256(s16, 1) : _mm256_castsi256_si128(s16);
        __m256 s = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
        if (fmt == W_INT8 && one) s = _mm256_set_m128(of_block, of_block);
        if (fmt == W_INT8 && !one) s = _mm256_set1_ps(block_scale(t->w, t->row, 128 * b));
        __m256i lo[QUAD], hi[QUAD], sum[QUAD];
        for (int i = 0; i < QUAD; i++) quad_weights_256(q->w[i] + q->at, h, fmt, &lo[i], &hi[i]);
        for (int k = 0; k < T; k++) {
            const Packed *a = first + k;
            for (int i = 0; i < QUAD; i++) {
                const int8_t (*x)[4][16] = a->q[one ? i : b % 4];
                sum[i] = dot_256(lo[i], _mm256_loadu_si256((const void *)x[0][2 * h]), hi[i],
                                 _mm256_loadu_si256((const void *)x[1][2 * h]), fmt == W_INT8);
            }
            __m256i c = _mm256_loadu_si256((const void *)a->c[2 * h]);
            __m256i as = _mm256_loadu_si256((const void *)a->s[2 * h]);
            if (!one) c = spread_256(a->c, h, b % 4), as = spread_256(a->s, h, b % 4);
            __m256 *to = &sums[k][one ? 0 : b % 4][h];
            c = _mm256_add_epi32(quad_sums_256(sum), c);
            *to = _mm256_fmadd_ps(_mm256_cvtepi32_ps(c), _mm256_mul_ps(s, _mm256_castsi256_ps(as)), *to);
        }
    }
    quad_next(q, fmt, one);
}

// One block class of four rows, or all four of one: groups (0 + 1) + (2 + 3)
TARGET_AVX2 INLINE __m128 groups_256(const __m256 s[2]) {
    __m128 a = _mm_add_ps(_mm256_castps256_ps128(s[0]), _mm256_extractf128_ps(s[0], 1));
    return _mm_add_ps(a, _mm_add_ps(_mm256_castps256_ps128(s[1]), _mm256_extractf128_ps(s[1], 1)));
}

// (0 + 1) + (2 + 3)
TARGET_AVX2 INLINE float blocks_128(__m128 x) {
    x = _mm_add_ps(x, _mm_movehdup_ps(x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehl_ps(x, x)));
}

// Row r0 of a tile times one token, or rows r0 .. r0 + 3 times several
TARGET_AVX2 INLINE void ints_256(const Tile *t, int r0, Format fmt, bool one) {
    const int T = one ? 1 : t->T, per = one ? 4 : 1, whole = t->w->k / 128 / per * per;
    __m256 sums[T_BLOCK][4][2];
    Quad q;
    QuadEnd end;
    quad_open(&q, t, r0, fmt, one);
    for (int k = 0; k < T; k++)
        for (int i = 0; i < (one ? 2 : 8); i++) sums[k][i / 2][i % 2] = _mm256_setzero_ps();
    for (int b = 0; b < whole; b += per) ints_block_256(&q, t, b, T, sums, fmt, one);
    if (quad_end(&q, &end, t, fmt, one)) ints_block_256(&q, t, whole, T, sums, fmt, one);
    if (one) t->acc[r0] = blocks_128(groups_256(sums[0][0]));
    for (int k = 0; k < T && !one; k++) {
        __m128 a = _mm_add_ps(groups_256(sums[k][0]), groups_256(sums[k][1]));
        a = _mm_add_ps(a, _mm_add_ps(groups_256(sums[k][2]), groups_256(sums[k][3])));
        _mm_storeu_ps(t->acc + k * LANES + r0, a);
    }
}

// 64 bytes of a row of weights as FP32: vectors of 16 columns in two halves. FP8's bits, moved into
// place, are its value times 2^-120; top: the largest magnitude seen.
TARGET_AVX2 INLINE void unpack_256(const uint8_t *w, Format fmt, __m256 f[][2], __m256i *top) {
    const __m256i upper = _mm256_set1_epi32((int)0xffff0000);
    const __m256i e4m3 = _mm256_set1_epi32((int)0x87f00000);
    for (int h = 0; h < 2; h++) {
        __m256i v = _mm256_loadu_si256((const void *)(w + 32 * h));
        if (fmt == W_F32) f[0][h] = _mm256_castsi256_ps(v);
        if (fmt == W_BF16) {
            f[0][h] = _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
            f[1][h] = _mm256_castsi256_ps(_mm256_and_si256(v, upper));
        }
        if (fmt == W_FP8) *top = _mm256_max_epu8(*top, _mm256_and_si256(v, _mm256_set1_epi8(127)));
    }
    for (int i = 0; i < 8 && fmt == W_FP8; i++) {
        __m256i v = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)(w + 8 * i)));
        v = _mm256_and_si256(_mm256_slli_epi32(v, 20), e4m3);
        f[i / 2][i % 2] = _mm256_castsi256_ps(v);
    }
}

// The sum of a block's products onto the sum before it: FP8's starts at 0 and has a scale.
TARGET_AVX2 INLINE __m256 onto_256(__m256 sum, __m256 acc, __m256 s, Format fmt) {
    if (fmt != W_FP8) return acc;
    return _mm256_fmadd_ps(_mm256_mul_ps(acc, _mm256_set1_ps(FP8_UP)), s, sum);
}

// sum += 128 columns of a row times one token
TARGET_AVX2 INLINE void row_block_256(const uint8_t *w, const float *x, __m256 sum[2], __m256i *top,
                                      float scale, Format fmt) {
    const int n = 512 / (int)step_of(fmt);      // vectors in 64 bytes
    __m256 f[8][2], acc[2] = { sum[0], sum[1] };
    if (fmt == W_FP8) acc[0] = acc[1] = _mm256_setzero_ps();
#pragma GCC unroll 8
    for (int v = 0; v < 8; v++) {
        if (v % n == 0) unpack_256(w + v / n * 64, fmt, f + v, top);
        acc[0] = _mm256_fmadd_ps(f[v][0], _mm256_loadu_ps(x + 16 * v), acc[0]);
        acc[1] = _mm256_fmadd_ps(f[v][1], _mm256_loadu_ps(x + 16 * v + 8), acc[1]);
    }
    for (int h = 0; h < 2; h++) sum[h] = onto_256(sum[h], acc[h], _mm256_set1_ps(scale), fmt);
}

// Row r of a tile times one token
TARGET_AVX2 INLINE void row_256(const Tile *t, int r, Format fmt) {
    const Mat *m = t->w;
    const int whole = m->k / 128;
    const size_t step = step_of(fmt);
    const uint8_t *w = (const uint8_t *)m->w + (size_t)(t->row + r) * row_bytes(m);
    __m256 sum[2] = { _mm256_setzero_ps(), _mm256_setzero_ps() };
    __m256i top = _mm256_setzero_si256();
    const float *x = t->a;
    for (int b = 0; b < whole; b++, w += step, x += t->pitch * 128) {
        for (size_t i = 0; i < step; i += 64) _mm_prefetch((const char *)w + AHEAD + i, _MM_HINT_T1);
        row_block_256(w, x, sum, &top, fmt == W_FP8 ? block_scale(m, t->row, 128 * b) : 1, fmt);
    }
    if (m->k % 128) {
        uint8_t end[512] = { 0 };
        memcpy(end, w, row_bytes(m) - (size_t)whole * step);
        row_block_256(end, x, sum, &top, fmt == W_FP8 ? block_scale(m, t->row, 128 * whole) : 1, fmt);
    }
    __m256i nan = _mm256_cmpeq_epi8(top, _mm256_set1_epi8(127));
    t->acc[r] = _mm256_testz_si256(nan, nan) ? sum_16(sum[0], sum[1]) : NAN;
}

// sum [T][row] += block b of four rows times T tokens
TARGET_AVX2 INLINE void floats_block_256(Quad *q, const Tile *t, int b, __m256 (*sum)[QUAD][2],
                                         __m256i *top, Format fmt) {
    const int n = 512 / (int)step_of(fmt);      // vectors in 64 bytes
    const float *x = (const float *)t->a + (size_t)b * t->pitch * 128;
    __m256 w[QUAD][8][2], acc[QUAD][2], s = _mm256_set1_ps(1);
    if (fmt == W_FP8) s = _mm256_set1_ps(block_scale(t->w, t->row, 128 * b));
    for (int i = 0; i < QUAD; i++)
        for (int v = 0; v < 8; v += n)
            unpack_256(q->w[i] + q->at + v / n * 64, fmt, w[i] + v, &top[i]);
    for (int k = 0; k < t->T; k++, x += 128) {
        for (int i = 0; i < 2 * QUAD; i++)
            acc[i / 2][i % 2] = fmt == W_FP8 ? _mm256_setzero_ps() : sum[k][i / 2][i % 2];
        for (int v = 0; v < 16; v++)
            for (int i = 0; i < QUAD; i++)
                acc[i][v % 2] = _mm256_fmadd_ps(w[i][v / 2][v % 2], _mm256_loadu_ps(x + 8 * v), acc[i][v % 2]);
        for (int i = 0; i < 2 * QUAD; i++)
            sum[k][i / 2][i % 2] = onto_256(sum[k][i / 2][i % 2], acc[i / 2][i % 2], s, fmt);
    }
    quad_next(q, fmt, false);
}

// Rows r0 .. r0 + 3 of a tile times several tokens
TARGET_AVX2 INLINE void rows_256(const Tile *t, int r0, Format fmt) {
    const int whole = t->w->k / 128;
    __m256 sum[T_FLOATS][QUAD][2];
    __m256i top[QUAD];
    Quad q;
    QuadEnd end;
    quad_open(&q, t, r0, fmt, false);
    for (int i = 0; i < QUAD; i++) top[i] = _mm256_setzero_si256();
    for (int i = 0; i < 2 * QUAD * t->T; i++) sum[i / 8][i / 2 % 4][i % 2] = _mm256_setzero_ps();
    for (int b = 0; b < whole; b++) floats_block_256(&q, t, b, sum, top, fmt);
    if (quad_end(&q, &end, t, fmt, false)) floats_block_256(&q, t, whole, sum, top, fmt);
    for (int i = 0; i < QUAD; i++) {
        __m256i nan = _mm256_cmpeq_epi8(top[i], _mm256_set1_epi8(127));
        bool bad = !_mm256_testz_si256(nan, nan);
        for (int k = 0; k < t->T; k++)
            t->acc[k * LANES + r0 + i] = bad ? NAN : sum_16(sum[k][i][0], sum[k][i][1]);
    }
}

TARGET_AVX2 INLINE void floats_256(const Tile *t, Format fmt) {
    for (int r = 0; r < t->rows && t->T == 1; r++) row_256(t, r, fmt);
    for (int r = 0; r < t->rows && t->T > 1; r += QUAD) rows_256(t, r, fmt);
}

TARGET_AVX512 INLINE void quad_weights_512(const uint8_t *w, Format fmt, bool vnni, __m512i *lo,
                                           __m512i *hi) {
    const __m512i low = _mm512_set1_epi8(15), flip = _mm512_set1_epi8(-128);
    const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)e2m1_biased));
    __m512i v = _mm512_loadu_si512(w);
    if (fmt == W_INT8) {
        __m512i next = _mm512_loadu_si512(w + 64);
        *lo = _mm512_shuffle_i64x2(v, next, 0x88);
        *hi = _mm512_shuffle_i64x2(v, next, 0xdd);
        if (vnni) *lo = _mm512_xor_si512(*lo, flip), *hi = _mm512_xor_si512(*hi, flip);
        return;
    }
    if (fmt == W_INT4) __asm__("" : "+v"(v));       // gcc would load it for each half; FP4 minds not
    *lo = _mm512_and_si512(v, low);
    *hi = _mm512_and_si512(_mm512_srli_epi16(v, 4), low);
    if (fmt == W_INT4) return;
    *lo = _mm512_shuffle_epi8(table, *lo);
    *hi = _mm512_shuffle_epi8(table, *hi);
}

// |w| * (q with the sign of w)
TARGET_AVX512 INLINE __m512i dot_signed_512(__m512i w, __m512i q) {
    q = _mm512_mask_sub_epi8(q, _mm512_movepi8_mask(w), _mm512_setzero_si512(), q);
    return _mm512_madd_epi16(_mm512_maddubs_epi16(_mm512_abs_epi8(w), q), _mm512_set1_epi16(1));
}

TARGET_AVX512 INLINE __m512i dot_512(__m512i lo, __m512i ql, __m512i hi, __m512i qh, bool vnni,
                                     bool is_signed) {
    if (vnni) {
        __m512i sum = _mm512_setzero_si512();
        __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(lo), "v"(ql));
        __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(hi), "v"(qh));
        return sum;
    }
    if (is_signed) return _mm512_add_epi32(dot_signed_512(lo, ql), dot_signed_512(hi, qh));
    lo = _mm512_add_epi16(_mm512_maddubs_epi16(lo, ql), _mm512_maddubs_epi16(hi, qh));
    return _mm512_madd_epi16(lo, _mm512_set1_epi16(1));
}

TARGET_AVX512 INLINE __m512i quad_sums_512(const __m512i v[QUAD]) {
    __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]),
                                 _mm512_unpackhi_epi32(v[0], v[1]));
    __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]),
                                 _mm512_unpackhi_epi32(v[2], v[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

TARGET_AVX512 INLINE __m512i spread_512(const void *a, int b) {
    const __m512i each = _mm512_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12);
    return _mm512_permutexvar_epi32(_mm512_add_epi32(each, _mm512_set1_epi32(b)),
                                    _mm512_loadu_si512(a));
}

TARGET_AVX512 INLINE void ints_block_512(Quad *q, const Tile *t, int b, int T, __m512 (*sums)[4],
                                         Format fmt, bool vnni, bool one) {
    const Packed *a = (const Packed *)t->a + (size_t)(b / 4) * t->pitch;
    __m512i lo[QUAD], hi[QUAD], sum[QUAD];
    __m256i s16 = scales_of(fmt) ? quad_scales(q, fmt == W_FP4, one) : _mm256_setzero_si256();
    __m512 s = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(s16), 16));
    if (fmt == W_INT8 && one) s = _mm512_broadcast_f32x4(block_scales(t, b));
    if (fmt == W_INT8 && !one) s = _mm512_set1_ps(block_scale(t->w, t->row, 128 * b));
    for (int i = 0; i < QUAD; i++) quad_weights_512(q->w[i] + q->at, fmt, vnni, &lo[i], &hi[i]);
    for (int k = 0; k < T; k++, a++) {
        for (int i = 0; i < QUAD; i++) {
            const int8_t (*x)[4][16] = a->q[one ? i : b % 4];
            sum[i] = dot_512(lo[i], _mm512_loadu_si512(x[0]), hi[i], _mm512_loadu_si512(x[1]), vnni,
                             fmt == W_INT8);
        }
        __m512i c = one ? _mm512_loadu_si512(a->c) : spread_512(a->c, b % 4);
        __m512i as = one ? _mm512_loadu_si512(a->s) : spread_512(a->s, b % 4);
        __m512 *to = &sums[k][one ? 0 : b % 4];
        c = _mm512_add_epi32(quad_sums_512(sum), c);
        *to = _mm512_fmadd_ps(_mm512_cvtepi32_ps(c), _mm512_mul_ps(s, _mm512_castsi512_ps(as)), *to);
    }
    quad_next(q, fmt, one);
}

TARGET_AVX512 INLINE __m128 groups_512(__m512 s) {
    __m128 a = _mm_add_ps(_mm512_extractf32x4_ps(s, 0), _mm512_extractf32x4_ps(s, 1));
    return _mm_add_ps(a, _mm_add_ps(_mm512_extractf32x4_ps(s, 2), _mm512_extractf32x4_ps(s, 3)));
}

TARGET_AVX512 INLINE void ints_512(const Tile *t, int r0, Format fmt, bool vnni, bool one) {
    const int T = one ? 1 : t->T, per = one ? 4 : 1, whole = t->w->k / 128 / per * per;
    __m512 sums[T_BLOCK][4];
    Quad q;
    QuadEnd end;
    quad_open(&q, t, r0, fmt, one);
    for (int k = 0; k < T; k++)
        for (int i = 0; i < (one ? 1 : 4); i++) sums[k][i] = _mm512_setzero_ps();
    for (int b = 0; b < whole; b += per) ints_block_512(&q, t, b, T, sums, fmt, vnni, one);
    if (quad_end(&q, &end, t, fmt, one)) ints_block_512(&q, t, whole, T, sums, fmt, vnni, one);
    if (one) t->acc[r0] = blocks_128(groups_512(sums[0][0]));
    for (int k = 0; k < T && !one; k++) {
        __m128 a = _mm_add_ps(groups_512(sums[k][0]), groups_512(sums[k][1]));
        a = _mm_add_ps(a, _mm_add_ps(groups_512(sums[k][2]), groups_512(sums[k][3])));
        _mm_storeu_ps(t->acc + k * LANES + r0, a);
    }
}

TARGET_AVX512 INLINE void unpack_512(const uint8_t *w, Format fmt, __m512 *f, __m512i *top) {
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
    const __m512i e4m3 = _mm512_set1_epi32((int)0x87f00000);
    __m512i v = _mm512_loadu_si512(w);
    if (fmt == W_F32) f[0] = _mm512_castsi512_ps(v);
    if (fmt == W_BF16) {
        f[0] = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
        f[1] = _mm512_castsi512_ps(_mm512_and_si512(v, upper));
    }
    if (fmt == W_FP8) *top = _mm512_max_epu8(*top, _mm512_and_si512(v, _mm512_set1_epi8(127)));
    for (int i = 0; i < 4 && fmt == W_FP8; i++) {
        v = _mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(w + 16 * i)));
        f[i] = _mm512_castsi512_ps(_mm512_and_si512(_mm512_slli_epi32(v, 20), e4m3));
    }
}

TARGET_AVX512 INLINE __m512 onto_512(__m512 sum, __m512 acc, __m512 s, Format fmt) {
    if (fmt != W_FP8) return acc;
    return _mm512_fmadd_ps(_mm512_mul_ps(acc, _mm512_set1_ps(FP8_UP)), s, sum);
}

TARGET_AVX512 INLINE void row_block_512(const uint8_t *w, const float *x, __m512 *sum,
                                        __m512i *top, float scale, Format fmt) {
    const int n = 512 / (int)step_of(fmt);      // vectors in 64 bytes
    __m512 f[8], acc = fmt == W_FP8 ? _mm512_setzero_ps() : *sum;
#pragma GCC unroll 8
    for (int v = 0; v < 8; v++) {
        if (v % n == 0) unpack_512(w + v / n * 64, fmt, f + v, top);
        acc = _mm512_fmadd_ps(f[v], _mm512_loadu_ps(x + 16 * v), acc);
    }
    *sum = onto_512(*sum, acc, _mm512_set1_ps(scale), fmt);
}

TARGET_AVX512 INLINE float total_512(__m512 sum, __m512i top) {
    __m256 hi = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(sum), 1));
    bool bad = _mm512_cmpeq_epi8_mask(top, _mm512_set1_epi8(127));
    return bad ? NAN : sum_16(_mm512_castps512_ps256(sum), hi);
}

TARGET_AVX512 INLINE void row_512(const Tile *t, int r, Format fmt) {
    const Mat *m = t->w;
    const int whole = m->k / 128;
    const size_t step = step_of(fmt);
    const uint8_t *w = (const uint8_t *)m->w + (size_t)(t->row + r) * row_bytes(m);
    __m512 sum = _mm512_setzero_ps();
    __m512i top = _mm512_setzero_si512();
    const float *x = t->a;
    for (int b = 0; b < whole; b++, w += step, x += t->pitch * 128) {
        for (size_t i = 0; i < step; i += 64) _mm_prefetch((const char *)w + AHEAD + i, _MM_HINT_T1);
        row_block_512(w, x, &sum, &top, fmt == W_FP8 ? block_scale(m, t->row, 128 * b) : 1, fmt);
    }
    if (m->k % 128) {
        uint8_t end[512] = { 0 };
        memcpy(end, w, row_bytes(m) - (size_t)whole * step);
        row_block_512(end, x, &sum, &top, fmt == W_FP8 ? block_scale(m, t->row, 128 * whole) : 1, fmt);
    }
    t->acc[r] = total_512(sum, top);
}

TARGET_AVX512 INLINE void floats_block_512(Quad *q, const Tile *t, int b, __m512 (*sum)[QUAD],
                                           __m512i *top, Format fmt) {
    const int n = 512 / (int)step_of(fmt);      // vectors in 64 bytes
    const float *x = (const float *)t->a + (size_t)b * t->pitch * 128;
    __m512 w[QUAD][8], acc[QUAD], s = _mm512_set1_ps(1);
    if (fmt == W_FP8) s = _mm512_set1_ps(block_scale(t->w, t->row, 128 * b));
    for (int i = 0; i < QUAD; i++)
        for (int v = 0; v < 8; v += n)
            unpack_512(q->w[i] + q->at + v / n * 64, fmt, w[i] + v, &top[i]);
    for (int k = 0; k < t->T; k++, x += 128) {
        for (int i = 0; i < QUAD; i++) acc[i] = fmt == W_FP8 ? _mm512_setzero_ps() : sum[k][i];
        for (int v = 0; v < 8; v++)
            for (int i = 0; i < QUAD; i++)
                acc[i] = _mm512_fmadd_ps(w[i][v], _mm512_loadu_ps(x + 16 * v), acc[i]);
        for (int i = 0; i < QUAD; i++) sum[k][i] = onto_512(sum[k][i], acc[i], s, fmt);
    }
    quad_next(q, fmt, false);
}

TARGET_AVX512 INLINE void rows_512(const Tile *t, int r0, Format fmt) {
    const int whole = t->w->k / 128;
    __m512 sum[T_FLOATS][QUAD];
    __m512i top[QUAD];
    Quad q;
    QuadEnd end;
    quad_open(&q, t, r0, fmt, false);
    for (int i = 0; i < QUAD; i++) top[i] = _mm512_setzero_si512();
    for (int i = 0; i < QUAD * t->T; i++) sum[i / QUAD][i % QUAD] = _mm512_setzero_ps();
    for (int b = 0; b < whole; b++) floats_block_512(&q, t, b, sum, top, fmt);
    if (quad_end(&q, &end, t, fmt, false)) floats_block_512(&q, t, whole, sum, top, fmt);
    for (int i = 0; i < QUAD * t->T; i++)
        t->acc[i / QUAD * LANES + r0 + i % QUAD] = total_512(sum[i / QUAD][i % QUAD], top[i % QUAD]);
}

TARGET_AVX512 INLINE void floats_512(const Tile *t, Format fmt) {
    for (int r = 0; r < t->rows && t->T == 1; r++) row_512(t, r, fmt);
    for (int r = 0; r < t->rows && t->T > 1; r += QUAD) rows_512(t, r, fmt);
}

// The rows of one tile of a matrix of bytes (weights or scales).
typedef struct { const uint8_t *row[LANES]; size_t bytes; } Rows;   // bytes: of one row
typedef struct { const uint8_t *row[LANES]; uint8_t bytes[LANES][64]; } Edge;

INLINE Rows tile_rows(const Tile *t, const void *base, size_t bytes) {
    Rows r = { .bytes = bytes };
    for (size_t i = 0; i < LANES; i++)      // lanes without a row repeat the first
        r.row[i] = (const uint8_t *)base + ((size_t)t->row + (i < (size_t)t->rows ? i : 0)) * bytes;
    return r;
}

// A table of the rows' bytes [*off, *off + n): the rows themselves, or at their end zero-padded
// copies.
INLINE const uint8_t *const *rows_at(const Rows *w, size_t *off, size_t n, Edge *e) {
    if (*off + n <= w->bytes) return w->row;
    size_t left = *off < w->bytes ? w->bytes - *off : 0;
    for (int i = 0; i < LANES; i++) {
        memset(e->bytes[i], 0, 64);
        memcpy(e->bytes[i], w->row[i] + (left ? *off : 0), left);
        e->row[i] = e->bytes[i];
    }
    *off = 0;
    return e->row;
}

// v[j] lane r = dword j of bytes [off, off + 64) of row r
TARGET_AVX512 INLINE void read_512(const Rows *w, size_t off, Edge *edge, __m512i v[16]) {
    __m512i z[4][4];        // [row % 4][quarter]: lane = row / 4
    const uint8_t *const *p = rows_at(w, &off, 64, edge);
    for (int e = 0; e < 4; e++)
        for (int q = 0; q < 4; q++) {
            size_t at = off + 16 * (size_t)q;
            __m512i a = _mm512_castsi128_si512(_mm_loadu_si128((const void *)(p[e] + at)));
            a = _mm512_inserti32x4(a, _mm_loadu_si128((const void *)(p[4 + e] + at)), 1);
            a = _mm512_inserti32x4(a, _mm_loadu_si128((const void *)(p[8 + e] + at)), 2);
            z[e][q] = _mm512_inserti32x4(a, _mm_loadu_si128((const void *)(p[12 + e] + at)), 3);
        }
    for (int q = 0; q < 4; q++) {
        __m512i a = _mm512_unpacklo_epi32(z[0][q], z[1][q]);
        __m512i b = _mm512_unpackhi_epi32(z[0][q], z[1][q]);
        __m512i c = _mm512_unpacklo_epi32(z[2][q], z[3][q]);
        __m512i d = _mm512_unpackhi_epi32(z[2][q], z[3][q]);
        v[4 * q] = _mm512_unpacklo_epi64(a, c);
        v[4 * q + 1] = _mm512_unpackhi_epi64(a, c);
        v[4 * q + 2] = _mm512_unpacklo_epi64(b, d);
        v[4 * q + 3] = _mm512_unpackhi_epi64(b, d);
    }
}

// acc + scale * (activations' scale) * (sum of u * q + c): group g; u[j] = its dword j of 16 rows
TARGET_AVX512 INLINE __m512 group_512(const __m512i u[8], __m512 scale, const Packed *a, int g,
                                      __m512 acc) {
    const int b = g / 4 % 4;
    __m512i sum = _mm512_set1_epi32(a->c[g % 4][b]);
    for (int j = 0; j < 8; j++) {
        const int32_t *q = (const int32_t *)(const void *)(a->q[b][j / 4][g % 4] + j % 4 * 4);
        __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(u[j]), "m"(*q));
    }
    scale = _mm512_mul_ps(scale, _mm512_set1_ps(a->s[g % 4][b]));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, acc);
}

// Scale of group g (16 rows) from the transposed scales of a run of groups: 32 of BF16 or 64 of
// E8M0
TARGET_AVX512 INLINE __m512 nibble_scale_512(const __m512i *s, int g, bool fp4) {
    __m512i v = s[fp4 ? g % 64 / 4 : g % 32 / 2];
    if (fp4) {
        v = _mm512_srlv_epi32(v, _mm512_set1_epi32(g % 4 * 8));
        v = _mm512_and_si512(v, _mm512_set1_epi32(255));
        __mmask16 nan = _mm512_cmpeq_epi32_mask(v, _mm512_set1_epi32(255));
        v = _mm512_max_epu32(_mm512_slli_epi32(v, 23), _mm512_set1_epi32(0x400000));
        return _mm512_castsi512_ps(_mm512_mask_set1_epi32(v, nan, 0x7fc00000));
    }
    if (g % 2) return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
}

// With VNNI, a tile of 16 rows for many tokens: first the blocks 0 mod 4, then 1, 2, 3
TARGET_AVX512 INLINE void many_ints_512(const Tile *t, Format fmt) {
    const Mat *m = t->w;
    const bool fp4 = fmt == W_FP4, nibbles = fmt != W_INT8;
    const int per = nibbles ? 4 : 2;        // groups in 64 bytes
    const int run = fp4 ? 64 : 32;          // groups in 64 bytes of scales
    Rows w = tile_rows(t, m->w, row_bytes(m));
    Rows ws = tile_rows(t, m->s, (size_t)(m->k / 32) * (scales_of(fmt) / 4));
    Edge edge;
    float sums[T_BLOCK][4][LANES] __attribute__((aligned(64)));
    float pair[T_BLOCK][LANES];             // blocks 2 and 3
    __m512i v[16], u[8], scales[16], low = _mm512_set1_epi8(15);
    __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)e2m1_biased));
    __m512 s = _mm512_setzero_ps();
    const char *ahead = (const char *)w.row[0] + LANES * w.bytes;       // the next tile
    for (int b = 0; b < 4; b++) {
        memset(sums, 0, sizeof *sums * (size_t)t->T);
        int have = -1;                      // the run in `scales`
        for (int g0 = 4 * b; g0 < 4 * n_blocks(m); g0 += (g0 + per) % 4 ? per : per + 12) {
            if (nibbles && g0 / run != have)
                read_512(&ws, (size_t)(have = g0 / run) * 64, &edge, scales);
            read_512(&w, (size_t)(g0 / per) * 64, &edge, v);
            for (int i = 0; i < LANES; i++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
            if (!nibbles && g0 % 4 == 0) s = _mm512_set1_ps(block_scale(m, t->row, g0 * 32));
#pragma GCC unroll 4
            for (int i = 0; i < per; i++) {
                for (int j = 0; j < 4 && nibbles; j++) {
                    u[j] = _mm512_and_si512(v[4 * i + j], low);
                    u[4 + j] = _mm512_and_si512(_mm512_srli_epi16(v[4 * i + j], 4), low);
                }
                for (int j = 0; j < 8 && fp4; j++) u[j] = _mm512_shuffle_epi8(table, u[j]);
                for (int j = 0; j < 8 && !nibbles; j++)
                    u[j] = _mm512_xor_si512(v[8 * i % 16 + j], _mm512_set1_epi8(-128));
                if (nibbles) s = nibble_scale_512(scales, g0 + i, fp4);
                const Packed *a = (const Packed *)t->a + (size_t)(g0 / 16) * t->pitch;
                for (int k = 0; k < t->T; k++) {
                    float *acc = sums[k][(g0 + i) % 4];
                    _mm512_store_ps(acc, group_512(u, s, a + k, g0 + i, _mm512_load_ps(acc)));
                }
            }
        }
        for (int k = 0; k < t->T; k++) {
            __m512 x = _mm512_add_ps(_mm512_load_ps(sums[k][0]), _mm512_load_ps(sums[k][1]));
            x = _mm512_add_ps(x, _mm512_add_ps(_mm512_load_ps(sums[k][2]), _mm512_load_ps(sums[k][3])));
            float *first = t->acc + k * LANES, *to = b < 2 ? first : pair[k];
            if (b % 2) x = _mm512_add_ps(_mm512_loadu_ps(to), x);
            if (b == 3) x = _mm512_add_ps(_mm512_loadu_ps(first), x);
            _mm512_storeu_ps(b == 3 ? first : to, x);
        }
    }
}

// All rows of a tile: alone for one token, else four at a time
#define QUADS(t, TILE, ...) do { \
    for (int r_ = 0; r_ < (t)->rows && (t)->T == 1; r_++) TILE(t, r_, __VA_ARGS__, true); \
    for (int r_ = 0; r_ < (t)->rows && (t)->T > 1; r_ += QUAD) TILE(t, r_, __VA_ARGS__, false); \
} while (0)

TARGET_AVX2 static void tile_avx2(const Tile *t) {
    switch (t->w->fmt) {
    case W_INT4: QUADS(t, ints_256, W_INT4); break;
    case W_INT8: QUADS(t, ints_256, W_INT8); break;
    case W_FP4: QUADS(t, ints_256, W_FP4); break;
    case W_BF16: floats_256(t, W_BF16); break;
    case W_FP8: floats_256(t, W_FP8); break;
    default: floats_256(t, W_F32);
    }
}

TARGET_AVX512 INLINE void tile_ints_512(const Tile *t, Format fmt) {
    if (cpu_level != CPU_VNNI) QUADS(t, ints_512, fmt, false);
    else if (t->T <= FEW) QUADS(t, ints_512, fmt, true);
    else many_ints_512(t, fmt);
}

TARGET_AVX512 static void tile_avx512(const Tile *t) {
    switch (t->w->fmt) {
    case W_INT4: tile_ints_512(t, W_INT4); break;
    case W_INT8: tile_ints_512(t, W_INT8); break;
    case W_FP4: tile_ints_512(t, W_FP4); break;
    case W_BF16: floats_512(t, W_BF16); break;
    case W_FP8: floats_512(t, W_FP8); break;
    default: floats_512(t, W_F32);
    }
}
#endif

// ---------------------------------------------------------------------------
// matmul: packs the activations, cuts all products into tiles, runs them in one region

static void run_tile(const Tile *t) {
#if defined(__x86_64__)
    if (cpu_level >= CPU_AVX512) {
        tile_avx512(t);
        return;
    }
    if (cpu_level >= CPU_AVX2) {
        tile_avx2(t);
        return;
    }
#endif
    tile_portable(t);
}

// Tile number i of a job.
static void job_tile(const Job *j, int i) {
    const Product *p = &j->p;
    float acc[T_BLOCK * LANES] __attribute__((aligned(64)));
    int t0 = i / j->tiles * j->T, row = i % j->tiles * j->rows;
    Tile t = { .w = p->w, .row = row, .rows = p->w->n - row < j->rows ? p->w->n - row : j->rows,
               .T = p->T - t0 < j->T ? p->T - t0 : j->T, .pitch = (size_t)p->T, .acc = acc };
    if (takes_int8(p->w->fmt)) t.a = (const Packed *)j->a + t0;
    else t.a = (const float *)j->a + 128 * t0;
    run_tile(&t);
    for (int k = 0; k < t.T; k++)
        memcpy(p->y + (size_t)(t0 + k) * p->ldy + row, acc + k * LANES, (size_t)t.rows * 4);
}

typedef struct { Job *jobs; int n; } JobList;

static void tile_range(void *arg, int begin, int end) {
    const JobList *l = arg;
    int lo = 0, hi = l->n;
    while (hi - lo > 1) {
        int mid = (lo + hi) / 2;
        if (l->jobs[mid].first <= begin) lo = mid;
        else hi = mid;
    }
    for (int i = begin; i < end; i++) {
        while (lo + 1 < l->n && l->jobs[lo + 1].first <= i) lo++;
        job_tile(&l->jobs[lo], i - l->jobs[lo].first);
    }
}

// --exact: FP32 activations, dequantised weights, one order of summation.
static void exact_range(void *arg, int begin, int end) {
    const Product *p = arg;
    int k = p->w->k;
    float *w = xalloc((size_t)k, sizeof *w);
    for (int i = begin; i < end; i++) {
        dequant_row(p->w, i, w);
        for (int t = 0; t < p->T; t++) {
            const float *x = p->a->x + (p->rows ? (size_t)p->rows[t] : (size_t)t) * p->a->ld;
            float sum[16] = { 0 };
            int j = 0;
            for (; j + 16 <= k; j += 16)
                for (int l = 0; l < 16; l++) sum[l] += w[j + l] * x[j + l];
            for (int l = 0; j + l < k; l++) sum[l] += w[j + l] * x[j + l];
            for (int h = 8; h; h /= 2)
                for (int l = 0; l < h; l++) sum[l] += sum[l + h];
            p->y[(size_t)t * p->ldy + (size_t)i] = sum[0];
        }
    }
    free(w);
}

// Two products that can share packed activations.
static bool same_input(const Product *a, const Product *b) {
    return a->a == b->a && a->rows == b->rows && a->T == b->T && a->w->k == b->w->k &&
           a->w->fmt == b->w->fmt;
}

static size_t packed_bytes(const Product *p) {
    size_t one = takes_int8(p->w->fmt) ? (size_t)n_packed(p->w) * sizeof(Packed)
                                       : (size_t)n_blocks(p->w) * 128 * sizeof(float);
    return ((size_t)p->T * one + 63) / 64 * 64;
}

static void job_cut(const Pool *p, Job *j, int first) {
    int n = j->p.w->n, T = j->p.T, most = takes_int8(j->p.w->fmt) ? T_BLOCK : T_FLOATS;
    j->first = first;
    j->blocks = (T + most - 1) / most;
    j->T = (T + j->blocks - 1) / j->blocks;
    bool wide = cpu_level == CPU_VNNI && takes_int8(j->p.w->fmt) && j->T > FEW;
    j->rows = wide && n * (size_t)j->blocks >= (size_t)p->n_threads * 4 * LANES ? LANES : QUAD;
    j->tiles = (n + j->rows - 1) / j->rows;
}

// Every y[t][i] = sum_k W[i][k] a[t][k], the products side by side in one parallel region.
// Bit-identical for any T, position in the batch, number of threads. One call at a time per pool.
static void matmul(Pool *p, const Product *job, int n_jobs, bool exact) {
    cpu_init();
    size_t bytes = 0;
    for (int i = 0; i < n_jobs; i++) {
        if (job[i].T <= 0) continue;
        if (exact) parallel(p, job[i].w->n, 8, exact_range, (void *)(uintptr_t)&job[i]);
        bytes += packed_bytes(&job[i]);
    }
    if (exact) return;
    size_t head = ((size_t)n_jobs * sizeof(Job) + 63) / 64 * 64;
    if (head + bytes > p->scratch_bytes) {
        free(p->scratch);
        p->scratch = xalloc(p->scratch_bytes = head + bytes, 1);
    }
    JobList l = { p->scratch, 0 };
    char *free_at = (char *)p->scratch + head;
    int n = 0;
    for (int i = 0; i < n_jobs; i++) {
        if (job[i].T <= 0 || job[i].w->n <= 0) continue;
        Job *j = &l.jobs[l.n++];
        *j = (Job){ .p = job[i] };
        for (Job *o = j - 1; o >= l.jobs && !j->a; o--)
            if (same_input(&o->p, &j->p)) j->a = o->a;
        if (!j->a) {
            j->a = free_at;
            free_at += packed_bytes(&j->p);
            parallel(p, j->p.T, 8, pack_range, j);
        }
        job_cut(p, j, n);
        n += j->tiles * j->blocks;
    }
    parallel(p, n, 1, tile_range, &l);
}

// ---------------------------------------------------------------------------
// one vector against many rows (attention, index scores). Every sum in one order, whatever the
// number of rows.

// 16 partial sums, then halved: lane j + lane j+8, +4, +2, +1
static float dot_16(const float *a, const float *b, int n) {
    float s[16] = { 0 };
    for (int i = 0; i < n; i++) s[i % 16] += a[i] * b[i];
    for (int w = 8; w; w /= 2)
        for (int j = 0; j < w; j++) s[j] += s[j + w];
    return s[0];
}

#if defined(__x86_64__)
TARGET_AVX2 static void row_scores_256(const float *q, const float *rows, int n, int k, float scale,
                                       float *out) {
    for (int j = 0; j < n; j += 4) {
        __m256 lo[4], hi[4];
        const float *r[4];
        for (int i = 0; i < 4; i++) {
            r[i] = rows + (size_t)(j + i < n ? j + i : j) * (size_t)k;
            lo[i] = hi[i] = _mm256_setzero_ps();
        }
        for (int c = 0; c < k; c += 16) {
            __m256 a = _mm256_loadu_ps(q + c), b = _mm256_loadu_ps(q + c + 8);
            for (int i = 0; i < 4; i++) {
                lo[i] = _mm256_fmadd_ps(a, _mm256_loadu_ps(r[i] + c), lo[i]);
                hi[i] = _mm256_fmadd_ps(b, _mm256_loadu_ps(r[i] + c + 8), hi[i]);
            }
        }
        for (int i = 0; i < 4 && j + i < n; i++) out[j + i] = sum_16(lo[i], hi[i]) * scale;
    }
}

TARGET_AVX512 static void row_scores_512(const float *q, const float *rows, int n, int k,
                                         float scale, float *out) {
    for (int j = 0; j < n; j += 8) {
        __m512 s[8];
        const float *r[8];
        for (int i = 0; i < 8; i++) {
            r[i] = rows + (size_t)(j + i < n ? j + i : j) * (size_t)k;
            s[i] = _mm512_setzero_ps();
        }
        for (int c = 0; c < k; c += 16) {
            __m512 a = _mm512_loadu_ps(q + c);
            for (int i = 0; i < 8; i++) s[i] = _mm512_fmadd_ps(a, _mm512_loadu_ps(r[i] + c), s[i]);
        }
        for (int i = 0; i < 8 && j + i < n; i++) {
            __m256 hi = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(s[i]), 1));
            out[j + i] = sum_16(_mm512_castps512_ps256(s[i]), hi) * scale;
        }
    }
}

// `regs` vectors of o at once
TARGET_AVX2 INLINE void add_rows_256(float *o, const float *p, const float *rows, int n, int k,
                                     int regs) {
    __m256 s[8];
    for (int i = 0; i < regs; i++) s[i] = _mm256_loadu_ps(o + 8 * i);
    for (int j = 0; j < n; j++, rows += k)
        for (int i = 0; i < regs; i++)
            s[i] = _mm256_fmadd_ps(_mm256_set1_ps(p[j]), _mm256_loadu_ps(rows + 8 * i), s[i]);
    for (int i = 0; i < regs; i++) _mm256_storeu_ps(o + 8 * i, s[i]);
}

TARGET_AVX512 INLINE void add_rows_512(float *o, const float *p, const float *rows, int n, int k,
                                       int regs) {
    __m512 s[8];
    for (int i = 0; i < regs; i++) s[i] = _mm512_loadu_ps(o + 16 * i);
    for (int j = 0; j < n; j++, rows += k)
        for (int i = 0; i < regs; i++)
            s[i] = _mm512_fmadd_ps(_mm512_set1_ps(p[j]), _mm512_loadu_ps(rows + 16 * i), s[i]);
    for (int i = 0; i < regs; i++) _mm512_storeu_ps(o + 16 * i, s[i]);
}

TARGET_AVX2 static void row_sum_256(float *o, const float *p, const float *rows, int n, int k) {
    int c = 0;
    for (; c + 64 <= k; c += 64) add_rows_256(o + c, p, rows + c, n, k, 8);
    for (; c < k; c += 8) add_rows_256(o + c, p, rows + c, n, k, 1);
}

TARGET_AVX512 static void row_sum_512(float *o, const float *p, const float *rows, int n, int k) {
    int c = 0;
    for (; c + 128 <= k; c += 128) add_rows_512(o + c, p, rows + c, n, k, 8);
    for (; c < k; c += 16) add_rows_512(o + c, p, rows + c, n, k, 1);
}
#endif

// out[j] = scale * (q . rows[j]) for n rows [n, k] of FP32
static void row_scores(const float *q, const float *rows, int n, int k, float scale, float *out) {
#if defined(__x86_64__)
    if (cpu_level >= CPU_AVX2 && k % 16 == 0) {
        (cpu_level >= CPU_AVX512 ? row_scores_512 : row_scores_256)(q, rows, n, k, scale, out);
        return;
    }
#endif
    for (int j = 0; j < n; j++) out[j] = dot_16(q, rows + (size_t)j * (size_t)k, k) * scale;
}

// o [k] += sum_j p[j] * rows[j], row by row: n rows [n, k] of FP32
static void row_sum(float *o, const float *p, const float *rows, int n, int k) {
#if defined(__x86_64__)
    if (cpu_level >= CPU_AVX2 && k % 16 == 0) {
        (cpu_level >= CPU_AVX512 ? row_sum_512 : row_sum_256)(o, p, rows, n, k);
        return;
    }
#endif
    for (int j = 0; j < n; j++, rows += k)
        for (int i = 0; i < k; i++) o[i] += p[j] * rows[i];
}

// ---------------------------------------------------------------------------
// weights: one table says which tensors a checkpoint holds, their shapes and where they go. Every
// mismatch is refused.

// VEC: small, copied to FP32. MAT: BF16 or FP32 matrix, or quantised with its .scale. TABLE: I64.
typedef enum { VEC, MAT, TABLE } Kind;
// Which blocks have the tensor.
typedef enum { ALL, COMPRESSED, CSA, HASHED, SCORED } When;

typedef struct {
    // after the block's prefix; a MAT's name has no ".weight" (hc_*_fn: exactly as here)
    const char *name;
    Kind kind;
    When when;
    char rows, cols;        // letters of shape_of(); cols 0: a vector
    size_t at;              // offset in Layer, Mtp or Weights
} Bind;

#define L(field) offsetof(Layer, field)
static const Bind layer_table[] = {
    { "hc_attn_fn", MAT, ALL, 'm', 's', L(hc_attn.fn) },
    { "hc_attn_base", VEC, ALL, 'm', 0, L(hc_attn.base) },
    { "hc_attn_scale", VEC, ALL, '3', 0, L(hc_attn.scale) },
    { "attn_norm.weight", VEC, ALL, 'D', 0, L(attn_norm) },
    { "attn.wq_a", MAT, ALL, 'Q', 'D', L(wq_a) },
    { "attn.q_norm.weight", VEC, ALL, 'Q', 0, L(q_norm) },
    { "attn.wq_b", MAT, ALL, 'h', 'Q', L(wq_b) },
    { "attn.wkv", MAT, ALL, 'K', 'D', L(wkv) },
    { "attn.kv_norm.weight", VEC, ALL, 'K', 0, L(kv_norm) },
    { "attn.attn_sink", VEC, ALL, 'H', 0, L(attn_sink) },
    { "attn.compressor.wkv", MAT, COMPRESSED, 'c', 'D', L(comp.wkv) },
    { "attn.compressor.wgate", MAT, COMPRESSED, 'c', 'D', L(comp.wgate) },
    { "attn.compressor.ape", VEC, COMPRESSED, 'M', 'c', L(comp.ape) },
    { "attn.compressor.norm.weight", VEC, COMPRESSED, 'K', 0, L(comp.norm) },
    { "attn.indexer.wq_b", MAT, CSA, 'i', 'Q', L(iwq_b) },
    { "attn.indexer.weights_proj", MAT, CSA, 'I', 'D', L(iproj) },
    { "attn.indexer.compressor.wkv", MAT, CSA, 'j', 'D', L(icomp.wkv) },
    { "attn.indexer.compressor.wgate", MAT, CSA, 'j', 'D', L(icomp.wgate) },
    { "attn.indexer.compressor.ape", VEC, CSA, 'M', 'j', L(icomp.ape) },
    { "attn.indexer.compressor.norm.weight", VEC, CSA, 'J', 0, L(icomp.norm) },
    { "attn.wo_a", MAT, ALL, 'o', 'g', L(wo_a) },
    { "attn.wo_b", MAT, ALL, 'D', 'o', L(wo_b) },
    { "hc_ffn_fn", MAT, ALL, 'm', 's', L(hc_ffn.fn) },
    { "hc_ffn_base", VEC, ALL, 'm', 0, L(hc_ffn.base) },
    { "hc_ffn_scale", VEC, ALL, '3', 0, L(hc_ffn.scale) },
    { "ffn_norm.weight", VEC, ALL, 'D', 0, L(ffn_norm) },
    { "ffn.gate", MAT, ALL, 'E', 'D', L(gate) },
    { "ffn.gate.bias", VEC, SCORED, 'E', 0, L(gate_bias) },
    { "ffn.gate.tid2eid", TABLE, HASHED, 'V', 'A', L(tid2eid) },
    { "ffn.shared_experts.w1", MAT, ALL, 'F', 'D', L(sw1) },
    { "ffn.shared_experts.w2", MAT, ALL, 'D', 'F', L(sw2) },
    { "ffn.shared_experts.w3", MAT, ALL, 'F', 'D', L(sw3) },
};
#undef L
// one entry per expert: "ffn.experts.%d.w1"; at: in Mat *w[3]
static const Bind expert_table[] = {
    { "w1", MAT, ALL, 'F', 'D', offsetof(Layer, w1) },
    { "w2", MAT, ALL, 'D', 'F', offsetof(Layer, w2) },
    { "w3", MAT, ALL, 'F', 'D', offsetof(Layer, w3) },
};
static const Bind mtp_table[] = {
    { "e_proj", MAT, ALL, 'D', 'D', offsetof(Mtp, e_proj) },
    { "h_proj", MAT, ALL, 'D', 'D', offsetof(Mtp, h_proj) },
    { "enorm.weight", VEC, ALL, 'D', 0, offsetof(Mtp, enorm) },
    { "hnorm.weight", VEC, ALL, 'D', 0, offsetof(Mtp, hnorm) },
    { "norm.weight", VEC, ALL, 'D', 0, offsetof(Mtp, norm) },
    { "hc_head_fn", MAT, ALL, 'S', 's', offsetof(Mtp, hc_head.fn) },
    { "hc_head_base", VEC, ALL, 'S', 0, offsetof(Mtp, hc_head.base) },
    { "hc_head_scale", VEC, ALL, '1', 0, offsetof(Mtp, hc_head.scale) },
};
static const Bind model_table[] = {
    { "embed", MAT, ALL, 'V', 'D', offsetof(Weights, embed) },
    { "head", MAT, ALL, 'V', 'D', offsetof(Weights, head) },
    { "norm.weight", VEC, ALL, 'D', 0, offsetof(Weights, norm) },
    { "hc_head_fn", MAT, ALL, 'S', 's', offsetof(Weights, hc_head.fn) },
    { "hc_head_base", VEC, ALL, 'S', 0, offsetof(Weights, hc_head.base) },
    { "hc_head_scale", VEC, ALL, '1', 0, offsetof(Weights, hc_head.scale) },
};

static int shape_of(char letter, const Config *c, int ratio) {
    int S = c->hc_mult, overlap = ratio == 4 ? 2 : 1;
    const int size[128] = {
        ['1'] = 1, ['3'] = 3, ['D'] = c->dim, ['V'] = c->vocab,
        ['S'] = S, ['s'] = S * c->dim, ['m'] = (2 + S) * S,
        ['H'] = c->n_heads, ['K'] = c->head_dim, ['h'] = c->n_heads * c->head_dim,
        ['g'] = c->n_heads / c->o_groups * c->head_dim, ['o'] = c->o_groups * c->o_lora_rank,
        ['M'] = ratio, ['c'] = overlap * c->head_dim, ['j'] = overlap * c->index_dim,
        ['I'] = c->index_heads, ['J'] = c->index_dim, ['i'] = c->index_heads * c->index_dim,
        ['E'] = c->n_experts, ['A'] = c->n_active, ['F'] = c->expert_dim, ['Q'] = c->q_lora_rank,
    };
    return size[(unsigned char)letter];
}

typedef struct {
    const Store *store;
    const Config *c;
    Err *e;
    int bound;                      // tensors taken so far
    size_t bytes;                   // of them
    int format[N_FORMATS];          // matrices of each format
} Binder;

// Sets of dtypes.
enum { F32 = 1 << DT_F32, BF16 = 1 << DT_BF16, I8 = 1 << DT_I8, I64 = 1 << DT_I64,
       FP8 = 1 << DT_F8_E4M3, E8M0 = 1 << DT_F8_E8M0 };

// cols 0: a vector.
static bool tensor_is(const Tensor *t, int types, int rows, int cols) {
    return types >> t->dtype & 1 && t->rank == (cols ? 2 : 1) && t->shape[0] == rows &&
           (!cols || t->shape[1] == cols);
}

static const Tensor *store_find(const Store *s, const char *name) {
    return store_find_span(s, span_of(name));
}

// The tensor of that name. NULL and an error if it is missing or is something else.
static const Tensor *need(Binder *b, const char *name, int types, int rows, int cols) {
    const Tensor *t = store_find(b->store, name);
    char want[80], found[256], *p = want;
    if (!t)
        fail(b->e, "tensor %s is missing (of %zu tensors found): is the download complete?", name,
             b->store->n);
    else if (!tensor_is(t, types, rows, cols)) {
        for (int i = 0; i < N_DTYPES; i++)
            if (types >> i & 1) p += sprintf(p, "%s%s", p > want ? " or " : "", dtypes[i].name);
        sprintf(p, cols ? " [%d, %d]" : " [%d]", rows, cols);
        fail(b->e, "%s: tensor %s: expected %s, found %s", b->store->shards[t->shard].path, name,
             want, tensor_kind(t, found));
        t = NULL;
    } else {
        b->bound++;
        b->bytes += t->bytes;
    }
    return t;
}

// Data at an address that does not suit its element type is copied (legal in a file, slow and
// undefined in C).
static const void *aligned_data(const Tensor *t) {
    size_t align = (size_t)dtypes[t->dtype].bits / 8;
    return (uintptr_t)t->data % align ? memcpy(xalloc(t->bytes, 1), t->data, t->bytes) : t->data;
}

static bool bind_vec(Binder *b, const char *name, int rows, int cols, float **to) {
    const Tensor *t = need(b, name, F32 | BF16, rows, cols);
    if (!t) return false;
    size_t n = (size_t)rows * (cols ? cols : 1);
    float *x = *to = xalloc(n, sizeof *x);
    if (t->dtype == DT_F32) memcpy(x, t->data, t->bytes);
    for (size_t i = 0; i < n; i++) {
        bf16 h;
        if (t->dtype == DT_BF16) memcpy(&h, t->data + 2 * i, 2), x[i] = f32_of_bf16(h);
        if (!isfinite(x[i]))
            return fail(b->e, "%s: tensor %s: element %zu is not finite",
                        b->store->shards[t->shard].path, name, i);
    }
    return true;
}

static bool bind_table(Binder *b, const char *name, int rows, int cols, const int64_t **to) {
    const Tensor *t = need(b, name, I64, rows, cols);
    if (t) *to = aligned_data(t);
    return t;
}

// Every token's experts must exist. Reads the whole table (1 to 6 MB), so only before running.
static bool check_table(const Config *c, const Layer *l, Err *e) {
    for (size_t i = 0; l->tid2eid && i < (size_t)c->vocab * c->n_active; i++) {
        int64_t x = l->tid2eid[i];
        if (x < 0 || x >= c->n_experts)
            return fail(e, "%s.ffn.gate.tid2eid: token %zu: expert %lld does not exist (0 to %d "
                        "do)", l->name, i / c->n_active, (long long)x, c->n_experts - 1);
    }
    return true;
}

// Finds out a matrix's format from the dtypes and shapes of `name`.weight and `name`.scale (a name
// that ends in _fn is the tensor itself).
static bool bind_mat(Binder *b, const char *name, int n, int k, Mat *m) {
    char full[160];
    bool bare = strlen(name) > 3 && !strcmp(name + strlen(name) - 3, "_fn");
    snprintf(full, sizeof full, "%s%s", name, bare ? "" : ".weight");
    const Tensor *t = store_find(b->store, full), *s;
    bool nibbles = !bare && k % 32 == 0 && t && tensor_is(t, I8, n, k / 2);
    int types = nibbles ? I8 : bare ? F32 | BF16 : F32 | BF16 | I8 | FP8;
    if (!(t = need(b, full, types, n, nibbles ? k / 2 : k))) return false;
    m->n = n;
    m->k = k;
    m->w = aligned_data(t);
    m->fmt = t->dtype == DT_F32 ? W_F32 : t->dtype == DT_BF16 ? W_BF16 :
             t->dtype == DT_I8 ? W_INT8 : W_FP8;
    if (m->fmt == W_INT8 || m->fmt == W_FP8) {
        snprintf(full, sizeof full, "%s.scale", name);
        if (nibbles) s = need(b, full, BF16 | E8M0, n, k / 32);
        else s = need(b, full, m->fmt == W_INT8 ? BF16 : E8M0, (n + 127) / 128, (k + 127) / 128);
        if (!s) return false;
        if (nibbles) m->fmt = s->dtype == DT_BF16 ? W_INT4 : W_FP4;
        m->s = aligned_data(s);
    }
    b->format[m->fmt]++;
    return true;
}

static bool bind_one(Binder *b, const Bind *row, const char *prefix, int ratio, void *to) {
    char name[120];
    int rows = shape_of(row->rows, b->c, ratio);
    int cols = row->cols ? shape_of(row->cols, b->c, ratio) : 0;
    snprintf(name, sizeof name, "%s%s", prefix, row->name);
    return row->kind == VEC ? bind_vec(b, name, rows, cols, to) :
           row->kind == MAT ? bind_mat(b, name, rows, cols, to) :
           bind_table(b, name, rows, cols, to);
}

static bool bind_list(Binder *b, const Bind *table, size_t n, const char *prefix, int ratio,
                      bool hashed, void *to) {
    bool has[] = { [ALL] = true, [COMPRESSED] = ratio > 0, [CSA] = ratio == 4, [HASHED] = hashed,
                   [SCORED] = !hashed };
    for (const Bind *row = table; row < table + n; row++)
        if (has[row->when] && !bind_one(b, row, prefix, ratio, (char *)to + row->at)) return false;
    return true;
}

static bool bind_block(Binder *b, Layer *l, const char *name, int ratio, bool hashed) {
    char prefix[64];
    size_t before = b->bytes;
    snprintf(l->name, sizeof l->name, "%s", name);
    snprintf(prefix, sizeof prefix, "%s.", name);
    l->ratio = ratio;
    l->comp.ratio = l->icomp.ratio = ratio;
    l->comp.out = b->c->head_dim;
    l->icomp.out = b->c->index_dim;
    if (!bind_list(b, layer_table, COUNT(layer_table), prefix, ratio, hashed, l)) return false;
    size_t dense = b->bytes;
    for (size_t i = 0; i < COUNT(expert_table); i++) {
        Mat *m = xalloc((size_t)b->c->n_experts, sizeof *m);
        memcpy((char *)l + expert_table[i].at, &m, sizeof m);
        for (int e = 0; e < b->c->n_experts; e++) {
            snprintf(prefix, sizeof prefix, "%s.ffn.experts.%d.", name, e);
            if (!bind_one(b, expert_table + i, prefix, ratio, m + e)) return false;
        }
    }
    l->bytes = b->bytes - before;
    l->expert_bytes = b->bytes - dense;
    return true;
}

static bool store_has(const Store *s, const char *prefix) {
    size_t n = strlen(prefix);
    for (size_t i = 0; i < s->n; i++)
        if (s->tensors[i].name.n > n && !memcmp(s->tensors[i].name.p, prefix, n)) return true;
    return false;
}

// The layer of a tensor "layers.N. ..."; -1: of none
static int layer_number(Span name) {
    char start[16];             // "layers.", and at most 8 digits
    int layer;
    snprintf(start, sizeof start, "%.*s", SHOWN(name));
    return sscanf(start, "layers.%d", &layer) == 1 ? layer : -1;
}

// A layer that config.json does not know of means that the two do not belong together.
static bool check_layers(const Binder *b) {
    for (size_t i = 0; i < b->store->n; i++) {
        Span name = b->store->tensors[i].name;
        if (layer_number(name) >= b->c->n_layers)
            return fail(b->e, "config.json: num_hidden_layers is %d, but the checkpoint has %.*s",
                        b->c->n_layers, SHOWN(name));
    }
    return true;
}

// Binds all tensors of the model. The MTP layers are bound if the checkpoint has them (dspark
// releases: another kind).
static bool weights_bind(Weights *w, Binder *b) {
    const Config *c = b->c;
    char name[64];
    if (!check_layers(b)) return false;
    w->layers = xalloc((size_t)c->n_layers, sizeof *w->layers);
    if (!bind_list(b, model_table, COUNT(model_table), "", 0, false, w)) return false;
    if (w->embed.fmt != W_BF16 && w->embed.fmt != W_F32)
        return fail(b->e, "embed.weight: expected BF16 or F32");
    for (int i = 0; i < c->n_layers; i++) {
        snprintf(name, sizeof name, "layers.%d", i);
        if (!bind_block(b, w->layers + i, name, c->ratio[i], i < c->n_hash_layers)) return false;
    }
    if (!c->n_mtp || c->dspark || !store_has(b->store, "mtp.")) return true;
    w->mtp = xalloc((size_t)c->n_mtp, sizeof *w->mtp);
    for (int i = 0; i < c->n_mtp; i++) {
        size_t before = b->bytes;
        snprintf(name, sizeof name, "mtp.%d", i);
        if (!bind_block(b, &w->mtp[i].block, name, c->ratio[c->n_layers + i], false)) return false;
        snprintf(name, sizeof name, "mtp.%d.", i);
        if (!bind_list(b, mtp_table, COUNT(mtp_table), name, 0, false, w->mtp + i)) return false;
        w->mtp[i].block.bytes = b->bytes - before;
    }
    return true;
}

// The rotation per position of each pair of rope dims (spec 3), [R/2]. Compressed layers use their
// own theta and YaRN.
static float *rope_frequencies(const Config *c, bool compressed) {
    int R = c->rope_dim;
    float *f = xalloc((size_t)R / 2, sizeof *f);
    double theta = compressed ? c->compress_theta : c->rope_theta, edge[2];
    double beta[2] = { c->yarn_beta_fast, c->yarn_beta_slow };
    for (int i = 0; i < 2; i++)
        edge[i] = R * log(c->yarn_ctx / (2 * M_PI * beta[i])) / (2 * log(theta));
    double lo = fmax(floor(edge[0]), 0), hi = fmin(ceil(edge[1]), R - 1);
    for (int i = 0; i < R / 2; i++) {
        double g = pow(theta, -2.0 * i / R);
        double ramp = fmin(fmax((i - lo) / (hi == lo ? 0.001 : hi - lo), 0), 1);
        f[i] = (float)(compressed ? g / c->yarn_factor * ramp + g * (1 - ramp) : g);
    }
    return f;
}
// ---------------------------------------------------------------------------
// devices: the short list of operations the forward pass is written over. The CPU's are C functions
// in this file, CUDA's are launches of the kernels of the same names in kernels.cu.

typedef struct Device Device;

// Every operation works on the T rows given to begin(), in the device's own buffers. -> names the
// buffers written; in brackets: the section of the model's description. Errors end the process.
typedef struct {
    void (*begin)(Device *d, const Row *rows, int T);              // the batch of the next calls
    void (*embed)(Device *d);                                      // X[t,s] = embed[token]  (1)
    void (*streams_in)(Device *d, const float *X);                 // host X [T, S, D] -> X, later
    void (*settle)(Device *d);                                     // waits until that X was read
    void (*streams_out)(Device *d, float *X);                      // X -> host X, and waits for it
    void (*hc_pre)(Device *d, const Hyper *h, const float *norm);  // X -> x, post, comb  (2)
    void (*hc_post)(Device *d);             // X[k] = post[k] y + sum_j comb[j][k] X[j]
    void (*attn_project)(Device *d, const Layer *l);        // x -> qr, kv, compressor, index weights
    void (*attn_latent)(Device *d, const Layer *l, int i);  // norms; kv -> ring; compress  (4, 5)
    void (*attn_query)(Device *d, const Layer *l);          // qr -> q, index q: norm, rope  (4, 6)
    void (*index_topk)(Device *d, const Layer *l, int i);   // index q, keys -> chosen rows  (6)
    void (*attend)(Device *d, const Layer *l, int i);       // q, caches -> o, inverse rope  (4.3-6)
    void (*attn_out)(Device *d, const Layer *l);            // o -> u -> y  (4.7)
    void (*route)(Device *d, const Layer *l);               // x -> experts and weights  (7.1-7.3)
    void (*experts)(Device *d, const Layer *l);             // x -> y: routed and shared  (7.4, 7.5)
    void (*mtp_in)(Device *d, const Mtp *m);                // X, next -> X  (10)
    void (*head)(Device *d, const Hyper *h, const float *norm, const int *want, int n,
                 float *logits);                            // rows want[n] -> host [n, V]  (1, 2.5)
    void (*cache_new)(Device *d, int slot);                 // empty caches of a new session
    void (*cache_free)(Device *d, int slot);
    // bytes of a part of cache i (0: win, comp, ikeys, cin, icin) from its byte `at` on, to or from
    // the host
    void (*cache_copy)(Device *d, int slot, int i, int part, size_t at, void *host, size_t bytes,
                       bool save);
} Ops;

// A stage: the layers [first, last) on one device, with everything they need there. i in the calls
// above counts a stage's layers from 0; the MTP layers come after them on the last stage.
struct Device {
    char name[24];              // "cpu", "cpu:0", "cuda:0"
    int ordinal;                // of the GPU, -1: the CPU
    int node;                   // of memory (NUMA) that the CPU keeps to, -1: all
    size_t memory;              // free bytes of the GPU before anything was loaded, 0: the CPU
    const Ops *op;
    const Config *c;
    Weights w;                  // pointers valid on the device; only this stage's layers are set
    int first, last;
    bool has_head;              // also runs head and MTP
    bool exact;
    int max_rows;               // T at most
    int ring, cring[129];       // slots of the window ring; of the compressors' rings, by M
    float *inv_freq[2];         // [R/2] host copies: rotation per position for M = 0, M > 0 (YaRN)
    int ctx;                    // positions a session can hold
    Cache *cache[64];           // [slot][layer of this stage]
    const char *at;             // what is being computed ("layers.7", "head"), for errors
    void *impl;                 // Run (CPU) or Cuda
};
// ---------------------------------------------------------------------------
// the CPU's operations: the specification in code. Every output has one fixed order of summation,
// so results do not depend on the number of threads, the batch or the chunk. Fast path: products on
// INT8 activations, caches in BF16, Q, P and index q rounded to BF16. With --exact: FP32
// everywhere.

// One matrix's share of a batch: an expert's entries, or an output group.
typedef struct { int expert, start, n; Mat w; Act a; } Part;

// Buffers for T <= max_rows rows.
typedef struct {
    Pool *pool;
    const Row *rows;            // [T]
    int T;
    float *rot[2];              // [T, R/2, 2] cos, sin at each row's position: [0] M = 0, [1] M > 0
    float *X;                   // [T, S, D] the hyper-connection streams
    float *mix;                 // [T, (2+S)*S]
    float *post, *comb;         // [T, S], [T, S, S]
    Act x;                      // [T, D] input of attention and experts
    float *y;                   // [T, D] their output
    Act qr;                     // [T, Q]
    float *kv;                  // [T, K]
    float *cin, *icin;          // [T, 2, c*K], [T, 2, c*J] compressor inputs
    float *q;                   // [T, H, K]
    float *iq, *iw;             // [T, I, J], [T, I] index queries and weights
    float *iscore;              // [slab, keys] index scores, INDEX_SCORES at most
    int *top, *n_top;           // [T, topk], [T] compressed rows each row may see
    Act o;                      // [T, G, H*K/G]
    Act u;                      // [T, G*L]
    float *gate;                // [T, E]
    int *expert;                // [T, A]
    float *weight;              // [T, A]
    int *count;                 // [E]
    // [T*A] where each (row, choice) stands in the list sorted by expert
    int *place;
    // [(A+1)*T] the row of each entry of that list, the shared expert's entries last
    int *entry_row;
    float *entry_weight;        // [(A+1)*T] its route weight
    float *g, *v;               // [(A+1)*T, F] w1 x, w3 x
    Act h;                      // [(A+1)*T, F]
    float *ye;                  // [(A+1)*T, D] each expert's contribution
    Part *part;                 // [parts] of the experts, or of wo_a
    Product *job;               // [2 * parts]
    Act emb, streams;           // [T, D], [T*S, D] MTP: normed next embeddings, normed streams
    float *e;                   // [T, D] MTP: projected embeddings
    Act heads;                  // [T, D] input of the head
} Run;

// What a parallel region needs to know; begin..end are its items.
typedef struct {
    Device *d;
    Run *r;
    const Config *c;
    const Layer *l;
    Cache *const *cache;        // [slot] of this layer: cache[slot] + i
    int i;
    const Hyper *hyper;
    const float *norm;
    const Mtp *mtp;
    const int *want;
    Act *act;                   // to be quantised
    int from, keys, chunk;      // index scores: first row of the slab, keys at most, keys per item
} Task;

static Task task(Device *d, const Layer *l, int i) {
    return (Task){ .d = d, .r = d->impl, .c = d->c, .l = l, .cache = d->cache, .i = i };
}

enum {
    MAX_HEAD_DIM = 4096,        // head_dim and index_head_dim
    MAX_STREAMS = 16,           // hc_mult
    COLUMNS = 512,              // of the streams that one item mixes
    HEAD_BLOCK = 16,            // heads of one item: they share the FP32 copy of a cached row
    ROW_BLOCK = 8,              // cached rows that are expanded at once
};
static const size_t INDEX_SCORES = 4 << 20;     // index scores held at once

// --- small maths on one row

// 16 partial sums, then pairwise: one order on every machine.
static float dot(const float *a, const float *b, int n) {
    float s[16] = { 0 };
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) s[j] += a[i + j] * b[i + j];
    for (int j = 0; i < n; i++, j++) s[j] += a[i] * b[i];
    for (int w = 8; w; w /= 2)
        for (int j = 0; j < w; j++) s[j] += s[j + w];
    return s[0];
}

// y += a x
static void axpy(float *y, float a, const float *x, int n) {
    for (int i = 0; i < n; i++) y[i] += a * x[i];
}

// y = w * x / sqrt(mean(x^2) + eps); w may be NULL (no weight)
static void rms_norm(float *y, const float *x, const float *w, int n, float eps) {
    float scale = 1.0f / sqrtf(dot(x, x, n) / n + eps);
    for (int i = 0; i < n; i++) y[i] = x[i] * scale * (w ? w[i] : 1.0f);
}

static float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Rotates the pairs (v[2i], v[2i+1]) of the R rope dims by the angles in rot [R/2, 2]; sign -1:
// back.
static void rope(float *v, const float *rot, int R, float sign) {
    for (int i = 0; i < R / 2; i++) {
        float a = v[2 * i], b = v[2 * i + 1], cs = rot[2 * i], sn = rot[2 * i + 1] * sign;
        v[2 * i] = a * cs - b * sn;
        v[2 * i + 1] = a * sn + b * cs;
    }
}

static void rope_angles(float *rot, const float *inv_freq, int R, int pos) {
    for (int i = 0; i < R / 2; i++) {
        float angle = (float)pos * inv_freq[i];
        rot[2 * i] = cosf(angle);
        rot[2 * i + 1] = sinf(angle);
    }
}

// Quantises row t of a (all its segments) for the integer products. The exact path uses a->x only.
static void act_quantise(const Device *d, Act *a, int t) {
    if (d->exact) return;
    int segments = (int)(a->lds / a->groups);
    for (int i = 0; i < segments; i++)
        quantise(a->x + t * a->ld + (size_t)i * a->k, a->k,
                 a->q + t * a->ldq + (size_t)i * a->groups * 32,
                 a->s + t * a->lds + (size_t)i * a->groups);
}

static Act act_new(const Device *d, int rows, int k, int segments) {
    Act a = { .k = k, .groups = (k + 31) / 32, .ld = (size_t)k * segments };
    a.lds = (size_t)a.groups * segments;
    a.ldq = a.lds * 32;
    a.x = xalloc(a.ld * rows, sizeof *a.x);
    if (d->exact) return a;
    a.q = xalloc(a.ldq * rows, 1);
    a.s = xalloc(a.lds * rows, sizeof *a.s);
    return a;
}

// The columns of one segment, in every row.
static Act act_segment(const Act *a, int i) {
    Act v = *a;
    v.x += (size_t)i * a->k;
    if (a->q) v.q += (size_t)i * a->groups * 32, v.s += (size_t)i * a->groups;
    return v;
}

// The rows from `row` on.
static Act act_rows(const Act *a, int row) {
    Act v = *a;
    v.x += (size_t)row * a->ld;
    if (a->q) v.q += (size_t)row * a->ldq, v.s += (size_t)row * a->lds;
    return v;
}

// Bytes of a matrix and its scales as stored; an absent one has none.
static size_t mat_bytes(const Mat *m) {
    size_t n = (size_t)m->n, k = (size_t)m->k, groups = n * (k / 32);
    size_t blocks = (n + 127) / 128 * ((k + 127) / 128);
    size_t scales[N_FORMATS] = { 0, 0, 2 * blocks, 2 * groups, blocks, groups };
    return m->w ? n * row_bytes(m) + scales[m->fmt] : 0;
}

// Rows [row, row + n) of a matrix. Of a block-scaled one they must begin a scale block or lie
// within one.
static Mat mat_rows(const Mat *w, int row, int n) {
    size_t groups = (size_t)w->k / 32, blocks = ((size_t)w->k + 127) / 128, first = (size_t)row;
    size_t scales[N_FORMATS] = { 0, 0, first / 128 * blocks * 2, first * groups * 2,
                                 first / 128 * blocks, first * groups };
    Mat m = *w;
    m.n = n;
    m.w = (const uint8_t *)w->w + first * row_bytes(w);
    if (w->s) m.s = (const uint8_t *)w->s + scales[w->fmt];
    return m;
}

// Rows of the caches: BF16, or FP32 on the exact path.
static size_t kv_bytes(const Device *d, int n) { return (size_t)n * (d->exact ? 4 : 2); }

static void row_put(const Device *d, void *rows, size_t i, const float *x, int n) {
    if (d->exact) memcpy((float *)rows + i * n, x, 4 * (size_t)n);
    else for (int j = 0; j < n; j++) ((bf16 *)rows)[i * n + j] = bf16_of_f32(x[j]);
}

// Row i as FP32 in x [n].
static void row_get(const Device *d, const void *rows, size_t i, int n, float *x) {
    if (d->exact) memcpy(x, (const float *)rows + i * n, 4 * (size_t)n);
    else for (int j = 0; j < n; j++) x[j] = f32_of_bf16(((const bf16 *)rows)[i * n + j]);
}

// On the fast path what attention and the indexer multiply is rounded to BF16 on every device.
static void round_row(const Device *d, float *x, int n) {
    if (!d->exact) for (int j = 0; j < n; j++) x[j] = f32_of_bf16(bf16_of_f32(x[j]));
}

// --- hyper-connections (mHC, spec 2)

// Makes C [S, S] doubly stochastic: softmax over rows, then columns and rows are normalised in
// turn.
static void sinkhorn(float *C, int S, int iters, float eps) {
    for (int j = 0; j < S; j++) {
        float m = C[j * S], sum = 0;
        for (int k = 1; k < S; k++) m = fmaxf(m, C[j * S + k]);
        for (int k = 0; k < S; k++) sum += C[j * S + k] = expf(C[j * S + k] - m);
        for (int k = 0; k < S; k++) C[j * S + k] = C[j * S + k] / sum + eps;
    }
    for (int it = 0; it < iters; it++) {
        for (int j = 0; it && j < S; j++) {
            float sum = eps;
            for (int k = 0; k < S; k++) sum += C[j * S + k];
            for (int k = 0; k < S; k++) C[j * S + k] /= sum;
        }
        for (int k = 0; k < S; k++) {
            float sum = eps;
            for (int j = 0; j < S; j++) sum += C[j * S + k];
            for (int j = 0; j < S; j++) C[j * S + k] /= sum;
        }
    }
}

// y = sum_s pre[s] X[s], pre = sigmoid(mix * scale + base) + hc_eps
static void hc_mix(float *y, const float *X, const float *mix, const Hyper *h, const Config *c) {
    for (int s = 0; s < c->hc_mult; s++) {
        float pre = sigmoid(mix[s] * h->scale[0] + h->base[s]) + c->hc_eps;
        for (int i = 0; i < c->dim; i++) {
            float v = pre * X[(size_t)s * c->dim + i];
            y[i] = s ? y[i] + v : v;
        }
    }
}

// mix [n] /= rms of the row's streams
static void hc_scale(const Device *d, float *mix, int n, const float *X) {
    int len = d->c->hc_mult * d->c->dim;
    float mean = dot(X, X, len) / len;
    if (!isfinite(mean))
        die(1, "%s: the output is not finite (run `dsv4 verify` on the checkpoint)", d->at);
    float scale = 1.0f / sqrtf(mean + d->c->norm_eps);
    for (int i = 0; i < n; i++) mix[i] *= scale;
}

static void hc_pre_rows(void *arg, int begin, int end) {
    Task *k = arg;
    Run *r = k->r;
    int S = k->c->hc_mult, D = k->c->dim, n = (2 + S) * S;
    for (int t = begin; t < end; t++) {
        const float *X = r->X + (size_t)t * S * D, *base = k->hyper->base, *scale = k->hyper->scale;
        float *mix = r->mix + (size_t)t * n, *x = r->x.x + t * r->x.ld,
              *C = r->comb + (size_t)t * S * S;
        hc_scale(k->d, mix, n, X);
        hc_mix(x, X, mix, k->hyper, k->c);
        for (int s = 0; s < S; s++)
            r->post[t * S + s] = 2 * sigmoid(mix[S + s] * scale[1] + base[S + s]);
        for (int i = 0; i < S * S; i++) C[i] = mix[2 * S + i] * scale[2] + base[2 * S + i];
        sinkhorn(C, S, k->c->hc_iters, k->c->hc_eps);
        rms_norm(x, x, k->norm, D, k->c->norm_eps);
        act_quantise(k->d, &r->x, t);
    }
}

static Act streams_act(const Run *r, const Config *c) {
    int n = c->hc_mult * c->dim;
    return (Act){ .x = r->X, .k = n, .ld = (size_t)n };
}

static void cpu_hc_pre(Device *d, const Hyper *h, const float *norm) {
    Task k = task(d, NULL, 0);
    Act X = streams_act(k.r, k.c);
    k.hyper = h;
    k.norm = norm;
    matmul(k.r->pool, &(Product){ &h->fn, &X, NULL, k.r->T, k.r->mix, (size_t)h->fn.n }, 1,
           d->exact);
    parallel(k.r->pool, k.r->T, 1, hc_pre_rows, &k);
}

// X'[k] = post[k] y + sum_j comb[j][k] X[j]: the sum runs over comb's first index. Items: T rows
// times column blocks.
static void hc_post_columns(void *arg, int begin, int end) {
    Task *k = arg;
    Run *r = k->r;
    int S = k->c->hc_mult, D = k->c->dim, blocks = (D + COLUMNS - 1) / COLUMNS;
    float in[MAX_STREAMS][COLUMNS];
    for (int item = begin; item < end; item++) {
        int t = item / blocks, at = item % blocks * COLUMNS,
            n = D - at < COLUMNS ? D - at : COLUMNS;
        float *X = r->X + (size_t)t * S * D + at;
        const float *C = r->comb + (size_t)t * S * S, *y = r->y + (size_t)t * D + at;
        for (int j = 0; j < S; j++) memcpy(in[j], X + (size_t)j * D, sizeof *X * (size_t)n);
        for (int s = 0; s < S; s++, X += D) {
            for (int i = 0; i < n; i++) X[i] = r->post[t * S + s] * y[i];
            for (int j = 0; j < S; j++) axpy(X, C[j * S + s], in[j], n);
        }
    }
}

static void cpu_hc_post(Device *d) {
    Task k = task(d, NULL, 0);
    int blocks = (d->c->dim + COLUMNS - 1) / COLUMNS;
    parallel(k.r->pool, k.r->T * blocks, 1, hc_post_columns, &k);
}

// --- attention (spec 4 to 6)

// Everything that is a product with x: q and kv latents, compressor inputs, the indexer's weights.
static void cpu_attn_project(Device *d, const Layer *l) {
    Run *r = d->impl;
    const Config *c = d->c;
    Product p[7];
    int n = 0;
    p[n++] = (Product){ &l->wq_a, &r->x, NULL, r->T, r->qr.x, r->qr.ld };
    p[n++] = (Product){ &l->wkv, &r->x, NULL, r->T, r->kv, (size_t)c->head_dim };
    if (l->ratio) {
        size_t ck = (size_t)l->comp.wkv.n;
        p[n++] = (Product){ &l->comp.wkv, &r->x, NULL, r->T, r->cin, 2 * ck };
        p[n++] = (Product){ &l->comp.wgate, &r->x, NULL, r->T, r->cin + ck, 2 * ck };
    }
    if (l->ratio == 4) {
        size_t cj = (size_t)l->icomp.wkv.n;
        p[n++] = (Product){ &l->icomp.wkv, &r->x, NULL, r->T, r->icin, 2 * cj };
        p[n++] = (Product){ &l->icomp.wgate, &r->x, NULL, r->T, r->icin + cj, 2 * cj };
        p[n++] = (Product){ &l->iproj, &r->x, NULL, r->T, r->iw, (size_t)c->index_heads };
    }
    matmul(r->pool, p, n, d->exact);
}

// A row's compressor inputs go to the ring, the position's ape added to the gate half.
static void compress_store(const Compressor *m, float *ring, int slots, const float *in, int pos) {
    size_t n = (size_t)m->wkv.n;
    float *to = ring + (size_t)(pos % slots) * 2 * n;
    const float *ape = m->ape + (size_t)(pos % m->ratio) * n;
    memcpy(to, in, n * sizeof *to);
    for (size_t i = 0; i < n; i++) to[n + i] = in[n + i] + ape[i];
}

// Pools the window that ends at pos into out [m->out]: per channel a softmax over the candidates'
// gates weighs their kv. With overlap (M = 4) the first half of the channels speaks for the window
// before.
static void compress_pool(const Compressor *m, const float *ring, int slots, int pos, float *out) {
    int n = m->wkv.n, overlap = n > m->out, start = pos - m->ratio + 1;
    int first = overlap && start ? start - m->ratio : start;
    float max[MAX_HEAD_DIM], sum[MAX_HEAD_DIM];
    for (int i = 0; i < m->out; i++) {
        max[i] = -INFINITY;
        sum[i] = out[i] = 0;
    }
    for (int p = first; p <= pos; p++) {
        const float *gate =
            ring + ((size_t)(p % slots) * 2 + 1) * n + (overlap && p >= start ? m->out : 0);
        for (int i = 0; i < m->out; i++) max[i] = fmaxf(max[i], gate[i]);
    }
    for (int p = first; p <= pos; p++) {
        const float *kv = ring + (size_t)(p % slots) * 2 * n + (overlap && p >= start ? m->out : 0);
        for (int i = 0; i < m->out; i++) {
            float e = expf(kv[n + i] - max[i]);
            sum[i] += e;
            out[i] += e * kv[i];
        }
    }
    for (int i = 0; i < m->out; i++) out[i] /= sum[i];
}

// If the row at pos completes a window: pool, norm, rope at the window's START, append to `rows`.
static void compress_emit(Task *k, const Compressor *m, const float *ring, void *rows, int pos) {
    int M = m->ratio, R = k->c->rope_dim;
    float out[MAX_HEAD_DIM], rot[MAX_HEAD_DIM];
    if ((pos + 1) % M) return;
    compress_pool(m, ring, k->d->cring[M], pos, out);
    rms_norm(out, out, m->norm, m->out, k->c->norm_eps);
    rope_angles(rot, k->d->inv_freq[1], R, pos + 1 - M);
    rope(out + m->out - R, rot, R, 1);
    row_put(k->d, rows, (size_t)(pos / M), out, m->out);
}

static void latent_store_rows(void *arg, int begin, int end) {
    Task *k = arg;
    Run *r = k->r;
    const Layer *l = k->l;
    int K = k->c->head_dim, R = k->c->rope_dim;
    float eps = k->c->norm_eps;
    for (int t = begin; t < end; t++) {
        const Row *row = r->rows + t;
        const Cache *cache = k->cache[row->slot] + k->i;
        float *qr = r->qr.x + t * r->qr.ld, *kv = r->kv + (size_t)t * K;
        rms_norm(qr, qr, l->q_norm, k->c->q_lora_rank, eps);
        act_quantise(k->d, &r->qr, t);
        rms_norm(kv, kv, l->kv_norm, K, eps);
        rope(kv + K - R, r->rot[l->ratio != 0] + (size_t)t * R, R, 1);
        row_put(k->d, cache->win, (size_t)(row->pos % k->d->ring), kv, K);
        if (l->ratio)
            compress_store(&l->comp, cache->cin, k->d->cring[l->ratio],
                           r->cin + (size_t)t * 2 * l->comp.wkv.n, row->pos);
        if (l->ratio == 4)
            compress_store(&l->icomp, cache->icin, k->d->cring[4],
                           r->icin + (size_t)t * 2 * l->icomp.wkv.n, row->pos);
    }
}

static void latent_emit_rows(void *arg, int begin, int end) {
    Task *k = arg;
    for (int t = begin; t < end; t++) {
        const Row *row = k->r->rows + t;
        const Cache *cache = k->cache[row->slot] + k->i;
        compress_emit(k, &k->l->comp, cache->cin, cache->comp, row->pos);
        if (k->l->ratio == 4) compress_emit(k, &k->l->icomp, cache->icin, cache->ikeys, row->pos);
    }
}

static void cpu_attn_latent(Device *d, const Layer *l, int i) {
    Task k = task(d, l, i);
    parallel(k.r->pool, k.r->T, 1, latent_store_rows, &k);
    if (l->ratio) parallel(k.r->pool, k.r->T, 1, latent_emit_rows, &k);
}

// Items: T * H heads of q, then (M = 4) T * I heads of the index query.
static void query_heads(void *arg, int begin, int end) {
    Task *k = arg;
    Run *r = k->r;
    const Config *c = k->c;
    int H = c->n_heads, R = c->rope_dim, TH = r->T * H;
    const float *rot = r->rot[k->l->ratio != 0];
    for (int i = begin; i < end; i++) {
        bool index = i >= TH;
        int j = index ? i - TH : i, n = index ? c->index_dim : c->head_dim;
        int t = j / (index ? c->index_heads : H);
        float *q = (index ? r->iq : r->q) + (size_t)j * n;
        if (!index) rms_norm(q, q, NULL, n, c->norm_eps);
        rope(q + n - R, rot + (size_t)t * R, R, 1);
        round_row(k->d, q, n);
    }
}

static void cpu_attn_query(Device *d, const Layer *l) {
    Task k = task(d, l, 0);
    const Config *c = d->c;
    Run *r = k.r;
    bool index = l->ratio == 4;
    Product p[2] = { { &l->wq_b, &r->qr, NULL, r->T, r->q, (size_t)c->n_heads * c->head_dim },
                     { &l->iwq_b, &r->qr, NULL, r->T, r->iq,
                       (size_t)c->index_heads * c->index_dim } };
    matmul(r->pool, p, 1 + index, d->exact);
    parallel(r->pool, r->T * (c->n_heads + (index ? c->index_heads : 0)), 4, query_heads, &k);
}

// Compressed rows that a query at pos may see: those whose window is complete.
static int n_visible(int pos, int ratio) { return ratio ? (pos + 1) / ratio : 0; }

// score[w] = sum_h wt[h] relu(q[h] . key[w]); items are (row of the slab, chunk of keys).
static void index_scores(void *arg, int begin, int end) {
    Task *k = arg;
    Run *r = k->r;
    const Config *c = k->c;
    int I = c->index_heads, J = c->index_dim, chunks = (k->keys + k->chunk - 1) / k->chunk;
    float scale = 1.0f / sqrtf((float)J) / sqrtf((float)I), key[MAX_HEAD_DIM],
          *s = xalloc((size_t)I, sizeof *s);
    for (int item = begin; item < end; item++) {
        int t = k->from + item / chunks, w = item % chunks * k->chunk;
        const Row *row = r->rows + t;
        const Cache *cache = k->cache[row->slot] + k->i;
        int last = n_visible(row->pos, 4) < w + k->chunk ? n_visible(row->pos, 4) : w + k->chunk;
        if (n_visible(row->pos, 4) <= c->index_topk) continue;
        for (; w < last; w++) {
            float sum = 0;
            row_get(k->d, cache->ikeys, (size_t)w, J, key);
            row_scores(key, r->iq + (size_t)t * I * J, I, J, scale, s);
            for (int h = 0; h < I; h++) sum += r->iw[(size_t)t * I + h] * (s[h] < 0 ? 0 : s[h]);
            if (!isfinite(sum))
                die(1,
                    "%s.attn.indexer: a score is not finite (run `dsv4 verify` on the checkpoint)",
                    k->l->name);
            r->iscore[(size_t)(t - k->from) * k->keys + w] = sum;
        }
    }
    free(s);
}

// Integers in the order of the floats.
static uint32_t order_key(float x) {
    uint32_t u = bits_of_f32(x);
    return u >> 31 ? ~u : u | 0x80000000u;
}

// The k largest of score[n] as ascending indices; ties go to the lowest index. Radix select on
// 11 + 11 + 10 bits.
static void top_k(const float *score, int n, int k, int *top) {
    uint32_t prefix = 0, mask = 0;
    // entries still wanted among those equal to prefix
    int need = k, m = 0;
    for (int shift = 21; ; shift = shift > 10 ? shift - 11 : 0) {
        int count[2048] = { 0 }, bits = shift ? 11 : 10, bin = (1 << bits) - 1;
        for (int i = 0; i < n; i++) {
            uint32_t key = order_key(score[i]);
            if ((key & mask) == prefix) count[key >> shift & ((1u << bits) - 1)]++;
        }
        while (bin && count[bin] < need) need -= count[bin--];
        prefix |= (uint32_t)bin << shift;
        mask |= ((1u << bits) - 1) << shift;
        if (!shift) break;
    }
    for (int i = 0; i < n && m < k; i++) {
        uint32_t key = order_key(score[i]);
        if (key > prefix || (key == prefix && need-- > 0)) top[m++] = i;
    }
}

static void choose_rows(void *arg, int begin, int end) {
    Task *k = arg;
    Run *r = k->r;
    int topk = k->c->index_topk;
    for (int t = k->from + begin; t < k->from + end; t++) {
        int n = n_visible(r->rows[t].pos, 4), *top = r->top + (size_t)t * topk;
        r->n_top[t] = n < topk ? n : topk;
        if (n > topk) top_k(r->iscore + (size_t)(t - k->from) * k->keys, n, topk, top);
        else for (int w = 0; w < n; w++) top[w] = w;
    }
}

// In slabs of rows, so that the scores of a long context stay in bounded memory.
static void cpu_index_topk(Device *d, const Layer *l, int i) {
    Task k = task(d, l, i);
    Run *r = k.r;
    for (int t = 0; t < r->T; t++) {
        int n = n_visible(r->rows[t].pos, 4);
        k.keys = n > k.keys ? n : k.keys;
    }
    int slab = k.keys ? (int)(INDEX_SCORES / (size_t)k.keys) : r->T;
    slab = slab < 1 ? 1 : slab;
    k.chunk = 1024;
    for (k.from = 0; k.from < r->T; k.from += slab) {
        int rows = r->T - k.from < slab ? r->T - k.from : slab;
        if (k.keys > d->c->index_topk)
            parallel(r->pool, rows * ((k.keys + k.chunk - 1) / k.chunk), 1, index_scores, &k);
        parallel(r->pool, rows, 1, choose_rows, &k);
    }
}

// The cached rows one query sees: its window, then the compressed rows (all, or the indexer's
// choice).
typedef struct { const Cache *cache; const int *top; int from, window, n; } Seen;

static Seen rows_seen(const Task *k, int t) {
    const Row *row = k->r->rows + t;
    int from = row->pos - k->c->window + 1 > 0 ? row->pos - k->c->window + 1 : 0;
    Seen v = { k->cache[row->slot] + k->i, NULL, from, row->pos - from + 1, 0 };
    if (k->l->ratio == 4) v.top = k->r->top + (size_t)t * k->c->index_topk;
    v.n = v.window + (v.top ? k->r->n_top[t] : n_visible(row->pos, k->l->ratio));
    return v;
}

// Up to ROW_BLOCK of them from row j on, as FP32 [n, K] in buf; returns n.
static int seen_rows(const Task *k, const Seen *v, int j, float *buf) {
    int K = k->c->head_dim, n = v->n - j < ROW_BLOCK ? v->n - j : ROW_BLOCK;
    for (int i = 0; i < n; i++) {
        int w = j + i - v->window;
        const void *rows = w < 0 ? v->cache->win : v->cache->comp;
        row_get(k->d, rows,
                (size_t)(w < 0    ? (v->from + j + i) % k->d->ring
                         : v->top ? v->top[w]
                                  : w),
                K, buf + (size_t)i * K);
    }
    return n;
}

// Scores become unnormalised weights exp(s - m); returns their sum with the sink, which has no
// value row.
static float softmax_sink(const Device *d, float *s, int n, float sink) {
    float m = sink, sum;
    for (int j = 0; j < n; j++) m = fmaxf(m, s[j]);
    sum = expf(sink - m);
    for (int j = 0; j < n; j++) sum += s[j] = expf(s[j] - m);
    round_row(d, s, n);
    return sum;
}

// Items: T rows times blocks of HEAD_BLOCK heads, which share the cached rows (one KV head).
static void attend_heads(void *arg, int begin, int end) {
    Task *k = arg;
    Run *r = k->r;
    int H = k->c->n_heads, K = k->c->head_dim, R = k->c->rope_dim,
        blocks = (H + HEAD_BLOCK - 1) / HEAD_BLOCK;
    float scale = 1.0f / sqrtf((float)K), *rows = xalloc((size_t)ROW_BLOCK * K, sizeof *rows);
    for (int item = begin; item < end; item++) {
        int t = item / blocks, h0 = item % blocks * HEAD_BLOCK,
            hn = H - h0 < HEAD_BLOCK ? H - h0 : HEAD_BLOCK;
        Seen v = rows_seen(k, t);
        const float *q = r->q + ((size_t)t * H + h0) * K;
        float *o = r->o.x + t * r->o.ld + (size_t)h0 * K, sum[HEAD_BLOCK];
        float *p = xalloc((size_t)hn * (size_t)v.n, sizeof *p);     // [hn, n]
        for (int j = 0, n; j < v.n; j += n) {
            n = seen_rows(k, &v, j, rows);
            for (int h = 0; h < hn; h++)
                row_scores(q + (size_t)h * K, rows, n, K, scale, p + (size_t)h * v.n + j);
        }
        for (int h = 0; h < hn; h++)
            sum[h] = softmax_sink(k->d, p + (size_t)h * v.n, v.n, k->l->attn_sink[h0 + h]);
        memset(o, 0, sizeof *o * (size_t)hn * K);
        for (int j = 0, n; j < v.n; j += n) {
            n = seen_rows(k, &v, j, rows);
            for (int h = 0; h < hn; h++)
                row_sum(o + (size_t)h * K, p + (size_t)h * v.n + j, rows, n, K);
        }
        for (int h = 0; h < hn; h++, o += K) {
            for (int i = 0; i < K; i++) o[i] /= sum[h];
            rope(o + K - R, r->rot[k->l->ratio != 0] + (size_t)t * R, R, -1);
        }
        free(p);
    }
    free(rows);
}

static void quantise_rows(void *arg, int begin, int end) {
    Task *k = arg;
    for (int t = begin; t < end; t++) act_quantise(k->d, k->act, t);
}

static void cpu_attend(Device *d, const Layer *l, int i) {
    Task k = task(d, l, i);
    int blocks = (d->c->n_heads + HEAD_BLOCK - 1) / HEAD_BLOCK;
    parallel(k.r->pool, k.r->T * blocks, 1, attend_heads, &k);
    k.act = &k.r->o;
    parallel(k.r->pool, k.r->T, 1, quantise_rows, &k);
}

// Grouped output: u_g = wo_a[g] o_g for each group of H/G heads, then y = wo_b u. A group's rows
// are cut where a 128-row block of scales ends.
static void cpu_attn_out(Device *d, const Layer *l) {
    Task k = task(d, l, 0);
    Run *r = k.r;
    int G = d->c->o_groups, L = d->c->o_lora_rank;
    int n = 0;
    for (int g = 0; g < G; g++)
        for (int row = g * L, end = row + L, next; row < end; row = next, n++) {
            next = L % 128 == 0 || (row / 128 + 1) * 128 > end ? end : (row / 128 + 1) * 128;
            r->part[n] =
                (Part){ .w = mat_rows(&l->wo_a, row, next - row), .a = act_segment(&r->o, g) };
            r->job[n] =
                (Product){ &r->part[n].w, &r->part[n].a, NULL, r->T, r->u.x + row, r->u.ld };
        }
    matmul(r->pool, r->job, n, d->exact);
    k.act = &r->u;
    parallel(r->pool, r->T, 1, quantise_rows, &k);
    matmul(r->pool, &(Product){ &l->wo_b, &r->u, NULL, r->T, r->y, (size_t)d->c->dim }, 1,
           d->exact);
}

// --- mixture of experts (spec 7)

// s = sqrt(softplus(z)); the A largest of s + bias (ties to the lowest index), or the token's own
// from the table; weights from s alone, normalised over the chosen.
static void route_rows(void *arg, int begin, int end) {
    Task *k = arg;
    const Config *c = k->c;
    const Layer *l = k->l;
    int E = c->n_experts, A = c->n_active;
    for (int t = begin; t < end; t++) {
        float *s = k->r->gate + (size_t)t * E, *weight = k->r->weight + (size_t)t * A, sum = 0;
        int *expert = k->r->expert + (size_t)t * A;
        for (int e = 0; e < E; e++) {
            s[e] = sqrtf(s[e] > 20 ? s[e] : log1pf(expf(s[e])));
            if (!isfinite(s[e]))
                die(1,
                    "%s.ffn.gate: the router's score of expert %d is not finite "
                    "(run `dsv4 verify` on the checkpoint)",
                    l->name, e);
        }
        for (int a = 0; a < A; a++) {
            int best = -1;
            if (l->tid2eid) best = (int)l->tid2eid[(size_t)k->r->rows[t].token * A + a];
            else for (int e = 0; e < E; e++) {
                bool taken = false;
                for (int b = 0; b < a; b++) taken |= expert[b] == e;
                if (!taken && (best < 0 || s[e] + l->gate_bias[e] > s[best] + l->gate_bias[best]))
                    best = e;
            }
            expert[a] = best;
            sum += s[best];
        }
        for (int a = 0; a < A; a++) weight[a] = s[expert[a]] / sum * c->route_scale;
    }
}

static void cpu_route(Device *d, const Layer *l) {
    Task k = task(d, l, 0);
    matmul(k.r->pool,
           &(Product){ &l->gate, &k.r->x, NULL, k.r->T, k.r->gate, (size_t)d->c->n_experts }, 1,
           d->exact);
    parallel(k.r->pool, k.r->T, 1, route_rows, &k);
}

// Sorts the (row, choice) pairs by expert, stable in row order, into groups; the shared expert,
// with every row, is the last group. Entry i of the sorted list belongs to row entry_row[i].
// Returns the number of groups.
static int group_experts(Run *r, const Config *c) {
    int A = c->n_active, pairs = r->T * A, groups = 0, at = 0;
    memset(r->count, 0, sizeof *r->count * (size_t)c->n_experts);
    for (int i = 0; i < pairs; i++) r->count[r->expert[i]]++;
    for (int e = 0; e < c->n_experts; e++) {
        if (r->count[e]) r->part[groups++] = (Part){ .expert = e, .start = at, .n = r->count[e] };
        at += r->count[e];
        r->count[e] = at - r->count[e];
    }
    for (int i = 0; i < pairs; i++) {
        r->place[i] = r->count[r->expert[i]]++;
        r->entry_row[r->place[i]] = i / A;
        r->entry_weight[r->place[i]] = r->weight[i];
    }
    for (int t = 0; t < r->T; t++) {
        r->entry_row[pairs + t] = t;
        r->entry_weight[pairs + t] = 1;
    }
    r->part[groups++] = (Part){ .expert = c->n_experts, .start = pairs, .n = r->T };
    return groups;
}

// h = silu(min(w1 x, limit)) * clamp(w3 x, -limit, limit) * route weight. Items: entries.
static void swiglu_rows(void *arg, int begin, int end) {
    Task *k = arg;
    Run *r = k->r;
    int F = k->c->expert_dim;
    float limit = k->c->swiglu_limit;
    for (int i = begin; i < end; i++) {
        const float *g = r->g + (size_t)i * F, *v = r->v + (size_t)i * F;
        float *h = r->h.x + i * r->h.ld;
        for (int j = 0; j < F; j++) {
            float a = g[j] > limit ? limit : g[j];      // NaN passes, to be caught
            float b = v[j] > limit ? limit : v[j] < -limit ? -limit : v[j];
            h[j] = a * sigmoid(a) * b * r->entry_weight[i];
        }
        act_quantise(k->d, &r->h, i);
    }
}

// y = the sum of a row's experts, in the order they were chosen, then the shared one.
static void combine_rows(void *arg, int begin, int end) {
    Task *k = arg;
    Run *r = k->r;
    int A = k->c->n_active, D = k->c->dim;
    for (int t = begin; t < end; t++) {
        float *y = r->y + (size_t)t * D;
        memcpy(y, r->ye + (size_t)r->place[t * A] * D, sizeof *y * D);
        for (int a = 1; a <= A; a++) {
            size_t entry = a < A ? (size_t)r->place[t * A + a] : (size_t)r->T * A + t;
            axpy(y, 1, r->ye + entry * D, D);
        }
    }
}

static void cpu_experts(Device *d, const Layer *l) {
    Task k = task(d, l, 0);
    Run *r = k.r;
    const Config *c = d->c;
    int groups = group_experts(r, c), entries = r->T * (c->n_active + 1);
    size_t F = (size_t)c->expert_dim, D = (size_t)c->dim;
    for (int i = 0; i < groups; i++) {
        Part *p = r->part + i;
        bool shared = p->expert == c->n_experts;
        const int *rows = r->entry_row + p->start;
        r->job[2 * i] = (Product){
            shared ? &l->sw1 : &l->w1[p->expert], &r->x, rows, p->n, r->g + p->start * F, F
        };
        r->job[2 * i + 1] = (Product){
            shared ? &l->sw3 : &l->w3[p->expert], &r->x, rows, p->n, r->v + p->start * F, F
        };
    }
    matmul(r->pool, r->job, 2 * groups, d->exact);
    parallel(r->pool, entries, 1, swiglu_rows, &k);
    for (int i = 0; i < groups; i++) {
        Part *p = r->part + i;
        p->a = act_rows(&r->h, p->start);
        r->job[i] = (Product){ p->expert == c->n_experts ? &l->sw2 : &l->w2[p->expert],
                               &p->a,
                               NULL,
                               p->n,
                               r->ye + p->start * D,
                               D };
    }
    matmul(r->pool, r->job, groups, d->exact);
    parallel(r->pool, r->T, 1, combine_rows, &k);
}

// --- embedding, head, MTP (spec 1, 2.5, 10)

// Row `token` of the embedding as FP32.
static void embedding(const Mat *embed, int token, float *x) {
    size_t at = (size_t)token * embed->k;
    if (embed->fmt == W_F32) memcpy(x, (const float *)embed->w + at, sizeof *x * (size_t)embed->k);
    else for (int i = 0; i < embed->k; i++) x[i] = f32_of_bf16(((const bf16 *)embed->w)[at + i]);
}

static void embed_rows(void *arg, int begin, int end) {
    Task *k = arg;
    size_t D = (size_t)k->c->dim, S = (size_t)k->c->hc_mult;
    for (int t = begin; t < end; t++) {
        float *X = k->r->X + t * S * D;
        embedding(&k->d->w.embed, k->r->rows[t].token, X);
        for (size_t s = 1; s < S; s++) memcpy(X + s * D, X, D * sizeof *X);
    }
}

static void cpu_embed(Device *d) {
    Task k = task(d, NULL, 0);
    parallel(k.r->pool, k.r->T, 1, embed_rows, &k);
}

static size_t streams_bytes(const Device *d, int T) {
    return sizeof(float) * (size_t)T * d->c->hc_mult * d->c->dim;
}

static void cpu_streams_in(Device *d, const float *X) {
    Run *r = d->impl;
    memcpy(r->X, X, streams_bytes(d, r->T));
}

static void cpu_settle(Device *d) { (void)d; }

static void cpu_streams_out(Device *d, float *X) {
    Run *r = d->impl;
    memcpy(X, r->X, streams_bytes(d, r->T));
}

static void head_rows(void *arg, int begin, int end) {
    Task *k = arg;
    Run *r = k->r;
    int S = k->c->hc_mult, D = k->c->dim;
    for (int i = begin; i < end; i++) {
        float *mix = r->mix + (size_t)i * S, *y = r->heads.x + i * r->heads.ld;
        const float *X = r->X + (size_t)k->want[i] * S * D;
        hc_scale(k->d, mix, S, X);
        hc_mix(y, X, mix, k->hyper, k->c);
        rms_norm(y, y, k->norm, D, k->c->norm_eps);
        act_quantise(k->d, &r->heads, i);
    }
}

static void cpu_head(Device *d, const Hyper *h, const float *norm, const int *want, int n,
                     float *logits) {
    Task k = task(d, NULL, 0);
    Run *r = k.r;
    Act X = streams_act(r, d->c);
    k.hyper = h;
    k.norm = norm;
    k.want = want;
    matmul(r->pool, &(Product){ &h->fn, &X, want, n, r->mix, (size_t)d->c->hc_mult }, 1, d->exact);
    parallel(r->pool, n, 1, head_rows, &k);
    matmul(r->pool, &(Product){ &d->w.head, &r->heads, NULL, n, logits, (size_t)d->c->vocab }, 1,
           d->exact);
}

// Items: T rows; normed next embeddings and normed streams, each stream on its own.
static void mtp_norms(void *arg, int begin, int end) {
    Task *k = arg;
    Run *r = k->r;
    size_t D = (size_t)k->c->dim, S = (size_t)k->c->hc_mult;
    for (int t = begin; t < end; t++) {
        float *e = r->emb.x + t * r->emb.ld;
        embedding(&k->d->w.embed, r->rows[t].next, e);
        rms_norm(e, e, k->mtp->enorm, (int)D, k->c->norm_eps);
        act_quantise(k->d, &r->emb, t);
        for (size_t i = t * S; i < (t + 1) * S; i++) {
            rms_norm(r->streams.x + i * D, r->X + i * D, k->mtp->hnorm, (int)D, k->c->norm_eps);
            act_quantise(k->d, &r->streams, (int)i);
        }
    }
}

static void mtp_add(void *arg, int begin, int end) {
    Task *k = arg;
    int S = k->c->hc_mult, D = k->c->dim;
    for (int i = begin; i < end; i++)
        axpy(k->r->X + (size_t)i * D, 1, k->r->e + (size_t)(i / S) * D, D);
}

// X[s] = e_proj rms(embed[next]) + h_proj rms(X[s])
static void cpu_mtp_in(Device *d, const Mtp *m) {
    Task k = task(d, NULL, 0);
    Run *r = k.r;
    size_t D = (size_t)d->c->dim;
    int rows = r->T * d->c->hc_mult;
    k.mtp = m;
    parallel(r->pool, r->T, 1, mtp_norms, &k);
    Product p[2] = { { &m->e_proj, &r->emb, NULL, r->T, r->e, D },
                     { &m->h_proj, &r->streams, NULL, rows, r->X, D } };
    matmul(r->pool, p, 2, d->exact);
    parallel(r->pool, rows, 1, mtp_add, &k);
}

// --- the CPU device: buffers and caches

static void cpu_begin(Device *d, const Row *rows, int T) {
    Run *r = d->impl;
    int R = d->c->rope_dim;
    r->rows = rows;
    r->T = T;
    for (int t = 0; t < T; t++)
        for (int i = 0; i < 2; i++)
            rope_angles(r->rot[i] + (size_t)t * R, d->inv_freq[i], R, rows[t].pos);
}

// Memory that the system gives out page by page as it is touched, so a long context costs only what
// is used.
static void *reserve(size_t bytes) {
    void *p = mmap(NULL, bytes ? bytes : 1, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
        die(1, "out of memory: %zu bytes of context cache (try a smaller -c)", bytes);
    return p;
}

// The layer that cache i of this stage belongs to: its own, then the MTP layers'.
static const Layer *stage_layer(const Device *d, int i) {
    int n = d->last - d->first;
    return i < n ? &d->w.layers[d->first + i] : &d->w.mtp[i - n].block;
}

static int stage_caches(const Device *d) {
    return d->last - d->first + (d->has_head && d->w.mtp ? d->c->n_mtp : 0);
}

// Bytes of each part of a cache: win, comp, ikeys, cin, icin.
static void cache_sizes(const Device *d, const Layer *l, size_t size[5]) {
    size_t M = (size_t)l->ratio, rows = M ? (size_t)d->ctx / M : 0;
    size[0] = kv_bytes(d, d->c->head_dim) * d->ring;
    size[1] = kv_bytes(d, d->c->head_dim) * rows;
    size[2] = M == 4 ? kv_bytes(d, d->c->index_dim) * rows : 0;
    size[3] = M ? sizeof(float) * 2 * l->comp.wkv.n * d->cring[M] : 0;
    size[4] = M == 4 ? sizeof(float) * 2 * l->icomp.wkv.n * d->cring[4] : 0;
}

static void cpu_cache_new(Device *d, int slot) {
    int n = stage_caches(d);
    d->cache[slot] = xalloc((size_t)n, sizeof(Cache));
    for (int i = 0; i < n; i++) {
        Cache *c = d->cache[slot] + i;
        size_t size[5];
        cache_sizes(d, stage_layer(d, i), size);
        c->win = reserve(size[0]);
        if (size[1]) c->comp = reserve(size[1]);
        if (size[2]) c->ikeys = reserve(size[2]);
        if (size[3]) c->cin = reserve(size[3]);
        if (size[4]) c->icin = reserve(size[4]);
    }
}

static void cpu_cache_free(Device *d, int slot) {
    for (int i = 0; i < stage_caches(d); i++) {
        Cache *c = d->cache[slot] + i;
        void *part[5] = { c->win, c->comp, c->ikeys, c->cin, c->icin };
        size_t size[5];
        cache_sizes(d, stage_layer(d, i), size);
        for (int j = 0; j < 5; j++) if (part[j]) munmap(part[j], size[j]);
    }
    free(d->cache[slot]);
    d->cache[slot] = NULL;
}

static void cpu_cache_copy(Device *d, int slot, int i, int part, size_t at, void *host,
                           size_t bytes, bool save) {
    const Cache *c = d->cache[slot] + i;
    void *parts[5] = { c->win, c->comp, c->ikeys, c->cin, c->icin };
    char *own = (char *)parts[part] + at;
    memcpy(save ? host : own, save ? own : host, bytes);
}

static const Ops cpu_ops = {
    .begin = cpu_begin,
    .embed = cpu_embed,
    .streams_in = cpu_streams_in,
    .settle = cpu_settle,
    .streams_out = cpu_streams_out,
    .hc_pre = cpu_hc_pre,
    .hc_post = cpu_hc_post,
    .attn_project = cpu_attn_project,
    .attn_latent = cpu_attn_latent,
    .attn_query = cpu_attn_query,
    .index_topk = cpu_index_topk,
    .attend = cpu_attend,
    .attn_out = cpu_attn_out,
    .route = cpu_route,
    .experts = cpu_experts,
    .mtp_in = cpu_mtp_in,
    .head = cpu_head,
    .cache_new = cpu_cache_new,
    .cache_free = cpu_cache_free,
    .cache_copy = cpu_cache_copy,
};

// Gives d its buffers for max_rows rows.
static void cpu_device(Device *d, Pool *pool) {
    const Config *c = d->c;
    Run *r = xalloc(1, sizeof *r);
    size_t T = (size_t)d->max_rows, S = (size_t)c->hc_mult, D = (size_t)c->dim,
           A = (size_t)c->n_active;
    size_t J = (size_t)c->index_heads * c->index_dim, F = (size_t)c->expert_dim,
           entries = T * (A + 1);
    size_t parts = (size_t)c->o_groups * (c->o_lora_rank / 128 + 2);
    if (parts < (size_t)c->n_experts + 1) parts = (size_t)c->n_experts + 1;
    d->op = &cpu_ops;
    d->impl = r;
    r->pool = pool;
    for (int i = 0; i < 2; i++) r->rot[i] = xalloc(T * c->rope_dim, sizeof(float));
    r->X = xalloc(T * S * D, sizeof(float));
    r->mix = xalloc(T * (2 + S) * S, sizeof(float));
    r->post = xalloc(T * S, sizeof(float));
    r->comb = xalloc(T * S * S, sizeof(float));
    r->x = act_new(d, d->max_rows, c->dim, 1);
    r->y = xalloc(T * D, sizeof(float));
    r->qr = act_new(d, d->max_rows, c->q_lora_rank, 1);
    r->kv = xalloc(T * c->head_dim, sizeof(float));
    r->cin = xalloc(T * 4 * c->head_dim, sizeof(float));
    r->icin = xalloc(T * 4 * c->index_dim, sizeof(float));
    r->q = xalloc(T * c->n_heads * c->head_dim, sizeof(float));
    r->iq = xalloc(T * J, sizeof(float));
    r->iw = xalloc(T * c->index_heads, sizeof(float));
    r->iscore = reserve(sizeof(float) * (INDEX_SCORES + (size_t)d->ctx / 4));
    r->top = reserve(T * c->index_topk * sizeof(int));
    r->n_top = xalloc(T, sizeof(int));
    r->o = act_new(d, d->max_rows, c->n_heads / c->o_groups * c->head_dim, c->o_groups);
    r->u = act_new(d, d->max_rows, c->o_groups * c->o_lora_rank, 1);
    r->gate = xalloc(T * c->n_experts, sizeof(float));
    r->expert = xalloc(T * A, sizeof(int));
    r->weight = xalloc(T * A, sizeof(float));
    r->count = xalloc((size_t)c->n_experts, sizeof(int));
    r->place = xalloc(T * A, sizeof(int));
    r->entry_row = xalloc(entries, sizeof(int));
    r->entry_weight = xalloc(entries, sizeof(float));
    r->g = xalloc(entries * F, sizeof(float));
    r->v = xalloc(entries * F, sizeof(float));
    r->h = act_new(d, (int)entries, c->expert_dim, 1);
    r->ye = xalloc(entries * D, sizeof(float));
    r->part = xalloc(parts, sizeof(Part));
    r->job = xalloc(parts * 2, sizeof(Product));
    r->heads = act_new(d, d->max_rows, c->dim, 1);
    if (!d->has_head || !d->w.mtp) return;
    r->emb = act_new(d, d->max_rows, c->dim, 1);
    r->streams = act_new(d, (int)(T * S), c->dim, 1);
    r->e = xalloc(T * D, sizeof(float));
}
// ---------------------------------------------------------------------------
// CUDA: a device with its weights, buffers and caches (driver, compiler, memory: apps/cuda.h)

// The kernels, in the order of kernels.cu.
#define KERNELS(X) \
    X(gemv) X(embed) X(hc_mix) X(hc_norm) X(attn_latent) X(query_norm) X(index_scores) \
    X(index_slab) X(index_topk) X(attend_16) X(attend_32) X(attend_combine) X(route) \
    X(expert_up_1) X(expert_up_8) X(ffn_in) X(expert_down_1) X(expert_down_8) X(mtp_norm) \
    X(mtp_add) X(gather_rows) X(gemm) X(group_rows) X(expert_up) X(expert_down) X(expert_sum)
#define KERNEL_ID(name) K_##name,
#define KERNEL_NAME(name) #name,
enum { KERNELS(KERNEL_ID) N_KERNELS };
static const char *const kernel_names[] = { KERNELS(KERNEL_NAME) };

// Bit masks of matrix formats, by the kernels that multiply with them.
typedef struct { int dense, gate, shared, routed; } Formats;

// Structures that kernels.cu reads; the fields are explained there.
typedef struct { CuPtr w, s; int n, k, fmt, pad; } GpuMat;
typedef struct {
    GpuMat m;
    CuPtr x, q, qs, out, out_q, out_s;
    uint64_t ring_at;
    int ring, ring_step, ldx, ldo, seg_n, seg_blocks, ksplit, block0, tile0, seg_tiles;
} GpuTask;
typedef struct { CuPtr ape, norm; uint64_t in_at, out_at; int ring, ratio; } GpuPool;
typedef struct {
    CuPtr ids, weights, order, place, start, active, n_active, bad, tiles, n_tiles;
} GpuRouting;
typedef struct { CuPtr q, s, x; } GpuHidden;

// Activations in FP32 and INT8 (q, scales s).
typedef struct { CuPtr x, q, s; } GpuAct;

// Products that share a launch.
typedef struct { CuPtr tasks; int n, blocks, tiles; } GpuProducts;

// What the kernels need to know of a layer.
typedef struct {
    GpuProducts project, query, wo_a, wo_b, gate;
    CuPtr experts;              // GpuMat [E + 1][w1, w2, w3], the shared expert last
    union {                     // the parts of its cache: bytes into a session's memory
        struct { uint64_t win, comp, ikeys, cin, icin; };
        uint64_t part[5];
    };
} GpuLayer;

// With graphs on, a stage's step for one row is recorded once and replayed later: the operations
// then launch nothing.
typedef enum { GRAPH_OFF, GRAPH_RECORDS, GRAPH_REPLAYS } GraphState;
static bool cuda_graphs;        // off unless asked for: nobody has seen it faster yet

typedef struct {
    Gpu gpu;                    // the first: what takes a Gpu takes d->impl
    CuFunction fn[N_KERNELS];
    Formats formats;            // of the whole model: all GPUs share the kernels
    CuEvent staged;             // the batch's rows and streams have left the host
    int T;
    GraphState graph;
    CuGraphExec graphs[32];     // [bucket] one decode step; buckets double the number of index keys
    bool post;                  // an hc_post is due: the next kernel that reads X does it
    bool keep_floats;           // self-test: o in FP32 too, and no graphs
    size_t slot_bytes;
    GpuLayer *layer;            // [stage_caches]
    GpuProducts head, e_proj, h_proj;
    CuPtr inv_freq[2];
    CuPtr slots, slot[COUNT(((Device *)0)->cache)];
    CuPtr rows, X, y, post_c, comb, part, kv, q, iq, iw, qh, iqh, scores, chosen, o_part, ml;
    CuPtr gate, contribution, want, heads, logits, e, ex;
    GpuAct x, qr, o, u;
    GpuHidden h;
    GpuRouting r;
    CuPtr best, best_key;       // [score_rows, best_ld] the best keys of each slab of keys
    int score_rows, score_ld, best_ld;      // rows of a slab of index scores, floats per row
    Row *host_rows;             // pinned, as all host_*
    float *host_logits;
    int *host_want, *host_bad;
    uint64_t *host_slots;
} Cuda;

enum {
    TILE = 8,                   // rows that the streaming kernels take; more go through tiles
    TILE_T = 64, TILE_N = 128,  // rows of the batch and of the matrix in a tensor-core tile
    TILE_SHARED = 3 * 16384,    // its shared memory
    HEAD_TILE = 64,             // rows of logits at a time
    MAX_SPLITS = 32,            // parts of attention
    KEY_SLAB = 32768,           // index keys that one block chooses from
};

static void gpu_launch(Device *d, int kernel, unsigned x, unsigned y, unsigned z, unsigned threads,
                       unsigned shared, const void **args) {
    Cuda *g = d->impl;
    if (g->graph == GRAPH_REPLAYS) return;
    g->gpu.kernel = kernel_names[kernel];
    CU(&g->gpu, LaunchKernel, g->fn[kernel], x, y, z, threads, 1, 1, shared, g->gpu.stream,
       (void **)args, NULL);
}

// Blocks x, y, z, threads, dynamic shared memory, then the addresses of the arguments.
#define LAUNCH_ID(d, id, x, y, z, threads, shared, ...) \
    gpu_launch(d, id, (unsigned)(x), (unsigned)(y), (unsigned)(z), (unsigned)(threads), shared, \
               (const void *[]){ __VA_ARGS__ })
#define LAUNCH(d, kernel, ...) LAUNCH_ID(d, K_##kernel, __VA_ARGS__)

// --- kernels: specialised to a model

static void list_formats(const Bind *table, size_t n, const void *block, Formats *f) {
    for (size_t i = 0; i < n; i++) {
        const Mat *m = (const void *)((const char *)block + table[i].at);
        const char *name = table[i].name;
        if (table[i].kind != MAT || !m->w || strstr(name, "_fn")) continue;
        int *role = !strcmp(name, "ffn.gate") ? &f->gate
                    : !strncmp(name, "ffn.", 4) ? &f->shared : &f->dense;
        *role |= 1 << m->fmt;
    }
}

static Formats model_formats(const Weights *w, const Config *c) {
    Formats f = { .dense = 1 << w->head.fmt };
    for (int i = 0; i < c->n_layers + (w->mtp ? c->n_mtp : 0); i++) {
        const Mtp *m = i < c->n_layers ? NULL : &w->mtp[i - c->n_layers];
        const Layer *l = m ? &m->block : &w->layers[i];
        list_formats(layer_table, COUNT(layer_table), l, &f);
        if (m) list_formats(mtp_table, COUNT(mtp_table), m, &f);
        for (int e = 0; e < c->n_experts; e++)
            f.routed |= 1 << l->w1[e].fmt | 1 << l->w2[e].fmt | 1 << l->w3[e].fmt;
    }
    return f;
}

// The compiler's options for a model, one per line: the dimensions as -D constants. What the
// kernels take for granted of them is checked; the CPU takes any. Rows in multiples of 32 columns:
// they are read 16 bytes at a time in the checkpoint's own layout. head_dim and index_head_dim: what
// a block can hold in registers. who: for the error; cc: compute capability, 86 for 8.6.
static Str kernel_options(const char *who, const Config *c, Formats f, int cc) {
    enum { WIDE = 1 << 16, ANY_SIZE = INT_MAX };
    const struct { const char *constant, *key; int value, multiple, most; } dims[] = {
        { "DIM", "hidden_size", c->dim, 32, WIDE },
        { "STREAMS", "hc_mult", c->hc_mult, 1, 16 },
        { "HEADS", "num_attention_heads", c->n_heads, 1, ANY_SIZE },
        { "HEAD_DIM", "head_dim", c->head_dim, 32, 512 },
        { "ROPE_DIM", "qk_rope_head_dim", c->rope_dim, 4, 512 },
        { "Q_RANK", "q_lora_rank", c->q_lora_rank, 32, WIDE },
        { "O_GROUPS", "o_groups", c->o_groups, 1, ANY_SIZE },
        { "O_RANK", "o_lora_rank", c->o_lora_rank, 32, WIDE },
        { "WINDOW", "sliding_window", c->window, 1, ANY_SIZE },
        { "EXPERTS", "n_routed_experts", c->n_experts, 1, 1024 },
        { "ACTIVE", "num_experts_per_tok", c->n_active, 1, 32 },
        { "EXPERT_DIM", "moe_intermediate_size", c->expert_dim, 32, WIDE },
        { "INDEX_HEADS", "index_n_heads", c->index_heads, 1, WIDE },
        { "INDEX_DIM", "index_head_dim", c->index_dim, 32, 256 },
        { "INDEX_TOPK", "index_topk", c->index_topk, 1, ANY_SIZE },
        { "HC_ITERS", "hc_sinkhorn_iters", c->hc_iters, 1, ANY_SIZE },
        { "DENSE", "", f.dense, 1, ANY_SIZE }, { "GATE", "", f.gate, 1, ANY_SIZE },
        { "SHARED", "", f.shared, 1, ANY_SIZE }, { "ROUTED", "", f.routed, 1, ANY_SIZE },
    };
    Str s = { 0 };
    char text[256];
    snprintf(text, sizeof text, "-arch=compute_%d\n-fmad=false\n--std=c++17\n-DHC_EPS=%.9ef\n"
             "-DNORM_EPS=%.9ef\n-DROUTE_SCALE=%.9ef\n-DSWIGLU_LIMIT=%.9ef\n", cc >= 86 ? 86 : 80,
             (double)c->hc_eps, (double)c->norm_eps, (double)c->route_scale,
             (double)c->swiglu_limit);
    str_puts(&s, text);
    for (size_t i = 0; i < COUNT(dims); i++) {
        if (dims[i].value % dims[i].multiple || dims[i].value > dims[i].most)
            die(1, "%s: %s = %d: the GPU kernels need a multiple of %d, at most %d (use --devices "
                "cpu)", who, dims[i].key, dims[i].value, dims[i].multiple, dims[i].most);
        snprintf(text, sizeof text, "-D%s=%d\n", dims[i].constant, dims[i].value);
        str_puts(&s, text);
    }
    return s;
}

// Dynamic shared memory of the kernel that takes `heads` heads a block.
static unsigned attend_shared(const Config *c, int heads) {
    int warps = (c->head_dim + 63) / 64;
    return (unsigned)(warps * (3 * 2048 + heads * 64) + heads * 60);
}

static void cuda_load(Device *d) {
    Cuda *g = d->impl;
    int cc = gpu_attribute(&g->gpu, 75) * 10 + gpu_attribute(&g->gpu, 76);   // compute capability
    if (cc < 80)
        die(1, "%s: compute capability %d.%d, 8.0 is needed (Ampere or newer)", d->name, cc / 10,
            cc % 10);
    Str options = kernel_options(d->name, d->c, g->formats, cc);
    gpu_load(&g->gpu, str_span(&options), kernel_names, N_KERNELS, g->fn);
    free(options.p);
    const struct { int kernel; unsigned bytes; } dynamic[] = {
        { K_gemm, TILE_SHARED }, { K_expert_up, TILE_SHARED }, { K_expert_down, TILE_SHARED },
        { K_attend_16, attend_shared(d->c, 16) }, { K_attend_32, attend_shared(d->c, 32) },
    };
    for (size_t i = 0; i < COUNT(dynamic); i++)         // 8: dynamic shared memory at most
        CU(&g->gpu, FuncSetAttribute, g->fn[dynamic[i].kernel], 8, (int)dynamic[i].bytes);
}

// --- weights: one allocation

// What a stage copies to its GPU, and whose address it becomes.
typedef struct {
    const Config *c;
    CopyJob *job;               // [n] `to` counts from the allocation's start
    void **pointer;             // [n] of several types
    size_t n, bytes;
} Freight;

// What a pointer points to goes at the next multiple of 256.
static void freight_add(Freight *f, void *pointer, size_t bytes, bool e4m3) {
    const char *from;
    memcpy(&from, pointer, sizeof from);
    if (!from) return;
    f->job = grow(f->job, f->n, sizeof *f->job);
    f->pointer = grow(f->pointer, f->n, sizeof *f->pointer);
    f->job[f->n] = (CopyJob){ from, f->bytes, bytes, e4m3 };
    f->pointer[f->n++] = pointer;
    f->bytes += (bytes + 255) & ~(size_t)255;
}

static void freight_mat(Freight *f, Mat *m) {
    size_t weights = row_bytes(m) * (size_t)m->n, scales = mat_bytes(m) - weights;
    freight_add(f, &m->w, weights, m->fmt == W_FP8);
    freight_add(f, &m->s, scales, false);
}

// The kernels take hc_*_fn in FP32 only. The converted copy lives as long as the program (1.5 MB a
// layer).
static void steering_float(Mat *m) {
    float *x = xalloc((size_t)m->n * m->k, sizeof *x);
    for (int i = 0; i < m->n; i++) dequant_row(m, i, x + (size_t)i * m->k);
    *m = (Mat){ x, NULL, m->n, m->k, W_F32 };
}

// What a table of tensors lists of one block; absent ones are NULL.
static void freight_list(Freight *f, const Bind *table, size_t n, int ratio, void *block) {
    for (const Bind *b = table; b < table + n; b++) {
        void *field = (char *)block + b->at;
        size_t rows = (size_t)shape_of(b->rows, f->c, ratio);
        size_t cols = b->cols ? (size_t)shape_of(b->cols, f->c, ratio) : 1;
        Mat *m = field;
        if (b->kind != MAT) {
            freight_add(f, field, (b->kind == VEC ? 4 : 8) * rows * cols, false);
            continue;
        }
        if (m->fmt == W_BF16 && strstr(b->name, "_fn")) steering_float(m);
        freight_mat(f, m);
    }
}

// A layer, whose list of experts becomes the stage's own: the pointers in it change.
static void freight_layer(Freight *f, Layer *l) {
    Mat **w[] = { &l->w1, &l->w2, &l->w3 };
    size_t E = (size_t)f->c->n_experts;
    freight_list(f, layer_table, COUNT(layer_table), l->ratio, l);
    for (int i = 0; i < 3; i++) {
        *w[i] = memcpy(xalloc(E, sizeof(Mat)), *w[i], E * sizeof(Mat));
        for (size_t e = 0; e < E; e++) freight_mat(f, &(*w[i])[e]);
    }
}

// All weights of a stage: d->w, in lists of its own.
static Freight stage_freight(Device *d) {
    const Config *c = d->c;
    Weights *w = &d->w;
    Freight f = { .c = c };
    size_t layers = (size_t)c->n_layers * sizeof(Layer), mtp = (size_t)c->n_mtp * sizeof(Mtp);
    w->layers = memcpy(xalloc(layers, 1), w->layers, layers);
    w->mtp = d->has_head && w->mtp ? memcpy(xalloc(mtp, 1), w->mtp, mtp) : NULL;
    for (int i = d->first; i < d->last; i++) freight_layer(&f, &w->layers[i]);
    if (d->first == 0 || w->mtp) freight_mat(&f, &w->embed);
    if (d->has_head)            // model_table without embed
        freight_list(&f, model_table + 1, COUNT(model_table) - 1, 0, w);
    for (int i = 0; w->mtp && i < c->n_mtp; i++) {
        freight_layer(&f, &w->mtp[i].block);
        freight_list(&f, mtp_table, COUNT(mtp_table), 0, &w->mtp[i]);
    }
    f.bytes += 8 << 20;         // the products read up to 31 rows past a matrix
    return f;
}

static void freight_send(Gpu *g, Freight *f) {
    CuPtr base = gpu_keep(g, f->bytes, "the weights of its layers");
    for (size_t i = 0; i < f->n; i++) {
        f->job[i].to += base;
        memcpy(f->pointer[i], &f->job[i].to, sizeof(CuPtr));
    }
    gpu_upload(g, f->job, f->n);
    free(f->job), free(f->pointer);
}

// --- products: descriptors that stay on the device

static GpuMat gpu_mat(const Mat *m) {
    return (GpuMat){ (CuPtr)(uintptr_t)m->w, (CuPtr)(uintptr_t)m->s, m->n, m->k, (int)m->fmt, 0 };
}

// Warps that share a row in decode: as many as leave each 512 columns. Depends on the shape alone.
static int split_columns(const Mat *m) {
    int split = 1;
    while (split < 8 && m->k >= 1024 * split) split *= 2;
    return split;
}

// One product of a launch; in: its rows. Outputs are set by the caller.
static GpuTask *task_add(GpuTask *list, GpuProducts *p, const Mat *m, const GpuAct *in,
                         int segments) {
    GpuTask *t = list + p->n++;
    int seg_n = m->n / segments, split = split_columns(m), per = 256 / split;
    *t = (GpuTask){ .m = gpu_mat(m), .x = in->x, .q = in->q, .qs = in->s, .ldx = m->k * segments,
                    .ldo = m->n, .seg_n = seg_n, .ksplit = split, .block0 = p->blocks,
                    .seg_blocks = (seg_n + per - 1) / per, .tile0 = p->tiles,
                    .seg_tiles = (seg_n + TILE_N - 1) / TILE_N };
    p->tiles += t->seg_tiles * segments;
    p->blocks += t->seg_blocks * segments;
    return t;
}

static CuPtr gpu_table(Device *d, const void *from, size_t bytes) {
    CuPtr p = gpu_keep(d->impl, bytes, "tables");
    gpu_copy_in(d->impl, p, from, bytes);
    gpu_wait(d->impl);
    return p;
}

static void products_done(Device *d, GpuProducts *p, const GpuTask *list) {
    p->tasks = gpu_table(d, list, sizeof *list * (size_t)p->n);
}

// A compressor's two inputs, which go to its ring at `at`: rows [2, n].
static void tasks_ring(Device *d, GpuTask *list, GpuProducts *p, const Compressor *m, uint64_t at) {
    const Mat *w[] = { &m->wkv, &m->wgate };
    for (int i = 0; i < 2; i++) {
        GpuTask *t = task_add(list, p, w[i], &((Cuda *)d->impl)->x, 1);
        t->ring_at = at + 4 * (uint64_t)i * (uint64_t)m->wkv.n;
        t->ring = d->cring[m->ratio];
        t->ring_step = 8 * m->wkv.n;
    }
}

// A product with one output matrix.
static GpuProducts one_product(Device *d, const Mat *m, const GpuAct *in, CuPtr out) {
    GpuProducts p = { 0 };
    GpuTask t;
    task_add(&t, &p, m, in, 1)->out = out;
    products_done(d, &p, &t);
    return p;
}

static void layer_products(Device *d, const Layer *l, GpuLayer *gl) {
    Cuda *g = d->impl;
    const Config *c = d->c;
    GpuTask t[7];
    task_add(t, &gl->project, &l->wq_a, &g->x, 1)->out = g->qr.x;
    task_add(t, &gl->project, &l->wkv, &g->x, 1)->out = g->kv;
    if (l->ratio) tasks_ring(d, t, &gl->project, &l->comp, gl->cin);
    if (l->ratio == 4) {
        tasks_ring(d, t, &gl->project, &l->icomp, gl->icin);
        task_add(t, &gl->project, &l->iproj, &g->x, 1)->out = g->iw;
    }
    products_done(d, &gl->project, t);
    task_add(t, &gl->query, &l->wq_b, &g->qr, 1)->out = g->q;
    if (l->ratio == 4) task_add(t, &gl->query, &l->iwq_b, &g->qr, 1)->out = g->iq;
    products_done(d, &gl->query, t);
    GpuTask *a = task_add(t, &gl->wo_a, &l->wo_a, &g->o, c->o_groups);
    if (takes_int8(l->wo_b.fmt)) {
        a->out_q = g->u.q;
        a->out_s = g->u.s;
    } else {
        a->out = g->u.x;
    }
    products_done(d, &gl->wo_a, t);
    gl->wo_b = one_product(d, &l->wo_b, &g->u, g->y);
    gl->gate = one_product(d, &l->gate, &g->x, g->gate);
    int E = c->n_experts;
    GpuMat *e = xalloc((size_t)E + 1, 3 * sizeof *e);
    for (int i = 0; i <= E; i++) {
        e[3 * i] = gpu_mat(i == E ? &l->sw1 : &l->w1[i]);
        e[3 * i + 1] = gpu_mat(i == E ? &l->sw2 : &l->w2[i]);
        e[3 * i + 2] = gpu_mat(i == E ? &l->sw3 : &l->w3[i]);
    }
    gl->experts = gpu_table(d, e, 3 * sizeof *e * (size_t)(E + 1));
    free(e);
}

// MTP's normed next embeddings, behind its normed streams in g->ex.
static CuPtr gpu_next(const Device *d) {
    size_t T = (size_t)d->max_rows + TILE;
    return ((Cuda *)d->impl)->ex + 4 * T * d->c->hc_mult * d->c->dim;
}

static void cuda_tables(Device *d) {
    Cuda *g = d->impl;
    GpuAct heads = { .x = g->heads }, streams = { .x = g->ex };
    for (int i = 0; i < 2; i++)
        g->inv_freq[i] = gpu_table(d, d->inv_freq[i], sizeof(float) * (size_t)d->c->rope_dim / 2);
    for (int i = 0; i < stage_caches(d); i++) layer_products(d, stage_layer(d, i), &g->layer[i]);
    if (!d->has_head) return;
    g->head = one_product(d, &d->w.head, &heads, g->logits);
    if (!d->w.mtp) return;
    GpuAct next = { .x = gpu_next(d) };
    g->h_proj = one_product(d, &d->w.mtp->h_proj, &streams, g->X);
    g->e_proj = one_product(d, &d->w.mtp->e_proj, &next, g->e);
}

// --- buffers, caches, start

// Where the parts of a session's caches lie: 256-byte aligned, layer by layer.
static void cuda_layout(Device *d) {
    Cuda *g = d->impl;
    g->layer = xalloc((size_t)stage_caches(d), sizeof *g->layer);
    for (int i = 0; i < stage_caches(d); i++) {
        size_t size[5];
        cache_sizes(d, stage_layer(d, i), size);
        for (int j = 0; j < 5; j++) {
            g->layer[i].part[j] = g->slot_bytes;
            g->slot_bytes += (size[j] + 255) & ~(size_t)255;
        }
    }
}

#define ACT(act, rows, k) { &(act).x, (rows) * (k), 4 }, { &(act).q, (rows) * (k), 1 }, \
                          { &(act).s, (rows) * (k) / 32, 4 }

// Takes the buffers of a stage, or only counts them. Returns their bytes.
static size_t cuda_buffers(Device *d, Cuda *g, bool take) {
    const Config *c = d->c;
    size_t T = (size_t)d->max_rows + TILE, S = (size_t)c->hc_mult, D = (size_t)c->dim;
    size_t H = (size_t)c->n_heads, K = (size_t)c->head_dim, V = (size_t)c->vocab;
    size_t A = (size_t)c->n_active, E = (size_t)c->n_experts, F = (size_t)c->expert_dim;
    size_t J = (size_t)c->index_heads * c->index_dim, topk = (size_t)c->index_topk, bytes = 0;
    size_t parts = T > TILE * MAX_SPLITS ? T : TILE * MAX_SPLITS, hidden = T * (A + 1);
    size_t mixes = (D + 63) / 64 * (((2 + S) * S + 32) & ~(size_t)31), pairs = T * A + E + 1;
    size_t head = d->has_head, mtp = d->has_head && d->w.mtp;
    int w2 = g->formats.shared | g->formats.routed;
    bool floats = w2 & (1 << W_F32 | 1 << W_BF16 | 1 << W_FP8);     // some take FP32 rows
    g->score_ld = (d->ctx / 4 + 31) & ~31;
    g->score_rows = (int)((16u << 20) / (size_t)(g->score_ld + 1));
    if (g->score_rows < 1) g->score_rows = 1;
    if (g->score_rows > d->max_rows) g->score_rows = d->max_rows;
    g->best_ld = (g->score_ld / KEY_SLAB + 1) * c->index_topk;
    size_t scores = (size_t)g->score_rows * g->score_ld, best = (size_t)g->score_rows * g->best_ld;
    const struct { CuPtr *to; size_t n, size; } list[] = {
        { &g->rows, T, sizeof(Row) }, { &g->slots, COUNT(g->slot), sizeof(CuPtr) },
        { &g->X, T * S * D, 4 }, { &g->part, T * mixes, 4 }, { &g->y, T * D, 4 },
        { &g->post_c, T * S, 4 }, { &g->comb, T * S * S, 4 }, { &g->kv, T * K, 4 },
        ACT(g->x, T, D), ACT(g->qr, T, (size_t)c->q_lora_rank), ACT(g->o, T, H * K),
        ACT(g->u, T, (size_t)c->o_groups * c->o_lora_rank),
        { &g->q, T * H * K, 4 }, { &g->qh, T * H * K, 2 }, { &g->iq, T * J, 4 },
        { &g->iqh, T * J, 2 }, { &g->iw, T * c->index_heads, 4 }, { &g->scores, scores, 4 },
        { &g->best, best, 4 }, { &g->best_key, best, 4 }, { &g->chosen, T * topk, 4 },
        { &g->o_part, parts * H * K, 4 }, { &g->ml, parts * H, 8 }, { &g->gate, T * E, 4 },
        { &g->h.q, hidden * F, 1 }, { &g->h.s, hidden * F / 32, 4 },
        { &g->h.x, floats * hidden * F, 4 }, { &g->contribution, hidden * D, 4 },
        { &g->r.ids, pairs, 4 }, { &g->r.weights, pairs, 4 }, { &g->r.order, pairs, 4 },
        { &g->r.place, pairs, 4 }, { &g->r.start, pairs, 4 }, { &g->r.active, pairs, 4 },
        { &g->r.n_active, 1, 4 }, { &g->r.bad, 1, 4 }, { &g->r.n_tiles, 1, 4 },
        { &g->r.tiles, T * A / TILE_T + E + T / TILE_T + 2, 16 },
        { &g->want, head * T, 4 }, { &g->heads, head * (HEAD_TILE + TILE) * D, 4 },
        { &g->logits, head * HEAD_TILE * V, 4 },
        { &g->e, mtp * T * D, 4 }, { &g->ex, mtp * T * (S + 1) * D, 4 },
    };
    for (size_t i = 0; i < COUNT(list); i++) {
        size_t n = cmul(list[i].n, list[i].size);
        bytes = cadd(bytes, n);
        if (take && n) *list[i].to = gpu_keep(&g->gpu, n, "buffers");
    }
    return bytes;
}

static void cuda_host_buffers(Device *d) {
    Cuda *g = d->impl;
    size_t T = (size_t)d->max_rows + TILE;
    g->host_rows = gpu_pinned(&g->gpu, T * sizeof(Row));
    g->host_slots = gpu_pinned(&g->gpu, sizeof g->slot);
    g->host_bad = gpu_pinned(&g->gpu, 4);
    g->host_want = gpu_pinned(&g->gpu, T * 4);
    if (d->has_head) g->host_logits = gpu_pinned(&g->gpu, HEAD_TILE * (size_t)d->c->vocab * 4);
}

// Bytes of buffers that a stage like d would take.
static size_t cuda_buffer_bytes(const Device *like) {
    Device d = *like;
    Cuda *g = xalloc(1, sizeof *g);
    g->formats = model_formats(&d.w, d.c);
    size_t n = cuda_buffers(&d, g, false);
    free(g);
    return n;
}

static const Ops cuda_ops;

// Makes d a stage on GPU `ordinal`: kernels, weights (d->w then holds device addresses), buffers.
// c, w, first, last, has_head, max_rows, ring, cring, ctx and inv_freq are set. Ends the process
// with one line if that is impossible.
static void cuda_device(Device *d, int ordinal) {
    Cuda *g = d->impl = xalloc(1, sizeof *g);
    d->op = &cuda_ops;
    g->gpu.name = d->name;
    g->gpu.at = &d->at;
    g->formats = model_formats(&d->w, d->c);
    Freight weights = stage_freight(d);
    upload_expect(weights.job, weights.n);
    gpu_start(&g->gpu, ordinal);
    CU(&g->gpu, EventCreate, &g->staged, 2);            // 2: no timing
    CU(&g->gpu, EventRecord, g->staged, g->gpu.stream);
    cuda_load(d);
    freight_send(&g->gpu, &weights);
    cuda_layout(d);
    cuda_buffers(d, g, true);
    cuda_host_buffers(d);
    cuda_tables(d);
    gpu_wait(&g->gpu);
}

// Gives everything back. d->w keeps device addresses that are no longer valid.
static void cuda_close(Device *d) {
    Cuda *g = d->impl;
    CU(&g->gpu, CtxSetCurrent, g->gpu.ctx);
    gpu_wait(&g->gpu);
    for (size_t i = 0; i < COUNT(g->slot); i++) if (g->slot[i]) CU(&g->gpu, MemFree, g->slot[i]);
    for (size_t i = 0; i < COUNT(g->graphs); i++)
        if (g->graphs[i]) CU(&g->gpu, GraphExecDestroy, g->graphs[i]);
    CU(&g->gpu, EventDestroy, g->staged);
    gpu_stop(&g->gpu);
    free(g->layer);
    free(g);
    d->impl = NULL;
}

// ---------------------------------------------------------------------------
// CUDA: the operations. Each is one to three launches; hc_post waits for the next kernel that reads
// the streams.

// Index keys that the rows of the batch see at most.
static int gpu_keys(const Device *d) {
    const Cuda *g = d->impl;
    int keys = 0;
    for (int t = 0; t < g->T; t++) {
        int n = n_visible(g->host_rows[t].pos, 4);
        keys = n > keys ? n : keys;
    }
    return keys;
}

static bool graphs_on(const Cuda *g) { return cuda_graphs && g->T == 1 && !g->keep_floats; }

// The graph for the batch's context: 0 if every key is chosen anyway, else the power of two that
// holds the keys.
static int graph_bucket(const Device *d) {
    int keys = gpu_keys(d), b = 0;
    if (keys <= d->c->index_topk) return 0;
    while (1 << b < keys) b++;
    return b;
}

static void graph_begin(Device *d) {
    Cuda *g = d->impl;
    if (!graphs_on(g)) return;
    g->graph = g->graphs[graph_bucket(d)] ? GRAPH_REPLAYS : GRAPH_RECORDS;
    if (g->graph == GRAPH_RECORDS)                      // 1: calls of other threads go on
        CU(&g->gpu, StreamBeginCapture, g->gpu.stream, 1);
}

// Runs the step that the operations since graph_begin() have described.
static void graph_end(Device *d) {
    Cuda *g = d->impl;
    CuGraphExec *exec = &g->graphs[graph_bucket(d)];
    if (g->graph == GRAPH_OFF) return;
    if (g->graph == GRAPH_RECORDS) {
        CuGraph graph;
        CU(&g->gpu, StreamEndCapture, g->gpu.stream, &graph);
        CU(&g->gpu, GraphInstantiate, exec, graph, 0);
        CU(&g->gpu, GraphDestroy, graph);
    }
    CU(&g->gpu, GraphLaunch, *exec, g->gpu.stream);
    g->graph = GRAPH_OFF;
}

static void cuda_begin(Device *d, const Row *rows, int T) {
    Cuda *g = d->impl;
    CU(&g->gpu, CtxSetCurrent, g->gpu.ctx);
    graph_end(d);               // of a batch whose results nobody wanted
    CU(&g->gpu, EventSynchronize, g->staged);
    memcpy(g->host_rows, rows, sizeof *rows * (size_t)T);
    gpu_copy_in(&g->gpu, g->rows, g->host_rows, sizeof *rows * (size_t)T);
    CU(&g->gpu, EventRecord, g->staged, g->gpu.stream);
    g->T = T;
    g->post = false;
}

static void cuda_embed(Device *d) {
    Cuda *g = d->impl;
    graph_begin(d);
    CuPtr table = (CuPtr)(uintptr_t)d->w.embed.w;
    int wide = d->w.embed.fmt == W_F32;
    LAUNCH(d, embed, g->T, 1, 1, 256, 0, &table, &wide, &g->rows, &g->X);
}

// X is pinned: the copy runs while the host goes on.
static void cuda_streams_in(Device *d, const float *X) {
    Cuda *g = d->impl;
    gpu_copy_in(&g->gpu, g->X, X, streams_bytes(d, g->T));
    CU(&g->gpu, EventRecord, g->staged, g->gpu.stream);
    graph_begin(d);
}

static void cuda_settle(Device *d) {
    const Cuda *g = d->impl;
    CU(&g->gpu, EventSynchronize, g->staged);
}

// The hc_post that is due, and fn . X for the hyper-connection `h` (NULL: none).
static void gpu_mix(Device *d, const Hyper *h) {
    Cuda *g = d->impl;
    int apply = g->post, n = h ? h->fn.n : 0, D = d->c->dim;
    CuPtr fn = h ? (CuPtr)(uintptr_t)h->fn.w : 0;
    if (!apply && !h) return;
    LAUNCH(d, hc_mix, (D + 63) / 64, (g->T + 7) / 8, 1, 256, 0, &g->X, &g->y, &g->post_c, &g->comb,
           &apply, &fn, &n, &g->part, &g->T);
    g->post = false;
}

static void gpu_norm(Device *d, const Hyper *h, const float *norm, int full) {
    Cuda *g = d->impl;
    LAUNCH(d, hc_norm, g->T, full ? 2 : 1, 1, 256, 0, &g->X, &g->part, &h->base, &h->scale, &norm,
           &full, &g->post_c, &g->comb, &g->x.x, &g->x.q, &g->x.s, &g->r.bad);
}

// Waits for the stream; stops if a kernel met a number that is not finite.
static void gpu_finish(Device *d) {
    Cuda *g = d->impl;
    gpu_copy_out(&g->gpu, g->host_bad, g->r.bad, 4);
    gpu_wait(&g->gpu);
    if (*g->host_bad)
        die(1, "%s: a number is not finite in or before %s (run `dsv4 verify` on the checkpoint)",
            d->name, d->at);
}

static void cuda_streams_out(Device *d, float *X) {
    Cuda *g = d->impl;
    graph_end(d);
    gpu_mix(d, NULL);
    gpu_copy_out(&g->gpu, X, g->X, streams_bytes(d, g->T));
    gpu_finish(d);
}

static void cuda_hc_pre(Device *d, const Hyper *h, const float *norm) {
    gpu_mix(d, h);
    gpu_norm(d, h, norm, 1);
}

static void cuda_hc_post(Device *d) { ((Cuda *)d->impl)->post = true; }

// Products of a launch for T rows. A batch of few rows never takes the tiles (its draft layer has
// more rows than tokens): a row's result must not depend on how many others there are.
static void gpu_products(Device *d, const GpuProducts *p, int T) {
    Cuda *g = d->impl;
    bool tiles = T > TILE && g->T > TILE;
    int B = tiles ? TILE_T : TILE;
    LAUNCH_ID(d, tiles ? K_gemm : K_gemv, tiles ? p->tiles : p->blocks, (T + B - 1) / B, 1, 256,
              tiles ? TILE_SHARED : 0, &p->tasks, &p->n, &T, &g->rows, &g->slots);
}

// The layer's tables: layers are found by their address.
static GpuLayer *gpu_layer(Device *d, const Layer *l) {
    Cuda *g = d->impl;
    for (int i = 0; i < stage_caches(d); i++) if (stage_layer(d, i) == l) return &g->layer[i];
    die(1, "%s: %s is not a layer of this stage", d->name, l->name);
}

static void cuda_attn_project(Device *d, const Layer *l) {
    gpu_products(d, &gpu_layer(d, l)->project, ((Cuda *)d->impl)->T);
}

static GpuPool gpu_pool(const Device *d, const Compressor *m, uint64_t in, uint64_t out) {
    return (GpuPool){ (CuPtr)(uintptr_t)m->ape, (CuPtr)(uintptr_t)m->norm, in, out,
                      d->cring[m->ratio], m->ratio };
}

static void cuda_attn_latent(Device *d, const Layer *l, int i) {
    Cuda *g = d->impl;
    GpuLayer *gl = &g->layer[i];
    GpuPool comp = gpu_pool(d, &l->comp, gl->cin, gl->comp);
    GpuPool icomp = gpu_pool(d, &l->icomp, gl->icin, gl->ikeys);
    int roles = l->ratio == 4 ? 4 : l->ratio ? 3 : 2;
    LAUNCH(d, attn_latent, g->T, roles, 1, 256, 0, &g->qr.x, &l->q_norm, &g->qr.q, &g->qr.s, &g->kv,
           &l->kv_norm, &g->rows, &g->slots, &gl->win, &d->ring, &g->inv_freq[l->ratio != 0], &comp,
           &icomp);
}

static void cuda_attn_query(Device *d, const Layer *l) {
    Cuda *g = d->impl;
    int index = l->ratio == 4, heads = d->c->n_heads + (index ? d->c->index_heads : 0);
    gpu_products(d, &gpu_layer(d, l)->query, g->T);
    LAUNCH(d, query_norm, g->T, (heads + 7) / 8, 1, 256, 0, &g->q, &g->iq, &g->rows,
           &g->inv_freq[l->ratio != 0], &g->qh, &g->iqh, &index);
}

// The choice for rows [t, t + n) whose scores are there. More than KEY_SLAB keys are thinned out by
// many blocks first: one block reads its memory slowly.
static void gpu_choose(Device *d, int t, int n, int keys) {
    Cuda *g = d->impl;
    size_t ld = (size_t)g->score_ld, best_ld = (size_t)g->best_ld;
    int slab = keys > KEY_SLAB ? KEY_SLAB : 0;
    CuPtr from = g->scores;
    if (slab) {
        LAUNCH(d, index_slab, (keys + slab - 1) / slab, n, 1, 1024, 0, &g->scores, &ld, &g->rows,
               &t, &slab, &g->best, &g->best_key, &best_ld);
        from = g->best;
        ld = best_ld;
    }
    LAUNCH(d, index_topk, n, 1, 1, 1024, 0, &from, &ld, &g->best_key, &g->rows, &t, &slab,
           &g->chosen);
}

// In slabs of rows, so that the scores of a long context stay in bounded memory.
static void cuda_index_topk(Device *d, const Layer *l, int i) {
    Cuda *g = d->impl;
    int keys = graphs_on(g) ? 1 << graph_bucket(d) : gpu_keys(d);
    size_t ld = (size_t)g->score_ld;
    (void)l;
    if (keys <= d->c->index_topk) return;
    for (int t = 0; t < g->T; t += g->score_rows) {
        int n = g->T - t < g->score_rows ? g->T - t : g->score_rows;
        LAUNCH(d, index_scores, (keys + 127) / 128, n, 1, 128, 0, &g->iqh, &g->iw, &g->rows,
               &g->slots, &g->layer[i].ikeys, &t, &g->scores, &ld);
        gpu_choose(d, t, n, keys);
    }
}

static void cuda_attend(Device *d, const Layer *l, int i) {
    Cuda *g = d->impl;
    const Config *c = d->c;
    GpuLayer *gl = &g->layer[i];
    int splits = g->T <= TILE ? MAX_SPLITS : 1, ratio = l->ratio;
    int heads = c->n_heads > 16 && g->T > 2 ? 32 : 16;          // more blocks for few rows
    CuPtr ox = takes_int8(l->wo_a.fmt) && !g->keep_floats ? 0 : g->o.x;
    LAUNCH_ID(d, heads == 32 ? K_attend_32 : K_attend_16, splits, (c->n_heads + heads - 1) / heads,
              g->T, 32 * ((c->head_dim + 63) / 64), attend_shared(c, heads), &g->qh, &g->rows,
              &g->slots, &gl->win, &d->ring, &gl->comp, &ratio, &g->chosen, &splits, &g->o_part,
              &g->ml);
    LAUNCH(d, attend_combine, c->n_heads, g->T, 1, (c->head_dim / 4 + 31) & ~31, 0, &g->o_part,
           &g->ml, &g->rows, &ratio, &splits, &l->attn_sink, &g->inv_freq[ratio != 0], &ox, &g->o.q,
           &g->o.s);
}

static void cuda_attn_out(Device *d, const Layer *l) {
    GpuLayer *gl = gpu_layer(d, l);
    gpu_products(d, &gl->wo_a, ((Cuda *)d->impl)->T);
    gpu_products(d, &gl->wo_b, ((Cuda *)d->impl)->T);
}

// The router's product shares a launch with the shared expert when few rows stream: all of it
// happens in experts().
static void cuda_route(Device *d, const Layer *l) { (void)d, (void)l; }

static void gpu_route(Device *d, const Layer *l, int blocks) {
    Cuda *g = d->impl;
    LAUNCH(d, route, blocks, 1, 1, 256, 0, &g->gate, &l->gate_bias, &l->tid2eid, &g->rows, &g->T,
           &g->r);
}

static void experts_few(Device *d, const Layer *l, const GpuLayer *gl) {
    Cuda *g = d->impl;
    const Config *c = d->c;
    int T = g->T, E = c->n_experts, place = T * c->n_active;
    int active = place < E ? place : E;
    CuPtr shared = gl->experts + sizeof(GpuMat) * 3 * (size_t)E;
    LAUNCH(d, ffn_in, c->expert_dim / 32 + gl->gate.blocks, 1, 1, 256, 0, &shared,
           &gl->gate.tasks, &T, &g->h, &place);
    if (T == 1) {
        LAUNCH(d, expert_up_1, c->expert_dim / 32, c->n_active, 1, 256, 0, &gl->experts, &g->x.x,
               &g->x.q, &g->x.s, &g->gate, &l->gate_bias, &l->tid2eid, &g->rows, &g->r, &g->h);
    } else {
        gpu_route(d, l, 1);
        LAUNCH(d, expert_up_8, c->expert_dim / 32, active, 1, 256, 0, &gl->experts, &g->x.x,
               &g->x.q, &g->x.s, &g->r, &g->h);
    }
    LAUNCH_ID(d, T == 1 ? K_expert_down_1 : K_expert_down_8, c->dim / 32, 1, 1, 256, 0,
              &gl->experts, &g->h, &g->r, &T, &g->y);
}

static void experts_many(Device *d, const Layer *l, const GpuLayer *gl) {
    Cuda *g = d->impl;
    const Config *c = d->c;
    int T = g->T, pairs = T * c->n_active;
    int tiles = pairs / TILE_T + (pairs < c->n_experts ? pairs : c->n_experts);
    tiles += (T + TILE_T - 1) / TILE_T;
    gpu_products(d, &gl->gate, T);
    gpu_route(d, l, (T + 7) / 8);
    LAUNCH(d, group_rows, (c->n_experts + 7) / 8, 1, 1, 256, 0, &T, &g->r);
    LAUNCH(d, expert_up, (c->expert_dim + 63) / 64, tiles, 1, 256, TILE_SHARED, &gl->experts,
           &g->x.x, &g->x.q, &g->x.s, &T, &g->r, &g->h);
    LAUNCH(d, expert_down, (c->dim + TILE_N - 1) / TILE_N, tiles, 1, 256, TILE_SHARED, &gl->experts,
           &g->h, &g->r, &g->contribution);
    LAUNCH(d, expert_sum, (c->dim + 1023) / 1024, T, 1, 256, 0, &g->contribution, &g->r, &T, &g->y);
}

static void cuda_experts(Device *d, const Layer *l) {
    if (((Cuda *)d->impl)->T <= TILE) experts_few(d, l, gpu_layer(d, l));
    else experts_many(d, l, gpu_layer(d, l));
}

static void cuda_mtp_in(Device *d, const Mtp *m) {
    Cuda *g = d->impl;
    int S = d->c->hc_mult, rows = g->T * S, wide = d->w.embed.fmt == W_F32;
    CuPtr table = (CuPtr)(uintptr_t)d->w.embed.w, next = gpu_next(d);
    gpu_mix(d, NULL);
    LAUNCH(d, mtp_norm, g->T, S + 1, 1, 256, 0, &g->X, &table, &wide, &g->rows, &m->hnorm,
           &m->enorm, &g->ex, &next);
    gpu_products(d, &g->e_proj, g->T);
    gpu_products(d, &g->h_proj, rows);
    LAUNCH(d, mtp_add, rows, 1, 1, 256, 0, &g->X, &g->e);
}

static void cuda_head(Device *d, const Hyper *h, const float *norm, const int *want, int n,
                      float *logits) {
    Cuda *g = d->impl;
    size_t V = (size_t)d->c->vocab;
    graph_end(d);
    gpu_mix(d, h);
    gpu_norm(d, h, norm, 0);
    memcpy(g->host_want, want, sizeof *want * (size_t)n);
    gpu_copy_in(&g->gpu, g->want, g->host_want, sizeof *want * (size_t)n);
    for (int i = 0; i < n; i += HEAD_TILE) {
        int m = n - i < HEAD_TILE ? n - i : HEAD_TILE;
        CuPtr from = g->want + 4 * (size_t)i;
        LAUNCH(d, gather_rows, m, 1, 1, 256, 0, &g->x.x, &from, &g->heads);
        gpu_products(d, &g->head, m);
        gpu_copy_out(&g->gpu, g->host_logits, g->logits, 4 * (size_t)m * V);
        gpu_finish(d);
        memcpy(logits + (size_t)i * V, g->host_logits, 4 * (size_t)m * V);
    }
}

// --- sessions' caches

static void set_slot(Device *d, int slot, CuPtr p) {
    Cuda *g = d->impl;
    g->slot[slot] = g->host_slots[slot] = p;
    gpu_copy_in(&g->gpu, g->slots + 8 * (size_t)slot, g->host_slots + slot, 8);
    gpu_wait(&g->gpu);
}

static void cuda_cache_new(Device *d, int slot) {
    Cuda *g = d->impl;
    CU(&g->gpu, CtxSetCurrent, g->gpu.ctx);
    set_slot(d, slot, g->slot_bytes ? gpu_alloc(&g->gpu, g->slot_bytes, "the caches of a session")
                                    : 0);
}

static void cuda_cache_free(Device *d, int slot) {
    Cuda *g = d->impl;
    CuPtr p = g->slot[slot];
    CU(&g->gpu, CtxSetCurrent, g->gpu.ctx);
    set_slot(d, slot, 0);
    if (p) CU(&g->gpu, MemFree, p);
}

static void cuda_cache_copy(Device *d, int slot, int i, int part, size_t at, void *host,
                            size_t bytes, bool save) {
    Cuda *g = d->impl;
    CuPtr dev = g->slot[slot] + g->layer[i].part[part] + at;
    CU(&g->gpu, CtxSetCurrent, g->gpu.ctx);
    if (save) gpu_copy_out(&g->gpu, host, dev, bytes);
    else gpu_copy_in(&g->gpu, dev, host, bytes);
    gpu_wait(&g->gpu);
}

static const Ops cuda_ops = {
    .begin = cuda_begin, .embed = cuda_embed, .streams_in = cuda_streams_in, .settle = cuda_settle,
    .streams_out = cuda_streams_out, .hc_pre = cuda_hc_pre, .hc_post = cuda_hc_post,
    .attn_project = cuda_attn_project, .attn_latent = cuda_attn_latent,
    .attn_query = cuda_attn_query, .index_topk = cuda_index_topk, .attend = cuda_attend,
    .attn_out = cuda_attn_out, .route = cuda_route, .experts = cuda_experts, .mtp_in = cuda_mtp_in,
    .head = cuda_head, .cache_new = cuda_cache_new, .cache_free = cuda_cache_free,
    .cache_copy = cuda_cache_copy,
};

// ---------------------------------------------------------------------------
// CUDA: the self-test. A GPU and the CPU run the same layers operation by operation; what each one
// wrote is compared (apps/selftest.c), then the GPU goes on from the CPU's numbers.

// What an operation writes: fields of Cuda and Run, the letters of shape_of() for what a row has,
// and how far it may be off.
typedef enum { FLOATS, HALVES, FLOATS_AND_INTS } Stored;        // on the GPU; the last: a GpuAct
typedef struct {
    const char *op;
    Stored as;
    size_t gpu, cpu;
    const char *shape;
    double limit;
} Output;
#define G(field) offsetof(Cuda, field)
#define R(field) offsetof(Run, field)
static const Output outputs[] = {
    { "embed", FLOATS, G(X), R(X), "s", 0 },
    { "hc_post", FLOATS, G(X), R(X), "s", 5e-6 },
    { "hc_pre", FLOATS_AND_INTS, G(x), R(x), "D", 1e-5 },
    { "hc_pre", FLOATS, G(post_c), R(post), "S", 1e-5 },
    { "hc_pre", FLOATS, G(comb), R(comb), "SS", 1e-5 },
    { "attn_project", FLOATS, G(qr), R(qr), "Q", 3e-5 },
    { "attn_project", FLOATS, G(kv), R(kv), "K", 3e-5 },
    { "attn_project", FLOATS, G(iw), R(iw), "I", 3e-5 },
    { "attn_latent", FLOATS_AND_INTS, G(qr), R(qr), "Q", 5e-6 },
    { "attn_query", HALVES, G(qh), R(q), "h", 2e-5 },
    { "attn_query", HALVES, G(iqh), R(iq), "i", 2e-5 },
    { "attend", FLOATS_AND_INTS, G(o), R(o), "h", 2e-2 },     // P is rounded against other maxima
    { "attn_out", FLOATS, G(y), R(y), "D", 3e-5 },
    { "route", FLOATS, G(r.weights), R(weight), "A", 1e-5 },
    { "experts", FLOATS, G(y), R(y), "D", 3e-3 },
    { "mtp_in", FLOATS, G(X), R(X), "s", 5e-5 },
};
#undef G
#undef R
static const double int8_limit = 5e-3;      // of y, if a rounding of the inner values may flip

typedef struct {
    Device cpu, *gpu;
    Run *r;
    Cuda *g;
    int T;
    const Layer *lc, *lg;       // the layer that runs, on the CPU and the GPU
    int i;                      // its cache
    uint64_t state;             // of the random numbers
    Trial trial;
    void *tmp;
} Twin;

// Uniform in (-1, 1).
static float random_signed(uint64_t *state) { return (float)(2 * random_unit(state) - 1); }

// Good until the next call.
static void *twin_read(Twin *w, CuPtr from, size_t bytes) {
    free(w->tmp);
    w->tmp = xalloc(bytes, 1);
    gpu_copy_out(&w->g->gpu, w->tmp, from, bytes);
    gpu_wait(&w->g->gpu);
    return w->tmp;
}

static void twin_give(Twin *w, CuPtr to, const void *from, size_t bytes) {
    gpu_copy_in(&w->g->gpu, to, from, bytes);
    gpu_wait(&w->g->gpu);
}

static void twin_give_ints(Twin *w, const GpuAct *gpu, const Act *cpu) {
    twin_give(w, gpu->q, cpu->q, cpu->ldq * (size_t)w->T);
    twin_give(w, gpu->s, cpu->s, 4 * cpu->lds * (size_t)w->T);
}

// INT8 without the floats they came from: a last-bit difference there may flip a rounding.
static void twin_ints(Twin *w, const char *op, const GpuAct *gpu, const Act *cpu) {
    size_t n = cpu->ldq * (size_t)w->T, wrong = 0;
    const int8_t *q = twin_read(w, gpu->q, n);
    for (size_t i = 0; i < n; i++) wrong += abs(q[i] - cpu->q[i]) > 1 ? n : q[i] != cpu->q[i];
    trial_note(&w->trial, op, (double)wrong / n, 2e-3);
    twin_give_ints(w, gpu, cpu);
}

// Are the GPU's integers and scales exactly what the CPU makes of the GPU's floats? (Dimensions are
// multiples of 32: all rows are one sequence of groups.)
static void twin_quantised(Twin *w, const GpuAct *gpu, const Act *cpu) {
    size_t n = cpu->ldq * (size_t)w->T, groups = cpu->lds * (size_t)w->T;
    float *s = xalloc(groups, sizeof *s);
    int8_t *q = xalloc(n, 1);
    quantise(twin_read(w, gpu->x, 4 * n), (int)n, q, s);
    bool same = !memcmp(q, twin_read(w, gpu->q, n), n);
    same = !memcmp(s, twin_read(w, gpu->s, 4 * groups), 4 * groups) && same;
    trial_note(&w->trial, "quantise", !same, 0);
    free(q), free(s);
}

// What an operation has just written on both. The indexer's is there in some layers only.
static void twin_outputs(Twin *w, const char *op, bool int8) {
    for (const Output *o = outputs; o < outputs + COUNT(outputs); o++) {
        const void *gpu = (char *)w->g + o->gpu, *cpu = (char *)w->r + o->cpu;
        CuPtr dev = *(const CuPtr *)gpu;                // of a GpuAct: the floats, as of an Act
        const float *host = *(float *const *)cpu;
        size_t n = (size_t)w->T;
        if (strcmp(o->op, op) || (strpbrk(o->shape, "Ii") && w->lc->ratio != 4)) continue;
        for (const char *p = o->shape; *p; p++) n *= (size_t)shape_of(*p, w->cpu.c, 0);
        if (o->as == FLOATS_AND_INTS) twin_quantised(w, gpu, cpu);
        trial_compare(&w->trial, op, dev, o->as == HALVES, host, n, int8 ? int8_limit : o->limit);
        if (o->as == FLOATS_AND_INTS) twin_give_ints(w, gpu, cpu);
    }
}

// A random past of `pos` positions: window, compressed rows, index keys and compressor inputs.
static void twin_past(Twin *w, const Layer *l, int i, int pos) {
    Device *d = &w->cpu;
    const Cache *c = d->cache[0] + i;
    const Compressor *comp[] = { &l->comp, &l->icomp };
    void *part[] = { c->win, c->comp, c->ikeys, c->cin, c->icin };
    int slots = d->cring[l->ratio];
    size_t size[5];
    cache_sizes(d, l, size);
    for (int j = 1; j < 3 && l->ratio; j++) {           // of the compressed rows those that exist
        size_t rows = (size_t)d->ctx / l->ratio;
        size[j] = rows ? size[j] / rows * (size_t)(pos / l->ratio) : 0;
    }
    for (int j = 0; j < 5; j++) {
        bool halves = j < 3;
        size_t n = size[j] / (halves ? 2 : 4);
        float *x = halves ? NULL : xalloc(n, sizeof *x);
        for (size_t k = 0; k < n; k++) {
            float v = random_signed(&w->state);
            if (halves) ((bf16 *)part[j])[k] = bf16_of_f32(v);
            else x[k] = v;
        }
        CuPtr to = w->g->slot[0] + w->g->layer[i].part[j];
        if (n) twin_give(w, to, halves ? part[j] : x, size[j]);
        for (int p = pos > slots ? pos - slots : 0; x && n && p < pos; p++) {
            const float *in = x + (size_t)(p % slots) * 2 * comp[j - 3]->wkv.n;
            compress_store(comp[j - 3], part[j], slots, in, p);     // the CPU keeps gate + ape
        }
        free(x);
    }
}

// The compressor inputs of the batch: [T, 2, n] on the CPU, in part `j` of the GPU's cache.
static void twin_ring(Twin *w, int j, const float *cpu, int n, int slots) {
    CuPtr ring = w->g->slot[0] + w->g->layer[w->i].part[j];
    for (int t = 0; t < w->T; t++) {
        CuPtr row = ring + 8 * (size_t)n * (size_t)(w->r->rows[t].pos % slots);
        trial_compare(&w->trial, "attn_project", row, false, cpu + (size_t)t * 2 * n,
                      2 * (size_t)n, 3e-5);
    }
}

// The rows of the cache that the batch has written, parts 0 to 2; then both go on from the CPU's.
static void twin_rows(Twin *w) {
    const Cache *own = w->cpu.cache[0] + w->i;
    const void *part[] = { own->win, own->comp, own->ikeys };
    int M = w->lc->ratio, K = w->cpu.c->head_dim, n[] = { K, K, w->cpu.c->index_dim };
    float *x = xalloc(MAX_HEAD_DIM, sizeof *x);
    for (int t = 0; t < w->T; t++) {
        int pos = w->r->rows[t].pos, parts = !M || (pos + 1) % M ? 1 : M == 4 ? 3 : 2;
        for (int j = 0; j < parts; j++) {
            size_t at = (size_t)(j ? pos / M : pos % w->cpu.ring);
            CuPtr row = w->g->slot[0] + w->g->layer[w->i].part[j] + 2 * at * (size_t)n[j];
            row_get(&w->cpu, part[j], at, n[j], x);
            trial_compare(&w->trial, j ? "compress" : "attn_latent", row, true, x, (size_t)n[j],
                          2e-5);
        }
    }
    free(x);
}

// The scores within rounding; then the choice among the CPU's own scores, made coarse, exactly.
static void twin_index(Twin *w) {
    Run *r = w->r;
    Cuda *g = w->g;
    const Config *c = w->cpu.c;
    int topk = c->index_topk, keys = n_visible(r->rows[w->T - 1].pos, 4), wrong = 0;
    if (keys <= topk || g->score_rows < w->T) return;
    float scale = 1.0f / sqrtf((float)c->index_dim) / sqrtf((float)c->index_heads);
    for (int t = 0; t < w->T; t++) {
        int n = n_visible(r->rows[t].pos, 4);
        float *s = r->iscore + (size_t)t * keys;
        CuPtr row = g->scores + 4 * (size_t)g->score_ld * (size_t)t;
        if (n <= topk) continue;
        for (int j = 0; j < n; j++) s[j] /= scale;      // the GPU leaves out the common factor
        trial_compare(&w->trial, "index_scores", row, false, s, (size_t)n, 1e-5);
        for (int j = 0; j < n; j++) s[j] = rintf(2 * s[j]) / 2;     // many ties
        twin_give(w, row, s, 4 * (size_t)n);
        top_k(s, n, topk, r->top + (size_t)t * topk);
    }
    gpu_choose(w->gpu, 0, w->T, keys);
    const int *chosen = twin_read(w, g->chosen, 4 * (size_t)w->T * topk);
    for (int t = 0; t < w->T; t++) {
        size_t at = (size_t)t * topk;
        if (n_visible(r->rows[t].pos, 4) <= topk) continue;
        wrong += memcmp(chosen + at, r->top + at, sizeof *chosen * topk) != 0;
    }
    trial_note(&w->trial, "index_topk", wrong, 0);
}

// One operation on both: its arguments there, after the device.
#define BOTH(w, op_, on_cpu, on_gpu) do { \
    (w)->cpu.op->op_(&(w)->cpu, on_cpu); \
    (w)->gpu->op->op_((w)->gpu, on_gpu); \
} while (0)
#define ARGS(...) __VA_ARGS__

static void twin_pre(Twin *w, const Hyper *hc, const Hyper *hg, const float *nc, const float *ng) {
    BOTH(w, hc_pre, ARGS(hc, nc), ARGS(hg, ng));
    twin_outputs(w, "hc_post", false);
    twin_outputs(w, "hc_pre", false);
}

static void twin_post(Twin *w) {
    w->cpu.op->hc_post(&w->cpu);
    w->gpu->op->hc_post(w->gpu);
}

// The operations of forward_layer().
static void twin_layer(Twin *w) {
    const Layer *lc = w->lc, *lg = w->lg;
    int i = w->i, M = lc->ratio;
    size_t chosen = (size_t)w->T * w->cpu.c->n_active;
    bool int8 = takes_int8(lc->wo_b.fmt);
    w->cpu.at = w->gpu->at = lc->name;
    twin_pre(w, &lc->hc_attn, &lg->hc_attn, lc->attn_norm, lg->attn_norm);
    BOTH(w, attn_project, lc, lg);
    twin_outputs(w, "attn_project", false);
    if (M) twin_ring(w, 3, w->r->cin, lc->comp.wkv.n, w->cpu.cring[M]);
    if (M == 4) twin_ring(w, 4, w->r->icin, lc->icomp.wkv.n, w->cpu.cring[4]);
    BOTH(w, attn_latent, ARGS(lc, i), ARGS(lg, i));
    twin_outputs(w, "attn_latent", false);
    twin_rows(w);
    BOTH(w, attn_query, lc, lg);
    twin_outputs(w, "attn_query", false);
    if (M == 4) {
        BOTH(w, index_topk, ARGS(lc, i), ARGS(lg, i));
        twin_index(w);
    }
    BOTH(w, attend, ARGS(lc, i), ARGS(lg, i));
    twin_outputs(w, "attend", false);
    BOTH(w, attn_out, lc, lg);
    if (int8) twin_ints(w, "attn_out", &w->g->u, &w->r->u);
    twin_outputs(w, "attn_out", int8);
    twin_post(w);
    twin_pre(w, &lc->hc_ffn, &lg->hc_ffn, lc->ffn_norm, lg->ffn_norm);
    BOTH(w, route, lc, lg);
    BOTH(w, experts, lc, lg);
    const void *ids = twin_read(w, w->g->r.ids, 4 * chosen);
    trial_note(&w->trial, "route", memcmp(ids, w->r->expert, 4 * chosen) != 0, 0);
    twin_outputs(w, "route", false);
    twin_outputs(w, "experts", takes_int8(lc->sw2.fmt));
    twin_post(w);
}

static void twin_head(Twin *w) {
    const Weights *wc = &w->cpu.w, *wg = &w->gpu->w;
    size_t n = (size_t)w->T * w->cpu.c->vocab;
    float *lc = xalloc(n, sizeof *lc), *lg = xalloc(n, sizeof *lg);
    int *want = xalloc((size_t)w->T, sizeof *want);
    for (int t = 0; t < w->T; t++) want[t] = t;
    w->cpu.at = w->gpu->at = "head";
    BOTH(w, head, ARGS(&wc->hc_head, wc->norm, want, w->T, lc),
         ARGS(&wg->hc_head, wg->norm, want, w->T, lg));
    trial_note(&w->trial, "head", deviation(lg, lc, n, 0), 5e-5);
    twin_outputs(w, "hc_post", false);
    free(want), free(lc), free(lg);
}

// The kernels that a layer needs: the same for layers of one kind.
static int layer_kind(const Layer *l) {
    return (l->ratio == 4 ? 1 : l->ratio ? 2 : 4) << (l->tid2eid ? 3 : 0);
}

// Runs every operation of stage `gpu` (layers: the last of each kind) there and on the CPU with
// identical inputs: T rows from position pos on, slot 0. host: the weights in host memory. `list`
// [N_CHECKS] gathers the worst deviations.
static void cuda_parity(Device *gpu, const Weights *host, Pool *pool, int T, int pos, uint64_t seed,
                        GpuCheck *list) {
    Twin w = { .cpu = *gpu, .gpu = gpu, .g = gpu->impl, .T = T, .state = seed };
    Device *c = &w.cpu;
    int V = gpu->c->vocab;
    c->w = *host;
    if (!gpu->w.mtp) c->w.mtp = NULL;
    c->max_rows = T;
    c->at = gpu->at = "self-test";
    cpu_device(c, pool);
    w.r = c->impl;
    w.trial = (Trial){ &w.g->gpu, T, list };
    w.g->keep_floats = true;
    c->op->cache_new(c, 0);
    gpu->op->cache_new(gpu, 0);
    Row *rows = xalloc((size_t)T, sizeof *rows);
    for (int t = 0; t < T; t++)
        rows[t] = (Row){ (t * 7 + 3) % V, 0, pos + t, (t * 5 + 1) % V };
    BOTH(&w, begin, ARGS(rows, T), ARGS(rows, T));
    if (gpu->first == 0) {
        c->op->embed(c);
        gpu->op->embed(gpu);
        twin_outputs(&w, "embed", false);
    }
    size_t bytes = streams_bytes(c, T);
    for (size_t i = 0; i < bytes / 4; i++) w.r->X[i] = random_signed(&w.state);
    twin_give(&w, w.g->X, w.r->X, bytes);
    for (int i = gpu->first; i < gpu->last; i++) {
        bool again = false;
        for (int j = i + 1; j < gpu->last; j++)
            again |= layer_kind(&host->layers[j]) == layer_kind(&host->layers[i]);
        if (again) continue;
        w.lc = &c->w.layers[i];
        w.lg = &gpu->w.layers[i];
        w.i = i - gpu->first;
        twin_past(&w, w.lc, w.i, pos);
        twin_layer(&w);
    }
    if (gpu->has_head) twin_head(&w);
    if (c->w.mtp) {
        BOTH(&w, mtp_in, c->w.mtp, gpu->w.mtp);
        twin_outputs(&w, "mtp_in", false);
    }
    gpu_finish(gpu);            // what is not finite has a message of its own
    w.g->keep_floats = false;
    free(rows), free(w.tmp);
    c->op->cache_free(c, 0);
    gpu->op->cache_free(gpu, 0);
}

// A position where the indexer chooses and, in a batch of T rows, windows close.
static int selftest_pos(const Device *d, int T) {
    int pos = (d->c->index_topk / 32 + 2) * 128 - 1 - T / 2;
    while (pos + T > d->ctx) pos -= 128;
    return pos < 0 ? 0 : pos;
}

// Tests a stage that has just started, unless this GPU has passed the same before. Ends the process
// if an operation is wrong. A near tie in the router can fall differently: what fails is tried with
// other numbers.
static void cuda_selftest(Device *d, const Weights *host, int threads) {
    int T = d->max_rows < TILE + 1 ? d->max_rows : TILE + 1, batch[] = { T, 1 }, kinds = 0;
    bool passed = false;
    double start = now();
    for (int i = d->first; i < d->last; i++) kinds |= layer_kind(&host->layers[i]);
    int what[] = { T, selftest_pos(d, T), kinds, d->first == 0, d->has_head, d->w.mtp != NULL };
    uint64_t key = hash64(HASH_START, what, sizeof what);
    if (gpu_passed(d->impl, &key)) return;
    Pool *pool = pool_new(threads);
    for (uint64_t seed = 1; seed <= 2 && !passed; seed++) {
        GpuCheck list[N_CHECKS] = { 0 };
        for (int i = 0; i < 1 + (T > 1); i++)
            cuda_parity(d, host, pool, batch[i], selftest_pos(d, batch[i]), seed, list);
        passed = gpu_verdict(d->impl, key, list, seed == 2, start);
    }
    pool_free(pool);
}

// --- what `dsv4 devices` measures (apps/devices.c)

double gpu_product_time(Device *d, int bytes, int n, int k, int rows) {
    enum { TIMES = 10 };
    Gpu *g = d->impl;
    Mat m = { .n = n, .k = k, .fmt = bytes == 1 ? W_INT8 : W_BF16 };
    size_t weights = row_bytes(&m) * (size_t)n, in = TILE * (size_t)k;
    CuPtr w = gpu_alloc(g, weights + weights / 64 + 65536, "test weights");     // and scales
    CuPtr x = gpu_alloc(g, 6 * in, "test rows"), y = gpu_alloc(g, 4 * TILE * (size_t)n, "results");
    m.w = (const void *)(uintptr_t)w;
    m.s = (const void *)(uintptr_t)(w + weights);
    GpuAct act = { x, x + 4 * in, x + 5 * in };
    GpuProducts p = one_product(d, &m, &act, y);
    gpu_lap(g);
    for (int i = 0; i < TIMES; i++) gpu_products(d, &p, rows);
    double t = gpu_lap(g) / TIMES;
    CU(g, MemFree, w);
    CU(g, MemFree, x);
    CU(g, MemFree, y);
    return t;
}

Gpu *gpu_of(Device *d) { return d->impl; }
void gpu_close(Device *d) { cuda_close(d); }
// ---------------------------------------------------------------------------
// command line: one table of options prints --help and checks every value

#define VERSION "0.1"

typedef enum {
    RUN = 1, TOKENIZE = 2, INFO = 4, BENCH = 8, PPL = 16, VERIFY = 32, DEVICES = 64, CONVERT = 128,
    COMPUTES = RUN | BENCH | PPL, LOADS = COMPUTES | INFO, ANY = 255
} Command;

Options opt = { .tokens = -1, .seed = -1, .top_k = -1, .temp = -1, .top_p = -1, .min_p = -1 };

typedef enum { FLAG, WORD, INT, LONG, REAL } OptType;   // bool, const char *, int, int64_t, double

typedef struct {
    const char *name;           // long name
    char letter;
    OptType type;
    int commands;               // where it is allowed
    void *to;
    double lo, hi;              // INT, LONG and REAL: allowed range
    const char *arg, *help;     // arg of a WORD: its choices, if it holds a '|'; help NULL: for tests
} Option;

static const Option options[] = {
    { "model", 'm', WORD, LOADS | TOKENIZE | DEVICES, &opt.open.dir, 0, 0, "DIR",
      "the checkpoint's directory (default: a small built-in model)" },
    { "prompt", 'p', WORD, RUN, &opt.prompt, 0, 0, "TEXT",
      "answer one prompt (without a prompt: chat)" },
    { "file", 'f', WORD, RUN, &opt.file, 0, 0, "FILE", "the prompt is a file's text ('-': stdin)" },
    { "raw", 0, FLAG, RUN, &opt.raw, 0, 0, "", "begin-of-sentence and the text, no chat encoding" },
    { "ids", 0, WORD, RUN, &opt.ids, 0, 0, "0,5,6", "the prompt as token ids; answers in ids" },
    { "show-ids", 0, FLAG, RUN, &opt.show_ids, 0, 0, "", "print the answer as token ids" },
    { "tokens", 'n', INT, RUN | BENCH, &opt.tokens, 0, INT_MAX, "N", "tokens to generate at most" },
    { "ctx", 'c', INT, LOADS, &opt.open.ctx, 1, INT_MAX, "N",
      "context: positions a session can hold" },
    { "seed", 's', LONG, RUN, &opt.seed, 0, 9e15, "N", "seed of the sampler (default: the clock)" },
    { "temp", 0, REAL, RUN, &opt.temp, 0, 1000, "X", "temperature, 0 = greedy" },
    { "top-k", 0, INT, RUN, &opt.top_k, 0, INT_MAX, "N", "only the N likeliest tokens, 0 = all" },
    { "top-p", 0, REAL, RUN, &opt.top_p, 1e-9, 1, "X", "only the likeliest tokens that sum to X" },
    { "min-p", 0, REAL, RUN, &opt.min_p, 0, 1, "X", "only tokens X times as likely as the best" },
    { "system", 0, WORD, RUN, &opt.system, 0, 0, "TEXT", "system message" },
    { "think", 0, FLAG, RUN | TOKENIZE, &opt.think, 0, 0, "", "reason first, on standard error" },
    { "nothink", 0, FLAG, RUN | TOKENIZE, &opt.nothink, 0, 0, "", "answer at once (default)" },
    { "effort", 0, WORD, RUN | TOKENIZE, &opt.effort, 0, 0, "low|high|max",
      "how hard to reason, with --think" },
    { "encoding", 0, WORD, RUN | TOKENIZE, &opt.encoding, 0, 0, "v4|0731",
      "prompt generation (default: by config)" },
    { "devices", 0, WORD, LOADS, &opt.open.devices, 0, 0, "LIST",
      "cuda:0,cuda:1,cpu (default: all GPUs); cpu:0: a NUMA node" },
    { "layers", 0, WORD, LOADS, &opt.open.layers, 0, 0, "LIST", "layers per device, e.g. 22,21" },
    { "threads", 't', INT, COMPUTES | VERIFY | CONVERT, &opt.open.threads, 1, 1024, "N",
      "CPU threads (default: all cores)" },
    { "exact", 0, FLAG, COMPUTES, &opt.open.exact, 0, 0, "", "FP32 everywhere: the slow reference" },
    { "mlock", 0, FLAG, COMPUTES, &opt.open.mlock, 0, 0, "", "keep the weights in memory" },
    { "logits", 0, WORD, RUN, &opt.logits, 0, 0, "FILE", "write the prompt's logits, float32" },
    { "mtp-logits", 0, WORD, RUN, &opt.mtp_logits, 0, 0, "FILE", "the same for the MTP layer" },
    { "plain", 0, FLAG, TOKENIZE, &opt.plain, 0, 0, "", "special tokens in the text are text" },
    { "decode", 0, FLAG, TOKENIZE, &opt.decode, 0, 0, "", "ids -> bytes" },
    { "chat", 0, WORD, TOKENIZE, &opt.chat, 0, 0, "FILE", "a messages file -> its ids" },
    { "layer-remap", 0, WORD, CONVERT, &opt.convert.layer_remap, 0, 0, "LIST",
      "layers to keep, in their new order" },
    { "verify", 0, FLAG, CONVERT, &opt.convert.verify, 0, 0, "",
      "compare the result with the source" },
    { "graphs", 0, FLAG, COMPUTES, &opt.graphs, 0, 0, "", "decode steps as CUDA graphs" },
    { "kernels", 0, WORD, COMPUTES | DEVICES, &opt.kernels, 0, 0, "FILE", "another kernels.cu" },
    { "help", 'h', FLAG, ANY, &opt.help, 0, 0, "", "this text; of one subcommand: its options" },
    { "version", 0, FLAG, ANY, &opt.version, 0, 0, "", "the version" },
    { "chunk", 0, INT, COMPUTES, &opt.open.chunk, 1, 1 << 16, "N", NULL },
    { "isa", 0, WORD, COMPUTES, &opt.isa, 0, 0, "portable|avx2|avx512|avx512-vnni", NULL },
};

typedef struct {
    const char *name;
    Command command;
    const char *args, *help;
    int n_args;
} Subcommand;

static const Subcommand subcommands[] = {
    { "", RUN, "-m DIR [-p TEXT]", "answer one prompt, or chat in the terminal", 0 },
    { "tokenize", TOKENIZE, "-m DIR", "standard input -> token ids", 0 },
    { "info", INFO, "-m DIR", "config, tensors, formats, memory, placement", 0 },
    { "bench", BENCH, "-m DIR", "tokens per second at several depths, GB/s per kernel", 0 },
    { "ppl", PPL, "-m DIR FILE", "perplexity of a text", 1 },
    { "devices", DEVICES, "", "bring-up report: driver, compiler, GPUs, self-test, rates", 0 },
    { "verify", VERIFY, "DIR", "read every byte of a checkpoint and check it", 1 },
    { "convert", CONVERT, "SRC DST", "original release -> dsv4_int", 2 },
};

// Everything, or what concerns one subcommand.
static void print_help(const Subcommand *only) {
    bool all = only->command == RUN;
    if (all) puts("dsv4: DeepSeek-V4-Flash from its published checkpoints\n");
    for (const Subcommand *s = subcommands; s < subcommands + COUNT(subcommands); s++) {
        char line[80];
        if (!all && s != only) continue;
        snprintf(line, sizeof line, "dsv4 %s%s%s", s->name, *s->name ? " " : "", s->args);
        printf("  %-30s %s\n", line, s->help);
    }
    puts("");
    for (const Option *o = options; o < options + COUNT(options); o++) {
        char name[64], letter[8] = "   ";
        if (!o->help || !(all || o->commands & only->command)) continue;
        if (o->letter) snprintf(letter, sizeof letter, "-%c,", o->letter);
        snprintf(name, sizeof name, "%s --%s %s", letter, o->name, o->arg);
        printf("  %-30s %s\n", name, o->help);
    }
    if (!all) return;
    puts("\nDefaults of the sampler: generation_config.json, else temperature 1.\n"
         "Environment: DSV4_NVRTC (path of libnvrtc), DSV4_CACHE (directory of compiled kernels)");
}

// A value of a choice list "a|b|c".
static bool choice_ok(const char *list, const char *value) {
    size_t n = strlen(value);
    for (const char *p = list; p; p = strchr(p, '|') ? strchr(p, '|') + 1 : NULL)
        if (n && !strncmp(p, value, n) && (p[n] == '|' || !p[n])) return true;
    return false;
}

// name: the option as the user wrote it.
static void set_option(const Option *o, const char *name, const char *value) {
    if (o->type == FLAG) {
        *(bool *)o->to = true;
        return;
    }
    if (o->type == WORD) {
        if (strchr(o->arg, '|') && !choice_ok(o->arg, value))
            die(2, "%s: expected %s, found '%s'", name, o->arg, value);
        *(const char **)o->to = value;
        return;
    }
    bool whole = o->type != REAL;
    char *end;
    double x = strtod(value, &end);
    bool number = end != value && !*end && !value[strspn(value, whole ? "-0123456789"
                                                                     : "-+.0123456789e")];
    if (!number || !(x >= o->lo && x <= o->hi))
        die(2, "%s: expected a %snumber from %.10g to %.10g, found '%s'", name,
            whole ? "whole " : "", o->lo, o->hi, value);
    if (o->type == INT) *(int *)o->to = (int)x;
    if (o->type == LONG) *(int64_t *)o->to = (int64_t)x;
    if (o->type == REAL) *(double *)o->to = x;
}

// The option that a word of the command line names; *value: what follows its '=', or NULL.
static const Option *find_option(const char *word, const char **value) {
    const char *eq = strchr(word, '=');
    for (const Option *o = options; o < options + COUNT(options); o++) {
        size_t n = strlen(o->name);
        bool dashes = word[0] == '-' && word[1] == '-';
        bool is_long = dashes && !strncmp(word + 2, o->name, n) &&
                       (!word[2 + n] || word + 2 + n == eq);
        bool is_short = o->letter && word[0] == '-' && word[1] == o->letter && !word[2];
        *value = is_long && eq ? eq + 1 : NULL;
        if (is_long || is_short) return o;
    }
    return NULL;
}

// Fills opt and args (n_args of them); returns what to do.
static const Subcommand *parse_options(int argc, char **argv, char **args) {
    const Subcommand *s = subcommands;
    for (size_t i = 1; i < COUNT(subcommands) && argc > 1; i++)
        if (!strcmp(argv[1], subcommands[i].name)) s = subcommands + i;
    const char *program = *s->name ? s->name : "-m";
    int n = 0;
    for (int i = *s->name ? 2 : 1; i < argc; i++) {
        const char *value = NULL, *name = argv[i];
        bool dash = name[0] == '-' && name[1];
        const Option *o = dash ? find_option(name, &value) : NULL;
        if (dash && !o) die(2, "unknown option %s (dsv4 --help lists them)", name);
        if (!dash && n == s->n_args) die(2, "unexpected argument '%s' (dsv4 --help)", name);
        if (!dash) {
            args[n++] = argv[i];
            continue;
        }
        if (!(o->commands & s->command)) die(2, "%s does not go with dsv4 %s", name, program);
        if (o->type == FLAG && value) die(2, "%s takes no value", name);
        if (o->type != FLAG && !value && ++i < argc) value = argv[i];
        if (o->type != FLAG && !value) die(2, "%s needs a value: %s", name, o->arg);
        set_option(o, name, value);
    }
    if (n < s->n_args && !opt.help && !opt.version)
        die(2, "usage: dsv4 %s %s", program, s->args);
    return s;
}

// Options that exclude or need each other.
static void check_options(void) {
    int prompts = (opt.prompt != NULL) + (opt.file != NULL) + (opt.ids != NULL);
    const struct { bool wrong; const char *text; } rules[] = {
        { prompts > 1, "-p, -f and --ids: only one of them" },
        { opt.think && opt.nothink, "--think and --nothink: only one of them" },
        { opt.raw && !opt.prompt && !opt.file, "--raw needs -p or -f" },
        { (opt.logits || opt.mtp_logits) && !prompts, "--logits and --mtp-logits need a prompt" },
        { opt.effort && !opt.think, "--effort needs --think" },
        { opt.raw && (opt.think || opt.system), "--raw takes no --system and no --think" },
        { opt.decode + opt.plain + (opt.chat != NULL) > 1,
          "--decode, --plain and --chat: only one of them" },
    };
    for (size_t i = 0; i < COUNT(rules); i++) if (rules[i].wrong) die(2, "%s", rules[i].text);
}
// ---------------------------------------------------------------------------
// the model: one forward pass over stages of layers, and sessions that remember what they have read

typedef struct Batch Batch;
struct Batch {                  // one batch on its way through the stages
    Row *rows;                  // [T]
    int T;
    int *want;                  // [n_want] rows whose logits are wanted
    int n_want;
    float *logits;              // [n_want, V]
    float *mtp_logits;          // [n_want, V]
    bool mtp;                   // run the MTP layer too
    float *X;                   // [T, S, D] hand-off between stages
    int stage;                  // done when it is n_stages
    Batch *next;
};

// What a layer asks of a device. The entry after the last layer stands for the head and MTP layers.
typedef struct {
    size_t weights, context;    // bytes; context: the caches of one session
    double touched;             // bytes of weights that one token reads, so its share of the time
} Share;

enum { MAX_SLOTS = COUNT(((Device *)0)->cache), MAX_STAGES = 64 };

struct Model {
    Config c;
    Store store;
    Weights w;
    int format[N_FORMATS];      // matrices of each format
    Share *share;               // [n_layers + 1]
    size_t buffers[2];          // bytes of a GPU's buffers without and with the head
    Device *stage;              // [n_stages]
    int n_stages;
    bool exact;
    int ctx, chunk, reach;      // reach: how far back a session can be rewound
    bool slot_used[MAX_SLOTS];
    Batch flight[MAX_STAGES + 1];       // [n_flight] chunks of a prompt on their way
    int n_flight;
    bool load, mlock;           // the CPUs' weights: bring them into memory, and keep them there
    pthread_mutex_t lock;       // guards what follows
    pthread_cond_t moved;       // a stage started, or a batch changed its stage
    int n_started;
    Batch *queue[MAX_STAGES];   // first in, first out
};

static int argmax(const float *x, int n) {
    int best = 0;
    for (int i = 1; i < n; i++) if (x[i] > x[best]) best = i;
    return best;
}

// Hyper-connections around attention, then around the experts (spec 2). i: the cache of this stage.
static void forward_layer(Device *d, const Layer *l, int i) {
    const Ops *op = d->op;
    op->hc_pre(d, &l->hc_attn, l->attn_norm);
    d->at = l->name;            // only now: hc_pre checks what the layer before has left
    op->attn_project(d, l);
    op->attn_latent(d, l, i);
    op->attn_query(d, l);
    if (l->ratio == 4) op->index_topk(d, l, i);
    op->attend(d, l, i);
    op->attn_out(d, l);
    op->hc_post(d);
    op->hc_pre(d, &l->hc_ffn, l->ffn_norm);
    op->route(d, l);
    op->experts(d, l);
    op->hc_post(d);
}

static void check_logits(const float *logits, int n, int vocab) {
    for (size_t i = 0; i < (size_t)n * vocab; i++)
        if (!isfinite(logits[i]))
            die(1, "head: the logit of token %d is not finite (run `dsv4 verify` on the "
                "checkpoint)", (int)(i % vocab));
}

// The draft layer after the last main layer: row t sees the token at t + 1 and predicts the one at
// t + 2.
static void forward_mtp(Device *d, Batch *j) {
    const Mtp *m = d->w.mtp;
    int V = d->c->vocab;
    Row *rows = xalloc((size_t)j->T, sizeof *rows);
    memcpy(rows, j->rows, (size_t)j->T * sizeof *rows);
    for (int i = 0; i < j->n_want; i++)
        if (rows[j->want[i]].next < 0) rows[j->want[i]].next = argmax(j->logits + (size_t)i * V, V);
    d->op->begin(d, rows, j->T);
    d->op->mtp_in(d, m);
    d->at = "mtp.0.e_proj and h_proj";
    forward_layer(d, &m->block, d->last - d->first);
    d->op->head(d, &m->hc_head, m->norm, j->want, j->n_want, j->mtp_logits);
    check_logits(j->mtp_logits, j->n_want, V);
    free(rows);
}

static void forward_stage(Device *d, Batch *j) {
    d->op->begin(d, j->rows, j->T);
    d->at = d->first ? "the stage before" : "embed";
    if (d->first == 0) d->op->embed(d);
    else d->op->streams_in(d, j->X);
    for (int i = d->first; i < d->last; i++) forward_layer(d, &d->w.layers[i], i - d->first);
    if (!d->has_head) {
        d->op->streams_out(d, j->X);
        return;
    }
    if (j->n_want) d->op->head(d, &d->w.hc_head, d->w.norm, j->want, j->n_want, j->logits);
    else d->op->settle(d);      // nobody waits for results, but j->X is somebody else's soon
    if (j->n_want) check_logits(j->logits, j->n_want, d->c->vocab);
    if (j->mtp) forward_mtp(d, j);
}

// --- bringing the CPUs' weights into memory

enum { PIECE = 4 << 20 };       // of a file

// Does a stage read this tensor? MTP layers, if they are bound, go with the head.
static bool stage_reads(const Model *m, const Device *d, Span name) {
    int layer = layer_number(name);
    bool embed = name.n > 5 && !memcmp(name.p, "embed", 5);
    bool mtp = name.n > 4 && !memcmp(name.p, "mtp.", 4);
    if (layer >= 0) return layer >= d->first && layer < d->last;
    if (embed && d->first == 0) return true;
    return d->has_head && (m->w.mtp || (!embed && !mtp));
}

// The pieces that hold a stage's tensors, in the files' order: [*n], the caller's.
static Span *stage_pieces(const Model *m, const Device *d, size_t *n) {
    Span *list = NULL;
    *n = 0;
    for (int i = 0; i < m->store.n_shards; i++) {
        Span map = m->store.shards[i].map;
        bool *wanted = xalloc(map.n / PIECE + 1, sizeof *wanted);
        for (const Tensor *t = m->store.tensors; t < m->store.tensors + m->store.n; t++) {
            if (t->shard != i || !t->bytes || !stage_reads(m, d, t->name)) continue;
            for (size_t p = t->at / PIECE; p <= (t->at + t->bytes - 1) / PIECE; p++) wanted[p] = true;
        }
        for (size_t at = 0; at < map.n; at += PIECE) {
            if (!wanted[at / PIECE]) continue;
            list = grow(list, *n, sizeof *list);
            list[(*n)++] = (Span){ map.p + at, map.n - at < PIECE ? map.n - at : PIECE };
        }
        free(wanted);
    }
    return list;
}

typedef struct { const Span *piece; bool lock; } Loading;

// A page that cannot be read is found when it is used.
static void load_pieces(void *arg, int begin, int end) {
    const Loading *o = arg;
    for (const Span *s = o->piece + begin; s < o->piece + end; s++) {
        char *p = (char *)(uintptr_t)s->p;
        if (madvise(p, s->n, MADV_POPULATE_READ) && errno == EINVAL)    // before Linux 5.14
            madvise(p, s->n, MADV_WILLNEED);
        if (o->lock && mlock(p, s->n))
            die(1, "--mlock: %s (ulimit -l allows too little)", strerror(errno));
        loading_move(s->n);
    }
}

// Reads a stage's part of the files with all its threads, so that the first token does not wait for
// the disk page by page. New pages lie in the memory of the node whose thread asks first.
static void load_weights(const Model *m, const Device *d, Pool *pool) {
    double start = now();
    size_t n;
    Span *piece = stage_pieces(m, d, &n);
    for (size_t i = 0; i < n; i++) loading_expect(piece[i].n);
    parallel(pool, (int)n, 1, load_pieces, &(Loading){ piece, m->mlock });
    if (now() - start > 1) note("%s: loaded in %.1f s", d->name, now() - start);
    free(piece);
}

// --- stages as threads: batches follow each other, so all devices work at once

typedef struct { Model *m; int stage, threads; } StageArg;     // threads: as asked for, 0: all cores

static void queue_add(Batch **queue, Batch *j) {
    while (*queue) queue = &(*queue)->next;
    j->next = NULL;
    *queue = j;
}

// Brings a stage's weights to its device. The stages of a kind share the threads asked for, else
// those that may use the same cores share these. A GPU's threads test it.
static void start_stage(const StageArg *a) {
    const Model *m = a->m;
    Device *d = &m->stage[a->stage];
    int share = 0;
    if (d->node >= 0 && !keep_to_node(d->node)) die(1, "%s: cannot keep to its cores", d->name);
    for (const Device *o = m->stage; o < m->stage + m->n_stages; o++)
        share += (o->ordinal < 0) == (d->ordinal < 0) &&
                 (a->threads || o->node == d->node || o->node < 0 || d->node < 0);
    int threads = ((a->threads ? a->threads : usable_cores()) + share - 1) / share;
    if (d->ordinal < 0) {
        Pool *pool = pool_new(threads);
        if (m->load) load_weights(m, d, pool);
        cpu_device(d, pool);
    } else {
        cuda_device(d, d->ordinal);
        cuda_selftest(d, &m->w, threads);
    }
}

__attribute__((noreturn)) static void *stage_main(void *arg) {
    StageArg a = *(StageArg *)arg;
    Model *m = a.m;
    free(arg);
    start_stage(&a);
    pthread_mutex_lock(&m->lock);
    m->n_started++;
    pthread_cond_broadcast(&m->moved);
    for (;;) {
        while (!m->queue[a.stage]) pthread_cond_wait(&m->moved, &m->lock);
        Batch *j = m->queue[a.stage];
        m->queue[a.stage] = j->next;
        pthread_mutex_unlock(&m->lock);
        forward_stage(&m->stage[a.stage], j);
        pthread_mutex_lock(&m->lock);
        j->stage++;
        if (j->stage < m->n_stages) queue_add(&m->queue[j->stage], j);
        pthread_cond_broadcast(&m->moved);
    }
}

// All stages at once; returns when they are ready. One alone needs no thread.
static void start_stages(Model *m, int threads) {
    StageArg each = { m, 0, threads };
    pthread_mutex_init(&m->lock, NULL);
    pthread_cond_init(&m->moved, NULL);
    if (m->n_stages == 1) {
        start_stage(&each);
        return;
    }
    for (; each.stage < m->n_stages; each.stage++) {
        StageArg *a = memcpy(xalloc(1, sizeof *a), &each, sizeof each);
        pthread_t thread;
        if (pthread_create(&thread, NULL, stage_main, a)) die(1, "cannot start a thread");
        pthread_detach(thread);
    }
    pthread_mutex_lock(&m->lock);
    while (m->n_started < m->n_stages) pthread_cond_wait(&m->moved, &m->lock);
    pthread_mutex_unlock(&m->lock);
}

// Hands a batch to the first stage; one stage computes it here and now. Batches are finished in
// order.
static void forward_begin(Model *m, Batch *j) {
    j->stage = 0;
    if (m->n_stages == 1) {
        forward_stage(m->stage, j);
        j->stage = 1;
        return;
    }
    pthread_mutex_lock(&m->lock);
    queue_add(&m->queue[0], j);
    pthread_cond_broadcast(&m->moved);
    pthread_mutex_unlock(&m->lock);
}

static void forward_end(Model *m, Batch *j) {
    pthread_mutex_lock(&m->lock);
    while (j->stage < m->n_stages) pthread_cond_wait(&m->moved, &m->lock);
    pthread_mutex_unlock(&m->lock);
}

// --- sessions: a token list and the caches that stand for it

// The rings at one position of a session. The compressed rows stay in the caches: they are only
// ever appended.
struct Snapshot {
    int pos;
    void *rings[MAX_STAGES];    // per stage
};

// Copies the slots of positions [from, to) of a ring, in one or two pieces, to or from a flat
// buffer (NULL only counts). Returns bytes.
static size_t ring_copy(Device *d, int slot, int i, int part, size_t row, int slots, int from,
                        int to, char *buf, bool save) {
    for (int p = from, n; buf && p < to; p += n) {
        int at = p % slots;
        n = to - p < slots - at ? to - p : slots - at;
        d->op->cache_copy(d, slot, i, part, row * (size_t)at, buf + row * (size_t)(p - from),
                          row * (size_t)n, save);
    }
    return row * (size_t)(to > from ? to - from : 0);
}

// What a stage's rings must hold for the next row to be at `pos`: the window, and the compressors'
// open windows.
static size_t rings_copy(Device *d, int slot, int pos, char *buf, bool save) {
    size_t n = 0;
    for (int i = 0; i < stage_caches(d); i++) {
        const Layer *l = stage_layer(d, i);
        int M = l->ratio, open = M ? pos / M * M : 0, window = d->c->window;
        const struct { bool there; size_t row; int slots, from; } ring[5] = {
            [0] = { true, kv_bytes(d, d->c->head_dim), d->ring, pos > window ? pos - window : 0 },
            [3] = { M, 8 * (size_t)l->comp.wkv.n, d->cring[M], M == 4 && open ? open - M : open },
            [4] = { M == 4, 8 * (size_t)l->icomp.wkv.n, d->cring[M], open ? open - M : 0 },
        };
        for (int j = 0; j < 5; j++)
            if (ring[j].there)
                n += ring_copy(d, slot, i, j, ring[j].row, ring[j].slots, ring[j].from, pos,
                               buf ? buf + n : NULL, save);
    }
    return n;
}

Session *session_new(Model *m) {
    int slot = 0;
    while (slot < MAX_SLOTS && m->slot_used[slot]) slot++;
    if (slot == MAX_SLOTS) return NULL;
    Session *s = xalloc(1, sizeof *s);
    *s = (Session){ .m = m, .slot = slot, .tokens = reserve((size_t)m->ctx * sizeof *s->tokens) };
    m->slot_used[slot] = true;
    for (int i = 0; i < m->n_stages; i++) m->stage[i].op->cache_new(&m->stage[i], slot);
    return s;
}

void session_free(Session *s) {
    if (!s) return;
    for (int i = 0; i < s->m->n_stages; i++)
        s->m->stage[i].op->cache_free(&s->m->stage[i], s->slot);
    s->m->slot_used[s->slot] = false;
    munmap(s->tokens, (size_t)s->m->ctx * sizeof *s->tokens);
    free(s);
}

// Forgets everything after the first n tokens. False if the rings no longer hold that point.
static bool session_rewind(Session *s, int n) {
    if (n < s->kept || n > s->n) return n == s->n;
    s->n = n;
    return true;
}

void session_clear(Session *s) { s->n = s->kept = 0; }

Snapshot *session_snapshot(const Session *s) {
    Snapshot *p = xalloc(1, sizeof *p);
    p->pos = s->n;
    for (int i = 0; i < s->m->n_stages; i++) {
        Device *d = &s->m->stage[i];
        p->rings[i] = xalloc(rings_copy(d, s->slot, s->n, NULL, true), 1);
        rings_copy(d, s->slot, s->n, p->rings[i], true);
    }
    return p;
}

// Back to the snapshot's position. Its tokens must still be the session's first ones.
static void session_restore(Session *s, const Snapshot *p) {
    for (int i = 0; i < s->m->n_stages; i++)
        rings_copy(&s->m->stage[i], s->slot, p->pos, p->rings[i], false);
    s->n = s->kept = p->pos;
}

void snapshot_free(Snapshot *p) {
    for (int i = 0; p && i < MAX_STAGES; i++) free(p->rings[i]);
    free(p);
}

// Rows [from, to) of a cache, from > 0, each made of the halves of two of the rows before `from`.
static void rows_invent(void *rows, size_t bytes, size_t from, size_t to) {
    uint8_t *p = rows;
    size_t half = bytes / 2;
    for (size_t i = from; p && i < to; i++) {
        memcpy(p + i * bytes, p + i * 40503 % from * bytes, half);
        memcpy(p + i * bytes + half, p + i / from % from * bytes + half, bytes - half);
    }
}

void session_stretch(Session *s, int to) {
    Snapshot *rings = session_snapshot(s);
    for (int k = 0; k < s->m->n_stages; k++) {
        Device *d = &s->m->stage[k];
        for (int i = 0; i < stage_caches(d); i++) {
            Cache *c = d->cache[s->slot] + i;
            int M = stage_layer(d, i)->ratio;
            if (!M || s->n < M) continue;
            size_t have = (size_t)(s->n / M), want = (size_t)(to / M);
            rows_invent(c->comp, kv_bytes(d, d->c->head_dim), have, want);
            rows_invent(c->ikeys, kv_bytes(d, d->c->index_dim), have, want);
        }
    }
    rings->pos = to;
    session_restore(s, rings);
    snapshot_free(rings);
}

// Brings the session as far into tokens [n] as what it has read allows, by rewinding or with a
// snapshot of it (or NULL); at least the last token stays to be read. Returns how many are in place.
int session_reuse(Session *s, const int *tokens, int n, const Snapshot *snap) {
    int same = 0;
    while (same < n - 1 && same < s->n && tokens[same] == s->tokens[same]) same++;
    if (session_rewind(s, same)) return same;
    if (snap && snap->pos <= same) session_restore(s, snap);
    else session_clear(s);
    return s->n;
}

// The next n of the `left` tokens, from position pos on; `all`: every row's logits are wanted.
static void batch_fill(Batch *b, int slot, int pos, const int *tokens, int n, int left, bool all) {
    b->T = n;
    b->n_want = all ? n : n == left;
    for (int i = 0; i < n; i++)
        b->rows[i] = (Row){ tokens[i], slot, pos + i, i + 1 < left ? tokens[i + 1] : -1 };
    for (int i = 0; i < b->n_want; i++) b->want[i] = n - b->n_want + i;
}

int session_feed(Session *s, const int *tokens, int n, const Feed *f) {
    Model *m = s->m;
    int begun = 0, done = 0, head = 0, tail = 0;
    if (n > m->ctx - s->n) n = m->ctx - s->n;
    while (done < n && !(interrupted && begun == done)) {
        while (begun < n && head - tail < m->n_flight && !interrupted) {
            Batch *b = &m->flight[head++ % m->n_flight];
            int left = n - begun, T = left < m->chunk ? left : m->chunk;
            batch_fill(b, s->slot, s->n + begun, tokens + begun, T, left, f->sink);
            b->mtp = f->mtp;
            forward_begin(m, b);
            begun += T;
        }
        if (head == tail) break;
        Batch *b = &m->flight[tail++ % m->n_flight];
        forward_end(m, b);
        if (f->sink) f->sink(f->arg, s->n + done, b->T, b->logits, f->mtp ? b->mtp_logits : NULL);
        if (b->n_want) s->logits = b->logits + (size_t)(b->n_want - 1) * m->c.vocab;
        done += b->T;
        if (f->progress) progress("reading the prompt", done, n);
    }
    memcpy(s->tokens + s->n, tokens, (size_t)done * sizeof *tokens);
    s->n += done;
    s->kept = s->n - m->reach > s->kept ? s->n - m->reach : s->kept;
    return done;
}

// Hand-off between stages: pinned if one is a GPU, which then reads and writes it directly.
static float *hand_off(Model *m, size_t bytes) {
    for (Device *d = m->stage; d < m->stage + m->n_stages; d++) {
        Gpu *g = d->impl;
        if (d->ordinal < 0) continue;
        CU(g, CtxSetCurrent, g->ctx);
        return gpu_pinned(g, bytes);
    }
    return reserve(bytes);
}

// Memory for the chunks of a prompt; pages are taken as they are touched.
static void model_buffers(Model *m) {
    size_t T = (size_t)m->chunk, logits = T * (size_t)m->c.vocab * sizeof(float);
    m->n_flight = m->n_stages > 1 ? m->n_stages + 1 : 1;
    for (Batch *b = m->flight; b < m->flight + m->n_flight; b++) {
        b->rows = xalloc(T, sizeof *b->rows);
        b->want = xalloc(T, sizeof *b->want);
        b->logits = reserve(logits);
        if (m->w.mtp) b->mtp_logits = reserve(logits);
        if (m->n_stages > 1) b->X = hand_off(m, T * m->c.hc_mult * m->c.dim * sizeof(float));
    }
}

// --- opening a model

// Reads config.json, opens the shards and binds every tensor. Nothing is read from the weights but
// small vectors.
static bool model_bind(Model *m, const char *dir, Err *e) {
    Binder b = { .store = &m->store, .c = &m->c, .e = e };
    if (!config_open(&m->c, dir, e) || !store_open(&m->store, dir, e) || !weights_bind(&m->w, &b))
        return false;
    memcpy(m->format, b.format, sizeof m->format);
    if (m->c.dspark) note("this release's mtp.* tensors (DSpark) are skipped");
    else if ((size_t)b.bound < m->store.n)
        note("%zu tensors of the checkpoint are not used", m->store.n - (size_t)b.bound);
    return true;
}

bool model_check(const char *dir, Err *e) {
    static Model m;
    return model_bind(&m, dir, e);
}

static size_t physical_memory(void) {
    return (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
}

// All of a stage but its device and its layers.
static void stage_init(const Model *m, Device *d) {
    const Config *c = &m->c;
    d->c = c;
    d->w = m->w;
    d->exact = m->exact;
    d->max_rows = m->chunk;
    d->ctx = m->ctx;
    d->ring = c->window + m->reach;
    d->cring[4] = 2 * 4 + m->reach;
    d->cring[128] = 128 + m->reach;
}

// Bytes of one session's caches of a layer at its full context.
static size_t context_bytes(const Device *d, const Layer *l) {
    size_t n = 0, size[5];
    cache_sizes(d, l, size);
    for (int j = 0; j < 5; j++) n += size[j];
    return n;
}

// Sets the context, and what every layer takes with it.
static void set_context(Model *m, int ctx, int chunk) {
    const Config *c = &m->c;
    int L = c->n_layers;
    Device d = { 0 };
    if (!m->share) m->share = xalloc((size_t)L + 1, sizeof *m->share);
    m->ctx = ctx;
    m->chunk = chunk && chunk < ctx ? chunk : ctx < 512 ? ctx : 512;
    m->reach = m->chunk + 64;
    stage_init(m, &d);
    for (int i = 0; i < L; i++) {
        const Layer *l = &m->w.layers[i];
        size_t table = l->tid2eid ? 8 * (size_t)c->vocab * c->n_active : 0;
        double experts = (double)l->expert_bytes * c->n_active / c->n_experts;
        m->share[i] = (Share){ l->bytes, context_bytes(&d, l),
                               (double)(l->bytes - l->expert_bytes - table) + experts };
    }
    size_t head = mat_bytes(&m->w.head);
    m->share[L] = (Share){ head, 0, (double)head };
    for (int i = 0; m->w.mtp && i < c->n_mtp; i++) {
        m->share[L].weights += m->w.mtp[i].block.bytes;
        m->share[L].context += context_bytes(&d, &m->w.mtp[i].block);
    }
    for (int i = 0; i < 2; i++) {
        d.has_head = i;
        m->buffers[i] = cuda_buffer_bytes(&d);
    }
}

// What layers [first, end) take together.
static Share share_of(const Model *m, int first, int end) {
    Share sum = { 0 };
    for (const Share *s = m->share + first; s < m->share + end; s++) {
        sum.weights += s->weights;
        sum.context += s->context;
        sum.touched += s->touched;
    }
    return sum;
}

static Share stage_share(const Model *m, const Device *d) {
    return share_of(m, d->first, d->last + d->has_head);
}

// The context a session gets: as asked, else the least of what the model can, 131072 and what half
// the memory holds.
static void choose_context(Model *m, const Opening *o) {
    int most = m->c.max_ctx;
    if (o->ctx > most) die(2, "-c %d: this model reads at most %d positions", o->ctx, most);
    set_context(m, o->ctx ? o->ctx : most < 131072 ? most : 131072, o->chunk);
    while (!o->ctx && m->ctx > 4096 &&
           share_of(m, 0, m->c.n_layers + 1).context > physical_memory() / 2)
        set_context(m, m->ctx / 2, o->chunk);
}

// --- placement: runs of layers on devices

// ordinal: of the GPU, -1: the CPU. node: of memory that the CPU keeps to, -1: all.
static void add_stage(Model *m, int ordinal, int node) {
    Err e;
    if (m->n_stages == MAX_STAGES) die(2, "--devices: at most %d", MAX_STAGES);
    Device *d = &m->stage[m->n_stages++];
    d->ordinal = ordinal;
    d->node = node;
    snprintf(d->name, sizeof d->name, ordinal >= 0 ? "cuda:%d" : node >= 0 ? "cpu:%d" : "cpu",
             ordinal >= 0 ? ordinal : node);
    if (node >= 0 && !node_cores(node))
        die(1, "%s: there is no such NUMA node with cores for this process (lscpu lists them)", d->name);
    if (ordinal < 0) return;
    if (!cuda_open(&e)) die(1, "%s: %s", d->name, e.text);
    d->memory = cuda_memory(ordinal);
    if (!d->memory) die(1, "%s: there are %d GPUs here", d->name, cuda_count());
}

// N of "cuda:N" or "cpu:N", at most three digits; -1: p [len] is something else
static int device_number(const char *p, int len, const char *kind) {
    int k = (int)strlen(kind), n = 0;
    if (len <= k || len > k + 3 || strncmp(p, kind, (size_t)k)) return -1;
    for (; k < len; k++) {
        if (p[k] < '0' || p[k] > '9') return -1;
        n = 10 * n + p[k] - '0';
    }
    return n;
}

// "cuda:0,cuda:1,cpu" or "cpu:0,cpu:1" (NUMA nodes), or NULL: every GPU there is, else the CPU.
static void parse_devices(Model *m, const char *list) {
    int gpus = list || m->exact ? 0 : cuda_count();
    for (int i = 0; i < gpus && i < MAX_STAGES; i++) add_stage(m, i, -1);
    if (!list && !gpus) add_stage(m, -1, -1);
    for (const char *p = list; p; p = *p ? p + 1 : NULL) {
        int len = (int)strcspn(p, ",");
        int cuda = device_number(p, len, "cuda:"), node = device_number(p, len, "cpu:");
        bool cpu = len == 3 && !strncmp(p, "cpu", 3);
        if (cuda < 0 && node < 0 && !cpu)
            die(2, "--devices: expected cpu, cpu:N or cuda:N, found '%.*s'", len, p);
        if (cuda >= 0 && m->exact) die(2, "--exact runs on the cpu only, not on cuda:%d", cuda);
        add_stage(m, cuda, node);
        p += len;
    }
}

// "22,21": one count per stage, all layers together.
static void parse_layers(Model *m, const char *list) {
    int i = 0, at = 0, L = m->c.n_layers;
    char *end = (char *)list;
    for (const char *p = list; i < m->n_stages; p = end + 1) {
        long x = strtol(p, &end, 10);
        if (end == p || x < 0 || x > L - at) break;
        m->stage[i].first = at;
        m->stage[i++].last = at += (int)x;
        if (*end != ',') break;
    }
    if (i != m->n_stages || *end || at != L)
        die(2, "--layers: expected %d counts with the sum %d, found '%s'", m->n_stages, L, list);
    m->stage[i - 1].has_head = true;
}

// Gives the GPUs, in their order, as many layers as their memory allows while no stage's tokens take
// longer than `limit` says. Returns how many layers found no place, the head counted as one more.
static int fill_gpus(Model *m, double limit) {
    int at = 0, L = m->c.n_layers;
    size_t embed = mat_bytes(&m->w.embed), driver = (size_t)256 << 20;   // and what alignment loses
    for (Device *d = m->stage; d < m->stage + m->n_stages; d++) {
        d->first = d->last = at;
        d->has_head = false;
        for (; d->memory && at <= L; at++) {
            bool head = at == L;
            Share s = share_of(m, d->first, at + 1);
            size_t bytes = s.weights + s.context + m->buffers[head] + driver;
            if (!d->first || (head && m->w.mtp)) bytes += embed;
            if (s.touched > limit || bytes > d->memory) break;
            d->last += !head;
            d->has_head = head;
        }
    }
    return L + 1 - at;
}

// The CPUs share the `rest` that the GPUs leave (the last of it is the head, which the last stage
// gets). Stages with nothing to do go.
static void share_rest(Model *m, int rest, int cpus) {
    int n = m->n_stages, k = 0, at = 0;
    m->n_stages = 0;
    for (int i = 0; i < n; i++) {
        Device d = m->stage[i];
        int layers = d.last - d.first;
        if (rest && d.ordinal < 0) {
            layers = (rest - 1) * (k + 1) / cpus - (rest - 1) * k / cpus;
            k++;
        }
        if (rest) d.has_head = i == n - 1;
        d.first = at;
        d.last = at += layers;
        if (layers || d.has_head) m->stage[m->n_stages++] = d;
    }
}

// GPUs alone: the slowest stage as fast as memory allows, with a shorter context if none was asked
// for. Else the GPUs are filled and CPUs take the rest.
static void choose_layers(Model *m, const Opening *o) {
    int L = m->c.n_layers, cpus = 0, ctx = m->ctx;
    size_t memory = 0;
    double lo = 0, hi = 1e15;
    for (const Device *d = m->stage; d < m->stage + m->n_stages; d++) {
        cpus += d->ordinal < 0;
        memory += d->memory;
    }
    int rest = fill_gpus(m, hi);
    while (rest && !cpus && !o->ctx && m->ctx > 4096) {
        set_context(m, m->ctx / 2, o->chunk);
        rest = fill_gpus(m, hi);
    }
    if (rest) {                             // a shorter one was no help
        set_context(m, ctx, o->chunk);
        rest = fill_gpus(m, hi);
    }
    if (rest && !cpus && o->devices)
        die(1, "the GPUs' %.1f GB hold %d of %d layers at %d positions: add cpu to --devices, or "
            "try a smaller -c", (double)memory / 1e9, L + 1 - rest, L, m->ctx);
    if (rest && !cpus) {
        add_stage(m, -1, -1);
        cpus = 1;
    }
    Device *last = &m->stage[m->n_stages - 1];
    if (rest && last->memory) {             // it gets the head, whatever else
        size_t head = m->share[L].weights + m->share[L].context + m->buffers[1] - m->buffers[0];
        if (m->w.mtp) head += mat_bytes(&m->w.embed);
        last->memory -= head < last->memory ? head : last->memory;
        rest = fill_gpus(m, hi);
    }
    for (int step = 0; !rest && step < 50; step++) {
        double mid = (lo + hi) / 2;
        *(fill_gpus(m, mid) ? &lo : &hi) = mid;
    }
    if (!rest) fill_gpus(m, hi);
    share_rest(m, rest, cpus);
}

void print_plan(const Model *m, FILE *to) {
    for (const Device *d = m->stage; d < m->stage + m->n_stages; d++) {
        Share s = stage_share(m, d);
        char layers[64] = "no layers";
        if (d->first < d->last)
            snprintf(layers, sizeof layers, "layers %d to %d", d->first, d->last - 1);
        fprintf(to, "# %s: %s%s, %.2f GB of weights, %.2f GB of context at %d positions\n", d->name,
                layers, d->has_head ? " and the head" : "", (double)s.weights / 1e9,
                (double)s.context / 1e9, m->ctx);
    }
}

// Opens a checkpoint: config, tensors, and where the layers go. Errors end the process.
Model *model_read(const Opening *o) {
    __attribute__((used)) static Model *last;   // it lives until the program ends: it is no leak
    Model *m = last = xalloc(1, sizeof *m);
    Err e;
    if (!model_bind(m, o->dir, &e)) die(1, "%s", e.text);
    m->exact = o->exact;
    m->stage = xalloc(MAX_STAGES, sizeof *m->stage);
    choose_context(m, o);
    parse_devices(m, o->devices);
    if (o->layers) parse_layers(m, o->layers);
    else choose_layers(m, o);
    for (Device *d = m->stage; d < m->stage + m->n_stages; d++) {
        stage_init(m, d);
        for (int i = 0; i < 2; i++) d->inv_freq[i] = rope_frequencies(&m->c, i);
    }
    return m;
}

// Brings the weights to their devices, so that sessions can run.
void model_start(Model *m, const Opening *o) {
    Err e;
    size_t weights = 0, memory = physical_memory();
    print_plan(m, stderr);
    for (int i = 0; i < m->c.n_layers; i++)
        if (!check_table(&m->c, m->w.layers + i, &e)) die(1, "%s", e.text);
    for (const Device *d = m->stage; d < m->stage + m->n_stages; d++)
        if (d->ordinal < 0) weights += stage_share(m, d).weights;
    bool fits = weights < memory - memory / 16;
    if (!fits)
        note("the CPU's weights (%.1f GB) do not fit in this machine's memory (%.1f GB): running "
             "from the disk, slowly", (double)weights / 1e9, (double)memory / 1e9);
    m->mlock = o->mlock;
    m->load = fits || o->mlock;
    for (const Shard *s = m->store.shards; s < m->store.shards + m->store.n_shards && fits; s++)
        madvise((void *)(uintptr_t)s->map.p, s->map.n, MADV_HUGEPAGE);
    start_stages(m, o->threads);
    model_buffers(m);
}

// ---------------------------------------------------------------------------
// what programs may know of a model: dsv4 info, bench, devices

ModelBrief model_brief(const Model *m) {
    Share all = share_of(m, 0, m->c.n_layers + 1);
    ModelBrief b = { .config = &m->c, .store = &m->store, .formats = m->format, .ctx = m->ctx,
                     .mtp = m->w.mtp, .cpu = true, .touched = all.touched, .context = all.context,
                     .number = kv_bytes(m->stage, 1) };
    b.touched += (double)mat_bytes(&m->w.embed) / m->c.vocab;       // one row
    b.touched += (double)mat_bytes(&m->w.hc_head.fn);
    for (int i = 0; i < m->n_stages; i++) b.cpu &= m->stage[i].ordinal < 0;
    return b;
}

LayerBrief layer_brief(const Model *m, int i) {
    int L = m->c.n_layers;
    const Layer *l = i < L ? &m->w.layers[i] : &m->w.mtp[i - L].block;
    return (LayerBrief){ l->name, format_names[l->wq_b.fmt], format_names[l->w1[0].fmt], l->bytes,
                         l->ratio, l->tid2eid };
}

static MatBrief mat_brief(const char *name, const Mat *w, int n) {
    return (MatBrief){ name, w->w ? w : NULL, format_names[w->fmt], w->n, w->k, n, mat_bytes(w) };
}

MatBrief layer_matrix(const Model *m, int i, int kind, int expert) {
    const Layer *l = &m->w.layers[i];
    int dense = COUNT(layer_table), E = m->c.n_experts;
    if (kind == dense) return mat_brief("ffn.experts.w1", l->w1 + expert, E);
    if (kind == dense + 1) return mat_brief("ffn.experts.w2", l->w2 + expert, E);
    if (kind > dense) return (MatBrief){ 0 };           // w3 is like w1
    const Bind *b = &layer_table[kind];
    if (b->kind != MAT) return (MatBrief){ .name = b->name };
    return mat_brief(b->name, (const Mat *)((const char *)l + b->at), 1);
}

MatBrief head_matrix(const Model *m) { return mat_brief("head", &m->w.head, 1); }

const char *cpu_instructions(void) { return cpu_names[cpu_level]; }

int pool_threads(const Pool *p) { return p->n_threads; }

double product_time(const Model *m, Pool *pool, const Mat *const *mats, int n) {
    Act a = act_new(m->stage, 1, mats[0]->k, 1);
    float *y = xalloc((size_t)n * mats[0]->n, sizeof *y);
    Product *p = xalloc((size_t)n, sizeof *p);
    act_quantise(m->stage, &a, 0);
    for (int i = 0; i < n; i++)
        p[i] = (Product){ mats[i], &a, NULL, 1, y + (size_t)i * mats[0]->n, (size_t)mats[0]->n };
    pool_rouse(pool);           // as within a step
    double start = now();
    matmul(pool, p, n, m->exact);
    double t = now() - start;
    free(a.x), free(a.q), free(a.s), free(y), free(p);
    return t;
}

// --- dsv4 devices (apps/devices.c)

Device *gpu_open(const Model *m, int ordinal) {
    enum { LAYERS = 5, CTX = 4096 };        // of the real model: one of each kind
    Device *d = xalloc(1, sizeof *d);
    *d = *m->stage;
    if (d->last > LAYERS) d->last = LAYERS;
    if (d->ctx > CTX) d->ctx = CTX;
    snprintf(d->name, sizeof d->name, "cuda:%d", ordinal);
    cuda_device(d, ordinal);
    return d;
}

void gpu_check(const Model *m, Device *d, GpuCheck *list) {
    static const int batch[] = { 1, 5, 70 };        // rows: a kernel variant each
    Pool *pool = pool_new(0);
    for (size_t i = 0; i < COUNT(batch); i++)
        cuda_parity(d, &m->w, pool, batch[i], selftest_pos(d, batch[i]), 1, list);
    pool_free(pool);
}

char *gpu_kernels(const Model *m, int cc) {
    Str flags = kernel_options("kernels", &m->c, model_formats(&m->w, &m->c), cc);
    char *path;
    const char *from;
    free(kernel_ptx(str_span(&flags), &from, &path));
    free(flags.p);
    return path;
}

// ---------------------------------------------------------------------------
// main

// The vector instructions to use: the best there are, or fewer.
static void choose_isa(void) {
    int best = cpu_best();
    cpu_level = best;
    for (int i = 0; opt.isa && i < N_CPU_LEVELS; i++)
        if (!strcmp(opt.isa, cpu_names[i])) cpu_level = i;
    if (cpu_level > best) die(2, "--isa: this processor has %s at most", cpu_names[best]);
}

#ifndef DSV4_NO_MAIN
static int run(Command command, char **args) {
    Err e;
    bool ok = true;
    switch (command) {
    case TOKENIZE: return run_tokenize();
    case INFO: return run_info();
    case BENCH: return run_bench();
    case PPL: return run_ppl(args[0]);
    case DEVICES: return devices(opt.open.dir, strcmp(opt.open.dir, BUILT_IN) != 0);
    case VERIFY: ok = verify(args[0], opt.open.threads, &e); break;
    case CONVERT:
        opt.convert.src = args[0];
        opt.convert.dst = args[1];
        opt.convert.threads = opt.open.threads;
        ok = dsv4_convert(&opt.convert, &e);
        break;
    default: return opt.prompt || opt.file || opt.ids ? run_prompt() : run_chat();
    }
    if (!ok) die(1, "%s", e.text);
    return 0;
}

int main(int argc, char **argv) {
    char *args[2] = { NULL };
    const Subcommand *s = parse_options(argc, argv, args);
    if (opt.help || opt.version) {
        if (opt.help) print_help(s);
        else puts("dsv4 " VERSION);
        return 0;
    }
    check_options();
    catch_signals();
    choose_isa();
    cuda_kernels_file = opt.kernels;
    cuda_graphs = opt.graphs;
    if (!opt.open.dir && s->command & (LOADS | TOKENIZE | DEVICES)) {
        if (s->command != DEVICES)
            note("no -m DIR: this is the small built-in model, which tells children's stories");
        opt.open.dir = BUILT_IN;
    }
    int code = run(s->command, args);
    flush_out();
    return code;
}
#endif
