// One parallel region per call. Per tile of at most 64 rows, four phases with a barrier between them:
//
//   A  hidden   h1[r] = relu(fc1 . p_r)                            threads share the rows of fc1
//   B  logits   fc2 . h1 -> the neurons that are on                threads share the rows of fc2
//   C  neurons  gate, up, down of those                            threads share them (without a predictor they take
//                                                                  chunks in turn) and add into their own acc
//   D  reduce   y[r] = sum over threads of acc[thread][r]          threads share rows and columns
//
// Weight rows are outer and activations inner, so a weight row is read from memory once per tile. Whose sums a neuron
// goes into depends on the row's own mask and the thread count only: its result does not depend on the rest of its
// batch.
#include "call.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>

enum {
    COLUMN_BLOCK = 256, // columns per unit of work in phase D: whole cache lines, no false sharing
    // Up to so many rows every thread converts the activations for itself: shared, their lines go from core to core,
    // and two more barriers are waited for (docs/notes/2026-11-28-threads.md).
    COPIED_ROWS = 4,
};

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

static int64_t max_i64(int64_t a, int64_t b) {
    return a > b ? a : b;
}

// The part of [0, n) that thread `ith` of `nth` takes.
static void share(int64_t n, int ith, int nth, int64_t * begin, int64_t * end) {
    *begin = n * ith / nth;
    *end = n * (ith + 1) / nth;
}

static const float * token_x(const struct shared * s, int64_t t) {
    return (const float *)(s->call->x + (size_t)t * s->call->x_stride);
}

static float * scratch_of(const struct shared * s, int ith) {
    return s->scratch + (int64_t)ith * max_i64(s->n_embd, s->max_rank);
}

// Token t's p = x * scale, in the format of fc1's dot.
static void convert_for_predictor(const struct shared * s, int64_t t, float * scaled) {
    const struct tsffn_ffn * ffn = &s->ffns[0];
    if (s->x_pred == NULL) {
        return;
    }
    const float * p = token_x(s, t);
    if (ffn->pred_scale != NULL) {
        for (int64_t j = 0; j < s->n_embd; ++j) {
            scaled[j] = p[j] * ffn->pred_scale[j];
        }
        p = scaled;
    }
    tsffn_matrix_convert_x(&ffn->fc1, p, s->x_pred + (size_t)t * s->x_pred_bytes);
}

// Token t's x, for gate and up.
static void convert_for_neurons(const struct shared * s, int64_t t) {
    const struct tsffn_ffn * ffn = &s->ffns[0];
    const float * x = token_x(s, t);
    if (s->x_gate != NULL) {
        tsffn_matrix_convert_x(&ffn->gate, x, s->x_gate + (size_t)t * s->x_gate_bytes);
    }
    if (s->x_up != NULL && s->x_up != s->x_gate) {
        tsffn_matrix_convert_x(&ffn->up, x, s->x_up + (size_t)t * s->x_up_bytes);
    }
    if (s->gemm != NULL) {
        s->gemm->split(s->n_embd, x, s->x_split + t * 2 * s->n_embd);
    }
}

// The thread's share of all tokens' activations, in two parts each, so that a single one keeps two threads busy.
static void convert_inputs(const struct shared * s, int ith, int nth) {
    int64_t begin, end;
    share(2 * s->call->n_tokens, ith, nth, &begin, &end);
    for (int64_t part = begin; part < end; ++part) {
        if (part % 2 == 0) {
            convert_for_predictor(s, part / 2, scratch_of(s, ith));
        } else {
            convert_for_neurons(s, part / 2);
        }
    }
}

static void convert_hidden(const struct shared * s, int64_t tile, int64_t begin, int64_t end) {
    const struct tsffn_row * rows = s->call->rows + tile;
    for (int64_t r = begin; r < end; ++r) {
        const struct tsffn_matrix * fc2 = &s->ffns[rows[r].ffn].fc2;
        tsffn_matrix_convert_x(fc2, s->h1 + r * s->max_rank, s->h1_converted + (size_t)r * s->h1_bytes);
    }
}

// Phase D: the accumulators of all threads, summed in thread order.
static void reduce(const struct shared * s, int64_t tile, int64_t n_rows, int ith, int nth) {
    const int64_t n_blocks = (s->n_embd + COLUMN_BLOCK - 1) / COLUMN_BLOCK;
    int64_t begin, end;
    share(n_rows * n_blocks, ith, nth, &begin, &end);
    for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t r = unit / n_blocks;
        const int64_t c0 = unit % n_blocks * COLUMN_BLOCK;
        const int64_t c1 = min_i64(c0 + COLUMN_BLOCK, s->n_embd);
        float * y = s->call->rows[tile + r].y;
        memcpy(y + c0, s->acc + r * s->n_embd + c0, (size_t)(c1 - c0) * sizeof(float));
        for (int thread = 1; thread < nth; ++thread) {
            const float * acc = s->acc + ((int64_t)thread * TILE_ROWS + r) * s->n_embd;
            for (int64_t c = c0; c < c1; ++c) {
                y[c] += acc[c];
            }
        }
    }
}

// The end of the rows that share the FFN of row r0, within [r0, n_rows).
static int64_t segment_end(const struct tsffn_row * rows, int64_t r0, int64_t n_rows) {
    int64_t r1 = r0 + 1;
    while (r1 < n_rows && rows[r1].ffn == rows[r0].ffn) {
        ++r1;
    }
    return r1;
}

static int64_t groups_of(int64_t r0, int64_t r1) {
    return r1 - r0 < TSFFN_GEMM_MIN_X ? 0 : (r1 - r0 + TSFFN_GEMM_GROUP - 1) / TSFFN_GEMM_GROUP;
}

// The tile's activations for dense products, segment by segment.
static void pack_tile(const struct shared * s, int64_t tile, int64_t n_rows, int ith, int nth) {
    const struct tsffn_row * rows = s->call->rows + tile;
    int64_t done = 0;
    for (int64_t r0 = 0, r1; r0 < n_rows; r0 = r1) {
        r1 = segment_end(rows, r0, n_rows);
        const int64_t groups = groups_of(r0, r1);
        const uint16_t * x[TILE_ROWS];
        for (int64_t r = r0; r < r1; ++r) {
            x[r - r0] = s->x_split + (int64_t)rows[r].token * 2 * s->n_embd;
        }
        for (int64_t group = 0; group < groups; ++group) {
            if ((done + group) % nth == ith) {
                s->gemm->pack(s->n_embd, (int)(r1 - r0), x, (int)group, s->x_packed + (size_t)done * s->x_group_bytes);
            }
        }
        done += groups;
    }
}

// Calls `phase` for each segment of the tile.
static void each_segment(const struct shared * s, int64_t tile, int64_t n_rows, int ith, int nth,
                         struct tsffn_counts * counts, void (*phase)(const struct segment * segment)) {
    const struct tsffn_row * rows = s->call->rows + tile;
    int64_t group = 0;
    int index = 0;
    for (int64_t r0 = 0, r1; r0 < n_rows; r0 = r1, ++index) {
        r1 = segment_end(rows, r0, n_rows);
        const struct segment segment = {
            .s = s,
            .rows = rows,
            .ffn = &s->ffns[rows[r0].ffn],
            .r0 = r0,
            .r1 = r1,
            .acc = s->acc + (int64_t)ith * TILE_ROWS * s->n_embd,
            .scratch = scratch_of(s, ith),
            .step = &s->step[ith],
            .counts = counts,
            .histograms = s->histograms != NULL ? &s->histograms[ith] : NULL,
            .packed = s->gemm != NULL && groups_of(r0, r1) > 0 ? s->x_packed + (size_t)group * s->x_group_bytes : NULL,
            .index = index,
            .ith = ith,
            .nth = nth,
        };
        group += groups_of(r0, r1);
        phase(&segment);
    }
}

static void compute_tile(const struct shared * s, int64_t tile, int64_t n_rows, int ith, int nth,
                         struct tsffn_counts * counts) {
    const struct tsffn_row * rows = s->call->rows + tile;
    const bool writes_embd = s->call->op == TSFFN_OP_FUSED || s->call->op == TSFFN_OP_DOWN;
    const bool sparse = s->call->op == TSFFN_OP_FUSED && s->call->profile == NULL;
    const bool predicts = needs_predictor(s);
    const bool copies = s->copy_bytes != 0;
    const uint64_t t0 = now_ns();
    if (predicts) {
        for (int64_t r0 = 0, r1; r0 < n_rows; r0 = r1) {
            r1 = segment_end(rows, r0, n_rows);
            tsffn_hidden_layer(s, tile, r0, r1, ith, nth, counts);
        }
        tsffn_ask_logits(s, &s->ffns[rows[0].ffn], ith, nth);
        tsffn_barrier_wait(s->barrier, nth);
        if (copies) {
            convert_hidden(s, tile, 0, n_rows);
        } else {
            int64_t begin, end;
            share(n_rows, ith, nth, &begin, &end);
            convert_hidden(s, tile, begin, end);
            tsffn_barrier_wait(s->barrier, nth);
        }
    }
    uint64_t t1 = now_ns();
    counts->ns_predictor += t1 - t0;

    if (s->gemm != NULL) {
        pack_tile(s, tile, n_rows, ith, nth);
        tsffn_barrier_wait(s->barrier, nth);
    }
    if (writes_embd) {
        memset(s->acc + (int64_t)ith * TILE_ROWS * s->n_embd, 0, (size_t)(n_rows * s->n_embd) * sizeof(float));
    }
    if (sparse) {
        each_segment(s, tile, n_rows, ith, nth, counts, tsffn_list_neurons);
        for (int64_t t = 0; copies && t < s->call->n_tokens; ++t) {
            convert_for_neurons(s, t);
        }
        tsffn_barrier_wait(s->barrier, nth);
        const uint64_t listed = now_ns();
        counts->ns_predictor += predicts ? listed - t1 : 0;
        t1 = predicts ? listed : t1;
        each_segment(s, tile, n_rows, ith, nth, counts, tsffn_compute_neurons);
    } else {
        each_segment(s, tile, n_rows, ith, nth, counts, tsffn_compute_chunks);
    }
    tsffn_barrier_wait(s->barrier, nth);
    if (writes_embd) {
        reduce(s, tile, n_rows, ith, nth);
    }
    counts->ns_ffn += now_ns() - t1;
}

// Carves the next `size` bytes out of the workspace; with base NULL it only measures.
static char * carve(char * base, size_t * used, size_t size) {
    char * p = base != NULL ? base + *used : NULL;
    *used += (size + TSFFN_CACHE_LINE - 1) / TSFFN_CACHE_LINE * TSFFN_CACHE_LINE;
    return p;
}

// Fills the pointers of `s` from `base`, and returns the bytes that takes.
static size_t lay_out(struct shared * s, char * base) {
    const struct tsffn_call * call = s->call;
    const struct tsffn_ffn * ffn = &s->ffns[0];
    const size_t nth = (size_t)call->n_threads;
    const size_t n_tokens = (size_t)call->n_tokens;
    const int64_t tile_rows = min_i64(TILE_ROWS, call->n_rows);
    size_t used = 0;
    s->x_gate = s->x_up = s->x_pred = s->h1_converted = NULL;
    if (call->op == TSFFN_OP_FUSED || call->op == TSFFN_OP_GATE) {
        s->x_gate_bytes = tsffn_matrix_x_bytes(&ffn->gate);
        s->x_gate = carve(base, &used, n_tokens * s->x_gate_bytes);
    }
    if (call->op == TSFFN_OP_FUSED || call->op == TSFFN_OP_UP) {
        s->x_up_bytes = tsffn_matrix_x_bytes(&ffn->up);
        const bool shared_x = call->op == TSFFN_OP_FUSED && ffn->up.type->x_format == ffn->gate.type->x_format;
        s->x_up = shared_x ? s->x_gate : carve(base, &used, n_tokens * s->x_up_bytes);
    }
    if (needs_predictor(s)) {
        s->x_pred_bytes = tsffn_matrix_x_bytes(&ffn->fc1);
        s->x_pred = carve(base, &used, n_tokens * s->x_pred_bytes);
        s->h1_bytes = 0;
        for (int64_t e = 0; e < s->n_ffns; ++e) {
            const size_t bytes = tsffn_matrix_x_bytes(&s->ffns[e].fc2);
            s->h1_bytes = bytes > s->h1_bytes ? bytes : s->h1_bytes;
        }
        s->h1_converted = carve(base, &used, (size_t)tile_rows * s->h1_bytes);
    }
    const bool copies = call->op == TSFFN_OP_FUSED && call->profile == NULL && call->n_rows <= COPIED_ROWS;
    s->copy_bytes = copies ? used : 0; // all that was carved so far
    used += (nth - 1) * s->copy_bytes;
    if (needs_predictor(s)) {
        s->h1 = (float *)carve(base, &used, TILE_ROWS * (size_t)s->max_rank * sizeof(float));
    }
    const size_t n_segments = (size_t)min_i64(tile_rows, s->n_ffns);
    const size_t n_needed = n_segments * (size_t)s->n_ff;
    s->needed.neuron = (int32_t *)carve(base, &used, n_needed * sizeof(*s->needed.neuron));
    s->needed.rows = (uint64_t *)carve(base, &used, n_needed * sizeof(*s->needed.rows));
    s->needed.n = (int32_t *)carve(base, &used, n_segments * nth * sizeof(*s->needed.n));
    s->needed.counts = (uint8_t *)carve(base, &used, n_segments * (size_t)n_blocks_of(s->n_ff) * TILE_ROWS);
    s->acc = (float *)carve(base, &used, nth * TILE_ROWS * (size_t)s->n_embd * sizeof(float));
    s->scratch = (float *)carve(base, &used, nth * (size_t)max_i64(s->n_embd, s->max_rank) * sizeof(float));
    s->counts_stride = (sizeof(struct tsffn_counts) + TSFFN_CACHE_LINE - 1) / TSFFN_CACHE_LINE * TSFFN_CACHE_LINE;
    s->counts = (struct tsffn_counts *)carve(base, &used, nth * s->counts_stride);
    s->barrier = (struct tsffn_barrier *)carve(base, &used, sizeof(*s->barrier));
    s->step = (struct step_memory *)carve(base, &used, nth * sizeof(*s->step));
    if (call->profile != NULL) {
        s->histograms = (struct histograms *)carve(base, &used, nth * sizeof(*s->histograms));
    }
    if (s->gemm != NULL) {
        s->x_split = (uint16_t *)carve(base, &used, n_tokens * 2 * (size_t)s->n_embd * sizeof(*s->x_split));
        s->x_group_bytes = s->gemm->packed_bytes(s->n_embd, TSFFN_GEMM_GROUP);
        s->x_packed = carve(base, &used, MAX_GROUPS * s->x_group_bytes);
    }
    return used;
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

static struct tsffn_counts * counts_of_thread(const struct shared * s, int ith) {
    return (struct tsffn_counts *)((char *)s->counts + (size_t)ith * s->counts_stride);
}

// Counters are summed over threads; times are those of the busiest thread, which is what the caller waited for.
static void add_counts(struct tsffn_counts * total, const struct shared * s) {
    uint64_t ns_predictor = 0, ns_ffn = 0;
    for (int thread = 0; thread < s->call->n_threads; ++thread) {
        const struct tsffn_counts * c = counts_of_thread(s, thread);
        total->neurons += c->neurons;
        total->predicted += c->predicted;
        total->gate_positive += c->gate_positive;
        total->active += c->active;
        total->bytes_predictor += c->bytes_predictor;
        total->bytes_ffn += c->bytes_ffn;
        total->bytes_dense += c->bytes_dense;
        if (c->ns_predictor + c->ns_ffn > ns_predictor + ns_ffn) {
            ns_predictor = c->ns_predictor;
            ns_ffn = c->ns_ffn;
        }
    }
    total->ns_predictor += ns_predictor;
    total->ns_ffn += ns_ffn;
}

// `s` as thread `ith` sees it: with its own copies, if there are any.
static struct shared with_copies_of(const struct shared * s, int ith) {
    struct shared mine = *s;
    char ** const copied[] = {&mine.x_gate, &mine.x_up, &mine.x_pred, &mine.h1_converted};
    for (size_t k = 0; k < sizeof(copied) / sizeof(copied[0]); ++k) {
        *copied[k] = *copied[k] != NULL ? *copied[k] + (size_t)ith * s->copy_bytes : NULL;
    }
    return mine;
}

// What thread `ith` of `nth` does of a call.
static void compute_thread(const struct shared * s, int ith, int nth) {
    const struct tsffn_call * call = s->call;
    struct tsffn_counts * counts = counts_of_thread(s, ith);
    if (needs_predictor(s)) {
        tsffn_ask_hidden_layer(s, &s->ffns[call->rows[0].ffn], ith, nth);
    }
    if (s->copy_bytes != 0) {
        for (int64_t t = 0; t < call->n_tokens; ++t) {
            convert_for_predictor(s, t, scratch_of(s, ith));
        }
    } else {
        convert_inputs(s, ith, nth);
        tsffn_barrier_wait(s->barrier, nth);
    }
    for (int64_t tile = 0; tile < call->n_rows; tile += TILE_ROWS) {
        if (tile > 0) {
            tsffn_barrier_wait(s->barrier, nth); // all have read the sums of the tile before
        }
        compute_tile(s, tile, min_i64(TILE_ROWS, call->n_rows - tile), ith, nth, counts);
    }
}

bool tsffn_compute(struct tsffn_workspace * ws, const struct tsffn_ffn * ffns, int64_t n_ffns,
                   const struct tsffn_call * call, struct tsffn_counts * counts) {
    if (call->n_rows == 0) {
        return true;
    }
    struct shared s = {
        .call = call,
        .ffns = ffns,
        .n_ffns = n_ffns,
        .n_embd = ffns[0].n_embd,
        .n_ff = ffns[0].n_ff,
        .stream_ahead = tsffn_stream_ahead(),
    };
    for (int64_t e = 0; e < n_ffns; ++e) {
        s.max_rank = max_i64(s.max_rank, ffns[e].fc1.n_rows);
    }
    const struct tsffn_ffn * ffn = &ffns[0];
    if (call->profile != NULL && ffn->up.type->gemm != NULL && s.n_embd % TSFFN_GEMM_K == 0) {
        s.gemm = ffn->gate.type->gemm;
    }
    if (!reserve(ws, lay_out(&s, NULL))) {
        return false;
    }
    lay_out(&s, ws->memory);
    memset(s.counts, 0, (size_t)call->n_threads * s.counts_stride);
    if (call->profile != NULL) {
        memset(s.histograms, 0, (size_t)call->n_threads * sizeof(*s.histograms));
        for (int64_t r = 0; r < call->n_rows; ++r) {
            call->profile->tokens[call->rows[r].ffn] += 1;
        }
    }

    tsffn_barrier_init(s.barrier);

// Always the caller's thread count, however small the layer: libgomp ends the threads that a smaller team leaves out,
// and ggml-cpu, which shares the pool, would start them again for its next operation. The runtime may grant fewer.
#pragma omp parallel num_threads(call->n_threads)
    {
        const int ith = omp_get_thread_num();
        const struct shared mine = with_copies_of(&s, ith);
        compute_thread(&mine, ith, omp_get_num_threads());
    }
    add_counts(counts, &s);
    for (int thread = 0; call->profile != NULL && thread < call->n_threads; ++thread) {
        tsffn_profile_add(call->profile, &s.histograms[thread]);
    }
    return true;
}
