// Matrices whose every row is multiplied for every token, 16 rows interleaved: one vector instruction serves 16 rows,
// where a row alone would spend most instructions on unpacking and on summing across lanes.
//
// A panel holds 16 rows of Q8_0 or Q4_0. For each block of 32 columns, one after the other:
//   f16 d[16]             the scales of the 16 rows
//   uint8 q[G][16][4]     bytes 4g .. 4g+3 of each row's 4 G bytes of weights; G = 8 (Q8_0), 4 (Q4_0)
// These are the bytes of the 16 plain rows in another order.
#ifndef TSFFN_PANELS_H
#define TSFFN_PANELS_H

#include "kernels.h"

enum {
    TSFFN_PANEL_Q8_0_BYTES = TSFFN_PANEL_ROWS * TSFFN_Q8_0_BYTES, // per block of columns
    TSFFN_PANEL_Q4_0_BYTES = TSFFN_PANEL_ROWS * TSFFN_Q4_0_BYTES,
};

// Panels of each tier (tsffn_panel_fn): row i of the panel times x[t], for n_x vectors of n values. All tiers give the
// same bits: the products of a block are summed in integers, the blocks in order, each with one fused multiply-add.
#define TSFFN_DECLARE_PANELS(tier)                                                                                     \
    void tsffn_panel_q8_0_##tier(int64_t n, const void * panel, int n_x, const void * const * x,                       \
                                 float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks);                        \
    void tsffn_panel_q4_0_##tier(int64_t n, const void * panel, int n_x, const void * const * x,                       \
                                 float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks)
TSFFN_DECLARE_PANELS(ref);
TSFFN_DECLARE_PANELS(avx2);
TSFFN_DECLARE_PANELS(avxvnni);
TSFFN_DECLARE_PANELS(avx512vnni);
TSFFN_DECLARE_PANELS(amx);
TSFFN_DECLARE_PANELS(neon);
TSFFN_DECLARE_PANELS(neondot);

// Panels of a tier by functions SUFFIX_1 .. SUFFIX_4 for that many vectors at once, which share unpacking the weights.
// The file's own DEFINE_PANEL(SUFFIX, N_X, ...) defines them.
#define TSFFN_DEFINE_PANELS_BY_FOUR(SUFFIX, TIER, ...)                                                                 \
    DEFINE_PANEL(SUFFIX, 1, __VA_ARGS__)                                                                               \
    DEFINE_PANEL(SUFFIX, 2, __VA_ARGS__)                                                                               \
    DEFINE_PANEL(SUFFIX, 3, __VA_ARGS__)                                                                               \
    DEFINE_PANEL(SUFFIX, 4, __VA_ARGS__)                                                                               \
    void tsffn_panel_##SUFFIX##_##TIER(int64_t n, const void * panel, int n_x, const void * const * x,                 \
                                       float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks) {                 \
        for (int t = 0; t < n_x; t += 4, asks = NULL) {                                                                \
            switch (n_x - t) {                                                                                         \
            case 1:                                                                                                    \
                SUFFIX##_1(n, panel, x + t, s + t, asks);                                                              \
                break;                                                                                                 \
            case 2:                                                                                                    \
                SUFFIX##_2(n, panel, x + t, s + t, asks);                                                              \
                break;                                                                                                 \
            case 3:                                                                                                    \
                SUFFIX##_3(n, panel, x + t, s + t, asks);                                                              \
                break;                                                                                                 \
            default:                                                                                                   \
                SUFFIX##_4(n, panel, x + t, s + t, asks);                                                              \
                break;                                                                                                 \
            }                                                                                                          \
        }                                                                                                              \
    }

#endif
