// A layer as a device is told of it: the weights of its FFNs, and how they are computed. Data only: what multiplies it
// is the device's affair (device.h).
#ifndef TSFFN_LAYER_H
#define TSFFN_LAYER_H

#include "activation.h"
#include "neurons.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Types of weights are ggml's (enum ggml_type), and these (docs/format.md).
enum {
    TSFFN_TYPE_Q3_NL = -1,
    TSFFN_TYPE_BITS1 = -2, // of a predictor without fc1
    TSFFN_TYPE_BITS2 = -3,
};
#define TSFFN_BLOCK_SIZE 32  // weights of a block of Q8_0, Q4_0 and q3_nl
#define TSFFN_Q3_NL_BYTES 13 // of a block,
#define TSFFN_Q3_NL_HEADER 2 // and of a row before its blocks
enum {
    TSFFN_Q3_NL_MAX_COLUMNS = 1 << 17, // whose sums an int32 holds: 2^17 * 127 * 8 * 15 < 2^31
    TSFFN_BITS_MAX_COLUMNS = 1 << 20,  // of bits1 and bits2: 2^20 * 3 * 255 < 2^31
    TSFFN_BITS_MAX_INPUT = 8,          // bits of the activations that these are multiplied with
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
    // The predictor: matrices as its form has them, none in exact mode, where every neuron is on.
    struct tsffn_weights fc1; // [rank][n_embd]
    struct tsffn_weights fc2; // [n_ff][rank], or [n_ff][n_embd] without fc1
    struct tsffn_weights fc3; // [n_ff][n_embd]
    const float * thresholds; // [n_ff] of fc2, and [n_ff] of fc3 where there is one; NULL: 0
};

// How a predictor makes a logit of each neuron from p = x * pred_scale.
enum tsffn_predictor_form {
    TSFFN_PREDICTOR_MLP,     // fc2 . relu(fc1 . p) - thresholds
    TSFFN_PREDICTOR_LINEAR,  // fc2 . (fc1 . p) - thresholds
    TSFFN_PREDICTOR_GATE,    // fc2 . p - thresholds; fc2 is a rounded gate
    TSFFN_PREDICTOR_GATE_UP, // the lesser of fc2 . p - thresholds and fc3 . p - thresholds; fc3 is a rounded up
    TSFFN_N_PREDICTOR_FORMS,
};

// Neuron i is on when its logit passes the threshold.
struct tsffn_layer {
    int64_t n_embd, n_ff;
    int64_t n_ffns; // experts; 1 for a dense layer. All have the same types and shapes, but for the rank
    struct tsffn_ffn_weights * ffns;
    enum tsffn_predictor_form form;
    int input_bits;           // of p, where fc2 is of bits1 or bits2: 1 to TSFFN_BITS_MAX_INPUT
    int types[TSFFN_N_PARTS]; // of the rows of gate, up and down
    struct tsffn_activation activation;
    const float * pred_scale; // [n_embd], or NULL for p = x
    float threshold;
    bool on_when_equal; // logit >= threshold instead of logit > threshold
};

static inline bool tsffn_has_predictor(const struct tsffn_layer * layer) {
    return layer->ffns[0].fc2.data != NULL;
}

#endif
