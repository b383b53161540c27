// A model whose neurons are read from disk: its cache, and the file as llama.cpp is to read it.
#define _GNU_SOURCE // fopencookie
#include "../model/sidecar.h"
#include "neuron_cache.h"
#include "region.h"

#include "../error.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

bool tsffn_model_stream(struct tsffn_model * model, uint64_t bytes, char * error, size_t error_size) {
    if (model == NULL || model->cache != NULL) {
        return tsffn_fail(error, error_size, "no model, or one that is read from disk already");
    }
    const size_t n_layer = (size_t)model->n_layer;
    struct tsffn_layer_source * layers = calloc(n_layer, sizeof(*layers));
    if (layers == NULL) {
        return tsffn_fail(error, error_size, "out of memory");
    }
    for (size_t i = 0; i < n_layer; ++i) {
        memcpy(layers[i].offset, model->ffn_offset + i * TSFFN_N_PARTS, sizeof(layers[i].offset));
        memcpy(layers[i].row_bytes, model->ffn_row_bytes + i * TSFFN_N_PARTS, sizeof(layers[i].row_bytes));
    }
    const struct tsffn_neuron_source source = {
        .path = model->path,
        .fd = model->fd,
        .n_layer = model->n_layer,
        .n_ffns = tsffn_model_ffns_per_layer(model),
        .n_ff = model->n_ff,
        .bundled = model->bundled,
        .hot_first = model->hot_first,
        .layers = layers,
    };
    model->cache = tsffn_neuron_cache_new(&source, bytes, error, error_size);
    free(layers);
    return model->cache != NULL && tsffn_keep_sidecar(model, error, error_size);
}

bool tsffn_model_fill(struct tsffn_model * model, uint64_t bytes, uint64_t * filled, uint64_t * room, char * error,
                      size_t error_size) {
    if (model == NULL || model->cache == NULL || filled == NULL || room == NULL) {
        return tsffn_fail(error, error_size, "no model that is read from disk");
    }
    *room = tsffn_neuron_cache_room(model->cache);
    return tsffn_neuron_cache_fill(model->cache, bytes, filled, error, error_size);
}

const char * tsffn_model_reads(const struct tsffn_model * model) {
    return model != NULL && model->cache != NULL ? tsffn_neuron_cache_reads(model->cache) : NULL;
}

// ---- the file without FFN weights

// A stream's position in the file. FFN weights are holes: what is read there is not told.
struct passing {
    struct tsffn_model * model;
    uint64_t at;
};

// Where the next hole begins, at or after `at`, and where it ends; the end of the file twice for none.
static void next_hole(const struct tsffn_model * model, uint64_t at, uint64_t * begin, uint64_t * end) {
    *begin = *end = model->file_bytes;
    const uint64_t n_rows = (uint64_t)(tsffn_model_ffns_per_layer(model) * model->n_ff);
    for (int64_t i = 0; i < model->n_layer * TSFFN_N_PARTS; ++i) {
        const uint64_t size = n_rows * model->ffn_row_bytes[i];
        const uint64_t first = model->ffn_offset[i] + (size < TSFFN_COMPARED_BYTES ? size : TSFFN_COMPARED_BYTES);
        const uint64_t last = model->ffn_offset[i] + size;
        if (at < last && first < *begin) {
            *begin = first > at ? first : at;
            *end = last;
        }
    }
}

// What of the file is read once is not left in the page cache.
static ssize_t read_passing(void * cookie, char * to, size_t size) {
    struct passing * p = cookie;
    uint64_t begin, end;
    next_hole(p->model, p->at, &begin, &end);
    if (begin == p->at) { // in a hole
        const uint64_t left = end - begin;
        const size_t n = size < left ? size : (size_t)left;
        p->at += n;
        return (ssize_t)n;
    }
    ssize_t n;
    do {
        n = pread(p->model->fd, to, size < begin - p->at ? size : (size_t)(begin - p->at), (off_t)p->at);
    } while (n < 0 && errno == EINTR);
    if (n > 0) {
        posix_fadvise(p->model->fd, (off_t)p->at, n, POSIX_FADV_DONTNEED);
        p->at += (uint64_t)n;
    }
    return n;
}

static int seek_passing(void * cookie, off64_t * offset, int whence) {
    struct passing * p = cookie;
    const int64_t from = whence == SEEK_SET ? 0 : (int64_t)(whence == SEEK_CUR ? p->at : p->model->file_bytes);
    if (from + *offset < 0) {
        errno = EINVAL;
        return -1;
    }
    p->at = (uint64_t)(from + *offset);
    *offset = (off64_t)p->at;
    return 0;
}

static int close_passing(void * cookie) {
    struct passing * p = cookie;
    tsffn_model_close(p->model);
    free(p);
    return 0;
}

void * tsffn_model_file(struct tsffn_model * model) {
    struct passing * p = model != NULL ? malloc(sizeof(*p)) : NULL;
    if (p == NULL) {
        return NULL;
    }
    *p = (struct passing){.model = tsffn_model_retain(model)};
    const cookie_io_functions_t functions = {.read = read_passing, .seek = seek_passing, .close = close_passing};
    FILE * stream = fopencookie(p, "rb", functions);
    if (stream == NULL) {
        close_passing(p);
    }
    return stream;
}
