// Rows that are added to several sums: unpacked to f32 once, TSFFN_UNPACKED_COLUMNS at a time, which stay in L1. Shared
// by the x86 tiers; the including file has defined beside what blocks_x86.h needs
//   VEC_LANES, vec_load(p), vec_store(p, v), vec_mul(a, b)
//   widen_f32(p), widen_f16(p), widen_bf16(p)   VEC_LANES weights as f32
//   unpack_block_q8_0(q, w), unpack_block_q4_0(q, w)
//                                               the 32 weights behind a block's scale, without it
#ifndef TSFFN_UNPACKED_H
#define TSFFN_UNPACKED_H

#include "half.h"
#include "kernels.h"

#define DEFINE_UNPACK_FLOATS(SUFFIX, TYPE)                                                                             \
    static void unpack_##SUFFIX(const void * row, float * w, float * scales) {                                         \
        for (int j = 0; j < TSFFN_UNPACKED_COLUMNS; j += VEC_LANES) {                                                  \
            vec_store(w + j, widen_##SUFFIX((const TYPE *)row + j));                                                   \
        }                                                                                                              \
        (void)scales;                                                                                                  \
    }
DEFINE_UNPACK_FLOATS(f32, float)
DEFINE_UNPACK_FLOATS(f16, uint16_t)
DEFINE_UNPACK_FLOATS(bf16, uint16_t)

#define DEFINE_UNPACK_BLOCKS(SUFFIX, BYTES)                                                                            \
    static void unpack_##SUFFIX(const void * row, float * w, float * scales) {                                         \
        const uint8_t * block = row;                                                                                   \
        for (int b = 0; b < TSFFN_UNPACKED_BLOCKS; ++b, block += (BYTES), w += TSFFN_BLOCK_SIZE) {                     \
            scales[b] = _cvtsh_ss(tsffn_load_u16(block));                                                              \
            unpack_block_##SUFFIX(block + 2, w);                                                                       \
        }                                                                                                              \
    }
DEFINE_UNPACK_BLOCKS(q8_0, TSFFN_Q8_0_BYTES)
DEFINE_UNPACK_BLOCKS(q4_0, TSFFN_Q4_0_BYTES)

// y += sum of a * row. FACTOR(b): what the weights of block b are multiplied with, as the axpy of the format does it.
#define DEFINE_ADD_UNPACKED(NAME, FACTOR)                                                                              \
    static void NAME(int n, const struct tsffn_term * terms, const float * w, const float * scales, float * y) {       \
        enum { PER_BLOCK = TSFFN_BLOCK_SIZE / VEC_LANES };                                                             \
        vec sums[TSFFN_UNPACKED_BLOCKS * PER_BLOCK];                                                                   \
        for (int k = 0; k < TSFFN_UNPACKED_BLOCKS * PER_BLOCK; ++k) {                                                  \
            sums[k] = vec_load(y + k * VEC_LANES);                                                                     \
        }                                                                                                              \
        for (int i = 0; i < n; ++i) {                                                                                  \
            const float * row = w + terms[i].row * TSFFN_UNPACKED_COLUMNS;                                             \
            const float * d = scales + terms[i].row * TSFFN_UNPACKED_BLOCKS;                                           \
            const vec a = vec_set1(terms[i].a);                                                                        \
            for (int b = 0; b < TSFFN_UNPACKED_BLOCKS; ++b) {                                                          \
                const vec factor = FACTOR(b);                                                                          \
                for (int k = b * PER_BLOCK; k < (b + 1) * PER_BLOCK; ++k) {                                            \
                    sums[k] = vec_fmadd(factor, vec_load(row + k * VEC_LANES), sums[k]);                               \
                }                                                                                                      \
            }                                                                                                          \
            (void)d;                                                                                                   \
        }                                                                                                              \
        for (int k = 0; k < TSFFN_UNPACKED_BLOCKS * PER_BLOCK; ++k) {                                                  \
            vec_store(y + k * VEC_LANES, sums[k]);                                                                     \
        }                                                                                                              \
    }
#define FACTOR_OF_FLOATS(b) a
#define FACTOR_OF_BLOCKS(b) vec_mul(a, vec_set1(d[b]))
DEFINE_ADD_UNPACKED(add_floats, FACTOR_OF_FLOATS)
DEFINE_ADD_UNPACKED(add_blocks, FACTOR_OF_BLOCKS)

// For the table of a tier.
#define TSFFN_UNPACKED_KERNELS                                                                                         \
    .unpack = {unpack_f32, unpack_f16, unpack_bf16, unpack_q8_0, unpack_q4_0},                                         \
    .add_unpacked = {add_floats, add_floats, add_floats, add_blocks, add_blocks}

#endif
