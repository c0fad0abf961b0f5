/* api_names.c: error texts, and cuGetProcAddress. */
#define _GNU_SOURCE
#include "api.h"
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

/* Codes that this library gives or that a test may want to inject. */
#define E(code, name, text) { code, "CUDA_ERROR_" #name, text }
static const struct { int code; const char *name, *text; } errors[] = {
    { 0, "CUDA_SUCCESS", "no error" },
    E(1, INVALID_VALUE, "invalid argument"),
    E(2, OUT_OF_MEMORY, "out of memory"),
    E(3, NOT_INITIALIZED, "initialization error"),
    E(46, DEVICE_UNAVAILABLE, "CUDA-capable device(s) is/are busy or unavailable"),
    E(100, NO_DEVICE, "no CUDA-capable device is detected"),
    E(101, INVALID_DEVICE, "invalid device ordinal"),
    E(200, INVALID_IMAGE, "device kernel image is invalid"),
    E(201, INVALID_CONTEXT, "invalid device context"),
    E(209, NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device"),
    E(214, ECC_UNCORRECTABLE, "uncorrectable ECC error encountered"),
    E(217, PEER_ACCESS_UNSUPPORTED, "peer access is not supported between these two devices"),
    E(218, INVALID_PTX, "a PTX JIT compilation failed"),
    E(220, NVLINK_UNCORRECTABLE, "uncorrectable NVLink error detected"),
    E(221, JIT_COMPILER_NOT_FOUND, "PTX JIT compiler library not found"),
    E(222, UNSUPPORTED_PTX_VERSION, "the provided PTX was compiled with an unsupported toolchain"),
    E(301, FILE_NOT_FOUND, "file not found"),
    E(400, INVALID_HANDLE, "invalid resource handle"),
    E(401, ILLEGAL_STATE, "the operation cannot be performed in the present state"),
    E(500, NOT_FOUND, "named symbol not found"),
    E(600, NOT_READY, "device not ready"),
    E(700, ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    E(701, LAUNCH_OUT_OF_RESOURCES, "too many resources requested for launch"),
    E(702, LAUNCH_TIMEOUT, "the launch timed out and was terminated"),
    E(704, PEER_ACCESS_ALREADY_ENABLED, "peer access is already enabled"),
    E(705, PEER_ACCESS_NOT_ENABLED, "peer access has not been enabled"),
    E(709, CONTEXT_IS_DESTROYED, "context is destroyed"),
    E(710, ASSERT, "device-side assert triggered"),
    E(712, HOST_MEMORY_ALREADY_REGISTERED,
      "part or all of the requested memory range is already mapped"),
    E(713, HOST_MEMORY_NOT_REGISTERED, "pointer does not correspond to a registered memory region"),
    E(715, ILLEGAL_INSTRUCTION, "an illegal instruction was encountered"),
    E(716, MISALIGNED_ADDRESS, "misaligned address"),
    E(719, LAUNCH_FAILED, "unspecified launch failure"),
    E(720, COOPERATIVE_LAUNCH_TOO_LARGE, "too many blocks in cooperative launch"),
    E(800, NOT_PERMITTED, "operation not permitted"),
    E(801, NOT_SUPPORTED, "operation not supported"),
    E(900, STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing"),
    E(901, STREAM_CAPTURE_INVALIDATED, "operation failed due to a previous error during capture"),
    E(902, STREAM_CAPTURE_MERGE, "operation would result in a merge of separate capture sequences"),
    E(903, STREAM_CAPTURE_UNMATCHED, "capture was not ended in the same stream"),
    E(904, STREAM_CAPTURE_UNJOINED, "capturing stream has unjoined work"),
    E(905, STREAM_CAPTURE_ISOLATION, "dependency created on uncaptured work in another stream"),
    E(906, STREAM_CAPTURE_IMPLICIT,
      "operation would make the legacy stream depend on a capturing blocking stream"),
    E(907, CAPTURED_EVENT,
      "operation not permitted on an event last recorded in a capturing stream"),
    E(908, STREAM_CAPTURE_WRONG_THREAD,
      "attempt to terminate a thread-local capture sequence from another thread"),
    E(910, GRAPH_EXEC_UPDATE_FAILURE,
      "the graph update was not performed because it included changes which violated constraints"),
    E(999, UNKNOWN, "unknown error"),
};
#undef E

const char *error_name(int code) {
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code) return errors[i].name;
    return NULL;
}

const char *error_text(int code) {
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code) return errors[i].text;
    return NULL;
}

/* Name as the program asks for it, first driver version that has this form, and what the exported
 * symbol carries behind the name. */
static const struct { const char *base; int version; const char *suffix; } symbols[] = {
    { "cuCtxDisablePeerAccess", 4000, "" }, { "cuCtxEnablePeerAccess", 4000, "" },
    { "cuCtxGetCurrent", 4000, "" }, { "cuCtxGetDevice", 13000, "_v2" },
    { "cuCtxGetDevice", 2000, "" }, { "cuCtxGetStreamPriorityRange", 5050, "" },
    { "cuCtxPopCurrent", 4000, "_v2" }, { "cuCtxPushCurrent", 4000, "_v2" },
    { "cuCtxSetCurrent", 4000, "" }, { "cuCtxSynchronize", 13000, "_v2" },
    { "cuCtxSynchronize", 2000, "" }, { "cuDeviceCanAccessPeer", 4000, "" },
    { "cuDeviceGet", 2000, "" }, { "cuDeviceGetAttribute", 2000, "" },
    { "cuDeviceGetCount", 2000, "" }, { "cuDeviceGetName", 2000, "" },
    { "cuDeviceGetP2PAttribute", 8000, "" }, { "cuDeviceGetPCIBusId", 4010, "" },
    { "cuDeviceGetUuid", 11040, "_v2" }, { "cuDevicePrimaryCtxGetState", 7000, "" },
    { "cuDevicePrimaryCtxRelease", 11000, "_v2" }, { "cuDevicePrimaryCtxReset", 11000, "_v2" },
    { "cuDevicePrimaryCtxRetain", 7000, "" }, { "cuDevicePrimaryCtxSetFlags", 11000, "_v2" },
    { "cuDeviceTotalMem", 3020, "_v2" }, { "cuDriverGetVersion", 2020, "" },
    { "cuEventCreate", 2000, "" }, { "cuEventDestroy", 4000, "_v2" },
    { "cuEventElapsedTime", 12080, "_v2" }, { "cuEventElapsedTime", 2000, "" },
    { "cuEventQuery", 2000, "" }, { "cuEventRecord", 2000, "" }, { "cuEventSynchronize", 2000, "" },
    { "cuFuncGetAttribute", 2020, "" }, { "cuFuncSetAttribute", 9000, "" },
    { "cuFuncSetCacheConfig", 3000, "" }, { "cuGetErrorName", 6000, "" },
    { "cuGetErrorString", 6000, "" }, { "cuGetExportTable", 3000, "" },
    { "cuGetProcAddress", 11030, "" },
    { "cuGetProcAddress", 12000, "_v2" }, { "cuGraphAddKernelNode", 12000, "_v2" },
    { "cuGraphCreate", 10000, "" }, { "cuGraphDestroy", 10000, "" },
    { "cuGraphExecDestroy", 10000, "" }, { "cuGraphExecKernelNodeSetParams", 12000, "_v2" },
    { "cuGraphExecUpdate", 12000, "_v2" }, { "cuGraphGetNodes", 10000, "" },
    { "cuGraphInstantiate", 11000, "_v2" }, { "cuGraphInstantiate", 12000, "WithFlags" },
    { "cuGraphInstantiateWithFlags", 11040, "" }, { "cuGraphLaunch", 10000, "" },
    { "cuGraphUpload", 11010, "" }, { "cuInit", 2000, "" },
    { "cuLaunchCooperativeKernel", 9000, "" }, { "cuLaunchHostFunc", 10000, "" },
    { "cuLaunchKernel", 4000, "" }, { "cuLaunchKernelEx", 11060, "" },
    { "cuMemAlloc", 3020, "_v2" }, { "cuMemAllocHost", 3020, "_v2" }, { "cuMemFree", 3020, "_v2" },
    { "cuMemFreeHost", 2000, "" }, { "cuMemGetInfo", 3020, "_v2" }, { "cuMemHostAlloc", 2020, "" },
    { "cuMemHostGetDevicePointer", 3020, "_v2" }, { "cuMemHostRegister", 6050, "_v2" },
    { "cuMemHostUnregister", 4000, "" }, { "cuMemcpy", 4000, "" }, { "cuMemcpyAsync", 4000, "" },
    { "cuMemcpyDtoD", 3020, "_v2" }, { "cuMemcpyDtoDAsync", 3020, "_v2" },
    { "cuMemcpyDtoH", 3020, "_v2" }, { "cuMemcpyDtoHAsync", 3020, "_v2" },
    { "cuMemcpyHtoD", 3020, "_v2" }, { "cuMemcpyHtoDAsync", 3020, "_v2" },
    { "cuMemcpyPeer", 4000, "" }, { "cuMemcpyPeerAsync", 4000, "" }, { "cuMemsetD32", 3020, "_v2" },
    { "cuMemsetD32Async", 3020, "" }, { "cuMemsetD8", 3020, "_v2" },
    { "cuMemsetD8Async", 3020, "" }, { "cuModuleGetFunction", 2000, "" },
    { "cuModuleGetGlobal", 3020, "_v2" }, { "cuModuleLoadData", 2000, "" },
    { "cuModuleLoadDataEx", 2010, "" }, { "cuModuleUnload", 2000, "" },
    { "cuOccupancyMaxActiveBlocksPerMultiprocessor", 6050, "" },
    { "cuPointerGetAttribute", 4000, "" }, { "cuProfilerStart", 4000, "" },
    { "cuProfilerStop", 4000, "" }, { "cuStreamBeginCapture", 10010, "_v2" },
    { "cuStreamCreate", 2000, "" }, { "cuStreamCreateWithPriority", 5050, "" },
    { "cuStreamDestroy", 4000, "_v2" }, { "cuStreamEndCapture", 10000, "" },
    { "cuStreamIsCapturing", 10000, "" }, { "cuStreamQuery", 2000, "" },
    { "cuStreamSynchronize", 2000, "" }, { "cuStreamWaitEvent", 3020, "" },
};

bool known_symbol(const char *name) {
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        size_t n = strlen(symbols[i].base);
        if (!strncmp(name, symbols[i].base, n) && !strcmp(name + n, symbols[i].suffix)) return true;
    }
    return false;
}

/* Makes an export impossible to find, for dlsym too: its name in the loaded table is changed. */
void hide_symbol(const char *name) {
    char *table = NULL;
    size_t size = 0, n = strlen(name) + 1;
    for (ElfW(Dyn) *d = _DYNAMIC; d->d_tag != DT_NULL; d++) {
        if (d->d_tag == DT_STRTAB) table = (char *)d->d_un.d_ptr;
        if (d->d_tag == DT_STRSZ) size = d->d_un.d_val;
    }
    for (char *p = table + 1; table && p + n <= table + size; p++) {
        if (p[-1] || memcmp(p, name, n)) continue;
        char *page = (char *)((uintptr_t)p & ~(uintptr_t)4095);
        if (!mprotect(page, 4096, PROT_READ | PROT_WRITE)) *p = 'x';
    }
}

/* Address of one of this library's own exports. */
static void *own_symbol(const char *name) {
    Dl_info info;
    if (!dladdr(&config, &info)) return NULL;
    void *self_ = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    void *p = self_ ? dlsym(self_, name) : NULL;
    if (self_) dlclose(self_);
    return p;
}

/* The newest form of `symbol` that both `version` and the driver know. *status: 0 found, 1 unknown,
 * 2 only newer forms. Names with a suffix are unknown, as on a real driver. */
static CUresult get_proc(const char *symbol, void **fn, int version, uint64_t flags, int *status) {
    char name[128];
    int best = -1;
    *status = 1;
    if (!symbol || !fn || flags > 2 || version > config.driver) return E_INVALID_VALUE;
    *fn = NULL;
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        if (strcmp(symbols[i].base, symbol)) continue;
        if (best < 0) *status = 2;
        if (symbols[i].version > version || symbols[i].version < best) continue;
        best = symbols[i].version;
        snprintf(name, sizeof name, "%s%s", symbol, symbols[i].suffix);
        *status = 0;
    }
    if (*status == 0 && (fault_missing(symbol) || fault_missing(name))) *status = 1;
    if (*status == 0) *fn = own_symbol(name);
    if (*status == 1) fprintf(stderr, "sim: cuGetProcAddress: %s is not provided\n", symbol);
    return *fn ? OK : E_NOT_FOUND;
}

EXPORT CUresult cuGetProcAddress_v2(const char *symbol, void **fn, int version, cuuint64_t flags,
                                    CUdriverProcAddressQueryResult *status) {
    int found;
    CUresult r = enter(__func__, ANY);
    if (!r) {
        r = get_proc(symbol, fn, version, flags, &found);
        if (status) *status = found;
        if (r == E_NOT_FOUND) r = OK; /* the status and the NULL tell, so it is documented */
    }
    return leave(r);
}

EXPORT CUresult cuGetProcAddress(const char *symbol, void **fn, int version, cuuint64_t flags) {
    int found;
    CUresult r = enter(__func__, ANY);
    return leave(r ? r : get_proc(symbol, fn, version, flags, &found));
}

/* NVRTC asks for the driver's private tables when it finds a driver; there are none. */
EXPORT CUresult cuGetExportTable(const void **table, const CUuuid *id) {
    CUresult r = enter(__func__, ANY);
    if (!r && (!table || !id)) r = E_INVALID_VALUE;
    if (!r) {
        *table = NULL;
        r = E_NOT_FOUND;
    }
    return leave(r);
}
