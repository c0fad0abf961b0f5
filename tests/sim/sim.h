/* sim.h: the seam inside the simulated CUDA device (README.md, "Files", has its two sides).
 *
 * Results are CUresult numbers. Device addresses are numbers above the host's address space (a host
 * that follows one crashes, as it should), each device has its own range, never reused;
 * sim_mem_ptr() gives the host bytes behind one. Thread rule: module, memory and launch calls are
 * made by one thread at a time (the upper half holds its lock); a launch may use worker threads. */
#ifndef SIM_H
#define SIM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The CUresult values that this library gives or that a test may want to inject. 715 is a trap too;
 * 719 stands for every finding that no other number fits: races, uninitialised reads, ... */
#define ERRORS(X)                                                                                  \
    X(1, INVALID_VALUE, "invalid argument")                                                        \
    X(2, OUT_OF_MEMORY, "out of memory")                                                           \
    X(3, NOT_INITIALIZED, "initialization error")                                                  \
    X(100, NO_DEVICE, "no CUDA-capable device is detected")                                        \
    X(101, INVALID_DEVICE, "invalid device ordinal")                                               \
    X(200, INVALID_IMAGE, "device kernel image is invalid")                                        \
    X(201, INVALID_CONTEXT, "invalid device context")                                              \
    X(209, NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device")          \
    X(217, PEER_ACCESS_UNSUPPORTED, "peer access is not supported between these two devices")      \
    X(218, INVALID_PTX, "a PTX JIT compilation failed")                                            \
    X(222, UNSUPPORTED_PTX_VERSION, "the provided PTX was compiled with an unsupported toolchain") \
    X(301, FILE_NOT_FOUND, "file not found")                                                       \
    X(400, INVALID_HANDLE, "invalid resource handle")                                              \
    X(401, ILLEGAL_STATE, "the operation cannot be performed in the present state")                \
    X(500, NOT_FOUND, "named symbol not found")                                                    \
    X(600, NOT_READY, "device not ready")                                                          \
    X(700, ILLEGAL_ADDRESS, "an illegal memory access was encountered")                            \
    X(701, LAUNCH_OUT_OF_RESOURCES, "too many resources requested for launch")                     \
    X(702, LAUNCH_TIMEOUT, "the launch timed out and was terminated")                              \
    X(704, PEER_ACCESS_ALREADY_ENABLED, "peer access is already enabled")                          \
    X(709, CONTEXT_IS_DESTROYED, "context is destroyed")                                           \
    X(712, HOST_MEMORY_ALREADY_REGISTERED,                                                         \
      "part or all of the requested memory range is already mapped")                               \
    X(713, HOST_MEMORY_NOT_REGISTERED,                                                             \
      "pointer does not correspond to a registered memory region")                                 \
    X(715, ILLEGAL_INSTRUCTION, "an illegal instruction was encountered")                          \
    X(716, MISALIGNED_ADDRESS, "misaligned address")                                               \
    X(719, LAUNCH_FAILED, "unspecified launch failure")                                            \
    X(801, NOT_SUPPORTED, "operation not supported")                                               \
    X(900, STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing")         \
    X(901, STREAM_CAPTURE_INVALIDATED, "operation failed due to a previous error during capture")  \
    X(902, STREAM_CAPTURE_MERGE,                                                                   \
      "operation would result in a merge of separate capture sequences")                           \
    X(903, STREAM_CAPTURE_UNMATCHED, "capture was not ended in the same stream")                   \
    X(904, STREAM_CAPTURE_UNJOINED, "capturing stream has unjoined work")                          \
    X(905, STREAM_CAPTURE_ISOLATION, "dependency created on uncaptured work in another stream")    \
    X(906, STREAM_CAPTURE_IMPLICIT,                                                                \
      "operation would make the legacy stream depend on a capturing blocking stream")              \
    X(907, CAPTURED_EVENT,                                                                         \
      "operation not permitted on an event last recorded in a capturing stream")                   \
    X(908, STREAM_CAPTURE_WRONG_THREAD,                                                            \
      "attempt to terminate a thread-local capture sequence from another thread")                  \
    X(999, UNKNOWN, "unknown error")
#define ERROR_CODE(code, name, text) E_##name = code,
enum { OK = 0, ERRORS(ERROR_CODE) };

/* Memory of the simulator itself: zeroed; it does not outlive a host without memory. */
void *zalloc(size_t bytes);
void *xgrow(void *array, uint32_t count, uint32_t *cap, size_t item); /* room for one more item */
uint64_t mix64(uint64_t x); /* a hash: the source of all seeded orders */

enum { SIM_MAX_DEVICES = 16, SIM_SHARED_MAX = 101376, SIM_WARP = 32 };

/* ---- options: set before the first module is loaded, read by both halves */

typedef struct {
    int threads;         /* worker threads of a launch; 0: one per CPU, at most 4 */
    uint64_t seed;       /* orders warps, and blocks (odd: descending) */
    bool check_init;     /* uninitialised reads: registers, shared, local and global memory */
    bool check_races;    /* shared and global races */
    uint64_t watchdog;   /* taken branches per warp before a time-out */
    int ptx_version_max; /* highest .version accepted, 10 * major + minor (90 = 9.0); 0: any */
    int sm;              /* compute capability of the devices, 86; .target above it is refused */
} SimOptions;

extern SimOptions sim_options; /* holds the defaults from the start */

/* ---- findings: everything a check has to say goes through one sink */

typedef enum {
    SIM_BOUNDS,      /* outside every allocation, or across the end of one */
    SIM_FREED,       /* use after free */
    SIM_FOREIGN,     /* another device's memory without peer access, or host memory not mapped */
    SIM_ALIGN,       /* address not a multiple of the access size */
    SIM_READONLY,    /* store to constant or parameter memory */
    SIM_UNINIT,      /* read of bytes or a register that nothing wrote */
    SIM_RACE,        /* two threads, one writes, no barrier between */
    SIM_BARRIER,     /* divergent barrier, barrier after exit, dead lock */
    SIM_WARP_MASK,   /* shfl, vote, match, redux, mma, ldmatrix with the wrong lanes */
    SIM_CP_ASYNC,    /* bytes of an asynchronous copy used before it was waited for */
    SIM_DIV_ZERO,    /* integer division by zero */
    SIM_TIMEOUT,     /* the watchdog */
    SIM_TRAP,        /* trap, failed assertion, brkpt */
    SIM_UNSUPPORTED, /* legal PTX that this simulator does not run */
    SIM_HOST,        /* the upper half: misuse of the Driver API */
    SIM_N_KINDS
} SimKind;

typedef struct {
    SimKind kind;
    const char *kernel; /* "" for findings outside kernels */
    int device;         /* ordinal or -1 */
    int ptx_line;       /* line in the PTX text, 0 = none */
    const char *file;   /* source file and line from .loc, "" and 0 = none */
    int line;
    unsigned block[3], thread[3];
    uint64_t address;
    char text[400]; /* what happened, in words, without the fields above */
} SimFinding;

/* The sink may be called from any thread, one call at a time; the strings inside the finding live
 * as long as the call. report.c sets one at the start. */
void sim_set_sink(void (*sink)(void *user, const SimFinding *finding), void *user);
void sim_report(const SimFinding *finding);
extern const char *const sim_kind_names[];
/* One line: kernel, PTX line, source line, block, thread, address and text. Returns `out`. */
char *sim_finding_text(const SimFinding *finding, char *out, size_t size);

/* ---- memory */

/* Sets the size of a device's memory, bytes (default 24 GiB); only before its first allocation. */
void sim_mem_limit(int device, uint64_t bytes);
/* Free and total bytes of a device. */
void sim_mem_info(int device, uint64_t *free_bytes, uint64_t *total_bytes);
/* Allocates device memory, 512-byte aligned, with red zones, filled with poison and marked
 * uninitialised. E_OUT_OF_MEMORY past the limit, INVALID_VALUE for 0 bytes. */
int sim_mem_alloc(int device, uint64_t bytes, uint64_t *address);
/* Frees; INVALID_VALUE unless `address` is the start of a live allocation of a device. */
int sim_mem_free(uint64_t address);
/* Frees all of a device's memory (device reset, process end). */
void sim_mem_reset(int device);
/* Makes host memory known to kernels (pinned or registered); the caller owns the memory itself.
 * INVALID_VALUE if it overlaps a known range. Host memory counts as initialised. */
int sim_mem_host_add(void *host, uint64_t bytes);
int sim_mem_host_remove(void *host);
/* The device whose memory it is or, if freed, was; -1: host memory or nothing at all. */
int sim_mem_owner(uint64_t address);
/* Is [address, address + bytes) inside one live allocation? On failure returns ILLEGAL_ADDRESS or
 * INVALID_VALUE and describes why in text. */
int sim_mem_check(uint64_t address, uint64_t bytes, char *text, size_t text_size);
/* The host bytes behind an address that sim_mem_check() accepted; host memory maps to itself. */
void *sim_mem_ptr(uint64_t address);
/* Marks bytes as initialised (after a copy from the host or a memset) or not. */
void sim_mem_mark(uint64_t address, uint64_t bytes, bool initialised);
/* Carries the marks of `bytes` bytes from source to destination (after a device-to-device copy). */
void sim_mem_copy_marks(uint64_t destination, uint64_t source, uint64_t bytes);
/* Number of leading bytes that are initialised (== bytes: all of them). */
uint64_t sim_mem_initialised(uint64_t address, uint64_t bytes);
/* Lets kernels on `device` use memory of `peer`, or not (default: not). */
void sim_mem_peer(int device, int peer, bool allowed);

/* ---- modules and kernels */

typedef struct SimModule SimModule;

typedef struct {
    uint32_t offset, size, align; /* bytes */
} SimParam;

typedef struct SimKernel {
    const char *name;
    SimModule *module;
    int n_params;
    const SimParam *params;
    uint32_t param_bytes;  /* size of the whole parameter block */
    uint32_t shared_bytes; /* static */
    uint32_t local_bytes;  /* per thread */
    uint32_t const_bytes;  /* of the module */
    int registers;         /* estimate from live ranges, 32-bit registers per thread */
    int max_threads;       /* .maxntid / .reqntid product, else 1024 */
    unsigned required_block[3]; /* .reqntid, else zeros */
    struct SimCode *code;  /* lower half only */
} SimKernel;

/* Parses and checks PTX text (NUL terminated; `size` without the NUL) and creates the module's
 * globals in the device's memory. On failure returns INVALID_PTX, UNSUPPORTED_PTX_VERSION or
 * OUT_OF_MEMORY and writes "line N: ..." to log. */
int sim_module_load(int device, const char *ptx, size_t size, SimModule **module, char *log,
                    size_t log_size);
void sim_module_unload(SimModule *module);
int sim_module_ptx_version(const SimModule *module); /* 10 * major + minor */
/* Kernels in the order of the text; NULL: no more. */
SimKernel *sim_module_kernel(const SimModule *module, uint32_t index);
SimKernel *sim_module_find(const SimModule *module, const char *name); /* NULL: none */

/* ---- counters */

typedef enum {
    SIM_C_INT,     /* integer, logic, moves, comparisons, select */
    SIM_C_FP32,    /* add, mul, fma, min, max, ... in f32 */
    SIM_C_FP64,
    SIM_C_HALF,    /* packed and single f16 / bf16 */
    SIM_C_SPECIAL, /* rcp, sqrt, ex2, lg2, sin, cos, tanh, div */
    SIM_C_CVT,
    SIM_C_DP4A,
    SIM_C_MMA,
    SIM_C_GLOBAL,  /* ld / st, generic addresses count where they point */
    SIM_C_SHARED,  /* ld / st / ldmatrix */
    SIM_C_LOCAL,
    SIM_C_CONST,   /* ld.const and ld.param */
    SIM_C_ASYNC,   /* cp.async and its commits and waits */
    SIM_C_ATOMIC,
    SIM_C_WARP,    /* shfl, vote, match, redux, activemask, bar.warp.sync */
    SIM_C_BARRIER,
    SIM_C_CONTROL, /* bra, ret, call */
    SIM_N_CLASSES
} SimClass;

enum { SIM_N_WIDTHS = 5 }; /* bytes per thread and access: 1, 2, 4, 8, 16 */

typedef struct {
    uint64_t warp, lane; /* instructions: per warp, and times active lanes */
    uint64_t bytes;      /* asked for by active lanes */
    uint64_t sectors;    /* 32-byte sectors touched, counted per warp instruction */
} SimAccess;

typedef struct {
    uint64_t launches, blocks, threads;
    uint64_t warp[SIM_N_CLASSES], lane[SIM_N_CLASSES];
    SimAccess load[SIM_N_WIDTHS], store[SIM_N_WIDTHS]; /* global memory, cp.async included */
    uint64_t unique_load_sectors, unique_store_sectors; /* summed over launches */
    uint64_t shared_accesses; /* warp instructions that touch shared memory */
    uint64_t shared_passes;   /* what they take with bank conflicts */
    uint64_t shared_ideal;    /* what they would take without */
    uint64_t barriers;        /* per warp */
    uint64_t atomics;         /* lanes */
    uint64_t divergent;       /* branches that split a warp */
    uint64_t mma_half, mma_int;         /* mma instructions per warp */
    uint64_t mma_half_mac, mma_int_mac; /* multiply-adds */
} SimCounters;

void sim_counters_add(SimCounters *sum, const SimCounters *part);
extern const char *const sim_class_names[];
uint64_t sim_class_sum(const uint64_t *of_class); /* of counters' warp or lane */

/* ---- launch */

typedef struct {
    const SimKernel *kernel;
    unsigned grid[3], block[3];
    uint32_t dynamic_shared; /* bytes; the upper half has checked the 48 KB rule */
    const void *params;      /* param_bytes bytes laid out as kernel->params says */
} SimLaunch;

/* Runs a kernel to its end on its module's device and adds to `counters`. Returns OK or
 * the error of the first finding (which went to the sink). */
int sim_launch(const SimLaunch *launch, SimCounters *counters);

#endif
