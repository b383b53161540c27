// The model file, and what both files of a pair have in common. docs/format.md is the specification that is checked.
#ifndef TSFFN_MODEL_FILE_H
#define TSFFN_MODEL_FILE_H

#include "gguf_file.h"
#include "model.h"

enum {
    TSFFN_TENSOR_NAME_SIZE = 96, // "blk.N.ffn_pred_fc1.E.weight" with any int64
};

// What ties a model and its sidecar together.
struct tsffn_identity {
    char pair_id[64];
    char order[64];
    char predictor_kind[64]; // of the model
};

// Each writes one line to the file's error buffer and returns false when something is not as it must be.

// Architecture of either file, and its version: 1 to `newest`.
bool tsffn_check_format(const struct tsffn_gguf * file, uint32_t newest);
// Whether the layout under `key` is `other` instead of 'rows'. Version 1 of either file has no such key and rows.
bool tsffn_read_layout(const struct tsffn_gguf * file, const char * key, const char * other, bool * is_other);
// n_layer, n_embd, n_ff and n_expert of either file.
bool tsffn_read_shape(const struct tsffn_gguf * file, struct tsffn_model * model);
// A type that the model's device multiplies with, in rows of n_cols weights.
bool tsffn_check_type(const struct tsffn_gguf * file, const struct tsffn_model * model, const char * name,
                      enum ggml_type type, int64_t n_cols);
// The 32 lower-case hex digits of turbosparse.pair_id.
bool tsffn_read_pair_id(const struct tsffn_gguf * file, struct tsffn_identity * id);
bool tsffn_copy_string(const struct tsffn_gguf * file, const char * key, char * out, size_t size);
// Everything of the model file: keys, what llama.cpp needs, and the FFN tensors.
bool tsffn_read_model_file(const struct tsffn_gguf * file, struct tsffn_model * model, struct tsffn_identity * id);

#endif
