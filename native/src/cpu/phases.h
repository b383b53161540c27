// What the files of this folder do of a call: the phases of ffn.c, and the modes that are made of them.
#ifndef TSFFN_PHASES_H
#define TSFFN_PHASES_H

#include "call.h"

// predictor.c. Asks for what this thread reads first of the predictor.
void tsffn_ask_predictor(const struct shared * s, const struct tsffn_ffn * ffn, int ith, int nth);
// Phase A: the hidden layer of a tile, converted, if the predictor has one. All threads have done their share when this
// returns.
void tsffn_hidden_layer(const struct shared * s, const struct tile * tile);
// Which of the neurons [i0, i1), at most CHUNK_NEURONS, are on, and computed here: bit r of mask[i - i0]. As the call's
// masks say, else the predictor; all of them without either. i0 is a multiple of 32. `end`: of the stream of fc2's
// rows.
void tsffn_mask_neurons(const struct segment * segment, int64_t i0, int64_t i1, int64_t end, uint64_t * mask);

// listing.c. Phase B: lists the neurons that are on, of the thread's part of fc2.
void tsffn_list_neurons(const struct segment * segment);
// A round: the neurons [begin, end) of an FFN, whole chunks. All of them, or as many as memory has room for at once.
struct round {
    int64_t begin, end;
};
static inline struct round all_neurons(const struct segment * segment) {
    return (struct round){0, segment->s->layer->n_ff};
}
// Each thread announces and releases what it listed itself.
void tsffn_announce_round(const struct segment * segment, struct round round);
void tsffn_release_round(const struct segment * segment, struct round round);
// How many neurons can be announced and not yet released.
int64_t tsffn_room(const struct shared * s);
// Between these two the neurons [i0, i1), at most CHUNK_NEURONS, are there, for a mode that lists none.
void tsffn_bring_chunk(const struct segment * segment, int64_t i0, int64_t i1);
void tsffn_release_chunk(const struct segment * segment, int64_t i0, int64_t i1);
// Counts all of n neurons.
void tsffn_count_neurons(const struct segment * segment, int64_t n);
// h = 0 of the neurons [i0, i1).
void tsffn_clear_h(const struct segment * segment, int64_t i0, int64_t i1);

// The neurons that this thread computes for row r: [first[r], end[r]), whole blocks. Where neurons are selected, a
// row's threads share what it needs as equally as blocks let them. So its sums do not depend on what other rows need
// (docs/notes/2026-11-28-threads.md).
struct neuron_share {
    int32_t first[TILE_ROWS], end[TILE_ROWS];
    int64_t first_of_any, first_of_all, end_of_all, end_of_any;
};

// A thread's way through its neurons: where they are selected those of its share, through what all threads listed; else
// every n-th chunk, because how much work a neuron is shows only then, and hot ones may come first.
struct walk {
    struct neuron_share share;
    bool has_share;
    struct round round; // it goes no further
    int64_t next;       // thread whose list is next, or chunk
    int64_t k, end;     // what is left of the list or chunk before: places
};
void tsffn_begin_walk(const struct segment * segment, struct round round, struct walk * walk);
// Fills `list` with the next neurons, at most n_most, with h = 1; they are there.
void tsffn_next_neurons(const struct segment * segment, int n_most, struct walk * walk, struct worklist * list);

// down.c. Adds h * down_i of the listed neurons to the thread's sums; asks meanwhile.
void tsffn_add_downs(const struct segment * segment, const struct worklist * list, struct tsffn_ask_queue * asked);
void tsffn_clear_sums(const struct shared * s, const struct tile * tile);
// Phase D: y, the sums of all threads.
void tsffn_reduce(const struct shared * s, const struct tile * tile);

// ahead.c. The neurons that the next layer's predictor lets through of these activations are expected. All threads have
// announced what this tile needs.
void tsffn_expect_next(const struct shared * s, const struct tile * tile);

// ffn.c. Converts token t's activations for gate and up.
void tsffn_convert_for_neurons(const struct shared * s, int64_t t);
// Calls `phase` for each segment of the tile.
void tsffn_each_segment(const struct shared * s, const struct tile * tile,
                        void (*phase)(const struct segment * segment));

// One function for each mode: what a thread does of a tile.
typedef void (*tsffn_tile_fn)(const struct shared * s, const struct tile * tile);
void tsffn_sparse_tile(const struct shared * s, const struct tile * tile);  // sparse.c
void tsffn_topk_tile(const struct shared * s, const struct tile * tile);    // topk.c
void tsffn_profile_tile(const struct shared * s, const struct tile * tile); // profile.c
void tsffn_gate_tile(const struct shared * s, const struct tile * tile);    // single.c
void tsffn_up_tile(const struct shared * s, const struct tile * tile);      // single.c
void tsffn_down_tile(const struct shared * s, const struct tile * tile);    // single.c
void tsffn_mask_tile(const struct shared * s, const struct tile * tile);    // predictor.c

// profile.c. Adds one thread's histograms to those of the layer.
void tsffn_profile_add(const struct tsffn_profile * profile, const struct histograms * histograms);

#endif
