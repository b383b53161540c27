// A queue: a stream, the memory of a call, and the call that it computes.
#ifndef TSFFN_CUDA_QUEUE_H
#define TSFFN_CUDA_QUEUE_H

#include "module.h"
#include "prefill_kernels.h"

enum { STREAM_SLOTS = 2 };

// The memory of a call: on the device, and on the host where it is copied from or to.
struct buffers {
    float *x, *hidden, *h, *partial, *cold, *y;
    uint32_t *masks, *counts;
    // Of prefill, where `hidden` is that of TSFFN_CUDA_PLAN_ROWS rows, and `h` that of a chunk.
    uint16_t *x_halves, *h_halves;
    float *x_scale, *h_scale;
    struct tsffn_cuda_segment *tiles, *groups;
    int32_t *tokens, *listed, *n_listed;
    uint8_t * streamed[STREAM_SLOTS];
    int32_t * streamed_ids[STREAM_SLOTS];
};

enum state {
    IDLE,
    BEGUN, // everything up to `down` is enqueued
    ENDED, // y and the counts are on their way to the host
};

// Where the masks of a call come from.
enum masks {
    MASKS_ALL_ON,
    MASKS_GIVEN,
    MASKS_PREDICTED,
};

struct tsffn_cuda_queue {
    struct tsffn_cuda * cuda;
    struct tsffn_gpu gpu; // of the thread that uses the queue
    struct tsffn_cuda_sizes sizes;
    void *stream, *masks_done, *done;
    void *begins, *predicted, *ends; // of what the device computes before `combine`, timed
    struct buffers device, host;
    // The call in hand.
    enum state state;
    enum masks masks;
    bool masks_on_host; // or on their way, which masks_done ends
    bool wants_h;
    bool is_resident; // x and y are in memory of the device that is not the queue's
    const void * resident_x;
    float * y[TSFFN_CUDA_MAX_ROWS]; // of each row, when it is
    void * y_done;
    const struct tsffn_cuda_layer * layer;
    const struct tsffn_call * call;
    struct tsffn_cuda_args args;
    int most_rows; // of a segment
    // Of prefill:
    void *copies, *copied[STREAM_SLOTS], *computed[STREAM_SLOTS]; // a stream; events of what the slots hold
    struct tsffn_cuda_prefill_args prefill;
    bool is_streamed;
    int64_t n_streamed; // neurons
};

// Neurons of a chunk of prefill, and of one that is streamed.
int64_t tsffn_cuda_chunk_neurons(const struct tsffn_cuda_sizes * sizes);
int64_t tsffn_cuda_slot_neurons(const struct tsffn_cuda_sizes * sizes);
// Rows of args->tokens that share an FFN in segments of up to segment_rows; returns how many rows the largest has.
int tsffn_cuda_make_segments(struct tsffn_cuda_args * args, const struct tsffn_row * rows, int64_t n_rows,
                             int segment_rows);
// Copies the masks, if the device has made any; masks_done comes after them, and after x.
bool tsffn_cuda_copy_masks(struct tsffn_cuda_queue * queue);

#endif
