// Panels with AVX512-VNNI: one register holds 4 bytes of each of the 16 rows, and VPDPBUSD multiplies unsigned weights
// with four activations of every row at once. The offset that makes the weights unsigned is taken off again:
//   sum_j w_j q_j = sum_j (w_j + offset) q_j - offset * sum_j q_j
// A block of 32 columns takes 16 (Q8_0, Q4_0) multiplications per activation vector, of hi and lo (panels.h), where the
// row kernels of AVX-512 take 16 times eight instructions.
#include "panels.h"

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
