// dsv4 verify: reads every byte of a checkpoint and says what is damaged.
#include <dirent.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "dsv4.h"

enum { VERIFY_PIECE = 4 << 20, VERIFY_LINES = 20 };

typedef struct { const Tensor *t; size_t from, n; } VerifyPiece;    // elements

typedef struct {
    const VerifyPiece *pieces;
    int n_experts;
    pthread_mutex_t lock;
    const Tensor *tensors;
    int64_t *first, *count;     // per tensor: first bad element, how many; under lock
} Verify;

// How many of n elements of `size` bytes have all bits of mask set (the exponent: not finite), and
// which is the first.
static size_t bad_values(const uint8_t *p, size_t n, size_t size, uint64_t mask, size_t *first) {
    size_t bad = 0;
    uint32_t m4 = (uint32_t)mask, x4;
    uint16_t m2 = (uint16_t)mask, x2;
    uint8_t m1 = (uint8_t)mask;
    for (size_t i = 0; size == 1 && i < n; i++) bad += (p[i] & m1) == m1;
    for (size_t i = 0; size == 2 && i < n; i++) bad += (memcpy(&x2, p + 2 * i, 2), (x2 & m2) == m2);
    for (size_t i = 0; size == 4 && i < n; i++) bad += (memcpy(&x4, p + 4 * i, 4), (x4 & m4) == m4);
    for (size_t i = n; (bad || size == 8) && i-- > 0;) {
        uint64_t x = 0;
        memcpy(&x, p + i * size, size);
        if ((x & mask) != mask) continue;
        *first = i;
        bad += size == 8;
    }
    return bad;
}

// Bytes without a rule are read all the same, one of every page: a disk error must show here.
static size_t bad_none(const uint8_t *p, size_t n, size_t *first) {
    volatile uint8_t sink = 0;
    for (size_t i = 0; i < n; i += 4096) sink = p[i];
    (void)sink;
    *first = 0;
    return 0;
}

// Expert numbers of a hash table that do not exist.
static size_t bad_expert(const uint8_t *p, size_t n, size_t *first, int n_experts) {
    size_t bad = 0;
    for (size_t i = n; i-- > 0;) {
        int64_t x;
        memcpy(&x, p + 8 * i, 8);
        if (x >= 0 && x < n_experts) continue;
        *first = i;
        bad++;
    }
    return bad;
}

static bool is_table(const Tensor *t) {
    static const char end[] = ".gate.tid2eid";
    size_t n = sizeof end - 1;
    return t->dtype == DT_I64 && t->name.n > n && !memcmp(t->name.p + t->name.n - n, end, n);
}

static size_t element_bytes(const Tensor *t) {
    if (t->dtype == DT_C64) return 4;
    return dtypes[t->dtype].bits < 8 ? 1 : (size_t)dtypes[t->dtype].bits / 8;
}

static void verify_pieces(void *arg, int begin, int end) {
    static const uint64_t infinite[N_DTYPES] = {        // the bits that only NaN and Inf have
        [DT_F64] = 0x7ff0000000000000, [DT_F32] = 0x7f800000, [DT_C64] = 0x7f800000,
        [DT_BF16] = 0x7f80, [DT_F16] = 0x7c00, [DT_F8_E5M2] = 0x7c, [DT_F8_E4M3] = 0x7f,
        [DT_F8_E8M0] = 0xff,
    };
    Verify *v = arg;
    for (int i = begin; i < end; i++) {
        const VerifyPiece *p = &v->pieces[i];
        size_t size = element_bytes(p->t), first = 0, bad;
        const uint8_t *data = p->t->data + p->from * size;
        uint64_t mask = infinite[p->t->dtype];
        if (is_table(p->t)) bad = bad_expert(data, p->n, &first, v->n_experts);
        else if (mask) bad = bad_values(data, p->n, size, mask, &first);
        else bad = bad_none(data, p->n * size, &first);
        if (!bad) continue;
        size_t k = (size_t)(p->t - v->tensors);
        int64_t at = (int64_t)(p->from + first);
        pthread_mutex_lock(&v->lock);
        if (!v->count[k] || at < v->first[k]) v->first[k] = at;
        v->count[k] += (int64_t)bad;
        pthread_mutex_unlock(&v->lock);
    }
}

// Reads the tensors of one shard; *done counts bytes for the progress line.
static void verify_shard(Verify *v, Pool *pool, const Store *s, int shard, size_t *done,
                         size_t total) {
    enum { BATCH = 64 };
    VerifyPiece batch[BATCH];
    int n = 0;
    v->pieces = batch;
    for (size_t i = 0; i < s->n; i++) {
        const Tensor *t = &s->tensors[i];
        size_t size = element_bytes(t), count = t->bytes / size, step = VERIFY_PIECE / size;
        for (size_t from = 0; t->shard == shard && from < count; from += step) {
            batch[n++] = (VerifyPiece){ t, from, count - from < step ? count - from : step };
            *done += batch[n - 1].n * size;
            if (n < BATCH) continue;
            parallel(pool, n, 1, verify_pieces, v);
            progress("checking", (int64_t)*done, (int64_t)total);
            n = 0;
        }
    }
    parallel(pool, n, 1, verify_pieces, v);
    progress("checking", (int64_t)*done, (int64_t)total);
    // the pages need not stay: a checkpoint is larger than memory
    Span map = s->shards[shard].map;
    madvise((void *)(uintptr_t)map.p, map.n, MADV_DONTNEED);
}

// "[3, 17]": where element i of a tensor is.
static const char *element_place(const Tensor *t, int64_t i, char out[static 256]) {
    int64_t at[TENSOR_RANK];
    int n = snprintf(out, 256, "[");
    for (int d = t->rank - 1; d >= 0; d--) {
        at[d] = i % t->shape[d];
        i /= t->shape[d];
    }
    for (int d = 0; d < t->rank; d++)
        n += snprintf(out + n, 256 - (size_t)n, "%s%lld", d ? ", " : "", (long long)at[d]);
    snprintf(out + n, 256 - (size_t)n, "]");
    return out;
}

// One line for each damaged tensor; how many there are.
static size_t verify_report(const Verify *v, const Store *s) {
    size_t damaged = 0;
    for (size_t i = 0; i < s->n; i++) {
        const Tensor *t = &s->tensors[i];
        char place[256];
        if (!v->count[i] || ++damaged > VERIFY_LINES) continue;
        note("%s: tensor %.*s %s: %s (%lld such values)", s->shards[t->shard].path, SHOWN(t->name),
             element_place(t, v->first[i], place),
             is_table(t) ? "no such expert" : "not finite", (long long)v->count[i]);
    }
    if (damaged > VERIFY_LINES) note("and %zu more tensors", damaged - VERIFY_LINES);
    return damaged;
}

// Weight files that lie there and are not part of the checkpoint.
static void verify_strays(const Store *s, const char *path) {
    DIR *dir = opendir(path);
    for (struct dirent *d; dir && (d = readdir(dir));) {
        size_t n = strlen(d->d_name);
        bool known = n < 12 || strcmp(d->d_name + n - 12, ".safetensors") != 0;
        for (int i = 0; i < s->n_shards && !known; i++)
            known = !strcmp(strrchr(s->shards[i].path, '/') + 1, d->d_name);
        if (!known) note("%s/%s: is not in the index, ignored", path, d->d_name);
    }
    if (dir) closedir(dir);
}

// Every value of an open checkpoint. False: some are damaged.
static bool verify_values(const Store *s, const char *dir, int n_experts, int threads, Err *e) {
    Verify v = { .n_experts = n_experts, .lock = PTHREAD_MUTEX_INITIALIZER, .tensors = s->tensors };
    double start = now();
    size_t total = 0, done = 0;
    v.first = xalloc(s->n, sizeof *v.first);
    v.count = xalloc(s->n, sizeof *v.count);
    for (size_t i = 0; i < s->n; i++) total += s->tensors[i].bytes;
    Pool *pool = pool_new(threads);
    for (int i = 0; i < s->n_shards; i++) verify_shard(&v, pool, s, i, &done, total);
    pool_free(pool);
    double t = now() - start;
    note("%zu tensors, %.2f GB in %d files read in %.1f s (%.2f GB/s)", s->n, (double)total / 1e9,
         s->n_shards, t, (double)total / t / 1e9);
    size_t damaged = verify_report(&v, s);
    free(v.first);
    free(v.count);
    if (!damaged) return true;
    return fail(e, "%s: %zu of %zu tensors are damaged: download again", dir, damaged, s->n);
}

bool verify(const char *dir, int threads, Err *e) {
    Store s;
    Config c;
    if (!config_open(&c, dir, e) || !store_open(&s, dir, e)) return false;
    verify_strays(&s, dir);
    bool ok = verify_values(&s, dir, c.n_experts, threads, e);
    store_close(&s);
    config_free(&c);
    return ok && model_check(dir, e);
}
