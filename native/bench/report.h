// What bench_kernels measured, as Markdown tables or JSON.
#ifndef TSFFN_BENCH_REPORT_H
#define TSFFN_BENCH_REPORT_H

#include "cpu/kernels/kernels.h"

#include <stdbool.h>
#include <stdint.h>

// Which rows are computed, and where they lie.
enum pattern {
    CACHED,   // the same few rows again and again
    IN_ORDER, // all rows of matrix after matrix, from memory
    SPARSE,   // a random fraction of the rows of matrix after matrix, in ascending order, from memory
};

struct result {
    enum pattern pattern;
    enum tsffn_format format;
    const char * kernel;
    const char * isa; // "" when no kernel is at work
    int n_threads;
    double fraction;       // of all rows
    double bytes_per_row;  // of weights
    double ns_per_product; // of one row with one vector, of all threads together
};

struct report {
    int64_t n_rows, n_cols; // of a matrix
    size_t bytes;           // of all matrices
    struct result * results;
    int n_results;
};

enum { N_FORMATS = TSFFN_FORMAT_Q3_NL + 1 }; // that are measured, the first ones
extern const char * const format_names[N_FORMATS];

void print_markdown(const struct report * report);
void print_json(const struct report * report);

#endif
