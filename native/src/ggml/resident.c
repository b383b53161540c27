#include "resident.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_INPUTS = 8 }; // of a part of a graph: x, and the experts' numbers

struct input {
    const tsffn_tensor *copy, *tensor;
};

struct tsffn_resident {
    ggml_backend_dev_t gpu;
    struct ggml_backend_device device;    // a copy of ours, with other buffers
    struct ggml_backend_buffer_type type; // a copy of the GPU's
    ggml_backend_event_t ready, done;
    ggml_backend_t from; // the GPU's backend, that of the last input
    struct input inputs[MAX_INPUTS];
    int n_inputs;
    bool is_computed; // something was, since the last input
    void * memory[TSFFN_RESIDENT_SLOTS];
    size_t sizes[TSFFN_RESIDENT_SLOTS];
};

// ---- the device

static struct tsffn_resident * resident_of(ggml_backend_dev_t device) {
    return device->context;
}

static ggml_backend_buffer_type_t get_buffer_type(ggml_backend_dev_t device) {
    return &resident_of(device)->type;
}

// Weights in the host's memory, and our own results. Not the GPU's other memory: see above.
static bool supports_buft(ggml_backend_dev_t device, ggml_backend_buffer_type_t type) {
    return type == &resident_of(device)->type || ggml_backend_buft_is_host(type);
}

struct tsffn_resident * tsffn_resident_new(const char * gpu, ggml_backend_dev_t device) {
    ggml_backend_dev_t found = ggml_backend_dev_by_name(gpu);
    struct ggml_backend_dev_props props = {0};
    if (found != NULL) {
        ggml_backend_dev_get_props(found, &props);
    }
    struct tsffn_resident * r = found != NULL && props.caps.events ? calloc(1, sizeof(*r)) : NULL;
    if (r == NULL) {
        return NULL;
    }
    r->gpu = found;
    r->type = *ggml_backend_dev_buffer_type(found);
    r->device = *device;
    r->device.context = r;
    r->device.iface.get_buffer_type = get_buffer_type;
    r->device.iface.supports_buft = supports_buft;
    r->ready = ggml_backend_event_new(found);
    r->done = ggml_backend_event_new(found);
    if (r->ready == NULL || r->done == NULL) {
        tsffn_resident_free(r);
        return NULL;
    }
    return r;
}

void tsffn_resident_free(struct tsffn_resident * r) {
    if (r == NULL) {
        return;
    }
    ggml_backend_event_free(r->ready);
    ggml_backend_event_free(r->done);
    for (int slot = 0; slot < TSFFN_RESIDENT_SLOTS; ++slot) {
        free(r->memory[slot]);
    }
    free(r);
}

ggml_backend_dev_t tsffn_resident_device(struct tsffn_resident * r) {
    return &r->device;
}

// ---- tensors

bool tsffn_resident_has(const struct tsffn_resident * r, const tsffn_tensor * t) {
    const ggml_backend_buffer_t buffer = t->view_src != NULL ? t->view_src->buffer : t->buffer;
    return buffer != NULL && buffer->buft->device == r->gpu && !ggml_backend_buffer_is_host(buffer);
}

bool tsffn_resident_note(struct tsffn_resident * r, ggml_backend_t from, const tsffn_tensor * tensor,
                         const tsffn_tensor * copy) {
    if (r->is_computed) { // the inputs of another part of the graph
        r->n_inputs = 0;
        r->is_computed = false;
    }
    if (r->n_inputs == MAX_INPUTS || ggml_backend_get_device(from) != r->gpu || !tsffn_resident_has(r, tensor)) {
        return false;
    }
    r->from = from;
    r->inputs[r->n_inputs++] = (struct input){copy, tensor};
    return true;
}

const tsffn_tensor * tsffn_resident_real(const struct tsffn_resident * r, const tsffn_tensor * t) {
    for (int i = r->n_inputs - 1; i >= 0; --i) {
        if (r->inputs[i].copy == t) {
            return r->inputs[i].tensor;
        }
    }
    return t;
}

// ---- order

void * tsffn_resident_ready(struct tsffn_resident * r) {
    r->is_computed = true;
    ggml_backend_event_record(r->ready, r->from);
    return r->ready->context;
}

void * tsffn_resident_done(struct tsffn_resident * r) {
    return r->done->context;
}

void tsffn_resident_wait(struct tsffn_resident * r) {
    ggml_backend_event_wait(r->from, r->done);
}

// ---- copies

bool tsffn_resident_to_host(struct tsffn_resident * r, int slot, const tsffn_tensor * t, bool reads,
                            tsffn_tensor * copy) {
    const tsffn_tensor * real = tsffn_resident_real(r, t);
    r->is_computed = true;
    *copy = *t;
    if (!tsffn_resident_has(r, real)) {
        return true;
    }
    const size_t bytes = ggml_nbytes(real);
    if (bytes > r->sizes[slot]) {
        free(r->memory[slot]);
        r->memory[slot] = malloc(bytes);
        r->sizes[slot] = r->memory[slot] != NULL ? bytes : 0;
    }
    if (r->memory[slot] == NULL) {
        return false;
    }
    copy->data = r->memory[slot];
    if (reads) {
        if (r->from != NULL) {
            ggml_backend_synchronize(r->from);
        }
        ggml_backend_tensor_get(real, copy->data, 0, bytes);
    }
    return true;
}

void tsffn_resident_from_host(struct tsffn_resident * r, const tsffn_tensor * copy, tsffn_tensor * t) {
    if (tsffn_resident_has(r, t)) {
        ggml_backend_tensor_set(t, copy->data, 0, ggml_nbytes(t));
    }
}
