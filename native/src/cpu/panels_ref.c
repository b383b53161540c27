// Panels in plain C: the reference of every other tier.
#include "half.h"
#include "panels.h"

#include <math.h>
#include <string.h>

// Weight j of row i of a block of columns.
static int32_t weight_q8_0(const uint8_t * block, int i, int j) {
    return (int8_t)block[2 * TSFFN_PANEL_ROWS + j / 4 * 64 + i * 4 + j % 4];
}

static int32_t weight_q4_0(const uint8_t * block, int i, int j) {
    const int k = j % 16;
    const uint8_t byte = block[2 * TSFFN_PANEL_ROWS + k / 4 * 64 + i * 4 + k % 4];
    return (j < 16 ? byte & 15 : byte >> 4) - 8;
}

#define DEFINE_PANEL(SUFFIX, BYTES)                                                                                    \
    void tsffn_panel_##SUFFIX##_ref(int64_t n, const void * panel, int n_x, const void * const * x,                    \
                                    float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks) {                    \
        (void)asks;                                                                                                    \
        for (int t = 0; t < n_x; ++t) {                                                                                \
            const int16_t * q = tsffn_i16_values(x[t]);                                                                \
            for (int i = 0; i < TSFFN_PANEL_ROWS; ++i) {                                                               \
                const uint8_t * block = panel;                                                                         \
                float sum = 0.0f;                                                                                      \
                for (int64_t j = 0; j < n; j += TSFFN_BLOCK_SIZE, block += (BYTES)) {                                  \
                    int32_t products = 0;                                                                              \
                    for (int k = 0; k < TSFFN_BLOCK_SIZE; ++k) {                                                       \
                        products += weight_##SUFFIX(block, i, k) * q[j + k];                                           \
                    }                                                                                                  \
                    sum = fmaf(tsffn_f16_to_f32(tsffn_load_u16(block + 2 * i)), (float)products, sum);                 \
                }                                                                                                      \
                s[t][i] = sum * tsffn_i16_scale(x[t]);                                                                 \
            }                                                                                                          \
        }                                                                                                              \
    }

DEFINE_PANEL(q8_0, TSFFN_PANEL_Q8_0_BYTES)
DEFINE_PANEL(q4_0, TSFFN_PANEL_Q4_0_BYTES)
