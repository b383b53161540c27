// AVX512-VNNI: dot products of Q4_0, and panels. The other row kernels are those of AVX-512.
//
// ---- rows of Q4_0, four blocks at a time
//
// The nibbles of four blocks fill one register, 16 bytes of each. VPDPBUSD multiplies them, unsigned, with signed bytes
// of the activations (the quads of kernels.h), and adds four neighbours into a lane, so that lanes 4 b .. 4 b + 3
// belong to block b:
//   lane = 256 * sum nibble hi + sum nibble lo        exact in int32
// The weights are d (nibble - 8): the eights are taken off with the sums of whole blocks, 16 at a time,
//   row . x = sum_blocks d (nibbles . q) - 8 sum_blocks d sum(q)
// That takes 18 instructions for 128 weights where words (avx512.c) take 40. Half of them are shared by all
// vectors (docs/notes/2026-11-28-prefill.md).
#include "half.h"
#include "q3_nl_avx512.h"
#include "quads_avx512.h"
#include "templates.h"
#include "tiers.h"

#include <immintrin.h>

struct weights {
    __m512i low, high; // nibbles
    __m512 scales;
};

// Those of a quad, whose scales are number k of `scales`.
static inline struct weights load_weights(const uint8_t * blocks, __m512 scales, int k) {
    const __m512i q = nibbles_of_quad(blocks);
    const __m512i mask = _mm512_set1_epi8(15);
    const __m512i each_fourfold = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return (struct weights){
        .low = _mm512_and_si512(q, mask),
        .high = _mm512_and_si512(_mm512_srli_epi16(q, 4), mask),
        .scales = _mm512_permutexvar_ps(_mm512_add_epi32(each_fourfold, _mm512_set1_epi32(4 * k)), scales),
    };
}

static inline __m512 add_quad(__m512 sum, struct weights w, const int8_t * quad) {
    __m512i hi = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w.low, _mm512_loadu_si512(quad));
    hi = _mm512_dpbusd_epi32(hi, w.high, _mm512_loadu_si512(quad + 64));
    __m512i products = _mm512_slli_epi32(hi, 8);
    products = _mm512_dpbusd_epi32(products, w.low, _mm512_loadu_si512(quad + 128));
    products = _mm512_dpbusd_epi32(products, w.high, _mm512_loadu_si512(quad + 192));
    return _mm512_fmadd_ps(w.scales, _mm512_cvtepi32_ps(products), sum);
}

// One block behind the last quad, multiplied in words.
static inline __m512 add_block(__m512 sum, const uint8_t * block, const int16_t * x) {
    const __m128i mask = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
    const __m128i q = _mm_loadu_si128((const __m128i *)(block + 2));
    const __m128i low = _mm_sub_epi8(_mm_and_si128(q, mask), eight);
    const __m128i high = _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(q, 4), mask), eight);
    const __m512i w = _mm512_cvtepi8_epi16(_mm256_set_m128i(high, low));
    const __m512i products = _mm512_madd_epi16(w, _mm512_loadu_si512(x));
    const __m512 d = _mm512_set1_ps(_cvtsh_ss(tsffn_load_u16(block)));
    return _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(products), sum);
}

enum { MOST_X = 8 };

// Quads from column j on, which have their scales in one register. Lanes without a block have the scale 0, whatever
// follows the sums.
#define ADD_QUADS(n_quads)                                                                                             \
    do {                                                                                                               \
        const __m512 scales = scales_of_quads(block, n_quads);                                                         \
        for (int t = 0; t < n_x; ++t) {                                                                                \
            const __m512i q = _mm512_loadu_si512(block_sums[t] + j / TSFFN_BLOCK_SIZE);                                \
            offsets[t] = _mm512_fmadd_ps(scales, _mm512_cvtepi32_ps(q), offsets[t]);                                   \
        }                                                                                                              \
        tsffn_asking_step(&asking);                                                                                    \
        _Pragma("GCC unroll 4") for (int k = 0; k < (n_quads); ++k) {                                                  \
            const struct weights w = load_weights(block, scales, k);                                                   \
            for (int t = 0; t < n_x; ++t) {                                                                            \
                sums[t] = add_quad(sums[t], w, quads[t] + at);                                                         \
            }                                                                                                          \
            j += TSFFN_I16_QUAD;                                                                                       \
            at += TSFFN_I16_QUAD_BYTES;                                                                                \
            block += TSFFN_Q4_0_QUAD_BYTES;                                                                            \
        }                                                                                                              \
    } while (0)

TSFFN_INLINED void dots_of_q4_0(int64_t n, const void * row, int n_x, const void * const * x, float * s,
                                const struct tsffn_asks * asks) {
    const uint8_t * block = row;
    struct tsffn_asking asking = tsffn_asking_begin(asks, n / (TSFFN_Q4_0_QUADS * TSFFN_I16_QUAD));
    const int8_t * quads[MOST_X];
    const int32_t * block_sums[MOST_X];
    __m512 sums[MOST_X], offsets[MOST_X];
    for (int t = 0; t < n_x; ++t) {
        quads[t] = tsffn_i16_quads(x[t], n);
        block_sums[t] = tsffn_i16_sums(x[t], n);
        sums[t] = offsets[t] = _mm512_setzero_ps();
    }
    int64_t j = 0, at = 0;
    while (j + TSFFN_Q4_0_QUADS * TSFFN_I16_QUAD <= n) {
        ADD_QUADS(TSFFN_Q4_0_QUADS);
    }
    while (j + TSFFN_I16_QUAD <= n) {
        ADD_QUADS(1);
    }
    for (; j < n; j += TSFFN_BLOCK_SIZE, block += TSFFN_Q4_0_BYTES) {
        for (int t = 0; t < n_x; ++t) {
            sums[t] = add_block(sums[t], block, tsffn_i16_values(x[t]) + j);
        }
    }
    for (int t = 0; t < n_x; ++t) {
        const __m512 sum = _mm512_fmadd_ps(_mm512_set1_ps(-8.0f), offsets[t], sums[t]);
        s[t] = _mm512_reduce_add_ps(sum) * tsffn_i16_scale(x[t]);
    }
}
TSFFN_DEFINE_DOTS(tsffn_dots_q4_0_avx512vnni, MOST_X, dots_of_q4_0)

// ---- panels
//
// One register holds 4 bytes of each of the 16 rows, and VPDPBUSD multiplies unsigned weights
// with four activations of every row at once. The offset that makes the weights unsigned is taken off again:
//   sum_j w_j q_j = sum_j (w_j + offset) q_j - offset * sum_j q_j
// A block of 32 columns takes 16 (Q8_0, Q4_0) multiplications per activation vector, of hi and lo (panels.h), where the
// row kernels of AVX-512 take 16 times eight instructions.

// Bytes x[0..4), for each of the 16 rows.
static inline __m512i four(const int8_t * x) {
    int32_t bytes;
    __builtin_memcpy(&bytes, x, sizeof(bytes));
    return _mm512_set1_epi32(bytes);
}

// The products of 16 rows with up to four vectors: 256 hi + lo.
struct panel_sums {
    __m512i hi[4], lo[4];
};

// Adds those of four columns, whose activations are at hi[t] + j and lo[t] + j.
TSFFN_INLINED void add_columns(struct panel_sums * sums, int n_x, __m512i w, const int8_t * const * hi,
                               const int8_t * const * lo, int64_t j) {
    for (int t = 0; t < n_x; ++t) {
        sums->hi[t] = _mm512_dpbusd_epi32(sums->hi[t], w, four(hi[t] + j));
        sums->lo[t] = _mm512_dpbusd_epi32(sums->lo[t], w, four(lo[t] + j));
    }
}

// Adds the products of a block's 32 columns, with the offset: 128 of Q8_0, 8 of Q4_0.
typedef void panel_block(struct panel_sums * sums, int n_x, const uint8_t * q, const int8_t * const * hi,
                         const int8_t * const * lo, int64_t j);

TSFFN_INLINED void add_bytes(struct panel_sums * sums, int n_x, const uint8_t * q, const int8_t * const * hi,
                             const int8_t * const * lo, int64_t j) {
    for (int g = 0; g < 8; ++g) {
        const __m512i w = _mm512_xor_si512(_mm512_loadu_si512(q + g * 64), _mm512_set1_epi8((char)0x80));
        add_columns(sums, n_x, w, hi, lo, j + 4 * g);
    }
}

TSFFN_INLINED void add_nibbles(struct panel_sums * sums, int n_x, const uint8_t * q, const int8_t * const * hi,
                               const int8_t * const * lo, int64_t j) {
    for (int g = 0; g < 4; ++g) {
        const __m512i bytes = _mm512_loadu_si512(q + g * 64);
        const __m512i low = _mm512_and_si512(bytes, _mm512_set1_epi8(15));
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15));
        add_columns(sums, n_x, low, hi, lo, j + 4 * g);
        add_columns(sums, n_x, high, hi, lo, j + 16 + 4 * g);
    }
}

TSFFN_INLINED void panel_of_blocks(panel_block * add, int block_bytes, int32_t offset, int64_t n, const uint8_t * block,
                                   int n_x, const void * const * x, float (*s)[TSFFN_PANEL_ROWS],
                                   const struct tsffn_asks * asks) {
    const int8_t *hi[4], *lo[4];
    const int32_t * x_sums[4];
    __m512 total[4];
    for (int t = 0; t < n_x; ++t) {
        hi[t] = tsffn_i16_hi(x[t], n);
        lo[t] = tsffn_i16_lo(x[t], n);
        x_sums[t] = tsffn_i16_sums(x[t], n);
        total[t] = _mm512_setzero_ps();
    }
    const int64_t n_blocks = n / TSFFN_BLOCK_SIZE;
    struct tsffn_asking asking = tsffn_asking_begin(asks, n_blocks);
    for (int64_t b = 0, j = 0; b < n_blocks; ++b, j += TSFFN_BLOCK_SIZE, block += block_bytes) {
        tsffn_asking_step(&asking);
        struct panel_sums sums;
        for (int t = 0; t < n_x; ++t) {
            sums.hi[t] = sums.lo[t] = _mm512_setzero_si512();
        }
        add(&sums, n_x, block + 2 * TSFFN_PANEL_ROWS, hi, lo, j);
        const __m512 d = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)block));
        for (int t = 0; t < n_x; ++t) {
            const __m512i products = _mm512_add_epi32(_mm512_slli_epi32(sums.hi[t], 8), sums.lo[t]);
            const __m512i back = _mm512_set1_epi32(offset * x_sums[t][b]);
            total[t] = _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(_mm512_sub_epi32(products, back)), total[t]);
        }
    }
    for (int t = 0; t < n_x; ++t) {
        _mm512_storeu_ps(s[t], _mm512_mul_ps(total[t], _mm512_set1_ps(tsffn_i16_scale(x[t]))));
    }
}

TSFFN_INLINED void panel_of_q8_0(int64_t n, const void * panel, int n_x, const void * const * x,
                                 float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks) {
    panel_of_blocks(add_bytes, TSFFN_PANEL_Q8_0_BYTES, 128, n, panel, n_x, x, s, asks);
}

TSFFN_INLINED void panel_of_q4_0(int64_t n, const void * panel, int n_x, const void * const * x,
                                 float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks) {
    panel_of_blocks(add_nibbles, TSFFN_PANEL_Q4_0_BYTES, 8, n, panel, n_x, x, s, asks);
}

// Q3_NL: the activations are the unsigned factor, so no offset is taken off. The sums of 16 columns fit 16 bits, and
// VPDPWSSD multiplies them with the group's scale and adds them: no floats before the end.
TSFFN_INLINED void panel_of_q3_nl(int64_t n, const uint8_t * panel, int n_x, const void * const * x,
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

// Four vectors at most: 2 accumulators each, and one for the floats.
TSFFN_DEFINE_PANEL(tsffn_panel_q8_0_avx512vnni, panel_of_q8_0)
TSFFN_DEFINE_PANEL(tsffn_panel_q4_0_avx512vnni, panel_of_q4_0)
TSFFN_DEFINE_PANEL(tsffn_panel_q3_nl_avx512vnni, panel_of_q3_nl)

const struct tsffn_kernels tsffn_kernels_avx512vnni = {
    .isa = TSFFN_ISA_AVX512VNNI,
    .name = "avx512vnni",
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
            [TSFFN_FORMAT_BITS1] = tsffn_panel_bits1_avx2,
            [TSFFN_FORMAT_BITS2] = tsffn_panel_bits2_avx2,
        },
};
