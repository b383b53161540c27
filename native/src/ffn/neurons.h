// The neurons of an FFN, and where their rows are. What computes asks here for addresses: whether a row is mapped from
// the model file, locked in RAM or copied somewhere else is the affair of the memory that gives them.
#ifndef TSFFN_NEURONS_H
#define TSFFN_NEURONS_H

#include <stddef.h>
#include <stdint.h>

// The matrices of an FFN, in this order wherever they are counted. Row i of each is neuron i's.
enum tsffn_part {
    TSFFN_PART_GATE,
    TSFFN_PART_UP,
    TSFFN_PART_DOWN,
    TSFFN_N_PARTS,
};

// The rows of one matrix. They lie in up to three pieces, which need not follow each other in memory: neuron i's row is
// the row r = first + step * i of all of them, which is row r mod piece_rows of piece r / piece_rows.
//
//   rows      one piece; first 0, step 1
//   bundles   gate, up and down of neuron 0, those of neuron 1, ...: the three matrices share three pieces; step 3
//   table     no pieces: the address is looked up
struct tsffn_rows {
    const uint8_t * pieces[TSFFN_N_PARTS]; // pieces[0] is NULL where there is no matrix, and with a table
    int64_t piece_rows;
    int64_t first, step;
    size_t row_bytes;
    const uint8_t * const * table; // [n_ff] addresses, or NULL
    size_t offset;                 // of the row from its address in the table
};

struct tsffn_neurons {
    struct tsffn_rows rows[TSFFN_N_PARTS];
    const struct tsffn_memory * memory; // NULL: all neurons are always there
    void * state;                       // of `memory`
};

// A memory in which not every neuron is there at any time. A call announces the neurons that it needs of an FFN when it
// knows them, waits for a few at a time, computes those, and releases all in the end. So what was announced can be
// brought in while the neurons before it are computed.
//
// Neurons are in ascending order in every list, and hot ones come first. Any thread of a call may call these, for lists
// of its own. Several may await a neuron at once; the one that announced it releases it.
struct tsffn_memory {
    // rows[k] has a bit for each of the call's rows that needs neuron list[k]; NULL: one row needs each.
    void (*announce)(const struct tsffn_neurons * neurons, const int32_t * list, const uint64_t * rows, int64_t n);
    // Returns when these neurons, which some thread has announced, are there. From then on until they are released
    // their addresses hold. Where one cannot be brought in, its rows are zeros from then on, and the memory's owner
    // learns at the end of the call that its results are worthless.
    void (*await)(const struct tsffn_neurons * neurons, const int32_t * list, int64_t n);
    void (*release)(const struct tsffn_neurons * neurons, const int32_t * list, int64_t n);
    // How many neurons, of all FFNs together, can be announced and not yet released; at least TSFFN_MIN_ROOM. A thread
    // that announces more waits for others to release theirs: it must not hold any itself then.
    int64_t (*room)(const struct tsffn_neurons * neurons);
    // Another call, which comes next, may need these. They are brought in after all that was announced, as far as there
    // is time and room; nothing is to be released. Whoever is wrong loses time only. To be called when the call's own
    // neurons have been announced.
    void (*expect)(const struct tsffn_neurons * neurons, const int32_t * list, int64_t n);
};
enum { TSFFN_MIN_ROOM = 128 };

// Rows that follow each other from `data` on; those of a matrix whose pieces are not known yet, with `data` NULL.
static inline struct tsffn_rows tsffn_rows_at(const void * data, int64_t n_rows, size_t row_bytes) {
    return (struct tsffn_rows){.pieces = {data}, .piece_rows = n_rows, .step = 1, .row_bytes = row_bytes};
}

// Row i. With a memory the neuron must be awaited.
static inline const uint8_t * tsffn_rows_get(const struct tsffn_rows * rows, int64_t i) {
    if (rows->table != NULL) {
        return rows->table[i] + rows->offset;
    }
    const int64_t row = rows->first + rows->step * i;
    const int piece = (row >= rows->piece_rows) + (row >= 2 * rows->piece_rows); // cheaper than dividing
    return rows->pieces[piece] + (size_t)(row - piece * rows->piece_rows) * rows->row_bytes;
}

// Bytes from row i to row i + 1, if those from row i to row i + n - 1 are all as far apart; else 0.
static inline size_t tsffn_rows_stride(const struct tsffn_rows * rows, int64_t i, int64_t n) {
    const size_t stride = (size_t)rows->step * rows->row_bytes;
    if (rows->table != NULL) {
        return 0;
    }
    const uintptr_t first = (uintptr_t)tsffn_rows_get(rows, i), last = (uintptr_t)tsffn_rows_get(rows, i + n - 1);
    return last - first == (size_t)(n - 1) * stride ? stride : 0;
}

static inline const uint8_t * tsffn_neuron_row(const struct tsffn_neurons * neurons, enum tsffn_part part, int64_t i) {
    return tsffn_rows_get(&neurons->rows[part], i);
}

static inline void tsffn_neurons_announce(const struct tsffn_neurons * neurons, const int32_t * list,
                                          const uint64_t * rows, int64_t n) {
    if (neurons->memory != NULL && n > 0) {
        neurons->memory->announce(neurons, list, rows, n);
    }
}

static inline void tsffn_neurons_await(const struct tsffn_neurons * neurons, const int32_t * list, int64_t n) {
    if (neurons->memory != NULL && n > 0) {
        neurons->memory->await(neurons, list, n);
    }
}

static inline void tsffn_neurons_expect(const struct tsffn_neurons * neurons, const int32_t * list, int64_t n) {
    if (neurons->memory != NULL && n > 0) {
        neurons->memory->expect(neurons, list, n);
    }
}

static inline void tsffn_neurons_release(const struct tsffn_neurons * neurons, const int32_t * list, int64_t n) {
    if (neurons->memory != NULL && n > 0) {
        neurons->memory->release(neurons, list, n);
    }
}

#endif
