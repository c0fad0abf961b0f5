// Unit test of JSON, tokenizer, chat format and sampler.
// usage: unit_text VECTORS_DIR TOKENIZER_JSON   (tests/golden/text and the real tokenizer; without the
// tokenizer the tests that need it are left out)
#define DSV4_NO_MAIN
#include "../../dsv4.c"
#include "../../apps/chat.c"
#include "../../apps/tokenizer.c"

#include "../check.h"

static bool same(const Str *s, const char *z) { return span_is(str_span(s), z); }
static bool equal(const Str *a, const Str *b) { return a->n == b->n && (!a->n || !memcmp(a->p, b->p, a->n)); }

static uint64_t seed = 1;
static uint32_t rnd(void) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(seed >> 33);
}

// Runs f on every line of a .jsonl file.
static void each_line(const char *dir, const char *file, void (*f)(Json *line, void *arg), void *arg) {
    char path[1024];
    Err e = { "" };
    Span s = { 0 };
    snprintf(path, sizeof path, "%s/%s", dir, file);
    if (!map_file(path, &s, &e)) die(1, "%s", e.text);
    int lines = 0;
    for (const char *p = s.p, *end = s.p + s.n; p < end; lines++) {
        const char *nl = memchr(p, '\n', (size_t)(end - p));
        Json j = json_open((Span){ p, (size_t)((nl ? nl : end) - p) }, file, &e);
        f(&j, arg);
        check(json_end(&j), "%s line %d: %s", file, lines + 1, e.text);
        p = nl ? nl + 1 : end;
    }
    check(lines > 0, "%s is empty", file);
    unmap_file(s);
}

// ---------------------------------------------------------------------------
// JSON

// `want`: the text json_dump must give, NULL: it must be refused; `error`: a part of the message.
static void json_case(Span text, const char *want, const char *error) {
    Err e = { "" };
    Str out = { 0 };
    Json j = json_open(text, "t", &e);
    bool ok = json_dump(&j, &out) && json_end(&j);
    Json k = json_open(text, "t", &e);
    bool skipped = json_skip(&k) && json_end(&k);
    check(ok == (want != NULL), "JSON %.*s: accepted %d (%s)", SHOWN(text), ok, e.text);
    if (!(error && strstr(error, "e+308"))) check(skipped == ok, "JSON %.*s: skip %d, dump %d", SHOWN(text), skipped, ok);
    if (want) check(same(&out, want), "JSON %.*s: got %s, expected %s", SHOWN(text), out.p, want);
    else check(strstr(e.text, error), "JSON %.*s: message '%s' without '%s'", SHOWN(text), e.text, error);
    free(out.p);
}

static const struct { const char *text, *want, *error; } json_cases[] = {
    { "{}", "{}", "" }, { " [ ] ", "[]", "" }, { "[1,2 , 3]", "[1, 2, 3]", "" },
    { "{\"a\":1,\"b\":[true,false,null]}", "{\"a\": 1, \"b\": [true, false, null]}", "" },
    { "{\"a\":1,\"b\":2,\"a\":{\"c\":[]}}", "{\"a\": {\"c\": []}, \"b\": 2}", "" },
    { "{\"a\":1,\"\\u0061\":2}", "{\"a\": 2}", "" },
    { "[{},[],\"\"]", "[{}, [], \"\"]", "" },
    { "\"\\u00e9\\ud83d\\ude00\\n\\t\\r\\b\\f\\\\\\/\\\"\\u0001\\u001f\\u007f\"",
      "\"é😀\\n\\t\\r\\b\\f\\\\/\\\"\\u0001\\u001f\x7f\"", "" },
    { "0", "0", "" }, { "-0", "0", "" }, { "-0.0", "-0.0", "" }, { "1E2", "100.0", "" },
    { "1.10", "1.1", "" }, { "1e22", "1e+22", "" }, { "1e-9", "1e-09", "" }, { "1e16", "1e+16", "" },
    { "123456789012345680.0", "1.2345678901234568e+17", "" }, { "9999999999999998.0", "9999999999999998.0", "" },
    { "0.0001", "0.0001", "" }, { "0.00001", "1e-05", "" }, { "5e-324", "5e-324", "" }, { "0.1", "0.1", "" },
    { "5.684341886080802e-14", "5.684341886080802e-14", "" }, { "1.7976931348623157e308", "1.7976931348623157e+308", "" },
    { "1e-400", "0.0", "" }, { "2.5", "2.5", "" }, { "100.0", "100.0", "" }, { "-12.375e1", "-123.75", "" },
    { "123456789012345678901234567890", "123456789012345678901234567890", "" },
    { "", NULL, "end of the text" }, { "{", NULL, "end of the text" }, { "[", NULL, "end of the text" },
    { "[1,]", NULL, "trailing comma" }, { "{\"a\":1,}", NULL, "trailing comma" }, { "[,1]", NULL, "a value" },
    { "{,}", NULL, "a string" }, { "{\"a\" 1}", NULL, "':'" }, { "{a:1}", NULL, "a string" },
    { "[1 2]", NULL, "','" }, { "[1}", NULL, "','" }, { "{\"a\":1]", NULL, "','" }, { "[1]]", NULL, "the end" },
    { "01", NULL, "the end" }, { "-01", NULL, "the end" }, { "1.", NULL, "a digit" }, { "-", NULL, "a digit" },
    { ".5", NULL, "a value" }, { "1e", NULL, "a digit" }, { "1e+", NULL, "a digit" }, { "+1", NULL, "a value" },
    { "0x10", NULL, "the end" }, { "NaN", NULL, "a value" }, { "Infinity", NULL, "a value" },
    { "-Infinity", NULL, "a digit" }, { "nul", NULL, "a value" }, { "nulll", NULL, "the end" },
    { "tru", NULL, "true or false" }, { "'a'", NULL, "a value" }, { "/*x*/1", NULL, "a value" },
    { "1e999", NULL, "to 1.79769e+308, found 1e999" }, { "-1e999", NULL, "e+308, found -1e999" }, { "\"a", NULL, "without an end" },
    { "\"\\x\"", NULL, "escape" }, { "\"\\u12g4\"", NULL, "hex" }, { "\"\\u12", NULL, "hex" },
    { "\"\t\"", NULL, "control byte" }, { "\"\x01\"", NULL, "control byte" },
    { "\"\\ud800\"", NULL, "lone surrogate" }, { "\"\\udc00\"", NULL, "lone surrogate" },
    { "\"\\ud800\\u0041\"", NULL, "lone surrogate" }, { "\"\\ud800x\"", NULL, "lone surrogate" },
    { "\xef\xbb\xbf" "1", NULL, "byte 0xef" }, { "\"\xc0\x80\"", NULL, "UTF-8" }, { "\"\xff\"", NULL, "UTF-8" },
    { "\"\xed\xa0\x80\"", NULL, "UTF-8" }, { "\"\xf4\x90\x80\x80\"", NULL, "UTF-8" },
    { "\"\xe4\xbd\"", NULL, "UTF-8" }, { "\"\xe4", NULL, "UTF-8" }, { "[1]x", NULL, "the end" },
};

static void test_json(void) {
    for (size_t i = 0; i < sizeof json_cases / sizeof *json_cases; i++)
        json_case(span_of(json_cases[i].text), json_cases[i].want, json_cases[i].error);
    json_case((Span){ "\"a\0b\"", 5 }, NULL, "control byte 0x00");
    json_case((Span){ "1\0", 2 }, NULL, "the end");

    for (int depth = 64; depth <= 1000000; depth = depth == 64 ? 65 : depth * 20) {
        Str s = { 0 };
        for (int i = 0; i < depth; i++) str_puts(&s, i % 2 ? "{\"a\":" : "[");
        Err e = { "" };
        double start = now();
        Json j = json_open(str_span(&s), "t", &e);
        bool ok = json_skip(&j);
        check(!ok && (strstr(e.text, "deeper") != NULL) == (depth > 64), "depth %d: %s", depth, e.text);
        check(now() - start < 0.5, "depth %d took %.2f s", depth, now() - start);
        free(s.p);
    }
    json_case(span_of("[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["
                      "]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]"),
              "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["
              "]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]", "");
    Str digits = { 0 };
    for (int i = 0; i < 10000000; i++) str_add(&digits, "7", 1);
    json_case((Span){ digits.p, 4300 }, (digits.p[4300] = 0, digits.p), "");
    digits.p[4300] = '7';
    double start = now();
    json_case(str_span(&digits), NULL, "4300");
    check(now() - start < 0.5, "10^7 digits took %.2f s", now() - start);
    free(digits.p);

    const struct { const char *text; int64_t lo, hi; bool ok; } ints[] = {
        { "9223372036854775807", INT64_MIN, INT64_MAX, true }, { "9223372036854775808", INT64_MIN, INT64_MAX, false },
        { "-9223372036854775808", INT64_MIN, INT64_MAX, true }, { "-9223372036854775809", INT64_MIN, INT64_MAX, false },
        { "18446744073709551616", 0, INT64_MAX, false }, { "1.0", 0, 9, false }, { "1e0", 0, 9, false },
        { "10", 0, 9, false }, { "-1", 0, 9, false }, { "9", 0, 9, true }, { "\"9\"", 0, 9, false }, { "null", 0, 9, false },
    };
    for (size_t i = 0; i < sizeof ints / sizeof *ints; i++) {
        Err e = { "" };
        int64_t v = -77;
        Json j = json_open(span_of(ints[i].text), "t", &e);
        bool ok = json_int(&j, ints[i].lo, ints[i].hi, &v);
        check(ok == ints[i].ok, "integer %s: %d", ints[i].text, ok);
        check(ok ? v == strtoll(ints[i].text, NULL, 10) : v == -77, "integer %s: value", ints[i].text);
    }

    Map m = { 0 };
    bool right = true;
    char key[20];
    for (int i = 0; i < 20000; i++) {
        snprintf(key, sizeof key, "k%d", i % 10000);
        right = right && map_add(&m, span_of(key), i) == (i < 10000);
    }
    check(right && m.n == 10000 && map_find(&m, span_of("k777"))->value == 777 && !map_find(&m, span_of("k")), "map");
    map_free(&m);
}

// ---------------------------------------------------------------------------
// tokenizer

static void read_ids(Json *j, Ids *ids) {
    int64_t id;
    for (json_array(j); json_item(j);)
        if (json_int(j, 0, INT_MAX, &id)) ids_add(ids, (int)id);
}

static bool same_ids(const Ids *a, const Ids *b) {
    return a->n == b->n && (!a->n || !memcmp(a->p, b->p, a->n * sizeof *a->p));
}

static void decode(const Tokenizer *t, const Ids *ids, bool skip, Str *out) {
    Utf8 u = { 0 };
    bool whole = true;
    for (size_t i = 0; i < ids->n; i++) {
        size_t before = out->n;
        tok_decode(t, ids->p[i], skip, &u, out);
        for (size_t k = before; k < out->n;) {          // whatever is printed is whole characters
            int32_t cp;
            k += utf8_next(out->p + k, out->n - k, &cp);
            whole = whole && cp >= 0;
        }
    }
    check(whole, "streamed text is not UTF-8");
    utf8_finish(&u, out);
}

static void encode_line(Json *j, void *arg) {
    const Tokenizer *t = arg;
    Str key = { 0 }, text = { 0 }, back = { 0 };
    Ids want = { 0 }, got = { 0 };
    for (json_object(j); json_member(j, &key);) {
        if (same(&key, "text")) json_string(j, &text);
        else if (same(&key, "ids")) read_ids(j, &want);
        else json_skip(j);
    }
    tok_encode(t, str_span(&text), true, &got);
    check(same_ids(&want, &got), "encode %.*s", SHOWN(text));
    str_add(&back, "", 0);
    decode(t, &got, false, &back);
    check(equal(&back, &text), "round trip %.*s", SHOWN(text));
    got.n = back.n = 0;
    tok_encode(t, str_span(&text), false, &got);
    decode(t, &got, false, &back);
    check(equal(&back, &text), "round trip, plain");
    bool added = false;
    for (size_t i = 0; i < got.n; i++) added |= t->flags[got.p[i]] & TOK_ADDED;
    check(!added, "added token in plain text");
    free(key.p);
    free(text.p);
    free(back.p);
    free(want.p);
    free(got.p);
}

static void decode_line(Json *j, void *arg) {
    Str key = { 0 }, text = { 0 }, skipped = { 0 }, got = { 0 };
    Ids ids = { 0 };
    for (json_object(j); json_member(j, &key);) {
        if (same(&key, "text")) json_string(j, &text);
        else if (same(&key, "text_skip_special")) json_string(j, &skipped);
        else read_ids(j, &ids);
    }
    str_add(&got, "", 0);
    decode(arg, &ids, false, &got);
    check(equal(&got, &text), "decode %s", text.p);
    got.n = 0;
    str_add(&got, "", 0);
    decode(arg, &ids, true, &got);
    check(equal(&got, &skipped), "decode without special tokens %s", skipped.p);
    free(key.p);
    free(text.p);
    free(skipped.p);
    free(got.p);
    free(ids.p);
}

static void test_utf8(void) {
    const struct { const char *in; int n_bad; const char *out; } cases[] = {
        { "\xe4\xbd", 1, "\uFFFD" }, { "\xf0\x9f\x98", 1, "\uFFFD" }, { "\xc0\x80", 2, "\uFFFD\uFFFD" },
        { "\xed\xa0\x80", 3, "\uFFFD\uFFFD\uFFFD" }, { "\xf4\x90\x80\x80", 4, "\uFFFD\uFFFD\uFFFD\uFFFD" },
        { "\xf0\x9f\x61", 1, "\uFFFD" "a" }, { "a\xff" "b", 1, "a\uFFFD" "b" }, { "", 0, "" },
        { "\xe4\xbd\xa0", 0, "\u4f60" }, { "x\xf0\x9f\x98\x80", 0, "x\U0001F600" }, { "\xe4\xe4\xbd\xa0", 1, "\uFFFD\u4f60" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Str a = { 0 }, b = { 0 };
        Utf8 u = { 0 }, whole = { 0 };
        str_add(&a, "", 0);
        str_add(&b, "", 0);
        utf8_feed(&whole, span_of(cases[i].in), &a);
        utf8_finish(&whole, &a);
        for (const char *p = cases[i].in; *p; p++) utf8_feed(&u, (Span){ p, 1 }, &b);
        utf8_finish(&u, &b);
        check(same(&a, cases[i].out) && same(&b, cases[i].out), "UTF-8 case %zu: %s %s", i, a.p, b.p);
        free(a.p);
        free(b.p);
    }
    bool all = true;
    for (uint32_t c = 0; c < 0x110000; c++) {
        if (c >= 0xd800 && c < 0xe000) continue;
        Str s = { 0 };
        int32_t cp;
        utf8_put(&s, c);
        all = all && utf8_next(s.p, s.n, &cp) == s.n && cp == (int32_t)c;
        free(s.p);
    }
    check(all, "a code point does not survive UTF-8");
}

// A small tokenizer.json. Each fault changes one thing of it; `error` is a part of the message.
typedef struct { const char *from, *to, *error; } Fault;
#define ADDED(id, text, special) "{\"id\": " id ", \"content\": \"" text "\", \"single_word\": false, \"lstrip\": " \
    "false, \"rstrip\": false, \"normalized\": false, \"special\": " special "}"
static const Fault faults[] = {
    { "x", "x", NULL },
    { "\"a b\"", "[\"a\", \"b\"]", NULL },
    { "\"normalizer\": {\"type\": \"Sequence\", \"normalizers\": []}", "\"normalizer\": null", NULL },
    { "\"dropout\": null", "\"ignore_merges\": false", NULL },
    { "\"post_processor\": null,", "", NULL },
    { "\"normalizers\": []", "\"normalizers\": [{\"type\": \"NFC\"}]", "normalizer.normalizers: [{\"type\":\"NFC\"}] is not supported, expected []" },
    { "\"type\": \"Sequence\", \"normalizers\": []", "\"type\": \"NFC\"", "normalizer.type: \"NFC\" is not supported, expected \"Sequence\"" },
    { "{1,3}", "{1,2}", "pre_tokenizer.pretokenizers[0].pattern.Regex: \"\\p{N}{1,2}\" is not supported, expected \"\\p{N}{1,3}\"" },
    { "\"behavior\": \"Isolated\"", "\"behavior\": \"Removed\"", "behavior" },
    { "\"invert\": false", "\"invert\": true", "invert" },
    { "\"invert\": false", "\"inverted\": false", "pretokenizers[0].inverted: false is not supported, expected no such key" },
    { ", \"invert\": false", "", "no key pre_tokenizer.pretokenizers[0].invert" },
    { "\"invert\": false", "\"behavior\": \"Isolated\"", "behavior" },
    { "\"use_regex\": false", "\"use_regex\": true", "use_regex" },
    { "\"add_prefix_space\": false", "\"add_prefix_space\": true", "add_prefix_space" },
    { "\"decoder\": {\"type\": \"ByteLevel\"", "\"decoder\": {\"type\": \"WordPiece\"", "decoder.type: \"WordPiece\" is not supported, expected \"ByteLevel\"" },
    { "\"decoder\"", "\"dekoder\"", "no key decoder.type" },
    { "\"post_processor\": null", "\"post_processor\": {\"type\": \"TemplateProcessing\"}", "post_processor.type: \"TemplateProcessing\" is not" },
    { "\"truncation\": null", "\"truncation\": {\"max_length\": 5}", "truncation" },
    { "\"truncation\": null", "\"padding\": 5", "padding: 5 is not supported, expected null" },
    { "\"truncation\": null", "\"model\": {}", "model" },
    { "\"type\": \"BPE\"", "\"type\": \"Unigram\"", "model.type: \"Unigram\" is not supported, expected \"BPE\"" },
    { "\"dropout\": null", "\"dropout\": 0.1", "model.dropout: 0.1" },
    { "\"dropout\": null", "\"byte_fallback\": true", "byte_fallback" },
    { "\"dropout\": null", "\"ignore_merges\": true", "ignore_merges" },
    { "\"dropout\": null", "\"unk_token\": \"a\"", "unk_token" },
    { "\"dropout\": null", "\"surprise\": 1", "model.surprise: 1 is not" },
    { "\"dropout\": null", "\"vocab\": {}", "twice" },
    { "\"ab\": 256", "\"ab\": 300", "token \"ab\" has id 300" },
    { "\"ab\": 256", "\"ab\": 5", "id 5 belongs to" },
    { "\"ab\": 256", "\"ab\": -1", "expected an integer" },
    { "\"ab\": 256", "\"ab\": 256.5", "expected an integer" },
    { "\"ab\": 256", "\"ab\": 18446744073709551872", "expected an integer" },
    { "\"ab\": 256", "\"ab\": 256, \"\": 300", "0 bytes" },
    { "\"ab\": 256", "\"ab\": 256, \"ab\": 263", "\"ab\" is there twice" },
    { "\"ab\": 256", "\"ab\": 256, \"中\": 263", "holds U+4E2D" },
    { "\"ab\": 256", "\"a中\": 256", "holds U+4E2D" },
    { "\"ab\": 256", "\"qq\": 256", "\"ab\" is not in the vocabulary" },
    { "\"a\": ", "\"zz\": ", "no token for the single byte 0x61" },
    { "\"a b\"", "\"a q q\"", "\"q q\" is not in the vocabulary" },
    { "\"a b\"", "\"ab\"", "without a space" },
    { "\"a b\"", "\"a \"", "\"\" is not in the vocabulary" },
    { "\"a b\"", "\"ab ab\"", "\"abab\" is not in the vocabulary" },
    { "\"a b\"", "\"a b\", \"a b\"", "merge 1 repeats merge 0" },
    { "\"a b\"", "[\"a\"]", "two strings" },
    { "\"a b\"", "[\"a\", \"b\", \"a\"]", "two strings" },
    { "\"a b\"", "5", "a string" },
    { "\"a b\"", "\"a \\ud800\"", "lone surrogate" },
    { "\"a b\"", "\"a \xff\"", "UTF-8" },
    { "<think>", "<thunk>", "token <think> is missing" },
    { "<｜begin▁of▁sentence｜>", "<s>", "<｜begin▁of▁sentence｜> is missing" },
    { "<｜end▁of▁sentence｜>", "</s>", "<｜end▁of▁sentence｜> is missing" },
    { "<think>", "", "0 bytes" },
    { "</think>", "<think>", "\"<think>\" is there twice" },
    { "\"lstrip\": false", "\"lstrip\": true", "lstrip: true is not supported, expected false" },
    { "\"lstrip\": false, ", "", "no key lstrip" },
    { "\"lstrip\": false", "\"rstrip\": false", "rstrip: is there twice" },
    { "\"id\": 261", "\"id\": 260", "id 260 belongs to" },
    { "\"id\": 261", "\"id\": 2000", "id 2000 of 263 tokens" },
    { "\"id\": 261", "\"id\": 99999999999", "expected an integer" },
    { "\"added_tokens\": [", "\"added_tokens\": [5,", "an object" },
    { "\"added_tokens\": [", "\"added_tokens\": [],\"x\": [", "the added token <｜begin▁of▁sentence｜> is missing" },
    { "\"model\": {", "\"model\": [", "an object" },
    { "\"merges\": [", "\"murges\": [", "model" },
    { "\"version\"", "version", "a string" },
};

static const char *const v4_pre_tokenizer =
    "{\"type\": \"Sequence\", \"pretokenizers\": ["
    "{\"type\": \"Split\", \"pattern\": {\"Regex\": \"\\\\p{N}{1,3}\"},"
    " \"behavior\": \"Isolated\", \"invert\": false},"
    "{\"type\": \"Split\", \"pattern\": {\"Regex\": \"[一-龥\\u3040-ゟ゠-ヿ]+\"},"
    " \"behavior\": \"Isolated\", \"invert\": false},"
    "{\"type\": \"Split\", \"pattern\": {\"Regex\": "
    "\"[!\\\"#$%&'()*+,\\\\-./:;<=>?@\\\\[\\\\\\\\\\\\]^_`{|}~]"
    "[A-Za-z]+|[^\\r\\n\\\\p{L}\\\\p{P}\\\\p{S}]?[\\\\p{L}\\\\p{M}]+| ?[\\\\p{P}\\\\p{S}]+[\\r\\n]*"
    "|\\\\s*[\\r\\n]+|\\\\s+(?!\\\\S)|\\\\s+\"}, \"behavior\": \"Isolated\", \"invert\": false},"
    "{\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": true,"
    " \"use_regex\": false}]}";

static void small_tokenizer(Str *s) {
    str_puts(s, "{\"version\": \"x\", \"truncation\": null, \"normalizer\": {\"type\": \"Sequence\", "
                "\"normalizers\": []}, \"post_processor\": null, \"decoder\": {\"type\": \"ByteLevel\"}, "
                "\"pre_tokenizer\": ");
    str_puts(s, v4_pre_tokenizer);
    str_puts(s, ", \"model\": {\"type\": \"BPE\", \"dropout\": null, \"vocab\": {");
    for (uint32_t b = 0; b < 256; b++) {
        Str c = { 0 };
        char id[20];
        utf8_put(&c, byte_letter(b));
        json_put_string(s, str_span(&c));
        snprintf(id, sizeof id, ": %u, ", b);
        str_puts(s, id);
        free(c.p);
    }
    str_puts(s, "\"ab\": 256}, \"merges\": [\"a b\"]}, \"added_tokens\": ["
                ADDED("257", "<｜begin▁of▁sentence｜>", "true") ", " ADDED("258", "<｜end▁of▁sentence｜>", "true") ", "
                ADDED("259", "<｜User｜>", "false") ", " ADDED("260", "<｜Assistant｜>", "false") ", "
                ADDED("261", "<think>", "false") ", " ADDED("262", "</think>", "false") "]}");
}

static void test_faults(void) {
    Str good = { 0 }, big = { 0 };
    Tokenizer *t;
    small_tokenizer(&good);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) {
        const Fault *f = &faults[i];
        Err e = { "" };
        Str s = { 0 };
        const char *at = strstr(good.p, f->from);
        check(at, "fault %s: not in the text", f->from);
        if (!at) continue;
        str_add(&s, good.p, (size_t)(at - good.p));
        str_puts(&s, f->to);
        str_puts(&s, at + strlen(f->from));
        bool ok = (t = tok_load(str_span(&s), "T", &e));
        check(ok == !f->error, "fault %s -> %s: %d %s", f->from, f->to, ok, e.text);
        if (f->error) check(strstr(e.text, f->error) && !strncmp(e.text, "T:", 2), "fault %s -> %s: %s", f->from, f->to, e.text);
        if (ok) tokenizer_close(t);
        free(s.p);
    }
    Err e = { "" };
    for (int i = 0; i < 10 << 20; i++) str_add(&big, "a", 1);
    Str s = { 0 };
    const char *at = strstr(good.p, "\"ab\": 256");
    str_add(&s, good.p, (size_t)(at - good.p));
    str_puts(&s, "\"");
    str_add(&s, big.p, big.n);
    str_puts(&s, at + 3);
    double start = now();
    check(!tok_load(str_span(&s), "T", &e) && strstr(e.text, "10485760 bytes"), "10 MB token: %s", e.text);
    check(now() - start < 1, "10 MB token took %.2f s", now() - start);
    for (size_t n = 0; n < good.n; n += 1 + n / 64) {           // cut off anywhere
        check(!tok_load((Span){ good.p, n }, "T", &e), "cut at %zu", n);
    }
    free(s.p);
    free(big.p);
    free(good.p);
}

// A tokenizer whose rank order is not its id order, with overlapping merges and added tokens of both kinds.
static void test_ranks(void) {
    Str good = { 0 }, s = { 0 };
    Err e = { "" };
    Tokenizer *t;
    small_tokenizer(&good);
    const char *vocab = strstr(good.p, "\"ab\": 256"), *tokens = strstr(good.p, ADDED("261", "<think>", "false"));
    str_add(&s, good.p, (size_t)(vocab - good.p));
    str_puts(&s, "\"abc\": 263, \"bc\": 264, \"ab\": 256}, \"merges\": [\"b c\", \"a bc\", \"a b\"]}, \"added_tokens\": [");
    const char *list = strstr(good.p, "\"added_tokens\": [") + 17;
    str_add(&s, list, (size_t)(tokens - list));
    str_puts(&s, "{\"id\": 265, \"content\": \"bb\", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, "
                 "\"normalized\": true, \"special\": false}, ");
    str_puts(&s, ADDED("266", "abbb", "false") ", " ADDED("267", "ab", "false") ", ");
    str_puts(&s, tokens);
    bool ok = (t = tok_load(str_span(&s), "T", &e));
    check(!ok && strstr(e.text, "the vocabulary says 256"), "an added token that is in the vocabulary with another id: %s", e.text);
    s.n -= strlen(tokens) + strlen(ADDED("267", "ab", "false") ", ");
    s.p[s.n] = 0;
    str_puts(&s, tokens);
    check((t = tok_load(str_span(&s), "T", &e)), "ranks: %s", e.text);
    const struct { const char *text; int n, ids[8]; } cases[] = {
        { "abc", 1, { 263 } }, { "ab", 1, { 256 } }, { "aacb", 4, { 'a', 'a', 'c', 'b' } }, { "abbbb", 2, { 266, 'b' } },
        { "abba", 3, { 'a', 265, 'a' } }, { "bbb", 2, { 265, 'b' } }, { "<think>abc<", 3, { 261, 263, '<' } },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Ids ids = { 0 };
        tok_encode(t, span_of(cases[i].text), true, &ids);
        bool right = (int)ids.n == cases[i].n;
        for (int k = 0; right && k < cases[i].n; k++)
            right = ids.p[k] == (cases[i].ids[k] < 256 ? t->byte_id[cases[i].ids[k]] : cases[i].ids[k]);
        check(right, "ranks: %s", cases[i].text);
        free(ids.p);
    }
    tokenizer_close(t);
    free(s.p);
    free(good.p);
}

static void test_long(const Tokenizer *t) {
    const char *what[] = { "A", " ", "=", "\n", "a ", "1", "中", "<", "<｜place▁holder▁no▁", "\xff", "\u200d", "\u0301" };
    for (size_t i = 0; i < sizeof what / sizeof *what; i++) {
        Str s = { 0 };
        Ids ids = { 0 };
        while (s.n < 1 << 20) str_puts(&s, what[i]);
        clock_t begin = clock();
        tok_encode(t, str_span(&s), true, &ids);
        double took = (double)(clock() - begin) / CLOCKS_PER_SEC;
#ifndef __SANITIZE_ADDRESS__
        check(took < 2, "1 MB of %s took %.2f s", what[i], took);
#endif
        check(ids.n > 0 && took >= 0, "no ids");
        free(s.p);
        free(ids.p);
    }
}

// ---------------------------------------------------------------------------
// chat format

static void chat_line(Json *j, void *arg) {
    const Tokenizer *t = arg;
    Err e = { "" };
    Str key = { 0 }, name = { 0 }, want = { 0 }, got = { 0 };
    Ids ids = { 0 }, got_ids = { 0 };
    Chat c = { 0 };
    ChatOptions o = { 0 };
    Span line = { j->p, (size_t)(j->end - j->p) };
    for (json_object(j); json_member(j, &key);) {
        if (same(&key, "name")) json_string(j, &name);
        else if (same(&key, "prompt")) json_string(j, &want);
        else if (same(&key, "ids")) read_ids(j, &ids);
        else json_skip(j);
    }
    str_add(&got, "", 0);
    bool ok = chat_read(&c, &o, line, "vector", &e) && chat_render(&c, &o, &got, &e);
    check(ok && same(&got, want.p), "chat %s: %s\n%s\n%s", name.p, e.text, got.p, want.p);
    got.n = 0;
    str_add(&got, "", 0);
    check(chat_render(&c, &o, &got, &e) && same(&got, want.p), "chat %s rendered twice", name.p);
    if (t) {
        tok_encode(t, str_span(&want), true, &got_ids);
        check(same_ids(&ids, &got_ids), "chat %s: ids", name.p);
    }
    chat_free(&c);
    free(key.p);
    free(name.p);
    free(want.p);
    free(got.p);
    free(ids.p);
    free(got_ids.p);
}

// `want` NULL: refused with a message that holds `error`.
static const struct { const char *chat, *want, *error; } chats[] = {
    { "[]", BOS_TEXT, "" },
    { "{\"messages\": [], \"add_bos\": false}", "", "" },
    { "{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}], \"thinking\": true, \"reasoning_effort\": \"low\"}", NULL, "low" },
    { "{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}], \"reasoning_effort\": \"low\"}",
      BOS_TEXT "<｜User｜>x<｜Assistant｜></think>", "" },
    { "{\"messages\": [], \"reasoning_effort\": \"huge\"}", NULL, "\"huge\"" },
    { "{\"messages\": [], \"release\": \"v3\"}", NULL, "\"v3\"" },
    { "{}", NULL, "no messages" }, { "5", NULL, "an object" }, { "[5]", NULL, "an object" },
    { "[{\"content\": \"x\"}]", NULL, "without a role" }, { "[{\"role\": \"owner\"}]", NULL, "unknown role \"owner\"" },
    { "[{\"role\": \"user\", \"content\": 5}]", NULL, "a string" },
    { "[{\"role\": \"developer\", \"content\": \"\"}]", NULL, "developer" },
    { "[{\"role\": \"user\", \"content\": \"x\", \"task\": \"dance\"}]", NULL, "unknown task" },
    { "[{\"role\": \"user\", \"content\": \"x\", \"wo_eos\": 1}]", NULL, "true or false" },
    { "[{\"role\": \"user\", \"content\": [{\"type\": \"image_url\"}]}]", NULL, "image_url" },
    { "[{\"role\": \"user\", \"content\": [{\"type\": \"text\", \"text\": \"a\"}, {\"text\": \"b\", \"type\": \"text\"}]}]",
      BOS_TEXT "<｜User｜>a\n\nb<｜Assistant｜></think>", "" },
    { "[{\"role\": \"system\", \"content\": \"s\", \"tools\": [{\"type\": \"function\"}]}]", NULL, "without a function" },
    { "[{\"role\": \"system\", \"content\": \"s\", \"tools\": [], \"response_format\": null}]", BOS_TEXT "s", "" },
    { "[{\"role\": \"assistant\", \"tool_calls\": [{\"function\": {\"name\": \"f\"}}]}]", NULL, "arguments" },
    { "[{\"role\": \"assistant\", \"tool_calls\": [{\"function\": {\"name\": \"f\", \"arguments\": \"[1]\"}}]}]", NULL, "an object" },
    { "[{\"role\": \"assistant\", \"tool_calls\": [{\"function\": {\"name\": \"f\", \"arguments\": {\"a\": 1, \"b\": \"x\", \"a\": 2.50}}}]}]",
      BOS_TEXT CALLS_START ">\n<" DSML "invoke name=\"f\">\n<" DSML "parameter name=\"a\" string=\"false\">2.5</" DSML
      "parameter>\n<" DSML "parameter name=\"b\" string=\"true\">x</" DSML "parameter>\n</" DSML "invoke>\n" CALLS_END EOS_TEXT, "" },
    { "{\"context\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}],"
      " \"messages\": [{\"role\": \"user\", \"content\": \"c\"}], \"thinking\": true, \"reasoning_effort\": \"max\"}",
      "<｜User｜>c<｜Assistant｜><think>", "" },
    { "{\"context\": [{\"role\": \"user\", \"content\": \"a\"}], \"messages\": [{\"role\": \"user\", \"content\": \"c\"}]}",
      "<｜User｜>c<｜Assistant｜></think>", "" },
    { "{\"thinking\": true, \"messages\": [{\"role\": \"user\", \"content\": \"a\", \"tools\": [{\"function\": {}}]},"
      " {\"role\": \"assistant\", \"content\": \"b\", \"reasoning_content\": \"r\"}, {\"role\": \"user\", \"content\": \"c\"}]}",
      BOS_TEXT "<｜User｜>a<｜Assistant｜></think>b" EOS_TEXT "<｜User｜>c<｜Assistant｜><think>", "" },
    { "[{\"role\": \"system\", \"content\": \"s\", \"response_format\": {\"x\": 1e999}, \"wo_eos\": true}]", NULL, "found 1e999" },
    { "[{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"user\", \"content\": \"b\", \"task\": \"query\"}]",
      BOS_TEXT "<｜User｜>a\n\nb<｜Assistant｜></think>", "" },
    { "[{\"role\": \"assistant\", \"tool_calls\": [{\"id\": \"\", \"function\": {\"name\": \"f\", \"arguments\": \"\"}}]},"
      " {\"role\": \"tool\", \"content\": \"1\"}, {\"role\": \"tool\", \"content\": null}]",
      BOS_TEXT CALLS_START ">\n<" DSML "invoke name=\"f\">\n<" DSML "parameter name=\"arguments\" string=\"true\"></" DSML
      "parameter>\n</" DSML "invoke>\n" CALLS_END EOS_TEXT "<｜User｜><tool_result>1</tool_result>\n\n<tool_result></tool_result>"
      "<｜Assistant｜></think>", "" },
    { "{\"messages\": [{\"role\": \"user\", \"content\": \"c\"}], \"response_format\": {\"type\": \"json_object\"}}",
      BOS_TEXT "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n{\"type\": \"json_object\"}"
      "<｜User｜>c<｜Assistant｜></think>", "" },
};

static void test_chats(void) {
    for (size_t i = 0; i < sizeof chats / sizeof *chats; i++) {
        Err e = { "" };
        Chat c = { 0 };
        ChatOptions o = { 0 };
        Str out = { 0 };
        str_add(&out, "", 0);
        bool ok = chat_read(&c, &o, span_of(chats[i].chat), "C", &e) && chat_render(&c, &o, &out, &e);
        check(ok == (chats[i].want != NULL), "chat %s: %d %s", chats[i].chat, ok, e.text);
        if (chats[i].want) check(same(&out, chats[i].want), "chat %s: %s", chats[i].chat, out.p);
        else check(strstr(e.text, chats[i].error), "chat %s: %s", chats[i].chat, e.text);
        chat_free(&c);
        free(out.p);
    }
    Chat c = { 0 };                         // the terminal's way
    ChatOptions o = { .thinking = true };
    Str out = { 0 };
    Err e = { "" };
    str_puts(&out, "");
    chat_say(&c, ROLE_SYSTEM, span_of("s"), span_of(""), false);
    chat_say(&c, ROLE_USER, span_of("a"), span_of(""), false);
    chat_say(&c, ROLE_ASSISTANT, span_of("b"), span_of("r"), false);
    chat_say(&c, ROLE_USER, span_of("c"), span_of(""), false);
    check(chat_render(&c, &o, &out, &e) && same(&out, BOS_TEXT "s<｜User｜>a<｜Assistant｜></think>b" EOS_TEXT
          "<｜User｜>c<｜Assistant｜><think>"), "terminal chat: %s", out.p);
    chat_free(&c);
    free(out.p);
    Str many = { 0 };                       // many results, in reverse order: no quadratic time
    str_puts(&many, "[{\"role\": \"assistant\", \"tool_calls\": [");
    for (int i = 0; i < 30000; i++) {
        char b[100];
        snprintf(b, sizeof b, "%s{\"id\": \"c%d\", \"function\": {\"name\": \"f\", \"arguments\": \"{}\"}}", i ? "," : "", i);
        str_puts(&many, b);
    }
    str_puts(&many, "]}");
    for (int i = 30000; i-- > 0;) {
        char b[100];
        snprintf(b, sizeof b, ",{\"role\": \"tool\", \"tool_call_id\": \"c%d\", \"content\": \"%d\"}", i, i);
        str_puts(&many, b);
    }
    str_puts(&many, "]");
    out = (Str){ 0 };
    c = (Chat){ 0 };
    str_puts(&out, "");
    double start = now();
    bool ok = chat_read(&c, &o, str_span(&many), "C", &e) && chat_render(&c, &o, &out, &e);
    check(ok && strstr(out.p, "<tool_result>0</tool_result>\n\n<tool_result>1</tool_result>"), "30000 results: %s", e.text);
    check(now() - start < 2, "30000 results took %.2f s", now() - start);
    chat_free(&c);
    free(out.p);
    free(many.p);
}

typedef struct { Str reasoning, content, calls; int n_calls; } Told;

static void on_event(void *arg, Event kind, Span text, Span arguments) {
    Told *t = arg;
    Str *s = kind == EV_REASONING ? &t->reasoning : kind == EV_CONTENT ? &t->content : &t->calls;
    if (kind == EV_CALL) {
        str_puts(s, "|");
        t->n_calls++;
    }
    str_add(s, text.p, text.n);
    str_add(s, arguments.p, arguments.n);
}

// Feeds a text in pieces of at most `step` bytes (whole characters; 0: random sizes).
static bool read_stream(Span s, bool thinking, size_t step, Told *told) {
    *told = (Told){ 0 };
    str_puts(&told->reasoning, "");
    str_puts(&told->content, "");
    str_puts(&told->calls, "");
    Reader r = { .state = thinking ? IN_REASONING : IN_CONTENT, .on_event = on_event, .arg = told };
    for (size_t i = 0, n; i < s.n; i += n) {
        size_t most = step ? step : 1 + rnd() % 12;
        n = 0;
        do {
            int32_t cp;
            n += utf8_next(s.p + i + n, s.n - i - n, &cp);
        } while (n < most && i + n < s.n);
        reader_feed(&r, (Span){ s.p + i, n });
    }
    bool whole = reader_finish(&r);
    reader_free(&r);
    return whole;
}

static void told_free(Told *t) {
    free(t->reasoning.p);
    free(t->content.p);
    free(t->calls.p);
}

static void parse_line(Json *j, void *arg) {
    (void)arg;
    Err e = { "" };
    Str key = { 0 }, name = { 0 }, text = { 0 }, content = { 0 }, reasoning = { 0 }, calls = { 0 };
    bool thinking = false, message = false;
    size_t n_calls = 0;
    str_puts(&calls, "");
    for (json_object(j); json_member(j, &key);) {
        if (same(&key, "name")) json_string(j, &name);
        else if (same(&key, "completion")) json_string(j, &text);
        else if (same(&key, "thinking")) json_bool(j, &thinking);
        else if (!same(&key, "message")) json_skip(j);
        else if (!json_null(j)) for (message = json_object(j); json_member(j, &key);) {
            if (same(&key, "content")) json_string(j, &content);
            else if (same(&key, "reasoning_content")) json_string(j, &reasoning);
            else if (!same(&key, "tool_calls")) json_skip(j);
            else for (json_array(j); json_item(j); n_calls++) {
                Str fn = { 0 }, fa = { 0 };
                for (json_object(j); json_member(j, &key);)
                    if (!same(&key, "function")) json_skip(j);
                    else for (json_object(j); json_member(j, &key);) json_string(j, same(&key, "name") ? &fn : &fa);
                str_puts(&calls, "|");
                str_puts(&calls, fn.p);
                str_puts(&calls, fa.p);
                free(fn.p);
                free(fa.p);
            }
        }
    }
    Reply r = { 0 };
    Str got = { 0 };
    str_puts(&got, "");
    bool ok = reply_parse(str_span(&text), thinking, &r, &e);
    check(ok == message, "parse %s: %d %s", name.p, ok, e.text);
    if (!ok) check(e.text[0], "parse %s: no message", name.p);
    if (ok && message) {
        for (size_t i = 0; i < r.n_calls; i++) {
            str_puts(&got, "|");
            str_puts(&got, r.calls[i].name.p);
            str_puts(&got, r.calls[i].arguments.p);
        }
        check(equal(&r.content, &content), "parse %s: content", name.p);
        check(equal(&r.reasoning, &reasoning), "parse %s: reasoning", name.p);
        check(same(&got, calls.p), "parse %s: %s, expected %s", name.p, got.p, calls.p);
        Span body = str_span(&text);        // EOS is a token, the stream has none
        size_t at = find(body, EOS_TEXT);
        if (at != SIZE_MAX) body.n = at;
        bool repaired = strstr(calls.p, "oops") != NULL;      // the strict reader passes bad JSON through
        for (size_t step = 0; step < 30; step++) {
            Told told;
            bool whole = read_stream(body, thinking, step, &told);
            check(whole && same(&told.content, content.p) && same(&told.reasoning, reasoning.p),
                  "stream %s by %zu: %s", name.p, step, told.content.p);
            if (!repaired) check(same(&told.calls, calls.p), "stream %s by %zu: %s", name.p, step, told.calls.p);
            told_free(&told);
        }
    }
    reply_free(&r);
    free(got.p);
    free(key.p);
    free(name.p);
    free(text.p);
    free(content.p);
    free(reasoning.p);
    free(calls.p);
}

#define CALL1 "<" DSML "tool_calls>\n<" DSML "invoke name=\"f\">\n<" DSML "parameter name=\"a\" string=\"true\">"
#define PARAM_END "</" DSML "parameter>"
#define CALL2 "\n</" DSML "invoke>\n" CALLS_END
static const struct { const char *text; bool thinking, whole; const char *reasoning, *content, *calls; } streams[] = {
    { "plain", false, true, "", "plain", "" },
    { "a < b\n\n< c <" "｜D", false, true, "", "a < b\n\n< c <" "｜D", "" },
    { "all reasoning, cut", true, true, "all reasoning, cut", "", "" },
    { "r</think>", true, true, "r", "", "" }, { "r</thin", true, true, "r</thin", "", "" },
    { "r</think>x</think>y", true, true, "r", "x</think>y", "" },
    { "x\n" CALL1 "v" PARAM_END CALL2, false, true, "", "x\n", "|f{\"a\": \"v\"}" },
    { "x\n\n\n" CALL1 "v" PARAM_END CALL2, false, true, "", "x\n", "|f{\"a\": \"v\"}" },
    { CALL1 "<b>\n</｜DSML｜x> \"q\"" PARAM_END CALL2 "\nmore", false, true, "", "\nmore", "|f{\"a\": \"<b>\\n</｜DSML｜x> \\\"q\\\"\"}" },
    { "\n\n<" DSML " tool_calls >\n < " DSML "invoke>\n<" DSML "invoke  name=\"g\"/>\n" CALLS_END, false, true, "", "", "|g{}" },
    { "\n\n<" DSML "invoke name=\"g\">\n<" DSML "parameter name=\"n\" string=\"false\"> 5 " PARAM_END "\n</" DSML "invoke>\n</" DSML
      " tool_calls >", false, true, "", "", "|g{\"n\":  5 }" },
    { CALL1 "v</" DSML "invoke>\n" CALLS_END, false, true, "", "", "|f{\"a\": \"v\"}" },
    { CALL1 "v" PARAM_END CALLS_END, false, true, "", "", "|f{\"a\": \"v\"}" },
    { CALL1 "v" PARAM_END "\n<" DSML "parameter name=\"a\" string=\"true\">w" PARAM_END CALL2, false, true, "", "", "|f{\"a\": \"v\"}" },
    { CALL1 "v" PARAM_END "\n<" DSML "parameter name=\"b\" string=\"false\">oops" PARAM_END CALL2, false, true, "", "",
      "|f{\"a\": \"v\", \"b\": \"oops\"}" },
    { CALL1 "cut", false, false, "", "", "" }, { "x\n\n" CALL1 "v" PARAM_END, false, false, "", "x", "" },
    { "see <" DSML "nothing> here", false, true, "", "see <" DSML "nothing> here", "" },
    { "see " DSML " here", false, true, "", "see " DSML " here", "" },
};

static void test_streams(void) {
    for (size_t i = 0; i < sizeof streams / sizeof *streams; i++)
        for (size_t step = 0; step < 40; step++) {
            Told told;
            bool whole = read_stream(span_of(streams[i].text), streams[i].thinking, step, &told);
            check(whole == streams[i].whole && same(&told.reasoning, streams[i].reasoning) &&
                  same(&told.content, streams[i].content) && same(&told.calls, streams[i].calls),
                  "stream %s by %zu: %d [%s] [%s] [%s]", streams[i].text, step, whole, told.reasoning.p,
                  told.content.p, told.calls.p);
            told_free(&told);
        }
}

// ---------------------------------------------------------------------------
// sampler

static void histogram(Sampling how, const float *logits, int n, int rounds, double *share) {
    Err e = { "" };
    Sampler *s = sampler_new(n, how, 42);
    for (int i = 0; i < n; i++) share[i] = 0;
    for (int i = 0; i < rounds; i++) {
        int id = sample(s, logits, &e);
        if (id >= 0 && id < n) share[id] += 1.0 / rounds;
        else check(false, "sample: %d %s", id, e.text);
    }
    sampler_free(s);
}

// Compares with the probabilities worked out by hand.
static void expect_shares(const char *what, Sampling how, const float *logits, int n, const double *want) {
    double share[8];
    histogram(how, logits, n, 200000, share);
    for (int i = 0; i < n; i++) {
        check(fabs(share[i] - want[i]) < 0.006, "%s: token %d drawn %.4f, expected %.4f", what, i, share[i], want[i]);
        check(want[i] > 0 || share[i] == 0, "%s: token %d must never come", what, i);
    }
}

static void test_sampler(void) {
    // p = 0.1, 0.4, 0.2, 0.3 at temperature 1
    const float logits[] = { logf(0.1f), logf(0.4f), logf(0.2f), logf(0.3f) };
    expect_shares("plain", (Sampling){ 1, 1, 0, 0 }, logits, 4, (double[]){ 0.1, 0.4, 0.2, 0.3 });
    expect_shares("T 0.5", (Sampling){ 0.5, 1, 0, 0 }, logits, 4, (double[]){ 1 / 30.0, 16 / 30.0, 4 / 30.0, 9 / 30.0 });
    expect_shares("T 0", (Sampling){ 0, 1, 0, 0 }, logits, 4, (double[]){ 0, 1, 0, 0 });
    expect_shares("T tiny", (Sampling){ 1e-300, 1, 0, 0 }, logits, 4, (double[]){ 0, 1, 0, 0 });
    expect_shares("top-k 2", (Sampling){ 1, 1, 0, 2 }, logits, 4, (double[]){ 0, 4 / 7.0, 0, 3 / 7.0 });
    expect_shares("top-k 1", (Sampling){ 1, 1, 0, 1 }, logits, 4, (double[]){ 0, 1, 0, 0 });
    expect_shares("top-k 9", (Sampling){ 1, 1, 0, 9 }, logits, 4, (double[]){ 0.1, 0.4, 0.2, 0.3 });
    expect_shares("top-p 0.69", (Sampling){ 1, 0.69, 0, 0 }, logits, 4, (double[]){ 0, 4 / 7.0, 0, 3 / 7.0 });
    expect_shares("top-p 0.71", (Sampling){ 1, 0.71, 0, 0 }, logits, 4, (double[]){ 0, 4 / 9.0, 2 / 9.0, 3 / 9.0 });
    expect_shares("top-p tiny", (Sampling){ 1, 1e-9, 0, 0 }, logits, 4, (double[]){ 0, 1, 0, 0 });
    expect_shares("top-k 3, top-p 0.7", (Sampling){ 1, 0.7, 0, 3 }, logits, 4, (double[]){ 0, 4 / 7.0, 0, 3 / 7.0 });
    expect_shares("min-p 0.45", (Sampling){ 1, 1, 0.45, 0 }, logits, 4, (double[]){ 0, 4 / 9.0, 2 / 9.0, 3 / 9.0 });
    expect_shares("min-p 1", (Sampling){ 1, 1, 1, 0 }, logits, 4, (double[]){ 0, 1, 0, 0 });
    expect_shares("min-p 0.6, top-k 3", (Sampling){ 1, 1, 0.6, 3 }, logits, 4, (double[]){ 0, 4 / 7.0, 0, 3 / 7.0 });
    const float ties[] = { -1, 5, 5, 5 };
    expect_shares("ties, T 0", (Sampling){ 0, 1, 0, 0 }, ties, 4, (double[]){ 0, 1, 0, 0 });
    expect_shares("ties, top-k 1", (Sampling){ 1, 1, 0, 1 }, ties, 4, (double[]){ 0, 1, 0, 0 });
    expect_shares("ties, top-k 2", (Sampling){ 1, 1, 0, 2 }, ties, 4, (double[]){ 0, 0.5, 0.5, 0 });
    const float extreme[] = { -3e38f, 3e38f, 0, -3e38f };
    expect_shares("extremes", (Sampling){ 1, 0.9, 0, 0 }, extreme, 4, (double[]){ 0, 1, 0, 0 });

    enum { V = 129280 };
    float *big = xalloc(V, sizeof *big), bad[] = { NAN, INFINITY, -INFINITY };
    for (int i = 0; i < V; i++) big[i] = (float)(rnd() % 100000) / 5000;
    Err e = { "" };
    Sampler *a = sampler_new(V, (Sampling){ 1, 0.95, 0.001, 0 }, 7);
    Sampler *b = sampler_new(V, (Sampling){ 1, 0.95, 0.001, 0 }, 7);
    double start = now();
    for (int i = 0; i < 20; i++) check(sample(a, big, &e) == sample(b, big, &e), "same seed, same tokens");
    double each = (now() - start) / 40;
    printf("# sampler: %.2f ms a token, vocabulary %d, top-p 0.95 over a flat row\n", each * 1e3, V);
    sampler_free(a);
    sampler_free(b);
    for (int i = 0; i < 3; i++) {
        big[V - 1] = bad[i];
        a = sampler_new(V, (Sampling){ i % 2, 0.95, 0.001, 0 }, 7);
        check(sample(a, big, &e) == -1 && strstr(e.text, "129279"), "logit %f: %s", (double)bad[i], e.text);
        sampler_free(a);
    }
    free(big);

    const struct { const char *text; bool ok; double temperature, top_p; int top_k; size_t n_eos; } configs[] = {
        { "{\"bos_token_id\": 0, \"eos_token_id\": 1, \"do_sample\": true, \"temperature\": 1.0, \"top_p\": 1.0}", true, 1, 1, 0, 1 },
        { "{\"eos_token_id\": [1, 5], \"temperature\": 0.6, \"top_p\": 0.95, \"top_k\": 20}", true, 0.6, 0.95, 20, 2 },
        { "{\"eos_token_id\": null, \"temperature\": null, \"do_sample\": false}", true, 0, 1, 0, 0 }, { "{}", true, 1, 1, 0, 0 },
        { "{\"eos_token_id\": 9}", false, 0, 0, 0, 0 }, { "{\"eos_token_id\": -1}", false, 0, 0, 0, 0 },
        { "{\"temperature\": -1}", false, 0, 0, 0, 0 }, { "{\"temperature\": NaN}", false, 0, 0, 0, 0 },
        { "{\"top_p\": 0}", false, 0, 0, 0, 0 }, { "{\"top_p\": 1.1}", false, 0, 0, 0, 0 }, { "{\"top_k\": -1}", false, 0, 0, 0, 0 },
        { "{\"min_p\": 2}", false, 0, 0, 0, 0 }, { "[]", false, 0, 0, 0, 0 }, { "{\"temperature\": \"1\"}", false, 0, 0, 0, 0 },
    };
    for (size_t i = 0; i < sizeof configs / sizeof *configs; i++) {
        Sampling how = sampling_default;
        Ids eos = { 0 };
        e.text[0] = 0;
        bool ok = read_generation_config(span_of(configs[i].text), "G", 9, &how, &eos, &e);
        check(ok == configs[i].ok && (ok || !strncmp(e.text, "G:", 2)), "%s: %d %s", configs[i].text, ok, e.text);
        if (ok) check(how.temperature == configs[i].temperature && how.top_p == configs[i].top_p &&
                      how.top_k == configs[i].top_k && eos.n == configs[i].n_eos, "%s: values", configs[i].text);
        free(eos.p);
    }
}

int main(int argc, char **argv) {
    Err e = { "" };
    Span file = { 0 };
    Tokenizer *t;
    if (argc < 2 || argc > 3) die(2, "usage: unit_text VECTORS_DIR [TOKENIZER_JSON]");
    test_json();
    test_utf8();
    test_faults();
    test_ranks();
    test_chats();
    test_streams();
    test_sampler();
    each_line(argv[1], "parse_vectors.jsonl", parse_line, NULL);
    if (argc == 2) each_line(argv[1], "chat_vectors.jsonl", chat_line, NULL);
    else {
        if (!map_file(argv[2], &file, &e)) die(1, "%s", e.text);
        double start = now();
        if (!(t = tok_load(file, argv[2], &e))) die(1, "%s", e.text);
        printf("# tokenizer: %d tokens in %.3f s\n", t->n, now() - start);
        each_line(argv[1], "vectors_public.jsonl", encode_line, t);
        each_line(argv[1], "decode_vectors.jsonl", decode_line, t);
        each_line(argv[1], "chat_vectors.jsonl", chat_line, t);
        test_long(t);
        tokenizer_close(t);
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
