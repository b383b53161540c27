// The state of one call, which the files of this folder share.
#ifndef TSFFN_CALL_H
#define TSFFN_CALL_H

#include "ask_queue.h"
#include "barrier.h"
#include "ffn.h"
#include "kernels/gemm.h"

#include <time.h>

enum {
    TILE_ROWS = 64, // one bit per row in a neuron's mask
    // Of a step at most, whole panels of fc2.
    CHUNK_NEURONS = 128,
    // What threads share begins at whole blocks of so many neurons: whole panels of fc2.
    BLOCK_NEURONS = 32,
    STEPS = 4, // of phase C that a chunk is on its way for
};
_Static_assert((int)BLOCK_NEURONS % (int)TSFFN_PANEL_ROWS == 0 && (int)CHUNK_NEURONS % (int)BLOCK_NEURONS == 0, "");

// ---- what all threads share

// Activation vectors in the format that a weight row is multiplied with, `bytes` apart.
struct activations {
    char * at; // NULL: the call does not need them
    size_t bytes;
};

static inline void * activations_of(struct activations activations, int64_t t) {
    return activations.at + (size_t)t * activations.bytes;
}

// What the weights are multiplied with: of each token
struct inputs {
    struct activations gate;      // x
    struct activations up;        // x; the same memory where gate and up take the same format
    struct activations predictor; // p = x * pred_scale, for fc1
};

// The predictor's hidden layer, of each row of a tile.
struct hidden {
    int64_t max_rank;
    float * values;               // [TILE_ROWS][max_rank] relu(fc1 . p)
    struct activations converted; // for fc2
};

// The neurons that some row of a segment needs, in ascending order: thread t lists those of its part of fc2 from place
// first_neuron(t) on.
struct needed {
    int32_t * neuron; // [segments][n_ff]
    uint64_t * rows;  // [segments][n_ff], bit r for row r of the tile
    int32_t * n;      // [segments][n_threads], how many each thread listed
    uint8_t * counts; // [segments][TILE_ROWS][n_blocks], how many of a block each row needs
};

// Dense products of gate and up on a matrix unit (kernels/gemm.h), for activation statistics.
struct dense_products {
    const struct tsffn_gemm * gemm; // NULL: row kernels compute them
    uint16_t * split;               // [n_tokens][2 n_embd] x
    char * packed;                  // [MAX_GROUPS] x of the tile's segments one after the other
    size_t group_bytes;
};

struct shared {
    const struct tsffn_call * call;
    const struct tsffn_cpu_layer * layer;
    const struct tsffn_cpu_layer * next; // whose predictor is asked too; NULL: none
    bool predicts;                       // the call computes the predictor
    bool selects; // some neurons are not listed: the predictor leaves them out, a mask, or another device has them
    int64_t stream_ahead; // bytes: tsffn_stream_ahead()
    struct inputs x;
    struct hidden hidden;
    size_t copy_bytes; // between the threads' copies of `x` and `hidden.converted`; 0: they share one
    struct needed needed;
    struct dense_products products;
    float * h;               // [TILE_ROWS][n_ff] of top-k
    struct own_memory * own; // [n_threads]
    struct tsffn_barrier * barrier;
};

// A segment takes part in dense products from TSFFN_GEMM_MIN_X rows on, and fills groups of TSFFN_GEMM_GROUP.
enum { MAX_GROUPS = TILE_ROWS / TSFFN_GEMM_MIN_X };
_Static_assert(TSFFN_GEMM_GROUP <= 2 * TSFFN_GEMM_MIN_X, "a tile fits into its groups");
_Static_assert((int)TSFFN_GEMM_MAX_X == (int)TILE_ROWS, "a product takes a whole tile");

// ---- what a thread has to itself

// Histograms of one call. Neighbouring values often fall into one bin, and an increment must wait for the one before
// it: they take turns in LANES copies.
enum { LANES = 4 };
struct histograms {
    uint32_t bins[TSFFN_PROFILE_HISTOGRAMS][LANES][TSFFN_PROFILE_BINS];
};

// Neurons of a chunk that some row still needs: their numbers, and for each the rows and the rows' h so far.
struct worklist {
    int n;
    int32_t neuron[CHUNK_NEURONS];
    uint64_t rows[CHUNK_NEURONS];
    float h[CHUNK_NEURONS][TILE_ROWS];
};

// The listed neurons of each row, in ascending order: row r's are terms[first[r]] to terms[first[r + 1] - 1].
struct row_terms {
    int first[TILE_ROWS + 1];
    struct tsffn_term terms[CHUNK_NEURONS * TILE_ROWS]; // h, place in the list
};

// Values of up to TSFFN_GEMM_ROWS neurons: of the k-th row of a segment in column k.
typedef float values[TSFFN_GEMM_ROWS][TILE_ROWS];

// Too much for the stacks that some hosts give their threads.
struct own_memory {
    _Alignas(TSFFN_CACHE_LINE) struct tsffn_counts counts;
    float * sums;                 // [TILE_ROWS][n_embd] what this thread adds to y
    float * scratch;              // [max(n_embd, max_rank)]
    struct worklist lists[STEPS]; // of chunk c at c mod STEPS; without the sparse FFN there is only the first
    struct tsffn_ask_queue queue;
    struct row_terms terms;
    struct tsffn_unpacked unpacked;
    // For activation statistics.
    values gate, up;
    struct histograms * histograms;
};

// ---- parts of a call

// The rows of a call that are computed together, and the thread that works on them.
struct tile {
    const struct tsffn_row * rows; // [n_rows]
    int64_t n_rows;
    int ith, nth;
};

// The rows of a tile that share one FFN, as bits and as a range; and the thread that works on them.
struct segment {
    const struct shared * s;
    const struct tsffn_row * rows; // of the tile
    const struct tsffn_ffn * ffn;
    int64_t r0, r1;
    struct own_memory * own;
    const char * packed; // the rows' x for dense products, NULL when row kernels serve them better
    int index;           // in the tile
    int ith, nth;
};

// The end of the rows that share the FFN of row r0, within [r0, n_rows).
static inline int64_t segment_end(const struct tsffn_row * rows, int64_t r0, int64_t n_rows) {
    int64_t r1 = r0 + 1;
    while (r1 < n_rows && rows[r1].ffn == rows[r0].ffn) {
        ++r1;
    }
    return r1;
}

// Groups of TSFFN_GEMM_GROUP that n_rows rows of a segment fill in dense products.
static inline int64_t groups_of(int64_t n_rows) {
    return n_rows < TSFFN_GEMM_MIN_X ? 0 : (n_rows + TSFFN_GEMM_GROUP - 1) / TSFFN_GEMM_GROUP;
}

static inline int64_t min_i64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static inline int64_t max_i64(int64_t a, int64_t b) {
    return a > b ? a : b;
}

// The part of [0, n) that thread `ith` of `nth` takes.
static inline void share(int64_t n, int ith, int nth, int64_t * begin, int64_t * end) {
    *begin = n * ith / nth;
    *end = n * (ith + 1) / nth;
}

static inline int64_t n_blocks_of(int64_t n_ff) {
    return (n_ff + BLOCK_NEURONS - 1) / BLOCK_NEURONS;
}

// The first neuron of thread ith's part of fc2: whole blocks.
static inline int64_t first_neuron(int64_t n_ff, int ith, int nth) {
    return ith == nth ? n_ff : n_ff * ith / nth / BLOCK_NEURONS * BLOCK_NEURONS;
}

// [i0, i1): the k-th chunk of the thread, of modes in which threads take chunks in turn.
static inline bool own_chunk(const struct segment * g, int64_t k, int64_t * i0, int64_t * i1) {
    const int64_t n_ff = g->s->layer->n_ff;
    *i0 = min_i64((k * g->nth + g->ith) * CHUNK_NEURONS, n_ff);
    *i1 = min_i64(*i0 + CHUNK_NEURONS, n_ff);
    return *i0 < *i1;
}

// How many rows a mask has. Compilers call a function for that where the instruction is not sure to be there; most
// masks have one row or none.
static inline int64_t count_rows(uint64_t rows) {
    return (rows & (rows - 1)) == 0 ? rows != 0 : __builtin_popcountll(rows);
}

static inline uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline const float * token_x(const struct shared * s, int64_t t) {
    return (const float *)(s->call->x + (size_t)t * s->call->x_stride);
}

// The neurons of the segment's FFN that another device computes.
static inline struct tsffn_range elsewhere(const struct segment * g) {
    const struct tsffn_call * call = g->s->call;
    return call->elsewhere != NULL ? call->elsewhere[g->rows[g->r0].ffn] : (struct tsffn_range){0, 0};
}

static inline size_t part_row_bytes(const struct segment * g, enum tsffn_part part) {
    return g->ffn->neurons.rows[part].row_bytes;
}

// The lines to ask for while `bytes` from `at` are computed, of a stream that ends at `end`.
static inline struct tsffn_asks stream_ahead(const struct shared * s, const uint8_t * at, size_t bytes,
                                             const uint8_t * end) {
    const int64_t left = end - at - s->stream_ahead;
    return (struct tsffn_asks){
        .stream = at + s->stream_ahead,
        .n_stream = left > 0 ? tsffn_cache_lines((size_t)min_i64((int64_t)bytes, left)) : 0,
    };
}

// Asks for the beginning of a stream, while something else is waited for.
static inline void ask_stream_begin(const struct shared * s, const uint8_t * begin, const uint8_t * end) {
    tsffn_ask_all(&(struct tsffn_asks){
        .stream = begin,
        .n_stream = begin < end ? tsffn_cache_lines((size_t)min_i64(s->stream_ahead, end - begin)) : 0,
    });
}

#endif
