// DeepSeek-V4's tokenizer.json, byte-level BPE behind a four-step pre-tokenizer.
// Added tokens are found by their content; nothing here knows an id.
#include <limits.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include "dsv4.h"

void ids_add(Ids *ids, int id) {
    ids->p = grow(ids->p, ids->n, sizeof *ids->p);
    ids->p[ids->n++] = id;
}

enum { TOKEN_BYTES = 4096 };       // of one token at most

typedef struct { uint8_t byte; int child, next, id; } Node; // of a trie: next sibling; token or -1

struct Tokenizer {
    int n;                      // tokens
    Str bytes;                  // the tokens' bytes, one after the other
    size_t *start;              // [n + 1] where each begins
    uint8_t *flags;             // [n] of enum below
    int byte_id[256];           // the token of each single byte
    Map merges;                 // left and right id, as 8 bytes -> rank << 32 | id of both together
    Node *nodes;                // added tokens; root 0: not `normalized`, root 1: the others
    int n_nodes;
    uint8_t *cls;               // [N_CLASSES] class of each code point; C_OTHER above
    int bos, eos, user, assistant, think, end_think;
};

enum { TOK_ADDED = 1, TOK_SPECIAL = 2, TOK_NORMALIZED = 4 };

// The bytes of a token. The id must be in 0 .. n-1.
static Span tok_bytes(const Tokenizer *t, int id) {
    return (Span){ t->bytes.p + t->start[id], t->start[id + 1] - t->start[id] };
}

void tokenizer_close(Tokenizer *t) {
    if (!t) return;
    free(t->bytes.p);
    free(t->start);
    free(t->flags);
    map_free(&t->merges);
    free(t->nodes);
    free(t->cls);
    free(t);
}

// ---- loading

typedef struct {
    Map vocab;                  // text -> id
    Map added;                  // text -> id | flags << 32
    Span merges;                // read when the vocabulary is known
} TokFile;

// Adds a token's text to one of the two maps.
static void load_token(Json *j, Map *to, const Str *text, int64_t value) {
    if (!text->n || text->n > TOKEN_BYTES)
        json_fail(j, "token \"%.*s\": %zu bytes, not 1 to %d", SHOWN(*text), text->n, TOKEN_BYTES);
    else if (!j->bad && !map_add(to, str_span(text), value))
        json_fail(j, "token \"%.*s\" is there twice", SHOWN(*text));
}

static void load_vocab(Json *j, void *to) {
    Str text = { 0 };
    int64_t id = 0;
    for (json_object(j); json_member(j, &text);) {
        const char *outer = j->at;
        j->at = text.p;                     // an error of the id names its token
        json_int(j, 0, INT_MAX, &id);
        j->at = outer;
        load_token(j, &((TokFile *)to)->vocab, &text, id);
    }
    free(text.p);
}

typedef struct { int id; Str content; bool special, normalized; } Added;
static const Field added_fields[] = {
    { "id", J_INT, NEEDED, offsetof(Added, id), .lo = 0, .hi = INT_MAX },
    { "content", J_TEXT, NEEDED, .at = offsetof(Added, content) },
    { "special", J_BOOL, NEEDED, .at = offsetof(Added, special) },
    { "normalized", J_BOOL, NEEDED, .at = offsetof(Added, normalized) },
    { "single_word", J_FIXED, NEEDED, .values = { "false" } },
    { "lstrip", J_FIXED, NEEDED, .values = { "false" } },
    { "rstrip", J_FIXED, NEEDED, .values = { "false" } },
    { "*", .kind = J_FIXED },           // nothing else
};

static void load_added(Json *j, void *to) {
    for (json_array(j); json_item(j);) {
        Added a = { 0 };
        table_read(j, added_fields, COUNT(added_fields), &a);
        int64_t flags = TOK_ADDED;
        if (a.special) flags |= TOK_SPECIAL;
        if (a.normalized) flags |= TOK_NORMALIZED;
        load_token(j, &((TokFile *)to)->added, &a.content, a.id | flags << 32);
        free(a.content.p);
    }
}

#define STEP(i) "pre_tokenizer.pretokenizers[" #i "]"
#define SPLIT(i, regex) \
    { STEP(i) ".type", J_FIXED, NEEDED, .values = { "\"Split\"" } }, \
    { STEP(i) ".pattern.Regex", J_FIXED, NEEDED, .values = { "\"" regex "\"" } }, \
    { STEP(i) ".behavior", J_FIXED, NEEDED, .values = { "\"Isolated\"" } }, \
    { STEP(i) ".invert", J_FIXED, NEEDED, .values = { "false" } }

// What makes the file DeepSeek-V4's. Vocabulary, merges and added tokens are free.
static const Field tokenizer_fields[] = {
    { "added_tokens", J_READ, NEEDED, .read = load_added },
    { "model.type", J_FIXED, NEEDED, .values = { "\"BPE\"" } },
    { "model.vocab", J_READ, NEEDED, .read = load_vocab },
    { "model.merges", J_RAW, NEEDED, .at = offsetof(TokFile, merges) },
    { "model.*", J_FIXED, .values = { "false", "\"\"" } },      // all other options off
    { "normalizer.type", J_FIXED, WITHIN, .values = { "\"Sequence\"" } },
    { "normalizer.normalizers", J_FIXED, WITHIN, .values = { "[]" } },
    { "normalizer.*", .kind = J_FIXED },
    { "pre_tokenizer.type", J_FIXED, NEEDED, .values = { "\"Sequence\"" } },
    SPLIT(0, "\\p{N}{1,3}"),
    SPLIT(1, "[一-龥\u3040-ゟ゠-ヿ]+"),
    SPLIT(2, "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
             "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*"
             "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"),
    { STEP(3) ".type", J_FIXED, NEEDED, .values = { "\"ByteLevel\"" } },
    { STEP(3) ".add_prefix_space", J_FIXED, NEEDED, .values = { "false" } },
    { STEP(3) ".trim_offsets", J_FIXED, NEEDED, .values = { "true" } },
    { STEP(3) ".use_regex", J_FIXED, NEEDED, .values = { "false" } },
    { "pre_tokenizer.*", .kind = J_FIXED },
    // what else these two hold changes no byte
    { "decoder.type", J_FIXED, NEEDED, .values = { "\"ByteLevel\"" } },
    { "post_processor.type", J_FIXED, WITHIN, .values = { "\"ByteLevel\"" } },
    { "truncation", J_FIXED, .values = { "null" } },
    { "padding", J_FIXED, .values = { "null" } },
};

// Who has which id: text [n] as in the file. Ids must be 0 .. n-1 without a gap, each of one text.
static bool claim_ids(Tokenizer *t, const TokFile *l, Span *text, const char *name, Err *e) {
    for (size_t i = 0; i < l->vocab.n + l->added.n; i++) {
        bool is_added = i >= l->vocab.n;
        const Map *m = is_added ? &l->added : &l->vocab;
        const MapEntry *own = &m->entries[is_added ? i - l->vocab.n : i];
        Span key = { m->text.p + own->at, own->n };
        size_t id = own->value & UINT32_MAX;
        // a text in both lists is one token
        const MapEntry *twin = is_added ? map_find(&l->vocab, key) : NULL;
        if (twin && twin->value != (int64_t)id)
            return fail(e, "%s: added token \"%.*s\" has id %zu, the vocabulary says %lld", name,
                        SHOWN(key), id, (long long)twin->value);
        if (id >= (size_t)t->n)
            return fail(e, "%s: token \"%.*s\" has id %zu of %d tokens: a gap in the ids", name,
                        SHOWN(key), id, t->n);
        if (!twin && text[id].p)
            return fail(e, "%s: id %zu belongs to \"%.*s\" and to \"%.*s\"", name, id,
                        SHOWN(text[id]), SHOWN(key));
        text[id] = key;
        t->flags[id] = (uint8_t)(own->value >> 32);
    }
    return true;
}

// The letter that stands for a byte in tokenizer.json: printable Latin-1 for itself, the other 68
// bytes in order from U+0100 on.
static uint32_t byte_letter(uint32_t b) {
    if (b <= 0x20) return 0x100 + b;
    if (b >= 0x7f && b <= 0xa0) return 0x100 + 33 + b - 0x7f;
    return b == 0xad ? 0x143 : b;
}

// Gives every id its bytes, and every byte its id.
static bool load_bytes(Tokenizer *t, const Map *vocab, const Span *text, const char *name, Err *e) {
    int letter[0x144];                      // -> byte, -1: none
    memset(letter, -1, sizeof letter);
    for (uint32_t b = 0; b < 256; b++) {
        Str s = { 0 };
        utf8_put(&s, byte_letter(b));
        const MapEntry *found = map_find(vocab, str_span(&s));
        free(s.p);
        if (!found) return fail(e, "%s: no token for the single byte 0x%02x", name, b);
        t->byte_id[b] = (int)found->value;
        letter[byte_letter(b)] = (int)b;
    }
    for (int id = 0; id < t->n; id++) {
        Span s = text[id];
        if (t->flags[id]) str_add(&t->bytes, s.p, s.n);
        else for (size_t i = 0; i < s.n;) {
            int32_t cp;
            i += utf8_next(s.p + i, s.n - i, &cp);
            if (cp >= 0x144 || letter[cp] < 0)
                return fail(e, "%s: token \"%.*s\" holds U+%04X, which stands for no byte", name,
                            SHOWN(s), cp);
            str_add(&t->bytes, &(char){ (char)letter[cp] }, 1);
        }
        t->start[id + 1] = t->bytes.n;
    }
    return true;
}

// One merge, "left right" or ["left", "right"].
static bool read_merge(Json *j, Str *left, Str *right) {
    right->n = 0;
    if (json_peek(j) == '[')
        return (json_array(j) && json_item(j) && json_string(j, left) && json_item(j) &&
                json_string(j, right) && !json_item(j) && !j->bad) ||
               json_expected(j, "two strings");
    if (!json_string(j, left)) return false;
    char *space = memchr(left->p, ' ', left->n);
    if (!space) return json_fail(j, "merge \"%.*s\" without a space", SHOWN(*left));
    str_add(right, space + 1, left->n - (size_t)(space + 1 - left->p));
    left->n = (size_t)(space - left->p);
    return true;
}

// The key of a pair of ids in t->merges.
static Span pair_key(const uint32_t id[static 2]) {
    return (Span){ (const char *)id, 2 * sizeof *id };
}

// "merges", best rank first. A result is always longer than its parts: no list can loop.
static bool load_merges(Tokenizer *t, Json *j, const Map *vocab) {
    Str part[3] = { { 0 } };                // left, right, both
    for (json_array(j); json_item(j) && read_merge(j, &part[0], &part[1]);) {
        uint32_t id[3] = { 0 };
        size_t rank = t->merges.n;
        part[2].n = 0;
        str_add(&part[2], part[0].p, part[0].n);
        str_add(&part[2], part[1].p, part[1].n);
        for (int i = 0; i < 3; i++) {
            const MapEntry *e = map_find(vocab, str_span(&part[i]));
            if (e) id[i] = (uint32_t)e->value;
            else json_fail(j, "merge %zu: \"%.*s\" is not in the vocabulary", rank, SHOWN(part[i]));
        }
        if (!map_add(&t->merges, pair_key(id), (int64_t)(rank << 32 | id[2])))
            json_fail(j, "merge %zu repeats merge %lld", rank,
                      (long long)map_find(&t->merges, pair_key(id))->value >> 32);
    }
    for (int i = 0; i < 3; i++) free(part[i].p);
    return !j->bad;
}

static void trie_add(Tokenizer *t, int node, Span text, int id) {
    for (size_t i = 0; i < text.n; i++) {
        int *link = &t->nodes[node].child;
        while (*link && t->nodes[*link].byte != (uint8_t)text.p[i]) link = &t->nodes[*link].next;
        if (!*link) {
            *link = t->n_nodes;
            t->nodes[t->n_nodes++] = (Node){ (uint8_t)text.p[i], 0, 0, -1 };
        }
        node = *link;
    }
    t->nodes[node].id = id;
}

// The longest added token at the start of s, from the trie with that root; -1 if there is none.
static int trie_find(const Tokenizer *t, int root, Span s) {
    int id = -1, node = root;
    for (size_t i = 0; i < s.n; i++) {
        node = t->nodes[node].child;
        while (node && t->nodes[node].byte != (uint8_t)s.p[i]) node = t->nodes[node].next;
        if (!node) break;
        if (t->nodes[node].id >= 0) id = t->nodes[node].id;
    }
    return id;
}

// Fills the tries, and finds the tokens that the program itself needs.
static bool load_tries(Tokenizer *t, const Map *added, const char *name, Err *e) {
    const struct { const char *content; int *id; } wanted[] = {
        { BOS_TEXT, &t->bos }, { EOS_TEXT, &t->eos }, { "<｜User｜>", &t->user },
        { "<｜Assistant｜>", &t->assistant }, { "<think>", &t->think }, { "</think>", &t->end_think },
    };
    t->nodes = xalloc(cadd(added->text.n, 2), sizeof *t->nodes);
    t->nodes[0].id = t->nodes[1].id = -1;
    t->n_nodes = 2;
    for (size_t i = 0; i < added->n; i++) {
        int64_t value = added->entries[i].value;
        int root = value >> 32 & TOK_NORMALIZED ? 1 : 0;
        trie_add(t, root, map_key(added, i), (int)(value & INT_MAX));
    }
    for (size_t i = 0; i < COUNT(wanted); i++) {
        const MapEntry *found = map_find(added, span_of(wanted[i].content));
        if (!found) return fail(e, "%s: the added token %s is missing", name, wanted[i].content);
        *wanted[i].id = (int)(found->value & INT_MAX);
    }
    return true;
}

// Reads tokenizer.json; `name` is its path, for errors. NULL if it is not as it must be.
Tokenizer *tok_load(Span file, const char *name, Err *e) {
    Tokenizer *t = xalloc(1, sizeof *t);
    TokFile l = { 0 };
    Json j = json_open(file, name, e);
    bool ok = table_read(&j, tokenizer_fields, COUNT(tokenizer_fields), &l) && json_end(&j);
    t->n = (int)l.vocab.n;
    for (size_t i = 0; i < l.added.n; i++) t->n += !map_find(&l.vocab, map_key(&l.added, i));
    if (ok) {
        Json merges = json_inside(&j, l.merges);
        Span *text = xalloc((size_t)t->n, sizeof *text);
        t->start = xalloc((size_t)t->n + 1, sizeof *t->start);
        t->flags = xalloc((size_t)t->n, 1);
        t->cls = xalloc(N_CLASSES, 1);
        unicode_classes(t->cls);
        ok = claim_ids(t, &l, text, name, e) && load_bytes(t, &l.vocab, text, name, e) &&
             load_tries(t, &l.added, name, e) && load_merges(t, &merges, &l.vocab);
        free(text);
    }
    map_free(&l.vocab);
    map_free(&l.added);
    if (ok) return t;
    tokenizer_close(t);
    return NULL;
}

// ---- text -> ids

typedef struct { int32_t cp; int cls; size_t n; } Char;     // n bytes; cls -1: the piece ends here

static Char char_at(const Tokenizer *t, Span s, size_t i) {
    Char c = { -1, -1, 0 };
    if (i >= s.n) return c;
    c.n = utf8_next(s.p + i, s.n - i, &c.cp);
    c.cls = c.cp < N_CLASSES ? t->cls[c.cp] : C_OTHER;
    return c;
}

static bool is_newline(int32_t cp) { return cp == '\n' || cp == '\r'; }
static bool is_ascii_letter(int32_t cp) { return (cp | 32) >= 'a' && (cp | 32) <= 'z'; }

// Which class of steps 1 and 2: numbers, the CJK and kana range, all else.
static int coarse_class(Char c) {
    if (c.cls == C_NUMBER) return 1;
    return (c.cp >= 0x4e00 && c.cp <= 0x9fa5) || (c.cp >= 0x3040 && c.cp <= 0x30ff) ? 2 : 0;
}

// The end of the run of class cls that begins at i.
static size_t run_end(const Tokenizer *t, Span s, size_t i, int cls) {
    for (Char c; (c = char_at(t, s, i)).cls == cls;) i += c.n;
    return i;
}

// Step 3 on a piece of steps 1 and 2: the end of its part that begins at i. The comments name the
// alternatives of the third regex in their order.
static size_t part_end(const Tokenizer *t, Span s, size_t i) {
    Char c = char_at(t, s, i), next = char_at(t, s, i + c.n);
    size_t j = i + c.n;
    if (c.cls == C_PUNCT && c.cp < 128 && is_ascii_letter(next.cp)) {   // [!-~][A-Za-z]+
        while (is_ascii_letter(char_at(t, s, j).cp)) j++;
        return j;
    }
    if (c.cls == C_LETTER || (next.cls == C_LETTER && c.cls != C_PUNCT && !is_newline(c.cp)))
        return run_end(t, s, j, C_LETTER);                              // .?[\p{L}\p{M}]+
    if (c.cls == C_PUNCT || (c.cp == ' ' && next.cls == C_PUNCT)) {     // ?[\p{P}\p{S}]+[\r\n]*
        j = run_end(t, s, j, C_PUNCT);
        while (is_newline(char_at(t, s, j).cp)) j++;
        return j;
    }
    if (c.cls == C_SPACE) {
        size_t newline = 0, last = i;
        for (j = i; (c = char_at(t, s, j)).cls == C_SPACE; j += c.n) {
            last = j;
            if (is_newline(c.cp)) newline = j + 1;
        }
        if (newline) return newline;                                    // \s*[\r\n]+
        return j == s.n || last == i ? j : last;                        // \s+(?!\S) or \s+
    }
    for (; (c = char_at(t, s, j)).cls == C_OTHER; j += c.n)             // no match: a gap is a part
        if (char_at(t, s, j + c.n).cls == C_LETTER) break;
    return j;
}

// A byte-pair encoding at work: a linked list of symbols and a heap of possible merges (rank << 32
// | place of the left symbol), so that a piece of n bytes takes O(n log n).
enum { NO_RANK = UINT32_MAX, MAX_PIECE = 1 << 30 };
typedef struct { uint32_t id, prev, next, rank, result; } Symbol;   // rank, result: with the next
typedef struct {
    const Tokenizer *t;
    Ids *out;
    Symbol *sym;        // [cap]
    size_t cap;
    Heap heap;
} Bpe;

// Looks up the pair of symbol i and the one after it, n = past the last one.
static void bpe_pair(Bpe *b, uint32_t i, uint32_t n) {
    Symbol *s = &b->sym[i];
    uint32_t pair[2] = { s->id, s->next < n ? b->sym[s->next].id : 0 };
    const MapEntry *e = s->next < n ? map_find(&b->t->merges, pair_key(pair)) : NULL;
    s->rank = e ? (uint32_t)(e->value >> 32) : NO_RANK;
    if (!e) return;
    s->result = (uint32_t)e->value;
    heap_push(&b->heap, (uint64_t)s->rank << 32 | i);
}

static void bpe(Bpe *b, Span piece) {
    for (; piece.n > MAX_PIECE; piece.p += MAX_PIECE, piece.n -= MAX_PIECE)
        bpe(b, (Span){ piece.p, MAX_PIECE });
    uint32_t n = (uint32_t)piece.n;
    if (n > b->cap) {
        free(b->sym);
        b->cap = n < 256 ? 256 : n;
        b->sym = xalloc(b->cap, sizeof *b->sym);
    }
    for (uint32_t i = 0; i < n; i++) {
        int id = b->t->byte_id[(uint8_t)piece.p[i]];
        b->sym[i] = (Symbol){ (uint32_t)id, i - 1, i + 1, NO_RANK, 0 };
    }
    for (uint32_t i = 0; i < n; i++) bpe_pair(b, i, n);
    while (b->heap.n) {
        uint64_t key = heap_pop(&b->heap);
        Symbol *s = &b->sym[(uint32_t)key];
        if (s->rank != key >> 32) continue;             // one of the two has been merged since
        b->sym[s->next].rank = NO_RANK;
        s->id = s->result;
        s->next = b->sym[s->next].next;
        if (s->next < n) b->sym[s->next].prev = (uint32_t)key;
        bpe_pair(b, (uint32_t)key, n);
        if ((uint32_t)key > 0) bpe_pair(b, s->prev, n);
    }
    for (uint32_t i = 0; i < n; i = b->sym[i].next) ids_add(b->out, (int)b->sym[i].id);
}

// A stretch without added tokens: steps 1 and 2 cut it: threes of digits, runs of CJK, others.
static void encode_text(Bpe *b, Span s) {
    for (size_t i = 0, j; i < s.n; i = j) {
        Char c = char_at(b->t, s, i);
        int coarse = coarse_class(c), n = 0;
        for (j = i; j < s.n && (n < 3 || coarse != 1); j += c.n, n++)
            if (coarse_class(c = char_at(b->t, s, j)) != coarse) break;
        Span piece = { s.p + i, j - i };
        for (size_t k = 0, end; k < piece.n; k = end) {
            end = coarse == 1 ? piece.n : part_end(b->t, piece, k);
            bpe(b, (Span){ piece.p + k, end - k });
        }
    }
}

// Added tokens, leftmost longest: those that are not `normalized`, then the others in what is left.
static void encode_added(Bpe *b, Span s, int root) {
    size_t from = 0, i = 0;
    if (root == 2) {
        encode_text(b, s);
        return;
    }
    while (i < s.n) {
        int id = trie_find(b->t, root, span_from(s, i));
        if (id >= 0) {
            encode_added(b, (Span){ s.p + from, i - from }, root + 1);
            ids_add(b->out, id);
            from = i + tok_bytes(b->t, id).n;
        }
        i = id >= 0 ? from : i + 1;
    }
    encode_added(b, span_from(s, from), root + 1);
}

// Appends the ids of a text of any bytes; parts that are not UTF-8 count as U+FFFD. Nothing is put
// in front. With `special`, added tokens are recognised wherever they are, else they are just text.
// Needs some 50 bytes of memory for each byte of the longest word.
void tok_encode(const Tokenizer *t, Span text, bool special, Ids *out) {
    Bpe b = { .t = t, .out = out };
    Str fixed = { 0 };
    Utf8 u = { 0 };
    utf8_feed(&u, text, &fixed);
    utf8_finish(&u, &fixed);
    encode_added(&b, str_span(&fixed), special ? 0 : 2);
    free(fixed.p);
    free(b.sym);
    free(b.heap.p);
}

// ---- ids -> text

// Streams one token; with `skip_special` those marked so (BOS, EOS, not <think>) are left out.
void tok_decode(const Tokenizer *t, int id, bool skip_special, Utf8 *u, Str *out) {
    if (!(skip_special && t->flags[id] & TOK_SPECIAL)) utf8_feed(u, tok_bytes(t, id), out);
}

// ---- the tokenizer of a checkpoint

// The checkpoint's tokenizer. NULL if it has none and none is needed.
Tokenizer *tokenizer_open(const char *dir, bool needed) {
    Err e;
    Span text;
    char *path = text_of("%s/tokenizer.json", dir);
    Tokenizer *t = NULL;
    if (file_exists(path)) {
        if (!map_file(path, &text, &e) || !(t = tok_load(text, path, &e))) die(1, "%s", e.text);
        unmap_file(text);
    } else if (needed) {
        die(1, "%s: no tokenizer here; token ids can still be given with --ids", path);
    }
    free(path);
    return t;
}

Control tokenizer_control(const Tokenizer *t) {
    return (Control){ t->n, t->bos, t->eos, t->user, t->assistant, t->think, t->end_think };
}
