// How neurons come: what was announced becomes pieces, pieces that lie close to each other in the file become reads,
// and what a read brought is copied to its slots by whichever thread finds it.
#include "cache_state.h"

#include "../error.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

enum {
    MOST_TRIES = 8,
    RESULTS = 16,
    AHEAD_AT_ONCE = 16, // neurons
    // A thread that waits is woken when one in so many reads of those on their way have ended, of the first so many.
    WAIT_SHARE = 8,
    WAIT_MOST = 64,
};

// ---- where things are in the file

static uint64_t offset_of(const struct tsffn_neuron_cache * c, int64_t neuron, int part) {
    const struct tsffn_neuron_source * s = &c->source;
    const int64_t per_layer = s->n_ffns * s->n_ff;
    const struct tsffn_layer_source * layer = &c->layers[neuron / per_layer];
    const int64_t i = neuron % per_layer;
    if (!s->bundled) {
        return layer->offset[part] + (uint64_t)i * layer->row_bytes[part];
    }
    const int64_t row = TSFFN_N_PARTS * i + part; // of three pieces with per_layer rows each
    return layer->offset[row / per_layer] + (uint64_t)(row % per_layer) * layer->row_bytes[part];
}

static size_t row_bytes(const struct tsffn_neuron_cache * c, int64_t neuron, int part) {
    return c->layers[neuron / (c->source.n_ffns * c->source.n_ff)].row_bytes[part];
}

static uint64_t begin_of(const struct tsffn_neuron_cache * c, const struct piece * piece) {
    return offset_of(c, piece->neuron, piece->first);
}

static uint64_t end_of(const struct tsffn_neuron_cache * c, const struct piece * piece) {
    const int last = piece->first + piece->n - 1;
    return offset_of(c, piece->neuron, last) + row_bytes(c, piece->neuron, last);
}

// ---- the queue

static void add_pending(struct tsffn_neuron_cache * c, struct piece piece) {
    c->pending[(c->first_pending + c->n_pending++) % c->max_pending] = piece;
}

// Parts of a neuron that follow each other are one piece. Pieces are added in the order of the file.
static void add_bundle(struct tsffn_neuron_cache * c, int32_t neuron) {
    struct piece piece = {.neuron = neuron, .first = 0, .n = 1};
    for (int part = 1; part < TSFFN_N_PARTS; ++part) {
        if (offset_of(c, neuron, part) == end_of(c, &piece)) {
            piece.n += 1;
            continue;
        }
        add_pending(c, piece);
        piece = (struct piece){.neuron = neuron, .first = (uint8_t)part, .n = 1};
    }
    add_pending(c, piece);
}

// A read of the next pending pieces.
static void make_request(struct tsffn_neuron_cache * c, struct request * request) {
    const uint64_t mask = ~(uint64_t)(c->file.alignment - 1);
    uint64_t begin = 0, end = 0;
    request->n_pieces = 0;
    request->n_tries = 0;
    while (c->n_pending > 0 && request->n_pieces < MAX_PIECES) {
        const struct piece * next = &c->pending[c->first_pending];
        const uint64_t from = begin_of(c, next), to = end_of(c, next);
        if (request->n_pieces == 0) {
            begin = from & mask;
        } else if (from < end || from > end + GAP_BYTES || to - begin > READ_BYTES) {
            break;
        }
        end = to;
        request->pieces[request->n_pieces++] = *next;
        c->first_pending = (c->first_pending + 1) % c->max_pending;
        c->n_pending -= 1;
    }
    request->wanted = (uint32_t)(end - begin);
    request->read.offset = begin;
    request->read.bytes = (uint32_t)((end - begin + c->file.alignment - 1) & mask);
}

static void note_busy(struct tsffn_neuron_cache * c) {
    const bool busy = c->n_on_way > 0 || c->n_ready > 0 || c->n_pending > 0 || c->first_ahead < c->n_ahead;
    atomic_store_explicit(&c->busy, busy, memory_order_relaxed);
}

static void add_neurons(struct tsffn_neuron_cache * c, const int32_t * neurons, int64_t n) {
    for (int64_t k = 0; c->source.bundled && k < n; ++k) {
        add_bundle(c, neurons[k]);
    }
    for (int part = 0; !c->source.bundled && part < TSFFN_N_PARTS; ++part) {
        for (int64_t k = 0; k < n; ++k) {
            add_pending(c, (struct piece){.neuron = neurons[k], .first = (uint8_t)part, .n = 1});
        }
    }
}

// Whether there is anything to read; where nothing else is, what is read ahead.
static bool has_pending(struct tsffn_neuron_cache * c) {
    int32_t neurons[AHEAD_AT_ONCE];
    if (c->n_pending == 0 && c->first_ahead < c->n_ahead && !atomic_load(&c->failed)) {
        add_neurons(c, neurons, tsffn_cache_take_ahead(c, neurons, AHEAD_AT_ONCE));
    }
    return c->n_pending > 0;
}

static void start_reads(struct tsffn_neuron_cache * c) {
    while (c->n_idle > 0 && has_pending(c)) {
        const int id = c->idle[--c->n_idle];
        make_request(c, &c->requests[id]);
        c->ready[c->n_ready++] = id;
    }
    struct tsffn_read reads[DEPTH];
    for (int k = 0; k < c->n_ready; ++k) {
        reads[k] = c->requests[c->ready[k]].read;
    }
    const int n = c->n_ready > 0 ? c->reader->kind->start(c->reader, reads, c->n_ready) : 0;
    for (int k = 0; k < n; ++k) {
        c->counts.bytes += reads[k].bytes;
    }
    c->counts.reads += (uint64_t)n;
    c->n_on_way += n;
    c->n_ready -= n;
    memmove(c->ready, c->ready + n, (size_t)c->n_ready * sizeof(c->ready[0]));
    note_busy(c);
}

void tsffn_cache_ask(struct tsffn_neuron_cache * c, const int32_t * neurons, int64_t n) {
    add_neurons(c, neurons, n);
    start_reads(c);
}

// ---- what has come

static void copy_pieces(const struct tsffn_neuron_cache * c, const struct request * request) {
    const char * from = c->bounce + (size_t)request->read.id * c->bounce_bytes;
    for (int k = 0; k < request->n_pieces; ++k) {
        const struct piece * piece = &request->pieces[k];
        uint8_t * to = slot_at(c, c->slot_of[piece->neuron]);
        for (int part = piece->first; part < piece->first + piece->n; ++part) {
            memcpy(to + c->part_offset[part], from + (offset_of(c, piece->neuron, part) - request->read.offset),
                   row_bytes(c, piece->neuron, part));
        }
    }
}

static void publish(struct tsffn_neuron_cache * c, const struct request * request) {
    for (int k = 0; k < request->n_pieces; ++k) {
        const struct piece * piece = &request->pieces[k];
        const uint8_t parts = (uint8_t)(((1 << piece->n) - 1) << piece->first);
        const uint8_t left = state_of(c, piece->neuron) & (uint8_t)~parts;
        if (left == 0) {
            const int32_t slot = c->slot_of[piece->neuron];
            c->table[piece->neuron] = slot_at(c, slot);
            c->infos[slot].comes = false;
        }
        set_state(c, piece->neuron, left == 0 ? THERE : left);
    }
}

static void fail(struct tsffn_neuron_cache * c, const struct request * request, const char * reason) {
    if (!atomic_load(&c->failed)) {
        tsffn_fail(c->error, sizeof(c->error),
                   "%s: %" PRIu32 " bytes at %" PRIu64 " cannot be read: %s; check the disk, or copy or convert the "
                   "file again and load it again",
                   c->path, request->read.bytes, request->read.offset, reason);
        atomic_store(&c->failed, true);
    }
}

// Whether a read has brought what was wanted; one that has not is made again or has failed.
static bool is_complete(struct tsffn_neuron_cache * c, struct request * request, int64_t n) {
    if (n >= (int64_t)request->wanted) {
        return true;
    }
    const bool again = n > 0 || n == -EINTR || n == -EAGAIN || n == -ECANCELED;
    request->n_tries += 1;
    if (again && request->n_tries < MOST_TRIES && !atomic_load(&c->failed)) {
        c->ready[c->n_ready++] = request->read.id;
        return false;
    }
    fail(c, request, n < 0 ? strerror((int)-n) : "the file is truncated");
    c->idle[c->n_idle++] = request->read.id;
    return false;
}

static void take(struct tsffn_neuron_cache * c, const struct tsffn_read_result * results, int n) {
    int whole[RESULTS], n_whole = 0;
    c->took_any = true;
    for (int k = 0; k < n; ++k) {
        c->n_on_way -= 1;
        if (is_complete(c, &c->requests[results[k].id], results[k].n)) {
            whole[n_whole++] = results[k].id;
        }
    }
    c->n_copying += n_whole;
    start_reads(c);
    pthread_mutex_unlock(&c->mutex);
    for (int k = 0; k < n_whole; ++k) {
        copy_pieces(c, &c->requests[whole[k]]);
    }
    pthread_mutex_lock(&c->mutex);
    c->n_copying -= n_whole;
    for (int k = 0; k < n_whole; ++k) {
        if (!atomic_load(&c->failed)) { // whoever saw the failure reads the table
            publish(c, &c->requests[whole[k]]);
        }
        c->idle[c->n_idle++] = whole[k];
    }
    start_reads(c);
    pthread_cond_broadcast(&c->changed);
}

bool tsffn_cache_progress(struct tsffn_neuron_cache * c, bool wait) {
    struct tsffn_read_result results[RESULTS];
    start_reads(c);
    int n = c->someone_waits || c->n_on_way == 0 ? 0 : c->reader->kind->finish(c->reader, results, RESULTS);
    if (n == 0 && wait) {
        if (c->someone_waits || c->n_on_way == 0) {
            pthread_cond_wait(&c->changed, &c->mutex);
            return true;
        }
        // To be woken for each of many reads costs more than the first of them comes earlier.
        const int n_to_wait_for = 1 + (c->n_on_way < WAIT_MOST ? c->n_on_way : WAIT_MOST) / WAIT_SHARE;
        c->someone_waits = true;
        pthread_mutex_unlock(&c->mutex);
        c->reader->kind->wait(c->reader, n_to_wait_for);
        pthread_mutex_lock(&c->mutex);
        c->someone_waits = false;
        n = c->reader->kind->finish(c->reader, results, RESULTS);
        if (n == 0) {
            pthread_cond_broadcast(&c->changed);
        }
    }
    if (n > 0) {
        take(c, results, n);
    }
    return n > 0;
}

void tsffn_cache_drain(struct tsffn_neuron_cache * c) {
    tsffn_cache_forget_ahead(c);
    c->n_pending = 0;
    for (; c->n_ready > 0; --c->n_ready) {
        c->idle[c->n_idle++] = c->ready[c->n_ready - 1];
    }
    while (c->n_on_way > 0 || c->n_copying > 0) {
        tsffn_cache_progress(c, true);
    }
    note_busy(c);
}
