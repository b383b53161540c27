// AVX2 and AVX-VNNI: VPDPBUSD adds four products of unsigned and signed bytes to a sum of 32 bits. Rows are those of
// AVX2.
#include "panels.h"
#include "tiers.h"

#include <immintrin.h>

static inline __m256i add_products(__m256i sum, __m256i unsigned_bytes, __m256i signed_bytes) {
    return _mm256_dpbusd_avx_epi32(sum, unsigned_bytes, signed_bytes);
}

static inline __m256i wide_sums(__m256i sum) {
    return sum;
}

// Nothing but the sign is in the high word of a sum, so nothing must be in that of its scale.
static inline __m256i add_scaled(__m256i total, __m256i sum, __m256i scales) {
    return _mm256_dpwssd_avx_epi32(total, sum, _mm256_and_si256(scales, _mm256_set1_epi32(0xffff)));
}

#include "panels_x86.h"

// panel_products of Q8_0: the sign bit is inverted, which adds an offset of 128 and leaves unsigned bytes.
static inline __m256i products_of_bytes(const uint8_t * q, const int16_t * words, const int8_t * hi,
                                        const int8_t * lo) {
    (void)words;
    const __m256i offset = _mm256_set1_epi8((char)0x80);
    __m256i hi_sum = _mm256_setzero_si256(), lo_sum = hi_sum;
    for (int g = 0; g < 8; ++g) {
        const __m256i w = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(q + g * 64)), offset);
        hi_sum = add_products(hi_sum, w, four_bytes(hi + 4 * g));
        lo_sum = add_products(lo_sum, w, four_bytes(lo + 4 * g));
    }
    return _mm256_add_epi32(_mm256_slli_epi32(hi_sum, 8), lo_sum);
}

void tsffn_panel_q8_0_avxvnni(int64_t n, const void * panel, int n_x, const void * const * x,
                              float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks) {
    panel_of_blocks(products_of_bytes, TSFFN_PANEL_Q8_0_BYTES, 128, n, panel, n_x, x, s, asks);
}

void tsffn_panel_q4_0_avxvnni(int64_t n, const void * panel, int n_x, const void * const * x,
                              float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks) {
    panel_of_blocks(products_of_nibbles, TSFFN_PANEL_Q4_0_BYTES, 8, n, panel, n_x, x, s, asks);
}

void tsffn_panel_q3_nl_avxvnni(int64_t n, const void * panel, int n_x, const void * const * x,
                               float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks) {
    panel_of_q3_nl(n, panel, n_x, x, s, asks);
}

const struct tsffn_kernels tsffn_kernels_avxvnni = {
    .isa = TSFFN_ISA_AVXVNNI,
    .name = "avxvnni",
    .dots =
        {
            [TSFFN_FORMAT_F32] = tsffn_dots_f32_avx2,
            [TSFFN_FORMAT_F16] = tsffn_dots_f16_avx2,
            [TSFFN_FORMAT_BF16] = tsffn_dots_bf16_avx2,
            [TSFFN_FORMAT_Q8_0] = tsffn_dots_q8_0_avx2,
            [TSFFN_FORMAT_Q4_0] = tsffn_dots_q4_0_avx2,
        },
    .axpys =
        {
            [TSFFN_FORMAT_F32] = tsffn_axpys_f32_avx2,
            [TSFFN_FORMAT_F16] = tsffn_axpys_f16_avx2,
            [TSFFN_FORMAT_BF16] = tsffn_axpys_bf16_avx2,
            [TSFFN_FORMAT_Q8_0] = tsffn_axpys_q8_0_avx2,
            [TSFFN_FORMAT_Q4_0] = tsffn_axpys_q4_0_avx2,
        },
    .add_rows =
        {
            [TSFFN_FORMAT_F32] = tsffn_add_rows_f32_avx2,
            [TSFFN_FORMAT_F16] = tsffn_add_rows_f16_avx2,
            [TSFFN_FORMAT_BF16] = tsffn_add_rows_bf16_avx2,
            [TSFFN_FORMAT_Q8_0] = tsffn_add_rows_q8_0_avx2,
            [TSFFN_FORMAT_Q4_0] = tsffn_add_rows_q4_0_avx2,
        },
    .panel =
        {
            [TSFFN_FORMAT_Q8_0] = tsffn_panel_q8_0_avxvnni,
            [TSFFN_FORMAT_Q4_0] = tsffn_panel_q4_0_avxvnni,
            [TSFFN_FORMAT_Q3_NL] = tsffn_panel_q3_nl_avxvnni,
            [TSFFN_FORMAT_BITS1] = tsffn_panel_bits1_avx2,
            [TSFFN_FORMAT_BITS2] = tsffn_panel_bits2_avx2,
        },
};
