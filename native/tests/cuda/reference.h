// What a call must give: masks by the CPU's kernels, h and y in doubles.
#ifndef TSFFN_TEST_CUDA_REFERENCE_H
#define TSFFN_TEST_CUDA_REFERENCE_H

#include "cpu/kernels/tiers.h"
#include "layers.h"

static inline double dot_double(const double * w, const double * x, int64_t n) {
    double sum = 0.0;
    for (int64_t j = 0; j < n; ++j) {
        sum += w[j] * x[j];
    }
    return sum;
}

// Half a step of the integers that a vector is rounded to, 0 for float formats.
static inline double half_step(int type, const double * x, int64_t n) {
    double most = 0.0;
    for (int64_t j = 0; j < n; ++j) {
        most = fmax(most, fabs(x[j]));
    }
    return !is_block_type(type) ? 0.0 : 0.501 * most / (type == TSFFN_TYPE_Q3_NL ? TSFFN_U14_MAX : TSFFN_I16_MAX);
}

// How far the sum of n products of row w with x may be from the exact one, where x has an error of up to error_x [n],
// or NULL: of rounding x to integers, and of float sums in any order.
static inline double sum_error(const double * w, const double * x, const double * error_x, double step, int64_t n) {
    double size = 0.0, from_x = 0.0;
    for (int64_t j = 0; j < n; ++j) {
        size += fabs(w[j] * x[j]);
        from_x += fabs(w[j]) * (step + (error_x != NULL ? error_x[j] : 0.0));
    }
    return 1.01 * from_x + (double)(n + 8) * 0x1p-24 * size;
}

// Row i of a matrix in panels times x, by the CPU's kernel; NAN where the CPU has no panel.
static inline void panel_products(const struct tsffn_weights * m, const float * x, float * products) {
    const bool is_q3_nl = m->type == TSFFN_TYPE_Q3_NL;
    char * converted = aligned_alloc(64, (tsffn_i16_bytes(m->n_cols) + 63) / 64 * 64);
    CHECK(converted != NULL, "out of memory");
    (is_q3_nl ? tsffn_convert_u14 : tsffn_convert_i16)(x, converted, m->n_cols);
    const void * xs[1] = {converted};
    const enum tsffn_format format = is_q3_nl               ? TSFFN_FORMAT_Q3_NL
                                     : m->type == GGML_Q8_0 ? TSFFN_FORMAT_Q8_0
                                                            : TSFFN_FORMAT_Q4_0;
    for (int64_t i = 0; i < m->n_rows; i += TSFFN_PANEL_ROWS) {
        float s[1][TSFFN_PANEL_ROWS];
        const bool whole = i + TSFFN_PANEL_ROWS <= m->n_rows;
        if (whole) {
            tsffn_kernels_ref.panel[format](m->n_cols, m->data + (size_t)i * m->row_bytes, 1, xs, s, NULL);
        }
        for (int64_t k = 0; k < TSFFN_PANEL_ROWS && i + k < m->n_rows; ++k) {
            products[i + k] = whole ? s[0][k] : NAN;
        }
    }
    free(converted);
}

static inline bool passes(const struct tsffn_layer * layer, double logit) {
    return layer->on_when_equal ? logit >= (double)layer->threshold : logit > (double)layer->threshold;
}

enum verdict { OFF, ON, EITHER };

// For each neuron of FFN e, whether x lets it through. EITHER: the logit is so close to the threshold that rounding
// decides, and no kernel of the CPU defines how. Returns how many are decided by the CPU's bits.
static inline int64_t predict(const struct random_layer * made, int e, const float * x, enum verdict * verdicts) {
    const struct tsffn_layer * layer = &made->layer;
    const struct random_matrix *fc1 = &made->fc1[e], *fc2 = &made->fc2[e];
    const int64_t n = layer->n_embd, rank = fc1->weights.n_rows;
    float *p = allocate((size_t)n * sizeof(float)), *h1 = allocate((size_t)rank * sizeof(float));
    float * logits = allocate((size_t)layer->n_ff * sizeof(float));
    double *pd = allocate((size_t)n * sizeof(double)), *hidden = allocate((size_t)rank * sizeof(double));
    double * errors = allocate((size_t)rank * sizeof(double));
    for (int64_t j = 0; j < n; ++j) {
        p[j] = layer->pred_scale != NULL ? x[j] * layer->pred_scale[j] : x[j];
        pd[j] = (double)p[j];
    }
    const double step1 = half_step(fc1->weights.type, pd, n);
    for (int64_t k = 0; k < rank; ++k) {
        hidden[k] = fmax(0.0, dot_double(fc1->w + k * n, pd, n));
        errors[k] = sum_error(fc1->w + k * n, pd, NULL, step1, n);
    }
    bool exact = fc1->weights.layout == TSFFN_LAYOUT_PANELS && fc2->weights.layout == TSFFN_LAYOUT_PANELS &&
                 rank % TSFFN_PANEL_ROWS == 0;
    if (exact) {
        panel_products(&fc1->weights, p, h1);
        for (int64_t k = 0; k < rank; ++k) {
            h1[k] = h1[k] > 0.0f ? h1[k] : 0.0f;
        }
        panel_products(&fc2->weights, h1, logits);
    }
    const double step2 = half_step(fc2->weights.type, hidden, rank);
    int64_t n_exact = 0;
    for (int64_t i = 0; i < layer->n_ff; ++i) {
        const double logit = dot_double(fc2->w + i * rank, hidden, rank);
        const double error = sum_error(fc2->w + i * rank, hidden, errors, step2, rank);
        const bool by_bits = exact && !isnan(logits[i]);
        CHECK(!by_bits || fabs((double)logits[i] - logit) <= error, "the bound: %g, %g +- %g", (double)logits[i], logit,
              error);
        verdicts[i] = by_bits                                           ? (passes(layer, (double)logits[i]) ? ON : OFF)
                      : fabs(logit - (double)layer->threshold) <= error ? EITHER
                      : passes(layer, logit)                            ? ON
                                                                        : OFF;
        n_exact += by_bits;
    }
    free(p), free(h1), free(logits), free(pd), free(hidden), free(errors);
    return n_exact;
}

static inline double factor_double(struct tsffn_factor f, double v) {
    return f.kind == TSFFN_FACTOR_LINEAR || (v > 0.0 && v >= (double)f.threshold) ? v : 0.0;
}

// x, or with `rounded` what the rows of gate and up are multiplied with: 16-bit integers for block formats.
static inline void widen_activations(const struct tsffn_layer * layer, const float * x, bool rounded, double * xd) {
    const int64_t n = layer->n_embd;
    char * converted = aligned_alloc(64, (tsffn_i16_bytes(n) + 63) / 64 * 64);
    CHECK(converted != NULL, "out of memory");
    tsffn_convert_i16(x, converted, n);
    const bool as_integers = rounded && is_block_type(layer->types[TSFFN_PART_GATE]);
    for (int64_t j = 0; j < n; ++j) {
        const double integer = (double)tsffn_i16_scale(converted) * tsffn_i16_values(converted)[j];
        xd[j] = as_integers ? integer : (double)x[j];
    }
    free(converted);
}

// h [n_ff], and y [n_embd] += h_i down_i, of the neurons [first, end) whose mask is set.
static inline void compute_double(const struct random_layer * made, int e, const float * x, bool rounded,
                                  const uint32_t * mask, int64_t first, int64_t end, double * h, double * y) {
    const struct tsffn_layer * layer = &made->layer;
    const int64_t n = layer->n_embd;
    double * xd = allocate((size_t)n * sizeof(double));
    widen_activations(layer, x, rounded, xd);
    for (int64_t i = first; i < end; ++i) {
        h[i] = 0.0;
        if ((mask[i / 32] >> i % 32 & 1) == 0) {
            continue;
        }
        const struct random_matrix * parts = made->parts[e];
        h[i] = factor_double(layer->activation.gate, dot_double(parts[TSFFN_PART_GATE].w + i * n, xd, n));
        h[i] *=
            h[i] == 0.0 ? 0.0 : factor_double(layer->activation.up, dot_double(parts[TSFFN_PART_UP].w + i * n, xd, n));
        for (int64_t j = 0; h[i] != 0.0 && j < n; ++j) {
            y[j] += h[i] * parts[TSFFN_PART_DOWN].w[i * n + j];
        }
    }
    free(xd);
}

#endif
