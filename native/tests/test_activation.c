// Activations against their definitions in doubles: fused, dense and counted, with a predictor and without.
#include "check.h"
#include "cpu/ffn.h"
#include "cpu/kernels/kernels.h"

#include <math.h>
#include <string.h>

enum { N_EMBD = 64, N_FF = 160, N_TOKENS = 70, N_VARIANTS = 4 };

// Whole numbers: products with x are exact in f32, so that a threshold decides the same there as in doubles.
static float gate[N_FF * N_EMBD], up[N_FF * N_EMBD], down[N_FF * N_EMBD], fc1[N_EMBD * N_EMBD], fc2[N_FF * N_EMBD];
static float x[N_TOKENS * N_EMBD];

static double relu(double v) {
    return fmax(v, 0.0);
}

static double drelu(double g, double u, double threshold) {
    (void)threshold;
    return relu(g) * relu(u);
}

static double reglu(double g, double u, double threshold) {
    (void)threshold;
    return relu(g) * u;
}

static double fatrelu(double g, double u, double threshold) {
    return g >= threshold ? g * u : 0.0;
}

static const struct {
    enum tsffn_activation_name name;
    float threshold;
    double (*h)(double gate, double up, double threshold);
} variants[N_VARIANTS] = {
    {TSFFN_ACTIVATION_DRELU, 0.0f, drelu},
    {TSFFN_ACTIVATION_REGLU, 0.0f, reglu},
    {TSFFN_ACTIVATION_FATRELU, 7.0f, fatrelu}, // a value that gates take
    {TSFFN_ACTIVATION_FATRELU, 20.5f, fatrelu},
};

static double dot(const float * w, const double * v) {
    double sum = 0.0;
    for (int j = 0; j < N_EMBD; ++j) {
        sum += (double)w[j] * v[j];
    }
    return sum;
}

// h [N_FF] and y [N_EMBD] of a token, and how many gates and how many neurons are not 0.
static void reference(int variant, bool predictor, const float * row, double * h, double * y, uint64_t counts[2]) {
    double v[N_EMBD], h1[N_EMBD];
    for (int j = 0; j < N_EMBD; ++j) {
        v[j] = (double)row[j];
        y[j] = 0.0;
    }
    for (int k = 0; k < N_EMBD; ++k) {
        h1[k] = relu(dot(fc1 + k * N_EMBD, v));
    }
    const double threshold = (double)variants[variant].threshold;
    for (int i = 0; i < N_FF; ++i) {
        const bool on = !predictor || dot(fc2 + i * N_EMBD, h1) > 0.0;
        const double g = dot(gate + i * N_EMBD, v), u = dot(up + i * N_EMBD, v);
        h[i] = on ? variants[variant].h(g, u, threshold) : 0.0;
        counts[0] += on && variants[variant].h(g, 1.0, threshold) != 0.0;
        counts[1] += h[i] != 0.0;
        for (int j = 0; j < N_EMBD; ++j) {
            y[j] += h[i] * (double)down[i * N_EMBD + j];
        }
    }
}

static void test_call(struct tsffn_workspace * ws, const struct tsffn_cpu_layer * layer, int variant, bool dense,
                      bool profile, int64_t n_tokens, int n_threads) {
    static struct tsffn_row rows[N_TOKENS];
    static float y[N_TOKENS * N_EMBD], h[N_TOKENS * N_FF];
    static uint64_t tokens, neurons[TSFFN_PROFILE_COUNTS][N_FF];
    static uint64_t histograms[TSFFN_PROFILE_HISTOGRAMS * TSFFN_PROFILE_BINS];
    static double squares[TSFFN_PROFILE_SQUARES][N_FF];
    const struct tsffn_profile into = {&tokens, &neurons[0][0], histograms, &squares[0][0]};
    memset(neurons, 0, sizeof(neurons));
    memset(squares, 0, sizeof(squares));
    for (int64_t t = 0; t < n_tokens; ++t) {
        rows[t] = (struct tsffn_row){.token = (int32_t)t, .y = y + t * N_EMBD, .h = h + t * N_FF};
    }
    const struct tsffn_call call = {
        .op = TSFFN_OP_FUSED,
        .rows = rows,
        .n_rows = n_tokens,
        .x = (const char *)x,
        .x_stride = N_EMBD * sizeof(float),
        .n_tokens = n_tokens,
        .n_threads = n_threads,
        .dense = dense,
        .profile = profile ? &into : NULL,
    };
    struct tsffn_counts counts = {0};
    CHECK(tsffn_compute(ws, layer, &call, &counts), "out of memory");
    uint64_t want_counts[2] = {0}, active = 0;
    double on_squares = 0.0, want_squares = 0.0; // of neurons that are on
    for (int64_t t = 0; t < n_tokens; ++t) {
        double want_h[N_FF], want_y[N_EMBD];
        reference(variant, layer->ffns[0].fc1.data != NULL, x + t * N_EMBD, want_h, want_y, want_counts);
        for (int i = 0; i < N_FF; ++i) {
            CHECK((double)h[t * N_FF + i] == want_h[i], "variant %d, h of neuron %d: %g instead of %g", variant, i,
                  (double)h[t * N_FF + i], want_h[i]);
            want_squares += want_h[i] * want_h[i];
        }
        CHECK(nmse(y + t * N_EMBD, want_y, N_EMBD) < 1e-12, "variant %d, token %d", variant, (int)t);
    }
    for (int i = 0; i < N_FF; ++i) {
        active += neurons[TSFFN_PROFILE_COUNTS - 1][i]; // on, and not 0
        on_squares += squares[0][i] - squares[1][i];
    }
    CHECK(counts.gate_positive == want_counts[0] && counts.active == want_counts[1],
          "variant %d counts %d %d, not %d %d", variant, (int)counts.gate_positive, (int)counts.active,
          (int)want_counts[0], (int)want_counts[1]);
    CHECK(!profile || active == want_counts[1], "variant %d: the profile has %d", variant, (int)active);
    CHECK(!profile || fabs(on_squares - want_squares) <= 1e-9 * want_squares, "variant %d: squares of %g, not %g",
          variant, on_squares, want_squares);
}

static void fill(float * w, int n, int most) {
    for (int k = 0; k < n; ++k) {
        w[k] = truncf(random_float() * (float)(most + 1));
    }
}

int main(void) {
    fill(gate, N_FF * N_EMBD, 3);
    fill(up, N_FF * N_EMBD, 3);
    fill(down, N_FF * N_EMBD, 3);
    fill(fc1, N_EMBD * N_EMBD, 1);
    fill(fc2, N_FF * N_EMBD, 1);
    fill(x, N_TOKENS * N_EMBD, 2);
    struct tsffn_workspace * ws = tsffn_workspace_new();
    CHECK(ws != NULL, "out of memory");
    for (int isa = 0; isa < TSFFN_ISA_COUNT; ++isa) {
        const struct tsffn_kernels * kernels = tsffn_kernels_for((enum tsffn_isa)isa);
        if (kernels == NULL) {
            continue;
        }
        const struct tsffn_row_type f32 = {
            .name = "f32",
            .block_size = 1,
            .block_bytes = sizeof(float),
            .x_format = -1,
            .x_block_size = 1,
            .x_block_bytes = sizeof(float),
            .own_dots = kernels->dots[TSFFN_FORMAT_F32],
            .own_axpys = kernels->axpys[TSFFN_FORMAT_F32],
            .own_add_rows = kernels->add_rows[TSFFN_FORMAT_F32],
        };
        const float * const parts[TSFFN_N_PARTS] = {gate, up, down};
        struct tsffn_ffn ffn = {0};
        for (int part = 0; part < TSFFN_N_PARTS; ++part) {
            ffn.neurons.rows[part] = tsffn_rows_at(parts[part], N_FF, N_EMBD * sizeof(float));
        }
        for (int k = 0; k < 2 * N_VARIANTS; ++k) {
            const int variant = k / 2;
            if (k % 2 == 1) {
                ffn.fc1 = (struct tsffn_matrix){&f32, (const uint8_t *)fc1, N_EMBD, N_EMBD, TSFFN_LAYOUT_ROWS};
                ffn.fc2 = (struct tsffn_matrix){&f32, (const uint8_t *)fc2, N_FF, N_EMBD, TSFFN_LAYOUT_ROWS};
            } else {
                ffn.fc1.data = ffn.fc2.data = NULL;
            }
            const struct tsffn_cpu_layer layer = {
                .n_embd = N_EMBD,
                .n_ff = N_FF,
                .n_ffns = 1,
                .ffns = &ffn,
                .types = {&f32, &f32, &f32},
                .activation = tsffn_activation(variants[variant].name, variants[variant].threshold),
            };
            for (int n_threads = 1; n_threads <= 2; ++n_threads) {
                for (int64_t n_tokens = 1; n_tokens <= N_TOKENS; n_tokens += N_TOKENS - 1) {
                    test_call(ws, &layer, variant, false, false, n_tokens, n_threads);
                    test_call(ws, &layer, variant, false, true, n_tokens, n_threads);
                    if (k % 2 == 0) {
                        test_call(ws, &layer, variant, true, false, n_tokens, n_threads);
                    }
                }
            }
        }
        printf("%s: ok\n", kernels->name);
    }
    tsffn_workspace_free(ws);
    return 0;
}
