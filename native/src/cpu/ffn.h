// The sparse FFN: neuron i of a dReLU layer adds  relu(gate_i . x) * relu(up_i . x) * m_i * down_i  to the output, so
// a neuron whose predictor says no (m_i = 0), whose gate is not positive or whose up is not positive costs no further
// weight reads. No ggml types here.
#ifndef TSFFN_FFN_H
#define TSFFN_FFN_H

#include "../ffn/device.h"
#include "matrix.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// The FFN of one layer, or one expert of it.
struct tsffn_ffn {
    int64_t n_embd;
    int64_t n_ff;
    struct tsffn_matrix gate; // [n_ff][n_embd]
    struct tsffn_matrix up;   // [n_ff][n_embd]
    struct tsffn_matrix down; // [n_ff][n_embd], neuron-major: row i is what neuron i adds to the output

    // Predictor: neuron i is on when (fc2_i . relu(fc1 . p)) passes the threshold, p = x * scale. fc1.data is NULL in
    // exact mode, where every neuron is on.
    struct tsffn_matrix fc1;  // [rank][n_embd]
    struct tsffn_matrix fc2;  // [n_ff][rank]
    const float * pred_scale; // [n_embd], or NULL for p = x
    float threshold;
    bool on_when_equal; // logit >= threshold instead of logit > threshold
};

// Scratch memory that grows to the largest call and is then reused: nothing is allocated per token.
struct tsffn_workspace;
struct tsffn_workspace * tsffn_workspace_new(void);
void tsffn_workspace_free(struct tsffn_workspace * ws);

// Computes `call` with the FFNs of a layer and adds to `counts`; `call->op` says which matrices are needed. Returns
// false when memory for the workspace cannot be had.
bool tsffn_compute(struct tsffn_workspace * ws, const struct tsffn_ffn * ffns, int64_t n_ffns,
                   const struct tsffn_call * call, struct tsffn_counts * counts);

#endif
