// Stands in for CUDA's header where the kernels and the module are compiled for the host: the sources are the same.
//
// A kernel's threads are fibers of one thread of the host (fibers.h), or threads of the host (threads.h) where
// TSFFN_HOST_THREADS is defined. A stream is a list of what was enqueued; it is computed when somebody waits for it, so
// that what waits too little finds nothing (runtime.cpp). Memory consistency between blocks, launch bounds and speed
// cannot be seen in this way.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

// ---- the language

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
static inline uint2 make_uint2(unsigned x, unsigned y) {
    return {x, y};
}
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}
static inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}

namespace host {
// Where the running thread of a kernel is.
struct position {
    unsigned thread;
    dim3 block, grid;
};
#ifdef TSFFN_HOST_THREADS
extern thread_local position here;
#else
extern position here;
#endif
void barrier(const char * file, int line);
// Every lane of the warp puts a value and gets that of lane `from`.
uint64_t exchange(uint64_t value, unsigned from);
// Bit i is that of lane i.
uint32_t ballot(bool bit);
// mma.m16n8k16 of a warp: c += a b, whose parts a lane has as struct fragment (block.h) says.
void mma(float c[4], const uint32_t a[4], const uint32_t b[2]);
// Calls `body` once for each thread of each block.
void run_grid(dim3 grid, unsigned threads, size_t shared, const std::function<void()> & body);

template <class T> T exchange_as(T value, unsigned from) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(value));
    bits = exchange(bits, from);
    memcpy(&value, &bits, sizeof(value));
    return value;
}
} // namespace host

// Piece number `piece` of the running block's shared memory.
void * host_take_shared(unsigned piece, unsigned bytes);

// Objects whose x, y and z are those of the running thread.
namespace host {
template <unsigned get()> struct coordinate {
    operator unsigned() const { return get(); }
};
inline unsigned thread_x() {
    return here.thread;
}
template <dim3 position::* index, unsigned dim3::* axis> unsigned of() {
    return here.*index.*axis;
}
template <dim3 position::* index> struct dimensions {
    coordinate<of<index, &dim3::x>> x;
    coordinate<of<index, &dim3::y>> y;
    coordinate<of<index, &dim3::z>> z;
};
struct thread_dimensions {
    coordinate<thread_x> x;
};
} // namespace host
[[maybe_unused]] static const host::thread_dimensions threadIdx{};
[[maybe_unused]] static const host::dimensions<&host::position::block> blockIdx{};
[[maybe_unused]] static const host::dimensions<&host::position::grid> gridDim{};

#define __syncthreads() host::barrier(__FILE__, __LINE__)
// All 32 lanes take part in each of these, whatever `mask`: the kernels know no other mask.
#define __ballot_sync(mask, bit) host::ballot(bit)
#define __shfl_xor_sync(mask, v, with) host::exchange_as(v, host::here.thread % 32 ^ (unsigned)(with))
#define __shfl_up_sync(mask, v, by)                                                                                    \
    host::exchange_as(v, host::here.thread % 32 - (host::here.thread % 32 >= (by) ? (by) : 0))

static inline int min(int a, int b) {
    return a < b ? a : b;
}
static inline int max(int a, int b) {
    return a > b ? a : b;
}
static inline int __popc(unsigned v) {
    return __builtin_popcount(v);
}
static inline int __ffs(int v) {
    return __builtin_ffs(v);
}
static inline float __int_as_float(int v) {
    float f;
    memcpy(&f, &v, sizeof(f));
    return f;
}
static inline int __float_as_int(float v) {
    int i;
    memcpy(&i, &v, sizeof(i));
    return i;
}
// The compiler is told to contract nothing.
static inline float __fmul_rn(float a, float b) {
    return a * b;
}
static inline float __fadd_rn(float a, float b) {
    return a + b;
}
static inline int __dp4a(int a, int b, int sum) {
    for (int k = 0; k < 4; ++k) {
        sum += (int8_t)((unsigned)a >> 8 * k) * (int8_t)((unsigned)b >> 8 * k);
    }
    return sum;
}
// Byte k of the result is byte (selector >> 4 k & 7) of a, b.
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = (uint64_t)b << 32 | a;
    unsigned result = 0;
    for (int k = 0; k < 4; ++k) {
        result |= (unsigned)(bytes >> 8 * (selector >> 4 * k & 7) & 255) << 8 * k;
    }
    return result;
}
template <class T> static inline T __ldg(const T * at) {
    return *at;
}

// ---- the runtime

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorNotReady = 600,
    cudaErrorLaunchFailure = 719,
    cudaErrorUnknown = 999,
};
enum cudaDeviceAttr {
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaMemcpyKind { cudaMemcpyDefault };
enum { cudaHostAllocDefault = 0, cudaStreamNonBlocking = 1, cudaEventDefault = 0, cudaEventDisableTiming = 2 };
struct cudaDeviceProp {
    char name[256];
};
typedef struct host_stream * cudaStream_t;
typedef struct host_event * cudaEvent_t;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

const char * cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaDriverGetVersion(int * version);
cudaError_t cudaRuntimeGetVersion(int * version);
cudaError_t cudaGetDeviceCount(int * n);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp * properties, int device);
cudaError_t cudaDeviceGetAttribute(int * value, cudaDeviceAttr attribute, int device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaMemGetInfo(size_t * free_bytes, size_t * total_bytes);
cudaError_t cudaMalloc(void ** at, size_t bytes);
cudaError_t cudaHostAlloc(void ** at, size_t bytes, unsigned flags);
cudaError_t cudaFree(void * at);
cudaError_t cudaFreeHost(void * at);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t * stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t * event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaEventElapsedTime(float * ms, cudaEvent_t begin, cudaEvent_t end);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaMemcpyAsync(void * to, const void * from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t host_function_attribute(const void * function, cudaFuncAttribute attribute, int value);
cudaError_t host_launch(const cudaLaunchConfig_t * config, const void * function, std::function<void()> body);

template <class T> cudaError_t cudaFuncSetAttribute(T * function, cudaFuncAttribute attribute, int value) {
    return host_function_attribute(reinterpret_cast<const void *>(function), attribute, value);
}

template <class... Expected, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t * config, void (*kernel)(Expected...), Given &&... given) {
    return host_launch(config, reinterpret_cast<const void *>(kernel), [=] { kernel(given...); });
}
