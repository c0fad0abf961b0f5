// Unit test of the safetensors reader and the config reader: every rule has a file or a value that
// breaks it and the words the error must hold; and a store of 70,000 tensors is opened and timed.
#define DSV4_NO_MAIN
#include "../dsv4.c"
#include <sys/resource.h>

#include "check.h"

static char dir[] = "/tmp/dsv4-files-XXXXXX";

static void in_dir(char path[static 128], const char *name) {
    snprintf(path, 128, "%s/%s", dir, name);
}

static void put_file(const char *name, const void *p, size_t n) {
    char path[128];
    in_dir(path, name);
    FILE *f = fopen(path, "wb");
    if (!f || (n && fwrite(p, 1, n, f) != n) || fclose(f)) die(1, "cannot write %s", path);
}

static void drop_file(const char *name) {
    char path[128];
    in_dir(path, name);
    unlink(path);
}

// A shard: the header's length (or `length` instead), the header, n bytes of data.
static void put_shard(const char *name, const char *header, size_t n_header, int64_t length, size_t n) {
    Str s = { 0 };
    uint64_t claimed = length >= 0 ? (uint64_t)length : n_header;
    str_add(&s, &claimed, 8);
    str_add(&s, header, n_header);
    for (size_t i = 0; i < n; i++) str_add(&s, "\x11", 1);
    put_file(name, s.p, s.n);
    free(s.p);
}

static bool open_store_in(Store *s, Err *e) {
    *e = (Err){ "" };
    return store_open(s, dir, e);
}

// Opens the directory; words: what the error must hold, NULL: it must open.
static void expect(const char *what, const char *words) {
    Store s;
    Err e;
    bool ok = open_store_in(&s, &e);
    if (ok != !words) check(false, "%s: %s", what, ok ? "was accepted" : e.text);
    else check(ok || (strstr(e.text, words) && strstr(e.text, dir) && !strchr(e.text, '\n')),
               "%s: expected '%s' in '%s'", what, words, e.text);
    if (ok) store_close(&s);
    else check(!s.n && !s.n_shards, "%s: the store is left empty", what);
}

#define A4 "\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}"
#define AS(dtype, shape, at) "{\"a\":{\"dtype\":" dtype ",\"shape\":" shape ",\"data_offsets\":" at "}}"

static void test_headers(void) {
    static const struct { const char *what, *header; size_t n; const char *words; } cases[] = {
        { "a good file", "{" A4 "}", 4, NULL },
        { "spaces behind", "{" A4 "}     ", 4, NULL },
        { "no tensors", "{}", 0, NULL },
        { "metadata", "{\"__metadata__\":{\"format\":\"pt\"}," A4 "}", 4, NULL },
        { "rank 0", AS("\"F32\"", "[]", "[0,4]"), 4, NULL },
        { "rank 8", AS("\"U8\"", "[1,1,1,1,1,1,1,4]", "[0,4]"), 4, NULL },
        { "rank 9", AS("\"U8\"", "[1,1,1,1,1,1,1,1,4]", "[0,4]"), 4, "more than 8 dimensions" },
        { "empty tensor", AS("\"U8\"", "[0,9]", "[0,0]"), 0, NULL },
        { "two nibbles a byte", AS("\"F4\"", "[8]", "[0,4]"), 4, NULL },
        { "half a byte", AS("\"F4\"", "[7]", "[0,4]"), 4, "does not fit" },
        { "any order", "{\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[4,6]}," A4 "}", 6, NULL },
        { "one byte short", "{" A4 "}", 3, "file has 64 bytes, its header needs 65" },
        { "data cut off", "{" A4 "}", 0, "download again" },
        { "one byte more", "{" A4 "}", 5, "file has 66 bytes, its header needs 65" },
        { "hole", "{" A4 ",\"b\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[5,6]}}", 6, "hole" },
        { "hole in front", AS("\"U8\"", "[2]", "[2,4]"), 4, "hole" },
        { "overlap", "{" A4 ",\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[3,5]}}", 5, "overlap" },
        { "the same bytes twice", "{" A4 ",\"b\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}", 4, "overlap" },
        { "reversed", AS("\"U8\"", "[4]", "[4,0]"), 4, "begin <= end" },
        { "past the end", AS("\"U8\"", "[400]", "[0,400]"), 4, "download again" },
        { "far past the end", AS("\"U8\"", "[9223372036854775807]", "[0,9223372036854775807]"), 4, "does not fit" },
        { "negative", AS("\"U8\"", "[4]", "[-4,0]"), 4, "expected an integer" },
        { "2^64 - 1", AS("\"U8\"", "[4]", "[0,18446744073709551615]"), 4, "expected an integer" },
        { "a float", AS("\"U8\"", "[4]", "[0,4.0]"), 4, "expected an integer" },
        { "a string", AS("\"U8\"", "[4]", "[0,\"4\"]"), 4, "expected a number" },
        { "one offset", AS("\"U8\"", "[4]", "[4]"), 4, "[begin, end]" },
        { "three offsets", AS("\"U8\"", "[4]", "[0,4,4]"), 4, "[begin, end]" },
        { "shape overflows", AS("\"U8\"", "[4294967296,4294967296,4]", "[0,4]"), 4, "does not fit" },
        { "bits overflow", AS("\"F64\"", "[2305843009213693952]", "[0,0]"), 0, "does not fit" },
        { "zero hides an overflow", AS("\"F64\"", "[9223372036854775807,9223372036854775807,0]", "[0,0]"), 0, "does not fit" },
        { "shape too large", AS("\"F32\"", "[4]", "[0,4]"), 4, "F32 [4] does not fit" },
        { "shape too small", AS("\"U8\"", "[3]", "[0,4]"), 4, "does not fit" },
        { "negative dimension", AS("\"U8\"", "[-1,-4]", "[0,4]"), 4, "expected an integer" },
        { "unknown dtype", AS("\"Q4_K\"", "[4]", "[0,4]"), 4, "unknown dtype Q4_K" },
        { "dtype is a number", AS("4", "[4]", "[0,4]"), 4, "expected a string" },
        { "no dtype", "{\"a\":{\"shape\":[4],\"data_offsets\":[0,4]}}", 4, "no dtype" },
        { "no shape", "{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,4]}}", 4, "no shape" },
        { "no offsets", "{\"a\":{\"dtype\":\"U8\",\"shape\":[4]}}", 4, "no data_offsets" },
        { "dtype twice", "{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}", 4, "dtype twice" },
        { "tensor twice", "{" A4 "," A4 "}", 4, "tensor a is there twice" },
        { "twice, once in disguise", "{" A4 ",\"\\u0061\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[4,4]}}", 4, "there twice" },
        { "line end in a name", "{\"\\n\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[0,4]}}", 4, "does not fit" },
        { "metadata twice", "{\"__metadata__\":{},\"__metadata__\":{}," A4 "}", 4, "__metadata__ twice" },
        { "metadata holds a number", "{\"__metadata__\":{\"a\":1}," A4 "}", 4, "expected a string" },
        { "array on top", "[" A4 "]", 4, "must begin with '{'" },
        { "blank in front", " {" A4 "}", 4, "must begin with '{'" },
        { "line end behind", "{" A4 "}\n", 4, "only spaces may pad" },
        { "second value behind", "{" A4 "} {}", 4, "only spaces may pad" },
        { "cut in the header", "{\"a\":{\"dtype\":\"U8\",\"sha", 0, "without an end" },
        { "trailing comma", "{" A4 ",}", 4, "trailing comma" },
        { "not UTF-8", "{\"\xff\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}", 4, "UTF-8" },
        { "lone surrogate", "{\"\\ud800\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}", 4, "surrogate" },
        { "tensor is null", "{\"a\":null}", 0, "expected an object" },
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        put_shard("model.safetensors", cases[i].header, strlen(cases[i].header), -1, cases[i].n);
        expect(cases[i].what, cases[i].words);
    }
}

static void test_lengths(void) {
    static const struct { int64_t length; const char *words; } cases[] = {
        { 0, "must begin with '{'" }, { 1, "the end of the text" }, { 7, "without an end" },
        { 1000, "its header alone needs 1008" }, { 100000000, "its header alone needs" },
        { 100000001, "at most 100000000" }, { INT64_MAX, "at most 100000000" },
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        put_shard("model.safetensors", "{" A4 "}", strlen("{" A4 "}"), cases[i].length, 4);
        expect("header length", cases[i].words);
    }
    put_file("model.safetensors", "\xff\xff\xff\xff\xff\xff\xff\xff{}", 10);
    expect("header length 2^64 - 1", "at most 100000000");
    for (size_t n = 0; n < 8; n++) {
        put_file("model.safetensors", "\2\0\0\0\0\0\0\0{}", n);
        expect("a file of less than 8 bytes", "at least 8");
    }
    put_shard("model.safetensors", "{" A4 "}\0\0\0", strlen("{" A4 "}") + 3, -1, 4);
    expect("NUL padding", "0x00 behind the header");
    drop_file("model.safetensors");
    expect("an empty directory", "no model.safetensors");
}

static void put_index(const char *json) { put_file("model.safetensors.index.json", json, strlen(json)); }

static void test_index(void) {
    static const struct { const char *what, *json, *words; } cases[] = {
        { "two shards", "{\"metadata\":{\"total_size\":8},\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\"}}", NULL },
        { "a tensor it does not list", "{\"weight_map\":{\"a\":\"one.safetensors\"}}", NULL },
        { "a shard that is missing", "{\"weight_map\":{\"a\":\"one.safetensors\",\"z\":\"three.safetensors\"}}", "three.safetensors" },
        { "a tensor that is missing", "{\"weight_map\":{\"a\":\"one.safetensors\",\"z\":\"one.safetensors\"}}", "tensor z is not in one.safetensors" },
        { "the wrong shard", "{\"weight_map\":{\"a\":\"two.safetensors\",\"b\":\"one.safetensors\"}}", "tensor a is not in two.safetensors" },
        { "a tensor twice", "{\"weight_map\":{\"a\":\"one.safetensors\",\"a\":\"one.safetensors\"}}", "tensor a twice" },
        { "no weight_map", "{\"metadata\":{}}", "no key weight_map" },
        { "weight_map twice", "{\"weight_map\":{},\"weight_map\":{}}", "weight_map: is there twice" },
        { "a path upwards", "{\"weight_map\":{\"a\":\"../one.safetensors\"}}", "bad shard name" },
        { "an absolute path", "{\"weight_map\":{\"a\":\"/etc/passwd\"}}", "bad shard name" },
        { "a hidden file", "{\"weight_map\":{\"a\":\"..\"}}", "bad shard name" },
        { "an empty name", "{\"weight_map\":{\"a\":\"\"}}", "bad shard name" },
        { "a NUL in the name", "{\"weight_map\":{\"a\":\"one.safetensors\\u0000x\"}}", "bad shard name" },
        { "a number", "{\"weight_map\":{\"a\":1}}", "expected a string" },
        { "an array", "[]", "expected an object" },
        { "an empty file", "", "end of the text" },
        { "the same tensor in two shards", "{\"weight_map\":{\"a\":\"one.safetensors\",\"x\":\"copy.safetensors\"}}", "tensor a is there twice" },
    };
    static const char b[] = "{\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}";
    put_shard("one.safetensors", "{" A4 "}", strlen("{" A4 "}"), -1, 4);
    put_shard("copy.safetensors", "{" A4 "}", strlen("{" A4 "}"), -1, 4);
    put_shard("two.safetensors", b, strlen(b), -1, 4);
    fflush(stderr);
    for (size_t i = 0; i < COUNT(cases); i++) {
        put_index(cases[i].json);
        expect(cases[i].what, cases[i].words);
    }
    Store s;
    Err e;
    put_index(cases[0].json);
    if (open_store_in(&s, &e)) {
        const Tensor *t = store_find(&s, "b");
        char kind[256];
        check(t && t->dtype == DT_F32 && t->rank == 1 && t->shape[0] == 1 && t->bytes == 4 && t->data[3] == 0x11, "b is found");
        check(t && !strcmp(tensor_kind(t, kind), "F32 [1]"), "b is named");
        check(!store_find(&s, "c") && !store_find(&s, "") && !store_find(&s, "bb"), "others are not");
        const uint8_t *at = t ? t->data : NULL;
        check(t && strstr(mapped_path(at), "two.safetensors"), "the address leads to its file");
        check(!mapped_path(&s), "another address does not");
        store_close(&s);
        check(!mapped_path(at), "nor one whose file is closed");
    } else check(false, "%s", e.text);
    drop_file("model.safetensors.index.json");
    drop_file("one.safetensors");
    drop_file("two.safetensors");
    drop_file("copy.safetensors");
}

// 70,000 tensors of 64 MiB each in 50 sparse shards.
static void test_many(void) {
    enum { SHARDS = 50, EACH = 1400, BYTES = 64 << 20 };
    Str index = { 0 }, head = { 0 };
    char text[256], name[64], path[128];
    str_puts(&index, "{\"weight_map\":{");
    for (int i = 0; i < SHARDS; i++) {
        uint64_t n = 0;
        head.n = 0;
        str_add(&head, &n, 8);
        for (int k = 0; k < EACH; k++) {
            snprintf(text, sizeof text, "%s\"layers.%d.ffn.experts.%d.w%d.weight\":{\"dtype\":\"I8\",\"shape\":[2048,32768],"
                     "\"data_offsets\":[%lld,%lld]}", k ? "," : "{", i, k / 3, k % 3, k * (long long)BYTES, (k + 1) * (long long)BYTES);
            str_puts(&head, text);
            snprintf(text, sizeof text, "%s\"layers.%d.ffn.experts.%d.w%d.weight\":\"m%d.safetensors\"", i || k ? "," : "", i, k / 3, k % 3, i);
            str_puts(&index, text);
        }
        str_puts(&head, "}");
        n = head.n - 8;
        memcpy(head.p, &n, 8);
        snprintf(name, sizeof name, "m%d.safetensors", i);
        put_file(name, head.p, head.n);
        in_dir(path, name);
        if (truncate(path, (off_t)head.n + (off_t)EACH * BYTES)) die(1, "%s: cannot be made that long", path);
    }
    str_puts(&index, "}}");
    put_index(index.p);
    free(index.p);
    free(head.p);
    struct rusage before, after;
    getrusage(RUSAGE_SELF, &before);
    Store s;
    Err e;
    double t = now();
    bool ok = open_store_in(&s, &e);
    t = now() - t;
    getrusage(RUSAGE_SELF, &after);
    check(ok && s.n == SHARDS * EACH, "70,000 tensors: %s", e.text);
    long grown = (after.ru_maxrss - before.ru_maxrss) / 1024;
    printf("70,000 tensors in %.3f s, %ld MiB\n", t, grown);
    check(t < 5, "in %.2f s", t);           // well under one on an idle machine without sanitizers
    check(grown < 150, "with %ld MiB", grown);
    for (int i = 0; ok && i < SHARDS * EACH; i += 97) {
        snprintf(name, sizeof name, "layers.%d.ffn.experts.%d.w%d.weight", i / EACH, i % EACH / 3, i % EACH % 3);
        const Tensor *x = store_find(&s, name);
        if (!x || x->shard != i / EACH) check(false, "%s is not found", name);
    }
    if (ok) store_close(&s);
    for (int i = 0; i < SHARDS; i++) {
        snprintf(name, sizeof name, "m%d.safetensors", i);
        drop_file(name);
    }
    drop_file("model.safetensors.index.json");
}

// A config that is right; each case replaces or adds one member.
static const char *const base_config[][2] = {
    { "model_type", "\"deepseek_v4\"" }, { "hidden_size", "4096" }, { "num_hidden_layers", "3" },
    { "num_attention_heads", "64" }, { "head_dim", "512" }, { "qk_rope_head_dim", "64" },
    { "q_lora_rank", "1024" }, { "o_groups", "8" }, { "o_lora_rank", "1024" },
    { "sliding_window", "128" }, { "n_routed_experts", "256" }, { "num_experts_per_tok", "6" },
    { "moe_intermediate_size", "2048" }, { "num_hash_layers", "3" }, { "index_n_heads", "64" },
    { "index_head_dim", "128" }, { "index_topk", "512" }, { "hc_mult", "4" },
    { "hc_sinkhorn_iters", "20" }, { "vocab_size", "129280" }, { "max_position_embeddings", "1048576" },
    { "hc_eps", "1e-06" }, { "rms_norm_eps", "1e-06" }, { "routed_scaling_factor", "1.5" },
    { "swiglu_limit", "10.0" }, { "rope_theta", "10000" }, { "compress_rope_theta", "160000" },
    { "compress_ratios", "[0, 4, 128, 0]" },
    { "rope_scaling", "{\"type\":\"yarn\",\"factor\":16,\"beta_fast\":32,\"beta_slow\":1,\"original_max_position_embeddings\":65536}" },
};

static void put_config(Str *s, const char *key, const char *value) {
    bool seen = false;
    s->n = 0;
    for (size_t i = 0; i < COUNT(base_config); i++) {
        bool here = key && !strcmp(key, base_config[i][0]);
        seen = seen || here;
        if (here && !value) continue;
        str_puts(s, s->n ? ", \"" : "{\"");
        str_puts(s, base_config[i][0]);
        str_puts(s, "\": ");
        str_puts(s, here ? value : base_config[i][1]);
    }
    if (key && !seen && value) {
        str_puts(s, ", \"");
        str_puts(s, key);
        str_puts(s, "\": ");
        str_puts(s, value);
    }
    str_puts(s, "}");
}

static void test_config(void) {
    // words NULL: accepted; else what the error holds beside the key
    static const struct { const char *key, *value, *words; } cases[] = {
        { NULL, NULL, NULL }, { "unknown_key", "[1, {\"a\": null}]", NULL },
        { "model_type", "\"deepseek_v3\"", "deepseek_v3" }, { "model_type", "\"deepseek_v41\"", "V4.1" },
        { "model_type", NULL, "model_type" }, { "model_type", "4", "model_type" },
        { "hidden_size", "7168", NULL }, { "hidden_size", "0", "from 1 to" }, { "hidden_size", "-1", "-1" },
        { "hidden_size", "65537", "65537" }, { "hidden_size", "4096.0", "4096.0" },
        { "hidden_size", "\"4096\"", "expected a number" }, { "hidden_size", "null", "no key" },
        { "hidden_size", "1e3", "1e3" }, { "hidden_size", "99999999999999999999", "9999" },
        { "num_hidden_layers", "4", NULL }, { "num_hidden_layers", "5", "compress_ratios has 4" },
        { "num_attention_heads", "60", "o_groups" }, { "o_groups", "7", "not a multiple" },
        { "qk_rope_head_dim", "63", "even" }, { "qk_rope_head_dim", "514", "even" },
        { "num_experts_per_tok", "65", "from 1 to 64" }, { "n_routed_experts", "5", "num_experts_per_tok 6" },
        { "num_hash_layers", "4", "num_hidden_layers 3" }, { "num_hash_layers", "0", NULL },
        { "hc_mult", "17", "from 1 to 16" }, { "hc_eps", "0", "found 0" }, { "hc_eps", "-1e-6", "found -1" },
        { "rms_norm_eps", "1e999", "found 1e999" }, { "rms_norm_eps", "NaN", "found 'N'" },
        { "rope_theta", "1", "found 1" }, { "rope_theta", "true", "expected a number" },
        { "swiglu_limit", "0", "found 0" }, { "swiglu_limit", NULL, "no key" },
        { "compress_ratios", "[0, 4, 128]", NULL }, { "compress_ratios", "[0, 4, 128, 0, 0, 4]", NULL },
        { "compress_ratios", "[0, 4]", "has 2 entries" }, { "compress_ratios", "[0, 8, 128]", "compress_ratios: entry 1: expected 0, 4 or 128, found 8" },
        { "compress_ratios", "[0, -4, 128]", "-4" }, { "compress_ratios", "[0, 4.0, 128]", "4.0" },
        { "compress_ratios", "[0, \"4\"]", "expected a number" }, { "compress_ratios", "4", "expected an array" },
        { "compress_ratios", NULL, "no key" },
        { "num_nextn_predict_layers", "1", NULL }, { "num_nextn_predict_layers", "3", NULL },
        { "bos_token_id", "129280", "vocab_size" }, { "eos_token_id", "1", NULL }, { "eos_token_id", "-1", "-1" },
        { "rope_scaling", NULL, "rope_scaling" }, { "rope_scaling", "null", "no key rope_scaling" },
        { "rope_scaling", "{\"type\":\"linear\",\"factor\":2}", "linear" },
        { "rope_scaling", "{\"type\":\"yarn\",\"factor\":0,\"original_max_position_embeddings\":9}", "factor" },
        { "rope_scaling", "{\"type\":\"yarn\",\"original_max_position_embeddings\":9}", "no key rope_scaling.factor" },
        { "rope_scaling", "{\"type\":\"yarn\",\"factor\":2,\"factor\":2}", "twice" },
        { "rope_scaling", "{\"factor\":2,\"beta_fast\":1,\"beta_slow\":2,\"original_max_position_embeddings\":9}", "beta_fast" },
        { "hidden_act", "\"silu\"", NULL }, { "hidden_act", "\"gelu\"", "gelu" },
        { "scoring_func", "\"softmax\"", "softmax" }, { "topk_method", "\"greedy\"", "greedy" },
        { "norm_topk_prob", "false", "false" }, { "tie_word_embeddings", "true", "true" },
        { "attention_bias", "true", "true" }, { "n_shared_experts", "2", "2" }, { "num_key_value_heads", "8", "8" },
        { "expert_dtype", "\"fp4\"", NULL }, { "expert_dtype", "null", NULL }, { "expert_dtype", "\"nf4\"", "nf4" },
        { "dspark_block_size", "4", NULL },
        { "quantization_config", "null", NULL }, { "quantization_config", "{\"quant_method\":\"fp8\"}", NULL },
        { "quantization_config", "{\"quant_method\":\"gptq\"}", "gptq" }, { "quantization_config", "{}", "quant_method" },
        { "quantization_config", "\"fp8\"", "expected an object" },
        { "quantization_config", "{\"quant_method\":\"fp8\",\"weight_block_size\":[32,32]}", "[32,32]" },
        { "quantization_config", "{\"quant_method\":\"fp8\",\"fmt\":\"e5m2\"}", "quantization_config.fmt: \"e5m2\"" },
        { "quantization_config", "{\"quant_method\":\"dsv4_int\",\"format\":\"int_packed\",\"config_groups\":{\"g\":{\"weights\":"
          "{\"num_bits\":4,\"type\":\"int\",\"symmetric\":true,\"group_size\":32,\"strategy\":\"group\"}}}}", NULL },
        { "quantization_config", "{\"quant_method\":\"dsv4_int\",\"config_groups\":{\"g\":{\"weights\":{\"group_size\":64}}}}", "64" },
        { "quantization_config", "{\"quant_method\":\"dsv4_int\",\"config_groups\":{\"g\":{\"weights\":{\"symmetric\":false}}}}", "false" },
        { "quantization_config", "{\"quant_method\":\"dsv4_int\",\"config_groups\":{\"g\":{\"weights\":{\"strategy\":\"channel\"}}}}", "channel" },
        { "hidden_size\": 1, \"x", "1", "hidden_size: is there twice" }, { "x\": 1, \"x", "1", "x: is there twice" },
    };
    Str s = { 0 };
    for (size_t i = 0; i < COUNT(cases); i++) {
        const char *key = cases[i].key, *value = cases[i].value, *words = cases[i].words;
        Config c;
        Err e = { "" };
        put_config(&s, key, value);
        bool ok = config_read(&c, str_span(&s), "config.json", &e);
        if (ok != !words) check(false, "%s = %s: %s", key, value, ok ? "was accepted" : e.text);
        else check(ok || (strstr(e.text, words) && !strncmp(e.text, "config.json: ", 13)), "%s = %s: expected '%s' in '%s'", key, value, words, e.text);
        // a single bad value is reported with its key
        bool simple = key && value && !strchr(key, '"') && words && !strstr(words, "has");
        check(ok || !simple || strstr(e.text, key) || strcmp(key, "num_attention_heads") == 0 || !strcmp(key, "rope_scaling") ||
              !strcmp(key, "quantization_config"), "%s = %s: no key in '%s'", key, value, e.text);
        if (ok) config_free(&c);
    }
    free(s.p);
}

static void test_config_values(void) {
    Str s = { 0 };
    Config c;
    Err e = { "" };
    put_config(&s, "num_nextn_predict_layers", "2");
    if (config_read(&c, str_span(&s), "config.json", &e)) {
        check(c.dim == 4096 && c.n_layers == 3 && c.n_heads == 64 && c.head_dim == 512 && c.rope_dim == 64, "attention sizes");
        check(c.q_lora_rank == 1024 && c.o_groups == 8 && c.o_lora_rank == 1024 && c.window == 128, "low-rank sizes");
        check(c.n_experts == 256 && c.n_active == 6 && c.expert_dim == 2048 && c.n_hash_layers == 3, "experts");
        check(c.index_heads == 64 && c.index_dim == 128 && c.index_topk == 512 && c.hc_mult == 4 && c.hc_iters == 20, "indexer and streams");
        check(c.vocab == 129280 && c.max_ctx == 1048576 && c.n_mtp == 2 && c.bos == -1 && c.eos == -1, "vocabulary");
        check(c.hc_eps == 1e-6f && c.norm_eps == 1e-6f && c.route_scale == 1.5f && c.swiglu_limit == 10, "scalars");
        check(c.rope_theta == 10000 && c.compress_theta == 160000 && c.yarn_factor == 16 && c.yarn_ctx == 65536 &&
              c.yarn_beta_fast == 32 && c.yarn_beta_slow == 1, "rope");
        check(c.ratio[0] == 0 && c.ratio[1] == 4 && c.ratio[2] == 128 && c.ratio[3] == 0 && c.ratio[4] == 0, "ratios, the missing one is 0");
        check(!c.dspark && !c.quant[0], "plain");
        config_free(&c);
    } else check(false, "%s", e.text);
    put_config(&s, "dspark_block_size", "4");
    check(config_read(&c, str_span(&s), "config.json", &e) && c.dspark, "dspark is noted");
    config_free(&c);
    free(s.p);
}

int main(void) {
    if (!mkdtemp(dir)) die(1, "no directory for the test");
    test_headers();
    test_lengths();
    test_index();
    test_many();
    test_config();
    test_config_values();
    rmdir(dir);
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
