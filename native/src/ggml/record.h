// Activations of a computed FFN for whoever records them (tsffn_model_record).
#ifndef TSFFN_RECORD_H
#define TSFFN_RECORD_H

#include "weight.h"

// Room for the activations of one call.
struct tsffn_recorder {
    float * x;     // [n_rows][n_embd]
    float * h;     // [n_rows][n_ff]
    int32_t * ffn; // [n_rows]
    size_t x_bytes, h_bytes, ffn_bytes;
};

// Before the call: keeps a copy of its x, which y may be written over, and lets each of its rows have h. False: out of
// memory.
bool tsffn_recorder_begin(struct tsffn_recorder * recorder, const struct tsffn_weight * weight, struct tsffn_row * rows,
                          const struct tsffn_call * call);
// After it: tells of the n_rows rows. Returns whether to go on.
bool tsffn_recorder_end(const struct tsffn_recorder * recorder, const struct tsffn_weight * weight, int64_t n_rows);

void tsffn_recorder_free(struct tsffn_recorder * recorder);

#endif
