// The buffers that hold FFN weights, and which model they belong to.
#ifndef TSFFN_BUFFER_H
#define TSFFN_BUFFER_H

#include "ggml_iface.h"
#include "model.h"

// The context of a weight buffer: which model its tensors belong to.
struct tsffn_buffer {
    void * base;
    bool owned;                 // allocated here, not mapped by the caller
    struct tsffn_model * model; // NULL for compute buffers
};

// The one buffer type of this backend. Its device is the backend's to set.
ggml_backend_buffer_type_t tsffn_buffer_type(void);

// A buffer over `base`, which it takes over when `owned`. Buffers made while a model is armed hold that model's
// weights.
ggml_backend_buffer_t tsffn_buffer_new(void * base, size_t size, bool owned);

#endif
