// AArch64 with nothing but its baseline: NEON has fused multiply-add, f16 conversion and the 16-bit multiply-accumulate
// SMLAL.
#include "half.h"
#include "panels.h"
#include "scales_neon.h"
#include "templates.h"
#include "tiers.h"

#include <arm_neon.h>

// Eight floats.
typedef float32x4x2_t vec8;

// Eight weights of a row from column j on, and a single one.
typedef vec8 load_eight(const void * row, int64_t j);
typedef float load_one(const void * row, int64_t j);

static inline vec8 load_f32(const void * row, int64_t j) {
    const float * w = (const float *)row + j;
    return (vec8){{vld1q_f32(w), vld1q_f32(w + 4)}};
}
static inline vec8 load_f16(const void * row, int64_t j) {
    const float16x8_t h = vreinterpretq_f16_u16(vld1q_u16((const uint16_t *)row + j));
    return (vec8){{vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h)}};
}
static inline vec8 load_bf16(const void * row, int64_t j) {
    const uint16x8_t h = vld1q_u16((const uint16_t *)row + j);
    return (vec8){
        {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(h), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(h, 16))}};
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

// s + w * x
static inline vec8 fma8(vec8 s, vec8 w, vec8 x) {
    return (vec8){{vfmaq_f32(s.val[0], w.val[0], x.val[0]), vfmaq_f32(s.val[1], w.val[1], x.val[1])}};
}
static inline float32x4_t fold(vec8 s) {
    return vaddq_f32(s.val[0], s.val[1]);
}

// y[0..8) += a * w
static inline void axpy8(float a, vec8 w, float * y) {
    vst1q_f32(y, vfmaq_n_f32(vld1q_f32(y), w.val[0], a));
    vst1q_f32(y + 4, vfmaq_n_f32(vld1q_f32(y + 4), w.val[1], a));
}

// Eight accumulators of four floats: FMLA takes 4 cycles, at 2 per cycle on the common cores.
TSFFN_INLINED float dot_of_floats(load_eight * load, load_one * one, int64_t n, const void * row, const float * x) {
    vec8 s0 = {{vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)}}, s1 = s0, s2 = s0, s3 = s0;
    int64_t j = 0;
    for (; j + 32 <= n; j += 32) {
        s0 = fma8(s0, load(row, j), load_f32(x, j));
        s1 = fma8(s1, load(row, j + 8), load_f32(x, j + 8));
        s2 = fma8(s2, load(row, j + 16), load_f32(x, j + 16));
        s3 = fma8(s3, load(row, j + 24), load_f32(x, j + 24));
    }
    for (; j + 8 <= n; j += 8) {
        s0 = fma8(s0, load(row, j), load_f32(x, j));
    }
    float sum = vaddvq_f32(vaddq_f32(vaddq_f32(fold(s0), fold(s1)), vaddq_f32(fold(s2), fold(s3))));
    for (; j < n; ++j) {
        sum += one(row, j) * x[j];
    }
    return sum;
}

TSFFN_INLINED void axpy_of_floats(load_eight * load, load_one * one, int64_t n, float a, const void * row, float * y) {
    int64_t j = 0;
    for (; j + 8 <= n; j += 8) {
        axpy8(a, load(row, j), y + j);
    }
    for (; j < n; ++j) {
        y[j] += a * one(row, j);
    }
}

static float dot_f32(int64_t n, const void * row, const void * x) {
    return dot_of_floats(load_f32, one_f32, n, row, x);
}

static void axpy_f32(int64_t n, float a, const void * row, float * y) {
    axpy_of_floats(load_f32, one_f32, n, a, row, y);
}

static float dot_f16(int64_t n, const void * row, const void * x) {
    return dot_of_floats(load_f16, one_f16, n, row, x);
}

static void axpy_f16(int64_t n, float a, const void * row, float * y) {
    axpy_of_floats(load_f16, one_f16, n, a, row, y);
}

static float dot_bf16(int64_t n, const void * row, const void * x) {
    return dot_of_floats(load_bf16, one_bf16, n, row, x);
}

static void axpy_bf16(int64_t n, float a, const void * row, float * y) {
    axpy_of_floats(load_bf16, one_bf16, n, a, row, y);
}

// The 32 weights of a block without their scale.
typedef int16x8x4_t weights;

static inline weights weights_q8_0(const uint8_t * block) {
    const int8x16_t low = vld1q_s8((const int8_t *)block + 2);
    const int8x16_t high = vld1q_s8((const int8_t *)block + 18);
    return (weights){
        {vmovl_s8(vget_low_s8(low)), vmovl_high_s8(low), vmovl_s8(vget_low_s8(high)), vmovl_high_s8(high)}};
}

// q - 8 widens on the way: the 16-bit difference of the unsigned bytes is what it is as a signed number.
static inline weights weights_q4_0(const uint8_t * block) {
    const uint8x16_t q = vld1q_u8(block + 2);
    const uint8x16_t low = vandq_u8(q, vdupq_n_u8(15));
    const uint8x16_t high = vshrq_n_u8(q, 4);
    const uint8x16_t eight = vdupq_n_u8(8);
    return (weights){{
        vreinterpretq_s16_u16(vsubl_u8(vget_low_u8(low), vget_low_u8(eight))),
        vreinterpretq_s16_u16(vsubl_high_u8(low, eight)),
        vreinterpretq_s16_u16(vsubl_u8(vget_low_u8(high), vget_low_u8(eight))),
        vreinterpretq_s16_u16(vsubl_high_u8(high, eight)),
    }};
}

// Four int32 sums of the products of a block's weights with x[0..32), as floats.
static inline float32x4_t products(weights w, const int16_t * x) {
    const int16x8x4_t v = {{vld1q_s16(x), vld1q_s16(x + 8), vld1q_s16(x + 16), vld1q_s16(x + 24)}};
    int32x4_t low = vmull_s16(vget_low_s16(w.val[0]), vget_low_s16(v.val[0]));
    int32x4_t high = vmull_high_s16(w.val[0], v.val[0]);
    for (int k = 1; k < 4; ++k) {
        low = vmlal_s16(low, vget_low_s16(w.val[k]), vget_low_s16(v.val[k]));
        high = vmlal_high_s16(high, w.val[k], v.val[k]);
    }
    return vcvtq_f32_s32(vaddq_s32(low, high));
}

static inline vec8 floats(int16x8_t w) {
    return (vec8){{vcvtq_f32_s32(vmovl_s16(vget_low_s16(w))), vcvtq_f32_s32(vmovl_high_s16(w))}};
}

typedef weights block_weights(const uint8_t * block);

// sums[t] += scale * (the products of the block's weights with x[t][j..j+32))
TSFFN_INLINED void add_products_of_block(block_weights * unpack, const uint8_t * block, int n_x,
                                         const int16_t * const * x, int64_t j, float32x4_t * sums) {
    const weights w = unpack(block);
    const float scale = block_scale(block);
    for (int t = 0; t < n_x; ++t) {
        sums[t] = vfmaq_n_f32(sums[t], products(w, x[t] + j), scale);
    }
}

// Two accumulators: the sums of one block depend on nothing of the next.
TSFFN_INLINED void dots_of_blocks(block_weights * unpack, int block_bytes, int64_t n, const void * row, int n_x,
                                  const void * const * activations, float * s, const struct tsffn_asks * asks) {
    tsffn_ask_all(asks);
    const uint8_t * block = row;
    const int16_t * x[4];
    float32x4_t even[4], odd[4];
    for (int t = 0; t < n_x; ++t) {
        x[t] = tsffn_i16_values(activations[t]);
        even[t] = odd[t] = vdupq_n_f32(0.0f);
    }
    int64_t j = 0;
    for (; j + 64 <= n; j += 64, block += 2 * block_bytes) {
        add_products_of_block(unpack, block, n_x, x, j, even);
        add_products_of_block(unpack, block + block_bytes, n_x, x, j + 32, odd);
    }
    if (j < n) {
        add_products_of_block(unpack, block, n_x, x, j, even);
    }
    for (int t = 0; t < n_x; ++t) {
        s[t] = vaddvq_f32(vaddq_f32(even[t], odd[t])) * tsffn_i16_scale(activations[t]);
    }
}

TSFFN_INLINED void axpy_of_blocks(block_weights * unpack, int block_bytes, int64_t n, float a, const void * row,
                                  float * y) {
    const uint8_t * block = row;
    for (int64_t j = 0; j < n; j += TSFFN_BLOCK_SIZE, block += block_bytes) {
        const float d = a * block_scale(block);
        const weights w = unpack(block);
        for (int k = 0; k < 4; ++k) {
            axpy8(d, floats(w.val[k]), y + j + 8 * k);
        }
    }
}

TSFFN_INLINED void dots_of_q8_0(int64_t n, const void * row, int n_x, const void * const * x, float * s,
                                const struct tsffn_asks * asks) {
    dots_of_blocks(weights_q8_0, TSFFN_Q8_0_BYTES, n, row, n_x, x, s, asks);
}

static void axpy_q8_0(int64_t n, float a, const void * row, float * y) {
    axpy_of_blocks(weights_q8_0, TSFFN_Q8_0_BYTES, n, a, row, y);
}

TSFFN_INLINED void dots_of_q4_0(int64_t n, const void * row, int n_x, const void * const * x, float * s,
                                const struct tsffn_asks * asks) {
    dots_of_blocks(weights_q4_0, TSFFN_Q4_0_BYTES, n, row, n_x, x, s, asks);
}

static void axpy_q4_0(int64_t n, float a, const void * row, float * y) {
    axpy_of_blocks(weights_q4_0, TSFFN_Q4_0_BYTES, n, a, row, y);
}

// ---- rows

TSFFN_DEFINE_DOTS_ONE_BY_ONE(tsffn_dots_f32_neon, dot_f32)
TSFFN_DEFINE_DOTS_ONE_BY_ONE(tsffn_dots_f16_neon, dot_f16)
TSFFN_DEFINE_DOTS_ONE_BY_ONE(tsffn_dots_bf16_neon, dot_bf16)
TSFFN_DEFINE_DOTS(tsffn_dots_q8_0_neon, 4, dots_of_q8_0)
TSFFN_DEFINE_DOTS(tsffn_dots_q4_0_neon, 4, dots_of_q4_0)
TSFFN_DEFINE_AXPYS_ONE_BY_ONE(tsffn_axpys_f32_neon, axpy_f32)
TSFFN_DEFINE_AXPYS_ONE_BY_ONE(tsffn_axpys_f16_neon, axpy_f16)
TSFFN_DEFINE_AXPYS_ONE_BY_ONE(tsffn_axpys_bf16_neon, axpy_bf16)
TSFFN_DEFINE_AXPYS_ONE_BY_ONE(tsffn_axpys_q8_0_neon, axpy_q8_0)
TSFFN_DEFINE_AXPYS_ONE_BY_ONE(tsffn_axpys_q4_0_neon, axpy_q4_0)

// ---- panels: products of bytes added in 16 bits (SMLAL), of words in 32

// total += d * (sum4 - back) for 4 rows; d is the scales of the 4 rows.
static inline float32x4_t add_panel_block(float32x4_t total, const uint8_t * d, int32x4_t sum4, int32_t back) {
    const float32x4_t scale = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(d)));
    return vfmaq_f32(total, scale, vcvtq_f32_s32(vsubq_s32(sum4, vdupq_n_s32(back))));
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
                const int32x4_t sum4 = vaddq_s32(vshlq_n_s32(rows4(hi_sum[i]), 8), rows4(lo_sum[i]));
                total[i] = add_panel_block(total[i], block + 8 * i, sum4, 8 * sums[b]);
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
                const int32x4_t sum4 =
                    vpaddq_s32(vpaddq_s32(sum[4 * i], sum[4 * i + 1]), vpaddq_s32(sum[4 * i + 2], sum[4 * i + 3]));
                total[i] = add_panel_block(total[i], block + 8 * i, sum4, 0);
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

// BITS1, BITS2: bits of bytes (CNT), of a lane's four added in 16 bits, whose 8 bits of activations are at most 255
// * 16.
static inline uint32x4_t differing(uint32x4_t w, const uint32_t * planes, int n_planes) {
    uint16x8_t sum = vdupq_n_u16(0);
    for (int l = n_planes - 1; l >= 0; --l) {
        const uint32x4_t differ = veorq_u32(w, vdupq_n_u32(planes[l]));
        sum = vaddq_u16(vaddq_u16(sum, sum), vpaddlq_u8(vcntq_u8(vreinterpretq_u8_u32(differ))));
    }
    return vpaddlq_u16(sum);
}

static inline void panel_of_bits(int n_bits, int64_t n, const void * panel, int n_x, const void * const * x,
                                 float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks) {
    const int64_t n_blocks = n / TSFFN_BLOCK_SIZE;
    for (int t = 0; t < n_x; ++t, asks = NULL) {
        const int n_planes = tsffn_bits_planes(x[t]);
        const uint32_t *w = panel, *planes = tsffn_bits_words(x[t]);
        uint32x4_t sums[4] = {vdupq_n_u32(0), vdupq_n_u32(0), vdupq_n_u32(0), vdupq_n_u32(0)};
        struct tsffn_asking asking = tsffn_asking_begin(asks, n_blocks);
        for (int64_t b = 0; b < n_blocks; ++b, planes += n_planes) {
            tsffn_asking_step(&asking);
            for (int k = 0; k < n_bits; ++k, w += TSFFN_PANEL_ROWS) {
                for (int i = 0; i < 4; ++i) {
                    const uint32x4_t differ = differing(vld1q_u32(w + 4 * i), planes, n_planes);
                    sums[i] = vaddq_u32(sums[i], vshlq_u32(differ, vdupq_n_s32(k)));
                }
            }
        }
        const int32x4_t most = vdupq_n_s32(tsffn_bits_most(n_bits, n_planes, n));
        for (int i = 0; i < 4; ++i) {
            const int32x4_t sum = vsubq_s32(most, vshlq_n_s32(vreinterpretq_s32_u32(sums[i]), 1));
            vst1q_f32(s[t] + 4 * i, vmulq_n_f32(vcvtq_f32_s32(sum), tsffn_bits_scale(x[t])));
        }
    }
}

void tsffn_panel_bits1_neon(int64_t n, const void * panel, int n_x, const void * const * x,
                            float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks) {
    panel_of_bits(1, n, panel, n_x, x, s, asks);
}

void tsffn_panel_bits2_neon(int64_t n, const void * panel, int n_x, const void * const * x,
                            float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks) {
    panel_of_bits(2, n, panel, n_x, x, s, asks);
}

const struct tsffn_kernels tsffn_kernels_neon = {
    .isa = TSFFN_ISA_NEON,
    .name = "neon",
    .dots =
        {
            [TSFFN_FORMAT_F32] = tsffn_dots_f32_neon,
            [TSFFN_FORMAT_F16] = tsffn_dots_f16_neon,
            [TSFFN_FORMAT_BF16] = tsffn_dots_bf16_neon,
            [TSFFN_FORMAT_Q8_0] = tsffn_dots_q8_0_neon,
            [TSFFN_FORMAT_Q4_0] = tsffn_dots_q4_0_neon,
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
            [TSFFN_FORMAT_Q8_0] = tsffn_panel_q8_0_neon,
            [TSFFN_FORMAT_Q4_0] = tsffn_panel_q4_0_neon,
            [TSFFN_FORMAT_Q3_NL] = tsffn_panel_q3_nl_neon,
            [TSFFN_FORMAT_BITS1] = tsffn_panel_bits1_neon,
            [TSFFN_FORMAT_BITS2] = tsffn_panel_bits2_neon,
        },
};
