#include "environment.h"

#include "../error.h"
#include "log.h"

#include <errno.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// What the environment asks for. Written once, when the library is loaded. When something is done, `hot` becomes NULL,
// `fill` and `share` false.
static struct {
    struct tsffn_model * model;
    int32_t * hot; // [n_hot], the argument of tsffn_model_place
    size_t n_hot;
    uint32_t flags;
    bool fill;          // the cache of neurons is to be filled
    atomic_bool share;  // with a GPU,
    int32_t gpu;        // which,
    uint64_t vram;      // at most so many bytes of it, UINT64_MAX: what is free,
    int32_t * gpu_hot;  // and neurons [n_hot]; NULL: any
    const char * stats; // path
} asked;
static pthread_mutex_t asked_mutex = PTHREAD_MUTEX_INITIALIZER;

// A variable of the environment; NULL when it is not set, or empty.
static const char * variable(const char * name) {
    const char * value = getenv(name);
    return value != NULL && value[0] != '\0' ? value : NULL;
}

// A variable that says how many neurons at the front of each FFN are meant, layer after layer, with commas in between.
// *counts stays NULL where it is not set.
static bool read_counts(const char * name, const struct tsffn_model * model, int32_t ** counts, char * error,
                        size_t error_size) {
    const char * at = variable(name);
    if (at == NULL) {
        return true;
    }
    const size_t n = (size_t)(model->n_layer * tsffn_model_ffns_per_layer(model));
    int32_t * hot = calloc(n, sizeof(*hot));
    if (hot == NULL) {
        return tsffn_fail(error, error_size, "out of memory");
    }
    size_t found = 0;
    for (bool more = true; more; ++found) {
        char * end;
        errno = 0;
        const long long value = strtoll(at, &end, 10);
        if (end == at || errno != 0 || value < 0 || value > model->n_ff || (*end != ',' && *end != '\0')) {
            free(hot);
            return tsffn_fail(error, error_size, "%s: number %zu: expected 0 to %" PRId64 ", found '%.20s'", name,
                              found + 1, model->n_ff, at);
        }
        if (found < n) {
            hot[found] = (int32_t)value;
        }
        more = *end == ',';
        at = end + 1;
    }
    if (found != n) {
        free(hot);
        return tsffn_fail(error, error_size, "%s: expected %zu numbers, one for each FFN, found %zu", name, n, found);
    }
    *counts = hot;
    asked.n_hot = n;
    return true;
}

// A number in a variable, of `what`. *number stays as it is where it is not set.
static bool read_number(const char * name, const char * what, uint64_t * number, char * error, size_t error_size) {
    const char * value = variable(name);
    if (value == NULL) {
        return true;
    }
    char * end;
    errno = 0;
    const unsigned long long found = strtoull(value, &end, 10);
    if (value[0] < '0' || value[0] > '9' || *end != '\0' || errno != 0) {
        return tsffn_fail(error, error_size, "%s: expected a number of %s, found '%.20s'", name, what, value);
    }
    *number = found;
    return true;
}

// TSFFN_GPU: the number of the GPU that shares the model; TSFFN_VRAM_BUDGET: bytes of its memory at most, what is free
// but for 1 GiB where it is not set; TSFFN_GPU_HOT: neurons of each FFN at most.
static bool read_gpu(struct tsffn_model * model, char * error, size_t error_size) {
    uint64_t gpu = INT32_MAX;
    asked.vram = UINT64_MAX;
    if (!read_number("TSFFN_GPU", "a GPU", &gpu, error, error_size) ||
        !read_number("TSFFN_VRAM_BUDGET", "bytes", &asked.vram, error, error_size) ||
        !read_counts("TSFFN_GPU_HOT", model, &asked.gpu_hot, error, error_size)) {
        return false;
    }
    asked.gpu = (int32_t)gpu;
    atomic_store(&asked.share, gpu < INT32_MAX);
    if (gpu < INT32_MAX) {
        char device[32];
        snprintf(device, sizeof(device), "CUDA%d", asked.gpu);
        tsffn_model_gpu_memory(model, device);
    }
    return true;
}

// TSFFN_RESIDENCY: what is done with the neurons of TSFFN_HOT and the others, in words with commas in between.
static bool read_residency(char * error, size_t error_size) {
    static const struct {
        const char * name;
        uint32_t flag;
    } words[] = {
        {"prefault", TSFFN_PLACE_PREFAULT},
        {"lock", TSFFN_PLACE_LOCK},
        {"random", TSFFN_PLACE_RANDOM_REST},
    };
    const size_t n = sizeof(words) / sizeof(*words);
    const char * at = variable("TSFFN_RESIDENCY");
    while (at != NULL) {
        const size_t length = strcspn(at, ",");
        size_t i = 0;
        while (i < n && (strlen(words[i].name) != length || strncmp(at, words[i].name, length) != 0)) {
            ++i;
        }
        if (i == n) {
            return tsffn_fail(error, error_size, "TSFFN_RESIDENCY: expected prefault, lock or random, found '%.20s'",
                              at);
        }
        asked.flags |= words[i].flag;
        at = at[length] == ',' ? at + length + 1 : NULL;
    }
    return true;
}

// TSFFN_NEURON_CACHE: bytes of memory for neurons that are read from disk when they are needed.
static bool read_cache(struct tsffn_model * model, char * error, size_t error_size) {
    uint64_t bytes = 0;
    if (!read_number("TSFFN_NEURON_CACHE", "bytes", &bytes, error, error_size)) {
        return false;
    }
    if (variable("TSFFN_NEURON_CACHE") == NULL) {
        return true;
    }
    if (variable("TSFFN_HOT") != NULL) {
        return tsffn_fail(error, error_size,
                          "TSFFN_NEURON_CACHE and TSFFN_HOT exclude each other: expected at most one of them");
    }
    asked.fill = true;
    return tsffn_model_stream(model, bytes, error, error_size);
}

// The counters of one layer as a JSON object: the fields of struct tsffn_layer_stats.
static void write_layer(FILE * file, const struct tsffn_layer_stats * s) {
    const struct {
        const char * name;
        uint64_t value;
    } fields[] = {
        {"calls", s->calls},
        {"rows", s->rows},
        {"neurons", s->neurons},
        {"predicted", s->predicted},
        {"gate_positive", s->gate_positive},
        {"active", s->active},
        {"bytes_predictor", s->bytes_predictor},
        {"bytes_ffn", s->bytes_ffn},
        {"bytes_dense", s->bytes_dense},
        {"ns_predictor", s->ns_predictor},
        {"ns_ffn", s->ns_ffn},
        {"single_ops", s->single_ops},
        {"ns_attention", s->ns_attention},
        {"needed", s->needed},
        {"missing", s->missing},
        {"reads", s->reads},
        {"bytes_disk", s->bytes_disk},
        {"ns_disk", s->ns_disk},
        {"gpu_calls", s->gpu_calls},
        {"gpu_neurons", s->gpu_neurons},
        {"gpu_active", s->gpu_active},
        {"gpu_bytes", s->gpu_bytes},
        {"ns_gpu", s->ns_gpu},
        {"ns_gpu_wait", s->ns_gpu_wait},
    };
    for (size_t i = 0; i < sizeof(fields) / sizeof(*fields); ++i) {
        fprintf(file, "%s\"%s\": %" PRIu64, i > 0 ? ", " : "{", fields[i].name, fields[i].value);
    }
    fputs("}", file);
}

static void write_stats(void) {
    FILE * file = fopen(asked.stats, "w");
    if (file == NULL) {
        tsffn_log_error("TSFFN_STATS: %s cannot be written: %s", asked.stats, strerror(errno));
        return;
    }
    fputs("{\"layers\": [", file);
    for (int32_t layer = 0; layer < asked.model->n_layer; ++layer) {
        struct tsffn_layer_stats stats;
        tsffn_model_stats(asked.model, layer, &stats);
        fputs(layer > 0 ? ",\n" : "\n", file);
        write_layer(file, &stats);
    }
    fputs("\n]}\n", file);
    if (fclose(file) != 0) {
        tsffn_log_error("TSFFN_STATS: %s cannot be written: %s", asked.stats, strerror(errno));
    }
}

bool tsffn_open_from_environment(char * error, size_t error_size) {
    const char * path = variable("TSFFN_MODEL");
    if (path == NULL) {
        return true;
    }
    const char * sparsity = variable("TSFFN_SPARSITY");
    struct tsffn_sparsity asked_sparsity;
    if (!tsffn_parse_sparsity("TSFFN_SPARSITY", sparsity, &asked_sparsity, error, error_size)) {
        return false;
    }
    struct tsffn_model * model = tsffn_model_open(path, variable("TSFFN_PREDICTOR"), sparsity, error, error_size);
    if (model == NULL) {
        return false;
    }
    if (!read_counts("TSFFN_HOT", model, &asked.hot, error, error_size) || !read_residency(error, error_size) ||
        !read_gpu(model, error, error_size) || !read_cache(model, error, error_size)) {
        tsffn_model_close(model);
        return false;
    }
    tsffn_model_arm_for_process(model);
    asked.model = model; // to the end of the process
    asked.stats = variable("TSFFN_STATS");
    if (asked.stats != NULL) {
        atexit(write_stats);
    }
    return true;
}

static void fill(void) {
    char error[1024];
    uint64_t room, filled = 0, before = UINT64_MAX;
    while (filled != before) {
        before = filled;
        if (!tsffn_model_fill(asked.model, UINT64_MAX, &filled, &room, error, sizeof(error))) {
            tsffn_log_error("%s", error);
            return;
        }
    }
}

// What a GPU has free, but for what others may need of it.
static uint64_t free_bytes(int32_t gpu, char * error, size_t error_size) {
    struct tsffn_gpu found;
    const uint64_t margin = (uint64_t)1 << 30;
    return tsffn_gpu(gpu, &found, error, error_size) && found.free_bytes > margin ? found.free_bytes - margin : 0;
}

static bool share_model(struct tsffn_gpu_share * share, char * error, size_t error_size) {
    error[0] = '\0';
    const uint64_t most = asked.vram == UINT64_MAX ? free_bytes(asked.gpu, error, error_size) : asked.vram;
    const size_t n_hot = asked.gpu_hot != NULL ? asked.n_hot : 0;
    bool ok = error[0] == '\0' &&
              tsffn_model_gpu(asked.model, asked.gpu, most, asked.gpu_hot, n_hot, share, error, error_size);
    uint64_t copied = 0, bytes = 1;
    while (ok && copied < bytes) {
        ok = tsffn_model_gpu_upload(asked.model, &copied, &bytes, error, error_size);
    }
    return ok;
}

void tsffn_share_from_environment(void) {
    if (!atomic_load_explicit(&asked.share, memory_order_acquire)) {
        return;
    }
    pthread_mutex_lock(&asked_mutex);
    if (atomic_load(&asked.share)) {
        struct tsffn_gpu_share found;
        char error[1024];
        if (share_model(&found, error, sizeof(error))) {
            tsffn_log_info("%s: %d of %d predictors and %.1f %% of the neurons, %.2f GB", found.name, found.predictors,
                           found.n_predictors, 100.0 * (double)found.neurons / (double)found.n_neurons,
                           (double)found.bytes * 1e-9);
        } else {
            tsffn_log_error("%s: the CPU computes all neurons", error);
        }
        atomic_store(&asked.share, false);
        if (asked.fill) {
            fill();
            asked.fill = false;
        }
    }
    pthread_mutex_unlock(&asked_mutex);
}

void tsffn_place_from_environment(void) {
    pthread_mutex_lock(&asked_mutex);
    bool loaded = false;
    if (asked.hot != NULL || asked.fill) {
        pthread_mutex_lock(&asked.model->residency_mutex);
        loaded = asked.model->regions != NULL; // a context that only measures has no weights
        pthread_mutex_unlock(&asked.model->residency_mutex);
    }
    if (loaded && asked.fill && !atomic_load(&asked.share)) { // else with what the GPU does not take
        fill();
        asked.fill = false;
    }
    if (loaded && asked.hot != NULL) {
        struct tsffn_placed placed;
        char error[256];
        if (!tsffn_model_place(asked.model, asked.hot, asked.n_hot, asked.flags, &placed, error, sizeof(error))) {
            tsffn_log_error("%s", error);
        }
        free(asked.hot);
        asked.hot = NULL;
    }
    pthread_mutex_unlock(&asked_mutex);
}
