// A cache of neurons in front of their file: memory for some of a model's neurons (struct tsffn_memory). The neurons
// that are used most often stay. What a call needs and is not there is read while the rest is computed, past the page
// cache, many reads at once. What is computed does not depend on what was there.
#ifndef TSFFN_NEURON_CACHE_H
#define TSFFN_NEURON_CACHE_H

#include "../ffn/neurons.h"

#include <stdbool.h>

// Where the rows of one layer are in the file: FFN after FFN, or, in bundles, in three pieces (docs/format.md).
struct tsffn_layer_source {
    uint64_t offset[TSFFN_N_PARTS]; // of gate, up and down
    size_t row_bytes[TSFFN_N_PARTS];
};

// What is cached.
struct tsffn_neuron_source {
    const char * path; // for messages
    int fd;
    int64_t n_layer, n_ffns, n_ff; // n_ffns: of a layer
    bool bundled;
    bool hot_first; // an FFN's first neurons are used most often
    const struct tsffn_layer_source * layers;
};

// What a call cost, and what came of it.
struct tsffn_cache_counts {
    uint64_t needed;  // neurons that were announced,
    uint64_t missing; // and of them those that memory did not have,
    uint64_t ahead;   // of which so many were read ahead, since the call before
    uint64_t in_vain; // neurons that were read ahead, and not needed
    uint64_t reads;   // of the file
    uint64_t bytes;   // that these read
    uint64_t ns;      // in which a thread waited for them
};

struct tsffn_neuron_cache;

// A cache of at most `bytes` of memory, all that it needs included. It copies `source`, and opens the file once more.
// NULL, with one line in `error`, where the bytes hold too few neurons, or without memory.
struct tsffn_neuron_cache * tsffn_neuron_cache_new(const struct tsffn_neuron_source * source, uint64_t bytes,
                                                   char * error, size_t error_size);
// Nothing computes with its neurons any more.
void tsffn_neuron_cache_free(struct tsffn_neuron_cache * cache);

// The neurons of an FFN.
struct tsffn_neurons tsffn_neuron_cache_neurons(struct tsffn_neuron_cache * cache, int64_t layer, int64_t ffn);

// Between these two a call computes with neurons of a layer; calls take turns. The end is false, with one line in
// `error`, where neurons could not be read: what was computed is worthless then. `n_tokens`: 0 where the call does not
// tell what is used how often. Returns whether it is worth while to expect neurons of the next layer.
bool tsffn_neuron_cache_begin(struct tsffn_neuron_cache * cache, int64_t layer, int64_t n_tokens);
bool tsffn_neuron_cache_end(struct tsffn_neuron_cache * cache, struct tsffn_cache_counts * counts, char * error,
                            size_t error_size);

// The first n neurons of an FFN are computed by something else, as a rule: they are not filled in, and go before
// others. What was filled before is filled anew.
void tsffn_neuron_cache_leave_out(struct tsffn_neuron_cache * cache, int64_t layer, int64_t ffn, int64_t n);

// Reads the first neurons of the FFNs, as many of each as there is room for, up to `bytes` more in this call.
// *filled: what the cache holds now. False, with one line in `error`, where they cannot be read.
bool tsffn_neuron_cache_fill(struct tsffn_neuron_cache * cache, uint64_t bytes, uint64_t * filled, char * error,
                             size_t error_size);

// Bytes of neurons that it has room for, and the way it reads: "io_uring" or "threads".
uint64_t tsffn_neuron_cache_room(const struct tsffn_neuron_cache * cache);
const char * tsffn_neuron_cache_reads(const struct tsffn_neuron_cache * cache);

#endif
