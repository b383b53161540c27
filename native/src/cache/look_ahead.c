#include "look_ahead.h"

#include <stdlib.h>
#include <string.h>

enum {
    MAX_TOKENS = 4, // of a call: the threads that compute more have no time for another predictor
    TRIAL = 2 * TSFFN_AHEAD_TRIALS,
    KEPT = 8 * TRIAL, // tokens from one trial to the next
};

void tsffn_look_ahead_init(struct tsffn_look_ahead * l, int64_t n_layer) {
    const char * asked = getenv("TSFFN_LOOK_AHEAD");
    *l = (struct tsffn_look_ahead){
        .last_layer = n_layer - 1,
        .always = asked != NULL && strcmp(asked, "on") == 0,
        .never = asked != NULL && strcmp(asked, "off") == 0,
    };
}

// With the token that is computed.
static bool is_on(const struct tsffn_look_ahead * l) {
    return l->always || (!l->never && (l->n < TRIAL ? l->n % 2 != 0 : l->chosen));
}

static int compare(const void * a, const void * b) {
    const uint64_t first = *(const uint64_t *)a, second = *(const uint64_t *)b;
    return (first > second) - (first < second);
}

static uint64_t median(uint64_t * took) {
    qsort(took, TSFFN_AHEAD_TRIALS, sizeof(*took), compare);
    return took[TSFFN_AHEAD_TRIALS / 2];
}

bool tsffn_look_ahead_begin(struct tsffn_look_ahead * l, int64_t layer, int64_t n_tokens, uint64_t now) {
    const bool is_one = n_tokens > 0 && n_tokens <= MAX_TOKENS;
    if (layer == 0 || !is_one) {
        l->began = is_one ? now : 0;
    }
    return is_one && layer < l->last_layer && is_on(l);
}

void tsffn_look_ahead_end(struct tsffn_look_ahead * l, int64_t layer, uint64_t now) {
    if (layer != l->last_layer || l->began == 0) {
        return;
    }
    if (l->n < TRIAL) {
        l->took[l->n % 2][l->n / 2] = now - l->began;
    }
    l->began = 0;
    l->n += 1;
    if (l->n == TRIAL) {
        l->chosen = median(l->took[1]) < median(l->took[0]);
    } else if (l->n == KEPT) {
        l->n = 0;
    }
}
