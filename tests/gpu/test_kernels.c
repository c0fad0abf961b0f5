// Every operation of the GPU against the CPU's on identical inputs, over shapes with edges.
//   cc -std=gnu11 -I. -o test_kernels tests/gpu/test_kernels.c -ldl -lm     (run from the top folder; LD_LIBRARY_PATH: the device)
// Prints the worst deviation of each operation and 'N passed, N failed'.
#define DSV4_NO_MAIN
#include "dsv4.c"
#include "tests/gpu/toy.h"

typedef struct {
    const char *name;
    Format dense, expert;
    Config c;
    int T[8], pos[8];           // batches: rows, first position; T = 0 ends
} Case;

#define COMMON .vocab = 300, .max_ctx = 1 << 20, .hc_mult = 4, .hc_iters = 20, .hc_eps = 1e-6f, .norm_eps = 1e-6f, \
    .route_scale = 1.5f, .rope_theta = 1e4f, .compress_theta = 1.6e5f, .yarn_factor = 16, .yarn_beta_fast = 32, \
    .yarn_beta_slow = 1, .yarn_ctx = 512

static const Case cases[] = {
    { "edges, INT4 and INT8", W_INT8, W_INT4,
      { COMMON, .dim = 192, .n_heads = 6, .head_dim = 96, .rope_dim = 32, .q_lora_rank = 96, .o_groups = 3,
        .o_lora_rank = 32, .window = 8, .n_experts = 5, .n_active = 3, .expert_dim = 96, .index_heads = 8,
        .index_dim = 64, .index_topk = 12, .swiglu_limit = 3 },
      { 1, 2, 3, 8, 9, 65, 130 }, { 700, 127, 511, 1020, 250, 300, 0 } },
    { "edges, FP4 and FP8", W_FP8, W_FP4,
      { COMMON, .dim = 192, .n_heads = 6, .head_dim = 96, .rope_dim = 32, .q_lora_rank = 96, .o_groups = 3,
        .o_lora_rank = 32, .window = 8, .n_experts = 5, .n_active = 3, .expert_dim = 96, .index_heads = 8,
        .index_dim = 64, .index_topk = 12, .swiglu_limit = 3 },
      { 1, 2, 4, 7, 9, 70 }, { 127, 0, 1000, 505, 250, 60 } },
    { "a head of 160, 33 heads, 40 experts", W_INT8, W_FP4,
      { COMMON, .dim = 288, .n_heads = 33, .head_dim = 160, .rope_dim = 64, .q_lora_rank = 160, .o_groups = 3,
        .o_lora_rank = 96, .window = 128, .n_experts = 40, .n_active = 6, .expert_dim = 160, .index_heads = 13,
        .index_dim = 96, .index_topk = 32, .swiglu_limit = 10 },
      { 1, 5, 20 }, { 1023, 511, 333 } },
    { "rows long enough to be shared by warps", W_INT8, W_INT4,
      { COMMON, .dim = 2080, .n_heads = 8, .head_dim = 512, .rope_dim = 64, .q_lora_rank = 1056, .o_groups = 2,
        .o_lora_rank = 64, .window = 8, .n_experts = 6, .n_active = 3, .expert_dim = 1120, .index_heads = 4,
        .index_dim = 64, .index_topk = 12, .swiglu_limit = 3 },
      { 1, 8 }, { 127, 60 } },
    { "the same in FP4 and FP8", W_FP8, W_FP4,
      { COMMON, .dim = 1056, .n_heads = 4, .head_dim = 512, .rope_dim = 64, .q_lora_rank = 1024, .o_groups = 1,
        .o_lora_rank = 32, .window = 8, .n_experts = 4, .n_active = 2, .expert_dim = 576, .index_heads = 4,
        .index_dim = 64, .index_topk = 12, .swiglu_limit = 3 },
      { 2 }, { 127 } },
    { "long context, top 512", W_INT8, W_INT4,
      { COMMON, .dim = 64, .n_heads = 4, .head_dim = 64, .rope_dim = 32, .q_lora_rank = 32, .o_groups = 1,
        .o_lora_rank = 32, .window = 128, .n_experts = 4, .n_active = 2, .expert_dim = 32, .index_heads = 4,
        .index_dim = 32, .index_topk = 512, .swiglu_limit = 10 },
      { 8, 6, 6, 1, 9 }, { 2044, 8190 * 4, 32766 * 4, 4 * 65537, 2050 * 4 } },
};

// 40 steps of one row each, across the first choice by the indexer; logits [40, V].
static float *decode(bool graphs) {
    Toy *m = toy_new(&cases[0].c, W_INT8, W_INT4);
    Device d = { 0 };
    size_t V = (size_t)m->c.vocab;
    float *logits = xalloc(40 * V, sizeof *logits);
    cuda_graphs = graphs;
    m->c.n_mtp = 0;
    m->w.mtp = NULL;
    toy_device(&d, m, "cuda:0", 8, 256);
    cuda_device(&d, 0);
    d.op->cache_new(&d, 0);
    for (int t = 0; t < 110; t++) {
        Row row = { t * 7 % 300, 0, t, 0 };
        d.op->begin(&d, &row, 1);
        d.op->embed(&d);
        for (int i = 0; i < 3; i++) {
            const Layer *l = &d.w.layers[i];
            d.op->hc_pre(&d, &l->hc_attn, l->attn_norm);
            d.op->attn_project(&d, l);
            d.op->attn_latent(&d, l, i);
            d.op->attn_query(&d, l);
            if (l->ratio == 4) d.op->index_topk(&d, l, i);
            d.op->attend(&d, l, i);
            d.op->attn_out(&d, l);
            d.op->hc_post(&d);
            d.op->hc_pre(&d, &l->hc_ffn, l->ffn_norm);
            d.op->route(&d, l);
            d.op->experts(&d, l);
            d.op->hc_post(&d);
        }
        if (t >= 70) d.op->head(&d, &d.w.hc_head, d.w.norm, &(int){ 0 }, 1, logits + (size_t)(t - 70) * V);
    }
    cuda_close(&d);
    cuda_graphs = false;
    return logits;
}

int main(int argc, char **argv) {
    int passed = 0, failed = 0;
    Pool *pool = pool_new(2);
    cpu_init();
    for (size_t i = 0; i < COUNT(cases); i++) {
        const Case *k = &cases[i];
        GpuCheck list[N_CHECKS] = { 0 };
        if (argc > 1 && atoi(argv[1]) != (int)i) continue;
        Toy *m = toy_new(&k->c, k->dense, k->expert);
        for (int j = 0; j < 8 && k->T[j]; j++) {
            Device d = { 0 };
            int end = k->pos[j] + k->T[j];
            toy_device(&d, m, "cuda:0", k->T[j], end > 256 ? end : 256);
            cuda_device(&d, 0);
            cuda_parity(&d, &m->w, pool, k->T[j], k->pos[j], 1, list);
            cuda_close(&d);
        }
        printf("%s\n", k->name);
        for (int j = 0; j < N_CHECKS; j++) {
            const GpuCheck *p = &list[j];
            if (!p->n) continue;
            printf("  %-4s %-42s %.2e (limit %.0e), %d comparisons\n", p->share <= 1 ? "ok" : "FAIL", p->name,
                   p->error, p->limit, p->n);
            *(p->share <= 1 ? &passed : &failed) += 1;
        }
    }
    if (argc != 2 || !strcmp(argv[1], "graphs")) {
        bool same = !memcmp(decode(false), decode(true), 40 * 300 * sizeof(float));
        printf("%s: decode by replayed graphs gives the same bits\n", same ? "ok" : "FAIL");
        *(same ? &passed : &failed) += 1;
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
