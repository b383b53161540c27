// Whether it pays to read the next layer's neurons ahead: where memory lacks many it does, where it lacks few the time
// to find out which is lost. It is tried, from token to token with and without, and what was faster is kept for a
// while.
#ifndef TSFFN_LOOK_AHEAD_H
#define TSFFN_LOOK_AHEAD_H

#include <stdbool.h>
#include <stdint.h>

enum { TSFFN_AHEAD_TRIALS = 8 }; // tokens, of each way

struct tsffn_look_ahead {
    int64_t last_layer;
    bool always, never; // TSFFN_LOOK_AHEAD=on, =off in the environment
    bool chosen;
    int n; // tokens since a trial began
    uint64_t took[2][TSFFN_AHEAD_TRIALS],
        began; // ns: without, with; and when this token began, 0 where that is not known
};

void tsffn_look_ahead_init(struct tsffn_look_ahead * l, int64_t n_layer);
// When a call of a layer begins and ends, at `now` in ns; n_tokens: 0 where it tells nothing. Returns whether it is to
// look ahead.
bool tsffn_look_ahead_begin(struct tsffn_look_ahead * l, int64_t layer, int64_t n_tokens, uint64_t now);
void tsffn_look_ahead_end(struct tsffn_look_ahead * l, int64_t layer, uint64_t now);

#endif
