// Panels with AVX2, and with AVX-VNNI when TSFFN_PANELS_AVXVNNI is defined: as panels_avx512.c, a register holding 4
// bytes of 8 rows. Without VNNI the products of unsigned and signed bytes (VPMADDUBSW) are added in 16 bits: nibbles
// of up to 15 do not overflow there, over half a block 8 * 15 * 128 at most in each lane. Whole bytes would, and are
// widened to words instead.
#include "panels.h"

#include <immintrin.h>

#if defined(TSFFN_PANELS_AVXVNNI)
#define NAME(SUFFIX) tsffn_panel_##SUFFIX##_avxvnni
#else
#define NAME(SUFFIX) tsffn_panel_##SUFFIX##_avx2
#endif

static inline __m256i four(const int8_t * x) {
    int32_t bytes;
    __builtin_memcpy(&bytes, x, sizeof(bytes));
    return _mm256_set1_epi32(bytes);
}

// total[half] += d * (products - offset * sum) for the 8 rows of a half.
static inline __m256 add_block(__m256 total, const uint8_t * d, __m256i products, int32_t back) {
    const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)d));
    return _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(_mm256_sub_epi32(products, _mm256_set1_epi32(back))), total);
}

// The products of the low and the high nibbles of rows 8 half .. 8 half + 7 with one activation vector.
static inline __m256i products_q4_0(const uint8_t * q, const int16_t * x, const int8_t * hi, const int8_t * lo) {
    (void)x;
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i hi_sum = _mm256_setzero_si256(), lo_sum = hi_sum;
    for (int g = 0; g < 4; ++g) {
        const __m256i bytes = _mm256_loadu_si256((const __m256i *)(q + g * 64));
        const __m256i low = _mm256_and_si256(bytes, mask);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
#if defined(TSFFN_PANELS_AVXVNNI)
        hi_sum = _mm256_dpbusd_avx_epi32(hi_sum, low, four(hi + 4 * g));
        hi_sum = _mm256_dpbusd_avx_epi32(hi_sum, high, four(hi + 16 + 4 * g));
        lo_sum = _mm256_dpbusd_avx_epi32(lo_sum, low, four(lo + 4 * g));
        lo_sum = _mm256_dpbusd_avx_epi32(lo_sum, high, four(lo + 16 + 4 * g));
    }
#else
        hi_sum = _mm256_add_epi16(hi_sum, _mm256_maddubs_epi16(low, four(hi + 4 * g)));
        hi_sum = _mm256_add_epi16(hi_sum, _mm256_maddubs_epi16(high, four(hi + 16 + 4 * g)));
        lo_sum = _mm256_add_epi16(lo_sum, _mm256_maddubs_epi16(low, four(lo + 4 * g)));
        lo_sum = _mm256_add_epi16(lo_sum, _mm256_maddubs_epi16(high, four(lo + 16 + 4 * g)));
    }
    const __m256i ones = _mm256_set1_epi16(1);
    hi_sum = _mm256_madd_epi16(hi_sum, ones);
    lo_sum = _mm256_madd_epi16(lo_sum, ones);
#endif
    return _mm256_add_epi32(_mm256_slli_epi32(hi_sum, 8), lo_sum);
}

#if defined(TSFFN_PANELS_AVXVNNI)
static inline __m256i products_q8_0(const uint8_t * q, const int16_t * x, const int8_t * hi, const int8_t * lo) {
    (void)x;
    const __m256i offset = _mm256_set1_epi8((char)0x80);
    __m256i hi_sum = _mm256_setzero_si256(), lo_sum = hi_sum;
    for (int g = 0; g < 8; ++g) {
        const __m256i w = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(q + g * 64)), offset);
        hi_sum = _mm256_dpbusd_avx_epi32(hi_sum, w, four(hi + 4 * g));
        lo_sum = _mm256_dpbusd_avx_epi32(lo_sum, w, four(lo + 4 * g));
    }
    return _mm256_add_epi32(_mm256_slli_epi32(hi_sum, 8), lo_sum);
}
enum { OFFSET_Q8_0 = 128 };
#else
// Four rows to a register of words; pairs of sums are added at the end, which leaves rows 0 1 4 5 2 3 6 7.
static inline __m256i products_q8_0(const uint8_t * q, const int16_t * x, const int8_t * hi, const int8_t * lo) {
    (void)hi;
    (void)lo;
    __m256i sum_a = _mm256_setzero_si256(), sum_b = sum_a;
    for (int g = 0; g < 8; ++g) {
        int64_t words;
        __builtin_memcpy(&words, x + 4 * g, sizeof(words));
        const __m256i v = _mm256_set1_epi64x(words);
        const __m256i a = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(q + g * 64)));
        const __m256i b = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(q + g * 64 + 16)));
        sum_a = _mm256_add_epi32(sum_a, _mm256_madd_epi16(a, v));
        sum_b = _mm256_add_epi32(sum_b, _mm256_madd_epi16(b, v));
    }
    return _mm256_permute4x64_epi64(_mm256_hadd_epi32(sum_a, sum_b), 0xd8);
}
enum { OFFSET_Q8_0 = 0 };
#endif
enum { OFFSET_Q4_0 = 8 };

#define DEFINE_PANEL(SUFFIX, BYTES, OFFSET)                                                                            \
    void NAME(SUFFIX)(int64_t n, const void * panel, int n_x, const void * const * x, float (*s)[TSFFN_PANEL_ROWS],    \
                      const struct tsffn_asks * asks) {                                                                \
        const int64_t n_blocks = n / TSFFN_BLOCK_SIZE;                                                                 \
        for (int t = 0; t < n_x; ++t, asks = NULL) {                                                                   \
            const uint8_t * block = panel;                                                                             \
            const int8_t * hi = tsffn_i16_hi(x[t], n);                                                                 \
            const int8_t * lo = tsffn_i16_lo(x[t], n);                                                                 \
            const int32_t * sums = tsffn_i16_sums(x[t], n);                                                            \
            __m256 total_a = _mm256_setzero_ps(), total_b = total_a;                                                   \
            struct tsffn_asking asking = tsffn_asking_begin(asks, n_blocks);                                           \
            for (int64_t b = 0; b < n_blocks; ++b, hi += 32, lo += 32, block += (BYTES)) {                             \
                tsffn_asking_step(&asking);                                                                            \
                const uint8_t * q = block + 2 * TSFFN_PANEL_ROWS;                                                      \
                const int16_t * words = tsffn_i16_values(x[t]) + b * TSFFN_BLOCK_SIZE;                                 \
                const int32_t back = (OFFSET) * sums[b];                                                               \
                total_a = add_block(total_a, block, products_##SUFFIX(q, words, hi, lo), back);                        \
                total_b = add_block(total_b, block + 16, products_##SUFFIX(q + 32, words, hi, lo), back);              \
            }                                                                                                          \
            const __m256 d = _mm256_set1_ps(tsffn_i16_scale(x[t]));                                                    \
            _mm256_storeu_ps(s[t], _mm256_mul_ps(total_a, d));                                                         \
            _mm256_storeu_ps(s[t] + 8, _mm256_mul_ps(total_b, d));                                                     \
        }                                                                                                              \
    }

DEFINE_PANEL(q8_0, TSFFN_PANEL_Q8_0_BYTES, OFFSET_Q8_0)
DEFINE_PANEL(q4_0, TSFFN_PANEL_Q4_0_BYTES, OFFSET_Q4_0)

// Q3_NL, rows 8 half .. 8 half + 7: the activations are the unsigned factor, so no offset is taken off. The sums of 16
// columns fit 16 bits; VPMADDWD (VPDPWSSD) multiplies them with the group's scale.
struct sums {
    __m256i hi, lo;
};

static inline struct sums add_half_block(struct sums total, const __m256i codes[4], __m256i scales, const uint8_t * hi,
                                         const uint8_t * lo) {
    const __m256i levels = _mm256_broadcastsi128_si256(_mm_setr_epi8(TSFFN_Q3_NL_LEVELS));
    __m256i hi_sum = _mm256_setzero_si256(), lo_sum = hi_sum;
    for (int g = 0; g < 4; ++g) {
        const __m256i w = _mm256_shuffle_epi8(levels, codes[g]);
        const __m256i hi_x = four((const int8_t *)hi + 4 * g), lo_x = four((const int8_t *)lo + 4 * g);
#if defined(TSFFN_PANELS_AVXVNNI)
        hi_sum = _mm256_dpbusd_avx_epi32(hi_sum, hi_x, w);
        lo_sum = _mm256_dpbusd_avx_epi32(lo_sum, lo_x, w);
    }
    // Nothing but the sign in the high word of a sum, and nothing in that of a scale.
    const __m256i low_words = _mm256_set1_epi32(0xffff);
    scales = _mm256_and_si256(scales, low_words);
    return (struct sums){_mm256_dpwssd_avx_epi32(total.hi, hi_sum, scales),
                         _mm256_dpwssd_avx_epi32(total.lo, lo_sum, scales)};
#else
        hi_sum = _mm256_add_epi16(hi_sum, _mm256_maddubs_epi16(hi_x, w));
        lo_sum = _mm256_add_epi16(lo_sum, _mm256_maddubs_epi16(lo_x, w));
    }
    return (struct sums){_mm256_add_epi32(total.hi, _mm256_madd_epi16(hi_sum, scales)),
                         _mm256_add_epi32(total.lo, _mm256_madd_epi16(lo_sum, scales))};
#endif
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

void NAME(q3_nl)(int64_t n, const void * panel, int n_x, const void * const * x, float (*s)[TSFFN_PANEL_ROWS],
                 const struct tsffn_asks * asks) {
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
