// What stands in for mma.m16n8k16 (block.h), against doubles. Where elements are is written here anew, from the PTX
// manual.
#include "block.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

extern "C" __attribute__((visibility("default"))) double tsffn_host_mma_error();

// The largest difference, over 2^-24 of what is summed.
double tsffn_host_mma_error() {
    double a[16][16], b[16][8], c[16][8], worst = 0.0;
    uint32_t state = 1;
    const auto random_half = [&state] {
        state = state * 1664525u + 1013904223u;
        return (uint16_t)((state >> 16 & 0x83ffu) | (10 + (state >> 8) % 8) << 10);
    };
    uint16_t a_bits[16][16], b_bits[16][8];
    float c_float[16][8], result[16][8];
    for (int i = 0; i < 16; ++i) {
        for (int k = 0; k < 16; ++k) {
            a[i][k] = (double)tsffn_f16_to_f32(a_bits[i][k] = random_half());
        }
        for (int j = 0; j < 8; ++j) {
            b[i][j] = (double)tsffn_f16_to_f32(b_bits[i][j] = random_half());
            c[i][j] = (double)(c_float[i][j] = tsffn_f16_to_f32(random_half()));
        }
    }
    host::run_grid(dim3(1), host::WARP_LANES, 0, [&] {
        const unsigned lane = host::here.thread, group = lane >> 2, in_group = lane % 4;
        uint32_t mine_a[4] = {0}, mine_b[2] = {0};
        float mine_c[4];
        for (unsigned i = 0; i < 8; ++i) {
            const unsigned row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
            const unsigned column = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
            mine_a[i / 2] |= (uint32_t)a_bits[row][column] << 16 * (i & 1);
        }
        for (unsigned i = 0; i < 4; ++i) {
            const unsigned row = in_group * 2 + (i & 1) + (i < 2 ? 0 : 8);
            mine_b[i / 2] |= (uint32_t)b_bits[row][group] << 16 * (i & 1);
            mine_c[i] = c_float[i < 2 ? group : group + 8][in_group * 2 + (i & 1)];
        }
        host::mma(mine_c, mine_a, mine_b);
        for (unsigned i = 0; i < 4; ++i) {
            result[i < 2 ? group : group + 8][in_group * 2 + (i & 1)] = mine_c[i];
        }
    });
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 8; ++j) {
            double sum = c[i][j], size = std::fabs(c[i][j]);
            for (int k = 0; k < 16; ++k) {
                sum += a[i][k] * b[k][j];
                size += std::fabs(a[i][k] * b[k][j]);
            }
            worst = std::fmax(worst, std::fabs(sum - (double)result[i][j]) / (size * 0x1p-24));
        }
    }
    return worst;
}
