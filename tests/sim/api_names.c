/* api_names.c: error texts, and cuGetProcAddress. */
#include "api.h"
#include <link.h>
#include <sys/mman.h>

static const struct { int code; const char *name, *text; } errors[] = {
    { 0, "CUDA_SUCCESS", "no error" },
#define ROW(code, name, text) { code, "CUDA_ERROR_" #name, text },
    ERRORS(ROW)
};

static size_t error_index(int code) {
    size_t i = 0;
    while (i < sizeof errors / sizeof *errors && errors[i].code != code) i++;
    return i;
}

const char *error_name(int code) {
    size_t i = error_index(code);
    return i < sizeof errors / sizeof *errors ? errors[i].name : NULL;
}

const char *error_text(int code) {
    size_t i = error_index(code);
    return i < sizeof errors / sizeof *errors ? errors[i].text : NULL;
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
BODY(ANY, 12000, cuGetProcAddress_v2, (const char *asked, void **fn, int version, cuuint64_t flags,
    CUdriverProcAddressQueryResult *status), (asked, fn, version, flags, status)) {
    int found;
    CUresult r = get_proc(asked, fn, version, flags, &found);
    if (status) *status = found;
    return r == E_NOT_FOUND ? OK : r;
}

API(ANY, 11030, cuGetProcAddress, (const char *symbol, void **fn, int version, cuuint64_t flags),
    get_proc(symbol, fn, version, flags, &(int){ 0 }))

/* NVRTC asks for the driver's private tables when it finds a driver; there are none. */
API(ANY, 3000, cuGetExportTable, (const void **table, const CUuuid *id),
    !id || GIVE(table, NULL) ? E_INVALID_VALUE : E_NOT_FOUND)
