// Any bytes as tokenizer.json. If it loads, the file itself is encoded and decoded: nothing may be lost.
#define DSV4_NO_MAIN
#include "../dsv4.c"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    Err e;
    Span file = { (const char *)data, n };
    Tokenizer *t = tok_load(file, "fuzz", &e);
    if (!t) return 0;
    for (int special = 0; special < 2; special++) {
        Ids ids = { 0 };
        Str fixed = { 0 }, text = { 0 };
        Utf8 u = { 0 }, whole = { 0 };
        utf8_feed(&whole, file, &fixed);
        utf8_finish(&whole, &fixed);
        tok_encode(t, file, special, &ids);
        for (size_t i = 0; i < ids.n; i++) tok_decode(t, ids.p[i], false, &u, &text);
        utf8_finish(&u, &text);
        if (text.n != fixed.n || memcmp(text.p, fixed.p, text.n)) abort();
        free(ids.p);
        free(fixed.p);
        free(text.p);
    }
    tokenizer_close(t);
    return 0;
}
