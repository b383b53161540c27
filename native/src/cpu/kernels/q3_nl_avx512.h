// The codes of a panel of Q3_NL (panels.h) with AVX-512, for the files that multiply with them.
#ifndef TSFFN_Q3_NL_AVX512_H
#define TSFFN_Q3_NL_AVX512_H

#include "panels.h"

#include <immintrin.h>

enum { TSFFN_Q3_NL_QUADS = TSFFN_BLOCK_SIZE / 4 };

// The levels' table for VPSHUFB.
static inline __m512i tsffn_q3_nl_levels(void) {
    return _mm512_broadcast_i32x4(_mm_setr_epi8(TSFFN_Q3_NL_LEVELS));
}

// codes[g]: those of columns 4 g .. 4 g + 3 of the block, four bytes for each of the 16 rows.
static inline __attribute__((always_inline)) void tsffn_q3_nl_codes(const uint8_t * block, __m512i * codes) {
    const __m512i bits_012 = _mm512_set1_epi8(7), bits_01 = _mm512_set1_epi8(3), bit_2 = _mm512_set1_epi8(4);
    const __m512i q0 = _mm512_loadu_si512(block + TSFFN_PANEL_ROWS);
    const __m512i q1 = _mm512_loadu_si512(block + TSFFN_PANEL_ROWS + 64);
    const __m512i q2 = _mm512_loadu_si512(block + TSFFN_PANEL_ROWS + 128);
    codes[0] = _mm512_and_si512(q0, bits_012);
    codes[1] = _mm512_and_si512(q1, bits_012);
    codes[2] = _mm512_and_si512(q2, bits_012);
    codes[3] = _mm512_and_si512(_mm512_srli_epi16(q0, 3), bits_012);
    codes[4] = _mm512_and_si512(_mm512_srli_epi16(q1, 3), bits_012);
    codes[5] = _mm512_and_si512(_mm512_srli_epi16(q2, 3), bits_012);
    // Bits 0 and 1 of the last two from one place, bit 2 from another: a | (b & c).
    const __m512i top_0 = _mm512_and_si512(_mm512_srli_epi16(q0, 6), bits_01);
    const __m512i top_1 = _mm512_and_si512(_mm512_srli_epi16(q1, 6), bits_01);
    codes[6] = _mm512_ternarylogic_epi32(top_0, _mm512_srli_epi16(q2, 4), bit_2, 0xf8);
    codes[7] = _mm512_ternarylogic_epi32(top_1, _mm512_srli_epi16(q2, 5), bit_2, 0xf8);
}

// What a panel gives for a vector: from the sums of its products with hi and with lo, d of the 16 rows and of the
// vector.
static inline __m512 tsffn_q3_nl_finish(__m512i hi, __m512i lo, __m512 d, float x_scale) {
    const __m512 sum = _mm512_fmadd_ps(_mm512_set1_ps(128.0f), _mm512_cvtepi32_ps(hi), _mm512_cvtepi32_ps(lo));
    return _mm512_mul_ps(_mm512_mul_ps(sum, d), _mm512_set1_ps(x_scale));
}

#endif
