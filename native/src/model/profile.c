// Activation statistics of a model: one struct tsffn_profile per layer, over one block of memory. And who is told of
// activations.
#include "model.h"

#include <stdlib.h>
#include <string.h>

_Static_assert(TSFFN_N_COUNTS == TSFFN_PROFILE_COUNTS && TSFFN_N_HISTOGRAMS == TSFFN_PROFILE_HISTOGRAMS &&
                   TSFFN_N_BINS == TSFFN_PROFILE_BINS && TSFFN_N_SQUARES == TSFFN_PROFILE_SQUARES,
               "the public limits are those of the computation");

enum { HISTOGRAM_VALUES = TSFFN_PROFILE_HISTOGRAMS * TSFFN_PROFILE_BINS };

_Static_assert(sizeof(double) == sizeof(uint64_t), "one block has both");

static size_t neurons_of_layer(const struct tsffn_model * model) {
    return (size_t)tsffn_model_ffns_per_layer(model) * (size_t)model->n_ff;
}

static size_t neuron_values(const struct tsffn_model * model) {
    return TSFFN_PROFILE_COUNTS * neurons_of_layer(model);
}

static size_t square_values(const struct tsffn_model * model) {
    return TSFFN_PROFILE_SQUARES * neurons_of_layer(model);
}

bool tsffn_model_profile(struct tsffn_model * model, bool on) {
    if (model == NULL || (on && model->sparsity.kind == TSFFN_SPARSITY_TOPK)) {
        return false;
    }
    const size_t n_ffns = (size_t)tsffn_model_ffns_per_layer(model);
    const size_t per_layer = n_ffns + neuron_values(model) + HISTOGRAM_VALUES + square_values(model);
    uint64_t * values = on ? calloc((size_t)model->n_layer * per_layer, sizeof(*values)) : NULL;
    if (on && values == NULL) {
        return false;
    }
    pthread_mutex_lock(&model->profile_mutex);
    free(model->profile);
    model->profile = values;
    model->profile_per_layer = per_layer;
    pthread_mutex_unlock(&model->profile_mutex);
    return true;
}

bool tsffn_model_record(struct tsffn_model * model, int32_t first, int32_t end, tsffn_record_fn record, void * user) {
    if (model == NULL || (record != NULL && (first < 0 || first >= end || end > model->n_layer))) {
        return false;
    }
    model->recording.first = first;
    model->recording.end = end;
    model->recording.record = record;
    model->recording.user = user;
    return true;
}

bool tsffn_model_lock_profile(struct tsffn_model * model, int64_t layer, struct tsffn_profile * profile) {
    pthread_mutex_lock(&model->profile_mutex);
    if (model->profile == NULL) {
        pthread_mutex_unlock(&model->profile_mutex);
        return false;
    }
    uint64_t * values = model->profile + (size_t)layer * model->profile_per_layer;
    profile->tokens = values;
    profile->neurons = values + tsffn_model_ffns_per_layer(model);
    profile->histograms = profile->neurons + neuron_values(model);
    profile->squares = (double *)(profile->histograms + HISTOGRAM_VALUES);
    return true;
}

void tsffn_model_unlock_profile(struct tsffn_model * model) {
    pthread_mutex_unlock(&model->profile_mutex);
}

bool tsffn_model_read_profile(const struct tsffn_model * model, int32_t layer, uint64_t * tokens, uint64_t * neurons,
                              uint64_t * histograms) {
    struct tsffn_profile profile;
    struct tsffn_model * locked = (struct tsffn_model *)model;
    if (model == NULL || tokens == NULL || neurons == NULL || histograms == NULL || layer < 0 ||
        layer >= model->n_layer || !tsffn_model_lock_profile(locked, layer, &profile)) {
        return false;
    }
    memcpy(tokens, profile.tokens, (size_t)tsffn_model_ffns_per_layer(model) * sizeof(*tokens));
    memcpy(neurons, profile.neurons, neuron_values(model) * sizeof(*neurons));
    memcpy(histograms, profile.histograms, HISTOGRAM_VALUES * sizeof(*histograms));
    tsffn_model_unlock_profile(locked);
    return true;
}

bool tsffn_model_read_squares(const struct tsffn_model * model, int32_t layer, double * squares) {
    struct tsffn_profile profile;
    struct tsffn_model * locked = (struct tsffn_model *)model;
    if (model == NULL || squares == NULL || layer < 0 || layer >= model->n_layer ||
        !tsffn_model_lock_profile(locked, layer, &profile)) {
        return false;
    }
    memcpy(squares, profile.squares, square_values(model) * sizeof(*squares));
    tsffn_model_unlock_profile(locked);
    return true;
}
