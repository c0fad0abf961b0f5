/* exec_cvt.c: conversions between types (PTX ISA, "Data Movement and Conversion Instructions:
 * cvt"), and f16 / bf16 arithmetic ("Half Precision Floating-Point Instructions").
 *
 * A half result is the exact value rounded once: sums and products of halves are computed in double
 * with round-to-odd, after which a second rounding to a short format is harmless. */
#include "ptx.h"

#include <math.h>

/* ---- short formats */

/* To an integer value, in the mode of a float (.rn ...) or of an integer result (.rni ...). */
static double integral(double x, u8 mode) {
    switch (mode) {
    case RND_RZ: case RND_RZI: return trunc(x);
    case RND_RM: case RND_RMI: return floor(x);
    case RND_RP: case RND_RPI: return ceil(x);
    case RND_RNA: return trunc(x + copysign(0.5, x));
    default: return rint(x);
    }
}

/* x in a format of `mant` mantissa bits and exponent bias `bias`, in the low bits. */
static u16 shorten(double x, int mant, int bias, u8 mode) {
    u32 infinity = (u32)(2 * bias + 1) << mant, sign = signbit(x) ? 0x8000 : 0;
    if (x != x) return 0x7fff;
    if (isinf(x)) return (u16)(sign | infinity);
    int e = x == 0 ? 1 - bias : ilogb(x);
    e = e < 1 - bias ? 1 - bias : e;
    double q = fabs(integral(ldexp(x, mant - e), mode)); /* with a normal number's leading one */
    u32 bits = e > bias ? infinity : ((u32)(e + bias - 1) << mant) + (u32)q;
    bool down = mode == RND_RZ || mode == (sign ? RND_RP : RND_RM);
    return (u16)(sign | (bits < infinity ? bits : down ? infinity - 1 : infinity));
}

float half_to_float(u16 h) {
    return _cvtsh_ss(h);
}

u16 float_to_half(float f, Rounding mode) {
    if (mode == RND_RN || mode == RND_NONE)
        return f == f ? (u16)_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT) : 0x7fff;
    return shorten((double)f, 10, 15, mode);
}

float bf16_to_float(u16 h) {
    return bits_float((u32)h << 16);
}

static u16 float_to_bf16(float f, Rounding mode) {
    u32 u = float_bits(f);
    if (f != f) return 0x7fff;
    if (mode == RND_RN || mode == RND_NONE) return (u16)((u + 0x7fff + (u >> 16 & 1)) >> 16);
    return shorten((double)f, 7, 127, mode);
}

/* ---- cvt, one lane after the other: any type to any other */

static double number_of(const Inst *i, u64 lane) {
    float f = bits_float((u32)lane);
    switch (i->type2) {
    case T_F16: return (double)half_to_float((u16)lane);
    case T_BF16: return (double)bf16_to_float((u16)lane);
    case T_F64: return bits_double(lane);
    default: return i->ftz && fabsf(f) < 0x1p-126f ? copysignf(0, f) : f;
    }
}

/* The bits of x, rounded to the destination type; f32 in the mode that run_wrapped has set. */
static u64 float_result(const Inst *i, double x) {
    float f = (float)x;
    switch (i->type) {
    case T_F16: return shorten(x, 10, 15, i->round);
    case T_BF16: return shorten(x, 7, 127, i->round);
    case T_F64: return x == x ? double_bits(x) : CANON_NAN64;
    default:
        if (i->ftz && fabsf(f) < 0x1p-126f) f = copysignf(0, f);
        return f == f ? float_bits(f) : CANON_NAN;
    }
}

/* .sat between integers: the nearest value that the type has. */
static s64 clamp_integer(Type t, s64 v, bool from_signed) {
    int bits = type_bytes(t) * 8;
    s64 low = type_is_signed(t) ? INT64_MIN >> (64 - bits) : 0;
    u64 high = ~0ull >> (64 - bits + type_is_signed(t));
    if (from_signed && v < low) return low;
    return (!from_signed || v > 0) && (u64)v > high ? (s64)high : v;
}

/* Out-of-range values saturate, NaN gives 0 (for 64-bit results the sign bit alone). */
static s64 float_to_integer(Type t, double x) {
    int bits = type_bytes(t) * 8, is_signed = type_is_signed(t);
    u64 max = ~0ull >> (64 - bits + is_signed);
    if (x != x) return bits == 64 ? INT64_MIN : 0;
    if (x >= ldexp(1, bits - is_signed)) return (s64)max;
    if (x < (is_signed ? -ldexp(1, bits - 1) : 0)) return is_signed ? (s64)~max : 0;
    return x < 0 ? (s64)x : (s64)(u64)x;
}

/* A 64-bit integer goes to f32 in one rounding. */
static double integer_to_float(const Inst *i, s64 v) {
    bool big = i->type2 == T_U64 && v < 0;
    if (i->type == T_F32) return (double)(big ? (float)(u64)v : (float)v);
    return big ? (double)(u64)v : (double)v;
}

static double float_to_float(const Inst *i, double x) {
    if (i->round >= RND_RNI) x = integral(x, i->round);
    if (i->sat) x = x > 0 ? x < 1 ? x : 1 : 0;
    return i->relu && (x < 0 || (x == 0 && signbit(x))) ? 0 : x;
}

HANDLER(cvt_any) {
    Type t = i->type, t2 = i->type2;
    EACH(l, w->mask) {
        u64 v = get_lane(src(w, i, 0), i->wide_src, l);
        if (type_is_float(t) && type_is_float(t2))
            v = float_result(i, float_to_float(i, number_of(i, v)));
        else if (type_is_float(t))
            v = float_result(i, integer_to_float(i, integer_of(t2, v)));
        else if (type_is_float(t2))
            v = (u64)float_to_integer(t, integral(number_of(i, v), i->round));
        else
            v = i->sat ? (u64)clamp_integer(t, integer_of(t2, v), type_is_signed(t2))
                       : (u64)integer_of(t2, v);
        if (!type_is_float(t)) v = (u64)integer_of(t, v); /* fills the register as its sign says */
        put_lane(slot(w, i->dst[0]), i->wide_dst, l, v);
    }
}

/* ---- the frequent conversions, a vector at a time */

OP(cvt_u64_u32, u64, u32, u32, u32, x)
OP(cvt_s64_s32, s64, s32, u32, u32, x)
OP(cvt_u32_u64, u32, u64, u32, u32, x)
OP(cvt_u32_u32, u32, u32, u32, u32, x)
OP(cvt_u32_u16, u32, u16, u32, u32, x)
OP(cvt_s32_s16, s32, s16, u32, u32, x)
OP(cvt_u32_u8, u32, u8, u32, u32, x)
OP(cvt_s32_s8, s32, s8, u32, u32, x)
OP(cvt_f32_s32, f32, s32, u32, u32, x)
OP(cvt_f32_s8, f32, s8, u32, u32, x)
OP(cvt_f32_u8, f32, u8, u32, u32, x)
OP(cvt_f32_u16, f32, u16, u32, u32, x)
OP(cvt_f32_bf16, u32, u32, u32, u32, x << 16)

HANDLER(cvt_s32_f32) { /* .rni and .rzi */
    const float *a = src(w, i, 0);
    s32 *d = out;
    const __m256 top = _mm256_set1_ps(0x1p31f);
    for (int k = 0; k < 32; k += 8) {
        __m256 x = _mm256_loadu_ps(a + k);
        __m256i r = i->round == RND_RZI ? _mm256_cvttps_epi32(x) : _mm256_cvtps_epi32(x);
        __m256i high = _mm256_castps_si256(_mm256_cmp_ps(x, top, _CMP_GE_OQ));
        __m256i number = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_ORD_Q));
        r = _mm256_and_si256(_mm256_xor_si256(r, high), number); /* 0x80000000 -> 0x7fffffff */
        _mm256_storeu_si256((void *)(d + k), r);
    }
}

/* Conversions between integers without saturation: extension from, or to, the narrower type. */
static Handler *quick_int(const Inst *i) {
    int to = type_bytes(i->type), from = type_bytes(i->type2);
    int narrow = from < to ? from : to;
    bool sign = type_is_signed((from < to ? i->type2 : i->type));
    if (to == 8 && from == 4 && i->wide_dst && !i->wide_src)
        return sign ? cvt_s64_s32 : cvt_u64_u32;
    if (to == 4 && from == 8 && !i->wide_dst && i->wide_src) return cvt_u32_u64;
    if (i->wide_dst || i->wide_src || to > 4 || from > 4) return NULL;
    if (narrow == 4) return cvt_u32_u32;
    if (narrow == 2) return sign ? cvt_s32_s16 : cvt_u32_u16;
    return sign ? cvt_s32_s8 : cvt_u32_u8;
}

/* The vector version of a conversion, if there is one. */
static Handler *quick(const Inst *i) {
    bool nearest = i->round == RND_RN || i->round == RND_NONE;
    if (i->sat || i->ftz || i->relu) return NULL;
    if (!type_is_float(i->type) && !type_is_float(i->type2)) return quick_int(i);
    if (i->wide_src || i->wide_dst) return NULL;
    if (i->type == T_S32 && i->type2 == T_F32 && (i->round == RND_RNI || i->round == RND_RZI))
        return cvt_s32_f32;
    if (i->type != T_F32 || !nearest) return NULL;
    return i->type2 == T_S32 ? cvt_f32_s32 : i->type2 == T_S8 ? cvt_f32_s8
         : i->type2 == T_U8 ? cvt_f32_u8 : i->type2 == T_U16 ? cvt_f32_u16
         : i->type2 == T_BF16 ? cvt_f32_bf16 : NULL;
}

/* Refuses what PTX does not define: a float result that may be inexact needs a rounding mode (.rn
 * ...), an integer from a float one of its own (.rni ...), integers take none. */
static Handler *choose_cvt(Inst *i) {
    bool to_float = type_is_float(i->type), from_float = type_is_float(i->type2);
    bool float_mode = i->round && i->round < RND_RNI;
    int to = type_bytes(i->type), from = type_bytes(i->type2);
    if (!to_float && from_float != (i->round != RND_NONE)) return NULL;
    if (to_float && !from_float && (!float_mode || (to == 2 && from == 8)))
        return NULL; /* (two roundings would be needed) */
    if (to_float && from_float && ((to < from && !float_mode) || i->round == RND_RNA)) return NULL;
    Handler *h = quick(i);
    if (h) {
        i->out_bits = i->wide_dst ? 64 : 32;
        return h;
    }
    if (i->type == T_F32 && (i->round == RND_RZ || i->round == RND_RM || i->round == RND_RP)) {
        i->inner = cvt_any;
        return run_wrapped;
    }
    return cvt_any;
}

/* d = {a, b}: a in the high half. */
HANDLER(cvt_pair) {
    const float *a = src(w, i, 0), *b = src(w, i, 1);
    u32 *d = out;
    for (int l = 0; l < 32; l++) {
        float x = i->relu && !(a[l] > 0) && a[l] == a[l] ? 0 : a[l];
        float y = i->relu && !(b[l] > 0) && b[l] == b[l] ? 0 : b[l];
        Rounding r = i->round;
        d[l] = i->type == T_F16X2 ? (u32)float_to_half(x, r) << 16 | float_to_half(y, r)
                                  : (u32)float_to_bf16(x, r) << 16 | float_to_bf16(y, r);
    }
}

/* ---- half arithmetic */

/* a b + c as a double whose last bit is odd whenever the sum is inexact; a b is exact. */
static double fma_odd(double a, double b, double c) {
    double p = a * b, s = p + c, t = s - p;
    double error = (p - (s - t)) + (c - t);
    u64 bits = double_bits(s);
    if (error == 0 || !isfinite(s) || bits & 1) return s;
    return bits_double((error > 0) == (s > 0) ? bits + 1 : bits - 1);
}

typedef enum { H_ADD, H_SUB, H_MUL, H_FMA, H_MIN, H_MAX } HalfOp;

/* The number if one is NaN, unless .NaN. */
static double min_max(double x, double y, bool max, bool nan) {
    if (x != x || y != y) return nan ? NAN : x != x ? y : x;
    if (x == y)
        return (signbit(x) != 0) != max ? x : y; /* -0 is below +0 */
    return (x < y) != max ? x : y;
}

static double half_value(const Inst *i, const double v[3]) {
    switch ((HalfOp)i->arg) {
    case H_ADD: return fma_odd(v[0], 1, v[1]);
    case H_SUB: return fma_odd(v[0], 1, -v[1]);
    case H_MUL: return v[0] * v[1];
    case H_FMA: return fma_odd(v[0], v[1], v[2]);
    case H_MIN: return min_max(v[0], v[1], false, i->nan);
    default: return min_max(v[0], v[1], true, i->nan); /* H_MAX */
    }
}

static bool is_pair(const Inst *i) {
    return i->type == T_F16X2 || i->type == T_BF16X2;
}

/* One or two halves a lane, each result rounded once; .ftz is for f16 only. */
HANDLER(half_any) {
    bool bf16 = i->type == T_BF16 || i->type == T_BF16X2, flush = i->ftz && !bf16;
    u32 *d = out;
    EACH(l, w->mask) {
        d[l] = 0;
        for (int p = 0; p <= is_pair(i); p++) {
            double v[3] = {0, 0, 0};
            for (int k = 0; k < i->n_src; k++) {
                u16 h = (u16)(((u32 *)src(w, i, k))[l] >> (16 * p));
                if (flush && !(h & 0x7c00)) h &= 0x8000;
                v[k] = (double)(bf16 ? bf16_to_float(h) : half_to_float(h));
            }
            double r = half_value(i, v);
            if (i->sat) r = r > 0 ? r < 1 ? r : 1 : 0;
            if (i->relu && (r < 0 || (r == 0 && signbit(r)))) r = 0;
            u16 h = bf16 ? shorten(r, 7, 127, RND_RN) : shorten(r, 10, 15, RND_RN);
            if (flush && !(h & 0x7c00)) h &= 0x8000;
            d[l] |= (u32)h << (16 * p);
        }
    }
}

OP(half_neg, u32, u32, u32, u32, x ^ (is_pair(i) ? 0x80008000 : 0x8000))
OP(half_abs, u32, u32, u32, u32, x & ~(is_pair(i) ? 0x80008000 : 0x8000))

#define INTS ".u8|.s8|.u16|.s16|.u32|.s32|.u64|.s64"
#define FLOATS ".f16|.bf16|.f32|.f64"
#define HALVES ".f16|.f16x2|.bf16|.bf16x2"
#define MODES "[.rn|.rz|.rm|.rp|.rni|.rzi|.rmi|.rpi]"

const Form cvt_forms[] = {
    {"cvt .rn|.rz [.relu] .bf16x2|.f16x2 .f32", "dtt", SIM_C_CVT, 32, cvt_pair},
    {"cvt " MODES " [.ftz] [.sat] [.relu] " INTS "|" FLOATS " " INTS "|" FLOATS, "Dt", SIM_C_CVT,
     0, .choose = choose_cvt},
    {"add [.rn] [.ftz] [.sat] .f16|.f16x2", "daa", SIM_C_HALF, 32, half_any, H_ADD},
    {"sub [.rn] [.ftz] [.sat] .f16|.f16x2", "daa", SIM_C_HALF, 32, half_any, H_SUB},
    {"mul [.rn] [.ftz] [.sat] .f16|.f16x2", "daa", SIM_C_HALF, 32, half_any, H_MUL},
    {"fma .rn [.ftz] [.sat|.relu] .f16|.f16x2", "daaa", SIM_C_HALF, 32, half_any, H_FMA},
    {"fma .rn [.relu] .bf16|.bf16x2", "daaa", SIM_C_HALF, 32, half_any, H_FMA},
    {"min [.ftz] [.NaN] " HALVES, "daa", SIM_C_HALF, 32, half_any, H_MIN},
    {"max [.ftz] [.NaN] " HALVES, "daa", SIM_C_HALF, 32, half_any, H_MAX},
    {"neg [.ftz] " HALVES, "da", SIM_C_HALF, 32, half_neg},
    {"abs [.ftz] " HALVES, "da", SIM_C_HALF, 32, half_abs},
    {0},
};
