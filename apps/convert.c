// dsv4 convert SRC DST: the original release (FP4 experts, FP8 matrices) -> dsv4_int (INT4, INT8).
//
// Every shard becomes a shard of the same name, laid out as safetensors' own writer does it. It is
// written as NAME.part, synced, then renamed: what bears its final name is complete.
// DST/.dsv4-convert says which source and options the work belongs to, so a run that was stopped at
// any point goes on where it was. Threads read, convert and write pieces of 1 MiB.

#define _GNU_SOURCE
#include "dsv4.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define MANIFEST ".dsv4-convert"

static void *need(void *p) {
    if (!p) dsv4_die(1, "convert: out of memory");
    return p;
}

__attribute__((format(printf, 1, 2)))
static char *text_of(const char *fmt, ...) {
    char *s;
    va_list ap;
    va_start(ap, fmt);
    if (vasprintf(&s, fmt, ap) < 0) s = NULL;
    va_end(ap);
    return need(s);
}

static bool text_is(Dsv4Text t, const char *z) { return t.n == strlen(z) && !memcmp(t.p, z, t.n); }

static int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b > 0); }

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

// ---------------------------------------------------------------------------
// the rules (FP32 throughout, rounded half to even), tabulated for every scale byte

static float f32_from(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static uint32_t bits_of(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

// E8M0: 2^(b - 127); 255 is NaN.
static float e8m0(int b) { return b == 255 ? NAN : b ? f32_from((uint32_t)b << 23) : 0x1p-127f; }

// E4M3 without infinities: 0x7f and 0xff are NaN.
static float e4m3(int b) {
    int e = b >> 3 & 15, m = b & 7;
    float a = (b & 127) == 127 ? NAN : e ? ldexpf(8 + m, e - 10) : ldexpf(m, -9);
    return b & 128 ? -a : a;
}

static const float e2m1[8] = { 0, .5f, 1, 1.5f, 2, 3, 4, 6 };

enum { SCALE_BAD = 0xffff };    // a NaN, which no finite scale becomes

// A scale as it is stored: BF16 or F16, nearest even. Not finite (or too large for F16): SCALE_BAD.
static uint16_t stored_scale(float s, bool f16) {
    if (!isfinite(s)) return SCALE_BAD;
    uint32_t u = bits_of(s);
    if (!f16) return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
    if (s >= 65520) return SCALE_BAD;
    if (s < 0x1p-14f) return (uint16_t)nearbyintf(s * 0x1p24f);         // subnormal halves
    u -= 112u << 23;
    return (uint16_t)((u + 0xfff + (u >> 13 & 1)) >> 13);
}

// FP4 -> INT4, in a group of 32 with scale byte b and largest magnitude code c:
// s = max(absmax, FLT_MIN) / 7, q = rint(x / s) in [-8, 7], stored as q + 8.
// So a nibble's new value depends on (b, c) and itself alone.
typedef struct {
    uint8_t nibble[256][8][16];
    uint16_t scale4[256][8];
    bool f16;
} Tables;

static Tables *tables_new(bool f16) {
    Tables *t = need(calloc(1, sizeof *t));
    t->f16 = f16;
    for (int b = 0; b < 256; b++)
        for (int c = 0; c < 8; c++) {
            float scale = e8m0(b), s = fmaxf(e2m1[c] * scale, 0x1p-126f) / 7;
            t->scale4[b][c] = b == 255 ? SCALE_BAD : stored_scale(s, f16);
            for (int x = 0; x < 16 && isfinite(s); x++) {
                float q = rintf(e2m1[x & 7] * scale / s);
                int i = (int)fminf(fmaxf(x & 8 ? -q : q, -8), 7);
                t->nibble[b][c][x] = (uint8_t)(i + 8);
            }
        }
    return t;
}

// FP8 -> INT8: of a block of 128 x 128, scale byte b, largest magnitude byte m:
// s = max(absmax, FLT_MIN) / 127, q = rint(x / s) in [-128, 127]. map [128]: q of every magnitude.
static uint16_t table8(int b, int m, bool f16, int8_t map[static 128]) {
    float scale = e8m0(b), absmax = e4m3(m) * scale, s = fmaxf(absmax, 0x1p-126f) / 127;
    memset(map, 0, 128);
    if (!isfinite(absmax)) return SCALE_BAD;
    for (int x = 0; x <= m; x++) map[x] = (int8_t)fminf(rintf(e4m3(x) * scale / s), 127);
    return stored_scale(s, f16);
}

// ---------------------------------------------------------------------------
// the hot loops. Portable and vector versions give the same bits: both only look up the tables.

// n groups: w [n, 16] FP4, b [n] E8M0 -> q [n, 16] INT4, s [n] scales.
static void fp4_portable(const Tables *t, const uint8_t *w, const uint8_t *b, size_t n, uint8_t *q,
                         uint16_t *s) {
    for (size_t g = 0; g < n; g++, w += 16, q += 16) {
        int c = 0;
        for (int i = 0; i < 16; i++) {
            int lo = w[i] & 7, hi = w[i] >> 4 & 7, top = lo > hi ? lo : hi;
            if (top > c) c = top;
        }
        const uint8_t *map = t->nibble[b[g]][c];
        for (int i = 0; i < 16; i++) q[i] = (uint8_t)(map[w[i] & 15] | map[w[i] >> 4] << 4);
        s[g] = t->scale4[b[g]][c];
    }
}

// The largest magnitude byte of rows x cols FP8 values.
static int fp8_max(const uint8_t *w, size_t ld, int rows, int cols) {
    uint8_t top = 0;
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < cols; i++) {
            uint8_t x = w[(size_t)r * ld + i] & 127;
            top = x > top ? x : top;
        }
    return top;
}

// n FP8 values -> INT8.
static void fp8_portable(const int8_t map[static 128], const uint8_t *w, uint8_t *q, int n) {
    for (int i = 0; i < n; i++) {
        int v = map[w[i] & 127];
        q[i] = (uint8_t)(w[i] & 128 ? -v : v);
    }
}

static void (*fp4_groups)(const Tables *, const uint8_t *, const uint8_t *, size_t, uint8_t *,
                          uint16_t *) = fp4_portable;
static void (*fp8_row)(const int8_t [static 128], const uint8_t *, uint8_t *, int) = fp8_portable;

#ifdef __x86_64__
__attribute__((target("avx2")))
static void fp4_avx2(const Tables *t, const uint8_t *w, const uint8_t *b, size_t n, uint8_t *q,
                     uint16_t *s) {
    const __m128i low = _mm_set1_epi8(15), mag = _mm_set1_epi8(7), byte = _mm_set1_epi16(255);
    for (size_t g = 0; g < n; g++) {
        __m128i x = _mm_loadu_si128((const __m128i *)(w + 16 * g));
        __m128i lo = _mm_and_si128(x, low), hi = _mm_and_si128(_mm_srli_epi16(x, 4), low);
        __m128i top = _mm_max_epu8(_mm_and_si128(lo, mag), _mm_and_si128(hi, mag));
        top = _mm_and_si128(_mm_max_epu8(top, _mm_srli_epi16(top, 8)), byte);
        int c = 255 - _mm_extract_epi16(_mm_minpos_epu16(_mm_sub_epi16(byte, top)), 0);
        __m128i map = _mm_loadu_si128((const __m128i *)t->nibble[b[g]][c]);
        lo = _mm_shuffle_epi8(map, lo);
        hi = _mm_slli_epi16(_mm_shuffle_epi8(map, hi), 4);
        _mm_storeu_si128((__m128i *)(q + 16 * g), _mm_or_si128(lo, hi));
        s[g] = t->scale4[b[g]][c];
    }
}

// The table of 128 bytes as eight of 16: a byte that belongs to another one gets its top bit set
// and so shuffles in a zero.
__attribute__((target("avx2")))
static void fp8_avx2(const int8_t map[static 128], const uint8_t *w, uint8_t *q, int n) {
    __m256i part[8];
    const __m256i mag = _mm256_set1_epi8(127), one = _mm256_set1_epi8(1);
    for (int i = 0; i < 8; i++)
        part[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(map + 16 * i)));
    int at = 0;
    for (; at + 32 <= n; at += 32) {
        __m256i x = _mm256_loadu_si256((const __m256i *)(w + at)), v = _mm256_setzero_si256();
        __m256i m = _mm256_and_si256(x, mag);
        for (int i = 0; i < 8; i++) {
            __m256i k = _mm256_xor_si256(m, _mm256_set1_epi8((char)(16 * i)));
            k = _mm256_adds_epu8(k, _mm256_set1_epi8(0x70));
            v = _mm256_or_si256(v, _mm256_shuffle_epi8(part[i], k));
        }
        v = _mm256_sign_epi8(v, _mm256_or_si256(x, one));
        _mm256_storeu_si256((__m256i *)(q + at), v);
    }
    fp8_portable(map, w + at, q + at, n - at);
}
#endif

static void pick_loops(void) {
#ifdef __x86_64__
    if (!__builtin_cpu_supports("avx2")) return;
    fp4_groups = fp4_avx2;
    fp8_row = fp8_avx2;
#endif
}

// ---------------------------------------------------------------------------
// the plan: which tensor goes where, and by which rule

typedef enum { COPY, INT4, INT4_SCALE, INT8, INT8_SCALE } Rule;

typedef struct {
    Dsv4Tensor t;           // the source
    Dsv4Tensor pair;        // INT4, INT8: its scale; *_SCALE: its weight
    size_t index, pair_index;       // of both in the store
    Dsv4Text name;          // in DST; remap gives layers other numbers
    Rule rule;
    bool together;          // weight and scale are in the same shard: written in one go
    const char *dtype;      // in DST
    int order;
    uint64_t at, bytes;     // place in DST's file
    uint64_t scale_at;      // INT4, INT8, together: the scale's place
} Item;

typedef struct {
    const char *from;       // SRC/NAME
    const char *name;       // in from
    char *path, *part;      // DST/NAME, DST/NAME.part
    Item *items;            // [n] in the order of the file
    size_t n, cap;
    char *header;           // the file's first bytes
    size_t header_size;
    uint64_t size;          // of the file
    bool done;              // complete from an earlier run
    int in, out;            // while it is worked on
    int pending;            // pieces handed out and not finished, and 1 while more will come
} Shard;

typedef struct {
    const Dsv4Convert *o;
    Dsv4Config config;
    Dsv4Store *store;
    Tables *tables;
    Shard *files;            // [n_files], one per source shard; n = 0: dropped
    int n_files;
    int *new_layer;         // [n_layers] number in DST, -1: dropped; NULL without --layer-remap
    int *kept;              // [n_kept] the source layers in their new order
    int n_kept;
    uint64_t tensor_bytes;  // the true total_size
    size_t converted;
    char *identity;         // what the manifest says
    // the work, under lock
    pthread_mutex_t lock;
    int file;               // where the next piece comes from
    size_t item;
    uint64_t piece;
    bool checking;          // --verify: compare instead of write
    atomic_bool failed;
    Dsv4Error *error;
    uint64_t total, did, before;    // bytes of DST; before: from earlier runs
    double start, shown;
    bool terminal;
} Job;

// The digits of a number at p[0..n), as far as they go; -1 if there are none or too many.
static int number_at(const char *p, size_t n, size_t *used) {
    int v = 0;
    size_t i = 0;
    for (; i < n && p[i] >= '0' && p[i] <= '9' && i < 6; i++) v = 10 * v + p[i] - '0';
    *used = i;
    return i ? v : -1;
}

// "layers.12.attn..." -> 12 and what is left; -1: not a layer's ("mtp." layers keep their numbers).
static int layer_of(Dsv4Text name, Dsv4Text *rest) {
    size_t at = 7, used = 0;
    if (name.n < 8 || memcmp(name.p, "layers.", 7)) return -1;
    int i = number_at(name.p + at, name.n - at, &used);
    at += used;
    if (i < 0 || at >= name.n || name.p[at] != '.') return -1;
    *rest = (Dsv4Text){ name.p + at + 1, name.n - at - 1 };
    return i;
}

// INT4 or INT8 if tensors of this name are converted (spec 8), else COPY. *base: the name without
// its last part.
static Rule rule_of(Dsv4Text name, Dsv4Text *base, bool *is_scale) {
    static const char *const dense[] = {
        "attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b", "attn.indexer.wq_b",
        "ffn.shared_experts.w1", "ffn.shared_experts.w2", "ffn.shared_experts.w3",
    };
    Dsv4Text rest = { 0 };
    size_t used = 0;
    *is_scale = name.n > 6 && !memcmp(name.p + name.n - 6, ".scale", 6);
    size_t tail = *is_scale ? 6 : 7;
    if (!*is_scale && (name.n < 8 || memcmp(name.p + name.n - 7, ".weight", 7))) return COPY;
    *base = (Dsv4Text){ name.p, name.n - tail };
    if (layer_of(*base, &rest) < 0) {
        if (base->n < 6 || memcmp(base->p, "mtp.", 4)) return COPY;
        if (number_at(base->p + 4, base->n - 4, &used) < 0 || base->p[4 + used] != '.') return COPY;
        rest = (Dsv4Text){ base->p + 5 + used, base->n - 5 - used };
    }
    for (size_t i = 0; i < sizeof dense / sizeof *dense; i++)
        if (text_is(rest, dense[i])) return INT8;
    if (rest.n < 16 || memcmp(rest.p, "ffn.experts.", 12)) return COPY;
    if (number_at(rest.p + 12, rest.n - 12, &used) < 0) return COPY;
    Dsv4Text last = { rest.p + 12 + used, rest.n - 12 - used };
    return text_is(last, ".w1") || text_is(last, ".w2") || text_is(last, ".w3") ? INT4 : COPY;
}

// Checks that weight and scale are what the release has; *rule becomes COPY for weights in a format
// that needs no scale.
static bool check_pair(Dsv4Tensor w, const Dsv4Tensor *s, Rule *rule, Dsv4Error *e) {
    const char *want = *rule == INT4 ? "I8" : "F8_E4M3";
    if (!strcmp(w.dtype, "BF16") || !strcmp(w.dtype, "F32")) return *rule = COPY, true;
    if (!s) return fail(e, "tensor %.*s: its scale is missing", (int)w.name.n, w.name.p);
    bool ok = !strcmp(w.dtype, want) && !strcmp(s->dtype, "F8_E8M0") && w.rank == 2 && s->rank == 2;
    int64_t n = ok ? w.shape[0] : 0, k = ok ? w.shape[1] : 0;
    if (*rule == INT4) ok = ok && k % 16 == 0 && s->shape[0] == n && s->shape[1] == k / 16;
    else ok = ok && s->shape[0] == divide_up(n, 128) && s->shape[1] == divide_up(k, 128);
    return ok || fail(e, "tensor %.*s: %s with a scale of %s: not the original release's %s",
                      (int)w.name.n, w.name.p, w.dtype, s->dtype,
                      *rule == INT4 ? "FP4 (I8 [N, K/2] and F8_E8M0 [N, K/32])"
                                    : "FP8 (F8_E4M3 [N, K] and F8_E8M0 per 128 x 128)");
}

// Decides about one source tensor.
static bool plan_item(Job *job, size_t i, Item *it, Dsv4Error *e) {
    Dsv4Text base = { 0 };
    bool is_scale;
    *it = (Item){ .t = dsv4_store_tensor(job->store, i), .index = i };
    Rule rule = rule_of(it->t.name, &base, &is_scale);
    if (rule != COPY) {
        char *other = text_of("%.*s.%s", (int)base.n, base.p, is_scale ? "weight" : "scale");
        size_t at = dsv4_store_find(job->store, (Dsv4Text){ other, strlen(other) });
        free(other);
        if (at != SIZE_MAX) it->pair = dsv4_store_tensor(job->store, at);
        it->pair_index = at;
        if (is_scale && at == SIZE_MAX)
            return fail(e, "tensor %.*s: its weight is missing", (int)it->t.name.n, it->t.name.p);
        Dsv4Tensor w = is_scale ? it->pair : it->t, *s = is_scale ? &it->t : &it->pair;
        if (!check_pair(w, at == SIZE_MAX ? NULL : s, &rule, e)) return false;
    }
    it->rule = rule == COPY ? COPY : (Rule)(rule + is_scale);
    it->together = rule != COPY && it->pair.shard == it->t.shard;
    it->dtype = rule == COPY ? it->t.dtype : !is_scale ? "I8" : job->tables->f16 ? "F16" : "BF16";
    it->order = dsv4_dtype_order(it->dtype);
    it->bytes = rule != COPY && is_scale ? 2 * it->t.bytes : it->t.bytes;
    return true;
}

// The new name; false: the tensor is dropped.
static bool plan_name(const Job *job, Item *it) {
    Dsv4Text rest = { 0 };
    it->name = it->t.name;
    int i = job->new_layer ? layer_of(it->name, &rest) : -1;
    if (i < 0) return true;
    if (i >= job->config.n_layers || job->new_layer[i] < 0) return false;
    char *name = text_of("layers.%d.%.*s", job->new_layer[i], (int)rest.n, rest.p);
    it->name = (Dsv4Text){ name, strlen(name) };
    return true;
}

// The order of safetensors' own writer: wide dtypes first (its list backwards), then by name.
static int by_file_order(const void *a, const void *b) {
    const Item *x = a, *y = b;
    if (x->order != y->order) return x->order > y->order ? -1 : 1;
    size_t n = x->name.n < y->name.n ? x->name.n : y->name.n;
    int c = memcmp(x->name.p, y->name.p, n);
    return c ? c : (x->name.n > y->name.n) - (x->name.n < y->name.n);
}

static void put_string(FILE *f, Dsv4Text s) {
    fputc('"', f);
    for (size_t i = 0; i < s.n; i++) {
        unsigned char c = (unsigned char)s.p[i];
        if (c == '"' || c == '\\') fprintf(f, "\\%c", c);
        else if (c < 32) fprintf(f, "\\u%04x", c);
        else fputc(c, f);
    }
    fputc('"', f);
}

// Sorts the items, gives each its place, writes the header's text.
static void plan_layout(Shard *file, Dsv4Text metadata) {
    size_t n;
    uint64_t at = 0;
    FILE *f = need(open_memstream(&file->header, &n));
    if (file->n) qsort(file->items, file->n, sizeof *file->items, by_file_order);
    fwrite("\0\0\0\0\0\0\0\0{", 1, 9, f);
    if (metadata.n) fprintf(f, "\"__metadata__\":%.*s", (int)metadata.n, metadata.p);
    for (size_t i = 0; i < file->n; i++) {
        Item *it = &file->items[i];
        if (i || metadata.n) fputc(',', f);
        put_string(f, it->name);
        fprintf(f, ":{\"dtype\":\"%s\",\"shape\":[", it->dtype);
        for (int d = 0; d < it->t.rank; d++)
            fprintf(f, "%s%lld", d ? "," : "", (long long)it->t.shape[d]);
        fprintf(f, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)at,
                (unsigned long long)(at + it->bytes));
        it->at = at;
        at += it->bytes;
    }
    fputc('}', f);
    while (ftell(f) % 8) fputc(' ', f);
    if (fclose(f)) need(NULL);
    for (int i = 0; i < 8; i++) file->header[i] = (char)((uint64_t)(n - 8) >> 8 * i);
    file->header_size = n;
    file->size = n + at;
    for (size_t i = 0; i < file->n; i++) file->items[i].at += n;
}

static bool plan(Job *job, Dsv4Error *e) {
    job->n_files = dsv4_store_shards(job->store);
    job->files = need(calloc((size_t)job->n_files, sizeof *job->files));
    size_t n = dsv4_store_tensors(job->store);
    uint64_t *place = need(calloc(n + 1, sizeof *place));       // where each tensor lies in DST
    for (size_t i = 0; i < n; i++) {
        Item it;
        if (!plan_item(job, i, &it, e)) return free(place), false;
        if (!plan_name(job, &it)) continue;
        job->converted += it.rule == INT4 || it.rule == INT8;
        Shard *file = &job->files[it.t.shard];
        if (file->n == file->cap) {
            file->cap = 2 * file->cap + 64;
            file->items = need(realloc(file->items, file->cap * sizeof *file->items));
        }
        file->items[file->n++] = it;
        job->tensor_bytes += it.bytes;
    }
    for (int i = 0; i < job->n_files; i++) {
        Shard *file = &job->files[i];
        Dsv4Text metadata;
        file->in = file->out = -1;
        file->from = dsv4_store_shard(job->store, i, &metadata);
        file->name = strrchr(file->from, '/') + 1;
        file->path = text_of("%s/%s", job->o->dst, file->name);
        file->part = text_of("%s.part", file->path);
        plan_layout(file, metadata);
        for (size_t k = 0; k < file->n; k++) place[file->items[k].index] = file->items[k].at;
        for (size_t k = 0; k < file->n; k++)
            if (file->items[k].together) file->items[k].scale_at = place[file->items[k].pair_index];
    }
    free(place);
    return job->converted || fail(e, "%s: nothing to convert here: not the original release?",
                                  job->o->src);
}

// ---------------------------------------------------------------------------
// the work: pieces of at most 1 MiB, handed out in file order

enum { PIECE = 1 << 20, TILE = PIECE / 128 };       // TILE: columns of an FP8 band of 128 rows

typedef struct {
    Shard *file;
    const Item *it;         // NULL: the file is complete, finish it
    uint64_t number;        // which piece of the item
} Piece;

typedef struct {
    Job *job;
    pthread_t thread;
    uint8_t *in, *out, *check;      // [PIECE]
    uint8_t *scale_in;              // [PIECE / 16]
    uint16_t *scale_out;            // [PIECE / 16]
    uint64_t bytes;                 // of DST, in this piece
    Dsv4Error error;
} Worker;

static uint64_t pieces_of(const Item *it) {
    const Dsv4Tensor *w = it->rule == INT4_SCALE || it->rule == INT8_SCALE ? &it->pair : &it->t;
    if (!w->bytes || (w == &it->pair && it->together)) return 0;
    if (it->rule == INT8 || it->rule == INT8_SCALE)
        return (uint64_t)(divide_up(w->shape[0], 128) * divide_up(w->shape[1], TILE));
    return (uint64_t)divide_up((int64_t)w->bytes, PIECE);
}

static bool read_fd(int fd, const char *path, uint64_t at, void *to, size_t n, Dsv4Error *e) {
    for (size_t got = 0; got < n;) {
        ssize_t k = pread(fd, (char *)to + got, n - got, (off_t)(at + got));
        if (k < 0 && errno == EINTR) continue;
        if (k < 0) return fail(e, "%s: read error at byte %llu: %s", path,
                               (unsigned long long)(at + got), strerror(errno));
        if (!k) return fail(e, "%s: file ends at byte %llu, its header promises more", path,
                            (unsigned long long)(at + got));
        got += (size_t)k;
    }
    return true;
}

static bool write_fd(int fd, const char *path, uint64_t at, const void *from, size_t n,
                     Dsv4Error *e) {
    for (size_t put = 0; put < n;) {
        ssize_t k = pwrite(fd, (const char *)from + put, n - put, (off_t)(at + put));
        if (k < 0 && errno == EINTR) continue;
        if (k < 0) return fail(e, "%s: write error: %s (the same command goes on from here)", path,
                               strerror(errno));
        put += (size_t)k;
    }
    return true;
}

// Reads part of a source tensor; of the shard at hand, or of another one (a pair that was split).
static bool fetch(Worker *w, const Piece *p, const Dsv4Tensor *t, uint64_t from, void *to,
                  size_t n) {
    const char *path = w->job->files[t->shard].from;
    bool here = t->shard == p->it->t.shard;
    int fd = here ? p->file->in : open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return fail(&w->error, "%s: %s", path, strerror(errno));
    bool ok = read_fd(fd, path, t->at + from, to, n, &w->error);
    if (!here) close(fd);
    return ok;
}

// Writes bytes of the new file, or (--verify) compares them with what is there.
static bool emit(Worker *w, const Piece *p, uint64_t at, const void *bytes, size_t n) {
    w->bytes += n;
    if (!w->job->checking) {
        if (!write_fd(p->file->out, p->file->part, at, bytes, n, &w->error)) return false;
        // the disk writes while we convert, so that the final sync has little left to do
        sync_file_range(p->file->out, (off_t)at, (off_t)n, SYNC_FILE_RANGE_WRITE);
        return true;
    }
    if (!read_fd(p->file->out, p->file->path, at, w->check, n, &w->error)) return false;
    if (!memcmp(w->check, bytes, n)) return true;
    size_t i = 0;
    while (w->check[i] == ((const uint8_t *)bytes)[i]) i++;
    return fail(&w->error, "%s: byte %llu (tensor %.*s): expected 0x%02x, found 0x%02x",
                p->file->path, (unsigned long long)(at + i), (int)p->it->name.n, p->it->name.p,
                ((const uint8_t *)bytes)[i], w->check[i]);
}

static bool not_finite(Worker *w, const Piece *p, int64_t row, int64_t column, int scale) {
    return fail(&w->error, "%s: tensor %.*s: the block at [%lld, %lld] (scale byte 0x%02x) is not "
                "finite%s: download again", p->file->from, (int)p->it->t.name.n, p->it->t.name.p,
                (long long)row, (long long)column, scale,
                w->job->tables->f16 ? " or too large for F16" : "");
}

static bool do_copy(Worker *w, const Piece *p) {
    uint64_t from = p->number * PIECE, left = p->it->bytes - from;
    size_t n = left < PIECE ? left : PIECE;
    return fetch(w, p, &p->it->t, from, w->in, n) && emit(w, p, p->it->at + from, w->in, n);
}

// Groups of 32: 16 bytes and one scale, both in one run through the tensor.
static bool do_int4(Worker *w, const Piece *p) {
    bool only_scale = p->it->rule == INT4_SCALE;
    const Dsv4Tensor *t = only_scale ? &p->it->pair : &p->it->t;
    const Dsv4Tensor *s = only_scale ? &p->it->t : &p->it->pair;
    uint64_t from = p->number * (PIECE / 16), left = s->bytes - from;
    size_t n = left < PIECE / 16 ? left : PIECE / 16;
    if (!fetch(w, p, t, 16 * from, w->in, 16 * n) || !fetch(w, p, s, from, w->scale_in, n))
        return false;
    fp4_groups(w->job->tables, w->in, w->scale_in, n, w->out, w->scale_out);
    for (size_t i = 0; i < n; i++)
        if (w->scale_out[i] == SCALE_BAD) {
            int64_t group = (int64_t)(from + i), row = s->shape[1];
            return not_finite(w, p, group / row, group % row * 32, w->scale_in[i]);
        }
    if (only_scale) return emit(w, p, p->it->at + 2 * from, w->scale_out, 2 * n);
    return emit(w, p, p->it->at + 16 * from, w->out, 16 * n) &&
           (!p->it->together || emit(w, p, p->it->scale_at + 2 * from, w->scale_out, 2 * n));
}

// A band of 128 rows, or TILE columns of it.
static bool do_int8(Worker *w, const Piece *p) {
    bool only_scale = p->it->rule == INT8_SCALE;
    const Dsv4Tensor *t = only_scale ? &p->it->pair : &p->it->t;
    const Dsv4Tensor *s = only_scale ? &p->it->t : &p->it->pair;
    int64_t N = t->shape[0], K = t->shape[1], tiles = divide_up(K, TILE);
    int64_t row0 = (int64_t)p->number / tiles * 128, col0 = (int64_t)p->number % tiles * TILE;
    int rows = N - row0 < 128 ? (int)(N - row0) : 128;
    size_t cols = K - col0 < TILE ? (size_t)(K - col0) : TILE, blocks = (cols + 127) / 128;
    size_t run = (int64_t)cols == K ? (size_t)rows : 1;         // rows that lie together
    uint64_t at = (uint64_t)(row0 * K + col0);                  // of the piece in the tensor
    uint64_t grid = (uint64_t)(row0 / 128 * divide_up(K, 128) + col0 / 128);   // of its scales
    for (size_t r = 0; r < (size_t)rows; r += run)
        if (!fetch(w, p, t, at + r * (uint64_t)K, w->in + r * cols, run * cols)) return false;
    if (!fetch(w, p, s, grid, w->scale_in, blocks)) return false;
    for (size_t b = 0; b < blocks; b++) {
        int8_t map[128];
        const uint8_t *in = w->in + 128 * b;
        int width = cols - 128 * b < 128 ? (int)(cols - 128 * b) : 128;
        int top = fp8_max(in, cols, rows, width);
        w->scale_out[b] = table8(w->scale_in[b], top, w->job->tables->f16, map);
        if (w->scale_out[b] == SCALE_BAD)
            return not_finite(w, p, row0, col0 + 128 * (int64_t)b, w->scale_in[b]);
        for (int r = 0; r < rows; r++)
            fp8_row(map, in + (size_t)r * cols, w->out + 128 * b + (size_t)r * cols, width);
    }
    if (only_scale) return emit(w, p, p->it->at + 2 * grid, w->scale_out, 2 * blocks);
    for (size_t r = 0; r < (size_t)rows; r += run)
        if (!emit(w, p, p->it->at + at + r * (uint64_t)K, w->out + r * cols, run * cols))
            return false;
    return !p->it->together || emit(w, p, p->it->scale_at + 2 * grid, w->scale_out, 2 * blocks);
}

static bool sync_directory(const char *path, Dsv4Error *e) {
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool ok = fd >= 0 && (!fsync(fd) || errno == EINVAL);
    if (!ok) fail(e, "%s: cannot sync: %s", path, strerror(errno));
    if (fd >= 0) close(fd);
    return ok;
}

static bool same_header(const Shard *file, int fd, const char *path, Dsv4Error *e) {
    struct stat st;
    if (fstat(fd, &st)) return fail(e, "%s: %s", path, strerror(errno));
    if ((uint64_t)st.st_size != file->size)
        return fail(e, "%s: file has %lld bytes, expected %llu", path, (long long)st.st_size,
                    (unsigned long long)file->size);
    char *found = need(malloc(file->header_size));
    bool ok = read_fd(fd, path, 0, found, file->header_size, e);
    if (ok && memcmp(found, file->header, file->header_size))
        ok = fail(e, "%s: its header is not what converting the source gives", path);
    free(found);
    return ok;
}

static bool open_file(const Job *job, Shard *file, Dsv4Error *e) {
    file->pending = 1;
    file->in = open(file->from, O_RDONLY | O_CLOEXEC);
    if (file->in < 0) return fail(e, "%s: %s", file->from, strerror(errno));
    if (!job->checking) {
        file->out = open(file->part, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
        if (file->out < 0) return fail(e, "%s: %s", file->part, strerror(errno));
        return write_fd(file->out, file->part, 0, file->header, file->header_size, e);
    }
    file->out = open(file->path, O_RDONLY | O_CLOEXEC);
    if (file->out < 0) return fail(e, "%s: %s", file->path, strerror(errno));
    posix_fadvise(file->out, 0, 0, POSIX_FADV_DONTNEED);    // see what the disk holds
    return same_header(file, file->out, file->path, e);
}

static bool finish_file(const Job *job, Shard *file, Dsv4Error *e) {
    bool ok = job->checking || !fsync(file->out);
    if (!ok) fail(e, "%s: cannot sync: %s", file->part, strerror(errno));
    close(file->in);
    close(file->out);
    file->in = file->out = -1;
    if (!ok || job->checking) return ok;
    if (rename(file->part, file->path))
        return fail(e, "%s: cannot rename to %s: %s", file->part, file->name, strerror(errno));
    return sync_directory(job->o->dst, e);
}

// Keeps the first error; the other threads stop at their next piece. Holds the lock.
static void job_fail(Job *job, const Dsv4Error *e) {
    if (!job->failed) *job->error = *e;
    job->failed = true;
}

// The next piece, or the word to finish a file. False: nothing left to do. Holds the lock.
static bool next_piece(Job *job, Piece *p) {
    Dsv4Error e;
    while (!job->failed && job->file < job->n_files) {
        Shard *file = &job->files[job->file];
        bool skip = !file->n || (file->done && !job->checking);
        if (!skip && file->out < 0 && !open_file(job, file, &e)) {
            job_fail(job, &e);
            return false;
        }
        while (!skip && job->item < file->n && job->piece == pieces_of(&file->items[job->item])) {
            job->item++;
            job->piece = 0;
        }
        if (!skip && job->item < file->n) {
            *p = (Piece){ file, &file->items[job->item], job->piece++ };
            file->pending++;
            return true;
        }
        job->file++;
        job->item = 0;
        job->piece = 0;
        *p = (Piece){ file, NULL, 0 };
        if (!skip && --file->pending == 0) return true;
    }
    return false;
}

// On a terminal a line that overwrites itself, elsewhere a line per shard. Holds the lock.
static void show_progress(Job *job, const Shard *finished) {
    double t = seconds(), rate = (double)(job->did - job->before) / (t - job->start + 1e-9);
    bool terminal = job->terminal;
    if (terminal ? !finished && t - job->shown < 0.2 : !finished) return;
    job->shown = t;
    double left = rate > 0 ? (double)(job->total - job->did) / rate : 0;
    const char *what = job->checking ? "checked" : "converted";
    fprintf(stderr, "%s# %s %.2f of %.2f GB, %.0f MB/s, %d:%02d min left%s%s%s",
            terminal ? "\r" : "", what, (double)job->did / 1e9, (double)job->total / 1e9,
            rate / 1e6, (int)left / 60, (int)left % 60, finished ? ": " : "",
            finished ? finished->name : "", terminal ? "\033[K" : "\n");
    if (terminal && job->did == job->total) fputc('\n', stderr);
}

static bool do_piece(Worker *w, const Piece *p) {
    if (!p->it) return finish_file(w->job, p->file, &w->error);
    switch (p->it->rule) {
    case COPY: return do_copy(w, p);
    case INT4: case INT4_SCALE: return do_int4(w, p);
    default: return do_int8(w, p);
    }
}

static void *work(void *arg) {
    Worker *w = arg;
    Job *job = w->job;
    Piece p;
    pthread_mutex_lock(&job->lock);
    while (next_piece(job, &p))
        for (bool again = true; again; p.it = NULL) {
            pthread_mutex_unlock(&job->lock);
            w->bytes = p.it ? 0 : p.file->header_size;
            bool ok = do_piece(w, &p);
            pthread_mutex_lock(&job->lock);
            job->did += w->bytes;
            if (!ok) job_fail(job, &w->error);
            else show_progress(job, p.it ? NULL : p.file);
            again = p.it && --p.file->pending == 0 && !job->failed;     // the last: finish the file
        }
    pthread_mutex_unlock(&job->lock);
    return NULL;
}

// Converts (or checks) all shards.
static bool run(Job *job, bool checking, Dsv4Error *e) {
    int n = job->o->threads ? job->o->threads : (int)sysconf(_SC_NPROCESSORS_ONLN);
    if (n < 1) n = 1;
    job->checking = checking;
    job->file = 0;
    job->did = job->before = 0;
    job->error = e;
    job->terminal = isatty(2);
    for (int i = 0; i < job->n_files && !checking; i++)
        if (job->files[i].done) job->before += job->files[i].size;
    job->did = job->before;
    job->start = seconds();
    Worker *workers = need(calloc((size_t)n, sizeof *workers));
    int started = 0;
    for (; started < n; started++) {
        Worker *w = &workers[started];
        w->job = job;
        w->in = need(malloc(3 * (size_t)PIECE));
        w->out = w->in + PIECE;
        w->check = w->out + PIECE;
        w->scale_in = need(malloc(PIECE / 16));
        w->scale_out = need(malloc(PIECE / 16 * sizeof *w->scale_out));
        if (pthread_create(&w->thread, NULL, work, w)) break;
    }
    if (!started) work(&workers[0]);
    for (int i = 0; i < started; i++) pthread_join(workers[i].thread, NULL);
    for (int i = 0; i < n; i++) {
        free(workers[i].in);
        free(workers[i].scale_in);
        free(workers[i].scale_out);
    }
    free(workers);
    for (int i = 0; i < job->n_files; i++) {
        Shard *file = &job->files[i];
        if (file->in >= 0) close(file->in);
        if (file->out >= 0) close(file->out);
        if (file->out >= 0 && !checking) unlink(file->part);
        file->in = file->out = -1;
    }
    return !job->failed;
}

// ---------------------------------------------------------------------------
// config.json and the index, as Python's json.dump(indent=2) writes them

static const char quant_config[] =
    "{\"quant_method\":\"dsv4_int\",\"format\":\"int_packed\",\"config_groups\":{"
    "\"experts_w4a16\":{\"weights\":{\"num_bits\":4,\"type\":\"int\",\"symmetric\":true,"
    "\"group_size\":32,\"strategy\":\"group\"},\"input_activations\":{\"num_bits\":16,"
    "\"type\":\"float\"},\"targets\":[\"*.ffn.experts.*.w1\",\"*.ffn.experts.*.w2\","
    "\"*.ffn.experts.*.w3\"]},"
    "\"attention_w8a16\":{\"weights\":{\"num_bits\":8,\"type\":\"int\",\"symmetric\":true,"
    "\"block_size\":[128,128],\"strategy\":\"block\"},\"input_activations\":{\"num_bits\":16,"
    "\"type\":\"float\"},\"targets\":[\"*.attn.wq_a\",\"*.attn.wq_b\",\"*.attn.wkv\","
    "\"*.attn.wo_a\",\"*.attn.wo_b\",\"*.ffn.shared_experts.w1\",\"*.ffn.shared_experts.w2\","
    "\"*.ffn.shared_experts.w3\"]}},"
    "\"ignore\":[\"embed\",\"head\",\"norm\",\"lm_head\",\"*norm.weight\",\"attn.attn_sink\","
    "\"*.gate.*\",\"hc_*\",\"*.hc_attn_*\",\"*.hc_ffn_*\"]}";

// Which object is being rewritten; PLAIN: as it is.
typedef enum { PLAIN, CONFIG, INDEX, METADATA, WEIGHT_MAP } Place;

typedef struct {
    const Job *job;
    FILE *f;
    Place place;
    int depth, n;           // n: members written
    bool seen[2];           // CONFIG: expert_dtype, quantization_config; INDEX: metadata
} Writer;

static bool write_value(Writer *outer, Place place, Dsv4Text value, Dsv4Error *e);

static void write_key(Writer *w, Dsv4Text key) {
    fprintf(w->f, "%s\n%*s", w->n++ ? "," : "", 2 * w->depth, "");
    if (!key.p) return;
    put_string(w->f, key);
    fputs(": ", w->f);
}

static void write_text(Writer *w, const char *key, const char *json) {
    Dsv4Error e;
    write_key(w, (Dsv4Text){ key, strlen(key) });
    write_value(w, PLAIN, (Dsv4Text){ json, strlen(json) }, &e);
}

typedef struct { int value[4096], n; } Ints;
static bool read_int(void *arg, Dsv4Text key, Dsv4Text value, Dsv4Error *e) {
    Ints *list = arg;
    size_t used;
    (void)key, (void)e;
    if (list->n < 4096) list->value[list->n++] = number_at(value.p, value.n, &used);
    return true;
}

// compress_ratios of the layers that are kept, then those of the MTP layers.
static bool write_ratios(Writer *w, Dsv4Text value, Dsv4Error *e) {
    const Job *job = w->job;
    Ints *list = need(calloc(1, sizeof *list));
    char *json;
    size_t n;
    bool ok = dsv4_json_each(value, "compress_ratios", read_int, list, e);
    FILE *f = need(open_memstream(&json, &n));
    for (int i = 0; i < job->n_kept; i++)
        fprintf(f, "%c%d", i ? ',' : '[', list->value[job->kept[i]]);
    for (int i = job->config.n_layers; i < list->n; i++) fprintf(f, ",%d", list->value[i]);
    fputc(']', f);
    if (fclose(f)) need(NULL);
    if (ok) write_text(w, "compress_ratios", json);
    free(json);
    free(list);
    return ok;
}

static bool write_config_member(Writer *w, Dsv4Text key, Dsv4Text value, Dsv4Error *e) {
    const Job *job = w->job;
    char number[16];
    int hashed = 0;
    if (text_is(key, "expert_dtype")) {
        w->seen[0] = true;
        write_text(w, "expert_dtype", "\"int4\"");
    } else if (text_is(key, "quantization_config")) {
        w->seen[1] = true;
        write_text(w, "quantization_config", quant_config);
    } else if (job->kept && text_is(key, "num_hidden_layers")) {
        snprintf(number, sizeof number, "%d", job->n_kept);
        write_text(w, "num_hidden_layers", number);
    } else if (job->kept && text_is(key, "num_hash_layers")) {
        while (hashed < job->n_kept && job->kept[hashed] < job->config.n_hash_layers) hashed++;
        snprintf(number, sizeof number, "%d", hashed);
        write_text(w, "num_hash_layers", number);
    } else if (job->kept && text_is(key, "compress_ratios")) {
        return write_ratios(w, value, e);
    } else {
        write_key(w, key);
        return write_value(w, PLAIN, value, e);
    }
    return true;
}

static bool write_index_entry(Writer *w, Dsv4Text key, Dsv4Text value, Dsv4Error *e) {
    Item it = { .t = { .name = key } };
    if (!plan_name(w->job, &it)) return true;
    write_key(w, it.name);
    if (it.name.p != key.p) free((void *)(uintptr_t)it.name.p);
    return write_value(w, PLAIN, value, e);
}

static bool write_member(void *arg, Dsv4Text key, Dsv4Text value, Dsv4Error *e) {
    Writer *w = arg;
    Place place = PLAIN;
    if (w->place == CONFIG) return write_config_member(w, key, value, e);
    if (w->place == WEIGHT_MAP) return write_index_entry(w, key, value, e);
    if (w->place == METADATA && text_is(key, "total_size")) return true;     // written at the end
    if (w->place == INDEX && text_is(key, "metadata")) place = METADATA, w->seen[0] = true;
    if (w->place == INDEX && text_is(key, "weight_map")) place = WEIGHT_MAP;
    write_key(w, key);
    return write_value(w, place, value, e);
}

static bool write_value(Writer *outer, Place place, Dsv4Text value, Dsv4Error *e) {
    bool object = value.p[0] == '{', array = value.p[0] == '[';
    if (!object && !array) return fwrite(value.p, 1, value.n, outer->f) == value.n;
    Writer w = { .job = outer->job, .f = outer->f, .place = place, .depth = outer->depth + 1 };
    char size[32], metadata[64];
    snprintf(size, sizeof size, "%llu", (unsigned long long)w.job->tensor_bytes);
    snprintf(metadata, sizeof metadata, "{\"total_size\":%s}", size);
    fputc(object ? '{' : '[', w.f);
    if (!dsv4_json_each(value, place == CONFIG ? "config.json" : "the index", write_member, &w, e))
        return false;
    if (place == CONFIG && !w.seen[0]) write_text(&w, "expert_dtype", "\"int4\"");
    if (place == CONFIG && !w.seen[1]) write_text(&w, "quantization_config", quant_config);
    if (place == INDEX && !w.seen[0]) write_text(&w, "metadata", metadata);
    if (place == METADATA) write_text(&w, "total_size", size);
    if (w.n) fprintf(w.f, "\n%*s", 2 * outer->depth, "");
    fputc(object ? '}' : ']', w.f);
    return true;
}

// The text of DST/NAME from SRC/NAME; NULL on an error. Free it.
static char *rewrite(const Job *job, const char *name, Place place, size_t *n, Dsv4Error *e) {
    char *path = text_of("%s/%s", job->o->src, name), *out;
    Dsv4Text text;
    Writer w = { .job = job, .f = need(open_memstream(&out, n)), .depth = 0 };
    bool ok = dsv4_map(path, &text, e);
    while (ok && text.n && strchr(" \t\r\n", *text.p)) text.p++, text.n--;
    if (ok && (!text.n || *text.p != '{')) ok = fail(e, "%s: not a JSON object", path);
    ok = ok && write_value(&w, place, text, e);
    if (fclose(w.f)) need(NULL);
    free(path);
    if (!ok) {
        free(out);
        return NULL;
    }
    return out;
}

// ---------------------------------------------------------------------------
// the directory DST: what it may hold before, and what comes into it besides the shards

// What the work belongs to: options, and every source file by name, size and time.
static char *identity(const Job *job, Dsv4Error *e) {
    char *text;
    size_t n;
    bool ok = true;
    FILE *f = need(open_memstream(&text, &n));
    fprintf(f, "dsv4 convert 1, scales %s, layers %s\n", job->tables->f16 ? "f16" : "bf16",
            job->o->layer_remap ? job->o->layer_remap : "all");
    for (int i = -1; i < job->n_files && ok; i++) {
        struct stat st;
        char *config = text_of("%s/config.json", job->o->src);
        const char *path = i < 0 ? config : job->files[i].from;
        ok = !stat(path, &st) || fail(e, "%s: %s", path, strerror(errno));
        if (ok) fprintf(f, "%s %lld %lld.%09ld\n", strrchr(path, '/') + 1, (long long)st.st_size,
                        (long long)st.st_mtim.tv_sec, st.st_mtim.tv_nsec);
        free(config);
    }
    if (fclose(f)) need(NULL);
    if (ok) return text;
    free(text);
    return NULL;
}

// Writes DST/NAME whole or not at all.
static bool write_whole(const char *dst, const char *name, const char *text, size_t n,
                        Dsv4Error *e) {
    char *path = text_of("%s/%s", dst, name), *part = text_of("%s.part", path);
    int fd = open(part, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    bool ok = fd >= 0 || fail(e, "%s: %s", part, strerror(errno));
    ok = ok && write_fd(fd, part, 0, text, n, e);
    if (ok && fsync(fd)) ok = fail(e, "%s: cannot sync: %s", part, strerror(errno));
    if (fd >= 0) close(fd);
    if (ok && rename(part, path)) ok = fail(e, "%s: %s", path, strerror(errno));
    if (!ok) unlink(part);
    free(path);
    free(part);
    return ok && sync_directory(dst, e);
}

static bool has_suffix(const char *s, const char *end) {
    size_t n = strlen(s), m = strlen(end);
    return n >= m && !strcmp(s + n - m, end);
}

// Copies what is neither weights nor rewritten, folders too; hidden entries stay behind.
static bool carry_over(const char *src, const char *dst, int depth, Dsv4Error *e) {
    DIR *dir = opendir(src);
    if (!dir) return fail(e, "%s: %s", src, strerror(errno));
    bool ok = true;
    for (struct dirent *d; ok && (d = readdir(dir));) {
        const char *name = d->d_name;
        bool rewritten = !depth && (has_suffix(name, ".safetensors") ||
                                    !strcmp(name, "model.safetensors.index.json") ||
                                    !strcmp(name, "config.json"));
        if (name[0] == '.' || rewritten) continue;
        char *from = text_of("%s/%s", src, name), *to = text_of("%s/%s", dst, name);
        struct stat st, link;
        Dsv4Text text;
        if (stat(from, &st) || lstat(from, &link)) ok = fail(e, "%s: %s", from, strerror(errno));
        else if (S_ISDIR(link.st_mode) && depth < 8) {
            ok = !mkdir(to, 0777) || errno == EEXIST || fail(e, "%s: %s", to, strerror(errno));
            ok = ok && carry_over(from, to, depth + 1, e);
        } else if (S_ISREG(st.st_mode)) {
            ok = dsv4_map(from, &text, e) && write_whole(dst, name, text.p, text.n, e);
        }
        free(from);
        free(to);
    }
    closedir(dir);
    return ok;
}

// True if path, or a directory above it, is the directory `of`.
static bool lies_inside(const char *path, const struct stat *of) {
    struct stat st, last = { 0 };
    char *up = text_of("%s", path);
    while (stat(up, &st)) {             // the nearest part of the path that exists
        char *slash = strrchr(up, '/');
        if (slash && slash != up) *slash = 0;
        else strcpy(up, slash ? "/" : ".");
    }
    bool inside = false;
    for (; !stat(up, &st) && !inside && (st.st_dev != last.st_dev || st.st_ino != last.st_ino);
         last = st) {
        inside = st.st_dev == of->st_dev && st.st_ino == of->st_ino;
        char *next = text_of("%s/..", up);
        free(up);
        up = next;
    }
    free(up);
    return inside;
}

// Looks at DST without changing it. *fresh: it must still be made or is empty; *complete: an
// earlier conversion ended there.
static bool inspect(const Job *job, bool *fresh, bool *complete, Dsv4Error *e) {
    const char *dst = job->o->dst;
    struct stat a, b;
    char foreign[256] = "";
    bool manifest = false, config = false;
    *fresh = *complete = false;
    if (stat(job->o->src, &a)) return fail(e, "%s: %s", job->o->src, strerror(errno));
    if (lies_inside(dst, &a))
        return fail(e, "%s: is the source or lies inside it: give another directory", dst);
    if (stat(dst, &b)) {
        *fresh = errno == ENOENT;
        return *fresh || fail(e, "%s: %s", dst, strerror(errno));
    }
    if (!S_ISDIR(b.st_mode)) return fail(e, "%s: is not a directory", dst);
    DIR *dir = opendir(dst);
    if (!dir) return fail(e, "%s: %s", dst, strerror(errno));
    for (struct dirent *d; (d = readdir(dir));) {
        if (!strcmp(d->d_name, MANIFEST)) manifest = true;
        else if (!strcmp(d->d_name, "config.json")) config = true;
        bool ours = !strcmp(d->d_name, MANIFEST ".part");       // of a run that ended at once
        if (!ours && strcmp(d->d_name, ".") && strcmp(d->d_name, ".."))
            snprintf(foreign, sizeof foreign, "%s", d->d_name);
    }
    closedir(dir);
    *fresh = !foreign[0];
    *complete = config && !manifest;
    if (*fresh || (*complete && job->o->verify)) return true;
    if (!manifest)
        return fail(e, "%s: is not empty (%s) and no conversion was begun there: give a new "
                    "directory", dst, foreign);
    char *path = text_of("%s/%s", dst, MANIFEST);
    Dsv4Text text;
    bool ok = dsv4_map(path, &text, e);
    if (ok && !text_is(text, job->identity))
        ok = fail(e, "%s: another source, or other options, were converted here, or the source has "
                  "changed since: give a new directory", dst);
    free(path);
    return ok;
}

// Which shards are there already, and whether the rest will fit.
static bool check_space(Job *job, bool fresh, Dsv4Error *e) {
    struct stat st;
    struct statvfs fs;
    Dsv4Error ignored;
    uint64_t need_bytes = 0;
    char *parent = text_of("%s", job->o->dst);
    while (stat(parent, &st)) {         // the nearest directory that exists
        char *slash = strrchr(parent, '/');
        if (slash && slash != parent) *slash = 0;
        else strcpy(parent, slash ? "/" : ".");
    }
    for (int i = 0; i < job->n_files; i++) {
        Shard *file = &job->files[i];
        int fd = fresh || !file->n ? -1 : open(file->path, O_RDONLY | O_CLOEXEC);
        file->done = fd >= 0 && same_header(file, fd, file->path, &ignored);
        if (fd >= 0) close(fd);
        uint64_t reserved = !fresh && !stat(file->part, &st) ? (uint64_t)st.st_blocks * 512 : 0;
        if (file->n) job->total += file->size;
        if (file->n && !file->done) need_bytes += file->size > reserved ? file->size - reserved : 0;
    }
    bool ok = !access(parent, W_OK | X_OK);
    if (!ok) fail(e, "%s: cannot write: %s", parent, strerror(errno));
    if (ok && statvfs(parent, &fs)) ok = fail(e, "%s: %s", parent, strerror(errno));
    if (ok && need_bytes + (1 << 20) > (uint64_t)fs.f_bavail * fs.f_frsize)
        ok = fail(e, "%s: %.2f GB are free, %.2f GB are needed", parent,
                  (double)fs.f_bavail * (double)fs.f_frsize / 1e9, (double)need_bytes / 1e9);
    free(parent);
    return ok;
}

// Makes DST ours: from here on things are written. Returns its locked descriptor, -1 on an error.
static int claim(const Job *job, bool fresh, Dsv4Error *e) {
    const char *dst = job->o->dst;
    if (fresh && mkdir(dst, 0777) && errno != EEXIST)
        return fail(e, "%s: cannot make it: %s", dst, strerror(errno)) - 1;
    int fd = open(dst, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool ok = fd >= 0 || fail(e, "%s: %s", dst, strerror(errno));
    if (ok && flock(fd, LOCK_EX | LOCK_NB))
        ok = fail(e, "%s: another dsv4 convert is at work there", dst);
    ok = ok && write_whole(dst, MANIFEST, job->identity, strlen(job->identity), e);
    if (ok) return fd;
    if (fd >= 0) close(fd);
    return -1;
}

// ---------------------------------------------------------------------------
// dsv4 convert

// "0,2,40-42": each layer once; layers routed by hash first, as config.json can only say how many.
static bool read_remap(Job *job, const char *list, Dsv4Error *e) {
    int L = job->config.n_layers;
    job->new_layer = need(malloc((size_t)L * sizeof *job->new_layer));
    job->kept = need(malloc((size_t)L * sizeof *job->kept));
    for (int i = 0; i < L; i++) job->new_layer[i] = -1;
    for (const char *p = list;; p++) {
        size_t used = 0;
        int a = number_at(p, strlen(p), &used), b = a;
        p += used;
        if (*p == '-') {
            b = number_at(p + 1, strlen(p + 1), &used);
            p += 1 + used;
        }
        if (a < 0 || b < a || b >= L || (*p && *p != ','))
            return fail(e, "--layer-remap: expected layers 0 to %d as in 0,2,5-7, found '%s'",
                        L - 1, list);
        for (int i = a; i <= b; i++) {
            if (job->new_layer[i] >= 0) return fail(e, "--layer-remap: layer %d twice", i);
            bool hashed = i < job->config.n_hash_layers;
            if (hashed && job->n_kept && job->kept[job->n_kept - 1] >= job->config.n_hash_layers)
                return fail(e, "--layer-remap: layer %d is routed by hash (0 to %d are) and must "
                            "come before the others", i, job->config.n_hash_layers - 1);
            job->new_layer[i] = job->n_kept;
            job->kept[job->n_kept++] = i;
        }
        if (!*p) return true;
    }
}

static bool prepare(Job *job, Dsv4Error *e) {
    const Dsv4Convert *o = job->o;
    bool f16 = o->scale_dtype && !strcmp(o->scale_dtype, "f16");
    if (o->scale_dtype && !f16 && strcmp(o->scale_dtype, "bf16"))
        return fail(e, "--scale-dtype: expected bf16 or f16, found '%s'", o->scale_dtype);
    if (!dsv4_config(o->src, &job->config, e)) return false;
    if (strcmp(job->config.quant, "fp8"))
        return fail(e, "%s/config.json: quant_method is '%s', the original release has 'fp8'",
                    o->src, job->config.quant);
    if (o->layer_remap && !read_remap(job, o->layer_remap, e)) return false;
    job->store = dsv4_store_open(o->src, e);
    if (!job->store) return false;
    job->tables = tables_new(f16);
    if (f16) dsv4_note("scales in F16: for other software, this engine reads BF16");
    return plan(job, e) && (job->identity = identity(job, e));
}

static bool same_text(const Job *job, const char *name, const char *text, size_t n, Dsv4Error *e) {
    char *path = text_of("%s/%s", job->o->dst, name);
    Dsv4Text found;
    bool ok = dsv4_map(path, &found, e);
    if (ok && (found.n != n || memcmp(found.p, text, n)))
        ok = fail(e, "%s: is not what converting the source gives", path);
    free(path);
    return ok;
}

// The shards, then the other files; config.json and the index last.
static bool convert(Job *job, bool complete, Dsv4Error *e) {
    static const char index_name[] = "model.safetensors.index.json";
    const Dsv4Convert *o = job->o;
    size_t n = 0, index_n = 0;
    char *index_path = text_of("%s/%s", o->src, index_name), *index = NULL;
    bool has_index = !access(index_path, F_OK);
    char *config = rewrite(job, "config.json", CONFIG, &n, e);
    bool ok = config != NULL;
    if (ok && has_index) ok = (index = rewrite(job, index_name, INDEX, &index_n, e)) != NULL;
    if (!complete) {
        ok = ok && run(job, false, e) && carry_over(o->src, o->dst, 0, e);
        ok = ok && (!has_index || write_whole(o->dst, index_name, index, index_n, e));
        ok = ok && write_whole(o->dst, "config.json", config, n, e);
        char *manifest = text_of("%s/%s", o->dst, MANIFEST);
        if (ok && unlink(manifest)) ok = fail(e, "%s: %s", manifest, strerror(errno));
        free(manifest);
    }
    if (ok && o->verify)
        ok = run(job, true, e) && same_text(job, "config.json", config, n, e) &&
             (!has_index || same_text(job, index_name, index, index_n, e));
    free(index_path);
    free(config);
    free(index);
    return ok;
}

static void job_free(Job *job) {
    for (int i = 0; job->files && i < job->n_files; i++) {
        Shard *file = &job->files[i];
        for (size_t k = 0; k < file->n; k++)
            if (file->items[k].name.p != file->items[k].t.name.p)
                free((void *)(uintptr_t)file->items[k].name.p);
        free(file->items);
        free(file->header);
        free(file->path);
        free(file->part);
    }
    free(job->files);
    free(job->new_layer);
    free(job->kept);
    free(job->tables);
    free(job->identity);
    if (job->store) dsv4_store_close(job->store);
    pthread_mutex_destroy(&job->lock);
}

// Converts o->src to o->dst, or goes on with it. False: *e says why. The source is only read.
bool dsv4_convert(const Dsv4Convert *o, Dsv4Error *e) {
    Job job = { .o = o, .lock = PTHREAD_MUTEX_INITIALIZER };
    bool fresh = false, complete = false;
    int lock = -1;
    double start = seconds();
    pick_loops();
    bool ok = prepare(&job, e) && inspect(&job, &fresh, &complete, e) &&
              (complete || check_space(&job, fresh, e));
    if (ok && complete)
        for (int i = 0; i < job.n_files; i++) job.total += job.files[i].n ? job.files[i].size : 0;
    if (ok && !complete) ok = (lock = claim(&job, fresh, e)) >= 0;
    ok = ok && convert(&job, complete, e);
    if (ok)
        dsv4_note("%s %s: %zu weights converted, %.2f GB in %.1f s%s", o->dst,
                  complete ? "checked" : "done", job.converted, (double)job.total / 1e9,
                  seconds() - start, o->verify ? ", every byte compared" : "");
    if (lock >= 0) close(lock);
    job_free(&job);
    return ok;
}
