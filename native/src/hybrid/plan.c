#include "plan.h"

#include "../error.h"

#include <stdlib.h>
#include <string.h>

enum { WHOLE = 32 }; // neurons come in multiples of it

// What a plan is made from.
struct making {
    struct tsffn_plan * plan;
    const struct tsffn_cuda_module * module;
    const struct tsffn_layer * layers;
    const int32_t * hot;
    int64_t n_ffns, n_ff;
};

static struct tsffn_range * ranges_of(const struct making * m, int64_t layer) {
    return m->plan->range + layer * m->n_ffns;
}

size_t tsffn_plan_layer_bytes(const struct tsffn_plan * plan, const struct tsffn_cuda_module * module,
                              const struct tsffn_layer * layers, int64_t layer) {
    const int64_t n_ffns = layers[layer].n_ffns;
    const struct tsffn_range * ranges = plan->range + layer * n_ffns;
    bool any = plan->predictor[layer];
    for (int64_t e = 0; e < n_ffns; ++e) {
        any = any || ranges[e].end > 0;
    }
    char ignored[256];
    return any ? module->layer_bytes(&layers[layer], ranges, plan->predictor[layer], ignored, sizeof(ignored)) : 0;
}

static size_t bytes_of(const struct making * m, int64_t layer) {
    return tsffn_plan_layer_bytes(m->plan, m->module, m->layers, layer);
}

static size_t all_bytes(const struct making * m) {
    size_t sum = 0;
    for (int64_t i = 0; i < m->plan->n_layer; ++i) {
        sum += bytes_of(m, i);
    }
    return sum;
}

// The neurons of an FFN that may be on the GPU.
static int64_t wanted(const struct making * m, int64_t layer, int64_t ffn) {
    if (!m->plan->has_kernels[layer]) {
        return 0;
    }
    const int64_t n = m->hot != NULL ? m->hot[layer * m->n_ffns + ffn] : m->n_ff;
    return n < m->n_ff ? n / WHOLE * WHOLE : m->n_ff;
}

// The neurons of n that are `share` of n_shares, in whole blocks.
static int32_t part_of(int64_t n, int64_t share, int64_t n_shares) {
    return (int32_t)(share == n_shares ? n : n * share / n_shares / WHOLE * WHOLE);
}

static void take_share(const struct making * m, int64_t share, int64_t n_shares) {
    for (int64_t i = 0; i < m->plan->n_layer; ++i) {
        for (int64_t e = 0; e < m->n_ffns; ++e) {
            ranges_of(m, i)[e].end = part_of(wanted(m, i, e), share, n_shares);
        }
    }
}

// Which layers and predictors the module can compute. False: none; `error` has the last reason.
static bool find_kernels(const struct making * m, char * error, size_t error_size) {
    bool any = false;
    for (int64_t i = 0; i < m->plan->n_layer; ++i) {
        char reason[256];
        const struct tsffn_range * none = ranges_of(m, i);
        const bool has_predictor = tsffn_has_predictor(&m->layers[i]);
        m->plan->has_kernels[i] = m->module->layer_bytes(&m->layers[i], none, false, reason, sizeof(reason)) != 0;
        if (!m->plan->has_kernels[i]) {
            tsffn_fail(error, error_size, "%s", reason);
        }
        any = any || m->plan->has_kernels[i];
        m->plan->predictor_kernels[i] = m->plan->has_kernels[i] && has_predictor &&
                                        m->module->layer_bytes(&m->layers[i], none, true, reason, sizeof(reason)) != 0;
    }
    return any;
}

static void take_predictors(const struct making * m, size_t bytes) {
    size_t used = 0;
    for (int64_t i = 0; i < m->plan->n_layer; ++i) {
        m->plan->predictor[i] = m->plan->predictor_kernels[i];
        const size_t more = bytes_of(m, i);
        m->plan->predictor[i] = m->plan->predictor[i] && used + more <= bytes;
        used += m->plan->predictor[i] ? more : 0;
    }
}

// The largest share of all FFNs that fits; then a block more of each FFN in turn, as far as there is room.
static void take_neurons(const struct making * m, size_t bytes) {
    const int64_t n_shares = (m->n_ff + WHOLE - 1) / WHOLE;
    int64_t fits = 0, too_many = n_shares + 1;
    while (fits + 1 < too_many) {
        const int64_t middle = (fits + too_many) / 2;
        take_share(m, middle, n_shares);
        if (all_bytes(m) <= bytes) {
            fits = middle;
        } else {
            too_many = middle;
        }
    }
    take_share(m, fits, n_shares);
    size_t used = all_bytes(m);
    for (int64_t i = 0; i < m->plan->n_layer; ++i) {
        for (int64_t e = 0; e < m->n_ffns; ++e) {
            struct tsffn_range * range = &ranges_of(m, i)[e];
            const struct tsffn_range before = *range;
            const int64_t most = wanted(m, i, e);
            const size_t without = bytes_of(m, i);
            range->end = before.end + WHOLE < most ? before.end + WHOLE : (int32_t)most;
            const size_t with = bytes_of(m, i);
            if (used - without + with > bytes) {
                *range = before;
            } else {
                used += with - without;
            }
        }
    }
    m->plan->bytes = used;
}

bool tsffn_plan_make(struct tsffn_plan * plan, const struct tsffn_cuda_module * module,
                     const struct tsffn_layer * layers, int64_t n_layer, size_t bytes, const int32_t * hot,
                     char * error, size_t error_size) {
    const struct making making = {
        .plan = plan,
        .module = module,
        .layers = layers,
        .hot = hot,
        .n_ffns = layers[0].n_ffns,
        .n_ff = layers[0].n_ff,
    };
    *plan = (struct tsffn_plan){
        .n_layer = n_layer,
        .has_kernels = calloc((size_t)n_layer, sizeof(*plan->has_kernels)),
        .predictor_kernels = calloc((size_t)n_layer, sizeof(*plan->predictor_kernels)),
        .predictor = calloc((size_t)n_layer, sizeof(*plan->predictor)),
        .range = calloc((size_t)(n_layer * making.n_ffns), sizeof(*plan->range)),
    };
    bool ok =
        plan->has_kernels != NULL && plan->predictor_kernels != NULL && plan->predictor != NULL && plan->range != NULL;
    if (!ok) {
        tsffn_fail(error, error_size, "out of memory");
    }
    ok = ok && find_kernels(&making, error, error_size);
    if (ok) {
        take_predictors(&making, bytes);
        take_neurons(&making, bytes);
    } else {
        tsffn_plan_free(plan);
    }
    return ok;
}

void tsffn_plan_free(struct tsffn_plan * plan) {
    free(plan->has_kernels);
    free(plan->predictor_kernels);
    free(plan->predictor);
    free(plan->range);
    *plan = (struct tsffn_plan){0};
}
