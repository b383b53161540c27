// The few things the native tests share: seeded random numbers, a check that tells where it failed, an error measure.
#ifndef TSFFN_CHECK_H
#define TSFFN_CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition, ...)                                                                                          \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);                                            \
            fprintf(stderr, __VA_ARGS__);                                                                              \
            fprintf(stderr, "\n");                                                                                     \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

// xorshift64*: the same numbers on every machine.
static uint64_t random_state = 0x9e3779b97f4a7c15u;

static inline uint64_t random_bits(void) {
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return random_state * 0x2545f4914f6cdd1du;
}

// Uniform in [-1, 1).
static inline float random_float(void) {
    return (float)(random_bits() >> 40) / (float)(1 << 23) - 1.0f;
}

// Squared error of a over squared size of b.
static inline double nmse(const float * a, const double * b, int64_t n) {
    double error = 0.0;
    double size = 1e-30;
    for (int64_t i = 0; i < n; ++i) {
        error += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        size += b[i] * b[i];
    }
    return error / size;
}

#endif
