// Dense products of weight rows with many activation vectors, for a matrix unit: s[i][t] = row_i . x_t.
//
// Activations and weights are split into two bfloat16 numbers each, v = hi + lo up to 2^-16 |v|, and
//     w . x  =  w_hi . x_hi + w_hi . x_lo + w_lo . x_hi        (the fourth product is below 2^-16 |w| |x|)
// is summed in f32 over the whole row. That holds q4_0 and f16 weights exactly and leaves an error of the size of the
// 16-bit activations that the row kernels use; three bfloat16 products cost less than spilling 32-bit sums for the
// scale of every block would. f32 weights have no place here: they would lose their last bits.
#ifndef TSFFN_GEMM_H
#define TSFFN_GEMM_H

#include "kernels.h"

enum {
    TSFFN_GEMM_ROWS = 32,  // weight rows of one product
    TSFFN_GEMM_GROUP = 16, // activation vectors are packed by groups of so many
    TSFFN_GEMM_MAX_X = 64, // activation vectors of one product
    TSFFN_GEMM_K = 32,     // rows are a multiple of so many weights
    TSFFN_GEMM_MIN_X = 8,  // fewer vectors are served better by the row kernels: half of each tile would be empty
};

struct tsffn_gemm {
    // x as hi[n], lo[n].
    void (*split)(int64_t n, const float * x, uint16_t * halves);
    // Bytes that `pack` fills for n_x vectors of n values.
    size_t (*packed_bytes)(int64_t n, int n_x);
    // Group `group` of the n_x split vectors, for `multiply`.
    void (*pack)(int64_t n, int n_x, const uint16_t * const x[], int group, void * packed);
    // s[i * TSFFN_GEMM_MAX_X + t] = row_i . x_t for TSFFN_GEMM_ROWS rows, `stride` bytes apart.
    void (*multiply)(enum tsffn_format format, int64_t n, const void * rows, size_t stride, int n_x,
                     const void * packed, float * s);
};

#endif
