// The layers of the real model, one of each kind, with random weights, on the simulated GPU: counters per kernel.
//   real_shapes OUT_DIR [quick]      (LD_LIBRARY_PATH: the simulated device; writes OUT_DIR/<ratio>-<rows>-<context>.json)
// 16 experts instead of 256 and an eighth of the vocabulary: computed.py scales what depends on them.
#define DSV4_NO_MAIN
#include "dsv4.c"
#include <dlfcn.h>
#include "tests/gpu/toy.h"

static const Config real = {
    .dim = 4096, .n_heads = 64, .head_dim = 512, .rope_dim = 64, .q_lora_rank = 1024, .o_groups = 8, .o_lora_rank = 1024,
    .window = 128, .n_experts = 16, .n_active = 6, .expert_dim = 2048, .index_heads = 64, .index_dim = 128, .index_topk = 512,
    .swiglu_limit = 10, .vocab = 16160, .max_ctx = 1 << 20, .hc_mult = 4, .hc_iters = 20, .hc_eps = 1e-6f, .norm_eps = 1e-6f,
    .route_scale = 1.5f, .rope_theta = 1e4f, .compress_theta = 1.6e5f, .yarn_factor = 16, .yarn_beta_fast = 32,
    .yarn_beta_slow = 1, .yarn_ctx = 65536,
};

static void (*reset_counters)(void);
static int (*write_report)(const char *path);

static void save(Device *d, const char *dir, const char *what, int T, int ctx) {
    char path[4096];
    gpu_wait(d->impl);
    snprintf(path, sizeof path, "%s/%s-%d-%d.json", dir, what, T, ctx);
    if (write_report(path)) die(1, "cannot write %s", path);
}

static void layer(Device *d, Toy *m, int i, int T, int ctx, const char *dir) {
    static const char *name[] = { "0", "4", "128" };
    const Layer *l = &d->w.layers[i];
    Cuda *g = d->impl;
    Row rows[512];
    float *X = toy_vec(m, (size_t)T * 4 * 4096, 0, 1);
    for (int t = 0; t < T; t++) rows[t] = (Row){ t, 0, ctx - T + t, 0 };
    d->op->begin(d, rows, T);
    d->op->streams_in(d, X);
    gpu_wait(d->impl);
    reset_counters();
    g->post = true;             // as in the middle of the model
    d->op->hc_pre(d, &l->hc_attn, l->attn_norm);
    d->op->attn_project(d, l);
    d->op->attn_latent(d, l, i);
    d->op->attn_query(d, l);
    if (l->ratio == 4) d->op->index_topk(d, l, i);
    d->op->attend(d, l, i);
    d->op->attn_out(d, l);
    d->op->hc_post(d);
    d->op->hc_pre(d, &l->hc_ffn, l->ffn_norm);
    d->op->route(d, l);
    d->op->experts(d, l);
    d->op->hc_post(d);
    save(d, dir, name[i], T, ctx);
    free(X);
}

static void head(Device *d, int T, const char *dir) {
    Row rows[8] = { 0 };
    int want[8];
    float *logits = xalloc((size_t)T * real.vocab, sizeof *logits);
    for (int t = 0; t < T; t++) rows[t].pos = t, want[t] = t;
    d->op->begin(d, rows, T);
    reset_counters();
    ((Cuda *)d->impl)->post = true;
    d->op->head(d, &d->w.hc_head, d->w.norm, want, T, logits);
    save(d, dir, "head", T, 0);
    free(logits);
}

int main(int argc, char **argv) {
    static const int batch[] = { 1, 4, 8 }, context[] = { 8192, 131072 };
    bool quick = argc > 2;
    if (argc < 2) return 2;
    cpu_init();
    void *lib = dlopen("libcuda.so.1", RTLD_NOW);
    reset_counters = lib ? (void (*)(void))dlsym(lib, "sim_reset_counters") : NULL;
    write_report = lib ? (int (*)(const char *))dlsym(lib, "sim_write_report") : NULL;
    if (!reset_counters || !write_report) die(1, "this is not the simulated device");
    Toy *m = toy_new(&real, W_INT8, W_INT4);
    m->c.n_mtp = 0;
    m->w.mtp = NULL;
    Device d = { 0 };
    toy_device(&d, m, "cuda:0", 64, 131072);
    cuda_device(&d, 0);
    d.op->cache_new(&d, 0);
    for (int b = 0; b < (quick ? 1 : 3); b++) {
        for (int k = 0; k < (quick ? 1 : 2); k++)
            for (int i = 0; i < 3; i++) layer(&d, m, i, batch[b], context[k], argv[1]);
        head(&d, batch[b], argv[1]);
    }
    if (!quick) layer(&d, m, 1, 64, 8192, argv[1]);
    return 0;
}
