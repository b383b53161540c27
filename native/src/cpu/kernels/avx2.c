// AVX2 + FMA + F16C. Four accumulators hide the FMA latency (4 cycles at 2 per cycle would want 8; memory is the
// bound).
#include "half.h"
#include "panels.h"
#include "templates.h"
#include "tiers.h"

#include <immintrin.h>

static inline float hsum(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    s = _mm_add_ss(s, _mm_movehdup_ps(s));
    return _mm_cvtss_f32(s);
}

// Eight weights of a row from column j on, and a single one.
typedef __m256 load_eight(const void * row, int64_t j);
typedef float load_one(const void * row, int64_t j);

static inline __m256 widen_f32(const void * row, int64_t j) {
    return _mm256_loadu_ps((const float *)row + j);
}
static inline __m256 widen_f16(const void * row, int64_t j) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)row + j)));
}
static inline __m256 widen_bf16(const void * row, int64_t j) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)((const uint16_t *)row + j)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline float one_f32(const void * row, int64_t j) {
    return ((const float *)row)[j];
}
static inline float one_f16(const void * row, int64_t j) {
    return tsffn_f16_to_f32(((const uint16_t *)row)[j]);
}
static inline float one_bf16(const void * row, int64_t j) {
    return tsffn_bf16_to_f32(((const uint16_t *)row)[j]);
}

TSFFN_INLINED float dot_of_floats(load_eight * load, load_one * one, int64_t n, const void * row, const float * x,
                                  const struct tsffn_asks * asks) {
    struct tsffn_asking asking = tsffn_asking_begin(asks, n / 32);
    __m256 s0 = _mm256_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
    int64_t j = 0;
    for (; j + 32 <= n; j += 32) {
        tsffn_asking_step(&asking);
        s0 = _mm256_fmadd_ps(load(row, j), _mm256_loadu_ps(x + j), s0);
        s1 = _mm256_fmadd_ps(load(row, j + 8), _mm256_loadu_ps(x + j + 8), s1);
        s2 = _mm256_fmadd_ps(load(row, j + 16), _mm256_loadu_ps(x + j + 16), s2);
        s3 = _mm256_fmadd_ps(load(row, j + 24), _mm256_loadu_ps(x + j + 24), s3);
    }
    for (; j + 8 <= n; j += 8) {
        s0 = _mm256_fmadd_ps(load(row, j), _mm256_loadu_ps(x + j), s0);
    }
    float sum = hsum(_mm256_add_ps(_mm256_add_ps(s0, s1), _mm256_add_ps(s2, s3)));
    for (; j < n; ++j) {
        sum += one(row, j) * x[j];
    }
    return sum;
}

// The four accumulators of one vector leave no registers for those of another.
TSFFN_INLINED void dots_of_floats(load_eight * load, load_one * one, int64_t n, const void * row, int n_x,
                                  const void * const * x, float * s, const struct tsffn_asks * asks) {
    for (int t = 0; t < n_x; ++t) {
        s[t] = dot_of_floats(load, one, n, row, x[t], t == 0 ? asks : NULL);
    }
}

TSFFN_INLINED void axpys_of_floats(load_eight * load, load_one * one, int64_t n, int n_rows, const float * a,
                                   const void * const * rows, float * y, struct tsffn_asking * asking) {
    int64_t j = 0;
    for (; j + 8 <= n; j += 8) {
        if (j % 32 == 0) {
            tsffn_asking_step(asking);
        }
        __m256 sum = _mm256_loadu_ps(y + j);
        for (int i = 0; i < n_rows; ++i) {
            sum = _mm256_fmadd_ps(_mm256_set1_ps(a[i]), load(rows[i], j), sum);
        }
        _mm256_storeu_ps(y + j, sum);
    }
    for (; j < n; ++j) {
        for (int i = 0; i < n_rows; ++i) {
            y[j] += a[i] * one(rows[i], j);
        }
    }
}

TSFFN_INLINED void axpys_of_f32(int64_t n, int n_rows, const float * a, const void * const * rows, float * y,
                                struct tsffn_asking * asking) {
    axpys_of_floats(widen_f32, one_f32, n, n_rows, a, rows, y, asking);
}

TSFFN_INLINED void axpys_of_f16(int64_t n, int n_rows, const float * a, const void * const * rows, float * y,
                                struct tsffn_asking * asking) {
    axpys_of_floats(widen_f16, one_f16, n, n_rows, a, rows, y, asking);
}

TSFFN_INLINED void axpys_of_bf16(int64_t n, int n_rows, const float * a, const void * const * rows, float * y,
                                 struct tsffn_asking * asking) {
    axpys_of_floats(widen_bf16, one_bf16, n, n_rows, a, rows, y, asking);
}

// Eight int32 sums of the products of 32 weights, as two vectors of 16-bit integers, with x[0..32).
static inline __m256 products32(__m256i w_low, __m256i w_high, const int16_t * x) {
    const __m256i low = _mm256_madd_epi16(w_low, _mm256_loadu_si256((const __m256i *)x));
    const __m256i high = _mm256_madd_epi16(w_high, _mm256_loadu_si256((const __m256i *)(x + 16)));
    return _mm256_cvtepi32_ps(_mm256_add_epi32(low, high));
}

static inline __m256 products_q8_0(const uint8_t * block, const int16_t * x) {
    const __m256i low = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(block + 2)));
    const __m256i high = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(block + 18)));
    return products32(low, high, x);
}

static inline __m256 products_q4_0(const uint8_t * block, const int16_t * x) {
    const __m256i eight = _mm256_set1_epi16(8);
    const __m256i q = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(block + 2)));
    const __m256i low = _mm256_sub_epi16(_mm256_and_si256(q, _mm256_set1_epi16(15)), eight);
    const __m256i high = _mm256_sub_epi16(_mm256_srli_epi16(q, 4), eight);
    return products32(low, high, x);
}

// sums[0..2) += d * q[0..16), the bytes of q taken as signed.
static inline void add16_i8(__m256 d, __m128i q, __m256 * sums) {
    sums[0] = _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q)), sums[0]);
    sums[1] = _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(q, 8))), sums[1]);
}

static inline void add_block_q8_0(__m256 d, const uint8_t * q, __m256 * sums) {
    add16_i8(d, _mm_loadu_si128((const __m128i *)q), sums);
    add16_i8(d, _mm_loadu_si128((const __m128i *)(q + 16)), sums + 2);
}

static inline void add_block_q4_0(__m256 d, const uint8_t * nibbles, __m256 * sums) {
    const __m128i mask = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
    const __m128i q = _mm_loadu_si128((const __m128i *)nibbles);
    add16_i8(d, _mm_sub_epi8(_mm_and_si128(q, mask), eight), sums);
    add16_i8(d, _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(q, 4), mask), eight), sums + 2);
}

static inline void unpack16_i8(__m128i q, float * w) {
    _mm256_storeu_ps(w, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q)));
    _mm256_storeu_ps(w + 8, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(q, 8))));
}

static inline void unpack_block_q8_0(const uint8_t * q, float * w) {
    unpack16_i8(_mm_loadu_si128((const __m128i *)q), w);
    unpack16_i8(_mm_loadu_si128((const __m128i *)(q + 16)), w + 16);
}

static inline void unpack_block_q4_0(const uint8_t * nibbles, float * w) {
    const __m128i mask = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
    const __m128i q = _mm_loadu_si128((const __m128i *)nibbles);
    unpack16_i8(_mm_sub_epi8(_mm_and_si128(q, mask), eight), w);
    unpack16_i8(_mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(q, 4), mask), eight), w + 16);
}

#define VEC_LANES 8
typedef __m256 vec;
#define vec_load _mm256_loadu_ps
#define vec_store _mm256_storeu_ps
#define vec_mul _mm256_mul_ps
#define vec_zero _mm256_setzero_ps
#define vec_set1 _mm256_set1_ps
#define vec_fmadd _mm256_fmadd_ps
#define vec_add _mm256_add_ps
#define vec_sum hsum
#include "add_rows_x86.h"
#include "blocks_x86.h"

static inline void scales_q4_0(int64_t n, float a, const uint8_t * block, float * scales) {
    scales_of_blocks(TSFFN_Q4_0_BYTES, n, a, block, scales);
}

TSFFN_INLINED void axpys_of_q4_0(int64_t n, int n_rows, const float * a, const void * const * rows, float * y,
                                 struct tsffn_asking * asking) {
    axpys_of_blocks(add_block_q4_0, scales_q4_0, TSFFN_Q4_0_BYTES, n, n_rows, a, rows, y, asking);
}

// ---- rows

void tsffn_dots_f32_avx2(int64_t n, const void * row, int n_x, const void * const * x, float * s,
                         const struct tsffn_asks * asks) {
    dots_of_floats(widen_f32, one_f32, n, row, n_x, x, s, asks);
}

void tsffn_dots_f16_avx2(int64_t n, const void * row, int n_x, const void * const * x, float * s,
                         const struct tsffn_asks * asks) {
    dots_of_floats(widen_f16, one_f16, n, row, n_x, x, s, asks);
}

void tsffn_dots_bf16_avx2(int64_t n, const void * row, int n_x, const void * const * x, float * s,
                          const struct tsffn_asks * asks) {
    dots_of_floats(widen_bf16, one_bf16, n, row, n_x, x, s, asks);
}

TSFFN_DEFINE_DOTS(tsffn_dots_q8_0_avx2, 4, dots_of_q8_0)
TSFFN_DEFINE_DOTS(tsffn_dots_q4_0_avx2, 4, dots_of_q4_0)
TSFFN_DEFINE_AXPYS(tsffn_axpys_f32_avx2, (n + 31) / 32, axpys_of_f32)
TSFFN_DEFINE_AXPYS(tsffn_axpys_f16_avx2, (n + 31) / 32, axpys_of_f16)
TSFFN_DEFINE_AXPYS(tsffn_axpys_bf16_avx2, (n + 31) / 32, axpys_of_bf16)
TSFFN_DEFINE_AXPYS(tsffn_axpys_q8_0_avx2, ASKS_OF_BLOCKS, axpys_of_q8_0)
TSFFN_DEFINE_AXPYS(tsffn_axpys_q4_0_avx2, ASKS_OF_BLOCKS, axpys_of_q4_0)

void tsffn_add_rows_f32_avx2(const struct tsffn_additions * additions, int64_t c0) {
    add_rows_of(unpack_f32, false, additions, c0);
}

void tsffn_add_rows_f16_avx2(const struct tsffn_additions * additions, int64_t c0) {
    add_rows_of(unpack_f16, false, additions, c0);
}

void tsffn_add_rows_bf16_avx2(const struct tsffn_additions * additions, int64_t c0) {
    add_rows_of(unpack_bf16, false, additions, c0);
}

void tsffn_add_rows_q8_0_avx2(const struct tsffn_additions * additions, int64_t c0) {
    add_rows_of(unpack_q8_0, true, additions, c0);
}

void tsffn_add_rows_q4_0_avx2(const struct tsffn_additions * additions, int64_t c0) {
    add_rows_of(unpack_q4_0, true, additions, c0);
}

// ---- panels

// Products of unsigned and signed bytes (VPMADDUBSW) are added in 16 bits, two to a sum. Over half a block nibbles do
// not overflow there: 8 * 15 * 128 at most in each lane.
static inline __m256i add_products(__m256i sum, __m256i unsigned_bytes, __m256i signed_bytes) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(unsigned_bytes, signed_bytes));
}

// Such sums in 32 bits, four products each.
static inline __m256i wide_sums(__m256i sum) {
    return _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
}

// total += wide_sums(sum) * scale; a scale is in both words of its 32 bits.
static inline __m256i add_scaled(__m256i total, __m256i sum, __m256i scales) {
    return _mm256_add_epi32(total, _mm256_madd_epi16(sum, scales));
}

#include "panels_x86.h"

// panel_products of Q8_0. Whole bytes would overflow 16 bits: they are widened to words. Four rows to a register; pairs
// of sums are added at the end, which leaves rows 0 1 4 5 2 3 6 7.
static inline __m256i products_of_bytes(const uint8_t * q, const int16_t * words, const int8_t * hi,
                                        const int8_t * lo) {
    (void)hi;
    (void)lo;
    __m256i sum_a = _mm256_setzero_si256(), sum_b = sum_a;
    for (int g = 0; g < 8; ++g) {
        int64_t four_words;
        __builtin_memcpy(&four_words, words + 4 * g, sizeof(four_words));
        const __m256i v = _mm256_set1_epi64x(four_words);
        const __m256i a = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(q + g * 64)));
        const __m256i b = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(q + g * 64 + 16)));
        sum_a = _mm256_add_epi32(sum_a, _mm256_madd_epi16(a, v));
        sum_b = _mm256_add_epi32(sum_b, _mm256_madd_epi16(b, v));
    }
    return _mm256_permute4x64_epi64(_mm256_hadd_epi32(sum_a, sum_b), 0xd8);
}

void tsffn_panel_q8_0_avx2(int64_t n, const void * panel, int n_x, const void * const * x, float (*s)[TSFFN_PANEL_ROWS],
                           const struct tsffn_asks * asks) {
    panel_of_blocks(products_of_bytes, TSFFN_PANEL_Q8_0_BYTES, 0, n, panel, n_x, x, s, asks);
}

void tsffn_panel_q4_0_avx2(int64_t n, const void * panel, int n_x, const void * const * x, float (*s)[TSFFN_PANEL_ROWS],
                           const struct tsffn_asks * asks) {
    panel_of_blocks(products_of_nibbles, TSFFN_PANEL_Q4_0_BYTES, 8, n, panel, n_x, x, s, asks);
}

void tsffn_panel_q3_nl_avx2(int64_t n, const void * panel, int n_x, const void * const * x,
                            float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks) {
    panel_of_q3_nl(n, panel, n_x, x, s, asks);
}

// BITS1, BITS2: set bits of each nibble from a table, of a lane's four bytes added in 16 bits, whose 8 bits of
// activations are at most 255 * 16.
static inline __m256i count_bits(__m256i v) {
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, //
                                           0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(v, nibble));
    const __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble));
    return _mm256_maddubs_epi16(_mm256_add_epi8(low, high), _mm256_set1_epi8(1));
}

// sum_l 2^l popcount(w xor planes[l]) of eight rows, in 32 bits.
TSFFN_INLINED __m256i differing(__m256i w, const uint32_t * planes, int n_planes) {
    __m256i sum = _mm256_setzero_si256();
    for (int l = n_planes - 1; l >= 0; --l) {
        const __m256i differ = _mm256_xor_si256(w, _mm256_set1_epi32((int)planes[l]));
        sum = _mm256_add_epi16(_mm256_add_epi16(sum, sum), count_bits(differ));
    }
    return _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
}

TSFFN_INLINED void panel_of_planes(int n_bits, int n_planes, int64_t n, const uint8_t * panel, const void * x,
                                   float * s, const struct tsffn_asks * asks) {
    const uint32_t * planes = tsffn_bits_words(x);
    const int64_t n_blocks = n / TSFFN_BLOCK_SIZE;
    struct tsffn_asking asking = tsffn_asking_begin(asks, n_blocks);
    __m256i sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int64_t b = 0; b < n_blocks; ++b, planes += n_planes) {
        tsffn_asking_step(&asking);
        for (int k = 0; k < n_bits; ++k, panel += TSFFN_PANEL_ROWS * sizeof(uint32_t)) {
            for (int half = 0; half < 2; ++half) {
                const __m256i w = _mm256_loadu_si256((const __m256i *)panel + half);
                const __m256i differ = differing(w, planes, n_planes);
                sums[half] = _mm256_add_epi32(sums[half], _mm256_slli_epi32(differ, k));
            }
        }
    }
    const __m256i most = _mm256_set1_epi32(tsffn_bits_most(n_bits, n_planes, n));
    for (int half = 0; half < 2; ++half) {
        const __m256i sum = _mm256_sub_epi32(most, _mm256_slli_epi32(sums[half], 1));
        _mm256_storeu_ps(s + 8 * half, _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(tsffn_bits_scale(x))));
    }
}

// One vector after the other: a panel stays in the cache.
TSFFN_INLINED void panel_of_bits(int n_bits, int64_t n, const uint8_t * panel, int n_x, const void * const * x,
                                 float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks) {
    for (int t = 0; t < n_x; ++t, asks = NULL) {
        if (tsffn_bits_planes(x[t]) == 1) {
            panel_of_planes(n_bits, 1, n, panel, x[t], s[t], asks);
        } else {
            panel_of_planes(n_bits, tsffn_bits_planes(x[t]), n, panel, x[t], s[t], asks);
        }
    }
}

void tsffn_panel_bits1_avx2(int64_t n, const void * panel, int n_x, const void * const * x,
                            float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks) {
    panel_of_bits(1, n, panel, n_x, x, s, asks);
}

void tsffn_panel_bits2_avx2(int64_t n, const void * panel, int n_x, const void * const * x,
                            float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks) {
    panel_of_bits(2, n, panel, n_x, x, s, asks);
}

const struct tsffn_kernels tsffn_kernels_avx2 = {
    .isa = TSFFN_ISA_AVX2,
    .name = "avx2",
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
            [TSFFN_FORMAT_Q8_0] = tsffn_panel_q8_0_avx2,
            [TSFFN_FORMAT_Q4_0] = tsffn_panel_q4_0_avx2,
            [TSFFN_FORMAT_Q3_NL] = tsffn_panel_q3_nl_avx2,
            [TSFFN_FORMAT_BITS1] = tsffn_panel_bits1_avx2,
            [TSFFN_FORMAT_BITS2] = tsffn_panel_bits2_avx2,
        },
};
