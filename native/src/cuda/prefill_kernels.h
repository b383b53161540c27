// The kernels of a call of many rows, and what they are given. C and CUDA C++ read this file.
//
//   split_x       x of each token as halves (below)
//   list_needed   of each FFN, the neurons that some row needs
//   gate_up       h[r][p] = f(gate . x_r) * g(up . x_r), 0 where the mask is, for a chunk of neurons: p is the place of
//                 a neuron in the chunk
//   split_h       h as halves
//   add_down      y[r] += sum of h[r][p] * down over the chunk
//
// The masks are those of kernels.h. Rows that have one FFN are computed together, in tiles: a block multiplies a tile
// with a few neurons on tensor cores, f16 times f16 summed as f32.
//
// Halves: a row v is multiplied by a power of two, so that the largest |v| is from 2^14 to 2^15, and each product is
// the sum of TSFFN_CUDA_TERMS halves. With two of them the sum is v but for 2^-22 of it. What a weight loses as a half
// is in gemm.cuh.
#ifndef TSFFN_CUDA_PREFILL_KERNELS_H
#define TSFFN_CUDA_PREFILL_KERNELS_H

#include "kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

// Sizes of blocks. Tests with small layers have small ones.
enum {
    TSFFN_CUDA_TERMS = 2,
    TSFFN_CUDA_LISTED_ROWS = 64, // of a call, at most, whose neurons are listed; with more, all are computed
#ifndef TSFFN_CUDA_SMALL
    TSFFN_CUDA_GATE_UP_WARPS = 4,         // of a block: so many groups of 16 neurons,
    TSFFN_CUDA_ADD_DOWN_WARPS = 2,        // or of 32 columns,
    TSFFN_CUDA_ROW_WARPS = 2,             // times so many groups of 32 rows
    TSFFN_CUDA_CHUNK_NEURONS = 2048,      // of a chunk, at most
    TSFFN_CUDA_STREAMED_BYTES = 16 << 20, // of a chunk that comes from the host, about
#else
    TSFFN_CUDA_GATE_UP_WARPS = 2,
    TSFFN_CUDA_ADD_DOWN_WARPS = 2,
    TSFFN_CUDA_ROW_WARPS = 1,
    TSFFN_CUDA_CHUNK_NEURONS = 64,
    TSFFN_CUDA_STREAMED_BYTES = 1,
#endif
    TSFFN_CUDA_TILE_ROWS = 32 * TSFFN_CUDA_ROW_WARPS,
    TSFFN_CUDA_TILE_NEURONS = 16 * TSFFN_CUDA_GATE_UP_WARPS,
};

// What gate_up counts, for neurons of rows.
enum {
    TSFFN_CUDA_TILE_PREDICTED,
    TSFFN_CUDA_TILE_GATE_POSITIVE,
    TSFFN_CUDA_TILE_ACTIVE,
    TSFFN_CUDA_TILE_COUNTS,
};

// The parameter of these kernels. Pointers are the device's.
struct tsffn_cuda_prefill_args {
    const struct tsffn_cuda_segment * tiles;  // rows of one FFN, up to TSFFN_CUDA_TILE_ROWS of them
    const struct tsffn_cuda_segment * groups; // all rows of an FFN
    const int32_t * tokens;                   // [n_rows]
    int32_t first_tile, n_tiles;              // that a launch computes,
    int32_t tile_rows;                        // and how many rows the largest of all has
    int32_t n_groups, n_tokens;
    int32_t n_embd, n_ff, n_words; // n_words: of a row's mask
    const struct tsffn_cuda_ffn * ffns;
    uint32_t neuron_bytes, up_offset, down_offset; // of a neuron
    struct tsffn_activation activation;
    const uint32_t * masks; // [n_rows][n_words]; NULL: all neurons are on
    // The neurons of a chunk: those at the places [first, first + chunk) of
    //   streamed != NULL   streamed_ids [n_streamed], whose rows are at `streamed` one behind the other
    //   listed != NULL     listed[ffn] [n_listed[ffn]], of the FFN's range
    //   else               the FFN's range
    const uint8_t * streamed;
    const int32_t * streamed_ids;
    int32_t n_streamed;
    int32_t * listed;   // [n_ffns][n_ff]
    int32_t * n_listed; // [n_ffns]
    int32_t first, chunk;
    bool begins;         // y and the counts begin with this chunk
    const float * x;     // [n_tokens][n_embd]
    uint16_t * x_halves; // [n_tokens][TSFFN_CUDA_TERMS][n_embd]
    float * x_scale;     // [n_tokens] halves * scale = x
    float * h;           // [n_rows][chunk]
    uint16_t * h_halves; // [n_rows][TSFFN_CUDA_TERMS][chunk], 0 from the last neuron to the next multiple of 32
    float * h_scale;     // [n_rows]
    float * y;           // [n_rows][n_embd]
    uint32_t * counts;   // [tiles][blocks of neurons of a chunk][TSFFN_CUDA_TILE_COUNTS]
};

// Blocks of gate_up for a tile, with chunks of so many neurons.
static inline int tsffn_cuda_neuron_tiles(int64_t chunk) {
    return (int)((chunk + TSFFN_CUDA_TILE_NEURONS - 1) / TSFFN_CUDA_TILE_NEURONS);
}

// Bytes of shared memory that a block needs at most.
size_t tsffn_cuda_prefill_shared(void);

// Launches a kernel on a stream. Returns a cudaError_t.
int tsffn_cuda_launch_split_x(const struct tsffn_cuda_prefill_args * args, void * stream);
int tsffn_cuda_launch_list_needed(const struct tsffn_cuda_prefill_args * args, void * stream);
int tsffn_cuda_launch_gate_up(int format, const struct tsffn_cuda_prefill_args * args, void * stream);
int tsffn_cuda_launch_split_h(const struct tsffn_cuda_prefill_args * args, void * stream);
int tsffn_cuda_launch_add_down(int format, const struct tsffn_cuda_prefill_args * args, void * stream);

#ifdef __cplusplus
}
#endif

#endif
