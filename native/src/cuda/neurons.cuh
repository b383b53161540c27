// h[r][i] = f(gate_i . x_r) * g(up_i . x_r) for the neurons that are on: f, g of ffn/activation.h.
//
// A block takes a share of the neurons (selection.cuh), a warp one neuron at a time. Gate and up are loaded together:
// most neurons that a predictor lets through have gate > 0, so that up is needed, and one latency less is worth more
// than the few rows that are read for nothing. 16 bytes a lane: a warp reads 512 bytes of each row at once.
#pragma once

#include "rows.cuh"
#include "selection.cuh"

namespace tsffn {

constexpr int LISTED = TSFFN_CUDA_LISTED; // neurons of a block at a time

template <int FORMAT, int T> struct neurons_memory {
    uint4 * x;         // [T] activations
    float * d;         // [T] of them
    float * scratch;   // [WARPS]
    int * totals;      // [WARPS]
    int * list;        // [LISTED]
    uint32_t * counts; // [WARPS][TSFFN_CUDA_COUNTS]

    __device__ neurons_memory(int n_x, int n) {
        shared_memory memory;
        x = memory.take<uint4>(n_x * activations<FORMAT>::pieces(n));
        d = memory.take<float>(T);
        scratch = memory.take<float>(WARPS);
        totals = memory.take<int>(WARPS);
        list = memory.take<int>(LISTED);
        counts = memory.take<uint32_t>(WARPS * TSFFN_CUDA_COUNTS);
    }

    static size_t bytes(int n_x, int64_t n) {
        return shared_memory::bytes<uint4>(n_x * activations<FORMAT>::pieces((int)n)) + shared_memory::bytes<float>(T) +
               shared_memory::bytes<float>(WARPS) + shared_memory::bytes<int>(WARPS) +
               shared_memory::bytes<int>(LISTED) + shared_memory::bytes<uint32_t>(WARPS * TSFFN_CUDA_COUNTS);
    }
};

// The rows of the segment that need a neuron, as bits. All lanes of a warp.
static __device__ inline uint32_t rows_that_need(const tsffn_cuda_args & a, const neuron_range & range,
                                                 const tsffn_cuda_segment & segment, int neuron) {
    const bool needs = lane() < segment.n_rows &&
                       (mask_word(a, range, segment.first_row + lane(), neuron / WARP) >> neuron % WARP & 1u) != 0;
    return __ballot_sync(ALL_LANES, needs);
}

// gate . x_t and up . x_t of a neuron, before the d of x, for the rows in `rows`: each lane its chunks' part.
template <int FORMAT, int T>
static __device__ inline void multiply_neuron(const uint8_t * gate, const uint8_t * up, int n, const uint4 * x,
                                              uint32_t rows, float gates[T], float ups[T]) {
    const int stride = activations<FORMAT>::pieces(n);
#pragma unroll
    for (int t = 0; t < T; ++t) {
        gates[t] = ups[t] = 0.0f;
    }
#pragma unroll(T == 1 && FORMAT != TSFFN_CUDA_Q4_0 ? 4 : 2)
    for (int c = lane(); c < n / activations<FORMAT>::CHUNK; c += WARP) {
        const row_chunk of_gate = load_chunk<FORMAT>(gate, n, c), of_up = load_chunk<FORMAT>(up, n, c);
#pragma unroll
        for (int t = 0; t < T; ++t) {
            if (T == 1 || (rows >> t & 1u) != 0) {
                gates[t] = add_chunk<FORMAT>(gates[t], of_gate, x + t * stride, n, c);
                ups[t] = add_chunk<FORMAT>(ups[t], of_up, x + t * stride, n, c);
            }
        }
    }
}

// Grid: blocks that share a segment's neurons, segments.
template <int FORMAT, int T> __global__ void __launch_bounds__(THREADS, 2) neurons(const tsffn_cuda_args a) {
    const tsffn_cuda_segment segment = a.segments[blockIdx.y];
    const tsffn_cuda_ffn * ffn = a.ffns + segment.ffn;
    const neuron_range range = {ffn->first, ffn->end};
    const uint8_t * all = ffn->neurons;
    const neurons_memory<FORMAT, T> m(segment.n_rows, a.n_embd);
    for (int t = 0; t < segment.n_rows; ++t) {
        const float * x = a.x + (size_t)a.tokens[segment.first_row + t] * (size_t)a.n_embd;
        const float d =
            convert<FORMAT>(x, nullptr, a.n_embd, m.x + t * activations<FORMAT>::pieces(a.n_embd), m.scratch);
        if (thread() == 0) {
            m.d[t] = d;
        }
    }
    const selection share(a, range, segment, (int)blockIdx.x, (int)gridDim.x, m.totals);
    uint32_t counts[TSFFN_CUDA_COUNTS] = {0};
    for (int from = share.first; from < share.end; from += LISTED) {
        __syncthreads(); // the list before is read
        const int n_listed = share.list_from(from, LISTED, m.list);
        __syncthreads();
        for (int k = warp(); k < n_listed; k += WARPS) {
            const int neuron = m.list[k];
            const uint32_t rows = rows_that_need(a, range, segment, neuron);
            const uint8_t * gate = all + (size_t)(neuron - range.first) * a.neuron_bytes;
            float gates[T], ups[T];
            bool is_active = false;
            multiply_neuron<FORMAT, T>(gate, gate + a.up_offset, a.n_embd, m.x, rows, gates, ups);
#pragma unroll
            for (int t = 0; t < T; ++t) {
                if (T > 1 && (rows >> t & 1u) == 0) {
                    continue;
                }
                const float f = tsffn_factor_of(a.activation.gate, __fmul_rn(warp_sum(gates[t]), m.d[t]));
                const float g = tsffn_factor_of(a.activation.up, __fmul_rn(warp_sum(ups[t]), m.d[t]));
                const float h = f != 0.0f ? __fmul_rn(f, g) : 0.0f;
                if (lane() == 0) {
                    a.h[(size_t)(segment.first_row + t) * (size_t)a.n_ff + (size_t)neuron] = h;
                }
                counts[TSFFN_CUDA_COUNT_PREDICTED] += 1;
                counts[TSFFN_CUDA_COUNT_GATE_POSITIVE] += f != 0.0f;
                counts[TSFFN_CUDA_COUNT_ACTIVE] += h != 0.0f;
                is_active = is_active || h != 0.0f;
            }
            counts[TSFFN_CUDA_COUNT_READ] += 1;
            counts[TSFFN_CUDA_COUNT_READ_DOWN] += is_active;
        }
    }
    if (lane() == 0) {
#pragma unroll
        for (int k = 0; k < TSFFN_CUDA_COUNTS; ++k) {
            m.counts[warp() * TSFFN_CUDA_COUNTS + k] = counts[k];
        }
    }
    __syncthreads();
    if (thread() < TSFFN_CUDA_COUNTS) {
        uint32_t sum = 0;
        for (int k = 0; k < WARPS; ++k) {
            sum += m.counts[k * TSFFN_CUDA_COUNTS + thread()];
        }
        a.counts[((size_t)blockIdx.y * gridDim.x + blockIdx.x) * TSFFN_CUDA_COUNTS + (size_t)thread()] = sum;
    }
}

} // namespace tsffn
