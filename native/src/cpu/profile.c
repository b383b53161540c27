// Activation statistics: gate and up of every neuron, counted while they are computed.
//
// A chunk of neurons belongs to one thread, so the counters of a neuron need no lock; histograms are private to a
// thread until the call ends. Costs beside the products: per tile and neuron six popcounts, per neuron and row two or
// three increments.
#include "call.h"

#include <string.h>

enum { GATE, UP, COMBINED };

enum { GATE_POSITIVE, UP_POSITIVE, ACTIVE, PREDICTED, PREDICTED_GATE, PREDICTED_ACTIVE };

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

// Bit k is set when v[k] > 0.
static uint64_t positive_bits(const float * v, int n) {
    uint64_t bits = 0;
    for (int k = 0; k < n; ++k) {
        bits |= (uint64_t)(v[k] > 0.0f) << k;
    }
    return bits;
}

static uint64_t popcount(uint64_t bits) {
    return (uint64_t)__builtin_popcountll(bits);
}

// Adds neuron i's values for the n rows of the segment; `on` has bit k for row r0 + k. Returns the rows where the
// neuron is on and active.
static uint64_t count_neuron(const struct segment * g, int64_t i, int n, const float * gate, const float * up,
                             uint64_t on) {
    const struct tsffn_call * call = g->s->call;
    const uint64_t gate_positive = positive_bits(gate, n);
    const uint64_t up_positive = positive_bits(up, n);
    const uint64_t active = gate_positive & up_positive;
    const uint64_t sets[TSFFN_PROFILE_COUNTS] = {
        [GATE_POSITIVE] = gate_positive,       [UP_POSITIVE] = up_positive,      [ACTIVE] = active, [PREDICTED] = on,
        [PREDICTED_GATE] = on & gate_positive, [PREDICTED_ACTIVE] = on & active,
    };
    uint64_t * counter = call->profile->neurons + g->rows[g->r0].ffn * g->s->n_ff + i;
    for (int c = 0; c < TSFFN_PROFILE_COUNTS; ++c, counter += g->s->n_ffns * g->s->n_ff) {
        *counter += popcount(sets[c]);
    }
    g->counts->predicted += popcount(on);
    g->counts->gate_positive += popcount(on & gate_positive);
    g->counts->active += popcount(on & active);

    count_values(g->histograms->bins[GATE], gate, n);
    count_values(g->histograms->bins[UP], up, n);
    uint32_t (*combined)[TSFFN_PROFILE_BINS] = g->histograms->bins[COMBINED];
    combined[0][0] += (uint32_t)((uint64_t)n - popcount(active));
    for (uint64_t b = active; b != 0; b &= b - 1) {
        const int k = __builtin_ctzll(b);
        combined[k % LANES][bin_of(gate[k] * up[k])] += 1;
    }
    return on & active;
}

// v[i - i0][k] = row i of m times the x of the segment's row r0 + k.
static void multiply_rows(const struct segment * g, const struct tsffn_matrix * m, int64_t i0, int64_t i1,
                          const char * x, size_t x_bytes, values v) {
    const int n = (int)(g->r1 - g->r0);
    const size_t stride = tsffn_matrix_stride(m, i0, i1 - i0);
    if (g->packed != NULL && i1 - i0 == TSFFN_GEMM_ROWS && stride > 0) {
        m->type->gemm->multiply((enum tsffn_format)m->type->gemm_format, m->n_cols, tsffn_matrix_row(m, i0), stride, n,
                                g->packed, &v[0][0]);
        return;
    }
    const void * activations[TILE_ROWS];
    for (int k = 0; k < n; ++k) {
        activations[k] = x + (size_t)g->rows[g->r0 + k].token * x_bytes;
    }
    for (int64_t i = i0; i < i1; ++i) {
        tsffn_matrix_dots(m, i, n, activations, v[i - i0], NULL);
    }
}

// The neurons [i0, i1), at most TSFFN_GEMM_ROWS.
static void profile_panel(const struct segment * g, int64_t i0, int64_t i1, const uint64_t * mask,
                          struct worklist * list) {
    const struct shared * s = g->s;
    const int n = (int)(g->r1 - g->r0);
    float (*gate)[TILE_ROWS] = g->step->gate, (*up)[TILE_ROWS] = g->step->up;
    multiply_rows(g, &g->ffn->gate, i0, i1, s->x_gate, s->x_gate_bytes, gate);
    multiply_rows(g, &g->ffn->up, i0, i1, s->x_up, s->x_up_bytes, up);
    for (int64_t i = i0; i < i1; ++i) {
        const float * v_gate = gate[i - i0];
        const float * v_up = up[i - i0];
        const uint64_t rows = count_neuron(g, i, n, v_gate, v_up, mask[i - i0] >> g->r0);
        if (rows == 0) {
            continue;
        }
        for (uint64_t b = rows; b != 0; b &= b - 1) {
            const int k = __builtin_ctzll(b);
            list->h[list->n][g->r0 + k] = v_gate[k] * v_up[k];
        }
        list->neuron[list->n] = i;
        list->rows[list->n] = rows << g->r0;
        ++list->n;
    }
}

void tsffn_profile_neurons(const struct segment * g, int64_t i0, int64_t i1, const uint64_t * mask,
                           struct worklist * list) {
    const struct tsffn_matrix * gate = &g->ffn->gate;
    const struct tsffn_matrix * up = &g->ffn->up;
    list->n = 0;
    for (int64_t i = i0; i < i1; i += TSFFN_GEMM_ROWS) {
        profile_panel(g, i, i + TSFFN_GEMM_ROWS < i1 ? i + TSFFN_GEMM_ROWS : i1, mask + (i - i0), list);
    }
    g->counts->bytes_ffn += (uint64_t)(i1 - i0) * (tsffn_row_bytes(gate->type, gate->n_cols) + //
                                                   tsffn_row_bytes(up->type, up->n_cols));
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
