#include "prefill.h"

#include <string.h>

// Groups and tiles of rows that have one FFN, in the host's buffers.
static void make_tables(struct tsffn_cuda_queue * queue) {
    struct tsffn_cuda_prefill_args * a = &queue->prefill;
    struct tsffn_cuda_segment *tiles = queue->host.tiles, *groups = queue->host.groups;
    const struct tsffn_row * rows = queue->call->rows;
    for (int32_t r = 0; r < queue->args.n_rows; ++r) {
        queue->host.tokens[r] = rows[r].token;
        const bool is_new = r == 0 || rows[r].ffn != rows[r - 1].ffn;
        const struct tsffn_cuda_segment empty = {.ffn = rows[r].ffn, .first_row = r};
        if (is_new) {
            groups[a->n_groups++] = empty;
        }
        if (is_new || tiles[a->n_tiles - 1].n_rows == TSFFN_CUDA_TILE_ROWS) {
            tiles[a->n_tiles++] = empty;
        }
        groups[a->n_groups - 1].n_rows += 1;
        const int32_t n_rows = tiles[a->n_tiles - 1].n_rows += 1;
        a->tile_rows = n_rows > a->tile_rows ? n_rows : a->tile_rows;
    }
}

void tsffn_cuda_make_prefill(struct tsffn_cuda_queue * queue) {
    const struct tsffn_cuda_args * a = &queue->args;
    const struct buffers * b = &queue->device;
    const bool lists = a->masks != NULL && a->n_rows <= TSFFN_CUDA_LISTED_ROWS;
    queue->prefill = (struct tsffn_cuda_prefill_args){
        .tiles = b->tiles,
        .groups = b->groups,
        .tokens = b->tokens,
        .n_tokens = (int32_t)queue->call->n_tokens,
        .n_embd = a->n_embd,
        .n_ff = a->n_ff,
        .n_words = a->n_words,
        .ffns = a->ffns,
        .neuron_bytes = a->neuron_bytes,
        .up_offset = a->up_offset,
        .down_offset = a->down_offset,
        .activation = a->activation,
        .masks = a->masks,
        .listed = lists ? b->listed : NULL,
        .n_listed = b->n_listed,
        .chunk = (int32_t)tsffn_cuda_chunk_neurons(&queue->sizes),
        .x = a->x,
        .x_halves = b->x_halves,
        .x_scale = b->x_scale,
        .h = b->h,
        .h_halves = b->h_halves,
        .h_scale = b->h_scale,
        .y = b->y,
        .counts = b->counts,
    };
    make_tables(queue);
}

// The predictor's kernels take some rows at a time.
bool tsffn_cuda_predict_prefill(struct tsffn_cuda_queue * queue) {
    bool ok = true;
    for (int64_t r = 0; ok && r < queue->call->n_rows; r += TSFFN_CUDA_PLAN_ROWS) {
        const int64_t left = queue->call->n_rows - r;
        struct tsffn_cuda_args args = queue->args;
        args.n_rows = (int32_t)(left < TSFFN_CUDA_PLAN_ROWS ? left : TSFFN_CUDA_PLAN_ROWS);
        args.masks += r * args.n_words;
        const int most =
            tsffn_cuda_make_segments(&args, queue->call->rows + r, args.n_rows, queue->layer->segment_rows);
        ok = tsffn_cuda_enqueue_predictor(queue, &args, most);
    }
    return ok;
}

bool tsffn_cuda_enqueue_chunk(struct tsffn_cuda_queue * queue, const struct tsffn_cuda_prefill_args * args) {
    struct tsffn_gpu * gpu = &queue->gpu;
    const struct tsffn_cuda_formats * formats = &queue->layer->formats;
    void * stream = queue->stream;
    return tsffn_gpu_launched(gpu, "gate_up", tsffn_cuda_launch_gate_up(formats->neurons, args, stream)) &&
           tsffn_gpu_launched(gpu, "split_h", tsffn_cuda_launch_split_h(args, stream)) &&
           tsffn_gpu_launched(gpu, "add_down", tsffn_cuda_launch_add_down(formats->down, args, stream));
}

// The largest range of an FFN that has rows.
static int32_t most_neurons(const struct tsffn_cuda_queue * queue) {
    int32_t most = 0;
    for (int32_t g = 0; g < queue->prefill.n_groups; ++g) {
        const struct tsffn_range * range = &queue->layer->ranges[queue->host.groups[g].ffn];
        most = range->end - range->first > most ? range->end - range->first : most;
    }
    return most;
}

bool tsffn_cuda_enqueue_prefill(struct tsffn_cuda_queue * queue) {
    struct tsffn_gpu * gpu = &queue->gpu;
    struct tsffn_cuda_prefill_args * a = &queue->prefill;
    void * stream = queue->stream;
    const size_t segment = sizeof(struct tsffn_cuda_segment);
    bool ok = tsffn_gpu_copy(gpu, stream, queue->device.tiles, queue->host.tiles, (size_t)a->n_tiles * segment) &&
              tsffn_gpu_copy(gpu, stream, queue->device.groups, queue->host.groups, (size_t)a->n_groups * segment) &&
              tsffn_gpu_copy(gpu, stream, queue->device.tokens, queue->host.tokens,
                             (size_t)queue->args.n_rows * sizeof(int32_t)) &&
              tsffn_gpu_launched(gpu, "split_x", tsffn_cuda_launch_split_x(a, stream)) &&
              (a->listed == NULL || (tsffn_gpu_launched(gpu, "list_needed", tsffn_cuda_launch_list_needed(a, stream)) &&
                                     tsffn_gpu_copy(gpu, stream, queue->host.n_listed, a->n_listed,
                                                    (size_t)queue->layer->n_ffns * sizeof(int32_t))));
    const int32_t n = most_neurons(queue);
    for (a->first = 0, a->begins = true; ok && (a->begins || a->first < n); a->first += a->chunk, a->begins = false) {
        ok = tsffn_cuda_enqueue_chunk(queue, a);
    }
    return ok;
}

size_t tsffn_cuda_prefill_counts(const struct tsffn_cuda_queue * queue) {
    const struct tsffn_cuda_prefill_args * a = &queue->prefill;
    return (size_t)a->n_tiles * (size_t)tsffn_cuda_neuron_tiles(a->chunk) * TSFFN_CUDA_TILE_COUNTS;
}

void tsffn_cuda_count_prefill(const struct tsffn_cuda_queue * queue, struct tsffn_counts * counts) {
    const struct tsffn_cuda_layer * layer = queue->layer;
    const size_t n = tsffn_cuda_prefill_counts(queue);
    uint64_t sums[TSFFN_CUDA_TILE_COUNTS] = {0};
    for (size_t i = 0; i < n; ++i) {
        sums[i % TSFFN_CUDA_TILE_COUNTS] += queue->host.counts[i];
    }
    tsffn_cuda_count_rows(queue, queue->host.groups, queue->prefill.n_groups, counts);
    counts->predicted += sums[TSFFN_CUDA_TILE_PREDICTED];
    counts->gate_positive += sums[TSFFN_CUDA_TILE_GATE_POSITIVE];
    counts->active += sums[TSFFN_CUDA_TILE_ACTIVE];
    uint64_t n_read = queue->is_streamed ? (uint64_t)queue->n_streamed : 0;
    for (int32_t g = 0; g < queue->prefill.n_groups; ++g) {
        const int32_t ffn = queue->host.groups[g].ffn;
        const bool lists = queue->prefill.listed != NULL;
        n_read += (uint64_t)(lists ? queue->host.n_listed[ffn] : layer->ranges[ffn].end - layer->ranges[ffn].first);
    }
    const size_t * bytes = layer->row_bytes;
    counts->bytes_ffn += n_read * (bytes[TSFFN_PART_GATE] + bytes[TSFFN_PART_UP] + bytes[TSFFN_PART_DOWN]);
}
