// Phase B of ffn.c: which neurons are on, and what they add to the output. This is where weights are not read.
//
// A thread takes every n_threads-th chunk of neurons, and several chunks are on their way at once:
//
//   step c    chunk c      logits -> mask    the gates of the neurons that are on will be needed
//             chunk c - 2  gate              up and down of the neurons with gate > 0 will be needed
//             chunk c - 4  up, down
//
// What a step finds to be needed is asked for all through the next one, with the predictor's rows of the chunk after
// that, so that it lies in L2 when its own step comes. Random rows reach the sequential bandwidth only when they are
// asked for early, and all of them the memory's bandwidth only if the asking never pauses: asked for in bursts, weights
// came at 12 GB/s where reading alone reaches 25 (two cores).
#include "call.h"

#include <string.h>

enum {
    GATE_DELAY = 2,            // steps from a chunk's mask to its gates,
    UP_DELAY = 2 * GATE_DELAY, // and to its ups and downs
    STEPS = UP_DELAY + 1,
    BATCH_ROWS = 4,     // from so many rows on
    DOWN_COLUMNS = 512, // down is added by blocks of columns: 2 KB of sums, 288 bytes of a Q4_0 row
};

// Work is counted in blocks of weights that are multiplied (tsffn_predict_work).
static int64_t row_work(const struct tsffn_matrix * m, uint64_t rows) {
    return m->n_cols / TSFFN_BLOCK_SIZE * __builtin_popcountll(rows);
}

static int64_t list_work(const struct tsffn_matrix * m, const struct worklist * list) {
    int64_t work = 0;
    for (int k = 0; list != NULL && k < list->n; ++k) {
        work += row_work(m, list->rows[k]);
    }
    return work;
}

// Row i of m times the activations of the given rows, one after the other; asks for what of the queue falls to this.
static void dots(const struct segment * g, const struct tsffn_matrix * m, int64_t i, uint64_t rows, const char * x,
                 size_t x_bytes, struct tsffn_ask_queue * asked, float * v) {
    const struct tsffn_asks asks = tsffn_queue_take(asked, row_work(m, rows));
    const void * activations[TILE_ROWS];
    int n = 0;
    for (uint64_t b = rows; b != 0; b &= b - 1) {
        activations[n++] = x + (size_t)g->rows[__builtin_ctzll(b)].token * x_bytes;
    }
    tsffn_matrix_dots(m, i, n, activations, v, &asks);
}

// Multiplies the k-th neuron's h with relu(v) of its rows, and writes what stays to place `kept` <= k. Returns the rows
// where v > 0; what is not positive anywhere is dropped.
static uint64_t keep_positive(struct worklist * list, int k, int kept, const float * v) {
    uint64_t positive = 0;
    for (uint64_t b = list->rows[k]; b != 0; b &= b - 1, ++v) {
        const int r = __builtin_ctzll(b);
        if (*v > 0.0f) {
            positive |= (uint64_t)1 << r;
            list->h[kept][r] = *v * list->h[k][r];
        }
    }
    list->neuron[kept] = list->neuron[k];
    list->rows[kept] = positive;
    return positive;
}

// As keep_positive, for a dense computation: nothing is dropped.
static uint64_t keep_all(struct worklist * list, int k, const float * v) {
    uint64_t positive = 0;
    for (uint64_t b = list->rows[k]; b != 0; b &= b - 1, ++v) {
        const int r = __builtin_ctzll(b);
        positive |= (uint64_t)(*v > 0.0f && list->h[k][r] > 0.0f) << r;
        list->h[k][r] *= *v > 0.0f ? *v : 0.0f;
    }
    return positive;
}

// Lists the neurons [i0, i1) that are on, with h = 1; their gates go into the queue.
static void list_neurons(const struct segment * g, int64_t i0, int64_t i1, const uint64_t * mask,
                         struct tsffn_ask_queue * queue, struct worklist * list) {
    list->n = 0;
    for (int64_t i = i0; i < i1; ++i) {
        const uint64_t rows = mask[i - i0];
        if (rows != 0) {
            g->counts->predicted += (uint64_t)__builtin_popcountll(rows);
            for (uint64_t b = rows; b != 0; b &= b - 1) {
                list->h[list->n][__builtin_ctzll(b)] = 1.0f;
            }
            list->neuron[list->n] = i;
            list->rows[list->n] = rows;
            ++list->n;
            tsffn_queue_row(queue, &g->ffn->gate, i);
        }
    }
}

// h = relu(gate . x) of the listed neurons; up and down of those that stay go into the queue.
static void gates(const struct segment * g, struct tsffn_ask_queue * asked, struct tsffn_ask_queue * queue,
                  struct worklist * list) {
    const struct tsffn_ffn * ffn = g->ffn;
    const bool dense = g->s->call->dense;
    float v[TILE_ROWS];
    int kept = 0;
    for (int k = 0; k < list->n; ++k) {
        const int64_t i = list->neuron[k];
        dots(g, &ffn->gate, i, list->rows[k], g->s->x_gate, g->s->x_gate_bytes, asked, v);
        const uint64_t positive = dense ? keep_all(list, k, v) : keep_positive(list, k, kept, v);
        g->counts->gate_positive += (uint64_t)__builtin_popcountll(positive);
        if (dense || positive != 0) {
            tsffn_queue_row(queue, &ffn->up, i);
            tsffn_queue_row(queue, &ffn->down, i);
            ++kept;
        }
    }
    g->counts->bytes_ffn += (uint64_t)list->n * tsffn_row_bytes(ffn->gate.type, ffn->gate.n_cols);
    list->n = kept;
}

// Adds h * down_i of the k-th neuron; asks meanwhile.
static void add_down(const struct segment * g, const struct worklist * list, int k, struct tsffn_ask_queue * asked) {
    const struct tsffn_matrix * down = &g->ffn->down;
    for (uint64_t b = list->rows[k]; b != 0; b &= b - 1) {
        const int r = __builtin_ctzll(b);
        const float h = list->h[k][r];
        if (g->rows[r].h != NULL) {
            g->rows[r].h[list->neuron[k]] = h;
        }
        const struct tsffn_asks asks = tsffn_queue_take(asked, down->n_cols / TSFFN_BLOCK_SIZE);
        tsffn_matrix_axpy(down, list->neuron[k], h, g->acc + r * g->s->n_embd, g->scratch, &asks);
    }
    g->counts->bytes_ffn += tsffn_row_bytes(down->type, down->n_cols);
}

// Adds h * down_i of all listed neurons for a batch: column block by column block, so that a token's sums of a block
// and that block of all the rows stay in L1. Every sum takes its neurons in ascending order, as in add_down.
static void add_downs(const struct segment * g, const struct worklist * list, struct tsffn_ask_queue * asked) {
    const struct tsffn_matrix * down = &g->ffn->down;
    const int64_t n_embd = g->s->n_embd;
    uint8_t neurons[TILE_ROWS][CHUNK_NEURONS]; // of each row: places in the list
    int n_neurons[TILE_ROWS] = {0};
    float scales[CHUNK_NEURONS][DOWN_COLUMNS / TSFFN_BLOCK_SIZE]; // of the column block
    int64_t n_pairs = 0;
    for (int k = 0; k < list->n; ++k) {
        for (uint64_t b = list->rows[k]; b != 0; b &= b - 1, ++n_pairs) {
            const int r = __builtin_ctzll(b);
            neurons[r][n_neurons[r]++] = (uint8_t)k;
            if (g->rows[r].h != NULL) {
                g->rows[r].h[list->neuron[k]] = list->h[k][r];
            }
        }
    }
    for (int64_t c0 = 0; c0 < n_embd; c0 += DOWN_COLUMNS) {
        const int64_t n = min_i64(DOWN_COLUMNS, n_embd - c0);
        const size_t offset = tsffn_row_bytes(down->type, c0);
        const struct tsffn_asks asks = tsffn_queue_take(asked, n_pairs * n / TSFFN_BLOCK_SIZE);
        tsffn_ask_all(&asks);
        for (int k = 0; down->type->own_scales != NULL && k < list->n; ++k) {
            down->type->own_scales(n, tsffn_matrix_row(down, list->neuron[k]) + offset, scales[k]);
        }
        for (int64_t r = g->r0; r < g->r1; ++r) {
            float * sums = g->acc + r * n_embd + c0;
            for (int k = 0; k < n_neurons[r]; ++k) {
                const int place = neurons[r][k];
                const float h = list->h[place][r];
                const uint8_t * row = tsffn_matrix_row(down, list->neuron[place]) + offset;
                if (down->type->own_scales != NULL) {
                    down->type->own_axpy_scaled(n, h, row, scales[place], sums);
                } else {
                    down->type->own_axpy(n, h, row, sums);
                }
            }
        }
    }
    g->counts->bytes_ffn += (uint64_t)list->n * tsffn_row_bytes(down->type, down->n_cols);
}

// h *= relu(up . x) of the listed neurons, and down of those that stay.
static void ups_and_downs(const struct segment * g, struct tsffn_ask_queue * asked, struct worklist * list) {
    const struct tsffn_matrix * up = &g->ffn->up;
    const bool dense = g->s->call->dense;
    const bool batch = g->r1 - g->r0 >= BATCH_ROWS && g->ffn->down.type->own_axpy != NULL;
    g->counts->bytes_ffn += (uint64_t)list->n * tsffn_row_bytes(up->type, up->n_cols);
    float v[TILE_ROWS];
    int kept = 0;
    for (int k = 0; k < list->n; ++k) {
        dots(g, up, list->neuron[k], list->rows[k], g->s->x_up, g->s->x_up_bytes, asked, v);
        const uint64_t positive = dense ? keep_all(list, k, v) : keep_positive(list, k, kept, v);
        g->counts->active += (uint64_t)__builtin_popcountll(positive);
        if (dense || positive != 0) {
            if (!batch) {
                add_down(g, list, kept, asked);
            }
            ++kept;
        }
    }
    list->n = kept;
    if (batch) {
        add_downs(g, list, asked);
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
                tsffn_matrix_axpy(&ffn->down, i, h, g->acc + r * s->n_embd, g->scratch, &(struct tsffn_asks){0});
            }
            break;
        }
        case TSFFN_OP_FUSED:
            break;
        }
    }
}

static void count_chunk(const struct segment * g, int64_t n_neurons) {
    const struct tsffn_ffn * ffn = g->ffn;
    g->counts->neurons += (uint64_t)(n_neurons * (g->r1 - g->r0));
    g->counts->bytes_dense += (uint64_t)n_neurons * (tsffn_row_bytes(ffn->gate.type, ffn->n_embd) +
                                                     tsffn_row_bytes(ffn->up.type, ffn->n_embd) +
                                                     tsffn_row_bytes(ffn->down.type, ffn->n_embd));
}

static void clear_hidden(const struct segment * g, int64_t i0, int64_t i1) {
    for (int64_t r = g->r0; r < g->r1; ++r) {
        if (g->rows[r].h != NULL) {
            memset(g->rows[r].h + i0, 0, (size_t)(i1 - i0) * sizeof(float));
        }
    }
}

// One chunk of whatever is not the sparse FFN: single operations, and activation statistics.
static void compute_chunk(const struct segment * g, int64_t i0, int64_t i1, const uint64_t * mask,
                          struct tsffn_ask_queue * asked, struct worklist * list) {
    if (g->s->call->op != TSFFN_OP_FUSED) {
        for (int64_t i = i0; i < i1; ++i) {
            single_neuron(g, i, mask[i - i0]);
        }
        return;
    }
    clear_hidden(g, i0, i1);
    tsffn_profile_neurons(g, i0, i1, mask, list);
    for (int k = 0; k < list->n; ++k) {
        add_down(g, list, k, asked);
    }
    count_chunk(g, i1 - i0);
}

void tsffn_compute_neurons(const struct segment * g) {
    const struct shared * s = g->s;
    const struct tsffn_ffn * ffn = g->ffn;
    const int64_t n_rows = g->r1 - g->r0;
    const uint64_t all = (~(uint64_t)0 >> (TILE_ROWS - n_rows)) << g->r0;
    const bool predicts = needs_predictor(s->call);
    const bool sparse = s->call->op == TSFFN_OP_FUSED && s->call->profile == NULL;
    const int64_t step = (int64_t)g->nth * CHUNK_NEURONS;
    const int64_t first = (int64_t)g->ith * CHUNK_NEURONS;
    const int64_t n_chunks = first < s->n_ff ? (s->n_ff - first + step - 1) / step : 0;
    uint64_t mask[CHUNK_NEURONS];
    struct worklist lists[STEPS];     // of chunk c at c mod STEPS
    struct tsffn_ask_queue queues[2]; // filled in step c at c mod 2, asked for in step c + 1
    tsffn_queue_clear(&queues[1]);
    for (int64_t c = 0; c < n_chunks + (sparse ? UP_DELAY : 0); ++c) {
        const int64_t i0 = first + c * step;
        const int64_t i1 = min_i64(i0 + CHUNK_NEURONS, s->n_ff);
        const bool has_gates = sparse && c >= GATE_DELAY && c - GATE_DELAY < n_chunks;
        const bool has_ups = sparse && c >= UP_DELAY;
        struct worklist * list = &lists[c % STEPS];
        struct worklist * gate_list = has_gates ? &lists[(c - GATE_DELAY) % STEPS] : NULL;
        struct worklist * up_list = has_ups ? &lists[(c - UP_DELAY) % STEPS] : NULL;
        struct tsffn_ask_queue * asked = &queues[(c + 1) % 2];
        struct tsffn_ask_queue * queue = &queues[c % 2];
        tsffn_queue_clear(queue);
        const int64_t predict_work = predicts && c < n_chunks ? n_rows * tsffn_predict_work(&ffn->fc2, i1 - i0) : 0;
        const int64_t next_rows = predicts && c + 1 < n_chunks ? min_i64(CHUNK_NEURONS, s->n_ff - i0 - step) : 0;
        tsffn_queue_close(asked, next_rows > 0 ? tsffn_matrix_row(&ffn->fc2, i0 + step) : NULL,
                          next_rows > 0 ? (size_t)next_rows * tsffn_row_bytes(ffn->fc2.type, ffn->fc2.n_cols) : 0,
                          predict_work + list_work(&ffn->gate, gate_list) + 2 * list_work(&ffn->up, up_list));
        const uint64_t t0 = now_ns();
        if (predicts && c < n_chunks) {
            tsffn_predict(g, i0, i1, asked, mask);
        } else {
            for (int64_t i = i0; i < i1; ++i) {
                mask[i - i0] = all;
            }
        }
        const uint64_t t1 = now_ns();
        g->counts->ns_predictor += t1 - t0;
        if (sparse && c < n_chunks) {
            clear_hidden(g, i0, i1);
            list_neurons(g, i0, i1, mask, queue, list);
            count_chunk(g, i1 - i0);
        } else if (c < n_chunks) {
            compute_chunk(g, i0, i1, mask, asked, list);
        }
        if (has_gates) {
            gates(g, asked, queue, gate_list);
        }
        if (has_ups) {
            ups_and_downs(g, asked, up_list);
        }
        const struct tsffn_asks left = tsffn_queue_take(asked, asked->work);
        tsffn_ask_all(&left);
        g->counts->ns_ffn += now_ns() - t1;
    }
}
