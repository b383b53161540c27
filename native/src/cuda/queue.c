// Queues, and their memory.
#include "queue.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

// For `device`: what the kernels use; for the host: what is copied.
static void buffer_sizes(const struct tsffn_cuda_sizes * s, bool device, size_t sizes[N_BUFFERS]) {
    const size_t n_rows = (size_t)s->n_rows, n_embd = (size_t)s->n_embd, n_ff = (size_t)s->n_ff;
    const size_t max_rank = (size_t)tsffn_cuda_pad(s->max_rank, TSFFN_CUDA_BLOCK);
    const size_t blocks = (size_t)tsffn_cuda_neuron_blocks(s->n_ff);
    const size_t all[N_BUFFERS] = {
        (size_t)s->n_tokens * n_embd * sizeof(float),
        device ? n_rows * max_rank * sizeof(float) : 0,
        n_rows * n_ff * sizeof(float),
        device ? n_rows * (size_t)tsffn_cuda_shares(s->n_ff) * n_embd * sizeof(float) : 0,
        n_rows * n_embd * sizeof(float),
        n_rows * n_embd * sizeof(float),
        n_rows * (size_t)tsffn_mask_words(s->n_ff) * sizeof(uint32_t),
        n_rows * blocks * TSFFN_CUDA_COUNTS * sizeof(uint32_t),
    };
    memcpy(sizes, all, sizeof(all));
}

size_t tsffn_cuda_queue_bytes(const struct tsffn_cuda_sizes * sizes) {
    size_t each[N_BUFFERS], sum = 0;
    buffer_sizes(sizes, true, each);
    for (int k = 0; k < N_BUFFERS; ++k) {
        sum += each[k];
    }
    return sum;
}

// In the order of buffer_sizes.
static void pointers(struct buffers * b, void ** at[N_BUFFERS]) {
    void ** const all[N_BUFFERS] = {
        (void **)&b->x,    (void **)&b->hidden, (void **)&b->h,     (void **)&b->partial,
        (void **)&b->cold, (void **)&b->y,      (void **)&b->masks, (void **)&b->counts,
    };
    memcpy(at, all, sizeof(all));
}

static bool allocate(struct tsffn_cuda_queue * queue) {
    struct tsffn_gpu * gpu = &queue->gpu;
    size_t device[N_BUFFERS], host[N_BUFFERS];
    void **device_at[N_BUFFERS], **host_at[N_BUFFERS];
    buffer_sizes(&queue->sizes, true, device);
    buffer_sizes(&queue->sizes, false, host);
    pointers(&queue->device, device_at);
    pointers(&queue->host, host_at);
    bool ok = tsffn_gpu_use(gpu) && tsffn_gpu_stream_new(gpu, &queue->stream) &&
              tsffn_gpu_event_new(gpu, false, &queue->masks_done) && tsffn_gpu_event_new(gpu, false, &queue->done) &&
              tsffn_gpu_event_new(gpu, true, &queue->begins) && tsffn_gpu_event_new(gpu, true, &queue->ends);
    for (int k = 0; ok && k < N_BUFFERS; ++k) {
        ok = tsffn_gpu_allocate(gpu, device[k], device_at[k]) && tsffn_gpu_allocate_host(gpu, host[k], host_at[k]);
    }
    return ok;
}

struct tsffn_cuda_queue * tsffn_cuda_open_queue(struct tsffn_cuda * cuda, const struct tsffn_cuda_sizes * sizes,
                                                char * error, size_t error_size) {
    struct tsffn_cuda_queue * queue = calloc(1, sizeof(*queue));
    if (queue == NULL) {
        tsffn_fail(error, error_size, "CUDA: out of host memory");
        return NULL;
    }
    queue->cuda = cuda;
    queue->gpu.device = cuda->gpu.device;
    queue->sizes = *sizes;
    if (sizes->n_rows > TSFFN_CUDA_MAX_ROWS) {
        tsffn_fail(error, error_size, "CUDA: rows of a call: expected at most %d, found %" PRId64, TSFFN_CUDA_MAX_ROWS,
                   sizes->n_rows);
    } else if (!allocate(queue)) {
        tsffn_cuda_failed(cuda, &queue->gpu, error, error_size);
    } else {
        return queue;
    }
    tsffn_cuda_close_queue(queue);
    return NULL;
}

void tsffn_cuda_close_queue(struct tsffn_cuda_queue * queue) {
    if (queue == NULL) {
        return;
    }
    struct tsffn_gpu * gpu = &queue->gpu;
    tsffn_gpu_use(gpu); // where that fails, so does what follows
    if (queue->stream != NULL) {
        tsffn_gpu_drain(gpu, queue->stream);
    }
    void **device_at[N_BUFFERS], **host_at[N_BUFFERS];
    pointers(&queue->device, device_at);
    pointers(&queue->host, host_at);
    for (int k = 0; k < N_BUFFERS; ++k) {
        tsffn_gpu_free(gpu, *device_at[k]);
        tsffn_gpu_free_host(gpu, *host_at[k]);
    }
    tsffn_gpu_event_free(gpu, queue->masks_done);
    tsffn_gpu_event_free(gpu, queue->done);
    tsffn_gpu_event_free(gpu, queue->begins);
    tsffn_gpu_event_free(gpu, queue->ends);
    tsffn_gpu_stream_free(gpu, queue->stream);
    free(queue);
}
