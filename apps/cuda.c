// See cuda.h.
#define _GNU_SOURCE
#include <dlfcn.h>
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

bool cuda_open(Err *e) {
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

int cuda_count(void) {
    Err e;
    int n = 0;
    return cuda_open(&e) && !cu.DeviceGetCount(&n) ? n : 0;
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

// Compiles with NVRTC. The options are one per line. On failure the compiler's log goes to stderr.
static char *ptx_compile(Span source, Span options) {
    Err e;
    Nvrtc p;
    const char *list[40];
    char *copy = xalloc(options.n + 1, 1), *save = NULL, *text = xalloc(source.n + 1, 1);
    int n = 0;
    size_t bytes = 0;
    if (!nvrtc_open(&e)) die(1, "%s", e.text);
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
    char *ptx = xalloc(bytes + 1, 1);
    if (rtc.GetPTX(p, ptx)) die(1, "NVRTC: no PTX");
    rtc.DestroyProgram(&p);
    free(copy);
    free(text);
    ptx_lower(ptx);
    return ptx;
}

// Ready PTX is a list of entries: a head of HEAD bytes, a comment in PTX, and the text. A file of
// the cache is a list of one, so files can be joined to build them in. The key covers source and
// options, the sum the text; what does not match is ignored.
enum { HEAD = 59 };

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
    if (path && map_file(path, &s, &e)) {
        text = list_find(s, key);
        if (!text) note("%s is damaged and not used", path);
        unmap_file(s);
    }
    free(path);
    return text;
}

// Written beside and renamed, so that another process never sees half a file.
void cache_put(const char *kind, uint64_t key, const char *text) {
    Str tmp = { 0 };
    char tail[32], head[HEAD + 1], *path = cache_path(kind, key);
    size_t n = strlen(text);
    if (!path) return;
    snprintf(tail, sizeof tail, ".%ld.tmp", (long)getpid());
    str_puts(&tmp, path);
    str_puts(&tmp, tail);
    snprintf(head, sizeof head, "// dsv4 kernels %016llx %016llx %08x\n", (unsigned long long)key,
             (unsigned long long)hash64(0, text, n), (unsigned)n);
    FILE *f = fopen(tmp.p, "w");
    if (f) {
        bool ok = fwrite(head, 1, HEAD, f) == HEAD && fwrite(text, 1, n, f) == n;
        ok = !fclose(f) && ok;
        if (!ok || rename(tmp.p, path)) unlink(tmp.p);
    }
    free(tmp.p), free(path);
}

char *kernel_ptx(Span options, const char **from, char **path) {
    Span source = kernel_source(), ready = { ready_ptx, (size_t)(ready_ptx_end - ready_ptx) };
    uint64_t key = hash64(HASH_START, source.p, source.n);
    key = hash64(key, options.p, options.n);
    char *ptx = list_find(ready, key);
    *from = "built in";
    if (!ptx) {
        *from = "from the cache";
        ptx = cache_get("ptx", key);
    }
    if (!ptx) {
        *from = "compiled";
        ptx = ptx_compile(source, options);
        cache_put("ptx", key, ptx);
    }
    if (path) *path = cache_path("ptx", key);
    return ptx;
}
