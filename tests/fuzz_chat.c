// The first byte says what the rest is: a chat to render, or a completion for both readers. However a
// completion is cut into pieces, the forgiving reader must tell the same.
#define DSV4_NO_MAIN
#include "../dsv4.c"

static void on_event(void *arg, Event kind, Span text, Span arguments) {
    Str *s = (Str *)arg + kind;
    str_add(s, text.p, text.n);
    if (kind == EV_CALL) str_add(s, arguments.p, arguments.n);
}

static bool stream(Span s, bool thinking, size_t step, Str *told) {
    Reader r = { .state = thinking ? IN_REASONING : IN_CONTENT, .on_event = on_event, .arg = told };
    for (size_t i = 0, n; i < s.n; i += n) {
        for (n = 0; i + n < s.n && n < step;) {
            int32_t cp;
            n += utf8_next(s.p + i + n, s.n - i - n, &cp);
        }
        reader_feed(&r, (Span){ s.p + i, n });
    }
    bool whole = reader_finish(&r);
    reader_free(&r);
    return whole;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    Err e = { "" };
    if (n == 0) return 0;
    Span text = { (const char *)data + 1, n - 1 };
    Str out = { 0 };
    if (data[0] & 1) {
        Chat c = { 0 };
        ChatOptions o = { .release_0731 = data[0] & 2, .thinking = data[0] & 4 };
        if (chat_read(&c, &o, text, "fuzz", &e)) chat_render(&c, &o, &out, &e);
        chat_free(&c);
    } else {
        Reply r = { 0 };
        Utf8 u = { 0 };
        Str told[2][3] = { { { 0 } } };
        bool thinking = data[0] & 4, ok[2];
        utf8_feed(&u, text, &out);
        utf8_finish(&u, &out);
        reply_parse(str_span(&out), thinking, &r, &e);
        reply_free(&r);
        for (int i = 0; i < 2; i++) ok[i] = stream(str_span(&out), thinking, i ? 1 + data[0] / 8 : SIZE_MAX, told[i]);
        if (ok[0] != ok[1]) abort();
        for (int k = 0; k < 3; k++) {
            if (told[0][k].n != told[1][k].n) abort();
            if (told[0][k].n && memcmp(told[0][k].p, told[1][k].p, told[0][k].n)) abort();
            free(told[0][k].p);
            free(told[1][k].p);
        }
    }
    free(out.p);
    return 0;
}
