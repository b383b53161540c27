// The CUDA module, compiled for the host, through its C interface: masks bit for bit the CPU's, h and y against
// doubles. usage: test_cuda LIBRARY [tiny | prefill]
//
// LIBRARY is that of the host, or the one for GPUs: then no failures are tested.
#include "harness.h"

static bool is_tiny;

// ---- checks

// The masks are the CPU's, bit for bit where the CPU has one answer. Returns how many bits had one.
static int64_t check_masks(const struct random_layer * made, const float * x, int64_t n_rows,
                           const struct results * r) {
    const struct tsffn_layer * layer = &made->layer;
    enum verdict * want = allocate((size_t)layer->n_ff * sizeof(*want));
    int64_t n_exact = 0, n_either = 0;
    for (int64_t i = 0; i < n_rows; ++i) {
        const int e = r->rows[i].ffn;
        n_exact += predict(made, e, x + r->rows[i].token * layer->n_embd, want);
        for (int64_t k = 0; k < layer->n_ff; ++k) {
            const bool on = (r->masks[(size_t)i * mask_words(layer) + (size_t)k / 32] >> k % 32 & 1) != 0;
            CHECK(want[k] == EITHER || on == (want[k] == ON), "row %d, neuron %d: %d", (int)i, (int)k, on);
            n_either += want[k] == EITHER;
        }
        const int64_t left = layer->n_ff % 32;
        const uint32_t last = r->masks[(size_t)(i + 1) * mask_words(layer) - 1];
        CHECK(left == 0 || last >> left == 0, "bits behind the last neuron: %x", last);
    }
    CHECK(n_either * 20 <= n_rows * layer->n_ff, "%d of %d logits are too close to the threshold for a test",
          (int)n_either, (int)(n_rows * layer->n_ff));
    free(want);
    return n_exact;
}

// Squared errors of the calls of a layer, and squared sizes.
struct distance {
    double h_error, h_size, y_error, y_size;
};

static void add_distance(const float * a, const double * b, int64_t n, double * error_sum, double * size) {
    for (int64_t i = 0; i < n; ++i) {
        *error_sum += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        *size += b[i] * b[i];
    }
}

// h and y of each row against doubles of the activations as they are rounded, and the counts. Adds to `distance` that
// from doubles of the activations as they are: there, a small gate . x of few neurons can be off by more.
static void check_sums(const struct random_layer * made, const struct tsffn_range * ranges, const float * x,
                       int64_t n_rows, const struct results * r, struct distance * distance) {
    const struct tsffn_layer * layer = &made->layer;
    const int64_t n = layer->n_embd, n_ff = layer->n_ff;
    double *h = allocate((size_t)n_ff * sizeof(*h)), *y = allocate((size_t)n * sizeof(*y));
    struct tsffn_counts want = {0};
    for (int64_t i = 0; i < n_rows; ++i) {
        const struct tsffn_row * row = &r->rows[i];
        const struct tsffn_range * range = &ranges[row->ffn];
        const uint32_t * mask = r->masks + (size_t)i * mask_words(layer);
        memset(y, 0, (size_t)n * sizeof(*y));
        compute_double(made, row->ffn, x + row->token * n, true, mask, 0, n_ff, h, y);
        CHECK(nmse(row->h, h, n_ff) <= 1e-11, "row %d: h: %g", (int)i, nmse(row->h, h, n_ff));
        CHECK(nmse(row->y, y, n) <= 1e-11, "row %d: y: %g", (int)i, nmse(row->y, y, n));
        memset(y, 0, (size_t)n * sizeof(*y));
        compute_double(made, row->ffn, x + row->token * n, false, mask, 0, n_ff, h, y);
        add_distance(row->h, h, n_ff, &distance->h_error, &distance->h_size);
        add_distance(row->y, y, n, &distance->y_error, &distance->y_size);
        want.neurons += (uint64_t)(range->end - range->first);
        for (int64_t k = range->first; k < range->end; ++k) {
            want.predicted += mask[k / 32] >> k % 32 & 1;
            want.active += row->h[k] != 0.0f;
        }
    }
    CHECK(r->counts.neurons == want.neurons && r->counts.predicted == want.predicted &&
              r->counts.active == want.active && r->counts.gate_positive >= want.active &&
              r->counts.gate_positive <= want.predicted,
          "counted %d %d %d", (int)r->counts.neurons, (int)r->counts.predicted, (int)r->counts.active);
    free(h);
    free(y);
}

// That another order of warps and lanes, and each row alone, give the same bits.
static void check_bits(const struct device * d, const struct random_layer * made, const struct tsffn_range * ranges,
                       const float * x, int64_t n_tokens, int64_t n_rows, const uint32_t * masks,
                       const struct results * r) {
    const struct tsffn_layer * layer = &made->layer;
    const size_t n = (size_t)layer->n_embd, words = mask_words(layer);
    struct results other = new_results(layer);
    memcpy(other.rows, r->rows, (size_t)n_rows * sizeof(other.rows[0]));
    for (int64_t i = 0; i < n_rows; ++i) {
        other.rows[i].y = other.y + (size_t)i * n;
        other.rows[i].h = other.h + i * layer->n_ff;
    }
    setenv("TSFFN_HOST_SEED", "7", 1);
    CHECK(compute(d, made, ranges, x, n_tokens, n_rows, masks, &other), "%s", error);
    CHECK(memcmp(other.masks, r->masks, (size_t)n_rows * words * sizeof(uint32_t)) == 0 &&
              memcmp(other.y, r->y, (size_t)n_rows * n * sizeof(float)) == 0,
          "another order gives other bits");
    unsetenv("TSFFN_HOST_SEED");
    for (int64_t i = n_rows - 1; i >= 0 && n_rows > 1; i -= 5) {
        other.rows[0] = r->rows[i];
        other.rows[0].y = other.y;
        other.rows[0].h = other.h;
        CHECK(compute(d, made, ranges, x, n_tokens, 1, masks != NULL ? masks + (size_t)i * words : NULL, &other), "%s",
              error);
        CHECK(memcmp(other.masks, r->masks + (size_t)i * words, words * sizeof(uint32_t)) == 0 &&
                  memcmp(other.y, r->y + (size_t)i * n, n * sizeof(float)) == 0,
              "row %d depends on the others", (int)i);
    }
    free_results(&other);
}

// ---- cases

enum where { ALL, PREFIX, MIDDLE, NONE, N_WHERE };

static void choose(enum where where, const struct tsffn_layer * layer, struct tsffn_range * ranges) {
    for (int e = 0; e < layer->n_ffns; ++e) {
        const int32_t n_ff = (int32_t)layer->n_ff, third = n_ff / 3 / 32 * 32;
        ranges[e] = where == ALL      ? (struct tsffn_range){0, n_ff}
                    : where == PREFIX ? (struct tsffn_range){0, e == 1 ? 0 : third}
                    : where == MIDDLE ? (struct tsffn_range){third, e == 1 ? n_ff : 2 * third}
                                      : (struct tsffn_range){0, 0};
    }
}

// density below 0: the predictor decides; else so many of 1000 neurons are on, by masks that are given.
static void test_calls(const struct random_layer * made, enum where where, const int64_t * tokens, int n_calls,
                       int density, int64_t * n_exact) {
    const struct tsffn_layer * layer = &made->layer;
    const bool predictor = layer->ffns[0].fc1.data != NULL && density < 0;
    struct tsffn_range ranges[MAX_FFNS];
    choose(where, layer, ranges);
    struct device d;
    CHECK(open_device(made, ranges, predictor, &d), "%s", error);
    float * x = allocate(MAX_TOKENS * (size_t)layer->n_embd * sizeof(float));
    uint32_t * given = allocate(MAX_ROWS * mask_words(layer) * sizeof(uint32_t));
    struct results r = new_results(layer);
    struct distance distance = {0};
    for (int call = 0; call < n_calls; ++call) {
        for (int64_t j = 0; j < MAX_TOKENS * layer->n_embd; ++j) {
            x[j] = random_float();
        }
        memset(given, 0, MAX_ROWS * mask_words(layer) * sizeof(uint32_t));
        for (int64_t i = 0; i < MAX_ROWS * layer->n_ff; ++i) {
            const int64_t row = i / layer->n_ff, k = i % layer->n_ff;
            const bool on = (int)(random_bits() % 1000) < density;
            given[(size_t)row * mask_words(layer) + (size_t)k / 32] |= (uint32_t)on << k % 32;
        }
        const uint32_t * masks = density >= 0 ? given : NULL;
        const int64_t n_rows = make_rows(layer, tokens[call], &r);
        CHECK(compute(&d, made, ranges, x, tokens[call], n_rows, masks, &r), "%s", error);
        if (masks != NULL) {
            CHECK(memcmp(r.masks, masks, (size_t)n_rows * mask_words(layer) * sizeof(uint32_t)) == 0, "given masks");
        } else if (predictor) {
            *n_exact += check_masks(made, x, n_rows, &r);
        }
        check_sums(made, ranges, x, n_rows, &r, &distance);
        if (!is_tiny && call != 1) {
            check_bits(&d, made, ranges, x, tokens[call], n_rows, masks, &r);
        }
    }
    CHECK(distance.h_error <= 1e-8 * distance.h_size && distance.y_error <= 1e-8 * distance.y_size,
          "%g of %g, %g of %g", distance.h_error, distance.h_size, distance.y_error, distance.y_size);
    free_results(&r);
    free(given);
    free(x);
    close_device(&d);
    CHECK(host_allocations() == 0, "%d allocations are left", host_allocations());
}

static const int TYPES[] = {GGML_F32, GGML_F16, GGML_BF16, GGML_Q8_0, GGML_Q4_0};
enum { N_TYPES = 5 };

static const struct predictor_kind NO_PREDICTOR = {0};

// Weights of every type, every activation; all neurons on the device, or some; masks given, or all on.
static void test_neurons(void) {
    static const int64_t tokens[] = {1, 8};
    static const int densities[] = {0, 10, 100, 1000, -1};
    int64_t unused = 0;
    for (int type = 0; type < N_TYPES; ++type) {
        for (int n_ffns = 1; n_ffns <= MAX_FFNS; n_ffns += 2) {
            struct random_layer * made =
                make_layer(96, 200, n_ffns, TYPES[type], TYPES[(type + (n_ffns == 1)) % N_TYPES],
                           (enum tsffn_activation_name)((type + n_ffns) % TSFFN_N_ACTIVATIONS), &NO_PREDICTOR);
            for (int k = 0; k < 5; ++k) {
                test_calls(made, (enum where)((type + k + n_ffns) % N_WHERE), tokens, 2, densities[k], &unused);
            }
            free_layer(made);
        }
    }
}

// Every type of fc1 and of fc2, in panels and outside, ranks that are no multiple of 32 or 16.
static void test_predictors(void) {
    const enum tsffn_layout panels = TSFFN_LAYOUT_PANELS, plain = TSFFN_LAYOUT_ROWS;
    const struct predictor_kind kinds[] = {
        {GGML_F32, GGML_F32, 17, plain, 0.0f, true, false},
        {GGML_F16, GGML_F16, 40, plain, 0.01f, false, false},
        {GGML_BF16, GGML_BF16, 64, plain, -0.5f, true, true},
        {GGML_Q8_0, GGML_Q8_0, 64, panels, 0.0f, true, false},
        {GGML_Q4_0, GGML_Q4_0, 96, panels, 0.02f, false, true},
        {GGML_Q4_0, TSFFN_TYPE_Q3_NL, 64, panels, 0.0f, true, false},
        {GGML_Q8_0, TSFFN_TYPE_Q3_NL, 160, panels, 0.3f, false, false},
        {GGML_Q8_0, GGML_Q4_0, 64, plain, 0.0f, true, false},
        {GGML_Q4_0, GGML_F16, 43, panels, 0.0f, false, false},
        {GGML_F32, TSFFN_TYPE_Q3_NL, 64, panels, 0.0f, true, true},
    };
    static const int64_t tokens[] = {1, 2, 7, 3, 8};
    for (size_t k = 0; k < sizeof(kinds) / sizeof(kinds[0]); ++k) {
        const bool blocks = is_block_type(kinds[k].fc1) && is_block_type(kinds[k].fc2) && kinds[k].layout == panels;
        for (int n_ffns = 1; n_ffns <= MAX_FFNS; n_ffns += 2) {
            const int64_t n_ff = kinds[k].fc2 == TSFFN_TYPE_Q3_NL ? 208 : 200;
            struct random_layer * made = make_layer(160, n_ff, n_ffns, TYPES[k % N_TYPES], TYPES[k % N_TYPES],
                                                    TSFFN_ACTIVATION_DRELU, &kinds[k]);
            int64_t n_exact = 0;
            test_calls(made, (enum where)(k % N_WHERE), tokens + 2 * (n_ffns > 1), 3, -1, &n_exact);
            CHECK(blocks == (n_exact > 0), "%d masks by the CPU's bits", (int)n_exact);
            free_layer(made);
        }
    }
}

// Where loops of the kernels go round more than once: many neurons, many columns, shared memory for two rows only.
static void test_large(void) {
    static const int64_t tokens[] = {1, 6};
    const struct predictor_kind kind = {GGML_Q4_0, TSFFN_TYPE_Q3_NL, 288, TSFFN_LAYOUT_PANELS, 0.0f, true, false};
    const struct predictor_kind low = {GGML_Q8_0, GGML_Q8_0, 32, TSFFN_LAYOUT_PANELS, -1e30f, true, false};
    int64_t n_exact = 0;
    struct random_layer * made = make_layer(32, 33008, 1, GGML_Q4_0, GGML_F16, TSFFN_ACTIVATION_DRELU, &low);
    test_calls(made, ALL, tokens, 1, -1, &n_exact);
    free_layer(made);
    made = make_layer(2080, 80, 1, GGML_Q8_0, GGML_F32, TSFFN_ACTIVATION_REGLU, &kind);
    test_calls(made, PREFIX, tokens, 2, -1, &n_exact);
    host_limits((size_t)1 << 30, 20 << 10);
    test_calls(made, PREFIX, tokens + 1, 1, -1, &n_exact);
    host_limits((size_t)1 << 30, 64 << 10);
    free_layer(made);
    CHECK(n_exact > 33000, "%d masks by the CPU's bits", (int)n_exact);
    made = make_layer(3200, 32, 1, GGML_F16, GGML_Q4_0, TSFFN_ACTIVATION_DRELU, &NO_PREDICTOR);
    test_calls(made, ALL, tokens, 2, -1, &n_exact); // shared memory that must be asked for
    free_layer(made);
}

// ---- failures

static void expect(bool failed, const char * words) {
    CHECK(failed && strstr(error, words) != NULL && strchr(error, '\n') == NULL, "expected '%s', found '%s'", words,
          failed ? error : "no failure");
}

// Neurons that are in memory only between being announced and released.
static int64_t n_announced, n_awaited, n_released;

static void announce(const struct tsffn_neurons * neurons, const int32_t * list, const uint64_t * rows, int64_t n) {
    (void)neurons;
    (void)rows;
    CHECK(n_announced == n_released && list[0] == n_announced, "one list after the other, in order");
    n_announced += n;
}

static void await_neurons(const struct tsffn_neurons * neurons, const int32_t * list, int64_t n) {
    (void)neurons;
    CHECK(list[0] == n_awaited && n_awaited + n == n_announced, "what is announced");
    n_awaited += n;
}

static void release(const struct tsffn_neurons * neurons, const int32_t * list, int64_t n) {
    (void)neurons;
    CHECK(list[0] == n_released && n_released + n == n_awaited, "what was awaited");
    n_released += n;
}

static int64_t room(const struct tsffn_neurons * neurons) {
    (void)neurons;
    return TSFFN_MIN_ROOM;
}

// A layer whose predictor stays on the CPU takes no call without masks. Its neurons come from a memory of their own.
static void test_given_masks_only(void) {
    static const struct tsffn_memory memory = {
        .announce = announce, .await = await_neurons, .release = release, .room = room}; // nothing is expected
    const struct predictor_kind kind = {GGML_F16, GGML_F16, 32, TSFFN_LAYOUT_ROWS, 0.0f, false, false};
    struct random_layer * made = make_layer(32, 200, 1, GGML_Q4_0, GGML_Q4_0, TSFFN_ACTIVATION_DRELU, &kind);
    made->ffns[0].neurons.memory = &memory;
    const struct tsffn_range range = {0, 192};
    struct device d;
    CHECK(open_device(made, &range, false, &d), "%s", error);
    CHECK(n_announced == 192 && n_awaited == 192 && n_released == 192, "%d neurons released", (int)n_released);
    const struct tsffn_call call = {.op = TSFFN_OP_FUSED};
    expect(!module->begin(d.queue, d.layer, &call, NULL, NULL, error, sizeof(error)),
           "not on the device: expected masks");
    close_device(&d);
    free_layer(made);
}

static void test_refusals(void) {
    struct random_layer * made = make_layer(64, 64, 1, GGML_Q8_0, GGML_Q8_0, TSFFN_ACTIVATION_DRELU, &NO_PREDICTOR);
    struct tsffn_range range = {0, 40};
    expect(module->layer_bytes(&made->layer, &range, false, error, sizeof(error)) == 0, "neurons [0, 40)");
    range.end = 64;
    expect(module->layer_bytes(&made->layer, &range, true, error, sizeof(error)) == 0, "expected a predictor");
    struct tsffn_layer layer = made->layer;
    layer.types[TSFFN_PART_UP] = 12; // Q4_K
    expect(module->layer_bytes(&layer, &range, false, error, sizeof(error)) == 0, "no kernel for gate, up, down");
    struct device d;
    CHECK(open_device(made, &range, false, &d), "%s", error);
    expect(module->upload(d.cuda, &made->layer, &range, false, error, sizeof(error)) == NULL, "room in the arena");
    module->release(d.layer); // the arena is empty again
    d.layer = module->upload(d.cuda, &made->layer, &range, false, error, sizeof(error));
    CHECK(d.layer != NULL, "%s", error);
    struct tsffn_call call = {.op = TSFFN_OP_GATE};
    expect(!module->begin(d.queue, d.layer, &call, NULL, NULL, error, sizeof(error)), "a fused, sparse call");
    expect(!module->end(d.queue, NULL, error, sizeof(error)), "not begun");
    expect(module->poll(d.queue, error, sizeof(error)) == -1, "not ended");
    const float * copied_x;
    expect(module->await_masks(d.queue, &copied_x, error, sizeof(error)) == NULL, "no call");
    call.op = TSFFN_OP_FUSED; // of no rows
    struct tsffn_counts counts = {0};
    CHECK(module->begin(d.queue, d.layer, &call, NULL, NULL, error, sizeof(error)) &&
              module->end(d.queue, NULL, error, sizeof(error)) &&
              module->await(d.queue, &counts, error, sizeof(error)) && counts.neurons == 0,
          "%s", error);
    close_device(&d);
    test_given_masks_only();
    struct tsffn_cuda_info info;
    expect(module->open(0, (size_t)1 << 40, &info, error, sizeof(error)) == NULL, "cudaMalloc: out of memory");
    CHECK(info.total_bytes == (size_t)1 << 30 && info.capability == 75, "what is known of the device");
    expect(module->open(5, 64, &info, error, sizeof(error)) == NULL, "invalid device");
    expect(tsffn_cuda_load("/nowhere/libtsffn-cuda.so", error, sizeof(error)) == NULL, "CUDA module: ");
    expect(tsffn_cuda_load("libm.so.6", error, sizeof(error)) == NULL, "expected a function tsffn_cuda_module");
    CHECK(module->n_devices(error, sizeof(error)) == 1 && host_allocations() == 0, "%s", error);
    free_layer(made);
}

// Every call of CUDA fails once, alone or with all that follow: one line, nothing is left, and without it all is right.
static void test_failures(void) {
    const struct predictor_kind kind = {GGML_Q4_0, TSFFN_TYPE_Q3_NL, 32, TSFFN_LAYOUT_PANELS, 0.0f, true, false};
    struct random_layer * made = make_layer(64, 96, 1, GGML_Q4_0, GGML_Q4_0, TSFFN_ACTIVATION_DRELU, &kind);
    struct tsffn_range range = {0, 64};
    float x[64];
    for (int j = 0; j < 64; ++j) {
        x[j] = random_float();
    }
    struct results r = new_results(&made->layer);
    struct distance distance = {0};
    const int64_t n_rows = make_rows(&made->layer, 1, &r);
    for (int for_good = 0; for_good < 2; ++for_good) {
        bool failed = true;
        int call = 1;
        for (; failed; ++call) {
            struct device d = {0};
            error[0] = '\0';
            host_fail(call, for_good);
            failed = !open_device(made, &range, true, &d) || !compute(&d, made, &range, x, 1, n_rows, NULL, &r);
            CHECK(failed == (strncmp(error, "CUDA: ", 6) == 0), "call %d: '%s'", call, error);
            if (d.cuda != NULL && failed) {
                const bool lost = module->is_lost(d.cuda);
                CHECK(lost == (for_good != 0) && lost == (strstr(error, "; the device is lost") != NULL),
                      "call %d: '%s'", call, error);
            }
            if (d.queue != NULL && failed && for_good == 0) { // the queue still works
                host_fail(0, 0);
                CHECK(compute(&d, made, &range, x, 1, n_rows, NULL, &r), "after call %d: %s", call, error);
                check_sums(made, &range, x, n_rows, &r, &distance);
            }
            close_device(&d);
            CHECK(host_allocations() == 0, "call %d: %d allocations are left", call, host_allocations());
        }
        CHECK(call > 60, "only %d calls", call);
        check_sums(made, &range, x, n_rows, &r, &distance);
    }
    host_fail(0, 0);
    free_results(&r);
    free_layer(made);
}

#include "prefill.h"

// For a thread of the host per thread of the device: one small layer of each kind, few neurons on.
static void test_tiny(void) {
    static const int64_t tokens[] = {2};
    const enum tsffn_layout panels = TSFFN_LAYOUT_PANELS;
    const struct predictor_kind kinds[] = {
        {GGML_Q4_0, TSFFN_TYPE_Q3_NL, 32, panels, 0.4f, true, false},
        {GGML_Q8_0, GGML_Q4_0, 32, panels, 0.5f, false, false},
        {GGML_F32, GGML_F16, 20, panels, 5.0f, false, false},
    };
    int64_t n_exact = 0;
    for (int k = 0; k < 3; ++k) {
        struct random_layer * made = make_layer(64, 176, 1, TYPES[4 - k], TYPES[k], TSFFN_ACTIVATION_DRELU, &kinds[k]);
        test_calls(made, ALL, tokens, 1, -1, &n_exact);
        free_layer(made);
    }
    test_prefill_tiny();
}

int main(int argc, char ** argv) {
    CHECK(argc >= 2, "usage: test_cuda LIBRARY [tiny | prefill]");
    load(argv[1]);
    is_tiny = argc > 2;
    if (is_tiny && strcmp(argv[2], "prefill") == 0) {
        test_prefill();
    } else if (is_tiny) {
        test_tiny();
    } else {
        test_neurons();
        test_predictors();
        test_large();
        test_prefill();
        if (is_host) {
            test_refusals();
            test_failures();
            test_prefill_refusals();
            test_prefill_failures();
        }
    }
    printf("%s: ok\n", module->name);
    return 0;
}
