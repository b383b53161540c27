// Panels with the dot-product extension: SDOT multiplies 4 bytes of each of 4 rows with four activations, taken from
// one lane of a register. Nibbles stay without their offset of 8 until the end:
//   sum_j w_j q_j = sum_j (w_j + 8) q_j - 8 sum_j q_j
// By llvm-mca's model of a Neoverse N1 (not measured), 32 columns of 16 Q4_0 rows take 73 cycles so, 158 in
// panels_neon.c, and row by row 113 (rows_neondot.c) or 169 (kernels_neon.c).
#include "panels.h"

#include <arm_neon.h>

// hi and lo (kernels.h) of one block of 32 columns.
struct columns {
    int8x16_t hi[2], lo[2];
};

// acc += w . x of four columns: lane G of `half`.
#define STEP(t, w, half, G)                                                                                            \
    do {                                                                                                               \
        hi_sum[t] = vdotq_laneq_s32(hi_sum[t], w, v[t].hi[half], G);                                                   \
        lo_sum[t] = vdotq_laneq_s32(lo_sum[t], w, v[t].lo[half], G);                                                   \
    } while (0)

#define BYTES_Q8_0(N_X, half, G)                                                                                       \
    do {                                                                                                               \
        const int8x16_t w = vreinterpretq_s8_u8(vld1q_u8(q + ((half) * 4 + (G)) * 64));                                \
        for (int t = 0; t < (N_X); ++t) {                                                                              \
            STEP(t, w, half, G);                                                                                       \
        }                                                                                                              \
    } while (0)
#define PRODUCTS_Q8_0(N_X)                                                                                             \
    BYTES_Q8_0(N_X, 0, 0);                                                                                             \
    BYTES_Q8_0(N_X, 0, 1);                                                                                             \
    BYTES_Q8_0(N_X, 0, 2);                                                                                             \
    BYTES_Q8_0(N_X, 0, 3);                                                                                             \
    BYTES_Q8_0(N_X, 1, 0);                                                                                             \
    BYTES_Q8_0(N_X, 1, 1);                                                                                             \
    BYTES_Q8_0(N_X, 1, 2);                                                                                             \
    BYTES_Q8_0(N_X, 1, 3);

#define BYTES_Q4_0(N_X, G)                                                                                             \
    do {                                                                                                               \
        const uint8x16_t bytes = vld1q_u8(q + (G) * 64);                                                               \
        const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15)));                                    \
        const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4));                                              \
        for (int t = 0; t < (N_X); ++t) {                                                                              \
            STEP(t, low, 0, G);                                                                                        \
            STEP(t, high, 1, G);                                                                                       \
        }                                                                                                              \
    } while (0)
#define PRODUCTS_Q4_0(N_X)                                                                                             \
    BYTES_Q4_0(N_X, 0);                                                                                                \
    BYTES_Q4_0(N_X, 1);                                                                                                \
    BYTES_Q4_0(N_X, 2);                                                                                                \
    BYTES_Q4_0(N_X, 3);

#define DEFINE_PANEL(SUFFIX, N_X, BYTES, OFFSET, PRODUCTS)                                                             \
    static inline void SUFFIX##_##N_X(int64_t n, const uint8_t * block, const void * const * x,                        \
                                      float (*s)[TSFFN_PANEL_ROWS], const struct tsffn_asks * asks) {                  \
        float32x4_t total[4][N_X];                                                                                     \
        for (int i = 0; i < 4; ++i) {                                                                                  \
            for (int t = 0; t < (N_X); ++t) {                                                                          \
                total[i][t] = vdupq_n_f32(0.0f);                                                                       \
            }                                                                                                          \
        }                                                                                                              \
        const int64_t n_blocks = n / TSFFN_BLOCK_SIZE;                                                                 \
        struct tsffn_asking asking = tsffn_asking_begin(asks, n_blocks);                                               \
        for (int64_t b = 0; b < n_blocks; ++b, block += (BYTES)) {                                                     \
            tsffn_asking_step(&asking);                                                                                \
            struct columns v[N_X];                                                                                     \
            for (int t = 0; t < (N_X); ++t) {                                                                          \
                const int8_t * hi = tsffn_i16_hi(x[t], n) + b * TSFFN_BLOCK_SIZE;                                      \
                const int8_t * lo = tsffn_i16_lo(x[t], n) + b * TSFFN_BLOCK_SIZE;                                      \
                v[t] = (struct columns){{vld1q_s8(hi), vld1q_s8(hi + 16)}, {vld1q_s8(lo), vld1q_s8(lo + 16)}};         \
            }                                                                                                          \
            for (int i = 0; i < 4; ++i) { /* rows 4 i .. 4 i + 3 */                                                    \
                const uint8_t * q = block + 2 * TSFFN_PANEL_ROWS + 16 * i;                                             \
                int32x4_t hi_sum[N_X], lo_sum[N_X];                                                                    \
                for (int t = 0; t < (N_X); ++t) {                                                                      \
                    hi_sum[t] = lo_sum[t] = vdupq_n_s32(0);                                                            \
                }                                                                                                      \
                PRODUCTS(N_X)                                                                                          \
                const float32x4_t d = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(block + 8 * i)));                       \
                for (int t = 0; t < (N_X); ++t) {                                                                      \
                    const int32x4_t back = vdupq_n_s32((OFFSET) * tsffn_i16_sums(x[t], n)[b]);                         \
                    const int32x4_t products = vaddq_s32(vshlq_n_s32(hi_sum[t], 8), lo_sum[t]);                        \
                    total[i][t] = vfmaq_f32(total[i][t], d, vcvtq_f32_s32(vsubq_s32(products, back)));                 \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        for (int t = 0; t < (N_X); ++t) {                                                                              \
            for (int i = 0; i < 4; ++i) {                                                                              \
                vst1q_f32(s[t] + 4 * i, vmulq_n_f32(total[i][t], tsffn_i16_scale(x[t])));                              \
            }                                                                                                          \
        }                                                                                                              \
    }

// Four vectors at most: 4 registers of activations and 2 of sums each, of 32.
TSFFN_DEFINE_PANELS_BY_FOUR(q8_0, neondot, TSFFN_PANEL_Q8_0_BYTES, 0, PRODUCTS_Q8_0)
TSFFN_DEFINE_PANELS_BY_FOUR(q4_0, neondot, TSFFN_PANEL_Q4_0_BYTES, 8, PRODUCTS_Q4_0)

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

TSFFN_INLINED void q3_nl(int64_t n, const uint8_t * panel, int n_x, const void * const * x,
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

TSFFN_DEFINE_PANELS_INLINED(q3_nl, neondot)
