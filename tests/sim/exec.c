/* exec.c: warps, blocks and launches.
 *
 * A warp runs the group of lanes with the lowest PC; groups that meet at a PC join again, so code
 * reconverges as early as it can. The warps of a block take turns until each stands at a barrier or
 * is done; the blocks of a launch are spread over worker threads, each with its own registers and
 * shared memory, so that results do not depend on their number. */
#include "ptx.h"

#include <pthread.h>
#include <stdarg.h>
#include <unistd.h>
#include <math.h>

/* TURN: taken branches before another warp of the block is run. */
enum { MAX_WORKERS = 16, TURN = 4096 };

SimOptions sim_options = {
    .check_init = true, .check_races = true,
    .watchdog = 1u << 26, .sm = 86,
};

static Pool pools[MAX_WORKERS];
static pthread_mutex_t report_lock = PTHREAD_MUTEX_INITIALIZER;

/* ---- findings */

/* Linear thread number -> threadIdx. */
static void thread_index(const Launch *launch, u32 linear, unsigned out[3]) {
    const unsigned *b = launch->in->block;
    out[0] = linear % b[0];
    out[1] = linear / b[0] % b[1];
    out[2] = linear / b[0] / b[1];
}

/* What a real device would answer; findings that it would not notice fail the launch. */
static int error_of(SimKind kind) {
    switch (kind) {
    case SIM_BOUNDS: case SIM_FREED: case SIM_FOREIGN: case SIM_READONLY:
        return E_ILLEGAL_ADDRESS;
    case SIM_ALIGN: return E_MISALIGNED_ADDRESS;
    case SIM_TIMEOUT: return E_LAUNCH_TIMEOUT;
    case SIM_TRAP: case SIM_UNSUPPORTED: return E_ILLEGAL_INSTRUCTION;
    default: return E_LAUNCH_FAILED;
    }
}

/* One finding per block is enough: it stops the launch. */
void finding(Warp *w, SimKind kind, int lane, u64 address, const char *format, ...) {
    Worker *k = w->worker;
    Launch *launch = k->launch;
    const Inst *i = &k->code->inst[w->pc];
    const SimModule *m = launch->kernel->module;
    int error = error_of(kind);
    u32 lanes = w->mask ? w->mask : w->alive ? w->alive : 1;
    if (k->stop) return;
    SimFinding f = {.kind = kind, .kernel = launch->kernel->name, .device = launch->device,
                    .ptx_line = i->line, .line = i->src_line, .address = address, .file = ""};
    if (i->src_file > 0 && (u32)i->src_file < m->n_files) f.file = m->files[i->src_file];
    memcpy(f.block, k->ctaid, sizeof f.block);
    thread_index(launch, (u32)(w->index * 32 + (lane < 0 ? __builtin_ctz(lanes) : lane)), f.thread);
    va_list ap;
    va_start(ap, format);
    vsnprintf(f.text, sizeof f.text, format, ap);
    va_end(ap);
    pthread_mutex_lock(&report_lock);
    sim_report(&f);
    if (!launch->result || k->block_index < launch->result_block) {
        launch->result = error;
        launch->result_block = k->block_index;
    }
    pthread_mutex_unlock(&report_lock);
    k->stop = true;
    __atomic_store_n(&launch->cancel, true, __ATOMIC_RELAXED);
    w->next_pc = 0;
}

/* splitmix64: the source of all seeded orders. */
u64 mix64(u64 x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

/* ---- control flow */

/* Ends the running group's turn at its PC (if it still has lanes) and continues with the lowest.
 * Groups that are parked run only when no other is left; meeting another group unparks them. */
void regroup(Warp *w) {
    if (w->active) {
        int k = 0;
        while (k < w->n_waiting && w->waiting[k].pc != w->pc) k++;
        if (k == w->n_waiting)
            w->waiting[w->n_waiting++] = (Group){w->pc, 0, w->parking};
        else
            w->waiting[k].parked = false;
        w->waiting[k].mask |= w->active;
    }
    int low = 0;
    for (int k = 1; k < w->n_waiting; k++) {
        const Group *g = &w->waiting[k], *best = &w->waiting[low];
        if (g->parked != best->parked ? best->parked : g->pc < best->pc) low = k;
    }
    w->next_pc = ~0u;
    w->active = 0;
    w->parking = false;
    if (!w->n_waiting) return;
    w->pc = w->waiting[low].pc;
    w->active = w->waiting[low].mask;
    w->forced = w->waiting[low].parked;
    w->waiting[low] = w->waiting[--w->n_waiting];
    for (int k = 0; k < w->n_waiting; k++)
        if (w->waiting[k].pc > w->pc && w->waiting[k].pc < w->next_pc)
            w->next_pc = w->waiting[k].pc;
}

/* Called by a handler: true if other groups run first; the instruction is then executed again. */
bool park(Warp *w) {
    Worker *k = w->worker;
    if (w->forced || !w->n_waiting) return false;
    k->warp_count[w->pc]--; /* not executed after all */
    k->lane_count[w->pc] -= (u32)__builtin_popcount(w->mask);
    w->parking = true;
    w->next_pc = 0;
    w->pc--; /* the loop adds one */
    return true;
}

/* Taken branches give other warps their turn and end endless loops. */
static void count_branch(Warp *w) {
    if (++w->branches % TURN == 0) {
        w->yield = true;
        w->next_pc = 0;
    }
    if (w->branches > sim_options.watchdog)
        finding(w, SIM_TIMEOUT, -1, 0, "endless loop: more than %lu taken branches",
                sim_options.watchdog);
}

/* The handlers of control flow leave pc one before where to go on: the loop adds one. */
void run_bra(Warp *w, const Inst *i, UNUSED void *out) {
    u32 rest = w->active & ~w->mask;
    if (!w->mask) return;
    count_branch(w);
    if (w->n_waiting && i->target <= w->pc)
        w->next_pc = 0; /* back to where others may be parked */
    if (rest) {
        w->worker->count.divergent++;
        w->waiting[w->n_waiting++] = (Group){w->pc + 1, rest, false};
        w->active = w->mask;
        w->next_pc = 0;
    }
    w->pc = i->target - 1;
}

void run_exit(Warp *w, UNUSED const Inst *i, UNUSED void *out) {
    w->alive &= ~w->mask;
    w->active &= ~w->mask;
    if (!w->active) w->next_pc = 0;
}

void run_trap(Warp *w, UNUSED const Inst *i, UNUSED void *out) {
    if (w->mask) finding(w, SIM_TRAP, -1, 0, "trap");
}

/* Rounding modes other than to nearest, .ftz (denormal operands and results are zeros with their
 * sign) and .sat (to 0 .. 1, NaN to 0) of f32. */
void run_wrapped(Warp *w, const Inst *i, void *out) {
    static const unsigned modes[] = {[RND_RZ] = _MM_ROUND_TOWARD_ZERO, [RND_RM] = _MM_ROUND_DOWN,
                                     [RND_RP] = _MM_ROUND_UP, [RND_RN] = 0, [RND_NONE] = 0};
    unsigned saved = _mm_getcsr(), flush = i->ftz ? _MM_DENORMALS_ZERO_ON : 0;
    float *f = out;
    _mm_setcsr((saved & ~(unsigned)_MM_ROUND_MASK) | modes[i->round] | flush);
    i->inner(w, i, out);
    _mm_setcsr(saved);
    for (int l = 0; l < 32 && i->type == T_F32 && i->out_bits == 32; l++) {
        if (i->ftz && !(float_bits(f[l]) & 0x7f800000)) f[l] = copysignf(0, f[l]);
        if (i->sat) f[l] = f[l] > 0 ? f[l] < 1 ? f[l] : 1 : 0;
    }
}

/* ---- the loop of a warp */

/* Reads of registers that the dataflow could not prove to be set. A plain copy is not a use: the
 * copy is then as unset as its source (compilers copy undefined values). */
static void check_init(Warp *w, const Inst *i) {
    u32 guard = i->guard ? w->active & ~w->init[i->guard / 32] : 0;
    if (guard) finding(w, SIM_UNINIT, __builtin_ctz(guard), 0, "the guard was never written");
    for (int k = 0; k < i->n_src && !i->copy_init; k++) {
        u32 unset = w->mask & ~w->init[i->src[k] / 32];
        if (unset)
            finding(w, SIM_UNINIT, __builtin_ctz(unset), 0, "register operand %d was never written",
                    i->n_dst + k);
    }
}

static void note_init(Warp *w, const Inst *i) {
    u32 set = w->mask;
    if (i->copy_init) set &= w->init[i->src[0] / 32];
    for (int k = 0; k < i->n_dst; k++) w->init[i->dst[k] / 32] |= set;
    w->init[i->dst_pred / 32] |= set;
}

/* The instruction, and its result into the lanes that are active. */
static inline void execute(Warp *w, const Inst *i) {
    _Alignas(64) u64 result[32];
    const u32 *narrow = (const u32 *)result;
    u32 mask = w->mask, *to = slot(w, i->dst[0]);
    u64 *wide = (u64 *)to;
    if (i->out_bits == 0 || (i->out_bits > 1 && mask == FULL_WARP)) {
        i->run(w, i, to);
    } else if (mask || i->out_bits == 1) {
        i->run(w, i, result);
        if (i->out_bits == 1)
            put_pred(w, i->dst[0], *narrow, mask);
        else if (i->out_bits == 32)
            LANES to[l] = mask >> l & 1 ? narrow[l] : to[l];
        else
            LANES wide[l] = mask >> l & 1 ? result[l] : wide[l];
    }
}

/* Runs a warp until it waits at a barrier, ends, or has had its turn. */
static void run_warp(Warp *w) {
    Worker *k = w->worker;
    const Inst *code = k->code->inst;
    bool tracking = k->code->n_tracked && sim_options.check_init;
    w->yield = false;
    regroup(w);
    while (w->active && !w->yield && w->state == W_RUN && !k->stop) {
        const Inst *i = &code[w->pc];
        w->mask = w->active;
        if (i->guard) w->mask &= *(u32 *)slot(w, i->guard) ^ i->guard_flip;
        k->warp_count[w->pc]++;
        k->lane_count[w->pc] += (u32)__builtin_popcount(w->mask);
        if (tracking && i->check_init) check_init(w, i);
        execute(w, i);
        if (tracking && i->note_init) note_init(w, i);
        w->pc++;
        if (w->pc >= w->next_pc) regroup(w);
    }
    if (!w->active && w->state == W_RUN) w->state = W_DONE;
    if (w->active) w->next_pc = 0;
}

/* ---- blocks */

/* Constants, and special registers as they are in all blocks (but %ctaid): once per launch. */
static void init_frame(const Warp *w) {
    const Launch *launch = w->worker->launch;
    const SimCode *c = launch->code;
    const unsigned *block = launch->in->block, *grid = launch->in->grid;
    for (u32 l = 0; l < 32; l++) {
        unsigned t[3];
        thread_index(launch, (u32)w->index * 32 + l, t);
        const u32 special[SR_COUNT] = { /* in the order of special_names */
            t[0], t[1], t[2], block[0], block[1], block[2], 0, 0, 0, grid[0], grid[1], grid[2],
            l, (u32)w->index, (u32)w->worker->n_warps,
            1u << l, (1u << l) - 1, (2u << l) - 1, ~((2u << l) - 1), ~((1u << l) - 1),
            launch->in->dynamic_shared, launch->shared_bytes, 0, 82 };
        for (int k = 0; k < SR_COUNT; k++)
            if (c->special[k]) put_lane(slot(w, c->special[k]), k >= SR_GRIDID, l, special[k]);
        for (u32 n = 0; n < c->n_consts; n++) {
            const Const *k = &c->consts[n];
            u64 v = k->value + (k->dynamic ? (c->static_shared + 15) & ~15u : 0);
            if (k->bits == 1)
                put_pred(w, k->offset, (u32)v, FULL_WARP);
            else
                put_lane(slot(w, k->offset), k->bits == 64, l, v);
        }
    }
}

static void init_warp(Worker *k, int index) {
    Warp *w = &k->warps[index];
    const SimCode *c = k->code;
    u32 left = k->launch->n_threads - (u32)index * 32;
    u32 members = left >= 32 ? FULL_WARP : (1u << left) - 1;
    *w = (Warp){.frame = w->frame, .init = w->init, .worker = k, .index = index,
                .members = members, .alive = members, .n_waiting = 1, .waiting = {{0, members, 0}},
                .sync_epoch = w->sync_epoch, .async = w->async, .cap_async = w->cap_async};
    for (u32 l = 0; l < 96; l++)
        put_lane(slot(w, c->special[SR_CTAID_X + l / 32]), false, l % 32, k->ctaid[l / 32]);
    if (c->n_tracked) memset(w->init, 0xff, c->frame_bytes / 32 * 4);
    for (u32 n = 0; n < c->n_tracked; n++) w->init[c->tracked[n]] = 0;
}

/* All live warps stand still: say which barriers they wait at. */
static void report_deadlock(Worker *k) {
    for (int n = 0; n < k->n_warps; n++) {
        Warp *w = &k->warps[n];
        if (w->state != W_BARRIER) continue;
        finding(w, SIM_BARRIER, -1, 0,
                "dead lock: warp waits at barrier %u for %u threads, %u came", w->bar_id,
                k->barriers[w->bar_id].expected, k->barriers[w->bar_id].arrived);
        return;
    }
}

/* Runs a block to its end: its warps in turn, until none can go on. */
static void run_block(Worker *k, u32 index) {
    const unsigned *grid = k->launch->in->grid;
    k->block_index = index;
    k->ctaid[0] = index % grid[0];
    k->ctaid[1] = index / grid[0] % grid[1];
    k->ctaid[2] = index / grid[0] / grid[1];
    if ((++k->serial & 0x3fff) == 0) { /* the records hold 14 bits of it */
        memset(k->shared_writes, 0, k->pool->part[P_WRITES].size);
        memset(k->shared_reads, 0, k->pool->part[P_READS].size);
        k->serial++;
    }
    k->epoch = 0;
    k->fenced = false;
    memset(k->barriers, 0, sizeof k->barriers);
    memset(k->shared_state, 0, k->launch->shared_bytes);
    for (int n = 0; n < k->n_warps; n++) init_warp(k, n);
    u32 start = sim_options.seed ? (u32)mix64(sim_options.seed + index) : 0;
    for (bool progress = true; progress && !k->stop;) {
        progress = false;
        for (int n = 0; n < k->n_warps && !k->stop; n++) {
            Warp *w = &k->warps[((u32)n + start) % (u32)k->n_warps];
            if (w->state != W_RUN) continue;
            progress = true;
            run_warp(w);
        }
    }
    if (!k->stop) report_deadlock(k);
    k->count.blocks++;
    k->count.threads += k->launch->n_threads;
}

/* Zeroed when it is new, or always if `clear`. */
static void *from_pool(Pool *pool, int which, size_t bytes, bool clear) {
    struct Part *p = &pool->part[which];
    if (p->size < bytes || !p->at) {
        free(p->at);
        p->size = (bytes | 63) + 1;
        p->at = aligned_alloc(64, p->size);
        if (!p->at) abort();
        memset(p->at, 0, p->size);
    } else if (clear) {
        memset(p->at, 0, bytes);
    }
    return p->at;
}

static void get_memory(Worker *k, Pool *pool) {
    const SimCode *c = k->code;
    size_t warps = (size_t)k->n_warps, shared = (k->launch->shared_bytes + 63) & ~63u;
    size_t inits = c->frame_bytes / 32 + 8;
    k->warps = from_pool(pool, P_WARPS, warps * sizeof *k->warps, true);
    u8 *frames = from_pool(pool, P_FRAMES, warps * c->frame_bytes + 64, false);
    u32 *init = from_pool(pool, P_INITS, warps * inits * 4, false);
    k->locals = from_pool(pool, P_LOCALS, warps * 32 * ((c->local_bytes + 15) & ~15u), false);
    k->shared = from_pool(pool, P_SHARED, shared, false);
    k->shared_state = from_pool(pool, P_STATE, shared, false);
    k->shared_writes = from_pool(pool, P_WRITES, shared * 2, false);
    k->shared_reads = from_pool(pool, P_READS, shared * 2, false);
    k->warp_count = from_pool(pool, P_WARP_COUNT, c->n_inst * 8, true);
    k->lane_count = from_pool(pool, P_LANE_COUNT, c->n_inst * 8, true);
    k->cache = from_pool(pool, P_CACHE, c->n_inst * sizeof *k->cache, true);
    for (int n = 0; n < k->n_warps; n++) {
        Warp *w = &k->warps[n];
        w->worker = k;
        w->index = n;
        w->frame = frames + (size_t)n * c->frame_bytes;
        w->init = init + (size_t)n * inits;
        init_frame(w);
    }
}

/* Takes blocks until there are no more, or the launch is cancelled. */
static void *worker_main(void *arg) {
    Worker *k = arg;
    Launch *launch = k->launch;
    k->n_warps = (int)((launch->n_threads + 31) / 32);
    get_memory(k, k->pool);
    k->serial = k->pool->serial;
    while (!__atomic_load_n(&launch->cancel, __ATOMIC_RELAXED)) {
        u32 n = __atomic_fetch_add(&launch->next_block, 1, __ATOMIC_RELAXED);
        if (n >= launch->n_blocks) break;
        run_block(k, sim_options.seed & 1 ? launch->n_blocks - 1 - n : n);
    }
    counters_finish(k);
    for (int n = 0; n < k->n_warps; n++) free(k->warps[n].async);
    k->pool->serial = k->serial;
    return NULL;
}

/* ---- launches */

/* Small launches are not worth a thread. */
static int n_workers(const Launch *launch) {
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    int n = sim_options.threads ? sim_options.threads : cpus > 4 ? 4 : (int)cpus;
    u64 work = (u64)launch->n_blocks * launch->n_threads;
    n = n > (int)launch->n_blocks ? (int)launch->n_blocks : n;
    return n < 1 || work < 512 ? 1 : n > MAX_WORKERS ? MAX_WORKERS : n;
}

int sim_launch(const SimLaunch *in, SimCounters *counters) {
    static u32 number;
    Launch launch = {.in = in, .kernel = in->kernel, .code = in->kernel->code,
                     .device = in->kernel->module->device,
                     .n_blocks = in->grid[0] * in->grid[1] * in->grid[2],
                     .n_threads = in->block[0] * in->block[1] * in->block[2],
                     .shared_bytes = ((in->kernel->shared_bytes + 15) & ~15u) + in->dynamic_shared};
    Worker workers[MAX_WORKERS] = {0};
    pthread_t threads[MAX_WORKERS];
    if (in->kernel->param_bytes)
        memcpy(launch.params, in->params, in->kernel->param_bytes);
    launch.number = ++number;
    mem_prepare_launch(launch.number);
    int n = launch.code->global_atomics ? 1 : n_workers(&launch), started = 1;
    for (int k = 0; k < n; k++)
        workers[k] = (Worker){.launch = &launch, .code = launch.code, .pool = &pools[k]};
    while (started < n && !pthread_create(&threads[started], NULL, worker_main, &workers[started]))
        started++;
    worker_main(&workers[0]);
    for (int k = 1; k < started; k++) pthread_join(threads[k], NULL);
    for (int k = 0; k < started; k++) sim_counters_add(counters, &workers[k].count);
    counters->launches++;
    return launch.result;
}
