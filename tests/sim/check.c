/* check.c: races. Every 4 bytes of memory have a record of the last write and of the reads.
 *
 * A record names the launch (shared memory: the block's turn) that made it, so nothing needs to be
 * cleared in between, then block, barriers passed, thread, and which of the 4 bytes:
 *
 *   63..50 scope   49..30 block (shared: warp-level epoch)   29..16 barriers passed
 *   15..6 thread in block   5..4 who else   3..0 bytes
 *
 * "Who else": 0 this thread alone, 1 several lanes of its warp, 2 several warps of the block, 3
 * several blocks; in a write record 3 means an atomic or otherwise strong access.
 * Two accesses race if one is a write, they touch a common byte, are by different threads, and no
 * barrier lies between; in shared memory lanes of one warp race too unless a warp-level
 * synchronisation lies between. A store of the bytes that are there already excuses itself. */
#include "ptx.h"

enum { S_MULTI = 4, S_TID = 6, S_EPOCH = 16, S_BLOCK = 30, S_SCOPE = 50 };

#define FIELD_SCOPE (0x3fffull << S_SCOPE)
#define FIELD_BLOCK (0xfffffull << S_BLOCK)
#define FIELD_EPOCH (0x3fffull << S_EPOCH)
#define FIELD_TID (0x3ffull << S_TID)
#define FIELD_MULTI (3ull << S_MULTI)

static inline u32 multi_of(u64 tag) {
    return tag >> S_MULTI & 3;
}

static u64 base_tag(const Warp *w, bool shared) {
    const Worker *k = w->worker;
    u64 scope = shared ? k->serial : k->launch->number;
    u64 block = shared ? w->sync_epoch : k->block_index;
    return (scope & 0x3fff) << S_SCOPE | (block & 0xfffff) << S_BLOCK |
           (u64)(k->epoch & 0x3fff) << S_EPOCH;
}

static inline u64 lane_tag(const Warp *w, u64 base, u32 lane, u32 bytes) {
    return base | (u64)(u32)(w->index * 32 + (int)lane) << S_TID | bytes;
}

/* Is the recorded access ordered before the one of `tag`, or by the same thread? */
static bool ordered(const Warp *w, u64 old, u64 tag, bool shared, bool read_record) {
    u64 diff = old ^ tag;
    u32 multi = multi_of(old);
    if (diff & FIELD_SCOPE) return true;
    if (read_record && multi == 3) return w->worker->fenced;
    if (!shared && diff & FIELD_BLOCK) return w->worker->fenced;
    if (diff & FIELD_EPOCH) return true;
    if (multi == 2) return false;
    bool same_warp = !(diff >> (S_TID + 5) & 31);
    if (same_warp && (!shared || diff & FIELD_BLOCK)) return true;
    return !(diff & FIELD_TID) && multi != 1;
}

static void report(Warp *w, u64 old, u64 tag, u64 address, const char *what, const char *other,
                   bool shared) {
    u32 tid = (u32)(old >> S_TID) & 0x3ff, block = (u32)(old >> S_BLOCK) & 0xfffff;
    char who[64];
    snprintf(who, sizeof who, shared ? "thread %u" : "thread %u of block %u", tid, block);
    finding(w, SIM_RACE, (int)(tag >> S_TID & 31), address, "%s-memory race: this %s and a %s by "
            "%s are not ordered%s", shared ? "shared" : "global", what, other, who,
            shared ? " by a barrier" : "");
}

static void note_read(u64 *record, u64 tag, bool shared) {
    u64 old = *record, diff = old ^ tag;
    if (diff & FIELD_SCOPE) {
        *record = tag;
    } else if (!shared && (diff & FIELD_BLOCK || multi_of(old) == 3)) {
        *record = tag | FIELD_MULTI | (old & 15);
    } else if (diff & FIELD_EPOCH) {
        *record = tag;
    } else {
        u64 multi = !(diff & FIELD_TID) ? multi_of(old)
                  : diff >> (S_TID + 5) & 31 || multi_of(old) == 2 ? 2 : 1;
        *record = tag | multi << S_MULTI | (old & 15);
    }
}

static void note_write(u64 *record, u64 tag, bool strong) {
    u64 old = *record, diff = old ^ tag;
    bool joins = !(diff & (FIELD_SCOPE | FIELD_EPOCH)) && !(old & tag & 15) && diff & FIELD_TID;
    if (strong)
        *record = tag | FIELD_MULTI;
    else if (joins && multi_of(old) != 3)
        *record = tag | (old & 15) | (diff >> (S_TID + 5) & 31 || multi_of(old) == 2 ||
                                      diff & FIELD_BLOCK ? 2ull : 1ull) << S_MULTI;
    else
        *record = tag;
}

/* Where accesses are recorded: base is the address of the first record and of memory. */
typedef struct {
    u64 *writes, *reads, base;
    u8 *memory;
    bool shared;
} Records;

/* One access to one word, record `at`. silent: a store that changes nothing. */
static void touch(Warp *w, const Records *r, u64 at, u64 tag, int how, u64 address, bool silent) {
    bool strong = how == ACC_ATOMIC || how == ACC_STRONG_READ || how == ACC_STRONG_WRITE;
    bool is_read = how == ACC_READ || how == ACC_STRONG_READ;
    const char *what = how == ACC_ATOMIC ? "atomic" : is_read ? "read" : "write";
    u64 *wrote = &r->writes[at], *read = &r->reads[at];
    u32 multi = multi_of(*wrote);
    bool other_warp = (*wrote ^ tag) >> (S_TID + 5) & 31;
    /* else it is unknown who wrote our byte */
    bool known = multi == 0 || (multi == 1 && other_warp) || (multi == 3 && !strong);
    if (known && *wrote & tag & 15 && !silent &&
        !ordered(w, *wrote & ~FIELD_MULTI, tag, r->shared, false))
        report(w, *wrote, tag, address, what, multi == 3 ? "strong write" : "write", r->shared);
    if (!is_read && *read & tag & 15 && !silent && !ordered(w, *read, tag, r->shared, true))
        report(w, *read, tag, address, what, "read", r->shared);
    if (how == ACC_READ)
        note_read(read, tag, r->shared);
    else if (!is_read)
        note_write(wrote, tag, strong);
}

/* A plain access of whole words where the records say nothing of this scope and epoch, or reads by
 * all kinds of threads already: what nearly every access is. False: look closer. */
static inline bool touch_quick(u64 *writes, u64 *reads, u64 tag, u32 words, bool read, u64 mask,
                               u64 settled) {
    for (u32 k = 0; k < words; k++) {
        bool was_read = !((reads[k] ^ tag) & mask);
        if (!((writes[k] ^ tag) & mask) || (was_read && !read)) return false;
        if (was_read && (reads[k] & (mask | FIELD_MULTI | 15)) != settled) return false;
    }
    for (u32 k = 0; k < words; k++)
        if (!read)
            writes[k] = tag;
        else if ((reads[k] & (mask | FIELD_MULTI | 15)) != settled)
            reads[k] = tag;
    return true;
}

/* A full warp's access to consecutive words: if no record is of this scope and epoch, as is usual,
 * the new ones are written without looking at each. */
static bool touch_row(const Records *r, u64 at, u64 base, u32 lane_bytes, bool read, u64 mask,
                      u64 settled) {
    u64 *writes = r->writes + at, *reads = r->reads + at, *record = read ? reads : writes;
    u32 n = lane_bytes * 8, shift = lane_bytes == 4 ? 0 : lane_bytes == 8 ? 1 : 2;
    bool written = false, was_read = false, all_settled = true;
    for (u32 j = 0; j < n; j++) {
        written |= ((writes[j] ^ base) & mask) == 0;
        was_read |= ((reads[j] ^ base) & mask) == 0;
        all_settled &= (reads[j] & (mask | FIELD_MULTI | 15)) == settled;
    }
    if (written || (was_read && !(read && all_settled))) return false;
    for (u32 j = 0; j < n && !was_read; j++) record[j] = base + ((u64)(j >> shift) << S_TID);
    return true;
}

void race(Warp *w, Alloc *a, u32 lanes, const u64 *address, u32 bytes, int how, bool row,
          const u8 *data) {
    Worker *k = w->worker;
    Records r = a ? (Records){a->writes, a->reads, a->base, a->host, false}
                  : (Records){k->shared_writes, k->shared_reads, 0, k->shared, true};
    u64 base = base_tag(w, r.shared), last = ~0ull;
    u64 mask = r.shared ? FIELD_SCOPE | FIELD_EPOCH : FIELD_SCOPE;
    u64 settled = (base & mask) | (r.shared ? 2ull : 3ull) << S_MULTI | 15;
    bool plain = bytes >= 4 && (how == ACC_READ || how == ACC_WRITE), read = how == ACC_READ;
    u32 same = 0;
    if (row && plain && touch_row(&r, (address[0] - r.base) / 4, lane_tag(w, base, 0, 15), bytes,
                                  read, mask, settled))
        return;
    EACH(l, lanes) {
        same = address[l] == last ? same + 1 : 0;
        last = address[l];
        if (read && same > 1) continue; /* a third reader in the warp changes nothing */
        u64 at = address[l] - r.base, tag = lane_tag(w, base, l, 15);
        const u8 *put = data ? data + l * bytes : NULL;
        if (bytes < 4) tag = lane_tag(w, base, l, ((1u << bytes) - 1) << (at % 4) & 15);
        if (!plain || !touch_quick(r.writes + at / 4, r.reads + at / 4, tag, bytes / 4, read, mask,
                                   settled))
            for (u32 b = 0; b < bytes; b += 4)
                touch(w, &r, (at + b) / 4, tag, how, address[l] + b,
                      put && !memcmp(put + b, r.memory + at + b, bytes < 4 ? bytes : 4));
        if (put) /* so that lanes that store the same value in one instruction excuse themselves */
            memcpy(r.memory + at, put, bytes);
    }
}
