// How one weight row of some format is multiplied with an activation vector and added to an output.
//
// Two families fill this table: formats with kernels of our own, and all others, which go through function pointers
// that the host program brings (ggml's type traits).
#ifndef TSFFN_ROW_TYPE_H
#define TSFFN_ROW_TYPE_H

#include "kernels/panels.h"

#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct tsffn_gemm;

struct tsffn_row_type {
    const char * name;
    int64_t block_size;      // weights per block; the length of a row is a multiple of it
    size_t block_bytes;      // bytes per block
    size_t row_header_bytes; // bytes of a row before its blocks

    // Layout of the activations that `dot` takes: a header, then blocks. Two types with the same x_format share them.
    int x_format;
    size_t x_header_bytes;
    int64_t x_block_size;
    size_t x_block_bytes;
    void (*convert_x)(const float * x, void * converted, int64_t n); // NULL: they stay f32
    // Instead, of a type whose activations can have several numbers of bits.
    void (*convert_x_bits)(const float * x, void * converted, int64_t n, int n_bits);

    // Own kernels; NULL selects the host's functions below. A type that has neither dots nor the host's is of panels
    // only.
    tsffn_dots * own_dots;
    tsffn_axpys * own_axpys;
    tsffn_add_rows * own_add_rows; // NULL: there is only own_axpys
    tsffn_panel * own_panel;       // for matrices in panels; NULL: there are none of this type

    // Products with many activation vectors at once on a matrix unit, when there is one and it takes this type.
    const struct tsffn_gemm * gemm;
    int gemm_format;

    // The host's functions, with ggml's signatures.
    void (*host_dot)(int n, float * s, size_t bs, const void * row, size_t bx, const void * x, size_t by, int nrc);
    void (*host_to_float)(const void * row, float * w, int64_t n);
};

static inline size_t tsffn_row_bytes(const struct tsffn_row_type * type, int64_t n) {
    return type->row_header_bytes + (size_t)(n / type->block_size) * type->block_bytes;
}

static inline size_t tsffn_x_bytes(const struct tsffn_row_type * type, int64_t n) {
    return type->x_header_bytes + (size_t)(n / type->x_block_size) * type->x_block_bytes;
}

// Those activations from x [n].
static inline void tsffn_convert_x(const struct tsffn_row_type * type, int64_t n, const float * x, void * converted) {
    if (type->convert_x != NULL) {
        type->convert_x(x, converted, n);
    } else {
        memcpy(converted, x, (size_t)n * sizeof(float));
    }
}

// s[j] = dot(row, x[j]) for n_x activations in the type's format. Prefetches along the way.
static inline void tsffn_row_dots(const struct tsffn_row_type * type, int64_t n, const void * row, int n_x,
                                  const void * const * x, float * s, const struct tsffn_asks * asks) {
    if (type->own_dots != NULL) {
        type->own_dots(n, row, n_x, x, s, asks);
        return;
    }
    tsffn_ask_all(asks);
    for (int k = 0; k < n_x; ++k) {
        type->host_dot((int)n, s + k, 0, row, 0, x[k], 0, 1);
    }
}

// y += sum_k a[k] * rows[k] for n_rows rows, in their order. Prefetches along the way. The host's formats are widened
// to f32 first, into `scratch` [n].
static inline void tsffn_row_axpys(const struct tsffn_row_type * type, int64_t n, int n_rows, const float * a,
                                   const void * const * rows, float * y, float * scratch,
                                   const struct tsffn_asks * asks) {
    if (type->own_axpys != NULL) {
        type->own_axpys(n, n_rows, a, rows, y, asks);
        return;
    }
    tsffn_ask_all(asks);
    for (int k = 0; k < n_rows; ++k) {
        type->host_to_float(rows[k], scratch, n);
        for (int64_t j = 0; j < n; ++j) {
            y[j] += a[k] * scratch[j];
        }
    }
}

#endif
