// What libtsffn-cuda.so offers: the FFN of a layer on a CUDA device, or that of its hot neurons. The library that opens
// it needs no CUDA: it knows this file only. The two are separate files, so the interface has a version.
//
// A call is computed in these steps. The host waits only where it says so.
//
//   begin         x goes to the device; the predictor; the masks come back; gate, up and down of the layer's ranges
//   await_masks   waits for the masks. The caller may compute all other neurons while the device computes its own,
//   stream        or have them copied to the device and computed there, too: in a call of many rows (prefill)
//   end           the caller's sums go to the device; y = the device's sums + the caller's; y comes back
//   poll, await   whether y is there; waits for it
//
// A queue computes one call at a time. Several queues may be used at once, each by one thread at a time.
//
// What fails returns false, NULL or -1 and writes one line to `error`. After some failures nothing works any more on
// this device in this process: is_lost says so. Memory that a call uses must then not be freed before `close`.
#ifndef TSFFN_CUDA_INTERFACE_H
#define TSFFN_CUDA_INTERFACE_H

#include "../ffn/device.h"

struct tsffn_cuda;       // an open device, with its arena
struct tsffn_cuda_layer; // what the device holds of a layer
struct tsffn_cuda_queue; // a stream, and the memory of the call that it computes

enum {
    TSFFN_CUDA_VERSION = 2,
    TSFFN_CUDA_MAX_ROWS = 64, // of a call, but for those of prefill
};

struct tsffn_cuda_info {
    char name[128];
    int capability; // 10 * major + minor
    size_t free_bytes, total_bytes;
};

// The largest calls of a queue.
struct tsffn_cuda_sizes {
    int64_t n_embd, n_ff, max_rank; // max_rank 0: no layer has a predictor on the device
    int64_t n_tokens, n_rows;       // of a call: up to TSFFN_CUDA_MAX_ROWS rows, if it is not prefill
    // Prefill: calls of many rows, whose weights are read once for many of them and multiplied on tensor cores. Sums
    // are within a few 2^-11 of each product, and masks as exact as in other calls. Such a queue takes no resident x,
    // and nobody may want h.
    bool prefill;
    int64_t n_ffns;      // prefill: of a layer,
    size_t neuron_bytes; // and of a neuron, at most
};

// Threads of the caller's. `run` calls body(context, i) for all i below n, each once, and returns when they are done.
struct tsffn_cuda_workers {
    void (*run)(int n_threads, int64_t n, void (*body)(void * context, int64_t i), void * context);
    int n_threads;
};

// x and y of a call in the device's memory, where another library computes what comes before and after. Its rows have
// no y then, nor h.
struct tsffn_cuda_resident {
    const void * x;     // in place of the call's
    float * const * y;  // [n_rows] rows of n_embd floats
    void *ready, *done; // cudaEvent_t: one that x is there after, and one to record when y is
};

struct tsffn_cuda_module {
    int version; // TSFFN_CUDA_VERSION
    const char * name;

    // How many devices there are. -1: the driver cannot be used.
    int (*n_devices)(char * error, size_t error_size);
    // Opens a device and takes `arena_bytes` of its memory, for layers. `info` is filled in any case, as far as known.
    struct tsffn_cuda * (*open)(int device, size_t arena_bytes, struct tsffn_cuda_info * info, char * error,
                                size_t error_size);
    void (*close)(struct tsffn_cuda * cuda);
    bool (*is_lost)(const struct tsffn_cuda * cuda);

    // Bytes of the arena that a layer takes, with these neurons [n_ffns], whose bounds are multiples of 32, or n_ff;
    // and with its predictor or without. 0: the module has no kernels for such a layer. It needs no device.
    size_t (*layer_bytes)(const struct tsffn_layer * layer, const struct tsffn_range * ranges, bool predictor,
                          char * error, size_t error_size);
    // Bytes that a neuron of the layer takes.
    size_t (*neuron_bytes)(const struct tsffn_layer * layer);
    // Copies them there, and returns when they are. Without `predictor` calls must bring masks, unless all neurons of
    // the layer are always on. The arena takes new layers while there is room; room comes back when no layer is left.
    struct tsffn_cuda_layer * (*upload)(struct tsffn_cuda * cuda, const struct tsffn_layer * layer,
                                        const struct tsffn_range * ranges, bool predictor, char * error,
                                        size_t error_size);
    void (*release)(struct tsffn_cuda_layer * layer);

    // Bytes of device memory that a queue takes beside the arena.
    size_t (*queue_bytes)(const struct tsffn_cuda_sizes * sizes);
    struct tsffn_cuda_queue * (*open_queue)(struct tsffn_cuda * cuda, const struct tsffn_cuda_sizes * sizes,
                                            char * error, size_t error_size);
    void (*close_queue)(struct tsffn_cuda_queue * queue);

    // Begins call->op FUSED, not dense, without profile. `masks` [n_rows][mask words], or NULL: the predictor decides;
    // without one every neuron is on. x and masks are copied before it returns, unless x is resident. But for prefill a
    // row's sums do not depend on the other rows, and are the same on every device.
    bool (*begin)(struct tsffn_cuda_queue * queue, const struct tsffn_cuda_layer * layer,
                  const struct tsffn_call * call, const uint32_t * masks, const struct tsffn_cuda_resident * resident,
                  char * error, size_t error_size);
    // The masks of the call, [n_rows][mask words] for all n_ff neurons, until the next call. NULL: failed. Where x is
    // resident and some neurons are not the device's, *x [n_tokens][n_embd] is a copy that lives as long.
    const uint32_t * (*await_masks)(struct tsffn_cuda_queue * queue, const float ** x, char * error, size_t error_size);
    // Copies all neurons that some row needs and the layer's ranges lack from `weights`, which the layer was made from,
    // and computes them, a piece at a time: while one is computed, `workers` write the next. For calls of prefill,
    // between begin and end, with neurons that are always in memory. *bytes: what is copied.
    bool (*stream)(struct tsffn_cuda_queue * queue, const struct tsffn_layer * weights,
                   const struct tsffn_cuda_workers * workers, size_t * bytes, char * error, size_t error_size);
    // `others` [n_rows][n_embd]: what the caller adds to y; NULL: nothing. It is copied before this returns.
    bool (*end)(struct tsffn_cuda_queue * queue, const float * others, char * error, size_t error_size);
    // 1: the call is computed; 0: not yet; -1: failed.
    int (*poll)(struct tsffn_cuda_queue * queue, char * error, size_t error_size);
    // Waits, then writes rows[].y, and of h [n_ff] the layer's range where rows[].h is not NULL; adds to counts what
    // the device computed: neurons, predicted, gate_positive, active are those of the range, or all where the others
    // were streamed; ns_predictor and ns_ffn are the device's times. The call and its rows must
    // still be there.
    bool (*await)(struct tsffn_cuda_queue * queue, struct tsffn_counts * counts, char * error, size_t error_size);
    // Copies bytes of the device's memory that are there after the event `ready`, between two calls, and waits for
    // them.
    bool (*fetch)(struct tsffn_cuda_queue * queue, void * ready, const void * from, void * to, size_t bytes,
                  char * error, size_t error_size);
};

// What the library exports under this name.
typedef const struct tsffn_cuda_module * (*tsffn_cuda_module_fn)(void);
#define TSFFN_CUDA_MODULE "tsffn_cuda_module"

#endif
