// Rows of weights (layout.h): a warp multiplies a row with activations, a thread adds a part of a row to sums.
#pragma once

#include "activations.cuh"

namespace tsffn {

// ---- products

// 16 bytes of a row, and the scale of their block.
struct row_chunk {
    uint4 w;
    float d;
};

template <int FORMAT> static __device__ inline row_chunk load_chunk(const uint8_t * row, int n, int c) {
    row_chunk chunk = {load16(row + 16 * c), 1.0f};
    if constexpr (FORMAT == TSFFN_CUDA_Q8_0) {
        chunk.d = load_f16(row + n + 2 * (c / 2));
    } else if constexpr (FORMAT == TSFFN_CUDA_Q4_0) {
        chunk.d = load_f16(row + n / 2 + 2 * c);
    }
    return chunk;
}

static __device__ inline int dot16(uint4 a, uint4 b) {
    int sum = __dp4a((int)a.x, (int)b.x, 0);
    sum = __dp4a((int)a.y, (int)b.y, sum);
    sum = __dp4a((int)a.z, (int)b.z, sum);
    return __dp4a((int)a.w, (int)b.w, sum);
}

static __device__ inline uint4 low_nibbles(uint4 w) {
    return make_uint4(w.x & 0x0f0f0f0fu, w.y & 0x0f0f0f0fu, w.z & 0x0f0f0f0fu, w.w & 0x0f0f0f0fu);
}
static __device__ inline uint4 high_nibbles(uint4 w) {
    return low_nibbles(make_uint4(w.x >> 4, w.y >> 4, w.z >> 4, w.w >> 4));
}

// The integer product of a chunk of Q4_0 with the q of its block: 32 products of at most 8 * 32639.
static __device__ inline int product_q4_0(uint4 w, const uint4 * x, int n, int c) {
    const int planes = n / 32; // pieces of each
    const uint4 low = low_nibbles(w), high = high_nibbles(w);
    const int hi = dot16(low, x[c]) + dot16(high, x[planes + c]);
    const int lo = dot16(low, x[2 * planes + c]) + dot16(high, x[3 * planes + c]);
    return 256 * hi + lo - 8 * activations<TSFFN_CUDA_Q4_0>::sums(x, n)[c];
}

// Of a chunk of Q8_0: 16 products of at most 128 * 32639.
static __device__ inline int product_q8_0(uint4 w, const uint4 * x, int n, int c) {
    return 256 * dot16(w, x[c]) + dot16(w, x[n / 16 + c]);
}

static __device__ inline float4 floats(uint4 v) {
    return make_float4(__int_as_float((int)v.x), __int_as_float((int)v.y), __int_as_float((int)v.z),
                       __int_as_float((int)v.w));
}

static __device__ inline float add_products(float sum, float a, float b, float c, float d, float4 x) {
    return fmaf(d, x.w, fmaf(c, x.z, fmaf(b, x.y, fmaf(a, x.x, sum))));
}

// sum + chunk . x. Of block formats x stands for q: its d comes last.
template <int FORMAT>
static __device__ inline float add_chunk(float sum, row_chunk chunk, const uint4 * x, int n, int c) {
    const uint4 w = chunk.w;
    if constexpr (FORMAT == TSFFN_CUDA_F32) {
        const float4 f = floats(w);
        return add_products(sum, f.x, f.y, f.z, f.w, floats(x[c]));
    } else if constexpr (FORMAT == TSFFN_CUDA_F16) {
        sum = add_products(sum, f16_of_low(w.x), f16_of_high(w.x), f16_of_low(w.y), f16_of_high(w.y), floats(x[c]));
        return add_products(sum, f16_of_low(w.z), f16_of_high(w.z), f16_of_low(w.w), f16_of_high(w.w),
                            floats(x[n / 8 + c]));
    } else if constexpr (FORMAT == TSFFN_CUDA_BF16) {
        sum = add_products(sum, bf16_of_low(w.x), bf16_of_high(w.x), bf16_of_low(w.y), bf16_of_high(w.y), floats(x[c]));
        return add_products(sum, bf16_of_low(w.z), bf16_of_high(w.z), bf16_of_low(w.w), bf16_of_high(w.w),
                            floats(x[n / 8 + c]));
    } else if constexpr (FORMAT == TSFFN_CUDA_Q8_0) {
        return fmaf(chunk.d, (float)product_q8_0(w, x, n, c), sum);
    } else {
        return fmaf(chunk.d, (float)product_q4_0(w, x, n, c), sum);
    }
}

// ---- sums

// A thread's part of a row: WORDS words of 4 bytes, and the scale of their block.
template <int WORDS> struct row_words {
    uint32_t w[WORDS];
    float d;
};

// Weights of a word.
template <int FORMAT>
constexpr int WORD_WEIGHTS = FORMAT == TSFFN_CUDA_F32    ? 1
                             : FORMAT <= TSFFN_CUDA_BF16 ? 2
                             : FORMAT == TSFFN_CUDA_Q8_0 ? 4
                                                         : 8;

// Words from `first` on, a multiple of WORDS.
template <int FORMAT, int WORDS>
static __device__ inline row_words<WORDS> load_words(const uint8_t * row, int n, int first) {
    static_assert(WORDS == 4 || WORDS == 2 || WORDS == 1, "one load");
    row_words<WORDS> part;
    if constexpr (WORDS == 1) {
        part.w[0] = load4(row + 4 * first);
    } else if constexpr (WORDS == 4) {
        const uint4 v = load16(row + 4 * first);
        part.w[0] = v.x, part.w[1] = v.y, part.w[2] = v.z, part.w[3] = v.w;
    } else {
        const uint2 v = load8(row + 4 * first);
        part.w[0] = v.x, part.w[1] = v.y;
    }
    part.d = 1.0f;
    if constexpr (FORMAT == TSFFN_CUDA_Q8_0) {
        part.d = load_f16(row + n + 2 * (first / 8));
    } else if constexpr (FORMAT == TSFFN_CUDA_Q4_0) {
        part.d = load_f16(row + n / 2 + 2 * (first / 4));
    }
    return part;
}

// The weights of a word before their scale, in the order of their columns; of Q4_0 4 columns, and those 16 further.
template <int FORMAT> static __device__ inline void widen_word(uint32_t w, float * v) {
    if constexpr (FORMAT == TSFFN_CUDA_F32) {
        v[0] = __int_as_float((int)w);
    } else if constexpr (FORMAT == TSFFN_CUDA_F16) {
        v[0] = f16_of_low(w), v[1] = f16_of_high(w);
    } else if constexpr (FORMAT == TSFFN_CUDA_BF16) {
        v[0] = bf16_of_low(w), v[1] = bf16_of_high(w);
    } else if constexpr (FORMAT == TSFFN_CUDA_Q8_0) {
        for (int k = 0; k < 4; ++k) {
            v[k] = (float)(int8_t)(w >> 8 * k);
        }
    } else {
        for (int k = 0; k < 4; ++k) {
            v[k] = (float)((int)(w >> 8 * k & 15u) - 8);
            v[4 + k] = (float)((int)(w >> (8 * k + 4) & 15u) - 8);
        }
    }
}

// The column of the group-th 4 weights of words from `first` on.
template <int FORMAT> static __device__ inline int column_of(int first, int group) {
    if constexpr (FORMAT == TSFFN_CUDA_Q4_0) {
        const int word = first + group / 2;
        return word / 4 * TSFFN_CUDA_BLOCK + word % 4 * 4 + group % 2 * 16;
    } else {
        return first * WORD_WEIGHTS<FORMAT> + 4 * group;
    }
}

// sums += h * those weights.
template <int FORMAT, int WORDS>
static __device__ inline void add_words(float h, const row_words<WORDS> & part, float * sums) {
    constexpr int N = WORD_WEIGHTS<FORMAT>;
    const float scaled = FORMAT >= TSFFN_CUDA_Q8_0 ? __fmul_rn(h, part.d) : h;
#pragma unroll
    for (int k = 0; k < WORDS; ++k) {
        float v[N];
        widen_word<FORMAT>(part.w[k], v);
#pragma unroll
        for (int e = 0; e < N; ++e) {
            sums[k * N + e] = fmaf(scaled, v[e], sums[k * N + e]);
        }
    }
}

} // namespace tsffn
