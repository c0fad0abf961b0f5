// config.json -> Config. Known keys with values that are not supported are refused by name; keys
// that say nothing about inference (dropout, dtype, versions ...) and unknown ones are ignored.
#include <stdlib.h>
#include <string.h>
#include "dsv4.h"

// One entry per layer, then one per MTP layer; what is missing at the end is 0.
static void config_ratios(Json *j, void *to) {
    Config *c = to;
    int64_t v = 0;
    for (json_array(j); json_item(j);) {
        Json at = *j;
        if (!json_int(j, INT64_MIN, INT64_MAX, &v)) return;
        if (v != 0 && v != 4 && v != 128) {
            j->p = at.p;
            json_fail(j, "entry %d: expected 0, 4 or 128, found %lld", c->n_ratios, (long long)v);
        }
        if (c->n_ratios == 4096) json_fail(j, "more than %d entries", c->n_ratios);
        c->ratio = grow(c->ratio, (size_t)c->n_ratios, sizeof *c->ratio);
        c->ratio[c->n_ratios++] = (int)v;
    }
}

// The bounds keep every product of two dimensions that belong together (H*K, S*D, G*L, I*J, M*c*K)
// below 2^31; V4-Pro's shape lies well inside.
#define C(field) offsetof(Config, field)
#define QUANT "quantization_config."
#define GROUP "quantization_config.config_groups.*.weights."
#define ROPE "rope_scaling."
static const Field config_fields[] = {
    { "model_type", J_FIXED, NEEDED, .values = { "\"deepseek_v4\"" } },
    { "hidden_size", J_INT, NEEDED, C(dim), .lo = 1, .hi = 1 << 16 },
    { "num_hidden_layers", J_INT, NEEDED, C(n_layers), .lo = 1, .hi = 1024 },
    { "num_attention_heads", J_INT, NEEDED, C(n_heads), .lo = 1, .hi = 1024 },
    { "head_dim", J_INT, NEEDED, C(head_dim), .lo = 2, .hi = 4096 },
    { "qk_rope_head_dim", J_INT, NEEDED, C(rope_dim), .lo = 2, .hi = 4096 },
    { "q_lora_rank", J_INT, NEEDED, C(q_lora_rank), .lo = 1, .hi = 1 << 16 },
    { "o_groups", J_INT, NEEDED, C(o_groups), .lo = 1, .hi = 1024 },
    { "o_lora_rank", J_INT, NEEDED, C(o_lora_rank), .lo = 1, .hi = 1 << 16 },
    { "sliding_window", J_INT, NEEDED, C(window), .lo = 1, .hi = 1 << 20 },
    { "n_routed_experts", J_INT, NEEDED, C(n_experts), .lo = 1, .hi = 4096 },
    { "num_experts_per_tok", J_INT, NEEDED, C(n_active), .lo = 1, .hi = 64 },
    { "moe_intermediate_size", J_INT, NEEDED, C(expert_dim), .lo = 1, .hi = 1 << 18 },
    { "num_hash_layers", J_INT, NEEDED, C(n_hash_layers), .lo = 0, .hi = 1024 },
    { "index_n_heads", J_INT, NEEDED, C(index_heads), .lo = 1, .hi = 1024 },
    { "index_head_dim", J_INT, NEEDED, C(index_dim), .lo = 2, .hi = 4096 },
    { "index_topk", J_INT, NEEDED, C(index_topk), .lo = 1, .hi = 1 << 20 },
    { "hc_mult", J_INT, NEEDED, C(hc_mult), .lo = 1, .hi = 16 },
    { "hc_sinkhorn_iters", J_INT, NEEDED, C(hc_iters), .lo = 1, .hi = 1000 },
    { "vocab_size", J_INT, NEEDED, C(vocab), .lo = 1, .hi = 1 << 24 },
    { "max_position_embeddings", J_INT, NEEDED, C(max_ctx), .lo = 1, .hi = 1 << 24 },
    { "num_nextn_predict_layers", J_INT, OPTIONAL, C(n_mtp), .lo = 0, .hi = 16 },
    { "bos_token_id", J_INT, OPTIONAL, C(bos), .lo = 0, .hi = 1 << 24 },
    { "eos_token_id", J_INT, OPTIONAL, C(eos), .lo = 0, .hi = 1 << 24 },
    { "compress_ratios", J_READ, NEEDED, .read = config_ratios },
    { "hc_eps", J_FLOAT, NEEDED, C(hc_eps), .lo = 1e-12, .hi = 1 },
    { "rms_norm_eps", J_FLOAT, NEEDED, C(norm_eps), .lo = 1e-12, .hi = 1 },
    { "routed_scaling_factor", J_FLOAT, NEEDED, C(route_scale), .lo = 1e-6, .hi = 1e6 },
    { "swiglu_limit", J_FLOAT, NEEDED, C(swiglu_limit), .lo = 1e-6, .hi = 1e30 },
    { "rope_theta", J_FLOAT, NEEDED, C(rope_theta), .lo = 1.001, .hi = 1e12 },
    { "compress_rope_theta", J_FLOAT, NEEDED, C(compress_theta), .lo = 1.001, .hi = 1e12 },
    { ROPE "type", J_FIXED, .values = { "\"yarn\"" } },
    { ROPE "rope_type", J_FIXED, .values = { "\"yarn\"" } },
    { ROPE "factor", J_FLOAT, WITHIN, C(yarn_factor), .lo = 1, .hi = 1e6 },
    { ROPE "beta_fast", J_FLOAT, OPTIONAL, C(yarn_beta_fast), .lo = 1e-6, .hi = 1e6 },
    { ROPE "beta_slow", J_FLOAT, OPTIONAL, C(yarn_beta_slow), .lo = 1e-6, .hi = 1e6 },
    { ROPE "original_max_position_embeddings", J_INT, WITHIN, C(yarn_ctx), .lo = 1, .hi = 1 << 24 },
    { "dspark_*", J_FOUND, OPTIONAL, .at = C(dspark) },
    // supported with these values only
    { "attention_bias", J_FIXED, .values = { "false" } },
    { "expert_dtype", J_FIXED,
      .values = { "\"fp4\"", "\"int4\"", "\"fp8\"", "\"int8\"", "\"bf16\"" } },
    { "hidden_act", J_FIXED, .values = { "\"silu\"" } },
    { "n_shared_experts", J_FIXED, .values = { "1" } },
    { "norm_topk_prob", J_FIXED, .values = { "true" } },
    { "num_key_value_heads", J_FIXED, .values = { "1" } },
    { "scoring_func", J_FIXED, .values = { "\"sqrtsoftplus\"" } },
    { "tie_word_embeddings", J_FIXED, .values = { "false" } },
    { "topk_method", J_FIXED, .values = { "\"noaux_tc\"" } },
    // which formats the weights claim to have; their dtypes decide later
    { QUANT "quant_method", J_FIXED, WITHIN, C(quant), .values = { "\"dsv4_int\"", "\"fp8\"" } },
    { QUANT "format", J_FIXED, .values = { "\"int_packed\"" } },
    { QUANT "fmt", J_FIXED, .values = { "\"e4m3\"" } },
    { QUANT "scale_fmt", J_FIXED, .values = { "\"ue8m0\"" } },
    { QUANT "weight_block_size", J_FIXED, .values = { "[128,128]" } },
    { GROUP "num_bits", J_FIXED, .values = { "4", "8" } },
    { GROUP "type", J_FIXED, .values = { "\"int\"" } },
    { GROUP "symmetric", J_FIXED, .values = { "true" } },
    { GROUP "group_size", J_FIXED, .values = { "32" } },
    { GROUP "block_size", J_FIXED, .values = { "[128,128]" } },
    { GROUP "strategy", J_FIXED, .values = { "\"group\"", "\"block\"" } },
};

// V4.1 is another architecture; say so before its other values can be complained about.
static bool config_model_type(Span text, const char *path, Err *e) {
    static const Field field = { "model_type", J_TEXT, .need = NEEDED };
    Str type = { 0 };
    bool ok = table_file(text, path, &field, 1, &type, e);
    if (ok && (strstr(type.p, "v41") || strstr(type.p, "v4_1")))
        ok = fail(e, "%s: model_type %.40s: V4.1 is another architecture, not supported "
                  "(deepseek_v4 is)", path, type.p);
    free(type.p);
    return ok;
}

// What a single value cannot show: values that do not go together.
static bool config_check(const Config *c, const char *path, Err *e) {
    if (c->n_ratios < c->n_layers)
        return fail(e, "%s: compress_ratios has %d entries, num_hidden_layers is %d", path,
                    c->n_ratios, c->n_layers);
    for (int i = 0; i < c->n_layers; i++)
        if (c->ratio[i] && !c->yarn_ctx)
            return fail(e, "%s: no key rope_scaling, which layer %d with ratio %d needs", path, i,
                        c->ratio[i]);
    for (int i = c->n_layers; i < c->n_layers + c->n_mtp && !c->dspark; i++)
        if (c->ratio[i])
            return fail(e, "%s: compress_ratios[%d]: an MTP layer with ratio %d is not supported, "
                        "expected 0", path, i, c->ratio[i]);
    if (c->n_heads % c->o_groups)
        return fail(e, "%s: num_attention_heads %d is not a multiple of o_groups %d", path,
                    c->n_heads, c->o_groups);
    if (c->rope_dim % 2 || c->rope_dim > c->head_dim || c->rope_dim > c->index_dim)
        return fail(e, "%s: qk_rope_head_dim %d must be even and at most head_dim %d and "
                    "index_head_dim %d", path, c->rope_dim, c->head_dim, c->index_dim);
    if (c->n_active > c->n_experts)
        return fail(e, "%s: num_experts_per_tok %d of only n_routed_experts %d", path, c->n_active,
                    c->n_experts);
    if (c->n_hash_layers > c->n_layers)
        return fail(e, "%s: num_hash_layers %d of only num_hidden_layers %d", path,
                    c->n_hash_layers, c->n_layers);
    if (c->bos >= c->vocab || c->eos >= c->vocab)
        return fail(e, "%s: bos_token_id %d or eos_token_id %d is not below vocab_size %d", path,
                    c->bos, c->eos, c->vocab);
    if (c->yarn_beta_fast < c->yarn_beta_slow)
        return fail(e, "%s: rope_scaling: beta_fast %g is below beta_slow %g", path,
                    (double)c->yarn_beta_fast, (double)c->yarn_beta_slow);
    return true;
}

void config_free(Config *c) {
    free(c->ratio);
    *c = (Config){ 0 };
}

bool config_read(Config *c, Span text, const char *path, Err *e) {
    *c = (Config){ .bos = -1, .eos = -1, .yarn_factor = 1, .yarn_beta_fast = 32,
                   .yarn_beta_slow = 1 };
    bool ok = config_model_type(text, path, e) &&
              table_file(text, path, config_fields, COUNT(config_fields), c, e);
    for (int n = c->n_ratios; ok && n < c->n_layers + c->n_mtp; n++)
        c->ratio = grow(c->ratio, (size_t)n, sizeof *c->ratio);
    ok = ok && config_check(c, path, e);
    if (!c->yarn_ctx) c->yarn_ctx = c->max_ctx;     // no rope_scaling: no layer uses it
    if (!ok) config_free(c);
    return ok;
}

bool config_open(Config *c, const char *dir, Err *e) {
    Span text = { 0 };
    char *path = text_of("%s/config.json", dir);
    bool ok = map_file(path, &text, e) && config_read(c, text, path, e);
    unmap_file(text);
    free(path);
    return ok;
}
