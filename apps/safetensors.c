// safetensors: u64 length, JSON header, data. A checkpoint is one file, or shards and an index.
// The data stay in the mapped files. The rules are safetensors' own.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "dsv4.h"

const DtypeInfo dtypes[N_DTYPES] = {
    { "BOOL", 8 }, { "F4", 4 }, { "F6_E2M3", 6 }, { "F6_E3M2", 6 }, { "U8", 8 }, { "I8", 8 },
    { "F8_E5M2", 8 }, { "F8_E4M3", 8 }, { "F8_E8M0", 8 }, { "I16", 16 }, { "U16", 16 },
    { "F16", 16 }, { "BF16", 16 }, { "I32", 32 }, { "U32", 32 }, { "F32", 32 }, { "C64", 64 },
    { "F64", 64 }, { "I64", 64 }, { "U64", 64 },
};

enum { SHARD_HEADER = 100 * 1000 * 1000 };

// "BF16 [64, 128]"
const char *tensor_kind(const Tensor *t, char out[static 256]) {
    int n = snprintf(out, 256, "%s [", dtypes[t->dtype].name);
    for (int i = 0; i < t->rank; i++)
        n += snprintf(out + n, 256 - (size_t)n, "%s%lld", i ? ", " : "", (long long)t->shape[i]);
    snprintf(out + n, 256 - (size_t)n, "]");
    return out;
}

const Tensor *store_find_span(const Store *s, Span name) {
    const MapEntry *e = map_find(&s->names, name);
    return e ? &s->tensors[e - s->names.entries] : NULL;
}

void store_close(Store *s) {
    for (int i = 0; i < s->n_shards; i++) {
        unmap_file(s->shards[i].map);
        free(s->shards[i].path);
    }
    free(s->shards);
    free(s->tensors);
    map_free(&s->names);
    *s = (Store){ 0 };
}

// The three fields of a header entry. Each says what is wrong and where (the byte in the file).
static void tensor_dtype(Json *j, Tensor *t) {
    Str name = { 0 };
    json_string(j, &name);
    while (t->dtype < N_DTYPES && !str_is(&name, dtypes[t->dtype].name)) t->dtype++;
    if (t->dtype == N_DTYPES) json_fail(j, "%.*s: unknown dtype %.*s", SHOWN(t->name), SHOWN(name));
    free(name.p);
}

static void tensor_shape(Json *j, Tensor *t) {
    for (json_array(j); json_item(j);)
        if (t->rank < TENSOR_RANK) json_int(j, 0, INT64_MAX, &t->shape[t->rank++]);
        else json_fail(j, "%.*s: more than %d dimensions", SHOWN(t->name), TENSOR_RANK);
}

static void tensor_offsets(Json *j, Tensor *t) {
    int64_t at[3] = { 0 };
    int n = 0;
    for (json_array(j); json_item(j); n++) json_int(j, 0, INT64_MAX, &at[n < 2 ? n : 2]);
    if (n != 2 || at[0] > at[1])
        json_fail(j, "%.*s: data_offsets must be [begin, end], begin <= end", SHOWN(t->name));
    t->at = (size_t)at[0];
    t->bytes = (size_t)(at[1] - at[0]);
}

// One entry of a header: {"dtype": .., "shape": [..], "data_offsets": [begin, end]}. Checks that
// dtype and shape need exactly that many bytes; t->at, behind the header, is not checked yet.
static bool tensor_read(Json *j, Tensor *t) {
    static const char *const fields[] = { "dtype", "shape", "data_offsets" };
    unsigned seen = 0;
    Str key = { 0 };
    for (json_object(j); json_member(j, &key);) {
        unsigned i = 0;
        while (i < 3 && !str_is(&key, fields[i])) i++;
        if (seen >> i & 1 && i < 3) json_fail(j, "%.*s: %s twice", SHOWN(t->name), fields[i]);
        else if (i == 0) tensor_dtype(j, t);
        else if (i == 1) tensor_shape(j, t);
        else if (i == 2) tensor_offsets(j, t);
        else json_skip(j);
        seen |= 1u << i;
    }
    free(key.p);
    for (unsigned i = 0; i < 3; i++)
        if (!(seen >> i & 1)) json_fail(j, "%.*s: no %s", SHOWN(t->name), fields[i]);
    if (j->bad) return false;
    size_t bits = 1;
    bool fits = true;                       // a product that overflows is none, whatever follows
    for (int i = 0; i < t->rank; i++)
        fits &= !__builtin_mul_overflow(bits, (size_t)t->shape[i], &bits);
    fits &= !__builtin_mul_overflow(bits, (size_t)dtypes[t->dtype].bits, &bits);
    char kind[256];
    return (fits && bits % 8 == 0 && bits / 8 == t->bytes) ||
           json_fail(j, "%.*s: %s does not fit data_offsets [%zu, %zu]", SHOWN(t->name),
                     tensor_kind(t, kind), t->at, t->at + t->bytes);
}

// "__metadata__": an object of strings.
static void shard_metadata(Json *j, Shard *sh) {
    if (sh->metadata.n) json_fail(j, "__metadata__ twice");
    json_peek(j);
    const char *from = j->p;
    for (json_object(j); json_member(j, NULL);) json_string(j, NULL);
    sh->metadata = (Span){ from, (size_t)(j->p - from) };
}

// The JSON of a header, its length checked already: adds its tensors.
static bool shard_header(Store *s, int number, Err *e) {
    Shard *sh = &s->shards[number];
    Str key = { 0 };
    Json j = json_open((Span){ sh->map.p, sh->header }, sh->path, e);
    for (j.p += 8, json_object(&j); json_member(&j, &key);) {
        Tensor t = { .name = str_span(&key), .shard = number };
        const Tensor *twin = store_find_span(s, t.name);
        if (str_is(&key, "__metadata__")) shard_metadata(&j, sh);
        else if (twin)
            json_fail(&j, "tensor %.*s is there twice, first in %s", SHOWN(key),
                      s->shards[twin->shard].path);
        else if (tensor_read(&j, &t)) {
            map_add(&s->names, t.name, 0);
            s->tensors = grow(s->tensors, s->n, sizeof *s->tensors);
            s->tensors[s->n++] = t;
        }
    }
    free(key.p);
    for (; !j.bad && j.p < j.end; j.p++)
        if (*j.p != ' ') json_fail(&j, "0x%02x behind the header: only spaces may pad it",
                                   (uint8_t)*j.p);
    return !j.bad;
}

// By place; of equal places the empty tensor comes first.
static int by_offset(const void *a, const void *b) {
    const Tensor *x = *(Tensor *const *)a, *y = *(Tensor *const *)b;
    if (x->at != y->at) return x->at < y->at ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes);
}

// The data of a shard, of the tensors from number `from` on, must fill the rest of the file: no
// hole, no overlap, nothing left. Then, and not before, the tensors get their addresses.
static bool shard_layout(Store *s, const Shard *sh, size_t from, Err *e) {
    size_t at = 0, n = s->n - from;
    Tensor **sorted = xalloc(n, sizeof *sorted), *bad = NULL;
    for (size_t i = 0; i < n; i++) sorted[i] = &s->tensors[from + i];
    qsort(sorted, n, sizeof *sorted, by_offset);
    for (size_t i = 0; i < n && !bad; i++) {
        if (sorted[i]->at == at) at = cadd(at, sorted[i]->bytes);
        else bad = sorted[i];
    }
    free(sorted);
    if (bad) {
        Span name = map_key(&s->names, (size_t)(bad - s->tensors));
        return fail(e, "%s: tensor %.*s begins at data byte %zu, expected %zu (%s): download again",
                    sh->path, SHOWN(name), bad->at, at, bad->at < at ? "overlap" : "hole");
    }
    if (cadd(sh->header, at) != sh->map.n)
        return fail(e, "%s: file has %zu bytes, its header needs %zu: download again", sh->path,
                    sh->map.n, cadd(sh->header, at));
    for (size_t i = from; i < s->n; i++) {
        s->tensors[i].at += sh->header;
        s->tensors[i].data = (const uint8_t *)sh->map.p + s->tensors[i].at;
    }
    return true;
}

// Reads the header of shard number `number`, which is mapped already, and adds its tensors. Every
// claim is checked against the file's own size before anything is allocated for it.
bool shard_read(Store *s, int number, Err *e) {
    Shard *sh = &s->shards[number];
    const uint8_t *file = (const uint8_t *)sh->map.p;
    size_t length = 0, from = s->n;
    if (sh->map.n < 8)
        return fail(e, "%s: file has %zu bytes, a safetensors file at least 8: download again",
                    sh->path, sh->map.n);
    for (int i = 0; i < 8; i++) length |= (size_t)file[i] << 8 * i;
    if (length > SHARD_HEADER)
        return fail(e, "%s: header length %zu, at most %d allowed: not a safetensors file?",
                    sh->path, length, SHARD_HEADER);
    if (length > sh->map.n - 8)
        return fail(e, "%s: file has %zu bytes, its header alone needs %zu: download again",
                    sh->path, sh->map.n, length + 8);
    if (!length || file[8] != '{')
        return fail(e, "%s: byte 8: the header must begin with '{': not a safetensors file?",
                    sh->path);
    sh->header = length + 8;
    if (!shard_header(s, number, e) || !shard_layout(s, sh, from, e)) return false;
    for (size_t i = 0; i < s->n; i++) s->tensors[i].name = map_key(&s->names, i);   // they move
    return true;
}

// Maps DIR/FILE as the next shard.
static bool store_add_shard(Store *s, const char *dir, const char *file, Err *e) {
    Shard sh = { .path = text_of("%s/%s", dir, file) };
    if (!map_file(sh.path, &sh.map, e)) {
        free(sh.path);
        return false;
    }
    s->shards = grow(s->shards, (size_t)s->n_shards, sizeof *s->shards);
    s->shards[s->n_shards++] = sh;
    return shard_read(s, s->n_shards - 1, e);
}

// A shard must be a plain file name: an index that came from a stranger opens nothing else.
static bool shard_name_ok(Span file) {
    bool plain = file.n && file.n < 256 && file.p[0] != '.';
    for (size_t i = 0; i < file.n; i++)
        plain = plain && (uint8_t)file.p[i] >= 32 && file.p[i] != '/';
    return plain;
}

typedef struct { Store *store; const char *dir; } Index;

// Opens each shard where the index first names it. Every entry must be a tensor of its shard.
static void index_weight_map(Json *j, void *to) {
    Store *s = ((Index *)to)->store;
    const char *dir = ((Index *)to)->dir;
    Map files = { 0 };
    Str name = { 0 }, file = { 0 };
    for (json_object(j); json_member(j, &name) && json_string(j, &file);) {
        if (!shard_name_ok(str_span(&file))) {
            json_fail(j, "%.*s: bad shard name '%.80s': a plain file name is allowed here",
                      SHOWN(name), file.p);
            break;
        }
        Span f = str_span(&file);
        if (map_add(&files, f, s->n_shards) && !store_add_shard(s, dir, file.p, j->e)) {
            j->bad = true;
            break;
        }
        MapEntry *e = map_find(&s->names, str_span(&name));
        if (!e || s->tensors[e - s->names.entries].shard != map_find(&files, f)->value)
            json_fail(j, "tensor %.*s is not in %s: download again", SHOWN(name), file.p);
        else if (e->value++) json_fail(j, "tensor %.*s twice", SHOWN(name));
    }
    free(name.p);
    free(file.p);
    map_free(&files);
}

bool store_open_index(Store *s, Span text, const char *path, const char *dir, Err *e) {
    static const Field field = { "weight_map", J_READ, NEEDED, .read = index_weight_map };
    size_t surplus = 0;
    if (!table_file(text, path, &field, 1, &(Index){ s, dir }, e)) return false;
    // harmless (nothing looks for them), but a sign that index and shards are not of one release
    for (size_t i = 0; i < s->n; i++) surplus += !s->names.entries[i].value;
    if (surplus) note("%s: %zu tensors in the shards are not in the index", path, surplus);
    return true;
}

// Opens the checkpoint in a directory: what model.safetensors.index.json lists, else
// model.safetensors. On an error *s is empty.
bool store_open(Store *s, const char *dir, Err *e) {
    Span text = { 0 };
    char *index = text_of("%s/model.safetensors.index.json", dir);
    char *single = text_of("%s/model.safetensors", dir);
    bool ok;
    *s = (Store){ 0 };
    if (file_exists(index))
        ok = map_file(index, &text, e) && store_open_index(s, text, index, dir, e);
    else if (file_exists(single)) ok = store_add_shard(s, dir, "model.safetensors", e);
    else ok = fail(e, "%s: no model.safetensors.index.json and no model.safetensors here", dir);
    unmap_file(text);
    free(index);
    free(single);
    if (!ok) store_close(s);
    return ok;
}
