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
#include <regex.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define MANIFEST ".dsv4-convert"

__attribute__((format(printf, 2, 3)))
static void put(Str *s, const char *fmt, ...) {
    char text[256];
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    str_add(s, text, (size_t)n < sizeof text ? (size_t)n : sizeof text - 1);
}

static int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b > 0); }

// ---------------------------------------------------------------------------
// the rules (FP32 throughout, rounded half to even), tabulated for every scale byte

static float f32_from(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }

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

// A scale as it is stored: BF16, nearest even. Not finite: SCALE_BAD.
static uint16_t stored_scale(float s) {
    uint32_t u;
    memcpy(&u, &s, 4);
    return isfinite(s) ? (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16) : SCALE_BAD;
}

// FP4 -> INT4, in a group of 32 with scale byte b and largest magnitude code c:
// s = max(absmax, FLT_MIN) / 7, q = rint(x / s) in [-8, 7], stored as q + 8.
// So a nibble's new value depends on (b, c) and itself alone.
typedef struct {
    uint8_t nibble[256][8][16];
    uint16_t scale4[256][8];
} Tables;

static Tables *tables_new(void) {
    Tables *t = xalloc(1, sizeof *t);
    for (int b = 0; b < 256; b++)
        for (int c = 0; c < 8; c++) {
            float scale = e8m0(b), s = fmaxf(e2m1[c] * scale, 0x1p-126f) / 7;
            t->scale4[b][c] = b == 255 ? SCALE_BAD : stored_scale(s);
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
static uint16_t table8(int b, int m, int8_t map[static 128]) {
    float scale = e8m0(b), absmax = e4m3(m) * scale, s = fmaxf(absmax, 0x1p-126f) / 127;
    memset(map, 0, 128);
    if (!isfinite(absmax)) return SCALE_BAD;
    for (int x = 0; x <= m; x++) map[x] = (int8_t)fminf(rintf(e4m3(x) * scale / s), 127);
    return stored_scale(s);
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
    const Tensor *t;        // the source
    const Tensor *pair;     // INT4, INT8: its scale; *_SCALE: its weight
    Span name;              // in DST; --layer-remap gives layers other numbers
    Rule rule;
    bool together;          // weight and scale are in the same shard: written in one go
    Dtype dtype;            // in DST
    uint64_t at, bytes;     // place in DST's file
    uint64_t scale_at;      // INT4, INT8, together: the scale's place
} Item;

typedef struct {
    const char *from;       // SRC/NAME
    const char *name;       // in from
    char *path, *part;      // DST/NAME, DST/NAME.part
    Item *items;            // [n] in the order of the file
    size_t n;
    char *header;           // the file's first bytes
    size_t header_size;
    uint64_t size;          // of the file
    bool done;              // complete from an earlier run
    int in, out;            // while it is worked on
    int pending;            // pieces handed out and not finished, and 1 while more will come
} OutFile;

typedef struct {
    const Dsv4Convert *o;
    Config config;
    Store store;
    Tables *tables;
    OutFile *files;         // [n_files], one per source shard; n = 0: dropped
    int n_files;
    int *new_layer;         // [n_layers] number in DST, -1: dropped; NULL without --layer-remap
    int *kept;              // [n_kept] the source layers in their new order
    int n_kept;
    uint64_t tensor_bytes;  // the true total_size
    size_t converted;       // weights that become INT4 or INT8
    Str identity;           // what the manifest says
    // the work, under lock
    pthread_mutex_t lock;
    int file;               // where the next piece comes from
    size_t item;
    uint64_t piece;         // of the item
    bool checking;          // --verify: compare instead of write
    atomic_bool failed;
    Err *error;             // the first one
    uint64_t total, did, before;    // bytes of DST; before: from earlier runs
    double start, shown;    // when: this run began, the progress line was written
    bool terminal;          // somebody is watching
} Job;

// The number at p[0..n), as far as its digits go (at most 6), without leading zeros; else -1.
static int number_at(const char *p, size_t n, size_t *used) {
    int v = 0;
    size_t i = 0;
    for (; i < n && p[i] >= '0' && p[i] <= '9' && i < 6; i++) v = 10 * v + p[i] - '0';
    *used = i;
    return i && (i == 1 || p[0] != '0') ? v : -1;
}

// "layers.12.attn..." -> 12 and what is left; -1: not a layer's ("mtp." layers keep their numbers).
static int layer_of(Span name, Span *rest) {
    size_t at = 7, used = 0;
    if (name.n < 8 || memcmp(name.p, "layers.", 7)) return -1;
    int i = number_at(name.p + at, name.n - at, &used);
    at += used;
    if (i < 0 || at >= name.n || name.p[at] != '.') return -1;
    *rest = (Span){ name.p + at + 1, name.n - at - 1 };
    return i;
}

#define NUMBER "(0|[1-9][0-9]{0,5})"
#define LAST "[.](weight|scale)$"

// INT4 or INT8 if tensors of this name are converted (spec 8), else COPY. *base: the name without
// its last part.
static Rule rule_of(Span name, Span *base, bool *is_scale) {
    static const struct { Rule rule; const char *pattern; } rules[] = {
        { INT8, "^(layers|mtp)[.]" NUMBER "[.]attn[.](wq_a|wq_b|wkv|wo_a|wo_b|indexer[.]wq_b)" LAST },
        { INT8, "^(layers|mtp)[.]" NUMBER "[.]ffn[.]shared_experts[.]w[123]" LAST },
        { INT4, "^(layers|mtp)[.]" NUMBER "[.]ffn[.]experts[.]" NUMBER "[.]w[123]" LAST },
    };
    static regex_t compiled[3];
    char text[128];
    if (name.n >= sizeof text || memchr(name.p, 0, name.n)) return COPY;
    memcpy(text, name.p, name.n);
    text[name.n] = 0;
    for (size_t i = 0; i < 3; i++) {
        if (!compiled[i].re_nsub && regcomp(&compiled[i], rules[i].pattern, REG_EXTENDED))
            die(1, "out of memory: a pattern");
        if (regexec(&compiled[i], text, 0, NULL, 0)) continue;
        const char *dot = strrchr(text, '.');
        *base = (Span){ name.p, (size_t)(dot - text) };
        *is_scale = !strcmp(dot, ".scale");
        return rules[i].rule;
    }
    return COPY;
}

// Checks that weight and scale are what the release has; *rule becomes COPY for weights in a format
// that needs no scale.
static bool check_pair(const Tensor *w, const Tensor *s, Rule *rule, Err *e) {
    char kind[256];
    int want = *rule == INT4 ? DT_I8 : DT_F8_E4M3;
    if (w->dtype == DT_BF16 || w->dtype == DT_F32) return *rule = COPY, true;
    if (!s) return fail(e, "tensor %.*s: its scale is missing", SHOWN(w->name));
    bool ok = w->dtype == want && s->dtype == DT_F8_E8M0 && w->rank == 2 && s->rank == 2;
    int64_t n = ok ? w->shape[0] : 0, k = ok ? w->shape[1] : 0;
    if (*rule == INT4) ok = ok && k % 16 == 0 && s->shape[0] == n && s->shape[1] == k / 16;
    else ok = ok && s->shape[0] == divide_up(n, 128) && s->shape[1] == divide_up(k, 128);
    return ok || fail(e, "tensor %.*s: %s with this scale is not the original release's %s",
                      SHOWN(w->name), tensor_kind(w, kind),
                      *rule == INT4 ? "FP4 (I8 [N, K/2] and F8_E8M0 [N, K/32])"
                                    : "FP8 (F8_E4M3 [N, K] and F8_E8M0 per 128 x 128)");
}

// Decides about one source tensor.
static bool plan_item(Job *job, const Tensor *t, Item *it, Err *e) {
    Span base = { 0 };
    bool is_scale;
    Rule rule = rule_of(t->name, &base, &is_scale);
    *it = (Item){ .t = t, .dtype = (Dtype)t->dtype, .bytes = t->bytes };
    if (rule == COPY) return true;
    char *other = text_of("%.*s.%s", (int)base.n, base.p, is_scale ? "weight" : "scale");
    it->pair = store_find_span(&job->store, span_of(other));
    free(other);
    if (is_scale && !it->pair)
        return fail(e, "tensor %.*s: its weight is missing", SHOWN(t->name));
    if (!check_pair(is_scale ? it->pair : t, is_scale ? t : it->pair, &rule, e)) return false;
    if (rule == COPY) return true;
    it->rule = (Rule)(rule + is_scale);
    it->together = it->pair->shard == t->shard;
    it->dtype = is_scale ? DT_BF16 : DT_I8;
    if (is_scale) it->bytes *= 2;
    return true;
}

// The new name; false: the tensor is dropped.
static bool plan_name(const Job *job, Item *it) {
    Span rest = { 0 };
    it->name = it->t ? it->t->name : it->name;
    int i = job->new_layer ? layer_of(it->name, &rest) : -1;
    if (i < 0) return true;
    if (i >= job->config.n_layers || job->new_layer[i] < 0) return false;
    char *name = text_of("layers.%d.%.*s", job->new_layer[i], (int)rest.n, rest.p);
    it->name = (Span){ name, strlen(name) };
    return true;
}

// The order of safetensors' own writer: wide dtypes first (its list backwards), then by name.
static int by_file_order(const void *a, const void *b) {
    const Item *x = a, *y = b;
    if (x->dtype != y->dtype) return x->dtype > y->dtype ? -1 : 1;
    size_t n = x->name.n < y->name.n ? x->name.n : y->name.n;
    int c = memcmp(x->name.p, y->name.p, n);
    return c ? c : (x->name.n > y->name.n) - (x->name.n < y->name.n);
}

// Sorts the items, gives each its place, writes the header's text.
static void plan_layout(OutFile *file, Span metadata) {
    Str s = { 0 };
    uint64_t at = 0;
    if (file->n) qsort(file->items, file->n, sizeof *file->items, by_file_order);
    str_add(&s, "\0\0\0\0\0\0\0\0{", 9);
    if (metadata.n) {
        str_puts(&s, "\"__metadata__\":");
        str_add(&s, metadata.p, metadata.n);
    }
    for (size_t i = 0; i < file->n; i++) {
        Item *it = &file->items[i];
        if (i || metadata.n) str_puts(&s, ",");
        json_put_string(&s, it->name);
        put(&s, ":{\"dtype\":\"%s\",\"shape\":[", dtypes[it->dtype].name);
        for (int d = 0; d < it->t->rank; d++)
            put(&s, "%s%lld", d ? "," : "", (long long)it->t->shape[d]);
        put(&s, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)at,
            (unsigned long long)(at + it->bytes));
        it->at = at;
        at += it->bytes;
    }
    str_puts(&s, "}");
    while (s.n % 8) str_puts(&s, " ");
    for (int i = 0; i < 8; i++) s.p[i] = (char)((uint64_t)(s.n - 8) >> 8 * i);
    file->header = s.p;
    file->header_size = s.n;
    file->size = s.n + at;
    for (size_t i = 0; i < file->n; i++) file->items[i].at += s.n;
}

static bool plan(Job *job, Err *e) {
    const Store *s = &job->store;
    uint64_t *place = xalloc(s->n, sizeof *place);          // where each tensor lies in DST
    bool ok = true;
    job->n_files = s->n_shards;
    job->files = xalloc((size_t)job->n_files, sizeof *job->files);
    for (size_t i = 0; ok && i < s->n; i++) {
        Item it;
        ok = plan_item(job, &s->tensors[i], &it, e);
        if (!ok || !plan_name(job, &it)) continue;
        OutFile *file = &job->files[it.t->shard];
        file->items = grow(file->items, file->n, sizeof *file->items);
        file->items[file->n++] = it;
        job->converted += it.rule == INT4 || it.rule == INT8;
        job->tensor_bytes += it.bytes;
    }
    for (int i = 0; ok && i < job->n_files; i++) {
        OutFile *file = &job->files[i];
        file->in = file->out = -1;
        file->from = s->shards[i].path;
        file->name = strrchr(file->from, '/') + 1;
        file->path = text_of("%s/%s", job->o->dst, file->name);
        file->part = text_of("%s.part", file->path);
        plan_layout(file, s->shards[i].metadata);
        for (size_t k = 0; k < file->n; k++)
            place[file->items[k].t - s->tensors] = file->items[k].at;
        for (size_t k = 0; k < file->n; k++)
            if (file->items[k].together)
                file->items[k].scale_at = place[file->items[k].pair - s->tensors];
    }
    free(place);
    if (ok && !job->converted)
        ok = fail(e, "%s: nothing to convert here: not the original release?", job->o->src);
    return ok;
}

// ---------------------------------------------------------------------------
// the work: pieces of at most 1 MiB, handed out in file order

enum { PIECE = 1 << 20, TILE = PIECE / 128 };       // TILE: columns of an FP8 band of 128 rows

typedef struct {
    OutFile *file;
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
    Err error;
} Worker;

// How many pieces an item is; scales that are written along with their weight are none.
static uint64_t pieces_of(const Item *it) {
    bool only_scale = it->rule == INT4_SCALE || it->rule == INT8_SCALE;
    const Tensor *w = only_scale ? it->pair : it->t;
    if (!w->bytes || (only_scale && it->together)) return 0;
    if (it->rule == INT8 || it->rule == INT8_SCALE)
        return (uint64_t)(divide_up(w->shape[0], 128) * divide_up(w->shape[1], TILE));
    return (uint64_t)divide_up((int64_t)w->bytes, PIECE);
}

static bool read_fd(int fd, const char *path, uint64_t at, void *to, size_t n, Err *e) {
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

static bool write_fd(int fd, const char *path, uint64_t at, const void *from, size_t n, Err *e) {
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
// Not through the mapping: a disk error shall be an error and not a signal, and memory stays flat.
static bool fetch(Worker *w, const Piece *p, const Tensor *t, uint64_t from, void *to, size_t n) {
    const char *path = w->job->files[t->shard].from;
    bool here = t->shard == p->it->t->shard;
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
                p->file->path, (unsigned long long)(at + i), SHOWN(p->it->name),
                ((const uint8_t *)bytes)[i], w->check[i]);
}

static bool not_finite(Worker *w, const Piece *p, int64_t row, int64_t column, int scale) {
    return fail(&w->error, "%s: tensor %.*s: the block at [%lld, %lld] (scale byte 0x%02x) is not "
                "finite: download again", p->file->from, SHOWN(p->it->t->name), (long long)row,
                (long long)column, scale);
}

// A tensor that stays as it is.
static bool do_copy(Worker *w, const Piece *p) {
    uint64_t from = p->number * PIECE, left = p->it->bytes - from;
    size_t n = left < PIECE ? left : PIECE;
    return fetch(w, p, p->it->t, from, w->in, n) && emit(w, p, p->it->at + from, w->in, n);
}

// Groups of 32: 16 bytes and one scale, both in one run through the tensor.
static bool do_int4(Worker *w, const Piece *p) {
    bool only_scale = p->it->rule == INT4_SCALE;
    const Tensor *t = only_scale ? p->it->pair : p->it->t;
    const Tensor *s = only_scale ? p->it->t : p->it->pair;
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
    const Tensor *t = only_scale ? p->it->pair : p->it->t;
    const Tensor *s = only_scale ? p->it->t : p->it->pair;
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
        w->scale_out[b] = table8(w->scale_in[b], top, map);
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

// Makes names in a directory last: a rename is only safe once its directory is on the disk.
static bool sync_directory(const char *path, Err *e) {
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool ok = fd >= 0 && (!fsync(fd) || errno == EINVAL);
    if (!ok) fail(e, "%s: cannot sync: %s", path, strerror(errno));
    if (fd >= 0) close(fd);
    return ok;
}

// Is the open file of the right length, with the header that we would write?
static bool same_header(const OutFile *file, int fd, const char *path, Err *e) {
    struct stat st;
    if (fstat(fd, &st)) return fail(e, "%s: %s", path, strerror(errno));
    if ((uint64_t)st.st_size != file->size)
        return fail(e, "%s: file has %lld bytes, expected %llu", path, (long long)st.st_size,
                    (unsigned long long)file->size);
    char *found = xalloc(file->header_size, 1);
    bool ok = read_fd(fd, path, 0, found, file->header_size, e);
    if (ok && memcmp(found, file->header, file->header_size))
        ok = fail(e, "%s: its header is not what converting the source gives", path);
    free(found);
    return ok;
}

// Begins a file: creates NAME.part with its header, or (--verify) opens the finished one.
static bool open_file(const Job *job, OutFile *file, Err *e) {
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

// All pieces are written: the data must be on the disk before the name says that they are.
static bool finish_file(const Job *job, OutFile *file, Err *e) {
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
static void job_fail(Job *job, const Err *e) {
    if (!job->failed) *job->error = *e;
    job->failed = true;
}

// The next piece, or the word to finish a file. False: nothing left to do. Holds the lock.
static bool next_piece(Job *job, Piece *p) {
    Err e;
    while (!job->failed && job->file < job->n_files) {
        OutFile *file = &job->files[job->file];
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
static void show_progress(Job *job, const OutFile *finished) {
    double t = now(), rate = (double)(job->did - job->before) / (t - job->start + 1e-9);
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

// A thread's life. The lock is held between pieces, not during them.
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
static bool run(Job *job, bool checking, Err *e) {
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
    job->start = now();
    Worker *workers = xalloc((size_t)n, sizeof *workers);
    int started = 0;
    for (; started < n; started++) {
        Worker *w = &workers[started];
        w->job = job;
        w->in = xalloc(3, PIECE);
        w->out = w->in + PIECE;
        w->check = w->out + PIECE;
        w->scale_in = xalloc(PIECE / 16, 1);
        w->scale_out = xalloc(PIECE / 16, sizeof *w->scale_out);
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
        OutFile *file = &job->files[i];
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
    Str *out;
    Place place;
    int depth, n;           // n: members written
    bool seen[2];           // CONFIG: expert_dtype, quantization_config; INDEX: metadata
} Writer;

static bool write_value(const Writer *outer, Place place, Json *j);

// Comma, line end, indentation and the key; an array's items have none.
static void write_key(Writer *w, Span key) {
    put(w->out, "%s\n%*s", w->n++ ? "," : "", 2 * w->depth, "");
    if (!key.p) return;
    json_put_string(w->out, key);
    str_puts(w->out, ": ");
}

// A member whose value we give as JSON.
static void write_text(Writer *w, const char *key, const char *json) {
    Err e;
    Json j = json_open(span_of(json), key, &e);
    write_key(w, span_of(key));
    write_value(w, PLAIN, &j);
}

// compress_ratios of the layers that are kept, then those of the MTP layers.
static void write_ratios(Writer *w, Json *j) {
    const Job *job = w->job;
    Str list = { 0 };
    int64_t *ratio = NULL;
    size_t n = 0;
    for (json_array(j); json_item(j); n++) {
        ratio = grow(ratio, n, sizeof *ratio);
        json_int(j, 0, INT_MAX, &ratio[n]);
    }
    for (int i = 0; i < job->n_kept && !j->bad; i++)
        put(&list, "%c%lld", i ? ',' : '[', (long long)ratio[job->kept[i]]);
    for (size_t i = (size_t)job->config.n_layers; i < n; i++)
        put(&list, ",%lld", (long long)ratio[i]);
    str_puts(&list, "]");
    if (!j->bad) write_text(w, "compress_ratios", list.p);
    free(list.p);
    free(ratio);
}

// Writes another value in the place of some of config.json's; false: the member stays as it is.
static bool write_changed(Writer *w, Span key, Json *j) {
    const Job *job = w->job;
    char number[16];
    int n = -1;
    if (job->kept && span_is(key, "compress_ratios")) return write_ratios(w, j), true;
    if (job->kept && span_is(key, "num_hidden_layers")) n = job->n_kept;
    if (job->kept && span_is(key, "num_hash_layers"))
        for (n = 0; n < job->n_kept && job->kept[n] < job->config.n_hash_layers;) n++;
    snprintf(number, sizeof number, "%d", n);
    bool dtype = span_is(key, "expert_dtype"), quant = span_is(key, "quantization_config");
    w->seen[0] |= dtype;
    w->seen[1] |= quant;
    if (dtype) write_text(w, "expert_dtype", "\"int4\"");
    else if (quant) write_text(w, "quantization_config", quant_config);
    else if (n >= 0) write_text(w, span_is(key, "num_hash_layers") ? "num_hash_layers"
                                                                   : "num_hidden_layers", number);
    else return false;
    json_skip(j);
    return true;
}

// The next member (or item, key.p NULL) of the object being read.
static void write_member(Writer *w, Span key, Json *j) {
    Place place = PLAIN;
    Item it = { .name = key };
    if (w->place == CONFIG && write_changed(w, key, j)) return;
    if (w->place == METADATA && span_is(key, "total_size")) {       // written at the end
        json_skip(j);
        return;
    }
    if (w->place == INDEX && span_is(key, "metadata")) place = METADATA, w->seen[0] = true;
    if (w->place == INDEX && span_is(key, "weight_map")) place = WEIGHT_MAP;
    if (w->place == WEIGHT_MAP && !plan_name(w->job, &it)) {
        json_skip(j);
        return;
    }
    write_key(w, it.name);
    if (it.name.p != key.p) free((void *)(uintptr_t)it.name.p);
    write_value(w, place, j);
}

// The next value: scalars as they stand, containers member by member with what this place adds.
static bool write_value(const Writer *outer, Place place, Json *j) {
    char c = json_peek(j), size[32], metadata[64];
    Span raw = { 0 };
    if (c != '{' && c != '[') {
        if (json_raw(j, &raw)) str_add(outer->out, raw.p, raw.n);
        return !j->bad;
    }
    Writer w = { .job = outer->job, .out = outer->out, .place = place, .depth = outer->depth + 1 };
    Str key = { 0 };
    str_add(w.out, &c, 1);
    if (c == '{') for (json_object(j); json_member(j, &key);) write_member(&w, str_span(&key), j);
    else for (json_array(j); json_item(j);) write_member(&w, (Span){ NULL, 0 }, j);
    snprintf(size, sizeof size, "%llu", (unsigned long long)w.job->tensor_bytes);
    snprintf(metadata, sizeof metadata, "{\"total_size\":%s}", size);
    if (place == CONFIG && !w.seen[0]) write_text(&w, "expert_dtype", "\"int4\"");
    if (place == CONFIG && !w.seen[1]) write_text(&w, "quantization_config", quant_config);
    if (place == INDEX && !w.seen[0]) write_text(&w, "metadata", metadata);
    if (place == METADATA) write_text(&w, "total_size", size);
    if (w.n) put(w.out, "\n%*s", 2 * outer->depth, "");
    str_puts(w.out, c == '{' ? "}" : "]");
    free(key.p);
    return !j->bad;
}

// Appends the text of DST/NAME, made from SRC/NAME.
static bool rewrite(const Job *job, const char *name, Place place, Str *out, Err *e) {
    char *path = text_of("%s/%s", job->o->src, name);
    Span text = { 0 };
    bool ok = map_file(path, &text, e);
    if (ok) {
        Writer w = { .job = job, .out = out };
        Json j = json_open(text, path, e);
        if (json_peek(&j) != '{') json_expected(&j, "an object");
        else write_value(&w, place, &j);
        ok = json_end(&j);
    }
    unmap_file(text);
    free(path);
    return ok;
}

// ---------------------------------------------------------------------------
// the directory DST: what it may hold before, and what comes into it besides the shards

// What the work belongs to: options, and every source file by name, size and time.
static bool identity(Job *job, Err *e) {
    bool ok = true;
    Str *s = &job->identity;
    str_puts(s, "dsv4 convert 2, layers ");
    str_puts(s, job->o->layer_remap ? job->o->layer_remap : "all");
    for (int i = -1; i < job->n_files && ok; i++) {
        struct stat st;
        char *config = text_of("%s/config.json", job->o->src);
        const char *path = i < 0 ? config : job->files[i].from;
        ok = !stat(path, &st) || fail(e, "%s: %s", path, strerror(errno));
        str_puts(s, "\n");
        str_puts(s, strrchr(path, '/') + 1);
        if (ok) put(s, " %lld %lld.%09ld", (long long)st.st_size, (long long)st.st_mtim.tv_sec,
                    st.st_mtim.tv_nsec);
        free(config);
    }
    str_puts(s, "\n");
    return ok;
}

// Writes DST/NAME whole or not at all.
static bool write_whole(const char *dst, const char *name, Span text, Err *e) {
    char *path = text_of("%s/%s", dst, name), *part = text_of("%s.part", path);
    int fd = open(part, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    bool ok = fd >= 0 || fail(e, "%s: %s", part, strerror(errno));
    ok = ok && write_fd(fd, part, 0, text.p, text.n, e);
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
static bool carry_over(const char *src, const char *dst, int depth, Err *e) {
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
        Span text = { 0 };
        if (stat(from, &st) || lstat(from, &link)) ok = fail(e, "%s: %s", from, strerror(errno));
        else if (S_ISDIR(link.st_mode) && depth < 8) {
            ok = !mkdir(to, 0777) || errno == EEXIST || fail(e, "%s: %s", to, strerror(errno));
            ok = ok && carry_over(from, to, depth + 1, e);
        } else if (S_ISREG(st.st_mode)) {
            ok = map_file(from, &text, e) && write_whole(dst, name, text, e);
            unmap_file(text);
        }
        free(from);
        free(to);
    }
    closedir(dir);
    return ok;
}

// *same: DST/NAME holds exactly that text.
static bool same_text(const Job *job, const char *name, Span text, bool *same, Err *e) {
    char *path = text_of("%s/%s", job->o->dst, name);
    Span found = { 0 };
    bool ok = map_file(path, &found, e);
    *same = ok && found.n == text.n && !memcmp(found.p, text.p, text.n);
    unmap_file(found);
    free(path);
    return ok;
}

// The nearest part of a path that exists; release with free().
static char *existing(const char *path) {
    struct stat st;
    char *up = text_of("%s", path);
    while (stat(up, &st)) {
        char *slash = strrchr(up, '/');
        if (slash && slash != up) *slash = 0;
        else strcpy(up, slash ? "/" : ".");
    }
    return up;
}

// True if path, or a directory above it, is the directory `of`.
static bool lies_inside(const char *path, const struct stat *of) {
    struct stat st, last = { 0 };
    char *up = existing(path);
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
static bool inspect(const Job *job, bool *fresh, bool *complete, Err *e) {
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
    bool same, ok = same_text(job, MANIFEST, str_span(&job->identity), &same, e);
    if (ok && !same)
        ok = fail(e, "%s: another source, or other options, were converted here, or the source has "
                  "changed since: give a new directory", dst);
    return ok;
}

// Which shards are there already, and whether the rest will fit.
static bool check_space(Job *job, bool fresh, Err *e) {
    struct stat st;
    struct statvfs fs;
    Err ignored;
    uint64_t need_bytes = 0;
    char *parent = existing(job->o->dst);
    for (int i = 0; i < job->n_files; i++) {
        OutFile *file = &job->files[i];
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
static int claim(const Job *job, bool fresh, Err *e) {
    const char *dst = job->o->dst;
    if (fresh && mkdir(dst, 0777) && errno != EEXIST)
        return fail(e, "%s: cannot make it: %s", dst, strerror(errno)) - 1;
    int fd = open(dst, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool ok = fd >= 0 || fail(e, "%s: %s", dst, strerror(errno));
    if (ok && flock(fd, LOCK_EX | LOCK_NB))
        ok = fail(e, "%s: another dsv4 convert is at work there", dst);
    ok = ok && write_whole(dst, MANIFEST, str_span(&job->identity), e);
    if (ok) return fd;
    if (fd >= 0) close(fd);
    return -1;
}

// ---------------------------------------------------------------------------
// dsv4 convert

// "0,2,40-42": each layer once; layers routed by hash first, as config.json can only say how many.
static bool read_remap(Job *job, const char *list, Err *e) {
    int L = job->config.n_layers;
    job->new_layer = xalloc((size_t)L, sizeof *job->new_layer);
    job->kept = xalloc((size_t)L, sizeof *job->kept);
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

// Everything that can be said without looking at DST.
static bool prepare(Job *job, Err *e) {
    const Dsv4Convert *o = job->o;
    if (!config_open(&job->config, o->src, e)) return false;
    if (strcmp(job->config.quant, "fp8"))
        return fail(e, "%s/config.json: quant_method is '%s', the original release has 'fp8'",
                    o->src, job->config.quant);
    if (o->layer_remap && !read_remap(job, o->layer_remap, e)) return false;
    if (!store_open(&job->store, o->src, e)) return false;
    job->tables = tables_new();
    return plan(job, e) && identity(job, e);
}

static bool check_text(const Job *job, const char *name, const Str *text, Err *e) {
    bool same;
    return same_text(job, name, str_span(text), &same, e) &&
           (same || fail(e, "%s/%s: is not what converting the source gives", job->o->dst, name));
}

// The shards, then the other files; config.json and the index last.
static bool convert(Job *job, bool complete, Err *e) {
    static const char index_name[] = "model.safetensors.index.json";
    const Dsv4Convert *o = job->o;
    Str config = { 0 }, index = { 0 };
    char *index_path = text_of("%s/%s", o->src, index_name);
    bool has_index = !access(index_path, F_OK);
    bool ok = rewrite(job, "config.json", CONFIG, &config, e) &&
              (!has_index || rewrite(job, index_name, INDEX, &index, e));
    if (!complete) {
        ok = ok && run(job, false, e) && carry_over(o->src, o->dst, 0, e);
        ok = ok && (!has_index || write_whole(o->dst, index_name, str_span(&index), e));
        ok = ok && write_whole(o->dst, "config.json", str_span(&config), e);
        char *manifest = text_of("%s/%s", o->dst, MANIFEST);
        if (ok && unlink(manifest)) ok = fail(e, "%s: %s", manifest, strerror(errno));
        free(manifest);
    }
    if (ok && o->verify)
        ok = run(job, true, e) && check_text(job, "config.json", &config, e) &&
             (!has_index || check_text(job, index_name, &index, e));
    free(index_path);
    free(config.p);
    free(index.p);
    return ok;
}

static void job_free(Job *job) {
    for (int i = 0; job->files && i < job->n_files; i++) {
        OutFile *file = &job->files[i];
        for (size_t k = 0; k < file->n; k++)
            if (file->items[k].name.p != file->items[k].t->name.p)
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
    free(job->identity.p);
    config_free(&job->config);
    store_close(&job->store);
    pthread_mutex_destroy(&job->lock);
}

// Converts o->src to o->dst, or goes on with it. False: *e says why. The source is only read.
bool dsv4_convert(const Dsv4Convert *o, Err *e) {
    Job job = { .o = o, .lock = PTHREAD_MUTEX_INITIALIZER };
    bool fresh = false, complete = false;
    int lock = -1;
    double start = now();
    pick_loops();
    bool ok = prepare(&job, e) && inspect(&job, &fresh, &complete, e) &&
              (complete || check_space(&job, fresh, e));
    if (ok && complete)
        for (int i = 0; i < job.n_files; i++) job.total += job.files[i].n ? job.files[i].size : 0;
    if (ok && !complete) ok = (lock = claim(&job, fresh, e)) >= 0;
    ok = ok && convert(&job, complete, e);
    if (ok)
        note("%s %s: %zu weights converted, %.2f GB in %.1f s%s", o->dst,
                  complete ? "checked" : "done", job.converted, (double)job.total / 1e9,
                  now() - start, o->verify ? ", every byte compared" : "");
    if (lock >= 0) close(lock);
    job_free(&job);
    return ok;
}
