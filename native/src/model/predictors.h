// The predictors of a sidecar.
#ifndef TSFFN_PREDICTORS_H
#define TSFFN_PREDICTORS_H

#include "model_file.h"

enum { TSFFN_N_PREDICTOR_MATRICES = 3 }; // at most, of an FFN: fc1, fc2, fc3 (ffn/layer.h)

// Reads how the predictors of `file` decide, and where their matrices are in the mapped sidecar of `model`.
bool tsffn_read_predictors(const struct tsffn_gguf * file, struct tsffn_model * model);

#endif
