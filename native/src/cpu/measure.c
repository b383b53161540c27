// What this machine's memory and cores give to an FFN, for machine profiles.
//
// Reading: every row is summed as 64-bit words, so that nothing but memory is in the way and the sum proves that all of
// it was read. Computing: the real Q4_0 dot product on rows that stay in the caches, in phases that all threads share
// equally and end with a barrier, as those of ffn.c: a slow or missing core holds up all the others here as it does
// there.
#include "kernels/kernels.h"
#include "tsffn.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    WORDS = TSFFN_CACHE_LINE / sizeof(uint64_t),
    COMPUTE_EMBD = 4096, // n_embd of the 7B models
    COMPUTE_ROWS = 64,   // 144 KB of rows: inside a second-level cache
    PHASE_ROWS = 4096,   // under 1 ms for one thread, as the phases of a 7B layer
    READ_AHEAD_BYTES = 4096,
    MAX_THREADS = 4096, // libgomp keeps a list of the threads to start on the stack
};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// The row read of window w: a mix of w's bits (the finalizer of splitmix64), moved on by one with each pass.
static size_t pick(uint64_t w, uint64_t every, uint64_t pass) {
    uint64_t z = w + 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    const uint64_t place = ((z >> 32) * every >> 32) + pass;
    return (size_t)(w * every + (place < every ? place : place - every));
}

// The sum of a row's n words. Asks for `next` line by line on the way: all its lines at once would stall the sum.
static uint64_t sum_row(const uint64_t * row, size_t n, const uint64_t * next) {
    uint64_t lanes[WORDS] = {0};
    size_t i = 0;
    for (; i + WORDS <= n; i += WORDS) {
        __builtin_prefetch(next + i, 0, 3);
        for (size_t k = 0; k < WORDS; ++k) {
            lanes[k] += row[i + k];
        }
    }
    for (; i < n; ++i) {
        lanes[0] += row[i];
    }
    uint64_t sum = 0;
    for (size_t k = 0; k < WORDS; ++k) {
        sum += lanes[k];
    }
    return sum;
}

bool tsffn_measure_rows(const void * memory, size_t n_rows, size_t row_bytes, size_t every, uint64_t pass,
                        int n_threads, double * seconds, uint64_t * sum) {
    if (memory == NULL || (uintptr_t)memory % sizeof(uint64_t) != 0 || row_bytes == 0 ||
        row_bytes % sizeof(uint64_t) != 0 || every == 0 || every > UINT32_MAX || pass >= every || n_rows < every ||
        n_rows > SIZE_MAX / row_bytes || n_threads < 1 || n_threads > MAX_THREADS || seconds == NULL || sum == NULL) {
        return false;
    }
    const uint64_t * words = memory;
    const size_t n_words = row_bytes / sizeof(uint64_t);
    const size_t n_windows = n_rows / every;
    const size_t ahead = (READ_AHEAD_BYTES + row_bytes - 1) / row_bytes;
    uint64_t total = 0;
    double start = 0.0;
    int granted = 0;
#pragma omp parallel num_threads(n_threads) reduction(+ : total)
    {
        const size_t nth = (size_t)omp_get_num_threads();
        const size_t ith = (size_t)omp_get_thread_num();
        const size_t end = n_windows / nth * (ith + 1) + (ith + 1 == nth ? n_windows % nth : 0);
#pragma omp single
        {
            granted = (int)nth;
            start = now();
        }
        for (size_t w = n_windows / nth * ith; w < end; ++w) {
            const uint64_t * row = words + pick(w, every, pass) * n_words;
            const uint64_t * next = w + ahead < end ? words + pick(w + ahead, every, pass) * n_words : row;
            total += sum_row(row, n_words, next);
        }
    }
    *seconds = now() - start;
    *sum = total;
    return granted == n_threads;
}

bool tsffn_measure_compute(int n_threads, double min_seconds, double * rows_per_second) {
    if (n_threads < 1 || n_threads > MAX_THREADS || !(min_seconds > 0.0 && min_seconds <= 60.0) ||
        rows_per_second == NULL) {
        return false;
    }
    const size_t row_bytes = COMPUTE_EMBD / TSFFN_BLOCK_SIZE * TSFFN_Q4_0_BYTES;
    const size_t x_bytes = tsffn_i16_bytes(COMPUTE_EMBD);
    uint8_t * rows = aligned_alloc(TSFFN_CACHE_LINE, COMPUTE_ROWS * row_bytes);
    char * x = aligned_alloc(TSFFN_CACHE_LINE, x_bytes);
    if (rows == NULL || x == NULL) {
        free(rows);
        free(x);
        return false;
    }
    memset(rows, 0x3c, COMPUTE_ROWS * row_bytes); // as f16: 1.06
    memset(x, 0, x_bytes);
    tsffn_dots * const dots = tsffn_kernels_best()->dots[TSFFN_FORMAT_Q4_0];
    const void * const activations = x;
    double start = 0.0, elapsed = 0.0;
    uint64_t phases = 0;
    int granted = 0;
    float total = 0.0f;
#pragma omp parallel num_threads(n_threads) reduction(+ : total)
    {
        const int nth = omp_get_num_threads();
        const int ith = omp_get_thread_num();
        const int begin = (int)((int64_t)PHASE_ROWS * ith / nth);
        const int end = (int)((int64_t)PHASE_ROWS * (ith + 1) / nth);
#pragma omp single
        {
            granted = nth;
            start = now();
        }
        while (elapsed < min_seconds) {
            for (int i = begin; i < end; ++i) {
                float sum;
                dots(COMPUTE_EMBD, rows + (size_t)(i % COMPUTE_ROWS) * row_bytes, 1, &activations, &sum, NULL);
                total += sum;
            }
#pragma omp barrier
#pragma omp single
            {
                ++phases;
                elapsed = now() - start;
            }
        }
    }
    free(rows);
    free(x);
    *rows_per_second = (double)phases * PHASE_ROWS / elapsed;
    return granted == n_threads && total == 0.0f;
}
