/* graph.c: stream capture and graphs.
 *
 * A capturing stream does not run its work but adds it to a graph; an event recorded in it carries
 * the place in that graph to other streams, which so join the capture. What could not be put into
 * a graph is an error that spoils the whole capture, as on a real driver. */
#include "api.h"

static Capture *captures; /* all, ended ones included */

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
CUresult capture_add(Stream *s, Work *work) {
    if (s->capture->broken) {
        work_free(work);
        return E_STREAM_CAPTURE_INVALIDATED;
    }
    Node *n = graph_add(s->capture->graph, work, s->front.nodes, s->front.n);
    set_front(&s->front, &(Front){ &n, 1 });
    return OK;
}

/* The event stands for the stream's place in the graph, and no longer for any real record. */
CUresult capture_record(Event *e, Stream *s) {
    if (s->capture->broken) return E_STREAM_CAPTURE_INVALIDATED;
    e->capture = s->capture;
    op_hold(&e->op, NULL);
    set_front(&e->front, &s->front);
    return OK;
}

/* The stream joins the event's capture, or goes on in it after both places. Waiting for work
 * outside the capture or in another one spoils it; so does making the legacy stream wait. */
CUresult capture_wait(Stream *s, Event *e) {
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

/* 0 no capture, 1 active, 2 spoilt. The legacy stream may not be asked meanwhile. */
BODY(CTX, 10000, cuStreamIsCapturing, (CUstream h, CUstreamCaptureStatus *status), (h, status)) {
    Stream *s;
    CUresult r = get_stream(h, &s);
    if (r) return r;
    for (Stream *t = s == s->ctx->legacy ? s->ctx->streams : NULL; t; t = t->next)
        if (t->capture && !(t->flags & 1)) return E_STREAM_CAPTURE_IMPLICIT;
    return GIVE(status, !s->capture ? 0 : s->capture->broken ? 2 : 1);
}
