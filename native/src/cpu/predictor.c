// Phases A and B of ffn.c: the predictor's matrices, of which every row is read for every token. A is the hidden layer,
// which not all forms have (ffn/layer.h).
#include "phases.h"

#include <string.h>

static void store_hidden(const struct shared * s, int64_t r0, int64_t r1, int64_t k, int64_t stride, const float * v) {
    const bool linear = s->layer->form == TSFFN_PREDICTOR_LINEAR;
    for (int64_t r = r0; r < r1; ++r) {
        const float h = v[(r - r0) * stride];
        s->hidden.values[r * s->hidden.max_rank + k] = h > 0.0f || linear ? h : 0.0f;
    }
}

// The rows of fc1 that thread ith computes: panels, then single rows.
struct hidden_share {
    int64_t first_panel, end_panel, first, end;
};

static struct hidden_share hidden_share(const struct tsffn_matrix * fc1, int ith, int nth) {
    const int64_t panel_rows = tsffn_matrix_panel_rows(fc1);
    const int64_t n_panels = panel_rows / TSFFN_PANEL_ROWS, n_single = fc1->n_rows - panel_rows;
    return (struct hidden_share){
        .first_panel = n_panels * ith / nth,
        .end_panel = n_panels * (ith + 1) / nth,
        .first = panel_rows + n_single * ith / nth,
        .end = panel_rows + n_single * (ith + 1) / nth,
    };
}

// The thread's share of the hidden layer of the rows [r0, r1) of a tile, which share one FFN.
static void compute_hidden(const struct shared * s, const struct tile * tile, int64_t r0, int64_t r1) {
    const struct tsffn_row * rows = tile->rows;
    const struct tsffn_matrix * fc1 = &s->layer->ffns[rows[r0].ffn].fc1;
    const int n = (int)(r1 - r0);
    const void * x[TILE_ROWS];
    for (int64_t r = r0; r < r1; ++r) {
        x[r - r0] = activations_of(s->x.predictor, rows[r].token);
    }
    const struct hidden_share mine = hidden_share(fc1, tile->ith, tile->nth);
    const size_t row_bytes = tsffn_matrix_row_bytes(fc1);
    const uint8_t * end_panels = tsffn_matrix_row(fc1, mine.end_panel * TSFFN_PANEL_ROWS);
    const uint8_t * end_rows = tsffn_matrix_row(fc1, mine.end);
    float panel[TILE_ROWS][TSFFN_PANEL_ROWS];
    for (int64_t p = mine.first_panel; p < mine.end_panel; ++p) {
        const int64_t k = p * TSFFN_PANEL_ROWS;
        const uint8_t * w = tsffn_matrix_row(fc1, k);
        const struct tsffn_asks asks = stream_ahead(s, w, TSFFN_PANEL_ROWS * row_bytes, end_panels);
        fc1->type->own_panel(fc1->n_cols, w, n, x, panel, &asks);
        for (int64_t i = 0; i < TSFFN_PANEL_ROWS; ++i) {
            store_hidden(s, r0, r1, k + i, TSFFN_PANEL_ROWS, &panel[0][i]);
        }
    }
    float v[TILE_ROWS];
    for (int64_t k = mine.first; k < mine.end; ++k) {
        const uint8_t * w = tsffn_matrix_row(fc1, k);
        const struct tsffn_asks asks = stream_ahead(s, w, row_bytes, end_rows);
        tsffn_row_dots(fc1->type, fc1->n_cols, w, n, x, v, &asks);
        store_hidden(s, r0, r1, k, 1, v);
    }
    const int64_t n_rows = (mine.end_panel - mine.first_panel) * TSFFN_PANEL_ROWS + mine.end - mine.first;
    s->own[tile->ith].counts.bytes_predictor += (uint64_t)n_rows * row_bytes;
}

static void ask_logits_of(const struct shared * s, const struct tsffn_matrix * matrix, int ith, int nth) {
    const int64_t n_ff = s->layer->n_ff;
    ask_stream_begin(s, tsffn_matrix_row(matrix, first_neuron(n_ff, ith, nth)),
                     tsffn_matrix_row(matrix, first_neuron(n_ff, ith + 1, nth)));
}

// Asks for what this thread reads first in phase B.
static void ask_logits(const struct shared * s, const struct tsffn_ffn * ffn, int ith, int nth) {
    ask_logits_of(s, &ffn->fc2, ith, nth);
    if (ffn->fc3.data != NULL) {
        ask_logits_of(s, &ffn->fc3, ith, nth);
    }
}

void tsffn_ask_predictor(const struct shared * s, const struct tsffn_ffn * ffn, int ith, int nth) {
    if (ffn->fc1.data == NULL) {
        ask_logits(s, ffn, ith, nth);
        return;
    }
    const struct hidden_share mine = hidden_share(&ffn->fc1, ith, nth);
    const int64_t panel = mine.first_panel * TSFFN_PANEL_ROWS, end_panel = mine.end_panel * TSFFN_PANEL_ROWS;
    ask_stream_begin(s, tsffn_matrix_row(&ffn->fc1, panel), tsffn_matrix_row(&ffn->fc1, end_panel));
    ask_stream_begin(s, tsffn_matrix_row(&ffn->fc1, mine.first), tsffn_matrix_row(&ffn->fc1, mine.end));
}

static void convert_hidden(const struct shared * s, const struct tile * tile, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
        const struct tsffn_matrix * fc2 = &s->layer->ffns[tile->rows[r].ffn].fc2;
        const float * h1 = s->hidden.values + r * s->hidden.max_rank;
        tsffn_convert_x(fc2->type, fc2->n_cols, h1, activations_of(s->hidden.converted, r));
    }
}

void tsffn_hidden_layer(const struct shared * s, const struct tile * tile) {
    if (s->layer->ffns[0].fc1.data == NULL) {
        return;
    }
    for (int64_t r0 = 0, r1; r0 < tile->n_rows; r0 = r1) {
        r1 = segment_end(tile->rows, r0, tile->n_rows);
        compute_hidden(s, tile, r0, r1);
    }
    ask_logits(s, &s->layer->ffns[tile->rows[0].ffn], tile->ith, tile->nth);
    tsffn_barrier_wait(s->barrier, tile->nth);
    if (s->copy_bytes != 0) {
        convert_hidden(s, tile, 0, tile->n_rows);
        return;
    }
    int64_t begin, end;
    share(tile->n_rows, tile->ith, tile->nth, &begin, &end);
    convert_hidden(s, tile, begin, end);
    tsffn_barrier_wait(s->barrier, tile->nth);
}

// mask[i] has bit r0 set where logit i of the segment's only row passes the threshold.
static void decide_for_one_row(const struct segment * g, int64_t n, const float * logit, uint64_t * mask) {
    const float threshold = g->s->layer->threshold;
    if (g->s->layer->on_when_equal) {
        for (int64_t i = 0; i < n; ++i) {
            mask[i] = (uint64_t)(logit[i] >= threshold) << g->r0;
        }
        return;
    }
    for (int64_t i = 0; i < n; ++i) {
        mask[i] = (uint64_t)(logit[i] > threshold) << g->r0;
    }
}

// Bit r0 + k is set when logit k, of n that lie `stride` apart, passes the threshold.
static uint64_t decide(const struct segment * g, int n, int64_t stride, const float * logit) {
    const struct tsffn_cpu_layer * layer = g->s->layer;
    uint64_t bits = 0;
    for (int k = 0; k < n; ++k) {
        const float v = logit[k * stride];
        bits |= (uint64_t)(layer->on_when_equal ? v >= layer->threshold : v > layer->threshold) << (g->r0 + k);
    }
    return bits;
}

// Where row r's words are in masks of the call.
static int64_t first_word(const struct segment * g, int64_t r) {
    return (g->rows - g->s->call->rows + r) * tsffn_mask_words(g->s->layer->n_ff);
}

// Logits of some neurons: logit[k] of the segment's k-th row.
typedef float logits[TILE_ROWS][TSFFN_PANEL_ROWS];

// Those of neuron i on, as one matrix has them: of the panel that begins there, or else of this one.
static void logits_of(const struct segment * g, const struct tsffn_matrix * matrix, const float * thresholds, int64_t i,
                      bool in_panel, int64_t end, const void * const * x, logits logit) {
    const int n = (int)(g->r1 - g->r0);
    const int64_t n_neurons = in_panel ? TSFFN_PANEL_ROWS : 1;
    const uint8_t * w = tsffn_matrix_row(matrix, i);
    const size_t bytes = (size_t)n_neurons * tsffn_matrix_row_bytes(matrix);
    const struct tsffn_asks asks = stream_ahead(g->s, w, bytes, tsffn_matrix_row(matrix, end));
    if (in_panel) {
        matrix->type->own_panel(matrix->n_cols, w, n, x, logit, &asks);
    } else {
        float v[TILE_ROWS];
        tsffn_row_dots(matrix->type, matrix->n_cols, w, n, x, v, &asks);
        for (int k = 0; k < n; ++k) {
            logit[k][0] = v[k];
        }
    }
    for (int k = 0; thresholds != NULL && k < n; ++k) {
        for (int64_t j = 0; j < n_neurons; ++j) {
            logit[k][j] -= thresholds[i + j];
        }
    }
}

// ... as all matrices of the form have them.
static void predictor_logits(const struct segment * g, int64_t i, bool in_panel, int64_t end, const void * const * x,
                             logits logit) {
    const struct tsffn_ffn * ffn = g->ffn;
    logits_of(g, &ffn->fc2, ffn->thresholds, i, in_panel, end, x, logit);
    if (ffn->fc3.data == NULL) {
        return;
    }
    logits of_up;
    const float * thresholds = ffn->thresholds != NULL ? ffn->thresholds + g->s->layer->n_ff : NULL;
    logits_of(g, &ffn->fc3, thresholds, i, in_panel, end, x, of_up);
    for (int64_t k = 0; k < g->r1 - g->r0; ++k) {
        for (int64_t j = 0; j < (in_panel ? TSFFN_PANEL_ROWS : 1); ++j) {
            logit[k][j] = of_up[k][j] < logit[k][j] ? of_up[k][j] : logit[k][j];
        }
    }
}

// tsffn_mask_neurons with a predictor.
static void predict(const struct segment * g, int64_t i0, int64_t i1, int64_t end, uint64_t * mask) {
    const struct tsffn_ffn * ffn = g->ffn;
    const int n = (int)(g->r1 - g->r0);
    const void * x[TILE_ROWS];
    for (int k = 0; k < n; ++k) {
        x[k] = ffn->fc1.data != NULL ? activations_of(g->s->hidden.converted, g->r0 + k)
                                     : activations_of(g->s->x.predictor, g->rows[g->r0 + k].token);
    }
    const int64_t end_panels = min_i64(i1, tsffn_matrix_panel_rows(&ffn->fc2));
    logits logit;
    int64_t i = i0;
    for (; i < end_panels; i += TSFFN_PANEL_ROWS) {
        predictor_logits(g, i, true, end, x, logit);
        if (n == 1) {
            decide_for_one_row(g, TSFFN_PANEL_ROWS, logit[0], mask + (i - i0));
            continue;
        }
        for (int64_t j = 0; j < TSFFN_PANEL_ROWS; ++j) {
            mask[i - i0 + j] = decide(g, n, TSFFN_PANEL_ROWS, &logit[0][j]);
        }
    }
    for (; i < i1; ++i) {
        predictor_logits(g, i, false, end, x, logit);
        mask[i - i0] = decide(g, n, TSFFN_PANEL_ROWS, &logit[0][0]);
    }
    const size_t of_fc3 = ffn->fc3.data != NULL ? tsffn_matrix_row_bytes(&ffn->fc3) : 0;
    const size_t of_thresholds = ffn->thresholds != NULL ? (of_fc3 != 0 ? 2 : 1) * sizeof(float) : 0;
    g->own->counts.bytes_predictor +=
        (uint64_t)(i1 - i0) * (tsffn_matrix_row_bytes(&ffn->fc2) + of_fc3 + of_thresholds);
}

// ... with the call's masks.
static void read_masks(const struct segment * g, int64_t i0, int64_t i1, uint64_t * mask) {
    memset(mask, 0, (size_t)(i1 - i0) * sizeof(*mask));
    for (int64_t r = g->r0; r < g->r1; ++r) {
        const uint32_t * words = g->s->call->masks + first_word(g, r);
        for (int64_t w0 = i0; w0 < i1; w0 += 32) {
            for (uint32_t on = words[w0 / 32]; on != 0; on &= on - 1) {
                mask[w0 - i0 + __builtin_ctz(on)] |= (uint64_t)1 << r;
            }
        }
    }
}

void tsffn_mask_neurons(const struct segment * g, int64_t i0, int64_t i1, int64_t end, uint64_t * mask) {
    if (g->s->predicts) {
        predict(g, i0, i1, end, mask);
    } else if (g->s->call->masks != NULL) {
        read_masks(g, i0, i1, mask);
    } else {
        const uint64_t all_rows = (~(uint64_t)0 >> (TILE_ROWS - (g->r1 - g->r0))) << g->r0;
        for (int64_t i = i0; i < i1; ++i) {
            mask[i - i0] = all_rows;
        }
    }
    const struct tsffn_range others = elsewhere(g);
    const int64_t first = max_i64(i0, others.first), last = min_i64(i1, others.end);
    for (int64_t i = first; i < last; ++i) {
        mask[i - i0] = 0;
    }
}

// Writes the thread's part of the rows' masks, whole words.
static void write_masks(const struct segment * g) {
    const int64_t n_ff = g->s->layer->n_ff;
    const int64_t begin = first_neuron(n_ff, g->ith, g->nth), end = first_neuron(n_ff, g->ith + 1, g->nth);
    uint64_t mask[CHUNK_NEURONS];
    for (int64_t i0 = begin, i1; i0 < end; i0 = i1) {
        i1 = min_i64((i0 / CHUNK_NEURONS + 1) * CHUNK_NEURONS, end);
        tsffn_mask_neurons(g, i0, i1, end, mask);
        for (int64_t r = g->r0; r < g->r1; ++r) {
            uint32_t * words = g->s->call->predicted + first_word(g, r);
            for (int64_t i = i0; i < i1; ++i) {
                const uint32_t bit = (uint32_t)(mask[i - i0] >> r & 1) << i % 32;
                words[i / 32] = i % 32 == 0 ? bit : words[i / 32] | bit;
            }
        }
    }
}

void tsffn_mask_tile(const struct shared * s, const struct tile * tile) {
    const uint64_t begin = now_ns();
    if (s->predicts) {
        tsffn_hidden_layer(s, tile);
    }
    tsffn_each_segment(s, tile, write_masks);
    s->own[tile->ith].counts.ns_predictor += now_ns() - begin;
}
