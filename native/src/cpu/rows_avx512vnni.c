// AVX512-VNNI: dot products of Q4_0 four blocks at a time, the row kernels of AVX-512 for the rest.
//
// The nibbles of four blocks fill one register, 16 bytes of each. VPDPBUSD multiplies them, unsigned, with signed bytes
// of the activations (the quads of kernels.h), and adds four neighbours into a lane, so that lanes 4 b .. 4 b + 3
// belong to block b:
//   lane = 256 * sum w hi + sum w lo - 8 * sum q      exact in int32
// That takes 20 instructions for 128 weights where words (kernels_avx512.c) take 40.
#include "asks.h"
#include "half.h"
#include "rows_avx512.h"

#include <immintrin.h>

enum { BLOCKS = TSFFN_I16_QUAD / TSFFN_BLOCK_SIZE };

struct weights {
    __m512i low, high; // nibbles
    __m512 scales;
};

static inline struct weights load_weights(const uint8_t * blocks) {
    const __m512i q = load_four_q4_0(blocks + 2);
    const __m512i mask = _mm512_set1_epi8(15);
    return (struct weights){
        .low = _mm512_and_si512(q, mask),
        .high = _mm512_and_si512(_mm512_srli_epi16(q, 4), mask),
        .scales = four_scales_q4_0(blocks),
    };
}

static inline __m512 add_quad(__m512 sum, struct weights w, const int8_t * quad) {
    __m512i hi = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w.low, _mm512_loadu_si512(quad));
    __m512i lo = _mm512_dpbusd_epi32(_mm512_loadu_si512(quad + 256), w.low, _mm512_loadu_si512(quad + 128));
    hi = _mm512_dpbusd_epi32(hi, w.high, _mm512_loadu_si512(quad + 64));
    lo = _mm512_dpbusd_epi32(lo, w.high, _mm512_loadu_si512(quad + 192));
    const __m512i products = _mm512_add_epi32(_mm512_slli_epi32(hi, 8), lo);
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
    const uint32_t d = (uint32_t)tsffn_f16_bits_scaled(tsffn_load_u16(block));
    return _mm512_fmadd_ps(_mm512_set1_ps(tsffn_float_from_bits(d)), _mm512_cvtepi32_ps(products), sum);
}

static inline float finish(__m512 sum, const void * x) {
    return _mm512_reduce_add_ps(sum) * TSFFN_F16_SCALE_BACK * tsffn_i16_scale(x);
}

#define DEFINE_DOT(NAME, ASKS, BEGIN, ASK)                                                                             \
    float NAME(int64_t n, const void * row, const void * x ASKS()) {                                                   \
        const uint8_t * block = row;                                                                                   \
        BEGIN(n / TSFFN_I16_QUAD);                                                                                     \
        const int8_t * quad = tsffn_i16_quads(x, n);                                                                   \
        __m512 sum = _mm512_setzero_ps();                                                                              \
        int64_t j = 0;                                                                                                 \
        for (; j + TSFFN_I16_QUAD <= n; j += TSFFN_I16_QUAD, quad += TSFFN_I16_QUAD_BYTES) {                           \
            ASK();                                                                                                     \
            sum = add_quad(sum, load_weights(block), quad);                                                            \
            block += BLOCKS * TSFFN_Q4_0_BYTES;                                                                        \
        }                                                                                                              \
        for (; j < n; j += TSFFN_BLOCK_SIZE, block += TSFFN_Q4_0_BYTES) {                                              \
            sum = add_block(sum, block, tsffn_i16_values(x) + j);                                                      \
        }                                                                                                              \
        return finish(sum, x);                                                                                         \
    }
DEFINE_DOT(tsffn_dot_q4_0_avx512vnni, NO_ASKS, BEGIN_NOTHING, ASK_NOTHING)
DEFINE_DOT(tsffn_dot_asking_q4_0_avx512vnni, WITH_ASKS, BEGIN_ASKING, ASK_STEP)

// Bit for bit what four single dots give: unpacking the weights is shared.
void tsffn_dot4_q4_0_avx512vnni(int64_t n, const void * row, const void * const x[4], float s[4]) {
    const uint8_t * block = row;
    __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    int64_t j = 0;
    for (; j + TSFFN_I16_QUAD <= n; j += TSFFN_I16_QUAD, block += BLOCKS * TSFFN_Q4_0_BYTES) {
        const struct weights w = load_weights(block);
        for (int k = 0; k < 4; ++k) {
            sum[k] = add_quad(sum[k], w, tsffn_i16_quads(x[k], n) + j / TSFFN_I16_QUAD * TSFFN_I16_QUAD_BYTES);
        }
    }
    for (; j < n; j += TSFFN_BLOCK_SIZE, block += TSFFN_Q4_0_BYTES) {
        for (int k = 0; k < 4; ++k) {
            sum[k] = add_block(sum[k], block, tsffn_i16_values(x[k]) + j);
        }
    }
    for (int k = 0; k < 4; ++k) {
        s[k] = finish(sum[k], x[k]);
    }
}
