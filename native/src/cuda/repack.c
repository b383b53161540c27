#include "repack.h"

#include "../cpu/kernels/panels.h"

#include <string.h>

_Static_assert((int)TSFFN_CUDA_BLOCK == TSFFN_BLOCK_SIZE && (int)TSFFN_CUDA_PANEL_ROWS == (int)TSFFN_PANEL_ROWS &&
                   (int)TSFFN_CUDA_PANEL_Q8_0 == (int)TSFFN_PANEL_Q8_0_BYTES &&
                   (int)TSFFN_CUDA_PANEL_Q4_0 == (int)TSFFN_PANEL_Q4_0_BYTES &&
                   (int)TSFFN_CUDA_PANEL_Q3_NL == (int)TSFFN_PANEL_Q3_NL_BYTES &&
                   (int)TSFFN_CUDA_PANEL_Q3_NL_HEADER == (int)TSFFN_PANEL_Q3_NL_HEADER,
               "panels are those of the file");
_Static_assert((int)TSFFN_CUDA_I16_MAX == (int)TSFFN_I16_MAX && (int)TSFFN_CUDA_U14_MAX == (int)TSFFN_U14_MAX,
               "activations are rounded as on the CPU");

int tsffn_cuda_format(int type) {
    enum { F32 = 0, F16 = 1, Q4_0 = 2, Q8_0 = 8, BF16 = 30 }; // ggml's numbers, which files carry
    switch (type) {
    case F32:
        return TSFFN_CUDA_F32;
    case F16:
        return TSFFN_CUDA_F16;
    case BF16:
        return TSFFN_CUDA_BF16;
    case Q8_0:
        return TSFFN_CUDA_Q8_0;
    case Q4_0:
        return TSFFN_CUDA_Q4_0;
    case TSFFN_TYPE_Q3_NL:
        return TSFFN_CUDA_Q3_NL;
    default:
        return -1;
    }
}

// Bytes of the weights of a block in a block format, without its scale; 0 for float formats.
static size_t block_quants(int format) {
    return format == TSFFN_CUDA_Q8_0 ? 32 : format == TSFFN_CUDA_Q4_0 ? 16 : 0;
}

static size_t weight_bytes(int format) {
    return format == TSFFN_CUDA_F32 ? 4 : 2;
}

size_t tsffn_cuda_row_bytes(int format, int64_t n) {
    const size_t padded = (size_t)tsffn_cuda_pad(n, TSFFN_CUDA_BLOCK), quants = block_quants(format);
    const size_t bytes = quants == 0 ? padded * weight_bytes(format) : padded / TSFFN_CUDA_BLOCK * (quants + 2);
    return (size_t)tsffn_cuda_pad((int64_t)bytes, TSFFN_CUDA_ALIGN);
}

void tsffn_cuda_repack_row(int format, int64_t n, const uint8_t * row, uint8_t * to) {
    memset(to, 0, tsffn_cuda_row_bytes(format, n));
    const size_t quants = block_quants(format), n_blocks = (size_t)n / TSFFN_CUDA_BLOCK;
    if (quants == 0) {
        memcpy(to, row, (size_t)n * weight_bytes(format));
        return;
    }
    for (size_t b = 0; b < n_blocks; ++b) {
        const uint8_t * block = row + b * (2 + quants);
        memcpy(to + n_blocks * quants + 2 * b, block, 2);
        memcpy(to + b * quants, block + 2, quants);
    }
}

// ---- the predictor's matrices

static bool in_panels(const struct tsffn_weights * matrix) {
    const int format = tsffn_cuda_format(matrix->type);
    return format == TSFFN_CUDA_Q3_NL || block_quants(format) != 0;
}

int64_t tsffn_cuda_units(const struct tsffn_weights * matrix) {
    // A word of a mask takes two panels.
    return in_panels(matrix) ? 2 * ((matrix->n_rows + 2 * TSFFN_PANEL_ROWS - 1) / (2 * TSFFN_PANEL_ROWS))
                             : matrix->n_rows;
}

size_t tsffn_cuda_unit_bytes(const struct tsffn_weights * matrix) {
    return in_panels(matrix) ? TSFFN_PANEL_ROWS * matrix->row_bytes
                             : tsffn_cuda_row_bytes(tsffn_cuda_format(matrix->type), matrix->n_cols);
}

// Row i of a panel, from a plain row.
static void interleave(size_t quants, size_t n_blocks, const uint8_t * row, size_t i, uint8_t * panel) {
    for (size_t b = 0; b < n_blocks; ++b) {
        const uint8_t * block = row + b * (2 + quants);
        uint8_t * to = panel + b * TSFFN_PANEL_ROWS * (2 + quants);
        memcpy(to + 2 * i, block, 2);
        for (size_t g = 0; g < quants / 4; ++g) {
            memcpy(to + 2 * TSFFN_PANEL_ROWS + 4 * (TSFFN_PANEL_ROWS * g + i), block + 2 + 4 * g, 4);
        }
    }
}

void tsffn_cuda_repack_unit(const struct tsffn_weights * matrix, int64_t unit, uint8_t * to) {
    if (!in_panels(matrix)) {
        tsffn_cuda_repack_row(tsffn_cuda_format(matrix->type), matrix->n_cols,
                              matrix->data + (size_t)unit * matrix->row_bytes, to);
        return;
    }
    const int64_t first = unit * TSFFN_PANEL_ROWS;
    const uint8_t * rows = matrix->data + (size_t)first * matrix->row_bytes;
    if (matrix->layout == TSFFN_LAYOUT_PANELS && first + TSFFN_PANEL_ROWS <= matrix->n_rows) {
        memcpy(to, rows, TSFFN_PANEL_ROWS * matrix->row_bytes);
        return;
    }
    const size_t quants = block_quants(tsffn_cuda_format(matrix->type));
    memset(to, 0, TSFFN_PANEL_ROWS * matrix->row_bytes);
    for (int64_t i = 0; i < TSFFN_PANEL_ROWS && first + i < matrix->n_rows; ++i) {
        interleave(quants, (size_t)matrix->n_cols / TSFFN_CUDA_BLOCK, rows + (size_t)i * matrix->row_bytes, (size_t)i,
                   to);
    }
}
