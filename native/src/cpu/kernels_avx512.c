// AVX-512 F, BW, DQ, VL. Tails are masked, so no scalar loop is needed for the float formats.
#include "asks.h"
#include "gemm.h"
#include "half.h"
#include "kernels.h"
#include "rows_avx512.h"

#include <immintrin.h>

static inline __m512 load16_f32(__mmask16 m, const float * w) {
    return _mm512_maskz_loadu_ps(m, w);
}
static inline __m512 load16_f16(__mmask16 m, const uint16_t * w) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, w));
}
static inline __m512 load16_bf16(__mmask16 m, const uint16_t * w) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, w)), 16));
}

#define ALL ((__mmask16)0xffff)
#define TAIL(count) ((__mmask16)((1u << (count)) - 1u))

// One dot and one axpy per element type: TYPE is the storage type, LOAD16 widens 16 of them under a mask.
#define DEFINE_FLOAT_KERNELS(DOT, AXPY, SUFFIX, TYPE, LOAD16, ASKS, BEGIN, ASK)                                        \
    static float DOT##_##SUFFIX(int64_t n, const void * row, const void * activations ASKS()) {                        \
        BEGIN(n / 64);                                                                                                 \
        const TYPE * w = row;                                                                                          \
        const float * x = activations;                                                                                 \
        __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;                                                    \
        int64_t j = 0;                                                                                                 \
        for (; j + 64 <= n; j += 64) {                                                                                 \
            ASK();                                                                                                     \
            s0 = _mm512_fmadd_ps(LOAD16(ALL, w + j), _mm512_loadu_ps(x + j), s0);                                      \
            s1 = _mm512_fmadd_ps(LOAD16(ALL, w + j + 16), _mm512_loadu_ps(x + j + 16), s1);                            \
            s2 = _mm512_fmadd_ps(LOAD16(ALL, w + j + 32), _mm512_loadu_ps(x + j + 32), s2);                            \
            s3 = _mm512_fmadd_ps(LOAD16(ALL, w + j + 48), _mm512_loadu_ps(x + j + 48), s3);                            \
        }                                                                                                              \
        for (; j + 16 <= n; j += 16) {                                                                                 \
            s0 = _mm512_fmadd_ps(LOAD16(ALL, w + j), _mm512_loadu_ps(x + j), s0);                                      \
        }                                                                                                              \
        if (j < n) {                                                                                                   \
            const __mmask16 m = TAIL(n - j);                                                                           \
            s1 = _mm512_fmadd_ps(LOAD16(m, w + j), _mm512_maskz_loadu_ps(m, x + j), s1);                               \
        }                                                                                                              \
        return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s0, s1), _mm512_add_ps(s2, s3)));                      \
    }                                                                                                                  \
    static void AXPY##_##SUFFIX(int64_t n, float a, const void * row, float * y ASKS()) {                              \
        BEGIN((n + 63) / 64);                                                                                          \
        const TYPE * w = row;                                                                                          \
        const __m512 va = _mm512_set1_ps(a);                                                                           \
        int64_t j = 0;                                                                                                 \
        for (; j + 16 <= n; j += 16) {                                                                                 \
            if (j % 64 == 0) {                                                                                         \
                ASK();                                                                                                 \
            }                                                                                                          \
            _mm512_storeu_ps(y + j, _mm512_fmadd_ps(va, LOAD16(ALL, w + j), _mm512_loadu_ps(y + j)));                  \
        }                                                                                                              \
        if (j < n) {                                                                                                   \
            const __mmask16 m = TAIL(n - j);                                                                           \
            const __m512 sum = _mm512_fmadd_ps(va, LOAD16(m, w + j), _mm512_maskz_loadu_ps(m, y + j));                 \
            _mm512_mask_storeu_ps(y + j, m, sum);                                                                      \
        }                                                                                                              \
    }

#define DEFINE_FORMATS(DOT, AXPY, ASKS, BEGIN, ASK)                                                                    \
    DEFINE_FLOAT_KERNELS(DOT, AXPY, f32, float, load16_f32, ASKS, BEGIN, ASK)                                          \
    DEFINE_FLOAT_KERNELS(DOT, AXPY, f16, uint16_t, load16_f16, ASKS, BEGIN, ASK)                                       \
    DEFINE_FLOAT_KERNELS(DOT, AXPY, bf16, uint16_t, load16_bf16, ASKS, BEGIN, ASK)
DEFINE_FORMATS(dot, axpy, NO_ASKS, BEGIN_NOTHING, ASK_NOTHING)
DEFINE_FORMATS(dot_asking, axpy_asking, WITH_ASKS, BEGIN_ASKING, ASK_STEP)

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

static inline void axpy16(__m512 d, __m512 w, float * y) {
    _mm512_storeu_ps(y, _mm512_fmadd_ps(d, w, _mm512_loadu_ps(y)));
}

static inline void axpy_block_q8_0(__m512 d, const uint8_t * q, float * y) {
    for (int half = 0; half < 2; ++half) {
        const __m128i bytes = _mm_loadu_si128((const __m128i *)(q + 16 * half));
        axpy16(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), y + 16 * half);
    }
}

// The values of a nibble, by the nibble: VPERMPS looks at the low four bits of an index only, and saves masking,
// subtracting and converting.
static inline __m512 nibble_values(void) {
    return _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
}

// y[0..32) += d * w
static inline void axpy_block_q4_0(__m512 d, const uint8_t * nibbles, float * y) {
    const __m512i q = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)nibbles));
    axpy16(d, _mm512_permutexvar_ps(q, nibble_values()), y);
    axpy16(d, _mm512_permutexvar_ps(_mm512_srli_epi32(q, 4), nibble_values()), y + 16);
}

enum { SCALES = 4 * TSFFN_Q4_0_QUADS };

// a times the scales of a row's next blocks, at most SCALES.
static inline void scales_q4_0(int64_t blocks, float a, const uint8_t * block, float * scales) {
    if (blocks >= SCALES) {
        _mm512_storeu_ps(scales, _mm512_mul_ps(_mm512_set1_ps(a), scales_of_quads(block, TSFFN_Q4_0_QUADS)));
        return;
    }
    for (int64_t b = 0; b < blocks; ++b, block += TSFFN_Q4_0_BYTES) {
        scales[b] = a * _cvtsh_ss(tsffn_load_u16(block));
    }
}

// The scales of 16 blocks are made together and broadcast by loads: the ports of the shuffles are what bounds this.
// Asking once in four blocks instead of in each saves a fifth.
#define DEFINE_AXPY_Q4_0(NAME, ASKS, BEGIN, ASK)                                                                       \
    static void NAME(int64_t n, float a, const void * row, float * y ASKS()) {                                         \
        enum { STEP = 4 };                                                                                             \
        BEGIN((n / TSFFN_BLOCK_SIZE + STEP - 1) / STEP);                                                               \
        const uint8_t * block = row;                                                                                   \
        float d[SCALES];                                                                                               \
        for (int64_t left = n / TSFFN_BLOCK_SIZE; left > 0; left -= SCALES) {                                          \
            const int64_t blocks = left < SCALES ? left : SCALES;                                                      \
            scales_q4_0(left, a, block, d);                                                                            \
            for (int64_t b = 0; b < blocks; ++b, block += TSFFN_Q4_0_BYTES, y += TSFFN_BLOCK_SIZE) {                   \
                if (b % STEP == 0) {                                                                                   \
                    ASK();                                                                                             \
                }                                                                                                      \
                axpy_block_q4_0(_mm512_set1_ps(d[b]), block + 2, y);                                                   \
            }                                                                                                          \
        }                                                                                                              \
    }
DEFINE_AXPY_Q4_0(axpy_q4_0, NO_ASKS, BEGIN_NOTHING, ASK_NOTHING)
DEFINE_AXPY_Q4_0(axpy_asking_q4_0, WITH_ASKS, BEGIN_ASKING, ASK_STEP)

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

#define widen_f32(w) load16_f32(ALL, w)
#define widen_f16(w) load16_f16(ALL, w)
#define widen_bf16(w) load16_bf16(ALL, w)
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
#include "blocks_x86.h"
#include "panels.h"
#include "unpacked.h"

TSFFN_DEFINE_KERNELS(avx512, TSFFN_ISA_AVX512, TSFFN_ASKING_KERNELS, .dot4 = TSFFN_BLOCK_KERNELS(dot4_q8_0, dot4_q4_0),
                     TSFFN_UNPACKED_KERNELS,
                     .panel = TSFFN_BLOCK_KERNELS(tsffn_panel_q8_0_avx2, tsffn_panel_q4_0_avx2));

#define DEFINE_VNNI_KERNELS(tier, tier_isa, ...)                                                                       \
    const struct tsffn_kernels tsffn_kernels_##tier = {                                                                \
        .isa = (tier_isa),                                                                                             \
        .name = #tier,                                                                                                 \
        .dot = {dot_f32, dot_f16, dot_bf16, dot_q8_0, tsffn_dot_q4_0_avx512vnni},                                      \
        .dot4 = TSFFN_BLOCK_KERNELS(dot4_q8_0, tsffn_dot4_q4_0_avx512vnni),                                            \
        .axpy = {axpy_f32, axpy_f16, axpy_bf16, axpy_q8_0, axpy_q4_0},                                                 \
        .dot_asking = {dot_asking_f32, dot_asking_f16, dot_asking_bf16, dot_asking_q8_0,                               \
                       tsffn_dot_asking_q4_0_avx512vnni},                                                              \
        .axpy_asking = {axpy_asking_f32, axpy_asking_f16, axpy_asking_bf16, axpy_asking_q8_0, axpy_asking_q4_0},       \
        TSFFN_UNPACKED_KERNELS,                                                                                        \
        .panel = TSFFN_BLOCK_KERNELS(tsffn_panel_q8_0_##tier, tsffn_panel_q4_0_##tier),                                \
        __VA_ARGS__}

DEFINE_VNNI_KERNELS(avx512vnni, TSFFN_ISA_AVX512VNNI, );
DEFINE_VNNI_KERNELS(amx, TSFFN_ISA_AMX, .gemm = &tsffn_gemm_amx);
