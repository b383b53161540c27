// Top-k sparsity (ffn/topk.h). Per tile, with barriers between:
//
//   h        f(gate . x) * g(up . x) of every neuron      threads take chunks of neurons in turn
//   select   h = 0 but for the largest of each row        threads share the rows
//   down     h * down of what stayed                      threads take the same chunks
//   reduce   y[r] = the sums of all threads for r         threads share rows and columns
//
// Every h is a neuron's own product: which neurons stay depends neither on the threads nor on the rest of the batch.
#include "phases.h"

#include "../ffn/topk.h"

static float * h_of(const struct segment * g, int64_t r) {
    return g->s->h + r * g->s->layer->n_ff;
}

// v[k] = row i of `part` times the activations of the k-th of `rows`.
static void dots(const struct segment * g, enum tsffn_part part, struct activations x, int64_t i, uint64_t rows,
                 float * v) {
    const void * activations[TILE_ROWS];
    int n = 0;
    for (uint64_t b = rows; b != 0; b &= b - 1) {
        activations[n++] = activations_of(x, g->rows[__builtin_ctzll(b)].token);
    }
    tsffn_row_dots(g->s->layer->types[part], g->s->layer->n_embd, tsffn_neuron_row(&g->ffn->neurons, part, i), n,
                   activations, v, NULL);
    g->own->counts.bytes_ffn += part_row_bytes(g, part);
}

// h of neuron i for all rows of the segment.
static void compute_neuron(const struct segment * g, int64_t i) {
    const struct tsffn_activation activation = g->s->layer->activation;
    const uint64_t all = (~(uint64_t)0 >> (TILE_ROWS - (g->r1 - g->r0))) << g->r0;
    float v[TILE_ROWS];
    dots(g, TSFFN_PART_GATE, g->s->x.gate, i, all, v);
    uint64_t stay = 0;
    for (int64_t r = g->r0; r < g->r1; ++r) {
        const float f = tsffn_factor_of(activation.gate, v[r - g->r0]);
        h_of(g, r)[i] = f;
        stay |= (uint64_t)(f != 0.0f) << r;
    }
    if (stay == 0) {
        return;
    }
    g->own->counts.gate_positive += (uint64_t)count_rows(stay);
    dots(g, TSFFN_PART_UP, g->s->x.up, i, stay, v);
    int k = 0;
    for (uint64_t b = stay; b != 0; b &= b - 1) {
        h_of(g, __builtin_ctzll(b))[i] *= tsffn_factor_of(activation.up, v[k++]);
    }
}

static void compute_h(const struct segment * g) {
    for (int64_t k = 0, i0, i1; own_chunk(g, k, &i0, &i1); ++k) {
        tsffn_bring_chunk(g, i0, i1);
        for (int64_t i = i0; i < i1; ++i) {
            compute_neuron(g, i);
        }
        tsffn_release_chunk(g, i0, i1);
        g->own->counts.predicted += (uint64_t)((i1 - i0) * (g->r1 - g->r0));
        tsffn_count_neurons(g, i1 - i0);
    }
}

// The neurons of [i0, i1) that stayed for some row.
static void list_chunk(const struct segment * g, int64_t i0, int64_t i1, struct worklist * list) {
    list->n = 0;
    for (int64_t i = i0; i < i1; ++i) {
        uint64_t rows = 0;
        for (int64_t r = g->r0; r < g->r1; ++r) {
            const float h = h_of(g, r)[i];
            list->h[list->n][r] = h;
            rows |= (uint64_t)(h != 0.0f) << r;
        }
        list->neuron[list->n] = (int32_t)i;
        list->rows[list->n] = rows;
        list->n += rows != 0;
        g->own->counts.active += (uint64_t)count_rows(rows);
    }
}

static void add_kept(const struct segment * g) {
    const struct tsffn_neurons * neurons = &g->ffn->neurons;
    struct tsffn_ask_queue * nothing = &g->own->queue;
    struct worklist * list = &g->own->lists[0];
    for (int64_t k = 0, i0, i1; own_chunk(g, k, &i0, &i1); ++k) {
        list_chunk(g, i0, i1, list);
        tsffn_clear_h(g, i0, i1);
        tsffn_queue_clear(nothing);
        tsffn_queue_close(nothing, 0);
        tsffn_neurons_announce(neurons, list->neuron, list->rows, list->n);
        tsffn_neurons_await(neurons, list->neuron, list->n);
        tsffn_add_downs(g, list, nothing);
        tsffn_neurons_release(neurons, list->neuron, list->n);
    }
}

void tsffn_topk_tile(const struct shared * s, const struct tile * tile) {
    const uint64_t begin = now_ns();
    const int64_t n_ff = s->layer->n_ff;
    tsffn_clear_sums(s, tile);
    tsffn_each_segment(s, tile, compute_h);
    tsffn_barrier_wait(s->barrier, tile->nth);
    for (int64_t r = tile->ith; r < tile->n_rows; r += tile->nth) {
        tsffn_keep_largest(s->h + r * n_ff, n_ff, s->call->keep);
    }
    tsffn_barrier_wait(s->barrier, tile->nth);
    tsffn_each_segment(s, tile, add_kept);
    tsffn_barrier_wait(s->barrier, tile->nth);
    tsffn_reduce(s, tile);
    s->own[tile->ith].counts.ns_ffn += now_ns() - begin;
}
