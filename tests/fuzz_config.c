// Any bytes as config.json. What is accepted must be consistent, and no product of dimensions that
// belong together may leave an int.
#define DSV4_NO_MAIN
#include "../dsv4.c"

static void fits(int64_t a, int64_t b, int64_t c) {
    if (a < 0 || b < 0 || c < 0 || a * b * c > INT_MAX) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    Err e = { "" };
    Config c;
    if (!config_read(&c, (Span){ (const char *)data, n }, "config.json", &e)) {
        if (!e.text[0] || strchr(e.text, '\n') || c.ratio) abort();
        return 0;
    }
    for (int i = 0; i < c.n_layers + c.n_mtp; i++)
        if (c.ratio[i] != 0 && c.ratio[i] != 4 && c.ratio[i] != 128) abort();
    fits(c.n_heads, c.head_dim, 1);
    fits(c.o_groups, c.o_lora_rank, 1);
    fits(c.index_heads, c.index_dim, 1);
    fits((2 + c.hc_mult) * c.hc_mult, c.hc_mult, c.dim);
    fits(128, 2, c.head_dim);
    if (c.n_heads % c.o_groups || c.rope_dim % 2 || c.rope_dim > c.head_dim) abort();
    if (c.n_active > c.n_experts || c.n_hash_layers > c.n_layers || c.bos >= c.vocab) abort();
    if (!(c.norm_eps > 0 && c.hc_eps > 0 && c.rope_theta > 1 && c.compress_theta > 1)) abort();
    if (!(c.yarn_factor >= 1 && c.yarn_ctx > 0 && c.yarn_beta_slow > 0)) abort();
    config_free(&c);
    return 0;
}
