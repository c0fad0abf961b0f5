// The self-test's judgement: see cuda.h. What runs is in dsv4.c.
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "cuda.h"

enum { MARGIN = 10 };       // at start: real shapes sum more; what is broken is off by far more

// BF16, rounded to nearest even.
static float float_of_half(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    return memcpy(&f, &u, 4), f;
}

static uint16_t half_of_float(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// The operations; in brackets: their kernels, where the names differ.
static const char *const names[N_CHECKS] = {
    "embed", "hc_post (hc_mix)", "hc_pre (hc_mix, hc_norm)", "quantise",
    "attn_project (gemv, gemm)", "attn_latent", "compress (attn_latent)",
    "attn_query (gemv, gemm, query_norm)", "index_scores", "index_topk", "attend (attend_combine)",
    "attn_out (gemv, gemm)", "route (gemv, gemm)", "experts (ffn_in, expert_up, expert_down)",
    "head (hc_norm, gemv, gemm)", "mtp_in (mtp_norm, gemv, gemm)",
};

void trial_note(Trial *t, const char *op, double error, double limit) {
    int i = 0;
    size_t n = strlen(op);
    while (strncmp(names[i], op, n) || (names[i][n] && names[i][n] != ' ')) i++;
    GpuCheck *p = &t->list[i];
    if (!(error < 1e30)) error = 1e30;                  // NaN too
    double share = error / fmax(limit, 1e-30);
    if (!p->n++ || share > p->share)
        *p = (GpuCheck){ names[i], error, limit, share, *t->g->at, t->rows, p->n };
}

double deviation(const float *gpu, const float *cpu, size_t n, double slack) {
    double worst = 0, square = 1e-30;
    for (size_t i = 0; i < n; i++) {
        double diff = fabs((double)gpu[i] - cpu[i]) - slack * fabs((double)gpu[i]);
        worst = diff <= worst ? worst : diff;
        square += (double)cpu[i] * cpu[i];
    }
    return worst / sqrt(square / n);
}

void trial_compare(Trial *t, const char *op, CuPtr gpu, bool halves, const float *cpu, size_t n,
                   double limit) {
    float *x = xalloc(n, sizeof *x);
    uint16_t *h = xalloc(n, sizeof *h);
    gpu_copy_out(t->g, halves ? (void *)h : x, gpu, n * (halves ? 2 : 4));
    gpu_wait(t->g);
    for (size_t i = 0; i < n && halves; i++) {
        x[i] = float_of_half(h[i]);
        h[i] = half_of_float(cpu[i]);
    }
    trial_note(t, op, deviation(x, cpu, n, halves ? 0x1p-7 : 0), limit);
    gpu_copy_in(t->g, gpu, halves ? (const void *)h : cpu, n * (halves ? 2 : 4));
    gpu_wait(t->g);
    free(x), free(h);
}

bool gpu_passed(const Gpu *g, uint64_t *key) {
    char uuid[16] = "";
    int driver = 0;
    CU(g, DriverGetVersion, &driver);
    CU(g, DeviceGetUuid, uuid, g->dev);
    *key = hash64(hash64(*key, uuid, sizeof uuid), &driver, sizeof driver);
    *key = hash64(*key, &g->ptx, sizeof g->ptx);
    char *before = cache_get("passed", *key);
    free(before);
    return before;
}

bool gpu_verdict(const Gpu *g, uint64_t key, const GpuCheck *list, bool last, double start) {
    const GpuCheck *p = list, *end = list + N_CHECKS;
    char name[100] = "";
    CU(g, DeviceGetName, name, sizeof name, g->dev);
    while (p < end && p->share <= MARGIN) p++;
    if (p < end && last)
        die(1, "%s: self-test: %s is off by %.1e of its size in %s at %d rows (limit %.0e): do not "
            "trust this GPU (%s) with this driver", g->name, p->name, p->error, p->at, p->rows,
            p->limit * MARGIN, name);
    if (p < end) return false;
    note("%s: self-test passed in %.2f s", g->name, now() - start);
    cache_put("passed", key, name);
    return true;
}
