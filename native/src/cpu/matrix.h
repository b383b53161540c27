// A matrix of the predictor, whose every row is read.
#ifndef TSFFN_MATRIX_H
#define TSFFN_MATRIX_H

#include "../ffn/layer.h"
#include "row_type.h"

// n_rows weight rows of n_cols weights.
struct tsffn_matrix {
    const struct tsffn_row_type * type;
    const uint8_t * data; // NULL when absent
    int64_t n_rows;
    int64_t n_cols;
    enum tsffn_layout layout;
};

static inline size_t tsffn_matrix_row_bytes(const struct tsffn_matrix * m) {
    return tsffn_row_bytes(m->type, m->n_cols);
}

// Rows below this are in panels.
static inline int64_t tsffn_matrix_panel_rows(const struct tsffn_matrix * m) {
    return m->layout == TSFFN_LAYOUT_PANELS ? m->n_rows / TSFFN_PANEL_ROWS * TSFFN_PANEL_ROWS : 0;
}

// Row i; the first row of a panel stands for the panel.
static inline const uint8_t * tsffn_matrix_row(const struct tsffn_matrix * m, int64_t i) {
    return m->data + (size_t)i * tsffn_matrix_row_bytes(m);
}

#endif
