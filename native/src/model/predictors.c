// The predictors of a mapped sidecar.
#include "predictors.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

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

static bool is_of_type(const struct tsffn_gguf * file, const char * name, enum ggml_type type) {
    const int64_t id = gguf_find_tensor(file->ctx, name);
    return id >= 0 && gguf_get_tensor_type(file->ctx, id) == type;
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

// Weights of 1 or 2 bits, which are no ggml types either: an element of I16 or of I32 has 16 of them.
static bool map_bits(const struct tsffn_gguf * file, const struct tsffn_model * model, const char * name,
                     int64_t n_cols, int64_t n_rows, enum tsffn_layout layout, struct tsffn_weights * matrix) {
    if (layout != TSFFN_LAYOUT_PANELS || n_cols % TSFFN_BLOCK_SIZE != 0 || n_rows % TSFFN_PANEL_ROWS != 0) {
        return tsffn_fail(
            file->error, file->error_size,
            "%s: %s: weights of 1 or 2 bits need panels16, an n_embd that is a multiple of %d and an n_ff "
            "that is a multiple of %d, found %s, %" PRId64 ", %" PRId64 "; build the predictor again",
            file->path, name, TSFFN_BLOCK_SIZE, TSFFN_PANEL_ROWS, layout == TSFFN_LAYOUT_PANELS ? "panels16" : "rows",
            n_cols, n_rows);
    }
    const int n_bits = is_of_type(file, name, GGML_TYPE_I16) ? 1 : 2;
    const int type = n_bits == 1 ? TSFFN_TYPE_BITS1 : TSFFN_TYPE_BITS2;
    struct tsffn_gguf_tensor tensor;
    if (!model->computes->supports(type)) {
        return tsffn_fail(file->error, file->error_size, "%s: %s: type bits%d cannot be computed by this device",
                          file->path, name, n_bits);
    }
    if (!tsffn_gguf_tensor(file, name, n_cols / 16, n_rows, 1, &tensor)) {
        return false;
    }
    *matrix = weights_at(model, tensor.offset, type, (size_t)(n_cols / 8 * n_bits), n_cols, n_rows, layout);
    return true;
}

static const char * type_name(const struct tsffn_weights * weights) {
    switch (weights->type) {
    case TSFFN_TYPE_Q3_NL:
        return "q3_nl";
    case TSFFN_TYPE_BITS1:
        return "bits1";
    case TSFFN_TYPE_BITS2:
        return "bits2";
    default:
        return ggml_type_name((enum ggml_type)weights->type);
    }
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

// ---- forms

// What the matrices of a form are called in tensors' names, fc1 to fc3; NULL where it has none.
struct form {
    const char * name;
    const char * matrices[TSFFN_N_PREDICTOR_MATRICES];
};
static const struct form forms[TSFFN_N_PREDICTOR_FORMS] = {
    [TSFFN_PREDICTOR_MLP] = {"mlp", {"fc1", "fc2", NULL}},
    [TSFFN_PREDICTOR_LINEAR] = {"linear", {"fc1", "fc2", NULL}},
    [TSFFN_PREDICTOR_GATE] = {"gate", {NULL, "gate", NULL}},
    [TSFFN_PREDICTOR_GATE_UP] = {"gate_up", {NULL, "gate", "up"}},
};

// *has_form: the file is of a version that has forms, and thresholds of neurons.
static bool read_form(const struct tsffn_gguf * file, struct tsffn_model * model, bool * has_form) {
    const char key[] = "turbosparse.predictor.form";
    uint32_t version;
    const char * name;
    if (!tsffn_gguf_u32(file, "turbosparse.format_version", &version)) {
        return false;
    }
    model->form = TSFFN_PREDICTOR_MLP;
    *has_form = version >= TSFFN_FORM_VERSION;
    if (!*has_form && gguf_find_key(file->ctx, key) >= 0) {
        return tsffn_fail(
            file->error, file->error_size,
            "%s: key %s: expected from format version %d on, found in version %u; build the predictor again",
            file->path, key, TSFFN_FORM_VERSION, version);
    }
    if (!*has_form) {
        return true;
    }
    if (!tsffn_gguf_string(file, key, &name)) {
        return false;
    }
    for (int form = 0; form < TSFFN_N_PREDICTOR_FORMS; ++form) {
        if (strcmp(name, forms[form].name) == 0) {
            model->form = (enum tsffn_predictor_form)form;
            return true;
        }
    }
    return tsffn_fail(file->error, file->error_size,
                      "%s: key %s: expected 'mlp', 'linear', 'gate' or 'gate_up', found '%s'; install the tsconv that "
                      "wrote the file",
                      file->path, key, name);
}

static bool read_input_bits(const struct tsffn_gguf * file, struct tsffn_model * model) {
    const char key[] = "turbosparse.predictor.input_bits";
    uint32_t bits;
    if (!tsffn_gguf_u32(file, key, &bits)) {
        return false;
    }
    if (bits < 1 || bits > TSFFN_BITS_MAX_INPUT) {
        return tsffn_fail(file->error, file->error_size, "%s: key %s: expected 1 to %d, found %u", file->path, key,
                          TSFFN_BITS_MAX_INPUT, bits);
    }
    model->input_bits = (int)bits;
    return true;
}

// ---- tensors

// "blk.N.ffn_pred_NAME.weight", or with an expert's number before the last part.
static void name_tensor(const struct tsffn_model * model, int64_t layer, const char * what, int64_t expert,
                        char name[TSFFN_TENSOR_NAME_SIZE]) {
    if (model->n_expert > 0) {
        snprintf(name, TSFFN_TENSOR_NAME_SIZE, "blk.%" PRId64 ".ffn_pred_%s.%" PRId64 ".weight", layer, what, expert);
    } else {
        snprintf(name, TSFFN_TENSOR_NAME_SIZE, "blk.%" PRId64 ".ffn_pred_%s.weight", layer, what);
    }
}

// Only activations behind a ReLU, which are not negative, can be multiplied with q3_nl.
static bool map_any(const struct tsffn_gguf * file, struct tsffn_model * model, const char * name, int matrix,
                    int64_t n_cols, int64_t n_rows, enum tsffn_layout layout, struct tsffn_weights * weights) {
    if (matrix == 1 && model->form == TSFFN_PREDICTOR_MLP && is_of_type(file, name, GGML_TYPE_I8)) {
        return map_q3_nl(file, model, name, n_cols, n_rows, layout, weights);
    }
    const bool is_bits = is_of_type(file, name, GGML_TYPE_I16) || is_of_type(file, name, GGML_TYPE_I32);
    if (forms[model->form].matrices[0] == NULL && is_bits) {
        return read_input_bits(file, model) && map_bits(file, model, name, n_cols, n_rows, layout, weights);
    }
    return map_matrix(file, model, name, n_cols, n_rows, layout, weights);
}

static bool read_scale(const struct tsffn_gguf * file, struct tsffn_model * model, int64_t layer) {
    char name[TSFFN_TENSOR_NAME_SIZE];
    struct tsffn_weights scale;
    snprintf(name, sizeof(name), "blk.%" PRId64 ".ffn_pred_scale.weight", layer);
    if (!map_matrix(file, model, name, model->n_embd, 1, TSFFN_LAYOUT_ROWS, &scale)) {
        return false;
    }
    if (scale.type != GGML_TYPE_F32) {
        return tsffn_fail(file->error, file->error_size, "%s: %s: wrong type: expected f32, found %s", file->path, name,
                          type_name(&scale));
    }
    model->pred_scale[layer] = (const float *)scale.data;
    return true;
}

// Those of an FFN: n_sets of n_ff.
static bool read_thresholds(const struct tsffn_gguf * file, const struct tsffn_model * model, const char * name,
                            int64_t n_sets, const float ** thresholds) {
    struct tsffn_gguf_tensor tensor;
    if (!tsffn_gguf_tensor(file, name, 1, model->n_ff, n_sets, &tensor)) {
        return false;
    }
    if (tensor.type != GGML_TYPE_F32) {
        return tsffn_fail(file->error, file->error_size, "%s: %s: wrong type: expected f32, found %s", file->path, name,
                          ggml_type_name(tensor.type));
    }
    const float * values = (const float *)(const void *)((const uint8_t *)model->sidecar + tensor.offset);
    for (int64_t i = 0; i < n_sets * model->n_ff; ++i) {
        if (isnan(values[i])) {
            return tsffn_fail(file->error, file->error_size,
                              "%s: %s: expected numbers, found nan for neuron %" PRId64 "; build the predictor again",
                              file->path, name, i % model->n_ff);
        }
    }
    *thresholds = values;
    return true;
}

// What a predictor's matrices must have in common: with those of the layer's first expert, since the activations of a
// layer are converted once for all of its experts; and the two that p is multiplied with.
static bool check_types(const struct tsffn_gguf * file, const struct tsffn_model * model, int64_t layer, int64_t expert,
                        const struct tsffn_predictor * predictor, const struct tsffn_predictor * first) {
    const struct tsffn_weights * found[] = {&predictor->fc1, &predictor->fc2, &predictor->fc3};
    const struct tsffn_weights * of_first[] = {&first->fc1, &first->fc2, &first->fc3};
    for (int k = 0; k < TSFFN_N_PREDICTOR_MATRICES; ++k) {
        char name[TSFFN_TENSOR_NAME_SIZE] = "";
        if (found[k]->data != NULL) {
            name_tensor(model, layer, forms[model->form].matrices[k], expert, name);
        }
        if (found[k]->data != NULL && !check_expert_type(file, name, found[k], of_first[k])) {
            return false;
        }
        if (k == 2 && found[k]->data != NULL && found[k]->type != predictor->fc2.type) {
            return tsffn_fail(file->error, file->error_size, "%s: %s: expected type %s, as gate has, found %s",
                              file->path, name, type_name(&predictor->fc2), type_name(found[k]));
        }
    }
    return true;
}

// The predictor of an FFN.
static bool read_predictor(const struct tsffn_gguf * file, struct tsffn_model * model, int64_t layer, int64_t expert,
                           int64_t rank, enum tsffn_layout layout, bool has_thresholds) {
    const struct form * form = &forms[model->form];
    struct tsffn_predictor * predictor = &model->predictors[layer * tsffn_model_ffns_per_layer(model) + expert];
    struct tsffn_weights * matrices[TSFFN_N_PREDICTOR_MATRICES] = {&predictor->fc1, &predictor->fc2, &predictor->fc3};
    char name[TSFFN_TENSOR_NAME_SIZE];
    for (int k = 0; k < TSFFN_N_PREDICTOR_MATRICES; ++k) {
        const int64_t n_cols = k == 0 || form->matrices[0] == NULL ? model->n_embd : rank;
        const int64_t n_rows = k == 0 ? rank : model->n_ff;
        if (form->matrices[k] == NULL) {
            continue;
        }
        name_tensor(model, layer, form->matrices[k], expert, name);
        if (!map_any(file, model, name, k, n_cols, n_rows, layout, matrices[k])) {
            return false;
        }
    }
    name_tensor(model, layer, "threshold", expert, name);
    const int64_t n_sets = form->matrices[2] != NULL ? 2 : 1;
    if (has_thresholds && !read_thresholds(file, model, name, n_sets, &predictor->thresholds)) {
        return false;
    }
    return check_types(file, model, layer, expert, predictor, predictor - expert);
}

// Ranks of the layers, of forms that have them; else NULL.
static bool read_ranks(const struct tsffn_gguf * file, const struct tsffn_model * model, const int32_t ** ranks) {
    const char key[] = "turbosparse.predictor.rank";
    const void * found;
    *ranks = NULL;
    if (forms[model->form].matrices[0] == NULL) {
        return true;
    }
    if (!tsffn_gguf_array(file, key, GGUF_TYPE_INT32, (size_t)model->n_layer, &found)) {
        return false;
    }
    *ranks = found;
    for (int64_t layer = 0; layer < model->n_layer; ++layer) {
        const int32_t rank = (*ranks)[layer];
        if (rank < 1 || rank > TSFFN_MAX_DIM) {
            return tsffn_fail(file->error, file->error_size, "%s: key %s: expected 1 to %d, found %d in layer %" PRId64,
                              file->path, key, TSFFN_MAX_DIM, rank, layer);
        }
    }
    return true;
}

// Whether the file has thresholds of neurons; all of its FFNs have then.
static bool find_thresholds(const struct tsffn_gguf * file, const struct tsffn_model * model, bool has_form,
                            bool pre_norm, bool * has_thresholds) {
    char name[TSFFN_TENSOR_NAME_SIZE];
    name_tensor(model, 0, "threshold", 0, name);
    *has_thresholds = has_form && gguf_find_tensor(file->ctx, name) >= 0;
    if (*has_thresholds && pre_norm) {
        return tsffn_fail(file->error, file->error_size,
                          "%s: %s: expected no thresholds, because only the sign of a pre-norm predictor survives the "
                          "norm",
                          file->path, name);
    }
    return true;
}

bool tsffn_read_predictors(const struct tsffn_gguf * file, struct tsffn_model * model) {
    bool has_form, pre_norm, in_panels, has_thresholds;
    const int32_t * ranks;
    if (!read_form(file, model, &has_form) ||
        !tsffn_read_layout(file, "turbosparse.predictor.layout", "panels16", &in_panels) ||
        !read_decision(file, model, &pre_norm) || !read_ranks(file, model, &ranks) ||
        !find_thresholds(file, model, has_form, pre_norm, &has_thresholds)) {
        return false;
    }
    int n_matrices = 0;
    for (int k = 0; k < TSFFN_N_PREDICTOR_MATRICES; ++k) {
        n_matrices += forms[model->form].matrices[k] != NULL;
    }
    const int64_t n_ffns = tsffn_model_ffns_per_layer(model);
    const int64_t n_expected = model->n_layer * ((n_matrices + has_thresholds) * n_ffns + pre_norm);
    if (gguf_get_n_tensors(file->ctx) != n_expected) {
        return tsffn_fail(file->error, file->error_size,
                          "%s: wrong number of tensors: expected %" PRId64 ", found %" PRId64 "; convert again",
                          file->path, n_expected, gguf_get_n_tensors(file->ctx));
    }
    for (int64_t layer = 0; layer < model->n_layer; ++layer) {
        if (pre_norm && !read_scale(file, model, layer)) {
            return false;
        }
        for (int64_t e = 0; e < n_ffns; ++e) {
            if (!read_predictor(file, model, layer, e, ranks != NULL ? ranks[layer] : 0,
                                in_panels ? TSFFN_LAYOUT_PANELS : TSFFN_LAYOUT_ROWS, has_thresholds)) {
                return false;
            }
        }
    }
    return true;
}
