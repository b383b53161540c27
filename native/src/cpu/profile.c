// Activation statistics: gate and up of every neuron, counted while they are computed.
//
// Threads take chunks of neurons in turn. A chunk belongs to one thread, so the counters of a neuron need no lock;
// histograms are private to a thread until the call ends. Costs beside the products: per tile and neuron six popcounts,
// per neuron and row two or three increments, and two additions where it is active.
#include "phases.h"

#include <string.h>

enum { GATE, UP, COMBINED };

enum { GATE_POSITIVE, UP_POSITIVE, ACTIVE, PREDICTED, PREDICTED_GATE, PREDICTED_ACTIVE };

enum { ALL, MISSED };

enum {
    FIRST_OCTAVE = -20,
    FLOAT_BIAS = 127,
    FLOAT_MANTISSA_BITS = 23,
    BIN_MANTISSA_BITS = 2, // four bins to an octave
    // The sign, and all but two bits of the mantissa, go.
    BIN_SHIFT = FLOAT_MANTISSA_BITS - BIN_MANTISSA_BITS,
    BELOW_FIRST_BIN = ((FLOAT_BIAS + FIRST_OCTAVE) << BIN_MANTISSA_BITS) - 1,
};

// The bin of |v|. A NaN falls into the last one.
static inline int32_t bin_of(float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof(bits));
    const int32_t bin = (int32_t)((bits & 0x7fffffffu) >> BIN_SHIFT) - BELOW_FIRST_BIN;
    return bin < 0 ? 0 : bin >= TSFFN_PROFILE_BINS ? TSFFN_PROFILE_BINS - 1 : bin;
}

static void count_values(uint32_t (*bins)[TSFFN_PROFILE_BINS], const float * v, int n) {
    int32_t bin[TILE_ROWS];
    for (int k = 0; k < n; ++k) {
        bin[k] = bin_of(v[k]);
    }
    for (int k = 0; k < n; ++k) {
        bins[k % LANES][bin[k]] += 1;
    }
}

// Bit k is set when the factor of v[k] is not 0.
static uint64_t bits_that_stay(struct tsffn_factor factor, const float * v, int n) {
    uint64_t bits = 0;
    for (int k = 0; k < n; ++k) {
        bits |= (uint64_t)(tsffn_factor_of(factor, v[k]) != 0.0f) << k;
    }
    return bits;
}

static float h_of(struct tsffn_activation activation, float gate, float up) {
    return tsffn_factor_of(activation.gate, gate) * tsffn_factor_of(activation.up, up);
}

static uint64_t popcount(uint64_t bits) {
    return (uint64_t)__builtin_popcountll(bits);
}

// Adds neuron i's values for the n rows of the segment; `on` has bit k for row r0 + k. Returns the rows where the
// neuron is on and active.
static uint64_t count_neuron(const struct segment * g, int64_t i, int n, const float * gate, const float * up,
                             uint64_t on) {
    const struct tsffn_cpu_layer * layer = g->s->layer;
    const struct tsffn_activation activation = layer->activation;
    const uint64_t gate_positive = bits_that_stay(activation.gate, gate, n);
    const uint64_t up_positive = bits_that_stay(activation.up, up, n);
    const uint64_t active = gate_positive & up_positive;
    const uint64_t sets[TSFFN_PROFILE_COUNTS] = {
        [GATE_POSITIVE] = gate_positive,       [UP_POSITIVE] = up_positive,      [ACTIVE] = active, [PREDICTED] = on,
        [PREDICTED_GATE] = on & gate_positive, [PREDICTED_ACTIVE] = on & active,
    };
    uint64_t * counter = g->s->call->profile->neurons + g->rows[g->r0].ffn * layer->n_ff + i;
    for (int c = 0; c < TSFFN_PROFILE_COUNTS; ++c, counter += layer->n_ffns * layer->n_ff) {
        *counter += popcount(sets[c]);
    }
    struct tsffn_counts * counts = &g->own->counts;
    counts->predicted += popcount(on);
    counts->gate_positive += popcount(on & gate_positive);
    counts->active += popcount(on & active);

    struct histograms * histograms = g->own->histograms;
    count_values(histograms->bins[GATE], gate, n);
    count_values(histograms->bins[UP], up, n);
    uint32_t (*combined)[TSFFN_PROFILE_BINS] = histograms->bins[COMBINED];
    combined[0][0] += (uint32_t)((uint64_t)n - popcount(active));
    double squares[TSFFN_PROFILE_SQUARES] = {0.0, 0.0};
    for (uint64_t b = active; b != 0; b &= b - 1) {
        const int k = __builtin_ctzll(b);
        const float h = h_of(activation, gate[k], up[k]);
        combined[k % LANES][bin_of(h)] += 1;
        squares[ALL] += (double)h * h;
        squares[MISSED] += (on >> k & 1) == 0 ? (double)h * h : 0.0;
    }
    double * sums = g->s->call->profile->squares + g->rows[g->r0].ffn * layer->n_ff + i;
    sums[0] += squares[ALL];
    sums[layer->n_ffns * layer->n_ff] += squares[MISSED];
    return on & active;
}

// v[i - i0][k] = row i of `part` times the x of the segment's row r0 + k.
static void multiply_rows(const struct segment * g, enum tsffn_part part, int64_t i0, int64_t i1, struct activations x,
                          values v) {
    const struct tsffn_rows * rows = &g->ffn->neurons.rows[part];
    const struct tsffn_row_type * type = g->s->layer->types[part];
    const int64_t n_embd = g->s->layer->n_embd;
    const int n = (int)(g->r1 - g->r0);
    const size_t stride = tsffn_rows_stride(rows, i0, i1 - i0);
    if (g->packed != NULL && i1 - i0 == TSFFN_GEMM_ROWS && stride > 0) {
        type->gemm->multiply((enum tsffn_format)type->gemm_format, n_embd, tsffn_rows_get(rows, i0), stride, n,
                             g->packed, &v[0][0]);
        return;
    }
    const void * activations[TILE_ROWS];
    for (int k = 0; k < n; ++k) {
        activations[k] = activations_of(x, g->rows[g->r0 + k].token);
    }
    for (int64_t i = i0; i < i1; ++i) {
        tsffn_row_dots(type, n_embd, tsffn_rows_get(rows, i), n, activations, v[i - i0], NULL);
    }
}

// Gate and up of the neurons [i0, i1), at most TSFFN_GEMM_ROWS, counted; lists those that are active and on. mask[i -
// i0] has bit r set when the predictor lets neuron i through for row r.
static void count_panel(const struct segment * g, int64_t i0, int64_t i1, const uint64_t * mask,
                        struct worklist * list) {
    const int n = (int)(g->r1 - g->r0);
    float (*gate)[TILE_ROWS] = g->own->gate, (*up)[TILE_ROWS] = g->own->up;
    multiply_rows(g, TSFFN_PART_GATE, i0, i1, g->s->x.gate, gate);
    multiply_rows(g, TSFFN_PART_UP, i0, i1, g->s->x.up, up);
    for (int64_t i = i0; i < i1; ++i) {
        const float * v_gate = gate[i - i0];
        const float * v_up = up[i - i0];
        const uint64_t rows = count_neuron(g, i, n, v_gate, v_up, mask[i - i0] >> g->r0);
        if (rows == 0) {
            continue;
        }
        for (uint64_t b = rows; b != 0; b &= b - 1) {
            const int k = __builtin_ctzll(b);
            list->h[list->n][g->r0 + k] = h_of(g->s->layer->activation, v_gate[k], v_up[k]);
        }
        list->neuron[list->n] = (int32_t)i;
        list->rows[list->n] = rows << g->r0;
        ++list->n;
    }
}

// The neurons [i0, i1), at most CHUNK_NEURONS.
static void count_chunk(const struct segment * g, int64_t i0, int64_t i1, const uint64_t * mask) {
    struct tsffn_ask_queue * nothing = &g->own->queue;
    tsffn_queue_clear(nothing);
    tsffn_queue_close(nothing, 0);
    struct worklist * list = &g->own->lists[0];
    list->n = 0;
    tsffn_clear_h(g, i0, i1);
    tsffn_bring_chunk(g, i0, i1);
    for (int64_t i = i0; i < i1; i += TSFFN_GEMM_ROWS) {
        count_panel(g, i, min_i64(i + TSFFN_GEMM_ROWS, i1), mask + (i - i0), list);
    }
    g->own->counts.bytes_ffn +=
        (uint64_t)(i1 - i0) * (part_row_bytes(g, TSFFN_PART_GATE) + part_row_bytes(g, TSFFN_PART_UP));
    tsffn_add_downs(g, list, nothing);
    tsffn_release_chunk(g, i0, i1);
    tsffn_count_neurons(g, i1 - i0);
}

static void count_segment(const struct segment * g) {
    const int64_t n_ff = g->s->layer->n_ff;
    struct tsffn_counts * counts = &g->own->counts;
    uint64_t mask[CHUNK_NEURONS];
    for (int64_t i0 = (int64_t)g->ith * CHUNK_NEURONS; i0 < n_ff; i0 += (int64_t)g->nth * CHUNK_NEURONS) {
        const int64_t i1 = min_i64(i0 + CHUNK_NEURONS, n_ff);
        const uint64_t begin = now_ns();
        tsffn_mask_neurons(g, i0, i1, i1, mask);
        const uint64_t ns = now_ns() - begin;
        counts->ns_predictor += ns;
        counts->ns_ffn -= ns; // tsffn_profile_tile counts all of this
        count_chunk(g, i0, i1, mask);
    }
}

// The thread's share of the inputs of dense products, segment by segment.
static void pack_inputs(const struct shared * s, const struct tile * tile) {
    const struct dense_products * products = &s->products;
    const int64_t n_embd = s->layer->n_embd;
    int64_t done = 0;
    for (int64_t r0 = 0, r1; r0 < tile->n_rows; r0 = r1) {
        r1 = segment_end(tile->rows, r0, tile->n_rows);
        const int64_t groups = groups_of(r1 - r0);
        const uint16_t * x[TILE_ROWS];
        for (int64_t r = r0; r < r1; ++r) {
            x[r - r0] = products->split + (int64_t)tile->rows[r].token * 2 * n_embd;
        }
        for (int64_t group = 0; group < groups; ++group) {
            if ((done + group) % tile->nth == tile->ith) {
                char * packed = products->packed + (size_t)done * products->group_bytes;
                products->gemm->pack(n_embd, (int)(r1 - r0), x, (int)group, packed);
            }
        }
        done += groups;
    }
}

void tsffn_profile_tile(const struct shared * s, const struct tile * tile) {
    struct tsffn_counts * counts = &s->own[tile->ith].counts;
    const uint64_t begin = now_ns();
    if (s->predicts) {
        tsffn_hidden_layer(s, tile);
    }
    const uint64_t ffn_begins = now_ns();
    counts->ns_predictor += ffn_begins - begin;
    if (s->products.gemm != NULL) {
        pack_inputs(s, tile);
        tsffn_barrier_wait(s->barrier, tile->nth);
    }
    tsffn_clear_sums(s, tile);
    tsffn_each_segment(s, tile, count_segment);
    tsffn_barrier_wait(s->barrier, tile->nth);
    tsffn_reduce(s, tile);
    counts->ns_ffn += now_ns() - ffn_begins;
}

void tsffn_profile_add(const struct tsffn_profile * profile, const struct histograms * histograms) {
    for (int h = 0; h < TSFFN_PROFILE_HISTOGRAMS; ++h) {
        for (int lane = 0; lane < LANES; ++lane) {
            for (int bin = 0; bin < TSFFN_PROFILE_BINS; ++bin) {
                profile->histograms[h * TSFFN_PROFILE_BINS + bin] += histograms->bins[h][lane][bin];
            }
        }
    }
}
