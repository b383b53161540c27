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

// Written out: GCC 12's intrinsics say that they touch 8 of the 64 bytes.
static inline void tsffn_load_tile_config(const struct tsffn_tile_config * config) {
    __asm__ volatile("ldtilecfg %0" : : "m"(*config));
}

static inline void tsffn_store_tile_config(struct tsffn_tile_config * config) {
    __asm__ volatile("sttilecfg %0" : "=m"(*config));
}

#endif
