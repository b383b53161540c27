// Queues, and their memory.
#include "queue.h"

#include <inttypes.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

// A buffer of struct buffers.
struct buffer {
    size_t offset;       // of its pointer
    size_t device, host; // bytes
};
enum { MAX_BUFFERS = 24 };
#define BUFFER(name, device_bytes, host_bytes)                                                                         \
    ((struct buffer){offsetof(struct buffers, name), device_bytes, host_bytes})

static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

int64_t tsffn_cuda_chunk_neurons(const struct tsffn_cuda_sizes * s) {
    return smaller(TSFFN_CUDA_CHUNK_NEURONS, tsffn_cuda_pad(s->n_ff, TSFFN_CUDA_BLOCK));
}

int64_t tsffn_cuda_slot_neurons(const struct tsffn_cuda_sizes * s) {
    const int64_t neurons = TSFFN_CUDA_STREAMED_BYTES / (int64_t)(s->neuron_bytes > 0 ? s->neuron_bytes : 1);
    return smaller(neurons / TSFFN_CUDA_BLOCK * TSFFN_CUDA_BLOCK + TSFFN_CUDA_BLOCK, tsffn_cuda_chunk_neurons(s));
}

// Those of prefill alone. Returns how many.
static int prefill_buffers(const struct tsffn_cuda_sizes * s, struct buffer * at) {
    const size_t n_rows = (size_t)s->n_rows, chunk = (size_t)tsffn_cuda_chunk_neurons(s);
    const size_t n_ffns = (size_t)s->n_ffns, half = TSFFN_CUDA_TERMS * sizeof(uint16_t);
    const size_t tiles = (n_rows / TSFFN_CUDA_TILE_ROWS + n_ffns + 1) * sizeof(struct tsffn_cuda_segment);
    const size_t groups = n_ffns * sizeof(struct tsffn_cuda_segment), ids = n_ffns * sizeof(int32_t);
    const size_t slot = (size_t)tsffn_cuda_slot_neurons(s);
    int n = 0;
    at[n++] = BUFFER(x_halves, (size_t)(s->n_tokens * s->n_embd) * half, 0);
    at[n++] = BUFFER(x_scale, (size_t)s->n_tokens * sizeof(float), 0);
    at[n++] = BUFFER(h_halves, n_rows * chunk * half, 0);
    at[n++] = BUFFER(h_scale, n_rows * sizeof(float), 0);
    at[n++] = BUFFER(tiles, tiles, tiles);
    at[n++] = BUFFER(groups, groups, groups);
    at[n++] = BUFFER(tokens, n_rows * sizeof(int32_t), n_rows * sizeof(int32_t));
    at[n++] = BUFFER(listed, (size_t)s->n_ff * ids, 0);
    at[n++] = BUFFER(n_listed, ids, ids);
    for (int k = 0; k < STREAM_SLOTS; ++k) {
        at[n++] = BUFFER(streamed[k], slot * s->neuron_bytes, slot * s->neuron_bytes);
        at[n++] = BUFFER(streamed_ids[k], slot * sizeof(int32_t), slot * sizeof(int32_t));
    }
    return n;
}

// All of a queue. Returns how many.
static int list_buffers(const struct tsffn_cuda_sizes * s, struct buffer at[MAX_BUFFERS]) {
    const size_t n_rows = (size_t)s->n_rows, n_embd = (size_t)s->n_embd, n_ff = (size_t)s->n_ff;
    const size_t x = (size_t)s->n_tokens * n_embd * sizeof(float), y = n_rows * n_embd * sizeof(float);
    const size_t hidden_rows = s->prefill ? TSFFN_CUDA_PLAN_ROWS : n_rows;
    const size_t chunk = (size_t)tsffn_cuda_chunk_neurons(s);
    const size_t masks = n_rows * (size_t)tsffn_mask_words(s->n_ff) * sizeof(uint32_t);
    const size_t tiles = n_rows / TSFFN_CUDA_TILE_ROWS + (size_t)s->n_ffns + 1;
    const size_t counts = (s->prefill ? tiles * (size_t)tsffn_cuda_neuron_tiles((int64_t)chunk) * TSFFN_CUDA_TILE_COUNTS
                                      : n_rows * (size_t)tsffn_cuda_neuron_blocks(s->n_ff) * TSFFN_CUDA_COUNTS) *
                          sizeof(uint32_t);
    int n = 0;
    at[n++] = BUFFER(x, x, x);
    at[n++] = BUFFER(hidden, hidden_rows * (size_t)tsffn_cuda_pad(s->max_rank, TSFFN_CUDA_BLOCK) * sizeof(float), 0);
    at[n++] =
        BUFFER(h, n_rows * (s->prefill ? chunk : n_ff) * sizeof(float), s->prefill ? 0 : n_rows * n_ff * sizeof(float));
    at[n++] = BUFFER(partial, s->prefill ? 0 : (size_t)tsffn_cuda_shares(s->n_ff) * y, 0);
    at[n++] = BUFFER(cold, y, y);
    at[n++] = BUFFER(y, y, y);
    at[n++] = BUFFER(masks, masks, masks);
    at[n++] = BUFFER(counts, counts, counts);
    return n + (s->prefill ? prefill_buffers(s, at + n) : 0);
}

size_t tsffn_cuda_queue_bytes(const struct tsffn_cuda_sizes * sizes) {
    struct buffer all[MAX_BUFFERS];
    size_t sum = 0;
    for (int k = list_buffers(sizes, all) - 1; k >= 0; --k) {
        sum += all[k].device;
    }
    return sum;
}

static void ** pointer(struct buffers * buffers, const struct buffer * buffer) {
    return (void **)(void *)((char *)buffers + buffer->offset);
}

static bool make_stream(struct tsffn_cuda_queue * queue) {
    struct tsffn_gpu * gpu = &queue->gpu;
    bool ok = tsffn_gpu_stream_new(gpu, &queue->copies);
    for (int k = 0; ok && k < STREAM_SLOTS; ++k) {
        ok = tsffn_gpu_event_new(gpu, false, &queue->copied[k]) && tsffn_gpu_event_new(gpu, false, &queue->computed[k]);
    }
    return ok;
}

static bool allocate(struct tsffn_cuda_queue * queue) {
    struct tsffn_gpu * gpu = &queue->gpu;
    struct buffer all[MAX_BUFFERS];
    const int n = list_buffers(&queue->sizes, all);
    bool ok = tsffn_gpu_use(gpu) && tsffn_gpu_stream_new(gpu, &queue->stream) &&
              tsffn_gpu_event_new(gpu, false, &queue->masks_done) && tsffn_gpu_event_new(gpu, false, &queue->done) &&
              tsffn_gpu_event_new(gpu, true, &queue->begins) && tsffn_gpu_event_new(gpu, true, &queue->ends) &&
              tsffn_gpu_event_new(gpu, true, &queue->predicted) && (!queue->sizes.prefill || make_stream(queue));
    for (int k = 0; ok && k < n; ++k) {
        ok = tsffn_gpu_allocate(gpu, all[k].device, pointer(&queue->device, &all[k])) &&
             tsffn_gpu_allocate_host(gpu, all[k].host, pointer(&queue->host, &all[k]));
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
    if (sizes->n_rows > TSFFN_CUDA_MAX_ROWS && !sizes->prefill) {
        tsffn_fail(error, error_size, "CUDA: rows of a call: expected at most %d, found %" PRId64, TSFFN_CUDA_MAX_ROWS,
                   sizes->n_rows);
    } else if (sizes->prefill && tsffn_cuda_prefill_shared() > cuda->gpu.shared_bytes) {
        tsffn_fail(error, error_size, "CUDA: prefill: expected %zu bytes of a block's memory, found %zu",
                   tsffn_cuda_prefill_shared(), cuda->gpu.shared_bytes);
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
    if (queue->copies != NULL) {
        tsffn_gpu_drain(gpu, queue->copies);
    }
    struct buffer all[MAX_BUFFERS];
    for (int k = list_buffers(&queue->sizes, all) - 1; k >= 0; --k) {
        tsffn_gpu_free(gpu, *pointer(&queue->device, &all[k]));
        tsffn_gpu_free_host(gpu, *pointer(&queue->host, &all[k]));
    }
    for (int k = 0; k < STREAM_SLOTS; ++k) {
        tsffn_gpu_event_free(gpu, queue->copied[k]);
        tsffn_gpu_event_free(gpu, queue->computed[k]);
    }
    tsffn_gpu_stream_free(gpu, queue->copies);
    tsffn_gpu_event_free(gpu, queue->masks_done);
    tsffn_gpu_event_free(gpu, queue->done);
    tsffn_gpu_event_free(gpu, queue->begins);
    tsffn_gpu_event_free(gpu, queue->predicted);
    tsffn_gpu_event_free(gpu, queue->ends);
    tsffn_gpu_stream_free(gpu, queue->stream);
    free(queue);
}
