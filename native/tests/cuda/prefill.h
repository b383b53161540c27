// Calls of many rows: masks as in other calls, y against doubles. Included by test_cuda.c.

// What a weight loses as half is up to 2^-11 of it: where errors are uniformly distributed their square is 2^-22 / 3,
// and that of gate, up and down together three times that. Where few neurons are on, some errors count for all: 2^-20.
// Where weights are halves, only x and h are rounded, to 2^-22, and sums are floats, which GPUs may cut off instead of
// rounding.
static double prefill_nmse(const struct tsffn_layer * layer) {
    bool halves = true;
    for (int part = 0; part < TSFFN_N_PARTS; ++part) {
        halves = halves && layer->types[part] == GGML_F16;
    }
    return halves ? 1e-10 : 0x1p-20;
}

// y of each row, and the counts; `streams`: the device computed all neurons.
static void check_prefill(const struct random_layer * made, const struct tsffn_range * ranges, const float * x,
                          int64_t n_rows, bool streams, const struct results * r) {
    const struct tsffn_layer * layer = &made->layer;
    const int64_t n = layer->n_embd, n_ff = layer->n_ff;
    double *h = allocate((size_t)n_ff * sizeof(*h)), *y = allocate((size_t)n * sizeof(*y));
    double y_error = 0.0, y_size = 0.0;
    struct tsffn_counts want = {0};
    for (int64_t i = 0; i < n_rows; ++i) {
        const struct tsffn_row * row = &r->rows[i];
        const struct tsffn_range all = {0, (int32_t)n_ff}, *range = streams ? &all : &ranges[row->ffn];
        const uint32_t * mask = r->masks + (size_t)i * mask_words(layer);
        memset(y, 0, (size_t)n * sizeof(*y));
        compute_double(made, row->ffn, x + row->token * n, false, mask, 0, n_ff, h, y);
        double error_of_row = 0.0, size_of_row = 0.0, most = 0.0;
        add_distance(row->y, y, n, &error_of_row, &size_of_row);
        for (int64_t j = 0; j < n; ++j) {
            most = fmax(most, fabs((double)x[row->token * n + j]));
        }
        y_error += error_of_row / pow(most, 4.0); // y grows with the square of x: so all rows count alike
        y_size += size_of_row / pow(most, 4.0);
        want.neurons += (uint64_t)(range->end - range->first);
        for (int64_t k = range->first; k < range->end; ++k) {
            want.predicted += mask[k / 32] >> k % 32 & 1;
            want.active += h[k] != 0.0;
        }
    }
    CHECK(y_error <= prefill_nmse(layer) * y_size, "y: %g of %g", y_error, y_size);
    // A neuron whose gate or up is as close to 0 as what is rounded can be active on one side alone.
    const int64_t off = (int64_t)r->counts.active - (int64_t)want.active;
    CHECK(r->counts.neurons == want.neurons && r->counts.predicted == want.predicted && off * off <= 4 &&
              r->counts.gate_positive >= r->counts.active && r->counts.gate_positive <= want.predicted,
          "counted %d %d %d, not %d %d %d", (int)r->counts.neurons, (int)r->counts.predicted, (int)r->counts.active,
          (int)want.neurons, (int)want.predicted, (int)want.active);
    free(h);
    free(y);
}

static const uint32_t * random_masks(const struct tsffn_layer * layer, int64_t n_rows, int density, uint32_t * masks) {
    for (int64_t i = 0; i < n_rows * layer->n_ff; ++i) {
        const int64_t row = i / layer->n_ff, k = i % layer->n_ff;
        const bool on = (int)(random_bits() % 1000) < density;
        masks[(size_t)row * mask_words(layer) + (size_t)k / 32] |= (uint32_t)on << k % 32;
    }
    return masks;
}

// density: as for test_calls. `again`: the same call once more, its warps and lanes in another order.
static void test_prefill_call(const struct random_layer * made, enum where where, int64_t n_tokens, int density,
                              bool streams, bool again) {
    const struct tsffn_layer * layer = &made->layer;
    const bool predictor = layer->ffns[0].fc1.data != NULL && density < 0;
    const int64_t most = 2 * n_tokens;
    const size_t mask_bytes = (size_t)most * mask_words(layer) * sizeof(uint32_t);
    struct tsffn_range ranges[MAX_FFNS];
    choose(where, layer, ranges);
    struct device d;
    CHECK(open_device_for(made, ranges, predictor, most, &d), "%s", error);
    float * x = allocate((size_t)(n_tokens * layer->n_embd) * sizeof(float));
    for (int64_t j = 0; j < n_tokens * layer->n_embd; ++j) {
        x[j] = ldexpf(random_float(), (int)(j / layer->n_embd) % 40 - 20); // rows of all sizes
    }
    struct results r = new_results_for(layer, (size_t)most);
    const int64_t n_rows = make_rows(layer, n_tokens, &r);
    for (int64_t i = 0; i < n_rows; ++i) {
        r.rows[i].h = NULL;
    }
    uint32_t * given = allocate(mask_bytes);
    const uint32_t * masks = density >= 0 ? random_masks(layer, n_rows, density, given) : NULL;
    CHECK(compute_all(&d, made, ranges, x, n_tokens, n_rows, masks, streams, &r), "%s", error);
    if (masks != NULL) {
        CHECK(memcmp(r.masks, masks, (size_t)n_rows * mask_words(layer) * sizeof(uint32_t)) == 0, "given masks");
    } else if (predictor) {
        check_masks(made, x, n_rows, &r);
    }
    check_prefill(made, ranges, x, n_rows, streams, &r);
    CHECK(density == 0 || (where == NONE && !streams) || r.counts.active > 0, "nothing is computed");
    if (again) {
        const size_t y_bytes = (size_t)(n_rows * layer->n_embd) * sizeof(float);
        float * y = allocate(y_bytes);
        memcpy(y, r.y, y_bytes);
        memcpy(given, r.masks, mask_bytes);
        setenv("TSFFN_HOST_SEED", "7", 1);
        CHECK(compute_all(&d, made, ranges, x, n_tokens, n_rows, masks, streams, &r), "%s", error);
        unsetenv("TSFFN_HOST_SEED");
        CHECK(memcmp(y, r.y, y_bytes) == 0 && memcmp(given, r.masks, mask_bytes) == 0, "another order, other bits");
        free(y);
    }
    free_results(&r);
    free(given);
    free(x);
    close_device(&d);
    CHECK(host_allocations() == 0, "%d allocations are left", host_allocations());
}

// Every type, with and without experts, everywhere, masks given or of a predictor, streamed or not; up to 512 rows.
static void test_prefill(void) {
    static const int64_t tokens[] = {17, 31, 32, 33, 128};
    static const int densities[] = {100, -1, 0, 10, 500};
    const enum tsffn_layout panels = TSFFN_LAYOUT_PANELS;
    const struct predictor_kind kinds[] = {
        {GGML_Q4_0, TSFFN_TYPE_Q3_NL, 64, panels, 0.0f, true, false},
        {GGML_Q8_0, GGML_Q4_0, 64, panels, 0.0f, false, true},
        {0},
    };
    CHECK(!is_host || (host_mma_error() > 0.0 && host_mma_error() <= 17.0), "mma: %g", host_mma_error());
    int n = 0;
    for (int type = 0; type < N_TYPES; ++type) {
        for (int n_ffns = 1; n_ffns <= MAX_FFNS; n_ffns += 2) {
            const struct predictor_kind * kind = &kinds[(type + n_ffns / 2) % 3];
            struct random_layer * made =
                make_layer(96, 208, n_ffns, TYPES[type], n_ffns == 1 ? TYPES[type] : TYPES[(type + 1) % N_TYPES],
                           type % 2 == 0 ? TSFFN_ACTIVATION_DRELU : TSFFN_ACTIVATION_REGLU, kind);
            for (int k = 0; k < 5; ++k, ++n) {
                test_prefill_call(made, (enum where)(n % N_WHERE), tokens[(n + type) % 5], densities[k], n % 3 != 1,
                                  n % 4 == 0);
            }
            free_layer(made);
        }
    }
    // More than one chunk of neurons, and of streamed ones; a width that is no multiple of a tile.
    struct random_layer * made = make_layer(32, 4400, 1, GGML_F16, GGML_F16, TSFFN_ACTIVATION_DRELU, &kinds[2]);
    test_prefill_call(made, ALL, 40, 100, false, false);
    test_prefill_call(made, NONE, 40, 700, true, false);
    free_layer(made);
    made = make_layer(160, 96, 1, GGML_Q4_0, GGML_Q4_0, TSFFN_ACTIVATION_DRELU, &kinds[0]);
    test_prefill_call(made, PREFIX, 512, -1, true, false);
    free_layer(made);
}

// Every call of CUDA fails once, alone or with all that follow, in a call whose other neurons are streamed.
static void test_prefill_failures(void) {
    const struct predictor_kind kind = {GGML_Q4_0, TSFFN_TYPE_Q3_NL, 32, TSFFN_LAYOUT_PANELS, 0.0f, true, false};
    struct random_layer * made = make_layer(64, 96, 1, GGML_Q4_0, GGML_Q4_0, TSFFN_ACTIVATION_DRELU, &kind);
    enum { ROWS = 17 };
    const struct tsffn_range range = {0, 32};
    float x[ROWS * 64];
    for (int j = 0; j < ROWS * 64; ++j) {
        x[j] = random_float();
    }
    struct results r = new_results_for(&made->layer, ROWS);
    for (int64_t i = make_rows(&made->layer, ROWS, &r) - 1; i >= 0; --i) {
        r.rows[i].h = NULL;
    }
    for (int for_good = 0; for_good < 2; ++for_good) {
        bool failed = true;
        int call = 1;
        for (; failed; ++call) {
            struct device d = {0};
            error[0] = '\0';
            host_fail(call, for_good);
            failed = !open_device_for(made, &range, true, ROWS, &d) ||
                     !compute_all(&d, made, &range, x, ROWS, ROWS, NULL, true, &r);
            CHECK(failed == (strncmp(error, "CUDA: ", 6) == 0), "call %d: '%s'", call, error);
            if (d.queue != NULL && failed && for_good == 0) { // the queue still works
                host_fail(0, 0);
                CHECK(compute_all(&d, made, &range, x, ROWS, ROWS, NULL, true, &r), "after call %d: %s", call, error);
                check_prefill(made, &range, x, ROWS, true, &r);
            }
            close_device(&d);
            CHECK(host_allocations() == 0, "call %d: %d allocations are left", call, host_allocations());
        }
        CHECK(call > 100, "only %d calls", call);
        check_prefill(made, &range, x, ROWS, true, &r);
    }
    host_fail(0, 0);
    free_results(&r);
    free_layer(made);
}

// What a queue of prefill does not take.
static void test_prefill_refusals(void) {
    struct random_layer * made = make_layer(64, 64, 1, GGML_F16, GGML_F16, TSFFN_ACTIVATION_DRELU, &NO_PREDICTOR);
    const struct tsffn_range range = {0, 32};
    const struct tsffn_cuda_workers workers = {run_one_by_one, 1};
    struct device d;
    CHECK(open_device_for(made, &range, false, 32, &d), "%s", error);
    struct results r = new_results_for(&made->layer, 32);
    float * x = allocate(32 * 64 * sizeof(float));
    expect(!compute_all(&d, made, &range, x, 32, make_rows(&made->layer, 32, &r), NULL, true, &r),
           "nobody who wants h");
    size_t bytes;
    expect(!module->stream(d.queue, &made->layer, &workers, &bytes, error, sizeof(error)),
           "a call of prefill that is begun");
    close_device(&d);
    host_limits((size_t)1 << 30, 20 << 10);
    expect(!open_device_for(made, &range, false, 32, &d), "prefill: expected");
    close_device(&d);
    host_limits((size_t)1 << 30, 64 << 10);
    free(x);
    free_results(&r);
    free_layer(made);
}

// For a thread of the host per thread of the device: few rows, but several tiles of them, chunks, and streamed ones.
static void test_prefill_tiny(void) {
    const struct predictor_kind kind = {GGML_Q8_0, TSFFN_TYPE_Q3_NL, 32, TSFFN_LAYOUT_PANELS, 0.0f, true, false};
    struct random_layer * made = make_layer(64, 144, 2, GGML_Q4_0, GGML_Q8_0, TSFFN_ACTIVATION_DRELU, &kind);
    test_prefill_call(made, PREFIX, 2, -1, true, false);
    free_layer(made);
}
