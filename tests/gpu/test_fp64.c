// A third judge: every operation in FP64, plain loops after the model's description (spec sections
// in brackets), against what the CPU and the GPU make of the same inputs. Neither may stray further
// from it than the stated bound.
//   cc -std=gnu11 -I. -o test_fp64 tests/gpu/test_fp64.c apps/*.c -ldl -lm    (from the top folder;
//   LD_LIBRARY_PATH: the device) test_fp64 [CASE]      prints the worst deviation of each operation
//   and 'N passed, N failed'
// Deviation: the largest difference over the root mean square of the true values, less what a
// rounding to BF16 or INT8 that belongs to the operation may cost.
#define DSV4_NO_MAIN
#include "dsv4.c"
#include "tests/gpu/toy.h"

#define EXACT 3e-6          // FP32 sums of exact products: a few ulp of the largest term
#define HYPER 6e-6          // the same through a sigmoid and 20 rounds of normalising
#define TILES 3e-5          // more than 8 rows on the GPU: float formats as two BF16 parts
#define FLIP 5e-3           // one INT8 rounding of a hidden value may flip

typedef struct { const char *name; double cpu, gpu, limit; int n; } Verdict;
static Verdict verdict[32];

static Verdict *find(const char *name, double limit) {
    int i = 0;
    while (verdict[i].name && strcmp(verdict[i].name, name)) i++;
    verdict[i].name = name;
    verdict[i].limit = fmax(verdict[i].limit, limit);
    return &verdict[i];
}

// The deviation of x [n] from `truth`; slack [n]: what each value may differ without counting, or
// NULL.
static double off_by(const double *truth, const double *slack, const float *x, size_t n) {
    double worst = 0, square = 1e-30;
    for (size_t i = 0; i < n; i++) {
        double diff = fabs(x[i] - truth[i]) - (slack ? slack[i] : 0);
        worst = diff <= worst ? worst : diff;           // a NaN stays
        square += truth[i] * truth[i];
    }
    return worst / sqrt(square / n);
}

static void judge(const char *name, double limit, const double *truth, const double *slack,
                  const float *cpu, const float *gpu, size_t n) {
    Verdict *v = find(name, limit);
    double c = off_by(truth, slack, cpu, n), g = off_by(truth, slack, gpu, n);
    if (!(c <= v->cpu)) v->cpu = c;
    if (!(g <= v->gpu)) v->gpu = g;
    v->n++;
}

static void judge_exact(const char *name, bool cpu, bool gpu) {
    Verdict *v = find(name, 0);
    v->cpu += !cpu;
    v->gpu += !gpu;
    v->n++;
}

// --- formats [8]

static double two_to(int e) { return ldexp(1, e); }

static double e4m3(uint8_t b) {
    int e = b >> 3 & 15, m = b & 7;
    double v = e ? (8 + m) * two_to(e - 10) : m * two_to(-9);
    return b & 128 ? -v : v;
}

// W[i][j] of a matrix; 4-bit formats: low nibble = even column.
static double weight(const Mat *m, int i, int j) {
    static const double fp4[8] = { 0, 0.5, 1, 1.5, 2, 3, 4, 6 };
    const uint8_t *w = m->w, *s = m->s;
    size_t at = (size_t)i * m->k + j, block = (size_t)(i / 128) * ((m->k + 127) / 128) + j / 128,
           group = at / 32;
    int nibble = m->fmt == W_INT4 || m->fmt == W_FP4 ? w[at / 2] >> (j & 1) * 4 & 15 : 0;
    switch (m->fmt) {
    case W_F32: return ((const float *)m->w)[at];
    case W_BF16: return f32_of_bf16(((const bf16 *)m->w)[at]);
    case W_INT8: return (int8_t)w[at] * (double)f32_of_bf16(((const bf16 *)m->s)[block]);
    case W_INT4: return (nibble - 8) * (double)f32_of_bf16(((const bf16 *)m->s)[group]);
    case W_FP8: return e4m3(w[at]) * two_to(s[block] - 127);
    default: return (nibble & 8 ? -1 : 1) * fp4[nibble & 7] * two_to(s[group] - 127);
    }
}

static bool integer_format(Format f) { return f == W_INT8 || f == W_INT4 || f == W_FP4; }

// What a matrix of this format sees of x [k]: itself, or INT8 in groups of 32 times the group's
// scale.
static void seen_by(Format f, const float *x, int k, double *to) {
    for (int g = 0; g < k; g += 32) {
        float most = 0;
        for (int j = g; j < g + 32; j++) most = fmaxf(most, fabsf(x[j]));
        float r = most > 0 ? 127 / most : 0, scale = most / 127;
        for (int j = g; j < g + 32; j++)
            to[j] = integer_format(f) ? nearbyintf(x[j] * r) * (double)scale : x[j];
    }
}

// y [T, n] = W x for rows [from, from + n) of the matrix; row t of x at t * ld.
static double *product(const Mat *m, int from, int n, const float *x, size_t ld, int T) {
    double *y = xalloc((size_t)T * n, sizeof *y), *in = xalloc((size_t)T * m->k, sizeof *in);
    for (int t = 0; t < T; t++) seen_by(m->fmt, x + t * ld, m->k, in + (size_t)t * m->k);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < m->k; j++) {
            double w = weight(m, from + i, j);
            for (int t = 0; t < T; t++) y[(size_t)t * n + i] += w * in[(size_t)t * m->k + j];
        }
    free(in);
    return y;
}

static double product_limit(const Mat *m, int T) {
    return T > TILE && !integer_format(m->fmt) ? TILES : EXACT;
}

// --- small maths [Notation, 3]

static void rms(double *v, const float *norm, int n, double eps) {
    double square = 0;
    for (int i = 0; i < n; i++) square += v[i] * v[i];
    for (int i = 0; i < n; i++) v[i] = v[i] / sqrt(square / n + eps) * (norm ? norm[i] : 1);
}

// Rotates the last R dims of v [n]; the angle is the FP32 product of position and frequency.
static void rotate(double *v, int n, int R, int pos, const float *frequency, int sign) {
    for (int i = 0; i < R / 2; i++) {
        double *p = v + n - R + 2 * i, a = p[0], b = p[1], angle = (float)pos * frequency[i];
        p[0] = a * cos(angle) - sign * b * sin(angle);
        p[1] = sign * a * sin(angle) + b * cos(angle);
    }
}

// The frequencies themselves: within an ulp or two of [3.2, 3.3].
static void judge_frequencies(const Device *d) {
    const Config *c = d->c;
    int R = c->rope_dim;
    double theta = c->compress_theta, ends[2] = { c->yarn_beta_fast, c->yarn_beta_slow };
    for (int i = 0; i < 2; i++)
        ends[i] = R * log(c->yarn_ctx / (2 * M_PI * ends[i])) / (2 * log(theta));
    double lo = fmax(floor(ends[0]), 0), hi = fmin(ceil(ends[1]), R - 1);
    for (int i = 0; i < R / 2; i++) {
        double ramp = fmin(fmax((i - lo) / (hi > lo ? hi - lo : 0.001), 0), 1),
               f = pow(theta, -2.0 * i / R);
        double plain = pow(c->rope_theta, -2.0 * i / R),
               yarn = f / c->yarn_factor * ramp + f * (1 - ramp);
        judge("rope", 5e-7, &plain, NULL, &d->inv_freq[0][i], &d->inv_freq[0][i], 1);
        judge("rope", 5e-7, &yarn, NULL, &d->inv_freq[1][i], &d->inv_freq[1][i], 1);
    }
}

// --- both devices

typedef struct {
    Twin w;
    double *X;                  // [T, S, D] the streams as they should be
    bool post;                  // the GPU's own are due at its next hyper-connection
} Court;

static float *from_gpu(Court *c, CuPtr p, size_t n) {
    return memcpy(xalloc(n, 4), twin_read(&c->w, p, 4 * n), 4 * n);
}

static float *from_bf16(Court *c, CuPtr p, size_t n) {
    const bf16 *x = twin_read(&c->w, p, 2 * n);
    float *y = xalloc(n, sizeof *y);
    for (size_t i = 0; i < n; i++) y[i] = f32_of_bf16(x[i]);
    return y;
}

// Judges an array of both; then the GPU gets the CPU's. Frees the truth.
static void judge_both(Court *c, const char *name, double limit, double *truth, CuPtr gpu,
                       const float *cpu, size_t n) {
    float *x = from_gpu(c, gpu, n);
    judge(name, limit, truth, NULL, cpu, x, n);
    twin_give(&c->w, gpu, cpu, 4 * n);
    free(x), free(truth);
}

// The same for BF16 results: half a unit in the last place is free.
static void judge_bf16(Court *c, const char *name, double limit, double *truth, CuPtr gpu,
                       const void *cpu, bool cpu_floats, size_t n) {
    float *x = from_bf16(c, gpu, n), *y = xalloc(n, sizeof *y);
    double *slack = xalloc(n, sizeof *slack);
    bf16 *rows = xalloc(n, sizeof *rows);
    for (size_t i = 0; i < n; i++) {
        y[i] = cpu_floats ? ((const float *)cpu)[i] : f32_of_bf16(((const bf16 *)cpu)[i]);
        rows[i] = bf16_of_f32(y[i]);
        slack[i] = fabs(truth[i]) * 0x1p-8;
    }
    judge(name, limit, truth, slack, y, x, n);
    twin_give(&c->w, gpu, rows, 2 * n);
    free(x), free(y), free(slack), free(rows), free(truth);
}

static void give_act(Court *c, const GpuAct *gpu, const Act *cpu, int rows) {
    twin_give(&c->w, gpu->x, cpu->x, 4 * cpu->ld * (size_t)rows);
    twin_give(&c->w, gpu->q, cpu->q, cpu->ldq * (size_t)rows);
    twin_give(&c->w, gpu->s, cpu->s, 4 * cpu->lds * (size_t)rows);
}

// --- hyper-connections [2]

// One row: y [D] normed, post [S], C [S, S]; full false: hc_head.
static void hyper(const Config *c, const Hyper *h, const float *norm, const double *X, bool full,
                  double *y, double *post, double *C) {
    int S = c->hc_mult, D = c->dim, n = full ? (2 + S) * S : S;
    double square = 0, mix[MAX_STREAMS * (MAX_STREAMS + 2)], pre;
    for (int j = 0; j < S * D; j++) square += X[j] * X[j];
    for (int i = 0; i < n; i++) {
        mix[i] = 0;
        for (int j = 0; j < S * D; j++) mix[i] += weight(&h->fn, i, j) * X[j];
        mix[i] /= sqrt(square / (S * D) + c->norm_eps);
    }
    for (int d = 0; d < D; d++) y[d] = 0;
    for (int s = 0; s < S; s++) {
        pre = 1 / (1 + exp(-(mix[s] * h->scale[0] + h->base[s]))) + c->hc_eps;
        for (int d = 0; d < D; d++) y[d] += pre * X[s * D + d];
    }
    rms(y, norm, D, c->norm_eps);
    if (!full) return;
    for (int s = 0; s < S; s++)
        post[s] = 2 / (1 + exp(-(mix[S + s] * h->scale[1] + h->base[S + s])));
    for (int j = 0; j < S; j++) {
        double sum = 0;
        for (int k = 0; k < S; k++)
            sum += C[j * S + k] =
                exp(mix[2 * S + j * S + k] * h->scale[2] + h->base[2 * S + j * S + k]);
        for (int k = 0; k < S; k++) C[j * S + k] = C[j * S + k] / sum + c->hc_eps;
    }
    for (int it = 0; it < c->hc_iters; it++)
        for (int columns = it == 0; columns < 2; columns++)
            for (int j = 0; j < S; j++) {
                double sum = c->hc_eps;
                for (int k = 0; k < S; k++) sum += columns ? C[k * S + j] : C[j * S + k];
                for (int k = 0; k < S; k++) C[columns ? k * S + j : j * S + k] /= sum;
            }
}

// The streams after a sublayer, on both devices; the GPU's are looked at when it has them.
static void sublayer_done(Court *c) {
    Run *r = c->w.r;
    const Config *k = c->w.cpu.c;
    int S = k->hc_mult, D = k->dim;
    for (int t = 0; t < c->w.T; t++)
        for (int s = 0; s < S; s++)
            for (int d = 0; d < D; d++) {
                double x = (double)r->post[t * S + s] * r->y[(size_t)t * D + d];
                for (int j = 0; j < S; j++)
                    x += (double)r->comb[(t * S + j) * S + s] * r->X[((size_t)t * S + j) * D + d];
                c->X[((size_t)t * S + s) * D + d] = x;
            }
    c->w.cpu.op->hc_post(&c->w.cpu);
    c->w.gpu->op->hc_post(c->w.gpu);
}

static void judge_streams(Court *c, const char *name, double limit) {
    size_t n = (size_t)c->w.T * c->w.cpu.c->hc_mult * c->w.cpu.c->dim;
    double *truth = memcpy(xalloc(n, sizeof *truth), c->X, n * sizeof *truth);
    judge_both(c, name, limit, truth, c->w.g->X, c->w.r->X, n);
}

static void judge_pre(Court *c, const Hyper *hc, const Hyper *hg, const float *nc,
                      const float *ng) {
    Twin *w = &c->w;
    const Config *k = w->cpu.c;
    size_t T = (size_t)w->T, S = (size_t)k->hc_mult, D = (size_t)k->dim;
    double *y = xalloc(T * D, sizeof *y), *post = xalloc(T * S, sizeof *post),
           *C = xalloc(T * S * S, sizeof *C);
    for (size_t t = 0; t < T; t++)
        hyper(k, hc, nc, c->X + t * S * D, true, y + t * D, post + t * S, C + t * S * S);
    w->cpu.op->hc_pre(&w->cpu, hc, nc);
    w->gpu->op->hc_pre(w->gpu, hg, ng);
    judge_streams(c, "hc_post", EXACT);
    judge_both(c, "hc_pre", HYPER, y, w->g->x.x, w->r->x.x, T * D);
    judge_both(c, "hc_pre", HYPER, post, w->g->post_c, w->r->post, T * S);
    judge_both(c, "hc_pre", HYPER, C, w->g->comb, w->r->comb, T * S * S);
    give_act(c, &w->g->x, &w->r->x, w->T);
}

// --- attention [4, 5, 6]

// A compressor's inputs of the batch: [T, 2, n] on the CPU, in the ring on the GPU.
static void judge_inputs(Court *c, const Compressor *m, uint64_t at, const float *cpu) {
    Twin *w = &c->w;
    int n = m->wkv.n, slots = w->cpu.cring[m->ratio];
    for (int half = 0; half < 2; half++) {
        double *truth = product(half ? &m->wgate : &m->wkv, 0, n, w->r->x.x, w->r->x.ld, w->T);
        for (int t = 0; t < w->T; t++) {
            double *row = memcpy(xalloc((size_t)n, sizeof *row), truth + (size_t)t * n,
                                 sizeof *row * (size_t)n);
            CuPtr gpu = w->g->slot[0] + at +
                        4 * (size_t)n * (2 * (size_t)(w->r->rows[t].pos % slots) + half);
            judge_both(c, "attn_project", product_limit(&m->wkv, w->T), row, gpu,
                       cpu + ((size_t)t * 2 + half) * n, (size_t)n);
        }
        free(truth);
    }
}

static void judge_project(Court *c, const Layer *lc, const Layer *lg, int i) {
    Twin *w = &c->w;
    Run *r = w->r;
    const float *x = r->x.x;
    size_t ld = r->x.ld, T = (size_t)w->T;
    w->cpu.op->attn_project(&w->cpu, lc);
    w->gpu->op->attn_project(w->gpu, lg);
    judge_both(c, "attn_project", product_limit(&lc->wq_a, w->T),
               product(&lc->wq_a, 0, lc->wq_a.n, x, ld, w->T), w->g->qr.x, r->qr.x, T * lc->wq_a.n);
    judge_both(c, "attn_project", product_limit(&lc->wkv, w->T),
               product(&lc->wkv, 0, lc->wkv.n, x, ld, w->T), w->g->kv, r->kv, T * lc->wkv.n);
    if (lc->ratio) judge_inputs(c, &lc->comp, w->g->layer[i].cin, r->cin);
    if (lc->ratio != 4) return;
    judge_inputs(c, &lc->icomp, w->g->layer[i].icin, r->icin);
    judge_both(c, "attn_project", product_limit(&lc->iproj, w->T),
               product(&lc->iproj, 0, lc->iproj.n, x, ld, w->T), w->g->iw, r->iw, T * lc->iproj.n);
}

// The row that the window ending at pos becomes; raw: the ring on the GPU, kv and gate without ape.
static double *pooled(const Court *c, const Compressor *m, const float *raw, int pos) {
    const Config *k = c->w.cpu.c;
    int n = m->wkv.n, M = m->ratio, D = m->out, slots = c->w.cpu.cring[M], start = pos + 1 - M;
    double *row = xalloc((size_t)D, sizeof *row);
    for (int d = 0; d < D; d++) {
        double sum = 0, out = 0;
        for (int p = M == 4 && start ? start - M : start; p <= pos; p++) {
            int channel = M == 4 && p >= start ? D + d : d;
            const float *in = raw + (size_t)(p % slots) * 2 * n;
            double e = exp((double)in[n + channel] + m->ape[(size_t)(p % M) * n + channel]);
            sum += e;
            out += e * in[channel];
        }
        row[d] = out / sum;
    }
    rms(row, m->norm, D, k->norm_eps);
    rotate(row, D, k->rope_dim, start, c->w.cpu.inv_freq[1], 1);
    return row;
}

static void judge_pool(Court *c, const Compressor *m, uint64_t in, uint64_t out, const bf16 *rows) {
    Twin *w = &c->w;
    float *raw = from_gpu(c, w->g->slot[0] + in, (size_t)w->cpu.cring[m->ratio] * 2 * m->wkv.n);
    for (int t = 0; t < w->T; t++) {
        int pos = w->r->rows[t].pos;
        size_t at = (size_t)(pos / m->ratio) * m->out;
        if ((pos + 1) % m->ratio) continue;
        judge_bf16(c, "compress", EXACT, pooled(c, m, raw, pos), w->g->slot[0] + out + 2 * at,
                   rows + at, false, (size_t)m->out);
    }
    free(raw);
}

static void judge_latent(Court *c, const Layer *lc, const Layer *lg, int i) {
    Twin *w = &c->w;
    Run *r = w->r;
    const Config *k = w->cpu.c;
    const Cache *own = w->cpu.cache[0] + i;
    GpuLayer *gl = &w->g->layer[i];
    int T = w->T, Q = k->q_lora_rank, K = k->head_dim;
    double *qr = xalloc((size_t)T * Q, sizeof *qr);
    float *kv = memcpy(xalloc((size_t)T * K, 4), r->kv, 4 * (size_t)T * K);
    for (int t = 0; t < T; t++) {
        for (int j = 0; j < Q; j++) qr[(size_t)t * Q + j] = r->qr.x[t * r->qr.ld + j];
        rms(qr + (size_t)t * Q, lc->q_norm, Q, k->norm_eps);
    }
    w->cpu.op->attn_latent(&w->cpu, lc, i);
    w->gpu->op->attn_latent(w->gpu, lg, i);
    judge_both(c, "attn_latent", EXACT, qr, w->g->qr.x, r->qr.x, (size_t)T * Q);
    give_act(c, &w->g->qr, &r->qr, T);
    for (int t = 0; t < T; t++) {
        double *row = xalloc((size_t)K, sizeof *row);
        size_t at = (size_t)(r->rows[t].pos % w->cpu.ring) * K;
        for (int j = 0; j < K; j++) row[j] = kv[(size_t)t * K + j];
        rms(row, lc->kv_norm, K, k->norm_eps);
        rotate(row, K, k->rope_dim, r->rows[t].pos, w->cpu.inv_freq[lc->ratio != 0], 1);
        judge_bf16(c, "attn_latent", EXACT, row, w->g->slot[0] + gl->win + 2 * at,
                   (const bf16 *)own->win + at, false, (size_t)K);
    }
    if (lc->ratio) judge_pool(c, &lc->comp, gl->cin, gl->comp, own->comp);
    if (lc->ratio == 4) judge_pool(c, &lc->icomp, gl->icin, gl->ikeys, own->ikeys);
    free(kv);
}

static double *queries(Court *c, const Layer *l, const Mat *m, int heads, int n, bool norm) {
    Run *r = c->w.r;
    double *q = product(m, 0, heads * n, r->qr.x, r->qr.ld, c->w.T);
    for (int i = 0; i < c->w.T * heads; i++) {
        if (norm) rms(q + (size_t)i * n, NULL, n, c->w.cpu.c->norm_eps);
        rotate(q + (size_t)i * n, n, c->w.cpu.c->rope_dim, r->rows[i / heads].pos,
               c->w.cpu.inv_freq[l->ratio != 0], 1);
    }
    return q;
}

static void judge_query(Court *c, const Layer *lc, const Layer *lg) {
    Twin *w = &c->w;
    const Config *k = w->cpu.c;
    size_t n = (size_t)w->T * k->n_heads * k->head_dim,
           m = (size_t)w->T * k->index_heads * k->index_dim;
    double limit = product_limit(&lc->wq_b, w->T);
    w->cpu.op->attn_query(&w->cpu, lc);
    w->gpu->op->attn_query(w->gpu, lg);
    judge_bf16(c, "attn_query", limit, queries(c, lc, &lc->wq_b, k->n_heads, k->head_dim, true),
               w->g->qh, w->r->q, true, n);
    if (lc->ratio == 4)
        judge_bf16(c, "attn_query", limit,
                   queries(c, lc, &lc->iwq_b, k->index_heads, k->index_dim, false), w->g->iqh,
                   w->r->iq, true, m);
}

static const float *sorting;
static int by_score(const void *a, const void *b) {
    int i = *(const int *)a, j = *(const int *)b;
    return sorting[i] > sorting[j] ? -1 : sorting[i] < sorting[j] ? 1 : i - j;
}
static int by_index(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }

// Are chosen [k] the k best of score [n], ascending, ties to the lowest?
static bool best_of(const float *score, int n, int k, const int *chosen) {
    int *order = xalloc((size_t)n, sizeof *order);
    for (int i = 0; i < n; i++) order[i] = i;
    sorting = score;
    qsort(order, (size_t)n, sizeof *order, by_score);
    qsort(order, (size_t)k, sizeof *order, by_index);
    bool same = !memcmp(order, chosen, (size_t)k * sizeof *order);
    free(order);
    return same;
}

static void judge_index(Court *c, const Layer *lc, const Layer *lg, int i) {
    Twin *w = &c->w;
    Run *r = w->r;
    const Config *k = w->cpu.c;
    int I = k->index_heads, J = k->index_dim, top = k->index_topk,
        keys = n_visible(r->rows[w->T - 1].pos, 4);
    const bf16 *key = w->cpu.cache[0][i].ikeys;
    w->cpu.op->index_topk(&w->cpu, lc, i);
    w->gpu->op->index_topk(w->gpu, lg, i);
    if (w->g->score_rows < w->T || INDEX_SCORES / (size_t)(keys + 1) < (size_t)w->T)
        die(1, "too many scores for this test");
    for (int t = 0; t < w->T; t++) {
        int n = n_visible(r->rows[t].pos, 4);
        if (n <= top) continue;
        double *truth = xalloc((size_t)n, sizeof *truth);
        float *own = xalloc((size_t)n, sizeof *own),
              *gpu = from_gpu(c, w->g->scores + 4 * (size_t)w->g->score_ld * t, (size_t)n);
        for (int j = 0; j < n; j++) {
            for (int h = 0; h < I; h++) {
                double dot = 0;
                for (int d = 0; d < J; d++)
                    dot += (double)r->iq[((size_t)t * I + h) * J + d] *
                           f32_of_bf16(key[(size_t)j * J + d]);
                truth[j] += r->iw[(size_t)t * I + h] * fmax(dot, 0);
            }
            own[j] = (float)(r->iscore[(size_t)t * keys + j] *
                             sqrt((double)I * J));    // the GPU leaves out the common factor
        }
        judge("index_scores", EXACT, truth, NULL, own, gpu, (size_t)n);
        const int *chosen = twin_read(w, w->g->chosen + 4 * (size_t)t * top, 4 * (size_t)top);
        judge_exact("index_topk",
                    best_of(r->iscore + (size_t)t * keys, n, top, r->top + (size_t)t * top),
                    best_of(gpu, n, top, chosen));
        twin_give(w, w->g->chosen + 4 * (size_t)t * top, r->top + (size_t)t * top, 4 * (size_t)top);
        free(truth), free(own), free(gpu);
    }
}

// One row and head. P is rounded to BF16: each term may be off by 2^-8 of itself. Slack: all of
// that, or if less six standard deviations of as many independent roundings, so that one key too
// few among 8192 still shows.
static void attention(const Court *c, const Layer *l, int i, int t, int h, double *o,
                      double *slack) {
    const Config *k = c->w.cpu.c;
    const Run *r = c->w.r;
    const Cache *own = c->w.cpu.cache[0] + i;
    int K = k->head_dim, R = k->rope_dim, pos = r->rows[t].pos,
        window = pos + 1 < k->window ? pos + 1 : k->window;
    int visible = n_visible(pos, l->ratio),
        n = window + (l->ratio == 4 && visible > k->index_topk ? k->index_topk : visible);
    const float *q = r->q + ((size_t)t * k->n_heads + h) * K;
    double sum = exp(l->attn_sink[h]), *square = xalloc((size_t)K, sizeof *square);
    for (int d = 0; d < K; d++) o[d] = slack[d] = 0;
    for (int j = 0; j < n; j++) {
        int w = j - window;
        const bf16 *row =
            w < 0 ? (const bf16 *)own->win + (size_t)((pos + 1 + w) % c->w.cpu.ring) * K
                  : (const bf16 *)own->comp + (size_t)(l->ratio == 4 && visible > k->index_topk
                                                           ? r->top[(size_t)t * k->index_topk + w]
                                                           : w) *
                                                  K;
        double s = 0;
        for (int d = 0; d < K; d++) s += (double)q[d] * f32_of_bf16(row[d]);
        s = exp(s / sqrt(K));
        sum += s;
        for (int d = 0; d < K; d++) {
            double term = s * f32_of_bf16(row[d]);
            o[d] += term;
            slack[d] += fabs(term) * 0x1p-8;
            square[d] += term * term;
        }
    }
    for (int d = 0; d < K; d++) {
        o[d] /= sum;
        slack[d] = fmin(slack[d], 2.5 * 0x1p-8 * sqrt(square[d])) / sum;
    }
    free(square);
    rotate(o, K, R, pos, c->w.cpu.inv_freq[l->ratio != 0], -1);
    for (int d = K - R; d < K; d += 2) slack[d] = slack[d + 1] = hypot(slack[d], slack[d + 1]);
}

static void judge_attend(Court *c, const Layer *lc, const Layer *lg, int i) {
    Twin *w = &c->w;
    int H = w->cpu.c->n_heads, K = w->cpu.c->head_dim;
    size_t n = (size_t)w->T * H * K;
    double *o = xalloc(n, sizeof *o), *slack = xalloc(n, sizeof *slack);
    w->cpu.op->attend(&w->cpu, lc, i);
    w->gpu->op->attend(w->gpu, lg, i);
    for (int t = 0; t < w->T; t++)
        for (int h = 0; h < H; h++)
            attention(c, lc, i, t, h, o + ((size_t)t * H + h) * K, slack + ((size_t)t * H + h) * K);
    float *x = from_gpu(c, w->g->o.x, n);
    judge("attend", EXACT, o, slack, w->r->o.x, x, n);
    give_act(c, &w->g->o, &w->r->o, w->T);
    free(o), free(slack), free(x);
}

// Each device's second product is judged on its own hidden values: both roundings of a value near
// the middle are right.
static void judge_out(Court *c, const Layer *lc, const Layer *lg) {
    Twin *w = &c->w;
    Run *r = w->r;
    const Config *k = w->cpu.c;
    int G = k->o_groups, L = k->o_lora_rank, T = w->T, n = G * L;
    bool ints = integer_format(lc->wo_b.fmt);
    double *u = xalloc((size_t)T * n, sizeof *u), *slack = xalloc((size_t)T * n, sizeof *slack);
    w->cpu.op->attn_out(&w->cpu, lc);
    w->gpu->op->attn_out(w->gpu, lg);
    for (int g = 0; g < G; g++) {
        double *part = product(&lc->wo_a, g * L, L, r->o.x + (size_t)g * lc->wo_a.k, r->o.ld, T);
        for (int i = 0; i < T * L; i++) u[(size_t)(i / L) * n + g * L + i % L] = part[i];
        free(part);
    }
    float *gpu = ints ? xalloc((size_t)T * n, sizeof *gpu) : from_gpu(c, w->g->u.x, (size_t)T * n);
    float *scale = ints ? from_gpu(c, w->g->u.s, (size_t)T * n / 32) : NULL;
    const int8_t *q = ints ? twin_read(w, w->g->u.q, (size_t)T * n) : NULL;
    for (int i = 0; i < T * n && ints; i++) {
        gpu[i] = q[i] * scale[i / 32];
        slack[i] = scale[i / 32] * 0.5;
    }
    judge("attn_out, inner", product_limit(&lc->wo_a, T), u, slack, r->u.x, gpu, (size_t)T * n);
    float *y = from_gpu(c, w->g->y, (size_t)T * k->dim);
    double *own = product(&lc->wo_b, 0, k->dim, r->u.x, r->u.ld, T),
           *its = product(&lc->wo_b, 0, k->dim, gpu, (size_t)n, T);
    Verdict *v = find("attn_out", product_limit(&lc->wo_b, T));
    v->cpu = fmax(v->cpu, off_by(own, NULL, r->y, (size_t)T * k->dim));
    v->gpu = fmax(v->gpu, off_by(its, NULL, y, (size_t)T * k->dim));
    v->n++;
    twin_give(w, w->g->y, r->y, 4 * (size_t)T * k->dim);
    free(u), free(slack), free(gpu), free(scale), free(y), free(own), free(its);
}

// --- mixture of experts [7]

// ids and weights of one row from the scores z; false if the last place is too close to call.
static bool chosen_experts(const Config *c, const Layer *l, const double *z, int token, int *id,
                           double *weight_of) {
    double s[1024], rank[1024], sum = 0, gap = INFINITY;
    for (int e = 0; e < c->n_experts; e++) {
        s[e] = sqrt(log1p(exp(z[e])));
        rank[e] = l->gate_bias ? s[e] + l->gate_bias[e] : s[e];
    }
    for (int a = 0; a < c->n_active; a++) {
        int best = 0;
        double second = -INFINITY;
        for (int e = 1; e < c->n_experts; e++) if (rank[e] > rank[best]) best = e;
        for (int e = 0; e < c->n_experts; e++) if (e != best) second = fmax(second, rank[e]);
        gap = fmin(gap, rank[best] - second);
        id[a] = l->tid2eid ? (int)l->tid2eid[(size_t)token * c->n_active + a] : best;
        sum += s[id[a]];
        rank[best] = -INFINITY;
    }
    for (int a = 0; a < c->n_active; a++) weight_of[a] = s[id[a]] / sum * c->route_scale;
    return l->tid2eid || gap > 1e-4;
}

// y [D] += one expert's answer to x, times the weight.
static void expert(const Config *c, const Mat *w1, const Mat *w2, const Mat *w3, const float *x,
                   double times, double *y) {
    int F = c->expert_dim;
    double *g = product(w1, 0, F, x, 0, 1), *u = product(w3, 0, F, x, 0, 1);
    float *h = xalloc((size_t)F, sizeof *h);
    for (int i = 0; i < F; i++) {
        double a = fmin(g[i], c->swiglu_limit),
               b = fmax(fmin(u[i], c->swiglu_limit), -c->swiglu_limit);
        h[i] = (float)(a / (1 + exp(-a)) * b * times);
    }
    double *out = product(w2, 0, c->dim, h, 0, 1);
    for (int d = 0; d < c->dim; d++) y[d] += out[d];
    free(g), free(u), free(h), free(out);
}

static void judge_experts(Court *c, const Layer *lc, const Layer *lg) {
    Twin *w = &c->w;
    Run *r = w->r;
    const Config *k = w->cpu.c;
    int T = w->T, A = k->n_active, D = k->dim, E = k->n_experts;
    double *z = product(&lc->gate, 0, E, r->x.x, r->x.ld, T), *y = xalloc((size_t)T * D, sizeof *y);
    w->cpu.op->route(&w->cpu, lc);
    w->gpu->op->route(w->gpu, lg);
    w->cpu.op->experts(&w->cpu, lc);
    w->gpu->op->experts(w->gpu, lg);
    float *weights = from_gpu(c, w->g->r.weights, (size_t)T * A);
    const int *ids = twin_read(w, w->g->r.ids, 4 * (size_t)T * A);
    for (int t = 0; t < T; t++) {
        int id[32];
        double times[32];
        if (!chosen_experts(k, lc, z + (size_t)t * E, r->rows[t].token, id, times))
            memcpy(id, r->expert + t * A, 4 * (size_t)A);
        else
            judge_exact("route", !memcmp(id, r->expert + t * A, 4 * (size_t)A),
                        !memcmp(id, ids + t * A, 4 * (size_t)A));
        judge("route, weights", 1e-5, times, NULL, r->weight + t * A, weights + t * A, (size_t)A);
        const float *x = r->x.x + t * r->x.ld;
        for (int a = 0; a < A; a++)
            expert(k, &lc->w1[id[a]], &lc->w2[id[a]], &lc->w3[id[a]], x, r->weight[t * A + a],
                   y + (size_t)t * D);
        expert(k, &lc->sw1, &lc->sw2, &lc->sw3, x, 1, y + (size_t)t * D);
    }
    judge_both(c, "experts", FLIP, y, w->g->y, r->y, (size_t)T * D);
    free(z), free(weights);
}

// --- ends [1, 10]

static void judge_head(Court *c, const Weights *wc, const Weights *wg) {
    Twin *w = &c->w;
    const Config *k = w->cpu.c;
    int T = w->T, V = k->vocab, D = k->dim, S = k->hc_mult;
    float *own = xalloc((size_t)T * V, sizeof *own), *gpu = xalloc((size_t)T * V, sizeof *gpu),
          *x = xalloc((size_t)T * D, sizeof *x);
    double *y = xalloc((size_t)D, sizeof *y);
    int *want = xalloc((size_t)T, sizeof *want);
    for (int t = 0; t < T; t++) {
        want[t] = t;
        hyper(k, &wc->hc_head, wc->norm, c->X + (size_t)t * S * D, false, y, NULL, NULL);
        for (int d = 0; d < D; d++) x[(size_t)t * D + d] = (float)y[d];
    }
    w->cpu.op->head(&w->cpu, &wc->hc_head, wc->norm, want, T, own);
    w->gpu->op->head(w->gpu, &wg->hc_head, wg->norm, want, T, gpu);
    double *truth = product(&wc->head, 0, V, x, (size_t)D, T);
    judge("head", product_limit(&wc->head, T), truth, NULL, own, gpu, (size_t)T * V);
    free(own), free(gpu), free(x), free(y), free(want), free(truth);
}

static void judge_mtp(Court *c, const Mtp *mc, const Mtp *mg) {
    Twin *w = &c->w;
    const Config *k = w->cpu.c;
    int T = w->T, D = k->dim, S = k->hc_mult;
    float *e = xalloc((size_t)T * D, sizeof *e), *h = xalloc((size_t)T * S * D, sizeof *h);
    double *row = xalloc((size_t)D, sizeof *row);
    for (int i = 0; i < T * (S + 1); i++) {
        bool stream = i < T * S;
        int t = i - T * S;
        for (int d = 0; d < D; d++)
            row[d] = stream ? w->r->X[(size_t)i * D + d]
                            : weight(&w->cpu.w.embed, w->r->rows[t].next, d);
        rms(row, stream ? mc->hnorm : mc->enorm, D, k->norm_eps);
        for (int d = 0; d < D; d++)
            *(stream ? h + (size_t)i * D + d : e + (size_t)t * D + d) = (float)row[d];
    }
    double *a = product(&mc->e_proj, 0, D, e, (size_t)D, T),
           *b = product(&mc->h_proj, 0, D, h, (size_t)D, T * S);
    for (int i = 0; i < T * S * D; i++) c->X[i] = b[i] + a[(size_t)(i / (S * D)) * D + i % D];
    w->cpu.op->mtp_in(&w->cpu, mc);
    w->gpu->op->mtp_in(w->gpu, mg);
    judge_streams(c, "mtp_in", product_limit(&mc->h_proj, T));
    free(e), free(h), free(row), free(a), free(b);
}

// --- cases

typedef struct {
    const char *name;
    Format dense, expert;
    int layers;                 // bits: ratio 0, 4, 128
    bool ends;                  // head and draft layer too
    int rows[14], pos[14];      // batches: rows, first position; rows = 0 ends
    Config c;
} Case;

#define COMMON .vocab = 300, .max_ctx = 1 << 20, .hc_iters = 20, .hc_eps = 1e-6f, \
    .norm_eps = 1e-6f, .route_scale = 1.5f, .rope_theta = 1e4f, .compress_theta = 1.6e5f, \
    .yarn_factor = 16, .yarn_beta_fast = 32, .yarn_beta_slow = 1, .yarn_ctx = 512
#define EDGES COMMON, .dim = 192, .n_heads = 6, .head_dim = 96, .rope_dim = 32, \
    .q_lora_rank = 96, .o_groups = 3, .o_lora_rank = 32, .window = 8, .n_experts = 5, \
    .n_active = 3, .expert_dim = 96, .index_heads = 8, .index_dim = 64, .index_topk = 12, \
    .swiglu_limit = 3, .hc_mult = 4
#define WIDE COMMON, .dim = 288, .n_heads = 33, .head_dim = 160, .rope_dim = 64, \
    .q_lora_rank = 160, .o_groups = 3, .o_lora_rank = 96, .window = 128, .n_experts = 300, \
    .n_active = 6, .expert_dim = 32, .index_heads = 70, .index_dim = 96, .index_topk = 32, \
    .swiglu_limit = 10
#define LONG_HEADS COMMON, .dim = 64, .n_heads = 18, .head_dim = 512, .rope_dim = 64, \
    .q_lora_rank = 32, .o_groups = 2, .o_lora_rank = 32, .window = 16, .n_experts = 4, \
    .n_active = 2, .expert_dim = 32, .index_heads = 3, .index_dim = 32, .index_topk = 12, \
    .swiglu_limit = 10
#define SMALL COMMON, .dim = 64, .n_heads = 2, .head_dim = 64, .rope_dim = 32, \
    .q_lora_rank = 32, .o_groups = 1, .o_lora_rank = 32, .n_experts = 4, .n_active = 2, \
    .expert_dim = 32, .index_heads = 3, .index_dim = 32, .swiglu_limit = 10

// Formats: dense, experts.
static const Case cases[] = {
    { "ragged rows, INT4 and INT8", W_INT8, W_INT4, 7, true,
      { 1, 2, 3, 5, 7, 8, 9, 15, 17, 33 }, { 127, 254, 381, 507, 121, 1016, 60, 500, 120, 240 },
      { EDGES } },
    { "ragged rows, FP4 and FP8", W_FP8, W_FP4, 7, true,
      { 1, 4, 6, 8, 16, 31 }, { 127, 125, 700, 0, 0, 97 }, { EDGES } },
    { "33 heads of 160, 300 experts, 3 streams", W_INT8, W_FP4, 2, true,
      { 1, 5, 20 }, { 1023, 511, 333 }, { WIDE, .hc_mult = 3 } },
    { "one stream, 18 heads of 512", W_INT8, W_INT4, 1, true,
      { 1, 3, 9 }, { 5, 8, 0 }, { LONG_HEADS, .hc_mult = 1 } },
    { "16 streams", W_INT8, W_INT4, 1, true,
      { 1, 3, 9 }, { 5, 7, 0 }, { SMALL, .window = 16, .index_topk = 12, .hc_mult = 16 } },
    { "511, 512, 513 index keys and the choice of 511", W_INT8, W_INT4, 2, false,
      { 9, 8 }, { 2042, 2044 }, { SMALL, .window = 128, .index_topk = 511, .hc_mult = 2 } },
    { "8191, 8192, 8193 index keys", W_INT8, W_INT4, 2, false,
      { 6, 9 }, { 32766, 32763 }, { SMALL, .window = 128, .index_topk = 512, .hc_mult = 2 } },
    { "511, 512, 513 rows attended to: chosen", W_INT8, W_INT4, 2, false,
      { 8, 9 }, { 1532, 1531 }, { SMALL, .window = 128, .index_topk = 512, .hc_mult = 2 } },
    { "511, 512, 513 rows attended to: a window", W_INT8, W_INT4, 1, false,
      { 4, 9 }, { 510, 507 }, { SMALL, .window = 513, .index_topk = 12, .hc_mult = 2 } },
    { "511, 512, 513 and 8191, 8192, 8193 rows attended to: all", W_INT8, W_INT4, 4, false,
      { 2, 2, 2, 9, 2, 9 }, { 49150, 49278, 1032190, 49278, 1032318, 1032190 },
      { SMALL, .window = 128, .index_topk = 12, .hc_mult = 2 } },
};

static void hold_court(const Case *k, int T, int pos, Pool *pool) {
    Toy *m = toy_new(&k->c, k->dense, k->expert);
    Device gpu = { 0 };
    Court c = { .w = { .gpu = &gpu, .T = T, .state = 1 } };
    Twin *w = &c.w;
    size_t n = (size_t)T * m->c.hc_mult * m->c.dim;
    Row rows[64];
    int64_t *table = (int64_t *)m->w.layers[0].tid2eid;
    for (int i = 0; i < m->c.vocab * m->c.n_active; i++)
        if (i / m->c.n_active % 3 == 0) table[i] = 1;           // one expert, all slots
    toy_device(&gpu, m, "cuda:0", T, pos + T > 256 ? pos + T : 256);
    w->cpu = gpu;
    cpu_device(&w->cpu, pool);
    cuda_device(&gpu, 0);
    w->r = w->cpu.impl;
    w->g = gpu.impl;
    w->g->keep_floats = true;
    w->cpu.op->cache_new(&w->cpu, 0);
    gpu.op->cache_new(&gpu, 0);
    for (int t = 0; t < T; t++)
        rows[t] = (Row){ (t * 7 + 3) % k->c.vocab, 0, pos + t, (t * 5 + 1) % k->c.vocab };
    w->cpu.op->begin(&w->cpu, rows, T);
    w->gpu->op->begin(w->gpu, rows, T);
    judge_frequencies(&w->cpu);
    w->cpu.op->embed(&w->cpu);
    w->gpu->op->embed(w->gpu);
    c.X = xalloc(n, sizeof *c.X);
    for (size_t i = 0; i < n; i++)
        c.X[i] = weight(&m->w.embed, rows[i / (size_t)(m->c.hc_mult * m->c.dim)].token,
                        (int)(i % (size_t)m->c.dim));
    judge_streams(&c, "embed", 1e-30);
    for (size_t i = 0; i < n; i++) c.X[i] = w->r->X[i] = random_signed(&w->state);
    twin_give(w, w->g->X, w->r->X, 4 * n);
    for (int i = 0; i < 3; i++) {
        const Layer *lc = &m->w.layers[i], *lg = &w->gpu->w.layers[i];
        if (!(k->layers >> i & 1)) continue;
        twin_past(w, lc, i, pos);
        judge_pre(&c, &lc->hc_attn, &lg->hc_attn, lc->attn_norm, lg->attn_norm);
        judge_project(&c, lc, lg, i);
        judge_latent(&c, lc, lg, i);
        judge_query(&c, lc, lg);
        if (lc->ratio == 4) judge_index(&c, lc, lg, i);
        judge_attend(&c, lc, lg, i);
        judge_out(&c, lc, lg);
        sublayer_done(&c);
        judge_pre(&c, &lc->hc_ffn, &lg->hc_ffn, lc->ffn_norm, lg->ffn_norm);
        judge_experts(&c, lc, lg);
        sublayer_done(&c);
    }
    if (k->ends) {
        judge_head(&c, &m->w, &w->gpu->w);
        judge_streams(&c, "hc_post", EXACT);
        judge_mtp(&c, m->w.mtp, w->gpu->w.mtp);
    }
    w->cpu.op->cache_free(&w->cpu, 0);
    cuda_close(&gpu);
}

int main(int argc, char **argv) {
    int passed = 0, failed = 0;
    Pool *pool = pool_new(2);
    cpu_init();
    for (size_t i = 0; i < COUNT(cases); i++) {
        if (argc > 1 && atoi(argv[1]) != (int)i) continue;
        memset(verdict, 0, sizeof verdict);
        for (int j = 0; j < 14 && cases[i].rows[j]; j++)
            hold_court(&cases[i], cases[i].rows[j], cases[i].pos[j], pool);
        printf("%s\n", cases[i].name);
        for (Verdict *v = verdict; v->name; v++) {
            bool ok = v->cpu <= v->limit && v->gpu <= v->limit;
            printf("  %-4s %-16s CPU %.1e, GPU %.1e (limit %.0e), %d comparisons\n",
                   ok ? "ok" : "FAIL", v->name, v->cpu, v->gpu, v->limit, v->n);
            *(ok ? &passed : &failed) += 1;
        }
        fflush(stdout);
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
