// Plain C kernels: the reference of every other tier, and what runs where no tier fits.
#include "half.h"
#include "kernels.h"
#include "panels.h"

#include <math.h>
#include <string.h>

static float dot_f32(int64_t n, const void * row, const void * activations) {
    const float * w = row;
    const float * x = activations;
    float sum = 0.0f;
    for (int64_t j = 0; j < n; ++j) {
        sum += w[j] * x[j];
    }
    return sum;
}

static void axpy_f32(int64_t n, float a, const void * row, float * y) {
    const float * w = row;
    for (int64_t j = 0; j < n; ++j) {
        y[j] += a * w[j];
    }
}

static float dot_f16(int64_t n, const void * row, const void * activations) {
    const uint16_t * w = row;
    const float * x = activations;
    float sum = 0.0f;
    for (int64_t j = 0; j < n; ++j) {
        sum += tsffn_f16_to_f32(w[j]) * x[j];
    }
    return sum;
}

static void axpy_f16(int64_t n, float a, const void * row, float * y) {
    const uint16_t * w = row;
    for (int64_t j = 0; j < n; ++j) {
        y[j] += a * tsffn_f16_to_f32(w[j]);
    }
}

static float dot_bf16(int64_t n, const void * row, const void * activations) {
    const uint16_t * w = row;
    const float * x = activations;
    float sum = 0.0f;
    for (int64_t j = 0; j < n; ++j) {
        sum += tsffn_bf16_to_f32(w[j]) * x[j];
    }
    return sum;
}

static void axpy_bf16(int64_t n, float a, const void * row, float * y) {
    const uint16_t * w = row;
    for (int64_t j = 0; j < n; ++j) {
        y[j] += a * tsffn_bf16_to_f32(w[j]);
    }
}

#define ROUND_TO_INT 12582912.0f // 1.5 * 2^23
enum { ROUND_TO_INT_BITS = 0x4b400000 };

// The 256 bytes for columns j .. j + 127.
static void convert_quad(const int8_t * hi, const int8_t * lo, int8_t * quad) {
    for (int block = 0; block < 4; ++block) {
        for (int half = 0; half < 2; ++half) {
            const int from = block * 32 + half * 16;
            memcpy(quad + half * 64 + block * 16, hi + from, 16);
            memcpy(quad + 128 + half * 64 + block * 16, lo + from, 16);
        }
    }
}

void tsffn_convert_i16(const float * x, void * converted, int64_t n) {
    float max = 0.0f;
    for (int64_t j = 0; j < n; ++j) {
        const float magnitude = fabsf(x[j]);
        max = magnitude > max ? magnitude : max;
    }
    const float d = max / (float)TSFFN_I16_MAX;
    const float inverse = max > 0.0f ? (float)TSFFN_I16_MAX / max : 0.0f;
    memcpy(converted, &d, sizeof(d));
    int16_t * q = (int16_t *)((char *)converted + TSFFN_I16_HEADER);
    int8_t * hi = (int8_t *)(q + n);
    int8_t * lo = hi + n;
    int32_t * sums = (int32_t *)(lo + n);
    // Adding 1.5 * 2^23 leaves the nearest integer (ties to even) in the low bits: unlike lrintf, in vectors.
    for (int64_t j = 0; j < n; ++j) {
        const float scaled = x[j] * inverse;
        const float shifted = scaled + ROUND_TO_INT;
        int32_t bits;
        memcpy(&bits, &shifted, sizeof(bits));
        q[j] = (int16_t)(bits - ROUND_TO_INT_BITS);
    }
    for (int64_t j = 0; j < n; ++j) {
        hi[j] = (int8_t)((q[j] + 128) >> 8);
        lo[j] = (int8_t)(q[j] & 255);
    }
    for (int64_t b = 0; b < n / TSFFN_BLOCK_SIZE; ++b) {
        int32_t sum = 0;
        for (int k = 0; k < TSFFN_BLOCK_SIZE; ++k) {
            sum += q[b * TSFFN_BLOCK_SIZE + k];
        }
        sums[b] = sum;
    }
    int8_t * quad = (int8_t *)(sums + n / TSFFN_BLOCK_SIZE);
    for (int64_t j = 0; j + TSFFN_I16_QUAD <= n; j += TSFFN_I16_QUAD, quad += TSFFN_I16_QUAD_BYTES) {
        convert_quad(hi + j, lo + j, quad);
    }
}

void tsffn_convert_u14(const float * x, void * converted, int64_t n) {
    float max = 0.0f;
    for (int64_t j = 0; j < n; ++j) {
        max = x[j] > max ? x[j] : max;
    }
    const float d = max / (float)TSFFN_U14_MAX;
    const float inverse = max > 0.0f ? (float)TSFFN_U14_MAX / max : 0.0f;
    memcpy(converted, &d, sizeof(d));
    uint8_t * hi = (uint8_t *)converted + TSFFN_U14_HEADER;
    uint8_t * lo = hi + n;
    for (int64_t j = 0; j < n; ++j) {
        const float shifted = x[j] * inverse + ROUND_TO_INT; // as above
        int32_t bits;
        memcpy(&bits, &shifted, sizeof(bits));
        hi[j] = (uint8_t)(bits >> 7 & 127);
        lo[j] = (uint8_t)(bits & 127);
    }
}

static float dot_q8_0(int64_t n, const void * row, const void * activations) {
    const uint8_t * block = row;
    const int16_t * x = tsffn_i16_values(activations);
    float sum = 0.0f;
    for (int64_t j = 0; j < n; j += TSFFN_BLOCK_SIZE, block += TSFFN_Q8_0_BYTES) {
        const int8_t * q = (const int8_t *)(block + 2);
        int32_t products = 0;
        for (int k = 0; k < TSFFN_BLOCK_SIZE; ++k) {
            products += q[k] * x[j + k];
        }
        sum += tsffn_f16_to_f32(tsffn_load_u16(block)) * (float)products;
    }
    return sum * tsffn_i16_scale(activations);
}

static float dot_q4_0(int64_t n, const void * row, const void * activations) {
    const uint8_t * block = row;
    const int16_t * x = tsffn_i16_values(activations);
    float sum = 0.0f;
    for (int64_t j = 0; j < n; j += TSFFN_BLOCK_SIZE, block += TSFFN_Q4_0_BYTES) {
        const uint8_t * q = block + 2;
        int32_t products = 0;
        for (int k = 0; k < TSFFN_BLOCK_SIZE / 2; ++k) {
            products += ((q[k] & 15) - 8) * x[j + k] + ((q[k] >> 4) - 8) * x[j + k + 16];
        }
        sum += tsffn_f16_to_f32(tsffn_load_u16(block)) * (float)products;
    }
    return sum * tsffn_i16_scale(activations);
}

static void axpy_q8_0(int64_t n, float a, const void * row, float * y) {
    const uint8_t * block = row;
    for (int64_t j = 0; j < n; j += TSFFN_BLOCK_SIZE, block += TSFFN_Q8_0_BYTES) {
        const float d = a * tsffn_f16_to_f32(tsffn_load_u16(block));
        const int8_t * q = (const int8_t *)(block + 2);
        for (int k = 0; k < TSFFN_BLOCK_SIZE; ++k) {
            y[j + k] += d * (float)q[k];
        }
    }
}

static void axpy_q4_0(int64_t n, float a, const void * row, float * y) {
    const uint8_t * block = row;
    for (int64_t j = 0; j < n; j += TSFFN_BLOCK_SIZE, block += TSFFN_Q4_0_BYTES) {
        const float d = a * tsffn_f16_to_f32(tsffn_load_u16(block));
        const uint8_t * q = block + 2;
        for (int k = 0; k < TSFFN_BLOCK_SIZE / 2; ++k) {
            y[j + k] += d * (float)((q[k] & 15) - 8);
            y[j + k + 16] += d * (float)((q[k] >> 4) - 8);
        }
    }
}

TSFFN_DEFINE_DOTS_ONE_BY_ONE(dots_f32, dot_f32)
TSFFN_DEFINE_DOTS_ONE_BY_ONE(dots_f16, dot_f16)
TSFFN_DEFINE_DOTS_ONE_BY_ONE(dots_bf16, dot_bf16)
TSFFN_DEFINE_DOTS_ONE_BY_ONE(dots_q8_0, dot_q8_0)
TSFFN_DEFINE_DOTS_ONE_BY_ONE(dots_q4_0, dot_q4_0)
TSFFN_DEFINE_AXPYS_ONE_BY_ONE(axpys_f32, axpy_f32)
TSFFN_DEFINE_AXPYS_ONE_BY_ONE(axpys_f16, axpy_f16)
TSFFN_DEFINE_AXPYS_ONE_BY_ONE(axpys_bf16, axpy_bf16)
TSFFN_DEFINE_AXPYS_ONE_BY_ONE(axpys_q8_0, axpy_q8_0)
TSFFN_DEFINE_AXPYS_ONE_BY_ONE(axpys_q4_0, axpy_q4_0)
TSFFN_DEFINE_KERNELS(ref, TSFFN_ISA_REF, .panel = TSFFN_PANELS(ref));
