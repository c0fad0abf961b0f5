/* exec_alu.c: arithmetic and logic on registers: integers, f32, f64, predicates, moves.
 *
 * A handler computes all 32 lanes into `out`; the warp loop keeps those of active lanes. 16-bit
 * values fill the low half of a 32-bit lane, the high half is zero. NaN results are the canonical
 * NaN, as on hardware. */
#include "ptx.h"

#include <immintrin.h>
#include <math.h>

#define HANDLER(name) static void name(Warp *w, const Inst *i, void *out)
#define OPERANDS(T)                                                                               \
    const T *a = src(w, i, 0), *b = src(w, i, 1), *c = src(w, i, 2);                              \
    T *d = out;                                                                                   \
    (void)b, (void)c

/* x, y, z: the lane's operands; T: their type and the result's. */
#define ALU(name, T, expression)                                                                  \
    HANDLER(name)                                                                                 \
    {                                                                                             \
        OPERANDS(T);                                                                              \
        LANES {                                                                                   \
            T x = a[l], y = b[l], z = c[l];                                                       \
            (void)x, (void)y, (void)z;                                                            \
            d[l] = (T)(expression);                                                               \
        }                                                                                         \
    }

/* The same for 16-bit types. */
#define ALU16(name, T, expression)                                                                \
    HANDLER(name)                                                                                 \
    {                                                                                             \
        OPERANDS(u32);                                                                            \
        LANES {                                                                                   \
            T x = (T)a[l], y = (T)b[l], z = (T)c[l];                                              \
            (void)x, (void)y, (void)z;                                                            \
            d[l] = (u16)(expression);                                                             \
        }                                                                                         \
    }

/* Sources of type T, results of type R. */
#define WIDEN(name, T, R, expression)                                                             \
    HANDLER(name)                                                                                 \
    {                                                                                             \
        OPERANDS(T);                                                                              \
        const R *e = src(w, i, 2);                                                                \
        R *r = (R *)(void *)d;                                                                    \
        (void)e;                                                                                  \
        LANES {                                                                                   \
            R x = (R)a[l], y = (R)b[l], z = e[l];                                                 \
            (void)y, (void)z;                                                                     \
            r[l] = (R)(expression);                                                               \
        }                                                                                         \
    }

typedef __int128 s128;
typedef unsigned __int128 u128;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;

/* ------------------------------------------------------------------------------------------------
 * integers */

/* One expression for all sizes, where the sign does not matter; for all types, where it does. */
#define INT3(name, expression)                                                                    \
    ALU16(name##_16, u16, expression)                                                             \
    ALU(name##_32, u32, expression)                                                               \
    ALU(name##_64, u64, expression)
#define INT6(name, expression)                                                                    \
    ALU16(name##_u16, u16, expression)                                                            \
    ALU16(name##_s16, s16, expression)                                                            \
    ALU(name##_u32, u32, expression)                                                              \
    ALU(name##_s32, s32, expression)                                                              \
    ALU(name##_u64, u64, expression)                                                              \
    ALU(name##_s64, s64, expression)

INT3(add, x + y)
INT3(sub, x - y)
INT3(mul_lo, (u64)x * y)
INT3(mad_lo, (u64)x * y + z)
INT3(and, x & y)
INT3(or, x | y)
INT3(xor, x ^ y)
INT3(not, ~x)
INT3(neg, 0 - x)
INT3(abs, x >> (sizeof(x) * 8 - 1) ? 0 - x : x) /* of signed types only */
INT6(min, x < y ? x : y)
INT6(max, x > y ? x : y)
INT6(sad, (u64)z + (x < y ? (u64)y - (u64)x : (u64)x - (u64)y))
ALU16(mul_hi_u16, u16, ((u32)x * y) >> 16)
ALU16(mul_hi_s16, s16, (x * y) >> 16)
ALU(mul_hi_u32, u32, ((u64)x * y) >> 32)
ALU(mul_hi_s32, s32, ((s64)x * y) >> 32)
ALU(mul_hi_u64, u64, (u64)(((u128)x * y) >> 64))
ALU(mul_hi_s64, s64, (s64)(((s128)x * y) >> 64))
ALU(mad_hi_u32, u32, (((u64)x * y) >> 32) + z)
ALU(mad_hi_s32, u32, (u32)(((s64)(s32)x * (s32)y) >> 32) + z)
WIDEN(mul_wide_u16, u32, u32, (u32)(u16)x * (u16)y)
WIDEN(mul_wide_s16, u32, s32, (s16)x * (s16)y)
WIDEN(mul_wide_u32, u32, u64, x * y)
WIDEN(mul_wide_s32, s32, s64, x * y)
WIDEN(mad_wide_u16, u32, u32, (u32)(u16)x * (u16)y + z)
WIDEN(mad_wide_s16, u32, u32, (u32)((s16)x * (s16)y) + z)
WIDEN(mad_wide_u32, u32, u64, x * y + z)
WIDEN(mad_wide_s32, s32, u64, x * y + z) /* sign extended, then modulo 2^64 */

static s32 saturate_s32(s64 v) {
    return v > INT32_MAX ? INT32_MAX : v < INT32_MIN ? INT32_MIN : (s32)v;
}

ALU(add_sat_s32, s32, saturate_s32((s64)x + y))
ALU(sub_sat_s32, s32, saturate_s32((s64)x - y))

/* Division by zero is undefined in PTX: a finding; the lane gets all ones. */
static u32 zero_divisors(Warp *w, const Inst *i, int bits) {
    const u32 *b = src(w, i, 1);
    u32 zero = 0;
    for (int l = 0; l < 32; l++) {
        u64 v = bits == 64 ? ((const u64 *)(const void *)b)[l] : bits == 16 ? (u16)b[l] : b[l];
        zero |= (u32)(v == 0) << l;
    }
    if (zero & w->mask)
        finding(w, SIM_DIV_ZERO, __builtin_ctz(zero & w->mask), 0, "integer division by zero");
    return zero;
}

#define DIVIDE(name, T, R, bits, expression)                                                      \
    HANDLER(name)                                                                                 \
    {                                                                                             \
        const R *a = src(w, i, 0), *b = src(w, i, 1);                                             \
        R *d = out;                                                                               \
        u32 skip = zero_divisors(w, i, bits) | ~w->mask;                                          \
        for (int l = 0; l < 32; l++) {                                                            \
            T x = (T)a[l], y = (T)b[l];                                                           \
            d[l] = skip >> l & 1 ? (R)~(R)0 >> (sizeof(R) * 8 - bits) : (R)(expression);          \
        }                                                                                         \
    }

#define DIVIDE6(name, op, overflow)                                                               \
    DIVIDE(name##_u16, u16, u32, 16, (u16)(x op y))                                               \
    DIVIDE(name##_s16, s16, u32, 16, (u16)(x op y))                                               \
    DIVIDE(name##_u32, u32, u32, 32, x op y)                                                      \
    DIVIDE(name##_s32, s32, u32, 32, y == -1 ? (u32)(overflow) : (u32)(x op y))                   \
    DIVIDE(name##_u64, u64, u64, 64, x op y)                                                      \
    DIVIDE(name##_s64, s64, u64, 64, y == -1 ? (u64)(overflow) : (u64)(x op y))

DIVIDE6(div, /, 0 - (u64)x)
DIVIDE6(rem, %, 0)

/* Operand k of lane l, extended to 64 bits as the type's sign says. */
static u64 extended(const Warp *w, const Inst *i, int k, u32 l) {
    if (type_bytes((Type)i->type) == 8) return ((u64 *)src(w, i, k))[l];
    u32 v = ((u32 *)src(w, i, k))[l];
    return i->type == T_S32 ? (u64)(s64)(s32)v : v;
}

/* The low or high half of a product. */
static u64 half_product(const Inst *i, u64 x, u64 y) {
    int bits = type_bytes((Type)i->type) * 8;
    u128 p = type_is_signed((Type)i->type) ? (u128)((s128)(s64)x * (s64)y) : (u128)x * y;
    return (u64)(i->high ? p >> bits : p);
}

/* add.cc and friends: the carry (for sub: borrow) of each lane is a bit of w->carry. `in`: uses the
 * one from before; .cc: leaves a new one. */
static void carry_chain(Warp *w, const Inst *i, void *out, char op, bool in) {
    u32 carry = 0;
    int bits = type_bytes((Type)i->type) * 8;
    u64 all = ~0ull >> (64 - bits);
    EACH(l, w->mask) {
        u64 x = extended(w, i, 0, l), y = extended(w, i, 1, l), c = in ? w->carry >> l & 1 : 0;
        if (op == '*') {
            x = half_product(i, x, y);
            y = extended(w, i, 2, l);
        }
        u128 r = op == '-' ? (u128)(x & all) - (y & all) - c : (u128)(x & all) + (y & all) + c;
        carry |= (u32)(r >> bits & 1) << l;
        if (bits == 64)
            ((u64 *)out)[l] = (u64)r;
        else
            ((u32 *)out)[l] = (u32)r;
    }
    if (i->carry) w->carry = (w->carry & ~w->mask) | carry;
}

HANDLER(add_carry) { carry_chain(w, i, out, '+', false); }
HANDLER(addc) { carry_chain(w, i, out, '+', true); }
HANDLER(sub_carry) { carry_chain(w, i, out, '-', false); }
HANDLER(subc) { carry_chain(w, i, out, '-', true); }
HANDLER(mad_carry) { carry_chain(w, i, out, '*', false); }
HANDLER(madc) { carry_chain(w, i, out, '*', true); }

/* ------------------------------------------------------------------------------------------------
 * bits */

/* The second operand of a shift is 32 bits wide whatever the type. */
#define SHIFT(name, T, R, bits, inside, outside)                                                  \
    HANDLER(name)                                                                                 \
    {                                                                                             \
        const R *a = src(w, i, 0);                                                                \
        const u32 *b = src(w, i, 1);                                                              \
        R *d = out;                                                                               \
        LANES {                                                                                   \
            T x = (T)a[l];                                                                        \
            u32 n = b[l] & (bits - 1);                                                            \
            (void)n;                                                                              \
            d[l] = b[l] < bits ? (R)(inside) : (R)(outside);                                      \
        }                                                                                         \
    }

SHIFT(shl_16, u16, u32, 16, (u16)(x << n), 0)
SHIFT(shl_32, u32, u32, 32, x << n, 0)
SHIFT(shl_64, u64, u64, 64, x << n, 0)
SHIFT(shr_u16, u16, u32, 16, x >> n, 0)
SHIFT(shr_u32, u32, u32, 32, x >> n, 0)
SHIFT(shr_u64, u64, u64, 64, x >> n, 0)
SHIFT(shr_s16, s16, u32, 16, (u16)(x >> n), (u16)(x >> 15))
SHIFT(shr_s32, s32, u32, 32, x >> n, x >> 31)
SHIFT(shr_s64, s64, u64, 64, x >> n, x >> 63)

HANDLER(shf_32) {
    OPERANDS(u32);
    LANES {
        u32 n = i->wrap ? c[l] & 31 : c[l] < 32 ? c[l] : 32;
        u64 v = (u64)b[l] << 32 | a[l];
        d[l] = i->left ? (u32)(v << n >> 32) : (u32)(v >> n);
    }
}

#define BITS1(name, S, expression)                                                                \
    HANDLER(name)                                                                                 \
    {                                                                                             \
        const S *a = src(w, i, 0);                                                                \
        u32 *d = out;                                                                             \
        for (int l = 0; l < 32; l++) {                                                            \
            S x = a[l];                                                                           \
            d[l] = (u32)(expression);                                                             \
        }                                                                                         \
    }

BITS1(popc_32, u32, __builtin_popcount(x))
BITS1(popc_64, u64, __builtin_popcountll(x))
BITS1(clz_32, u32, x ? __builtin_clz(x) : 32)
BITS1(clz_64, u64, x ? __builtin_clzll(x) : 64)

static u32 find_msb(u64 v, int bits, bool shiftamt) {
    if (!v) return ~0u;
    u32 at = 63 - (u32)__builtin_clzll(v);
    return shiftamt ? (u32)bits - 1 - at : at;
}

BITS1(bfind_u32, u32, find_msb(x, 32, i->shiftamt))
BITS1(bfind_s32, s32, find_msb((u32)(x < 0 ? ~x : x), 32, i->shiftamt))
BITS1(bfind_u64, u64, find_msb(x, 64, i->shiftamt))
BITS1(bfind_s64, s64, find_msb((u64)(x < 0 ? ~x : x), 64, i->shiftamt))

static u64 reverse_bits(u64 v) {
    u64 r = 0;
    for (int k = 0; k < 64; k++) r |= (v >> k & 1) << (63 - k);
    return r;
}

ALU(brev_32, u32, reverse_bits(x) >> 32)
ALU(brev_64, u64, reverse_bits(x))

/* Bits [pos, pos + len) of v; above len, and beyond the value, the sign bit of a signed field. */
static u64 extract_field(u64 v, int bits, bool is_signed, u32 pos, u32 len) {
    pos &= 255, len &= 255;
    if (len == 0) return 0;
    u32 top = pos + len - 1 < (u32)bits - 1 ? pos + len - 1 : (u32)bits - 1;
    u64 sign = is_signed && v >> top & 1 ? ~0ull : 0;
    if (pos >= (u32)bits) return sign;
    u32 have = top - pos + 1;
    u64 low = have == 64 ? ~0ull : (1ull << have) - 1;
    return (v >> pos & low) | (sign & ~low);
}

static u64 insert_field(u64 field, u64 base, int bits, u32 pos, u32 len) {
    pos &= 255, len &= 255;
    if (pos >= (u32)bits || len == 0) return base;
    u64 low = len >= 64 ? ~0ull : (1ull << len) - 1;
    return (base & ~(low << pos)) | (field & low) << pos;
}

#define FIELD(name, R, bits, expression)                                                          \
    HANDLER(name)                                                                                 \
    {                                                                                             \
        const R *a = src(w, i, 0), *b = src(w, i, 1);                                             \
        const u32 *p = src(w, i, 1), *q = src(w, i, 2), *r = src(w, i, 3);                        \
        R *d = out;                                                                               \
        (void)b, (void)p, (void)r;                                                                \
        for (int l = 0; l < 32; l++)                                                              \
            d[l] = (R)(expression);                                                               \
    }

FIELD(bfe_u32, u32, 32, extract_field(a[l], 32, false, p[l], q[l]))
FIELD(bfe_s32, u32, 32, extract_field(a[l], 32, true, p[l], q[l]))
FIELD(bfe_u64, u64, 64, extract_field(a[l], 64, false, p[l], q[l]))
FIELD(bfe_s64, u64, 64, extract_field(a[l], 64, true, p[l], q[l]))
FIELD(bfi_32, u32, 32, insert_field(a[l], b[l], 32, q[l], r[l]))
FIELD(bfi_64, u64, 64, insert_field(a[l], b[l], 64, q[l], r[l]))

HANDLER(lop3_32) {
    OPERANDS(u32);
    u32 table = i->vec;
    LANES {
        u32 x = a[l], y = b[l], z = c[l], r = 0;
        for (u32 k = 0; k < 8; k++) {
            u32 on = 0 - (table >> k & 1);
            r |= on & (k & 4 ? x : ~x) & (k & 2 ? y : ~y) & (k & 1 ? z : ~z);
        }
        d[l] = r;
    }
}

/* The four selectors of a prmt mode, for the two low bits of the control. */
static u32 prmt_selectors(u8 mode, u32 control) {
    static const u16 table[6][4] = {
        {0x3210, 0x4321, 0x5432, 0x6543}, {0x5670, 0x6701, 0x7012, 0x0123}, /* f4e, b4e */
        {0x0000, 0x1111, 0x2222, 0x3333}, {0x3210, 0x3211, 0x3222, 0x3333}, /* rc8, ecl */
        {0x0000, 0x1110, 0x2210, 0x3210}, {0x1010, 0x3232, 0x1010, 0x3232}, /* ecr, rc16 */
    };
    return mode == OP_NONE ? control : table[mode - OP_F4E][control & 3];
}

HANDLER(prmt_32) {
    OPERANDS(u32);
    LANES {
        u64 v = (u64)b[l] << 32 | a[l];
        u32 s = prmt_selectors(i->op, c[l]), r = 0;
        for (u32 k = 0; k < 4; k++) {
            u32 byte = (u32)(v >> (s >> (4 * k) & 7) * 8) & 255;
            u32 sign = byte >> 7 ? 255 : 0;
            r |= (s >> (4 * k) & 8 ? sign : byte) << (8 * k);
        }
        d[l] = r;
    }
}

/* Even and odd bytes as 16-bit lanes, two multiply-adds of pairs: 4 products a lane. */
static inline __m256i dot4(__m256i x, __m256i y, __m256i z, bool sx, bool sy) {
    __m256i xe = _mm256_slli_epi16(x, 8), ye = _mm256_slli_epi16(y, 8);
    xe = sx ? _mm256_srai_epi16(xe, 8) : _mm256_srli_epi16(xe, 8);
    ye = sy ? _mm256_srai_epi16(ye, 8) : _mm256_srli_epi16(ye, 8);
    __m256i xo = sx ? _mm256_srai_epi16(x, 8) : _mm256_srli_epi16(x, 8);
    __m256i yo = sy ? _mm256_srai_epi16(y, 8) : _mm256_srli_epi16(y, 8);
    z = _mm256_add_epi32(z, _mm256_madd_epi16(xe, ye));
    return _mm256_add_epi32(z, _mm256_madd_epi16(xo, yo));
}

#define DP4A(name, sx, sy)                                                                        \
    HANDLER(name)                                                                                 \
    {                                                                                             \
        const __m256i *a = src(w, i, 0), *b = src(w, i, 1), *c = src(w, i, 2);                    \
        __m256i *d = out;                                                                         \
        for (int k = 0; k < 4; k++)                                                               \
            d[k] = dot4(a[k], b[k], c[k], sx, sy);                                                \
    }

DP4A(dp4a_uu, false, false)
DP4A(dp4a_us, false, true)
DP4A(dp4a_su, true, false)
DP4A(dp4a_ss, true, true)

static Handler *choose_dp4a(Inst *i) {
    bool sx = i->type == T_S32, sy = i->type2 == T_S32;
    return sx ? sy ? dp4a_ss : dp4a_su : sy ? dp4a_us : dp4a_uu;
}

HANDLER(dp2a_32) {
    OPERANDS(u32);
    for (int l = 0; l < 32; l++) {
        u32 sum = c[l];
        for (int k = 0; k < 2; k++) {
            u32 x = a[l] >> (16 * k) & 0xffff, y = b[l] >> (8 * k + (i->high ? 16 : 0)) & 0xff;
            s32 sx = i->type == T_S32 ? (s16)x : (s32)x;
            s32 sy = i->type2 == T_S32 ? (int8_t)y : (s32)y;
            sum += (u32)(sx * sy);
        }
        d[l] = sum;
    }
}

/* ------------------------------------------------------------------------------------------------
 * f32 and f64 */

static inline u32 float_bits(float f) {
    u32 u;
    memcpy(&u, &f, 4);
    return u;
}

static inline float bits_float(u32 u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static inline float flush(float x) {
    u32 u = float_bits(x);
    return bits_float(u & 0x7f800000 ? u : u & 0x80000000);
}

static inline float canon(float x) {
    return x == x ? x : bits_float(CANON_NAN);
}

static inline double canon64(double x) {
    const u64 nan = 0x7fffffffffffffff;
    double r;
    memcpy(&r, &nan, 8);
    return x == x ? x : r;
}

/* The operand that is a number; -0 is below +0. */
static inline float min_number(float x, float y) {
    float r = x < y ? x : y;
    r = x == y ? bits_float(float_bits(x) | float_bits(y)) : r;
    return y != y ? x : r;
}

static inline float max_number(float x, float y) {
    float r = x > y ? x : y;
    r = x == y ? bits_float(float_bits(x) & float_bits(y)) : r;
    return y != y ? x : r;
}

static inline float nan_first(float x, float y, float r) {
    return x != x || y != y ? bits_float(CANON_NAN) : r;
}

#define FP32(name, expression)                                                                    \
    HANDLER(name)                                                                                 \
    {                                                                                             \
        OPERANDS(float);                                                                          \
        LANES {                                                                                   \
            float x = a[l], y = b[l], z = c[l];                                                   \
            (void)x, (void)y, (void)z;                                                            \
            d[l] = canon(expression);                                                             \
        }                                                                                         \
    }                                                                                             \
    HANDLER(name##_ftz)                                                                           \
    {                                                                                             \
        OPERANDS(float);                                                                          \
        LANES {                                                                                   \
            float x = flush(a[l]), y = flush(b[l]), z = flush(c[l]);                              \
            (void)x, (void)y, (void)z;                                                            \
            d[l] = flush(canon(expression));                                                      \
        }                                                                                         \
    }

FP32(add_f32, x + y)
FP32(sub_f32, x - y)
FP32(mul_f32, x * y)
FP32(fma_f32, __builtin_fmaf(x, y, z))
FP32(div_f32, x / y)
FP32(rcp_f32, 1.0f / x)
FP32(sqrt_f32, __builtin_sqrtf(x))
FP32(min_f32, min_number(x, y))
FP32(max_f32, max_number(x, y))
FP32(min_nan_f32, nan_first(x, y, min_number(x, y)))
FP32(max_nan_f32, nan_first(x, y, max_number(x, y)))
FP32(abs_f32, bits_float(float_bits(x) & 0x7fffffff))
FP32(neg_f32, bits_float(float_bits(x) ^ 0x80000000))

static Handler *choose_min_f32(Inst *i) {
    return i->nan ? i->ftz ? min_nan_f32_ftz : min_nan_f32 : i->ftz ? min_f32_ftz : min_f32;
}

static Handler *choose_max_f32(Inst *i) {
    return i->nan ? i->ftz ? max_nan_f32_ftz : max_nan_f32 : i->ftz ? max_f32_ftz : max_f32;
}

ALU(copysign_f32, u32, (x & 0x80000000) | (y & 0x7fffffff)) /* the sign of a, the rest of b */
ALU(copysign_f64, u64, (x & 1ull << 63) | (y & ~(1ull << 63)))

#define FP64(name, expression)                                                                    \
    HANDLER(name)                                                                                 \
    {                                                                                             \
        OPERANDS(double);                                                                         \
        LANES {                                                                                   \
            double x = a[l], y = b[l], z = c[l];                                                  \
            (void)x, (void)y, (void)z;                                                            \
            d[l] = canon64(expression);                                                           \
        }                                                                                         \
    }

FP64(add_f64, x + y)
FP64(sub_f64, x - y)
FP64(mul_f64, x * y)
FP64(fma_f64, __builtin_fma(x, y, z))
FP64(div_f64, x / y)
FP64(rcp_f64, 1.0 / x)
FP64(sqrt_f64, __builtin_sqrt(x))
FP64(rsqrt_f64, 1.0 / __builtin_sqrt(x))
FP64(min_f64, y != y || x < y || (x == y && signbit(x)) ? x : y)
FP64(max_f64, y != y || x > y || (x == y && signbit(y)) ? x : y)
FP64(abs_f64, __builtin_fabs(x))
FP64(neg_f64, -x)

/* The approximate functions: the double result rounded to float, then perturbed if asked to. */
#define APPROX(name, expression)                                                                  \
    static inline void name##_lanes(Warp *w, const Inst *i, float *d, bool ftz)                   \
    {                                                                                             \
        const float *a = src(w, i, 0), *b = src(w, i, 1);                                         \
        EACH(l, w->mask) {                                                                        \
            double x = ftz ? flush(a[l]) : a[l], y = ftz ? flush(b[l]) : b[l];                    \
            (void)y;                                                                              \
            float r = approx_result(w, canon((float)(expression)), (int)l);                       \
            d[l] = ftz ? flush(r) : r;                                                            \
        }                                                                                         \
    }                                                                                             \
    HANDLER(name) { name##_lanes(w, i, out, false); }                                             \
    HANDLER(name##_ftz) { name##_lanes(w, i, out, true); }

APPROX(div_approx, x / y)
APPROX(rcp_approx, 1.0 / x)
APPROX(sqrt_approx, sqrt(x))
APPROX(rsqrt_approx, 1.0 / sqrt(x))
APPROX(ex2_approx, exp2(x))
APPROX(lg2_approx, log2(x))
APPROX(sin_approx, sin(x))
APPROX(cos_approx, cos(x))
APPROX(tanh_approx, tanh(x))

/* ------------------------------------------------------------------------------------------------
 * comparisons, predicates, selection, moves */

static inline u32 pack_mask(const u32 *t) {
    u32 m = 0;
    for (int k = 0; k < 4; k++)
        m |= (u32)_mm256_movemask_ps(_mm256_loadu_ps((const float *)(const void *)t + 8 * k))
             << (8 * k);
    return m;
}

#define CASE(which, T, condition)                                                                 \
    case which:                                                                                   \
        LANES {                                                                                   \
            T x = (T)a[l], y = (T)b[l];                                                           \
            t[l] = (condition) ? ~0u : 0;                                                         \
        }                                                                                         \
        return pack_mask(t);

#define COMPARE_INT(name, T, R)                                                                   \
    static u32 name(const void *left, const void *right, u8 cmp)                                  \
    {                                                                                             \
        const R *a = left, *b = right;                                                            \
        _Alignas(32) u32 t[32];                                                                   \
        switch (cmp) {                                                                            \
            CASE(CMP_EQ, T, x == y)                                                               \
            CASE(CMP_NE, T, x != y)                                                               \
        case CMP_LO:                                                                              \
            CASE(CMP_LT, T, x < y)                                                                \
        case CMP_LS:                                                                              \
            CASE(CMP_LE, T, x <= y)                                                               \
        case CMP_HI:                                                                              \
            CASE(CMP_GT, T, x > y)                                                                \
        case CMP_HS:                                                                              \
            CASE(CMP_GE, T, x >= y)                                                               \
        }                                                                                         \
        return 0;                                                                                 \
    }

COMPARE_INT(cmp_u16, u16, u32)
COMPARE_INT(cmp_s16, s16, u32)
COMPARE_INT(cmp_u32, u32, u32)
COMPARE_INT(cmp_s32, s32, u32)
COMPARE_INT(cmp_u64, u64, u64)
COMPARE_INT(cmp_s64, s64, u64)

#define COMPARE_FLOAT(name, T, CONVERT)                                                           \
    static u32 name(const void *left, const void *right, u8 cmp)                                  \
    {                                                                                             \
        const T *a = left, *b = right;                                                            \
        _Alignas(32) u32 t[32];                                                                   \
        switch (cmp) {                                                                            \
            CASE(CMP_EQ, T, CONVERT(x) == CONVERT(y))                                             \
            CASE(CMP_NE, T, CONVERT(x) < CONVERT(y) || CONVERT(x) > CONVERT(y))                   \
            CASE(CMP_LT, T, CONVERT(x) < CONVERT(y))                                              \
            CASE(CMP_LE, T, CONVERT(x) <= CONVERT(y))                                             \
            CASE(CMP_GT, T, CONVERT(x) > CONVERT(y))                                              \
            CASE(CMP_GE, T, CONVERT(x) >= CONVERT(y))                                             \
            CASE(CMP_EQU, T, !(CONVERT(x) < CONVERT(y) || CONVERT(x) > CONVERT(y)))               \
            CASE(CMP_NEU, T, CONVERT(x) != CONVERT(y))                                            \
            CASE(CMP_LTU, T, !(CONVERT(x) >= CONVERT(y)))                                         \
            CASE(CMP_LEU, T, !(CONVERT(x) > CONVERT(y)))                                          \
            CASE(CMP_GTU, T, !(CONVERT(x) <= CONVERT(y)))                                         \
            CASE(CMP_GEU, T, !(CONVERT(x) < CONVERT(y)))                                          \
            CASE(CMP_NUM, T, CONVERT(x) == CONVERT(x) && CONVERT(y) == CONVERT(y))                \
            CASE(CMP_NAN, T, CONVERT(x) != CONVERT(x) || CONVERT(y) != CONVERT(y))                \
        }                                                                                         \
        return 0;                                                                                 \
    }

#define SAME(x) (x)
#define FROM_F16(x) half_to_float((u16)(x))
#define FROM_BF16(x) bf16_to_float((u16)(x))
COMPARE_FLOAT(cmp_f32, float, SAME)
COMPARE_FLOAT(cmp_f32_ftz, float, flush)
COMPARE_FLOAT(cmp_f64, double, SAME)
COMPARE_FLOAT(cmp_f16, u32, FROM_F16)
COMPARE_FLOAT(cmp_bf16, u32, FROM_BF16)

static u32 compare(Type t, const Inst *i, const void *a, const void *b) {
    switch (t) {
    case T_B16: case T_U16: return cmp_u16(a, b, i->cmp);
    case T_S16: return cmp_s16(a, b, i->cmp);
    case T_S32: return cmp_s32(a, b, i->cmp);
    case T_B64: case T_U64: return cmp_u64(a, b, i->cmp);
    case T_S64: return cmp_s64(a, b, i->cmp);
    case T_F32: return i->ftz ? cmp_f32_ftz(a, b, i->cmp) : cmp_f32(a, b, i->cmp);
    case T_F64: return cmp_f64(a, b, i->cmp);
    case T_F16: return cmp_f16(a, b, i->cmp);
    case T_BF16: return cmp_bf16(a, b, i->cmp);
    default: return cmp_u32(a, b, i->cmp);
    }
}

static u32 combine(u8 op, u32 x, u32 y) {
    return op == OP_AND ? x & y : op == OP_OR ? x | y : op == OP_XOR ? x ^ y : x;
}

HANDLER(setp_any) {
    u32 r = compare((Type)i->type, i, src(w, i, 0), src(w, i, 1));
    u32 c = i->n_src > 2 ? src_mask(w, i, 2) : 0;
    if (i->dst_pred) {
        u32 *q = slot(w, i->dst_pred);
        *q = (*q & ~w->mask) | (combine(i->op, ~r, c) & w->mask);
    }
    *(u32 *)out = combine(i->op, r, c);
}

HANDLER(set_any) {
    u32 r = compare((Type)i->type2, i, src(w, i, 0), src(w, i, 1)), *d = out;
    r = combine(i->op, r, i->n_src > 2 ? src_mask(w, i, 2) : 0);
    u32 on = i->type == T_F32 ? 0x3f800000 : ~0u;
    LANES d[l] = r >> l & 1 ? on : 0;
}

HANDLER(and_pred) { *(u32 *)out = src_mask(w, i, 0) & src_mask(w, i, 1); }
HANDLER(or_pred) { *(u32 *)out = src_mask(w, i, 0) | src_mask(w, i, 1); }
HANDLER(xor_pred) { *(u32 *)out = src_mask(w, i, 0) ^ src_mask(w, i, 1); }
HANDLER(not_pred) { *(u32 *)out = ~src_mask(w, i, 0); }
HANDLER(mov_pred) { *(u32 *)out = src_mask(w, i, 0); }

HANDLER(selp_32) {
    const u32 *a = src(w, i, 0), *b = src(w, i, 1), m = src_mask(w, i, 2);
    u32 *d = out;
    LANES d[l] = m >> l & 1 ? a[l] : b[l];
}

HANDLER(selp_64) {
    const u64 *a = src(w, i, 0), *b = src(w, i, 1);
    u32 m = src_mask(w, i, 2);
    u64 *d = out;
    LANES d[l] = m >> l & 1 ? a[l] : b[l];
}

HANDLER(slct_32) {
    OPERANDS(u32);
    LANES {
        bool first = i->type2 == T_S32 ? (s32)c[l] >= 0 : bits_float(c[l]) >= 0;
        d[l] = first ? a[l] : b[l];
    }
}

HANDLER(mov_32) { (void)w, memcpy(out, src(w, i, 0), 128); }
HANDLER(mov_64) { (void)w, memcpy(out, src(w, i, 0), 256); }

/* mov.b32 d, {a, b} and the like: elements of bits / n each, the first one lowest. */
HANDLER(mov_pack) {
    bool wide = type_bytes((Type)i->type) == 8;
    int bits = type_bytes((Type)i->type) * 8 / i->n_src;
    for (int l = 0; l < 32; l++) {
        u64 v = 0;
        for (int k = 0; k < i->n_src; k++)
            v |= ((u64)((u32 *)src(w, i, k))[l] & ((1ull << bits) - 1)) << (bits * k);
        if (wide)
            ((u64 *)out)[l] = v;
        else
            ((u32 *)out)[l] = (u32)v;
    }
}

HANDLER(mov_unpack) {
    bool wide = type_bytes((Type)i->type) == 8;
    int bits = type_bytes((Type)i->type) * 8 / i->n_dst;
    (void)out;
    EACH(l, w->mask) {
        u64 v = wide ? ((u64 *)src(w, i, 0))[l] : ((u32 *)src(w, i, 0))[l];
        for (int k = 0; k < i->n_dst; k++)
            ((u32 *)slot(w, i->dst[k]))[l] = (u32)(v >> (bits * k) & ((1ull << bits) - 1));
    }
}

static Handler *choose_mov(Inst *i) {
    bool wide = type_bytes((Type)i->type) == 8;
    int parts = i->n_dst > 1 ? i->n_dst : i->n_src;
    i->out_bits = i->type == T_PRED ? 1 : wide ? 64 : 32;
    if ((i->n_dst > 1 && i->n_src > 1) || parts == 3 || (parts == 4 && !wide)) return NULL;
    if (i->n_dst > 1) {
        i->out_bits = 0;
        i->wide_dst = false;
        return mov_unpack;
    }
    return i->n_src > 1 ? mov_pack : i->type == T_PRED ? mov_pred : wide ? mov_64 : mov_32;
}

/* cvta: a window's base is added or taken away; device memory is generic already. */
HANDLER(cvta_64) {
    const u64 *a = src(w, i, 0);
    u64 *d = out;
    u64 base = i->space == SP_SHARED ? SHARED_BASE : i->space == SP_LOCAL ? LOCAL_BASE
             : i->space == SP_PARAM ? PARAM_BASE : 0;
    base = i->to ? 0 - base : base;
    LANES d[l] = a[l] + base;
}

HANDLER(isspacep_any) {
    const u64 *a = src(w, i, 0);
    u32 r = 0;
    for (int l = 0; l < 32; l++) {
        u64 window = a[l] & 0xffff00000000ull;
        bool yes = i->space == SP_SHARED ? window == SHARED_BASE
                 : i->space == SP_LOCAL ? window == LOCAL_BASE
                 : i->space == SP_PARAM ? window == PARAM_BASE
                 : a[l] < SHARED_BASE;
        r |= (u32)yes << l;
    }
    *(u32 *)out = r;
}

#define CMPS ".eq|.ne|.lt|.le|.gt|.ge|.lo|.ls|.hi|.hs"
#define FCMPS ".eq|.ne|.lt|.le|.gt|.ge|.equ|.neu|.ltu|.leu|.gtu|.geu|.num|.nan"
#define RND "[.rn|.rz|.rm|.rp]"

#define ALL ".b16|.u16|.s16|.b32|.u32|.s32|.b64|.u64|.s64"
#define NUM ".u16|.s16|.u32|.s32|.u64|.s64"
#define WORD ".u32|.s32|.u64|.s64"
/* handlers by type, for Form.by_type: u16 s16 u32 s32 u64 s64 */
#define SIZES(name) {name##_16, name##_16, name##_32, name##_32, name##_64, name##_64}
#define SIGNS(name) {name##_u16, name##_s16, name##_u32, name##_s32, name##_u64, name##_s64}
#define WIDES(name) {name##_u16, name##_s16, name##_u32, name##_s32, 0, 0}
#define INT SIM_C_INT

const Form alu_forms[] = {
    {"add " NUM, "daa", INT, 0, .by_type = SIZES(add)},
    {"sub " NUM, "daa", INT, 0, .by_type = SIZES(sub)},
    {"add .sat .s32", "daa", INT, 32, add_sat_s32},
    {"sub .sat .s32", "daa", INT, 32, sub_sat_s32},
    {"add .cc " WORD, "daa", INT, 0, add_carry},
    {"addc [.cc] " WORD, "daa", INT, 0, addc},
    {"sub .cc " WORD, "daa", INT, 0, sub_carry},
    {"subc [.cc] " WORD, "daa", INT, 0, subc},
    {"mad .lo|.hi .cc " WORD, "daaa", INT, 0, mad_carry},
    {"madc .lo|.hi [.cc] " WORD, "daaa", INT, 0, madc},
    {"mul .lo " NUM, "daa", INT, 0, .by_type = SIZES(mul_lo)},
    {"mul .hi " NUM, "daa", INT, 0, .by_type = SIGNS(mul_hi)},
    {"mul .wide .u16|.s16|.u32|.s32", "eaa", INT, 0, .by_type = WIDES(mul_wide)},
    {"mad .lo " NUM, "daaa", INT, 0, .by_type = SIZES(mad_lo)},
    {"mad .hi .u32", "daaa", INT, 32, mad_hi_u32},
    {"mad .hi .s32", "daaa", INT, 32, mad_hi_s32},
    {"mad .wide .u16|.s16|.u32|.s32", "eaaE", INT, 0, .by_type = WIDES(mad_wide)},
    {"div " NUM, "daa", INT, 0, .by_type = SIGNS(div)},
    {"rem " NUM, "daa", INT, 0, .by_type = SIGNS(rem)},
    {"abs .s16|.s32|.s64", "da", INT, 0, .by_type = SIZES(abs)},
    {"neg .s16|.s32|.s64", "da", INT, 0, .by_type = SIZES(neg)},
    {"min " NUM, "daa", INT, 0, .by_type = SIGNS(min)},
    {"max " NUM, "daa", INT, 0, .by_type = SIGNS(max)},
    {"sad " NUM, "daaa", INT, 0, .by_type = SIGNS(sad)},
    {"and .b16|.b32|.b64", "daa", INT, 0, .by_type = SIZES(and)},
    {"or .b16|.b32|.b64", "daa", INT, 0, .by_type = SIZES(or)},
    {"xor .b16|.b32|.b64", "daa", INT, 0, .by_type = SIZES(xor)},
    {"not .b16|.b32|.b64", "da", INT, 0, .by_type = SIZES(not)},
    {"and .pred", "daa", INT, 1, and_pred},
    {"or .pred", "daa", INT, 1, or_pred},
    {"xor .pred", "daa", INT, 1, xor_pred},
    {"not .pred", "da", INT, 1, not_pred},
    {"shl .b16|.b32|.b64", "daw", INT, 0, .by_type = SIZES(shl)},
    {"shr " ALL, "daw", INT, 0, .by_type = SIGNS(shr)},
    {"shf .l|.r .wrap|.clamp .b32", "daaw", INT, 32, shf_32},
    {"popc .b32|.b64", "ua", INT, 32, .by_type = {0, 0, popc_32, 0, popc_64, 0}},
    {"clz .b32|.b64", "ua", INT, 32, .by_type = {0, 0, clz_32, 0, clz_64, 0}},
    {"bfind [.shiftamt] .u32|.s32|.u64|.s64", "ua", INT, 32, .by_type = {0, 0, bfind_u32,
     bfind_s32, bfind_u64, bfind_s64}},
    {"brev .b32|.b64", "da", INT, 0, .by_type = {0, 0, brev_32, 0, brev_64, 0}},
    {"bfe .u32|.s32|.u64|.s64", "daww", INT, 0, .by_type = {0, 0, bfe_u32, bfe_s32, bfe_u64,
     bfe_s64}},
    {"bfi .b32|.b64", "daaww", INT, 0, .by_type = {0, 0, bfi_32, 0, bfi_64, 0}},
    {"lop3 .b32", "daaan", INT, 32, lop3_32},
    {"prmt .b32 [.f4e|.b4e|.rc8|.ecl|.ecr|.rc16]", "daaw", INT, 32, prmt_32},
    {"dp4a .u32|.s32 .u32|.s32", "uwww", SIM_C_DP4A, 32, .choose = choose_dp4a},
    {"dp2a .lo|.hi .u32|.s32 .u32|.s32", "uwww", SIM_C_DP4A, 32, dp2a_32},
    {"add " RND " [.ftz] [.sat] .f32", "daa", SIM_C_FP32, 32, add_f32, add_f32_ftz},
    {"sub " RND " [.ftz] [.sat] .f32", "daa", SIM_C_FP32, 32, sub_f32, sub_f32_ftz},
    {"mul " RND " [.ftz] [.sat] .f32", "daa", SIM_C_FP32, 32, mul_f32, mul_f32_ftz},
    {"fma .rn|.rz|.rm|.rp [.ftz] [.sat] .f32", "daaa", SIM_C_FP32, 32, fma_f32, fma_f32_ftz},
    {"mad .rn|.rz|.rm|.rp [.ftz] [.sat] .f32", "daaa", SIM_C_FP32, 32, fma_f32, fma_f32_ftz},
    {"min [.ftz] [.NaN] .f32", "daa", SIM_C_FP32, 32, .choose = choose_min_f32},
    {"max [.ftz] [.NaN] .f32", "daa", SIM_C_FP32, 32, .choose = choose_max_f32},
    {"abs [.ftz] .f32", "da", SIM_C_FP32, 32, abs_f32, abs_f32_ftz},
    {"neg [.ftz] .f32", "da", SIM_C_FP32, 32, neg_f32, neg_f32_ftz},
    {"copysign .f32", "daa", SIM_C_FP32, 32, copysign_f32},
    {"div .rn|.rz|.rm|.rp [.ftz] .f32", "daa", SIM_C_SPECIAL, 32, div_f32, div_f32_ftz},
    {"div .approx|.full [.ftz] .f32", "daa", SIM_C_SPECIAL, 32, div_approx, div_approx_ftz},
    {"rcp .rn|.rz|.rm|.rp [.ftz] .f32", "da", SIM_C_SPECIAL, 32, rcp_f32, rcp_f32_ftz},
    {"rcp .approx [.ftz] .f32", "da", SIM_C_SPECIAL, 32, rcp_approx, rcp_approx_ftz},
    {"sqrt .rn|.rz|.rm|.rp [.ftz] .f32", "da", SIM_C_SPECIAL, 32, sqrt_f32, sqrt_f32_ftz},
    {"sqrt .approx [.ftz] .f32", "da", SIM_C_SPECIAL, 32, sqrt_approx, sqrt_approx_ftz},
    {"rsqrt .approx [.ftz] .f32", "da", SIM_C_SPECIAL, 32, rsqrt_approx, rsqrt_approx_ftz},
    {"ex2 .approx [.ftz] .f32", "da", SIM_C_SPECIAL, 32, ex2_approx, ex2_approx_ftz},
    {"lg2 .approx [.ftz] .f32", "da", SIM_C_SPECIAL, 32, lg2_approx, lg2_approx_ftz},
    {"sin .approx [.ftz] .f32", "da", SIM_C_SPECIAL, 32, sin_approx, sin_approx_ftz},
    {"cos .approx [.ftz] .f32", "da", SIM_C_SPECIAL, 32, cos_approx, cos_approx_ftz},
    {"tanh .approx .f32", "da", SIM_C_SPECIAL, 32, tanh_approx, tanh_approx_ftz},
    {"add " RND " .f64", "daa", SIM_C_FP64, 64, add_f64},
    {"sub " RND " .f64", "daa", SIM_C_FP64, 64, sub_f64},
    {"mul " RND " .f64", "daa", SIM_C_FP64, 64, mul_f64},
    {"fma .rn|.rz|.rm|.rp .f64", "daaa", SIM_C_FP64, 64, fma_f64},
    {"mad .rn|.rz|.rm|.rp .f64", "daaa", SIM_C_FP64, 64, fma_f64},
    {"div .rn|.rz|.rm|.rp .f64", "daa", SIM_C_FP64, 64, div_f64},
    {"rcp .rn|.rz|.rm|.rp .f64", "da", SIM_C_FP64, 64, rcp_f64},
    {"sqrt .rn|.rz|.rm|.rp .f64", "da", SIM_C_FP64, 64, sqrt_f64},
    {"rsqrt .approx [.ftz] .f64", "da", SIM_C_FP64, 64, rsqrt_f64},
    {"rcp .approx .ftz .f64", "da", SIM_C_FP64, 64, rcp_f64},
    {"min .f64", "daa", SIM_C_FP64, 64, min_f64},
    {"max .f64", "daa", SIM_C_FP64, 64, max_f64},
    {"abs .f64", "da", SIM_C_FP64, 64, abs_f64},
    {"neg .f64", "da", SIM_C_FP64, 64, neg_f64},
    {"copysign .f64", "daa", SIM_C_FP64, 64, copysign_f64},
    {"setp " CMPS " .b16|.u16|.s16|.b32|.u32|.s32|.b64|.u64|.s64", "paa", INT, 1, setp_any},
    {"setp " CMPS " .and|.or|.xor .b16|.u16|.s16|.b32|.u32|.s32|.b64|.u64|.s64", "paaq", INT, 1,
     setp_any},
    {"setp " FCMPS " [.ftz] .f32|.f64", "paa", SIM_C_FP32, 1, setp_any},
    {"setp " FCMPS " .and|.or|.xor [.ftz] .f32|.f64", "paaq", SIM_C_FP32, 1, setp_any},
    {"setp " FCMPS " .f16|.bf16", "paa", SIM_C_HALF, 1, setp_any},
    {"set " CMPS " .u32|.s32|.f32 .u16|.s16|.b32|.u32|.s32|.u64|.s64", "dtt", INT, 32, set_any},
    {"set " FCMPS " [.ftz] .u32|.s32|.f32 .f32|.f64", "dtt", SIM_C_FP32, 32, set_any},
    {"selp .b16|.u16|.s16|.f16|.bf16|.b32|.u32|.s32|.f32", "daaq", INT, 32, selp_32},
    {"selp .b64|.u64|.s64|.f64", "daaq", INT, 64, selp_64},
    {"slct .b32|.u32|.s32|.f32 .s32|.f32", "daat", INT, 32, slct_32},
    {"mov .pred|.b16|.u16|.s16|.f16|.bf16|.b32|.u32|.s32|.f32|.b64|.u64|.s64|.f64", "XY", INT, 0,
     .choose = choose_mov},
    {"cvta .global|.shared|.shared::cta|.local|.const|.param .u64", "da", INT, 64, cvta_64},
    {"cvta .to .global|.shared|.shared::cta|.local|.const|.param .u64", "da", INT, 64, cvta_64},
    {"isspacep .global|.shared|.shared::cta|.local|.const|.param", "pl", INT, 1, isspacep_any},
    {0},
};
