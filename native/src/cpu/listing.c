// Phase B of ffn.c: which neurons are on; and which of them a thread computes in phase C.
#include "phases.h"

#include <string.h>

void tsffn_count_neurons(const struct segment * g, int64_t n) {
    const struct tsffn_rows * rows = g->ffn->neurons.rows;
    const size_t bytes =
        rows[TSFFN_PART_GATE].row_bytes + rows[TSFFN_PART_UP].row_bytes + rows[TSFFN_PART_DOWN].row_bytes;
    g->own->counts.neurons += (uint64_t)(n * (g->r1 - g->r0));
    g->own->counts.bytes_dense += (uint64_t)n * bytes;
}

void tsffn_clear_h(const struct segment * g, int64_t i0, int64_t i1) {
    for (int64_t r = g->r0; r < g->r1; ++r) {
        if (g->rows[r].h != NULL) {
            memset(g->rows[r].h + i0, 0, (size_t)(i1 - i0) * sizeof(float));
        }
    }
}

// Row r's counts, a block each.
static uint8_t * counts_of(const struct segment * g, int64_t r) {
    return g->s->needed.counts + (g->index * TILE_ROWS + r) * n_blocks_of(g->s->layer->n_ff);
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

static int chunk_list(int64_t i0, int64_t i1, int32_t * list) {
    for (int64_t i = i0; i < i1; ++i) {
        list[i - i0] = (int32_t)i;
    }
    return (int)(i1 - i0);
}

void tsffn_bring_chunk(const struct segment * g, int64_t i0, int64_t i1) {
    const struct tsffn_neurons * neurons = &g->ffn->neurons;
    if (neurons->memory != NULL) {
        int32_t list[CHUNK_NEURONS];
        const int n = chunk_list(i0, i1, list);
        tsffn_neurons_announce(neurons, list, NULL, n);
        tsffn_neurons_await(neurons, list, n);
    }
}

void tsffn_release_chunk(const struct segment * g, int64_t i0, int64_t i1) {
    const struct tsffn_neurons * neurons = &g->ffn->neurons;
    if (neurons->memory != NULL) {
        int32_t list[CHUNK_NEURONS];
        tsffn_neurons_release(neurons, list, chunk_list(i0, i1, list));
    }
}

// The thread's part of fc2, and the places of what it lists of it.
struct own_part {
    int64_t begin, end;
    int32_t * neuron;
    uint64_t * rows;
    int32_t * n;
};

static struct own_part own_part(const struct segment * g) {
    const struct needed * needed = &g->s->needed;
    const int64_t n_ff = g->s->layer->n_ff, begin = first_neuron(n_ff, g->ith, g->nth);
    return (struct own_part){
        .begin = begin,
        .end = first_neuron(n_ff, g->ith + 1, g->nth),
        .neuron = needed->neuron + g->index * n_ff + begin,
        .rows = needed->rows + g->index * n_ff + begin,
        .n = needed->n + g->index * g->nth + g->ith,
    };
}

void tsffn_list_neurons(const struct segment * g) {
    const struct own_part part = own_part(g);
    int64_t n = 0, products = 0;
    uint64_t mask[CHUNK_NEURONS];
    for (int64_t i0 = part.begin, i1; i0 < part.end; i0 = i1) {
        i1 = min_i64((i0 / CHUNK_NEURONS + 1) * CHUNK_NEURONS, part.end);
        tsffn_mask_neurons(g, i0, i1, part.end, mask);
        for (int64_t b0 = i0; b0 < i1; b0 += BLOCK_NEURONS) {
            const int64_t b1 = min_i64(b0 + BLOCK_NEURONS, i1), before = n;
            for (int64_t i = b0; i < b1; ++i) {
                const uint64_t rows = mask[i - i0];
                part.neuron[n] = (int32_t)i;
                part.rows[n] = rows;
                n += rows != 0;
                products += count_rows(rows);
            }
            if (g->s->selects) {
                count_block(g, b0 / BLOCK_NEURONS, n - before, b1 - b0, mask + (b0 - i0));
            }
        }
    }
    *part.n = (int32_t)n;
    g->own->counts.predicted += (uint64_t)products;
    tsffn_clear_h(g, part.begin, part.end);
    const struct tsffn_range others = elsewhere(g);
    const int64_t first = max_i64(part.begin, others.first), end = min_i64(part.end, others.end);
    tsffn_count_neurons(g, part.end - part.begin - max_i64(end - first, 0));
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

int64_t tsffn_room(const struct shared * s) {
    const struct tsffn_neurons * neurons = &s->layer->ffns[0].neurons;
    return neurons->memory != NULL ? neurons->memory->room(neurons) : INT64_MAX;
}

// Where the thread's list is within a round.
static void places_of_round(const struct own_part * part, struct round round, int64_t * begin, int64_t * end) {
    *begin = lower_bound(part->neuron, *part->n, round.begin);
    *end = lower_bound(part->neuron, *part->n, round.end);
}

void tsffn_announce_round(const struct segment * g, struct round round) {
    if (g->ffn->neurons.memory != NULL) {
        const struct own_part part = own_part(g);
        int64_t begin, end;
        places_of_round(&part, round, &begin, &end);
        tsffn_neurons_announce(&g->ffn->neurons, part.neuron + begin, part.rows + begin, end - begin);
    }
}

void tsffn_release_round(const struct segment * g, struct round round) {
    if (g->ffn->neurons.memory != NULL) {
        const struct own_part part = own_part(g);
        int64_t begin, end;
        places_of_round(&part, round, &begin, &end);
        tsffn_neurons_release(&g->ffn->neurons, part.neuron + begin, end - begin);
    }
}

// A row's share of thread t begins with the first block before which there are at least t n-ths of what it needs.
static void find_share(const struct segment * g, struct neuron_share * share) {
    const int64_t n_blocks = n_blocks_of(g->s->layer->n_ff);
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
static uint64_t rows_of_share(const struct segment * g, const struct neuron_share * share, int64_t i) {
    if (i >= share->first_of_all && i < share->end_of_all) {
        return ~(uint64_t)0;
    }
    uint64_t rows = 0;
    for (int64_t r = g->r0; r < g->r1; ++r) {
        rows |= (uint64_t)(i >= share->first[r] && i < share->end[r]) << r;
    }
    return rows;
}

void tsffn_begin_walk(const struct segment * g, struct round round, struct walk * w) {
    // A round begins with a chunk: which chunks are a thread's does not depend on the rounds.
    const int64_t chunk = round.begin / CHUNK_NEURONS;
    w->has_share = g->s->selects;
    w->round = round;
    w->next = w->has_share ? 0 : chunk + ((int64_t)g->ith - chunk % g->nth + g->nth) % g->nth;
    w->k = w->end = 0;
    if (w->has_share) {
        find_share(g, &w->share);
    }
}

// Goes to the next list or chunk that has neurons.
static bool next_places(const struct segment * g, struct walk * w) {
    const struct needed * needed = &g->s->needed;
    const int64_t n_ff = g->s->layer->n_ff;
    if (!w->has_share) { // all neurons are listed
        w->k = min_i64(w->next * CHUNK_NEURONS, w->round.end);
        w->end = min_i64(w->k + CHUNK_NEURONS, w->round.end);
        w->next += g->nth;
        return w->k < w->end;
    }
    for (; w->next < g->nth; ++w->next) {
        const int64_t begin = first_neuron(n_ff, (int)w->next, g->nth);
        const int32_t * list = needed->neuron + g->index * n_ff + begin;
        const int64_t n = needed->n[g->index * g->nth + w->next];
        w->k = begin + lower_bound(list, n, max_i64(w->share.first_of_any, w->round.begin));
        w->end = begin + lower_bound(list, n, min_i64(w->share.end_of_any, w->round.end));
        if (w->k < w->end) {
            ++w->next;
            return true;
        }
    }
    return false;
}

void tsffn_next_neurons(const struct segment * g, int n_most, struct walk * w, struct worklist * list) {
    const struct needed * needed = &g->s->needed;
    list->n = 0;
    while (list->n < n_most && (w->k < w->end || next_places(g, w))) {
        const int64_t place = g->index * g->s->layer->n_ff + w->k++;
        const int32_t neuron = needed->neuron[place];
        const uint64_t rows = needed->rows[place] & (w->has_share ? rows_of_share(g, &w->share, neuron) : ~(uint64_t)0);
        for (uint64_t b = rows; b != 0; b &= b - 1) {
            list->h[list->n][__builtin_ctzll(b)] = 1.0f;
        }
        list->neuron[list->n] = neuron;
        list->rows[list->n] = rows;
        list->n += rows != 0;
    }
    tsffn_neurons_await(&g->ffn->neurons, list->neuron, list->n);
}
