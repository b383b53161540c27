// A queue: a stream, the memory of a call, and the call that it computes.
#ifndef TSFFN_CUDA_QUEUE_H
#define TSFFN_CUDA_QUEUE_H

#include "module.h"

enum { N_BUFFERS = 8 };

// The memory of a call: on the device, and on the host where it is copied from or to.
struct buffers {
    float *x, *hidden, *h, *partial, *cold, *y;
    uint32_t *masks, *counts;
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
    void *begins, *ends; // of what the device computes before `combine`, timed
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
};

#endif
