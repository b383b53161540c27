// Panels of every ISA tier of this machine: the plain C one against doubles, the others bit for bit against it.
// Formats are written here from the layouts in panels.h and kernels.h.
#include "check.h"
#include "cpu/kernels/half.h"
#include "cpu/kernels/panels.h"
#include "cpu/kernels/tiers.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

enum { MAX_N = 1024, MAX_X = 37, MAX_BYTES = MAX_N / TSFFN_BLOCK_SIZE * TSFFN_PANEL_Q8_0_BYTES };

static int weights_bytes(enum tsffn_format format) {
    return format == TSFFN_FORMAT_Q8_0 ? 32 : 16; // of one row in one block of columns
}

// Bit `bit` of the code of column j of row i, in the block of columns.
static void set_bit_q3_nl(uint8_t * block, int i, int j, int bit) {
    static const struct {
        int plane, shift;
    } place[8][3] = {
        {{0, 0}, {0, 1}, {0, 2}}, {{1, 0}, {1, 1}, {1, 2}}, {{2, 0}, {2, 1}, {2, 2}}, {{0, 3}, {0, 4}, {0, 5}},
        {{1, 3}, {1, 4}, {1, 5}}, {{2, 3}, {2, 4}, {2, 5}}, {{0, 6}, {0, 7}, {2, 6}}, {{1, 6}, {1, 7}, {2, 7}},
    };
    const int plane = place[j / 4][bit].plane, shift = place[j / 4][bit].shift;
    uint8_t * byte = block + TSFFN_PANEL_ROWS + plane * 64 + i * 4 + j % 4;
    *byte = (uint8_t)(*byte | 1 << shift);
}

static void random_panel_q3_nl(int64_t n, int extreme, uint8_t * panel, double (*w)[TSFFN_PANEL_ROWS]) {
    static const int levels[8] = {-15, -9, -5, -2, 1, 4, 8, 13};
    memset(panel, 0, TSFFN_PANEL_Q3_NL_HEADER + (size_t)n / TSFFN_BLOCK_SIZE * TSFFN_PANEL_Q3_NL_BYTES);
    for (int i = 0; i < TSFFN_PANEL_ROWS; ++i) {
        const uint16_t d = (uint16_t)((random_bits() & 0x83ffu) | ((1 + random_bits() % 15) << 10));
        memcpy(panel + 2 * i, &d, sizeof(d));
        for (int64_t j = 0; j < n; ++j) {
            uint8_t * block = panel + TSFFN_PANEL_Q3_NL_HEADER + j / TSFFN_BLOCK_SIZE * TSFFN_PANEL_Q3_NL_BYTES;
            const int half = (int)(j % TSFFN_BLOCK_SIZE) / 16;
            if (j % 16 == 0) {
                const uint8_t scale = (uint8_t)(extreme != 0 ? (i % 2 != 0 ? 8 : 7) : random_bits() & 15);
                block[i] = (uint8_t)(block[i] | scale << (4 * half));
            }
            const int nibble = block[i] >> (4 * half) & 15;
            const int code = (int)(extreme != 0 ? (i / 2 % 2 != 0 ? 7 : 0) : random_bits() & 7);
            for (int bit = 0; bit < 3; ++bit) {
                if ((code >> bit & 1) != 0) {
                    set_bit_q3_nl(block, i, (int)(j % TSFFN_BLOCK_SIZE), bit);
                }
            }
            w[j][i] = (double)tsffn_f16_to_f32(d) * (nibble < 8 ? nibble : nibble - 16) * levels[code];
        }
    }
}

static void random_panel_bits(int n_bits, int64_t n, int extreme, uint32_t * panel, double (*w)[TSFFN_PANEL_ROWS]) {
    for (int64_t b = 0; b < n / TSFFN_BLOCK_SIZE; ++b) {
        for (int i = 0; i < TSFFN_PANEL_ROWS; ++i) {
            for (int k = 0; k < n_bits; ++k) {
                const uint32_t word = extreme == 0 ? (uint32_t)(random_bits() ^ random_bits() << 16)
                                      : i % 2 == 0 ? 0
                                                   : ~(uint32_t)0;
                panel[(b * n_bits + k) * TSFFN_PANEL_ROWS + i] = word;
                for (int j = 0; j < TSFFN_BLOCK_SIZE; ++j) {
                    double * weight = &w[b * TSFFN_BLOCK_SIZE + j][i];
                    *weight = (k == 0 ? 0.0 : *weight) + (1 << k) * ((word >> j & 1) != 0 ? -1.0 : 1.0);
                }
            }
        }
    }
}

// The activations are those of the BITS format, read back: the integers are exact.
static void test_panel_bits(int n_bits, int n_planes, int64_t n, int n_x, int extreme) {
    static uint32_t memory[MAX_N / TSFFN_BLOCK_SIZE * 2 * TSFFN_PANEL_ROWS + 1];
    static double w[MAX_N][TSFFN_PANEL_ROWS];
    static float x[MAX_N];
    static _Alignas(
        64) char converted[MAX_X][TSFFN_BITS_HEADER + MAX_N / TSFFN_BLOCK_SIZE * TSFFN_BITS_MAX_BLOCK_BYTES];
    const enum tsffn_format format = n_bits == 1 ? TSFFN_FORMAT_BITS1 : TSFFN_FORMAT_BITS2;
    uint32_t * panel = memory + (random_bits() & 1);
    random_panel_bits(n_bits, n, extreme, panel, w);
    const void * pointers[MAX_X] = {NULL};
    float expected[MAX_X][TSFFN_PANEL_ROWS];
    for (int t = 0; t < n_x; ++t) {
        for (int64_t j = 0; j < n; ++j) {
            x[j] = extreme == 0 ? random_float() : t % 2 == 0 ? -2.0f : 2.0f;
        }
        tsffn_convert_bits(x, converted[t], n, n_planes);
        pointers[t] = converted[t];
        double sums[TSFFN_PANEL_ROWS] = {0.0};
        for (int64_t j = 0; j < n; ++j) {
            int q = 0;
            for (int k = 0; k < n_planes; ++k) {
                const uint32_t word = tsffn_bits_words(converted[t])[j / TSFFN_BLOCK_SIZE * n_planes + k];
                q += (1 << k) * ((word >> j % TSFFN_BLOCK_SIZE & 1) != 0 ? -1 : 1);
            }
            for (int i = 0; i < TSFFN_PANEL_ROWS; ++i) {
                sums[i] += w[j][i] * q;
            }
        }
        for (int i = 0; i < TSFFN_PANEL_ROWS; ++i) {
            expected[t][i] = (float)sums[i] * tsffn_bits_scale(converted[t]);
        }
    }
    const struct tsffn_asks asks = {.stream = (const uint8_t *)panel, .n_stream = 11};
    for (int isa = TSFFN_ISA_REF; isa < TSFFN_ISA_COUNT; ++isa) {
        const struct tsffn_kernels * kernels = tsffn_kernels_for((enum tsffn_isa)isa);
        for (int ask = 0; kernels != NULL && ask < 2; ++ask) {
            float s[MAX_X + 1][TSFFN_PANEL_ROWS];
            memset(s, 0x55, sizeof(s));
            kernels->panel[format](n, panel, n_x, pointers, s, ask != 0 ? &asks : NULL);
            for (int t = 0; t < n_x; ++t) {
                for (int i = 0; i < TSFFN_PANEL_ROWS; ++i) {
                    CHECK(s[t][i] == expected[t][i], "%s bits%d n=%d, %d bits of x: row %d, vector %d: %.9g not %.9g",
                          kernels->name, n_bits, (int)n, n_planes, i, t, (double)s[t][i], (double)expected[t][i]);
                }
            }
            uint32_t behind;
            memcpy(&behind, s[n_x], sizeof(behind));
            CHECK(behind == 0x55555555, "%s bits%d: wrote behind %d vectors", kernels->name, n_bits, n_x);
        }
    }
}

// Fills a panel of n columns with random weights, or with the two extreme ones, and w with what they are.
static void random_panel(enum tsffn_format format, int64_t n, int extreme, uint8_t * panel,
                         double (*w)[TSFFN_PANEL_ROWS]) {
    if (format == TSFFN_FORMAT_Q3_NL) {
        random_panel_q3_nl(n, extreme, panel, w);
        return;
    }
    const int n_bytes = weights_bytes(format);
    for (int64_t b = 0; b < n / TSFFN_BLOCK_SIZE; ++b) {
        uint8_t * block = panel + b * TSFFN_PANEL_ROWS * (2 + n_bytes);
        for (int i = 0; i < TSFFN_PANEL_ROWS; ++i) {
            const uint16_t d = (uint16_t)((random_bits() & 0x83ffu) | ((1 + random_bits() % 15) << 10));
            memcpy(block + 2 * i, &d, sizeof(d));
            for (int k = 0; k < n_bytes; ++k) {
                uint8_t q = (uint8_t)random_bits();
                if (extreme != 0) {
                    q = format == TSFFN_FORMAT_Q8_0 ? (q & 1 ? 0x80 : 0x7f) : (q & 1 ? 0xff : 0x00);
                }
                block[2 * TSFFN_PANEL_ROWS + k / 4 * 64 + i * 4 + k % 4] = q;
                double * column = &w[b * TSFFN_BLOCK_SIZE + k][i];
                if (format == TSFFN_FORMAT_Q8_0) {
                    *column = (double)tsffn_f16_to_f32(d) * (int8_t)q;
                } else {
                    *column = (double)tsffn_f16_to_f32(d) * ((q & 15) - 8);
                    column[16 * TSFFN_PANEL_ROWS] = (double)tsffn_f16_to_f32(d) * ((q >> 4) - 8);
                }
            }
        }
    }
}

static void test_panel(enum tsffn_format format, int64_t n, int n_x, int extreme) {
    static uint8_t memory[MAX_BYTES + 2];
    static double w[MAX_N][TSFFN_PANEL_ROWS];
    static float x[MAX_X][MAX_N];
    static _Alignas(64) char converted[MAX_X][TSFFN_I16_HEADER + MAX_N / TSFFN_BLOCK_SIZE * TSFFN_I16_BLOCK_BYTES];
    const bool behind_relu = format == TSFFN_FORMAT_Q3_NL;
    const char * name = behind_relu ? "q3_nl" : format == TSFFN_FORMAT_Q8_0 ? "q8_0" : "q4_0";
    uint8_t * panel = memory + (random_bits() & 2);
    random_panel(format, n, extreme, panel, w);
    const void * pointers[MAX_X] = {NULL};
    for (int t = 0; t < n_x; ++t) {
        for (int64_t j = 0; j < n; ++j) {
            x[t][j] = random_float();
            if (extreme != 0) {
                x[t][j] = x[t][j] < 0.0f && !behind_relu ? -1.0f : 1.0f;
            }
            x[t][j] = x[t][j] < 0.0f && behind_relu ? 0.0f : x[t][j];
        }
        CHECK(tsffn_i16_bytes(n) <= sizeof(converted[t]) && tsffn_u14_bytes(n) <= sizeof(converted[t]), "room");
        (behind_relu ? tsffn_convert_u14 : tsffn_convert_i16)(x[t], converted[t], n);
        pointers[t] = converted[t];
    }
    const double steps = behind_relu ? TSFFN_U14_MAX : TSFFN_I16_MAX;

    float expected[MAX_X][TSFFN_PANEL_ROWS];
    tsffn_kernels_ref.panel[format](n, panel, n_x, pointers, expected, NULL);
    for (int t = 0; t < n_x; ++t) {
        for (int i = 0; i < TSFFN_PANEL_ROWS; ++i) {
            double sum = 0.0, size = 1e-30, weights = 0.0;
            for (int64_t j = 0; j < n; ++j) {
                sum += w[j][i] * (double)x[t][j];
                size += fabs(w[j][i] * (double)x[t][j]);
                weights += fabs(w[j][i]);
            }
            // Each activation is off by at most half a step of max |x| / steps, max |x| being at most 1.
            CHECK(fabs((double)expected[t][i] - sum) <= 0.5 / steps * weights + 1e-6 * size,
                  "ref %s n=%d: row %d, vector %d: %g instead of %g", name, (int)n, i, t, (double)expected[t][i], sum);
        }
    }

    // What is asked for in advance changes nothing.
    const uint8_t * lines[37];
    for (int k = 0; k < 37; ++k) {
        lines[k] = memory + random_bits() % sizeof(memory);
    }
    const struct tsffn_asks asks = {.lines = lines, .n_lines = 37, .stream = panel, .n_stream = 11};
    for (int isa = TSFFN_ISA_REF; isa < TSFFN_ISA_COUNT; ++isa) {
        const struct tsffn_kernels * kernels = tsffn_kernels_for((enum tsffn_isa)isa);
        for (int ask = 0; kernels != NULL && ask < 2; ++ask) {
            float s[MAX_X + 1][TSFFN_PANEL_ROWS];
            memset(s, 0x55, sizeof(s));
            kernels->panel[format](n, panel, n_x, pointers, s, ask != 0 ? &asks : NULL);
            for (int t = 0; t < n_x; ++t) {
                for (int i = 0; i < TSFFN_PANEL_ROWS; ++i) {
                    CHECK(s[t][i] == expected[t][i], "%s %s n=%d, %d vectors: row %d, vector %d: %.9g not %.9g",
                          kernels->name, name, (int)n, n_x, i, t, (double)s[t][i], (double)expected[t][i]);
                }
            }
            uint32_t behind;
            memcpy(&behind, s[n_x], sizeof(behind));
            CHECK(behind == 0x55555555, "%s %s: wrote behind %d vectors", kernels->name, name, n_x);
        }
    }
}

// hi, lo and the sums are what panels.h says, of the very numbers in the I16 part.
static void test_convert(int64_t n) {
    static float x[MAX_N];
    static _Alignas(64) char converted[TSFFN_I16_HEADER + MAX_N / TSFFN_BLOCK_SIZE * TSFFN_I16_BLOCK_BYTES];
    for (int64_t j = 0; j < n; ++j) {
        x[j] = random_float();
    }
    x[n / 2] = 1.5f;
    x[n / 3] = -1.5f;
    tsffn_convert_i16(x, converted, n);
    const int16_t * q = tsffn_i16_values(converted);
    const double d = (double)tsffn_i16_scale(converted);
    CHECK(q[n / 2] == TSFFN_I16_MAX && q[n / 3] == -TSFFN_I16_MAX, "%d %d", q[n / 2], q[n / 3]);
    for (int64_t b = 0; b < n / TSFFN_BLOCK_SIZE; ++b) {
        int32_t sum = 0;
        for (int64_t j = b * TSFFN_BLOCK_SIZE; j < (b + 1) * TSFFN_BLOCK_SIZE; ++j) {
            const int number = 256 * tsffn_i16_hi(converted, n)[j] + tsffn_i16_lo(converted, n)[j];
            CHECK(number == q[j], "%d instead of %d", number, q[j]);
            CHECK(fabs(d * number - (double)x[j]) <= 0.501 * d, "%g instead of %g", d * number, (double)x[j]);
            sum += number;
        }
        CHECK(tsffn_i16_sums(converted, n)[b] == sum, "sum of block %d", (int)b);
    }
}

static void test_convert_u14(int64_t n) {
    static float x[MAX_N];
    static _Alignas(64) char converted[TSFFN_U14_HEADER + 2 * MAX_N];
    for (int64_t j = 0; j < n; ++j) {
        x[j] = random_float() < 0.0f ? 0.0f : random_float() + 1.0f;
    }
    x[n / 2] = 2.5f;
    tsffn_convert_u14(x, converted, n);
    const double d = (double)tsffn_u14_scale(converted);
    for (int64_t j = 0; j < n; ++j) {
        const int hi = tsffn_u14_hi(converted)[j], lo = tsffn_u14_lo(converted, n)[j];
        CHECK(hi < 128 && lo < 128, "%d %d", hi, lo);
        CHECK(fabs(d * (128 * hi + lo) - (double)x[j]) <= 0.501 * d, "%d %d instead of %g", hi, lo, (double)x[j] / d);
    }
    CHECK(tsffn_u14_hi(converted)[n / 2] == 127 && tsffn_u14_lo(converted, n)[n / 2] == 127, "the largest");
}

// What is made of x: a sign alone, or the nearest of the odd numbers from -(2^P - 1) to 2^P - 1, times d.
static void test_convert_bits(int64_t n, int n_planes) {
    static float x[MAX_N];
    static _Alignas(64) char converted[TSFFN_BITS_HEADER + MAX_N / TSFFN_BLOCK_SIZE * TSFFN_BITS_MAX_BLOCK_BYTES];
    const int most = (1 << n_planes) - 1;
    for (int64_t j = 0; j < n; ++j) {
        x[j] = random_float();
    }
    x[n / 2] = 1.5f;
    x[n / 3] = -1.5f;
    x[n / 4] = -0.0f;
    tsffn_convert_bits(x, converted, n, n_planes);
    const double d = (double)tsffn_bits_scale(converted);
    CHECK(tsffn_bits_planes(converted) == n_planes, "%d bits", tsffn_bits_planes(converted));
    CHECK(n_planes == 1 ? d == 1.0 : fabs(d * most - 1.5) < 1e-6, "scale %g", d);
    for (int64_t j = 0; j < n; ++j) {
        int q = 0;
        for (int k = 0; k < n_planes; ++k) {
            const uint32_t word = tsffn_bits_words(converted)[j / TSFFN_BLOCK_SIZE * n_planes + k];
            q += (1 << k) * ((word >> j % TSFFN_BLOCK_SIZE & 1) != 0 ? -1 : 1);
        }
        const double v = (double)x[j];
        const bool right = n_planes == 1 ? q == (v >= 0.0 ? 1 : -1) : fabs(d * q - v) <= 1.001 * d;
        CHECK(right, "%d bits: %d instead of %g", n_planes, q, v / d);
    }
}

int main(void) {
    static const int64_t sizes[] = {32, 64, 96, 160, MAX_N};
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); ++i) {
        test_convert(sizes[i]);
        test_convert_u14(sizes[i]);
        for (int n_planes = 1; n_planes <= TSFFN_BITS_MAX_INPUT; ++n_planes) {
            test_convert_bits(sizes[i], n_planes);
        }
        for (int n_x = 1; n_x <= MAX_X; ++n_x) {
            for (int extreme = 0; extreme < 2; ++extreme) {
                test_panel(TSFFN_FORMAT_Q8_0, sizes[i], n_x, extreme);
                test_panel(TSFFN_FORMAT_Q4_0, sizes[i], n_x, extreme);
                test_panel(TSFFN_FORMAT_Q3_NL, sizes[i], n_x, extreme);
                for (int n_planes = 1; n_planes <= TSFFN_BITS_MAX_INPUT && (n_x <= 5 || n_x == MAX_X); ++n_planes) {
                    test_panel_bits(1, n_planes, sizes[i], n_x, extreme);
                    test_panel_bits(2, n_planes, sizes[i], n_x, extreme);
                }
            }
        }
    }
    for (int isa = TSFFN_ISA_REF; isa < TSFFN_ISA_COUNT; ++isa) {
        const struct tsffn_kernels * kernels = tsffn_kernels_for((enum tsffn_isa)isa);
        if (kernels != NULL) {
            printf("%s: ok\n", kernels->name);
        }
    }
    return 0;
}
