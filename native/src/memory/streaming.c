// A model whose neurons are read from disk: its cache, and the file as llama.cpp is to read it.
#define _GNU_SOURCE // fopencookie
#include "../cache/neuron_cache.h"
#include "../cache/reader.h"
#include "../model/sidecar.h"
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

const char * tsffn_reads(void) {
    void * page = aligned_alloc(TSFFN_MEMORY_ALIGNMENT, TSFFN_MEMORY_ALIGNMENT);
    struct tsffn_reader * reader = page != NULL ? tsffn_reader_open(0, 1, page, TSFFN_MEMORY_ALIGNMENT) : NULL;
    const char * name = reader != NULL ? reader->kind->name : tsffn_pool.name;
    if (reader != NULL) {
        reader->kind->close(reader);
    }
    free(page);
    return name;
}

// ---- the file without FFN weights

// A stream's position in the file. FFN weights are holes: what is read there is not told. The rest is read in pieces,
// past the page cache.
struct passing {
    struct tsffn_model * model;
    uint64_t at;
    struct tsffn_direct_file file;
    char * piece; // [PIECE_BYTES]
    uint64_t piece_at;
    size_t piece_bytes;
};
enum { PIECE_BYTES = 4 << 20 };

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

// Brings the piece that begins at `at`, and ends at `end` or before. 0 or an errno.
static int read_piece(struct passing * p, uint64_t end) {
    const uint64_t mask = ~(uint64_t)(p->file.alignment - 1);
    p->piece_at = p->at & mask;
    p->piece_bytes = 0;
    const uint64_t wanted = (end - p->piece_at + p->file.alignment - 1) & mask;
    const size_t size = wanted < PIECE_BYTES ? (size_t)wanted : PIECE_BYTES;
    ssize_t n;
    do {
        n = pread(p->file.fd, p->piece, size, (off_t)p->piece_at);
    } while (n < 0 && errno == EINTR);
    if (n < 0) {
        return errno;
    }
    p->piece_bytes = (size_t)n;
    if (!p->file.direct) {
        posix_fadvise(p->file.fd, (off_t)p->piece_at, n, POSIX_FADV_DONTNEED);
    }
    return 0;
}

static ssize_t read_passing(void * cookie, char * to, size_t size) {
    struct passing * p = cookie;
    uint64_t begin, end;
    next_hole(p->model, p->at, &begin, &end);
    uint64_t left = end - p->at;
    if (begin != p->at) { // not in a hole
        const bool is_here = p->at >= p->piece_at && p->at < p->piece_at + p->piece_bytes;
        const int reason = is_here ? 0 : read_piece(p, begin);
        if (reason != 0) {
            errno = reason;
            return -1;
        }
        const uint64_t piece_end = p->piece_at + p->piece_bytes;
        const uint64_t last = begin < piece_end ? begin : piece_end;
        left = last > p->at ? last - p->at : 0; // 0: the file has become shorter
        size = size < left ? size : (size_t)left;
        memcpy(to, p->piece + (p->at - p->piece_at), size);
    }
    const size_t n = size < left ? size : (size_t)left;
    p->at += n;
    return (ssize_t)n;
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
    tsffn_close_direct(&p->file);
    tsffn_model_close(p->model);
    free(p->piece);
    free(p);
    return 0;
}

void * tsffn_model_file(struct tsffn_model * model) {
    struct passing * p = model != NULL ? calloc(1, sizeof(*p)) : NULL;
    if (p == NULL) {
        return NULL;
    }
    p->model = tsffn_model_retain(model);
    p->file.fd = -1;
    p->piece = aligned_alloc(TSFFN_MEMORY_ALIGNMENT, PIECE_BYTES);
    const bool ok = p->piece != NULL && tsffn_open_direct(model->fd, &p->file) == 0;
    const cookie_io_functions_t functions = {.read = read_passing, .seek = seek_passing, .close = close_passing};
    FILE * stream = ok ? fopencookie(p, "rb", functions) : NULL;
    if (stream == NULL) {
        close_passing(p);
    }
    return stream;
}
