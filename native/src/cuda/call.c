// Calls: what is enqueued on a stream for one, and what is done with its results.
#include "prefill.h"
#include "queue.h"

#include <inttypes.h>
#include <string.h>

// ---- beginning

// The call failed: nothing of it is computed any more when this returns, and the queue takes another one. Returns
// false.
bool tsffn_cuda_abandon(struct tsffn_cuda_queue * queue, char * error, size_t error_size) {
    tsffn_cuda_failed(queue->cuda, &queue->gpu, error, error_size);
    tsffn_gpu_drain(&queue->gpu, queue->stream);
    if (queue->copies != NULL) {
        tsffn_gpu_drain(&queue->gpu, queue->copies);
    }
    queue->state = IDLE;
    return false;
}

static bool fits(const struct tsffn_cuda_queue * queue, const struct tsffn_cuda_layer * layer,
                 const struct tsffn_call * call, bool given, bool resident, char * error, size_t error_size) {
    const struct tsffn_cuda_sizes * s = &queue->sizes;
    if (queue->state != IDLE) {
        return tsffn_fail(error, error_size, "CUDA: a call is begun while the queue computes another");
    }
    if (call->op != TSFFN_OP_FUSED || call->dense || call->keep > 0 || call->profile != NULL) {
        return tsffn_fail(error, error_size, "CUDA: expected a fused, sparse call");
    }
    for (int64_t r = 0; s->prefill && r < call->n_rows; ++r) {
        if (resident || call->rows[r].h != NULL) {
            return tsffn_fail(error, error_size, "CUDA: prefill: expected x in host memory, and nobody who wants h");
        }
    }
    if (call->n_rows > s->n_rows || call->n_tokens > s->n_tokens || layer->n_embd > s->n_embd ||
        layer->n_ff > s->n_ff || layer->max_rank > tsffn_cuda_pad(s->max_rank, TSFFN_CUDA_BLOCK)) {
        return tsffn_fail(error, error_size,
                          "CUDA: a call of %" PRId64 " rows of %" PRId64 " tokens: expected at most %" PRId64
                          " of %" PRId64 ", and a layer as the queue was opened for",
                          call->n_rows, call->n_tokens, s->n_rows, s->n_tokens);
    }
    if (!given && layer->max_rank == 0 && !layer->always_on) {
        return tsffn_fail(error, error_size, "CUDA: the layer's predictor is not on the device: expected masks");
    }
    return true;
}

int tsffn_cuda_make_segments(struct tsffn_cuda_args * a, const struct tsffn_row * rows, int64_t n_rows,
                             int segment_rows) {
    int most_rows = 1;
    a->n_segments = 0;
    for (int32_t r = 0; r < n_rows; ++r) {
        struct tsffn_cuda_segment * last = a->n_segments > 0 ? &a->segments[a->n_segments - 1] : NULL;
        a->tokens[r] = rows[r].token;
        if (last != NULL && last->ffn == rows[r].ffn && last->n_rows < segment_rows) {
            last->n_rows += 1;
            most_rows = last->n_rows > most_rows ? last->n_rows : most_rows;
        } else {
            a->segments[a->n_segments++] = (struct tsffn_cuda_segment){.ffn = rows[r].ffn, .first_row = r, .n_rows = 1};
        }
    }
    return most_rows;
}

// Whether the tokens' x follow each other.
static bool is_packed(const struct tsffn_call * call, int64_t n_embd) {
    return call->x_stride == (size_t)n_embd * sizeof(float) || call->n_tokens == 1;
}

// Whether the rows of y are resident, and follow each other as the kernel writes them.
static bool is_in_place(const struct tsffn_cuda_queue * queue, int64_t n_embd) {
    bool in_place = queue->is_resident;
    for (int64_t r = 0; r < queue->call->n_rows; ++r) {
        in_place = in_place && queue->y[r] == queue->y[0] + r * n_embd;
    }
    return in_place;
}

static void make_args(struct tsffn_cuda_queue * queue) {
    const struct tsffn_cuda_layer * layer = queue->layer;
    const struct buffers * b = &queue->device;
    queue->args = (struct tsffn_cuda_args){
        .n_rows = (int32_t)queue->call->n_rows,
        .n_embd = (int32_t)layer->n_embd,
        .n_ff = (int32_t)layer->n_ff,
        .n_words = (int32_t)tsffn_mask_words(layer->n_ff),
        .max_rank = (int32_t)layer->max_rank,
        .n_shares = tsffn_cuda_shares(layer->n_ff),
        .ffns = layer->ffns,
        .neuron_bytes = (uint32_t)layer->neuron_bytes,
        .up_offset = (uint32_t)layer->up_offset,
        .down_offset = (uint32_t)layer->down_offset,
        .activation = layer->activation,
        .threshold = layer->threshold,
        .on_when_equal = layer->on_when_equal,
        .pred_scale = layer->pred_scale,
        .x = queue->is_resident && is_packed(queue->call, layer->n_embd) ? queue->resident_x : b->x,
        .hidden = b->hidden,
        .masks = queue->masks != MASKS_ALL_ON ? b->masks : NULL,
        .h = b->h,
        .partial = b->partial,
        .y = is_in_place(queue, layer->n_embd) ? queue->y[0] : b->y,
        .counts = b->counts,
    };
    if (queue->sizes.prefill) { // segments are made for some rows at a time
        queue->args.partial = b->y;
        queue->args.n_shares = 1;
        tsffn_cuda_make_prefill(queue);
    } else {
        queue->most_rows =
            tsffn_cuda_make_segments(&queue->args, queue->call->rows, queue->call->n_rows, layer->segment_rows);
    }
}

static size_t mask_bytes(const struct tsffn_cuda_queue * queue) {
    return (size_t)queue->args.n_rows * (size_t)queue->args.n_words * sizeof(uint32_t);
}

static size_t row_floats(const struct tsffn_cuda_queue * queue, int64_t n) {
    return (size_t)queue->args.n_rows * (size_t)n * sizeof(float);
}

// Whether a resident x is copied to the host, for the neurons that it computes.
static bool x_goes(const struct tsffn_cuda_queue * queue) {
    return queue->is_resident && !queue->layer->complete;
}

// A resident x stays where it is, if the kernels can read it there.
static bool enqueue_x(struct tsffn_cuda_queue * queue) {
    const struct tsffn_call * call = queue->call;
    const size_t bytes = (size_t)queue->layer->n_embd * sizeof(float);
    struct tsffn_gpu * gpu = &queue->gpu;
    if (!queue->is_resident) {
        for (int64_t t = 0; t < call->n_tokens; ++t) {
            memcpy((char *)queue->host.x + (size_t)t * bytes, call->x + (size_t)t * call->x_stride, bytes);
        }
        return tsffn_gpu_copy(gpu, queue->stream, queue->device.x, queue->host.x, (size_t)call->n_tokens * bytes);
    }
    bool ok = true;
    for (int64_t t = 0; ok && queue->args.x == queue->device.x && t < call->n_tokens; ++t) {
        ok = tsffn_gpu_copy(gpu, queue->stream, (char *)queue->device.x + (size_t)t * bytes,
                            (const char *)queue->resident_x + (size_t)t * call->x_stride, bytes);
    }
    return ok && (!x_goes(queue) ||
                  tsffn_gpu_copy(gpu, queue->stream, queue->host.x, queue->args.x, (size_t)call->n_tokens * bytes));
}

static bool enqueue_inputs(struct tsffn_cuda_queue * queue, const uint32_t * masks) {
    struct tsffn_gpu * gpu = &queue->gpu;
    if (!enqueue_x(queue)) {
        return false;
    }
    if (queue->masks != MASKS_GIVEN) {
        return true;
    }
    memcpy(queue->host.masks, masks, mask_bytes(queue));
    return tsffn_gpu_copy(gpu, queue->stream, queue->device.masks, queue->host.masks, mask_bytes(queue));
}

bool tsffn_cuda_copy_masks(struct tsffn_cuda_queue * queue) {
    queue->masks_on_host = true;
    if (queue->masks != MASKS_PREDICTED) {
        return tsffn_gpu_record(&queue->gpu, queue->masks_done, queue->stream);
    }
    return tsffn_gpu_copy(&queue->gpu, queue->stream, queue->host.masks, queue->device.masks, mask_bytes(queue)) &&
           tsffn_gpu_record(&queue->gpu, queue->masks_done, queue->stream);
}

bool tsffn_cuda_enqueue_predictor(struct tsffn_cuda_queue * queue, const struct tsffn_cuda_args * args, int most_rows) {
    struct tsffn_gpu * gpu = &queue->gpu;
    const struct tsffn_cuda_formats * formats = &queue->layer->formats;
    void * stream = queue->stream;
    return tsffn_gpu_launched(gpu, "hidden", tsffn_cuda_launch_hidden(formats->fc1, most_rows, args, stream)) &&
           tsffn_gpu_launched(gpu, "mask", tsffn_cuda_launch_mask(formats->fc2, most_rows, args, stream));
}

static bool enqueue_predictor(struct tsffn_cuda_queue * queue) {
    return (queue->sizes.prefill ? tsffn_cuda_predict_prefill(queue)
                                 : tsffn_cuda_enqueue_predictor(queue, &queue->args, queue->most_rows)) &&
           tsffn_gpu_record(&queue->gpu, queue->predicted, queue->stream) &&
           // Nobody waits for the masks where all neurons are on the device.
           (queue->layer->complete || tsffn_cuda_copy_masks(queue));
}

static bool enqueue_neurons(struct tsffn_cuda_queue * queue) {
    struct tsffn_gpu * gpu = &queue->gpu;
    const struct tsffn_cuda_formats * formats = &queue->layer->formats;
    const int n = queue->most_rows;
    if (queue->sizes.prefill) {
        return tsffn_cuda_enqueue_prefill(queue);
    }
    return tsffn_gpu_launched(gpu, "neurons",
                              tsffn_cuda_launch_neurons(formats->neurons, n, &queue->args, queue->stream)) &&
           tsffn_gpu_launched(gpu, "down", tsffn_cuda_launch_down(formats->down, n, &queue->args, queue->stream));
}

bool tsffn_cuda_begin(struct tsffn_cuda_queue * queue, const struct tsffn_cuda_layer * layer,
                      const struct tsffn_call * call, const uint32_t * masks,
                      const struct tsffn_cuda_resident * resident, char * error, size_t error_size) {
    if (!fits(queue, layer, call, masks != NULL, resident != NULL, error, error_size)) {
        return false;
    }
    queue->layer = layer;
    queue->call = call;
    queue->masks = masks != NULL ? MASKS_GIVEN : layer->max_rank != 0 ? MASKS_PREDICTED : MASKS_ALL_ON;
    queue->masks_on_host = queue->masks == MASKS_GIVEN;
    queue->wants_h = false;
    queue->is_resident = resident != NULL;
    queue->resident_x = resident != NULL ? resident->x : NULL;
    queue->y_done = resident != NULL ? resident->done : NULL;
    for (int64_t r = 0; r < call->n_rows; ++r) {
        queue->wants_h = queue->wants_h || (resident == NULL && call->rows[r].h != NULL);
        if (resident != NULL) {
            queue->y[r] = resident->y[r];
        }
    }
    queue->is_streamed = false;
    make_args(queue);
    queue->state = BEGUN;
    if (call->n_rows == 0) {
        return true;
    }
    struct tsffn_gpu * gpu = &queue->gpu;
    if (!tsffn_gpu_use(gpu) || (resident != NULL && !tsffn_gpu_wait(gpu, queue->stream, resident->ready)) ||
        !enqueue_inputs(queue, masks) ||
        (queue->masks != MASKS_PREDICTED && x_goes(queue) && !tsffn_cuda_copy_masks(queue)) ||
        !tsffn_gpu_record(gpu, queue->begins, queue->stream) ||
        (queue->masks == MASKS_PREDICTED && !enqueue_predictor(queue)) || !enqueue_neurons(queue) ||
        !tsffn_gpu_record(gpu, queue->ends, queue->stream)) {
        return tsffn_cuda_abandon(queue, error, error_size);
    }
    return true;
}

// ---- the masks

static uint32_t all_on(int64_t n_ff, int64_t word) {
    const int64_t left = n_ff - 32 * word;
    return left >= 32 ? ~(uint32_t)0 : ((uint32_t)1 << left) - 1;
}

const uint32_t * tsffn_cuda_await_masks(struct tsffn_cuda_queue * queue, const float ** x, char * error,
                                        size_t error_size) {
    if (queue->state == IDLE) {
        tsffn_fail(error, error_size, "CUDA: masks of no call");
        return NULL;
    }
    const int64_t n_words = queue->args.n_words;
    if (queue->masks == MASKS_ALL_ON) {
        for (int64_t i = 0; i < queue->args.n_rows * n_words; ++i) {
            queue->host.masks[i] = all_on(queue->args.n_ff, i % n_words);
        }
    }
    // After the masks, or x without them.
    const bool copied = queue->masks == MASKS_PREDICTED || x_goes(queue);
    if (copied && queue->args.n_rows > 0 &&
        ((!queue->masks_on_host && !tsffn_cuda_copy_masks(queue)) ||
         !tsffn_gpu_await(&queue->gpu, queue->masks_done))) {
        tsffn_cuda_abandon(queue, error, error_size);
        return NULL;
    }
    *x = queue->host.x;
    return queue->host.masks;
}

// ---- ending

// A resident y, which may have been written there already.
static bool enqueue_y(struct tsffn_cuda_queue * queue) {
    const size_t bytes = (size_t)queue->args.n_embd * sizeof(float);
    bool ok = true;
    for (int64_t r = 0; ok && queue->args.y == queue->device.y && r < queue->args.n_rows; ++r) {
        ok = tsffn_gpu_copy(&queue->gpu, queue->stream, queue->y[r], queue->device.y + r * queue->args.n_embd, bytes);
    }
    return ok && tsffn_gpu_record(&queue->gpu, queue->y_done, queue->stream);
}

static bool enqueue_results(struct tsffn_cuda_queue * queue, const float * others) {
    struct tsffn_gpu * gpu = &queue->gpu;
    const size_t y_bytes = row_floats(queue, queue->args.n_embd);
    if (others != NULL) {
        memcpy(queue->host.cold, others, y_bytes);
        queue->args.cold = queue->device.cold;
        if (!tsffn_gpu_copy(gpu, queue->stream, queue->device.cold, queue->host.cold, y_bytes)) {
            return false;
        }
    }
    const size_t counts =
        queue->sizes.prefill
            ? tsffn_cuda_prefill_counts(queue)
            : (size_t)queue->args.n_segments * (size_t)tsffn_cuda_neuron_blocks(queue->args.n_ff) * TSFFN_CUDA_COUNTS;
    const bool is_resident = queue->is_resident;
    const bool copies_masks = queue->wants_h && queue->masks == MASKS_PREDICTED && !queue->masks_on_host;
    return tsffn_gpu_launched(gpu, "combine", tsffn_cuda_launch_combine(&queue->args, queue->stream)) &&
           (is_resident || tsffn_gpu_copy(gpu, queue->stream, queue->host.y, queue->device.y, y_bytes)) &&
           (!is_resident || enqueue_y(queue)) &&
           tsffn_gpu_copy(gpu, queue->stream, queue->host.counts, queue->device.counts, counts * sizeof(uint32_t)) &&
           (!queue->wants_h ||
            tsffn_gpu_copy(gpu, queue->stream, queue->host.h, queue->device.h, row_floats(queue, queue->args.n_ff))) &&
           (!copies_masks || tsffn_cuda_copy_masks(queue));
}

bool tsffn_cuda_end(struct tsffn_cuda_queue * queue, const float * others, char * error, size_t error_size) {
    if (queue->state != BEGUN) {
        return tsffn_fail(error, error_size, "CUDA: a call is ended that was not begun");
    }
    if (queue->args.n_rows > 0 && (!tsffn_gpu_use(&queue->gpu) || !enqueue_results(queue, others) ||
                                   !tsffn_gpu_record(&queue->gpu, queue->done, queue->stream))) {
        return tsffn_cuda_abandon(queue, error, error_size);
    }
    queue->state = ENDED;
    return true;
}

int tsffn_cuda_poll(struct tsffn_cuda_queue * queue, char * error, size_t error_size) {
    if (queue->state != ENDED) {
        tsffn_fail(error, error_size, "CUDA: a call is waited for that was not ended");
        return -1;
    }
    bool done = true;
    if (queue->args.n_rows > 0 && !tsffn_gpu_query(&queue->gpu, queue->done, &done)) {
        tsffn_cuda_abandon(queue, error, error_size);
        return -1;
    }
    return done;
}

// h of the layer's range, 0 where the mask is.
static void write_h(const struct tsffn_cuda_queue * queue, int64_t row, float * h) {
    const struct tsffn_range * range = &queue->layer->ranges[queue->call->rows[row].ffn];
    const float * from = queue->host.h + row * queue->args.n_ff;
    const uint32_t * mask = queue->host.masks + row * queue->args.n_words;
    for (int64_t i = range->first; i < range->end; ++i) {
        h[i] = queue->masks == MASKS_ALL_ON || (mask[i / 32] >> i % 32 & 1) != 0 ? from[i] : 0.0f;
    }
}

void tsffn_cuda_count_rows(const struct tsffn_cuda_queue * queue, const struct tsffn_cuda_segment * segments,
                           int32_t n_segments, struct tsffn_counts * counts) {
    const struct tsffn_cuda_layer * layer = queue->layer;
    const size_t * bytes = layer->row_bytes;
    for (int32_t s = 0; s < n_segments; ++s) {
        const int32_t ffn = segments[s].ffn;
        const struct tsffn_range * range = &layer->ranges[ffn];
        const uint64_t neurons = (uint64_t)(queue->is_streamed ? layer->n_ff : range->end - range->first);
        counts->neurons += neurons * (uint64_t)segments[s].n_rows;
        counts->bytes_dense += neurons * (bytes[TSFFN_PART_GATE] + bytes[TSFFN_PART_UP] + bytes[TSFFN_PART_DOWN]);
        counts->bytes_predictor += queue->masks == MASKS_PREDICTED ? layer->predictor_bytes[ffn] : 0;
    }
}

static void add_counts(const struct tsffn_cuda_queue * queue, struct tsffn_counts * counts) {
    const struct tsffn_cuda_args * a = &queue->args;
    uint64_t sums[TSFFN_CUDA_COUNTS] = {0};
    const size_t n = (size_t)a->n_segments * (size_t)tsffn_cuda_neuron_blocks(a->n_ff);
    for (size_t i = 0; i < n * TSFFN_CUDA_COUNTS; ++i) {
        sums[i % TSFFN_CUDA_COUNTS] += queue->host.counts[i];
    }
    const size_t * bytes = queue->layer->row_bytes;
    tsffn_cuda_count_rows(queue, a->segments, a->n_segments, counts);
    counts->predicted += sums[TSFFN_CUDA_COUNT_PREDICTED];
    counts->gate_positive += sums[TSFFN_CUDA_COUNT_GATE_POSITIVE];
    counts->active += sums[TSFFN_CUDA_COUNT_ACTIVE];
    counts->bytes_ffn += sums[TSFFN_CUDA_COUNT_READ] * (bytes[TSFFN_PART_GATE] + bytes[TSFFN_PART_UP]) +
                         sums[TSFFN_CUDA_COUNT_READ_DOWN] * bytes[TSFFN_PART_DOWN];
}

bool tsffn_cuda_await(struct tsffn_cuda_queue * queue, struct tsffn_counts * counts, char * error, size_t error_size) {
    if (queue->state != ENDED) {
        return tsffn_fail(error, error_size, "CUDA: a call is waited for that was not ended");
    }
    struct tsffn_gpu * gpu = &queue->gpu;
    const bool predicts = queue->masks == MASKS_PREDICTED;
    void * begins = predicts ? queue->predicted : queue->begins;
    uint64_t ns = 0, ns_predictor = 0;
    if (queue->args.n_rows > 0 &&
        (!tsffn_gpu_await(gpu, queue->done) || !tsffn_gpu_elapsed(gpu, begins, queue->ends, &ns) ||
         (predicts && !tsffn_gpu_elapsed(gpu, queue->begins, queue->predicted, &ns_predictor)))) {
        return tsffn_cuda_abandon(queue, error, error_size);
    }
    counts->ns_predictor += ns_predictor;
    counts->ns_ffn += ns;
    const struct tsffn_row * rows = queue->call->rows;
    for (int64_t r = 0; !queue->is_resident && r < queue->args.n_rows; ++r) {
        memcpy(rows[r].y, queue->host.y + r * queue->args.n_embd, (size_t)queue->args.n_embd * sizeof(float));
        if (rows[r].h != NULL) {
            write_h(queue, r, rows[r].h);
        }
    }
    if (queue->sizes.prefill) {
        tsffn_cuda_count_prefill(queue, counts);
    } else {
        add_counts(queue, counts);
    }
    queue->state = IDLE;
    return true;
}

bool tsffn_cuda_fetch(struct tsffn_cuda_queue * queue, void * ready, const void * from, void * to, size_t bytes,
                      char * error, size_t error_size) {
    struct tsffn_gpu * gpu = &queue->gpu;
    const size_t room = (size_t)queue->sizes.n_tokens * (size_t)queue->sizes.n_embd * sizeof(float);
    if (queue->state != IDLE || bytes > room) {
        return tsffn_fail(error, error_size, "CUDA: fetching: expected at most %zu bytes between two calls, found %zu",
                          room, bytes);
    }
    if (!tsffn_gpu_use(gpu) || !tsffn_gpu_wait(gpu, queue->stream, ready) ||
        !tsffn_gpu_copy(gpu, queue->stream, queue->host.x, from, bytes) || !tsffn_gpu_drain(gpu, queue->stream)) {
        return tsffn_cuda_abandon(queue, error, error_size);
    }
    memcpy(to, queue->host.x, bytes);
    return true;
}
