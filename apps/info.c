// dsv4 info: what a checkpoint holds, its formats, memory, and where its layers would go.
#include <stdio.h>
#include "dsv4.h"

// Bytes of compressed rows that one token adds, over all layers.
static double bytes_per_token(const ModelBrief *b) {
    const Config *c = b->config;
    double n = 0;
    for (int i = 0; i < c->n_layers; i++) {
        int M = c->ratio[i];
        if (M) n += (double)(b->number * c->head_dim) / M;
        if (M == 4) n += (double)(b->number * c->index_dim) / M;
    }
    return n;
}

int run_info(void) {
    Model *m = model_read(&opt.open);
    ModelBrief b = model_brief(m);
    const Config *c = b.config;
    double per_token = bytes_per_token(&b), stored = 0;
    for (size_t i = 0; i < b.store->n; i++) stored += (double)b.store->tensors[i].bytes;
    printf("model      %d layers, dim %d, %d heads x %d (rope %d), window %d, vocabulary %d, "
           "context %d\n", c->n_layers, c->dim, c->n_heads, c->head_dim, c->rope_dim, c->window,
           c->vocab, c->max_ctx);
    printf("experts    %d, %d per token, hidden %d; the first %d layers choose by token\n",
           c->n_experts, c->n_active, c->expert_dim, c->n_hash_layers);
    printf("indexer    %d heads x %d, keeps %d rows; hyper-connections: %d streams\n",
           c->index_heads, c->index_dim, c->index_topk, c->hc_mult);
    printf("checkpoint %zu tensors in %d files, %.2f GB, quant_method %s\n", b.store->n,
           b.store->n_shards, stored / 1e9, *c->quant ? c->quant : "none");
    for (int i = 0; i < N_FORMATS; i++)
        if (b.formats[i]) printf("  %-18s %6d matrices\n", format_names[i], b.formats[i]);
    for (int i = 0; i < c->n_layers + (b.mtp ? c->n_mtp : 0); i++) {
        LayerBrief l = layer_brief(m, i);
        printf("  %-9s ratio %-3d  %-6s  %9.2f MB  experts %s, attention %s\n", l.name, l.ratio,
               l.hashed ? "hashed" : "scored", (double)l.bytes / 1e6, l.experts, l.attention);
    }
    printf("memory     %.3f GB of weights read per token; context: %.0f bytes per token (%.2f MB "
           "per 1024), %.1f MB of rings per session\n", b.touched / 1e9, per_token,
           per_token * 1024 / 1e6, ((double)b.context - per_token * b.ctx) / 1e6);
    print_plan(m, stdout);
    return 0;
}
