// What all kernels use: a block's shared memory, sums over a warp, loads.
//
// Where a sum must have the same bits on every device and in the host's build, it is written with __fmul_rn, __fadd_rn
// and fmaf, which no compiler contracts.
#pragma once

#include "kernels.h"

#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace tsffn {

constexpr int WARP = 32, WARPS = TSFFN_CUDA_WARPS, THREADS = WARP * WARPS; // of a block
constexpr uint32_t ALL_LANES = 0xffffffffu;

// The dynamic shared memory of a block, in pieces that begin at multiples of 16 bytes. All threads take the same pieces
// in the same order. The tests' host build gives each piece memory of its own, so that an overrun is seen.
class shared_memory {
  public:
    template <class T> __device__ T * take(int n) {
#ifdef __CUDACC__
        extern __shared__ uint4 memory[];
        T * at = reinterpret_cast<T *>(reinterpret_cast<char *>(memory) + used);
        used += bytes<T>(n);
        return at;
#else
        return static_cast<T *>(host_take_shared(piece++, bytes<T>(n)));
#endif
    }

    template <class T> static __device__ __host__ constexpr unsigned bytes(int n) {
        return (unsigned)((n * (int)sizeof(T) + 15) / 16 * 16);
    }

  private:
#ifdef __CUDACC__
    unsigned used = 0;
#else
    unsigned piece = 0;
#endif
};

static __device__ inline int thread() {
    return (int)threadIdx.x;
}
static __device__ inline int lane() {
    return (int)threadIdx.x % WARP;
}
static __device__ inline int warp() {
    return (int)threadIdx.x / WARP;
}

// v of all lanes, to all of them, always added in the same order.
static __device__ inline float warp_sum(float v) {
    for (int step = WARP / 2; step > 0; step /= 2) {
        v = __fadd_rn(v, __shfl_xor_sync(ALL_LANES, v, step));
    }
    return v;
}

static __device__ inline float warp_max(float v) {
    for (int step = WARP / 2; step > 0; step /= 2) {
        v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, step));
    }
    return v;
}

// v of this lane and those below it.
static __device__ inline int warp_prefix_sum(int v) {
    for (int step = 1; step < WARP; step *= 2) {
        const int below = __shfl_up_sync(ALL_LANES, v, (unsigned)step);
        v += lane() >= step ? below : 0;
    }
    return v;
}

// Weights are read once by a kernel and never written: through the cache for such data. n / 4 words from an address
// that is a multiple of n.
static __device__ inline uint4 load16(const void * at) {
    return __ldg(static_cast<const uint4 *>(at));
}
static __device__ inline uint2 load8(const void * at) {
    return __ldg(static_cast<const uint2 *>(at));
}
static __device__ inline uint32_t load4(const void * at) {
    return __ldg(static_cast<const unsigned *>(at));
}
static __device__ inline float load_f16(const void * at) {
    return __half2float(__ushort_as_half(__ldg(static_cast<const unsigned short *>(at))));
}

static __device__ inline float f16_of_low(uint32_t word) {
    return __half2float(__ushort_as_half((unsigned short)word));
}
static __device__ inline float f16_of_high(uint32_t word) {
    return __half2float(__ushort_as_half((unsigned short)(word >> 16)));
}
static __device__ inline float bf16_of_low(uint32_t word) {
    return __int_as_float((int)(word << 16));
}
static __device__ inline float bf16_of_high(uint32_t word) {
    return __int_as_float((int)(word & 0xffff0000u));
}

} // namespace tsffn
