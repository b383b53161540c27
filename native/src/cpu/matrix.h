// Weight matrices with what multiplies them, read row by row.
#ifndef TSFFN_MATRIX_H
#define TSFFN_MATRIX_H

#include "../ffn/layer.h"
#include "row_type.h"

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { TSFFN_CACHE_LINE = 64 };

static inline int64_t tsffn_cache_lines(size_t bytes) {
    return (int64_t)((bytes + TSFFN_CACHE_LINE - 1) / TSFFN_CACHE_LINE);
}

// n_rows weight rows of n_cols weights.
struct tsffn_matrix {
    const struct tsffn_row_type * type;
    const uint8_t * data; // NULL when absent
    int64_t n_rows;
    int64_t n_cols;
    enum tsffn_layout layout;
    struct tsffn_bundles bundles; // of TSFFN_LAYOUT_BUNDLES
};

// Bytes of the activations that the matrix is multiplied with, and those activations from x [n_cols].
static inline size_t tsffn_matrix_x_bytes(const struct tsffn_matrix * m) {
    return tsffn_x_bytes(m->type, m->n_cols);
}
static inline void tsffn_matrix_convert_x(const struct tsffn_matrix * m, const float * x, void * converted) {
    if (m->type->convert_x != NULL) {
        m->type->convert_x(x, converted, m->n_cols);
    } else {
        memcpy(converted, x, (size_t)m->n_cols * sizeof(float));
    }
}

// Rows below this are in panels.
static inline int64_t tsffn_matrix_panel_rows(const struct tsffn_matrix * m) {
    return m->layout == TSFFN_LAYOUT_PANELS ? m->n_rows / TSFFN_PANEL_ROWS * TSFFN_PANEL_ROWS : 0;
}

// Row i; in a matrix of panels the first row of a panel stands for the panel.
static inline const uint8_t * tsffn_matrix_row(const struct tsffn_matrix * m, int64_t i) {
    const size_t row_bytes = tsffn_row_bytes(m->type, m->n_cols);
    if (m->layout != TSFFN_LAYOUT_BUNDLES) {
        return m->data + (size_t)i * row_bytes;
    }
    const struct tsffn_bundles * b = &m->bundles;
    const int64_t row = b->first + TSFFN_BUNDLE_ROWS * i;
    const int piece = (row >= b->piece_rows) + (row >= 2 * b->piece_rows); // cheaper than dividing
    return b->pieces[piece] + (size_t)(row - piece * b->piece_rows) * row_bytes;
}

// Bytes from row i to row i + 1, if those from row i to row i + n - 1 are all as far apart; else 0.
static inline size_t tsffn_matrix_stride(const struct tsffn_matrix * m, int64_t i, int64_t n) {
    const size_t row_bytes = tsffn_row_bytes(m->type, m->n_cols);
    const size_t stride = m->layout == TSFFN_LAYOUT_BUNDLES ? TSFFN_BUNDLE_ROWS * row_bytes : row_bytes;
    const uintptr_t first = (uintptr_t)tsffn_matrix_row(m, i), last = (uintptr_t)tsffn_matrix_row(m, i + n - 1);
    return last - first == (size_t)(n - 1) * stride ? stride : 0;
}

// s[j] = dot(row i, x[j]) for n activations already converted to the row type's format. Prefetches along the way.
static inline void tsffn_matrix_dots(const struct tsffn_matrix * m, int64_t i, int n, const void * const * x, float * s,
                                     const struct tsffn_asks * asks) {
    const struct tsffn_row_type * type = m->type;
    if (type->own_dots != NULL) {
        type->own_dots(m->n_cols, tsffn_matrix_row(m, i), n, x, s, asks);
        return;
    }
    tsffn_ask_all(asks);
    for (int k = 0; k < n; ++k) {
        type->host_dot((int)m->n_cols, s + k, 0, tsffn_matrix_row(m, i), 0, x[k], 0, 1);
    }
}

static inline float tsffn_matrix_dot(const struct tsffn_matrix * m, int64_t i, const void * x) {
    float s;
    tsffn_matrix_dots(m, i, 1, &x, &s, NULL);
    return s;
}

// y += sum_k a[k] * rows[k] for n rows of m, in their order. Prefetches along the way. The host's formats are widened
// to f32 first, into `scratch` [n_cols].
static inline void tsffn_matrix_axpys(const struct tsffn_matrix * m, int n, const float * a, const void * const * rows,
                                      float * y, float * scratch, const struct tsffn_asks * asks) {
    const struct tsffn_row_type * type = m->type;
    if (type->own_axpys != NULL) {
        type->own_axpys(m->n_cols, n, a, rows, y, asks);
        return;
    }
    tsffn_ask_all(asks);
    for (int k = 0; k < n; ++k) {
        type->host_to_float(rows[k], scratch, m->n_cols);
        for (int64_t j = 0; j < m->n_cols; ++j) {
            y[j] += a[k] * scratch[j];
        }
    }
}

#endif
