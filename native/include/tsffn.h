// libggml-tsffn.so: a ggml backend that computes the dReLU FFNs of tsconv's models sparsely.
//
// It is loaded with ggml_backend_load() (or GGML_BACKEND_PATH) and takes the FFN weights of a model that was opened
// here and armed while llama.cpp loads the file:
//
//     struct tsffn_model * model = tsffn_model_open(path, sidecar, TSFFN_SPARSITY_PREDICTOR, error, sizeof(error));
//     tsffn_model_arm(model);
//     ... llama_model_load_from_file(path) with general.architecture overridden to "llama" ...
//     tsffn_model_arm(NULL);
//
// A program that cannot call these functions (llama-server, llama-bench) names the model in the environment instead:
// TSFFN_MODEL=path, and optionally TSFFN_PREDICTOR=path and TSFFN_SPARSITY=predictor|exact.
#ifndef TSFFN_H
#define TSFFN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TSFFN_API __attribute__((visibility("default")))

// Limits of the file format (docs/format.md).
#define TSFFN_FORMAT_VERSION 1
#define TSFFN_MAX_LAYERS 512
#define TSFFN_MAX_EXPERTS 1024
#define TSFFN_MAX_DIM (1 << 20)
#define TSFFN_MAX_CONTEXT (1 << 24)

enum tsffn_sparsity {
    TSFFN_SPARSITY_DEFAULT = 0,   // predictor when the model names one, else exact
    TSFFN_SPARSITY_PREDICTOR = 1, // the checkpoint's own mask
    TSFFN_SPARSITY_EXACT = 2,     // no predictor: unmasked dReLU, lossless
};

struct tsffn_model;

// Checks that the running ggml is the one this library was built for: version, tensor size, operation numbers.
// Returns false and writes one line to `error` when it is not.
TSFFN_API bool tsffn_check_abi(char * error, size_t error_size);

// Opens a model file and, in predictor mode, its sidecar (sidecar_path NULL: NAME.predictor.gguf beside NAME.gguf), and
// checks both completely: keys, shapes, sizes, that they are a pair. Tensor data is mapped, not read.
// Returns NULL and writes one line to `error` that names file, tensor, expected and found, and the remedy.
TSFFN_API struct tsffn_model * tsffn_model_open(const char * model_path, const char * sidecar_path,
                                                enum tsffn_sparsity sparsity, char * error, size_t error_size);

// Drops the caller's reference. Weight buffers hold their own: the memory goes when the last of them is freed.
TSFFN_API void tsffn_model_close(struct tsffn_model * model);

// The model whose FFN weights the backend claims from now on, NULL for none. One load at a time.
TSFFN_API void tsffn_model_arm(struct tsffn_model * model);

TSFFN_API enum tsffn_sparsity tsffn_model_sparsity(const struct tsffn_model * model);
TSFFN_API int32_t tsffn_model_n_layer(const struct tsffn_model * model);

// Counters of one layer since the model was opened or tsffn_model_reset_stats was called. Neurons are counted per token
// (and routed expert), bytes are bytes of weights.
struct tsffn_layer_stats {
    uint64_t calls;           // times the FFN was computed, fused
    uint64_t rows;            // tokens, times the routed experts of each
    uint64_t neurons;         // n_ff per row
    uint64_t predicted;       // neurons the predictor let through (all in exact mode)
    uint64_t gate_positive;   // of these, gate > 0
    uint64_t active;          // of these, up > 0
    uint64_t bytes_predictor; // read by the predictor
    uint64_t bytes_ffn;       // read of gate, up and down
    uint64_t bytes_dense;     // what a dense FFN would have read
    uint64_t ns_predictor;
    uint64_t ns_ffn;
    uint64_t single_ops; // operations computed alone because the graph was cut between them
};
TSFFN_API bool tsffn_model_stats(const struct tsffn_model * model, int32_t layer, struct tsffn_layer_stats * stats);
TSFFN_API void tsffn_model_reset_stats(struct tsffn_model * model);

// The ISA tier in use: "ref", "avx2", "avx512".
TSFFN_API const char * tsffn_isa_name(void);

// The ggml version this library was built for.
TSFFN_API const char * tsffn_ggml_version(void);

#ifdef __cplusplus
}
#endif

#endif
