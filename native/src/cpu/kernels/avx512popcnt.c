// AVX512-VPOPCNTDQ: panels of BITS1 and BITS2. All other kernels are those of AVX512-VNNI.
//
// A register holds 32 weights of each of the 16 rows; one instruction counts where their signs are not those of the
// activations.
#include "panels.h"
#include "templates.h"
#include "tiers.h"

#include <immintrin.h>

// sum_l 2^l popcount(w xor planes[l]) of 16 rows.
TSFFN_INLINED __m512i differing(__m512i w, const uint32_t * planes, int n_planes) {
    __m512i sum = _mm512_setzero_si512();
    for (int l = n_planes - 1; l >= 0; --l) {
        const __m512i differ = _mm512_xor_si512(w, _mm512_set1_epi32((int)planes[l]));
        sum = _mm512_add_epi32(_mm512_add_epi32(sum, sum), _mm512_popcnt_epi32(differ));
    }
    return sum;
}

TSFFN_INLINED void panel_of_planes(int n_bits, int n_planes, int64_t n, const uint8_t * panel, int n_x,
                                   const void * const * x, float (*s)[TSFFN_PANEL_ROWS],
                                   const struct tsffn_asks * asks) {
    const uint32_t * planes[4];
    __m512i sums[4];
    for (int t = 0; t < n_x; ++t) {
        planes[t] = tsffn_bits_words(x[t]);
        sums[t] = _mm512_setzero_si512();
    }
    const int64_t n_blocks = n / TSFFN_BLOCK_SIZE;
    struct tsffn_asking asking = tsffn_asking_begin(asks, n_blocks);
    for (int64_t b = 0; b < n_blocks; ++b) {
        tsffn_asking_step(&asking);
        for (int k = 0; k < n_bits; ++k, panel += TSFFN_PANEL_ROWS * sizeof(uint32_t)) {
            const __m512i w = _mm512_loadu_si512(panel);
            for (int t = 0; t < n_x; ++t) {
                const __m512i differ = differing(w, planes[t] + b * n_planes, n_planes);
                sums[t] = _mm512_add_epi32(sums[t], _mm512_slli_epi32(differ, (unsigned)k));
            }
        }
    }
    const __m512i most = _mm512_set1_epi32(tsffn_bits_most(n_bits, n_planes, n));
    for (int t = 0; t < n_x; ++t) {
        const __m512i sum = _mm512_sub_epi32(most, _mm512_slli_epi32(sums[t], 1));
        _mm512_storeu_ps(s[t], _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(tsffn_bits_scale(x[t]))));
    }
}

// All vectors have as many bits; loops over 1, 4 and 8 of them are unrolled.
TSFFN_INLINED void panel_of_bits(int n_bits, int64_t n, const uint8_t * panel, int n_x, const void * const * x,
                                 float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks) {
    const int n_planes = tsffn_bits_planes(x[0]);
    switch (n_planes) {
    case 1:
        panel_of_planes(n_bits, 1, n, panel, n_x, x, s, asks);
        break;
    case 4:
        panel_of_planes(n_bits, 4, n, panel, n_x, x, s, asks);
        break;
    case 8:
        panel_of_planes(n_bits, 8, n, panel, n_x, x, s, asks);
        break;
    default:
        panel_of_planes(n_bits, n_planes, n, panel, n_x, x, s, asks);
    }
}

TSFFN_INLINED void panel_of_bits1(int64_t n, const uint8_t * panel, int n_x, const void * const * x,
                                  float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks) {
    panel_of_bits(1, n, panel, n_x, x, s, asks);
}

TSFFN_INLINED void panel_of_bits2(int64_t n, const uint8_t * panel, int n_x, const void * const * x,
                                  float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks) {
    panel_of_bits(2, n, panel, n_x, x, s, asks);
}
TSFFN_DEFINE_PANEL(tsffn_panel_bits1_avx512popcnt, panel_of_bits1)
TSFFN_DEFINE_PANEL(tsffn_panel_bits2_avx512popcnt, panel_of_bits2)

const struct tsffn_kernels tsffn_kernels_avx512popcnt = {
    .isa = TSFFN_ISA_AVX512POPCNT,
    .name = "avx512popcnt",
    .dots =
        {
            [TSFFN_FORMAT_F32] = tsffn_dots_f32_avx512,
            [TSFFN_FORMAT_F16] = tsffn_dots_f16_avx512,
            [TSFFN_FORMAT_BF16] = tsffn_dots_bf16_avx512,
            [TSFFN_FORMAT_Q8_0] = tsffn_dots_q8_0_avx512,
            [TSFFN_FORMAT_Q4_0] = tsffn_dots_q4_0_avx512vnni,
        },
    .axpys =
        {
            [TSFFN_FORMAT_F32] = tsffn_axpys_f32_avx512,
            [TSFFN_FORMAT_F16] = tsffn_axpys_f16_avx512,
            [TSFFN_FORMAT_BF16] = tsffn_axpys_bf16_avx512,
            [TSFFN_FORMAT_Q8_0] = tsffn_axpys_q8_0_avx512,
            [TSFFN_FORMAT_Q4_0] = tsffn_axpys_q4_0_avx512,
        },
    .add_rows =
        {
            [TSFFN_FORMAT_F32] = tsffn_add_rows_f32_avx512,
            [TSFFN_FORMAT_F16] = tsffn_add_rows_f16_avx512,
            [TSFFN_FORMAT_BF16] = tsffn_add_rows_bf16_avx512,
            [TSFFN_FORMAT_Q8_0] = tsffn_add_rows_q8_0_avx512,
            [TSFFN_FORMAT_Q4_0] = tsffn_add_rows_q4_0_avx512,
        },
    .panel =
        {
            [TSFFN_FORMAT_Q8_0] = tsffn_panel_q8_0_avx512vnni,
            [TSFFN_FORMAT_Q4_0] = tsffn_panel_q4_0_avx512vnni,
            [TSFFN_FORMAT_Q3_NL] = tsffn_panel_q3_nl_avx512vnni,
            [TSFFN_FORMAT_BITS1] = tsffn_panel_bits1_avx512popcnt,
            [TSFFN_FORMAT_BITS2] = tsffn_panel_bits2_avx512popcnt,
        },
};
