// Adds h * down_i of a chunk's neurons to a thread's sums (phase C of ffn.c), and in the end the sums of all threads
// (phase D).
#include "phases.h"

#include <string.h>

enum {
    BATCH_ROWS = 4,     // from so many rows on
    DOWN_COLUMNS = 512, // down is added by blocks of columns: 2 KB of sums, 288 bytes of a Q4_0 row
    UNPACK_ROWS = 2,    // weight rows are unpacked where so many rows add each on average,
    UNPACK_NEURONS = 4, // and each of those rows adds so many
    COLUMN_BLOCK = 256, // columns per unit of work in phase D: whole cache lines, no false sharing
};
_Static_assert((int)CHUNK_NEURONS <= (int)TSFFN_ADD_ROWS, "a chunk is added at once");

static const struct tsffn_row_type * down_type(const struct segment * g) {
    return g->s->layer->types[TSFFN_PART_DOWN];
}

static const uint8_t * down_row(const struct segment * g, int64_t i) {
    return tsffn_neuron_row(&g->ffn->neurons, TSFFN_PART_DOWN, i);
}

static float * sums_of(const struct segment * g, int64_t r) {
    return g->own->sums + r * g->s->layer->n_embd;
}

// Row by row. Every sum takes its neurons in ascending order.
static void add_row_by_row(const struct segment * g, const struct worklist * list, struct tsffn_ask_queue * asked) {
    const int64_t n_embd = g->s->layer->n_embd;
    for (int64_t r = g->r0; r < g->r1; ++r) {
        float h[CHUNK_NEURONS];
        const void * rows[CHUNK_NEURONS];
        int n = 0;
        for (int k = 0; k < list->n; ++k) {
            if ((list->rows[k] >> r & 1) == 0) {
                continue;
            }
            h[n] = list->h[k][r];
            rows[n++] = down_row(g, list->neuron[k]);
            if (g->rows[r].h != NULL) {
                g->rows[r].h[list->neuron[k]] = list->h[k][r];
            }
        }
        const struct tsffn_asks asks = tsffn_queue_take(asked, n * (n_embd / TSFFN_BLOCK_SIZE));
        tsffn_row_axpys(down_type(g), n_embd, n, h, rows, sums_of(g, r), g->own->scratch, &asks);
    }
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

// Columns [c0, c0 + n) of h * down_i, row by row; `down` are the list's rows.
static void add_columns(const struct segment * g, const uint8_t * const * down, const struct row_terms * t, int64_t c0,
                        int64_t n) {
    const size_t offset = tsffn_row_bytes(down_type(g), c0);
    for (int64_t r = g->r0; r < g->r1; ++r) {
        float h[CHUNK_NEURONS];
        const void * rows[CHUNK_NEURONS];
        const struct tsffn_term * terms = t->terms + t->first[r];
        const int n_terms = t->first[r + 1] - t->first[r];
        for (int i = 0; i < n_terms; ++i) {
            h[i] = terms[i].a;
            rows[i] = down[terms[i].row] + offset;
        }
        down_type(g)->own_axpys(n, n_terms, h, rows, sums_of(g, r) + c0, NULL);
    }
}

// For a batch: column block by column block, so that a row's sums of a block and that block of all the weight rows stay
// in L1. The sums are those of add_row_by_row.
static void add_batch(const struct segment * g, const struct worklist * list, struct tsffn_ask_queue * asked) {
    const int64_t n_embd = g->s->layer->n_embd;
    struct row_terms * t = &g->own->terms;
    sort_by_rows(g, list, t);
    const uint8_t * rows[CHUNK_NEURONS];
    for (int k = 0; k < list->n; ++k) {
        rows[k] = down_row(g, list->neuron[k]);
    }
    int64_t c0 = 0;
    const int n_terms = t->first[TILE_ROWS];
    if (down_type(g)->own_add_rows != NULL && n_terms >= UNPACK_ROWS * list->n &&
        n_terms >= UNPACK_NEURONS * (g->r1 - g->r0)) {
        const struct tsffn_additions additions = {
            .n_rows = list->n,
            .n_sums = (int)(g->r1 - g->r0),
            .rows = rows,
            .terms = t->terms,
            .first = t->first + g->r0,
            .y = sums_of(g, g->r0),
            .stride = n_embd,
            .unpacked = &g->own->unpacked,
        };
        for (; c0 + TSFFN_ADD_COLUMNS <= n_embd; c0 += TSFFN_ADD_COLUMNS) {
            const struct tsffn_asks asks = take_for_downs(t, TSFFN_ADD_COLUMNS, asked);
            tsffn_ask_all(&asks);
            down_type(g)->own_add_rows(&additions, c0);
        }
    }
    for (; c0 < n_embd; c0 += DOWN_COLUMNS) {
        const int64_t n = min_i64(DOWN_COLUMNS, n_embd - c0);
        const struct tsffn_asks asks = take_for_downs(t, n, asked);
        tsffn_ask_all(&asks);
        add_columns(g, rows, t, c0, n);
    }
}

void tsffn_add_downs(const struct segment * g, const struct worklist * list, struct tsffn_ask_queue * asked) {
    if (g->r1 - g->r0 >= BATCH_ROWS && down_type(g)->own_axpys != NULL) {
        add_batch(g, list, asked);
    } else {
        add_row_by_row(g, list, asked);
    }
    g->own->counts.bytes_ffn += (uint64_t)list->n * part_row_bytes(g, TSFFN_PART_DOWN);
}

void tsffn_clear_sums(const struct shared * s, const struct tile * tile) {
    memset(s->own[tile->ith].sums, 0, (size_t)(tile->n_rows * s->layer->n_embd) * sizeof(float));
}

// In thread order.
void tsffn_reduce(const struct shared * s, const struct tile * tile) {
    const int64_t n_embd = s->layer->n_embd;
    const int64_t n_blocks = (n_embd + COLUMN_BLOCK - 1) / COLUMN_BLOCK;
    int64_t begin, end;
    share(tile->n_rows * n_blocks, tile->ith, tile->nth, &begin, &end);
    for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t r = unit / n_blocks;
        const int64_t c0 = unit % n_blocks * COLUMN_BLOCK;
        const int64_t c1 = min_i64(c0 + COLUMN_BLOCK, n_embd);
        float * y = tile->rows[r].y;
        memcpy(y + c0, s->own[0].sums + r * n_embd + c0, (size_t)(c1 - c0) * sizeof(float));
        for (int thread = 1; thread < tile->nth; ++thread) {
            const float * sums = s->own[thread].sums + r * n_embd;
            for (int64_t c = c0; c < c1; ++c) {
                y[c] += sums[c];
            }
        }
    }
}
