// Row kernels of the dot-product extension (rows_neondot.c) for the table in kernels_neon.c.
#ifndef TSFFN_ROWS_NEONDOT_H
#define TSFFN_ROWS_NEONDOT_H

#include "kernels.h"

float tsffn_dot_q8_0_neondot(int64_t n, const void * row, const void * x);
float tsffn_dot_q4_0_neondot(int64_t n, const void * row, const void * x);
void tsffn_dot4_q8_0_neondot(int64_t n, const void * row, const void * const x[4], float s[4]);
void tsffn_dot4_q4_0_neondot(int64_t n, const void * row, const void * const x[4], float s[4]);

#endif
