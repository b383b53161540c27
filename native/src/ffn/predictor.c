// Phases A and the first half of B of ffn.c: the predictor's two matrices, of which every row is read for every token.
#include "call.h"

static void store_hidden(const struct shared * s, int64_t r0, int64_t r1, int64_t k, int64_t stride, const float * v) {
    for (int64_t r = r0; r < r1; ++r) {
        const float h = v[(r - r0) * stride];
        s->h1[r * s->max_rank + k] = h > 0.0f ? h : 0.0f;
    }
}

void tsffn_hidden_layer(const struct shared * s, int64_t tile, int64_t r0, int64_t r1, int ith, int nth,
                        struct tsffn_counts * counts) {
    const struct tsffn_row * rows = s->call->rows + tile;
    const struct tsffn_matrix * fc1 = &s->call->ffns[rows[r0].ffn].fc1;
    const int n = (int)(r1 - r0);
    const void * x[TILE_ROWS];
    for (int64_t r = r0; r < r1; ++r) {
        x[r - r0] = s->x_pred + (size_t)rows[r].token * s->x_pred_bytes;
    }
    // Units of a panel, then of a row; each asks for the next one.
    const int64_t panel_rows = tsffn_matrix_panel_rows(fc1);
    const int64_t n_panels = panel_rows / TSFFN_PANEL_ROWS;
    const int64_t n_single = fc1->n_rows - panel_rows;
    const int64_t first_panel = n_panels * ith / nth, end_panel = n_panels * (ith + 1) / nth;
    const int64_t first = panel_rows + n_single * ith / nth, end = panel_rows + n_single * (ith + 1) / nth;
    const size_t row_bytes = tsffn_row_bytes(fc1->type, fc1->n_cols);
    const int64_t lines_per_row = tsffn_cache_lines(row_bytes);
    float panel[TILE_ROWS][TSFFN_PANEL_ROWS];
    for (int64_t p = first_panel; p < end_panel; ++p) {
        const int64_t k = p * TSFFN_PANEL_ROWS;
        const struct tsffn_asks asks = {
            .stream = tsffn_matrix_row(fc1, k + TSFFN_PANEL_ROWS),
            .n_stream = p + 1 < end_panel ? TSFFN_PANEL_ROWS * lines_per_row : 0,
        };
        fc1->type->own_panel(fc1->n_cols, tsffn_matrix_row(fc1, k), n, x, panel, &asks);
        for (int64_t i = 0; i < TSFFN_PANEL_ROWS; ++i) {
            store_hidden(s, r0, r1, k + i, TSFFN_PANEL_ROWS, &panel[0][i]);
        }
    }
    float v[TILE_ROWS];
    for (int64_t k = first; k < end; ++k) {
        const struct tsffn_asks asks = {
            .stream = tsffn_matrix_row(fc1, k + 1),
            .n_stream = k + 1 < end ? lines_per_row : 0,
        };
        tsffn_matrix_dots(fc1, k, n, x, v, &asks);
        store_hidden(s, r0, r1, k, 1, v);
    }
    counts->bytes_predictor += (uint64_t)((end_panel - first_panel) * TSFFN_PANEL_ROWS + end - first) * row_bytes;
}

// Bit r0 + k is set when logit k, of n that lie `stride` apart, passes the threshold.
static uint64_t decide(const struct segment * g, int n, int64_t stride, const float * logit) {
    const struct tsffn_ffn * ffn = g->ffn;
    uint64_t bits = 0;
    for (int k = 0; k < n; ++k) {
        const float v = logit[k * stride];
        bits |= (uint64_t)(ffn->on_when_equal ? v >= ffn->threshold : v > ffn->threshold) << (g->r0 + k);
    }
    return bits;
}

// A panel takes a third of the time of its rows one by one.
int64_t tsffn_predict_work(const struct tsffn_matrix * fc2, int64_t n_neurons) {
    const int64_t blocks = n_neurons * ((fc2->n_cols + TSFFN_BLOCK_SIZE - 1) / TSFFN_BLOCK_SIZE);
    return fc2->layout == TSFFN_LAYOUT_PANELS ? (blocks + 2) / 3 : blocks;
}

void tsffn_predict(const struct segment * g, int64_t i0, int64_t i1, struct tsffn_ask_queue * queue, uint64_t * mask) {
    const struct tsffn_matrix * fc2 = &g->ffn->fc2;
    const int n = (int)(g->r1 - g->r0);
    const void * hidden[TILE_ROWS];
    for (int k = 0; k < n; ++k) {
        hidden[k] = g->s->h1_converted + (size_t)(g->r0 + k) * g->s->h1_bytes;
    }
    const int64_t end_panels = min_i64(i1, tsffn_matrix_panel_rows(fc2));
    float panel[TILE_ROWS][TSFFN_PANEL_ROWS];
    int64_t i = i0;
    for (; i < end_panels; i += TSFFN_PANEL_ROWS) {
        const struct tsffn_asks asks = tsffn_queue_take(queue, n * tsffn_predict_work(fc2, TSFFN_PANEL_ROWS));
        fc2->type->own_panel(fc2->n_cols, tsffn_matrix_row(fc2, i), n, hidden, panel, &asks);
        for (int64_t k = 0; k < TSFFN_PANEL_ROWS; ++k) {
            mask[i - i0 + k] = decide(g, n, TSFFN_PANEL_ROWS, &panel[0][k]);
        }
    }
    float logit[TILE_ROWS];
    for (; i < i1; ++i) {
        const struct tsffn_asks asks = tsffn_queue_take(queue, n * tsffn_predict_work(fc2, 1));
        tsffn_matrix_dots(fc2, i, n, hidden, logit, &asks);
        mask[i - i0] = decide(g, n, 1, logit);
    }
    g->counts->bytes_predictor += (uint64_t)(i1 - i0) * tsffn_row_bytes(fc2->type, fc2->n_cols);
}
