// Opening, sharing and closing of a model.
#include "model.h"

#include "../cache/neuron_cache.h"
#include "../ffn/topk.h"
#include "sidecar.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

// llama.cpp loads a model in the thread that asked for it: what one thread arms, loads of others never see.
static _Thread_local struct tsffn_model * armed_by_thread;
static _Atomic(struct tsffn_model *) armed_for_process;

// Predictors may be made for a model that was converted without any.
static bool resolve_sparsity(const struct tsffn_identity * id, const char * model_path, const char * sidecar_path,
                             struct tsffn_model * model, char * error, size_t error_size) {
    const bool has_predictor =
        strcmp(id->predictor_kind, "none") != 0 || sidecar_path != NULL || tsffn_has_sidecar_beside(model_path);
    if (model->sparsity.kind == TSFFN_SPARSITY_PREDICTOR && !has_predictor) {
        return tsffn_fail(
            error, error_size,
            "%s: the model has no predictor; run with exact sparsity, or convert with --predictor, or make one "
            "with tsconv predictor",
            model_path);
    }
    if (model->sparsity.kind == TSFFN_SPARSITY_DEFAULT) {
        tsffn_parse_sparsity("", has_predictor ? "predictor" : "exact", &model->sparsity, error, error_size);
    }
    if (model->sparsity.kind == TSFFN_SPARSITY_TOPK) {
        model->keep = tsffn_topk_kept(model->sparsity.value, model->n_ff);
    }
    return true;
}

static bool allocate(struct tsffn_model * model, char * error, size_t error_size) {
    const size_t n_layer = (size_t)model->n_layer;
    model->predictors = calloc(n_layer * (size_t)tsffn_model_ffns_per_layer(model), sizeof(*model->predictors));
    model->pred_scale = calloc(n_layer, sizeof(*model->pred_scale));
    model->threshold = calloc(n_layer, sizeof(*model->threshold));
    model->stats = calloc(n_layer, sizeof(*model->stats));
    model->load.claimed = calloc(n_layer * TSFFN_N_PARTS, sizeof(*model->load.claimed));
    if (model->predictors == NULL || model->pred_scale == NULL || model->threshold == NULL || model->stats == NULL ||
        model->load.claimed == NULL) {
        return tsffn_fail(error, error_size, "out of memory");
    }
    return true;
}

struct tsffn_model * tsffn_model_open(const char * model_path, const char * sidecar_path, const char * sparsity,
                                      char * error, size_t error_size) {
    struct tsffn_sparsity asked;
    if (!tsffn_check_abi(error, error_size) || !tsffn_parse_sparsity("sparsity", sparsity, &asked, error, error_size)) {
        return NULL;
    }
    const struct tsffn_device * device = tsffn_device(error, error_size);
    if (device == NULL) {
        return NULL;
    }
    struct tsffn_model * model = calloc(1, sizeof(*model));
    if (model == NULL) {
        tsffn_fail(error, error_size, "out of memory");
        return NULL;
    }
    model->fd = model->sidecar_fd = -1;
    model->computes = device;
    model->sparsity = asked;
    model->activation = tsffn_activation(TSFFN_ACTIVATION_DRELU, 0.0f);
    model->load.is_ours = true;
    atomic_init(&model->references, 1);
    pthread_mutex_init(&model->residency_mutex, NULL);
    pthread_mutex_init(&model->stats_mutex, NULL);
    pthread_mutex_init(&model->profile_mutex, NULL);

    struct tsffn_gguf file;
    struct tsffn_identity id;
    bool ok = tsffn_gguf_open(&file, model_path, error, error_size);
    if (ok) {
        model->device = file.device;
        model->inode = file.inode;
        model->file_bytes = file.file_size;
        model->path = strdup(model_path);
        ok = model->path != NULL || tsffn_fail(error, error_size, "out of memory");
        ok = ok && tsffn_read_model_file(&file, model, &id) && allocate(model, error, error_size) &&
             resolve_sparsity(&id, model_path, sidecar_path, model, error, error_size);
        model->fd = tsffn_gguf_take_fd(&file);
        tsffn_gguf_close(&file);
    }
    if (ok && model->sparsity.kind == TSFFN_SPARSITY_PREDICTOR) {
        ok = tsffn_load_sidecar(model, model_path, sidecar_path, &id, error, error_size);
        for (int64_t layer = 0; ok && layer < model->n_layer; ++layer) {
            model->threshold[layer] += (float)model->sparsity.value;
        }
    }
    if (!ok) {
        tsffn_model_close(model);
        return NULL;
    }
    return model;
}

struct tsffn_model * tsffn_model_retain(struct tsffn_model * model) {
    if (model != NULL) {
        atomic_fetch_add(&model->references, 1);
    }
    return model;
}

void tsffn_model_close(struct tsffn_model * model) {
    if (model == NULL || atomic_fetch_sub(&model->references, 1) != 1) {
        return;
    }
    tsffn_neuron_cache_free(model->cache);
    if (model->sidecar != NULL) {
        munmap(model->sidecar, model->sidecar_size);
    }
    if (model->sidecar_fd >= 0) {
        close(model->sidecar_fd);
    }
    if (model->fd >= 0) {
        close(model->fd);
    }
    pthread_mutex_destroy(&model->residency_mutex);
    pthread_mutex_destroy(&model->stats_mutex);
    pthread_mutex_destroy(&model->profile_mutex);
    free(model->path);
    free(model->ffn_offset);
    free(model->ffn_row_bytes);
    free(model->load.claimed);
    free(model->predictors);
    free(model->pred_scale);
    free(model->threshold);
    free(model->stats);
    free(model->profile);
    free(model);
}

void tsffn_model_arm(struct tsffn_model * model) {
    struct tsffn_model * before = armed_by_thread;
    armed_by_thread = tsffn_model_retain(model);
    tsffn_model_close(before);
}

void tsffn_model_arm_for_process(struct tsffn_model * model) {
    model->armed_for_process = true;
    tsffn_model_close(atomic_exchange(&armed_for_process, tsffn_model_retain(model)));
}

struct tsffn_model * tsffn_model_armed(void) {
    return armed_by_thread != NULL ? armed_by_thread : atomic_load(&armed_for_process);
}

uint64_t tsffn_model_file_bytes(const struct tsffn_model * model) {
    return model != NULL ? model->file_bytes : 0;
}

const char * tsffn_model_sparsity(const struct tsffn_model * model) {
    return model != NULL ? model->sparsity.text : NULL;
}

int32_t tsffn_model_n_layer(const struct tsffn_model * model) {
    return model != NULL ? (int32_t)model->n_layer : 0;
}
