// Loops over the blocks of Q8_0 and Q4_0 rows, shared by the x86 tiers. The including file has defined
//   KERNEL(name)                 tsffn_name_TIER
//   vec                          its vector of floats
//   vec_zero(), vec_set1(f)      0 and f in every lane
//   vec_fmadd(a, b, c), vec_add  a * b + c, a + b
//   vec_sum(v)                   the sum of the lanes
//   products_q8_0(block, x), products_q4_0(block, x)
//                                the products of a block's 32 weights with x[0..32), summed into the lanes
//   VEC_LANES, vec_load(p), vec_store(p, v)
//   add_block_q8_0(d, q, sums), add_block_q4_0(d, q, sums)
//                                sums += d * w of the 32 weights behind a block's scale
// and defines scales_q4_0 and axpys_q4_0 itself, with the macros below or without.
#ifndef TSFFN_BLOCKS_X86_H
#define TSFFN_BLOCKS_X86_H

#include "half.h"
#include "templates.h"

#include <immintrin.h>

// d * 2^-112 from the bits of the half d: converting halves in the vector units took three of their twelve steps per
// block.
static inline vec block_scale(const uint8_t * block) {
    return vec_set1(tsffn_float_from_bits((uint32_t)tsffn_f16_bits_scaled(tsffn_load_u16(block))));
}

// Two accumulators: the sums of one block depend on nothing of the next. Unpacking the weights and their scale is two
// thirds of the work of a single product.
#define ADD_BLOCK_PRODUCTS(SUFFIX, sums, block, j)                                                                     \
    do {                                                                                                               \
        const vec scale = block_scale(block);                                                                          \
        for (int t = 0; t < n_x; ++t) {                                                                                \
            sums[t] = vec_fmadd(scale, products_##SUFFIX(block, x[t] + (j)), sums[t]);                                 \
        }                                                                                                              \
    } while (0)

#define DEFINE_BLOCK_DOTS(SUFFIX, BYTES)                                                                               \
    TSFFN_INLINED void dots_of_##SUFFIX(int64_t n, const void * row, int n_x, const void * const * activations,        \
                                        float * s, const struct tsffn_asks * asks) {                                   \
        const uint8_t * block = row;                                                                                   \
        const int16_t * x[4];                                                                                          \
        vec even[4], odd[4];                                                                                           \
        for (int t = 0; t < n_x; ++t) {                                                                                \
            x[t] = tsffn_i16_values(activations[t]);                                                                   \
            even[t] = odd[t] = vec_zero();                                                                             \
        }                                                                                                              \
        struct tsffn_asking asking = tsffn_asking_begin(asks, n / 64);                                                 \
        int64_t j = 0;                                                                                                 \
        for (; j + 64 <= n; j += 64, block += 2 * (BYTES)) {                                                           \
            tsffn_asking_step(&asking);                                                                                \
            ADD_BLOCK_PRODUCTS(SUFFIX, even, block, j);                                                                \
            ADD_BLOCK_PRODUCTS(SUFFIX, odd, block + (BYTES), j + 32);                                                  \
        }                                                                                                              \
        if (j < n) {                                                                                                   \
            ADD_BLOCK_PRODUCTS(SUFFIX, even, block, j);                                                                \
        }                                                                                                              \
        for (int t = 0; t < n_x; ++t) {                                                                                \
            s[t] = vec_sum(vec_add(even[t], odd[t])) * TSFFN_F16_SCALE_BACK * tsffn_i16_scale(activations[t]);         \
        }                                                                                                              \
    }                                                                                                                  \
    TSFFN_DEFINE_DOTS(KERNEL(dots_##SUFFIX), 4, dots_of_##SUFFIX)
DEFINE_BLOCK_DOTS(q8_0, TSFFN_Q8_0_BYTES)
DEFINE_BLOCK_DOTS(q4_0, TSFFN_Q4_0_BYTES)

enum {
    SCALES = 16,    // of a row's blocks, made together
    ASK_BLOCKS = 4, // asking in every block instead of once in four costs a fifth
    VECS_OF_BLOCK = TSFFN_BLOCK_SIZE / VEC_LANES,
};

// a times the scales of a row's next n blocks, at most SCALES.
#define DEFINE_BLOCK_SCALES(NAME, BYTES)                                                                               \
    static inline void NAME(int64_t n, float a, const uint8_t * block, float * scales) {                               \
        for (int64_t b = 0; b < n; ++b, block += (BYTES)) {                                                            \
            scales[b] = a * _cvtsh_ss(tsffn_load_u16(block));                                                          \
        }                                                                                                              \
    }
DEFINE_BLOCK_SCALES(scales_q8_0, TSFFN_Q8_0_BYTES)

// y[0..32) += the sum of d[i][b] * w of the rows' next blocks.
#define ADD_BLOCKS_OF_ROWS(SUFFIX, BYTES)                                                                              \
    do {                                                                                                               \
        vec sums[VECS_OF_BLOCK];                                                                                       \
        for (int k = 0; k < VECS_OF_BLOCK; ++k) {                                                                      \
            sums[k] = vec_load(y + k * VEC_LANES);                                                                     \
        }                                                                                                              \
        for (int i = 0; i < n_rows; ++i) {                                                                             \
            add_block_##SUFFIX(vec_set1(d[i][b]), block[i] + 2, sums);                                                 \
            block[i] += (BYTES);                                                                                       \
        }                                                                                                              \
        for (int k = 0; k < VECS_OF_BLOCK; ++k) {                                                                      \
            vec_store(y + k * VEC_LANES, sums[k]);                                                                     \
        }                                                                                                              \
        y += TSFFN_BLOCK_SIZE;                                                                                         \
        ++b;                                                                                                           \
    } while (0)

#define DEFINE_BLOCK_AXPYS(SUFFIX, BYTES)                                                                              \
    TSFFN_INLINED void axpys_of_##SUFFIX(int64_t n, int n_rows, const float * a, const void * const * rows, float * y, \
                                         struct tsffn_asking * asking) {                                               \
        const uint8_t * block[4];                                                                                      \
        float d[4][SCALES];                                                                                            \
        for (int i = 0; i < n_rows; ++i) {                                                                             \
            block[i] = rows[i];                                                                                        \
        }                                                                                                              \
        for (int64_t left = n / TSFFN_BLOCK_SIZE; left > 0; left -= SCALES) {                                          \
            const int64_t n_blocks = left < SCALES ? left : SCALES;                                                    \
            for (int i = 0; i < n_rows; ++i) {                                                                         \
                scales_##SUFFIX(n_blocks, a[i], block[i], d[i]);                                                       \
            }                                                                                                          \
            int64_t b = 0;                                                                                             \
            while (b + ASK_BLOCKS <= n_blocks) {                                                                       \
                tsffn_asking_step(asking);                                                                             \
                _Pragma("GCC unroll 4") for (int k4 = 0; k4 < ASK_BLOCKS; ++k4) {                                      \
                    ADD_BLOCKS_OF_ROWS(SUFFIX, BYTES);                                                                 \
                }                                                                                                      \
            }                                                                                                          \
            while (b < n_blocks) {                                                                                     \
                ADD_BLOCKS_OF_ROWS(SUFFIX, BYTES);                                                                     \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    TSFFN_DEFINE_AXPYS(KERNEL(axpys_##SUFFIX), n / (TSFFN_BLOCK_SIZE * ASK_BLOCKS), axpys_of_##SUFFIX)
DEFINE_BLOCK_AXPYS(q8_0, TSFFN_Q8_0_BYTES)

#endif
