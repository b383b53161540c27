#define _DEFAULT_SOURCE // madvise
#include "residency.h"

#include "../model/gguf_file.h"
#include "mapping.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

// When not everything may be locked, the prefixes are locked in this many rounds, a slice of each per round: what is
// left out is the coldest part of every FFN, and not the last layers.
enum { LOCK_ROUNDS = 16 };

// Whole pages.
struct span {
    uintptr_t begin, end;
};

// The pages of a model's weights.
struct pages {
    struct span * hot; // ascending and disjoint: one for every prefix that is not empty
    size_t n_hot;
    struct span * cold; // pages without a byte of a hot neuron
    size_t n_cold;
    bool mapped;       // at least one is mapped from the file
    uint64_t n_bytes;  // of the weights
    uintptr_t size_of; // a page
};

// ---- which weights a region holds

// The buffers over mappings that llama.cpp may still be loading from, of all models. Locked before a residency_mutex.
static pthread_mutex_t loading_mutex = PTHREAD_MUTEX_INITIALIZER;
static struct tsffn_region * loading;

static void start_loading(struct tsffn_region * region) {
    pthread_mutex_lock(&loading_mutex);
    region->next_loading = loading;
    loading = region;
    pthread_mutex_unlock(&loading_mutex);
}

static void end_loading(const struct tsffn_region * region) {
    pthread_mutex_lock(&loading_mutex);
    struct tsffn_region ** link = &loading;
    while (*link != NULL && *link != region) {
        link = &(*link)->next_loading;
    }
    if (*link != NULL) {
        *link = region->next_loading;
    }
    pthread_mutex_unlock(&loading_mutex);
}

bool tsffn_residency_remember(struct tsffn_region * region, const struct tsffn_weight * weight,
                              const struct tsffn_weights * weights) {
    struct tsffn_model * model = weight->model;
    pthread_mutex_lock(&model->residency_mutex);
    const bool is_first = region->weights == NULL;
    if (is_first) {
        region->weights = calloc((size_t)model->n_layer * TSFFN_N_PARTS, sizeof(*region->weights));
        if (region->weights != NULL) {
            region->next = model->regions;
            model->regions = region;
        }
    }
    const bool ok = region->weights != NULL;
    if (ok) {
        region->load = model->load.number;
        region->weights[weight->layer * TSFFN_N_PARTS + (int64_t)weight->part] = *weights;
    }
    pthread_mutex_unlock(&model->residency_mutex);
    if (ok && is_first && (!region->owned || region->is_sink)) {
        start_loading(region);
    }
    return ok;
}

static struct span pages_around(uintptr_t begin, uintptr_t end, uintptr_t page) {
    return (struct span){begin / page * page, (end + page - 1) / page * page};
}

// Makes mappings of their own of the FFNs, and is no other change: pages of files are not dumped. A page fault brings
// in neighbours (fault-around, large folios), but never those of another mapping.
static void set_apart(const struct tsffn_weights * m) {
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const struct span span = pages_around((uintptr_t)m->data, (uintptr_t)m->data + tsffn_weights_bytes(m), page);
    madvise((void *)span.begin, span.end - span.begin, MADV_DONTDUMP);
}

void tsffn_residency_loaded(void) {
    pthread_mutex_lock(&loading_mutex);
    struct tsffn_region ** link = &loading;
    while (*link != NULL) {
        struct tsffn_region * region = *link;
        struct tsffn_model * model = region->model;
        if (region->is_sink && model != tsffn_model_armed()) { // another thread may be loading it
            link = &region->next_loading;
            continue;
        }
        const bool released = !region->is_sink && tsffn_release_mapping(region->base, region->size);
        pthread_mutex_lock(&model->residency_mutex);
        for (int64_t i = 0; i < model->n_layer * TSFFN_N_PARTS; ++i) {
            const struct tsffn_weights * m = &region->weights[i];
            if (m->data != NULL && region->is_sink) {
                tsffn_sink_end((char *)m->data + TSFFN_COMPARED_BYTES, tsffn_weights_bytes(m) - TSFFN_COMPARED_BYTES);
            } else if (m->data != NULL && released) {
                set_apart(m);
            }
        }
        pthread_mutex_unlock(&model->residency_mutex);
        *link = region->next_loading;
    }
    pthread_mutex_unlock(&loading_mutex);
}

static void unlock(const struct tsffn_model * model, struct tsffn_region * region) {
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    for (int64_t i = 0; region->locked && i < model->n_layer * TSFFN_N_PARTS; ++i) {
        const struct tsffn_weights * m = &region->weights[i];
        if (m->data != NULL) {
            const struct span span =
                pages_around((uintptr_t)m->data, (uintptr_t)m->data + tsffn_weights_bytes(m), page);
            munlock((void *)span.begin, span.end - span.begin);
        }
    }
    region->locked = false;
}

void tsffn_residency_forget(struct tsffn_region * region) {
    struct tsffn_model * model = region->model;
    if (model == NULL) {
        return;
    }
    end_loading(region);
    pthread_mutex_lock(&model->residency_mutex);
    if (region->weights != NULL) {
        unlock(model, region);
        struct tsffn_region ** link = &model->regions;
        while (*link != region) {
            link = &(*link)->next;
        }
        *link = region->next;
        free(region->weights);
        region->weights = NULL;
    }
    pthread_mutex_unlock(&model->residency_mutex);
}

// ---- which pages are hot

static void add_cold(struct pages * pages, uintptr_t begin, uintptr_t end) {
    const uintptr_t page = pages->size_of;
    const struct span inner = {(begin + page - 1) / page * page, end / page * page};
    if (inner.begin < inner.end) {
        pages->cold[pages->n_cold++] = inner;
    }
}

static int64_t clamp(int64_t v, int64_t most) {
    return v < 0 ? 0 : v > most ? most : v;
}

// One weight tensor, part `part` of its layer: the rows of the first hot[e] neurons of each FFN e, and what lies
// between them. Bundles: the tensors of a layer are pieces of one matrix of three rows to a neuron.
static void add_tensor(struct pages * pages, const struct tsffn_model * model, const struct tsffn_weights * m,
                       int64_t part, const int32_t * hot, bool is_mapped) {
    const size_t row_bytes = m->row_bytes;
    const int64_t n_ffns = tsffn_model_ffns_per_layer(model);
    const int64_t rows_of_neuron = model->bundled ? TSFFN_N_PARTS : 1;
    const int64_t before = model->bundled ? part * m->n_rows : 0;
    uintptr_t cold = (uintptr_t)m->data;
    for (int64_t e = 0; e < n_ffns; ++e) {
        const int64_t first = e * model->n_ff * rows_of_neuron - before;
        const int64_t r0 = clamp(first, m->n_rows), r1 = clamp(first + hot[e] * rows_of_neuron, m->n_rows);
        if (r0 < r1) {
            const uintptr_t begin = (uintptr_t)m->data + (size_t)r0 * row_bytes;
            const uintptr_t end = (uintptr_t)m->data + (size_t)r1 * row_bytes;
            const struct span span = pages_around(begin, end, pages->size_of);
            // Extend the previous span if this piece continues it.
            struct span * last = pages->n_hot > 0 ? &pages->hot[pages->n_hot - 1] : NULL;
            if (first < 0 && last != NULL && last->begin <= span.begin && span.begin <= last->end) {
                last->end = span.end;
            } else {
                pages->hot[pages->n_hot++] = span;
            }
            if (is_mapped) {
                add_cold(pages, cold, begin);
            }
            cold = end;
        }
    }
    if (is_mapped) {
        add_cold(pages, cold, (uintptr_t)m->data + tsffn_weights_bytes(m));
        pages->mapped = true;
    }
    pages->n_bytes += tsffn_weights_bytes(m);
}

static int by_begin(const void * a, const void * b) {
    const uintptr_t x = ((const struct span *)a)->begin, y = ((const struct span *)b)->begin;
    return (x > y) - (x < y);
}

static bool find_pages(const struct tsffn_model * model, const int32_t * hot, struct pages * pages) {
    const int64_t n_ffns = tsffn_model_ffns_per_layer(model);
    const int64_t n_matrices = model->n_layer * TSFFN_N_PARTS;
    size_t n_regions = 0;
    for (const struct tsffn_region * region = model->regions; region != NULL; region = region->next) {
        n_regions += 1;
    }
    const size_t n_prefixes = n_regions * (size_t)(n_matrices * n_ffns);
    *pages = (struct pages){
        .hot = malloc(n_prefixes * sizeof(struct span)),
        .cold = malloc((n_prefixes + n_regions * (size_t)n_matrices) * sizeof(struct span)),
        .size_of = (uintptr_t)sysconf(_SC_PAGESIZE),
    };
    if (pages->hot == NULL || pages->cold == NULL) {
        return false;
    }
    for (const struct tsffn_region * region = model->regions; region != NULL; region = region->next) {
        for (int64_t i = 0; i < n_matrices; ++i) {
            if (region->weights[i].data != NULL) {
                add_tensor(pages, model, &region->weights[i], i % TSFFN_N_PARTS, hot + i / TSFFN_N_PARTS * n_ffns,
                           !region->owned);
            }
        }
    }
    // Neighbours share a page where one ends and the next begins: it is the first's.
    qsort(pages->hot, pages->n_hot, sizeof(struct span), by_begin);
    uintptr_t covered = 0;
    for (size_t i = 0; i < pages->n_hot; ++i) {
        struct span * span = &pages->hot[i];
        span->end = span->end > covered ? span->end : covered;
        span->begin = span->begin > covered ? span->begin : covered;
        covered = span->end;
    }
    return true;
}

// ---- what is done with them

static void advise(const struct span * spans, size_t n, int advice, int32_t * failure) {
    for (size_t i = 0; i < n; ++i) {
        if (madvise((void *)spans[i].begin, spans[i].end - spans[i].begin, advice) != 0 && *failure == 0) {
            *failure = errno;
        }
    }
}

static void prefault(const struct span * spans, size_t n, int32_t * failure) {
    for (size_t i = 0; i < n; ++i) {
        const size_t size = spans[i].end - spans[i].begin;
        const int reason = size > 0 ? tsffn_prefault_pages((void *)spans[i].begin, size) : 0;
        if (reason != 0 && *failure == 0) {
            *failure = reason;
        }
    }
}

static uint64_t resident(const struct span * spans, size_t n, bool when_unknown) {
    uint64_t bytes = 0;
    for (size_t i = 0; i < n; ++i) {
        const size_t size = spans[i].end - spans[i].begin;
        bytes += tsffn_resident_bytes((void *)spans[i].begin, size, when_unknown ? size : 0);
    }
    return bytes;
}

// Locks as much of the front of `span` as the system allows; returns its bytes.
static uint64_t lock(struct span span, uintptr_t page, int32_t * failure) {
    uint64_t locked = 0;
    for (size_t n = (span.end - span.begin) / page; n > 0;) {
        if (mlock((void *)span.begin, n * page) == 0) {
            locked += n * page;
            span.begin += n * page;
        } else if (*failure == 0) {
            *failure = errno;
        }
        const size_t left = (span.end - span.begin) / page;
        n = n / 2 < left ? n / 2 : left;
    }
    return locked;
}

static struct span slice(struct span span, int round, uintptr_t page) {
    const uintptr_t n = (span.end - span.begin) / page;
    return (struct span){
        span.begin + n * (uintptr_t)round / LOCK_ROUNDS * page,
        span.begin + n * (uintptr_t)(round + 1) / LOCK_ROUNDS * page,
    };
}

static void lock_hottest_first(struct tsffn_model * model, const struct pages * pages, struct span sidecar,
                               struct tsffn_placed * placed) {
    placed->sidecar_locked = lock(sidecar, pages->size_of, &placed->lock_errno);
    for (struct tsffn_region * region = model->regions; region != NULL; region = region->next) {
        region->locked = true;
    }
    for (int round = 0; round < LOCK_ROUNDS; ++round) {
        for (size_t i = 0; placed->lock_errno == 0 && i < pages->n_hot; ++i) {
            placed->hot_locked +=
                lock(slice(pages->hot[i], round, pages->size_of), pages->size_of, &placed->lock_errno);
        }
    }
}

static void place(struct tsffn_model * model, const struct pages * pages, uint32_t flags,
                  struct tsffn_placed * placed) {
    const uintptr_t begin = (uintptr_t)model->sidecar; // NULL in exact mode
    const struct span sidecar = pages_around(begin, begin + model->sidecar_size, pages->size_of);
    placed->ffn = pages->n_bytes;
    placed->sidecar = sidecar.end - sidecar.begin;
    for (size_t i = 0; i < pages->n_hot; ++i) {
        placed->hot += pages->hot[i].end - pages->hot[i].begin;
    }
    for (struct tsffn_region * region = model->regions; region != NULL; region = region->next) {
        unlock(model, region);
    }
    if (sidecar.begin < sidecar.end) {
        munlock((void *)sidecar.begin, sidecar.end - sidecar.begin);
    }
    // Advice comes first: it makes mappings of their own of the cold pages, and a page fault brings in neighbours of
    // the same mapping only.
    if (pages->mapped) {
        const bool random = (flags & TSFFN_PLACE_RANDOM_REST) != 0;
        advise(pages->hot, pages->n_hot, MADV_NORMAL, &placed->advice_errno);
        advise(pages->cold, pages->n_cold, random ? MADV_RANDOM : MADV_NORMAL, &placed->advice_errno);
        for (size_t i = 0; random && placed->advice_errno == 0 && i < pages->n_cold; ++i) {
            placed->random += pages->cold[i].end - pages->cold[i].begin;
        }
    }
    // So do locks: where they end within a huge page of the file, its other pages leave the process's page tables.
    if ((flags & TSFFN_PLACE_LOCK) != 0) {
        lock_hottest_first(model, pages, sidecar, placed);
    }
    const bool prefaults = (flags & TSFFN_PLACE_PREFAULT) != 0;
    if (prefaults) {
        prefault(&sidecar, 1, &placed->prefault_errno);
        prefault(pages->hot, pages->n_hot, &placed->prefault_errno);
    }
    const bool believe = prefaults && placed->prefault_errno == 0;
    placed->sidecar_resident = resident(&sidecar, 1, believe);
    placed->hot_resident = resident(pages->hot, pages->n_hot, believe);
}

bool tsffn_model_place(struct tsffn_model * model, const int32_t * hot, size_t n_hot, uint32_t flags,
                       struct tsffn_placed * placed, char * error, size_t error_size) {
    if (model == NULL || hot == NULL || placed == NULL) {
        return tsffn_fail(error, error_size, "no model, no numbers of hot neurons, or no place for what was done");
    }
    *placed = (struct tsffn_placed){0};
    const int64_t n_ffns = tsffn_model_ffns_per_layer(model);
    if (n_hot != (size_t)(model->n_layer * n_ffns)) {
        return tsffn_fail(error, error_size,
                          "hot neurons: expected a number for each of %" PRId64 " layers times %" PRId64
                          " FFNs, found %zu",
                          model->n_layer, n_ffns, n_hot);
    }
    for (int64_t i = 0; i < model->n_layer * n_ffns; ++i) {
        if (hot[i] < 0 || hot[i] > model->n_ff) {
            return tsffn_fail(error, error_size,
                              "hot neurons of layer %" PRId64 ", FFN %" PRId64 ": expected 0 to %" PRId64 ", found %d",
                              i / n_ffns, i % n_ffns, model->n_ff, hot[i]);
        }
    }
    if (model->cache != NULL) {
        return tsffn_fail(error, error_size, "%s: its neurons are read from disk: there are no pages of them to place",
                          model->path);
    }
    tsffn_residency_loaded(); // before anything is brought in
    pthread_mutex_lock(&model->residency_mutex);
    struct pages pages = {0};
    bool ok = model->regions != NULL;
    if (!ok) {
        tsffn_fail(error, error_size, "the FFN weights are not loaded: expected llama.cpp to have loaded the model");
    } else {
        ok = find_pages(model, hot, &pages);
        if (ok) {
            place(model, &pages, flags, placed);
        } else {
            tsffn_fail(error, error_size, "out of memory");
        }
    }
    pthread_mutex_unlock(&model->residency_mutex);
    free(pages.hot);
    free(pages.cold);
    return ok;
}
