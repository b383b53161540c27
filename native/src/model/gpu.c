// The share of a load that a GPU has.
#include "../cache/neuron_cache.h"
#include "../error.h"
#include "../hybrid/hybrid.h"
#include "loaded_state.h"

#include <stdlib.h>
#include <string.h>

bool tsffn_model_gpu_memory(struct tsffn_model * model, const char * device) {
    const char * share = getenv("TSFFN_CUDA_SHARE");
    const char * name = device != NULL && share != NULL && strcmp(share, "1") == 0 ? device : "";
    if (model == NULL || strlen(name) >= sizeof(model->resident_on)) {
        return false;
    }
    memcpy(model->resident_on, name, strlen(name) + 1);
    return true;
}

struct tsffn_hybrid * tsffn_loaded_hybrid(const struct tsffn_weight * weight) {
    return atomic_load_explicit(&weight->loaded->hybrid, memory_order_acquire);
}

// The load of which all weights are there; NULL with a line in `error`.
static struct tsffn_loaded * complete_load(const struct tsffn_model * model, char * error, size_t error_size) {
    struct tsffn_loaded * loaded = model->load.loaded;
    bool complete = loaded != NULL;
    for (int64_t i = 0; complete && i < model->n_layer * TSFFN_N_PARTS; ++i) {
        complete = loaded->data[i] != NULL;
    }
    if (!complete) {
        tsffn_fail(error, error_size, "%s: its FFN weights are not loaded", model->path);
    }
    return complete ? loaded : NULL;
}

// With the mutex held.
static bool share_with_gpu(struct tsffn_model * model, int32_t gpu, uint64_t bytes, const int32_t * hot,
                           struct tsffn_gpu_share * share, char * error, size_t error_size) {
    struct tsffn_loaded * loaded = complete_load(model, error, error_size);
    if (loaded == NULL) {
        return false;
    }
    if (loaded->uploading != NULL || atomic_load(&loaded->hybrid) != NULL) {
        return tsffn_fail(error, error_size, "%s: a GPU has its share of it already", model->path);
    }
    if (model->computes != &tsffn_cpu_device) {
        return tsffn_fail(error, error_size, "TSFFN_DEVICE names a device that shares its work with no GPU");
    }
    if (model->keep > 0) {
        return tsffn_fail(error, error_size, "sparsity %s is computed by the CPU alone", model->sparsity.text);
    }
    loaded->n_uploaded = 0;
    loaded->copied = loaded->bytes = 0;
    loaded->uploading =
        tsffn_hybrid_open(gpu, loaded->layers, model->n_layer, bytes, hot,
                          (struct tsffn_hybrid_counter){tsffn_model_count_late, model}, share, error, error_size);
    for (int64_t i = 0; loaded->uploading != NULL && i < model->n_layer; ++i) {
        loaded->bytes += tsffn_hybrid_layer_bytes(loaded->uploading, i);
    }
    return loaded->uploading != NULL;
}

bool tsffn_model_gpu(struct tsffn_model * model, int32_t gpu, uint64_t bytes, const int32_t * hot, size_t n_hot,
                     struct tsffn_gpu_share * share, char * error, size_t error_size) {
    if (model == NULL || share == NULL) {
        return tsffn_fail(error, error_size, "no model is opened");
    }
    const size_t n = (size_t)(model->n_layer * tsffn_model_ffns_per_layer(model));
    if (hot != NULL && n_hot != n) {
        return tsffn_fail(error, error_size, "neurons for the GPU: expected %zu numbers, one for each FFN, found %zu",
                          n, n_hot);
    }
    for (size_t i = 0; hot != NULL && i < n; ++i) {
        if (hot[i] < 0 || hot[i] > model->n_ff) {
            return tsffn_fail(error, error_size, "neurons for the GPU: number %zu: expected 0 to %lld, found %d", i,
                              (long long)model->n_ff, (int)hot[i]);
        }
    }
    pthread_mutex_lock(&model->residency_mutex);
    const bool ok = share_with_gpu(model, gpu, bytes, hot, share, error, error_size);
    pthread_mutex_unlock(&model->residency_mutex);
    return ok;
}

// Memory for neurons from disk is for those that the GPU does not have.
static void leave_out(struct tsffn_model * model, const struct tsffn_hybrid * hybrid) {
    for (int64_t i = 0; model->cache != NULL && i < model->n_layer; ++i) {
        for (int64_t e = 0; e < tsffn_model_ffns_per_layer(model); ++e) {
            tsffn_neuron_cache_leave_out(model->cache, i, e, tsffn_hybrid_neurons(hybrid, i, e));
        }
    }
}

// With the mutex held. The GPU takes nothing any more where it fails.
static bool upload_layer(struct tsffn_model * model, struct tsffn_loaded * loaded, char * error, size_t error_size) {
    while (tsffn_hybrid_layer_bytes(loaded->uploading, loaded->n_uploaded) == 0 &&
           loaded->n_uploaded + 1 < model->n_layer) {
        loaded->n_uploaded += 1;
    }
    const int64_t layer = loaded->n_uploaded;
    if (model->cache != NULL) {
        tsffn_neuron_cache_begin(model->cache, layer, 0);
    }
    bool ok = tsffn_hybrid_upload(loaded->uploading, layer, error, error_size);
    if (model->cache != NULL) {
        struct tsffn_cache_counts reads;
        ok = tsffn_neuron_cache_end(model->cache, &reads, error, error_size) && ok;
    }
    loaded->copied += ok ? tsffn_hybrid_layer_bytes(loaded->uploading, layer) : 0;
    loaded->n_uploaded += 1;
    if (!ok) {
        tsffn_hybrid_free(loaded->uploading);
        loaded->uploading = NULL;
    } else if (loaded->copied == loaded->bytes) { // layers that are left have no share
        leave_out(model, loaded->uploading);
        atomic_store_explicit(&loaded->hybrid, loaded->uploading, memory_order_release);
        loaded->uploading = NULL;
    }
    return ok;
}

bool tsffn_model_gpu_upload(struct tsffn_model * model, uint64_t * copied, uint64_t * bytes, char * error,
                            size_t error_size) {
    if (model == NULL || copied == NULL || bytes == NULL) {
        return tsffn_fail(error, error_size, "no model is opened");
    }
    pthread_mutex_lock(&model->residency_mutex);
    struct tsffn_loaded * loaded = model->load.loaded;
    bool ok = loaded != NULL && (loaded->uploading != NULL || atomic_load(&loaded->hybrid) != NULL);
    if (!ok) {
        tsffn_fail(error, error_size, "%s: no GPU has a share of it", model->path);
    } else if (loaded->uploading != NULL) {
        ok = upload_layer(model, loaded, error, error_size);
    }
    *copied = ok ? loaded->copied : 0;
    *bytes = ok ? loaded->bytes : 0;
    pthread_mutex_unlock(&model->residency_mutex);
    return ok;
}
