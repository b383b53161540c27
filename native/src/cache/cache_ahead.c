// What is read ahead of the call that needs it: neurons are taken when no read is left to be started that a call waits
// for. They are held until the next call has ended, so that they are not thrown out before.
#include "cache_state.h"

void tsffn_cache_forget_ahead(struct tsffn_neuron_cache * c) {
    c->first_ahead = c->n_ahead = 0;
}

int tsffn_cache_take_ahead(struct tsffn_neuron_cache * c, int32_t * neurons, int n) {
    int taken = 0;
    while (taken < n && c->first_ahead < c->n_ahead) {
        const int32_t neuron = c->ahead[c->first_ahead++];
        if (state_of(c, neuron) != ABSENT) {
            continue;
        }
        const int32_t slot = c->by_this.n < c->max_ahead ? tsffn_cache_take_slot(c) : NOBODY;
        if (slot == NOBODY) {
            tsffn_cache_forget_ahead(c);
            break;
        }
        c->slot_of[neuron] = slot;
        c->infos[slot] =
            (struct slot){.neuron = neuron, .score = c->score[neuron], .holds = 1, .comes = true, .is_ahead = true};
        set_state(c, neuron, ALL_PARTS);
        c->by_this.neuron[c->by_this.n++] = neuron;
        neurons[taken++] = neuron;
    }
    return taken;
}

void tsffn_cache_release_expected(struct tsffn_neuron_cache * c, struct expected * expected) {
    for (int64_t k = 0; k < expected->n; ++k) {
        struct slot * info = &c->infos[c->slot_of[expected->neuron[k]]];
        info->holds -= 1;
        c->counts.in_vain += info->is_ahead;
        info->is_ahead = false;
    }
    expected->n = 0;
}

void tsffn_cache_expect(const struct tsffn_neurons * neurons, const int32_t * list, int64_t n) {
    const struct cached_ffn * ffn = neurons->state;
    struct tsffn_neuron_cache * c = ffn->cache;
    pthread_mutex_lock(&c->mutex);
    for (int64_t k = 0; k < n && c->n_ahead < c->source.n_ff; ++k) {
        const int32_t neuron = (int32_t)ffn->first + list[k];
        if (state_of(c, neuron) == ABSENT) {
            c->ahead[c->n_ahead++] = neuron;
        }
    }
    tsffn_cache_progress(c, false);
    pthread_mutex_unlock(&c->mutex);
}
