// What kernels_neon.c and rows_neondot.c share: row kernels of the dot-product extension, for the table in the first.
#ifndef TSFFN_ROWS_NEONDOT_H
#define TSFFN_ROWS_NEONDOT_H

#include "kernels.h"

#include <arm_neon.h>
#include <string.h>

// The scale of a block: one conversion instruction, subnormals included.
static inline float block_scale(const uint8_t * block) {
    float16_t d;
    memcpy(&d, block, sizeof(d));
    return (float)d;
}

float tsffn_dot_q8_0_neondot(int64_t n, const void * row, const void * x);
float tsffn_dot_q4_0_neondot(int64_t n, const void * row, const void * x);
void tsffn_dot4_q8_0_neondot(int64_t n, const void * row, const void * const x[4], float s[4]);
void tsffn_dot4_q4_0_neondot(int64_t n, const void * row, const void * const x[4], float s[4]);

#endif
