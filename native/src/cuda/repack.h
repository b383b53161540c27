// Weights from the order of the file into that of layout.h.
#ifndef TSFFN_CUDA_REPACK_H
#define TSFFN_CUDA_REPACK_H

#include "../ffn/layer.h"
#include "layout.h"

// The format (layout.h) of a type of weights, or -1.
int tsffn_cuda_format(int type);

// Bytes of a row of n weights, which are padded to a multiple of 32.
size_t tsffn_cuda_row_bytes(int format, int64_t n);
void tsffn_cuda_repack_row(int format, int64_t n, const uint8_t * row, uint8_t * to);

// A matrix of the predictor is repacked unit by unit: a row, or a panel.
int64_t tsffn_cuda_units(const struct tsffn_weights * matrix);
size_t tsffn_cuda_unit_bytes(const struct tsffn_weights * matrix);
void tsffn_cuda_repack_unit(const struct tsffn_weights * matrix, int64_t unit, uint8_t * to);

#endif
