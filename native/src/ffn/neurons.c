// Phase B of ffn.c: which neurons are on, and what they add to the output. This is where weights are not read.
#include "call.h"

#include <string.h>

// Which of the neurons [i0, i1) are on, for each row: bit r of mask[i - i0].
static void predict(const struct segment * g, int64_t i0, int64_t i1, uint64_t * mask) {
    const struct tsffn_ffn * ffn = g->ffn;
    const int64_t ahead = tsffn_matrix_rows_ahead(&ffn->fc2);
    for (int64_t i = i0; i < i1; ++i) {
        if (i + ahead < i1) {
            tsffn_matrix_prefetch(&ffn->fc2, i + ahead);
        }
        uint64_t bits = 0;
        for (int64_t r = g->r0; r < g->r1; ++r) {
            const float logit = tsffn_matrix_dot(&ffn->fc2, i, g->s->h1_converted + (size_t)r * g->s->h1_bytes);
            const bool on = ffn->on_when_equal ? logit >= ffn->threshold : logit > ffn->threshold;
            bits |= (uint64_t)on << r;
        }
        mask[i - i0] = bits;
    }
    g->counts->bytes_predictor += (uint64_t)(i1 - i0) * tsffn_row_bytes(ffn->fc2.type, ffn->fc2.n_cols);
}

// The whole FFN of neuron i for the rows in `bits`.
static void fused_neuron(const struct segment * g, int64_t i, uint64_t bits) {
    const struct shared * s = g->s;
    const struct tsffn_ffn * ffn = g->ffn;
    float gate[TILE_ROWS];
    uint64_t positive = 0;
    for (uint64_t b = bits; b != 0; b &= b - 1) {
        const int r = __builtin_ctzll(b);
        gate[r] = tsffn_matrix_dot(&ffn->gate, i, s->x_gate + (size_t)g->rows[r].token * s->x_gate_bytes);
        positive |= (uint64_t)(gate[r] > 0.0f) << r;
    }
    g->counts->bytes_ffn += tsffn_row_bytes(ffn->gate.type, s->n_embd);
    if (positive == 0) {
        return;
    }
    uint64_t active = 0;
    for (uint64_t b = positive; b != 0; b &= b - 1) {
        const int r = __builtin_ctzll(b);
        const float up = tsffn_matrix_dot(&ffn->up, i, s->x_up + (size_t)g->rows[r].token * s->x_up_bytes);
        if (up > 0.0f) {
            active |= (uint64_t)1 << r;
            const float h = gate[r] * up;
            if (g->rows[r].h != NULL) {
                g->rows[r].h[i] = h;
            }
            tsffn_matrix_axpy(&ffn->down, i, h, g->acc + r * s->n_embd, g->scratch);
        }
    }
    g->counts->gate_positive += (uint64_t)__builtin_popcountll(positive);
    g->counts->active += (uint64_t)__builtin_popcountll(active);
    g->counts->bytes_ffn += tsffn_row_bytes(ffn->up.type, s->n_embd);
    if (active != 0) {
        g->counts->bytes_ffn += tsffn_row_bytes(ffn->down.type, s->n_embd);
    }
}

// Neuron i alone, for a graph that was cut between the operations.
static void single_neuron(const struct segment * g, int64_t i, uint64_t bits) {
    const struct shared * s = g->s;
    const struct tsffn_ffn * ffn = g->ffn;
    const struct tsffn_call * call = s->call;
    for (int64_t r = g->r0; r < g->r1; ++r) {
        const size_t token = (size_t)g->rows[r].token;
        switch (call->op) {
        case TSFFN_OP_GATE:
            g->rows[r].y[i] =
                (bits >> r & 1) != 0 ? tsffn_matrix_dot(&ffn->gate, i, s->x_gate + token * s->x_gate_bytes) : 0.0f;
            break;
        case TSFFN_OP_UP:
            g->rows[r].y[i] = tsffn_matrix_dot(&ffn->up, i, s->x_up + token * s->x_up_bytes);
            break;
        case TSFFN_OP_DOWN: {
            const float h = ((const float *)(call->x + token * call->x_stride))[i];
            if (h != 0.0f) {
                tsffn_matrix_axpy(&ffn->down, i, h, g->acc + r * s->n_embd, g->scratch);
            }
            break;
        }
        case TSFFN_OP_FUSED:
            break;
        }
    }
}

// The neurons [i0, i1) with their masks: lists the ones that are on, then computes them with the next one's weights
// under way.
static void fused_neurons(const struct segment * g, int64_t i0, int64_t i1, const uint64_t * mask) {
    const struct tsffn_ffn * ffn = g->ffn;
    for (int64_t r = g->r0; r < g->r1; ++r) {
        if (g->rows[r].h != NULL) {
            memset(g->rows[r].h + i0, 0, (size_t)(i1 - i0) * sizeof(float));
        }
    }
    int64_t on[CHUNK_NEURONS];
    int n_on = 0;
    for (int64_t i = i0; i < i1; ++i) {
        if (mask[i - i0] != 0) {
            on[n_on++] = i;
            g->counts->predicted += (uint64_t)__builtin_popcountll(mask[i - i0]);
        }
    }
    for (int k = 0; k < n_on; ++k) {
        if (k + 1 < n_on) {
            // Random rows reach the sequential bandwidth only when they are asked for early.
            tsffn_matrix_prefetch(&ffn->gate, on[k + 1]);
            tsffn_matrix_prefetch(&ffn->up, on[k + 1]);
            tsffn_matrix_prefetch(&ffn->down, on[k + 1]);
        }
        fused_neuron(g, on[k], mask[on[k] - i0]);
    }
    g->counts->neurons += (uint64_t)((i1 - i0) * (g->r1 - g->r0));
    g->counts->bytes_dense += (uint64_t)(i1 - i0) * (tsffn_row_bytes(ffn->gate.type, g->s->n_embd) +
                                                     tsffn_row_bytes(ffn->up.type, g->s->n_embd) +
                                                     tsffn_row_bytes(ffn->down.type, g->s->n_embd));
}

void tsffn_compute_neurons(const struct segment * g, int64_t i0, int64_t i1) {
    const int64_t n_rows = g->r1 - g->r0;
    const uint64_t all = (~(uint64_t)0 >> (TILE_ROWS - n_rows)) << g->r0;
    uint64_t mask[CHUNK_NEURONS];
    const uint64_t t0 = now_ns();
    if (needs_predictor(g->s->call)) {
        predict(g, i0, i1, mask);
    } else {
        for (int64_t i = i0; i < i1; ++i) {
            mask[i - i0] = all;
        }
    }
    const uint64_t t1 = now_ns();
    if (g->s->call->op == TSFFN_OP_FUSED) {
        fused_neurons(g, i0, i1, mask);
    } else {
        for (int64_t i = i0; i < i1; ++i) {
            single_neuron(g, i, mask[i - i0]);
        }
    }
    g->counts->ns_predictor += t1 - t0;
    g->counts->ns_ffn += now_ns() - t1;
}
