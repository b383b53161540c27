// Single operations, for a graph that was cut between those of an FFN: as a rule because somebody asked for what is
// between them. Threads take chunks of neurons in turn.
#include "phases.h"

// Row r's y[i] = row i of `part` . x
static void dot(const struct segment * g, enum tsffn_part part, struct activations x, int64_t i, int64_t r) {
    const struct tsffn_cpu_layer * layer = g->s->layer;
    const void * activations = activations_of(x, g->rows[r].token);
    tsffn_row_dots(layer->types[part], layer->n_embd, tsffn_neuron_row(&g->ffn->neurons, part, i), 1, &activations,
                   g->rows[r].y + i, NULL);
}

static void gate_segment(const struct segment * g) {
    uint64_t mask[CHUNK_NEURONS];
    for (int64_t k = 0, i0, i1; own_chunk(g, k, &i0, &i1); ++k) {
        tsffn_mask_neurons(g, i0, i1, i1, mask);
        tsffn_bring_chunk(g, i0, i1);
        for (int64_t i = i0; i < i1; ++i) {
            for (int64_t r = g->r0; r < g->r1; ++r) {
                if ((mask[i - i0] >> r & 1) != 0) {
                    dot(g, TSFFN_PART_GATE, g->s->x.gate, i, r);
                } else {
                    g->rows[r].y[i] = 0.0f;
                }
            }
        }
        tsffn_release_chunk(g, i0, i1);
    }
}

static void up_segment(const struct segment * g) {
    for (int64_t k = 0, i0, i1; own_chunk(g, k, &i0, &i1); ++k) {
        tsffn_bring_chunk(g, i0, i1);
        for (int64_t i = i0; i < i1; ++i) {
            for (int64_t r = g->r0; r < g->r1; ++r) {
                dot(g, TSFFN_PART_UP, g->s->x.up, i, r);
            }
        }
        tsffn_release_chunk(g, i0, i1);
    }
}

static void down_segment(const struct segment * g) {
    const struct tsffn_cpu_layer * layer = g->s->layer;
    for (int64_t k = 0, i0, i1; own_chunk(g, k, &i0, &i1); ++k) {
        tsffn_bring_chunk(g, i0, i1);
        for (int64_t i = i0; i < i1; ++i) {
            const void * row = tsffn_neuron_row(&g->ffn->neurons, TSFFN_PART_DOWN, i);
            for (int64_t r = g->r0; r < g->r1; ++r) {
                const float h = token_x(g->s, g->rows[r].token)[i];
                if (h != 0.0f) {
                    tsffn_row_axpys(layer->types[TSFFN_PART_DOWN], layer->n_embd, 1, &h, &row,
                                    g->own->sums + r * layer->n_embd, g->own->scratch, NULL);
                }
            }
        }
        tsffn_release_chunk(g, i0, i1);
    }
}

void tsffn_gate_tile(const struct shared * s, const struct tile * tile) {
    if (s->predicts) {
        tsffn_hidden_layer(s, tile);
    }
    tsffn_each_segment(s, tile, gate_segment);
}

void tsffn_up_tile(const struct shared * s, const struct tile * tile) {
    tsffn_each_segment(s, tile, up_segment);
}

void tsffn_down_tile(const struct shared * s, const struct tile * tile) {
    tsffn_clear_sums(s, tile);
    tsffn_each_segment(s, tile, down_segment);
    tsffn_barrier_wait(s->barrier, tile->nth);
    tsffn_reduce(s, tile);
}
