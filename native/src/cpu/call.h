// What ffn.c and neurons.c share: the state of one call.
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

// The neurons that some row of a segment needs, in ascending order: thread t lists those of its part of fc2 from place
// first_neuron(t) on.
struct needed {
    int32_t * neuron; // [segments][n_ff]
    uint64_t * rows;  // [segments][n_ff], bit r for row r of the tile
    int32_t * n;      // [segments][n_threads], how many each thread listed
    uint8_t * counts; // [segments][TILE_ROWS][n_blocks], how many of a block each row needs
};

static inline int64_t n_blocks_of(int64_t n_ff) {
    return (n_ff + BLOCK_NEURONS - 1) / BLOCK_NEURONS;
}

// Everything the threads of one call share.
struct shared {
    const struct tsffn_call * call;
    const struct tsffn_ffn * ffns; // [n_ffns] of the layer; the call says which matrices are needed
    int64_t n_ffns;
    int64_t n_embd, n_ff, max_rank;
    int64_t stream_ahead; // bytes: tsffn_stream_ahead()

    char * x_gate; // [n_tokens] x in the format of gate's dot; UP and DOWN calls use x_up
    char * x_up;   // [n_tokens] likewise for up; the same memory when the formats are equal
    char * x_pred; // [n_tokens] p = x * pred_scale in the format of fc1's dot
    size_t x_gate_bytes, x_up_bytes, x_pred_bytes; // stride of a token
    float * h1;                                    // [TILE_ROWS][max_rank]
    char * h1_converted;                           // [TILE_ROWS] in the format of fc2's dot
    size_t h1_bytes;
    // Bytes between the threads' copies of x_gate, x_up, x_pred and h1_converted; 0: they share one.
    size_t copy_bytes;
    struct needed needed;         // of the tile
    float * acc;                  // [n_threads][TILE_ROWS][n_embd]
    float * scratch;              // [n_threads][max(n_embd, max_rank)]
    struct tsffn_counts * counts; // [n_threads], each on cache lines of its own
    size_t counts_stride;
    struct tsffn_barrier * barrier;
    struct step_memory * step;      // [n_threads]
    struct histograms * histograms; // [n_threads] when profiling

    // Dense products of gate and up on a matrix unit (cpu/gemm.h), when profiling and there is one; else NULL.
    const struct tsffn_gemm * gemm;
    uint16_t * x_split; // [n_tokens][2 n_embd]
    char * x_packed;    // [MAX_GROUPS], of the tile's segments one after the other
    size_t x_group_bytes;
};

// A segment takes part in dense products from TSFFN_GEMM_MIN_X rows on, and fills groups of TSFFN_GEMM_GROUP.
enum { MAX_GROUPS = TILE_ROWS / TSFFN_GEMM_MIN_X };
_Static_assert(TSFFN_GEMM_GROUP <= 2 * TSFFN_GEMM_MIN_X, "a tile fits into its groups");
_Static_assert((int)TSFFN_GEMM_MAX_X == (int)TILE_ROWS, "a product takes a whole tile");

// One thread's histograms of one call. Neighbouring values often fall into one bin, and an increment must wait for the
// one before it: they take turns in LANES copies.
enum { LANES = 4 };
struct histograms {
    uint32_t bins[TSFFN_PROFILE_HISTOGRAMS][LANES][TSFFN_PROFILE_BINS];
};

// Neurons of a chunk that some row still needs: their numbers, and for each the rows and the rows' h so far.
struct worklist {
    int n;
    int64_t neuron[CHUNK_NEURONS];
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

// What one thread needs for a step of phase C: too much for the stacks that some hosts give their threads.
struct step_memory {
    struct worklist lists[STEPS]; // of chunk c at c mod STEPS; outside the sparse FFN there is only the first
    struct tsffn_ask_queue queue;
    struct row_terms terms;
    struct tsffn_unpacked unpacked;
    values gate, up; // when profiling
};

static inline bool needs_predictor(const struct shared * s) {
    return (s->call->op == TSFFN_OP_FUSED || s->call->op == TSFFN_OP_GATE) && s->ffns[0].fc1.data != NULL;
}

// How many rows a mask has. Compilers call a function for that where the instruction is not sure to be there; most
// masks have one row or none.
static inline int64_t count_rows(uint64_t rows) {
    return (rows & (rows - 1)) == 0 ? rows != 0 : __builtin_popcountll(rows);
}

static inline int64_t min_i64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static inline uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

// The rows of one tile that share one FFN, as bits and as a range; and the thread that works on them.
struct segment {
    const struct shared * s;
    const struct tsffn_row * rows; // of the tile
    const struct tsffn_ffn * ffn;
    int64_t r0, r1;
    float * acc;               // [TILE_ROWS][n_embd], of this thread
    float * scratch;           // [n_embd], of this thread
    struct step_memory * step; // of this thread
    struct tsffn_counts * counts;
    struct histograms * histograms; // of this thread, when profiling
    const char * packed;            // the rows' x for dense products, NULL when row kernels serve them better
    int index;                      // in the tile
    int ith, nth;
};

// The first neuron of thread ith's part of fc2: whole blocks.
static inline int64_t first_neuron(int64_t n_ff, int ith, int nth) {
    return ith == nth ? n_ff : n_ff * ith / nth / BLOCK_NEURONS * BLOCK_NEURONS;
}
_Static_assert((int)BLOCK_NEURONS % (int)TSFFN_PANEL_ROWS == 0 && (int)CHUNK_NEURONS % (int)BLOCK_NEURONS == 0, "");

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

// predictor.c. Phase A for the rows [r0, r1) of the tile that starts at row `tile`; they share one FFN.
void tsffn_hidden_layer(const struct shared * s, int64_t tile, int64_t r0, int64_t r1, int ith, int nth,
                        struct tsffn_counts * counts);
// Asks for what this thread reads first in phase A, and in phase B.
void tsffn_ask_hidden_layer(const struct shared * s, const struct tsffn_ffn * ffn, int ith, int nth);
void tsffn_ask_logits(const struct shared * s, const struct tsffn_ffn * ffn, int ith, int nth);
// Which of the neurons [i0, i1), at most CHUNK_NEURONS, are on: bit r of mask[i - i0]. `end`: of the stream of fc2's
// rows.
void tsffn_predict(const struct segment * segment, int64_t i0, int64_t i1, int64_t end, uint64_t * mask);

// neurons.c. Phase B: lists the neurons that are on, of the thread's part of fc2.
void tsffn_list_neurons(const struct segment * segment);
// Phase C, when all threads have listed theirs: gate, up and down of the thread's own neurons among them.
void tsffn_compute_neurons(const struct segment * segment);
// Phases B and C of what is not the sparse FFN: single operations, and activation statistics.
void tsffn_compute_chunks(const struct segment * segment);

// profile.c.
// Gate and up of all neurons [i0, i1), counted; lists those that are active and on. mask[i - i0] has bit r set when the
// predictor lets neuron i through for row r.
void tsffn_profile_neurons(const struct segment * segment, int64_t i0, int64_t i1, const uint64_t * mask,
                           struct worklist * list);

// Adds one thread's histograms to those of the layer.
void tsffn_profile_add(const struct tsffn_profile * profile, const struct histograms * histograms);

#endif
