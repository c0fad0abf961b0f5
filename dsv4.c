// dsv4: DeepSeek-V4-Flash from its published checkpoints, on CPUs and on NVIDIA GPUs, in one C file.
//
//     cc -O3 -std=gnu11 -ffp-contract=off -pthread -o dsv4 dsv4.c apps/*.c -ldl -lm      (or: make)
//     ./dsv4 -m MODEL_DIR -p "prompt"
//
// The file reads from top to bottom; nothing is used before it is shown:
//     small tools      errors, checked sizes, strings, files
//     types            Config, Mat, Layer, Cache: every field with its shape
//     files            safetensors, config.json (JSON is read by apps/json.c)
//     text             tokenizer, sampler (the chat encoding is in apps/chat.c)
//     products         thread pool, number formats, matrix products (INT4, INT8, FP4, FP8, BF16, FP32)
//     weights          the table of tensors
//     devices          the list of operations that a device must offer
//     forward          these operations on the CPU: the model's specification in code
//     CUDA             the same operations as launches of kernels.cu; the self-test against the CPU
//     command line     the option table
//     model            the forward pass over stages of layers, sessions, snapshots, placement
//     main             dsv4 info and the rest of the command line; apps/terminal.c answers prompts
// Sections in brackets, like (4.3), point into the model's description: 2 hyper-connections, 3 rope,
// 4 attention, 5 compressor, 6 indexer, 7 mixture of experts, 8 weight formats, 10 MTP.

#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <limits.h>
#include <linux/futex.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#if defined __x86_64__
#include <immintrin.h>
#endif
#include "apps/cuda.h"

// ---------------------------------------------------------------------------
// small tools: errors, checked sizes, memory, strings, maps, files, clock

#define COUNT(array) (sizeof(array) / sizeof *(array))

typedef uint16_t bf16;      // the upper half of a float32

// Names from files and the command line may hold line ends and terminal controls.
static char *one_line(char *text) {
    for (char *p = text; *p; p++) if ((unsigned char)*p < 32 || *p == 127) *p = '?';
    return text;
}

bool fail(Err *e, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(e->text, sizeof e->text, fmt, ap);
    va_end(ap);
    return one_line(e->text), false;
}

// One line `dsv4: ...` on stderr, then exit. Code 1: it failed, 2: usage. Of several threads that
// fail, one speaks.
void die(int code, const char *fmt, ...) {
    static atomic_flag dying = ATOMIC_FLAG_INIT;
    char line[2048];
    va_list ap;
    while (atomic_flag_test_and_set(&dying)) pause();
    va_start(ap, fmt);
    vsnprintf(line, sizeof line, fmt, ap);
    va_end(ap);
    fflush(stdout);
    fprintf(stderr, "%sdsv4: %s\n", isatty(2) ? "\r\033[K" : "", one_line(line));
    exit(code);
}

// One fact `# ...` on stderr.
void note(const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    fputs("# ", stderr);
    vfprintf(stderr, fmt, ap);
    fputc('\n', stderr);
    va_end(ap);
}

// Sizes from files saturate: an overflow becomes SIZE_MAX, which no file and no allocation satisfies.
size_t cmul(size_t a, size_t b) { return __builtin_mul_overflow(a, b, &a) ? SIZE_MAX : a; }
size_t cadd(size_t a, size_t b) { return __builtin_add_overflow(a, b, &a) ? SIZE_MAX : a; }

// Zeroed memory for n items of `size` bytes, 64-byte aligned; never NULL. Free with free().
void *xalloc(size_t n, size_t size) {
    size_t bytes = cadd(cmul(n, size), 63) & ~(size_t)63;
    void *p = bytes > PTRDIFF_MAX ? NULL : aligned_alloc(64, bytes ? bytes : 64);
    if (!p) die(1, "out of memory: %zu items of %zu bytes", n, size);
    return memset(p, 0, bytes ? bytes : 64);
}

// Room for item n of a list that grows one by one; the item is zeroed. Doubles at powers of two.
void *grow(void *list, size_t n, size_t size) {
    if (!(n & (n - 1))) list = realloc(list, cmul(n ? cmul(2, n) : 1, size));
    if (!list) die(1, "out of memory: %zu items of %zu bytes", n, size);
    memset((char *)list + n * size, 0, size);
    return list;
}

void str_add(Str *s, const void *p, size_t n) {
    if (cadd(s->n, cadd(n, 1)) > s->cap) {
        s->cap = cadd(cmul(s->cap, 2), cadd(n, 64));
        s->p = s->cap > PTRDIFF_MAX ? NULL : realloc(s->p, s->cap);
        if (!s->p) die(1, "out of memory: string of %zu bytes", s->cap);
    }
    if (n) memcpy(s->p + s->n, p, n);
    s->p[s->n += n] = 0;
}
void str_puts(Str *s, const char *z) { str_add(s, z, strlen(z)); }
Span str_span(const Str *s) { return (Span){ s->p ? s->p : "", s->n }; }
bool str_is(const Str *s, const char *z) { return span_is(str_span(s), z); }
bool span_is(Span s, const char *z) { return s.n == strlen(z) && !memcmp(s.p, z, s.n); }
Span span_of(const char *z) { return (Span){ z, strlen(z) }; }
Span span_from(Span s, size_t i) { return (Span){ s.p + i, s.n - i }; }

// Decodes the code point at p[0..n), n > 0, and returns how many bytes it takes. Broken bytes give
// *cp = -1 and the length of their maximal subpart (Unicode 3.9: what becomes one U+FFFD); a
// sequence that the end of the text cuts off, valid so far, gives *cp = -2 and its length.
size_t utf8_next(const char *p, size_t n, int32_t *cp) {
    const uint8_t *s = (const uint8_t *)p;
    size_t len = s[0] < 0x80 ? 1 : s[0] < 0xc2 || s[0] > 0xf4 ? 0 : s[0] < 0xe0 ? 2 :
                 s[0] < 0xf0 ? 3 : 4;
    *cp = len == 0 ? -1 : len == 1 ? s[0] : s[0] & (0x7f >> len);
    for (size_t i = 1; i < len; i++) {
        // the second byte excludes overlong forms, surrogates and what lies above U+10FFFF
        uint8_t lo = i > 1 ? 0x80 : s[0] == 0xe0 ? 0xa0 : s[0] == 0xf0 ? 0x90 : 0x80;
        uint8_t hi = i > 1 ? 0xbf : s[0] == 0xed ? 0x9f : s[0] == 0xf4 ? 0x8f : 0xbf;
        if (i == n || s[i] < lo || s[i] > hi) {
            *cp = i == n ? -2 : -1;
            return i;
        }
        *cp = *cp << 6 | (s[i] & 63);
    }
    return len ? len : 1;
}

void utf8_put(Str *out, uint32_t c) {
    char b[4];
    size_t n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = n - 1; i > 0; i--, c >>= 6) b[i] = (char)(0x80 | (c & 63));
    b[0] = (char)(n == 1 ? c : (0xf00u >> n & 0xf0) | c);
    str_add(out, b, n);
}

static uint64_t hash_bytes(Span s) {        // FNV-1a and a final mix
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < s.n; i++) h = (h ^ (uint8_t)s.p[i]) * 0x100000001b3u;
    return (h ^ h >> 32) * 0x9e3779b97f4a7c15u;
}

Span map_key(const Map *m, size_t i) {
    return (Span){ m->text.p + m->entries[i].at, m->entries[i].n };
}

// The slot that holds key, or the empty one where it belongs. cap > 0.
static uint32_t *map_slot(const Map *m, Span key, uint64_t hash) {
    for (size_t i = hash >> 20;; i++) {
        uint32_t *slot = &m->slots[i & (m->cap - 1)];
        if (!*slot) return slot;
        const MapEntry *e = &m->entries[*slot - 1];
        if (e->hash == hash && e->n == key.n && !memcmp(m->text.p + e->at, key.p, key.n))
            return slot;
    }
}

static void map_rehash(Map *m) {
    m->cap = m->cap ? cmul(m->cap, 2) : 32;
    if (m->cap > UINT32_MAX) die(1, "too many names: %zu", m->n);
    free(m->slots);
    m->slots = xalloc(m->cap, sizeof *m->slots);
    for (size_t i = 0; i < m->n; i++)
        *map_slot(m, map_key(m, i), m->entries[i].hash) = (uint32_t)i + 1;
}

// The entry of key, or NULL. The pointer is good until the next map_add.
MapEntry *map_find(const Map *m, Span key) {
    uint32_t *slot = m->cap ? map_slot(m, key, hash_bytes(key)) : NULL;
    return slot && *slot ? &m->entries[*slot - 1] : NULL;
}

// False, and nothing changed, if the key is there already.
bool map_add(Map *m, Span key, int64_t value) {
    if (m->n == m->cap / 2) map_rehash(m);
    uint64_t hash = hash_bytes(key);
    uint32_t *slot = map_slot(m, key, hash);
    if (*slot) return false;
    m->entries = grow(m->entries, m->n, sizeof *m->entries);
    m->entries[m->n] = (MapEntry){ m->text.n, key.n, hash, value };
    str_add(&m->text, key.p, key.n);
    *slot = (uint32_t)++m->n;
    return true;
}

void map_free(Map *m) {
    free(m->text.p);
    free(m->entries);
    free(m->slots);
    *m = (Map){ 0 };
}

// "DIR/FILE"; release with free().
static char *path_join(const char *dir, const char *file) {
    Str s = { 0 };
    str_puts(&s, dir);
    str_puts(&s, "/");
    str_puts(&s, file);
    return s.p;
}

// A small trained model travels in the program: the model when none is named. Its files have paths
// that no other file can have.
#define BUILT_IN "//built-in"
__asm__(".pushsection .rodata\n"
        "tiny_config: .incbin \"models/tiny/config.json\"\n"
        "tiny_sampling: .incbin \"models/tiny/generation_config.json\"\n"
        "tiny_tokenizer: .incbin \"models/tiny/tokenizer.json\"\n"
        "tiny_weights: .incbin \"models/tiny/model-00001-of-00001.safetensors\"\n"
        "tiny_end: .byte 0\n"
        ".popsection\n");
extern const char tiny_config[], tiny_sampling[], tiny_tokenizer[], tiny_weights[], tiny_end[];
static const struct { const char *path, *from, *to; } built_in[] = {
    { BUILT_IN "/config.json", tiny_config, tiny_sampling },
    { BUILT_IN "/generation_config.json", tiny_sampling, tiny_tokenizer },
    { BUILT_IN "/tokenizer.json", tiny_tokenizer, tiny_weights },
    { BUILT_IN "/model.safetensors", tiny_weights, tiny_end },
};

// A built-in file's bytes; p is NULL if the path is another's.
static Span built_in_file(const char *path) {
    for (size_t i = 0; i < COUNT(built_in); i++)
        if (!strcmp(path, built_in[i].path))
            return (Span){ built_in[i].from, (size_t)(built_in[i].to - built_in[i].from) };
    return (Span){ 0 };
}

static bool file_exists(const char *path) {
    return built_in_file(path).p || !access(path, F_OK);
}

// Of a shard of weights: the handler of SIGBUS finds those by their store.
static bool map_shard(const char *path, Span *out, Err *e) {
    struct stat st;
    void *p = "";
    Span own = built_in_file(path);
    if (own.p) {
        p = mmap(NULL, own.n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) return fail(e, "%s: cannot map: %s", path, strerror(errno));
        *out = (Span){ memcpy(p, own.p, own.n), own.n };
        return true;
    }
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);     // a FIFO must not hold us up
    if (fd < 0) return fail(e, "%s: %s", path, strerror(errno));
    bool known = !fstat(fd, &st), regular = known && S_ISREG(st.st_mode);
    if (regular && st.st_size) p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    int err = errno;
    close(fd);
    if (!regular) return fail(e, "%s: %s", path, known ? "not a regular file" : strerror(err));
    if (p == MAP_FAILED) return fail(e, "%s: cannot map: %s", path, strerror(err));
    *out = (Span){ p, (size_t)st.st_size };
    return true;
}

static struct { Span map; char path[512]; } last_mapped;    // for the handler of SIGBUS

// A file mapped read-only and private; release with unmap_file. An empty file gives n = 0.
bool map_file(const char *path, Span *out, Err *e) {
    if (!map_shard(path, out, e)) return false;
    last_mapped.map = *out;
    snprintf(last_mapped.path, sizeof last_mapped.path, "%s", path);
    return true;
}

void unmap_file(Span map) { if (map.n) munmap((void *)(uintptr_t)map.p, map.n); }

// Seconds on a clock that never jumps.
double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

// A progress line that overwrites itself; only where a person is watching.
void progress(const char *what, int64_t done, int64_t total) {
    if (!isatty(2)) return;
    int width = 30, full = total ? (int)(width * done / total) : width;
    fprintf(stderr, "\r# %s [%.*s%*s] %3d %%%s", what, full, "##############################",
            width - full, "", total ? (int)(100 * done / total) : 100, done >= total ? "\r\033[K" : "");
    fflush(stderr);
}

// ---------------------------------------------------------------------------
// types. Letters used in every shape: T rows (tokens) of a batch, D model dim, S hyper-connection
// streams, H heads, K head dim, R rope dims, Q q_lora_rank, G o_groups, L o_lora_rank, E experts, A
// active experts, F expert hidden dim, V vocabulary, I index heads, J index dim, M compress ratio

typedef enum { W_F32, W_BF16, W_INT8, W_INT4, W_FP8, W_FP4, N_FORMATS } Format;

// A matrix [n, k] in the checkpoint's own layout, y = W x. May lie at any byte address.
//   F32, BF16   w [n, k]
//   INT8, FP8   w [n, k] bytes,  s [ceil(n/128), ceil(k/128)] BF16 / E8M0
//   INT4, FP4   w [n, k/2] bytes (low nibble = even column), s [n, k/32] BF16 / E8M0
typedef struct {
    const void *w, *s;
    int n, k;
    Format fmt;
} Mat;

// Rows of activations: FP32 always, and (fast path) as INT8 in groups of 32 along k, last group
// short. Row t: x + t*ld, q + t*ldq (ldq = 32 * groups, zero padded), s + t*lds (lds = groups of
// one row).
typedef struct {
    float *x;       // [T, k]
    int8_t *q;      // [T, groups, 32]
    float *s;       // [T, groups] scale = absmax / 127
    // groups = ceil(k / 32); several segments (o_groups) are each padded on their own
    int k, groups;
    size_t ld, ldq, lds;
} Act;

// config.json. The ratio list has one entry per layer, then one per MTP layer.
typedef struct {
    int dim, n_layers, n_heads, head_dim, rope_dim, q_lora_rank, o_groups, o_lora_rank, window;
    int n_experts, n_active, expert_dim, n_hash_layers;
    int index_heads, index_dim, index_topk;
    int hc_mult, hc_iters;
    int vocab, max_ctx, n_mtp;
    int bos, eos;
    float hc_eps, norm_eps, route_scale, swiglu_limit;
    float rope_theta, compress_theta, yarn_factor, yarn_beta_fast, yarn_beta_slow;
    int yarn_ctx;               // original_max_position_embeddings
    int *ratio;                 // [n_layers + n_mtp] 0, 4 or 128
    int n_ratios;               // entries that config.json has
    bool dspark;                // 0731 releases: another MTP, whose tensors are skipped
    char quant[32];             // quantization_config.quant_method, "" if none
} Config;

// One hyper-connection: how the S streams are mixed into a sublayer's input, and its output back.
typedef struct {
    Mat fn;         // [(2+S)*S, S*D]   (hc_head: [S, S*D])
    float *base;    // [(2+S)*S]        (hc_head: [S])
    float *scale;   // [3] pre, post, comb   (hc_head: [1])
} Hyper;

// Pools M tokens (overlap: 2M, for M = 4) into one row of `out` dims.  c = 2 with overlap, else 1
typedef struct {
    Mat wkv, wgate;     // [c*out, D]
    float *ape;         // [M, c*out]
    float *norm;        // [out]
    int ratio, out;
} Compressor;

typedef struct {
    char name[16];                      // "layers.7", "mtp.0"
    int ratio;                          // M: 0, 4 or 128
    Hyper hc_attn, hc_ffn;
    float *attn_norm, *ffn_norm;        // [D]
    Mat wq_a, wq_b;                     // [Q, D], [H*K, Q]
    Mat wkv;                            // [K, D]
    Mat wo_a, wo_b;                     // [G*L, H*K/G], [D, G*L]
    float *q_norm, *kv_norm;            // [Q], [K]
    float *attn_sink;                   // [H]
    Compressor comp;                    // M > 0: out = K
    Compressor icomp;                   // M = 4: the indexer's, out = J
    Mat iwq_b, iproj;                   // M = 4: indexer.wq_b [I*J, Q], indexer.weights_proj [I, D]
    Mat gate;                           // [E, D]
    float *gate_bias;                   // [E], NULL on hash layers
    const int64_t *tid2eid;             // [V, A], NULL on scored layers
    Mat *w1, *w2, *w3;                  // [E] of [F, D], [D, F], [F, D]
    Mat sw1, sw2, sw3;                  // the shared expert
    size_t bytes, expert_bytes;         // as stored: all of it, its routed experts
} Layer;

// The draft layer (spec 10): predicts token t+2 from the streams at t and token t+1.
typedef struct {
    Layer block;
    Mat e_proj, h_proj;                 // [D, D]
    float *enorm, *hnorm, *norm;        // [D]
    Hyper hc_head;
} Mtp;

typedef struct {
    Mat embed, head;                    // [V, D]
    float *norm;                        // [D]
    Hyper hc_head;
    Layer *layers;                      // [n_layers]
    Mtp *mtp;                           // [n_mtp], NULL if the checkpoint has none
} Weights;

// What one session keeps in one layer. Rows of K (keys = values) and J (index keys): BF16, or FP32
// with --exact. A ring of n slots holds position p in slot p % n; `ring` = window + rows per call +
// slack, `cring` likewise.
typedef struct {
    void *win;          // [ring, K]       window rows
    void *comp;         // [ctx/M, K]      compressed rows (append-only)
    void *ikeys;        // [ctx/M, J]      index keys (M = 4)
    float *cin;         // [cring, 2, c*K] compressor inputs: kv, gate + ape
    float *icin;        // [cring, 2, c*J]
} Cache;

// One row of a batch. Rows of one session are consecutive positions in ascending order.
typedef struct {
    int token, slot, pos;   // slot: which session's caches
    int next;               // MTP only: the token at pos + 1
} Row;

// ---------------------------------------------------------------------------
// safetensors: u64 length, JSON header, data. A checkpoint is one file, or shards and an index.
// The data stay in the mapped files. The rules are safetensors' own.

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

// The tensor of that name, or NULL.
static const Tensor *store_find(const Store *s, const char *name) {
    return store_find_span(s, span_of(name));
}

static const Store *open_store;     // the last one opened: for the handler of SIGBUS

// The path of the shard that is mapped at addr, or NULL. Safe in a signal handler.
static const char *store_find_address(const Store *s, const void *addr) {
    for (int i = 0; i < s->n_shards; i++) {
        uintptr_t from = (uintptr_t)s->shards[i].map.p, at = (uintptr_t)addr;
        size_t whole_pages = (s->shards[i].map.n + 4095) & ~(size_t)4095;
        if (at >= from && at - from < whole_pages) return s->shards[i].path;
    }
    return NULL;
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
    if (open_store == s) open_store = NULL;
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
static bool shard_read(Store *s, int number, Err *e) {
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
    Shard sh = { .path = path_join(dir, file) };
    if (!map_shard(sh.path, &sh.map, e)) {
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

// Opens each shard where the index first names it. Every entry must be a tensor of its shard.
static void index_weight_map(Json *j, Store *s, const char *dir) {
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

static bool store_open_index(Store *s, Span text, const char *path, const char *dir, Err *e) {
    bool found = false;
    size_t surplus = 0;
    Str key = { 0 };
    Json j = json_open(text, path, e);
    for (json_object(&j); json_member(&j, &key);) {
        if (!str_is(&key, "weight_map")) json_skip(&j);
        else if (found) json_fail(&j, "weight_map twice");
        else index_weight_map(&j, s, dir), found = true;
    }
    free(key.p);
    if (!json_end(&j)) return false;
    if (!found) return fail(e, "%s: no weight_map", path);
    // harmless (nothing looks for them), but a sign that index and shards are not of one release
    for (size_t i = 0; i < s->n; i++) surplus += !s->names.entries[i].value;
    if (surplus) note("%s: %zu tensors in the shards are not in the index", path, surplus);
    return true;
}

// Opens the checkpoint in a directory: what model.safetensors.index.json lists, else
// model.safetensors. On an error *s is empty.
bool store_open(Store *s, const char *dir, Err *e) {
    Span text = { 0 };
    char *index = path_join(dir, "model.safetensors.index.json");
    char *single = path_join(dir, "model.safetensors");
    bool ok;
    *s = (Store){ 0 };
    open_store = s;
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

// ---------------------------------------------------------------------------
// config.json -> Config. Known keys with values that are not supported are refused by name; keys
// that say nothing about inference (dropout, dtype, versions ...) and unknown ones are ignored.

// One entry per layer, then one per MTP layer; what is missing at the end is 0.
static void config_ratios(Json *j, void *to) {
    Config *c = to;
    int64_t v = 0;
    for (json_array(j); json_item(j);) {
        Json at = *j;
        if (!json_int(j, INT64_MIN, INT64_MAX, &v)) return;
        if (v != 0 && v != 4 && v != 128) {
            j->p = at.p;
            json_fail(j, "entry %d: expected 0, 4 or 128, found %lld", c->n_ratios, (long long)v);
        }
        if (c->n_ratios == 4096) json_fail(j, "more than %d entries", c->n_ratios);
        c->ratio = grow(c->ratio, (size_t)c->n_ratios, sizeof *c->ratio);
        c->ratio[c->n_ratios++] = (int)v;
    }
}

// The bounds keep every product of two dimensions that belong together (H*K, S*D, G*L, I*J, M*c*K)
// below 2^31; V4-Pro's shape lies well inside.
#define C(field) offsetof(Config, field)
#define QUANT "quantization_config."
#define GROUP "quantization_config.config_groups.*.weights."
#define ROPE "rope_scaling."
static const Field config_fields[] = {
    { "model_type", J_FIXED, NEEDED, .values = { "\"deepseek_v4\"" } },
    { "hidden_size", J_INT, NEEDED, C(dim), .lo = 1, .hi = 1 << 16 },
    { "num_hidden_layers", J_INT, NEEDED, C(n_layers), .lo = 1, .hi = 1024 },
    { "num_attention_heads", J_INT, NEEDED, C(n_heads), .lo = 1, .hi = 1024 },
    { "head_dim", J_INT, NEEDED, C(head_dim), .lo = 2, .hi = 4096 },
    { "qk_rope_head_dim", J_INT, NEEDED, C(rope_dim), .lo = 2, .hi = 4096 },
    { "q_lora_rank", J_INT, NEEDED, C(q_lora_rank), .lo = 1, .hi = 1 << 16 },
    { "o_groups", J_INT, NEEDED, C(o_groups), .lo = 1, .hi = 1024 },
    { "o_lora_rank", J_INT, NEEDED, C(o_lora_rank), .lo = 1, .hi = 1 << 16 },
    { "sliding_window", J_INT, NEEDED, C(window), .lo = 1, .hi = 1 << 20 },
    { "n_routed_experts", J_INT, NEEDED, C(n_experts), .lo = 1, .hi = 4096 },
    { "num_experts_per_tok", J_INT, NEEDED, C(n_active), .lo = 1, .hi = 64 },
    { "moe_intermediate_size", J_INT, NEEDED, C(expert_dim), .lo = 1, .hi = 1 << 18 },
    { "num_hash_layers", J_INT, NEEDED, C(n_hash_layers), .lo = 0, .hi = 1024 },
    { "index_n_heads", J_INT, NEEDED, C(index_heads), .lo = 1, .hi = 1024 },
    { "index_head_dim", J_INT, NEEDED, C(index_dim), .lo = 2, .hi = 4096 },
    { "index_topk", J_INT, NEEDED, C(index_topk), .lo = 1, .hi = 1 << 20 },
    { "hc_mult", J_INT, NEEDED, C(hc_mult), .lo = 1, .hi = 16 },
    { "hc_sinkhorn_iters", J_INT, NEEDED, C(hc_iters), .lo = 1, .hi = 1000 },
    { "vocab_size", J_INT, NEEDED, C(vocab), .lo = 1, .hi = 1 << 24 },
    { "max_position_embeddings", J_INT, NEEDED, C(max_ctx), .lo = 1, .hi = 1 << 24 },
    { "num_nextn_predict_layers", J_INT, OPTIONAL, C(n_mtp), .lo = 0, .hi = 16 },
    { "bos_token_id", J_INT, OPTIONAL, C(bos), .lo = 0, .hi = 1 << 24 },
    { "eos_token_id", J_INT, OPTIONAL, C(eos), .lo = 0, .hi = 1 << 24 },
    { "compress_ratios", J_READ, NEEDED, .read = config_ratios },
    { "hc_eps", J_FLOAT, NEEDED, C(hc_eps), .lo = 1e-12, .hi = 1 },
    { "rms_norm_eps", J_FLOAT, NEEDED, C(norm_eps), .lo = 1e-12, .hi = 1 },
    { "routed_scaling_factor", J_FLOAT, NEEDED, C(route_scale), .lo = 1e-6, .hi = 1e6 },
    { "swiglu_limit", J_FLOAT, NEEDED, C(swiglu_limit), .lo = 1e-6, .hi = 1e30 },
    { "rope_theta", J_FLOAT, NEEDED, C(rope_theta), .lo = 1.001, .hi = 1e12 },
    { "compress_rope_theta", J_FLOAT, NEEDED, C(compress_theta), .lo = 1.001, .hi = 1e12 },
    { ROPE "type", J_FIXED, .values = { "\"yarn\"" } },
    { ROPE "rope_type", J_FIXED, .values = { "\"yarn\"" } },
    { ROPE "factor", J_FLOAT, WITHIN, C(yarn_factor), .lo = 1, .hi = 1e6 },
    { ROPE "beta_fast", J_FLOAT, OPTIONAL, C(yarn_beta_fast), .lo = 1e-6, .hi = 1e6 },
    { ROPE "beta_slow", J_FLOAT, OPTIONAL, C(yarn_beta_slow), .lo = 1e-6, .hi = 1e6 },
    { ROPE "original_max_position_embeddings", J_INT, WITHIN, C(yarn_ctx), .lo = 1, .hi = 1 << 24 },
    { "dspark_*", J_FOUND, OPTIONAL, .at = C(dspark) },
    // supported with these values only
    { "attention_bias", J_FIXED, .values = { "false" } },
    { "expert_dtype", J_FIXED,
      .values = { "\"fp4\"", "\"int4\"", "\"fp8\"", "\"int8\"", "\"bf16\"" } },
    { "hidden_act", J_FIXED, .values = { "\"silu\"" } },
    { "n_shared_experts", J_FIXED, .values = { "1" } },
    { "norm_topk_prob", J_FIXED, .values = { "true" } },
    { "num_key_value_heads", J_FIXED, .values = { "1" } },
    { "scoring_func", J_FIXED, .values = { "\"sqrtsoftplus\"" } },
    { "tie_word_embeddings", J_FIXED, .values = { "false" } },
    { "topk_method", J_FIXED, .values = { "\"noaux_tc\"" } },
    // which formats the weights claim to have; their dtypes decide later
    { QUANT "quant_method", J_FIXED, WITHIN, C(quant), .values = { "\"dsv4_int\"", "\"fp8\"" } },
    { QUANT "format", J_FIXED, .values = { "\"int_packed\"" } },
    { QUANT "fmt", J_FIXED, .values = { "\"e4m3\"" } },
    { QUANT "scale_fmt", J_FIXED, .values = { "\"ue8m0\"" } },
    { QUANT "weight_block_size", J_FIXED, .values = { "[128,128]" } },
    { GROUP "num_bits", J_FIXED, .values = { "4", "8" } },
    { GROUP "type", J_FIXED, .values = { "\"int\"" } },
    { GROUP "symmetric", J_FIXED, .values = { "true" } },
    { GROUP "group_size", J_FIXED, .values = { "32" } },
    { GROUP "block_size", J_FIXED, .values = { "[128,128]" } },
    { GROUP "strategy", J_FIXED, .values = { "\"group\"", "\"block\"" } },
};
#undef C

// V4.1 is another architecture; say so before its other values can be complained about.
static bool config_model_type(Span text, const char *path, Err *e) {
    static const Field field = { "model_type", J_TEXT, .need = NEEDED };
    Str type = { 0 };
    bool ok = table_file(text, path, &field, 1, &type, e);
    if (ok && (strstr(type.p, "v41") || strstr(type.p, "v4_1")))
        ok = fail(e, "%s: model_type %.40s: V4.1 is another architecture, not supported "
                  "(deepseek_v4 is)", path, type.p);
    free(type.p);
    return ok;
}

// What a single value cannot show: values that do not go together.
static bool config_check(const Config *c, const char *path, Err *e) {
    if (c->n_ratios < c->n_layers)
        return fail(e, "%s: compress_ratios has %d entries, num_hidden_layers is %d", path,
                    c->n_ratios, c->n_layers);
    for (int i = 0; i < c->n_layers; i++)
        if (c->ratio[i] && !c->yarn_ctx)
            return fail(e, "%s: no key rope_scaling, which layer %d with ratio %d needs", path, i,
                        c->ratio[i]);
    for (int i = c->n_layers; i < c->n_layers + c->n_mtp && !c->dspark; i++)
        if (c->ratio[i])
            return fail(e, "%s: compress_ratios[%d]: an MTP layer with ratio %d is not supported, "
                        "expected 0", path, i, c->ratio[i]);
    if (c->n_heads % c->o_groups)
        return fail(e, "%s: num_attention_heads %d is not a multiple of o_groups %d", path,
                    c->n_heads, c->o_groups);
    if (c->rope_dim % 2 || c->rope_dim > c->head_dim || c->rope_dim > c->index_dim)
        return fail(e, "%s: qk_rope_head_dim %d must be even and at most head_dim %d and "
                    "index_head_dim %d", path, c->rope_dim, c->head_dim, c->index_dim);
    if (c->n_active > c->n_experts)
        return fail(e, "%s: num_experts_per_tok %d of only n_routed_experts %d", path, c->n_active,
                    c->n_experts);
    if (c->n_hash_layers > c->n_layers)
        return fail(e, "%s: num_hash_layers %d of only num_hidden_layers %d", path,
                    c->n_hash_layers, c->n_layers);
    if (c->bos >= c->vocab || c->eos >= c->vocab)
        return fail(e, "%s: bos_token_id %d or eos_token_id %d is not below vocab_size %d", path,
                    c->bos, c->eos, c->vocab);
    if (c->yarn_beta_fast < c->yarn_beta_slow)
        return fail(e, "%s: rope_scaling: beta_fast %g is below beta_slow %g", path,
                    (double)c->yarn_beta_fast, (double)c->yarn_beta_slow);
    return true;
}

static void config_free(Config *c) {
    free(c->ratio);
    *c = (Config){ 0 };
}

// Reads the text of a config.json; path is for messages. On an error *c holds nothing.
static bool config_read(Config *c, Span text, const char *path, Err *e) {
    *c = (Config){ .bos = -1, .eos = -1, .yarn_factor = 1, .yarn_beta_fast = 32,
                   .yarn_beta_slow = 1 };
    bool ok = config_model_type(text, path, e) &&
              table_file(text, path, config_fields, COUNT(config_fields), c, e);
    for (int n = c->n_ratios; ok && n < c->n_layers + c->n_mtp; n++)
        c->ratio = grow(c->ratio, (size_t)n, sizeof *c->ratio);
    ok = ok && config_check(c, path, e);
    if (!c->yarn_ctx) c->yarn_ctx = c->max_ctx;     // no rope_scaling: no layer uses it
    if (!ok) config_free(c);
    return ok;
}

// Reads DIR/config.json.
static bool config_open(Config *c, const char *dir, Err *e) {
    Span text = { 0 };
    char *path = path_join(dir, "config.json");
    bool ok = map_file(path, &text, e) && config_read(c, text, path, e);
    unmap_file(text);
    free(path);
    return ok;
}

// What apps/convert.c needs of a config.json.
bool config_brief(ConfigBrief *b, const char *dir, Err *e) {
    Config c;
    if (!config_open(&c, dir, e)) return false;
    *b = (ConfigBrief){ c.n_layers, c.n_hash_layers, c.n_experts, "" };
    memcpy(b->quant, c.quant, sizeof b->quant);
    config_free(&c);
    return true;
}

// ---------------------------------------------------------------------------
// tokenizer: DeepSeek-V4's tokenizer.json, byte-level BPE behind a four-step pre-tokenizer.
// Added tokens are found by their content; nothing here knows an id.


void ids_add(Ids *ids, int id) {
    ids->p = grow(ids->p, ids->n, sizeof *ids->p);
    ids->p[ids->n++] = id;
}

// Classes of code points (Unicode 16.0): L and M, N, P and S, White_Space.
enum { C_OTHER, C_LETTER, C_NUMBER, C_PUNCT, C_SPACE };

// Runs of code points of one class, packed by tools/unicode_table.py, which explains the form.
static const char unicode_runs[] =
    "C$6G%&_$J$;I&8I&08&G&&F$%($1*#%,&&$.#^%$^&$I]$0Q$X$5<%$%D%U1$)*/$%2)%$-&#&O%&K-$M4$U8&W'*#8E("
    "((-$S($%$)$)$%BK&2/(D%I$M$$$-b*G$/Y/$A&%I$$9G$.(%X$(K**S/Z$H$R(0%*#(Y(*^$$O&*%$K$6`%$9BK,&C3("
    "J$#M%&?*'*W%&;&#./*C$*'*/B#2'&3*H$*(:'%$%*+&72'*W%&;&'&'&'*#&32'*+.#>/&#>H$:$H$+&C$&+&W%&;&'&"
    "3*G$&+&+*#_$/*H$'<;&+&?*'*W%&;&'&3*C$*'*+>+2'&3*H$#%7I$'&7.+&/.'&#&'.'.+.O$23.+&/*#:#Z$T$?4S$"
    "&+&[%&`$*C$&+&/>'&+*#*/*H$=%>#1$A&+&[%&G$&3*C$&+&/>':'&/*H$%+R$S$&+&K)&+&3$0/;6*L%#9&+&G%.`%&"
    "C$&#*;.#27&#&?:H$)'$P$G*2%^$$J$'T''&#&3&`%&#&[%*3&#&;&H$)/c&#]%)8R%#%$%$%0I$&O'2O%$I%&O'&A%8$"
    "U$T'`*G$7b*G$2(Y'&#6#*K($UL$&/*;&#&/*C(&/*C'&/*;&#&/*[$&C*&/*K+*+D$R%-`$H$8W-*7*%QP%(E%%H&(,K"
    ",,.B>W%F$W%(D$O%R$S$&+&'R$O-,%0)*H$9H$9M$-&#G$9C.>K(6W+J$[&&O$2O$2%,)J$Z&*3N$O(2G&:L$-I'Q&*)^"
    "*&S&*#G$9H$9=%8([&F)S,&)J$C%E$P$b(G$J*B1b).5J$-+G$R'(M$6K(*+@@+$^'6WE%*7*W'*7*?&#&#&#&[&*S)&;"
    "$%,-&;,1*7&-U$,(+&;($N$3b%'3&_(#`$$&*83%G$3$S$.E']$C'_$)%0%(I$$%,58%$%$%$1$M$(1450%$N)*3'0IV%"
    "X%M$T%P*W,Z%WQ%Z&`_&(b&$E0U?8E$61&'Y'&#6#*`)>#$X$`%F$;&;&;&;&;&;&;&;&`&](%X(H'I&$E.P$Y=H&b$#2"
    ")#C&F$:$5(.*,$W-*'(-$I.$16K(&W.&)2G$b&X'D$%b$]&$H$W&B#_$`&J$['_$`J$bZ<a*UTY%.^)D$W((UD$,b$G$*"
    "R%K)$I$$^/G$*8@^%E$(^/(M+*'&#&?V%W)0%.8/8O)0@W+B)J$9`%,%$-G$R'(Q'N$%U&.C+T$$#G$1)b$G$6&[)F$W$"
    "*H$)1^%,E,c%+(b$(5J$7*7*7F$;&;&K($Y$(0K2$)*H$9OWN$R$[%2C)RCD$WP$*G0Z';R$36O$$U$&3&#&'&'&O0D%a"
    "$KP$H%b**W)>%a&O$0b$H$8`$L'$M%$103&[32^$J$;I&8I&L$E..7*7*7*+.=$=T$)(O$&G&&K%&'&[$*W$J'K26-0T("
    "-E$F*C%*+$U$,%](U(%J3S&.C)_$#K&1`&/E$O%#B#5K(6W&&%Q'2?$6I(W6*H$9O'2O'2`'BO)N$%M$&[$&;&'&K$&[$"
    "&;&'.O)R$[I$F$W%J$?c%7&G(&C$V+7*#&O(&'.#*[%&%B_%(>_&BD$b(K%&'64Z%7-%I&6%a*`)2(*`$)X(2&'6?&+&S"
    "&*+2#C$=E$<S&'#U&+b&?$Y&24;D$W).=Y%*@N%6@J%>1P$<b,C,_)K)V$K)>8c'BH$9H$R&.3$^%B)a<]&%G(&'$('c$"
    "+_)C'G$&BC'/3X%W%0X'S%;Q%[%F$[+<0X&:F$O*($1%V$C&>H$9S)&H$/1BO'(%F$S+01$)G$&$%,$P%M$G%&S'81Z*;"
    "&#&/&[$&G$$8K*6H$9/&?*'*W%&;&'&3&G$*'*+*#:#6;*;.3N$G$&#*#&W'&G$&#*#&/&?($)@'V&K,4J$'$%1Z&W+$%"
    "BH$Y7W)*C$]%9J'C+,%N$H$9U$L%C*$8H$9P%Q&K&*[$2P$/=F:K*$P/`*K%Q$?*#*?&'&W&&'*C$,D$H$Y+?*W(*?$)N"
    "&[*@%BG,,%4T$C,>I$X9C'$X$H$9C$&S(&C$4H$T&-)Y&*W%&W$F,;&'&O(.#&'&C$BH$97&'&S'&'&7>H$YI$[%(<C%&"
    "C(.3T$J$&V-#_$T%S&T$%IV&Z/]0%5L$O;RL-C/(T$`H'c$W%J$KV26[K%FZ=`(G$Y[)CJ%>[&&H$1)^,&H$9W&*3$H$["
    ")D$1(H$H$%<%S%6K%cX$S(,J$Y;`*[%/T/K,2C*>C%c*'$)N$'Z$`b:BW^'F(G$_`E$/&;&'&KG$_$#V&+*#Z$/BOT$RC"
    ",K06S$.C$>G$*%)$aN2b@J$9QY$P,W(*[%F$Q1P*YAH$^'(Q*5,9B?(=X&1T*T%I+-$H2P%Q$P%Q$^-D$D&^3S-&[+&'*"
    "#*'*/&O$&#&;&C+&/*?&;&O&&/&3&#.;&OM$*C&$E&$^&$E&$^&$E&$^&$E&$^&$E&$A*H)`c$^)0I)@%X$%<]$3&[$cL"
    "'[&:7V=;&C%*;&'&36W*F'#c0S(.W$*H$1#$aJ$[&F%`(G$5%a]$`&G$Y=C'G$1%a_$;&/&'&[$&S;*D$>F(O,2H$1)DE"
    "&L*#.#2Q,T(#_$I;/&K&&'&#*#&G$&/&#&#:#2#&#&#&+&'&#*#&#&#&#&#&'&#*/&;&/&/&#&G$&C%6+&3&C%R))XD$Q"
    "(0Q/P$^$(^$$^$$U'H$T$C7a)U&T$Q(0E$<)X$9H6b^&0E%,U$,^10^.8Q$0%]$Q$0b)@I$8b'@Y&(Q$0)X*QM$P$Y$(U"
    "$,I$4b)<^$(M$8E$<M5$Q.J$YC'`_I(c&GJ3:W>*GS9Z$CI@_$WP%JW,WF%J`(KL66`N3cLaY%`@";

enum { N_CLASSES = 0xe0200, TOKEN_BYTES = 4096 };

static void unpack_classes(uint8_t *cls) {      // [N_CLASSES]
    size_t at = 0;
    int now = C_SPACE;
    for (const char *p = unicode_runs; *p;) {
        uint32_t run = 0, digit = 32;
        for (int shift = 0; digit & 32; shift += 5) {
            digit = (uint32_t)(*p - (*p > '\\' ? '$' : '#'));
            run |= (digit & 31) << shift;
            p++;
        }
        now = (now + 1 + (int)(run & 3)) % 5;
        for (uint32_t n = (run >> 2) + 1; n > 0; n--) cls[at++] = (uint8_t)now;
    }
}

typedef struct { uint8_t byte; int child, next, id; } Node; // of a trie: next sibling; token or -1

struct Tokenizer {
    int n;                      // tokens
    Str bytes;                  // the tokens' bytes, one after the other
    size_t *start;              // [n + 1] where each begins
    uint8_t *flags;             // [n] of enum below
    int byte_id[256];           // the token of each single byte
    Map merges;                 // left and right id, as 8 bytes -> rank << 32 | id of both together
    Node *nodes;                // added tokens; root 0: not `normalized`, root 1: the others
    int n_nodes;
    uint8_t *cls;               // [N_CLASSES] class of each code point; C_OTHER above
    int bos, eos, user, assistant, think, end_think;
};

enum { TOK_ADDED = 1, TOK_SPECIAL = 2, TOK_NORMALIZED = 4 };

// The bytes of a token. The id must be in 0 .. n-1.
static Span tok_bytes(const Tokenizer *t, int id) {
    return (Span){ t->bytes.p + t->start[id], t->start[id + 1] - t->start[id] };
}

static void tok_free(Tokenizer *t) {
    free(t->bytes.p);
    free(t->start);
    free(t->flags);
    map_free(&t->merges);
    free(t->nodes);
    free(t->cls);
    *t = (Tokenizer){ 0 };
}

// ---- loading

typedef struct {
    Map vocab;                  // text -> id
    Map added;                  // text -> id | flags << 32
    Span merges;                // read when the vocabulary is known
} TokFile;

// Adds a token's text to one of the two maps.
static void load_token(Json *j, Map *to, const Str *text, int64_t value) {
    if (!text->n || text->n > TOKEN_BYTES)
        json_fail(j, "token \"%.*s\": %zu bytes, not 1 to %d", SHOWN(*text), text->n, TOKEN_BYTES);
    else if (!j->bad && !map_add(to, str_span(text), value))
        json_fail(j, "token \"%.*s\" is there twice", SHOWN(*text));
}

static void load_vocab(Json *j, void *to) {
    Str text = { 0 };
    int64_t id = 0;
    for (json_object(j); json_member(j, &text);) {
        const char *outer = j->at;
        j->at = text.p;                     // an error of the id names its token
        json_int(j, 0, INT_MAX, &id);
        j->at = outer;
        load_token(j, &((TokFile *)to)->vocab, &text, id);
    }
    free(text.p);
}

typedef struct { int id; Str content; bool special, normalized; } Added;
static const Field added_fields[] = {
    { "id", J_INT, NEEDED, offsetof(Added, id), .lo = 0, .hi = INT_MAX },
    { "content", J_TEXT, NEEDED, .at = offsetof(Added, content) },
    { "special", J_BOOL, NEEDED, .at = offsetof(Added, special) },
    { "normalized", J_BOOL, NEEDED, .at = offsetof(Added, normalized) },
    { "single_word", J_FIXED, NEEDED, .values = { "false" } },
    { "lstrip", J_FIXED, NEEDED, .values = { "false" } },
    { "rstrip", J_FIXED, NEEDED, .values = { "false" } },
    { "*", .kind = J_FIXED },           // nothing else
};

static void load_added(Json *j, void *to) {
    for (json_array(j); json_item(j);) {
        Added a = { 0 };
        table_read(j, added_fields, COUNT(added_fields), &a);
        int64_t flags = TOK_ADDED;
        if (a.special) flags |= TOK_SPECIAL;
        if (a.normalized) flags |= TOK_NORMALIZED;
        load_token(j, &((TokFile *)to)->added, &a.content, a.id | flags << 32);
        free(a.content.p);
    }
}

#define STEP(i) "pre_tokenizer.pretokenizers[" #i "]"
#define SPLIT(i, regex) \
    { STEP(i) ".type", J_FIXED, NEEDED, .values = { "\"Split\"" } }, \
    { STEP(i) ".pattern.Regex", J_FIXED, NEEDED, .values = { "\"" regex "\"" } }, \
    { STEP(i) ".behavior", J_FIXED, NEEDED, .values = { "\"Isolated\"" } }, \
    { STEP(i) ".invert", J_FIXED, NEEDED, .values = { "false" } }

// What makes the file DeepSeek-V4's. Vocabulary, merges and added tokens are free.
static const Field tokenizer_fields[] = {
    { "added_tokens", J_READ, NEEDED, .read = load_added },
    { "model.type", J_FIXED, NEEDED, .values = { "\"BPE\"" } },
    { "model.vocab", J_READ, NEEDED, .read = load_vocab },
    { "model.merges", J_RAW, NEEDED, .at = offsetof(TokFile, merges) },
    { "model.*", J_FIXED, .values = { "false", "\"\"" } },      // all other options off
    { "normalizer.type", J_FIXED, WITHIN, .values = { "\"Sequence\"" } },
    { "normalizer.normalizers", J_FIXED, WITHIN, .values = { "[]" } },
    { "normalizer.*", .kind = J_FIXED },
    { "pre_tokenizer.type", J_FIXED, NEEDED, .values = { "\"Sequence\"" } },
    SPLIT(0, "\\p{N}{1,3}"),
    SPLIT(1, "[一-龥\u3040-ゟ゠-ヿ]+"),
    SPLIT(2, "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
             "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*"
             "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"),
    { STEP(3) ".type", J_FIXED, NEEDED, .values = { "\"ByteLevel\"" } },
    { STEP(3) ".add_prefix_space", J_FIXED, NEEDED, .values = { "false" } },
    { STEP(3) ".trim_offsets", J_FIXED, NEEDED, .values = { "true" } },
    { STEP(3) ".use_regex", J_FIXED, NEEDED, .values = { "false" } },
    { "pre_tokenizer.*", .kind = J_FIXED },
    // what else these two hold changes no byte
    { "decoder.type", J_FIXED, NEEDED, .values = { "\"ByteLevel\"" } },
    { "post_processor.type", J_FIXED, WITHIN, .values = { "\"ByteLevel\"" } },
    { "truncation", J_FIXED, .values = { "null" } },
    { "padding", J_FIXED, .values = { "null" } },
};

// Who has which id: text [n] as in the file. Ids must be 0 .. n-1 without a gap, each of one text.
static bool claim_ids(Tokenizer *t, const TokFile *l, Span *text, const char *name, Err *e) {
    for (size_t i = 0; i < l->vocab.n + l->added.n; i++) {
        bool is_added = i >= l->vocab.n;
        const Map *m = is_added ? &l->added : &l->vocab;
        const MapEntry *own = &m->entries[is_added ? i - l->vocab.n : i];
        Span key = { m->text.p + own->at, own->n };
        size_t id = own->value & UINT32_MAX;
        // a text in both lists is one token
        const MapEntry *twin = is_added ? map_find(&l->vocab, key) : NULL;
        if (twin && twin->value != (int64_t)id)
            return fail(e, "%s: added token \"%.*s\" has id %zu, the vocabulary says %lld", name,
                        SHOWN(key), id, (long long)twin->value);
        if (id >= (size_t)t->n)
            return fail(e, "%s: token \"%.*s\" has id %zu of %d tokens: a gap in the ids", name,
                        SHOWN(key), id, t->n);
        if (!twin && text[id].p)
            return fail(e, "%s: id %zu belongs to \"%.*s\" and to \"%.*s\"", name, id,
                        SHOWN(text[id]), SHOWN(key));
        text[id] = key;
        t->flags[id] = (uint8_t)(own->value >> 32);
    }
    return true;
}

// The letter that stands for a byte in tokenizer.json: printable Latin-1 for itself, the other 68
// bytes in order from U+0100 on.
static uint32_t byte_letter(uint32_t b) {
    if (b <= 0x20) return 0x100 + b;
    if (b >= 0x7f && b <= 0xa0) return 0x100 + 33 + b - 0x7f;
    return b == 0xad ? 0x143 : b;
}

// Gives every id its bytes, and every byte its id.
static bool load_bytes(Tokenizer *t, const Map *vocab, const Span *text, const char *name, Err *e) {
    int letter[0x144];                      // -> byte, -1: none
    memset(letter, -1, sizeof letter);
    for (uint32_t b = 0; b < 256; b++) {
        Str s = { 0 };
        utf8_put(&s, byte_letter(b));
        const MapEntry *found = map_find(vocab, str_span(&s));
        free(s.p);
        if (!found) return fail(e, "%s: no token for the single byte 0x%02x", name, b);
        t->byte_id[b] = (int)found->value;
        letter[byte_letter(b)] = (int)b;
    }
    for (int id = 0; id < t->n; id++) {
        Span s = text[id];
        if (t->flags[id]) str_add(&t->bytes, s.p, s.n);
        else for (size_t i = 0; i < s.n;) {
            int32_t cp;
            i += utf8_next(s.p + i, s.n - i, &cp);
            if (cp >= 0x144 || letter[cp] < 0)
                return fail(e, "%s: token \"%.*s\" holds U+%04X, which stands for no byte", name,
                            SHOWN(s), cp);
            str_add(&t->bytes, &(char){ (char)letter[cp] }, 1);
        }
        t->start[id + 1] = t->bytes.n;
    }
    return true;
}

// One merge, "left right" or ["left", "right"].
static bool read_merge(Json *j, Str *left, Str *right) {
    right->n = 0;
    if (json_peek(j) == '[')
        return (json_array(j) && json_item(j) && json_string(j, left) && json_item(j) &&
                json_string(j, right) && !json_item(j) && !j->bad) ||
               json_expected(j, "two strings");
    if (!json_string(j, left)) return false;
    char *space = memchr(left->p, ' ', left->n);
    if (!space) return json_fail(j, "merge \"%.*s\" without a space", SHOWN(*left));
    str_add(right, space + 1, left->n - (size_t)(space + 1 - left->p));
    left->n = (size_t)(space - left->p);
    return true;
}

// The key of a pair of ids in t->merges.
static Span pair_key(const uint32_t id[static 2]) {
    return (Span){ (const char *)id, 2 * sizeof *id };
}

// "merges", best rank first. A result is always longer than its parts: no list can loop.
static bool load_merges(Tokenizer *t, Json *j, const Map *vocab) {
    Str part[3] = { { 0 } };                // left, right, both
    for (json_array(j); json_item(j) && read_merge(j, &part[0], &part[1]);) {
        uint32_t id[3] = { 0 };
        size_t rank = t->merges.n;
        part[2].n = 0;
        str_add(&part[2], part[0].p, part[0].n);
        str_add(&part[2], part[1].p, part[1].n);
        for (int i = 0; i < 3; i++) {
            const MapEntry *e = map_find(vocab, str_span(&part[i]));
            if (e) id[i] = (uint32_t)e->value;
            else json_fail(j, "merge %zu: \"%.*s\" is not in the vocabulary", rank, SHOWN(part[i]));
        }
        if (!map_add(&t->merges, pair_key(id), (int64_t)(rank << 32 | id[2])))
            json_fail(j, "merge %zu repeats merge %lld", rank,
                      (long long)map_find(&t->merges, pair_key(id))->value >> 32);
    }
    for (int i = 0; i < 3; i++) free(part[i].p);
    return !j->bad;
}

static void trie_add(Tokenizer *t, int node, Span text, int id) {
    for (size_t i = 0; i < text.n; i++) {
        int *link = &t->nodes[node].child;
        while (*link && t->nodes[*link].byte != (uint8_t)text.p[i]) link = &t->nodes[*link].next;
        if (!*link) {
            *link = t->n_nodes;
            t->nodes[t->n_nodes++] = (Node){ (uint8_t)text.p[i], 0, 0, -1 };
        }
        node = *link;
    }
    t->nodes[node].id = id;
}

// The longest added token at the start of s, from the trie with that root; -1 if there is none.
static int trie_find(const Tokenizer *t, int root, Span s) {
    int id = -1, node = root;
    for (size_t i = 0; i < s.n; i++) {
        node = t->nodes[node].child;
        while (node && t->nodes[node].byte != (uint8_t)s.p[i]) node = t->nodes[node].next;
        if (!node) break;
        if (t->nodes[node].id >= 0) id = t->nodes[node].id;
    }
    return id;
}

// Fills the tries, and finds the tokens that the program itself needs.
static bool load_tries(Tokenizer *t, const Map *added, const char *name, Err *e) {
    const struct { const char *content; int *id; } wanted[] = {
        { BOS_TEXT, &t->bos }, { EOS_TEXT, &t->eos }, { "<｜User｜>", &t->user },
        { "<｜Assistant｜>", &t->assistant }, { "<think>", &t->think }, { "</think>", &t->end_think },
    };
    t->nodes = xalloc(cadd(added->text.n, 2), sizeof *t->nodes);
    t->nodes[0].id = t->nodes[1].id = -1;
    t->n_nodes = 2;
    for (size_t i = 0; i < added->n; i++) {
        int64_t value = added->entries[i].value;
        int root = value >> 32 & TOK_NORMALIZED ? 1 : 0;
        trie_add(t, root, map_key(added, i), (int)(value & INT_MAX));
    }
    for (size_t i = 0; i < COUNT(wanted); i++) {
        const MapEntry *found = map_find(added, span_of(wanted[i].content));
        if (!found) return fail(e, "%s: the added token %s is missing", name, wanted[i].content);
        *wanted[i].id = (int)(found->value & INT_MAX);
    }
    return true;
}

// Reads tokenizer.json; `name` is its path, for errors. Release with tok_free.
static bool tok_load(Tokenizer *t, Span file, const char *name, Err *e) {
    TokFile l = { 0 };
    Json j = json_open(file, name, e);
    *t = (Tokenizer){ 0 };
    bool ok = table_read(&j, tokenizer_fields, COUNT(tokenizer_fields), &l) && json_end(&j);
    t->n = (int)l.vocab.n;
    for (size_t i = 0; i < l.added.n; i++) t->n += !map_find(&l.vocab, map_key(&l.added, i));
    if (ok) {
        Json merges = json_inside(&j, l.merges);
        Span *text = xalloc((size_t)t->n, sizeof *text);
        t->start = xalloc((size_t)t->n + 1, sizeof *t->start);
        t->flags = xalloc((size_t)t->n, 1);
        t->cls = xalloc(N_CLASSES, 1);
        unpack_classes(t->cls);
        ok = claim_ids(t, &l, text, name, e) && load_bytes(t, &l.vocab, text, name, e) &&
             load_tries(t, &l.added, name, e) && load_merges(t, &merges, &l.vocab);
        free(text);
    }
    map_free(&l.vocab);
    map_free(&l.added);
    if (!ok) tok_free(t);
    return ok;
}

// ---- text -> ids

typedef struct { int32_t cp; int cls; size_t n; } Char;     // n bytes; cls -1: the piece ends here

static Char char_at(const Tokenizer *t, Span s, size_t i) {
    Char c = { -1, -1, 0 };
    if (i >= s.n) return c;
    c.n = utf8_next(s.p + i, s.n - i, &c.cp);
    c.cls = c.cp < N_CLASSES ? t->cls[c.cp] : C_OTHER;
    return c;
}

static bool is_newline(int32_t cp) { return cp == '\n' || cp == '\r'; }
static bool is_ascii_letter(int32_t cp) { return (cp | 32) >= 'a' && (cp | 32) <= 'z'; }

// Which class of steps 1 and 2: numbers, the CJK and kana range, all else.
static int coarse_class(Char c) {
    if (c.cls == C_NUMBER) return 1;
    return (c.cp >= 0x4e00 && c.cp <= 0x9fa5) || (c.cp >= 0x3040 && c.cp <= 0x30ff) ? 2 : 0;
}

// The end of the run of class cls that begins at i.
static size_t run_end(const Tokenizer *t, Span s, size_t i, int cls) {
    for (Char c; (c = char_at(t, s, i)).cls == cls;) i += c.n;
    return i;
}

// Step 3 on a piece of steps 1 and 2: the end of its part that begins at i. The comments name the
// alternatives of the third regex in their order.
static size_t part_end(const Tokenizer *t, Span s, size_t i) {
    Char c = char_at(t, s, i), next = char_at(t, s, i + c.n);
    size_t j = i + c.n;
    if (c.cls == C_PUNCT && c.cp < 128 && is_ascii_letter(next.cp)) {   // [!-~][A-Za-z]+
        while (is_ascii_letter(char_at(t, s, j).cp)) j++;
        return j;
    }
    if (c.cls == C_LETTER || (next.cls == C_LETTER && c.cls != C_PUNCT && !is_newline(c.cp)))
        return run_end(t, s, j, C_LETTER);                              // .?[\p{L}\p{M}]+
    if (c.cls == C_PUNCT || (c.cp == ' ' && next.cls == C_PUNCT)) {     // ?[\p{P}\p{S}]+[\r\n]*
        j = run_end(t, s, j, C_PUNCT);
        while (is_newline(char_at(t, s, j).cp)) j++;
        return j;
    }
    if (c.cls == C_SPACE) {
        size_t newline = 0, last = i;
        for (j = i; (c = char_at(t, s, j)).cls == C_SPACE; j += c.n) {
            last = j;
            if (is_newline(c.cp)) newline = j + 1;
        }
        if (newline) return newline;                                    // \s*[\r\n]+
        return j == s.n || last == i ? j : last;                        // \s+(?!\S) or \s+
    }
    for (; (c = char_at(t, s, j)).cls == C_OTHER; j += c.n)             // no match: a gap is a part
        if (char_at(t, s, j + c.n).cls == C_LETTER) break;
    return j;
}

// A heap of numbers, the smallest on top.
typedef struct { uint64_t *p; size_t n, cap; } Heap;

static void heap_push(Heap *h, uint64_t key) {
    if (h->n == h->cap) {
        h->cap = 2 * h->cap + 256;
        h->p = realloc(h->p, cmul(h->cap, sizeof *h->p));
        if (!h->p) die(1, "out of memory: a heap of %zu", h->cap);
    }
    size_t i = h->n++;
    for (; i > 0 && h->p[(i - 1) / 2] > key; i = (i - 1) / 2) h->p[i] = h->p[(i - 1) / 2];
    h->p[i] = key;
}

static uint64_t heap_pop(Heap *h) {
    uint64_t top = h->p[0], key = h->p[--h->n];
    size_t i = 0;
    for (size_t k; (k = 2 * i + 1) < h->n; i = k) {
        if (k + 1 < h->n && h->p[k + 1] < h->p[k]) k++;
        if (h->p[k] >= key) break;
        h->p[i] = h->p[k];
    }
    h->p[i] = key;
    return top;
}

// A byte-pair encoding at work: a linked list of symbols and a heap of possible merges (rank << 32
// | place of the left symbol), so that a piece of n bytes takes O(n log n).
enum { NO_RANK = UINT32_MAX, MAX_PIECE = 1 << 30 };
typedef struct { uint32_t id, prev, next, rank, result; } Symbol;   // rank, result: with the next
typedef struct {
    const Tokenizer *t;
    Ids *out;
    Symbol *sym;        // [cap]
    size_t cap;
    Heap heap;
} Bpe;

// Looks up the pair of symbol i and the one after it, n = past the last one.
static void bpe_pair(Bpe *b, uint32_t i, uint32_t n) {
    Symbol *s = &b->sym[i];
    uint32_t pair[2] = { s->id, s->next < n ? b->sym[s->next].id : 0 };
    const MapEntry *e = s->next < n ? map_find(&b->t->merges, pair_key(pair)) : NULL;
    s->rank = e ? (uint32_t)(e->value >> 32) : NO_RANK;
    if (!e) return;
    s->result = (uint32_t)e->value;
    heap_push(&b->heap, (uint64_t)s->rank << 32 | i);
}

static void bpe(Bpe *b, Span piece) {
    for (; piece.n > MAX_PIECE; piece.p += MAX_PIECE, piece.n -= MAX_PIECE)
        bpe(b, (Span){ piece.p, MAX_PIECE });
    uint32_t n = (uint32_t)piece.n;
    if (n > b->cap) {
        free(b->sym);
        b->cap = n < 256 ? 256 : n;
        b->sym = xalloc(b->cap, sizeof *b->sym);
    }
    for (uint32_t i = 0; i < n; i++) {
        int id = b->t->byte_id[(uint8_t)piece.p[i]];
        b->sym[i] = (Symbol){ (uint32_t)id, i - 1, i + 1, NO_RANK, 0 };
    }
    for (uint32_t i = 0; i < n; i++) bpe_pair(b, i, n);
    while (b->heap.n) {
        uint64_t key = heap_pop(&b->heap);
        Symbol *s = &b->sym[(uint32_t)key];
        if (s->rank != key >> 32) continue;             // one of the two has been merged since
        b->sym[s->next].rank = NO_RANK;
        s->id = s->result;
        s->next = b->sym[s->next].next;
        if (s->next < n) b->sym[s->next].prev = (uint32_t)key;
        bpe_pair(b, (uint32_t)key, n);
        if ((uint32_t)key > 0) bpe_pair(b, s->prev, n);
    }
    for (uint32_t i = 0; i < n; i = b->sym[i].next) ids_add(b->out, (int)b->sym[i].id);
}

// A stretch without added tokens: steps 1 and 2 cut it: threes of digits, runs of CJK, others.
static void encode_text(Bpe *b, Span s) {
    for (size_t i = 0, j; i < s.n; i = j) {
        Char c = char_at(b->t, s, i);
        int coarse = coarse_class(c), n = 0;
        for (j = i; j < s.n && (n < 3 || coarse != 1); j += c.n, n++)
            if (coarse_class(c = char_at(b->t, s, j)) != coarse) break;
        Span piece = { s.p + i, j - i };
        for (size_t k = 0, end; k < piece.n; k = end) {
            end = coarse == 1 ? piece.n : part_end(b->t, piece, k);
            bpe(b, (Span){ piece.p + k, end - k });
        }
    }
}

// Added tokens, leftmost longest: those that are not `normalized`, then the others in what is left.
static void encode_added(Bpe *b, Span s, int root) {
    size_t from = 0, i = 0;
    if (root == 2) {
        encode_text(b, s);
        return;
    }
    while (i < s.n) {
        int id = trie_find(b->t, root, span_from(s, i));
        if (id >= 0) {
            encode_added(b, (Span){ s.p + from, i - from }, root + 1);
            ids_add(b->out, id);
            from = i + tok_bytes(b->t, id).n;
        }
        i = id >= 0 ? from : i + 1;
    }
    encode_added(b, span_from(s, from), root + 1);
}

// Appends what is certain, each maximal invalid part as U+FFFD; at most 3 bytes are held back.
static void utf8_feed(Utf8 *u, Span s, Str *out) {
    for (size_t i = 0; i < s.n; i++) {
        u->tail[u->n++] = s.p[i];
        while (u->n) {
            int32_t cp;
            size_t len = utf8_next(u->tail, u->n, &cp);
            if (cp == -2) break;
            str_add(out, cp < 0 ? "\uFFFD" : u->tail, cp < 0 ? 3 : len);
            memmove(u->tail, u->tail + len, u->n -= len);
        }
    }
}

void utf8_finish(Utf8 *u, Str *out) {
    if (u->n) str_puts(out, "\uFFFD");
    u->n = 0;
}

// Appends the ids of a text of any bytes; parts that are not UTF-8 count as U+FFFD. Nothing is put
// in front. With `special`, added tokens are recognised wherever they are, else they are just text.
// Needs some 50 bytes of memory for each byte of the longest word.
void tok_encode(const Tokenizer *t, Span text, bool special, Ids *out) {
    Bpe b = { .t = t, .out = out };
    Str fixed = { 0 };
    Utf8 u = { 0 };
    utf8_feed(&u, text, &fixed);
    utf8_finish(&u, &fixed);
    encode_added(&b, str_span(&fixed), special ? 0 : 2);
    free(fixed.p);
    free(b.sym);
    free(b.heap.p);
}

// ---- ids -> text

// Streams one token; with `skip_special` those marked so (BOS, EOS, not <think>) are left out.
void tok_decode(const Tokenizer *t, int id, bool skip_special, Utf8 *u, Str *out) {
    if (!(skip_special && t->flags[id] & TOK_SPECIAL)) utf8_feed(u, tok_bytes(t, id), out);
}

// ---------------------------------------------------------------------------
// sampler: one token out of a row of logits. In this order: temperature, top-k, top-p over what
// top-k left, min-p relative to the likeliest token. Ties go to the lower id.

typedef struct {
    double temperature;     // 0: the most likely token, always
    double top_p, min_p;    // 1 and 0: off
    int top_k;              // 0: off
} Sampling;
static const Sampling sampling_default = { 1, 1, 0, 0 };     // the publisher's recommendation

struct Sampler {
    Sampling how;
    uint64_t state;         // of the random numbers: any seed will do
    int n;                  // vocabulary
    double *p;              // [n] exp((logit - max) / temperature)
    int *kept;              // [n] what top-k and top-p leave, the likeliest first
    Heap heap;
};

static void sampler_init(Sampler *s, int n, Sampling how, uint64_t seed) {
    size_t v = (size_t)n;
    *s = (Sampler){ how, seed, n, xalloc(v, sizeof *s->p), xalloc(v, sizeof *s->kept), { 0 } };
}

static void sampler_free(Sampler *s) {
    free(s->p);
    free(s->kept);
    free(s->heap.p);
    *s = (Sampler){ 0 };
}

// A uniform number in [0, 1): SplitMix64 (Steele, Lea and Flood, 2014).
static double random_unit(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (double)((z ^ z >> 31) >> 11) * 0x1p-53;
}

// Orders tokens on a heap: the larger logit first, of equal ones the lower id.
static uint64_t by_likelihood(float logit, int id) {
    uint32_t bits;
    logit += 0.0f;                          // -0 is 0
    memcpy(&bits, &logit, 4);
    return (uint64_t)(bits >> 31 ? bits : ~bits & INT32_MAX) << 32 | (uint32_t)id;
}

// Fills `kept` and returns how many tokens it holds. total: the sum of all p.
static int apply_top_k_p(Sampler *s, const float *logits, double total) {
    bool top_k = s->how.top_k > 0 && s->how.top_k < s->n, top_p = s->how.top_p < 1;
    int most = top_k ? s->how.top_k : s->n, n = 0, left = 0;
    double sum = 0, wanted = top_k ? INFINITY : s->how.top_p * total;
    double cut = top_k ? 0 : (1 - s->how.top_p) * total / s->n;    // below: 1 - top_p at most
    s->heap.n = 0;
    for (int i = 0; i < s->n; i++)
        if (!top_k && !top_p) s->kept[n++] = i;
        else if (s->p[i] >= cut) heap_push(&s->heap, by_likelihood(logits[i], i));
    while (n < most && s->heap.n && sum < wanted) {
        s->kept[n] = (int)(uint32_t)heap_pop(&s->heap);
        sum += s->p[s->kept[n++]];
    }
    if (!top_k || !top_p) return n;
    wanted = s->how.top_p * sum;            // top-p counts within what top-k left
    for (sum = 0; left < n && sum < wanted; left++) sum += s->p[s->kept[left]];
    return left;
}

// logits [n] -> a token, -1 with an error if one of them is not finite.
int sample(Sampler *s, const float *logits, Err *e) {
    int best = 0;
    for (int i = 0; i < s->n; i++) {
        if (!isfinite(logits[i])) return fail(e, "logit of token %d is %f", i,
                                              (double)logits[i]) - 1;
        if (logits[i] > logits[best]) best = i;
    }
    if (s->how.temperature <= 0) return best;
    double total = 0, left = 0, sum = 0;    // left: what min-p leaves of it; the best has p = 1
    for (int i = 0; i < s->n; i++)
        total += s->p[i] = exp(((double)logits[i] - (double)logits[best]) / s->how.temperature);
    int n = apply_top_k_p(s, logits, total), last = best;
    for (int k = 0; k < n; k++) left += s->p[s->kept[k]] >= s->how.min_p ? s->p[s->kept[k]] : 0;
    double mark = random_unit(&s->state) * left;
    for (int k = 0; k < n && sum <= mark; k++) {
        double p = s->p[s->kept[k]];
        if (p < s->how.min_p || p == 0) continue;
        last = s->kept[k];
        sum += p;
    }
    return last;
}

// generation_config.json. What is absent or null stays.
typedef struct { Sampling how; bool do_sample; Ids *eos; int vocab; } Generation;

static void read_eos(Json *j, void *to) {           // a number or a list
    Generation *g = to;
    int64_t id = 0;
    bool list = json_peek(j) == '[', one = !list;
    if (list) json_array(j);
    for (; list ? json_item(j) : one; one = false)
        if (json_int(j, 0, g->vocab - 1, &id)) ids_add(g->eos, (int)id);
}

static const Field generation_fields[] = {
    { "do_sample", J_BOOL, OPTIONAL, .at = offsetof(Generation, do_sample) },
    { "temperature", J_DOUBLE, .at = offsetof(Generation, how.temperature), .lo = 0, .hi = 1e6 },
    { "top_k", J_INT, OPTIONAL, offsetof(Generation, how.top_k), .lo = 0, .hi = INT_MAX },
    { "top_p", J_DOUBLE, OPTIONAL, offsetof(Generation, how.top_p), .lo = 1e-9, .hi = 1 },
    { "min_p", J_DOUBLE, OPTIONAL, offsetof(Generation, how.min_p), .lo = 0, .hi = 1 },
    { "eos_token_id", J_READ, .read = read_eos },
};

// Reads it into *how, and the ids that end a text into *eos.
static bool read_generation_config(Span text, const char *name, int vocab, Sampling *how, Ids *eos,
                                   Err *e) {
    Generation g = { *how, true, eos, vocab };
    bool ok = table_file(text, name, generation_fields, COUNT(generation_fields), &g, e);
    *how = g.how;
    if (!g.do_sample) how->temperature = 0;
    return ok;
}

// ---------------------------------------------------------------------------
// threads: one pool; a parallel region hands out ranges of items, large ones first

#if defined(__x86_64__)
static void cpu_pause(void) { _mm_pause(); }
#else
static void cpu_pause(void) { }
#endif

struct Pool {
    int n_threads;              // the caller included
    double spin;                // seconds a thread looks for work before it sleeps
    pthread_t *threads;         // [n_threads - 1]
    _Atomic uint64_t state;     // region number << 32 | next item (between regions: UINT32_MAX)
    _Atomic(RangeFn *) fn;      // the region: read before, and valid only after, a claim on `state`
    _Atomic(void *) arg;
    _Atomic uint32_t n, grain;
    _Atomic uint32_t done;      // items finished
    _Atomic int sleepers;
    _Atomic bool stop;
    pthread_mutex_t caller;     // held by the thread that runs a region
    pthread_mutex_t lock;       // with `wake`: sleeping workers
    pthread_cond_t wake;
    void *scratch;              // matmul's packed activations, grown on demand
    size_t scratch_bytes;
};

static _Thread_local bool in_region;

// Claims ranges of region `id` until none is left. A late thread's claim fails: `state` has moved
// on.
static void pool_work(Pool *p, uint32_t id) {
    for (;;) {
        uint64_t s = atomic_load_explicit(&p->state, memory_order_acquire);
        uint32_t i = (uint32_t)s, n = atomic_load_explicit(&p->n, memory_order_acquire);
        if (s >> 32 != id || i >= n) return;
        uint32_t step = (n - i) / (2 * (uint32_t)p->n_threads);
        uint32_t grain = atomic_load_explicit(&p->grain, memory_order_acquire);
        RangeFn *f = atomic_load_explicit(&p->fn, memory_order_acquire);
        void *arg = atomic_load_explicit(&p->arg, memory_order_acquire);
        if (step < grain) step = grain;
        if (step > n - i) step = n - i;
        if (!atomic_compare_exchange_strong(&p->state, &s, s + step)) continue;
        f(arg, (int)i, (int)(i + step));
        atomic_fetch_add(&p->done, step);
    }
}

// Waits until the region number differs from `seen`: spins, then sleeps. Returns it.
static uint32_t pool_wait(Pool *p, uint32_t seen) {
    double until = p->spin > 0 ? now() + p->spin : 0;
    for (int i = 1; p->spin > 0 && (i % 64 || now() < until); i++) {
        uint32_t id = (uint32_t)(atomic_load_explicit(&p->state, memory_order_acquire) >> 32);
        if (id != seen || atomic_load_explicit(&p->stop, memory_order_relaxed)) return id;
        cpu_pause();
    }
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add(&p->sleepers, 1);      // before the test: a caller that we miss sees us
    while (atomic_load(&p->state) >> 32 == seen && !atomic_load(&p->stop))
        pthread_cond_wait(&p->wake, &p->lock);
    atomic_fetch_sub(&p->sleepers, 1);
    pthread_mutex_unlock(&p->lock);
    return (uint32_t)(atomic_load(&p->state) >> 32);
}

static void *pool_thread(void *arg) {
    Pool *p = arg;
    in_region = true;
    for (uint32_t seen = 0; !atomic_load(&p->stop); ) {
        seen = pool_wait(p, seen);
        pool_work(p, seen);
    }
    return NULL;
}

static void pool_wake(Pool *p) {
    if (!atomic_load(&p->sleepers)) return;
    pthread_mutex_lock(&p->lock);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
}

// Runs f(arg, begin, end) over ranges that cover [0, n), each at least `grain` items (the last may
// be shorter). Returns when all are done; the caller takes part. A call from inside a region runs
// serially.
void parallel(Pool *p, int n, int grain, RangeFn *f, void *arg) {
    if (n <= 0) return;
    if (p->n_threads == 1 || in_region || n <= grain) {
        f(arg, 0, n);
        return;
    }
    pthread_mutex_lock(&p->caller);
    in_region = true;
    uint64_t old = atomic_exchange(&p->state, atomic_load(&p->state) | UINT32_MAX);
    uint64_t id = (uint32_t)((old >> 32) + 1);
    atomic_store_explicit(&p->fn, f, memory_order_release);
    atomic_store_explicit(&p->arg, arg, memory_order_release);
    atomic_store_explicit(&p->n, (uint32_t)n, memory_order_release);
    atomic_store_explicit(&p->grain, (uint32_t)(grain > 0 ? grain : 1), memory_order_release);
    atomic_store_explicit(&p->done, 0, memory_order_release);
    atomic_store(&p->state, id << 32);
    pool_wake(p);
    pool_work(p, (uint32_t)id);
    for (int i = 1; atomic_load_explicit(&p->done, memory_order_acquire) != (uint32_t)n; i++) {
        cpu_pause();
        if (i % 256 == 0) sched_yield();    // somebody else may need this core to finish our work
    }
    in_region = false;
    pthread_mutex_unlock(&p->caller);
}

void pool_free(Pool *p) {
    if (!p) return;
    atomic_store(&p->stop, true);
    pthread_mutex_lock(&p->lock);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
    for (int i = 0; i < p->n_threads - 1; i++) pthread_join(p->threads[i], NULL);
    pthread_mutex_destroy(&p->caller);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->wake);
    free(p->threads);
    free(p->scratch);
    free(p);
}

// n_threads < 1: one per core this process may use. Threads beyond the cores do not spin.
Pool *pool_new(int n_threads) {
    cpu_set_t set;
    bool known = !sched_getaffinity(0, sizeof set, &set);
    int cores = known ? CPU_COUNT(&set) : (int)sysconf(_SC_NPROCESSORS_ONLN);
    Pool *p = xalloc(1, sizeof *p);
    p->n_threads = n_threads > 0 ? n_threads : cores > 0 ? cores : 1;
    p->spin = p->n_threads > cores ? 0 : 80e-6;
    p->threads = xalloc((size_t)p->n_threads, sizeof *p->threads);
    pthread_mutex_init(&p->caller, NULL);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    for (int i = 0; i < p->n_threads - 1; i++) {
        int err = pthread_create(&p->threads[i], NULL, pool_thread, p);
        if (err) die(1, "cannot start thread %d of %d: %s", i + 2, p->n_threads, strerror(err));
    }
    return p;
}

#define INLINE __attribute__((always_inline)) static inline

// ---------------------------------------------------------------------------
// number formats

INLINE float f32_of_bits(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
INLINE uint32_t bits_of_f32(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
INLINE float f32_of_bf16(bf16 h) { return f32_of_bits((uint32_t)h << 16); }

// Round to nearest even; a NaN stays one.
static bf16 bf16_of_f32(float f) {
    uint32_t u = bits_of_f32(f);
    if ((u & 0x7fffffff) > 0x7f800000) return (bf16)(u >> 16 | 0x40);
    return (bf16)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// e8m0: 2^(b-127), 255 is NaN
INLINE float f32_of_e8m0(uint8_t b) {
    return f32_of_bits(b == 255 ? 0x7fc00000 : b ? (uint32_t)b << 23 : 0x400000);
}

// e4m3fn: sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7f and 0xff are NaN
static float f32_of_e4m3(uint8_t b) {
    uint32_t sign = (uint32_t)(b & 0x80) << 24, mag = b & 0x7f;
    if (mag == 0x7f) return f32_of_bits(sign | 0x7fc00000);
    if (mag < 8) return (sign ? -1.0f : 1.0f) * (float)mag * 0x1p-9f;
    return f32_of_bits(sign | ((mag << 20) + (120u << 23)));
}

// e2m1, the value times two: an integer
static const int8_t e2m1_x2[16] = { 0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12 };

static size_t row_bytes(const Mat *m) {
    static const uint8_t bits[N_FORMATS] = {
        [W_F32] = 32, [W_BF16] = 16, [W_INT8] = 8, [W_INT4] = 4, [W_FP8] = 8, [W_FP4] = 4 };
    return (size_t)m->k * bits[m->fmt] / 8;
}

INLINE bf16 load_bf16(const void *p, size_t i) {
    bf16 h;
    memcpy(&h, (const char *)p + 2 * i, 2);
    return h;
}

// The scale of the 128 x 128 block of INT8 or FP8 weights that holds W[i][k]
INLINE float block_scale(const Mat *m, int i, int k) {
    size_t block = (size_t)(i / 128) * (size_t)((m->k + 127) / 128) + (size_t)(k / 128);
    if (m->fmt == W_INT8) return f32_of_bf16(load_bf16(m->s, block));
    return f32_of_e8m0(((const uint8_t *)m->s)[block]);
}

// The scale of W[i][k] (FP4: of the values themselves); 1 for formats without one.
static float scale_at(const Mat *m, int i, int k) {
    size_t group = (size_t)i * (size_t)(m->k / 32) + (size_t)(k / 32);
    switch (m->fmt) {
    case W_INT8: case W_FP8: return block_scale(m, i, k);
    case W_INT4: return f32_of_bf16(load_bf16(m->s, group));
    case W_FP4: return f32_of_e8m0(((const uint8_t *)m->s)[group]);
    default: return 1;
    }
}

// Row i of a matrix as FP32 [k]: the scales applied.
static void dequant_row(const Mat *m, int i, float *out) {
    const uint8_t *w = (const uint8_t *)m->w + (size_t)i * row_bytes(m);
    if (m->fmt == W_F32) memcpy(out, w, (size_t)m->k * 4);
    for (int k0 = 0; k0 < m->k && m->fmt != W_F32; k0 += 32) {
        float s = scale_at(m, i, k0);
        for (int k = k0; k < k0 + 32 && k < m->k; k++) {
            int nibble = m->fmt == W_INT4 || m->fmt == W_FP4 ? w[k / 2] >> (k % 2 * 4) & 15 : 0;
            switch (m->fmt) {
            case W_BF16: out[k] = f32_of_bf16(load_bf16(w, (size_t)k)); break;
            case W_INT8: out[k] = (float)(int8_t)w[k] * s; break;
            case W_INT4: out[k] = (float)(nibble - 8) * s; break;
            case W_FP8: out[k] = f32_of_e4m3(w[k]) * s; break;
            default: out[k] = (float)e2m1_x2[nibble] * 0.5f * s;
            }
        }
    }
}

// ---------------------------------------------------------------------------
// instruction sets

enum { CPU_PORTABLE, CPU_AVX2, CPU_AVX512, CPU_VNNI, N_CPU_LEVELS };
static const char *const cpu_names[N_CPU_LEVELS] = { "portable", "avx2", "avx512", "avx512-vnni" };

static int cpu_best(void) {
#if defined(__x86_64__)
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return CPU_PORTABLE;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw")
        || !__builtin_cpu_supports("avx512vl")) return CPU_AVX2;
    return __builtin_cpu_supports("avx512vnni") ? CPU_VNNI : CPU_AVX512;
#else
    return CPU_PORTABLE;
#endif
}

static int cpu_level = -1;      // set by cpu_init; a test may lower it

static void cpu_init(void) { if (cpu_level < 0) cpu_level = cpu_best(); }

#if defined(__x86_64__)
#define TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define TARGET_AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl")))
#endif

// ---------------------------------------------------------------------------
// activations as INT8 in groups of 32

static void quantise_group(const float *x, int n, int8_t *q, float *s) {
    uint32_t top = 0;           // compared as bits: a NaN counts as the largest and is not lost
    for (int i = 0; i < n; i++) {
        uint32_t u = bits_of_f32(x[i]) & 0x7fffffff;
        if (u > top) top = u;
    }
    float absmax = f32_of_bits(top), r = absmax ? 127 / absmax : 0;
    if (!(r <= FLT_MAX)) r = 0;
    for (int i = 0; i < 32; i++) {
        float v = i < n ? x[i] * r : 0;
        q[i] = (int8_t)(v >= -127 ? v <= 127 ? (int)rintf(v) : 127 : -127);
    }
    *s = absmax / 127;
}

#if defined(__x86_64__)
TARGET_AVX2 static void quantise_avx2(const float *x, int8_t *q, float *s) {
    __m256i abs = _mm256_set1_epi32(0x7fffffff), v[4], top = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_loadu_si256((const __m256i *)(x + 8 * i));
        top = _mm256_max_epi32(top, _mm256_and_si256(v[i], abs));
    }
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    float absmax = f32_of_bits((uint32_t)_mm_cvtsi128_si32(m)), r = absmax ? 127 / absmax : 0;
    if (!(r <= FLT_MAX)) r = 0;
    for (int i = 0; i < 4; i++) {
        __m256 p = _mm256_mul_ps(_mm256_castsi256_ps(v[i]), _mm256_set1_ps(r));
        v[i] = _mm256_max_epi32(_mm256_cvtps_epi32(p), _mm256_set1_epi32(-127));
    }
    __m256i w = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    w = _mm256_permutevar8x32_epi32(w, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i *)q, w);
    *s = absmax / 127;
}
#endif

// x [k] -> q [groups, 32], s [groups]. Per group: r = 127 / absmax, q = rint(x r) half to even, s =
// absmax / 127; the last group is padded with zeros. Groups below 127/FLT_MAX count as zero. A NaN
// or Inf ends up in s.
static void quantise(const float *x, int k, int8_t *q, float *s) {
    for (int g = 0; g * 32 < k; g++) {
#if defined(__x86_64__)
        if (cpu_level >= CPU_AVX2 && k - g * 32 >= 32) {
            quantise_avx2(x + g * 32, q + g * 32, s + g);
            continue;
        }
#endif
        quantise_group(x + g * 32, k - g * 32 < 32 ? k - g * 32 : 32, q + g * 32, s + g);
    }
}

// ---------------------------------------------------------------------------
// products y = W x. The unit of work is a tile: 16 rows of W, one per vector lane, times up to 64
// tokens. A tile's weights are transposed in registers, once for all its tokens, so every output is
// summed over its columns in ONE order (groups of 32, ascending), whatever the batch, the threads
// and the instruction set.

typedef struct {
    const Mat *w;
    const Act *a;
    const int *rows;        // [T] rows of `a`, NULL: 0 .. T-1
    int T;
    float *y;               // [T, n], row t at y + t*ldy
    size_t ldy;
} Product;

enum { LANES = 16, T_BLOCK = 64 };

// Packed activations [groups, T]: one contiguous run of tokens per group of 32 columns, zero groups
// up to a multiple of 4, so that a tile works in whole steps of 64 bytes.
typedef struct { int32_t q[8], c; float s; } GroupI;   // c: what the weights' bias adds, negated
typedef struct { float x[32]; } GroupF;

typedef struct {
    const Mat *w;
    int row, rows;          // rows of W, 1 .. LANES; never across a multiple of LANES
    bool more;              // the next rows follow: prefetch them
    const void *a;          // packed, first token of the tile
    size_t pitch;           // tokens from one group to the next
    int T;
    float *acc;             // [T, LANES]
} Tile;

typedef struct {
    Product p;
    void *a;                // packed
    int tiles, rows, blocks, T;     // per token block: `tiles` of `rows` rows; `blocks` of T tokens
    int first;              // number of its first tile in the region
} Job;

static bool takes_int8(Format f) { return f == W_INT8 || f == W_INT4 || f == W_FP4; }
static int n_groups(const Mat *m) { return (m->k + 127) / 128 * 4; }

// The SIMD kernels multiply unsigned weights w + bias with signed activations.
static int weight_bias(Format f) {
    if (cpu_level == CPU_PORTABLE) return 0;
    if (f == W_INT8) return cpu_level == CPU_VNNI ? 128 : 0;
    return f == W_INT4 ? 8 : 12;
}

static void pack_int(const Product *p, int t, GroupI *out) {
    size_t r = p->rows ? (size_t)p->rows[t] : (size_t)t;
    const int8_t *q = p->a->q + r * p->a->ldq;
    const float *s = p->a->s + r * p->a->lds;
    bool nibbles = p->w->fmt != W_INT8, half = p->w->fmt == W_FP4;
    int bias = weight_bias(p->w->fmt);
    for (int g = 0; g < n_groups(p->w); g++, q += 32) {
        GroupI *o = out + (size_t)g * (size_t)p->T + t;
        int8_t even_odd[32];
        int sum = 0;
        if (g * 32 >= p->w->k) {
            *o = (GroupI){ 0 };
            continue;
        }
        for (int i = 0; i < 32; i++) sum += q[i];
        for (int i = 0; i < 16 && nibbles; i++) {
            even_odd[i] = q[2 * i];
            even_odd[16 + i] = q[2 * i + 1];
        }
        memcpy(o->q, nibbles ? even_odd : q, 32);
        o->c = -bias * sum;
        o->s = half ? s[g] * 0.5f : s[g];
    }
}

static void pack_float(const Product *p, int t, GroupF *out) {
    const float *x = p->a->x + (p->rows ? (size_t)p->rows[t] : (size_t)t) * p->a->ld;
    for (int g = 0; g < n_groups(p->w); g++) {
        GroupF *o = out + (size_t)g * (size_t)p->T + t;
        for (int i = 0; i < 32; i++) o->x[i] = g * 32 + i < p->w->k ? x[g * 32 + i] : 0;
    }
}

static void pack_range(void *arg, int begin, int end) {
    const Job *j = arg;
    for (int t = begin; t < end; t++) {
        if (takes_int8(j->p.w->fmt)) pack_int(&j->p, t, j->a);
        else pack_float(&j->p, t, j->a);
    }
}

// ---------------------------------------------------------------------------
// portable tiles

static void tile_int(const Tile *t) {
    const Mat *m = t->w;
    for (int r = 0; r < t->rows; r++) {
        const uint8_t *w = (const uint8_t *)m->w + (size_t)(t->row + r) * row_bytes(m);
        for (int g = 0; g * 32 < m->k; g++) {
            int v[32] = { 0 };
            int n = m->k - g * 32 < 32 ? m->k - g * 32 : 32;
            for (int i = 0; i < 16 && m->fmt != W_INT8; i++) {
                int lo = w[g * 16 + i] & 15, hi = w[g * 16 + i] >> 4;
                v[i] = m->fmt == W_INT4 ? lo - 8 : e2m1_x2[lo];
                v[16 + i] = m->fmt == W_INT4 ? hi - 8 : e2m1_x2[hi];
            }
            for (int i = 0; i < n && m->fmt == W_INT8; i++) v[i] = (int8_t)w[g * 32 + i];
            const GroupI *a = (const GroupI *)t->a + (size_t)g * t->pitch;
            float s = scale_at(m, t->row + r, g * 32);
            for (int j = 0; j < t->T; j++) {
                int sum = 0;
                const int8_t *q = (const int8_t *)a[j].q;
                for (int i = 0; i < 32; i++) sum += v[i] * q[i];
                float *acc = t->acc + j * LANES + r;
                *acc = fmaf((float)sum, s * a[j].s, *acc);
            }
        }
    }
}

static void tile_float(const Tile *t, float *row) {
    const Mat *m = t->w;
    for (int r = 0; r < t->rows; r++) {
        dequant_row(m, t->row + r, row);    // row [groups * 32], zero behind k
        for (int g = 0; g < n_groups(m); g++) {
            const GroupF *a = (const GroupF *)t->a + (size_t)g * t->pitch;
            for (int j = 0; j < t->T; j++) {
                float sum[8] = { 0 };
                for (int i = 0; i < 32; i++) sum[i % 8] += row[g * 32 + i] * a[j].x[i];
                t->acc[j * LANES + r] += ((sum[0] + sum[1]) + (sum[2] + sum[3]))
                                       + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
            }
        }
    }
}

static void tile_portable(const Tile *t) {
    if (takes_int8(t->w->fmt)) {
        tile_int(t);
        return;
    }
    float *row = xalloc((size_t)n_groups(t->w), 32 * sizeof *row);
    tile_float(t, row);
    free(row);
}

// ---------------------------------------------------------------------------
// AVX2 and AVX-512 tiles. Rows of W are read 32 (AVX-512: 64) bytes at a time and transposed, so
// that lane r of vector j holds dword j of row r. nt = 1: one token, sums in
// registers; 0: t->T, sums in memory.

#if defined(__x86_64__)

// The rows of one tile of a matrix of bytes (weights or scales).
typedef struct {
    const uint8_t *row[LANES];
    size_t bytes;           // of one row
    const uint8_t *ahead[LANES];    // to prefetch of the next tile with the first bytes of this
    size_t run;             // so many rows of it as one run of addresses: a page or more
} Rows;

typedef struct { const uint8_t *row[LANES]; uint8_t bytes[LANES][64]; } Edge;

INLINE Rows tile_rows(const Tile *t, const void *base, size_t bytes) {
    Rows r = { .bytes = bytes, .run = 1 };
    while (r.run < LANES && r.run * bytes < 4096) r.run *= 2;
    for (size_t i = 0; i < LANES; i++) {    // lanes without a row repeat the first
        r.row[i] = (const uint8_t *)base + ((size_t)t->row + (i < (size_t)t->rows ? i : 0)) * bytes;
        r.ahead[i] = r.row[0];
        if (t->more) r.ahead[i] += ((size_t)t->rows + i - i % r.run) * bytes + i % r.run * 64;
    }
    return r;
}

// A table of the rows' bytes [*off, *off + n): the rows themselves, or at their end zero-padded
// copies.
INLINE const uint8_t *const *rows_at(const Rows *w, size_t *off, size_t n, Edge *e) {
    if (*off + n <= w->bytes) return w->row;
    size_t left = *off < w->bytes ? w->bytes - *off : 0;
    for (int i = 0; i < LANES; i++) {
        memset(e->bytes[i], 0, 64);
        memcpy(e->bytes[i], w->row[i] + (left ? *off : 0), left);
        e->row[i] = e->bytes[i];
    }
    *off = 0;
    return e->row;
}

static const int8_t e2m1_biased[16] = { 12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0 };

// For e4m3 -> BF16: bytes of 4 rows ordered by column; the high byte from sign and upper exponent
// bits; where the exponent is 0, what to add to that and the low byte: m * 2^-9 normalised
static const int8_t e4m3_tables[4][16] __attribute__((aligned(16))) = {
    { 0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15 },
    { 60, 61, 62, 63, 64, 65, 66, 67, -68, -67, -66, -65, -64, -63, -62, -61 },
    { -60, -1, -1, -1 }, { 0, 0, -128, -64, 0, 32, 64, 96 } };

// v[j] lane r = dword j of p[r] + off, 32 bytes of 8 rows. Prefetches as many bytes: ahead[] + skip
TARGET_AVX2 INLINE void transpose_256(const uint8_t *const *p, size_t off,
                                      const uint8_t *const *ahead, size_t skip,
                                      __m256i v[8]) {
    __m256i z[4][2];        // [row % 4][half]: lane = row / 4
    for (int e = 0; e < 4; e++) {
        const uint8_t *r0 = p[e] + off, *r1 = p[4 + e] + off;
        _mm_prefetch((const char *)ahead[e] + skip, _MM_HINT_T1);
        for (int q = 0; q < 2; q++) {
            __m256i a = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(r0 + 16 * q)));
            __m128i b = _mm_loadu_si128((const __m128i *)(r1 + 16 * q));
            z[e][q] = _mm256_inserti128_si256(a, b, 1);
        }
    }
    for (int q = 0; q < 2; q++) {
        __m256i a = _mm256_unpacklo_epi32(z[0][q], z[1][q]);
        __m256i b = _mm256_unpackhi_epi32(z[0][q], z[1][q]);
        __m256i c = _mm256_unpacklo_epi32(z[2][q], z[3][q]);
        __m256i d = _mm256_unpackhi_epi32(z[2][q], z[3][q]);
        v[4 * q] = _mm256_unpacklo_epi64(a, c);
        v[4 * q + 1] = _mm256_unpackhi_epi64(a, c);
        v[4 * q + 2] = _mm256_unpacklo_epi64(b, d);
        v[4 * q + 3] = _mm256_unpackhi_epi64(b, d);
    }
}

// Bytes [off, off + 32) of rows [r0, r0 + 8), transposed
TARGET_AVX2 INLINE void read_256(const Rows *w, int r0, size_t off, Edge *edge, __m256i v[8]) {
    size_t skip = off / 64 * 64 * w->run;
    const uint8_t *const *ahead = w->ahead + r0 + off % 64 / 8;     // half of the 8 lines at a time
    const uint8_t *const *p = rows_at(w, &off, 32, edge);
    transpose_256(p + r0, off, ahead, skip, v);
}

// acc + scale * a->s * (sum of u * q + c): one group of 32 columns; u[j] = columns 4j .. 4j+3 of 8
// rows
TARGET_AVX2 INLINE __m256 group_256(const __m256i u[8], __m256 scale, const GroupI *a, __m256 acc,
                                    bool is_signed) {
    __m256i sum = _mm256_set1_epi32(a->c), ones = _mm256_set1_epi16(1);
    for (int j = 0; j < 8 && is_signed; j++) {      // |w| * (q with w's sign): 2 x 128 x 127 fits
        __m256i x = _mm256_sign_epi8(_mm256_set1_epi32(a->q[j]), u[j]);
        x = _mm256_maddubs_epi16(_mm256_abs_epi8(u[j]), x);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x, ones));
    }
    for (int h = 0; h < 8 && !is_signed; h += 4) {      // 4 x 2 x 24 x 127 fits in 16 bits
        __m256i s = _mm256_maddubs_epi16(u[h], _mm256_set1_epi32(a->q[h]));
        for (int j = h + 1; j < h + 4; j++)
            s = _mm256_add_epi16(s, _mm256_maddubs_epi16(u[j], _mm256_set1_epi32(a->q[j])));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(s, ones));
    }
    scale = _mm256_mul_ps(scale, _mm256_set1_ps(a->s));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, acc);
}

// Scale of group g (8 rows) from the transposed scales of a run of groups: 16 of BF16 or 32 of E8M0
TARGET_AVX2 INLINE __m256 nibble_scale_256(const __m256i *s, int g, bool fp4) {
    __m256i v = s[fp4 ? g % 32 / 4 : g % 16 / 2];
    if (fp4) {
        v = _mm256_srlv_epi32(v, _mm256_set1_epi32(g % 4 * 8));
        v = _mm256_slli_epi32(_mm256_and_si256(v, _mm256_set1_epi32(255)), 23);
        return _mm256_castsi256_ps(_mm256_max_epu32(v, _mm256_set1_epi32(0x400000)));
    }
    if (g % 2) return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32((int)0xffff0000)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
}

// Rows [r0, r0 + 8) of a tile
TARGET_AVX2 INLINE void tile_int_256(const Tile *t, int r0, Format fmt, int nt) {
    const Mat *m = t->w;
    const bool fp4 = fmt == W_FP4, nibbles = fmt != W_INT8;
    const int per = nibbles ? 2 : 1, T = nt ? nt : t->T;        // groups in 32 bytes
    Rows w = tile_rows(t, m->w, row_bytes(m));
    Rows ws = tile_rows(t, m->s, nibbles ? (size_t)(m->k / 32) * (fp4 ? 1 : 2) : 0);
    Edge edge;
    __m256i v[8], u[8], scales[8], low = _mm256_set1_epi8(15);
    __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)e2m1_biased));
    __m256 s = _mm256_setzero_ps(), regs[4];
    for (int i = 0; i < nt; i++) regs[i] = s;
    for (int g0 = 0; g0 < n_groups(m); g0 += per) {
        if (nibbles && g0 % (fp4 ? 32 : 16) == 0)
            read_256(&ws, r0, (size_t)g0 * (fp4 ? 1 : 2), &edge, scales);
        read_256(&w, r0, (size_t)(g0 / per) * 32, &edge, v);
        if (!nibbles && g0 % 4 == 0) s = _mm256_set1_ps(block_scale(m, t->row, g0 * 32));
#pragma GCC unroll 2
        for (int i = 0; i < per; i++) {
            for (int j = 0; j < 4 && nibbles; j++) {
                u[j] = _mm256_and_si256(v[4 * i + j], low);
                u[4 + j] = _mm256_and_si256(_mm256_srli_epi16(v[4 * i + j], 4), low);
            }
            for (int j = 0; j < 8 && fp4; j++) u[j] = _mm256_shuffle_epi8(table, u[j]);
            for (int j = 0; j < 8 && !nibbles; j++) u[j] = v[j];
            if (nibbles) s = nibble_scale_256(scales, g0 + i, fp4);
            const GroupI *a = (const GroupI *)t->a + (size_t)(g0 + i) * t->pitch;
            for (int k = 0; k < T; k++) {
                float *acc = t->acc + k * LANES + r0;
                if (nt) regs[k] = group_256(u, s, a + k, regs[k], !nibbles);
                else _mm256_store_ps(acc, group_256(u, s, a + k, _mm256_load_ps(acc), !nibbles));
            }
        }
    }
    for (int i = 0; i < nt; i++) _mm256_store_ps(t->acc + i * LANES + r0, regs[i]);
}

// acc + scale * (8 columns of 8 rows) . x: even and odd columns apart, then added
TARGET_AVX2 INLINE __m256 columns_256(const __m256 f[8], __m256 scale, const float *x, __m256 acc) {
    __m256 s0 = _mm256_mul_ps(f[0], _mm256_set1_ps(x[0]));
    __m256 s1 = _mm256_mul_ps(f[1], _mm256_set1_ps(x[1]));
    for (int j = 2; j < 8; j += 2) {
        s0 = _mm256_fmadd_ps(f[j], _mm256_set1_ps(x[j]), s0);
        s1 = _mm256_fmadd_ps(f[j + 1], _mm256_set1_ps(x[j + 1]), s1);
    }
    return _mm256_fmadd_ps(_mm256_add_ps(s0, s1), scale, acc);
}

// 4 columns of e4m3 (byte i of a lane: column i) -> FP32, exact but for NaN. A byte becomes a BF16:
// its low nibble is the low byte / 16, its high nibble gives the high byte.
TARGET_AVX2 INLINE void columns_of_e4m3_256(__m256i b, __m256 f[4]) {
    const __m256i low = _mm256_set1_epi8(15), upper = _mm256_set1_epi32((int)0xffff0000);
    __m256i table[4];
    for (int i = 0; i < 4; i++)
        table[i] = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)e4m3_tables[i]));
    b = _mm256_shuffle_epi8(b, table[0]);
    __m256i n = _mm256_and_si256(b, low);
    __m256i hi = _mm256_shuffle_epi8(table[1], _mm256_and_si256(_mm256_srli_epi16(b, 4), low));
    __m256i sub = _mm256_and_si256(b, _mm256_set1_epi8(0x78));
    sub = _mm256_cmpeq_epi8(sub, _mm256_setzero_si256());
    hi = _mm256_add_epi8(hi, _mm256_and_si256(sub, _mm256_shuffle_epi8(table[2], n)));
    __m256i lo = _mm256_blendv_epi8(_mm256_slli_epi16(n, 4), _mm256_shuffle_epi8(table[3], n), sub);
    __m256i x = _mm256_unpacklo_epi8(lo, hi), y = _mm256_unpackhi_epi8(lo, hi);
    f[0] = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    f[1] = _mm256_castsi256_ps(_mm256_and_si256(x, upper));
    f[2] = _mm256_castsi256_ps(_mm256_slli_epi32(y, 16));
    f[3] = _mm256_castsi256_ps(_mm256_and_si256(y, upper));
}

// 8 columns of 8 rows from transposed dwords: step i of the 32 bytes
TARGET_AVX2 INLINE void unpack_float_256(const __m256i v[8], Format fmt, int i, __m256 f[8]) {
    const __m256i upper = _mm256_set1_epi32((int)0xffff0000);
    for (int j = 0; j < 8 && fmt == W_F32; j++) f[j] = _mm256_castsi256_ps(v[j]);
    for (int j = 0; j < 4 && fmt == W_BF16; j++) {
        f[2 * j] = _mm256_castsi256_ps(_mm256_slli_epi32(v[4 * i + j], 16));
        f[2 * j + 1] = _mm256_castsi256_ps(_mm256_and_si256(v[4 * i + j], upper));
    }
    for (int j = 0; j < 2 && fmt == W_FP8; j++) columns_of_e4m3_256(v[2 * i + j], f + 4 * j);
}

// Rows [r0, r0 + 8) of a tile
TARGET_AVX2 INLINE void tile_float_256(const Tile *t, int r0, Format fmt, int nt) {
    const Mat *m = t->w;
    const int steps = fmt == W_F32 ? 1 : fmt == W_BF16 ? 2 : 4, T = nt ? nt : t->T;
    Rows w = tile_rows(t, m->w, row_bytes(m));
    Edge edge;
    __m256i v[8], top = _mm256_setzero_si256(), magnitude = _mm256_set1_epi8(127);
    __m256 f[8], s = _mm256_set1_ps(1), regs[4];
    for (int i = 0; i < nt; i++) regs[i] = _mm256_setzero_ps();
    for (int k = 0; k < m->k; ) {
        read_256(&w, r0, (size_t)(k / (8 * steps)) * 32, &edge, v);
        for (int i = 0; i < 8 && fmt == W_FP8; i++)
            top = _mm256_max_epu8(top, _mm256_and_si256(v[i], magnitude));
        if (fmt == W_FP8 && k % 128 == 0) s = _mm256_set1_ps(block_scale(m, t->row, k));
#pragma GCC unroll 4
        for (int i = 0; i < steps; i++, k += 8) {
            unpack_float_256(v, fmt, i, f);
            const GroupF *a = (const GroupF *)t->a + (size_t)(k / 32) * t->pitch;
            for (int j = 0; j < T; j++) {
                float *acc = t->acc + j * LANES + r0;
                if (nt) regs[j] = columns_256(f, s, a[j].x + k % 32, regs[j]);
                else _mm256_store_ps(acc, columns_256(f, s, a[j].x + k % 32, _mm256_load_ps(acc)));
            }
        }
    }
    for (int i = 0; i < nt; i++) _mm256_store_ps(t->acc + i * LANES + r0, regs[i]);
    __m256i nan = _mm256_cmpeq_epi8(top, magnitude);    // rows with a NaN weight
    if (fmt != W_FP8 || _mm256_testz_si256(nan, nan)) return;
    nan = _mm256_cmpeq_epi32(nan, _mm256_setzero_si256());
    for (int i = 0; i < T; i++) {
        float *acc = t->acc + i * LANES + r0;
        __m256 kept = _mm256_and_ps(_mm256_load_ps(acc), _mm256_castsi256_ps(nan));
        __m256 bad = _mm256_andnot_ps(_mm256_castsi256_ps(nan), _mm256_set1_ps(NAN));
        _mm256_store_ps(acc, _mm256_or_ps(kept, bad));
    }
}

TARGET_AVX2 static void tile_avx2(const Tile *t) {
    for (int r0 = 0; r0 < t->rows; r0 += 8) {
        switch (t->w->fmt * 8 + (t->T == 1)) {
#define CASES(F, TILE) \
        case F * 8: TILE(t, r0, F, 0); break; \
        case F * 8 + 1: TILE(t, r0, F, 1); break;
        CASES(W_INT4, tile_int_256)
        CASES(W_INT8, tile_int_256)
        CASES(W_FP4, tile_int_256)
        CASES(W_F32, tile_float_256)
        CASES(W_BF16, tile_float_256)
        CASES(W_FP8, tile_float_256)
#undef CASES
        }
    }
}

// v[j] lane r = dword j of p[r] + off, 64 bytes of 16 rows. Prefetches as many bytes: ahead[] +
// skip
TARGET_AVX512 INLINE void transpose_512(const uint8_t *const *p, size_t off,
                                        const uint8_t *const *ahead, size_t skip,
                                        __m512i v[16]) {
    __m512i z[4][4];        // [row % 4][quarter]: lane = row / 4
    for (int e = 0; e < 4; e++) {
        const uint8_t *r0 = p[e] + off, *r1 = p[4 + e] + off;
        const uint8_t *r2 = p[8 + e] + off, *r3 = p[12 + e] + off;
        for (int i = 0; i < 4; i++)
            _mm_prefetch((const char *)ahead[4 * e + i] + skip, _MM_HINT_T1);
        for (int q = 0; q < 4; q++) {
            __m512i a = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(r0 + 16 * q)));
            a = _mm512_inserti32x4(a, _mm_loadu_si128((const __m128i *)(r1 + 16 * q)), 1);
            a = _mm512_inserti32x4(a, _mm_loadu_si128((const __m128i *)(r2 + 16 * q)), 2);
            z[e][q] = _mm512_inserti32x4(a, _mm_loadu_si128((const __m128i *)(r3 + 16 * q)), 3);
        }
    }
    for (int q = 0; q < 4; q++) {
        __m512i a = _mm512_unpacklo_epi32(z[0][q], z[1][q]);
        __m512i b = _mm512_unpackhi_epi32(z[0][q], z[1][q]);
        __m512i c = _mm512_unpacklo_epi32(z[2][q], z[3][q]);
        __m512i d = _mm512_unpackhi_epi32(z[2][q], z[3][q]);
        v[4 * q] = _mm512_unpacklo_epi64(a, c);
        v[4 * q + 1] = _mm512_unpackhi_epi64(a, c);
        v[4 * q + 2] = _mm512_unpacklo_epi64(b, d);
        v[4 * q + 3] = _mm512_unpackhi_epi64(b, d);
    }
}

// Bytes [off, off + 64) of the rows, transposed
TARGET_AVX512 INLINE void read_512(const Rows *w, size_t off, Edge *edge, __m512i v[16]) {
    size_t skip = off * w->run;
    const uint8_t *const *p = rows_at(w, &off, 64, edge);
    transpose_512(p, off, w->ahead, skip, v);
}

// acc + scale * a->s * (sum of u * q + c): one group of 32 columns; u[j] = columns 4j .. 4j+3 of 16
// rows
TARGET_AVX512 INLINE __m512 group_512(const __m512i u[8], __m512 scale, const GroupI *a, __m512 acc,
                                             bool vnni, bool is_signed) {
    __m512i sum = _mm512_set1_epi32(a->c), ones = _mm512_set1_epi16(1);
    for (int j = 0; j < 8 && vnni; j++)
        __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(u[j]), "m"(a->q[j]));
    for (int j = 0; j < 8 && !vnni && is_signed; j++) {     // |w| * (q with the sign of w)
        __m512i x = _mm512_set1_epi32(a->q[j]);
        x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(u[j]), _mm512_setzero_si512(), x);
        x = _mm512_maddubs_epi16(_mm512_abs_epi8(u[j]), x);
        sum = _mm512_add_epi32(sum, _mm512_madd_epi16(x, ones));
    }
    for (int h = 0; h < 8 && !vnni && !is_signed; h += 4) { // 4 x 2 x 24 x 127 fits in 16 bits
        __m512i s = _mm512_maddubs_epi16(u[h], _mm512_set1_epi32(a->q[h]));
        for (int j = h + 1; j < h + 4; j++)
            s = _mm512_add_epi16(s, _mm512_maddubs_epi16(u[j], _mm512_set1_epi32(a->q[j])));
        sum = _mm512_add_epi32(sum, _mm512_madd_epi16(s, ones));
    }
    scale = _mm512_mul_ps(scale, _mm512_set1_ps(a->s));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, acc);
}

// Scale of group g (16 rows) from the transposed scales of a run of groups: 32 of BF16 or 64 of
// E8M0
TARGET_AVX512 INLINE __m512 nibble_scale_512(const __m512i *s, int g, bool fp4) {
    __m512i v = s[fp4 ? g % 64 / 4 : g % 32 / 2];
    if (fp4) {
        v = _mm512_srlv_epi32(v, _mm512_set1_epi32(g % 4 * 8));
        v = _mm512_slli_epi32(_mm512_and_si512(v, _mm512_set1_epi32(255)), 23);
        return _mm512_castsi512_ps(_mm512_max_epu32(v, _mm512_set1_epi32(0x400000)));
    }
    if (g % 2) return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
}

TARGET_AVX512 INLINE void tile_int_512(const Tile *t, Format fmt, bool vnni, int nt) {
    const Mat *m = t->w;
    const bool fp4 = fmt == W_FP4, nibbles = fmt != W_INT8;
    const int per = nibbles ? 4 : 2, T = nt ? nt : t->T;        // groups in 64 bytes
    Rows w = tile_rows(t, m->w, row_bytes(m));
    Rows ws = tile_rows(t, m->s, nibbles ? (size_t)(m->k / 32) * (fp4 ? 1 : 2) : 0);
    Edge edge;
    __m512i v[16], u[8], scales[16], low = _mm512_set1_epi8(15);
    __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)e2m1_biased));
    __m512 s = _mm512_setzero_ps(), regs[4];
    for (int i = 0; i < nt; i++) regs[i] = s;
    for (int g0 = 0; g0 < n_groups(m); g0 += per) {
        if (nibbles && g0 % (fp4 ? 64 : 32) == 0)
            read_512(&ws, (size_t)g0 * (fp4 ? 1 : 2), &edge, scales);
        read_512(&w, (size_t)(g0 / per) * 64, &edge, v);
        if (!nibbles && g0 % 4 == 0) s = _mm512_set1_ps(block_scale(m, t->row, g0 * 32));
#pragma GCC unroll 4
        for (int i = 0; i < per; i++) {
            for (int j = 0; j < 4 && nibbles; j++) {
                u[j] = _mm512_and_si512(v[4 * i + j], low);
                u[4 + j] = _mm512_and_si512(_mm512_srli_epi16(v[4 * i + j], 4), low);
            }
            for (int j = 0; j < 8 && fp4; j++) u[j] = _mm512_shuffle_epi8(table, u[j]);
            for (int j = 0; j < 8 && !nibbles; j++)
                u[j] = _mm512_xor_si512(v[8 * i % 16 + j], _mm512_set1_epi8(vnni ? -128 : 0));
            if (nibbles) s = nibble_scale_512(scales, g0 + i, fp4);
            const GroupI *a = (const GroupI *)t->a + (size_t)(g0 + i) * t->pitch;
            for (int k = 0; k < T; k++) {
                float *acc = t->acc + k * LANES;
                if (nt) regs[k] = group_512(u, s, a + k, regs[k], vnni, !nibbles);
                else _mm512_store_ps(acc, group_512(u, s, a + k, _mm512_load_ps(acc), vnni,
                                                    !nibbles));
            }
        }
    }
    for (int i = 0; i < nt; i++) _mm512_store_ps(t->acc + i * LANES, regs[i]);
}

// acc + scale * (8 columns of 16 rows) . x: even and odd columns apart, then added
TARGET_AVX512 INLINE __m512 columns_512(const __m512 f[8], __m512 scale, const float *x,
                                        __m512 acc) {
    __m512 s0 = _mm512_mul_ps(f[0], _mm512_set1_ps(x[0]));
    __m512 s1 = _mm512_mul_ps(f[1], _mm512_set1_ps(x[1]));
    for (int j = 2; j < 8; j += 2) {
        s0 = _mm512_fmadd_ps(f[j], _mm512_set1_ps(x[j]), s0);
        s1 = _mm512_fmadd_ps(f[j + 1], _mm512_set1_ps(x[j + 1]), s1);
    }
    return _mm512_fmadd_ps(_mm512_add_ps(s0, s1), scale, acc);
}

// 4 columns of e4m3 (byte i of a lane: column i) -> FP32, exact but for NaN. A byte becomes a BF16:
// its low nibble is the low byte / 16, its high nibble gives the high byte.
TARGET_AVX512 INLINE void columns_of_e4m3_512(__m512i b, __m512 f[4]) {
    const __m512i low = _mm512_set1_epi8(15);
    __m512i table[4];
    for (int i = 0; i < 4; i++)
        table[i] = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)e4m3_tables[i]));
    b = _mm512_shuffle_epi8(b, table[0]);
    __m512i n = _mm512_and_si512(b, low), lo = _mm512_slli_epi16(n, 4);
    __m512i hi = _mm512_shuffle_epi8(table[1], _mm512_and_si512(_mm512_srli_epi16(b, 4), low));
    __mmask64 sub = _mm512_testn_epi8_mask(b, _mm512_set1_epi8(0x78));
    hi = _mm512_mask_add_epi8(hi, sub, hi, _mm512_shuffle_epi8(table[2], n));
    lo = _mm512_mask_shuffle_epi8(lo, sub, table[3], n);
    __m512i x = _mm512_unpacklo_epi8(lo, hi), y = _mm512_unpackhi_epi8(lo, hi);
    f[0] = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    f[1] = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000)));
    f[2] = _mm512_castsi512_ps(_mm512_slli_epi32(y, 16));
    f[3] = _mm512_castsi512_ps(_mm512_and_si512(y, _mm512_set1_epi32((int)0xffff0000)));
}

// 8 columns of 16 rows from transposed dwords: step i of the 64 bytes
TARGET_AVX512 INLINE void unpack_float_512(const __m512i v[16], Format fmt, int i, __m512 f[8]) {
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
    for (int j = 0; j < 8 && fmt == W_F32; j++) f[j] = _mm512_castsi512_ps(v[8 * i + j]);
    for (int j = 0; j < 4 && fmt == W_BF16; j++) {
        f[2 * j] = _mm512_castsi512_ps(_mm512_slli_epi32(v[4 * i + j], 16));
        f[2 * j + 1] = _mm512_castsi512_ps(_mm512_and_si512(v[4 * i + j], upper));
    }
    for (int j = 0; j < 2 && fmt == W_FP8; j++) columns_of_e4m3_512(v[2 * i + j], f + 4 * j);
}

TARGET_AVX512 INLINE void tile_float_512(const Tile *t, Format fmt, int nt) {
    const Mat *m = t->w;
    const int steps = fmt == W_F32 ? 2 : fmt == W_BF16 ? 4 : 8, T = nt ? nt : t->T;
    Rows w = tile_rows(t, m->w, row_bytes(m));
    Edge edge;
    __m512i v[16], top = _mm512_setzero_si512(), magnitude = _mm512_set1_epi8(127);
    __m512 f[8], s = _mm512_set1_ps(1), regs[4];
    for (int i = 0; i < nt; i++) regs[i] = _mm512_setzero_ps();
    for (int k = 0; k < m->k; ) {
        read_512(&w, (size_t)(k / (8 * steps)) * 64, &edge, v);
        for (int i = 0; i < 16 && fmt == W_FP8; i++)
            top = _mm512_max_epu8(top, _mm512_and_si512(v[i], magnitude));
        if (fmt == W_FP8 && k % 128 == 0) s = _mm512_set1_ps(block_scale(m, t->row, k));
#pragma GCC unroll 8
        for (int i = 0; i < steps; i++, k += 8) {
            unpack_float_512(v, fmt, i, f);
            const GroupF *a = (const GroupF *)t->a + (size_t)(k / 32) * t->pitch;
            for (int j = 0; j < T; j++) {
                float *acc = t->acc + j * LANES;
                if (nt) regs[j] = columns_512(f, s, a[j].x + k % 32, regs[j]);
                else _mm512_store_ps(acc, columns_512(f, s, a[j].x + k % 32, _mm512_load_ps(acc)));
            }
        }
    }
    for (int i = 0; i < nt; i++) _mm512_store_ps(t->acc + i * LANES, regs[i]);
    __m512i nan = _mm512_movm_epi8(_mm512_cmpeq_epi8_mask(top, magnitude));
    __mmask16 rows = fmt == W_FP8 ? _mm512_test_epi32_mask(nan, nan) : 0;   // with a NaN weight
    for (int i = 0; i < T && rows; i++)
        _mm512_mask_store_ps(t->acc + i * LANES, rows, _mm512_set1_ps(NAN));
}

TARGET_AVX512 INLINE void tile_int_512_any(const Tile *t, Format fmt, int nt) {
    if (cpu_level == CPU_VNNI) tile_int_512(t, fmt, true, nt);
    else tile_int_512(t, fmt, false, nt);
}

TARGET_AVX512 static void tile_avx512(const Tile *t) {
    switch (t->w->fmt * 8 + (t->T == 1)) {
#define CASES(F, TILE) \
    case F * 8: TILE(t, F, 0); break; \
    case F * 8 + 1: TILE(t, F, 1); break;
    CASES(W_INT4, tile_int_512_any)
    CASES(W_INT8, tile_int_512_any)
    CASES(W_FP4, tile_int_512_any)
    CASES(W_F32, tile_float_512)
    CASES(W_BF16, tile_float_512)
    CASES(W_FP8, tile_float_512)
#undef CASES
    }
}
#endif

// ---------------------------------------------------------------------------
// matmul: packs the activations, cuts all products into tiles, runs them in one region

static void run_tile(const Tile *t) {
#if defined(__x86_64__)
    if (cpu_level >= CPU_AVX512) {
        tile_avx512(t);
        return;
    }
    if (cpu_level >= CPU_AVX2) {
        tile_avx2(t);
        return;
    }
#endif
    tile_portable(t);
}

// Tile number i of a job: adds nothing to y, writes it.
static void job_tile(const Job *j, int i, bool more) {
    const Product *p = &j->p;
    float acc[T_BLOCK * LANES] __attribute__((aligned(64))) = { 0 };
    int t0 = i / j->tiles * j->T, row = i % j->tiles * j->rows;
    Tile t = { .w = p->w, .row = row, .rows = p->w->n - row < j->rows ? p->w->n - row : j->rows,
               .more = more && (i + 1) % j->tiles, .pitch = (size_t)p->T,
               .T = p->T - t0 < j->T ? p->T - t0 : j->T, .acc = acc };
    if (takes_int8(p->w->fmt)) t.a = (const GroupI *)j->a + t0;
    else t.a = (const GroupF *)j->a + t0;
    run_tile(&t);
    for (int k = 0; k < t.T; k++)
        memcpy(p->y + (size_t)(t0 + k) * p->ldy + row, acc + k * LANES, (size_t)t.rows * 4);
}

typedef struct { Job *jobs; int n; } JobList;

static void tile_range(void *arg, int begin, int end) {
    const JobList *l = arg;
    int lo = 0, hi = l->n;
    while (hi - lo > 1) {
        int mid = (lo + hi) / 2;
        if (l->jobs[mid].first <= begin) lo = mid;
        else hi = mid;
    }
    for (int i = begin; i < end; i++) {
        while (lo + 1 < l->n && l->jobs[lo + 1].first <= i) lo++;
        job_tile(&l->jobs[lo], i - l->jobs[lo].first, i + 1 < end);
    }
}

// --exact: FP32 activations, dequantised weights, one order of summation.
static void exact_range(void *arg, int begin, int end) {
    const Product *p = arg;
    int k = p->w->k;
    float *w = xalloc((size_t)k, sizeof *w);
    for (int i = begin; i < end; i++) {
        dequant_row(p->w, i, w);
        for (int t = 0; t < p->T; t++) {
            const float *x = p->a->x + (p->rows ? (size_t)p->rows[t] : (size_t)t) * p->a->ld;
            float sum[16] = { 0 };
            int j = 0;
            for (; j + 16 <= k; j += 16)
                for (int l = 0; l < 16; l++) sum[l] += w[j + l] * x[j + l];
            for (int l = 0; j + l < k; l++) sum[l] += w[j + l] * x[j + l];
            for (int h = 8; h; h /= 2)
                for (int l = 0; l < h; l++) sum[l] += sum[l + h];
            p->y[(size_t)t * p->ldy + (size_t)i] = sum[0];
        }
    }
    free(w);
}

// Two products that can share packed activations.
static bool same_input(const Product *a, const Product *b) {
    Format f = a->w->fmt, g = b->w->fmt;
    return a->a == b->a && a->rows == b->rows && a->T == b->T && a->w->k == b->w->k
        && (f == g || (!takes_int8(f) && !takes_int8(g)));
}

static size_t packed_bytes(const Product *p) {
    size_t one = takes_int8(p->w->fmt) ? sizeof(GroupI) : sizeof(GroupF);
    return ((size_t)p->T * (size_t)n_groups(p->w) * one + 63) / 64 * 64;
}

static void job_cut(const Pool *p, Job *j, int first) {
    int n = j->p.w->n, T = j->p.T;
    j->first = first;
    j->blocks = (T + T_BLOCK - 1) / T_BLOCK;
    j->T = (T + j->blocks - 1) / j->blocks;
    j->rows = n * (size_t)j->blocks < (size_t)p->n_threads * 4 * LANES ? 4 : LANES;
    j->tiles = (n + j->rows - 1) / j->rows;
}

// Every y[t][i] = sum_k W[i][k] a[t][k], the products side by side in one parallel region.
// Bit-identical for any T, position in the batch, number of threads. One call at a time per pool.
static void matmul(Pool *p, const Product *job, int n_jobs, bool exact) {
    cpu_init();
    size_t bytes = 0;
    for (int i = 0; i < n_jobs; i++) {
        if (job[i].T <= 0) continue;
        if (exact) parallel(p, job[i].w->n, 8, exact_range, (void *)(uintptr_t)&job[i]);
        bytes += packed_bytes(&job[i]);
    }
    if (exact) return;
    size_t head = ((size_t)n_jobs * sizeof(Job) + 63) / 64 * 64;
    if (head + bytes > p->scratch_bytes) {
        free(p->scratch);
        p->scratch = xalloc(p->scratch_bytes = head + bytes, 1);
    }
    JobList l = { p->scratch, 0 };
    char *free_at = (char *)p->scratch + head;
    int n = 0;
    for (int i = 0; i < n_jobs; i++) {
        if (job[i].T <= 0 || job[i].w->n <= 0) continue;
        Job *j = &l.jobs[l.n++];
        *j = (Job){ .p = job[i] };
        for (Job *o = j - 1; o >= l.jobs && !j->a; o--)
            if (same_input(&o->p, &j->p)) j->a = o->a;
        if (!j->a) {
            j->a = free_at;
            free_at += packed_bytes(&j->p);
            parallel(p, j->p.T, 8, pack_range, j);
        }
        job_cut(p, j, n);
        n += j->tiles * j->blocks;
    }
    parallel(p, n, 1, tile_range, &l);
}

// ---------------------------------------------------------------------------
// one vector against many rows (attention, index scores). Every sum in one order, whatever the
// number of rows.

// 16 partial sums, then halved: lane j + lane j+8, +4, +2, +1
static float dot_16(const float *a, const float *b, int n) {
    float s[16] = { 0 };
    for (int i = 0; i < n; i++) s[i % 16] += a[i] * b[i];
    for (int w = 8; w; w /= 2)
        for (int j = 0; j < w; j++) s[j] += s[j + w];
    return s[0];
}

#if defined(__x86_64__)
TARGET_AVX2 INLINE float sum_16(__m256 lo, __m256 hi) {
    __m256 a = _mm256_add_ps(lo, hi);
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

TARGET_AVX2 static void row_scores_256(const float *q, const float *rows, int n, int k, float scale,
                                       float *out) {
    for (int j = 0; j < n; j += 4) {
        __m256 lo[4], hi[4];
        const float *r[4];
        for (int i = 0; i < 4; i++) {
            r[i] = rows + (size_t)(j + i < n ? j + i : j) * (size_t)k;
            lo[i] = hi[i] = _mm256_setzero_ps();
        }
        for (int c = 0; c < k; c += 16) {
            __m256 a = _mm256_loadu_ps(q + c), b = _mm256_loadu_ps(q + c + 8);
            for (int i = 0; i < 4; i++) {
                lo[i] = _mm256_fmadd_ps(a, _mm256_loadu_ps(r[i] + c), lo[i]);
                hi[i] = _mm256_fmadd_ps(b, _mm256_loadu_ps(r[i] + c + 8), hi[i]);
            }
        }
        for (int i = 0; i < 4 && j + i < n; i++) out[j + i] = sum_16(lo[i], hi[i]) * scale;
    }
}

TARGET_AVX512 static void row_scores_512(const float *q, const float *rows, int n, int k,
                                         float scale, float *out) {
    for (int j = 0; j < n; j += 8) {
        __m512 s[8];
        const float *r[8];
        for (int i = 0; i < 8; i++) {
            r[i] = rows + (size_t)(j + i < n ? j + i : j) * (size_t)k;
            s[i] = _mm512_setzero_ps();
        }
        for (int c = 0; c < k; c += 16) {
            __m512 a = _mm512_loadu_ps(q + c);
            for (int i = 0; i < 8; i++) s[i] = _mm512_fmadd_ps(a, _mm512_loadu_ps(r[i] + c), s[i]);
        }
        for (int i = 0; i < 8 && j + i < n; i++) {
            __m256 hi = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(s[i]), 1));
            out[j + i] = sum_16(_mm512_castps512_ps256(s[i]), hi) * scale;
        }
    }
}

// `regs` vectors of o at once
TARGET_AVX2 INLINE void add_rows_256(float *o, const float *p, const float *rows, int n, int k,
                                     int regs) {
    __m256 s[8];
    for (int i = 0; i < regs; i++) s[i] = _mm256_loadu_ps(o + 8 * i);
    for (int j = 0; j < n; j++, rows += k)
        for (int i = 0; i < regs; i++)
            s[i] = _mm256_fmadd_ps(_mm256_set1_ps(p[j]), _mm256_loadu_ps(rows + 8 * i), s[i]);
    for (int i = 0; i < regs; i++) _mm256_storeu_ps(o + 8 * i, s[i]);
}

TARGET_AVX512 INLINE void add_rows_512(float *o, const float *p, const float *rows, int n, int k,
                                       int regs) {
    __m512 s[8];
    for (int i = 0; i < regs; i++) s[i] = _mm512_loadu_ps(o + 16 * i);
    for (int j = 0; j < n; j++, rows += k)
        for (int i = 0; i < regs; i++)
            s[i] = _mm512_fmadd_ps(_mm512_set1_ps(p[j]), _mm512_loadu_ps(rows + 16 * i), s[i]);
    for (int i = 0; i < regs; i++) _mm512_storeu_ps(o + 16 * i, s[i]);
}

TARGET_AVX2 static void row_sum_256(float *o, const float *p, const float *rows, int n, int k) {
    int c = 0;
    for (; c + 64 <= k; c += 64) add_rows_256(o + c, p, rows + c, n, k, 8);
    for (; c < k; c += 8) add_rows_256(o + c, p, rows + c, n, k, 1);
}

TARGET_AVX512 static void row_sum_512(float *o, const float *p, const float *rows, int n, int k) {
    int c = 0;
    for (; c + 128 <= k; c += 128) add_rows_512(o + c, p, rows + c, n, k, 8);
    for (; c < k; c += 16) add_rows_512(o + c, p, rows + c, n, k, 1);
}
#endif

// out[j] = scale * (q . rows[j]) for n rows [n, k] of FP32
static void row_scores(const float *q, const float *rows, int n, int k, float scale, float *out) {
#if defined(__x86_64__)
    if (cpu_level >= CPU_AVX2 && k % 16 == 0) {
        (cpu_level >= CPU_AVX512 ? row_scores_512 : row_scores_256)(q, rows, n, k, scale, out);
        return;
    }
#endif
    for (int j = 0; j < n; j++) out[j] = dot_16(q, rows + (size_t)j * (size_t)k, k) * scale;
}

// o [k] += sum_j p[j] * rows[j], row by row: n rows [n, k] of FP32
static void row_sum(float *o, const float *p, const float *rows, int n, int k) {
#if defined(__x86_64__)
    if (cpu_level >= CPU_AVX2 && k % 16 == 0) {
        (cpu_level >= CPU_AVX512 ? row_sum_512 : row_sum_256)(o, p, rows, n, k);
        return;
    }
#endif
    for (int j = 0; j < n; j++, rows += k)
        for (int i = 0; i < k; i++) o[i] += p[j] * rows[i];
}

// ---------------------------------------------------------------------------
// the machine's read bandwidth

typedef struct { const uint64_t *p; _Atomic uint64_t sum; } ReadTest;
enum { READ_PIECE = 1 << 20 };

static void read_range(void *arg, int begin, int end) {
    ReadTest *r = arg;
    uint64_t s[8] = { 0 };
    const uint64_t *p = r->p + (size_t)begin * (READ_PIECE / 8);
    for (size_t n = (size_t)(end - begin) * (READ_PIECE / 8), i = 0; i < n; i += 8)
        for (int l = 0; l < 8; l++) s[l] ^= p[i + (size_t)l];
    for (int l = 1; l < 8; l++) s[0] ^= s[l];
    atomic_fetch_xor(&r->sum, s[0]);
}

// Bytes per second, best of 5 sequential reads of 2 GiB by all threads. 0 if there is no memory for
// it.
double read_bandwidth(Pool *p) {
    size_t bytes = (size_t)2 << 30;
    void *m = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (m == MAP_FAILED) return 0;
    madvise(m, bytes, MADV_HUGEPAGE);
    memset(m, 1, bytes);
    ReadTest r = { .p = m };
    double best = 0;
    for (int i = 0; i < 5; i++) {
        double t = now();
        parallel(p, (int)(bytes / READ_PIECE), 16, read_range, &r);
        double rate = (double)bytes / (now() - t);
        if (rate > best) best = rate;
    }
    munmap(m, bytes);
    return best;
}
// ---------------------------------------------------------------------------
// weights: one table says which tensors a checkpoint holds, their shapes and where they go. Every
// mismatch is refused.

// VEC: small, copied to FP32. MAT: BF16 or FP32 matrix, or quantised with its .scale. TABLE: I64.
typedef enum { VEC, MAT, TABLE } Kind;
// Which blocks have the tensor.
typedef enum { ALL, COMPRESSED, CSA, HASHED, SCORED } When;

typedef struct {
    // after the block's prefix; a MAT's name has no ".weight" (hc_*_fn: exactly as here)
    const char *name;
    Kind kind;
    When when;
    char rows, cols;        // letters of shape_of(); cols 0: a vector
    size_t at;              // offset in Layer, Mtp or Weights
} Bind;

#define L(field) offsetof(Layer, field)
static const Bind layer_table[] = {
    { "hc_attn_fn", MAT, ALL, 'm', 's', L(hc_attn.fn) },
    { "hc_attn_base", VEC, ALL, 'm', 0, L(hc_attn.base) },
    { "hc_attn_scale", VEC, ALL, '3', 0, L(hc_attn.scale) },
    { "attn_norm.weight", VEC, ALL, 'D', 0, L(attn_norm) },
    { "attn.wq_a", MAT, ALL, 'Q', 'D', L(wq_a) },
    { "attn.q_norm.weight", VEC, ALL, 'Q', 0, L(q_norm) },
    { "attn.wq_b", MAT, ALL, 'h', 'Q', L(wq_b) },
    { "attn.wkv", MAT, ALL, 'K', 'D', L(wkv) },
    { "attn.kv_norm.weight", VEC, ALL, 'K', 0, L(kv_norm) },
    { "attn.attn_sink", VEC, ALL, 'H', 0, L(attn_sink) },
    { "attn.compressor.wkv", MAT, COMPRESSED, 'c', 'D', L(comp.wkv) },
    { "attn.compressor.wgate", MAT, COMPRESSED, 'c', 'D', L(comp.wgate) },
    { "attn.compressor.ape", VEC, COMPRESSED, 'M', 'c', L(comp.ape) },
    { "attn.compressor.norm.weight", VEC, COMPRESSED, 'K', 0, L(comp.norm) },
    { "attn.indexer.wq_b", MAT, CSA, 'i', 'Q', L(iwq_b) },
    { "attn.indexer.weights_proj", MAT, CSA, 'I', 'D', L(iproj) },
    { "attn.indexer.compressor.wkv", MAT, CSA, 'j', 'D', L(icomp.wkv) },
    { "attn.indexer.compressor.wgate", MAT, CSA, 'j', 'D', L(icomp.wgate) },
    { "attn.indexer.compressor.ape", VEC, CSA, 'M', 'j', L(icomp.ape) },
    { "attn.indexer.compressor.norm.weight", VEC, CSA, 'J', 0, L(icomp.norm) },
    { "attn.wo_a", MAT, ALL, 'o', 'g', L(wo_a) },
    { "attn.wo_b", MAT, ALL, 'D', 'o', L(wo_b) },
    { "hc_ffn_fn", MAT, ALL, 'm', 's', L(hc_ffn.fn) },
    { "hc_ffn_base", VEC, ALL, 'm', 0, L(hc_ffn.base) },
    { "hc_ffn_scale", VEC, ALL, '3', 0, L(hc_ffn.scale) },
    { "ffn_norm.weight", VEC, ALL, 'D', 0, L(ffn_norm) },
    { "ffn.gate", MAT, ALL, 'E', 'D', L(gate) },
    { "ffn.gate.bias", VEC, SCORED, 'E', 0, L(gate_bias) },
    { "ffn.gate.tid2eid", TABLE, HASHED, 'V', 'A', L(tid2eid) },
    { "ffn.shared_experts.w1", MAT, ALL, 'F', 'D', L(sw1) },
    { "ffn.shared_experts.w2", MAT, ALL, 'D', 'F', L(sw2) },
    { "ffn.shared_experts.w3", MAT, ALL, 'F', 'D', L(sw3) },
};
#undef L
// one entry per expert: "ffn.experts.%d.w1"; at: in Mat *w[3]
static const Bind expert_table[] = {
    { "w1", MAT, ALL, 'F', 'D', offsetof(Layer, w1) },
    { "w2", MAT, ALL, 'D', 'F', offsetof(Layer, w2) },
    { "w3", MAT, ALL, 'F', 'D', offsetof(Layer, w3) },
};
static const Bind mtp_table[] = {
    { "e_proj", MAT, ALL, 'D', 'D', offsetof(Mtp, e_proj) },
    { "h_proj", MAT, ALL, 'D', 'D', offsetof(Mtp, h_proj) },
    { "enorm.weight", VEC, ALL, 'D', 0, offsetof(Mtp, enorm) },
    { "hnorm.weight", VEC, ALL, 'D', 0, offsetof(Mtp, hnorm) },
    { "norm.weight", VEC, ALL, 'D', 0, offsetof(Mtp, norm) },
    { "hc_head_fn", MAT, ALL, 'S', 's', offsetof(Mtp, hc_head.fn) },
    { "hc_head_base", VEC, ALL, 'S', 0, offsetof(Mtp, hc_head.base) },
    { "hc_head_scale", VEC, ALL, '1', 0, offsetof(Mtp, hc_head.scale) },
};
static const Bind model_table[] = {
    { "embed", MAT, ALL, 'V', 'D', offsetof(Weights, embed) },
    { "head", MAT, ALL, 'V', 'D', offsetof(Weights, head) },
    { "norm.weight", VEC, ALL, 'D', 0, offsetof(Weights, norm) },
    { "hc_head_fn", MAT, ALL, 'S', 's', offsetof(Weights, hc_head.fn) },
    { "hc_head_base", VEC, ALL, 'S', 0, offsetof(Weights, hc_head.base) },
    { "hc_head_scale", VEC, ALL, '1', 0, offsetof(Weights, hc_head.scale) },
};

static int shape_of(char letter, const Config *c, int ratio) {
    int S = c->hc_mult, overlap = ratio == 4 ? 2 : 1;
    const int size[128] = {
        ['1'] = 1, ['3'] = 3, ['D'] = c->dim, ['V'] = c->vocab,
        ['S'] = S, ['s'] = S * c->dim, ['m'] = (2 + S) * S,
        ['H'] = c->n_heads, ['K'] = c->head_dim, ['h'] = c->n_heads * c->head_dim,
        ['g'] = c->n_heads / c->o_groups * c->head_dim, ['o'] = c->o_groups * c->o_lora_rank,
        ['M'] = ratio, ['c'] = overlap * c->head_dim, ['j'] = overlap * c->index_dim,
        ['I'] = c->index_heads, ['J'] = c->index_dim, ['i'] = c->index_heads * c->index_dim,
        ['E'] = c->n_experts, ['A'] = c->n_active, ['F'] = c->expert_dim, ['Q'] = c->q_lora_rank,
    };
    return size[(unsigned char)letter];
}

typedef struct {
    const Store *store;
    const Config *c;
    Err *e;
    int bound;                      // tensors taken so far
    size_t bytes;                   // of them
    int format[N_FORMATS];          // matrices of each format
} Binder;

// Sets of dtypes.
enum { F32 = 1 << DT_F32, BF16 = 1 << DT_BF16, I8 = 1 << DT_I8, I64 = 1 << DT_I64,
       FP8 = 1 << DT_F8_E4M3, E8M0 = 1 << DT_F8_E8M0 };

// cols 0: a vector.
static bool tensor_is(const Tensor *t, int types, int rows, int cols) {
    return types >> t->dtype & 1 && t->rank == (cols ? 2 : 1) && t->shape[0] == rows &&
           (!cols || t->shape[1] == cols);
}

// The tensor of that name. NULL and an error if it is missing or is something else.
static const Tensor *need(Binder *b, const char *name, int types, int rows, int cols) {
    const Tensor *t = store_find(b->store, name);
    char want[80], found[256], *p = want;
    if (!t)
        fail(b->e, "tensor %s is missing (of %zu tensors found): is the download complete?", name,
             b->store->n);
    else if (!tensor_is(t, types, rows, cols)) {
        for (int i = 0; i < N_DTYPES; i++)
            if (types >> i & 1) p += sprintf(p, "%s%s", p > want ? " or " : "", dtypes[i].name);
        sprintf(p, cols ? " [%d, %d]" : " [%d]", rows, cols);
        fail(b->e, "%s: tensor %s: expected %s, found %s", b->store->shards[t->shard].path, name,
             want, tensor_kind(t, found));
        t = NULL;
    } else {
        b->bound++;
        b->bytes += t->bytes;
    }
    return t;
}

// Data at an address that does not suit its element type is copied (legal in a file, slow and
// undefined in C).
static const void *aligned_data(const Tensor *t) {
    size_t align = (size_t)dtypes[t->dtype].bits / 8;
    return (uintptr_t)t->data % align ? memcpy(xalloc(t->bytes, 1), t->data, t->bytes) : t->data;
}

static bool bind_vec(Binder *b, const char *name, int rows, int cols, float **to) {
    const Tensor *t = need(b, name, F32 | BF16, rows, cols);
    if (!t) return false;
    size_t n = (size_t)rows * (cols ? cols : 1);
    float *x = *to = xalloc(n, sizeof *x);
    if (t->dtype == DT_F32) memcpy(x, t->data, t->bytes);
    for (size_t i = 0; i < n; i++) {
        bf16 h;
        if (t->dtype == DT_BF16) memcpy(&h, t->data + 2 * i, 2), x[i] = f32_of_bf16(h);
        if (!isfinite(x[i]))
            return fail(b->e, "%s: tensor %s: element %zu is not finite",
                        b->store->shards[t->shard].path, name, i);
    }
    return true;
}

static bool bind_table(Binder *b, const char *name, int rows, int cols, const int64_t **to) {
    const Tensor *t = need(b, name, I64, rows, cols);
    if (t) *to = aligned_data(t);
    return t;
}

// Every token's experts must exist. Reads the whole table (1 to 6 MB), so only before running.
static bool check_table(const Config *c, const Layer *l, Err *e) {
    for (size_t i = 0; l->tid2eid && i < (size_t)c->vocab * c->n_active; i++) {
        int64_t x = l->tid2eid[i];
        if (x < 0 || x >= c->n_experts)
            return fail(e, "%s.ffn.gate.tid2eid: token %zu: expert %lld does not exist (0 to %d "
                        "do)", l->name, i / c->n_active, (long long)x, c->n_experts - 1);
    }
    return true;
}

// Finds out a matrix's format from the dtypes and shapes of `name`.weight and `name`.scale (a name
// that ends in _fn is the tensor itself).
static bool bind_mat(Binder *b, const char *name, int n, int k, Mat *m) {
    char full[160];
    bool bare = strlen(name) > 3 && !strcmp(name + strlen(name) - 3, "_fn");
    snprintf(full, sizeof full, "%s%s", name, bare ? "" : ".weight");
    const Tensor *t = store_find(b->store, full), *s;
    bool nibbles = !bare && k % 32 == 0 && t && tensor_is(t, I8, n, k / 2);
    int types = nibbles ? I8 : bare ? F32 | BF16 : F32 | BF16 | I8 | FP8;
    if (!(t = need(b, full, types, n, nibbles ? k / 2 : k))) return false;
    m->n = n;
    m->k = k;
    m->w = aligned_data(t);
    m->fmt = t->dtype == DT_F32 ? W_F32 : t->dtype == DT_BF16 ? W_BF16 :
             t->dtype == DT_I8 ? W_INT8 : W_FP8;
    if (m->fmt == W_INT8 || m->fmt == W_FP8) {
        snprintf(full, sizeof full, "%s.scale", name);
        if (nibbles) s = need(b, full, BF16 | E8M0, n, k / 32);
        else s = need(b, full, m->fmt == W_INT8 ? BF16 : E8M0, (n + 127) / 128, (k + 127) / 128);
        if (!s) return false;
        if (nibbles) m->fmt = s->dtype == DT_BF16 ? W_INT4 : W_FP4;
        m->s = aligned_data(s);
    }
    b->format[m->fmt]++;
    return true;
}

static bool bind_one(Binder *b, const Bind *row, const char *prefix, int ratio, void *to) {
    char name[120];
    int rows = shape_of(row->rows, b->c, ratio);
    int cols = row->cols ? shape_of(row->cols, b->c, ratio) : 0;
    snprintf(name, sizeof name, "%s%s", prefix, row->name);
    return row->kind == VEC ? bind_vec(b, name, rows, cols, to) :
           row->kind == MAT ? bind_mat(b, name, rows, cols, to) :
           bind_table(b, name, rows, cols, to);
}

static bool bind_block(Binder *b, Layer *l, const char *name, int ratio, bool hashed) {
    char prefix[64];
    size_t before = b->bytes;
    snprintf(l->name, sizeof l->name, "%s", name);
    snprintf(prefix, sizeof prefix, "%s.", name);
    l->ratio = ratio;
    l->comp.ratio = l->icomp.ratio = ratio;
    l->comp.out = b->c->head_dim;
    l->icomp.out = b->c->index_dim;
    for (size_t i = 0; i < COUNT(layer_table); i++) {
        const Bind *row = layer_table + i;
        bool has[] = { [ALL] = true, [COMPRESSED] = ratio > 0, [CSA] = ratio == 4,
                       [HASHED] = hashed, [SCORED] = !hashed };
        if (has[row->when] && !bind_one(b, row, prefix, ratio, (char *)l + row->at)) return false;
    }
    size_t dense = b->bytes;
    for (size_t i = 0; i < COUNT(expert_table); i++) {
        Mat *m = xalloc((size_t)b->c->n_experts, sizeof *m);
        memcpy((char *)l + expert_table[i].at, &m, sizeof m);
        for (int e = 0; e < b->c->n_experts; e++) {
            snprintf(prefix, sizeof prefix, "%s.ffn.experts.%d.", name, e);
            if (!bind_one(b, expert_table + i, prefix, ratio, m + e)) return false;
        }
    }
    l->bytes = b->bytes - before;
    l->expert_bytes = b->bytes - dense;
    return true;
}

static bool bind_list(Binder *b, const Bind *table, size_t n, const char *prefix, void *to) {
    for (size_t i = 0; i < n; i++)
        if (!bind_one(b, table + i, prefix, 0, (char *)to + table[i].at)) return false;
    return true;
}

static bool store_has(const Store *s, const char *prefix) {
    size_t n = strlen(prefix);
    for (size_t i = 0; i < s->n; i++)
        if (s->tensors[i].name.n > n && !memcmp(s->tensors[i].name.p, prefix, n)) return true;
    return false;
}

// A layer that config.json does not know of means that the two do not belong together.
static bool check_layers(const Binder *b) {
    for (size_t i = 0; i < b->store->n; i++) {
        char start[16];             // "layers.", and at most 8 digits
        int layer;
        Span name = b->store->tensors[i].name;
        snprintf(start, sizeof start, "%.*s", SHOWN(name));
        if (sscanf(start, "layers.%d", &layer) == 1 && layer >= b->c->n_layers)
            return fail(b->e, "config.json: num_hidden_layers is %d, but the checkpoint has %.*s",
                        b->c->n_layers, SHOWN(name));
    }
    return true;
}

// Binds all tensors of the model. The MTP layers are bound if the checkpoint has them (dspark
// releases: another kind).
static bool weights_bind(Weights *w, Binder *b) {
    const Config *c = b->c;
    char name[64];
    if (!check_layers(b)) return false;
    w->layers = xalloc((size_t)c->n_layers, sizeof *w->layers);
    if (!bind_list(b, model_table, COUNT(model_table), "", w)) return false;
    if (w->embed.fmt != W_BF16 && w->embed.fmt != W_F32)
        return fail(b->e, "embed.weight: expected BF16 or F32");
    for (int i = 0; i < c->n_layers; i++) {
        snprintf(name, sizeof name, "layers.%d", i);
        if (!bind_block(b, w->layers + i, name, c->ratio[i], i < c->n_hash_layers)) return false;
    }
    if (!c->n_mtp || c->dspark || !store_has(b->store, "mtp.")) return true;
    w->mtp = xalloc((size_t)c->n_mtp, sizeof *w->mtp);
    for (int i = 0; i < c->n_mtp; i++) {
        size_t before = b->bytes;
        snprintf(name, sizeof name, "mtp.%d", i);
        if (!bind_block(b, &w->mtp[i].block, name, c->ratio[c->n_layers + i], false)) return false;
        snprintf(name, sizeof name, "mtp.%d.", i);
        if (!bind_list(b, mtp_table, COUNT(mtp_table), name, w->mtp + i)) return false;
        w->mtp[i].block.bytes = b->bytes - before;
    }
    return true;
}

static size_t store_bytes(const Store *s) {
    size_t n = 0;
    for (size_t i = 0; i < s->n; i++) n += s->tensors[i].bytes;
    return n;
}

// The rotation per position of each pair of rope dims (spec 3), [R/2]. Compressed layers use their
// own theta and YaRN.
static float *rope_frequencies(const Config *c, bool compressed) {
    int R = c->rope_dim;
    float *f = xalloc((size_t)R / 2, sizeof *f);
    double theta = compressed ? c->compress_theta : c->rope_theta, edge[2];
    double beta[2] = { c->yarn_beta_fast, c->yarn_beta_slow };
    for (int i = 0; i < 2; i++)
        edge[i] = R * log(c->yarn_ctx / (2 * M_PI * beta[i])) / (2 * log(theta));
    double lo = fmax(floor(edge[0]), 0), hi = fmin(ceil(edge[1]), R - 1);
    for (int i = 0; i < R / 2; i++) {
        double g = pow(theta, -2.0 * i / R);
        double ramp = fmin(fmax((i - lo) / (hi == lo ? 0.001 : hi - lo), 0), 1);
        f[i] = (float)(compressed ? g / c->yarn_factor * ramp + g * (1 - ramp) : g);
    }
    return f;
}
// ---------------------------------------------------------------------------
// devices: the short list of operations the forward pass is written over. The CPU's are C functions
// in this file, CUDA's are launches of the kernels of the same names in kernels.cu.

typedef struct Device Device;

// Every operation works on the T rows given to begin(), in the device's own buffers. -> names the
// buffers written; in brackets: the section of the model's description. Errors end the process.
typedef struct {
    void (*begin)(Device *d, const Row *rows, int T);              // the batch of the next calls
    void (*embed)(Device *d);                                      // X[t,s] = embed[token]  (1)
    void (*streams_in)(Device *d, const float *X);                 // host X [T, S, D] -> X
    void (*streams_out)(Device *d, float *X);                      // X -> host X, and waits for it
    void (*hc_pre)(Device *d, const Hyper *h, const float *norm);  // X -> x, post, comb  (2)
    void (*hc_post)(Device *d);             // X[k] = post[k] y + sum_j comb[j][k] X[j]
    void (*attn_project)(Device *d, const Layer *l);        // x -> qr, kv, compressor, index weights
    void (*attn_latent)(Device *d, const Layer *l, int i);  // norms; kv -> ring; compress  (4, 5)
    void (*attn_query)(Device *d, const Layer *l);          // qr -> q, index q: norm, rope  (4, 6)
    void (*index_topk)(Device *d, const Layer *l, int i);   // index q, keys -> chosen rows  (6)
    void (*attend)(Device *d, const Layer *l, int i);       // q, caches -> o, inverse rope  (4.3-6)
    void (*attn_out)(Device *d, const Layer *l);            // o -> u -> y  (4.7)
    void (*route)(Device *d, const Layer *l);               // x -> experts and weights  (7.1-7.3)
    void (*experts)(Device *d, const Layer *l);             // x -> y: routed and shared  (7.4, 7.5)
    void (*mtp_in)(Device *d, const Mtp *m);                // X, next -> X  (10)
    void (*head)(Device *d, const Hyper *h, const float *norm, const int *want, int n,
                 float *logits);                            // rows want[n] -> host [n, V]  (1, 2.5)
    void (*cache_new)(Device *d, int slot);                 // empty caches of a new session
    void (*cache_free)(Device *d, int slot);
    size_t (*cache_save)(Device *d, int slot, int pos, void *to);        // rings; to NULL: the size
    void (*cache_load)(Device *d, int slot, int pos, const void *from);  // compressed rows stay
} Ops;

// A stage: the layers [first, last) on one device, with everything they need there. i in the calls
// above counts a stage's layers from 0; the MTP layers come after them on the last stage.
struct Device {
    char name[24];              // "cpu", "cuda:0"
    int ordinal;                // of the GPU, -1: the CPU
    const Ops *op;
    const Config *c;
    Weights w;                  // pointers valid on the device; only this stage's layers are set
    int first, last;
    bool has_head;              // also runs head and MTP
    bool exact;
    int max_rows;               // T at most
    int ring, cring[129];       // slots of the window ring; of the compressors' rings, by M
    float *inv_freq[2];         // [R/2] host copies: rotation per position for M = 0, M > 0 (YaRN)
    int ctx;                    // positions a session can hold
    Cache *cache[64];           // [slot][layer of this stage]
    const char *at;             // what is being computed ("layers.7", "head"), for errors
    void *impl;                 // Run (CPU) or Cuda
};
// ---------------------------------------------------------------------------
// the CPU's operations: the specification in code. Every output has one fixed order of summation,
// so results do not depend on the number of threads, the batch or the chunk. Fast path: products on
// INT8 activations, caches in BF16, Q, P and index q rounded to BF16. With --exact: FP32
// everywhere.

// One matrix's share of a batch: an expert's entries, or an output group.
typedef struct { int expert, start, n; Mat w; Act a; } Part;

// Buffers for T <= max_rows rows.
typedef struct {
    Pool *pool;
    const Row *rows;            // [T]
    int T;
    float *rot[2];              // [T, R/2, 2] cos, sin at each row's position: [0] M = 0, [1] M > 0
    float *X;                   // [T, S, D] the hyper-connection streams
    float *mix;                 // [T, (2+S)*S]
    float *post, *comb;         // [T, S], [T, S, S]
    Act x;                      // [T, D] input of attention and experts
    float *y;                   // [T, D] their output
    Act qr;                     // [T, Q]
    float *kv;                  // [T, K]
    float *cin, *icin;          // [T, 2, c*K], [T, 2, c*J] compressor inputs
    float *q;                   // [T, H, K]
    float *iq, *iw;             // [T, I, J], [T, I] index queries and weights
    float *iscore;              // [slab, keys] index scores, INDEX_SCORES at most
    int *top, *n_top;           // [T, topk], [T] compressed rows each row may see
    Act o;                      // [T, G, H*K/G]
    Act u;                      // [T, G*L]
    float *gate;                // [T, E]
    int *expert;                // [T, A]
    float *weight;              // [T, A]
    int *count;                 // [E]
    // [T*A] where each (row, choice) stands in the list sorted by expert
    int *place;
    // [(A+1)*T] the row of each entry of that list, the shared expert's entries last
    int *entry_row;
    float *entry_weight;        // [(A+1)*T] its route weight
    float *g, *v;               // [(A+1)*T, F] w1 x, w3 x
    Act h;                      // [(A+1)*T, F]
    float *ye;                  // [(A+1)*T, D] each expert's contribution
    Part *part;                 // [parts] of the experts, or of wo_a
    Product *job;               // [2 * parts]
    Act emb, streams;           // [T, D], [T*S, D] MTP: normed next embeddings, normed streams
    float *e;                   // [T, D] MTP: projected embeddings
    Act heads;                  // [T, D] input of the head
} Run;

// What a parallel region needs to know; begin..end are its items.
typedef struct {
    Device *d;
    Run *r;
    const Config *c;
    const Layer *l;
    Cache *const *cache;        // [slot] of this layer: cache[slot] + i
    int i;
    const Hyper *hyper;
    const float *norm;
    const Mtp *mtp;
    const int *want;
    Act *act;                   // to be quantised
    int from, keys, chunk;      // index scores: first row of the slab, keys at most, keys per item
} Task;

static Task task(Device *d, const Layer *l, int i) {
    return (Task){ .d = d, .r = d->impl, .c = d->c, .l = l, .cache = d->cache, .i = i };
}

enum {
    MAX_HEAD_DIM = 4096,        // head_dim and index_head_dim
    MAX_STREAMS = 16,           // hc_mult
    COLUMNS = 512,              // of the streams that one item mixes
    HEAD_BLOCK = 16,            // heads of one item: they share the FP32 copy of a cached row
    ROW_BLOCK = 8,              // cached rows that are expanded at once
};
static const size_t INDEX_SCORES = 4 << 20;     // index scores held at once

// --- small maths on one row

// 16 partial sums, then pairwise: one order on every machine.
static float dot(const float *a, const float *b, int n) {
    float s[16] = { 0 };
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) s[j] += a[i + j] * b[i + j];
    for (int j = 0; i < n; i++, j++) s[j] += a[i] * b[i];
    for (int w = 8; w; w /= 2)
        for (int j = 0; j < w; j++) s[j] += s[j + w];
    return s[0];
}

// y += a x
static void axpy(float *y, float a, const float *x, int n) {
    for (int i = 0; i < n; i++) y[i] += a * x[i];
}

// y = w * x / sqrt(mean(x^2) + eps); w may be NULL (no weight)
static void rms_norm(float *y, const float *x, const float *w, int n, float eps) {
    float scale = 1.0f / sqrtf(dot(x, x, n) / n + eps);
    for (int i = 0; i < n; i++) y[i] = x[i] * scale * (w ? w[i] : 1.0f);
}

static float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Rotates the pairs (v[2i], v[2i+1]) of the R rope dims by the angles in rot [R/2, 2]; sign -1:
// back.
static void rope(float *v, const float *rot, int R, float sign) {
    for (int i = 0; i < R / 2; i++) {
        float a = v[2 * i], b = v[2 * i + 1], cs = rot[2 * i], sn = rot[2 * i + 1] * sign;
        v[2 * i] = a * cs - b * sn;
        v[2 * i + 1] = a * sn + b * cs;
    }
}

static void rope_angles(float *rot, const float *inv_freq, int R, int pos) {
    for (int i = 0; i < R / 2; i++) {
        float angle = (float)pos * inv_freq[i];
        rot[2 * i] = cosf(angle);
        rot[2 * i + 1] = sinf(angle);
    }
}

// Quantises row t of a (all its segments) for the integer products. The exact path uses a->x only.
static void act_quantise(const Device *d, Act *a, int t) {
    if (d->exact) return;
    int segments = (int)(a->lds / a->groups);
    for (int i = 0; i < segments; i++)
        quantise(a->x + t * a->ld + (size_t)i * a->k, a->k,
                 a->q + t * a->ldq + (size_t)i * a->groups * 32,
                 a->s + t * a->lds + (size_t)i * a->groups);
}

static Act act_new(const Device *d, int rows, int k, int segments) {
    Act a = { .k = k, .groups = (k + 31) / 32, .ld = (size_t)k * segments };
    a.lds = (size_t)a.groups * segments;
    a.ldq = a.lds * 32;
    a.x = xalloc(a.ld * rows, sizeof *a.x);
    if (d->exact) return a;
    a.q = xalloc(a.ldq * rows, 1);
    a.s = xalloc(a.lds * rows, sizeof *a.s);
    return a;
}

// The columns of one segment, in every row.
static Act act_segment(const Act *a, int i) {
    Act v = *a;
    v.x += (size_t)i * a->k;
    if (a->q) v.q += (size_t)i * a->groups * 32, v.s += (size_t)i * a->groups;
    return v;
}

// The rows from `row` on.
static Act act_rows(const Act *a, int row) {
    Act v = *a;
    v.x += (size_t)row * a->ld;
    if (a->q) v.q += (size_t)row * a->ldq, v.s += (size_t)row * a->lds;
    return v;
}

// Bytes of a matrix and its scales as stored; an absent one has none.
static size_t mat_bytes(const Mat *m) {
    size_t n = (size_t)m->n, k = (size_t)m->k, groups = n * (k / 32);
    size_t blocks = (n + 127) / 128 * ((k + 127) / 128);
    size_t scales[N_FORMATS] = { 0, 0, 2 * blocks, 2 * groups, blocks, groups };
    return m->w ? n * row_bytes(m) + scales[m->fmt] : 0;
}

// Rows [row, row + n) of a matrix. Of a block-scaled one they must begin a scale block or lie
// within one.
static Mat mat_rows(const Mat *w, int row, int n) {
    size_t groups = (size_t)w->k / 32, blocks = ((size_t)w->k + 127) / 128, first = (size_t)row;
    size_t scales[N_FORMATS] = { 0, 0, first / 128 * blocks * 2, first * groups * 2,
                                 first / 128 * blocks, first * groups };
    Mat m = *w;
    m.n = n;
    m.w = (const uint8_t *)w->w + first * row_bytes(w);
    if (w->s) m.s = (const uint8_t *)w->s + scales[w->fmt];
    return m;
}

// Rows of the caches: BF16, or FP32 on the exact path.
static size_t kv_bytes(const Device *d, int n) { return (size_t)n * (d->exact ? 4 : 2); }

static void row_put(const Device *d, void *rows, size_t i, const float *x, int n) {
    if (d->exact) memcpy((float *)rows + i * n, x, 4 * (size_t)n);
    else for (int j = 0; j < n; j++) ((bf16 *)rows)[i * n + j] = bf16_of_f32(x[j]);
}

// Row i as FP32 in x [n].
static void row_get(const Device *d, const void *rows, size_t i, int n, float *x) {
    if (d->exact) memcpy(x, (const float *)rows + i * n, 4 * (size_t)n);
    else for (int j = 0; j < n; j++) x[j] = f32_of_bf16(((const bf16 *)rows)[i * n + j]);
}

// On the fast path what attention and the indexer multiply is rounded to BF16 on every device.
static void round_row(const Device *d, float *x, int n) {
    if (!d->exact) for (int j = 0; j < n; j++) x[j] = f32_of_bf16(bf16_of_f32(x[j]));
}

// --- hyper-connections (mHC, spec 2)

// Makes C [S, S] doubly stochastic: softmax over rows, then columns and rows are normalised in
// turn.
static void sinkhorn(float *C, int S, int iters, float eps) {
    for (int j = 0; j < S; j++) {
        float m = C[j * S], sum = 0;
        for (int k = 1; k < S; k++) m = fmaxf(m, C[j * S + k]);
        for (int k = 0; k < S; k++) sum += C[j * S + k] = expf(C[j * S + k] - m);
        for (int k = 0; k < S; k++) C[j * S + k] = C[j * S + k] / sum + eps;
    }
    for (int it = 0; it < iters; it++) {
        for (int j = 0; it && j < S; j++) {
            float sum = eps;
            for (int k = 0; k < S; k++) sum += C[j * S + k];
            for (int k = 0; k < S; k++) C[j * S + k] /= sum;
        }
        for (int k = 0; k < S; k++) {
            float sum = eps;
            for (int j = 0; j < S; j++) sum += C[j * S + k];
            for (int j = 0; j < S; j++) C[j * S + k] /= sum;
        }
    }
}

// y = sum_s pre[s] X[s], pre = sigmoid(mix * scale + base) + hc_eps
static void hc_mix(float *y, const float *X, const float *mix, const Hyper *h, const Config *c) {
    for (int s = 0; s < c->hc_mult; s++) {
        float pre = sigmoid(mix[s] * h->scale[0] + h->base[s]) + c->hc_eps;
        for (int i = 0; i < c->dim; i++) {
            float v = pre * X[(size_t)s * c->dim + i];
            y[i] = s ? y[i] + v : v;
        }
    }
}

// mix [n] /= rms of the row's streams
static void hc_scale(const Device *d, float *mix, int n, const float *X) {
    int len = d->c->hc_mult * d->c->dim;
    float mean = dot(X, X, len) / len;
    if (!isfinite(mean))
        die(1, "%s: the output is not finite (run `dsv4 verify` on the checkpoint)", d->at);
    float scale = 1.0f / sqrtf(mean + d->c->norm_eps);
    for (int i = 0; i < n; i++) mix[i] *= scale;
}

static void hc_pre_rows(void *arg, int begin, int end) {
    Task *k = arg;
    Run *r = k->r;
    int S = k->c->hc_mult, D = k->c->dim, n = (2 + S) * S;
    for (int t = begin; t < end; t++) {
        const float *X = r->X + (size_t)t * S * D, *base = k->hyper->base, *scale = k->hyper->scale;
        float *mix = r->mix + (size_t)t * n, *x = r->x.x + t * r->x.ld,
              *C = r->comb + (size_t)t * S * S;
        hc_scale(k->d, mix, n, X);
        hc_mix(x, X, mix, k->hyper, k->c);
        for (int s = 0; s < S; s++)
            r->post[t * S + s] = 2 * sigmoid(mix[S + s] * scale[1] + base[S + s]);
        for (int i = 0; i < S * S; i++) C[i] = mix[2 * S + i] * scale[2] + base[2 * S + i];
        sinkhorn(C, S, k->c->hc_iters, k->c->hc_eps);
        rms_norm(x, x, k->norm, D, k->c->norm_eps);
        act_quantise(k->d, &r->x, t);
    }
}

static Act streams_act(const Run *r, const Config *c) {
    int n = c->hc_mult * c->dim;
    return (Act){ .x = r->X, .k = n, .ld = (size_t)n };
}

static void cpu_hc_pre(Device *d, const Hyper *h, const float *norm) {
    Task k = task(d, NULL, 0);
    Act X = streams_act(k.r, k.c);
    k.hyper = h;
    k.norm = norm;
    matmul(k.r->pool, &(Product){ &h->fn, &X, NULL, k.r->T, k.r->mix, (size_t)h->fn.n }, 1,
           d->exact);
    parallel(k.r->pool, k.r->T, 1, hc_pre_rows, &k);
}

// X'[k] = post[k] y + sum_j comb[j][k] X[j]: the sum runs over comb's first index. Items: T rows
// times column blocks.
static void hc_post_columns(void *arg, int begin, int end) {
    Task *k = arg;
    Run *r = k->r;
    int S = k->c->hc_mult, D = k->c->dim, blocks = (D + COLUMNS - 1) / COLUMNS;
    float in[MAX_STREAMS][COLUMNS];
    for (int item = begin; item < end; item++) {
        int t = item / blocks, at = item % blocks * COLUMNS,
            n = D - at < COLUMNS ? D - at : COLUMNS;
        float *X = r->X + (size_t)t * S * D + at;
        const float *C = r->comb + (size_t)t * S * S, *y = r->y + (size_t)t * D + at;
        for (int j = 0; j < S; j++) memcpy(in[j], X + (size_t)j * D, sizeof *X * (size_t)n);
        for (int s = 0; s < S; s++, X += D) {
            for (int i = 0; i < n; i++) X[i] = r->post[t * S + s] * y[i];
            for (int j = 0; j < S; j++) axpy(X, C[j * S + s], in[j], n);
        }
    }
}

static void cpu_hc_post(Device *d) {
    Task k = task(d, NULL, 0);
    int blocks = (d->c->dim + COLUMNS - 1) / COLUMNS;
    parallel(k.r->pool, k.r->T * blocks, 1, hc_post_columns, &k);
}

// --- attention (spec 4 to 6)

// Everything that is a product with x: q and kv latents, compressor inputs, the indexer's weights.
static void cpu_attn_project(Device *d, const Layer *l) {
    Run *r = d->impl;
    const Config *c = d->c;
    Product p[7];
    int n = 0;
    p[n++] = (Product){ &l->wq_a, &r->x, NULL, r->T, r->qr.x, r->qr.ld };
    p[n++] = (Product){ &l->wkv, &r->x, NULL, r->T, r->kv, (size_t)c->head_dim };
    if (l->ratio) {
        size_t ck = (size_t)l->comp.wkv.n;
        p[n++] = (Product){ &l->comp.wkv, &r->x, NULL, r->T, r->cin, 2 * ck };
        p[n++] = (Product){ &l->comp.wgate, &r->x, NULL, r->T, r->cin + ck, 2 * ck };
    }
    if (l->ratio == 4) {
        size_t cj = (size_t)l->icomp.wkv.n;
        p[n++] = (Product){ &l->icomp.wkv, &r->x, NULL, r->T, r->icin, 2 * cj };
        p[n++] = (Product){ &l->icomp.wgate, &r->x, NULL, r->T, r->icin + cj, 2 * cj };
        p[n++] = (Product){ &l->iproj, &r->x, NULL, r->T, r->iw, (size_t)c->index_heads };
    }
    matmul(r->pool, p, n, d->exact);
}

// A row's compressor inputs go to the ring, the position's ape added to the gate half.
static void compress_store(const Compressor *m, float *ring, int slots, const float *in, int pos) {
    size_t n = (size_t)m->wkv.n;
    float *to = ring + (size_t)(pos % slots) * 2 * n;
    const float *ape = m->ape + (size_t)(pos % m->ratio) * n;
    memcpy(to, in, n * sizeof *to);
    for (size_t i = 0; i < n; i++) to[n + i] = in[n + i] + ape[i];
}

// Pools the window that ends at pos into out [m->out]: per channel a softmax over the candidates'
// gates weighs their kv. With overlap (M = 4) the first half of the channels speaks for the window
// before.
static void compress_pool(const Compressor *m, const float *ring, int slots, int pos, float *out) {
    int n = m->wkv.n, overlap = n > m->out, start = pos - m->ratio + 1;
    int first = overlap && start ? start - m->ratio : start;
    float max[MAX_HEAD_DIM], sum[MAX_HEAD_DIM];
    for (int i = 0; i < m->out; i++) {
        max[i] = -INFINITY;
        sum[i] = out[i] = 0;
    }
    for (int p = first; p <= pos; p++) {
        const float *gate =
            ring + ((size_t)(p % slots) * 2 + 1) * n + (overlap && p >= start ? m->out : 0);
        for (int i = 0; i < m->out; i++) max[i] = fmaxf(max[i], gate[i]);
    }
    for (int p = first; p <= pos; p++) {
        const float *kv = ring + (size_t)(p % slots) * 2 * n + (overlap && p >= start ? m->out : 0);
        for (int i = 0; i < m->out; i++) {
            float e = expf(kv[n + i] - max[i]);
            sum[i] += e;
            out[i] += e * kv[i];
        }
    }
    for (int i = 0; i < m->out; i++) out[i] /= sum[i];
}

// If the row at pos completes a window: pool, norm, rope at the window's START, append to `rows`.
static void compress_emit(Task *k, const Compressor *m, const float *ring, void *rows, int pos) {
    int M = m->ratio, R = k->c->rope_dim;
    float out[MAX_HEAD_DIM], rot[MAX_HEAD_DIM];
    if ((pos + 1) % M) return;
    compress_pool(m, ring, k->d->cring[M], pos, out);
    rms_norm(out, out, m->norm, m->out, k->c->norm_eps);
    rope_angles(rot, k->d->inv_freq[1], R, pos + 1 - M);
    rope(out + m->out - R, rot, R, 1);
    row_put(k->d, rows, (size_t)(pos / M), out, m->out);
}

static void latent_store_rows(void *arg, int begin, int end) {
    Task *k = arg;
    Run *r = k->r;
    const Layer *l = k->l;
    int K = k->c->head_dim, R = k->c->rope_dim;
    float eps = k->c->norm_eps;
    for (int t = begin; t < end; t++) {
        const Row *row = r->rows + t;
        const Cache *cache = k->cache[row->slot] + k->i;
        float *qr = r->qr.x + t * r->qr.ld, *kv = r->kv + (size_t)t * K;
        rms_norm(qr, qr, l->q_norm, k->c->q_lora_rank, eps);
        act_quantise(k->d, &r->qr, t);
        rms_norm(kv, kv, l->kv_norm, K, eps);
        rope(kv + K - R, r->rot[l->ratio != 0] + (size_t)t * R, R, 1);
        row_put(k->d, cache->win, (size_t)(row->pos % k->d->ring), kv, K);
        if (l->ratio)
            compress_store(&l->comp, cache->cin, k->d->cring[l->ratio],
                           r->cin + (size_t)t * 2 * l->comp.wkv.n, row->pos);
        if (l->ratio == 4)
            compress_store(&l->icomp, cache->icin, k->d->cring[4],
                           r->icin + (size_t)t * 2 * l->icomp.wkv.n, row->pos);
    }
}

static void latent_emit_rows(void *arg, int begin, int end) {
    Task *k = arg;
    for (int t = begin; t < end; t++) {
        const Row *row = k->r->rows + t;
        const Cache *cache = k->cache[row->slot] + k->i;
        compress_emit(k, &k->l->comp, cache->cin, cache->comp, row->pos);
        if (k->l->ratio == 4) compress_emit(k, &k->l->icomp, cache->icin, cache->ikeys, row->pos);
    }
}

static void cpu_attn_latent(Device *d, const Layer *l, int i) {
    Task k = task(d, l, i);
    parallel(k.r->pool, k.r->T, 1, latent_store_rows, &k);
    if (l->ratio) parallel(k.r->pool, k.r->T, 1, latent_emit_rows, &k);
}

// Items: T * H heads of q, then (M = 4) T * I heads of the index query.
static void query_heads(void *arg, int begin, int end) {
    Task *k = arg;
    Run *r = k->r;
    const Config *c = k->c;
    int H = c->n_heads, R = c->rope_dim, TH = r->T * H;
    const float *rot = r->rot[k->l->ratio != 0];
    for (int i = begin; i < end; i++) {
        bool index = i >= TH;
        int j = index ? i - TH : i, n = index ? c->index_dim : c->head_dim;
        int t = j / (index ? c->index_heads : H);
        float *q = (index ? r->iq : r->q) + (size_t)j * n;
        if (!index) rms_norm(q, q, NULL, n, c->norm_eps);
        rope(q + n - R, rot + (size_t)t * R, R, 1);
        round_row(k->d, q, n);
    }
}

static void cpu_attn_query(Device *d, const Layer *l) {
    Task k = task(d, l, 0);
    const Config *c = d->c;
    Run *r = k.r;
    bool index = l->ratio == 4;
    Product p[2] = { { &l->wq_b, &r->qr, NULL, r->T, r->q, (size_t)c->n_heads * c->head_dim },
                     { &l->iwq_b, &r->qr, NULL, r->T, r->iq,
                       (size_t)c->index_heads * c->index_dim } };
    matmul(r->pool, p, 1 + index, d->exact);
    parallel(r->pool, r->T * (c->n_heads + (index ? c->index_heads : 0)), 4, query_heads, &k);
}

// Compressed rows that a query at pos may see: those whose window is complete.
static int n_visible(int pos, int ratio) { return ratio ? (pos + 1) / ratio : 0; }

// score[w] = sum_h wt[h] relu(q[h] . key[w]); items are (row of the slab, chunk of keys).
static void index_scores(void *arg, int begin, int end) {
    Task *k = arg;
    Run *r = k->r;
    const Config *c = k->c;
    int I = c->index_heads, J = c->index_dim, chunks = (k->keys + k->chunk - 1) / k->chunk;
    float scale = 1.0f / sqrtf((float)J) / sqrtf((float)I), key[MAX_HEAD_DIM],
          *s = xalloc((size_t)I, sizeof *s);
    for (int item = begin; item < end; item++) {
        int t = k->from + item / chunks, w = item % chunks * k->chunk;
        const Row *row = r->rows + t;
        const Cache *cache = k->cache[row->slot] + k->i;
        int last = n_visible(row->pos, 4) < w + k->chunk ? n_visible(row->pos, 4) : w + k->chunk;
        if (n_visible(row->pos, 4) <= c->index_topk) continue;
        for (; w < last; w++) {
            float sum = 0;
            row_get(k->d, cache->ikeys, (size_t)w, J, key);
            row_scores(key, r->iq + (size_t)t * I * J, I, J, scale, s);
            for (int h = 0; h < I; h++) sum += r->iw[(size_t)t * I + h] * (s[h] < 0 ? 0 : s[h]);
            if (!isfinite(sum))
                die(1,
                    "%s.attn.indexer: a score is not finite (run `dsv4 verify` on the checkpoint)",
                    k->l->name);
            r->iscore[(size_t)(t - k->from) * k->keys + w] = sum;
        }
    }
    free(s);
}

// Integers in the order of the floats.
static uint32_t order_key(float x) {
    uint32_t u = bits_of_f32(x);
    return u >> 31 ? ~u : u | 0x80000000u;
}

// The k largest of score[n] as ascending indices; ties go to the lowest index. Radix select on
// 11 + 11 + 10 bits.
static void top_k(const float *score, int n, int k, int *top) {
    uint32_t prefix = 0, mask = 0;
    // entries still wanted among those equal to prefix
    int need = k, m = 0;
    for (int shift = 21; ; shift = shift > 10 ? shift - 11 : 0) {
        int count[2048] = { 0 }, bits = shift ? 11 : 10, bin = (1 << bits) - 1;
        for (int i = 0; i < n; i++) {
            uint32_t key = order_key(score[i]);
            if ((key & mask) == prefix) count[key >> shift & ((1u << bits) - 1)]++;
        }
        while (bin && count[bin] < need) need -= count[bin--];
        prefix |= (uint32_t)bin << shift;
        mask |= ((1u << bits) - 1) << shift;
        if (!shift) break;
    }
    for (int i = 0; i < n && m < k; i++) {
        uint32_t key = order_key(score[i]);
        if (key > prefix || (key == prefix && need-- > 0)) top[m++] = i;
    }
}

static void choose_rows(void *arg, int begin, int end) {
    Task *k = arg;
    Run *r = k->r;
    int topk = k->c->index_topk;
    for (int t = k->from + begin; t < k->from + end; t++) {
        int n = n_visible(r->rows[t].pos, 4), *top = r->top + (size_t)t * topk;
        r->n_top[t] = n < topk ? n : topk;
        if (n > topk) top_k(r->iscore + (size_t)(t - k->from) * k->keys, n, topk, top);
        else for (int w = 0; w < n; w++) top[w] = w;
    }
}

// In slabs of rows, so that the scores of a long context stay in bounded memory.
static void cpu_index_topk(Device *d, const Layer *l, int i) {
    Task k = task(d, l, i);
    Run *r = k.r;
    for (int t = 0; t < r->T; t++) {
        int n = n_visible(r->rows[t].pos, 4);
        k.keys = n > k.keys ? n : k.keys;
    }
    int slab = k.keys ? (int)(INDEX_SCORES / (size_t)k.keys) : r->T;
    slab = slab < 1 ? 1 : slab;
    k.chunk = 1024;
    for (k.from = 0; k.from < r->T; k.from += slab) {
        int rows = r->T - k.from < slab ? r->T - k.from : slab;
        if (k.keys > d->c->index_topk)
            parallel(r->pool, rows * ((k.keys + k.chunk - 1) / k.chunk), 1, index_scores, &k);
        parallel(r->pool, rows, 1, choose_rows, &k);
    }
}

// The cached rows one query sees: its window, then the compressed rows (all, or the indexer's
// choice).
typedef struct { const Cache *cache; const int *top; int from, window, n; } Seen;

static Seen rows_seen(const Task *k, int t) {
    const Row *row = k->r->rows + t;
    int from = row->pos - k->c->window + 1 > 0 ? row->pos - k->c->window + 1 : 0;
    Seen v = { k->cache[row->slot] + k->i, NULL, from, row->pos - from + 1, 0 };
    if (k->l->ratio == 4) v.top = k->r->top + (size_t)t * k->c->index_topk;
    v.n = v.window + (v.top ? k->r->n_top[t] : n_visible(row->pos, k->l->ratio));
    return v;
}

// Up to ROW_BLOCK of them from row j on, as FP32 [n, K] in buf; returns n.
static int seen_rows(const Task *k, const Seen *v, int j, float *buf) {
    int K = k->c->head_dim, n = v->n - j < ROW_BLOCK ? v->n - j : ROW_BLOCK;
    for (int i = 0; i < n; i++) {
        int w = j + i - v->window;
        const void *rows = w < 0 ? v->cache->win : v->cache->comp;
        row_get(k->d, rows,
                (size_t)(w < 0    ? (v->from + j + i) % k->d->ring
                         : v->top ? v->top[w]
                                  : w),
                K, buf + (size_t)i * K);
    }
    return n;
}

// Scores become unnormalised weights exp(s - m); returns their sum with the sink, which has no
// value row.
static float softmax_sink(const Device *d, float *s, int n, float sink) {
    float m = sink, sum;
    for (int j = 0; j < n; j++) m = fmaxf(m, s[j]);
    sum = expf(sink - m);
    for (int j = 0; j < n; j++) sum += s[j] = expf(s[j] - m);
    round_row(d, s, n);
    return sum;
}

// Items: T rows times blocks of HEAD_BLOCK heads, which share the cached rows (one KV head).
static void attend_heads(void *arg, int begin, int end) {
    Task *k = arg;
    Run *r = k->r;
    int H = k->c->n_heads, K = k->c->head_dim, R = k->c->rope_dim,
        blocks = (H + HEAD_BLOCK - 1) / HEAD_BLOCK;
    float scale = 1.0f / sqrtf((float)K), *rows = xalloc((size_t)ROW_BLOCK * K, sizeof *rows);
    for (int item = begin; item < end; item++) {
        int t = item / blocks, h0 = item % blocks * HEAD_BLOCK,
            hn = H - h0 < HEAD_BLOCK ? H - h0 : HEAD_BLOCK;
        Seen v = rows_seen(k, t);
        const float *q = r->q + ((size_t)t * H + h0) * K;
        float *o = r->o.x + t * r->o.ld + (size_t)h0 * K, sum[HEAD_BLOCK];
        float *p = xalloc((size_t)hn * (size_t)v.n, sizeof *p);     // [hn, n]
        for (int j = 0, n; j < v.n; j += n) {
            n = seen_rows(k, &v, j, rows);
            for (int h = 0; h < hn; h++)
                row_scores(q + (size_t)h * K, rows, n, K, scale, p + (size_t)h * v.n + j);
        }
        for (int h = 0; h < hn; h++)
            sum[h] = softmax_sink(k->d, p + (size_t)h * v.n, v.n, k->l->attn_sink[h0 + h]);
        memset(o, 0, sizeof *o * (size_t)hn * K);
        for (int j = 0, n; j < v.n; j += n) {
            n = seen_rows(k, &v, j, rows);
            for (int h = 0; h < hn; h++)
                row_sum(o + (size_t)h * K, p + (size_t)h * v.n + j, rows, n, K);
        }
        for (int h = 0; h < hn; h++, o += K) {
            for (int i = 0; i < K; i++) o[i] /= sum[h];
            rope(o + K - R, r->rot[k->l->ratio != 0] + (size_t)t * R, R, -1);
        }
        free(p);
    }
    free(rows);
}

static void quantise_rows(void *arg, int begin, int end) {
    Task *k = arg;
    for (int t = begin; t < end; t++) act_quantise(k->d, k->act, t);
}

static void cpu_attend(Device *d, const Layer *l, int i) {
    Task k = task(d, l, i);
    int blocks = (d->c->n_heads + HEAD_BLOCK - 1) / HEAD_BLOCK;
    parallel(k.r->pool, k.r->T * blocks, 1, attend_heads, &k);
    k.act = &k.r->o;
    parallel(k.r->pool, k.r->T, 1, quantise_rows, &k);
}

// Grouped output: u_g = wo_a[g] o_g for each group of H/G heads, then y = wo_b u. A group's rows
// are cut where a 128-row block of scales ends.
static void cpu_attn_out(Device *d, const Layer *l) {
    Task k = task(d, l, 0);
    Run *r = k.r;
    int G = d->c->o_groups, L = d->c->o_lora_rank;
    int n = 0;
    for (int g = 0; g < G; g++)
        for (int row = g * L, end = row + L, next; row < end; row = next, n++) {
            next = L % 128 == 0 || (row / 128 + 1) * 128 > end ? end : (row / 128 + 1) * 128;
            r->part[n] =
                (Part){ .w = mat_rows(&l->wo_a, row, next - row), .a = act_segment(&r->o, g) };
            r->job[n] =
                (Product){ &r->part[n].w, &r->part[n].a, NULL, r->T, r->u.x + row, r->u.ld };
        }
    matmul(r->pool, r->job, n, d->exact);
    k.act = &r->u;
    parallel(r->pool, r->T, 1, quantise_rows, &k);
    matmul(r->pool, &(Product){ &l->wo_b, &r->u, NULL, r->T, r->y, (size_t)d->c->dim }, 1,
           d->exact);
}

// --- mixture of experts (spec 7)

// s = sqrt(softplus(z)); the A largest of s + bias (ties to the lowest index), or the token's own
// from the table; weights from s alone, normalised over the chosen.
static void route_rows(void *arg, int begin, int end) {
    Task *k = arg;
    const Config *c = k->c;
    const Layer *l = k->l;
    int E = c->n_experts, A = c->n_active;
    for (int t = begin; t < end; t++) {
        float *s = k->r->gate + (size_t)t * E, *weight = k->r->weight + (size_t)t * A, sum = 0;
        int *expert = k->r->expert + (size_t)t * A;
        for (int e = 0; e < E; e++) {
            s[e] = sqrtf(s[e] > 20 ? s[e] : log1pf(expf(s[e])));
            if (!isfinite(s[e]))
                die(1,
                    "%s.ffn.gate: the router's score of expert %d is not finite "
                    "(run `dsv4 verify` on the checkpoint)",
                    l->name, e);
        }
        for (int a = 0; a < A; a++) {
            int best = -1;
            if (l->tid2eid) best = (int)l->tid2eid[(size_t)k->r->rows[t].token * A + a];
            else for (int e = 0; e < E; e++) {
                bool taken = false;
                for (int b = 0; b < a; b++) taken |= expert[b] == e;
                if (!taken && (best < 0 || s[e] + l->gate_bias[e] > s[best] + l->gate_bias[best]))
                    best = e;
            }
            expert[a] = best;
            sum += s[best];
        }
        for (int a = 0; a < A; a++) weight[a] = s[expert[a]] / sum * c->route_scale;
    }
}

static void cpu_route(Device *d, const Layer *l) {
    Task k = task(d, l, 0);
    matmul(k.r->pool,
           &(Product){ &l->gate, &k.r->x, NULL, k.r->T, k.r->gate, (size_t)d->c->n_experts }, 1,
           d->exact);
    parallel(k.r->pool, k.r->T, 1, route_rows, &k);
}

// Sorts the (row, choice) pairs by expert, stable in row order, into groups; the shared expert,
// with every row, is the last group. Entry i of the sorted list belongs to row entry_row[i].
// Returns the number of groups.
static int group_experts(Run *r, const Config *c) {
    int A = c->n_active, pairs = r->T * A, groups = 0, at = 0;
    memset(r->count, 0, sizeof *r->count * (size_t)c->n_experts);
    for (int i = 0; i < pairs; i++) r->count[r->expert[i]]++;
    for (int e = 0; e < c->n_experts; e++) {
        if (r->count[e]) r->part[groups++] = (Part){ .expert = e, .start = at, .n = r->count[e] };
        at += r->count[e];
        r->count[e] = at - r->count[e];
    }
    for (int i = 0; i < pairs; i++) {
        r->place[i] = r->count[r->expert[i]]++;
        r->entry_row[r->place[i]] = i / A;
        r->entry_weight[r->place[i]] = r->weight[i];
    }
    for (int t = 0; t < r->T; t++) {
        r->entry_row[pairs + t] = t;
        r->entry_weight[pairs + t] = 1;
    }
    r->part[groups++] = (Part){ .expert = c->n_experts, .start = pairs, .n = r->T };
    return groups;
}

// h = silu(min(w1 x, limit)) * clamp(w3 x, -limit, limit) * route weight. Items: entries.
static void swiglu_rows(void *arg, int begin, int end) {
    Task *k = arg;
    Run *r = k->r;
    int F = k->c->expert_dim;
    float limit = k->c->swiglu_limit;
    for (int i = begin; i < end; i++) {
        const float *g = r->g + (size_t)i * F, *v = r->v + (size_t)i * F;
        float *h = r->h.x + i * r->h.ld;
        for (int j = 0; j < F; j++) {
            float a = g[j] > limit ? limit : g[j];      // NaN passes, to be caught
            float b = v[j] > limit ? limit : v[j] < -limit ? -limit : v[j];
            h[j] = a * sigmoid(a) * b * r->entry_weight[i];
        }
        act_quantise(k->d, &r->h, i);
    }
}

// y = the sum of a row's experts, in the order they were chosen, then the shared one.
static void combine_rows(void *arg, int begin, int end) {
    Task *k = arg;
    Run *r = k->r;
    int A = k->c->n_active, D = k->c->dim;
    for (int t = begin; t < end; t++) {
        float *y = r->y + (size_t)t * D;
        memcpy(y, r->ye + (size_t)r->place[t * A] * D, sizeof *y * D);
        for (int a = 1; a <= A; a++) {
            size_t entry = a < A ? (size_t)r->place[t * A + a] : (size_t)r->T * A + t;
            axpy(y, 1, r->ye + entry * D, D);
        }
    }
}

static void cpu_experts(Device *d, const Layer *l) {
    Task k = task(d, l, 0);
    Run *r = k.r;
    const Config *c = d->c;
    int groups = group_experts(r, c), entries = r->T * (c->n_active + 1);
    size_t F = (size_t)c->expert_dim, D = (size_t)c->dim;
    for (int i = 0; i < groups; i++) {
        Part *p = r->part + i;
        bool shared = p->expert == c->n_experts;
        const int *rows = r->entry_row + p->start;
        r->job[2 * i] = (Product){
            shared ? &l->sw1 : &l->w1[p->expert], &r->x, rows, p->n, r->g + p->start * F, F
        };
        r->job[2 * i + 1] = (Product){
            shared ? &l->sw3 : &l->w3[p->expert], &r->x, rows, p->n, r->v + p->start * F, F
        };
    }
    matmul(r->pool, r->job, 2 * groups, d->exact);
    parallel(r->pool, entries, 1, swiglu_rows, &k);
    for (int i = 0; i < groups; i++) {
        Part *p = r->part + i;
        p->a = act_rows(&r->h, p->start);
        r->job[i] = (Product){ p->expert == c->n_experts ? &l->sw2 : &l->w2[p->expert],
                               &p->a,
                               NULL,
                               p->n,
                               r->ye + p->start * D,
                               D };
    }
    matmul(r->pool, r->job, groups, d->exact);
    parallel(r->pool, r->T, 1, combine_rows, &k);
}

// --- embedding, head, MTP (spec 1, 2.5, 10)

// Row `token` of the embedding as FP32.
static void embedding(const Mat *embed, int token, float *x) {
    size_t at = (size_t)token * embed->k;
    if (embed->fmt == W_F32) memcpy(x, (const float *)embed->w + at, sizeof *x * (size_t)embed->k);
    else for (int i = 0; i < embed->k; i++) x[i] = f32_of_bf16(((const bf16 *)embed->w)[at + i]);
}

static void embed_rows(void *arg, int begin, int end) {
    Task *k = arg;
    size_t D = (size_t)k->c->dim, S = (size_t)k->c->hc_mult;
    for (int t = begin; t < end; t++) {
        float *X = k->r->X + t * S * D;
        embedding(&k->d->w.embed, k->r->rows[t].token, X);
        for (size_t s = 1; s < S; s++) memcpy(X + s * D, X, D * sizeof *X);
    }
}

static void cpu_embed(Device *d) {
    Task k = task(d, NULL, 0);
    parallel(k.r->pool, k.r->T, 1, embed_rows, &k);
}

static size_t streams_bytes(const Device *d, int T) {
    return sizeof(float) * (size_t)T * d->c->hc_mult * d->c->dim;
}

static void cpu_streams_in(Device *d, const float *X) {
    Run *r = d->impl;
    memcpy(r->X, X, streams_bytes(d, r->T));
}

static void cpu_streams_out(Device *d, float *X) {
    Run *r = d->impl;
    memcpy(X, r->X, streams_bytes(d, r->T));
}

static void head_rows(void *arg, int begin, int end) {
    Task *k = arg;
    Run *r = k->r;
    int S = k->c->hc_mult, D = k->c->dim;
    for (int i = begin; i < end; i++) {
        float *mix = r->mix + (size_t)i * S, *y = r->heads.x + i * r->heads.ld;
        const float *X = r->X + (size_t)k->want[i] * S * D;
        hc_scale(k->d, mix, S, X);
        hc_mix(y, X, mix, k->hyper, k->c);
        rms_norm(y, y, k->norm, D, k->c->norm_eps);
        act_quantise(k->d, &r->heads, i);
    }
}

static void cpu_head(Device *d, const Hyper *h, const float *norm, const int *want, int n,
                     float *logits) {
    Task k = task(d, NULL, 0);
    Run *r = k.r;
    Act X = streams_act(r, d->c);
    k.hyper = h;
    k.norm = norm;
    k.want = want;
    matmul(r->pool, &(Product){ &h->fn, &X, want, n, r->mix, (size_t)d->c->hc_mult }, 1, d->exact);
    parallel(r->pool, n, 1, head_rows, &k);
    matmul(r->pool, &(Product){ &d->w.head, &r->heads, NULL, n, logits, (size_t)d->c->vocab }, 1,
           d->exact);
}

// Items: T rows; normed next embeddings and normed streams, each stream on its own.
static void mtp_norms(void *arg, int begin, int end) {
    Task *k = arg;
    Run *r = k->r;
    size_t D = (size_t)k->c->dim, S = (size_t)k->c->hc_mult;
    for (int t = begin; t < end; t++) {
        float *e = r->emb.x + t * r->emb.ld;
        embedding(&k->d->w.embed, r->rows[t].next, e);
        rms_norm(e, e, k->mtp->enorm, (int)D, k->c->norm_eps);
        act_quantise(k->d, &r->emb, t);
        for (size_t i = t * S; i < (t + 1) * S; i++) {
            rms_norm(r->streams.x + i * D, r->X + i * D, k->mtp->hnorm, (int)D, k->c->norm_eps);
            act_quantise(k->d, &r->streams, (int)i);
        }
    }
}

static void mtp_add(void *arg, int begin, int end) {
    Task *k = arg;
    int S = k->c->hc_mult, D = k->c->dim;
    for (int i = begin; i < end; i++)
        axpy(k->r->X + (size_t)i * D, 1, k->r->e + (size_t)(i / S) * D, D);
}

// X[s] = e_proj rms(embed[next]) + h_proj rms(X[s])
static void cpu_mtp_in(Device *d, const Mtp *m) {
    Task k = task(d, NULL, 0);
    Run *r = k.r;
    size_t D = (size_t)d->c->dim;
    int rows = r->T * d->c->hc_mult;
    k.mtp = m;
    parallel(r->pool, r->T, 1, mtp_norms, &k);
    Product p[2] = { { &m->e_proj, &r->emb, NULL, r->T, r->e, D },
                     { &m->h_proj, &r->streams, NULL, rows, r->X, D } };
    matmul(r->pool, p, 2, d->exact);
    parallel(r->pool, rows, 1, mtp_add, &k);
}

// --- the CPU device: buffers and caches

static void cpu_begin(Device *d, const Row *rows, int T) {
    Run *r = d->impl;
    int R = d->c->rope_dim;
    r->rows = rows;
    r->T = T;
    for (int t = 0; t < T; t++)
        for (int i = 0; i < 2; i++)
            rope_angles(r->rot[i] + (size_t)t * R, d->inv_freq[i], R, rows[t].pos);
}

// Memory that the system gives out page by page as it is touched, so a long context costs only what
// is used.
static void *reserve(size_t bytes) {
    void *p = mmap(NULL, bytes ? bytes : 1, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
        die(1, "out of memory: %zu bytes of context cache (try a smaller -c)", bytes);
    return p;
}

// The layer that cache i of this stage belongs to: its own, then the MTP layers'.
static const Layer *stage_layer(const Device *d, int i) {
    int n = d->last - d->first;
    return i < n ? &d->w.layers[d->first + i] : &d->w.mtp[i - n].block;
}

static int stage_caches(const Device *d) {
    return d->last - d->first + (d->has_head && d->w.mtp ? d->c->n_mtp : 0);
}

// Bytes of each part of a cache: win, comp, ikeys, cin, icin.
static void cache_sizes(const Device *d, const Layer *l, size_t size[5]) {
    size_t M = (size_t)l->ratio, rows = M ? (size_t)d->ctx / M : 0;
    size[0] = kv_bytes(d, d->c->head_dim) * d->ring;
    size[1] = kv_bytes(d, d->c->head_dim) * rows;
    size[2] = M == 4 ? kv_bytes(d, d->c->index_dim) * rows : 0;
    size[3] = M ? sizeof(float) * 2 * l->comp.wkv.n * d->cring[M] : 0;
    size[4] = M == 4 ? sizeof(float) * 2 * l->icomp.wkv.n * d->cring[4] : 0;
}

static void cpu_cache_new(Device *d, int slot) {
    int n = stage_caches(d);
    d->cache[slot] = xalloc((size_t)n, sizeof(Cache));
    for (int i = 0; i < n; i++) {
        Cache *c = d->cache[slot] + i;
        size_t size[5];
        cache_sizes(d, stage_layer(d, i), size);
        c->win = reserve(size[0]);
        if (size[1]) c->comp = reserve(size[1]);
        if (size[2]) c->ikeys = reserve(size[2]);
        if (size[3]) c->cin = reserve(size[3]);
        if (size[4]) c->icin = reserve(size[4]);
    }
}

static void cpu_cache_free(Device *d, int slot) {
    for (int i = 0; i < stage_caches(d); i++) {
        Cache *c = d->cache[slot] + i;
        void *part[5] = { c->win, c->comp, c->ikeys, c->cin, c->icin };
        size_t size[5];
        cache_sizes(d, stage_layer(d, i), size);
        for (int j = 0; j < 5; j++) if (part[j]) munmap(part[j], size[j]);
    }
    free(d->cache[slot]);
    d->cache[slot] = NULL;
}

// Copies the slots of positions [from, to) between a ring and a flat buffer; buf NULL only counts.
// Returns bytes.
static size_t ring_copy(void *ring, size_t row, int slots, int from, int to, uint8_t *buf,
                        bool save) {
    for (int p = from; buf && p < to; p++) {
        uint8_t *slot = (uint8_t *)ring + row * (size_t)(p % slots),
                *flat = buf + row * (size_t)(p - from);
        memcpy(save ? flat : slot, save ? slot : flat, row);
    }
    return row * (size_t)(to > from ? to - from : 0);
}

// What the rings must hold for the next row to be at `pos`: the window, and the compressors' open
// windows.
static size_t cache_copy(Device *d, int slot, int pos, uint8_t *buf, bool save) {
    size_t n = 0;
    for (int i = 0; i < stage_caches(d); i++) {
        const Layer *l = stage_layer(d, i);
        Cache *c = d->cache[slot] + i;
        int M = l->ratio, from = pos > d->c->window ? pos - d->c->window : 0;
        n += ring_copy(c->win, kv_bytes(d, d->c->head_dim), d->ring, from, pos,
                       buf ? buf + n : NULL, save);
        if (!M) continue;
        from = pos / M * M;
        if (M == 4 && from) from -= M;
        n += ring_copy(c->cin, 8 * (size_t)l->comp.wkv.n, d->cring[M], from, pos,
                       buf ? buf + n : NULL, save);
        if (M == 4)
            n += ring_copy(c->icin, 8 * (size_t)l->icomp.wkv.n, d->cring[M], from, pos,
                           buf ? buf + n : NULL, save);
    }
    return n;
}

static size_t cpu_cache_save(Device *d, int slot, int pos, void *to) {
    return cache_copy(d, slot, pos, to, true);
}
static void cpu_cache_load(Device *d, int slot, int pos, const void *from) {
    cache_copy(d, slot, pos, (uint8_t *)from, false);
}

static const Ops cpu_ops = {
    .begin = cpu_begin,
    .embed = cpu_embed,
    .streams_in = cpu_streams_in,
    .streams_out = cpu_streams_out,
    .hc_pre = cpu_hc_pre,
    .hc_post = cpu_hc_post,
    .attn_project = cpu_attn_project,
    .attn_latent = cpu_attn_latent,
    .attn_query = cpu_attn_query,
    .index_topk = cpu_index_topk,
    .attend = cpu_attend,
    .attn_out = cpu_attn_out,
    .route = cpu_route,
    .experts = cpu_experts,
    .mtp_in = cpu_mtp_in,
    .head = cpu_head,
    .cache_new = cpu_cache_new,
    .cache_free = cpu_cache_free,
    .cache_save = cpu_cache_save,
    .cache_load = cpu_cache_load,
};

// Gives d its buffers for max_rows rows.
static void cpu_device(Device *d, Pool *pool) {
    const Config *c = d->c;
    Run *r = xalloc(1, sizeof *r);
    size_t T = (size_t)d->max_rows, S = (size_t)c->hc_mult, D = (size_t)c->dim,
           A = (size_t)c->n_active;
    size_t J = (size_t)c->index_heads * c->index_dim, F = (size_t)c->expert_dim,
           entries = T * (A + 1);
    size_t parts = (size_t)c->o_groups * (c->o_lora_rank / 128 + 2);
    if (parts < (size_t)c->n_experts + 1) parts = (size_t)c->n_experts + 1;
    d->op = &cpu_ops;
    d->impl = r;
    r->pool = pool;
    for (int i = 0; i < 2; i++) r->rot[i] = xalloc(T * c->rope_dim, sizeof(float));
    r->X = xalloc(T * S * D, sizeof(float));
    r->mix = xalloc(T * (2 + S) * S, sizeof(float));
    r->post = xalloc(T * S, sizeof(float));
    r->comb = xalloc(T * S * S, sizeof(float));
    r->x = act_new(d, d->max_rows, c->dim, 1);
    r->y = xalloc(T * D, sizeof(float));
    r->qr = act_new(d, d->max_rows, c->q_lora_rank, 1);
    r->kv = xalloc(T * c->head_dim, sizeof(float));
    r->cin = xalloc(T * 4 * c->head_dim, sizeof(float));
    r->icin = xalloc(T * 4 * c->index_dim, sizeof(float));
    r->q = xalloc(T * c->n_heads * c->head_dim, sizeof(float));
    r->iq = xalloc(T * J, sizeof(float));
    r->iw = xalloc(T * c->index_heads, sizeof(float));
    r->iscore = reserve(sizeof(float) * (INDEX_SCORES + (size_t)d->ctx / 4));
    r->top = reserve(T * c->index_topk * sizeof(int));
    r->n_top = xalloc(T, sizeof(int));
    r->o = act_new(d, d->max_rows, c->n_heads / c->o_groups * c->head_dim, c->o_groups);
    r->u = act_new(d, d->max_rows, c->o_groups * c->o_lora_rank, 1);
    r->gate = xalloc(T * c->n_experts, sizeof(float));
    r->expert = xalloc(T * A, sizeof(int));
    r->weight = xalloc(T * A, sizeof(float));
    r->count = xalloc((size_t)c->n_experts, sizeof(int));
    r->place = xalloc(T * A, sizeof(int));
    r->entry_row = xalloc(entries, sizeof(int));
    r->entry_weight = xalloc(entries, sizeof(float));
    r->g = xalloc(entries * F, sizeof(float));
    r->v = xalloc(entries * F, sizeof(float));
    r->h = act_new(d, (int)entries, c->expert_dim, 1);
    r->ye = xalloc(entries * D, sizeof(float));
    r->part = xalloc(parts, sizeof(Part));
    r->job = xalloc(parts * 2, sizeof(Product));
    r->heads = act_new(d, d->max_rows, c->dim, 1);
    if (!d->has_head || !d->w.mtp) return;
    r->emb = act_new(d, d->max_rows, c->dim, 1);
    r->streams = act_new(d, (int)(T * S), c->dim, 1);
    r->e = xalloc(T * D, sizeof(float));
}
// ---------------------------------------------------------------------------
// CUDA: a device with its weights, buffers and caches (driver and compiler: apps/cuda.h)

// The kernels, in the order of kernels.cu.
#define KERNELS(X) \
    X(gemv) X(embed) X(hc_mix) X(hc_norm) X(attn_latent) X(query_norm) X(index_scores) \
    X(index_slab) X(index_topk) X(attend_16) X(attend_32) X(attend_combine) X(route) \
    X(expert_up_1) X(expert_up_8) X(ffn_in) X(expert_down_1) X(expert_down_8) X(mtp_norm) \
    X(mtp_add) X(gather_rows) X(gemm) X(group_rows) X(expert_up) X(expert_down) X(expert_sum)
#define KERNEL_ID(name) K_##name,
#define KERNEL_NAME(name) #name,
enum { KERNELS(KERNEL_ID) N_KERNELS };
static const char *const kernel_names[] = { KERNELS(KERNEL_NAME) };

// Bit masks of matrix formats, by role.
typedef struct { int dense, gate, shared, routed; } Formats;

// The compiler's options for a model, one per line: the dimensions as -D constants. cc: compute
// capability, 86 for 8.6.
static void kernel_options(const Config *c, const Formats *f, int cc, Str *s) {
    char text[1024];
    snprintf(text, sizeof text,
             "-arch=compute_%d\n-fmad=false\n--std=c++17\n-DDIM=%d\n-DSTREAMS=%d\n-DHEADS=%d\n"
             "-DHEAD_DIM=%d\n-DROPE_DIM=%d\n-DQ_RANK=%d\n-DO_GROUPS=%d\n-DO_RANK=%d\n-DWINDOW=%d\n"
             "-DEXPERTS=%d\n-DACTIVE=%d\n-DEXPERT_DIM=%d\n-DINDEX_HEADS=%d\n-DINDEX_DIM=%d\n"
             "-DINDEX_TOPK=%d\n-DHC_ITERS=%d\n-DHC_EPS=%.9ef\n-DNORM_EPS=%.9ef\n"
             "-DROUTE_SCALE=%.9ef\n-DSWIGLU_LIMIT=%.9ef\n-DDENSE=%d\n-DGATE=%d\n-DSHARED=%d\n"
             "-DROUTED=%d\n", cc >= 86 ? 86 : 80, c->dim, c->hc_mult, c->n_heads, c->head_dim,
             c->rope_dim, c->q_lora_rank, c->o_groups, c->o_lora_rank, c->window, c->n_experts,
             c->n_active, c->expert_dim, c->index_heads, c->index_dim, c->index_topk, c->hc_iters,
             (double)c->hc_eps, (double)c->norm_eps, (double)c->route_scale,
             (double)c->swiglu_limit, f->dense, f->gate, f->shared, f->routed);
    str_puts(s, text);
}

// Structures that kernels.cu reads; the fields are explained there.
typedef struct { CuPtr w, s; int n, k, fmt, pad; } GpuMat;
typedef struct {
    GpuMat m;
    CuPtr x, q, qs, out, out_q, out_s;
    uint64_t ring_at;
    int ring, ring_step, ldx, ldo, seg_n, seg_blocks, ksplit, block0, tile0, seg_tiles;
} GpuTask;
typedef struct { CuPtr ape, norm; uint64_t in_at, out_at; int ring, ratio; } GpuPool;
typedef struct {
    CuPtr ids, weights, order, place, start, active, n_active, bad, tiles, n_tiles;
} GpuRouting;
typedef struct { CuPtr q, s, x; } GpuHidden;

// Activations in FP32 and INT8 (q, scales s).
typedef struct { CuPtr x, q, s; int k; } GpuAct;

// Products that share a launch.
typedef struct { CuPtr tasks; int n, blocks, tiles; } GpuProducts;

// What the kernels need to know of a layer. Offsets are bytes into a session's memory here.
typedef struct {
    GpuProducts project, query, wo_a, wo_b, gate;
    CuPtr experts;              // GpuMat [E + 1][w1, w2, w3], the shared expert last
    uint64_t win, comp, ikeys, cin, icin;
} GpuLayer;

// With graphs on, a stage's step for one row is recorded once and replayed later: the operations
// then launch nothing.
typedef enum { GRAPH_OFF, GRAPH_RECORDS, GRAPH_REPLAYS } GraphState;
static bool cuda_graphs;        // off unless asked for: nobody has seen it faster yet

typedef struct {
    CuDevice dev;
    CuContext ctx;
    CuModule module;
    uint64_t ptx;               // hash of its PTX
    CuFunction fn[N_KERNELS];
    CuStream stream;
    CuEvent staged;             // the pinned input buffers may be written again
    int T;
    int kernel;                 // launched last, -1: none
    GraphState graph;
    CuGraphExec graphs[32];     // [bucket] one decode step; buckets double the number of index keys
    bool post;                  // an hc_post is due: the next kernel that reads X does it
    bool keep_floats;           // self-test: o in FP32 too
    bool count_only;            // only scratch_bytes is wanted
    CuPtr *owned;               // [n_owned] everything allocated, but sessions
    int n_owned;
    size_t scratch_bytes, slot_bytes;
    GpuLayer *layer;            // [stage_caches]
    GpuProducts head, e_proj, h_proj;
    CuPtr inv_freq[2];
    CuPtr slots, slot[COUNT(((Device *)0)->cache)];
    CuPtr rows, X, y, post_c, comb, part, kv, q, iq, iw, qh, iqh, scores, chosen, o_part, ml;
    CuPtr gate, contribution, want, heads, logits, e, ex;
    GpuAct x, qr, o, u;
    GpuHidden h;
    GpuRouting r;
    CuPtr best, best_key;       // [score_rows, best_ld] the best keys of each slab of keys
    int score_rows, score_ld, best_ld;      // rows of a slab of index scores, floats per row
    Row *host_rows;             // pinned, as all host_*
    float *host_X, *host_logits;
    int *host_want, *host_bad;
    uint64_t *host_slots;
} Cuda;

enum {
    TILE = 8,                   // rows that the streaming kernels take; more go through tiles
    TILE_T = 64, TILE_N = 128,  // rows of the batch and of the matrix in a tensor-core tile
    TILE_SHARED = 3 * 16384,    // its shared memory
    HEAD_TILE = 64,             // rows of logits at a time
    MAX_SPLITS = 32,            // parts of attention
    KEY_SLAB = 32768,           // index keys that one block chooses from
};

// A call's error may be that of a kernel launched before.
__attribute__((noreturn, cold))
static void cuda_die(const Device *d, const char *call, CuResult r) {
    const char *text = NULL, *at = d->at ? d->at : "start";
    const Cuda *g = d->impl;
    const char *kernel = g->kernel < 0 ? "none" : kernel_names[g->kernel];
    if (cu.GetErrorString(r, &text) || !text) text = "no description";
    die(1, "%s: %s failed in %s (last kernel: %s): %s (%s)", d->name, call, at, kernel,
        cuda_error(r), text);
}

#define CU(d, call, ...) do { \
    CuResult r_ = cu.call(__VA_ARGS__); \
    if (r_) cuda_die(d, "cu" #call, r_); \
} while (0)

// Zeroed device memory.
static CuPtr gpu_alloc(Device *d, size_t bytes, const char *what) {
    CuPtr p = 0;
    size_t left = 0, total = 0;
    bytes = cadd(bytes, 511) & ~(size_t)511;
    CuResult r = cu.MemAlloc(&p, bytes);
    if (r == CUDA_OUT_OF_MEMORY) {
        cu.MemGetInfo(&left, &total);
        die(1, "%s: out of memory: %s need %.3f GB, %.3f GB are free (try fewer layers here with "
            "--layers, a smaller -c, or one device more)", d->name, what, (double)bytes / 1e9,
            (double)left / 1e9);
    }
    if (r) cuda_die(d, "cuMemAlloc", r);
    CU(d, MemsetD8Async, p, 0, bytes, ((Cuda *)d->impl)->stream);
    return p;
}

// The same, freed with the device.
static CuPtr gpu_keep(Device *d, size_t bytes, const char *what) {
    Cuda *g = d->impl;
    CuPtr p = gpu_alloc(d, bytes, what);
    g->owned = grow(g->owned, (size_t)g->n_owned, sizeof *g->owned);
    return g->owned[g->n_owned++] = p;
}

static CuPtr gpu_buffer(Device *d, size_t n, size_t size) {
    Cuda *g = d->impl;
    g->scratch_bytes = cadd(g->scratch_bytes, cmul(n, size));
    return g->count_only ? 0 : gpu_keep(d, cmul(n, size), "buffers");
}

// Memory that copies read and write while the host goes on.
static void *host_pinned(Device *d, size_t bytes) {
    void *p = NULL;
    if (((Cuda *)d->impl)->count_only) return NULL;
    CuResult r = cu.MemHostAlloc(&p, bytes ? bytes : 4, 1);     // 1: usable from every context
    if (r == CUDA_OUT_OF_MEMORY)
        die(1, "%s: cannot pin %.1f MB of host memory (ulimit -l, or too little is free)", d->name,
            (double)bytes / 1e6);
    if (r) cuda_die(d, "cuMemHostAlloc", r);
    return p;
}

static void gpu_copy_in(Device *d, CuPtr to, const void *from, size_t bytes) {
    CU(d, MemcpyHtoDAsync, to, from, bytes, ((Cuda *)d->impl)->stream);
}

static void gpu_wait(Device *d) { CU(d, StreamSynchronize, ((Cuda *)d->impl)->stream); }

static void gpu_launch(Device *d, int kernel, unsigned x, unsigned y, unsigned z, unsigned threads,
                       unsigned shared, void **args) {
    Cuda *g = d->impl;
    if (g->graph == GRAPH_REPLAYS) return;
    g->kernel = kernel;
    CU(d, LaunchKernel, g->fn[kernel], x, y, z, threads, 1, 1, shared, g->stream, args, NULL);
}

#define LAUNCH(d, kernel, x, y, z, threads, shared, ...) \
    gpu_launch(d, K_##kernel, (unsigned)(x), (unsigned)(y), (unsigned)(z), (unsigned)(threads), \
               shared, (void *[]){ __VA_ARGS__ })

// --- weights: one allocation, filled by threads through pinned buffers while the files are read

typedef struct { const char *from; CuPtr to; size_t bytes; } CopyJob;
typedef struct {
    Device *d;
    CuPtr base;                 // 0: only counting
    size_t at;
    CopyJob *job;
    size_t n;
    _Atomic size_t next, done;
    pthread_mutex_t lock;
} Upload;

enum { UPLOAD_THREADS = 4, UPLOAD_CHUNK = 8 << 20 };

// Reserves room for what a pointer points to at the next multiple of 256. With a base it also notes
// what to copy there and makes the pointer the device's.
static void upload_put(Upload *u, void *pointer, size_t bytes) {
    const char *from;
    CuPtr to = u->base + u->at;
    memcpy(&from, pointer, sizeof from);        // pointers of several types
    if (!from) return;
    u->at += (bytes + 255) & ~(size_t)255;
    if (!u->base) return;
    for (size_t i = 0; i < bytes; i += UPLOAD_CHUNK) {
        size_t n = bytes - i < UPLOAD_CHUNK ? bytes - i : UPLOAD_CHUNK;
        u->job = grow(u->job, u->n, sizeof *u->job);
        u->job[u->n++] = (CopyJob){ from + i, to + i, n };
    }
    memcpy(pointer, &to, sizeof to);
}

// The kernels take hc_*_fn in FP32 only. The converted copy lives as long as the program (1.5 MB a
// layer).
static void steering_float(Mat *m) {
    float *x = xalloc((size_t)m->n * m->k, sizeof *x);
    for (int i = 0; i < m->n; i++) dequant_row(m, i, x + (size_t)i * m->k);
    *m = (Mat){ x, NULL, m->n, m->k, W_F32 };
}

static void upload_mat(Upload *u, Mat *m) {
    size_t weights = row_bytes(m) * (size_t)m->n, scales = mat_bytes(m) - weights;
    upload_put(u, &m->w, weights);
    upload_put(u, &m->s, scales);
}

// What a table of tensors lists of one block; absent ones are NULL.
static void upload_list(Upload *u, const Bind *table, size_t n, int ratio, void *block) {
    const Config *c = u->d->c;
    for (size_t i = 0; i < n; i++) {
        void *field = (char *)block + table[i].at;
        size_t rows = (size_t)shape_of(table[i].rows, c, ratio);
        size_t cols = table[i].cols ? (size_t)shape_of(table[i].cols, c, ratio) : 1;
        Mat *m = field;
        if (table[i].kind == VEC) upload_put(u, field, 4 * rows * cols);
        if (table[i].kind == TABLE) upload_put(u, field, 8 * rows * cols);
        if (table[i].kind != MAT) continue;
        if (m->fmt == W_BF16 && !u->base && strstr(table[i].name, "_fn")) steering_float(m);
        upload_mat(u, m);
    }
}

static void upload_layer(Upload *u, Layer *l) {
    upload_list(u, layer_table, COUNT(layer_table), l->ratio, l);
    for (int e = 0; e < u->d->c->n_experts; e++) {
        upload_mat(u, &l->w1[e]);
        upload_mat(u, &l->w2[e]);
        upload_mat(u, &l->w3[e]);
    }
}

// Places this stage's weights: d->w, whose lists are its own.
static void upload_walk(Upload *u) {
    Device *d = u->d;
    Weights *w = &d->w;
    u->at = 0;
    for (int i = d->first; i < d->last; i++) upload_layer(u, &w->layers[i]);
    if (d->first == 0 || w->mtp) upload_mat(u, &w->embed);
    if (d->has_head)            // model_table without embed
        upload_list(u, model_table + 1, COUNT(model_table) - 1, 0, w);
    for (int i = 0; w->mtp && i < d->c->n_mtp; i++) {
        upload_layer(u, &w->mtp[i].block);
        upload_list(u, mtp_table, COUNT(mtp_table), 0, &w->mtp[i]);
    }
    u->at += 8 << 20;           // the products read up to 31 rows past a matrix
}

static void *copy_of(const void *p, size_t n, size_t size) {
    return memcpy(xalloc(n, size), p, n * size);
}

static void own_experts(const Config *c, Layer *l) {
    l->w1 = copy_of(l->w1, (size_t)c->n_experts, sizeof(Mat));
    l->w2 = copy_of(l->w2, (size_t)c->n_experts, sizeof(Mat));
    l->w3 = copy_of(l->w3, (size_t)c->n_experts, sizeof(Mat));
}

// Gives d lists of its own, since their pointers become the device's.
static void own_weights(Device *d) {
    const Config *c = d->c;
    Weights *w = &d->w;
    w->layers = copy_of(w->layers, (size_t)c->n_layers, sizeof *w->layers);
    for (int i = d->first; i < d->last; i++) own_experts(c, &w->layers[i]);
    w->mtp = d->has_head && w->mtp ? copy_of(w->mtp, (size_t)c->n_mtp, sizeof *w->mtp) : NULL;
    for (int i = 0; w->mtp && i < c->n_mtp; i++) own_experts(c, &w->mtp[i].block);
}

// One of the threads: takes jobs, copies them through two pinned buffers in turn. The kernel reads
// ahead what the threads take next.
static void *upload_thread(void *arg) {
    Upload *u = arg;
    Device *d = u->d;
    CuStream stream;
    CuEvent free_again[2];
    char *buf[2];
    CU(d, CtxSetCurrent, ((Cuda *)d->impl)->ctx);
    CU(d, StreamCreate, &stream, 1);                    // 1: does not wait for the legacy stream
    for (int i = 0; i < 2; i++) {
        buf[i] = host_pinned(d, UPLOAD_CHUNK);
        CU(d, EventCreate, &free_again[i], 2);          // 2: no timing
        CU(d, EventRecord, free_again[i], stream);
    }
    size_t i;
    for (int turn = 0; (i = atomic_fetch_add(&u->next, 1)) < u->n; turn ^= 1) {
        const CopyJob *j = u->job + i, *ahead = j + UPLOAD_THREADS;
        uintptr_t page = (uintptr_t)ahead->from & ~(uintptr_t)4095;
        if (i + UPLOAD_THREADS < u->n)                  // on memory that is no file: no effect
            madvise((void *)page, ahead->bytes, MADV_WILLNEED);
        CU(d, EventSynchronize, free_again[turn]);
        memcpy(buf[turn], j->from, j->bytes);
        CU(d, MemcpyHtoDAsync, j->to, buf[turn], j->bytes, stream);
        CU(d, EventRecord, free_again[turn], stream);
        pthread_mutex_lock(&u->lock);
        u->done += j->bytes;
        progress("loading", (int64_t)u->done, (int64_t)u->at);
        pthread_mutex_unlock(&u->lock);
    }
    CU(d, StreamSynchronize, stream);
    for (int k = 0; k < 2; k++) {
        CU(d, MemFreeHost, buf[k]);
        CU(d, EventDestroy, free_again[k]);
    }
    CU(d, StreamDestroy, stream);
    return NULL;
}

static void cuda_upload(Device *d) {
    Upload u = { .d = d, .lock = PTHREAD_MUTEX_INITIALIZER };
    pthread_t thread[UPLOAD_THREADS];
    own_weights(d);
    upload_walk(&u);
    u.base = gpu_keep(d, u.at, "the weights of its layers");
    gpu_wait(d);
    upload_walk(&u);
    for (int i = 0; i < UPLOAD_THREADS; i++)
        if (pthread_create(&thread[i], NULL, upload_thread, &u)) die(1, "cannot start a thread");
    for (int i = 0; i < UPLOAD_THREADS; i++) pthread_join(thread[i], NULL);
    progress("loading", 1, 1);
    free(u.job);
}

// --- products: descriptors that stay on the device

static GpuMat gpu_mat(const Mat *m) {
    return (GpuMat){ (CuPtr)(uintptr_t)m->w, (CuPtr)(uintptr_t)m->s, m->n, m->k, (int)m->fmt, 0 };
}

// Warps that share a row in decode: as many as leave each 512 columns. Depends on the shape alone.
static int split_columns(const Mat *m) {
    int split = 1;
    while (split < 8 && m->k >= 1024 * split) split *= 2;
    return split;
}

// One product of a launch; in: its rows. Outputs are set by the caller.
static GpuTask *task_add(GpuTask *list, GpuProducts *p, const Mat *m, const GpuAct *in,
                         int segments) {
    GpuTask *t = list + p->n++;
    int seg_n = m->n / segments, split = split_columns(m), per = 256 / split;
    *t = (GpuTask){ .m = gpu_mat(m), .x = in->x, .q = in->q, .qs = in->s, .ldx = in->k,
                    .ldo = m->n, .seg_n = seg_n, .ksplit = split, .block0 = p->blocks,
                    .seg_blocks = (seg_n + per - 1) / per, .tile0 = p->tiles,
                    .seg_tiles = (seg_n + TILE_N - 1) / TILE_N };
    p->tiles += t->seg_tiles * segments;
    p->blocks += t->seg_blocks * segments;
    return t;
}

static CuPtr gpu_table(Device *d, const void *from, size_t bytes) {
    CuPtr p = gpu_keep(d, bytes, "tables");
    gpu_copy_in(d, p, from, bytes);
    gpu_wait(d);
    return p;
}

static void products_done(Device *d, GpuProducts *p, const GpuTask *list) {
    p->tasks = gpu_table(d, list, sizeof *list * (size_t)p->n);
}

// A compressor's two inputs, which go to its ring at `at`: rows [2, n].
static void tasks_ring(Device *d, GpuTask *list, GpuProducts *p, const Compressor *m, uint64_t at) {
    const Mat *w[] = { &m->wkv, &m->wgate };
    for (int i = 0; i < 2; i++) {
        GpuTask *t = task_add(list, p, w[i], &((Cuda *)d->impl)->x, 1);
        t->ring_at = at + 4 * (uint64_t)i * (uint64_t)m->wkv.n;
        t->ring = d->cring[m->ratio];
        t->ring_step = 8 * m->wkv.n;
    }
}

// A product with one output matrix.
static GpuProducts one_product(Device *d, const Mat *m, const GpuAct *in, CuPtr out) {
    GpuProducts p = { 0 };
    GpuTask t;
    task_add(&t, &p, m, in, 1)->out = out;
    products_done(d, &p, &t);
    return p;
}

static void layer_products(Device *d, const Layer *l, GpuLayer *gl) {
    Cuda *g = d->impl;
    const Config *c = d->c;
    GpuTask t[7];
    task_add(t, &gl->project, &l->wq_a, &g->x, 1)->out = g->qr.x;
    task_add(t, &gl->project, &l->wkv, &g->x, 1)->out = g->kv;
    if (l->ratio) tasks_ring(d, t, &gl->project, &l->comp, gl->cin);
    if (l->ratio == 4) {
        tasks_ring(d, t, &gl->project, &l->icomp, gl->icin);
        task_add(t, &gl->project, &l->iproj, &g->x, 1)->out = g->iw;
    }
    products_done(d, &gl->project, t);
    task_add(t, &gl->query, &l->wq_b, &g->qr, 1)->out = g->q;
    if (l->ratio == 4) task_add(t, &gl->query, &l->iwq_b, &g->qr, 1)->out = g->iq;
    products_done(d, &gl->query, t);
    GpuTask *a = task_add(t, &gl->wo_a, &l->wo_a, &g->o, c->o_groups);
    if (takes_int8(l->wo_b.fmt)) {
        a->out_q = g->u.q;
        a->out_s = g->u.s;
    } else {
        a->out = g->u.x;
    }
    products_done(d, &gl->wo_a, t);
    gl->wo_b = one_product(d, &l->wo_b, &g->u, g->y);
    gl->gate = one_product(d, &l->gate, &g->x, g->gate);
    int E = c->n_experts;
    GpuMat *e = xalloc((size_t)E + 1, 3 * sizeof *e);
    for (int i = 0; i <= E; i++) {
        e[3 * i] = gpu_mat(i == E ? &l->sw1 : &l->w1[i]);
        e[3 * i + 1] = gpu_mat(i == E ? &l->sw2 : &l->w2[i]);
        e[3 * i + 2] = gpu_mat(i == E ? &l->sw3 : &l->w3[i]);
    }
    gl->experts = gpu_table(d, e, 3 * sizeof *e * (size_t)(E + 1));
    free(e);
}

// --- start of a device

static int gpu_attribute(const Device *d, int id) {
    int v = 0;
    CU(d, DeviceGetAttribute, &v, id, ((Cuda *)d->impl)->dev);
    return v;
}

// What the kernels take for granted about a model's shape; the CPU takes any. Rows in multiples of
// 32 columns: they are read 16 bytes at a time in the checkpoint's own layout. head_dim and
// index_head_dim: what a block can hold in registers.
static void check_shape(const Device *d) {
    const Config *c = d->c;
    const struct { const char *name; int value, multiple, most; } rule[] = {
        { "hidden_size", c->dim, 32, 1 << 16 }, { "head_dim", c->head_dim, 32, 512 },
        { "qk_rope_head_dim", c->rope_dim, 4, 512 }, { "q_lora_rank", c->q_lora_rank, 32, 1 << 16 },
        { "o_lora_rank", c->o_lora_rank, 32, 1 << 16 }, { "index_head_dim", c->index_dim, 32, 256 },
        { "moe_intermediate_size", c->expert_dim, 32, 1 << 16 },
        { "index_n_heads", c->index_heads, 1, 1 << 16 }, { "hc_mult", c->hc_mult, 1, 16 },
        { "num_experts_per_tok", c->n_active, 1, 32 },
        { "n_routed_experts", c->n_experts, 1, 1024 },
    };
    for (size_t i = 0; i < COUNT(rule); i++)
        if (rule[i].value % rule[i].multiple || rule[i].value > rule[i].most)
            die(1, "%s: %s = %d: the GPU kernels need a multiple of %d, at most %d (use --devices "
                "cpu)", d->name, rule[i].name, rule[i].value, rule[i].multiple, rule[i].most);
}

// Which formats a table's matrices have, by the kernels that multiply with them.
static void list_formats(const Bind *table, size_t n, const void *block, Formats *f) {
    for (size_t i = 0; i < n; i++) {
        const Mat *m = (const void *)((const char *)block + table[i].at);
        const char *name = table[i].name;
        if (table[i].kind != MAT || !m->w || strstr(name, "_fn")) continue;
        int *role = !strcmp(name, "ffn.gate") ? &f->gate
                    : !strncmp(name, "ffn.", 4) ? &f->shared : &f->dense;
        *role |= 1 << m->fmt;
    }
}

static void layer_formats(const Layer *l, const Config *c, Formats *f) {
    list_formats(layer_table, COUNT(layer_table), l, f);
    for (int e = 0; e < c->n_experts; e++)
        f->routed |= 1 << l->w1[e].fmt | 1 << l->w2[e].fmt | 1 << l->w3[e].fmt;
}

static Formats model_formats(const Weights *w, const Config *c) {
    Formats f = { .dense = 1 << w->head.fmt };
    for (int i = 0; i < c->n_layers; i++) layer_formats(&w->layers[i], c, &f);
    for (int i = 0; w->mtp && i < c->n_mtp; i++) {
        layer_formats(&w->mtp[i].block, c, &f);
        list_formats(mtp_table, COUNT(mtp_table), &w->mtp[i], &f);
    }
    return f;
}

// Dynamic shared memory of the kernel that takes `heads` heads a block.
static unsigned attend_shared(const Config *c, unsigned heads) {
    unsigned warps = ((unsigned)c->head_dim + 63) / 64;
    return warps * (3 * 2048 + heads * 64) + heads * 60;
}

static void cuda_compile(Device *d) {
    Cuda *g = d->impl;
    Formats formats = model_formats(&d->w, d->c);
    char log[4096] = "";
    int cc = gpu_attribute(d, 75) * 10 + gpu_attribute(d, 76);      // compute capability
    int key[2] = { 5, 6 };              // CU_JIT_ERROR_LOG_BUFFER and its size
    void *value[2] = { log, (void *)(uintptr_t)sizeof log };
    const char *from;
    Str options = { 0 };
    double start = now();
    if (cc < 80)
        die(1, "%s: compute capability %d.%d, 8.0 is needed (Ampere or newer)", d->name, cc / 10,
            cc % 10);
    kernel_options(d->c, &formats, cc, &options);
    char *ptx = kernel_ptx(str_span(&options), &from, NULL);
    g->ptx = hash64(HASH_START, ptx, strlen(ptx));
    CuResult r = cu.ModuleLoadDataEx(&g->module, ptx, 2, key, value);
    if (r) {
        if (*log) fprintf(stderr, "%s\n", log);
        cuda_die(d, "cuModuleLoadDataEx", r);
    }
    for (int i = 0; i < N_KERNELS; i++) {
        r = cu.ModuleGetFunction(&g->fn[i], g->module, kernel_names[i]);
        if (r)
            die(1, "%s: kernels.cu has no kernel %s (%s)", d->name, kernel_names[i], cuda_error(r));
    }
    const int tiled[] = { K_gemm, K_expert_up, K_expert_down };         // 8: dynamic shared memory
    for (size_t i = 0; i < COUNT(tiled); i++)
        CU(d, FuncSetAttribute, g->fn[tiled[i]], 8, TILE_SHARED);
    CU(d, FuncSetAttribute, g->fn[K_attend_16], 8, (int)attend_shared(d->c, 16));
    CU(d, FuncSetAttribute, g->fn[K_attend_32], 8, (int)attend_shared(d->c, 32));
    note("%s: kernels %s in %.2f s", d->name, from, now() - start);
    free(ptx), free(options.p);
}

// Offsets of a session's memory in this stage's layers.
static void cuda_layout(Device *d) {
    Cuda *g = d->impl;
    size_t at = 0, size[5];
    for (int i = 0; i < stage_caches(d); i++) {
        GpuLayer *l = &g->layer[i];
        uint64_t *to[5] = { &l->win, &l->comp, &l->ikeys, &l->cin, &l->icin };
        cache_sizes(d, stage_layer(d, i), size);
        for (int j = 0; j < 5; j++) {
            *to[j] = at;
            at += (size[j] + 255) & ~(size_t)255;
        }
    }
    g->slot_bytes = at;
}

static GpuAct gpu_act(Device *d, size_t rows, int k) {
    GpuAct a = { .k = k };
    a.x = gpu_buffer(d, rows * (size_t)k, 4);
    a.q = gpu_buffer(d, rows * (size_t)k, 1);
    a.s = gpu_buffer(d, rows * (size_t)k / 32, 4);
    return a;
}

static void cuda_buffers(Device *d) {
    Cuda *g = d->impl;
    const Config *c = d->c;
    size_t T = (size_t)d->max_rows + TILE, S = (size_t)c->hc_mult, D = (size_t)c->dim;
    size_t H = (size_t)c->n_heads, K = (size_t)c->head_dim, V = (size_t)c->vocab;
    size_t A = (size_t)c->n_active, E = (size_t)c->n_experts;
    size_t parts = T > TILE * MAX_SPLITS ? T : TILE * MAX_SPLITS, hidden = T * (A + 1);
    g->rows = gpu_buffer(d, T, sizeof(Row));
    g->slots = gpu_buffer(d, COUNT(g->slot), sizeof(CuPtr));
    g->X = gpu_buffer(d, T * S * D, 4);
    g->y = gpu_buffer(d, T * D, 4);
    g->post_c = gpu_buffer(d, T * S, 4);
    g->comb = gpu_buffer(d, T * S * S, 4);
    g->part = gpu_buffer(d, T * ((D + 63) / 64) * (((2 + S) * S + 32) & ~(size_t)31), 4);
    g->x = gpu_act(d, T, c->dim);
    g->qr = gpu_act(d, T, c->q_lora_rank);
    g->o = gpu_act(d, T, (int)(H * K));
    g->u = gpu_act(d, T, c->o_groups * c->o_lora_rank);
    g->kv = gpu_buffer(d, T * K, 4);
    g->q = gpu_buffer(d, T * H * K, 4);
    g->qh = gpu_buffer(d, T * H * K, 2);
    g->iq = gpu_buffer(d, T * c->index_heads * c->index_dim, 4);
    g->iqh = gpu_buffer(d, T * c->index_heads * c->index_dim, 2);
    g->iw = gpu_buffer(d, T * c->index_heads, 4);
    g->score_ld = (d->ctx / 4 + 31) & ~31;
    g->score_rows = (int)((16u << 20) / (size_t)(g->score_ld + 1));
    if (g->score_rows < 1) g->score_rows = 1;
    if (g->score_rows > d->max_rows) g->score_rows = d->max_rows;
    g->scores = gpu_buffer(d, (size_t)g->score_rows * g->score_ld, 4);
    g->best_ld = (g->score_ld / KEY_SLAB + 1) * c->index_topk;
    g->best = gpu_buffer(d, (size_t)g->score_rows * g->best_ld, 4);
    g->best_key = gpu_buffer(d, (size_t)g->score_rows * g->best_ld, 4);
    g->chosen = gpu_buffer(d, T * c->index_topk, 4);
    g->o_part = gpu_buffer(d, parts * H * K, 4);
    g->ml = gpu_buffer(d, parts * H, 8);
    g->gate = gpu_buffer(d, T * E, 4);
    g->h.q = gpu_buffer(d, hidden * c->expert_dim, 1);
    g->h.s = gpu_buffer(d, hidden * c->expert_dim / 32, 4);
    bool h_float = false;       // does a w2 of the model take FP32 rows?
    for (int i = 0; i < c->n_layers; i++)
        h_float |= !takes_int8(d->w.layers[i].sw2.fmt) || !takes_int8(d->w.layers[i].w2->fmt);
    for (int i = 0; d->w.mtp && i < c->n_mtp; i++)
        h_float |= !takes_int8(d->w.mtp[i].block.sw2.fmt) ||
                   !takes_int8(d->w.mtp[i].block.w2->fmt);
    if (h_float) g->h.x = gpu_buffer(d, hidden * c->expert_dim, 4);
    g->contribution = gpu_buffer(d, hidden * D, 4);
    g->r.tiles = gpu_buffer(d, T * A / TILE_T + E + T / TILE_T + 2, 16);
    g->r.n_tiles = gpu_buffer(d, 1, 4);
    GpuRouting *r = &g->r;
    CuPtr *routing[] = { &r->ids, &r->weights, &r->order, &r->place, &r->start, &r->active,
                         &r->n_active, &r->bad };
    for (size_t i = 0; i < COUNT(routing); i++) *routing[i] = gpu_buffer(d, T * A + E + 1, 4);
    g->host_rows = host_pinned(d, T * sizeof(Row));
    g->host_X = host_pinned(d, T * S * D * 4);
    g->host_slots = host_pinned(d, sizeof g->slot);
    g->host_bad = host_pinned(d, 4);
    if (!d->has_head) return;
    g->want = gpu_buffer(d, T, 4);
    g->heads = gpu_buffer(d, (HEAD_TILE + TILE) * D, 4);
    g->logits = gpu_buffer(d, HEAD_TILE * V, 4);
    g->host_want = host_pinned(d, T * 4);
    g->host_logits = host_pinned(d, HEAD_TILE * V * 4);
    if (!d->w.mtp) return;
    g->e = gpu_buffer(d, T * D, 4);
    g->ex = gpu_buffer(d, T * (S + 1) * D, 4);
}

// Bytes of buffers that a stage like d would take.
static size_t cuda_buffer_bytes(const Device *like) {
    Device d = *like;
    Cuda *g = d.impl = xalloc(1, sizeof *g);
    g->count_only = true;
    cuda_buffers(&d);
    size_t n = g->scratch_bytes;
    free(g);
    return n;
}

size_t cuda_memory(int ordinal) {
    CuDevice dev;
    CuContext ctx;
    size_t bytes = 0, total;
    if (ordinal >= cuda_count() || cu.DeviceGet(&dev, ordinal)) return 0;
    if (cu.PrimaryCtxRetain(&ctx, dev) || cu.CtxSetCurrent(ctx)) return 0;
    return cu.MemGetInfo(&bytes, &total) ? 0 : bytes;
}

static void cuda_tables(Device *d) {
    Cuda *g = d->impl;
    for (int i = 0; i < 2; i++)
        g->inv_freq[i] = gpu_table(d, d->inv_freq[i], sizeof(float) * (size_t)d->c->rope_dim / 2);
    for (int i = 0; i < stage_caches(d); i++) layer_products(d, stage_layer(d, i), &g->layer[i]);
    if (!d->has_head) return;
    GpuAct heads = { .x = g->heads, .k = d->c->dim };
    g->head = one_product(d, &d->w.head, &heads, g->logits);
    if (!d->w.mtp) return;
    GpuAct h = { .x = g->ex, .k = d->c->dim }, e = h;
    e.x += 4 * ((size_t)d->max_rows + TILE) * d->c->hc_mult * d->c->dim;
    g->h_proj = one_product(d, &d->w.mtp->h_proj, &h, g->X);
    g->e_proj = one_product(d, &d->w.mtp->e_proj, &e, g->e);
}

static const Ops cuda_ops;

// Makes d a stage on GPU `ordinal`: kernels, weights (d->w then holds device addresses), buffers.
// c, w, first, last, has_head, max_rows, ring, cring, ctx and inv_freq are set. Ends the process
// with one line if that is impossible.
static void cuda_device(Device *d, int ordinal) {
    Cuda *g = xalloc(1, sizeof *g);
    Err e;
    int n = 0;
    if (!cuda_open(&e)) die(1, "%s: %s", d->name, e.text);
    if (cu.DeviceGetCount(&n) || ordinal >= n) die(1, "%s: GPUs here: %d", d->name, n);
    d->op = &cuda_ops;
    d->impl = g;
    g->kernel = -1;
    check_shape(d);
    CU(d, DeviceGet, &g->dev, ordinal);
    CU(d, PrimaryCtxRetain, &g->ctx, g->dev);
    CU(d, CtxSetCurrent, g->ctx);
    CU(d, StreamCreate, &g->stream, 1);
    CU(d, EventCreate, &g->staged, 2);
    CU(d, EventRecord, g->staged, g->stream);
    cuda_compile(d);
    cuda_upload(d);
    g->layer = xalloc((size_t)stage_caches(d), sizeof *g->layer);
    cuda_layout(d);
    cuda_buffers(d);
    cuda_tables(d);
    gpu_wait(d);
}

// Gives everything back. d->w keeps device addresses that are no longer valid.
static void cuda_close(Device *d) {
    Cuda *g = d->impl;
    void *pinned[] = { g->host_rows, g->host_X, g->host_logits, g->host_want, g->host_bad,
                       g->host_slots };
    CU(d, CtxSetCurrent, g->ctx);
    gpu_wait(d);
    for (size_t i = 0; i < COUNT(g->slot); i++) if (g->slot[i]) CU(d, MemFree, g->slot[i]);
    for (size_t i = 0; i < COUNT(g->graphs); i++)
        if (g->graphs[i]) CU(d, GraphExecDestroy, g->graphs[i]);
    for (int i = 0; i < g->n_owned; i++) CU(d, MemFree, g->owned[i]);
    for (size_t i = 0; i < COUNT(pinned); i++) if (pinned[i]) CU(d, MemFreeHost, pinned[i]);
    CU(d, EventDestroy, g->staged);
    CU(d, StreamDestroy, g->stream);
    CU(d, ModuleUnload, g->module);
    free(g->owned);
    free(g->layer);
    free(g);
    d->impl = NULL;
}

// ---------------------------------------------------------------------------
// CUDA: the operations. Each is one to three launches; hc_post waits for the next kernel that reads the streams.

// Index keys that the rows of the batch see at most.
static int gpu_keys(const Device *d) {
    const Cuda *g = d->impl;
    int keys = 0;
    for (int t = 0; t < g->T; t++) {
        int n = n_visible(g->host_rows[t].pos, 4);
        keys = n > keys ? n : keys;
    }
    return keys;
}

// The graph for the batch's context: 0 if every key is chosen anyway, else the power of two that holds the keys.
static int graph_bucket(const Device *d) {
    int keys = gpu_keys(d), b = 0;
    if (keys <= d->c->index_topk) return 0;
    while (1 << b < keys) b++;
    return b;
}

static void graph_begin(Device *d) {
    Cuda *g = d->impl;
    if (!cuda_graphs || g->T != 1) return;
    g->graph = g->graphs[graph_bucket(d)] ? GRAPH_REPLAYS : GRAPH_RECORDS;
    if (g->graph == GRAPH_RECORDS) CU(d, StreamBeginCapture, g->stream, 1);     // 1: calls of other threads go on
}

// Runs the step that the operations since graph_begin() have described.
static void graph_end(Device *d) {
    Cuda *g = d->impl;
    CuGraphExec *exec = &g->graphs[graph_bucket(d)];
    if (g->graph == GRAPH_OFF) return;
    if (g->graph == GRAPH_RECORDS) {
        CuGraph graph;
        CU(d, StreamEndCapture, g->stream, &graph);
        CU(d, GraphInstantiate, exec, graph, 0);
        CU(d, GraphDestroy, graph);
    }
    CU(d, GraphLaunch, *exec, g->stream);
    g->graph = GRAPH_OFF;
}

static void cuda_begin(Device *d, const Row *rows, int T) {
    Cuda *g = d->impl;
    CU(d, CtxSetCurrent, g->ctx);
    graph_end(d);               // of a batch whose results nobody wanted
    CU(d, EventSynchronize, g->staged);
    memcpy(g->host_rows, rows, sizeof *rows * (size_t)T);
    gpu_copy_in(d, g->rows, g->host_rows, sizeof *rows * (size_t)T);
    CU(d, EventRecord, g->staged, g->stream);
    g->T = T;
    g->post = false;
}

static void cuda_embed(Device *d) {
    Cuda *g = d->impl;
    graph_begin(d);
    CuPtr table = (CuPtr)(uintptr_t)d->w.embed.w;
    int wide = d->w.embed.fmt == W_F32;
    LAUNCH(d, embed, g->T, 1, 1, 256, 0, &table, &wide, &g->rows, &g->X);
}

static size_t gpu_streams(const Device *d) { return 4 * (size_t)((Cuda *)d->impl)->T * d->c->hc_mult * d->c->dim; }

static void cuda_streams_in(Device *d, const float *X) {
    Cuda *g = d->impl;
    CU(d, EventSynchronize, g->staged);
    memcpy(g->host_X, X, gpu_streams(d));
    gpu_copy_in(d, g->X, g->host_X, gpu_streams(d));
    CU(d, EventRecord, g->staged, g->stream);
    graph_begin(d);
}

// The hc_post that is due, and fn . X for the hyper-connection `h` (NULL: none).
static void gpu_mix(Device *d, const Hyper *h) {
    Cuda *g = d->impl;
    int apply = g->post, n = h ? h->fn.n : 0, D = d->c->dim;
    CuPtr fn = h ? (CuPtr)(uintptr_t)h->fn.w : 0;
    if (!apply && !h) return;
    LAUNCH(d, hc_mix, (D + 63) / 64, (g->T + 7) / 8, 1, 256, 0, &g->X, &g->y, &g->post_c, &g->comb,
           &apply, &fn, &n, &g->part, &g->T);
    g->post = false;
}

static void gpu_norm(Device *d, const Hyper *h, const float *norm, int full) {
    Cuda *g = d->impl;
    LAUNCH(d, hc_norm, g->T, full ? 2 : 1, 1, 256, 0, &g->X, &g->part, (void *)&h->base, (void *)&h->scale, &norm, &full,
           &g->post_c, &g->comb, &g->x.x, &g->x.q, &g->x.s, &g->r.bad);
}

// Waits for the stream; stops if a kernel met a number that is not finite.
static void gpu_finish(Device *d) {
    Cuda *g = d->impl;
    CU(d, MemcpyDtoHAsync, g->host_bad, g->r.bad, 4, g->stream);
    gpu_wait(d);
    if (*g->host_bad) die(1, "%s: a number is not finite in or before %s (run `dsv4 verify` on the checkpoint)", d->name, d->at);
}

static void cuda_streams_out(Device *d, float *X) {
    Cuda *g = d->impl;
    graph_end(d);
    gpu_mix(d, NULL);
    CU(d, MemcpyDtoHAsync, g->host_X, g->X, gpu_streams(d), g->stream);
    gpu_finish(d);
    memcpy(X, g->host_X, gpu_streams(d));
}

static void cuda_hc_pre(Device *d, const Hyper *h, const float *norm) {
    gpu_mix(d, h);
    gpu_norm(d, h, norm, 1);
}

static void cuda_hc_post(Device *d) { ((Cuda *)d->impl)->post = true; }

// Products of a launch for T rows. A batch of few rows never takes the tiles (its draft layer has
// more rows than tokens): a row's result must not depend on how many others there are.
static void gpu_products(Device *d, const GpuProducts *p, int T) {
    Cuda *g = d->impl;
    if (T > TILE && g->T > TILE) {
        LAUNCH(d, gemm, p->tiles, (T + TILE_T - 1) / TILE_T, 1, 256, TILE_SHARED, (void *)&p->tasks, (void *)&p->n, &T,
               &g->rows, &g->slots);
        return;
    }
    LAUNCH(d, gemv, p->blocks, (T + TILE - 1) / TILE, 1, 256, 0, (void *)&p->tasks, (void *)&p->n, &T,
           &g->rows, &g->slots);
}

// The layer's tables: layers are found by their address.
static GpuLayer *gpu_layer(Device *d, const Layer *l) {
    Cuda *g = d->impl;
    for (int i = 0; i < stage_caches(d); i++) if (stage_layer(d, i) == l) return &g->layer[i];
    die(1, "%s: %s is not a layer of this stage", d->name, l->name);
}

static void cuda_attn_project(Device *d, const Layer *l) { gpu_products(d, &gpu_layer(d, l)->project, ((Cuda *)d->impl)->T); }

static GpuPool gpu_pool(const Device *d, const Compressor *m, uint64_t in, uint64_t out) {
    return (GpuPool){ (CuPtr)(uintptr_t)m->ape, (CuPtr)(uintptr_t)m->norm, in, out, d->cring[m->ratio], m->ratio };
}

static void cuda_attn_latent(Device *d, const Layer *l, int i) {
    Cuda *g = d->impl;
    GpuLayer *gl = &g->layer[i];
    GpuPool comp = gpu_pool(d, &l->comp, gl->cin, gl->comp), icomp = gpu_pool(d, &l->icomp, gl->icin, gl->ikeys);
    int roles = l->ratio == 4 ? 4 : l->ratio ? 3 : 2;
    LAUNCH(d, attn_latent, g->T, roles, 1, 256, 0, &g->qr.x, (void *)&l->q_norm, &g->qr.q, &g->qr.s, &g->kv,
           (void *)&l->kv_norm, &g->rows, &g->slots, &gl->win, &d->ring, &g->inv_freq[l->ratio != 0], &comp, &icomp);
}

static void cuda_attn_query(Device *d, const Layer *l) {
    Cuda *g = d->impl;
    int index = l->ratio == 4, heads = d->c->n_heads + (index ? d->c->index_heads : 0);
    gpu_products(d, &gpu_layer(d, l)->query, g->T);
    LAUNCH(d, query_norm, g->T, (heads + 7) / 8, 1, 256, 0, &g->q, &g->iq, &g->rows, &g->inv_freq[l->ratio != 0], &g->qh,
           &g->iqh, &index);
}

// The choice for rows [t, t + n) whose scores are there. More than KEY_SLAB keys are thinned out by many blocks first: one
// block reads its memory slowly.
static void gpu_choose(Device *d, int t, int n, int keys) {
    Cuda *g = d->impl;
    size_t ld = (size_t)g->score_ld, best_ld = (size_t)g->best_ld;
    int slab = keys > KEY_SLAB ? KEY_SLAB : 0;
    CuPtr from = g->scores;
    if (slab) {
        LAUNCH(d, index_slab, (keys + slab - 1) / slab, n, 1, 1024, 0, &g->scores, &ld, &g->rows, &t, &slab, &g->best,
               &g->best_key, &best_ld);
        from = g->best;
        ld = best_ld;
    }
    LAUNCH(d, index_topk, n, 1, 1, 1024, 0, &from, &ld, &g->best_key, &g->rows, &t, &slab, &g->chosen);
}

// In slabs of rows, so that the scores of a long context stay in bounded memory.
static void cuda_index_topk(Device *d, const Layer *l, int i) {
    Cuda *g = d->impl;
    int keys = cuda_graphs && g->T == 1 ? 1 << graph_bucket(d) : gpu_keys(d);
    size_t ld = (size_t)g->score_ld;
    (void)l;
    if (keys <= d->c->index_topk) return;
    for (int t = 0; t < g->T; t += g->score_rows) {
        int n = g->T - t < g->score_rows ? g->T - t : g->score_rows;
        LAUNCH(d, index_scores, (keys + 127) / 128, n, 1, 128, 0, &g->iqh, &g->iw, &g->rows, &g->slots,
               &g->layer[i].ikeys, &t, &g->scores, &ld);
        gpu_choose(d, t, n, keys);
    }
}

static void cuda_attend(Device *d, const Layer *l, int i) {
    Cuda *g = d->impl;
    const Config *c = d->c;
    GpuLayer *gl = &g->layer[i];
    int splits = g->T <= TILE ? MAX_SPLITS : 1, ratio = l->ratio;
    int heads = c->n_heads > 16 && g->T > 2 ? 32 : 16;          // more blocks for few rows
    CuPtr ox = takes_int8(l->wo_a.fmt) && !g->keep_floats ? 0 : g->o.x;
    gpu_launch(d, heads == 32 ? K_attend_32 : K_attend_16, (unsigned)splits, (unsigned)((c->n_heads + heads - 1) / heads),
               (unsigned)g->T, 32 * ((unsigned)(c->head_dim + 63) / 64), attend_shared(c, (unsigned)heads),
               (void *[]){ &g->qh, &g->rows, &g->slots, &gl->win, &d->ring, &gl->comp, &ratio, &g->chosen, &splits,
                           &g->o_part, &g->ml });
    LAUNCH(d, attend_combine, c->n_heads, g->T, 1, (c->head_dim / 4 + 31) & ~31, 0, &g->o_part, &g->ml, &g->rows, &ratio,
           &splits, (void *)&l->attn_sink, &g->inv_freq[ratio != 0], &ox, &g->o.q, &g->o.s);
}

static void cuda_attn_out(Device *d, const Layer *l) {
    GpuLayer *gl = gpu_layer(d, l);
    gpu_products(d, &gl->wo_a, ((Cuda *)d->impl)->T);
    gpu_products(d, &gl->wo_b, ((Cuda *)d->impl)->T);
}

// The router's product shares a launch with the shared expert when few rows stream: all of it happens in experts().
static void cuda_route(Device *d, const Layer *l) { (void)d, (void)l; }

static void experts_few(Device *d, const Layer *l, const GpuLayer *gl) {
    Cuda *g = d->impl;
    const Config *c = d->c;
    int T = g->T, E = c->n_experts, place = T * c->n_active;
    int active = place < E ? place : E;
    CuPtr shared = gl->experts + sizeof(GpuMat) * 3 * (size_t)E;
    LAUNCH(d, ffn_in, c->expert_dim / 32 + gl->gate.blocks, 1, 1, 256, 0, &shared, (void *)&gl->gate.tasks, &T,
           &g->h, &place);
    if (T == 1) {
        LAUNCH(d, expert_up_1, c->expert_dim / 32, c->n_active, 1, 256, 0, (void *)&gl->experts, &g->x.x, &g->x.q, &g->x.s,
               &g->gate, (void *)&l->gate_bias, (void *)&l->tid2eid, &g->rows, &g->r, &g->h);
    } else {
        LAUNCH(d, route, 1, 1, 1, 256, 0, &g->gate, (void *)&l->gate_bias, (void *)&l->tid2eid, &g->rows, &T, &g->r);
        LAUNCH(d, expert_up_8, c->expert_dim / 32, active, 1, 256, 0, (void *)&gl->experts, &g->x.x, &g->x.q, &g->x.s, &g->r, &g->h);
    }
    gpu_launch(d, T == 1 ? K_expert_down_1 : K_expert_down_8, (unsigned)(c->dim / 32), 1, 1, 256, 0,
               (void *[]){ (void *)&gl->experts, &g->h, &g->r, &T, &g->y });
}

static void experts_many(Device *d, const Layer *l, const GpuLayer *gl) {
    Cuda *g = d->impl;
    const Config *c = d->c;
    int T = g->T, pairs = T * c->n_active, tiles = pairs / TILE_T + (pairs < c->n_experts ? pairs : c->n_experts);
    tiles += (T + TILE_T - 1) / TILE_T;
    gpu_products(d, &gl->gate, T);
    LAUNCH(d, route, (T + 7) / 8, 1, 1, 256, 0, &g->gate, (void *)&l->gate_bias, (void *)&l->tid2eid, &g->rows, &T, &g->r);
    LAUNCH(d, group_rows, (c->n_experts + 7) / 8, 1, 1, 256, 0, &T, &g->r);
    LAUNCH(d, expert_up, (c->expert_dim + 63) / 64, tiles, 1, 256, TILE_SHARED, (void *)&gl->experts, &g->x.x, &g->x.q,
           &g->x.s, &T, &g->r, &g->h);
    LAUNCH(d, expert_down, (c->dim + TILE_N - 1) / TILE_N, tiles, 1, 256, TILE_SHARED, (void *)&gl->experts, &g->h, &g->r,
           &g->contribution);
    LAUNCH(d, expert_sum, (c->dim + 1023) / 1024, T, 1, 256, 0, &g->contribution, &g->r, &T, &g->y);
}

static void cuda_experts(Device *d, const Layer *l) {
    if (((Cuda *)d->impl)->T <= TILE) experts_few(d, l, gpu_layer(d, l));
    else experts_many(d, l, gpu_layer(d, l));
}

static void cuda_mtp_in(Device *d, const Mtp *m) {
    Cuda *g = d->impl;
    int S = d->c->hc_mult, rows = g->T * S, wide = d->w.embed.fmt == W_F32;
    CuPtr table = (CuPtr)(uintptr_t)d->w.embed.w, e = g->ex + 4 * ((size_t)d->max_rows + TILE) * S * d->c->dim;
    gpu_mix(d, NULL);
    LAUNCH(d, mtp_norm, g->T, S + 1, 1, 256, 0, &g->X, &table, &wide, &g->rows, (void *)&m->hnorm, (void *)&m->enorm, &g->ex, &e);
    gpu_products(d, &g->e_proj, g->T);
    gpu_products(d, &g->h_proj, rows);
    LAUNCH(d, mtp_add, rows, 1, 1, 256, 0, &g->X, &g->e);
}

static void cuda_head(Device *d, const Hyper *h, const float *norm, const int *want, int n, float *logits) {
    Cuda *g = d->impl;
    size_t V = (size_t)d->c->vocab;
    graph_end(d);
    gpu_mix(d, h);
    gpu_norm(d, h, norm, 0);
    memcpy(g->host_want, want, sizeof *want * (size_t)n);
    gpu_copy_in(d, g->want, g->host_want, sizeof *want * (size_t)n);
    for (int i = 0; i < n; i += HEAD_TILE) {
        int m = n - i < HEAD_TILE ? n - i : HEAD_TILE;
        CuPtr from = g->want + 4 * (size_t)i;
        LAUNCH(d, gather_rows, m, 1, 1, 256, 0, &g->x.x, &from, &g->heads);
        gpu_products(d, &g->head, m);
        CU(d, MemcpyDtoHAsync, g->host_logits, g->logits, 4 * (size_t)m * V, g->stream);
        gpu_finish(d);
        memcpy(logits + (size_t)i * V, g->host_logits, 4 * (size_t)m * V);
    }
}

// --- sessions' caches

static void set_slot(Device *d, int slot, CuPtr p) {
    Cuda *g = d->impl;
    g->slot[slot] = p;
    g->host_slots[slot] = p;
    gpu_copy_in(d, g->slots + 8 * (size_t)slot, g->host_slots + slot, 8);
    gpu_wait(d);
}

static void cuda_cache_new(Device *d, int slot) {
    Cuda *g = d->impl;
    CU(d, CtxSetCurrent, g->ctx);
    set_slot(d, slot, g->slot_bytes ? gpu_alloc(d, g->slot_bytes, "the caches of a session") : 0);
}

static void cuda_cache_free(Device *d, int slot) {
    Cuda *g = d->impl;
    CuPtr p = g->slot[slot];
    CU(d, CtxSetCurrent, g->ctx);
    set_slot(d, slot, 0);
    if (p) CU(d, MemFree, p);
}

// The slots of positions [from, to) of a ring at `ring`: in one or two pieces, to or from buf (NULL only counts).
static size_t gpu_ring_copy(Device *d, CuPtr ring, size_t row, int slots, int from, int to, char *buf, bool save) {
    CuStream s = ((Cuda *)d->impl)->stream;
    for (int p = from; buf && p < to;) {
        int at = p % slots, n = to - p < slots - at ? to - p : slots - at;
        CuPtr dev = ring + row * (size_t)at;
        char *host = buf + row * (size_t)(p - from);
        if (save) CU(d, MemcpyDtoHAsync, host, dev, row * (size_t)n, s);
        else CU(d, MemcpyHtoDAsync, dev, host, row * (size_t)n, s);
        p += n;
    }
    return row * (size_t)(to > from ? to - from : 0);
}

// As cache_copy() on the CPU: the window, and the compressors' open windows.
static size_t gpu_cache_copy(Device *d, int slot, int pos, char *buf, bool save) {
    Cuda *g = d->impl;
    CuPtr base = g->slot[slot];
    size_t n = 0;
    CU(d, CtxSetCurrent, g->ctx);
    for (int i = 0; i < stage_caches(d); i++) {
        const Layer *l = stage_layer(d, i);
        const GpuLayer *gl = &g->layer[i];
        int M = l->ratio, from = pos > d->c->window ? pos - d->c->window : 0;
        n += gpu_ring_copy(d, base + gl->win, kv_bytes(d, d->c->head_dim), d->ring, from, pos, buf ? buf + n : NULL, save);
        if (!M) continue;
        from = pos / M * M;
        if (M == 4 && from) from -= M;
        n += gpu_ring_copy(d, base + gl->cin, 8 * (size_t)l->comp.wkv.n, d->cring[M], from, pos, buf ? buf + n : NULL, save);
        if (M == 4)
            n += gpu_ring_copy(d, base + gl->icin, 8 * (size_t)l->icomp.wkv.n, d->cring[4], from, pos, buf ? buf + n : NULL, save);
    }
    gpu_wait(d);
    return n;
}

static size_t cuda_cache_save(Device *d, int slot, int pos, void *to) { return gpu_cache_copy(d, slot, pos, to, true); }
static void cuda_cache_load(Device *d, int slot, int pos, const void *from) {
    gpu_cache_copy(d, slot, pos, (char *)(uintptr_t)from, false);
}

static const Ops cuda_ops = {
    .begin = cuda_begin, .embed = cuda_embed, .streams_in = cuda_streams_in, .streams_out = cuda_streams_out,
    .hc_pre = cuda_hc_pre, .hc_post = cuda_hc_post, .attn_project = cuda_attn_project, .attn_latent = cuda_attn_latent,
    .attn_query = cuda_attn_query, .index_topk = cuda_index_topk, .attend = cuda_attend, .attn_out = cuda_attn_out,
    .route = cuda_route, .experts = cuda_experts, .mtp_in = cuda_mtp_in, .head = cuda_head,
    .cache_new = cuda_cache_new, .cache_free = cuda_cache_free,
    .cache_save = cuda_cache_save, .cache_load = cuda_cache_load,
};
// ---------------------------------------------------------------------------
// CUDA: the self-test. A GPU and the CPU run the same layers operation by operation; what each one
// wrote is compared, then the GPU goes on from the CPU's numbers.

// The operations, with the kernels behind them where the names differ.
#define CHECKS(X) \
    X(EMBED, "embed") X(POST, "hc_post (hc_mix)") X(PRE, "hc_pre (hc_mix, hc_norm)") \
    X(QUANTISE, "quantise") X(PROJECT, "attn_project (gemv, gemm)") X(LATENT, "attn_latent") \
    X(COMPRESS, "compress (attn_latent)") X(QUERY, "attn_query (gemv, gemm, query_norm)") \
    X(SCORES, "index_scores") X(TOPK, "index_topk") X(ATTEND, "attend (attend_combine)") \
    X(OUT, "attn_out (gemv, gemm)") X(ROUTE, "route (gemv, gemm)") \
    X(EXPERTS, "experts (ffn_in, expert_up, expert_down)") X(HEAD, "head (hc_norm, gemv, gemm)") \
    X(MTP, "mtp_in (mtp_norm, gemv, gemm)")
#define CHECK_ID(id, name) C_##id,
#define CHECK_NAME(id, name) name,
enum { CHECKS(CHECK_ID) N_CHECKS };
static const char *const check_names[] = { CHECKS(CHECK_NAME) };

typedef struct {
    Device cpu, *gpu;
    Run *r;
    Cuda *g;
    int T;
    uint64_t state;             // of the random numbers
    GpuCheck *list;               // [N_CHECKS]
    void *tmp;
} Twin;

// Uniform in (-1, 1).
static float random_signed(uint64_t *state) { return (float)(2 * random_unit(state) - 1); }

static void *twin_read(Twin *w, CuPtr from, size_t bytes) {
    free(w->tmp);
    w->tmp = xalloc(bytes, 1);
    CU(w->gpu, MemcpyDtoHAsync, w->tmp, from, bytes, w->g->stream);
    gpu_wait(w->gpu);
    return w->tmp;
}

static void twin_give(Twin *w, CuPtr to, const void *from, size_t bytes) {
    gpu_copy_in(w->gpu, to, from, bytes);
    gpu_wait(w->gpu);
}

static void twin_note(Twin *w, int check, double error, double limit) {
    GpuCheck *p = &w->list[check];
    if (!(error < 1e30)) error = 1e30;                  // NaN too
    double share = error / fmax(limit, 1e-30);
    if (!p->n++ || share > p->share)
        *p = (GpuCheck){ check_names[check], error, limit, share, w->cpu.at, w->T, p->n };
}

// The largest of n differences over the root mean square of the CPU's values.
static double deviation(const float *gpu, const float *cpu, size_t n, double slack) {
    double worst = 0, square = 1e-30;
    for (size_t i = 0; i < n; i++) {
        double diff = fabs((double)gpu[i] - cpu[i]) - slack * fabs((double)gpu[i]);
        worst = diff <= worst ? worst : diff;
        square += (double)cpu[i] * cpu[i];
    }
    return worst / sqrt(square / n);
}

static void twin_floats(Twin *w, int check, CuPtr gpu, const float *cpu, size_t n, double limit) {
    twin_note(w, check, deviation(twin_read(w, gpu, 4 * n), cpu, n, 0), limit);
    twin_give(w, gpu, cpu, 4 * n);
}

// The GPU has BF16: what is off by more than one step of rounding counts in full.
static void twin_halves(Twin *w, int check, CuPtr gpu, const float *cpu, size_t n) {
    const bf16 *h = twin_read(w, gpu, 2 * n);
    float *x = xalloc(n, sizeof *x);
    bf16 *own = xalloc(n, sizeof *own);
    for (size_t i = 0; i < n; i++) {
        x[i] = f32_of_bf16(h[i]);
        own[i] = bf16_of_f32(cpu[i]);
    }
    twin_note(w, check, deviation(x, cpu, n, 0x1p-7), 2e-5);
    twin_give(w, gpu, own, 2 * n);
    free(x), free(own);
}

static void twin_give_ints(Twin *w, const GpuAct *gpu, const Act *cpu) {
    twin_give(w, gpu->q, cpu->q, cpu->ldq * (size_t)w->T);
    twin_give(w, gpu->s, cpu->s, 4 * cpu->lds * (size_t)w->T);
}

// INT8 without the floats they came from: a last-bit difference there may flip a rounding.
static void twin_ints(Twin *w, int check, const GpuAct *gpu, const Act *cpu) {
    size_t n = cpu->ldq * (size_t)w->T, wrong = 0;
    const int8_t *q = twin_read(w, gpu->q, n);
    for (size_t i = 0; i < n; i++) wrong += abs(q[i] - cpu->q[i]) > 1 ? n : q[i] != cpu->q[i];
    twin_note(w, check, (double)wrong / n, 2e-3);
    twin_give_ints(w, gpu, cpu);
}

// The floats within `limit`; the GPU's integers and scales exactly what the CPU makes of the GPU's
// floats (dimensions are multiples of 32: all rows are one sequence of groups).
static void twin_act(Twin *w, int check, const GpuAct *gpu, const Act *cpu, double limit) {
    size_t n = cpu->ldq * (size_t)w->T, groups = cpu->lds * (size_t)w->T;
    float *s = xalloc(groups, sizeof *s);
    int8_t *q = xalloc(n, 1);
    quantise(twin_read(w, gpu->x, 4 * n), (int)n, q, s);
    bool same = !memcmp(q, twin_read(w, gpu->q, n), n);
    same = !memcmp(s, twin_read(w, gpu->s, 4 * groups), 4 * groups) && same;
    twin_note(w, C_QUANTISE, !same, 0);
    twin_floats(w, check, gpu->x, cpu->x, n, limit);
    twin_give_ints(w, gpu, cpu);
    free(q), free(s);
}

// A random past of `pos` positions: window, compressed rows, index keys and compressor inputs.
static void twin_past(Twin *w, const Layer *l, int i, int pos) {
    Device *d = &w->cpu;
    const Cache *c = d->cache[0] + i;
    const GpuLayer *gl = &w->g->layer[i];
    const Compressor *comp[] = { &l->comp, &l->icomp };
    const uint64_t at[] = { gl->win, gl->comp, gl->ikeys, gl->cin, gl->icin };
    void *part[] = { c->win, c->comp, c->ikeys, c->cin, c->icin };
    int slots = d->cring[l->ratio];
    size_t size[5];
    cache_sizes(d, l, size);
    for (int j = 1; j < 3 && l->ratio; j++)             // of the compressed rows those that exist
        size[j] = size[j] / ((size_t)d->ctx / l->ratio) * (size_t)(pos / l->ratio);
    for (int j = 0; j < 5; j++) {
        bf16 *h = part[j];
        float *x = j < 3 ? NULL : xalloc(size[j], 1);
        for (size_t k = 0; j < 3 && k < size[j] / 2; k++)
            h[k] = bf16_of_f32(random_signed(&w->state));
        for (size_t k = 0; j >= 3 && k < size[j] / 4; k++) x[k] = random_signed(&w->state);
        if (size[j]) twin_give(w, w->g->slot[0] + at[j], x ? (void *)x : h, size[j]);
        for (int p = pos > slots ? pos - slots : 0; x && size[j] && p < pos; p++) {
            const float *in = x + (size_t)(p % slots) * 2 * comp[j - 3]->wkv.n;
            compress_store(comp[j - 3], part[j], slots, in, p);     // the CPU keeps gate + ape
        }
        free(x);
    }
}

// Row `at` of a cache; then both go on from the CPU's.
static void twin_row(Twin *w, int check, uint64_t gpu, void *rows, int at, int n) {
    float *x = xalloc((size_t)n, sizeof *x);
    row_get(&w->cpu, rows, (size_t)at, n, x);
    twin_halves(w, check, w->g->slot[0] + gpu + 2 * (size_t)at * (size_t)n, x, (size_t)n);
    free(x);
}

// The compressor inputs of the batch: [T, 2, n] on the CPU, in the ring on the GPU.
static void twin_ring(Twin *w, uint64_t at, const float *cpu, int n, int slots) {
    for (int t = 0; t < w->T; t++) {
        size_t slot = (size_t)(w->r->rows[t].pos % slots);
        CuPtr row = w->g->slot[0] + at + 8 * (size_t)n * slot;
        twin_floats(w, C_PROJECT, row, cpu + (size_t)t * 2 * n, 2 * (size_t)n, 3e-5);
    }
}

static void twin_attention(Twin *w, const Layer *lc, const Layer *lg, int i) {
    Run *r = w->r;
    Cuda *g = w->g;
    Device *c = &w->cpu, *d = w->gpu;
    const Config *k = c->c;
    GpuLayer *gl = &g->layer[i];
    const Cache *own = c->cache[0] + i;
    size_t T = (size_t)w->T;
    int M = lc->ratio;
    c->op->attn_project(c, lc);
    d->op->attn_project(d, lg);
    twin_floats(w, C_PROJECT, g->qr.x, r->qr.x, T * k->q_lora_rank, 3e-5);
    twin_floats(w, C_PROJECT, g->kv, r->kv, T * k->head_dim, 3e-5);
    if (M) twin_ring(w, gl->cin, r->cin, lc->comp.wkv.n, c->cring[M]);
    if (M == 4) twin_ring(w, gl->icin, r->icin, lc->icomp.wkv.n, c->cring[4]);
    if (M == 4) twin_floats(w, C_PROJECT, g->iw, r->iw, T * k->index_heads, 3e-5);
    c->op->attn_latent(c, lc, i);
    d->op->attn_latent(d, lg, i);
    twin_act(w, C_LATENT, &g->qr, &r->qr, 5e-6);
    for (int t = 0; t < w->T; t++) {
        int pos = r->rows[t].pos;
        twin_row(w, C_LATENT, gl->win, own->win, pos % c->ring, k->head_dim);
        if (!M || (pos + 1) % M) continue;
        twin_row(w, C_COMPRESS, gl->comp, own->comp, pos / M, k->head_dim);
        if (M == 4) twin_row(w, C_COMPRESS, gl->ikeys, own->ikeys, pos / 4, k->index_dim);
    }
    c->op->attn_query(c, lc);
    d->op->attn_query(d, lg);
    twin_halves(w, C_QUERY, g->qh, r->q, T * k->n_heads * k->head_dim);
    if (M == 4) twin_halves(w, C_QUERY, g->iqh, r->iq, T * k->index_heads * k->index_dim);
}

// The scores within rounding; then the choice among the CPU's own scores, made coarse, exactly.
static void twin_index(Twin *w, const Layer *lc, const Layer *lg, int i) {
    Run *r = w->r;
    Cuda *g = w->g;
    const Config *c = w->cpu.c;
    int topk = c->index_topk, keys = n_visible(r->rows[w->T - 1].pos, 4), wrong = 0;
    w->cpu.op->index_topk(&w->cpu, lc, i);
    w->gpu->op->index_topk(w->gpu, lg, i);
    if (keys <= topk || g->score_rows < w->T) return;
    float scale = 1.0f / sqrtf((float)c->index_dim) / sqrtf((float)c->index_heads);
    for (int t = 0; t < w->T; t++) {
        int n = n_visible(r->rows[t].pos, 4);
        float *s = r->iscore + (size_t)t * keys;
        CuPtr row = g->scores + 4 * (size_t)g->score_ld * (size_t)t;
        if (n <= topk) continue;
        for (int j = 0; j < n; j++) s[j] /= scale;      // the GPU leaves out the common factor
        twin_floats(w, C_SCORES, row, s, (size_t)n, 1e-5);
        for (int j = 0; j < n; j++) s[j] = rintf(2 * s[j]) / 2;     // many ties
        twin_give(w, row, s, 4 * (size_t)n);
        top_k(s, n, topk, r->top + (size_t)t * topk);
    }
    gpu_choose(w->gpu, 0, w->T, keys);
    const int *chosen = twin_read(w, g->chosen, 4 * (size_t)w->T * topk);
    for (int t = 0; t < w->T; t++) {
        size_t at = (size_t)t * topk;
        if (n_visible(r->rows[t].pos, 4) <= topk) continue;
        wrong += memcmp(chosen + at, r->top + at, sizeof *chosen * topk) != 0;
    }
    twin_note(w, C_TOPK, wrong, 0);
}

static void twin_streams(Twin *w, int check, double limit) {
    twin_floats(w, check, w->g->X, w->r->X, streams_bytes(&w->cpu, w->T) / 4, limit);
}

static void twin_pre(Twin *w, const Hyper *hc, const Hyper *hg, const float *nc, const float *ng) {
    size_t T = (size_t)w->T, S = (size_t)w->cpu.c->hc_mult;
    w->cpu.op->hc_pre(&w->cpu, hc, nc);
    w->gpu->op->hc_pre(w->gpu, hg, ng);
    twin_streams(w, C_POST, 5e-6);
    twin_act(w, C_PRE, &w->g->x, &w->r->x, 1e-5);
    twin_floats(w, C_PRE, w->g->post_c, w->r->post, T * S, 1e-5);
    twin_floats(w, C_PRE, w->g->comb, w->r->comb, T * S * S, 1e-5);
}

static void twin_layer(Twin *w, const Layer *lc, const Layer *lg, int i) {
    Run *r = w->r;
    Cuda *g = w->g;
    Device *c = &w->cpu, *d = w->gpu;
    size_t T = (size_t)w->T, D = (size_t)c->c->dim, A = (size_t)c->c->n_active;
    bool int8 = takes_int8(lc->wo_b.fmt);
    c->at = d->at = lc->name;
    twin_pre(w, &lc->hc_attn, &lg->hc_attn, lc->attn_norm, lg->attn_norm);
    twin_attention(w, lc, lg, i);
    if (lc->ratio == 4) twin_index(w, lc, lg, i);
    c->op->attend(c, lc, i);
    d->op->attend(d, lg, i);
    twin_act(w, C_ATTEND, &g->o, &r->o, 2e-2);          // P is rounded to BF16 against other maxima
    c->op->attn_out(c, lc);
    d->op->attn_out(d, lg);
    if (int8) twin_ints(w, C_OUT, &g->u, &r->u);
    twin_floats(w, C_OUT, g->y, r->y, T * D, int8 ? 5e-3 : 3e-5);
    c->op->hc_post(c);
    d->op->hc_post(d);
    twin_pre(w, &lc->hc_ffn, &lg->hc_ffn, lc->ffn_norm, lg->ffn_norm);
    c->op->route(c, lc);
    d->op->route(d, lg);
    c->op->experts(c, lc);
    d->op->experts(d, lg);
    bool same = !memcmp(twin_read(w, g->r.ids, 4 * T * A), r->expert, 4 * T * A);
    twin_note(w, C_ROUTE, !same, 0);
    twin_floats(w, C_ROUTE, g->r.weights, r->weight, T * A, 1e-5);
    twin_floats(w, C_EXPERTS, g->y, r->y, T * D, takes_int8(lc->sw2.fmt) ? 5e-3 : 3e-3);
    c->op->hc_post(c);
    d->op->hc_post(d);
}

static void twin_head(Twin *w) {
    Device *c = &w->cpu, *d = w->gpu;
    size_t n = (size_t)w->T * c->c->vocab;
    float *lc = xalloc(n, sizeof *lc), *lg = xalloc(n, sizeof *lg);
    int *want = xalloc((size_t)w->T, sizeof *want);
    for (int t = 0; t < w->T; t++) want[t] = t;
    c->at = d->at = "head";
    c->op->head(c, &c->w.hc_head, c->w.norm, want, w->T, lc);
    d->op->head(d, &d->w.hc_head, d->w.norm, want, w->T, lg);
    twin_note(w, C_HEAD, deviation(lg, lc, n, 0), 5e-5);
    twin_streams(w, C_POST, 5e-6);
    free(want), free(lc), free(lg);
}

// Does a later layer of the stage test the same kernels?
static bool tested_later(const Device *d, int i) {
    const Layer *l = &d->w.layers[i];
    for (int j = i + 1; j < d->last; j++) {
        const Layer *m = &d->w.layers[j];
        if (m->ratio == l->ratio && !m->tid2eid == !l->tid2eid) return true;
    }
    return false;
}

// Runs every operation of stage `gpu` (layers: the last of each kind) there and on the CPU with
// identical inputs: T rows from position pos on, slot 0. host: the weights in host memory. `list`
// [N_CHECKS] gathers the worst deviations.
static void cuda_parity(Device *gpu, const Weights *host, Pool *pool, int T, int pos, uint64_t seed,
                        GpuCheck *list) {
    Twin w = { .cpu = *gpu, .gpu = gpu, .g = gpu->impl, .T = T, .state = seed, .list = list };
    Device *c = &w.cpu;
    const Config *k = gpu->c;
    c->w = *host;
    if (!gpu->w.mtp) c->w.mtp = NULL;
    c->max_rows = T;
    c->at = gpu->at = "self-test";
    cpu_device(c, pool);
    w.r = c->impl;
    w.g->keep_floats = true;
    c->op->cache_new(c, 0);
    gpu->op->cache_new(gpu, 0);
    Row *rows = xalloc((size_t)T, sizeof *rows);
    for (int t = 0; t < T; t++)
        rows[t] = (Row){ (t * 7 + 3) % k->vocab, 0, pos + t, (t * 5 + 1) % k->vocab };
    c->op->begin(c, rows, T);
    gpu->op->begin(gpu, rows, T);
    if (gpu->first == 0) {
        c->op->embed(c);
        gpu->op->embed(gpu);
        twin_streams(&w, C_EMBED, 0);
    }
    size_t n = streams_bytes(c, T) / 4;
    for (size_t i = 0; i < n; i++) w.r->X[i] = random_signed(&w.state);
    twin_give(&w, w.g->X, w.r->X, 4 * n);
    for (int i = gpu->first; i < gpu->last; i++) {
        if (tested_later(c, i)) continue;
        twin_past(&w, &c->w.layers[i], i - gpu->first, pos);
        twin_layer(&w, &c->w.layers[i], &gpu->w.layers[i], i - gpu->first);
    }
    if (gpu->has_head) twin_head(&w);
    if (c->w.mtp) {
        c->op->mtp_in(c, c->w.mtp);
        gpu->op->mtp_in(gpu, gpu->w.mtp);
        twin_streams(&w, C_MTP, 5e-5);
    }
    gpu_finish(gpu);            // what is not finite has a message of its own
    w.g->keep_floats = false;
    free(rows), free(w.tmp);
    c->op->cache_free(c, 0);
    gpu->op->cache_free(gpu, 0);
}

// A position where the indexer chooses and, in a batch of T rows, windows close.
static int selftest_pos(const Device *d, int T) {
    int pos = (d->c->index_topk / 32 + 2) * 128 - 1 - T / 2;
    while (pos + T > d->ctx) pos -= 128;
    return pos < 0 ? 0 : pos;
}

enum { SELFTEST_MARGIN = 10 };     // real shapes sum more; what is broken is off by far more

// Tests a stage that has just started, unless this GPU has passed with this driver and these
// kernels before: that is remembered beside the kernels. Ends the process if an operation is wrong.
// A near tie in the router can fall differently: what fails is tried with other numbers.
static void cuda_selftest(Device *d, const Weights *host) {
    Cuda *g = d->impl;
    GpuCheck list[N_CHECKS], *wrong = NULL;
    int T = d->max_rows < TILE + 1 ? d->max_rows : TILE + 1, driver = 0, bad = 0, kinds = 0;
    int pos = selftest_pos(d, T);
    char uuid[16] = "", name[100] = "";
    for (int i = d->first; i < d->last; i++) {
        const Layer *l = &host->layers[i];
        kinds |= (l->ratio == 4 ? 1 : l->ratio ? 2 : 4) << (l->tid2eid ? 3 : 0);
    }
    CU(d, DriverGetVersion, &driver);
    CU(d, DeviceGetUuid, uuid, g->dev);
    CU(d, DeviceGetName, name, sizeof name, g->dev);
    int what[] = { driver, T, pos, kinds, d->first == 0, d->has_head, d->w.mtp != NULL };
    uint64_t key = hash64(hash64(g->ptx, uuid, sizeof uuid), what, sizeof what);
    char *before = cache_get("passed", key);
    double start = now();
    bool graphs = cuda_graphs;
    Pool *pool = before ? NULL : pool_new(0);
    cuda_graphs = false;
    for (uint64_t seed = 1; seed <= 2 && !before && (seed == 1 || wrong); seed++) {
        memset(list, 0, sizeof list);
        cuda_parity(d, host, pool, T, pos, seed, list);
        if (T > 1) cuda_parity(d, host, pool, 1, selftest_pos(d, 1), seed, list);
        for (bad = 0; bad < N_CHECKS && list[bad].share <= SELFTEST_MARGIN; bad++) continue;
        wrong = bad < N_CHECKS ? &list[bad] : NULL;
    }
    cuda_graphs = graphs;
    if (wrong)
        die(1, "%s: self-test: %s is off by %.1e of its size in %s at %d rows (limit %.0e): do not "
            "trust this GPU (%s) with this driver", d->name, wrong->name, wrong->error, wrong->at,
            wrong->rows, wrong->limit * SELFTEST_MARGIN, name);
    if (!before) {
        note("%s: self-test passed in %.2f s", d->name, now() - start);
        cache_put("passed", key, name);
        pool_free(pool);
    }
    free(before);
}

// --- what `dsv4 devices` measures (apps/devices.c)

enum { TIMES = 10 };

// Seconds of TIMES products of T rows, or (p NULL) copies between host and dev, to the host if T,
// by the GPU's clock.
static double gpu_time(Device *d, const GpuProducts *p, int T, void *host, CuPtr dev,
                       size_t bytes) {
    CuEvent e[2];
    CuStream s = ((Cuda *)d->impl)->stream;
    float ms = 0;
    for (int i = 0; i < 2; i++) CU(d, EventCreate, &e[i], 0);
    CU(d, EventRecord, e[0], s);
    for (int i = 0; i < TIMES; i++) {
        if (p) gpu_products(d, p, T);
        else if (T) CU(d, MemcpyDtoHAsync, host, dev, bytes, s);
        else CU(d, MemcpyHtoDAsync, dev, host, bytes, s);
    }
    CU(d, EventRecord, e[1], s);
    CU(d, EventSynchronize, e[1]);
    CU(d, EventElapsedTime, &ms, e[0], e[1]);
    for (int i = 0; i < 2; i++) CU(d, EventDestroy, e[i]);
    return ms * 1e-3;
}

double gpu_copy_rate(Device *d, bool to_host) {
    size_t bytes = 64 << 20;
    CuPtr dev = gpu_alloc(d, bytes, "test data");
    void *host = memset(host_pinned(d, bytes), 0, bytes);
    double t = gpu_time(d, NULL, to_host, host, dev, bytes);
    CU(d, MemFreeHost, host);
    CU(d, MemFree, dev);
    return (double)bytes * TIMES / t;
}

double gpu_product_time(Device *d, int bytes, int n, int k, int rows) {
    Mat m = { .n = n, .k = k, .fmt = bytes == 1 ? W_INT8 : W_BF16 };
    size_t weights = row_bytes(&m) * (size_t)n;
    CuPtr w = gpu_alloc(d, weights + weights / 64 + 65536, "test weights");     // and scales
    m.w = (const void *)(uintptr_t)w;
    m.s = (const void *)(uintptr_t)(w + weights);
    GpuAct in = gpu_act(d, TILE, k);
    GpuProducts p = one_product(d, &m, &in, gpu_keep(d, 4 * (size_t)TILE * (size_t)n, "results"));
    double t = gpu_time(d, &p, rows, NULL, 0, 0) / TIMES;
    CU(d, MemFree, w);
    return t;
}

double gpu_hop(Device *a, Device *b, bool *whole) {
    Row row = { 0 };
    size_t n = streams_bytes(a, 1) / 4;
    uint64_t state = 1;
    float *X = xalloc(n, sizeof *X), *Y = xalloc(n, sizeof *Y);
    for (size_t i = 0; i < n; i++) Y[i] = X[i] = random_signed(&state);
    double start = now();
    for (int i = 0; i < 4 * TIMES; i++) {
        Device *d = i % 2 ? b : a;
        d->op->begin(d, &row, 1);
        d->op->streams_in(d, Y);
        memset(Y, 0, n * sizeof *Y);
        d->op->streams_out(d, Y);
    }
    double t = (now() - start) / (2 * TIMES);
    *whole = !memcmp(X, Y, n * sizeof *X);
    free(X), free(Y);
    return t;
}

void gpu_close(Device *d) { cuda_close(d); }
// ---------------------------------------------------------------------------
// command line: one table of options prints --help and checks every value

#define VERSION "0.1"

typedef enum {
    RUN = 1, TOKENIZE = 2, INFO = 4, BENCH = 8, PPL = 16, VERIFY = 32, DEVICES = 64, CONVERT = 128,
    COMPUTES = RUN | BENCH | PPL, LOADS = COMPUTES | INFO, ANY = 255
} Command;

Options opt = { .tokens = -1, .seed = -1, .top_k = -1, .temp = -1, .top_p = -1, .min_p = -1 };

typedef enum { FLAG, WORD, INT, LONG, REAL } OptType;   // bool, const char *, int, int64_t, double

typedef struct {
    const char *name;           // long name
    char letter;
    OptType type;
    int commands;               // where it is allowed
    void *to;
    double lo, hi;              // INT, LONG and REAL: allowed range
    const char *arg, *help;     // arg of a WORD: its choices, if it holds a '|'; help NULL: for tests
} Option;

static const Option options[] = {
    { "model", 'm', WORD, LOADS | TOKENIZE | DEVICES, &opt.open.dir, 0, 0, "DIR",
      "the checkpoint's directory (default: a small built-in model)" },
    { "prompt", 'p', WORD, RUN, &opt.prompt, 0, 0, "TEXT",
      "answer one prompt (without a prompt: chat)" },
    { "file", 'f', WORD, RUN, &opt.file, 0, 0, "FILE", "the prompt is a file's text ('-': stdin)" },
    { "raw", 0, FLAG, RUN, &opt.raw, 0, 0, "", "begin-of-sentence and the text, no chat encoding" },
    { "ids", 0, WORD, RUN, &opt.ids, 0, 0, "0,5,6", "the prompt as token ids; answers in ids" },
    { "show-ids", 0, FLAG, RUN, &opt.show_ids, 0, 0, "", "print the answer as token ids" },
    { "tokens", 'n', INT, RUN | BENCH, &opt.tokens, 0, INT_MAX, "N", "tokens to generate at most" },
    { "ctx", 'c', INT, LOADS, &opt.open.ctx, 1, INT_MAX, "N",
      "context: positions a session can hold" },
    { "seed", 's', LONG, RUN, &opt.seed, 0, 9e15, "N", "seed of the sampler (default: the clock)" },
    { "temp", 0, REAL, RUN, &opt.temp, 0, 1000, "X", "temperature, 0 = greedy" },
    { "top-k", 0, INT, RUN, &opt.top_k, 0, INT_MAX, "N", "only the N likeliest tokens, 0 = all" },
    { "top-p", 0, REAL, RUN, &opt.top_p, 1e-9, 1, "X", "only the likeliest tokens that sum to X" },
    { "min-p", 0, REAL, RUN, &opt.min_p, 0, 1, "X", "only tokens X times as likely as the best" },
    { "system", 0, WORD, RUN, &opt.system, 0, 0, "TEXT", "system message" },
    { "think", 0, FLAG, RUN | TOKENIZE, &opt.think, 0, 0, "", "reason first, on standard error" },
    { "nothink", 0, FLAG, RUN | TOKENIZE, &opt.nothink, 0, 0, "", "answer at once (default)" },
    { "effort", 0, WORD, RUN | TOKENIZE, &opt.effort, 0, 0, "low|high|max",
      "how hard to reason, with --think" },
    { "encoding", 0, WORD, RUN | TOKENIZE, &opt.encoding, 0, 0, "v4|0731",
      "prompt generation (default: by config)" },
    { "devices", 0, WORD, LOADS, &opt.open.devices, 0, 0, "LIST",
      "cuda:0,cuda:1,cpu (default: all GPUs)" },
    { "layers", 0, WORD, LOADS, &opt.open.layers, 0, 0, "LIST", "layers per device, e.g. 22,21" },
    { "threads", 't', INT, COMPUTES | VERIFY | CONVERT, &opt.open.threads, 1, 1024, "N",
      "CPU threads (default: all cores)" },
    { "exact", 0, FLAG, COMPUTES, &opt.open.exact, 0, 0, "", "FP32 everywhere: the slow reference" },
    { "mlock", 0, FLAG, COMPUTES, &opt.open.mlock, 0, 0, "", "keep the weights in memory" },
    { "logits", 0, WORD, RUN, &opt.logits, 0, 0, "FILE", "write the prompt's logits, float32" },
    { "mtp-logits", 0, WORD, RUN, &opt.mtp_logits, 0, 0, "FILE", "the same for the MTP layer" },
    { "plain", 0, FLAG, TOKENIZE, &opt.plain, 0, 0, "", "special tokens in the text are text" },
    { "decode", 0, FLAG, TOKENIZE, &opt.decode, 0, 0, "", "ids -> bytes" },
    { "chat", 0, WORD, TOKENIZE, &opt.chat, 0, 0, "FILE", "a messages file -> its ids" },
    { "layer-remap", 0, WORD, CONVERT, &opt.convert.layer_remap, 0, 0, "LIST",
      "layers to keep, in their new order" },
    { "verify", 0, FLAG, CONVERT, &opt.convert.verify, 0, 0, "",
      "compare the result with the source" },
    { "graphs", 0, FLAG, COMPUTES, &opt.graphs, 0, 0, "", "decode steps as CUDA graphs" },
    { "kernels", 0, WORD, COMPUTES | DEVICES, &opt.kernels, 0, 0, "FILE", "another kernels.cu" },
    { "help", 'h', FLAG, ANY, &opt.help, 0, 0, "", "this text; of one subcommand: its options" },
    { "version", 0, FLAG, ANY, &opt.version, 0, 0, "", "the version" },
    { "chunk", 0, INT, COMPUTES, &opt.open.chunk, 1, 1 << 16, "N", NULL },
    { "isa", 0, WORD, COMPUTES, &opt.isa, 0, 0, "portable|avx2|avx512|avx512-vnni", NULL },
};

typedef struct {
    const char *name;
    Command command;
    const char *args, *help;
    int n_args;
} Subcommand;

static const Subcommand subcommands[] = {
    { "", RUN, "-m DIR [-p TEXT]", "answer one prompt, or chat in the terminal", 0 },
    { "tokenize", TOKENIZE, "-m DIR", "standard input -> token ids", 0 },
    { "info", INFO, "-m DIR", "config, tensors, formats, memory, placement", 0 },
    { "bench", BENCH, "-m DIR", "tokens per second at several depths, GB/s per kernel", 0 },
    { "ppl", PPL, "-m DIR FILE", "perplexity of a text", 1 },
    { "devices", DEVICES, "", "bring-up report: driver, compiler, GPUs, self-test, rates", 0 },
    { "verify", VERIFY, "DIR", "read every byte of a checkpoint and check it", 1 },
    { "convert", CONVERT, "SRC DST", "original release -> dsv4_int", 2 },
};

// Everything, or what concerns one subcommand.
static void print_help(const Subcommand *only) {
    bool all = only->command == RUN;
    if (all) puts("dsv4: DeepSeek-V4-Flash from its published checkpoints\n");
    for (const Subcommand *s = subcommands; s < subcommands + COUNT(subcommands); s++) {
        char line[80];
        if (!all && s != only) continue;
        snprintf(line, sizeof line, "dsv4 %s%s%s", s->name, *s->name ? " " : "", s->args);
        printf("  %-30s %s\n", line, s->help);
    }
    puts("");
    for (const Option *o = options; o < options + COUNT(options); o++) {
        char name[64], letter[8] = "   ";
        if (!o->help || !(all || o->commands & only->command)) continue;
        if (o->letter) snprintf(letter, sizeof letter, "-%c,", o->letter);
        snprintf(name, sizeof name, "%s --%s %s", letter, o->name, o->arg);
        printf("  %-30s %s\n", name, o->help);
    }
    if (!all) return;
    puts("\nDefaults of the sampler: generation_config.json, else temperature 1.\n"
         "Environment: DSV4_NVRTC (path of libnvrtc), DSV4_CACHE (directory of compiled kernels)");
}

// A value of a choice list "a|b|c".
static bool choice_ok(const char *list, const char *value) {
    size_t n = strlen(value);
    for (const char *p = list; p; p = strchr(p, '|') ? strchr(p, '|') + 1 : NULL)
        if (n && !strncmp(p, value, n) && (p[n] == '|' || !p[n])) return true;
    return false;
}

// name: the option as the user wrote it.
static void set_option(const Option *o, const char *name, const char *value) {
    if (o->type == FLAG) {
        *(bool *)o->to = true;
        return;
    }
    if (o->type == WORD) {
        if (strchr(o->arg, '|') && !choice_ok(o->arg, value))
            die(2, "%s: expected %s, found '%s'", name, o->arg, value);
        *(const char **)o->to = value;
        return;
    }
    bool whole = o->type != REAL;
    char *end;
    double x = strtod(value, &end);
    bool number = end != value && !*end && !value[strspn(value, whole ? "-0123456789"
                                                                     : "-+.0123456789e")];
    if (!number || !(x >= o->lo && x <= o->hi))
        die(2, "%s: expected a %snumber from %.10g to %.10g, found '%s'", name,
            whole ? "whole " : "", o->lo, o->hi, value);
    if (o->type == INT) *(int *)o->to = (int)x;
    if (o->type == LONG) *(int64_t *)o->to = (int64_t)x;
    if (o->type == REAL) *(double *)o->to = x;
}

// The option that a word of the command line names; *value: what follows its '=', or NULL.
static const Option *find_option(const char *word, const char **value) {
    const char *eq = strchr(word, '=');
    for (const Option *o = options; o < options + COUNT(options); o++) {
        size_t n = strlen(o->name);
        bool dashes = word[0] == '-' && word[1] == '-';
        bool is_long = dashes && !strncmp(word + 2, o->name, n) &&
                       (!word[2 + n] || word + 2 + n == eq);
        bool is_short = o->letter && word[0] == '-' && word[1] == o->letter && !word[2];
        *value = is_long && eq ? eq + 1 : NULL;
        if (is_long || is_short) return o;
    }
    return NULL;
}

// Fills opt and args (n_args of them); returns what to do.
static const Subcommand *parse_options(int argc, char **argv, char **args) {
    const Subcommand *s = subcommands;
    for (size_t i = 1; i < COUNT(subcommands) && argc > 1; i++)
        if (!strcmp(argv[1], subcommands[i].name)) s = subcommands + i;
    const char *program = *s->name ? s->name : "-m";
    int n = 0;
    for (int i = *s->name ? 2 : 1; i < argc; i++) {
        const char *value = NULL, *name = argv[i];
        bool dash = name[0] == '-' && name[1];
        const Option *o = dash ? find_option(name, &value) : NULL;
        if (dash && !o) die(2, "unknown option %s (dsv4 --help lists them)", name);
        if (!dash && n == s->n_args) die(2, "unexpected argument '%s' (dsv4 --help)", name);
        if (!dash) {
            args[n++] = argv[i];
            continue;
        }
        if (!(o->commands & s->command)) die(2, "%s does not go with dsv4 %s", name, program);
        if (o->type == FLAG && value) die(2, "%s takes no value", name);
        if (o->type != FLAG && !value && ++i < argc) value = argv[i];
        if (o->type != FLAG && !value) die(2, "%s needs a value: %s", name, o->arg);
        set_option(o, name, value);
    }
    if (n < s->n_args && !opt.help && !opt.version)
        die(2, "usage: dsv4 %s %s", program, s->args);
    return s;
}

// Options that exclude or need each other.
static void check_options(void) {
    int prompts = (opt.prompt != NULL) + (opt.file != NULL) + (opt.ids != NULL);
    const struct { bool wrong; const char *text; } rules[] = {
        { prompts > 1, "-p, -f and --ids: only one of them" },
        { opt.think && opt.nothink, "--think and --nothink: only one of them" },
        { opt.raw && !opt.prompt && !opt.file, "--raw needs -p or -f" },
        { (opt.logits || opt.mtp_logits) && !prompts, "--logits and --mtp-logits need a prompt" },
        { opt.effort && !opt.think, "--effort needs --think" },
        { opt.raw && (opt.think || opt.system), "--raw takes no --system and no --think" },
        { opt.decode + opt.plain + (opt.chat != NULL) > 1,
          "--decode, --plain and --chat: only one of them" },
    };
    for (size_t i = 0; i < COUNT(rules); i++) if (rules[i].wrong) die(2, "%s", rules[i].text);
}
// ---------------------------------------------------------------------------
// the model: one forward pass over stages of layers, and sessions that remember what they have read

typedef struct Batch Batch;
struct Batch {                  // one batch on its way through the stages
    Row *rows;                  // [T]
    int T;
    int *want;                  // [n_want] rows whose logits are wanted
    int n_want;
    float *logits;              // [n_want, V]
    float *mtp_logits;          // [n_want, V]
    bool mtp;                   // run the MTP layer too
    float *X;                   // [T, S, D] hand-off between stages
    int stage;                  // done when it is n_stages
    Batch *next;
};

// What a layer asks of a device. The entry after the last layer stands for the head and MTP layers.
typedef struct {
    size_t weights, context;    // bytes; context: the caches of one session
    double touched;             // bytes of weights that one token reads, so its share of the time
} Share;

enum { MAX_SLOTS = COUNT(((Device *)0)->cache), MAX_STAGES = 64 };

struct Model {
    Config c;
    Store store;
    Weights w;
    int format[N_FORMATS];      // matrices of each format
    Share *share;               // [n_layers + 1]
    size_t buffers[2];          // bytes of a GPU's buffers without and with the head
    Device *stage;              // [n_stages]
    int n_stages;
    bool exact;
    int ctx, chunk, reach;      // reach: how far back a session can be rewound
    bool slot_used[MAX_SLOTS];
    Batch flight[MAX_STAGES + 1];       // [n_flight] chunks of a prompt on their way
    int n_flight;
    pthread_mutex_t lock;       // guards the queues
    pthread_cond_t moved;       // a batch changed its stage
    Batch *queue[MAX_STAGES];   // first in, first out
};

static int argmax(const float *x, int n) {
    int best = 0;
    for (int i = 1; i < n; i++) if (x[i] > x[best]) best = i;
    return best;
}

// Hyper-connections around attention, then around the experts (spec 2). i: the cache of this stage.
static void forward_layer(Device *d, const Layer *l, int i) {
    const Ops *op = d->op;
    op->hc_pre(d, &l->hc_attn, l->attn_norm);
    d->at = l->name;            // only now: hc_pre checks what the layer before has left
    op->attn_project(d, l);
    op->attn_latent(d, l, i);
    op->attn_query(d, l);
    if (l->ratio == 4) op->index_topk(d, l, i);
    op->attend(d, l, i);
    op->attn_out(d, l);
    op->hc_post(d);
    op->hc_pre(d, &l->hc_ffn, l->ffn_norm);
    op->route(d, l);
    op->experts(d, l);
    op->hc_post(d);
}

static void check_logits(const float *logits, int n, int vocab) {
    for (size_t i = 0; i < (size_t)n * vocab; i++)
        if (!isfinite(logits[i]))
            die(1, "head: the logit of token %d is not finite (run `dsv4 verify` on the "
                "checkpoint)", (int)(i % vocab));
}

// The draft layer after the last main layer: row t sees the token at t + 1 and predicts the one at
// t + 2.
static void forward_mtp(Device *d, Batch *j) {
    const Mtp *m = d->w.mtp;
    int V = d->c->vocab;
    Row *rows = xalloc((size_t)j->T, sizeof *rows);
    memcpy(rows, j->rows, (size_t)j->T * sizeof *rows);
    for (int i = 0; i < j->n_want; i++)
        if (rows[j->want[i]].next < 0) rows[j->want[i]].next = argmax(j->logits + (size_t)i * V, V);
    d->op->begin(d, rows, j->T);
    d->op->mtp_in(d, m);
    d->at = "mtp.0.e_proj and h_proj";
    forward_layer(d, &m->block, d->last - d->first);
    d->op->head(d, &m->hc_head, m->norm, j->want, j->n_want, j->mtp_logits);
    check_logits(j->mtp_logits, j->n_want, V);
    free(rows);
}

static void forward_stage(Device *d, Batch *j) {
    d->op->begin(d, j->rows, j->T);
    d->at = d->first ? "the stage before" : "embed";
    if (d->first == 0) d->op->embed(d);
    else d->op->streams_in(d, j->X);
    for (int i = d->first; i < d->last; i++) forward_layer(d, &d->w.layers[i], i - d->first);
    if (!d->has_head) {
        d->op->streams_out(d, j->X);
        return;
    }
    if (j->n_want) d->op->head(d, &d->w.hc_head, d->w.norm, j->want, j->n_want, j->logits);
    if (j->n_want) check_logits(j->logits, j->n_want, d->c->vocab);
    if (j->mtp) forward_mtp(d, j);
}

// --- stages as threads: batches follow each other, so all devices work at once

typedef struct { Model *m; int stage; } StageArg;

static void queue_add(Batch **queue, Batch *j) {
    while (*queue) queue = &(*queue)->next;
    j->next = NULL;
    *queue = j;
}

__attribute__((noreturn)) static void *stage_main(void *arg) {
    StageArg a = *(StageArg *)arg;
    Model *m = a.m;
    free(arg);
    pthread_mutex_lock(&m->lock);
    for (;;) {
        while (!m->queue[a.stage]) pthread_cond_wait(&m->moved, &m->lock);
        Batch *j = m->queue[a.stage];
        m->queue[a.stage] = j->next;
        pthread_mutex_unlock(&m->lock);
        forward_stage(&m->stage[a.stage], j);
        pthread_mutex_lock(&m->lock);
        j->stage++;
        if (j->stage < m->n_stages) queue_add(&m->queue[j->stage], j);
        pthread_cond_broadcast(&m->moved);
    }
}

static void start_stages(Model *m) {
    pthread_mutex_init(&m->lock, NULL);
    pthread_cond_init(&m->moved, NULL);
    for (int i = 0; m->n_stages > 1 && i < m->n_stages; i++) {
        StageArg *a = xalloc(1, sizeof *a);
        *a = (StageArg){ m, i };
        pthread_t thread;
        if (pthread_create(&thread, NULL, stage_main, a)) die(1, "cannot start a thread");
        pthread_detach(thread);
    }
}

// Hands a batch to the first stage; one stage computes it here and now. Batches are finished in
// order.
static void forward_begin(Model *m, Batch *j) {
    j->stage = 0;
    if (m->n_stages == 1) {
        forward_stage(m->stage, j);
        j->stage = 1;
        return;
    }
    pthread_mutex_lock(&m->lock);
    queue_add(&m->queue[0], j);
    pthread_cond_broadcast(&m->moved);
    pthread_mutex_unlock(&m->lock);
}

static void forward_end(Model *m, Batch *j) {
    pthread_mutex_lock(&m->lock);
    while (j->stage < m->n_stages) pthread_cond_wait(&m->moved, &m->lock);
    pthread_mutex_unlock(&m->lock);
}

// --- sessions: a token list and the caches that stand for it

// The rings at one position of a session. The compressed rows stay in the caches: they are only
// ever appended.
struct Snapshot {
    int pos;
    void *rings[MAX_STAGES];    // per stage
};

volatile sig_atomic_t interrupted, terminated, computing;

Session *session_new(Model *m) {
    int slot = 0;
    while (slot < MAX_SLOTS && m->slot_used[slot]) slot++;
    if (slot == MAX_SLOTS) return NULL;
    Session *s = xalloc(1, sizeof *s);
    *s = (Session){ .m = m, .slot = slot, .tokens = reserve((size_t)m->ctx * sizeof *s->tokens) };
    m->slot_used[slot] = true;
    for (int i = 0; i < m->n_stages; i++) m->stage[i].op->cache_new(&m->stage[i], slot);
    return s;
}

void session_free(Session *s) {
    if (!s) return;
    for (int i = 0; i < s->m->n_stages; i++)
        s->m->stage[i].op->cache_free(&s->m->stage[i], s->slot);
    s->m->slot_used[s->slot] = false;
    munmap(s->tokens, (size_t)s->m->ctx * sizeof *s->tokens);
    free(s);
}

// Forgets everything after the first n tokens. False if the rings no longer hold that point.
static bool session_rewind(Session *s, int n) {
    if (n < s->kept || n > s->n) return n == s->n;
    s->n = n;
    return true;
}

void session_clear(Session *s) { s->n = s->kept = 0; }

Snapshot *session_snapshot(const Session *s) {
    Snapshot *p = xalloc(1, sizeof *p);
    p->pos = s->n;
    for (int i = 0; i < s->m->n_stages; i++) {
        Device *d = &s->m->stage[i];
        p->rings[i] = xalloc(d->op->cache_save(d, s->slot, s->n, NULL), 1);
        d->op->cache_save(d, s->slot, s->n, p->rings[i]);
    }
    return p;
}

// Back to the snapshot's position. Its tokens must still be the session's first ones.
static void session_restore(Session *s, const Snapshot *p) {
    for (int i = 0; i < s->m->n_stages; i++)
        s->m->stage[i].op->cache_load(&s->m->stage[i], s->slot, p->pos, p->rings[i]);
    s->n = s->kept = p->pos;
}

void snapshot_free(Snapshot *p) {
    for (int i = 0; p && i < MAX_STAGES; i++) free(p->rings[i]);
    free(p);
}

// Rows [from, to) of a cache, from > 0, each made of the halves of two of the rows before `from`.
static void rows_invent(void *rows, size_t bytes, size_t from, size_t to) {
    uint8_t *p = rows;
    size_t half = bytes / 2;
    for (size_t i = from; p && i < to; i++) {
        memcpy(p + i * bytes, p + i * 40503 % from * bytes, half);
        memcpy(p + i * bytes + half, p + i / from % from * bytes + half, bytes - half);
    }
}

void session_stretch(Session *s, int to) {
    Snapshot *rings = session_snapshot(s);
    for (int k = 0; k < s->m->n_stages; k++) {
        Device *d = &s->m->stage[k];
        for (int i = 0; i < stage_caches(d); i++) {
            Cache *c = d->cache[s->slot] + i;
            int M = stage_layer(d, i)->ratio;
            if (!M || s->n < M) continue;
            size_t have = (size_t)(s->n / M), want = (size_t)(to / M);
            rows_invent(c->comp, kv_bytes(d, d->c->head_dim), have, want);
            rows_invent(c->ikeys, kv_bytes(d, d->c->index_dim), have, want);
        }
    }
    rings->pos = to;
    session_restore(s, rings);
    snapshot_free(rings);
}

// Brings the session as far into tokens [n] as what it has read allows, by rewinding or with a
// snapshot of it (or NULL); at least the last token stays to be read. Returns how many are in place.
int session_reuse(Session *s, const int *tokens, int n, const Snapshot *snap) {
    int same = 0;
    while (same < n - 1 && same < s->n && tokens[same] == s->tokens[same]) same++;
    if (session_rewind(s, same)) return same;
    if (snap && snap->pos <= same) session_restore(s, snap);
    else session_clear(s);
    return s->n;
}

// The next n of the `left` tokens, from position pos on; `all`: every row's logits are wanted.
static void batch_fill(Batch *b, int slot, int pos, const int *tokens, int n, int left, bool all) {
    b->T = n;
    b->n_want = all ? n : n == left;
    for (int i = 0; i < n; i++)
        b->rows[i] = (Row){ tokens[i], slot, pos + i, i + 1 < left ? tokens[i + 1] : -1 };
    for (int i = 0; i < b->n_want; i++) b->want[i] = n - b->n_want + i;
}

int session_feed(Session *s, const int *tokens, int n, const Feed *f) {
    Model *m = s->m;
    int begun = 0, done = 0, head = 0, tail = 0;
    if (n > m->ctx - s->n) n = m->ctx - s->n;
    while (done < n && !(interrupted && begun == done)) {
        while (begun < n && head - tail < m->n_flight && !interrupted) {
            Batch *b = &m->flight[head++ % m->n_flight];
            int left = n - begun, T = left < m->chunk ? left : m->chunk;
            batch_fill(b, s->slot, s->n + begun, tokens + begun, T, left, f->sink);
            b->mtp = f->mtp;
            forward_begin(m, b);
            begun += T;
        }
        if (head == tail) break;
        Batch *b = &m->flight[tail++ % m->n_flight];
        forward_end(m, b);
        if (f->sink) f->sink(f->arg, s->n + done, b->T, b->logits, f->mtp ? b->mtp_logits : NULL);
        if (b->n_want) s->logits = b->logits + (size_t)(b->n_want - 1) * m->c.vocab;
        done += b->T;
        if (f->progress) progress("reading the prompt", done, n);
    }
    memcpy(s->tokens + s->n, tokens, (size_t)done * sizeof *tokens);
    s->n += done;
    s->kept = s->n - m->reach > s->kept ? s->n - m->reach : s->kept;
    return done;
}

// Memory for the chunks of a prompt; pages are taken as they are touched.
static void model_buffers(Model *m) {
    size_t T = (size_t)m->chunk, logits = T * (size_t)m->c.vocab * sizeof(float);
    m->n_flight = m->n_stages > 1 ? m->n_stages + 1 : 1;
    for (Batch *b = m->flight; b < m->flight + m->n_flight; b++) {
        b->rows = xalloc(T, sizeof *b->rows);
        b->want = xalloc(T, sizeof *b->want);
        b->logits = reserve(logits);
        if (m->w.mtp) b->mtp_logits = reserve(logits);
        if (m->n_stages > 1) b->X = reserve(T * m->c.hc_mult * m->c.dim * sizeof(float));
    }
}

// --- opening a model

// Reads config.json, opens the shards and binds every tensor. Nothing is read from the weights but
// small vectors.
static bool model_bind(Model *m, const char *dir, Err *e) {
    Binder b = { .store = &m->store, .c = &m->c, .e = e };
    if (!config_open(&m->c, dir, e) || !store_open(&m->store, dir, e) || !weights_bind(&m->w, &b))
        return false;
    memcpy(m->format, b.format, sizeof m->format);
    if (m->c.dspark) note("this release's mtp.* tensors (DSpark) are skipped");
    else if ((size_t)b.bound < m->store.n)
        note("%zu tensors of the checkpoint are not used", m->store.n - (size_t)b.bound);
    return true;
}

bool model_check(const char *dir, Err *e) {
    static Model m;
    return model_bind(&m, dir, e);
}

static size_t physical_memory(void) {
    return (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
}

// All of a stage but its device and its layers.
static void stage_init(const Model *m, Device *d) {
    const Config *c = &m->c;
    d->c = c;
    d->w = m->w;
    d->exact = m->exact;
    d->max_rows = m->chunk;
    d->ctx = m->ctx;
    d->ring = c->window + m->reach;
    d->cring[4] = 2 * 4 + m->reach;
    d->cring[128] = 128 + m->reach;
}

// Bytes of one session's caches of a layer at its full context.
static size_t context_bytes(const Device *d, const Layer *l) {
    size_t n = 0, size[5];
    cache_sizes(d, l, size);
    for (int j = 0; j < 5; j++) n += size[j];
    return n;
}

// Sets the context, and what every layer takes with it.
static void set_context(Model *m, int ctx, int chunk) {
    const Config *c = &m->c;
    int L = c->n_layers;
    Device d = { 0 };
    m->ctx = ctx;
    m->chunk = chunk && chunk < ctx ? chunk : ctx < 512 ? ctx : 512;
    m->reach = m->chunk + 64;
    stage_init(m, &d);
    for (int i = 0; i < L; i++) {
        const Layer *l = &m->w.layers[i];
        size_t table = l->tid2eid ? 8 * (size_t)c->vocab * c->n_active : 0;
        double experts = (double)l->expert_bytes * c->n_active / c->n_experts;
        m->share[i] = (Share){ l->bytes, context_bytes(&d, l),
                               (double)(l->bytes - l->expert_bytes - table) + experts };
    }
    size_t head = mat_bytes(&m->w.head);
    m->share[L] = (Share){ head, 0, (double)head };
    for (int i = 0; m->w.mtp && i < c->n_mtp; i++) {
        m->share[L].weights += m->w.mtp[i].block.bytes;
        m->share[L].context += context_bytes(&d, &m->w.mtp[i].block);
    }
    for (int i = 0; i < 2; i++) {
        d.has_head = i;
        m->buffers[i] = cuda_buffer_bytes(&d);
    }
}

// What layers [first, end) take together.
static Share share_of(const Model *m, int first, int end) {
    Share sum = { 0 };
    for (const Share *s = m->share + first; s < m->share + end; s++) {
        sum.weights += s->weights;
        sum.context += s->context;
        sum.touched += s->touched;
    }
    return sum;
}

static Share stage_share(const Model *m, const Device *d) {
    return share_of(m, d->first, d->last + d->has_head);
}

// The context a session gets: as asked, else the least of what the model can, 131072 and what half
// the memory holds.
static void choose_context(Model *m, const Opening *o) {
    int most = m->c.max_ctx;
    if (o->ctx > most) die(2, "-c %d: this model reads at most %d positions", o->ctx, most);
    set_context(m, o->ctx ? o->ctx : most < 131072 ? most : 131072, o->chunk);
    while (!o->ctx && m->ctx > 4096 &&
           share_of(m, 0, m->c.n_layers + 1).context > physical_memory() / 2)
        set_context(m, m->ctx / 2, o->chunk);
}

// --- placement: runs of layers on devices

// ordinal: of the GPU, -1: the CPU.
static void add_stage(Model *m, int ordinal) {
    if (m->n_stages == MAX_STAGES) die(2, "--devices: at most %d", MAX_STAGES);
    Device *d = &m->stage[m->n_stages++];
    d->ordinal = ordinal;
    snprintf(d->name, sizeof d->name, ordinal < 0 ? "cpu" : "cuda:%d", ordinal);
}

// "cuda:0,cuda:1,cpu", or NULL: every GPU there is, else the CPU.
static void parse_devices(Model *m, const char *list) {
    int gpus = list || m->exact ? 0 : cuda_count();
    for (int i = 0; i < gpus && i < MAX_STAGES; i++) add_stage(m, i);
    if (!list && !gpus) add_stage(m, -1);
    for (const char *p = list; p; p = *p ? p + 1 : NULL) {
        int len = (int)strcspn(p, ","), ordinal = -1, used = 0;
        bool cuda = sscanf(p, "cuda:%3d%n", &ordinal, &used) == 1 && used == len && ordinal >= 0;
        bool cpu = len == 3 && !strncmp(p, "cpu", 3);
        if (!cuda && !cpu) die(2, "--devices: expected cpu or cuda:N, found '%.*s'", len, p);
        if (cuda && m->exact) die(2, "--exact runs on the cpu only, not on cuda:%d", ordinal);
        add_stage(m, cpu ? -1 : ordinal);
        p += len;
    }
}

// "22,21": one count per stage, all layers together.
static void parse_layers(Model *m, const char *list) {
    int i = 0, at = 0, L = m->c.n_layers;
    char *end = (char *)list;
    for (const char *p = list; i < m->n_stages; p = end + 1) {
        long x = strtol(p, &end, 10);
        if (end == p || x < 0 || x > L - at) break;
        m->stage[i].first = at;
        m->stage[i++].last = at += (int)x;
        if (*end != ',') break;
    }
    if (i != m->n_stages || *end || at != L)
        die(2, "--layers: expected %d counts with the sum %d, found '%s'", m->n_stages, L, list);
    m->stage[i - 1].has_head = true;
}

// Gives the GPUs, in their order, as many layers as memory [n_stages] allows (0: it is a CPU) while
// no stage's tokens take longer than `limit` says. Returns how many layers found no place, the head
// counted as one more.
static int fill_gpus(Model *m, const size_t *memory, double limit) {
    int at = 0, L = m->c.n_layers;
    size_t embed = mat_bytes(&m->w.embed), driver = (size_t)256 << 20;   // and what alignment loses
    for (int i = 0; i < m->n_stages; i++) {
        Device *d = &m->stage[i];
        d->first = d->last = at;
        d->has_head = false;
        for (; memory[i] && at <= L; at++) {
            bool head = at == L;
            Share s = share_of(m, d->first, at + 1);
            size_t bytes = s.weights + s.context + m->buffers[head] + driver;
            if (!d->first || (head && m->w.mtp)) bytes += embed;
            if (s.touched > limit || bytes > memory[i]) break;
            d->last += !head;
            d->has_head = head;
        }
    }
    return L + 1 - at;
}

// Free bytes of each stage's GPU, 0 for a CPU. Returns their sum.
static size_t gpu_memory(const Model *m, size_t *memory) {
    size_t sum = 0;
    Err e;
    for (int i = 0; i < m->n_stages; i++) {
        const Device *d = &m->stage[i];
        memory[i] = 0;
        if (d->ordinal < 0) continue;
        if (!cuda_open(&e)) die(1, "%s: %s", d->name, e.text);
        memory[i] = cuda_memory(d->ordinal);
        if (!memory[i]) die(1, "%s: there are %d GPUs here", d->name, cuda_count());
        sum += memory[i];
    }
    return sum;
}

// The CPUs share the `rest` that the GPUs leave (the last of it is the head). Stages with nothing
// to do go.
static void share_rest(Model *m, int rest) {
    int n = m->n_stages, cpus = 0, k = 0, at = 0;
    for (int i = 0; i < n; i++) cpus += m->stage[i].ordinal < 0;
    m->n_stages = 0;
    for (int i = 0; i < n; i++) {
        Device d = m->stage[i];
        int layers = d.last - d.first;
        if (rest && d.ordinal < 0) {
            layers = (rest - 1) * (k + 1) / cpus - (rest - 1) * k / cpus;
            k++;
        }
        if (rest) d.has_head = i == n - 1;
        d.first = at;
        d.last = at += layers;
        if (layers || d.has_head) m->stage[m->n_stages++] = d;
    }
}

// GPUs alone: the slowest stage as fast as memory allows, with a shorter context if none was asked
// for. Else the GPUs are filled and CPUs take the rest.
static void choose_layers(Model *m, const Opening *o) {
    int L = m->c.n_layers, cpus = 0, ctx = m->ctx;
    size_t memory[MAX_STAGES], all = gpu_memory(m, memory);
    double lo = 0, hi = 1e15;
    for (int i = 0; i < m->n_stages; i++) cpus += m->stage[i].ordinal < 0;
    int rest = fill_gpus(m, memory, hi);
    while (rest && !cpus && !o->ctx && m->ctx > 4096) {
        set_context(m, m->ctx / 2, o->chunk);
        rest = fill_gpus(m, memory, hi);
    }
    if (rest && ctx != m->ctx) {            // that was no help
        set_context(m, ctx, o->chunk);
        rest = fill_gpus(m, memory, hi);
    }
    if (rest && !cpus && o->devices)
        die(1, "the GPUs' %.1f GB hold %d of %d layers at %d positions: add cpu to --devices, or "
            "try a smaller -c", (double)all / 1e9, L + 1 - rest, L, m->ctx);
    if (rest && !cpus) add_stage(m, -1);
    int last = m->n_stages - 1;
    if (rest && m->stage[last].ordinal >= 0) {      // it gets the head, whatever else
        size_t head = m->share[L].weights + m->share[L].context + m->buffers[1] - m->buffers[0];
        if (m->w.mtp) head += mat_bytes(&m->w.embed);
        memory[last] -= head < memory[last] ? head : memory[last];
        rest = fill_gpus(m, memory, hi);
    }
    for (int step = 0; !rest && step < 50; step++) {
        double mid = (lo + hi) / 2;
        *(fill_gpus(m, memory, mid) ? &lo : &hi) = mid;
    }
    if (!rest) fill_gpus(m, memory, hi);
    share_rest(m, rest);
}

static void print_plan(const Model *m, FILE *to) {
    for (const Device *d = m->stage; d < m->stage + m->n_stages; d++) {
        Share s = stage_share(m, d);
        char layers[64] = "no layers";
        if (d->first < d->last)
            snprintf(layers, sizeof layers, "layers %d to %d", d->first, d->last - 1);
        fprintf(to, "# %s: %s%s, %.2f GB of weights, %.2f GB of context at %d positions\n", d->name,
                layers, d->has_head ? " and the head" : "", (double)s.weights / 1e9,
                (double)s.context / 1e9, m->ctx);
    }
}

// --- bringing the weights into memory

typedef struct { Span map; bool lock; } Loading;
enum { PIECE = 4 << 20 };

// Items: pieces of a shard. A page that cannot be read is found when it is used.
static void load_pieces(void *arg, int begin, int end) {
    const Loading *o = arg;
    size_t at = (size_t)begin * PIECE, to = (size_t)end * PIECE;
    size_t n = (to < o->map.n ? to : o->map.n) - at;
    char *p = (char *)(uintptr_t)o->map.p + at;
    madvise(p, n, MADV_WILLNEED);
    madvise(p, n, MADV_POPULATE_READ);      // Linux 5.14; before it the first use waits for pages
    if (o->lock && mlock(p, n))
        die(1, "--mlock: %s (ulimit -l allows too little)", strerror(errno));
}

// Reads the files with all threads, in their order, so that the first token does not wait for the
// disk page by page.
static void load_weights(const Store *s, Pool *pool, bool lock) {
    double start = now();
    size_t done = 0, all = store_bytes(s);
    for (int i = 0; i < s->n_shards; i++) {
        Loading o = { s->shards[i].map, lock };
        madvise((void *)(uintptr_t)o.map.p, o.map.n, MADV_HUGEPAGE);
        parallel(pool, (int)((o.map.n + PIECE - 1) / PIECE), 1, load_pieces, &o);
        progress("loading", (int64_t)(done += s->shards[i].map.n), (int64_t)all);
    }
    if (now() - start > 1) note("loaded %.1f GB in %.1f s", (double)all / 1e9, now() - start);
}

// Opens a checkpoint: config, tensors, and where the layers go. Errors end the process.
Model *model_read(const Opening *o) {
    Model *m = xalloc(1, sizeof *m);
    Err e;
    if (!model_bind(m, o->dir, &e)) die(1, "%s", e.text);
    m->exact = o->exact;
    m->share = xalloc((size_t)m->c.n_layers + 1, sizeof *m->share);
    m->stage = xalloc(MAX_STAGES, sizeof *m->stage);
    choose_context(m, o);
    parse_devices(m, o->devices);
    if (o->layers) parse_layers(m, o->layers);
    else choose_layers(m, o);
    for (Device *d = m->stage; d < m->stage + m->n_stages; d++) {
        stage_init(m, d);
        for (int i = 0; i < 2; i++) d->inv_freq[i] = rope_frequencies(&m->c, i);
    }
    return m;
}

// Brings the weights to their devices, so that sessions can run.
void model_start(Model *m, const Opening *o) {
    Err e;
    int cpus = 0;
    size_t weights = 0, memory = physical_memory();
    print_plan(m, stderr);
    for (int i = 0; i < m->c.n_layers; i++)
        if (!check_table(&m->c, m->w.layers + i, &e)) die(1, "%s", e.text);
    for (const Device *d = m->stage; d < m->stage + m->n_stages; d++) {
        if (d->ordinal >= 0) continue;
        cpus++;
        weights += stage_share(m, d).weights;
    }
    bool fits = weights < memory - memory / 16;
    if (!fits)
        note("the CPU's weights (%.1f GB) do not fit in this machine's memory (%.1f GB): running "
             "from the disk, slowly", (double)weights / 1e9, (double)memory / 1e9);
    Pool *all = pool_new(o->threads);
    if (cpus == m->n_stages && (fits || o->mlock)) load_weights(&m->store, all, o->mlock);
    int threads = cpus > 1 ? (all->n_threads + cpus - 1) / cpus : all->n_threads;
    pool_free(all);
    for (Device *d = m->stage; d < m->stage + m->n_stages; d++) {
        if (d->ordinal >= 0) cuda_device(d, d->ordinal);
        else cpu_device(d, pool_new(threads));
        if (d->ordinal >= 0) cuda_selftest(d, &m->w);
    }
    model_buffers(m);
    start_stages(m);
}
// --- the text side of a checkpoint

// The checkpoint's tokenizer. NULL if it has none and none is needed.
Tokenizer *tokenizer_open(const char *dir, bool needed) {
    Err e;
    Span text;
    char *path = path_join(dir, "tokenizer.json");
    Tokenizer *t = NULL;
    if (file_exists(path)) {
        t = xalloc(1, sizeof *t);
        if (!map_file(path, &text, &e) || !tok_load(t, text, path, &e)) die(1, "%s", e.text);
        unmap_file(text);
    } else if (needed) {
        die(1, "%s: no tokenizer here; token ids can still be given with --ids", path);
    }
    free(path);
    return t;
}

void tokenizer_close(Tokenizer *t) {
    if (t) tok_free(t);
    free(t);
}

Control tokenizer_control(const Tokenizer *t) {
    return (Control){ t->n, t->bos, t->eos, t->user, t->assistant, t->think, t->end_think };
}

// Options, else the publisher's generation_config.json, else temperature 1 and the config's
// end-of-sentence token.
Sampler *sampler_open(const Model *m, const char *dir, Ids *eos) {
    Err e;
    Span text;
    Sampling how = sampling_default;
    char *path = path_join(dir, "generation_config.json");
    if (file_exists(path)) {
        if (!map_file(path, &text, &e) ||
            !read_generation_config(text, path, m->c.vocab, &how, eos, &e))
            die(1, "%s", e.text);
        unmap_file(text);
    }
    free(path);
    if (!eos->n && m->c.eos >= 0) ids_add(eos, m->c.eos);
    if (opt.temp >= 0) how.temperature = opt.temp;
    if (opt.top_k >= 0) how.top_k = opt.top_k;
    if (opt.top_p >= 0) how.top_p = opt.top_p;
    if (opt.min_p >= 0) how.min_p = opt.min_p;
    if (opt.seed < 0) opt.seed = (int64_t)time(NULL);
    Sampler *s = xalloc(1, sizeof *s);
    sampler_init(s, m->c.vocab, how, (uint64_t)opt.seed);
    if (how.temperature > 0)
        note("seed %lld, temperature %g, top-p %g", (long long)opt.seed, how.temperature,
             how.top_p);
    return s;
}

void sampler_close(Sampler *s) {
    sampler_free(s);
    free(s);
}
// ---------------------------------------------------------------------------
// what a model is like: dsv4 info, and the rates of its products for dsv4 bench

static const char *const format_names[N_FORMATS] = {
    "F32", "BF16", "INT8 128x128", "INT4 group 32", "FP8 e4m3 128x128", "FP4 e2m1 group 32"
};

// Bytes of compressed rows that one token adds, over all layers.
static double bytes_per_token(const Model *m) {
    double n = 0;
    for (int i = 0; i < m->c.n_layers; i++) {
        int M = m->w.layers[i].ratio;
        if (M) n += (double)kv_bytes(m->stage, m->c.head_dim) / M;
        if (M == 4) n += (double)kv_bytes(m->stage, m->c.index_dim) / M;
    }
    return n;
}

// Bytes of weights that decoding one token reads: all but the experts that are not chosen, and one
// row of the embedding.
static double bytes_touched(const Model *m) {
    return share_of(m, 0, m->c.n_layers + 1).touched +
           (double)mat_bytes(&m->w.embed) / m->c.vocab + (double)mat_bytes(&m->w.hc_head.fn);
}

static void print_layer(const Layer *l) {
    printf("  %-9s ratio %-3d  %-6s  %9.2f MB  experts %s, attention %s\n", l->name, l->ratio,
           l->tid2eid ? "hashed" : "scored", (double)l->bytes / 1e6, format_names[l->w1[0].fmt],
           format_names[l->wq_b.fmt]);
}

static int run_info(void) {
    Model *m = model_read(&opt.open);
    const Config *c = &m->c;
    double per_token = bytes_per_token(m);
    printf("model      %d layers, dim %d, %d heads x %d (rope %d), window %d, vocabulary %d, "
           "context %d\n", c->n_layers, c->dim, c->n_heads, c->head_dim, c->rope_dim, c->window,
           c->vocab, c->max_ctx);
    printf("experts    %d, %d per token, hidden %d; the first %d layers choose by token\n",
           c->n_experts, c->n_active, c->expert_dim, c->n_hash_layers);
    printf("indexer    %d heads x %d, keeps %d rows; hyper-connections: %d streams\n",
           c->index_heads, c->index_dim, c->index_topk, c->hc_mult);
    printf("checkpoint %zu tensors in %d files, %.2f GB, quant_method %s\n", m->store.n,
           m->store.n_shards, (double)store_bytes(&m->store) / 1e9, *c->quant ? c->quant : "none");
    for (int i = 0; i < N_FORMATS; i++)
        if (m->format[i]) printf("  %-18s %6d matrices\n", format_names[i], m->format[i]);
    for (int i = 0; i < c->n_layers; i++) print_layer(&m->w.layers[i]);
    for (int i = 0; m->w.mtp && i < c->n_mtp; i++) print_layer(&m->w.mtp[i].block);
    printf("memory     %.3f GB of weights read per token; context: %.0f bytes per token (%.2f MB "
           "per 1024), %.1f MB of rings per session\n", bytes_touched(m) / 1e9, per_token,
           per_token * 1024 / 1e6, ((double)share_of(m, 0, c->n_layers + 1).context -
                                    per_token * m->ctx) / 1e6);
    print_plan(m, stdout);
    return 0;
}

// --- dsv4 devices (apps/devices.c)

Model *gpu_model(const char *dir) {
    enum { ROWS = 72, CTX = 4096 };
    Model *m = xalloc(1, sizeof *m);
    Err e;
    if (!model_bind(m, dir, &e)) die(1, "%s", e.text);
    m->share = xalloc((size_t)m->c.n_layers + 1, sizeof *m->share);
    set_context(m, m->c.max_ctx < CTX ? m->c.max_ctx : CTX, ROWS);
    return m;
}

Device *gpu_open(const Model *m, int ordinal) {
    enum { LAYERS = 5 };            // of the real model: one of each kind
    Device *d = xalloc(1, sizeof *d);
    stage_init(m, d);
    d->last = m->c.n_layers < LAYERS ? m->c.n_layers : LAYERS;
    d->has_head = true;
    d->ordinal = ordinal;
    for (int i = 0; i < 2; i++) d->inv_freq[i] = rope_frequencies(&m->c, i);
    snprintf(d->name, sizeof d->name, "cuda:%d", ordinal);
    cuda_device(d, ordinal);
    return d;
}

int gpu_check(const Model *m, Device *d, GpuCheck **list) {
    static const int batch[] = { 1, 5, 70 };        // rows: a kernel variant each
    Pool *pool = pool_new(0);
    *list = xalloc(N_CHECKS, sizeof **list);
    for (size_t i = 0; i < COUNT(batch); i++)
        cuda_parity(d, &m->w, pool, batch[i], selftest_pos(d, batch[i]), 1, *list);
    pool_free(pool);
    return N_CHECKS;
}

char *gpu_kernels(const Model *m, int cc) {
    Formats f = model_formats(&m->w, &m->c);
    Str flags = { 0 };
    char *path;
    const char *from;
    kernel_options(&m->c, &f, cc, &flags);
    free(kernel_ptx(str_span(&flags), &from, &path));
    free(flags.p);
    return path;
}

ModelBrief model_brief(const Model *m) {
    const Config *c = &m->c;
    ModelBrief b = { .vocab = c->vocab, .ctx = m->ctx, .max_ctx = c->max_ctx, .dspark = c->dspark,
                     .mtp = m->w.mtp, .touched = bytes_touched(m), .cpu = true };
    for (int i = 0; i < m->n_stages; i++) b.cpu &= m->stage[i].ordinal < 0;
    return b;
}

// GB/s of matrices of one kind at one row, `together` side by side. All layers' in turn, so that
// caches do not help.
static void bench_product(Model *m, Pool *pool, const char *name, const Mat **mats, int n,
                          int together, double bandwidth) {
    double bytes = 0, best = 1e30;
    const Device *d = m->stage;
    Act a = act_new(d, 1, mats[0]->k, 1);
    float *y = xalloc((size_t)together * mats[0]->n, sizeof *y);
    Product *p = xalloc((size_t)together, sizeof *p);
    for (int i = 0; i < n; i++) bytes += (double)mat_bytes(mats[i]);
    act_quantise(d, &a, 0);
    for (int pass = 0; pass < 4; pass++) {
        double start = now();
        for (int i = 0; i + together <= n; i += together) {
            for (int j = 0; j < together; j++)
                p[j] = (Product){ mats[i + j], &a, NULL, 1, y + (size_t)j * mats[0]->n,
                                  (size_t)mats[0]->n };
            matmul(pool, p, together, d->exact);
        }
        if (pass) best = fmin(best, now() - start);
    }
    printf("  %-30s %-18s %6d x %-6d %8.1f GB/s  %3.0f %%\n", name, format_names[mats[0]->fmt],
           mats[0]->n, mats[0]->k, bytes / best / 1e9, 100 * bytes / best / bandwidth);
    free(a.x), free(a.q), free(a.s), free(y), free(p);
}

void bench_products(Model *m, Pool *pool, double bandwidth) {
    const Config *c = &m->c;
    const Mat **list = xalloc((size_t)c->n_layers * c->n_experts + 1, sizeof *list);
    printf("cpu %s, %d threads, read bandwidth %.1f GB/s\nproducts of one row%19sformat%13srows x "
           "columns%8srate  of read bandwidth\n", cpu_names[cpu_level], pool->n_threads,
           bandwidth / 1e9, "", "", "");
    for (const Bind *b = layer_table; b < layer_table + COUNT(layer_table); b++) {
        int n = 0;
        for (int i = 0; i < c->n_layers && b->kind == MAT; i++) {
            const Mat *w = (const Mat *)((const char *)&m->w.layers[i] + b->at);
            if (w->w && (!n || (w->n == list[0]->n && w->fmt == list[0]->fmt))) list[n++] = w;
        }
        if (n) bench_product(m, pool, b->name, list, n, 1, bandwidth);
    }
    for (int k = 1; k <= 2; k++) {
        int n = 0;
        for (const Layer *l = m->w.layers; l < m->w.layers + c->n_layers; l++)
            for (int i = 0; i < c->n_experts; i++) list[n++] = k == 1 ? &l->w1[i] : &l->w2[i];
        bench_product(m, pool, k == 1 ? "ffn.experts.w1" : "ffn.experts.w2", list, n, c->n_active,
                      bandwidth);
    }
    list[0] = &m->w.head;
    bench_product(m, pool, "head", list, 1, 1, bandwidth);
    free(list);
}
// ---------------------------------------------------------------------------
// main

static void on_interrupt(int sig) {
    if (sig != SIGINT) terminated = true;
    if (interrupted++ || !computing) _exit(130);
}

static void on_bus(int sig, siginfo_t *info, void *context) {
    static atomic_flag said = ATOMIC_FLAG_INIT;
    while (atomic_flag_test_and_set(&said)) pause();
    const Store *store = open_store;
    const char *path = store ? store_find_address(store, info->si_addr) : NULL;
    if (!path && (size_t)((char *)info->si_addr - last_mapped.map.p) < last_mapped.map.n)
        path = last_mapped.path;
    const char *parts[] = { "dsv4: ", path ? path : "a mapped file",
                            ": cannot be read (did it shrink, or does its disk fail?)\n" };
    (void)sig;
    (void)context;
    for (int i = 0; i < 3; i++) if (write(2, parts[i], strlen(parts[i])) < 0) break;
    _exit(1);
}

static void catch_signals(void) {
    static const int stops[] = { SIGINT, SIGTERM, SIGHUP };
    struct sigaction stop = { .sa_handler = on_interrupt };
    struct sigaction bus = { .sa_sigaction = on_bus, .sa_flags = SA_SIGINFO };
    for (size_t i = 0; i < COUNT(stops); i++) sigaction(stops[i], &stop, NULL);
    sigaction(SIGBUS, &bus, NULL);
    signal(SIGPIPE, SIG_IGN);
}

// The vector instructions to use: the best there are, or fewer.
static void choose_isa(void) {
    int best = cpu_best();
    cpu_level = best;
    for (int i = 0; opt.isa && i < N_CPU_LEVELS; i++)
        if (!strcmp(opt.isa, cpu_names[i])) cpu_level = i;
    if (cpu_level > best) die(2, "--isa: this processor has %s at most", cpu_names[best]);
}

#ifndef DSV4_NO_MAIN
static int run(Command command, char **args) {
    Err e;
    bool ok = true;
    switch (command) {
    case TOKENIZE: return run_tokenize();
    case INFO: return run_info();
    case BENCH: return run_bench();
    case PPL: return run_ppl(args[0]);
    case DEVICES: return devices(opt.open.dir, strcmp(opt.open.dir, BUILT_IN) != 0);
    case VERIFY: ok = verify(args[0], opt.open.threads, &e); break;
    case CONVERT:
        opt.convert.src = args[0];
        opt.convert.dst = args[1];
        opt.convert.threads = opt.open.threads;
        ok = dsv4_convert(&opt.convert, &e);
        break;
    default: return opt.prompt || opt.file || opt.ids ? run_prompt() : run_chat();
    }
    if (!ok) die(1, "%s", e.text);
    return 0;
}

int main(int argc, char **argv) {
    char *args[2] = { NULL };
    const Subcommand *s = parse_options(argc, argv, args);
    if (opt.help || opt.version) {
        if (opt.help) print_help(s);
        else puts("dsv4 " VERSION);
        return 0;
    }
    check_options();
    catch_signals();
    choose_isa();
    cuda_kernels_file = opt.kernels;
    cuda_graphs = opt.graphs;
    if (!opt.open.dir && s->command & (LOADS | TOKENIZE | DEVICES)) {
        if (s->command != DEVICES)
            note("no -m DIR: this is the small built-in model, which tells children's stories");
        opt.open.dir = BUILT_IN;
    }
    int code = run(s->command, args);
    flush_out();
    return code;
}
#endif
