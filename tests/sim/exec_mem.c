/* exec_mem.c: loads, stores, atomics, asynchronous copies, ldmatrix.
 *
 * Data moves between memory and a buffer that holds the lanes one after the other, and between the
 * buffer and registers; all checks and counters sit on the memory side. Full warps at consecutive
 * addresses (a "row") are handled as one piece. */
#include "ptx.h"

typedef struct {
    u64 at[32];  /* address of each lane, in its space */
    u32 mask, bytes;
    bool row;
    _Alignas(64) u8 data[32 * 16 + 8]; /* lane after lane; unpack() reads 8 bytes of the last too */
} Access;

/* ---- addresses */

static bool is_row(const Access *x) {
    u64 wrong = 0;
    for (u64 l = 0; l < 32; l++) wrong |= x->at[l] ^ (x->at[0] + l * x->bytes);
    return !wrong;
}

/* Base register plus offset, lane by lane. */
static void lane_addresses(const Warp *w, const Inst *i, Access *x) {
    const u64 *wide = src(w, i, 0);
    const u32 *narrow = src(w, i, 0);
    if (i->wide_addr)
        LANES x->at[l] = wide[l] + (u64)i->imm;
    else
        LANES x->at[l] = (u64)(u32)(narrow[l] + (u32)i->imm);
    x->mask = w->mask;
    x->row = w->mask == FULL_WARP && is_row(x);
}

static bool aligned_lanes(Warp *w, const Access *x) {
    EACH(l, x->mask) {
        if (x->at[l] % x->bytes == 0) continue;
        finding(w, SIM_ALIGN, (int)l, x->at[l], "address is not a multiple of the access size %u",
                x->bytes);
        return false;
    }
    return true;
}

/* Which window a generic address lies in. */
static Space space_of(u64 address) {
    u64 window = address & 0xffff00000000ull;
    return address < SHARED_BASE ? SP_GLOBAL : window == SHARED_BASE ? SP_SHARED
         : window == LOCAL_BASE ? SP_LOCAL : window == PARAM_BASE ? SP_PARAM : SP_GLOBAL;
}

/* The allocation that holds [address, address + bytes) and may be used, or NULL. The one that this
 * instruction used last needs no second look. */
static Alloc *lookup(Warp *w, u64 address, u64 bytes, bool store) {
    Alloc **cache = &w->worker->cache[w->pc], *a = *cache;
    if (a && address - a->base < a->size && bytes <= a->size - (address - a->base)) return a;
    a = mem_lookup(address);
    if (!a || a->freed || bytes > a->size - (address - a->base) || (store && a->read_only) ||
        !mem_may_use(w->worker->launch->device, a))
        return NULL;
    return *cache = a;
}

/* The same for one lane; says what is wrong. */
static Alloc *locate(Warp *w, u64 address, u64 bytes, int lane, bool store) {
    Alloc *a = lookup(w, address, bytes, store);
    char text[300];
    SimKind kind;
    if (a) return a;
    a = mem_lookup(address);
    mem_explain(address, bytes, w->worker->launch->device, &kind, text, sizeof text);
    if (store && a && a->read_only)
        finding(w, SIM_READONLY, lane, address, "store to constant memory");
    else
        finding(w, kind, lane, address, "%s of %lu bytes %s", store ? "store" : "load",
                bytes, text);
    return NULL;
}

/* ---- global memory */

static void check_global_init(Warp *w, const Alloc *a, u64 address, u32 bytes, int lane) {
    u64 at = address - a->base, n = bits_prefix(a->valid, at, bytes);
    if (n < bytes)
        finding(w, SIM_UNINIT, lane, address + n,
                "read of global memory that nothing wrote, %lu bytes into a block of %lu",
                at + n, a->size);
}

static int how_of(const Inst *i, bool store) {
    if (i->class == SIM_C_ATOMIC) return ACC_ATOMIC;
    if (i->strong || i->fence) return store ? ACC_STRONG_WRITE : ACC_STRONG_READ;
    return store ? ACC_WRITE : ACC_READ;
}

/* The bytes themselves, between memory (`base` is the address of memory[0]) and the buffer. */
static void copy_lanes(Access *x, u8 *memory, u64 base, bool store) {
    if (x->row) {
        u8 *p = memory + (x->at[0] - base);
        memcpy(store ? p : x->data, store ? x->data : p, 32 * x->bytes);
        return;
    }
    EACH(l, x->mask) {
        u8 *p = memory + (x->at[l] - base), *data = x->data + l * x->bytes;
        if (x->bytes == 4) /* a constant size is quicker */
            memcpy(store ? p : data, store ? data : p, 4);
        else
            memcpy(store ? p : data, store ? data : p, x->bytes);
    }
}

/* All active lanes lie in `a`, from `low` on, over `span` bytes. */
static void move_in(Warp *w, const Inst *i, Access *x, Alloc *a, u64 low, u64 span, bool store) {
    bool all_valid = !a->valid ||
                     (span <= 4096 && bits_prefix(a->valid, low - a->base, span) == span);
    if (!store && !all_valid && sim_options.check_init)
        EACH(l, x->mask) check_global_init(w, a, x->at[l], x->bytes, (int)l);
    if (sim_options.check_races && !a->read_only)
        race(w, a, x->mask, x->at, x->bytes, how_of(i, store), x->row, store ? x->data : NULL);
    if (i->space != SP_CONST && i->class != SIM_C_ATOMIC)
        count_global(w, x->at, x->bytes, store, x->row, a);
    copy_lanes(x, a->host, a->base, store);
    if (store && !all_valid)
        EACH(l, x->mask) bits_set(a->valid, x->at[l] - a->base, x->bytes, true);
}

/* Most often all lanes lie in one allocation, which is then looked up once. */
static void move_global(Warp *w, const Inst *i, Access *x, bool store) {
    u64 low = ~0ull, high = 0;
    u32 mask = w->mask, left = x->mask;
    EACH(l, left) {
        low = x->at[l] < low ? x->at[l] : low;
        high = x->at[l] > high ? x->at[l] : high;
    }
    Alloc *a = lookup(w, low, high - low + x->bytes, store);
    if (a) {
        move_in(w, i, x, a, low, high - low + x->bytes, store);
        return;
    }
    x->row = false;
    while (left && !w->worker->stop) { /* one allocation after the other */
        u32 same = 0;
        a = locate(w, x->at[__builtin_ctz(left)], x->bytes, __builtin_ctz(left), store);
        EACH(l, left)
            same |= (u32)(a && x->at[l] - a->base <= a->size - x->bytes) << l;
        x->mask = w->mask = same;
        if (a) move_in(w, i, x, a, a->base, a->size, store);
        left &= ~same;
    }
    w->mask = x->mask = mask;
}

/* ---- shared, local and parameter memory: windows that begin at address 0 */

static bool inside(Warp *w, u32 lane, u64 address, u64 bytes, u64 size, const char *what) {
    if (address <= size && bytes <= size - address) return true;
    finding(w, SIM_BOUNDS, (int)lane, address, "%s %lu bytes", what, size);
    return false;
}

static bool inside_shared(Warp *w, u32 lane, u64 address, u64 bytes) {
    return inside(w, lane, address, bytes, w->worker->launch->shared_bytes,
                  "shared memory of this block is");
}

/* Says which byte is unset, or still on its way. */
static void check_shared_state(Warp *w, u32 lane, u64 address, u32 bytes, bool store) {
    const u8 *state = w->worker->shared_state + address;
    u32 b = 0;
    while (b < bytes && state[b] != 2 && (state[b] || store || !sim_options.check_init)) b++;
    if (b < bytes && state[b] == 2)
        finding(w, SIM_CP_ASYNC, (int)lane, address + b, "%s of shared memory that an asynchronous "
                "copy still fills: a wait (and a barrier) is missing", store ? "write" : "read");
    else if (b < bytes)
        finding(w, SIM_UNINIT, (int)lane, address + b,
                "read of shared memory that nothing wrote in this block");
}

/* Are all bytes of the lane set and no copy under way? */
static inline bool state_good(const u8 *state, u32 bytes) {
    u64 v = 0;
    if (bytes == 16 && memcmp(state, "\1\1\1\1\1\1\1\1", 8)) return false;
    state += bytes == 16 ? 8 : 0;
    memcpy(&v, state, bytes < 8 ? bytes : 8);
    return v == 0x0101010101010101ull >> (bytes < 8 ? 64 - 8 * bytes : 0);
}

static void move_shared(Warp *w, const Inst *i, Access *x, bool store) {
    Worker *k = w->worker;
    EACH(l, x->mask)
        if (!inside_shared(w, l, x->at[l], x->bytes)) return;
    if (i->class != SIM_C_ATOMIC) count_shared(w, x->at, x->bytes, x->row);
    EACH(l, x->mask)
        if (!state_good(k->shared_state + x->at[l], x->bytes))
            check_shared_state(w, l, x->at[l], x->bytes, store);
    if (sim_options.check_races)
        race(w, NULL, x->mask, x->at, x->bytes, how_of(i, store), x->row, store ? x->data : NULL);
    copy_lanes(x, k->shared, 0, store);
    if (store && x->row)
        memset(k->shared_state + x->at[0], 1, 32 * x->bytes);
    else if (store)
        EACH(l, x->mask) memset(k->shared_state + x->at[l], 1, x->bytes);
}

/* Memory of which each lane has `size` bytes, `stride` apart: no checks but the bounds. */
static void move_private(Warp *w, Access *x, u8 *memory, u64 stride, u64 size, const char *what,
                         bool store) {
    EACH(l, x->mask) {
        if (!inside(w, l, x->at[l], x->bytes, size, what)) return;
        u8 *p = memory + l * stride + x->at[l], *data = x->data + l * x->bytes;
        memcpy(store ? p : data, store ? data : p, x->bytes);
    }
}

/* Parameters: the block of the launch, the same for all threads. */
static void move_space(Warp *w, const Inst *i, Access *x, Space space, bool store) {
    Launch *launch = w->worker->launch;
    u64 each = (launch->code->local_bytes + 15) & ~15u;
    if (space == SP_PARAM && store)
        finding(w, SIM_READONLY, -1, x->at[0], "store to kernel parameters");
    else if (!aligned_lanes(w, x))
        return;
    else if (space == SP_SHARED)
        move_shared(w, i, x, store);
    else if (space == SP_LOCAL)
        move_private(w, x, w->worker->locals + (u64)w->index * 32 * each, each, each,
                     "local memory of a thread is", store);
    else if (space == SP_PARAM)
        move_private(w, x, launch->params, 0, launch->kernel->param_bytes,
                     "the kernel's parameters are", false);
    else
        move_global(w, i, x, store);
}

static u8 class_of(Space space) {
    return space == SP_SHARED ? SIM_C_SHARED : space == SP_LOCAL ? SIM_C_LOCAL
         : space == SP_PARAM ? SIM_C_CONST : SIM_C_GLOBAL;
}

/* Generic addresses: each window in turn; counted as what they turn out to be. */
static void move_generic(Warp *w, const Inst *i, Access *x, bool store) {
    u32 mask = w->mask, left = mask;
    bool row = x->row, first = true;
    while (left && !w->worker->stop) {
        Space s = space_of(x->at[__builtin_ctz(left)]);
        u32 same = 0;
        EACH(l, left) same |= (u32)(space_of(x->at[l]) == s) << l;
        EACH(l, same) x->at[l] &= s == SP_GLOBAL ? ~0ull : 0xffffffffull;
        x->mask = w->mask = same;
        x->row = row && same == FULL_WARP;
        move_space(w, i, x, s, store);
        if (first && i->class == SIM_C_GLOBAL) {
            SimCounters *c = &w->worker->count;
            u64 lanes = (u64)__builtin_popcount(mask);
            c->warp[SIM_C_GLOBAL]--, c->warp[class_of(s)]++;
            c->lane[SIM_C_GLOBAL] -= lanes, c->lane[class_of(s)] += lanes;
        }
        first = false;
        left &= ~same;
    }
    w->mask = mask;
}

static void move(Warp *w, const Inst *i, Access *x, bool store) {
    if (i->space == SP_GENERIC)
        move_generic(w, i, x, store);
    else
        move_space(w, i, x, i->space, store);
}

/* ---- ld and st */

/* Buffer -> registers: element k of each lane to register k. */
static void unpack(const Warp *w, const Inst *i, const Access *x) {
    u32 size = (u32)type_bytes(i->type);
    for (u32 k = 0; k < i->n_dst; k++) {
        const u8 *from = x->data + k * size;
        u32 *to = slot(w, i->dst[k]);
        if (size == 4 && !i->wide_dst && w->mask == FULL_WARP) {
            const u32 *words = (const u32 *)(const void *)from;
            if (i->n_dst == 2)
                LANES to[l] = words[2 * l];
            else if (i->n_dst == 4)
                LANES to[l] = words[4 * l];
            else
                memcpy(to, words, 128);
        } else {
            EACH(l, w->mask) {
                u64 v;
                memcpy(&v, from + l * x->bytes, 8);
                put_lane(to, i->wide_dst, l, (u64)integer_of(i->type, v));
            }
        }
    }
}

/* Registers -> buffer. */
static void pack(const Warp *w, const Inst *i, Access *x) {
    u32 size = (u32)type_bytes(i->type);
    for (int k = 1; k < i->n_src; k++) {
        const u32 *from = src(w, i, k);
        u8 *to = x->data + (u32)(k - 1) * size;
        if (size == 4 && !i->wide_src && i->n_src == 2)
            memcpy(to, from, 128);
        else
            for (u32 l = 0; l < 32; l++)
                memcpy(to + l * x->bytes, from + (i->wide_src ? 2 * l : l), size);
    }
}

static void fence_block(Warp *w, const Inst *i) {
    if (i->fence) w->worker->fenced = true;
}

/* ld and st, by arg: vec elements of the type. */
enum { LOAD, STORE };

HANDLER(transfer) {
    Access x;
    if (!w->mask) return;
    x.bytes = (u32)(type_bytes(i->type) * (i->vec ? i->vec : 1));
    lane_addresses(w, i, &x);
    fence_block(w, i);
    if (i->arg) pack(w, i, &x);
    move(w, i, &x, i->arg);
    if (!i->arg && !w->worker->stop) unpack(w, i, &x);
}

/* Fences inside a block: lanes and warps see each other's stores at once here. */
HANDLER(nothing) {
}

/* A fence: what this block reads from now on may be ordered by flags, which is not followed. */
HANDLER(membar) {
    w->worker->fenced = true;
}

/* ---- atomics */

static u64 add_values(Type t, u64 a, u64 b) {
    float f = bits_float((u32)a) + bits_float((u32)b);
    switch (t) {
    case T_F32: return f == f ? float_bits(f) : CANON_NAN;
    case T_F64: return double_bits(bits_double(a) + bits_double(b));
    default: return a + b;
    }
}

/* New value from the old one and the operands. */
static u64 combine_atomic(const Inst *i, u64 old, u64 b, u64 c) {
    Type t = i->type;
    bool less = type_is_signed(t) ? integer_of(t, b) < integer_of(t, old) : b < old;
    switch (i->op) {
    case OP_ADD: return add_values(t, old, b);
    case OP_MIN: return less ? b : old;
    case OP_MAX: return less ? old : b;
    case OP_AND: return old & b;
    case OP_OR: return old | b;
    case OP_XOR: return old ^ b;
    case OP_EXCH: return b;
    case OP_CAS: return old == b ? c : old;
    case OP_INC: return old >= b ? 0 : old + 1;
    default: return old == 0 || old > b ? b : old - 1; /* OP_DEC */
    }
}

/* Lanes in ascending order; launches with global atomics use one worker, so this is exact. */
HANDLER(atomic) {
    Access x;
    u32 all = w->mask;
    bool wide = type_bytes(i->type) == 8;
    if (!all) return;
    x.bytes = (u32)type_bytes(i->type);
    lane_addresses(w, i, &x);
    x.row = false;
    fence_block(w, i);
    EACH(l, all) {
        u64 at = x.at[l], old = 0;
        x.mask = w->mask = 1u << l;
        move(w, i, &x, false);
        if (w->worker->stop) break;
        memcpy(&old, x.data + l * x.bytes, x.bytes);
        u64 value = combine_atomic(i, old, get_lane(src(w, i, 1), wide, l),
                                   get_lane(src(w, i, 2), wide, l));
        memcpy(x.data + l * x.bytes, &value, x.bytes);
        x.at[l] = at; /* a generic address, if it was one */
        x.mask = w->mask;
        move(w, i, &x, true);
        if (i->n_dst) put_lane(slot(w, i->dst[0]), wide, l, old);
    }
    w->mask = all;
}

/* ---- cp.async */

/* Source addresses, and the lanes that copy all their bytes or only some (the rest is zero). */
static void async_sources(Warp *w, const Inst *i, Access *from, u32 *whole, u32 *part) {
    const u64 *global = src(w, i, 1);
    const u32 *size = i->n_src > 2 ? src(w, i, 2) : NULL;
    *whole = *part = 0;
    EACH(l, w->mask) {
        u32 n = size ? size[l] : i->vec;
        from->at[l] = global[l] + (u64)(s32)i->target;
        *whole |= (u32)(n == i->vec) << l;
        *part |= (u32)(n > 0 && n < i->vec) << l;
        if (n > i->vec)
            finding(w, SIM_CP_ASYNC, (int)l, from->at[l], "source size %u above the copy's %u", n,
                    i->vec);
    }
    from->bytes = i->vec;
    from->mask = *whole;
    from->row = *whole == FULL_WARP && is_row(from);
    memset(from->data, 0, sizeof from->data);
}

/* The source's bytes as they are now; lanes with fewer than the whole get zeros behind. */
static void async_read(Warp *w, const Inst *i, Access *from, u32 part) {
    u32 all = w->mask;
    w->mask = from->mask;
    if (w->mask && aligned_lanes(w, from)) move_global(w, i, from, false);
    w->mask = all;
    EACH(l, part) {
        u32 n = ((u32 *)src(w, i, 2))[l];
        Alloc *a = locate(w, from->at[l], n, (int)l, false);
        if (a) memcpy(from->data + l * from->bytes, a->host + (from->at[l] - a->base), n);
    }
}

/* Reads the source at once, marks the destination as under way; the bytes arrive at the wait. */
HANDLER(cp_async) {
    Access to, from;
    u32 all = w->mask, whole, part;
    if (!all) return;
    to.bytes = i->vec;
    lane_addresses(w, i, &to);
    EACH(l, all)
        if (i->wide_addr && space_of(to.at[l]) == SP_SHARED) to.at[l] &= 0xffffffff;
    async_sources(w, i, &from, &whole, &part);
    if (!aligned_lanes(w, &to)) return;
    async_read(w, i, &from, part);
    EACH(l, all)
        if (w->worker->stop || !inside_shared(w, l, to.at[l], to.bytes)) return;
    count_shared(w, to.at, to.bytes, to.row);
    EACH(l, all) {
        u8 *state = w->worker->shared_state + to.at[l];
        if (memchr(state, 2, to.bytes)) check_shared_state(w, l, to.at[l], to.bytes, true);
        memset(state, 2, to.bytes);
    }
    w->async = xgrow(w->async, w->n_async, &w->cap_async, sizeof *w->async);
    AsyncCopy *c = &w->async[w->n_async++];
    *c = (AsyncCopy){.lanes = all, .bytes = to.bytes, .row = to.row};
    memcpy(c->shared, to.at, sizeof to.at);
    memcpy(c->group, w->committed, sizeof c->group);
    memcpy(c->data, from.data, sizeof c->data);
}

/* Closes the group of copies of these lanes. */
HANDLER(cp_commit) {
    EACH(l, w->mask) w->committed[l]++;
}

/* Delivers what the lanes' `keep` newest committed groups do not hold; ~0u: all. */
static void async_deliver(Warp *w, u32 lanes, u32 keep) {
    Worker *k = w->worker;
    u32 kept = 0;
    for (u32 n = 0; n < w->n_async; n++) {
        AsyncCopy *c = &w->async[n];
        u32 ready = 0;
        EACH(l, c->lanes & lanes)
            ready |= (u32)(keep == ~0u || c->group[l] + keep < w->committed[l]) << l;
        if (sim_options.check_races && ready)
            race(w, NULL, ready, c->shared, c->bytes, ACC_WRITE, c->row && ready == FULL_WARP,
                 c->data);
        EACH(l, ready) {
            memcpy(k->shared + c->shared[l], c->data + l * c->bytes, c->bytes);
            memset(k->shared_state + c->shared[l], 1, c->bytes);
        }
        c->lanes &= ~ready;
        if (c->lanes && kept++ != n) w->async[kept - 1] = *c;
    }
    w->n_async = kept;
}

HANDLER(cp_wait_group) {
    async_deliver(w, w->mask, (u32)i->imm);
}

HANDLER(cp_wait_all) {
    async_deliver(w, w->mask, ~0u);
}

/* ---- ldmatrix: lanes 8m .. 8m+7 give the rows of matrix m; lane l receives elements 2(l%4) and
 * 2(l%4)+1 of row l/4, or with .trans of column l/4 */

HANDLER(ldmatrix) {
    Access x;
    u32 n = i->vec;
    u16 value[4][8][8]; /* matrix, row, column */
    if (!whole_warp(w, "ldmatrix")) return;
    x.bytes = 16;
    lane_addresses(w, i, &x);
    if (i->space == SP_GENERIC)
        for (u32 l = 0; l < n * 8; l++) {
            if (space_of(x.at[l]) != SP_SHARED)
                finding(w, SIM_BOUNDS, (int)l, x.at[l], "ldmatrix address is not shared memory");
            x.at[l] &= 0xffffffff;
        }
    x.mask = w->mask = n == 4 ? FULL_WARP : (1u << n * 8) - 1;
    x.row = x.row && n == 4;
    if (aligned_lanes(w, &x)) move_shared(w, i, &x, false);
    w->mask = FULL_WARP;
    if (w->worker->stop) return;
    memcpy(value, x.data, n * 128);
    for (u32 m = 0; m < n; m++) {
        u32 *to = slot(w, i->dst[m]);
        for (u32 l = 0; l < 32; l++) {
            u32 r = l / 4, c = l % 4 * 2;
            to[l] = i->trans ? value[m][c][r] | (u32)value[m][c + 1][r] << 16
                             : value[m][r][c] | (u32)value[m][r][c + 1] << 16;
        }
    }
}

#define CACHE "[.ca|.cg|.cs|.lu|.cv|.wb|.wt]"
#define EVICT "[.L1::evict_normal|.L1::evict_unchanged|.L1::evict_first|.L1::evict_last|" \
              ".L1::no_allocate]"
#define PREFETCH "[.L2::64B|.L2::128B|.L2::256B]"
#define ORDER "[.weak|.volatile|.relaxed|.acquire|.release]"
#define SCOPE "[.cta|.gpu|.sys]"
#define TYPES ".b8|.u8|.s8|.b16|.u16|.s16|.f16|.bf16|.b32|.u32|.s32|.f32|.b64|.u64|.s64|.f64"
#define OPS ".and|.or|.xor|.add|.inc|.dec|.min|.max|.exch"

#define PLACE SCOPE " [.global|.shared|.shared::cta] "
#define ATOM "atom [.relaxed|.acquire|.release|.acq_rel] " PLACE
#define RED "red [.relaxed|.release] " PLACE

const Form mem_forms[] = {
    {"ld .param|.const [.v2|.v4] " TYPES, "Dm", SIM_C_CONST, 0, transfer, LOAD},
    {"ld " ORDER " .shared|.shared::cta [.v2|.v4] " TYPES, "Dm", SIM_C_SHARED, 0, transfer, LOAD},
    {"ld " ORDER " .local " CACHE " [.v2|.v4] " TYPES, "Dm", SIM_C_LOCAL, 0, transfer, LOAD},
    {"ld " ORDER " " SCOPE " [.global] " CACHE " [.nc] " EVICT " " PREFETCH " [.v2|.v4] "
     TYPES, "Dm", SIM_C_GLOBAL, 0, transfer, LOAD},
    {"st .param [.v2|.v4] " TYPES, "mA", SIM_C_LOCAL, 0, transfer, STORE},
    {"st " ORDER " .shared|.shared::cta [.v2|.v4] " TYPES, "mA", SIM_C_SHARED, 0, transfer, STORE},
    {"st " ORDER " .local " CACHE " [.v2|.v4] " TYPES, "mA", SIM_C_LOCAL, 0, transfer, STORE},
    {"st " ORDER " " SCOPE " [.global] " CACHE " " EVICT " [.v2|.v4] " TYPES, "mA",
     SIM_C_GLOBAL, 0, transfer, STORE},
    {"membar .cta", "", SIM_C_GLOBAL, 0, nothing},
    {"membar .gl|.sys", "", SIM_C_GLOBAL, 0, membar},
    {"fence [.sc|.acq_rel] .cta", "", SIM_C_GLOBAL, 0, nothing},
    {"fence [.sc|.acq_rel] .gpu|.sys", "", SIM_C_GLOBAL, 0, membar},
    {ATOM OPS " .b32|.u32|.s32|.b64|.u64|.s64", "dma", SIM_C_ATOMIC, 0, atomic},
    {ATOM ".add .f32|.f64", "dma", SIM_C_ATOMIC, 0, atomic},
    {ATOM ".cas .b16|.b32|.u32|.b64|.u64", "dmaa", SIM_C_ATOMIC, 0, atomic},
    {RED OPS " .b32|.u32|.s32|.b64|.u64|.s64", "ma", SIM_C_ATOMIC, 0, atomic},
    {RED ".add .f32|.f64", "ma", SIM_C_ATOMIC, 0, atomic},
    {"cp .async .ca|.cg .shared|.shared::cta .global " PREFETCH, "mMn?w",
     SIM_C_ASYNC, 0, cp_async},
    {"cp .async .commit_group", "", SIM_C_ASYNC, 0, cp_commit},
    {"cp .async .wait_group", "i", SIM_C_ASYNC, 0, cp_wait_group},
    {"cp .async .wait_all", "", SIM_C_ASYNC, 0, cp_wait_all},
    {"ldmatrix .sync .aligned .m8n8 .x1|.x2|.x4 [.trans] [.shared|.shared::cta] .b16", "Vm",
     SIM_C_SHARED, 0, ldmatrix},
    {0},
};
