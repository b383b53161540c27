// The CPU as a device.
#include "../ffn/device.h"

#include "ffn.h"
#include "row_types.h"

#include <stdlib.h>

// A layer and its FFNs, with the functions that multiply their rows.
struct prepared {
    struct tsffn_cpu_layer layer;
    struct tsffn_ffn ffns[];
};

static struct tsffn_matrix matrix_of(const struct tsffn_weights * weights) {
    return (struct tsffn_matrix){
        .type = weights->data != NULL ? tsffn_row_type_for(weights->type) : NULL,
        .data = weights->data,
        .n_rows = weights->n_rows,
        .n_cols = weights->n_cols,
        .layout = weights->layout,
    };
}

static bool supports(int type) {
    return tsffn_row_type_for(type) != NULL;
}

static void * prepare(const struct tsffn_layer * layer) {
    struct prepared * prepared = malloc(sizeof(*prepared) + (size_t)layer->n_ffns * sizeof(prepared->ffns[0]));
    if (prepared == NULL) {
        return NULL;
    }
    prepared->layer = (struct tsffn_cpu_layer){
        .n_embd = layer->n_embd,
        .n_ff = layer->n_ff,
        .n_ffns = layer->n_ffns,
        .ffns = prepared->ffns,
        .activation = layer->activation,
        .form = layer->form,
        .input_bits = layer->input_bits,
        .pred_scale = layer->pred_scale,
        .threshold = layer->threshold,
        .on_when_equal = layer->on_when_equal,
    };
    for (int part = 0; part < TSFFN_N_PARTS; ++part) {
        prepared->layer.types[part] = tsffn_row_type_for(layer->types[part]);
    }
    for (int64_t e = 0; e < layer->n_ffns; ++e) {
        const struct tsffn_ffn_weights * weights = &layer->ffns[e];
        prepared->ffns[e] = (struct tsffn_ffn){
            .neurons = weights->neurons,
            .fc1 = matrix_of(&weights->fc1),
            .fc2 = matrix_of(&weights->fc2),
            .fc3 = matrix_of(&weights->fc3),
            .thresholds = weights->thresholds,
        };
    }
    return prepared;
}

static void * open_workspace(void) {
    return tsffn_workspace_new();
}

static void close_workspace(void * workspace) {
    tsffn_workspace_free(workspace);
}

_Static_assert(offsetof(struct prepared, layer) == 0, "what call.next points to is a struct tsffn_cpu_layer too");

static bool compute(void * workspace, const void * layer, const struct tsffn_call * call,
                    struct tsffn_counts * counts) {
    return tsffn_compute(workspace, &((const struct prepared *)layer)->layer, call, counts);
}

const struct tsffn_device tsffn_cpu_device = {
    .version = TSFFN_DEVICE_VERSION,
    .name = "cpu",
    .init = tsffn_row_types_init,
    .supports = supports,
    .prepare = prepare,
    .release = free,
    .open = open_workspace,
    .close = close_workspace,
    .compute = compute,
};
