// dsv4 devices: the bring-up report, what a person with a new card runs first.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "cuda.h"

// Prints each operation's worst deviation from the CPU's; returns the number out of bounds.
static int report_checks(const Model *m, Device *d) {
    GpuCheck list[N_CHECKS] = { 0 };
    int bad = 0;
    gpu_check(m, d, list);
    for (int i = 0; i < N_CHECKS; i++) {
        const GpuCheck *p = &list[i];
        if (!p->n) continue;
        bad += p->share > 1;
        printf("  %-4s %-42s deviation %.1e, limit %.0e\n", p->share > 1 ? "BAD" : "ok", p->name,
               p->error, p->limit);
    }
    return bad;
}

enum { TIMES = 10, HAND_OFF = 64 << 10 };       // repetitions; bytes of a row between stages

// Bytes per second of pinned copies.
static double copy_rate(Gpu *g, CuPtr dev, void *host, size_t bytes, bool to_host) {
    gpu_lap(g);
    for (int i = 0; i < TIMES; i++)
        if (to_host) gpu_copy_out(g, host, dev, bytes);
        else gpu_copy_in(g, dev, host, bytes);
    return (double)bytes * TIMES / gpu_lap(g);
}

static void report_copies(Gpu *g) {
    size_t bytes = 64 << 20;
    CuPtr dev = gpu_keep(g, bytes, "test data");
    void *host = memset(gpu_pinned(g, bytes), 0, bytes);
    printf("  copy to the GPU      %7.1f GB/s\n", copy_rate(g, dev, host, bytes, false) / 1e9);
    printf("  copy to the host     %7.1f GB/s\n", copy_rate(g, dev, host, bytes, true) / 1e9);
}

// A row goes from one GPU to the other and back, through one pinned buffer: do its bytes arrive?
static bool report_hop(Gpu *a, Gpu *b) {
    Gpu *at[] = { a, b };
    CuPtr dev[2];
    bool whole = true;
    for (int i = 0; i < 2; i++) {
        CU(at[i], CtxSetCurrent, at[i]->ctx);
        dev[i] = gpu_keep(at[i], HAND_OFF, "a row");
    }
    unsigned char *row = gpu_pinned(a, HAND_OFF), *sent = xalloc(HAND_OFF, 1);
    for (uint32_t i = 0; i < HAND_OFF; i++) row[i] = sent[i] = (i * 2654435761u) >> 24;
    double start = now();
    for (int i = 0; i < 4 * TIMES; i++) {
        Gpu *g = at[i % 2];
        CU(g, CtxSetCurrent, g->ctx);
        gpu_copy_in(g, dev[i % 2], row, HAND_OFF);
        gpu_copy_out(g, row, dev[i % 2], HAND_OFF);
        gpu_wait(g);
    }
    double t = (now() - start) / (4 * TIMES);
    for (int i = 0; i < 2; i++) {       // a copy that does nothing leaves what was there
        Gpu *g = at[i];
        CU(g, CtxSetCurrent, g->ctx);
        memcpy(row, sent, HAND_OFF);
        gpu_copy_in(g, dev[i], row, HAND_OFF);
        gpu_wait(g);
        memset(row, 0, HAND_OFF);
        gpu_copy_out(g, row, dev[i], HAND_OFF);
        gpu_wait(g);
        whole &= !memcmp(row, sent, HAND_OFF);
    }
    printf("  %s to %s   %.0f us a row on this host, bytes %s\n", a->name, b->name, t * 1e6,
           whole ? "arrive whole" : "DIFFER");
    free(sent);
    return whole;
}

// GB/s of weights streaming through the products, shapes of the real model.
static void report_products(Device *d) {
    static const struct { const char *name; int bytes, n, k; } shape[] = {
        { "wq_b, INT8", 1, 32768, 1024 }, { "wo_b, INT8", 1, 4096, 8192 },
        { "head, BF16", 2, 16384, 4096 } };
    for (int i = 0; i < 3; i++) {
        int n = shape[i].n, k = shape[i].k;
        double weights = (double)shape[i].bytes * n * k;
        for (int rows = 1; rows <= 8; rows *= 8) {
            double t = gpu_product_time(d, shape[i].bytes, n, k, rows);
            printf("  %-12s %d row%s %7.1f GB/s, %.1f us\n", shape[i].name, rows,
                   rows > 1 ? "s" : " ", weights / t / 1e9, t * 1e6);
        }
    }
}

// Without a GPU the kernels are made for GPUs elsewhere.
static void report_kernels(const Model *m) {
    for (int cc = 80; cc <= 86; cc += 6) {
        char *path = gpu_kernels(m, cc);
        printf("kernels for compute capability %d.%d%s: %s\n", cc / 10, cc % 10,
               cc == 86 ? " and newer" : "", path ? path : "not kept: no directory for them");
        free(path);
    }
}

// Facts, then for every GPU the self-test, rates and the hand-off from the one before, on the first
// layers of a model. named: it is not the built-in one. Returns the exit code: 1 if something is
// wrong.
int devices(const char *dir, bool named) {
    enum { ROWS = 72 };             // of a batch: the tiles' kernels too
    int n = cuda_facts(), bad = 0;
    Device *before = NULL;
    if (!n && !named) return 1;
    Model *m = model_read(&(Opening){ .dir = dir, .devices = "cpu", .chunk = ROWS });
    if (!n) return report_kernels(m), 0;
    for (int i = 0; i < n; i++) {
        Device *d = gpu_open(m, i);
        printf("cuda:%d, %.1f GB free\n", i, (double)cuda_memory(i) / 1e9);
        bad += report_checks(m, d);
        report_copies(gpu_of(d));
        report_products(d);
        if (before) {
            bad += !report_hop(gpu_of(before), gpu_of(d));
            gpu_close(before);
        }
        before = d;
    }
    gpu_close(before);
    printf(bad ? "%d checks failed: do not trust this machine\n"
               : "all operations agree with the CPU\n", bad);
    return bad != 0;
}
