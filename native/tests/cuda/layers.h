// Random layers in every format, as files have them, and their weights as doubles. Formats are written here from
// docs/format.md.
#ifndef TSFFN_TEST_CUDA_LAYERS_H
#define TSFFN_TEST_CUDA_LAYERS_H

#include "check.h"
#include "cpu/kernels/half.h"
#include "cpu/kernels/panels.h"

#include <math.h>
#include <string.h>

enum { GGML_F32 = 0, GGML_F16 = 1, GGML_Q4_0 = 2, GGML_Q8_0 = 8, GGML_BF16 = 30, MAX_FFNS = 3 };

static const int64_t RANKS[MAX_FFNS] = {0, -32, 32}; // of an expert: more or less than the first one's

// A matrix as in the file, and w [n_rows][n_cols].
struct random_matrix {
    struct tsffn_weights weights;
    double * w;
};

struct random_layer {
    struct tsffn_layer layer;
    struct tsffn_ffn_weights ffns[MAX_FFNS];
    struct random_matrix parts[MAX_FFNS][TSFFN_N_PARTS], fc1[MAX_FFNS], fc2[MAX_FFNS];
    float * pred_scale;
};

static inline void * allocate(size_t bytes) {
    void * memory = calloc(1, bytes > 0 ? bytes : 1);
    CHECK(memory != NULL, "out of memory");
    return memory;
}

static inline bool is_block_type(int type) {
    return type == GGML_Q8_0 || type == GGML_Q4_0 || type == TSFFN_TYPE_Q3_NL;
}

static inline size_t file_row_bytes(int type, int64_t n) {
    const size_t blocks = (size_t)n / TSFFN_BLOCK_SIZE;
    return type == GGML_F32           ? 4 * (size_t)n
           : type == GGML_Q8_0        ? 34 * blocks
           : type == GGML_Q4_0        ? 18 * blocks
           : type == TSFFN_TYPE_Q3_NL ? 2 + 13 * blocks
                                      : 2 * (size_t)n;
}

// About 2^-9 to 2^-6, of either sign.
static inline uint16_t random_scale(void) {
    return (uint16_t)((random_bits() & 0x83ffu) | ((6 + random_bits() % 3) << 10));
}

static inline void random_row(int type, int64_t n, uint8_t * row, double * w) {
    for (int64_t j = 0; j < n && !is_block_type(type); ++j) {
        const float v = random_float();
        uint32_t bits;
        memcpy(&bits, &v, sizeof(bits));
        const uint16_t half = type == GGML_BF16
                                  ? (uint16_t)(bits >> 16)
                                  : (uint16_t)((random_bits() & 0x83ffu) | ((9 + random_bits() % 6) << 10));
        if (type == GGML_F32) {
            memcpy(row + 4 * j, &v, sizeof(v));
            w[j] = (double)v;
        } else {
            memcpy(row + 2 * j, &half, sizeof(half));
            w[j] = (double)(type == GGML_BF16 ? tsffn_bf16_to_f32(half) : tsffn_f16_to_f32(half));
        }
    }
    const int n_bytes = type == GGML_Q8_0 ? 32 : 16;
    for (int64_t b = 0; b < n / TSFFN_BLOCK_SIZE && is_block_type(type); ++b) {
        uint8_t * block = row + b * (2 + n_bytes);
        const uint16_t d = random_scale();
        memcpy(block, &d, sizeof(d));
        for (int k = 0; k < n_bytes; ++k) {
            const uint8_t q = (uint8_t)random_bits();
            double * column = w + b * TSFFN_BLOCK_SIZE + k;
            block[2 + k] = q;
            if (type == GGML_Q8_0) {
                column[0] = (double)tsffn_f16_to_f32(d) * (int8_t)q;
            } else {
                column[0] = (double)tsffn_f16_to_f32(d) * ((q & 15) - 8);
                column[16] = (double)tsffn_f16_to_f32(d) * ((q >> 4) - 8);
            }
        }
    }
}

// A panel of 16 rows of q3_nl.
static inline void random_panel_q3_nl(int64_t n, uint8_t * panel, double * w) {
    static const int levels[8] = {-15, -9, -5, -2, 1, 4, 8, 13};
    const size_t bytes = 16 * file_row_bytes(TSFFN_TYPE_Q3_NL, n);
    for (size_t k = 32; k < bytes; ++k) {
        panel[k] = (uint8_t)random_bits();
    }
    for (int i = 0; i < TSFFN_PANEL_ROWS; ++i) {
        const uint16_t d = random_scale();
        memcpy(panel + 2 * i, &d, sizeof(d));
        for (int64_t j = 0; j < n; ++j) {
            const uint8_t * block = panel + 32 + j / TSFFN_BLOCK_SIZE * 208;
            const int in_block = (int)(j % TSFFN_BLOCK_SIZE), g = in_block / 4, k = in_block % 4;
            const uint8_t * q = block + 16 + 4 * i + k; // q[0]; q[1] and q[2] are 64 and 128 bytes further
            const int code =
                g < 6 ? q[64 * (g % 3)] >> (g < 3 ? 0 : 3) & 7 : (q[64 * (g - 6)] >> 6) | (q[128] >> g & 1) << 2;
            const int nibble = block[i] >> (in_block < 16 ? 0 : 4) & 15, scale = nibble < 8 ? nibble : nibble - 16;
            w[i * n + j] = (double)tsffn_f16_to_f32(d) * scale * levels[code];
        }
    }
}

// Whole panels of plain rows; rows that are left stay where they are.
static inline void cut_into_panels(int type, int64_t n_rows, int64_t n, uint8_t * data) {
    const size_t row_bytes = file_row_bytes(type, n), block = type == GGML_Q8_0 ? 34 : 18;
    uint8_t * plain = allocate(16 * row_bytes);
    for (int64_t p = 0; p < n_rows / 16; ++p) {
        uint8_t * panel = data + (size_t)p * 16 * row_bytes;
        memcpy(plain, panel, 16 * row_bytes);
        for (size_t i = 0; i < 16; ++i) {
            for (size_t b = 0; b < (size_t)n / 32; ++b) {
                const uint8_t * from = plain + i * row_bytes + b * block;
                uint8_t * to = panel + b * 16 * block;
                memcpy(to + 2 * i, from, 2);
                for (size_t g = 0; g < (block - 2) / 4; ++g) {
                    memcpy(to + 32 + 64 * g + 4 * i, from + 2 + 4 * g, 4);
                }
            }
        }
    }
    free(plain);
}

static inline struct random_matrix make_matrix(int type, enum tsffn_layout layout, int64_t n_rows, int64_t n_cols) {
    const size_t row_bytes = file_row_bytes(type, n_cols);
    uint8_t * data = allocate((size_t)n_rows * row_bytes);
    double * w = allocate((size_t)(n_rows * n_cols) * sizeof(*w));
    const bool is_q3_nl = type == TSFFN_TYPE_Q3_NL;
    for (int64_t i = 0; i < n_rows; i += is_q3_nl ? TSFFN_PANEL_ROWS : 1) {
        if (is_q3_nl) {
            random_panel_q3_nl(n_cols, data + (size_t)i * row_bytes, w + i * n_cols);
        } else {
            random_row(type, n_cols, data + (size_t)i * row_bytes, w + i * n_cols);
        }
    }
    if (layout == TSFFN_LAYOUT_PANELS && !is_q3_nl) {
        cut_into_panels(type, n_rows, n_cols, data);
    }
    const struct tsffn_weights weights = {
        .type = type,
        .data = data,
        .n_rows = n_rows,
        .n_cols = n_cols,
        .row_bytes = row_bytes,
        .layout = layout,
    };
    return (struct random_matrix){.weights = weights, .w = w};
}

struct predictor_kind {
    int fc1, fc2; // types
    int64_t rank; // 0: no predictor
    enum tsffn_layout layout;
    float threshold;
    bool scaled, on_when_equal;
};

static inline struct random_layer * make_layer(int64_t n_embd, int64_t n_ff, int n_ffns, int type, int down_type,
                                               enum tsffn_activation_name activation,
                                               const struct predictor_kind * kind) {
    struct random_layer * made = allocate(sizeof(*made));
    made->pred_scale = allocate((size_t)n_embd * sizeof(float));
    for (int64_t j = 0; j < n_embd; ++j) {
        made->pred_scale[j] = 1.5f + random_float();
    }
    for (int e = 0; e < n_ffns; ++e) {
        for (int part = 0; part < TSFFN_N_PARTS; ++part) {
            struct random_matrix * m = &made->parts[e][part];
            *m = make_matrix(part == TSFFN_PART_DOWN ? down_type : type, TSFFN_LAYOUT_ROWS, n_ff, n_embd);
            made->ffns[e].neurons.rows[part] = tsffn_rows_at(m->weights.data, n_ff, m->weights.row_bytes);
        }
        if (kind->rank > 0) {
            const int64_t rank = kind->rank + RANKS[e] > 0 ? kind->rank + RANKS[e] : kind->rank;
            const enum tsffn_layout rows = TSFFN_LAYOUT_ROWS;
            made->fc1[e] = make_matrix(kind->fc1, is_block_type(kind->fc1) ? kind->layout : rows, rank, n_embd);
            made->fc2[e] = make_matrix(kind->fc2, is_block_type(kind->fc2) ? kind->layout : rows, n_ff, rank);
            made->ffns[e].fc1 = made->fc1[e].weights;
            made->ffns[e].fc2 = made->fc2[e].weights;
        }
    }
    made->layer = (struct tsffn_layer){
        .n_embd = n_embd,
        .n_ff = n_ff,
        .n_ffns = n_ffns,
        .ffns = made->ffns,
        .types = {type, type, down_type},
        .activation = tsffn_activation(activation, 0.25f),
        .pred_scale = kind->scaled ? made->pred_scale : NULL,
        .threshold = kind->threshold,
        .on_when_equal = kind->on_when_equal,
    };
    return made;
}

static inline void free_matrix(struct random_matrix * m) {
    free((void *)(uintptr_t)m->weights.data);
    free(m->w);
}

static inline void free_layer(struct random_layer * made) {
    for (int e = 0; e < MAX_FFNS; ++e) {
        for (int part = 0; part < TSFFN_N_PARTS; ++part) {
            free_matrix(&made->parts[e][part]);
        }
        free_matrix(&made->fc1[e]);
        free_matrix(&made->fc2[e]);
    }
    free(made->pred_scale);
    free(made);
}

#endif
