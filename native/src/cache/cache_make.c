// Making a neuron cache: how many neurons fit, and memory for all that goes with them.
#define _DEFAULT_SOURCE // madvise
#include "cache_state.h"

#include "../error.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

enum {
    LINE = 64, // parts of a neuron begin at whole cache lines
    HUGE_PAGE = 2 << 20,
};

// What the first neuron of an FFN in hot_first order is worth before any was used, in uses; the last is worth nothing.
static const float HOTTEST = 10.0f;

static size_t lines(size_t bytes) {
    return (bytes + LINE - 1) / LINE * LINE;
}

// Slots take the neurons of every layer.
static size_t lay_out_slot(struct tsffn_neuron_cache * c) {
    size_t bytes[TSFFN_N_PARTS] = {0}, largest = 0;
    for (int64_t layer = 0; layer < c->source.n_layer; ++layer) {
        size_t sum = 0;
        for (int part = 0; part < TSFFN_N_PARTS; ++part) {
            const size_t row = c->layers[layer].row_bytes[part];
            bytes[part] = lines(row) > bytes[part] ? lines(row) : bytes[part];
            sum += row;
        }
        largest = sum > largest ? sum : largest;
    }
    c->slot_bytes = 0;
    for (int part = 0; part < TSFFN_N_PARTS; ++part) {
        c->part_offset[part] = c->slot_bytes;
        c->slot_bytes += bytes[part];
    }
    return largest;
}

// Memory that is read into and never shared with a child of this process.
static void * map(size_t bytes) {
    void * at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) {
        return NULL;
    }
    madvise(at, bytes, MADV_HUGEPAGE);
    madvise(at, bytes, MADV_DONTFORK);
    return at;
}

static bool open_reader(struct tsffn_neuron_cache * c, size_t largest, char * error, size_t error_size) {
    const size_t alignment = TSFFN_MEMORY_ALIGNMENT;
    const size_t most = largest + alignment > READ_BYTES ? largest + alignment : READ_BYTES;
    c->bounce_bytes = (most + 2 * alignment - 1) / alignment * alignment;
    c->bounce = map(DEPTH * c->bounce_bytes);
    c->requests = calloc(DEPTH, sizeof(*c->requests));
    if (c->bounce == NULL || c->requests == NULL) {
        return tsffn_fail(error, error_size, "out of memory");
    }
    for (int id = 0; id < DEPTH; ++id) {
        c->requests[id].read.id = id;
        c->requests[id].read.to = c->bounce + (size_t)id * c->bounce_bytes;
        c->idle[c->n_idle++] = id;
    }
    c->reader = tsffn_reader_open(c->file.fd, DEPTH, c->bounce, DEPTH * c->bounce_bytes);
    return c->reader != NULL ||
           tsffn_fail(error, error_size, "%s: reading it cannot be prepared: %s", c->path, strerror(errno));
}

// How many slots fit into `bytes`, with all that goes with them.
static bool choose_size(struct tsffn_neuron_cache * c, uint64_t bytes, char * error, size_t error_size) {
    const uint64_t per_neuron = sizeof(*c->state) + sizeof(*c->table) + sizeof(*c->slot_of) + sizeof(*c->score);
    const uint64_t per_slot = c->slot_bytes + sizeof(*c->infos) + TSFFN_N_PARTS * sizeof(*c->pending);
    const uint64_t fixed = per_neuron * (uint64_t)c->n_neurons + DEPTH * (uint64_t)c->bounce_bytes +
                           (uint64_t)c->source.n_ff * sizeof(*c->ahead);
    const uint64_t fit = bytes > fixed ? (bytes - fixed) / per_slot : 0;
    const uint64_t fewest = c->n_neurons < FEWEST_NEURONS ? (uint64_t)c->n_neurons : FEWEST_NEURONS;
    c->n_slots = fit < (uint64_t)c->n_neurons ? (int64_t)fit : c->n_neurons;
    return fit >= fewest ||
           tsffn_fail(error, error_size,
                      "%s: the memory for neurons is too small: expected at least %" PRIu64 " bytes, found %" PRIu64,
                      c->path, fixed + fewest * per_slot, bytes);
}

static bool allocate(struct tsffn_neuron_cache * c, char * error, size_t error_size) {
    const size_t n_neurons = (size_t)c->n_neurons, n_slots = (size_t)c->n_slots;
    c->max_pending = TSFFN_N_PARTS * c->n_slots;
    c->max_ahead = c->n_slots / AHEAD_SHARE;
    c->slots_bytes = (n_slots * c->slot_bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    c->slots = map(c->slots_bytes);
    c->nothing = aligned_alloc(LINE, c->slot_bytes);
    c->state = calloc(n_neurons, sizeof(*c->state));
    c->table = malloc(n_neurons * sizeof(*c->table));
    c->slot_of = calloc(n_neurons, sizeof(*c->slot_of));
    c->score = calloc(n_neurons, sizeof(*c->score));
    c->infos = malloc(n_slots * sizeof(*c->infos));
    c->pending = malloc((size_t)c->max_pending * sizeof(*c->pending));
    c->ahead = malloc((size_t)c->source.n_ff * sizeof(*c->ahead));
    c->by_this.neuron = malloc(((size_t)c->max_ahead + 1) * sizeof(*c->by_this.neuron));
    c->by_previous.neuron = malloc(((size_t)c->max_ahead + 1) * sizeof(*c->by_previous.neuron));
    if (c->slots == NULL || c->nothing == NULL || c->state == NULL || c->table == NULL || c->slot_of == NULL ||
        c->score == NULL || c->infos == NULL || c->pending == NULL || c->ahead == NULL || c->by_this.neuron == NULL ||
        c->by_previous.neuron == NULL) {
        return tsffn_fail(error, error_size, "out of memory");
    }
    memset(c->nothing, 0, c->slot_bytes);
    for (size_t i = 0; i < n_neurons; ++i) {
        c->table[i] = c->nothing;
        const float rank = (float)((int64_t)i % c->source.n_ff) / (float)c->source.n_ff;
        c->score[i] = c->source.hot_first ? HOTTEST * (1.0f - rank) : 0.0f;
    }
    for (size_t i = 0; i < n_slots; ++i) {
        c->infos[i] = (struct slot){.neuron = NOBODY, .score = -1.0f};
    }
    return true;
}

static bool copy_source(struct tsffn_neuron_cache * c, const struct tsffn_neuron_source * source) {
    const size_t n_layer = (size_t)source->n_layer, n_ffns = n_layer * (size_t)source->n_ffns;
    c->source = *source;
    c->source.layers = NULL;
    c->n_neurons = (int64_t)n_ffns * source->n_ff;
    c->path = strdup(source->path);
    c->layers = malloc(n_layer * sizeof(*c->layers));
    c->ffns = malloc(n_ffns * sizeof(*c->ffns));
    if (c->path == NULL || c->layers == NULL || c->ffns == NULL) {
        return false;
    }
    memcpy(c->layers, source->layers, n_layer * sizeof(*c->layers));
    for (int64_t i = 0; i < (int64_t)n_ffns; ++i) {
        c->ffns[i] = (struct cached_ffn){
            .cache = c,
            .layer = i / source->n_ffns,
            .ffn = i % source->n_ffns,
            .first = i * source->n_ff,
        };
    }
    return true;
}

static bool open_file(struct tsffn_neuron_cache * c, char * error, size_t error_size) {
    const int reason = tsffn_open_direct(c->source.fd, &c->file);
    struct stat info;
    if (reason != 0 || fstat(c->file.fd, &info) != 0) {
        return tsffn_fail(error, error_size, "%s: cannot be opened: %s", c->path,
                          strerror(reason != 0 ? reason : errno));
    }
    c->size = (int64_t)info.st_size;
    c->mtime_s = (int64_t)info.st_mtim.tv_sec;
    c->mtime_ns = (int64_t)info.st_mtim.tv_nsec;
    return true;
}

struct tsffn_neuron_cache * tsffn_neuron_cache_new(const struct tsffn_neuron_source * source, uint64_t bytes,
                                                   char * error, size_t error_size) {
    struct tsffn_neuron_cache * c = calloc(1, sizeof(*c));
    if (c == NULL) {
        tsffn_fail(error, error_size, "out of memory");
        return NULL;
    }
    c->file.fd = -1;
    c->weight = 1.0f;
    tsffn_look_ahead_init(&c->look_ahead, source->n_layer);
    c->random = 0x9e3779b97f4a7c15u;
    pthread_mutex_init(&c->call, NULL);
    pthread_mutex_init(&c->mutex, NULL);
    pthread_cond_init(&c->changed, NULL);
    bool ok = copy_source(c, source) || tsffn_fail(error, error_size, "out of memory");
    if (ok) {
        const size_t largest = lay_out_slot(c);
        ok = open_file(c, error, error_size) && open_reader(c, largest, error, error_size) &&
             choose_size(c, bytes, error, error_size) && allocate(c, error, error_size);
    }
    if (!ok) {
        tsffn_neuron_cache_free(c);
        return NULL;
    }
    return c;
}

void tsffn_neuron_cache_free(struct tsffn_neuron_cache * c) {
    if (c == NULL) {
        return;
    }
    if (c->reader != NULL) {
        pthread_mutex_lock(&c->mutex);
        tsffn_cache_drain(c);
        pthread_mutex_unlock(&c->mutex);
        c->reader->kind->close(c->reader);
    }
    if (c->slots != NULL) {
        munmap(c->slots, c->slots_bytes);
    }
    if (c->bounce != NULL) {
        munmap(c->bounce, DEPTH * c->bounce_bytes);
    }
    tsffn_close_direct(&c->file);
    pthread_mutex_destroy(&c->call);
    pthread_mutex_destroy(&c->mutex);
    pthread_cond_destroy(&c->changed);
    free(c->nothing);
    free((void *)c->state);
    free(c->table);
    free(c->slot_of);
    free(c->score);
    free(c->infos);
    free(c->pending);
    free(c->ahead);
    free(c->by_this.neuron);
    free(c->by_previous.neuron);
    free(c->requests);
    free(c->layers);
    free(c->ffns);
    free(c->path);
    free(c);
}
