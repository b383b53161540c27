// What the AVX-512 files share: Q4_0 four blocks at a time, and the functions of AVX512-VNNI (rows_avx512vnni.c) for
// the tables of kernels_avx512.c.
#ifndef TSFFN_ROWS_AVX512_H
#define TSFFN_ROWS_AVX512_H

#include "kernels.h"

#include <immintrin.h>

// 16 bytes from each of four places that lie a block apart.
static inline __m512i load_four_q4_0(const uint8_t * p) {
    const __m512i a = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)p));
    const __m512i b = _mm512_inserti32x4(a, _mm_loadu_si128((const __m128i *)(p + TSFFN_Q4_0_BYTES)), 1);
    const __m512i c = _mm512_inserti32x4(b, _mm_loadu_si128((const __m128i *)(p + 2 * TSFFN_Q4_0_BYTES)), 2);
    return _mm512_inserti32x4(c, _mm_loadu_si128((const __m128i *)(p + 3 * TSFFN_Q4_0_BYTES)), 3);
}

// The scales of four blocks, each in its four lanes, times 2^-112 (tsffn_f16_bits_scaled): the half moves to the upper
// end of its lane and three bits down.
static inline __m512 four_scales_q4_0(const uint8_t * blocks) {
    const __m512i to_top = _mm512_set1_epi32(0x01008080);
    const __m512i halves = _mm512_shuffle_epi8(load_four_q4_0(blocks), to_top);
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_srai_epi32(halves, 3), _mm512_set1_epi32((int)0x8fffffff)));
}

float tsffn_dot_q4_0_avx512vnni(int64_t n, const void * row, const void * x);
float tsffn_dot_asking_q4_0_avx512vnni(int64_t n, const void * row, const void * x, const struct tsffn_asks * asks);
void tsffn_dot4_q4_0_avx512vnni(int64_t n, const void * row, const void * const x[4], float s[4]);

#endif
