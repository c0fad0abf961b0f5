/* test_ptx_bugs.c: every check catches its bug, with the right words, and leaves the correct twin
 * of the bug alone. A case is a kernel body in which $ stands for the wrong or the right text. */
#include "sim.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What a body finds: %r0 tid, %r1 ctaid, %r3 global index, %r6 &sm[tid] (u32), %r5 sm, %d0 and %d1
 * the two buffers, %d3 = &out[i] (not initialised), %d4 = &in[i], %r9 = a number, 4096 bytes sm,
 * 64 bytes loc, %p1 = tid < 16, %p2 = tid < 32, %p3 = ctaid is 0. */
static const char head[] =
    ".version 7.4\n.target sm_80\n.address_size 64\n"
    ".const .align 4 .b32 table[4] = {1, 2, 3, 4};\n"
    ".visible .entry k(.param .u64 out, .param .u64 in, .param .u32 n)\n{\n"
    "  .reg .pred %p<8>;\n  .reg .b32 %r<32>;\n  .reg .f32 %f<8>;\n  .reg .b64 %d<16>;\n"
    "  .shared .align 16 .b8 sm[4096];\n  .local .align 16 .b8 loc[64];\n"
    "  ld.param.u64 %d0, [out];\n  ld.param.u64 %d1, [in];\n  ld.param.u32 %r9, [n];\n"
    "  mov.u32 %r0, %tid.x;\n  mov.u32 %r1, %ctaid.x;\n  mov.u32 %r2, %ntid.x;\n"
    "  mad.lo.u32 %r3, %r1, %r2, %r0;\n  mul.wide.u32 %d2, %r3, 4;\n  add.u64 %d3, %d0, %d2;\n"
    "  add.u64 %d4, %d1, %d2;\n  shl.b32 %r4, %r0, 2;\n  mov.u32 %r5, sm;\n"
    "  add.u32 %r6, %r5, %r4;\n  setp.lt.u32 %p1, %r0, 16;\n  setp.lt.u32 %p2, %r0, 32;\n"
    "  setp.eq.u32 %p3, %r1, 0;\n";
static const char tail[] = "  ret;\n}\n";

enum { FREED = 1, FOREIGN = 2, HOST = 4, SMALL = 8 }; /* what the host does before the launch */

typedef struct {
    const char *name;
    SimKind kind;
    const char *words;       /* the finding must hold them */
    const char *body, *bad, *good;
    unsigned grid, block;    /* 0: 2 blocks of 64 threads */
    int host;                /* for the bad one only */
} Case;

static const Case cases[] = {
    {"store one past the end", SIM_BOUNDS, "past the end", "st.global.u32 [%d3+$], %r0;", "4", "0",
     0, 0, 0},
    {"load before the start", SIM_BOUNDS, "outside every block", "ld.global.u32 %r10, [%d4+$];",
     "-4", "0", 0, 0, 0},
    {"vector store across the end", SIM_BOUNDS, "cross the end",
     "mul.wide.u32 %d5, %r3, 16;\n add.u64 %d6, %d0, %d5;\n setp.lt.u32 %p4, %r3, $;\n"
     "@%p4 st.global.v4.u32 [%d6], {%r0, %r0, %r0, %r0};\n",
     "4", "3", 0, 0, SMALL},
    {"null pointer", SIM_BOUNDS, "not a device address", "mov.u64 %d5, $;\n ld.u32 %r10, [%d5];",
     "0", "%d4", 0, 0, 0},
    {"use after free", SIM_FREED, "freed block of 512", "ld.global.u32 %r10, [%d4$];", "+0", "+0",
     0, 0, FREED},
    {"memory of another device", SIM_FOREIGN, "memory of device 1", "ld.global.u32 %r10, [%d4$];",
     "+0", "+0", 0, 0, FOREIGN},
    {"host memory that is not registered", SIM_BOUNDS, "registered", "ld.global.u32 %r10, [%d4$];",
     "+0", "+0", 0, 0, HOST},
    {"misaligned word", SIM_ALIGN, "access size 4", "ld.global.u32 %r10, [%d4+$];", "2", "0", 0, 0,
     0},
    {"misaligned vector", SIM_ALIGN, "access size 16",
     "mul.wide.u32 %d5, %r1, $;\n add.u64 %d6, %d1, %d5;\n"
     "ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%d6];",
     "8", "16", 0, 0, 0},
    {"shared memory overrun", SIM_BOUNDS, "4096 bytes", "st.shared.u32 [%r6+$], %r0;", "3844",
     "3840", 0, 0, 0},
    {"misaligned shared vector", SIM_ALIGN, "access size 8",
     "shl.b32 %r10, %r0, 3;\n add.u32 %r10, %r10, %r5;\n st.shared.v2.u32 [%r10+$], {%r0, %r0};",
     "4", "8", 0, 0, 0},
    {"local array overrun", SIM_BOUNDS, "local memory",
     "mov.u64 %d5, loc;\n st.local.u32 [%d5+$], %r0;", "64", "60", 0, 0, 0},
    {"global memory read before it is written", SIM_UNINIT, "nothing wrote",
     "ld.global.u32 %r10, [$];", "%d3", "%d4", 0, 0, 0},
    {"shared memory read before it is written", SIM_UNINIT, "nothing wrote",
     "$\n ld.shared.u32 %r10, [%r6];", "", "st.shared.u32 [%r6], %r0;", 0, 0, 0},
    {"register set on one path only", SIM_UNINIT, "never written",
     "$\n @%p1 mov.u32 %r10, 1;\n st.global.u32 [%d3], %r10;", "", "mov.u32 %r10, 0;", 0, 0, 0},
    {"missing barrier before a read", SIM_RACE, "not ordered by a barrier",
     "st.shared.u32 [%r6], %r9;\n bar.sync 0;\n st.shared.u32 [%r6], %r0;\n $\n"
     "xor.b32 %r10, %r4, 128;\n add.u32 %r10, %r10, %r5;\n ld.shared.u32 %r11, [%r10];",
     "bar.warp.sync 0xffffffff;", "bar.sync 0;", 0, 0, 0},
    {"missing barrier before a write", SIM_RACE, "shared-memory race",
     "st.shared.u32 [%r6], %r0;\n bar.sync 0;\n xor.b32 %r10, %r4, 128;\n"
     "add.u32 %r10, %r10, %r5;\n ld.shared.u32 %r11, [%r10];\n $\n st.shared.u32 [%r6], %r11;",
     "", "bar.sync 0;", 0, 0, 0},
    {"missing warp synchronisation", SIM_RACE, "shared-memory race",
     "st.shared.u32 [%r6], %r0;\n $\n xor.b32 %r10, %r4, 4;\n add.u32 %r10, %r10, %r5;\n"
     "ld.shared.u32 %r11, [%r10];",
     "", "bar.warp.sync 0xffffffff;", 0, 0, 0},
    {"two warps write one shared word", SIM_RACE, "this write and a write",
     "shr.u32 %r10, %r0, 5;\n and.b32 %r11, %r0, 31;\n"
     "setp.eq.u32 %p4, %r11, 0;\n mul.lo.u32 %r12, %r10, $;\n add.u32 %r12, %r12, %r5;\n"
     "add.u32 %r13, %r0, 1;\n @%p4 st.shared.u32 [%r12], %r13;",
     "0", "4", 0, 0, 0},
    {"bytes of one word by two warps", SIM_RACE, "this write and a write",
     "mul.lo.u32 %r10, %r0, 1;\n and.b32 %r10, %r10, $;\n add.u32 %r10, %r10, %r5;\n"
     "st.shared.u8 [%r10], %r0;",
     "31", "63", 0, 0, 0},
    {"blocks write one global word", SIM_RACE, "global-memory race",
     "setp.eq.u32 %p4, %r0, 0;\n mul.wide.u32 %d5, %r1, $;\n add.u64 %d6, %d0, %d5;\n"
     "add.u32 %r10, %r1, 1;\n @%p4 st.global.u32 [%d6], %r10;",
     "0", "4", 0, 0, 0},
    {"a block reads what another writes", SIM_RACE, "of block",
     "st.global.u32 [%d4], %r0;\n setp.eq.u32 %p4, %r1, $;\n @%p4 ld.global.u32 %r10, [%d1];", "1",
     "0", 0, 1, 0},
    {"a block writes what another reads", SIM_RACE, "of block",
     "ld.global.u32 %r10, [%d1];\n setp.eq.u32 %p4, %r1, $;\n add.u32 %r10, %r10, 7;\n"
     "@%p4 st.global.u32 [%d1], %r10;",
     "1", "2", 0, 1, 0},
    {"missing barrier on global memory", SIM_RACE, "global-memory race",
     "st.global.u32 [%d4], %r0;\n $\n xor.b32 %r10, %r3, 32;\n mul.wide.u32 %d5, %r10, 4;\n"
     "add.u64 %d6, %d1, %d5;\n ld.global.u32 %r11, [%d6];",
     "", "bar.sync 0;", 0, 0, 0},
    {"plain read of an atomic counter", SIM_RACE, "global-memory race",
     "atom.global.add.u32 %r10, [%d1], 1;\n $", "ld.global.u32 %r11, [%d1];",
     "ld.relaxed.gpu.global.u32 %r11, [%d1];", 0, 0, 0},
    {"barrier in divergent code", SIM_BARRIER, "divergent", "$ bar.sync 0;", "@%p1", "", 1, 32,
     0},
    {"barrier that some lanes reach by a jump back", SIM_BARRIER, "ended",
     "@%p1 bra MEET; bra OTHER;\nMEET: bar.sync 0; bra END;\nOTHER: add.u32 %r10, %r0, 1;\n"
     "st.shared.u32 [%r6], %r10; bra $;\nEND:",
     "END", "MEET", 1, 32, 0},
    {"shuffle that some lanes reach by a jump back", SIM_WARP_MASK, "not here",
     "mov.u32 %r11, 0; @%p1 bra MEET; bra OTHER;\n"
     "MEET: shfl.sync.idx.b32 %r11, %r0, 5, 31, 0xffffffff; bra END;\nOTHER: add.u32 %r10, %r0, "
     "1;\n"
     "bra $;\nEND: bar.warp.sync 0xffffffff;",
     "END", "MEET", 1, 32, 0},
    {"copy of a register on some paths", SIM_UNINIT, "never written",
     "mov.b32 %r11, 0; setp.lt.u32 %p4, %r0, $; @%p4 mov.b32 %r10, %r11;\n"
     "add.u32 %r12, %r10, %r10;",
     "2", "99", 1, 3, 0},
    {"sum of a set register and one that is not", SIM_UNINIT, "never written",
     "mov.b32 %r11, 0; mov.b32 %r13, %r11; setp.lt.u32 %p4, %r0, $; @%p4 mov.b32 %r10, %r11;\n"
     "add.u32 %r12, %r13, %r10;",
     "2", "99", 1, 3, 0},
    {"guard set on one path only", SIM_UNINIT, "guard was never",
     "@%p1 setp.lt.u32 %p4, %r0, 99; $\n @%p4 mov.u32 %r10, 1;", "",
     "@!%p1 setp.lt.u32 %p4, %r0, 5;", 1, 32, 0},
    {"barrier after threads have ended", SIM_BARRIER, "ended",
     "setp.lt.u32 %p4, %r0, $;\n @%p4 ret;\n bar.sync 0;", "16", "0", 0, 0, 0},
    {"barrier that a warp never reaches", SIM_BARRIER, "dead lock",
     "setp.lt.u32 %p4, %r0, $;\n @%p4 bra SKIP;\n bar.sync 0;\nSKIP:", "32", "0", 0, 0, 0},
    {"barrier with a bad count", SIM_BARRIER, "bad barrier", "bar.sync 1, $;", "96", "64", 0, 0, 0},
    {"shuffle names lanes that are elsewhere", SIM_WARP_MASK, "not here",
     "mov.u32 %r10, 5;\n @%p1 shfl.sync.bfly.b32 %r10, %r0, 1, 31, $;", "0xffffffff", "0xffff", 1,
     32, 0},
    {"shuffle by a lane that the mask leaves out", SIM_WARP_MASK, "does not name",
     "shfl.sync.bfly.b32 %r10, %r0, 1, 31, $;", "0x7fffffff", "0xffffffff", 1, 32, 0},
    {"shuffle reads a lane that does not exist", SIM_WARP_MASK, "does not take part",
     "shfl.sync.bfly.b32 %r10, %r0, $, 31, 0xffffffff;", "16", "8", 1, 16, 0},
    {"vote in divergent code", SIM_WARP_MASK, "vote",
     "mov.u32 %r10, 0;\n @%p1 vote.sync.ballot.b32 %r10, %p2, $;", "0xffffffff", "0x0000ffff", 1,
     32, 0},
    {"redux in divergent code", SIM_WARP_MASK, "redux",
     "mov.u32 %r10, 0;\n @%p1 redux.sync.add.u32 %r10, %r0, $;", "0xffffffff", "0x0000ffff", 1, 32,
     0},
    {"mma in divergent code", SIM_WARP_MASK, "mma needs all 32",
     "mov.f32 %f0, 0f00000000;\n mov.f32 %f1, %f0;\n mov.f32 %f2, %f0;\n mov.f32 %f3, %f0;\n"
     "$ mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%f0, %f1, %f2, %f3}, {%r0, %r0}, {%r0},"
     " {%f0, %f1, %f2, %f3};",
     "@%p1", "@%p2", 1, 32, 0},
    {"ldmatrix in divergent code", SIM_WARP_MASK, "ldmatrix needs all 32",
     "st.shared.u32 [%r6], %r0;\n bar.warp.sync 0xffffffff;\n and.b32 %r10, %r0, 7;\n"
     "shl.b32 %r10, %r10, 4;\n add.u32 %r10, %r10, %r5;\n mov.u32 %r11, 0;\n"
     "$ ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r11}, [%r10];",
     "@%p1", "@%p2", 1, 32, 0},
    {"ldmatrix row not on 16 bytes", SIM_ALIGN, "access size 16",
     "st.shared.u32 [%r6], %r0;\n bar.warp.sync 0xffffffff;\n mul.lo.u32 %r10, %r0, $;\n"
     "and.b32 %r10, %r10, 112;\n mul.lo.u32 %r12, %r0, $;\n and.b32 %r12, %r12, 8;\n"
     "add.u32 %r10, %r10, %r12;\n add.u32 %r10, %r10, %r5;\n"
     "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r11}, [%r10];",
     "8", "16", 1, 32, 0},
    {"asynchronous copy that nobody waits for", SIM_CP_ASYNC, "still fills",
     "cp.async.ca.shared.global [%r6], [%d4], 4;\n cp.async.commit_group;\n $\n"
     "ld.shared.u32 %r10, [%r6];",
     "", "cp.async.wait_group 0;", 0, 0, 0},
    {"wait that leaves the group under way", SIM_CP_ASYNC, "still fills",
     "cp.async.ca.shared.global [%r6], [%d4], 4;\n cp.async.commit_group;\n"
     "cp.async.wait_group $;\n ld.shared.u32 %r10, [%r6];",
     "1", "0", 0, 0, 0},
    {"asynchronous copy not committed", SIM_CP_ASYNC, "still fills",
     "cp.async.ca.shared.global [%r6], [%d4], 4;\n $\n cp.async.wait_group 0;\n"
     "ld.shared.u32 %r10, [%r6];",
     "", "cp.async.commit_group;", 0, 0, 0},
    {"asynchronous copy seen by another warp without a barrier", SIM_RACE, "shared-memory race",
     "cp.async.ca.shared.global [%r6], [%d4], 4;\n cp.async.wait_all;\n $\n"
     "xor.b32 %r10, %r4, 128;\n add.u32 %r10, %r10, %r5;\n setp.ge.u32 %p4, %r0, 32;\n"
     "@%p4 ld.shared.u32 %r11, [%r10];",
     "", "bar.sync 0;", 0, 0, 0},
    {"store under an asynchronous copy", SIM_CP_ASYNC, "write of shared",
     "cp.async.ca.shared.global [%r6], [%d4], 4;\n $\n st.shared.u32 [%r6], %r0;", "",
     "cp.async.wait_all;", 0, 0, 0},
    {"division by zero", SIM_DIV_ZERO, "division by zero",
     "or.b32 %r10, %r0, $;\n div.u32 %r11, 100, %r10;", "0", "1", 0, 0, 0},
    {"64-bit remainder by zero", SIM_DIV_ZERO, "division by zero",
     "or.b32 %r10, %r0, $;\n cvt.u64.u32 %d5, %r10;\n rem.s64 %d6, %d4, %d5;", "0", "1", 0, 0, 0},
    {"endless loop", SIM_TIMEOUT, "endless loop",
     "mov.u32 %r10, 0;\nLOOP:\n add.u32 %r10, %r10, $;\n setp.lt.u32 %p4, %r10, 9;\n @%p4 bra "
     "LOOP;",
     "0", "1", 0, 0, 0},
    {"trap", SIM_TRAP, "trap", "setp.gt.u32 %p4, %r0, $;\n @%p4 trap;", "5", "99", 0, 0, 0},
    {"store to constant memory", SIM_READONLY, "constant",
     "mov.u64 %d5, table;\n setp.eq.u32 %p4, %r0, $;\n @%p4 st.global.u32 [%d5], %r0;\n"
     "ld.const.u32 %r10, [table+4];",
     "3", "999", 0, 0, 0},
};

static SimFinding last;
static char last_line[1000];
static int n_findings, passed, failed;

static void sink(void *user, const SimFinding *f) {
    (void)user;
    if (!n_findings++) {
        last = *f;
        sim_finding_text(f, last_line, sizeof last_line);
    }
}

static void result(bool ok, const char *name, const char *what, const char *detail) {
    passed += ok;
    failed += !ok;
    if (!ok)
        printf("FAIL %s: %s: %s\n", name, what, detail);
}

/* body with every $ replaced, between head and tail. */
static char *kernel_text(const char *body, const char *with) {
    static char text[8192];
    size_t n = (size_t)snprintf(text, sizeof text, "%s", head);
    for (; *body; body++)
        n += (size_t)(*body == '$' ? snprintf(text + n, sizeof text - n, "%s", with)
                                   : snprintf(text + n, sizeof text - n, "%c", *body));
    snprintf(text + n, sizeof text - n, "\n%s", tail);
    return text;
}

static int launch(const Case *c, const char *with, int host, int threads) {
    unsigned grid = c->grid ? c->grid : 2, block = c->block ? c->block : 64;
    unsigned bytes = grid * block * 4;
    static uint32_t memory[1024];
    char log[500];
    SimModule *m;
    SimCounters counters = {0};
    struct {
        uint64_t out, in;
        uint32_t n;
    } p = {.n = 7};
    for (unsigned k = 0; k < bytes / 4; k++)
        memory[k] = k;
    sim_options.threads = threads;
    if (sim_module_load(0, kernel_text(c->body, with), strlen(kernel_text(c->body, with)), &m, log,
                        sizeof log)) {
        printf("FAIL %s: %s\n", c->name, log);
        return -1;
    }
    bool host_memory = !strcmp(c->name, "host memory that is not registered");
    int owner = strstr(c->name, "another device") ? 1 : 0;
    sim_mem_alloc(0, host & SMALL ? 56 : bytes, &p.out);
    sim_mem_alloc(owner, bytes, &p.in);
    memcpy(sim_mem_ptr(p.in), memory, bytes);
    sim_mem_mark(p.in, bytes, true);
    sim_mem_peer(0, 1, !(host & FOREIGN));
    if (host_memory)
        p.in = (uint64_t)(uintptr_t)memory;
    if (host_memory && !(host & HOST))
        sim_mem_host_add(memory, sizeof memory);
    if (host & FREED)
        sim_mem_free(p.in);
    n_findings = 0;
    SimLaunch l = {sim_module_kernel(m, 0), {grid, 1, 1}, {block, 1, 1}, 0, &p};
    int error = sim_launch(&l, &counters);
    sim_mem_host_remove(memory);
    sim_mem_free(p.out);
    sim_mem_free(p.in);
    sim_module_unload(m);
    return error;
}

static void run_case(const Case *c) {
    for (int seed = 0; seed < 4; seed++) {
        sim_options.seed = (uint64_t)seed;
        int error = launch(c, c->good, 0, 1 + seed % 2);
        result(error == 0 && n_findings == 0, c->name, "false alarm", last_line);
    }
    sim_options.seed = 0;
    int error = launch(c, c->bad, c->host, 1);
    result(error > 0, c->name, "not caught", "no error");
    result(n_findings == 1 && last.kind == c->kind, c->name, "wrong kind", last_line);
    result(strstr(last.text, c->words) != NULL, c->name, "wrong words", last_line);
    result(strstr(last_line, "kernel k, device 0, PTX line") != NULL, c->name, "no kernel name",
           last_line);
    result(last.ptx_line > 22, c->name, "no line", last_line);
    if (getenv("VERBOSE"))
        puts(last_line);
}

/* ------------------------------------------------------------------------------------------------
 * texts that must be refused, with the reason */

static const struct {
    const char *body, *words;
} refused[] = {
    {"frob.u32 %r1, %r2;", "unknown instruction 'frob'"},
    {"add.wrong.u32 %r1, %r2, %r3;", "unsupported modifier '.wrong'"},
    {"add.u32.sat %r1, %r2, %r3;", "unsupported modifier '.sat'"},
    {"add.bf16x2 %r1, %r2, %r3;", "unsupported modifier '.bf16x2' in 'add.bf16x2'"},
    {"cvt.f32.s32 %f1, %r1;", "unsupported combination of types"},
    {"add.u32 %r1, %r2;", "operands are missing"},
    {"add.u32 %r1, %r2, %r3, %r4;", "expected ';'"},
    {"add.u32 %r1, %r2, %q;", "'%q' is not declared"},
    {"add.u32 %r1, %r2, %d1;", "'%d1' has 64 bits, the instruction needs 32"},
    {"add.u32 %r1, %r2, %r32;", "'%r32' is not declared"},
    {"add.f32 %f1, %f2, 1;", "integer constant for a floating-point operand"},
    {"ld.global.v4.u32 {%r1, %r2}, [%d0];", "2 registers for a vector of 4"},
    {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f0, %f1, %f2, %f3}, {%r0, %r1}, {%r2},"
     " {%f0, %f1, %f2, %f3};", "unsupported combination"},
    {"mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r0, %r1}, {%r0, %r1, %r2, %r3}, {%r2, %r3"
     "}, {%r0, %r1};", "unsupported modifier '.f16'"},
    {"bra NOWHERE;", "label 'NOWHERE' not found"},
    {"@%r1 bra END;\nEND:", "'%r1' is not a predicate"},
    {"call.uni vprintf, (%d0);", "call of 'vprintf'"},
    {"{ .param .b32 a; st.param.b32 [a], %r0; call (a), twice, (a); }", "call of 'twice'"},
    {".reg .b33 x;", "unsupported register type"},
    {"wmma.load.a.sync.aligned.row.m16n16k16.shared.bf16 {%r1}, [%d0];", "unknown instruction"},
    {"{", "text ends inside"},
};

static void run_refused(void) {
    char log[500];
    SimModule *m;
    for (size_t k = 0; k < sizeof refused / sizeof *refused; k++) {
        char *text = kernel_text(refused[k].body, "");
        int error = sim_module_load(0, text, strlen(text), &m, log, sizeof log);
        result(error == E_INVALID_PTX, refused[k].body, "accepted", "");
        result(strstr(log, refused[k].words) != NULL, refused[k].body, "wrong words", log);
        result(!strncmp(log, "line ", 5), refused[k].body, "no line", log);
    }
    static const char newer[] = ".version 9.0\n.target sm_80\n.address_size 64\n";
    static const char target[] = ".version 7.4\n.target sm_90\n.address_size 64\n";
    sim_options.ptx_version_max = 85;
    result(sim_module_load(0, newer, sizeof newer, &m, log, sizeof log) ==
               E_UNSUPPORTED_PTX_VERSION, "version 9.0", "accepted", log);
    sim_options.ptx_version_max = 0;
    result(sim_module_load(0, target, sizeof target, &m, log, sizeof log) == E_NO_BINARY_FOR_GPU,
           "target sm_90", "accepted", log);
}

/* A finding names the source line. */
static void run_reports(void) {
    static const char text[] =
        ".version 7.4\n.target sm_80\n.address_size 64\n.visible .entry k()\n{\n .reg .b32 %r<4>;\n"
        " .shared .align 4 .b32 s[64];\n\t.loc 1 41 2\n mov.u32 %r1, %tid.x;\n\t.loc\t1 42 7, "
        "function_name $L__info, inlined_at 1 50 3\n st.shared.u32 [s], %r1;\n ret;\n}\n"
        ".file 1 \"src/t.cu\"\n.section .debug_str\n{\n$L__info:\n.b8 95, 90\n}\n";
    char log[500] = "";
    SimModule *m;
    SimCounters counters = {0};
    result(!sim_module_load(0, text, sizeof text - 1, &m, log, sizeof log), ".loc", "module", log);
    SimLaunch l = {sim_module_kernel(m, 0), {1, 1, 1}, {64, 1, 1}, 0, NULL};
    n_findings = 0;
    result(sim_launch(&l, &counters) == E_LAUNCH_FAILED, ".loc", "error", last_line);
    result(n_findings == 1, ".loc", "count", "");
    result(strstr(last_line, "PTX line 11, src/t.cu:42, block") != NULL, ".loc", "line", last_line);
    sim_module_unload(m);
}

/* Cutting a text anywhere, or changing a byte, gives a module or an error, never a crash. */
static void run_damaged(void) {
    char log[500], text[8192];
    SimModule *m;
    const Case *c = &cases[39];
    strcpy(text, kernel_text(c->body, c->good));
    size_t n = strlen(text);
    uint32_t x = 12345;
    for (size_t k = 0; k < 4 * n; k++) {
        x = x * 1664525u + 1013904223u;
        size_t at = k < n ? k : x >> 8;
        at %= n;
        char was = text[at];
        text[at] = k < n ? 0 : (char)(x >> 24);
        if (!sim_module_load(0, text, n, &m, log, sizeof log))
            sim_module_unload(m);
        text[at] = was;
    }
    result(true, "damaged text", "", "");
}

int main(void) {
    sim_options.watchdog = 10000;
    sim_set_sink(sink, NULL);
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++)
        run_case(&cases[k]);
    run_refused();
    run_reports();
    run_damaged();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
