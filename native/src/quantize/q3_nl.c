// Rounding of a predictor's second matrix to Q3_NL (cpu/panels.h), without calibration data.
//
// What is minimised, for a row with the errors d_k = w_k - q_k, is the expected square of the error of its product with
// the activations h. Those are behind a ReLU: when the product before it is normal with mean 0, E[h^2] = pi * E[h]^2,
// and with E[h_k] = m_k and nothing known of how they go together
//   E[(sum_k d_k h_k)^2] = (sum_k x_k)^2 + c sum_k x_k^2,  x_k = d_k m_k,  c = pi - 1
// The first term is what rounding to nearest ignores; it is kept small by passing e = sum x of the columns that are
// done on to those that come. If those behind could be anything, the best for each of the n that are left would be
// x_k = -e / (c + n): so column k is rounded from w_k + e / (m_k (c + n)). A second pass rounds each column again, all
// others staying as they are: n = 1.
#include "../cpu/kernels/half.h"
#include "../cpu/kernels/panels.h"
#include "tsffn.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    LANES = 16, // rows at a time, for the compiler to make vectors of
    GROUP = 16, // columns that share a scale
    MAX_SCALE = 7,
};
#define C 2.14159265f // pi - 1

// A level lies between the two edges around it, half-way to its neighbours.
static inline float nearest_level(float v) {
    return -15.0f + (v >= -12.0f ? 6.0f : 0.0f) + (v >= -7.0f ? 4.0f : 0.0f) + (v >= -3.5f ? 3.0f : 0.0f) +
           (v >= -0.5f ? 3.0f : 0.0f) + (v >= 2.5f ? 3.0f : 0.0f) + (v >= 6.0f ? 4.0f : 0.0f) +
           (v >= 10.5f ? 5.0f : 0.0f);
}

// The scale of each lane with which rounding a group to nearest is best, every x_k counting alike.
static void choose_scales(float (*w)[LANES], const float * importance, float * scale) {
    float least[LANES];
    for (int i = 0; i < LANES; ++i) {
        least[i] = INFINITY;
        scale[i] = 1.0f;
    }
    for (int s = -MAX_SCALE; s <= MAX_SCALE; ++s) {
        if (s == 0) {
            continue;
        }
        const float candidate = (float)s, inverse = 1.0f / candidate;
        float error[LANES] = {0};
        for (int k = 0; k < GROUP; ++k) {
            const float square = importance[k] * importance[k];
            for (int i = 0; i < LANES; ++i) {
                const float d = w[k][i] - candidate * nearest_level(w[k][i] * inverse);
                error[i] += d * d * square;
            }
        }
        for (int i = 0; i < LANES; ++i) {
            scale[i] = error[i] < least[i] ? candidate : scale[i];
            least[i] = error[i] < least[i] ? error[i] : least[i];
        }
    }
}

// q: w rounded with the scales of each group.
static void pass_errors_on(int64_t n_cols, float (*w)[LANES], const float * importance, float (*scales)[LANES],
                           float (*level)[LANES]) {
    float e[LANES] = {0};
    for (int pass = 0; pass < 2; ++pass) {
        for (int64_t k = 0; k < n_cols; ++k) {
            const float * scale = scales[k / GROUP];
            const float m = importance[k];
            const float n_left = pass == 0 ? (float)(n_cols - k) : 1.0f;
            const float share = m > 0.0f ? 1.0f / (m * (C + n_left)) : 0.0f;
            for (int i = 0; i < LANES; ++i) {
                const float before = pass == 0 ? e[i] : e[i] - (w[k][i] - scale[i] * level[k][i]) * m;
                const float l = nearest_level((w[k][i] + before * share) / scale[i]);
                level[k][i] = l;
                e[i] = before + (w[k][i] - scale[i] * l) * m;
            }
        }
    }
}

static int code_of(float level) {
    static const int8_t levels[] = {TSFFN_Q3_NL_LEVELS};
    int code = 0;
    while (code < 7 && (float)levels[code] != level) {
        ++code;
    }
    return code;
}

// Row i of the lanes, without its d.
static void pack(int64_t n_cols, float (*scales)[LANES], float (*level)[LANES], int i, uint8_t * block) {
    for (int64_t j = 0; j < n_cols; j += TSFFN_BLOCK_SIZE, block += TSFFN_Q3_NL_BYTES) {
        block[0] = (uint8_t)(((int)scales[j / GROUP][i] & 15) | ((int)scales[j / GROUP + 1][i] & 15) << 4);
        for (int k = 0; k < 4; ++k) {
            int codes[8];
            for (int g = 0; g < 8; ++g) {
                codes[g] = code_of(level[j + 4 * g + k][i]);
            }
            block[1 + k] = (uint8_t)(codes[0] | codes[3] << 3 | (codes[6] & 3) << 6);
            block[5 + k] = (uint8_t)(codes[1] | codes[4] << 3 | (codes[7] & 3) << 6);
            block[9 + k] = (uint8_t)(codes[2] | codes[5] << 3 | codes[6] >> 2 << 6 | codes[7] >> 2 << 7);
        }
    }
}

bool tsffn_quantize_q3_nl(const float * w, int64_t n_rows, int64_t n_cols, const float * importance, const uint16_t * d,
                          uint8_t * rows) {
    if (w == NULL || importance == NULL || d == NULL || rows == NULL || n_rows < 0 || n_cols < TSFFN_BLOCK_SIZE ||
        n_cols > TSFFN_Q3_NL_MAX_COLUMNS || n_cols % TSFFN_BLOCK_SIZE != 0) {
        return false;
    }
    float (*lanes)[LANES] = malloc((size_t)n_cols * sizeof(*lanes));
    float (*level)[LANES] = malloc((size_t)n_cols * sizeof(*level));
    float (*scales)[LANES] = malloc((size_t)(n_cols / GROUP) * sizeof(*scales));
    const size_t row_bytes = TSFFN_Q3_NL_HEADER + (size_t)n_cols / TSFFN_BLOCK_SIZE * TSFFN_Q3_NL_BYTES;
    const bool ok = lanes != NULL && level != NULL && scales != NULL;
    for (int64_t r = 0; ok && r < n_rows; r += LANES) {
        const int n = (int)(n_rows - r < LANES ? n_rows - r : LANES);
        for (int i = 0; i < LANES; ++i) {
            const float unit = i < n ? tsffn_f16_to_f32(d[r + i]) : 0.0f;
            for (int64_t k = 0; k < n_cols; ++k) {
                lanes[k][i] = unit > 0.0f ? w[(r + i) * n_cols + k] / unit : 0.0f;
            }
        }
        for (int64_t k = 0; k < n_cols; k += GROUP) {
            choose_scales(lanes + k, importance + k, scales[k / GROUP]);
        }
        pass_errors_on(n_cols, lanes, importance, scales, level);
        for (int i = 0; i < n; ++i) {
            uint8_t * row = rows + (size_t)(r + i) * row_bytes;
            memcpy(row, d + r + i, TSFFN_Q3_NL_HEADER);
            pack(n_cols, scales, level, i, row + TSFFN_Q3_NL_HEADER);
        }
    }
    free(lanes);
    free(level);
    free(scales);
    return ok;
}
