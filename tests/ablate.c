// What carries the small model's recall: its answers while parts of the compressed attention are hidden.
//
//   ablate MODEL CONDITION < ITEMS
//
// A line of ITEMS is group TAB prompt TAB answer, as text with its chat tokens. Every answer is read after its prompt; a
// group's output line is: group, answers, those whose every token is the argmax, tokens, their summed -log p in nats.
// CONDITION: nothing, csa, hca, both (these compressed rows are seen by no query), random (the indexer's choice is drawn).
#define DSV4_NO_MAIN
#include "../dsv4.c"

static bool hidden[129];        // by a layer's ratio: 4 CSA, 128 HCA
static bool drawn;              // the indexer chooses at random

// As the CPU's; with a ratio beyond every context no compressed window is complete, so only the sliding window is seen.
static void attend_visible(Device *d, const Layer *l, int i) {
    Layer seen = *l;
    if (hidden[l->ratio]) seen.ratio = 1 << 30;
    cpu_attend(d, &seen, i);
}

// As the CPU's, but the choice is a random subset of the same size, every subset equally likely: ascending indices.
static void index_drawn(Device *d, const Layer *l, int i) {
    static uint64_t x = 1;
    Run *r = d->impl;
    cpu_index_topk(d, l, i);
    for (int t = 0; drawn && t < r->T; t++) {
        int *top = r->top + (size_t)t * d->c->index_topk, left = n_visible(r->rows[t].pos, 4), need = r->n_top[t];
        for (int w = 0, m = 0; need > 0; w++, left--) {
            x = x * 6364136223846793005u + 1442695040888963407u;
            if ((int)((x >> 33) % (uint64_t)left) >= need) continue;
            top[m++] = w;
            need--;
        }
    }
}

typedef struct { char name[32]; int items, hits, tokens; double nats; } Group;

typedef struct { const int *tokens; int first, vocab, wrong; double nats; } Answer;

// Counts the rows that predict the answer's tokens, which begin at position `first`.
static void answer_sink(void *arg, int pos, int n, const float *logits, const float *mtp) {
    Answer *a = arg;
    (void)mtp;
    for (int i = 0; i < n; i++) {
        const float *x = logits + (size_t)i * a->vocab;
        int next = a->tokens[pos + i + 1], best = argmax(x, a->vocab);
        double sum = 0;
        if (pos + i + 1 < a->first) continue;
        for (int v = 0; v < a->vocab; v++) sum += exp((double)x[v] - x[best]);
        a->nats += x[best] - x[next] + log(sum);
        a->wrong += next != best;
    }
}

static void read_item(Session *s, const Tokenizer *t, char *line, Group *groups, int max) {
    char *rest = line, *name = strsep(&rest, "\t"), *prompt = strsep(&rest, "\t"), *answer = strsep(&rest, "\n");
    Ids ids = { 0 };
    if (!answer || strlen(name) >= sizeof groups->name) die(2, "not an item: %s", line);
    Group *g = groups;
    while (g < groups + max && *g->name && strcmp(g->name, name)) g++;
    if (g == groups + max) die(2, "too many groups");
    snprintf(g->name, sizeof g->name, "%s", name);
    tok_encode(t, (Span){ prompt, strlen(prompt) }, true, &ids);
    Answer a = { .first = (int)ids.n, .vocab = s->m->c.vocab };
    tok_encode(t, (Span){ answer, strlen(answer) }, true, &ids);
    a.tokens = ids.p;
    session_clear(s);
    session_feed(s, ids.p, (int)ids.n - 1, &(Feed){ .sink = answer_sink, .arg = &a });
    g->items++;
    g->hits += !a.wrong;
    g->tokens += (int)ids.n - a.first;
    g->nats += a.nats;
    free(ids.p);
}

int main(int argc, char **argv) {
    if (argc != 3) die(2, "usage: ablate MODEL nothing|csa|hca|both|random < ITEMS");
    bool both = !strcmp(argv[2], "both");
    hidden[4] = both || !strcmp(argv[2], "csa");
    hidden[128] = both || !strcmp(argv[2], "hca");
    drawn = !strcmp(argv[2], "random");
    if (!hidden[4] && !hidden[128] && !drawn && strcmp(argv[2], "nothing")) die(2, "unknown condition %s", argv[2]);
    opt.open.dir = argv[1];
    cpu_init();
    Opening o = { .dir = argv[1], .threads = 2, .chunk = 256, .devices = "cpu" };
    Ops ops = cpu_ops;
    ops.index_topk = index_drawn;
    ops.attend = attend_visible;
    Model *m = model_read(&o);
    model_start(m, &o);
    m->stage[0].op = &ops;
    Tokenizer *t = tokenizer_open(argv[1], true);
    Session *s = session_new(m);
    Group groups[16] = { 0 };
    char *line = NULL;
    size_t size = 0;
    while (getline(&line, &size, stdin) > 0) read_item(s, t, line, groups, COUNT(groups));
    for (Group *g = groups; g < groups + COUNT(groups) && g->items; g++)
        printf("%s\t%d\t%d\t%d\t%.6f\n", g->name, g->items, g->hits, g->tokens, g->nats);
    free(line);
    session_free(s);
    tokenizer_close(t);
    return 0;
}
