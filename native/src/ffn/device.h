// What computes layers: the CPU of this library, or another module of this interface.
#ifndef TSFFN_DEVICE_H
#define TSFFN_DEVICE_H

#include "layer.h"

// What a call computes. A graph that is cut between the four operations of an FFN needs each of them alone.
enum tsffn_op {
    TSFFN_OP_FUSED, // y[r][0..n_embd) = the whole FFN of x
    TSFFN_OP_GATE,  // y[r][0..n_ff)   = gate . x, 0 where the predictor says no
    TSFFN_OP_UP,    // y[r][0..n_ff)   = up . x
    TSFFN_OP_DOWN,  // y[r][0..n_embd) = sum_i x[r][i] * down_i; x is [n_ff]
    TSFFN_OP_MASK,  // the predictor alone: which neurons are on. y and h are not written
};

// One output row: which token's activations go through which FFN. Rows of a call are sorted by ffn.
struct tsffn_row {
    int32_t ffn;   // of the layer
    int32_t token; // index into the call's x
    float * y;     // written last: it may overlap the memory of any x
    float * h;     // FUSED: [n_ff], receives relu(gate . x) * relu(up . x) * m; NULL when nobody wants it
};

// Activation statistics of one layer, which a call adds to (tsffn.h says what is counted).
enum {
    TSFFN_PROFILE_COUNTS = 6,
    TSFFN_PROFILE_HISTOGRAMS = 3,
    TSFFN_PROFILE_BINS = 130,
    TSFFN_PROFILE_SQUARES = 2,
};
struct tsffn_profile {
    uint64_t * tokens;     // [n_ffns]
    uint64_t * neurons;    // [TSFFN_PROFILE_COUNTS][n_ffns][n_ff]
    uint64_t * histograms; // [TSFFN_PROFILE_HISTOGRAMS][TSFFN_PROFILE_BINS]
    double * squares;      // [TSFFN_PROFILE_SQUARES][n_ffns][n_ff]
};

struct tsffn_call {
    enum tsffn_op op;
    const struct tsffn_row * rows; // [n_rows]
    int64_t n_rows;
    const char * x;  // token t's activations are f32 at x + t * x_stride
    size_t x_stride; // bytes
    int64_t n_tokens;
    int n_threads;
    bool dense; // FUSED: read and multiply every row of gate, up and down, as a dense FFN does; without predictor
    // FUSED, for a call that two devices share: the neurons elsewhere[e] of FFN e are the other one's. No weights of
    // theirs are read, they are not counted, their h is 0, and y is the sum without them. Bounds are multiples of 32,
    // or n_ff. NULL: no neurons. Neither this nor `masks` goes together with `dense`, `keep` or `profile`.
    const struct tsffn_range * elsewhere; // [n_ffns]
    // FUSED: which neurons are on, [n_rows][mask words]; NULL: the predictor decides.
    const uint32_t * masks;
    uint32_t * predicted; // MASK: receives the same
    // FUSED: of each row's neurons only so many add to the output, as tsffn_keep_largest (topk.h) chooses them; without
    // predictor. 0: all.
    int64_t keep;
    // FUSED: add statistics here, and compute gate and up of every neuron; or NULL.
    const struct tsffn_profile * profile;
};

// Counts of one call. A "neuron" is one neuron of one row; bytes are weight bytes that are touched at least once.
struct tsffn_counts {
    uint64_t neurons;       // all, n_ff per row
    uint64_t predicted;     // the predictor said yes (all of them in exact mode)
    uint64_t gate_positive; // and gate > 0
    uint64_t active;        // and up > 0, and it was kept
    uint64_t bytes_predictor;
    uint64_t bytes_ffn;
    uint64_t bytes_dense; // gate, up and down of every FFN with at least one row, once per tile of rows
    uint64_t ns_predictor;
    uint64_t ns_ffn;
};

static inline void tsffn_add_counts(struct tsffn_counts * sum, const struct tsffn_counts * more) {
    sum->neurons += more->neurons;
    sum->predicted += more->predicted;
    sum->gate_positive += more->gate_positive;
    sum->active += more->active;
    sum->bytes_predictor += more->bytes_predictor;
    sum->bytes_ffn += more->bytes_ffn;
    sum->bytes_dense += more->bytes_dense;
    sum->ns_predictor += more->ns_predictor;
    sum->ns_ffn += more->ns_ffn;
}

struct tsffn_device {
    int version; // TSFFN_DEVICE_VERSION
    const char * name;
    // Builds what the functions below need, and may be called again; false where the device cannot work.
    bool (*init)(void);
    // Whether it multiplies with rows of a type.
    bool (*supports)(int type);
    // Once per layer, whose weights are all known: what the device keeps of it, NULL without memory. The layer stays
    // until `release`, and so does what it points to.
    void * (*prepare)(const struct tsffn_layer * layer);
    void (*release)(void * prepared);
    // Scratch memory of one context, which one call at a time uses; NULL without memory.
    void * (*open)(void);
    void (*close)(void * scratch);
    // Computes a call with a prepared layer and adds to `counts`. False: out of memory. For a given number of threads
    // the result of a row does not depend on the other rows of the call.
    bool (*compute)(void * scratch, const void * prepared, const struct tsffn_call * call,
                    struct tsffn_counts * counts);
};
enum { TSFFN_DEVICE_VERSION = 6 };

// cpu/device.c
extern const struct tsffn_device tsffn_cpu_device;

// The device of this process: the CPU, or that of the module which TSFFN_DEVICE names. NULL, with one line in `error`,
// where that cannot be used.
const struct tsffn_device * tsffn_device(char * error, size_t error_size);

// What a module must export under this name.
typedef const struct tsffn_device * (*tsffn_device_module_fn)(void);
#define TSFFN_DEVICE_MODULE "tsffn_device_module"

#endif
