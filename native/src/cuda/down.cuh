// y[r] = sum_i h[r][i] * down_i, in two kernels and without atomics.
//
//   down      partial[r][s]: the neurons of share s, in ascending order. Share s has the words s, s + n_shares, ... of
//             the mask, so that hot neurons, which come first, are spread over all shares. What a share adds depends on
//             the row's own mask only, not on the other rows, nor on the card
//   combine   the shares in eight groups of neighbours, each in order; the groups in order; then cold
//
// A thread of `down` owns columns: it reads 16 bytes of each row (8 of Q4_0 for several rows, whose sums would not fit
// its registers otherwise) and adds into registers.
#pragma once

#include "rows.cuh"
#include "selection.cuh"

namespace tsffn {

constexpr int DOWN_WARPS = TSFFN_CUDA_DOWN_WARPS, DOWN_THREADS = WARP * DOWN_WARPS;
constexpr int DOWN_WORDS = 2 * DOWN_WARPS, DOWN_LISTED = WARP * DOWN_WORDS; // words of masks at a time, their neurons
constexpr int COMBINE_GROUPS = WARPS;

template <int T> struct down_memory {
    uint32_t * bits; // [DOWN_WORDS] neurons of which some row has h != 0
    int * list;      // [DOWN_LISTED]
    float * h;       // [T][DOWN_LISTED]

    __device__ down_memory() {
        shared_memory memory;
        bits = memory.take<uint32_t>(DOWN_WORDS);
        list = memory.take<int>(DOWN_LISTED);
        h = memory.take<float>(T * DOWN_LISTED);
    }

    static size_t bytes() {
        return shared_memory::bytes<uint32_t>(DOWN_WORDS) + shared_memory::bytes<int>(DOWN_LISTED) +
               shared_memory::bytes<float>(T * DOWN_LISTED);
    }
};

// h of the lane's neuron of a word, for row t of the segment; 0 where it is off.
static __device__ inline float h_of(const tsffn_cuda_args & a, const neuron_range & range,
                                    const tsffn_cuda_segment & segment, int t, int word) {
    const int row = segment.first_row + t;
    const bool on = (mask_word(a, range, row, word) >> lane() & 1u) != 0;
    return on ? a.h[(size_t)row * (size_t)a.n_ff + (size_t)(word * WARP + lane())] : 0.0f;
}

// Lists the neurons of DOWN_WORDS words of a share, from `word` on, of which some row has h != 0, and their h. A warp
// for each word, twice. Returns how many. All threads; the list is there when it returns, and is written anew only when
// all threads have called again.
template <int T>
static __device__ inline int list_active(const tsffn_cuda_args & a, const neuron_range & range,
                                         const tsffn_cuda_segment & segment, int word, const down_memory<T> & m) {
    float h[2][T];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        const int mine = word + (warp() + k * DOWN_WARPS) * a.n_shares;
        bool active = false;
#pragma unroll
        for (int t = 0; t < T; ++t) {
            h[k][t] = t < segment.n_rows && mine < range.end_word() ? h_of(a, range, segment, t, mine) : 0.0f;
            active = active || h[k][t] != 0.0f;
        }
        const uint32_t bits = __ballot_sync(ALL_LANES, active);
        if (lane() == 0) {
            m.bits[warp() + k * DOWN_WARPS] = bits;
        }
    }
    __syncthreads();
    int n = 0;
    for (int i = 0; i < DOWN_WORDS; ++i) {
        const uint32_t bits = m.bits[i];
        if (i % DOWN_WARPS == warp() && (bits >> lane() & 1u) != 0) {
            const int at = n + __popc(bits & ((1u << lane()) - 1));
            m.list[at] = (word + i * a.n_shares) * WARP + lane();
#pragma unroll
            for (int t = 0; t < T; ++t) {
                m.h[t * DOWN_LISTED + at] = i < DOWN_WARPS ? h[0][t] : h[1][t];
            }
        }
        n += __popc(bits);
    }
    __syncthreads();
    return n;
}

// Words of 4 bytes that a thread owns of a row.
template <int FORMAT, int T> constexpr int OWN_WORDS = T > 1 && FORMAT == TSFFN_CUDA_Q4_0 ? 2 : 4;

// Grid: slabs of columns, shares, segments.
template <int FORMAT, int T> __global__ void __launch_bounds__(DOWN_THREADS, 4) down(const tsffn_cuda_args a) {
    constexpr int WORDS = OWN_WORDS<FORMAT, T>, COLUMNS = WORDS * WORD_WEIGHTS<FORMAT>;
    const tsffn_cuda_segment segment = a.segments[blockIdx.z];
    const tsffn_cuda_ffn * ffn = a.ffns + segment.ffn;
    const neuron_range range = {ffn->first, ffn->end};
    const uint8_t * all = ffn->neurons + a.down_offset;
    const down_memory<T> m;
    const int first = ((int)blockIdx.x * DOWN_THREADS + thread()) * WORDS; // word of a row
    const bool mine = first * WORD_WEIGHTS<FORMAT> < a.n_embd;
    float sums[T][COLUMNS] = {{0.0f}};
    const int share = (int)blockIdx.y;
    // The first word of the share that is in the range.
    const int begin = share + max(range.first_word() - share + a.n_shares - 1, 0) / a.n_shares * a.n_shares;
    for (int word = begin; word < range.end_word(); word += DOWN_WORDS * a.n_shares) {
        const int n = list_active<T>(a, range, segment, word, m);
#pragma unroll 4
        for (int k = 0; k < n && mine; ++k) {
            const uint8_t * row = all + (size_t)(m.list[k] - range.first) * a.neuron_bytes;
            const row_words<WORDS> part = load_words<FORMAT, WORDS>(row, a.n_embd, first);
#pragma unroll
            for (int t = 0; t < T; ++t) {
                const float h = m.h[t * DOWN_LISTED + k];
                if (T == 1 || h != 0.0f) {
                    add_words<FORMAT, WORDS>(h, part, sums[t]);
                }
            }
        }
    }
#pragma unroll
    for (int t = 0; t < T; ++t) {
        if (!mine || t >= segment.n_rows) {
            continue;
        }
        const size_t row = (size_t)(segment.first_row + t) * (size_t)a.n_shares + (size_t)share;
#pragma unroll
        for (int group = 0; group < COLUMNS / 4; ++group) {
            const float * v = sums[t] + 4 * group;
            *reinterpret_cast<float4 *>(a.partial + row * (size_t)a.n_embd + (size_t)column_of<FORMAT>(first, group)) =
                make_float4(v[0], v[1], v[2], v[3]);
        }
    }
}

// A warp for each group of shares, a lane for each of 32 columns. Grid: blocks of 32 columns, rows.
static __global__ void __launch_bounds__(THREADS) combine(const tsffn_cuda_args a) {
    shared_memory memory;
    float * groups = memory.take<float>(COMBINE_GROUPS * WARP);
    const int column = (int)blockIdx.x * WARP + lane();
    const int first = warp() * a.n_shares / COMBINE_GROUPS, end = (warp() + 1) * a.n_shares / COMBINE_GROUPS;
    const float * partial = a.partial + (size_t)blockIdx.y * (size_t)a.n_shares * (size_t)a.n_embd + (size_t)column;
    float sum = 0.0f;
#pragma unroll 4
    for (int s = first; s < end; ++s) {
        sum = __fadd_rn(sum, partial[(size_t)s * (size_t)a.n_embd]);
    }
    groups[thread()] = sum;
    __syncthreads();
    if (warp() != 0) {
        return;
    }
    float total = 0.0f;
    for (int group = 0; group < COMBINE_GROUPS; ++group) {
        total = __fadd_rn(total, groups[group * WARP + lane()]);
    }
    const size_t at = (size_t)blockIdx.y * (size_t)a.n_embd + (size_t)column;
    a.y[at] = a.cold != nullptr ? __fadd_rn(total, a.cold[at]) : total;
}

} // namespace tsffn
