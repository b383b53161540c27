// A processor that has every x86 extension, as the kernels see it: included before all of their sources for test_x86.
// Vectors are in immintrin.h; here are the questions of dispatch.c, and AMX, which takes the place of kernels/amx.h.
#ifndef TSFFN_EMULATED_MACHINE_H
#define TSFFN_EMULATED_MACHINE_H

#define _GNU_SOURCE
#include <cpuid.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define __builtin_cpu_supports(feature) 1
#undef __get_cpuid_count
#define __get_cpuid_count(leaf, subleaf, a, b, c, d) (*(a) = *(b) = *(c) = *(d) = ~0u, 1)
#define syscall(...) 0

#define TSFFN_AMX_H
enum { TSFFN_TILES = 8, TSFFN_TILE_ROWS = 16, TSFFN_TILE_ROW_BYTES = 64 };

struct tsffn_tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

// Of this thread, in this source file: no tile is passed from one to another.
static _Thread_local struct tsffn_tile_config emulated_config;
static _Thread_local uint8_t emulated_tiles[TSFFN_TILES][TSFFN_TILE_ROWS][TSFFN_TILE_ROW_BYTES];

static inline void tsffn_load_tile_config(const struct tsffn_tile_config * config) {
    emulated_config = *config;
    memset(emulated_tiles, 0, sizeof(emulated_tiles));
}

static inline void tsffn_store_tile_config(struct tsffn_tile_config * config) {
    *config = emulated_config;
}

static inline void emulated_tile_load(int tile, const void * base, int64_t stride) {
    memset(emulated_tiles[tile], 0, sizeof(emulated_tiles[tile]));
    for (int row = 0; row < emulated_config.rows[tile]; ++row) {
        memcpy(emulated_tiles[tile][row], (const char *)base + row * stride, emulated_config.row_bytes[tile]);
    }
}

static inline void emulated_tile_store(int tile, void * base, int64_t stride) {
    for (int row = 0; row < emulated_config.rows[tile]; ++row) {
        memcpy((char *)base + row * stride, emulated_tiles[tile][row], emulated_config.row_bytes[tile]);
    }
}

#define TSFFN_TILE_LOAD(tile, base, stride) emulated_tile_load(tile, base, stride)
#define TSFFN_TILE_STORE(tile, base, stride) emulated_tile_store(tile, base, stride)
#define _tile_zero(tile) memset(emulated_tiles[tile], 0, sizeof(emulated_tiles[tile]))

static inline float emulated_bf16(const uint8_t * p) {
    uint16_t half;
    memcpy(&half, p, sizeof(half));
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

// A function NAME(c, a, b): c[m][n] += the sum over k of PARTS products of row m of `a` and row k of `b`.
#define EMULATED_TILE_PRODUCT(name, sum_type, parts, product)                                                          \
    static inline void name(int c, int a, int b) {                                                                     \
        for (int m = 0; m < emulated_config.rows[c]; ++m) {                                                            \
            for (int n = 0; n < emulated_config.row_bytes[c] / 4; ++n) {                                               \
                sum_type sum;                                                                                          \
                memcpy(&sum, &emulated_tiles[c][m][4 * n], sizeof(sum));                                               \
                for (int k = 0; k < emulated_config.row_bytes[a] / 4; ++k) {                                           \
                    for (int i = 0; i < (parts); ++i) {                                                                \
                        const uint8_t * x = &emulated_tiles[a][m][4 * k + 4 / (parts) * i];                            \
                        const uint8_t * y = &emulated_tiles[b][k][4 * n + 4 / (parts) * i];                            \
                        sum += product;                                                                                \
                    }                                                                                                  \
                }                                                                                                      \
                memcpy(&emulated_tiles[c][m][4 * n], &sum, sizeof(sum));                                               \
            }                                                                                                          \
        }                                                                                                              \
    }
EMULATED_TILE_PRODUCT(emulated_dpbssd, int32_t, 4, (int8_t)*x *(int8_t)*y)
EMULATED_TILE_PRODUCT(emulated_dpbusd, int32_t, 4, *x *(int8_t)*y)
EMULATED_TILE_PRODUCT(emulated_dpbf16ps, float, 2, emulated_bf16(x) * emulated_bf16(y))
#define _tile_dpbssd emulated_dpbssd
#define _tile_dpbusd emulated_dpbusd
#define _tile_dpbf16ps emulated_dpbf16ps

#endif
