// Neurons that are copied to the device for one call of prefill.
#include "prefill.h"

#include <string.h>

enum { NEURONS_AT_ONCE = 8 }; // that a thread writes

// Neurons that are written into a slot of the host's.
struct writing {
    const struct tsffn_cuda_layer * layer;
    const struct tsffn_neurons * neurons;
    const int32_t * ids;
    int64_t n;
    uint8_t * to;
};

static void write_neurons(void * context, int64_t i) {
    const struct writing * w = context;
    const int64_t end = (i + 1) * NEURONS_AT_ONCE < w->n ? (i + 1) * NEURONS_AT_ONCE : w->n;
    for (int64_t k = i * NEURONS_AT_ONCE; k < end; ++k) {
        tsffn_cuda_repack_neuron(w->layer, w->neurons, w->ids[k], w->to + (size_t)k * w->layer->neuron_bytes);
    }
}

// The next neurons of a group of rows, from *neuron on, that some row needs and the layer's range lacks: up to `most`
// of them, in ids. Returns how many.
static int64_t next_neurons(const struct tsffn_cuda_queue * queue, const struct tsffn_cuda_segment * group,
                            int64_t * neuron, int64_t most, int32_t * ids) {
    const struct tsffn_range * range = &queue->layer->ranges[group->ffn];
    const int64_t n_words = queue->args.n_words;
    const uint32_t * masks = queue->host.masks + group->first_row * n_words;
    int64_t n = 0;
    int64_t i = *neuron;
    uint32_t needed = 0;
    for (; i < queue->layer->n_ff && n < most; ++i) {
        if (i % TSFFN_CUDA_BLOCK == 0 || i == *neuron) {
            needed = 0;
            for (int32_t r = 0; r < group->n_rows; ++r) {
                needed |= masks[r * n_words + i / TSFFN_CUDA_BLOCK];
            }
        }
        if ((needed >> i % TSFFN_CUDA_BLOCK & 1) != 0 && (i < range->first || i >= range->end)) {
            ids[n++] = (int32_t)i;
        }
    }
    *neuron = i;
    return n;
}

// Copies what a slot of the host's holds, n neurons, and has them computed for a group's tiles.
static bool enqueue_slot(struct tsffn_cuda_queue * queue, int slot, int64_t n, int32_t first_tile, int32_t n_tiles) {
    struct tsffn_gpu * gpu = &queue->gpu;
    const struct buffers *device = &queue->device, *host = &queue->host;
    struct tsffn_cuda_prefill_args args = queue->prefill;
    args.streamed = device->streamed[slot];
    args.streamed_ids = device->streamed_ids[slot];
    args.n_streamed = (int32_t)n;
    args.first = 0;
    args.begins = false;
    args.first_tile = first_tile;
    args.n_tiles = n_tiles;
    return tsffn_gpu_wait(gpu, queue->copies, queue->computed[slot]) &&
           tsffn_gpu_copy(gpu, queue->copies, device->streamed[slot], host->streamed[slot],
                          (size_t)n * queue->layer->neuron_bytes) &&
           tsffn_gpu_copy(gpu, queue->copies, device->streamed_ids[slot], host->streamed_ids[slot],
                          (size_t)n * sizeof(int32_t)) &&
           tsffn_gpu_record(gpu, queue->copied[slot], queue->copies) &&
           tsffn_gpu_wait(gpu, queue->stream, queue->copied[slot]) && tsffn_cuda_enqueue_chunk(queue, &args) &&
           tsffn_gpu_record(gpu, queue->computed[slot], queue->stream);
}

// The neurons of one group of rows, whose tiles begin at *tile.
static bool stream_group(struct tsffn_cuda_queue * queue, const struct tsffn_layer * weights,
                         const struct tsffn_cuda_workers * workers, int32_t g, int32_t * tile, int * slot) {
    const struct tsffn_cuda_segment * group = &queue->host.groups[g];
    const int64_t most = tsffn_cuda_slot_neurons(&queue->sizes);
    const int32_t n_tiles = (group->n_rows + TSFFN_CUDA_TILE_ROWS - 1) / TSFFN_CUDA_TILE_ROWS;
    bool ok = true;
    for (int64_t neuron = 0; ok && neuron < queue->layer->n_ff;) {
        struct writing writing = {
            .layer = queue->layer,
            .neurons = &weights->ffns[group->ffn].neurons,
            .ids = queue->host.streamed_ids[*slot],
            .to = queue->host.streamed[*slot],
        };
        ok = tsffn_gpu_await(&queue->gpu, queue->copied[*slot]); // until then it may be read
        writing.n = ok ? next_neurons(queue, group, &neuron, most, queue->host.streamed_ids[*slot]) : 0;
        if (writing.n > 0) {
            workers->run(workers->n_threads, (writing.n + NEURONS_AT_ONCE - 1) / NEURONS_AT_ONCE, write_neurons,
                         &writing);
            ok = enqueue_slot(queue, *slot, writing.n, *tile, n_tiles);
            queue->n_streamed += writing.n;
            *slot = (*slot + 1) % STREAM_SLOTS;
        }
    }
    *tile += n_tiles;
    return ok;
}

bool tsffn_cuda_stream(struct tsffn_cuda_queue * queue, const struct tsffn_layer * weights,
                       const struct tsffn_cuda_workers * workers, size_t * bytes, char * error, size_t error_size) {
    if (queue->state != BEGUN || !queue->sizes.prefill || queue->is_streamed) {
        return tsffn_fail(error, error_size, "CUDA: neurons are streamed once, for a call of prefill that is begun");
    }
    for (int64_t e = 0; e < weights->n_ffns; ++e) {
        if (weights->ffns[e].neurons.memory != NULL) {
            return tsffn_fail(error, error_size, "CUDA: expected neurons that stay in memory");
        }
    }
    const float * ignored;
    if (tsffn_cuda_await_masks(queue, &ignored, error, error_size) == NULL) {
        return false;
    }
    queue->is_streamed = true;
    queue->n_streamed = 0;
    int32_t tile = 0;
    int slot = 0;
    bool ok = tsffn_gpu_use(&queue->gpu);
    for (int32_t g = 0; ok && g < queue->prefill.n_groups; ++g) {
        ok = stream_group(queue, weights, workers, g, &tile, &slot);
    }
    if (queue->args.n_rows > 0 && !(ok && tsffn_gpu_record(&queue->gpu, queue->ends, queue->stream))) {
        return tsffn_cuda_abandon(queue, error, error_size);
    }
    *bytes = (size_t)queue->n_streamed * queue->layer->neuron_bytes;
    return true;
}
