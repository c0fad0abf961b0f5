// Any bytes as JSON: skip and dump must agree, and what dump writes must read back to itself.
#define DSV4_NO_MAIN
#include "../dsv4.c"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    Err e;
    Str once = { 0 }, twice = { 0 };
    Span text = { (const char *)data, n };
    Json j = json_open(text, "fuzz", &e), k = json_open(text, "fuzz", &e);
    bool dumped = json_dump(&j, &once) && json_end(&j);
    bool skipped = json_skip(&k) && json_end(&k);
    if (dumped && !skipped) abort();
    k = json_open(str_span(&once), "fuzz", &e);
    if (dumped && !(json_dump(&k, &twice) && json_end(&k))) abort();
    if (dumped && (once.n != twice.n || memcmp(once.p, twice.p, once.n))) abort();
    free(once.p);
    free(twice.p);
    return 0;
}
