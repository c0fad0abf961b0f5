// dsv4 devices: the bring-up report, what a person with a new card runs first.
#include <stdio.h>
#include <stdlib.h>
#include "cuda.h"

// Prints each operation's worst deviation from the CPU's; returns the number out of bounds.
static int report_checks(const Model *m, Device *d) {
    GpuCheck *list;
    int n = gpu_check(m, d, &list), bad = 0;
    for (int i = 0; i < n; i++) {
        const GpuCheck *p = &list[i];
        if (!p->n) continue;
        bad += p->share > 1;
        printf("  %-4s %-42s deviation %.1e, limit %.0e\n", p->share > 1 ? "BAD" : "ok", p->name,
               p->error, p->limit);
    }
    free(list);
    return bad;
}

// GB/s of pinned copies and of weights streaming through the products, shapes of the real model.
static void report_rates(Device *d) {
    static const struct { const char *name; int bytes, n, k; } shape[] = {
        { "wq_b, INT8", 1, 32768, 1024 }, { "wo_b, INT8", 1, 4096, 8192 },
        { "head, BF16", 2, 16384, 4096 } };
    printf("  copy to the GPU      %7.1f GB/s\n", gpu_copy_rate(d, false) / 1e9);
    printf("  copy to the host     %7.1f GB/s\n", gpu_copy_rate(d, true) / 1e9);
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
    int n = cuda_facts(), bad = 0;
    Device *before = NULL;
    if (!n && !named) return 1;
    Model *m = gpu_model(dir);
    if (!n) return report_kernels(m), 0;
    for (int i = 0; i < n; i++) {
        Device *d = gpu_open(m, i);
        printf("cuda:%d, %.1f GB free\n", i, (double)cuda_memory(i) / 1e9);
        bad += report_checks(m, d);
        report_rates(d);
        if (before) {
            bool whole;
            double t = gpu_hop(before, d, &whole);
            printf("  cuda:%d to cuda:%d   %.0f us a row on this host, bytes %s\n", i - 1, i,
                   t * 1e6, whole ? "arrive whole" : "DIFFER");
            bad += !whole;
            gpu_close(before);
        }
        before = d;
    }
    gpu_close(before);
    printf(bad ? "%d checks failed: do not trust this machine\n"
               : "all operations agree with the CPU\n", bad);
    return bad != 0;
}
