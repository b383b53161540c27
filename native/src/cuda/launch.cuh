// Launching a kernel: its instance for a format and a number of rows is chosen at run time.
#pragma once

#include "device.cuh"

namespace tsffn {

// An instance: T is 1, or TSFFN_CUDA_SEGMENT_ROWS for several rows.
template <int F, int N> struct instance {
    static constexpr int FORMAT = F, T = N;
};

template <int FORMAT, class Function> auto with_rows(int n_rows, Function function) {
    return n_rows == 1 ? function(instance<FORMAT, 1>{}) : function(instance<FORMAT, TSFFN_CUDA_SEGMENT_ROWS>{});
}

// function(instance), for formats from FIRST to LAST.
template <int FIRST, int LAST, class Function> auto with_instance(int format, int n_rows, Function function) {
    if constexpr (FIRST < LAST) {
        if (format > FIRST) {
            return with_instance<FIRST + 1, LAST>(format, n_rows, function);
        }
    }
    return with_rows<FIRST>(n_rows, function);
}

// Beyond what every kernel may have, a kernel must ask for its shared memory.
enum { SHARED_WITHOUT_ASKING = 48 << 10 };

template <class Args>
cudaError_t launch(void (*kernel)(const Args), dim3 grid, unsigned threads, size_t shared, const Args * args,
                   void * stream) {
    if (shared > SHARED_WITHOUT_ASKING) {
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
        if (error != cudaSuccess) {
            return error;
        }
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, kernel, *args);
}

} // namespace tsffn
