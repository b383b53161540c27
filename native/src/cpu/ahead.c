// Which neurons the next layer will need, as far as this one's activations tell: the residual changes little from layer
// to layer. Nothing that is computed depends on it.
#include "phases.h"

// The thread's part of the next layer's neurons.
static void expect_some(const struct segment * g) {
    const int64_t n_ff = g->s->layer->n_ff;
    const int64_t begin = first_neuron(n_ff, g->ith, g->nth), end = first_neuron(n_ff, g->ith + 1, g->nth);
    enum { AT_ONCE = 4 * CHUNK_NEURONS };
    int32_t list[AT_ONCE];
    int64_t n = 0;
    uint64_t mask[CHUNK_NEURONS];
    for (int64_t i0 = begin, i1; i0 < end; i0 = i1) {
        i1 = min_i64((i0 / CHUNK_NEURONS + 1) * CHUNK_NEURONS, end);
        tsffn_mask_neurons(g, i0, i1, end, mask);
        for (int64_t i = i0; i < i1; ++i) {
            list[n] = (int32_t)i;
            n += mask[i - i0] != 0;
        }
        if (n + CHUNK_NEURONS > AT_ONCE || i1 == end) {
            tsffn_neurons_expect(&g->ffn->neurons, list, n);
            n = 0;
        }
    }
}

void tsffn_expect_next(const struct shared * s, const struct tile * tile) {
    struct shared next = *s;
    next.layer = s->next;
    tsffn_hidden_layer(&next, tile);
    tsffn_each_segment(&next, tile, expect_some);
}
