#include "runtime.h"

#include <cuda_runtime.h>

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

namespace {

// Whether a call went well. An error that only that call had is cleared; one that stays means a broken context.
bool check(tsffn_gpu * gpu, const char * what, cudaError_t error) {
    if (error == cudaSuccess) {
        return true;
    }
    cudaGetLastError();
    snprintf(gpu->error, sizeof(gpu->error), "CUDA: %s: %s (%d)", what, cudaGetErrorString(error), (int)error);
    if (cudaFree(nullptr) != cudaSuccess) {
        cudaGetLastError();
        gpu->lost = true;
    }
    return false;
}

cudaStream_t stream_of(void * stream) {
    return static_cast<cudaStream_t>(stream);
}

cudaEvent_t event_of(void * event) {
    return static_cast<cudaEvent_t>(event);
}

// The runtime has one code for no driver and for one that is too old.
void explain_driver(tsffn_gpu * gpu, cudaError_t error) {
    void * driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
    if (driver == nullptr) {
        snprintf(gpu->error, sizeof(gpu->error), "CUDA: no driver: expected libcuda.so.1, found none");
        return;
    }
    dlclose(driver);
    int found = 0, expected = 0;
    if (cudaDriverGetVersion(&found) == cudaSuccess && cudaRuntimeGetVersion(&expected) == cudaSuccess &&
        found < expected) {
        snprintf(gpu->error, sizeof(gpu->error),
                 "CUDA: the driver is too old: expected one of CUDA %d.%d, found CUDA %d.%d", expected / 1000,
                 expected % 1000 / 10, found / 1000, found % 1000 / 10);
        return;
    }
    snprintf(gpu->error, sizeof(gpu->error), "CUDA: %s (%d)", cudaGetErrorString(error), (int)error);
}

bool attribute(tsffn_gpu * gpu, cudaDeviceAttr which, int * value) {
    return check(gpu, "cudaDeviceGetAttribute", cudaDeviceGetAttribute(value, which, gpu->device));
}

} // namespace

int tsffn_gpu_count(tsffn_gpu * gpu) {
    int n = 0;
    const cudaError_t error = cudaGetDeviceCount(&n);
    if (error == cudaErrorNoDevice) {
        cudaGetLastError();
        return 0;
    }
    if (error != cudaSuccess) {
        cudaGetLastError();
        explain_driver(gpu, error);
        return -1;
    }
    return n;
}

bool tsffn_gpu_open(tsffn_gpu * gpu, tsffn_gpu_info * info) {
    int major = 0, minor = 0, shared = 0;
    cudaDeviceProp properties;
    if (!check(gpu, "cudaGetDeviceProperties", cudaGetDeviceProperties(&properties, gpu->device)) ||
        !attribute(gpu, cudaDevAttrComputeCapabilityMajor, &major) ||
        !attribute(gpu, cudaDevAttrComputeCapabilityMinor, &minor) ||
        !attribute(gpu, cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared)) {
        return false;
    }
    snprintf(info->name, sizeof(info->name), "%.*s", (int)sizeof(info->name) - 1, properties.name);
    info->capability = 10 * major + minor;
    gpu->shared_bytes = (size_t)shared;
    return tsffn_gpu_use(gpu) && check(gpu, "cudaMemGetInfo", cudaMemGetInfo(&info->free_bytes, &info->total_bytes));
}

bool tsffn_gpu_use(tsffn_gpu * gpu) {
    return check(gpu, "cudaSetDevice", cudaSetDevice(gpu->device));
}

bool tsffn_gpu_allocate(tsffn_gpu * gpu, size_t bytes, void ** at) {
    *at = nullptr;
    return bytes == 0 || check(gpu, "cudaMalloc", cudaMalloc(at, bytes));
}

bool tsffn_gpu_allocate_host(tsffn_gpu * gpu, size_t bytes, void ** at) {
    *at = nullptr;
    return bytes == 0 || check(gpu, "cudaHostAlloc", cudaHostAlloc(at, bytes, cudaHostAllocDefault));
}

void tsffn_gpu_free(tsffn_gpu * gpu, void * at) {
    check(gpu, "cudaFree", at != nullptr ? cudaFree(at) : cudaSuccess);
}

void tsffn_gpu_free_host(tsffn_gpu * gpu, void * at) {
    check(gpu, "cudaFreeHost", at != nullptr ? cudaFreeHost(at) : cudaSuccess);
}

bool tsffn_gpu_stream_new(tsffn_gpu * gpu, void ** stream) {
    cudaStream_t made = nullptr;
    const bool ok = check(gpu, "cudaStreamCreateWithFlags", cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking));
    *stream = ok ? made : nullptr;
    return ok;
}

bool tsffn_gpu_event_new(tsffn_gpu * gpu, bool timed, void ** event) {
    cudaEvent_t made = nullptr;
    const unsigned flags = timed ? cudaEventDefault : cudaEventDisableTiming;
    const bool ok = check(gpu, "cudaEventCreateWithFlags", cudaEventCreateWithFlags(&made, flags));
    *event = ok ? made : nullptr;
    return ok;
}

void tsffn_gpu_stream_free(tsffn_gpu * gpu, void * stream) {
    check(gpu, "cudaStreamDestroy", stream != nullptr ? cudaStreamDestroy(stream_of(stream)) : cudaSuccess);
}

void tsffn_gpu_event_free(tsffn_gpu * gpu, void * event) {
    check(gpu, "cudaEventDestroy", event != nullptr ? cudaEventDestroy(event_of(event)) : cudaSuccess);
}

bool tsffn_gpu_copy(tsffn_gpu * gpu, void * stream, void * to, const void * from, size_t bytes) {
    return bytes == 0 ||
           check(gpu, "cudaMemcpyAsync", cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_of(stream)));
}

bool tsffn_gpu_record(tsffn_gpu * gpu, void * event, void * stream) {
    return check(gpu, "cudaEventRecord", cudaEventRecord(event_of(event), stream_of(stream)));
}

bool tsffn_gpu_wait(tsffn_gpu * gpu, void * stream, void * event) {
    return check(gpu, "cudaStreamWaitEvent", cudaStreamWaitEvent(stream_of(stream), event_of(event), 0));
}

bool tsffn_gpu_launched(tsffn_gpu * gpu, const char * kernel, int error) {
    return check(gpu, kernel, (cudaError_t)error);
}

bool tsffn_gpu_query(tsffn_gpu * gpu, void * event, bool * done) {
    const cudaError_t error = cudaEventQuery(event_of(event));
    *done = error == cudaSuccess;
    if (error == cudaErrorNotReady) {
        cudaGetLastError();
        return true;
    }
    return check(gpu, "cudaEventQuery", error);
}

bool tsffn_gpu_await(tsffn_gpu * gpu, void * event) {
    return check(gpu, "cudaEventSynchronize", cudaEventSynchronize(event_of(event)));
}

bool tsffn_gpu_elapsed(tsffn_gpu * gpu, void * begin, void * end, uint64_t * ns) {
    float ms = 0.0f;
    const bool ok = check(gpu, "cudaEventElapsedTime", cudaEventElapsedTime(&ms, event_of(begin), event_of(end)));
    *ns = ms > 0.0f ? (uint64_t)((double)ms * 1e6) : 0;
    return ok;
}

bool tsffn_gpu_drain(tsffn_gpu * gpu, void * stream) {
    return check(gpu, "cudaStreamSynchronize", cudaStreamSynchronize(stream_of(stream)));
}
