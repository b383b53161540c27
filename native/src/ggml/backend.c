// The ggml side: backend, device, registration, in this order. Every entry of a vtable is written out.
#include "../memory/mapping.h"
#include "../memory/residency.h"
#include "../model/gguf_file.h"
#include "environment.h"
#include "graph.h"
#include "load.h"
#include "log.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>

// ---- backend

static const char * backend_get_name(ggml_backend_t backend) {
    (void)backend;
    return "TSFFN";
}

static void backend_free(ggml_backend_t backend) {
    struct tsffn_stream * stream = backend->context;
    tsffn_resident_free(stream->resident);
    if (stream->device != NULL) {
        stream->device->close(stream->scratch);
    }
    free(stream->rows);
    tsffn_recorder_free(&stream->recorder);
    free(stream);
    free(backend);
}

static enum ggml_status backend_graph_compute(ggml_backend_t backend, struct ggml_cgraph * graph) {
    return tsffn_compute_graph(backend->context, graph);
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

// Of a backend whose FFNs share a GPU's memory with what is around them: nothing is copied.
static bool backend_cpy_tensor_async(ggml_backend_t from, ggml_backend_t to, const tsffn_tensor * src,
                                     tsffn_tensor * dst) {
    if (to->iface.cpy_tensor_async != backend_cpy_tensor_async) {
        return false;
    }
    struct tsffn_stream * stream = to->context;
    return tsffn_resident_note(stream->resident, from, src, dst);
}

static void backend_synchronize(ggml_backend_t backend) {
    struct tsffn_stream * stream = backend->context;
    stream->is_lost = !tsffn_finish_graph(stream) || stream->is_lost;
}

// Such a backend's: all else is as without.
static struct ggml_backend_i resident_interface(void) {
    struct ggml_backend_i interface = backend_interface;
    interface.cpy_tensor_async = backend_cpy_tensor_async;
    interface.synchronize = backend_synchronize;
    return interface;
}

static void backend_set_n_threads(ggml_backend_t backend, int n_threads) {
    const int at_most = n_threads < GGML_MAX_N_THREADS ? n_threads : GGML_MAX_N_THREADS;
    ((struct tsffn_stream *)backend->context)->n_threads = at_most > 0 ? at_most : 1;
}

// ---- device

static const char * device_get_name(ggml_backend_dev_t dev) {
    (void)dev;
    return "TSFFN";
}

static const char * device_get_description(ggml_backend_dev_t dev) {
    (void)dev;
    return "sparse dReLU FFN";
}

static void device_get_memory(ggml_backend_dev_t dev, size_t * free_bytes, size_t * total_bytes) {
    (void)dev;
    *free_bytes = 0; // none of its own
    *total_bytes = 0;
}

static enum ggml_backend_dev_type device_get_type(ggml_backend_dev_t dev) {
    (void)dev;
    return GGML_BACKEND_DEVICE_TYPE_ACCEL;
}

static void device_get_props(ggml_backend_dev_t dev, struct ggml_backend_dev_props * props) {
    memset(props, 0, sizeof(*props));
    props->name = device_get_name(dev);
    props->description = device_get_description(dev);
    props->type = device_get_type(dev);
    device_get_memory(dev, &props->memory_free, &props->memory_total);
    props->caps.buffer_from_host_ptr = true; // weights stay mapped
    props->caps.mmap_support = true;
}

static ggml_backend_t device_init_backend(ggml_backend_dev_t dev, const char * params) {
    (void)params;
    // llama.cpp starts backends for a context, whose model it has loaded.
    char error[1024];
    struct tsffn_model * model = tsffn_model_armed();
    if (model != NULL && !tsffn_check_loaded(model, error, sizeof(error))) {
        tsffn_log_error("%s", error);
        return NULL;
    }
    static ggml_guid guid = {0x74, 0x73, 0x66, 0x66, 0x6e, 0x2d, 0x64, 0x72,
                             0x65, 0x6c, 0x75, 0x2d, 0x63, 0x70, 0x75, 0x31};
    struct ggml_backend * backend = malloc(sizeof(*backend));
    struct tsffn_stream * stream = calloc(1, sizeof(*stream));
    if (backend == NULL || stream == NULL) {
        free(backend);
        free(stream);
        return NULL;
    }
    tsffn_residency_loaded();
    tsffn_place_from_environment();
    stream->n_threads = omp_get_max_threads();
    if (model != NULL && model->resident_on[0] != '\0') {
        stream->resident = tsffn_resident_new(model->resident_on, dev);
    }
    *backend = (struct ggml_backend){
        .guid = &guid,
        .iface = stream->resident != NULL ? resident_interface() : backend_interface,
        .device = stream->resident != NULL ? tsffn_resident_device(stream->resident) : dev,
        .context = stream,
    };
    return backend;
}

static ggml_backend_buffer_type_t device_get_buffer_type(ggml_backend_dev_t dev) {
    (void)dev;
    return tsffn_buffer_type();
}

static ggml_backend_buffer_t device_buffer_from_host_ptr(ggml_backend_dev_t dev, void * ptr, size_t size,
                                                         size_t max_tensor_size) {
    (void)dev;
    (void)max_tensor_size;
    // Tensors are claimed by name and shape: another model of the same shapes must not be computed as dReLU.
    struct tsffn_model * model = tsffn_model_armed();
    if (model != NULL && tsffn_is_mapped_from_another_file(ptr, size, model->device, model->inode)) {
        tsffn_log_error("another model of the shape of %s is being loaded; load it with a program of its own, without "
                        "TSFFN_MODEL",
                        model->path);
        return NULL;
    }
    if (model != NULL && model->cache != NULL) {
        tsffn_log_error("%s: its neurons are read from disk, but it was mapped, which reads all of it: load it with "
                        "--load-mode dio",
                        model->path);
        return NULL;
    }
    tsffn_release_pages(ptr, size);
    return tsffn_buffer_new(ptr, size, false, model);
}

static bool device_supports_op(ggml_backend_dev_t dev, const tsffn_tensor * op) {
    (void)dev;
    return tsffn_supports_op(op);
}

static bool device_supports_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t type) {
    (void)dev;
    return ggml_backend_buft_is_host(type);
}

static const struct ggml_backend_device_i device_interface = {
    .get_name = device_get_name,
    .get_description = device_get_description,
    .get_memory = device_get_memory,
    .get_type = device_get_type,
    .get_props = device_get_props,
    .init_backend = device_init_backend,
    .get_buffer_type = device_get_buffer_type,
    .get_host_buffer_type = NULL,
    .buffer_from_host_ptr = device_buffer_from_host_ptr,
    .supports_op = device_supports_op,
    .supports_buft = device_supports_buft,
    .offload_op = NULL,
    .event_new = NULL,
    .event_free = NULL,
    .event_synchronize = NULL,
};

// ---- registration

static struct ggml_backend_device device;

static const char * reg_get_name(ggml_backend_reg_t reg) {
    (void)reg;
    return "TSFFN";
}

static size_t reg_get_device_count(ggml_backend_reg_t reg) {
    (void)reg;
    return 1;
}

static ggml_backend_dev_t reg_get_device(ggml_backend_reg_t reg, size_t index) {
    (void)reg;
    return index == 0 ? &device : NULL;
}

static struct ggml_backend_feature * get_features(ggml_backend_reg_t reg) {
    (void)reg;
    static struct ggml_backend_feature features[4];
    features[0] = (struct ggml_backend_feature){"ISA", tsffn_isa_name()};
    features[1] = (struct ggml_backend_feature){"OPENMP", "1"};
    features[2] = (struct ggml_backend_feature){"GGML", tsffn_ggml_version()};
    features[3] = (struct ggml_backend_feature){NULL, NULL};
    return features;
}

static void * reg_get_proc_address(ggml_backend_reg_t reg, const char * name) {
    (void)reg;
    static const ggml_backend_set_n_threads_t set_n_threads = backend_set_n_threads;
    static const ggml_backend_get_features_t features = get_features;
    if (strcmp(name, "ggml_backend_set_n_threads") == 0) {
        return *(void * const *)&set_n_threads;
    }
    if (strcmp(name, "ggml_backend_get_features") == 0) {
        return *(void * const *)&features;
    }
    return NULL;
}

static struct ggml_backend_reg registration = {
    .api_version = TSFFN_GGML_BACKEND_API_VERSION,
    .iface =
        {
            .get_name = reg_get_name,
            .get_device_count = reg_get_device_count,
            .get_device = reg_get_device,
            .get_proc_address = reg_get_proc_address,
        },
    .context = NULL,
};

static struct ggml_backend_device device = {
    .iface = device_interface,
    .reg = &registration,
    .context = NULL,
};

// ---- entry point of ggml_backend_load

TSFFN_API ggml_backend_reg_t ggml_backend_init(void);

ggml_backend_reg_t ggml_backend_init(void) {
    char error[1024];
    if (!tsffn_check_abi(error, sizeof(error)) || !tsffn_open_from_environment(error, sizeof(error))) {
        tsffn_log_error("%s", error);
        return NULL;
    }
    tsffn_buffer_type()->device = &device;
    return &registration;
}
