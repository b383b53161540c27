// Which neurons a GPU takes of a model's FFNs within a number of bytes.
//
// Predictors come first, layer after layer: every token needs all of them. Then neurons from the front of each FFN,
// where the hot ones are: of every FFN the same share of what is wanted there. Without predictors and neurons a layer
// is not on the GPU at all.
#ifndef TSFFN_HYBRID_PLAN_H
#define TSFFN_HYBRID_PLAN_H

#include "../cuda/interface.h"

struct tsffn_plan {
    int64_t n_layer;
    bool * has_kernels;         // [n_layer] the module can compute the layer,
    bool * predictor_kernels;   // [n_layer] and its predictor
    bool * predictor;           // [n_layer] it is on the GPU
    struct tsffn_range * range; // [n_layer][n_ffns] neurons that are; first is 0
    size_t bytes;               // of the arena, all layers together
};

// Makes a plan for layers [n_layer], all of the same shape. hot [n_layer][n_ffns]: the neurons at the front of each FFN
// that may be on the GPU; NULL: all. False with one line in `error` where the module can compute none of the layers,
// or without memory.
bool tsffn_plan_make(struct tsffn_plan * plan, const struct tsffn_cuda_module * module,
                     const struct tsffn_layer * layers, int64_t n_layer, size_t bytes, const int32_t * hot,
                     char * error, size_t error_size);
void tsffn_plan_free(struct tsffn_plan * plan);

// Bytes of the arena that a layer takes, 0 where nothing of it is on the GPU.
size_t tsffn_plan_layer_bytes(const struct tsffn_plan * plan, const struct tsffn_cuda_module * module,
                              const struct tsffn_layer * layers, int64_t layer);

#endif
