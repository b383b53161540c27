// Activations of a computed FFN for whoever records them.
#include "record.h"

#include <stdlib.h>
#include <string.h>

static bool reserve(void ** memory, size_t * has, size_t bytes) {
    if (bytes <= *has) {
        return true;
    }
    void * larger = realloc(*memory, bytes);
    if (larger == NULL) {
        return false;
    }
    *memory = larger;
    *has = bytes;
    return true;
}

bool tsffn_recorder_begin(struct tsffn_recorder * recorder, const struct tsffn_weight * weight, struct tsffn_row * rows,
                          const struct tsffn_call * call) {
    const size_t n_rows = (size_t)call->n_rows;
    const size_t n_embd = (size_t)weight->model->n_embd, n_ff = (size_t)weight->model->n_ff;
    if (!reserve((void **)&recorder->x, &recorder->x_bytes, n_rows * n_embd * sizeof(float)) ||
        !reserve((void **)&recorder->h, &recorder->h_bytes, n_rows * n_ff * sizeof(float)) ||
        !reserve((void **)&recorder->ffn, &recorder->ffn_bytes, n_rows * sizeof(int32_t))) {
        return false;
    }
    for (size_t r = 0; r < n_rows; ++r) {
        memcpy(recorder->x + r * n_embd, call->x + (size_t)rows[r].token * call->x_stride, n_embd * sizeof(float));
        recorder->ffn[r] = rows[r].ffn;
        rows[r].h = recorder->h + r * n_ff;
    }
    return true;
}

bool tsffn_recorder_end(const struct tsffn_recorder * recorder, const struct tsffn_weight * weight, int64_t n_rows) {
    const struct tsffn_model * model = weight->model;
    const struct tsffn_activations activations = {
        .layer = (int32_t)weight->layer,
        .n_rows = n_rows,
        .n_embd = model->n_embd,
        .n_ff = model->n_ff,
        .ffn = recorder->ffn,
        .x = recorder->x,
        .h = recorder->h,
    };
    return model->recording.record(&activations, model->recording.user);
}

void tsffn_recorder_free(struct tsffn_recorder * recorder) {
    free(recorder->x);
    free(recorder->h);
    free(recorder->ffn);
}
