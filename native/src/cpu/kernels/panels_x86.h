// Panels with registers of 32 bytes, which hold 4 bytes of 8 rows; shared by AVX2 and AVX-VNNI. The including file has
// defined
//   add_products(sum, unsigned, signed)   sum += products of bytes, in the tier's kind of sums
//   wide_sums(sum)                        such sums in 32 bits, of four products each
//   add_scaled(total, sum, scales)        total += wide_sums(sum) * scales
#ifndef TSFFN_PANELS_X86_H
#define TSFFN_PANELS_X86_H

#include "panels.h"
#include "templates.h"

#include <immintrin.h>

// Bytes x[0..4), eight times.
static inline __m256i four_bytes(const int8_t * x) {
    int32_t bytes;
    __builtin_memcpy(&bytes, x, sizeof(bytes));
    return _mm256_set1_epi32(bytes);
}

// total[half] += d * (products - offset * sum) for the 8 rows of a half.
static inline __m256 add_panel_block(__m256 total, const uint8_t * d, __m256i products, int32_t back) {
    const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)d));
    return _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(_mm256_sub_epi32(products, _mm256_set1_epi32(back))), total);
}

// panel_products of Q4_0.
static inline __m256i products_of_nibbles(const uint8_t * q, const int16_t * x, const int8_t * hi, const int8_t * lo) {
    (void)x;
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i hi_sum = _mm256_setzero_si256(), lo_sum = hi_sum;
    for (int g = 0; g < 4; ++g) {
        const __m256i bytes = _mm256_loadu_si256((const __m256i *)(q + g * 64));
        const __m256i low = _mm256_and_si256(bytes, mask);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
        hi_sum = add_products(hi_sum, low, four_bytes(hi + 4 * g));
        hi_sum = add_products(hi_sum, high, four_bytes(hi + 16 + 4 * g));
        lo_sum = add_products(lo_sum, low, four_bytes(lo + 4 * g));
        lo_sum = add_products(lo_sum, high, four_bytes(lo + 16 + 4 * g));
    }
    return _mm256_add_epi32(_mm256_slli_epi32(wide_sums(hi_sum), 8), wide_sums(lo_sum));
}

// The products of 8 rows of a block with one activation vector, which is given in words and in bytes.
typedef __m256i panel_products(const uint8_t * q, const int16_t * words, const int8_t * hi, const int8_t * lo);

// A panel of a block format (tsffn_panel), from the products of its blocks; `offset` is added to the weights there.
TSFFN_INLINED void panel_of_blocks(panel_products * products, int block_bytes, int32_t offset, int64_t n,
                                   const void * panel, int n_x, const void * const * x, float (*s)[TSFFN_PANEL_ROWS],
                                   const struct tsffn_asks * asks) {
    const int64_t n_blocks = n / TSFFN_BLOCK_SIZE;
    for (int t = 0; t < n_x; ++t, asks = NULL) {
        const uint8_t * block = panel;
        const int8_t * hi = tsffn_i16_hi(x[t], n);
        const int8_t * lo = tsffn_i16_lo(x[t], n);
        const int32_t * sums = tsffn_i16_sums(x[t], n);
        __m256 total_a = _mm256_setzero_ps(), total_b = total_a;
        struct tsffn_asking asking = tsffn_asking_begin(asks, n_blocks);
        for (int64_t b = 0; b < n_blocks; ++b, hi += 32, lo += 32, block += block_bytes) {
            tsffn_asking_step(&asking);
            const uint8_t * q = block + 2 * TSFFN_PANEL_ROWS;
            const int16_t * words = tsffn_i16_values(x[t]) + b * TSFFN_BLOCK_SIZE;
            const int32_t back = offset * sums[b];
            total_a = add_panel_block(total_a, block, products(q, words, hi, lo), back);
            total_b = add_panel_block(total_b, block + 16, products(q + 32, words, hi, lo), back);
        }
        const __m256 d = _mm256_set1_ps(tsffn_i16_scale(x[t]));
        _mm256_storeu_ps(s[t], _mm256_mul_ps(total_a, d));
        _mm256_storeu_ps(s[t] + 8, _mm256_mul_ps(total_b, d));
    }
}

// Q3_NL, rows 8 half .. 8 half + 7: the activations are the unsigned factor, so no offset is taken off. The sums of 16
// columns fit 16 bits, and are multiplied with the group's scale there.
struct sums {
    __m256i hi, lo;
};

static inline struct sums add_half_block(struct sums total, const __m256i codes[4], __m256i scales, const uint8_t * hi,
                                         const uint8_t * lo) {
    const __m256i levels = _mm256_broadcastsi128_si256(_mm_setr_epi8(TSFFN_Q3_NL_LEVELS));
    __m256i hi_sum = _mm256_setzero_si256(), lo_sum = hi_sum;
    for (int g = 0; g < 4; ++g) {
        const __m256i w = _mm256_shuffle_epi8(levels, codes[g]);
        hi_sum = add_products(hi_sum, four_bytes((const int8_t *)hi + 4 * g), w);
        lo_sum = add_products(lo_sum, four_bytes((const int8_t *)lo + 4 * g), w);
    }
    return (struct sums){add_scaled(total.hi, hi_sum, scales), add_scaled(total.lo, lo_sum, scales)};
}

static inline struct sums add_block_q3_nl(struct sums total, const uint8_t * block, int half, const uint8_t * hi,
                                          const uint8_t * lo) {
    const __m256i bits_012 = _mm256_set1_epi8(7), bits_01 = _mm256_set1_epi8(3), bit_2 = _mm256_set1_epi8(4);
    const uint8_t * q = block + TSFFN_PANEL_ROWS + 32 * half;
    const __m256i q0 = _mm256_loadu_si256((const __m256i *)q);
    const __m256i q1 = _mm256_loadu_si256((const __m256i *)(q + 64));
    const __m256i q2 = _mm256_loadu_si256((const __m256i *)(q + 128));
    const __m256i first[4] = {
        _mm256_and_si256(q0, bits_012),
        _mm256_and_si256(q1, bits_012),
        _mm256_and_si256(q2, bits_012),
        _mm256_and_si256(_mm256_srli_epi16(q0, 3), bits_012),
    };
    const __m256i second[4] = {
        _mm256_and_si256(_mm256_srli_epi16(q1, 3), bits_012),
        _mm256_and_si256(_mm256_srli_epi16(q2, 3), bits_012),
        _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(q0, 6), bits_01),
                        _mm256_and_si256(_mm256_srli_epi16(q2, 4), bit_2)),
        _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(q1, 6), bits_01),
                        _mm256_and_si256(_mm256_srli_epi16(q2, 5), bit_2)),
    };
    // A row's byte of scales in both words of its 32 bits; then a nibble of it with its sign.
    const __m256i byte = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(block + 8 * half)));
    const __m256i bytes = _mm256_or_si256(byte, _mm256_slli_epi32(byte, 16));
    total = add_half_block(total, first, _mm256_srai_epi16(_mm256_slli_epi16(bytes, 12), 12), hi, lo);
    return add_half_block(total, second, _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 12), hi + 16, lo + 16);
}

static inline __m256 finish(struct sums total, const uint8_t * d, float x_scale) {
    const __m256 sum =
        _mm256_fmadd_ps(_mm256_set1_ps(128.0f), _mm256_cvtepi32_ps(total.hi), _mm256_cvtepi32_ps(total.lo));
    const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)d));
    return _mm256_mul_ps(_mm256_mul_ps(sum, scale), _mm256_set1_ps(x_scale));
}

// A panel of Q3_NL (tsffn_panel).
TSFFN_INLINED void panel_of_q3_nl(int64_t n, const void * panel, int n_x, const void * const * x,
                                  float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks) {
    const int64_t n_blocks = n / TSFFN_BLOCK_SIZE;
    for (int t = 0; t < n_x; ++t, asks = NULL) {
        const uint8_t * block = (const uint8_t *)panel + TSFFN_PANEL_Q3_NL_HEADER;
        const uint8_t *hi = tsffn_u14_hi(x[t]), *lo = tsffn_u14_lo(x[t], n);
        struct sums a = {_mm256_setzero_si256(), _mm256_setzero_si256()}, b = a;
        struct tsffn_asking asking = tsffn_asking_begin(asks, n_blocks);
        for (int64_t k = 0; k < n_blocks; ++k, hi += 32, lo += 32, block += TSFFN_PANEL_Q3_NL_BYTES) {
            tsffn_asking_step(&asking);
            a = add_block_q3_nl(a, block, 0, hi, lo);
            b = add_block_q3_nl(b, block, 1, hi, lo);
        }
        const float d = tsffn_u14_scale(x[t]);
        _mm256_storeu_ps(s[t], finish(a, panel, d));
        _mm256_storeu_ps(s[t] + 8, finish(b, (const uint8_t *)panel + 16, d));
    }
}

#endif
