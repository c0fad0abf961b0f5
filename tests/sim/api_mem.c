/* api_mem.c: device and host memory, copies, memset, pointer queries. */
#include "api.h"
#include <sys/mman.h>

/* Page-locked host memory: made here, or the program's own that it registered. */
typedef struct HostRange {
    uint64_t base, size; /* bytes */
    bool registered;
    int writer; /* device that last copied into it, or -1 */
    struct HostRange *next;
} HostRange;

static HostRange *host_ranges;

/* The pinned range that holds all of [address, address + bytes), or NULL. */
static HostRange *host_find(uint64_t address, uint64_t bytes) {
    HostRange *h = host_ranges;
    while (h && (address < h->base || address - h->base >= h->size ||
                 bytes > h->size - (address - h->base)))
        h = h->next;
    return h;
}

/* Is this a live device range? -> its owner in *device. Reports what is wrong. */
static CUresult device_range(uint64_t address, uint64_t bytes, int *device) {
    char why[200] = "";
    *device = sim_mem_owner(address);
    if (*device >= 0 && !sim_mem_check(address, bytes, why, sizeof why)) return OK;
    if (*device < 0) snprintf(why, sizeof why, "not device memory");
    return misuse("device pointer 0x%lx, %lu bytes: %s", address, bytes, why);
}

/* ---- device memory */

BODY(CTX, 3020, cuMemGetInfo_v2, (size_t *free_bytes, size_t *total), (free_bytes, total)) {
    uint64_t left, all;
    sim_mem_info(self.ctx->device, &left, &all);
    if (free_bytes) *free_bytes = left;
    if (total) *total = all;
    return OK;
}

/* The memory holds poison and counts as never written. */
BODY(UNSAFE, 3020, cuMemAlloc_v2, (CUdeviceptr *address, size_t bytes), (address, bytes)) {
    uint64_t p;
    if (!address || !bytes) return E_INVALID_VALUE;
    CUresult r = fault("oom", self.ctx->device, bytes, E_OUT_OF_MEMORY);
    if (!r) r = sim_mem_alloc(self.ctx->device, bytes, &p);
    return r ? r : GIVE(address, p);
}

/* As the driver does, waits for the device before the memory goes. */
BODY(UNSAFE, 3020, cuMemFree_v2, (CUdeviceptr address), (address)) {
    Ctx *c = device_ctx(sim_mem_owner(address));
    if (!address) return OK;
    if (c) run_ctx(c);
    if (c && c->sticky) return c->sticky;
    return !sim_mem_free(address) ? OK : misuse("0x%lx is not the start of an allocation", address);
}

/* ---- host memory */

static size_t pages(uint64_t bytes) {
    return (size_t)((bytes + 4095) & ~(uint64_t)4095);
}

/* Makes a range known to kernels and copies. */
static CUresult host_add(uint64_t base, uint64_t bytes, bool registered) {
    if (sim_mem_host_add((void *)(uintptr_t)base, bytes)) return E_HOST_MEMORY_ALREADY_REGISTERED;
    HostRange *h = zalloc(sizeof *h);
    *h = (HostRange){ base, bytes, registered, -1, host_ranges };
    host_ranges = h;
    return OK;
}

/* Forgets a range that was made or registered here. */
static CUresult host_remove(uint64_t base, bool registered, CUresult unknown) {
    HostRange **at = &host_ranges;
    while (*at && (*at)->base != base) at = &(*at)->next;
    HostRange *h = *at;
    if (!h || h->registered != registered) return unknown;
    for (int d = 0; d < config.devices; d++)
        if (device_ctx(d)) run_ctx(device_ctx(d)); /* any device may be using it */
    sim_mem_host_remove((void *)(uintptr_t)base);
    if (!registered) munmap((void *)(uintptr_t)base, pages(h->size) + 4096);
    *at = h->next;
    free(h);
    return OK;
}

/* Filled with 0xFF, a NaN in every float format. A guard page follows. */
static CUresult host_alloc(void **out, size_t bytes) {
    if (!out || !bytes) return E_INVALID_VALUE;
    if (bytes > (uint64_t)1 << 40) return E_OUT_OF_MEMORY;
    size_t size = pages(bytes);
    char *p = mmap(NULL, size + 4096, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return E_OUT_OF_MEMORY;
    mprotect(p + size, 4096, PROT_NONE);
    memset(p, 0xFF, bytes);
    *out = p;
    return host_add((uintptr_t)p, bytes, false);
}

/* Flags: 1 portable, 2 map, 4 I/O memory, 8 read only. Pages only; the last two are refused, as
 * device attribute 113 says. */
BODY(UNSAFE, 6050, cuMemHostRegister_v2, (void *p, size_t bytes, unsigned flags), (p, bytes,
    flags)) {
    if (!p || !bytes || flags & ~15u) return E_INVALID_VALUE;
    if (flags & 12) return E_NOT_SUPPORTED;
    if (((uintptr_t)p | bytes) & 4095) return misuse("address and size must be multiples of 4096");
    return host_add((uintptr_t)p, bytes, true);
}

API(UNSAFE, 2020, cuMemHostAlloc, (void **out, size_t bytes, unsigned flags),
    flags & ~7u ? E_INVALID_VALUE : host_alloc(out, bytes))
API(UNSAFE, 3020, cuMemAllocHost_v2, (void **out, size_t bytes), host_alloc(out, bytes))
API(UNSAFE, 2000, cuMemFreeHost, (void *p), host_remove((uintptr_t)p, false, E_INVALID_VALUE))
API(UNSAFE, 4000, cuMemHostUnregister, (void *p),
    host_remove((uintptr_t)p, true, E_HOST_MEMORY_NOT_REGISTERED))

/* ---- copies */

enum { HOST = 1, DEVICE = 2 }; /* what an argument has to be */

/* Checks one side of a copy. *device: owner or -1; *pinned: page-locked host memory. */
static CUresult side(uint64_t p, uint64_t bytes, int want, int *device, bool *pinned) {
    *pinned = false;
    *device = sim_mem_owner(p);
    if (*device >= 0 && want == HOST)
        return misuse("0x%lx is device memory, host memory is expected", p);
    if (*device >= 0 || want == DEVICE) {
        HostRange *h = want == DEVICE ? host_find(p, bytes) : NULL;
        if (!h) return device_range(p, bytes, device);
    }
    if (!p) return E_INVALID_VALUE;
    *pinned = host_find(p, bytes) != NULL;
    return OK;
}

/* A copy between any two places. Pageable sources are read now (the driver stages them), pinned
 * ones when the copy runs. `wait`: the call returns when it is done. */
static CUresult copy(uint64_t dst, int dst_is, uint64_t src, int src_is, uint64_t bytes, CUstream h,
                     bool wait) {
    Stream *s;
    bool dst_pinned, src_pinned;
    Work w = { .kind = W_COPY, .dst = dst, .src = src, .bytes = bytes };
    CUresult r = get_stream(h, &s);
    if (r || !bytes) return r;
    r = side(dst, bytes, dst_is, &w.dst_dev, &dst_pinned);
    if (!r) r = side(src, bytes, src_is, &w.src_dev, &src_pinned);
    if (r) return r;
    w.ctx = s->ctx;
    bool pageable = (w.dst_dev < 0 && !dst_pinned) || (w.src_dev < 0 && !src_pinned);
    if (s->capture && pageable) return capture_break(s->capture, E_STREAM_CAPTURE_UNSUPPORTED);
    if (w.src_dev < 0 && !src_pinned) {
        w.owned = zalloc(bytes);
        memcpy(w.owned, (void *)(uintptr_t)src, bytes);
        w.src = (uintptr_t)w.owned;
    }
    r = submit(s, &w);
    if (r || !wait) return r;
    run_until(s->tail);
    return s->ctx->sticky;
}

/* The host's view of one side of a copy. */
static void *bytes_at(uint64_t p, int device) {
    return device >= 0 ? sim_mem_ptr(p) : (void *)(uintptr_t)p;
}

/* A hop: one device's copy into pinned memory, then another device's copy out of it. */
static void note_hop(const Work *w) {
    HostRange *to = w->dst_dev < 0 ? host_find(w->dst, w->bytes) : NULL;
    HostRange *from = w->src_dev < 0 && !w->owned ? host_find(w->src, w->bytes) : NULL;
    if (to && w->src_dev >= 0) to->writer = w->src_dev;
    if (!from || w->dst_dev < 0) return;
    if (from->writer >= 0 && from->writer != w->dst_dev) stats_hop();
    from->writer = -1;
}

/* Runs when its turn has come. Bytes that nothing wrote are reported when they reach the host; from
 * device to device they only carry their mark along. */
CUresult work_copy(const Work *w) {
    char why[200] = "";
    if ((w->dst_dev >= 0 && sim_mem_check(w->dst, w->bytes, why, sizeof why)) ||
        (w->src_dev >= 0 && sim_mem_check(w->src, w->bytes, why, sizeof why))) {
        misuse("a copy found its memory gone: %s", why);
        return 700;
    }
    if (w->src_dev >= 0 && w->dst_dev < 0 && sim_options.check_init) {
        uint64_t good = sim_mem_initialised(w->src, w->bytes);
        if (good < w->bytes) {
            SimFinding f = { .kind = SIM_UNINIT, .kernel = "", .device = w->src_dev, .file = "",
                             .address = w->src + good };
            snprintf(f.text, sizeof f.text, "a copy of %lu bytes to the host reads bytes that "
                     "nothing wrote, the first at offset %lu", w->bytes, good);
            sim_report(&f);
        }
    }
    note_hop(w);
    memmove(bytes_at(w->dst, w->dst_dev), bytes_at(w->src, w->src_dev), w->bytes);
    if (w->dst_dev >= 0 && w->src_dev >= 0) sim_mem_copy_marks(w->dst, w->src, w->bytes);
    else if (w->dst_dev >= 0) sim_mem_mark(w->dst, w->bytes, true);
    return OK;
}

API(UNSAFE, 3020, cuMemcpyHtoD_v2, (CUdeviceptr dst, const void *src, size_t bytes),
    copy(dst, DEVICE, (uintptr_t)src, HOST, bytes, NULL, true))
API(UNSAFE, 3020, cuMemcpyDtoH_v2, (void *dst, CUdeviceptr src, size_t bytes),
    copy((uintptr_t)dst, HOST, src, DEVICE, bytes, NULL, true))

/* Between device memories the host does not wait, as documented. */
API(UNSAFE, 3020, cuMemcpyDtoD_v2, (CUdeviceptr dst, CUdeviceptr src, size_t bytes),
    copy(dst, DEVICE, src, DEVICE, bytes, NULL, false))
API(CTX, 3020, cuMemcpyHtoDAsync_v2, (CUdeviceptr dst, const void *src, size_t bytes, CUstream s),
    copy(dst, DEVICE, (uintptr_t)src, HOST, bytes, s, false))
API(CTX, 3020, cuMemcpyDtoHAsync_v2, (void *dst, CUdeviceptr src, size_t bytes, CUstream s),
    copy((uintptr_t)dst, HOST, src, DEVICE, bytes, s, false))
API(CTX, 3020, cuMemcpyDtoDAsync_v2, (CUdeviceptr dst, CUdeviceptr src, size_t bytes, CUstream s),
    copy(dst, DEVICE, src, DEVICE, bytes, s, false))

/* Works with and without peer access: the driver stages through the host if need be. */
static CUresult peer_copy(CUdeviceptr dst, Ctx *to, CUdeviceptr src, Ctx *from, size_t bytes,
                          CUstream s) {
    if (!obj_ok(to, T_CTX) || !obj_ok(from, T_CTX)) return E_INVALID_CONTEXT;
    if (to->sticky || from->sticky) return to->sticky ? to->sticky : from->sticky;
    if (bytes && (sim_mem_owner(dst) != to->device || sim_mem_owner(src) != from->device))
        return misuse("a pointer does not belong to the context given with it");
    return copy(dst, DEVICE, src, DEVICE, bytes, s, false);
}

API(CTX, 4000, cuMemcpyPeerAsync, (CUdeviceptr dst, CUcontext to, CUdeviceptr src, CUcontext from,
    size_t bytes, CUstream s), peer_copy(dst, to, src, from, bytes, s))

/* ---- memset */

CUresult work_set(const Work *w) {
    char why[200] = "";
    if (w->dst_dev >= 0 && sim_mem_check(w->dst, w->bytes, why, sizeof why)) {
        misuse("a memset found its memory gone: %s", why);
        return 700;
    }
    unsigned char *p = bytes_at(w->dst, w->dst_dev);
    if (w->unit == 1) memset(p, (int)w->value, w->bytes);
    for (uint64_t i = 0; w->unit == 4 && i < w->bytes; i += 4) memcpy(p + i, &w->value, 4);
    if (w->dst_dev >= 0) sim_mem_mark(w->dst, w->bytes, true);
    return OK;
}

/* Does not wait, in either form: so it is documented for device memory. */
static CUresult set(CUdeviceptr dst, uint32_t value, uint32_t unit, size_t n, CUstream h) {
    Stream *s;
    bool pinned;
    Work w = { .kind = W_SET, .dst = dst, .value = value, .unit = unit };
    CUresult r = get_stream(h, &s);
    if (r || !n) return r;
    if (__builtin_mul_overflow((uint64_t)n, unit, &w.bytes) || dst % unit) return E_INVALID_VALUE;
    r = side(dst, w.bytes, DEVICE, &w.dst_dev, &pinned);
    w.ctx = s->ctx;
    return r ? r : submit(s, &w);
}

API(UNSAFE, 3020, cuMemsetD8_v2, (CUdeviceptr dst, unsigned char value, size_t n),
    set(dst, value, 1, n, NULL))
API(UNSAFE, 3020, cuMemsetD32_v2, (CUdeviceptr dst, unsigned value, size_t n),
    set(dst, value, 4, n, NULL))
API(CTX, 3020, cuMemsetD8Async, (CUdeviceptr dst, unsigned char value, size_t n, CUstream s),
    set(dst, value, 1, n, s))
API(CTX, 3020, cuMemsetD32Async, (CUdeviceptr dst, unsigned value, size_t n, CUstream s),
    set(dst, value, 4, n, s))
