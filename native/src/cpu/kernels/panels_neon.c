// Panels with what every AArch64 has: products of bytes added in 16 bits (SMLAL), of words in 32.
#include "panels.h"

#include <arm_neon.h>

// total += d * (products - back) for 4 rows; d is the scales of the 4 rows.
static inline float32x4_t add_block(float32x4_t total, const uint8_t * d, int32x4_t products, int32_t back) {
    const float32x4_t scale = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(d)));
    return vfmaq_f32(total, scale, vcvtq_f32_s32(vsubq_s32(products, vdupq_n_s32(back))));
}

// Bytes x[0..4), four times.
static inline int8x16_t four(const int8_t * x) {
    int32_t bytes;
    __builtin_memcpy(&bytes, x, sizeof(bytes));
    return vreinterpretq_s8_s32(vdupq_n_s32(bytes));
}

// The sums of products of 4 rows with hi or lo: 16 bits each, of column mod 4, two rows to a vector.
struct sums16 {
    int16x8_t rows01, rows23;
};

static inline struct sums16 add16(struct sums16 s, int8x16_t w, int8x16_t x) {
    s.rows01 = vmlal_s8(s.rows01, vget_low_s8(w), vget_low_s8(x));
    s.rows23 = vmlal_high_s8(s.rows23, w, x);
    return s;
}

// A sum of 8 products is 8 * 15 * 128 at most, and the sum of two such sums fits 16 bits as well.
static inline int32x4_t rows4(struct sums16 s) {
    return vpaddlq_s16(vpaddq_s16(s.rows01, s.rows23));
}

void tsffn_panel_q4_0_neon(int64_t n, const void * panel, int n_x, const void * const * x, float (*s)[TSFFN_PANEL_ROWS],
                           const struct tsffn_asks * asks) {
    const int64_t n_blocks = n / TSFFN_BLOCK_SIZE;
    for (int t = 0; t < n_x; ++t, asks = NULL) {
        const uint8_t * block = panel;
        const int8_t * hi = tsffn_i16_hi(x[t], n);
        const int8_t * lo = tsffn_i16_lo(x[t], n);
        const int32_t * sums = tsffn_i16_sums(x[t], n);
        float32x4_t total[4];
        for (int i = 0; i < 4; ++i) {
            total[i] = vdupq_n_f32(0.0f);
        }
        struct tsffn_asking asking = tsffn_asking_begin(asks, n_blocks);
        for (int64_t b = 0; b < n_blocks; ++b, hi += 32, lo += 32, block += TSFFN_PANEL_Q4_0_BYTES) {
            tsffn_asking_step(&asking);
            const uint8_t * q = block + 2 * TSFFN_PANEL_ROWS;
            const struct sums16 zero = {vdupq_n_s16(0), vdupq_n_s16(0)};
            struct sums16 hi_sum[4] = {zero, zero, zero, zero}, lo_sum[4] = {zero, zero, zero, zero};
            for (int g = 0; g < 4; ++g, q += 64) {
                const int8x16_t hi_0 = four(hi + 4 * g), hi_1 = four(hi + 16 + 4 * g);
                const int8x16_t lo_0 = four(lo + 4 * g), lo_1 = four(lo + 16 + 4 * g);
                for (int i = 0; i < 4; ++i) {
                    const uint8x16_t bytes = vld1q_u8(q + 16 * i);
                    const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15)));
                    const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4));
                    hi_sum[i] = add16(add16(hi_sum[i], low, hi_0), high, hi_1);
                    lo_sum[i] = add16(add16(lo_sum[i], low, lo_0), high, lo_1);
                }
            }
            for (int i = 0; i < 4; ++i) {
                const int32x4_t products = vaddq_s32(vshlq_n_s32(rows4(hi_sum[i]), 8), rows4(lo_sum[i]));
                total[i] = add_block(total[i], block + 8 * i, products, 8 * sums[b]);
            }
        }
        for (int i = 0; i < 4; ++i) {
            vst1q_f32(s[t] + 4 * i, vmulq_n_f32(total[i], tsffn_i16_scale(x[t])));
        }
    }
}

// Bytes times bytes overflow sums of 16 bits: the weights are widened instead, and the activations taken as words.
void tsffn_panel_q8_0_neon(int64_t n, const void * panel, int n_x, const void * const * x, float (*s)[TSFFN_PANEL_ROWS],
                           const struct tsffn_asks * asks) {
    const int64_t n_blocks = n / TSFFN_BLOCK_SIZE;
    for (int t = 0; t < n_x; ++t, asks = NULL) {
        const uint8_t * block = panel;
        const int16_t * words = tsffn_i16_values(x[t]);
        float32x4_t total[4];
        for (int i = 0; i < 4; ++i) {
            total[i] = vdupq_n_f32(0.0f);
        }
        struct tsffn_asking asking = tsffn_asking_begin(asks, n_blocks);
        for (int64_t b = 0; b < n_blocks; ++b, words += 32, block += TSFFN_PANEL_Q8_0_BYTES) {
            tsffn_asking_step(&asking);
            const int8_t * q = (const int8_t *)block + 2 * TSFFN_PANEL_ROWS;
            int32x4_t sum[TSFFN_PANEL_ROWS]; // of each row, by column mod 4
            for (int i = 0; i < TSFFN_PANEL_ROWS; ++i) {
                sum[i] = vdupq_n_s32(0);
            }
            for (int g = 0; g < 8; ++g, q += 64) {
                const int16x4_t v = vld1_s16(words + 4 * g);
                const int16x8_t vv = vcombine_s16(v, v);
                for (int i = 0; i < 4; ++i) {
                    const int8x16_t bytes = vld1q_s8(q + 16 * i);
                    const int16x8_t rows01 = vmovl_s8(vget_low_s8(bytes));
                    const int16x8_t rows23 = vmovl_high_s8(bytes);
                    sum[4 * i] = vmlal_s16(sum[4 * i], vget_low_s16(rows01), v);
                    sum[4 * i + 1] = vmlal_high_s16(sum[4 * i + 1], rows01, vv);
                    sum[4 * i + 2] = vmlal_s16(sum[4 * i + 2], vget_low_s16(rows23), v);
                    sum[4 * i + 3] = vmlal_high_s16(sum[4 * i + 3], rows23, vv);
                }
            }
            for (int i = 0; i < 4; ++i) {
                const int32x4_t products =
                    vpaddq_s32(vpaddq_s32(sum[4 * i], sum[4 * i + 1]), vpaddq_s32(sum[4 * i + 2], sum[4 * i + 3]));
                total[i] = add_block(total[i], block + 8 * i, products, 0);
            }
        }
        for (int i = 0; i < 4; ++i) {
            vst1q_f32(s[t] + 4 * i, vmulq_n_f32(total[i], tsffn_i16_scale(x[t])));
        }
    }
}

// Q3_NL: the sums of 16 columns fit 16 bits before they are multiplied with the group's scale.
struct totals {
    int32x4_t hi[4], lo[4]; // of 4 rows each
};

// The codes of four columns of 4 rows, as panels.h has them in q[0], q[1], q[2].
static inline uint8x16_t codes_q3_nl(const uint8_t * q, int g) {
    const uint8x16_t bits_012 = vdupq_n_u8(7), bit_2 = vdupq_n_u8(4);
    switch (g) {
    case 0:
    case 1:
    case 2:
        return vandq_u8(vld1q_u8(q + 64 * g), bits_012);
    case 3:
    case 4:
    case 5:
        return vandq_u8(vshrq_n_u8(vld1q_u8(q + 64 * (g - 3)), 3), bits_012);
    case 6:
        return vorrq_u8(vshrq_n_u8(vld1q_u8(q), 6), vandq_u8(vshrq_n_u8(vld1q_u8(q + 128), 4), bit_2));
    default:
        return vorrq_u8(vshrq_n_u8(vld1q_u8(q + 64), 6), vandq_u8(vshrq_n_u8(vld1q_u8(q + 128), 5), bit_2));
    }
}

static inline void add_half_block_q3_nl(struct totals * total, const uint8_t * q, int half, int8x16_t scales,
                                        const uint8_t * hi, const uint8_t * lo) {
    static const int8_t table[] = {TSFFN_Q3_NL_LEVELS};
    const int8x16_t levels = vld1q_s8(table);
    const struct sums16 zero = {vdupq_n_s16(0), vdupq_n_s16(0)};
    struct sums16 hi_sum[4] = {zero, zero, zero, zero}, lo_sum[4] = {zero, zero, zero, zero};
    for (int g = 0; g < 4; ++g) {
        const int8x16_t hi_x = four((const int8_t *)hi + 4 * g), lo_x = four((const int8_t *)lo + 4 * g);
        for (int i = 0; i < 4; ++i) {
            const int8x16_t w = vqtbl1q_s8(levels, codes_q3_nl(q + 16 * i, 4 * half + g));
            hi_sum[i] = add16(hi_sum[i], w, hi_x);
            lo_sum[i] = add16(lo_sum[i], w, lo_x);
        }
    }
    const int16x8_t words[2] = {vmovl_s8(vget_low_s8(scales)), vmovl_high_s8(scales)};
    for (int i = 0; i < 4; ++i) {
        const int16x4_t rows = i % 2 == 0 ? vget_low_s16(words[i / 2]) : vget_high_s16(words[i / 2]);
        const int32x4_t scale = vmovl_s16(rows);
        total->hi[i] = vmlaq_s32(total->hi[i], rows4(hi_sum[i]), scale);
        total->lo[i] = vmlaq_s32(total->lo[i], rows4(lo_sum[i]), scale);
    }
}

void tsffn_panel_q3_nl_neon(int64_t n, const void * panel, int n_x, const void * const * x,
                            float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks) {
    const int64_t n_blocks = n / TSFFN_BLOCK_SIZE;
    for (int t = 0; t < n_x; ++t, asks = NULL) {
        const uint8_t * block = (const uint8_t *)panel + TSFFN_PANEL_Q3_NL_HEADER;
        const uint8_t *hi = tsffn_u14_hi(x[t]), *lo = tsffn_u14_lo(x[t], n);
        struct totals total;
        for (int i = 0; i < 4; ++i) {
            total.hi[i] = total.lo[i] = vdupq_n_s32(0);
        }
        struct tsffn_asking asking = tsffn_asking_begin(asks, n_blocks);
        for (int64_t b = 0; b < n_blocks; ++b, hi += 32, lo += 32, block += TSFFN_PANEL_Q3_NL_BYTES) {
            tsffn_asking_step(&asking);
            const int8x16_t nibbles = vreinterpretq_s8_u8(vld1q_u8(block));
            const uint8_t * q = block + TSFFN_PANEL_ROWS;
            add_half_block_q3_nl(&total, q, 0, vshrq_n_s8(vshlq_n_s8(nibbles, 4), 4), hi, lo);
            add_half_block_q3_nl(&total, q, 1, vshrq_n_s8(nibbles, 4), hi + 16, lo + 16);
        }
        for (int i = 0; i < 4; ++i) {
            const float32x4_t sum = vfmaq_n_f32(vcvtq_f32_s32(total.lo[i]), vcvtq_f32_s32(total.hi[i]), 128.0f);
            const float32x4_t d = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8((const uint8_t *)panel + 8 * i)));
            vst1q_f32(s[t] + 4 * i, vmulq_n_f32(vmulq_f32(sum, d), tsffn_u14_scale(x[t])));
        }
    }
}
