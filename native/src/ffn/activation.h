// What a neuron's gate and up make of each other: h = f(gate . x) * g(up . x). The only place that knows.
//
//   dReLU     relu(gate) * relu(up)         TurboSparse, arXiv:2406.05955
//   ReGLU     relu(gate) * up               arXiv:2002.05202
//   FATReLU   gate * up where gate >= t     t >= 0; ProSparse, arXiv:2402.13516
//
// A neuron with a factor of 0 costs no further reads. f(0) must be 0: a gate that the predictor leaves out counts as 0.
// C and CUDA C++ read this file.
#ifndef TSFFN_ACTIVATION_H
#define TSFFN_ACTIVATION_H

enum tsffn_factor_kind {
    TSFFN_FACTOR_LINEAR, // v
    TSFFN_FACTOR_RELU,   // v where v > 0 and v >= threshold, else 0
};

// f, or g.
struct tsffn_factor {
    enum tsffn_factor_kind kind;
    float threshold;
};

struct tsffn_activation {
    struct tsffn_factor gate, up;
};

enum tsffn_activation_name {
    TSFFN_ACTIVATION_DRELU,
    TSFFN_ACTIVATION_REGLU,
    TSFFN_ACTIVATION_FATRELU,
    TSFFN_N_ACTIVATIONS,
};

// `threshold` is that of FATReLU.
static inline struct tsffn_activation tsffn_activation(enum tsffn_activation_name name, float threshold) {
    const struct tsffn_factor linear = {TSFFN_FACTOR_LINEAR, 0.0f}, relu = {TSFFN_FACTOR_RELU, 0.0f};
    const struct tsffn_factor from_threshold = {TSFFN_FACTOR_RELU, threshold};
    const struct tsffn_activation drelu = {relu, relu}, reglu = {relu, linear}, fatrelu = {from_threshold, linear};
    return name == TSFFN_ACTIVATION_DRELU ? drelu : name == TSFFN_ACTIVATION_REGLU ? reglu : fatrelu;
}

// Kernels for other devices call it, too.
#ifdef __CUDACC__
#define TSFFN_ANYWHERE __host__ __device__
#else
#define TSFFN_ANYWHERE
#endif
TSFFN_ANYWHERE static inline float tsffn_factor_of(struct tsffn_factor factor, float v) {
    switch (factor.kind) {
    case TSFFN_FACTOR_LINEAR:
        return v;
    case TSFFN_FACTOR_RELU:
        break;
    }
    return v > 0.0f && v >= factor.threshold ? v : 0.0f;
}

#endif
