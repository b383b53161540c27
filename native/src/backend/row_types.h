// The row type (src/ffn/row_type.h) of each ggml type: own kernels where there are some, ggml's type traits otherwise;
// and that of Q3_NL.
#ifndef TSFFN_ROW_TYPES_H
#define TSFFN_ROW_TYPES_H

#include "../ffn/row_type.h"
#include "ggml.h"

#include <stdbool.h>

// Builds the table, once. Needs the CPU backend of the running ggml, whose kernels it borrows; returns false without
// it, and a later call tries again. Any thread may call it.
bool tsffn_row_types_init(void);

// NULL for types that ggml-cpu cannot multiply with.
const struct tsffn_row_type * tsffn_row_type_for(enum ggml_type type);

// Q3_NL (src/cpu/panels.h), which is no ggml type and of panels only.
const struct tsffn_row_type * tsffn_row_type_q3_nl(void);

#endif
