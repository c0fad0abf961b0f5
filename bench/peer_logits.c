// The logits that llama.cpp finds for a prompt:  peer_logits MODEL.gguf IDS OUT
// IDS: token ids with commas between them; OUT: float32 [ids][vocabulary]. Built by bench/peers.sh against the peer's library.
#include <stdio.h>
#include <stdlib.h>

#include "llama.h"

enum { MOST = 4096 };

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    struct llama_batch batch = llama_batch_init(MOST, 0, 1);
    for (char *p = argv[2]; *p && batch.n_tokens < MOST; p += *p == ',') {
        int i = batch.n_tokens++;
        batch.token[i] = (llama_token)strtol(p, &p, 10);
        batch.pos[i] = i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
    }
    llama_backend_init();
    struct llama_model *model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) return 1;
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = MOST;
    struct llama_context *context = llama_init_from_model(model, params);
    if (!context || llama_decode(context, batch)) return 1;
    size_t vocab = (size_t)llama_vocab_n_tokens(llama_model_get_vocab(model));
    FILE *f = fopen(argv[3], "wb");
    if (!f || fwrite(llama_get_logits(context), sizeof(float) * vocab, (size_t)batch.n_tokens, f) == 0) return 1;
    return fclose(f) != 0;
}
