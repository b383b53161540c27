// Phase B of ffn.c: which neurons are on, and what they add to the output. This is where weights are not read.
#include "call.h"

#include <string.h>

// Which of the neurons [i0, i1) are on, for each row: bit r of mask[i - i0].
static void predict(const struct segment * g, int64_t i0, int64_t i1, uint64_t * mask) {
    const struct tsffn_ffn * ffn = g->ffn;
    const void * hidden[TILE_ROWS];
    float logit[TILE_ROWS];
    const int n = (int)(g->r1 - g->r0);
    for (int k = 0; k < n; ++k) {
        hidden[k] = g->s->h1_converted + (size_t)(g->r0 + k) * g->s->h1_bytes;
    }
    for (int64_t i = i0; i < i1; ++i) {
        tsffn_matrix_stream_dots(&ffn->fc2, i, i1, n, hidden, logit);
        uint64_t bits = 0;
        for (int k = 0; k < n; ++k) {
            const bool on = ffn->on_when_equal ? logit[k] >= ffn->threshold : logit[k] > ffn->threshold;
            bits |= (uint64_t)on << (g->r0 + k);
        }
        mask[i - i0] = bits;
        if (bits != 0) {
            tsffn_matrix_prefetch(&ffn->gate, i); // it arrives while the other logits are computed
        }
    }
    g->counts->bytes_predictor += (uint64_t)(i1 - i0) * tsffn_row_bytes(ffn->fc2.type, ffn->fc2.n_cols);
}

// Multiplies h with relu(row . x) of every neuron and row in the list, and drops from it what becomes zero. What is
// kept will need its row of `next`, which is asked for at once: random rows reach the sequential bandwidth only when
// they are asked for early, and at this point nothing is asked for in vain. `ahead` is how far in advance to ask for
// m's own rows, 0 when that was done. Returns how many (neuron, row) pairs are left.
static uint64_t multiply(const struct segment * g, const struct tsffn_matrix * m, const char * x, size_t x_bytes,
                         int64_t ahead, const struct tsffn_matrix * next, struct worklist * list) {
    uint64_t n_positive = 0;
    int kept = 0;
    for (int k = 0; k < list->n; ++k) {
        if (ahead > 0 && k + ahead < list->n) {
            tsffn_matrix_prefetch(m, list->neuron[k + ahead]);
        }
        const void * activations[TILE_ROWS];
        float v[TILE_ROWS];
        int n = 0;
        for (uint64_t b = list->rows[k]; b != 0; b &= b - 1) {
            activations[n++] = x + (size_t)g->rows[__builtin_ctzll(b)].token * x_bytes;
        }
        tsffn_matrix_dots(m, list->neuron[k], n, activations, v);
        uint64_t positive = 0;
        n = 0;
        for (uint64_t b = list->rows[k]; b != 0; b &= b - 1, ++n) {
            const int r = __builtin_ctzll(b);
            if (v[n] > 0.0f) {
                positive |= (uint64_t)1 << r;
                list->h[kept][r] = v[n] * list->h[k][r]; // kept <= k
            }
        }
        if (positive != 0) {
            tsffn_matrix_prefetch(next, list->neuron[k]);
            n_positive += (uint64_t)__builtin_popcountll(positive);
            list->neuron[kept] = list->neuron[k];
            list->rows[kept] = positive;
            ++kept;
        }
    }
    g->counts->bytes_ffn += (uint64_t)list->n * tsffn_row_bytes(m->type, m->n_cols);
    list->n = kept;
    return n_positive;
}

// Adds h * down of every neuron and row in the list.
static void add_down(const struct segment * g, const struct worklist * list) {
    const struct tsffn_matrix * down = &g->ffn->down;
    for (int k = 0; k < list->n; ++k) {
        for (uint64_t b = list->rows[k]; b != 0; b &= b - 1) {
            const int r = __builtin_ctzll(b);
            const float h = list->h[k][r];
            if (g->rows[r].h != NULL) {
                g->rows[r].h[list->neuron[k]] = h;
            }
            tsffn_matrix_axpy(down, list->neuron[k], h, g->acc + r * g->s->n_embd, g->scratch);
        }
    }
    g->counts->bytes_ffn += (uint64_t)list->n * tsffn_row_bytes(down->type, down->n_cols);
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

// Gate for the neurons [i0, i1) that are on, up where gate > 0; lists what is left.
static void sparse_neurons(const struct segment * g, int64_t i0, int64_t i1, const uint64_t * mask,
                           struct worklist * list) {
    const struct shared * s = g->s;
    const struct tsffn_ffn * ffn = g->ffn;
    list->n = 0;
    for (int64_t i = i0; i < i1; ++i) {
        const uint64_t rows = mask[i - i0];
        if (rows != 0) {
            g->counts->predicted += (uint64_t)__builtin_popcountll(rows);
            for (int64_t r = g->r0; r < g->r1; ++r) {
                list->h[list->n][r] = 1.0f;
            }
            list->neuron[list->n] = i;
            list->rows[list->n] = rows;
            ++list->n;
        }
    }
    // predict() has asked for the gates of the neurons that are on; without it all of them are.
    const int64_t ahead = needs_predictor(s->call) ? 0 : tsffn_matrix_rows_ahead(&ffn->gate);
    g->counts->gate_positive += multiply(g, &ffn->gate, s->x_gate, s->x_gate_bytes, ahead, &ffn->up, list);
    g->counts->active += multiply(g, &ffn->up, s->x_up, s->x_up_bytes, 0, &ffn->down, list);
}

// The whole FFN of the neurons [i0, i1): gate and up, then down for the neurons whose product is not 0.
static void fused_neurons(const struct segment * g, int64_t i0, int64_t i1, const uint64_t * mask) {
    const struct shared * s = g->s;
    const struct tsffn_ffn * ffn = g->ffn;
    struct worklist list;
    for (int64_t r = g->r0; r < g->r1; ++r) {
        if (g->rows[r].h != NULL) {
            memset(g->rows[r].h + i0, 0, (size_t)(i1 - i0) * sizeof(float));
        }
    }
    if (s->call->profile != NULL) {
        tsffn_profile_neurons(g, i0, i1, mask, &list);
    } else {
        sparse_neurons(g, i0, i1, mask, &list);
    }
    add_down(g, &list);
    g->counts->neurons += (uint64_t)((i1 - i0) * (g->r1 - g->r0));
    g->counts->bytes_dense +=
        (uint64_t)(i1 - i0) * (tsffn_row_bytes(ffn->gate.type, s->n_embd) + tsffn_row_bytes(ffn->up.type, s->n_embd) +
                               tsffn_row_bytes(ffn->down.type, s->n_embd));
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
