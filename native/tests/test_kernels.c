// Every kernel of every ISA tier of this machine against the plain C one and against doubles, at odd sizes and
// misaligned.
#include "check.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/half.h"
#include "cpu/kernels/kernels.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

enum { MAX_N = 4096, GUARD = 64 };

static const char * const format_names[TSFFN_ROW_FORMAT_COUNT] = {"f32", "f16", "bf16", "q8_0", "q4_0"};

static int64_t block_size(enum tsffn_format format) {
    return format == TSFFN_FORMAT_Q8_0 || format == TSFFN_FORMAT_Q4_0 ? TSFFN_BLOCK_SIZE : 1;
}

// A half between 2^-14 and 2, either sign.
static uint16_t random_half(void) {
    return (uint16_t)((random_bits() & 0x83ffu) | ((1 + random_bits() % 15) << 10));
}

// What a finite half is, from its definition.
static double half_value(uint16_t h) {
    const int exponent = (h >> 10) & 31;
    const double mantissa = (h & 0x3ff) / 1024.0;
    const double magnitude = exponent == 0 ? ldexp(mantissa, -14) : ldexp(1.0 + mantissa, exponent - 15);
    return (h & 0x8000) != 0 ? -magnitude : magnitude;
}

// The scale of a block: either sign, and one in eight subnormal.
static uint16_t random_scale(void) {
    const uint16_t half = random_half();
    return random_bits() % 8 == 0 ? half & 0x83ff : half;
}

// Fills `row` with n random weights of `format`, and `w` with what they are. Written from the layouts in kernels.h.
static void random_row(enum tsffn_format format, int64_t n, uint8_t * row, double * w) {
    for (int64_t j = 0; j < n; ++j) {
        uint16_t half = random_half();
        const float f = random_float();
        switch (format) {
        case TSFFN_FORMAT_F32:
            memcpy(row + 4 * j, &f, 4);
            w[j] = (double)f;
            break;
        case TSFFN_FORMAT_F16: {
            memcpy(row + 2 * j, &half, 2);
            w[j] = half_value(half);
            break;
        }
        case TSFFN_FORMAT_BF16: {
            uint32_t bits;
            memcpy(&bits, &f, 4);
            half = (uint16_t)(bits >> 16);
            memcpy(row + 2 * j, &half, 2);
            bits = (uint32_t)half << 16;
            float value;
            memcpy(&value, &bits, 4);
            w[j] = (double)value;
            break;
        }
        case TSFFN_FORMAT_Q8_0:
        case TSFFN_FORMAT_Q4_0: {
            const bool is_q8 = format == TSFFN_FORMAT_Q8_0;
            uint8_t * block = row + j / TSFFN_BLOCK_SIZE * (is_q8 ? TSFFN_Q8_0_BYTES : TSFFN_Q4_0_BYTES);
            const int64_t k = j % TSFFN_BLOCK_SIZE;
            if (k == 0) {
                half = random_scale();
                memcpy(block, &half, 2);
            }
            memcpy(&half, block, 2);
            const double d = half_value(half);
            if (is_q8) {
                const int8_t q = (int8_t)random_bits();
                memcpy(block + 2 + k, &q, 1);
                w[j] = d * q;
            } else {
                const uint8_t q = (uint8_t)(random_bits() & 15);
                uint8_t * byte = block + 2 + k % 16;
                *byte = (uint8_t)(k < 16 ? (*byte & 0xf0) | q : (*byte & 0x0f) | (q << 4));
                w[j] = d * (q - 8);
            }
            break;
        }
        case TSFFN_FORMAT_Q3_NL: // these have panels only
        case TSFFN_FORMAT_BITS1:
        case TSFFN_FORMAT_BITS2:
        case TSFFN_FORMAT_COUNT:
            break;
        }
    }
}

static float dot(const struct tsffn_kernels * kernels, enum tsffn_format format, int64_t n, const uint8_t * row,
                 const void * x, const struct tsffn_asks * asks) {
    float s[2] = {0.0f, 12345.0f};
    kernels->dots[format](n, row, 1, &x, s, asks);
    CHECK(s[1] == 12345.0f, "%s %s: wrote behind the sum", kernels->name, format_names[format]);
    return s[0];
}

// Up to nine vectors at once give bit for bit what each gives alone.
static void test_several(const struct tsffn_kernels * kernels, enum tsffn_format format, int64_t n, const uint8_t * row,
                         const struct tsffn_asks * asks) {
    enum { MOST = 9 };
    static _Alignas(64) char x[MOST][TSFFN_I16_HEADER + MAX_N / TSFFN_BLOCK_SIZE * TSFFN_I16_BLOCK_BYTES];
    static float values[MAX_N];
    const void * pointers[MOST];
    for (int t = 0; t < MOST; ++t) {
        for (int64_t j = 0; j < n; ++j) {
            values[j] = random_float();
        }
        if (tsffn_x_format(format) == TSFFN_X_I16) {
            tsffn_convert_i16(values, x[t], n);
        } else {
            memcpy(x[t], values, (size_t)n * sizeof(float));
        }
        pointers[t] = x[t];
    }
    for (int n_x = 2; n_x <= MOST; ++n_x) {
        float sums[MOST + 1];
        sums[n_x] = 12345.0f;
        kernels->dots[format](n, row, n_x, pointers, sums, n_x % 2 == 0 ? asks : NULL);
        for (int t = 0; t < n_x; ++t) {
            CHECK(sums[t] == dot(kernels, format, n, row, x[t], NULL), "%s %s n=%d: vector %d of %d differs",
                  kernels->name, format_names[format], (int)n, t, n_x);
        }
        CHECK(sums[n_x] == 12345.0f, "%s %s: wrote behind %d sums", kernels->name, format_names[format], n_x);
    }
}

// Columns of two rows, added to three sums: not at all, three times, and once.
enum { ADD_C0 = TSFFN_BLOCK_SIZE, ADD_WIDTH = ADD_C0 + TSFFN_ADD_COLUMNS };
static void test_add_rows(const struct tsffn_kernels * kernels, enum tsffn_format format, const uint8_t * row, float a,
                          const float * start) {
    enum { SUMS = 3 };
    uint8_t other[ADD_WIDTH * 4];
    double ignored[ADD_WIDTH];
    random_row(format, ADD_WIDTH, other, ignored);
    const uint8_t * rows[] = {other, row};
    const struct tsffn_term terms[] = {
        {.a = a, .row = 1}, {.a = 0.5f, .row = 0}, {.a = -a, .row = 1}, {.a = 2.0f, .row = 0}};
    const int first[SUMS + 1] = {0, 0, 3, 4};
    float whole[SUMS][ADD_WIDTH], expected[SUMS][ADD_WIDTH + 1], found[SUMS][ADD_WIDTH + 1];
    for (int t = 0; t < SUMS; ++t) {
        memcpy(whole[t], start, sizeof(whole[t]));
        memcpy(expected[t], start, sizeof(whole[t]));
        expected[t][ADD_WIDTH] = 12345.0f;
        for (int i = first[t]; i < first[t + 1]; ++i) {
            const void * one = rows[terms[i].row];
            kernels->axpys[format](ADD_WIDTH, 1, &terms[i].a, &one, whole[t], NULL);
        }
    }
    static struct tsffn_unpacked unpacked;
    memcpy(found, expected, sizeof(found));
    for (int t = 0; t < SUMS; ++t) {
        memcpy(expected[t] + ADD_C0, whole[t] + ADD_C0, TSFFN_ADD_COLUMNS * sizeof(float));
    }
    const struct tsffn_additions additions = {
        .n_rows = 2,
        .n_sums = SUMS,
        .rows = rows,
        .terms = terms,
        .first = first,
        .y = found[0],
        .stride = ADD_WIDTH + 1,
        .unpacked = &unpacked,
    };
    kernels->add_rows[format](&additions, ADD_C0);
    CHECK(memcmp(found, expected, sizeof(expected)) == 0, "%s %s: add_rows differs from axpys", kernels->name,
          format_names[format]);
}

// Several rows at once give the same bits as one after the other.
static void test_axpys(const struct tsffn_kernels * kernels, enum tsffn_format format, int64_t n, const uint8_t * row,
                       const float * start, const struct tsffn_asks * asks) {
    enum { MOST = 9 };
    static uint8_t others[MOST][MAX_N * 4];
    static double ignored[MAX_N];
    static float found[MAX_N + 1], expected[MAX_N + 1];
    float a[MOST];
    const void * rows[MOST];
    for (int i = 0; i < MOST; ++i) {
        a[i] = random_float();
        random_row(format, n, others[i], ignored);
        rows[i] = i == 2 ? row : others[i];
    }
    for (int n_rows = 0; n_rows <= MOST; ++n_rows) {
        memcpy(found, start, (size_t)n * sizeof(float));
        memcpy(expected, start, (size_t)n * sizeof(float));
        found[n] = expected[n] = 12345.0f;
        for (int i = 0; i < n_rows; ++i) {
            kernels->axpys[format](n, 1, a + i, rows + i, expected, NULL);
        }
        kernels->axpys[format](n, n_rows, a, rows, found, asks);
        CHECK(memcmp(found, expected, ((size_t)n + 1) * sizeof(float)) == 0,
              "%s %s n=%d: axpys of %d rows differs from one after the other", kernels->name, format_names[format],
              (int)n, n_rows);
    }
}

static void test_size(const struct tsffn_kernels * kernels, enum tsffn_format format, int64_t n, size_t offset) {
    static uint8_t row_memory[MAX_N * 4 + GUARD];
    static float x_memory[MAX_N + GUARD], y_memory[MAX_N + GUARD];
    static double w[MAX_N], expected[MAX_N];
    uint8_t * row = row_memory + offset * (format == TSFFN_FORMAT_F32 ? 4 : 2);
    float * x = x_memory + offset;
    float * y = y_memory + offset;
    random_row(format, n, row, w);
    double sum = 0.0, size = 1e-30, weights = 0.0;
    for (int64_t j = 0; j < n; ++j) {
        x[j] = random_float();
        sum += w[j] * (double)x[j];
        size += fabs(w[j] * (double)x[j]);
        weights += fabs(w[j]);
    }
    static _Alignas(64) char converted[TSFFN_I16_HEADER + MAX_N / TSFFN_BLOCK_SIZE * TSFFN_I16_BLOCK_BYTES];
    if (tsffn_x_format(format) == TSFFN_X_I16) {
        tsffn_convert_i16(x, converted, n);
        const double found = (double)dot(kernels, format, n, row, converted, NULL);
        // Each activation is off by at most half a step of max |x| / 32639.
        CHECK(fabs(found - sum) <= (0.5 / TSFFN_I16_MAX) * weights + 1e-6 * size, "%s %s n=%d: %g instead of %g",
              kernels->name, format_names[format], (int)n, found, sum);
    } else {
        const double found = (double)dot(kernels, format, n, row, x, NULL);
        CHECK(fabs(found - sum) <= 1e-6 * size * sqrt((double)n + 1), "%s %s n=%d: %g instead of %g", kernels->name,
              format_names[format], (int)n, found, sum);
    }
    const void * activations = tsffn_x_format(format) == TSFFN_X_I16 ? (const void *)converted : x;
    const uint8_t * lines[37];
    for (int k = 0; k < 37; ++k) {
        lines[k] = row_memory + random_bits() % sizeof(row_memory);
    }
    const struct tsffn_asks asks = {.lines = lines, .n_lines = (int64_t)(random_bits() % 38)};
    CHECK(dot(kernels, format, n, row, activations, &asks) == dot(kernels, format, n, row, activations, NULL),
          "%s %s n=%d: asking changes the dot", kernels->name, format_names[format], (int)n);
    test_several(kernels, format, n, row, &asks);
    const float a = random_float();
    for (int64_t j = 0; j < n; ++j) {
        y[j] = random_float();
        expected[j] = (double)y[j] + (double)a * w[j];
    }
    static float start[MAX_N], asked[MAX_N + GUARD];
    memcpy(start, y, (size_t)n * sizeof(float));
    memcpy(asked, y, (size_t)n * sizeof(float));
    y[n] = asked[n] = 12345.0f;
    const void * const rows = row;
    kernels->axpys[format](n, 1, &a, &rows, y, NULL);
    CHECK(y[n] == 12345.0f, "%s %s n=%d: wrote behind the end", kernels->name, format_names[format], (int)n);
    kernels->axpys[format](n, 1, &a, &rows, asked, &asks);
    CHECK(memcmp(asked, y, ((size_t)n + 1) * sizeof(float)) == 0, "%s %s n=%d: asking changes the axpys", kernels->name,
          format_names[format], (int)n);
    test_axpys(kernels, format, n, row, start, &asks);
    if (kernels->add_rows[format] != NULL && n >= ADD_WIDTH) {
        test_add_rows(kernels, format, row, a, start);
    }
    CHECK(nmse(y, expected, n) < 1e-12, "%s %s n=%d: axpys is off by %g", kernels->name, format_names[format], (int)n,
          nmse(y, expected, n));
}

// Dense products of 32 rows with n_x vectors, rows and vectors misaligned.
static void test_gemm(const struct tsffn_kernels * kernels, enum tsffn_format format, int64_t n, int n_x) {
    enum { MAX_GEMM_N = 416 };
    static uint8_t rows[TSFFN_GEMM_ROWS * MAX_GEMM_N * 4 + GUARD];
    static double w[TSFFN_GEMM_ROWS][MAX_N];
    static float x[TSFFN_GEMM_MAX_X][MAX_GEMM_N];
    static uint16_t halves[TSFFN_GEMM_MAX_X][2 * MAX_GEMM_N];
    static float s[TSFFN_GEMM_ROWS][TSFFN_GEMM_MAX_X];
    const struct tsffn_gemm * gemm = kernels->gemm;
    const size_t block_bytes = format == TSFFN_FORMAT_Q8_0   ? TSFFN_Q8_0_BYTES
                               : format == TSFFN_FORMAT_Q4_0 ? TSFFN_Q4_0_BYTES
                                                             : 2;
    const size_t row_bytes = (size_t)(n / block_size(format)) * block_bytes;
    for (int i = 0; i < TSFFN_GEMM_ROWS; ++i) {
        random_row(format, n, rows + 2 + (size_t)i * row_bytes, w[i]);
    }
    const uint16_t * pointers[TSFFN_GEMM_MAX_X];
    for (int t = 0; t < n_x; ++t) {
        for (int64_t j = 0; j < n; ++j) {
            x[t][j] = random_float();
        }
        gemm->split(n, x[t], halves[t]);
        pointers[t] = halves[t];
    }
    char * packed = aligned_alloc(64, gemm->packed_bytes(n, n_x));
    CHECK(packed != NULL, "out of memory");
    for (int group = 0; group * TSFFN_GEMM_GROUP < n_x; ++group) {
        gemm->pack(n, n_x, pointers, group, packed);
    }
    gemm->multiply(format, n, rows + 2, row_bytes, n_x, packed, &s[0][0]);
    free(packed);
    for (int i = 0; i < TSFFN_GEMM_ROWS; ++i) {
        for (int t = 0; t < n_x; ++t) {
            double sum = 0.0, size = 1e-30;
            for (int64_t j = 0; j < n; ++j) {
                sum += w[i][j] * (double)x[t][j];
                size += fabs(w[i][j] * (double)x[t][j]);
            }
            // Each product is off by at most 2^-16 of its size, sums of f32 by less.
            CHECK(fabs((double)s[i][t] - sum) <= 0x1p-15 * size, "%s %s n=%d, %d vectors: row %d, vector %d: %g not %g",
                  kernels->name, format_names[format], (int)n, n_x, i, t, (double)s[i][t], sum);
        }
    }
}

static void test_half(void) {
    for (uint32_t h = 0; h < 0x10000; ++h) {
        if ((h & 0x7c00) != 0x7c00) {
            const int32_t bits = tsffn_f16_bits_scaled((uint16_t)h);
            float scaled;
            memcpy(&scaled, &bits, sizeof(scaled));
            CHECK((double)tsffn_f16_to_f32((uint16_t)h) == half_value((uint16_t)h), "half 0x%04x", h);
            CHECK((double)(scaled * TSFFN_F16_SCALE_BACK) == half_value((uint16_t)h), "scaled half 0x%04x", h);
        }
    }
    CHECK(tsffn_f16_to_f32(0x0001) == 0x1p-24f, "smallest subnormal");
    CHECK(tsffn_f16_to_f32(0x03ff) == 1023 * 0x1p-24f, "largest subnormal");
    CHECK(tsffn_f16_to_f32(0x8400) == -0x1p-14f, "smallest normal");
    CHECK(tsffn_f16_to_f32(0x7bff) == 65504.0f, "largest");
    CHECK(isinf(tsffn_f16_to_f32(0x7c00)) && isinf(tsffn_f16_to_f32(0xfc00)), "infinity");
    CHECK(isnan(tsffn_f16_to_f32(0x7e00)), "not a number");
    CHECK(tsffn_f16_to_f32(0x8000) == 0.0f && signbit(tsffn_f16_to_f32(0x8000)), "negative zero");
}

static const char * const isa_names[TSFFN_ISA_COUNT] = {"ref",          "avx2", "avxvnni", "avx512", "avx512vnni",
                                                        "avx512popcnt", "amx",  "neon",    "neondot"};

static bool is_built(enum tsffn_isa isa) {
#if defined(TSFFN_HAVE_X86)
    return isa < TSFFN_ISA_NEON;
#elif defined(TSFFN_HAVE_NEON)
    return isa == TSFFN_ISA_REF || isa >= TSFFN_ISA_NEON;
#else
    return isa == TSFFN_ISA_REF;
#endif
}

// A limit lowers the tier to the best one up to the tier named, and never raises it. One that this library was built
// without is none.
static void test_dispatch(void) {
    const enum tsffn_isa best = tsffn_kernels_up_to(NULL)->isa;
    enum tsffn_isa up_to_here = TSFFN_ISA_REF;
    for (int isa = TSFFN_ISA_REF; isa < TSFFN_ISA_COUNT; ++isa) {
        const struct tsffn_kernels * kernels = tsffn_kernels_for((enum tsffn_isa)isa);
        if (kernels != NULL) {
            CHECK(is_built((enum tsffn_isa)isa), "%s: not built", isa_names[isa]);
            CHECK(strcmp(kernels->name, isa_names[isa]) == 0, "%s: named %s", isa_names[isa], kernels->name);
            up_to_here = (enum tsffn_isa)isa;
        }
        const struct tsffn_kernels * limited = tsffn_kernels_up_to(isa_names[isa]);
        CHECK((limited != NULL) == is_built((enum tsffn_isa)isa), "%s is known, or not", isa_names[isa]);
        CHECK(limited == NULL || limited->isa == up_to_here, "asked for %s, got %s", isa_names[isa], limited->name);
    }
    CHECK(best == up_to_here, "%s is not the best", isa_names[best]);
    CHECK(tsffn_kernels_up_to("avx-2") == NULL && tsffn_kernels_up_to("") == NULL, "names that there are not");
}

// The environment is asked once.
static void test_choice(void) {
    setenv("TSFFN_ISA", "ref", 1);
    CHECK(tsffn_kernels_best()->isa == TSFFN_ISA_REF, "TSFFN_ISA limits nothing");
    unsetenv("TSFFN_ISA");
    CHECK(tsffn_kernels_best()->isa == TSFFN_ISA_REF, "the choice changes");
}

int main(void) {
    static const int64_t sizes[] = {1,  2,  3,  7,  8,  9,  15,  16,  17,  31,   32,
                                    33, 63, 64, 65, 66, 96, 127, 128, 130, 1088, 4096};
    test_half();
    test_dispatch();
    test_choice();
    int n_tiers = 0;
    for (int isa = 0; isa < TSFFN_ISA_COUNT; ++isa) {
        const struct tsffn_kernels * kernels = tsffn_kernels_for((enum tsffn_isa)isa);
        if (kernels == NULL) {
            continue;
        }
        ++n_tiers;
        for (int format = 0; format < TSFFN_ROW_FORMAT_COUNT; ++format) {
            for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); ++i) {
                if (sizes[i] % block_size((enum tsffn_format)format) != 0) {
                    continue;
                }
                for (size_t offset = 0; offset < 4; ++offset) {
                    test_size(kernels, (enum tsffn_format)format, sizes[i], offset);
                }
            }
            for (int n_x = 1; kernels->gemm != NULL && format != TSFFN_FORMAT_F32 && n_x <= TSFFN_GEMM_MAX_X; ++n_x) {
                test_gemm(kernels, (enum tsffn_format)format, 32, n_x);
                test_gemm(kernels, (enum tsffn_format)format, 128 + 32 * (n_x % 10), n_x);
            }
        }
        printf("%s: ok\n", kernels->name);
    }
    CHECK(n_tiers > 0, "no kernels at all");
    return 0;
}
