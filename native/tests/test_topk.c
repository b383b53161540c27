// Top-k sparsity against doubles written from equations 3 and 4 of arXiv:2406.05955: which neurons stay, and what they
// add up to; every activation, dense and with experts, any batch, any number of threads, on every ISA tier.
#include "check.h"
#include "cpu/ffn.h"
#include "cpu/kernels/kernels.h"
#include "ffn/topk.h"
#include "small_stack.h"

#include <math.h>
#include <string.h>

enum { N_EMBD = 96, N_FF = 300, N_EXPERT = 3, MAX_TOKENS = 70, MAX_ROWS = 2 * MAX_TOKENS };

static float weights[N_EXPERT][TSFFN_N_PARTS][N_FF * N_EMBD];
static float x[MAX_TOKENS * N_EMBD];
static struct tsffn_ffn ffns[N_EXPERT];
static struct tsffn_row_type f32;

// ---- choosing

// Plainly: a value stays when fewer than `keep` go before it.
static void keep_plainly(const double * h, bool * stays, int64_t n, int64_t keep) {
    for (int64_t i = 0; i < n; ++i) {
        int64_t before = 0;
        for (int64_t j = 0; j < n; ++j) {
            before += fabs(h[j]) > fabs(h[i]) || (fabs(h[j]) == fabs(h[i]) && j < i);
        }
        stays[i] = before < keep;
    }
}

// Few different values, so that many are equal; numbers of every size, both signs, zeros, denormals, infinities.
static void test_choice(int64_t n, int kind) {
    static float h[N_FF], found[N_FF];
    static double wide[N_FF];
    static bool stays[N_FF];
    for (int64_t i = 0; i < n; ++i) {
        const float v = random_float();
        h[i] = kind == 0 ? v : kind == 1 ? floorf(4.0f * v) : ldexpf(v, (int)(random_bits() % 290) - 160);
        wide[i] = (double)h[i];
    }
    for (int64_t keep = 1; keep <= n; keep += n > 20 ? 7 : 1) {
        keep_plainly(wide, stays, n, keep);
        memcpy(found, h, sizeof(found));
        tsffn_keep_largest(found, n, keep);
        for (int64_t i = 0; i < n; ++i) {
            CHECK(found[i] == (stays[i] ? h[i] : 0.0f), "%d of %d, kind %d: value %d", (int)keep, (int)n, kind, (int)i);
        }
    }
}

static void test_choices(void) {
    for (int64_t n = 1; n <= N_FF; n = 2 * n + 1) {
        for (int kind = 0; kind < 3; ++kind) {
            test_choice(n, kind);
        }
    }
    float odd[] = {1.0f, NAN, -INFINITY, 2.0f, INFINITY};
    tsffn_keep_largest(odd, 5, 2);
    CHECK(isnan(odd[1]) && odd[2] == -INFINITY && odd[0] == 0.0f && odd[3] == 0.0f && odd[4] == 0.0f,
          "a NaN is largest");
}

static void test_rounding(void) {
    static const struct {
        double sparsity;
        int64_t n, kept;
    } cases[] = {
        {0.0, 10, 10}, {0.9, 10, 1}, {0.29, 100, 71}, {0.5, 97, 48}, {0.94, 10, 1}, {0.999, 10, 1}, {0.9, 14336, 1434},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); ++i) {
        CHECK(tsffn_topk_kept(cases[i].sparsity, cases[i].n) == cases[i].kept, "case %d", (int)i);
    }
}

// ---- computing

static double dot(const float * w, const float * v) {
    double sum = 0.0;
    for (int j = 0; j < N_EMBD; ++j) {
        sum += (double)w[j] * (double)v[j];
    }
    return sum;
}

static double factor(struct tsffn_factor f, double v) {
    return f.kind == TSFFN_FACTOR_LINEAR || (v > 0.0 && v >= (double)f.threshold) ? v : 0.0;
}

// y [N_EMBD] and h [N_FF], those of the chosen, of a row.
static void reference(const struct tsffn_cpu_layer * layer, int ffn, const float * row, int64_t keep, double * h,
                      double * y) {
    static bool stays[N_FF];
    memset(y, 0, N_EMBD * sizeof(*y));
    for (int i = 0; i < N_FF; ++i) {
        h[i] = factor(layer->activation.gate, dot(weights[ffn][TSFFN_PART_GATE] + i * N_EMBD, row)) *
               factor(layer->activation.up, dot(weights[ffn][TSFFN_PART_UP] + i * N_EMBD, row));
    }
    keep_plainly(h, stays, N_FF, keep);
    for (int i = 0; i < N_FF; ++i) {
        h[i] = stays[i] ? h[i] : 0.0;
        for (int j = 0; j < N_EMBD; ++j) {
            y[j] += h[i] * (double)weights[ffn][TSFFN_PART_DOWN][i * N_EMBD + j];
        }
    }
}

struct results {
    float y[MAX_ROWS * N_EMBD], h[MAX_ROWS * N_FF];
    struct tsffn_counts counts;
};

// The rows of `n_tokens` tokens: one of each, or with experts two. Returns how many.
static int64_t list_rows(struct tsffn_row * rows, struct results * results, bool moe, int64_t n_tokens) {
    int64_t n = 0;
    for (int e = 0; e < (moe ? N_EXPERT : 1); ++e) {
        for (int64_t t = 0; t < n_tokens; ++t) {
            if (!moe || t % N_EXPERT == e || (t + 1) % N_EXPERT == e) {
                rows[n] = (struct tsffn_row){.ffn = e, .token = (int32_t)t};
                rows[n].y = results->y + n * N_EMBD;
                rows[n].h = results->h + n * N_FF;
                ++n;
            }
        }
    }
    return n;
}

static void compute(struct tsffn_workspace * ws, const struct tsffn_cpu_layer * layer, const struct tsffn_row * rows,
                    int64_t n_rows, int64_t n_tokens, int64_t keep, int n_threads, struct results * results) {
    const struct tsffn_call call = {
        .op = TSFFN_OP_FUSED,
        .rows = rows,
        .n_rows = n_rows,
        .x = (const char *)x,
        .x_stride = N_EMBD * sizeof(float),
        .n_tokens = n_tokens,
        .n_threads = n_threads,
        .keep = keep,
    };
    memset(results->h, 0x7f, sizeof(results->h));
    results->counts = (struct tsffn_counts){0};
    CHECK(tsffn_compute(ws, layer, &call, &results->counts), "out of memory");
}

static void test_call(struct tsffn_workspace * ws, const struct tsffn_cpu_layer * layer, bool moe, int64_t n_tokens,
                      int64_t keep) {
    static struct results one, found;
    static struct tsffn_row rows[MAX_ROWS];
    double h[N_FF], y[N_EMBD];
    int64_t n_rows = list_rows(rows, &one, moe, n_tokens);
    compute(ws, layer, rows, n_rows, n_tokens, keep, 1, &one);
    uint64_t active = 0;
    for (int64_t r = 0; r < n_rows; ++r) {
        reference(layer, rows[r].ffn, x + rows[r].token * N_EMBD, keep, h, y);
        CHECK(nmse(one.y + r * N_EMBD, y, N_EMBD) < 1e-10, "row %d", (int)r);
        for (int i = 0; i < N_FF; ++i) {
            CHECK((one.h[r * N_FF + i] != 0.0f) == (h[i] != 0.0), "row %d, neuron %d: %g instead of %g", (int)r, i,
                  (double)one.h[r * N_FF + i], h[i]);
            active += h[i] != 0.0;
        }
    }
    const uint64_t all = (uint64_t)(n_rows * N_FF), row_bytes = N_EMBD * sizeof(float);
    CHECK(one.counts.neurons == all && one.counts.predicted == all && one.counts.active == active, "counts");
    CHECK(n_rows > 1 || one.counts.bytes_ffn == row_bytes * (N_FF + one.counts.gate_positive + active), "bytes");
    for (int n_threads = 2; n_threads <= 3; ++n_threads) {
        n_rows = list_rows(rows, &found, moe, n_tokens);
        compute(ws, layer, rows, n_rows, n_tokens, keep, n_threads, &found);
        CHECK(memcmp(found.h, one.h, (size_t)(n_rows * N_FF) * sizeof(float)) == 0, "h depends on the threads");
        CHECK(memcmp(&found.counts, &one.counts, offsetof(struct tsffn_counts, ns_predictor)) == 0, "counts do");
        if (keep == N_FF) { // all neurons: bit for bit the exact FFN
            compute(ws, layer, rows, n_rows, n_tokens, keep, n_threads, &found);
            n_rows = list_rows(rows, &one, moe, n_tokens);
            compute(ws, layer, rows, n_rows, n_tokens, 0, n_threads, &one);
            CHECK(memcmp(&found, &one, sizeof(float) * (size_t)(n_rows * N_EMBD)) == 0, "not the exact FFN");
        }
    }
}

// What a token gives does not depend on the rest of its batch.
static void test_batch(struct tsffn_workspace * ws, const struct tsffn_cpu_layer * layer) {
    static struct results batch, alone;
    static struct tsffn_row rows[MAX_ROWS];
    const int64_t n_rows = list_rows(rows, &batch, true, MAX_TOKENS);
    compute(ws, layer, rows, n_rows, MAX_TOKENS, 30, 2, &batch);
    for (int64_t r = 0; r < n_rows; ++r) {
        struct tsffn_row row = {.ffn = rows[r].ffn, .token = rows[r].token, .y = alone.y, .h = alone.h};
        compute(ws, layer, &row, 1, MAX_TOKENS, 30, 2, &alone);
        CHECK(memcmp(alone.y, batch.y + r * N_EMBD, N_EMBD * sizeof(float)) == 0, "row %d depends on its batch",
              (int)r);
    }
}

static void * test_layer(void * argument) {
    const struct tsffn_cpu_layer * layer = argument;
    static const int64_t batches[] = {1, 3, 64, MAX_TOKENS}, keeps[] = {1, 30, 77, N_FF - 1, N_FF};
    struct tsffn_workspace * ws = tsffn_workspace_new();
    CHECK(ws != NULL, "out of memory");
    for (size_t b = 0; b < sizeof(batches) / sizeof(batches[0]); ++b) {
        for (size_t k = 0; k < sizeof(keeps) / sizeof(keeps[0]); ++k) {
            test_call(ws, layer, b % 2 == 0, batches[b], keeps[k]);
            test_call(ws, layer, b % 2 == 1, batches[b], keeps[k]);
        }
    }
    test_batch(ws, layer);
    tsffn_workspace_free(ws);
    return NULL;
}

int main(void) {
    test_choices();
    test_rounding();
    float * all = (float *)weights;
    for (size_t i = 0; i < sizeof(weights) / sizeof(float); ++i) {
        all[i] = random_float();
    }
    for (int i = 0; i < MAX_TOKENS * N_EMBD; ++i) {
        x[i] = random_float();
    }
    for (int isa = 0; isa < TSFFN_ISA_COUNT; ++isa) {
        const struct tsffn_kernels * kernels = tsffn_kernels_for((enum tsffn_isa)isa);
        if (kernels == NULL) {
            continue;
        }
        f32 = (struct tsffn_row_type){
            .name = "f32",
            .block_size = 1,
            .block_bytes = 4,
            .x_format = -1,
            .x_block_size = 1,
            .x_block_bytes = 4,
            .own_dots = kernels->dots[TSFFN_FORMAT_F32],
            .own_axpys = kernels->axpys[TSFFN_FORMAT_F32],
            .own_add_rows = kernels->add_rows[TSFFN_FORMAT_F32],
        };
        for (int e = 0; e < N_EXPERT; ++e) {
            for (int part = 0; part < TSFFN_N_PARTS; ++part) {
                ffns[e].neurons.rows[part] = tsffn_rows_at(weights[e][part], N_FF, N_EMBD * sizeof(float));
            }
        }
        for (int name = 0; name < TSFFN_N_ACTIVATIONS; ++name) {
            struct tsffn_cpu_layer layer = {
                .n_embd = N_EMBD,
                .n_ff = N_FF,
                .n_ffns = N_EXPERT,
                .ffns = ffns,
                .types = {&f32, &f32, &f32},
                .activation = tsffn_activation((enum tsffn_activation_name)name, 0.5f),
            };
            on_small_stack(test_layer, &layer);
        }
        printf("%s: ok\n", kernels->name);
    }
    return 0;
}
