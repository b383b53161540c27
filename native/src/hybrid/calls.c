// Calls that the GPU and the CPU share.
#include "state.h"

#include "../error.h"

#include <string.h>
#include <time.h>

#define MAX_NMSE 1e-3 // of a layer's y, the GPU's to the CPU's

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static const struct tsffn_range * ranges_of(const struct tsffn_hybrid * h, int64_t layer) {
    return h->plan.range + layer * h->layers[layer].n_ffns;
}

static bool is_small(const struct tsffn_call * call) {
    return call->n_rows <= MAX_ROWS && call->n_tokens <= MAX_ROWS;
}

bool tsffn_hybrid_takes(const struct tsffn_hybrid * h, int64_t layer, const struct tsffn_call * call) {
    return h->on_gpu[layer] != NULL && call->op == TSFFN_OP_FUSED && !call->dense && call->keep == 0 &&
           call->profile == NULL && call->n_rows > 0 && (is_small(call) || tsffn_prefill_takes(h, call)) &&
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

bool tsffn_compute_expected(const struct sharing * s, const struct tsffn_row * rows, int64_t n) {
    struct tsffn_row into[MAX_ROWS];
    struct tsffn_call call = *s->call;
    for (int64_t r = 0; r < n; ++r) {
        into[r] = rows[r];
        into[r].y = s->h->expected + r * s->layer->n_embd;
    }
    call.rows = into;
    call.n_rows = n;
    struct tsffn_counts dropped = {0};
    return s->host->device->compute(s->host->scratch, s->host->prepared, &call, &dropped);
}

bool tsffn_is_as_expected(const struct sharing * s, const struct tsffn_row * rows, int64_t n) {
    double error = 0.0, size = 0.0;
    for (int64_t r = 0; r < n; ++r) {
        for (int64_t j = 0; j < s->layer->n_embd; ++j) {
            const double expected = (double)s->h->expected[r * s->layer->n_embd + j];
            const double difference = (double)rows[r].y[j] - expected;
            error += difference * difference;
            size += expected * expected;
        }
    }
    return error <= MAX_NMSE * size;
}

enum outcome tsffn_complain_of_results(struct sharing * s) {
    tsffn_fail(s->error, sizeof(s->error), "CUDA: layer %d: the GPU's results are wrong",
               (int)(s->layer - s->h->layers));
    return WRONG;
}

static void run_workers(int n_threads, int64_t n, void (*body)(void * context, int64_t i), void * context) {
#pragma omp parallel for num_threads(n_threads) schedule(dynamic)
    for (int64_t i = 0; i < n; ++i) {
        body(context, i);
    }
}

enum outcome tsffn_share_call(struct sharing * s, struct tsffn_counts * of_gpu, uint64_t * ns_waiting) {
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
    if (!module->begin(s->queue, s->on_gpu, s->call, masks, s->resident, s->error, sizeof(s->error))) {
        return GPU_FAILED;
    }
    const bool streams = s->streams && !is_complete(s), complete = streams || is_complete(s);
    if (streams) {
        const struct tsffn_cuda_workers workers = {run_workers, s->call->n_threads};
        size_t bytes = 0;
        if (!module->stream(s->queue, s->layer, &workers, &bytes, s->error, sizeof(s->error))) {
            return GPU_FAILED;
        }
        s->bytes_streamed += bytes;
    } else if (!complete && (predicts || s->resident != NULL)) {
        const uint32_t * found = module->await_masks(s->queue, &s->x, s->error, sizeof(s->error));
        if (found == NULL) {
            return GPU_FAILED;
        }
        masks = predicts ? found : masks;
    }
    *ns_waiting += now_ns() - begin;
    const bool computed = complete || compute_others(s, masks);
    begin = now_ns();
    if (!module->end(s->queue, computed && !complete ? h->others : NULL, s->error, sizeof(s->error)) ||
        (s->resident == NULL && !module->await(s->queue, of_gpu, s->error, sizeof(s->error)))) {
        return GPU_FAILED;
    }
    *ns_waiting += now_ns() - begin;
    return computed ? DONE : NO_MEMORY;
}

// tsffn_share_call, whose result is compared the first time.
static enum outcome compare_and_share(struct sharing * s, struct tsffn_counts * of_gpu, uint64_t * ns_waiting) {
    struct tsffn_hybrid * h = s->h;
    bool * compared = &h->compared[s->layer - h->layers];
    if (*compared) {
        return tsffn_share_call(s, of_gpu, ns_waiting);
    }
    if (!tsffn_compute_expected(s, s->call->rows, s->call->n_rows)) { // before y is written, which may be where x is
        return NO_MEMORY;
    }
    const enum outcome outcome = tsffn_share_call(s, of_gpu, ns_waiting);
    *compared = outcome == DONE;
    if (outcome != DONE || tsffn_is_as_expected(s, s->call->rows, s->call->n_rows)) {
        return outcome;
    }
    for (int64_t r = 0; r < s->call->n_rows; ++r) {
        memcpy(s->call->rows[r].y, h->expected + r * s->layer->n_embd, (size_t)s->layer->n_embd * sizeof(float));
    }
    return tsffn_complain_of_results(s);
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
        .ns_gpu = of_gpu->ns_ffn + of_gpu->ns_predictor,
        .ns_predictor = of_gpu->ns_predictor,
        .ns_waiting = ns_waiting,
    };
    of_gpu->ns_ffn = of_gpu->ns_predictor = 0; // the caller's times are counted there
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
        .queue = is_small(call) ? h->queue : h->prefill.queue,
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
    const enum outcome outcome = !works           ? GPU_FAILED
                                 : is_small(call) ? compare_and_share(&s, &of_gpu, &ns_waiting)
                                                  : tsffn_prefill_compute(&s, &of_gpu, &ns_waiting);
    if (works && (outcome == GPU_FAILED || outcome == WRONG)) {
        give_up(h, s.error);
    }
    pthread_mutex_unlock(&h->mutex);
    *gpu = (struct tsffn_hybrid_counts){0};
    if (outcome == GPU_FAILED) {
        return host->device->compute(host->scratch, host->prepared, call, counts);
    }
    const struct tsffn_hybrid_counts of_both = take_gpu_counts(&of_gpu, ns_waiting);
    if (outcome != WRONG) {
        *gpu = of_both;
        gpu->bytes_streamed = s.bytes_streamed;
    }
    tsffn_add_counts(counts, &both);
    tsffn_add_counts(counts, &of_gpu);
    return outcome != NO_MEMORY;
}

// ---- calls in the GPU's memory

bool tsffn_hybrid_takes_resident(const struct tsffn_hybrid * h, int64_t layer, const struct tsffn_call * call) {
    const bool has_predictor = tsffn_has_predictor(&h->layers[layer]);
    return is_small(call) && tsffn_hybrid_takes(h, layer, call) && h->compared[layer] &&
           (!has_predictor || h->plan.predictor[layer]);
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
    const enum outcome outcome = works ? tsffn_share_call(&s, &of_gpu, &ns_waiting) : GPU_FAILED;
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
