/* exec_cvt.c: conversions between types, and f16 / bf16 arithmetic.
 *
 * A half result is the exact value rounded once: sums and products of halves are computed in double
 * with round-to-odd, after which a second rounding to a short format is harmless. */
#include "ptx.h"

#include <immintrin.h>
#include <math.h>

#define HANDLER(name) static void name(Warp *w, const Inst *i, void *out)

typedef int64_t s64;

/* ------------------------------------------------------------------------------------------------
 * short formats */

/* A non-negative number to an integer; `negative` is the sign of the whole value. */
static double round_to_mode(double q, bool negative, Rounding mode) {
    switch (mode) {
    case RND_RZ: return floor(q);
    case RND_RM: return negative ? ceil(q) : floor(q);
    case RND_RP: return negative ? floor(q) : ceil(q);
    case RND_RNA: return floor(q + 0.5);
    default: return rint(q);
    }
}

/* x in a format of `mant` mantissa bits and exponent bias `bias`, in the low bits. */
static u16 shorten(double x, int mant, int bias, Rounding mode) {
    bool negative = signbit(x);
    u32 infinity = (u32)(2 * bias + 1) << mant, sign = negative ? 0x8000 : 0, bits;
    if (x != x) return 0x7fff;
    x = fabs(x);
    if (isinf(x)) return (u16)(sign | infinity);
    int e = x == 0 ? 1 - bias : ilogb(x);
    e = e < 1 - bias ? 1 - bias : e;
    double q = round_to_mode(ldexp(x, mant - e), negative, mode);
    bits = (u32)(e + bias - 1) << mant; /* q holds the leading one of normal numbers itself */
    bits = e + bias > 2 * bias + 1 ? infinity : bits + (u32)q;
    if (bits >= infinity) {
        bool down = mode == RND_RZ || (mode == RND_RM && !negative) || (mode == RND_RP && negative);
        bits = down ? infinity - 1 : infinity;
    }
    return (u16)(sign | bits);
}

float half_to_float(u16 h) {
    return _cvtsh_ss(h);
}

u16 float_to_half(float f, Rounding mode) {
    if (mode == RND_RN || mode == RND_NONE)
        return f == f ? (u16)_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT) : 0x7fff;
    return shorten((double)f, 10, 15, mode);
}

u16 double_to_half(double d) {
    return shorten(d, 10, 15, RND_RN);
}

float bf16_to_float(u16 h) {
    u32 u = (u32)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

u16 float_to_bf16(float f, Rounding mode) {
    u32 u;
    memcpy(&u, &f, 4);
    if (f != f) return 0x7fff;
    if (mode == RND_RN || mode == RND_NONE) return (u16)((u + 0x7fff + (u >> 16 & 1)) >> 16);
    return shorten((double)f, 7, 127, mode);
}

/* ------------------------------------------------------------------------------------------------
 * cvt */

/* The source of lane l as a 64-bit integer. */
static s64 int_source(const Warp *w, const Inst *i, u32 l) {
    const void *a = src(w, i, 0);
    u64 v = i->wide_src ? ((const u64 *)a)[l] : ((const u32 *)a)[l];
    switch (i->type2) {
    case T_U8: case T_B8: return (s64)(u8)v;
    case T_S8: return (s64)(int8_t)v;
    case T_U16: case T_B16: return (s64)(u16)v;
    case T_S16: return (s64)(int16_t)v;
    case T_U32: case T_B32: return (s64)(u32)v;
    case T_S32: return (s64)(int32_t)v;
    default: return (s64)v;
    }
}

static double float_source(const Warp *w, const Inst *i, u32 l) {
    const void *a = src(w, i, 0);
    float f;
    switch (i->type2) {
    case T_F16: return (double)half_to_float((u16)((const u32 *)a)[l]);
    case T_BF16: return (double)bf16_to_float((u16)((const u32 *)a)[l]);
    case T_F64: return ((const double *)a)[l];
    default:
        f = ((const float *)a)[l];
        return i->ftz && fabsf(f) < 0x1p-126f ? copysignf(0, f) : f;
    }
}

/* Stores into a 32-bit or 64-bit register. */
static void put(const Warp *w, const Inst *i, u32 l, u64 v) {
    void *d = slot(w, i->dst[0]);
    if (i->wide_dst)
        ((u64 *)d)[l] = v;
    else
        ((u32 *)d)[l] = (u32)v;
}

/* Integer results: truncated to the type, then extended to the register as the type's sign says. */
static void put_int(const Warp *w, const Inst *i, u32 l, u64 v) {
    switch (i->type) {
    case T_U8: case T_B8: v = (u8)v; break;
    case T_S8: v = (u64)(s64)(int8_t)v; break;
    case T_U16: case T_B16: v = (u16)v; break;
    case T_S16: v = (u64)(s64)(int16_t)v; break;
    case T_U32: case T_B32: v = (u32)v; break;
    case T_S32: v = (u64)(s64)(int32_t)v; break;
    default: break;
    }
    put(w, i, l, v);
}

/* The range of an integer type. */
static double low_limit(Type t) {
    return type_is_signed(t) ? -ldexp(1, type_bytes(t) * 8 - 1) : 0;
}

static double high_limit(Type t) /* the first value too large */
{
    return ldexp(1, type_bytes(t) * 8 - type_is_signed(t));
}

HANDLER(cvt_int_int) {
    Type t = (Type)i->type;
    bool is_signed = type_is_signed(t), from_signed = type_is_signed((Type)i->type2);
    (void)out;
    EACH(l, w->mask) {
        s64 v = int_source(w, i, l);
        if (i->sat) {
            int bits = type_bytes(t) * 8;
            s64 low = is_signed ? INT64_MIN >> (64 - bits) : 0;
            u64 high = ~0ull >> (64 - bits + is_signed);
            if (from_signed ? v < low : false)
                v = low;
            else if ((!from_signed || v > 0) && (u64)v > high)
                v = (s64)high;
        }
        put_int(w, i, l, (u64)v);
    }
}

/* Rounding to an integer value, by the .rni family. */
static double integral(double x, u8 mode) {
    switch (mode) {
    case RND_RZI: case RND_RZ: return trunc(x);
    case RND_RMI: case RND_RM: return floor(x);
    case RND_RPI: case RND_RP: return ceil(x);
    default: return rint(x);
    }
}

/* Out-of-range values saturate, NaN gives 0 (for 64-bit results the sign bit alone). */
HANDLER(cvt_float_int) {
    Type t = (Type)i->type;
    (void)out;
    EACH(l, w->mask) {
        double x = integral(float_source(w, i, l), i->round);
        u64 max = ~0ull >> (64 - type_bytes(t) * 8 + type_is_signed(t));
        u64 v;
        if (x != x)
            v = type_bytes(t) == 8 ? 1ull << 63 : 0;
        else if (x >= high_limit(t))
            v = max;
        else if (x < low_limit(t))
            v = type_is_signed(t) ? ~max : 0;
        else
            v = x < 0 ? (u64)(s64)x : (u64)x;
        put_int(w, i, l, v);
    }
}

/* Rounds to the destination type. */
static void put_float(const Warp *w, const Inst *i, u32 l, double x) {
    float f;
    u64 bits = 0;
    switch (i->type) {
    case T_F16: put(w, i, l, shorten(x, 10, 15, (Rounding)i->round)); return;
    case T_BF16: put(w, i, l, shorten(x, 7, 127, (Rounding)i->round)); return;
    case T_F64:
        memcpy(&bits, &x, 8);
        put(w, i, l, x == x ? bits : 0x7fffffffffffffff);
        return;
    default:
        f = (float)x; /* in the mode that run_wrapped has set */
        if (i->ftz && fabsf(f) < 0x1p-126f) f = copysignf(0, f);
        memcpy(&bits, &f, 4);
        put(w, i, l, f == f ? bits : CANON_NAN);
    }
}

HANDLER(cvt_int_float) {
    (void)out;
    EACH(l, w->mask) {
        s64 v = int_source(w, i, l);
        bool big = i->type2 == T_U64 && v < 0;
        if (i->type == T_F32) { /* from 64 bits in one rounding */
            float f = big ? (float)(u64)v : (float)v;
            put_float(w, i, l, (double)f);
        } else {
            put_float(w, i, l, big ? (double)(u64)v : (double)v);
        }
    }
}

HANDLER(cvt_float_float) {
    (void)out;
    EACH(l, w->mask) {
        double x = float_source(w, i, l);
        if (i->round >= RND_RNI) x = integral(x, i->round);
        if (i->sat) x = x > 0 ? x < 1 ? x : 1 : 0;
        if (i->relu && (x < 0 || (x == 0 && signbit(x)))) x = 0;
        put_float(w, i, l, x);
    }
}

/* The frequent conversions, a vector at a time. */
#define QUICK(name, S, D, expression)                                                             \
    HANDLER(name)                                                                                 \
    {                                                                                             \
        const S *a = src(w, i, 0);                                                                \
        D *d = out;                                                                               \
        LANES {                                                                                   \
            S x = a[l];                                                                           \
            d[l] = (D)(expression);                                                               \
        }                                                                                         \
    }

QUICK(cvt_32_u64, u32, u64, x)
QUICK(cvt_32_s64, int32_t, s64, x)
QUICK(cvt_64_32, u64, u32, x)
QUICK(cvt_same_32, u32, u32, x)
QUICK(cvt_low_u16, u32, u32, (u16)x)
QUICK(cvt_low_s16, u32, u32, (int32_t)(int16_t)x)
QUICK(cvt_low_u8, u32, u32, (u8)x)
QUICK(cvt_low_s8, u32, u32, (int32_t)(int8_t)x)
QUICK(cvt_s32_f32, int32_t, float, x)
QUICK(cvt_s8_f32, int32_t, float, (int8_t)x)
QUICK(cvt_u8_f32, u32, float, (u8)x)
QUICK(cvt_u16_f32, u32, float, (u16)x)
QUICK(cvt_bf16_f32, u32, u32, x << 16)

HANDLER(cvt_f32_s32_quick) /* .rni and .rzi */
{
    const float *a = src(w, i, 0);
    int32_t *d = out;
    const __m256 top = _mm256_set1_ps(0x1p31f);
    for (int k = 0; k < 4; k++) {
        __m256 x = _mm256_loadu_ps(a + 8 * k);
        __m256i r = i->round == RND_RZI ? _mm256_cvttps_epi32(x) : _mm256_cvtps_epi32(x);
        __m256i high = _mm256_castps_si256(_mm256_cmp_ps(x, top, _CMP_GE_OQ));
        __m256i number = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_ORD_Q));
        r = _mm256_and_si256(_mm256_xor_si256(r, high), number); /* 0x80000000 -> 0x7fffffff */
        _mm256_storeu_si256((void *)(d + 8 * k), r);
    }
}

/* Conversions between integers without saturation. */
static Handler *quick_int(const Inst *i) {
    int to = type_bytes((Type)i->type), from = type_bytes((Type)i->type2);
    bool sign = type_is_signed((Type)i->type2);
    if (to == 8 && from == 4 && i->wide_dst && !i->wide_src) return sign ? cvt_32_s64 : cvt_32_u64;
    if (to == 4 && from == 8 && !i->wide_dst && i->wide_src) return cvt_64_32;
    if (i->wide_dst || i->wide_src || to > 4 || from > 4) return NULL;
    if (to == 4 && from == 4) return cvt_same_32;
    if (from == 2 && to == 4) return sign ? cvt_low_s16 : cvt_low_u16;
    if (from == 1 && to >= 2) return sign ? cvt_low_s8 : cvt_low_u8;
    if (to == 2) return type_is_signed((Type)i->type) ? cvt_low_s16 : cvt_low_u16;
    return type_is_signed((Type)i->type) ? cvt_low_s8 : cvt_low_u8;
}

/* The vector version of a conversion, if there is one. */
static Handler *quick(const Inst *i) {
    bool float_to = type_is_float((Type)i->type), float_from = type_is_float((Type)i->type2);
    bool nearest = i->round == RND_RN || i->round == RND_NONE;
    if (i->sat || i->ftz || i->relu) return NULL;
    if (!float_to && !float_from) return quick_int(i);
    if (i->wide_src || i->wide_dst) return NULL;
    if (i->type == T_S32 && i->type2 == T_F32 && (i->round == RND_RNI || i->round == RND_RZI))
        return cvt_f32_s32_quick;
    if (i->type != T_F32 || !nearest) return NULL;
    return i->type2 == T_S32 ? cvt_s32_f32 : i->type2 == T_S8 ? cvt_s8_f32
         : i->type2 == T_U8 ? cvt_u8_f32 : i->type2 == T_U16 ? cvt_u16_f32
         : i->type2 == T_BF16 ? cvt_bf16_f32 : NULL;
}

/* Refuses what PTX does not define, such as a narrowing without a rounding mode. */
static Handler *choose_cvt(Inst *i) {
    bool float_to = type_is_float((Type)i->type), float_from = type_is_float((Type)i->type2);
    bool integer_mode = i->round >= RND_RNI, plain_mode = i->round && !integer_mode;
    bool narrow = type_bytes((Type)i->type) < type_bytes((Type)i->type2);
    if (float_from && !float_to && !i->round)
        return NULL; /* needs a rounding mode */
    if (float_to && !float_from && !plain_mode) return NULL;
    if (float_to && float_from && ((narrow && !plain_mode) || i->round == RND_RNA)) return NULL;
    if (!float_to && !float_from && i->round) return NULL;
    if (float_to && type_bytes((Type)i->type) == 2 && type_bytes((Type)i->type2) == 8 &&
        !float_from)
        return NULL; /* two roundings would be needed */
    Handler *h = quick(i);
    if (h) {
        i->out_bits = i->wide_dst ? 64 : 32;
        return h;
    }
    h = float_to ? float_from ? cvt_float_float : cvt_int_float
                 : float_from ? cvt_float_int : cvt_int_int;
    if (i->round == RND_RZ || i->round == RND_RM || i->round == RND_RP) {
        i->inner = h;
        h = i->type == T_F32 ? run_wrapped : h;
        i->sat = i->type == T_F32 ? false : i->sat;
    }
    return h;
}

/* d = {a, b}: a in the high half. */
HANDLER(cvt_pair) {
    const float *a = src(w, i, 0), *b = src(w, i, 1);
    u32 *d = out;
    for (int l = 0; l < 32; l++) {
        float x = i->relu && !(a[l] > 0) && a[l] == a[l] ? 0 : a[l];
        float y = i->relu && !(b[l] > 0) && b[l] == b[l] ? 0 : b[l];
        Rounding r = (Rounding)i->round;
        d[l] = i->type == T_F16X2 ? (u32)float_to_half(x, r) << 16 | float_to_half(y, r)
                                  : (u32)float_to_bf16(x, r) << 16 | float_to_bf16(y, r);
    }
}

static u32 clamp_int(int32_t v, Type t) {
    int bits = type_bytes(t) * 8;
    bool is_signed = type_is_signed(t);
    int32_t low = is_signed ? -(1 << (bits - 1)) : 0, high = (1 << (bits - is_signed)) - 1;
    v = v < low ? low : v > high ? high : v;
    return (u32)v & ((1u << bits) - 1);
}

HANDLER(cvt_pack) {
    const int32_t *a = src(w, i, 0), *b = src(w, i, 1);
    const u32 *c = src(w, i, 2);
    u32 *d = out;
    Type t = (Type)i->type;
    for (int l = 0; l < 32; l++) {
        u32 bits = (u32)type_bytes(t) * 8, v = clamp_int(a[l], t) << bits | clamp_int(b[l], t);
        d[l] = i->n_src > 2 ? c[l] << 16 | v : v;
    }
}

/* ------------------------------------------------------------------------------------------------
 * half arithmetic */

/* a b + c as a double whose last bit is odd whenever the sum is inexact; a b is exact. */
static double fma_odd(double a, double b, double c) {
    double p = a * b, s = p + c, t = s - p;
    double error = (p - (s - t)) + (c - t);
    if (error != 0 && isfinite(s)) {
        s64 bits;
        memcpy(&bits, &s, 8);
        if (!(bits & 1)) {
            bits += (error > 0) == (s > 0) ? 1 : -1;
            memcpy(&s, &bits, 8);
        }
    }
    return s;
}

typedef enum { H_ADD, H_SUB, H_MUL, H_FMA, H_MIN, H_MAX, H_EX2, H_TANH } HalfOp;

/* The number if one is NaN, unless .NaN. */
static double min_max(double x, double y, bool max, bool nan) {
    if (x != x || y != y) return nan ? NAN : x != x ? y : x;
    if (x == y)
        return (signbit(x) != 0) != max ? x : y; /* -0 is below +0 */
    return (x < y) != max ? x : y;
}

/* One result, rounded once. */
static u16 half_value(const Inst *i, HalfOp op, bool bf16, const double v[3]) {
    double r;
    switch (op) {
    case H_ADD: r = fma_odd(v[0], 1, v[1]); break;
    case H_SUB: r = fma_odd(v[0], 1, -v[1]); break;
    case H_MUL: r = v[0] * v[1]; break;
    case H_FMA: r = fma_odd(v[0], v[1], v[2]); break;
    case H_MIN: r = min_max(v[0], v[1], false, i->nan); break;
    case H_MAX: r = min_max(v[0], v[1], true, i->nan); break;
    case H_EX2: r = exp2(v[0]); break;
    default: r = tanh(v[0]);
    }
    if (i->sat) r = r > 0 ? r < 1 ? r : 1 : 0;
    if (i->relu && (r < 0 || (r == 0 && signbit(r)))) r = 0;
    u16 h = bf16 ? shorten(r, 7, 127, RND_RN) : shorten(r, 10, 15, RND_RN);
    return i->ftz && !bf16 && !(h & 0x7c00) ? h & 0x8000 : h;
}

/* One or two halves a lane. */
static void half_lanes(Warp *w, const Inst *i, u32 *d, HalfOp op) {
    bool bf16 = i->type == T_BF16 || i->type == T_BF16X2;
    int parts = i->type == T_F16X2 || i->type == T_BF16X2 ? 2 : 1;
    EACH(l, w->mask) {
        d[l] = 0;
        for (int p = 0; p < parts; p++) {
            double v[3] = {0, 0, 0};
            for (int k = 0; k < i->n_src && k < 3; k++) {
                u16 h = (u16)(((u32 *)src(w, i, k))[l] >> (16 * p));
                if (i->ftz && !bf16 && !(h & 0x7c00)) h &= 0x8000;
                v[k] = (double)(bf16 ? bf16_to_float(h) : half_to_float(h));
            }
            d[l] |= (u32)half_value(i, op, bf16, v) << (16 * p);
        }
    }
}

HANDLER(half_add) { half_lanes(w, i, out, H_ADD); }
HANDLER(half_sub) { half_lanes(w, i, out, H_SUB); }
HANDLER(half_mul) { half_lanes(w, i, out, H_MUL); }
HANDLER(half_fma) { half_lanes(w, i, out, H_FMA); }
HANDLER(half_min) { half_lanes(w, i, out, H_MIN); }
HANDLER(half_max) { half_lanes(w, i, out, H_MAX); }
HANDLER(half_ex2) { half_lanes(w, i, out, H_EX2); }
HANDLER(half_tanh) { half_lanes(w, i, out, H_TANH); }

HANDLER(half_neg) {
    const u32 *a = src(w, i, 0);
    u32 *d = out, signs = i->type == T_F16X2 || i->type == T_BF16X2 ? 0x80008000 : 0x8000;
    LANES d[l] = a[l] ^ signs;
}

HANDLER(half_abs) {
    const u32 *a = src(w, i, 0);
    u32 *d = out, signs = i->type == T_F16X2 || i->type == T_BF16X2 ? 0x80008000 : 0x8000;
    LANES d[l] = a[l] & ~signs;
}

#define INTS ".u8|.s8|.u16|.s16|.u32|.s32|.u64|.s64"
#define FLOATS ".f16|.bf16|.f32|.f64"
#define MODES "[.rn|.rz|.rm|.rp|.rni|.rzi|.rmi|.rpi]"

const Form cvt_forms[] = {
    {"cvt .rn|.rz [.relu] .bf16x2|.f16x2 .f32", "dtt", SIM_C_CVT, 32, cvt_pair},
    {"cvt .pack .sat .u8|.s8 .s32 .b32", "uwww", SIM_C_CVT, 32, cvt_pack},
    {"cvt .pack .sat .u16|.s16 .s32", "uww", SIM_C_CVT, 32, cvt_pack},
    {"cvt " MODES " [.ftz] [.sat] [.relu] " INTS "|" FLOATS " " INTS "|" FLOATS, "Dt", SIM_C_CVT,
     0, .choose = choose_cvt},
    {0},
};
const Form half_forms[] = {
    {"add [.rn] [.ftz] [.sat] .f16|.f16x2", "daa", SIM_C_HALF, 32, half_add},
    {"sub [.rn] [.ftz] [.sat] .f16|.f16x2", "daa", SIM_C_HALF, 32, half_sub},
    {"mul [.rn] [.ftz] [.sat] .f16|.f16x2", "daa", SIM_C_HALF, 32, half_mul},
    {"fma .rn [.ftz] [.sat|.relu] .f16|.f16x2", "daaa", SIM_C_HALF, 32, half_fma},
    {"fma .rn [.relu] .bf16|.bf16x2", "daaa", SIM_C_HALF, 32, half_fma},
    {"min [.ftz] [.NaN] .f16|.f16x2|.bf16|.bf16x2", "daa", SIM_C_HALF, 32, half_min},
    {"max [.ftz] [.NaN] .f16|.f16x2|.bf16|.bf16x2", "daa", SIM_C_HALF, 32, half_max},
    {"neg [.ftz] .f16|.f16x2|.bf16|.bf16x2", "da", SIM_C_HALF, 32, half_neg},
    {"abs [.ftz] .f16|.f16x2|.bf16|.bf16x2", "da", SIM_C_HALF, 32, half_abs},
    {"ex2 .approx .f16|.f16x2", "da", SIM_C_HALF, 32, half_ex2},
    {"ex2 .approx .ftz .bf16|.bf16x2", "da", SIM_C_HALF, 32, half_ex2},
    {"tanh .approx .f16|.f16x2|.bf16|.bf16x2", "da", SIM_C_HALF, 32, half_tanh},
    {0},
};
