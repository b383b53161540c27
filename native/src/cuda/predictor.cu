#include "launch.cuh"
#include "predictor.cuh"

using namespace tsffn;

size_t tsffn_cuda_hidden_shared(int format, int n_rows, int64_t columns) {
    return with_instance<TSFFN_CUDA_F32, TSFFN_CUDA_Q4_0>(format, n_rows, [&](auto i) {
        return predictor_memory<decltype(i)::FORMAT, decltype(i)::T, TSFFN_CUDA_PANEL_ROWS>::bytes(n_rows, columns);
    });
}

size_t tsffn_cuda_mask_shared(int format, int n_rows, int64_t columns) {
    return with_instance<TSFFN_CUDA_F32, TSFFN_CUDA_Q3_NL>(format, n_rows, [&](auto i) {
        return predictor_memory<decltype(i)::FORMAT, decltype(i)::T, WARP>::bytes(n_rows, columns);
    });
}

int tsffn_cuda_launch_hidden(int format, int n_rows, const struct tsffn_cuda_args * args, void * stream) {
    const dim3 grid((unsigned)(args->max_rank / TSFFN_CUDA_PANEL_ROWS), (unsigned)args->n_segments);
    const size_t shared = tsffn_cuda_hidden_shared(format, n_rows, args->n_embd);
    return with_instance<TSFFN_CUDA_F32, TSFFN_CUDA_Q4_0>(format, n_rows, [&](auto i) {
        return launch(hidden<decltype(i)::FORMAT, decltype(i)::T>, grid, THREADS, shared, args, stream);
    });
}

int tsffn_cuda_launch_mask(int format, int n_rows, const struct tsffn_cuda_args * args, void * stream) {
    const int rounds = (args->n_words + TSFFN_CUDA_MASK_BLOCKS - 1) / TSFFN_CUDA_MASK_BLOCKS;
    const dim3 grid((unsigned)((args->n_words + rounds - 1) / rounds), (unsigned)args->n_segments);
    const size_t shared = tsffn_cuda_mask_shared(format, n_rows, args->max_rank);
    return with_instance<TSFFN_CUDA_F32, TSFFN_CUDA_Q3_NL>(format, n_rows, [&](auto i) {
        return launch(mask<decltype(i)::FORMAT, decltype(i)::T>, grid, THREADS, shared, args, stream);
    });
}
