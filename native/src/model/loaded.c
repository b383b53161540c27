#include "loaded.h"

#include "../cache/neuron_cache.h"
#include "../hybrid/hybrid.h"
#include "loaded_state.h"

#include <stdlib.h>
#include <string.h>

static void free_loaded(struct tsffn_loaded * loaded) {
    for (int64_t i = 0; loaded->prepared != NULL && i < loaded->model->n_layer; ++i) {
        void * prepared = atomic_load(&loaded->prepared[i]);
        if (prepared != NULL) {
            loaded->model->computes->release(prepared);
        }
    }
    tsffn_hybrid_free(loaded->uploading);
    tsffn_hybrid_free(atomic_load(&loaded->hybrid));
    pthread_mutex_destroy(&loaded->mutex);
    free(loaded->weights);
    free(loaded->data);
    free(loaded->layers);
    free(loaded->ffns);
    free(loaded->prepared);
    free(loaded);
}

static struct tsffn_loaded * new_loaded(struct tsffn_model * model) {
    struct tsffn_loaded * loaded = calloc(1, sizeof(*loaded));
    if (loaded == NULL) {
        return NULL;
    }
    const size_t n_layer = (size_t)model->n_layer;
    const int64_t n_ffns = tsffn_model_ffns_per_layer(model);
    loaded->model = model;
    pthread_mutex_init(&loaded->mutex, NULL);
    loaded->weights = calloc(n_layer * TSFFN_N_PARTS, sizeof(*loaded->weights));
    loaded->data = calloc(n_layer * TSFFN_N_PARTS, sizeof(*loaded->data));
    loaded->layers = calloc(n_layer, sizeof(*loaded->layers));
    loaded->ffns = calloc(n_layer * (size_t)n_ffns, sizeof(*loaded->ffns));
    loaded->prepared = calloc(n_layer, sizeof(*loaded->prepared));
    if (loaded->weights == NULL || loaded->data == NULL || loaded->layers == NULL || loaded->ffns == NULL ||
        loaded->prepared == NULL) {
        free_loaded(loaded);
        return NULL;
    }
    for (int64_t i = 0; i < model->n_layer; ++i) {
        struct tsffn_layer * layer = &loaded->layers[i];
        *layer = (struct tsffn_layer){
            .n_embd = model->n_embd,
            .n_ff = model->n_ff,
            .n_ffns = n_ffns,
            .ffns = loaded->ffns + i * n_ffns,
            .activation = model->activation,
            .form = model->form,
            .input_bits = model->input_bits,
            .pred_scale = model->pred_scale[i],
            .threshold = model->threshold[i],
            .on_when_equal = model->on_when_equal,
        };
        for (int64_t e = 0; e < n_ffns; ++e) {
            const struct tsffn_predictor * predictor = &model->predictors[i * n_ffns + e];
            layer->ffns[e].fc1 = predictor->fc1;
            layer->ffns[e].fc2 = predictor->fc2;
            layer->ffns[e].fc3 = predictor->fc3;
            layer->ffns[e].thresholds = predictor->thresholds;
        }
        for (int part = 0; part < TSFFN_N_PARTS; ++part) {
            loaded->weights[i * TSFFN_N_PARTS + part] =
                (struct tsffn_weight){.model = model, .layer = i, .part = (enum tsffn_part)part, .loaded = loaded};
        }
    }
    return loaded;
}

// Fills the rows of one part of a layer, whose tensor lies at `data`: an FFN after the other, or, in bundles, a piece
// of what is known when all three are.
static void set_rows(struct tsffn_loaded * loaded, const struct tsffn_weight * weight, int type, const uint8_t * data,
                     size_t row_bytes) {
    const struct tsffn_model * model = loaded->model;
    struct tsffn_layer * layer = &loaded->layers[weight->layer];
    layer->types[weight->part] = type;
    for (int64_t e = 0; e < layer->n_ffns; ++e) {
        if (model->cache != NULL) { // wherever the tensor lies, its rows come from the file
            layer->ffns[e].neurons = tsffn_neuron_cache_neurons(model->cache, weight->layer, e);
            continue;
        }
        const uint8_t * rows = model->bundled ? NULL : data + (size_t)(e * model->n_ff) * row_bytes;
        layer->ffns[e].neurons.rows[weight->part] = tsffn_rows_at(rows, model->n_ff, row_bytes);
    }
}

static void join_bundles(struct tsffn_loaded * loaded, int64_t layer) {
    const struct tsffn_model * model = loaded->model;
    const uint8_t ** data = loaded->data + layer * TSFFN_N_PARTS;
    for (int part = 0; part < TSFFN_N_PARTS; ++part) {
        if (data[part] == NULL) {
            return;
        }
    }
    const int64_t n_ffns = loaded->layers[layer].n_ffns;
    for (int64_t e = 0; e < n_ffns; ++e) {
        for (int part = 0; part < TSFFN_N_PARTS; ++part) {
            struct tsffn_rows * rows = &loaded->layers[layer].ffns[e].neurons.rows[part];
            memcpy(rows->pieces, data, sizeof(rows->pieces));
            rows->piece_rows = n_ffns * model->n_ff;
            rows->first = TSFFN_N_PARTS * e * model->n_ff + part;
            rows->step = TSFFN_N_PARTS;
        }
    }
}

// Gives a reference up; true when it was the last.
static bool drop(struct tsffn_loaded * loaded) {
    loaded->references -= 1;
    if (loaded->references == 0 && loaded->model->load.loaded == loaded) {
        loaded->model->load.loaded = NULL;
    }
    return loaded->references == 0;
}

const struct tsffn_weight * tsffn_loaded_add(const struct tsffn_weight * weight, int type, const void * data,
                                             size_t row_bytes, struct tsffn_loaded ** held) {
    struct tsffn_model * model = weight->model;
    const int64_t i = weight->layer * TSFFN_N_PARTS + (int64_t)weight->part;
    struct tsffn_loaded * unused = NULL;
    pthread_mutex_lock(&model->residency_mutex);
    struct tsffn_loaded * loaded = model->load.loaded;
    if (loaded == NULL || loaded->data[i] != NULL) {
        loaded = new_loaded(model);
        model->load.loaded = loaded;
    }
    if (loaded != NULL) {
        loaded->data[i] = data;
        set_rows(loaded, weight, type, data, row_bytes);
        if (model->bundled && model->cache == NULL) {
            join_bundles(loaded, weight->layer);
        }
        if (*held != loaded) {
            unused = *held != NULL && drop(*held) ? *held : NULL;
            loaded->references += 1;
            *held = loaded;
        }
    }
    pthread_mutex_unlock(&model->residency_mutex);
    if (unused != NULL) {
        free_loaded(unused);
    }
    return loaded != NULL ? &loaded->weights[i] : NULL;
}

void tsffn_loaded_release(struct tsffn_model * model, struct tsffn_loaded * loaded) {
    if (loaded == NULL) {
        return;
    }
    pthread_mutex_lock(&model->residency_mutex);
    const bool was_last = drop(loaded);
    pthread_mutex_unlock(&model->residency_mutex);
    if (was_last) {
        free_loaded(loaded);
    }
}

const void * tsffn_loaded_prepared(const struct tsffn_weight * weight) {
    struct tsffn_loaded * loaded = weight->loaded;
    void * prepared = atomic_load_explicit(&loaded->prepared[weight->layer], memory_order_acquire);
    if (prepared == NULL) {
        pthread_mutex_lock(&loaded->mutex);
        prepared = atomic_load(&loaded->prepared[weight->layer]);
        if (prepared == NULL) {
            prepared = loaded->model->computes->prepare(&loaded->layers[weight->layer]);
            atomic_store(&loaded->prepared[weight->layer], prepared);
        }
        pthread_mutex_unlock(&loaded->mutex);
    }
    return prepared;
}

bool tsffn_loaded_has(const struct tsffn_weight * weight, enum tsffn_part part) {
    const struct tsffn_rows * rows = &weight->loaded->layers[weight->layer].ffns[0].neurons.rows[part];
    return rows->pieces[0] != NULL || rows->table != NULL;
}
