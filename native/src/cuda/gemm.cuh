// Products of weights with the halves of many rows (prefill_kernels.h), on tensor cores.
//
// A block goes along the inner dimension in steps of 32, a block of Q8_0 or Q4_0. For each step a tile of weights and a
// tile of rows are in shared memory, as halves, both with the inner dimension last. There are two of each: while one
// step is multiplied, the next one is loaded into registers, and then stored to the other tiles. So one barrier a step
// is enough.
//
// Weights become halves. Those of F16 stay what they are. An integer of Q8_0 or Q4_0 times its scale, and a weight of
// BF16 or F32, is rounded to 11 bits: by up to 2^-11 of it, or 2^-25 where it is below 2^-14. A weight above 65504
// would not be finite.
#pragma once

#include "prefill_kernels.h"
#include "rows.cuh"

namespace tsffn {

constexpr int STEP = TSFFN_CUDA_BLOCK, TERMS = TSFFN_CUDA_TERMS;
constexpr int STRIDE = STEP / 2 + 4; // words of a row of a tile: 8 rows' first 4 words are in 32 different banks
constexpr int TILE_ROWS = TSFFN_CUDA_TILE_ROWS, ROW_WARPS = TSFFN_CUDA_ROW_WARPS;
constexpr int WARP_ROWS = TILE_ROWS / ROW_WARPS, ROW_GROUPS = WARP_ROWS / 8; // that mma takes
constexpr int WEIGHT_GROUPS = 2;                                             // of 16 rows of weights, of a warp
constexpr int STAGES = 2;

// Sums of a warp: of each of its groups of weights with each of its groups of rows. Lane l has, with g = l / 4 and t =
// l % 4, [2 i + j] = row g + 8 i of the weights with row 2 t + j.
using warp_sums = float[WEIGHT_GROUPS][ROW_GROUPS][4];

// c += a b^T for 16 rows of weights, 8 rows, and 16 columns of both: lane l has of the weights rows g, g + 8, g, g + 8,
// words t, t, 4 + t, 4 + t; of the rows row g, words t and 4 + t.
static __device__ inline void multiply_halves(float c[4], const uint32_t a[4], const uint32_t b[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(__CUDACC__)
    for (int k = 0; k < 2; ++k) { // 8 columns each
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[2 * k]), "r"(a[2 * k + 1]), "r"(b[k]));
    }
#else
    host::mma(c, a, b);
#endif
}

// One step. weights: a tile, whose groups of this warp begin at rows first[k]; rows: the tiles of all terms.
static __device__ inline void multiply_step(const uint32_t * weights, const int first[WEIGHT_GROUPS],
                                            const uint32_t * rows, int first_row, warp_sums & sums) {
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int k = 0; k < STEP / 2; k += 8) {
        uint32_t a[WEIGHT_GROUPS][4];
#pragma unroll
        for (int i = 0; i < WEIGHT_GROUPS; ++i) {
            const uint32_t * at = weights + (first[i] + g) * STRIDE + k + t;
            a[i][0] = at[0], a[i][1] = at[8 * STRIDE], a[i][2] = at[4], a[i][3] = at[8 * STRIDE + 4];
        }
#pragma unroll
        for (int n = 0; n < ROW_GROUPS; ++n) {
#pragma unroll
            for (int term = 0; term < TERMS; ++term) {
                const uint32_t * at = rows + (term * TILE_ROWS + first_row + 8 * n + g) * STRIDE + k + t;
                const uint32_t b[2] = {at[0], at[4]};
#pragma unroll
                for (int i = 0; i < WEIGHT_GROUPS; ++i) {
                    multiply_halves(sums[i][n], a[i], b);
                }
            }
        }
    }
}

// ---- weights as halves

static __device__ inline __half2 as_half2(uint32_t bits) {
    return *reinterpret_cast<const __half2 *>(&bits);
}
static __device__ inline uint32_t bits_of(__half2 v) {
    return *reinterpret_cast<const uint32_t *>(&v);
}

// (integer - bias) * d of two bytes of w, which `selector` puts into the low bits of two halves that are 1024 and more.
static __device__ inline uint32_t scaled_bytes(uint32_t w, unsigned selector, float bias, __half2 d) {
    const __half2 integers = as_half2(__byte_perm(w, 0x64646464u, selector));
    return bits_of(__hmul2(__hsub2(integers, __floats2half2_rn(1024.0f + bias, 1024.0f + bias)), d));
}
constexpr unsigned FIRST_BYTES = 0x4140, LAST_BYTES = 0x4342;

// The weights of some words as pairs of halves: those of columns column_of(first, group) to + 3 in to[2 group] and the
// next one.
template <int FORMAT, int WORDS>
static __device__ inline void to_halves(const row_words<WORDS> & part, uint32_t to[WORDS * WORD_WEIGHTS<FORMAT> / 2]) {
    [[maybe_unused]] const __half2 d = __floats2half2_rn(part.d, part.d);
#pragma unroll
    for (int k = 0; k < WORDS; ++k) {
        const uint32_t w = part.w[k];
        if constexpr (FORMAT == TSFFN_CUDA_F32) {
            if (k % 2 == 0) {
                to[k / 2] = bits_of(__floats2half2_rn(__int_as_float((int)w), __int_as_float((int)part.w[k + 1])));
            }
        } else if constexpr (FORMAT == TSFFN_CUDA_F16) {
            to[k] = w;
        } else if constexpr (FORMAT == TSFFN_CUDA_BF16) {
            to[k] = bits_of(__floats2half2_rn(bf16_of_low(w), bf16_of_high(w)));
        } else if constexpr (FORMAT == TSFFN_CUDA_Q8_0) {
            to[2 * k] = scaled_bytes(w ^ 0x80808080u, FIRST_BYTES, 128.0f, d);
            to[2 * k + 1] = scaled_bytes(w ^ 0x80808080u, LAST_BYTES, 128.0f, d);
        } else {
            const uint32_t low = w & 0x0f0f0f0fu, high = w >> 4 & 0x0f0f0f0fu;
            to[4 * k] = scaled_bytes(low, FIRST_BYTES, 8.0f, d);
            to[4 * k + 1] = scaled_bytes(low, LAST_BYTES, 8.0f, d);
            to[4 * k + 2] = scaled_bytes(high, FIRST_BYTES, 8.0f, d);
            to[4 * k + 3] = scaled_bytes(high, LAST_BYTES, 8.0f, d);
        }
    }
}

// ---- the tile of rows

// A thread's pieces of 16 bytes of a tile of rows, for a block of N_THREADS.
template <int N_THREADS> class row_loader {
    static constexpr int PIECES = STEP / 8, UNITS = TILE_ROWS * PIECES / N_THREADS;
    static_assert(TILE_ROWS * PIECES % N_THREADS == 0, "every thread has as many");
    const uint16_t * at[UNITS]; // NULL: there is no such row
    int n;                      // halves of a term
    uint4 v[UNITS][TERMS];

  public:
    static constexpr int WORDS = TERMS * TILE_ROWS * STRIDE; // of a tile

    // row_of(i): the number of the tile's i-th row in `halves`, which has rows of TERMS * n; -1: none.
    template <class RowOf>
    __device__ row_loader(const uint16_t * halves, int columns, const RowOf & row_of) : n(columns) {
#pragma unroll
        for (int k = 0; k < UNITS; ++k) {
            const int unit = thread() + k * N_THREADS, row = row_of(unit / PIECES);
            at[k] = row < 0 ? nullptr : halves + (size_t)row * (size_t)(TERMS * n) + (size_t)(unit % PIECES * 8);
        }
    }

    __device__ void load(int step) {
#pragma unroll
        for (int k = 0; k < UNITS; ++k) {
#pragma unroll
            for (int term = 0; term < TERMS; ++term) {
                v[k][term] = at[k] == nullptr ? make_uint4(0, 0, 0, 0)
                                              : *reinterpret_cast<const uint4 *>(at[k] + term * n + step * STEP);
            }
        }
    }

    __device__ void store(uint32_t * tile) const {
#pragma unroll
        for (int k = 0; k < UNITS; ++k) {
            const int unit = thread() + k * N_THREADS;
#pragma unroll
            for (int term = 0; term < TERMS; ++term) {
                uint32_t * to = tile + (term * TILE_ROWS + unit / PIECES) * STRIDE + unit % PIECES * 4;
                *reinterpret_cast<uint4 *>(to) = v[k][term];
            }
        }
    }
};

// All steps of a block. weights: STAGES tiles of WORDS words; rows: as many.
template <int WORDS, class Weights, class Rows>
static __device__ inline void multiply_all(int n_steps, Weights & of_weights, Rows & of_rows, uint32_t * weights,
                                           uint32_t * rows, const int first[WEIGHT_GROUPS], int first_row,
                                           bool has_rows, warp_sums & sums) {
    if (n_steps > 0) {
        of_weights.load(0);
        of_rows.load(0);
    }
    for (int step = 0; step < n_steps; ++step) {
        uint32_t * tile = weights + step % STAGES * WORDS;
        uint32_t * row_tile = rows + step % STAGES * Rows::WORDS;
        of_weights.store(tile);
        of_rows.store(row_tile);
        __syncthreads(); // the tiles are there; those of the other stage are free when all have come here again
        if (step + 1 < n_steps) {
            of_weights.load(step + 1);
            of_rows.load(step + 1);
        }
        if (has_rows) {
            multiply_step(tile, first, row_tile, first_row, sums);
        }
    }
}

} // namespace tsffn
