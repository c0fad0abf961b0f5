// Speed of the matrix products on this machine: for every format at the model's shapes, GB/s of weights and the
// share of the machine's read bandwidth, measured in the same run (interleaved), for 1, 2, 4 tokens; GMAC/s for
// 128 and 512. Weights are walked through a buffer far larger than the caches.
//     kernels [-t THREADS] [-l LEVEL] [-g GIGABYTES] [-r ROUNDS]
#ifndef FRAGMENTS
#define DSV4_NO_MAIN
#include "../dsv4.c"
#else
#include FRAGMENTS
#endif

typedef struct { const char *name; Format fmt; int n, k, n_jobs; } Shape;
static const Shape shapes[] = {
    { "experts w1 w3 INT4", W_INT4, 2048, 4096, 12 }, { "experts w2 INT4", W_INT4, 4096, 2048, 6 },
    { "experts w1 w3 FP4", W_FP4, 2048, 4096, 12 }, { "experts w2 FP4", W_FP4, 4096, 2048, 6 },
    { "wq_b INT8", W_INT8, 32768, 1024, 1 }, { "wo_b INT8", W_INT8, 4096, 8192, 1 }, { "wo_a INT8", W_INT8, 8192, 4096, 1 },
    { "wq_b FP8", W_FP8, 32768, 1024, 1 }, { "wo_b FP8", W_FP8, 4096, 8192, 1 },
    { "head BF16", W_BF16, 129280, 4096, 1 }, { "compressor BF16", W_BF16, 1024, 4096, 2 },
    { "hc_fn F32", W_F32, 24, 16384, 1 },
};

static size_t weight_bytes(const Shape *s) {
    Mat m = { .n = s->n, .k = s->k, .fmt = s->fmt };
    return (size_t)s->n * row_bytes(&m);
}
static size_t scale_bytes(const Shape *s) {
    size_t groups = (size_t)s->n * (size_t)(s->k / 32);
    return s->fmt == W_INT4 ? 2 * groups : s->fmt == W_FP4 ? groups : s->fmt == W_INT8 ? groups / 64 + 2 : groups / 128 + 1;
}

typedef struct { char *mem; size_t size, at; } Ring;

// One pass of a shape for T tokens over fresh weights. Returns seconds; *bytes: weights and scales read.
static double pass(Pool *p, Ring *r, const Shape *s, const Act *a, float *y, int T, size_t *bytes) {
    Mat m[12];
    Product job[12];
    size_t wb = (weight_bytes(s) + 255) / 256 * 256, one = wb + (scale_bytes(s) + 255) / 256 * 256;
    if (r->at + one * (size_t)s->n_jobs > r->size) r->at = 0;
    for (int i = 0; i < s->n_jobs; i++, r->at += one) {
        m[i] = (Mat){ .w = r->mem + r->at, .s = r->mem + r->at + wb, .n = s->n, .k = s->k, .fmt = s->fmt };
        job[i] = (Product){ &m[i], a, NULL, T, y + (size_t)i * (size_t)s->n, (size_t)s->n * (size_t)s->n_jobs };
    }
    *bytes = (weight_bytes(s) + scale_bytes(s)) * (size_t)s->n_jobs;
    double t = now();
    matmul(p, job, s->n_jobs, false);
    return now() - t;
}

// The best of n passes, fewer of long ones: other work on the machine must not count.
static double best_pass(Pool *p, Ring *r, const Shape *s, const Act *a, float *y, int T, size_t *bytes, int n) {
    double best = pass(p, r, s, a, y, T, bytes);
    if ((size_t)n * *bytes > (size_t)2 << 30) n = (int)(((size_t)2 << 30) / *bytes);
    for (int i = 1; i < n; i++) best = fmin(best, pass(p, r, s, a, y, T, bytes));
    return best;
}

int main(int argc, char **argv) {
    int threads = 0, rounds = 5, opt, gb = 3, only = -1;
    cpu_init();
    while ((opt = getopt(argc, argv, "t:l:g:r:s:")) != -1) {
        if (opt == 't') threads = atoi(optarg);
        else if (opt == 'l') cpu_level = atoi(optarg);
        else if (opt == 'g') gb = atoi(optarg);
        else if (opt == 'r') rounds = atoi(optarg);
        else if (opt == 's') only = atoi(optarg);
        else return 2;
    }
    Pool *p = pool_new(threads);
    Ring r = { .size = (size_t)gb << 30 };
    r.mem = mmap(NULL, r.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (r.mem == MAP_FAILED) die(1, "no memory");
    madvise(r.mem, r.size, MADV_HUGEPAGE);
    for (size_t i = 0; i < r.size; i++) r.mem[i] = (char)(0x30 + (i * 2654435761u >> 13 & 15));  // finite in every format
    float *y = xalloc((size_t)512 * 36864, 4);
    printf("%-20s %-12s %d threads\n", "", cpu_names[cpu_level], p->n_threads);
    printf("%-20s %8s %8s %6s %6s %6s %9s %9s\n", "", "read GB/s", "T=1 GB/s", "ratio", "T=2/1", "T=4/1", "T=128", "512 GMAC/s");
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        if (only >= 0 && (size_t)only != i) continue;
        const Shape *s = &shapes[i];
        Act a = { .k = s->k, .groups = s->k / 32, .ld = (size_t)s->k, .ldq = (size_t)s->k, .lds = (size_t)s->k / 32 };
        a.x = xalloc(512 * a.ld, 4);
        a.q = xalloc(512 * a.ldq, 1);
        a.s = xalloc(512 * a.lds, 4);
        for (size_t j = 0; j < 512 * a.ld; j++) a.x[j] = (float)(j * 2654435761u % 1000) / 500 - 1;
        for (int t = 0; t < 512; t++)
            quantise(a.x + (size_t)t * a.ld, s->k, a.q + (size_t)t * a.ldq, a.s + (size_t)t * a.lds);
        double read = 0, t[3] = { 1e9, 1e9, 1e9 }, big[2] = { 0 };
        size_t bytes = 0;
        for (int round = 0; round < rounds; round++) {
            read = fmax(read, read_bandwidth(p));
            for (int j = 0; j < 3; j++) t[j] = fmin(t[j], best_pass(p, &r, s, &a, y, 1 << j, &bytes, 40));
        }
        for (int j = 0; j < 2 && (size_t)s->n * (size_t)s->n_jobs <= 36864; j++) {
            int T = j ? 512 : 128;
            big[j] = (double)T * s->n * s->k * s->n_jobs / best_pass(p, &r, s, &a, y, T, &bytes, 2) * 1e-9;
        }
        double rate = (double)bytes / t[0];
        printf("%-20s %8.1f %8.1f %6.2f %6.2f %6.2f %9.1f %9.1f\n", s->name, read * 1e-9, rate * 1e-9, rate / read,
               t[1] / t[0], t[2] / t[0], big[0], big[1]);
        fflush(stdout);
        free(a.x); free(a.q); free(a.s);
    }
    free(y);
    munmap(r.mem, r.size);
    pool_free(p);
    return 0;
}
