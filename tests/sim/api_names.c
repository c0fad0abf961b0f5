/* api_names.c: error texts, and cuGetProcAddress. */
#include "api.h"
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

extern const Symbol __start_symbols[], __stop_symbols[];

bool known_symbol(const char *name) {
    for (const Symbol *s = __start_symbols; s < __stop_symbols; s++)
        if (!strcmp(s->name, name)) return true;
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

/* Is this a form of the function? Programs ask for the name without the _v2 of the newer ones. */
static bool is_form(const Symbol *s, const char *asked) {
    size_t n = strlen(asked);
    return !strncmp(s->name, asked, n) && (!s->name[n] || !strcmp(s->name + n, "_v2")) &&
           !strstr(asked, "_v2");
}

/* The newest form of a function that both `version` and the driver know. *status: 0 found, 1
 * unknown, 2 only newer forms. */
static CUresult get_proc(const char *asked, void **fn, int version, uint64_t flags, int *status) {
    const Symbol *best = NULL;
    *status = 1;
    if (!asked || !fn || flags > 2 || version > config.driver) return E_INVALID_VALUE;
    *fn = NULL;
    for (const Symbol *s = __start_symbols; s < __stop_symbols; s++) {
        if (!is_form(s, asked) || fault_missing(s->name)) continue;
        if (!best) *status = 2;
        if (s->since <= version && (!best || s->since > best->since)) best = s;
    }
    if (best && !fault_missing(asked)) {
        *status = 0;
        *fn = best->function;
    }
    if (*status == 1) fprintf(stderr, "sim: cuGetProcAddress: %s is not provided\n", asked);
    return *fn ? OK : E_NOT_FOUND;
}

/* The newer form gives no error but the status and NULL, so it is documented. */
static CUresult get_proc_v2(const char *asked, void **fn, int version, uint64_t flags,
                            CUdriverProcAddressQueryResult *status) {
    int found;
    CUresult r = get_proc(asked, fn, version, flags, &found);
    if (status) *status = found;
    return r == E_NOT_FOUND ? OK : r;
}

API(ANY, 12000, cuGetProcAddress_v2, (const char *symbol, void **fn, int version, cuuint64_t flags,
    CUdriverProcAddressQueryResult *status), get_proc_v2(symbol, fn, version, flags, status))
API(ANY, 11030, cuGetProcAddress, (const char *symbol, void **fn, int version, cuuint64_t flags),
    get_proc(symbol, fn, version, flags, &(int){ 0 }))

/* NVRTC asks for the driver's private tables when it finds a driver; there are none. */
API(ANY, 3000, cuGetExportTable, (const void **table, const CUuuid *id),
    !id || GIVE(table, NULL) ? E_INVALID_VALUE : E_NOT_FOUND)
