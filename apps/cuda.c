// See cuda.h.
#define _GNU_SOURCE
#include <sys/mman.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "cuda.h"


// The source of the kernels travels in the program, and PTX that was made before if there is some.
#ifdef DSV4_PTX
#define READY_PTX ".incbin \"" DSV4_PTX "\"\n"
#else
#define READY_PTX ""
#endif
__asm__(".pushsection .rodata\n"
        ".balign 16\n"
        "kernels_cu: .incbin \"kernels.cu\"\n"
        "kernels_cu_end: .byte 0\n"
        "ready_ptx: " READY_PTX
        "ready_ptx_end: .byte 0\n"
        ".popsection\n");
extern const char kernels_cu[], kernels_cu_end[], ready_ptx[], ready_ptx_end[];

// --- the libraries

typedef struct NvrtcObject *Nvrtc;

#define NVRTC_CALLS(X) \
    X(Version, "nvrtcVersion", int *major, int *minor) \
    X(CreateProgram, "nvrtcCreateProgram", Nvrtc *p, const char *source, const char *name, int n, \
      const char *const *headers, const char *const *includes) \
    X(CompileProgram, "nvrtcCompileProgram", Nvrtc p, int n, const char *const *options) \
    X(GetPTXSize, "nvrtcGetPTXSize", Nvrtc p, size_t *n) \
    X(GetPTX, "nvrtcGetPTX", Nvrtc p, char *text) \
    X(GetProgramLogSize, "nvrtcGetProgramLogSize", Nvrtc p, size_t *n) \
    X(GetProgramLog, "nvrtcGetProgramLog", Nvrtc p, char *text) \
    X(DestroyProgram, "nvrtcDestroyProgram", Nvrtc *p)

#define ENTRY(name, symbol, ...) symbol,
struct CudaCalls cu;
static struct { NVRTC_CALLS(CUDA_FIELD) } rtc;
static const char *const cuda_symbols[] = { CUDA_CALLS(ENTRY) };
static const char *const nvrtc_symbols[] = { NVRTC_CALLS(ENTRY) };

// Fills a table of function pointers; false and the missing name in e.
static bool load_symbols(void *lib, const char *const *names, size_t n, void *table,
                         const char *what, Err *e) {
    for (size_t i = 0; i < n; i++) {
        void *f = dlsym(lib, names[i]);
        if (!f) return fail(e, "%s has no %s: too old, a newer one is needed", what, names[i]);
        memcpy((char *)table + i * sizeof f, &f, sizeof f);
    }
    return true;
}

const char *cuda_error(CuResult r) {
    const char *name = NULL;
    return !cu.GetErrorName || cu.GetErrorName(r, &name) || !name ? "unknown error" : name;
}

// Libraries, cache and compiler: one thread at a time.
static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;

static bool driver_open(Err *e) {
    static bool open;
    static const int need = 11040;
    int version = 0;
    if (open) return true;
    void *lib = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!lib)
        return fail(e, "no NVIDIA driver: libcuda.so.1 was not found (install the driver, or use "
                    "--devices cpu)");
    const char *what = "the NVIDIA driver (libcuda.so.1)";
    if (!load_symbols(lib, cuda_symbols, COUNT(cuda_symbols), &cu, what, e)) return false;
    CuResult r = cu.Init(0);
    if (r)
        return fail(e, "the NVIDIA driver does not start: cuInit: %s (use --devices cpu)",
                    cuda_error(r));
    if (cu.DriverGetVersion(&version) || version < need)
        return fail(e, "the NVIDIA driver is too old: it supports CUDA %d.%d, %d.%d is needed "
                    "(driver 470 or newer)", version / 1000, version % 1000 / 10, need / 1000,
                    need % 1000 / 10);
    return open = true;
}

bool cuda_open(Err *e) {
    pthread_mutex_lock(&lock);
    bool open = driver_open(e);
    pthread_mutex_unlock(&lock);
    return open;
}

int cuda_count(void) {
    Err e;
    int n = 0;
    return cuda_open(&e) && !cu.DeviceGetCount(&n) ? n : 0;
}

size_t cuda_memory(int ordinal) {
    CuDevice dev;
    CuContext ctx;
    size_t bytes = 0, total;
    if (ordinal >= cuda_count() || cu.DeviceGet(&dev, ordinal)) return 0;
    if (cu.PrimaryCtxRetain(&ctx, dev) || cu.CtxSetCurrent(ctx)) return 0;
    return cu.MemGetInfo(&bytes, &total) ? 0 : bytes;
}

// Opens the compiler once. False with one line that says what was looked for.
static bool nvrtc_open(Err *e) {
    static bool open;
    const char *chosen = getenv("DSV4_NVRTC");
    const char *first = chosen && *chosen ? chosen : "libnvrtc.so.13";
    const char *names[] = { first, "libnvrtc.so.12", "libnvrtc.so.11.2" };
    void *lib = NULL;
    if (open) return true;
    for (size_t i = 0; i < COUNT(names) && !lib; i++) lib = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
    if (!lib)
        return fail(e, "no NVRTC, and no ready kernels for this model: tried %s, %s, %s (install "
                    "the CUDA toolkit, or the Python package nvidia-cuda-nvrtc and set DSV4_NVRTC "
                    "to the full path of its libnvrtc.so)", names[0], names[1], names[2]);
    return open = load_symbols(lib, nvrtc_symbols, COUNT(nvrtc_symbols), &rtc, "NVRTC", e);
}

int cuda_facts(void) {
    Err e;
    int driver = 0, version[2] = { 0 }, n = 0;
    if (cuda_open(&e)) {
        cu.DriverGetVersion(&driver);
        cu.DeviceGetCount(&n);
        printf("driver for CUDA %d.%d, %d GPU%s\n", driver / 1000, driver % 1000 / 10, n,
               n == 1 ? "" : "s");
    } else {
        printf("no GPU: %s\n", e.text);
    }
    if (!nvrtc_open(&e)) printf("%s\n", e.text);
    else if (!rtc.Version(version, version + 1)) printf("NVRTC %d.%d\n", version[0], version[1]);
    for (int i = 0; i < n; i++) {
        CuDevice dev;
        char name[100] = "";
        size_t bytes = 0;
        int fact[3] = { 75, 76, 16 };           // compute capability, multiprocessors
        if (cu.DeviceGet(&dev, i) || cu.DeviceGetName(name, sizeof name, dev)) continue;
        for (int j = 0; j < 3; j++) cu.DeviceGetAttribute(&fact[j], fact[j], dev);
        cu.DeviceTotalMem(&bytes, dev);
        printf("cuda:%d %s, compute capability %d.%d, %d multiprocessors, %.1f GB%s\n", i, name,
               fact[0], fact[1], fact[2], bytes / 1e9,
               strstr(name, "SIMULATED") ? "; its rates are computed, not measured" : "");
    }
    return n;
}

// --- from source to PTX

const char *cuda_kernels_file;

static Span kernel_source(void) {
    Span s = { kernels_cu, (size_t)(kernels_cu_end - kernels_cu) };
    Err e;
    if (cuda_kernels_file && !map_file(cuda_kernels_file, &s, &e)) die(1, "%s", e.text);
    return s;
}

// FNV-1a, 64 bits.
uint64_t hash64(uint64_t h, const void *p, size_t n) {
    for (size_t i = 0; i < n; i++) h = (h ^ ((const uint8_t *)p)[i]) * 0x100000001b3u;
    return h;
}

// NVRTC stamps its own PTX version, which only drivers of its generation load. The kernels need
// 7.4; the only newer thing in NVRTC's output is a hint that may be dropped.
static void ptx_lower(char *ptx) {
    char *to = ptx;
    for (char *line = ptx, *end; *line; line = end) {
        end = strchr(line, '\n');
        end = end ? end + 1 : line + strlen(line);
        size_t n = (size_t)(end - line);
        if (memmem(line, n, "used_bytes_mask", 15)) continue;
        memmove(to, line, n);
        if (n > 12 && !strncmp(to, ".version ", 9)) {
            memset(to + 9, ' ', n - 10);
            memcpy(to + 9, "7.4", 3);
        }
        to += n;
    }
    *to = 0;
}

// The first line of PTX that is kept.
#define MADE_BY "// NVRTC %d.%d\n"

// Is there a compiler here, of another version than the one that made this?
static bool ptx_outdated(const char *ptx) {
    Err e;
    int here[2], made[2] = { 0 };
    if (!nvrtc_open(&e) || rtc.Version(&here[0], &here[1])) return false;
    sscanf(ptx, MADE_BY, &made[0], &made[1]);
    return made[0] != here[0] || made[1] != here[1];
}

// Compiles with NVRTC. The options are one per line. On failure the compiler's log goes to stderr.
static char *ptx_compile(Span source, Span options) {
    Err e;
    Nvrtc p;
    const char *list[40];
    char *copy = xalloc(options.n + 1, 1), *save = NULL, *text = xalloc(source.n + 1, 1);
    int n = 0, version[2] = { 0 };
    size_t bytes = 0;
    if (!nvrtc_open(&e)) die(1, "%s", e.text);
    rtc.Version(&version[0], &version[1]);
    memcpy(copy, options.p, options.n);
    for (char *o = strtok_r(copy, "\n", &save); o && n < (int)COUNT(list);
         o = strtok_r(NULL, "\n", &save))
        list[n++] = o;
    memcpy(text, source.p, source.n);
    CuResult r = rtc.CreateProgram(&p, text, "kernels.cu", 0, NULL, NULL);
    if (r) die(1, "NVRTC: cannot create a program (error %d)", r);
    r = rtc.CompileProgram(p, n, list);
    if (r) {
        rtc.GetProgramLogSize(p, &bytes);
        char *log = xalloc(bytes + 1, 1);
        rtc.GetProgramLog(p, log);
        fputs(log, stderr);
        die(1, "NVRTC: kernels.cu does not compile (error %d; its log is above). Does "
               "libnvrtc-builtins of the same version lie beside libnvrtc?", r);
    }
    if (rtc.GetPTXSize(p, &bytes)) die(1, "NVRTC: no PTX");
    char *ptx = xalloc(bytes + 64, 1);
    if (rtc.GetPTX(p, ptx + sprintf(ptx, MADE_BY, version[0], version[1])))
        die(1, "NVRTC: no PTX");
    rtc.DestroyProgram(&p);
    free(copy);
    free(text);
    ptx_lower(ptx);
    return ptx;
}

// Ready PTX is a list of entries: a head of HEAD bytes, a comment in PTX, and the text. A file of
// the cache is a list of one, so files can be joined to build them in. The key covers source and
// options (the compiler's version is the text's first line), the sum the text; what does not match
// is ignored.
enum { HEAD = 59 };

static void list_add(Str *list, uint64_t key, const char *text) {
    char head[HEAD + 1];
    size_t n = strlen(text);
    snprintf(head, sizeof head, "// dsv4 kernels %016llx %016llx %08x\n", (unsigned long long)key,
             (unsigned long long)hash64(0, text, n), (unsigned)n);
    str_add(list, head, HEAD);
    str_add(list, text, n);
}

// The text of the entry with this key, to be freed; NULL if there is none.
static char *list_find(Span list, uint64_t key) {
    char head[HEAD + 1] = "";
    while (list.n > HEAD) {
        unsigned long long k, sum;
        unsigned n;
        memcpy(head, list.p, HEAD);
        list = span_from(list, HEAD);
        if (sscanf(head, "// dsv4 kernels %llx %llx %x", &k, &sum, &n) != 3 || n > list.n) break;
        if (k == key && sum == hash64(0, list.p, n)) return memcpy(xalloc(n + 1, 1), list.p, n);
        list = span_from(list, n);
    }
    return NULL;
}

// The file for a key, to be freed. NULL: no directory is known.
static char *cache_path(const char *kind, uint64_t key) {
    const char *dir = getenv("DSV4_CACHE"), *base = getenv("XDG_CACHE_HOME");
    const char *home = getenv("HOME");
    char name[64];
    Str s = { 0 };
    bool given = dir && *dir, xdg = base && *base;
    if (!given && !xdg && !(home && *home)) return NULL;
    str_puts(&s, given ? dir : xdg ? base : home);
    if (!given && !xdg) {
        str_puts(&s, "/.cache");
        mkdir(s.p, 0777);
    }
    if (!given) str_puts(&s, "/dsv4");
    mkdir(s.p, 0777);
    snprintf(name, sizeof name, "/%016llx.%s", (unsigned long long)key, kind);
    str_puts(&s, name);
    return s.p;
}

char *cache_get(const char *kind, uint64_t key) {
    Span s;
    Err e;
    char *path = cache_path(kind, key), *text = NULL;
    pthread_mutex_lock(&lock);
    if (path && map_file(path, &s, &e)) {
        text = list_find(s, key);
        if (!text) note("%s is damaged and not used", path);
        unmap_file(s);
    }
    pthread_mutex_unlock(&lock);
    free(path);
    return text;
}

// Written beside and renamed, so that another process never sees half a file.
void cache_put(const char *kind, uint64_t key, const char *text) {
    Str tmp = { 0 }, entry = { 0 };
    char tail[32], *path = cache_path(kind, key);
    if (!path) return;
    snprintf(tail, sizeof tail, ".%ld.tmp", (long)getpid());
    str_puts(&tmp, path);
    str_puts(&tmp, tail);
    list_add(&entry, key, text);
    pthread_mutex_lock(&lock);
    FILE *f = fopen(tmp.p, "w");
    if (f) {
        bool ok = fwrite(entry.p, 1, entry.n, f) == entry.n;
        ok = !fclose(f) && ok;
        if (!ok || rename(tmp.p, path)) unlink(tmp.p);
    }
    pthread_mutex_unlock(&lock);
    free(tmp.p), free(entry.p), free(path);
}

char *kernel_ptx(Span options, const char **from, char **path) {
    static Str made;            // a list: GPUs of one kind share what one of them has compiled
    pthread_mutex_lock(&lock);
    Span source = kernel_source(), ready = { ready_ptx, (size_t)(ready_ptx_end - ready_ptx) };
    uint64_t key = hash64(HASH_START, source.p, source.n);
    key = hash64(key, options.p, options.n);
    char *ptx = list_find(ready, key);
    *from = "built in";
    if (!ptx) {
        *from = "shared with another GPU";
        ptx = list_find(str_span(&made), key);
    }
    if (!ptx) {
        *from = "from the cache";
        ptx = cache_get("ptx", key);
        if (ptx && ptx_outdated(ptx)) free(ptx), ptx = NULL;
        if (!ptx) {
            *from = "compiled";
            ptx = ptx_compile(source, options);
            cache_put("ptx", key, ptx);
        }
        list_add(&made, key, ptx);
    }
    pthread_mutex_unlock(&lock);
    if (path) *path = cache_path("ptx", key);
    return ptx;
}

// --- a GPU in use

void gpu_die(const Gpu *g, const char *call, CuResult r) {
    const char *text = NULL;
    if (cu.GetErrorString(r, &text) || !text) text = "no description";
    die(1, "%s: %s failed in %s (last kernel: %s): %s (%s)", g->name, call,
        *g->at ? *g->at : "start", g->kernel ? g->kernel : "none", cuda_error(r), text);
}

int gpu_attribute(const Gpu *g, int id) {
    int v = 0;
    CU(g, DeviceGetAttribute, &v, id, g->dev);
    return v;
}

void gpu_start(Gpu *g, int ordinal) {
    Err e;
    int n = 0;
    if (!cuda_open(&e)) die(1, "%s: %s", g->name, e.text);
    if (cu.DeviceGetCount(&n) || ordinal >= n) die(1, "%s: GPUs here: %d", g->name, n);
    CU(g, DeviceGet, &g->dev, ordinal);
    CU(g, PrimaryCtxRetain, &g->ctx, g->dev);
    CU(g, CtxSetCurrent, g->ctx);
    CU(g, StreamCreate, &g->stream, 1);                 // 1: does not wait for the legacy stream
    for (int i = 0; i < 2; i++) CU(g, EventCreate, &g->lap[i], 0);
    CU(g, EventRecord, g->lap[0], g->stream);
}

void gpu_stop(Gpu *g) {
    CU(g, CtxSetCurrent, g->ctx);
    gpu_wait(g);
    for (int i = 0; i < g->n_kept; i++) CU(g, MemFree, g->kept[i]);
    for (int i = 0; i < g->n_pinned; i++) CU(g, MemFreeHost, g->pinned[i]);
    for (int i = 0; i < 2; i++) CU(g, EventDestroy, g->lap[i]);
    CU(g, StreamDestroy, g->stream);
    if (g->module) CU(g, ModuleUnload, g->module);
    free(g->kept), free(g->pinned);
}

void gpu_load(Gpu *g, Span options, const char *const *names, size_t n, CuFunction *f) {
    char log[4096] = "";
    int key[2] = { 5, 6 };              // CU_JIT_ERROR_LOG_BUFFER and its size
    void *value[2] = { log, (void *)(uintptr_t)sizeof log };
    const char *from;
    double start = now();
    char *ptx = kernel_ptx(options, &from, NULL);
    g->ptx = hash64(HASH_START, ptx, strlen(ptx));
    CuResult r = cu.ModuleLoadDataEx(&g->module, ptx, 2, key, value);
    if (r) {
        if (*log) fprintf(stderr, "%s\n", log);
        gpu_die(g, "cuModuleLoadDataEx", r);
    }
    for (size_t i = 0; i < n; i++) {
        r = cu.ModuleGetFunction(&f[i], g->module, names[i]);
        if (r) die(1, "%s: kernels.cu has no kernel %s (%s)", g->name, names[i], cuda_error(r));
    }
    note("%s: kernels %s in %.2f s", g->name, from, now() - start);
    free(ptx);
}

CuPtr gpu_alloc(Gpu *g, size_t bytes, const char *what) {
    CuPtr p = 0;
    size_t left = 0, total = 0;
    bytes = cadd(bytes, 511) & ~(size_t)511;
    CuResult r = cu.MemAlloc(&p, bytes);
    if (r == CUDA_OUT_OF_MEMORY) {
        cu.MemGetInfo(&left, &total);
        die(1, "%s: out of memory: %s need %.3f GB, %.3f GB are free (try fewer layers here with "
            "--layers, a smaller -c, or one device more)", g->name, what, (double)bytes / 1e9,
            (double)left / 1e9);
    }
    if (r) gpu_die(g, "cuMemAlloc", r);
    CU(g, MemsetD8Async, p, 0, bytes, g->stream);
    return p;
}

CuPtr gpu_keep(Gpu *g, size_t bytes, const char *what) {
    CuPtr p = gpu_alloc(g, bytes, what);
    g->kept = grow(g->kept, (size_t)g->n_kept, sizeof *g->kept);
    return g->kept[g->n_kept++] = p;
}

static void *pin(const Gpu *g, size_t bytes) {
    void *p = NULL;
    CuResult r = cu.MemHostAlloc(&p, bytes ? bytes : 4, 1);     // 1: usable from every context
    if (r == CUDA_OUT_OF_MEMORY)
        die(1, "%s: cannot pin %.1f MB of host memory (ulimit -l, or too little is free)", g->name,
            (double)bytes / 1e6);
    if (r) gpu_die(g, "cuMemHostAlloc", r);
    return p;
}

void *gpu_pinned(Gpu *g, size_t bytes) {
    void *p = pin(g, bytes);
    g->pinned = grow(g->pinned, (size_t)g->n_pinned, sizeof *g->pinned);
    return g->pinned[g->n_pinned++] = p;
}

void gpu_copy_in(Gpu *g, CuPtr to, const void *from, size_t bytes) {
    CU(g, MemcpyHtoDAsync, to, from, bytes, g->stream);
}

void gpu_copy_out(Gpu *g, void *to, CuPtr from, size_t bytes) {
    CU(g, MemcpyDtoHAsync, to, from, bytes, g->stream);
}

void gpu_wait(Gpu *g) { CU(g, StreamSynchronize, g->stream); }

double gpu_lap(Gpu *g) {
    CuEvent before = g->lap[0], after = g->lap[1];
    float ms = 0;
    CU(g, EventRecord, after, g->stream);
    CU(g, EventSynchronize, after);
    CU(g, EventElapsedTime, &ms, before, after);
    g->lap[0] = after;
    g->lap[1] = before;
    return ms * 1e-3;
}

// --- upload: a few threads for every GPU, each with two pinned buffers: while one is on its way to
// the GPU, the other is filled from the files

enum { UPLOAD_THREADS = 4, PIECE = 4 << 20 };       // 32 MB of pinned memory for every GPU

typedef struct {
    const Gpu *g;
    CopyJob *piece;             // [n]
    size_t n;
    _Atomic size_t next;
} Upload;

void upload_expect(const CopyJob *list, size_t n) {
    for (size_t i = 0; i < n; i++) loading_expect(list[i].bytes);
}

static bool has_e4m3_nan(const char *p, size_t n) {
    uint8_t bad = 0;
    for (size_t i = 0; i < n; i++) bad |= (p[i] & 127) == 127;
    return bad;
}

// The kernel reads ahead what the threads take next; what was copied is the first to go when the
// host's memory is short.
static void *upload_thread(void *arg) {
    Upload *u = arg;
    const Gpu *g = u->g;
    CuStream stream;
    CuEvent free_again[2];
    char *buf[2];
    size_t i;
    CU(g, CtxSetCurrent, g->ctx);
    CU(g, StreamCreate, &stream, 1);
    for (int k = 0; k < 2; k++) {
        buf[k] = pin(g, PIECE);
        CU(g, EventCreate, &free_again[k], 2);          // 2: no timing
        CU(g, EventRecord, free_again[k], stream);
    }
    for (int turn = 0; (i = atomic_fetch_add(&u->next, 1)) < u->n; turn ^= 1) {
        const CopyJob *j = u->piece + i, *ahead = j + UPLOAD_THREADS;
        uintptr_t page = (uintptr_t)j->from & ~(uintptr_t)4095;
        CU(g, EventSynchronize, free_again[turn]);
        memcpy(buf[turn], j->from, j->bytes);
        if (j->e4m3 && has_e4m3_nan(buf[turn], j->bytes))
            die(1, "an FP8 weight is NaN: dsv4 verify MODEL_DIR tells which");
        CU(g, MemcpyHtoDAsync, j->to, buf[turn], j->bytes, stream);
        CU(g, EventRecord, free_again[turn], stream);
        madvise((void *)page, j->bytes, MADV_COLD);
        loading_move(j->bytes);
        if (i + UPLOAD_THREADS >= u->n) continue;
        page = (uintptr_t)ahead->from & ~(uintptr_t)4095;
        madvise((void *)page, ahead->bytes, MADV_WILLNEED);
    }
    CU(g, StreamSynchronize, stream);
    for (int k = 0; k < 2; k++) {
        CU(g, MemFreeHost, buf[k]);
        CU(g, EventDestroy, free_again[k]);
    }
    CU(g, StreamDestroy, stream);
    return NULL;
}

void gpu_upload(Gpu *g, const CopyJob *list, size_t n) {
    Upload u = { .g = g };
    pthread_t thread[UPLOAD_THREADS];
    for (size_t i = 0; i < n; i++)
        for (size_t at = 0; at < list[i].bytes; at += PIECE) {
            size_t left = list[i].bytes - at;
            u.piece = grow(u.piece, u.n, sizeof *u.piece);
            u.piece[u.n++] = (CopyJob){ list[i].from + at, list[i].to + at,
                                        left < PIECE ? left : PIECE, list[i].e4m3 };
        }
    gpu_wait(g);                // for the memory to be zeroed
    for (int i = 0; i < UPLOAD_THREADS; i++)
        if (pthread_create(&thread[i], NULL, upload_thread, &u)) die(1, "cannot start a thread");
    for (int i = 0; i < UPLOAD_THREADS; i++) pthread_join(thread[i], NULL);
    free(u.piece);
}
