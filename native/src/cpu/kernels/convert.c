// Activations in the formats of the block kernels (kernels.h).
#include "kernels.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

// The largest of x, at least 0; with `magnitudes` of |x|. In a block of lanes: a single maximum would wait for itself
// at every step.
static inline float largest(const float * x, int64_t n, bool magnitudes) {
    float most[TSFFN_BLOCK_SIZE] = {0.0f};
    for (int64_t j = 0; j < n; j += TSFFN_BLOCK_SIZE) {
        for (int k = 0; k < TSFFN_BLOCK_SIZE; ++k) {
            const float v = magnitudes ? fabsf(x[j + k]) : x[j + k];
            most[k] = v > most[k] ? v : most[k];
        }
    }
    float max = 0.0f;
    for (int k = 0; k < TSFFN_BLOCK_SIZE; ++k) {
        max = most[k] > max ? most[k] : max;
    }
    return max;
}

// The nearest integers (ties to even) to a block of x * scale. Adding 1.5 * 2^23 leaves them in the low bits: unlike
// lrintf, in vectors.
static inline void round_block(const float * x, float scale, int32_t * q) {
    const float shift = 12582912.0f;
    const int32_t shift_bits = 0x4b400000;
    for (int k = 0; k < TSFFN_BLOCK_SIZE; ++k) {
        const float shifted = x[k] * scale + shift;
        memcpy(&q[k], &shifted, sizeof(q[k]));
        q[k] -= shift_bits;
    }
}

void tsffn_convert_i16(const float * x, void * converted, int64_t n) {
    const float max = largest(x, n, true);
    const float d = max / (float)TSFFN_I16_MAX;
    const float inverse = max > 0.0f ? (float)TSFFN_I16_MAX / max : 0.0f;
    memcpy(converted, &d, sizeof(d));
    int16_t * words = (int16_t *)((char *)converted + TSFFN_I16_HEADER);
    int8_t * hi = (int8_t *)(words + n);
    int8_t * lo = hi + n;
    int32_t * sums = (int32_t *)(lo + n);
    int8_t * quads = (int8_t *)(sums + n / TSFFN_BLOCK_SIZE);
    for (int64_t j = 0; j < n; j += TSFFN_BLOCK_SIZE) {
        int32_t q[TSFFN_BLOCK_SIZE], sum = 0;
        int16_t w[TSFFN_BLOCK_SIZE];
        int8_t h[TSFFN_BLOCK_SIZE], l[TSFFN_BLOCK_SIZE];
        round_block(x + j, inverse, q);
        for (int k = 0; k < TSFFN_BLOCK_SIZE; ++k) {
            w[k] = (int16_t)q[k];
            h[k] = (int8_t)((w[k] + 128) >> 8);
            l[k] = (int8_t)w[k];
            sum += w[k];
        }
        memcpy(words + j, w, sizeof(w));
        memcpy(hi + j, h, sizeof(h));
        memcpy(lo + j, l, sizeof(l));
        sums[j / TSFFN_BLOCK_SIZE] = sum;
        if (j / TSFFN_I16_QUAD < n / TSFFN_I16_QUAD) {
            const int64_t block = j % TSFFN_I16_QUAD / TSFFN_BLOCK_SIZE;
            int8_t * quad = quads + j / TSFFN_I16_QUAD * TSFFN_I16_QUAD_BYTES + block * 16;
            for (int half = 0; half < 2; ++half) {
                memcpy(quad + half * 64, h + half * 16, 16);
                memcpy(quad + 128 + half * 64, l + half * 16, 16);
            }
        }
    }
}

void tsffn_convert_u14(const float * x, void * converted, int64_t n) {
    const float max = largest(x, n, false);
    const float d = max / (float)TSFFN_U14_MAX;
    const float inverse = max > 0.0f ? (float)TSFFN_U14_MAX / max : 0.0f;
    memcpy(converted, &d, sizeof(d));
    uint8_t * hi = (uint8_t *)converted + TSFFN_U14_HEADER;
    uint8_t * lo = hi + n;
    for (int64_t j = 0; j < n; j += TSFFN_BLOCK_SIZE) {
        int32_t q[TSFFN_BLOCK_SIZE];
        round_block(x + j, inverse, q);
        for (int k = 0; k < TSFFN_BLOCK_SIZE; ++k) {
            hi[j + k] = (uint8_t)(q[k] >> 7 & 127);
            lo[j + k] = (uint8_t)(q[k] & 127);
        }
    }
}

// Bit k of each of 8 bytes, the first byte's lowest.
static inline uint32_t plane_of_bytes(const uint8_t * bytes, int k) {
    uint64_t eight = 0;
    for (int j = 0; j < 8; ++j) {
        eight |= (uint64_t)bytes[j] << 8 * j;
    }
    return (uint32_t)((eight >> k & 0x0101010101010101u) * 0x0102040810204080u >> 56);
}

void tsffn_convert_bits(const float * x, void * converted, int64_t n, int n_bits) {
    const int32_t most = (1 << n_bits) - 1;
    const float max = largest(x, n, true);
    const float d = n_bits == 1 ? 1.0f : max / (float)most;
    const float scale = max > 0.0f ? 0.5f * (float)most / max : 0.0f;
    const float middle = 0.5f * (float)most;
    const int32_t planes = n_bits;
    memcpy(converted, &d, sizeof(d));
    memcpy((char *)converted + sizeof(d), &planes, sizeof(planes));
    uint32_t * words = (uint32_t *)((char *)converted + TSFFN_BITS_HEADER);
    for (int64_t j = 0; j < n; j += TSFFN_BLOCK_SIZE, words += n_bits) {
        float shifted[TSFFN_BLOCK_SIZE];
        int32_t q[TSFFN_BLOCK_SIZE];
        uint8_t u[TSFFN_BLOCK_SIZE]; // (x / d + most) / 2
        for (int k = 0; k < TSFFN_BLOCK_SIZE; ++k) {
            shifted[k] = x[j + k] * scale + middle;
        }
        round_block(shifted, 1.0f, q);
        for (int k = 0; k < TSFFN_BLOCK_SIZE; ++k) {
            u[k] = (uint8_t)(n_bits == 1 ? x[j + k] >= 0.0f : q[k] & most);
        }
        for (int k = 0; k < n_bits; ++k) {
            words[k] = ~(plane_of_bytes(u, k) | plane_of_bytes(u + 8, k) << 8 | plane_of_bytes(u + 16, k) << 16 |
                         plane_of_bytes(u + 24, k) << 24);
        }
    }
}
