// Small tools: errors, checked sizes, memory, strings, UTF-8, maps, heaps, clock, progress.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include "dsv4.h"

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

static atomic_bool dying;           // a thread has the last word
static atomic_bool bar_shown;       // a progress bar is on the terminal's line

// One line `dsv4: ...` on stderr, then exit. Code 1: it failed, 2: usage. Of several threads that
// fail, one speaks.
void die(int code, const char *fmt, ...) {
    char line[2048];
    va_list ap;
    while (atomic_exchange(&dying, true)) pause();
    va_start(ap, fmt);
    vsnprintf(line, sizeof line, fmt, ap);
    va_end(ap);
    fflush(stdout);
    fprintf(stderr, "%sdsv4: %s\n", isatty(2) ? "\r\033[K" : "", one_line(line));
    _exit(code);            // other threads may be inside libraries whose destructors exit() would run
}

// One fact `# ...` on stderr.
void note(const char *fmt, ...) {
    va_list ap;
    if (dying) return;
    va_start(ap, fmt);
    flockfile(stderr);
    fputs(atomic_exchange(&bar_shown, false) ? "\r\033[K# " : "# ", stderr);
    vfprintf(stderr, fmt, ap);
    fputc('\n', stderr);
    funlockfile(stderr);
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

char *text_of(const char *fmt, ...) {
    char *s;
    va_list ap;
    va_start(ap, fmt);
    if (vasprintf(&s, fmt, ap) < 0) die(1, "out of memory: a path");
    va_end(ap);
    return s;
}

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

// Appends what is certain, each maximal invalid part as U+FFFD; at most 3 bytes are held back.
void utf8_feed(Utf8 *u, Span s, Str *out) {
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

void heap_push(Heap *h, uint64_t key) {
    if (h->n == h->cap) {
        h->cap = 2 * h->cap + 256;
        h->p = realloc(h->p, cmul(h->cap, sizeof *h->p));
        if (!h->p) die(1, "out of memory: a heap of %zu", h->cap);
    }
    size_t i = h->n++;
    for (; i > 0 && h->p[(i - 1) / 2] > key; i = (i - 1) / 2) h->p[i] = h->p[(i - 1) / 2];
    h->p[i] = key;
}

uint64_t heap_pop(Heap *h) {
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

// Seconds on a clock that never jumps.
double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

// A progress line that overwrites itself; only where a person is watching.
void progress(const char *what, int64_t done, int64_t total) {
    if (!isatty(2) || dying) return;
    int width = 30, full = total ? (int)(width * done / total) : width;
    bar_shown = done < total;
    fprintf(stderr, "\r# %s [%.*s%*s] %3d %%%s", what, full, "##############################",
            width - full, "", total ? (int)(100 * done / total) : 100, done >= total ? "\r\033[K" : "");
    fflush(stderr);
}

static struct {
    pthread_mutex_t lock;
    int64_t done, all;          // bytes, of all devices
} loading = { .lock = PTHREAD_MUTEX_INITIALIZER };

void loading_expect(size_t bytes) {
    pthread_mutex_lock(&loading.lock);
    loading.all += (int64_t)bytes;
    pthread_mutex_unlock(&loading.lock);
}

void loading_move(size_t bytes) {
    pthread_mutex_lock(&loading.lock);
    progress("loading", loading.done += (int64_t)bytes, loading.all);
    pthread_mutex_unlock(&loading.lock);
}
