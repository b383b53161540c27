// The buffers that hold FFN weights, and which model they belong to.
#ifndef TSFFN_BUFFER_H
#define TSFFN_BUFFER_H

#include "../memory/region.h"
#include "weight.h"

// The one buffer type of this backend. Its device is the backend's to set.
ggml_backend_buffer_type_t tsffn_buffer_type(void);

// A buffer over `base`, which it takes over when `owned`, for weights of `model` (NULL: for none).
ggml_backend_buffer_t tsffn_buffer_new(void * base, size_t size, bool owned, struct tsffn_model * model);

#endif
