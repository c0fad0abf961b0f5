// Sessions: rows of several sessions in one batch, rewinding, snapshots, stages; top-k against sorting. Everything must agree bit for bit
// with one session that reads the prompt from the start.
#define DSV4_NO_MAIN
#include "../dsv4.c"

#include "check.h"

static int *prompt(const Config *c, int n, int seed) {
    int *t = xalloc((size_t)n, sizeof *t);
    uint32_t x = (uint32_t)seed * 2654435761u + 1;
    for (int i = 0; i < n; i++) {
        x = x * 1664525u + 1013904223u;
        t[i] = (int)(x >> 8) % c->vocab;
    }
    return t;
}

typedef struct { float *at; int vocab; } Kept;

static void keep(void *arg, int pos, int n, const float *logits, const float *mtp) {
    Kept *r = arg;
    (void)mtp;
    memcpy(r->at + (size_t)pos * r->vocab, logits, sizeof(float) * (size_t)n * r->vocab);
}

// Reads tokens [from, to) and keeps all logits by position.
static void read_into(Session *s, const int *tokens, int from, int to, float *logits) {
    Kept r = { logits, s->m->c.vocab };
    session_feed(s, tokens + from, to - from, &(Feed){ .sink = keep, .arg = &r });
}

static bool same(const float *a, const float *b, int from, int to, int vocab) {
    return !memcmp(a + (size_t)from * vocab, b + (size_t)from * vocab, sizeof(float) * (size_t)(to - from) * vocab);
}

// Batches made of rows of three sessions at different positions, against each session alone.
static void test_company(Model *m) {
    enum { N = 3, T = 60 };
    int V = m->c.vocab, *tokens[N], at[N] = { 0 };
    float *alone[N], *mixed[N], *out = xalloc((size_t)64 * V, sizeof *out);
    float *X = xalloc((size_t)64 * m->c.hc_mult * m->c.dim, sizeof *X);
    Session *s[N];
    for (int i = 0; i < N; i++) {
        tokens[i] = prompt(&m->c, T, i);
        alone[i] = xalloc((size_t)T * V, sizeof(float));
        mixed[i] = xalloc((size_t)T * V, sizeof(float));
        Session *one = session_new(m);
        read_into(one, tokens[i], 0, T, alone[i]);
        session_free(one);
    }
    for (int i = 0; i < N; i++) s[i] = session_new(m);
    for (int step = 0; at[0] < T || at[1] < T || at[2] < T; step++) {
        Row rows[64];
        int want[64], owner[64], n = 0;
        for (int i = 0; i < N; i++)
            for (int k = 0; k < (step * 7 + i * 5) % 11 && at[i] < T; k++, n++) {
                rows[n] = (Row){ tokens[i][at[i]], s[i]->slot, at[i], -1 };
                want[n] = n;
                owner[n] = i;
                at[i]++;
            }
        Batch b = { .rows = rows, .T = n, .want = want, .n_want = n, .logits = out, .X = X };
        if (!n) continue;
        forward_begin(m, &b);
        forward_end(m, &b);
        for (int r = 0; r < n; r++)
            memcpy(mixed[owner[r]] + (size_t)rows[r].pos * V, out + (size_t)r * V, sizeof(float) * V);
    }
    for (int i = 0; i < N; i++) check(same(alone[i], mixed[i], 0, T, V), "a session in company gives what it gives alone");
    for (int i = 0; i < N; i++) session_free(s[i]), free(tokens[i]), free(alone[i]), free(mixed[i]);
    free(out), free(X);
}

// Rewinds from every 7th position back by several distances, after reading other tokens there.
static void test_rewind(Model *m) {
    int V = m->c.vocab, T = 120, *tokens = prompt(&m->c, T, 9), *other = prompt(&m->c, T, 10);
    float *ref = xalloc((size_t)T * V, sizeof *ref), *got = xalloc((size_t)T * V, sizeof *got);
    Session *s = session_new(m);
    read_into(s, tokens, 0, T, ref);
    for (int at = 1; at < T; at += 13)
        for (int back = 1; back <= 40; back = back * 3 + 1) {
            int to = at > back ? at - back : 0;
            session_clear(s);
            read_into(s, tokens, 0, to, got);
            read_into(s, other, to, at, got);
            check(session_rewind(s, to), "a few tokens can be rewound");
            read_into(s, tokens, to, at, got);
            check(same(ref, got, 0, at, V), "after a rewind the logits are the same");
        }
    session_free(s);
    free(tokens), free(other), free(ref), free(got);
}

// A snapshot, a long way on another path, and back.
static void test_snapshot(Model *m) {
    int V = m->c.vocab, T = 300, *tokens = prompt(&m->c, T, 3), *other = prompt(&m->c, 700, 4);
    float *ref = xalloc((size_t)T * V, sizeof *ref), *got = xalloc((size_t)700 * V, sizeof *got);
    Session *s = session_new(m), *scratch = session_new(m);
    read_into(s, tokens, 0, T, ref);
    for (int at = 1; at < T; at += 57) {
        session_clear(s);
        read_into(s, tokens, 0, at, got);
        Snapshot *snap = session_snapshot(s);
        int far = 300;
        read_into(s, other, at, at + far, got);
        check(!session_rewind(s, at), "what the rings no longer hold cannot be rewound to");
        session_restore(s, snap);
        check(s->n == at, "a snapshot brings its position back");
        read_into(s, tokens, at, T, got);
        check(same(ref, got, at, T, V), "after a restore the logits are the same");
        snapshot_free(snap);
    }
    session_free(s), session_free(scratch);
    free(tokens), free(other), free(ref), free(got);
}

static int by_score(const void *a, const void *b) {
    const float *const *x = a, *const *y = b;
    return **x < **y ? 1 : **x > **y ? -1 : *x < *y ? -1 : *x > *y;
}

static void test_top_k(void) {
    static const int sizes[] = { 1, 2, 511, 512, 513, 2000, 8191, 8192, 8193, 40000 };
    for (size_t i = 0; i < COUNT(sizes); i++)
        for (int kind = 0; kind < 4; kind++) {
            int n = sizes[i], k = n < 3 ? n : kind == 3 ? n - 1 : 1 + n / 5;
            float *score = xalloc((size_t)n, sizeof *score);
            const float **sorted = xalloc((size_t)n, sizeof *sorted);
            int *top = xalloc((size_t)k, sizeof *top), *want = xalloc((size_t)n, sizeof *want);
            for (int j = 0; j < n; j++) {
                uint32_t x = (uint32_t)j * 2654435761u ^ (uint32_t)kind * 40503u;
                score[j] = kind == 0 ? (float)(x >> 8) / 65536 - 100 : kind == 1 ? (float)(x >> 29) - 3 : kind == 2 ? 0 : -(float)(x >> 27);
                sorted[j] = score + j;
            }
            top_k(score, n, k, top);
            qsort(sorted, (size_t)n, sizeof *sorted, by_score);
            for (int j = 0; j < k; j++) want[sorted[j] - score]++;
            bool ok = true;
            for (int j = 0; j < k; j++) ok &= top[j] >= 0 && top[j] < n && want[top[j]]-- == 1 && (!j || top[j] > top[j - 1]);
            check(ok, "top-k equals a sort, ties to the lowest index");
            free(score), free(sorted), free(top), free(want);
        }
}

static void test_sinkhorn(void) {
    for (int S = 1; S <= 8; S++) {
        float C[64];
        for (int i = 0; i < S * S; i++) C[i] = sinf((float)(i * 37 + S)) * 3;
        sinkhorn(C, S, 20, 1e-6f);
        for (int j = 0; j < S; j++) {
            float row = 0, column = 0;
            for (int k = 0; k < S; k++) row += C[j * S + k], column += C[k * S + j];
            check(fabsf(row - 1) < 2e-3f && fabsf(column - 1) < 1e-5f, "sinkhorn: rows and columns sum to 1");
        }
    }
}

int main(void) {
    const char *dirs[] = { "tests/golden/edge/int", "tests/golden/aligned/native" };
    const char *three = node_cores(0) ? "cpu,cpu:0,cpu" : "cpu,cpu,cpu";
    cpu_init();
    test_top_k();
    test_sinkhorn();
    for (int i = 0; i < 2; i++)
        for (int stages = 1; stages <= 3; stages += 2) {
            Opening o = { .dir = dirs[i], .threads = 2, .chunk = 64, .ctx = 2048,
                          .devices = stages == 1 ? "cpu" : three };
            Model *m = model_read(&o);
            model_start(m, &o);
            test_company(m);
            test_rewind(m);
            test_snapshot(m);
        }
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
