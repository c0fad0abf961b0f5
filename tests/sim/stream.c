/* stream.c: streams, events, graphs and the order in which work runs.
 *
 * Work does not run when it is submitted. Each operation knows its predecessors: the one before it
 * in its stream, the records it waits for, and the legacy stream's rule. When a call has to wait,
 * the operations it needs run one by one, each time the ready one with the lowest seeded priority;
 * README.md ("Order") says what else runs, by SIM_SEED. So what the program does not order happens
 * in some other order under some seed.
 *
 * A capturing stream does not run its work but adds it to a graph; an event recorded in it carries
 * the place in that graph to other streams, which so join the capture. What could not be put into
 * a graph is an error that spoils the whole capture, as on a real driver. */
#include "api.h"

static Op **ready; /* no unfinished predecessors */
static uint32_t n_ready, cap_ready;
static uint32_t next_stream_id;
static Capture *captures; /* all, ended ones included */

void work_free(Work *work) {
    free(work->owned);
    work->owned = NULL;
}

/* ---- operations */

static void op_hold(Op **slot, Op *op) {
    Op *old = *slot;
    if (op) op->refs++;
    *slot = op;
    if (!old || --old->refs) return;
    work_free(&old->work);
    free(old->succs);
    free(old);
}

/* It may run from now on. */
static void make_ready(Op *op) {
    ready = xgrow(ready, n_ready, &cap_ready, sizeof *ready);
    ready[n_ready++] = op;
}

/* An operation that runs after `preds` (NULL entries allowed), not before virtual time `t`. Takes
 * work->owned. The scheduler holds it until it is done. */
static Op *op_new(const Work *work, Op **preds, int n_preds, double t, uint64_t order) {
    Op *op = zalloc(sizeof *op), *held = NULL;
    op->work = *work;
    op->ready = t;
    op->order = order;
    op->preds = zalloc((size_t)n_preds * sizeof *op->preds);
    for (int i = 0; i < n_preds; i++) {
        Op *p = preds[i];
        if (p && p->end > op->ready && p->done) op->ready = p->end;
        if (!p || p->done) continue;
        op_hold(&op->preds[op->n_preds++], p);
        p->succs = xgrow(p->succs, (uint32_t)p->n_succs, &p->cap_succs, sizeof *p->succs);
        p->succs[p->n_succs++] = op;
        op->waits++;
    }
    op_hold(&held, op);
    if (!op->waits) make_ready(op);
    return op;
}

/* Lets the successors go. */
static void finish(Op *op, double end) {
    op->end = end;
    op->done = true;
    for (int i = 0; i < op->n_preds; i++) op_hold(&op->preds[i], NULL);
    free(op->preds);
    op->preds = NULL;
    op->n_preds = 0;
    for (int i = 0; i < op->n_succs; i++) {
        Op *s = op->succs[i];
        if (end > s->ready) s->ready = end;
        if (!--s->waits) make_ready(s);
    }
    op->n_succs = 0;
    work_free(&op->work);
    op_hold(&op, NULL);
}

/* Runs one operation (not in the ready list any more). After a fault in its context only its place
 * in the order is kept. */
static void execute(Op *op) {
    Work *w = &op->work;
    Ctx *c = w->ctx;
    double us = 0;
    if (w->kind != W_EMPTY && !c->sticky) c->sticky = fault("lost", c->device, 1, E_UNKNOWN);
    if (!c->sticky) {
        if (w->kind == W_KERNEL) c->sticky = work_kernel(w, &us);
        if (w->kind == W_COPY) {
            c->sticky = work_copy(w);
            us = stats_copy(w->src_dev, w->dst_dev, w->bytes);
        }
        if (w->kind == W_SET) {
            c->sticky = work_set(w);
            us = computed_set(w->bytes);
        }
    }
    double start = w->kind != W_KERNEL && w->kind != W_SET ? 0 : c->kernels_end;
    double end = (start > op->ready ? start : op->ready) + us;
    if (w->kind == W_KERNEL || w->kind == W_SET) c->kernels_end = end;
    finish(op, end);
}

/* Does this operation run although nobody waits for it? */
static bool volunteers(const Op *op) {
    unsigned style = config.seed % 4;
    return style == 1 || (style > 1 && (op->order >> 40 & 1));
}

/* Takes the next operation out of the ready list; NULL if none may run now. */
static Op *pick(void) {
    Op **best = NULL, *op;
    for (uint32_t i = 0; i < n_ready; i++)
        if ((ready[i]->needed || volunteers(ready[i])) &&
            (!best || ready[i]->order < (*best)->order))
            best = &ready[i];
    if (!best) return NULL;
    op = *best;
    *best = ready[--n_ready];
    return op;
}

/* Marks an operation and all it waits for (a chain may be long: no recursion). */
static void need(Op *op) {
    uint32_t n = 0, cap = 0;
    Op **stack = NULL;
    while (op) {
        for (int i = 0; i < op->n_preds && !op->needed; i++) {
            stack = xgrow(stack, n, &cap, sizeof *stack);
            stack[n++] = op->preds[i];
        }
        op->needed = true;
        op = n ? stack[--n] : NULL;
    }
    free(stack);
}

/* Runs until `op` is done; the calling thread has then waited until the operation's end. */
void run_until(Op *op) {
    Op *held = NULL;
    if (!op) return;
    op_hold(&held, op);
    need(op);
    while (!op->done) {
        Op *next = pick();
        if (!next) {
            fprintf(stderr, "sim: internal error: work is pending and none of it can run\n");
            abort();
        }
        execute(next);
    }
    if (op->end > self.clock) self.clock = op->end;
    op_hold(&held, NULL);
}

/* Marks everything first, so that the streams mix. */
void run_ctx(Ctx *ctx) {
    for (Stream *s = ctx->streams; s; s = s->next) need(s->tail);
    for (Stream *s = ctx->streams; s; s = s->next) run_until(s->tail);
}

/* ---- streams */

Stream *stream_new(Ctx *ctx, unsigned flags) {
    Stream *s = obj_new(T_STREAM, sizeof *s);
    s->ctx = ctx;
    s->flags = flags;
    s->id = next_stream_id++;
    s->next = ctx->streams;
    ctx->streams = s;
    return s;
}

CUresult get_stream(CUstream handle, Stream **stream) {
    Stream *s = handle;
    if (!s || s == (Stream *)1) s = self.ctx->legacy;
    if (s == (Stream *)2) return E_NOT_SUPPORTED; /* per-thread default stream */
    if (!obj_ok(s, T_STREAM)) return E_INVALID_HANDLE;
    *stream = s;
    return s->ctx->sticky;
}

static uint64_t stream_order(Stream *s) {
    return mix64(mix64(config.seed + 1) ^ mix64(((uint64_t)s->id << 32) + ++s->count));
}

/* What the next operation of a stream has to wait for; at most `max` are written. The legacy
 * stream waits for every blocking stream of its context, and they wait for it. */
static int stream_preds(Stream *s, Op **preds, int max) {
    int n = 0;
    for (Stream *t = s->ctx->streams; t && n < max; t = t->next) {
        bool tied = t == s || (s == s->ctx->legacy && !(t->flags & 1)) ||
                    (t == s->ctx->legacy && !(s->flags & 1));
        if (tied && t->tail && (t == s || !t->tail->done)) preds[n++] = t->tail;
    }
    return n;
}

/* `op` is the stream's last operation now. The eager device starts at once. */
static void stream_tail(Stream *s, Op *op) {
    op_hold(&s->tail, op);
    while (config.seed % 4 == 1 && (op = pick())) execute(op);
}

/* ---- graphs */

static Graph *graph_new(void) {
    return obj_new(T_GRAPH, sizeof(Graph));
}

/* A node after `deps`; takes work->owned. */
static Node *graph_add(Graph *g, const Work *work, Node *const *deps, int n_deps) {
    Node *n = zalloc(sizeof *n);
    g->nodes = xgrow(g->nodes, (uint32_t)g->n, &g->cap, sizeof *g->nodes);
    *n = (Node){ .work = *work, .index = g->n, .n_deps = n_deps };
    n->deps = zalloc((size_t)n_deps * sizeof *deps);
    for (int i = 0; i < n_deps; i++) n->deps[i] = deps[i];
    return g->nodes[g->n++] = n;
}

/* Only kernel nodes own something: their parameters. */
static Work work_clone(const Work *w) {
    Work copy = *w;
    if (w->kind == W_KERNEL) {
        copy.owned = zalloc(w->func->kernel->param_bytes);
        memcpy(copy.owned, w->owned, w->func->kernel->param_bytes);
    }
    return copy;
}

static Graph *graph_clone(const Graph *g) {
    Graph *copy = graph_new();
    for (int i = 0; i < g->n; i++) {
        Work w = work_clone(&g->nodes[i]->work);
        Node *n = graph_add(copy, &w, g->nodes[i]->deps, g->nodes[i]->n_deps);
        for (int k = 0; k < n->n_deps; k++) n->deps[k] = copy->nodes[n->deps[k]->index];
    }
    return copy;
}

/* Handles of nodes die with their graph; the memory stays for the error. */
static CUresult graph_free(Graph *g) {
    if (!obj_ok(g, T_GRAPH)) return E_INVALID_VALUE;
    g->obj.dead = true;
    for (int i = 0; i < g->n; i++) work_free(&g->nodes[i]->work);
    return OK;
}

API(INIT, 10000, cuGraphDestroy, (CUgraph graph), graph_free(graph))

/* ---- capture */

/* Spoils a capture and passes the reason on. */
CUresult capture_break(Capture *c, CUresult why) {
    bool was = c->broken;
    c->broken = true;
    return was ? E_STREAM_CAPTURE_INVALIDATED : why;
}

/* Calls that may wait for the device or change its memory map are not allowed while the calling
 * thread captures (modes global and thread local), or any thread does (mode global). */
CUresult capture_allows(void) {
    CUresult r = OK;
    for (Capture *c = captures; c; c = c->next) {
        bool mine = pthread_equal(c->thread, pthread_self());
        if (c->ended || c->mode == 2 || (c->mode == 1 && !mine)) continue;
        r = capture_break(c, E_STREAM_CAPTURE_UNSUPPORTED);
    }
    return r;
}

/* *front = the union of itself and `more`. */
static void join_front(Front *front, const Front *more) {
    Node **all = zalloc((size_t)(front->n + more->n) * sizeof *all);
    int k = 0;
    for (int i = 0; i < front->n + more->n; i++) {
        Node *node = i < front->n ? front->nodes[i] : more->nodes[i - front->n];
        int j = 0;
        while (j < k && all[j] != node) j++;
        if (j == k) all[k++] = node;
    }
    free(front->nodes);
    *front = (Front){ all, k };
}

static void set_front(Front *front, const Front *to) {
    front->n = 0;
    join_front(front, to);
}

/* Instead of running: a node after everything the stream did in this capture. */
static CUresult capture_add(Stream *s, Work *work) {
    if (s->capture->broken) {
        work_free(work);
        return E_STREAM_CAPTURE_INVALIDATED;
    }
    Node *n = graph_add(s->capture->graph, work, s->front.nodes, s->front.n);
    set_front(&s->front, &(Front){ &n, 1 });
    return OK;
}

/* The event stands for the stream's place in the graph, and no longer for any real record. */
static CUresult capture_record(Event *e, Stream *s) {
    if (s->capture->broken) return E_STREAM_CAPTURE_INVALIDATED;
    e->capture = s->capture;
    op_hold(&e->op, NULL);
    set_front(&e->front, &s->front);
    return OK;
}

/* The stream joins the event's capture, or goes on in it after both places. Waiting for work
 * outside the capture or in another one spoils it; so does making the legacy stream wait. */
static CUresult capture_wait(Stream *s, Event *e) {
    Capture *of_event = e->capture && !e->capture->ended ? e->capture : NULL;
    if (s->capture && s->capture->broken) return E_STREAM_CAPTURE_INVALIDATED;
    if (!of_event && !e->op && !e->capture) return OK;
    if (!of_event) return capture_break(s->capture, E_STREAM_CAPTURE_ISOLATION);
    if (of_event->broken) return E_STREAM_CAPTURE_INVALIDATED;
    if (s == s->ctx->legacy) return capture_break(of_event, E_STREAM_CAPTURE_IMPLICIT);
    if (s->capture && s->capture != of_event) {
        capture_break(of_event, E_STREAM_CAPTURE_MERGE);
        return capture_break(s->capture, E_STREAM_CAPTURE_MERGE);
    }
    if (!s->capture) s->front.n = 0;
    s->capture = of_event;
    join_front(&s->front, &e->front);
    return OK;
}

/* Modes: 0 global, 1 thread local, 2 relaxed: see capture_allows(). */
BODY(CTX, 10010, cuStreamBeginCapture_v2, (CUstream h, CUstreamCaptureMode mode), (h, mode)) {
    Stream *s;
    CUresult r = get_stream(h, &s);
    if (r) return r;
    if (mode < 0 || mode > 2) return E_INVALID_VALUE;
    if (s == s->ctx->legacy) return E_STREAM_CAPTURE_UNSUPPORTED;
    if (s->capture) return E_ILLEGAL_STATE;
    Capture *c = zalloc(sizeof *c);
    *c = (Capture){ graph_new(), s, mode, pthread_self(), false, false, captures };
    captures = c;
    s->capture = c;
    s->front.n = 0;
    return OK;
}

static void mark_back(Node *n, bool *seen) {
    if (seen[n->index]) return;
    seen[n->index] = true;
    for (int i = 0; i < n->n_deps; i++) mark_back(n->deps[i], seen);
}

/* Lets all streams out of the capture. False: one that joined was not joined back to the first. */
static bool leave_capture(const Capture *c) {
    bool *seen = zalloc((size_t)c->graph->n * sizeof *seen), good = true;
    for (int i = 0; i < c->origin->front.n; i++) mark_back(c->origin->front.nodes[i], seen);
    for (int d = 0; d < config.devices; d++)
        for (Stream *s = device_ctx(d) ? device_ctx(d)->streams : NULL; s; s = s->next) {
            if (s->capture != c) continue;
            for (int i = 0; i < s->front.n; i++) good &= seen[s->front.nodes[i]->index];
            s->capture = NULL;
        }
    free(seen);
    return good;
}

/* Ends the capture even if it was spoilt; then there is no graph. */
BODY(CTX, 10000, cuStreamEndCapture, (CUstream h, CUgraph *graph), (h, graph)) {
    Stream *s;
    CUresult r = get_stream(h, &s);
    if (r) return r;
    if (!graph) return E_INVALID_VALUE;
    Capture *c = s->capture;
    if (!c) return E_ILLEGAL_STATE;
    if (s != c->origin) return capture_break(c, E_STREAM_CAPTURE_UNMATCHED);
    if (c->mode != 2 && !pthread_equal(c->thread, pthread_self()))
        return E_STREAM_CAPTURE_WRONG_THREAD;
    r = leave_capture(c) ? OK : E_STREAM_CAPTURE_UNJOINED;
    if (c->broken) r = E_STREAM_CAPTURE_INVALIDATED;
    c->ended = true;
    *graph = r ? NULL : c->graph;
    if (r) graph_free(c->graph);
    return r;
}

/* ---- work on streams */

/* Work on the legacy stream would have to wait for streams that are being captured. */
static CUresult implicit_capture(Stream *s) {
    CUresult r = OK;
    for (Stream *t = s->ctx->streams; s == s->ctx->legacy && t; t = t->next)
        if (t->capture && !(t->flags & 1)) r = capture_break(t->capture, E_STREAM_CAPTURE_IMPLICIT);
    return r;
}

/* An operation at the end of a stream, which also waits for `extra` (or NULL). */
static CUresult append(Stream *s, Work *work, Op *extra) {
    enum { MAX = 1024 };
    Op *preds[MAX + 1];
    CUresult r = implicit_capture(s);
    if (!r) r = s->ctx->sticky;
    if (r) {
        work_free(work);
        return r;
    }
    int n = stream_preds(s, preds, MAX);
    preds[n++] = extra;
    stream_tail(s, op_new(work, preds, n, self.clock, stream_order(s)));
    return OK;
}

CUresult submit(Stream *s, Work *work) {
    if (s->capture) return capture_add(s, work);
    return append(s, work, NULL);
}

API(CTX, 2000, cuStreamCreate, (CUstream *stream, unsigned flags),
    flags > 1 ? E_INVALID_VALUE : GIVE(stream, stream_new(self.ctx, flags)))

/* Its work goes on. */
BODY(CTX, 4000, cuStreamDestroy_v2, (CUstream h), (h)) {
    Stream *s;
    CUresult r = get_stream(h, &s);
    if (!r && s == s->ctx->legacy) r = E_INVALID_HANDLE;
    if (!r && s->capture) r = capture_break(s->capture, E_STREAM_CAPTURE_UNSUPPORTED);
    if (!r) s->obj.dead = true;
    return r;
}

/* Waits for an operation, or lets the device get on by one so that polling ends. Returns what the
 * work did to the context. */
static CUresult wait_for(const Ctx *c, Op *op, bool query) {
    if (query && op && !op->done) {
        need(op);
        Op *next = pick();
        if (next) execute(next);
    }
    if (!query) run_until(op);
    if (c->sticky) return c->sticky;
    if (op && !op->done) return E_NOT_READY;
    if (op && op->end > self.clock) self.clock = op->end;
    return OK;
}

/* All work of a stream so far; for the legacy stream that includes the blocking streams. */
static CUresult wait_stream(CUstream h, bool query) {
    Stream *s;
    CUresult r = get_stream(h, &s);
    if (!r && s->capture) r = capture_break(s->capture, E_STREAM_CAPTURE_UNSUPPORTED);
    if (!r) r = capture_allows();
    if (!r && s == s->ctx->legacy) r = append(s, &(Work){ .ctx = s->ctx }, NULL);
    return r ? r : wait_for(s->ctx, s->tail, query);
}

API(CTX, 2000, cuStreamSynchronize, (CUstream stream), wait_stream(stream, false))
API(CTX, 2000, cuStreamQuery, (CUstream stream), wait_stream(stream, true))

/* ---- events */

/* Flags: 1 blocking wait (no difference here), 2 no timing, 4 between processes (refused). */
BODY(CTX, 2000, cuEventCreate, (CUevent *event, unsigned flags), (event, flags)) {
    if (!event || flags & ~7u || (flags & 4 && !(flags & 2))) return E_INVALID_VALUE;
    if (flags & 4) return E_NOT_SUPPORTED;
    *event = obj_new(T_EVENT, sizeof **event);
    (*event)->ctx = self.ctx;
    (*event)->flags = flags;
    return OK;
}

BODY(CTX, 4000, cuEventDestroy_v2, (CUevent e), (e)) {
    if (!obj_ok(e, T_EVENT)) return E_INVALID_HANDLE;
    e->obj.dead = true;
    op_hold(&e->op, NULL);
    return OK;
}

/* Event and stream have to be of the same context. */
BODY(CTX, 2000, cuEventRecord, (CUevent event, CUstream stream), (event, stream)) {
    Stream *s;
    if (!obj_ok(event, T_EVENT)) return E_INVALID_HANDLE;
    CUresult r = get_stream(stream, &s);
    if (r) return r;
    if (s->ctx != event->ctx) return E_INVALID_HANDLE;
    if (s->capture) return capture_record(event, s);
    r = submit(s, &(Work){ .ctx = s->ctx });
    if (r) return r;
    op_hold(&event->op, s->tail);
    event->capture = NULL;
    return OK;
}

/* The stream's later work waits for the record that the event stands for now. */
BODY(CTX, 3020, cuStreamWaitEvent, (CUstream stream, CUevent event, unsigned flags), (stream,
    event, flags)) {
    Stream *s;
    CUresult r = get_stream(stream, &s);
    if (r) return r;
    if (!obj_ok(event, T_EVENT)) return E_INVALID_HANDLE;
    if (flags) return flags > 1 ? E_INVALID_VALUE : E_NOT_SUPPORTED;
    if (s->capture || (event->capture && !event->capture->ended)) return capture_wait(s, event);
    if (event->capture) return E_CAPTURED_EVENT;
    if (event->ctx != s->ctx) stats_hop();
    if (!event->op) return OK;
    return append(s, &(Work){ .ctx = s->ctx }, event->op);
}

/* An event that was never recorded counts as complete. */
static CUresult wait_record(Event *e, bool query) {
    if (!obj_ok(e, T_EVENT)) return E_INVALID_HANDLE;
    if (e->capture)
        return e->capture->ended ? E_CAPTURED_EVENT : capture_break(e->capture, E_CAPTURED_EVENT);
    CUresult r = capture_allows();
    if (!r) r = e->ctx->sticky;
    return r ? r : wait_for(e->ctx, e->op, query);
}

API(CTX, 2000, cuEventSynchronize, (CUevent event), wait_record(event, false))
API(CTX, 2000, cuEventQuery, (CUevent event), wait_record(event, true))

/* Milliseconds of virtual time ("computed"): kernels by the model, copies by the PCIe rate. */
static CUresult elapsed(float *ms, CUevent from, CUevent to) {
    if (!obj_ok(from, T_EVENT) || !obj_ok(to, T_EVENT) || from->ctx != to->ctx)
        return E_INVALID_HANDLE;
    if (!from->op || !to->op || ((from->flags | to->flags) & 2)) return E_INVALID_HANDLE;
    if (from->ctx->sticky) return from->ctx->sticky;
    if (!from->op->done || !to->op->done) return E_NOT_READY;
    return GIVE(ms, (float)((to->op->end - from->op->end) / 1e3));
}

API(CTX, 2000, cuEventElapsedTime, (float *ms, CUevent from, CUevent to), elapsed(ms, from, to))
API(CTX, 12080, cuEventElapsedTime_v2, (float *ms, CUevent from, CUevent to), elapsed(ms, from, to))

/* ---- executable graphs */

/* Functions of a module that is gone cannot run any more. */
static CUresult functions_ok(const Graph *g) {
    for (int i = 0; i < g->n; i++)
        if (g->nodes[i]->work.kind == W_KERNEL && !obj_ok(g->nodes[i]->work.func, T_FUNC))
            return E_INVALID_HANDLE;
    return OK;
}

/* Takes a copy: later changes of the graph do not touch it. Flags 1 and 8 change nothing here, 2
 * (upload) and 4 (launch from the device) are not supported. */
static CUresult instantiate(Exec **exec, Graph *graph, unsigned long long flags) {
    if (!exec || !obj_ok(graph, T_GRAPH)) return E_INVALID_VALUE;
    if (flags & ~9ull) return flags & ~15ull ? E_INVALID_VALUE : E_NOT_SUPPORTED;
    if (functions_ok(graph)) return E_INVALID_HANDLE;
    *exec = obj_new(T_EXEC, sizeof **exec);
    (*exec)->graph = graph_clone(graph);
    return OK;
}

API(CTX, 11040, cuGraphInstantiateWithFlags, (CUgraphExec *exec, CUgraph graph,
    unsigned long long flags), instantiate(exec, graph, flags))
SYMBOL(new_instantiate, "cuGraphInstantiate", 12000, cuGraphInstantiateWithFlags)

BODY(INIT, 10000, cuGraphExecDestroy, (CUgraphExec e), (e)) {
    if (!obj_ok(e, T_EXEC)) return E_INVALID_VALUE;
    run_until(e->last);
    op_hold(&e->last, NULL);
    e->obj.dead = true;
    return graph_free(e->graph);
}

/* The nodes become operations between two empty ones at the end of the stream. */
BODY(CTX, 10000, cuGraphLaunch, (CUgraphExec e, CUstream h), (e, h)) {
    Stream *s;
    CUresult r = get_stream(h, &s);
    if (r) return r;
    if (!obj_ok(e, T_EXEC)) return E_INVALID_VALUE;
    if (s->capture) return capture_break(s->capture, E_STREAM_CAPTURE_UNSUPPORTED);
    r = functions_ok(e->graph);
    if (!r) r = append(s, &(Work){ .ctx = s->ctx }, e->last);
    if (r) return r;
    int n = e->graph->n;
    Op **ends = zalloc((size_t)(n + 1) * sizeof *ends), *start = NULL;
    op_hold(&start, s->tail);
    ends[n] = start;
    for (int i = 0; i < n; i++) {
        Node *node = e->graph->nodes[i];
        Op **deps = zalloc((size_t)(node->n_deps + 1) * sizeof *deps);
        for (int k = 0; k < node->n_deps; k++) deps[k] = node->deps[k]->op;
        deps[node->n_deps] = start;
        Work w = work_clone(&node->work);
        op_hold(&node->op, op_new(&w, deps, node->n_deps + 1, self.clock, stream_order(s)));
        ends[i] = node->op;
        free(deps);
    }
    stream_tail(s, op_new(&(Work){ .ctx = s->ctx }, ends, n + 1, self.clock, stream_order(s)));
    op_hold(&e->last, s->tail);
    for (int i = 0; i < n; i++) op_hold(&e->graph->nodes[i]->op, NULL);
    op_hold(&start, NULL);
    free(ends);
    return OK;
}
