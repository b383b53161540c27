#include "down.cuh"
#include "launch.cuh"

using namespace tsffn;

int tsffn_cuda_launch_down(int format, int n_rows, const struct tsffn_cuda_args * args, void * stream) {
    return with_instance<TSFFN_CUDA_F32, TSFFN_CUDA_Q4_0>(format, n_rows, [&](auto i) {
        constexpr int FORMAT = decltype(i)::FORMAT, T = decltype(i)::T;
        constexpr int COLUMNS = DOWN_THREADS * OWN_WORDS<FORMAT, T> * WORD_WEIGHTS<FORMAT>; // of a block
        const dim3 grid((unsigned)((args->n_embd + COLUMNS - 1) / COLUMNS), (unsigned)args->n_shares,
                        (unsigned)args->n_segments);
        return launch(down<FORMAT, T>, grid, DOWN_THREADS, down_memory<T>::bytes(), args, stream);
    });
}

int tsffn_cuda_launch_combine(const struct tsffn_cuda_args * args, void * stream) {
    const dim3 grid((unsigned)(args->n_embd / WARP), (unsigned)args->n_rows);
    return launch(combine, grid, THREADS, shared_memory::bytes<float>(COMBINE_GROUPS * WARP), args, stream);
}
