// Row kernels of the CPU: a weight row times an activation vector (dot) and a scaled weight row added to an output
// (axpy). Every kernel exists as plain C (`ref`) and for some ISA tiers; native/tests/test_kernels.c holds all tiers
// against the plain C one. No ggml types here.
#ifndef TSFFN_KERNELS_H
#define TSFFN_KERNELS_H

#include <stddef.h>
#include <stdint.h>

// s = sum_j row[j] * x[j] over n weights; x in the format that tsffn_x_format tells.
typedef float (*tsffn_dot_fn)(int64_t n, const void * row, const void * x);
// The same row with four activation vectors at once; bit for bit what four calls of the dot give.
typedef void (*tsffn_dot4_fn)(int64_t n, const void * row, const void * const x[4], float s[4]);
// y[j] += a * row[j] over n weights.
typedef void (*tsffn_axpy_fn)(int64_t n, float a, const void * row, float * y);

// Weight formats with kernels of our own. Block formats are ggml's: a block is 32 weights.
//   Q8_0: f16 d; int8 q[32];            w_j = d * q_j                          34 bytes
//   Q4_0: f16 d; uint8 q[16];           w_j = d * ((q_j & 15) - 8)   j < 16    18 bytes
//                                       w_j = d * ((q_{j-16} >> 4) - 8)  j >= 16
enum tsffn_format { // TSFFN_DEFINE_KERNELS lists kernels in this order
    TSFFN_FORMAT_F32,
    TSFFN_FORMAT_F16,
    TSFFN_FORMAT_BF16,
    TSFFN_FORMAT_Q8_0,
    TSFFN_FORMAT_Q4_0,
    TSFFN_FORMAT_COUNT,
};

// Formats of the activations: f32 for the float formats, 16-bit integers for the block formats.
//   I16: float d; 60 bytes of padding; int16 q[n];      x_j = d * q_j, d = max |x| / 32767 of the whole vector
// Sixteen bits where ggml's dot products take eight (Q8_0): the error of x is 100 times smaller, and multiplying pairs
// of 16-bit integers needs none of the sign tricks that unsigned-by-signed bytes do. One block is 32 products of at
// most 128 * 32767, which an int32 holds.
enum tsffn_x_format {
    TSFFN_X_F32,
    TSFFN_X_I16,
};
#define TSFFN_I16_HEADER 64

static inline enum tsffn_x_format tsffn_x_format(enum tsffn_format format) {
    return format == TSFFN_FORMAT_Q8_0 || format == TSFFN_FORMAT_Q4_0 ? TSFFN_X_I16 : TSFFN_X_F32;
}

#define TSFFN_BLOCK_SIZE 32
#define TSFFN_Q8_0_BYTES 34
#define TSFFN_Q4_0_BYTES 18

// Bytes that streamed rows are asked for in advance.
#define TSFFN_STREAM_AHEAD 4096

enum tsffn_isa {
    TSFFN_ISA_REF,
    TSFFN_ISA_AVX2,   // AVX2, FMA, F16C
    TSFFN_ISA_AVX512, // AVX-512 F, BW, DQ, VL
    TSFFN_ISA_AMX,    // the row kernels of AVX512, and dense products with AMX-BF16 (gemm.h)
    TSFFN_ISA_COUNT,
};

static inline const int16_t * tsffn_i16_values(const void * activations) {
    return (const int16_t *)((const char *)activations + TSFFN_I16_HEADER);
}

static inline float tsffn_i16_scale(const void * activations) {
    return *(const float *)activations;
}

// x in I16 format: TSFFN_I16_HEADER + 2 n bytes. Not a kernel per tier: it runs once per token, and compilers vectorize
// it.
void tsffn_convert_i16(const float * x, void * converted, int64_t n);

struct tsffn_gemm;

// The kernels of one tier.
struct tsffn_kernels {
    enum tsffn_isa isa;
    const char * name;
    tsffn_dot_fn dot[TSFFN_FORMAT_COUNT];
    tsffn_dot_fn stream[TSFFN_FORMAT_COUNT]; // dot that asks for what lies TSFFN_STREAM_AHEAD behind the row; or NULL
    tsffn_dot4_fn dot4[TSFFN_FORMAT_COUNT];  // NULL: four dots are as good
    tsffn_axpy_fn axpy[TSFFN_FORMAT_COUNT];
    const struct tsffn_gemm * gemm; // NULL: the tier has no matrix unit
};

// Defines the table of a tier from the functions of its file, which have these names in every tier.
#define TSFFN_DEFINE_KERNELS(tier, tier_isa, stream_of_q8_0, stream_of_q4_0, dot4_of_q8_0, dot4_of_q4_0, gemm_of_tier) \
    const struct tsffn_kernels tsffn_kernels_##tier = {                                                                \
        .isa = (tier_isa),                                                                                             \
        .name = #tier,                                                                                                 \
        .dot = {dot_f32, dot_f16, dot_bf16, dot_q8_0, dot_q4_0},                                                       \
        .stream = {NULL, NULL, NULL, stream_of_q8_0, stream_of_q4_0},                                                  \
        .dot4 = {NULL, NULL, NULL, dot4_of_q8_0, dot4_of_q4_0},                                                        \
        .axpy = {axpy_f32, axpy_f16, axpy_bf16, axpy_q8_0, axpy_q4_0},                                                 \
        .gemm = (gemm_of_tier),                                                                                        \
    }

// The kernels of `isa`, or NULL when this library was built without them or the CPU or the operating system lacks them.
const struct tsffn_kernels * tsffn_kernels_for(enum tsffn_isa isa);

// The best tier of this machine. The environment variable TSFFN_ISA (ref, avx2, avx512, amx) can only lower it.
const struct tsffn_kernels * tsffn_kernels_best(void);

extern const struct tsffn_kernels tsffn_kernels_ref;
#if defined(TSFFN_HAVE_X86)
extern const struct tsffn_kernels tsffn_kernels_avx2;
extern const struct tsffn_kernels tsffn_kernels_avx512;
extern const struct tsffn_kernels tsffn_kernels_amx;
#endif

#endif
