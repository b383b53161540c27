// What lies in the device's memory. Bytes are those of the file in another order, so that a lane can read 16 of them at
// once, and rows are padded with zeros.
//
//   row           n weights, n a multiple of 32, in chunks of 16 bytes; each row begins at a multiple of 16
//     F32           chunks of 4 weights
//     F16, BF16     chunks of 8
//     Q8_0          chunks of 16: int8 q[n];                  then f16 d[n / 32]      (blocks of 34 bytes in the file)
//     Q4_0          chunks of 32: uint8 q[16] of each block;  then f16 d[n / 32]      (blocks of 18 bytes)
//   neuron        its rows of gate, up and down, one behind the other
//   matrix of     of F32, F16, BF16: rows
//   the predictor of Q8_0, Q4_0, q3_nl: panels of 16 rows, as in the file (cpu/kernels/panels.h), an even number of
//   them.
//                 Rows that the file has outside of panels are in panels here
//
// C and CUDA C++ read this file.
#ifndef TSFFN_CUDA_LAYOUT_H
#define TSFFN_CUDA_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

enum {
    TSFFN_CUDA_F32,
    TSFFN_CUDA_F16,
    TSFFN_CUDA_BF16,
    TSFFN_CUDA_Q8_0,
    TSFFN_CUDA_Q4_0,
    TSFFN_CUDA_ROW_FORMATS, // the formats above can be rows
    TSFFN_CUDA_Q3_NL = TSFFN_CUDA_ROW_FORMATS,
    TSFFN_CUDA_FORMATS,
};

enum {
    TSFFN_CUDA_BLOCK = 32,      // weights of a block; bits of a word of a mask
    TSFFN_CUDA_PANEL_ROWS = 16, //
    TSFFN_CUDA_ALIGN = 16,      // of rows; a chunk
    // Bytes of a panel: of 32 columns, and before them.
    TSFFN_CUDA_PANEL_Q8_0 = 16 * 34,
    TSFFN_CUDA_PANEL_Q4_0 = 16 * 18,
    TSFFN_CUDA_PANEL_Q3_NL = 16 * 13,
    TSFFN_CUDA_PANEL_Q3_NL_HEADER = 16 * 2,
    // Rounding of activations (cpu/kernels/kernels.h).
    TSFFN_CUDA_I16_MAX = 32639,
    TSFFN_CUDA_U14_MAX = 16383,
};

static inline int64_t tsffn_cuda_pad(int64_t n, int64_t to) {
    return (n + to - 1) / to * to;
}

#endif
