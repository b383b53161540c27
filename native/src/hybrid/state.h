// What the files of this folder share: a model of which a GPU has a part, and a call that both compute.
#ifndef TSFFN_HYBRID_STATE_H
#define TSFFN_HYBRID_STATE_H

#include "hybrid.h"

#include <pthread.h>
#include <stdatomic.h>

// Calls of many rows, on a queue of their own.
struct tsffn_hybrid_prefill {
    struct tsffn_cuda_queue * queue; // NULL: the CPU computes them
    struct tsffn_cuda_sizes sizes;
    // What the environment says, -1: nothing.
    int64_t n_asked;    // TSFFN_CUDA_PREFILL: tokens of a call on the GPU; 0: none
    int64_t n_streamed; // TSFFN_CUDA_STREAM: rows that share an FFN from which its cold neurons are streamed; 0: never
    float * x;          // [n_x] what a call needs of x when y is written
    int64_t n_x;
};

enum {
    // Of a call: sums of so many rows are kept apart on the GPU before they are added. Longer ones are prefill.
    MAX_ROWS = 16,
};

struct tsffn_hybrid {
    const struct tsffn_cuda_module * module;
    struct tsffn_cuda * cuda;
    struct tsffn_cuda_queue * queue;
    struct tsffn_hybrid_prefill prefill;
    const struct tsffn_layer * layers; // [n_layer]
    struct tsffn_cuda_layer ** on_gpu; // [n_layer], NULL where nothing of the layer is there
    struct tsffn_plan plan;
    pthread_mutex_t mutex;   // of the queues, and what a call needs of the host, for its rows or MAX_ROWS:
    float * others;          // [n_rows][n_embd] the CPU's sums
    float * expected;        // [MAX_ROWS][n_embd] y of rows that are compared
    bool * compared;         // [n_layer] a call of a few rows,
    bool * prefill_compared; // and one of prefill
    uint32_t * masks;        // [n_rows][mask words] of a predictor that the CPU computes
    struct tsffn_row * rows; // [n_rows]
    struct tsffn_hybrid_counter counter;
    bool is_pending; // the queue computes a resident call of this layer
    int64_t pending;
    uint64_t ns_pending; // that was waited for it until now
    bool is_lost;        // one of these failed, and nobody was told
    atomic_bool failed;  // from now on the CPU computes everything
    bool complained;
    char complaint[512];
};

// ---- calls

// The parts of a call that is shared.
struct sharing {
    struct tsffn_hybrid * h;
    struct tsffn_cuda_queue * queue;
    const struct tsffn_layer * layer;
    struct tsffn_cuda_layer * on_gpu;
    const struct tsffn_range * ranges; // [n_ffns]
    const struct tsffn_hybrid_host * host;
    const struct tsffn_call * call;
    const struct tsffn_cuda_resident * resident; // NULL: x and y are the host's
    const float * x;                             // the host's copy of a resident x
    bool streams;                                // neurons that the GPU lacks are copied there
    struct tsffn_counts * counts;
    uint64_t bytes_streamed;
    char error[512];
};

enum outcome {
    DONE,
    NO_MEMORY,
    GPU_FAILED, // nothing is written
    WRONG,      // it failed, and y is what the CPU computed
};

// With the queue for itself. y is written when it is DONE.
enum outcome tsffn_share_call(struct sharing * s, struct tsffn_counts * of_gpu, uint64_t * ns_waiting);
// Rows [n], MAX_ROWS at most, into h->expected. What it counts is dropped. False: out of memory.
bool tsffn_compute_expected(const struct sharing * s, const struct tsffn_row * rows, int64_t n);
// Whether their y is what was expected, but for rounding and neurons whose logit is at the threshold. Not a number is
// not.
bool tsffn_is_as_expected(const struct sharing * s, const struct tsffn_row * rows, int64_t n);
// Notes that it is not. Returns WRONG.
enum outcome tsffn_complain_of_results(struct sharing * s);

// ---- prefill.c

// Reads the environment; false with one line in `error`.
bool tsffn_prefill_read(struct tsffn_hybrid_prefill * prefill, char * error, size_t error_size);
// Chooses how many tokens a call has, so that it takes a small part of `bytes`, or as many as were asked for, if
// `bytes` hold that. Returns what it takes; 0: nothing.
size_t tsffn_prefill_choose(struct tsffn_hybrid * h, const struct tsffn_cuda_sizes * sizes, size_t bytes);
// Whether a call can be one of prefill.
bool tsffn_prefill_takes(const struct tsffn_hybrid * h, const struct tsffn_call * call);
// A call of any number of rows, some tokens at a time. y is written when it is DONE, and may be when it is not: x is
// what it was in any case.
enum outcome tsffn_prefill_compute(struct sharing * s, struct tsffn_counts * of_gpu, uint64_t * ns_waiting);

#endif
