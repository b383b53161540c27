// Opening of a model file and its sidecar. docs/format.md is the specification that is checked here.
#include "model.h"

#include "gguf_file.h"
#include "llama_keys.h"
#include "row_types.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { NAME_SIZE = 96 }; // "blk.N.ffn_pred_fc1.E.weight" with any int64

static _Atomic(struct tsffn_model *) armed_model;

// One of the hyper-parameters both files carry, within its limit.
static bool read_dimension(const struct tsffn_gguf * file, const char * key, uint32_t limit, int64_t * value) {
    uint32_t found;
    if (!tsffn_gguf_u32(file, key, &found)) {
        return false;
    }
    if (found == 0 || found > limit) {
        return tsffn_fail(file->error, file->error_size, "%s: key %s: expected 1 to %u, found %u", file->path, key,
                          limit, found);
    }
    *value = found;
    return true;
}

static bool check_format(const struct tsffn_gguf * file) {
    const char * architecture;
    if (!tsffn_gguf_string(file, "general.architecture", &architecture)) {
        return false;
    }
    if (strcmp(architecture, "turbosparse") != 0) {
        return tsffn_fail(
            file->error, file->error_size,
            "%s: not a tsconv model: expected general.architecture 'turbosparse', found '%s'; convert the "
            "checkpoint with tsconv convert",
            file->path, architecture);
    }
    uint32_t version;
    if (!tsffn_gguf_u32(file, "turbosparse.format_version", &version)) {
        return false;
    }
    if (version != TSFFN_FORMAT_VERSION) {
        return tsffn_fail(
            file->error, file->error_size,
            "%s: unknown format version: expected %d, found %u; install the tsconv that wrote the file, or "
            "convert again",
            file->path, TSFFN_FORMAT_VERSION, version);
    }
    return true;
}

static bool read_shape(const struct tsffn_gguf * file, struct tsffn_model * model) {
    uint32_t n_expert;
    if (!read_dimension(file, "llama.block_count", TSFFN_MAX_LAYERS, &model->n_layer) ||
        !read_dimension(file, "llama.embedding_length", TSFFN_MAX_DIM, &model->n_embd) ||
        !read_dimension(file, "llama.feed_forward_length", TSFFN_MAX_DIM, &model->n_ff) ||
        !tsffn_gguf_optional_u32(file, "llama.expert_count", &n_expert)) {
        return false;
    }
    if (n_expert > TSFFN_MAX_EXPERTS) {
        return tsffn_fail(file->error, file->error_size, "%s: key llama.expert_count: expected at most %d, found %u",
                          file->path, TSFFN_MAX_EXPERTS, n_expert);
    }
    model->n_expert = n_expert;
    return true;
}

// A type this library multiplies with, in rows of n_cols weights.
static bool check_type(const struct tsffn_gguf * file, const char * name, enum ggml_type type, int64_t n_cols) {
    const struct tsffn_row_type * row = tsffn_row_type_for(type);
    if (row == NULL) {
        return tsffn_fail(file->error, file->error_size,
                          "%s: %s: type %s cannot be computed by this ggml; convert with another --outtype", file->path,
                          name, ggml_type_name(type));
    }
    if (n_cols % row->block_size != 0) {
        return tsffn_fail(file->error, file->error_size,
                          "%s: %s: type %s needs rows of a multiple of %" PRId64 " weights, found %" PRId64
                          "; convert with another --tensor-type for it",
                          file->path, name, row->name, row->block_size, n_cols);
    }
    return true;
}

static bool check_ffn_tensors(const struct tsffn_gguf * file, const struct tsffn_model * model) {
    static const char * const parts[] = {"gate", "up", "down"};
    const char * suffix = model->n_expert > 0 ? "_exps" : "";
    const int64_t n_expert = tsffn_model_ffns_per_layer(model);
    for (int64_t layer = 0; layer < model->n_layer; ++layer) {
        for (int part = 0; part < 3; ++part) {
            char name[NAME_SIZE];
            snprintf(name, sizeof(name), "blk.%" PRId64 ".ffn_%s%s.weight", layer, parts[part], suffix);
            const bool is_down = part == 2;
            struct tsffn_gguf_tensor tensor;
            if (!tsffn_gguf_tensor(file, name, is_down ? model->n_ff : model->n_embd,
                                   is_down ? model->n_embd : model->n_ff, n_expert, &tensor) ||
                !check_type(file, name, tensor.type, model->n_embd)) {
                return false;
            }
        }
    }
    return true;
}

// Opens the model file, fills the shape, and says which pair it belongs to (`pair_id`, 33 bytes, and `order`).
struct identity {
    char pair_id[64];
    char order[64];
    char predictor_kind[64];
};

static bool copy_string(const struct tsffn_gguf * file, const char * key, char * out, size_t size) {
    const char * value;
    if (!tsffn_gguf_string(file, key, &value)) {
        return false;
    }
    if (strlen(value) >= size) {
        return tsffn_fail(file->error, file->error_size, "%s: key %s: expected at most %zu characters, found %zu",
                          file->path, key, size - 1, strlen(value));
    }
    strcpy(out, value);
    return true;
}

static bool read_model_file(const struct tsffn_gguf * file, struct tsffn_model * model, struct identity * id) {
    if (!check_format(file)) {
        return false;
    }
    const int64_t type = gguf_find_key(file->ctx, "general.type");
    if (type >= 0 && gguf_get_kv_type(file->ctx, type) == GGUF_TYPE_STRING &&
        strcmp(gguf_get_val_str(file->ctx, type), "predictor") == 0) {
        return tsffn_fail(
            file->error, file->error_size,
            "%s: is a predictor sidecar: expected the model; name NAME.gguf, its sidecar is found by itself",
            file->path);
    }
    return tsffn_gguf_expect(file, "turbosparse.activation", "drelu") &&
           tsffn_gguf_expect(file, "turbosparse.ffn_down.layout", "neuron_major") &&
           copy_string(file, "turbosparse.pair_id", id->pair_id, sizeof(id->pair_id)) &&
           copy_string(file, "turbosparse.neuron_order", id->order, sizeof(id->order)) &&
           copy_string(file, "turbosparse.predictor.kind", id->predictor_kind, sizeof(id->predictor_kind)) &&
           read_shape(file, model) && check_ffn_tensors(file, model) && tsffn_check_llama_keys(file, model->n_expert);
}

// Refuses a model where its sidecar should be, with more help than the key's value gives.
static bool check_is_sidecar(const struct tsffn_gguf * file, const char * model_path) {
    const char * type;
    if (!tsffn_gguf_string(file, "general.type", &type)) {
        return false;
    }
    if (strcmp(type, "model") == 0) {
        return tsffn_fail(
            file->error, file->error_size,
            "%s: is a model: expected its predictor sidecar; use the NAME.predictor.gguf that was written "
            "with %s",
            file->path, model_path);
    }
    return tsffn_gguf_expect(file, "general.type", "predictor");
}

static bool check_pair(const struct tsffn_gguf * sidecar, const char * model_path, const struct tsffn_model * model,
                       const struct identity * id) {
    struct identity own;
    struct tsffn_model shape;
    memset(&shape, 0, sizeof(shape));
    if (!check_format(sidecar) || !check_is_sidecar(sidecar, model_path) ||
        !copy_string(sidecar, "turbosparse.pair_id", own.pair_id, sizeof(own.pair_id)) ||
        !copy_string(sidecar, "turbosparse.neuron_order", own.order, sizeof(own.order)) ||
        !read_shape(sidecar, &shape)) {
        return false;
    }
    if (strcmp(own.pair_id, id->pair_id) != 0) {
        return tsffn_fail(
            sidecar->error, sidecar->error_size,
            "%s: is the sidecar of another model than %s: expected pair_id %s, found %s; use the two files "
            "that one conversion wrote",
            sidecar->path, model_path, id->pair_id, own.pair_id);
    }
    if (strcmp(own.order, id->order) != 0) {
        return tsffn_fail(sidecar->error, sidecar->error_size,
                          "%s: other neuron order than %s: expected %s, found %s; reorder both files together",
                          sidecar->path, model_path, id->order, own.order);
    }
    if (shape.n_layer != model->n_layer || shape.n_embd != model->n_embd || shape.n_ff != model->n_ff ||
        shape.n_expert != model->n_expert) {
        return tsffn_fail(sidecar->error, sidecar->error_size,
                          "%s: other shape than %s: expected %" PRId64 " layers, n_embd %" PRId64 ", n_ff %" PRId64
                          ", %" PRId64 " experts, found %" PRId64 ", %" PRId64 ", %" PRId64 ", %" PRId64
                          "; convert again",
                          sidecar->path, model_path, model->n_layer, model->n_embd, model->n_ff, model->n_expert,
                          shape.n_layer, shape.n_embd, shape.n_ff, shape.n_expert);
    }
    return true;
}

// Thresholds, comparison and what the predictor is fed with.
static bool read_decision(const struct tsffn_gguf * file, struct tsffn_model * model, bool * pre_norm) {
    const char * input;
    const char * comparison;
    const void * threshold;
    if (!tsffn_gguf_string(file, "turbosparse.predictor.input", &input) ||
        !tsffn_gguf_string(file, "turbosparse.predictor.comparison", &comparison) ||
        !tsffn_gguf_array(file, "turbosparse.predictor.threshold", GGUF_TYPE_FLOAT32, (size_t)model->n_layer,
                          &threshold)) {
        return false;
    }
    *pre_norm = strcmp(input, "pre_norm") == 0;
    if (!*pre_norm && strcmp(input, "normed") != 0) {
        return tsffn_fail(file->error, file->error_size,
                          "%s: key turbosparse.predictor.input: expected 'pre_norm' or 'normed', found '%s'",
                          file->path, input);
    }
    model->on_when_equal = strcmp(comparison, "ge") == 0;
    if (!model->on_when_equal && strcmp(comparison, "gt") != 0) {
        return tsffn_fail(file->error, file->error_size,
                          "%s: key turbosparse.predictor.comparison: expected 'gt' or 'ge', found '%s'", file->path,
                          comparison);
    }
    memcpy(model->threshold, threshold, (size_t)model->n_layer * sizeof(float));
    for (int64_t layer = 0; *pre_norm && layer < model->n_layer; ++layer) {
        if (model->threshold[layer] != 0.0f) {
            return tsffn_fail(
                file->error, file->error_size,
                "%s: key turbosparse.predictor.threshold: expected 0 in every layer, because only the sign "
                "of a pre-norm predictor survives the norm, found %g in layer %" PRId64,
                file->path, (double)model->threshold[layer], layer);
        }
    }
    return true;
}

static bool map_matrix(const struct tsffn_gguf * file, const struct tsffn_model * model, const char * name,
                       int64_t n_cols, int64_t n_rows, struct tsffn_matrix * matrix) {
    struct tsffn_gguf_tensor tensor;
    if (!tsffn_gguf_tensor(file, name, n_cols, n_rows, 1, &tensor) || !check_type(file, name, tensor.type, n_cols)) {
        return false;
    }
    *matrix = (struct tsffn_matrix){
        .type = tsffn_row_type_for(tensor.type),
        .data = (const uint8_t *)model->sidecar + tensor.offset,
        .n_rows = n_rows,
        .n_cols = n_cols,
    };
    return true;
}

static bool read_predictors(const struct tsffn_gguf * file, struct tsffn_model * model) {
    bool pre_norm;
    const void * ranks;
    if (!read_decision(file, model, &pre_norm) ||
        !tsffn_gguf_array(file, "turbosparse.predictor.rank", GGUF_TYPE_INT32, (size_t)model->n_layer, &ranks)) {
        return false;
    }
    const int64_t n_ffns = tsffn_model_ffns_per_layer(model);
    const int64_t n_expected = model->n_layer * (2 * n_ffns + (pre_norm ? 1 : 0));
    if (gguf_get_n_tensors(file->ctx) != n_expected) {
        return tsffn_fail(file->error, file->error_size,
                          "%s: wrong number of tensors: expected %" PRId64 ", found %" PRId64 "; convert again",
                          file->path, n_expected, gguf_get_n_tensors(file->ctx));
    }
    for (int64_t layer = 0; layer < model->n_layer; ++layer) {
        const int64_t rank = ((const int32_t *)ranks)[layer];
        if (rank < 1 || rank > TSFFN_MAX_DIM) {
            return tsffn_fail(file->error, file->error_size,
                              "%s: key turbosparse.predictor.rank: expected 1 to %d, found %" PRId64
                              " in layer %" PRId64,
                              file->path, TSFFN_MAX_DIM, rank, layer);
        }
        char name[NAME_SIZE];
        if (pre_norm) {
            struct tsffn_matrix scale;
            snprintf(name, sizeof(name), "blk.%" PRId64 ".ffn_pred_scale.weight", layer);
            if (!map_matrix(file, model, name, model->n_embd, 1, &scale)) {
                return false;
            }
            if (scale.type != tsffn_row_type_for(GGML_TYPE_F32)) {
                return tsffn_fail(file->error, file->error_size, "%s: %s: wrong type: expected f32, found %s",
                                  file->path, name, scale.type->name);
            }
            model->pred_scale[layer] = (const float *)scale.data;
        }
        for (int64_t e = 0; e < n_ffns; ++e) {
            struct tsffn_predictor * predictor = &model->predictors[layer * n_ffns + e];
            char expert[24] = "";
            if (model->n_expert > 0) {
                snprintf(expert, sizeof(expert), ".%" PRId64, e);
            }
            snprintf(name, sizeof(name), "blk.%" PRId64 ".ffn_pred_fc1%s.weight", layer, expert);
            if (!map_matrix(file, model, name, model->n_embd, rank, &predictor->fc1)) {
                return false;
            }
            snprintf(name, sizeof(name), "blk.%" PRId64 ".ffn_pred_fc2%s.weight", layer, expert);
            if (!map_matrix(file, model, name, rank, model->n_ff, &predictor->fc2)) {
                return false;
            }
        }
    }
    return true;
}

static bool map_sidecar(const struct tsffn_gguf * file, struct tsffn_model * model) {
    const int fd = open(file->path, O_RDONLY | O_CLOEXEC);
    void * memory = fd >= 0 ? mmap(NULL, file->file_size, PROT_READ, MAP_SHARED, fd, 0) : MAP_FAILED;
    const int reason = errno;
    if (fd >= 0) {
        close(fd);
    }
    if (memory == MAP_FAILED) {
        return tsffn_fail(file->error, file->error_size, "%s: cannot be mapped: %s", file->path, strerror(reason));
    }
    model->sidecar = memory;
    model->sidecar_size = file->file_size;
    return true;
}

// NAME.predictor.gguf beside NAME.gguf.
static bool default_sidecar_path(const char * model_path, char * out, size_t size) {
    const char suffix[] = ".gguf";
    const size_t length = strlen(model_path);
    const size_t stem = length >= strlen(suffix) && strcmp(model_path + length - strlen(suffix), suffix) == 0
                            ? length - strlen(suffix)
                            : length;
    return snprintf(out, size, "%.*s.predictor.gguf", (int)stem, model_path) < (int)size;
}

static bool load_sidecar(struct tsffn_model * model, const char * model_path, const char * sidecar_path,
                         const struct identity * id, char * error, size_t error_size) {
    char beside[PATH_MAX];
    if (sidecar_path == NULL) {
        if (!default_sidecar_path(model_path, beside, sizeof(beside))) {
            return tsffn_fail(error, error_size, "%s: the path is too long", model_path);
        }
        if (access(beside, F_OK) != 0) {
            return tsffn_fail(
                error, error_size,
                "%s: the predictor sidecar is missing: expected it beside %s; put it there, name it, or run "
                "with exact sparsity",
                beside, model_path);
        }
        sidecar_path = beside;
    }
    struct tsffn_gguf file;
    if (!tsffn_gguf_open(&file, sidecar_path, error, error_size)) {
        return false;
    }
    const bool ok =
        check_pair(&file, model_path, model, id) && map_sidecar(&file, model) && read_predictors(&file, model);
    tsffn_gguf_close(&file);
    return ok;
}

static bool resolve_sparsity(enum tsffn_sparsity asked, const struct identity * id, const char * model_path,
                             struct tsffn_model * model, char * error, size_t error_size) {
    const bool has_predictor = strcmp(id->predictor_kind, "none") != 0;
    if (asked == TSFFN_SPARSITY_PREDICTOR && !has_predictor) {
        return tsffn_fail(error, error_size,
                          "%s: the model has no predictor; run with exact sparsity, or convert with --predictor",
                          model_path);
    }
    const bool exact = asked == TSFFN_SPARSITY_EXACT || !has_predictor;
    model->sparsity = exact ? TSFFN_SPARSITY_EXACT : TSFFN_SPARSITY_PREDICTOR;
    return true;
}

static bool allocate(struct tsffn_model * model, char * error, size_t error_size) {
    const size_t n_layer = (size_t)model->n_layer;
    model->predictors = calloc(n_layer * (size_t)tsffn_model_ffns_per_layer(model), sizeof(*model->predictors));
    model->pred_scale = calloc(n_layer, sizeof(*model->pred_scale));
    model->threshold = calloc(n_layer, sizeof(*model->threshold));
    model->stats = calloc(n_layer, sizeof(*model->stats));
    if (model->predictors == NULL || model->pred_scale == NULL || model->threshold == NULL || model->stats == NULL) {
        return tsffn_fail(error, error_size, "out of memory");
    }
    return true;
}

struct tsffn_model * tsffn_model_open(const char * model_path, const char * sidecar_path, enum tsffn_sparsity sparsity,
                                      char * error, size_t error_size) {
    if (!tsffn_check_abi(error, error_size)) {
        return NULL;
    }
    if (!tsffn_row_types_init()) {
        tsffn_fail(error, error_size, "libggml-tsffn.so: this ggml has no CPU backend: load it first");
        return NULL;
    }
    struct tsffn_model * model = calloc(1, sizeof(*model));
    if (model == NULL) {
        tsffn_fail(error, error_size, "out of memory");
        return NULL;
    }
    atomic_init(&model->references, 1);
    pthread_mutex_init(&model->stats_mutex, NULL);

    struct tsffn_gguf file;
    struct identity id;
    bool ok = tsffn_gguf_open(&file, model_path, error, error_size);
    if (ok) {
        model->device = file.device;
        model->inode = file.inode;
        ok = read_model_file(&file, model, &id) && allocate(model, error, error_size) &&
             resolve_sparsity(sparsity, &id, model_path, model, error, error_size);
        tsffn_gguf_close(&file);
    }
    if (ok && model->sparsity == TSFFN_SPARSITY_PREDICTOR) {
        ok = load_sidecar(model, model_path, sidecar_path, &id, error, error_size);
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
    if (model->sidecar != NULL) {
        munmap(model->sidecar, model->sidecar_size);
    }
    pthread_mutex_destroy(&model->stats_mutex);
    free(model->predictors);
    free(model->pred_scale);
    free(model->threshold);
    free(model->stats);
    free(model);
}

void tsffn_model_arm(struct tsffn_model * model) {
    tsffn_model_close(atomic_exchange(&armed_model, tsffn_model_retain(model)));
}

struct tsffn_model * tsffn_model_armed(void) {
    return atomic_load(&armed_model);
}

enum tsffn_sparsity tsffn_model_sparsity(const struct tsffn_model * model) {
    return model->sparsity;
}

int32_t tsffn_model_n_layer(const struct tsffn_model * model) {
    return (int32_t)model->n_layer;
}

void tsffn_model_count(struct tsffn_model * model, int64_t layer, int64_t rows, const struct tsffn_counts * counts) {
    pthread_mutex_lock(&model->stats_mutex);
    struct tsffn_layer_stats * stats = &model->stats[layer];
    stats->calls += 1;
    stats->rows += (uint64_t)rows;
    stats->neurons += counts->neurons;
    stats->predicted += counts->predicted;
    stats->gate_positive += counts->gate_positive;
    stats->active += counts->active;
    stats->bytes_predictor += counts->bytes_predictor;
    stats->bytes_ffn += counts->bytes_ffn;
    stats->bytes_dense += counts->bytes_dense;
    stats->ns_predictor += counts->ns_predictor;
    stats->ns_ffn += counts->ns_ffn;
    pthread_mutex_unlock(&model->stats_mutex);
}

void tsffn_model_count_single(struct tsffn_model * model, int64_t layer) {
    pthread_mutex_lock(&model->stats_mutex);
    model->stats[layer].single_ops += 1;
    pthread_mutex_unlock(&model->stats_mutex);
}

bool tsffn_model_stats(const struct tsffn_model * model, int32_t layer, struct tsffn_layer_stats * stats) {
    if (layer < 0 || layer >= model->n_layer) {
        return false;
    }
    pthread_mutex_t * mutex = (pthread_mutex_t *)&model->stats_mutex;
    pthread_mutex_lock(mutex);
    *stats = model->stats[layer];
    pthread_mutex_unlock(mutex);
    return true;
}

void tsffn_model_reset_stats(struct tsffn_model * model) {
    pthread_mutex_lock(&model->stats_mutex);
    memset(model->stats, 0, (size_t)model->n_layer * sizeof(*model->stats));
    pthread_mutex_unlock(&model->stats_mutex);
}
