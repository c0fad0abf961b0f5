// Drives the tokenizer over a pipe, for compare_tokenizers.py.  usage: tokenizer_pipe TOKENIZER_JSON
// Frames on stdin, native byte order: uint32 kind, uint32 n, then n bytes of text (kind 0: encode, added
// tokens recognised; 1: encode as plain text) or n int32 ids (2: decode, 3: decode without special
// tokens). Answer: uint32 n, then n int32 ids or n bytes.
#define DSV4_NO_MAIN
#include "../../dsv4.c"

static void put_answer(const void *p, size_t n, size_t size) {
    uint32_t count = (uint32_t)n;
    fwrite(&count, sizeof count, 1, stdout);
    if (n) fwrite(p, size, n, stdout);
}

int main(int argc, char **argv) {
    Err e = { "" };
    Span file = { 0 };
    Tokenizer *t;
    uint32_t frame[2];
    Ids ids = { 0 };
    Str text = { 0 };
    char *in = NULL;
    if (argc != 2) die(2, "usage: tokenizer_pipe TOKENIZER_JSON");
    if (!map_file(argv[1], &file, &e) || !(t = tok_load(file, argv[1], &e))) die(1, "%s", e.text);
    while (fread(frame, sizeof frame, 1, stdin) == 1) {
        size_t bytes = frame[1] * (frame[0] < 2 ? (size_t)1 : sizeof(int));
        in = realloc(in, bytes + 1);
        if (bytes && fread(in, bytes, 1, stdin) != 1) die(1, "input cut short");
        ids.n = text.n = 0;
        if (frame[0] < 2) {
            tok_encode(t, (Span){ in, bytes }, frame[0] == 0, &ids);
            put_answer(ids.p, ids.n, sizeof *ids.p);
        } else {
            Utf8 u = { 0 };
            for (uint32_t i = 0; i < frame[1]; i++) {
                int id;
                memcpy(&id, in + i * sizeof id, sizeof id);
                if (id < 0 || id >= tokenizer_control(t).n) die(1, "id %d out of range", id);
                tok_decode(t, id, frame[0] == 3, &u, &text);
            }
            utf8_finish(&u, &text);
            put_answer(text.p, text.n, 1);
        }
        fflush(stdout);
    }
    free(in);
    free(ids.p);
    free(text.p);
    tokenizer_close(t);
}
