// AArch64 with nothing but its baseline: NEON has fused multiply-add, f16 conversion and the 16-bit multiply-accumulate
// SMLAL.
#include "half.h"
#include "kernels.h"
#include "panels.h"
#include "rows_neondot.h"

#include <arm_neon.h>

// Eight floats.
typedef float32x4x2_t vec8;

static inline vec8 load8_f32(const float * w) {
    return (vec8){{vld1q_f32(w), vld1q_f32(w + 4)}};
}
static inline vec8 load8_f16(const uint16_t * w) {
    const float16x8_t h = vreinterpretq_f16_u16(vld1q_u16(w));
    return (vec8){{vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h)}};
}
static inline vec8 load8_bf16(const uint16_t * w) {
    const uint16x8_t h = vld1q_u16(w);
    return (vec8){
        {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(h), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(h, 16))}};
}
static inline float one_f32(float w) {
    return w;
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

// dots and axpys of an element type: TYPE is the storage type, LOAD8 widens 8 of them, ONE widens a single one.
// Eight accumulators of four floats: FMLA takes 4 cycles, at 2 per cycle on the common cores.
#define DEFINE_FLOAT_KERNELS(SUFFIX, TYPE, LOAD8, ONE)                                                                 \
    static float dot_##SUFFIX(int64_t n, const void * row, const void * activations) {                                 \
        const TYPE * w = row;                                                                                          \
        const float * x = activations;                                                                                 \
        vec8 s0 = {{vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)}}, s1 = s0, s2 = s0, s3 = s0;                                 \
        int64_t j = 0;                                                                                                 \
        for (; j + 32 <= n; j += 32) {                                                                                 \
            s0 = fma8(s0, LOAD8(w + j), load8_f32(x + j));                                                             \
            s1 = fma8(s1, LOAD8(w + j + 8), load8_f32(x + j + 8));                                                     \
            s2 = fma8(s2, LOAD8(w + j + 16), load8_f32(x + j + 16));                                                   \
            s3 = fma8(s3, LOAD8(w + j + 24), load8_f32(x + j + 24));                                                   \
        }                                                                                                              \
        for (; j + 8 <= n; j += 8) {                                                                                   \
            s0 = fma8(s0, LOAD8(w + j), load8_f32(x + j));                                                             \
        }                                                                                                              \
        float sum = vaddvq_f32(vaddq_f32(vaddq_f32(fold(s0), fold(s1)), vaddq_f32(fold(s2), fold(s3))));               \
        for (; j < n; ++j) {                                                                                           \
            sum += ONE(w[j]) * x[j];                                                                                   \
        }                                                                                                              \
        return sum;                                                                                                    \
    }                                                                                                                  \
    TSFFN_DEFINE_DOTS_ONE_BY_ONE(dots_##SUFFIX, dot_##SUFFIX)                                                          \
    static void axpy_##SUFFIX(int64_t n, float a, const void * row, float * y) {                                       \
        const TYPE * w = row;                                                                                          \
        int64_t j = 0;                                                                                                 \
        for (; j + 8 <= n; j += 8) {                                                                                   \
            axpy8(a, LOAD8(w + j), y + j);                                                                             \
        }                                                                                                              \
        for (; j < n; ++j) {                                                                                           \
            y[j] += a * ONE(w[j]);                                                                                     \
        }                                                                                                              \
    }                                                                                                                  \
    TSFFN_DEFINE_AXPYS_ONE_BY_ONE(axpys_##SUFFIX, axpy_##SUFFIX)

DEFINE_FLOAT_KERNELS(f32, float, load8_f32, one_f32)
DEFINE_FLOAT_KERNELS(f16, uint16_t, load8_f16, tsffn_f16_to_f32)
DEFINE_FLOAT_KERNELS(bf16, uint16_t, load8_bf16, tsffn_bf16_to_f32)

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

// sums[t] += scale * (the products of the block's weights with x[t][j..j+32))
#define ADD_BLOCK_PRODUCTS(SUFFIX, sums, block, j)                                                                     \
    do {                                                                                                               \
        const weights w = weights_##SUFFIX(block);                                                                     \
        const float scale = block_scale(block);                                                                        \
        for (int t = 0; t < n_x; ++t) {                                                                                \
            sums[t] = vfmaq_n_f32(sums[t], products(w, x[t] + (j)), scale);                                            \
        }                                                                                                              \
    } while (0)

// Two accumulators: the sums of one block depend on nothing of the next.
#define DEFINE_BLOCK_KERNELS(SUFFIX, BYTES)                                                                            \
    TSFFN_INLINED void dots_of_##SUFFIX(int64_t n, const void * row, int n_x, const void * const * activations,        \
                                        float * s, const struct tsffn_asks * asks) {                                   \
        tsffn_ask_all(asks);                                                                                           \
        const uint8_t * block = row;                                                                                   \
        const int16_t * x[4];                                                                                          \
        float32x4_t even[4], odd[4];                                                                                   \
        for (int t = 0; t < n_x; ++t) {                                                                                \
            x[t] = tsffn_i16_values(activations[t]);                                                                   \
            even[t] = odd[t] = vdupq_n_f32(0.0f);                                                                      \
        }                                                                                                              \
        int64_t j = 0;                                                                                                 \
        for (; j + 64 <= n; j += 64, block += 2 * (BYTES)) {                                                           \
            ADD_BLOCK_PRODUCTS(SUFFIX, even, block, j);                                                                \
            ADD_BLOCK_PRODUCTS(SUFFIX, odd, block + (BYTES), j + 32);                                                  \
        }                                                                                                              \
        if (j < n) {                                                                                                   \
            ADD_BLOCK_PRODUCTS(SUFFIX, even, block, j);                                                                \
        }                                                                                                              \
        for (int t = 0; t < n_x; ++t) {                                                                                \
            s[t] = vaddvq_f32(vaddq_f32(even[t], odd[t])) * tsffn_i16_scale(activations[t]);                           \
        }                                                                                                              \
    }                                                                                                                  \
    static TSFFN_DEFINE_DOTS(dots_##SUFFIX, 4, dots_of_##SUFFIX) static void axpy_##SUFFIX(                            \
        int64_t n, float a, const void * row, float * y) {                                                             \
        const uint8_t * block = row;                                                                                   \
        for (int64_t j = 0; j < n; j += TSFFN_BLOCK_SIZE, block += (BYTES)) {                                          \
            const float d = a * block_scale(block);                                                                    \
            const weights w = weights_##SUFFIX(block);                                                                 \
            for (int k = 0; k < 4; ++k) {                                                                              \
                axpy8(d, floats(w.val[k]), y + j + 8 * k);                                                             \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    TSFFN_DEFINE_AXPYS_ONE_BY_ONE(axpys_##SUFFIX, axpy_##SUFFIX)

DEFINE_BLOCK_KERNELS(q8_0, TSFFN_Q8_0_BYTES)
DEFINE_BLOCK_KERNELS(q4_0, TSFFN_Q4_0_BYTES)

TSFFN_DEFINE_KERNELS(neon, TSFFN_ISA_NEON, .panel = TSFFN_PANELS(neon));

const struct tsffn_kernels tsffn_kernels_neondot = {
    .isa = TSFFN_ISA_NEONDOT,
    .name = "neondot",
    .dots = {dots_f32, dots_f16, dots_bf16, tsffn_dots_q8_0_neondot, tsffn_dots_q4_0_neondot},
    .axpys = TSFFN_AXPYS,
    .panel = TSFFN_PANELS(neondot),
};
