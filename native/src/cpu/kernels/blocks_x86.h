// Loops over the blocks of Q8_0 and Q4_0 rows, shared by the x86 tiers. The including file has defined
//   vec                          its vector of floats
//   vec_zero(), vec_set1(f)      0 and f in every lane
//   vec_fmadd(a, b, c), vec_add  a * b + c, a + b
//   vec_sum(v)                   the sum of the lanes
//   products_q8_0(block, x), products_q4_0(block, x)
//                                the products of a block's 32 weights with x[0..32), summed into the lanes
//   VEC_LANES, vec_load(p), vec_store(p, v)
//   add_block_q8_0(d, q, sums), add_block_q4_0(d, q, sums)
//                                sums += d * w of the 32 weights behind a block's scale
// and makes the kernels of what is here.
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

// The products of a block's weights with 32 activations.
typedef vec block_products(const uint8_t * block, const int16_t * x);

// sums[t] += those with x[t][j..j+32), times the block's scale.
TSFFN_INLINED void add_products_of_block(block_products * products, const uint8_t * block, int n_x,
                                         const int16_t * const * x, int64_t j, vec * sums) {
    const vec scale = block_scale(block);
    for (int t = 0; t < n_x; ++t) {
        sums[t] = vec_fmadd(scale, products(block, x[t] + j), sums[t]);
    }
}

// Two accumulators: the sums of one block depend on nothing of the next. Unpacking the weights and their scale is two
// thirds of the work of a single product.
TSFFN_INLINED void dots_of_blocks(block_products * products, int block_bytes, int64_t n, const void * row, int n_x,
                                  const void * const * activations, float * s, const struct tsffn_asks * asks) {
    const uint8_t * block = row;
    const int16_t * x[4];
    vec even[4], odd[4];
    for (int t = 0; t < n_x; ++t) {
        x[t] = tsffn_i16_values(activations[t]);
        even[t] = odd[t] = vec_zero();
    }
    struct tsffn_asking asking = tsffn_asking_begin(asks, n / 64);
    int64_t j = 0;
    for (; j + 64 <= n; j += 64, block += 2 * block_bytes) {
        tsffn_asking_step(&asking);
        add_products_of_block(products, block, n_x, x, j, even);
        add_products_of_block(products, block + block_bytes, n_x, x, j + 32, odd);
    }
    if (j < n) {
        add_products_of_block(products, block, n_x, x, j, even);
    }
    for (int t = 0; t < n_x; ++t) {
        s[t] = vec_sum(vec_add(even[t], odd[t])) * TSFFN_F16_SCALE_BACK * tsffn_i16_scale(activations[t]);
    }
}

TSFFN_INLINED void dots_of_q8_0(int64_t n, const void * row, int n_x, const void * const * x, float * s,
                                const struct tsffn_asks * asks) {
    dots_of_blocks(products_q8_0, TSFFN_Q8_0_BYTES, n, row, n_x, x, s, asks);
}

TSFFN_INLINED void dots_of_q4_0(int64_t n, const void * row, int n_x, const void * const * x, float * s,
                                const struct tsffn_asks * asks) {
    dots_of_blocks(products_q4_0, TSFFN_Q4_0_BYTES, n, row, n_x, x, s, asks);
}

enum {
    SCALES = 16,    // of a row's blocks, made together
    ASK_BLOCKS = 4, // asking in every block instead of once in four costs a fifth
    VECS_OF_BLOCK = TSFFN_BLOCK_SIZE / VEC_LANES,
};

// a times the scales of a row's next n blocks, at most SCALES.
typedef void block_scales(int64_t n, float a, const uint8_t * block, float * scales);

TSFFN_INLINED void scales_of_blocks(int block_bytes, int64_t n, float a, const uint8_t * block, float * scales) {
    for (int64_t b = 0; b < n; ++b, block += block_bytes) {
        scales[b] = a * _cvtsh_ss(tsffn_load_u16(block));
    }
}

static inline void scales_q8_0(int64_t n, float a, const uint8_t * block, float * scales) {
    scales_of_blocks(TSFFN_Q8_0_BYTES, n, a, block, scales);
}

// sums += d * w of the 32 weights behind a block's scale.
typedef void add_weights(vec d, const uint8_t * q, vec * sums);

// y[0..32) += the sum of d[i][b] * w of the rows' next blocks.
TSFFN_INLINED void add_blocks_of_rows(add_weights * add, int block_bytes, int n_rows, const uint8_t ** block,
                                      float (*d)[SCALES], int64_t b, float * y) {
    vec sums[VECS_OF_BLOCK];
    for (int k = 0; k < VECS_OF_BLOCK; ++k) {
        sums[k] = vec_load(y + k * VEC_LANES);
    }
    for (int i = 0; i < n_rows; ++i) {
        add(vec_set1(d[i][b]), block[i] + 2, sums);
        block[i] += block_bytes;
    }
    for (int k = 0; k < VECS_OF_BLOCK; ++k) {
        vec_store(y + k * VEC_LANES, sums[k]);
    }
}

TSFFN_INLINED void axpys_of_blocks(add_weights * add, block_scales * make_scales, int block_bytes, int64_t n,
                                   int n_rows, const float * a, const void * const * rows, float * y,
                                   struct tsffn_asking * asking) {
    const uint8_t * block[4];
    float d[4][SCALES];
    for (int i = 0; i < n_rows; ++i) {
        block[i] = rows[i];
    }
    for (int64_t left = n / TSFFN_BLOCK_SIZE; left > 0; left -= SCALES) {
        const int64_t n_blocks = left < SCALES ? left : SCALES;
        for (int i = 0; i < n_rows; ++i) {
            make_scales(n_blocks, a[i], block[i], d[i]);
        }
        int64_t b = 0;
        while (b + ASK_BLOCKS <= n_blocks) {
            tsffn_asking_step(asking);
#pragma GCC unroll 4
            for (int k = 0; k < ASK_BLOCKS; ++k, ++b, y += TSFFN_BLOCK_SIZE) {
                add_blocks_of_rows(add, block_bytes, n_rows, block, d, b, y);
            }
        }
        for (; b < n_blocks; ++b, y += TSFFN_BLOCK_SIZE) {
            add_blocks_of_rows(add, block_bytes, n_rows, block, d, b, y);
        }
    }
}

// How often axpys_of_blocks asks.
#define ASKS_OF_BLOCKS (n / (TSFFN_BLOCK_SIZE * ASK_BLOCKS))

TSFFN_INLINED void axpys_of_q8_0(int64_t n, int n_rows, const float * a, const void * const * rows, float * y,
                                 struct tsffn_asking * asking) {
    axpys_of_blocks(add_block_q8_0, scales_q8_0, TSFFN_Q8_0_BYTES, n, n_rows, a, rows, y, asking);
}

#endif
