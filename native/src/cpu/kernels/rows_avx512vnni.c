// AVX512-VNNI: dot products of Q4_0 four blocks at a time, the row kernels of AVX-512 for the rest.
//
// The nibbles of four blocks fill one register, 16 bytes of each. VPDPBUSD multiplies them, unsigned, with signed bytes
// of the activations (the quads of kernels.h), and adds four neighbours into a lane, so that lanes 4 b .. 4 b + 3
// belong to block b:
//   lane = 256 * sum nibble hi + sum nibble lo        exact in int32
// The weights are d (nibble - 8): the eights are taken off with the sums of whole blocks, 16 at a time,
//   row . x = sum_blocks d (nibbles . q) - 8 sum_blocks d sum(q)
// That takes 18 instructions for 128 weights where words (kernels_avx512.c) take 40. Half of them are shared by all
// vectors (docs/notes/2026-11-28-prefill.md).
#include "half.h"
#include "rows_avx512.h"

#include <immintrin.h>

struct weights {
    __m512i low, high; // nibbles
    __m512 scales;
};

// Those of a quad, whose scales are number k of `scales`.
static inline struct weights load_weights(const uint8_t * blocks, __m512 scales, int k) {
    const __m512i q = nibbles_of_quad(blocks);
    const __m512i mask = _mm512_set1_epi8(15);
    const __m512i each_fourfold = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return (struct weights){
        .low = _mm512_and_si512(q, mask),
        .high = _mm512_and_si512(_mm512_srli_epi16(q, 4), mask),
        .scales = _mm512_permutexvar_ps(_mm512_add_epi32(each_fourfold, _mm512_set1_epi32(4 * k)), scales),
    };
}

static inline __m512 add_quad(__m512 sum, struct weights w, const int8_t * quad) {
    __m512i hi = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w.low, _mm512_loadu_si512(quad));
    hi = _mm512_dpbusd_epi32(hi, w.high, _mm512_loadu_si512(quad + 64));
    __m512i products = _mm512_slli_epi32(hi, 8);
    products = _mm512_dpbusd_epi32(products, w.low, _mm512_loadu_si512(quad + 128));
    products = _mm512_dpbusd_epi32(products, w.high, _mm512_loadu_si512(quad + 192));
    return _mm512_fmadd_ps(w.scales, _mm512_cvtepi32_ps(products), sum);
}

// One block behind the last quad, multiplied in words.
static inline __m512 add_block(__m512 sum, const uint8_t * block, const int16_t * x) {
    const __m128i mask = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
    const __m128i q = _mm_loadu_si128((const __m128i *)(block + 2));
    const __m128i low = _mm_sub_epi8(_mm_and_si128(q, mask), eight);
    const __m128i high = _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(q, 4), mask), eight);
    const __m512i w = _mm512_cvtepi8_epi16(_mm256_set_m128i(high, low));
    const __m512i products = _mm512_madd_epi16(w, _mm512_loadu_si512(x));
    const __m512 d = _mm512_set1_ps(_cvtsh_ss(tsffn_load_u16(block)));
    return _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(products), sum);
}

enum { MOST_X = 8 };

// Quads from column j on, which have their scales in one register. Lanes without a block have the scale 0, whatever
// follows the sums.
#define ADD_QUADS(n_quads)                                                                                             \
    do {                                                                                                               \
        const __m512 scales = scales_of_quads(block, n_quads);                                                         \
        for (int t = 0; t < n_x; ++t) {                                                                                \
            const __m512i q = _mm512_loadu_si512(block_sums[t] + j / TSFFN_BLOCK_SIZE);                                \
            offsets[t] = _mm512_fmadd_ps(scales, _mm512_cvtepi32_ps(q), offsets[t]);                                   \
        }                                                                                                              \
        tsffn_asking_step(&asking);                                                                                    \
        _Pragma("GCC unroll 4") for (int k = 0; k < (n_quads); ++k) {                                                  \
            const struct weights w = load_weights(block, scales, k);                                                   \
            for (int t = 0; t < n_x; ++t) {                                                                            \
                sums[t] = add_quad(sums[t], w, quads[t] + at);                                                         \
            }                                                                                                          \
            j += TSFFN_I16_QUAD;                                                                                       \
            at += TSFFN_I16_QUAD_BYTES;                                                                                \
            block += TSFFN_Q4_0_QUAD_BYTES;                                                                            \
        }                                                                                                              \
    } while (0)

TSFFN_INLINED void dots_of_q4_0(int64_t n, const void * row, int n_x, const void * const * x, float * s,
                                const struct tsffn_asks * asks) {
    const uint8_t * block = row;
    struct tsffn_asking asking = tsffn_asking_begin(asks, n / (TSFFN_Q4_0_QUADS * TSFFN_I16_QUAD));
    const int8_t * quads[MOST_X];
    const int32_t * block_sums[MOST_X];
    __m512 sums[MOST_X], offsets[MOST_X];
    for (int t = 0; t < n_x; ++t) {
        quads[t] = tsffn_i16_quads(x[t], n);
        block_sums[t] = tsffn_i16_sums(x[t], n);
        sums[t] = offsets[t] = _mm512_setzero_ps();
    }
    int64_t j = 0, at = 0;
    while (j + TSFFN_Q4_0_QUADS * TSFFN_I16_QUAD <= n) {
        ADD_QUADS(TSFFN_Q4_0_QUADS);
    }
    while (j + TSFFN_I16_QUAD <= n) {
        ADD_QUADS(1);
    }
    for (; j < n; j += TSFFN_BLOCK_SIZE, block += TSFFN_Q4_0_BYTES) {
        for (int t = 0; t < n_x; ++t) {
            sums[t] = add_block(sums[t], block, tsffn_i16_values(x[t]) + j);
        }
    }
    for (int t = 0; t < n_x; ++t) {
        const __m512 sum = _mm512_fmadd_ps(_mm512_set1_ps(-8.0f), offsets[t], sums[t]);
        s[t] = _mm512_reduce_add_ps(sum) * tsffn_i16_scale(x[t]);
    }
}
TSFFN_DEFINE_DOTS(tsffn_dots_q4_0_avx512vnni, MOST_X, dots_of_q4_0)
