// The tile registers. Their configuration belongs to the thread: ggml-cpu makes its own once and relies on it, so that
// a kernel that needs another one puts the one it found back.
#ifndef TSFFN_AMX_H
#define TSFFN_AMX_H

#include <stdint.h>

enum { TSFFN_TILES = 8, TSFFN_TILE_ROWS = 16, TSFFN_TILE_ROW_BYTES = 64 };

struct tsffn_tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

// Written out, because GCC 12's intrinsics do not say what memory they touch: 8 of a configuration's 64 bytes, and none
// that a tile is loaded from, so that stores of weights could be moved behind the load or dropped.
static inline void tsffn_load_tile_config(const struct tsffn_tile_config * config) {
    __asm__ volatile("ldtilecfg %0" : : "m"(*config));
}

static inline void tsffn_store_tile_config(struct tsffn_tile_config * config) {
    __asm__ volatile("sttilecfg %0" : "=m"(*config));
}

// Rows of `tile`, the number of a register, from or to `base`, `stride` bytes apart.
#define TSFFN_TILE_MOVE(code, base, stride)                                                                            \
    __asm__ volatile(code : : "r"((const void *)(base)), "r"((int64_t)(stride)) : "memory")
#define TSFFN_TILE_LOAD_CODE(tile) "tileloadd (%0,%1,1), %%tmm" #tile
#define TSFFN_TILE_STORE_CODE(tile) "tilestored %%tmm" #tile ", (%0,%1,1)"
#define TSFFN_TILE_LOAD(tile, base, stride) TSFFN_TILE_MOVE(TSFFN_TILE_LOAD_CODE(tile), base, stride)
#define TSFFN_TILE_STORE(tile, base, stride) TSFFN_TILE_MOVE(TSFFN_TILE_STORE_CODE(tile), base, stride)

#endif
