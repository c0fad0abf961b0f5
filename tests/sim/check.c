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
    int lane = (int)(tag >> S_TID & 31);
    if (shared)
        finding(w, SIM_RACE, lane, address, "shared-memory race: this %s and a %s by thread %u are "
                "not ordered by a barrier", what, other, tid);
    else
        finding(w, SIM_RACE, lane, address, "global-memory race: this %s and a %s by thread %u of "
                "block %u are not ordered", what, other, tid, block);
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

/* One access to one word. silent: a store that changes nothing. */
static void touch(Warp *w, u64 *writes, u64 *reads, u64 tag, int how, bool shared, u64 address,
                  bool silent) {
    bool strong = how == ACC_ATOMIC || how == ACC_STRONG_READ || how == ACC_STRONG_WRITE;
    bool is_read = how == ACC_READ || how == ACC_STRONG_READ;
    const char *what = how == ACC_ATOMIC ? "atomic" : is_read ? "read" : "write";
    u32 multi = multi_of(*writes);
    bool other_warp = (*writes ^ tag) >> (S_TID + 5) & 31;
    /* else it is unknown who wrote our byte */
    bool known = multi == 0 || (multi == 1 && other_warp) || (multi == 3 && !strong);
    if (known && *writes & tag & 15 && !silent && !ordered(w, *writes & ~FIELD_MULTI, tag, shared,
                                                           false))
        report(w, *writes, tag, address, what, multi == 3 ? "strong write" : "write", shared);
    if (!is_read && *reads & tag & 15 && !silent && !ordered(w, *reads, tag, shared, true))
        report(w, *reads, tag, address, what, "read", shared);
    if (how == ACC_READ)
        note_read(reads, tag, shared);
    else if (!is_read)
        note_write(writes, tag, strong);
}

/* One lane's access of up to 16 bytes; `data` are the bytes a store will put, `now` those there. */
static void touch_lane(Warp *w, u64 *writes, u64 *reads, int lane, u64 offset, u64 address,
                       u32 bytes, int how, bool shared, const u8 *data, const u8 *now) {
    u64 base = base_tag(w, shared);
    u64 word = offset / 4;
    if (bytes < 4) {
        u32 mask = ((1u << bytes) - 1) << (offset % 4) & 15;
        bool silent = data && !memcmp(data, now, bytes);
        touch(w, &writes[word], &reads[word], lane_tag(w, base, (u32)lane, mask), how, shared,
              address, silent);
        return;
    }
    u64 tag = lane_tag(w, base, (u32)lane, 15);
    for (u32 b = 0; b < bytes; b += 4, word++)
        touch(w, &writes[word], &reads[word], tag, how, shared, address + b,
              data && !memcmp(data + b, now + b, 4));
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

/* The lanes of `lanes`, anywhere: `base` is the address of the first record and of `memory`. */
static void touch_lanes(Warp *w, u64 *writes, u64 *reads, u32 lanes, const u64 *address, u64 base,
                        u32 bytes, int how, bool shared, const u8 *data, u8 *memory) {
    u64 tag = base_tag(w, shared) | 15, mask = shared ? FIELD_SCOPE | FIELD_EPOCH : FIELD_SCOPE;
    u64 settled = (tag & mask) | (shared ? 2ull : 3ull) << S_MULTI | 15;
    bool plain = bytes >= 4 && (how == ACC_READ || how == ACC_WRITE);
    u64 last = ~0ull;
    u32 same = 0;
    EACH(l, lanes) {
        same = address[l] == last ? same + 1 : 0;
        last = address[l];
        if (how == ACC_READ && same > 1)
            continue; /* a third reader in the warp changes nothing */
        u64 at = address[l] - base, lane = (u64)(u32)(w->index * 32 + (int)l) << S_TID;
        if (!plain || !touch_quick(writes + at / 4, reads + at / 4, tag | lane, bytes / 4,
                                   how == ACC_READ, mask, settled))
            touch_lane(w, writes, reads, (int)l, at, address[l], bytes, how, shared,
                       data ? data + l * bytes : NULL, memory + at);
        if (data) /* so that lanes that store the same value in one instruction excuse themselves */
            memcpy(memory + at, data + l * bytes, bytes);
    }
}

/* A full warp's access to consecutive words: if no record is of this scope and epoch, as is usual,
 * the new ones are written without looking at each. */
static bool touch_row(Warp *w, u64 *writes, u64 *reads, u32 lane_bytes, bool read, bool shared) {
    u64 base = base_tag(w, shared);
    u64 mask = shared ? FIELD_SCOPE | FIELD_EPOCH : FIELD_SCOPE;
    u64 shape = mask | FIELD_MULTI | 15,
        full = (base & mask) | (shared ? 2ull : 3ull) << S_MULTI | 15;
    u32 n = lane_bytes * 8, shift = lane_bytes == 4 ? 0 : lane_bytes == 8 ? 1 : 2;
    u64 written = 0, was_read = 0, settled = 0;
    for (u32 j = 0; j < n; j++) {
        written |= ((writes[j] ^ base) & mask) == 0;
        was_read |= ((reads[j] ^ base) & mask) == 0;
        settled |= (reads[j] & shape) != full;
    }
    if (written || (was_read && !(read && !settled))) return false;
    if (was_read)
        return true; /* read by all kinds of threads already */
    u64 *record = read ? reads : writes;
    u64 first = lane_tag(w, base, 0, 15);
    for (u32 j = 0; j < n; j++) record[j] = first + ((u64)(j >> shift) << S_TID);
    return true;
}

void race_global(Warp *w, Alloc *a, u32 lanes, const u64 *address, u32 bytes, int how, bool row,
                 const u8 *data) {
    u64 at = address[0] - a->base;
    if (row && bytes >= 4 && (how == ACC_READ || how == ACC_WRITE) &&
        touch_row(w, a->writes + at / 4, a->reads + at / 4, bytes, how == ACC_READ, false))
        return;
    touch_lanes(w, a->writes, a->reads, lanes, address, a->base, bytes, how, false, data, a->host);
}

void race_shared(Warp *w, u32 lanes, const u64 *address, u32 bytes, int how, bool row,
                 const u8 *data) {
    Worker *k = w->worker;
    u64 at = address[0];
    if (row && bytes >= 4 && (how == ACC_READ || how == ACC_WRITE) &&
        touch_row(w, k->shared_writes + at / 4, k->shared_reads + at / 4, bytes, how == ACC_READ,
                  true))
        return;
    touch_lanes(w, k->shared_writes, k->shared_reads, lanes, address, 0, bytes, how, true, data,
                k->shared);
}
