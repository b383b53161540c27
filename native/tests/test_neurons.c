// A second memory behind ffn/neurons.h: neurons lie shuffled behind a table, are there only while they are needed, and
// are overwritten when they are not. Every mode gives bit for bit what it gives when the rows stay where they are.
#include "check.h"
#include "cpu/ffn.h"
#include "cpu/kernels/kernels.h"

#include <pthread.h>
#include <string.h>

enum {
    N_EMBD = 96,
    N_FF = 200,
    N_EXPERT = 3,
    RANK = 32,
    MAX_TOKENS = 65,
    MAX_ROWS = 2 * MAX_TOKENS,
    MAX_ROW_BYTES = 400
};
_Static_assert(N_EMBD * sizeof(float) <= MAX_ROW_BYTES, "rows of f32 fit");

// ---- the memory

enum { SLOT_BYTES = TSFFN_N_PARTS * MAX_ROW_BYTES, GARBAGE = 0xff }; // NaN as f32 and as the scale of a block

// The neurons of one FFN.
struct moving {
    struct tsffn_neurons home; // where they really are
    int32_t slot_of[N_FF];     // a permutation
    uint8_t slots[N_FF][SLOT_BYTES];
    uint8_t nothing[SLOT_BYTES];
    const uint8_t * table[N_FF];
    int users[N_FF]; // announced and not yet released
    int n_held;      // the sum of these
    bool there[N_FF], expected[N_FF];
    uint64_t n_announced, n_awaited;
    pthread_mutex_t mutex;
};

static int64_t room_for; // neurons

static void announce(const struct tsffn_neurons * neurons, const int32_t * list, const uint64_t * rows, int64_t n) {
    struct moving * m = neurons->state;
    pthread_mutex_lock(&m->mutex);
    for (int64_t k = 0; k < n; ++k) {
        CHECK(list[k] >= 0 && list[k] < N_FF && (k == 0 || list[k - 1] < list[k]), "not ascending");
        CHECK(rows == NULL || rows[k] != 0, "neuron %d is announced for no row", list[k]);
        m->users[list[k]] += 1;
    }
    m->n_held += (int)n;
    // Who announces a chunk of its own would wait, which this memory does not.
    CHECK(m->n_held <= room_for || n <= TSFFN_MIN_ROOM, "%d neurons are held, with room for %d", m->n_held,
          (int)room_for);
    m->n_announced += (uint64_t)n;
    pthread_mutex_unlock(&m->mutex);
}

static void await(const struct tsffn_neurons * neurons, const int32_t * list, int64_t n) {
    struct moving * m = neurons->state;
    pthread_mutex_lock(&m->mutex);
    for (int64_t k = 0; k < n; ++k) {
        const int32_t i = list[k];
        CHECK(m->users[i] > 0, "neuron %d is awaited, but not announced", i);
        if (m->there[i]) {
            continue;
        }
        for (int part = 0; part < TSFFN_N_PARTS; ++part) {
            memcpy(m->slots[m->slot_of[i]] + neurons->rows[part].offset, tsffn_rows_get(&m->home.rows[part], i),
                   m->home.rows[part].row_bytes);
        }
        m->table[i] = m->slots[m->slot_of[i]];
        m->there[i] = true;
    }
    m->n_awaited += (uint64_t)n;
    pthread_mutex_unlock(&m->mutex);
}

static void release(const struct tsffn_neurons * neurons, const int32_t * list, int64_t n) {
    struct moving * m = neurons->state;
    pthread_mutex_lock(&m->mutex);
    for (int64_t k = 0; k < n; ++k) {
        const int32_t i = list[k];
        CHECK(m->users[i] > 0, "neuron %d is released more often than announced", i);
        m->users[i] -= 1;
        m->n_held -= 1;
        if (m->users[i] == 0) {
            memset(m->slots[m->slot_of[i]], GARBAGE, SLOT_BYTES);
            m->table[i] = m->nothing;
            m->there[i] = false;
        }
    }
    pthread_mutex_unlock(&m->mutex);
}

static int64_t room(const struct tsffn_neurons * neurons) {
    (void)neurons;
    return room_for;
}

static void expect(const struct tsffn_neurons * neurons, const int32_t * list, int64_t n) {
    struct moving * m = neurons->state;
    pthread_mutex_lock(&m->mutex);
    for (int64_t k = 0; k < n; ++k) {
        CHECK(list[k] >= 0 && list[k] < N_FF && !m->expected[list[k]], "neuron %d is expected", list[k]);
        m->expected[list[k]] = true;
    }
    pthread_mutex_unlock(&m->mutex);
}

static const struct tsffn_memory moving_memory = {
    .announce = announce, .await = await, .release = release, .room = room, .expect = expect};
static struct moving moving[N_EXPERT];

static struct tsffn_neurons move(struct moving * m, const struct tsffn_neurons * home) {
    memset(m->slots, GARBAGE, sizeof(m->slots));
    memset(m->nothing, GARBAGE, sizeof(m->nothing));
    m->home = *home;
    m->n_announced = m->n_awaited = 0;
    memset(m->expected, 0, sizeof(m->expected));
    for (int32_t i = 0; i < N_FF; ++i) {
        m->slot_of[i] = (i * 77 + 13) % N_FF;
        m->table[i] = m->nothing;
    }
    struct tsffn_neurons neurons = {.memory = &moving_memory, .state = m};
    for (int part = 0; part < TSFFN_N_PARTS; ++part) {
        neurons.rows[part] = (struct tsffn_rows){
            .row_bytes = home->rows[part].row_bytes,
            .table = m->table,
            .offset = (size_t)((part + 1) % TSFFN_N_PARTS) * MAX_ROW_BYTES, // up, down, gate
        };
    }
    return neurons;
}

// ---- a layer

static uint8_t rows[N_EXPERT][TSFFN_N_PARTS][N_FF * MAX_ROW_BYTES];
static float fc1[N_EXPERT][RANK * N_EMBD], fc2[N_EXPERT][N_FF * RANK];
static float x[MAX_ROWS * N_FF]; // the activations of DOWN are the widest

static struct tsffn_row_type type_of(const struct tsffn_kernels * kernels, enum tsffn_format format) {
    struct tsffn_row_type type = {
        .name = "own",
        .block_size = 1,
        .block_bytes = sizeof(float),
        .x_format = -1,
        .x_block_size = 1,
        .x_block_bytes = sizeof(float),
        .own_dots = kernels->dots[format],
        .own_axpys = kernels->axpys[format],
        .own_add_rows = kernels->add_rows[format],
    };
    if (format == TSFFN_FORMAT_Q4_0) {
        type.block_size = TSFFN_BLOCK_SIZE;
        type.block_bytes = TSFFN_Q4_0_BYTES;
        type.x_format = -2;
        type.x_header_bytes = TSFFN_I16_HEADER;
        type.x_block_size = TSFFN_BLOCK_SIZE;
        type.x_block_bytes = TSFFN_I16_BLOCK_BYTES;
        type.convert_x = tsffn_convert_i16;
    }
    return type;
}

static void fill_rows(uint8_t * to, int n_rows, const struct tsffn_row_type * type) {
    const size_t bytes = (size_t)n_rows * tsffn_row_bytes(type, N_EMBD);
    for (size_t k = 0; type->block_size == 1 && k < bytes; k += sizeof(float)) {
        const float w = random_float();
        memcpy(to + k, &w, sizeof(w));
    }
    for (size_t k = 0; type->block_size > 1 && k < bytes; ++k) {
        const uint8_t scale[2] = {(uint8_t)random_bits(), 0x2c}; // f16 in [1/16, 1/8)
        const size_t at = k % TSFFN_Q4_0_BYTES;
        to[k] = at < sizeof(scale) ? scale[at] : (uint8_t)random_bits();
    }
}

static void describe(struct tsffn_ffn * ffns, const struct tsffn_row_type * type, const struct tsffn_row_type * f32,
                     bool predictor) {
    for (int e = 0; e < N_EXPERT; ++e) {
        ffns[e] = (struct tsffn_ffn){0};
        for (int part = 0; part < TSFFN_N_PARTS; ++part) {
            fill_rows(rows[e][part], N_FF, type);
            ffns[e].neurons.rows[part] = tsffn_rows_at(rows[e][part], N_FF, tsffn_row_bytes(type, N_EMBD));
        }
        if (predictor) {
            ffns[e].fc1 = (struct tsffn_matrix){f32, (const uint8_t *)fc1[e], RANK, N_EMBD, TSFFN_LAYOUT_ROWS};
            ffns[e].fc2 = (struct tsffn_matrix){f32, (const uint8_t *)fc2[e], N_FF, RANK, TSFFN_LAYOUT_ROWS};
        }
    }
}

// ---- calls

struct result {
    float y[MAX_ROWS * N_FF], h[MAX_ROWS * N_FF];
    uint64_t tokens[N_EXPERT], neurons[TSFFN_PROFILE_COUNTS][N_EXPERT][N_FF];
    uint64_t histograms[TSFFN_PROFILE_HISTOGRAMS][TSFFN_PROFILE_BINS];
    double squares[TSFFN_PROFILE_SQUARES][N_EXPERT][N_FF];
    struct tsffn_counts counts;
};

static void compute(struct tsffn_workspace * ws, const struct tsffn_cpu_layer * layer, struct tsffn_call call,
                    int64_t n_tokens, bool moe, bool profile, struct result * result) {
    static struct tsffn_row call_rows[MAX_ROWS];
    memset(result, 0, sizeof(*result));
    int64_t n_rows = 0;
    for (int e = 0; e < (moe ? N_EXPERT : 1); ++e) {
        for (int64_t t = 0; t < n_tokens; ++t) {
            if (!moe || t % N_EXPERT == e || (t + 1) % N_EXPERT == e) { // top-2
                call_rows[n_rows] = (struct tsffn_row){
                    .ffn = e,
                    .token = (int32_t)t,
                    .y = result->y + n_rows * N_FF,
                    .h = call.op == TSFFN_OP_FUSED ? result->h + n_rows * N_FF : NULL,
                };
                ++n_rows;
            }
        }
    }
    const struct tsffn_profile into = {result->tokens, &result->neurons[0][0][0], &result->histograms[0][0],
                                       &result->squares[0][0][0]};
    call.rows = call_rows;
    call.n_rows = n_rows;
    call.x = (const char *)x;
    call.x_stride = N_FF * sizeof(float);
    call.n_tokens = n_tokens;
    call.profile = profile ? &into : NULL;
    CHECK(tsffn_compute(ws, layer, &call, &result->counts), "out of memory");
    result->counts.ns_predictor = result->counts.ns_ffn = 0;
}

static void test_call(struct tsffn_workspace * ws, struct tsffn_cpu_layer layer, const struct tsffn_ffn * home,
                      struct tsffn_call call, int64_t n_tokens, bool moe, bool profile) {
    static struct result expected, found;
    struct tsffn_ffn moved[N_EXPERT];
    for (int e = 0; e < N_EXPERT; ++e) {
        moved[e] = home[e];
        moved[e].neurons = move(&moving[e], &home[e].neurons);
    }
    layer.ffns = home;
    compute(ws, &layer, call, n_tokens, moe, profile, &expected);
    layer.ffns = moved;
    compute(ws, &layer, call, n_tokens, moe, profile, &found);
    CHECK(memcmp(&expected, &found, sizeof(found)) == 0, "operation %d, %d tokens on %d threads: another result",
          (int)call.op, (int)n_tokens, call.n_threads);
    for (int e = 0; e < N_EXPERT; ++e) {
        for (int i = 0; i < N_FF; ++i) {
            CHECK(moving[e].users[i] == 0, "neuron %d is never released", i);
        }
    }
    CHECK(moving[0].n_awaited > 0, "nothing was asked for");
    const bool one_row = call.op == TSFFN_OP_FUSED && !profile && !moe && n_tokens == 1;
    // Top-k reads gate and up of all, and then down of those that it keeps.
    const uint64_t needed = found.counts.predicted + (call.keep > 0 ? found.counts.active : 0);
    CHECK(!one_row || moving[0].n_announced == needed, "announced %d neurons, not the %d that are on",
          (int)moving[0].n_announced, (int)needed);
}

static void test_layer(struct tsffn_workspace * ws, const struct tsffn_cpu_layer * layer,
                       const struct tsffn_ffn * home) {
    static const int64_t batches[] = {1, 7, MAX_TOKENS};
    static const enum tsffn_op ops[] = {TSFFN_OP_FUSED, TSFFN_OP_GATE, TSFFN_OP_UP, TSFFN_OP_DOWN};
    for (int k = 0; k < 3 * 3 * 2 * 2; ++k) {
        const int64_t n_tokens = batches[k % 3];
        const bool moe = k / 9 % 2 == 1;
        struct tsffn_call call = {.n_threads = 1 + k / 3 % 3};
        // All at once, or in two rounds for each FFN.
        room_for = k / 18 == 0 ? N_EXPERT * N_FF : TSFFN_MIN_ROOM;
        for (size_t op = 0; op < sizeof(ops) / sizeof(ops[0]); ++op) {
            call.op = ops[op];
            test_call(ws, *layer, home, call, n_tokens, moe, false);
        }
        call.op = TSFFN_OP_FUSED;
        test_call(ws, *layer, home, call, n_tokens, moe, true);
        call.dense = home[0].fc1.data == NULL;
        test_call(ws, *layer, home, call, n_tokens, moe, false);
        call.dense = false;
        call.keep = 20;
        test_call(ws, *layer, home, call, n_tokens, moe, false);
    }
}

// Of a dense layer and the one behind it, whose predictor has another rank: what that lets through of these activations
// is expected, neither more nor less, and nothing that is computed changes.
static void test_next(struct tsffn_workspace * ws, const struct tsffn_cpu_layer * like, const struct tsffn_ffn * home,
                      int64_t n_tokens, int n_threads) {
    static struct result expected, found;
    struct tsffn_ffn one = home[0], other = home[1];
    one.fc1.n_rows = one.fc2.n_cols = RANK / 2;
    one.neurons = move(&moving[0], &home[0].neurons);
    other.neurons = move(&moving[1], &home[1].neurons);
    struct tsffn_cpu_layer layer = *like, next = *like;
    layer.n_ffns = next.n_ffns = 1;
    layer.ffns = &one;
    next.ffns = &other;
    room_for = N_FF;
    struct tsffn_call call = {.op = TSFFN_OP_FUSED, .n_threads = n_threads};
    compute(ws, &layer, call, n_tokens, false, false, &expected);
    call.next = &next;
    compute(ws, &layer, call, n_tokens, false, false, &found);
    CHECK(memcmp(expected.y, found.y, sizeof(found.y)) == 0 && memcmp(expected.h, found.h, sizeof(found.h)) == 0,
          "another result");

    enum { WORDS = (N_FF + 31) / 32 };
    uint32_t masks[MAX_TOKENS][WORDS];
    call = (struct tsffn_call){.op = TSFFN_OP_MASK, .n_threads = 1, .predicted = &masks[0][0]};
    compute(ws, &next, call, n_tokens, false, false, &found);
    for (int i = 0; i < N_FF; ++i) {
        bool on = false;
        for (int64_t t = 0; t < n_tokens; ++t) {
            on = on || (masks[t][i / 32] >> i % 32 & 1) != 0;
        }
        CHECK(moving[1].expected[i] == (on && n_tokens <= 4) && !moving[0].expected[i], "neuron %d of %d tokens", i,
              (int)n_tokens);
    }
}

int main(void) {
    for (int e = 0; e < N_EXPERT; ++e) {
        pthread_mutex_init(&moving[e].mutex, NULL);
        for (int k = 0; k < RANK * N_EMBD; ++k) {
            fc1[e][k] = random_float();
        }
        for (int k = 0; k < N_FF * RANK; ++k) {
            fc2[e][k] = random_float();
        }
    }
    for (int k = 0; k < MAX_ROWS * N_FF; ++k) {
        x[k] = random_float();
    }
    struct tsffn_workspace * ws = tsffn_workspace_new();
    CHECK(ws != NULL, "out of memory");
    static const enum tsffn_format formats[] = {TSFFN_FORMAT_F32, TSFFN_FORMAT_Q4_0};
    for (int isa = 0; isa < TSFFN_ISA_COUNT; ++isa) {
        const struct tsffn_kernels * kernels = tsffn_kernels_for((enum tsffn_isa)isa);
        if (kernels == NULL) {
            continue;
        }
        const struct tsffn_row_type f32 = type_of(kernels, TSFFN_FORMAT_F32);
        for (int variant = 0; variant < 4; ++variant) {
            const struct tsffn_row_type type = type_of(kernels, formats[variant % 2]);
            struct tsffn_ffn home[N_EXPERT];
            describe(home, &type, &f32, variant / 2 == 1);
            const struct tsffn_cpu_layer layer = {
                .n_embd = N_EMBD,
                .n_ff = N_FF,
                .n_ffns = N_EXPERT,
                .types = {&type, &type, &type},
                .activation = tsffn_activation(TSFFN_ACTIVATION_DRELU, 0.0f),
            };
            test_layer(ws, &layer, home);
            for (int k = 0; variant / 2 == 1 && k < 3 * 3; ++k) {
                static const int64_t batches[] = {1, 3, 7};
                test_next(ws, &layer, home, batches[k % 3], 1 + k / 3);
            }
        }
        printf("%s: ok\n", kernels->name);
    }
    tsffn_workspace_free(ws);
    return 0;
}
