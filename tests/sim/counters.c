/* counters.c: what a launch did: instructions by class, bytes, sectors, bank conflicts. Also the
 * text of findings. */
#include "ptx.h"

/* Adds the sector to those this launch has seen; true if it is new. */
static bool first_sight(u32 *seen, u32 launch) {
    return *seen != launch && __atomic_exchange_n(seen, launch, __ATOMIC_RELAXED) != launch;
}

/* Distinct sectors of the active lanes; an access is aligned to its size, so it lies in one. Close
 * together they are bits of a word, else entries of a small hash table. */
static u32 distinct_sectors(const Warp *w, const u64 *address, u64 *list) {
    u64 table[64], bits = 0, low = address[__builtin_ctz(w->mask)] >> 5, high = low;
    u32 n = 0;
    EACH(l, w->mask) {
        u64 s = address[l] >> 5;
        low = s < low ? s : low;
        high = s > high ? s : high;
    }
    if (high - low < 64) {
        EACH(l, w->mask) bits |= 1ull << ((address[l] >> 5) - low);
        for (; bits; bits &= bits - 1) list[n++] = low + (u64)__builtin_ctzll(bits);
        return n;
    }
    memset(table, 0, sizeof table);
    EACH(l, w->mask) {
        u64 sector = (address[l] >> 5) + 1;
        u32 h = (u32)(sector * 0x9e3779b97f4a7c15ull >> 58);
        while (table[h] && table[h] != sector) h = (h + 1) & 63;
        if (!table[h]) {
            table[h] = sector;
            list[n++] = sector - 1;
        }
    }
    return n;
}

/* row: all 32 lanes at consecutive addresses. All active lanes lie in `a`. */
void count_global(Warp *w, const u64 *address, u32 bytes, bool store, bool row, Alloc *a) {
    Worker *k = w->worker;
    SimAccess *c = (store ? k->count.store : k->count.load) + __builtin_ctz(bytes);
    u64 *unique = store ? &k->count.unique_store_sectors : &k->count.unique_load_sectors;
    u32 *seen = (store ? a->seen_store : a->seen_load), launch = k->launch->number;
    u64 list[64], base = a->base >> 5;
    u32 lanes = (u32)__builtin_popcount(w->mask), n = 0;
    if (row)
        for (u64 s = address[0] >> 5; s <= (address[0] + 32 * bytes - 1) >> 5; s++)
            list[n++] = s;
    else
        n = distinct_sectors(w, address, list);
    c->warp++;
    c->lane += lanes;
    c->bytes += (u64)lanes * bytes;
    c->sectors += n;
    for (u32 s = 0; s < n; s++)
        *unique += first_sight(&seen[list[s] - base], launch);
}

/* Passes of the lanes [from, to): the most distinct words that one of 32 banks must deliver. */
static u32 bank_passes(const Warp *w, const u64 *address, u32 bytes, u32 from, u32 to) {
    u32 words[32][32];
    u8 n[32] = {0};
    u32 most = 0;
    for (u32 l = from; l < to; l++)
        for (u32 b = 0; w->mask >> l & 1 && b < bytes; b += 4) {
            u32 word = (u32)((address[l] + b) / 4), bank = word & 31, k = 0;
            while (k < n[bank] && words[bank][k] != word) k++;
            if (k == n[bank]) words[bank][n[bank]++] = word;
            most = n[bank] > most ? n[bank] : most;
        }
    return most;
}

/* 16-byte accesses are served a quarter warp at a time, 8-byte ones half a warp. */
void count_shared(Warp *w, const u64 *address, u32 bytes, bool row) {
    SimCounters *c = &w->worker->count;
    u32 phases = bytes == 16 ? 4 : bytes == 8 ? 2 : 1, lanes = 32 / phases;
    c->shared_accesses++;
    if (row) {
        c->shared_passes += phases;
        c->shared_ideal += phases;
        return;
    }
    for (u32 p = 0; p < phases; p++) {
        u32 passes = bank_passes(w, address, bytes, p * lanes, (p + 1) * lanes);
        c->shared_passes += passes;
        c->shared_ideal += passes > 0;
    }
}

/* Sorts the per-instruction counts into classes. */
void counters_finish(Worker *k) {
    for (u32 n = 0; n < k->code->n_inst; n++) {
        u8 class = k->code->inst[n].class;
        k->count.warp[class] += k->warp_count[n];
        k->count.lane[class] += k->lane_count[n];
    }
    k->count.barriers = k->count.warp[SIM_C_BARRIER];
    k->count.atomics = k->count.lane[SIM_C_ATOMIC];
}

void sim_counters_add(SimCounters *sum, const SimCounters *part) {
    u64 *to = (u64 *)sum;
    const u64 *from = (const u64 *)part;
    for (size_t n = 0; n < sizeof *sum / sizeof *to; n++) /* nothing but 64-bit counts inside */
        to[n] += from[n];
}

u64 sim_class_sum(const u64 *of_class) {
    u64 n = 0;
    for (int k = 0; k < SIM_N_CLASSES; k++) n += of_class[k];
    return n;
}

const char *const sim_class_names[SIM_N_CLASSES] = {
    "int", "fp32", "fp64", "half", "special", "cvt", "dp4a", "mma", "global", "shared", "local",
    "const", "async", "atomic", "warp", "barrier", "control"};

/* ---- findings as text */

static void (*sink)(void *, const SimFinding *);
static void *sink_user;

void sim_set_sink(void (*function)(void *user, const SimFinding *finding), void *user) {
    sink = function;
    sink_user = user;
}

void sim_report(const SimFinding *f) {
    sink(sink_user, f);
}

const char *const sim_kind_names[SIM_N_KINDS] = {
    "out of bounds", "use after free", "foreign memory", "misaligned", "read-only memory",
    "uninitialised read", "race", "barrier", "warp mask", "cp.async", "division by zero",
    "time-out", "trap", "unsupported", "host"};

char *sim_finding_text(const SimFinding *f, char *out, size_t size) {
    int n = snprintf(out, size, "%s: ", sim_kind_names[f->kind]);
    if (f->kernel[0])
        n += snprintf(out + n, size - (size_t)n,
                      "kernel %s, device %d, PTX line %d%s%s%s%.0d, block (%u,%u,%u), thread "
                      "(%u,%u,%u), address 0x%lx: ", f->kernel, f->device, f->ptx_line,
                      f->line ? ", " : "", f->line ? f->file : "", f->line ? ":" : "", f->line,
                      f->block[0], f->block[1], f->block[2], f->thread[0], f->thread[1],
                      f->thread[2], f->address);
    if (n >= 0 && (size_t)n < size)
        snprintf(out + n, size - (size_t)n, "%s", f->text);
    return out;
}
