#include "weight.h"

#include "buffer.h"

#include <stdlib.h>
#include <string.h>

// Parses "blk.N.ffn_{gate,up,down}.weight", with "_exps" before ".weight" for MoE.
static bool parse_name(const char * name, int64_t * layer, enum tsffn_part * part, bool * is_moe) {
    static const struct {
        const char * name;
        enum tsffn_part part;
        bool is_moe;
    } kinds[] = {
        {"ffn_gate.weight", TSFFN_PART_GATE, false}, {"ffn_up.weight", TSFFN_PART_UP, false},
        {"ffn_down.weight", TSFFN_PART_DOWN, false}, {"ffn_gate_exps.weight", TSFFN_PART_GATE, true},
        {"ffn_up_exps.weight", TSFFN_PART_UP, true}, {"ffn_down_exps.weight", TSFFN_PART_DOWN, true},
    };
    if (strncmp(name, "blk.", 4) != 0) {
        return false;
    }
    char * end;
    *layer = strtoll(name + 4, &end, 10);
    if (end == name + 4 || *end != '.') {
        return false;
    }
    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); ++i) {
        if (strcmp(end + 1, kinds[i].name) == 0) {
            *part = kinds[i].part;
            *is_moe = kinds[i].is_moe;
            return true;
        }
    }
    return false;
}

bool tsffn_is_asked_for(const tsffn_tensor * w) {
    return w->buffer != NULL && w->buffer->buft == tsffn_buffer_type() && w->buffer->context == NULL;
}

// The model of a weight tensor; of one that is asked for, the model that is being loaded.
static struct tsffn_model * model_of(const tsffn_tensor * w) {
    if (w->buffer == NULL || w->buffer->buft != tsffn_buffer_type()) {
        return NULL;
    }
    return tsffn_is_asked_for(w) ? tsffn_model_armed() : ((const struct tsffn_region *)w->buffer->context)->model;
}

bool tsffn_identify(const tsffn_tensor * w, struct tsffn_weight * weight) {
    bool is_moe;
    weight->loaded = NULL;
    weight->model = model_of(w);
    if (weight->model == NULL || !parse_name(w->name, &weight->layer, &weight->part, &is_moe)) {
        return false;
    }
    const struct tsffn_model * model = weight->model;
    const bool is_down = weight->part == TSFFN_PART_DOWN;
    return weight->layer >= 0 && weight->layer < model->n_layer && is_moe == (model->n_expert > 0) &&
           w->ne[0] == (is_down ? model->n_ff : model->n_embd) && w->ne[1] == (is_down ? model->n_embd : model->n_ff) &&
           w->ne[2] == tsffn_model_ffns_per_layer(model) && w->ne[3] == 1 && model->computes->supports((int)w->type);
}

const struct tsffn_weight * tsffn_weight_of(const tsffn_tensor * w) {
    return w->buffer != NULL && w->buffer->buft == tsffn_buffer_type() && !tsffn_is_asked_for(w) ? w->extra : NULL;
}
