// The functions that measure this machine: what they refuse, that they read every word they should, sane results. How
// fast the machine is, is not tested.
#include "check.h"
#include "tsffn.h"

#include <math.h>
#include <stdbool.h>

enum { N_ROWS = 1003, ROW_BYTES = 2312, WORDS = ROW_BYTES / 8 };

static uint64_t memory[N_ROWS * WORDS];

static void test_arguments(void) {
    double seconds, rate;
    uint64_t sum;
    const char * odd = (const char *)memory + 4;
    CHECK(!tsffn_measure_rows(NULL, N_ROWS, ROW_BYTES, 1, 0, 1, &seconds, &sum), "no memory");
    CHECK(!tsffn_measure_rows(odd, N_ROWS - 1, ROW_BYTES, 1, 0, 1, &seconds, &sum), "misaligned");
    CHECK(!tsffn_measure_rows(memory, N_ROWS, 0, 1, 0, 1, &seconds, &sum), "empty rows");
    CHECK(!tsffn_measure_rows(memory, N_ROWS, ROW_BYTES - 1, 1, 0, 1, &seconds, &sum), "rows of odd bytes");
    CHECK(!tsffn_measure_rows(memory, N_ROWS, ROW_BYTES, 0, 0, 1, &seconds, &sum), "every = 0");
    CHECK(!tsffn_measure_rows(memory, N_ROWS, ROW_BYTES, N_ROWS + 1, 0, 1, &seconds, &sum), "every > n_rows");
    CHECK(!tsffn_measure_rows(memory, 0, ROW_BYTES, 1, 0, 1, &seconds, &sum), "no rows");
    CHECK(!tsffn_measure_rows(memory, SIZE_MAX / 8, ROW_BYTES, 1, 0, 1, &seconds, &sum), "size overflows");
    CHECK(!tsffn_measure_rows(memory, N_ROWS, ROW_BYTES, 10, 10, 1, &seconds, &sum), "pass = every");
    CHECK(!tsffn_measure_rows(memory, N_ROWS, ROW_BYTES, 1, 0, 0, &seconds, &sum), "no threads");
    CHECK(!tsffn_measure_rows(memory, N_ROWS, ROW_BYTES, 1, 0, 1, NULL, &sum), "no result");
    CHECK(!tsffn_measure_rows(memory, N_ROWS, ROW_BYTES, 1, 0, 1, &seconds, NULL), "no sum");
    CHECK(!tsffn_measure_rows(memory, N_ROWS, ROW_BYTES, 1, 0, 1 << 20, &seconds, &sum), "a million threads");
    CHECK(!tsffn_measure_compute(0, 0.01, &rate), "no threads");
    CHECK(!tsffn_measure_compute(1 << 20, 0.01, &rate), "a million threads");
    CHECK(!tsffn_measure_compute(1, 0.0, &rate), "no time");
    CHECK(!tsffn_measure_compute(1, (double)NAN, &rate), "nan");
    CHECK(!tsffn_measure_compute(1, 61.0, &rate), "too long");
    CHECK(!tsffn_measure_compute(1, 0.01, NULL), "no result");
}

// Every word of all rows, once: the passes of one `every` share the rows out among them.
static void test_sums(void) {
    static const size_t everies[] = {1, 2, 10, N_ROWS};
    for (size_t e = 0; e < sizeof(everies) / sizeof(everies[0]); ++e) {
        const size_t every = everies[e];
        const size_t n_read = N_ROWS / every * every * WORDS; // an incomplete window is left out
        uint64_t expected = 0;
        for (size_t i = 0; i < n_read; ++i) {
            expected += memory[i];
        }
        for (int n_threads = 1; n_threads <= 3; ++n_threads) {
            uint64_t total = 0;
            for (size_t pass = 0; pass < every; ++pass) {
                double seconds = -1.0;
                uint64_t sum = 0;
                CHECK(tsffn_measure_rows(memory, N_ROWS, ROW_BYTES, every, pass, n_threads, &seconds, &sum), "refused");
                CHECK(seconds > 0.0 && isfinite(seconds), "%g s", seconds);
                total += sum;
            }
            CHECK(total == expected, "every %d, %d threads: another sum", (int)every, n_threads);
        }
    }
}

static void test_compute(void) {
    for (int n_threads = 1; n_threads <= 3; ++n_threads) {
        double rate = -1.0;
        CHECK(tsffn_measure_compute(n_threads, 0.01, &rate), "refused");
        CHECK(rate > 0.0 && isfinite(rate), "%g rows/s", rate);
    }
}

int main(void) {
    for (size_t i = 0; i < N_ROWS * WORDS; ++i) {
        memory[i] = random_bits();
    }
    test_arguments();
    test_sums();
    test_compute();
    printf("measure: ok\n");
    return 0;
}
