// CUDA's runtime over plain memory. It refuses what the real one refuses: unknown addresses, copies beyond an
// allocation, blocks with more shared memory than they asked for. What is enqueued on a stream is computed when the
// host waits for it, one step for each query. Any call can be made to fail.
#include "cuda_runtime.h"

#include "block.h"

#include <chrono>
#include <deque>
#include <map>

struct host_stream {
    std::deque<std::function<void()>> steps;
};

struct host_event {
    host_stream * stream; // the last one that it was recorded on
    unsigned pending;     // records that are not reached yet
    unsigned recorded;    // records in all
    std::chrono::steady_clock::time_point reached;
};

// Memory of another library that is the device's, too (native/tests/fake_gpu.c): where it is, and what makes it
// accessible while a step of a stream is computed.
struct host_neighbour {
    bool (*owns)(const void * at, size_t bytes);
    void (*begin)(void);
    void (*end)(void);
};

namespace {

host_neighbour neighbour = {[](const void *, size_t) { return false; }, [] {}, [] {}};

constexpr size_t SHARED_WITHOUT_ASKING = 48 << 10;
enum { MAX_THREADS = 1024, CAPABILITY_MAJOR = 7, CAPABILITY_MINOR = 5 };

struct allocation {
    size_t bytes;
    bool is_device;
};

std::map<const char *, allocation> allocations;
std::map<const void *, size_t> shared_limits; // of functions that asked
std::vector<host_stream *> streams;
size_t total_bytes = (size_t)1 << 30, used_bytes, most_shared = 64 << 10;

// ---- failures

int n_calls, failing_call;
bool fails_for_good, is_broken;

// The number of this call, or that it fails.
cudaError_t count_call(cudaError_t failure) {
    n_calls += 1;
    if (is_broken || n_calls == failing_call) {
        is_broken = fails_for_good;
        return is_broken ? cudaErrorLaunchFailure : failure;
    }
    return cudaSuccess;
}

#define COUNT_CALL(failure)                                                                                            \
    do {                                                                                                               \
        const cudaError_t error = count_call(failure);                                                                 \
        if (error != cudaSuccess) {                                                                                    \
            return error;                                                                                              \
        }                                                                                                              \
    } while (0)

// ---- memory

cudaError_t allocate(void ** at, size_t bytes, bool is_device) {
    if (is_device && used_bytes + bytes > total_bytes) {
        return cudaErrorMemoryAllocation;
    }
    // An overrun: TSFFN_PLANT_OVERRUN makes the device's memory too small.
    static const bool is_short = host::planted("TSFFN_PLANT_OVERRUN") == "device";
    const size_t room = is_short && is_device && bytes > 16 ? bytes - 16 : bytes;
    if (posix_memalign(at, 256, room) != 0) {
        return cudaErrorMemoryAllocation;
    }
    memset(*at, 0xff, room); // NaN
    allocations[static_cast<char *>(*at)] = {bytes, is_device};
    used_bytes += is_device ? bytes : 0;
    return cudaSuccess;
}

void step(host_stream * stream) {
    const std::function<void()> first = std::move(stream->steps.front());
    stream->steps.pop_front();
    neighbour.begin();
    first();
    neighbour.end();
}

// All work is done before memory goes.
void finish_all() {
    for (host_stream * stream : streams) {
        while (!stream->steps.empty()) {
            step(stream);
        }
    }
}

cudaError_t release(void * at, bool is_device) {
    if (at == nullptr) {
        return cudaSuccess;
    }
    const auto found = allocations.find(static_cast<char *>(at));
    if (found == allocations.end() || found->second.is_device != is_device) {
        return cudaErrorInvalidValue;
    }
    finish_all();
    used_bytes -= is_device ? found->second.bytes : 0;
    allocations.erase(found);
    free(at);
    return cudaSuccess;
}

// The allocation that begins at or before an address; allocations.end(): none.
std::map<const char *, allocation>::iterator allocation_of(const void * at) {
    const auto next = allocations.upper_bound(static_cast<const char *>(at));
    return next != allocations.begin() ? std::prev(next) : allocations.end();
}

bool is_within(const void * at, size_t bytes) {
    const auto found = allocation_of(at);
    return neighbour.owns(at, bytes) ||
           (found != allocations.end() &&
            (size_t)(static_cast<const char *>(at) - found->first) + bytes <= found->second.bytes);
}

} // namespace

// ---- for tests

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void tsffn_host_fail(int call, int for_good);
EXPORTED int tsffn_host_calls();
EXPORTED void tsffn_host_limits(size_t device_bytes, size_t shared_bytes);
EXPORTED int tsffn_host_allocations();
EXPORTED size_t tsffn_host_used();

// From now on every copy to the host has a wrong first byte, as of a kernel that does not work on some GPU.
EXPORTED void tsffn_host_go_wrong();
static bool goes_wrong;
void tsffn_host_go_wrong() {
    goes_wrong = true;
}

// From now on the call-th call fails, and with `for_good` all after it; 0: none. Calls are counted anew.
void tsffn_host_fail(int call, int for_good) {
    n_calls = 0;
    failing_call = call;
    fails_for_good = for_good != 0;
    is_broken = false;
}

int tsffn_host_calls() {
    return n_calls;
}

void tsffn_host_limits(size_t device_bytes, size_t shared_bytes) {
    total_bytes = device_bytes;
    most_shared = shared_bytes;
}

// That are not freed.
int tsffn_host_allocations() {
    return (int)allocations.size();
}

EXPORTED void tsffn_host_join(const struct host_neighbour * other);
EXPORTED void * tsffn_host_event_new();
EXPORTED void tsffn_host_event_free(void * event);
EXPORTED void tsffn_host_event_await(void * event);
void tsffn_host_join(const struct host_neighbour * other) {
    neighbour = *other;
}

// Events of the other library; it waits for those that are recorded here.
void * tsffn_host_event_new() {
    return new host_event();
}
void tsffn_host_event_free(void * event) {
    delete static_cast<host_event *>(event);
}
void tsffn_host_event_await(void * event) {
    while (static_cast<host_event *>(event)->pending > 0) {
        step(static_cast<host_event *>(event)->stream);
    }
}

// Bytes of the device's memory.
size_t tsffn_host_used() {
    return used_bytes;
}

// ---- the runtime

const char * cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaErrorMemoryAllocation:
        return "out of memory";
    case cudaErrorInvalidValue:
        return "invalid argument";
    case cudaErrorInvalidDevice:
        return "invalid device ordinal";
    case cudaErrorLaunchFailure:
        return "unspecified launch failure";
    default:
        return "unknown error";
    }
}

cudaError_t cudaGetLastError() {
    return is_broken ? cudaErrorLaunchFailure : cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int * version) {
    *version = 13000;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int * version) {
    *version = 13000;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int * n) {
    COUNT_CALL(cudaErrorUnknown);
    *n = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp * properties, int device) {
    COUNT_CALL(cudaErrorUnknown);
    memset(properties, 0, sizeof(*properties));
    strcpy(properties->name, "kernels on the host");
    return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

cudaError_t cudaDeviceGetAttribute(int * value, cudaDeviceAttr attribute, int device) {
    COUNT_CALL(cudaErrorUnknown);
    *value = attribute == cudaDevAttrComputeCapabilityMajor   ? CAPABILITY_MAJOR
             : attribute == cudaDevAttrComputeCapabilityMinor ? CAPABILITY_MINOR
                                                              : (int)most_shared;
    return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

cudaError_t cudaSetDevice(int device) {
    COUNT_CALL(cudaErrorUnknown);
    return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

cudaError_t cudaMemGetInfo(size_t * free_bytes, size_t * total) {
    COUNT_CALL(cudaErrorUnknown);
    *free_bytes = total_bytes - used_bytes;
    *total = total_bytes;
    return cudaSuccess;
}

cudaError_t cudaMalloc(void ** at, size_t bytes) {
    COUNT_CALL(cudaErrorMemoryAllocation);
    return allocate(at, bytes, true);
}

cudaError_t cudaHostAlloc(void ** at, size_t bytes, unsigned) {
    COUNT_CALL(cudaErrorMemoryAllocation);
    return allocate(at, bytes, false);
}

// What frees, frees even where it says that it failed.
cudaError_t cudaFree(void * at) {
    const cudaError_t error = release(at, true);
    COUNT_CALL(cudaErrorUnknown);
    return error;
}

cudaError_t cudaFreeHost(void * at) {
    const cudaError_t error = release(at, false);
    COUNT_CALL(cudaErrorUnknown);
    return error;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t * stream, unsigned) {
    COUNT_CALL(cudaErrorUnknown);
    *stream = new host_stream();
    streams.push_back(*stream);
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    finish_all();
    std::erase(streams, stream);
    delete stream;
    COUNT_CALL(cudaErrorUnknown);
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    while (!stream->steps.empty()) {
        step(stream);
    }
    COUNT_CALL(cudaErrorUnknown);
    return cudaSuccess;
}

// Another library computes at once, so that its events are never waited for. A missing wait: TSFFN_PLANT_WAIT leaves
// out all others.
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    COUNT_CALL(cudaErrorUnknown);
    static const bool is_left_out = !host::planted("TSFFN_PLANT_WAIT").empty();
    if (event == nullptr) {
        return cudaErrorInvalidValue;
    }
    if (event->recorded > 0 && event->stream != stream && !is_left_out) {
        stream->steps.emplace_back([event, upto = event->recorded] {
            while (event->recorded - event->pending < upto) {
                step(event->stream);
            }
        });
    }
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t * event, unsigned) {
    COUNT_CALL(cudaErrorUnknown);
    *event = new host_event();
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    finish_all();
    delete event;
    COUNT_CALL(cudaErrorUnknown);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    COUNT_CALL(cudaErrorUnknown);
    event->stream = stream;
    event->pending += 1;
    event->recorded += 1;
    stream->steps.emplace_back([event] {
        event->pending -= 1;
        event->reached = std::chrono::steady_clock::now();
    });
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    COUNT_CALL(cudaErrorUnknown);
    if (event->pending == 0) {
        return cudaSuccess;
    }
    step(event->stream);
    return cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    COUNT_CALL(cudaErrorUnknown);
    while (event->pending > 0) {
        step(event->stream);
    }
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float * ms, cudaEvent_t begin, cudaEvent_t end) {
    COUNT_CALL(cudaErrorUnknown);
    *ms = std::chrono::duration<float, std::milli>(end->reached - begin->reached).count();
    return begin->pending == 0 && end->pending == 0 ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaMemcpyAsync(void * to, const void * from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    COUNT_CALL(cudaErrorUnknown);
    if (!is_within(to, bytes) || !is_within(from, bytes)) {
        return cudaErrorInvalidValue;
    }
    const bool is_wrong =
        goes_wrong && !neighbour.owns(to, bytes) && !allocation_of(to)->second.is_device && bytes >= sizeof(float);
    stream->steps.emplace_back([=] {
        memcpy(to, from, bytes);
        if (is_wrong) {
            memset(to, 0x42, sizeof(float));
        }
    });
    return cudaSuccess;
}

cudaError_t host_function_attribute(const void * function, cudaFuncAttribute, int value) {
    COUNT_CALL(cudaErrorUnknown);
    if ((size_t)value > most_shared) {
        return cudaErrorInvalidValue;
    }
    shared_limits[function] = (size_t)value;
    return cudaSuccess;
}

cudaError_t host_launch(const cudaLaunchConfig_t * config, const void * function, std::function<void()> body) {
    COUNT_CALL(cudaErrorUnknown);
    const auto asked = shared_limits.find(function);
    const size_t limit = asked != shared_limits.end() ? asked->second : SHARED_WITHOUT_ASKING;
    const dim3 grid = config->gridDim;
    const unsigned threads = config->blockDim.x;
    const size_t shared = config->dynamicSmemBytes;
    if (shared > limit || threads > MAX_THREADS || threads % host::WARP_LANES != 0 || grid.x == 0 || grid.y == 0 ||
        grid.z == 0) {
        return cudaErrorInvalidValue;
    }
    config->stream->steps.emplace_back([=] { host::run_grid(grid, threads, shared, body); });
    return cudaSuccess;
}
