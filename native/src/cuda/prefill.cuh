// The kernels of prefill_kernels.h.
#pragma once

#include "gemm.cuh"
#include "selection.cuh"

namespace tsffn {

// ---- the neurons of a chunk

// Those of an FFN, by their places.
struct neuron_places {
    const uint8_t * rows;
    const int32_t * ids; // NULL: `first` and those after it
    int first, n;
    bool in_order; // rows are in the order of places, not of ids

    __device__ int id(int place) const { return ids != nullptr ? ids[place] : first + place; }
    __device__ size_t row(int place) const { return (size_t)(in_order ? place : id(place) - first); }
};

static __device__ inline neuron_places places_of(const tsffn_cuda_prefill_args & a, int ffn) {
    if (a.streamed != nullptr) {
        return {a.streamed, a.streamed_ids, 0, a.n_streamed, true};
    }
    const tsffn_cuda_ffn & of = a.ffns[ffn];
    if (a.listed != nullptr) {
        return {of.neurons, a.listed + (size_t)ffn * (size_t)a.n_ff, of.first, a.n_listed[ffn], false};
    }
    return {of.neurons, nullptr, of.first, of.end - of.first, true};
}

// How many of them are in the chunk.
static __device__ inline int places_in_chunk(const tsffn_cuda_prefill_args & a, const neuron_places & all) {
    return max(min(all.n - a.first, a.chunk), 0);
}

// Grid: FFNs with rows.
static __global__ void __launch_bounds__(THREADS) list_needed(const tsffn_cuda_prefill_args a) {
    const tsffn_cuda_segment rows = a.groups[blockIdx.x];
    const neuron_range range = {a.ffns[rows.ffn].first, a.ffns[rows.ffn].end};
    shared_memory memory;
    const selection all(a, range, rows, 0, 1, memory.take<int>(WARPS));
    all.list_from(0, all.end, a.listed + (size_t)rows.ffn * (size_t)a.n_ff);
    if (thread() == 0) {
        a.n_listed[rows.ffn] = all.end;
    }
}

// ---- halves

// v [n] as the sum of TERMS halves times `scale`, which is a power of two; 0 from n to the next multiple of 32. All
// threads of a block. to [TERMS][stride]; `scratch` [WARPS].
static __device__ inline void split_row(const float * v, int n, uint16_t * to, int stride, float * scale,
                                        float * scratch) {
    float most = 0.0f;
    for (int j = thread(); j < n; j += THREADS) {
        most = fmaxf(most, fabsf(v[j]));
    }
    // most * up is from 2^14 to 2^15. Exponents from 1 on are those of normal floats.
    const int exponent = min(268 - (__float_as_int(block_max(most, scratch)) >> 23), 253);
    const float up = __int_as_float(exponent << 23), down = __int_as_float((254 - exponent) << 23);
    for (int j = 2 * thread(); j < (n + STEP - 1) / STEP * STEP; j += 2 * THREADS) {
        float left[2] = {j < n ? __fmul_rn(v[j], up) : 0.0f, j + 1 < n ? __fmul_rn(v[j + 1], up) : 0.0f};
#pragma unroll
        for (int term = 0; term < TERMS; ++term) {
            uint32_t bits = 0;
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const __half half = __float2half_rn(left[k]);
                left[k] = __fadd_rn(left[k], -__half2float(half));
                bits |= (uint32_t)__half_as_ushort(half) << 16 * k;
            }
            *reinterpret_cast<uint32_t *>(to + term * stride + j) = bits;
        }
    }
    if (thread() == 0) {
        *scale = down;
    }
}

// Grid: tokens.
static __global__ void __launch_bounds__(THREADS) split_x(const tsffn_cuda_prefill_args a) {
    shared_memory memory;
    const size_t token = blockIdx.x, n = (size_t)a.n_embd;
    split_row(a.x + token * n, a.n_embd, a.x_halves + token * TERMS * n, a.n_embd, a.x_scale + token,
              memory.take<float>(WARPS));
}

// Grid: rows of a tile, tiles.
static __global__ void __launch_bounds__(THREADS) split_h(const tsffn_cuda_prefill_args a) {
    const tsffn_cuda_segment tile = a.tiles[a.first_tile + (int)blockIdx.y];
    const int n = places_in_chunk(a, places_of(a, tile.ffn));
    if ((int)blockIdx.x >= tile.n_rows) {
        return;
    }
    shared_memory memory;
    const size_t row = (size_t)tile.first_row + blockIdx.x, chunk = (size_t)a.chunk;
    split_row(a.h + row * chunk, n, a.h_halves + row * TERMS * chunk, a.chunk, a.h_scale + row,
              memory.take<float>(WARPS));
}

// ---- gate and up

constexpr int GATE_UP_WARPS = TSFFN_CUDA_GATE_UP_WARPS, GATE_UP_THREADS = WARP * GATE_UP_WARPS * ROW_WARPS;
constexpr int TILE_NEURONS = TSFFN_CUDA_TILE_NEURONS;

// A thread's pieces of the rows of gate and up of a tile's neurons: the tile has those of gate first.
template <int FORMAT> class gate_up_loader {
    static constexpr int PIECE = FORMAT == TSFFN_CUDA_Q4_0 ? 2 : 4;                             // words
    static constexpr int STEP_WORDS = STEP / WORD_WEIGHTS<FORMAT>, PIECES = STEP_WORDS / PIECE; // of a row
    static constexpr int UNITS = 2 * TILE_NEURONS * PIECES / GATE_UP_THREADS;
    static_assert(2 * TILE_NEURONS * PIECES % GATE_UP_THREADS == 0, "every thread has as many");
    const uint8_t * rows[UNITS]; // NULL: there is no such neuron
    int n;
    row_words<PIECE> parts[UNITS];

  public:
    static constexpr int WORDS = 2 * TILE_NEURONS * STRIDE; // of a tile

    // The neurons at the places from `first` to `end`.
    __device__ gate_up_loader(const tsffn_cuda_prefill_args & a, const neuron_places & places, int first, int end)
        : n(a.n_embd) {
#pragma unroll
        for (int k = 0; k < UNITS; ++k) {
            const int row = (thread() + k * GATE_UP_THREADS) / PIECES, place = first + row % TILE_NEURONS;
            rows[k] = place >= end
                          ? nullptr
                          : places.rows + places.row(place) * a.neuron_bytes + (row >= TILE_NEURONS ? a.up_offset : 0);
        }
    }

    __device__ void load(int step) {
#pragma unroll
        for (int k = 0; k < UNITS; ++k) {
            const int piece = (thread() + k * GATE_UP_THREADS) % PIECES;
            if (rows[k] != nullptr) {
                parts[k] = load_words<FORMAT, PIECE>(rows[k], n, step * STEP_WORDS + piece * PIECE);
            } else {
                parts[k] = {};
            }
        }
    }

    __device__ void store(uint32_t * tile) const {
#pragma unroll
        for (int k = 0; k < UNITS; ++k) {
            const int unit = thread() + k * GATE_UP_THREADS, first = unit % PIECES * PIECE;
            uint32_t halves[PIECE * WORD_WEIGHTS<FORMAT> / 2];
            to_halves<FORMAT, PIECE>(parts[k], halves);
#pragma unroll
            for (int group = 0; group < PIECE * WORD_WEIGHTS<FORMAT> / 4; ++group) {
                uint32_t * to = tile + unit / PIECES * STRIDE + column_of<FORMAT>(first, group) / 2;
                *reinterpret_cast<uint2 *>(to) = make_uint2(halves[2 * group], halves[2 * group + 1]);
            }
        }
    }
};

// counts [warps][TSFFN_CUDA_TILE_COUNTS], of all lanes; those of the block go to `to`, or are added there.
static __device__ inline void add_tile_counts(const int mine[TSFFN_CUDA_TILE_COUNTS], uint32_t * counts, uint32_t * to,
                                              bool begins) {
#pragma unroll
    for (int k = 0; k < TSFFN_CUDA_TILE_COUNTS; ++k) {
        const int up_to_me = warp_prefix_sum(mine[k]);
        if (lane() == WARP - 1) {
            counts[warp() * TSFFN_CUDA_TILE_COUNTS + k] = (uint32_t)up_to_me;
        }
    }
    __syncthreads();
    if (thread() < TSFFN_CUDA_TILE_COUNTS) {
        uint32_t sum = begins ? 0 : to[thread()];
        for (int k = 0; k < GATE_UP_THREADS / WARP; ++k) {
            sum += counts[k * TSFFN_CUDA_TILE_COUNTS + thread()];
        }
        to[thread()] = sum;
    }
}

// Grid: tiles of neurons of the chunk, tiles of rows.
template <int FORMAT> __global__ void __launch_bounds__(GATE_UP_THREADS, 2) gate_up(const tsffn_cuda_prefill_args a) {
    using weight_tiles = gate_up_loader<FORMAT>;
    using row_tiles = row_loader<GATE_UP_THREADS>;
    shared_memory memory;
    uint32_t * weights = memory.take<uint32_t>(STAGES * weight_tiles::WORDS);
    uint32_t * rows = memory.take<uint32_t>(STAGES * row_tiles::WORDS);
    uint32_t * counts = memory.take<uint32_t>(GATE_UP_THREADS / WARP * TSFFN_CUDA_TILE_COUNTS);
    const int tile_number = a.first_tile + (int)blockIdx.y;
    const tsffn_cuda_segment tile = a.tiles[tile_number];
    const neuron_places places = places_of(a, tile.ffn);
    const int first = (int)blockIdx.x * TILE_NEURONS, end = places_in_chunk(a, places);
    uint32_t * block_counts = a.counts + ((size_t)tile_number * gridDim.x + blockIdx.x) * TSFFN_CUDA_TILE_COUNTS;
    int mine[TSFFN_CUDA_TILE_COUNTS] = {0};
    if (first >= end) {
        if (a.begins) {
            add_tile_counts(mine, counts, block_counts, true);
        }
        return;
    }
    const int neuron_warp = warp() / ROW_WARPS, first_row = warp() % ROW_WARPS * WARP_ROWS;
    const int first_weight[WEIGHT_GROUPS] = {16 * neuron_warp, TILE_NEURONS + 16 * neuron_warp};
    warp_sums sums = {};
    {
        weight_tiles of_weights(a, places, a.first + first, a.first + end);
        row_tiles of_rows(a.x_halves, a.n_embd,
                          [&](int i) { return i < tile.n_rows ? a.tokens[tile.first_row + i] : -1; });
        multiply_all<weight_tiles::WORDS>(a.n_embd / STEP, of_weights, of_rows, weights, rows, first_weight, first_row,
                                          first_row < tile.n_rows, sums);
    }
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int at = first + 16 * neuron_warp + g + 8 * i;
        const int id = at < end ? places.id(a.first + at) : 0;
#pragma unroll
        for (int k = 0; k < 2 * ROW_GROUPS; ++k) {
            const int in_tile = first_row + 8 * (k / 2) + 2 * t + k % 2, row = tile.first_row + in_tile;
            if (at >= end || in_tile >= tile.n_rows) {
                continue;
            }
            const bool on = a.masks == nullptr ||
                            (a.masks[(size_t)row * (size_t)a.n_words + (size_t)(id / WARP)] >> id % WARP & 1u) != 0;
            const float scale = a.x_scale[a.tokens[row]];
            const float f = tsffn_factor_of(a.activation.gate, __fmul_rn(sums[0][k / 2][2 * i + k % 2], scale));
            const float u = tsffn_factor_of(a.activation.up, __fmul_rn(sums[1][k / 2][2 * i + k % 2], scale));
            const float h = on && f != 0.0f ? __fmul_rn(f, u) : 0.0f;
            a.h[(size_t)row * (size_t)a.chunk + (size_t)at] = h;
            mine[TSFFN_CUDA_TILE_PREDICTED] += on;
            mine[TSFFN_CUDA_TILE_GATE_POSITIVE] += on && f != 0.0f;
            mine[TSFFN_CUDA_TILE_ACTIVE] += h != 0.0f;
        }
    }
    add_tile_counts(mine, counts, block_counts, a.begins);
}

// ---- down

constexpr int ADD_DOWN_WARPS = TSFFN_CUDA_ADD_DOWN_WARPS, ADD_DOWN_THREADS = WARP * ADD_DOWN_WARPS * ROW_WARPS;
constexpr int TILE_COLUMNS = 16 * WEIGHT_GROUPS * ADD_DOWN_WARPS;

// A thread's pieces of the rows of down: of two neurons that follow each other, whose weights of a column are a word of
// the tile, which has a row for each column.
template <int FORMAT> class down_loader {
    static constexpr int PIECE = FORMAT == TSFFN_CUDA_Q4_0 ? 1 : FORMAT == TSFFN_CUDA_Q8_0 ? 2 : 4; // words
    static constexpr int COLUMNS = PIECE * WORD_WEIGHTS<FORMAT>, PAIRS = STEP / 2;
    static constexpr int UNITS = PAIRS * (TILE_COLUMNS / COLUMNS) / ADD_DOWN_THREADS;
    static_assert(PAIRS * (TILE_COLUMNS / COLUMNS) % ADD_DOWN_THREADS == 0, "every thread has as many");
    const tsffn_cuda_prefill_args & a;
    const neuron_places & places;
    int first_word, end; // of a row: the tile's first one; of places
    row_words<PIECE> parts[UNITS][2];

  public:
    static constexpr int WORDS = TILE_COLUMNS * STRIDE; // of a tile

    // The neurons of the chunk, which are before place `end_place`.
    __device__ down_loader(const tsffn_cuda_prefill_args & args, const neuron_places & neurons, int first_column,
                           int end_place)
        : a(args), places(neurons), first_word(first_column / WORD_WEIGHTS<FORMAT>), end(end_place) {}

    __device__ void load(int step) {
#pragma unroll
        for (int k = 0; k < UNITS; ++k) {
            const int unit = thread() + k * ADD_DOWN_THREADS, word = first_word + unit / PAIRS * PIECE;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int place = a.first + step * STEP + 2 * (unit % PAIRS) + i;
                if (place < end && word * WORD_WEIGHTS<FORMAT> < a.n_embd) {
                    const uint8_t * row = places.rows + places.row(place) * a.neuron_bytes + a.down_offset;
                    parts[k][i] = load_words<FORMAT, PIECE>(row, a.n_embd, word);
                } else {
                    parts[k][i] = {};
                }
            }
        }
    }

    __device__ void store(uint32_t * tile) const {
#pragma unroll
        for (int k = 0; k < UNITS; ++k) {
            const int unit = thread() + k * ADD_DOWN_THREADS;
            uint32_t halves[2][COLUMNS / 2];
            to_halves<FORMAT, PIECE>(parts[k][0], halves[0]);
            to_halves<FORMAT, PIECE>(parts[k][1], halves[1]);
#pragma unroll
            for (int j = 0; j < COLUMNS / 2; ++j) {
                const int column = column_of<FORMAT>(unit / PAIRS * PIECE, j / 2) + 2 * (j % 2);
                uint32_t * to = tile + column * STRIDE + unit % PAIRS;
                to[0] = __byte_perm(halves[0][j], halves[1][j], 0x5410);
                to[STRIDE] = __byte_perm(halves[0][j], halves[1][j], 0x7632);
            }
        }
    }
};

// Grid: tiles of columns, tiles of rows.
template <int FORMAT> __global__ void __launch_bounds__(ADD_DOWN_THREADS, 4) add_down(const tsffn_cuda_prefill_args a) {
    using weight_tiles = down_loader<FORMAT>;
    using row_tiles = row_loader<ADD_DOWN_THREADS>;
    shared_memory memory;
    uint32_t * weights = memory.take<uint32_t>(STAGES * weight_tiles::WORDS);
    uint32_t * rows = memory.take<uint32_t>(STAGES * row_tiles::WORDS);
    const tsffn_cuda_segment tile = a.tiles[a.first_tile + (int)blockIdx.y];
    const neuron_places places = places_of(a, tile.ffn);
    const int n = places_in_chunk(a, places), first = (int)blockIdx.x * TILE_COLUMNS;
    if (n == 0 && !a.begins) {
        return;
    }
    const int column_warp = warp() / ROW_WARPS, first_row = warp() % ROW_WARPS * WARP_ROWS;
    const int first_weight[WEIGHT_GROUPS] = {32 * column_warp, 32 * column_warp + 16};
    warp_sums sums = {};
    {
        weight_tiles of_weights(a, places, first, a.first + n);
        row_tiles of_rows(a.h_halves, a.chunk, [&](int i) { return i < tile.n_rows ? tile.first_row + i : -1; });
        multiply_all<weight_tiles::WORDS>((n + STEP - 1) / STEP, of_weights, of_rows, weights, rows, first_weight,
                                          first_row, first_row < tile.n_rows, sums);
    }
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int i = 0; i < 2 * WEIGHT_GROUPS; ++i) {
        const int column = first + 32 * column_warp + 8 * i + g;
#pragma unroll
        for (int k = 0; k < 2 * ROW_GROUPS; ++k) {
            const int in_tile = first_row + 8 * (k / 2) + 2 * t + k % 2, row = tile.first_row + in_tile;
            if (column >= a.n_embd || in_tile >= tile.n_rows) {
                continue;
            }
            float * y = a.y + (size_t)row * (size_t)a.n_embd + (size_t)column;
            const float sum = n > 0 ? __fmul_rn(sums[i / 2][k / 2][2 * (i % 2) + k % 2], a.h_scale[row]) : 0.0f;
            *y = a.begins ? sum : __fadd_rn(*y, sum);
        }
    }
}

} // namespace tsffn
