// A device with one layer on it, that computes calls.
#ifndef TSFFN_TEST_CUDA_HARNESS_H
#define TSFFN_TEST_CUDA_HARNESS_H

#include "cuda/load.h"
#include "reference.h"

#include <dlfcn.h>

enum { MAX_TOKENS = 8, MAX_ROWS = 16 };

// Of the host's CUDA (runtime.cpp); on a GPU they do nothing, and is_host is false.
static bool is_host;
static void (*host_fail)(int call, int for_good);
static double (*host_mma_error)(void);
static void (*host_limits)(size_t device_bytes, size_t shared_bytes);
static int (*host_allocations)(void);

static int no_allocations(void) {
    return 0;
}
static void no_limits(size_t device_bytes, size_t shared_bytes) {
    (void)device_bytes;
    (void)shared_bytes;
}

static const struct tsffn_cuda_module * module;
static char error[256];

static void load(const char * path) {
    module = tsffn_cuda_load(path, error, sizeof(error));
    CHECK(module != NULL, "%s", error);
    void * library = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    *(void **)&host_fail = dlsym(library, "tsffn_host_fail");
    *(void **)&host_mma_error = dlsym(library, "tsffn_host_mma_error");
    *(void **)&host_limits = dlsym(library, "tsffn_host_limits");
    *(void **)&host_allocations = dlsym(library, "tsffn_host_allocations");
    is_host = strcmp(module->name, "host") == 0;
    CHECK(!is_host || (host_mma_error != NULL && host_fail != NULL && host_limits != NULL && host_allocations != NULL),
          "%s is not of the host", path);
    host_limits = is_host ? host_limits : no_limits;
    host_allocations = is_host ? host_allocations : no_allocations;
}

// ---- a call

// A device with one layer on it, and a queue.
struct device {
    struct tsffn_cuda * cuda;
    struct tsffn_cuda_layer * layer;
    struct tsffn_cuda_queue * queue;
    size_t arena_bytes;
    int64_t n_prefill; // rows of a call of prefill; 0: of calls of a few rows
};

static void close_device(struct device * d) {
    module->close_queue(d->queue);
    module->release(d->layer);
    module->close(d->cuda);
    *d = (struct device){0};
}

// False with a line in `error`: then some of it is open.
static inline bool open_device_for(const struct random_layer * made, const struct tsffn_range * ranges, bool predictor,
                                   int64_t n_prefill, struct device * d) {
    const struct tsffn_layer * layer = &made->layer;
    struct tsffn_cuda_sizes sizes = {
        .n_embd = layer->n_embd,
        .n_ff = layer->n_ff,
        .n_tokens = n_prefill > 0 ? n_prefill : MAX_TOKENS,
        .n_rows = n_prefill > 0 ? n_prefill : MAX_ROWS,
        .prefill = n_prefill > 0,
        .n_ffns = layer->n_ffns,
        .neuron_bytes = module->neuron_bytes(layer),
    };
    for (int64_t e = 0; e < layer->n_ffns; ++e) {
        const int64_t rank = made->ffns[e].fc1.n_rows;
        sizes.max_rank = rank > sizes.max_rank ? rank : sizes.max_rank;
    }
    struct tsffn_cuda_info info;
    *d = (struct device){.arena_bytes = module->layer_bytes(layer, ranges, predictor, error, sizeof(error)),
                         .n_prefill = n_prefill};
    CHECK(d->arena_bytes > 0, "%s", error);
    d->cuda = module->open(0, d->arena_bytes, &info, error, sizeof(error));
    d->layer = d->cuda != NULL ? module->upload(d->cuda, layer, ranges, predictor, error, sizeof(error)) : NULL;
    d->queue = d->layer != NULL ? module->open_queue(d->cuda, &sizes, error, sizeof(error)) : NULL;
    return d->queue != NULL;
}

static inline bool open_device(const struct random_layer * made, const struct tsffn_range * ranges, bool predictor,
                               struct device * d) {
    return open_device_for(made, ranges, predictor, 0, d);
}

struct results {
    uint32_t * masks; // [n_rows][words]
    float *y, *h;     // [n_rows][n_embd], [n_rows][n_ff]
    struct tsffn_row * rows;
    struct tsffn_counts counts;
};

static size_t mask_words(const struct tsffn_layer * layer) {
    return (size_t)tsffn_mask_words(layer->n_ff);
}

static struct results new_results_for(const struct tsffn_layer * layer, size_t n_rows) {
    struct results r = {
        .masks = allocate(n_rows * mask_words(layer) * sizeof(uint32_t)),
        .y = allocate(n_rows * (size_t)layer->n_embd * sizeof(float)),
        .h = allocate(n_rows * (size_t)layer->n_ff * sizeof(float)),
        .rows = allocate(n_rows * sizeof(struct tsffn_row)),
    };
    return r;
}

static struct results new_results(const struct tsffn_layer * layer) {
    return new_results_for(layer, MAX_ROWS);
}

static void free_results(struct results * r) {
    free(r->masks);
    free(r->y);
    free(r->h);
    free(r->rows);
}

// The rows of a call of n_tokens tokens, two experts each in a layer of experts. Returns how many.
static int64_t make_rows(const struct tsffn_layer * layer, int64_t n_tokens, struct results * r) {
    int64_t n = 0;
    for (int32_t e = 0; e < layer->n_ffns; ++e) {
        for (int32_t t = 0; t < n_tokens; ++t) {
            if (layer->n_ffns == 1 || t % layer->n_ffns == e || (t + 1) % layer->n_ffns == e) {
                r->rows[n] = (struct tsffn_row){
                    .ffn = e, .token = t, .y = r->y + n * layer->n_embd, .h = r->h + n * layer->n_ff};
                n += 1;
            }
        }
    }
    return n;
}

// What the device leaves to the caller: y of the neurons outside of the layer's ranges.
static void compute_others(const struct random_layer * made, const struct tsffn_range * ranges, const float * x,
                           const struct results * r, int64_t n_rows, float * others) {
    const struct tsffn_layer * layer = &made->layer;
    double *y = allocate((size_t)layer->n_embd * sizeof(*y)), *h = allocate((size_t)layer->n_ff * sizeof(*h));
    for (int64_t i = 0; i < n_rows; ++i) {
        const struct tsffn_range * range = &ranges[r->rows[i].ffn];
        const float * row_x = x + r->rows[i].token * layer->n_embd;
        const uint32_t * mask = r->masks + (size_t)i * mask_words(layer);
        memset(y, 0, (size_t)layer->n_embd * sizeof(*y));
        compute_double(made, r->rows[i].ffn, row_x, true, mask, 0, range->first, h, y);
        compute_double(made, r->rows[i].ffn, row_x, true, mask, range->end, layer->n_ff, h, y);
        for (int64_t j = 0; j < layer->n_embd; ++j) {
            others[i * layer->n_embd + j] = (float)y[j];
        }
        for (int64_t k = 0; r->rows[i].h != NULL && k < layer->n_ff; ++k) {
            if (k < range->first || k >= range->end) {
                r->rows[i].h[k] = (float)h[k];
            }
        }
    }
    free(y);
    free(h);
}

// Each in turn: threads of the caller's are tested where it has some.
static void run_one_by_one(int n_threads, int64_t n, void (*body)(void * context, int64_t i), void * context) {
    (void)n_threads;
    for (int64_t i = n - 1; i >= 0; --i) {
        body(context, i);
    }
}

// What the device does not have: it is streamed, or the caller's.
static bool add_others(const struct device * d, const struct random_layer * made, const struct tsffn_range * ranges,
                       const float * x, int64_t n_rows, bool streams, struct results * r) {
    const struct tsffn_cuda_workers workers = {run_one_by_one, 1};
    size_t bytes = 1;
    if (streams) {
        return module->stream(d->queue, &made->layer, &workers, &bytes, error, sizeof(error)) &&
               bytes % module->neuron_bytes(&made->layer) == 0 && module->end(d->queue, NULL, error, sizeof(error));
    }
    float * others = allocate((size_t)(n_rows * made->layer.n_embd) * sizeof(float));
    compute_others(made, ranges, x, r, n_rows, others);
    const bool ok = module->end(d->queue, others, error, sizeof(error));
    free(others);
    return ok;
}

// Computes a call from beginning to end. False with a line in `error`.
static bool compute_all(const struct device * d, const struct random_layer * made, const struct tsffn_range * ranges,
                        const float * x, int64_t n_tokens, int64_t n_rows, const uint32_t * masks, bool streams,
                        struct results * r) {
    const struct tsffn_layer * layer = &made->layer;
    const size_t mask_bytes = (size_t)n_rows * mask_words(layer) * sizeof(uint32_t);
    const struct tsffn_call call = {
        .op = TSFFN_OP_FUSED,
        .rows = r->rows,
        .n_rows = n_rows,
        .x = (const char *)x,
        .x_stride = (size_t)layer->n_embd * sizeof(float),
        .n_tokens = n_tokens,
    };
    r->counts = (struct tsffn_counts){0};
    if (!module->begin(d->queue, d->layer, &call, masks, NULL, error, sizeof(error))) {
        return false;
    }
    const float * copied_x;
    const uint32_t * on = module->await_masks(d->queue, &copied_x, error, sizeof(error));
    if (on == NULL) {
        return false;
    }
    memcpy(r->masks, on, mask_bytes);
    const bool ok = add_others(d, made, ranges, x, n_rows, streams, r);
    int done = 0;
    while (ok && (done = module->poll(d->queue, error, sizeof(error))) == 0) {
    }
    return ok && done == 1 && module->await(d->queue, &r->counts, error, sizeof(error));
}

static bool compute(const struct device * d, const struct random_layer * made, const struct tsffn_range * ranges,
                    const float * x, int64_t n_tokens, int64_t n_rows, const uint32_t * masks, struct results * r) {
    return compute_all(d, made, ranges, x, n_tokens, n_rows, masks, false, r);
}

#endif
