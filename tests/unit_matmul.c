// Unit test of the matrix products, the thread pool, the number formats and quantise(): every format and
// instruction-set level against FP64 references, on odd shapes, at unaligned addresses, right before an
// unmapped page; bit-identity over batch size, position, thread count and the company of other products.
#define DSV4_NO_MAIN
#include "../dsv4.c"

#include "check.h"

static uint64_t seed = 1;
static uint32_t rnd(void) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(seed >> 33) ^ (uint32_t)(seed >> 50);
}
static float uniform(void) { return (float)(rnd() % 20001) / 10000.0f - 1; }
static float heavy(void) { return uniform() * uniform() * uniform() * (rnd() % 40 ? 1 : 20); }

// Memory that ends at an unmapped page.
static void *guarded(size_t n) {
    size_t page = 4096, body = (n + page - 1) / page * page + page;
    char *p = mmap(NULL, body + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(p + body, page, PROT_NONE)) die(1, "no memory for the test");
    return p + body - n;
}

static const char *const names[] = { "F32", "BF16", "INT8", "INT4", "FP8", "FP4" };
static const double e2m1[16] = { 0, .5, 1, 1.5, 2, 3, 4, 6, -0.0, -.5, -1, -1.5, -2, -3, -4, -6 };

// A random matrix and, decoded independently, its values in FP64 (deq [n, k]).
static Mat random_mat(Format f, int n, int k, double *deq) {
    static const int bits[] = { 32, 16, 8, 4, 8, 4 };
    size_t bytes = (size_t)n * (size_t)k * (size_t)bits[f] / 8;
    int grid = (k + 127) / 128, groups = k / 32;
    bool nib = f == W_INT4 || f == W_FP4;
    size_t ns = nib ? (size_t)n * (size_t)groups : (size_t)((n + 127) / 128) * (size_t)grid;
    size_t sb = f == W_INT8 || f == W_INT4 ? 2 : f == W_FP8 || f == W_FP4 ? 1 : 0;
    uint8_t *w = guarded(bytes), *s = sb ? guarded(ns * sb) : NULL;
    for (size_t i = 0; i < ns && sb == 2; i++) {
        bf16 b = bf16_of_f32(0.001f + 0.01f * (uniform() + 1));
        memcpy(s + 2 * i, &b, 2);
    }
    for (size_t i = 0; i < ns && sb == 1; i++) s[i] = (uint8_t)(i == 3 ? 1 : i == 5 ? 0 : 112 + rnd() % 20);
    for (size_t i = 0; i < bytes; i++) {
        w[i] = (uint8_t)(rnd() >> 5);
        if (f == W_INT8 && rnd() % 16 == 0) w[i] = rnd() % 2 ? 0x80 : 0x7f;
        if (f == W_FP8 && (w[i] & 127) == 127) w[i] ^= 2;
    }
    for (size_t i = 0; i < (size_t)n * (size_t)k; i++) {
        size_t r = i / (size_t)k, c = i % (size_t)k, si = nib ? r * (size_t)groups + c / 32 : r / 128 * (size_t)grid + c / 128;
        bf16 h = 0;
        if (sb == 2) memcpy(&h, s + 2 * si, 2);
        double scale = sb == 2 ? (double)f32_of_bf16(h) : sb == 1 ? ldexp(1, s[si] - 127) : 1;
        int nibble = nib ? (c % 2 ? w[i / 2] >> 4 : w[i / 2] & 15) : 0;
        if (f == W_F32) {
            float x = heavy();
            memcpy(w + 4 * i, &x, 4);
            deq[i] = (double)x;
        } else if (f == W_BF16) {
            h = bf16_of_f32(heavy());
            memcpy(w + 2 * i, &h, 2);
            deq[i] = (double)f32_of_bf16(h);
        } else if (f == W_INT8) deq[i] = (int8_t)w[i] * scale;
        else if (f == W_INT4) deq[i] = (nibble - 8) * scale;
        else if (f == W_FP4) deq[i] = e2m1[nibble] * scale;
        else {
            int e = w[i] >> 3 & 15, m = w[i] & 7;
            double v = e ? ldexp(8 + m, e - 10) : ldexp(m, -9);
            deq[i] = (w[i] & 0x80 ? -v : v) * scale;
        }
    }
    return (Mat){ .w = w, .s = s, .n = n, .k = k, .fmt = f };
}

static Act random_act(int T, int k) {
    Act a = { .k = k, .groups = (k + 31) / 32, .ld = (size_t)k + 3 };
    a.ldq = (size_t)a.groups * 32 + 5;
    a.lds = (size_t)a.groups + 1;
    a.x = xalloc((size_t)T * a.ld, 4);
    a.q = xalloc((size_t)T * a.ldq, 1);
    a.s = xalloc((size_t)T * a.lds, 4);
    for (int t = 0; t < T; t++) {
        float *x = a.x + (size_t)t * a.ld;
        for (int i = 0; i < k; i++) x[i] = heavy();
        if (t % 5 == 4) for (int i = 0; i < 32 && i < k; i++) x[i] = 0;
        if (t % 5 == 3) for (int i = 0; i < k; i++) x[i] = rnd() % 2 ? 1.0f : -1.0f;
        quantise(x, k, a.q + (size_t)t * a.ldq, a.s + (size_t)t * a.lds);
    }
    return a;
}

// The largest error of y [T, n] in units of sum |w x|.
static double worst_error(const Mat *m, const double *deq, const Act *a, const float *y, int T, bool ints) {
    double worst = 0;
    for (int t = 0; t < T; t++) {
        for (int i = 0; i < m->n; i++) {
            double sum = 0, abs = 0;
            for (int j = 0; j < m->k; j++) {
                double x = (double)a->x[(size_t)t * a->ld + (size_t)j];
                if (ints) x = a->q[(size_t)t * a->ldq + (size_t)j] * (double)a->s[(size_t)t * a->lds + (size_t)(j / 32)];
                double v = deq[(size_t)i * (size_t)m->k + (size_t)j] * x;
                sum += v;
                abs += fabs(v);
            }
            double d = fabs(sum - (double)y[(size_t)t * (size_t)m->n + (size_t)i]) / (abs > 1e-30 ? abs : 1e-30);
            if (!(d <= worst)) worst = d;
        }
    }
    return worst;
}

enum { T_MAX = 130 };
static const int batch[] = { 1, 2, 3, 4, 5, 6, 7, 8, 9, 33, T_MAX };

static void check_matrix(Pool **pools, Format f, int n, int k) {
    double *deq = xalloc((size_t)n * (size_t)k, sizeof *deq), worst = 0;
    Mat m = random_mat(f, n, k, deq);
    Act a = random_act(T_MAX, k);
    bool ints = f == W_INT8 || f == W_INT4 || f == W_FP4;
    size_t N = (size_t)n, size = T_MAX * N;
    float *all = xalloc(size, 4), *first = xalloc(size, 4), *y = xalloc(size, 4);
    int top = cpu_best(), rows[T_MAX];
    for (int level = 0; level <= top; level++) {
        cpu_level = level;
        matmul(pools[0], &(Product){ &m, &a, NULL, T_MAX, all, N }, 1, false);
        double e = worst_error(&m, deq, &a, all, 12, ints);
        if (e > worst) worst = e;
        check(e < 1e-6, "%s [%d,%d] %s: error %.2e of sum |wx|", names[f], n, k, cpu_names[level], e);
        if (level == 0) memcpy(first, all, size * 4);
        if (ints) check(!memcmp(first, all, size * 4), "%s [%d,%d]: %s differs from portable", names[f], n, k, cpu_names[level]);
        for (size_t b = 0; b < sizeof batch / sizeof *batch; b++) {
            int T = batch[b];
            for (int t = 0; t < T; t++) rows[t] = (int)(rnd() % T_MAX);
            int half = T / 2;       // the second half as another product, beside the first
            Product jobs[3] = { { &m, &a, rows, half, y, N }, { &m, &a, rows + half, T - half, y + (size_t)half * N, N },
                                { &m, &a, NULL, 0, NULL, N } };
            for (int i = 0; i < T * n; i++) y[i] = NAN;
            matmul(pools[b % 4], jobs, 3, false);
            bool same = true;
            for (int t = 0; t < T; t++) same &= !memcmp(y + (size_t)t * N, all + (size_t)rows[t] * N, N * 4);
            check(same, "%s [%d,%d] %s: T = %d on %d threads differs", names[f], n, k, cpu_names[level], T, (int)(b % 4) + 1);
        }
    }
    cpu_level = top;
    matmul(pools[3], &(Product){ &m, &a, NULL, 9, y, N }, 1, true);
    double e = worst_error(&m, deq, &a, y, 9, false);
    check(e < 1e-6, "%s [%d,%d] exact: error %.2e", names[f], n, k, e);
    if (getenv("VERBOSE")) printf("%-4s [%4d,%4d] error / sum |wx|: fast %.1e exact %.1e\n", names[f], n, k, worst, e);
    free(deq); free(a.x); free(a.q); free(a.s); free(all); free(first); free(y);
}

static void test_products(Pool **pools) {
    static const int shape[][2] = { { 1, 32 }, { 3, 64 }, { 15, 96 }, { 16, 128 }, { 17, 160 }, { 24, 1024 }, { 130, 288 },
                                    { 257, 1056 }, { 64, 4096 }, { 300, 544 } };
    static const int odd[][2] = { { 1, 1 }, { 5, 7 }, { 33, 31 }, { 19, 33 }, { 129, 129 }, { 260, 300 }, { 8, 1001 } };
    for (int f = 0; f < N_FORMATS; f++) {
        for (size_t i = 0; i < sizeof shape / sizeof *shape; i++) check_matrix(pools, (Format)f, shape[i][0], shape[i][1]);
        for (size_t i = 0; i < sizeof odd / sizeof *odd && f != W_INT4 && f != W_FP4; i++)
            check_matrix(pools, (Format)f, odd[i][0], odd[i][1]);
    }
}

// Several products of different formats and inputs in one call, against each alone.
static void test_company(Pool **pools) {
    enum { N = 12 };
    Mat m[N];
    Act a[3] = { random_act(20, 256), random_act(20, 256), random_act(20, 96) };
    Product jobs[N];
    float *one = xalloc(20 * 200, 4);
    double *deq = xalloc(200 * 256, sizeof *deq);
    for (int i = 0; i < N; i++) {
        m[i] = random_mat((Format)(i % N_FORMATS), 10 + (int)(rnd() % 190), i / 2 % 3 == 2 ? 96 : 256, deq);
        int T = 1 + (int)(rnd() % 20);
        jobs[i] = (Product){ &m[i], &a[i / 2 % 3], NULL, T, xalloc(20 * 200, 4), 200 };
    }
    for (int threads = 0; threads < 4; threads++) {
        matmul(pools[threads], jobs, N, false);
        for (int i = 0; i < N; i++) {
            Product p = jobs[i];
            p.y = one;
            memset(one, 0, 20 * 200 * 4);
            matmul(pools[0], &p, 1, false);
            check(!memcmp(one, jobs[i].y, 20 * 200 * 4), "product %d changes in company", i);
        }
    }
    for (int i = 0; i < N; i++) free(jobs[i].y);
    for (int i = 0; i < 3; i++) { free(a[i].x); free(a[i].q); free(a[i].s); }
    free(one);
    free(deq);
}

// The rule of the numbers contract, written down once more.
static void test_quantise(void) {
    float x[100];
    int8_t q[2][128];
    float s[2][4];
    for (int trial = 0; trial < 3000; trial++) {
        int k = 1 + (int)(rnd() % 100);
        float size = ldexpf(1, (int)(rnd() % 60) - 30);
        for (int i = 0; i < k; i++) x[i] = rnd() % 7 ? heavy() * size : (float)((int)(rnd() % 255) - 127) * 0.5f * size;
        if (trial % 10 == 0) for (int i = 0; i < k; i++) x[i] = 0;
        if (trial % 10 == 1) x[rnd() % (uint32_t)k] = trial % 20 == 1 ? NAN : INFINITY;
        if (trial % 10 == 2) for (int i = 0; i < k; i++) x[i] *= 0x1p-126f;
        for (int l = 0; l < 2; l++) {
            cpu_level = l ? cpu_best() : CPU_PORTABLE;
            memset(q[l], 99, 128);
            memset(s[l], 99, sizeof s[l]);
            quantise(x, k, q[l], s[l]);
        }
        check(!memcmp(q[0], q[1], 128) && !memcmp(s[0], s[1], sizeof s[0]), "quantise: levels differ, k = %d", k);
        if (trial % 10 == 1) {
            bool seen = false;
            for (int g = 0; g * 32 < k; g++) seen |= !isfinite(s[0][g]);
            check(seen, "quantise loses a NaN or Inf");
            continue;
        }
        bool ok = true;
        for (int g = 0; g * 32 < k; g++) {
            float top = 0;
            for (int i = g * 32; i < k && i < g * 32 + 32; i++) top = fmaxf(top, fabsf(x[i]));
            float r = top != 0 && top >= 127 / FLT_MAX ? 127 / top : 0;
            ok &= s[0][g] == top / 127;
            for (int i = g * 32; i < g * 32 + 32; i++)
                ok &= q[0][i] == (i < k ? (int)fminf(127, fmaxf(-127, rintf(x[i] * r))) : 0);
        }
        check(ok, "quantise: not the contract's values, k = %d", k);
    }
    cpu_level = cpu_best();
}

static void test_formats(void) {
    for (uint32_t i = 0; i < 65536; i++) {
        float f = f32_of_bf16((bf16)i);
        if (!isnan(f)) check(bf16_of_f32(f) == i, "bf16 %u does not come back", i);
        else check(isnan(f32_of_bf16(bf16_of_f32(f))), "bf16 NaN %u is lost", i);
    }
    check(bf16_of_f32(f32_of_bits(0x3f808000)) == 0x3f80 && bf16_of_f32(f32_of_bits(0x3f818000)) == 0x3f82
          && bf16_of_f32(f32_of_bits(0x3f808001)) == 0x3f81 && bf16_of_f32(FLT_MAX) == 0x7f80, "bf16 rounding");
    for (int b = 0; b < 256; b++) {
        int e = b >> 3 & 15, m = b & 7;
        double v = (b & 0x80 ? -1 : 1) * (e ? ldexp(8 + m, e - 10) : ldexp(m, -9));
        if ((b & 127) == 127) check(isnan(f32_of_e4m3((uint8_t)b)), "e4m3 %d is a NaN", b);
        else check((double)f32_of_e4m3((uint8_t)b) == v, "e4m3 %d", b);
        if (b == 255) check(isnan(f32_of_e8m0(255)), "e8m0 255 is a NaN");
        else check((double)f32_of_e8m0((uint8_t)b) == ldexp(1, b - 127), "e8m0 %d", b);
    }
    for (int i = 0; i < 16; i++) check(e2m1_x2[i] == e2m1[i] * 2, "e2m1 %d", i);
}

// A NaN weight or activation must reach the output.
static void test_nan(Pool *p) {
    double *deq = xalloc(40 * 64, sizeof *deq);
    for (int f = 0; f < N_FORMATS; f++) {
        Mat m = random_mat((Format)f, 40, 64, deq);
        Act a = random_act(3, 64);
        for (int level = 0; level <= cpu_best(); level++) {
            float y[120];
            cpu_level = level;
            a.x[a.ld + 40] = NAN;
            quantise(a.x + a.ld, 64, a.q + a.ldq, a.s + a.lds);
            matmul(p, &(Product){ &m, &a, NULL, 3, y, 40 }, 1, false);
            check(isfinite(y[5]) && !isfinite(y[45]) && isfinite(y[85]), "%s %s: NaN in x", names[f], cpu_names[level]);
            if (f == W_FP8) {
                uint8_t *w = (uint8_t *)(uintptr_t)m.w + 7 * 64 + 20, keep = *w;
                *w = level % 2 ? 0x7f : 0xff;
                matmul(p, &(Product){ &m, &a, NULL, 1, y, 40 }, 1, false);
                check(isnan(y[7]) && isfinite(y[8]), "FP8 %s: NaN weight", cpu_names[level]);
                *w = keep;
            }
        }
        free(a.x); free(a.q); free(a.s);
    }
    free(deq);
}

// row_scores() and row_sum() against FP64; any split of the rows gives the same bits.
static void test_rows(void) {
    enum { N = 37, K = 528 };
    float *rows = xalloc(N * K, 4), q[K], s[N], part[N], o[K], o2[K];
    for (int k = 1; k <= K; k += k < 40 ? 1 : 61) {
        for (int i = 0; i < N * k; i++) rows[i] = heavy();
        for (int i = 0; i < k; i++) q[i] = heavy();
        for (int level = 0; level <= cpu_best(); level++) {
            int cut = 1 + (int)(rnd() % (N - 1));
            bool ok = true;
            cpu_level = level;
            row_scores(q, rows, N, k, 0.25f, s);
            row_scores(q, rows, cut, k, 0.25f, part);
            row_scores(q, rows + (size_t)cut * (size_t)k, N - cut, k, 0.25f, part + cut);
            for (int j = 0; j < N; j++) {
                double sum = 0, abs = 0;
                for (int i = 0; i < k; i++) sum += (double)q[i] * (double)rows[j * k + i], abs += fabs((double)q[i] * (double)rows[j * k + i]);
                ok &= fabs(sum * 0.25 - (double)s[j]) <= abs * 1e-6 + 1e-30;
            }
            check(ok && !memcmp(s, part, sizeof s), "row_scores %s: %d columns", cpu_names[level], k);
            memset(o, 0, sizeof o);
            memset(o2, 0, sizeof o2);
            row_sum(o, s, rows, N, k);
            row_sum(o2, s, rows, cut, k);
            row_sum(o2, s + cut, rows + (size_t)cut * (size_t)k, N - cut, k);
            ok = !memcmp(o, o2, sizeof o);
            for (int i = 0; i < k; i++) {
                double sum = 0, abs = 0;
                for (int j = 0; j < N; j++) sum += (double)s[j] * (double)rows[j * k + i], abs += fabs((double)s[j] * (double)rows[j * k + i]);
                ok &= fabs(sum - (double)o[i]) <= abs * 2e-6 + 1e-30;
            }
            check(ok, "row_sum %s: %d columns", cpu_names[level], k);
        }
    }
    cpu_level = cpu_best();
    free(rows);
}

typedef struct { Pool *pool; uint8_t *hits; int n, grain; bool ok; } Cover;
static void cover_inner(void *arg, int begin, int end) {
    Cover *c = arg;
    for (int i = begin; i < end; i++) c->hits[i]++;
}
static void cover_outer(void *arg, int begin, int end) {
    Cover *c = arg;
    if (end - begin < c->grain && end != c->n) c->ok = false;
    for (int i = begin; i < end; i++) {
        Cover in = { .hits = c->hits + i * 10 };
        parallel(c->pool, 10, 1, cover_inner, &in);
    }
}

static void test_pool(Pool **pools) {
    uint8_t *hits = xalloc(10000, 1);
    for (int i = 0; i < 2000; i++) {
        int n = i % 10 ? (int)(rnd() % 40) : (int)(rnd() % 1000);
        Cover c = { pools[i % 4], hits, n, 1 + (int)(rnd() % 5), true };
        memset(hits, 0, 10000);
        parallel(c.pool, n, c.grain, cover_outer, &c);
        bool once = true;
        for (int k = 0; k < 10000; k++) once &= hits[k] == (k < n * 10);
        check(once && c.ok, "parallel: %d items, grain %d, %d threads", n, c.grain, i % 4 + 1);
        if (i % 400 == 0) usleep(2000);     // the workers fall asleep
    }
    free(hits);
    for (int i = 0; i < 20; i++) pool_free(pool_new(i % 5));
}

int main(void) {
    Pool *pools[4];
    for (int i = 0; i < 4; i++) pools[i] = pool_new(i + 1);
    cpu_init();
    test_formats();
    test_quantise();
    test_pool(pools);
    test_nan(pools[1]);
    test_rows();
    test_company(pools);
    test_products(pools);
    for (int i = 0; i < 4; i++) pool_free(pools[i]);
    printf("unit_matmul (%s): %d passed, %d failed\n", cpu_names[cpu_best()], passed, failed);
    return failed != 0;
}
