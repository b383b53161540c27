#include "launch.cuh"
#include "prefill.cuh"

using namespace tsffn;

namespace {

template <class Rows> constexpr size_t tiles_bytes(int weight_words) {
    return shared_memory::bytes<uint32_t>(STAGES * weight_words) + shared_memory::bytes<uint32_t>(STAGES * Rows::WORDS);
}

constexpr size_t GATE_UP_SHARED = tiles_bytes<row_loader<GATE_UP_THREADS>>(gate_up_loader<TSFFN_CUDA_F32>::WORDS) +
                                  shared_memory::bytes<uint32_t>(GATE_UP_THREADS / WARP * TSFFN_CUDA_TILE_COUNTS);
constexpr size_t ADD_DOWN_SHARED = tiles_bytes<row_loader<ADD_DOWN_THREADS>>(down_loader<TSFFN_CUDA_F32>::WORDS);

// function(format as a constant)
template <class Function> int with_format(int format, Function function) {
    return with_instance<TSFFN_CUDA_F32, TSFFN_CUDA_Q4_0>(format, 1, function);
}

} // namespace

size_t tsffn_cuda_prefill_shared(void) {
    return GATE_UP_SHARED > ADD_DOWN_SHARED ? GATE_UP_SHARED : ADD_DOWN_SHARED;
}

int tsffn_cuda_launch_split_x(const struct tsffn_cuda_prefill_args * args, void * stream) {
    return launch(split_x, dim3((unsigned)args->n_tokens), THREADS, shared_memory::bytes<float>(WARPS), args, stream);
}

int tsffn_cuda_launch_list_needed(const struct tsffn_cuda_prefill_args * args, void * stream) {
    return launch(list_needed, dim3((unsigned)args->n_groups), THREADS, shared_memory::bytes<int>(WARPS), args, stream);
}

int tsffn_cuda_launch_gate_up(int format, const struct tsffn_cuda_prefill_args * args, void * stream) {
    const dim3 grid((unsigned)tsffn_cuda_neuron_tiles(args->chunk), (unsigned)args->n_tiles);
    return with_format(format, [&](auto i) {
        return launch(gate_up<decltype(i)::FORMAT>, grid, GATE_UP_THREADS, GATE_UP_SHARED, args, stream);
    });
}

int tsffn_cuda_launch_split_h(const struct tsffn_cuda_prefill_args * args, void * stream) {
    const dim3 grid((unsigned)args->tile_rows, (unsigned)args->n_tiles);
    return launch(split_h, grid, THREADS, shared_memory::bytes<float>(WARPS), args, stream);
}

int tsffn_cuda_launch_add_down(int format, const struct tsffn_cuda_prefill_args * args, void * stream) {
    const dim3 grid((unsigned)((args->n_embd + TILE_COLUMNS - 1) / TILE_COLUMNS), (unsigned)args->n_tiles);
    return with_format(format, [&](auto i) {
        return launch(add_down<decltype(i)::FORMAT>, grid, ADD_DOWN_THREADS, ADD_DOWN_SHARED, args, stream);
    });
}
