// Phases B and C of ffn.c: which neurons are on, and what they add to the output. This is where weights are not read.
//
// Phase B lists the neurons that are on. In phase C every thread goes through its share of them, chunk by chunk,
// and several chunks are on their way at once:
//
//   step c    chunk c + 1  its gates are asked for
//             chunk c      gate
//             chunk c - 1  up and down of its neurons with gate > 0 are asked for
//             chunk c - 2  up, down
//
// What a step asks for is spread over its products, so that it is there when its own step comes. Random rows come as
// fast as rows in order only if they are asked for early and the asking never pauses. Yet little should be on its way
// at a time: that is what bounds the neurons of a chunk (docs/notes/2026-11-23-reading-rows.md).
#include "call.h"

#include <string.h>

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
    MANY_ROWS = 48,     // CHUNK_NEURONS
    BATCH_ROWS = 4,     // from so many rows on
    DOWN_COLUMNS = 512, // down is added by blocks of columns: 2 KB of sums, 288 bytes of a Q4_0 row
    UNPACK_ROWS = 2,    // weight rows are unpacked where so many rows add each on average,
    UNPACK_NEURONS = 4, // and each of those rows adds so many
};
_Static_assert((int)CHUNK_NEURONS <= (int)TSFFN_ADD_ROWS, "a chunk is added at once");
_Static_assert((int)STEPS == (int)GATE_AHEAD + (int)UP_DELAY + 1, "a list for each chunk that is on its way");

// Work is counted in blocks of weights that are multiplied.
static int64_t row_work(const struct tsffn_matrix * m, uint64_t rows) {
    return m->n_cols / TSFFN_BLOCK_SIZE * count_rows(rows);
}

static int64_t list_work(const struct tsffn_matrix * m, const struct worklist * list) {
    int64_t work = 0;
    for (int k = 0; k < list->n; ++k) {
        work += row_work(m, list->rows[k]);
    }
    return work;
}

// v[j] = row neuron[k] of m times the activations of the j-th row that needs it. Prefetches its share of the queue
// along the way, and the list's next row once more: some of that was dropped, or is only in the second-level cache by
// now.
static void dots(const struct segment * g, const struct tsffn_matrix * m, const struct worklist * list, int k,
                 const char * x, size_t x_bytes, struct tsffn_ask_queue * asked, float * v) {
    const uint64_t rows = list->rows[k];
    struct tsffn_asks asks = tsffn_queue_take(asked, row_work(m, rows));
    if (k + 1 < list->n) {
        asks.stream = tsffn_matrix_row(m, list->neuron[k + 1]);
        asks.n_stream = tsffn_cache_lines(tsffn_row_bytes(m->type, m->n_cols));
    }
    const void * activations[TILE_ROWS];
    int n = 0;
    for (uint64_t b = rows; b != 0; b &= b - 1) {
        activations[n++] = x + (size_t)g->rows[__builtin_ctzll(b)].token * x_bytes;
    }
    tsffn_matrix_dots(m, list->neuron[k], n, activations, v, &asks);
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

// h = relu(gate . x) of the listed neurons.
static void gates(const struct segment * g, struct tsffn_ask_queue * asked, struct worklist * list) {
    const struct tsffn_ffn * ffn = g->ffn;
    const bool dense = g->s->call->dense;
    float v[TILE_ROWS];
    int kept = 0;
    for (int k = 0; k < list->n; ++k) {
        dots(g, &ffn->gate, list, k, g->s->x_gate, g->s->x_gate_bytes, asked, v);
        const uint64_t positive = dense ? keep_all(list, k, v) : keep_positive(list, k, kept, v);
        g->counts->gate_positive += (uint64_t)count_rows(positive);
        kept += dense || positive != 0;
    }
    g->counts->bytes_ffn += (uint64_t)list->n * tsffn_row_bytes(ffn->gate.type, ffn->gate.n_cols);
    list->n = kept;
}

// Adds h * down_i of all listed neurons, row by row; asks meanwhile. Every sum takes its neurons in ascending order.
static void add_down(const struct segment * g, const struct worklist * list, struct tsffn_ask_queue * asked) {
    const struct tsffn_matrix * down = &g->ffn->down;
    for (int64_t r = g->r0; r < g->r1; ++r) {
        float h[CHUNK_NEURONS];
        const void * rows[CHUNK_NEURONS];
        int n = 0;
        for (int k = 0; k < list->n; ++k) {
            if ((list->rows[k] >> r & 1) == 0) {
                continue;
            }
            h[n] = list->h[k][r];
            rows[n++] = tsffn_matrix_row(down, list->neuron[k]);
            if (g->rows[r].h != NULL) {
                g->rows[r].h[list->neuron[k]] = list->h[k][r];
            }
        }
        const struct tsffn_asks asks = tsffn_queue_take(asked, n * (down->n_cols / TSFFN_BLOCK_SIZE));
        tsffn_matrix_axpys(down, n, h, rows, g->acc + r * g->s->n_embd, g->scratch, &asks);
    }
    g->counts->bytes_ffn += (uint64_t)list->n * tsffn_row_bytes(down->type, down->n_cols);
}

static void sort_by_rows(const struct segment * g, const struct worklist * list, struct row_terms * t) {
    int end[TILE_ROWS + 1] = {0};
    for (int k = 0; k < list->n; ++k) {
        for (uint64_t b = list->rows[k]; b != 0; b &= b - 1) {
            ++end[__builtin_ctzll(b) + 1];
        }
    }
    for (int r = 0; r < TILE_ROWS; ++r) {
        end[r + 1] += end[r];
    }
    memcpy(t->first, end, sizeof(end));
    for (int k = 0; k < list->n; ++k) {
        for (uint64_t b = list->rows[k]; b != 0; b &= b - 1) {
            const int r = __builtin_ctzll(b);
            const float h = list->h[k][r];
            t->terms[end[r]++] = (struct tsffn_term){.a = h, .row = k};
            if (g->rows[r].h != NULL) {
                g->rows[r].h[list->neuron[k]] = h;
            }
        }
    }
}

static struct tsffn_asks take_for_downs(const struct row_terms * t, int64_t n, struct tsffn_ask_queue * asked) {
    return tsffn_queue_take(asked, t->first[TILE_ROWS] * n / TSFFN_BLOCK_SIZE);
}

// Columns [c0, c0 + n) of h * down_i, row by row.
static void add_columns(const struct segment * g, const struct worklist * list, const struct row_terms * t, int64_t c0,
                        int64_t n) {
    const struct tsffn_matrix * down = &g->ffn->down;
    const size_t offset = tsffn_row_bytes(down->type, c0);
    for (int64_t r = g->r0; r < g->r1; ++r) {
        float h[CHUNK_NEURONS];
        const void * rows[CHUNK_NEURONS];
        const struct tsffn_term * terms = t->terms + t->first[r];
        const int n_terms = t->first[r + 1] - t->first[r];
        for (int i = 0; i < n_terms; ++i) {
            h[i] = terms[i].a;
            rows[i] = tsffn_matrix_row(down, list->neuron[terms[i].row]) + offset;
        }
        down->type->own_axpys(n, n_terms, h, rows, g->acc + r * g->s->n_embd + c0, NULL);
    }
}

// Adds h * down_i of all listed neurons for a batch: column block by column block, so that a row's sums of a block and
// that block of all the weight rows stay in L1. The sums are those of add_down.
static void add_downs(const struct segment * g, const struct worklist * list, struct tsffn_ask_queue * asked) {
    const struct tsffn_matrix * down = &g->ffn->down;
    const int64_t n_embd = g->s->n_embd;
    struct row_terms * t = &g->step->terms;
    sort_by_rows(g, list, t);
    int64_t c0 = 0;
    const int n_terms = t->first[TILE_ROWS];
    if (down->type->own_add_rows != NULL && n_terms >= UNPACK_ROWS * list->n &&
        n_terms >= UNPACK_NEURONS * (g->r1 - g->r0)) {
        const uint8_t * rows[CHUNK_NEURONS];
        for (int k = 0; k < list->n; ++k) {
            rows[k] = tsffn_matrix_row(down, list->neuron[k]);
        }
        const struct tsffn_additions additions = {
            .n_rows = list->n,
            .n_sums = (int)(g->r1 - g->r0),
            .rows = rows,
            .terms = t->terms,
            .first = t->first + g->r0,
            .y = g->acc + g->r0 * n_embd,
            .stride = n_embd,
            .unpacked = &g->step->unpacked,
        };
        for (; c0 + TSFFN_ADD_COLUMNS <= n_embd; c0 += TSFFN_ADD_COLUMNS) {
            const struct tsffn_asks asks = take_for_downs(t, TSFFN_ADD_COLUMNS, asked);
            tsffn_ask_all(&asks);
            down->type->own_add_rows(&additions, c0);
        }
    }
    for (; c0 < n_embd; c0 += DOWN_COLUMNS) {
        const int64_t n = min_i64(DOWN_COLUMNS, n_embd - c0);
        const struct tsffn_asks asks = take_for_downs(t, n, asked);
        tsffn_ask_all(&asks);
        add_columns(g, list, t, c0, n);
    }
    g->counts->bytes_ffn += (uint64_t)list->n * tsffn_row_bytes(down->type, down->n_cols);
}

// Whether add_downs serves these rows better than add_down.
static bool is_batch(const struct segment * g) {
    return g->r1 - g->r0 >= BATCH_ROWS && g->ffn->down.type->own_axpys != NULL;
}

// h *= relu(up . x) of the listed neurons, and down of those that stay.
static void ups_and_downs(const struct segment * g, struct tsffn_ask_queue * asked, struct worklist * list) {
    const struct tsffn_matrix * up = &g->ffn->up;
    const bool dense = g->s->call->dense;
    g->counts->bytes_ffn += (uint64_t)list->n * tsffn_row_bytes(up->type, up->n_cols);
    float v[TILE_ROWS];
    int kept = 0;
    for (int k = 0; k < list->n; ++k) {
        dots(g, up, list, k, g->s->x_up, g->s->x_up_bytes, asked, v);
        const uint64_t positive = dense ? keep_all(list, k, v) : keep_positive(list, k, kept, v);
        g->counts->active += (uint64_t)count_rows(positive);
        kept += dense || positive != 0;
    }
    list->n = kept;
    if (is_batch(g)) {
        add_downs(g, list, asked);
    } else {
        add_down(g, list, asked);
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
                const void * row = tsffn_matrix_row(&ffn->down, i);
                tsffn_matrix_axpys(&ffn->down, 1, &h, &row, g->acc + r * s->n_embd, g->scratch, NULL);
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
static void compute_chunk(const struct segment * g, int64_t i0, int64_t i1, const uint64_t * mask) {
    if (g->s->call->op != TSFFN_OP_FUSED) {
        for (int64_t i = i0; i < i1; ++i) {
            single_neuron(g, i, mask[i - i0]);
        }
        return;
    }
    struct tsffn_ask_queue * nothing = &g->step->queue;
    tsffn_queue_clear(nothing);
    tsffn_queue_close(nothing, 0);
    struct worklist * list = &g->step->lists[0];
    clear_hidden(g, i0, i1);
    tsffn_profile_neurons(g, i0, i1, mask, list);
    if (is_batch(g)) {
        add_downs(g, list, nothing);
    } else {
        add_down(g, list, nothing);
    }
    count_chunk(g, i1 - i0);
}

static uint64_t all_rows(const struct segment * g) {
    return (~(uint64_t)0 >> (TILE_ROWS - (g->r1 - g->r0))) << g->r0;
}

// The mask of the neurons [i0, i1), of a thread's part that ends at `end`.
static void mask_neurons(const struct segment * g, int64_t i0, int64_t i1, int64_t end, uint64_t * mask) {
    if (needs_predictor(g->s)) {
        tsffn_predict(g, i0, i1, end, mask);
        return;
    }
    for (int64_t i = i0; i < i1; ++i) {
        mask[i - i0] = all_rows(g);
    }
}

// Row r's counts, a block each.
static uint8_t * counts_of(const struct segment * g, int64_t r) {
    return g->s->needed.counts + (g->index * TILE_ROWS + r) * n_blocks_of(g->s->n_ff);
}

// Of the n neurons of a block, of which n_listed are needed by some row.
static void count_block(const struct segment * g, int64_t block, int64_t n_listed, int64_t n, const uint64_t * mask) {
    if (g->r1 - g->r0 == 1) {
        counts_of(g, g->r0)[block] = (uint8_t)n_listed;
        return;
    }
    uint8_t counts[TILE_ROWS] = {0};
    for (int64_t i = 0; i < n; ++i) {
        for (uint64_t b = mask[i]; b != 0; b &= b - 1) {
            ++counts[__builtin_ctzll(b)];
        }
    }
    for (int64_t r = g->r0; r < g->r1; ++r) {
        counts_of(g, r)[block] = counts[r];
    }
}

void tsffn_list_neurons(const struct segment * g) {
    const struct shared * s = g->s;
    const int64_t begin = first_neuron(s->n_ff, g->ith, g->nth);
    const int64_t end = first_neuron(s->n_ff, g->ith + 1, g->nth);
    int32_t * neuron = s->needed.neuron + g->index * s->n_ff + begin;
    uint64_t * needed_rows = s->needed.rows + g->index * s->n_ff + begin;
    int64_t n = 0, products = 0;
    uint64_t mask[CHUNK_NEURONS];
    for (int64_t i0 = begin, i1; i0 < end; i0 = i1) {
        i1 = min_i64((i0 / CHUNK_NEURONS + 1) * CHUNK_NEURONS, end);
        mask_neurons(g, i0, i1, end, mask);
        for (int64_t b0 = i0; b0 < i1; b0 += BLOCK_NEURONS) {
            const int64_t b1 = min_i64(b0 + BLOCK_NEURONS, i1), before = n;
            for (int64_t i = b0; i < b1; ++i) {
                const uint64_t rows = mask[i - i0];
                neuron[n] = (int32_t)i;
                needed_rows[n] = rows;
                n += rows != 0;
                products += count_rows(rows);
            }
            if (needs_predictor(s)) {
                count_block(g, b0 / BLOCK_NEURONS, n - before, b1 - b0, mask + (b0 - i0));
            }
        }
    }
    s->needed.n[g->index * g->nth + g->ith] = (int32_t)n;
    g->counts->predicted += (uint64_t)products;
    clear_hidden(g, begin, end);
    count_chunk(g, end - begin);
}

// The neurons that this thread computes for row r: [first[r], end[r]), whole blocks. With a predictor a row's threads
// share what that row needs as equally as blocks let them, whatever the other rows need, so that its sums do not depend
// on them (docs/notes/2026-11-28-threads.md).
struct share {
    int32_t first[TILE_ROWS], end[TILE_ROWS];
    int64_t first_of_any, first_of_all, end_of_all, end_of_any;
};

// A row's share of thread t begins with the first block before which there are at least t n-ths of what it needs.
static void find_share(const struct segment * g, struct share * share) {
    const int64_t n_blocks = n_blocks_of(g->s->n_ff);
    share->first_of_any = share->end_of_all = INT64_MAX;
    share->first_of_all = share->end_of_any = 0;
    for (int64_t r = g->r0; r < g->r1; ++r) {
        const uint8_t * counts = counts_of(g, r);
        int64_t total = 0;
        for (int64_t b = 0; b < n_blocks; ++b) {
            total += counts[b];
        }
        const int64_t from = total * g->ith / g->nth, to = total * (g->ith + 1) / g->nth;
        int64_t b = 0, sum = 0;
        for (; sum < from; ++b) {
            sum += counts[b];
        }
        const int64_t first = b * BLOCK_NEURONS;
        for (; sum < to; ++b) {
            sum += counts[b];
        }
        const int64_t end = b * BLOCK_NEURONS;
        share->first[r] = (int32_t)first;
        share->end[r] = (int32_t)end;
        share->first_of_any = min_i64(share->first_of_any, first);
        share->first_of_all = first > share->first_of_all ? first : share->first_of_all;
        share->end_of_all = min_i64(share->end_of_all, end);
        share->end_of_any = end > share->end_of_any ? end : share->end_of_any;
    }
}

// The rows for which neuron i is in this thread's share.
static uint64_t rows_of_share(const struct segment * g, const struct share * share, int64_t i) {
    if (i >= share->first_of_all && i < share->end_of_all) {
        return ~(uint64_t)0;
    }
    uint64_t rows = 0;
    for (int64_t r = g->r0; r < g->r1; ++r) {
        rows |= (uint64_t)(i >= share->first[r] && i < share->end[r]) << r;
    }
    return rows;
}

// Goes through this thread's neurons: with a predictor those of its share, through what all threads listed; else every
// n-th chunk, because how much work a neuron is shows only then, and hot ones may come first.
struct walk {
    struct share share;
    bool has_share;
    int64_t next;   // thread whose list is next, or chunk
    int64_t k, end; // what is left of the list or chunk before: places
};

static void begin_walk(const struct segment * g, struct walk * w) {
    w->has_share = needs_predictor(g->s);
    w->next = w->has_share ? 0 : g->ith;
    w->k = w->end = 0;
    if (w->has_share) {
        find_share(g, &w->share);
    }
}

// The first of n ascending numbers that is at least i.
static int64_t lower_bound(const int32_t * numbers, int64_t n, int64_t i) {
    int64_t begin = 0;
    while (begin < n) {
        const int64_t middle = begin + (n - begin) / 2;
        if (numbers[middle] < i) {
            begin = middle + 1;
        } else {
            n = middle;
        }
    }
    return begin;
}

// Goes to the next list or chunk that has neurons.
static bool next_places(const struct segment * g, struct walk * w) {
    const struct needed * needed = &g->s->needed;
    const int64_t n_ff = g->s->n_ff;
    if (!w->has_share) { // all neurons are listed
        w->k = min_i64(w->next * CHUNK_NEURONS, n_ff);
        w->end = min_i64(w->k + CHUNK_NEURONS, n_ff);
        w->next += g->nth;
        return w->k < w->end;
    }
    for (; w->next < g->nth; ++w->next) {
        const int64_t begin = first_neuron(n_ff, (int)w->next, g->nth);
        const int32_t * list = needed->neuron + g->index * n_ff + begin;
        const int64_t n = needed->n[g->index * g->nth + w->next];
        w->k = begin + lower_bound(list, n, w->share.first_of_any);
        w->end = begin + lower_bound(list, n, w->share.end_of_any);
        if (w->k < w->end) {
            ++w->next;
            return true;
        }
    }
    return false;
}

// Fills `list` with the next neurons of this thread, with h = 1.
static void next_neurons(const struct segment * g, int n_most, struct walk * w, struct worklist * list) {
    const struct needed * needed = &g->s->needed;
    list->n = 0;
    while (list->n < n_most && (w->k < w->end || next_places(g, w))) {
        const int64_t place = g->index * g->s->n_ff + w->k++;
        const int32_t neuron = needed->neuron[place];
        const uint64_t rows = needed->rows[place] & (w->has_share ? rows_of_share(g, &w->share, neuron) : ~(uint64_t)0);
        for (uint64_t b = rows; b != 0; b &= b - 1) {
            list->h[list->n][__builtin_ctzll(b)] = 1.0f;
        }
        list->neuron[list->n] = neuron;
        list->rows[list->n] = rows;
        list->n += rows != 0;
    }
}

static int chunk_neurons(const struct segment * g) {
    const int64_t n_rows = g->r1 - g->r0;
    if (n_rows >= SOME_ROWS) {
        return n_rows < MANY_ROWS ? SOME_NEURONS : CHUNK_NEURONS;
    }
    const int64_t fit = FEW_BYTES / (int64_t)tsffn_row_bytes(g->ffn->gate.type, g->ffn->gate.n_cols);
    return (int)(fit > FEW_NEURONS ? FEW_NEURONS : fit > 1 ? fit : 1);
}

void tsffn_compute_neurons(const struct segment * g) {
    const struct tsffn_ffn * ffn = g->ffn;
    const int n_most = chunk_neurons(g);
    struct walk walk;
    begin_walk(g, &walk);
    struct worklist * lists = g->step->lists;
    struct tsffn_ask_queue * queue = &g->step->queue;
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
        next_neurons(g, n_most, &walk, asked);
        if (asked->n == 0 && last == INT64_MAX) {
            last = c + GATE_AHEAD + UP_DELAY - 1;
        }
        tsffn_queue_clear(queue);
        for (int k = 0; k < asked->n; ++k) {
            tsffn_queue_row(queue, &ffn->gate, asked->neuron[k]);
        }
        for (int k = 0; k < kept->n; ++k) {
            tsffn_queue_row(queue, &ffn->up, kept->neuron[k]);
            tsffn_queue_row(queue, &ffn->down, kept->neuron[k]);
        }
        tsffn_queue_close(queue, list_work(&ffn->gate, gate_list) + 2 * list_work(&ffn->up, up_list));
        gates(g, queue, gate_list);
        ups_and_downs(g, queue, up_list);
        const struct tsffn_asks left = tsffn_queue_take(queue, queue->work);
        tsffn_ask_all(&left);
    }
}

void tsffn_compute_chunks(const struct segment * g) {
    const struct shared * s = g->s;
    uint64_t mask[CHUNK_NEURONS];
    for (int64_t i0 = (int64_t)g->ith * CHUNK_NEURONS; i0 < s->n_ff; i0 += (int64_t)g->nth * CHUNK_NEURONS) {
        const int64_t i1 = min_i64(i0 + CHUNK_NEURONS, s->n_ff);
        const uint64_t t0 = now_ns();
        mask_neurons(g, i0, i1, i1, mask);
        const uint64_t ns = now_ns() - t0;
        g->counts->ns_predictor += ns;
        g->counts->ns_ffn -= ns; // the caller counts all of this
        compute_chunk(g, i0, i1, mask);
    }
}
