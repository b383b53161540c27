// The kernels of a call, and what they are given. C and CUDA C++ read this file.
//
//   hidden    h1[r] = relu(fc1 . p_r), p = x * pred_scale
//   mask      bit i of masks[r] = fc2_i . h1[r] passes the threshold
//   neurons   h[r][i] = f(gate_i . x_r) * g(up_i . x_r) of the neurons that are on
//   down      partial[r][s] = sum of h[r][i] * down_i over the neurons of share s
//   combine   y[r] = sum of partial[r][s] over s, + cold[r]
//
// Rows that have one FFN are computed together, in segments of up to TSFFN_CUDA_SEGMENT_ROWS: a weight is read once for
// all of them. Grids have a segment in y, or z. Every sum has one order, which the shape of the layer alone decides.
#ifndef TSFFN_CUDA_KERNELS_H
#define TSFFN_CUDA_KERNELS_H

#include "../ffn/activation.h"
#include "layout.h"

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

// Sizes of blocks and grids. Tests with small layers have small ones, so that every loop goes round more than once.
enum {
    TSFFN_CUDA_SEGMENT_ROWS = 4,
    TSFFN_CUDA_PLAN_ROWS = 64, // of a call
#ifndef TSFFN_CUDA_SMALL
    TSFFN_CUDA_WARPS = 8,           // of a block,
    TSFFN_CUDA_DOWN_WARPS = 4,      // and of one of `down`
    TSFFN_CUDA_TILE_ONE = 64,       // blocks of columns whose products `hidden` and `mask` hold at a time, for one row,
    TSFFN_CUDA_TILE = 32,           // and for several
    TSFFN_CUDA_MASK_BLOCKS = 256,   // that share the words of a segment's masks, at most
    TSFFN_CUDA_NEURON_BLOCKS = 128, // that share the neurons of a segment, at most
    TSFFN_CUDA_LISTED = 256,        // neurons of a block at a time
    TSFFN_CUDA_SHARES = 64,         // of the sums of `down`, at most: see tsffn_cuda_shares
#else
    TSFFN_CUDA_WARPS = 4,
    TSFFN_CUDA_DOWN_WARPS = 2,
    TSFFN_CUDA_TILE_ONE = 2,
    TSFFN_CUDA_TILE = 1,
    TSFFN_CUDA_MASK_BLOCKS = 1,
    TSFFN_CUDA_NEURON_BLOCKS = 2,
    TSFFN_CUDA_LISTED = 4,
    TSFFN_CUDA_SHARES = 1,
#endif
};

struct tsffn_cuda_segment {
    int32_t ffn, first_row, n_rows;
};

// In the device's memory, for each FFN.
struct tsffn_cuda_ffn {
    const uint8_t * fc1;     // [rank][n_embd], layout.h
    const uint8_t * fc2;     // [n_ff][rank]
    const uint8_t * neurons; // of the range
    int32_t rank;
    int32_t first, end; // range
};

// What `neurons` counts: neurons of rows, and neurons whose weights are read.
enum {
    TSFFN_CUDA_COUNT_PREDICTED,
    TSFFN_CUDA_COUNT_GATE_POSITIVE,
    TSFFN_CUDA_COUNT_ACTIVE,
    TSFFN_CUDA_COUNT_READ,      // gate and up: on for some row of the segment
    TSFFN_CUDA_COUNT_READ_DOWN, // active for some row
    TSFFN_CUDA_COUNTS,
};

// The parameter of every kernel. Pointers are the device's.
struct tsffn_cuda_args {
    struct tsffn_cuda_segment segments[TSFFN_CUDA_PLAN_ROWS];
    int32_t tokens[TSFFN_CUDA_PLAN_ROWS]; // of each row
    int32_t n_segments, n_rows;
    int32_t n_embd, n_ff, n_words; // n_words: of a row's mask
    int32_t max_rank;              // of the layer's FFNs, a multiple of 32
    int32_t n_shares;
    const struct tsffn_cuda_ffn * ffns;
    uint32_t neuron_bytes, up_offset, down_offset; // of a neuron
    struct tsffn_activation activation;
    float threshold;
    bool on_when_equal;
    const float * pred_scale; // [n_embd], or NULL: p = x
    const float * x;          // [tokens][n_embd]
    float * hidden;           // [n_rows][max_rank], 0 from the FFN's rank on
    uint32_t * masks;         // [n_rows][n_words]; NULL: all neurons are on
    float * h;                // [n_rows][n_ff], written where the mask is 1 within the range
    float * partial;          // [n_rows][n_shares][n_embd]
    const float * cold;       // [n_rows][n_embd], or NULL: 0
    float * y;                // [n_rows][n_embd]
    uint32_t * counts;        // [n_segments][neuron blocks][TSFFN_CUDA_COUNTS]: what each block of `neurons` counted
};

// Share s of the neurons are those of the words s, s + shares, ... of a mask.
static inline int tsffn_cuda_shares(int64_t n_ff) {
    const int64_t n_words = (n_ff + 31) / 32;
    return n_words < TSFFN_CUDA_SHARES ? (int)n_words : (int)TSFFN_CUDA_SHARES;
}

// Blocks of `neurons` for a segment.
static inline int tsffn_cuda_neuron_blocks(int64_t n_ff) {
    const int64_t n_words = (n_ff + 31) / 32;
    return n_words < TSFFN_CUDA_NEURON_BLOCKS ? (int)n_words : (int)TSFFN_CUDA_NEURON_BLOCKS;
}

// Bytes of shared memory that a block needs for segments of up to n_rows rows. `columns`: of the matrix that it reads.
size_t tsffn_cuda_hidden_shared(int format, int n_rows, int64_t columns);
size_t tsffn_cuda_mask_shared(int format, int n_rows, int64_t columns);
size_t tsffn_cuda_neurons_shared(int format, int n_rows, int64_t columns);

// Launches a kernel on a stream, for segments of up to n_rows rows. Returns a cudaError_t.
int tsffn_cuda_launch_hidden(int format, int n_rows, const struct tsffn_cuda_args * args, void * stream);
int tsffn_cuda_launch_mask(int format, int n_rows, const struct tsffn_cuda_args * args, void * stream);
int tsffn_cuda_launch_neurons(int format, int n_rows, const struct tsffn_cuda_args * args, void * stream);
int tsffn_cuda_launch_down(int format, int n_rows, const struct tsffn_cuda_args * args, void * stream);
int tsffn_cuda_launch_combine(const struct tsffn_cuda_args * args, void * stream);

#ifdef __cplusplus
}
#endif

#endif
