#include "state.h"

#include "../cuda/load.h"
#include "../error.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_TRIES = 12 }; // for memory, each with an eighth less

// ---- opening

static struct tsffn_cuda_sizes sizes_of(const struct tsffn_hybrid * h, int64_t n_layer) {
    const struct tsffn_layer * layers = h->layers;
    struct tsffn_cuda_sizes sizes = {
        .n_embd = layers[0].n_embd,
        .n_ff = layers[0].n_ff,
        .n_tokens = MAX_ROWS,
        .n_rows = MAX_ROWS,
        .n_ffns = layers[0].n_ffns,
    };
    for (int64_t i = 0; i < n_layer; ++i) {
        const size_t bytes = h->module->neuron_bytes(&layers[i]);
        sizes.neuron_bytes = bytes > sizes.neuron_bytes ? bytes : sizes.neuron_bytes;
        for (int64_t e = 0; e < layers[i].n_ffns; ++e) {
            const int64_t rank = layers[i].ffns[e].fc1.data != NULL ? layers[i].ffns[e].fc1.n_rows : 0;
            sizes.max_rank = rank > sizes.max_rank ? rank : sizes.max_rank;
        }
    }
    return sizes;
}

// Plans for `bytes` and takes them. False with a line in `error`; *too_much: less might be there.
static bool open_with(struct tsffn_hybrid * h, int device, int64_t n_layer, size_t bytes, const int32_t * hot,
                      struct tsffn_gpu_share * share, bool * too_much, char * error, size_t error_size) {
    const struct tsffn_cuda_sizes sizes = sizes_of(h, n_layer);
    size_t of_queues = h->module->queue_bytes(&sizes);
    *too_much = false;
    if (bytes < of_queues) {
        return tsffn_fail(error, error_size, "GPU memory: expected at least the %zu bytes that a call takes, found %zu",
                          of_queues, bytes);
    }
    of_queues += tsffn_prefill_choose(h, &sizes, bytes);
    if (!tsffn_plan_make(&h->plan, h->module, h->layers, n_layer, bytes - of_queues, hot, error, error_size)) {
        return false;
    }
    struct tsffn_cuda_info info;
    *too_much = true;
    h->cuda = h->module->open(device, h->plan.bytes, &info, error, error_size);
    memcpy(share->name, info.name, sizeof(share->name));
    share->capability = info.capability;
    h->queue = h->cuda != NULL ? h->module->open_queue(h->cuda, &sizes, error, error_size) : NULL;
    const bool prefills = h->queue != NULL && h->prefill.sizes.n_rows > 0;
    if (prefills) {
        h->prefill.queue = h->module->open_queue(h->cuda, &h->prefill.sizes, error, error_size);
    }
    if (h->queue != NULL && prefills == (h->prefill.queue != NULL)) {
        share->bytes = h->plan.bytes + of_queues;
        share->prefill_tokens = (int32_t)h->prefill.sizes.n_tokens;
        return true;
    }
    // Without free memory there is no device at all.
    *too_much = info.total_bytes != 0 && info.free_bytes < bytes + bytes / 8;
    h->module->close_queue(h->queue);
    h->queue = NULL;
    h->module->close(h->cuda);
    h->cuda = NULL;
    tsffn_plan_free(&h->plan);
    return false;
}

// What calls need of the host's memory.
static bool allocate(struct tsffn_hybrid * h, int64_t n_layer) {
    const size_t n_embd = (size_t)h->layers[0].n_embd, words = (size_t)tsffn_mask_words(h->layers[0].n_ff);
    const size_t n_rows = h->prefill.sizes.n_rows > MAX_ROWS ? (size_t)h->prefill.sizes.n_rows : MAX_ROWS;
    h->on_gpu = calloc((size_t)n_layer, sizeof(*h->on_gpu));
    h->others = calloc(n_rows * n_embd, sizeof(*h->others));
    h->expected = calloc(MAX_ROWS * n_embd, sizeof(*h->expected));
    h->compared = calloc((size_t)n_layer, sizeof(*h->compared));
    h->prefill_compared = calloc((size_t)n_layer, sizeof(*h->prefill_compared));
    h->masks = calloc(n_rows * words, sizeof(*h->masks));
    h->rows = calloc(n_rows, sizeof(*h->rows));
    return h->on_gpu != NULL && h->others != NULL && h->expected != NULL && h->compared != NULL &&
           h->prefill_compared != NULL && h->masks != NULL && h->rows != NULL;
}

static void count_share(const struct tsffn_hybrid * h, struct tsffn_gpu_share * share) {
    for (int64_t i = 0; i < h->plan.n_layer; ++i) {
        const struct tsffn_layer * layer = &h->layers[i];
        share->predictors += h->plan.predictor[i];
        share->n_predictors += tsffn_has_predictor(layer);
        share->n_neurons += (uint64_t)(layer->n_ffns * layer->n_ff);
        for (int64_t e = 0; e < layer->n_ffns; ++e) {
            share->neurons += (uint64_t)h->plan.range[i * layer->n_ffns + e].end;
        }
    }
}

struct tsffn_hybrid * tsffn_hybrid_open(int device, const struct tsffn_layer * layers, int64_t n_layer, size_t bytes,
                                        const int32_t * hot, struct tsffn_hybrid_counter counter,
                                        struct tsffn_gpu_share * share, char * error, size_t error_size) {
    *share = (struct tsffn_gpu_share){0};
    const struct tsffn_cuda_module * module = tsffn_cuda_module_in_use(error, error_size);
    if (module == NULL) {
        return NULL;
    }
    struct tsffn_hybrid * h = calloc(1, sizeof(*h));
    if (h == NULL) {
        tsffn_fail(error, error_size, "out of memory");
        return NULL;
    }
    h->module = module;
    h->layers = layers;
    h->counter = counter;
    pthread_mutex_init(&h->mutex, NULL);
    bool opened = false, again = tsffn_prefill_read(&h->prefill, error, error_size);
    for (int k = 0; again && !opened && k < MAX_TRIES; ++k, bytes -= bytes / 8) {
        opened = open_with(h, device, n_layer, bytes, hot, share, &again, error, error_size);
    }
    if (opened && !allocate(h, n_layer)) {
        opened = tsffn_fail(error, error_size, "out of memory");
    }
    if (!opened) {
        tsffn_hybrid_free(h);
        return NULL;
    }
    count_share(h, share);
    return h;
}

void tsffn_hybrid_free(struct tsffn_hybrid * h) {
    if (h == NULL) {
        return;
    }
    h->module->close_queue(h->prefill.queue);
    h->module->close_queue(h->queue);
    for (int64_t i = 0; h->on_gpu != NULL && i < h->plan.n_layer; ++i) {
        h->module->release(h->on_gpu[i]);
    }
    h->module->close(h->cuda);
    tsffn_plan_free(&h->plan);
    pthread_mutex_destroy(&h->mutex);
    free(h->on_gpu);
    free(h->others);
    free(h->expected);
    free(h->compared);
    free(h->prefill_compared);
    free(h->masks);
    free(h->rows);
    free(h->prefill.x);
    free(h);
}

// ---- layers

static const struct tsffn_range * ranges_of(const struct tsffn_hybrid * h, int64_t layer) {
    return h->plan.range + layer * h->layers[layer].n_ffns;
}

int64_t tsffn_hybrid_neurons(const struct tsffn_hybrid * h, int64_t layer, int64_t ffn) {
    return ranges_of(h, layer)[ffn].end;
}

size_t tsffn_hybrid_layer_bytes(const struct tsffn_hybrid * h, int64_t layer) {
    return tsffn_plan_layer_bytes(&h->plan, h->module, h->layers, layer);
}

bool tsffn_hybrid_upload(struct tsffn_hybrid * h, int64_t layer, char * error, size_t error_size) {
    if (tsffn_hybrid_layer_bytes(h, layer) == 0) {
        return true;
    }
    h->on_gpu[layer] =
        h->module->upload(h->cuda, &h->layers[layer], ranges_of(h, layer), h->plan.predictor[layer], error, error_size);
    return h->on_gpu[layer] != NULL;
}
