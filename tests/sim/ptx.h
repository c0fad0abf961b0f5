/* ptx.h: inside the lower half of the simulator: decoded PTX, warps, memory records.
 *
 * A kernel is an array of Inst. A warp has one frame: every virtual register is a slot of 32 lanes
 * (128 bytes; 256 for 64-bit registers; predicates are one 32-bit lane mask), and constants and
 * special registers are slots too, so that every operand is just an offset into the frame. */
#ifndef PTX_H
#define PTX_H

#include "sim.h"

#include <immintrin.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#pragma GCC diagnostic ignored "-Wmissing-field-initializers" /* in the tables of forms */

typedef uint64_t u64;
typedef uint32_t u32;
typedef uint16_t u16;
typedef uint8_t u8;
typedef int64_t s64;
typedef int32_t s32;
typedef int16_t s16;
typedef int8_t s8;
typedef float f32;
typedef double f64;
/* How a value of a type lies in its lane of a slot: 8 and 16 bits in the low part of 32. */
typedef u32 lane_u8, lane_s8, lane_u16, lane_s16, lane_f16, lane_bf16, lane_u32;
typedef s32 lane_s32;
typedef u64 lane_u64;
typedef s64 lane_s64;
typedef f32 lane_f32;
typedef f64 lane_f64;

typedef struct Inst Inst;
typedef struct Warp Warp;
typedef struct Worker Worker;
typedef struct Alloc Alloc;

#define FULL_WARP 0xffffffffu

/* Windows of the generic address space; device memory lies between DEVICE_BASE and these. */
#define DEVICE_BASE 0x800000000000ull
#define DEVICE_SPAN (1ull << 41)
#define SHARED_BASE 0xf00000000000ull
#define LOCAL_BASE 0xf10000000000ull
#define PARAM_BASE 0xf20000000000ull

/* ---- decoded instructions */

typedef enum {
    T_NONE, T_PRED,
    T_B8, T_U8, T_S8,
    T_B16, T_U16, T_S16, T_F16, T_BF16,
    T_B32, T_U32, T_S32, T_F32, T_F16X2, T_BF16X2,
    T_B64, T_U64, T_S64, T_F64
} Type;

static inline int type_bytes(Type t) {
    return t <= T_PRED ? 0 : t <= T_S8 ? 1 : t <= T_BF16 ? 2 : t <= T_BF16X2 ? 4 : 8;
}

static inline bool type_is_float(Type t) {
    return t == T_F16 || t == T_BF16 || t == T_F32 || t == T_F64 || t == T_F16X2 || t == T_BF16X2;
}

static inline bool type_is_signed(Type t) {
    return t == T_S8 || t == T_S16 || t == T_S32 || t == T_S64;
}

typedef enum { SP_GENERIC, SP_GLOBAL, SP_SHARED, SP_LOCAL, SP_CONST, SP_PARAM } Space;
typedef enum { RND_NONE, RND_RN, RND_RZ, RND_RM, RND_RP, RND_RNA,
               RND_RNI, RND_RZI, RND_RMI, RND_RPI } Rounding;
/* A comparison is the set of relations for which it is true; unordered: one operand is NaN. */
enum { LESS = 1, EQUAL = 2, GREATER = 4, UNORDERED = 8 };
/* The modifier that selects among variants of one instruction. */
typedef enum { OP_NONE, OP_AND, OP_OR, OP_XOR, OP_ADD, OP_MIN, OP_MAX, OP_INC, OP_DEC, OP_EXCH,
               OP_CAS, OP_UP, OP_DOWN, OP_BFLY, OP_IDX, OP_ALL, OP_ANY, OP_UNI, OP_BALLOT } SubOp;

typedef void Handler(Warp *w, const Inst *i, void *out);

enum { MAX_DST = 4, MAX_SRC = 12 };

struct Inst {
    Handler *run;        /* what the warp calls */
    Handler *inner;      /* called by `run` when that adds rounding, flushing or a check */
    u32 guard;           /* predicate slot of @p, 0: none */
    u32 guard_flip;      /* all ones for @!p */
    u32 dst[MAX_DST], dst_pred; /* frame offsets, 0: none */
    u32 src[MAX_SRC];
    u32 src_flip;        /* bit k: predicate source k is negated */
    u8 n_dst, n_src;
    u8 out_bits;         /* 1, 32, 64: the loop merges the result under the mask; 0: the handler */
    u8 class;            /* SimClass */
    u8 type, type2, type3; /* in the order of the opcode */
    u8 space, round, cmp, op;
    u8 arg;              /* which of the operations of its handler, from the form */
    u8 vec;              /* 1, 2, 4 elements; number of matrices of ldmatrix */
    bool ftz, sat, nan, relu, to, trans, left, wrap, shiftamt;
    bool wide_dst, wide_src, wide_addr; /* those registers have 64 bits */
    bool strong;         /* volatile, relaxed, acquire, release: ordered against other threads */
    bool fence;          /* acquire / release */
    bool check_init, note_init; /* a source / destination needs run-time tracking */
    bool copy_init;      /* the result is as unset as the source, which is tracked */
    int64_t imm;         /* address offset, barrier, cp.async size */
    u32 target;          /* branch target */
    int line, src_file, src_line;
};

/* One accepted form of an opcode. Pattern: name, then elements separated by blanks; [x|y] may be
 * absent, x|y is one of. Operands: one letter each, see ptx_parse.c. */
typedef struct {
    const char *pattern, *operands;
    u8 class;
    u8 out_bits;         /* of an Inst; 0 with an integer class: as wide as the destination */
    Handler *run;
    u8 arg;              /* for the handler */
    Handler *(*choose)(Inst *i); /* picks the handler from types and operands, NULL: refuse */
    Handler *by_type[6]; /* for u16 s16 u32 s32 u64 s64; with `run`: what that calls */
} Form;

extern const Form alu_forms[], cvt_forms[], mem_forms[], warp_forms[];
/* Handlers that the decoder itself places. */
Handler run_wrapped, run_trap, run_bra, run_exit;

typedef struct {
    u64 value;
    u32 offset;
    u8 bits;          /* 1, 32, 64 */
    bool dynamic;     /* add the start of dynamic shared memory */
} Const;

/* Special registers, numbered as in special_names (ptx_parse.c); from SR_GRIDID on 64 bits wide. */
enum { SR_CTAID_X = 6, SR_GRIDID = 24, SR_COUNT = 25 };

typedef struct SimCode {
    Inst *inst;
    u32 n_inst, cap_inst;
    Const *consts;
    u32 n_consts, cap_consts;
    u32 frame_bytes;
    u32 special[SR_COUNT]; /* frame offsets, 0: unused */
    u32 static_shared, local_bytes;
    u32 *tracked, n_tracked; /* slots that may be read unset */
    bool global_atomics;   /* one worker, so that their order is always the same */
} SimCode;

struct SimModule {
    int device, version, target;
    const char **files; /* by .file number */
    SimKernel **kernels;
    u64 *globals; /* addresses of .global and .const variables */
    u32 n_files, cap_files, n_kernels, cap_kernels, n_globals, cap_globals, n_memory, cap_memory;
    u32 const_bytes;
    void **memory; /* that lives as long as the module */
};

void *module_memory(SimModule *m, size_t bytes); /* zeroed, lives as long as the module */

/* ptx_flow.c: definite assignment and register pressure of finished code. */
void analyse(SimModule *m, SimKernel *kernel);

/* ---- memory records */

struct Alloc {
    u64 base, size;
    u8 *host;          /* the bytes */
    u8 *valid;         /* one bit per byte, NULL: all initialised */
    u64 *writes, *reads; /* race records, one per 4 bytes, see check.c; NULL until needed */
    u32 *seen_load, *seen_store; /* launch number per 32-byte sector */
    int device;        /* -1: host */
    bool freed, module_global, read_only;
};

Alloc *mem_lookup(u64 address);          /* the allocation around an address, or NULL */
int mem_alloc(int device, u64 bytes, bool global, Alloc **out);
void mem_prepare_launch(u32 number);      /* clears the records when launch numbers wrap */
bool mem_may_use(int device, const Alloc *a);
void mem_explain(u64 address, u64 bytes, int device, SimKind *kind, char *text, size_t size);
void bits_set(u8 *bits, u64 first, u64 count, bool value);
u64 bits_prefix(const u8 *bits, u64 first, u64 count); /* number of set bits at the start */

/* ---- running */

/* Lanes at a PC. Parked: they stand before an instruction that needs lanes of other groups too. */
typedef struct {
    u32 pc, mask;
    bool parked;
} Group;

/* One cp.async of a warp: data on its way to shared memory. */
typedef struct {
    u32 lanes, bytes, group[32]; /* lanes that still wait; bytes and group of each */
    u64 shared[32];
    bool row;
    u8 data[32 * 16];
} AsyncCopy;

typedef enum { W_RUN, W_BARRIER, W_DONE } WarpState;

struct Warp {
    u8 *frame;
    u32 *init;         /* lane masks of tracked registers, indexed by offset / 32 */
    Worker *worker;
    u32 pc, mask;      /* mask: lanes that execute the current instruction */
    u32 active;        /* lanes of the running group */
    u32 alive, members; /* not exited; existing */
    u32 next_pc;       /* first waiting group: stop there */
    Group waiting[33];
    int n_waiting;
    WarpState state;
    int index;         /* within the block */
    u32 bar_id;
    bool yield;
    bool parking, forced; /* park the running group; nobody is left to wait for */
    u64 branches;
    u32 sync_epoch;    /* advanced by warp-level synchronisation */
    u32 committed[32]; /* cp.async groups per lane */
    AsyncCopy *async;
    u32 n_async, cap_async;
};

typedef struct {
    u32 arrived, expected; /* threads */
} Barrier;

/* What a worker needs, kept from launch to launch: they come one at a time and are often short. */
typedef struct {
    struct Part {
        void *at;
        size_t size;
    } part[11];
    u32 serial;
} Pool;
enum { P_WARPS, P_FRAMES, P_INITS, P_LOCALS, P_SHARED, P_STATE, P_WRITES, P_READS, P_WARP_COUNT,
       P_LANE_COUNT, P_CACHE };

/* One CPU thread at work on blocks of a launch. */
struct Worker {
    struct Launch *launch;
    Pool *pool;
    const SimCode *code;
    SimCounters count;
    u64 *warp_count, *lane_count; /* per instruction */
    Alloc **cache;     /* per instruction: the allocation last used */
    Warp *warps;
    int n_warps;
    u8 *locals;
    u8 *shared, *shared_state; /* bytes; state per byte: 0 unset, 1 set, 2 cp.async under way */
    u64 *shared_writes, *shared_reads;
    u32 serial;        /* of the block, names it in the shared race records */
    u32 epoch;         /* barriers passed by this block */
    bool fenced;       /* the block executed a device-wide fence */
    u32 block_index, ctaid[3];
    Barrier barriers[16];
    bool stop;
};

typedef struct Launch {
    const SimLaunch *in;
    const SimKernel *kernel;
    const SimCode *code;
    int device;
    u32 shared_bytes, number; /* number: names the launch in records */
    u32 n_blocks, n_threads;
    u8 params[4352];
    u32 next_block;
    int result;        /* first error, by lowest block */
    u32 result_block;
    bool cancel;
} Launch;

static inline void *slot(const Warp *w, u32 offset) {
    return w->frame + offset;
}

static inline void *src(const Warp *w, const Inst *i, int k) {
    return w->frame + i->src[k];
}

/* A predicate source: a bit per lane. */
static inline u32 src_mask(const Warp *w, const Inst *i, int k) {
    return *(u32 *)(w->frame + i->src[k]) ^ (i->src_flip >> k & 1 ? ~0u : 0);
}

/* Writes the bits of `lanes` into a predicate register, or into the sink. */
static inline void put_pred(const Warp *w, u32 offset, u32 bits, u32 lanes) {
    u32 *p = slot(w, offset);
    *p = (*p & ~lanes) | (bits & lanes);
}

/* One lane of a slot, as it is. */
static inline u64 get_lane(const void *from, bool wide, u32 lane) {
    return wide ? ((const u64 *)from)[lane] : ((const u32 *)from)[lane];
}

static inline void put_lane(void *to, bool wide, u32 lane, u64 value) {
    if (wide)
        ((u64 *)to)[lane] = value;
    else
        ((u32 *)to)[lane] = (u32)value;
}

/* The low bits of a lane, extended as the type says. */
static inline s64 integer_of(Type type, u64 lane) {
    switch (type) {
    case T_S8: return (s8)lane;
    case T_S16: return (s16)lane;
    case T_S32: return (s32)lane;
    default: return (s64)(lane & ~0ull >> (64 - 8 * type_bytes(type)));
    }
}

/* Numbers and their bits. */
typedef union {
    u32 u;
    f32 f;
} Bits32;
typedef union {
    u64 u;
    f64 d;
} Bits64;
#define float_bits(x) ((Bits32){.f = (x)}.u)
#define bits_float(x) ((Bits32){.u = (x)}.f)
#define double_bits(x) ((Bits64){.d = (x)}.u)
#define bits_double(x) ((Bits64){.u = (x)}.d)

/* The NaN that every arithmetic instruction gives. */
#define CANON_NAN 0x7fffffffu
#define CANON_NAN64 0x7fffffffffffffffull

/* The even or odd bytes of the 16-bit elements, each widened to 16 bits. */
static inline __m256i widen_byte(__m256i v, bool odd, bool is_signed) {
    v = odd ? v : _mm256_slli_epi16(v, 8);
    return is_signed ? _mm256_srai_epi16(v, 8) : _mm256_srli_epi16(v, 8);
}

/* An instruction: it computes all 32 lanes into `out`, of which the warp loop keeps the active ones
 * (forms with out_bits), or writes the lanes of w->mask itself. */
#define UNUSED __attribute__((unused))
#define HANDLER(name) static void name(UNUSED Warp *w, UNUSED const Inst *i, UNUSED void *out)

/* The loop over lanes; the operands of one lane never overlap those of another. */
#if defined(__clang__)
#pragma clang diagnostic ignored "-Wpass-failed" /* some bodies are calls */
#define LANES _Pragma("clang loop vectorize(assume_safety)") for (int l = 0; l < 32; l++)
#else
#define LANES _Pragma("GCC ivdep") for (int l = 0; l < 32; l++)
#endif

/* An instruction on each lane alone: its result of type D from x, y, z, v, the sources, as types X,
 * Y, Z and u32. */
#define OP(name, D, X, Y, Z, expression)                                                          \
    HANDLER(name) {                                                                               \
        const lane_##X *a = src(w, i, 0);                                                         \
        const lane_##Y *b = src(w, i, 1);                                                         \
        const lane_##Z *c = src(w, i, 2);                                                         \
        const u32 *e = src(w, i, 3);                                                              \
        lane_##D *d = out;                                                                        \
        LANES {                                                                                   \
            X x = (X)a[l];                                                                        \
            Y y = (Y)b[l];                                                                        \
            Z z = (Z)c[l];                                                                        \
            u32 v = e[l];                                                                         \
            (void)x, (void)y, (void)z, (void)v;                                                   \
            d[l] = (D)(expression);                                                               \
        }                                                                                         \
    }

/* Calls the body for every lane in mask, l is the lane. */
#define EACH(l, mask) \
    for (u32 l##_m = (mask), l = 0; l##_m && (l = (u32)__builtin_ctz(l##_m), 1); l##_m &= l##_m - 1)

/* Reports a finding at the warp's current instruction and stops the launch. lane -1: the first
 * active one. */
void finding(Warp *w, SimKind kind, int lane, u64 address, const char *format, ...)
    __attribute__((format(printf, 5, 6)));

void regroup(Warp *w); /* after a change of control flow: continue with the lowest PC */
/* For an instruction that needs lanes which are elsewhere: true if the group now waits for them. */
bool park(Warp *w);
/* exec_warp.c: are all 32 lanes here? If not: parked, or a finding. */
bool whole_warp(Warp *w, const char *what);

/* check.c: race records. */
enum { ACC_READ, ACC_WRITE, ACC_ATOMIC, ACC_STRONG_READ, ACC_STRONG_WRITE };
/* In `a`, or in shared memory if that is NULL. row: all 32 lanes at consecutive addresses; data:
 * what a store will put, lane by lane. */
void race(Warp *w, Alloc *a, u32 lanes, const u64 *address, u32 bytes, int how, bool row,
          const u8 *data);

/* counters.c */
void count_global(Warp *w, const u64 *address, u32 bytes, bool store, bool row, Alloc *a);
void count_shared(Warp *w, const u64 *address, u32 bytes, bool row);
void counters_finish(Worker *k);

/* exec_cvt.c: numbers. */
float half_to_float(u16 h);
u16 float_to_half(float f, Rounding round);
float bf16_to_float(u16 h);

#endif
