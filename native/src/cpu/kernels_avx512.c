// AVX-512 F, BW, DQ, VL. Tails are masked, so no scalar loop is needed for the float formats.
#include "gemm.h"
#include "half.h"
#include "kernels.h"

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
#define DEFINE_FLOAT_KERNELS(SUFFIX, TYPE, LOAD16)                                                                     \
    static float dot_##SUFFIX(int64_t n, const void * row, const void * activations) {                                 \
        const TYPE * w = row;                                                                                          \
        const float * x = activations;                                                                                 \
        __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;                                                    \
        int64_t j = 0;                                                                                                 \
        for (; j + 64 <= n; j += 64) {                                                                                 \
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
    static void axpy_##SUFFIX(int64_t n, float a, const void * row, float * y) {                                       \
        const TYPE * w = row;                                                                                          \
        const __m512 va = _mm512_set1_ps(a);                                                                           \
        int64_t j = 0;                                                                                                 \
        for (; j + 16 <= n; j += 16) {                                                                                 \
            _mm512_storeu_ps(y + j, _mm512_fmadd_ps(va, LOAD16(ALL, w + j), _mm512_loadu_ps(y + j)));                  \
        }                                                                                                              \
        if (j < n) {                                                                                                   \
            const __mmask16 m = TAIL(n - j);                                                                           \
            const __m512 sum = _mm512_fmadd_ps(va, LOAD16(m, w + j), _mm512_maskz_loadu_ps(m, y + j));                 \
            _mm512_mask_storeu_ps(y + j, m, sum);                                                                      \
        }                                                                                                              \
    }

DEFINE_FLOAT_KERNELS(f32, float, load16_f32)
DEFINE_FLOAT_KERNELS(f16, uint16_t, load16_f16)
DEFINE_FLOAT_KERNELS(bf16, uint16_t, load16_bf16)

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

static inline void axpy16_i8(__m512 d, __m128i q, float * y) {
    const __m512 w = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q));
    _mm512_storeu_ps(y, _mm512_fmadd_ps(d, w, _mm512_loadu_ps(y)));
}

typedef __m512 vec;
#define vec_zero _mm512_setzero_ps
#define vec_set1 _mm512_set1_ps
#define vec_fmadd _mm512_fmadd_ps
#define vec_add _mm512_add_ps
#define vec_sum _mm512_reduce_add_ps
#include "blocks_x86.h"

TSFFN_DEFINE_KERNELS(avx512, TSFFN_ISA_AVX512, stream_q8_0, stream_q4_0, dot4_q8_0, dot4_q4_0, NULL);
TSFFN_DEFINE_KERNELS(amx, TSFFN_ISA_AMX, stream_q8_0, stream_q4_0, dot4_q8_0, dot4_q4_0, &tsffn_gemm_amx);
