// Plain C kernels: the reference of every other tier, and what runs where no tier fits.
#include "half.h"
#include "panels.h"
#include "templates.h"
#include "tiers.h"

#include <math.h>

static float dot_f32(int64_t n, const void * row, const void * activations) {
    const float * w = row;
    const float * x = activations;
    float sum = 0.0f;
    for (int64_t j = 0; j < n; ++j) {
        sum += w[j] * x[j];
    }
    return sum;
}

static void axpy_f32(int64_t n, float a, const void * row, float * y) {
    const float * w = row;
    for (int64_t j = 0; j < n; ++j) {
        y[j] += a * w[j];
    }
}

static float dot_f16(int64_t n, const void * row, const void * activations) {
    const uint16_t * w = row;
    const float * x = activations;
    float sum = 0.0f;
    for (int64_t j = 0; j < n; ++j) {
        sum += tsffn_f16_to_f32(w[j]) * x[j];
    }
    return sum;
}

static void axpy_f16(int64_t n, float a, const void * row, float * y) {
    const uint16_t * w = row;
    for (int64_t j = 0; j < n; ++j) {
        y[j] += a * tsffn_f16_to_f32(w[j]);
    }
}

static float dot_bf16(int64_t n, const void * row, const void * activations) {
    const uint16_t * w = row;
    const float * x = activations;
    float sum = 0.0f;
    for (int64_t j = 0; j < n; ++j) {
        sum += tsffn_bf16_to_f32(w[j]) * x[j];
    }
    return sum;
}

static void axpy_bf16(int64_t n, float a, const void * row, float * y) {
    const uint16_t * w = row;
    for (int64_t j = 0; j < n; ++j) {
        y[j] += a * tsffn_bf16_to_f32(w[j]);
    }
}

static float dot_q8_0(int64_t n, const void * row, const void * activations) {
    const uint8_t * block = row;
    const int16_t * x = tsffn_i16_values(activations);
    float sum = 0.0f;
    for (int64_t j = 0; j < n; j += TSFFN_BLOCK_SIZE, block += TSFFN_Q8_0_BYTES) {
        const int8_t * q = (const int8_t *)(block + 2);
        int32_t products = 0;
        for (int k = 0; k < TSFFN_BLOCK_SIZE; ++k) {
            products += q[k] * x[j + k];
        }
        sum += tsffn_f16_to_f32(tsffn_load_u16(block)) * (float)products;
    }
    return sum * tsffn_i16_scale(activations);
}

static float dot_q4_0(int64_t n, const void * row, const void * activations) {
    const uint8_t * block = row;
    const int16_t * x = tsffn_i16_values(activations);
    float sum = 0.0f;
    for (int64_t j = 0; j < n; j += TSFFN_BLOCK_SIZE, block += TSFFN_Q4_0_BYTES) {
        const uint8_t * q = block + 2;
        int32_t products = 0;
        for (int k = 0; k < TSFFN_BLOCK_SIZE / 2; ++k) {
            products += ((q[k] & 15) - 8) * x[j + k] + ((q[k] >> 4) - 8) * x[j + k + 16];
        }
        sum += tsffn_f16_to_f32(tsffn_load_u16(block)) * (float)products;
    }
    return sum * tsffn_i16_scale(activations);
}

static void axpy_q8_0(int64_t n, float a, const void * row, float * y) {
    const uint8_t * block = row;
    for (int64_t j = 0; j < n; j += TSFFN_BLOCK_SIZE, block += TSFFN_Q8_0_BYTES) {
        const float d = a * tsffn_f16_to_f32(tsffn_load_u16(block));
        const int8_t * q = (const int8_t *)(block + 2);
        for (int k = 0; k < TSFFN_BLOCK_SIZE; ++k) {
            y[j + k] += d * (float)q[k];
        }
    }
}

static void axpy_q4_0(int64_t n, float a, const void * row, float * y) {
    const uint8_t * block = row;
    for (int64_t j = 0; j < n; j += TSFFN_BLOCK_SIZE, block += TSFFN_Q4_0_BYTES) {
        const float d = a * tsffn_f16_to_f32(tsffn_load_u16(block));
        const uint8_t * q = block + 2;
        for (int k = 0; k < TSFFN_BLOCK_SIZE / 2; ++k) {
            y[j + k] += d * (float)((q[k] & 15) - 8);
            y[j + k + 16] += d * (float)((q[k] >> 4) - 8);
        }
    }
}

TSFFN_DEFINE_DOTS_ONE_BY_ONE(tsffn_dots_f32_ref, dot_f32)
TSFFN_DEFINE_DOTS_ONE_BY_ONE(tsffn_dots_f16_ref, dot_f16)
TSFFN_DEFINE_DOTS_ONE_BY_ONE(tsffn_dots_bf16_ref, dot_bf16)
TSFFN_DEFINE_DOTS_ONE_BY_ONE(tsffn_dots_q8_0_ref, dot_q8_0)
TSFFN_DEFINE_DOTS_ONE_BY_ONE(tsffn_dots_q4_0_ref, dot_q4_0)
TSFFN_DEFINE_AXPYS_ONE_BY_ONE(tsffn_axpys_f32_ref, axpy_f32)
TSFFN_DEFINE_AXPYS_ONE_BY_ONE(tsffn_axpys_f16_ref, axpy_f16)
TSFFN_DEFINE_AXPYS_ONE_BY_ONE(tsffn_axpys_bf16_ref, axpy_bf16)
TSFFN_DEFINE_AXPYS_ONE_BY_ONE(tsffn_axpys_q8_0_ref, axpy_q8_0)
TSFFN_DEFINE_AXPYS_ONE_BY_ONE(tsffn_axpys_q4_0_ref, axpy_q4_0)
// ---- panels

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

static void panel_of_bits(int n_bits, int64_t n, const void * panel, int n_x, const void * const * x,
                          float (*s)[TSFFN_PANEL_ROWS]) {
    for (int t = 0; t < n_x; ++t) {
        const int n_planes = tsffn_bits_planes(x[t]);
        for (int i = 0; i < TSFFN_PANEL_ROWS; ++i) {
            const uint32_t *w = (const uint32_t *)panel + i, *planes = tsffn_bits_words(x[t]);
            int32_t differ = 0;
            for (int64_t j = 0; j < n; j += TSFFN_BLOCK_SIZE, planes += n_planes) {
                for (int k = 0; k < n_bits; ++k, w += TSFFN_PANEL_ROWS) {
                    for (int l = 0; l < n_planes; ++l) {
                        differ += __builtin_popcount(*w ^ planes[l]) << (k + l);
                    }
                }
            }
            s[t][i] = (float)(tsffn_bits_most(n_bits, n_planes, n) - 2 * differ) * tsffn_bits_scale(x[t]);
        }
    }
}

void tsffn_panel_bits1_ref(int64_t n, const void * panel, int n_x, const void * const * x, float (*s)[TSFFN_PANEL_ROWS],
                           const struct tsffn_asks * asks) {
    (void)asks;
    panel_of_bits(1, n, panel, n_x, x, s);
}

void tsffn_panel_bits2_ref(int64_t n, const void * panel, int n_x, const void * const * x, float (*s)[TSFFN_PANEL_ROWS],
                           const struct tsffn_asks * asks) {
    (void)asks;
    panel_of_bits(2, n, panel, n_x, x, s);
}

const struct tsffn_kernels tsffn_kernels_ref = {
    .isa = TSFFN_ISA_REF,
    .name = "ref",
    .dots =
        {
            [TSFFN_FORMAT_F32] = tsffn_dots_f32_ref,
            [TSFFN_FORMAT_F16] = tsffn_dots_f16_ref,
            [TSFFN_FORMAT_BF16] = tsffn_dots_bf16_ref,
            [TSFFN_FORMAT_Q8_0] = tsffn_dots_q8_0_ref,
            [TSFFN_FORMAT_Q4_0] = tsffn_dots_q4_0_ref,
        },
    .axpys =
        {
            [TSFFN_FORMAT_F32] = tsffn_axpys_f32_ref,
            [TSFFN_FORMAT_F16] = tsffn_axpys_f16_ref,
            [TSFFN_FORMAT_BF16] = tsffn_axpys_bf16_ref,
            [TSFFN_FORMAT_Q8_0] = tsffn_axpys_q8_0_ref,
            [TSFFN_FORMAT_Q4_0] = tsffn_axpys_q4_0_ref,
        },
    .panel =
        {
            [TSFFN_FORMAT_Q8_0] = tsffn_panel_q8_0_ref,
            [TSFFN_FORMAT_Q4_0] = tsffn_panel_q4_0_ref,
            [TSFFN_FORMAT_Q3_NL] = tsffn_panel_q3_nl_ref,
            [TSFFN_FORMAT_BITS1] = tsffn_panel_bits1_ref,
            [TSFFN_FORMAT_BITS2] = tsffn_panel_bits2_ref,
        },
};
