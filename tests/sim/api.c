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

/* Says that a call broke a rule which a real driver would punish with an error code only: this. */
CUresult misuse(const char *format, ...) {
    SimFinding f = { .kind = SIM_HOST, .kernel = "", .device = self.ctx ? self.ctx->device : -1,
                     .file = "" };
    int n = snprintf(f.text, sizeof f.text, "%s: ", self.call ? self.call : "?");
    va_list ap;
    va_start(ap, format);
    vsnprintf(f.text + n, sizeof f.text - (size_t)n, format, ap);
    va_end(ap);
    sim_report(&f);
    return E_INVALID_VALUE;
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

/* ---- names of functions */

extern const Symbol __start_symbols[], __stop_symbols[];

static bool known_symbol(const char *name) {
    for (const Symbol *s = __start_symbols; s < __stop_symbols; s++)
        if (!strcmp(s->name, name)) return true;
    return false;
}

/* ---- SIM_FAULT: comma-separated list, README.md has the forms */

typedef struct {
    char what[64];      /* a function, or launch, oom, lost */
    uint64_t nth, seen; /* which call or operation; bytes for oom */
    int device, code;   /* -1: any, the usual one */
    bool lasting;       /* from the nth on, not only then */
} Fault;

static Fault faults[32];
static int n_faults;

/* NAME[:A[:B]][=CODE], such as "cuMemAlloc_v2:3=2", "oom:1:2G" */
static void parse_fault(char *item) {
    Fault f = { .device = -1, .nth = 1, .code = -1 };
    char *code = strchr(item, '='), *rest = item, *name = strsep(&rest, ":");
    char *a = strsep(&rest, ":"), *b = rest;
    bool lost = !strcmp(name, "lost"), oom = !strcmp(name, "oom");
    if (code) {
        *code++ = 0;
        f.code = atoi(code);
    }
    snprintf(f.what, sizeof f.what, "%.50s", name);
    if (a && (lost || b)) f.device = atoi(a);
    if (lost || (oom && b)) a = b;
    if (a && !parse_number(a, &f.nth)) bad_setting("SIM_FAULT", a);
    if (!f.nth || !(lost || oom || !strcmp(name, "launch") || known_symbol(name)))
        bad_setting("SIM_FAULT", name);
    f.lasting = lost || oom;
    f.nth += oom; /* the last byte still fits */
    if (n_faults < 32) faults[n_faults++] = f;
}

CUresult fault(const char *what, int device, uint64_t amount, CUresult usual) {
    CUresult r = OK;
    for (Fault *f = faults; f < faults + n_faults; f++) {
        if (strcmp(f->what, what) || (f->device >= 0 && f->device != device)) continue;
        f->seen += amount;
        if (!r && (f->lasting ? f->seen >= f->nth : f->seen == f->nth))
            r = f->code >= 0 ? f->code : usual;
    }
    return r;
}

/* ---- configuration */

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
    sim_options.check_init = env_number("SIM_CHECK_INIT", sim_options.check_init, 1);
    sim_options.check_races = env_number("SIM_CHECK_RACES", sim_options.check_races, 1);
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
    config.report = getenv("SIM_REPORT");
    snprintf(config.name, sizeof config.name, "%.60s (SIMULATED)",
             name && *name ? name : "NVIDIA GeForce RTX 3090");
    char *copy = list ? strdup(list) : NULL, *next = copy;
    for (char *item; next && (item = strsep(&next, ","));)
        if (*item) parse_fault(item);
    free(copy);
}

/* ---- error texts */

typedef struct {
    int code;
    const char *name, *text;
} Error;

/* NULL: no such code. */
static const Error *error_of(int code) {
    static const Error errors[] = {
        { 0, "CUDA_SUCCESS", "no error" },
#define ROW(code, name, text) { code, "CUDA_ERROR_" #name, text },
        ERRORS(ROW)
    };
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code) return &errors[i];
    return NULL;
}

/* ---- entry */

/* An injected fault comes before every rule, as a failing driver would. */
CUresult enter(const char *name, int needs) {
    Ctx *c = self.ctx;
    pthread_mutex_lock(&sim_lock);
    self.call = name;
    CUresult r = fault(name, -1, 1, E_UNKNOWN);
    if (r) return r;
    if ((needs & INIT) && !initialised) return E_NOT_INITIALIZED;
    if (!(needs & CTX & ~INIT)) return OK;
    if (!c) return E_INVALID_CONTEXT;
    if (!c->retained) return E_CONTEXT_IS_DESTROYED;
    if (c->sticky) return c->sticky;
    return needs == UNSAFE ? capture_allows() : OK;
}

CUresult leave(CUresult r) {
    const Error *e = error_of(r);
    if (config.trace) fprintf(stderr, "sim: %s = %d %s\n", self.call, r, e ? e->name : "?");
    pthread_mutex_unlock(&sim_lock);
    return r;
}

/* Flags have to be 0. NVRTC calls this too, when it finds a driver. */
BODY(ANY, 2000, cuInit, (unsigned flags), (flags)) {
    if (flags) return E_INVALID_VALUE;
    if (!config.devices) return E_NO_DEVICE;
    initialised = true;
    return OK;
}

API(ANY, 2020, cuDriverGetVersion, (int *version), GIVE(version, config.driver))

static CUresult text(const char **to, int code, bool name) {
    const Error *e = error_of(code);
    return GIVE(to, !e ? NULL : name ? e->name : e->text) || !e ? E_INVALID_VALUE : OK;
}

API(ANY, 6000, cuGetErrorName, (CUresult code, const char **to), text(to, code, true))
API(ANY, 6000, cuGetErrorString, (CUresult code, const char **to), text(to, code, false))

/* Is this a form of the function? Programs ask for the name without the _v2 of the newer ones. */
static bool is_form(const Symbol *s, const char *asked) {
    size_t n = strlen(asked);
    return !strncmp(s->name, asked, n) && (!s->name[n] || !strcmp(s->name + n, "_v2")) &&
           !strstr(asked, "_v2");
}

/* The newest form of a function that both `version` and the driver know. *status: 0 found, 1
 * unknown, 2 only newer forms. */
static CUresult get_proc(const char *asked, void **fn, int version, uint64_t flags, int *status) {
    const Symbol *best = NULL;
    *status = 1;
    if (!asked || !fn || flags > 2 || version > config.driver) return E_INVALID_VALUE;
    *fn = NULL;
    for (const Symbol *s = __start_symbols; s < __stop_symbols; s++) {
        if (!is_form(s, asked)) continue;
        if (!best) *status = 2;
        if (s->since <= version && (!best || s->since > best->since)) best = s;
    }
    if (best) {
        *status = 0;
        *fn = best->function;
    }
    if (*status == 1) fprintf(stderr, "sim: cuGetProcAddress: %s is not provided\n", asked);
    return *fn ? OK : E_NOT_FOUND;
}

/* The newer form gives no error but the status and NULL, so it is documented. */
BODY(ANY, 12000, cuGetProcAddress_v2, (const char *asked, void **fn, int version, cuuint64_t flags,
    CUdriverProcAddressQueryResult *status), (asked, fn, version, flags, status)) {
    int found;
    CUresult r = get_proc(asked, fn, version, flags, &found);
    if (status) *status = found;
    return r == E_NOT_FOUND ? OK : r;
}

API(ANY, 11030, cuGetProcAddress, (const char *symbol, void **fn, int version, cuuint64_t flags),
    get_proc(symbol, fn, version, flags, &(int){ 0 }))

/* NVRTC asks for the driver's private tables when it finds a driver; there are none. */
API(ANY, 3000, cuGetExportTable, (const void **table, const CUuuid *id),
    !id || GIVE(table, NULL) ? E_INVALID_VALUE : E_NOT_FOUND)

/* ---- devices */

/* What `call` gives, if the device exists. */
#define ON_DEVICE(dev, call) ((dev) < 0 || (dev) >= config.devices ? E_INVALID_DEVICE : (call))

API(INIT, 2000, cuDeviceGetCount, (int *count), GIVE(count, config.devices))
API(INIT, 2000, cuDeviceGet, (CUdevice *dev, int ordinal), ON_DEVICE(ordinal, GIVE(dev, ordinal)))
API(INIT, 3020, cuDeviceTotalMem_v2, (size_t *bytes, CUdevice dev),
    ON_DEVICE(dev, GIVE(bytes, config.memory[dev])))

static CUresult device_name(char *name, int size) {
    if (!name || size <= 0) return E_INVALID_VALUE;
    snprintf(name, (size_t)size, "%s", config.name);
    return OK;
}

API(INIT, 2000, cuDeviceGetName, (char *name, int size, CUdevice dev),
    ON_DEVICE(dev, device_name(name, size)))
API(INIT, 11040, cuDeviceGetUuid_v2, (CUuuid *uuid, CUdevice dev),
    ON_DEVICE(dev, GIVE(uuid, ((CUuuid){ { 'S', 'I', 'M', (char)dev } }))))

/* Attributes as a GA102 card reports them, by CUdevice_attribute. SIM_CC changes the capability
 * alone. 99 registering host memory works, 113 but not read-only. */
static CUresult attribute(int *value, int which, int dev) {
    const int table[][2] = {
        { 1, 1024 }, { 2, 1024 }, { 3, 1024 }, { 4, 64 },          /* block: threads, x, y, z */
        { 5, 0x7FFFFFFF }, { 6, 65535 }, { 7, 65535 },              /* grid x, y, z */
        { 8, 49152 }, { 9, 65536 }, { 10, 32 }, { 11, 0x7FFFFFFF }, /* shared, const, warp, pitch */
        { 12, REGS_PER_SM }, { 13, 1695000 }, { 14, 512 }, { 15, 1 }, { 16, report_sms() },
        { 17, 0 }, { 18, 0 }, { 19, 1 }, { 20, 0 },      /* timeout, integrated, map host, mode */
        { 31, 1 }, { 32, 0 }, { 33, dev + 1 }, { 34, 0 }, { 35, 0 }, /* concurrent, ECC, PCI, TCC */
        { 36, 9751000 }, { 37, 384 }, { 38, 6291456 },   /* memory clock and bus, L2 */
        { 39, WARPS_PER_SM * 32 }, { 40, 2 }, { 41, 1 }, /* threads, copy engines, UVA */
        { 75, sim_options.sm / 10 }, { 76, sim_options.sm % 10 },
        { 81, SHARED_PER_SM }, { 82, REGS_PER_SM }, { 95, 0 }, { 97, SIM_SHARED_MAX },
        { 99, 1 }, { 106, BLOCKS_PER_SM }, { 111, SHARED_RESERVED }, { 113, 0 },
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (table[i][0] == which) return GIVE(value, table[i][1]);
    return misuse("attribute %d is not in the simulator's table", which);
}

API(INIT, 2000, cuDeviceGetAttribute, (int *value, CUdevice_attribute which, CUdevice dev),
    ON_DEVICE(dev, attribute(value, (int)which, dev)))
API(INIT, 4000, cuDeviceCanAccessPeer, (int *can, CUdevice dev, CUdevice peer),
    ON_DEVICE(dev, ON_DEVICE(peer, GIVE(can, config.peer && dev != peer))))

/* ---- contexts: primary ones only */

Ctx *device_ctx(int device) {
    return device >= 0 && device < config.devices && contexts[device].retained ? &contexts[device]
                                                                                : NULL;
}

/* Everything that belongs to the context goes with it. */
static void ctx_end(Ctx *c) {
    run_ctx(c);
    for (Obj *o = objects; o; o = o->next) {
        if (o->type == T_STREAM && ((Stream *)o)->ctx == c) o->dead = true;
        if (o->type == T_EVENT && ((Event *)o)->ctx == c) o->dead = true;
        if (o->type == T_MODULE && !o->dead && ((Module *)o)->ctx == c) module_end((Module *)o);
    }
    for (int d = 0; d < SIM_MAX_DEVICES; d++)
        if (c->peer[d]) sim_mem_peer(c->device, d, false);
    sim_mem_reset(c->device);
    c->retained = 0;
}

/* The first retain creates the context, the last release ends it; it does not become current. One
 * that was reset starts afresh, without the fault that it had. */
static CUresult retain(Ctx *c, int device) {
    if (!c->retained++) {
        *c = (Ctx){ .obj.type = T_CTX, .device = device, .retained = 1 };
        c->legacy = stream_new(c, 0);
    }
    return OK;
}

static CUresult release(Ctx *c, bool reset) {
    if (!c->retained) return reset ? OK : E_INVALID_CONTEXT;
    if (reset || c->retained == 1)
        ctx_end(c);
    else
        c->retained--;
    return OK;
}

API(INIT, 7000, cuDevicePrimaryCtxRetain, (CUcontext *ctx, CUdevice dev),
    ON_DEVICE(dev, ctx ? retain(*ctx = &contexts[dev], dev) : E_INVALID_VALUE))
API(INIT, 11000, cuDevicePrimaryCtxRelease_v2, (CUdevice dev),
    ON_DEVICE(dev, release(&contexts[dev], false)))
API(INIT, 11000, cuDevicePrimaryCtxReset_v2, (CUdevice dev),
    ON_DEVICE(dev, release(&contexts[dev], true)))

static bool ctx_ok(const Ctx *c) {
    return obj_ok(c, T_CTX) && c->retained;
}

/* NULL: none from now on. */
BODY(INIT, 4000, cuCtxSetCurrent, (CUcontext c), (c)) {
    if (c && !ctx_ok(c)) return E_INVALID_CONTEXT;
    self.ctx = c;
    return OK;
}

API(INIT, 4000, cuCtxGetCurrent, (CUcontext *ctx), GIVE(ctx, self.ctx))

API(INIT, 2000, cuCtxGetDevice, (CUdevice *dev),
    self.ctx ? GIVE(dev, self.ctx->device) : E_INVALID_CONTEXT)

/* The place where a kernel's fault usually comes to light. */
BODY(UNSAFE, 2000, cuCtxSynchronize, (void), ()) {
    run_ctx(self.ctx);
    return self.ctx->sticky;
}

/* One direction: kernels of the current device may use the peer's memory. */
static CUresult peer_access(Ctx *peer) {
    Ctx *c = self.ctx;
    if (!ctx_ok(peer) || peer == c) return E_INVALID_CONTEXT;
    if (!config.peer) return E_PEER_ACCESS_UNSUPPORTED;
    if (c->peer[peer->device]) return E_PEER_ACCESS_ALREADY_ENABLED;
    c->peer[peer->device] = true;
    sim_mem_peer(c->device, peer->device, true);
    return OK;
}

API(CTX, 4000, cuCtxEnablePeerAccess, (CUcontext peer, unsigned flags),
    flags ? E_INVALID_VALUE : peer_access(peer))
