// Activations in shared memory, as the weights of a format are multiplied with them.
//
//   float formats    f32
//   Q8_0, Q4_0       I16: x_j = d q_j, d = max |x| / 32639 of the whole vector, q = 256 hi + lo, signed bytes
//   q3_nl            U14: x_j = d q_j, x_j >= 0, d = max x / 16383, q = 128 hi + lo, hi and lo from 0 to 127
//
// d and q have the bits that the CPU computes (cpu/kernels/convert.c). A lane reads 16 bytes at a time, so values lie
// in planes of 16-byte pieces: piece c of each plane belongs to chunk c of a row (layout.h), and 32 lanes that read
// neighbouring pieces meet no bank conflict.
//
//   F32            plane 0: 4 values
//   F16, BF16      planes 0, 1: the first, the last 4 of 8 values
//   Q8_0, q3_nl    planes 0: hi, 1: lo of 16 values
//   Q4_0           planes 0, 1: hi of the first, the last 16 of 32 values, 2, 3: lo; then int32 sums of q, of each
//   block
#pragma once

#include "device.cuh"

namespace tsffn {

template <int FORMAT> struct activations {
    enum {
        IS_FLOAT = FORMAT <= TSFFN_CUDA_BF16,
        CHUNK = FORMAT == TSFFN_CUDA_F32 ? 4
        : IS_FLOAT                       ? 8
        : FORMAT == TSFFN_CUDA_Q4_0      ? 32
                                         : 16, // values
        LEVELS = FORMAT == TSFFN_CUDA_Q3_NL ? TSFFN_CUDA_U14_MAX : TSFFN_CUDA_I16_MAX,
    };

    // 16-byte pieces of a vector of n values, n a multiple of 32.
    static __device__ __host__ constexpr int pieces(int n) {
        const int sums = FORMAT == TSFFN_CUDA_Q4_0 ? (n / TSFFN_CUDA_BLOCK + 3) / 4 : 0;
        return (IS_FLOAT ? n / 4 : n / 8) + sums;
    }

    static __device__ const int * sums(const uint4 * x, int n) { return reinterpret_cast<const int *>(x + n / 8); }

    // Where value j is, counted in values of a plane's type: float, or bytes of hi; lo is n values further.
    static __device__ int place(int j, int n) {
        const int in_piece = IS_FLOAT ? 4 : 16;
        return (j % CHUNK / in_piece * (n / CHUNK) + j / CHUNK) * in_piece + j % in_piece;
    }
};

// The largest |v| of all threads, to all of them.
static __device__ inline float block_max(float v, float * scratch) {
    v = warp_max(fabsf(v));
    if (lane() == 0) {
        scratch[warp()] = v;
    }
    __syncthreads();
    float most = scratch[0];
    for (int i = 1; i < WARPS; ++i) {
        most = fmaxf(most, scratch[i]);
    }
    return most;
}

// The nearest integer to v, ties to even, as the CPU rounds: 1.5 * 2^23 leaves it in the low bits. |v| < 2^22.
static __device__ inline int round_to_int(float v) {
    return __float_as_int(__fadd_rn(v, 12582912.0f)) - 0x4b400000;
}

// 4 values from j on of x [n] * scale; scale may be NULL. `to`: pieces(n).
template <int FORMAT>
static __device__ inline void place_values(const float v[4], float inverse, bool there, int j, int n, uint4 * to) {
    using kind = activations<FORMAT>;
    const int at = kind::place(j, n);
    if constexpr (kind::IS_FLOAT) {
        if (there) {
            *reinterpret_cast<float4 *>(reinterpret_cast<float *>(to) + at) = make_float4(v[0], v[1], v[2], v[3]);
        }
    } else {
        uint32_t hi = 0, lo = 0;
        int sum = 0;
        for (int k = 0; k < 4; ++k) {
            const int q = round_to_int(__fmul_rn(v[k], inverse));
            const int h = FORMAT == TSFFN_CUDA_Q3_NL ? q >> 7 & 127 : (q + 128) >> 8 & 255;
            hi |= (uint32_t)h << 8 * k;
            lo |= (uint32_t)(FORMAT == TSFFN_CUDA_Q3_NL ? q & 127 : q & 255) << 8 * k;
            sum += q;
        }
        if (there) {
            *reinterpret_cast<uint32_t *>(reinterpret_cast<char *>(to) + at) = hi;
            *reinterpret_cast<uint32_t *>(reinterpret_cast<char *>(to) + n + at) = lo;
        }
        if constexpr (FORMAT == TSFFN_CUDA_Q4_0) { // 8 lanes have a block
            for (int step = 1; step < TSFFN_CUDA_BLOCK / 4; step *= 2) {
                sum += __shfl_xor_sync(ALL_LANES, sum, step);
            }
            if (there && j % TSFFN_CUDA_BLOCK == 0) {
                reinterpret_cast<int *>(to + n / 8)[j / TSFFN_CUDA_BLOCK] = sum;
            }
        }
    }
}

// 4 values of x * scale from j on; scale may be NULL. 0 behind the end.
static __device__ inline void scaled_values(const float * x, const float * scale, int j, int n, float v[4]) {
    const float4 a = j < n ? *reinterpret_cast<const float4 *>(x + j) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
    for (int k = 0; scale != nullptr && j < n && k < 4; ++k) {
        v[k] = __fmul_rn(v[k], scale[j + k]);
    }
}

// The activations of x [n] * scale, n a multiple of 32, by all threads of a block, and their d, 1 for float formats.
// `scratch` [WARPS]. The caller waits at a barrier before it reads them.
template <int FORMAT>
static __device__ inline float convert(const float * x, const float * scale, int n, uint4 * to, float * scratch) {
    using kind = activations<FORMAT>;
    float v[4], inverse = 0.0f, d = 1.0f;
    if constexpr (!kind::IS_FLOAT) {
        float most = 0.0f;
        for (int j = 4 * thread(); j < n; j += 4 * THREADS) {
            scaled_values(x, scale, j, n, v);
            most = fmaxf(most, fmaxf(fmaxf(fabsf(v[0]), fabsf(v[1])), fmaxf(fabsf(v[2]), fabsf(v[3]))));
        }
        most = block_max(most, scratch);
        __syncthreads(); // scratch is the next vector's
        d = most / (float)kind::LEVELS;
        inverse = most > 0.0f ? (float)kind::LEVELS / most : 0.0f;
    }
    // Whole warps go round together: they exchange sums.
    for (int j = 4 * thread(); j - 4 * lane() < n; j += 4 * THREADS) {
        scaled_values(x, scale, j, n, v);
        place_values<FORMAT>(v, inverse, j < n, j, n, to);
    }
    return d;
}

} // namespace tsffn
