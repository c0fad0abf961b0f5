/* api_launch.c: modules, functions, launches, occupancy. */
#include "api.h"

/* ---- modules: PTX text only */

/* A log buffer, for messages or errors, and the slot that receives the number of bytes written. */
typedef struct {
    char *text;
    uint32_t size;
    void **slot;
} JitLog;

/* Takes what matters from the option list: the log buffers. By CUjit_option: 3 and 4 messages and
 * their size, 5 and 6 errors; sizes arrive as the pointer's value. */
static CUresult jit_options(unsigned n, const CUjit_option *options, void **values, JitLog *logs) {
    if (n && (!options || !values)) return E_INVALID_VALUE;
    for (unsigned i = 0; i < n; i++) {
        int which = (int)options[i];
        JitLog *log = &logs[which > 4];
        if (which < 0 || which > 33) return E_INVALID_VALUE;
        if (which == 3 || which == 5) log->text = values[i];
        if (which == 4 || which == 6) {
            log->size = (uint32_t)(uintptr_t)values[i];
            log->slot = &values[i];
        }
    }
    return OK;
}

/* Text and its NUL, cut to the buffer. */
static void put_log(const JitLog *log, const char *text) {
    size_t n = strlen(text) + 1;
    if (!log->text || n > log->size) n = log->text ? log->size : 0;
    if (n) snprintf(log->text, n, "%s", text);
    if (log->slot) *log->slot = (void *)n;
}

/* Is it PTX? Binaries (ELF, fat binaries) are for real devices only. */
static CUresult check_image(const char *image, char *log, size_t size) {
    static const unsigned char fat[4] = { 0x50, 0xED, 0x55, 0xBA };
    if (!memcmp(image, "\177ELF", 4) || !memcmp(image, fat, 4)) {
        snprintf(log, size, "the simulated device runs PTX, not machine code");
        return E_NO_BINARY_FOR_GPU;
    }
    return strstr(image, ".version") ? OK : E_INVALID_IMAGE;
}

/* Without attribute 8 static and dynamic shared memory together may take 48 KB. */
static void make_functions(Module *m) {
    while (sim_module_kernel(m->sim, (uint32_t)m->n_funcs)) m->n_funcs++;
    m->funcs = zalloc((size_t)m->n_funcs * sizeof *m->funcs);
    for (int i = 0; i < m->n_funcs; i++) {
        Func *f = &m->funcs[i];
        f->obj.type = T_FUNC;
        f->module = m;
        f->kernel = sim_module_kernel(m->sim, (uint32_t)i);
        f->max_dynamic = f->kernel->shared_bytes < 49152 ? 49152 - f->kernel->shared_bytes : 0;
        f->stats = stats_of(f);
    }
}

/* Errors as the driver's compiler gives them: 200 no PTX at all, 209 for another device, 218 does
 * not compile (the log says where), 222 newer PTX than this driver knows. */
static CUresult load(CUmodule *module, const char *image, unsigned n, const CUjit_option *options,
                     void **values) {
    char log[4096] = "";
    JitLog logs[2] = { 0 };
    if (!module || !image) return E_INVALID_VALUE;
    CUresult r = jit_options(n, options, values, logs);
    if (r) return r;
    SimModule *sim = NULL;
    r = check_image(image, log, sizeof log);
    if (!r) r = sim_module_load(self.ctx->device, image, strlen(image), &sim, log, sizeof log);
    put_log(&logs[1], r ? log : "");
    if (r && config.trace) fprintf(stderr, "sim: module: %s\n", log);
    if (r) return r;
    Module *m = obj_new(T_MODULE, sizeof *m);
    m->ctx = self.ctx;
    m->sim = sim;
    m->text = strdup(image);
    make_functions(m);
    put_log(&logs[0], "");
    *module = m;
    return OK;
}

API(UNSAFE, 2010, cuModuleLoadDataEx, (CUmodule *module, const void *image, unsigned n,
    CUjit_option *options, void **values), load(module, image, n, options, values))
API(UNSAFE, 2000, cuModuleLoadData, (CUmodule *module, const void *image),
    load(module, image, 0, NULL, NULL))

void module_end(Module *m) {
    for (int i = 0; i < m->n_funcs; i++) m->funcs[i].obj.dead = true;
    m->obj.dead = true;
    sim_module_unload(m->sim);
}

/* Waits for the kernels of the module that are still to run. */
BODY(UNSAFE, 2000, cuModuleUnload, (CUmodule m), (m)) {
    if (!obj_ok(m, T_MODULE)) return E_INVALID_HANDLE;
    run_ctx(m->ctx);
    module_end(m);
    return OK;
}

BODY(CTX, 2000, cuModuleGetFunction, (CUfunction *function, CUmodule m, const char *name),
    (function, m, name)) {
    if (!function || !name) return E_INVALID_VALUE;
    if (!obj_ok(m, T_MODULE)) return E_INVALID_HANDLE;
    for (int i = 0; i < m->n_funcs; i++)
        if (!strcmp(m->funcs[i].kernel->name, name)) return GIVE(function, &m->funcs[i]);
    return E_NOT_FOUND;
}

/* ---- functions */

/* CUfunction_attribute: 0 threads, 1 shared, 2 constant, 3 local bytes, 4 registers, 5 PTX and 6
 * machine version, 7 cache mode, 8 and 9 as below. */
BODY(CTX, 2020, cuFuncGetAttribute, (int *value, CUfunction_attribute which, CUfunction f), (value,
    which, f)) {
    if (!value || which < 0 || which > 9) return E_INVALID_VALUE;
    if (!obj_ok(f, T_FUNC)) return E_INVALID_HANDLE;
    const SimKernel *k = f->kernel;
    const int values[10] = {
        k->max_threads, (int)k->shared_bytes, (int)k->const_bytes, (int)k->local_bytes,
        k->registers, sim_module_ptx_version(f->module->sim), sim_options.sm, 0,
        (int)f->max_dynamic, -1 };
    *value = values[which];
    return OK;
}

/* 8: dynamic shared memory allowed; 9: preferred carve-out in per cent, a hint. */
BODY(CTX, 9000, cuFuncSetAttribute, (CUfunction f, CUfunction_attribute which, int value), (f,
    which, value)) {
    if (!obj_ok(f, T_FUNC)) return E_INVALID_HANDLE;
    int most = which == 8 ? SIM_SHARED_MAX - (int)f->kernel->shared_bytes : 100;
    if ((which != 8 && which != 9) || value < (which == 8 ? 0 : -1) || value > most)
        return E_INVALID_VALUE;
    if (which == 8) f->max_dynamic = (uint32_t)value;
    return OK;
}

/* ---- launches */

/* The limits of compute capability 8.6; a block that has too many threads for the registers or for
 * .maxntid is "out of resources", everything else an invalid value. */
static CUresult check_shape(const Func *f, const SimLaunch *l) {
    static const unsigned grid_max[3] = { 0x7FFFFFFF, 65535, 65535 };
    static const unsigned block_max[3] = { 1024, 1024, 64 };
    const SimKernel *k = f->kernel;
    const unsigned *grid = l->grid, *block = l->block, shared = l->dynamic_shared;
    uint64_t threads = (uint64_t)block[0] * block[1] * block[2];
    for (int i = 0; i < 3; i++) {
        if (!grid[i] || grid[i] > grid_max[i] || !block[i] || block[i] > block_max[i])
            return misuse("%s: grid or block dimension %d is out of range", k->name, i);
        if (k->required_block[i] && k->required_block[i] != block[i])
            return misuse("%s: block differs from the one its .reqntid demands", k->name);
    }
    if (threads > 1024) return misuse("%s: %u threads in a block", k->name, (unsigned)threads);
    if (threads > (uint64_t)k->max_threads ||
        !occupancy_blocks(k->registers, (int)threads, k->shared_bytes)) {
        misuse("%s: %u threads: at most %d, with about %d registers each", k->name,
               (unsigned)threads, k->max_threads, k->registers);
        return E_LAUNCH_OUT_OF_RESOURCES;
    }
    if (shared <= f->max_dynamic) return OK;
    return misuse("%s: %u bytes of dynamic shared memory, %u are allowed (%u static; attribute 8 "
                  "raises it, to %d bytes in all)", k->name, shared, f->max_dynamic,
                  k->shared_bytes, SIM_SHARED_MAX);
}

/* Copies the arguments into one block, from an array of pointers or from `extra`. */
static CUresult pack(const SimKernel *k, void **params, void **extra, void **out) {
    if (params && extra) return E_INVALID_VALUE;
    if (!params && !extra && k->n_params) return E_INVALID_VALUE;
    const void *buffer = NULL;
    const size_t *size = NULL;
    for (int i = 0; extra && extra[i]; i += 2) {
        if (i > 4) return E_INVALID_VALUE;
        if (extra[i] == (void *)1) buffer = extra[i + 1];
        else if (extra[i] == (void *)2) size = extra[i + 1];
        else return E_INVALID_VALUE;
    }
    if (extra && (!buffer || !size || *size < k->param_bytes)) return E_INVALID_VALUE;
    for (int i = 0; params && i < k->n_params; i++)
        if (!params[i]) return E_INVALID_VALUE;
    char *block = zalloc(k->param_bytes);
    if (extra) memcpy(block, buffer, k->param_bytes);
    for (int i = 0; params && i < k->n_params; i++)
        memcpy(block + k->params[i].offset, params[i], k->params[i].size);
    *out = block;
    return OK;
}

static CUresult launch(Func *f, const SimLaunch *shape, CUstream h, void **params, void **extra) {
    Stream *s;
    CUresult r = get_stream(h, &s);
    if (r) return r;
    if (!obj_ok(f, T_FUNC)) return E_INVALID_HANDLE;
    if (f->module->ctx != s->ctx || s->ctx != self.ctx) {
        misuse("%s: function, stream and current context belong to different devices",
               f->kernel->name);
        return E_INVALID_HANDLE;
    }
    Work w = { .kind = W_KERNEL, .ctx = s->ctx, .func = f, .launch = *shape };
    w.launch.kernel = f->kernel;
    r = check_shape(f, shape);
    if (!r) r = pack(f->kernel, params, extra, &w.owned);
    return r ? r : submit(s, &w);
}

API(CTX, 4000, cuLaunchKernel, (CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
    unsigned by, unsigned bz, unsigned shared, CUstream stream, void **params, void **extra),
    launch(f, &(SimLaunch){ NULL, { gx, gy, gz }, { bx, by, bz }, shared, NULL }, stream, params,
           extra))

/* Runs a kernel when its turn has come; *us: its computed time. */
CUresult work_kernel(const Work *w, double *us) {
    SimCounters counters = { .launches = 0 };
    SimLaunch l = w->launch;
    l.params = w->owned;
    CUresult r = fault("launch", -1, 1, 700);
    if (r) {
        fprintf(stderr, "sim: %s: fault %d as SIM_FAULT asks\n", w->func->kernel->name, r);
        return r;
    }
    r = sim_launch(&l, &counters);
    *us = stats_launch(w->func->stats, w, &counters);
    return r;
}
