// Opening the CUDA module.
#ifndef TSFFN_CUDA_LOAD_H
#define TSFFN_CUDA_LOAD_H

#include "interface.h"

// The module in the library at `path`, which stays open for as long as the process lives. NULL, with one line in
// `error`: no such library, or one of another version.
const struct tsffn_cuda_module * tsffn_cuda_load(const char * path, char * error, size_t error_size);

// The module of this process: the one that TSFFN_CUDA_MODULE names, else libtsffn-cuda.so beside this library. NULL
// with one line in `error`: none, or TSFFN_CUDA_MODULE=off.
const struct tsffn_cuda_module * tsffn_cuda_module_in_use(char * error, size_t error_size);

#endif
