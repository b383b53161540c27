// The keep-th largest magnitude is found digit by digit: as integers, the bits of floats without their signs are in the
// order of the magnitudes.
#include "topk.h"

#include <string.h>

enum { N_DIGITS = 3, DIGIT_BITS = 11, N_VALUES = 1 << DIGIT_BITS };
static const int shift[N_DIGITS] = {20, 9, 0}; // of 11, 11 and 9 bits

static uint32_t magnitude(float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof(bits));
    return bits & 0x7fffffffu;
}

// The largest m such that at least `keep` of the magnitudes are m or more. *equal: how many of those that are m stay
// beside all that are more.
static uint32_t kth_largest(const float * h, int64_t n, int64_t keep, int64_t * equal) {
    uint32_t prefix = 0; // its digits so far
    for (int digit = 0; digit < N_DIGITS; ++digit) {
        const int bits = digit == 0 ? 31 : shift[digit - 1]; // what is not known yet
        int32_t counts[N_VALUES] = {0};
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t m = magnitude(h[i]);
            if (m >> bits == prefix >> bits) {
                counts[m >> shift[digit] & ((1u << (bits - shift[digit])) - 1)] += 1;
            }
        }
        uint32_t value = (1u << (bits - shift[digit])) - 1;
        for (; counts[value] < keep; --value) {
            keep -= counts[value];
        }
        prefix |= value << shift[digit];
    }
    *equal = keep;
    return prefix;
}

void tsffn_keep_largest(float * h, int64_t n, int64_t keep) {
    if (keep >= n) {
        return;
    }
    int64_t equal;
    const uint32_t least = kth_largest(h, n, keep, &equal);
    if (least == 0) { // all others are 0
        return;
    }
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t m = magnitude(h[i]);
        if (m < least || (m == least && equal-- <= 0)) {
            h[i] = 0.0f;
        }
    }
}
