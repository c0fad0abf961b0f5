/* graph.c: stream capture and graphs.
 *
 * A capturing stream does not run its work but adds it to a graph; an event recorded in it carries
 * the place in that graph to other streams, which so join the capture. What could not be put into
 * a graph is an error that spoils the whole capture, as on a real driver. */
#include "api.h"

static Capture *captures; /* all, ended ones included */

/* ------------------------------------------------------------------------------------------------
 * graphs */

static Graph *graph_new(void) {
    return obj_new(T_GRAPH, sizeof(Graph));
}

/* A node after `deps`; takes work->owned. */
static Node *graph_add(Graph *g, const Work *work, Node **deps, int n_deps) {
    if (g->n == g->cap) {
        g->cap = g->cap ? 2 * g->cap : 16;
        g->nodes = realloc(g->nodes, (size_t)g->cap * sizeof *g->nodes);
        if (!g->nodes) abort();
    }
    Node *n = zalloc(sizeof *n);
    n->work = *work;
    n->graph = g;
    n->index = g->n;
    n->deps = zalloc((size_t)n_deps * sizeof *deps);
    for (int i = 0; i < n_deps; i++) n->deps[i] = deps[i];
    n->n_deps = n_deps;
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
static void graph_free(Graph *g) {
    g->obj.dead = true;
    for (int i = 0; i < g->n; i++) work_free(&g->nodes[i]->work);
}

EXPORT CUresult cuGraphCreate(CUgraph *graph, unsigned flags) {
    CUresult r = enter(__func__, INIT);
    if (!r && (!graph || flags)) r = E_INVALID_VALUE;
    if (!r) *graph = graph_new();
    return leave(r);
}

EXPORT CUresult cuGraphDestroy(CUgraph graph) {
    CUresult r = enter(__func__, INIT);
    if (!r && !obj_ok(graph, T_GRAPH)) r = E_INVALID_VALUE;
    if (!r) graph_free(graph);
    return leave(r);
}

/* Fills up to *n entries, or tells how many there are. */
EXPORT CUresult cuGraphGetNodes(CUgraph graph, CUgraphNode *nodes, size_t *n) {
    CUresult r = enter(__func__, INIT);
    if (!r && (!obj_ok(graph, T_GRAPH) || !n)) r = E_INVALID_VALUE;
    if (!r) {
        for (size_t i = 0; nodes && i < *n; i++)
            nodes[i] = i < (size_t)graph->n ? graph->nodes[i] : NULL;
        if (!nodes || *n > (size_t)graph->n) *n = (size_t)graph->n;
    }
    return leave(r);
}

static CUresult kernel_work(const CUDA_KERNEL_NODE_PARAMS_v2 *p, Work *w) {
    if (!p) return E_INVALID_VALUE;
    unsigned grid[3] = { p->gridDimX, p->gridDimY, p->gridDimZ };
    unsigned block[3] = { p->blockDimX, p->blockDimY, p->blockDimZ };
    return make_kernel_work(p->func, grid, block, p->sharedMemBytes, p->kernelParams, p->extra, w);
}

/* Dependencies are nodes of the same graph, so the list stays in an order that can run. */
EXPORT CUresult cuGraphAddKernelNode_v2(CUgraphNode *node, CUgraph graph, const CUgraphNode *deps,
                                        size_t n_deps, const CUDA_KERNEL_NODE_PARAMS_v2 *params) {
    Work w;
    CUresult r = enter(__func__, CTX);
    if (!r && (!node || !obj_ok(graph, T_GRAPH) || (n_deps && !deps))) r = E_INVALID_VALUE;
    for (size_t i = 0; !r && i < n_deps; i++)
        if (!deps[i] || deps[i]->graph != graph) r = E_INVALID_VALUE;
    if (!r) r = kernel_work(params, &w);
    if (!r) *node = graph_add(graph, &w, (Node **)deps, (int)n_deps);
    return leave(r);
}

/* ------------------------------------------------------------------------------------------------
 * executable graphs */

/* Takes a copy: later changes of the graph do not touch it. Flags 1 and 8 change nothing here, 2
 * (upload) and 4 (launch from the device) are not supported. */
static CUresult instantiate(CUgraphExec *exec, CUgraph graph, unsigned long long flags) {
    if (!exec || !obj_ok(graph, T_GRAPH)) return E_INVALID_VALUE;
    if (flags & ~9ull) return flags & ~15ull ? E_INVALID_VALUE : E_NOT_SUPPORTED;
    for (int i = 0; i < graph->n; i++)
        if (graph->nodes[i]->work.kind == W_KERNEL && !obj_ok(graph->nodes[i]->work.func, T_FUNC))
            return E_INVALID_HANDLE;
    Exec *e = obj_new(T_EXEC, sizeof *e);
    e->graph = graph_clone(graph);
    *exec = e;
    return OK;
}

API(CTX, cuGraphInstantiateWithFlags, (CUgraphExec *exec, CUgraph graph, unsigned long long flags),
    instantiate(exec, graph, flags))

EXPORT CUresult cuGraphInstantiate_v2(CUgraphExec *exec, CUgraph graph, CUgraphNode *error_node,
                                      char *log, size_t log_size) {
    CUresult r = enter(__func__, CTX);
    if (log && log_size) *log = 0;
    if (error_node) *error_node = NULL;
    return leave(r ? r : instantiate(exec, graph, 0));
}

EXPORT CUresult cuGraphExecDestroy(CUgraphExec exec) {
    CUresult r = enter(__func__, INIT);
    if (!r && !obj_ok(exec, T_EXEC)) r = E_INVALID_VALUE;
    if (!r) {
        run_until(exec->last);
        op_hold(&exec->last, NULL);
        graph_free(exec->graph);
        exec->obj.dead = true;
    }
    return leave(r);
}

/* The nodes become operations between two empty ones at the end of the stream. */
static CUresult launch(Exec *e, CUstream h) {
    Stream *s;
    CUresult r = get_stream(h, &s);
    if (r) return r;
    if (!obj_ok(e, T_EXEC)) return E_INVALID_VALUE;
    if (s->capture) return capture_break(s->capture, E_CAPTURE_UNSUPPORTED);
    for (int i = 0; i < e->graph->n; i++) {
        Work *w = &e->graph->nodes[i]->work;
        if (w->kind == W_KERNEL && !obj_ok(w->func, T_FUNC)) return E_INVALID_HANDLE;
    }
    r = append(s, &(Work){ .ctx = s->ctx }, e->last);
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

API(CTX, cuGraphLaunch, (CUgraphExec exec, CUstream stream), launch(exec, stream))

EXPORT CUresult cuGraphUpload(CUgraphExec exec, CUstream stream) {
    Stream *s;
    CUresult r = enter(__func__, CTX);
    if (!r && !obj_ok(exec, T_EXEC)) r = E_INVALID_VALUE;
    if (!r) r = get_stream(stream, &s);
    return leave(r);
}

/* Results: 0 done, 2 topology, 3 node type, 5 parameters differ in a way that cannot be updated. */
static int compare(const Node *a, const Node *b) {
    if (a->n_deps != b->n_deps) return 2;
    for (int i = 0; i < a->n_deps; i++)
        if (a->deps[i]->index != b->deps[i]->index) return 2;
    const Work *v = &a->work, *w = &b->work;
    if (v->kind != w->kind) return 3;
    return v->ctx != w->ctx || v->dst_dev != w->dst_dev || v->src_dev != w->src_dev ? 5 : 0;
}

/* Replaces all parameters by those of a graph of the same shape. */
static CUresult update(Exec *e, Graph *g, int *result, Node **where) {
    *where = NULL;
    *result = 1;
    if (!obj_ok(e, T_EXEC) || !obj_ok(g, T_GRAPH)) return E_INVALID_VALUE;
    *result = e->graph->n != g->n ? 2 : 0;
    for (int i = 0; !*result && i < g->n; i++) {
        *result = compare(e->graph->nodes[i], g->nodes[i]);
        if (*result) *where = g->nodes[i];
    }
    if (*result) return E_GRAPH_EXEC_UPDATE_FAILURE;
    for (int i = 0; i < g->n; i++) {
        work_free(&e->graph->nodes[i]->work);
        e->graph->nodes[i]->work = work_clone(&g->nodes[i]->work);
    }
    return OK;
}

EXPORT CUresult cuGraphExecUpdate_v2(CUgraphExec exec, CUgraph graph,
                                     CUgraphExecUpdateResultInfo *info) {
    int result;
    Node *where;
    CUresult r = enter(__func__, CTX);
    if (!r && !info) r = E_INVALID_VALUE;
    if (!r) {
        r = update(exec, graph, &result, &where);
        *info = (CUgraphExecUpdateResultInfo){ .result = result, .errorNode = where };
    }
    return leave(r);
}

/* `node` is the node of the graph that the executable graph was made from. */
EXPORT CUresult cuGraphExecKernelNodeSetParams_v2(CUgraphExec exec, CUgraphNode node,
                                                  const CUDA_KERNEL_NODE_PARAMS_v2 *params) {
    Work w;
    CUresult r = enter(__func__, CTX);
    if (!r && (!obj_ok(exec, T_EXEC) || !node || node->index >= exec->graph->n))
        r = E_INVALID_VALUE;
    Work *old = r ? NULL : &exec->graph->nodes[node->index]->work;
    if (!r && old->kind != W_KERNEL) r = E_INVALID_VALUE;
    if (!r) r = kernel_work(params, &w);
    if (!r && w.ctx != old->ctx) {
        work_free(&w);
        r = E_INVALID_VALUE;
    } else if (!r) {
        work_free(old);
        *old = w;
    }
    return leave(r);
}

/* ------------------------------------------------------------------------------------------------
 * capture */

/* Spoils a capture and passes the reason on. */
CUresult capture_break(Capture *c, CUresult why) {
    bool was = c->broken;
    c->broken = true;
    return was ? E_CAPTURE_INVALIDATED : why;
}

/* Calls that may wait for the device or change its memory map are not allowed while the calling
 * thread captures (modes global and thread local), or any thread does (mode global). */
CUresult capture_allows(int needs) {
    CUresult r = OK;
    (void)needs;
    for (Capture *c = captures; c; c = c->next) {
        bool mine = pthread_equal(c->thread, pthread_self());
        if (c->ended || c->mode == 2 || (c->mode == 1 && !mine)) continue;
        r = capture_break(c, E_CAPTURE_UNSUPPORTED);
    }
    return r;
}

/* *front = the union of itself and `more`. */
static void join_front(Node ***front, int *n, Node **more, int n_more) {
    Node **all = zalloc((size_t)(*n + n_more) * sizeof *all);
    int k = 0;
    for (int i = 0; i < *n; i++) all[k++] = (*front)[i];
    for (int i = 0; i < n_more; i++) {
        int j = 0;
        while (j < k && all[j] != more[i]) j++;
        if (j == k) all[k++] = more[i];
    }
    free(*front);
    *front = all;
    *n = k;
}

static void set_front(Node ***front, int *n, Node **nodes, int n_nodes) {
    *n = 0;
    join_front(front, n, nodes, n_nodes);
}

/* Instead of running: a node after everything the stream did in this capture. */
CUresult capture_add(Stream *s, Work *work) {
    if (s->capture->broken) {
        work_free(work);
        return E_CAPTURE_INVALIDATED;
    }
    Node *n = graph_add(s->capture->graph, work, s->front, s->n_front);
    set_front(&s->front, &s->n_front, &n, 1);
    return OK;
}

/* The event stands for the stream's place in the graph, and no longer for any real record. */
CUresult capture_record(Event *e, Stream *s) {
    if (s->capture->broken) return E_CAPTURE_INVALIDATED;
    e->capture = s->capture;
    op_hold(&e->op, NULL);
    set_front(&e->front, &e->n_front, s->front, s->n_front);
    return OK;
}

/* The stream joins the event's capture, or goes on in it after both places. Waiting for work outside
 * the capture or in another one spoils it; so does making the legacy stream wait. */
CUresult capture_wait(Stream *s, Event *e) {
    Capture *of_event = e->capture && !e->capture->ended ? e->capture : NULL;
    if (s->capture && s->capture->broken) return E_CAPTURE_INVALIDATED;
    if (!of_event) return e->op || e->capture ? capture_break(s->capture, E_CAPTURE_ISOLATION) : OK;
    if (of_event->broken) return E_CAPTURE_INVALIDATED;
    if (s == s->ctx->legacy) return capture_break(of_event, E_CAPTURE_IMPLICIT);
    if (s->capture && s->capture != of_event) {
        capture_break(of_event, E_CAPTURE_MERGE);
        return capture_break(s->capture, E_CAPTURE_MERGE);
    }
    if (!s->capture) {
        s->capture = of_event;
        s->n_front = 0;
    }
    join_front(&s->front, &s->n_front, e->front, e->n_front);
    return OK;
}

/* Modes: 0 global, 1 thread local, 2 relaxed: see capture_allows(). */
static CUresult begin(CUstream h, int mode) {
    Stream *s;
    CUresult r = get_stream(h, &s);
    if (r) return r;
    if (mode < 0 || mode > 2) return E_INVALID_VALUE;
    if (s == s->ctx->legacy) return E_CAPTURE_UNSUPPORTED;
    if (s->capture) return E_ILLEGAL_STATE;
    Capture *c = zalloc(sizeof *c);
    *c = (Capture){ graph_new(), s, mode, pthread_self(), false, false, captures };
    captures = c;
    s->capture = c;
    s->n_front = 0;
    return OK;
}

API(CTX, cuStreamBeginCapture_v2, (CUstream stream, CUstreamCaptureMode mode),
    begin(stream, (int)mode))

static void mark_back(Node *n, bool *seen) {
    if (seen[n->index]) return;
    seen[n->index] = true;
    for (int i = 0; i < n->n_deps; i++) mark_back(n->deps[i], seen);
}

/* Has every stream that joined been joined back to the first one? */
static bool joined(const Capture *c) {
    bool *seen = zalloc((size_t)c->graph->n * sizeof *seen), good = true;
    for (int i = 0; i < c->origin->n_front; i++) mark_back(c->origin->front[i], seen);
    for (int d = 0; d < config.devices; d++) {
        Stream *s = device_ctx(d) ? device_ctx(d)->streams : NULL;
        for (; s; s = s->next)
            for (int i = 0; s->capture == c && i < s->n_front; i++)
                if (!seen[s->front[i]->index]) good = false;
    }
    free(seen);
    return good;
}

/* Ends the capture even if it was spoilt; then there is no graph. */
static CUresult end(CUstream h, CUgraph *graph) {
    Stream *s;
    CUresult r = get_stream(h, &s);
    if (r) return r;
    if (!graph) return E_INVALID_VALUE;
    Capture *c = s->capture;
    if (!c) return E_ILLEGAL_STATE;
    if (s != c->origin) return capture_break(c, E_CAPTURE_UNMATCHED);
    if (c->mode != 2 && !pthread_equal(c->thread, pthread_self())) return E_CAPTURE_WRONG_THREAD;
    r = c->broken ? E_CAPTURE_INVALIDATED : joined(c) ? OK : E_CAPTURE_UNJOINED;
    c->ended = true;
    for (int d = 0; d < config.devices; d++)
        for (s = device_ctx(d) ? device_ctx(d)->streams : NULL; s; s = s->next)
            if (s->capture == c) s->capture = NULL;
    *graph = r ? NULL : c->graph;
    if (r) graph_free(c->graph);
    return r;
}

API(CTX, cuStreamEndCapture, (CUstream stream, CUgraph *graph), end(stream, graph))

EXPORT CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    Stream *s;
    CUresult r = enter(__func__, CTX);
    if (!r && !status) r = E_INVALID_VALUE;
    if (!r) r = get_stream(stream, &s);
    for (Stream *t = r || s != s->ctx->legacy ? NULL : s->ctx->streams; t; t = t->next)
        if (t->capture && !(t->flags & 1)) r = E_CAPTURE_IMPLICIT;
    if (!r) *status = !s->capture ? 0 : s->capture->broken ? 2 : 1;
    return leave(r);
}
