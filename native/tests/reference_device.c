// A device (src/ffn/device.h) in plain C, as the formulas stand: every weight row is widened to f32, every sum is one
// of doubles, one thread computes. To be read in one sitting, and to hold other devices against.
//
//     h_i = f(gate_i . x) * g(up_i . x) * m_i,  y = sum_i h_i down_i
//     f, g: the factors of the layer's activation; of dReLU both are relu
//     m_i = [logit_i > threshold], logits as ffn/layer.h has them; 1 without a predictor
//     top-k: h_i = 0 unless fewer than `keep` neurons have a larger |h|, of equal ones those before i
//
// A module that TSFFN_DEVICE names.
#include "ffn/device.h"

#include "ggml.h"

#include <stdlib.h>
#include <string.h>

// ---- weights

// Bytes of row i of a predictor's matrix, in `row` where they do not lie side by side: panels of docs/format.md.
static const uint8_t * row_bytes(const struct tsffn_weights * m, int64_t i, uint8_t * row) {
    if (m->layout == TSFFN_LAYOUT_ROWS || i >= m->n_rows / TSFFN_PANEL_ROWS * TSFFN_PANEL_ROWS) {
        return m->data + (size_t)i * m->row_bytes;
    }
    const bool is_q3_nl = m->type == TSFFN_TYPE_Q3_NL;
    const size_t k = (size_t)i % TSFFN_PANEL_ROWS, n_blocks = (size_t)m->n_cols / TSFFN_BLOCK_SIZE;
    const size_t head = is_q3_nl ? 1 : 2; // bytes of a block before its q: the scales of q3_nl, or d
    const size_t block_bytes = is_q3_nl ? TSFFN_Q3_NL_BYTES : m->row_bytes / n_blocks;
    const uint8_t * at = m->data + (size_t)(i - (int64_t)k) * m->row_bytes;
    uint8_t * to = row;
    if (is_q3_nl) {
        memcpy(to, at + TSFFN_Q3_NL_HEADER * k, TSFFN_Q3_NL_HEADER);
        to += TSFFN_Q3_NL_HEADER;
        at += TSFFN_Q3_NL_HEADER * TSFFN_PANEL_ROWS;
    }
    for (size_t b = 0; b < n_blocks; ++b) {
        memcpy(to, at + head * k, head);
        for (size_t g = 0; 4 * g < block_bytes - head; ++g) {
            memcpy(to + head + 4 * g, at + head * TSFFN_PANEL_ROWS + 4 * (TSFFN_PANEL_ROWS * g + k), 4);
        }
        to += block_bytes;
        at += block_bytes * TSFFN_PANEL_ROWS;
    }
    return row;
}

// The code of weight 4 g + k of a block of q3_nl.
static int q3_nl_code(uint8_t q[3][4], int g, int k) {
    if (g < 6) {
        return q[g % 3][k] >> (g < 3 ? 0 : 3) & 7;
    }
    return (q[g - 6][k] >> 6) | (q[2][k] >> g & 1) << 2;
}

static void widen_q3_nl(const uint8_t * row, float * w, int64_t n) {
    static const float levels[8] = {-15, -9, -5, -2, 1, 4, 8, 13};
    ggml_fp16_t d;
    memcpy(&d, row, sizeof(d));
    for (int64_t b = 0; b < n / TSFFN_BLOCK_SIZE; ++b) {
        const uint8_t * block = row + TSFFN_Q3_NL_HEADER + b * TSFFN_Q3_NL_BYTES;
        uint8_t q[3][4];
        memcpy(q, block + 1, sizeof(q));
        for (int j = 0; j < TSFFN_BLOCK_SIZE; ++j) {
            const int nibble = block[0] >> (j < 16 ? 0 : 4) & 15;
            const int scale = nibble < 8 ? nibble : nibble - 16;
            w[b * TSFFN_BLOCK_SIZE + j] = ggml_fp16_to_fp32(d) * (float)scale * levels[q3_nl_code(q, j / 4, j % 4)];
        }
    }
}

struct scratch {
    uint8_t * row; // bytes of a row
    float * w;     // its weights
};

// row . x, of n weights; s->w holds them afterwards. x NULL: only that.
static double dot_row(const struct scratch * s, int type, const uint8_t * row, int64_t n, const double * x) {
    if (type == TSFFN_TYPE_Q3_NL) {
        widen_q3_nl(row, s->w, n);
    } else if (type == GGML_TYPE_F32) {
        memcpy(s->w, row, (size_t)n * sizeof(float));
    } else {
        ggml_get_type_traits((enum ggml_type)type)->to_float(row, s->w, n);
    }
    double sum = 0.0;
    for (int64_t j = 0; x != NULL && j < n; ++j) {
        sum += (double)s->w[j] * x[j];
    }
    return sum;
}

static double dot(const struct scratch * s, const struct tsffn_weights * m, int64_t i, const double * x) {
    return dot_row(s, m->type, row_bytes(m, i, s->row), m->n_cols, x);
}

// Row i of gate, up or down. The neuron is brought in, if need be, for as long as it is read.
static double dot_part(const struct scratch * s, const struct tsffn_layer * layer, const struct tsffn_neurons * neurons,
                       enum tsffn_part part, int64_t i, const double * x) {
    const int32_t neuron = (int32_t)i;
    tsffn_neurons_announce(neurons, &neuron, NULL, 1);
    tsffn_neurons_await(neurons, &neuron, 1);
    const double sum = dot_row(s, layer->types[part], tsffn_neuron_row(neurons, part, i), layer->n_embd, x);
    tsffn_neurons_release(neurons, &neuron, 1);
    return sum;
}

// ---- a row of a call

static double relu(double v) {
    return v > 0.0 ? v : 0.0;
}

static double factor(struct tsffn_factor f, double v) {
    return f.kind == TSFFN_FACTOR_LINEAR || (v > 0.0 && v >= (double)f.threshold) ? v : 0.0;
}

// mask [n_ff]
static void predict(const struct scratch * s, const struct tsffn_layer * layer, const struct tsffn_ffn_weights * ffn,
                    const double * x, double * p, double * hidden, bool * mask) {
    if (ffn->fc2.data == NULL) {
        memset(mask, 1, (size_t)layer->n_ff * sizeof(*mask));
        return;
    }
    for (int64_t j = 0; j < layer->n_embd; ++j) {
        p[j] = layer->pred_scale != NULL ? x[j] * (double)layer->pred_scale[j] : x[j];
    }
    const bool direct = layer->form == TSFFN_PREDICTOR_GATE || layer->form == TSFFN_PREDICTOR_GATE_UP;
    for (int64_t k = 0; !direct && k < ffn->fc1.n_rows; ++k) {
        const double v = dot(s, &ffn->fc1, k, p);
        hidden[k] = layer->form == TSFFN_PREDICTOR_LINEAR ? v : relu(v);
    }
    const float * thresholds = ffn->thresholds;
    for (int64_t i = 0; i < layer->n_ff; ++i) {
        double logit = dot(s, &ffn->fc2, i, direct ? p : hidden) - (thresholds != NULL ? (double)thresholds[i] : 0.0);
        if (layer->form == TSFFN_PREDICTOR_GATE_UP) {
            const double of_up =
                dot(s, &ffn->fc3, i, p) - (thresholds != NULL ? (double)thresholds[layer->n_ff + i] : 0.0);
            logit = of_up < logit ? of_up : logit;
        }
        mask[i] = layer->on_when_equal ? logit >= (double)layer->threshold : logit > (double)layer->threshold;
    }
}

// Top-k: clears `stays` where a neuron is not among the `keep` largest.
static void choose(int64_t n, int64_t keep, const double * h, bool * stays) {
    for (int64_t i = 0; i < n; ++i) {
        int64_t before = 0;
        for (int64_t j = 0; j < n; ++j) {
            const double mine = h[i] < 0.0 ? -h[i] : h[i], other = h[j] < 0.0 ? -h[j] : h[j];
            before += other > mine || (other == mine && j < i);
        }
        stays[i] = before < keep;
    }
}

// h [n_ff] of a row.
static void compute_h(const struct tsffn_layer * layer, const struct tsffn_call * call,
                      const struct tsffn_ffn_weights * ffn, const double * x, double * h, const struct scratch * s,
                      bool * mask, struct tsffn_counts * counts) {
    for (int64_t i = 0; i < layer->n_ff; ++i) {
        const double gate = mask[i] ? dot_part(s, layer, &ffn->neurons, TSFFN_PART_GATE, i, x) : 0.0;
        const double f = factor(layer->activation.gate, gate);
        const double up = f != 0.0 ? dot_part(s, layer, &ffn->neurons, TSFFN_PART_UP, i, x) : 0.0;
        h[i] = f * factor(layer->activation.up, up);
        counts->neurons += 1;
        counts->predicted += mask[i];
        counts->gate_positive += f != 0.0;
    }
    if (call->keep > 0) {
        choose(layer->n_ff, call->keep, h, mask);
    }
    for (int64_t i = 0; i < layer->n_ff; ++i) {
        h[i] = mask[i] ? h[i] : 0.0;
        counts->active += h[i] != 0.0;
    }
}

// What `call` computes of one row, of activations x: out [n_embd or n_ff], and h [n_ff].
static void compute_row(const struct tsffn_layer * layer, const struct tsffn_call * call,
                        const struct tsffn_ffn_weights * ffn, const double * x, double * out, double * h,
                        const struct scratch * s, double * p, double * hidden, bool * mask,
                        struct tsffn_counts * counts) {
    const bool fused = call->op == TSFFN_OP_FUSED;
    if (fused || call->op == TSFFN_OP_GATE) {
        predict(s, layer, ffn, x, p, hidden, mask);
    }
    if (fused) {
        compute_h(layer, call, ffn, x, h, s, mask, counts);
    }
    if (fused || call->op == TSFFN_OP_DOWN) {
        memset(out, 0, (size_t)layer->n_embd * sizeof(*out));
    }
    for (int64_t i = 0; i < layer->n_ff; ++i) {
        if (call->op == TSFFN_OP_GATE || call->op == TSFFN_OP_UP) {
            const bool is_gate = call->op == TSFFN_OP_GATE;
            const enum tsffn_part part = is_gate ? TSFFN_PART_GATE : TSFFN_PART_UP;
            out[i] = is_gate && !mask[i] ? 0.0 : dot_part(s, layer, &ffn->neurons, part, i, x);
            continue;
        }
        const double a = fused ? h[i] : x[i];
        if (a != 0.0) {
            dot_part(s, layer, &ffn->neurons, TSFFN_PART_DOWN, i, NULL);
            for (int64_t j = 0; j < layer->n_embd; ++j) {
                out[j] += a * (double)s->w[j];
            }
        }
    }
}

static bool compute(void * unused, const void * prepared, const struct tsffn_call * call,
                    struct tsffn_counts * counts) {
    (void)unused;
    const struct tsffn_layer * layer = prepared;
    const bool down = call->op == TSFFN_OP_DOWN;
    const int64_t n_in = down ? layer->n_ff : layer->n_embd;
    const int64_t n_out = down || call->op == TSFFN_OP_FUSED ? layer->n_embd : layer->n_ff;
    int64_t widest = layer->n_embd > layer->n_ff ? layer->n_embd : layer->n_ff;
    for (int64_t e = 0; e < layer->n_ffns; ++e) {
        widest = layer->ffns[e].fc1.n_rows > widest ? layer->ffns[e].fc1.n_rows : widest;
    }
    const size_t n = (size_t)widest;
    // Outputs may lie over any input: they are written when all rows are computed.
    double * out = malloc((size_t)(call->n_rows * n_out) * sizeof(*out));
    double * h = malloc((size_t)(call->n_rows * layer->n_ff) * sizeof(*h));
    double *x = malloc(n * sizeof(*x)), *p = malloc(n * sizeof(*p)), *hidden = malloc(n * sizeof(*hidden));
    bool * mask = malloc((size_t)layer->n_ff * sizeof(*mask));
    struct scratch s = {.row = malloc(n * sizeof(float)), .w = malloc(n * sizeof(float))};
    const bool ok = out != NULL && h != NULL && x != NULL && p != NULL && hidden != NULL && mask != NULL &&
                    s.row != NULL && s.w != NULL && call->profile == NULL;
    for (int64_t r = 0; ok && r < call->n_rows; ++r) {
        const float * in = (const float *)(call->x + (size_t)call->rows[r].token * call->x_stride);
        for (int64_t j = 0; j < n_in; ++j) {
            x[j] = (double)in[j];
        }
        compute_row(layer, call, &layer->ffns[call->rows[r].ffn], x, out + r * n_out, h + r * layer->n_ff, &s, p,
                    hidden, mask, counts);
    }
    for (int64_t r = 0; ok && r < call->n_rows; ++r) {
        for (int64_t j = 0; j < n_out; ++j) {
            call->rows[r].y[j] = (float)out[r * n_out + j];
        }
        for (int64_t i = 0; call->op == TSFFN_OP_FUSED && call->rows[r].h != NULL && i < layer->n_ff; ++i) {
            call->rows[r].h[i] = (float)h[r * layer->n_ff + i];
        }
    }
    void * const memory[] = {out, h, x, p, hidden, mask, s.row, s.w};
    for (size_t k = 0; k < sizeof(memory) / sizeof(memory[0]); ++k) {
        free(memory[k]);
    }
    return ok;
}

// ---- the device

static bool init(void) {
    return true;
}

static bool supports(int type) {
    return type == TSFFN_TYPE_Q3_NL || type == GGML_TYPE_F32 ||
           (type >= 0 && type < GGML_TYPE_COUNT && ggml_get_type_traits((enum ggml_type)type)->to_float != NULL);
}

static void * prepare(const struct tsffn_layer * layer) {
    return (void *)layer;
}

static void release(void * prepared) {
    (void)prepared;
}

static void * open_scratch(void) {
    static char nothing;
    return &nothing;
}

static void close_scratch(void * scratch) {
    (void)scratch;
}

__attribute__((visibility("default"))) const struct tsffn_device * tsffn_device_module(void);

const struct tsffn_device * tsffn_device_module(void) {
    static const struct tsffn_device device = {
        .version = TSFFN_DEVICE_VERSION,
        .name = "reference",
        .init = init,
        .supports = supports,
        .prepare = prepare,
        .release = release,
        .open = open_scratch,
        .close = close_scratch,
        .compute = compute,
    };
    return &device;
}
