// Q4_0 with AVX-512, four blocks (a quad) at a time.
#ifndef TSFFN_QUADS_AVX512_H
#define TSFFN_QUADS_AVX512_H

#include "kernels.h"

#include <immintrin.h>

enum {
    TSFFN_Q4_0_QUAD_BYTES = 4 * TSFFN_Q4_0_BYTES, // of four blocks, whose nibbles fill a register
    TSFFN_Q4_0_QUADS = 4,                         // whose scales do, in f32
};

static inline __m512i nibbles_of_quad(const uint8_t * blocks) {
    const uint8_t * p = blocks + 2;
    const __m512i a = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)p));
    const __m512i b = _mm512_inserti32x4(a, _mm_loadu_si128((const __m128i *)(p + TSFFN_Q4_0_BYTES)), 1);
    const __m512i c = _mm512_inserti32x4(b, _mm_loadu_si128((const __m128i *)(p + 2 * TSFFN_Q4_0_BYTES)), 2);
    return _mm512_inserti32x4(c, _mm_loadu_si128((const __m128i *)(p + 3 * TSFFN_Q4_0_BYTES)), 3);
}

// The scales of n_quads times four blocks, at most 16, a lane each. A block is nine words of 16 bits, so that those of
// four blocks are words 0, 9, 18 and 27 of one load.
static inline __m512 scales_of_quads(const uint8_t * blocks, int n_quads) {
    const __m512i words = _mm512_set_epi16(27, 18, 9, 0, 27, 18, 9, 0, 27, 18, 9, 0, 27, 18, 9, 0, //
                                           27, 18, 9, 0, 27, 18, 9, 0, 27, 18, 9, 0, 27, 18, 9, 0);
    __m512i scales = _mm512_setzero_si512();
    for (int k = 0; k < n_quads; ++k, blocks += TSFFN_Q4_0_QUAD_BYTES) {
        const __mmask32 places = (__mmask32)0xf << (4 * k);
        scales = _mm512_mask_permutexvar_epi16(scales, places, words, _mm512_loadu_si512(blocks));
    }
    return _mm512_cvtph_ps(_mm512_castsi512_si256(scales));
}

#endif
