// How answers are sampled: what the publisher recommends, and the options.
#include <limits.h>
#include <stdlib.h>
#include <time.h>
#include "dsv4.h"

const Sampling sampling_default = { 1, 1, 0, 0 };       // the publisher's recommendation

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

bool read_generation_config(Span text, const char *name, int vocab, Sampling *how, Ids *eos,
                            Err *e) {
    Generation g = { *how, true, eos, vocab };
    bool ok = table_file(text, name, generation_fields, COUNT(generation_fields), &g, e);
    *how = g.how;
    if (!g.do_sample) how->temperature = 0;
    return ok;
}

// Options, else the publisher's generation_config.json, else temperature 1 and the config's
// end-of-sentence token.
Sampler *sampler_open(const Config *c, const char *dir, Ids *eos) {
    Err e;
    Span text;
    Sampling how = sampling_default;
    char *path = text_of("%s/generation_config.json", dir);
    if (file_exists(path)) {
        if (!map_file(path, &text, &e) ||
            !read_generation_config(text, path, c->vocab, &how, eos, &e))
            die(1, "%s", e.text);
        unmap_file(text);
    }
    free(path);
    if (!eos->n && c->eos >= 0) ids_add(eos, c->eos);
    if (opt.temp >= 0) how.temperature = opt.temp;
    if (opt.top_k >= 0) how.top_k = opt.top_k;
    if (opt.top_p >= 0) how.top_p = opt.top_p;
    if (opt.min_p >= 0) how.min_p = opt.min_p;
    if (opt.seed < 0) opt.seed = (int64_t)time(NULL);
    if (how.temperature > 0)
        note("seed %lld, temperature %g, top-p %g", (long long)opt.seed, how.temperature,
             how.top_p);
    return sampler_new(c->vocab, how, (uint64_t)opt.seed);
}
