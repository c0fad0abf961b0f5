/* exec_warp.c: what lanes do together: shuffles, votes, barriers, matrix products; and control. */
#include "ptx.h"

/* ---- the lanes that take part */

/* Checks the member mask of every executing lane: it must name the lane, and no lane that is alive
 * and elsewhere. */
static bool members_ok(Warp *w, const Inst *i, int k, const char *what) {
    const u32 *members = src(w, i, k);
    bool all = w->mask == FULL_WARP;
    for (int l = 0; l < 32; l++) all &= members[l] == FULL_WARP;
    w->sync_epoch++;
    if (all) return true;
    EACH(l, w->mask)
        if (members[l] & w->alive & ~w->active && park(w)) return false;
    EACH(l, w->mask) {
        u32 absent = members[l] & w->alive & ~w->mask;
        if (!(members[l] >> l & 1))
            finding(w, SIM_WARP_MASK, (int)l, 0, "%s: mask %08x does not name lane %u, which "
                    "executes it", what, members[l], l);
        else if (absent)
            finding(w, SIM_WARP_MASK, (int)l, 0, "%s: mask %08x names lanes %08x, which are not "
                    "here (executing: %08x)", what, members[l], absent, w->mask);
        else
            continue;
        return false;
    }
    return w->mask != 0;
}

bool whole_warp(Warp *w, const char *what) {
    if (w->mask && w->active != w->alive && park(w)) return false;
    if (w->mask && w->mask != FULL_WARP)
        finding(w, SIM_WARP_MASK, -1, 0, "%s needs all 32 lanes, has %08x", what, w->mask);
    return w->mask == FULL_WARP;
}

/* Source lane of each lane, and whether it lies in the lane's segment. */
static u32 shfl_sources(const Inst *i, const u32 *b, const u32 *c, int *from) {
    int ok[32];
    LANES {
        int segment = (int)(c[l] >> 8 & 31), clamp = (int)(c[l] & 31), n = (int)(b[l] & 31);
        int high = (l & segment) | (clamp & ~segment);
        int j = i->op == OP_UP ? l - n : i->op == OP_DOWN ? l + n : i->op == OP_BFLY ? l ^ n
              : (l & segment) | (n & ~segment);
        ok[l] = i->op == OP_UP ? j >= high : j <= high;
        from[l] = ok[l] ? j : l;
    }
    u32 inside = 0;
    for (int l = 0; l < 32; l++) inside |= (u32)ok[l] << l;
    return inside;
}

/* Lane l gets a of the lane that b and c name; p: whether that lane lay in the segment. */
HANDLER(shfl) {
    const u32 *a = src(w, i, 0);
    u32 result[32], *to = slot(w, i->dst[0]);
    int from[32];
    if (!members_ok(w, i, 3, "shfl")) return;
    u32 inside = shfl_sources(i, src(w, i, 1), src(w, i, 2), from);
    EACH(l, w->mask) {
        if (!(w->mask >> from[l] & 1))
            finding(w, SIM_WARP_MASK, (int)l, 0, "shfl reads lane %d, which does not take part",
                    from[l]);
        result[l] = a[from[l]];
    }
    EACH(l, w->mask) to[l] = result[l];
    put_pred(w, i->dst_pred, inside, w->mask);
}

/* Counts only the lanes that the mask names. */
HANDLER(vote) {
    u32 p = src_mask(w, i, 0), *to = slot(w, i->dst[0]);
    const u32 *members = src(w, i, 1);
    if (!members_ok(w, i, 1, "vote")) return;
    EACH(l, w->mask) {
        u32 of = members[l] & w->mask, yes = p & of;
        bool r = i->op == OP_ALL ? yes == of : i->op == OP_ANY ? yes != 0 : yes == 0 || yes == of;
        if (i->op == OP_BALLOT)
            to[l] = yes;
        else
            put_pred(w, i->dst[0], r ? ~0u : 0, 1u << l);
    }
}

/* Which named lanes hold the same value; .all: do all of them? */
HANDLER(match) {
    bool wide = type_bytes(i->type) == 8;
    const u32 *members = src(w, i, 1);
    u32 result[32];
    if (!members_ok(w, i, 1, "match")) return;
    EACH(l, w->mask) {
        u32 of = members[l] & w->mask, same = 0;
        EACH(m, of)
            same |= (u32)(get_lane(src(w, i, 0), wide, m) == get_lane(src(w, i, 0), wide, l)) << m;
        result[l] = i->op == OP_ANY ? same : same == of ? of : 0;
        put_pred(w, i->dst_pred, same == of ? ~0u : 0, 1u << l);
    }
    EACH(l, w->mask) put_lane(slot(w, i->dst[0]), false, l, result[l]);
}

static u32 reduce(const Inst *i, u32 x, u32 y) {
    bool less = i->type == T_S32 ? (int32_t)x < (int32_t)y : x < y;
    switch (i->op) {
    case OP_ADD: return x + y;
    case OP_MIN: return less ? x : y;
    case OP_MAX: return less ? y : x;
    case OP_AND: return x & y;
    case OP_OR: return x | y;
    default: return x ^ y;
    }
}

HANDLER(redux) {
    const u32 *a = src(w, i, 0), *members = src(w, i, 1);
    u32 result[32];
    if (!members_ok(w, i, 1, "redux")) return;
    EACH(l, w->mask) {
        u32 of = members[l] & w->mask;
        result[l] = a[__builtin_ctz(of)];
        EACH(m, of & (of - 1)) result[l] = reduce(i, result[l], a[m]);
    }
    EACH(l, w->mask) ((u32 *)slot(w, i->dst[0]))[l] = result[l];
}

OP(activemask, u32, u32, u32, u32, w->mask)

HANDLER(warp_sync) {
    members_ok(w, i, 0, "bar.warp.sync");
}

/* ---- barriers */

/* The barrier is complete: everyone goes on. */
static void release_barrier(Worker *k, Barrier *b, u32 id) {
    for (int n = 0; n < k->n_warps; n++) {
        Warp *w = &k->warps[n];
        if (w->state != W_BARRIER || w->bar_id != id) continue;
        w->state = W_RUN;
        w->pc++;
    }
    *b = (Barrier){0};
    k->epoch++;
}

/* Operands: barrier, then optionally the number of threads (0: all of the block). arg: BAR_SYNC
 * waits, BAR_ARRIVE does not. */
enum { BAR_SYNC, BAR_ARRIVE };

HANDLER(bar) {
    Worker *k = w->worker;
    u32 lane = (u32)__builtin_ctz(w->mask | 1u << 31);
    u32 id = ((u32 *)src(w, i, 0))[lane];
    u32 count = i->n_src > 1 ? ((u32 *)src(w, i, 1))[lane] : 0;
    Barrier *b = &k->barriers[id & 15];
    if (!w->mask || (w->active != w->alive && park(w))) return;
    if (w->mask != w->alive) {
        finding(w, SIM_BARRIER, -1, 0, "barrier in divergent code: lanes %08x of %08x are here",
                w->mask, w->alive);
    } else if (!count && w->alive != w->members) {
        finding(w, SIM_BARRIER, -1, 0, "barrier after some threads of the warp have ended (lanes "
                "%08x of %08x remain)", w->alive, w->members);
    } else if (id > 15 || count % 32 || count > (u32)k->n_warps * 32) {
        finding(w, SIM_BARRIER, -1, 0, "bad barrier %u or number of threads %u", id, count);
    } else {
        b->expected = count ? count : (u32)k->n_warps * 32;
        b->arrived += 32;
        w->bar_id = id;
        if (i->arg != BAR_ARRIVE) w->state = W_BARRIER; /* the release moves the pc on */
        if (b->arrived >= b->expected) release_barrier(k, b, id);
        if (i->arg != BAR_ARRIVE) w->pc--; /* the loop adds one */
    }
}

/* ---- mma: D = A B + C, A 16 x K, B K x 8
 *
 * With g = lane / 4 and t = lane % 4, register r of A holds row g + 8 (r & 1) and the 32-bit group
 * of columns t + 4 (r / 2); register r of B the group of rows t + 4 r of column g; C and D: rows g
 * and g + 8, columns 2 t and 2 t + 1. A group is 2 halves or 4 bytes, lowest first. */

typedef struct {
    u32 a[16][8]; /* row, group */
    u32 b[8][8];  /* group, column */
    u32 c[16][8]; /* row, column; becomes D */
    int groups;   /* 4 or 8 */
} Tile;

/* Fragments -> matrices. */
static void load_tile(Warp *w, const Inst *i, Tile *t) {
    int n_a = t->groups / 2, n_b = t->groups / 4;
    for (int l = 0; l < 32; l++) {
        int g = l / 4, q = l % 4;
        for (int r = 0; r < n_a; r++)
            t->a[g + 8 * (r & 1)][q + 4 * (r / 2)] = ((u32 *)src(w, i, r))[l];
        for (int r = 0; r < n_b; r++)
            t->b[q + 4 * r][g] = ((u32 *)src(w, i, n_a + r))[l];
        for (int r = 0; r < 4; r++)
            t->c[g + 8 * (r / 2)][2 * q + (r & 1)] = ((u32 *)src(w, i, n_a + n_b + r))[l];
    }
}

static void store_tile(Warp *w, const Inst *i, const Tile *t) {
    for (int l = 0; l < 32; l++)
        for (int r = 0; r < 4; r++)
            ((u32 *)slot(w, i->dst[r]))[l] = t->c[l / 4 + 8 * (r / 2)][2 * (l % 4) + (r & 1)];
}

/* The low or high halves of 8 groups as f32. */
static inline __m256 widen_half(__m256i halves, bool high, bool bf16) {
    if (bf16)
        return _mm256_castsi256_ps(
            high ? _mm256_and_si256(halves, _mm256_set1_epi32((int)0xffff0000))
                 : _mm256_slli_epi32(halves, 16));
    __m256i v = high ? _mm256_srli_epi32(halves, 16)
                     : _mm256_and_si256(halves, _mm256_set1_epi32(0xffff));
    v = _mm256_permute4x64_epi64(_mm256_packus_epi32(v, v), 0x08);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(v));
}

/* Products are exact in f32; sums are rounded one by one, k ascending (hardware's order and width
 * differ). */
static void multiply_half(Tile *t, bool bf16) {
    __m256 b[8][2];
    float a[16][8][2];
    for (int g = 0; g < t->groups; g++)
        for (int h = 0; h < 2; h++)
            b[g][h] = widen_half(_mm256_loadu_si256((void *)t->b[g]), h, bf16);
    for (int r = 0; r < 16; r++)
        for (int h = 0; h < 2; h++) {
            float lane[8];
            _mm256_storeu_ps(lane, widen_half(_mm256_loadu_si256((void *)t->a[r]), h, bf16));
            for (int g = 0; g < t->groups; g++) a[r][g][h] = lane[g];
        }
    int n = 2 * t->groups;
    const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(CANON_NAN));
    for (int r = 0; r < 16; r++) {
        __m256 sum = _mm256_loadu_ps((void *)t->c[r]);
        for (int k = 0; k < n; k++)
            sum = _mm256_fmadd_ps(_mm256_set1_ps(a[r][k / 2][k & 1]), b[k / 2][k & 1], sum);
        sum = _mm256_blendv_ps(sum, nan, _mm256_cmp_ps(sum, sum, _CMP_UNORD_Q));
        _mm256_storeu_ps((void *)t->c[r], sum);
    }
}

/* Exact, modulo 2^32 like the hardware without .satfinite. */
static void multiply_int(Tile *t, bool a_signed, bool b_signed) {
    __m256i b[8][2];
    for (int g = 0; g < t->groups; g++)
        for (int h = 0; h < 2; h++)
            b[g][h] = widen_byte(_mm256_loadu_si256((void *)t->b[g]), h, b_signed);
    for (int r = 0; r < 16; r++) {
        __m256i sum = _mm256_loadu_si256((void *)t->c[r]);
        for (int g = 0; g < t->groups; g++) {
            __m256i a = _mm256_set1_epi32((int)t->a[r][g]);
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(widen_byte(a, 0, a_signed), b[g][0]));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(widen_byte(a, 1, a_signed), b[g][1]));
        }
        _mm256_storeu_si256((void *)t->c[r], sum);
    }
}

HANDLER(mma) {
    bool half = i->type == T_F32;
    Tile t = {.groups = i->arg};
    u64 mac = 16 * 8 * (u64)i->arg * (half ? 2 : 4);
    if (!whole_warp(w, "mma")) return;
    load_tile(w, i, &t);
    if (half) {
        multiply_half(&t, i->type2 == T_BF16);
        w->worker->count.mma_half++;
        w->worker->count.mma_half_mac += mac;
    } else {
        multiply_int(&t, i->type2 == T_S8, i->type3 == T_S8);
        w->worker->count.mma_int++;
        w->worker->count.mma_int_mac += mac;
    }
    store_tile(w, i, &t);
}

/* arg: the number of 32-bit groups along k, which decides the number of registers. */
static Handler *choose_mma(Inst *i) {
    int groups = i->arg;
    bool same = i->type != T_F32 || i->type2 == i->type3;
    return same && i->n_dst == 4 && i->n_src == groups / 2 + groups / 4 + 4 ? mma : NULL;
}

HANDLER(sleep_lanes) {
    w->yield = true;
    w->next_pc = 0;
}

#define MMA "mma .sync .aligned "
#define HALVES " .row .col .f32 .bf16|.f16 .bf16|.f16 .f32", "VUUU", SIM_C_MMA, 0, mma
#define BYTES " .row .col .s32 .u8|.s8 .u8|.s8 .s32", "VUUU", SIM_C_MMA, 0, mma

const Form warp_forms[] = {
    {"shfl .sync .up|.down|.bfly|.idx .b32", "daaaa", SIM_C_WARP, 0, shfl},
    {"vote .sync .all|.any|.uni .pred", "pqw", SIM_C_WARP, 0, vote},
    {"vote .sync .ballot .b32", "dqw", SIM_C_WARP, 0, vote},
    {"match .any|.all .sync .b32|.b64", "uaw", SIM_C_WARP, 0, match},
    {"redux .sync .add|.min|.max .u32|.s32", "daw", SIM_C_WARP, 0, redux},
    {"redux .sync .and|.or|.xor .b32", "daw", SIM_C_WARP, 0, redux},
    {"activemask .b32", "d", SIM_C_WARP, 32, activemask},
    {"bar .warp .sync", "w", SIM_C_WARP, 0, warp_sync},
    {"bar|barrier [.cta] .sync [.aligned]", "w?w", SIM_C_BARRIER, 0, bar, BAR_SYNC},
    {"bar|barrier [.cta] .arrive [.aligned]", "ww", SIM_C_BARRIER, 0, bar, BAR_ARRIVE},
    {MMA ".m16n8k16" HALVES, 8, choose_mma},
    {MMA ".m16n8k8" HALVES, 4, choose_mma},
    {MMA ".m16n8k32" BYTES, 8, choose_mma},
    {MMA ".m16n8k16" BYTES, 4, choose_mma},
    {"bra [.uni]", "L", SIM_C_CONTROL, 0, run_bra},
    {"ret [.uni]", "", SIM_C_CONTROL, 0, run_exit},
    {"exit", "", SIM_C_CONTROL, 0, run_exit},
    {"trap|brkpt", "", SIM_C_CONTROL, 0, run_trap},
    {"nanosleep .u32", "a", SIM_C_CONTROL, 0, sleep_lanes},
    {0},
};
