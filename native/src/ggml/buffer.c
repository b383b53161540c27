// Host memory: mapped model files and compute buffers. Every entry of a vtable is written out.
#include "buffer.h"

#include "../memory/residency.h"
#include "log.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { ALIGNMENT = 64 };

static void buffer_free(ggml_backend_buffer_t buffer) {
    struct tsffn_region * context = buffer->context;
    tsffn_residency_forget(context);
    tsffn_loaded_release(context->model, context->loaded);
    tsffn_model_close(context->model);
    if (context->is_sink) {
        tsffn_sink_close(&context->sink);
    } else if (context->owned) {
        free(context->base);
    }
    free(context);
}

static void * buffer_get_base(ggml_backend_buffer_t buffer) {
    return ((const struct tsffn_region *)buffer->context)->base;
}

static enum ggml_status buffer_init_tensor(ggml_backend_buffer_t buffer, tsffn_tensor * tensor) {
    struct tsffn_region * context = buffer->context;
    struct tsffn_weight weight;
    if (!tsffn_identify(tensor, &weight)) {
        return GGML_STATUS_SUCCESS;
    }
    const int64_t n_embd = weight.model->n_embd; // ffn_down is neuron-major whatever its declared shape says
    const struct tsffn_weights weights = {
        .type = (int)tensor->type,
        .data = tensor->data,
        .n_rows = tsffn_model_ffns_per_layer(weight.model) * weight.model->n_ff,
        .n_cols = n_embd,
        .row_bytes = ggml_row_size(tensor->type, n_embd),
    };
    tensor->extra = (void *)tsffn_loaded_add(&weight, weights.type, weights.data, weights.row_bytes, &context->loaded);
    bool ok = tensor->extra != NULL && tsffn_residency_remember(context, &weight, &weights);
    const size_t bytes = tsffn_weights_bytes(&weights);
    if (ok && context->is_sink && bytes > TSFFN_COMPARED_BYTES) {
        ok = tsffn_sink_share(&context->sink, (char *)tensor->data + TSFFN_COMPARED_BYTES,
                              bytes - TSFFN_COMPARED_BYTES) == 0;
    }
    return ok ? GGML_STATUS_SUCCESS : GGML_STATUS_ALLOC_FAILED;
}

static void buffer_memset_tensor(ggml_backend_buffer_t buffer, tsffn_tensor * tensor, uint8_t value, size_t offset,
                                 size_t size) {
    (void)buffer;
    memset((char *)tensor->data + offset, value, size);
}

static void buffer_set_tensor(ggml_backend_buffer_t buffer, tsffn_tensor * tensor, const void * data, size_t offset,
                              size_t size) {
    (void)buffer;
    memcpy((char *)tensor->data + offset, data, size);
}

static void buffer_get_tensor(ggml_backend_buffer_t buffer, const tsffn_tensor * tensor, void * data, size_t offset,
                              size_t size) {
    const struct tsffn_region * context = buffer->context;
    const struct tsffn_weight * weight = context->is_sink ? tensor->extra : NULL;
    if (weight != NULL) { // only the file has it
        const uint64_t begin = weight->model->ffn_offset[weight->layer * TSFFN_N_PARTS + (int64_t)weight->part];
        if (pread(weight->model->fd, data, size, (off_t)(begin + offset)) != (ssize_t)size) {
            tsffn_log_error("%s: %s cannot be read", weight->model->path, tensor->name);
            memset(data, 0, size);
        }
        return;
    }
    memcpy(data, (const char *)tensor->data + offset, size);
}

static bool buffer_cpy_tensor(ggml_backend_buffer_t buffer, const tsffn_tensor * src, tsffn_tensor * dst) {
    (void)buffer;
    if (src->buffer == NULL || !ggml_backend_buffer_is_host(src->buffer)) {
        return false;
    }
    memcpy(dst->data, src->data, ggml_nbytes(src));
    return true;
}

static void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    memset(buffer_get_base(buffer), value, buffer->size);
}

static const struct ggml_backend_buffer_i buffer_interface = {
    .free_buffer = buffer_free,
    .get_base = buffer_get_base,
    .init_tensor = buffer_init_tensor,
    .memset_tensor = buffer_memset_tensor,
    .set_tensor = buffer_set_tensor,
    .get_tensor = buffer_get_tensor,
    .set_tensor_2d = NULL,
    .get_tensor_2d = NULL,
    .cpy_tensor = buffer_cpy_tensor,
    .clear = buffer_clear,
    .reset = NULL,
};

ggml_backend_buffer_t tsffn_buffer_new(void * base, size_t size, bool owned, struct tsffn_model * model) {
    struct tsffn_region * context = malloc(sizeof(*context));
    if (context == NULL) {
        return NULL;
    }
    *context = (struct tsffn_region){
        .base = base,
        .size = size,
        .owned = owned,
        .model = tsffn_model_retain(model),
    };
    return ggml_backend_buffer_init(tsffn_buffer_type(), buffer_interface, context, size);
}

// ---- buffer type

static const char * buffer_type_get_name(ggml_backend_buffer_type_t type) {
    (void)type;
    return "TSFFN";
}

// A buffer that keeps no FFN weights: a model's whose neurons are read from its file.
static ggml_backend_buffer_t new_sink(size_t size, struct tsffn_model * model) {
    struct tsffn_sink sink;
    const int reason = tsffn_sink_open(&sink, size);
    ggml_backend_buffer_t buffer = reason == 0 ? tsffn_buffer_new(sink.base, size, true, model) : NULL;
    if (buffer == NULL) {
        tsffn_log_error("cannot allocate a buffer of %zu bytes: %s", size, strerror(reason));
        tsffn_sink_close(&sink);
        return NULL;
    }
    struct tsffn_region * region = buffer->context;
    region->is_sink = true;
    region->sink = sink;
    return buffer;
}

static ggml_backend_buffer_t buffer_type_alloc_buffer(ggml_backend_buffer_type_t type, size_t size) {
    (void)type;
    if (tsffn_model_armed() != NULL && tsffn_model_armed()->cache != NULL) {
        return new_sink(size, tsffn_model_armed());
    }
    void * base = aligned_alloc(ALIGNMENT, (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    if (base == NULL) {
        tsffn_log_error("cannot allocate a buffer of %zu bytes", size);
        return NULL;
    }
    ggml_backend_buffer_t buffer = tsffn_buffer_new(base, size, true, tsffn_model_armed());
    if (buffer == NULL) {
        free(base);
    }
    return buffer;
}

static size_t buffer_type_get_alignment(ggml_backend_buffer_type_t type) {
    (void)type;
    return ALIGNMENT;
}

static bool buffer_type_is_host(ggml_backend_buffer_type_t type) {
    (void)type;
    return true;
}

ggml_backend_buffer_type_t tsffn_buffer_type(void) {
    static struct ggml_backend_buffer_type type = {
        .iface =
            {
                .get_name = buffer_type_get_name,
                .alloc_buffer = buffer_type_alloc_buffer,
                .get_alignment = buffer_type_get_alignment,
                .get_max_size = NULL,
                .get_alloc_size = NULL,
                .is_host = buffer_type_is_host,
            },
        .device = NULL, // set when the backend registers
        .context = NULL,
    };
    return &type;
}
