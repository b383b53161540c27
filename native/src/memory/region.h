// Where the weights of a model lie in memory.
#ifndef TSFFN_REGION_H
#define TSFFN_REGION_H

#include "../model/loaded.h"
#include "sink.h"

// Bytes at the front of an FFN tensor that are loaded whatever becomes of the rest: they tell whether it is the file's.
enum { TSFFN_COMPARED_BYTES = 4096 };

// Memory with weights of a model: a mapping of its file, or what llama.cpp reads it into. One for every buffer that
// llama.cpp makes; regions without weights are for what is computed.
struct tsffn_region {
    void * base;
    size_t size;
    bool owned;   // allocated here, not mapped by the caller
    bool is_sink; // owned, and FFN weights in here are not kept: they are read from the file
    struct tsffn_sink sink;
    struct tsffn_model * model; // NULL for compute buffers
    // The FFN weights in here, expert after expert: [n_layer][TSFFN_N_PARTS], data NULL where it lies elsewhere; NULL
    // until the first is known. All below is guarded by the model's residency_mutex, but for next_loading.
    struct tsffn_weights * weights;
    int64_t load;                       // number of the load that they came with
    struct tsffn_loaded * loaded;       // what came of that load
    struct tsffn_region * next;         // of the model's buffers with weights
    bool locked;                        // pages of them may be locked in RAM
    struct tsffn_region * next_loading; // see loading_mutex in residency.c
};

#endif
