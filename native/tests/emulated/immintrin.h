// The x86 intrinsics of the kernels in plain C, for test_x86 on processors that lack them: SIMDe's, and here those that
// SIMDe 0.7.4 does not have, or has with other rounding. The native ones are not included at all.
#ifndef TSFFN_EMULATED_IMMINTRIN_H
#define TSFFN_EMULATED_IMMINTRIN_H

#define SIMDE_NO_NATIVE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <math.h>
#include <stdint.h>
#include <string.h>

// Aliases that are macros with arguments, which the kernels give by a macro; and one that is wrong.
#undef _mm_setr_epi8
#undef _mm512_madd_epi16
#define _mm_setr_epi8 simde_mm_setr_epi8
#define _mm512_madd_epi16 simde_mm512_madd_epi16

typedef uint16_t __mmask16;
typedef uint32_t __mmask32;
#define __m512bh __m512i

// A function NAME(vector) that converts N elements of type FROM to type TO.
#define EMULATED_CONVERSION(name, from_vector, from, to_vector, to, n)                                                 \
    static inline to_vector name(from_vector a) {                                                                      \
        from x[n];                                                                                                     \
        to y[n];                                                                                                       \
        memcpy(x, &a, sizeof(x));                                                                                      \
        for (int i = 0; i < (n); ++i) {                                                                                \
            y[i] = (to)x[i];                                                                                           \
        }                                                                                                              \
        to_vector result;                                                                                              \
        memcpy(&result, y, sizeof(y));                                                                                 \
        return result;                                                                                                 \
    }
EMULATED_CONVERSION(emulated_cvtepi32_ps, __m512i, int32_t, __m512, float, 16)
EMULATED_CONVERSION(emulated_cvtph_ps, __m256i, _Float16, __m512, float, 16)
EMULATED_CONVERSION(emulated_cvtepu8_epi32, __m128i, uint8_t, __m512i, int32_t, 16)
EMULATED_CONVERSION(emulated_cvtepi8_epi32, __m128i, int8_t, __m512i, int32_t, 16)
EMULATED_CONVERSION(emulated_cvtepu16_epi32, __m256i, uint16_t, __m512i, int32_t, 16)
EMULATED_CONVERSION(emulated_cvtepu8_epi16, __m256i, uint8_t, __m512i, int16_t, 32)
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtph_ps
#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepu8_epi16
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_cvtepu8_epi32 emulated_cvtepu8_epi32
#define _mm512_cvtepi8_epi32 emulated_cvtepi8_epi32
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32
#define _mm512_cvtepu8_epi16 emulated_cvtepu8_epi16

static inline float emulated_cvtsh_ss(uint16_t bits) {
    _Float16 half;
    memcpy(&half, &bits, sizeof(half));
    return (float)half;
}
#undef _cvtsh_ss
#define _cvtsh_ss emulated_cvtsh_ss

// Halves added until one is left, as compilers do.
static inline float emulated_reduce_add_ps(__m512 a) {
    float x[16];
    memcpy(x, &a, sizeof(x));
    for (int n = 8; n > 0; n /= 2) {
        for (int i = 0; i < n; ++i) {
            x[i] += x[i + n];
        }
    }
    return x[0];
}
#undef _mm512_reduce_add_ps
#define _mm512_reduce_add_ps emulated_reduce_add_ps

// Memory behind elements that are masked out is not touched.
#define EMULATED_MASKZ_LOAD(name, vector, element, n)                                                                  \
    static inline vector name(uint32_t mask, const void * p) {                                                         \
        element x[n] = {0};                                                                                            \
        for (int i = 0; i < (n); ++i) {                                                                                \
            if ((mask >> i & 1) != 0) {                                                                                \
                memcpy(&x[i], (const char *)p + (size_t)i * sizeof(x[0]), sizeof(x[0]));                               \
            }                                                                                                          \
        }                                                                                                              \
        vector result;                                                                                                 \
        memcpy(&result, x, sizeof(x));                                                                                 \
        return result;                                                                                                 \
    }
EMULATED_MASKZ_LOAD(emulated_maskz_loadu_ps, __m512, float, 16)
EMULATED_MASKZ_LOAD(emulated_maskz_loadu_epi16, __m256i, int16_t, 16)
#undef _mm512_maskz_loadu_ps
#undef _mm256_maskz_loadu_epi16
#define _mm512_maskz_loadu_ps emulated_maskz_loadu_ps
#define _mm256_maskz_loadu_epi16 emulated_maskz_loadu_epi16

static inline void emulated_mask_storeu_ps(void * p, uint32_t mask, __m512 a) {
    float x[16];
    memcpy(x, &a, sizeof(x));
    for (int i = 0; i < 16; ++i) {
        if ((mask >> i & 1) != 0) {
            memcpy((char *)p + (size_t)i * sizeof(float), &x[i], sizeof(float));
        }
    }
}
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps emulated_mask_storeu_ps

// Rounded once. SIMDe's rounds the product, too.
#define EMULATED_FMADD(name, vector, n)                                                                                \
    static inline vector name(vector a, vector b, vector c) {                                                          \
        float x[n], y[n], z[n];                                                                                        \
        memcpy(x, &a, sizeof(x));                                                                                      \
        memcpy(y, &b, sizeof(y));                                                                                      \
        memcpy(z, &c, sizeof(z));                                                                                      \
        for (int i = 0; i < (n); ++i) {                                                                                \
            z[i] = fmaf(x[i], y[i], z[i]);                                                                             \
        }                                                                                                              \
        vector result;                                                                                                 \
        memcpy(&result, z, sizeof(z));                                                                                 \
        return result;                                                                                                 \
    }
EMULATED_FMADD(emulated_fmadd_ps_256, __m256, 8)
EMULATED_FMADD(emulated_fmadd_ps_512, __m512, 16)
#undef _mm256_fmadd_ps
#undef _mm512_fmadd_ps
#define _mm256_fmadd_ps emulated_fmadd_ps_256
#define _mm512_fmadd_ps emulated_fmadd_ps_512

// AVX-VNNI: sums of PARTS neighbouring products in each 32-bit element.
#define EMULATED_DOT(name, first, second, parts)                                                                       \
    static inline __m256i name(__m256i sums, __m256i a, __m256i b) {                                                   \
        int32_t sum[8];                                                                                                \
        first x[8 * (parts)];                                                                                          \
        second y[8 * (parts)];                                                                                         \
        memcpy(sum, &sums, sizeof(sum));                                                                               \
        memcpy(x, &a, sizeof(x));                                                                                      \
        memcpy(y, &b, sizeof(y));                                                                                      \
        for (int i = 0; i < 8 * (parts); ++i) {                                                                        \
            sum[i / (parts)] += x[i] * y[i];                                                                           \
        }                                                                                                              \
        __m256i result;                                                                                                \
        memcpy(&result, sum, sizeof(sum));                                                                             \
        return result;                                                                                                 \
    }
EMULATED_DOT(emulated_dpbusd_256, uint8_t, int8_t, 4)
EMULATED_DOT(emulated_dpwssd_256, int16_t, int16_t, 2)
#define _mm256_dpbusd_avx_epi32 emulated_dpbusd_256
#define _mm256_dpwssd_avx_epi32 emulated_dpwssd_256

// bf16, rounded to nearest, ties to even: `low` first. Of finite numbers.
static inline __m512i emulated_cvtne2ps_pbh(__m512 high, __m512 low) {
    uint32_t bits[32];
    uint16_t rounded[32];
    memcpy(bits, &low, sizeof(low));
    memcpy(bits + 16, &high, sizeof(high));
    for (int i = 0; i < 32; ++i) {
        rounded[i] = (uint16_t)((bits[i] + 0x7fff + (bits[i] >> 16 & 1)) >> 16);
    }
    __m512i result;
    memcpy(&result, rounded, sizeof(rounded));
    return result;
}
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh emulated_cvtne2ps_pbh

#endif
