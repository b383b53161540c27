// Speed of the row kernels alone, on every ISA tier of this machine: rows in cache, all rows of large matrices in
// order, and random fractions of their rows, asked for in advance. Beside them the speed of only reading.
//
// All weights are bytes 0x3c, which is a normal number in every format: kernels take no time that depends on their
// values, short of subnormal ones. So every row is the same, and every sum is known from one row of the plain C kernel.
#define _DEFAULT_SOURCE // madvise, MAP_ANONYMOUS
#include "cpu/kernels/tiers.h"
#include "report.h"
#include "tsffn.h"

#include <errno.h>
#include <math.h>
#include <omp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
    WEIGHTS = 0x3c,
    CACHE_LINE = 64,
    CACHED_BYTES = 16 << 10, // of rows that stay in L1; activations need as much again
    AHEAD_BYTES = 4096,      // rows in order are asked for so far ahead
    CHUNK_ROWS = 128,        // rows of a list are asked for while those of the chunk before are computed
    MAX_LINES = 8192,        // asked for at most
    N_LISTS = 64,            // random choices of rows, taken in turn
    MAX_THREADS = 1024,
    MAX_RUNS = 16,          // thread counts, repetitions
    READ_BYTES = 256 << 20, // of one measurement of only reading
    CHECK_EVERY = 1 << 10,  // rows computed between two looks at the clock
    DEFAULT_BYTES = 1 << 30,
    DEFAULT_MILLISECONDS = 15,
};

static const double fractions[] = {0.01, 0.05, 0.10, 0.20, 0.50, 1.0};
enum { N_FRACTIONS = sizeof(fractions) / sizeof(fractions[0]) };

// What one thread computes with.
struct worker {
    int64_t pass;           // over a matrix, counted over all jobs, so that none finds the rows of the one before
    const uint8_t * matrix; // the one at work
    char * x[4];            // converted activations
    float * y;              // [n_cols]
    const uint8_t ** lines; // [MAX_LINES] to ask for
};

// One kernel in one tier.
struct kernel {
    const struct tsffn_kernels * tier;
    enum tsffn_format format;
};

// A row kernel. `step` computes row i, or the panel that starts there, of the worker's matrix, and asks for lines in
// advance meanwhile. It returns the sum of what it computed.
struct operation {
    const char * name;
    unsigned patterns; // bit per pattern
    int n_rows;        // of a step: 1, or TSFFN_PANEL_ROWS
    int n_x;           // products per step and row
    bool writes_y;     // gives its result in y
    bool (*exists)(struct kernel k);
    bool (*same)(struct kernel a, struct kernel b);
    double (*step)(struct kernel k, const struct worker * w, int64_t i, const struct tsffn_asks * asks);
};

static struct {
    int n_threads[MAX_RUNS], n_thread_counts;
    const char * isas;  // comma-separated; NULL: all
    const char * types; // likewise
    int64_t n_rows, n_cols;
    size_t bytes; // 0: four times the last cache
    int milliseconds, repetitions;
    bool json;
} options = {
    .n_rows = 14336,
    .n_cols = 4096,
    .milliseconds = DEFAULT_MILLISECONDS,
    .repetitions = 3,
};

static uint8_t * memory;              // [options.bytes]
static int32_t * lists[N_FRACTIONS];  // [N_LISTS][n_listed]: ascending rows
static int64_t n_listed[N_FRACTIONS]; //
static struct worker * workers;       // [the largest number of threads]
static struct report report;

static int64_t max_i64(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static int64_t min_i64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static size_t row_bytes(enum tsffn_format format) {
    static const size_t block_bytes[TSFFN_FORMAT_COUNT] = {
        4, 2, 2, TSFFN_Q8_0_BYTES, TSFFN_Q4_0_BYTES, TSFFN_Q3_NL_BYTES};
    const int block_size = tsffn_x_format(format) == TSFFN_X_F32 ? 1 : TSFFN_BLOCK_SIZE;
    const size_t header = format == TSFFN_FORMAT_Q3_NL ? TSFFN_Q3_NL_HEADER : 0;
    return header + (size_t)(options.n_cols / block_size) * block_bytes[format];
}

static const uint8_t * row(const struct worker * w, enum tsffn_format format, int64_t i) {
    return w->matrix + (size_t)i * row_bytes(format);
}

static bool has_dots(struct kernel k) {
    return k.format < TSFFN_ROW_FORMAT_COUNT && k.tier->dots[k.format] != NULL;
}

static bool same_dots(struct kernel a, struct kernel b) {
    return a.tier->dots[a.format] == b.tier->dots[b.format];
}

static double dots(struct kernel k, const struct worker * w, int64_t i, const struct tsffn_asks * asks, int n_x) {
    const void * const x[4] = {w->x[0], w->x[1], w->x[2], w->x[3]};
    float s[4];
    k.tier->dots[k.format](options.n_cols, row(w, k.format, i), n_x, x, s, asks);
    double sum = 0.0;
    for (int t = 0; t < n_x; ++t) {
        sum += (double)s[t];
    }
    return sum;
}

static double step_dot(struct kernel k, const struct worker * w, int64_t i, const struct tsffn_asks * asks) {
    return dots(k, w, i, asks, 1);
}

static double step_dot4(struct kernel k, const struct worker * w, int64_t i, const struct tsffn_asks * asks) {
    return dots(k, w, i, asks, 4);
}

static bool has_axpys(struct kernel k) {
    return k.format < TSFFN_ROW_FORMAT_COUNT && k.tier->axpys[k.format] != NULL;
}

static bool same_axpys(struct kernel a, struct kernel b) {
    return a.tier->axpys[a.format] == b.tier->axpys[b.format];
}

static double step_axpy(struct kernel k, const struct worker * w, int64_t i, const struct tsffn_asks * asks) {
    static const float a = 0.25f;
    const void * const rows = row(w, k.format, i);
    k.tier->axpys[k.format](options.n_cols, 1, &a, &rows, w->y, asks);
    return 0.0;
}

static bool has_panel(struct kernel k) {
    return k.tier->panel[k.format] != NULL;
}

static bool same_panel(struct kernel a, struct kernel b) {
    return a.tier->panel[a.format] == b.tier->panel[b.format];
}

static double panels(struct kernel k, const struct worker * w, int64_t i, const struct tsffn_asks * asks, int n_x) {
    const void * const x[4] = {w->x[0], w->x[1], w->x[2], w->x[3]};
    float s[4][TSFFN_PANEL_ROWS];
    k.tier->panel[k.format](options.n_cols, row(w, k.format, i), n_x, x, s, asks);
    double sum = 0.0;
    for (int t = 0; t < n_x; ++t) {
        for (int j = 0; j < TSFFN_PANEL_ROWS; ++j) {
            sum += (double)s[t][j];
        }
    }
    return sum;
}

static double step_panel(struct kernel k, const struct worker * w, int64_t i, const struct tsffn_asks * asks) {
    return panels(k, w, i, asks, 1);
}

static double step_panel4(struct kernel k, const struct worker * w, int64_t i, const struct tsffn_asks * asks) {
    return panels(k, w, i, asks, 4);
}

#define IN(pattern) (1u << (pattern))
// clang-format off
static const struct operation operations[] = {
    {"dot", IN(CACHED) | IN(IN_ORDER) | IN(SPARSE), 1, 1, false, has_dots, same_dots, step_dot},
    {"dot4", IN(CACHED), 1, 4, false, has_dots, same_dots, step_dot4},
    {"axpy", IN(CACHED) | IN(SPARSE), 1, 1, true, has_axpys, same_axpys, step_axpy},
    {"panel", IN(CACHED) | IN(IN_ORDER), TSFFN_PANEL_ROWS, 1, false, has_panel, same_panel, step_panel},
    {"panel4", IN(CACHED), TSFFN_PANEL_ROWS, 4, false, has_panel, same_panel, step_panel4},
};
// clang-format on
enum { N_OPERATIONS = sizeof(operations) / sizeof(operations[0]) };

// One measurement.
struct job {
    const struct operation * op;
    struct kernel kernel;
    enum pattern pattern;
    int fraction; // of `fractions`
    int n_threads;
    double row_sum; // what each row gives
};

// Ends the program with one line and exit code 2 for wrong options, 1 for everything else.
__attribute__((format(printf, 2, 3))) _Noreturn static void fail(int code, const char * format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "bench_kernels: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    exit(code);
}

static void * allocate(size_t n, size_t size) {
    void * p = aligned_alloc(CACHE_LINE, (n * size + CACHE_LINE) / CACHE_LINE * CACHE_LINE);
    if (p == NULL) {
        fail(1, "out of memory");
    }
    return p;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// n_listed[f] of n_rows rows for each list, every choice equally likely: row i is taken with probability
// (still to take) / (still to come).
static void make_lists(void) {
    uint64_t state = 0x9e3779b97f4a7c15u; // xorshift64*
    for (int f = 0; f < N_FRACTIONS; ++f) {
        n_listed[f] = (int64_t)llround(fractions[f] * (double)options.n_rows);
        lists[f] = allocate((size_t)(N_LISTS * n_listed[f]), sizeof(int32_t));
        int32_t * out = lists[f];
        for (int list = 0; list < N_LISTS; ++list) {
            int64_t to_take = n_listed[f];
            for (int64_t i = 0; i < options.n_rows; ++i) {
                state ^= state >> 12;
                state ^= state << 25;
                state ^= state >> 27;
                const uint64_t random = state * 0x2545f4914f6cdd1du >> 32;
                if ((int64_t)(random * (uint64_t)(options.n_rows - i) >> 32) < to_take) {
                    *out++ = (int32_t)i;
                    --to_take;
                }
            }
        }
    }
}

// Pages of 4 KB: weights are pages of a mapped file.
static void make_memory(void) {
    memory = mmap(NULL, options.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        fail(1, "no %zu MiB for the weights: %s: take less with --mib", options.bytes >> 20, strerror(errno));
    }
    madvise(memory, options.bytes, MADV_NOHUGEPAGE);
    const int64_t n_pages = (int64_t)(options.bytes >> 12);
#pragma omp parallel for
    for (int64_t page = 0; page < n_pages; ++page) {
        memset(memory + (page << 12), WEIGHTS, 1 << 12);
    }
}

static void make_workers(int n) {
    const size_t x_bytes = (size_t)max_i64((int64_t)tsffn_i16_bytes(options.n_cols), options.n_cols * 4);
    workers = allocate((size_t)n, sizeof(*workers));
    for (int k = 0; k < n; ++k) {
        workers[k] = (struct worker){
            .y = allocate((size_t)options.n_cols, sizeof(float)),
            .lines = allocate(MAX_LINES, sizeof(*workers[k].lines)),
        };
        for (int t = 0; t < 4; ++t) {
            workers[k].x[t] = allocate(1, x_bytes);
        }
    }
}

// Activations of 1 in the format that the kernel takes.
static void prepare(struct worker * w, enum tsffn_format format) {
    w->matrix = memory;
    for (int64_t j = 0; j < options.n_cols; ++j) {
        w->y[j] = 1.0f;
    }
    for (int t = 0; t < 4; ++t) {
        if (tsffn_x_format(format) == TSFFN_X_I16) {
            tsffn_convert_i16(w->y, w->x[t], options.n_cols);
        } else if (tsffn_x_format(format) == TSFFN_X_U14) {
            tsffn_convert_u14(w->y, w->x[t], options.n_cols);
        } else {
            memcpy(w->x[t], w->y, (size_t)options.n_cols * sizeof(float));
        }
    }
    memset(w->y, 0, (size_t)options.n_cols * sizeof(float));
}

// Rows [begin, end) of the matrix in order. A panel asks for the next one, a row for one that lies AHEAD_BYTES ahead.
static double rows_in_order(const struct worker * w, const struct job * job, int64_t begin, int64_t end) {
    const enum tsffn_format format = job->kernel.format;
    const int64_t n = job->op->n_rows;
    const int64_t bytes = n * (int64_t)row_bytes(format);
    const int64_t ahead = n > 1 ? n : (AHEAD_BYTES - 1) / bytes + 1;
    double sum = 0.0;
    for (int64_t i = begin; i < end; i += n) {
        struct tsffn_asks asks = {.n_stream = 0};
        if (i + ahead < end) {
            asks.stream = row(w, format, i + ahead);
            asks.n_stream = (bytes + CACHE_LINE - 1) / CACHE_LINE;
        }
        sum += job->op->step(job->kernel, w, i, &asks);
    }
    return sum;
}

// The n rows of the list; those of the n_next behind them are asked for meanwhile.
static double rows_of_list(const struct worker * w, const struct job * job, const int32_t * list, int64_t n,
                           int64_t n_next) {
    const int64_t bytes = (int64_t)row_bytes(job->kernel.format);
    int64_t n_lines = 0;
    for (int64_t k = n; k < n + n_next; ++k) {
        const uint8_t * start = row(w, job->kernel.format, list[k]);
        for (int64_t line = 0; line < bytes && n_lines < MAX_LINES; line += CACHE_LINE) {
            w->lines[n_lines++] = start + line;
        }
    }
    double sum = 0.0;
    for (int64_t k = 0; k < n; ++k) {
        const int64_t from = n_lines * k / n;
        const struct tsffn_asks asks = {.lines = w->lines + from, .n_lines = n_lines * (k + 1) / n - from};
        sum += job->op->step(job->kernel, w, list[k], &asks);
    }
    return sum;
}

static int64_t n_matrices(enum tsffn_format format) {
    return (int64_t)(options.bytes / ((size_t)options.n_rows * row_bytes(format)));
}

// Rows that a CACHED job computes again and again.
static int64_t cached_rows(const struct job * job) {
    const int64_t n = job->op->n_rows;
    const int64_t rows = min_i64(CACHED_BYTES / (int64_t)row_bytes(job->kernel.format), options.n_rows);
    return max_i64(rows / n, 1) * n;
}

// Computes the part [begin, end) of a pass: units are rounds of the cached rows, rows or panels of the matrix, or
// places of the list.
static double compute(const struct worker * w, const struct job * job, int64_t begin, int64_t end,
                      int64_t end_of_pass) {
    const int n = job->op->n_rows;
    double sum = 0.0;
    switch (job->pattern) {
    case CACHED:
        for (int64_t k = begin; k < end; ++k) {
            for (int64_t i = 0; i < cached_rows(job); i += n) {
                sum += job->op->step(job->kernel, w, i, NULL);
            }
        }
        break;
    case IN_ORDER:
        sum = rows_in_order(w, job, begin * n, end * n);
        break;
    case SPARSE: {
        const int64_t chunk = max_i64(llround(fractions[job->fraction] * CHUNK_ROWS), 1);
        const int64_t m = n_matrices(job->kernel.format);
        const int64_t number = (w->pass % m + w->pass / m) % N_LISTS; // another one whenever a matrix comes again
        const int32_t * list = lists[job->fraction] + number * n_listed[job->fraction];
        for (int64_t k = begin; k < end; k += chunk) {
            const int64_t here = min_i64(chunk, end - k);
            sum += rows_of_list(w, job, list + k, here, min_i64(chunk, end_of_pass - k - here));
        }
        break;
    }
    }
    return sum;
}

// One thread's share of the job, pass after pass until the time is up. Returns rows per second, or -1 when a sum is
// wrong.
static double work(struct worker * w, const struct job * job, int ith) {
    const size_t matrix_bytes = (size_t)options.n_rows * row_bytes(job->kernel.format);
    int64_t rows_per_unit = 1, n_units = n_listed[job->fraction];
    if (job->pattern == CACHED) {
        rows_per_unit = cached_rows(job);
        n_units = max_i64(CHECK_EVERY / rows_per_unit, 1);
    } else if (job->pattern == IN_ORDER) {
        rows_per_unit = job->op->n_rows;
        n_units = options.n_rows / rows_per_unit;
    }
    const int64_t first = n_units * ith / job->n_threads;
    const int64_t last = n_units * (ith + 1) / job->n_threads;
    const int64_t check_every = max_i64(CHECK_EVERY / rows_per_unit, 1);
    const double start = now();
    const double budget = options.milliseconds * 1e-3;
    double elapsed = 0.0, sum = 0.0, tolerance = 1e-3;
    int64_t n_rows = 0, n_summed = 0;
    for (; elapsed < budget; ++w->pass) {
        w->matrix = memory + (size_t)(w->pass % n_matrices(job->kernel.format)) * matrix_bytes;
        if (job->op->writes_y) { // holds the last pass only: longer sums of one number would lose bits
            memset(w->y, 0, (size_t)options.n_cols * sizeof(float));
            n_summed = 0;
        }
        for (int64_t u = first; u < last && elapsed < budget; u += check_every) {
            const int64_t end = min_i64(u + check_every, last);
            sum += compute(w, job, u, end, last);
            n_rows += (end - u) * rows_per_unit;
            n_summed += (end - u) * rows_per_unit;
            elapsed = now() - start;
        }
    }
    if (job->op->writes_y) {
        sum = (double)w->y[options.n_cols - 1];
        tolerance += (double)n_summed * 0x1p-24;
    }
    const double expected = (double)n_summed * job->row_sum;
    return fabs(sum - expected) <= tolerance * fabs(expected) ? (double)n_rows / elapsed : -1.0;
}

// What a row gives by the plain C kernel.
static double sum_of_row(const struct operation * op, enum tsffn_format format) {
    const struct kernel ref = {&tsffn_kernels_ref, format};
    struct worker * w = &workers[0];
    prepare(w, format);
    if (!has_dots(ref)) { // a format of panels
        return op->n_x * panels(ref, w, 0, NULL, 1) / TSFFN_PANEL_ROWS;
    }
    const struct operation * plain = op->writes_y ? op : &operations[0];
    const double sum = plain->step(ref, w, 0, NULL);
    return op->writes_y ? (double)w->y[options.n_cols - 1] : op->n_x * sum;
}

static int compare_doubles(const void * a, const void * b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double * values, int n) {
    qsort(values, (size_t)n, sizeof(*values), compare_doubles);
    return n % 2 != 0 ? values[n / 2] : 0.5 * (values[n / 2 - 1] + values[n / 2]);
}

static void add_result(struct result result) {
    struct result * results = realloc(report.results, (size_t)(report.n_results + 1) * sizeof(*results));
    if (results == NULL) {
        fail(1, "out of memory");
    }
    results[report.n_results++] = result;
    report.results = results;
}

static void run(const struct job * job) {
    const enum tsffn_format format = job->kernel.format;
    const char * isa = job->kernel.tier->name;
    double ns[MAX_RUNS];
    for (int k = 0; k < options.repetitions; ++k) {
        double rate = 0.0;
        bool ok = true;
#pragma omp parallel num_threads(job->n_threads) reduction(+ : rate) reduction(&& : ok)
        {
            struct worker * w = &workers[omp_get_thread_num()];
            prepare(w, format);
#pragma omp barrier
            const double mine = omp_get_num_threads() == job->n_threads ? work(w, job, omp_get_thread_num()) : -1.0;
            ok = mine > 0.0;
            rate += mine;
        }
        if (!ok) {
            fail(1, "%s %s of %s: wrong sum, or fewer than %d threads", isa, job->op->name, format_names[format],
                 job->n_threads);
        }
        ns[k] = 1e9 / (rate * job->op->n_x);
    }
    add_result((struct result){
        .pattern = job->pattern,
        .format = format,
        .kernel = job->op->name,
        .isa = isa,
        .n_threads = job->n_threads,
        .fraction = job->pattern == SPARSE ? fractions[job->fraction] : 1.0,
        .bytes_per_row = (double)row_bytes(format),
        .ns_per_product = median(ns, options.repetitions),
    });
}

// Only reads rows of one length: all in order, or one random row of every `every`.
static void run_read(enum tsffn_format format, enum pattern pattern, double fraction, int n_threads) {
    static size_t turn; // moves on to other rows each time
    const size_t together = format < TSFFN_ROW_FORMAT_COUNT ? 1 : TSFFN_PANEL_ROWS;
    const size_t bytes = together * row_bytes(format);
    const size_t every = (size_t)llround(1.0 / fraction);
    const size_t n_all = options.bytes / bytes;
    size_t n_rows = (READ_BYTES / bytes + 1) * every;
    n_rows = (n_rows < n_all ? n_rows : n_all) / every * every;
    if (n_rows == 0 || bytes % sizeof(uint64_t) != 0) {
        return;
    }
    double ns[MAX_RUNS];
    for (int k = 0; k < options.repetitions; ++k, ++turn) {
        const uint8_t * rows = memory + turn % (n_all / n_rows) * n_rows * bytes;
        double seconds;
        uint64_t sum;
        const bool ok = tsffn_measure_rows(rows, n_rows, bytes, every, turn % every, n_threads, &seconds, &sum);
        if (!ok || sum != n_rows / every * (bytes / sizeof(uint64_t)) * (UINT64_MAX / 0xff * WEIGHTS)) {
            fail(1, "only read: wrong sum, or fewer than %d threads", n_threads);
        }
        ns[k] = seconds * 1e9 / (double)(n_rows / every * together);
    }
    add_result((struct result){
        .pattern = pattern,
        .format = format,
        .kernel = "only read",
        .isa = "",
        .n_threads = n_threads,
        .fraction = fraction,
        .bytes_per_row = (double)(bytes / together),
        .ns_per_product = median(ns, options.repetitions),
    });
}

// Whether `name` is in the comma-separated list; NULL lists everything.
static bool is_listed(const char * list, const char * name) {
    const size_t length = strlen(name);
    for (const char * p = list; p != NULL && *p != '\0'; p += strcspn(p, ","), p += *p == ',') {
        if (strncmp(p, name, length) == 0 && (p[length] == ',' || p[length] == '\0')) {
            return true;
        }
    }
    return list == NULL;
}

// One kernel with one number of threads, on all tiers that have it; a tier that shares it with one before is left out.
static void run_tiers(const struct operation * op, enum tsffn_format format, enum pattern pattern, int n_threads) {
    struct job job = {.op = op, .pattern = pattern, .n_threads = n_threads, .row_sum = sum_of_row(op, format)};
    struct kernel done[TSFFN_ISA_COUNT];
    int n_done = 0;
    for (int isa = 0; isa < TSFFN_ISA_COUNT; ++isa) {
        job.kernel = (struct kernel){tsffn_kernels_for((enum tsffn_isa)isa), format};
        if (job.kernel.tier == NULL || !is_listed(options.isas, job.kernel.tier->name) || !op->exists(job.kernel)) {
            continue;
        }
        bool is_new = true;
        for (int k = 0; k < n_done; ++k) {
            is_new = is_new && !op->same(job.kernel, done[k]);
        }
        if (!is_new) {
            continue;
        }
        done[n_done++] = job.kernel;
        for (job.fraction = 0; job.fraction < (pattern == SPARSE ? N_FRACTIONS : 1); ++job.fraction) {
            run(&job);
        }
    }
}

static void run_all(void) {
    static const int one = 1;
    for (enum pattern pattern = CACHED; pattern <= SPARSE; ++pattern) {
        for (int format = 0; format < N_FORMATS; ++format) {
            const bool rows_only = pattern == SPARSE && format >= TSFFN_ROW_FORMAT_COUNT; // which it has not
            if (rows_only || !is_listed(options.types, format_names[format])) {
                continue;
            }
            const int * n_threads = pattern == CACHED ? &one : options.n_threads;
            const int n_counts = pattern == CACHED ? 1 : options.n_thread_counts;
            for (int k = 0; k < n_counts; ++k) {
                for (int f = 0; f < N_FRACTIONS && pattern == SPARSE; ++f) {
                    run_read((enum tsffn_format)format, pattern, fractions[f], n_threads[k]);
                }
                if (pattern == IN_ORDER) {
                    run_read((enum tsffn_format)format, pattern, 1.0, n_threads[k]);
                }
            }
            for (int o = 0; o < N_OPERATIONS; ++o) {
                if (!operations[o].exists((struct kernel){&tsffn_kernels_ref, (enum tsffn_format)format})) {
                    continue;
                }
                for (int k = 0; k < n_counts && (operations[o].patterns & IN(pattern)) != 0; ++k) {
                    run_tiers(&operations[o], (enum tsffn_format)format, pattern, n_threads[k]);
                }
            }
        }
    }
}

static void print_help(void) {
    printf("usage: bench_kernels [OPTION VALUE]...\n"
           "  --threads N[,N]...   numbers of threads                  [1 and all processors]\n"
           "  --isa NAME[,NAME]... only these tiers                    [all of this machine]\n"
           "  --type NAME[,NAME].. only these types                    [all: f32,f16,bf16,q8_0,q4_0,q3_nl]\n"
           "  --rows N             rows of a matrix                    [%d]\n"
           "  --cols N             weights of a row, a multiple of 32  [%d]\n"
           "  --mib N              all weights, MiB                    [4 times the last cache, at least 1024]\n"
           "  --ms N               time of one measurement             [%d]\n"
           "  --repeat N           measurements, of which the median   [%d]\n"
           "  --json               JSON instead of Markdown\n",
           (int)options.n_rows, (int)options.n_cols, options.milliseconds, options.repetitions);
}

// The whole number at *text, which moves behind it.
static int64_t number(const char * option, const char ** text, int64_t least, int64_t most) {
    char * end;
    errno = 0;
    const long long value = strtoll(*text, &end, 10);
    if (end == *text || errno != 0 || value < least || value > most || (*end != '\0' && *end != ',')) {
        fail(2, "%s: expected a whole number from %lld to %lld, found '%s'", option, (long long)least, (long long)most,
             *text);
    }
    *text = end;
    return value;
}

static int64_t one_number(const char * option, const char * text, int64_t least, int64_t most) {
    const char * end = text;
    const int64_t value = number(option, &end, least, most);
    if (*end != '\0') {
        fail(2, "%s: expected one number, found '%s'", option, text);
    }
    return value;
}

// Refuses names that the option does not know.
static const char * names(const char * option, const char * list, const char * known) {
    for (const char * p = list; *p != '\0'; p += strcspn(p, ","), p += *p == ',') {
        char name[32];
        snprintf(name, sizeof(name), "%.*s", (int)strcspn(p, ","), p);
        if (!is_listed(known, name)) {
            fail(2, "%s: expected some of %s, found '%s'", option, known, name);
        }
    }
    return list;
}

// The names of this machine's tiers.
static const char * isas_here(void) {
    static char list[256];
    size_t used = 0;
    for (int isa = 0; isa < TSFFN_ISA_COUNT; ++isa) {
        const struct tsffn_kernels * kernels = tsffn_kernels_for((enum tsffn_isa)isa);
        if (kernels != NULL) {
            used += (size_t)snprintf(list + used, sizeof(list) - used, "%s%s", used > 0 ? "," : "", kernels->name);
        }
    }
    return list;
}

static void parse(int argc, char ** argv) {
    for (int i = 1; i < argc; ++i) {
        const char * option = argv[i];
        if (strcmp(option, "--help") == 0) {
            print_help();
            exit(0);
        }
        if (strcmp(option, "--json") == 0) {
            options.json = true;
            continue;
        }
        static const char * const with_value[] = {"--threads", "--isa", "--type", "--rows",
                                                  "--cols",    "--mib", "--ms",   "--repeat"};
        bool is_known = false;
        for (size_t k = 0; k < sizeof(with_value) / sizeof(with_value[0]); ++k) {
            is_known = is_known || strcmp(option, with_value[k]) == 0;
        }
        if (!is_known) {
            fail(2, "unknown option '%s', see --help", option);
        }
        if (++i == argc) {
            fail(2, "%s: expected a value", option);
        }
        const char * value = argv[i];
        if (strcmp(option, "--threads") == 0) {
            const char * p = value;
            options.n_thread_counts = 0;
            do {
                if (options.n_thread_counts == MAX_RUNS) {
                    fail(2, "%s: expected at most %d numbers, found '%s'", option, MAX_RUNS, value);
                }
                options.n_threads[options.n_thread_counts++] = (int)number(option, &p, 1, MAX_THREADS);
            } while (*p++ == ',');
        } else if (strcmp(option, "--isa") == 0) {
            options.isas = names(option, value, isas_here());
        } else if (strcmp(option, "--type") == 0) {
            options.types = names(option, value, "f32,f16,bf16,q8_0,q4_0,q3_nl");
        } else if (strcmp(option, "--rows") == 0) {
            options.n_rows = one_number(option, value, 100, 1 << 24);
        } else if (strcmp(option, "--cols") == 0) {
            options.n_cols = one_number(option, value, TSFFN_BLOCK_SIZE, 1 << 20);
            if (options.n_cols % TSFFN_BLOCK_SIZE != 0) {
                fail(2, "%s: expected a multiple of %d, found '%s'", option, TSFFN_BLOCK_SIZE, value);
            }
        } else if (strcmp(option, "--mib") == 0) {
            options.bytes = (size_t)one_number(option, value, 1, 1 << 24) << 20;
        } else if (strcmp(option, "--ms") == 0) {
            options.milliseconds = (int)one_number(option, value, 1, 10000);
        } else {
            options.repetitions = (int)one_number(option, value, 1, MAX_RUNS);
        }
    }
}

// Values for the options that were not given, and checks of all of them together. Returns the most threads.
static int complete(void) {
    const long last_cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
    const size_t matrix_bytes = (size_t)options.n_rows * (size_t)options.n_cols * sizeof(float);
    if (options.bytes == 0) {
        options.bytes = last_cache > DEFAULT_BYTES / 4 ? 4 * (size_t)last_cache : DEFAULT_BYTES;
        options.bytes = options.bytes > matrix_bytes ? options.bytes : matrix_bytes;
    }
    if (options.bytes < matrix_bytes) {
        fail(2, "--mib: expected at least %zu, one f32 matrix of %d rows of %d weights, found '%zu'",
             (matrix_bytes + (1 << 20) - 1) >> 20, (int)options.n_rows, (int)options.n_cols, options.bytes >> 20);
    }
    const int at_most = (int)((double)options.n_rows * fractions[0]);
    if (options.n_thread_counts == 0) {
        const int all = omp_get_num_procs() < at_most ? omp_get_num_procs() : at_most;
        options.n_threads[0] = 1;
        options.n_threads[1] = all;
        options.n_thread_counts = all > 1 ? 2 : 1;
    }
    int most = 1;
    for (int k = 0; k < options.n_thread_counts; ++k) {
        most = options.n_threads[k] > most ? options.n_threads[k] : most;
    }
    if (most > at_most) {
        fail(2, "--threads: expected at most %d, a hundredth of the rows, found '%d'", at_most, most);
    }
    return most;
}

int main(int argc, char ** argv) {
    parse(argc, argv);
    const int most_threads = complete();
    make_memory();
    make_lists();
    make_workers(most_threads);
    report.n_rows = options.n_rows;
    report.n_cols = options.n_cols;
    report.bytes = options.bytes;
    run_all();
    if (options.json) {
        print_json(&report);
    } else {
        print_markdown(&report);
    }
    return 0;
}
