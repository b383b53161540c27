#include "neuron_cache.h"

#include "../error.h"
#include "cache_state.h"

#include <inttypes.h>
#include <sys/stat.h>
#include <time.h>

enum { FILL_NEURONS = 8192 }; // of one FFN that are read at once

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

// ---- announce, await, release

// Holds those that are there, or come already. Counts how often neurons are used.
static void hold_known(struct tsffn_neuron_cache * c, const int32_t * neurons, const uint64_t * rows, int64_t n) {
    for (int64_t k = 0; k < n; ++k) {
        const int32_t neuron = neurons[k];
        const float use = c->use * (rows != NULL ? (float)__builtin_popcountll(rows[k]) : 1.0f);
        if (state_of(c, neuron) != ABSENT) {
            struct slot * info = &c->infos[c->slot_of[neuron]];
            info->holds += 1;
            info->score += use;
            c->counts.missing += info->is_ahead;
            c->counts.ahead += info->is_ahead;
            info->is_ahead = false;
        } else {
            c->score[neuron] += use;
        }
    }
}

// Brings in what is not there. After a failure it stays absent, and is not held: nothing comes any more.
static void hold_missing(struct tsffn_neuron_cache * c, const int32_t * missing, int64_t n) {
    int64_t begin = 0;
    for (int64_t k = 0; k < n; ++k) {
        const int32_t neuron = missing[k];
        int32_t slot = NOBODY;
        while (!atomic_load(&c->failed) && (slot = tsffn_cache_take_slot(c)) == NOBODY) {
            tsffn_cache_ask(c, missing + begin, k - begin);
            begin = k;
            tsffn_cache_progress(c, true); // until some are released, or those have come that nobody holds any more
        }
        if (slot == NOBODY) {
            return;
        }
        c->slot_of[neuron] = slot;
        c->infos[slot] = (struct slot){.neuron = neuron, .score = c->score[neuron], .holds = 1, .comes = true};
        set_state(c, neuron, ALL_PARTS);
    }
    tsffn_cache_ask(c, missing + begin, n - begin);
}

static void announce(const struct tsffn_neurons * neurons, const int32_t * list, const uint64_t * rows, int64_t n) {
    enum { AT_ONCE = 256 };
    const struct cached_ffn * ffn = neurons->state;
    struct tsffn_neuron_cache * c = ffn->cache;
    pthread_mutex_lock(&c->mutex);
    tsffn_cache_forget_ahead(c); // from now on it is known what is needed
    // All that is known is held before anything is let go.
    int64_t n_missing = 0;
    for (int64_t k0 = 0; k0 < n; k0 += AT_ONCE) {
        int32_t numbers[AT_ONCE];
        const int64_t n_now = n - k0 < AT_ONCE ? n - k0 : AT_ONCE;
        for (int64_t k = 0; k < n_now; ++k) {
            numbers[k] = (int32_t)ffn->first + list[k0 + k];
            n_missing += state_of(c, numbers[k]) == ABSENT;
        }
        hold_known(c, numbers, rows != NULL ? rows + k0 : NULL, n_now);
    }
    c->counts.needed += (uint64_t)n;
    c->counts.missing += (uint64_t)n_missing;
    for (int64_t k = 0; n_missing > 0 && k < n;) {
        int32_t missing[AT_ONCE];
        int64_t n_now = 0;
        for (; k < n && n_now < AT_ONCE; ++k) {
            const int32_t neuron = (int32_t)ffn->first + list[k];
            if (state_of(c, neuron) == ABSENT) {
                missing[n_now++] = neuron;
            }
        }
        hold_missing(c, missing, n_now);
        n_missing -= n_now;
    }
    pthread_mutex_unlock(&c->mutex);
}

static bool is_there(const struct tsffn_neuron_cache * c, int64_t neuron) {
    return state_of(c, neuron) == THERE || atomic_load_explicit(&c->failed, memory_order_acquire);
}

static void await(const struct tsffn_neurons * neurons, const int32_t * list, int64_t n) {
    const struct cached_ffn * ffn = neurons->state;
    struct tsffn_neuron_cache * c = ffn->cache;
    int64_t k = 0;
    while (k < n && is_there(c, ffn->first + list[k])) {
        ++k;
    }
    if (k == n) {
        // Who computes keeps the reads going.
        if (atomic_load_explicit(&c->busy, memory_order_relaxed) && pthread_mutex_trylock(&c->mutex) == 0) {
            tsffn_cache_progress(c, false);
            pthread_mutex_unlock(&c->mutex);
        }
        return;
    }
    pthread_mutex_lock(&c->mutex);
    if (c->n_waiting++ == 0) {
        c->wait_began = now_ns();
    }
    for (; k < n; ++k) {
        while (!is_there(c, ffn->first + list[k])) {
            tsffn_cache_progress(c, true);
        }
    }
    if (--c->n_waiting == 0) {
        c->counts.ns += now_ns() - c->wait_began;
    }
    pthread_mutex_unlock(&c->mutex);
}

static void release(const struct tsffn_neurons * neurons, const int32_t * list, int64_t n) {
    const struct cached_ffn * ffn = neurons->state;
    struct tsffn_neuron_cache * c = ffn->cache;
    pthread_mutex_lock(&c->mutex);
    for (int64_t k = 0; k < n; ++k) {
        const int64_t neuron = ffn->first + list[k];
        if (state_of(c, neuron) != ABSENT) {
            c->infos[c->slot_of[neuron]].holds -= 1;
        }
    }
    pthread_cond_broadcast(&c->changed); // who waits for slots
    pthread_mutex_unlock(&c->mutex);
}

static int64_t room(const struct tsffn_neurons * neurons) {
    const struct tsffn_neuron_cache * c = ((const struct cached_ffn *)neurons->state)->cache;
    return c->n_slots - 2 * c->max_ahead;
}

static const struct tsffn_memory cache_memory = {
    .announce = announce,
    .await = await,
    .release = release,
    .room = room,
    .expect = tsffn_cache_expect,
};

struct tsffn_neurons tsffn_neuron_cache_neurons(struct tsffn_neuron_cache * c, int64_t layer, int64_t ffn) {
    struct cached_ffn * state = &c->ffns[layer * c->source.n_ffns + ffn];
    struct tsffn_neurons neurons = {.memory = &cache_memory, .state = state};
    for (int part = 0; part < TSFFN_N_PARTS; ++part) {
        neurons.rows[part] = (struct tsffn_rows){
            .row_bytes = c->layers[layer].row_bytes[part],
            .table = c->table + state->first,
            .offset = c->part_offset[part],
        };
    }
    return neurons;
}

// ---- calls

bool tsffn_neuron_cache_begin(struct tsffn_neuron_cache * c, int64_t layer, int64_t n_tokens) {
    pthread_mutex_lock(&c->call);
    pthread_mutex_lock(&c->mutex);
    c->call_layer = layer;
    c->counts = (struct tsffn_cache_counts){0};
    atomic_store(&c->failed, false);
    c->took_any = false;
    tsffn_cache_tick(c, n_tokens);
    while (atomic_load_explicit(&c->busy, memory_order_relaxed) && tsffn_cache_progress(c, false)) {
    }
    const bool looks_ahead = tsffn_look_ahead_begin(&c->look_ahead, layer, n_tokens, now_ns());
    pthread_mutex_unlock(&c->mutex);
    return looks_ahead;
}

// Whether somebody writes to the file, whose neurons are read one by one for as long as the model is in use.
static bool is_unchanged(struct tsffn_neuron_cache * c) {
    struct stat info;
    if (fstat(c->file.fd, &info) == 0 && (int64_t)info.st_size == c->size &&
        (int64_t)info.st_mtim.tv_sec == c->mtime_s && (int64_t)info.st_mtim.tv_nsec == c->mtime_ns) {
        return true;
    }
    return tsffn_fail(c->error, sizeof(c->error),
                      "%s: the file was changed while the model is in use: expected the %" PRId64
                      " bytes that were there when it was loaded; load it again",
                      c->path, c->size);
}

bool tsffn_neuron_cache_end(struct tsffn_neuron_cache * c, struct tsffn_cache_counts * counts, char * error,
                            size_t error_size) {
    pthread_mutex_lock(&c->mutex);
    bool ok = !atomic_load(&c->failed);
    tsffn_cache_release_expected(c, &c->by_previous);
    if (!ok) {
        tsffn_cache_drain(c);
        tsffn_cache_release_expected(c, &c->by_this);
        tsffn_cache_drop_coming(c);
    }
    const struct expected released = c->by_previous;
    c->by_previous = c->by_this;
    c->by_this = released;
    tsffn_look_ahead_end(&c->look_ahead, c->call_layer, now_ns());
    ok = ok && (!c->took_any || is_unchanged(c));
    if (!ok) {
        tsffn_fail(error, error_size, "%s", c->error);
    }
    *counts = c->counts;
    pthread_mutex_unlock(&c->mutex);
    pthread_mutex_unlock(&c->call);
    return ok;
}

// ---- filling

static void read_first(struct cached_ffn * ffn, int64_t begin, int64_t end) {
    enum { AT_ONCE = 512 };
    const struct tsffn_neurons neurons = tsffn_neuron_cache_neurons(ffn->cache, ffn->layer, ffn->ffn);
    int32_t list[AT_ONCE];
    // All are asked for before any is waited for.
    for (int step = 0; step < 3; ++step) {
        for (int64_t i0 = begin; i0 < end; i0 += AT_ONCE) {
            const int64_t n = end - i0 < AT_ONCE ? end - i0 : AT_ONCE;
            for (int64_t k = 0; k < n; ++k) {
                list[k] = (int32_t)(i0 + k);
            }
            switch (step) {
            case 0:
                announce(&neurons, list, NULL, n);
                break;
            case 1:
                await(&neurons, list, n);
                break;
            default:
                release(&neurons, list, n);
            }
        }
    }
}

static const float LEAST = -0.5f; // below the score of any neuron that was never used

void tsffn_neuron_cache_leave_out(struct tsffn_neuron_cache * c, int64_t layer, int64_t ffn, int64_t n) {
    struct cached_ffn * cached = &c->ffns[layer * c->source.n_ffns + ffn];
    pthread_mutex_lock(&c->call);
    pthread_mutex_lock(&c->mutex);
    cached->n_left_out = n;
    c->next_to_fill = 0;
    for (int64_t neuron = cached->first; neuron < cached->first + n; ++neuron) {
        c->score[neuron] = LEAST;
        if (state_of(c, neuron) != ABSENT) {
            c->infos[c->slot_of[neuron]].score = LEAST;
        }
    }
    pthread_mutex_unlock(&c->mutex);
    pthread_mutex_unlock(&c->call);
}

bool tsffn_neuron_cache_fill(struct tsffn_neuron_cache * c, uint64_t bytes, uint64_t * filled, char * error,
                             size_t error_size) {
    const struct tsffn_neuron_source * s = &c->source;
    const int64_t n_ffns = s->n_layer * s->n_ffns, of_each = c->n_slots / n_ffns;
    struct tsffn_cache_counts counts;
    tsffn_neuron_cache_begin(c, 0, 0);
    pthread_mutex_lock(&c->mutex);
    tsffn_cache_forget_ahead(c);
    tsffn_cache_release_expected(c, &c->by_previous); // all slots are needed
    pthread_mutex_unlock(&c->mutex);
    for (int64_t done = 0; c->next_to_fill < n_ffns && (uint64_t)done * c->slot_bytes < bytes;) {
        struct cached_ffn * ffn = &c->ffns[c->next_to_fill++];
        const int64_t from = ffn->n_left_out, end = from + of_each < s->n_ff ? from + of_each : s->n_ff;
        for (int64_t begin = from; begin < end; begin += FILL_NEURONS) {
            read_first(ffn, begin, begin + FILL_NEURONS < end ? begin + FILL_NEURONS : end);
        }
        done += end - from;
    }
    *filled = (uint64_t)c->n_used * c->slot_bytes;
    return tsffn_neuron_cache_end(c, &counts, error, error_size);
}

uint64_t tsffn_neuron_cache_room(const struct tsffn_neuron_cache * c) {
    return (uint64_t)c->n_slots * c->slot_bytes;
}

const char * tsffn_neuron_cache_reads(const struct tsffn_neuron_cache * c) {
    return c->reader->kind->name;
}
