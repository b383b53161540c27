// The half-precision operations that the kernels use, for their host build.
#pragma once

#include "cpu/kernels/half.h"

struct __half {
    unsigned short bits;
};
struct alignas(4) __half2 {
    __half x, y;
};

static inline __half __ushort_as_half(unsigned short bits) {
    return {bits};
}
static inline unsigned short __half_as_ushort(__half h) {
    return h.bits;
}

static inline float __half2float(__half h) {
    return tsffn_f16_to_f32(h.bits);
}

// The nearest half, ties to even. A float has 13 bits more than a half; below 2^-14 a half has fewer, and adding 2^-1
// leaves just these in the sum's last bits.
static inline __half __float2half_rn(float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof(bits));
    const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7fffu;
    } else if (magnitude >= 0x477ff000u) { // 65520 and more
        half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {
        const float sum = tsffn_float_from_bits(magnitude) + 0.5f;
        memcpy(&half, &sum, sizeof(half));
        half -= 0x3f000000u;
    } else {
        half = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
    }
    return {(unsigned short)(sign | half)};
}

static inline __half2 __floats2half2_rn(float a, float b) {
    return {__float2half_rn(a), __float2half_rn(b)};
}
static inline __half2 __half2half2(__half h) {
    return {h, h};
}
// A product of two halves is exact as a float, and so is a difference of these.
static inline __half2 __hmul2(__half2 a, __half2 b) {
    return __floats2half2_rn(__half2float(a.x) * __half2float(b.x), __half2float(a.y) * __half2float(b.y));
}
static inline __half2 __hsub2(__half2 a, __half2 b) {
    return __floats2half2_rn(__half2float(a.x) - __half2float(b.x), __half2float(a.y) - __half2float(b.y));
}
