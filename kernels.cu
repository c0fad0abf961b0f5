// kernels.cu: the forward pass of dsv4.c for CUDA devices, kernel by kernel, as a layer needs them.
//
// Compiled at run time by NVRTC without any header: 16-bit numbers are unsigned short, tensor-core
// and asynchronous-copy instructions are inline PTX (7.4, sm_80 and later). The model's dimensions
// arrive as -D constants:
//   DIM STREAMS HEADS HEAD_DIM ROPE_DIM Q_RANK O_GROUPS O_RANK WINDOW EXPERTS ACTIVE EXPERT_DIM
//   INDEX_HEADS INDEX_DIM INDEX_TOPK HC_ITERS  HC_EPS NORM_EPS ROUTE_SCALE SWIGLU_LIMIT
// and the matrix formats that occur, bit masks: DENSE (all but these) GATE SHARED (shared expert)
// ROUTED (the others). Letters as in dsv4.c: T rows of the batch, D dim, S streams, H heads,
// K head dim, E experts, A active, F expert dim.
//
// Rules. Every output has one fixed order of summation that does not depend on the batch it is
// computed in. Blocks never wait for each other, there are no atomics on data: the end of a kernel
// is the only grid-wide synchronisation. Products with INT8, INT4 and FP4 weights are exact integer
// sums over groups of 32 columns, scaled and added in FP32. Compiled with -fmad=false: a fused
// multiply-add is always written fmaf().
//
// Decode (1 to 8 rows) streams the weights once from memory to the tensor cores (gemv, ffn_in,
// expert_up_1/_8, expert_down_1/_8); longer batches use tiles in shared memory (gemm, expert_up,
// expert_down).

typedef signed char s8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

enum { W_F32, W_BF16, W_INT8, W_INT4, W_FP8, W_FP4 };       // Format in dsv4.c

// Mat in dsv4.c: [n, k] as in the checkpoint, base addresses on 256 bytes, k a multiple of 32.
struct Matrix {
    const u8 *w, *s;
    int n, k, fmt, pad;
};

// Row in dsv4.c.
struct Row { int token, slot, pos, next; };

// One product out[t, n] = W[n, :] . in[t, :] of a launch; several share a launch. With segments
// (wo_a) rows [g * seg_n, (g+1) * seg_n) read the columns [g * k, (g+1) * k) of the input.
struct Task {
    Matrix m;
    const float *x;         // [T, ldx] FP32 input
    const s8 *q;            // [T, ldx] the same in INT8,
    const float *qs;        // [T, ldx / 32] its scales
    float *out;             // [T, ldo], NULL if it is not wanted
    s8 *out_q;              // [T, ldo] the output quantised, or NULL
    float *out_s;           // [T, ldo / 32]
    // ring > 0: row t goes to its session's cache, at byte ring_at + (pos % ring) * ring_step
    u64 ring_at;
    int ring, ring_step;
    int ldx, ldo;
    int seg_n, seg_blocks;  // rows and blocks of a segment
    int ksplit;             // warps that share a row: 1, 2, 4 or 8; a block has 256 / ksplit rows
    int block0;             // first block of this task in the grid
    int tile0, seg_tiles;   // the same for the tiles of long batches: tiles of 128 rows
};

// ---------------------------------------------------------------------------
// small tools

#define MINUS_INF __uint_as_float(0xff800000u)

__device__ inline float bf16_to_float(u16 v) { return __uint_as_float((u32)v << 16); }
__device__ inline float lo_bf16(u32 v) { return __uint_as_float(v << 16); }
__device__ inline float hi_bf16(u32 v) { return __uint_as_float(v & 0xffff0000u); }

// Two FP32 to a pair of BF16, round to nearest even; a in the low half.
__device__ inline u32 pack_bf16(float a, float b) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
    return r;
}

// 2^(b - 127) of an E8M0 byte.
__device__ inline float e8m0_to_float(u8 b) {
    return __uint_as_float(b ? (u32)b << 23 : 0x00400000u);
}

// Byte i of four E4M3 numbers, times 2^-120 (exact, subnormals included): E4M3_SCALE restores it.
#define E4M3_SCALE 1.329227995784916e36f
__device__ inline float e4m3_raw(u32 v, int i) {
    return __int_as_float(((int)(v << (24 - 8 * i)) >> 4) & 0x87f00000);
}

// Four consecutive E2M1 nibbles (low 16 bits of v) as bytes of 4 times their value: -24..24,
// integers. A PRMT selector with bit 3 set repeats the byte's top bit: that tells the sign.
__device__ inline u32 fp4_bytes(u32 v) {
    u32 pos = __byte_perm(0x03020100u, 0x0c080604u, v & 0x7777u);
    // the same values negated, in seven bits
    u32 neg = __byte_perm(0x7d7e7f00u, 0x74787a7cu, v & 0x7777u);
    u32 sign;
    asm("prmt.b32 %0, %1, %1, %2;" : "=r"(sign) : "r"(0x80808080u), "r"(v));
    return ((sign & neg) | (~sign & pos)) << 1;
}

// Weights are read once: 16 bytes that shall not displace activations in L1.
__device__ inline uint4 load_stream(const void *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// p + n, in one register pair: the compiler shall not split it into a base and an index.
template <class P> __device__ inline P advance(P p, int n) {
    p += n;
    asm("" : "+l"(p));
    return p;
}

__device__ inline float warp_sum(float v) {
    for (int m = 16; m; m >>= 1) v += __shfl_xor_sync(~0u, v, m);
    return v;
}

// Sums N values (a power of two, at most 32) over the lanes of a warp; lane l gets the total of
// value l / (32 / N). The tree is the same for every N, so a value's sum does not depend on what
// is summed beside it.
template <int N, int M = 16> __device__ inline float reduce_many(float *v) {
    if constexpr (N == 1) {
        if constexpr (M > 0) v[0] += __shfl_xor_sync(~0u, v[0], M);
        if constexpr (M > 1) reduce_many<1, M / 2>(v);
    } else {
        const bool up = threadIdx.x & M;
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            const float send = up ? v[i] : v[i + N / 2], keep = up ? v[i + N / 2] : v[i];
            v[i] = keep + __shfl_xor_sync(~0u, send, M);
        }
        reduce_many<N / 2, M / 2>(v);
    }
    return v[0];
}

// Sum over a block of up to 1024 threads, the same in every thread. `tmp` holds 32 floats; ends
// with a barrier.
__device__ inline float block_sum(float v, float *tmp) {
    v = warp_sum(v);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) tmp[threadIdx.x >> 5] = v;
    __syncthreads();
    v = 0;
    for (int i = 0; i < (int)(blockDim.x + 31) / 32; i++) v += tmp[i];
    return v;
}

__device__ inline float4 fma4(float a, float4 b, float4 c) {
    return make_float4(fmaf(a, b.x, c.x), fmaf(a, b.y, c.y), fmaf(a, b.z, c.z), fmaf(a, b.w, c.w));
}
__device__ inline float dot4(float4 a, float4 b, float sum) {
    return fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, sum))));
}

__device__ inline float relu(float x) { return x < 0 ? 0 : x; }       // keeps NaN

// The larger magnitude, as bits; NaN is the largest of all, so that it reaches the scale and
// from there the output.
__device__ inline u32 max_bits(u32 m, float v) { return max(m, __float_as_uint(v) & 0x7fffffffu); }

// quantise() of dsv4.c for a group of 32 held by 8 consecutive lanes, 4 values each: writes 4
// bytes and the scale. All lanes of the warp must call it.
__device__ inline void quantize4(float4 v, s8 *q, float *scale, bool valid) {
    u32 bits = max_bits(max_bits(max_bits(max_bits(0, v.x), v.y), v.z), v.w);
    for (int i = 4; i; i >>= 1) bits = max(bits, __shfl_xor_sync(~0u, bits, i));
    const float m = __uint_as_float(bits);
    float r = 127.f / m;
    // no factor that a float can hold: all zeros
    if (!(r <= 3.40282347e38f)) r = 0;
    const int a = max(-127, min(127, __float2int_rn(v.x * r)));
    const int b = max(-127, min(127, __float2int_rn(v.y * r)));
    const int c = max(-127, min(127, __float2int_rn(v.z * r)));
    const int d = max(-127, min(127, __float2int_rn(v.w * r)));
    if (!valid) return;
    *(u32 *)q = (a & 255) | (b & 255) << 8 | (c & 255) << 16 | (u32)d << 24;
    if ((threadIdx.x & 7) == 0) *scale = m / 127.f;
}

// The same for a group of 32 held by the 32 lanes of a warp.
__device__ inline void quantize1(float v, s8 *q, float *scale) {
    u32 bits = max_bits(0, v);
    for (int i = 16; i; i >>= 1) bits = max(bits, __shfl_xor_sync(~0u, bits, i));
    const float m = __uint_as_float(bits);
    float r = 127.f / m;
    // no factor that a float can hold: all zeros
    if (!(r <= 3.40282347e38f)) r = 0;
    *q = (s8)max(-127, min(127, __float2int_rn(v * r)));
    if ((threadIdx.x & 31) == 0) *scale = m / 127.f;
}

// Rows of N numbers in a block of 256 threads, 4 per thread and step: v[i] are the dims
// (i * 256 + thread) * 4 and the three after it, 0 past the end.
template <int N> __device__ inline void load_row(float4 *v, const float *from) {
#pragma unroll
    for (int i = 0; i < (N + 1023) / 1024; i++) {
        const int d = (i * 256 + threadIdx.x) * 4;
        v[i] = d < N ? *(const float4 *)(from + d) : make_float4(0, 0, 0, 0);
    }
}

// rms() of dsv4.c on such a row; tmp: 32 floats of shared memory.
template <int N> __device__ inline void rms_row(float4 *v, const float *norm, float *tmp) {
    constexpr int PER = (N + 1023) / 1024;
    float sq = 0;
#pragma unroll
    for (int i = 0; i < PER; i++) sq = dot4(v[i], v[i], sq);
    const float r = 1.f / sqrtf(block_sum(sq, tmp) / N + NORM_EPS);
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const int d = (i * 256 + threadIdx.x) * 4;
        if (d >= N) continue;
        const float4 w = *(const float4 *)(norm + d);
        v[i] = make_float4(v[i].x * r * w.x, v[i].y * r * w.y, v[i].z * r * w.z, v[i].w * r * w.w);
    }
}

// Writes such a row as row t of activations [T, N]: FP32 and INT8.
template <int N>
__device__ inline void store_act(const float4 *v, int t, float *x, s8 *q, float *qs) {
#pragma unroll
    for (int i = 0; i < (N + 1023) / 1024; i++) {
        const int d = (i * 256 + threadIdx.x) * 4;
        const size_t at = (size_t)t * N + d;
        if (d < N) *(float4 *)(x + at) = v[i];
        quantize4(v[i], q + at, qs + at / 32, d < N);
    }
}

// c += a b with a 16 x 16, b 16 x 8 in BF16, c in FP32.
__device__ inline void mma_bf16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// c = a b and c += a b for INT8: a 16 x 32, b 32 x 8, c in 32-bit integers.
__device__ inline void mma_int8(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(0));
}
__device__ inline void mma_int8_add(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ inline u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// Four 8 x 8 matrices of 16-bit numbers: lane l names row l % 8 of matrix l / 8 and gets, of each,
// numbers 2 (l % 4) and the next of row l / 4 (trans: of that column).
__device__ inline void ldmatrix4(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
__device__ inline void ldmatrix4_trans(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

__device__ inline void cp_async16(u32 to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from),
        "r"(valid ? 16 : 0) : "memory");
}
template <int N> __device__ inline void cp_async(u32 to, const void *from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" :: "r"(to), "l"(from),
        "r"(valid ? N : 0), "n"(N) : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}

// sin and cos of any angle up to 2^20: reduced by multiples of pi/2 in two exact steps, then
// polynomials (1 ulp).
__device__ inline void sin_cos(float x, float &s, float &c) {
    float k = rintf(x * 0.636619772f);
    float r = fmaf(k, 4.37113883e-8f, fmaf(k, -1.57079637f, x)), r2 = r * r;
    float ps =
        fmaf(fmaf(fmaf(-1.9515295891e-4f, r2, 8.3321608736e-3f), r2, -1.6666654611e-1f), r2 * r, r);
    float pc = fmaf(
        fmaf(fmaf(2.443315711809948e-5f, r2, -1.388731625493765e-3f), r2, 4.166664568298827e-2f),
        r2 * r2, fmaf(r2, -0.5f, 1.f));
    int n = (int)k & 3;
    float a = n & 1 ? pc : ps, b = n & 1 ? ps : pc;
    s = n & 2 ? -a : a;
    c = (n + 1) & 2 ? -b : b;
}

// rope() of dsv4.c for dims d..d+3 (two pairs) of a head of n dims whose last ROPE_DIM rotate;
// sign -1 turns back.
__device__ inline float4 rope4(float4 v, int d, int n, int pos, const float *inv_freq, float sign) {
    int i = (d - (n - ROPE_DIM)) / 2;
    if (d < n - ROPE_DIM) return v;
    float s0, c0, s1, c1;
    sin_cos((float)pos * inv_freq[i], s0, c0);
    sin_cos((float)pos * inv_freq[i + 1], s1, c1);
    s0 *= sign, s1 *= sign;
    return make_float4(v.x * c0 - v.y * s0, v.x * s0 + v.y * c0, v.z * c1 - v.w * s1,
        v.z * s1 + v.w * c1);
}

__device__ inline float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// ---------------------------------------------------------------------------
// products for 1 to 8 rows: weights stream through once, 16 bytes per lane and load
//
// A warp takes 32 rows of the matrix, or a fixed part of their columns, and up to 8 rows of the
// batch: a tensor core multiplies 16 rows of weights by 8 columns of activations. Lane 4 g + q
// loads its operands where they lie: of matrix row g (and g + 8, g + 16, g + 24) the q-th 16 bytes
// of a step, of the batch the same columns. What one row of the batch gets does not depend on what
// the tensor core makes beside it.

// A warp's sums [row of the batch][32 rows of the matrix]; the pad keeps writers on 32 banks.
enum { PART = 40 };

// Rows of activations (columns of one segment): row b of a product is list[b], or first + b.
struct In {
    const float *x;
    const s8 *q;
    const float *qs;
    int ld, first;
    const int *list;
};
// What lies past the last row of a matrix is read too (there is memory) and dropped.
__device__ inline int row_of(const In &in, int b) { return in.list ? in.list[b] : in.first + b; }

// Number i of a matrix's scales; 1/16 and 1/4 undo the factors in the integers of INT4 and FP4.
template <int FMT> __device__ inline float scale_at(const u8 *s, size_t i) {
    if (FMT == W_INT8) return bf16_to_float(__ldg((const u16 *)s + i));
    if (FMT == W_INT4) return bf16_to_float(__ldg((const u16 *)s + i)) * 0.0625f;
    return FMT == W_FP4 ? e8m0_to_float(__ldg(s + i)) * 0.25f : e8m0_to_float(__ldg(s + i));
}

// Which of the scales holds for column k of row n: one per row and 32 columns, or per 128 x 128.
template <int FMT> __device__ inline size_t scale_index(int columns, int n, int k) {
    if (FMT == W_INT4 || FMT == W_FP4) return (size_t)n * (columns / 32) + k / 32;
    return (size_t)(n / 128) * ((columns + 127) / 128) + k / 128;
}

// Eight columns of a 4-bit format as signed integers. FP4: the first four and the others, 4 times
// their value. INT4: the even and the odd ones, 16 times their value, (nibble - 8) * 16 being one
// LOP3 away from the packed bytes.
template <int FMT> __device__ inline void unpack(u32 v, u32 &a, u32 &b) {
    if (FMT == W_FP4) {
        a = fp4_bytes(v), b = fp4_bytes(v >> 16);
    } else {                    // (v & 0xf0f0f0f0) ^ 0x80808080
        asm("lop3.b32 %0, %1, 0xf0f0f0f0, 0x80808080, 0x6a;" : "=r"(a) : "r"(v << 4));
        asm("lop3.b32 %0, %1, 0xf0f0f0f0, 0x80808080, 0x6a;" : "=r"(b) : "r"(v));
    }
}

// The activations in that order: a, b are columns 0..3 and 4..7.
template <int FMT> __device__ inline void sort_columns(u32 &a, u32 &b) {
    if (FMT != W_INT4) return;
    const u32 even = __byte_perm(a, b, 0x6420);
    b = __byte_perm(a, b, 0x7531);
    a = even;
}

// INT8, 128 columns a step, 64 at a time. A quad holds two groups of 32 columns, lanes 0 and 1 the
// first, 2 and 3 the second. Rows g and g + 8 of the tensor core's first operand are both row g of
// the batch, zero but for one of the groups; the second operand are 8 rows of weights. So a lane's
// results are of row g of the batch and rows 2 q, 2 q + 1 of the matrix: sum[0], sum[1] of the
// first group, sum[2], sum[3] of the second.
__device__ inline void dot_int8(float (*part)[PART], const Matrix &m, int n, const In &in,
                                int count, int k, int ksplit) {
    const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3, columns = m.k;
    const int b = row_of(in, min(g, count - 1)), step = ksplit * 128;
    const s8 *act = in.q + (u32)(b * in.ld) + k * 128 + q * 16;
    const float *as = in.qs + (u32)(b * (in.ld / 32)) + k * 4 + q;
    const u16 *ws = (const u16 *)m.s + scale_index<W_INT8>(columns, n, k * 128);
    const u8 *w = m.w + (size_t)(n + g) * columns + k * 128 + q * 16;
    float acc[4][2] = {};
    const bool first = q < 2;
#pragma unroll 1
    for (int left = columns - k * 128; left > 0; left -= step) {
        // the scales of the step's four groups, one per lane
        const float scale = q * 32 < left ? __ldg(as) * bf16_to_float(__ldg(ws)) : 0;
#pragma unroll 1
        for (int h = 0; h < 2; h++) {
            uint4 v[4], x = make_uint4(0, 0, 0, 0);
            // past the last column: what is there, times zero
#pragma unroll
            for (int r = 0; r < 4; r++)
                v[r] = load_stream(w + (size_t)((u32)columns * 8 * r) + h * 64);
            if (g < count && h * 64 + q * 16 < left) x = __ldg((const uint4 *)act + h * 4);
            const u32 a[8] = { first ? x.x : 0, first ? 0 : x.x, first ? x.y : 0, first ? 0 : x.y,
                               first ? x.z : 0, first ? 0 : x.z, first ? x.w : 0, first ? 0 : x.w };
            const float s0 = __shfl_sync(~0u, scale, h * 2, 4),
                        s1 = __shfl_sync(~0u, scale, h * 2 + 1, 4);
#pragma unroll
            for (int r = 0; r < 4; r++) {
                int sum[4];
                mma_int8(sum, a[0], a[1], a[2], a[3], v[r].x, v[r].y);
                mma_int8_add(sum, a[4], a[5], a[6], a[7], v[r].z, v[r].w);
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    acc[r][j] = fmaf((float)sum[j], s0, acc[r][j]);
                    acc[r][j] = fmaf((float)sum[j + 2], s1, acc[r][j]);
                }
            }
        }
        w = advance(w, step), ws = advance(ws, ksplit);
        act = advance(act, step), as = advance(as, step / 32);
    }
#pragma unroll
    for (int r = 0; r < 4; r++)
        if (g < count)
            *(float2 *)(part[g] + r * 8 + q * 2) = make_float2(acc[r][0], acc[r][1]);
}

// Starts the copy of four scales, of groups i .. i+3 of a row with 4-bit weights whose scales begin
// at `s`, to shared memory; zeros past the row's end.
template <int FMT> __device__ inline void copy_scales(uint2 *to, const u8 *s, int i, int groups) {
    if (groups % 4 == 0) {
        const bool valid = i < groups;
        if (FMT == W_FP4) cp_async<4>(shared_address(to), s + (valid ? i : 0), valid);
        else cp_async<8>(shared_address(to), s + (valid ? i * 2 : 0), valid);
        return;
    }
    for (int j = i; j < i + 4; j++) {                   // not aligned
        if (FMT == W_FP4) ((u8 *)to)[j - i] = j < groups ? s[j] : 0;
        else ((u16 *)to)[j - i] = j < groups ? ((const u16 *)s)[j] : 0;
    }
}

// INT4 and FP4, 128 columns a step. A lane's 16 bytes are one group of 32 columns, a quad holds
// four. So column c of the activations is group c % 4 of row c / 4 of two rows of the batch, zero
// in all lanes but that group's; a lane's results are of two groups of row q / 2. The scales of
// four steps come through shared memory.
template <int FMT, int B>
__device__ inline void dot_4bit(float (*part)[PART], const Matrix &m, int n, const In &in,
                                int count, int k, int ksplit) {
    constexpr int SETS = (B + 1) / 2, SIZE = FMT == W_FP4 ? 1 : 2;
    __shared__ uint2 shared_scales[8][32 * 4];          // [warp][row][step], see below
    const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3, groups = m.k / 32;
    // the steps of rows 4 .. 7 (of 8) in another order, for the sake of the banks
    uint2 *scales = shared_scales[threadIdx.x >> 5] + g * 4;
    const int order = g >> 2;
    const u8 *w = m.w + ((size_t)(n + g) * groups + k * 16 + q) * 16;
    const u8 *s = m.s + (size_t)(n + g) * groups * SIZE;
    u32 a[SETS], as[SETS];
    bool mine[SETS];
    float acc[SETS][4] = {};
#pragma unroll
    for (int p = 0; p < SETS; p++) {
        const int b = p * 2 + g / 4;
        mine[p] = b < count && q == g % 4;
        a[p] = (u32)(row_of(in, min(b, count - 1)) * in.ld);
        as[p] = (u32)(row_of(in, min(p * 2 + q / 2, count - 1)) * (in.ld / 32));
    }
#pragma unroll 1
    for (int i = k * 16; i < groups;) {
        uint4 v[4];
        if (i % 16 == 0) {
            __syncwarp();
#pragma unroll
            for (int r = 0; r < 4; r++)
                copy_scales<FMT>(scales + r * 32 + (q ^ order),
                                 s + (size_t)((u32)groups * 8 * SIZE * r), i + q * 4, groups);
            cp_async_commit();
        }
        // past the last column: what is there, times zero
#pragma unroll
        for (int r = 0; r < 4; r++) v[r] = load_stream(w + (size_t)((u32)groups * 128 * r));
        if (i % 16 == 0) {
            cp_async_wait<0>();
            __syncwarp();
        }
        const uint2 *four = scales + (i / 4 % 4 ^ order);
#pragma unroll
        for (int p = 0; p < SETS; p++) {
            if (p * 2 >= count) break;
            // unpacked anew for each set: registers are short
#pragma unroll
            for (int r = 0; r < 4; r++)
                asm("" : "+r"(v[r].x), "+r"(v[r].y), "+r"(v[r].z), "+r"(v[r].w));
            uint4 b[2] = {};
            if (mine[p] && i + q < groups) {
                const uint4 *from = (const uint4 *)(in.q + (a[p] + (i + q) * 32));
                b[0] = __ldg(from), b[1] = __ldg(from + 1);
            }
            // half of the lanes load the scale of this lane's first group, half that of the second
            const int j = i + (q & 1) * 2 + (g & 1);
            const float own = j < groups ? __ldg(in.qs + (as[p] + j)) : 0,
                        other = __shfl_xor_sync(~0u, own, 4);
            const float s0 = g & 1 ? other : own, s1 = g & 1 ? own : other;
#pragma unroll
            for (int h = 0; h < 2; h++)
                sort_columns<FMT>(b[h].x, b[h].y), sort_columns<FMT>(b[h].z, b[h].w);
#pragma unroll
            for (int t = 0; t < 4; t += 2) {
                int sum[4];
                u32 u[4];
                unpack<FMT>(v[t].x, u[0], u[2]), unpack<FMT>(v[t + 1].x, u[1], u[3]);
                mma_int8(sum, u[0], u[1], u[2], u[3], b[0].x, b[0].y);
                unpack<FMT>(v[t].y, u[0], u[2]), unpack<FMT>(v[t + 1].y, u[1], u[3]);
                mma_int8_add(sum, u[0], u[1], u[2], u[3], b[0].z, b[0].w);
                unpack<FMT>(v[t].z, u[0], u[2]), unpack<FMT>(v[t + 1].z, u[1], u[3]);
                mma_int8_add(sum, u[0], u[1], u[2], u[3], b[1].x, b[1].y);
                unpack<FMT>(v[t].w, u[0], u[2]), unpack<FMT>(v[t + 1].w, u[1], u[3]);
                mma_int8_add(sum, u[0], u[1], u[2], u[3], b[1].z, b[1].w);
#pragma unroll
                for (int r = t; r < t + 2; r++) {
                    const u32 ws = FMT == W_FP4 ? ((const u16 *)(four + r * 32))[q & 1]
                                                : ((const u32 *)(four + r * 32))[q & 1];
                    const float ws0 = FMT == W_FP4 ? e8m0_to_float((u8)ws) : lo_bf16(ws),
                                ws1 = FMT == W_FP4 ? e8m0_to_float((u8)(ws >> 8)) : hi_bf16(ws);
                    const int *c = sum + (r - t) * 2;
                    acc[p][r] = fmaf((float)c[0], s0 * ws0, acc[p][r]);
                    acc[p][r] = fmaf((float)c[1], s1 * ws1, acc[p][r]);
                }
            }
        }
        const int next = i % 16 < 12 ? 4 : ksplit * 16 - 12;
        w = advance(w, next * 16), i += next;
    }
    const float factor = FMT == W_FP4 ? 0.25f : 0.0625f;        // of the integers
#pragma unroll
    for (int p = 0; p < SETS; p++)
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const float sum = acc[p][r] + __shfl_xor_sync(~0u, acc[p][r], 1);
            const int b = p * 2 + q / 2;
            if (q % 2 == 0 && b < count) part[b][r * 8 + g] = sum * factor;
        }
}

// x as a sum of three BF16 numbers, exactly; x0 in the low halves.
__device__ inline void split_three(float x0, float x1, u32 (&to)[3]) {
#pragma unroll
    for (int i = 0; i < 3; i++) {
        to[i] = pack_bf16(x0, x1);
        x0 -= lo_bf16(to[i]), x1 -= hi_bf16(to[i]);
    }
}

// BF16, FP8 and FP32 with FP32 activations: the activations (and FP32 weights) as three BF16
// numbers each, whose products are exact, summed by the tensor core in FP32. Row g of its first
// operand is the largest of row g of the batch, then the smallest; row g + 8 the middle one. A step
// is 64 bytes of a row.
template <int FMT>
__device__ inline void dot_float(float (*part)[PART], const Matrix &m, int n, const In &in,
                                 int count, int k, int ksplit) {
    constexpr int QUADS = FMT == W_F32 ? 1 : FMT == W_BF16 ? 2 : 4;     // of columns in 16 bytes
    const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3, chunks = m.k / (4 * QUADS);
    const u8 *s = m.s + (FMT == W_FP8 ? scale_index<FMT>(m.k, n, 0) : 0);
    const float4 *act = (const float4 *)(in.x + (u32)(row_of(in, min(g, count - 1)) * in.ld));
    const u8 *w = m.w + ((size_t)(n + g) * chunks + k * 4 + q) * 16;
    float acc[4][4] = {};
#pragma unroll 1
    for (int i = k * 4 + q; i - q < chunks; i += ksplit * 4) {
        uint4 v[4];
        const bool valid = FMT != W_FP8 || i < chunks;      // the others have whole steps
#pragma unroll
        for (int r = 0; r < 4; r++)
            v[r] = load_stream(w + (size_t)((u32)chunks * 128 * r) - (valid ? 0 : 32));
        w = advance(w, ksplit * 64);
        const float scale = FMT == W_FP8 ? scale_at<FMT>(s, i >> 3) * E4M3_SCALE : 1.f;
#pragma unroll
        for (int j = 0; j < QUADS; j++) {
            float4 f = make_float4(0, 0, 0, 0);
            u32 a0[3], a1[3];
            if (g < count && valid) f = __ldg(act + i * QUADS + j);
            split_three(f.x, f.y, a0), split_three(f.z, f.w, a1);
#pragma unroll
            for (int r = 0; r < 4; r++) {
                u32 b0[3], b1[3];
                const u32 e = j == 0 ? v[r].x : j == 1 ? v[r].y : j == 2 ? v[r].z : v[r].w;
                if (FMT == W_F32) {
                    split_three(__uint_as_float(v[r].x), __uint_as_float(v[r].y), b0);
                    split_three(__uint_as_float(v[r].z), __uint_as_float(v[r].w), b1);
                    mma_bf16(acc[r], a0[0], a0[1], a1[0], a1[1], b0[2], b1[2]);
                    mma_bf16(acc[r], a0[0], a0[1], a1[0], a1[1], b0[1], b1[1]);
                } else if (FMT == W_BF16) {
                    b0[0] = j ? v[r].z : v[r].x, b1[0] = j ? v[r].w : v[r].y;
                } else {
                    b0[0] = pack_bf16(e4m3_raw(e, 0) * scale, e4m3_raw(e, 1) * scale);
                    b1[0] = pack_bf16(e4m3_raw(e, 2) * scale, e4m3_raw(e, 3) * scale);
                }
                mma_bf16(acc[r], a0[2], 0, a1[2], 0, b0[0], b1[0]);
                mma_bf16(acc[r], a0[0], a0[1], a1[0], a1[1], b0[0], b1[0]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 4; r++)
        if (g < count)
            *(float2 *)(part[g] + r * 8 + q * 2) =
                make_float2(acc[r][0] + acc[r][2], acc[r][1] + acc[r][3]);
}

// part[b][j] = rows n + j (32 of them) of m times row b of the batch, b < count <= B; or, of
// `ksplit` parts of the columns, part k. FORMATS: those that m can have. Whole warps.
template <int FORMATS, int B>
__device__ inline void dot_rows(float (*part)[PART], const Matrix &m, int n, const In &in,
                                int count, int k, int ksplit) {
#define HAS(f) (FORMATS == 1 << (f) || ((FORMATS >> (f) & 1) && m.fmt == (f)))
    if (HAS(W_INT8)) dot_int8(part, m, n, in, count, k, ksplit);
    else if (HAS(W_INT4)) dot_4bit<W_INT4, B>(part, m, n, in, count, k, ksplit);
    else if (HAS(W_FP4)) dot_4bit<W_FP4, B>(part, m, n, in, count, k, ksplit);
    else if (HAS(W_FP8)) dot_float<W_FP8>(part, m, n, in, count, k, ksplit);
    else if (HAS(W_BF16)) dot_float<W_BF16>(part, m, n, in, count, k, ksplit);
    else if (HAS(W_F32)) dot_float<W_F32>(part, m, n, in, count, k, ksplit);
}

// matmul() of dsv4.c for up to 8 rows from t0 on. A block makes 256 / ksplit consecutive outputs
// of one task: its 8 warps take 32 matrix rows each, or share them. Reads (256 / ksplit) * k
// weights once and 8 / ksplit times the activations.
template <int FORMATS>
__device__ inline void gemv_block(const Task *tasks, int n_tasks, int block, int t0, int T,
                                  const Row *rows, const u64 *slots) {
    __shared__ float part[8][8][PART];
    __shared__ Task task;               // a copy: registers are short
    int i = n_tasks - 1;
    while (i > 0 && block < tasks[i].block0) i--;
    if (threadIdx.x < sizeof task / 8)
        ((u64 *)&task)[threadIdx.x] = ((const u64 *)(tasks + i))[threadIdx.x];
    __syncthreads();
    const int warp = threadIdx.x >> 5, per = 256 / task.ksplit, count = min(8, T - t0);
    const int seg = (block - task.block0) / task.seg_blocks;
    const int base = (block - task.block0 - seg * task.seg_blocks) * per;
    const int first = seg * task.seg_n + base, rest = task.seg_n - base, k0 = seg * task.m.k;
    const In in = { task.x + k0, task.q + k0, task.qs + k0 / 32, task.ldx, t0, 0 };
    const int n = warp / task.ksplit * 32;
    if (n < rest)
        dot_rows<FORMATS, 8>(part[warp], task.m, first + n, in, count, warp % task.ksplit,
                             task.ksplit);
    __syncthreads();
    for (int j = threadIdx.x; j < per * count; j += 256) {
        const int b = j / per, o = j % per;
        if (o >= rest) continue;
        float v = 0;
        for (int k = 0; k < task.ksplit; k++) v += part[o / 32 * task.ksplit + k][b][o % 32];
        const size_t at = (size_t)(t0 + b) * task.ldo + first + o;
        if (task.ring) {
            const Row r = rows[t0 + b];
            float *ring = (float *)(slots[r.slot] + task.ring_at +
                                    (u64)(r.pos % task.ring) * task.ring_step);
            ring[first + o] = v;
        } else if (task.out) {
            task.out[at] = v;
        }
        if (task.out_q) quantize1(v, task.out_q + at, task.out_s + at / 32);
    }
}

// Block (part of the outputs of all tasks, 8 rows).
extern "C" __global__ void __launch_bounds__(256, 3)
gemv(const Task *tasks, int n_tasks, int T, const Row *rows, const u64 *slots) {
    gemv_block<DENSE>(tasks, n_tasks, blockIdx.x, blockIdx.y * 8, T, rows, slots);
}

// ---------------------------------------------------------------------------
// products for more than 8 rows: tensor-core tiles of 128 matrix rows x 64 batch rows

enum { TILE_N = 128, TILE_T = 64, TILE_PITCH = TILE_N + 4, STAGES = 3, STAGE_BYTES = 16384 };

// How a format travels through a stage of shared memory: columns per step, bytes of one matrix
// row and of one row of activations. Integer formats: weights at 0, activations at 8192, their
// scales [2][64] at 12288, the weights' [2][128] at 12800. Float formats: weights at 0,
// activations at 8192; the scales of FP8 [128] at 4096.
template <int FMT> struct Step {
    static constexpr bool INTEGER = FMT == W_INT8 || FMT == W_INT4 || FMT == W_FP4;
    static constexpr int K = INTEGER ? 64 : FMT == W_F32 ? 16 : 32;
    static constexpr int WB = FMT == W_INT4 || FMT == W_FP4 || FMT == W_FP8 ? 32 : 64;
    static constexpr int AB = INTEGER || FMT == W_F32 ? 64 : 128;
};

// Chunks of 16 bytes move inside a row, so that what a warp reads at once lies in different banks.
template <int BYTES> __device__ inline int swizzle(int row, int chunk) {
    if (BYTES == 32) return chunk ^ (row >> 2 & 1);
    return BYTES == 64 ? chunk ^ (row & 2) ^ (row >> 2 & 1) : chunk ^ (row & 1) * 4;
}

// Two matrices side by side: row r of a tile is row na + r of a below `split`, else nb + r - split
// of b.
struct Pair { Matrix a, b; int na, nb, split; };

__device__ inline void split_bf16(float a, float b, u32 &hi, u32 &lo) {
    hi = pack_bf16(a, b);
    lo = pack_bf16(a - lo_bf16(hi), b - hi_bf16(hi));
}

// Two groups of 32 columns of a warp's 32 x 32 part: exact integer sums of a group, scaled into
// acc. The order of the columns inside a group is free as long as weights and activations agree.
template <int FMT>
__device__ inline void tile_step_int(float (&acc)[2][4][4], const u8 *stage, int rn, int rt,
                                     int count) {
    const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    const u32 weights = shared_address(stage), act = weights + 8192;
    const float *as = (const float *)(stage + 12288), *ws = (const float *)(stage + 12800);
#pragma unroll
    for (int k = 0; k < 2; k++) {
        u32 a[2][4], b[4];                          // rows g, g + 8 of two 16-row tiles
        float w[2][2];
        if (FMT == W_INT8) {
#pragma unroll
            for (int m = 0; m < 2; m++) {
                const int r = rn + m * 16 + (lane & 15);
                ldmatrix4(a[m], weights + r * 64 + swizzle<64>(r, k * 2 + (lane >> 4)) * 16);
            }
        } else {
            ldmatrix4(b, weights + (rn + lane) * 32 + swizzle<32>(rn + lane, k) * 16);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                unpack<FMT>(b[i], a[i >> 1][i & 1], a[i >> 1][(i & 1) + 2]);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) w[i >> 1][i & 1] = ws[k * TILE_N + rn + i * 8 + g];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            if (rt + n * 8 >= count) break;
            u32 b0, b1;
            if (FMT == W_INT8) {        // two tiles of 8 rows at once
                const int t = rt + n * 8 + (lane >> 4) * 8 + (lane & 7),
                          c = k * 2 + (lane >> 3 & 1);
                if (n % 2 == 0) ldmatrix4(b, act + t * 64 + swizzle<64>(t, c) * 16);
                b0 = b[n % 2 * 2], b1 = b[n % 2 * 2 + 1];
            } else {
                const int t = rt + n * 8 + g, c = swizzle<64>(t, k * 2 + (q >> 1));
                const uint2 v = *(const uint2 *)(stage + 8192 + t * 64 + c * 16 + (q & 1) * 8);
                b0 = v.x, b1 = v.y;
                sort_columns<FMT>(b0, b1);
            }
            const float2 s = *(const float2 *)(as + k * TILE_T + rt + n * 8 + q * 2);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                int c[4];
                mma_int8(c, a[m][0], a[m][1], a[m][2], a[m][3], b0, b1);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    acc[m][n][i] = fmaf((float)c[i], (i & 1 ? s.y : s.x) * w[m][i >> 1],
                                        acc[m][n][i]);
            }
        }
    }
}

// The same for float formats: activations as the sum of two BF16 numbers (16 bits of mantissa),
// FP32 weights too.
template <int FMT>
__device__ inline void tile_step_float(float (&acc)[2][4][4], const u8 *stage, int rn, int rt,
    int g, int q, int count) {
    const u8 *act = stage + 8192;
    const float *ws = (const float *)(stage + 4096);
#pragma unroll
    for (int k = 0; k < Step<FMT>::K / 16; k++) {
        u32 a[2][4], al[2][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int r = rn + i * 8 + g, m = i >> 1, o = i & 1;
            if (FMT == W_BF16) {
                const uint2 v = *(const uint2 *)(stage + r * 64 +
                                                 swizzle<64>(r, k * 2 + (q >> 1)) * 16 +
                                                 (q & 1) * 8);
                a[m][o] = v.x, a[m][o + 2] = v.y;
            } else if (FMT == W_FP8) {
                const u32 v = *(const u32 *)(stage + r * 32 + swizzle<32>(r, k) * 16 + q * 4);
                const float s = ws[r];
                a[m][o] =
                    pack_bf16(e4m3_raw(v, 0) * E4M3_SCALE * s, e4m3_raw(v, 1) * E4M3_SCALE * s);
                a[m][o + 2] =
                    pack_bf16(e4m3_raw(v, 2) * E4M3_SCALE * s, e4m3_raw(v, 3) * E4M3_SCALE * s);
            } else {
                const float4 v = *(const float4 *)(stage + r * 64 + swizzle<64>(r, q) * 16);
                split_bf16(v.x, v.y, a[m][o], al[m][o]);
                split_bf16(v.z, v.w, a[m][o + 2], al[m][o + 2]);
            }
        }
#pragma unroll
        for (int n = 0; n < 4; n++) {
            constexpr int AB = Step<FMT>::AB;
            const int t = rt + n * 8 + g;
            if (rt + n * 8 >= count) break;
            const float4 v = *(const float4 *)(act + t * AB + swizzle<AB>(t, k * 4 + q) * 16);
            u32 b0, b1, l0, l1;
            split_bf16(v.x, v.y, b0, l0);
            split_bf16(v.z, v.w, b1, l1);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                mma_bf16(acc[m][n], a[m][0], a[m][1], a[m][2], a[m][3], l0, l1);
                if (FMT == W_F32)
                    mma_bf16(acc[m][n], al[m][0], al[m][1], al[m][2], al[m][3], b0, b1);
                mma_bf16(acc[m][n], a[m][0], a[m][1], a[m][2], a[m][3], b0, b1);
            }
        }
    }
}

// One tile by 8 warps, each 32 x 32: out[t][n] in shared memory, pitch TILE_PITCH. row[64]:
// which rows of `in`, `count` of them wanted. Weights and activations come through a ring of
// three stages by asynchronous copies; what lies past the columns is zero.
template <int FMT>
__device__ inline void tile_product(const Pair &p, const In &in, const int *row, int count,
                                    u8 *shared) {
    constexpr int K = Step<FMT>::K, WB = Step<FMT>::WB, AB = Step<FMT>::AB, WN = TILE_N * WB / 4096,
                  AN = TILE_T * AB / 4096;
    constexpr bool INTEGER = Step<FMT>::INTEGER, SCALED = INTEGER || FMT == W_FP8;
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, k_all = p.a.k;
    const int steps = (k_all + K - 1) / K, w_bytes = k_all / K * WB + k_all % K * WB / K;
    const int a_bytes = k_all * (AB / K);
    const u8 *w_from[WN], *a_from[AN];
    u32 w_to[WN], a_to[AN];
#pragma unroll
    for (int i = 0; i < WN; i++) {
        const int r = (tid + i * 256) / (WB / 16), c = (tid + i * 256) % (WB / 16);
        const int n = min(r < p.split ? p.na + r : p.nb + r - p.split, p.a.n - 1);
        w_from[i] = (r < p.split ? p.a.w : p.b.w) + (size_t)n * w_bytes + c * 16;
        w_to[i] = shared_address(shared) + r * WB + swizzle<WB>(r, c) * 16;
    }
#pragma unroll
    for (int i = 0; i < AN; i++) {
        const int t = (tid + i * 256) / (AB / 16), c = (tid + i * 256) % (AB / 16);
        const size_t at = (size_t)row[t] * in.ld;
        a_from[i] = (INTEGER ? (const u8 *)(in.q + at) : (const u8 *)(in.x + at)) + c * 16;
        a_to[i] = shared_address(shared) + 8192 + t * AB + swizzle<AB>(t, c) * 16;
    }
    // a thread's scales: of matrix row sr in every group (INTEGER: every second one), and of row
    // tid % 64 of the batch in every second group
    const int sr = INTEGER ? tid >> 1 : tid & 127, odd = INTEGER ? tid & 1 : 0;
    const int sn = min(sr < p.split ? p.na + sr : p.nb + sr - p.split, p.a.n - 1);
    const u8 *scales = sr < p.split ? p.a.s : p.b.s;
    const float *as_from = INTEGER ? in.qs + (size_t)row[tid & 63] * (in.ld >> 5) + (tid >> 6) : 0;
    // starts the copies of a step into the stage at byte `to`; returns this thread's weight scale,
    // to be stored later
    auto load = [&](int step, u32 to) -> float {
#pragma unroll
        for (int i = 0; i < WN; i++) {
            const int c = (tid + i * 256) % (WB / 16);
            cp_async16(to + w_to[i], w_from[i] + (size_t)step * WB, step * WB + c * 16 < w_bytes);
        }
#pragma unroll
        for (int i = 0; i < AN; i++) {
            const int c = (tid + i * 256) % (AB / 16);
            cp_async16(to + a_to[i], a_from[i] + (size_t)step * AB, step * AB + c * 16 < a_bytes);
        }
        if (INTEGER && tid < 2 * TILE_T) {
            const bool valid = step * 2 + (tid >> 6) < k_all / 32;
            cp_async<4>(shared_address(shared) + to + 12288 + tid * 4,
                      as_from + (valid ? step * 2 : 0), valid);
        }
        const int k = step * K + odd * 32;
        if (!SCALED || k >= k_all) return 0;
        return scale_at<FMT>(scales, scale_index<FMT>(k_all, sn, k));
    };
    auto store_scale = [&](u32 to, float s) {
        if (INTEGER) ((float *)(shared + to + 12800))[odd * TILE_N + sr] = s;
        else if (SCALED && tid < TILE_N) ((float *)(shared + to + 4096))[sr] = s;
    };
    float acc[2][4][4] = {};
    const int rn = (warp & 3) * 32, rt = (warp >> 2) * 32;
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < steps) store_scale(i * STAGE_BYTES, load(i, i * STAGE_BYTES));
        cp_async_commit();
    }
    u32 from = 0, to = (STAGES - 1) * STAGE_BYTES;      // the stages that are read and filled
    for (int i = 0; i < steps; i++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        float s = 0;
        const bool more = i + STAGES - 1 < steps;
        if (more) s = load(i + STAGES - 1, to);
        cp_async_commit();
        if constexpr (INTEGER) tile_step_int<FMT>(acc, shared + from, rn, rt, count);
        else tile_step_float<FMT>(acc, shared + from, rn, rt, lane >> 2, lane & 3, count);
        if (more) store_scale(to, s);
        to = from;
        from = from + STAGE_BYTES < STAGES * STAGE_BYTES ? from + STAGE_BYTES : 0;
    }
    __syncthreads();
    float *out = (float *)shared;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                out[(rt + n * 8 + (lane & 3) * 2 + (i & 1)) * TILE_PITCH + rn + m * 16 +
                    (lane >> 2) + (i >> 1) * 8] = acc[m][n][i];
    __syncthreads();
}

template <int FORMATS>
__device__ inline void tile_any(const Pair &p, const In &in, const int *row, int count,
    u8 *shared) {
    const Matrix &m = p.a;
#define PRODUCT(f) \
    if constexpr (FORMATS >> f & 1) { if (HAS(f)) tile_product<f>(p, in, row, count, shared); }
    PRODUCT(W_INT8)
    PRODUCT(W_INT4)
    PRODUCT(W_FP4)
    PRODUCT(W_FP8)
    PRODUCT(W_BF16)
    PRODUCT(W_F32)
}

// matmul() of dsv4.c for long batches: block (tile of one task, 64 rows). Reads 128 matrix rows
// once per 64 batch rows.
extern "C" __global__ void __launch_bounds__(256, 2)
gemm(const Task *tasks, int n_tasks, int T, const Row *rows, const u64 *slots) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ int row[TILE_T];
    int i = n_tasks - 1;
    while (i > 0 && blockIdx.x < tasks[i].tile0) i--;
    const Task *t = tasks + i;
    const int tile = blockIdx.x - t->tile0, seg = tile / t->seg_tiles,
        base = (tile - seg * t->seg_tiles) * TILE_N;
    const int seg_n = t->seg_n, t0 = blockIdx.y * TILE_T, warp = threadIdx.x >> 5,
        lane = threadIdx.x & 31;
    const Matrix m = t->m;
    const In in = { t->x + (size_t)seg * m.k, t->q + (size_t)seg * m.k,
                    t->qs + (size_t)seg * (m.k / 32), t->ldx };
    if (threadIdx.x < TILE_T) row[threadIdx.x] = min(t0 + (int)threadIdx.x, T - 1);
    __syncthreads();
    const Pair p = { m, m, seg * seg_n + base, 0, TILE_N };
    tile_any<DENSE | GATE>(p, in, row, min(TILE_T, T - t0), shared);
    for (int j = warp; j < TILE_T && t0 + j < T; j += 8) {
        const size_t to = (size_t)(t0 + j) * t->ldo + seg * seg_n + base;
        float *out = t->out + to;
        if (t->ring) {
            const Row r = rows[t0 + j];
            out = (float *)(slots[r.slot] + t->ring_at + (u64)(r.pos % t->ring) * t->ring_step) +
                  base;
        }
        for (int n = lane; n < TILE_N && base + n < seg_n; n += 32) {
            const float v = ((const float *)shared)[j * TILE_PITCH + n];
            if (t->out_q) quantize1(v, t->out_q + to + n, t->out_s + (to + n) / 32);
            else out[n] = v;
        }
    }
}

// ---------------------------------------------------------------------------
// embedding and hyper-connections

// Dim d of a token's embedding, stored in FP32 (wide) or BF16.
__device__ inline float embedding(const void *table, int wide, int token, int d) {
    const size_t at = (size_t)token * DIM + d;
    return wide ? ((const float *)table)[at] : bf16_to_float(((const u16 *)table)[at]);
}

// embed(): X[t, s, :] = embed[token]. One block per row of the batch; reads 2 * D bytes, writes
// 4 * S * D.
extern "C" __global__ void __launch_bounds__(256)
embed(const void *table, int wide, const Row *rows, float *X) {
    float *x = X + (size_t)blockIdx.x * STREAMS * DIM;
    for (int d = threadIdx.x; d < DIM; d += blockDim.x) {
        const float e = embedding(table, wide, rows[blockIdx.x].token, d);
        for (int s = 0; s < STREAMS; s++) x[s * DIM + d] = e;
    }
}

constexpr int HC_N = (2 + STREAMS) * STREAMS;           // numbers that steer one hyper-connection
constexpr int HC_PAD = (HC_N + 32) & ~31;               // and the sum of squares behind them
constexpr int HC_BLOCKS = (DIM + 63) / 64;

// hc_mix for 64 dims of all streams and the rows t0 .. t0+B-1.
template <int B>
__device__ inline void hc_mix_block(float *X, const float *y, const float *post, const float *comb,
                                    int apply, const float *fn, int n_fn, float *part, int t0,
                                    int T) {
    constexpr int CHUNKS = STREAMS * 16;                // of 4 dims
    __shared__ float4 x[B * CHUNKS];
    const int lane = threadIdx.x & 31, d0 = blockIdx.x * 64;
    for (int i = threadIdx.x; i < B * CHUNKS; i += 256) {
        const int t = t0 + i / CHUNKS, s = i / 16 % STREAMS, d = d0 + i % 16 * 4;
        float4 v = make_float4(0, 0, 0, 0);
        if (t < T && d < DIM) {
            const float *row = X + (size_t)t * STREAMS * DIM + d;
            if (apply) {
                v = fma4(post[t * STREAMS + s], *(const float4 *)(y + (size_t)t * DIM + d), v);
                for (int j = 0; j < STREAMS; j++)
                    v = fma4(comb[(t * STREAMS + j) * STREAMS + s],
                             *(const float4 *)(row + j * DIM), v);
            } else {
                v = *(const float4 *)(row + s * DIM);
            }
        }
        x[i] = v;
    }
    __syncthreads();
    for (int i = threadIdx.x; apply && i < B * CHUNKS; i += 256) {
        const int t = t0 + i / CHUNKS, s = i / 16 % STREAMS, d = d0 + i % 16 * 4;
        if (t < T && d < DIM) *(float4 *)(X + ((size_t)t * STREAMS + s) * DIM + d) = x[i];
    }
    // a warp takes four rows of fn at a time; row n_fn is x itself
    for (int n = threadIdx.x / 32 * 4; n_fn && n <= n_fn; n += 32) {
        float sum[4 * B] = {};
#pragma unroll 2
        for (int i = lane; i < CHUNKS; i += 32) {
            const int s = i / 16, d = d0 + i % 16 * 4;
            if (d >= DIM) continue;
            float4 f[4];
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const size_t at = ((size_t)min(n + r, n_fn - 1) * STREAMS + s) * DIM + d;
                f[r] = __ldg((const float4 *)(fn + at));
            }
#pragma unroll
            for (int b = 0; b < B; b++)
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    const float4 v = x[b * CHUNKS + i];
                    sum[b * 4 + r] = dot4(n + r < n_fn ? f[r] : v, v, sum[b * 4 + r]);
                }
        }
        const float total = reduce_many<4 * B>(sum);
        const int which = lane / (8 / B), t = t0 + which / 4, i = n + which % 4;
        if (lane % (8 / B) == 0 && t < T && i <= n_fn)
            part[((size_t)t * HC_BLOCKS + blockIdx.x) * HC_PAD + i] = total;
    }
}

// hc_post() of the last sublayer and the first half of hc_pre() of the next. A block owns 64 dims
// of all streams for 8 rows: X[k] = post[k] y + sum_j comb[j][k] X[j] (apply), then its share of
// fn . X (n_fn rows) and of the sum of squares goes to part[t, block, HC_PAD]. Reads 256 S n_fn
// bytes of fn, X and y once; writes X and part.
extern "C" __global__ void __launch_bounds__(256)
hc_mix(float *X, const float *y, const float *post, const float *comb, int apply,
       const float *fn, int n_fn, float *part, int T) {
    const int t0 = blockIdx.y * 8;
    if (T == 1) hc_mix_block<1>(X, y, post, comb, apply, fn, n_fn, part, t0, T);
    else hc_mix_block<8>(X, y, post, comb, apply, fn, n_fn, part, t0, T);
}

// sinkhorn() of dsv4.c: thread j * S + k holds and gets C[j][k]. All threads of the block call it.
__device__ inline float sinkhorn(float c) {
    constexpr int N = STREAMS * STREAMS;
    __shared__ float by_row[N], by_column[N];
    const int i = threadIdx.x, j = i / STREAMS, k = i % STREAMS;
    if (N <= 32 && i >= 32) return c;                   // one warp is enough
    auto share = [&](float *to) {
        if (i < N) to[i] = c;
        if (N <= 32) __syncwarp();
        else __syncthreads();
    };
    auto row_sum = [&]() {
        float sum = 0;
        share(by_row);
        for (int m = 0; i < N && m < STREAMS; m++) sum += by_row[j * STREAMS + m];
        return sum;
    };
    share(by_column);
    float most = MINUS_INF;
    for (int m = 0; i < N && m < STREAMS; m++) most = fmaxf(most, by_column[j * STREAMS + m]);
    c = expf(c - most);
    c = c / row_sum() + HC_EPS;
    for (int it = 0; it < HC_ITERS; it++) {
        if (it) c = c / (row_sum() + HC_EPS);
        float sum = 0;
        share(by_column);
        for (int m = 0; i < N && m < STREAMS; m++) sum += by_column[m * STREAMS + k];
        c = c / (sum + HC_EPS);
    }
    return c;
}

// The second half of hc_pre() (full) or hc_head(). Block (row, 0) adds up part[], makes pre, mixes
// the streams, normalises with `norm` and quantises; block (row, 1), if full, makes post and comb
// meanwhile. Reads 4 S D bytes of X, writes x [D] in FP32 and INT8.
extern "C" __global__ void __launch_bounds__(256)
hc_norm(const float *X, const float *part, const float *base, const float *scale,
        const float *norm, int full, float *post, float *comb, float *x, s8 *q, float *qs,
        int *bad) {
    constexpr int PER = (DIM + 1023) / 1024;
    __shared__ float sums[8][HC_PAD], mix[HC_PAD], pre[STREAMS], tmp[32];
    const int t = blockIdx.x, i = threadIdx.x, n = full ? HC_N : STREAMS;
    for (int k = i & 31; k <= n; k += 32) {
        float v = 0;
        for (int b = i >> 5; b < HC_BLOCKS; b += 8)
            v += part[((size_t)t * HC_BLOCKS + b) * HC_PAD + k];
        sums[i >> 5][k] = v;
    }
    __syncthreads();
    for (int k = i; k <= n; k += 256) {
        float v = 0;
        for (int w = 0; w < 8; w++) v += sums[w][k];
        mix[k] = v;
    }
    __syncthreads();
    const float mean = mix[n] / (STREAMS * DIM), r = 1.f / sqrtf(mean + NORM_EPS);
    if (!(mean <= 3.4e38f)) *bad = 1;
    if (blockIdx.y) {
        constexpr int N = STREAMS * STREAMS, S = STREAMS;
        if (i < S) post[t * S + i] = 2.f * sigmoid(fmaf(mix[S + i] * r, scale[1], base[S + i]));
        const int k = 2 * S + min(i, N - 1);
        const float c = sinkhorn(fmaf(mix[k] * r, scale[2], base[k]));
        if (i < N) comb[t * N + i] = c;
        return;
    }
    if (i < STREAMS) pre[i] = sigmoid(fmaf(mix[i] * r, scale[0], base[i])) + HC_EPS;
    __syncthreads();
    float4 y[PER];
#pragma unroll
    for (int k = 0; k < PER; k++) {
        const int d = (k * 256 + i) * 4;
        y[k] = make_float4(0, 0, 0, 0);
        for (int s = 0; d < DIM && s < STREAMS; s++)
            y[k] = fma4(pre[s], *(const float4 *)(X + ((size_t)t * STREAMS + s) * DIM + d), y[k]);
    }
    rms_row<DIM>(y, norm, tmp);
    store_act<DIM>(y, t, x, q, qs);
}

// ---------------------------------------------------------------------------
// attention: latents, compressor, queries

// Rotates a row of N held as above to position pos and stores it in BF16.
template <int N>
__device__ inline void store_row(const float4 *v, u16 *to, int pos, const float *inv_freq) {
#pragma unroll
    for (int i = 0; i < (N + 1023) / 1024; i++) {
        const int d = (i * 256 + threadIdx.x) * 4;
        if (d >= N) continue;
        const float4 u = rope4(v[i], d, N, pos, inv_freq, 1.f);
        *(uint2 *)(to + d) = make_uint2(pack_bf16(u.x, u.y), pack_bf16(u.z, u.w));
    }
}

// One compressor of a layer: where its inputs and its rows lie in a session's cache.
struct Pool {
    const float *ape, *norm;    // [M, c * N], [N]
    u64 in_at, out_at;          // ring of inputs [ring, 2, c * N] FP32; rows [ctx / M, N] BF16
    int ring, ratio;            // ratio 0: this layer has none
};

// compress() of dsv4.c: if the row at pos completes a window of M tokens, pools it into one row.
// M = 4 also takes the first halves of the previous window's channels. Reads at most 2 M (or 16)
// channels of N, twice the gates.
template <int N>
__device__ inline void compress(const Pool &p, u64 cache, int pos, const float *inv_freq,
    float *tmp) {
    const int M = p.ratio, wide = M == 4 ? 2 * N : N, w = pos / M;
    if ((pos + 1) % M) return;
    const float *ring = (const float *)(cache + p.in_at);
    constexpr int PER = (N + 1023) / 1024;
    float4 c[PER];
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const int d = (i * 256 + threadIdx.x) * 4;
        float4 m = make_float4(MINUS_INF, MINUS_INF, MINUS_INF, MINUS_INF),
               l = make_float4(0, 0, 0, 0), o = l;
        c[i] = l;
        if (d >= N) continue;
        const int first = M == 4 && w > 0 ? -M : 0;
        for (int pass = 0; pass < 2; pass++) {
            for (int j = first; j < M; j++) {
                const int at = M == 4 && j >= 0 ? N + d : d, slot = (w * M + j) % p.ring;
                const float *in = ring + (size_t)slot * 2 * wide + at;
                const float4 g0 = *(const float4 *)(in + wide),
                    a = *(const float4 *)(p.ape + (j & (M - 1)) * wide + at);
                const float4 g = make_float4(g0.x + a.x, g0.y + a.y, g0.z + a.z, g0.w + a.w);
                if (pass == 0) {
                    m = make_float4(fmaxf(m.x, g.x), fmaxf(m.y, g.y), fmaxf(m.z, g.z),
                                    fmaxf(m.w, g.w));
                } else {
                    const float4 k = *(const float4 *)in;
                    const float4 e = make_float4(expf(g.x - m.x), expf(g.y - m.y), expf(g.z - m.z),
                        expf(g.w - m.w));
                    l = make_float4(l.x + e.x, l.y + e.y, l.z + e.z, l.w + e.w);
                    o = make_float4(fmaf(e.x, k.x, o.x), fmaf(e.y, k.y, o.y), fmaf(e.z, k.z, o.z),
                        fmaf(e.w, k.w, o.w));
                }
            }
        }
        c[i] = make_float4(o.x / l.x, o.y / l.y, o.z / l.z, o.w / l.w);
    }
    rms_row<N>(c, p.norm, tmp);
    store_row<N>(c, (u16 *)(cache + p.out_at) + (size_t)w * N, w * M, inv_freq);
}

// attn_latent(): block (t, role). Role 0 normalises and quantises qr; 1 normalises and rotates
// kv into the window ring; 2 and 3 run the compressors. Reads and writes a few KB per row.
extern "C" __global__ void __launch_bounds__(256)
attn_latent(float *qr, const float *q_norm, s8 *q, float *qs, const float *kv,
            const float *kv_norm, const Row *rows, const u64 *slots, u64 win_at, int ring,
            const float *inv_freq, Pool comp, Pool icomp) {
    __shared__ float tmp[32];
    const int t = blockIdx.x, role = blockIdx.y;
    const Row row = rows[t];
    const u64 cache = slots[row.slot];
    if (role == 0) {
        float4 v[(Q_RANK + 1023) / 1024];
        load_row<Q_RANK>(v, qr + (size_t)t * Q_RANK);
        rms_row<Q_RANK>(v, q_norm, tmp);
        store_act<Q_RANK>(v, t, qr, q, qs);
    } else if (role == 1) {
        float4 v[(HEAD_DIM + 1023) / 1024];
        u16 *to = (u16 *)(cache + win_at) + (size_t)(row.pos % ring) * HEAD_DIM;
        load_row<HEAD_DIM>(v, kv + (size_t)t * HEAD_DIM);
        rms_row<HEAD_DIM>(v, kv_norm, tmp);
        store_row<HEAD_DIM>(v, to, row.pos, inv_freq);
    } else if (role == 2) {
        compress<HEAD_DIM>(comp, cache, row.pos, inv_freq, tmp);
    } else {
        compress<INDEX_DIM>(icomp, cache, row.pos, inv_freq, tmp);
    }
}

// One head of N dims by one warp: (norm) 1 / rms, rotation, BF16.
template <int N>
__device__ inline void query_head(const float *in, u16 *out, bool norm, int pos,
    const float *inv_freq) {
    constexpr int PER = (N + 127) / 128;
    const int lane = threadIdx.x & 31;
    float4 v[PER];
    float sq = 0;
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const int d = (i * 32 + lane) * 4;
        v[i] = d < N ? *(const float4 *)(in + d) : make_float4(0, 0, 0, 0);
        sq = fmaf(v[i].x, v[i].x,
                  fmaf(v[i].y, v[i].y, fmaf(v[i].z, v[i].z, fmaf(v[i].w, v[i].w, sq))));
    }
    const float r = norm ? 1.f / sqrtf(warp_sum(sq) / N + NORM_EPS) : 1.f;
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const int d = (i * 32 + lane) * 4;
        if (d >= N) continue;
        const float4 u = rope4(make_float4(v[i].x * r, v[i].y * r, v[i].z * r, v[i].w * r), d, N,
            pos, inv_freq, 1.f);
        *(uint2 *)(out + d) = make_uint2(pack_bf16(u.x, u.y), pack_bf16(u.z, u.w));
    }
}

// The second half of attn_query(): head norm and rotation of the queries, rotation of the index
// queries, to BF16. A warp per head, blocks (t, 8 heads).
extern "C" __global__ void __launch_bounds__(256)
query_norm(const float *q, const float *iq, const Row *rows, const float *inv_freq, u16 *qh,
           u16 *iqh, int index) {
    const int t = blockIdx.x, h = blockIdx.y * 8 + (threadIdx.x >> 5);
    if (h < HEADS) {
        const size_t at = ((size_t)t * HEADS + h) * HEAD_DIM;
        query_head<HEAD_DIM>(q + at, qh + at, true, rows[t].pos, inv_freq);
    } else if (index && h < HEADS + INDEX_HEADS) {
        const size_t at = ((size_t)t * INDEX_HEADS + h - HEADS) * INDEX_DIM;
        query_head<INDEX_DIM>(iq + at, iqh + at, false, rows[t].pos, inv_freq);
    }
}

// ---------------------------------------------------------------------------
// indexer

constexpr int SCORE_KEYS = 128;     // keys per block, 32 per warp

// index_scores() of dsv4.c: scores[t, w] = sum_h wt[t, h] relu(iq[t, h] . key[w]) for the
// visible w. Block (key block, row t of the slab that starts at t0). Keys are the A operand (16
// rows), 8 heads the B operand; both are read 16 bytes at a time and thereby take the columns in
// the same permuted order. Reads 256 bytes per key, the queries once per block.
extern "C" __global__ void __launch_bounds__(128, INDEX_DIM > 128 ? 3 : 5)
index_scores(const u16 *iqh, const float *wt, const Row *rows, const u64 *slots, u64 keys_at,
             int t0, float *scores, size_t ld) {
    // [head][16-byte chunks] of 64 heads at a time; the pad keeps 8 lanes on 32 banks
    constexpr int CHUNKS = INDEX_DIM / 32, ROW = INDEX_DIM / 8, PITCH = ROW + 4;
    constexpr int SLAB = INDEX_HEADS > 64 ? 64 : (INDEX_HEADS + 7) & ~7;
    __shared__ uint4 qs[SLAB * PITCH];
    __shared__ float ws[SLAB];
    const int t = t0 + blockIdx.y, n = (rows[t].pos + 1) / 4, first = blockIdx.x * SCORE_KEYS;
    if (n <= INDEX_TOPK || first >= n) return;
    const int lane = threadIdx.x & 31, g = lane >> 2, q4 = lane & 3;
    const int key = first + (threadIdx.x >> 5) * 32;
    const uint4 *keys = (const uint4 *)(slots[rows[t].slot] + keys_at);
    const uint4 *q = (const uint4 *)(iqh + (size_t)t * INDEX_HEADS * INDEX_DIM);
    uint4 a[4][CHUNKS];             // key rows g, g + 8, g + 16, g + 24 of this warp
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
            a[i][c] = load_stream(keys + (size_t)min(key + g + 8 * i, n - 1) * ROW + c * 4 + q4);
    float sum[4] = {};
    for (int h0 = 0; h0 < INDEX_HEADS; h0 += SLAB) {
        if (h0) __syncthreads();
        for (int i = threadIdx.x; i < SLAB * ROW; i += 128)
            qs[i / ROW * PITCH + i % ROW] = h0 + i / ROW < INDEX_HEADS ? q[h0 * ROW + i]
                                                                       : make_uint4(0, 0, 0, 0);
        for (int h = threadIdx.x; h < SLAB; h += 128)
            ws[h] = h0 + h < INDEX_HEADS ? wt[(size_t)t * INDEX_HEADS + h0 + h] : 0;
        __syncthreads();
        for (int j = 0; j < SLAB; j += 8) {
            float acc[2][4] = {};
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                const uint4 b = qs[(j + g) * PITCH + c * 4 + q4];
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    const uint4 &lo = a[2 * m][c], &hi = a[2 * m + 1][c];
                    mma_bf16(acc[m], lo.x, hi.x, lo.y, hi.y, b.x, b.y);
                    mma_bf16(acc[m], lo.z, hi.z, lo.w, hi.w, b.z, b.w);
                }
            }
            const float w0 = ws[j + 2 * q4], w1 = ws[j + 2 * q4 + 1];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *s = acc[i >> 1] + (i & 1) * 2;
                sum[i] = fmaf(w0, relu(s[0]), fmaf(w1, relu(s[1]), sum[i]));
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
        sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
        const int w = key + g + 8 * i;
        // -0 becomes 0
        if (q4 == 0 && w < n) scores[(size_t)blockIdx.y * ld + w] = sum[i] + 0.f;
    }
}

// Unsigned integers in the order of the floats.
__device__ inline u32 ordered(float f) {
    const u32 u = __float_as_uint(f);
    if (f != f) return 0;               // NaN counts as smallest
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

// Inclusive prefix sum over a block of whole warps; tmp holds 32 ints.
__device__ inline int block_scan(int v, int *tmp) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int i = 1; i < 32; i <<= 1) {
        const int u = __shfl_up_sync(~0u, v, i);
        if (lane >= i) v += u;
    }
    __syncthreads();
    if (lane == 31) tmp[warp] = v;
    __syncthreads();
    int before = lane < warp ? tmp[lane] : 0;
    for (int i = 16; i; i >>= 1) before += __shfl_xor_sync(~0u, before, i);
    return v + before;
}

// top_k() of dsv4.c by one block: calls take(place, i) for the INDEX_TOPK largest of s[0..n), n
// > INDEX_TOPK, in ascending order of i; ties go to the lowest. Three histogram passes find the
// threshold, two more collect. Reads s five times.
template <class Take> __device__ inline void top_k(const float *s, int n, Take take) {
    __shared__ int hist[2048], tmp[32], above[32], equal[32];
    __shared__ int bin, left;
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    u32 prefix = 0, mask = 0;
    int need = INDEX_TOPK;
    for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift - 10) {
        const int bins = shift ? 2048 : 1024;
        hist[tid] = hist[tid + 1024] = 0;
        __syncthreads();
        for (int i = tid; i < n; i += 1024) {
            const u32 k = ordered(s[i]);
            if ((k & mask) == prefix) atomicAdd(hist + (k >> shift & (bins - 1)), 1);
        }
        __syncthreads();
        const int hi = bins - 1 - 2 * tid, a = hi > 0 ? hist[hi] : 0, b = hi > 0 ? hist[hi - 1] : 0;
        const int before = block_scan(a + b, tmp) - a - b;
        if (before < need && need <= before + a + b) {
            bin = need <= before + a ? hi : hi - 1;
            left = need - before - (need <= before + a ? 0 : a);
        }
        __syncthreads();
        prefix |= (u32)bin << shift;
        mask |= (u32)(bins - 1) << shift;
        need = left;
        __syncthreads();
    }
    const int seg = (n + 1023) / 1024 * 32, lo = warp * seg, hi = min(n, lo + seg);
    int gt = 0, eq = 0;
    for (int i = lo + lane; i < lo + seg; i += 32) {
        const u32 k = i < hi ? ordered(s[i]) : 0;
        gt += __popc(__ballot_sync(~0u, i < hi && k > prefix));
        eq += __popc(__ballot_sync(~0u, i < hi && k == prefix));
    }
    if (lane == 0) above[warp] = gt, equal[warp] = eq;
    __syncthreads();
    gt = eq = 0;
    for (int w = 0; w < warp; w++) gt += above[w], eq += equal[w];
    for (int i = lo + lane; i < lo + seg; i += 32) {
        const u32 k = i < hi ? ordered(s[i]) : 0, less = (1u << lane) - 1;
        const u32 g = __ballot_sync(~0u, i < hi && k > prefix),
                  e = __ballot_sync(~0u, i < hi && k == prefix);
        const int rank = eq + __popc(e & less);
        if (g >> lane & 1 || (e >> lane & 1 && rank < need))
            take(gt + __popc(g & less) + min(rank, need), i);
        gt += __popc(g), eq += __popc(e);
    }
}

// index_topk() of dsv4.c, first level of a long context: block (slab of keys, row) keeps the
// best INDEX_TOPK of its slab with their scores, so that the second level has little to read.
// What a slab drops, the whole would drop as well.
extern "C" __global__ void __launch_bounds__(1024)
index_slab(const float *scores, size_t ld, const Row *rows, int t0, int slab, float *best,
           int *best_key, size_t best_ld) {
    const int n = (rows[t0 + blockIdx.y].pos + 1) / 4, first = blockIdx.x * slab,
              count = min(slab, n - first);
    const float *s = scores + (size_t)blockIdx.y * ld + first;
    const size_t to = (size_t)blockIdx.y * best_ld + (size_t)blockIdx.x * INDEX_TOPK;
    if (count <= 0) return;
    if (count <= INDEX_TOPK) {
        for (int i = threadIdx.x; i < count; i += 1024)
            best[to + i] = s[i], best_key[to + i] = first + i;
        return;
    }
    top_k(s, count,
          [&](int place, int i) { best[to + place] = s[i], best_key[to + place] = first + i; });
}

// index_topk() of dsv4.c: the rows that row t of the slab of rows attends to. One block per row;
// with `slab` among the best of each slab of keys, else among all scores.
extern "C" __global__ void __launch_bounds__(1024)
index_topk(const float *scores, size_t ld, const int *key, const Row *rows, int t0, int slab,
           int *chosen) {
    const int t = t0 + blockIdx.x, n = (rows[t].pos + 1) / 4;
    const float *s = scores + (size_t)blockIdx.x * ld;
    const int full = slab ? n / slab : 0, rest = slab ? n - full * slab : n;
    const int count = slab ? full * INDEX_TOPK + min(rest, INDEX_TOPK) : n;
    if (n <= INDEX_TOPK) return;
    int *to = chosen + (size_t)t * INDEX_TOPK;
    const int *name = key + (size_t)blockIdx.x * ld;
    if (count == INDEX_TOPK) {          // one slab holds all that is left
        for (int i = threadIdx.x; i < count; i += 1024) to[i] = name[i];
        return;
    }
    top_k(s, count, [&](int place, int i) { to[place] = slab ? name[i] : i; });
}

// ---------------------------------------------------------------------------
// sparse attention

// each warp owns 64 columns of keys = values
constexpr int ATT_WARPS = (HEAD_DIM + 63) / 64;
constexpr int ATT_STAGES = 3;

// What row t attends to, and how it is split: `len` keys for each of `splits` blocks.
struct Span { int window, total, len, splits; };
__device__ inline Span attention_span(int pos, int ratio, int max_splits) {
    Span s;
    s.window = min(WINDOW, pos + 1);
    const int visible = ratio ? (pos + 1) / ratio : 0;
    s.total = s.window + (ratio == 4 ? min(visible, INDEX_TOPK) : visible);
    s.len = max_splits == 1 ? s.total : max(64, ((s.total - 1) / max_splits + 16) & ~15);
    s.splits = (s.total + s.len - 1) / s.len;
    return s;
}

// attend() of dsv4.c, one part of the keys, for 16 TILES heads: see attend_16 below. Warp w holds
// columns 64 w .. 64 w + 63 of the queries in registers and streams the same columns of the keys,
// which are the values too, through its own ring of three tiles of 16 keys. Per tile: partial
// scores meet in shared memory, softmax by all threads, P (BF16) back through shared memory,
// O += P V. What a head gets does not depend on the heads beside it.
template <int TILES>
__device__ inline void attend_block(const u16 *qh, const Row *rows, const u64 *slots, u64 win_at,
                                    int ring, u64 comp_at, int ratio, const int *chosen,
                                    int max_splits, float *o_part, float2 *ml_part) {
    extern __shared__ __align__(128) u8 shared[];
    constexpr int BLOCK_HEADS = TILES * 16;
    const int split = blockIdx.x, h0 = blockIdx.y * BLOCK_HEADS, t = blockIdx.z, pos = rows[t].pos;
    const Span span = attention_span(pos, ratio, max_splits);
    if (split >= span.splits) return;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, q4 = lane & 3;
    u8 *tiles = shared + warp * (ATT_STAGES * 2048);
    // [warp][head][16 keys]
    float *s_part = (float *)(shared + ATT_WARPS * ATT_STAGES * 2048);
    // [head][8 pairs of keys, pitch 12]
    u32 *p_tile = (u32 *)(s_part + ATT_WARPS * BLOCK_HEADS * 16);
    float *m_row = (float *)(p_tile + BLOCK_HEADS * 12), *l_row = m_row + BLOCK_HEADS,
        *alpha = l_row + BLOCK_HEADS;
    const int first = split * span.len, count = min(span.len, span.total - first),
        n_tiles = (count + 15) / 16;
    const u8 *win = (const u8 *)(slots[rows[t].slot] + win_at),
        *comp = (const u8 *)(slots[rows[t].slot] + comp_at);
    const bool all = ratio != 4 || (pos + 1) / 4 <= INDEX_TOPK;
    const int col = warp * 64 + (lane & 7) * 8;

    // 16 keys x 128 bytes; chunk c of key k lies at c ^ (k & 7)
    auto load_tile = [&](int tile) {
        u32 to = shared_address(tiles + tile % ATT_STAGES * 2048);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int k = i * 4 + (lane >> 3), key = first + min(tile * 16 + k, count - 1),
                c = key - span.window;
            const u8 *row = c < 0 ? win + (size_t)((pos + 1 + c) % ring) * (HEAD_DIM * 2)
                                  : comp + (size_t)(all ? c : chosen[(size_t)t * INDEX_TOPK + c]) *
                                               (HEAD_DIM * 2);
            const bool valid = col < HEAD_DIM && tile * 16 + k < count;
            cp_async16(to + k * 128 + (((lane & 7) ^ (k & 7)) << 4), row + (valid ? col * 2 : 0),
                valid);
        }
    };
    u32 qa[TILES][4][4];                // A fragments of the queries
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int h = h0 + m * 16 + g + (i & 1) * 8,
                    d = warp * 64 + k * 16 + (i >> 1) * 8 + q4 * 2;
                qa[m][k][i] = h < HEADS && d < HEAD_DIM
                                  ? *(const u32 *)(qh + ((size_t)t * HEADS + h) * HEAD_DIM + d) : 0;
            }
    float o[TILES][8][4] = {};
    for (int h = threadIdx.x; h < BLOCK_HEADS; h += blockDim.x) m_row[h] = MINUS_INF, l_row[h] = 0;
    for (int i = 0; i < ATT_STAGES - 1; i++) {
        if (i < n_tiles) load_tile(i);
        cp_async_commit();
    }
    const float scale = 1.f / sqrtf((float)HEAD_DIM);
    for (int tile = 0; tile < n_tiles; tile++) {
        cp_async_wait<ATT_STAGES - 2>();
        __syncwarp();
        if (tile + ATT_STAGES - 1 < n_tiles) load_tile(tile + ATT_STAGES - 1);
        cp_async_commit();
        const u32 at = shared_address(tiles + tile % ATT_STAGES * 2048);
        float s[TILES][2][4] = {};
#pragma unroll
        for (int k = 0; k < 4; k++) {
            u32 b[4];
            const int key = (lane >> 4) * 8 + (lane & 7), chunk = k * 2 + (lane >> 3 & 1);
            ldmatrix4(b, at + key * 128 + ((chunk ^ (key & 7)) << 4));
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                mma_bf16(s[m][0], qa[m][k][0], qa[m][k][1], qa[m][k][2], qa[m][k][3], b[0], b[1]);
                mma_bf16(s[m][1], qa[m][k][0], qa[m][k][1], qa[m][k][2], qa[m][k][3], b[2], b[3]);
            }
        }
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int h = warp * BLOCK_HEADS + m * 16 + g + r * 8;
                    float *to = s_part + h * 16 + (j ^ (h >> 1 & 1)) * 8 + q4 * 2;
                    *(float2 *)to = make_float2(s[m][j][r * 2], s[m][j][r * 2 + 1]);
                }
        __syncthreads();
        // 8 lanes per head, 2 keys each
        for (int h = threadIdx.x >> 3; h < BLOCK_HEADS; h += ATT_WARPS * 4) {
            const int j = threadIdx.x & 7,
                      at2 = h * 16 + ((j >> 2) ^ (h >> 1 & 1)) * 8 + (j & 3) * 2;
            float s0 = 0, s1 = 0;
#pragma unroll
            for (int w = 0; w < ATT_WARPS; w++) {
                const float2 v = *(const float2 *)(s_part + w * BLOCK_HEADS * 16 + at2);
                s0 += v.x, s1 += v.y;
            }
            const int left = count - tile * 16 - 2 * j;
            s0 = left > 0 ? s0 * scale : MINUS_INF, s1 = left > 1 ? s1 * scale : MINUS_INF;
            float m = fmaxf(s0, s1);
            for (int i = 4; i; i >>= 1) m = fmaxf(m, __shfl_xor_sync(~0u, m, i));
            const float old = m_row[h];
            m = fmaxf(m, old);
            const float p0 = expf(s0 - m), p1 = expf(s1 - m), a = expf(old - m);
            float l = p0 + p1;
            for (int i = 4; i; i >>= 1) l += __shfl_xor_sync(~0u, l, i);
            p_tile[h * 12 + j] = pack_bf16(p0, p1);
            if (j == 0) m_row[h] = m, l_row[h] = fmaf(l_row[h], a, l), alpha[h] = a;
            __syncwarp();
        }
        __syncthreads();
        u32 pa[TILES][4];
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            const u32 *p = p_tile + (m * 16 + g) * 12 + q4;
            pa[m][0] = p[0], pa[m][1] = p[8 * 12], pa[m][2] = p[4], pa[m][3] = p[8 * 12 + 4];
            const float a0 = alpha[m * 16 + g], a1 = alpha[m * 16 + g + 8];
            if (__any_sync(~0u, a0 != 1.f || a1 != 1.f)) {
#pragma unroll
                for (int j = 0; j < 8; j++)
                    o[m][j][0] *= a0, o[m][j][1] *= a0, o[m][j][2] *= a1, o[m][j][3] *= a1;
            }
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 b[4];
            const int key = (lane >> 3 & 1) * 8 + (lane & 7), chunk = j * 2 + (lane >> 4);
            ldmatrix4_trans(b, at + key * 128 + ((chunk ^ (key & 7)) << 4));
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                mma_bf16(o[m][j * 2], pa[m][0], pa[m][1], pa[m][2], pa[m][3], b[0], b[1]);
                mma_bf16(o[m][j * 2 + 1], pa[m][0], pa[m][1], pa[m][2], pa[m][3], b[2], b[3]);
            }
        }
    }
    const size_t part = (size_t)t * max_splits + split;
    for (int h = threadIdx.x; h < BLOCK_HEADS; h += blockDim.x)
        if (h0 + h < HEADS) ml_part[part * HEADS + h0 + h] = make_float2(m_row[h], l_row[h]);
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int h = h0 + m * 16 + g + r * 8, d = warp * 64 + j * 8 + q4 * 2;
                if (h < HEADS && d < HEAD_DIM)
                    *(float2 *)(o_part + (part * HEADS + h) * HEAD_DIM + d) =
                        make_float2(o[m][j][r * 2], o[m][j][r * 2 + 1]);
            }
}

// Block (split, 16 or 32 heads, row t). Reads the queries and 1 KB per key; writes unnormalised O
// [heads, K], maximum and sum in FP32.
#define ATTEND(H) \
extern "C" __global__ void __launch_bounds__(32 * ATT_WARPS) \
attend_##H(const u16 *qh, const Row *rows, const u64 *slots, u64 win_at, int ring, u64 comp_at, \
           int ratio, const int *chosen, int max_splits, float *o_part, float2 *ml_part) { \
    attend_block<H / 16>(qh, rows, slots, win_at, ring, comp_at, ratio, chosen, max_splits, \
                         o_part, ml_part); \
}
ATTEND(16)
ATTEND(32)

// The second half of attend(): block (head, row t) adds the splits, divides by the sum with the
// sink, turns the last dims back and quantises. Reads splits * K floats, writes K values as INT8
// (and FP32 if x is not NULL).
extern "C" __global__ void __launch_bounds__((HEAD_DIM / 4 + 31) & ~31)
attend_combine(const float *o_part, const float2 *ml_part, const Row *rows, int ratio,
               int max_splits, const float *attn_sink, const float *inv_freq, float *x, s8 *q,
               float *qs) {
    const int h = blockIdx.x, t = blockIdx.y, d = threadIdx.x * 4, pos = rows[t].pos;
    const int splits = attention_span(pos, ratio, max_splits).splits;
    const float sink = attn_sink[h];
    float m = sink;
    for (int i = 0; i < splits; i++)
        m = fmaxf(m, ml_part[((size_t)t * max_splits + i) * HEADS + h].x);
    float l = 0;
    float4 o = make_float4(0, 0, 0, 0);
    for (int i = 0; i < splits; i++) {
        const size_t part = ((size_t)t * max_splits + i) * HEADS + h;
        const float2 ml = ml_part[part];
        const float a = expf(ml.x - m);
        l = fmaf(ml.y, a, l);
        if (d >= HEAD_DIM) continue;
        const float4 v = *(const float4 *)(o_part + part * HEAD_DIM + d);
        o = make_float4(fmaf(v.x, a, o.x), fmaf(v.y, a, o.y), fmaf(v.z, a, o.z), fmaf(v.w, a, o.w));
    }
    const float r = 1.f / (l + expf(sink - m));
    o = make_float4(o.x * r, o.y * r, o.z * r, o.w * r);
    if (d < HEAD_DIM) o = rope4(o, d, HEAD_DIM, pos, inv_freq, -1.f);
    const size_t at = ((size_t)t * HEADS + h) * HEAD_DIM + d;
    if (x && d < HEAD_DIM) *(float4 *)(x + at) = o;
    quantize4(o, q + at, qs + at / 32, d < HEAD_DIM);
}

// ---------------------------------------------------------------------------
// mixture of experts, 1 to 8 rows

// Which rows of the batch go to which expert. Pair p = t * ACTIVE + slot; sorted by expert, stable.
struct Routing {
    int *ids;           // [T, ACTIVE] expert of a pair
    float *weights;     // [T, ACTIVE]
    int *order;         // [T * ACTIVE] pair at a sorted place
    int *place;         // [T * ACTIVE] sorted place of a pair
    int *start;         // [EXPERTS + 1] first sorted place of an expert
    int *active;        // [EXPERTS] experts that have rows, ascending
    int *n_active;      // [1]
    int *bad;           // [1] set to 1 if a number is not finite
    // long batches: {expert, first place, places, 0} of up to 64 places of one expert
    int4 *tiles;
    int *n_tiles;       // [1]
};

// route_rows() of dsv4.c for one row by one warp: scores s = sqrt(softplus(z)), the ACTIVE
// largest of s + bias (ties to the lowest index) or the token's `given` experts; weights s / sum
// * ROUTE_SCALE. Lane `slot` gets its expert and weight. False if a score is not finite.
__device__ inline bool route_row(const float *z, const float *bias, const long long *given, int &id,
                                 float &weight) {
    constexpr int PER = (EXPERTS + 31) / 32;
    const int lane = threadIdx.x & 31;
    float s[PER], rank[PER], sum = 0;
    bool finite = true;
#pragma unroll
    for (int j = 0; j < PER; j++) {
        const int e = j * 32 + lane;
        s[j] = 0, rank[j] = MINUS_INF;
        if (e >= EXPERTS) continue;
        finite = finite && fabsf(z[e]) <= 3.4e38f;
        s[j] = sqrtf(z[e] > 20.f ? z[e] : log1pf(expf(z[e])));
        rank[j] = bias ? s[j] + bias[e] : s[j];
    }
    finite = __all_sync(~0u, finite);
    id = 0, weight = 0;
    for (int slot = 0; slot < ACTIVE; slot++) {
        int e = EXPERTS;
        if (!finite) {
            e = slot;               // any experts, but different ones: the run ends with an error
        } else if (given) {
            e = (int)given[slot];
        } else {
            float best = MINUS_INF;
#pragma unroll
            for (int j = 0; j < PER; j++)
                if (rank[j] > best) best = rank[j], e = j * 32 + lane;
            for (int m = 16; m; m >>= 1) {
                const float other = __shfl_xor_sync(~0u, best, m);
                const int oe = __shfl_xor_sync(~0u, e, m);
                if (other > best || (other == best && oe < e)) best = other, e = oe;
            }
            e = min(e, EXPERTS - 1);
        }
        float w = 0;
#pragma unroll
        for (int j = 0; j < PER; j++)
            if (e == j * 32 + lane) w = s[j], rank[j] = MINUS_INF;
        w = __shfl_sync(~0u, w, e & 31);
        sum += w;
        if (lane == slot) weight = w, id = e;
    }
    weight = weight / sum * ROUTE_SCALE;
    return finite;
}

// group_experts() of dsv4.c by `blocks` blocks of 256 threads: sorts the pairs by expert, stable,
// lists the experts that have rows, and cuts the places (and the shared expert's rows after them)
// into tiles of 64. Every block counts all pairs and places those of its share of the experts.
__device__ inline void group_pairs(int T, const Routing &r, int block, int blocks) {
    constexpr int PER = (EXPERTS + 255) / 256;          // experts per thread
    __shared__ int count[PER * 256], start[PER * 256], tmp[32];
    const int n = T * ACTIVE, i = threadIdx.x, lane = i & 31;
    for (int k = 0; k < PER; k++) count[k * 256 + i] = 0;
    __syncthreads();
    for (int p = i; p < n; p += 256) atomicAdd(count + r.ids[p], 1);
    __syncthreads();
    int places = 0, active = 0, tiles = 0;
    for (int e = i * PER; e < i * PER + PER; e++) {
        places += count[e];
        active += count[e] > 0;
        tiles += (count[e] + TILE_T - 1) / TILE_T;
    }
    int place = block_scan(places, tmp) - places, rank = block_scan(active, tmp) - active;
    int tile = block_scan(tiles, tmp) - tiles;
    for (int e = i * PER; e < i * PER + PER; e++) {
        const int c = count[e];
        start[e] = place;
        if (block == 0 && e < EXPERTS) {
            r.start[e] = place;
            if (c) r.active[rank++] = e;
            for (int k = 0; k < c; k += TILE_T)
                r.tiles[tile++] = make_int4(e, place + k, min(TILE_T, c - k), 0);
        }
        place += c;
    }
    if (block == 0 && i == 255) {
        r.start[EXPERTS] = n;
        *r.n_active = rank;
        for (int k = 0; k < T; k += TILE_T)
            r.tiles[tile++] = make_int4(EXPERTS, n + k, min(TILE_T, T - k), 0);
        *r.n_tiles = tile;
    }
    __syncthreads();
    for (int e = block * 8 + i / 32; e < EXPERTS; e += blocks * 8) {
        int at = start[e];
        for (int base = 0; base < n && at < start[e] + count[e]; base += 32) {
            const bool mine = base + lane < n && r.ids[base + lane] == e;
            const u32 all = __ballot_sync(~0u, mine);
            const int to = at + __popc(all & ((1u << lane) - 1));
            if (mine) r.order[to] = base + lane, r.place[base + lane] = to;
            at += __popc(all);
        }
    }
}

// route() for more than one row: a warp per row; up to 8 rows are also sorted by expert here.
// Reads E scores a row.
extern "C" __global__ void __launch_bounds__(256)
route(const float *z, const float *bias, const long long *tid2eid, const Row *rows, int T,
      Routing out) {
    const int lane = threadIdx.x & 31, t = blockIdx.x * 8 + (threadIdx.x >> 5);
    if (t < T) {
        int id;
        float weight;
        const long long *given = tid2eid ? tid2eid + (size_t)rows[t].token * ACTIVE : 0;
        if (!route_row(z + (size_t)t * EXPERTS, bias, given, id, weight) && lane == 0) *out.bad = 1;
        if (lane < ACTIVE) out.ids[t * ACTIVE + lane] = id, out.weights[t * ACTIVE + lane] = weight;
    }
    if (T > 8) return;
    __syncthreads();
    group_pairs(T, out, 0, 1);
}

// The same sorting for a long batch: 8 experts per block. Reads T A ids, writes order and tiles.
extern "C" __global__ void __launch_bounds__(256) group_rows(int T, Routing r) {
    group_pairs(T, r, blockIdx.x, gridDim.x);
}

// Where the hidden rows of the experts lie: first the sorted pairs, then the shared expert's T
// rows.
struct Hidden {
    s8 *q;
    float *s, *x;       // x NULL if only INT8 is wanted
};

// One element of swiglu_rows() of dsv4.c; the clamps let NaN pass.
__device__ inline float swiglu(float g, float u, float weight) {
    g = g > SWIGLU_LIMIT ? SWIGLU_LIMIT : g;
    u = u > SWIGLU_LIMIT ? SWIGLU_LIMIT : u < -SWIGLU_LIMIT ? -SWIGLU_LIMIT : u;
    return g * sigmoid(g) * u * weight;
}

// Rows n0 .. n0+31 of w1 and w3 for `count` <= B activation rows: four warps share each. Hidden row
// i goes to out row place + i.
template <int FORMATS, int B>
__device__ inline void up_rows(float (*part)[B][PART], const Matrix &w1, const Matrix &w3, int n0,
                               const In &in, int count, const float *weights, Hidden out,
                               int place) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    dot_rows<FORMATS, B>(part[warp], warp < 4 ? w1 : w3, n0, in, count, warp & 3, 4);
    __syncthreads();
    if (warp >= count) return;
    float g = 0, u = 0;
    for (int k = 0; k < 4; k++) g += part[k][warp][lane], u += part[4 + k][warp][lane];
    const float h = swiglu(g, u, weights ? weights[warp] : 1.f);
    const size_t to = (size_t)(place + warp) * EXPERT_DIM + n0 + lane;
    if (out.x) out.x[to] = h;
    quantize1(h, out.q + to, out.s + to / 32);
}

// The first half of experts() for one row: block (32 hidden rows, slot). Every block routes the
// row for itself: that takes less time than a kernel in between. Reads 32 rows of w1 and w3 once,
// writes 32 hidden values.
extern "C" __global__ void __launch_bounds__(256, ROUTED >> W_FP8 ? 3 : 4)
expert_up_1(const Matrix *experts, const float *x, const s8 *q, const float *qs, const float *z,
            const float *bias, const long long *tid2eid, const Row *rows, Routing r,
            Hidden out) {
    __shared__ float part[8][1][PART], weight;
    __shared__ int expert;
    const int slot = blockIdx.y, lane = threadIdx.x & 31;
    if (threadIdx.x < 32) {
        int id;
        float w;
        const bool finite =
            route_row(z, bias, tid2eid ? tid2eid + (size_t)rows[0].token * ACTIVE : 0, id, w);
        if (lane == slot) expert = id, weight = w;
        if (blockIdx.x == 0 && lane == slot) r.ids[slot] = id, r.weights[slot] = w;
        if (blockIdx.x == 0 && !finite) *r.bad = 1;
        __syncwarp();
    }
    __syncthreads();
    const In in = { x, q, qs, DIM, 0, 0 };
    up_rows<ROUTED, 1>(part, experts[expert * 3], experts[expert * 3 + 2], blockIdx.x * 32, in, 1,
                       &weight, out, slot);
}

// The same for 2 to 8 rows: block (32 hidden rows, n-th active expert). An expert's weights are
// read once for all its rows.
extern "C" __global__ void __launch_bounds__(256, 2)
expert_up_8(const Matrix *experts, const float *x, const s8 *q, const float *qs, Routing r,
            Hidden out) {
    __shared__ float part[8][8][PART], weights[8];
    __shared__ int row[8];
    if (blockIdx.y >= *r.n_active) return;
    const int e = r.active[blockIdx.y];
    const In in = { x, q, qs, DIM, 0, row };
    // more than 8 pairs only where a table gives one token the same expert twice
    for (int place = r.start[e]; place < r.start[e + 1]; place += 8) {
        const int count = min(8, r.start[e + 1] - place);
        __syncthreads();
        if (threadIdx.x < count) {
            const int pair = r.order[place + threadIdx.x];
            weights[threadIdx.x] = r.weights[pair], row[threadIdx.x] = pair / ACTIVE;
        }
        __syncthreads();
        up_rows<ROUTED, 8>(part, experts[e * 3], experts[e * 3 + 2], blockIdx.x * 32, in, count,
                           weights, out, place);
    }
}

// The router's scores and the shared expert's first half, which need the same input, for 1 to 8
// rows: the first EXPERT_DIM / 32 blocks make 32 hidden rows each, the others are gemv blocks of
// the gate.
extern "C" __global__ void __launch_bounds__(256, SHARED >> W_FP8 ? 3 : 4)
ffn_in(const Matrix *w, const Task *gate, int T, Hidden out, int place) {
    constexpr int up = EXPERT_DIM / 32;
    __shared__ float part[8][8][PART];
    if (blockIdx.x >= up) {
        gemv_block<GATE>(gate, 1, blockIdx.x - up, 0, T, 0, 0);
        return;
    }
    const In in = { gate->x, gate->q, gate->qs, DIM, 0, 0 };
    up_rows<SHARED, 8>(part, w[0], w[2], blockIdx.x * 32, in, T, 0, out, place);
}

// The second half of experts(): block = 32 rows of y for the whole batch. A warp takes one active
// expert after the other, all its rows at once; the shared expert, whose weights are twice as
// large, counts as two: the halves of its columns. Then every y[t, n] is the sum over the row's
// slots in order plus the shared. Reads 32 rows of each w2 once, writes 32 T floats of y.
template <int MAX>
__device__ inline void expert_down_block(const Matrix *experts, Hidden h, const Routing &r, int T,
                                         float *y) {
    constexpr int FORMATS = SHARED | ROUTED;
    __shared__ float part[MAX * (ACTIVE + 2)][PART];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, n = blockIdx.x * 32;
    const int active = MAX == 1 ? ACTIVE : *r.n_active;
    for (int i = warp; i < active + 2; i += 8) {
        int e = EXPERTS, place = T * ACTIVE, end = place + T;
        if (i < active) {                   // one row: in the order of its slots
            e = MAX == 1 ? r.ids[i] : r.active[i];
            place = MAX == 1 ? i : r.start[e];
            end = MAX == 1 ? i + 1 : r.start[e + 1];
        }
        const bool second = i == active + 1;
        for (; place < end; place += 8) {
            const In in = { h.x, h.q, h.s, EXPERT_DIM, place, 0 };
            dot_rows<FORMATS, MAX>(part + place + (second ? T : 0), experts[e * 3 + 1], n, in,
                                   min(MAX, end - place), second, i < active ? 1 : 2);
        }
    }
    __syncthreads();
    if (warp >= T) return;
    float v = 0;
    for (int slot = 0; slot < ACTIVE; slot++)
        v += part[MAX == 1 ? slot : r.place[warp * ACTIVE + slot]][lane];
    v += part[T * ACTIVE + warp][lane] + part[T * (ACTIVE + 1) + warp][lane];
    y[(size_t)warp * DIM + n + lane] = v;
}

#define EXPERT_DOWN(MAX, BLOCKS) \
extern "C" __global__ void __launch_bounds__(256, BLOCKS) \
expert_down_##MAX(const Matrix *experts, Hidden h, Routing r, int T, float *y) { \
    expert_down_block<MAX>(experts, h, r, T, y); \
}
EXPERT_DOWN(1, 3)
EXPERT_DOWN(8, 2)

// ---------------------------------------------------------------------------
// mixture of experts, more than 8 rows

// The first half of experts(): block (64 hidden rows, tile): w1 and w3 side by side, SwiGLU,
// route weight, quantised.
extern "C" __global__ void __launch_bounds__(256, 2)
expert_up(const Matrix *experts, const float *x, const s8 *q, const float *qs, int T, Routing r,
          Hidden out) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ int row[TILE_T];
    __shared__ float weight[TILE_T];
    if (blockIdx.y >= *r.n_tiles) return;
    const int4 tile = r.tiles[blockIdx.y];
    const int n0 = blockIdx.x * 64, warp = threadIdx.x >> 5, lane = threadIdx.x & 31,
        i = threadIdx.x;
    if (i < TILE_T) {
        const int place = tile.y + min(i, tile.z - 1), pair = tile.x < EXPERTS ? r.order[place] : 0;
        row[i] = tile.x < EXPERTS ? pair / ACTIVE : place - T * ACTIVE;
        weight[i] = tile.x < EXPERTS ? r.weights[pair] : 1.f;
    }
    __syncthreads();
    const Pair p = { experts[tile.x * 3], experts[tile.x * 3 + 2], n0, n0, 64 };
    const In in = { x, q, qs, DIM };
    tile_any<SHARED | ROUTED>(p, in, row, tile.z, shared);
    for (int j = warp; j < tile.z; j += 8) {
        const float *c = (const float *)shared + j * TILE_PITCH;
        for (int n = lane; n < 64 && n0 + n < EXPERT_DIM; n += 32) {
            const size_t to = (size_t)(tile.y + j) * EXPERT_DIM + n0 + n;
            const float h = swiglu(c[n], c[64 + n], weight[j]);
            if (out.x) out.x[to] = h;
            quantize1(h, out.q + to, out.s + to / 32);
        }
    }
}

// The second half: block (128 rows of w2, tile): each place's contribution to its row.
extern "C" __global__ void __launch_bounds__(256, 2)
expert_down(const Matrix *experts, Hidden h, Routing r, float *contribution) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ int row[TILE_T];
    if (blockIdx.y >= *r.n_tiles) return;
    const int4 tile = r.tiles[blockIdx.y];
    const int n0 = blockIdx.x * TILE_N, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (threadIdx.x < TILE_T) row[threadIdx.x] = tile.y + min((int)threadIdx.x, tile.z - 1);
    __syncthreads();
    const Matrix m = experts[tile.x * 3 + 1];
    const Pair p = { m, m, n0, 0, TILE_N };
    const In in = { h.x, h.q, h.s, EXPERT_DIM };
    tile_any<SHARED | ROUTED>(p, in, row, tile.z, shared);
    for (int j = warp; j < tile.z; j += 8)
        for (int n = lane; n < TILE_N && n0 + n < DIM; n += 32)
            contribution[(size_t)(tile.y + j) * DIM + n0 + n] =
                ((const float *)shared)[j * TILE_PITCH + n];
}

// combine_rows() of dsv4.c: y[t] = the contributions of its experts in the order they were
// chosen, then the shared one.
extern "C" __global__ void __launch_bounds__(256)
expert_sum(const float *contribution, Routing r, int T, float *y) {
    const int t = blockIdx.y, d = (blockIdx.x * 256 + threadIdx.x) * 4;
    if (d >= DIM) return;
    float4 v = make_float4(0, 0, 0, 0);
    for (int slot = 0; slot <= ACTIVE; slot++) {
        const int place = slot < ACTIVE ? r.place[t * ACTIVE + slot] : T * ACTIVE + t;
        const float4 c = *(const float4 *)(contribution + (size_t)place * DIM + d);
        v = make_float4(v.x + c.x, v.y + c.y, v.z + c.z, v.w + c.w);
    }
    *(float4 *)(y + (size_t)t * DIM + d) = v;
}

// ---------------------------------------------------------------------------
// the draft layer

// mtp_in(): block (t, i): i < S: out[t * S + i] = rms(X[t, i]; hnorm), else e[t] =
// rms(embed[next]; enorm).
extern "C" __global__ void __launch_bounds__(256)
mtp_norm(const float *X, const void *table, int wide, const Row *rows, const float *hnorm,
         const float *enorm, float *h, float *e) {
    constexpr int PER = (DIM + 1023) / 1024;
    __shared__ float tmp[32];
    const int t = blockIdx.x, s = blockIdx.y;
    float *to = s < STREAMS ? h + ((size_t)t * STREAMS + s) * DIM : e + (size_t)t * DIM;
    float4 v[PER];
    if (s < STREAMS) load_row<DIM>(v, X + ((size_t)t * STREAMS + s) * DIM);
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const int d = (i * 256 + threadIdx.x) * 4, id = rows[t].next;
        if (s < STREAMS) break;
        v[i] = make_float4(0, 0, 0, 0);
        if (d < DIM)
            v[i] = make_float4(embedding(table, wide, id, d), embedding(table, wide, id, d + 1),
                               embedding(table, wide, id, d + 2),
                               embedding(table, wide, id, d + 3));
    }
    rms_row<DIM>(v, s < STREAMS ? hnorm : enorm, tmp);
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const int d = (i * 256 + threadIdx.x) * 4;
        if (d < DIM) *(float4 *)(to + d) = v[i];
    }
}

// X[t, s] = (h_proj part)[t, s] + (e_proj part)[t].
extern "C" __global__ void __launch_bounds__(256) mtp_add(float *X, const float *e) {
    const int t = blockIdx.x / STREAMS;
    for (int d = threadIdx.x; d < DIM; d += 256)
        X[(size_t)blockIdx.x * DIM + d] += e[(size_t)t * DIM + d];
}

// Rows want[i] of x to rows i of out, for the head.
extern "C" __global__ void __launch_bounds__(256)
gather_rows(const float *x, const int *want, float *out) {
    for (int d = threadIdx.x; d < DIM; d += 256)
        out[(size_t)blockIdx.x * DIM + d] = x[(size_t)want[blockIdx.x] * DIM + d];
}
