// Panels with AVX512-VNNI: one register holds 4 bytes of each of the 16 rows, and VPDPBUSD multiplies unsigned weights
// with four activations of every row at once. The offset that makes the weights unsigned is taken off again:
//   sum_j w_j q_j = sum_j (w_j + offset) q_j - offset * sum_j q_j
// A block of 32 columns takes 16 (Q8_0, Q4_0) multiplications per activation vector, of hi and lo (panels.h), where the
// row kernels of AVX-512 take 16 times eight instructions.
#include "q3_nl_avx512.h"

#include <immintrin.h>

static inline __m512i four(const int8_t * x) {
    int32_t bytes;
    __builtin_memcpy(&bytes, x, sizeof(bytes));
    return _mm512_set1_epi32(bytes);
}

// acc += 256 * w . hi + w . lo of four columns, in two sums.
#define STEP(t, w, k)                                                                                                  \
    do {                                                                                                               \
        hi_sum[t] = _mm512_dpbusd_epi32(hi_sum[t], w, four(hi[t] + j + (k)));                                          \
        lo_sum[t] = _mm512_dpbusd_epi32(lo_sum[t], w, four(lo[t] + j + (k)));                                          \
    } while (0)

#define DEFINE_PANEL(SUFFIX, N_X, BYTES, OFFSET, PRODUCTS)                                                             \
    static inline void SUFFIX##_##N_X(int64_t n, const uint8_t * block, const void * const * x,                        \
                                      float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks) {                  \
        const int8_t *hi[N_X], *lo[N_X];                                                                               \
        const int32_t * sums[N_X];                                                                                     \
        __m512 total[N_X];                                                                                             \
        for (int t = 0; t < (N_X); ++t) {                                                                              \
            hi[t] = tsffn_i16_hi(x[t], n);                                                                             \
            lo[t] = tsffn_i16_lo(x[t], n);                                                                             \
            sums[t] = tsffn_i16_sums(x[t], n);                                                                         \
            total[t] = _mm512_setzero_ps();                                                                            \
        }                                                                                                              \
        const int64_t n_blocks = n / TSFFN_BLOCK_SIZE;                                                                 \
        struct tsffn_asking asking = tsffn_asking_begin(asks, n_blocks);                                               \
        for (int64_t b = 0, j = 0; b < n_blocks; ++b, j += TSFFN_BLOCK_SIZE, block += (BYTES)) {                       \
            tsffn_asking_step(&asking);                                                                                \
            __m512i hi_sum[N_X], lo_sum[N_X];                                                                          \
            for (int t = 0; t < (N_X); ++t) {                                                                          \
                hi_sum[t] = lo_sum[t] = _mm512_setzero_si512();                                                        \
            }                                                                                                          \
            PRODUCTS(N_X)                                                                                              \
            const __m512 d = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)block));                              \
            for (int t = 0; t < (N_X); ++t) {                                                                          \
                const __m512i products = _mm512_add_epi32(_mm512_slli_epi32(hi_sum[t], 8), lo_sum[t]);                 \
                const __m512i back = _mm512_set1_epi32((OFFSET) * sums[t][b]);                                         \
                total[t] = _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(_mm512_sub_epi32(products, back)), total[t]);         \
            }                                                                                                          \
        }                                                                                                              \
        for (int t = 0; t < (N_X); ++t) {                                                                              \
            _mm512_storeu_ps(s[t], _mm512_mul_ps(total[t], _mm512_set1_ps(tsffn_i16_scale(x[t]))));                    \
        }                                                                                                              \
    }

#define PRODUCTS_Q8_0(N_X)                                                                                             \
    for (int g = 0; g < 8; ++g) {                                                                                      \
        const __m512i w =                                                                                              \
            _mm512_xor_si512(_mm512_loadu_si512(block + 2 * TSFFN_PANEL_ROWS + g * 64), _mm512_set1_epi8((char)0x80)); \
        for (int t = 0; t < (N_X); ++t) {                                                                              \
            STEP(t, w, 4 * g);                                                                                         \
        }                                                                                                              \
    }

#define PRODUCTS_Q4_0(N_X)                                                                                             \
    for (int g = 0; g < 4; ++g) {                                                                                      \
        const __m512i q = _mm512_loadu_si512(block + 2 * TSFFN_PANEL_ROWS + g * 64);                                   \
        const __m512i low = _mm512_and_si512(q, _mm512_set1_epi8(15));                                                 \
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(q, 4), _mm512_set1_epi8(15));                          \
        for (int t = 0; t < (N_X); ++t) {                                                                              \
            STEP(t, low, 4 * g);                                                                                       \
            STEP(t, high, 16 + 4 * g);                                                                                 \
        }                                                                                                              \
    }

// Four vectors at most: 2 accumulators each, and one for the floats.
TSFFN_DEFINE_PANELS_BY_FOUR(q8_0, avx512vnni, TSFFN_PANEL_Q8_0_BYTES, 128, PRODUCTS_Q8_0)
TSFFN_DEFINE_PANELS_BY_FOUR(q4_0, avx512vnni, TSFFN_PANEL_Q4_0_BYTES, 8, PRODUCTS_Q4_0)

// Q3_NL: the activations are the unsigned factor, so no offset is taken off. The sums of 16 columns fit 16 bits, and
// VPDPWSSD multiplies them with the group's scale and adds them: no floats before the end.
TSFFN_INLINED void q3_nl(int64_t n, const uint8_t * panel, int n_x, const void * const * x,
                         float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks) {
    const __m512i levels = tsffn_q3_nl_levels();
    const uint8_t *hi[4], *lo[4];
    __m512i hi_total[4], lo_total[4];
    for (int t = 0; t < n_x; ++t) {
        hi[t] = tsffn_u14_hi(x[t]);
        lo[t] = tsffn_u14_lo(x[t], n);
        hi_total[t] = lo_total[t] = _mm512_setzero_si512();
    }
    const int64_t n_blocks = n / TSFFN_BLOCK_SIZE;
    struct tsffn_asking asking = tsffn_asking_begin(asks, n_blocks);
    const uint8_t * block = panel + TSFFN_PANEL_Q3_NL_HEADER;
    for (int64_t j = 0; j < n; j += TSFFN_BLOCK_SIZE, block += TSFFN_PANEL_Q3_NL_BYTES) {
        tsffn_asking_step(&asking);
        __m512i codes[TSFFN_Q3_NL_QUADS];
        tsffn_q3_nl_codes(block, codes);
        // The scale of either half in the low word of a row's 32 bits, its sign extended there; nothing in the high
        // one.
        const __m512i nibbles = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)block));
        const __m512i scales[2] = {_mm512_srai_epi16(_mm512_slli_epi32(nibbles, 12), 12),
                                   _mm512_srai_epi16(_mm512_slli_epi32(nibbles, 8), 12)};
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            __m512i w[4];
#pragma GCC unroll 4
            for (int g = 0; g < 4; ++g) {
                w[g] = _mm512_shuffle_epi8(levels, codes[4 * half + g]);
            }
            for (int t = 0; t < n_x; ++t) {
                __m512i hi_sum = _mm512_setzero_si512(), lo_sum = hi_sum;
                const uint8_t *hi_x = hi[t] + j + 16 * half, *lo_x = lo[t] + j + 16 * half;
#pragma GCC unroll 4
                for (int g = 0; g < 4; ++g) {
                    hi_sum = _mm512_dpbusd_epi32(hi_sum, four((const int8_t *)hi_x + 4 * g), w[g]);
                    lo_sum = _mm512_dpbusd_epi32(lo_sum, four((const int8_t *)lo_x + 4 * g), w[g]);
                }
                hi_total[t] = _mm512_dpwssd_epi32(hi_total[t], hi_sum, scales[half]);
                lo_total[t] = _mm512_dpwssd_epi32(lo_total[t], lo_sum, scales[half]);
            }
        }
    }
    const __m512 d = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)panel));
    for (int t = 0; t < n_x; ++t) {
        _mm512_storeu_ps(s[t], tsffn_q3_nl_finish(hi_total[t], lo_total[t], d, tsffn_u14_scale(x[t])));
    }
}

TSFFN_DEFINE_PANELS_INLINED(q3_nl, avx512vnni)
