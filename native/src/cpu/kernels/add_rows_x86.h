// Rows that are added to several sums: unpacked to f32 once, some columns at a time, which stay in L1. Shared by the
// x86 tiers; the including file has defined beside what blocks_x86.h needs
//   VEC_LANES, vec_load(p), vec_store(p, v), vec_mul(a, b)
//   widen_f32(row, j), widen_f16(row, j), widen_bf16(row, j)
//                                               VEC_LANES weights from column j on, as f32
//   unpack_block_q8_0(q, w), unpack_block_q4_0(q, w)
//                                               the 32 weights behind a block's scale, without it
#ifndef TSFFN_ADD_ROWS_X86_H
#define TSFFN_ADD_ROWS_X86_H

#include "half.h"
#include "templates.h"

#include <stdbool.h>

enum { ADD_BLOCKS = TSFFN_ADD_COLUMNS / TSFFN_BLOCK_SIZE };

// TSFFN_ADD_COLUMNS weights of a row from c0 on, and for block formats the scales of their blocks.
typedef void unpack_row(const uint8_t * row, int64_t c0, float * w, float * scales);

// The weights from column j on.
typedef vec widen(const void * row, int64_t j);

TSFFN_INLINED void unpack_floats(widen * load, const uint8_t * row, int64_t c0, float * w) {
    for (int j = 0; j < TSFFN_ADD_COLUMNS; j += VEC_LANES) {
        vec_store(w + j, load(row, c0 + j));
    }
}

static inline void unpack_f32(const uint8_t * row, int64_t c0, float * w, float * scales) {
    (void)scales;
    unpack_floats(widen_f32, row, c0, w);
}

static inline void unpack_f16(const uint8_t * row, int64_t c0, float * w, float * scales) {
    (void)scales;
    unpack_floats(widen_f16, row, c0, w);
}

static inline void unpack_bf16(const uint8_t * row, int64_t c0, float * w, float * scales) {
    (void)scales;
    unpack_floats(widen_bf16, row, c0, w);
}

static inline void unpack_q8_0(const uint8_t * row, int64_t c0, float * w, float * scales) {
    const uint8_t * block = row + c0 / TSFFN_BLOCK_SIZE * TSFFN_Q8_0_BYTES;
    for (int b = 0; b < ADD_BLOCKS; ++b, block += TSFFN_Q8_0_BYTES, w += TSFFN_BLOCK_SIZE) {
        scales[b] = _cvtsh_ss(tsffn_load_u16(block));
        unpack_block_q8_0(block + 2, w);
    }
}

static inline void unpack_q4_0(const uint8_t * row, int64_t c0, float * w, float * scales) {
    const uint8_t * block = row + c0 / TSFFN_BLOCK_SIZE * TSFFN_Q4_0_BYTES;
    for (int b = 0; b < ADD_BLOCKS; ++b, block += TSFFN_Q4_0_BYTES, w += TSFFN_BLOCK_SIZE) {
        scales[b] = _cvtsh_ss(tsffn_load_u16(block));
        unpack_block_q4_0(block + 2, w);
    }
}

// y += sum of a * row over n terms. The weights of a block with a scale are multiplied with a * scale, as the axpy of
// the format does it.
TSFFN_INLINED void add_terms(bool has_scales, int n, const struct tsffn_term * terms, const struct tsffn_unpacked * u,
                             float * y) {
    enum { PER_BLOCK = TSFFN_BLOCK_SIZE / VEC_LANES };
    vec sums[ADD_BLOCKS * PER_BLOCK];
    for (int k = 0; k < ADD_BLOCKS * PER_BLOCK; ++k) {
        sums[k] = vec_load(y + k * VEC_LANES);
    }
    for (int i = 0; i < n; ++i) {
        const float * w = u->w[terms[i].row];
        const float * d = u->scales[terms[i].row];
        const vec a = vec_set1(terms[i].a);
        for (int b = 0; b < ADD_BLOCKS; ++b) {
            const vec factor = has_scales ? vec_mul(a, vec_set1(d[b])) : a;
            for (int k = b * PER_BLOCK; k < (b + 1) * PER_BLOCK; ++k) {
                sums[k] = vec_fmadd(factor, vec_load(w + k * VEC_LANES), sums[k]);
            }
        }
    }
    for (int k = 0; k < ADD_BLOCKS * PER_BLOCK; ++k) {
        vec_store(y + k * VEC_LANES, sums[k]);
    }
}

// A kernel (tsffn_add_rows) for rows that `unpack` unpacks.
TSFFN_INLINED void add_rows_of(unpack_row * unpack, bool has_scales, const struct tsffn_additions * additions,
                               int64_t c0) {
    struct tsffn_unpacked * u = additions->unpacked;
    for (int i = 0; i < additions->n_rows; ++i) {
        unpack(additions->rows[i], c0, u->w[i], u->scales[i]);
    }
    const int * first = additions->first;
    float * y = additions->y + c0;
    for (int t = 0; t < additions->n_sums; ++t, y += additions->stride) {
        add_terms(has_scales, first[t + 1] - first[t], additions->terms + first[t], u, y);
    }
}

#endif
