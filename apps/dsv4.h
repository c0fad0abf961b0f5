// What the engine (dsv4.c) offers to the programs in apps/, and they to its command line.
#ifndef DSV4_H
#define DSV4_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct { const char *p; size_t n; } Dsv4Text;   // somebody else's bytes, not terminated
typedef struct { char text[512]; } Dsv4Error;           // one line

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
