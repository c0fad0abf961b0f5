/* api.h: what the files of the Driver API half share (api*.c, stream.c, report.c).
 *
 * Names and numbers are the binary interface of the CUDA Driver API, so no toolkit is needed to
 * build this. With -DSIM_ABI_CHECK the compiler takes cuda.h instead and so proves them equal.
 *
 * One lock covers every call (enter .. leave). Work put on a stream becomes an Op in a graph of
 * dependencies and runs later, at a synchronisation point: stream.c has the rules. */
#ifndef API_H
#define API_H

#include "sim.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef SIM_ABI_CHECK
#define __CUDA_API_VERSION_INTERNAL /* declare old and new versions under their own names */
#include <cuda.h>
#else
typedef int CUresult, CUdevice, CUdevice_attribute, CUdevice_P2PAttribute, CUjit_option,
    CUfunction_attribute, CUstreamCaptureMode,
    CUdriverProcAddressQueryResult;
typedef uint64_t CUdeviceptr, cuuint64_t;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct CUgraph_st *CUgraph;
typedef struct CUgraphExec_st *CUgraphExec;
typedef struct CUgraphNode_st *CUgraphNode;
typedef struct { char bytes[16]; } CUuuid;
#endif

#define EXPORT __attribute__((visibility("default")))

/* ---- configuration, from the environment (README.md lists the variables) */

typedef struct {
    int devices;
    uint64_t memory[SIM_MAX_DEVICES]; /* bytes */
    char name[96];      /* ends in "(SIMULATED)" */
    bool peer, trace;
    int driver;         /* 13000 */
    uint64_t seed;
    const char *report; /* file, or NULL */
} Config;

extern Config config;

/* ---- objects. Every handle starts with an Obj; destroyed objects stay in a list, marked dead, so
 * that a stale handle is an error and not a crash. */

typedef enum { T_CTX = 0x51A0, T_MODULE, T_FUNC, T_STREAM, T_EVENT, T_GRAPH, T_EXEC } Type;

typedef struct Obj {
    Type type;
    bool dead;
    struct Obj *next;
} Obj;

typedef struct CUctx_st Ctx;
typedef struct CUmod_st Module;
typedef struct CUfunc_st Func;
typedef struct CUstream_st Stream;
typedef struct CUevent_st Event;
typedef struct CUgraph_st Graph;
typedef struct CUgraphNode_st Node;
typedef struct CUgraphExec_st Exec;
typedef struct Capture Capture;

struct CUctx_st {
    Obj obj;
    int device;
    int retained;       /* cuDevicePrimaryCtxRetain calls not yet released */
    CUresult sticky;    /* a fault: every later call on this context returns it */
    Stream *legacy;     /* the NULL stream */
    Stream *streams;    /* all, the NULL stream included */
    bool peer[SIM_MAX_DEVICES];
    double kernels_end; /* virtual time in us: its kernels run one after the other */
};

struct CUmod_st {
    Obj obj;
    Ctx *ctx;
    SimModule *sim;
    Func *funcs;        /* [n_funcs] */
    int n_funcs;
    char *text;         /* the PTX, kept for ptxas */
};

struct CUfunc_st {
    Obj obj;
    Module *module;
    const SimKernel *kernel;
    uint32_t max_dynamic; /* bytes of dynamic shared memory allowed */
    struct KernelStats *stats;
};

/* What a stream operation or a graph node does. */
typedef enum { W_EMPTY, W_KERNEL, W_COPY, W_SET } WorkKind;

typedef struct {
    WorkKind kind;
    Ctx *ctx;
    Func *func;                /* kernel */
    SimLaunch launch;          /* its shape; parameters in `owned` */
    uint64_t dst, src, bytes;  /* copy and set; device or host addresses */
    int dst_dev, src_dev;      /* owner, -1: host memory */
    void *owned;               /* kernel parameters, or the snapshot of a pageable source */
    uint32_t value, unit;      /* set: units of 1 or 4 bytes */
} Work;

typedef struct Op {
    Work work;
    int refs, waits;           /* holders; predecessors that have not finished */
    bool done, needed;
    struct Op **preds, **succs;
    int n_preds, n_succs;
    uint32_t cap_succs;
    uint64_t order;            /* seeded priority */
    double ready, end;         /* virtual time, us */
} Op;

typedef struct {
    Node **nodes;
    int n;
} Front;

struct CUstream_st {
    Obj obj;
    Ctx *ctx;
    Stream *next;              /* of the context */
    unsigned flags;            /* 1: non-blocking */
    uint32_t id, count;        /* names its operations for the seeded order */
    Op *tail;                  /* last operation, NULL: none yet */
    Capture *capture;
    Front front;               /* capture: what the next node depends on */
};

struct CUevent_st {
    Obj obj;
    Ctx *ctx;
    unsigned flags;            /* 2: no timing */
    Op *op;                    /* last record; NULL: never */
    Capture *capture;
    Front front;
};

struct CUgraphNode_st {
    Work work;
    Node **deps;
    int n_deps, index;
    Op *op;                    /* during a launch */
};

struct CUgraph_st {
    Obj obj;
    Node **nodes;              /* in an order in which dependencies come first */
    int n;
    uint32_t cap;
};

struct CUgraphExec_st {
    Obj obj;
    Graph *graph;              /* its own copy */
    Op *last;                  /* launches of one executable graph do not overlap */
};

struct Capture {
    Graph *graph;
    Stream *origin;
    int mode;                  /* 0 global, 1 thread local, 2 relaxed */
    pthread_t thread;
    bool broken, ended;
    Capture *next;
};

/* ---- api.c: entry, contexts */

enum { ANY = 0, INIT = 1, CTX = 3, UNSAFE = 7 }; /* UNSAFE: CTX, and not during a capture */

/* Takes the lock and applies the rules for every call: fault injection, initialised, context
 * current, context without a fault. On error the caller still goes on to leave(). */
CUresult enter(const char *name, int needs);
CUresult leave(CUresult result);

/* What cuGetProcAddress finds: each exported function leaves an entry in the section "symbols",
 * which the linker makes into one array. */
typedef struct {
    const char *name;
    int since; /* first driver version that has this form */
    void *function;
} Symbol;
#define SYMBOL(id, name, since, function)                                                          \
    static const Symbol id##_symbol __attribute__((section("symbols"), used, aligned(8))) = {      \
        name, since, (void *)function };

/* An exported function: what it needs, since when, name, parameters, and what it does then. */
#define API(needs, since, name, params, call)                                                      \
    EXPORT CUresult name params {                                                                  \
        CUresult r = enter(#name, needs);                                                          \
        return leave(r ? r : (call));                                                              \
    }                                                                                              \
    SYMBOL(name, #name, since, name)
/* The same with a body; `names` are those of the parameters. */
#define BODY(needs, since, name, params, names)                                                    \
    static CUresult name##_body params;                                                            \
    API(needs, since, name, params, name##_body names)                                             \
    static CUresult name##_body params
#define GIVE(to, value) ((to) ? (*(to) = (value), OK) : E_INVALID_VALUE)
void *obj_new(Type type, size_t bytes);
bool obj_ok(const void *handle, Type type);
Ctx *device_ctx(int device);           /* NULL: not retained */
CUresult misuse(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* What SIM_FAULT asks for: the code of a fault of a kind (launch, lost, oom, or the
 * name of a function) whose turn has come with `amount` more calls, operations or bytes; or OK. */
CUresult fault(const char *what, int device, uint64_t amount, CUresult usual);

/* the calling thread */
typedef struct {
    Ctx *ctx;                          /* the current context */
    double clock;                      /* virtual time that this host thread has waited for, us */
    const char *call;
} Thread;
extern _Thread_local Thread self;

/* stream.c: every function expects the lock */
extern pthread_mutex_t sim_lock;
CUresult get_stream(CUstream handle, Stream **stream);
CUresult submit(Stream *stream, Work *work); /* or adds to the capture; takes work->owned */
void run_until(Op *op);
void run_ctx(Ctx *ctx);                      /* all work of a context */
Stream *stream_new(Ctx *ctx, unsigned flags);
void work_free(Work *work);

/* api_mem.c */
CUresult work_copy(const Work *work); /* runs it */
CUresult work_set(const Work *work);

/* api_launch.c */
void module_end(Module *module);
CUresult work_kernel(const Work *work, double *us);
CUresult capture_allows(void);                 /* the rules for calls during a capture */
CUresult capture_break(Capture *capture, CUresult why);

/* report.c: counters and the computed times */
enum { SM_COUNT_3090 = 82, SM_COUNT_A5000 = 64, REGS_PER_SM = 65536, WARPS_PER_SM = 48,
       BLOCKS_PER_SM = 16, SHARED_PER_SM = 102400, SHARED_RESERVED = 1024 };

typedef struct KernelStats KernelStats;
KernelStats *stats_of(const Func *func);
/* Adds one launch and returns its computed time in us. */
double stats_launch(KernelStats *stats, const Work *work, const SimCounters *counters);
double stats_copy(int src_dev, int dst_dev, uint64_t bytes); /* computed us */
double computed_set(uint64_t bytes);
void stats_hop(void);                                        /* a wait across devices */
int report_sms(void);
int occupancy_blocks(int registers, int threads, uint64_t shared_bytes);

#endif
