// Rows that are added to several sums: unpacked to f32 once, some columns at a time, which stay in L1. Shared by the
// x86 tiers; the including file has defined beside what blocks_x86.h needs
//   VEC_LANES, vec_load(p), vec_store(p, v), vec_mul(a, b)
//   widen_f32(p), widen_f16(p), widen_bf16(p)   VEC_LANES weights as f32
//   unpack_block_q8_0(q, w), unpack_block_q4_0(q, w)
//                                               the 32 weights behind a block's scale, without it
#ifndef TSFFN_ADD_ROWS_X86_H
#define TSFFN_ADD_ROWS_X86_H

#include "half.h"
#include "kernels.h"

enum { ADD_BLOCKS = TSFFN_ADD_COLUMNS / TSFFN_BLOCK_SIZE };

#define DEFINE_UNPACK_FLOATS(SUFFIX, TYPE)                                                                             \
    static inline void unpack_##SUFFIX(const uint8_t * row, int64_t c0, float * w, float * scales) {                   \
        for (int j = 0; j < TSFFN_ADD_COLUMNS; j += VEC_LANES) {                                                       \
            vec_store(w + j, widen_##SUFFIX((const TYPE *)(const void *)row + c0 + j));                                \
        }                                                                                                              \
        (void)scales;                                                                                                  \
    }
DEFINE_UNPACK_FLOATS(f32, float)
DEFINE_UNPACK_FLOATS(f16, uint16_t)
DEFINE_UNPACK_FLOATS(bf16, uint16_t)

#define DEFINE_UNPACK_BLOCKS(SUFFIX, BYTES)                                                                            \
    static inline void unpack_##SUFFIX(const uint8_t * row, int64_t c0, float * w, float * scales) {                   \
        const uint8_t * block = row + c0 / TSFFN_BLOCK_SIZE * (BYTES);                                                 \
        for (int b = 0; b < ADD_BLOCKS; ++b, block += (BYTES), w += TSFFN_BLOCK_SIZE) {                                \
            scales[b] = _cvtsh_ss(tsffn_load_u16(block));                                                              \
            unpack_block_##SUFFIX(block + 2, w);                                                                       \
        }                                                                                                              \
    }
DEFINE_UNPACK_BLOCKS(q8_0, TSFFN_Q8_0_BYTES)
DEFINE_UNPACK_BLOCKS(q4_0, TSFFN_Q4_0_BYTES)

// y += sum of a * row over n terms. FACTOR(b): what the weights of block b are multiplied with, as the axpy of the
// format does it.
#define DEFINE_ADD_TERMS(NAME, FACTOR)                                                                                 \
    static inline void NAME(int n, const struct tsffn_term * terms, const struct tsffn_unpacked * u, float * y) {      \
        enum { PER_BLOCK = TSFFN_BLOCK_SIZE / VEC_LANES };                                                             \
        vec sums[ADD_BLOCKS * PER_BLOCK];                                                                              \
        for (int k = 0; k < ADD_BLOCKS * PER_BLOCK; ++k) {                                                             \
            sums[k] = vec_load(y + k * VEC_LANES);                                                                     \
        }                                                                                                              \
        for (int i = 0; i < n; ++i) {                                                                                  \
            const float * w = u->w[terms[i].row];                                                                      \
            const float * d = u->scales[terms[i].row];                                                                 \
            const vec a = vec_set1(terms[i].a);                                                                        \
            for (int b = 0; b < ADD_BLOCKS; ++b) {                                                                     \
                const vec factor = FACTOR(b);                                                                          \
                for (int k = b * PER_BLOCK; k < (b + 1) * PER_BLOCK; ++k) {                                            \
                    sums[k] = vec_fmadd(factor, vec_load(w + k * VEC_LANES), sums[k]);                                 \
                }                                                                                                      \
            }                                                                                                          \
            (void)d;                                                                                                   \
        }                                                                                                              \
        for (int k = 0; k < ADD_BLOCKS * PER_BLOCK; ++k) {                                                             \
            vec_store(y + k * VEC_LANES, sums[k]);                                                                     \
        }                                                                                                              \
    }
#define FACTOR_OF_FLOATS(b) a
#define FACTOR_OF_BLOCKS(b) vec_mul(a, vec_set1(d[b]))
DEFINE_ADD_TERMS(add_terms_of_floats, FACTOR_OF_FLOATS)
DEFINE_ADD_TERMS(add_terms_of_blocks, FACTOR_OF_BLOCKS)

#define DEFINE_ADD_ROWS(SUFFIX, KIND)                                                                                  \
    void KERNEL(add_rows_##SUFFIX)(const struct tsffn_additions * additions, int64_t c0) {                             \
        struct tsffn_unpacked * u = additions->unpacked;                                                               \
        for (int i = 0; i < additions->n_rows; ++i) {                                                                  \
            unpack_##SUFFIX(additions->rows[i], c0, u->w[i], u->scales[i]);                                            \
        }                                                                                                              \
        const int * first = additions->first;                                                                          \
        float * y = additions->y + c0;                                                                                 \
        for (int t = 0; t < additions->n_sums; ++t, y += additions->stride) {                                          \
            add_terms_of_##KIND(first[t + 1] - first[t], additions->terms + first[t], u, y);                           \
        }                                                                                                              \
    }
DEFINE_ADD_ROWS(f32, floats)
DEFINE_ADD_ROWS(f16, floats)
DEFINE_ADD_ROWS(bf16, floats)
DEFINE_ADD_ROWS(q8_0, blocks)
DEFINE_ADD_ROWS(q4_0, blocks)

#endif
