// Layers in the arena of a device: what they take, and how they get there.
#include "module.h"
#include "repack.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum { ARENA_ALIGN = 256, BROUGHT_NEURONS = 64 };

static size_t aligned(size_t bytes) {
    return (size_t)tsffn_cuda_pad((int64_t)bytes, ARENA_ALIGN);
}

static int64_t range_neurons(const struct tsffn_range * range) {
    return range->end - range->first;
}

static size_t matrix_bytes(const struct tsffn_weights * matrix) {
    return (size_t)tsffn_cuda_units(matrix) * tsffn_cuda_unit_bytes(matrix);
}

// ---- which layers

static bool row_format(int type, int * format) {
    *format = tsffn_cuda_format(type);
    return *format >= 0 && *format < TSFFN_CUDA_ROW_FORMATS;
}

static bool supports_predictor(const struct tsffn_layer * layer, struct tsffn_cuda_formats * formats, char * error,
                               size_t error_size) {
    if (layer->form != TSFFN_PREDICTOR_MLP) {
        return tsffn_fail(error, error_size, "CUDA: no kernel for a predictor of form %d", layer->form);
    }
    for (int64_t e = 0; e < layer->n_ffns; ++e) {
        if (layer->ffns[e].thresholds != NULL) {
            return tsffn_fail(error, error_size, "CUDA: no kernel for a predictor with a threshold for each neuron");
        }
        const struct tsffn_weights *fc1 = &layer->ffns[e].fc1, *fc2 = &layer->ffns[e].fc2;
        if (fc1->data == NULL || fc2->data == NULL) {
            return tsffn_fail(error, error_size, "CUDA: FFN %" PRId64 ": expected a predictor, found none", e);
        }
        if (!row_format(fc1->type, &formats->fc1)) {
            return tsffn_fail(error, error_size, "CUDA: no kernel for a predictor's fc1 of type %d", fc1->type);
        }
        formats->fc2 = tsffn_cuda_format(fc2->type);
        const bool panels_only = formats->fc2 == TSFFN_CUDA_Q3_NL;
        if (formats->fc2 < 0 || (panels_only && fc2->layout != TSFFN_LAYOUT_PANELS)) {
            return tsffn_fail(error, error_size, "CUDA: no kernel for a predictor's fc2 of type %d", fc2->type);
        }
    }
    return true;
}

// Fills `formats`, as far as the layer has the matrices.
static bool supports(const struct tsffn_layer * layer, const struct tsffn_range * ranges, bool predictor,
                     struct tsffn_cuda_formats * formats, char * error, size_t error_size) {
    const int gate = layer->types[TSFFN_PART_GATE], up = layer->types[TSFFN_PART_UP];
    const int down = layer->types[TSFFN_PART_DOWN];
    if (gate != up || !row_format(gate, &formats->neurons) || !row_format(down, &formats->down)) {
        return tsffn_fail(error, error_size, "CUDA: no kernel for gate, up, down of types %d, %d, %d", gate, up, down);
    }
    if (layer->n_embd % TSFFN_CUDA_BLOCK != 0) {
        return tsffn_fail(error, error_size, "CUDA: n_embd: expected a multiple of %d, found %" PRId64,
                          TSFFN_CUDA_BLOCK, layer->n_embd);
    }
    for (int64_t e = 0; e < layer->n_ffns; ++e) {
        const struct tsffn_range * r = &ranges[e];
        if (r->first < 0 || r->end < r->first || r->end > layer->n_ff || r->first % TSFFN_CUDA_BLOCK != 0 ||
            (r->end % TSFFN_CUDA_BLOCK != 0 && r->end != layer->n_ff)) {
            return tsffn_fail(error, error_size,
                              "CUDA: FFN %" PRId64 ": neurons [%d, %d): expected multiples of %d up to %" PRId64, e,
                              r->first, r->end, TSFFN_CUDA_BLOCK, layer->n_ff);
        }
    }
    return !predictor || supports_predictor(layer, formats, error, error_size);
}

// ---- where its parts are

// Offsets from the layer's first byte.
struct places {
    size_t ffns, pred_scale, end;
};

static size_t neuron_bytes(const struct tsffn_layer * layer, const struct tsffn_cuda_formats * formats) {
    return 2 * tsffn_cuda_row_bytes(formats->neurons, layer->n_embd) +
           tsffn_cuda_row_bytes(formats->down, layer->n_embd);
}

size_t tsffn_cuda_neuron_bytes(const struct tsffn_layer * layer) {
    struct tsffn_cuda_formats formats;
    const bool known = row_format(layer->types[TSFFN_PART_GATE], &formats.neurons) &&
                       row_format(layer->types[TSFFN_PART_DOWN], &formats.down);
    return known ? neuron_bytes(layer, &formats) : 0;
}

// Takes the next bytes of the layer.
static size_t take(size_t * used, size_t bytes) {
    const size_t at = *used;
    *used += aligned(bytes);
    return at;
}

// Where everything is. table [n_ffns] receives the FFNs as the kernels see them, with `base` as the layer's first byte.
static struct places place_all(const struct tsffn_layer * layer, const struct tsffn_range * ranges, bool predictor,
                               const struct tsffn_cuda_formats * formats, const uint8_t * base,
                               struct tsffn_cuda_ffn * table) {
    struct places places = {0};
    size_t used = 0;
    places.ffns = take(&used, (size_t)layer->n_ffns * sizeof(struct tsffn_cuda_ffn));
    const bool scaled = predictor && layer->pred_scale != NULL;
    places.pred_scale = take(&used, scaled ? (size_t)layer->n_embd * sizeof(float) : 0);
    for (int64_t e = 0; e < layer->n_ffns; ++e) {
        const struct tsffn_ffn_weights * ffn = &layer->ffns[e];
        const size_t fc1 = take(&used, predictor ? matrix_bytes(&ffn->fc1) : 0);
        const size_t fc2 = take(&used, predictor ? matrix_bytes(&ffn->fc2) : 0);
        const size_t neurons = take(&used, (size_t)range_neurons(&ranges[e]) * neuron_bytes(layer, formats));
        if (table != NULL) {
            table[e] = (struct tsffn_cuda_ffn){
                .fc1 = base + fc1,
                .fc2 = base + fc2,
                .neurons = base + neurons,
                .rank = predictor ? (int32_t)ffn->fc1.n_rows : 0,
                .first = ranges[e].first,
                .end = ranges[e].end,
            };
        }
    }
    places.end = used;
    return places;
}

size_t tsffn_cuda_layer_bytes(const struct tsffn_layer * layer, const struct tsffn_range * ranges, bool predictor,
                              char * error, size_t error_size) {
    struct tsffn_cuda_formats formats;
    if (!supports(layer, ranges, predictor, &formats, error, error_size)) {
        return 0;
    }
    return place_all(layer, ranges, predictor, &formats, NULL, NULL).end;
}

// ---- copying

// Bytes on their way to consecutive addresses of the device.
struct upload {
    struct tsffn_cuda * cuda;
    uint8_t * to; // where the staged bytes go
    size_t n;     // staged
    int buffer;
};

static bool flush(struct upload * u) {
    struct tsffn_gpu * gpu = &u->cuda->gpu;
    if (u->n == 0) {
        return true;
    }
    if (!tsffn_gpu_copy(gpu, u->cuda->stream, u->to, u->cuda->staging[u->buffer], u->n) ||
        !tsffn_gpu_record(gpu, u->cuda->copied[u->buffer], u->cuda->stream)) {
        return false;
    }
    u->n = 0;
    u->buffer = (u->buffer + 1) % STAGING_BUFFERS;
    return tsffn_gpu_await(gpu, u->cuda->copied[u->buffer]); // an event that was never recorded is done
}

// Where to write the next `bytes`, which go to `to`; NULL: failed.
static uint8_t * stage(struct upload * u, const uint8_t * to, size_t bytes) {
    if ((u->n != 0 && to != u->to + u->n) || u->n + bytes > STAGING_BYTES) {
        if (!flush(u)) {
            return NULL;
        }
    }
    if (u->n == 0) {
        u->to = (uint8_t *)(uintptr_t)to;
    }
    uint8_t * place = (uint8_t *)u->cuda->staging[u->buffer] + u->n;
    u->n += bytes;
    return place;
}

static bool put_bytes(struct upload * u, const void * to, const void * from, size_t bytes) {
    uint8_t * place = stage(u, to, bytes);
    if (place != NULL) {
        memcpy(place, from, bytes);
    }
    return place != NULL;
}

static bool put_matrix(struct upload * u, const uint8_t * to, const struct tsffn_weights * matrix) {
    const size_t bytes = tsffn_cuda_unit_bytes(matrix);
    for (int64_t unit = 0; unit < tsffn_cuda_units(matrix); ++unit) {
        uint8_t * place = stage(u, to + (size_t)unit * bytes, bytes);
        if (place == NULL) {
            return false;
        }
        tsffn_cuda_repack_unit(matrix, unit, place);
    }
    return true;
}

void tsffn_cuda_repack_neuron(const struct tsffn_cuda_layer * made, const struct tsffn_neurons * neurons, int64_t i,
                              uint8_t * to) {
    const int formats[TSFFN_N_PARTS] = {made->formats.neurons, made->formats.neurons, made->formats.down};
    const size_t offsets[TSFFN_N_PARTS] = {0, made->up_offset, made->down_offset};
    for (int part = 0; part < TSFFN_N_PARTS; ++part) {
        tsffn_cuda_repack_row(formats[part], made->n_embd, tsffn_neuron_row(neurons, (enum tsffn_part)part, i),
                              to + offsets[part]);
    }
}

// The neurons [i0, i1) of an FFN: they are brought in, if need be, for as long as they are read.
static bool put_neurons(struct upload * u, const struct tsffn_cuda_layer * made, const struct tsffn_neurons * neurons,
                        const uint8_t * to, int64_t i0, int64_t i1) {
    int32_t list[BROUGHT_NEURONS];
    for (int64_t i = i0; i < i1; ++i) {
        list[i - i0] = (int32_t)i;
    }
    tsffn_neurons_announce(neurons, list, NULL, i1 - i0);
    tsffn_neurons_await(neurons, list, i1 - i0);
    bool ok = true;
    for (int64_t i = i0; ok && i < i1; ++i) {
        uint8_t * place = stage(u, to + (size_t)(i - i0) * made->neuron_bytes, made->neuron_bytes);
        ok = place != NULL;
        if (ok) {
            tsffn_cuda_repack_neuron(made, neurons, i, place);
        }
    }
    tsffn_neurons_release(neurons, list, i1 - i0);
    return ok;
}

static bool put_ffn(struct upload * u, const struct tsffn_cuda_layer * made, const struct tsffn_ffn_weights * ffn,
                    const struct tsffn_cuda_ffn * places) {
    if (made->max_rank != 0 && (!put_matrix(u, places->fc1, &ffn->fc1) || !put_matrix(u, places->fc2, &ffn->fc2))) {
        return false;
    }
    for (int64_t i = places->first, next; i < places->end; i = next) {
        next = i + BROUGHT_NEURONS < places->end ? i + BROUGHT_NEURONS : places->end;
        const uint8_t * to = places->neurons + (size_t)(i - places->first) * made->neuron_bytes;
        if (!put_neurons(u, made, &ffn->neurons, to, i, next)) {
            return false;
        }
    }
    return true;
}

// Copies the layer to `base`. table: as place_all filled it.
static bool put_layer(struct tsffn_cuda * cuda, const struct tsffn_layer * layer, const struct tsffn_cuda_layer * made,
                      const struct tsffn_cuda_ffn * table) {
    struct upload u = {.cuda = cuda};
    bool ok = put_bytes(&u, made->ffns, table, (size_t)made->n_ffns * sizeof(*table));
    if (made->pred_scale != NULL) {
        ok = ok && put_bytes(&u, made->pred_scale, layer->pred_scale, (size_t)made->n_embd * sizeof(float));
    }
    for (int64_t e = 0; ok && e < made->n_ffns; ++e) {
        ok = put_ffn(&u, made, &layer->ffns[e], &table[e]);
    }
    ok = ok && flush(&u);
    // In any case: the staging buffers are the next layer's.
    return tsffn_gpu_drain(&cuda->gpu, cuda->stream) && ok;
}

// ---- a layer

// How many rows' activations the shared memory of a block holds, in every kernel; 0: not even one row's.
static int segment_rows(const struct tsffn_cuda_layer * made, size_t shared_bytes) {
    int rows = TSFFN_CUDA_SEGMENT_ROWS;
    for (; rows > 0; --rows) {
        const bool predicts = made->max_rank != 0;
        if (tsffn_cuda_neurons_shared(made->formats.neurons, rows, made->n_embd) <= shared_bytes &&
            (!predicts || (tsffn_cuda_hidden_shared(made->formats.fc1, rows, made->n_embd) <= shared_bytes &&
                           tsffn_cuda_mask_shared(made->formats.fc2, rows, made->max_rank) <= shared_bytes))) {
            break;
        }
    }
    return rows;
}

// What is known of the layer without the device; false without memory.
static bool describe(struct tsffn_cuda_layer * made, const struct tsffn_layer * layer,
                     const struct tsffn_range * ranges, bool predictor) {
    const size_t row = tsffn_cuda_row_bytes(made->formats.neurons, layer->n_embd);
    made->n_embd = layer->n_embd;
    made->n_ff = layer->n_ff;
    made->n_ffns = layer->n_ffns;
    made->always_on = !tsffn_has_predictor(layer);
    made->complete = true;
    made->activation = layer->activation;
    made->threshold = layer->threshold;
    made->on_when_equal = layer->on_when_equal;
    made->up_offset = row;
    made->down_offset = 2 * row;
    made->neuron_bytes = neuron_bytes(layer, &made->formats);
    made->ranges = calloc((size_t)layer->n_ffns, sizeof(*made->ranges));
    made->predictor_bytes = calloc((size_t)layer->n_ffns, sizeof(*made->predictor_bytes));
    if (made->ranges == NULL || made->predictor_bytes == NULL) {
        return false;
    }
    for (int part = 0; part < TSFFN_N_PARTS; ++part) {
        made->row_bytes[part] = layer->ffns[0].neurons.rows[part].row_bytes;
    }
    for (int64_t e = 0; e < layer->n_ffns; ++e) {
        const struct tsffn_ffn_weights * ffn = &layer->ffns[e];
        made->ranges[e] = ranges[e];
        made->complete = made->complete && range_neurons(&ranges[e]) == layer->n_ff;
        if (predictor) {
            const int64_t rank = tsffn_cuda_pad(ffn->fc1.n_rows, TSFFN_CUDA_BLOCK);
            made->max_rank = rank > made->max_rank ? rank : made->max_rank;
            made->predictor_bytes[e] = tsffn_weights_bytes(&ffn->fc1) + tsffn_weights_bytes(&ffn->fc2);
        }
    }
    return true;
}

static void free_layer(struct tsffn_cuda_layer * made) {
    if (made != NULL) {
        free(made->ranges);
        free(made->predictor_bytes);
        free(made);
    }
}

// The layer at the arena's first free byte, `table` included; false with a line in `error`.
static bool make(struct tsffn_cuda * cuda, const struct tsffn_layer * layer, const struct tsffn_range * ranges,
                 bool predictor, struct tsffn_cuda_layer * made, struct tsffn_cuda_ffn * table, char * error,
                 size_t error_size) {
    made->cuda = cuda;
    if (!describe(made, layer, ranges, predictor)) {
        return tsffn_fail(error, error_size, "CUDA: out of host memory");
    }
    uint8_t * base = cuda->arena + cuda->used;
    const struct places places = place_all(layer, ranges, predictor, &made->formats, base, table);
    made->ffns = (const struct tsffn_cuda_ffn *)(const void *)(base + places.ffns);
    if (predictor && layer->pred_scale != NULL) {
        made->pred_scale = (const float *)(const void *)(base + places.pred_scale);
    }
    if (places.end > cuda->arena_bytes - cuda->used) {
        return tsffn_fail(error, error_size, "CUDA: a layer of %zu bytes: expected room in the arena, found %zu bytes",
                          places.end, cuda->arena_bytes - cuda->used);
    }
    made->segment_rows = segment_rows(made, cuda->gpu.shared_bytes);
    if (made->segment_rows == 0 || made->neuron_bytes > STAGING_BYTES) {
        return tsffn_fail(error, error_size,
                          "CUDA: n_embd %" PRId64 ", rank %" PRId64 ": too much for the %zu bytes of a block's memory",
                          made->n_embd, made->max_rank, cuda->gpu.shared_bytes);
    }
    if (!tsffn_gpu_use(&cuda->gpu) || !put_layer(cuda, layer, made, table)) {
        return tsffn_cuda_failed(cuda, &cuda->gpu, error, error_size);
    }
    cuda->used += places.end;
    cuda->n_layers += 1;
    return true;
}

struct tsffn_cuda_layer * tsffn_cuda_upload(struct tsffn_cuda * cuda, const struct tsffn_layer * layer,
                                            const struct tsffn_range * ranges, bool predictor, char * error,
                                            size_t error_size) {
    struct tsffn_cuda_layer * made = calloc(1, sizeof(*made));
    struct tsffn_cuda_ffn * table = calloc((size_t)layer->n_ffns, sizeof(*table));
    bool ok = made != NULL && table != NULL;
    if (!ok) {
        tsffn_fail(error, error_size, "CUDA: out of host memory");
    }
    ok = ok && supports(layer, ranges, predictor, &made->formats, error, error_size) &&
         make(cuda, layer, ranges, predictor, made, table, error, error_size);
    free(table);
    if (!ok) {
        free_layer(made);
        return NULL;
    }
    return made;
}

void tsffn_cuda_release(struct tsffn_cuda_layer * layer) {
    if (layer == NULL) {
        return;
    }
    struct tsffn_cuda * cuda = layer->cuda;
    cuda->n_layers -= 1;
    if (cuda->n_layers == 0) {
        cuda->used = 0;
    }
    free_layer(layer);
}
