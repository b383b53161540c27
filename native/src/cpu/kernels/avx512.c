// AVX-512 F, BW, DQ, VL. Tails are masked, so no scalar loop is needed for the float formats.
#include "half.h"
#include "quads_avx512.h"
#include "templates.h"
#include "tiers.h"

#include <immintrin.h>

#define KERNEL(name) tsffn_##name##_avx512

static inline __m512 load16_f32(__mmask16 m, const float * w) {
    return _mm512_maskz_loadu_ps(m, w);
}
static inline __m512 load16_f16(__mmask16 m, const uint16_t * w) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, w));
}
static inline __m512 load16_bf16(__mmask16 m, const uint16_t * w) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, w)), 16));
}

#define ALL ((__mmask16)0xffff)
#define TAIL(count) ((__mmask16)((1u << (count)) - 1u))

// dots and axpys of an element type: TYPE is the storage type, LOAD16 widens 16 of them under a mask. Four accumulators
// for each vector.
#define DEFINE_FLOAT_KERNELS(SUFFIX, TYPE, LOAD16)                                                                     \
    TSFFN_INLINED void dots_of_##SUFFIX(int64_t n, const void * row, int n_x, const void * const * activations,        \
                                        float * s, const struct tsffn_asks * asks) {                                   \
        struct tsffn_asking asking = tsffn_asking_begin(asks, n / 64);                                                 \
        const TYPE * w = row;                                                                                          \
        const float * x[4];                                                                                            \
        __m512 sums[4][4];                                                                                             \
        for (int t = 0; t < n_x; ++t) {                                                                                \
            x[t] = activations[t];                                                                                     \
            sums[t][0] = sums[t][1] = sums[t][2] = sums[t][3] = _mm512_setzero_ps();                                   \
        }                                                                                                              \
        int64_t j = 0;                                                                                                 \
        for (; j + 64 <= n; j += 64) {                                                                                 \
            tsffn_asking_step(&asking);                                                                                \
            for (int k = 0; k < 4; ++k) {                                                                              \
                const __m512 v = LOAD16(ALL, w + j + 16 * k);                                                          \
                for (int t = 0; t < n_x; ++t) {                                                                        \
                    sums[t][k] = _mm512_fmadd_ps(v, _mm512_loadu_ps(x[t] + j + 16 * k), sums[t][k]);                   \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        for (; j + 16 <= n; j += 16) {                                                                                 \
            for (int t = 0; t < n_x; ++t) {                                                                            \
                sums[t][0] = _mm512_fmadd_ps(LOAD16(ALL, w + j), _mm512_loadu_ps(x[t] + j), sums[t][0]);               \
            }                                                                                                          \
        }                                                                                                              \
        if (j < n) {                                                                                                   \
            const __mmask16 m = TAIL(n - j);                                                                           \
            for (int t = 0; t < n_x; ++t) {                                                                            \
                sums[t][1] = _mm512_fmadd_ps(LOAD16(m, w + j), _mm512_maskz_loadu_ps(m, x[t] + j), sums[t][1]);        \
            }                                                                                                          \
        }                                                                                                              \
        for (int t = 0; t < n_x; ++t) {                                                                                \
            s[t] = _mm512_reduce_add_ps(                                                                               \
                _mm512_add_ps(_mm512_add_ps(sums[t][0], sums[t][1]), _mm512_add_ps(sums[t][2], sums[t][3])));          \
        }                                                                                                              \
    }                                                                                                                  \
    TSFFN_DEFINE_DOTS(KERNEL(dots_##SUFFIX), 4, dots_of_##SUFFIX)                                                      \
    TSFFN_INLINED void axpys_of_##SUFFIX(int64_t n, int n_rows, const float * a, const void * const * rows, float * y, \
                                         struct tsffn_asking * asking) {                                               \
        int64_t j = 0;                                                                                                 \
        for (; j + 16 <= n; j += 16) {                                                                                 \
            if (j % 64 == 0) {                                                                                         \
                tsffn_asking_step(asking);                                                                             \
            }                                                                                                          \
            __m512 sum = _mm512_loadu_ps(y + j);                                                                       \
            for (int i = 0; i < n_rows; ++i) {                                                                         \
                sum = _mm512_fmadd_ps(_mm512_set1_ps(a[i]), LOAD16(ALL, (const TYPE *)rows[i] + j), sum);              \
            }                                                                                                          \
            _mm512_storeu_ps(y + j, sum);                                                                              \
        }                                                                                                              \
        if (j < n) {                                                                                                   \
            const __mmask16 m = TAIL(n - j);                                                                           \
            __m512 sum = _mm512_maskz_loadu_ps(m, y + j);                                                              \
            for (int i = 0; i < n_rows; ++i) {                                                                         \
                sum = _mm512_fmadd_ps(_mm512_set1_ps(a[i]), LOAD16(m, (const TYPE *)rows[i] + j), sum);                \
            }                                                                                                          \
            _mm512_mask_storeu_ps(y + j, m, sum);                                                                      \
        }                                                                                                              \
    }                                                                                                                  \
    TSFFN_DEFINE_AXPYS(KERNEL(axpys_##SUFFIX), (n + 63) / 64, axpys_of_##SUFFIX)
DEFINE_FLOAT_KERNELS(f32, float, load16_f32)
DEFINE_FLOAT_KERNELS(f16, uint16_t, load16_f16)
DEFINE_FLOAT_KERNELS(bf16, uint16_t, load16_bf16)

// Sixteen int32 sums of the products of the 32 weights of a block with x[0..32).
static inline __m512 products_q8_0(const uint8_t * block, const int16_t * x) {
    const __m512i w = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(block + 2)));
    return _mm512_cvtepi32_ps(_mm512_madd_epi16(w, _mm512_loadu_si512(x)));
}

static inline __m512 products_q4_0(const uint8_t * block, const int16_t * x) {
    const __m256i q = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(block + 2)));
    // The upper half of the copies moves its high nibbles down: bytes 0..15 hold weights 0..15, bytes 16..31 the
    // others.
    const __m256i shifted = _mm256_srlv_epi64(q, _mm256_setr_epi64x(0, 0, 4, 4));
    const __m256i nibbles = _mm256_and_si256(shifted, _mm256_set1_epi8(15));
    const __m512i w = _mm512_cvtepi8_epi16(_mm256_sub_epi8(nibbles, _mm256_set1_epi8(8)));
    return _mm512_cvtepi32_ps(_mm512_madd_epi16(w, _mm512_loadu_si512(x)));
}

// sums += d * w of a block's weights
static inline void add_block_q8_0(__m512 d, const uint8_t * q, __m512 * sums) {
    for (int half = 0; half < 2; ++half) {
        const __m128i bytes = _mm_loadu_si128((const __m128i *)(q + 16 * half));
        sums[half] = _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), sums[half]);
    }
}

// The values of a nibble, by the nibble: VPERMPS looks at the low four bits of an index only, and saves masking,
// subtracting and converting.
static inline __m512 nibble_values(void) {
    return _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
}

static inline void add_block_q4_0(__m512 d, const uint8_t * nibbles, __m512 * sums) {
    const __m512i q = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)nibbles));
    sums[0] = _mm512_fmadd_ps(d, _mm512_permutexvar_ps(q, nibble_values()), sums[0]);
    sums[1] = _mm512_fmadd_ps(d, _mm512_permutexvar_ps(_mm512_srli_epi32(q, 4), nibble_values()), sums[1]);
}

static inline void unpack_block_q8_0(const uint8_t * q, float * w) {
    for (int half = 0; half < 2; ++half) {
        const __m128i bytes = _mm_loadu_si128((const __m128i *)(q + 16 * half));
        _mm512_storeu_ps(w + 16 * half, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
    }
}

static inline void unpack_block_q4_0(const uint8_t * nibbles, float * w) {
    const __m512i q = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)nibbles));
    _mm512_storeu_ps(w, _mm512_permutexvar_ps(q, nibble_values()));
    _mm512_storeu_ps(w + 16, _mm512_permutexvar_ps(_mm512_srli_epi32(q, 4), nibble_values()));
}

#define widen_f32(w) load16_f32(ALL, w)
#define widen_f16(w) load16_f16(ALL, w)
#define widen_bf16(w) load16_bf16(ALL, w)
#define VEC_LANES 16
typedef __m512 vec;
#define vec_load _mm512_loadu_ps
#define vec_store _mm512_storeu_ps
#define vec_mul _mm512_mul_ps
#define vec_zero _mm512_setzero_ps
#define vec_set1 _mm512_set1_ps
#define vec_fmadd _mm512_fmadd_ps
#define vec_add _mm512_add_ps
#define vec_sum _mm512_reduce_add_ps
#include "add_rows_x86.h"
#include "blocks_x86.h"

DEFINE_BLOCK_SCALES(few_scales_q4_0, TSFFN_Q4_0_BYTES)

// The scales of 16 blocks are made together and broadcast by loads: the ports of the shuffles are what bounds this.
static inline void scales_q4_0(int64_t n, float a, const uint8_t * block, float * scales) {
    if (n == SCALES) {
        _mm512_storeu_ps(scales, _mm512_mul_ps(_mm512_set1_ps(a), scales_of_quads(block, TSFFN_Q4_0_QUADS)));
    } else {
        few_scales_q4_0(n, a, block, scales);
    }
}
_Static_assert((int)SCALES == 4 * (int)TSFFN_Q4_0_QUADS, "quads have as many scales");
DEFINE_BLOCK_AXPYS(q4_0, TSFFN_Q4_0_BYTES)

const struct tsffn_kernels tsffn_kernels_avx512 = {
    .isa = TSFFN_ISA_AVX512,
    .name = "avx512",
    .dots =
        {
            [TSFFN_FORMAT_F32] = tsffn_dots_f32_avx512,
            [TSFFN_FORMAT_F16] = tsffn_dots_f16_avx512,
            [TSFFN_FORMAT_BF16] = tsffn_dots_bf16_avx512,
            [TSFFN_FORMAT_Q8_0] = tsffn_dots_q8_0_avx512,
            [TSFFN_FORMAT_Q4_0] = tsffn_dots_q4_0_avx512,
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
            [TSFFN_FORMAT_Q8_0] = tsffn_panel_q8_0_avx2,
            [TSFFN_FORMAT_Q4_0] = tsffn_panel_q4_0_avx2,
            [TSFFN_FORMAT_Q3_NL] = tsffn_panel_q3_nl_avx2,
        },
};
