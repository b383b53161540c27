// Row kernels of the CPU: a weight row times activation vectors (dots) and scaled weight rows added to an output
// (axpys). Every kernel exists as plain C (`ref`) and for some ISA tiers; native/tests/test_kernels.c holds all tiers
// against the plain C one. No ggml types here.
#ifndef TSFFN_KERNELS_H
#define TSFFN_KERNELS_H

#include "../../ffn/layer.h"

#include <stddef.h>
#include <stdint.h>

// Weight formats with kernels of our own. Block formats are ggml's: a block is 32 weights.
//   Q8_0: f16 d; int8 q[32];            w_j = d * q_j                          34 bytes
//   Q4_0: f16 d; uint8 q[16];           w_j = d * ((q_j & 15) - 8)   j < 16    18 bytes
//                                       w_j = d * ((q_{j-16} >> 4) - 8)  j >= 16
// and one that only panels know (panels.h), for a matrix whose every row is read, as the predictor's second is:
//   Q3_NL: f16 d of a row; then for each 32 weights uint8 scales; uint8 q[3][4];                   13 bytes + 2 per row
//   BITS1: uint32 b[1];  w_j = 1 - 2 (bit j of b[0])                                                4 bytes
//   BITS2: uint32 b[2];  w_j = 1 - 2 (bit j of b[0]) + 2 (1 - 2 (bit j of b[1])): -3, -1, 1 or 3    8 bytes
enum tsffn_format {
    TSFFN_FORMAT_F32,
    TSFFN_FORMAT_F16,
    TSFFN_FORMAT_BF16,
    TSFFN_FORMAT_Q8_0,
    TSFFN_FORMAT_Q4_0,
    TSFFN_ROW_FORMAT_COUNT, // the formats above have row kernels
    TSFFN_FORMAT_Q3_NL = TSFFN_ROW_FORMAT_COUNT,
    TSFFN_FORMAT_BITS1,
    TSFFN_FORMAT_BITS2,
    TSFFN_FORMAT_COUNT,
};

// Formats of the activations: f32 for the float formats, 16-bit integers for the block formats, 14 bits for Q3_NL, 1 to
// 8 bits for BITS1 and BITS2.
//   I16: x_j = d * q_j, d = max |x| / 32639 of the whole vector, q = 256 hi + lo with signed bytes hi and lo:
//        float d; 60 bytes of padding; int16 q[n]; int8 hi[n]; int8 lo[n]; int32 sums[n / 32], of q over each block;
//        and for each 128 columns, taken as 4 blocks of 16 + 16, 256 bytes for dot products of Q4_0 with VNNI:
//          int8 hi[4][16] of the first halves, of the second halves, int8 lo[4][16] likewise
// Sixteen bits where ggml's dot products take eight (Q8_0): the error of x is 100 times smaller. One block is 32
// products of at most 128 * 32639, which an int32 holds.
//   U14: x_j = d * q_j, x_j >= 0, d = max x / 16383, q = 128 hi + lo with hi and lo from 0 to 127:
//        float d; 60 bytes of padding; uint8 hi[n]; uint8 lo[n]
//   BITS: x_j = d * q_j, q = sum_k 2^k (1 - 2 (bit j of b[k])), an odd number, for P bits k = 0 to P - 1:
//        float d; int32 P; 56 bytes of padding; for each 32 columns uint32 b[P]
//        P = 1: the sign alone, d = 1. Else d = max |x| / (2^P - 1), q the odd number below which x_j / d is by less
//        than 2, at most 2^P - 1
// Of activations behind a ReLU no sign is kept; so they can be the unsigned factor of VPDPBUSD, the weights the signed
// one, and 16 products with weights of at most 15 fit 16 bits.
enum tsffn_x_format {
    TSFFN_X_F32,
    TSFFN_X_I16,
    TSFFN_X_U14,
    TSFFN_X_BITS,
};
enum {
    TSFFN_I16_MAX = 32639, // 127 * 256 + 127
    TSFFN_I16_HEADER = 64,
    TSFFN_I16_QUAD = 128, // columns
    TSFFN_I16_QUAD_BYTES = 256,
    TSFFN_I16_BLOCK_BYTES = 32 * 4 + 4 + TSFFN_I16_QUAD_BYTES / 4,
    TSFFN_U14_MAX = 16383, // 127 * 128 + 127
    TSFFN_U14_HEADER = 64,
    TSFFN_U14_BLOCK_BYTES = 32 * 2,
    TSFFN_BITS_HEADER = 64,
    TSFFN_BITS_MAX_BLOCK_BYTES = TSFFN_BITS_MAX_INPUT * 4,
};

static inline enum tsffn_x_format tsffn_x_format(enum tsffn_format format) {
    return format == TSFFN_FORMAT_Q3_NL                                   ? TSFFN_X_U14
           : format == TSFFN_FORMAT_BITS1 || format == TSFFN_FORMAT_BITS2 ? TSFFN_X_BITS
           : format == TSFFN_FORMAT_Q8_0 || format == TSFFN_FORMAT_Q4_0   ? TSFFN_X_I16
                                                                          : TSFFN_X_F32;
}

// Bits of a weight of BITS1 or BITS2.
static inline int tsffn_weight_bits(enum tsffn_format format) {
    return format == TSFFN_FORMAT_BITS1 ? 1 : 2;
}

#define TSFFN_Q8_0_BYTES 34
#define TSFFN_Q4_0_BYTES 18

enum tsffn_isa {
    TSFFN_ISA_REF,
    TSFFN_ISA_AVX2,         // AVX2, FMA, F16C
    TSFFN_ISA_AVXVNNI,      // and AVX-VNNI
    TSFFN_ISA_AVX512,       // AVX-512 F, BW, DQ, VL
    TSFFN_ISA_AVX512VNNI,   // and VNNI
    TSFFN_ISA_AVX512POPCNT, // and VPOPCNTDQ
    TSFFN_ISA_AMX,          // and AMX: panels, dense products (gemm.h)
    TSFFN_ISA_NEON,         // AArch64
    TSFFN_ISA_NEONDOT,      // and the dot-product extension of ARMv8.2
    TSFFN_ISA_COUNT,
};

static inline const int16_t * tsffn_i16_values(const void * activations) {
    return (const int16_t *)((const char *)activations + TSFFN_I16_HEADER);
}

static inline float tsffn_i16_scale(const void * activations) {
    return *(const float *)activations;
}

static inline const int8_t * tsffn_i16_hi(const void * activations, int64_t n) {
    return (const int8_t *)(tsffn_i16_values(activations) + n);
}

static inline const int8_t * tsffn_i16_lo(const void * activations, int64_t n) {
    return tsffn_i16_hi(activations, n) + n;
}

static inline const int32_t * tsffn_i16_sums(const void * activations, int64_t n) {
    return (const int32_t *)(tsffn_i16_lo(activations, n) + n);
}

static inline const int8_t * tsffn_i16_quads(const void * activations, int64_t n) {
    return (const int8_t *)(tsffn_i16_sums(activations, n) + n / TSFFN_BLOCK_SIZE);
}

// Bytes of n activations in I16 format, n a multiple of 32; and those activations.
static inline size_t tsffn_i16_bytes(int64_t n) {
    return TSFFN_I16_HEADER + (size_t)n / TSFFN_BLOCK_SIZE * TSFFN_I16_BLOCK_BYTES;
}
void tsffn_convert_i16(const float * x, void * converted, int64_t n);

static inline float tsffn_u14_scale(const void * activations) {
    return *(const float *)activations;
}

static inline const uint8_t * tsffn_u14_hi(const void * activations) {
    return (const uint8_t *)activations + TSFFN_U14_HEADER;
}

static inline const uint8_t * tsffn_u14_lo(const void * activations, int64_t n) {
    return tsffn_u14_hi(activations) + n;
}

// Bytes of n activations in U14 format, n a multiple of 32; and those activations, of x >= 0.
static inline size_t tsffn_u14_bytes(int64_t n) {
    return TSFFN_U14_HEADER + (size_t)n / TSFFN_BLOCK_SIZE * TSFFN_U14_BLOCK_BYTES;
}
void tsffn_convert_u14(const float * x, void * converted, int64_t n);

static inline float tsffn_bits_scale(const void * activations) {
    return *(const float *)activations;
}

static inline int tsffn_bits_planes(const void * activations) {
    return ((const int32_t *)activations)[1];
}

static inline const uint32_t * tsffn_bits_words(const void * activations) {
    return (const uint32_t *)((const char *)activations + TSFFN_BITS_HEADER);
}

// Bytes of n activations in BITS format with the most bits, n a multiple of 32; and those activations, of n_bits bits.
static inline size_t tsffn_bits_bytes(int64_t n) {
    return TSFFN_BITS_HEADER + (size_t)n / TSFFN_BLOCK_SIZE * TSFFN_BITS_MAX_BLOCK_BYTES;
}
void tsffn_convert_bits(const float * x, void * converted, int64_t n, int n_bits);

enum { TSFFN_CACHE_LINE = 64 };

static inline int64_t tsffn_cache_lines(size_t bytes) {
    return (int64_t)((bytes + TSFFN_CACHE_LINE - 1) / TSFFN_CACHE_LINE);
}

// Cache lines to ask for while something is computed, evenly, because they will be needed next. They share the few fill
// buffers of L1 with everything else, so that a burst of them would stop the products.
struct tsffn_asks {
    const uint8_t * const * lines; // [n_lines], in any order
    int64_t n_lines;
    const uint8_t * stream; // n_stream lines one behind the other
    int64_t n_stream;
};

// Not __builtin_prefetch: GCC takes a function of nothing else for one without effects and drops its calls.
static inline void tsffn_ask(const void * line) {
#if defined(__x86_64__)
    __asm__ volatile("prefetcht0 %0" : : "m"(*(const char *)line));
#elif defined(__aarch64__)
    __asm__ volatile("prfm pldl2keep, %0" : : "Q"(*(const char *)line));
#else
    __builtin_prefetch(line, 0, 2);
#endif
}

// The asks, spread over n_steps steps of a loop. Everything is kept in registers: dividing anew in every step cost more
// than the products.
struct tsffn_asking {
    const uint8_t *const *line, *const *lines_end;
    const uint8_t *stream, *stream_end;
    int64_t lines_per_step, stream_per_step;
};

static inline struct tsffn_asking tsffn_asking_begin(const struct tsffn_asks * asks, int64_t n_steps) {
    if (asks == NULL) {
        return (struct tsffn_asking){0};
    }
    return (struct tsffn_asking){
        .line = asks->lines,
        .lines_end = asks->lines + asks->n_lines,
        .stream = asks->stream,
        .stream_end = asks->stream + asks->n_stream * TSFFN_CACHE_LINE,
        .lines_per_step = n_steps > 0 ? (asks->n_lines + n_steps - 1) / n_steps : 0,
        .stream_per_step = n_steps > 0 ? (asks->n_stream + n_steps - 1) / n_steps : 0,
    };
}

static inline void tsffn_asking_step(struct tsffn_asking * asking) {
    for (int64_t k = asking->lines_per_step; k > 0 && asking->line < asking->lines_end; --k) {
        tsffn_ask(*asking->line++);
    }
    for (int64_t k = asking->stream_per_step; k > 0 && asking->stream < asking->stream_end; --k) {
        tsffn_ask(asking->stream);
        asking->stream += TSFFN_CACHE_LINE;
    }
}

static inline void tsffn_ask_all(const struct tsffn_asks * asks) {
    struct tsffn_asking asking = tsffn_asking_begin(asks, 1);
    tsffn_asking_step(&asking);
}

// s[t] = sum_j row[j] * x[t][j] over n weights, for n_x activation vectors in the format that tsffn_x_format tells. A
// row is unpacked once for four or eight of them; each sum is bit for bit what it is for that vector alone. Asks
// meanwhile.
typedef void tsffn_dots(int64_t n, const void * row, int n_x, const void * const * x, float * s,
                        const struct tsffn_asks * asks);
// y[j] += a[i] * rows[i][j] over n weights, for n_rows rows in their order; bit for bit what a call for each gives.
// Asks meanwhile.
typedef void tsffn_axpys(int64_t n, int n_rows, const float * a, const void * const * rows, float * y,
                         const struct tsffn_asks * asks);

// Several weight rows, each added to several sums: y_t[j] += sum_i a_i rows[i][j] over the terms of sum t, in their
// order; bit for bit what axpys gives.
enum { TSFFN_ADD_COLUMNS = 64, TSFFN_ADD_ROWS = 128 };
struct tsffn_term {
    float a;
    int32_t row;
};
// Columns of all rows: weights before their scale, and the scales of their blocks, if any.
struct tsffn_unpacked {
    _Alignas(64) float w[TSFFN_ADD_ROWS][TSFFN_ADD_COLUMNS];
    float scales[TSFFN_ADD_ROWS][TSFFN_ADD_COLUMNS / TSFFN_BLOCK_SIZE];
};
struct tsffn_additions {
    int n_rows, n_sums; // n_rows <= TSFFN_ADD_ROWS
    const uint8_t * const * rows;
    const struct tsffn_term * terms;
    const int * first; // [n_sums + 1]; sum t takes the terms first[t] .. first[t + 1] - 1
    float * y;         // sum t is y + t * stride
    int64_t stride;
    struct tsffn_unpacked * unpacked; // scratch
};
// TSFFN_ADD_COLUMNS columns from c0 on, a multiple of 32: every row is unpacked once.
typedef void tsffn_add_rows(const struct tsffn_additions * additions, int64_t c0);

struct tsffn_gemm;

// s[t][i] = row i of a panel times x[t], see panels.h.
typedef void tsffn_panel(int64_t n, const void * panel, int n_x, const void * const * x, float (*s)[TSFFN_PANEL_ROWS],
                         const struct tsffn_asks * asks);

// The kernels of one tier: all that a machine of this tier runs. Each tier's file ends with its table.
struct tsffn_kernels {
    enum tsffn_isa isa;
    const char * name;
    tsffn_dots * dots[TSFFN_ROW_FORMAT_COUNT];
    tsffn_axpys * axpys[TSFFN_ROW_FORMAT_COUNT];
    tsffn_add_rows * add_rows[TSFFN_ROW_FORMAT_COUNT]; // NULL: there is only axpys
    tsffn_panel * panel[TSFFN_FORMAT_COUNT];           // of the block formats (panels.h)
    const struct tsffn_gemm * gemm;                    // NULL: the tier has no matrix unit
};

// The kernels of `isa`, or NULL when this library was built without them or the CPU or the operating system lacks them.
const struct tsffn_kernels * tsffn_kernels_for(enum tsffn_isa isa);

// Weights that are read in the order of addresses are best asked for so many bytes ahead on this machine.
int64_t tsffn_stream_ahead(void);

// The best tier of this machine up to the one named `limit`, which the machine may lack; NULL: of all. Returns NULL
// when this library was built without a tier of that name.
const struct tsffn_kernels * tsffn_kernels_up_to(const char * limit);

// The tier in use: the best one up to the environment variable TSFFN_ISA, if it is set. Chosen by the first call, for
// as long as the process lives; that call warns, on stderr, of a name that is unknown, and ignores it.
const struct tsffn_kernels * tsffn_kernels_best(void);

#endif
