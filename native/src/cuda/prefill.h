// What is enqueued for a call of prefill, and what it counts. call.c has the rest of it.
#ifndef TSFFN_CUDA_PREFILL_H
#define TSFFN_CUDA_PREFILL_H

#include "queue.h"

// Of the call in hand: queue->prefill, and its tables on the host.
void tsffn_cuda_make_prefill(struct tsffn_cuda_queue * queue);
// The masks of all rows.
bool tsffn_cuda_predict_prefill(struct tsffn_cuda_queue * queue);
// The neurons of the layer's ranges.
bool tsffn_cuda_enqueue_prefill(struct tsffn_cuda_queue * queue);
// Those of a chunk, as queue->prefill says.
bool tsffn_cuda_enqueue_chunk(struct tsffn_cuda_queue * queue, const struct tsffn_cuda_prefill_args * args);
// Numbers in queue->host.counts.
size_t tsffn_cuda_prefill_counts(const struct tsffn_cuda_queue * queue);
void tsffn_cuda_count_prefill(const struct tsffn_cuda_queue * queue, struct tsffn_counts * counts);

// call.c: the predictor for the rows of `args`, in segments of up to most_rows.
bool tsffn_cuda_enqueue_predictor(struct tsffn_cuda_queue * queue, const struct tsffn_cuda_args * args, int most_rows);
// Counts neurons, and bytes that do not depend on what the device counts, of each segment.
void tsffn_cuda_count_rows(const struct tsffn_cuda_queue * queue, const struct tsffn_cuda_segment * segments,
                           int32_t n_segments, struct tsffn_counts * counts);
// Leaves a call that failed; returns false.
bool tsffn_cuda_abandon(struct tsffn_cuda_queue * queue, char * error, size_t error_size);

#endif
