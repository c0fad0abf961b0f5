/* api.c: entry rules, configuration, injected faults, devices and contexts. */
#include "api.h"
#include <stdarg.h>

pthread_mutex_t sim_lock = PTHREAD_MUTEX_INITIALIZER;
_Thread_local Thread self;
Config config;
static bool initialised;
static Ctx contexts[SIM_MAX_DEVICES]; /* the primary context of each device */
static Obj *objects;                  /* every object ever made */

void *obj_new(Type type, size_t bytes) {
    Obj *o = zalloc(bytes);
    *o = (Obj){ type, false, objects };
    return objects = o;
}

bool obj_ok(const void *handle, Type type) {
    const Obj *o = handle;
    return o && o->type == type && !o->dead;
}

/* Says that a call broke a rule which a real driver would punish with an error code only. */
void misuse(const char *format, ...) {
    SimFinding f = { .kind = SIM_HOST, .kernel = "", .device = cur() ? cur()->device : -1,
                     .file = "" };
    int n = snprintf(f.text, sizeof f.text, "%s: ", self.call ? self.call : "?");
    va_list ap;
    va_start(ap, format);
    vsnprintf(f.text + n, sizeof f.text - (size_t)n, format, ap);
    va_end(ap);
    sim_report(&f);
}

__attribute__((noreturn)) static void bad_setting(const char *name, const char *value) {
    fprintf(stderr, "sim: %s=%s is not understood (tests/sim/README.md lists the values)\n", name,
            value);
    exit(2);
}

/* A number, with K, M or G behind it (powers of 1024). */
static bool parse_number(const char *s, uint64_t *value) {
    char *end;
    *value = strtoull(s, &end, 0);
    int shift = *end == 'K' ? 10 : *end == 'M' ? 20 : *end == 'G' ? 30 : 0;
    bool good = end != s && *s != '-' && *value <= UINT64_MAX >> shift && !end[shift > 0];
    *value <<= shift;
    return good;
}

/* ------------------------------------------------------------------------------------------------
 * SIM_FAULT: comma-separated list, README.md has the forms */

typedef struct {
    char what[64];      /* a function, or launch, oom, lost, missing, corrupt */
    uint64_t nth, seen; /* which call or operation; bytes for oom */
    int device, code;   /* -1: any, the usual one */
} Fault;

static Fault faults[32];
static int n_faults;

/* NAME[:A[:B]][=CODE], such as "cuMemAlloc_v2:3=2", "oom:1:2G", "missing:cuGraphLaunch" */
static void parse_fault(char *item) {
    Fault f = { .device = -1, .nth = 1, .code = -1 };
    char *code = strchr(item, '='), *rest = item, *name = strsep(&rest, ":");
    char *a = strsep(&rest, ":"), *b = rest;
    bool lost = !strcmp(name, "lost"), oom = !strcmp(name, "oom");
    bool missing = !strcmp(name, "missing");
    if (code) *code++ = 0, f.code = atoi(code);
    snprintf(f.what, sizeof f.what, missing ? "%.12s %.50s" : "%.50s", name, a ? a : "");
    if (a && (lost || b)) f.device = atoi(a);
    if (lost || (oom && b)) a = b;
    if (a && !missing && !parse_number(a, &f.nth)) bad_setting("SIM_FAULT", a);
    if (!f.nth || !(lost || oom || missing || !strcmp(name, "launch") ||
                    !strcmp(name, "corrupt") || known_symbol(name)))
        bad_setting("SIM_FAULT", name);
    if (missing && a) hide_symbol(a);
    if (n_faults < 32) faults[n_faults++] = f;
}

/* Counts one more call or operation of a kind; the fault whose turn has come, or NULL. */
static Fault *fault_now(const char *what) {
    for (int i = 0; i < n_faults; i++)
        if (!strcmp(faults[i].what, what) && ++faults[i].seen == faults[i].nth) return &faults[i];
    return NULL;
}

static CUresult fault_code(const char *what, CUresult usual) {
    Fault *f = fault_now(what);
    return !f ? OK : f->code >= 0 ? f->code : usual;
}

CUresult fault_launch(void) {
    return fault_code("launch", 700);
}

CUresult fault_lost(int device) {
    for (int i = 0; i < n_faults; i++) {
        Fault *f = &faults[i];
        if (strcmp(f->what, "lost") || f->device != device || ++f->seen < f->nth) continue;
        return f->code >= 0 ? f->code : E_UNKNOWN;
    }
    return OK;
}

bool fault_memory(int device, uint64_t bytes) {
    for (int i = 0; i < n_faults; i++) {
        Fault *f = &faults[i];
        if (strcmp(f->what, "oom") || (f->device >= 0 && f->device != device)) continue;
        f->seen += bytes;
        if (f->seen > f->nth) return true;
    }
    return false;
}

bool fault_missing(const char *symbol) {
    char what[64];
    snprintf(what, sizeof what, "missing %.50s", symbol);
    for (int i = 0; i < n_faults; i++)
        if (!strcmp(faults[i].what, what)) return true;
    return false;
}

bool fault_corrupt(void) {
    return fault_now("corrupt") != NULL;
}

/* ------------------------------------------------------------------------------------------------
 * configuration */

static uint64_t env_number(const char *name, uint64_t usual, uint64_t max) {
    const char *s = getenv(name);
    uint64_t v = usual;
    if (s && *s && (!parse_number(s, &v) || v > max)) bad_setting(name, s);
    return v;
}

/* Memory of each device: one size for all, or a list of which the last goes on. */
static void env_memory(void) {
    const char *env = getenv("SIM_MEM");
    char *list = strdup(env && *env ? env : "24G"), *next = list;
    uint64_t bytes = 0;
    for (int d = 0; d < SIM_MAX_DEVICES; d++) {
        char *item = next ? strsep(&next, ",") : NULL;
        if (item && (!parse_number(item, &bytes) || bytes > (uint64_t)1 << 40))
            bad_setting("SIM_MEM", item);
        config.memory[d] = bytes;
        if (d < config.devices) sim_mem_limit(d, bytes);
    }
    free(list);
}

/* "8.6" -> 86 */
static int env_version(const char *name, int usual) {
    const char *s = getenv(name);
    if (!s || !*s) return usual;
    int major, minor, n = 0;
    if (sscanf(s, "%d.%d%n", &major, &minor, &n) != 2 || s[n] || major < 1 || major > 99 ||
        minor < 0 || minor > 9)
        bad_setting(name, s);
    return 10 * major + minor;
}

static void load_options(void) {
    sim_options.sm = env_version("SIM_CC", 86);
    sim_options.ptx_version_max = env_version("SIM_PTX", 0);
    sim_options.seed = config.seed = env_number("SIM_SEED", 0, UINT64_MAX);
    sim_options.threads = (int)env_number("SIM_THREADS", (uint64_t)sim_options.threads, 256);
    sim_options.strict = env_number("SIM_STRICT", sim_options.strict, 1);
    sim_options.check_init = env_number("SIM_CHECK_INIT", sim_options.check_init, 1);
    sim_options.check_races = env_number("SIM_CHECK_RACES", sim_options.check_races, 1);
    sim_options.count_unique = env_number("SIM_UNIQUE", sim_options.count_unique, 1);
    sim_options.perturb_ulp = (int)env_number("SIM_PERTURB", (uint64_t)sim_options.perturb_ulp, 99);
    sim_options.watchdog = env_number("SIM_WATCHDOG", sim_options.watchdog, UINT64_MAX);
}

/* Before main, so that the settings are those the program was started with. */
__attribute__((constructor)) static void load_config(void) {
    const char *name = getenv("SIM_NAME"), *list = getenv("SIM_FAULT");
    load_options();
    config.devices = (int)env_number("SIM_DEVICES", 1, SIM_MAX_DEVICES);
    env_memory();
    config.peer = env_number("SIM_PEER", 0, 1);
    config.driver = (int)env_number("SIM_DRIVER", 13000, 99999);
    config.trace = env_number("SIM_TRACE", 0, 1);
    config.idle_ms = (int)env_number("SIM_IDLE_MS", 1000, 1000000);
    config.report = getenv("SIM_REPORT");
    snprintf(config.name, sizeof config.name, "%.60s (SIMULATED)",
             name && *name ? name : "NVIDIA GeForce RTX 3090");
    char *copy = list ? strdup(list) : NULL, *next = copy;
    for (char *item; next && (item = strsep(&next, ","));)
        if (*item) parse_fault(item);
    free(copy);
}

/* ------------------------------------------------------------------------------------------------
 * entry */

Ctx *cur(void) {
    return self.depth ? self.stack[self.depth - 1] : NULL;
}

/* A current context that is alive, and that no kernel has broken. */
static CUresult context_rules(void) {
    Ctx *c = cur();
    if (!c) return E_INVALID_CONTEXT;
    if (!c->retained) return E_CONTEXT_IS_DESTROYED;
    return c->sticky;
}

/* An injected fault comes before every rule, as a failing driver would. */
CUresult enter(const char *name, int needs) {
    pthread_mutex_lock(&sim_lock);
    self.call = name;
    note_call();
    if (self.in_callback && needs) return E_NOT_PERMITTED; /* rule of cuLaunchHostFunc */
    CUresult r = fault_code(name, E_UNKNOWN);
    if (r) return r;
    if ((needs & INIT) && !initialised) return E_NOT_INITIALIZED;
    if (needs & CTX & ~INIT) r = context_rules();
    if (!r && needs == UNSAFE) r = capture_allows(needs);
    return r;
}

CUresult leave(CUresult r) {
    if (config.trace)
        fprintf(stderr, "sim: %s = %d %s\n", self.call, r, error_name(r) ? error_name(r) : "?");
    pthread_mutex_unlock(&sim_lock);
    return r;
}

/* Flags have to be 0. NVRTC calls this too, when it finds a driver. */
EXPORT CUresult cuInit(unsigned flags) {
    CUresult r = enter(__func__, ANY);
    if (!r && flags) r = E_INVALID_VALUE;
    if (!r && !config.devices) r = E_NO_DEVICE;
    if (!r) initialised = true;
    return leave(r);
}

static CUresult put(int *out, int value) {
    if (!out) return E_INVALID_VALUE;
    *out = value;
    return OK;
}

API(ANY, cuDriverGetVersion, (int *version), put(version, config.driver))

EXPORT CUresult cuGetErrorName(CUresult code, const char **text) {
    if (!text) return E_INVALID_VALUE;
    *text = error_name(code);
    return *text ? OK : E_INVALID_VALUE;
}

EXPORT CUresult cuGetErrorString(CUresult code, const char **text) {
    if (!text) return E_INVALID_VALUE;
    *text = error_text(code);
    return *text ? OK : E_INVALID_VALUE;
}

API(CTX, cuProfilerStart, (void), OK)
API(CTX, cuProfilerStop, (void), OK)

/* ------------------------------------------------------------------------------------------------
 * devices */

/* enter() for calls that take a device ordinal and return something through `out`. */
static CUresult enter_device(const char *name, int dev, const void *out) {
    CUresult r = enter(name, INIT);
    if (!r && !out) r = E_INVALID_VALUE;
    if (!r && (dev < 0 || dev >= config.devices)) r = E_INVALID_DEVICE;
    return r;
}

API(INIT, cuDeviceGetCount, (int *count), put(count, config.devices))

API(INIT, cuDeviceGet, (CUdevice *device, int ordinal),
    ordinal < 0 || ordinal >= config.devices ? E_INVALID_DEVICE : put(device, ordinal))

EXPORT CUresult cuDeviceGetName(char *name, int size, CUdevice dev) {
    CUresult r = enter_device(__func__, dev, name);
    if (!r && size <= 0) r = E_INVALID_VALUE;
    if (!r) snprintf(name, (size_t)size, "%s", config.name);
    return leave(r);
}

EXPORT CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice dev) {
    CUresult r = enter_device(__func__, dev, bytes);
    if (!r) *bytes = config.memory[dev];
    return leave(r);
}

EXPORT CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice dev) {
    CUresult r = enter_device(__func__, dev, uuid);
    if (!r) {
        memcpy(uuid->bytes, "SIMULATED-GPU-0", 16);
        uuid->bytes[14] = (char)('A' + dev);
    }
    return leave(r);
}

EXPORT CUresult cuDeviceGetPCIBusId(char *id, int size, CUdevice dev) {
    CUresult r = enter_device(__func__, dev, id);
    if (!r && size < 13) r = E_INVALID_VALUE;
    if (!r) snprintf(id, (size_t)size, "0000:%02X:00.0", dev + 1);
    return leave(r);
}

/* Attributes as a GA102 card reports them, by CUdevice_attribute; -1: not listed. SIM_CC changes
 * the capability alone. 99 registering host memory works, 113 but not read-only. */
static int attribute(int which, int dev) {
    static const int table[][2] = {
        { 1, 1024 }, { 2, 1024 }, { 3, 1024 }, { 4, 64 },          /* block: threads, x, y, z */
        { 5, 0x7FFFFFFF }, { 6, 65535 }, { 7, 65535 },              /* grid x, y, z */
        { 8, 49152 }, { 9, 65536 }, { 10, 32 }, { 11, 0x7FFFFFFF }, /* shared, const, warp, pitch */
        { 12, REGS_PER_SM }, { 13, 1695000 }, { 14, 512 }, { 15, 1 },
        { 17, 0 }, { 18, 0 }, { 19, 1 }, { 20, 0 },      /* timeout, integrated, map host, mode */
        { 31, 1 }, { 32, 0 }, { 34, 0 }, { 35, 0 },      /* concurrent, ECC, PCI device, TCC */
        { 36, 9751000 }, { 37, 384 }, { 38, 6291456 },   /* memory clock and bus, L2 */
        { 39, WARPS_PER_SM * 32 }, { 40, 2 }, { 41, 1 }, /* threads, copy engines, UVA */
        { 50, 0 }, { 78, 1 }, { 79, 1 }, { 80, 1 }, { 81, SHARED_PER_SM }, { 82, REGS_PER_SM },
        { 83, 1 }, { 84, 0 }, { 86, 0 }, { 87, 32 }, { 88, 0 }, { 89, 0 }, { 90, 1 },
        { 91, 1 }, { 95, 1 }, { 96, 0 }, { 97, SIM_SHARED_MAX }, { 98, 0 },
        { 99, 1 }, { 100, 0 }, { 102, 0 }, { 106, BLOCKS_PER_SM }, { 108, 0 },
        { 111, SHARED_RESERVED }, { 113, 0 }, { 115, 0 }, { 120, 0 }, { 127, 0 }, { 132, 0 },
    };
    if (which == 16) return report_sms();
    if (which == 33) return dev + 1; /* PCI bus */
    if (which == 75) return sim_options.sm / 10;
    if (which == 76) return sim_options.sm % 10;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (table[i][0] == which) return table[i][1];
    return -1;
}

EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice dev) {
    CUresult r = enter_device(__func__, dev, value);
    int v = r ? 0 : attribute((int)which, dev);
    if (!r && v < 0) {
        misuse("attribute %d is not in the simulator's table", (int)which);
        r = E_INVALID_VALUE;
    }
    if (!r) *value = v;
    return leave(r);
}

EXPORT CUresult cuDeviceCanAccessPeer(int *can, CUdevice dev, CUdevice peer) {
    CUresult r = enter_device(__func__, dev, can);
    if (!r && (peer < 0 || peer >= config.devices)) r = E_INVALID_DEVICE;
    if (!r) *can = config.peer && dev != peer;
    return leave(r);
}

/* 1 performance rank, 2 access, 3 native atomics, 4 arrays */
EXPORT CUresult cuDeviceGetP2PAttribute(int *value, CUdevice_P2PAttribute which, CUdevice dev,
                                        CUdevice peer) {
    CUresult r = enter_device(__func__, dev, value);
    if (!r && (peer < 0 || peer >= config.devices || dev == peer)) r = E_INVALID_DEVICE;
    if (!r && ((int)which < 1 || (int)which > 4)) r = E_INVALID_VALUE;
    if (!r) *value = (int)which == 2 && config.peer;
    return leave(r);
}

/* ------------------------------------------------------------------------------------------------
 * contexts: primary ones only */

Ctx *device_ctx(int device) {
    return device >= 0 && device < config.devices && contexts[device].retained ? &contexts[device]
                                                                                : NULL;
}

/* A context that was reset starts afresh, without the fault that it had. */
static void ctx_start(Ctx *c, int device) {
    c->obj.type = T_CTX;
    c->device = device;
    c->sticky = OK;
    memset(c->peer, 0, sizeof c->peer);
    c->streams = NULL;
    c->legacy = stream_new(c, 0, 0);
}

/* Everything that belongs to the context goes with it. */
static void ctx_end(Ctx *c) {
    run_ctx(c);
    for (Obj *o = objects; o; o = o->next) {
        if (o->type == T_STREAM && ((Stream *)o)->ctx == c) o->dead = true;
        if (o->type == T_EVENT && ((Event *)o)->ctx == c) o->dead = true;
        if (o->type != T_MODULE || o->dead || ((Module *)o)->ctx != c) continue;
        Module *m = (Module *)o;
        for (int i = 0; i < m->n_funcs; i++) m->funcs[i].obj.dead = true;
        sim_module_unload(m->sim);
        o->dead = true;
    }
    for (int d = 0; d < SIM_MAX_DEVICES; d++)
        if (c->peer[d]) sim_mem_peer(c->device, d, false);
    sim_mem_reset(c->device);
    c->retained = 0;
}

/* The first retain creates the context, the last release ends it; it does not become current. */
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *ctx, CUdevice dev) {
    CUresult r = enter_device(__func__, dev, ctx);
    if (!r) {
        Ctx *c = &contexts[dev];
        if (!c->retained++) ctx_start(c, dev);
        *ctx = c;
    }
    return leave(r);
}

EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice dev) {
    CUresult r = enter_device(__func__, dev, contexts);
    if (!r && !contexts[dev].retained) r = E_INVALID_CONTEXT;
    if (!r && contexts[dev].retained == 1) ctx_end(&contexts[dev]);
    else if (!r) contexts[dev].retained--;
    return leave(r);
}

EXPORT CUresult cuDevicePrimaryCtxReset_v2(CUdevice dev) {
    CUresult r = enter_device(__func__, dev, contexts);
    if (!r && contexts[dev].retained) ctx_end(&contexts[dev]);
    return leave(r);
}

EXPORT CUresult cuDevicePrimaryCtxSetFlags_v2(CUdevice dev, unsigned flags) {
    CUresult r = enter_device(__func__, dev, contexts);
    if (!r && flags & ~0x1FFu) r = E_INVALID_VALUE;
    if (!r) contexts[dev].flags = flags;
    return leave(r);
}

EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice dev, unsigned *flags, int *active) {
    CUresult r = enter_device(__func__, dev, active);
    if (!r && !flags) r = E_INVALID_VALUE;
    if (!r) {
        *flags = contexts[dev].flags;
        *active = contexts[dev].retained > 0;
    }
    return leave(r);
}

static CUresult push(Ctx *c) {
    if (!obj_ok(c, T_CTX) || !c->retained) return E_INVALID_CONTEXT;
    if (self.depth == (int)(sizeof self.stack / sizeof *self.stack)) return E_INVALID_VALUE;
    self.stack[self.depth++] = c;
    return OK;
}

/* Replaces the top of the thread's stack; NULL removes it. */
EXPORT CUresult cuCtxSetCurrent(CUcontext ctx) {
    CUresult r = enter(__func__, INIT);
    if (!r && ctx && (!obj_ok(ctx, T_CTX) || !ctx->retained)) r = E_INVALID_CONTEXT;
    if (!r && self.depth) self.depth--;
    if (!r && ctx) r = push(ctx);
    return leave(r);
}

API(INIT, cuCtxPushCurrent_v2, (CUcontext ctx), push(ctx))

EXPORT CUresult cuCtxPopCurrent_v2(CUcontext *ctx) {
    CUresult r = enter(__func__, INIT);
    if (!r && !self.depth) r = E_INVALID_CONTEXT;
    if (!r) {
        Ctx *top = self.stack[--self.depth];
        if (ctx) *ctx = top;
    }
    return leave(r);
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *ctx) {
    CUresult r = enter(__func__, INIT);
    if (!r && !ctx) r = E_INVALID_VALUE;
    if (!r) *ctx = cur();
    return leave(r);
}

static CUresult get_device(int *dev, Ctx *c) {
    return obj_ok(c, T_CTX) ? put(dev, c->device) : E_INVALID_CONTEXT;
}

/* The second forms, since 13.0, are about a given context. */
API(INIT, cuCtxGetDevice_v2, (CUdevice *dev, CUcontext ctx), get_device(dev, ctx ? ctx : cur()))
API(INIT, cuCtxGetDevice, (CUdevice *dev), get_device(dev, cur()))

/* The place where a kernel's fault usually comes to light. */
static CUresult synchronize(Ctx *c) {
    if (!obj_ok(c, T_CTX) || !c->retained) return E_INVALID_CONTEXT;
    run_ctx(c);
    return c->sticky;
}

API(UNSAFE, cuCtxSynchronize, (void), synchronize(cur()))
API(UNSAFE, cuCtxSynchronize_v2, (CUcontext ctx), synchronize(ctx ? ctx : cur()))

EXPORT CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    CUresult r = enter(__func__, CTX);
    if (!r && least) *least = 0;
    if (!r && greatest) *greatest = -5;
    return leave(r);
}

/* One direction: kernels of the current device may use the peer's memory. */
EXPORT CUresult cuCtxEnablePeerAccess(CUcontext peer, unsigned flags) {
    CUresult r = enter(__func__, CTX);
    if (!r && (!obj_ok(peer, T_CTX) || !peer->retained || peer == cur())) r = E_INVALID_CONTEXT;
    if (!r && flags) r = E_INVALID_VALUE;
    if (!r && !config.peer) r = E_PEER_ACCESS_UNSUPPORTED;
    if (!r && cur()->peer[peer->device]) r = E_PEER_ACCESS_ALREADY_ENABLED;
    if (!r) {
        cur()->peer[peer->device] = true;
        sim_mem_peer(cur()->device, peer->device, true);
    }
    return leave(r);
}

EXPORT CUresult cuCtxDisablePeerAccess(CUcontext peer) {
    CUresult r = enter(__func__, CTX);
    if (!r && !obj_ok(peer, T_CTX)) r = E_INVALID_CONTEXT;
    if (!r && !cur()->peer[peer->device]) r = E_PEER_ACCESS_NOT_ENABLED;
    if (!r) {
        run_ctx(cur());
        cur()->peer[peer->device] = false;
        sim_mem_peer(cur()->device, peer->device, false);
    }
    return leave(r);
}
