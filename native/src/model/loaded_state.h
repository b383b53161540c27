// What the files that fill a load share.
#ifndef TSFFN_LOADED_STATE_H
#define TSFFN_LOADED_STATE_H

#include "loaded.h"

struct tsffn_loaded {
    struct tsffn_model * model;
    int references;                  // guarded by the model's residency_mutex
    struct tsffn_weight * weights;   // [n_layer][TSFFN_N_PARTS]
    const uint8_t ** data;           // [n_layer][TSFFN_N_PARTS], NULL where it is not known
    struct tsffn_layer * layers;     // [n_layer]
    struct tsffn_ffn_weights * ffns; // [n_layer][n_ffns]
    pthread_mutex_t mutex;           // held while a layer is prepared
    _Atomic(void *) * prepared;      // [n_layer], of the device; NULL before
    // Of a load that a GPU shares: guarded by the model's residency_mutex, until all is there.
    struct tsffn_hybrid * uploading;
    int64_t n_uploaded; // layers
    size_t copied, bytes;
    _Atomic(struct tsffn_hybrid *) hybrid; // it computes
};

#endif
