// The row type (row_type.h) of each ggml type: own kernels where there are some, ggml's type traits otherwise;
// and that of Q3_NL.
#ifndef TSFFN_ROW_TYPES_H
#define TSFFN_ROW_TYPES_H

#include "ggml.h"
#include "row_type.h"

#include <stdbool.h>

// Builds the table, once. Needs the CPU backend of the running ggml, whose kernels it borrows; returns false without
// it, and a later call tries again. Any thread may call it.
bool tsffn_row_types_init(void);

// The row type of a type of weights (ffn/layer.h); NULL for one that is not multiplied with.
const struct tsffn_row_type * tsffn_row_type_for(int type);

#endif
