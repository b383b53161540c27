// The scales of blocks.
#ifndef TSFFN_SCALES_NEON_H
#define TSFFN_SCALES_NEON_H

#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

// The scale of a block: one conversion instruction, subnormals included.
static inline float block_scale(const uint8_t * block) {
    float16_t d;
    memcpy(&d, block, sizeof(d));
    return (float)d;
}

#endif
