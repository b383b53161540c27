// Matrices whose every row is multiplied for every token, 16 rows interleaved: one vector instruction serves 16 rows,
// where a row alone would spend most instructions on unpacking and on summing across lanes.
//
// A panel holds 16 rows of Q8_0 or Q4_0. For each block of 32 columns, one after the other:
//   f16 d[16]             the scales of the 16 rows
//   uint8 q[G][16][4]     bytes 4g .. 4g+3 of each row's 4 G bytes of weights; G = 8 (Q8_0), 4 (Q4_0)
// A panel of 16 rows of Q3_NL starts with
//   f16 d[16]             of the rows
// and then holds for each block of 32 columns
//   uint8 scales[16]      of each row: s_0 + 16 s_1, in two's complement; s_h is that of columns 16 h .. 16 h + 15
//   uint8 q[3][16][4]     of each row: code of column 4 g + k in
//                           bits 0-2 of q[g][k]                      for g = 0, 1, 2
//                           bits 3-5 of q[g - 3][k]                  for g = 3, 4, 5
//                           bits 6-7 of q[g - 6][k] and, above them, bit g of q[2][k]  for g = 6, 7
// A weight is d * s_h * levels[code].
// A panel of 16 rows of BITS1 or BITS2 holds for each block of 32 columns
//   uint32 b[B][16]       b[k] of each row; B = 1 or 2
// These are the bytes of the 16 plain rows in another order.
//
// A panel's products (tsffn_panel): row i of the panel times x[t], for n_x vectors of n values. All tiers give the same
// bits. Q8_0, Q4_0: the products of a block are summed in integers, the blocks in order, each with one fused
// multiply-add. Q3_NL: all products are summed in integers, those with hi and those with lo; then
// s = (128 * hi + lo) * d * scale of x, the first with one rounding. BITS1, BITS2: with weights and activations of B
// and P bits, s = sum * d, d that of x, of the integer
//   sum = (2^B - 1) (2^P - 1) n - 2 sum_{k < B, l < P} 2^(k + l) popcount(w_k xor x_l)
// since a product of signs is -1 where they differ.
#ifndef TSFFN_PANELS_H
#define TSFFN_PANELS_H

#include "kernels.h"

enum {
    TSFFN_PANEL_Q8_0_BYTES = TSFFN_PANEL_ROWS * TSFFN_Q8_0_BYTES, // per block of columns
    TSFFN_PANEL_Q4_0_BYTES = TSFFN_PANEL_ROWS * TSFFN_Q4_0_BYTES,
    TSFFN_PANEL_Q3_NL_BYTES = TSFFN_PANEL_ROWS * TSFFN_Q3_NL_BYTES,
    TSFFN_PANEL_Q3_NL_HEADER = TSFFN_PANEL_ROWS * TSFFN_Q3_NL_HEADER,
};

// The largest product of n weights of n_bits bits with activations of n_planes.
static inline int32_t tsffn_bits_most(int n_bits, int n_planes, int64_t n) {
    return (int32_t)(((1 << n_bits) - 1) * ((1 << n_planes) - 1) * n);
}

// For 3 bits, twice: the tables of byte shuffles have 16 entries.
#define TSFFN_Q3_NL_LEVELS -15, -9, -5, -2, 1, 4, 8, 13, -15, -9, -5, -2, 1, 4, 8, 13

#endif
