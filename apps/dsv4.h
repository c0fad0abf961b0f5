// What the engine (dsv4.c) and the programs in apps/ share: text tools, JSON, checkpoint files, the chat format.
#ifndef DSV4_H
#define DSV4_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// --- errors, sizes, memory, strings (dsv4.c, "small tools")

// An error that a caller may want to survive (a server request, a fuzz target): one line of text.
// Functions that can fail take an Err* and return false / NULL after fail().
typedef struct { char text[512]; } Err;
__attribute__((format(printf, 2, 3))) bool fail(Err *e, const char *fmt, ...);      // false

// One line `dsv4: ...` on stderr, then exit(code).  One fact `# ...` on stderr.
__attribute__((noreturn, format(printf, 2, 3))) void die(int code, const char *fmt, ...);
__attribute__((format(printf, 1, 2))) void note(const char *fmt, ...);

size_t cmul(size_t a, size_t b);            // saturate: an overflow becomes SIZE_MAX
size_t cadd(size_t a, size_t b);
void *xalloc(size_t n, size_t size);        // zeroed, never NULL
void *grow(void *list, size_t n, size_t size);      // room for item n; capacities double
double now(void);                           // seconds, monotonic

// Bytes somebody else owns. Not terminated; may hold NUL.
typedef struct { const char *p; size_t n; } Span;
// A growing byte string. p is always NUL-terminated once something was added. Release with free(s.p).
typedef struct { char *p; size_t n, cap; } Str;
void str_add(Str *s, const void *p, size_t n);
void str_puts(Str *s, const char *z);
bool str_is(const Str *s, const char *z);
Span str_span(const Str *s);
bool span_is(Span s, const char *z);
Span span_of(const char *z);
Span span_from(Span s, size_t i);
bool map_file(const char *path, Span *out, Err *e);         // read-only; an empty file gives n = 0

size_t utf8_next(const char *p, size_t n, int32_t *cp);
void utf8_put(Str *out, uint32_t c);

// A set of strings, each with a number: tensor names, token texts, the keys of one object. Keys are
// copied. Release with map_free.
typedef struct { size_t at, n; uint64_t hash; int64_t value; } MapEntry;
typedef struct {
    Str text;               // all keys, one after the other
    MapEntry *entries;      // [n] in the order they were added
    uint32_t *slots;        // [cap] entry + 1, 0 = empty; cap is a power of two
    size_t n, cap;
} Map;
Span map_key(const Map *m, size_t i);
MapEntry *map_find(const Map *m, Span key);                 // or NULL
bool map_add(Map *m, Span key, int64_t value);              // false if the key is there already
void map_free(Map *m);

// --- JSON

// A pull parser: the caller asks for what it expects. The first error is kept in *e with its byte
// offset; from then on every call returns false, so loops end by themselves, and json_end() tells:
//     Json j = json_open(text, "config.json", &e);
//     for (json_object(&j); json_member(&j, &key);)
//         if (span_is(str_span(&key), "hidden_size")) json_int(&j, 1, INT_MAX, &dim);
//         else json_skip(&j);
//     bool ok = json_end(&j);
// Nothing recurses on the input. At most 64 levels, and 4300 bytes a number (Python's limit too).
enum { JSON_DEPTH = 64, JSON_NUMBER = 4300 };
typedef struct {
    const char *start, *p, *end;
    const char *name;           // what the text is, for errors
    Err *e;
    bool bad;
    int depth;                  // containers open
    uint64_t objects, begun;    // bit d: the container at depth d+1 is an object; was begun
} Json;
Json json_open(Span text, const char *name, Err *e);
__attribute__((format(printf, 2, 3))) bool json_fail(Json *j, const char *fmt, ...);
bool json_expected(Json *j, const char *what);              // the error "expected WHAT, found ..."
char json_peek(Json *j);                                    // first byte of the next token, 0 at the end
bool json_object(Json *j);
bool json_member(Json *j, Str *key);                        // false after the last member
bool json_array(Json *j);
bool json_item(Json *j);
bool json_string(Json *j, Str *out);
bool json_number(Json *j, Span *raw, bool *whole);
bool json_double(Json *j, double *out);
bool json_int(Json *j, int64_t lo, int64_t hi, int64_t *out);
bool json_bool(Json *j, bool *out);
bool json_null(Json *j);                                    // takes a null if one is next
bool json_skip(Json *j);
bool json_raw(Json *j, Span *out);                          // the next value as it stands
Json json_inside(const Json *j, Span raw);                  // reads such a value
bool json_end(Json *j);
void json_put_string(Str *out, Span s);
bool json_dump(Json *j, Str *out);                          // the next value as Python's json.dumps writes it
typedef struct { char text[400]; } Quoted;
Quoted quoted(Span s);                                      // text from a file, for an error message

// --- chat format (apps/chat.c)

#define BOS_TEXT "<｜begin▁of▁sentence｜>"
#define EOS_TEXT "<｜end▁of▁sentence｜>"

typedef enum { ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT, ROLE_TOOL, ROLE_DEVELOPER, ROLE_REMINDER,
               N_ROLES } Role;
typedef enum { EFFORT_NONE, EFFORT_LOW, EFFORT_HIGH, EFFORT_MAX, N_EFFORTS } Effort;

typedef struct {
    bool release_0731;          // the generation
    bool thinking;
    bool keep_thinking;         // old reasoning stays in the prompt; with tools it always does
    bool no_bos;
    Effort effort;              // thinking mode only
} ChatOptions;

typedef struct { bool is_result; Str text, id; } Block;

// One turn. Users and tool results in a row are blocks of one user turn; other roles have one.
typedef struct {
    Role role;
    Block *blocks;
    size_t n_blocks;
    Str reasoning;
    Str extra;                  // follows the content: tools and response format, or tool calls
    Map calls;                  // assistant: call id -> position
    char task[40];              // the token of a quick task, "" if none
    bool has_calls, has_tools, no_eos, context;
} Turn;

typedef struct { Turn *turns; size_t n; } Chat;        // start with { 0 }, release with chat_free

Turn *chat_say(Chat *c, Role role, Span content, Span reasoning, bool context);
bool chat_read(Chat *c, ChatOptions *o, Span text, const char *name, Err *e);
bool chat_render(Chat *c, const ChatOptions *o, Str *out, Err *e);
void chat_free(Chat *c);

typedef struct { Str name, arguments; } Call;           // arguments: JSON text
typedef struct { Str reasoning, content; Call *calls; size_t n_calls; } Reply;
bool reply_parse(Span s, bool thinking, Reply *r, Err *e);
void reply_free(Reply *r);

// The forgiving reader follows a completion piece by piece. It tells reasoning and content as soon
// as no tag can be hidden in them, and each call when it is complete. Set state and on_event first.
typedef enum { EV_REASONING, EV_CONTENT, EV_CALL } Event;
typedef void (*OnEvent)(void *arg, Event kind, Span text, Span arguments);  // EV_CALL: name, JSON
typedef struct {
    enum { IN_CONTENT, IN_REASONING, IN_CALLS } state;
    OnEvent on_event;
    void *arg;
    Str held;               // text not yet understood
    bool open;              // a call is being read
    Call call;
    Map keys;               // of the open call; of a repeated parameter the first value counts
} Reader;
void reader_feed(Reader *r, Span piece);
bool reader_finish(Reader *r);
void reader_free(Reader *r);

// --- checkpoint files

typedef Span Dsv4Text;
typedef Err Dsv4Error;

// One line `dsv4: ...` on stderr, then exit(code).  One fact `# ...` on stderr.
__attribute__((noreturn, format(printf, 2, 3))) void dsv4_die(int code, const char *fmt, ...);
__attribute__((format(printf, 1, 2))) void dsv4_note(const char *fmt, ...);

// A file mapped read-only until the program ends.
bool dsv4_map(const char *path, Dsv4Text *out, Dsv4Error *e);

// Calls each() for every member of a JSON object (key decoded) or item of an array (key empty);
// value is the value's text as it stands, checked. False if the JSON is damaged or each() said so.
typedef bool Dsv4Each(void *arg, Dsv4Text key, Dsv4Text value, Dsv4Error *e);
bool dsv4_json_each(Dsv4Text json, const char *name, Dsv4Each *each, void *arg, Dsv4Error *e);

// DIR/config.json, checked in full as the engine does before it runs a model.
typedef struct {
    int n_layers, n_hash_layers, n_mtp;
    char quant[32];         // quantization_config.quant_method, "" if none
} Dsv4Config;
bool dsv4_config(const char *dir, Dsv4Config *c, Dsv4Error *e);

// The tensors of a checkpoint directory, every header checked. Names live as long as the store.
typedef struct {
    Dsv4Text name;
    const char *dtype;      // "BF16", "F8_E4M3", ...
    int rank, shard;
    int64_t shape[8];
    uint64_t at, bytes;     // place in the shard's file
} Dsv4Tensor;
int dsv4_dtype_order(const char *dtype);        // its place in safetensors' own list
typedef struct Dsv4Store Dsv4Store;
Dsv4Store *dsv4_store_open(const char *dir, Dsv4Error *e);                  // NULL on an error
size_t dsv4_store_tensors(const Dsv4Store *s);
Dsv4Tensor dsv4_store_tensor(const Dsv4Store *s, size_t i);
size_t dsv4_store_find(const Dsv4Store *s, Dsv4Text name);                  // SIZE_MAX: not there
int dsv4_store_shards(const Dsv4Store *s);
const char *dsv4_store_shard(const Dsv4Store *s, int i, Dsv4Text *metadata);    // its path
void dsv4_store_close(Dsv4Store *s);

// apps/convert.c: the original release in SRC -> dsv4_int in DST.
typedef struct {
    const char *src, *dst;
    const char *scale_dtype;    // "bf16" (NULL: too) or "f16"
    const char *layer_remap;    // NULL, or the layers to keep, in their new order: "0,2,40-42"
    int threads;                // 0: all cores
    bool verify;                // re-read the result and compare it with the source
} Dsv4Convert;
bool dsv4_convert(const Dsv4Convert *o, Dsv4Error *e);

#endif
