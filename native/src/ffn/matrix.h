// Weight matrices, read row by row.
#ifndef TSFFN_MATRIX_H
#define TSFFN_MATRIX_H

#include "row_type.h"

#include <stddef.h>
#include <stdint.h>

enum {
    TSFFN_CACHE_LINE = 64,
    TSFFN_PREFETCH_BYTES = 4096, // how far ahead rows are asked for: hardware prefetchers stop at every 4 KB page
};

// n_rows weight rows of n_cols weights, one after the other.
struct tsffn_matrix {
    const struct tsffn_row_type * type;
    const uint8_t * data; // NULL when absent
    int64_t n_rows;
    int64_t n_cols;
};

// Row i.
static inline const uint8_t * tsffn_matrix_row(const struct tsffn_matrix * m, int64_t i) {
    return m->data + (size_t)i * tsffn_row_bytes(m->type, m->n_cols);
}

// Row i times x, which is in the format of the type's dot.
static inline float tsffn_matrix_dot(const struct tsffn_matrix * m, int64_t i, const void * x) {
    const struct tsffn_row_type * type = m->type;
    if (type->own_dot != NULL) {
        return type->own_dot(m->n_cols, tsffn_matrix_row(m, i), x);
    }
    float sum;
    type->host_dot((int)m->n_cols, &sum, 0, tsffn_matrix_row(m, i), 0, x, 0, 1);
    return sum;
}

// Row i times each of n activation vectors.
static inline void tsffn_matrix_dots(const struct tsffn_matrix * m, int64_t i, int n, const void * const * x,
                                     float * s) {
    int k = 0;
    if (m->type->own_dot4 != NULL) {
        for (; k + 4 <= n; k += 4) {
            m->type->own_dot4(m->n_cols, tsffn_matrix_row(m, i), x + k, s + k);
        }
    }
    for (; k < n; ++k) {
        s[k] = tsffn_matrix_dot(m, i, x[k]);
    }
}

// y += a * row i. The host's formats are widened to f32 first, into `scratch` [n_cols].
static inline void tsffn_matrix_axpy(const struct tsffn_matrix * m, int64_t i, float a, float * y, float * scratch) {
    const struct tsffn_row_type * type = m->type;
    if (type->own_axpy != NULL) {
        type->own_axpy(m->n_cols, a, tsffn_matrix_row(m, i), y);
        return;
    }
    type->host_to_float(tsffn_matrix_row(m, i), scratch, m->n_cols);
    for (int64_t j = 0; j < m->n_cols; ++j) {
        y[j] += a * scratch[j];
    }
}

static inline void tsffn_matrix_prefetch(const struct tsffn_matrix * m, int64_t i) {
    const uint8_t * row = tsffn_matrix_row(m, i);
    const size_t bytes = tsffn_row_bytes(m->type, m->n_cols);
    for (size_t offset = 0; offset < bytes; offset += TSFFN_CACHE_LINE) {
        __builtin_prefetch(row + offset, 0, 3);
    }
}

// How many rows ahead of the one being computed make TSFFN_PREFETCH_BYTES.
static inline int64_t tsffn_matrix_rows_ahead(const struct tsffn_matrix * m) {
    const size_t bytes = tsffn_row_bytes(m->type, m->n_cols);
    return (int64_t)((TSFFN_PREFETCH_BYTES + bytes - 1) / bytes);
}

// tsffn_matrix_dots for row after row up to `end`: asks for the rows ahead.
static inline void tsffn_matrix_stream_dots(const struct tsffn_matrix * m, int64_t i, int64_t end, int n,
                                            const void * const * x, float * s) {
    if (n == 1 && m->type->own_stream != NULL) {
        *s = m->type->own_stream(m->n_cols, tsffn_matrix_row(m, i), x[0]);
        return;
    }
    const int64_t ahead = tsffn_matrix_rows_ahead(m);
    if (i + ahead < end) {
        tsffn_matrix_prefetch(m, i + ahead);
    }
    tsffn_matrix_dots(m, i, n, x, s);
}

#endif
