#include "launch.cuh"
#include "neurons.cuh"

using namespace tsffn;

size_t tsffn_cuda_neurons_shared(int format, int n_rows, int64_t columns) {
    return with_instance<TSFFN_CUDA_F32, TSFFN_CUDA_Q4_0>(format, n_rows, [&](auto i) {
        return neurons_memory<decltype(i)::FORMAT, decltype(i)::T>::bytes(n_rows, columns);
    });
}

int tsffn_cuda_launch_neurons(int format, int n_rows, const struct tsffn_cuda_args * args, void * stream) {
    const dim3 grid((unsigned)tsffn_cuda_neuron_blocks(args->n_ff), (unsigned)args->n_segments);
    const size_t shared = tsffn_cuda_neurons_shared(format, n_rows, args->n_embd);
    return with_instance<TSFFN_CUDA_F32, TSFFN_CUDA_Q4_0>(format, n_rows, [&](auto i) {
        return launch(neurons<decltype(i)::FORMAT, decltype(i)::T>, grid, THREADS, shared, args, stream);
    });
}
