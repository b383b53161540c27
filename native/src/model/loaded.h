// The layers of one load of a model by llama.cpp: each is known when the last of its weights is.
#ifndef TSFFN_LOADED_H
#define TSFFN_LOADED_H

#include "model.h"

struct tsffn_loaded;

// An FFN weight: which matrix of which layer, of which load of which model.
struct tsffn_weight {
    struct tsffn_model * model;
    int64_t layer;
    enum tsffn_part part;
    struct tsffn_loaded * loaded; // NULL for a weight that is only asked for
};

// Notes where a weight of the load that is going on lies: one tensor, [n_ffns][n_ff] rows of n_embd weights of `type`.
// Begins another load where this one has the weight already. `held` is the load that the caller's buffer holds, NULL at
// first; it holds the weight's from now on. Returns what stands for the weight as long as that is held; NULL without
// memory.
const struct tsffn_weight * tsffn_loaded_add(const struct tsffn_weight * weight, int type, const void * data,
                                             size_t row_bytes, struct tsffn_loaded ** held);
// Before a buffer goes.
void tsffn_loaded_release(struct tsffn_model * model, struct tsffn_loaded * loaded);

// The layer of a weight, for the device that computes the model; NULL without memory. `weight` must be one that
// tsffn_loaded_add returned, and all weights of its load must have come.
const void * tsffn_loaded_prepared(const struct tsffn_weight * weight);

// What a GPU has of the weight's load; NULL: nothing.
struct tsffn_hybrid;
struct tsffn_hybrid * tsffn_loaded_hybrid(const struct tsffn_weight * weight);

// Whether the rows of `part` of a weight's layer are known.
bool tsffn_loaded_has(const struct tsffn_weight * weight, enum tsffn_part part);

#endif
