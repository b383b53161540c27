// The sparse FFN: neuron i of a dReLU layer adds  relu(gate_i . x) * relu(up_i . x) * m_i * down_i  to the output. So
// a neuron that the predictor leaves out (m_i = 0), or whose factor of gate is 0, or that of up, costs no further
// weight reads. ffn/activation.h has the factors. No ggml types here.
#ifndef TSFFN_FFN_H
#define TSFFN_FFN_H

#include "../ffn/device.h"
#include "matrix.h"

// The FFN of a dense layer, or one expert of it.
struct tsffn_ffn {
    struct tsffn_neurons neurons; // [n_ff]
    // The predictor, as in ffn/layer.h.
    struct tsffn_matrix fc1, fc2, fc3;
    const float * thresholds;
};

// The matrix that p is multiplied with.
static inline const struct tsffn_matrix * tsffn_first_matrix(const struct tsffn_ffn * ffn) {
    return ffn->fc1.data != NULL ? &ffn->fc1 : &ffn->fc2;
}

// A layer for the CPU.
struct tsffn_cpu_layer {
    int64_t n_embd, n_ff, n_ffns;
    const struct tsffn_ffn * ffns;                      // [n_ffns]
    const struct tsffn_row_type * types[TSFFN_N_PARTS]; // of the rows of gate, up and down
    struct tsffn_activation activation;
    enum tsffn_predictor_form form;
    int input_bits;           // of p, for weights of bits1 and bits2
    const float * pred_scale; // [n_embd], or NULL for p = x
    float threshold;
    bool on_when_equal; // logit >= threshold instead of logit > threshold
};

// Scratch memory that grows to the largest call and is then reused: nothing is allocated per token.
struct tsffn_workspace;
struct tsffn_workspace * tsffn_workspace_new(void);
void tsffn_workspace_free(struct tsffn_workspace * ws);

// Computes `call` with a layer, of which it needs the matrices that the call's operation reads, and adds to `counts`.
// Returns false when memory for the workspace cannot be had.
bool tsffn_compute(struct tsffn_workspace * ws, const struct tsffn_cpu_layer * layer, const struct tsffn_call * call,
                   struct tsffn_counts * counts);

#endif
