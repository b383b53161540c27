// AVX-512 F, BW, DQ, VL. Tails are masked, so no scalar loop is needed for the float formats.
#include "half.h"
#include "quads_avx512.h"
#include "templates.h"
#include "tiers.h"

#include <immintrin.h>

#define ALL ((__mmask16)0xffff)
#define TAIL(count) ((__mmask16)((1u << (count)) - 1u))

// Sixteen weights of a row from column j on, those of the mask.
typedef __m512 load_sixteen(__mmask16 m, const void * row, int64_t j);

static inline __m512 load_f32(__mmask16 m, const void * row, int64_t j) {
    return _mm512_maskz_loadu_ps(m, (const float *)row + j);
}
static inline __m512 load_f16(__mmask16 m, const void * row, int64_t j) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, (const uint16_t *)row + j));
}
static inline __m512 load_bf16(__mmask16 m, const void * row, int64_t j) {
    const __m256i w = _mm256_maskz_loadu_epi16(m, (const uint16_t *)row + j);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(w), 16));
}
static inline __m512 widen_f32(const void * row, int64_t j) {
    return load_f32(ALL, row, j);
}
static inline __m512 widen_f16(const void * row, int64_t j) {
    return load_f16(ALL, row, j);
}
static inline __m512 widen_bf16(const void * row, int64_t j) {
    return load_bf16(ALL, row, j);
}

// Four accumulators for each vector.
TSFFN_INLINED void dots_of_floats(load_sixteen * load, int64_t n, const void * row, int n_x,
                                  const void * const * activations, float * s, const struct tsffn_asks * asks) {
    struct tsffn_asking asking = tsffn_asking_begin(asks, n / 64);
    const float * x[4];
    __m512 sums[4][4];
    for (int t = 0; t < n_x; ++t) {
        x[t] = activations[t];
        sums[t][0] = sums[t][1] = sums[t][2] = sums[t][3] = _mm512_setzero_ps();
    }
    int64_t j = 0;
    for (; j + 64 <= n; j += 64) {
        tsffn_asking_step(&asking);
        for (int k = 0; k < 4; ++k) {
            const __m512 v = load(ALL, row, j + 16 * k);
            for (int t = 0; t < n_x; ++t) {
                sums[t][k] = _mm512_fmadd_ps(v, _mm512_loadu_ps(x[t] + j + 16 * k), sums[t][k]);
            }
        }
    }
    for (; j + 16 <= n; j += 16) {
        for (int t = 0; t < n_x; ++t) {
            sums[t][0] = _mm512_fmadd_ps(load(ALL, row, j), _mm512_loadu_ps(x[t] + j), sums[t][0]);
        }
    }
    if (j < n) {
        const __mmask16 m = TAIL(n - j);
        for (int t = 0; t < n_x; ++t) {
            sums[t][1] = _mm512_fmadd_ps(load(m, row, j), _mm512_maskz_loadu_ps(m, x[t] + j), sums[t][1]);
        }
    }
    for (int t = 0; t < n_x; ++t) {
        s[t] = _mm512_reduce_add_ps(
            _mm512_add_ps(_mm512_add_ps(sums[t][0], sums[t][1]), _mm512_add_ps(sums[t][2], sums[t][3])));
    }
}

TSFFN_INLINED void axpys_of_floats(load_sixteen * load, int64_t n, int n_rows, const float * a,
                                   const void * const * rows, float * y, struct tsffn_asking * asking) {
    int64_t j = 0;
    for (; j + 16 <= n; j += 16) {
        if (j % 64 == 0) {
            tsffn_asking_step(asking);
        }
        __m512 sum = _mm512_loadu_ps(y + j);
        for (int i = 0; i < n_rows; ++i) {
            sum = _mm512_fmadd_ps(_mm512_set1_ps(a[i]), load(ALL, rows[i], j), sum);
        }
        _mm512_storeu_ps(y + j, sum);
    }
    if (j < n) {
        const __mmask16 m = TAIL(n - j);
        __m512 sum = _mm512_maskz_loadu_ps(m, y + j);
        for (int i = 0; i < n_rows; ++i) {
            sum = _mm512_fmadd_ps(_mm512_set1_ps(a[i]), load(m, rows[i], j), sum);
        }
        _mm512_mask_storeu_ps(y + j, m, sum);
    }
}

TSFFN_INLINED void dots_of_f32(int64_t n, const void * row, int n_x, const void * const * x, float * s,
                               const struct tsffn_asks * asks) {
    dots_of_floats(load_f32, n, row, n_x, x, s, asks);
}

TSFFN_INLINED void dots_of_f16(int64_t n, const void * row, int n_x, const void * const * x, float * s,
                               const struct tsffn_asks * asks) {
    dots_of_floats(load_f16, n, row, n_x, x, s, asks);
}

TSFFN_INLINED void dots_of_bf16(int64_t n, const void * row, int n_x, const void * const * x, float * s,
                                const struct tsffn_asks * asks) {
    dots_of_floats(load_bf16, n, row, n_x, x, s, asks);
}

TSFFN_INLINED void axpys_of_f32(int64_t n, int n_rows, const float * a, const void * const * rows, float * y,
                                struct tsffn_asking * asking) {
    axpys_of_floats(load_f32, n, n_rows, a, rows, y, asking);
}

TSFFN_INLINED void axpys_of_f16(int64_t n, int n_rows, const float * a, const void * const * rows, float * y,
                                struct tsffn_asking * asking) {
    axpys_of_floats(load_f16, n, n_rows, a, rows, y, asking);
}

TSFFN_INLINED void axpys_of_bf16(int64_t n, int n_rows, const float * a, const void * const * rows, float * y,
                                 struct tsffn_asking * asking) {
    axpys_of_floats(load_bf16, n, n_rows, a, rows, y, asking);
}

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

// The scales of 16 blocks are made together and broadcast by loads: the ports of the shuffles are what bounds this.
static inline void scales_q4_0(int64_t n, float a, const uint8_t * block, float * scales) {
    if (n == SCALES) {
        _mm512_storeu_ps(scales, _mm512_mul_ps(_mm512_set1_ps(a), scales_of_quads(block, TSFFN_Q4_0_QUADS)));
    } else {
        scales_of_blocks(TSFFN_Q4_0_BYTES, n, a, block, scales);
    }
}
_Static_assert((int)SCALES == 4 * (int)TSFFN_Q4_0_QUADS, "quads have as many scales");

TSFFN_INLINED void axpys_of_q4_0(int64_t n, int n_rows, const float * a, const void * const * rows, float * y,
                                 struct tsffn_asking * asking) {
    axpys_of_blocks(add_block_q4_0, scales_q4_0, TSFFN_Q4_0_BYTES, n, n_rows, a, rows, y, asking);
}

// ---- rows

TSFFN_DEFINE_DOTS(tsffn_dots_f32_avx512, 4, dots_of_f32)
TSFFN_DEFINE_DOTS(tsffn_dots_f16_avx512, 4, dots_of_f16)
TSFFN_DEFINE_DOTS(tsffn_dots_bf16_avx512, 4, dots_of_bf16)
TSFFN_DEFINE_DOTS(tsffn_dots_q8_0_avx512, 4, dots_of_q8_0)
TSFFN_DEFINE_DOTS(tsffn_dots_q4_0_avx512, 4, dots_of_q4_0)
TSFFN_DEFINE_AXPYS(tsffn_axpys_f32_avx512, (n + 63) / 64, axpys_of_f32)
TSFFN_DEFINE_AXPYS(tsffn_axpys_f16_avx512, (n + 63) / 64, axpys_of_f16)
TSFFN_DEFINE_AXPYS(tsffn_axpys_bf16_avx512, (n + 63) / 64, axpys_of_bf16)
TSFFN_DEFINE_AXPYS(tsffn_axpys_q8_0_avx512, ASKS_OF_BLOCKS, axpys_of_q8_0)
TSFFN_DEFINE_AXPYS(tsffn_axpys_q4_0_avx512, ASKS_OF_BLOCKS, axpys_of_q4_0)

void tsffn_add_rows_f32_avx512(const struct tsffn_additions * additions, int64_t c0) {
    add_rows_of(unpack_f32, false, additions, c0);
}

void tsffn_add_rows_f16_avx512(const struct tsffn_additions * additions, int64_t c0) {
    add_rows_of(unpack_f16, false, additions, c0);
}

void tsffn_add_rows_bf16_avx512(const struct tsffn_additions * additions, int64_t c0) {
    add_rows_of(unpack_bf16, false, additions, c0);
}

void tsffn_add_rows_q8_0_avx512(const struct tsffn_additions * additions, int64_t c0) {
    add_rows_of(unpack_q8_0, true, additions, c0);
}

void tsffn_add_rows_q4_0_avx512(const struct tsffn_additions * additions, int64_t c0) {
    add_rows_of(unpack_q4_0, true, additions, c0);
}

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
            [TSFFN_FORMAT_BITS1] = tsffn_panel_bits1_avx2,
            [TSFFN_FORMAT_BITS2] = tsffn_panel_bits2_avx2,
        },
};
