// The conversions that the kernels use, for their host build.
#pragma once

#include "cpu/kernels/half.h"

struct __half {
    unsigned short bits;
};

static inline __half __ushort_as_half(unsigned short bits) {
    return {bits};
}

static inline float __half2float(__half h) {
    return tsffn_f16_to_f32(h.bits);
}
