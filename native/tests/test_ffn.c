// The sparse FFN against doubles written from the formula  y = sum_i relu(gate_i x) relu(up_i x) m_i down_i :
// fused and operation by operation, dense and with experts, with predictor and exact, any batch, any number of threads.
#include "check.h"
#include "cpu/ffn.h"
#include "cpu/kernels/kernels.h"
#include "small_stack.h"

#include <math.h>
#include <string.h>

enum { N_EMBD = 96, N_FF = 200, N_EXPERT = 3, MAX_TOKENS = 140, MAX_USED = 2 };

static const int64_t ranks[N_EXPERT] = {32, 17, 40};

struct expert {
    float gate[N_FF * N_EMBD], up[N_FF * N_EMBD], down[N_FF * N_EMBD];
    float fc1[40 * N_EMBD], fc2[N_FF * 40];
    float rounded_gate[N_FF * N_EMBD], rounded_up[N_FF * N_EMBD], thresholds[2 * N_FF];
};

static struct expert experts[N_EXPERT];
static float pred_scale[N_EMBD];
static float x[MAX_TOKENS * N_EMBD];

// The host's functions of a format without kernels of our own: f32 rows, activations stored as doubles.
static void host_dot(int n, float * s, size_t bs, const void * row, size_t bx, const void * v, size_t by, int nrc) {
    (void)bs;
    (void)bx;
    (void)by;
    CHECK(nrc == 1, "one row at a time");
    const float * w = row;
    const double * converted = v;
    double sum = 0.0;
    for (int j = 0; j < n; ++j) {
        sum += (double)w[j] * converted[j];
    }
    *s = (float)sum;
}

static void host_convert(const float * v, void * converted, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
        ((double *)converted)[j] = (double)v[j];
    }
}

static void host_to_float(const void * row, float * w, int64_t n) {
    memcpy(w, row, (size_t)n * sizeof(float));
}

static struct tsffn_row_type own_type, host_type;

static void make_types(const struct tsffn_kernels * kernels) {
    own_type = (struct tsffn_row_type){
        .name = "own",
        .block_size = 1,
        .block_bytes = 4,
        .x_format = -1,
        .x_block_size = 1,
        .x_block_bytes = 4,
        .own_dots = kernels->dots[TSFFN_FORMAT_F32],
        .own_axpys = kernels->axpys[TSFFN_FORMAT_F32],
        .own_add_rows = kernels->add_rows[TSFFN_FORMAT_F32],
    };
    host_type = (struct tsffn_row_type){
        .name = "host",
        .block_size = 1,
        .block_bytes = 4,
        .x_format = 7,
        .x_block_size = 1,
        .x_block_bytes = 8,
        .host_dot = host_dot,
        .convert_x = host_convert,
        .host_to_float = host_to_float,
    };
}

static struct tsffn_matrix matrix(const struct tsffn_row_type * type, const float * data, int64_t rows, int64_t cols) {
    return (struct tsffn_matrix){.type = type, .data = (const uint8_t *)data, .n_rows = rows, .n_cols = cols};
}

static struct tsffn_ffn ffns[N_EXPERT];

// The predictors that `describe` makes.
static enum tsffn_predictor_form form;
static bool has_thresholds;

static void describe_predictor(const struct tsffn_row_type * gate_type, const struct tsffn_row_type * up_type, int e) {
    const struct expert * w = &experts[e];
    if (form == TSFFN_PREDICTOR_MLP || form == TSFFN_PREDICTOR_LINEAR) {
        ffns[e].fc1 = matrix(gate_type, w->fc1, ranks[e], N_EMBD);
        ffns[e].fc2 = matrix(up_type, w->fc2, N_FF, ranks[e]);
    } else {
        ffns[e].fc2 = matrix(gate_type, w->rounded_gate, N_FF, N_EMBD);
    }
    if (form == TSFFN_PREDICTOR_GATE_UP) {
        ffns[e].fc3 = matrix(gate_type, w->rounded_up, N_FF, N_EMBD);
    }
    ffns[e].thresholds = has_thresholds ? w->thresholds : NULL;
}

// Bytes of the first expert's.
static uint64_t predictor_bytes(void) {
    uint64_t bytes = 0;
    for (int k = 0; k < 3; ++k) {
        const struct tsffn_matrix * m = k == 0 ? &ffns[0].fc1 : k == 1 ? &ffns[0].fc2 : &ffns[0].fc3;
        bytes += m->data != NULL ? (uint64_t)(m->n_rows * m->n_cols) * sizeof(float) : 0;
    }
    const uint64_t of_thresholds = ffns[0].fc3.data != NULL ? 2 * N_FF : N_FF;
    return bytes + (ffns[0].thresholds != NULL ? of_thresholds * sizeof(float) : 0);
}

static struct tsffn_cpu_layer describe(const struct tsffn_row_type * gate_type, const struct tsffn_row_type * up_type,
                                       bool predictor, bool scaled) {
    for (int e = 0; e < N_EXPERT; ++e) {
        struct expert * w = &experts[e];
        const float * const parts[TSFFN_N_PARTS] = {w->gate, w->up, w->down};
        ffns[e] = (struct tsffn_ffn){0};
        for (int part = 0; part < TSFFN_N_PARTS; ++part) {
            ffns[e].neurons.rows[part] = tsffn_rows_at(parts[part], N_FF, N_EMBD * sizeof(float));
        }
        if (predictor) {
            describe_predictor(gate_type, up_type, e);
        }
    }
    return (struct tsffn_cpu_layer){
        .form = form,
        .n_embd = N_EMBD,
        .n_ff = N_FF,
        .n_ffns = N_EXPERT,
        .ffns = ffns,
        .types = {gate_type, up_type, up_type},
        .activation = tsffn_activation(TSFFN_ACTIVATION_DRELU, 0.0f),
        .pred_scale = predictor && scaled ? pred_scale : NULL,
    };
}

// The same rows in bundles, whose pieces lie apart.
static void bundle(void) {
    enum { PIECE_ROWS = N_EXPERT * N_FF, GAP = 7 };
    static float pieces[TSFFN_N_PARTS][PIECE_ROWS * N_EMBD + GAP];
    for (int e = 0; e < N_EXPERT; ++e) {
        for (int part = 0; part < TSFFN_N_PARTS; ++part) {
            struct tsffn_rows bundled = {
                .piece_rows = PIECE_ROWS,
                .first = TSFFN_N_PARTS * e * N_FF + part,
                .step = TSFFN_N_PARTS,
                .row_bytes = N_EMBD * sizeof(float),
            };
            for (int k = 0; k < TSFFN_N_PARTS; ++k) {
                bundled.pieces[k] = (const uint8_t *)pieces[(k + 1) % TSFFN_N_PARTS];
            }
            for (int i = 0; i < N_FF; ++i) {
                const int row = (int)bundled.first + TSFFN_N_PARTS * i;
                float * piece = pieces[(row / PIECE_ROWS + 1) % TSFFN_N_PARTS];
                memcpy(piece + row % PIECE_ROWS * N_EMBD, tsffn_rows_get(&ffns[e].neurons.rows[part], i),
                       N_EMBD * sizeof(float));
            }
            ffns[e].neurons.rows[part] = bundled;
        }
    }
}

static double dot_double(const float * w, const double * v, int64_t n) {
    double sum = 0.0;
    for (int64_t j = 0; j < n; ++j) {
        sum += (double)w[j] * v[j];
    }
    return sum;
}

// Reference of one row. h is [N_FF], y is [N_EMBD]; returns how many neurons are on, positive, active.
static void reference(const struct tsffn_cpu_layer * layer, const struct expert * w, int64_t rank, const float * row,
                      double * gate, double * up, double * y, uint64_t counts[3]) {
    double v[N_EMBD], p[N_EMBD], h1[40];
    for (int j = 0; j < N_EMBD; ++j) {
        v[j] = (double)row[j];
        p[j] = (double)row[j] * (layer->pred_scale != NULL ? (double)pred_scale[j] : 1.0);
        y[j] = 0.0;
    }
    const bool predictor = layer->ffns[0].fc2.data != NULL;
    const bool has_hidden = form == TSFFN_PREDICTOR_MLP || form == TSFFN_PREDICTOR_LINEAR;
    const double shift = has_thresholds ? 1.0 : 0.0;
    for (int64_t k = 0; predictor && k < rank; ++k) {
        const double sum = dot_double(w->fc1 + k * N_EMBD, p, N_EMBD);
        h1[k] = form == TSFFN_PREDICTOR_LINEAR ? sum : fmax(0.0, sum);
    }
    for (int64_t i = 0; i < N_FF; ++i) {
        double logit =
            has_hidden ? dot_double(w->fc2 + i * rank, h1, rank) : dot_double(w->rounded_gate + i * N_EMBD, p, N_EMBD);
        logit -= shift * (double)w->thresholds[i];
        if (form == TSFFN_PREDICTOR_GATE_UP) {
            const double of_up = dot_double(w->rounded_up + i * N_EMBD, p, N_EMBD);
            logit = fmin(logit, of_up - shift * (double)w->thresholds[N_FF + i]);
        }
        const bool on = !predictor || logit > (double)layer->threshold;
        gate[i] = on ? dot_double(w->gate + i * N_EMBD, v, N_EMBD) : 0.0;
        up[i] = dot_double(w->up + i * N_EMBD, v, N_EMBD);
        counts[0] += on;
        counts[1] += gate[i] > 0.0;
        if (gate[i] > 0.0 && up[i] > 0.0) {
            counts[2] += 1;
            for (int j = 0; j < N_EMBD; ++j) {
                y[j] += gate[i] * up[i] * (double)w->down[i * N_EMBD + j];
            }
        }
    }
}

// The rows of tokens that all go through one FFN, or each through two experts. Returns how many.
static int64_t route(bool moe, int64_t n_tokens, struct tsffn_row * rows) {
    int64_t n_rows = 0;
    for (int e = 0; e < (moe ? N_EXPERT : 1); ++e) {
        for (int64_t t = 0; t < n_tokens; ++t) {
            if (!moe || t % N_EXPERT == e || (t + 1) % N_EXPERT == e) {
                rows[n_rows++] = (struct tsffn_row){.ffn = e, .token = (int32_t)t};
            }
        }
    }
    return n_rows;
}

// All four operations for `n_tokens` tokens of `n_used` experts each, on `n_threads` threads.
static void test_call(struct tsffn_workspace * ws, const struct tsffn_cpu_layer * layer, bool moe, int64_t n_tokens,
                      int n_threads) {
    static struct tsffn_row rows[MAX_TOKENS * MAX_USED];
    static float fused[MAX_TOKENS * MAX_USED * N_EMBD], y[MAX_TOKENS * MAX_USED * N_EMBD];
    static float gate[MAX_TOKENS * MAX_USED * N_FF], up[MAX_TOKENS * MAX_USED * N_FF], h[MAX_TOKENS * MAX_USED * N_FF];
    static float fused_h[MAX_TOKENS * MAX_USED * N_FF];
    static double want_gate[N_FF], want_up[N_FF], want_y[N_EMBD];
    const int64_t n_rows = route(moe, n_tokens, rows);
    struct tsffn_call call = {
        .op = TSFFN_OP_FUSED,
        .rows = rows,
        .n_rows = n_rows,
        .x = (const char *)x,
        .x_stride = N_EMBD * sizeof(float),
        .n_tokens = n_tokens,
        .n_threads = n_threads,
    };
    // The output overlaps nothing here; that x may be overwritten is shown by test_overlap.
    struct tsffn_counts counts = {0}, single = {0};
    for (int64_t r = 0; r < n_rows; ++r) {
        rows[r].y = fused + r * N_EMBD;
        rows[r].h = fused_h + r * N_FF;
    }
    CHECK(tsffn_compute(ws, layer, &call, &counts), "out of memory");

    call.op = TSFFN_OP_GATE;
    for (int64_t r = 0; r < n_rows; ++r) {
        rows[r].y = gate + r * N_FF;
    }
    CHECK(tsffn_compute(ws, layer, &call, &single), "out of memory");
    call.op = TSFFN_OP_UP;
    for (int64_t r = 0; r < n_rows; ++r) {
        rows[r].y = up + r * N_FF;
    }
    CHECK(tsffn_compute(ws, layer, &call, &single), "out of memory");
    for (int64_t i = 0; i < n_rows * N_FF; ++i) {
        h[i] = fmaxf(gate[i], 0.0f) * fmaxf(up[i], 0.0f);
        CHECK(h[i] == fused_h[i], "hidden %d: %g instead of %g", (int)i, (double)fused_h[i], (double)h[i]);
    }
    call.op = TSFFN_OP_DOWN;
    call.x = (const char *)h;
    call.x_stride = N_FF * sizeof(float);
    call.n_tokens = n_rows;
    uint64_t want_counts[3] = {0};
    for (int64_t r = 0; r < n_rows; ++r) {
        const struct expert * w = &experts[rows[r].ffn];
        reference(layer, w, ranks[rows[r].ffn], x + (int64_t)rows[r].token * N_EMBD, want_gate, want_up, want_y,
                  want_counts);
        CHECK(nmse(fused + r * N_EMBD, want_y, N_EMBD) < 1e-10, "fused row %d", (int)r);
        CHECK(nmse(gate + r * N_FF, want_gate, N_FF) < 1e-10, "gate row %d", (int)r);
        CHECK(nmse(up + r * N_FF, want_up, N_FF) < 1e-10, "up row %d", (int)r);
        rows[r].token = (int32_t)r;
        rows[r].y = y + r * N_EMBD;
    }
    CHECK(tsffn_compute(ws, layer, &call, &single), "out of memory");
    for (int64_t j = 0; j < n_rows * N_EMBD; ++j) {
        CHECK(fabsf(y[j] - fused[j]) <= 1e-4f * (1.0f + fabsf(fused[j])), "operation by operation differs at %d",
              (int)j);
    }
    CHECK(counts.neurons == (uint64_t)(n_rows * N_FF), "neurons");
    CHECK(counts.predicted == want_counts[0] && counts.gate_positive == want_counts[1] &&
              counts.active == want_counts[2],
          "counted %d %d %d instead of %d %d %d", (int)counts.predicted, (int)counts.gate_positive, (int)counts.active,
          (int)want_counts[0], (int)want_counts[1], (int)want_counts[2]);
    if (n_tokens == 1 && !moe) {
        const uint64_t row_bytes = N_EMBD * sizeof(float);
        CHECK(counts.bytes_ffn == row_bytes * (want_counts[0] + want_counts[1] + want_counts[2]), "bytes of the FFN");
        CHECK(counts.bytes_dense == 3 * row_bytes * N_FF, "bytes of a dense FFN");
        CHECK(counts.bytes_predictor == predictor_bytes(), "bytes of the predictor");
    }
}

// Outputs written over the inputs, and a batch giving bit for bit what single tokens give.
static void test_overlap(struct tsffn_workspace * ws, const struct tsffn_cpu_layer * layer) {
    static float batch[MAX_TOKENS * N_EMBD], one[N_EMBD];
    static struct tsffn_row rows[MAX_TOKENS];
    struct tsffn_counts counts = {0};
    memcpy(batch, x, sizeof(batch));
    for (int t = 0; t < MAX_TOKENS; ++t) {
        rows[t] = (struct tsffn_row){.token = t, .y = batch + (MAX_TOKENS - 1 - t) * N_EMBD};
    }
    struct tsffn_call call = {
        .op = TSFFN_OP_FUSED,
        .rows = rows,
        .n_rows = MAX_TOKENS,
        .x = (const char *)batch,
        .x_stride = N_EMBD * sizeof(float),
        .n_tokens = MAX_TOKENS,
        .n_threads = 2,
    };
    CHECK(tsffn_compute(ws, layer, &call, &counts), "out of memory");
    for (int t = 0; t < MAX_TOKENS; ++t) {
        struct tsffn_row row = {.y = one};
        call.rows = &row;
        call.n_rows = 1;
        call.x = (const char *)(x + t * N_EMBD);
        call.n_tokens = 1;
        CHECK(tsffn_compute(ws, layer, &call, &counts), "out of memory");
        CHECK(memcmp(one, batch + (MAX_TOKENS - 1 - t) * N_EMBD, sizeof(one)) == 0, "token %d depends on its batch", t);
    }
}

// The sum of y of two calls that share their neurons, into y [n_rows][N_EMBD]; counts of both.
static void add_parts(struct tsffn_workspace * ws, const struct tsffn_cpu_layer * layer, struct tsffn_call call,
                      struct tsffn_row * rows, float * y, float * h, struct tsffn_counts * counts) {
    static const struct tsffn_range front[N_EXPERT] = {{0, 64}, {0, 0}, {0, N_FF}};
    static const struct tsffn_range rest[N_EXPERT] = {{64, N_FF}, {0, N_FF}, {0, 0}};
    static float part[MAX_TOKENS * MAX_USED * N_EMBD], part_h[MAX_TOKENS * MAX_USED * N_FF];
    memset(y, 0, (size_t)call.n_rows * N_EMBD * sizeof(*y));
    memset(h, 0, (size_t)call.n_rows * N_FF * sizeof(*h));
    for (int k = 0; k < 2; ++k) {
        call.elsewhere = k == 0 ? front : rest;
        for (int64_t r = 0; r < call.n_rows; ++r) {
            rows[r].y = part + r * N_EMBD;
            rows[r].h = part_h + r * N_FF;
        }
        CHECK(tsffn_compute(ws, layer, &call, counts), "out of memory");
        for (int64_t j = 0; j < call.n_rows * N_EMBD; ++j) {
            y[j] += part[j];
        }
        for (int64_t r = 0; r < call.n_rows; ++r) {
            const struct tsffn_range others = call.elsewhere[rows[r].ffn];
            for (int64_t i = 0; i < N_FF; ++i) {
                CHECK(i < others.first || i >= others.end || part_h[r * N_FF + i] == 0.0f, "h of another's neuron");
                h[r * N_FF + i] += part_h[r * N_FF + i];
            }
        }
    }
}

// A call in two parts is the whole call, with the predictor or with the masks that it gives; and with these, bit for
// bit what it is with the predictor.
static void test_sharing(struct tsffn_workspace * ws, const struct tsffn_cpu_layer * layer, bool moe, int64_t n_tokens,
                         int n_threads) {
    enum { WORDS = (N_FF + 31) / 32 };
    static struct tsffn_row rows[MAX_TOKENS * MAX_USED];
    static float whole[MAX_TOKENS * MAX_USED * N_EMBD], y[MAX_TOKENS * MAX_USED * N_EMBD];
    static float whole_h[MAX_TOKENS * MAX_USED * N_FF], h[MAX_TOKENS * MAX_USED * N_FF];
    static uint32_t masks[MAX_TOKENS * MAX_USED * WORDS];
    const int64_t n_rows = route(moe, n_tokens, rows);
    for (int64_t r = 0; r < n_rows; ++r) {
        rows[r].y = whole + r * N_EMBD;
        rows[r].h = whole_h + r * N_FF;
    }
    struct tsffn_call call = {
        .op = TSFFN_OP_FUSED,
        .rows = rows,
        .n_rows = n_rows,
        .x = (const char *)x,
        .x_stride = N_EMBD * sizeof(float),
        .n_tokens = n_tokens,
        .n_threads = n_threads,
    };
    struct tsffn_counts of_whole = {0}, of_parts = {0}, of_masks = {0}, of_masked = {0};
    CHECK(tsffn_compute(ws, layer, &call, &of_whole), "out of memory");

    call.op = TSFFN_OP_MASK;
    call.predicted = masks;
    memset(masks, 0xff, sizeof(masks));
    CHECK(tsffn_compute(ws, layer, &call, &of_masks), "out of memory");
    for (int64_t i = 0; i < n_rows * N_FF; ++i) {
        const bool on = (masks[i / N_FF * WORDS + i % N_FF / 32] >> i % N_FF % 32 & 1) != 0;
        CHECK(on || whole_h[i] == 0.0f, "neuron %d is not off", (int)i);
    }
    call.op = TSFFN_OP_FUSED;

    for (int given = 0; given < 2; ++given) {
        of_parts = (struct tsffn_counts){0};
        call.masks = given != 0 ? masks : NULL;
        add_parts(ws, layer, call, rows, y, h, &of_parts);
        for (int64_t j = 0; j < n_rows * N_EMBD; ++j) {
            CHECK(fabsf(y[j] - whole[j]) <= 1e-4f * (1.0f + fabsf(whole[j])), "parts differ at %d", (int)j);
        }
        CHECK(memcmp(h, whole_h, (size_t)(n_rows * N_FF) * sizeof(*h)) == 0, "h of the parts");
        CHECK(of_parts.neurons == of_whole.neurons && of_parts.predicted == of_whole.predicted &&
                  of_parts.gate_positive == of_whole.gate_positive && of_parts.active == of_whole.active &&
                  of_parts.bytes_dense == of_whole.bytes_dense,
              "counts of the parts");
        // Rows whose shares end elsewhere make several threads read a neuron.
        CHECK(n_threads > 1 || of_parts.bytes_ffn == of_whole.bytes_ffn, "bytes of the parts");
    }

    call.masks = masks;
    for (int64_t r = 0; r < n_rows; ++r) {
        rows[r].y = y + r * N_EMBD;
        rows[r].h = h + r * N_FF;
    }
    CHECK(tsffn_compute(ws, layer, &call, &of_masked), "out of memory");
    if (layer->ffns[0].fc2.data != NULL) { // else threads share the neurons in another way
        CHECK(memcmp(y, whole, (size_t)(n_rows * N_EMBD) * sizeof(*y)) == 0, "y with masks");
    }
    CHECK(of_masked.bytes_predictor == 0 && of_masked.predicted == of_whole.predicted, "counts with masks");
    CHECK(of_masks.bytes_predictor == of_whole.bytes_predictor && of_masks.bytes_ffn == 0, "bytes of the masks");
}

// logit >= threshold and logit > threshold differ where the logit is exactly the threshold: with p = 0 all logits are
// 0.
static void test_comparison(struct tsffn_workspace * ws, struct tsffn_cpu_layer layer) {
    static float zero[N_EMBD], y[N_EMBD];
    struct tsffn_row row = {.y = y};
    const struct tsffn_call call = {
        .op = TSFFN_OP_FUSED,
        .rows = &row,
        .n_rows = 1,
        .x = (const char *)zero,
        .x_stride = sizeof(zero),
        .n_tokens = 1,
        .n_threads = 1,
    };
    for (int equal = 0; equal < 2; ++equal) {
        struct tsffn_counts counts = {0};
        layer.on_when_equal = equal != 0;
        CHECK(tsffn_compute(ws, &layer, &call, &counts), "out of memory");
        CHECK(counts.predicted == (equal != 0 ? N_FF : 0), "predicted %d", (int)counts.predicted);
    }
}

// Everything a thread keeps while it computes is in the workspace. More than one thread: tests/native says how large
// the stacks of the others are.
static void * test_small_stack(void * argument) {
    const struct tsffn_cpu_layer * layer = argument;
    struct tsffn_workspace * ws = tsffn_workspace_new();
    CHECK(ws != NULL, "out of memory");
    for (int n_threads = 1; n_threads <= 3; n_threads += 2) {
        test_call(ws, layer, false, 1, n_threads);
        test_call(ws, layer, true, MAX_TOKENS, n_threads);
    }
    tsffn_workspace_free(ws);
    return NULL;
}

int main(void) {
    float * all = (float *)experts;
    for (size_t i = 0; i < sizeof(experts) / (sizeof(float)); ++i) {
        all[i] = random_float();
    }
    for (int i = 0; i < MAX_TOKENS * N_EMBD; ++i) {
        x[i] = random_float();
    }
    for (int j = 0; j < N_EMBD; ++j) {
        pred_scale[j] = 0.5f + fabsf(random_float());
    }
    static const int64_t batches[] = {1, 2, 7, 64, 65, MAX_TOKENS};
    struct tsffn_workspace * ws = tsffn_workspace_new();
    CHECK(ws != NULL, "out of memory");
    struct tsffn_cpu_layer layer;
    for (int isa = 0; isa < TSFFN_ISA_COUNT; ++isa) {
        const struct tsffn_kernels * kernels = tsffn_kernels_for((enum tsffn_isa)isa);
        if (kernels == NULL) {
            continue;
        }
        make_types(kernels);
        for (int variant = 0; variant < 16; ++variant) {
            const struct tsffn_row_type * gate_type = (variant & 1) != 0 ? &host_type : &own_type;
            const struct tsffn_row_type * up_type = (variant & 2) != 0 ? &host_type : &own_type;
            layer = describe(gate_type, up_type, (variant & 4) != 0, (variant & 8) != 0);
            for (size_t b = 0; b < sizeof(batches) / sizeof(batches[0]); ++b) {
                for (int n_threads = 1; n_threads <= 3; ++n_threads) {
                    test_call(ws, &layer, false, batches[b], n_threads);
                    test_call(ws, &layer, true, batches[b], n_threads);
                }
                test_sharing(ws, &layer, b % 2 == 0, batches[b], 1 + variant % 3);
            }
            test_overlap(ws, &layer);
        }
        test_comparison(ws, layer);
        for (int variant = 0; variant < 2 * TSFFN_N_PREDICTOR_FORMS; ++variant) {
            form = (enum tsffn_predictor_form)(variant / 2);
            has_thresholds = variant % 2 != 0;
            layer = describe(variant % 3 == 0 ? &host_type : &own_type, &own_type, true, !has_thresholds);
            for (size_t b = 0; b < sizeof(batches) / sizeof(batches[0]); ++b) {
                test_call(ws, &layer, b % 2 != 0, batches[b], 1 + (int)b % 3);
            }
            test_sharing(ws, &layer, true, 65, 2);
            test_overlap(ws, &layer);
        }
        form = TSFFN_PREDICTOR_MLP;
        has_thresholds = false;
        layer = describe(&own_type, &host_type, true, true);
        on_small_stack(test_small_stack, &layer);
        for (int variant = 0; variant < 16; variant += 5) {
            layer = describe((variant & 1) != 0 ? &host_type : &own_type, &own_type, (variant & 4) != 0,
                             (variant & 8) != 0);
            bundle();
            for (int n_threads = 1; n_threads <= 3; ++n_threads) {
                test_call(ws, &layer, false, 1, n_threads);
                test_call(ws, &layer, true, 7, n_threads);
                test_call(ws, &layer, true, 65, n_threads);
            }
        }
        printf("%s: ok\n", kernels->name);
    }
    tsffn_workspace_free(ws);
    return 0;
}
