// Which neurons stay: those that are used most often, where a use counts 0.99 of what one a token later does. So a
// score is the sum of weights that grow by 1/0.99 from token to token, and nothing needs to be made smaller meanwhile.
//
// Whose score is lowest is not searched for in all: the lowest of some slots at random goes. Sets of slots make no
// difference to what is computed.
#include "cache_state.h"

#include <math.h>

static const float AGING = 0.99f;
static const float MOST_WEIGHT = 1e15f; // that of a call is at most 1e9 times as much

enum { SAMPLES = 32, MOST_TOKENS = 2048 };

void tsffn_cache_tick(struct tsffn_neuron_cache * c, int64_t n_tokens) {
    if (n_tokens == 0) {
        c->use = 0.0f;
        return;
    }
    if (c->call_layer == 0) {
        c->weight *= powf(AGING, -(float)(n_tokens < MOST_TOKENS ? n_tokens : MOST_TOKENS));
    }
    if (c->weight > MOST_WEIGHT) {
        for (int64_t i = 0; i < c->n_neurons; ++i) {
            c->score[i] /= c->weight;
        }
        for (int64_t slot = 0; slot < c->n_slots; ++slot) {
            c->infos[slot].score /= c->weight;
        }
        c->weight = 1.0f;
    }
    // The tokens of a call are not told apart: each use counts their mean.
    const float n = (float)n_tokens;
    c->use = c->weight * (1.0f - powf(AGING, n)) / (n * (1.0f - AGING));
}

static uint64_t random_bits(struct tsffn_neuron_cache * c) {
    c->random ^= c->random >> 12; // xorshift64*
    c->random ^= c->random << 25;
    c->random ^= c->random >> 27;
    return c->random * 0x2545f4914f6cdd1du;
}

static bool can_go(const struct slot * info) {
    return info->neuron == NOBODY || (info->holds == 0 && !info->comes);
}

// The slot that goes; NOBODY where none can.
static int64_t choose(struct tsffn_neuron_cache * c) {
    int64_t best = NOBODY;
    float lowest = INFINITY;
    for (int k = 0; k < SAMPLES; ++k) {
        const int64_t slot = (int64_t)((random_bits(c) >> 32) * (uint64_t)c->n_slots >> 32);
        const struct slot * info = &c->infos[slot];
        if (can_go(info) && info->score < lowest) {
            best = slot;
            lowest = info->score;
        }
    }
    const int64_t first = (int64_t)(random_bits(c) % (uint64_t)c->n_slots);
    for (int64_t k = 0; best == NOBODY && k < c->n_slots; ++k) {
        const int64_t slot = (first + k) % c->n_slots;
        best = can_go(&c->infos[slot]) ? slot : NOBODY;
    }
    return best;
}

// The slot is free: what was in it is absent.
static void leave(struct tsffn_neuron_cache * c, struct slot * info) {
    c->score[info->neuron] = info->score;
    c->table[info->neuron] = c->nothing;
    set_state(c, info->neuron, ABSENT);
    *info = (struct slot){.neuron = NOBODY, .score = -1.0f};
}

int32_t tsffn_cache_take_slot(struct tsffn_neuron_cache * c) {
    if (c->n_used < c->n_slots) {
        return (int32_t)c->n_used++;
    }
    const int64_t slot = choose(c);
    if (slot != NOBODY && c->infos[slot].neuron != NOBODY) {
        leave(c, &c->infos[slot]);
    }
    return (int32_t)slot;
}

void tsffn_cache_drop_coming(struct tsffn_neuron_cache * c) {
    for (int64_t slot = 0; slot < c->n_used; ++slot) {
        if (c->infos[slot].neuron != NOBODY && c->infos[slot].comes) {
            leave(c, &c->infos[slot]);
        }
    }
}
