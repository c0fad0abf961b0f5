/* exec_alu.c: arithmetic and logic on registers: integers, f32, f64, predicates, moves (PTX ISA,
 * "Instruction Set": integer, floating-point, comparison, logic and shift, data movement).
 *
 * Each instruction is one expression of x, y, z (see OP in ptx.h), made into a handler for every
 * type that it exists for; the table at the end says which opcode takes which. NaN results are the
 * canonical NaN, as on hardware. */
#include "ptx.h"

#include <math.h>

typedef __int128 s128;
typedef unsigned __int128 u128;

/* ---- integers. Results are modulo 2^bits. */

/* One expression for all sizes, where the sign does not matter; for all types, where it does. */
#define INT3(name, expression)                                                                    \
    OP(name##_16, u16, u16, u16, u16, expression)                                                 \
    OP(name##_32, u32, u32, u32, u32, expression)                                                 \
    OP(name##_64, u64, u64, u64, u64, expression)
#define INT6(name, expression)                                                                    \
    OP(name##_u16, u16, u16, u16, u16, expression)                                                \
    OP(name##_s16, u16, s16, s16, s16, expression)                                                \
    OP(name##_u32, u32, u32, u32, u32, expression)                                                \
    OP(name##_s32, u32, s32, s32, s32, expression)                                                \
    OP(name##_u64, u64, u64, u64, u64, expression)                                                \
    OP(name##_s64, u64, s64, s64, s64, expression)

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
OP(mul_hi_u16, u16, u16, u16, u16, (u32)x * y >> 16)
OP(mul_hi_s16, u16, s16, s16, s16, x * y >> 16)
OP(mul_hi_u32, u32, u32, u32, u32, (u64)x * y >> 32)
OP(mul_hi_s32, u32, s32, s32, s32, (s64)x * y >> 32)
OP(mul_hi_u64, u64, u64, u64, u64, (u128)x * y >> 64)
OP(mul_hi_s64, u64, s64, s64, s64, (s128)x * y >> 64)
OP(mul_wide_u16, u32, u16, u16, u32, (u32)x * y)
OP(mul_wide_s16, u32, s16, s16, u32, x * y)
OP(mul_wide_u32, u64, u32, u32, u64, (u64)x * y)
OP(mul_wide_s32, u64, s32, s32, u64, (s64)x * y)
OP(mad_wide_u16, u32, u16, u16, u32, (u32)x * y + z)
OP(mad_wide_s16, u32, s16, s16, u32, (u32)(x * y) + z)
OP(mad_wide_u32, u64, u32, u32, u64, (u64)x * y + z)
OP(mad_wide_s32, u64, s32, s32, u64, (u64)((s64)x * y) + z)

/* The wider type keeps the lowest number divided by -1 from trapping. */
#define DIVIDE(name, op)                                                                          \
    OP(name##_u16, u16, u16, u16, u16, y ? x op y : ~0)                                           \
    OP(name##_s16, u16, s16, s16, s16, y ? x op y : ~0)                                           \
    OP(name##_u32, u32, u32, u32, u32, y ? x op y : ~0u)                                          \
    OP(name##_s32, u32, s32, s32, s32, y ? (s64)x op y : ~0)                                      \
    OP(name##_u64, u64, u64, u64, u64, y ? x op y : ~0ull)                                        \
    OP(name##_s64, u64, s64, s64, s64, y ? (s128)x op y : ~0)

DIVIDE(div, /)
DIVIDE(rem, %)

/* Division by zero is undefined in PTX: a finding; the lane gets all ones. */
HANDLER(run_divide) {
    EACH(l, w->mask)
        if (!integer_of(i->type, get_lane(src(w, i, 1), type_bytes(i->type) == 8, l))) {
            finding(w, SIM_DIV_ZERO, (int)l, 0, "integer division by zero");
            break;
        }
    i->inner(w, i, out);
}

/* ---- bits. The second operand of a shift is 32 bits wide whatever the type; shifts by the width
 * or more give zeros, or sign bits. */

OP(shl_16, u16, u16, u32, u32, y < 16 ? x << (y & 15) : 0)
OP(shl_32, u32, u32, u32, u32, y < 32 ? x << (y & 31) : 0)
OP(shl_64, u64, u64, u32, u32, y < 64 ? x << (y & 63) : 0)
OP(shr_u16, u16, u16, u32, u32, y < 16 ? x >> (y & 15) : 0)
OP(shr_u32, u32, u32, u32, u32, y < 32 ? x >> (y & 31) : 0)
OP(shr_u64, u64, u64, u32, u32, y < 64 ? x >> (y & 63) : 0)
OP(shr_s16, u16, s16, u32, u32, x >> (y < 15 ? y : 15))
OP(shr_s32, u32, s32, u32, u32, x >> (y < 31 ? y : 31))
OP(shr_s64, u64, s64, u32, u32, x >> (y < 63 ? y : 63))

/* shf: a shift of the pair b:a, of which .l gives the upper half and .r the lower. */
static inline u32 funnel(const Inst *i, u32 low, u32 high, u32 by) {
    u32 n = i->wrap ? by & 31 : by < 32 ? by : 32;
    u64 v = (u64)high << 32 | low;
    return i->left ? (u32)(v << n >> 32) : (u32)(v >> n);
}

static u32 find_msb(u64 v, int bits, bool shiftamt) {
    if (!v) return ~0u;
    u32 at = 63 - (u32)__builtin_clzll(v);
    return shiftamt ? (u32)bits - 1 - at : at;
}

static u64 reverse_bits(u64 v) {
    u64 r = 0;
    for (int k = 0; k < 64; k++) r |= (v >> k & 1) << (63 - k);
    return r;
}

/* Bits [pos, pos + len) of v; above len, and beyond the value, the sign bit of a signed field. */
static u64 extract_field(u64 v, u32 bits, bool is_signed, u32 pos, u32 len) {
    pos &= 255;
    len &= 255;
    if (len == 0) return 0;
    u32 top = pos + len < bits ? pos + len - 1 : bits - 1;
    u64 sign = is_signed && v >> top & 1 ? ~0ull : 0;
    if (pos >= bits) return sign;
    u64 low = ~0ull >> (63 - (top - pos));
    return (v >> pos & low) | (sign & ~low);
}

static u64 insert_field(u64 field, u64 base, u32 bits, u32 pos, u32 len) {
    pos &= 255;
    len &= 255;
    if (pos >= bits || len == 0) return base;
    u64 low = len >= 64 ? ~0ull : (1ull << len) - 1;
    return (base & ~(low << pos)) | (field & low) << pos;
}

/* Bit k of the table is the result for the bits k = 4 x + 2 y + z. */
static inline u32 lookup3(u32 table, u32 x, u32 y, u32 z) {
    u32 r = 0;
    for (u32 k = 0; k < 8; k++)
        r |= (0 - (table >> k & 1)) & (k & 4 ? x : ~x) & (k & 2 ? y : ~y) & (k & 1 ? z : ~z);
    return r;
}

/* prmt: four bytes of the pair b:a, each named by a nibble whose top bit asks for the byte's sign
 * instead. */
static inline u32 permute(u32 a, u32 b, u32 control) {
    u64 v = (u64)b << 32 | a;
    u32 r = 0;
    for (u32 k = 0; k < 4; k++) {
        u32 byte = (u32)(v >> (control >> (4 * k) & 7) * 8) & 255;
        u32 sign = byte >> 7 ? 255 : 0;
        r |= (control >> (4 * k) & 8 ? sign : byte) << (8 * k);
    }
    return r;
}

OP(shf_32, u32, u32, u32, u32, funnel(i, x, y, z))
OP(popc_32, u32, u32, u32, u32, __builtin_popcount(x))
OP(popc_64, u32, u64, u32, u32, __builtin_popcountll(x))
OP(clz_32, u32, u32, u32, u32, x ? __builtin_clz(x) : 32)
OP(clz_64, u32, u64, u32, u32, x ? __builtin_clzll(x) : 64)
OP(bfind_u32, u32, u32, u32, u32, find_msb(x, 32, i->shiftamt))
OP(bfind_s32, u32, s32, u32, u32, find_msb((u32)(x < 0 ? ~x : x), 32, i->shiftamt))
OP(bfind_u64, u32, u64, u32, u32, find_msb(x, 64, i->shiftamt))
OP(bfind_s64, u32, s64, u32, u32, find_msb((u64)(x < 0 ? ~x : x), 64, i->shiftamt))
OP(brev_32, u32, u32, u32, u32, reverse_bits(x) >> 32)
OP(brev_64, u64, u64, u32, u32, reverse_bits(x))
OP(bfe_u32, u32, u32, u32, u32, extract_field(x, 32, false, y, z))
OP(bfe_s32, u32, u32, u32, u32, extract_field(x, 32, true, y, z))
OP(bfe_u64, u64, u64, u32, u32, extract_field(x, 64, false, y, z))
OP(bfe_s64, u64, u64, u32, u32, extract_field(x, 64, true, y, z))
OP(bfi_32, u32, u32, u32, u32, insert_field(x, y, 32, z, v))
OP(bfi_64, u64, u64, u64, u32, insert_field(x, y, 64, z, v))
OP(lop3_32, u32, u32, u32, u32, lookup3(i->vec, x, y, z))
OP(prmt_32, u32, u32, u32, u32, permute(x, y, z))

/* dp4a: c plus the products of the four bytes of a and b. Even and odd bytes become 16-bit lanes,
 * of which a multiply-add of pairs makes two products a lane each. */
HANDLER(dp4a_32) {
    const __m256i *a = src(w, i, 0), *b = src(w, i, 1), *c = src(w, i, 2);
    __m256i *d = out;
    bool sx = i->type == T_S32, sy = i->type2 == T_S32;
    for (int k = 0; k < 4; k++) {
        __m256i even = _mm256_madd_epi16(widen_byte(a[k], 0, sx), widen_byte(b[k], 0, sy));
        __m256i odd = _mm256_madd_epi16(widen_byte(a[k], 1, sx), widen_byte(b[k], 1, sy));
        d[k] = _mm256_add_epi32(c[k], _mm256_add_epi32(even, odd));
    }
}

/* ---- f32 and f64. Other rounding modes, .ftz and .sat are added around these by run_wrapped. */

static inline f32 canon_f32(f32 x) {
    return x == x ? x : bits_float(CANON_NAN);
}

static inline f64 canon_f64(f64 x) {
    return x == x ? x : bits_double(CANON_NAN64);
}

/* The operand that is a number; -0 is below +0. */
static inline f32 min_f32_of(f32 x, f32 y) {
    f32 r = x < y ? x : y;
    r = x == y ? bits_float(float_bits(x) | float_bits(y)) : r;
    return y != y ? x : r;
}

static inline f32 max_f32_of(f32 x, f32 y) {
    f32 r = x > y ? x : y;
    r = x == y ? bits_float(float_bits(x) & float_bits(y)) : r;
    return y != y ? x : r;
}

#define FLOAT(name, T, expression) OP(name##_##T, T, T, T, T, canon_##T(expression))
#define FLOATS2(name, expression) FLOAT(name, f32, expression) FLOAT(name, f64, expression)
FLOATS2(add, x + y)
FLOATS2(sub, x - y)
FLOATS2(mul, x * y)
FLOATS2(div, x / y)
FLOATS2(rcp, 1 / x)
FLOAT(fma, f32, __builtin_fmaf(x, y, z))
FLOAT(fma, f64, __builtin_fma(x, y, z))
FLOAT(sqrt, f32, __builtin_sqrtf(x))
FLOAT(sqrt, f64, __builtin_sqrt(x))
FLOAT(abs, f32, bits_float(float_bits(x) & 0x7fffffff))
FLOAT(abs, f64, __builtin_fabs(x))
FLOAT(neg, f32, bits_float(float_bits(x) ^ 0x80000000))
FLOAT(neg, f64, -x)
FLOAT(min, f32, min_f32_of(x, y))
FLOAT(min, f64, y != y || x < y || (x == y && signbit(x)) ? x : y)
FLOAT(max, f32, max_f32_of(x, y))
FLOAT(max, f64, y != y || x > y || (x == y && signbit(y)) ? x : y)
FLOAT(min_nan, f32, x != x || y != y ? x + y : min_f32_of(x, y))
FLOAT(max_nan, f32, x != x || y != y ? x + y : max_f32_of(x, y))
OP(copysign_f32, u32, u32, u32, u32, (x & 0x80000000) | (y & 0x7fffffff)) /* the sign of a */
OP(copysign_f64, u64, u64, u64, u64, (x & 1ull << 63) | (y & ~(1ull << 63)))

/* The approximate functions: the double result rounded to float. */
#define APPROX(name, expression)                                                                  \
    HANDLER(name##_approx) {                                                                      \
        const float *a = src(w, i, 0), *b = src(w, i, 1);                                         \
        EACH(l, w->mask) {                                                                        \
            double x = a[l], y = b[l];                                                            \
            (void)y;                                                                              \
            ((float *)out)[l] = canon_f32((float)(expression));                                   \
        }                                                                                         \
    }

APPROX(div, x / y)
APPROX(rcp, 1.0 / x)
APPROX(sqrt, sqrt(x))
APPROX(rsqrt, 1.0 / sqrt(x))
APPROX(ex2, exp2(x))
APPROX(lg2, log2(x))
APPROX(sin, sin(x))
APPROX(cos, cos(x))
APPROX(tanh, tanh(x))

/* ---- comparisons, predicates, selection, moves */

/* The sign bits of 32 words. */
static inline u32 pack_mask(const u32 *t) {
    u32 m = 0;
    for (int k = 0; k < 4; k++)
        m |= (u32)_mm256_movemask_ps(_mm256_load_ps((const float *)t + 8 * k)) << (8 * k);
    return m;
}

static u32 combine(u8 op, u32 x, u32 y) {
    return op == OP_AND ? x & y : op == OP_OR ? x | y : op == OP_XOR ? x ^ y : x;
}

/* setp p|q, a, b, c: p = (a ? b) op c, q = !(a ? b) op c; ? is true for the relations in i->cmp. */
#define SETP(T, V, convert)                                                                       \
    HANDLER(setp_##T) {                                                                           \
        const lane_##T *a = src(w, i, 0), *b = src(w, i, 1);                                      \
        _Alignas(32) u32 t[32];                                                                   \
        u32 want = i->cmp, c = i->n_src > 2 ? src_mask(w, i, 2) : 0;                              \
        LANES {                                                                                   \
            V x = convert(a[l]), y = convert(b[l]);                                               \
            u32 relation = x < y ? LESS : x == y ? EQUAL : x > y ? GREATER : UNORDERED;           \
            t[l] = relation & want ? ~0u : 0;                                                     \
        }                                                                                         \
        u32 r = pack_mask(t);                                                                     \
        put_pred(w, i->dst_pred, combine(i->op, ~r, c), w->mask);                                 \
        *(u32 *)out = combine(i->op, r, c);                                                       \
    }

SETP(u16, u16, (u16))
SETP(s16, s16, (s16))
SETP(u32, u32, )
SETP(s32, s32, )
SETP(u64, u64, )
SETP(s64, s64, )
SETP(f16, f32, half_to_float)
SETP(bf16, f32, bf16_to_float)
SETP(f32, f32, )
SETP(f64, f64, )

HANDLER(logic_pred) {
    *(u32 *)out = combine(i->arg, src_mask(w, i, 0), src_mask(w, i, 1));
}

HANDLER(not_pred) {
    *(u32 *)out = ~src_mask(w, i, 0);
}

#define SELECT(name, T)                                                                           \
    HANDLER(name) {                                                                               \
        const T *a = src(w, i, 0), *b = src(w, i, 1);                                             \
        u32 m = src_mask(w, i, 2);                                                                \
        T *d = out;                                                                               \
        LANES d[l] = m >> l & 1 ? a[l] : b[l];                                                    \
    }

SELECT(selp_32, u32)
SELECT(selp_64, u64)

HANDLER(mov_32) {
    memcpy(out, src(w, i, 0), 128);
}

HANDLER(mov_64) {
    memcpy(out, src(w, i, 0), 256);
}

/* mov.b32 d, {a, b} and the like: elements of bits / n each, the first one lowest. */
HANDLER(mov_pack) {
    int bits = type_bytes(i->type) * 8 / i->n_src;
    for (u32 l = 0; l < 32; l++) {
        u64 v = 0;
        for (int k = 0; k < i->n_src; k++)
            v |= (get_lane(src(w, i, k), false, l) & ((1ull << bits) - 1)) << (bits * k);
        put_lane(out, i->out_bits == 64, l, v);
    }
}

HANDLER(mov_unpack) {
    int bits = type_bytes(i->type) * 8 / i->n_dst;
    EACH(l, w->mask) {
        u64 v = get_lane(src(w, i, 0), type_bytes(i->type) == 8, l);
        for (int k = 0; k < i->n_dst; k++)
            put_lane(slot(w, i->dst[k]), false, l, v >> (bits * k) & ((1ull << bits) - 1));
    }
}

static Handler *choose_mov(Inst *i) {
    bool wide = type_bytes(i->type) == 8;
    int parts = i->n_dst > 1 ? i->n_dst : i->n_src;
    i->out_bits = i->type == T_PRED ? 1 : wide ? 64 : 32;
    if ((i->n_dst > 1 && i->n_src > 1) || parts == 3 || (parts == 4 && !wide)) return NULL;
    if (i->n_dst > 1) {
        i->out_bits = 0;
        i->wide_dst = false;
        return mov_unpack;
    }
    return i->n_src > 1 ? mov_pack : i->type == T_PRED ? logic_pred : wide ? mov_64 : mov_32;
}

static inline u64 window_base(u8 space) {
    return space == SP_SHARED ? SHARED_BASE : space == SP_LOCAL ? LOCAL_BASE
         : space == SP_PARAM ? PARAM_BASE : 0;
}

/* cvta: a window's base is added or taken away; device memory is generic already. */
OP(cvta_64, u64, u64, u64, u64, i->to ? x - window_base(i->space) : x + window_base(i->space))

#define CMPS ".eq|.ne|.lt|.le|.gt|.ge|.lo|.ls|.hi|.hs"
#define FCMPS ".eq|.ne|.lt|.le|.gt|.ge|.equ|.neu|.ltu|.leu|.gtu|.geu|.num|.nan"
#define RND "[.rn|.rz|.rm|.rp]"

#define ALL ".b16|.u16|.s16|.b32|.u32|.s32|.b64|.u64|.s64"
#define NUM ".u16|.s16|.u32|.s32|.u64|.s64"
#define SPACES ".global|.shared|.shared::cta|.local|.const|.param"
/* handlers by type, for Form.by_type: u16 s16 u32 s32 u64 s64 */
#define SIZES(name) {name##_16, name##_16, name##_32, name##_32, name##_64, name##_64}
#define SIGNS(name) {name##_u16, name##_s16, name##_u32, name##_s32, name##_u64, name##_s64}
#define SIZES32(name) {0, 0, name##_32, name##_32, name##_64, name##_64}
#define SIGNS32(name) {0, 0, name##_u32, name##_s32, name##_u64, name##_s64}
#define WIDES(name) {name##_u16, name##_s16, name##_u32, name##_s32, 0, 0}
#define INT SIM_C_INT

const Form alu_forms[] = {
    {"add " NUM, "daa", INT, 0, .by_type = SIZES(add)},
    {"sub " NUM, "daa", INT, 0, .by_type = SIZES(sub)},
    {"mul .lo " NUM, "daa", INT, 0, .by_type = SIZES(mul_lo)},
    {"mul .hi " NUM, "daa", INT, 0, .by_type = SIGNS(mul_hi)},
    {"mul .wide .u16|.s16|.u32|.s32", "eaa", INT, 0, .by_type = WIDES(mul_wide)},
    {"mad .lo " NUM, "daaa", INT, 0, .by_type = SIZES(mad_lo)},
    {"mad .wide .u16|.s16|.u32|.s32", "eaaE", INT, 0, .by_type = WIDES(mad_wide)},
    {"div " NUM, "daa", INT, 0, run_divide, .by_type = SIGNS(div)},
    {"rem " NUM, "daa", INT, 0, run_divide, .by_type = SIGNS(rem)},
    {"abs .s16|.s32|.s64", "da", INT, 0, .by_type = SIZES(abs)},
    {"neg .s16|.s32|.s64", "da", INT, 0, .by_type = SIZES(neg)},
    {"min " NUM, "daa", INT, 0, .by_type = SIGNS(min)},
    {"max " NUM, "daa", INT, 0, .by_type = SIGNS(max)},
    {"and .b16|.b32|.b64", "daa", INT, 0, .by_type = SIZES(and)},
    {"or .b16|.b32|.b64", "daa", INT, 0, .by_type = SIZES(or)},
    {"xor .b16|.b32|.b64", "daa", INT, 0, .by_type = SIZES(xor)},
    {"not .b16|.b32|.b64", "da", INT, 0, .by_type = SIZES(not)},
    {"and .pred", "daa", INT, 1, logic_pred, OP_AND},
    {"or .pred", "daa", INT, 1, logic_pred, OP_OR},
    {"xor .pred", "daa", INT, 1, logic_pred, OP_XOR},
    {"not .pred", "da", INT, 1, not_pred},
    {"shl .b16|.b32|.b64", "daw", INT, 0, .by_type = SIZES(shl)},
    {"shr " ALL, "daw", INT, 0, .by_type = SIGNS(shr)},
    {"shf .l|.r .wrap|.clamp .b32", "daaw", INT, 32, shf_32},
    {"popc .b32|.b64", "ua", INT, 32, .by_type = SIZES32(popc)},
    {"clz .b32|.b64", "ua", INT, 32, .by_type = SIZES32(clz)},
    {"bfind [.shiftamt] .u32|.s32|.u64|.s64", "ua", INT, 32, .by_type = SIGNS32(bfind)},
    {"brev .b32|.b64", "da", INT, 0, .by_type = SIZES32(brev)},
    {"bfe .u32|.s32|.u64|.s64", "daww", INT, 0, .by_type = SIGNS32(bfe)},
    {"bfi .b32|.b64", "daaww", INT, 0, .by_type = SIZES32(bfi)},
    {"lop3 .b32", "daaan", INT, 32, lop3_32},
    {"prmt .b32", "daaw", INT, 32, prmt_32},
    {"dp4a .u32|.s32 .u32|.s32", "uwww", SIM_C_DP4A, 32, dp4a_32},
    {"add " RND " [.ftz] [.sat] .f32", "daa", SIM_C_FP32, 32, add_f32},
    {"sub " RND " [.ftz] [.sat] .f32", "daa", SIM_C_FP32, 32, sub_f32},
    {"mul " RND " [.ftz] [.sat] .f32", "daa", SIM_C_FP32, 32, mul_f32},
    {"fma|mad .rn|.rz|.rm|.rp [.ftz] [.sat] .f32", "daaa", SIM_C_FP32, 32, fma_f32},
    {"min [.ftz] .f32", "daa", SIM_C_FP32, 32, min_f32},
    {"min [.ftz] .NaN .f32", "daa", SIM_C_FP32, 32, min_nan_f32},
    {"max [.ftz] .f32", "daa", SIM_C_FP32, 32, max_f32},
    {"max [.ftz] .NaN .f32", "daa", SIM_C_FP32, 32, max_nan_f32},
    {"abs [.ftz] .f32", "da", SIM_C_FP32, 32, abs_f32},
    {"neg [.ftz] .f32", "da", SIM_C_FP32, 32, neg_f32},
    {"copysign .f32", "daa", SIM_C_FP32, 32, copysign_f32},
    {"div .rn|.rz|.rm|.rp [.ftz] .f32", "daa", SIM_C_SPECIAL, 32, div_f32},
    {"div .approx|.full [.ftz] .f32", "daa", SIM_C_SPECIAL, 32, div_approx},
    {"rcp .rn|.rz|.rm|.rp [.ftz] .f32", "da", SIM_C_SPECIAL, 32, rcp_f32},
    {"rcp .approx [.ftz] .f32", "da", SIM_C_SPECIAL, 32, rcp_approx},
    {"sqrt .rn|.rz|.rm|.rp [.ftz] .f32", "da", SIM_C_SPECIAL, 32, sqrt_f32},
    {"sqrt .approx [.ftz] .f32", "da", SIM_C_SPECIAL, 32, sqrt_approx},
    {"rsqrt .approx [.ftz] .f32", "da", SIM_C_SPECIAL, 32, rsqrt_approx},
    {"ex2 .approx [.ftz] .f32", "da", SIM_C_SPECIAL, 32, ex2_approx},
    {"lg2 .approx [.ftz] .f32", "da", SIM_C_SPECIAL, 32, lg2_approx},
    {"sin .approx [.ftz] .f32", "da", SIM_C_SPECIAL, 32, sin_approx},
    {"cos .approx [.ftz] .f32", "da", SIM_C_SPECIAL, 32, cos_approx},
    {"tanh .approx .f32", "da", SIM_C_SPECIAL, 32, tanh_approx},
    {"add " RND " .f64", "daa", SIM_C_FP64, 64, add_f64},
    {"sub " RND " .f64", "daa", SIM_C_FP64, 64, sub_f64},
    {"mul " RND " .f64", "daa", SIM_C_FP64, 64, mul_f64},
    {"fma|mad .rn|.rz|.rm|.rp .f64", "daaa", SIM_C_FP64, 64, fma_f64},
    {"div .rn|.rz|.rm|.rp .f64", "daa", SIM_C_FP64, 64, div_f64},
    {"rcp .rn|.rz|.rm|.rp .f64", "da", SIM_C_FP64, 64, rcp_f64},
    {"sqrt .rn|.rz|.rm|.rp .f64", "da", SIM_C_FP64, 64, sqrt_f64},
    {"min .f64", "daa", SIM_C_FP64, 64, min_f64},
    {"max .f64", "daa", SIM_C_FP64, 64, max_f64},
    {"abs .f64", "da", SIM_C_FP64, 64, abs_f64},
    {"neg .f64", "da", SIM_C_FP64, 64, neg_f64},
    {"copysign .f64", "daa", SIM_C_FP64, 64, copysign_f64},
    {"setp " CMPS " [.and|.or|.xor] " ALL, "paa?q", INT, 1, .by_type = SIGNS(setp)},
    {"setp " FCMPS " [.and|.or|.xor] [.ftz] .f32", "paa?q", SIM_C_FP32, 1, setp_f32},
    {"setp " FCMPS " [.and|.or|.xor] .f64", "paa?q", SIM_C_FP64, 1, setp_f64},
    {"setp " FCMPS " .f16", "paa", SIM_C_HALF, 1, setp_f16},
    {"setp " FCMPS " .bf16", "paa", SIM_C_HALF, 1, setp_bf16},
    {"selp .b16|.u16|.s16|.f16|.bf16|.b32|.u32|.s32|.f32", "daaq", INT, 32, selp_32},
    {"selp .b64|.u64|.s64|.f64", "daaq", INT, 64, selp_64},
    {"mov .pred|.b16|.u16|.s16|.f16|.bf16|.b32|.u32|.s32|.f32|.b64|.u64|.s64|.f64", "XY", INT, 0,
     .choose = choose_mov},
    {"cvta [.to] " SPACES " .u64", "da", INT, 64, cvta_64},
    {0},
};
