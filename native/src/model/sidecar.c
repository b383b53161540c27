#define _DEFAULT_SOURCE // madvise
#include "sidecar.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

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
                       const struct tsffn_identity * id) {
    struct tsffn_identity own;
    struct tsffn_model shape;
    memset(&shape, 0, sizeof(shape));
    if (!tsffn_check_format(sidecar, TSFFN_SIDECAR_VERSION) || !check_is_sidecar(sidecar, model_path) ||
        !tsffn_read_pair_id(sidecar, &own) ||
        !tsffn_copy_string(sidecar, "turbosparse.neuron_order", own.order, sizeof(own.order)) ||
        !tsffn_read_shape(sidecar, &shape)) {
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
    for (int64_t layer = 0; layer < model->n_layer; ++layer) {
        if (!isfinite(model->threshold[layer])) {
            return tsffn_fail(file->error, file->error_size,
                              "%s: key turbosparse.predictor.threshold: expected a finite number in every layer, found "
                              "%g in layer %" PRId64 "; convert again",
                              file->path, (double)model->threshold[layer], layer);
        }
        if (*pre_norm && model->threshold[layer] != 0.0f) {
            return tsffn_fail(
                file->error, file->error_size,
                "%s: key turbosparse.predictor.threshold: expected 0 in every layer, because only the sign "
                "of a pre-norm predictor survives the norm, found %g in layer %" PRId64,
                file->path, (double)model->threshold[layer], layer);
        }
    }
    return true;
}

static struct tsffn_weights weights_at(const struct tsffn_model * model, uint64_t offset, int type, size_t row_bytes,
                                       int64_t n_cols, int64_t n_rows, enum tsffn_layout layout) {
    return (struct tsffn_weights){
        .type = type,
        .data = (const uint8_t *)model->sidecar + offset,
        .n_rows = n_rows,
        .n_cols = n_cols,
        .row_bytes = row_bytes,
        .layout = layout,
    };
}

// `layout` is that of the types that can be in panels.
static bool map_matrix(const struct tsffn_gguf * file, const struct tsffn_model * model, const char * name,
                       int64_t n_cols, int64_t n_rows, enum tsffn_layout layout, struct tsffn_weights * matrix) {
    struct tsffn_gguf_tensor tensor;
    if (!tsffn_gguf_tensor(file, name, n_cols, n_rows, 1, &tensor) ||
        !tsffn_check_type(file, model, name, tensor.type, n_cols)) {
        return false;
    }
    const bool takes_panels = tensor.type == GGML_TYPE_Q4_0 || tensor.type == GGML_TYPE_Q8_0;
    *matrix = weights_at(model, tensor.offset, (int)tensor.type, ggml_row_size(tensor.type, n_cols), n_cols, n_rows,
                         takes_panels ? layout : TSFFN_LAYOUT_ROWS);
    return true;
}

// Second matrices of Q3_NL, which is no ggml type, are tensors of bytes.
static bool is_q3_nl(const struct tsffn_gguf * file, const char * name) {
    const int64_t id = gguf_find_tensor(file->ctx, name);
    return id >= 0 && gguf_get_tensor_type(file->ctx, id) == GGML_TYPE_I8;
}

static bool map_q3_nl(const struct tsffn_gguf * file, const struct tsffn_model * model, const char * name,
                      int64_t n_cols, int64_t n_rows, enum tsffn_layout layout, struct tsffn_weights * matrix) {
    if (layout != TSFFN_LAYOUT_PANELS || n_cols % TSFFN_BLOCK_SIZE != 0 || n_cols > TSFFN_Q3_NL_MAX_COLUMNS ||
        n_rows % TSFFN_PANEL_ROWS != 0) {
        return tsffn_fail(file->error, file->error_size,
                          "%s: %s: q3_nl needs panels16, a rank that is a multiple of %d up to %d and an n_ff that is "
                          "a multiple of %d, found %s, %" PRId64 ", %" PRId64 "; convert again",
                          file->path, name, TSFFN_BLOCK_SIZE, TSFFN_Q3_NL_MAX_COLUMNS, TSFFN_PANEL_ROWS,
                          layout == TSFFN_LAYOUT_PANELS ? "panels16" : "rows", n_cols, n_rows);
    }
    uint32_t version;
    if (!tsffn_gguf_u32(file, "turbosparse.format_version", &version)) {
        return false;
    }
    if (version < TSFFN_Q3_NL_VERSION) {
        return tsffn_fail(file->error, file->error_size,
                          "%s: %s: q3_nl needs format version %d, found %u; convert again", file->path, name,
                          TSFFN_Q3_NL_VERSION, version);
    }
    const size_t row_bytes = TSFFN_Q3_NL_HEADER + (size_t)n_cols / TSFFN_BLOCK_SIZE * TSFFN_Q3_NL_BYTES;
    struct tsffn_gguf_tensor tensor;
    if (!model->computes->supports(TSFFN_TYPE_Q3_NL)) {
        return tsffn_fail(file->error, file->error_size, "%s: %s: type q3_nl cannot be computed by this device",
                          file->path, name);
    }
    if (!tsffn_gguf_tensor(file, name, (int64_t)row_bytes, n_rows, 1, &tensor)) {
        return false;
    }
    *matrix = weights_at(model, tensor.offset, TSFFN_TYPE_Q3_NL, row_bytes, n_cols, n_rows, layout);
    return true;
}

static const char * type_name(const struct tsffn_weights * weights) {
    return weights->type == TSFFN_TYPE_Q3_NL ? "q3_nl" : ggml_type_name((enum ggml_type)weights->type);
}

// The activations of a layer are converted once for all of its experts.
static bool check_expert_type(const struct tsffn_gguf * file, const char * name, const struct tsffn_weights * matrix,
                              const struct tsffn_weights * of_first) {
    if (matrix->type != of_first->type) {
        return tsffn_fail(file->error, file->error_size,
                          "%s: %s: expected type %s, as the layer's first expert has, found %s; convert again",
                          file->path, name, type_name(of_first), type_name(matrix));
    }
    return true;
}

static bool read_predictors(const struct tsffn_gguf * file, struct tsffn_model * model) {
    bool pre_norm;
    const void * ranks;
    bool in_panels;
    if (!tsffn_read_layout(file, "turbosparse.predictor.layout", "panels16", &in_panels) ||
        !read_decision(file, model, &pre_norm) ||
        !tsffn_gguf_array(file, "turbosparse.predictor.rank", GGUF_TYPE_INT32, (size_t)model->n_layer, &ranks)) {
        return false;
    }
    const enum tsffn_layout layout = in_panels ? TSFFN_LAYOUT_PANELS : TSFFN_LAYOUT_ROWS;
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
        char name[TSFFN_TENSOR_NAME_SIZE];
        if (pre_norm) {
            struct tsffn_weights scale;
            snprintf(name, sizeof(name), "blk.%" PRId64 ".ffn_pred_scale.weight", layer);
            if (!map_matrix(file, model, name, model->n_embd, 1, TSFFN_LAYOUT_ROWS, &scale)) {
                return false;
            }
            if (scale.type != GGML_TYPE_F32) {
                return tsffn_fail(file->error, file->error_size, "%s: %s: wrong type: expected f32, found %s",
                                  file->path, name, type_name(&scale));
            }
            model->pred_scale[layer] = (const float *)scale.data;
        }
        for (int64_t e = 0; e < n_ffns; ++e) {
            struct tsffn_predictor * predictor = &model->predictors[layer * n_ffns + e];
            const struct tsffn_predictor * first = &model->predictors[layer * n_ffns];
            char expert[24] = "";
            if (model->n_expert > 0) {
                snprintf(expert, sizeof(expert), ".%" PRId64, e);
            }
            snprintf(name, sizeof(name), "blk.%" PRId64 ".ffn_pred_fc1%s.weight", layer, expert);
            if (!map_matrix(file, model, name, model->n_embd, rank, layout, &predictor->fc1) ||
                !check_expert_type(file, name, &predictor->fc1, &first->fc1)) {
                return false;
            }
            snprintf(name, sizeof(name), "blk.%" PRId64 ".ffn_pred_fc2%s.weight", layer, expert);
            if (!(is_q3_nl(file, name) ? map_q3_nl : map_matrix)(file, model, name, rank, model->n_ff, layout,
                                                                 &predictor->fc2) ||
                !check_expert_type(file, name, &predictor->fc2, &first->fc2)) {
                return false;
            }
        }
    }
    return true;
}

static bool map_sidecar(const struct tsffn_gguf * file, struct tsffn_model * model) {
    void * memory = mmap(NULL, file->file_size, PROT_READ, MAP_SHARED, file->fd, 0);
    if (memory == MAP_FAILED) {
        return tsffn_fail(file->error, file->error_size, "%s: cannot be mapped: %s", file->path, strerror(errno));
    }
    madvise(memory, file->file_size, MADV_HUGEPAGE); // all of it is read for every token
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

bool tsffn_has_sidecar_beside(const char * model_path) {
    char beside[PATH_MAX];
    return default_sidecar_path(model_path, beside, sizeof(beside)) && access(beside, F_OK) == 0;
}

bool tsffn_load_sidecar(struct tsffn_model * model, const char * model_path, const char * sidecar_path,
                        const struct tsffn_identity * id, char * error, size_t error_size) {
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
    model->sidecar_fd = tsffn_gguf_take_fd(&file);
    tsffn_gguf_close(&file);
    return ok;
}

// ---- a sidecar that stays in memory

// Bytes that begin at a huge page; NULL without memory.
static char * allocate_huge(size_t bytes) {
    enum { HUGE_PAGE = 2 << 20 };
    char * at = mmap(NULL, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) {
        return NULL;
    }
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    const size_t before = (HUGE_PAGE - (uintptr_t)at % HUGE_PAGE) % HUGE_PAGE;
    const size_t end = (before + bytes + page - 1) / page * page;
    if (before > 0) {
        munmap(at, before);
    }
    if (end < bytes + HUGE_PAGE) {
        munmap(at + end, bytes + HUGE_PAGE - end);
    }
    madvise(at + before, bytes, MADV_HUGEPAGE);
    madvise(at + before, bytes, MADV_DONTFORK);
    return at + before;
}

// Reads a file, and leaves nothing of it in the page cache. 0 or an errno.
static int read_past_cache(int fd, char * to, size_t bytes) {
    enum { PIECE = 8 << 20 };
    for (size_t done = 0; done < bytes;) {
        const size_t left = bytes - done;
        const ssize_t n = pread(fd, to + done, left < PIECE ? left : PIECE, (off_t)done);
        if (n < 0 && errno != EINTR) {
            return errno;
        }
        if (n == 0) {
            return ENODATA;
        }
        done += n > 0 ? (size_t)n : 0;
        posix_fadvise(fd, 0, (off_t)done, POSIX_FADV_DONTNEED);
    }
    return 0;
}

// The same place in other memory; NULL stays.
static const void * moved(const void * at, const void * from, const char * to) {
    return at != NULL ? to + ((const char *)at - (const char *)from) : NULL;
}

bool tsffn_keep_sidecar(struct tsffn_model * model, char * error, size_t error_size) {
    const void * mapped = model->sidecar;
    if (mapped == NULL) {
        return true;
    }
    char * kept = allocate_huge(model->sidecar_size);
    if (kept == NULL) {
        return tsffn_fail(error, error_size, "%s: out of memory for its predictors, %zu bytes", model->path,
                          model->sidecar_size);
    }
    const int reason = read_past_cache(model->sidecar_fd, kept, model->sidecar_size);
    if (reason != 0) {
        munmap(kept, model->sidecar_size);
        return tsffn_fail(error, error_size, "%s: its predictor sidecar cannot be read: %s", model->path,
                          reason == ENODATA ? "the file is truncated" : strerror(reason));
    }
    for (int64_t i = 0; i < model->n_layer * tsffn_model_ffns_per_layer(model); ++i) {
        model->predictors[i].fc1.data = moved(model->predictors[i].fc1.data, mapped, kept);
        model->predictors[i].fc2.data = moved(model->predictors[i].fc2.data, mapped, kept);
    }
    for (int64_t layer = 0; layer < model->n_layer; ++layer) {
        model->pred_scale[layer] = moved(model->pred_scale[layer], mapped, kept);
    }
    munmap(model->sidecar, model->sidecar_size);
    model->sidecar = kept;
    return true;
}
