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

static int32_t level_q3_nl(const uint8_t * block, int i, int j) {
    static const int8_t levels[] = {TSFFN_Q3_NL_LEVELS};
    const int g = j / 4;
    const uint8_t * q = block + TSFFN_PANEL_ROWS + i * 4 + j % 4; // q[0]; 64 bytes further q[1], q[2]
    if (g < 6) {
        return levels[q[g % 3 * 64] >> g / 3 * 3 & 7];
    }
    return levels[q[(g - 6) * 64] >> 6 | (q[128] >> g & 1) << 2];
}

void tsffn_panel_q3_nl_ref(int64_t n, const void * panel, int n_x, const void * const * x, float (*s)[TSFFN_PANEL_ROWS],
                           const struct tsffn_asks * asks) {
    (void)asks;
    for (int t = 0; t < n_x; ++t) {
        const uint8_t *hi = tsffn_u14_hi(x[t]), *lo = tsffn_u14_lo(x[t], n);
        for (int i = 0; i < TSFFN_PANEL_ROWS; ++i) {
            const uint8_t * block = (const uint8_t *)panel + TSFFN_PANEL_Q3_NL_HEADER;
            int32_t hi_sum = 0, lo_sum = 0;
            for (int64_t j = 0; j < n; j += TSFFN_BLOCK_SIZE, block += TSFFN_PANEL_Q3_NL_BYTES) {
                for (int k = 0; k < TSFFN_BLOCK_SIZE; ++k) {
                    const int32_t nibble = block[i] >> k / 16 * 4 & 15;
                    const int32_t w = (nibble < 8 ? nibble : nibble - 16) * level_q3_nl(block, i, k);
                    hi_sum += w * hi[j + k];
                    lo_sum += w * lo[j + k];
                }
            }
            const float d = tsffn_f16_to_f32(tsffn_load_u16((const uint8_t *)panel + 2 * i));
            s[t][i] = fmaf(128.0f, (float)hi_sum, (float)lo_sum) * d * tsffn_u14_scale(x[t]);
        }
    }
}
