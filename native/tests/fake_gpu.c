// A ggml backend that is to llama.cpp what ggml-cuda is with a GPU of its own memory, and computes with ggml-cpu. For
// tests on machines without a GPU. It is loaded like any backend (ggml_backend_load).
//
// Its rules are those of ggml-cuda (ggml/src/ggml-cuda/ggml-cuda.cu), and who breaks one ends the process with a line:
// - The host cannot touch the device's memory: its pages are inaccessible but while a function of this backend works.
// - What was not written is NaN.
// - A graph's tensors are all in this device's memory.
// - Asynchronous copies are for tensors in the device's own buffer type.
// Work of a backend counts as unfinished until it is synchronized. Copies through the buffers, which do not wait for
// it, are counted as too early.
//
//   FAKE_GPU_DEVICES   how many there are: FAKE0, FAKE1, ...; 1 without it
//   FAKE_GPU_MEMORY    bytes of each; 8 GiB without it
//
// Where TSFFN_CUDA_MODULE names the CUDA module that is compiled for the host (cuda/runtime.cpp), that one's device is
// this GPU too: it can touch the memory, and they wait for each other's events.
#define _GNU_SOURCE // MAP_ANONYMOUS
#include "../src/ggml_iface.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

enum { ALIGNMENT = 128, ROW_PADDING = 512, MAX_DEVICES = 4, OFFLOAD_MIN_BATCH = 32 };

// What was asked of the devices. tests/support/fake_gpu.py knows the order.
struct fake_gpu_counts {
    int64_t n_synchronize;
    int64_t n_upload, upload_bytes;
    int64_t n_download, download_bytes;
    int64_t n_async_upload, n_async_download;
    int64_t n_device_copy;
    int64_t n_graph, n_node;
    int64_t n_too_early;
    int64_t n_event_record, n_event_wait;
};

struct memory {
    struct memory * next;
    void * base;
    size_t size; // whole pages
};

struct gpu {
    char name[16], host_name[24];
    size_t used_bytes;
    int n_unfinished; // backends with work that nobody waited for
};

struct stream {
    ggml_backend_t cpu;
    struct gpu * gpu;
    bool unfinished;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct fake_gpu_counts counts;
static struct memory * memories;
static int n_working; // functions that touch the memory now

static struct gpu gpus[MAX_DEVICES];
static struct ggml_backend_device devices[MAX_DEVICES];
static struct ggml_backend_buffer_type buffer_types[MAX_DEVICES], host_buffer_types[MAX_DEVICES];

static struct gpu * gpu_of(ggml_backend_dev_t device) {
    return device->context;
}

static void fail(const char * what, const char * which) {
    fprintf(stderr, "fake GPU: %s: %s\n", what, which);
    abort();
}

// ---- memory that only this backend can touch

static void protect(int access) {
    for (const struct memory * m = memories; m != NULL; m = m->next) {
        if (mprotect(m->base, m->size, access) != 0) {
            fail("mprotect", "its memory");
        }
    }
}

static void begin_work(void) {
    pthread_mutex_lock(&mutex);
    if (n_working++ == 0) {
        protect(PROT_READ | PROT_WRITE);
    }
    pthread_mutex_unlock(&mutex);
}

static void end_work(void) {
    pthread_mutex_lock(&mutex);
    if (--n_working == 0) {
        protect(PROT_NONE);
    }
    pthread_mutex_unlock(&mutex);
}

static void count(int64_t * counter, int64_t n) {
    __atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

static struct sigaction action_before;

static void on_segmentation_fault(int signal, siginfo_t * info, void * context) {
    (void)context;
    const char * address = info->si_addr;
    for (const struct memory * m = memories; m != NULL; m = m->next) {
        if (address >= (const char *)m->base && address < (const char *)m->base + m->size) {
            static const char line[] = "fake GPU: the host touched the memory of the device\n";
            (void)!write(2, line, sizeof(line) - 1);
        }
    }
    sigaction(signal, &action_before, NULL); // the access is tried again, and ends the process as it would have
}

// ---- buffers

static bool is_ours(ggml_backend_buffer_t buffer);

static ggml_backend_buffer_t buffer_of(const tsffn_tensor * t) {
    return t->view_src != NULL ? t->view_src->buffer : t->buffer;
}

// Before a copy that does not wait for the work of backends.
static void note_copy(ggml_backend_buffer_t buffer) {
    if (gpu_of(buffer->buft->device)->n_unfinished > 0) {
        count(&counts.n_too_early, 1);
    }
}

static void buffer_free(ggml_backend_buffer_t buffer) {
    pthread_mutex_lock(&mutex);
    struct memory ** link = &memories;
    while (*link != buffer->context) {
        link = &(*link)->next;
    }
    struct memory * m = *link;
    *link = m->next;
    gpu_of(buffer->buft->device)->used_bytes -= m->size;
    pthread_mutex_unlock(&mutex);
    munmap(m->base, m->size);
    free(m);
}

static void * buffer_get_base(ggml_backend_buffer_t buffer) {
    return ((const struct memory *)buffer->context)->base;
}

static void buffer_memset_tensor(ggml_backend_buffer_t buffer, tsffn_tensor * tensor, uint8_t value, size_t offset,
                                 size_t size) {
    note_copy(buffer);
    begin_work();
    memset((char *)tensor->data + offset, value, size);
    end_work();
}

static void buffer_set_tensor(ggml_backend_buffer_t buffer, tsffn_tensor * tensor, const void * data, size_t offset,
                              size_t size) {
    note_copy(buffer);
    count(&counts.n_upload, 1);
    count(&counts.upload_bytes, (int64_t)size);
    begin_work();
    memcpy((char *)tensor->data + offset, data, size);
    end_work();
}

static void buffer_get_tensor(ggml_backend_buffer_t buffer, const tsffn_tensor * tensor, void * data, size_t offset,
                              size_t size) {
    note_copy(buffer);
    count(&counts.n_download, 1);
    count(&counts.download_bytes, (int64_t)size);
    begin_work();
    memcpy(data, (const char *)tensor->data + offset, size);
    end_work();
}

static bool buffer_cpy_tensor(ggml_backend_buffer_t buffer, const tsffn_tensor * src, tsffn_tensor * dst) {
    if (!is_ours(buffer_of(src))) {
        return false;
    }
    note_copy(buffer);
    count(&counts.n_device_copy, 1);
    begin_work();
    memcpy(dst->data, src->data, ggml_nbytes(src));
    end_work();
    return true;
}

static void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    note_copy(buffer);
    begin_work();
    memset(buffer_get_base(buffer), value, buffer->size);
    end_work();
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
    .cpy_tensor = buffer_cpy_tensor,
    .clear = buffer_clear,
    .reset = NULL,
};

static bool is_ours(ggml_backend_buffer_t buffer) {
    return buffer->iface.free_buffer == buffer_free;
}

// ---- buffer types: the device's memory, and host memory that it copies from and to

static size_t memory_bytes(void) {
    const char * bytes = getenv("FAKE_GPU_MEMORY");
    return bytes != NULL ? strtoull(bytes, NULL, 10) : (size_t)8 << 30;
}

static const char * buffer_type_get_name(ggml_backend_buffer_type_t type) {
    return gpu_of(type->device)->name;
}

static ggml_backend_buffer_t buffer_type_alloc_buffer(ggml_backend_buffer_type_t type, size_t size) {
    struct gpu * gpu = gpu_of(type->device);
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), n = (size + page) / page * page;
    struct memory * m = malloc(sizeof(*m));
    pthread_mutex_lock(&mutex);
    const bool fits = m != NULL && gpu->used_bytes + n <= memory_bytes();
    gpu->used_bytes += fits ? n : 0;
    pthread_mutex_unlock(&mutex);
    if (!fits) {
        ggml_log_internal(GGML_LOG_LEVEL_ERROR, "%s: out of memory: %zu bytes asked for\n", gpu->name, size);
        free(m);
        return NULL;
    }
    *m = (struct memory){.base = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), .size = n};
    if (m->base == MAP_FAILED) {
        fail("mmap", gpu->name);
    }
    memset(m->base, 0xff, n);
    pthread_mutex_lock(&mutex);
    m->next = memories;
    memories = m;
    if (n_working == 0) {
        mprotect(m->base, n, PROT_NONE);
    }
    pthread_mutex_unlock(&mutex);
    return ggml_backend_buffer_init(type, buffer_interface, m, size);
}

static size_t buffer_type_get_alignment(ggml_backend_buffer_type_t type) {
    (void)type;
    return ALIGNMENT;
}

// Rows of quantized weights end at a multiple of ROW_PADDING weights.
static size_t buffer_type_get_alloc_size(ggml_backend_buffer_type_t type, const tsffn_tensor * tensor) {
    (void)type;
    const int64_t over = ggml_is_quantized(tensor->type) ? tensor->ne[0] % ROW_PADDING : 0;
    return ggml_nbytes(tensor) + (over > 0 ? ggml_row_size(tensor->type, ROW_PADDING - over) : 0);
}

static const struct ggml_backend_buffer_type_i buffer_type_interface = {
    .get_name = buffer_type_get_name,
    .alloc_buffer = buffer_type_alloc_buffer,
    .get_alignment = buffer_type_get_alignment,
    .get_max_size = NULL,
    .get_alloc_size = buffer_type_get_alloc_size,
    .is_host = NULL, // it is not
};

static const char * host_buffer_type_get_name(ggml_backend_buffer_type_t type) {
    return gpu_of(type->device)->host_name;
}

static ggml_backend_buffer_t host_buffer_type_alloc_buffer(ggml_backend_buffer_type_t type, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (buffer != NULL) {
        buffer->buft = type;
    }
    return buffer;
}

static size_t host_buffer_type_get_alignment(ggml_backend_buffer_type_t type) {
    (void)type;
    return ggml_backend_buft_get_alignment(ggml_backend_cpu_buffer_type());
}

static bool host_buffer_type_is_host(ggml_backend_buffer_type_t type) {
    (void)type;
    return true;
}

static const struct ggml_backend_buffer_type_i host_buffer_type_interface = {
    .get_name = host_buffer_type_get_name,
    .alloc_buffer = host_buffer_type_alloc_buffer,
    .get_alignment = host_buffer_type_get_alignment,
    .get_max_size = NULL,
    .get_alloc_size = NULL,
    .is_host = host_buffer_type_is_host,
};

// ---- backend

static void begin_unfinished(struct stream * stream) {
    pthread_mutex_lock(&mutex);
    stream->gpu->n_unfinished += !stream->unfinished;
    stream->unfinished = true;
    pthread_mutex_unlock(&mutex);
}

static void finish(struct stream * stream) {
    pthread_mutex_lock(&mutex);
    stream->gpu->n_unfinished -= stream->unfinished;
    stream->unfinished = false;
    pthread_mutex_unlock(&mutex);
}

static const char * backend_get_name(ggml_backend_t backend) {
    return ((const struct stream *)backend->context)->gpu->name;
}

static void backend_free(ggml_backend_t backend) {
    struct stream * stream = backend->context;
    finish(stream);
    ggml_backend_free(stream->cpu);
    free(stream);
    free(backend);
}

static void check_type(ggml_backend_t backend, const tsffn_tensor * tensor) {
    if (buffer_of(tensor)->buft != &buffer_types[backend->device - devices]) {
        fail("asynchronous copy of a tensor in another buffer type", tensor->name);
    }
}

static void backend_set_tensor_async(ggml_backend_t backend, tsffn_tensor * tensor, const void * data, size_t offset,
                                     size_t size) {
    check_type(backend, tensor);
    count(&counts.n_async_upload, 1);
    begin_unfinished(backend->context);
    begin_work();
    memcpy((char *)tensor->data + offset, data, size);
    end_work();
}

static void backend_get_tensor_async(ggml_backend_t backend, const tsffn_tensor * tensor, void * data, size_t offset,
                                     size_t size) {
    check_type(backend, tensor);
    count(&counts.n_async_download, 1);
    begin_unfinished(backend->context);
    begin_work();
    memcpy(data, (const char *)tensor->data + offset, size);
    end_work();
}

static bool is_fake(ggml_backend_t backend) {
    return backend->iface.get_name == backend_get_name;
}

static bool backend_cpy_tensor_async(ggml_backend_t from, ggml_backend_t to, const tsffn_tensor * src,
                                     tsffn_tensor * dst) {
    if (!is_fake(from) || !is_fake(to) || !is_ours(buffer_of(src)) || !is_ours(buffer_of(dst))) {
        return false;
    }
    count(&counts.n_device_copy, 1);
    begin_unfinished(from->context);
    begin_work();
    memcpy(dst->data, src->data, ggml_nbytes(dst));
    end_work();
    return true;
}

static void backend_synchronize(ggml_backend_t backend) {
    count(&counts.n_synchronize, 1);
    finish(backend->context);
}

static bool is_computed(const tsffn_tensor * node) {
    return node->op != GGML_OP_NONE && node->op != GGML_OP_RESHAPE && node->op != GGML_OP_VIEW &&
           node->op != GGML_OP_PERMUTE && node->op != GGML_OP_TRANSPOSE && !ggml_is_empty(node);
}

static enum ggml_status backend_graph_compute(ggml_backend_t backend, struct ggml_cgraph * graph) {
    struct stream * stream = backend->context;
    const int n_nodes = ggml_graph_n_nodes(graph);
    for (int i = 0; i < n_nodes; ++i) {
        const tsffn_tensor * node = ggml_graph_node(graph, i);
        for (int j = is_computed(node) ? -1 : GGML_MAX_SRC; j < GGML_MAX_SRC; ++j) {
            const tsffn_tensor * t = j < 0 ? node : node->src[j];
            if (t != NULL && buffer_of(t) != NULL &&
                (!is_ours(buffer_of(t)) || buffer_of(t)->buft->device != backend->device)) {
                fail("a graph reads or writes memory that is not the device's", t->name);
            }
        }
    }
    count(&counts.n_graph, 1);
    count(&counts.n_node, n_nodes);
    begin_unfinished(stream);
    begin_work();
    const enum ggml_status status = ggml_backend_graph_compute(stream->cpu, graph);
    end_work();
    return status;
}

// ---- events, which the CUDA module on the host knows

static struct {
    void * (*event_new)(void);
    void (*event_free)(void * event);
    void (*event_await)(void * event);
} host;

static bool owns(const void * at, size_t bytes) {
    pthread_mutex_lock(&mutex);
    bool found = false;
    for (const struct memory * m = memories; m != NULL; m = m->next) {
        const size_t offset = (size_t)((const char *)at - (const char *)m->base);
        found = found || ((const char *)at >= (const char *)m->base && offset + bytes <= m->size);
    }
    pthread_mutex_unlock(&mutex);
    return found;
}

// Finds the module, which somebody has opened by now, if there is one.
static bool join_host(void) {
    const char * path = getenv("TSFFN_CUDA_MODULE");
    void * module = host.event_new == NULL && path != NULL ? dlopen(path, RTLD_NOW) : NULL;
    if (module != NULL) {
        static const struct {
            bool (*owns)(const void *, size_t);
            void (*begin)(void);
            void (*end)(void);
        } neighbour = {owns, begin_work, end_work};
        void (*join)(const void * neighbour);
        *(void **)&join = dlsym(module, "tsffn_host_join");
        *(void **)&host.event_new = dlsym(module, "tsffn_host_event_new");
        *(void **)&host.event_free = dlsym(module, "tsffn_host_event_free");
        *(void **)&host.event_await = dlsym(module, "tsffn_host_event_await");
        join(&neighbour);
    }
    return host.event_new != NULL;
}

static void backend_event_record(ggml_backend_t backend, ggml_backend_event_t event) {
    (void)backend; // computed already
    (void)event;
    count(&counts.n_event_record, 1);
}

static void backend_event_wait(ggml_backend_t backend, ggml_backend_event_t event) {
    (void)backend;
    count(&counts.n_event_wait, 1);
    if (event->context != NULL) {
        host.event_await(event->context);
    }
}

static const struct ggml_backend_i backend_interface = {
    .get_name = backend_get_name,
    .free = backend_free,
    .set_tensor_async = backend_set_tensor_async,
    .get_tensor_async = backend_get_tensor_async,
    .set_tensor_2d_async = NULL,
    .get_tensor_2d_async = NULL,
    .cpy_tensor_async = backend_cpy_tensor_async,
    .synchronize = backend_synchronize,
    .graph_plan_create = NULL,
    .graph_plan_free = NULL,
    .graph_plan_update = NULL,
    .graph_plan_compute = NULL,
    .graph_compute = backend_graph_compute,
    .event_record = backend_event_record,
    .event_wait = backend_event_wait,
    .graph_optimize = NULL,
};

// ---- device

static const char * device_get_name(ggml_backend_dev_t dev) {
    return gpu_of(dev)->name;
}

static const char * device_get_description(ggml_backend_dev_t dev) {
    (void)dev;
    return "a GPU that is none";
}

static void device_get_memory(ggml_backend_dev_t dev, size_t * free_bytes, size_t * total_bytes) {
    *total_bytes = memory_bytes();
    *free_bytes = *total_bytes - gpu_of(dev)->used_bytes;
}

static enum ggml_backend_dev_type device_get_type(ggml_backend_dev_t dev) {
    (void)dev;
    return GGML_BACKEND_DEVICE_TYPE_GPU;
}

static void device_get_props(ggml_backend_dev_t dev, struct ggml_backend_dev_props * props) {
    memset(props, 0, sizeof(*props));
    props->name = device_get_name(dev);
    props->description = device_get_description(dev);
    props->type = device_get_type(dev);
    device_get_memory(dev, &props->memory_free, &props->memory_total);
    props->caps.async = true;
    props->caps.host_buffer = true;
    props->caps.events = true;
}

static ggml_backend_t device_init_backend(ggml_backend_dev_t dev, const char * params) {
    static ggml_guid guid = {0x66, 0x61, 0x6b, 0x65, 0x2d, 0x67, 0x70, 0x75};
    (void)params;
    struct ggml_backend * backend = malloc(sizeof(*backend));
    struct stream * stream = malloc(sizeof(*stream));
    ggml_backend_t cpu = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, NULL);
    if (backend == NULL || stream == NULL || cpu == NULL) {
        fail("out of memory", gpu_of(dev)->name);
    }
    *stream = (struct stream){.cpu = cpu, .gpu = gpu_of(dev)};
    *backend = (struct ggml_backend){.guid = &guid, .iface = backend_interface, .device = dev, .context = stream};
    return backend;
}

static ggml_backend_buffer_type_t device_get_buffer_type(ggml_backend_dev_t dev) {
    return &buffer_types[dev - devices];
}

static ggml_backend_buffer_type_t device_get_host_buffer_type(ggml_backend_dev_t dev) {
    return &host_buffer_types[dev - devices];
}

static bool device_supports_op(ggml_backend_dev_t dev, const tsffn_tensor * op) {
    (void)dev;
    return ggml_backend_dev_supports_op(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), op);
}

static bool device_supports_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t type) {
    return type->iface.get_name == buffer_type_get_name && type->device == dev;
}

static bool device_offload_op(ggml_backend_dev_t dev, const tsffn_tensor * op) {
    (void)dev;
    const int64_t n = op->op == GGML_OP_MUL_MAT ? op->ne[1] : op->op == GGML_OP_MUL_MAT_ID ? op->ne[2] : 0;
    return n >= OFFLOAD_MIN_BATCH;
}

static ggml_backend_event_t device_event_new(ggml_backend_dev_t dev) {
    ggml_backend_event_t event = malloc(sizeof(*event));
    if (event != NULL) {
        *event = (struct ggml_backend_event){.device = dev, .context = join_host() ? host.event_new() : NULL};
    }
    return event;
}

static void device_event_free(ggml_backend_dev_t dev, ggml_backend_event_t event) {
    (void)dev;
    if (event->context != NULL) {
        host.event_free(event->context);
    }
    free(event);
}

static void device_event_synchronize(ggml_backend_dev_t dev, ggml_backend_event_t event) {
    (void)dev;
    count(&counts.n_synchronize, 1);
    if (event->context != NULL) {
        finish(event->context);
    }
}

static const struct ggml_backend_device_i device_interface = {
    .get_name = device_get_name,
    .get_description = device_get_description,
    .get_memory = device_get_memory,
    .get_type = device_get_type,
    .get_props = device_get_props,
    .init_backend = device_init_backend,
    .get_buffer_type = device_get_buffer_type,
    .get_host_buffer_type = device_get_host_buffer_type,
    .buffer_from_host_ptr = NULL,
    .supports_op = device_supports_op,
    .supports_buft = device_supports_buft,
    .offload_op = device_offload_op,
    .event_new = device_event_new,
    .event_free = device_event_free,
    .event_synchronize = device_event_synchronize,
};

// ---- registration

static const char * reg_get_name(ggml_backend_reg_t reg) {
    (void)reg;
    return "FAKE";
}

static size_t reg_get_device_count(ggml_backend_reg_t reg) {
    (void)reg;
    const char * n = getenv("FAKE_GPU_DEVICES");
    return n != NULL && atoi(n) < MAX_DEVICES ? (size_t)atoi(n) : 1;
}

static ggml_backend_dev_t reg_get_device(ggml_backend_reg_t reg, size_t index) {
    return index < reg_get_device_count(reg) ? &devices[index] : NULL;
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

// Returns the counters, and sets them to zero.
EXPORT struct fake_gpu_counts fake_gpu_take_counts(void);
struct fake_gpu_counts fake_gpu_take_counts(void) {
    const struct fake_gpu_counts taken = counts;
    counts = (struct fake_gpu_counts){0};
    return taken;
}

EXPORT ggml_backend_reg_t ggml_backend_init(void);
ggml_backend_reg_t ggml_backend_init(void) {
    for (int i = 0; i < MAX_DEVICES; ++i) {
        snprintf(gpus[i].name, sizeof(gpus[i].name), "FAKE%d", i);
        snprintf(gpus[i].host_name, sizeof(gpus[i].host_name), "FAKE%d_Host", i);
        devices[i] = (struct ggml_backend_device){device_interface, &registration, &gpus[i]};
        buffer_types[i] = (struct ggml_backend_buffer_type){buffer_type_interface, &devices[i], NULL};
        host_buffer_types[i] = (struct ggml_backend_buffer_type){host_buffer_type_interface, &devices[i], NULL};
    }
    struct sigaction action = {.sa_sigaction = on_segmentation_fault, .sa_flags = SA_SIGINFO};
    sigaction(SIGSEGV, &action, &action_before);
    return &registration;
}
