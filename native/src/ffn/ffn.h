// The sparse FFN: neuron i of a dReLU layer adds  relu(gate_i . x) * relu(up_i . x) * m_i * down_i  to the output, so
// a neuron whose predictor says no (m_i = 0), whose gate is not positive or whose up is not positive costs no further
// weight reads. No ggml types here.
#ifndef TSFFN_FFN_H
#define TSFFN_FFN_H

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

// What a call computes. A graph that is cut between the four operations of an FFN needs each of them alone.
enum tsffn_op {
    TSFFN_OP_FUSED, // y[r][0..n_embd) = the whole FFN of x
    TSFFN_OP_GATE,  // y[r][0..n_ff)   = gate . x, 0 where the predictor says no
    TSFFN_OP_UP,    // y[r][0..n_ff)   = up . x
    TSFFN_OP_DOWN,  // y[r][0..n_embd) = sum_i x[r][i] * down_i; x is [n_ff]
};

// One output row: which token's activations go through which FFN. Rows of a call are sorted by ffn.
struct tsffn_row {
    int32_t ffn;   // index into the call's ffns
    int32_t token; // index into the call's x
    float * y;     // written last: it may overlap the memory of any x
    float * h;     // FUSED: [n_ff], receives relu(gate . x) * relu(up . x) * m; NULL when nobody wants it
};

// Activation statistics of one layer, which a call adds to (tsffn.h says what is counted).
enum {
    TSFFN_PROFILE_COUNTS = 6,
    TSFFN_PROFILE_HISTOGRAMS = 3,
    TSFFN_PROFILE_BINS = 130,
};
struct tsffn_profile {
    uint64_t * tokens;     // [n_ffns]
    uint64_t * neurons;    // [TSFFN_PROFILE_COUNTS][n_ffns][n_ff]
    uint64_t * histograms; // [TSFFN_PROFILE_HISTOGRAMS][TSFFN_PROFILE_BINS]
};

struct tsffn_call {
    enum tsffn_op op;
    const struct tsffn_ffn *
        ffns; // [n_ffns], with equal types and shapes, but for the rank; `op` says which matrices are set
    int64_t n_ffns;
    const struct tsffn_row * rows; // [n_rows]
    int64_t n_rows;
    const char * x;  // token t's activations are f32 at x + t * x_stride
    size_t x_stride; // bytes
    int64_t n_tokens;
    int n_threads;
    bool dense; // FUSED: read and multiply every row of gate, up and down, as a dense FFN does; without predictor
    const struct tsffn_profile *
        profile; // FUSED: add statistics here, and compute gate and up of every neuron; or NULL
};

// Counts of one call. A "neuron" is one neuron of one row; bytes are weight bytes that a thread touches at least once.
struct tsffn_counts {
    uint64_t neurons;       // all, n_ff per row
    uint64_t predicted;     // the predictor said yes (all of them in exact mode)
    uint64_t gate_positive; // and gate > 0
    uint64_t active;        // and up > 0
    uint64_t bytes_predictor;
    uint64_t bytes_ffn;
    uint64_t bytes_dense; // gate, up and down of every FFN with at least one row, once per tile of rows
    uint64_t ns_predictor;
    uint64_t ns_ffn;
};

// Scratch memory that grows to the largest call and is then reused: nothing is allocated per token.
struct tsffn_workspace;
struct tsffn_workspace * tsffn_workspace_new(void);
void tsffn_workspace_free(struct tsffn_workspace * ws);

// Computes `call` and adds to `counts`. Returns false when memory for the workspace cannot be had.
// For a given thread count the result of a row does not depend on the other rows of the call.
bool tsffn_compute(struct tsffn_workspace * ws, const struct tsffn_call * call, struct tsffn_counts * counts);

#endif
