// dsv4 bench and dsv4 ppl: how fast a model is on this machine, and how well it predicts a text.
#define _GNU_SOURCE
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "dsv4.h"

// Reads n made-up tokens from position `at` on; the time it took.
static double feed_time(Session *s, int at, int n, int vocab) {
    int *tokens = xalloc((size_t)n, sizeof *tokens);
    for (int i = 0; i < n; i++) tokens[i] = (int)((at + i) * 7919LL % vocab);
    double start = now();
    session_feed(s, tokens, n, &(Feed){ 0 });
    free(tokens);
    return now() - start;
}

typedef struct { const uint64_t *p; _Atomic uint64_t sum; } ReadTest;
enum { READ_PIECE = 1 << 20 };

static void read_range(void *arg, int begin, int end) {
    ReadTest *r = arg;
    uint64_t s[8] = { 0 };
    const uint64_t *p = r->p + (size_t)begin * (READ_PIECE / 8);
    for (size_t n = (size_t)(end - begin) * (READ_PIECE / 8), i = 0; i < n; i += 8)
        for (int l = 0; l < 8; l++) s[l] ^= p[i + (size_t)l];
    for (int l = 1; l < 8; l++) s[0] ^= s[l];
    atomic_fetch_xor(&r->sum, s[0]);
}

// Bytes per second of one sequential read of 2 GiB by all threads. 0 if there is no memory for it.
double read_bandwidth(Pool *p) {
    enum { PIECES = 2048 };
    static ReadTest r;              // the memory stays: it is filled once
    if (!r.p) {
        void *m = mmap(NULL, (size_t)PIECES * READ_PIECE, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (m == MAP_FAILED) return 0;
        madvise(m, (size_t)PIECES * READ_PIECE, MADV_HUGEPAGE);
        r.p = memset(m, 1, (size_t)PIECES * READ_PIECE);
    }
    double start = now();
    parallel(p, PIECES, 16, read_range, &r);
    return (double)PIECES * READ_PIECE / (now() - start);
}

// A rate is measured in parts, with the machine's read bandwidth right before and after each: on a
// shared machine it changes within seconds.
enum { PARTS = 5 };
typedef struct {
    Pool *pool;                     // NULL: no bandwidth
    double before;                  // the last read, bytes per second
    double rate[PARTS];             // bytes per second of the parts
    double share[PARTS];            // their shares of the better of the two reads
    int n;
} Parts;

static Parts parts_begin(Pool *pool) {
    return (Parts){ .pool = pool, .before = pool ? read_bandwidth(pool) : 0 };
}

static void parts_add(Parts *p, double bytes, double seconds) {
    double after = p->pool ? read_bandwidth(p->pool) : 0;
    p->rate[p->n] = bytes / seconds;
    p->share[p->n] = p->rate[p->n] / fmax(p->before, after);
    p->before = after;
    p->n++;
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *x) {   // [PARTS]
    qsort(x, PARTS, sizeof *x, by_size);
    return x[PARTS / 2];
}

// GB/s of n matrices of one shape at one row, `together` side by side.
static void report_product(const Model *m, Pool *pool, const MatBrief *list, int n, int together) {
    const Mat **mats = xalloc((size_t)n, sizeof *mats);
    double bytes = 0;
    n -= n % together;
    for (int i = 0; i < n; i++) {
        mats[i] = list[i].mat;
        bytes += (double)list[i].bytes;
    }
    Parts p = parts_begin(pool);
    while (n && p.n < PARTS) {
        double t = 0;
        for (int i = 0; i < n; i += together)
            t += product_time(m, pool, mats + i, together);
        parts_add(&p, bytes, t);
    }
    if (n)
        printf("  %-30s %-18s %6d x %-6d %8.1f GB/s  %3.0f %%\n", list->name, list->format, list->n,
               list->k, median(p.rate) / 1e9, 100 * median(p.share));
    free(mats);
}

// Every kind of matrix product; of one kind the matrices that have the first one's format and rows.
static void report_products(const Model *m, Pool *pool) {
    const Config *c = model_brief(m).config;
    MatBrief *list = xalloc((size_t)c->n_layers * (size_t)c->n_experts, sizeof *list), head;
    double bandwidth = 0;
    for (int i = 0; i < PARTS; i++) bandwidth = fmax(bandwidth, read_bandwidth(pool));
    printf("cpu %s, %d threads, read bandwidth %.1f GB/s\n", cpu_instructions(), pool_threads(pool),
           bandwidth / 1e9);
    printf("products of one row%19sformat%13srows x columns%8srate  of read bandwidth\n", "", "",
           "");
    for (int kind = 0; layer_matrix(m, 0, kind, 0).name; kind++) {
        int n = 0;
        for (int i = 0; i < c->n_layers; i++) {
            MatBrief b = layer_matrix(m, i, kind, 0);
            for (int e = 0; b.mat && e < b.many; e++) {
                b = layer_matrix(m, i, kind, e);
                if (!n || (b.n == list->n && b.format == list->format)) list[n++] = b;
            }
        }
        if (n) report_product(m, pool, list, n, list->many > 1 ? c->n_active : 1);
    }
    head = head_matrix(m);
    report_product(m, pool, &head, 1, 1);
    free(list);
}

// Prefill and decode at growing depths. Each depth up to 512 is read from an empty session, up to
// 2048 on from the one before. Beyond, on the CPU, only the last (about) 512 positions are read and
// what lies before them is made up: a million positions would take hours to read, and the rates
// depend on the number of rows alone.
int run_bench(void) {
    int steps = opt.tokens > PARTS ? opt.tokens : opt.tokens > 0 ? PARTS : 40;
    Model *m = model_read(&opt.open);
    model_start(m, &opt.open);
    ModelBrief b = model_brief(m);
    Session *s = session_new(m);
    Pool *pool = b.cpu ? pool_new(opt.open.threads) : NULL;
    if (b.cpu) report_products(m, pool);
    printf("%.3f GB of weights read per token\n", b.touched / 1e9);
    printf("   depth   prefill tok/s   decode tok/s   decode GB/s%s\n",
           b.cpu ? "   of the bandwidth" : "");
    feed_time(s, 0, 1, b.config->vocab);
    for (int at = 1, depth = 128; depth + steps <= b.ctx; depth *= 2) {
        if (depth <= 512) {
            session_clear(s);
            at = 0;
        }
        if (depth <= at) continue;
        if (depth > 2048 && b.cpu) {
            at = depth - 512 + at % 128;
            session_stretch(s, at);
        }
        double t_read = feed_time(s, at, depth - at, b.config->vocab);
        double prefill = (depth - at) / t_read;
        Parts p = parts_begin(pool);
        for (at = depth; p.n < PARTS;) {
            int n = steps * (p.n + 1) / PARTS - steps * p.n / PARTS;
            double t = 1e-9;
            for (int k = 0; k < n; k++) t += feed_time(s, at++, 1, b.config->vocab);
            parts_add(&p, n * b.touched, t);
        }
        double rate = median(p.rate);
        printf("%8d %15.1f %14.2f %13.2f", depth, prefill, rate / b.touched, rate / 1e9);
        if (b.cpu) printf(" %17.0f %%", 100 * median(p.share));
        printf("\n");
        fflush(stdout);
    }
    pool_free(pool);
    session_free(s);
    return 0;
}

typedef struct { const int *tokens; double nll; int64_t n; int vocab; } NllSum;

// -log p of the token that follows each row, summed.
static void nll_sink(void *arg, int pos, int n, const float *logits, const float *mtp) {
    NllSum *s = arg;
    (void)mtp;
    for (int i = 0; i < n; i++) {
        const float *x = logits + (size_t)i * (size_t)s->vocab;
        double top = -INFINITY, sum = 0;
        for (int v = 0; v < s->vocab; v++) top = fmax(top, (double)x[v]);
        for (int v = 0; v < s->vocab; v++) sum += exp((double)x[v] - top);
        s->nll += top + log(sum) - (double)x[s->tokens[pos + i + 1]];
        s->n++;
    }
}

// Contexts of -c positions (default 2048), each begun with the begin-of-sentence token.
int run_ppl(const char *path) {
    Tokenizer *t = tokenizer_open(opt.open.dir, true);
    Str text = read_text(path);
    Ids ids = { 0 };
    tok_encode(t, str_span(&text), false, &ids);
    if (!ids.n) die(1, "%s: no text", path);
    Model *m = model_read(&opt.open);
    if (!check_vocab(m, &ids)) die(1, "%s: the text does not fit the model's vocabulary", path);
    model_start(m, &opt.open);
    ModelBrief b = model_brief(m);
    size_t ctx = opt.open.ctx || b.ctx < 2048 ? (size_t)b.ctx : 2048;
    int *tokens = xalloc(ctx + 1, sizeof *tokens);
    NllSum sum = { .tokens = tokens, .vocab = b.config->vocab };
    Session *s = session_new(m);
    tokens[0] = tokenizer_control(t).bos;
    for (size_t at = 0; at < ids.n; at += ctx) {
        size_t n = ids.n - at < ctx ? ids.n - at : ctx;
        memcpy(tokens + 1, ids.p + at, n * sizeof *tokens);
        session_clear(s);
        session_feed(s, tokens, (int)n, &(Feed){ .sink = nll_sink, .arg = &sum });
        progress("reading", (int64_t)(at + n), (int64_t)ids.n);
    }
    printf("perplexity %.4f, %.5f nats per token, %lld tokens in contexts of %zu\n",
           exp(sum.nll / (double)sum.n), sum.nll / (double)sum.n, (long long)sum.n, ctx);
    session_free(s);
    tokenizer_close(t);
    free(tokens), free(text.p), free(ids.p);
    return 0;
}
