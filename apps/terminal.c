// Prompts and answers: dsv4 -p, the chat in the terminal, dsv4 tokenize.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "dsv4.h"

// All bytes of a file, or of standard input for "-".
Str read_text(const char *path) {
    char buf[65536];
    Str s = { 0 };
    ssize_t n;
    bool is_file = strcmp(path, "-") != 0;
    int fd = is_file ? open(path, O_RDONLY | O_CLOEXEC) : 0;
    while ((n = fd < 0 ? -1 : read(fd, buf, sizeof buf)) > 0 || (n < 0 && errno == EINTR))
        str_add(&s, buf, n > 0 ? (size_t)n : 0);
    if (n < 0) die(1, "%s: %s", is_file ? path : "standard input", strerror(errno));
    if (is_file) close(fd);
    str_add(&s, "", 0);
    return s;
}

// stdout may be closed or full: the loss of text must not look like success.
void flush_out(void) {
    if (fflush(stdout) || ferror(stdout)) die(1, "standard output: %s", strerror(errno));
}

// --- prompts as token ids

static ChatOptions chat_options(bool dspark) {
    ChatOptions o = { .thinking = opt.think, .release_0731 = dspark };
    if (opt.encoding) o.release_0731 = !strcmp(opt.encoding, "0731");
    if (opt.effort)
        o.effort = *opt.effort == 'l' ? EFFORT_LOW : *opt.effort == 'h' ? EFFORT_HIGH : EFFORT_MAX;
    return o;
}

// Appends a user's turn up to where the answer begins: for the first turn the begin of sentence,
// effort and system text too. Only the encoding's own tags are tokens; whatever the texts hold is
// text. Tags cut the text in any case, so the ids are the same as those of the whole prompt where
// the texts hold no tags.
static void encode_turn(const Tokenizer *t, ChatOptions o, bool first, Span user, Ids *ids) {
    Err e;
    Chat chat = { 0 };
    Str text = { 0 };
    Control c = tokenizer_control(t);
    o.no_bos = !first;
    if (first && opt.system) chat_say(&chat, ROLE_SYSTEM, span_of(opt.system), (Span){ 0 }, false);
    chat_say(&chat, ROLE_USER, (Span){ 0 }, (Span){ 0 }, false);
    if (!first) o.effort = EFFORT_NONE;
    if (!chat_render(&chat, &o, &text, &e)) die(2, "%s", e.text);
    size_t bos = first ? strlen(BOS_TEXT) : 0;
    size_t tags = strlen("<｜User｜><｜Assistant｜>") + strlen(opt.think ? "<think>" : "</think>");
    const char *at = text.p + text.n - tags;                    // <｜User｜> HERE <｜Assistant｜>...
    if (first) ids_add(ids, c.bos);
    tok_encode(t, (Span){ text.p + bos, (size_t)(at - text.p) - bos }, false, ids);
    ids_add(ids, c.user);
    tok_encode(t, user, false, ids);
    ids_add(ids, c.assistant);
    ids_add(ids, opt.think ? c.think : c.end_think);
    chat_free(&chat);
    free(text.p);
}

// A file of messages -> the whole prompt's ids, tags in it recognised as the publisher does.
static void encode_messages(const Tokenizer *t, Span file, Ids *ids) {
    Err e;
    Chat chat = { 0 };
    Str text = { 0 };
    ChatOptions o = chat_options(false);
    if (!chat_read(&chat, &o, file, opt.chat, &e) || !chat_render(&chat, &o, &text, &e))
        die(1, "%s", e.text);
    tok_encode(t, str_span(&text), true, ids);
    chat_free(&chat);
    free(text.p);
}

// Ids from text, separated by commas or white space, each below `end`.
static void parse_ids(const char *what, int code, Span text, int end, Ids *ids) {
    static const char space[] = " \n\t\r";
    const char *p = text.p + strspn(text.p, space);
    while (*p) {
        char *stop;
        errno = 0;
        long id = strtol(p, &stop, 10);
        const char *next = stop + strspn(stop, space);
        bool comma = *next == ',';
        if (comma) next += 1 + strspn(next + 1, space);
        if (*p < '0' || *p > '9' || (next == stop && *stop) || (comma && !*next))
            die(code, "%s: expected numbers and commas, found '%.20s'", what, p);
        if (errno || id >= end)
            die(code, "%s: %.*s: the vocabulary ends at %d", what, (int)(stop - p), p, end - 1);
        ids_add(ids, (int)id);
        p = next;
    }
    if (p != text.p + text.n) die(code, "%s: expected numbers, found a NUL byte", what);
}

// The tokenizer may know more tokens than the model. False, with a note: the model cannot read
// this.
bool check_vocab(const Model *m, const Ids *ids) {
    int vocab = model_brief(m).config->vocab;
    for (size_t i = 0; i < ids->n; i++) {
        if (ids->p[i] < vocab) continue;
        note("token %d is beyond the model's vocabulary of %d: the tokenizer is another model's",
             ids->p[i], vocab);
        return false;
    }
    return true;
}

// --- dsv4 tokenize

int run_tokenize(void) {
    Tokenizer *t = tokenizer_open(opt.open.dir, true);
    Str in = read_text(opt.chat ? opt.chat : "-"), out = { 0 };
    Ids ids = { 0 };
    Utf8 utf8 = { 0 };
    if (opt.decode) parse_ids("--decode", 1, str_span(&in), tokenizer_control(t).n, &ids);
    else if (opt.chat) encode_messages(t, str_span(&in), &ids);
    else tok_encode(t, str_span(&in), !opt.plain, &ids);
    for (size_t i = 0; i < ids.n; i++) {
        if (opt.decode) tok_decode(t, ids.p[i], false, &utf8, &out);
        else printf(i ? " %d" : "%d", ids.p[i]);
    }
    utf8_finish(&utf8, &out);
    if (opt.decode) fwrite(out.p, 1, out.n, stdout);
    else puts("");
    free(in.p), free(out.p), free(ids.p);
    tokenizer_close(t);
    return 0;
}

// --- generating

// What answers prompts.
typedef struct {
    Tokenizer *t;               // NULL: there is none, and ids are enough
    Control control;
    Model *m;
    ModelBrief brief;
    const Config *config;
    Session *s;
    Sampler *sampler;
    Ids eos;                    // the tokens that end an answer
    Snapshot *snap;             // of a chat
    double begun;               // this prompt: when; how many tokens of it were in place already,
    int reused, read;           // and how many were read
} Talk;

// Everything but the weights, so that a wrong prompt is known before they load.
static Talk talk_open(void) {
    const char *dir = opt.open.dir;
    Talk k = { .m = model_read(&opt.open) };
    k.t = tokenizer_open(dir, !opt.ids);
    if (k.t) k.control = tokenizer_control(k.t);
    k.brief = model_brief(k.m);
    k.config = k.brief.config;
    if (k.control.n > k.config->vocab)
        note("the tokenizer has %d tokens, the model %d", k.control.n, k.config->vocab);
    k.sampler = sampler_open(k.config, dir, &k.eos);
    return k;
}

static void talk_start(Talk *k) {
    model_start(k->m, &opt.open);
    k->s = session_new(k->m);
    computing = true;
}

static void talk_close(Talk *k) {
    snapshot_free(k->snap);
    session_free(k->s);
    sampler_free(k->sampler);
    free(k->eos.p);
    tokenizer_close(k->t);
}

// Makes the prompt what the session has read. In a chat a snapshot is taken before its last token,
// which is where the next prompt departs from this one. False if interrupted.
static bool read_prompt(Talk *k, const Ids *p, Feed feed, bool chat) {
    int n = (int)p->n;
    k->begun = now();
    k->reused = k->read = session_reuse(k->s, p->p, n, k->snap);
    feed.progress = true;
    if (chat) {
        k->read += session_feed(k->s, p->p + k->read, n - 1 - k->read, &feed);
        snapshot_free(k->snap);
        k->snap = session_snapshot(k->s);
    }
    if (!interrupted) k->read += session_feed(k->s, p->p + k->read, n - k->read, &feed);
    return k->read == n;
}

// Prints tokens as they come: ids, or text with the reasoning on standard error.
typedef struct {
    const Tokenizer *t;
    Control control;
    bool ids, reasoning;
    bool printed;               // something since the last line end
    Utf8 utf8;
    Ids answer;                 // the tokens after the reasoning
} Printer;

static void print_text(const Printer *p, Str text) {
    FILE *to = p->reasoning ? stderr : stdout;
    if (text.n) fwrite(text.p, 1, text.n, to);
    free(text.p);
    if (to == stderr) fflush(stderr);
    else flush_out();
}

// Ends what is being printed, the reasoning or all.
static void print_end(Printer *p) {
    Str text = { 0 };
    utf8_finish(&p->utf8, &text);
    if (p->printed) str_puts(&text, "\n");
    print_text(p, text);
    p->printed = p->reasoning = false;
}

static void print_token(Printer *p, int token) {
    Str text = { 0 };
    char id[16];
    if (p->reasoning && token == p->control.end_think) {
        print_end(p);
        return;
    }
    if (!p->reasoning) ids_add(&p->answer, token);
    snprintf(id, sizeof id, p->printed ? " %d" : "%d", token);
    if (p->ids) str_puts(&text, id);
    else if (token < p->control.n) tok_decode(p->t, token, true, &p->utf8, &text);   // else: no text
    p->printed = true;
    print_text(p, text);
}

static bool is_in(const Ids *ids, int token) {
    for (size_t i = 0; i < ids->n; i++) if (ids->p[i] == token) return true;
    return false;
}

// Generates until end-of-sentence, -n tokens, the end of the context or Ctrl-C; the last token is
// not read back. Then the line of timings.
static void answer(Talk *k, Printer *p) {
    Err e;
    int n = 0, steps = 0;
    double start = now(), first = 0;
    while (n != opt.tokens && !interrupted) {
        int token = sample(k->sampler, k->s->logits, &e);
        if (token < 0) die(1, "%s", e.text);
        if (!first) first = now();
        if (is_in(&k->eos, token)) break;
        print_token(p, token);
        if (++n == opt.tokens || k->s->n == k->brief.ctx) break;
        steps += session_feed(k->s, &token, 1, &(Feed){ 0 });
    }
    double t = now() - first, t_prompt = start - k->begun;
    int read = k->read - k->reused;
    char reused[64] = "";
    print_end(p);
    if (k->reused) snprintf(reused, sizeof reused, " (and %d in place)", k->reused);
    note("prompt %d tokens%s, %.1f tok/s; generated %d tokens, %.1f tok/s; first token after %.2f "
         "s", read, reused, read / t_prompt, n, steps ? steps / t : 0,
         first ? first - k->begun : 0);
}

// Where the prompt's logits go, row by row: --logits, --mtp-logits.
typedef struct { const char *path[2]; FILE *file[2]; int vocab; } LogitsOut;

static void logits_sink(void *arg, int pos, int n, const float *logits, const float *mtp) {
    LogitsOut *o = arg;
    const float *from[2] = { logits, mtp };
    size_t count = (size_t)n * (size_t)o->vocab;
    (void)pos;
    for (int i = 0; i < 2; i++)
        if (o->file[i] && fwrite(from[i], sizeof(float), count, o->file[i]) != count)
            die(1, "%s: %s", o->path[i], strerror(errno));
}

// The prompt of the options as ids.
static void encode_prompt(const Talk *k, Span text, Ids *ids) {
    int ctx = k->brief.ctx;
    if (opt.ids) {
        parse_ids("--ids", 2, text, k->config->vocab, ids);
    } else if (opt.raw) {
        ids_add(ids, k->control.bos);
        tok_encode(k->t, text, true, ids);
    } else {
        encode_turn(k->t, chat_options(k->config->dspark), true, text, ids);
    }
    if (!ids->n) die(2, "--ids: no ids");
    if (ids->n > (size_t)ctx)
        die(1, "the prompt has %zu tokens, the context holds %d (-c; this model reads up to %d)",
            ids->n, ctx, k->config->max_ctx);
    if (!check_vocab(k->m, ids)) die(1, "the prompt does not fit the model's vocabulary");
}

// Answers one prompt.
int run_prompt(void) {
    Ids ids = { 0 };
    Str text = { 0 };
    if (opt.file) text = read_text(opt.file);
    else str_puts(&text, opt.ids ? opt.ids : opt.prompt);
    if (!text.n && !opt.ids) die(2, "the prompt is empty");
    Talk k = talk_open();
    encode_prompt(&k, str_span(&text), &ids);
    if (opt.mtp_logits && !k.brief.mtp) die(1, "--mtp-logits: this checkpoint has no MTP layer");
    LogitsOut out = { .path = { opt.logits, opt.mtp_logits }, .vocab = k.config->vocab };
    for (int i = 0; i < 2; i++)
        if (out.path[i] && !(out.file[i] = fopen(out.path[i], "wb")))
            die(1, "%s: %s", out.path[i], strerror(errno));
    talk_start(&k);
    bool wanted = opt.logits || opt.mtp_logits;
    Feed feed = { wanted ? logits_sink : NULL, &out, .mtp = opt.mtp_logits };
    read_prompt(&k, &ids, feed, false);
    for (int i = 0; i < 2; i++)
        if (out.file[i] && fclose(out.file[i])) die(1, "%s: %s", out.path[i], strerror(errno));
    Printer p = { .t = k.t, .control = k.control, .ids = opt.ids || opt.show_ids,
                  .reasoning = opt.think && !opt.ids && !opt.raw };
    answer(&k, &p);
    talk_close(&k);
    free(ids.p), free(text.p), free(p.answer.p);
    return interrupted ? 130 : 0;
}

// One line, or several joined by a '\' at their ends. False at the end of the input.
static bool read_turn(Str *line) {
    char *buf = NULL;
    size_t cap = 0;
    ssize_t n;
    line->n = 0;
    do {
        if (isatty(0)) fputs(line->n ? ". " : "> ", stderr);
        n = getline(&buf, &cap, stdin);
        if (n > 0 && buf[n - 1] == '\n') n--;
        if (line->n && n >= 0) line->p[line->n - 1] = '\n';     // was the backslash
        if (n > 0) str_add(line, buf, (size_t)n);
    } while (n > 0 && line->p[line->n - 1] == '\\');
    free(buf);
    return n >= 0 || (line->n && !interrupted);
}

// One turn of a conversation, whose ids so far are `ids`: the very ids of the answers, so only what
// is new is read, and old reasoning is dropped by going back to the snapshot before it.
static void chat_turn(Talk *k, Span user, Ids *ids) {
    size_t past = ids->n;
    encode_turn(k->t, chat_options(k->config->dspark), !past, user, ids);
    bool fits = ids->n < (size_t)k->brief.ctx;
    if (!fits)
        note("the conversation has %zu tokens, the context holds %d: /new starts again", ids->n,
             k->brief.ctx);
    if (!fits || !check_vocab(k->m, ids)) {
        ids->n = past;
        return;
    }
    Printer p = { .t = k->t, .control = k->control, .ids = opt.show_ids,
                  .reasoning = opt.think };
    read_prompt(k, ids, (Feed){ 0 }, true);
    answer(k, &p);
    ids->p[ids->n - 1] = k->control.end_think;       // closes the <think> of this prompt
    for (size_t i = 0; i < p.answer.n; i++) ids_add(ids, p.answer.p[i]);
    ids_add(ids, k->control.eos);
    free(p.answer.p);
}

// A conversation in the terminal. Ctrl-C stops the answer.
int run_chat(void) {
    Talk k = talk_open();
    Ids ids = { 0 };
    Str line = { 0 };
    talk_start(&k);
    note("chat: an empty line is ignored, '\\' at a line's end goes on, /new forgets, Ctrl-C stops "
         "an answer, Ctrl-D leaves");
    for (bool again = false; !terminated;) {
        interrupted = 0;
        if (read_turn(&line)) {
            again = false;
            if (span_is(str_span(&line), "/new")) ids.n = 0;
            else if (line.n) chat_turn(&k, str_span(&line), &ids);
            continue;
        }
        if (!interrupted || again) break;       // the end of the input, or Ctrl-C twice
        again = true;
        clearerr(stdin);
        note("Ctrl-C again or Ctrl-D leaves");
    }
    talk_close(&k);
    free(ids.p), free(line.p);
    return interrupted ? 130 : 0;
}
