// The module's table, and opening a device.
#include "module.h"

#include <stdlib.h>
#include <string.h>

#ifndef TSFFN_CUDA_NAME
#define TSFFN_CUDA_NAME "cuda"
#endif

bool tsffn_cuda_failed(struct tsffn_cuda * cuda, const struct tsffn_gpu * gpu, char * error, size_t error_size) {
    if (gpu->lost) {
        atomic_store(&cuda->lost, true);
    }
    return tsffn_fail(error, error_size, "%s%s", gpu->error, gpu->lost ? "; the device is lost" : "");
}

static int n_devices(char * error, size_t error_size) {
    struct tsffn_gpu gpu = {0};
    const int n = tsffn_gpu_count(&gpu);
    if (n < 0) {
        tsffn_fail(error, error_size, "%s", gpu.error);
    }
    return n;
}

static void close_device(struct tsffn_cuda * cuda) {
    if (cuda == NULL) {
        return;
    }
    struct tsffn_gpu * gpu = &cuda->gpu;
    tsffn_gpu_use(gpu); // where that fails, so does what follows
    for (int k = 0; k < STAGING_BUFFERS; ++k) {
        tsffn_gpu_free_host(gpu, cuda->staging[k]);
        tsffn_gpu_event_free(gpu, cuda->copied[k]);
    }
    tsffn_gpu_stream_free(gpu, cuda->stream);
    tsffn_gpu_free(gpu, cuda->arena);
    free(cuda);
}

static bool allocate(struct tsffn_cuda * cuda, size_t arena_bytes) {
    struct tsffn_gpu * gpu = &cuda->gpu;
    bool ok = tsffn_gpu_stream_new(gpu, &cuda->stream);
    for (int k = 0; ok && k < STAGING_BUFFERS; ++k) {
        ok = tsffn_gpu_allocate_host(gpu, STAGING_BYTES, &cuda->staging[k]) &&
             tsffn_gpu_event_new(gpu, false, &cuda->copied[k]);
    }
    void * arena = NULL;
    ok = ok && tsffn_gpu_allocate(gpu, arena_bytes, &arena);
    cuda->arena = arena;
    cuda->arena_bytes = arena_bytes;
    return ok;
}

static struct tsffn_cuda * open_device(int device, size_t arena_bytes, struct tsffn_cuda_info * info, char * error,
                                       size_t error_size) {
    memset(info, 0, sizeof(*info));
    struct tsffn_cuda * cuda = calloc(1, sizeof(*cuda));
    if (cuda == NULL) {
        tsffn_fail(error, error_size, "CUDA: out of host memory");
        return NULL;
    }
    cuda->gpu.device = device;
    struct tsffn_gpu_info found = {0};
    const bool opened = tsffn_gpu_open(&cuda->gpu, &found);
    memcpy(info->name, found.name, sizeof(info->name));
    info->capability = found.capability;
    info->free_bytes = found.free_bytes;
    info->total_bytes = found.total_bytes;
    if (!opened || !allocate(cuda, arena_bytes)) {
        tsffn_cuda_failed(cuda, &cuda->gpu, error, error_size);
        close_device(cuda);
        return NULL;
    }
    return cuda;
}

static bool is_lost(const struct tsffn_cuda * cuda) {
    return atomic_load(&cuda->lost);
}

__attribute__((visibility("default"))) const struct tsffn_cuda_module * tsffn_cuda_module(void);

const struct tsffn_cuda_module * tsffn_cuda_module(void) {
    static const struct tsffn_cuda_module module = {
        .version = TSFFN_CUDA_VERSION,
        .name = TSFFN_CUDA_NAME,
        .n_devices = n_devices,
        .open = open_device,
        .close = close_device,
        .is_lost = is_lost,
        .layer_bytes = tsffn_cuda_layer_bytes,
        .neuron_bytes = tsffn_cuda_neuron_bytes,
        .upload = tsffn_cuda_upload,
        .release = tsffn_cuda_release,
        .queue_bytes = tsffn_cuda_queue_bytes,
        .open_queue = tsffn_cuda_open_queue,
        .close_queue = tsffn_cuda_close_queue,
        .begin = tsffn_cuda_begin,
        .await_masks = tsffn_cuda_await_masks,
        .stream = tsffn_cuda_stream,
        .end = tsffn_cuda_end,
        .poll = tsffn_cuda_poll,
        .await = tsffn_cuda_await,
        .fetch = tsffn_cuda_fetch,
    };
    return &module;
}
