// Loops over the blocks of Q8_0 and Q4_0 rows, shared by the x86 tiers. The including file has defined
//   vec                          its vector of floats
//   vec_zero(), vec_set1(f)      0 and f in every lane
//   vec_fmadd(a, b, c), vec_add  a * b + c, a + b
//   vec_sum(v)                   the sum of the lanes
//   products_q8_0(block, x), products_q4_0(block, x)
//                                the products of a block's 32 weights with x[0..32), summed into the lanes
//   axpy_block_q8_0(d, q, y)
//                                y[0..32) += d * w of the weights behind a block's scale
#ifndef TSFFN_BLOCKS_X86_H
#define TSFFN_BLOCKS_X86_H

#include "half.h"
#include "kernels.h"

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
    static TSFFN_DEFINE_DOTS(dots_##SUFFIX, 4, dots_of_##SUFFIX)
DEFINE_BLOCK_DOTS(q8_0, TSFFN_Q8_0_BYTES)
DEFINE_BLOCK_DOTS(q4_0, TSFFN_Q4_0_BYTES)

#define DEFINE_BLOCK_AXPY(SUFFIX, BYTES)                                                                               \
    static void axpy_##SUFFIX(int64_t n, float a, const void * row, float * y, const struct tsffn_asks * asks) {       \
        const uint8_t * block = row;                                                                                   \
        struct tsffn_asking asking = tsffn_asking_begin(asks, n / TSFFN_BLOCK_SIZE);                                   \
        for (int64_t j = 0; j < n; j += TSFFN_BLOCK_SIZE, block += (BYTES)) {                                          \
            tsffn_asking_step(&asking);                                                                                \
            axpy_block_##SUFFIX(vec_set1(a * _cvtsh_ss(tsffn_load_u16(block))), block + 2, y + j);                     \
        }                                                                                                              \
    }
DEFINE_BLOCK_AXPY(q8_0, TSFFN_Q8_0_BYTES)

#endif
