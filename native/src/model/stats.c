// The counters of a model, which several contexts may add to at once.
#include "../cache/neuron_cache.h"
#include "../hybrid/hybrid.h"
#include "model.h"

#include <string.h>

// With the mutex.
static void add_counts(struct tsffn_layer_stats * stats, const struct tsffn_counts * counts) {
    stats->neurons += counts->neurons;
    stats->predicted += counts->predicted;
    stats->gate_positive += counts->gate_positive;
    stats->active += counts->active;
    stats->bytes_predictor += counts->bytes_predictor;
    stats->bytes_ffn += counts->bytes_ffn;
    stats->bytes_dense += counts->bytes_dense;
    stats->ns_predictor += counts->ns_predictor;
    stats->ns_ffn += counts->ns_ffn;
}

void tsffn_model_count(struct tsffn_model * model, int64_t layer, int64_t rows, uint64_t ns_attention,
                       const struct tsffn_counts * counts) {
    pthread_mutex_lock(&model->stats_mutex);
    struct tsffn_layer_stats * stats = &model->stats[layer];
    stats->calls += 1;
    stats->rows += (uint64_t)rows;
    add_counts(stats, counts);
    stats->ns_attention += ns_attention;
    pthread_mutex_unlock(&model->stats_mutex);
}

void tsffn_model_count_reads(struct tsffn_model * model, int64_t layer, const struct tsffn_cache_counts * counts) {
    pthread_mutex_lock(&model->stats_mutex);
    struct tsffn_layer_stats * stats = &model->stats[layer];
    stats->needed += counts->needed;
    stats->missing += counts->missing;
    stats->ahead += counts->ahead;
    stats->in_vain += counts->in_vain;
    stats->reads += counts->reads;
    stats->bytes_disk += counts->bytes;
    stats->ns_disk += counts->ns;
    pthread_mutex_unlock(&model->stats_mutex);
}

void tsffn_model_count_late(void * context, int64_t layer, const struct tsffn_counts * counts,
                            const struct tsffn_hybrid_counts * gpu) {
    struct tsffn_model * model = context;
    pthread_mutex_lock(&model->stats_mutex);
    add_counts(&model->stats[layer], counts);
    pthread_mutex_unlock(&model->stats_mutex);
    tsffn_model_count_gpu(model, layer, gpu);
}

void tsffn_model_count_gpu(struct tsffn_model * model, int64_t layer, const struct tsffn_hybrid_counts * counts) {
    pthread_mutex_lock(&model->stats_mutex);
    struct tsffn_layer_stats * stats = &model->stats[layer];
    stats->gpu_calls += 1;
    stats->gpu_neurons += counts->neurons;
    stats->gpu_active += counts->active;
    stats->gpu_bytes += counts->bytes;
    stats->gpu_streamed += counts->bytes_streamed;
    stats->ns_gpu += counts->ns_gpu;
    stats->ns_gpu_predictor += counts->ns_predictor;
    stats->ns_gpu_wait += counts->ns_waiting;
    pthread_mutex_unlock(&model->stats_mutex);
}

void tsffn_model_count_single(struct tsffn_model * model, int64_t layer) {
    pthread_mutex_lock(&model->stats_mutex);
    model->stats[layer].single_ops += 1;
    pthread_mutex_unlock(&model->stats_mutex);
}

bool tsffn_model_stats(const struct tsffn_model * model, int32_t layer, struct tsffn_layer_stats * stats) {
    if (model == NULL || stats == NULL || layer < 0 || layer >= model->n_layer) {
        return false;
    }
    pthread_mutex_t * mutex = (pthread_mutex_t *)&model->stats_mutex;
    pthread_mutex_lock(mutex);
    *stats = model->stats[layer];
    pthread_mutex_unlock(mutex);
    return true;
}

void tsffn_model_reset_stats(struct tsffn_model * model) {
    if (model == NULL) {
        return;
    }
    pthread_mutex_lock(&model->stats_mutex);
    memset(model->stats, 0, (size_t)model->n_layer * sizeof(*model->stats));
    pthread_mutex_unlock(&model->stats_mutex);
}
