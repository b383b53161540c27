// Which neurons a block computes. There is no pass that compacts the masks: every block reads those of its segment, a
// few KB, and takes its share of the set bits.
#pragma once

#include "device.cuh"

namespace tsffn {

// The neurons of an FFN that are on the device, as bits of the words of a mask.
struct neuron_range {
    int first, end;

    __device__ int first_word() const { return first / WARP; }
    __device__ int end_word() const { return (end + WARP - 1) / WARP; }
    // Those of a word's neurons that are in the range.
    __device__ uint32_t clip(int word, uint32_t bits) const {
        const int left = end - word * WARP;
        return word < first_word() || left <= 0 ? 0 : left < WARP ? bits & ((1u << left) - 1) : bits;
    }
};

// A word of a row's mask, within the range.
template <class Args>
static __device__ inline uint32_t mask_word(const Args & a, const neuron_range & range, int row, int word) {
    return range.clip(word, a.masks != nullptr ? a.masks[(size_t)row * (size_t)a.n_words + (size_t)word] : ALL_LANES);
}

// The neurons that some row of the segment needs.
template <class Args>
static __device__ inline uint32_t needed_word(const Args & a, const neuron_range & range,
                                              const tsffn_cuda_segment & segment, int word) {
    uint32_t bits = 0;
    for (int t = 0; t < segment.n_rows; ++t) {
        bits |= mask_word(a, range, segment.first_row + t, word);
    }
    return bits;
}

// A block's share of the neurons that its segment needs: places [first, end) among them, in ascending order.
//
// Thread t counts the set bits of words [t per, (t + 1) per) of the range; the sums of the threads before it tell at
// which place its first one is. How neurons are shared changes no sum: each gives its own h.
// Args: of a kernel, with `masks` and `n_words`.
template <class Args> class selection {
  public:
    int first, end;

    // All threads. `scratch` [WARPS].
    __device__ selection(const Args & args, const neuron_range & neurons, const tsffn_cuda_segment & rows, int block,
                         int n_blocks, int * scratch)
        : a(args), range(neurons), segment(rows) {
        const int n_words = range.end_word() - range.first_word(), per = (n_words + THREADS - 1) / THREADS;
        begin_word = range.first_word() + min(thread() * per, n_words);
        end_word = range.first_word() + min((thread() + 1) * per, n_words);
        int mine = 0;
        for (int w = begin_word; w < end_word; ++w) {
            mine += __popc(needed_word(a, range, segment, w));
        }
        const int up_to_me = warp_prefix_sum(mine);
        if (lane() == WARP - 1) {
            scratch[warp()] = up_to_me;
        }
        __syncthreads();
        int total = 0;
        place = up_to_me - mine;
        for (int i = 0; i < WARPS; ++i) {
            place += i < warp() ? scratch[i] : 0;
            total += scratch[i];
        }
        first = (int)((int64_t)total * block / n_blocks);
        end = (int)((int64_t)total * (block + 1) / n_blocks);
    }

    // Writes the neurons at the places [from, from + n) of the share to list [n]. All threads; the caller waits at a
    // barrier before and after. Returns how many there are.
    __device__ int list_from(int from, int n, int * list) const {
        const int to = min(from + n, end);
        int at = place;
        for (int w = begin_word; w < end_word && at < to; ++w) {
            for (uint32_t bits = needed_word(a, range, segment, w); bits != 0; bits &= bits - 1, ++at) {
                if (at >= from && at < to) {
                    list[at - from] = w * WARP + __ffs((int)bits) - 1;
                }
            }
        }
        return to - from;
    }

  private:
    const Args & a;
    const neuron_range & range;
    const tsffn_cuda_segment & segment;
    int begin_word, end_word; // this thread's
    int place;                // of its first neuron
};

} // namespace tsffn
