// How the neurons of a token are chosen, as a user writes it (tsffn.h).
#ifndef TSFFN_SPARSITY_H
#define TSFFN_SPARSITY_H

#include <stdbool.h>
#include <stddef.h>

enum tsffn_sparsity_kind {
    TSFFN_SPARSITY_DEFAULT,   // predictor when the model names one, else exact
    TSFFN_SPARSITY_PREDICTOR, // the checkpoint's own mask
    TSFFN_SPARSITY_EXACT,     // no predictor: the unmasked activation, lossless
    TSFFN_SPARSITY_DENSE,     // what EXACT computes, every weight read and multiplied: a baseline
    TSFFN_SPARSITY_TOPK,      // no predictor: the neurons of the largest |h| (ffn/topk.h)
};

enum { TSFFN_SPARSITY_CHARS = 40 }; // of its text, with the 0 at its end

struct tsffn_sparsity {
    enum tsffn_sparsity_kind kind;
    double value; // PREDICTOR: what is added to the threshold. TOPK: the share of the neurons that is dropped
    char text[TSFFN_SPARSITY_CHARS];
};

// Reads "predictor", "predictor:D", "exact", "dense" or "topk:S"; NULL is DEFAULT, whose text is empty. False, with
// one line in `error` that begins with `name`, for anything else.
bool tsffn_parse_sparsity(const char * name, const char * text, struct tsffn_sparsity * sparsity, char * error,
                          size_t error_size);

#endif
