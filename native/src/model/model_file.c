#include "model_file.h"

#include "llama_keys.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

bool tsffn_check_format(const struct tsffn_gguf * file, uint32_t newest) {
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
    if (version < 1 || version > newest) {
        return tsffn_fail(
            file->error, file->error_size,
            "%s: unknown format version: expected 1 to %u, found %u; install the tsconv that wrote the file, or "
            "convert again",
            file->path, newest, version);
    }
    return true;
}

bool tsffn_read_layout(const struct tsffn_gguf * file, const char * key, const char * other, bool * is_other) {
    uint32_t version;
    const char * name;
    *is_other = false;
    if (!tsffn_gguf_u32(file, "turbosparse.format_version", &version)) {
        return false;
    }
    if (version == 1) {
        return gguf_find_key(file->ctx, key) < 0 ||
               tsffn_fail(file->error, file->error_size,
                          "%s: key %s: expected from format version 2 on, found in version 1; convert again",
                          file->path, key);
    }
    if (!tsffn_gguf_string(file, key, &name)) {
        return false;
    }
    *is_other = strcmp(name, other) == 0;
    return *is_other || strcmp(name, "rows") == 0 ||
           tsffn_fail(file->error, file->error_size,
                      "%s: key %s: expected 'rows' or '%s', found '%s'; install the tsconv that wrote the file, or "
                      "convert again",
                      file->path, key, other, name);
}

bool tsffn_read_shape(const struct tsffn_gguf * file, struct tsffn_model * model) {
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

bool tsffn_check_type(const struct tsffn_gguf * file, const struct tsffn_model * model, const char * name,
                      enum ggml_type type, int64_t n_cols) {
    if (!model->computes->supports((int)type)) {
        return tsffn_fail(file->error, file->error_size,
                          "%s: %s: type %s cannot be computed by this ggml; convert with another --outtype", file->path,
                          name, ggml_type_name(type));
    }
    const int64_t block = ggml_blck_size(type);
    if (n_cols % block != 0) {
        return tsffn_fail(file->error, file->error_size,
                          "%s: %s: type %s needs rows of a multiple of %" PRId64 " weights, found %" PRId64
                          "; convert with another --tensor-type for it",
                          file->path, name, ggml_type_name(type), block, n_cols);
    }
    return true;
}

static bool check_ffn_tensors(const struct tsffn_gguf * file, struct tsffn_model * model) {
    static const char * const parts[TSFFN_N_PARTS] = {"gate", "up", "down"};
    model->ffn_offset = calloc((size_t)model->n_layer * TSFFN_N_PARTS, sizeof(*model->ffn_offset));
    model->ffn_row_bytes = calloc((size_t)model->n_layer * TSFFN_N_PARTS, sizeof(*model->ffn_row_bytes));
    if (model->ffn_offset == NULL || model->ffn_row_bytes == NULL) {
        return tsffn_fail(file->error, file->error_size, "out of memory");
    }
    const char * suffix = model->n_expert > 0 ? "_exps" : "";
    const int64_t n_expert = tsffn_model_ffns_per_layer(model);
    for (int64_t layer = 0; layer < model->n_layer; ++layer) {
        enum ggml_type type_of_gate = GGML_TYPE_COUNT;
        for (int part = 0; part < TSFFN_N_PARTS; ++part) {
            char name[TSFFN_TENSOR_NAME_SIZE];
            snprintf(name, sizeof(name), "blk.%" PRId64 ".ffn_%s%s.weight", layer, parts[part], suffix);
            const bool is_down = part == TSFFN_PART_DOWN;
            struct tsffn_gguf_tensor tensor;
            if (!tsffn_gguf_tensor(file, name, is_down ? model->n_ff : model->n_embd,
                                   is_down ? model->n_embd : model->n_ff, n_expert, &tensor) ||
                !tsffn_check_type(file, model, name, tensor.type, model->n_embd)) {
                return false;
            }
            model->ffn_offset[layer * TSFFN_N_PARTS + part] = tensor.offset;
            model->ffn_row_bytes[layer * TSFFN_N_PARTS + part] = ggml_row_size(tensor.type, model->n_embd);
            type_of_gate = part == TSFFN_PART_GATE ? tensor.type : type_of_gate;
            if (model->bundled && tensor.type != type_of_gate) {
                return tsffn_fail(file->error, file->error_size,
                                  "%s: %s: expected type %s, as all of a layer's bundles have, found %s; convert again",
                                  file->path, name, ggml_type_name(type_of_gate), ggml_type_name(tensor.type));
            }
        }
    }
    return true;
}

// Every neuron of `order` once: an FFN's part of turbosparse.neuron_order.N. `seen` has room for n_ff.
static bool is_permutation(const int32_t * order, size_t n_ff, bool * seen) {
    memset(seen, 0, n_ff * sizeof(*seen));
    for (size_t i = 0; i < n_ff; ++i) {
        if (order[i] < 0 || (size_t)order[i] >= n_ff || seen[order[i]]) {
            return false;
        }
        seen[order[i]] = true;
    }
    return true;
}

// Computing needs no order, but the neurons of a file whose order is damaged cannot be told apart.
static bool check_neuron_order(const struct tsffn_gguf * file, struct tsffn_model * model, const char * order) {
    if (strcmp(order, "checkpoint") == 0) {
        return true;
    }
    if (strcmp(order, "hot_first") != 0) {
        return tsffn_fail(
            file->error, file->error_size,
            "%s: key turbosparse.neuron_order: expected 'checkpoint' or 'hot_first', found '%s'; install the tsconv "
            "that wrote the file, or convert again",
            file->path, order);
    }
    model->hot_first = true;
    const size_t n_ffns = (size_t)tsffn_model_ffns_per_layer(model);
    const size_t n_ff = (size_t)model->n_ff;
    bool * seen = malloc(n_ff * sizeof(*seen));
    if (seen == NULL) {
        return tsffn_fail(file->error, file->error_size, "out of memory");
    }
    bool ok = true;
    for (int64_t layer = 0; ok && layer < model->n_layer; ++layer) {
        char key[64];
        const void * neurons;
        snprintf(key, sizeof(key), "turbosparse.neuron_order.%" PRId64, layer);
        ok = tsffn_gguf_array(file, key, GGUF_TYPE_INT32, n_ffns * n_ff, &neurons);
        for (size_t e = 0; ok && e < n_ffns; ++e) {
            if (!is_permutation((const int32_t *)neurons + e * n_ff, n_ff, seen)) {
                ok = tsffn_fail(file->error, file->error_size,
                                "%s: key %s: expected each of %zu neurons once, found another list in FFN %zu; convert "
                                "and reorder again",
                                file->path, key, n_ff, e);
            }
        }
    }
    free(seen);
    return ok;
}

bool tsffn_copy_string(const struct tsffn_gguf * file, const char * key, char * out, size_t size) {
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

bool tsffn_read_pair_id(const struct tsffn_gguf * file, struct tsffn_identity * id) {
    enum { DIGITS = 32 };
    static const char key[] = "turbosparse.pair_id";
    return tsffn_copy_string(file, key, id->pair_id, sizeof(id->pair_id)) &&
           ((strlen(id->pair_id) == DIGITS && strspn(id->pair_id, "0123456789abcdef") == DIGITS) ||
            tsffn_fail(file->error, file->error_size,
                       "%s: key %s: expected %d lower-case hex digits, found '%s'; convert again", file->path, key,
                       DIGITS, id->pair_id));
}

static bool read_predictor_kind(const struct tsffn_gguf * file, struct tsffn_identity * id) {
    static const char key[] = "turbosparse.predictor.kind";
    if (!tsffn_copy_string(file, key, id->predictor_kind, sizeof(id->predictor_kind))) {
        return false;
    }
    static const char * const kinds[] = {"none", "embedded", "external"};
    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); ++i) {
        if (strcmp(id->predictor_kind, kinds[i]) == 0) {
            return true;
        }
    }
    return tsffn_fail(
        file->error, file->error_size,
        "%s: key %s: expected 'none', 'embedded' or 'external', found '%s'; install the tsconv that wrote "
        "the file, or convert again",
        file->path, key, id->predictor_kind);
}

bool tsffn_read_model_file(const struct tsffn_gguf * file, struct tsffn_model * model, struct tsffn_identity * id) {
    const int64_t type = gguf_find_key(file->ctx, "general.type");
    if (type >= 0 && gguf_get_kv_type(file->ctx, type) == GGUF_TYPE_STRING &&
        strcmp(gguf_get_val_str(file->ctx, type), "predictor") == 0) {
        return tsffn_fail(
            file->error, file->error_size,
            "%s: is a predictor sidecar: expected the model; name NAME.gguf, its sidecar is found by itself",
            file->path);
    }
    return tsffn_check_format(file, TSFFN_MODEL_VERSION) &&
           tsffn_gguf_expect(file, "turbosparse.activation", "drelu") &&
           tsffn_gguf_expect(file, "turbosparse.ffn_down.layout", "neuron_major") && tsffn_read_pair_id(file, id) &&
           tsffn_copy_string(file, "turbosparse.neuron_order", id->order, sizeof(id->order)) &&
           read_predictor_kind(file, id) &&
           tsffn_read_layout(file, "turbosparse.ffn.layout", "bundles", &model->bundled) &&
           tsffn_read_shape(file, model) && check_neuron_order(file, model, id->order) &&
           check_ffn_tensors(file, model) && tsffn_check_llama_keys(file, model->n_expert);
}
