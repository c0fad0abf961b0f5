// Any bytes as a shard (first byte not 'I') or, behind an 'I', as an index beside one good shard. What
// is accepted must hold: names found again, data inside the file, without holes or overlap.
#define DSV4_NO_MAIN
#include "../dsv4.c"

// of apps/safetensors.c
bool shard_read(Store *s, int number, Err *e);
bool store_open_index(Store *s, Span text, const char *path, const char *dir, Err *e);

static char dir[] = "/tmp/dsv4-fuzz-XXXXXX";

static void remove_dir(void) {
    char path[64];
    snprintf(path, sizeof path, "%s/a.safetensors", dir);
    unlink(path);
    rmdir(dir);
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    static const char head[] = "{\"x\":{\"dtype\":\"I8\",\"shape\":[2],\"data_offsets\":[0,2]},"
                               "\"y\":{\"dtype\":\"BF16\",\"shape\":[],\"data_offsets\":[2,4]}}";
    char path[64];
    if (!mkdtemp(dir)) abort();
    snprintf(path, sizeof path, "%s/a.safetensors", dir);
    FILE *f = fopen(path, "wb");
    if (!f) abort();
    fwrite((uint64_t[]){ sizeof head - 1 }, 8, 1, f);
    fwrite(head, 1, sizeof head - 1, f);
    fwrite("abcd", 1, 4, f);
    fclose(f);
    atexit(remove_dir);
    return 0;
}

// `mapped`: its shards are files, which their addresses lead to.
static void check_store(const Store *s, bool mapped) {
    size_t total = 0;
    for (size_t i = 0; i < s->n; i++) {
        const Tensor *t = &s->tensors[i];
        const Shard *sh = &s->shards[t->shard];
        const uint8_t *file = (const uint8_t *)sh->map.p;
        char kind[256];
        if (store_find_span(s, t->name) != t) abort();
        if (t->data < file + sh->header || t->data + t->bytes > file + sh->map.n) abort();
        if (t->bytes && mapped && strcmp(mapped_path(t->data), sh->path)) abort();
        if (strlen(tensor_kind(t, kind)) >= 255) abort();
        total += t->bytes;
    }
    if (s->n_shards == 1 && total != s->shards[0].map.n - s->shards[0].header) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    Err e = { "" };
    Store s = { 0 };
    char *copy = malloc(n + 1);
    memcpy(copy, data, n);
    copy[n] = 0;
    bool ok;
    if (n && data[0] == 'I') {
        ok = store_open_index(&s, (Span){ copy + 1, n - 1 }, "index", dir, &e);
        if (ok) check_store(&s, true);
    } else {
        s.shards = xalloc(1, sizeof *s.shards);
        s.shards[0] = (Shard){ .path = strdup("shard"), .map = { realloc(copy, n ? n : 1), n } };
        copy = (char *)(uintptr_t)s.shards[0].map.p;
        s.n_shards = 1;
        ok = shard_read(&s, 0, &e);
        if (ok) check_store(&s, false);
        s.shards[0].map.n = 0;              // ours to free, not to unmap
    }
    if (!ok && (!e.text[0] || strchr(e.text, '\n'))) abort();
    store_close(&s);
    free(copy);
    return 0;
}
