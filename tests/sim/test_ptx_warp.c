/* test_ptx_warp.c: memory, control flow and what lanes do together, against plain C: matrix
 * fragments element by element from the tables of the PTX manual, shuffles from its pseudo-code,
 * counters from closed forms. */
#include "sim.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t u64;
typedef uint32_t u32;
typedef uint16_t u16;
typedef uint8_t u8;

static int passed, failed;
static u32 in[16][1024], out[16][1024]; /* [register][thread] */
static SimCounters counters;
static char problem[1000];

static void check(const char *name, bool ok) {
    passed += ok;
    failed += !ok;
    if (!ok)
        printf("FAIL %s %s\n", name, problem);
    problem[0] = 0;
}

static void sink(void *user, const SimFinding *f) {
    (void)user;
    sim_finding_text(f, problem, sizeof problem);
}

static u32 random32(void) {
    static u64 s = 1234567;
    s = s * 6364136223846793005ull + 1442695040888963407ull;
    return (u32)(s >> 33) ^ (u32)(s >> 11);
}

static const char head[] =
    ".version 7.4\n.target sm_80\n.address_size 64\n%s\n"
    ".visible .entry k(.param .u64 out, .param .u64 in, .param .align 8 .b8 s[16])\n{\n"
    " .reg .pred %%p<8>; .reg .b16 %%h<8>; .reg .b32 %%i<16>, %%o<16>, %%t<32>;\n"
    " .reg .f32 %%f<16>; .reg .b64 %%d<24>;\n .shared .align 16 .b8 sm[8192];\n"
    " .local .align 16 .b8 loc[64];\n"
    " ld.param.u64 %%d0, [out]; ld.param.u64 %%d1, [in]; mov.u32 %%t0, %%tid.x;\n"
    " mul.wide.u32 %%d2, %%t0, 4; add.u64 %%d0, %%d0, %%d2; add.u64 %%d1, %%d1, %%d2;\n"
    " mov.u32 %%t1, sm; shl.b32 %%t2, %%t0, 2; add.u32 %%t2, %%t2, %%t1;\n";

/* Runs `body` with %i0.. loaded from in and %o0.. stored to out; %t0 = tid, %t1 = sm, %t2 = word
 * tid of sm, %d0 / %d1 = this thread's first output / input. `module` goes before the kernel. */
static bool run(const char *module, const char *body, int n_in, int n_out, unsigned threads,
                u32 dynamic) {
    static char text[20000];
    char log[400];
    SimModule *m;
    struct {
        u64 out, in, s[2];
    } p = {.s = {0x1122334455667788, 0x99aabbccddeeff00}};
    size_t n = (size_t)snprintf(text, sizeof text, head, module);
    for (int k = 0; k < n_in; k++)
        n += (size_t)snprintf(text + n, sizeof text - n, " ld.global.u32 %%i%d, [%%d1+%d];\n", k,
                              k * 4096);
    n += (size_t)snprintf(text + n, sizeof text - n, "%s\n", body);
    for (int k = 0; k < n_out; k++)
        n += (size_t)snprintf(text + n, sizeof text - n, " st.global.u32 [%%d0+%d], %%o%d;\n",
                              k * 4096, k);
    n += (size_t)snprintf(text + n, sizeof text - n, " ret;\n}\n");
    if (sim_module_load(0, text, n, &m, log, sizeof log)) {
        snprintf(problem, sizeof problem, "%s", log);
        return false;
    }
    sim_mem_alloc(0, sizeof out, &p.out);
    sim_mem_alloc(0, sizeof in, &p.in);
    memcpy(sim_mem_ptr(p.in), in, sizeof in);
    sim_mem_mark(p.in, sizeof in, true);
    memset(&counters, 0, sizeof counters);
    SimLaunch l = {sim_module_kernel(m, 0), {1, 1, 1}, {threads, 1, 1}, dynamic, &p};
    int error = sim_launch(&l, &counters);
    memcpy(out, sim_mem_ptr(p.out), sizeof out);
    sim_mem_free(p.out);
    sim_mem_free(p.in);
    sim_module_unload(m);
    return error == 0;
}

static void randomise(int n) {
    for (int k = 0; k < n; k++)
        for (int t = 0; t < 1024; t++)
            in[k][t] = random32();
}

/* ------------------------------------------------------------------------------------------------
 * mma: rows and columns of element e of a lane's fragment, as in the manual's formulas */

typedef struct {
    const char *shape, *a, *b; /* "m16n8k16", types */
    int k, bits;               /* of an element */
} Shape;

static void a_place(const Shape *s, int lane, int e, int *row, int *col) {
    int group = lane >> 2, in_group = lane % 4;
    if (s->bits == 16 && s->k == 16) {
        *row = e < 2 || (e >= 4 && e < 6) ? group : group + 8;
        *col = in_group * 2 + (e & 1) + (e >= 4 ? 8 : 0);
    } else if (s->bits == 16) {
        *row = e < 2 ? group : group + 8;
        *col = in_group * 2 + (e & 1);
    } else if (s->k == 32) {
        *row = e < 4 || (e >= 8 && e < 12) ? group : group + 8;
        *col = in_group * 4 + (e & 3) + (e >= 8 ? 16 : 0);
    } else {
        *row = e < 4 ? group : group + 8;
        *col = in_group * 4 + (e & 3);
    }
}

static void b_place(const Shape *s, int lane, int e, int *row, int *col) {
    int group = lane >> 2, in_group = lane % 4;
    *col = group;
    if (s->bits == 16)
        *row = in_group * 2 + (e & 1) + (e >= 2 ? 8 : 0);
    else
        *row = in_group * 4 + (e & 3) + (e >= 4 ? 16 : 0);
}

static void c_place(int lane, int e, int *row, int *col) {
    *row = (lane >> 2) + (e < 2 ? 0 : 8);
    *col = (lane % 4) * 2 + (e & 1);
}

/* An element's bits for a small integer value. */
static u32 element(const char *type, int v) {
    float f = (float)v;
    u32 u;
    memcpy(&u, &f, 4);
    if (!strcmp(type, "bf16")) return u >> 16;
    if (!strcmp(type, "f16")) /* exact: an integer below 2048 */
        return v == 0 ? 0 : (u >> 16 & 0x8000) | ((u >> 23 & 255) - 112) << 10 | (u >> 13 & 1023);
    return (u32)v & 255;
}

static void test_mma(const Shape *s) {
    int a[16][32], b[32][8], c[16][8], n_a = s->k * 16 / 32, n_b = s->k * 8 / 32, r, q;
    int per = 32 / s->bits, regs_a = n_a / per, regs_b = n_b / per;
    bool is_float = s->bits == 16, ok;
    char body[900], name[100];
    memset(in, 0, sizeof in);
    for (int x = 0; x < 16 * 32; x++)
        a[x / 32][x % 32] = is_float         ? (int)(random32() % 31) - 15
                            : s->a[0] == 'u' ? (int)(random32() & 255)
                                             : (int)(random32() & 255) - 128;
    for (int x = 0; x < 32 * 8; x++)
        b[x / 8][x % 8] = is_float ? (int)(random32() % 31) - 15
                        : s->b[0] == 'u' ? (int)(random32() & 255) : (int)(random32() & 255) - 128;
    for (int x = 0; x < 16 * 8; x++)
        c[x / 8][x % 8] = (int)(random32() % 2000) - 1000;
    for (int lane = 0; lane < 32; lane++) {
        for (int e = 0; e < n_a; e++)
            a_place(s, lane, e, &r, &q), in[e / per][lane] |= element(s->a, a[r][q])
                                                               << (e % per * s->bits);
        for (int e = 0; e < n_b; e++)
            b_place(s, lane, e, &r, &q), in[regs_a + e / per][lane] |= element(s->b, b[r][q])
                                                                        << (e % per * s->bits);
        for (int e = 0; e < 4; e++) {
            c_place(lane, e, &r, &q);
            float f = (float)c[r][q];
            memcpy(&in[regs_a + regs_b + e][lane], is_float ? (void *)&f : (void *)&c[r][q], 4);
        }
    }
    const char *t = is_float ? "f32" : "s32";
    int n = snprintf(body, sizeof body, "mma.sync.aligned.%s.row.col.%s.%s.%s.%s "
                     "{%%o0, %%o1, %%o2, %%o3}, {", s->shape, t, s->a, s->b, t);
    for (int k = 0; k < regs_a + regs_b + 4; k++)
        n += snprintf(body + n, sizeof body - (size_t)n, "%s%%i%d", k == 0 ? ""
                      : k == regs_a || k == regs_a + regs_b ? "}, {" : ", ", k);
    snprintf(body + n, sizeof body - (size_t)n, "};");
    ok = run("", body, regs_a + regs_b + 4, 4, 32, 0);
    for (int lane = 0; lane < 32; lane++)
        for (int e = 0; e < 4; e++) {
            c_place(lane, e, &r, &q);
            int sum = c[r][q];
            for (int k = 0; k < s->k; k++)
                sum += a[r][k] * b[k][q];
            float f = (float)sum;
            ok &= !memcmp(&out[e][lane], is_float ? (void *)&f : (void *)&sum, 4);
        }
    snprintf(name, sizeof name, "mma %s %s %s", s->shape, s->a, s->b);
    check(name, ok);
    u64 mac = 16 * 8 * (u64)s->k;
    check("mma count", is_float ? counters.mma_half == 1 && counters.mma_half_mac == mac
                                : counters.mma_int == 1 && counters.mma_int_mac == mac);
}

static void test_mma_all(void) {
    static const char *const bytes[] = {"s8", "u8"};
    for (int k = 0; k < 20; k++) {
        test_mma(&(Shape){"m16n8k16", "bf16", "bf16", 16, 16});
        test_mma(&(Shape){"m16n8k16", "f16", "f16", 16, 16});
        test_mma(&(Shape){"m16n8k8", "bf16", "bf16", 8, 16});
        test_mma(&(Shape){"m16n8k8", "f16", "f16", 8, 16});
        test_mma(&(Shape){"m16n8k32", bytes[k & 1], bytes[k >> 1 & 1], 32, 8});
        test_mma(&(Shape){"m16n8k16", bytes[k & 1], bytes[k >> 1 & 1], 16, 8});
    }
}

/* ldmatrix: matrix m of 8 rows of 16 bytes, lane 8 m + r gives the address of row r; lane l gets
 * the elements of row l / 4 at columns 2 (l % 4) and the next, transposed: of column l / 4. */
static void test_ldmatrix(int n, bool trans) {
    char body[600], name[50];
    u16 memory[4][8][8];
    bool ok;
    randomise(4);
    for (int t = 0; t < 32; t++)
        for (int k = 0; k < 4; k++)
            memcpy(&memory[t / 8][t % 8][2 * k], &in[k][t], 4);
    snprintf(body, sizeof body,
             "mad.lo.u32 %%t3, %%t0, 48, %%t1;\n st.shared.v4.u32 [%%t3], {%%i0, %%i1, %%i2, %%i3};"
             "\n bar.warp.sync 0xffffffff;\n mov.u32 %%o1, 0; mov.u32 %%o2, 0; mov.u32 %%o3, 0;\n"
             "ldmatrix.sync.aligned.m8n8.x%d%s.shared.b16 {%s}, [%%t3];", n, trans ? ".trans" : "",
             n == 1 ? "%o0" : n == 2 ? "%o0, %o1" : "%o0, %o1, %o2, %o3");
    ok = run("", body, 4, n, 32, 0);
    for (int m = 0; m < n; m++)
        for (int l = 0; l < 32; l++)
            for (int e = 0; e < 2; e++) {
                int r = l / 4, c = l % 4 * 2 + e;
                ok &= (u16)(out[m][l] >> (16 * e)) == (trans ? memory[m][c][r] : memory[m][r][c]);
            }
    snprintf(name, sizeof name, "ldmatrix x%d%s", n, trans ? " trans" : "");
    check(name, ok);
}

/* ------------------------------------------------------------------------------------------------
 * shuffles, votes */

static void test_shfl(const char *mode, u32 c) {
    char body[300], name[60];
    bool ok;
    randomise(2);
    snprintf(body, sizeof body, "and.b32 %%i1, %%i1, 63;\n"
             "shfl.sync.%s.b32 %%o0|%%p1, %%i0, %%i1, %u, 0xffffffff;\n selp.u32 %%o1, 1, 0, %%p1;",
             mode, c);
    ok = run("", body, 2, 2, 32, 0);
    for (int lane = 0; lane < 32; lane++) {
        int b = (int)(in[1][lane] & 31), segment = (int)(c >> 8 & 31), clamp = (int)(c & 31), j;
        int max = (lane & segment) | (clamp & ~segment), min = lane & segment;
        bool valid;
        if (mode[0] == 'u')
            j = lane - b, valid = j >= max;
        else if (mode[0] == 'd')
            j = lane + b, valid = j <= max;
        else if (mode[0] == 'b')
            j = lane ^ b, valid = j <= max;
        else
            j = min | (b & ~segment), valid = j <= max;
        ok &= out[0][lane] == in[0][valid ? j : lane] && out[1][lane] == valid;
    }
    snprintf(name, sizeof name, "shfl %s %x", mode, c);
    check(name, ok);
}

static void test_votes(void) {
    bool ok = true;
    for (int k = 0; k < 4; k++) {
        u32 mask = 0, m2;
        randomise(2);
        for (int l = 0; l < 32; l++) {
            in[0][l] = k == 0 ? 0 : k == 1 ? 1 : in[0][l] & 1;
            in[1][l] = k == 3 ? 7 : in[1][l] % 4;
            mask |= in[0][l] << l;
        }
        ok &= run("", "setp.ne.u32 %p1, %i0, 0;\n vote.sync.ballot.b32 %o0, %p1, 0xffffffff;\n"
                  "vote.sync.all.pred %p2, %p1, 0xffffffff; selp.u32 %o1, 1, 0, %p2;\n"
                  "vote.sync.any.pred %p2, !%p1, 0xffffffff; selp.u32 %o2, 1, 0, %p2;\n"
                  "vote.sync.uni.pred %p2, %p1, 0xffffffff; selp.u32 %o3, 1, 0, %p2;\n"
                  "match.any.sync.b32 %o4, %i1, 0xffffffff;\n"
                  "match.all.sync.b32 %o5|%p3, %i1, 0xffffffff; selp.u32 %o6, 1, 0, %p3;\n"
                  "activemask.b32 %o7;", 2, 8, 32, 0);
        for (int l = 0; l < 32; l++) {
            m2 = 0;
            for (int j = 0; j < 32; j++)
                m2 |= (u32)(in[1][j] == in[1][l]) << j;
            ok &= out[0][l] == mask && out[1][l] == (mask == ~0u) && out[2][l] == (mask != ~0u) &&
                  out[3][l] == (mask == 0 || mask == ~0u) && out[4][l] == m2 &&
                  out[5][l] == (m2 == ~0u ? ~0u : 0) && out[6][l] == (m2 == ~0u) &&
                  out[7][l] == ~0u;
        }
    }
    check("vote, match, activemask", ok);
}

static void test_redux(void) {
    u32 want[8] = {0, ~0u, 0, ~0u, 0, 0};
    int32_t low = INT32_MAX, high = INT32_MIN;
    bool ok;
    randomise(1);
    for (int l = 0; l < 32; l++) {
        u32 v = in[0][l];
        want[0] += v, want[1] = v < want[1] ? v : want[1], want[2] = v > want[2] ? v : want[2];
        want[3] &= v, want[4] |= v, want[5] ^= v;
        low = (int32_t)v < low ? (int32_t)v : low, high = (int32_t)v > high ? (int32_t)v : high;
    }
    want[6] = (u32)low, want[7] = (u32)high;
    ok = run("", "redux.sync.add.u32 %o0, %i0, -1; redux.sync.min.u32 %o1, %i0, -1;\n"
             "redux.sync.max.u32 %o2, %i0, -1; redux.sync.and.b32 %o3, %i0, -1;\n"
             "redux.sync.or.b32 %o4, %i0, -1; redux.sync.xor.b32 %o5, %i0, -1;\n"
             "redux.sync.min.s32 %o6, %i0, -1; redux.sync.max.s32 %o7, %i0, -1;", 1, 8, 32, 0);
    for (int k = 0; k < 8; k++)
        for (int l = 0; l < 32; l++)
            ok &= out[k][l] == want[k];
    check("redux", ok);
}

/* ------------------------------------------------------------------------------------------------
 * control flow, functions, barriers */

static u32 collatz(u32 v) {
    u32 n = 0;
    for (v = v % 1000 + 1; v != 1; n++)
        v = v & 1 ? 3 * v + 1 : v / 2;
    return n;
}

static void test_control(void) {
    bool ok;
    randomise(2);
    ok = run("", "rem.u32 %t3, %i0, 1000; add.u32 %t3, %t3, 1; mov.u32 %o0, 0;\n"
             "LOOP: setp.eq.u32 %p1, %t3, 1; @%p1 bra DONE;\n and.b32 %t4, %t3, 1;\n"
             "setp.ne.u32 %p2, %t4, 0; @%p2 bra ODD;\n shr.u32 %t3, %t3, 1; bra.uni NEXT;\n"
             "ODD: mad.lo.u32 %t3, %t3, 3, 1;\nNEXT: add.u32 %o0, %o0, 1; bra LOOP;\nDONE:\n"
             "activemask.b32 %o1;", 1, 2, 64, 0);
    for (int t = 0; t < 64; t++)
        ok &= out[0][t] == collatz(in[0][t]) && out[1][t] == ~0u;
    check("divergent loop", ok && counters.divergent > 0);
    ok =
        run(".global .align 4 .u32 gv[3] = {7, 8, 9};\n.const .align 4 .b8 cb[4] = {1, 2, 3, 4};\n"
            ".extern .shared .align 16 .b8 dyn[];\n"
            ".func (.param .b32 r) unused(.param .b32 a)\n{\n { ret; }\n}\n",
            "mul.lo.u32 %o0, %t0, 5;\n"
            "{ .reg .b32 %t3; mov.u32 %t3, 77; { .reg .b32 %t3; mov.u32 %t3, 5; bra L; L: } "
            "mov.u32 %o1, %t3; bra L; L: }\n"
            "ld.global.u32 %o2, [gv+4]; ld.const.u8 %o3, [cb+2];\n"
            "st.shared.u32 [dyn+28], 99; bar.warp.sync -1; mov.u32 %t4, dyn; ld.shared.u32 %o4, "
            "[%t4+28];\n"
            "mov.b64 %d5, s; add.u64 %d5, %d5, 8; ld.param.u32 %o5, [%d5]; ld.param.u32 %o6, [s+4];"
            "\nmov.u32 %o7, %dynamic_smem_size;",
            0, 8, 32, 32);
    for (u32 t = 0; t < 32; t++)
        ok &= out[0][t] == t * 5 && out[1][t] == 77 && out[2][t] == 8 &&
              out[3][t] == 3 && out[4][t] == 99 && out[5][t] == 0xddeeff00 &&
              out[6][t] == 0x11223344 && out[7][t] == 32;
    check("functions, scopes, variables, parameters", ok);
}

static void test_barriers(void) {
    bool ok;
    randomise(1);
    ok = run("", "setp.ge.u32 %p3, %t0, 64; @%p3 bra CONSUME;\n st.shared.u32 [%t2], %i0;\n"
             "bar.arrive 3, 96; mov.u32 %o0, 0; bra.uni END;\nCONSUME: bar.sync 3, 96;\n"
             "ld.shared.u32 %o0, [%t2+-256];\nEND:", 1, 1, 96, 0);
    for (int t = 0; t < 96; t++) ok &= out[0][t] == (t < 64 ? 0 : in[0][t - 64]);
    check("bar.arrive", ok);
}

/* ------------------------------------------------------------------------------------------------
 * memory */

static void test_widths(const char *space, const char *base) {
    char body[1500], name[50];
    bool ok;
    randomise(4);
    snprintf(body, sizeof body,
             "%s\n st%s.v4.u32 [%%d5], {%%i0, %%i1, %%i2, %%i3};\n ld%s.u8 %%o0, [%%d5+3];\n"
             "ld%s.s8 %%o1, [%%d5+3]; ld%s.u16 %%h1, [%%d5+6]; cvt.u32.u16 %%o2, %%h1;\n"
             "ld%s.s16 %%o3, [%%d5+6]; ld%s.u64 %%d6, [%%d5+8]; mov.b64 {%%o4, %%o5}, %%d6;\n"
             "ld%s.v2.b32 {%%o6, %%t5}, [%%d5]; st%s.u8 [%%d5+1], %%i3; ld%s.u32 %%o7, [%%d5];\n"
             "ld%s.s8 %%d7, [%%d5+7]; cvt.u32.u64 %%o8, %%d7; st%s.b16 [%%d5+4], %%d7;\n"
             "ld%s.v2.u16 {%%h2, %%h3}, [%%d5+4]; mov.b32 %%o9, {%%h2, %%h3};", base, space, space,
             space, space, space, space, space, space, space, space, space, space);
    ok = run("", body, 4, 10, 64, 0);
    for (int t = 0; t < 64; t++) {
        u32 a = in[0][t], b = in[1][t], s = (u32)(int)(int8_t)(b >> 24);
        ok &= out[0][t] == a >> 24 && out[1][t] == (u32)(int)(int8_t)(a >> 24) &&
              out[2][t] == b >> 16 && out[3][t] == (u32)(int)(int16_t)(b >> 16) &&
              out[4][t] == in[2][t] && out[5][t] == in[3][t] && out[6][t] == a &&
              out[7][t] == ((a & 0xffff00ff) | (in[3][t] & 255) << 8) && out[8][t] == s &&
              out[9][t] == ((b & 0xffff0000) | (s & 0xffff));
    }
    snprintf(name, sizeof name, "widths, space '%s'", space);
    check(name, ok);
}

static void test_atomics(const char *space, const char *address) {
    static const struct {
        const char *op, *type;
    } ops[] = {{"add", "u32"}, {"min", "s32"}, {"max", "u32"}, {"and", "b32"}, {"or", "b32"},
               {"xor", "b32"}, {"exch", "b32"}, {"inc", "u32"}, {"dec", "u32"}, {"cas", "b32"},
               {"add", "f32"}};
    for (size_t k = 0; k < sizeof ops / sizeof *ops; k++) {
        char body[700], name[60];
        u32 v, want[32];
        bool ok;
        randomise(2);
        for (int l = 0; l < 32 && k >= 7; l++)
            in[0][l] %= 20, in[1][l] %= 20;
        v = in[1][0];
        for (int l = 0; l < 32; l++) { /* lanes in order */
            u32 b = in[0][l];
            float f, g;
            memcpy(&f, &v, 4), memcpy(&g, &b, 4), f += g;
            want[l] = v;
            switch (k) {
            case 0: v += b; break;
            case 1: v = (int32_t)b < (int32_t)v ? b : v; break;
            case 2: v = b > v ? b : v; break;
            case 3: v &= b; break;
            case 4: v |= b; break;
            case 5: v ^= b; break;
            case 6: v = b; break;
            case 7: v = v >= b ? 0 : v + 1; break;
            case 8: v = v == 0 || v > b ? b : v - 1; break;
            case 9: v = v == b ? in[1][l] : v; break;
            default: memcpy(&v, &f, 4);
            }
        }
        snprintf(body, sizeof body, "setp.eq.u32 %%p1, %%t0, 0;\n @%%p1 st%s.u32 [%s], %%i1;\n"
                 "bar.sync 0;\n atom%s.%s.%s %%o0, [%s], %%i0%s;\n bar.sync 0;\n"
                 "ld%s.u32 %%o1, [%s];", space, address, space, ops[k].op, ops[k].type, address,
                 k == 9 ? ", %i1" : "", space, address);
        ok = run(".global .align 8 .b32 cell;", body, 2, 2, 32, 0);
        for (int l = 0; l < 32; l++)
            ok &= out[0][l] == want[l] && out[1][l] == v;
        snprintf(name, sizeof name, "atom%s.%s.%s", space, ops[k].op, ops[k].type);
        check(name, ok && counters.atomics == 32);
    }
}

static void test_async(void) {
    bool ok;
    randomise(8);
    ok = run("", "mul.lo.u32 %t3, %t0, 32; add.u32 %t3, %t3, %t1; mul.wide.u32 %d5, %t0, 12;\n"
             "add.u64 %d5, %d5, %d1;\n" /* 16 bytes a thread */
             "setp.lt.u32 %p1, %t0, 16; selp.u32 %t4, 16, 0, %p1; and.b32 %t6, %t0, 3;\n"
             "cp.async.cg.shared.global [%t3], [%d5], 16, %t4;\n cp.async.commit_group;\n"
             "cp.async.ca.shared.global [%t3+16], [%d1+4096], 4;\n"
             "cp.async.ca.shared.global [%t3+20], [%d1+8192], 4, %t6;\n cp.async.commit_group;\n"
             "cp.async.wait_group 1;\n ld.shared.v4.u32 {%o0, %o1, %o2, %o3}, [%t3];\n"
             "cp.async.wait_group 0;\n ld.shared.v2.u32 {%o4, %o5}, [%t3+16];", 0, 6, 32, 0);
    for (u32 t = 0; t < 32; t++) {
        for (u32 k = 0; k < 4; k++)
            ok &= out[k][t] == (t < 16 ? in[0][4 * t + k] : 0);
        ok &= out[4][t] == in[1][t] && out[5][t] == (in[2][t] & ((1u << (t & 3) * 8) - 1));
    }
    check("cp.async", ok);
}

static void test_special(void) {
    static const char text[] =
        ".version 7.4\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 out)\n{\n"
        ".reg .b32 %r<20>; .reg .b64 %d<4>; ld.param.u64 %d0, [out];\n"
        "mov.u32 %r0, %tid.x; mov.u32 %r1, %tid.y; mov.u32 %r2, %tid.z; mov.u32 %r3, %ctaid.x;\n"
        "mov.u32 %r4, %ctaid.y; mov.u32 %r5, %ctaid.z; mov.u32 %r6, %nctaid.y; mov.u32 %r7, "
        "%ntid.x;\nmov.u32 %r8, %ntid.y; mov.u32 %r9, %laneid; mov.u32 %r10, %lanemask_lt;\n"
        "mad.lo.u32 %r11, %r2, %r8, %r1; mad.lo.u32 %r11, %r11, %r7, %r0;\n" /* thread */
        "mad.lo.u32 %r12, %r5, %r6, %r4; mad.lo.u32 %r12, %r12, 2, %r3;\n"   /* block */
        "mad.lo.u32 %r13, %r12, 60, %r11; mul.wide.u32 %d1, %r13, 16; add.u64 %d0, %d0, %d1;\n"
        "st.global.v4.u32 [%d0], {%r11, %r12, %r9, %r10}; ret;\n}\n";
    char log[300];
    SimModule *m;
    u64 address;
    bool ok = !sim_module_load(0, text, sizeof text - 1, &m, log, sizeof log);
    sim_mem_alloc(0, 2 * 3 * 4 * 60 * 16, &address);
    memset(&counters, 0, sizeof counters);
    SimLaunch l = {sim_module_kernel(m, 0), {2, 3, 4}, {5, 4, 3}, 0, &address};
    ok &= !sim_launch(&l, &counters);
    const u32 *v = sim_mem_ptr(address);
    for (u32 b = 0; b < 24; b++)
        for (u32 t = 0; t < 60; t++, v += 4)
            ok &= v[0] == t && v[1] == b && v[2] == t % 32 && v[3] == (1u << t % 32) - 1;
    check("special registers, partial warps, grids", ok && counters.threads == 24 * 60);
    sim_module_unload(m);
    sim_mem_free(address);
}

/* ------------------------------------------------------------------------------------------------
 * counters */

static void test_counters(void) {
    /* the template itself stores nothing and loads nothing when n_in = n_out = 0 */
    bool ok = run("", "ld.global.u32 %t3, [%d1];", 0, 0, 32, 0);
    check("32 words: 4 sectors", ok && counters.load[2].sectors == 4 &&
                                     counters.load[2].warp == 1 && counters.load[2].bytes == 128 &&
                                     counters.unique_load_sectors == 4);
    ok = run("", "ld.global.u32 %t3, [%d1+16];", 0, 0, 32, 0);
    check("32 words off by 16 bytes: 5 sectors", ok && counters.load[2].sectors == 5);
    ok = run("", "mul.wide.u32 %d5, %t0, 2044; add.u64 %d1, %d1, %d5; setp.lt.u32 %p1, %t0, 2;\n"
             "@%p1 ld.global.u32 %t3, [%d1];", 0, 0, 32, 0);
    check("2 words 64 sectors apart: 2 sectors", ok && counters.load[2].sectors == 2);
    ok = run("", "add.u64 %d1, %d1, %d2; ld.global.u32 %t3, [%d1]; ld.global.u32 %t3, [%d1];", 0, 0,
             32, 0);
    check("stride 2: 8 sectors, 8 unique of 16", ok && counters.load[2].sectors == 16 &&
          counters.unique_load_sectors == 8);
    ok = run("", "mul.lo.u64 %d2, %d2, 3; add.u64 %d1, %d1, %d2;\n"
             "ld.global.v4.u32 {%t3, %t4, %t5, %t6}, [%d1];", 0, 0, 32, 0);
    check("16 bytes a lane: 16 sectors", ok && counters.load[4].sectors == 16 &&
          counters.load[4].bytes == 512);
    ok = run("", "setp.lt.u32 %p1, %t0, 8; @%p1 st.global.u32 [%d0], %t0;", 0, 0, 32, 0);
    check("8 lanes: 1 sector",
          ok && counters.store[2].sectors == 1 && counters.store[2].lane == 8 &&
              counters.lane[SIM_C_GLOBAL] == 8 && counters.warp[SIM_C_GLOBAL] == 1);
    static const struct {
        int stride, passes;
    } banks[] = {{1, 1}, {2, 2}, {3, 1}, {4, 4}, {8, 8}, {16, 16}, {32, 32}, {33, 1}, {0, 1}};
    for (size_t k = 0; k < sizeof banks / sizeof *banks; k++) {
        char body[200], name[50];
        snprintf(body, sizeof body, "mul.lo.u32 %%t3, %%t0, %d; add.u32 %%t3, %%t3, %%t1;\n"
                 "st.shared.u32 [%%t3], 5;", banks[k].stride * 4);
        ok = run("", body, 0, 0, 32, 0);
        snprintf(name, sizeof name, "bank conflicts, stride %d", banks[k].stride);
        check(name, ok && counters.shared_passes == (u64)banks[k].passes &&
              counters.shared_ideal == 1 && counters.shared_accesses == 1);
    }
    ok = run("", "shl.b32 %t3, %t0, 4; add.u32 %t3, %t3, %t1;\n"
             "st.shared.v4.u32 [%t3], {%t0, %t0, %t0, %t0};", 0, 0, 32, 0);
    check("16-byte stores: 4 passes", ok && counters.shared_passes == 4 &&
          counters.shared_ideal == 4);
    ok = run("", "bar.sync 0; bar.sync 0; dp4a.s32.s32 %t3, %t0, %t0, %t0;", 0, 0, 96, 0);
    check("barriers and classes", ok && counters.barriers == 6 && counters.warp[SIM_C_DP4A] == 3 &&
          counters.lane[SIM_C_DP4A] == 96 && counters.threads == 96 && counters.blocks == 1);
}

/* The same results and counters whatever the seed and the number of threads. */
static void test_same(void) {
    static const char body[] =
        "shl.b32 %t3, %i0, 2; and.b32 %t3, %t3, 252; add.u32 %t3, %t3, %t1; st.shared.u32 [%t2], "
        "0;\n"
        "bar.sync 0; atom.shared.add.u32 %o1, [%t3], 1; bar.sync 0; ld.shared.u32 %o0, [%t2];\n"
        "mov.u32 %o1, 0;";
    SimCounters first;
    u32 result[64];
    bool ok = true;
    randomise(1);
    for (int k = 0; k < 6; k++) {
        sim_options.seed = (u64)k;
        sim_options.threads = 1 + k % 3;
        ok &= run("", body, 1, 2, 64, 0);
        if (k == 0)
            first = counters, memcpy(result, out, sizeof result);
        ok &= !memcmp(&first, &counters, sizeof first) && !memcmp(result, out, sizeof result);
    }
    sim_options.seed = 0;
    sim_options.threads = 0;
    check("the same with every seed", ok);
}

int main(void) {
    static const char *const modes[] = {"up", "down", "bfly", "idx"};
    static const u32 clamps[] = {0x1f, 0, 0x1c03, 0x1000, 0x1808, 0x181f};
    sim_set_sink(sink, NULL);
    test_mma_all();
    for (int n = 1; n <= 4; n *= 2)
        for (int t = 0; t < 2; t++)
            test_ldmatrix(n, t);
    for (int m = 0; m < 4; m++)
        for (int c = 0; c < 6; c++)
            test_shfl(modes[m], clamps[c]);
    test_votes();
    test_redux();
    test_control();
    test_barriers();
    test_widths(".global",
                "mul.lo.u64 %d5, %d2, 3; add.u64 %d5, %d5, %d0; add.u64 %d5, %d5, 40960;");
    test_widths(".shared", "shl.b32 %t3, %t0, 4; add.u32 %t3, %t3, %t1; cvt.u64.u32 %d5, %t3;");
    test_widths(".local", "mov.u64 %d5, loc; add.u64 %d5, %d5, 16;");
    test_widths("", "mov.u64 %d5, loc; cvta.local.u64 %d5, %d5;");
    test_widths("", "shl.b64 %d5, %d2, 2; mov.u64 %d6, sm; cvta.shared.u64 %d6, %d6;\n"
                "add.u64 %d5, %d5, %d6;");
    test_atomics(".global", "cell");
    test_atomics(".shared", "sm");
    test_async();
    test_special();
    test_counters();
    test_same();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
