// A ggml backend that looks like a GPU to llama.cpp and computes with ggml-cpu: a device of GPU type whose memory the
// host must not touch (its buffer type is not a host type), and which, as ggml-cuda does, takes every operation that it
// can compute. For tests of what goes wrong when such a device is there. It is loaded like any backend
// (ggml_backend_load); native/src/ggml_iface.h says what its interfaces are.
#include "../src/ggml_iface.h"

#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

enum { ALIGNMENT = 128 };

static struct ggml_backend_device device;

// ---- buffers

static void buffer_free(ggml_backend_buffer_t buffer) {
    free(buffer->context);
}

static void * buffer_get_base(ggml_backend_buffer_t buffer) {
    return buffer->context;
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
    (void)buffer;
    memcpy(data, (const char *)tensor->data + offset, size);
}

static void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    memset(buffer->context, value, buffer->size);
}

static const struct ggml_backend_buffer_i buffer_interface = {
    .free_buffer = buffer_free,
    .get_base = buffer_get_base,
    .init_tensor = NULL,
    .memset_tensor = buffer_memset_tensor,
    .set_tensor = buffer_set_tensor,
    .get_tensor = buffer_get_tensor,
    .set_tensor_2d = NULL,
    .get_tensor_2d = NULL,
    .cpy_tensor = NULL,
    .clear = buffer_clear,
    .reset = NULL,
};

static const char * buffer_type_get_name(ggml_backend_buffer_type_t type) {
    (void)type;
    return "GPU0";
}

// NaN where nothing was written.
static ggml_backend_buffer_t buffer_type_alloc_buffer(ggml_backend_buffer_type_t type, size_t size) {
    const size_t n = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    void * memory = aligned_alloc(ALIGNMENT, n);
    if (memory == NULL) {
        return NULL;
    }
    memset(memory, 0xff, n);
    return ggml_backend_buffer_init(type, buffer_interface, memory, size);
}

static size_t buffer_type_get_alignment(ggml_backend_buffer_type_t type) {
    (void)type;
    return ALIGNMENT;
}

static struct ggml_backend_buffer_type buffer_type = {
    .iface =
        {
            .get_name = buffer_type_get_name,
            .alloc_buffer = buffer_type_alloc_buffer,
            .get_alignment = buffer_type_get_alignment,
            .get_max_size = NULL,
            .get_alloc_size = NULL,
            .is_host = NULL, // it is not
        },
    .device = &device,
    .context = NULL,
};

// ---- backend

static const char * backend_get_name(ggml_backend_t backend) {
    (void)backend;
    return "GPU0";
}

static void backend_free(ggml_backend_t backend) {
    ggml_backend_free(backend->context);
    free(backend);
}

static enum ggml_status backend_graph_compute(ggml_backend_t backend, struct ggml_cgraph * graph) {
    return ggml_backend_graph_compute(backend->context, graph);
}

static const struct ggml_backend_i backend_interface = {
    .get_name = backend_get_name,
    .free = backend_free,
    .set_tensor_async = NULL,
    .get_tensor_async = NULL,
    .set_tensor_2d_async = NULL,
    .get_tensor_2d_async = NULL,
    .cpy_tensor_async = NULL,
    .synchronize = NULL,
    .graph_plan_create = NULL,
    .graph_plan_free = NULL,
    .graph_plan_update = NULL,
    .graph_plan_compute = NULL,
    .graph_compute = backend_graph_compute,
    .event_record = NULL,
    .event_wait = NULL,
    .graph_optimize = NULL,
};

// ---- device

static const char * device_get_name(ggml_backend_dev_t dev) {
    (void)dev;
    return "GPU0";
}

static void device_get_memory(ggml_backend_dev_t dev, size_t * free_bytes, size_t * total_bytes) {
    (void)dev;
    *free_bytes = *total_bytes = (size_t)8 << 30;
}

static enum ggml_backend_dev_type device_get_type(ggml_backend_dev_t dev) {
    (void)dev;
    return GGML_BACKEND_DEVICE_TYPE_GPU;
}

static void device_get_props(ggml_backend_dev_t dev, struct ggml_backend_dev_props * props) {
    memset(props, 0, sizeof(*props));
    props->name = props->description = device_get_name(dev);
    props->type = device_get_type(dev);
    device_get_memory(dev, &props->memory_free, &props->memory_total);
}

static ggml_backend_t device_init_backend(ggml_backend_dev_t dev, const char * params) {
    static ggml_guid guid = {0x67, 0x70, 0x75, 0x2d, 0x64, 0x6f, 0x75, 0x62, 0x6c, 0x65};
    (void)params;
    struct ggml_backend * backend = malloc(sizeof(*backend));
    ggml_backend_t cpu = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, NULL);
    if (backend == NULL || cpu == NULL) {
        free(backend);
        return NULL;
    }
    *backend = (struct ggml_backend){.guid = &guid, .iface = backend_interface, .device = dev, .context = cpu};
    return backend;
}

static ggml_backend_buffer_type_t device_get_buffer_type(ggml_backend_dev_t dev) {
    (void)dev;
    return &buffer_type;
}

static bool device_supports_op(ggml_backend_dev_t dev, const tsffn_tensor * op) {
    (void)dev;
    return ggml_backend_dev_supports_op(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), op);
}

static bool device_supports_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t type) {
    (void)dev;
    return type == &buffer_type;
}

static struct ggml_backend_reg registration;

static struct ggml_backend_device device = {
    .iface =
        {
            .get_name = device_get_name,
            .get_description = device_get_name,
            .get_memory = device_get_memory,
            .get_type = device_get_type,
            .get_props = device_get_props,
            .init_backend = device_init_backend,
            .get_buffer_type = device_get_buffer_type,
            .get_host_buffer_type = NULL,
            .buffer_from_host_ptr = NULL,
            .supports_op = device_supports_op,
            .supports_buft = device_supports_buft,
            .offload_op = NULL,
            .event_new = NULL,
            .event_free = NULL,
            .event_synchronize = NULL,
        },
    .reg = &registration,
    .context = NULL,
};

// ---- registration

static const char * reg_get_name(ggml_backend_reg_t reg) {
    (void)reg;
    return "GPU-double";
}

static size_t reg_get_device_count(ggml_backend_reg_t reg) {
    (void)reg;
    return 1;
}

static ggml_backend_dev_t reg_get_device(ggml_backend_reg_t reg, size_t index) {
    (void)reg;
    return index == 0 ? &device : NULL;
}

static struct ggml_backend_reg registration = {
    .api_version = TSFFN_GGML_BACKEND_API_VERSION,
    .iface =
        {
            .get_name = reg_get_name,
            .get_device_count = reg_get_device_count,
            .get_device = reg_get_device,
            .get_proc_address = NULL,
        },
    .context = NULL,
};

EXPORT ggml_backend_reg_t ggml_backend_init(void);
ggml_backend_reg_t ggml_backend_init(void) {
    return &registration;
}
