// kernels.cu: the forward pass of dsv4.c for CUDA devices, kernel by kernel, in the order of a layer.
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
// Decode (1 to 8 rows) streams weights once through dp4a (gemv, ffn_in, expert_up_1/_8,
// expert_down_1/_8); longer batches use tensor-core tiles (gemm, expert_up, expert_down).

typedef signed char s8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

enum { W_F32, W_BF16, W_INT8, W_INT4, W_FP8, W_FP4 };       // Format in dsv4.c

// Mat in dsv4.c: [n, k] in the checkpoint's layout, base addresses on 256 bytes, k a multiple of
// 32.
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
    // ring > 0: row t goes to its session's cache at ring_at + (pos % ring) * ring_step
    // bytes
    u64 ring_at;
    int ring, ring_step;
    int ldx, ldo;
    int seg_n, seg_blocks;  // rows and blocks of a segment
    int ksplit;             // warps that share a row: 1, 2, 4 or 8; a block has 32 / ksplit rows
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

__device__ inline int dot16(uint4 a, uint4 b) {
    return __dp4a((int)a.w, (int)b.w, __dp4a((int)a.z, (int)b.z, __dp4a((int)a.y, (int)b.y,
        __dp4a((int)a.x, (int)b.x, 0))));
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

// c += a b with a 16 x 16, b 16 x 8 in BF16, c in FP32.
__device__ inline void mma_bf16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3),
            "r"(b0), "r"(b1));
}

// The same for INT8: a 16 x 32, b 32 x 8, c in 32-bit integers.
__device__ inline void mma_int8(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3),
            "r"(b0), "r"(b1));
}

__device__ inline u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

__device__ inline void cp_async16(u32 to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from),
        "r"(valid ? 16 : 0) : "memory");
}
__device__ inline void cp_async4(u32 to, const void *from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(to), "l"(from),
        "r"(valid ? 4 : 0) : "memory");
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
    float ps = fmaf(fmaf(fmaf(-1.9515295891e-4f, r2, 8.3321608736e-3f), r2, -1.6666654611e-1f),
        r2 * r, r);
    float pc = fmaf(fmaf(fmaf(2.443315711809948e-5f, r2, -1.388731625493765e-3f), r2,
        4.166664568298827e-2f),
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

// Rows of activations (columns of one segment).
struct In {
    const float *x;
    const s8 *q;
    const float *qs;
    int ld;
};

// The dot_* functions add the products of R weight rows with B activation rows to acc. A lane
// takes the 16-byte chunks c, c + step, ... of a row. Rows past the end of a matrix or a batch
// are read too (memory is allocated for them) and dropped by the caller.

// INT8: 16 columns a chunk, half a group of the activations. s: the scales of this row block,
// one per 128 columns.
template <int R, int B>
__device__ inline void dot_int8(float (&acc)[R * B], const u8 *w, size_t pitch, const u16 *s,
    const In &in,
                                const int (&row)[B], int c, int step, int chunks) {
#pragma unroll 1
    for (; c < chunks; c += step) {
        uint4 v[R];
#pragma unroll
        for (int r = 0; r < R; r++) v[r] = load_stream(w + r * pitch + (size_t)c * 16);
        const float ws = bf16_to_float(__ldg(s + (c >> 3)));
#pragma unroll
        for (int b = 0; b < B; b++) {
            const uint4 a = __ldg((const uint4 *)(in.q + (u32)(row[b] * in.ld)) + c);
            const float as = __ldg(in.qs + (u32)(row[b] * (in.ld >> 5) + (c >> 1))) * ws;
#pragma unroll
            for (int r = 0; r < R; r++) acc[r * B + b] = fmaf((float)dot16(v[r], a), as,
                acc[r * B + b]);
        }
    }
}

// INT4: 32 columns a chunk = one group. (nibble - 8) * 16 is one LOP3 away from the packed
// bytes; even columns and odd columns come out apart, so the activations are sorted the same
// way. s: this row's scales, row r at r * groups.
template <int R, int B>
__device__ inline void dot_int4(float (&acc)[R * B], const u8 *w, size_t pitch, const u16 *s,
    const In &in,
                                const int (&row)[B], int c, int step, int chunks) {
#pragma unroll 1
    for (; c < chunks; c += step) {
        uint4 v[R];
        float ws[R];
#pragma unroll
        for (int r = 0; r < R; r++) v[r] = load_stream(w + r * pitch + (size_t)c * 16);
#pragma unroll
        for (int r = 0; r < R; r++) ws[r] = bf16_to_float(__ldg(s + r * chunks + c)) * 0.0625f;
        uint4 e[R], o[R];
#pragma unroll
        for (int r = 0; r < R; r++) {
            const u32 m = 0xf0f0f0f0u, x = 0x80808080u;
            e[r] = make_uint4((v[r].x << 4 & m) ^ x, (v[r].y << 4 & m) ^ x, (v[r].z << 4 & m) ^ x,
                (v[r].w << 4 & m) ^ x);
            o[r] = make_uint4((v[r].x & m) ^ x, (v[r].y & m) ^ x, (v[r].z & m) ^ x,
                (v[r].w & m) ^ x);
        }
#pragma unroll
        for (int b = 0; b < B; b++) {
            const uint4 *p = (const uint4 *)(in.q + (u32)(row[b] * in.ld)) + 2 * c;
            const uint4 a0 = __ldg(p), a1 = __ldg(p + 1);
            const float as = __ldg(in.qs + (u32)(row[b] * (in.ld >> 5) + c));
            const uint4 ae = make_uint4(__byte_perm(a0.x, a0.y, 0x6420), __byte_perm(a0.z, a0.w,
                0x6420),
                                        __byte_perm(a1.x, a1.y, 0x6420), __byte_perm(a1.z, a1.w,
                                            0x6420));
            const uint4 ao = make_uint4(__byte_perm(a0.x, a0.y, 0x7531), __byte_perm(a0.z, a0.w,
                0x7531),
                                        __byte_perm(a1.x, a1.y, 0x7531), __byte_perm(a1.z, a1.w,
                                            0x7531));
#pragma unroll
            for (int r = 0; r < R; r++)
                acc[r * B + b] = fmaf((float)(dot16(e[r], ae) + dot16(o[r], ao)), as * ws[r],
                    acc[r * B + b]);
        }
    }
}

// FP4 (E2M1): 32 columns a chunk = one group; the integers are 4 times the values. s: one E8M0
// byte per group.
template <int R, int B>
__device__ inline void dot_fp4(float (&acc)[R * B], const u8 *w, size_t pitch, const u8 *s,
    const In &in,
                               const int (&row)[B], int c, int step, int chunks) {
#pragma unroll 1
    for (; c < chunks; c += step) {
        uint4 v[R], lo[R], hi[R];
        float ws[R];
#pragma unroll
        for (int r = 0; r < R; r++) v[r] = load_stream(w + r * pitch + (size_t)c * 16);
#pragma unroll
        for (int r = 0; r < R; r++) ws[r] = e8m0_to_float(__ldg(s + r * chunks + c)) * 0.25f;
#pragma unroll
        for (int r = 0; r < R; r++) {
            lo[r] = make_uint4(fp4_bytes(v[r].x), fp4_bytes(v[r].x >> 16), fp4_bytes(v[r].y),
                fp4_bytes(v[r].y >> 16));
            hi[r] = make_uint4(fp4_bytes(v[r].z), fp4_bytes(v[r].z >> 16), fp4_bytes(v[r].w),
                fp4_bytes(v[r].w >> 16));
        }
#pragma unroll
        for (int b = 0; b < B; b++) {
            const uint4 *p = (const uint4 *)(in.q + (u32)(row[b] * in.ld)) + 2 * c;
            const uint4 a0 = __ldg(p), a1 = __ldg(p + 1);
            const float as = __ldg(in.qs + (u32)(row[b] * (in.ld >> 5) + c));
#pragma unroll
            for (int r = 0; r < R; r++)
                acc[r * B + b] = fmaf((float)(dot16(lo[r], a0) + dot16(hi[r], a1)), as * ws[r],
                    acc[r * B + b]);
        }
    }
}

// BF16 and FP32: 8 and 4 columns a chunk, FP32 activations.
template <int R, int B>
__device__ inline void dot_bf16(float (&acc)[R * B], const u8 *w, size_t pitch, const In &in,
                                const int (&row)[B], int c, int step, int chunks) {
#pragma unroll 1
    for (; c < chunks; c += step) {
        uint4 v[R];
#pragma unroll
        for (int r = 0; r < R; r++) v[r] = load_stream(w + r * pitch + (size_t)c * 16);
#pragma unroll
        for (int b = 0; b < B; b++) {
            const float4 *p = (const float4 *)(in.x + (u32)(row[b] * in.ld)) + 2 * c;
            const float4 a = __ldg(p), d = __ldg(p + 1);
#pragma unroll
            for (int r = 0; r < R; r++) {
                float t = fmaf(lo_bf16(v[r].x), a.x, fmaf(hi_bf16(v[r].x), a.y, acc[r * B + b]));
                t = fmaf(lo_bf16(v[r].y), a.z, fmaf(hi_bf16(v[r].y), a.w, t));
                t = fmaf(lo_bf16(v[r].z), d.x, fmaf(hi_bf16(v[r].z), d.y, t));
                acc[r * B + b] = fmaf(lo_bf16(v[r].w), d.z, fmaf(hi_bf16(v[r].w), d.w, t));
            }
        }
    }
}

template <int R, int B>
__device__ inline void dot_f32(float (&acc)[R * B], const u8 *w, size_t pitch, const In &in,
                               const int (&row)[B], int c, int step, int chunks) {
#pragma unroll 1
    for (; c < chunks; c += step) {
#pragma unroll
        for (int r = 0; r < R; r++) {
            const uint4 v = load_stream(w + r * pitch + (size_t)c * 16);
#pragma unroll
            for (int b = 0; b < B; b++) {
                const float4 a = __ldg((const float4 *)(in.x + (u32)(row[b] * in.ld)) + c);
                float t = fmaf(__uint_as_float(v.x), a.x, fmaf(__uint_as_float(v.y), a.y,
                    acc[r * B + b]));
                acc[r * B + b] = fmaf(__uint_as_float(v.z), a.z, fmaf(__uint_as_float(v.w), a.w,
                    t));
            }
        }
    }
}

// FP8 (E4M3), 16 columns a chunk, decoded exactly, FP32 activations. s: one E8M0 byte per 128
// columns.
template <int R, int B>
__device__ inline void dot_fp8(float (&acc)[R * B], const u8 *w, size_t pitch, const u8 *s,
    const In &in,
                               const int (&row)[B], int c, int step, int chunks) {
#pragma unroll 1
    for (; c < chunks; c += step) {
        uint4 v[R];
        float sum[R][B] = {};
#pragma unroll
        for (int r = 0; r < R; r++) v[r] = load_stream(w + r * pitch + (size_t)c * 16);
        const float ws = e8m0_to_float(__ldg(s + (c >> 3)));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float4 a[B];
#pragma unroll
            for (int b = 0; b < B; b++) a[b] = __ldg((const float4 *)(in.x
                + (u32)(row[b] * in.ld)) + 4 * c + i);
#pragma unroll
            for (int r = 0; r < R; r++) {
                const u32 p = i == 0 ? v[r].x : i == 1 ? v[r].y : i == 2 ? v[r].z : v[r].w;
                const float w0 = e4m3_raw(p, 0) * E4M3_SCALE, w1 = e4m3_raw(p, 1) * E4M3_SCALE;
                const float w2 = e4m3_raw(p, 2) * E4M3_SCALE, w3 = e4m3_raw(p, 3) * E4M3_SCALE;
#pragma unroll
                for (int b = 0; b < B; b++)
                    sum[r][b] = fmaf(w3, a[b].w, fmaf(w2, a[b].z, fmaf(w1, a[b].y, fmaf(w0, a[b].x,
                        sum[r][b]))));
            }
        }
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int b = 0; b < B; b++) acc[r * B + b] = fmaf(sum[r][b], ws, acc[r * B + b]);
    }
}

// Rows n .. n+R-1 of m times B rows; one warp, or `ksplit` warps that each take a part k
// of the columns. The sums go to part[r * B + b]. FORMATS: those that m can have.
template <int FORMATS, int R, int B>
__device__ inline void dot_rows(float *part, const Matrix &m, int n, const In &in,
    const int (&row)[B],
                                int k, int ksplit) {
    const int lane = threadIdx.x & 31, c = k * 32 + lane, step = ksplit * 32;
    float acc[R * B] = {};
#define HAS(f) (FORMATS == 1 << (f) || ((FORMATS >> (f) & 1) && m.fmt == (f)))
    if (HAS(W_INT8)) {
        const u16 *s = (const u16 *)m.s + (size_t)(n / 128) * ((m.k + 127) / 128);
        dot_int8<R, B>(acc, m.w + (size_t)n * m.k, m.k, s, in, row, c, step, m.k / 16);
    } else if (HAS(W_INT4)) {
        const u16 *s = (const u16 *)m.s + (size_t)n * (m.k / 32);
        dot_int4<R, B>(acc, m.w + (size_t)n * (m.k / 2), m.k / 2, s, in, row, c, step, m.k / 32);
    } else if (HAS(W_FP4)) {
        const u8 *s = m.s + (size_t)n * (m.k / 32);
        dot_fp4<R, B>(acc, m.w + (size_t)n * (m.k / 2), m.k / 2, s, in, row, c, step, m.k / 32);
    } else if (HAS(W_FP8)) {
        const u8 *s = m.s + (size_t)(n / 128) * ((m.k + 127) / 128);
        dot_fp8<R, B>(acc, m.w + (size_t)n * m.k, m.k, s, in, row, c, step, m.k / 16);
    } else if (HAS(W_BF16)) {
        dot_bf16<R, B>(acc, m.w + (size_t)n * m.k * 2, (size_t)m.k * 2, in, row, c, step, m.k / 8);
    } else if (HAS(W_F32)) {
        dot_f32<R, B>(acc, m.w + (size_t)n * m.k * 4, (size_t)m.k * 4, in, row, c, step, m.k / 4);
    }
    const float v = reduce_many<R * B>(acc);
    if (lane % (32 / (R * B)) == 0) part[lane / (32 / (R * B))] = v;
}

// matmul() of dsv4.c for B rows from t0 on. A block makes 32 / ksplit consecutive outputs of one
// task for B rows: its 8 warps take 4 matrix rows each, or share them. Reads (32 / ksplit) * k
// weights, writes (32 / ksplit) * B results.
template <int FORMATS, int B>
__device__ inline void gemv_block(const Task *tasks, int n_tasks, int block, int t0, int T,
    const Row *rows,
                                  const u64 *slots) {
    constexpr int R = B > 2 ? 2 : 4;
    __shared__ float part[8][4 * B];
    int i = n_tasks - 1;
    while (i > 0 && block < tasks[i].block0) i--;
    const Task *t = tasks + i;
    const int warp = threadIdx.x >> 5, ksplit = t->ksplit, per = 32 / ksplit, seg_n = t->seg_n;
    const int seg = (block - t->block0) / t->seg_blocks,
        base = (block - t->block0 - seg * t->seg_blocks) * per;
    const int n = base + warp / ksplit * 4;
    const Matrix m = t->m;
    const In in = { t->x + (size_t)seg * m.k, t->q + (size_t)seg * m.k,
        t->qs + (size_t)seg * (m.k / 32), t->ldx };
    int row[B];
#pragma unroll
    for (int b = 0; b < B; b++) row[b] = t0 + b;
#pragma unroll 1
    for (int r = 0; r < 4 && n + r < seg_n; r += R)
        dot_rows<FORMATS, R, B>(part[warp] + r * B, m, seg * seg_n + n + r, in, row, warp % ksplit,
            ksplit);
    __syncthreads();
    const int j = threadIdx.x % per, b = threadIdx.x / per, row_t = t0 + b;
    if (b >= B || base + j >= seg_n || row_t >= T) return;
    float v = 0;
    for (int k = 0; k < ksplit; k++) v += part[j / 4 * ksplit + k][(j & 3) * B + b];
    const size_t at = (size_t)row_t * t->ldo + seg * seg_n + base + j;
    if (t->ring) {
        const Row r = rows[row_t];
        float *ring = (float *)(slots[r.slot] + t->ring_at + (u64)(r.pos % t->ring) * t->ring_step);
        ring[base + j] = v;
    } else if (t->out) {
        t->out[at] = v;
    }
    if (t->out_q) quantize1(v, t->out_q + at, t->out_s + at / 32);
}

// Blocks per multiprocessor that the registers must allow.
#define ROW_BLOCKS(B) ((B) > 1 ? 2 : DENSE >> W_FP8 ? 3 : 4)
#define EXPERT_BLOCKS(B) ((B) > 1 || ROUTED >> W_FP8 ? 2 : 4)
#define GEMV(B) \
extern "C" __global__ void __launch_bounds__(256, ROW_BLOCKS(B)) \
gemv_##B(const Task *tasks, int n_tasks, int T, const Row *rows, const u64 *slots) { \
    gemv_block<DENSE, B>(tasks, n_tasks, blockIdx.x, blockIdx.y * B, T, rows, slots); \
}
GEMV(1)
GEMV(2)
GEMV(4)
GEMV(8)

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

// Chunks of 16 bytes are moved inside a row so that what a warp reads at once lies in different
// banks.
template <int BYTES> __device__ inline int swizzle(int row, int chunk) {
    return BYTES == 32 ? chunk ^ (row >> 2 & 1) : BYTES == 64
        ? chunk ^ (row & 2) : chunk ^ (row & 1) * 4;
}

// Two matrices side by side: rows r < split of a tile are rows na + r of a, the others rows nb +
// r - split of b.
struct Pair { Matrix a, b; int na, nb, split; };

// The scale of column k of `columns` in a row; 0 past the end.
template <int FMT> __device__ inline float weight_scale(const u8 *s, int columns, int row, int k) {
    if (k >= columns) return 0;
    const size_t block = (size_t)(row / 128) * ((columns + 127) / 128) + k / 128,
        group = (size_t)row * (columns / 32) + k / 32;
    if (FMT == W_INT8) return bf16_to_float(((const u16 *)s)[block]);
    if (FMT == W_INT4) return bf16_to_float(((const u16 *)s)[group]) * 0.0625f;
    return FMT == W_FP4 ? e8m0_to_float(s[group]) * 0.25f : e8m0_to_float(s[block]);
}

__device__ inline void split_bf16(float a, float b, u32 &hi, u32 &lo) {
    hi = pack_bf16(a, b);
    lo = pack_bf16(a - lo_bf16(hi), b - hi_bf16(hi));
}

// Two groups of 32 columns of a warp's 32 x 32 part: exact integer sums of a group, scaled into
// acc. The sums start at 1.5 * 2^23 as bits of a float, so that subtracting it converts them.
template <int FMT>
__device__ inline void tile_step_int(float (&acc)[2][4][4], const u8 *stage, int rn, int rt, int g,
    int q, int count) {
    const u8 *act = stage + 8192;
    const float *as = (const float *)(stage + 12288), *ws = (const float *)(stage + 12800);
#pragma unroll
    for (int k = 0; k < 2; k++) {
        u32 a[2][4];
        float w[2][2];
#pragma unroll
        for (int i = 0; i < 4; i++) {               // rows g, g + 8 of two 16-row tiles
            const int r = rn + i * 8 + g, m = i >> 1, o = i & 1;
            if (FMT == W_INT8) {
                const uint2 v = *(const uint2 *)(stage + r * 64 + swizzle<64>(r,
                    k * 2 + (q >> 1)) * 16 + (q & 1) * 8);
                a[m][o] = v.x, a[m][o + 2] = v.y;
            } else {
                const u32 v = *(const u32 *)(stage + r * 32 + swizzle<32>(r, k) * 16 + q * 4);
                a[m][o] = FMT == W_FP4 ? fp4_bytes(v) : (v << 4 & 0xf0f0f0f0u) ^ 0x80808080u;
                a[m][o + 2] = FMT == W_FP4 ? fp4_bytes(v >> 16) : (v & 0xf0f0f0f0u) ^ 0x80808080u;
            }
            w[m][o] = ws[k * TILE_N + r];
        }
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const int t = rt + n * 8 + g;
            if (rt + n * 8 >= count) break;
            const uint2 v = *(const uint2 *)(act + t * 64 + swizzle<64>(t,
                k * 2 + (q >> 1)) * 16 + (q & 1) * 8);
            const u32 b0 = FMT == W_INT4 ? __byte_perm(v.x, v.y, 0x6420) : v.x;
            const u32 b1 = FMT == W_INT4 ? __byte_perm(v.x, v.y, 0x7531) : v.y;
            const float2 s = *(const float2 *)(as + k * TILE_T + rt + n * 8 + q * 2);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                int c[4] = { 0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000 };
                mma_int8(c, a[m][0], a[m][1], a[m][2], a[m][3], b0, b1);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    acc[m][n][i] = fmaf(__int_as_float(c[i]) - 12582912.f,
                        (i & 1 ? s.y : s.x) * w[m][i >> 1], acc[m][n][i]);
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
                const uint2 v = *(const uint2 *)(stage + r * 64 + swizzle<64>(r,
                    k * 2 + (q >> 1)) * 16 + (q & 1) * 8);
                a[m][o] = v.x, a[m][o + 2] = v.y;
            } else if (FMT == W_FP8) {
                const u32 v = *(const u32 *)(stage + r * 32 + swizzle<32>(r, k) * 16 + q * 4);
                const float s = ws[r];
                a[m][o] = pack_bf16(e4m3_raw(v, 0) * E4M3_SCALE * s, e4m3_raw(v,
                    1) * E4M3_SCALE * s);
                a[m][o + 2] = pack_bf16(e4m3_raw(v, 2) * E4M3_SCALE * s, e4m3_raw(v,
                    3) * E4M3_SCALE * s);
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
                if (FMT == W_F32) mma_bf16(acc[m][n], al[m][0], al[m][1], al[m][2], al[m][3], b0,
                    b1);
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
    constexpr int K = Step<FMT>::K, WB = Step<FMT>::WB, AB = Step<FMT>::AB,
        WN = TILE_N * WB / 4096, AN = TILE_T * AB / 4096;
    constexpr bool INTEGER = Step<FMT>::INTEGER;
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, k_all = p.a.k,
        steps = (k_all + K - 1) / K;
    const size_t pitch = (size_t)k_all * WB / K;
    const u8 *w_from[WN], *a_from[AN];
    u32 w_to[WN], a_to[AN];
#pragma unroll
    for (int i = 0; i < WN; i++) {
        const int r = (tid + i * 256) / (WB / 16), c = (tid + i * 256) % (WB / 16);
        const bool first = r < p.split;
        const int n = min(first ? p.na + r : p.nb + r - p.split, p.a.n - 1);
        w_from[i] = (first ? p.a.w : p.b.w) + n * pitch + c * 16;
        w_to[i] = r * WB + swizzle<WB>(r, c) * 16;
    }
#pragma unroll
    for (int i = 0; i < AN; i++) {
        const int t = (tid + i * 256) / (AB / 16), c = (tid + i * 256) % (AB / 16);
        a_from[i] = (INTEGER ? (const u8 *)in.q + (size_t)row[t] * in.ld
            : (const u8 *)(in.x + (size_t)row[t] * in.ld)) + c * 16;
        a_to[i] = 8192 + t * AB + swizzle<AB>(t, c) * 16;
    }
    const int sr = INTEGER ? tid >> 1 : tid & 127, sn = min(sr < p.split
        ? p.na + sr : p.nb + sr - p.split, p.a.n - 1);
    const u8 *scales = sr < p.split ? p.a.s : p.b.s;
    // returns this thread's weight scale, to be stored later
    auto load = [&](int step) -> float {
        const u32 to = shared_address(shared + step % STAGES * STAGE_BYTES);
#pragma unroll
        for (int i = 0; i < WN; i++) {
            const int c = (tid + i * 256) % (WB / 16);
            cp_async16(to + w_to[i], w_from[i] + (size_t)step * WB,
                (size_t)step * WB + c * 16 < pitch);
        }
#pragma unroll
        for (int i = 0; i < AN; i++) {
            const int c = (tid + i * 256) % (AB / 16);
            cp_async16(to + a_to[i], a_from[i] + (size_t)step * AB,
                step * AB + c * 16 < k_all * (AB / K));
        }
        if (INTEGER && tid < 2 * TILE_T) {
            const int group = step * 2 + (tid >> 6), t = tid & 63;
            const float *s = in.qs + (size_t)row[t] * (in.ld >> 5);
            cp_async4(to + 12288 + tid * 4, s + (group < k_all / 32 ? group : 0),
                group < k_all / 32);
        }
        if (INTEGER) return weight_scale<FMT>(scales, k_all, sn, step * K + (tid & 1) * 32);
        return FMT == W_FP8 ? weight_scale<FMT>(scales, k_all, sn, step * K) : 0;
    };
    auto store_scale = [&](int step, float s) {
        u8 *stage = shared + step % STAGES * STAGE_BYTES;
        if (INTEGER) ((float *)(stage + 12800))[(tid & 1) * TILE_N + sr] = s;
        else if (FMT == W_FP8 && tid < TILE_N) ((float *)(stage + 4096))[sr] = s;
    };
    float acc[2][4][4] = {};
    const int rn = (warp & 3) * 32, rt = (warp >> 2) * 32;
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < steps) store_scale(i, load(i));
        cp_async_commit();
    }
    for (int i = 0; i < steps; i++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        float s = 0;
        const bool more = i + STAGES - 1 < steps;
        if (more) s = load(i + STAGES - 1);
        cp_async_commit();
        const u8 *stage = shared + i % STAGES * STAGE_BYTES;
        if constexpr (INTEGER) tile_step_int<FMT>(acc, stage, rn, rt, lane >> 2, lane & 3, count);
        else tile_step_float<FMT>(acc, stage, rn, rt, lane >> 2, lane & 3, count);
        if (more) store_scale(i + STAGES - 1, s);
    }
    __syncthreads();
    float *out = (float *)shared;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                out[(rt + n * 8 + (lane & 3) * 2 + (i & 1)) * TILE_PITCH
                    + rn + m * 16 + (lane >> 2) + (i >> 1) * 8] = acc[m][n][i];
    __syncthreads();
}

template <int FORMATS>
__device__ inline void tile_any(const Pair &p, const In &in, const int *row, int count,
    u8 *shared) {
    const Matrix &m = p.a;
    if constexpr (FORMATS >> W_INT8 & 1) if (HAS(W_INT8)) tile_product<W_INT8>(p, in, row, count,
        shared);
    if constexpr (FORMATS >> W_INT4 & 1) if (HAS(W_INT4)) tile_product<W_INT4>(p, in, row, count,
        shared);
    if constexpr (FORMATS >> W_FP4 & 1) if (HAS(W_FP4)) tile_product<W_FP4>(p, in, row, count,
        shared);
    if constexpr (FORMATS >> W_FP8 & 1) if (HAS(W_FP8)) tile_product<W_FP8>(p, in, row, count,
        shared);
    if constexpr (FORMATS >> W_BF16 & 1) if (HAS(W_BF16)) tile_product<W_BF16>(p, in, row, count,
        shared);
    if constexpr (FORMATS >> W_F32 & 1) if (HAS(W_F32)) tile_product<W_F32>(p, in, row, count,
        shared);
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
            out = (float *)(slots[r.slot] + t->ring_at
                + (u64)(r.pos % t->ring) * t->ring_step) + base;
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
constexpr int HC_BLOCKS = (DIM + 63) / 64;

// hc_post() of the last sublayer and the first half of hc_pre() of the next. A block owns 64
// dims of all streams for 8 rows: X[k] = post[k] y + sum_j comb[j][k] X[j] (apply), then its
// share of fn . X and of the sum of squares goes to part[t, block, 32] (the squares at HC_N).
// Thread: 4 dims of one stream. Reads 256 S n_fn bytes of fn, X and y once.
extern "C" __global__ void __launch_bounds__(16 * STREAMS)
hc_mix(float *X, const float *y, const float *post, const float *comb, int apply, const float *fn,
    int n_fn,
       float *part, int T) {
    __shared__ float sums[(STREAMS + 1) / 2][32];
    const int s = threadIdx.x / 16, d = blockIdx.x * 64 + threadIdx.x % 16 * 4;
    const bool in = d < DIM;
    for (int t = blockIdx.y * 8; t < min(T, (int)blockIdx.y * 8 + 8); t++) {
        float *row = X + (size_t)t * STREAMS * DIM + d;
        float4 x = make_float4(0, 0, 0, 0);
        if (apply) {
            if (in) {
                const float4 v = *(const float4 *)(y + (size_t)t * DIM + d);
                const float p = post[t * STREAMS + s];
                x = make_float4(p * v.x, p * v.y, p * v.z, p * v.w);
                for (int j = 0; j < STREAMS; j++) {
                    const float4 u = *(const float4 *)(row + j * DIM);
                    const float c = comb[(t * STREAMS + j) * STREAMS + s];
                    x.x = fmaf(c, u.x, x.x), x.y = fmaf(c, u.y, x.y), x.z = fmaf(c, u.z, x.z),
                        x.w = fmaf(c, u.w, x.w);
                }
            }
            __syncthreads();
            if (in) *(float4 *)(row + s * DIM) = x;
        } else if (in) {
            x = *(const float4 *)(row + s * DIM);
        }
        if (!n_fn) continue;
        float v[32] = {};
        v[HC_N] = x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
#pragma unroll
        for (int i = 0; i < HC_N; i++) {
            if (i < n_fn && in) {
                const float4 f = __ldg((const float4 *)(fn + ((size_t)i * STREAMS + s) * DIM + d));
                v[i] = fmaf(f.x, x.x, fmaf(f.y, x.y, fmaf(f.z, x.z, f.w * x.w)));
            }
        }
        const float total = reduce_many<32>(v);
        __syncthreads();
        sums[threadIdx.x >> 5][threadIdx.x & 31] = total;
        __syncthreads();
        if (threadIdx.x < 32) {
            float sum = 0;
            for (int w = 0; w < STREAMS / 2; w++) sum += sums[w][threadIdx.x];
            part[((size_t)t * HC_BLOCKS + blockIdx.x) * 32 + threadIdx.x] = sum;
        }
    }
}

// sinkhorn() of dsv4.c on comb, lane j * S + k of one warp holding C[j][k].
__device__ inline float sinkhorn(float c) {
    float m = c;
    for (int i = 1; i < STREAMS; i <<= 1) m = fmaxf(m, __shfl_xor_sync(~0u, m, i));
    c = expf(c - m);
    for (int it = 0; it < HC_ITERS; it++) {
        float sum = c;
        for (int i = 1; i < STREAMS; i <<= 1) sum += __shfl_xor_sync(~0u, sum, i);
        c = it ? c / (sum + HC_EPS) : c / sum + HC_EPS;
        sum = c;
        for (int i = STREAMS; i < STREAMS * STREAMS; i <<= 1) sum += __shfl_xor_sync(~0u, sum, i);
        c = c / (sum + HC_EPS);
    }
    return c;
}

// The second half of hc_pre() (full) or hc_head(): one block per row adds up part[], makes pre,
// post and comb, mixes the streams, normalises with `norm` and quantises. Reads 4 S D bytes of
// X, writes x [D] in FP32 and INT8.
extern "C" __global__ void __launch_bounds__(256)
hc_norm(const float *X, const float *part, const float *base, const float *scale,
    const float *norm, int full,
        float *post, float *comb, float *x, s8 *q, float *qs, int *bad) {
    constexpr int PER = (DIM + 1023) / 1024;
    __shared__ float sums[8][32], pre[STREAMS], tmp[32];
    const int t = blockIdx.x, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    float v = 0;
    for (int b = warp; b < HC_BLOCKS; b += 8) v += part[((size_t)t * HC_BLOCKS + b) * 32 + lane];
    sums[warp][lane] = v;
    __syncthreads();
    if (warp == 0) {
        v = 0;
        for (int w = 0; w < 8; w++) v += sums[w][lane];
        const float mean = __shfl_sync(~0u, v, HC_N) / (STREAMS * DIM),
            r = 1.f / sqrtf(mean + NORM_EPS);
        if (!(mean <= 3.4e38f)) *bad = 1;
        const float mix = v * r;
        if (lane < STREAMS) pre[lane] = sigmoid(fmaf(mix, scale[0], base[lane])) + HC_EPS;
        if (full) {
            if (lane >= STREAMS && lane < 2 * STREAMS)
                post[t * STREAMS + lane - STREAMS] = 2.f * sigmoid(fmaf(mix, scale[1], base[lane]));
            float c = __shfl_sync(~0u, mix, (lane + 2 * STREAMS) & 31);
            const bool on = lane < STREAMS * STREAMS;
            c = sinkhorn(on ? fmaf(c, scale[2], base[2 * STREAMS + lane]) : 0.f);
            if (on) comb[t * STREAMS * STREAMS + lane] = c;
        }
        __syncwarp();
    }
    __syncthreads();
    float4 y[PER];
    float sq = 0;
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const int d = (i * 256 + threadIdx.x) * 4;
        y[i] = make_float4(0, 0, 0, 0);
        if (d >= DIM) continue;
        for (int s = 0; s < STREAMS; s++) {
            const float4 u = *(const float4 *)(X + ((size_t)t * STREAMS + s) * DIM + d);
            const float p = pre[s];
            y[i] = make_float4(fmaf(p, u.x, y[i].x), fmaf(p, u.y, y[i].y), fmaf(p, u.z, y[i].z),
                fmaf(p, u.w, y[i].w));
        }
        sq = fmaf(y[i].x, y[i].x, fmaf(y[i].y, y[i].y, fmaf(y[i].z, y[i].z, fmaf(y[i].w, y[i].w,
            sq))));
    }
    const float r = 1.f / sqrtf(block_sum(sq, tmp) / DIM + NORM_EPS);
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const int d = (i * 256 + threadIdx.x) * 4;
        const size_t at = (size_t)t * DIM + d;
        const bool in = d < DIM;
        if (in) {
            const float4 w = *(const float4 *)(norm + d);
            y[i] = make_float4(y[i].x * r * w.x, y[i].y * r * w.y, y[i].z * r * w.z,
                y[i].w * r * w.w);
            *(float4 *)(x + at) = y[i];
        }
        quantize4(y[i], q + at, qs + at / 32, in);
    }
}

// ---------------------------------------------------------------------------
// attention: latents, compressor, queries

// rms() of dsv4.c over N values held 4 per thread and step by 256 threads.
template <int N>
__device__ inline void rms_row(float4 *v, const float *norm, float *tmp) {
    constexpr int PER = (N + 1023) / 1024;
    float sq = 0;
#pragma unroll
    for (int i = 0; i < PER; i++)
        sq = fmaf(v[i].x, v[i].x, fmaf(v[i].y, v[i].y, fmaf(v[i].z, v[i].z, fmaf(v[i].w, v[i].w,
            sq))));
    const float r = 1.f / sqrtf(block_sum(sq, tmp) / N + NORM_EPS);
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const int d = (i * 256 + threadIdx.x) * 4;
        if (d >= N) continue;
        const float4 w = *(const float4 *)(norm + d);
        v[i] = make_float4(v[i].x * r * w.x, v[i].y * r * w.y, v[i].z * r * w.z, v[i].w * r * w.w);
    }
}

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
        float4 m = make_float4(MINUS_INF, MINUS_INF, MINUS_INF, MINUS_INF), l = make_float4(0, 0,
            0, 0), o = l;
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
                    m = make_float4(fmaxf(m.x, g.x), fmaxf(m.y, g.y), fmaxf(m.z, g.z), fmaxf(m.w,
                        g.w));
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
    const float *kv_norm, const Row *rows,
            const u64 *slots, u64 win_at, int ring, const float *inv_freq, Pool comp, Pool icomp) {
    __shared__ float tmp[32];
    const int t = blockIdx.x, role = blockIdx.y;
    const Row row = rows[t];
    const u64 cache = slots[row.slot];
    if (role == 0) {
        constexpr int PER = (Q_RANK + 1023) / 1024;
        float4 v[PER];
#pragma unroll
        for (int i = 0; i < PER; i++) {
            const int d = (i * 256 + threadIdx.x) * 4;
            v[i] = d < Q_RANK ? *(const float4 *)(qr + (size_t)t * Q_RANK + d) : make_float4(0, 0,
                0, 0);
        }
        rms_row<Q_RANK>(v, q_norm, tmp);
#pragma unroll
        for (int i = 0; i < PER; i++) {
            const int d = (i * 256 + threadIdx.x) * 4;
            const size_t at = (size_t)t * Q_RANK + d;
            if (d < Q_RANK) *(float4 *)(qr + at) = v[i];
            quantize4(v[i], q + at, qs + at / 32, d < Q_RANK);
        }
    } else if (role == 1) {
        constexpr int PER = (HEAD_DIM + 1023) / 1024;
        float4 v[PER];
#pragma unroll
        for (int i = 0; i < PER; i++) {
            const int d = (i * 256 + threadIdx.x) * 4;
            v[i] = d < HEAD_DIM ? *(const float4 *)(kv + (size_t)t * HEAD_DIM + d) : make_float4(0,
                0, 0, 0);
        }
        rms_row<HEAD_DIM>(v, kv_norm, tmp);
        store_row<HEAD_DIM>(v, (u16 *)(cache + win_at) + (size_t)(row.pos % ring) * HEAD_DIM,
            row.pos, inv_freq);
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
        sq = fmaf(v[i].x, v[i].x, fmaf(v[i].y, v[i].y, fmaf(v[i].z, v[i].z, fmaf(v[i].w, v[i].w,
            sq))));
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
extern "C" __global__ void __launch_bounds__(128)
index_scores(const u16 *iqh, const float *wt, const Row *rows, const u64 *slots, u64 keys_at,
    int t0, float *scores,
             size_t ld) {
    constexpr int CHUNKS = INDEX_DIM / 32, PITCH = INDEX_DIM / 8 + 4, TILES = (INDEX_HEADS + 7) / 8;
    // [head][16-byte chunks], the pad keeps 8 lanes on 32 banks
    __shared__ uint4 qs[TILES * 8 * PITCH];
    __shared__ float ws[TILES * 8];
    const int t = t0 + blockIdx.y, n = (rows[t].pos + 1) / 4, first = blockIdx.x * SCORE_KEYS;
    if (n <= INDEX_TOPK || first >= n) return;
    for (int i = threadIdx.x; i < TILES * 8 * (INDEX_DIM / 8); i += blockDim.x) {
        const int h = i / (INDEX_DIM / 8), c = i % (INDEX_DIM / 8);
        const uint4 *q = (const uint4 *)(iqh + (size_t)t * INDEX_HEADS * INDEX_DIM);
        qs[h * PITCH + c] = h < INDEX_HEADS ? q[i] : make_uint4(0, 0, 0, 0);
    }
    for (int h = threadIdx.x; h < TILES * 8; h += blockDim.x)
        ws[h] = h < INDEX_HEADS ? wt[(size_t)t * INDEX_HEADS + h] : 0;
    const int lane = threadIdx.x & 31, g = lane >> 2, q4 = lane & 3,
        key = first + (threadIdx.x >> 5) * 32;
    const uint4 *keys = (const uint4 *)(slots[rows[t].slot] + keys_at);
    uint4 a[4][CHUNKS];             // key rows g, g + 8, g + 16, g + 24 of this warp
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
            a[i][c] = load_stream(keys + (size_t)min(key + g + 8 * i,
                n - 1) * (INDEX_DIM / 8) + c * 4 + q4);
    __syncthreads();
    float sum[4] = {};
    for (int j = 0; j < TILES; j++) {
        float acc[2][4] = {};
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            const uint4 b = qs[(j * 8 + g) * PITCH + c * 4 + q4];
#pragma unroll
            for (int m = 0; m < 2; m++) {
                mma_bf16(acc[m], a[2 * m][c].x, a[2 * m + 1][c].x, a[2 * m][c].y,
                    a[2 * m + 1][c].y, b.x, b.y);
                mma_bf16(acc[m], a[2 * m][c].z, a[2 * m + 1][c].z, a[2 * m][c].w,
                    a[2 * m + 1][c].w, b.z, b.w);
            }
        }
        const float w0 = ws[j * 8 + 2 * q4], w1 = ws[j * 8 + 2 * q4 + 1];
#pragma unroll
        for (int i = 0; i < 4; i++)
            sum[i] = fmaf(w0, relu(acc[i >> 1][(i & 1) * 2]), fmaf(w1,
                relu(acc[i >> 1][(i & 1) * 2 + 1]), sum[i]));
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

// Inclusive prefix sum over 1024 threads; tmp holds 32 ints.
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
template <class Take>
__device__ inline void top_k(const float *s, int n, Take take) {
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
        const u32 g = __ballot_sync(~0u, i < hi && k > prefix), e = __ballot_sync(~0u, i < hi
            && k == prefix);
        const int rank = eq + __popc(e & less);
        if (g >> lane & 1 || (e >> lane & 1 && rank < need)) take(gt + __popc(g & less) + min(rank,
            need), i);
        gt += __popc(g), eq += __popc(e);
    }
}

// index_topk() of dsv4.c, first level of a long context: block (slab of keys, row) keeps the
// best INDEX_TOPK of its slab with their scores, so that the second level has little to read.
// What a slab drops, the whole would drop as well.
extern "C" __global__ void __launch_bounds__(1024)
index_slab(const float *scores, size_t ld, const Row *rows, int t0, int slab, float *best,
    int *best_key, size_t best_ld) {
    const int n = (rows[t0 + blockIdx.y].pos + 1) / 4, first = blockIdx.x * slab, count = min(slab,
        n - first);
    const float *s = scores + (size_t)blockIdx.y * ld + first;
    const size_t to = (size_t)blockIdx.y * best_ld + (size_t)blockIdx.x * INDEX_TOPK;
    if (count <= 0) return;
    if (count <= INDEX_TOPK) {
        for (int i = threadIdx.x; i < count; i += 1024) best[to + i] = s[i],
            best_key[to + i] = first + i;
        return;
    }
    top_k(s, count, [&](int place, int i) { best[to + place] = s[i],
        best_key[to + place] = first + i; });
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
constexpr int ATT_TILES = HEADS > 16 ? 2 : 1;           // 16 heads each
constexpr int ATT_HEADS = ATT_TILES * 16, ATT_STAGES = 3;

// What row t attends to, and how it is split: `len` keys for each of `splits` blocks.
struct Span { int window, total, len, splits; };
__device__ inline Span attention_span(int pos, int ratio, int max_splits) {
    Span s;
    s.window = min(WINDOW, pos + 1);
    const int visible = ratio ? (pos + 1) / ratio : 0;
    s.total = s.window + (ratio == 4 ? min(visible, INDEX_TOPK) : visible);
    s.len = max_splits == 1 ? s.total : max(32, ((s.total
        + max_splits - 1) / max_splits + 15) & ~15);
    s.splits = (s.total + s.len - 1) / s.len;
    return s;
}

__device__ inline void ldmatrix4(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
__device__ inline void ldmatrix4_trans(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// attend() of dsv4.c, one part of the keys: block (split, 32 heads, row t). Warp w holds columns
// 64 w .. 64 w + 63 of the queries in registers and streams the same columns of the keys, which
// are the values too, through its own ring of three tiles of 16 keys. Per tile: partial scores
// meet in shared memory, softmax by all threads, P (BF16) back through shared memory, O += P V.
// Reads 1 KB per key; writes unnormalised O [heads, K], maximum and sum in FP32.
extern "C" __global__ void __launch_bounds__(32 * ATT_WARPS)
attend(const u16 *qh, const Row *rows, const u64 *slots, u64 win_at, int ring, u64 comp_at,
    int ratio,
       const int *chosen, int max_splits, float *o_part, float2 *ml_part) {
    extern __shared__ __align__(128) u8 shared[];
    const int split = blockIdx.x, h0 = blockIdx.y * ATT_HEADS, t = blockIdx.z, pos = rows[t].pos;
    const Span span = attention_span(pos, ratio, max_splits);
    if (split >= span.splits) return;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, q4 = lane & 3;
    u8 *tiles = shared + warp * (ATT_STAGES * 2048);
    // [warp][head][16 keys]
    float *s_part = (float *)(shared + ATT_WARPS * ATT_STAGES * 2048);
    // [head][8 pairs of keys, pitch 12]
    u32 *p_tile = (u32 *)(s_part + ATT_WARPS * ATT_HEADS * 16);
    float *m_row = (float *)(p_tile + ATT_HEADS * 12), *l_row = m_row + ATT_HEADS,
        *alpha = l_row + ATT_HEADS;
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
                                  : comp + (size_t)(all
                                      ? c : chosen[(size_t)t * INDEX_TOPK + c]) * (HEAD_DIM * 2);
            const bool valid = col < HEAD_DIM && tile * 16 + k < count;
            cp_async16(to + k * 128 + (((lane & 7) ^ (k & 7)) << 4), row + (valid ? col * 2 : 0),
                valid);
        }
    };
    u32 qa[ATT_TILES][4][4];                // A fragments of the queries
#pragma unroll
    for (int m = 0; m < ATT_TILES; m++)
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int h = h0 + m * 16 + g + (i & 1) * 8,
                    d = warp * 64 + k * 16 + (i >> 1) * 8 + q4 * 2;
                qa[m][k][i] = h < HEADS && d < HEAD_DIM
                                  ? *(const u32 *)(qh + ((size_t)t * HEADS + h) * HEAD_DIM + d) : 0;
            }
    float o[ATT_TILES][8][4] = {};
    for (int h = threadIdx.x; h < ATT_HEADS; h += blockDim.x) m_row[h] = MINUS_INF, l_row[h] = 0;
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
        float s[ATT_TILES][2][4] = {};
#pragma unroll
        for (int k = 0; k < 4; k++) {
            u32 b[4];
            const int key = (lane >> 4) * 8 + (lane & 7), chunk = k * 2 + (lane >> 3 & 1);
            ldmatrix4(b, at + key * 128 + ((chunk ^ (key & 7)) << 4));
#pragma unroll
            for (int m = 0; m < ATT_TILES; m++) {
                mma_bf16(s[m][0], qa[m][k][0], qa[m][k][1], qa[m][k][2], qa[m][k][3], b[0], b[1]);
                mma_bf16(s[m][1], qa[m][k][0], qa[m][k][1], qa[m][k][2], qa[m][k][3], b[2], b[3]);
            }
        }
#pragma unroll
        for (int m = 0; m < ATT_TILES; m++)
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int h = m * 16 + g + r * 8;
                    *(float2 *)(s_part + (warp * ATT_HEADS
                        + h) * 16 + (j ^ (h >> 1 & 1)) * 8 + q4 * 2)
                        = make_float2(s[m][j][r * 2], s[m][j][r * 2 + 1]);
                }
        __syncthreads();
        // 8 lanes per head, 2 keys each
        for (int h = threadIdx.x >> 3; h < ATT_HEADS; h += ATT_WARPS * 4) {
            const int j = threadIdx.x & 7, at2 = h * 16
                + ((j >> 2) ^ (h >> 1 & 1)) * 8 + (j & 3) * 2;
            float s0 = 0, s1 = 0;
#pragma unroll
            for (int w = 0; w < ATT_WARPS; w++) {
                const float2 v = *(const float2 *)(s_part + w * ATT_HEADS * 16 + at2);
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
        u32 pa[ATT_TILES][4];
#pragma unroll
        for (int m = 0; m < ATT_TILES; m++) {
            const u32 *p = p_tile + (m * 16 + g) * 12 + q4;
            pa[m][0] = p[0], pa[m][1] = p[8 * 12], pa[m][2] = p[4], pa[m][3] = p[8 * 12 + 4];
            const float a0 = alpha[m * 16 + g], a1 = alpha[m * 16 + g + 8];
            if (__any_sync(~0u, a0 != 1.f || a1 != 1.f)) {
#pragma unroll
                for (int j = 0; j < 8; j++) o[m][j][0] *= a0, o[m][j][1] *= a0, o[m][j][2] *= a1,
                    o[m][j][3] *= a1;
            }
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 b[4];
            const int key = (lane >> 3 & 1) * 8 + (lane & 7), chunk = j * 2 + (lane >> 4);
            ldmatrix4_trans(b, at + key * 128 + ((chunk ^ (key & 7)) << 4));
#pragma unroll
            for (int m = 0; m < ATT_TILES; m++) {
                mma_bf16(o[m][j * 2], pa[m][0], pa[m][1], pa[m][2], pa[m][3], b[0], b[1]);
                mma_bf16(o[m][j * 2 + 1], pa[m][0], pa[m][1], pa[m][2], pa[m][3], b[2], b[3]);
            }
        }
    }
    const size_t part = (size_t)t * max_splits + split;
    for (int h = threadIdx.x; h < ATT_HEADS; h += blockDim.x)
        if (h0 + h < HEADS) ml_part[part * HEADS + h0 + h] = make_float2(m_row[h], l_row[h]);
#pragma unroll
    for (int m = 0; m < ATT_TILES; m++)
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int h = h0 + m * 16 + g + r * 8, d = warp * 64 + j * 8 + q4 * 2;
                if (h < HEADS && d < HEAD_DIM)
                    *(float2 *)(o_part + (part * HEADS
                        + h) * HEAD_DIM + d) = make_float2(o[m][j][r * 2], o[m][j][r * 2 + 1]);
            }
}

// The second half of attend(): block (head, row t) adds the splits, divides by the sum with the
// sink, turns the last dims back and quantises. Reads splits * K floats, writes K values as INT8
// (and FP32 if x is not NULL).
extern "C" __global__ void __launch_bounds__((HEAD_DIM / 4 + 31) & ~31)
attend_combine(const float *o_part, const float2 *ml_part, const Row *rows, int ratio,
    int max_splits,
               const float *attn_sink, const float *inv_freq, float *x, s8 *q, float *qs) {
    const int h = blockIdx.x, t = blockIdx.y, d = threadIdx.x * 4, pos = rows[t].pos;
    const int splits = attention_span(pos, ratio, max_splits).splits;
    const float sink = attn_sink[h];
    float m = sink;
    for (int i = 0; i < splits; i++) m = fmaxf(m, ml_part[((size_t)t * max_splits
        + i) * HEADS + h].x);
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
__device__ inline bool route_row(const float *z, const float *bias, const long long *given,
    int &id, float &weight) {
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

// route() for more than one row: a warp per row; up to 8 rows are also sorted by expert here.
// Reads E scores a row.
extern "C" __global__ void __launch_bounds__(256)
route(const float *z, const float *bias, const long long *tid2eid, const Row *rows, int T,
    Routing out) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, t = blockIdx.x * 8 + warp;
    if (t < T) {
        int id;
        float weight;
        const long long *given = tid2eid ? tid2eid + (size_t)rows[t].token * ACTIVE : 0;
        if (!route_row(z + (size_t)t * EXPERTS, bias, given, id, weight) && lane == 0) *out.bad = 1;
        if (lane < ACTIVE) out.ids[t * ACTIVE + lane] = id, out.weights[t * ACTIVE + lane] = weight;
    }
    if (T > 8) return;                  // a long batch is sorted by group_rows
    __shared__ int ids[8 * ACTIVE];
    __syncthreads();
    const int n = T * ACTIVE, p = threadIdx.x;
    if (p < n) ids[p] = out.ids[p];
    __syncthreads();
    for (int e = p; e <= EXPERTS; e += 256) {
        int before = 0;
        for (int j = 0; j < n; j++) before += ids[j] < e;
        out.start[e] = before;
    }
    if (p < n) {
        int at = 0, rank = 0;
        bool first = true;
        for (int j = 0; j < n; j++) {
            at += ids[j] < ids[p] || (ids[j] == ids[p] && j < p);
            bool repeated = false;
            for (int k = 0; k < j; k++) repeated = repeated || ids[k] == ids[j];
            rank += !repeated && ids[j] < ids[p];
            first = first && !(j < p && ids[j] == ids[p]);
        }
        out.order[at] = p, out.place[p] = at;
        if (first) out.active[rank] = ids[p];
    }
    if (p == 0) {
        int distinct = 0;
        for (int j = 0; j < n; j++) {
            bool repeated = false;
            for (int k = 0; k < j; k++) repeated = repeated || ids[k] == ids[j];
            distinct += !repeated;
        }
        *out.n_active = distinct;
    }
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

// Rows n0 .. n0+31 of w1 and w3 for `count` <= B activation rows; hidden row i goes to out row
// place + i.
template <int FORMATS, int B>
__device__ inline void up_rows(float (*part)[8][36], const Matrix &w1, const Matrix &w3, int n0,
    const In &in,
                               const int (&row)[B], int count, const float *weights, Hidden out,
                                   int place) {
    constexpr int R = B > 2 ? 2 : 4;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll 1
    for (int r = 0; r < 4; r += R) {
        dot_rows<FORMATS, R, B>(part[0][warp] + r * B, w1, n0 + warp * 4 + r, in, row, 0, 1);
        dot_rows<FORMATS, R, B>(part[1][warp] + r * B, w3, n0 + warp * 4 + r, in, row, 0, 1);
    }
    __syncthreads();
    if (warp >= count) return;
    const int at = (lane & 3) * B + warp;
    const float h = swiglu(part[0][lane >> 2][at], part[1][lane >> 2][at],
        weights ? weights[warp] : 1.f);
    const size_t to = (size_t)(place + warp) * EXPERT_DIM + n0 + lane;
    if (out.x) out.x[to] = h;
    quantize1(h, out.q + to, out.s + to / 32);
}

// The first half of experts() for one row: block (32 hidden rows, slot). Every block routes the
// row for itself: that takes less time than a kernel in between.
extern "C" __global__ void __launch_bounds__(256, EXPERT_BLOCKS(1))
expert_up_1(const Matrix *experts, const float *x, const s8 *q, const float *qs, const float *z,
    const float *bias,
            const long long *tid2eid, const Row *rows, Routing r, Hidden out) {
    __shared__ float part[2][8][36], weight;
    __shared__ int expert;
    const int slot = blockIdx.y, lane = threadIdx.x & 31;
    if (threadIdx.x < 32) {
        int id;
        float w;
        const bool finite = route_row(z, bias, tid2eid
            ? tid2eid + (size_t)rows[0].token * ACTIVE : 0, id, w);
        if (lane == slot) expert = id, weight = w;
        if (blockIdx.x == 0 && lane == slot) r.ids[slot] = id, r.weights[slot] = w;
        if (blockIdx.x == 0 && !finite) *r.bad = 1;
        __syncwarp();
    }
    __syncthreads();
    const In in = { x, q, qs, DIM };
    const int row[1] = { 0 };
    up_rows<ROUTED, 1>(part, experts[expert * 3], experts[expert * 3 + 2], blockIdx.x * 32, in,
        row, 1, &weight, out, slot);
}

// The same for 2 to 8 rows: block (32 hidden rows, n-th active expert). An expert's weights are
// read once for all its rows.
extern "C" __global__ void __launch_bounds__(256, 2)
expert_up_8(const Matrix *experts, const float *x, const s8 *q, const float *qs, Routing r,
    Hidden out) {
    __shared__ float part[2][8][36], weights[8];
    if (blockIdx.y >= *r.n_active) return;
    const int e = r.active[blockIdx.y], place = r.start[e], count = r.start[e + 1] - place,
        n0 = blockIdx.x * 32;
    const Matrix w1 = experts[e * 3], w3 = experts[e * 3 + 2];
    const In in = { x, q, qs, DIM };
    int row[8];
#pragma unroll
    for (int b = 0; b < 8; b++) row[b] = r.order[place + min(b, count - 1)] / ACTIVE;
    if (threadIdx.x < count) weights[threadIdx.x] = r.weights[r.order[place + threadIdx.x]];
    if (count == 1) {
        const int one[1] = { row[0] };
        up_rows<ROUTED, 1>(part, w1, w3, n0, in, one, count, weights, out, place);
    } else if (count == 2) {
        const int two[2] = { row[0], row[1] };
        up_rows<ROUTED, 2>(part, w1, w3, n0, in, two, count, weights, out, place);
    } else if (count <= 4) {
        const int four[4] = { row[0], row[1], row[2], row[3] };
        up_rows<ROUTED, 4>(part, w1, w3, n0, in, four, count, weights, out, place);
    } else {
        up_rows<ROUTED, 8>(part, w1, w3, n0, in, row, count, weights, out, place);
    }
}

// The router's scores and the shared expert's first half, which need the same input: the first
// `up` blocks make 32 hidden rows each, the others are gemv blocks of the gate.
#define FFN_IN(B) \
extern "C" __global__ void __launch_bounds__(256, ROW_BLOCKS(B)) \
ffn_in_##B(const Matrix *shared, const Task *gate, int t0, int T, Hidden out, int place) { \
    constexpr int up = EXPERT_DIM / 32; \
    __shared__ float part[2][8][36]; \
    if (blockIdx.x >= up) { \
        gemv_block<GATE, B>(gate, 1, blockIdx.x - up, t0, T, 0, 0); \
        return; \
    } \
    const In in = { gate->x, gate->q, gate->qs, DIM }; \
    int row[B]; \
    for (int b = 0; b < B; b++) row[b] = t0 + b; \
    up_rows<SHARED, B>(part, shared[0], shared[2], blockIdx.x * 32, in, row, min(B, T - t0), 0, out, place); \
}
FFN_IN(1)
FFN_IN(2)
FFN_IN(4)
FFN_IN(8)

// `count` <= B hidden rows from `place` on times rows n .. n+7 of w2: part[place + b][8].
template <int FORMATS, int B>
__device__ inline void down_rows(float *part, float *tmp, const Matrix &w2, int n, const In &in,
    int place, int count) {
    constexpr int R = B > 2 ? 2 : 4;
    const int lane = threadIdx.x & 31;
    int row[B];
#pragma unroll
    for (int b = 0; b < B; b++) row[b] = place + min(b, count - 1);
#pragma unroll 1
    for (int r = 0; r < 8; r += R) {
        dot_rows<FORMATS, R, B>(tmp, w2, n + r, in, row, 0, 1);
        __syncwarp();
        if (lane < R * count) part[(place + lane / R) * 8
            + r + lane % R] = tmp[lane % R * B + lane / R];
        __syncwarp();
    }
}

// The second half of experts(): block = 8 rows of y for the whole batch. A warp takes one active
// expert (or the shared one, the last) after the other, all its rows at once; then every y[t, n]
// is the sum over the row's slots in order plus the shared.
template <int MAX>
__device__ inline void expert_down_block(const Matrix *experts, Hidden h, const Routing &r, int T,
    float *y) {
    __shared__ float part[MAX * (ACTIVE + 1) * 8], tmp[8][32];
    const int warp = threadIdx.x >> 5, n = blockIdx.x * 8,
        sources = (MAX == 1 ? ACTIVE : *r.n_active) + 1;
    const In in = { h.x, h.q, h.s, EXPERT_DIM };
    for (int i = warp; i < sources; i += 8) {
        const bool routed = i < sources - 1;
        // one row: in the order of its slots
        const int e = !routed ? EXPERTS : MAX == 1 ? r.ids[i] : r.active[i];
        const int place = !routed ? T * ACTIVE : MAX == 1 ? i : r.start[e], count = routed
            && MAX > 1 ? r.start[e + 1] - place : T;
        const Matrix w2 = experts[e * 3 + 1];
        if (MAX == 1 || count == 1) down_rows<SHARED | ROUTED, 1>(part, tmp[warp], w2, n, in,
            place, count);
        else if (count == 2) down_rows<SHARED | ROUTED, 2>(part, tmp[warp], w2, n, in, place,
            count);
        else if (count <= 4) down_rows<SHARED | ROUTED, 4>(part, tmp[warp], w2, n, in, place,
            count);
        else down_rows<SHARED | ROUTED, 8>(part, tmp[warp], w2, n, in, place, count);
    }
    __syncthreads();
    const int t = threadIdx.x / 8, j = threadIdx.x % 8;
    if (t >= T || n + j >= DIM) return;
    float v = 0;
    for (int slot = 0; slot < ACTIVE; slot++) v += part[(MAX == 1
        ? slot : r.place[t * ACTIVE + slot]) * 8 + j];
    y[(size_t)t * DIM + n + j] = v + part[(T * ACTIVE + t) * 8 + j];
}

#define EXPERT_DOWN(B) \
extern "C" __global__ void __launch_bounds__(256, EXPERT_BLOCKS(B)) \
expert_down_##B(const Matrix *experts, Hidden h, Routing r, int T, float *y) { \
    expert_down_block<B>(experts, h, r, T, y); \
}
EXPERT_DOWN(1)
EXPERT_DOWN(8)

// ---------------------------------------------------------------------------
// mixture of experts, more than 8 rows

// group_experts() of dsv4.c in one block, a thread per expert: sorts the pairs by expert,
// stable, and cuts them (and the shared expert's rows after them) into tiles of 64 places.
extern "C" __global__ void __launch_bounds__(1024)
group_rows(int T, Routing r) {
    __shared__ int ids[1024], tmp[32], total;
    const int e = threadIdx.x, n = T * ACTIVE;
    int start = 0, at = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int base = 0; base < n; base += 1024) {
            __syncthreads();
            if (base + e < n) ids[e] = r.ids[base + e];
            __syncthreads();
            for (int j = 0; j < min(1024, n - base); j++) {
                if (ids[j] != e) continue;
                if (pass) r.order[at] = base + j, r.place[base + j] = at;
                at++;
            }
        }
        if (pass) continue;
        start = block_scan(at, tmp) - at;
        const int count = at, tiles = (count + TILE_T - 1) / TILE_T, first = block_scan(tiles,
            tmp) - tiles;
        if (e == 1023) total = first + tiles;
        for (int i = 0; i < tiles; i++)
            r.tiles[first + i] = make_int4(e, start + i * TILE_T, min(TILE_T, count - i * TILE_T),
                0);
        at = start;
    }
    __syncthreads();
    const int shared = (T + TILE_T - 1) / TILE_T;
    for (int i = e; i < shared; i += 1024)
        r.tiles[total + i] = make_int4(EXPERTS, n + i * TILE_T, min(TILE_T, T - i * TILE_T), 0);
    if (e == 0) *r.n_tiles = total + shared;
}

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
            contribution[(size_t)(tile.y + j) * DIM + n0
                + n] = ((const float *)shared)[j * TILE_PITCH + n];
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
    float4 v[PER];
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const int d = (i * 256 + threadIdx.x) * 4;
        v[i] = make_float4(0, 0, 0, 0);
        if (d >= DIM) continue;
        if (s < STREAMS) {
            v[i] = *(const float4 *)(X + ((size_t)t * STREAMS + s) * DIM + d);
        } else {
            const int id = rows[t].next;
            v[i] = make_float4(embedding(table, wide, id, d), embedding(table, wide, id, d + 1),
                               embedding(table, wide, id, d + 2), embedding(table, wide, id,
                                   d + 3));
        }
    }
    rms_row<DIM>(v, s < STREAMS ? hnorm : enorm, tmp);
    float *to = s < STREAMS ? h + ((size_t)t * STREAMS + s) * DIM : e + (size_t)t * DIM;
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const int d = (i * 256 + threadIdx.x) * 4;
        if (d < DIM) *(float4 *)(to + d) = v[i];
    }
}

// X[t, s] = (h_proj part)[t, s] + (e_proj part)[t].
extern "C" __global__ void __launch_bounds__(256)
mtp_add(float *X, const float *e) {
    const int t = blockIdx.x / STREAMS;
    for (int d = threadIdx.x; d < DIM; d += 256) X[(size_t)blockIdx.x * DIM
        + d] += e[(size_t)t * DIM + d];
}

// Rows want[i] of x to rows i of out, for the head.
extern "C" __global__ void __launch_bounds__(256)
gather_rows(const float *x, const int *want, float *out) {
    for (int d = threadIdx.x; d < DIM; d += 256)
        out[(size_t)blockIdx.x * DIM + d] = x[(size_t)want[blockIdx.x] * DIM + d];
}
