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

#include "asks.h"
#include "half.h"
#include "kernels.h"

#include <immintrin.h>

// d * 2^-112 from the bits of the half d: converting halves in the vector units took three of their twelve steps per
// block.
static inline vec block_scale(const uint8_t * block) {
    return vec_set1(tsffn_float_from_bits((uint32_t)tsffn_f16_bits_scaled(tsffn_load_u16(block))));
}

// Two accumulators: the sums of one block depend on nothing of the next.
#define DEFINE_BLOCK_DOT(NAME, SUFFIX, BYTES, ASKS, BEGIN, ASK)                                                        \
    static float NAME##_##SUFFIX(int64_t n, const void * row, const void * activations ASKS()) {                       \
        const uint8_t * block = row;                                                                                   \
        const int16_t * x = tsffn_i16_values(activations);                                                             \
        BEGIN(n / 64);                                                                                                 \
        vec s0 = vec_zero(), s1 = s0;                                                                                  \
        int64_t j = 0;                                                                                                 \
        for (; j + 64 <= n; j += 64, block += 2 * (BYTES)) {                                                           \
            ASK();                                                                                                     \
            s0 = vec_fmadd(block_scale(block), products_##SUFFIX(block, x + j), s0);                                   \
            s1 = vec_fmadd(block_scale(block + (BYTES)), products_##SUFFIX(block + (BYTES), x + j + 32), s1);          \
        }                                                                                                              \
        if (j < n) {                                                                                                   \
            s0 = vec_fmadd(block_scale(block), products_##SUFFIX(block, x + j), s0);                                   \
        }                                                                                                              \
        return vec_sum(vec_add(s0, s1)) * TSFFN_F16_SCALE_BACK * tsffn_i16_scale(activations);                         \
    }
DEFINE_BLOCK_DOT(dot, q8_0, TSFFN_Q8_0_BYTES, NO_ASKS, BEGIN_NOTHING, ASK_NOTHING)
DEFINE_BLOCK_DOT(dot, q4_0, TSFFN_Q4_0_BYTES, NO_ASKS, BEGIN_NOTHING, ASK_NOTHING)
DEFINE_BLOCK_DOT(dot_asking, q8_0, TSFFN_Q8_0_BYTES, WITH_ASKS, BEGIN_ASKING, ASK_STEP)
DEFINE_BLOCK_DOT(dot_asking, q4_0, TSFFN_Q4_0_BYTES, WITH_ASKS, BEGIN_ASKING, ASK_STEP)

// Adds one block's products with four activation vectors to four accumulators: unpacking the weights and their scale,
// two thirds of the work of a single product, is shared.
#define BLOCK_DOT4_STEP(SUFFIX, block, offset, s)                                                                      \
    do {                                                                                                               \
        const vec scale = block_scale(block);                                                                          \
        s##_0 = vec_fmadd(scale, products_##SUFFIX(block, x0 + (offset)), s##_0);                                      \
        s##_1 = vec_fmadd(scale, products_##SUFFIX(block, x1 + (offset)), s##_1);                                      \
        s##_2 = vec_fmadd(scale, products_##SUFFIX(block, x2 + (offset)), s##_2);                                      \
        s##_3 = vec_fmadd(scale, products_##SUFFIX(block, x3 + (offset)), s##_3);                                      \
    } while (0)

// Bit for bit what four single dots give: the order of the sums is the same.
#define DEFINE_BLOCK_DOT4(SUFFIX, BYTES)                                                                               \
    static void dot4_##SUFFIX(int64_t n, const void * row, const void * const activations[4], float out[4]) {          \
        const uint8_t * block = row;                                                                                   \
        const int16_t * x0 = tsffn_i16_values(activations[0]);                                                         \
        const int16_t * x1 = tsffn_i16_values(activations[1]);                                                         \
        const int16_t * x2 = tsffn_i16_values(activations[2]);                                                         \
        const int16_t * x3 = tsffn_i16_values(activations[3]);                                                         \
        vec even_0 = vec_zero(), even_1 = even_0, even_2 = even_0, even_3 = even_0;                                    \
        vec odd_0 = even_0, odd_1 = even_0, odd_2 = even_0, odd_3 = even_0;                                            \
        int64_t j = 0;                                                                                                 \
        for (; j + 64 <= n; j += 64, block += 2 * (BYTES)) {                                                           \
            BLOCK_DOT4_STEP(SUFFIX, block, j, even);                                                                   \
            BLOCK_DOT4_STEP(SUFFIX, block + (BYTES), j + 32, odd);                                                     \
        }                                                                                                              \
        if (j < n) {                                                                                                   \
            BLOCK_DOT4_STEP(SUFFIX, block, j, even);                                                                   \
        }                                                                                                              \
        out[0] = vec_sum(vec_add(even_0, odd_0)) * TSFFN_F16_SCALE_BACK * tsffn_i16_scale(activations[0]);             \
        out[1] = vec_sum(vec_add(even_1, odd_1)) * TSFFN_F16_SCALE_BACK * tsffn_i16_scale(activations[1]);             \
        out[2] = vec_sum(vec_add(even_2, odd_2)) * TSFFN_F16_SCALE_BACK * tsffn_i16_scale(activations[2]);             \
        out[3] = vec_sum(vec_add(even_3, odd_3)) * TSFFN_F16_SCALE_BACK * tsffn_i16_scale(activations[3]);             \
    }

DEFINE_BLOCK_DOT4(q8_0, TSFFN_Q8_0_BYTES)
DEFINE_BLOCK_DOT4(q4_0, TSFFN_Q4_0_BYTES)

#define DEFINE_BLOCK_AXPY(NAME, SUFFIX, BYTES, ASKS, BEGIN, ASK)                                                       \
    static void NAME##_##SUFFIX(int64_t n, float a, const void * row, float * y ASKS()) {                              \
        BEGIN(n / TSFFN_BLOCK_SIZE);                                                                                   \
        const uint8_t * block = row;                                                                                   \
        for (int64_t j = 0; j < n; j += TSFFN_BLOCK_SIZE, block += (BYTES)) {                                          \
            ASK();                                                                                                     \
            axpy_block_##SUFFIX(vec_set1(a * _cvtsh_ss(tsffn_load_u16(block))), block + 2, y + j);                     \
        }                                                                                                              \
    }
DEFINE_BLOCK_AXPY(axpy, q8_0, TSFFN_Q8_0_BYTES, NO_ASKS, BEGIN_NOTHING, ASK_NOTHING)
DEFINE_BLOCK_AXPY(axpy_asking, q8_0, TSFFN_Q8_0_BYTES, WITH_ASKS, BEGIN_ASKING, ASK_STEP)

#endif
