/* mem.c: device memory and the host memory that kernels may see.
 *
 * Allocations are kept in one array sorted by address. Device addresses only grow, so a freed range
 * is never given out again and a stale pointer is always recognised. Between two allocations lies a
 * red zone of at least 512 bytes. */
#include "ptx.h"

#include <sys/mman.h>

enum { RED_ZONE = 512, POISON_LIMIT = 16 << 20 };

typedef struct {
    u64 limit, used, next; /* bytes; offset of the next allocation in the device's range */
    u32 peers;             /* bit p: may use memory of device p */
} Device;

static Device devices[SIM_MAX_DEVICES];
static Alloc **table;
static u32 n_table, cap_table;

static Device *device_of(int index) {
    Device *d = &devices[index];
    if (!d->limit) d->limit = 24ull << 30;
    return d;
}

/* ---- memory of the simulator itself */

static void *got(void *p, size_t bytes) {
    if (p) return p;
    fprintf(stderr, "sim: out of host memory (%zu bytes)\n", bytes);
    abort();
}

void *zalloc(size_t bytes) {
    return got(calloc(1, bytes ? bytes : 1), bytes);
}

void *xgrow(void *array, u32 count, u32 *cap, size_t item) {
    if (count < *cap) return array;
    u32 more = *cap ? *cap * 2 : 16;
    array = got(realloc(array, more * item), more * item);
    memset((char *)array + *cap * item, 0, (more - *cap) * item);
    *cap = more;
    return array;
}

/* ---- bit sets: one bit per byte of memory */

u64 bits_prefix(const u8 *bits, u64 first, u64 count) {
    u64 n = 0;
    while (n < count) {
        u64 at = first + n;
        u64 word;
        if (at % 8 == 0 && count - n >= 64) {
            memcpy(&word, bits + at / 8, 8);
            if (word == ~0ull) {
                n += 64;
                continue;
            }
        }
        if (!(bits[at / 8] >> (at % 8) & 1)) return n;
        n++;
    }
    return n;
}

/* Several threads may set bits of one byte at once. */
void bits_set(u8 *bits, u64 first, u64 count, bool value) {
    u64 n = 0;
    while (n < count) {
        u64 at = first + n;
        if (at % 8 == 0 && count - n >= 8) {
            u64 bytes = (count - n) / 8;
            memset(bits + at / 8, value ? 0xff : 0, bytes);
            n += bytes * 8;
            continue;
        }
        u8 bit = (u8)(1u << (at % 8));
        if (value)
            __atomic_fetch_or(&bits[at / 8], bit, __ATOMIC_RELAXED);
        else
            __atomic_fetch_and(&bits[at / 8], (u8)~bit, __ATOMIC_RELAXED);
        n++;
    }
}

/* ---- the table */

/* Index of the first allocation above `address`. */
static u32 upper(u64 address) {
    u32 low = 0, high = n_table;
    while (low < high) {
        u32 mid = (low + high) / 2;
        if (table[mid]->base <= address)
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

Alloc *mem_lookup(u64 address) {
    u32 at = upper(address);
    if (!at || address - table[at - 1]->base >= table[at - 1]->size) return NULL;
    return table[at - 1];
}

static void insert(Alloc *a) {
    u32 at = upper(a->base);
    table = xgrow(table, n_table, &cap_table, sizeof *table);
    memmove(table + at + 1, table + at, (n_table - at) * sizeof *table);
    table[at] = a;
    n_table++;
}

/* Zero pages that cost nothing until they are touched. */
static void *zero_pages(u64 bytes) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return got(p == MAP_FAILED ? NULL : p, bytes);
}

/* Race and sector records: one piece of zero pages, for every 32 bytes 8 + 8 and 1 + 1. */
static u64 record_bytes(const Alloc *a) {
    return (a->size / 32 + 8) * (8 * 8 + 8 * 8 + 4 + 4);
}

static void add_records(Alloc *a) {
    u64 n = a->size / 32 + 8;
    a->writes = zero_pages(record_bytes(a));
    a->reads = a->writes + 8 * n;
    a->seen_load = (u32 *)(a->reads + 8 * n);
    a->seen_store = a->seen_load + n;
}

static void drop_records(Alloc *a) {
    munmap(a->writes, record_bytes(a));
}

/* ---- device memory */

void sim_mem_limit(int device, u64 bytes) {
    device_of(device)->limit = bytes;
}

void sim_mem_info(int device, u64 *free_bytes, u64 *total_bytes) {
    Device *d = device_of(device);
    *free_bytes = d->limit - d->used;
    *total_bytes = d->limit;
}

/* 0x7fa1 patterns: NaN as f32, f16x2 and bf16x2, and a wild index as an integer. */
static void poison(u8 *p, u64 bytes) {
    static const u8 pattern[4] = {0xa1, 0x7f, 0xa1, 0x7f};
    for (u64 k = 0; k < bytes && k < POISON_LIMIT; k++) p[k] = pattern[k % 4];
}

int mem_alloc(int device, u64 bytes, bool global, Alloc **out) {
    Device *d = device_of(device);
    u64 room = (bytes + RED_ZONE - 1) & ~(u64)(RED_ZONE - 1);
    if (!bytes) return E_INVALID_VALUE;
    if (room < bytes || room > d->limit - d->used || d->next + room + RED_ZONE > DEVICE_SPAN)
        return E_OUT_OF_MEMORY;
    Alloc *a = zalloc(sizeof *a);
    a->device = device;
    a->base = DEVICE_BASE + (u64)device * DEVICE_SPAN + RED_ZONE + d->next;
    a->size = bytes;
    a->module_global = global;
    a->host = zero_pages(bytes);
    a->valid = zero_pages(bytes / 8 + 16);
    add_records(a);
    poison(a->host, bytes);
    d->used += room;
    d->next += room + RED_ZONE;
    insert(a);
    *out = a;
    return OK;
}

int sim_mem_alloc(int device, u64 bytes, u64 *address) {
    Alloc *a;
    int error = mem_alloc(device, bytes, false, &a);
    if (!error) *address = a->base;
    return error;
}

/* The bytes go, the entry stays, to recognise stale pointers. */
static void release(Alloc *a) {
    u64 room = (a->size + RED_ZONE - 1) & ~(u64)(RED_ZONE - 1);
    devices[a->device].used -= room;
    munmap(a->host, a->size);
    munmap(a->valid, a->size / 8 + 16);
    drop_records(a);
    a->host = a->valid = NULL;
    a->freed = true;
}

int sim_mem_free(u64 address) {
    Alloc *a = mem_lookup(address);
    if (!a || a->base != address || a->freed || a->device < 0 || a->module_global)
        return E_INVALID_VALUE;
    release(a);
    return OK;
}

void sim_mem_reset(int device) {
    for (u32 k = 0; k < n_table; k++)
        if (table[k]->device == device && !table[k]->freed) release(table[k]);
}

void sim_mem_peer(int device, int peer, bool allowed) {
    devices[device].peers &= ~(1u << peer);
    devices[device].peers |= (u32)allowed << peer;
}

bool mem_may_use(int device, const Alloc *a) {
    return a->device < 0 || a->device == device || devices[device].peers >> a->device & 1;
}

/* The records hold 14 bits of the launch number: start afresh when those wrap. */
void mem_prepare_launch(u32 number) {
    for (u32 k = 0; k < n_table && number % (1u << 14) == 0; k++)
        if (!table[k]->freed) {
            drop_records(table[k]);
            add_records(table[k]);
        }
}

/* ---- host memory */

int sim_mem_host_add(void *host, u64 bytes) {
    u64 base = (u64)(uintptr_t)host;
    if (!host || !bytes || base + bytes < base) return E_INVALID_VALUE;
    u32 at = upper(base + bytes - 1);
    if (at && table[at - 1]->base + table[at - 1]->size > base) return E_INVALID_VALUE;
    Alloc *a = zalloc(sizeof *a);
    a->device = -1;
    a->base = base;
    a->size = bytes;
    a->host = host;
    add_records(a);
    insert(a);
    return OK;
}

int sim_mem_host_remove(void *host) {
    u64 base = (u64)(uintptr_t)host;
    Alloc *a = mem_lookup(base);
    if (!a || a->base != base || a->device >= 0) return E_INVALID_VALUE;
    u32 at = upper(base) - 1;
    memmove(table + at, table + at + 1, (n_table - at - 1) * sizeof *table);
    n_table--;
    drop_records(a);
    free(a);
    return OK;
}

/* ---- questions */

int sim_mem_owner(u64 address) {
    const Alloc *a = mem_lookup(address);
    return a ? a->device : -1;
}

/* Why [address, address + bytes) cannot be used by `device` (-1: the host). */
void mem_explain(u64 address, u64 bytes, int device, SimKind *kind, char *text, size_t size) {
    u32 at = upper(address);
    const Alloc *a = mem_lookup(address), *near = at ? table[at - 1] : n_table ? table[0] : NULL;
    *kind = SIM_BOUNDS;
    if (!near) {
        snprintf(text, size, "no memory is allocated");
    } else if (a && a->freed) {
        *kind = SIM_FREED;
        snprintf(text, size, "use after free: %lu bytes into a freed block of %lu",
                 address - a->base, a->size);
    } else if (a && device >= 0 && !mem_may_use(device, a)) {
        *kind = SIM_FOREIGN;
        snprintf(text, size, "memory of device %d, to which device %d has no peer access",
                 a->device, device);
    } else if (a) {
        snprintf(text, size, "%lu bytes at %lu cross the end of a block of %lu", bytes,
                 address - a->base, a->size);
    } else if (address < DEVICE_BASE && (near->device >= 0 || address - near->base > 1u << 20)) {
        snprintf(text, size, "outside every block: not a device address, nor registered memory");
    } else if (address < near->base) {
        snprintf(text, size, "outside every block: %lu bytes before the first one",
                 near->base - address);
    } else {
        snprintf(text, size, "outside every block: %lu bytes past the end of one of %lu",
                 address - near->base - near->size, near->size);
    }
}

int sim_mem_check(u64 address, u64 bytes, char *text, size_t text_size) {
    const Alloc *a = mem_lookup(address);
    SimKind kind;
    if (a && !a->freed && bytes <= a->size - (address - a->base)) return OK;
    mem_explain(address, bytes, -1, &kind, text, text_size);
    return E_INVALID_VALUE;
}

void *sim_mem_ptr(u64 address) {
    const Alloc *a = mem_lookup(address);
    return a && a->host ? a->host + (address - a->base) : NULL;
}

void sim_mem_mark(u64 address, u64 bytes, bool initialised) {
    Alloc *a = mem_lookup(address);
    if (a && a->valid) bits_set(a->valid, address - a->base, bytes, initialised);
}

void sim_mem_copy_marks(u64 destination, u64 source, u64 bytes) {
    const Alloc *from = mem_lookup(source);
    Alloc *to = mem_lookup(destination);
    if (!to || !to->valid) return;
    u64 d = destination - to->base, run;
    for (u64 n = 0; n < bytes; n++) { /* runs of set bytes, and single unset ones */
        run = from && from->valid ? bits_prefix(from->valid, source + n - from->base, bytes - n)
                                  : bytes;
        bits_set(to->valid, d + n, run, true);
        n += run;
        if (n < bytes) bits_set(to->valid, d + n, 1, false);
    }
}

u64 sim_mem_initialised(u64 address, u64 bytes) {
    const Alloc *a = mem_lookup(address);
    return a && a->valid ? bits_prefix(a->valid, address - a->base, bytes) : bytes;
}
