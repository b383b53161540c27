#define _DEFAULT_SOURCE // readlink
#include "load.h"

#include "../model/gguf_file.h"
#include "buffer.h"

#include <dirent.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

// Brings the model's file into the page cache, before llama.cpp reads it in its own way, unless it is too large for
// the memory that this process may use. A quarter of that is left for what llama.cpp repacks, the context and others.
static void cache_what_fits(const struct tsffn_model * model) {
    const uint64_t available = tsffn_available_memory(NULL);
    if (model->file_bytes <= available - available / 4) {
        tsffn_model_cache(model, 0, model->file_bytes);
    }
}

// Whether the file behind a descriptor is a model of tsconv.
static bool is_tsconv_model(int fd) {
    char link[64];
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    char magic[4];
    if (pread(fd, magic, sizeof(magic), 0) != sizeof(magic) || memcmp(magic, GGUF_MAGIC, sizeof(magic)) != 0) {
        return false;
    }
    struct gguf_context * file = gguf_init_from_file(link, (struct gguf_init_params){.no_alloc = true, .ctx = NULL});
    const int64_t key = file != NULL ? gguf_find_key(file, "general.architecture") : -1;
    const bool found = key >= 0 && gguf_get_kv_type(file, key) == GGUF_TYPE_STRING &&
                       strcmp(gguf_get_val_str(file, key), "turbosparse") == 0;
    if (file != NULL) {
        gguf_free(file);
    }
    return found;
}

// Fills `load` with what the files tell that this process has open: llama.cpp has the one that it loads.
static void find_loaded_file(const struct tsffn_model * model, struct tsffn_load * load) {
    DIR * files = opendir("/proc/self/fd");
    load->is_ours = files == NULL;
    load->other[0] = '\0';
    for (const struct dirent * entry; !load->is_ours && (entry = readdir(files)) != NULL;) {
        const int fd = atoi(entry->d_name);
        struct stat info;
        if (entry->d_name[0] == '.' || fd == model->fd || fd == model->sidecar_fd || fstat(fd, &info) != 0 ||
            !S_ISREG(info.st_mode)) {
            continue;
        }
        load->is_ours = (uint64_t)info.st_dev == model->device && (uint64_t)info.st_ino == model->inode;
        if (!load->is_ours && is_tsconv_model(fd)) {
            char link[64];
            snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
            const ssize_t n = readlink(link, load->other, sizeof(load->other) - 1);
            load->other[n > 0 ? n : 0] = '\0';
        }
    }
    if (files != NULL) {
        closedir(files);
    }
}

void tsffn_begin_load(struct tsffn_model * model) {
    struct tsffn_load load = {.is_ours = true};
    if (model->armed_for_process) {
        find_loaded_file(model, &load);
    }
    pthread_mutex_lock(&model->residency_mutex);
    model->load.number += 1;
    model->load.loaded = NULL; // its buffers hold the one before
    model->load.is_ours = load.is_ours;
    memcpy(model->load.other, load.other, sizeof(load.other));
    memset(model->load.claimed, 0, (size_t)model->n_layer * TSFFN_N_PARTS * sizeof(*model->load.claimed));
    pthread_mutex_unlock(&model->residency_mutex);
    if (load.is_ours && model->armed_for_process && model->cache == NULL) {
        cache_what_fits(model);
    }
}

void tsffn_claim(const struct tsffn_weight * weight) {
    struct tsffn_model * model = weight->model;
    pthread_mutex_lock(&model->residency_mutex);
    model->load.claimed[weight->layer * TSFFN_N_PARTS + (int64_t)weight->part] = true;
    pthread_mutex_unlock(&model->residency_mutex);
}

// Whether the beginning of weight number i, in memory that llama.cpp has read it into, is that of the model's file.
static bool is_of_file(const struct tsffn_model * model, int64_t i, const struct tsffn_weights * m) {
    uint8_t expected[TSFFN_COMPARED_BYTES];
    const size_t all = tsffn_weights_bytes(m), size = all < sizeof(expected) ? all : sizeof(expected);
    return pread(model->fd, expected, size, (off_t)model->ffn_offset[i]) == (ssize_t)size &&
           memcmp(expected, m->data, size) == 0;
}

bool tsffn_check_loaded(struct tsffn_model * model, char * error, size_t error_size) {
    const int64_t n = model->n_layer * TSFFN_N_PARTS;
    int64_t n_missing = 0, first = 0, of_another = -1;
    pthread_mutex_lock(&model->residency_mutex);
    bool measures = true;
    for (const struct tsffn_region * b = model->regions; b != NULL; b = b->next) {
        measures &= b->load != model->load.number;
    }
    for (int64_t i = n - 1; i >= 0; --i) {
        bool is_here = (measures && model->load.claimed[i]) || !model->load.is_ours;
        for (const struct tsffn_region * b = model->regions; b != NULL; b = b->next) {
            const struct tsffn_weights * m = &b->weights[i];
            is_here |= b->load == model->load.number && m->data != NULL;
            of_another = b->owned && m->data != NULL && !is_of_file(model, i, m) ? i : of_another;
        }
        n_missing += !is_here;
        first = is_here ? first : i;
    }
    char other[sizeof(model->load.other)];
    memcpy(other, model->load.is_ours ? "" : model->load.other, model->load.is_ours ? 1 : sizeof(other));
    pthread_mutex_unlock(&model->residency_mutex);
    if (other[0] != '\0') {
        return tsffn_fail(
            error, error_size,
            "%s is being loaded, but TSFFN_MODEL names %s: its FFN would be computed as SwiGLU instead of "
            "dReLU; name the same file",
            other, model->path);
    }
    static const char * const parts[TSFFN_N_PARTS] = {"gate", "up", "down"};
    const char * suffix = model->n_expert > 0 ? "_exps" : "";
    if (of_another >= 0) {
        return tsffn_fail(error, error_size,
                          "blk.%" PRId64
                          ".ffn_%s%s.weight is not that of %s: another model of its shape is being loaded; "
                          "load it with a program of its own, without TSFFN_MODEL",
                          of_another / TSFFN_N_PARTS, parts[of_another % TSFFN_N_PARTS], suffix, model->path);
    }
    if (n_missing > 0) {
        return tsffn_fail(
            error, error_size,
            "%s: %" PRId64 " of %" PRId64 " FFN tensors, blk.%" PRId64
            ".ffn_%s%s.weight first, went to another device, which would compute SwiGLU instead of dReLU; "
            "keep them here: n_gpu_layers=0 (-ngl 0), or override their buffer type (-ot "
            "'ffn_(gate|up|down)(_exps)?.weight=CPU')",
            model->path, n_missing, n, first / TSFFN_N_PARTS, parts[first % TSFFN_N_PARTS], suffix);
    }
    return true;
}
