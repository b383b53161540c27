// Calls of the CUDA runtime, every one checked: what module.c needs, so that it is C.
//
// A function that fails writes one line to gpu->error, "CUDA: what: why", and returns false. When the device's context
// is broken, so that all calls from then on fail, it sets gpu->lost.
#ifndef TSFFN_CUDA_RUNTIME_H
#define TSFFN_CUDA_RUNTIME_H

#include "kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

struct tsffn_gpu {
    int device;
    bool lost;
    size_t shared_bytes; // that a block can have at most
    char error[256];
};

struct tsffn_gpu_info {
    char name[128];
    int capability;
    size_t free_bytes, total_bytes;
};

// How many devices there are, or -1.
int tsffn_gpu_count(struct tsffn_gpu * gpu);
// Makes gpu->device ready for the calls below. `info` may be filled in part when it fails.
bool tsffn_gpu_open(struct tsffn_gpu * gpu, struct tsffn_gpu_info * info);
// For the calling thread, before the other calls.
bool tsffn_gpu_use(struct tsffn_gpu * gpu);

// Memory of the device, and memory of the host that copies can overlap with. *at is NULL on failure.
bool tsffn_gpu_allocate(struct tsffn_gpu * gpu, size_t bytes, void ** at);
bool tsffn_gpu_allocate_host(struct tsffn_gpu * gpu, size_t bytes, void ** at);
// NULL is no memory.
void tsffn_gpu_free(struct tsffn_gpu * gpu, void * at);
void tsffn_gpu_free_host(struct tsffn_gpu * gpu, void * at);

bool tsffn_gpu_stream_new(struct tsffn_gpu * gpu, void ** stream);
// `timed`: tsffn_gpu_elapsed can be asked about it.
bool tsffn_gpu_event_new(struct tsffn_gpu * gpu, bool timed, void ** event);
void tsffn_gpu_stream_free(struct tsffn_gpu * gpu, void * stream);
void tsffn_gpu_event_free(struct tsffn_gpu * gpu, void * event);

// Enqueued on a stream. Addresses may be the host's, of tsffn_gpu_allocate_host, or the device's.
bool tsffn_gpu_copy(struct tsffn_gpu * gpu, void * stream, void * to, const void * from, size_t bytes);
bool tsffn_gpu_record(struct tsffn_gpu * gpu, void * event, void * stream);
// What is enqueued from now on waits for the event.
bool tsffn_gpu_wait(struct tsffn_gpu * gpu, void * stream, void * event);
// What a launch returned.
bool tsffn_gpu_launched(struct tsffn_gpu * gpu, const char * kernel, int error);

// Whether everything before the event is done.
bool tsffn_gpu_query(struct tsffn_gpu * gpu, void * event, bool * done);
bool tsffn_gpu_await(struct tsffn_gpu * gpu, void * event);
// The time between two events that are done.
bool tsffn_gpu_elapsed(struct tsffn_gpu * gpu, void * begin, void * end, uint64_t * ns);
// Waits for a stream, whether it fails or not.
bool tsffn_gpu_drain(struct tsffn_gpu * gpu, void * stream);

#ifdef __cplusplus
}
#endif

#endif
