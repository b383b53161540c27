// What llama.cpp loads while a model is armed, and whether all of its FFN came to this backend.
#ifndef TSFFN_LOAD_H
#define TSFFN_LOAD_H

#include "weight.h"

// llama.cpp begins to load a model, while `model` is armed: forgets what was claimed. Of a model that the environment
// names, whose file may not be the one that is loaded, the file is brought into the page cache if it is and fits.
void tsffn_begin_load(struct tsffn_model * model);
// llama.cpp was told that this FFN weight is taken.
void tsffn_claim(const struct tsffn_weight * weight);

// Whether a context of the model that was loaded last may be made: every one of its FFN tensors must be in a buffer of
// this backend, with the bytes of the model's file. What is not, another device would compute as SwiGLU. llama.cpp also
// makes contexts that only measure, with weights that are nowhere: then every FFN tensor must have been claimed.
// Writes one line to `error`.
bool tsffn_check_loaded(struct tsffn_model * model, char * error, size_t error_size);

#endif
