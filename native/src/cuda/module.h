// What the files of the module share: the open device, its layers, its queues.
#ifndef TSFFN_CUDA_MODULE_H
#define TSFFN_CUDA_MODULE_H

#include "../error.h"
#include "interface.h"
#include "runtime.h"

#include <stdatomic.h>

_Static_assert((int)TSFFN_CUDA_PLAN_ROWS == (int)TSFFN_CUDA_MAX_ROWS, "a call fits the kernels' parameter");

enum {
    STAGING_BUFFERS = 2,
    STAGING_BYTES = 4 << 20, // of each
};

struct tsffn_cuda {
    struct tsffn_gpu gpu; // of whoever uploads
    atomic_bool lost;
    uint8_t * arena;
    size_t arena_bytes, used;
    int n_layers;
    // Uploads: the host fills one buffer while the other is copied.
    void * stream;
    void * staging[STAGING_BUFFERS];
    void * copied[STAGING_BUFFERS]; // events
};

// A matrix, and what is known of its rows.
struct tsffn_cuda_formats {
    int neurons; // gate and up
    int down, fc1, fc2;
};

struct tsffn_cuda_layer {
    struct tsffn_cuda * cuda;
    int64_t n_embd, n_ff, n_ffns;
    int64_t max_rank; // a multiple of 32; 0 without predictor on the device
    int segment_rows; // that a block's shared memory holds the activations of
    bool always_on;   // the layer has no predictor at all
    bool complete;    // all neurons are on the device
    struct tsffn_cuda_formats formats;
    struct tsffn_activation activation;
    float threshold;
    bool on_when_equal;
    size_t neuron_bytes, up_offset, down_offset;
    // For the counts: bytes of rows in the file.
    size_t row_bytes[TSFFN_N_PARTS];
    size_t * predictor_bytes; // [n_ffns]
    struct tsffn_range * ranges;
    // On the device.
    const struct tsffn_cuda_ffn * ffns;
    const float * pred_scale;
};

// Copies the line of a failed CUDA call, and notes that the device is lost. Returns false.
bool tsffn_cuda_failed(struct tsffn_cuda * cuda, const struct tsffn_gpu * gpu, char * error, size_t error_size);

// layers.c
size_t tsffn_cuda_layer_bytes(const struct tsffn_layer * layer, const struct tsffn_range * ranges, bool predictor,
                              char * error, size_t error_size);
struct tsffn_cuda_layer * tsffn_cuda_upload(struct tsffn_cuda * cuda, const struct tsffn_layer * layer,
                                            const struct tsffn_range * ranges, bool predictor, char * error,
                                            size_t error_size);
void tsffn_cuda_release(struct tsffn_cuda_layer * layer);
size_t tsffn_cuda_neuron_bytes(const struct tsffn_layer * layer);
// Neuron i's rows as the device has them, neuron_bytes.
void tsffn_cuda_repack_neuron(const struct tsffn_cuda_layer * made, const struct tsffn_neurons * neurons, int64_t i,
                              uint8_t * to);

// queue.c
size_t tsffn_cuda_queue_bytes(const struct tsffn_cuda_sizes * sizes);
struct tsffn_cuda_queue * tsffn_cuda_open_queue(struct tsffn_cuda * cuda, const struct tsffn_cuda_sizes * sizes,
                                                char * error, size_t error_size);
void tsffn_cuda_close_queue(struct tsffn_cuda_queue * queue);

// call.c
bool tsffn_cuda_begin(struct tsffn_cuda_queue * queue, const struct tsffn_cuda_layer * layer,
                      const struct tsffn_call * call, const uint32_t * masks,
                      const struct tsffn_cuda_resident * resident, char * error, size_t error_size);
const uint32_t * tsffn_cuda_await_masks(struct tsffn_cuda_queue * queue, const float ** x, char * error,
                                        size_t error_size);
bool tsffn_cuda_stream(struct tsffn_cuda_queue * queue, const struct tsffn_layer * weights,
                       const struct tsffn_cuda_workers * workers, size_t * bytes, char * error, size_t error_size);
bool tsffn_cuda_fetch(struct tsffn_cuda_queue * queue, void * ready, const void * from, void * to, size_t bytes,
                      char * error, size_t error_size);
bool tsffn_cuda_end(struct tsffn_cuda_queue * queue, const float * others, char * error, size_t error_size);
int tsffn_cuda_poll(struct tsffn_cuda_queue * queue, char * error, size_t error_size);
bool tsffn_cuda_await(struct tsffn_cuda_queue * queue, struct tsffn_counts * counts, char * error, size_t error_size);

#endif
