// The sparse FFN. This is where weights are not read: phase B lists the neurons that are on (listing.c), and in phase C
// every thread goes through its share of them, chunk by chunk, several chunks on their way at once:
//
//   step c    chunk c + 1  its gates are asked for
//             chunk c      gate
//             chunk c - 1  up and down of its neurons with gate > 0 are asked for
//             chunk c - 2  up, down
//
// What a step asks for is spread over its products, so that it is there when its own step comes. Random rows come as
// fast as rows in order only if they are asked for early and the asking never pauses. Yet little should be on its way
// at a time: that is what bounds the neurons of a chunk (docs/notes/2026-11-23-reading-rows.md).
#include "phases.h"

enum {
    GATE_AHEAD = 1, // steps from asking for a chunk's gates to computing them,
    UP_ASK = 1,     // from there to asking for its ups and downs,
    UP_DELAY = 2,   // and to computing those
    // Neurons of a chunk: FEW, and fewer where their gates are more than FEW_BYTES; more where there are many rows,
    // whose sums are read and written for every chunk.
    FEW_NEURONS = 10,
    FEW_BYTES = 24 << 10,
    SOME_NEURONS = 32,
    SOME_ROWS = 12,
    MANY_ROWS = 48, // CHUNK_NEURONS
};
_Static_assert((int)STEPS == (int)GATE_AHEAD + (int)UP_DELAY + 1, "a list for each chunk that is on its way");

// Work is counted in blocks of weights that are multiplied.
static int64_t row_work(const struct segment * g, uint64_t rows) {
    return g->s->layer->n_embd / TSFFN_BLOCK_SIZE * count_rows(rows);
}

static int64_t list_work(const struct segment * g, const struct worklist * list) {
    int64_t work = 0;
    for (int k = 0; k < list->n; ++k) {
        work += row_work(g, list->rows[k]);
    }
    return work;
}

// v[j] = row neuron[k] of `part` times the activations of the j-th row that needs it. Prefetches its share of the queue
// along the way, and the list's next row once more: some of that was dropped, or is only in the second-level cache by
// now.
static void dots(const struct segment * g, enum tsffn_part part, const struct worklist * list, int k,
                 struct activations x, struct tsffn_ask_queue * asked, float * v) {
    const struct tsffn_rows * weights = &g->ffn->neurons.rows[part];
    const uint64_t rows = list->rows[k];
    struct tsffn_asks asks = tsffn_queue_take(asked, row_work(g, rows));
    if (k + 1 < list->n) {
        asks.stream = tsffn_rows_get(weights, list->neuron[k + 1]);
        asks.n_stream = tsffn_cache_lines(weights->row_bytes);
    }
    const void * activations[TILE_ROWS];
    int n = 0;
    for (uint64_t b = rows; b != 0; b &= b - 1) {
        activations[n++] = activations_of(x, g->rows[__builtin_ctzll(b)].token);
    }
    const uint8_t * row = tsffn_rows_get(weights, list->neuron[k]);
    tsffn_row_dots(g->s->layer->types[part], g->s->layer->n_embd, row, n, activations, v, &asks);
}

// Multiplies the k-th neuron's h with the factors of v of its rows, and writes what stays to place `kept` <= k. Returns
// the rows whose factor is not 0; a neuron without any is dropped.
static uint64_t keep_some(struct tsffn_factor factor, struct worklist * list, int k, int kept, const float * v) {
    uint64_t stay = 0;
    for (uint64_t b = list->rows[k]; b != 0; b &= b - 1, ++v) {
        const int r = __builtin_ctzll(b);
        const float f = tsffn_factor_of(factor, *v);
        if (f != 0.0f) {
            stay |= (uint64_t)1 << r;
            list->h[kept][r] = f * list->h[k][r];
        }
    }
    list->neuron[kept] = list->neuron[k];
    list->rows[kept] = stay;
    return stay;
}

// As keep_some, for a dense computation: nothing is dropped.
static uint64_t keep_all(struct tsffn_factor factor, struct worklist * list, int k, const float * v) {
    uint64_t stay = 0;
    for (uint64_t b = list->rows[k]; b != 0; b &= b - 1, ++v) {
        const int r = __builtin_ctzll(b);
        const float f = tsffn_factor_of(factor, *v);
        stay |= (uint64_t)(f != 0.0f && list->h[k][r] != 0.0f) << r;
        list->h[k][r] *= f;
    }
    return stay;
}

// h *= the factor of gate . x, or of up . x, of the listed neurons. Counts what stays in *n_stay.
static void multiply(const struct segment * g, enum tsffn_part part, struct activations x, struct tsffn_factor factor,
                     struct tsffn_ask_queue * asked, struct worklist * list, uint64_t * n_stay) {
    const bool dense = g->s->call->dense;
    g->own->counts.bytes_ffn += (uint64_t)list->n * part_row_bytes(g, part);
    float v[TILE_ROWS];
    int kept = 0;
    for (int k = 0; k < list->n; ++k) {
        dots(g, part, list, k, x, asked, v);
        const uint64_t stay = dense ? keep_all(factor, list, k, v) : keep_some(factor, list, k, kept, v);
        *n_stay += (uint64_t)count_rows(stay);
        kept += dense || stay != 0;
    }
    list->n = kept;
}

static void gates(const struct segment * g, struct tsffn_ask_queue * asked, struct worklist * list) {
    multiply(g, TSFFN_PART_GATE, g->s->x.gate, g->s->layer->activation.gate, asked, list,
             &g->own->counts.gate_positive);
}

static void ups_and_downs(const struct segment * g, struct tsffn_ask_queue * asked, struct worklist * list) {
    multiply(g, TSFFN_PART_UP, g->s->x.up, g->s->layer->activation.up, asked, list, &g->own->counts.active);
    tsffn_add_downs(g, list, asked);
}

static void queue_rows(const struct segment * g, enum tsffn_part part, struct tsffn_ask_queue * queue, int32_t neuron) {
    tsffn_queue_row(queue, tsffn_neuron_row(&g->ffn->neurons, part, neuron), part_row_bytes(g, part));
}

static int chunk_neurons(const struct segment * g) {
    const int64_t n_rows = g->r1 - g->r0;
    if (n_rows >= SOME_ROWS) {
        return n_rows < MANY_ROWS ? SOME_NEURONS : CHUNK_NEURONS;
    }
    const int64_t fit = FEW_BYTES / (int64_t)part_row_bytes(g, TSFFN_PART_GATE);
    return (int)(fit > FEW_NEURONS ? FEW_NEURONS : fit > 1 ? fit : 1);
}

// Phase C: gate, up and down of the thread's own neurons of a round.
static void compute_round(const struct segment * g, struct round round) {
    const int n_most = chunk_neurons(g);
    struct walk walk;
    tsffn_begin_walk(g, round, &walk);
    struct worklist * lists = g->own->lists;
    struct tsffn_ask_queue * queue = &g->own->queue;
    for (int k = 0; k < STEPS; ++k) {
        lists[k].n = 0;
    }
    int64_t last = INT64_MAX; // the step of the last chunk's ups and downs
    for (int64_t c = 0; c <= last; ++c) {
        // Steps are counted from the one that asks for the first gates.
        struct worklist * asked = &lists[c % STEPS];
        struct worklist * gate_list = &lists[(c + STEPS - GATE_AHEAD) % STEPS];
        const struct worklist * kept = &lists[(c + STEPS - GATE_AHEAD - UP_ASK) % STEPS];
        struct worklist * up_list = &lists[(c + STEPS - GATE_AHEAD - UP_DELAY) % STEPS];
        tsffn_next_neurons(g, n_most, &walk, asked);
        if (asked->n == 0 && last == INT64_MAX) {
            last = c + GATE_AHEAD + UP_DELAY - 1;
        }
        tsffn_queue_clear(queue);
        for (int k = 0; k < asked->n; ++k) {
            queue_rows(g, TSFFN_PART_GATE, queue, asked->neuron[k]);
        }
        for (int k = 0; k < kept->n; ++k) {
            queue_rows(g, TSFFN_PART_UP, queue, kept->neuron[k]);
            queue_rows(g, TSFFN_PART_DOWN, queue, kept->neuron[k]);
        }
        tsffn_queue_close(queue, list_work(g, gate_list) + 2 * list_work(g, up_list));
        gates(g, queue, gate_list);
        ups_and_downs(g, queue, up_list);
        const struct tsffn_asks left = tsffn_queue_take(queue, queue->work);
        tsffn_ask_all(&left);
    }
}

// Where all that the tile needs has room at once: what is needed is known, and being brought in, before it is computed.

static void list_and_announce(const struct segment * g) {
    tsffn_list_neurons(g);
    tsffn_announce_round(g, all_neurons(g));
}

static void compute_all(const struct segment * g) {
    compute_round(g, all_neurons(g));
}

static void release_all(const struct segment * g) {
    tsffn_release_round(g, all_neurons(g));
}

// Where it has not. Every row still adds its neurons in ascending order.
static void compute_in_rounds(const struct segment * g) {
    const int64_t n_ff = g->s->layer->n_ff, most = tsffn_room(g->s) / CHUNK_NEURONS * CHUNK_NEURONS;
    for (struct round round = {0, 0}; round.end < n_ff; round.begin = round.end) {
        round.end = min_i64(round.begin + most, n_ff);
        tsffn_announce_round(g, round);
        tsffn_barrier_wait(g->s->barrier, g->nth);
        compute_round(g, round);
        tsffn_barrier_wait(g->s->barrier, g->nth);
        tsffn_release_round(g, round);
        tsffn_barrier_wait(g->s->barrier, g->nth); // announcing never waits
    }
}

void tsffn_sparse_tile(const struct shared * s, const struct tile * tile) {
    const int64_t n_ffns = min_i64(tile->n_rows, s->layer->n_ffns);
    const bool fits = tsffn_room(s) / s->layer->n_ff >= n_ffns;
    struct tsffn_counts * counts = &s->own[tile->ith].counts;
    uint64_t ffn_begins = now_ns();
    if (s->predicts) {
        const uint64_t begin = ffn_begins;
        tsffn_hidden_layer(s, tile);
        ffn_begins = now_ns();
        counts->ns_predictor += ffn_begins - begin;
    }
    tsffn_clear_sums(s, tile);
    tsffn_each_segment(s, tile, fits ? list_and_announce : tsffn_list_neurons);
    for (int64_t t = 0; s->copy_bytes != 0 && t < s->call->n_tokens; ++t) {
        tsffn_convert_for_neurons(s, t);
    }
    tsffn_barrier_wait(s->barrier, tile->nth);
    if (s->next != NULL && fits) {
        tsffn_expect_next(s, tile);
    }
    if (s->predicts) {
        const uint64_t begin = ffn_begins;
        ffn_begins = now_ns();
        counts->ns_predictor += ffn_begins - begin;
    }
    tsffn_each_segment(s, tile, fits ? compute_all : compute_in_rounds);
    if (fits) {
        tsffn_barrier_wait(s->barrier, tile->nth);
        tsffn_each_segment(s, tile, release_all);
    }
    tsffn_reduce(s, tile);
    counts->ns_ffn += now_ns() - ffn_begins;
}
