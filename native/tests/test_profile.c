// Activation statistics against counts of doubles, written from what tsffn.h says is counted: dense and with experts,
// with predictor and exact, with row kernels and with the matrix unit, at sizes that fill neither panels nor groups.
#include "check.h"
#include "cpu/ffn.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/kernels.h"
#include "small_stack.h"

#include <math.h>
#include <string.h>

enum { N_EMBD = 96, N_FF = 200, N_EXPERT = 3, RANK = 32, MAX_TOKENS = 140, N_FIRST = -20, N_LAST = 12 };

struct expert {
    uint16_t gate[N_FF * N_EMBD], up[N_FF * N_EMBD], down[N_FF * N_EMBD], fc1[RANK * N_EMBD], fc2[N_FF * RANK];
};
static struct expert halves[N_EXPERT];
static struct {
    float gate[N_FF * N_EMBD], up[N_FF * N_EMBD], down[N_FF * N_EMBD], fc1[RANK * N_EMBD], fc2[N_FF * RANK];
} floats[N_EXPERT];
static float x[MAX_TOKENS * N_EMBD];

// A multiple of 2^-10 below 1 as a half and as a float.
static float random_half(uint16_t * half) {
    const float f = truncf(random_float() * 1024.0f) / 1024.0f;
    uint32_t bits;
    memcpy(&bits, &f, sizeof(bits));
    const uint32_t magnitude = f == 0.0f ? 0 : (((bits >> 23) & 255) - 127 + 15) << 10 | ((bits >> 13) & 0x3ff);
    *half = (uint16_t)((bits >> 16 & 0x8000) | magnitude);
    return f;
}

static struct tsffn_row_type row_type(const struct tsffn_kernels * kernels, enum tsffn_format format) {
    return (struct tsffn_row_type){
        .name = "own",
        .block_size = 1,
        .block_bytes = format == TSFFN_FORMAT_F32 ? 4 : 2,
        .x_format = -1,
        .x_block_size = 1,
        .x_block_bytes = 4,
        .own_dots = kernels->dots[format],
        .own_axpys = kernels->axpys[format],
        .own_add_rows = kernels->add_rows[format],
        .gemm = format == TSFFN_FORMAT_F32 ? NULL : kernels->gemm,
        .gemm_format = format,
    };
}

static struct tsffn_matrix matrix(const struct tsffn_row_type * type, const void * data, int64_t rows, int64_t cols) {
    return (struct tsffn_matrix){.type = type, .data = data, .n_rows = rows, .n_cols = cols};
}

static double dot(const float * w, const double * v, int64_t n) {
    double sum = 0.0;
    for (int64_t j = 0; j < n; ++j) {
        sum += (double)w[j] * v[j];
    }
    return sum;
}

// How many values are surely, and at most, in each set: a value within EPSILON of 0 may count either way.
static const double EPSILON = 2e-3;
struct bounds {
    uint64_t least, most;
};

static void add(struct bounds * bounds, double smallest) {
    bounds->least += smallest > EPSILON;
    bounds->most += smallest > -EPSILON;
}

static struct bounds want[TSFFN_PROFILE_COUNTS][N_EXPERT][N_FF];
static uint64_t want_tokens[N_EXPERT];
// Sums of squares, and how far off they may be.
static struct {
    double sum, slack;
} want_squares[TSFFN_PROFILE_SQUARES][N_EXPERT][N_FF];
static double * values[TSFFN_PROFILE_HISTOGRAMS];
static int64_t n_values;

static void count_row(int e, const float * row, bool predictor) {
    double v[N_EMBD], h1[RANK];
    for (int j = 0; j < N_EMBD; ++j) {
        v[j] = (double)row[j];
    }
    for (int k = 0; k < RANK; ++k) {
        h1[k] = fmax(0.0, dot(floats[e].fc1 + k * N_EMBD, v, N_EMBD));
    }
    want_tokens[e] += 1;
    for (int i = 0; i < N_FF; ++i) {
        const double gate = dot(floats[e].gate + i * N_EMBD, v, N_EMBD);
        const double up = dot(floats[e].up + i * N_EMBD, v, N_EMBD);
        const double logit = predictor ? dot(floats[e].fc2 + i * RANK, h1, RANK) : 1.0;
        add(&want[0][e][i], gate);
        add(&want[1][e][i], up);
        add(&want[2][e][i], fmin(gate, up));
        add(&want[3][e][i], logit);
        add(&want[4][e][i], fmin(logit, gate));
        add(&want[5][e][i], fmin(logit, fmin(gate, up)));
        values[0][n_values] = fabs(gate);
        values[1][n_values] = fabs(up);
        const double h = fmax(gate, 0.0) * fmax(up, 0.0);
        const double off = EPSILON * (fabs(gate) + fabs(up) + EPSILON);
        want_squares[0][e][i].sum += h * h;
        want_squares[1][e][i].sum += logit > 0.0 ? 0.0 : h * h;
        want_squares[0][e][i].slack += off * (2.0 * h + off);
        want_squares[1][e][i].slack += fabs(logit) < EPSILON ? (h + off) * (h + off) : off * (2.0 * h + off);
        values[2][n_values] = h;
        ++n_values;
    }
}

// The lower edge of bin k > 0.
static double edge(int k) {
    return ldexp(1.0 + (k - 1) % 4 / 4.0, N_FIRST + (k - 1) / 4);
}

static void test_call(struct tsffn_workspace * ws, const struct tsffn_cpu_layer * layer, bool moe, int64_t n_tokens,
                      int n_threads, bool exact_output) {
    static struct tsffn_row rows[MAX_TOKENS * 2];
    static float plain[MAX_TOKENS * 2 * N_EMBD], counted[MAX_TOKENS * 2 * N_EMBD];
    static uint64_t tokens[N_EXPERT], neurons[TSFFN_PROFILE_COUNTS][N_EXPERT][N_FF];
    static uint64_t histograms[TSFFN_PROFILE_HISTOGRAMS][TSFFN_PROFILE_BINS];
    static double squares[TSFFN_PROFILE_SQUARES][N_EXPERT][N_FF];
    int64_t n_rows = 0;
    memset(want, 0, sizeof(want));
    memset(want_squares, 0, sizeof(want_squares));
    memset(squares, 0, sizeof(squares));
    memset(want_tokens, 0, sizeof(want_tokens));
    memset(tokens, 0, sizeof(tokens));
    memset(neurons, 0, sizeof(neurons));
    memset(histograms, 0, sizeof(histograms));
    n_values = 0;
    for (int e = 0; e < (moe ? N_EXPERT : 1); ++e) {
        for (int64_t t = 0; t < n_tokens; ++t) {
            if (!moe || t % N_EXPERT == e || (t + 1) % N_EXPERT == e) { // top-2
                rows[n_rows] = (struct tsffn_row){.ffn = e, .token = (int32_t)t, .y = plain + n_rows * N_EMBD};
                ++n_rows;
                count_row(e, x + t * N_EMBD, layer->ffns[0].fc1.data != NULL);
            }
        }
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
    struct tsffn_counts plain_counts = {0}, counts = {0};
    CHECK(tsffn_compute(ws, layer, &call, &plain_counts), "out of memory");
    const struct tsffn_profile profile = {
        .tokens = tokens,
        .neurons = &neurons[0][0][0],
        .histograms = &histograms[0][0],
        .squares = &squares[0][0][0],
    };
    call.profile = &profile;
    for (int64_t r = 0; r < n_rows; ++r) {
        rows[r].y = counted + r * N_EMBD;
    }
    CHECK(tsffn_compute(ws, layer, &call, &counts), "out of memory");

    // With a predictor threads share other neurons while they count.
    const bool exact = exact_output && (n_threads == 1 || layer->ffns[0].fc1.data == NULL);
    double error = 0.0, size = 1e-30;
    for (int64_t j = 0; j < n_rows * N_EMBD; ++j) {
        CHECK(!exact || plain[j] == counted[j], "counting changes the output");
        error += pow((double)plain[j] - (double)counted[j], 2);
        size += pow((double)plain[j], 2);
    }
    CHECK(error / size < 1e-8, "counting changes the output: NMSE %g", error / size);

    for (int e = 0; e < N_EXPERT; ++e) {
        CHECK(tokens[e] == want_tokens[e], "tokens of expert %d: %d", e, (int)tokens[e]);
        for (int i = 0; i < N_FF; ++i) {
            for (int c = 0; c < TSFFN_PROFILE_COUNTS; ++c) {
                const struct bounds b = want[c][e][i];
                CHECK(b.least <= neurons[c][e][i] && neurons[c][e][i] <= b.most,
                      "count %d of neuron %d: %d, not %d..%d", c, i, (int)neurons[c][e][i], (int)b.least, (int)b.most);
            }
            for (int k = 0; k < TSFFN_PROFILE_SQUARES; ++k) {
                CHECK(fabs(squares[k][e][i] - want_squares[k][e][i].sum) <= want_squares[k][e][i].slack,
                      "squares %d of neuron %d: %g, not %g", k, i, squares[k][e][i], want_squares[k][e][i].sum);
            }
        }
    }
    for (int k = 0; k < TSFFN_PROFILE_HISTOGRAMS; ++k) { // cumulative: values near an edge may fall on either side
        uint64_t below = 0;
        for (int bin = 0; bin < TSFFN_PROFILE_BINS; ++bin) {
            below += histograms[k][bin];
            const double upper = bin + 1 < TSFFN_PROFILE_BINS ? edge(bin + 1) : INFINITY;
            const double slack = 30.0 * EPSILON; // products of two values of up to 30
            uint64_t least = 0, most = 0;
            for (int64_t v = 0; v < n_values; ++v) {
                least += values[k][v] < upper - slack;
                most += values[k][v] < upper + slack;
            }
            CHECK(least <= below && below <= most, "histogram %d up to bin %d: %d, not %d..%d", k, bin, (int)below,
                  (int)least, (int)most);
        }
        CHECK(below == (uint64_t)n_values, "histogram %d", k);
    }
}

// Every bin's edges, where single floats must fall into it.
static void test_bins(struct tsffn_workspace * ws, const struct tsffn_kernels * kernels) {
    const struct tsffn_row_type type = row_type(kernels, TSFFN_FORMAT_F32);
    const float one = 1.0f, zero = 0.0f;
    const struct tsffn_ffn ffn = {.neurons.rows = {
                                      tsffn_rows_at(&one, 1, sizeof(one)),
                                      tsffn_rows_at(&one, 1, sizeof(one)),
                                      tsffn_rows_at(&zero, 1, sizeof(zero)),
                                  }};
    const struct tsffn_cpu_layer layer = {
        .n_embd = 1,
        .n_ff = 1,
        .n_ffns = 1,
        .ffns = &ffn,
        .types = {&type, &type, &type},
        .activation = tsffn_activation(TSFFN_ACTIVATION_DRELU, 0.0f),
    };
    for (int k = 0; k < TSFFN_PROFILE_BINS; ++k) {
        const float lower = k > 0 ? (float)edge(k) : 0.0f;
        const float upper = k + 1 < TSFFN_PROFILE_BINS ? nextafterf((float)edge(k + 1), 0.0f) : 1e30f;
        const float inside[3] = {lower, upper, -upper};
        for (int v = 0; v < 3; ++v) {
            uint64_t tokens = 0, neurons[TSFFN_PROFILE_COUNTS] = {0};
            uint64_t histograms[TSFFN_PROFILE_HISTOGRAMS][TSFFN_PROFILE_BINS] = {{0}};
            double squares[TSFFN_PROFILE_SQUARES] = {0.0};
            const struct tsffn_profile profile = {&tokens, neurons, &histograms[0][0], squares};
            float y;
            const struct tsffn_row row = {.y = &y};
            const struct tsffn_call call = {.op = TSFFN_OP_FUSED,
                                            .rows = &row,
                                            .n_rows = 1,
                                            .x = (const char *)&inside[v],
                                            .x_stride = sizeof(float),
                                            .n_tokens = 1,
                                            .n_threads = 1,
                                            .profile = &profile};
            struct tsffn_counts counts = {0};
            CHECK(tsffn_compute(ws, &layer, &call, &counts), "out of memory");
            CHECK(histograms[0][k] == 1 && histograms[1][k] == 1, "%g is not in bin %d", (double)inside[v], k);
            const bool active = inside[v] > 0.0f;
            CHECK(neurons[2] == active && (active || histograms[2][0] == 1), "product of %g", (double)inside[v]);
        }
    }
}

static void * test_small_stack(void * argument) {
    const struct tsffn_cpu_layer * layer = argument;
    struct tsffn_workspace * ws = tsffn_workspace_new();
    CHECK(ws != NULL, "out of memory");
    for (int n_threads = 1; n_threads <= 3; n_threads += 2) {
        test_call(ws, layer, true, MAX_TOKENS, n_threads, false);
    }
    tsffn_workspace_free(ws);
    return NULL;
}

int main(void) {
    for (int e = 0; e < N_EXPERT; ++e) {
        uint16_t * half = (uint16_t *)&halves[e];
        float * f = (float *)&floats[e];
        for (size_t i = 0; i < sizeof(halves[e]) / sizeof(*half); ++i) {
            f[i] = random_half(&half[i]);
        }
    }
    for (int i = 0; i < MAX_TOKENS * N_EMBD; ++i) {
        x[i] = random_float();
    }
    for (int k = 0; k < TSFFN_PROFILE_HISTOGRAMS; ++k) {
        values[k] = malloc(sizeof(double) * MAX_TOKENS * 2 * N_FF);
        CHECK(values[k] != NULL, "out of memory");
    }
    struct tsffn_workspace * ws = tsffn_workspace_new();
    CHECK(ws != NULL, "out of memory");
    static const int64_t batches[] = {1, 7, 8, 17, 64, 65, MAX_TOKENS};
    for (int isa = 0; isa < TSFFN_ISA_COUNT; ++isa) {
        const struct tsffn_kernels * kernels = tsffn_kernels_for((enum tsffn_isa)isa);
        if (kernels == NULL) {
            continue;
        }
        test_bins(ws, kernels);
        for (int variant = 0; variant < 4; ++variant) {
            const enum tsffn_format format = (variant & 1) != 0 ? TSFFN_FORMAT_F16 : TSFFN_FORMAT_F32;
            const struct tsffn_row_type type = row_type(kernels, format);
            struct tsffn_ffn ffns[N_EXPERT];
            for (int e = 0; e < N_EXPERT; ++e) {
                const bool f16 = format == TSFFN_FORMAT_F16;
                const size_t row_bytes = tsffn_row_bytes(&type, N_EMBD);
                ffns[e] = (struct tsffn_ffn){
                    .neurons.rows = {
                        tsffn_rows_at(f16 ? (void *)halves[e].gate : floats[e].gate, N_FF, row_bytes),
                        tsffn_rows_at(f16 ? (void *)halves[e].up : floats[e].up, N_FF, row_bytes),
                        tsffn_rows_at(f16 ? (void *)halves[e].down : floats[e].down, N_FF, row_bytes),
                    }};
                if ((variant & 2) != 0) {
                    ffns[e].fc1 = matrix(&type, f16 ? (void *)halves[e].fc1 : floats[e].fc1, RANK, N_EMBD);
                    ffns[e].fc2 = matrix(&type, f16 ? (void *)halves[e].fc2 : floats[e].fc2, N_FF, RANK);
                }
            }
            struct tsffn_cpu_layer layer = {
                .n_embd = N_EMBD,
                .n_ff = N_FF,
                .n_ffns = N_EXPERT, // a dense call uses the first only
                .ffns = ffns,
                .types = {&type, &type, &type},
                .activation = tsffn_activation(TSFFN_ACTIVATION_DRELU, 0.0f),
            };
            for (size_t b = 0; b < sizeof(batches) / sizeof(batches[0]); ++b) {
                for (int n_threads = 1; n_threads <= 3; ++n_threads) {
                    test_call(ws, &layer, false, batches[b], n_threads, type.gemm == NULL);
                    test_call(ws, &layer, true, batches[b], n_threads, type.gemm == NULL);
                }
            }
            on_small_stack(test_small_stack, &layer);
        }
        printf("%s: ok\n", kernels->name);
    }
    tsffn_workspace_free(ws);
    for (int k = 0; k < TSFFN_PROFILE_HISTOGRAMS; ++k) {
        free(values[k]);
    }
    return 0;
}
