// Top-k sparsity: of a token's neurons only those of the largest |h| add to the output (TurboSparse, arXiv:2406.05955,
// equations 3 and 4). It shows what a share of the neurons is worth; it cannot be predicted, so that gate and up are
// computed of every neuron.
#ifndef TSFFN_TOPK_H
#define TSFFN_TOPK_H

#include <stdint.h>

// Sets h [n] to 0 but for the `keep` values of the largest magnitude. Of equal ones the first stay. A NaN is larger
// than any number.
void tsffn_keep_largest(float * h, int64_t n, int64_t keep);

// How many of n neurons stay at a sparsity from 0 to below 1: n less the nearest whole number to sparsity * n, halves
// rounded up, but at least one.
static inline int64_t tsffn_topk_kept(double sparsity, int64_t n) {
    const int64_t kept = n - (int64_t)(sparsity * (double)n + 0.5);
    return kept > 0 ? kept : 1;
}

#endif
