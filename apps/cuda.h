// CUDA's driver and run-time compiler, opened when a GPU is asked for: no header and no library at
// build time. And the way from kernels.cu to PTX: built in, kept on disk, or compiled.
#ifndef DSV4_CUDA_H
#define DSV4_CUDA_H

#include "dsv4.h"

typedef int CuResult;               // CUresult: 0 is success
enum { CUDA_OUT_OF_MEMORY = 2 };
typedef int CuDevice;
typedef uint64_t CuPtr;             // CUdeviceptr
typedef struct CuContextObject *CuContext;
typedef struct CuModuleObject *CuModule;
typedef struct CuFunctionObject *CuFunction;
typedef struct CuStreamObject *CuStream;
typedef struct CuEventObject *CuEvent;
typedef struct CuGraphObject *CuGraph;
typedef struct CuGraphExecObject *CuGraphExec;

// Every call that is used: short name, exported name (the oldest that means the same), parameters.
#define CUDA_CALLS(X) \
    X(Init, "cuInit", unsigned flags) \
    X(DriverGetVersion, "cuDriverGetVersion", int *version) \
    X(GetErrorName, "cuGetErrorName", CuResult r, const char **text) \
    X(GetErrorString, "cuGetErrorString", CuResult r, const char **text) \
    X(DeviceGetCount, "cuDeviceGetCount", int *n) \
    X(DeviceGet, "cuDeviceGet", CuDevice *dev, int ordinal) \
    X(DeviceGetName, "cuDeviceGetName", char *name, int len, CuDevice dev) \
    X(DeviceGetUuid, "cuDeviceGetUuid_v2", char uuid[16], CuDevice dev) \
    X(DeviceGetAttribute, "cuDeviceGetAttribute", int *value, int attribute, CuDevice dev) \
    X(DeviceTotalMem, "cuDeviceTotalMem_v2", size_t *bytes, CuDevice dev) \
    X(PrimaryCtxRetain, "cuDevicePrimaryCtxRetain", CuContext *ctx, CuDevice dev) \
    X(CtxSetCurrent, "cuCtxSetCurrent", CuContext ctx) \
    X(MemGetInfo, "cuMemGetInfo_v2", size_t *free, size_t *total) \
    X(MemAlloc, "cuMemAlloc_v2", CuPtr *p, size_t bytes) \
    X(MemFree, "cuMemFree_v2", CuPtr p) \
    X(MemHostAlloc, "cuMemHostAlloc", void **p, size_t bytes, unsigned flags) \
    X(MemFreeHost, "cuMemFreeHost", void *p) \
    X(MemsetD8Async, "cuMemsetD8Async", CuPtr p, unsigned char value, size_t n, CuStream s) \
    X(MemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2", CuPtr to, const void *from, size_t n, CuStream s) \
    X(MemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2", void *to, CuPtr from, size_t n, CuStream s) \
    X(StreamCreate, "cuStreamCreate", CuStream *s, unsigned flags) \
    X(StreamDestroy, "cuStreamDestroy_v2", CuStream s) \
    X(StreamSynchronize, "cuStreamSynchronize", CuStream s) \
    X(StreamBeginCapture, "cuStreamBeginCapture_v2", CuStream s, int mode) \
    X(StreamEndCapture, "cuStreamEndCapture", CuStream s, CuGraph *g) \
    X(GraphInstantiate, "cuGraphInstantiateWithFlags", CuGraphExec *e, CuGraph g, \
      unsigned long long flags) \
    X(GraphLaunch, "cuGraphLaunch", CuGraphExec e, CuStream s) \
    X(GraphDestroy, "cuGraphDestroy", CuGraph g) \
    X(GraphExecDestroy, "cuGraphExecDestroy", CuGraphExec e) \
    X(EventCreate, "cuEventCreate", CuEvent *e, unsigned flags) \
    X(EventDestroy, "cuEventDestroy_v2", CuEvent e) \
    X(EventRecord, "cuEventRecord", CuEvent e, CuStream s) \
    X(EventSynchronize, "cuEventSynchronize", CuEvent e) \
    X(EventElapsedTime, "cuEventElapsedTime", float *ms, CuEvent a, CuEvent b) \
    X(ModuleLoadDataEx, "cuModuleLoadDataEx", CuModule *m, const void *image, unsigned n, \
      int *option, void **value) \
    X(ModuleUnload, "cuModuleUnload", CuModule m) \
    X(ModuleGetFunction, "cuModuleGetFunction", CuFunction *f, CuModule m, const char *name) \
    X(FuncSetAttribute, "cuFuncSetAttribute", CuFunction f, int attribute, int value) \
    X(LaunchKernel, "cuLaunchKernel", CuFunction f, unsigned gx, unsigned gy, unsigned gz, \
      unsigned bx, unsigned by, unsigned bz, unsigned shared, CuStream s, void **args, void **extra)

#define CUDA_FIELD(name, symbol, ...) CuResult (*name)(__VA_ARGS__);
extern struct CudaCalls { CUDA_CALLS(CUDA_FIELD) } cu;

bool cuda_open(Err *e);                     // once; false with one line that says what is missing
int cuda_count(void);                       // number of GPUs; 0 if there is no usable driver
const char *cuda_error(CuResult r);         // "CUDA_ERROR_..."
int cuda_facts(void);                       // prints driver, compiler, GPUs; returns their number
size_t cuda_memory(int ordinal);            // free bytes of a GPU, 0 if there is no such GPU

// --- kernels: from kernels.cu to PTX

extern const char *cuda_kernels_file;       // --kernels: another source than the program's own

// PTX of the kernels with these options (one per line), to be freed: what is built in, else kept,
// else compiled. *from says which; *path (NULL: not wanted) is where it is kept, to be freed, or
// NULL. NVRTC is needed for the last only; if there is one of another version than the one that
// made what is kept, that is made again. Ends the process if NVRTC is missing or fails.
char *kernel_ptx(Span options, const char **from, char **path);

// Texts kept on disk under a key: KEY.kind in DSV4_CACHE, else XDG_CACHE_HOME/dsv4, else
// ~/.cache/dsv4. A damaged one is named on stderr and not used. Failing to keep one is no error.
char *cache_get(const char *kind, uint64_t key);            // to be freed, or NULL
void cache_put(const char *kind, uint64_t key, const char *text);
uint64_t hash64(uint64_t h, const void *p, size_t n);   // FNV-1a; h: HASH_START or a hash so far
#define HASH_START 0xcbf29ce484222325u

// --- a GPU in use. Errors end the process with one line: which GPU, which call, what was being
// computed, and the kernel launched last (a call's error may be that of a kernel before it).

typedef struct {
    const char *name;           // "cuda:0"
    const char *const *at;      // what is being computed
    const char *kernel;         // launched last, or NULL
    CuDevice dev;
    CuContext ctx;
    CuStream stream;            // of everything but uploads
    CuModule module;
    uint64_t ptx;               // hash of the kernels' PTX
    CuEvent lap[2];
    CuPtr *kept;                // [n_kept] what goes with it: device memory
    void **pinned;              // [n_pinned] and the host's
    int n_kept, n_pinned;
} Gpu;

__attribute__((noreturn, cold)) void gpu_die(const Gpu *g, const char *call, CuResult r);
#define CU(gpu, call, ...) do { \
    CuResult r_ = cu.call(__VA_ARGS__); \
    if (r_) gpu_die(gpu, "cu" #call, r_); \
} while (0)

void gpu_start(Gpu *g, int ordinal);        // name and at are set
void gpu_stop(Gpu *g);
int gpu_attribute(const Gpu *g, int id);
// Compiles and loads the kernels; f [n]: those of these names.
void gpu_load(Gpu *g, Span options, const char *const *names, size_t n, CuFunction *f);

CuPtr gpu_alloc(Gpu *g, size_t bytes, const char *what);    // zeroed
CuPtr gpu_keep(Gpu *g, size_t bytes, const char *what);     // the same, freed with the GPU
void *gpu_pinned(Gpu *g, size_t bytes);     // host memory for copies, freed with the GPU
void gpu_copy_in(Gpu *g, CuPtr to, const void *from, size_t bytes);     // queued, as what follows
void gpu_copy_out(Gpu *g, void *to, CuPtr from, size_t bytes);
void gpu_wait(Gpu *g);                      // until everything queued is done
double gpu_lap(Gpu *g);                     // seconds on the GPU since the last call; waits

// Host memory to be copied. e4m3: FP8 weights, refused with a NaN: the kernels take it for 480.
typedef struct { const char *from; CuPtr to; size_t bytes; bool e4m3; } CopyJob;
void upload_expect(const CopyJob *list, size_t n);      // by one of the GPUs: for the progress bar
void gpu_upload(Gpu *g, const CopyJob *list, size_t n);     // by threads, through pinned buffers

// --- the self-test (apps/selftest.c): what an operation left on a GPU against what the CPU has

// The worst comparison of an operation: the largest difference over the root mean square of what
// the CPU has, the limit, their ratio; layer and rows there; n: comparisons.
typedef struct {
    const char *name;
    double error, limit, share;
    const char *at;
    int rows, n;
} GpuCheck;
enum { N_CHECKS = 16 };             // operations

typedef struct { Gpu *g; int rows; GpuCheck *list; } Trial;     // list [N_CHECKS]
void trial_note(Trial *t, const char *op, double error, double limit);
// n numbers; then the GPU goes on from the CPU's. halves: as BF16 on the GPU, where one step of
// rounding is free.
void trial_compare(Trial *t, const char *op, CuPtr gpu, bool halves, const float *cpu, size_t n,
                   double limit);
// The largest of n differences over the root mean square of the CPU's values. slack: the share of a
// value that does not count.
double deviation(const float *gpu, const float *cpu, size_t n, double slack);

// Has this GPU, with this driver and these kernels, passed the tests that *key stands for? That is
// remembered beside the kernels. *key then stands for all of it.
bool gpu_passed(const Gpu *g, uint64_t *key);
// Did it? Then it is remembered. If not, and this was the last try, the process ends.
bool gpu_verdict(const Gpu *g, uint64_t key, const GpuCheck *list, bool last, double start);

// --- what `dsv4 devices` (apps/devices.c) looks at (dsv4.c). Errors end the process.

typedef struct Device Device;
Device *gpu_open(const Model *m, int ordinal);      // a model's first layers and its head on a GPU
Gpu *gpu_of(Device *d);
void gpu_close(Device *d);
void gpu_check(const Model *m, Device *d, GpuCheck *list);      // [N_CHECKS]
double gpu_product_time(Device *d, int bytes, int n, int k, int rows);  // s; INT8 or BF16 [n, k]
char *gpu_kernels(const Model *m, int cc);          // makes PTX; where it is kept, to be freed
int devices(const char *dir, bool named);           // the program

#endif
