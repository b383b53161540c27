// IEEE half and bfloat16 to float, bit by bit, for plain C kernels and scalar tails.
#ifndef TSFFN_HALF_H
#define TSFFN_HALF_H

#include <stdint.h>
#include <string.h>

static inline float tsffn_float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

static inline float tsffn_bf16_to_f32(uint16_t h) {
    return tsffn_float_from_bits((uint32_t)h << 16);
}

// Exponent and mantissa move up by 13 bits; multiplying by 2^112 mends the exponent bias (127 - 15) and makes
// subnormal halves normal. Infinity and NaN (exponent 31) land on exponent 143 and are raised to 255.
static inline float tsffn_f16_to_f32(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    const uint32_t magnitude = (uint32_t)(h & 0x7fffu) << 13;
    if ((h & 0x7c00u) == 0x7c00u) {
        return tsffn_float_from_bits(sign | 0x7f800000u | magnitude);
    }
    const float value = tsffn_float_from_bits(magnitude) * 0x1p112f;
    return (sign != 0) ? -value : value;
}

// The bits of f * 2^-112 for a finite half f, exactly: exponent and mantissa moved into place, the bias not mended.
// Integer instructions do this beside the vector units; a sum of many such values is mended by one multiplication with
// 2^112.
static inline int32_t tsffn_f16_bits_scaled(uint16_t h) {
    return (int32_t)((uint32_t)((int32_t)(int16_t)h * (1 << 13)) & 0x8fffffffu);
}
#define TSFFN_F16_SCALE_BACK 0x1p112f

static inline uint16_t tsffn_load_u16(const void * p) {
    uint16_t value;
    memcpy(&value, p, sizeof(value));
    return value;
}

#endif
