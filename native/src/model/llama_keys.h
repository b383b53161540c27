// Keys that only llama.cpp reads.
#ifndef TSFFN_LLAMA_KEYS_H
#define TSFFN_LLAMA_KEYS_H

#include "gguf_file.h"

// Checks those keys of a model file whose wrong values end the process inside llama.cpp (GGML_ASSERT) instead of
// failing the load. n_expert is 0 for a dense model.
bool tsffn_check_llama_keys(const struct tsffn_gguf * file, int64_t n_expert);

#endif
