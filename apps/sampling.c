// How answers are sampled: what the publisher recommends, the options, and the sampler.
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
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

// ---------------------------------------------------------------------------
// The sampler: one token out of a row of logits. In this order: temperature, top-k, top-p over what
// top-k left, min-p relative to the likeliest token. Ties go to the lower id.

struct Sampler {
    Sampling how;
    uint64_t state;         // of the random numbers: any seed will do
    int n;                  // vocabulary
    double *p;              // [n] exp((logit - max) / temperature)
    int *kept;              // [n] what top-k and top-p leave, the likeliest first
    Heap heap;
};

Sampler *sampler_new(int n, Sampling how, uint64_t seed) {
    Sampler *s = xalloc(1, sizeof *s);
    size_t v = (size_t)n;
    *s = (Sampler){ how, seed, n, xalloc(v, sizeof *s->p), xalloc(v, sizeof *s->kept), { 0 } };
    return s;
}

void sampler_free(Sampler *s) {
    free(s->p);
    free(s->kept);
    free(s->heap.p);
    free(s);
}

// A uniform number in [0, 1): SplitMix64 (Steele, Lea and Flood, 2014).
double random_unit(uint64_t *state) {
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
