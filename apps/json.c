// JSON for the engine and the programs: a pull parser, objects read by table, and values written as
// Python writes them. Strict RFC 8259: valid UTF-8, no lone surrogates, no trailing commas, no NaN.

#include "dsv4.h"

#include <errno.h>
#include <float.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

Json json_open(Span text, const char *name, Err *e) {
    return (Json){ .start = text.p, .p = text.p, .end = text.p + text.n, .name = name, .e = e };
}

// Keeps the first error of a text, with its place; callers use it too. Returns false.
bool json_fail(Json *j, const char *fmt, ...) {
    char what[400];
    if (j->bad) return false;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(what, sizeof what, fmt, ap);
    va_end(ap);
    j->bad = true;
    bool named = j->at && *j->at;
    return fail(j->e, "%s: byte %zu: %.100s%s%s", j->name, (size_t)(j->p - j->start),
                named ? j->at : "", named ? ": " : "", what);
}

// The first byte of the next token, 0 at the end of the text or after an error.
char json_peek(Json *j) {
    while (j->p < j->end && *j->p && strchr(" \n\r\t", *j->p)) j->p++;
    return j->bad || j->p == j->end ? 0 : *j->p;
}

bool json_expected(Json *j, const char *what) {
    char c = json_peek(j);
    if (j->p == j->end) return json_fail(j, "expected %s, found the end of the text", what);
    if (c < 33 || c > 126) return json_fail(j, "expected %s, found byte 0x%02x", what, (uint8_t)c);
    return json_fail(j, "expected %s, found '%c'", what, c);
}

static bool json_begin(Json *j, char open, const char *what) {
    if (json_peek(j) != open) return json_expected(j, what);
    if (j->depth == JSON_DEPTH) return json_fail(j, "nested deeper than %d levels", JSON_DEPTH);
    uint64_t bit = 1ull << j->depth++;
    j->objects = open == '{' ? j->objects | bit : j->objects & ~bit;
    j->begun &= ~bit;
    j->p++;
    return true;
}
bool json_object(Json *j) { return json_begin(j, '{', "an object"); }
bool json_array(Json *j) { return json_begin(j, '[', "an array"); }

// Moves to the next item of the innermost array. False after the last one (and ']') or on error.
bool json_item(Json *j) {
    if (j->bad || !j->depth) return false;
    uint64_t bit = 1ull << (j->depth - 1);
    char close = j->objects & bit ? '}' : ']', c = json_peek(j);
    if (c == close) {
        j->p++;
        j->depth--;
        return false;
    }
    if (j->begun & bit) {
        if (c != ',') return json_expected(j, close == ']' ? "',' or ']'" : "',' or '}'");
        j->p++;
        if (json_peek(j) == close) return json_fail(j, "trailing comma");
    }
    j->begun |= bit;
    return true;
}

static bool json_hex4(Json *j, uint32_t *out) {
    char hex[5] = "";
    memcpy(hex, j->p, j->end - j->p < 4 ? (size_t)(j->end - j->p) : 4);
    if (strspn(hex, "0123456789abcdefABCDEF") < 4) return json_fail(j, "expected four hex digits "
                                                                    "after \\u");
    *out = (uint32_t)strtoul(hex, NULL, 16);
    j->p += 4;
    return true;
}

// p is behind a backslash. Surrogates must come in pairs.
static bool json_escape(Json *j, uint32_t *out) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    char c = j->p < j->end ? *j->p : 0;
    const char *at = c ? strchr(from, c) : NULL;
    if (!at && c != 'u') return json_fail(j, "bad escape in a string");
    j->p++;
    if (at) {
        *out = (uint8_t)to[at - from];
        return true;
    }
    uint32_t high, low = 0;
    if (!json_hex4(j, out)) return false;
    if ((high = *out) < 0xd800 || high > 0xdfff) return true;
    if (high > 0xdbff || j->end - j->p < 2 || memcmp(j->p, "\\u", 2))
        return json_fail(j, "lone surrogate \\u%04x", high);
    j->p += 2;
    if (!json_hex4(j, &low)) return false;
    if (low < 0xdc00 || low > 0xdfff) return json_fail(j, "lone surrogate \\u%04x", high);
    *out = 0x10000 + ((high & 0x3ff) << 10) + (low & 0x3ff);
    return true;
}

// Replaces *out by the decoded string; out = NULL only checks it.
bool json_string(Json *j, Str *out) {
    if (json_peek(j) != '"') return json_expected(j, "a string");
    if (out) out->n = 0, str_add(out, "", 0);
    for (j->p++;;) {
        const char *from = j->p;
        int32_t cp = 0;
        while (j->p < j->end && *j->p != '"' && *j->p != '\\' && (uint8_t)*j->p >= 32 && cp >= 0)
            if ((uint8_t)*j->p < 0x80) j->p++;
            else j->p += utf8_next(j->p, (size_t)(j->end - j->p), &cp);
        if (out) str_add(out, from, (size_t)(j->p - from));
        if (cp < 0) return json_fail(j, "invalid UTF-8 in a string");
        if (j->p == j->end) return json_fail(j, "string without an end");
        if (*j->p == '"') break;
        if (*j->p != '\\') return json_fail(j, "control byte 0x%02x in a string", (uint8_t)*j->p);
        uint32_t c = 0;
        j->p++;
        if (!json_escape(j, &c)) return false;
        if (out) utf8_put(out, c);
    }
    j->p++;
    return true;
}

// Moves to the next member of the innermost object and puts its name in *key (NULL: not wanted).
// False after the last one (and '}') or on error. Duplicates are the caller's business: map_add.
bool json_member(Json *j, Str *key) {
    if (!json_item(j) || !json_string(j, key)) return false;
    if (json_peek(j) != ':') return json_expected(j, "':'");
    j->p++;
    return true;
}

static void json_digits(Json *j) {
    if (j->p == j->end || *j->p < '0' || *j->p > '9') json_expected(j, "a digit");
    while (j->p < j->end && *j->p >= '0' && *j->p <= '9') j->p++;
}

// A copy of a number's text; *whole: it has neither fraction nor exponent.
bool json_number(Json *j, char text[static JSON_NUMBER + 1], bool *whole) {
    char c = json_peek(j);
    if (c != '-' && (c < '0' || c > '9')) return json_expected(j, "a number");
    const char *from = j->p;
    if (c == '-') j->p++;
    if (j->p < j->end && *j->p == '0') j->p++;
    else json_digits(j);
    const char *int_end = j->p;
    if (j->p < j->end && *j->p == '.') j->p++, json_digits(j);
    if (j->p < j->end && (*j->p == 'e' || *j->p == 'E')) {
        j->p++;
        if (j->p < j->end && (*j->p == '+' || *j->p == '-')) j->p++;
        json_digits(j);
    }
    size_t n = (size_t)(j->p - from);
    if (n > JSON_NUMBER) json_fail(j, "expected a number of %d bytes at most", JSON_NUMBER);
    if (j->bad) return false;
    memcpy(text, from, n);
    text[n] = 0;
    *whole = j->p == int_end;
    return true;
}

// lo <= *out <= hi. strtod is safe: this program never leaves the "C" locale.
bool json_double(Json *j, double lo, double hi, double *out) {
    char text[JSON_NUMBER + 1];
    bool whole;
    if (!json_number(j, text, &whole)) return false;
    double v = strtod(text, NULL);          // infinite for 1e999 and the like
    if (v >= lo && v <= hi) return *out = v, true;
    j->p -= strlen(text);
    return json_fail(j, "expected a number from %g to %g, found %.40s", lo, hi, text);
}

// An integer written without fraction or exponent, lo <= *out <= hi.
bool json_int(Json *j, int64_t lo, int64_t hi, int64_t *out) {
    char text[JSON_NUMBER + 1];
    bool whole;
    if (!json_number(j, text, &whole)) return false;
    errno = 0;
    long long v = strtoll(text, NULL, 10), low = lo, high = hi;
    if (whole && !errno && v >= lo && v <= hi) return *out = v, true;
    j->p -= strlen(text);
    return json_fail(j, "expected an integer from %lld to %lld, found %.40s", low, high, text);
}

static bool json_word(Json *j, const char *word) {
    size_t n = strlen(word);
    bool same = json_peek(j) && (size_t)(j->end - j->p) >= n && !memcmp(j->p, word, n);
    if (same) j->p += n;
    return same;
}

// Consumes a null if that is what comes next.
bool json_null(Json *j) { return json_word(j, "null"); }

bool json_bool(Json *j, bool *out) {
    bool yes = json_word(j, "true");
    if (!yes && !json_word(j, "false")) return json_expected(j, "true or false");
    *out = yes;
    return true;
}

// Passes over the next value, whatever it is, and checks it.
bool json_skip(Json *j) {
    char number[JSON_NUMBER + 1];
    int base = j->depth;
    do {
        if (j->depth > base) {
            bool object = j->objects >> (j->depth - 1) & 1;
            if (!(object ? json_member(j, NULL) : json_item(j))) continue;      // it was the last
        }
        char c = json_peek(j);
        bool b;
        if (c == '{') json_object(j);
        else if (c == '[') json_array(j);
        else if (c == '"') json_string(j, NULL);
        else if (c == 't' || c == 'f') json_bool(j, &b);
        else if (c == '-' || (c >= '0' && c <= '9')) json_number(j, number, &b);
        else if (!json_null(j)) json_expected(j, "a value");
    } while (!j->bad && j->depth > base);
    return !j->bad;
}

// The text of the next value, checked, as it stands: json_inside reads it later.
bool json_raw(Json *j, Span *out) {
    json_peek(j);
    const char *from = j->p;
    if (!json_skip(j)) return false;
    *out = (Span){ from, (size_t)(j->p - from) };
    return true;
}

// Reads a value that json_raw gave; places in errors still count from the start of the whole text.
Json json_inside(const Json *j, Span raw) {
    Json in = json_open(raw, j->name, j->e);
    in.start = j->start;
    return in;
}

// True if the whole text was read without an error and nothing but white space is left.
bool json_end(Json *j) {
    json_peek(j);
    return !j->bad && (j->p == j->end || json_expected(j, "the end of the text"));
}

// ---- by table

typedef struct {
    const Field *rows;
    size_t n;
    void *to;
    Str path;                   // of the value being read
    Map seen;                   // the paths so far: 1 if a row knows it and the value is not null
} Table;

// How a path goes with a row's: '=' it is the row's value, '.' and '[' the object or the list that
// holds it, 0 none of these.
static char path_match(const char *row, Span path) {
    for (size_t i = 0; i < path.n; i++, row++) {
        if (*row == '*' && !row[1]) return '=';
        if (*row == '*') {
            while (i < path.n && path.p[i] != '.') i++;
            row++;
            if (i == path.n) break;
        }
        if (!*row || *row != path.p[i]) return 0;
    }
    return !*row ? '=' : *row == '.' || *row == '[' ? *row : 0;
}

// A value of which only some are supported. The error shows what was found, a string decoded.
static void field_fixed(const Field *f, Json *j, char *to) {
    Str text = { 0 }, found = { 0 }, wanted = { 0 };
    Span raw = { "", 0 };
    bool string = json_peek(j) == '"', ok = false;
    Json at = *j;
    json_raw(j, &raw);
    if (string && !j->bad) json_string(&at, &text);
    str_puts(&found, string ? "\"" : "");
    str_add(&found, text.p, text.n);
    str_puts(&found, string ? "\"" : "");
    for (size_t i = 0; i < raw.n && !string; i++)               // other values: without white space
        if (!strchr(" \n\r\t", raw.p[i])) str_add(&found, raw.p + i, 1);
    for (size_t i = 0; i < sizeof f->values / sizeof *f->values && f->values[i]; i++) {
        ok = ok || str_is(&found, f->values[i]);
        str_puts(&wanted, i ? " or " : "");
        str_puts(&wanted, f->values[i]);
    }
    if (ok && f->at) snprintf(to, 32, "%s", text.p);
    if (!ok && !j->bad) {
        j->p = raw.p;
        json_fail(j, "%.80s is not supported, expected %s", found.p,
                  wanted.n ? wanted.p : "no such key");
    }
    free(text.p);
    free(found.p);
    free(wanted.p);
}

static void field_read(const Field *f, Json *j, void *base) {
    void *to = (char *)base + f->at;
    int64_t whole = 0;
    double v = 0;
    switch (f->kind) {
    case J_INT:
        if (json_int(j, (int64_t)f->lo, (int64_t)f->hi, &whole)) *(int *)to = (int)whole;
        return;
    case J_FLOAT:
        if (json_double(j, f->lo, f->hi, &v)) *(float *)to = (float)v;
        return;
    case J_DOUBLE: json_double(j, f->lo, f->hi, to); return;
    case J_BOOL: json_bool(j, to); return;
    case J_TEXT: json_string(j, to); return;
    case J_RAW: json_raw(j, to); return;
    case J_FOUND: *(bool *)to = json_skip(j); return;
    case J_FIXED: field_fixed(f, j, to); return;
    case J_READ: f->read(j, base); return;
    }
}

static void table_object(Table *t, Json *j);

// The next value, which stands at t->path.
static void table_value(Table *t, Json *j) {
    size_t i = 0, n = t->path.n, seen = t->seen.n;
    char match = 0, index[24];
    j->at = t->path.p;
    if (!map_add(&t->seen, str_span(&t->path), 0)) {
        json_fail(j, "is there twice");
        return;
    }
    while (i < t->n && !(match = path_match(t->rows[i].path, str_span(&t->path)))) i++;
    if (match && json_null(j)) return;
    t->seen.entries[seen].value = match != 0;
    if (!match) json_skip(j);
    else if (match == '=') field_read(&t->rows[i], j, t->to);
    else if (match == '.') table_object(t, j);
    else for (i = 0, json_array(j); json_item(j); i++) {
        snprintf(index, sizeof index, "[%zu]", i);
        str_puts(&t->path, index);
        table_value(t, j);
        t->path.p[t->path.n = n] = 0;
    }
}

static void table_object(Table *t, Json *j) {
    size_t n = t->path.n;
    Str key = { 0 };
    for (json_object(j); json_member(j, &key);) {
        for (size_t i = 0; i < key.n; i++)
            if (strchr(".[*", key.p[i])) key.p[i] = '?';        // such a key is in no table
        str_puts(&t->path, n ? "." : "");
        str_add(&t->path, key.p, key.n);
        table_value(t, j);
        t->path.p[t->path.n = n] = 0;
    }
    free(key.p);
}

static bool table_has(const Table *t, Span path) {
    const MapEntry *e = map_find(&t->seen, path);
    return e && e->value;
}

// Reads an object into *to by a table of n rows. An error names path, value and byte.
bool table_read(Json *j, const Field *rows, size_t n, void *to) {
    Table t = { .rows = rows, .n = n, .to = to };
    const char *outer = j->at;
    table_object(&t, j);
    j->at = outer;
    for (size_t i = 0; i < n; i++) {
        const char *path = rows[i].path, *dot = strrchr(path, '.');
        bool need = rows[i].need == NEEDED ||
                    (rows[i].need == WITHIN && table_has(&t, (Span){ path, (size_t)(dot - path) }));
        if (need && !table_has(&t, span_of(path))) json_fail(j, "no key %s", path);
    }
    free(t.path.p);
    map_free(&t.seen);
    return !j->bad;
}

// The same for a whole file; name is its path, for errors.
bool table_file(Span text, const char *name, const Field *rows, size_t n, void *to, Err *e) {
    Json j = json_open(text, name, e);
    return table_read(&j, rows, n, to) && json_end(&j);
}

// ---- as Python writes it

// A string as Python's json.dumps(x, ensure_ascii=False) writes it; s is valid UTF-8.
void json_put_string(Str *out, Span s) {
    str_add(out, "\"", 1);
    for (size_t i = 0; i < s.n; i++) {
        static const char from[] = "\"\\\n\r\t\b\f", to[] = "\"\\nrtbf";
        const char *at = s.p[i] ? strchr(from, s.p[i]) : NULL;
        char esc[8] = { '\\' };
        if (at) esc[1] = to[at - from];
        else if ((uint8_t)s.p[i] < 32) snprintf(esc, sizeof esc, "\\u%04x", s.p[i]);
        else esc[0] = s.p[i];
        str_add(out, esc, strlen(esc));
    }
    str_add(out, "\"", 1);
}

// Python's repr of a float: the fewest digits that read back the same, an exponent below 1e-4 and
// from 1e16 on. Doubles are denser below a power of two than above: the next digits above may do.
static void json_put_double(Str *out, double v) {
    char sci[40], text[64];
    long double above = ((long double)v + nextafter(v, v < 0 ? -INFINITY : INFINITY)) / 2;
    int digits = 1;
    for (; digits <= 17; digits++) {
        snprintf(sci, sizeof sci, "%.*e", digits - 1, v);
        if (strtod(sci, NULL) == v) break;
        snprintf(sci, sizeof sci, "%.*Le", digits - 1, above);
        if (strtod(sci, NULL) == v) break;
    }
    int exponent = atoi(strchr(sci, 'e') + 1);
    if (exponent < -4 || exponent > 15) snprintf(text, sizeof text, "%s", sci);
    else if (exponent < digits - 1) snprintf(text, sizeof text, "%.*f", digits - 1 - exponent, v);
    else snprintf(text, sizeof text, "%.1f", v);
    str_puts(out, text);
}

// Of equal keys the last value stands at the first one's place.
static void json_dump_object(Json *j, Str *out) {
    Map keys = { 0 };                       // key -> where its value stands in the text
    Str key = { 0 };
    json_object(j);
    while (json_member(j, &key)) {
        map_add(&keys, str_span(&key), 0);
        map_find(&keys, str_span(&key))->value = j->p - j->start;
        json_skip(j);
    }
    Json at = *j;
    str_puts(out, "{");
    for (size_t i = 0; i < keys.n && !j->bad; i++) {
        if (i) str_puts(out, ", ");
        json_put_string(out, map_key(&keys, i));
        str_puts(out, ": ");
        at.p = at.start + keys.entries[i].value;
        j->bad = !json_dump(&at, out);
    }
    str_puts(out, "}");
    free(key.p);
    map_free(&keys);
}

static void json_dump_number(Json *j, Str *out) {
    char text[JSON_NUMBER + 1];
    bool whole = false;
    double v = 0;
    Json at = *j;
    if (!json_number(j, text, &whole)) return;
    if (whole) str_puts(out, strcmp(text, "-0") ? text : "0");  // a Python int has no sign of zero
    else if (json_double(&at, -DBL_MAX, DBL_MAX, &v)) json_put_double(out, v);
    else j->bad = true;
}

// Appends the next value as Python's json.dumps(json.loads(text), ensure_ascii=False) writes it.
// Recursion is bounded by JSON_DEPTH.
bool json_dump(Json *j, Str *out) {
    char c = json_peek(j);
    Str s = { 0 };
    Span raw;
    if (c == '{') json_dump_object(j, out);
    else if (c == '[') {
        json_array(j);
        str_puts(out, "[");
        for (int i = 0; json_item(j); i = 1) {
            if (i) str_puts(out, ", ");
            json_dump(j, out);
        }
        str_puts(out, "]");
    } else if (c == '"') {
        if (json_string(j, &s)) json_put_string(out, str_span(&s));
    } else if (c == '-' || (c >= '0' && c <= '9')) json_dump_number(j, out);
    else if (json_raw(j, &raw)) str_add(out, raw.p, raw.n);
    free(s.p);
    return !j->bad;
}
