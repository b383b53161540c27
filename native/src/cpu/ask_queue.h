// What to ask memory for in advance, and in which order (kernels.h: struct tsffn_asks).
//
// A core has few fill buffers, each of which holds a line for the latency of memory. The prefetcher of the second-level
// cache has more and follows some tens of ascending streams, but needs time to run ahead. So rows are asked for a line
// of each in turn, GROUP rows at a time: when a row's turn comes again, its next line is on its way already and frees
// its buffer at once (docs/notes/2026-11-23-reading-rows.md).
#ifndef TSFFN_ASK_QUEUE_H
#define TSFFN_ASK_QUEUE_H

#include "kernels/kernels.h"

#include <stdbool.h>

enum { TSFFN_ASK_ROWS = 512, TSFFN_ASK_LINES = 8192, TSFFN_ASK_GROUP = 16 };

// Rows that wait to be asked for, and then their lines. A hint: what does not fit is dropped.
struct tsffn_ask_queue {
    int n_rows;
    int64_t row_lines[TSFFN_ASK_ROWS]; // lines of each
    const uint8_t * rows[TSFFN_ASK_ROWS];
    int64_t n_lines, next; // lines[next .. n_lines) wait
    const uint8_t * lines[TSFFN_ASK_LINES];
    int64_t work; // over which all are to be spread, in any unit
};

static inline void tsffn_queue_clear(struct tsffn_ask_queue * queue) {
    queue->n_rows = 0;
    queue->n_lines = queue->next = 0;
}

static inline void tsffn_queue_row(struct tsffn_ask_queue * queue, const uint8_t * row, size_t bytes) {
    if (queue->n_rows < TSFFN_ASK_ROWS) {
        queue->rows[queue->n_rows] = row;
        queue->row_lines[queue->n_rows] = tsffn_cache_lines(bytes);
        ++queue->n_rows;
    }
}

// The lines of the rows [first, end), all equally long, a line of each in turn.
static inline void tsffn_queue_group(struct tsffn_ask_queue * queue, int first, int end) {
    const int n = end - first;
    const int64_t room = (TSFFN_ASK_LINES - queue->n_lines) / n;
    const int64_t n_lines = queue->row_lines[first] < room ? queue->row_lines[first] : room;
    const uint8_t ** lines = queue->lines + queue->n_lines;
    const uint8_t * const * rows = queue->rows + first;
    for (int64_t line = 0; line < n_lines; ++line, lines += n) {
        for (int r = 0; r < n; ++r) {
            lines[r] = rows[r] + line * TSFFN_CACHE_LINE;
        }
    }
    queue->n_lines += n_lines * n;
}

// No more rows: puts their lines into order. All is to be spread over `work`.
static inline void tsffn_queue_close(struct tsffn_ask_queue * queue, int64_t work) {
    for (int first = 0, end; first < queue->n_rows; first = end) {
        end = first + 1;
        while (end < queue->n_rows && end - first < TSFFN_ASK_GROUP &&
               queue->row_lines[end] == queue->row_lines[first]) {
            ++end;
        }
        tsffn_queue_group(queue, first, end);
    }
    queue->work = work;
}

// Takes what falls to `work` of the queue's work.
static inline struct tsffn_asks tsffn_queue_take(struct tsffn_ask_queue * queue, int64_t work) {
    const int64_t lines = queue->n_lines - queue->next;
    const bool all = work >= queue->work;
    const struct tsffn_asks asks = {
        .lines = queue->lines + queue->next,
        .n_lines = all ? lines : (lines * work + queue->work - 1) / queue->work,
    };
    queue->work -= work;
    queue->next += asks.n_lines;
    return asks;
}

#endif
