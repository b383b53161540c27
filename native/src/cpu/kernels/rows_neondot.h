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

void tsffn_dots_q8_0_neondot(int64_t n, const void * row, int n_x, const void * const * x, float * s,
                             const struct tsffn_asks * asks);
void tsffn_dots_q4_0_neondot(int64_t n, const void * row, int n_x, const void * const * x, float * s,
                             const struct tsffn_asks * asks);

#endif
