// FFN weight tensors, recognized by name and shape.
#ifndef TSFFN_WEIGHT_H
#define TSFFN_WEIGHT_H

#include "../ggml_iface.h"
#include "../model/loaded.h"

// Whether llama.cpp only asks whether `w` could be in a buffer of this backend: it is in a dummy one.
bool tsffn_is_asked_for(const tsffn_tensor * w);

// Whether `w`, by its name and shape, is an FFN weight of a model in a buffer of ours, or could be one in a buffer that
// is only asked for; and which.
bool tsffn_identify(const tsffn_tensor * w, struct tsffn_weight * weight);

// The FFN weight that a tensor in a buffer of ours is; NULL for others. What buffers note when llama.cpp puts a weight
// into them, and so nothing that is looked up for every token.
const struct tsffn_weight * tsffn_weight_of(const tsffn_tensor * w);

#endif
