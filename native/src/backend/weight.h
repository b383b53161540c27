// FFN weight tensors, recognized by name and shape.
#ifndef TSFFN_WEIGHT_H
#define TSFFN_WEIGHT_H

#include "ggml_iface.h"
#include "model.h"

// An FFN weight: which matrix of which layer of which model.
struct tsffn_weight {
    struct tsffn_model * model;
    int64_t layer;
    enum tsffn_part part;
};

// Whether llama.cpp only asks whether `w` could be in a buffer of this backend: it is in a dummy one.
bool tsffn_is_asked_for(const tsffn_tensor * w);

// Whether `w` is an FFN weight of an opened model in a buffer of ours, and which.
bool tsffn_identify(const tsffn_tensor * w, struct tsffn_weight * weight);

#endif
