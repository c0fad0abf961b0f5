// What the engine (dsv4.c) and the programs in apps/ share: text tools, JSON, checkpoint files, the chat format.
#ifndef DSV4_H
#define DSV4_H

#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

// --- errors, sizes, memory, strings, maps, clock (apps/tools.c)

#define COUNT(array) (sizeof(array) / sizeof *(array))

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
__attribute__((format(printf, 1, 2))) char *text_of(const char *fmt, ...);     // to be freed
bool str_is(const Str *s, const char *z);
Span str_span(const Str *s);
bool span_is(Span s, const char *z);
Span span_of(const char *z);
Span span_from(Span s, size_t i);

// The arguments of a %.*s that shows a name from a file (Span or Str), up to a sane length.
#define SHOWN(s) ((s).n > 200 ? 200 : (int)(s).n), (s).p

size_t utf8_next(const char *p, size_t n, int32_t *cp);
void utf8_put(Str *out, uint32_t c);
// A stream of bytes that may be cut anywhere inside a character. Start with { 0 }.
typedef struct { char tail[4]; size_t n; } Utf8;
void utf8_feed(Utf8 *u, Span s, Str *out);
void utf8_finish(Utf8 *u, Str *out);

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

// A heap of numbers, the smallest on top. Release with free(h.p).
typedef struct { uint64_t *p; size_t n, cap; } Heap;
void heap_push(Heap *h, uint64_t key);
uint64_t heap_pop(Heap *h);

// A bar that overwrites itself, on a terminal only; done >= total clears it.
void progress(const char *what, int64_t done, int64_t total);
void loading_expect(size_t bytes);          // one bar of weights for all devices, whose threads add
void loading_move(size_t bytes);            // to what is to be loaded, and to what has been

// Classes of code points: the rest, L and M, N, P and S, White_Space (apps/unicode.c). What is not
// below N_CLASSES is C_OTHER.
enum { C_OTHER, C_LETTER, C_NUMBER, C_PUNCT, C_SPACE, N_CLASSES = 0xe0200 };
void unicode_classes(uint8_t cls[static N_CLASSES]);

// --- files and signals (apps/system.c)

#define BUILT_IN "//built-in"               // directory of the model that travels in the program
bool file_exists(const char *path);
// A file mapped read-only and private; release with unmap_file. An empty file gives n = 0.
bool map_file(const char *path, Span *out, Err *e);
void unmap_file(Span map);
const char *mapped_path(const void *addr);  // of the file that is mapped there, or NULL

int node_cores(int node);                   // of a NUMA node, that this thread may use; 0: none
bool keep_to_node(int node);                // this thread and those it will start

void catch_signals(void);                   // so that the three below say what came
extern volatile sig_atomic_t interrupted;   // Ctrl-C: long work stops at the next chunk or token
extern volatile sig_atomic_t terminated;    // by SIGTERM or SIGHUP: a chat ends too
extern volatile sig_atomic_t computing;     // there is such work; else Ctrl-C ends the program

// --- JSON (apps/json.c)

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
    const char *at;             // and which value is being read, or NULL
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
bool json_number(Json *j, char text[static JSON_NUMBER + 1], bool *whole);      // its text
bool json_double(Json *j, double lo, double hi, double *out);
bool json_int(Json *j, int64_t lo, int64_t hi, int64_t *out);
bool json_bool(Json *j, bool *out);
bool json_null(Json *j);                                    // takes a null if one is next
bool json_skip(Json *j);
bool json_raw(Json *j, Span *out);                          // the next value as it stands
Json json_inside(const Json *j, Span raw);                  // reads such a value
bool json_end(Json *j);

// An object by table: each row names a value by its path from the top, says what it may be and where
// it goes. What no row names is passed over; null is as good as absent; a key twice is an error.
typedef enum {
    J_INT, J_FLOAT, J_DOUBLE,   // int, float, double; from lo to hi
    J_BOOL, J_TEXT, J_RAW,      // bool, Str, Span (the value as it stands)
    J_FOUND,                    // bool: there is such a key
    J_FIXED,                    // one of `values`, JSON texts; a string goes to char[32] if at > 0
    J_READ,                     // whatever `read` takes
} FieldKind;

typedef enum { OPTIONAL, NEEDED, WITHIN } Need;     // WITHIN: needed if the object around it is there

typedef struct {
    // keys joined by dots, [i] the items of a list; * any one key, at the end whatever begins so
    const char *path;
    FieldKind kind;
    Need need;
    size_t at;                  // where it goes: offset in the struct to fill
    double lo, hi;
    const char *values[5];
    void (*read)(Json *j, void *to);
} Field;

bool table_read(Json *j, const Field *rows, size_t n, void *to);        // the next value, into *to
bool table_file(Span text, const char *name, const Field *rows, size_t n, void *to, Err *e);

// As Python's json.dumps(x, ensure_ascii=False) writes it.
void json_put_string(Str *out, Span s);
bool json_dump(Json *j, Str *out);                          // the next value

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

// --- checkpoint files (apps/safetensors.c, apps/config.c)

typedef enum {      // in the order of safetensors' own list, by which its writer sorts
    DT_BOOL, DT_F4, DT_F6_E2M3, DT_F6_E3M2, DT_U8, DT_I8, DT_F8_E5M2, DT_F8_E4M3, DT_F8_E8M0,
    DT_I16, DT_U16, DT_F16, DT_BF16, DT_I32, DT_U32, DT_F32, DT_C64, DT_F64, DT_I64, DT_U64,
    N_DTYPES
} Dtype;

typedef struct { const char *name; int bits; } DtypeInfo;
extern const DtypeInfo dtypes[N_DTYPES];
enum { TENSOR_RANK = 8 };

typedef struct {
    Span name;                  // in the store's names
    int dtype, rank, shard;
    int64_t shape[TENSOR_RANK];
    size_t at, bytes;           // the data's place in the file
    const uint8_t *data;        // there, at any address
} Tensor;

typedef struct {
    char *path;
    Span map;                   // the whole file
    Span metadata;              // "__metadata__" as it stands in the header, or empty
    size_t header;              // bytes before the data
} Shard;

// Valid until store_close; a zeroed Store is empty.
typedef struct {
    Tensor *tensors;            // [n], shard by shard, each in the order of its header
    Map names;                  // entry i: tensor i's name, how many lines of the index list it
    Shard *shards;              // [n_shards]
    size_t n;
    int n_shards;
} Store;

const char *tensor_kind(const Tensor *t, char out[static 256]);        // "BF16 [64, 128]"
bool store_open(Store *s, const char *dir, Err *e);         // on an error *s is empty
const Tensor *store_find_span(const Store *s, Span name);   // or NULL
void store_close(Store *s);

// DIR/config.json. The ratio list has one entry per layer, then one per MTP layer.
typedef struct {
    int dim, n_layers, n_heads, head_dim, rope_dim, q_lora_rank, o_groups, o_lora_rank, window;
    int n_experts, n_active, expert_dim, n_hash_layers;
    int index_heads, index_dim, index_topk;
    int hc_mult, hc_iters;
    int vocab, max_ctx, n_mtp;
    int bos, eos;
    float hc_eps, norm_eps, route_scale, swiglu_limit;
    float rope_theta, compress_theta, yarn_factor, yarn_beta_fast, yarn_beta_slow;
    int yarn_ctx;               // original_max_position_embeddings
    int *ratio;                 // [n_layers + n_mtp] 0, 4 or 128
    int n_ratios;               // entries that config.json has
    bool dspark;                // 0731 releases: another MTP, whose tensors are skipped
    char quant[32];             // quantization_config.quant_method, "" if none
} Config;

// Reads DIR/config.json, or a text like it, of which path is the name in messages. On an error *c is
// empty.
bool config_open(Config *c, const char *dir, Err *e);
bool config_read(Config *c, Span text, const char *path, Err *e);
void config_free(Config *c);

// apps/convert.c: the original release in SRC -> dsv4_int in DST.
typedef struct {
    const char *src, *dst;
    const char *layer_remap;    // NULL, or the layers to keep, in their new order: "0,2,40-42"
    int threads;                // 0: all cores
    bool verify;                // re-read the result and compare it with the source
} Dsv4Convert;
bool dsv4_convert(const Dsv4Convert *o, Err *e);

// --- threads (dsv4.c)

typedef struct Pool Pool;
typedef void RangeFn(void *arg, int begin, int end);
Pool *pool_new(int n_threads);              // < 1: one per core
void pool_free(Pool *p);
int pool_threads(const Pool *p);
// f on ranges of [0, n), each of at least `grain` items but the last, by all threads of the pool.
void parallel(Pool *p, int n, int grain, RangeFn *f, void *arg);
const char *cpu_instructions(void);         // the vector instructions in use: "avx2"

// --- the model (dsv4.c)

// How to open a checkpoint. 0 and NULL: the default.
typedef struct {
    const char *dir;
    const char *devices, *layers;           // "cuda:0,cpu", "40,3"
    int ctx, threads, chunk;                // positions of a session; of the CPU; rows of one pass
    bool exact, mlock;
} Opening;
typedef struct Model Model;
// Opens a checkpoint: config, tensors, and where the layers go; then brings the weights to their
// devices. Errors end the process.
Model *model_read(const Opening *o);
void model_start(Model *m, const Opening *o);
// Are config.json and all tensors there, in the right formats and shapes?
bool model_check(const char *dir, Err *e);

enum { N_FORMATS = 6 };
extern const char *const format_names[N_FORMATS];

// What a model is like. The pointers are good as long as it is.
typedef struct {
    const Config *config;
    const Store *store;                     // its tensors
    const int *formats;                     // [N_FORMATS] how many matrices have each
    int ctx;                                // positions a session can hold
    bool mtp;                               // the MTP layers are there
    bool cpu;                               // no GPU computes
    double touched;                         // bytes of weights that decoding one token reads
    size_t context, number;                 // bytes of a session's caches; of a number there
} ModelBrief;
ModelBrief model_brief(const Model *m);
typedef struct {
    const char *name, *attention, *experts; // "layers.7"; formats
    size_t bytes;
    int ratio;
    bool hashed;                            // experts are chosen by token
} LayerBrief;
LayerBrief layer_brief(const Model *m, int i);      // MTP layers are behind the others
void print_plan(const Model *m, FILE *to);          // a line for each device: layers, memory

typedef struct Mat Mat;
typedef struct {
    const char *name;                       // "attn.wq_b"
    const Mat *mat;                         // NULL: this layer has none of the kind
    const char *format;
    int n, k, many;                         // shape [n, k]; how many of the kind a layer has
    size_t bytes;
} MatBrief;
// A matrix of a layer, by a number for its kind, and of the experts by the expert. The name is NULL
// past the last kind.
MatBrief layer_matrix(const Model *m, int i, int kind, int expert);
MatBrief head_matrix(const Model *m);
// Seconds of y = W x on the CPU for one row x and n matrices of one shape, side by side.
double product_time(const Model *m, Pool *pool, const Mat *const *mats, int n);

// One sequence of tokens and what the model remembers of it.
typedef struct {
    Model *m;
    int slot;
    int *tokens;                            // [ctx] what was read
    int n;
    int kept;                               // it can be rewound to positions from here on
    const float *logits;                    // [vocab] of the last token read, until any session reads
} Session;
Session *session_new(Model *m);             // NULL: the model has no slot left
void session_free(Session *s);
void session_clear(Session *s);             // back to position 0
// For measurements, on the CPU: position `to`, as if more had been read: the rings as they are, the
// compressed rows up to there mixed from those that were read. `to` differs from the position by a
// multiple of 128.
void session_stretch(Session *s, int to);

// Called for each chunk read: n rows of logits [n, vocab], the first at position pos. mtp: those of
// the MTP layer, NULL unless asked for.
typedef void (*RowSink)(void *arg, int pos, int n, const float *logits, const float *mtp);
typedef struct {
    RowSink sink;                           // NULL: only the last token's logits are made
    void *arg;
    bool mtp;                               // for the sink: run the MTP layer too
    bool progress;
} Feed;
// Reads n tokens, in chunks. Stops after a whole chunk on Ctrl-C, and where the context ends.
// Returns how many were read. One call at a time per model.
int session_feed(Session *s, const int *tokens, int n, const Feed *f);

// A session's state at one position; its tokens stay in the session.
typedef struct Snapshot Snapshot;
Snapshot *session_snapshot(const Session *s);
void snapshot_free(Snapshot *p);
// Brings the session as far into tokens [n] as what it has read allows, by rewinding or with a
// snapshot of it (or NULL); at least the last token stays to be read. Returns how many are in place.
int session_reuse(Session *s, const int *tokens, int n, const Snapshot *snap);

// --- its text side (apps/tokenizer.c, apps/sampling.c)

typedef struct { int *p; size_t n; } Ids;           // release with free(ids.p)
void ids_add(Ids *ids, int id);

typedef struct Tokenizer Tokenizer;
typedef struct { int n, bos, eos, user, assistant, think, end_think; } Control;     // n: of all tokens
Tokenizer *tok_load(Span file, const char *name, Err *e);   // tokenizer.json; name: its path, for errors
Tokenizer *tokenizer_open(const char *dir, bool needed);    // NULL: none there; errors end the process
void tokenizer_close(Tokenizer *t);
Control tokenizer_control(const Tokenizer *t);
// Appends the ids of a text; special: control tokens in it are recognised.
void tok_encode(const Tokenizer *t, Span text, bool special, Ids *out);
void tok_decode(const Tokenizer *t, int id, bool skip_special, Utf8 *u, Str *out);

// Chooses tokens. In this order: temperature, top-k, top-p over what top-k left, min-p relative to
// the likeliest token.
typedef struct {
    double temperature;                     // 0: the most likely token, always
    double top_p, min_p;                    // 1 and 0: off
    int top_k;                              // 0: off
} Sampling;
typedef struct Sampler Sampler;
Sampler *sampler_new(int vocab, Sampling how, uint64_t seed);
void sampler_free(Sampler *s);
int sample(Sampler *s, const float *logits, Err *e);        // -1: a logit is not finite
double random_unit(uint64_t *state);                        // uniform in [0, 1); the state is any seed

// As the options say, else the model's generation_config.json. Appends to eos the tokens that end
// an answer (apps/sampling.c).
Sampler *sampler_open(const Config *c, const char *dir, Ids *eos);
extern const Sampling sampling_default;
bool read_generation_config(Span text, const char *name, int vocab, Sampling *how, Ids *eos,
                            Err *e);

// --- programs over it: what the command line says, and exit codes (terminal.c, info.c, bench.c)

typedef struct {
    Opening open;
    Dsv4Convert convert;
    const char *prompt, *file, *ids, *system, *effort, *encoding, *chat, *logits, *mtp_logits;
    const char *isa, *kernels;
    int tokens, top_k;                      // < 0: not given, as the numbers below
    int64_t seed;
    double temp, top_p, min_p;
    bool raw, think, nothink, plain, decode, show_ids, graphs, help, version;
} Options;
extern Options opt;

int run_prompt(void);
int run_chat(void);
int run_tokenize(void);
int run_info(void);
int run_bench(void);
double read_bandwidth(Pool *p);                      // bytes per second, one read of 2 GiB; 0: no memory for it
int run_ppl(const char *path);
Str read_text(const char *path);                    // "-": standard input; errors end the process
bool check_vocab(const Model *m, const Ids *ids);   // false, with a note: not this model's tokens
void flush_out(void);                               // ends the process if stdout is closed or full
// Reads every byte of the checkpoint in a directory: config, headers and sizes, every value, every
// tensor that the model needs. False: *e says it in one line, `# ` lines before it name what was found.
bool verify(const char *dir, int threads, Err *e);

#endif
