// A layer as a device is told of it: the weights of its FFNs, and how they are computed. Data only: what multiplies it
// is the device's affair (device.h).
#ifndef TSFFN_LAYER_H
#define TSFFN_LAYER_H

#include "activation.h"
#include "neurons.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Types of weights are ggml's (enum ggml_type), and this one (docs/format.md).
enum { TSFFN_TYPE_Q3_NL = -1 };
#define TSFFN_BLOCK_SIZE 32  // weights of a block of Q8_0, Q4_0 and q3_nl
#define TSFFN_Q3_NL_BYTES 13 // of a block,
#define TSFFN_Q3_NL_HEADER 2 // and of a row before its blocks
enum {
    TSFFN_Q3_NL_MAX_COLUMNS = 1 << 17, // whose sums an int32 holds: 2^17 * 127 * 8 * 15 < 2^31
    TSFFN_PANEL_ROWS = 16,
};

enum tsffn_layout {
    TSFFN_LAYOUT_ROWS,   // one row after the other
    TSFFN_LAYOUT_PANELS, // 16 rows interleaved (docs/format.md), then the last n_rows mod 16 one after the other
};

// Neurons [first, end) of an FFN; none where first == end.
struct tsffn_range {
    int32_t first, end;
};

// Words of a mask over n_ff neurons: bit i mod 32 of word i / 32 is neuron i's, and set where it is on.
static inline int64_t tsffn_mask_words(int64_t n_ff) {
    return (n_ff + 31) / 32;
}

// A matrix of n_rows rows of n_cols weights.
struct tsffn_weights {
    int type;
    const uint8_t * data; // NULL when the matrix is absent
    int64_t n_rows, n_cols;
    size_t row_bytes;
    enum tsffn_layout layout;
};

// Bytes of all its rows.
static inline size_t tsffn_weights_bytes(const struct tsffn_weights * weights) {
    return (size_t)weights->n_rows * weights->row_bytes;
}

// The FFN of a dense layer, or one expert of it.
struct tsffn_ffn_weights {
    struct tsffn_neurons neurons; // n_ff: rows of n_embd weights; row i of down is what neuron i adds to the output
    struct tsffn_weights fc1;     // predictor: [rank][n_embd]; absent in exact mode, where every neuron is on
    struct tsffn_weights fc2;     // [n_ff][rank]
};

// Neuron i is on when fc2_i . relu(fc1 . p) passes the threshold, p = x * pred_scale.
struct tsffn_layer {
    int64_t n_embd, n_ff;
    int64_t n_ffns; // experts; 1 for a dense layer. All have the same types and shapes, but for the rank
    struct tsffn_ffn_weights * ffns;
    int types[TSFFN_N_PARTS]; // of the rows of gate, up and down
    struct tsffn_activation activation;
    const float * pred_scale; // [n_embd], or NULL for p = x
    float threshold;
    bool on_when_equal; // logit >= threshold instead of logit > threshold
};

#endif
