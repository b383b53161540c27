// Dense products with AMX: a tile is 16 rows of 64 bytes; TDPBF16PS adds 16 x 32 x 16 products to 16 x 16 f32 sums in
// 16 cycles.
//
// Two groups of 16 weight rows times two groups of 16 vectors keep four tiles of sums; the other four take in turn
// w_lo, x_hi, w_hi and x_lo, so that eight tile loads feed twelve products. The rows are expanded K_CHUNK weights at a
// time: 2 x 32 x 128 bfloat16 are 16 KB, which L1 holds while all vectors pass by, and the sums rest in memory between.
#include "amx.h"
#include "gemm.h"
#include "half.h"
#include "templates.h"
#include "tiers.h"

#include <immintrin.h>
#include <string.h>

enum {
    K_CHUNK = 128,
    TILE = TSFFN_TILE_ROWS,
    TILE_BYTES = TSFFN_TILE_ROW_BYTES,
    TILE_VALUES = TILE * 32 // bfloat16
};

// ---- f32 to two bfloat16

// hi and lo of 32 values. `a` and `b` are the first and the second 16.
static inline void split32(__m512 a, __m512 b, uint16_t * hi, uint16_t * lo) {
    const __m512i h = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    const __m512 ha = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(h)), 16));
    const __m512 hb =
        _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(h, 1)), 16));
    _mm512_storeu_si512(hi, h);
    _mm512_storeu_si512(lo, (__m512i)_mm512_cvtne2ps_pbh(_mm512_sub_ps(b, hb), _mm512_sub_ps(a, ha)));
}

static void split(int64_t n, const float * x, uint16_t * halves) {
    for (int64_t j = 0; j < n; j += TSFFN_GEMM_K) {
        split32(_mm512_loadu_ps(x + j), _mm512_loadu_ps(x + j + 16), halves + j, halves + n + j);
    }
}

static const uint16_t odd_indices[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                         33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};

// The same in half the steps, for weights: hi truncated, which takes a mask; of what is left, below 2^-7 of the value,
// the upper half rounded. Exact for the eleven bits of f16.
static inline void split32_weights(__m512 a, __m512 b, uint16_t * hi, uint16_t * lo) {
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000u);
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i odd = _mm512_loadu_si512(odd_indices);
    const __m512i ia = _mm512_castps_si512(a);
    const __m512i ib = _mm512_castps_si512(b);
    const __m512 rest_a = _mm512_sub_ps(a, _mm512_castsi512_ps(_mm512_and_si512(ia, upper)));
    const __m512 rest_b = _mm512_sub_ps(b, _mm512_castsi512_ps(_mm512_and_si512(ib, upper)));
    _mm512_storeu_si512(hi, _mm512_permutex2var_epi16(ia, odd, ib));
    _mm512_storeu_si512(lo, _mm512_permutex2var_epi16(_mm512_add_epi32(_mm512_castps_si512(rest_a), half), odd,
                                                      _mm512_add_epi32(_mm512_castps_si512(rest_b), half)));
}

// ---- weights: 32 of them at column j of a row, into hi and lo

typedef void expand_columns(const uint8_t * row, int64_t j, uint16_t * hi, uint16_t * lo);

static inline void expand_f16(const uint8_t * row, int64_t j, uint16_t * hi, uint16_t * lo) {
    const __m256i * w = (const __m256i *)(row + 2 * j);
    split32_weights(_mm512_cvtph_ps(_mm256_loadu_si256(w)), _mm512_cvtph_ps(_mm256_loadu_si256(w + 1)), hi, lo);
}

static inline void expand_bf16(const uint8_t * row, int64_t j, uint16_t * hi, uint16_t * lo) {
    _mm512_storeu_si512(hi, _mm512_loadu_si512(row + 2 * j));
    _mm512_storeu_si512(lo, _mm512_setzero_si512());
}

static inline void expand_q8_0(const uint8_t * row, int64_t j, uint16_t * hi, uint16_t * lo) {
    const uint8_t * block = row + j / TSFFN_BLOCK_SIZE * TSFFN_Q8_0_BYTES;
    const __m512 d = _mm512_set1_ps(_cvtsh_ss(tsffn_load_u16(block)));
    const __m128i * q = (const __m128i *)(block + 2);
    const __m512 a = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(q)));
    const __m512 b = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(q + 1)));
    split32_weights(_mm512_mul_ps(d, a), _mm512_mul_ps(d, b), hi, lo);
}

// A block has 16 different weights, and a register of them is the table of their upper halves, which are bfloat16
// (truncated), at every odd index. They have 15 significant bits: what is left has 7, and its upper half is exact.
static inline void expand_q4_0(const uint8_t * row, int64_t j, uint16_t * hi, uint16_t * lo) {
    const uint8_t * block = row + j / TSFFN_BLOCK_SIZE * TSFFN_Q4_0_BYTES;
    const __m512 levels = _mm512_mul_ps(_mm512_set1_ps(TSFFN_F16_SCALE_BACK),
                                        _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7));
    const __m512i d = _mm512_set1_epi32(tsffn_f16_bits_scaled(tsffn_load_u16(block)));
    const __m512 w = _mm512_mul_ps(_mm512_castsi512_ps(d), levels);
    const __m512i upper = _mm512_and_si512(_mm512_castps_si512(w), _mm512_set1_epi32((int)0xffff0000u));
    const __m512i rest = _mm512_castps_si512(_mm512_sub_ps(w, _mm512_castsi512_ps(upper)));
    const __m128i q = _mm_loadu_si128((const __m128i *)(block + 2));
    const __m256i nibbles = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(q, 4), q), _mm256_set1_epi8(15));
    const __m512i index = _mm512_or_si512(_mm512_slli_epi16(_mm512_cvtepu8_epi16(nibbles), 1), _mm512_set1_epi16(1));
    _mm512_storeu_si512(hi, _mm512_permutexvar_epi16(index, upper));
    _mm512_storeu_si512(lo, _mm512_permutexvar_epi16(index, rest));
}

// Columns [j0, j1) of 32 rows as tiles: per 32 columns hi and lo of rows 0..15, then of rows 16..31, which is
// [(j1 - j0) / 32][2 groups][hi, lo][16][32]. The same columns of the 32 rows behind them, which are likely to be next,
// are asked for: 32 streams are more than hardware prefetchers follow.
TSFFN_INLINED void expand_rows_of(expand_columns * expand, const uint8_t * rows, size_t stride, int64_t j0, int64_t j1,
                                  uint16_t * a) {
    for (int64_t j = j0; j < j1; j += TSFFN_GEMM_K, a += 4 * TILE_VALUES) {
        for (int i = 0; i < TSFFN_GEMM_ROWS; ++i) {
            uint16_t * to = a + (i / TILE) * 2 * TILE_VALUES + (i % TILE) * TSFFN_GEMM_K;
            expand(rows + (size_t)i * stride, j, to, to + TILE_VALUES);
        }
    }
}

static void ask_for(const uint8_t * rows, size_t stride, size_t begin, size_t end) {
    for (int i = 0; i < TSFFN_GEMM_ROWS; ++i, rows += stride) {
        for (size_t byte = begin & ~(size_t)63; byte < end; byte += 64) {
            _mm_prefetch((const char *)rows + byte, _MM_HINT_T1);
        }
    }
}

static size_t row_bytes(enum tsffn_format format, int64_t n) {
    const size_t blocks = (size_t)n / TSFFN_BLOCK_SIZE;
    return format == TSFFN_FORMAT_Q8_0   ? blocks * TSFFN_Q8_0_BYTES
           : format == TSFFN_FORMAT_Q4_0 ? blocks * TSFFN_Q4_0_BYTES
                                         : 2 * (size_t)n;
}

static void expand_rows(enum tsffn_format format, const uint8_t * rows, size_t stride, int64_t j0, int64_t j1,
                        uint16_t * a) {
    ask_for(rows + TSFFN_GEMM_ROWS * stride, stride, row_bytes(format, j0), row_bytes(format, j1));
    switch (format) {
    case TSFFN_FORMAT_F16:
        expand_rows_of(expand_f16, rows, stride, j0, j1, a);
        break;
    case TSFFN_FORMAT_BF16:
        expand_rows_of(expand_bf16, rows, stride, j0, j1, a);
        break;
    case TSFFN_FORMAT_Q8_0:
        expand_rows_of(expand_q8_0, rows, stride, j0, j1, a);
        break;
    default:
        expand_rows_of(expand_q4_0, rows, stride, j0, j1, a);
        break;
    }
}

// ---- activations: [n / 32][groups][hi, lo] tiles; row k of a tile holds values 2k and 2k + 1 of 16 vectors

static int groups_of(int n_x) {
    return (n_x + TSFFN_GEMM_GROUP - 1) / TSFFN_GEMM_GROUP;
}

static size_t packed_bytes(int64_t n, int n_x) {
    return (size_t)n * (size_t)groups_of(n_x) * TSFFN_GEMM_GROUP * 2 * sizeof(uint16_t);
}

static void pack(int64_t n, int n_x, const uint16_t * const x[], int group, void * packed) {
    const int groups = groups_of(n_x);
    for (int part = 0; part < 2; ++part) {
        for (int64_t j = 0; j < n; j += TSFFN_GEMM_K) {
            uint16_t * tile =
                (uint16_t *)packed + ((j / TSFFN_GEMM_K * groups + group) * 2 + part) * (int64_t)TILE_VALUES;
            for (int t = 0; t < TSFFN_GEMM_GROUP; ++t) {
                const int v = group * TSFFN_GEMM_GROUP + t;
                for (int k = 0; k < TSFFN_GEMM_K / 2; ++k) {
                    uint32_t pair = 0;
                    if (v < n_x) {
                        memcpy(&pair, x[v] + part * n + j + 2 * k, sizeof(pair));
                    }
                    memcpy(tile + k * TSFFN_GEMM_K + 2 * t, &pair, sizeof(pair));
                }
            }
        }
    }
}

// ---- tiles

// Sums of 32 rows and 32 vectors over `steps` times 32 columns. `a` as expand_rows leaves it, `b` at the first tile of
// the first of the two groups; consecutive steps of b are b_step values apart. `one`: there is only the first group.
static inline void multiply_tiles(int64_t steps, const uint16_t * a, const uint16_t * b, int64_t b_step, int one,
                                  float * s) {
    enum { STRIDE = TSFFN_GEMM_MAX_X * sizeof(float) };
    float * s1 = s + TILE * TSFFN_GEMM_MAX_X;
    TSFFN_TILE_LOAD(0, s, STRIDE);
    TSFFN_TILE_LOAD(2, s1, STRIDE);
    if (!one) {
        TSFFN_TILE_LOAD(1, s + TILE, STRIDE);
        TSFFN_TILE_LOAD(3, s1 + TILE, STRIDE);
    }
    for (int64_t k = 0; k < steps; ++k, a += 4 * TILE_VALUES, b += b_step) {
        TSFFN_TILE_LOAD(4, a + TILE_VALUES, TILE_BYTES);     // w_lo
        TSFFN_TILE_LOAD(5, a + 3 * TILE_VALUES, TILE_BYTES); //
        TSFFN_TILE_LOAD(6, b, TILE_BYTES);                   // x_hi
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        if (!one) {
            TSFFN_TILE_LOAD(7, b + 2 * TILE_VALUES, TILE_BYTES);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        TSFFN_TILE_LOAD(4, a, TILE_BYTES); // w_hi
        TSFFN_TILE_LOAD(5, a + 2 * TILE_VALUES, TILE_BYTES);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        TSFFN_TILE_LOAD(6, b + TILE_VALUES, TILE_BYTES); // x_lo
        if (!one) {
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
            TSFFN_TILE_LOAD(7, b + 3 * TILE_VALUES, TILE_BYTES);
        }
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        if (!one) {
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    TSFFN_TILE_STORE(0, s, STRIDE);
    TSFFN_TILE_STORE(2, s1, STRIDE);
    if (!one) {
        TSFFN_TILE_STORE(1, s + TILE, STRIDE);
        TSFFN_TILE_STORE(3, s1 + TILE, STRIDE);
    }
}

static void multiply(enum tsffn_format format, int64_t n, const void * rows, size_t stride, int n_x,
                     const void * packed, float * s) {
    _Alignas(64) uint16_t a[K_CHUNK / TSFFN_GEMM_K * 4 * TILE_VALUES];
    const int groups = groups_of(n_x);
    const int64_t b_step = (int64_t)groups * 2 * TILE_VALUES;
    memset(s, 0, TSFFN_GEMM_ROWS * TSFFN_GEMM_MAX_X * sizeof(float));
    struct tsffn_tile_config before, config = {.palette = 1};
    for (int i = 0; i < TSFFN_TILES; ++i) {
        config.rows[i] = TILE;
        config.row_bytes[i] = TILE_BYTES;
    }
    tsffn_store_tile_config(&before);
    tsffn_load_tile_config(&config);
    for (int64_t j0 = 0; j0 < n; j0 += K_CHUNK) {
        const int64_t j1 = j0 + K_CHUNK < n ? j0 + K_CHUNK : n;
        expand_rows(format, rows, stride, j0, j1, a);
        const uint16_t * b = (const uint16_t *)packed + j0 / TSFFN_GEMM_K * b_step;
        for (int g = 0; g < groups; g += 2) {
            multiply_tiles((j1 - j0) / TSFFN_GEMM_K, a, b + g * 2 * (int64_t)TILE_VALUES, b_step, g + 1 == groups,
                           s + g * TILE);
        }
    }
    tsffn_load_tile_config(&before);
}

const struct tsffn_gemm tsffn_gemm_amx = {
    .split = split,
    .packed_bytes = packed_bytes,
    .pack = pack,
    .multiply = multiply,
};
