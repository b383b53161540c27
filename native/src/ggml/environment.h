// The environment of programs that cannot call this library: llama-server and the rest of llama.cpp's own
// (docs/usage.md).
#ifndef TSFFN_ENVIRONMENT_H
#define TSFFN_ENVIRONMENT_H

#include "../model/model.h"

// Opens the model that TSFFN_MODEL names and arms it for the process; true also where none is named. TSFFN_PREDICTOR,
// TSFFN_SPARSITY, TSFFN_HOT and TSFFN_RESIDENCY go with it. The counters are written to TSFFN_STATS when the process
// ends. False with one line in `error` when a variable or a file is wrong.
bool tsffn_open_from_environment(char * error, size_t error_size);

// To be called before a graph is computed: gives, once, a GPU its share, if TSFFN_GPU names one. It takes as much of
// its memory as TSFFN_VRAM_BUDGET says, and neurons as TSFFN_GPU_HOT does.
void tsffn_share_from_environment(void);

// To be called when a context begins: does once, as soon as the weights are there, what TSFFN_HOT asks for.
void tsffn_place_from_environment(void);

#endif
