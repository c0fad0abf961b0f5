/* ptx_flow.c: dataflow over a kernel.
 *
 * A register is live where some path leads to a read of it without a write before.
 * Those that are live at the entry may be read unset: they alone are tracked at run time, so that
 * correct code pays nothing. The most registers live at once estimate what ptxas allots. */
#include "ptx.h"

typedef struct {
    u32 first, last;   /* instructions */
    int next[2];       /* successors, -1: none */
    u64 *live;         /* at its beginning: a bit per slot, numbered offset / 32 */
} Basic;

enum { FIXED = 255 };  /* width of slots that are set from the start, which are never live */

static bool ends_block(const Inst *i) {
    return i->run == run_bra || i->run == run_exit || i->run == run_trap;
}

/* Cuts the code into basic blocks: at targets, and behind branches and ends. */
static Basic *find_blocks(const SimCode *c, u32 *n_blocks) {
    u8 *leader = zalloc(c->n_inst + 1);
    int *of_inst = zalloc(c->n_inst * sizeof *of_inst);
    Basic *b = NULL;
    u32 n = 0, cap = 0;
    for (u32 k = 0; k < c->n_inst; k++) {
        if (c->inst[k].run == run_bra) leader[c->inst[k].target] = 1;
        if (ends_block(&c->inst[k])) leader[k + 1] = 1;
    }
    for (u32 k = 0; k < c->n_inst; k++) {
        if (k == 0 || leader[k]) {
            b = xgrow(b, n, &cap, sizeof *b);
            b[n++] = (Basic){.first = k, .next = {-1, -1}};
        }
        b[n - 1].last = k;
        of_inst[k] = (int)n - 1;
    }
    for (u32 k = 0; k < n; k++) {
        const Inst *i = &c->inst[b[k].last];
        if (!ends_block(i) || i->guard) b[k].next[0] = k + 1 < n ? (int)k + 1 : -1;
        if (i->run == run_bra) b[k].next[1] = of_inst[i->target];
    }
    free(leader);
    free(of_inst);
    *n_blocks = n;
    return b;
}

/* How many 32-bit registers each slot takes: none if it is a predicate. */
static u8 *slot_widths(const SimCode *c, u32 n_slots) {
    u8 *width = zalloc(n_slots);
    for (u32 x = 0; x < c->n_inst; x++)
        for (int d = 0; d < c->inst[x].n_dst; d++)
            width[c->inst[x].dst[d] / 32] = c->inst[x].out_bits == 64 || c->inst[x].wide_dst ? 2
                                          : c->inst[x].out_bits == 1 ? 0 : 1;
    for (u32 k = 0; k < c->n_consts; k++) width[c->consts[k].offset / 32] = FIXED;
    for (int k = 0; k < SR_COUNT; k++) width[c->special[k] / 32] = FIXED;
    width[0] = FIXED; /* the sink */
    return width;
}

static bool is_live(const u64 *live, u32 offset) {
    return live[offset / 32 / 64] >> (offset / 32 % 64) & 1;
}

/* Makes a slot live or not; returns by how many registers there are more of them. */
static int set_live(u64 *live, u32 offset, bool on, const u8 *width) {
    u32 slot = offset / 32;
    if (width[slot] == FIXED || is_live(live, offset) == on) return 0;
    live[slot / 64] ^= 1ull << (slot % 64);
    return on ? width[slot] : -width[slot];
}

/* From the end of a block to its beginning; returns the most registers in between. A write under a
 * guard may leave the old value. */
static int walk_back(const SimCode *c, const Basic *b, u64 *live, const u8 *width) {
    int count = 0, most = 0;
    for (u32 offset = 0; offset < c->frame_bytes; offset += 32)
        count += is_live(live, offset) ? width[offset / 32] : 0;
    for (u32 x = b->last + 1; x-- > b->first;) {
        const Inst *i = &c->inst[x];
        for (int d = 0; d < i->n_dst && !i->guard; d++)
            count += set_live(live, i->dst[d], false, width);
        if (!i->guard) count += set_live(live, i->dst_pred, false, width);
        for (int k = 0; k < i->n_src; k++) count += set_live(live, i->src[k], true, width);
        count += set_live(live, i->guard, true, width);
        most = count > most ? count : most;
    }
    return most;
}

/* Backward over the blocks until nothing changes; returns the most registers at any place. */
static int find_live(const SimCode *c, Basic *b, u32 n, u32 words, const u8 *width) {
    int most = 0;
    u64 *live = zalloc(words * 8);
    for (bool changed = true; changed;) {
        changed = false;
        for (u32 k = n; k-- > 0;) {
            memset(live, 0, words * 8);
            for (int s = 0; s < 2; s++)
                for (u32 w = 0; b[k].next[s] >= 0 && w < words; w++)
                    live[w] |= b[b[k].next[s]].live[w];
            int here = walk_back(c, &b[k], live, width);
            most = here > most ? here : most;
            changed |= memcmp(b[k].live, live, words * 8) != 0;
            memcpy(b[k].live, live, words * 8);
        }
    }
    free(live);
    return most;
}

/* Notes which instructions read or write registers that are tracked, those of `set`. */
static void mark_checks(SimModule *m, SimCode *c, const u64 *set) {
    c->tracked = module_memory(m, c->frame_bytes / 32 * sizeof *c->tracked);
    for (u32 offset = 0; offset < c->frame_bytes; offset += 32)
        if (is_live(set, offset)) c->tracked[c->n_tracked++] = offset / 32;
    for (u32 x = 0; x < c->n_inst && c->n_tracked; x++) {
        Inst *i = &c->inst[x];
        i->check_init = is_live(set, i->guard);
        for (int k = 0; k < i->n_src; k++) i->check_init |= is_live(set, i->src[k]);
        i->copy_init = i->check_init && i->class == SIM_C_INT && i->n_src == 1 && i->n_dst == 1;
        i->note_init = is_live(set, i->dst_pred);
        for (int k = 0; k < i->n_dst; k++) i->note_init |= is_live(set, i->dst[k]);
    }
}

void analyse(SimModule *m, SimKernel *kernel) {
    SimCode *c = kernel->code;
    u32 n, words = c->frame_bytes / 32 / 64 + 1;
    Basic *b = find_blocks(c, &n);
    u8 *width = slot_widths(c, words * 64);
    u64 *sets = zalloc((size_t)n * words * 8);
    for (u32 k = 0; k < n; k++) b[k].live = sets + (size_t)k * words;
    kernel->registers = find_live(c, b, n, words, width);
    kernel->const_bytes = m->const_bytes;
    mark_checks(m, c, b[0].live);
    free(sets);
    free(width);
    free(b);
}
