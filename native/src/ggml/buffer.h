// The buffers that hold FFN weights, and which model they belong to.
#ifndef TSFFN_BUFFER_H
#define TSFFN_BUFFER_H

#include "weight.h"

// The context of a weight buffer: which model its tensors belong to.
struct tsffn_buffer {
    void * base;
    size_t size;
    bool owned;                 // allocated here, not mapped by the caller
    struct tsffn_model * model; // NULL for compute buffers
    // The FFN weights in here, expert after expert: [n_layer][TSFFN_N_PARTS], data NULL where it lies elsewhere; NULL
    // until the first is known. All below is guarded by the model's residency_mutex, but for next_loading.
    struct tsffn_weights * weights;
    int64_t load;                       // number of the load that they came with
    struct tsffn_loaded * loaded;       // what came of that load
    struct tsffn_buffer * next;         // of the model's buffers with weights
    bool locked;                        // pages of them may be locked in RAM
    struct tsffn_buffer * next_loading; // see loading_mutex in residency.c
};

// The one buffer type of this backend. Its device is the backend's to set.
ggml_backend_buffer_type_t tsffn_buffer_type(void);

// A buffer over `base`, which it takes over when `owned`, for weights of `model` (NULL: for none).
ggml_backend_buffer_t tsffn_buffer_new(void * base, size_t size, bool owned, struct tsffn_model * model);

#endif
