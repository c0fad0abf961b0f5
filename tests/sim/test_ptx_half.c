/* test_ptx_half.c: f16 and bf16 conversions and arithmetic on all 65536 values, 8 second operands
 * each, against checksums made with numpy, ml_dtypes and exact integers (test_ptx_half.py). */
#include "sim.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N = 65536, VARIANTS = 8 };

/* %h1 = x, %x = x, %y = x | (x ^ 8001) << 16, %k = variant, %w = x << 16 | low[k] as f32,
 * %b %c = constants of the variant in both halves; the result is %o. */
static const struct {
    const char *name, *body;
    int variants;
} cases[] = {
    {"to_f32.f16", "cvt.f32.f16 %f1, %h1; mov.b32 %o, %f1;", 1},
    {"to_f32.bf16", "cvt.f32.bf16 %f1, %h1; mov.b32 %o, %f1;", 1},
    {"from_f32.f16", "cvt.rn.f16.f32 %h2, %w; cvt.u32.u16 %o, %h2;", 8},
    {"from_f32.bf16", "cvt.rn.bf16.f32 %h2, %w; cvt.u32.u16 %o, %h2;", 8},
    {"from_f32_rz.f16", "cvt.rz.f16.f32 %h2, %w; cvt.u32.u16 %o, %h2;", 8},
    {"from_f32_rz.bf16", "cvt.rz.bf16.f32 %h2, %w; cvt.u32.u16 %o, %h2;", 8},
    {"pair.f16", "cvt.rn.f16x2.f32 %o, %v, %w;", 8},
    {"pair.bf16", "cvt.rn.bf16x2.f32 %o, %v, %w;", 8},
    {"add.f16x2", "add.f16x2 %o, %y, %b;", 8},
    {"sub.f16x2", "sub.rn.f16x2 %o, %y, %b;", 8},
    {"mul.f16x2", "mul.f16x2 %o, %y, %b;", 8},
    {"fma.f16x2", "fma.rn.f16x2 %o, %y, %b, %c;", 8},
    {"fma.bf16x2", "fma.rn.bf16x2 %o, %y, %b, %c;", 8},
    {"fma_swap.f16x2", "fma.rn.f16x2 %o, %b, %c, %y;", 8},
    {"fma_swap.bf16x2", "fma.rn.bf16x2 %o, %b, %c, %y;", 8},
    {"min.f16x2", "min.f16x2 %o, %y, %b;", 8},
    {"min.bf16x2", "min.bf16x2 %o, %y, %b;", 8},
    {"max.f16x2", "max.f16x2 %o, %y, %b;", 8},
    {"max.bf16x2", "max.bf16x2 %o, %y, %b;", 8},
    {"neg.f16", "neg.f16 %h2, %h1; cvt.u32.u16 %o, %h2;", 1},
    {"neg.bf16", "neg.bf16 %h2, %h1; cvt.u32.u16 %o, %h2;", 1},
    {"abs.f16", "abs.f16 %h2, %h1; cvt.u32.u16 %o, %h2;", 1},
    {"abs.bf16", "abs.bf16x2 %y, %y; and.b32 %o, %y, 0xffff;", 1},
    {"rni.s32.f16", "cvt.rni.s32.f16 %o, %h1;", 1},
    {"rzi.s8.f16", "cvt.rzi.s8.f16 %o, %h1;", 1},
    {"rmi.u8.f16", "cvt.rmi.u8.f16 %o, %h1;", 1},
    {"f16.u16", "cvt.rn.f16.u16 %h2, %h1; cvt.u32.u16 %o, %h2;", 1},
    {"f16.s16", "cvt.rn.f16.s16 %h2, %h1; cvt.u32.u16 %o, %h2;", 1},
    {"f16.s8", "cvt.rn.f16.s8 %h2, %h1; cvt.u32.u16 %o, %h2;", 1},
    {"f16_f64", "cvt.f64.f16 %e1, %h1; cvt.rn.f32.f64 %f1, %e1; mov.b32 %o, %f1;", 1},
};

static const char head[] =
    ".version 7.8\n.target sm_80\n.address_size 64\n"
    ".const .align 4 .b32 low[8] = {0, 1, 0x1000, 0x2fff, 0x7fff, 0x8000, 0x8001, 0xffff};\n"
    ".const .align 4 .b32 kb[8] = {%s};\n.const .align 4 .b32 kc[8] = {%s};\n"
    ".visible .entry k(.param .u64 out)\n{\n .reg .b32 %%x, %%y, %%k, %%b, %%c, %%o, %%t, %%u;\n"
    " .reg .f32 %%f1, %%v, %%w; .reg .f64 %%e1; .reg .b16 %%h1, %%h2; .reg .b64 %%d<6>;\n"
    " ld.param.u64 %%d0, [out]; mov.u32 %%t, %%ctaid.x; mov.u32 %%u, %%tid.x;\n"
    " mad.lo.u32 %%x, %%t, 256, %%u; mov.u32 %%k, %%ctaid.y; mad.lo.u32 %%t, %%k, 65536, %%x;\n"
    " mul.wide.u32 %%d1, %%t, 4; add.u64 %%d0, %%d0, %%d1; cvt.u16.u32 %%h1, %%x;\n"
    " xor.b32 %%t, %%x, 0x8001; shl.b32 %%t, %%t, 16; or.b32 %%y, %%x, %%t;\n"
    " mul.wide.u32 %%d1, %%k, 4; mov.u64 %%d2, low; add.u64 %%d2, %%d2, %%d1;\n"
    " ld.const.u32 %%t, [%%d2]; shl.b32 %%u, %%x, 16; mov.b32 %%v, %%u; or.b32 %%t, %%t, %%u;\n"
    " mov.b32 %%w, %%t; mov.u64 %%d3, kb; add.u64 %%d3, %%d3, %%d1; ld.const.u32 %%b, [%%d3];\n"
    " mov.u64 %%d4, kc; add.u64 %%d4, %%d4, %%d1; ld.const.u32 %%c, [%%d4];\n"
    " mul.lo.u32 %%b, %%b, 65537; mul.lo.u32 %%c, %%c, 65537;\n %s\n"
    " st.global.u32 [%%d0], %%o; ret;\n}\n";

static const char f16_b[] = "0, 0x8000, 0x3c00, 0xbc01, 1, 0x7bff, 0x7c00, 0x3555";
static const char f16_c[] = "0x3c00, 1, 0x8400, 0x7bff, 0, 0xfc00, 0x1234, 0xb8a7";
static const char bf16_b[] = "0, 0x8000, 0x3f80, 0xbf81, 1, 0x7f7f, 0x7f80, 0x3eab";
static const char bf16_c[] = "0x3f80, 1, 0x8080, 1, 0, 0xff80, 0x1234, 0xb8a7";

static uint32_t crc32(const uint8_t *p, size_t n) {
    uint32_t c = ~0u;
    for (size_t k = 0; k < n; k++) {
        c ^= p[k];
        for (int b = 0; b < 8; b++)
            c = c & 1 ? c >> 1 ^ 0xedb88320 : c >> 1;
    }
    return ~c;
}

/* The checksum in the reference file; false if it has none of that name. */
static bool reference(const char *name, uint32_t *crc) {
    char line[100], found[60];
    bool ok = false;
    FILE *f = fopen("tests/sim/test_ptx_half.ref", "r");
    while (f && !ok && fgets(line, sizeof line, f))
        ok = sscanf(line, "%59s %x", found, crc) == 2 && !strcmp(found, name);
    if (f)
        fclose(f);
    return ok;
}

static bool run_case(int c, uint64_t out) {
    char text[4000], log[300] = "";
    bool bf16 = strstr(cases[c].name, "bf16") != NULL;
    SimModule *m;
    SimCounters counters = {0};
    uint32_t want = 0, *result = sim_mem_ptr(out);
    size_t n = (size_t)snprintf(text, sizeof text, head, bf16 ? bf16_b : f16_b,
                                bf16 ? bf16_c : f16_c, cases[c].body);
    if (!reference(cases[c].name, &want) || sim_module_load(0, text, n, &m, log, sizeof log)) {
        printf("FAIL %s: no reference or no module: %s\n", cases[c].name, log);
        return false;
    }
    SimLaunch l = {
        sim_module_kernel(m, 0), {N / 256, (unsigned)cases[c].variants, 1}, {256, 1, 1}, 0, &out};
    int error = sim_launch(&l, &counters);
    sim_module_unload(m);
    if (strstr(cases[c].name, "to_f32")) /* a shift may carry the payload of a NaN */
        for (int k = 0; k < N; k++)
            result[k] = (result[k] & 0x7fffffff) > 0x7f800000 ? 0x7fffffff : result[k];
    uint32_t got = crc32((const uint8_t *)result, (size_t)N * (size_t)cases[c].variants * 4);
    if (error || got != want)
        printf("FAIL %s: error %d, checksum %08x, should be %08x\n", cases[c].name, error, got,
               want);
    return !error && got == want;
}

int main(void) {
    int passed = 0, n = sizeof cases / sizeof *cases;
    uint64_t out;
    sim_mem_alloc(0, N * VARIANTS * 4, &out);
    for (int c = 0; c < n; c++)
        passed += run_case(c, out);
    printf("%d passed, %d failed\n", passed, n - passed);
    return passed != n;
}
