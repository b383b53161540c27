// AMX: panels for many activation vectors; gemm_amx.c has dense products. Rows are those of AVX512-VNNI.
//
// 16 vectors are multiplied with the 16 rows of a panel, 32 columns at a time: one TDPBSSD each for hi and lo
// (panels.h).
//
// The bytes of a panel's block of columns are a tile of weights already: row g holds four columns of the 16 rows. What
// the products of a block have to go through on their way to floats, scales and sums is what bounds this: 16 x 16 of
// them take 64 instructions, the tiles' 4096 products 16 cycles.
#include "amx.h"
#include "q3_nl_avx512.h"
#include "templates.h"
#include "tiers.h"

#include <immintrin.h>
#include <string.h>

enum {
    BLOCKS = 16,                   // of columns, expanded at a time: 8 KB
    GROUPS = TSFFN_BLOCK_SIZE / 4, // rows of a tile of weights
    TILE_BYTES = GROUPS * 64,      //
    MIN_X = 6,                     // with fewer vectors the panels of AVX512-VNNI are as fast
};

// Panel blocks as tiles of signed weights.
static inline void expand_q4_0(const uint8_t * block, int8_t * w) {
    const __m512i mask = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
    for (int g = 0; g < GROUPS / 2; ++g, w += 64) {
        const __m512i q = _mm512_loadu_si512(block + 2 * TSFFN_PANEL_ROWS + g * 64);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(q, 4), mask);
        _mm512_store_si512(w, _mm512_sub_epi8(_mm512_and_si512(q, mask), eight));
        _mm512_store_si512(w + TILE_BYTES / 2, _mm512_sub_epi8(high, eight));
    }
}

static inline void expand_q8_0(const uint8_t * block, int8_t * w) {
    for (int g = 0; g < GROUPS; ++g, w += 64) {
        _mm512_store_si512(w, _mm512_loadu_si512(block + 2 * TSFFN_PANEL_ROWS + g * 64));
    }
}

typedef int32_t products[2][TSFFN_TILE_ROWS][TSFFN_PANEL_ROWS]; // of hi, of lo; [vector][row]

// Up to 16 vectors, `distance` bytes apart.
struct vectors {
    const int8_t *hi, *lo;
    int64_t distance;
    int n;
};

// Tile registers; GCC wants the numbers themselves in its intrinsics.
#define W 0
#define X_HI 1
#define X_LO 2
#define HI 3
#define LO 4

static void configure(int n_x) {
    struct tsffn_tile_config config = {.palette = 1};
    for (int tile = W; tile <= LO; ++tile) {
        config.rows[tile] = tile == W ? GROUPS : (uint8_t)n_x;
        config.row_bytes[tile] = tile == X_HI || tile == X_LO ? TSFFN_BLOCK_SIZE : TSFFN_TILE_ROW_BYTES;
    }
    tsffn_load_tile_config(&config);
}

static inline void multiply(const int8_t * w, struct vectors x, int64_t j) {
    TSFFN_TILE_LOAD(W, w, TSFFN_TILE_ROW_BYTES);
    TSFFN_TILE_LOAD(X_HI, x.hi + j, x.distance);
    TSFFN_TILE_LOAD(X_LO, x.lo + j, x.distance);
    _tile_zero(HI);
    _tile_zero(LO);
    _tile_dpbssd(HI, X_HI, W);
    _tile_dpbssd(LO, X_LO, W);
}

static inline void store(products c) {
    TSFFN_TILE_STORE(HI, c[0], TSFFN_TILE_ROW_BYTES);
    TSFFN_TILE_STORE(LO, c[1], TSFFN_TILE_ROW_BYTES);
}

// s += d * (256 hi + lo), block by block; while the products of one are added, those of the next are made and
// stored: a load right behind a tile's store would wait for it. With a constant n_x of 16 the sums stay in registers.
TSFFN_INLINED void add_n_x(int n_x, const int8_t * w, const uint8_t * block, size_t block_bytes, int n_blocks,
                           struct vectors x, int64_t j, float (*s)[TSFFN_PANEL_ROWS]) {
    _Alignas(64) products c[2];
    __m512 sums[TSFFN_TILE_ROWS];
    for (int t = 0; t < n_x; ++t) {
        sums[t] = _mm512_loadu_ps(s[t]);
    }
    multiply(w, x, j);
    store(c[0]);
    for (int b = 0; b < n_blocks; ++b, block += block_bytes) {
        if (b + 1 < n_blocks) {
            multiply(w + (b + 1) * TILE_BYTES, x, j + (b + 1) * TSFFN_BLOCK_SIZE);
            store(c[(b + 1) % 2]);
        }
        const __m512 d = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)block));
#pragma GCC unroll 16
        for (int t = 0; t < n_x; ++t) {
            const __m512i hi = _mm512_load_si512(c[b % 2][0][t]), lo = _mm512_load_si512(c[b % 2][1][t]);
            const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(hi, 8), lo));
            sums[t] = _mm512_fmadd_ps(d, sum, sums[t]);
        }
    }
    for (int t = 0; t < n_x; ++t) {
        _mm512_storeu_ps(s[t], sums[t]);
    }
}

static void add_blocks(const int8_t * w, const uint8_t * block, size_t block_bytes, int n_blocks, struct vectors x,
                       int64_t j, float (*s)[TSFFN_PANEL_ROWS]) {
    if (x.n == TSFFN_TILE_ROWS) {
        add_n_x(TSFFN_TILE_ROWS, w, block, block_bytes, n_blocks, x, j, s);
    } else {
        add_n_x(x.n, w, block, block_bytes, n_blocks, x, j, s);
    }
}

// The bytes from one vector to the next, or 0 when they differ: tiles are loaded from places equally far apart.
static int64_t distance_of(int n_x, const void * const * x) {
    const int64_t distance = (const char *)x[1] - (const char *)x[0];
    for (int t = 2; t < n_x; ++t) {
        if ((const char *)x[t] - (const char *)x[t - 1] != distance) {
            return 0;
        }
    }
    return distance;
}

// Makes a tile of signed weights of a block.
typedef void expand_block(const uint8_t * block, int8_t * w);

// A panel of a block format for vectors that are `distance` bytes apart.
TSFFN_INLINED void panel_of_blocks(expand_block * expand, int block_bytes, int64_t n, const void * panel, int n_x,
                                   const void * const * x, int64_t distance, float (*s)[TSFFN_PANEL_ROWS],
                                   const struct tsffn_asks * asks) {
    struct tsffn_tile_config before;
    tsffn_store_tile_config(&before);
    for (int t = 0; t < n_x; ++t) {
        _mm512_storeu_ps(s[t], _mm512_setzero_ps());
    }
    _Alignas(64) int8_t w[BLOCKS * TILE_BYTES];
    const uint8_t * block = panel;
    const int64_t all_blocks = n / TSFFN_BLOCK_SIZE;
    struct tsffn_asking asking = tsffn_asking_begin(asks, all_blocks);
    int configured = 0;
    for (int64_t b0 = 0; b0 < all_blocks; b0 += BLOCKS, block += BLOCKS * block_bytes) {
        const int n_blocks = (int)(all_blocks - b0 < BLOCKS ? all_blocks - b0 : BLOCKS);
        for (int b = 0; b < n_blocks; ++b) {
            tsffn_asking_step(&asking);
            expand(block + b * block_bytes, w + b * TILE_BYTES);
        }
        for (int t = 0; t < n_x; t += TSFFN_TILE_ROWS) {
            const int n_tile = n_x - t < TSFFN_TILE_ROWS ? n_x - t : TSFFN_TILE_ROWS;
            if (n_tile != configured) {
                configure(n_tile);
                configured = n_tile;
            }
            const struct vectors vectors = {tsffn_i16_hi(x[t], n), tsffn_i16_lo(x[t], n), distance, n_tile};
            add_blocks(w, block, (size_t)block_bytes, n_blocks, vectors, b0 * TSFFN_BLOCK_SIZE, s + t);
        }
    }
    for (int t = 0; t < n_x; ++t) {
        _mm512_storeu_ps(s[t], _mm512_mul_ps(_mm512_loadu_ps(s[t]), _mm512_set1_ps(tsffn_i16_scale(x[t]))));
    }
    tsffn_load_tile_config(&before);
}

void tsffn_panel_q8_0_amx(int64_t n, const void * panel, int n_x, const void * const * x, float (*s)[TSFFN_PANEL_ROWS],
                          const struct tsffn_asks * asks) {
    const int64_t distance = n_x < MIN_X ? 0 : distance_of(n_x, x);
    if (distance == 0) {
        tsffn_panel_q8_0_avx512vnni(n, panel, n_x, x, s, asks);
        return;
    }
    panel_of_blocks(expand_q8_0, TSFFN_PANEL_Q8_0_BYTES, n, panel, n_x, x, distance, s, asks);
}

void tsffn_panel_q4_0_amx(int64_t n, const void * panel, int n_x, const void * const * x, float (*s)[TSFFN_PANEL_ROWS],
                          const struct tsffn_asks * asks) {
    const int64_t distance = n_x < MIN_X ? 0 : distance_of(n_x, x);
    if (distance == 0) {
        tsffn_panel_q4_0_avx512vnni(n, panel, n_x, x, s, asks);
        return;
    }
    panel_of_blocks(expand_q4_0, TSFFN_PANEL_Q4_0_BYTES, n, panel, n_x, x, distance, s, asks);
}

// Q3_NL: weights with their group's scale are signed bytes (at most 8 * 15), so the products of all columns are summed
// in the tiles, the activations being the unsigned factor.
static inline void expand_q3_nl(const uint8_t * block, int8_t * w) {
    const __m512i levels = tsffn_q3_nl_levels();
    __m512i codes[TSFFN_Q3_NL_QUADS];
    tsffn_q3_nl_codes(block, codes);
    // A row's byte of scales in both words of its 32 bits; then a nibble of it with its sign.
    const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)block));
    const __m512i bytes = _mm512_or_si512(byte, _mm512_slli_epi32(byte, 16));
    const __m512i scales[2] = {_mm512_srai_epi16(_mm512_slli_epi16(bytes, 12), 12),
                               _mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 12)};
    for (int g = 0; g < GROUPS; ++g, w += 64) {
        const __m512i level = _mm512_shuffle_epi8(levels, codes[g]), scale = scales[g / 4];
        const __m512i odd = _mm512_mullo_epi16(_mm512_srai_epi16(level, 8), scale);
        const __m512i even = _mm512_mullo_epi16(_mm512_srai_epi16(_mm512_slli_epi16(level, 8), 8), scale);
        const __m512i low_bytes = _mm512_set1_epi16(0xff);
        _mm512_store_si512(w, _mm512_or_si512(_mm512_slli_epi16(odd, 8), _mm512_and_si512(even, low_bytes)));
    }
}

// c += products of up to 16 vectors with n_blocks blocks of columns, from column j on.
static inline void add_products_q3_nl(products c, const int8_t * w, int n_blocks, struct vectors x, int64_t j) {
    TSFFN_TILE_LOAD(HI, c[0], TSFFN_TILE_ROW_BYTES);
    TSFFN_TILE_LOAD(LO, c[1], TSFFN_TILE_ROW_BYTES);
    for (int b = 0; b < n_blocks; ++b, w += TILE_BYTES, j += TSFFN_BLOCK_SIZE) {
        TSFFN_TILE_LOAD(W, w, TSFFN_TILE_ROW_BYTES);
        TSFFN_TILE_LOAD(X_HI, x.hi + j, x.distance);
        TSFFN_TILE_LOAD(X_LO, x.lo + j, x.distance);
        _tile_dpbusd(HI, X_HI, W);
        _tile_dpbusd(LO, X_LO, W);
    }
    store(c);
}

// Up to MOST_X vectors.
enum { MOST_X = 4 * TSFFN_TILE_ROWS };
static void panel_q3_nl(int64_t n, const uint8_t * panel, int n_x, const void * const * x, int64_t distance,
                        float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks) {
    _Alignas(64) int8_t w[BLOCKS * TILE_BYTES];
    _Alignas(64) products sums[MOST_X / TSFFN_TILE_ROWS];
    memset(sums, 0, sizeof(sums));
    const uint8_t * block = panel + TSFFN_PANEL_Q3_NL_HEADER;
    const int64_t all_blocks = n / TSFFN_BLOCK_SIZE;
    struct tsffn_asking asking = tsffn_asking_begin(asks, all_blocks);
    int configured = 0;
    for (int64_t b0 = 0; b0 < all_blocks; b0 += BLOCKS) {
        const int n_blocks = (int)(all_blocks - b0 < BLOCKS ? all_blocks - b0 : BLOCKS);
        for (int b = 0; b < n_blocks; ++b, block += TSFFN_PANEL_Q3_NL_BYTES) {
            tsffn_asking_step(&asking);
            expand_q3_nl(block, w + b * TILE_BYTES);
        }
        for (int t = 0; t < n_x; t += TSFFN_TILE_ROWS) {
            const int n_tile = n_x - t < TSFFN_TILE_ROWS ? n_x - t : TSFFN_TILE_ROWS;
            if (n_tile != configured) {
                configure(n_tile);
                configured = n_tile;
            }
            const struct vectors vectors = {(const int8_t *)tsffn_u14_hi(x[t]), (const int8_t *)tsffn_u14_lo(x[t], n),
                                            distance, n_tile};
            add_products_q3_nl(sums[t / TSFFN_TILE_ROWS], w, n_blocks, vectors, b0 * TSFFN_BLOCK_SIZE);
        }
    }
    const __m512 d = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)panel));
    for (int t = 0; t < n_x; ++t) {
        const int32_t *hi = sums[t / TSFFN_TILE_ROWS][0][t % TSFFN_TILE_ROWS],
                      *lo = sums[t / TSFFN_TILE_ROWS][1][t % TSFFN_TILE_ROWS];
        const __m512i hi_sum = _mm512_load_si512(hi), lo_sum = _mm512_load_si512(lo);
        _mm512_storeu_ps(s[t], tsffn_q3_nl_finish(hi_sum, lo_sum, d, tsffn_u14_scale(x[t])));
    }
}

void tsffn_panel_q3_nl_amx(int64_t n, const void * panel, int n_x, const void * const * x, float (*s)[TSFFN_PANEL_ROWS],
                           const struct tsffn_asks * asks) {
    const int64_t distance = n_x < MIN_X ? 0 : distance_of(n_x, x);
    if (distance == 0) {
        tsffn_panel_q3_nl_avx512vnni(n, panel, n_x, x, s, asks);
        return;
    }
    struct tsffn_tile_config before;
    tsffn_store_tile_config(&before);
    for (int t = 0; t < n_x; t += MOST_X, asks = NULL) {
        panel_q3_nl(n, panel, n_x - t < MOST_X ? n_x - t : MOST_X, x + t, distance, s + t, asks);
    }
    tsffn_load_tile_config(&before);
}

const struct tsffn_kernels tsffn_kernels_amx = {
    .isa = TSFFN_ISA_AMX,
    .name = "amx",
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
            [TSFFN_FORMAT_Q8_0] = tsffn_panel_q8_0_amx,
            [TSFFN_FORMAT_Q4_0] = tsffn_panel_q4_0_amx,
            [TSFFN_FORMAT_Q3_NL] = tsffn_panel_q3_nl_amx,
            [TSFFN_FORMAT_BITS1] = tsffn_panel_bits1_avx512popcnt,
            [TSFFN_FORMAT_BITS2] = tsffn_panel_bits2_avx512popcnt,
        },
    .gemm = &tsffn_gemm_amx,
};
