// The predictor: logits = fc2 . relu(fc1 . p), p = x * pred_scale.
//
// Every row of both matrices is read. Of Q8_0, Q4_0 and q3_nl all products are summed in integers and the few float
// operations are the CPU's, in its order (cpu/kernels/panels.h): a hidden value, a logit and a mask have the CPU's bits
// where the CPU multiplies panels. Of other matrices (float types; rows outside of panels) even the CPU's tiers sum in
// different orders: here each lane of a warp sums its chunks, and the lanes' sums are added as a tree. A logit is then
// within n * 2^-24 * sum |w_j x_j| of the exact one, and so is the CPU's: masks can differ where a logit is that close
// to the threshold, and nowhere else.
//
// `hidden` and `mask` compute the same products: of 16 or 32 rows of a matrix with up to T activations, by a block.
// Result i of activation t is in out[t * ROWS + i], and thread t * ROWS + i may read it.
#pragma once

#include "rows.cuh"

namespace tsffn {

// ---- panels of Q8_0 and Q4_0

template <int FORMAT> struct panel {
    static constexpr int WORDS = FORMAT == TSFFN_CUDA_Q8_0 ? 8 : 4; // of a row in a block of 32 columns
    static constexpr int BLOCK_BYTES = FORMAT == TSFFN_CUDA_Q8_0 ? TSFFN_CUDA_PANEL_Q8_0 : TSFFN_CUDA_PANEL_Q4_0;

    // The integer product of row `row` of block b of a panel with each activation: exact.
    template <int T>
    static __device__ void products(const uint8_t * at, int row, int b, int n, const uint4 * x, int stride, int n_x,
                                    int p[T]) {
        uint32_t w[WORDS];
#pragma unroll
        for (int g = 0; g < WORDS; ++g) {
            w[g] = load4(at + 32 + 64 * g + 4 * row);
        }
        const uint4 first = make_uint4(w[0], w[1], w[2], w[3]);
#pragma unroll
        for (int t = 0; t < T; ++t) {
            if (t >= n_x) {
                break;
            }
            if constexpr (FORMAT == TSFFN_CUDA_Q8_0) {
                p[t] = product_q8_0(first, x + t * stride, n, 2 * b) +
                       product_q8_0(make_uint4(w[4], w[5], w[6], w[7]), x + t * stride, n, 2 * b + 1);
            } else {
                p[t] = product_q4_0(first, x + t * stride, n, b);
            }
        }
    }
};

// The blocks of columns whose products are in shared memory at a time.
template <int T> constexpr int TILE = T == 1 ? (int)TSFFN_CUDA_TILE_ONE : (int)TSFFN_CUDA_TILE;

// Row i of the panels . x_t, t < n_x. A panel has 16 rows; n columns are n / 32 blocks. For each
// tile of blocks: threads share the integer products; then one thread for each result adds them, in the order of
// blocks, each with one fused multiply-add. terms [T][TILE][ROWS], scales [TILE][ROWS].
template <int FORMAT, int T, int ROWS>
static __device__ inline void multiply_panels(const uint8_t * panels, int n, const uint4 * x, const float * d, int n_x,
                                              int * terms, float * scales, float * out) {
    using kind = panel<FORMAT>;
    constexpr int STRIDE = THREADS / ROWS; // blocks at a time
    const int n_blocks = n / TSFFN_CUDA_BLOCK, stride = activations<FORMAT>::pieces(n);
    const int row = thread() % ROWS, of_panel = row % TSFFN_CUDA_PANEL_ROWS;
    const uint8_t * mine = panels + (size_t)(row / TSFFN_CUDA_PANEL_ROWS) * (size_t)n_blocks * kind::BLOCK_BYTES;
    float sum = 0.0f; // of result (thread / ROWS, row)
    for (int b0 = 0; b0 < n_blocks; b0 += TILE<T>) {
        const int end = min(b0 + TILE<T>, n_blocks);
#pragma unroll 2
        for (int b = b0 + thread() / ROWS; b < end; b += STRIDE) {
            const uint8_t * at = mine + (size_t)b * kind::BLOCK_BYTES;
            int p[T];
            kind::template products<T>(at, of_panel, b, n, x, stride, n_x, p);
            scales[(b - b0) * ROWS + row] = load_f16(at + 2 * of_panel);
#pragma unroll
            for (int t = 0; t < T; ++t) {
                if (t < n_x) {
                    terms[(t * TILE<T> + b - b0) * ROWS + row] = p[t];
                }
            }
        }
        __syncthreads();
        if (thread() < n_x * ROWS) {
            for (int b = 0; b < end - b0; ++b) {
                sum = fmaf(scales[b * ROWS + row], (float)terms[(thread() / ROWS * TILE<T> + b) * ROWS + row], sum);
            }
        }
        __syncthreads(); // the next tile's products take the place of these
    }
    if (thread() < n_x * ROWS) {
        out[thread()] = __fmul_rn(sum, d[thread() / ROWS]);
    }
}

// ---- panels of q3_nl

// The levels of 4 codes, the low 3 bits of each byte.
static __device__ inline int levels_q3_nl(uint32_t codes) {
    constexpr uint32_t FIRST = 0xfefbf7f1u;    // -15 -9 -5 -2
    constexpr uint32_t LAST = 0x0d080401u;     // 1 4 8 13
    const uint32_t pairs = codes | codes >> 4; // a code in each nibble of bytes 0 and 2
    return (int)__byte_perm(FIRST, LAST, (pairs & 0xffu) | (pairs >> 8 & 0xff00u));
}

// w[g] = levels of columns 4 g to 4 g + 3 of a row in a block: cpu/kernels/panels.h says where their codes are.
static __device__ inline void widen_q3_nl(const uint8_t * block, int row, int w[8]) {
    uint32_t q[3];
#pragma unroll
    for (int g = 0; g < 3; ++g) {
        q[g] = load4(block + TSFFN_CUDA_PANEL_ROWS + 64 * g + 4 * row);
        w[g] = levels_q3_nl(q[g] & 0x07070707u);
        w[3 + g] = levels_q3_nl(q[g] >> 3 & 0x07070707u);
    }
    w[6] = levels_q3_nl((q[0] >> 6 & 0x03030303u) | (q[2] >> 4 & 0x04040404u));
    w[7] = levels_q3_nl((q[1] >> 6 & 0x03030303u) | (q[2] >> 5 & 0x04040404u));
}

// scale 0 * (the first 16 columns' product) + scale 1 * (the last 16's). x: hi or lo of the block, two pieces.
static __device__ inline int product_q3_nl(const int w[8], int scales, const uint4 * x) {
    const int first = dot16(make_uint4((unsigned)w[0], (unsigned)w[1], (unsigned)w[2], (unsigned)w[3]), x[0]);
    const int last = dot16(make_uint4((unsigned)w[4], (unsigned)w[5], (unsigned)w[6], (unsigned)w[7]), x[1]);
    return ((int)((unsigned)scales << 28) >> 28) * first + ((int)((unsigned)scales << 24) >> 28) * last;
}

// As multiply_panels, of two panels: each warp takes blocks of columns, a lane for each of the 32 rows. Integer sums of
// up to 2^17 columns fit 32 bits, in any order. terms [2][WARPS][T][32].
template <int T>
static __device__ inline void multiply_q3_nl(const uint8_t * panels, int n, const uint4 * x, const float * d, int n_x,
                                             int * terms, float * out) {
    constexpr int ROWS = 2 * TSFFN_CUDA_PANEL_ROWS;
    const int n_blocks = n / TSFFN_CUDA_BLOCK, stride = activations<TSFFN_CUDA_Q3_NL>::pieces(n);
    const size_t panel_bytes = TSFFN_CUDA_PANEL_Q3_NL_HEADER + (size_t)n_blocks * TSFFN_CUDA_PANEL_Q3_NL;
    const int row = lane() % TSFFN_CUDA_PANEL_ROWS;
    const uint8_t * mine = panels + (size_t)(lane() / TSFFN_CUDA_PANEL_ROWS) * panel_bytes;
    int hi[T] = {0}, lo[T] = {0};
#pragma unroll 2
    for (int b = warp(); b < n_blocks; b += WARPS) {
        const uint8_t * block = mine + TSFFN_CUDA_PANEL_Q3_NL_HEADER + (size_t)b * TSFFN_CUDA_PANEL_Q3_NL;
        int w[8];
        widen_q3_nl(block, row, w);
        const int scales = __ldg(block + row);
#pragma unroll
        for (int t = 0; t < T; ++t) {
            if (t < n_x) {
                hi[t] += product_q3_nl(w, scales, x + t * stride + 2 * b);
                lo[t] += product_q3_nl(w, scales, x + t * stride + n / 16 + 2 * b);
            }
        }
    }
#pragma unroll
    for (int t = 0; t < T; ++t) {
        terms[(warp() * T + t) * ROWS + lane()] = hi[t];
        terms[((WARPS + warp()) * T + t) * ROWS + lane()] = lo[t];
    }
    __syncthreads();
    if (warp() < n_x) {
        int hi_sum = 0, lo_sum = 0;
        for (int k = 0; k < WARPS; ++k) {
            hi_sum += terms[(k * T + warp()) * ROWS + lane()];
            lo_sum += terms[((WARPS + k) * T + warp()) * ROWS + lane()];
        }
        const float sum = fmaf(128.0f, (float)hi_sum, (float)lo_sum);
        out[thread()] = __fmul_rn(__fmul_rn(sum, load_f16(mine + 2 * row)), d[warp()]);
    }
}

// ---- rows of float formats

// Of the rows [first, end) of a matrix, ROWS at most; 0 for those behind the end. A warp for each.
template <int FORMAT, int T, int ROWS>
static __device__ inline void multiply_rows(const uint8_t * matrix, int first, int end, int n, const uint4 * x, int n_x,
                                            float * out) {
    const size_t row_bytes = (size_t)n * (FORMAT == TSFFN_CUDA_F32 ? 4 : 2);
    const int stride = activations<FORMAT>::pieces(n);
    for (int i = warp(); i < ROWS; i += WARPS) {
        const bool there = first + i < end;
        const uint8_t * row = matrix + (size_t)(first + i) * row_bytes;
        float sum[T] = {0.0f};
#pragma unroll 4
        for (int c = lane(); there && c < n / activations<FORMAT>::CHUNK; c += WARP) {
            const row_chunk chunk = load_chunk<FORMAT>(row, n, c);
#pragma unroll
            for (int t = 0; t < T; ++t) {
                if (t < n_x) {
                    sum[t] = add_chunk<FORMAT>(sum[t], chunk, x + t * stride, n, c);
                }
            }
        }
#pragma unroll
        for (int t = 0; t < T; ++t) {
            const float total = warp_sum(sum[t]);
            if (lane() == 0) {
                out[t * ROWS + i] = total;
            }
        }
    }
    __syncthreads();
}

// ---- the kernels

// What a block of either kernel has in shared memory.
template <int FORMAT, int T, int ROWS> struct predictor_memory {
    uint4 * x;       // [T] activations
    float * d;       // [T] of them
    float * scratch; // [WARPS]
    float * out;     // [T][ROWS] products
    int * terms;     // as the multiplication needs them
    float * scales;

    static __device__ __host__ constexpr int n_terms() {
        return FORMAT == TSFFN_CUDA_Q3_NL ? 2 * WARPS * T * ROWS : FORMAT >= TSFFN_CUDA_Q8_0 ? T * TILE<T> * ROWS : 0;
    }
    static __device__ __host__ constexpr int n_scales() {
        return FORMAT == TSFFN_CUDA_Q8_0 || FORMAT == TSFFN_CUDA_Q4_0 ? TILE<T> * ROWS : 0;
    }

    __device__ predictor_memory(int n_x, int n) {
        shared_memory memory;
        x = memory.take<uint4>(n_x * activations<FORMAT>::pieces(n));
        d = memory.take<float>(T);
        scratch = memory.take<float>(WARPS);
        out = memory.take<float>(T * ROWS);
        terms = memory.take<int>(n_terms());
        scales = memory.take<float>(n_scales());
    }

    static size_t bytes(int n_x, int64_t n) {
        return shared_memory::bytes<uint4>(n_x * activations<FORMAT>::pieces((int)n)) + shared_memory::bytes<float>(T) +
               shared_memory::bytes<float>(WARPS) + shared_memory::bytes<float>(T * ROWS) +
               shared_memory::bytes<int>(n_terms()) + shared_memory::bytes<float>(n_scales());
    }
};

// out = rows [first, first + ROWS) of a matrix of n columns, which ends at row `end`, . the activations.
template <int FORMAT, int T, int ROWS>
static __device__ inline void multiply(const uint8_t * matrix, int first, int end, int n, int n_x,
                                       const predictor_memory<FORMAT, T, ROWS> & m) {
    if constexpr (FORMAT == TSFFN_CUDA_Q3_NL) {
        static_assert(ROWS == 2 * TSFFN_CUDA_PANEL_ROWS, "two panels");
        const size_t panel_bytes =
            TSFFN_CUDA_PANEL_Q3_NL_HEADER + (size_t)(n / TSFFN_CUDA_BLOCK) * TSFFN_CUDA_PANEL_Q3_NL;
        multiply_q3_nl<T>(matrix + (size_t)(first / TSFFN_CUDA_PANEL_ROWS) * panel_bytes, n, m.x, m.d, n_x, m.terms,
                          m.out);
    } else if constexpr (FORMAT >= TSFFN_CUDA_Q8_0) {
        const size_t panel_bytes = (size_t)(n / TSFFN_CUDA_BLOCK) * panel<FORMAT>::BLOCK_BYTES;
        multiply_panels<FORMAT, T, ROWS>(matrix + (size_t)(first / TSFFN_CUDA_PANEL_ROWS) * panel_bytes, n, m.x, m.d,
                                         n_x, m.terms, m.scales, m.out);
    } else {
        multiply_rows<FORMAT, T, ROWS>(matrix, first, end, n, m.x, n_x, m.out);
    }
}

// h1[r][k] = relu(fc1_k . p_r); 0 for k from the rank to the next multiple of 32. Grid: 16 rows of fc1 a block,
// segments.
template <int FORMAT, int T> __global__ void __launch_bounds__(THREADS, 2) hidden(const tsffn_cuda_args a) {
    constexpr int ROWS = TSFFN_CUDA_PANEL_ROWS;
    const tsffn_cuda_segment segment = a.segments[blockIdx.y];
    const tsffn_cuda_ffn * ffn = a.ffns + segment.ffn;
    const int first = (int)blockIdx.x * ROWS, rank = ffn->rank, n_x = segment.n_rows;
    if (first >= (rank + 31) / 32 * 32) {
        return;
    }
    const predictor_memory<FORMAT, T, ROWS> m(n_x, a.n_embd);
    for (int t = 0; t < n_x; ++t) {
        const float * x = a.x + (size_t)a.tokens[segment.first_row + t] * (size_t)a.n_embd;
        const float d =
            convert<FORMAT>(x, a.pred_scale, a.n_embd, m.x + t * activations<FORMAT>::pieces(a.n_embd), m.scratch);
        if (thread() == 0) {
            m.d[t] = d;
        }
    }
    __syncthreads();
    multiply<FORMAT, T, ROWS>(ffn->fc1, first, rank, a.n_embd, n_x, m);
    if (thread() < n_x * ROWS) {
        const float v = m.out[thread()];
        const int k = first + thread() % ROWS;
        a.hidden[(size_t)(segment.first_row + thread() / ROWS) * (size_t)a.max_rank + (size_t)k] =
            k < rank && v > 0.0f ? v : 0.0f;
    }
}

// Word w of row r's mask: neurons 32 w to 32 w + 31, 0 from n_ff on. Grid: blocks that go through the words, segments.
template <int FORMAT, int T> __global__ void __launch_bounds__(THREADS, 2) mask(const tsffn_cuda_args a) {
    constexpr int ROWS = WARP;
    const tsffn_cuda_segment segment = a.segments[blockIdx.y];
    const tsffn_cuda_ffn * ffn = a.ffns + segment.ffn;
    const int n_x = segment.n_rows, n = (ffn->rank + 31) / 32 * 32;
    const predictor_memory<FORMAT, T, ROWS> m(n_x, n);
    for (int t = 0; t < n_x; ++t) {
        const float * h1 = a.hidden + (size_t)(segment.first_row + t) * (size_t)a.max_rank;
        const float d = convert<FORMAT>(h1, nullptr, n, m.x + t * activations<FORMAT>::pieces(n), m.scratch);
        if (thread() == 0) {
            m.d[t] = d;
        }
    }
    __syncthreads();
    for (int word = (int)blockIdx.x; word < a.n_words; word += (int)gridDim.x) {
        multiply<FORMAT, T, ROWS>(ffn->fc2, word * WARP, a.n_ff, n, n_x, m);
        if (warp() < n_x) {
            const float logit = m.out[thread()];
            const bool on = a.on_when_equal ? logit >= a.threshold : logit > a.threshold;
            const uint32_t bits = __ballot_sync(ALL_LANES, word * WARP + lane() < a.n_ff && on);
            if (lane() == 0) {
                a.masks[(size_t)(segment.first_row + warp()) * (size_t)a.n_words + (size_t)word] = bits;
            }
        }
        __syncthreads(); // the next word's products take the place of these
    }
}

} // namespace tsffn
