// The dot-product extension of ARMv8.2: rows of blocks, and panels. The other row kernels are those of NEON.
//
// Rows: SDOT adds four products of bytes to each lane, so that a block takes four for the bytes hi and lo of the
// activations (kernels.h), where words (neon.c) take eight SMLAL and four steps of widening. By llvm-mca's model of a
// Neoverse N1 (not measured), two blocks of Q4_0 take 14 cycles instead of 21, of Q8_0 10 instead of 21.
#include "panels.h"
#include "scales_neon.h"
#include "templates.h"
#include "tiers.h"

#include <arm_neon.h>
#include <string.h>

// The 32 weights of a block without their scale.
typedef int8x16x2_t weights;

static inline weights weights_q8_0(const uint8_t * block) {
    return (weights){{vld1q_s8((const int8_t *)block + 2), vld1q_s8((const int8_t *)block + 18)}};
}

static inline weights weights_q4_0(const uint8_t * block) {
    const uint8x16_t q = vld1q_u8(block + 2);
    const int8x16_t eight = vdupq_n_s8(8);
    return (weights){{
        vsubq_s8(vreinterpretq_s8_u8(vandq_u8(q, vdupq_n_u8(15))), eight),
        vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(q, 4)), eight),
    }};
}

// Four int32 sums of the products of a block's weights with 32 activations, as floats: 256 w . hi + w . lo.
static inline float32x4_t block_products(weights w, const int8_t * hi, const int8_t * lo) {
    int32x4_t sum = vdotq_s32(vdupq_n_s32(0), w.val[0], vld1q_s8(hi));
    sum = vshlq_n_s32(vdotq_s32(sum, w.val[1], vld1q_s8(hi + 16)), 8);
    sum = vdotq_s32(sum, w.val[0], vld1q_s8(lo));
    return vcvtq_f32_s32(vdotq_s32(sum, w.val[1], vld1q_s8(lo + 16)));
}

typedef weights block_weights(const uint8_t * block);

// sums[t] += scale * (the products of the block's weights with columns j to j + 31 of the vectors)
TSFFN_INLINED void add_products_of_block(block_weights * unpack, const uint8_t * block, int n_x,
                                         const int8_t * const * hi, const int8_t * const * lo, int64_t j,
                                         float32x4_t * sums) {
    const weights w = unpack(block);
    const float scale = block_scale(block);
    for (int t = 0; t < n_x; ++t) {
        sums[t] = vfmaq_n_f32(sums[t], block_products(w, hi[t] + j, lo[t] + j), scale);
    }
}

// Two accumulators: the sums of one block depend on nothing of the next.
TSFFN_INLINED void dots_of_blocks(block_weights * unpack, int block_bytes, int64_t n, const void * row, int n_x,
                                  const void * const * x, float * s, const struct tsffn_asks * asks) {
    tsffn_ask_all(asks);
    const uint8_t * block = row;
    const int8_t *hi[4], *lo[4];
    float32x4_t even[4], odd[4];
    for (int t = 0; t < n_x; ++t) {
        hi[t] = tsffn_i16_hi(x[t], n);
        lo[t] = tsffn_i16_lo(x[t], n);
        even[t] = odd[t] = vdupq_n_f32(0.0f);
    }
    int64_t j = 0;
    for (; j + 64 <= n; j += 64, block += 2 * block_bytes) {
        add_products_of_block(unpack, block, n_x, hi, lo, j, even);
        add_products_of_block(unpack, block + block_bytes, n_x, hi, lo, j + 32, odd);
    }
    if (j < n) {
        add_products_of_block(unpack, block, n_x, hi, lo, j, even);
    }
    for (int t = 0; t < n_x; ++t) {
        s[t] = vaddvq_f32(vaddq_f32(even[t], odd[t])) * tsffn_i16_scale(x[t]);
    }
}

TSFFN_INLINED void dots_of_q8_0(int64_t n, const void * row, int n_x, const void * const * x, float * s,
                                const struct tsffn_asks * asks) {
    dots_of_blocks(weights_q8_0, TSFFN_Q8_0_BYTES, n, row, n_x, x, s, asks);
}

TSFFN_INLINED void dots_of_q4_0(int64_t n, const void * row, int n_x, const void * const * x, float * s,
                                const struct tsffn_asks * asks) {
    dots_of_blocks(weights_q4_0, TSFFN_Q4_0_BYTES, n, row, n_x, x, s, asks);
}

TSFFN_DEFINE_DOTS(tsffn_dots_q8_0_neondot, 4, dots_of_q8_0)
TSFFN_DEFINE_DOTS(tsffn_dots_q4_0_neondot, 4, dots_of_q4_0)

// ---- panels
//
// SDOT multiplies 4 bytes of each of 4 rows with four activations, taken from
// one lane of a register. Nibbles stay without their offset of 8 until the end:
//   sum_j w_j q_j = sum_j (w_j + 8) q_j - 8 sum_j q_j
// By llvm-mca's model of a Neoverse N1 (not measured), 32 columns of 16 Q4_0 rows take 73 cycles so, 158 in
// neon.c, and row by row 113 with the rows above or 169 with those of NEON.

// hi and lo (kernels.h) of one block of 32 columns.
struct columns {
    int8x16_t hi[2], lo[2];
};

// The products of 4 rows with up to four vectors: 256 hi + lo.
struct panel_sums {
    int32x4_t hi[4], lo[4];
};

// Adds those of four columns: lane G, which must be a constant, of a half of the block's.
#define ADD_COLUMNS(w, half, G)                                                                                        \
    do {                                                                                                               \
        const int8x16_t bytes = (w);                                                                                   \
        for (int t = 0; t < n_x; ++t) {                                                                                \
            sums->hi[t] = vdotq_laneq_s32(sums->hi[t], bytes, v[t].hi[half], G);                                       \
            sums->lo[t] = vdotq_laneq_s32(sums->lo[t], bytes, v[t].lo[half], G);                                       \
        }                                                                                                              \
    } while (0)

static inline int8x16_t bytes_at(const uint8_t * q) {
    return vreinterpretq_s8_u8(vld1q_u8(q));
}

// Adds the products of 4 rows with a block's 32 columns; those of nibbles with an offset of 8.
typedef void panel_block(struct panel_sums * sums, int n_x, const uint8_t * q, const struct columns * v);

TSFFN_INLINED void add_bytes(struct panel_sums * sums, int n_x, const uint8_t * q, const struct columns * v) {
    ADD_COLUMNS(bytes_at(q), 0, 0);
    ADD_COLUMNS(bytes_at(q + 64), 0, 1);
    ADD_COLUMNS(bytes_at(q + 128), 0, 2);
    ADD_COLUMNS(bytes_at(q + 192), 0, 3);
    ADD_COLUMNS(bytes_at(q + 256), 1, 0);
    ADD_COLUMNS(bytes_at(q + 320), 1, 1);
    ADD_COLUMNS(bytes_at(q + 384), 1, 2);
    ADD_COLUMNS(bytes_at(q + 448), 1, 3);
}

static inline int8x16_t low_nibbles(const uint8_t * q) {
    return vreinterpretq_s8_u8(vandq_u8(vld1q_u8(q), vdupq_n_u8(15)));
}

static inline int8x16_t high_nibbles(const uint8_t * q) {
    return vreinterpretq_s8_u8(vshrq_n_u8(vld1q_u8(q), 4));
}

TSFFN_INLINED void add_nibbles(struct panel_sums * sums, int n_x, const uint8_t * q, const struct columns * v) {
    ADD_COLUMNS(low_nibbles(q), 0, 0);
    ADD_COLUMNS(high_nibbles(q), 1, 0);
    ADD_COLUMNS(low_nibbles(q + 64), 0, 1);
    ADD_COLUMNS(high_nibbles(q + 64), 1, 1);
    ADD_COLUMNS(low_nibbles(q + 128), 0, 2);
    ADD_COLUMNS(high_nibbles(q + 128), 1, 2);
    ADD_COLUMNS(low_nibbles(q + 192), 0, 3);
    ADD_COLUMNS(high_nibbles(q + 192), 1, 3);
}

TSFFN_INLINED void panel_of_blocks(panel_block * add, int block_bytes, int32_t offset, int64_t n, const uint8_t * block,
                                   int n_x, const void * const * x, float (*s)[TSFFN_PANEL_ROWS],
                                   const struct tsffn_asks * asks) {
    float32x4_t total[4][4]; // of 4 rows each, and of each vector
    for (int i = 0; i < 4; ++i) {
        for (int t = 0; t < n_x; ++t) {
            total[i][t] = vdupq_n_f32(0.0f);
        }
    }
    const int64_t n_blocks = n / TSFFN_BLOCK_SIZE;
    struct tsffn_asking asking = tsffn_asking_begin(asks, n_blocks);
    for (int64_t b = 0; b < n_blocks; ++b, block += block_bytes) {
        tsffn_asking_step(&asking);
        struct columns v[4];
        for (int t = 0; t < n_x; ++t) {
            const int8_t * hi = tsffn_i16_hi(x[t], n) + b * TSFFN_BLOCK_SIZE;
            const int8_t * lo = tsffn_i16_lo(x[t], n) + b * TSFFN_BLOCK_SIZE;
            v[t] = (struct columns){{vld1q_s8(hi), vld1q_s8(hi + 16)}, {vld1q_s8(lo), vld1q_s8(lo + 16)}};
        }
        for (int i = 0; i < 4; ++i) { // rows 4 i .. 4 i + 3
            struct panel_sums sums;
            for (int t = 0; t < n_x; ++t) {
                sums.hi[t] = sums.lo[t] = vdupq_n_s32(0);
            }
            add(&sums, n_x, block + 2 * TSFFN_PANEL_ROWS + 16 * i, v);
            const float32x4_t d = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(block + 8 * i)));
            for (int t = 0; t < n_x; ++t) {
                const int32x4_t back = vdupq_n_s32(offset * tsffn_i16_sums(x[t], n)[b]);
                const int32x4_t products = vaddq_s32(vshlq_n_s32(sums.hi[t], 8), sums.lo[t]);
                total[i][t] = vfmaq_f32(total[i][t], d, vcvtq_f32_s32(vsubq_s32(products, back)));
            }
        }
    }
    for (int t = 0; t < n_x; ++t) {
        for (int i = 0; i < 4; ++i) {
            vst1q_f32(s[t] + 4 * i, vmulq_n_f32(total[i][t], tsffn_i16_scale(x[t])));
        }
    }
}

TSFFN_INLINED void panel_of_q8_0(int64_t n, const void * panel, int n_x, const void * const * x,
                                 float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks) {
    panel_of_blocks(add_bytes, TSFFN_PANEL_Q8_0_BYTES, 0, n, panel, n_x, x, s, asks);
}

TSFFN_INLINED void panel_of_q4_0(int64_t n, const void * panel, int n_x, const void * const * x,
                                 float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks) {
    panel_of_blocks(add_nibbles, TSFFN_PANEL_Q4_0_BYTES, 8, n, panel, n_x, x, s, asks);
}

// Q3_NL: unsigned activations of 7 bits are signed ones as well; of 4 rows at a time, a group of 16 columns is summed
// and multiplied with its scale.
#define STEP_Q3_NL(codes, G)                                                                                           \
    do {                                                                                                               \
        const int8x16_t w = vqtbl1q_s8(levels, codes);                                                                 \
        for (int t = 0; t < n_x; ++t) {                                                                                \
            hi_sum[t] = vdotq_laneq_s32(hi_sum[t], w, hi_x[t], G);                                                     \
            lo_sum[t] = vdotq_laneq_s32(lo_sum[t], w, lo_x[t], G);                                                     \
        }                                                                                                              \
    } while (0)

// The products of the group's four quads of columns.
#define GROUP_Q3_NL(half, CODES_0, CODES_1, CODES_2, CODES_3)                                                          \
    do {                                                                                                               \
        int8x16_t hi_x[4], lo_x[4];                                                                                    \
        int32x4_t hi_sum[4], lo_sum[4];                                                                                \
        for (int t = 0; t < n_x; ++t) {                                                                                \
            const int64_t j = b * TSFFN_BLOCK_SIZE + 16 * (half);                                                      \
            hi_x[t] = vreinterpretq_s8_u8(vld1q_u8(tsffn_u14_hi(x[t]) + j));                                           \
            lo_x[t] = vreinterpretq_s8_u8(vld1q_u8(tsffn_u14_lo(x[t], n) + j));                                        \
            hi_sum[t] = lo_sum[t] = vdupq_n_s32(0);                                                                    \
        }                                                                                                              \
        STEP_Q3_NL(CODES_0, 0);                                                                                        \
        STEP_Q3_NL(CODES_1, 1);                                                                                        \
        STEP_Q3_NL(CODES_2, 2);                                                                                        \
        STEP_Q3_NL(CODES_3, 3);                                                                                        \
        for (int t = 0; t < n_x; ++t) {                                                                                \
            hi_total[i][t] = vmlaq_s32(hi_total[i][t], hi_sum[t], scale[half]);                                        \
            lo_total[i][t] = vmlaq_s32(lo_total[i][t], lo_sum[t], scale[half]);                                        \
        }                                                                                                              \
    } while (0)

// The scales of rows 4 i .. 4 i + 3, of either half, with their signs.
static inline int32x4_t scales_q3_nl(const uint8_t * block, int i, int half) {
    int32_t bytes;
    __builtin_memcpy(&bytes, block + 4 * i, sizeof(bytes));
    const int8x8_t nibbles = vreinterpret_s8_s32(vdup_n_s32(bytes));
    const int8x8_t scales = half == 0 ? vshr_n_s8(vshl_n_s8(nibbles, 4), 4) : vshr_n_s8(nibbles, 4);
    return vmovl_s16(vget_low_s16(vmovl_s8(scales)));
}

TSFFN_INLINED void panel_of_q3_nl(int64_t n, const uint8_t * panel, int n_x, const void * const * x,
                                  float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks) {
    static const int8_t table[] = {TSFFN_Q3_NL_LEVELS};
    const int8x16_t levels = vld1q_s8(table);
    const uint8x16_t bits_012 = vdupq_n_u8(7), bit_2 = vdupq_n_u8(4);
    int32x4_t hi_total[4][4], lo_total[4][4]; // of 4 rows each, and of each vector
    for (int i = 0; i < 4; ++i) {
        for (int t = 0; t < n_x; ++t) {
            hi_total[i][t] = lo_total[i][t] = vdupq_n_s32(0);
        }
    }
    const int64_t n_blocks = n / TSFFN_BLOCK_SIZE;
    struct tsffn_asking asking = tsffn_asking_begin(asks, n_blocks);
    const uint8_t * block = panel + TSFFN_PANEL_Q3_NL_HEADER;
    for (int64_t b = 0; b < n_blocks; ++b, block += TSFFN_PANEL_Q3_NL_BYTES) {
        tsffn_asking_step(&asking);
        for (int i = 0; i < 4; ++i) {
            const uint8_t * q = block + TSFFN_PANEL_ROWS + 16 * i;
            const uint8x16_t q0 = vld1q_u8(q), q1 = vld1q_u8(q + 64), q2 = vld1q_u8(q + 128);
            const int32x4_t scale[2] = {scales_q3_nl(block, i, 0), scales_q3_nl(block, i, 1)};
            GROUP_Q3_NL(0, vandq_u8(q0, bits_012), vandq_u8(q1, bits_012), vandq_u8(q2, bits_012),
                        vandq_u8(vshrq_n_u8(q0, 3), bits_012));
            GROUP_Q3_NL(1, vandq_u8(vshrq_n_u8(q1, 3), bits_012), vandq_u8(vshrq_n_u8(q2, 3), bits_012),
                        vorrq_u8(vshrq_n_u8(q0, 6), vandq_u8(vshrq_n_u8(q2, 4), bit_2)),
                        vorrq_u8(vshrq_n_u8(q1, 6), vandq_u8(vshrq_n_u8(q2, 5), bit_2)));
        }
    }
    for (int i = 0; i < 4; ++i) {
        const float32x4_t d = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(panel + 8 * i)));
        for (int t = 0; t < n_x; ++t) {
            const float32x4_t sum = vfmaq_n_f32(vcvtq_f32_s32(lo_total[i][t]), vcvtq_f32_s32(hi_total[i][t]), 128.0f);
            vst1q_f32(s[t] + 4 * i, vmulq_n_f32(vmulq_f32(sum, d), tsffn_u14_scale(x[t])));
        }
    }
}

// Four vectors at most: 4 registers of activations and 2 of sums each, of 32.
TSFFN_DEFINE_PANEL(tsffn_panel_q8_0_neondot, panel_of_q8_0)
TSFFN_DEFINE_PANEL(tsffn_panel_q4_0_neondot, panel_of_q4_0)
TSFFN_DEFINE_PANEL(tsffn_panel_q3_nl_neondot, panel_of_q3_nl)

const struct tsffn_kernels tsffn_kernels_neondot = {
    .isa = TSFFN_ISA_NEONDOT,
    .name = "neondot",
    .dots =
        {
            [TSFFN_FORMAT_F32] = tsffn_dots_f32_neon,
            [TSFFN_FORMAT_F16] = tsffn_dots_f16_neon,
            [TSFFN_FORMAT_BF16] = tsffn_dots_bf16_neon,
            [TSFFN_FORMAT_Q8_0] = tsffn_dots_q8_0_neondot,
            [TSFFN_FORMAT_Q4_0] = tsffn_dots_q4_0_neondot,
        },
    .axpys =
        {
            [TSFFN_FORMAT_F32] = tsffn_axpys_f32_neon,
            [TSFFN_FORMAT_F16] = tsffn_axpys_f16_neon,
            [TSFFN_FORMAT_BF16] = tsffn_axpys_bf16_neon,
            [TSFFN_FORMAT_Q8_0] = tsffn_axpys_q8_0_neon,
            [TSFFN_FORMAT_Q4_0] = tsffn_axpys_q4_0_neon,
        },
    .panel =
        {
            [TSFFN_FORMAT_Q8_0] = tsffn_panel_q8_0_neondot,
            [TSFFN_FORMAT_Q4_0] = tsffn_panel_q4_0_neondot,
            [TSFFN_FORMAT_Q3_NL] = tsffn_panel_q3_nl_neondot,
            [TSFFN_FORMAT_BITS1] = tsffn_panel_bits1_neon,
            [TSFFN_FORMAT_BITS2] = tsffn_panel_bits2_neon,
        },
};
