// What the files of the neuron cache share.
#ifndef TSFFN_CACHE_STATE_H
#define TSFFN_CACHE_STATE_H

#include "look_ahead.h"
#include "neuron_cache.h"
#include "reader.h"

#include <pthread.h>
#include <stdatomic.h>

enum {
    DEPTH = 192,           // reads on their way: what is read ahead goes on while nobody looks
    READ_BYTES = 64 << 10, // of one read that takes several neurons
    GAP_BYTES = 8 << 10,   // read over rather than begin another read: what that costs in time
    MAX_PIECES = 64,       // of one read
    FEWEST_NEURONS = 1024, // that a cache has room for
    AHEAD_SHARE = 16,      // of the slots, one in so many is for what a call reads ahead
    NOBODY = -1,
};

// Whether a neuron is there. Anything else: it comes, with a bit for each part that is not there yet.
enum { ABSENT = 0, ALL_PARTS = (1 << TSFFN_N_PARTS) - 1, THERE = 1 << TSFFN_N_PARTS };

// Parts [first, first + n) of a neuron, which follow each other in the file.
struct piece {
    int32_t neuron;
    uint8_t first, n;
};

// A read, and the pieces in it.
struct request {
    struct tsffn_read read;
    uint32_t wanted; // bytes of it, up to the end of the last piece
    int n_tries;
    int n_pieces;
    struct piece pieces[MAX_PIECES];
};

// Memory for one neuron, and what is known of the one that has it.
struct slot {
    int32_t neuron; // NOBODY: it is free
    float score;    // of the neuron, see cache_slots.c
    uint16_t holds; // how often it was announced and not yet released
    bool comes;     // it is not there yet
    bool is_ahead;  // it was read ahead, and not announced since
};

// Neurons that were read ahead, and are held until it shows whether they are needed.
struct expected {
    int32_t * neuron; // [max_ahead]
    int64_t n;
};

// The neurons of one FFN: what tsffn_neurons.state is.
struct cached_ffn {
    struct tsffn_neuron_cache * cache;
    int64_t layer, ffn, first; // first: of its neurons, among all of the model's
    int64_t n_left_out;        // so many, the first ones, something else computes
};

// Neurons are numbered through the model: [n_layer][n_ffns][n_ff].
struct tsffn_neuron_cache {
    struct tsffn_neuron_source source;
    struct tsffn_layer_source * layers; // [n_layer], the source's
    char * path;
    struct cached_ffn * ffns; // [n_layer][n_ffns]
    int64_t n_neurons;
    struct tsffn_direct_file file;
    int64_t size, mtime_s, mtime_ns; // of the file as it was opened

    // Where parts of a neuron lie in its slot.
    size_t part_offset[TSFFN_N_PARTS], slot_bytes;
    char * slots; // [n_slots][slot_bytes]
    size_t slots_bytes;
    int64_t n_slots;
    void * nothing; // [slot_bytes] zeros

    // A call has the cache for itself. Its threads share what follows.
    pthread_mutex_t call;
    int64_t call_layer;
    float use; // what one use in this call counts

    pthread_mutex_t mutex;
    pthread_cond_t changed;   // neurons came, slots were released, or nobody waits for the reader any more
    _Atomic(uint8_t) * state; // [n_neurons], written with the mutex held
    const uint8_t ** table;   // [n_neurons]: of the slot where a neuron is there, else of zeros
    int32_t * slot_of;        // [n_neurons], where a neuron is not absent
    float * score;            // [n_neurons] of those that are absent
    struct slot * infos;      // [n_slots]
    int64_t n_used;           // slots that ever had a neuron, the first ones
    float weight;             // what a use counts now
    uint64_t random;
    int64_t next_to_fill; // of the FFNs

    // What is read ahead.
    struct tsffn_look_ahead look_ahead;
    int32_t * ahead; // [n_ff], neurons to read when nothing else is to be read: from first_ahead to n_ahead - 1
    int64_t first_ahead, n_ahead;
    int64_t max_ahead;           // of one call
    struct expected by_this;     // the neurons that were read ahead since this call began,
    struct expected by_previous; // and since the one before it

    // Reads.
    struct tsffn_reader * reader;
    char * bounce; // [DEPTH][bounce_bytes], what reads go to
    size_t bounce_bytes;
    struct request * requests; // [DEPTH]
    int idle[DEPTH], n_idle;   // requests that are not in use
    int ready[DEPTH], n_ready; // those that the reader did not take yet
    int n_on_way, n_copying;
    struct piece * pending; // [max_pending], a queue of what no request has yet
    int64_t max_pending, first_pending, n_pending;
    atomic_bool busy;    // there is something on its way, or pending
    bool someone_waits;  // for the reader
    int n_waiting;       // threads that wait for neurons
    uint64_t wait_began; // ns
    bool took_any;       // this call: reads have ended
    atomic_bool failed;  // this call: `error` says why
    char error[1024];
    struct tsffn_cache_counts counts;
};

// cache_slots.c. All with the mutex held.
void tsffn_cache_tick(struct tsffn_neuron_cache * c, int64_t n_tokens);
// A slot for a neuron; NOBODY where all are held.
int32_t tsffn_cache_take_slot(struct tsffn_neuron_cache * c);
// Gives the slots of neurons that did not come back.
void tsffn_cache_drop_coming(struct tsffn_neuron_cache * c);

// cache_ahead.c. All with the mutex held.
// What nothing was read of yet is not read ahead any more.
void tsffn_cache_forget_ahead(struct tsffn_neuron_cache * c);
// Slots for up to n of the neurons that are to be read ahead; returns how many there are, 0 where none are left.
int tsffn_cache_take_ahead(struct tsffn_neuron_cache * c, int32_t * neurons, int n);
// Lets go of what was expected.
void tsffn_cache_release_expected(struct tsffn_neuron_cache * c, struct expected * expected);
// tsffn_memory.expect.
void tsffn_cache_expect(const struct tsffn_neurons * neurons, const int32_t * list, int64_t n);

// cache_reads.c. All with the mutex held.
// Puts the parts of neurons that were announced into the queue, and starts reads.
void tsffn_cache_ask(struct tsffn_neuron_cache * c, const int32_t * neurons, int64_t n);
// Takes some of what has come and starts what waits; with `wait` returns only after something has changed. Returns
// whether more may have come.
bool tsffn_cache_progress(struct tsffn_neuron_cache * c, bool wait);
// Waits for all reads; drops what is pending.
void tsffn_cache_drain(struct tsffn_neuron_cache * c);

static inline uint8_t * slot_at(const struct tsffn_neuron_cache * c, int32_t slot) {
    return (uint8_t *)c->slots + (size_t)slot * c->slot_bytes;
}

static inline uint8_t state_of(const struct tsffn_neuron_cache * c, int64_t neuron) {
    return atomic_load_explicit(&c->state[neuron], memory_order_acquire);
}

static inline void set_state(struct tsffn_neuron_cache * c, int64_t neuron, uint8_t state) {
    atomic_store_explicit(&c->state[neuron], state, memory_order_release);
}

#endif
