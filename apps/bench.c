// dsv4 bench and dsv4 ppl: how fast a model is on this machine, and how well it predicts a text.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Decodes `steps` tokens from position `at` on, one by one in PARTS; between them the machine's read bandwidth
// is measured (pool NULL: not). Returns the median rate of the parts in tokens per second. *share: the median
// of what each part reads (`touched` bytes a token) over the better of the reads right before and after it:
// the bandwidth of a shared machine may change within seconds.
static double decode_rate(Session *s, int at, int steps, const ModelBrief *b, Pool *pool, double *share) {
    enum { PARTS = 5 };
    double rate[PARTS], shares[PARTS], before = pool ? read_bandwidth(pool) : 0;
    for (int i = 0; i < PARTS; i++) {
        int n = steps * (i + 1) / PARTS - steps * i / PARTS;
        double t = 1e-9;
        for (int k = 0; k < n; k++) t += feed_time(s, at++, 1, b->vocab);
        double after = pool ? read_bandwidth(pool) : 0;
        rate[i] = n / t;
        shares[i] = rate[i] * b->touched / fmax(before, after);
        before = after;
    }
    qsort(rate, PARTS, sizeof *rate, by_size);
    qsort(shares, PARTS, sizeof *shares, by_size);
    *share = shares[PARTS / 2];
    return rate[PARTS / 2];
}

// Prefill and decode at growing depths. Each depth up to 512 is read from an empty session, up to 2048 on
// from the one before. Beyond, on the CPU, only the last (about) 512 positions are read and what lies
// before them is made up: a million positions would take hours to read, and the rates depend on the
// number of rows alone.
int run_bench(void) {
    int steps = opt.tokens > 0 ? opt.tokens : 40;
    double bandwidth = 0, share;
    Model *m = model_read(&opt.open);
    model_start(m, &opt.open);
    ModelBrief b = model_brief(m);
    Session *s = session_new(m);
    Pool *pool = b.cpu ? pool_new(opt.open.threads) : NULL;
    for (int i = 0; i < 5 && b.cpu; i++) bandwidth = fmax(bandwidth, read_bandwidth(pool));
    if (b.cpu) bench_products(m, pool, bandwidth);
    printf("%.3f GB of weights read per token\n", b.touched / 1e9);
    printf("   depth   prefill tok/s   decode tok/s   decode GB/s%s\n", b.cpu ? "   of the bandwidth" : "");
    feed_time(s, 0, 1, b.vocab);
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
        double t_read = feed_time(s, at, depth - at, b.vocab);
        double rate = decode_rate(s, depth, steps, &b, pool, &share);
        printf("%8d %15.1f %14.2f %13.2f", depth, (depth - at) / t_read, rate, b.touched * rate / 1e9);
        if (b.cpu) printf(" %17.0f %%", 100 * share);
        printf("\n");
        fflush(stdout);
        at = depth + steps;
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
    NllSum sum = { .tokens = tokens, .vocab = b.vocab };
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
