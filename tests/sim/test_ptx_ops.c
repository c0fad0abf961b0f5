/* test_ptx_ops.c: each form of the register instructions against plain C, on edge values and random
 * bits. The C side is written from the PTX manual's definitions, bit by bit where that helps. */
#include "sim.h"

#include <fenv.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t u64;
typedef uint32_t u32;
typedef uint16_t u16;
typedef int64_t s64;
typedef int32_t s32;
typedef int16_t s16;

enum { N = 4096 };

static float fl(u64 bits) {
    u32 u = (u32)bits;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static double db(u64 bits) {
    double d;
    memcpy(&d, &bits, 8);
    return d;
}

static u64 fb(float f) /* the bits, NaN as the GPU writes it */
{
    u32 u;
    memcpy(&u, &f, 4);
    return f == f ? u : 0x7fffffff;
}

static u64 dbits(double d) {
    u64 u;
    memcpy(&u, &d, 8);
    return d == d ? u : 0x7fffffffffffffff;
}

static float ftz(float f) {
    return fabsf(f) < 0x1p-126f ? copysignf(0, f) : f;
}

/* A function of x, y, z, the three source operands as bits. */
#define REF(name, expression)                                                                     \
    static u64 name(u64 x, u64 y, u64 z)                                                          \
    {                                                                                             \
        (void)x, (void)y, (void)z;                                                                \
        return (u64)(expression);                                                                 \
    }

#define X16 ((s16)x)
#define Y16 ((s16)y)
#define X32 ((s32)x)
#define Y32 ((s32)y)
#define X64 ((s64)x)
#define Y64 ((s64)y)

REF(r_add, x + y) REF(r_sub, x - y) REF(r_mul, x * y) REF(r_mad, x * y + z)
REF(r_hi_u16, x * y >> 16) REF(r_hi_s16, (s32)X16 * Y16 >> 16)
REF(r_hi_u32, x * y >> 32) REF(r_hi_s32, (s64)X32 * Y32 >> 32)
REF(r_hi_u64, (unsigned __int128)x * y >> 64) REF(r_hi_s64, (__int128)X64 * Y64 >> 64)
REF(r_wide_s16, (s32)X16 * Y16) REF(r_wide_s32, (s64)X32 * Y32)
REF(r_madw_s16, (s64)((s32)X16 * Y16) + (s64)z) REF(r_madw_s32, (s64)((u64)((s64)X32 * Y32) + z))
REF(r_div_u, y ? x / y : ~0ull) REF(r_rem_u, y ? x % y : ~0ull)
REF(r_div_s16, y ? X16 / Y16 : -1) REF(r_rem_s16, y ? X16 % Y16 : -1)
REF(r_div_s32, y ? (s64)X32 / Y32 : -1) REF(r_rem_s32, y ? (s64)X32 % Y32 : -1)
REF(r_div_s64, y ? (__int128)X64 / Y64 : -1) REF(r_rem_s64, y ? (__int128)X64 % Y64 : -1)
REF(r_abs16, X16 < 0 ? -X16 : X16) REF(r_abs32, X32 < 0 ? -(s64)X32 : X32)
REF(r_abs64, X64 < 0 ? 0 - x : x) REF(r_neg, 0 - x)
REF(r_min_u, x < y ? x : y) REF(r_max_u, x > y ? x : y)
REF(r_min16, X16 < Y16 ? x : y) REF(r_max16, X16 > Y16 ? x : y)
REF(r_min32, X32 < Y32 ? x : y) REF(r_max32, X32 > Y32 ? x : y)
REF(r_min64, X64 < Y64 ? x : y) REF(r_max64, X64 > Y64 ? x : y)
REF(r_and, x & y) REF(r_or, x | y) REF(r_xor, x ^ y) REF(r_not, ~x)
REF(r_shl16, (u32)y < 16 ? x << y : 0) REF(r_shl32, (u32)y < 32 ? x << y : 0)
REF(r_shl64, (u32)y < 64 ? x << y : 0) REF(r_shru16, (u32)y < 16 ? x >> y : 0)
REF(r_shru32, (u32)y < 32 ? x >> y : 0) REF(r_shru64, (u32)y < 64 ? x >> y : 0)
REF(r_shrs16, X16 >> ((u32)y < 15 ? y : 15)) REF(r_shrs32, X32 >> ((u32)y < 31 ? y : 31))
REF(r_shrs64, X64 >> ((u32)y < 63 ? y : 63))
REF(r_lwrap, (y << 32 | x) << (z & 31) >> 32) REF(r_rwrap, (y << 32 | x) >> (z & 31))
REF(r_lclamp, z > 32 ? x : (unsigned __int128)(y << 32 | x) << z >> 32)
REF(r_rclamp, z > 32 ? y : (y << 32 | x) >> z)
REF(r_popc, __builtin_popcountll(x))

static u64 count_zeros(u64 x, int bits) {
    int n = 0;
    while (n < bits && !(x >> (bits - 1 - n) & 1))
        n++;
    return (u64)n;
}

REF(r_clz32, count_zeros(x, 32)) REF(r_clz64, count_zeros(x, 64))
REF(r_find_u32, x ? 31 - count_zeros(x, 32) : ~0u)
REF(r_find_s32, (X32 < 0 ? (u32)~x : x) ? 31 - count_zeros(X32 < 0 ? (u32)~x : x, 32) : ~0u)
REF(r_find_u64, x ? 63 - count_zeros(x, 64) : ~0u)
REF(r_find_s64, (X64 < 0 ? ~x : x) ? 63 - count_zeros(X64 < 0 ? ~x : x, 64) : ~0u)
REF(r_shamt_u32, x ? count_zeros(x, 32) : ~0u)

static u64 reverse(u64 x, int bits) {
    u64 r = 0;
    for (int k = 0; k < bits; k++)
        r |= (x >> k & 1) << (bits - 1 - k);
    return r;
}

REF(r_brev32, reverse(x, 32)) REF(r_brev64, reverse(x, 64))

/* The manual's loops for bfe and bfi. */
static u64 bfe(u64 a, u64 b, u64 c, int msb, int is_signed) {
    int pos = (int)(b & 0xff), len = (int)(c & 0xff),
        top = pos + len - 1 < msb ? pos + len - 1 : msb;
    u64 sign = !is_signed || len == 0 ? 0 : a >> top & 1, d = 0;
    for (int i = 0; i <= msb; i++)
        d |= (i < len && pos + i <= msb ? a >> (pos + i) & 1 : sign) << i;
    return d;
}

static u64 bfi(u64 a, u64 b, u64 c, u64 d, int msb) {
    int pos = (int)(c & 0xff), len = (int)(d & 0xff);
    for (int i = 0; i < len && pos + i <= msb; i++)
        b = (b & ~(1ull << (pos + i))) | (a >> i & 1) << (pos + i);
    return b;
}

REF(r_bfe_u32, bfe(x, y, z, 31, 0)) REF(r_bfe_s32, bfe(x, y, z, 31, 1))
REF(r_bfe_u64, bfe(x, y, z, 63, 0)) REF(r_bfe_s64, bfe(x, y, z, 63, 1))
REF(r_bfi32, bfi(x, y, z, 7, 31)) REF(r_bfi64, bfi(x, y, z, 9, 63))

static u64 lop3(u64 a, u64 b, u64 c, int table) {
    u64 r = 0;
    for (int k = 0; k < 32; k++)
        r |= (u64)(table >> ((a >> k & 1) * 4 + (b >> k & 1) * 2 + (c >> k & 1)) & 1) << k;
    return r;
}

REF(r_lop96, lop3(x, y, z, 0x96)) REF(r_lop1b, lop3(x, y, z, 0x1b))

static u64 pick(u64 a, u64 b, unsigned selector) /* one byte of prmt */
{
    u64 byte = (b << 32 | a) >> (selector & 7) * 8 & 255;
    return selector & 8 ? byte & 128 ? 255 : 0 : byte;
}

static u64 pick4(u64 a, u64 b, int s3, int s2, int s1, int s0) {
    return pick(a, b, (unsigned)s3) << 24 | pick(a, b, (unsigned)s2) << 16 |
           pick(a, b, (unsigned)s1) << 8 | pick(a, b, (unsigned)s0);
}

#define C4 ((int)(z & 3))
REF(r_prmt, pick4(x, y, z >> 12 & 15, z >> 8 & 15, z >> 4 & 15, z & 15))

static u64 dot(u64 a, u64 b, u64 c, int a_signed, int b_signed, int step, int first) {
    s64 sum = (s32)c;
    int n = step == 8 ? 4 : 2;
    for (int k = 0; k < n; k++) {
        s64 x = (s64)(a >> (step * k) & (step == 8 ? 255 : 65535)),
            y = (s64)(b >> (8 * k + first) & 255);
        x -= a_signed && x >> (step - 1) ? 1ll << step : 0;
        y -= b_signed && y >> 7 ? 256 : 0;
        sum += x * y;
    }
    return (u64)sum;
}

REF(r_dp_uu, dot(x, y, z, 0, 0, 8, 0)) REF(r_dp_us, dot(x, y, z, 0, 1, 8, 0))
REF(r_dp_su, dot(x, y, z, 1, 0, 8, 0)) REF(r_dp_ss, dot(x, y, z, 1, 1, 8, 0))

/* f32 and f64. `volatile` keeps the compiler from moving sums across changes of the mode. */
static u64 in_mode(int mode, int op, int zero, u64 x, u64 y, u64 z) {
    volatile float a = zero ? ftz(fl(x)) : fl(x), b = zero ? ftz(fl(y)) : fl(y), r;
    volatile float c = zero ? ftz(fl(z)) : fl(z);
    fesetround(mode);
    switch (op) {
    case '+': r = a + b; break;
    case '-': r = a - b; break;
    case '*': r = a * b; break;
    case '/': r = a / b; break;
    case 's': r = sqrtf(a); break;
    default: r = fmaf(a, b, c);
    }
    fesetround(FE_TONEAREST);
    return fb(zero ? ftz(r) : r);
}

#define MODES(op, name)                                                                           \
    REF(name##_rn, in_mode(FE_TONEAREST, op, 0, x, y, z))                                         \
    REF(name##_rz, in_mode(FE_TOWARDZERO, op, 0, x, y, z))                                        \
    REF(name##_rm, in_mode(FE_DOWNWARD, op, 0, x, y, z))                                          \
    REF(name##_rp, in_mode(FE_UPWARD, op, 0, x, y, z))                                            \
    REF(name##_ftz, in_mode(FE_TONEAREST, op, 1, x, y, z))
MODES('+', f_add) MODES('-', f_sub) MODES('*', f_mul) MODES('/', f_div) MODES('s', f_sqrt)
MODES('f', f_fma)

static float sat(float f) {
    return f > 0 ? f < 1 ? f : 1 : 0;
}

static float fmin_gpu(float a, float b, int max) {
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return (signbit(a) != 0) != max ? a : b;
    return (a < b) != max ? a : b;
}

static double dmin_gpu(double a, double b, int max) {
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return (signbit(a) != 0) != max ? a : b;
    return (a < b) != max ? a : b;
}

#define FX fl(x)
#define FY fl(y)
#define DX db(x)
#define DY db(y)
REF(f_addsat, fb(sat(FX + FY))) REF(f_fmasat, fb(sat(fmaf(FX, FY, fl(z)))))
REF(f_rcp, fb(1.0f / FX)) REF(f_min, fb(fmin_gpu(FX, FY, 0))) REF(f_max, fb(fmin_gpu(FX, FY, 1)))
REF(f_minnan, FX != FX || FY != FY ? 0x7fffffff : fb(fmin_gpu(FX, FY, 0)))
REF(f_maxftz, fb(fmin_gpu(ftz(FX), ftz(FY), 1)))
REF(f_abs, fb(fabsf(FX))) REF(f_neg, fb(-FX)) REF(f_negftz, fb(-ftz(FX)))
REF(f_copysign, (x & 0x80000000) | (y & 0x7fffffff))
REF(f_adiv, fb((float)((double)FX / (double)FY))) REF(f_rsqrt, fb((float)(1 / sqrt((double)FX))))
REF(f_ex2, fb((float)exp2((double)FX))) REF(f_lg2, fb((float)log2((double)FX)))
REF(f_sin, fb((float)sin((double)FX))) REF(f_cos, fb((float)cos((double)FX)))
REF(f_tanh, fb((float)tanh((double)FX))) REF(f_ex2ftz, fb(ftz((float)exp2((double)ftz(FX)))))
REF(d_add, dbits(DX + DY)) REF(d_sub, dbits(DX - DY)) REF(d_mul, dbits(DX * DY))
REF(d_fma, dbits(fma(DX, DY, db(z)))) REF(d_div, dbits(DX / DY)) REF(d_sqrt, dbits(sqrt(DX)))
REF(d_rcp, dbits(1 / DX)) REF(d_min, dbits(dmin_gpu(DX, DY, 0)))
REF(d_max, dbits(dmin_gpu(DX, DY, 1))) REF(d_abs, dbits(fabs(DX))) REF(d_neg, dbits(-DX))

/* Comparisons: the result is 1 or 0, stored through selp. */
REF(c_eq, x == y) REF(c_ne, x != y) REF(c_ltu, x < y) REF(c_leu, x <= y) REF(c_gtu, x > y)
REF(c_geu, x >= y) REF(c_lt32, X32 < Y32) REF(c_ge32, X32 >= Y32) REF(c_gt16, X16 > Y16)
REF(c_le64, X64 <= Y64) REF(c_feq, FX == FY) REF(c_fne, FX < FY || FX > FY) REF(c_flt, FX < FY)
REF(c_fle, FX <= FY) REF(c_fgt, FX > FY) REF(c_fge, FX >= FY) REF(c_fequ, !(FX < FY || FX > FY))
REF(c_fneu, FX != FY) REF(c_fltu, !(FX >= FY)) REF(c_fleu, !(FX > FY)) REF(c_fgtu, !(FX <= FY))
REF(c_fgeu, !(FX < FY)) REF(c_num, FX == FX && FY == FY) REF(c_nan, FX != FX || FY != FY)
REF(c_dgt, DX > DY) REF(c_and, X32 < Y32 && (z & 1)) REF(c_orn, X32 == Y32 || !(z & 1))
REF(c_xor, (FX < FY) ^ (z & 1)) REF(c_ftzeq, ftz(FX) == ftz(FY))
REF(s_selp, z & 1 ? x : y)

/* Conversions. */
static u64 to_int(double v, int bits, int is_signed, char mode) {
    double low = is_signed ? -ldexp(1, bits - 1) : 0, high = ldexp(1, bits - is_signed);
    if (v != v) return bits == 64 ? 1ull << 63 : 0;
    v = mode == 'n' ? nearbyint(v) : mode == 'z' ? trunc(v) : mode == 'm' ? floor(v) : ceil(v);
    if (v >= high) return ~0ull >> (64 - bits + is_signed);
    if (v < low) return is_signed ? ~0ull << (bits - 1) : 0;
    return v < 0 ? (u64)(s64)v : (u64)v;
}

static u64 sat_int(s64 v, s64 low, s64 high) {
    return (u64)(v < low ? low : v > high ? high : v);
}

REF(v_u8, x & 255) REF(v_s8, (s64)(int8_t)x) REF(v_u16, x & 0xffff) REF(v_s16, (s64)X16)
REF(v_s32, (s64)X32) REF(v_u32, x & 0xffffffff) REF(v_sat8, sat_int(X32, -128, 127))
REF(v_satu8, sat_int(X32, 0, 255)) REF(v_satu8u, x > 255 ? 255 : x)
REF(v_sat16, sat_int(X64, -32768, 32767)) REF(v_satu32, sat_int(X64, 0, 0xffffffffll))
REF(v_rni, to_int(FX, 32, 1, 'n')) REF(v_rzi, to_int(FX, 32, 1, 'z'))
REF(v_rmi, to_int(FX, 32, 1, 'm')) REF(v_rpi, to_int(FX, 32, 1, 'p'))
REF(v_rziu, to_int(FX, 32, 0, 'z')) REF(v_rni64, to_int(FX, 64, 1, 'n'))
REF(v_rziu64, to_int(FX, 64, 0, 'z')) REF(v_rni8, to_int(FX, 8, 1, 'n'))
REF(v_rniu8, to_int(FX, 8, 0, 'n')) REF(v_rni16, to_int(FX, 16, 1, 'n'))
REF(v_drzi, to_int(DX, 32, 1, 'z')) REF(v_drni64, to_int(DX, 64, 1, 'n'))
REF(v_fs32, fb((float)X32)) REF(v_fu32, fb((float)(u32)x)) REF(v_fs64, fb((float)X64))
REF(v_fu64, fb((float)x)) REF(v_fs16, fb((float)X16)) REF(v_fu8, fb((float)(x & 255)))
REF(v_fs8, fb((float)(int8_t)x)) REF(v_ds32, dbits((double)X32)) REF(v_ds64, dbits((double)X64))
REF(v_df, dbits((double)FX)) REF(v_fd, fb((float)DX)) REF(v_frni, fb(nearbyintf(FX)))
REF(v_frmi, fb(floorf(FX))) REF(v_frpi, fb(ceilf(FX))) REF(v_frzi, fb(truncf(FX)))
REF(v_fsat, fb(sat(FX)))

static u64 float_in_mode(int mode, s64 v) {
    volatile s64 from = v;
    fesetround(mode);
    volatile float f = (float)from;
    fesetround(FE_TONEAREST);
    return fb(f);
}

REF(v_fs32rz, float_in_mode(FE_TOWARDZERO, X32)) REF(v_fs64rp, float_in_mode(FE_UPWARD, X64))
REF(m_pack, x | y << 16) REF(m_pack64, x | y << 32)
REF(m_lo, x & 0xffff) REF(m_hi, x >> 16 & 0xffff) REF(m_same, x)

/* sig: destination, then sources: h 16 bits, w 32, f f32, l 64, D f64, p predicate (bit 0).
 * D A B C stand for the operands; without a blank in the text they are appended. */
static const struct {
    const char *op, *sig;
    u64 (*ref)(u64, u64, u64);
} cases[] = {
    {"add.u16", "h:hh", r_add}, {"add.s32", "w:ww", r_add}, {"add.s64", "l:ll", r_add},
    {"sub.s16", "h:hh", r_sub}, {"sub.u32", "w:ww", r_sub}, {"sub.u64", "l:ll", r_sub},



    {"mul.lo.s16", "h:hh", r_mul}, {"mul.lo.s32", "w:ww", r_mul}, {"mul.lo.u64", "l:ll", r_mul},
    {"mul.hi.u16", "h:hh", r_hi_u16}, {"mul.hi.s16", "h:hh", r_hi_s16},
    {"mul.hi.u32", "w:ww", r_hi_u32}, {"mul.hi.s32", "w:ww", r_hi_s32},
    {"mul.hi.u64", "l:ll", r_hi_u64}, {"mul.hi.s64", "l:ll", r_hi_s64},
    {"mul.wide.u16", "w:hh", r_mul}, {"mul.wide.s16", "w:hh", r_wide_s16},
    {"mul.wide.u32", "l:ww", r_mul}, {"mul.wide.s32", "l:ww", r_wide_s32},
    {"mad.lo.s16", "h:hhh", r_mad}, {"mad.lo.u32", "w:www", r_mad}, {"mad.lo.s64", "l:lll", r_mad},
    {"mad.wide.u16", "w:hhw", r_mad}, {"mad.wide.s16", "w:hhw", r_madw_s16},
    {"mad.wide.u32", "l:wwl", r_mad}, {"mad.wide.s32", "l:wwl", r_madw_s32},
    {"div.u16", "h:hh", r_div_u}, {"div.s16", "h:hh", r_div_s16}, {"rem.u16", "h:hh", r_rem_u},
    {"rem.s16", "h:hh", r_rem_s16}, {"div.u32", "w:ww", r_div_u}, {"div.s32", "w:ww", r_div_s32},
    {"rem.u32", "w:ww", r_rem_u}, {"rem.s32", "w:ww", r_rem_s32}, {"div.u64", "l:ll", r_div_u},
    {"div.s64", "l:ll", r_div_s64}, {"rem.u64", "l:ll", r_rem_u}, {"rem.s64", "l:ll", r_rem_s64},
    {"abs.s16", "h:h", r_abs16}, {"abs.s32", "w:w", r_abs32}, {"abs.s64", "l:l", r_abs64},
    {"neg.s16", "h:h", r_neg}, {"neg.s32", "w:w", r_neg}, {"neg.s64", "l:l", r_neg},
    {"min.u16", "h:hh", r_min_u}, {"min.s16", "h:hh", r_min16}, {"max.u16", "h:hh", r_max_u},
    {"max.s16", "h:hh", r_max16}, {"min.u32", "w:ww", r_min_u}, {"min.s32", "w:ww", r_min32},
    {"max.u32", "w:ww", r_max_u}, {"max.s32", "w:ww", r_max32}, {"min.u64", "l:ll", r_min_u},
    {"min.s64", "l:ll", r_min64}, {"max.u64", "l:ll", r_max_u}, {"max.s64", "l:ll", r_max64},
    {"and.b16", "h:hh", r_and}, {"or.b16", "h:hh", r_or}, {"xor.b16", "h:hh", r_xor},
    {"not.b16", "h:h", r_not}, {"and.b32", "w:ww", r_and}, {"or.b32", "w:ww", r_or},
    {"xor.b32", "w:ww", r_xor}, {"not.b32", "w:w", r_not}, {"and.b64", "l:ll", r_and},
    {"or.b64", "l:ll", r_or}, {"xor.b64", "l:ll", r_xor}, {"not.b64", "l:l", r_not},
    {"shl.b16", "h:hw", r_shl16}, {"shl.b32", "w:ww", r_shl32}, {"shl.b64", "l:lw", r_shl64},
    {"shr.u16", "h:hw", r_shru16}, {"shr.u32", "w:ww", r_shru32}, {"shr.b64", "l:lw", r_shru64},
    {"shr.s16", "h:hw", r_shrs16}, {"shr.s32", "w:ww", r_shrs32}, {"shr.s64", "l:lw", r_shrs64},
    {"shf.l.wrap.b32", "w:www", r_lwrap}, {"shf.r.wrap.b32", "w:www", r_rwrap},
    {"shf.l.clamp.b32", "w:www", r_lclamp}, {"shf.r.clamp.b32", "w:www", r_rclamp},
    {"popc.b32", "w:w", r_popc}, {"popc.b64", "w:l", r_popc}, {"clz.b32", "w:w", r_clz32},
    {"clz.b64", "w:l", r_clz64}, {"bfind.u32", "w:w", r_find_u32}, {"bfind.s32", "w:w", r_find_s32},
    {"bfind.u64", "w:l", r_find_u64}, {"bfind.s64", "w:l", r_find_s64},
    {"bfind.shiftamt.u32", "w:w", r_shamt_u32}, {"brev.b32", "w:w", r_brev32},
    {"brev.b64", "l:l", r_brev64}, {"bfe.u32", "w:www", r_bfe_u32}, {"bfe.s32", "w:www", r_bfe_s32},
    {"bfe.u64", "l:lww", r_bfe_u64}, {"bfe.s64", "l:lww", r_bfe_s64},
    {"bfi.b32 D, A, B, C, 7", "w:www", r_bfi32}, {"bfi.b64 D, A, B, C, 9", "l:llw", r_bfi64},
    {"lop3.b32 D, A, B, C, 0x96", "w:www", r_lop96}, {"lop3.b32 D, A, B, C, 27", "w:www", r_lop1b},
    {"prmt.b32", "w:www", r_prmt},


    {"dp4a.u32.u32", "w:www", r_dp_uu}, {"dp4a.u32.s32", "w:www", r_dp_us},
    {"dp4a.s32.u32", "w:www", r_dp_su}, {"dp4a.s32.s32", "w:www", r_dp_ss},

    {"add.f32", "f:ff", f_add_rn}, {"add.rz.f32", "f:ff", f_add_rz},
    {"add.rm.f32", "f:ff", f_add_rm},
    {"add.rp.f32", "f:ff", f_add_rp}, {"add.ftz.f32", "f:ff", f_add_ftz},
    {"sub.rn.f32", "f:ff", f_sub_rn}, {"sub.rm.f32", "f:ff", f_sub_rm},
    {"sub.rz.f32", "f:ff", f_sub_rz},
    {"sub.rp.f32", "f:ff", f_sub_rp}, {"mul.rm.f32", "f:ff", f_mul_rm},
    {"div.rm.f32", "f:ff", f_div_rm}, {"div.rp.f32", "f:ff", f_div_rp},
    {"sqrt.rz.f32", "f:f", f_sqrt_rz}, {"sqrt.rp.f32", "f:f", f_sqrt_rp},
    {"sub.ftz.f32", "f:ff", f_sub_ftz}, {"mul.f32", "f:ff", f_mul_rn},
    {"mul.rz.f32", "f:ff", f_mul_rz},
    {"mul.rp.f32", "f:ff", f_mul_rp}, {"mul.ftz.f32", "f:ff", f_mul_ftz},
    {"fma.rn.f32", "f:fff", f_fma_rn}, {"fma.rz.f32", "f:fff", f_fma_rz},
    {"fma.rm.f32", "f:fff", f_fma_rm}, {"fma.rp.f32", "f:fff", f_fma_rp},
    {"fma.rn.ftz.f32", "f:fff", f_fma_ftz}, {"div.rn.f32", "f:ff", f_div_rn},
    {"div.rz.f32", "f:ff", f_div_rz}, {"div.rn.ftz.f32", "f:ff", f_div_ftz},
    {"sqrt.rn.f32", "f:f", f_sqrt_rn}, {"sqrt.rm.f32", "f:f", f_sqrt_rm},
    {"sqrt.rn.ftz.f32", "f:f", f_sqrt_ftz}, {"rcp.rn.f32", "f:f", f_rcp},
    {"add.sat.f32", "f:ff", f_addsat}, {"fma.rn.sat.f32", "f:fff", f_fmasat},
    {"min.f32", "f:ff", f_min}, {"max.f32", "f:ff", f_max}, {"min.NaN.f32", "f:ff", f_minnan},
    {"max.ftz.f32", "f:ff", f_maxftz}, {"abs.f32", "f:f", f_abs}, {"neg.f32", "f:f", f_neg},
    {"neg.ftz.f32", "f:f", f_negftz}, {"copysign.f32", "f:ff", f_copysign},
    {"div.approx.f32", "f:ff", f_adiv}, {"div.full.f32", "f:ff", f_adiv},
    {"rcp.approx.f32", "f:f", f_rcp}, {"sqrt.approx.f32", "f:f", f_sqrt_rn},
    {"rsqrt.approx.f32", "f:f", f_rsqrt}, {"ex2.approx.f32", "f:f", f_ex2},
    {"ex2.approx.ftz.f32", "f:f", f_ex2ftz}, {"lg2.approx.f32", "f:f", f_lg2},
    {"sin.approx.f32", "f:f", f_sin}, {"cos.approx.f32", "f:f", f_cos},
    {"tanh.approx.f32", "f:f", f_tanh}, {"add.f64", "D:DD", d_add}, {"sub.f64", "D:DD", d_sub},
    {"mul.f64", "D:DD", d_mul}, {"fma.rn.f64", "D:DDD", d_fma}, {"div.rn.f64", "D:DD", d_div},
    {"sqrt.rn.f64", "D:D", d_sqrt}, {"rcp.rn.f64", "D:D", d_rcp}, {"min.f64", "D:DD", d_min},
    {"max.f64", "D:DD", d_max}, {"abs.f64", "D:D", d_abs}, {"neg.f64", "D:D", d_neg},
    {"setp.eq.u32", "p:ww", c_eq}, {"setp.ne.b16", "p:hh", c_ne}, {"setp.lt.u64", "p:ll", c_ltu},
    {"setp.le.u32", "p:ww", c_leu}, {"setp.gt.u16", "p:hh", c_gtu}, {"setp.ge.u64", "p:ll", c_geu},
    {"setp.lo.u32", "p:ww", c_ltu}, {"setp.ls.u32", "p:ww", c_leu}, {"setp.hi.u32", "p:ww", c_gtu},
    {"setp.hs.u32", "p:ww", c_geu}, {"setp.lt.s32", "p:ww", c_lt32},
    {"setp.ge.s32", "p:ww", c_ge32},
    {"setp.gt.s16", "p:hh", c_gt16}, {"setp.le.s64", "p:ll", c_le64},
    {"setp.eq.f32", "p:ff", c_feq},
    {"setp.ne.f32", "p:ff", c_fne}, {"setp.lt.f32", "p:ff", c_flt}, {"setp.le.f32", "p:ff", c_fle},
    {"setp.gt.f32", "p:ff", c_fgt}, {"setp.ge.f32", "p:ff", c_fge},
    {"setp.equ.f32", "p:ff", c_fequ},
    {"setp.neu.f32", "p:ff", c_fneu}, {"setp.ltu.f32", "p:ff", c_fltu},
    {"setp.leu.f32", "p:ff", c_fleu}, {"setp.gtu.f32", "p:ff", c_fgtu},
    {"setp.geu.f32", "p:ff", c_fgeu}, {"setp.num.f32", "p:ff", c_num},
    {"setp.nan.f32", "p:ff", c_nan},
    {"setp.gt.f64", "p:DD", c_dgt}, {"setp.eq.ftz.f32", "p:ff", c_ftzeq},
    {"setp.lt.and.s32", "p:wwp", c_and}, {"setp.eq.or.s32 D, A, B, !C", "p:wwp", c_orn},
    {"setp.lt.xor.f32", "p:ffp", c_xor}, {"setp.ge.s32 _|D, A, B", "p:ww", c_lt32},
    {"selp.b32", "w:wwp", s_selp}, {"selp.b64", "l:llp", s_selp}, {"selp.f32", "f:ffp", s_selp},

    {"and.pred", "p:pp", r_and}, {"or.pred", "p:pp", r_or}, {"xor.pred", "p:pp", r_xor},
    {"not.pred", "p:p", r_not}, {"mov.pred", "p:p", m_same},
    {"cvt.u32.u8", "w:w", v_u8}, {"cvt.s32.s8", "w:w", v_s8}, {"cvt.u32.u16", "w:h", v_u16},
    {"cvt.s32.s16", "w:h", v_s16}, {"cvt.s64.s32", "l:w", v_s32}, {"cvt.u64.u32", "l:w", v_u32},
    {"cvt.u32.u64", "w:l", v_u32}, {"cvt.s16.s8", "h:h", v_s8}, {"cvt.u16.u32", "h:w", v_u16},
    {"cvt.s64.s16", "l:h", v_s16}, {"cvt.u64.u8", "l:h", v_u8}, {"cvt.sat.s8.s32", "w:w", v_sat8},
    {"cvt.sat.u8.s32", "w:w", v_satu8}, {"cvt.sat.u8.u32", "w:w", v_satu8u},
    {"cvt.sat.s16.s64", "w:l", v_sat16}, {"cvt.sat.u32.s64", "w:l", v_satu32},
    {"cvt.rni.s32.f32", "w:f", v_rni}, {"cvt.rzi.s32.f32", "w:f", v_rzi},
    {"cvt.rmi.s32.f32", "w:f", v_rmi}, {"cvt.rpi.s32.f32", "w:f", v_rpi},
    {"cvt.rzi.u32.f32", "w:f", v_rziu}, {"cvt.rni.s64.f32", "l:f", v_rni64},
    {"cvt.rzi.u64.f32", "l:f", v_rziu64}, {"cvt.rni.s8.f32", "w:f", v_rni8},
    {"cvt.rni.u8.f32", "w:f", v_rniu8}, {"cvt.rni.s16.f32", "h:f", v_rni16},
    {"cvt.rni.sat.s8.f32", "w:f", v_rni8}, {"cvt.rzi.s32.f64", "w:D", v_drzi},
    {"cvt.rni.s64.f64", "l:D", v_drni64}, {"cvt.rn.f32.s32", "f:w", v_fs32},
    {"cvt.rn.f32.u32", "f:w", v_fu32}, {"cvt.rn.f32.s64", "f:l", v_fs64},
    {"cvt.rn.f32.u64", "f:l", v_fu64}, {"cvt.rn.f32.s16", "f:h", v_fs16},
    {"cvt.rn.f32.u8", "f:h", v_fu8}, {"cvt.rn.f32.s8", "f:w", v_fs8},
    {"cvt.rz.f32.s32", "f:w", v_fs32rz}, {"cvt.rp.f32.s64", "f:l", v_fs64rp},
    {"cvt.rn.f64.s32", "D:w", v_ds32}, {"cvt.rn.f64.s64", "D:l", v_ds64},
    {"cvt.f64.f32", "D:f", v_df},
    {"cvt.rn.f32.f64", "f:D", v_fd}, {"cvt.rni.f32.f32", "f:f", v_frni},
    {"cvt.rmi.f32.f32", "f:f", v_frmi}, {"cvt.rpi.f32.f32", "f:f", v_frpi},
    {"cvt.rzi.f32.f32", "f:f", v_frzi}, {"cvt.sat.f32.f32", "f:f", v_fsat},
    {"mov.b32 D, {A, B}", "w:hh", m_pack}, {"mov.b64 D, {A, B}", "l:ww", m_pack64},
    {"mov.b32 {D, _}, A", "h:w", m_lo}, {"mov.b32 {_, D}, A", "h:w", m_hi},
    {"mov.b32", "w:f", m_same}, {"mov.f64", "D:D", m_same},
};

enum { N_CASES = sizeof cases / sizeof *cases };

/* ------------------------------------------------------------------------------------------------
 * inputs */

static const u64 int_edges[] = {0, 1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 63, 64, 127, 128, 255, 256,
                                0x7fff, 0x8000, 0xffff, 0x10000, 0x7fffffff, 0x80000000, 0x80000001,
                                0xffffffff, 0x100000000, 0x7fffffffffffffff, 0x8000000000000000,
                                0xfffffffffffffffe, 0xffffffffffffffff};
static const float float_edges[] = {0.0f, -0.0f, 1, -1, 0.5f, -0.5f, 1.5f, 2.5f, -2.5f, 0x1p-149f,
                                    -0x1p-149f, 0x1p-127f, 0x1p-126f, 0x1.fffffep127f, 3, 127.5f,
                                    -128.5f, 255.5f, 32767.5f, 0x1p31f, -0x1p31f, 0x1p32f, 0x1p63f,
                                    -0x1p63f, 0x1p64f, INFINITY, -INFINITY, NAN, 1e-20f, 3.14159f};

static u64 random64(void) {
    static u64 s = 88172645463325252ull;
    s ^= s << 13, s ^= s >> 7, s ^= s << 17;
    return s * 0x2545f4914f6cdd1dull;
}

/* Value `i` of source `k`: all pairs of edges first, then random. */
static u64 input(char letter, int k, int i) {
    int n_int = sizeof int_edges / sizeof *int_edges, n_float = sizeof float_edges / 4;
    int which = k == 0 ? i : k == 1 ? i / 30 : i / 7;
    bool edge = i < 1000, plain = i % 2;
    if (letter == 'f' || letter == 'D') {
        float f = edge ? float_edges[which % n_float]
                       : ldexpf((float)(random64() >> 40) - 0x1p23f, (int)(random64() % 24) - 32);
        double d = (double)f;
        u64 bits = 0;
        if (!edge && plain) return letter == 'f' ? (u32)random64() : random64();
        memcpy(&bits, letter == 'f' ? (void *)&f : (void *)&d, letter == 'f' ? 4 : 8);
        return bits;
    }
    u64 v = edge ? int_edges[which % n_int] : random64() >> (plain ? 0 : random64() % 60);
    return letter == 'h' ? v & 0xffff : letter == 'w' ? v & 0xffffffff : letter == 'p' ? v & 1 : v;
}

/* ------------------------------------------------------------------------------------------------
 * kernels: case c is the entry k<c>(out, in), 8 bytes an item, in[k][N] */

static size_t append(char *text, size_t n, const char *s) {
    size_t len = strlen(s);
    memcpy(text + n, s, len + 1);
    return n + len;
}

static size_t operand_text(char *text, size_t n, char letter, int k) {
    char s[32];
    snprintf(s, sizeof s, "%%%c%d", letter, k);
    return append(text, n, s);
}

static size_t write_kernel(char *text, size_t n, int c) {
    char line[400];
    const char *sig = cases[c].sig, *op = cases[c].op;
    int n_src = (int)strlen(sig) - 2;
    snprintf(line, sizeof line, ".visible .entry k%d(.param .u64 out, .param .u64 in)\n{\n"
             " .reg .pred %%p<5>; .reg .b16 %%h<5>; .reg .b32 %%w<9>; .reg .f32 %%f<5>;\n"
             " .reg .b64 %%l<9>; .reg .f64 %%D<5>;\n ld.param.u64 %%l6, [out];\n"
             " ld.param.u64 %%l7, [in];\n mov.u32 %%w6, %%tid.x;\n mov.u32 %%w7, %%ctaid.x;\n"
             " mad.lo.u32 %%w6, %%w7, 256, %%w6;\n mul.wide.u32 %%l5, %%w6, 8;\n"
             " add.u64 %%l6, %%l6, %%l5;\n add.u64 %%l7, %%l7, %%l5;\n", c);
    n = append(text, n, line);
    for (int k = 0; k < n_src; k++) {
        char t = sig[2 + k];
        const char *type = t == 'h' ? "b16" : t == 'w' || t == 'p' ? "b32" : t == 'f' ? "f32"
                         : t == 'l' ? "b64" : "f64";
        snprintf(line, sizeof line, " ld.global.%s %%%c%d, [%%l7+%d];\n", type, t == 'p' ? 'w' : t,
                 k + 1, k * N * 8);
        n = append(text, n, line);
        if (t == 'p') {
            snprintf(line, sizeof line, " setp.ne.u32 %%p%d, %%w%d, 0;\n", k + 1, k + 1);
            n = append(text, n, line);
        }
    }
    n = append(text, n, " ");
    for (; *op; op++)
        if (strchr(cases[c].op, ' ') && strchr("DABC", *op))
            n = operand_text(text, n, *op == 'D' ? sig[0] : sig[2 + *op - 'A'],
                             *op == 'D' ? 4 : *op - 'A' + 1);
        else
            text[n++] = *op;
    if (!strchr(cases[c].op, ' ')) {
        text[n++] = ' ';
        n = operand_text(text, n, sig[0], 4);
        for (int k = 0; k < n_src; k++) {
            text[n++] = ',';
            n = operand_text(text, n, sig[2 + k], k + 1);
        }
    }
    const char *store =
        sig[0] == 'h'   ? ";\n cvt.u64.u16 %l5, %h4;\n st.global.u64 [%l6], %l5;\n"
        : sig[0] == 'w' ? ";\n cvt.u64.u32 %l5, %w4;\n st.global.u64 [%l6], %l5;\n"
        : sig[0] == 'f' ? ";\n mov.b32 %w8, %f4;\n st.global.v2.b32 [%l6], {%w8, 0};\n"
        : sig[0] == 'l' ? ";\n st.global.b64 [%l6], %l4;\n"
        : sig[0] == 'D' ? ";\n st.global.f64 [%l6], %D4;\n"
                        : ";\n selp.u64 %l5, 1, 0, %p4;\n st.global.u64 [%l6], %l5;\n";
    n = append(text, n, store);
    return append(text, n, " ret;\n}\n");
}

static int passed, failed;

static void run_case(SimModule *m, int c, u64 out, u64 in) {
    const char *sig = cases[c].sig;
    int n_src = (int)strlen(sig) - 2, wrong = 0;
    u64 *to = sim_mem_ptr(in), *got = sim_mem_ptr(out);
    u64 mask = sig[0] == 'h'          ? 0xffff
               : strchr("wf", sig[0]) ? 0xffffffff
               : sig[0] == 'p'        ? 1
                                      : ~0ull;
    char name[16];
    struct {
        u64 out, in;
    } p = {out, in};
    SimCounters counters = {0};
    for (int k = 0; k < n_src; k++)
        for (int i = 0; i < N; i++)
            to[k * N + i] = input(sig[2 + k], k, i);
    bool divides = !strncmp(cases[c].op, "div.u", 5) || !strncmp(cases[c].op, "div.s", 5) ||
                   !strncmp(cases[c].op, "rem.", 4);
    for (int i = 0; divides && i < N; i++) /* by zero is a finding of its own */
        to[N + i] = to[N + i] ? to[N + i] : 1;
    snprintf(name, sizeof name, "k%d", c);
    SimLaunch l = {sim_module_find(m, name), {N / 256, 1, 1}, {256, 1, 1}, 0, &p};
    if (sim_launch(&l, &counters))
        wrong = N;
    for (int i = 0; i < N; i++) {
        u64 x = to[i], y = to[N + i], z = to[2 * N + i];
        u64 want = cases[c].ref(x, y, z) & mask;
        if (want == got[i] || wrong++) continue;
        printf("FAIL %s: %llx %llx %llx gives %llx, should be %llx\n", cases[c].op,
               (unsigned long long)x, (unsigned long long)y, (unsigned long long)z,
               (unsigned long long)got[i], (unsigned long long)want);
    }
    if (wrong > 1)
        printf("FAIL %s: %d of %d values are wrong\n", cases[c].op, wrong, N);
    passed += !wrong;
    failed += wrong != 0;
}

int main(void) {
    static char text[1 << 20];
    char log[400];
    SimModule *m;
    size_t n = append(text, 0, ".version 7.4\n.target sm_80\n.address_size 64\n");
    for (int c = 0; c < N_CASES; c++)
        n = write_kernel(text, n, c);
    if (sim_module_load(0, text, n, &m, log, sizeof log)) {
        printf("FAIL %s\n0 passed, 1 failed\n", log);
        return 1;
    }
    u64 out, in;
    sim_mem_alloc(0, N * 8, &out);
    sim_mem_alloc(0, 3 * N * 8, &in);
    sim_mem_mark(in, 3 * N * 8, true);
    memset(sim_mem_ptr(in), 0, 3 * N * 8);
    for (int c = 0; c < N_CASES; c++)
        run_case(m, c, out, in);
    sim_module_unload(m);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
