#include "hybrid.h"

#include "../cuda/load.h"
#include "../error.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    // Of a call: sums of so many rows are kept apart on the GPU before they are added. Longer ones are prefill.
    MAX_ROWS = 16,
    MAX_TRIES = 12, // for memory, each with an eighth less
};
#define MAX_NMSE 1e-3 // of a layer's y, the GPU's to the CPU's

struct tsffn_hybrid {
    const struct tsffn_cuda_module * module;
    struct tsffn_cuda * cuda;
    struct tsffn_cuda_queue * queue;
    const struct tsffn_layer * layers; // [n_layer]
    struct tsffn_cuda_layer ** on_gpu; // [n_layer], NULL where nothing of the layer is there
    struct tsffn_plan plan;
    pthread_mutex_t mutex; // of the queue, and what a call needs of the host:
    float * others;        // [MAX_ROWS][n_embd] the CPU's sums
    float * expected;      // [MAX_ROWS][n_embd] y of a call that is compared
    bool * compared;       // [n_layer]
    uint32_t * masks;      // [MAX_ROWS][mask words] of a predictor that the CPU computes
    struct tsffn_row rows[MAX_ROWS];
    struct tsffn_hybrid_counter counter;
    bool is_pending; // the queue computes a resident call of this layer
    int64_t pending;
    uint64_t ns_pending; // that was waited for it until now
    bool is_lost;        // one of these failed, and nobody was told
    atomic_bool failed;  // from now on the CPU computes everything
    bool complained;
    char complaint[512];
};

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

// ---- opening

static struct tsffn_cuda_sizes sizes_of(const struct tsffn_layer * layers, int64_t n_layer) {
    struct tsffn_cuda_sizes sizes = {
        .n_embd = layers[0].n_embd,
        .n_ff = layers[0].n_ff,
        .n_tokens = MAX_ROWS,
        .n_rows = MAX_ROWS,
    };
    for (int64_t i = 0; i < n_layer; ++i) {
        for (int64_t e = 0; e < layers[i].n_ffns; ++e) {
            const int64_t rank = layers[i].ffns[e].fc1.data != NULL ? layers[i].ffns[e].fc1.n_rows : 0;
            sizes.max_rank = rank > sizes.max_rank ? rank : sizes.max_rank;
        }
    }
    return sizes;
}

// Plans for `bytes` and takes them. False with a line in `error`; *too_much: less might be there.
static bool open_with(struct tsffn_hybrid * h, int device, int64_t n_layer, size_t bytes, const int32_t * hot,
                      struct tsffn_gpu_share * share, bool * too_much, char * error, size_t error_size) {
    const struct tsffn_cuda_sizes sizes = sizes_of(h->layers, n_layer);
    const size_t of_queue = h->module->queue_bytes(&sizes);
    *too_much = false;
    if (bytes < of_queue) {
        return tsffn_fail(error, error_size, "GPU memory: expected at least the %zu bytes that a call takes, found %zu",
                          of_queue, bytes);
    }
    if (!tsffn_plan_make(&h->plan, h->module, h->layers, n_layer, bytes - of_queue, hot, error, error_size)) {
        return false;
    }
    struct tsffn_cuda_info info;
    *too_much = true;
    h->cuda = h->module->open(device, h->plan.bytes, &info, error, error_size);
    memcpy(share->name, info.name, sizeof(share->name));
    share->capability = info.capability;
    h->queue = h->cuda != NULL ? h->module->open_queue(h->cuda, &sizes, error, error_size) : NULL;
    if (h->queue != NULL) {
        share->bytes = h->plan.bytes + of_queue;
        return true;
    }
    // Without free memory there is no device at all.
    *too_much = info.total_bytes != 0 && info.free_bytes < bytes + bytes / 8;
    h->module->close(h->cuda);
    h->cuda = NULL;
    tsffn_plan_free(&h->plan);
    return false;
}

static void count_share(const struct tsffn_hybrid * h, struct tsffn_gpu_share * share) {
    for (int64_t i = 0; i < h->plan.n_layer; ++i) {
        const struct tsffn_layer * layer = &h->layers[i];
        share->predictors += h->plan.predictor[i];
        share->n_predictors += tsffn_has_predictor(layer);
        share->n_neurons += (uint64_t)(layer->n_ffns * layer->n_ff);
        for (int64_t e = 0; e < layer->n_ffns; ++e) {
            share->neurons += (uint64_t)h->plan.range[i * layer->n_ffns + e].end;
        }
    }
}

struct tsffn_hybrid * tsffn_hybrid_open(int device, const struct tsffn_layer * layers, int64_t n_layer, size_t bytes,
                                        const int32_t * hot, struct tsffn_hybrid_counter counter,
                                        struct tsffn_gpu_share * share, char * error, size_t error_size) {
    *share = (struct tsffn_gpu_share){0};
    const struct tsffn_cuda_module * module = tsffn_cuda_module_in_use(error, error_size);
    if (module == NULL) {
        return NULL;
    }
    struct tsffn_hybrid * h = calloc(1, sizeof(*h));
    if (h == NULL) {
        tsffn_fail(error, error_size, "out of memory");
        return NULL;
    }
    h->module = module;
    h->layers = layers;
    h->counter = counter;
    pthread_mutex_init(&h->mutex, NULL);
    const size_t n_embd = (size_t)layers[0].n_embd, words = (size_t)tsffn_mask_words(layers[0].n_ff);
    h->on_gpu = calloc((size_t)n_layer, sizeof(*h->on_gpu));
    h->others = calloc(MAX_ROWS * n_embd, sizeof(*h->others));
    h->expected = calloc(MAX_ROWS * n_embd, sizeof(*h->expected));
    h->compared = calloc((size_t)n_layer, sizeof(*h->compared));
    h->masks = calloc(MAX_ROWS * words, sizeof(*h->masks));
    bool ok = h->on_gpu != NULL && h->others != NULL && h->expected != NULL && h->compared != NULL && h->masks != NULL;
    if (!ok) {
        tsffn_fail(error, error_size, "out of memory");
    }
    bool opened = false, again = ok;
    for (int k = 0; again && !opened && k < MAX_TRIES; ++k, bytes -= bytes / 8) {
        opened = open_with(h, device, n_layer, bytes, hot, share, &again, error, error_size);
    }
    if (!opened) {
        tsffn_hybrid_free(h);
        return NULL;
    }
    count_share(h, share);
    return h;
}

void tsffn_hybrid_free(struct tsffn_hybrid * h) {
    if (h == NULL) {
        return;
    }
    h->module->close_queue(h->queue);
    for (int64_t i = 0; h->on_gpu != NULL && i < h->plan.n_layer; ++i) {
        h->module->release(h->on_gpu[i]);
    }
    h->module->close(h->cuda);
    tsffn_plan_free(&h->plan);
    pthread_mutex_destroy(&h->mutex);
    free(h->on_gpu);
    free(h->others);
    free(h->expected);
    free(h->compared);
    free(h->masks);
    free(h);
}

// ---- layers

static const struct tsffn_range * ranges_of(const struct tsffn_hybrid * h, int64_t layer) {
    return h->plan.range + layer * h->layers[layer].n_ffns;
}

int64_t tsffn_hybrid_neurons(const struct tsffn_hybrid * h, int64_t layer, int64_t ffn) {
    return ranges_of(h, layer)[ffn].end;
}

size_t tsffn_hybrid_layer_bytes(const struct tsffn_hybrid * h, int64_t layer) {
    return tsffn_plan_layer_bytes(&h->plan, h->module, h->layers, layer);
}

bool tsffn_hybrid_upload(struct tsffn_hybrid * h, int64_t layer, char * error, size_t error_size) {
    if (tsffn_hybrid_layer_bytes(h, layer) == 0) {
        return true;
    }
    h->on_gpu[layer] =
        h->module->upload(h->cuda, &h->layers[layer], ranges_of(h, layer), h->plan.predictor[layer], error, error_size);
    return h->on_gpu[layer] != NULL;
}

// ---- calls

bool tsffn_hybrid_takes(const struct tsffn_hybrid * h, int64_t layer, const struct tsffn_call * call) {
    return h->on_gpu[layer] != NULL && call->op == TSFFN_OP_FUSED && !call->dense && call->keep == 0 &&
           call->profile == NULL && call->n_rows > 0 && call->n_rows <= MAX_ROWS && call->n_tokens <= MAX_ROWS &&
           !atomic_load(&h->failed);
}

const char * tsffn_hybrid_complaint(struct tsffn_hybrid * h) {
    if (!atomic_load(&h->failed)) {
        return NULL;
    }
    pthread_mutex_lock(&h->mutex);
    const bool is_new = !h->complained;
    h->complained = true;
    pthread_mutex_unlock(&h->mutex);
    return is_new ? h->complaint : NULL;
}

// The parts of a call that is shared.
struct sharing {
    struct tsffn_hybrid * h;
    const struct tsffn_layer * layer;
    struct tsffn_cuda_layer * on_gpu;
    const struct tsffn_range * ranges; // [n_ffns]
    const struct tsffn_hybrid_host * host;
    const struct tsffn_call * call;
    const struct tsffn_cuda_resident * resident; // NULL: x and y are the host's
    const float * x;                             // the host's copy of a resident x
    struct tsffn_counts * counts;
    char error[512];
};

static bool compute_on_host(const struct sharing * s, const struct tsffn_call * call) {
    return s->host->device->compute(s->host->scratch, s->host->prepared, call, s->counts);
}

// Whether all neurons of all FFNs of the call are the GPU's.
static bool is_complete(const struct sharing * s) {
    for (int64_t r = 0; r < s->call->n_rows; ++r) {
        if (s->ranges[s->call->rows[r].ffn].end < s->layer->n_ff) {
            return false;
        }
    }
    return true;
}

// The call, with y in `y` [n_rows][n_embd].
static struct tsffn_call call_into(const struct sharing * s, float * y) {
    struct tsffn_row * rows = s->h->rows;
    struct tsffn_call call = *s->call;
    memcpy(rows, s->call->rows, (size_t)call.n_rows * sizeof(rows[0]));
    for (int64_t r = 0; r < call.n_rows; ++r) {
        rows[r].y = y + r * s->layer->n_embd;
    }
    call.rows = rows;
    return call;
}

// The neurons that the GPU does not have, into h->others.
static bool compute_others(struct sharing * s, const uint32_t * masks) {
    struct tsffn_call call = call_into(s, s->h->others);
    call.elsewhere = s->ranges;
    call.masks = masks;
    if (s->resident != NULL) {
        call.x = (const char *)s->x;
        call.x_stride = (size_t)s->layer->n_embd * sizeof(float);
    }
    return compute_on_host(s, &call);
}

// All neurons, into h->expected. What it counts is dropped.
static bool compute_expected(const struct sharing * s) {
    const struct tsffn_call call = call_into(s, s->h->expected);
    struct tsffn_counts dropped = {0};
    return s->host->device->compute(s->host->scratch, s->host->prepared, &call, &dropped);
}

// Whether y is what was expected, but for rounding and neurons whose logit is at the threshold. Not a number is not.
static bool is_as_expected(const struct sharing * s) {
    double error = 0.0, size = 0.0;
    for (int64_t r = 0; r < s->call->n_rows; ++r) {
        for (int64_t j = 0; j < s->layer->n_embd; ++j) {
            const double expected = (double)s->h->expected[r * s->layer->n_embd + j];
            const double difference = (double)s->call->rows[r].y[j] - expected;
            error += difference * difference;
            size += expected * expected;
        }
    }
    return error <= MAX_NMSE * size;
}

enum outcome {
    DONE,
    NO_MEMORY,
    GPU_FAILED, // nothing is written
    WRONG,      // it failed, and y is what the CPU computed
};

// With the queue for itself. y is written when it is DONE.
static enum outcome share_call(struct sharing * s, struct tsffn_counts * of_gpu, uint64_t * ns_waiting) {
    struct tsffn_hybrid * h = s->h;
    const struct tsffn_cuda_module * module = h->module;
    const bool has_predictor = tsffn_has_predictor(s->layer);
    const bool predicts = has_predictor && h->plan.predictor[s->layer - h->layers];
    const uint32_t * masks = NULL;
    if (has_predictor && !predicts) {
        struct tsffn_call call = *s->call;
        call.op = TSFFN_OP_MASK;
        call.predicted = h->masks;
        if (!compute_on_host(s, &call)) {
            return NO_MEMORY;
        }
        masks = h->masks;
    }
    uint64_t begin = now_ns();
    if (!module->begin(h->queue, s->on_gpu, s->call, masks, s->resident, s->error, sizeof(s->error))) {
        return GPU_FAILED;
    }
    const bool complete = is_complete(s);
    if (!complete && (predicts || s->resident != NULL)) {
        const uint32_t * found = module->await_masks(h->queue, &s->x, s->error, sizeof(s->error));
        if (found == NULL) {
            return GPU_FAILED;
        }
        masks = predicts ? found : masks;
    }
    *ns_waiting += now_ns() - begin;
    const bool computed = complete || compute_others(s, masks);
    begin = now_ns();
    if (!module->end(h->queue, computed && !complete ? h->others : NULL, s->error, sizeof(s->error)) ||
        (s->resident == NULL && !module->await(h->queue, of_gpu, s->error, sizeof(s->error)))) {
        return GPU_FAILED;
    }
    *ns_waiting += now_ns() - begin;
    return computed ? DONE : NO_MEMORY;
}

// share_call, whose result is compared the first time.
static enum outcome compare_and_share(struct sharing * s, struct tsffn_counts * of_gpu, uint64_t * ns_waiting) {
    struct tsffn_hybrid * h = s->h;
    bool * compared = &h->compared[s->layer - h->layers];
    if (*compared) {
        return share_call(s, of_gpu, ns_waiting);
    }
    if (!compute_expected(s)) { // before y is written, which may be where x is
        return NO_MEMORY;
    }
    const enum outcome outcome = share_call(s, of_gpu, ns_waiting);
    *compared = outcome == DONE;
    if (outcome != DONE || is_as_expected(s)) {
        return outcome;
    }
    for (int64_t r = 0; r < s->call->n_rows; ++r) {
        memcpy(s->call->rows[r].y, h->expected + r * s->layer->n_embd, (size_t)s->layer->n_embd * sizeof(float));
    }
    tsffn_fail(s->error, sizeof(s->error), "CUDA: layer %d: the GPU's results are wrong", (int)(s->layer - h->layers));
    return WRONG;
}

// From now on the CPU computes everything; the first reason is kept.
static void give_up(struct tsffn_hybrid * h, const char * error) {
    if (!atomic_load(&h->failed)) {
        tsffn_fail(h->complaint, sizeof(h->complaint), "%s: from now on the CPU computes all neurons", error);
        atomic_store(&h->failed, true);
    }
}

static struct tsffn_hybrid_counts take_gpu_counts(struct tsffn_counts * of_gpu, uint64_t ns_waiting) {
    const struct tsffn_hybrid_counts gpu = {
        .took_part = true,
        .neurons = of_gpu->neurons,
        .active = of_gpu->active,
        .bytes = of_gpu->bytes_predictor + of_gpu->bytes_ffn,
        .ns_gpu = of_gpu->ns_ffn,
        .ns_waiting = ns_waiting,
    };
    of_gpu->ns_ffn = 0; // the caller's time is counted there
    return gpu;
}

// With the mutex: ends the resident call that the queue computes.
static bool finish(struct tsffn_hybrid * h) {
    if (!h->is_pending) {
        return true;
    }
    struct tsffn_counts of_gpu = {0};
    char error[512];
    h->is_pending = false;
    const uint64_t begin = now_ns();
    if (!h->module->await(h->queue, &of_gpu, error, sizeof(error))) {
        give_up(h, error);
        h->is_lost = true;
        return false;
    }
    const struct tsffn_hybrid_counts gpu = take_gpu_counts(&of_gpu, h->ns_pending + now_ns() - begin);
    h->counter.add(h->counter.context, h->pending, &of_gpu, &gpu);
    return true;
}

bool tsffn_hybrid_finish(struct tsffn_hybrid * h) {
    pthread_mutex_lock(&h->mutex);
    finish(h);
    const bool ok = !h->is_lost;
    h->is_lost = false;
    pthread_mutex_unlock(&h->mutex);
    return ok;
}

static struct sharing sharing_of(struct tsffn_hybrid * h, int64_t layer, const struct tsffn_hybrid_host * host,
                                 const struct tsffn_call * call, struct tsffn_counts * counts) {
    return (struct sharing){
        .h = h,
        .layer = &h->layers[layer],
        .on_gpu = h->on_gpu[layer],
        .ranges = ranges_of(h, layer),
        .host = host,
        .call = call,
        .counts = counts,
    };
}

bool tsffn_hybrid_compute(struct tsffn_hybrid * h, int64_t layer, const struct tsffn_hybrid_host * host,
                          const struct tsffn_call * call, struct tsffn_counts * counts,
                          struct tsffn_hybrid_counts * gpu) {
    struct tsffn_counts of_gpu = {0}, both = {0};
    uint64_t ns_waiting = 0;
    struct sharing s = sharing_of(h, layer, host, call, &both);
    pthread_mutex_lock(&h->mutex);
    const bool works = finish(h) && !atomic_load(&h->failed);
    const enum outcome outcome = works ? compare_and_share(&s, &of_gpu, &ns_waiting) : GPU_FAILED;
    if (works && (outcome == GPU_FAILED || outcome == WRONG)) {
        give_up(h, s.error);
    }
    pthread_mutex_unlock(&h->mutex);
    *gpu = (struct tsffn_hybrid_counts){0};
    if (outcome == GPU_FAILED) {
        return host->device->compute(host->scratch, host->prepared, call, counts);
    }
    *gpu = take_gpu_counts(&of_gpu, ns_waiting);
    tsffn_add_counts(counts, &both);
    tsffn_add_counts(counts, &of_gpu);
    return outcome != NO_MEMORY;
}

// ---- calls in the GPU's memory

bool tsffn_hybrid_takes_resident(const struct tsffn_hybrid * h, int64_t layer, const struct tsffn_call * call) {
    const bool has_predictor = tsffn_has_predictor(&h->layers[layer]);
    return tsffn_hybrid_takes(h, layer, call) && h->compared[layer] && (!has_predictor || h->plan.predictor[layer]);
}

bool tsffn_hybrid_compute_resident(struct tsffn_hybrid * h, int64_t layer, const struct tsffn_hybrid_host * host,
                                   const struct tsffn_call * call, const struct tsffn_cuda_resident * resident,
                                   struct tsffn_counts * counts) {
    struct tsffn_counts of_gpu = {0}, both = {0};
    uint64_t ns_waiting = 0;
    struct sharing s = sharing_of(h, layer, host, call, &both);
    s.resident = resident;
    pthread_mutex_lock(&h->mutex);
    const bool works = finish(h) && !atomic_load(&h->failed);
    const enum outcome outcome = works ? share_call(&s, &of_gpu, &ns_waiting) : GPU_FAILED;
    if (works && outcome == GPU_FAILED) {
        give_up(h, s.error);
    }
    h->is_pending = outcome != GPU_FAILED;
    h->pending = layer;
    h->ns_pending = ns_waiting;
    pthread_mutex_unlock(&h->mutex);
    tsffn_add_counts(counts, &both);
    return outcome == DONE;
}

bool tsffn_hybrid_fetch(struct tsffn_hybrid * h, void * ready, const void * from, void * to, size_t bytes) {
    char error[512];
    pthread_mutex_lock(&h->mutex);
    bool ok = finish(h) && !atomic_load(&h->failed);
    if (ok && !h->module->fetch(h->queue, ready, from, to, bytes, error, sizeof(error))) {
        give_up(h, error);
        ok = false;
    }
    pthread_mutex_unlock(&h->mutex);
    return ok;
}
