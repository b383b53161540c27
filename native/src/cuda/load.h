// Opening the CUDA module.
#ifndef TSFFN_CUDA_LOAD_H
#define TSFFN_CUDA_LOAD_H

#include "interface.h"

// The module in the library at `path`, which stays open for as long as the process lives. NULL, with one line in
// `error`: no such library, or one of another version.
const struct tsffn_cuda_module * tsffn_cuda_load(const char * path, char * error, size_t error_size);

#endif
