// One parallel region per call. Per tile of at most 64 rows, four phases with a barrier between them:
//
//   A  hidden   h1[r] = relu(fc1 . p_r)                            threads share the rows of fc1
//   B  logits   fc2 . h1 -> the neurons that are on                threads share the rows of fc2
//   C  neurons  gate, up, down of those                            threads share them (without a predictor they take
//                                                                  chunks in turn) and add into sums of their own
//   D  reduce   y[r] = the sums of all threads for r               threads share rows and columns
//
// Weight rows are outer and activations inner, so a weight row is read from memory once per tile. Whose sums a neuron
// goes into depends on the row's own mask and the thread count only: its result does not depend on the rest of its
// batch.
//
// What a call computes is one of seven modes, each a function of a tile: the sparse FFN, that of top-k, activation
// statistics, the single operations of a graph that was cut, and the predictor alone.
#include "phases.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>

enum {
    // Up to so many rows every thread of the sparse FFN converts the activations for itself: shared, their lines go
    // from core to core, and two more barriers are waited for (docs/notes/2026-11-28-threads.md).
    COPIED_ROWS = 4,
};

// ---- modes

struct mode {
    bool gate, up, predictor; // which activations are converted
    bool copies;              // for a few rows every thread may convert them for itself
    tsffn_tile_fn tile;
};

static const struct mode * mode_of(const struct tsffn_call * call) {
    static const struct mode profile = {.gate = true, .up = true, .predictor = true, .tile = tsffn_profile_tile};
    static const struct mode modes[] = {
        [TSFFN_OP_FUSED] = {.gate = true, .up = true, .predictor = true, .copies = true, .tile = tsffn_sparse_tile},
        [TSFFN_OP_GATE] = {.gate = true, .predictor = true, .tile = tsffn_gate_tile},
        [TSFFN_OP_UP] = {.up = true, .tile = tsffn_up_tile},
        [TSFFN_OP_DOWN] = {.tile = tsffn_down_tile},
        [TSFFN_OP_MASK] = {.predictor = true, .tile = tsffn_mask_tile},
    };
    static const struct mode topk = {.gate = true, .up = true, .tile = tsffn_topk_tile};
    if (call->profile != NULL) {
        return &profile;
    }
    return call->op == TSFFN_OP_FUSED && call->keep > 0 ? &topk : &modes[call->op];
}

// ---- memory

struct tsffn_workspace {
    char * memory;
    size_t size;
};

struct tsffn_workspace * tsffn_workspace_new(void) {
    return calloc(1, sizeof(struct tsffn_workspace));
}

void tsffn_workspace_free(struct tsffn_workspace * ws) {
    if (ws != NULL) {
        free(ws->memory);
        free(ws);
    }
}

static bool reserve(struct tsffn_workspace * ws, size_t size) {
    if (size <= ws->size) {
        return true;
    }
    free(ws->memory);
    ws->memory = aligned_alloc(TSFFN_CACHE_LINE, size);
    ws->size = ws->memory != NULL ? size : 0;
    return ws->memory != NULL;
}

// Carves the next `size` bytes out of the workspace; with base NULL it only measures.
static char * carve(char * base, size_t * used, size_t size) {
    char * p = base != NULL ? base + *used : NULL;
    *used += (size + TSFFN_CACHE_LINE - 1) / TSFFN_CACHE_LINE * TSFFN_CACHE_LINE;
    return p;
}

static struct activations carve_activations(char * base, size_t * used, int64_t n, size_t bytes) {
    return (struct activations){.at = carve(base, used, (size_t)n * bytes), .bytes = bytes};
}

// Of the converted hidden layer of an FFN's predictor, at most.
static int64_t hidden_bytes(const struct tsffn_cpu_layer * layer) {
    int64_t most = 0;
    for (int64_t e = 0; e < layer->n_ffns; ++e) {
        const struct tsffn_matrix * fc2 = &layer->ffns[e].fc2;
        most = layer->ffns[e].fc1.data != NULL ? max_i64(most, (int64_t)tsffn_x_bytes(fc2->type, fc2->n_cols)) : most;
    }
    return most;
}

static int64_t max_rank(const struct tsffn_cpu_layer * layer) {
    int64_t most = 0;
    for (int64_t e = 0; e < layer->n_ffns; ++e) {
        most = max_i64(most, layer->ffns[e].fc1.n_rows);
    }
    return most;
}

// The layer whose neurons a call can expect: for few rows, which every thread converts for itself, and of a dense
// model, whose next layer computes with the same FFN.
static const struct tsffn_cpu_layer * next_of(const struct tsffn_call * call, const struct tsffn_cpu_layer * layer) {
    const struct tsffn_cpu_layer * next = call->next;
    if (next == NULL || call->n_rows > COPIED_ROWS || layer->n_ffns > 1) {
        return NULL;
    }
    const struct tsffn_matrix * first = tsffn_first_matrix(&next->ffns[0]);
    const bool can = next->n_ff == layer->n_ff && first->data != NULL && next->form == layer->form &&
                     next->input_bits == layer->input_bits && first->type == tsffn_first_matrix(&layer->ffns[0])->type;
    return can ? next : NULL;
}

// The converted activations, of which there may be a copy for each thread.
static void lay_out_activations(struct shared * s, const struct mode * mode, char * base, size_t * used) {
    const struct tsffn_call * call = s->call;
    const struct tsffn_cpu_layer * layer = s->layer;
    const struct tsffn_row_type * gate = layer->types[TSFFN_PART_GATE];
    const struct tsffn_row_type * up = layer->types[TSFFN_PART_UP];
    if (mode->gate) {
        s->x.gate = carve_activations(base, used, call->n_tokens, tsffn_x_bytes(gate, layer->n_embd));
    }
    if (mode->up && mode->gate && up->x_format == gate->x_format) {
        s->x.up = s->x.gate;
    } else if (mode->up) {
        s->x.up = carve_activations(base, used, call->n_tokens, tsffn_x_bytes(up, layer->n_embd));
    }
    if (s->predicts) {
        const size_t p_bytes = tsffn_x_bytes(tsffn_first_matrix(&layer->ffns[0])->type, layer->n_embd);
        const size_t h1_bytes = (size_t)max_i64(hidden_bytes(layer), s->next != NULL ? hidden_bytes(s->next) : 0);
        s->x.predictor = carve_activations(base, used, call->n_tokens, p_bytes);
        s->hidden.converted = carve_activations(base, used, min_i64(TILE_ROWS, call->n_rows), h1_bytes);
    }
    s->copy_bytes = mode->copies && call->n_rows <= COPIED_ROWS ? *used : 0;
    *used += (size_t)(call->n_threads - 1) * s->copy_bytes;
}

static void lay_out_own_memory(struct shared * s, char * base, size_t * used) {
    const struct tsffn_cpu_layer * layer = s->layer;
    const size_t nth = (size_t)s->call->n_threads;
    const size_t n_sums = TILE_ROWS * (size_t)layer->n_embd;
    const size_t n_scratch = (size_t)max_i64(layer->n_embd, s->hidden.max_rank);
    s->own = (struct own_memory *)carve(base, used, nth * sizeof(*s->own));
    for (size_t thread = 0; thread < nth; ++thread) {
        float * sums = (float *)carve(base, used, n_sums * sizeof(*sums));
        float * scratch = (float *)carve(base, used, n_scratch * sizeof(*scratch));
        struct histograms * histograms =
            s->call->profile != NULL ? (struct histograms *)carve(base, used, sizeof(*histograms)) : NULL;
        if (base == NULL) {
            continue;
        }
        struct own_memory * own = &s->own[thread];
        own->counts = (struct tsffn_counts){0};
        own->sums = sums;
        own->scratch = scratch;
        own->histograms = histograms;
        if (histograms != NULL) {
            memset(histograms, 0, sizeof(*histograms));
        }
    }
}

// Fills the pointers of `s` from `base`, and returns the bytes that takes.
static size_t lay_out(struct shared * s, const struct mode * mode, char * base) {
    const struct tsffn_cpu_layer * layer = s->layer;
    const int64_t n_segments = min_i64(min_i64(TILE_ROWS, s->call->n_rows), layer->n_ffns);
    const size_t n_needed = (size_t)(n_segments * layer->n_ff);
    const size_t n_blocks = (size_t)(n_segments * n_blocks_of(layer->n_ff));
    size_t used = 0;
    lay_out_activations(s, mode, base, &used);
    if (s->predicts) {
        s->hidden.values = (float *)carve(base, &used, TILE_ROWS * (size_t)s->hidden.max_rank * sizeof(float));
    }
    s->needed.neuron = (int32_t *)carve(base, &used, n_needed * sizeof(*s->needed.neuron));
    s->needed.rows = (uint64_t *)carve(base, &used, n_needed * sizeof(*s->needed.rows));
    s->needed.n = (int32_t *)carve(base, &used, (size_t)(n_segments * s->call->n_threads) * sizeof(*s->needed.n));
    s->needed.counts = (uint8_t *)carve(base, &used, n_blocks * TILE_ROWS);
    if (mode->tile == tsffn_topk_tile) {
        s->h = (float *)carve(base, &used, TILE_ROWS * (size_t)layer->n_ff * sizeof(*s->h));
    }
    lay_out_own_memory(s, base, &used);
    s->barrier = (struct tsffn_barrier *)carve(base, &used, sizeof(*s->barrier));
    struct dense_products * products = &s->products;
    if (products->gemm != NULL) {
        const size_t n_split = (size_t)(s->call->n_tokens * 2 * layer->n_embd);
        products->split = (uint16_t *)carve(base, &used, n_split * sizeof(*products->split));
        products->group_bytes = products->gemm->packed_bytes(layer->n_embd, TSFFN_GEMM_GROUP);
        products->packed = carve(base, &used, MAX_GROUPS * products->group_bytes);
    }
    return used;
}

// `s` as thread `ith` sees it: with its own copies, if there are any.
static struct shared with_copies_of(const struct shared * s, int ith) {
    struct shared mine = *s;
    struct activations * const copied[] = {&mine.x.gate, &mine.x.up, &mine.x.predictor, &mine.hidden.converted};
    for (size_t k = 0; k < sizeof(copied) / sizeof(copied[0]); ++k) {
        copied[k]->at = copied[k]->at != NULL ? copied[k]->at + (size_t)ith * s->copy_bytes : NULL;
    }
    return mine;
}

// ---- activations

// Token t's p = x * scale, in the format of the first matrix's dot.
static void convert_for_predictor(const struct shared * s, int64_t t, float * scaled) {
    const struct tsffn_cpu_layer * layer = s->layer;
    if (!s->predicts) {
        return;
    }
    const float * p = token_x(s, t);
    if (layer->pred_scale != NULL) {
        for (int64_t j = 0; j < layer->n_embd; ++j) {
            scaled[j] = p[j] * layer->pred_scale[j];
        }
        p = scaled;
    }
    const struct tsffn_row_type * type = tsffn_first_matrix(&layer->ffns[0])->type;
    if (type->convert_x_bits != NULL) {
        type->convert_x_bits(p, activations_of(s->x.predictor, t), layer->n_embd, layer->input_bits);
    } else {
        tsffn_convert_x(type, layer->n_embd, p, activations_of(s->x.predictor, t));
    }
}

void tsffn_convert_for_neurons(const struct shared * s, int64_t t) {
    const struct tsffn_cpu_layer * layer = s->layer;
    const float * x = token_x(s, t);
    if (s->x.gate.at != NULL) {
        tsffn_convert_x(layer->types[TSFFN_PART_GATE], layer->n_embd, x, activations_of(s->x.gate, t));
    }
    if (s->x.up.at != NULL && s->x.up.at != s->x.gate.at) {
        tsffn_convert_x(layer->types[TSFFN_PART_UP], layer->n_embd, x, activations_of(s->x.up, t));
    }
    if (s->products.gemm != NULL) {
        s->products.gemm->split(layer->n_embd, x, s->products.split + t * 2 * layer->n_embd);
    }
}

// The thread's share of all tokens' activations, in two parts each, so that a single one keeps two threads busy.
static void convert_inputs(const struct shared * s, int ith, int nth) {
    int64_t begin, end;
    share(2 * s->call->n_tokens, ith, nth, &begin, &end);
    for (int64_t part = begin; part < end; ++part) {
        if (part % 2 == 0) {
            convert_for_predictor(s, part / 2, s->own[ith].scratch);
        } else {
            tsffn_convert_for_neurons(s, part / 2);
        }
    }
}

// ---- a call

void tsffn_each_segment(const struct shared * s, const struct tile * tile,
                        void (*phase)(const struct segment * segment)) {
    const struct dense_products * products = &s->products;
    int64_t group = 0;
    int index = 0;
    for (int64_t r0 = 0, r1; r0 < tile->n_rows; r0 = r1, ++index) {
        r1 = segment_end(tile->rows, r0, tile->n_rows);
        const bool packed = products->gemm != NULL && groups_of(r1 - r0) > 0;
        const struct segment segment = {
            .s = s,
            .rows = tile->rows,
            .ffn = &s->layer->ffns[tile->rows[r0].ffn],
            .r0 = r0,
            .r1 = r1,
            .own = &s->own[tile->ith],
            .packed = packed ? products->packed + (size_t)group * products->group_bytes : NULL,
            .index = index,
            .ith = tile->ith,
            .nth = tile->nth,
        };
        group += groups_of(r1 - r0);
        phase(&segment);
    }
}

// What thread `ith` of `nth` does of a call.
static void compute_thread(const struct shared * s, const struct mode * mode, int ith, int nth) {
    const struct tsffn_call * call = s->call;
    if (s->predicts) {
        tsffn_ask_predictor(s, &s->layer->ffns[call->rows[0].ffn], ith, nth);
    }
    if (s->copy_bytes != 0) { // for the neurons while other threads list theirs
        for (int64_t t = 0; t < call->n_tokens; ++t) {
            convert_for_predictor(s, t, s->own[ith].scratch);
        }
    } else {
        convert_inputs(s, ith, nth);
        tsffn_barrier_wait(s->barrier, nth);
    }
    for (int64_t row = 0; row < call->n_rows; row += TILE_ROWS) {
        if (row > 0) {
            tsffn_barrier_wait(s->barrier, nth); // all have read the sums of the tile before
        }
        const struct tile tile = {
            .rows = call->rows + row,
            .n_rows = min_i64(TILE_ROWS, call->n_rows - row),
            .ith = ith,
            .nth = nth,
        };
        mode->tile(s, &tile);
    }
}

// Counters are summed over threads; times are those of the busiest thread, which is what the caller waited for.
static void add_counts(struct tsffn_counts * total, const struct shared * s) {
    struct tsffn_counts sum = *total;
    uint64_t ns_predictor = 0, ns_ffn = 0;
    for (int thread = 0; thread < s->call->n_threads; ++thread) {
        const struct tsffn_counts * c = &s->own[thread].counts;
        tsffn_add_counts(&sum, c);
        if (c->ns_predictor + c->ns_ffn > ns_predictor + ns_ffn) {
            ns_predictor = c->ns_predictor;
            ns_ffn = c->ns_ffn;
        }
    }
    sum.ns_predictor = total->ns_predictor + ns_predictor;
    sum.ns_ffn = total->ns_ffn + ns_ffn;
    *total = sum;
}

bool tsffn_compute(struct tsffn_workspace * ws, const struct tsffn_cpu_layer * layer, const struct tsffn_call * call,
                   struct tsffn_counts * counts) {
    if (call->n_rows == 0) {
        return true;
    }
    const struct mode * mode = mode_of(call);
    struct shared s = {
        .call = call,
        .layer = layer,
        .predicts = mode->predictor && layer->ffns[0].fc2.data != NULL && call->masks == NULL,
        .stream_ahead = tsffn_stream_ahead(),
    };
    s.selects = s.predicts || call->masks != NULL || call->elsewhere != NULL;
    s.next = s.predicts && mode->tile == tsffn_sparse_tile ? next_of(call, layer) : NULL;
    s.hidden.max_rank = max_i64(max_rank(layer), s.next != NULL ? max_rank(s.next) : 0);
    if (call->profile != NULL && layer->types[TSFFN_PART_UP]->gemm != NULL && layer->n_embd % TSFFN_GEMM_K == 0) {
        s.products.gemm = layer->types[TSFFN_PART_GATE]->gemm;
    }
    if (!reserve(ws, lay_out(&s, mode, NULL))) {
        return false;
    }
    lay_out(&s, mode, ws->memory);
    for (int64_t r = 0; call->profile != NULL && r < call->n_rows; ++r) {
        call->profile->tokens[call->rows[r].ffn] += 1;
    }

    tsffn_barrier_init(s.barrier);

// Always the caller's thread count, however small the layer: libgomp ends the threads that a smaller team leaves out,
// and ggml-cpu, which shares the pool, would start them again for its next operation. The runtime may grant fewer.
#pragma omp parallel num_threads(call->n_threads)
    {
        const int ith = omp_get_thread_num();
        const struct shared mine = with_copies_of(&s, ith);
        compute_thread(&mine, mode, ith, omp_get_num_threads());
    }
    add_counts(counts, &s);
    for (int thread = 0; call->profile != NULL && thread < call->n_threads; ++thread) {
        tsffn_profile_add(call->profile, s.own[thread].histograms);
    }
    return true;
}
