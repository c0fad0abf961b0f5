// Unit test of the converter's rules and hot loops: portable and vector versions against plain FP32
// arithmetic, at any address and length, right before an unmapped page; which names are converted.
#define DSV4_NO_MAIN
#include "../dsv4.c"
// names that both have; the program's own converter is linked too
#define Job ConvertJob
#define Place ConvertPlace
#define PIECE CONVERT_PIECE
#define TILE CONVERT_TILE
#define dsv4_convert convert_under_test
#include "../apps/convert.c"

#include "check.h"

static uint64_t seed = 1;
static uint32_t rnd(void) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(seed >> 33) ^ (uint32_t)(seed >> 50);
}

// Memory that ends at an unmapped page.
static uint8_t *guarded(size_t n) {
    size_t page = 4096, body = (n + page - 1) / page * page + page;
    uint8_t *p = mmap(NULL, body + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(p + body, page, PROT_NONE)) exit(1);
    return p + body - n;
}

// The rules as the specification has them, value by value.
static void plain_fp4(const uint8_t *w, int b, uint8_t *q, float *scale) {
    static const float code[8] = { 0, .5f, 1, 1.5f, 2, 3, 4, 6 };
    float x[32], top = 0;
    for (int i = 0; i < 32; i++) {
        int nibble = i % 2 ? w[i / 2] >> 4 : w[i / 2] & 15;
        x[i] = ldexpf(nibble & 8 ? -code[nibble & 7] : code[nibble & 7], b - 127);
        top = fmaxf(top, fabsf(x[i]));
    }
    float s = *scale = fmaxf(top, 1.17549435e-38f) / 7;
    memset(q, 0, 16);
    for (int i = 0; i < 32; i++) {
        int v = (int)fmaxf(-8, fminf(7, nearbyintf(x[i] / s))) + 8;
        q[i / 2] = (uint8_t)(q[i / 2] | (i % 2 ? v << 4 : v));
    }
}

static uint16_t plain_bf16(float f) {       // the nearer of two neighbours, the even one at a tie
    uint32_t u;
    memcpy(&u, &f, 4);
    uint32_t low = u & 0xffff0000, high = low + 0x10000;
    float a, b;
    memcpy(&a, &low, 4);
    memcpy(&b, &high, 4);
    double down = (double)f - a, up = (double)b - f;
    bool take = up < down || (up == down && (low >> 16 & 1));
    return (uint16_t)((take ? high : low) >> 16);
}

typedef void Fp4(const Tables *, const uint8_t *, const uint8_t *, size_t, uint8_t *, uint16_t *);
typedef void Fp8(const int8_t [static 128], const uint8_t *, uint8_t *, int);

static void test_fp4(const char *name, Fp4 *f, const Tables *t) {
    enum { N = 253 * 8 + 5 };
    uint8_t *w = guarded(16 * N), *b = guarded(N), *q = guarded(16 * N), want[16];
    uint16_t *s = (uint16_t *)(void *)guarded(2 * N);
    for (size_t g = 0; g < N; g++) {
        int top = (int)(g % 8);
        b[g] = (uint8_t)(g / 8 % 253);
        for (int i = 0; i < 16; i++) {
            uint32_t r = rnd();
            w[16 * g + (size_t)i] = (uint8_t)(r % (unsigned)(top + 1) | (r >> 8 & 8) |
                                              ((r >> 12) % (unsigned)(top + 1) | (r >> 24 & 8)) << 4);
        }
    }
    f(t, w, b, N, q, s);
    int bad = 0;
    for (size_t g = 0; g < N; g++) {
        float scale;
        plain_fp4(w + 16 * g, b[g], want, &scale);
        bad += memcmp(want, q + 16 * g, 16) || s[g] != plain_bf16(scale);
    }
    check(!bad, "%s: %d of %d groups differ", name, bad, N);
    for (size_t n = 0; n < 4; n++) {        // only n groups, up to the page's end
        uint8_t *one = guarded(16 * n), to[64] = { 0 };
        uint16_t scale[4] = { 1, 1, 1, 1 };
        memcpy(one, w, 16 * n);
        f(t, one, b + N - n, n, to, scale);
        check((n == 4 || scale[n] == 1) && !to[16 * n], "%s: %zu groups write no more", name, n);
    }
}

static void test_fp8(const char *name, Fp8 *f) {
    int bad = 0;
    for (int round = 0; round < 3000; round++) {
        int b = (int)(rnd() % 247), m = (int)(rnd() % 127), n = (int)(rnd() % 260);
        int8_t map[128];
        uint8_t *w = guarded((size_t)n), *q = guarded((size_t)n);
        uint16_t stored = table8(b, m, map);
        float s = fmaxf(ldexpf(e4m3(m), b - 127), 1.17549435e-38f) / 127;
        bad += stored != plain_bf16(s);
        for (int i = 0; i < n; i++) w[i] = (uint8_t)(rnd() % (unsigned)(m + 1) | (rnd() & 128));
        f(map, w, q, n);
        for (int i = 0; i < n; i++) {
            float v = fmaxf(-128, fminf(127, nearbyintf(ldexpf(e4m3(w[i]), b - 127) / s)));
            bad += (int8_t)q[i] != (int)v;
        }
        int top = 0;
        for (int i = 0; i < n; i++) top = (w[i] & 127) > top ? w[i] & 127 : top;
        bad += fp8_max(w, (size_t)n, 1, n) != top;
        munmap((void *)((uintptr_t)w & ~(uintptr_t)4095), 4096);
        munmap((void *)((uintptr_t)q & ~(uintptr_t)4095), 4096);
    }
    check(!bad, "%s: %d differences", name, bad);
}

static void test_formats(const Tables *t) {
    int ok = 1;
    for (int b = 0; b < 255; b++) ok &= e8m0(b) == ldexpf(1, b - 127);
    check(ok && isnan(e8m0(255)), "E8M0");
    check(e4m3(0x7e) == 448 && e4m3(0xfe) == -448 && e4m3(1) == 0x1p-9f && e4m3(8) == 0x1p-6f, "E4M3");
    check(isnan(e4m3(0x7f)) && isnan(e4m3(0xff)) && e4m3(0x80) == 0, "E4M3, ends");
    check(t->scale4[255][0] == SCALE_BAD && t->scale4[254][7] == SCALE_BAD, "FP4 that FP32 cannot hold");
    check(t->scale4[253][6] == SCALE_BAD && t->scale4[253][5] != SCALE_BAD, "the largest FP4");
    int8_t map[128];
    check(table8(127, 127, map) == SCALE_BAD && table8(255, 0, map) == SCALE_BAD, "FP8 NaN");
    check(table8(254, 0x7e, map) == SCALE_BAD && table8(246, 0x7e, map) != SCALE_BAD, "FP8 overflow");
    check(stored_scale(f32_from(0x3f808000)) == 0x3f80 && stored_scale(f32_from(0x3f818000)) == 0x3f82 &&
          stored_scale(f32_from(0x3f808001)) == 0x3f81, "BF16, ties");
}

static void test_names(void) {
    static const struct { const char *name; Rule rule; bool scale; } cases[] = {
        { "layers.0.attn.wq_a.weight", INT8, 0 }, { "layers.42.attn.wo_b.scale", INT8, 1 },
        { "mtp.0.attn.wkv.weight", INT8, 0 }, { "layers.3.attn.indexer.wq_b.scale", INT8, 1 },
        { "mtp.2.ffn.shared_experts.w3.weight", INT8, 0 }, { "layers.1.ffn.experts.255.w2.scale", INT4, 1 },
        { "mtp.0.ffn.experts.0.w1.weight", INT4, 0 },
        { "mtp.0.e_proj.weight", COPY, 0 }, { "mtp.0.h_proj.scale", COPY, 0 }, { "head.weight", COPY, 0 },
        { "layers.0.attn.compressor.wkv.weight", COPY, 0 }, { "layers.0.attn.indexer.weights_proj.weight", COPY, 0 },
        { "layers.0.ffn.gate.weight", COPY, 0 }, { "layers.0.ffn.experts.w1.weight", COPY, 0 },
        { "layers.0.ffn.experts.1.w4.weight", COPY, 0 }, { "layers.0.ffn.experts.1.w1.bias", COPY, 0 },
        { "layers.x.attn.wq_a.weight", COPY, 0 }, { "layers..attn.wq_a.weight", COPY, 0 },
        { "model.layers.0.attn.wq_a.weight", COPY, 0 }, { "layers.0.attn.wq_a", COPY, 0 },
        { "layers.0.attn.wq_a.weight.scale", COPY, 0 }, { ".scale", COPY, 0 }, { ".weight", COPY, 0 },
        { "", COPY, 0 }, { "layers.", COPY, 0 }, { "layers.0", COPY, 0 }, { "mtp.", COPY, 0 },
        { "mtp.0.weight", COPY, 0 }, { "layers.1.weight", COPY, 0 }, { "mtp.1.scale", COPY, 0 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t n = strlen(cases[i].name);
        char *copy = (char *)guarded(n);        // a read behind the name would end the test
        Span base;
        bool scale;
        memcpy(copy, cases[i].name, n);
        Rule rule = rule_of((Span){ copy, n }, &base, &scale);
        check(rule == cases[i].rule && (rule == COPY || scale == cases[i].scale), "%s: rule %d", cases[i].name, rule);
    }
}

int main(void) {
    Tables *t = tables_new();
    test_formats(t);
    test_fp4("FP4, portable", fp4_portable, t);
    test_fp8("FP8, portable", fp8_portable);
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2")) {
        test_fp4("FP4, AVX2", fp4_avx2, t);
        test_fp8("FP8, AVX2", fp8_avx2);
    }
#endif
    test_names();
    free(t);
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
