// The neuron cache against its file: whatever fits, whatever was there before, however reads come, every neuron that is
// awaited has the file's bytes; and what cannot be read ends in one line. The threads are plain ones, so that
// ThreadSanitizer sees all that they share.
#include "cache/look_ahead.h"
#include "cache/neuron_cache.h"
#include "cache/reader.h"
#include "check.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { N_LAYER = 3, N_FFNS = 2, N_FF = 701, HEADER = 352, N_THREADS = 3, MAX_FILE = 16 << 20 };
static const size_t ROW_BYTES[N_LAYER][TSFFN_N_PARTS] = {{288, 288, 288}, {544, 544, 544}, {288, 544, 416}};

// ---- a file

struct file {
    char path[64];
    int fd;
    bool bundled;
    struct tsffn_layer_source layers[N_LAYER];
    uint8_t * bytes;
    size_t size;
};

// Row of a part of a neuron, in the file.
static size_t row_at(const struct file * file, int64_t layer, int64_t neuron, int part) {
    const struct tsffn_layer_source * l = &file->layers[layer];
    const int64_t per_layer = (int64_t)N_FFNS * N_FF;
    if (!file->bundled) {
        return (size_t)(l->offset[part] + (uint64_t)neuron * l->row_bytes[part]);
    }
    const int64_t row = TSFFN_N_PARTS * neuron + part;
    return (size_t)(l->offset[row / per_layer] + (uint64_t)(row % per_layer) * l->row_bytes[part]);
}

static void write_file(struct file * file, bool bundled) {
    strcpy(file->path, "/tmp/tsffn-neuron-cache-XXXXXX");
    file->fd = mkstemp(file->path);
    CHECK(file->fd >= 0, "%s: %s", file->path, strerror(errno));
    file->bundled = bundled;
    file->size = HEADER;
    for (int layer = 0; layer < N_LAYER; ++layer) {
        for (int part = 0; part < TSFFN_N_PARTS; ++part) {
            const size_t row = ROW_BYTES[layer][bundled ? 0 : part];
            file->layers[layer].offset[part] = file->size;
            file->layers[layer].row_bytes[part] = row;
            file->size += row * N_FFNS * N_FF + (layer == 1 ? 32 : 0); // pieces that do not follow each other
        }
    }
    CHECK(file->size <= MAX_FILE, "%zu bytes", file->size);
    file->bytes = malloc(file->size);
    for (size_t i = 0; i < file->size; ++i) {
        file->bytes[i] = (uint8_t)random_bits();
    }
    CHECK(write(file->fd, file->bytes, file->size) == (ssize_t)file->size, "%s", strerror(errno));
}

static void remove_file(struct file * file) {
    close(file->fd);
    unlink(file->path);
    free(file->bytes);
}

static struct tsffn_neuron_cache * open_cache(const struct file * file, uint64_t bytes) {
    const struct tsffn_neuron_source source = {
        .path = file->path,
        .fd = file->fd,
        .n_layer = N_LAYER,
        .n_ffns = N_FFNS,
        .n_ff = N_FF,
        .bundled = file->bundled,
        .hot_first = bytes % 2 == 0,
        .layers = file->layers,
    };
    char error[256] = "";
    struct tsffn_neuron_cache * cache = tsffn_neuron_cache_new(&source, bytes, error, sizeof(error));
    CHECK(cache != NULL, "%s", error);
    return cache;
}

// ---- reads that do not go as they should

enum fault { NONE, INTERRUPTED, SHORT, FULL, LATE, FAILING, N_FAULTS };

struct faulty {
    struct tsffn_reader reader;
    struct tsffn_reader * inner;
    enum fault fault;
    unsigned n;
    bool waited;                // of LATE: nothing has come that nobody has waited for
    uint8_t n_interrupted[256]; // how often in a row the read of an id was
};
static enum fault fault_of_next;
static const char * kind_of_next;
static _Atomic(bool) fails_now;

static void close_faulty(struct tsffn_reader * reader) {
    struct faulty * f = (struct faulty *)reader;
    f->inner->kind->close(f->inner);
    free(f);
}

static int start_faulty(struct tsffn_reader * reader, const struct tsffn_read * reads, int n) {
    const struct faulty * f = (const struct faulty *)reader;
    return f->inner->kind->start(f->inner, reads, f->fault == FULL && n > 1 ? 1 : n);
}

static int finish_faulty(struct tsffn_reader * reader, struct tsffn_read_result * results, int n) {
    struct faulty * f = (struct faulty *)reader;
    if (f->fault == LATE && !f->waited) {
        return 0;
    }
    f->waited = false;
    const int found = f->inner->kind->finish(f->inner, results, f->fault == FULL ? 1 : n);
    for (int k = 0; k < found; ++k) {
        f->n += 1;
        uint8_t * n_interrupted = &f->n_interrupted[results[k].id];
        const bool interrupts = f->fault == INTERRUPTED && f->n % 3 == 0 && *n_interrupted < 4; // the cache tries more
        *n_interrupted = interrupts ? *n_interrupted + 1 : 0;
        if (interrupts) {
            results[k].n = f->n % 2 == 0 ? -EINTR : -EAGAIN;
        } else if (f->fault == SHORT && f->n % 5 == 0) {
            results[k].n /= 2;
        } else if (f->fault == FAILING && fails_now) {
            results[k].n = -EIO;
        }
    }
    return found;
}

static void wait_faulty(struct tsffn_reader * reader, int n) {
    struct faulty * f = (struct faulty *)reader;
    f->inner->kind->wait(f->inner, n);
    f->waited = true;
}

static const struct tsffn_reader_kind faulty_kind = {
    .name = "faulty",
    .close = close_faulty,
    .start = start_faulty,
    .finish = finish_faulty,
    .wait = wait_faulty,
};

// The linker calls this instead of tsffn_reader_open, and that by the name of __real_tsffn_reader_open.
struct tsffn_reader * __real_tsffn_reader_open(int fd, int depth, void * memory, size_t bytes);
struct tsffn_reader * __wrap_tsffn_reader_open(int fd, int depth, void * memory, size_t bytes);
struct tsffn_reader * __wrap_tsffn_reader_open(int fd, int depth, void * memory, size_t bytes) {
    struct faulty * f = calloc(1, sizeof(*f));
    const bool only_pool = strcmp(kind_of_next, "threads") == 0;
    f->reader.kind = &faulty_kind;
    f->fault = fault_of_next;
    f->inner =
        only_pool ? tsffn_pool.open(fd, depth, memory, bytes) : __real_tsffn_reader_open(fd, depth, memory, bytes);
    CHECK(f->inner != NULL, "%s", strerror(errno));
    return &f->reader;
}

// ---- calls

struct call {
    const struct file * file;
    struct tsffn_neuron_cache * cache;
    int64_t layer;
    uint64_t seed;
    unsigned share; // about one of so many neurons is needed
    bool may_fail;  // then neurons may be zeros
    bool alone;     // threads do not meet, and need neurons of their own
    bool expects;   // neurons of the next layer, some of which it needs
    pthread_barrier_t barrier;
};

struct thread {
    struct call * call;
    int ith;
    int64_t n; // announced
    int32_t list[N_FF];
    uint64_t rows[N_FF];
};
static struct thread threads[N_THREADS];

static void check_neuron(const struct call * call, const struct tsffn_neurons * neurons, int64_t ffn, int32_t i) {
    for (int part = 0; part < TSFFN_N_PARTS; ++part) {
        const uint8_t * found = tsffn_neuron_row(neurons, (enum tsffn_part)part, i);
        const uint8_t * expected = call->file->bytes + row_at(call->file, call->layer, ffn * N_FF + i, part);
        const size_t bytes = neurons->rows[part].row_bytes;
        bool zero = call->may_fail;
        for (size_t k = 0; zero && k < bytes; ++k) {
            zero = found[k] == 0;
        }
        CHECK(zero || memcmp(found, expected, bytes) == 0,
              "part %d of neuron %d of FFN %d of layer %d has other bytes than the file", part, i, (int)ffn,
              (int)call->layer);
    }
}

// Some of the neurons [begin, end): the thread's part of what the call needs.
static void list_some(struct thread * t, int64_t ffn, int64_t begin, int64_t end) {
    uint64_t bits = t->call->seed + (uint64_t)(ffn + 1) * 0x9e3779b97f4a7c15u;
    t->n = 0;
    for (int64_t i = 0; i < end; ++i) {
        bits = bits * 6364136223846793005u + 1442695040888963407u;
        if (i >= begin && (bits >> 33) % t->call->share == 0) {
            t->rows[t->n] = bits | 1;
            t->list[t->n++] = (int32_t)i;
        }
    }
}

static void look_at(const struct call * call, const struct tsffn_neurons * neurons, int64_t ffn, const int32_t * list,
                    int64_t n) {
    enum { AT_ONCE = 7 };
    for (int64_t k = 0; k < n; k += AT_ONCE) {
        const int64_t some = k + AT_ONCE < n ? AT_ONCE : n - k;
        tsffn_neurons_await(neurons, list + k, some);
        for (int64_t j = 0; j < some; ++j) {
            check_neuron(call, neurons, ffn, list[k + j]);
        }
    }
}

static void meet(struct call * call) {
    if (!call->alone) {
        pthread_barrier_wait(&call->barrier);
    }
}

static void expect_some(struct thread * t, int64_t ffn) {
    const struct call * call = t->call;
    const struct tsffn_neurons next = tsffn_neuron_cache_neurons(call->cache, (call->layer + 1) % N_LAYER, ffn);
    int32_t list[N_FF];
    int64_t n = 0;
    for (int32_t i = (int32_t)(call->seed % 5) + t->ith; i < N_FF; i += 4 * N_THREADS) {
        list[n++] = i;
    }
    tsffn_neurons_expect(&next, list, n);
}

// As many neurons at a time as there is room for: a thread announces its part, and looks at what all have announced.
static void * compute(void * argument) {
    struct thread * t = argument;
    struct call * call = t->call;
    for (int64_t ffn = 0; ffn < N_FFNS; ++ffn) {
        const struct tsffn_neurons neurons = tsffn_neuron_cache_neurons(call->cache, call->layer, ffn);
        const int64_t room = neurons.memory->room(&neurons), most = room < N_FF ? room : N_FF;
        CHECK(room >= TSFFN_MIN_ROOM, "room for %d neurons", (int)room);
        for (int64_t begin = 0; begin < N_FF; begin += most) {
            const int64_t size = begin + most < N_FF ? most : N_FF - begin;
            list_some(t, ffn, begin + size * t->ith / N_THREADS, begin + size * (t->ith + 1) / N_THREADS);
            tsffn_neurons_announce(&neurons, t->list, t->n % 2 == 0 ? t->rows : NULL, t->n);
            meet(call);
            for (int other = 0; other < (call->alone ? 1 : N_THREADS); ++other) {
                const struct thread * o = &threads[(t->ith + other) % N_THREADS];
                look_at(call, &neurons, ffn, o->list, o->n);
                if (call->expects && other == 0) {
                    expect_some(t, ffn);
                }
            }
            meet(call);
            tsffn_neurons_release(&neurons, t->list, t->n);
            meet(call);
        }
    }
    return NULL;
}

static bool run_call(struct call * call, int64_t layer, struct tsffn_cache_counts * counts, char * error,
                     size_t error_size) {
    pthread_t ids[N_THREADS];
    call->layer = layer;
    call->seed = random_bits();
    pthread_barrier_init(&call->barrier, NULL, N_THREADS);
    tsffn_neuron_cache_begin(call->cache, layer, (int64_t)(call->seed % 700));
    for (int ith = 0; ith < N_THREADS; ++ith) {
        threads[ith].call = call;
        threads[ith].ith = ith;
        CHECK(pthread_create(&ids[ith], NULL, compute, &threads[ith]) == 0, "no thread");
    }
    for (int ith = 0; ith < N_THREADS; ++ith) {
        pthread_join(ids[ith], NULL);
    }
    pthread_barrier_destroy(&call->barrier);
    return tsffn_neuron_cache_end(call->cache, counts, error, error_size);
}

// Calls through all layers; returns how many neurons were missing.
static uint64_t run_calls(struct call * call, int n) {
    uint64_t missing = 0;
    for (int k = 0; k < n; ++k) {
        struct tsffn_cache_counts counts;
        char error[256] = "";
        CHECK(run_call(call, k % N_LAYER, &counts, error, sizeof(error)), "%s", error);
        CHECK(counts.missing <= counts.needed && (call->expects || (counts.missing == 0) == (counts.reads == 0)),
              "%d of %d in %d reads", (int)counts.missing, (int)counts.needed, (int)counts.reads);
        CHECK(counts.ahead <= counts.missing && (call->expects || counts.ahead + counts.in_vain == 0),
              "%d of %d were read ahead, %d in vain", (int)counts.ahead, (int)counts.missing, (int)counts.in_vain);
        missing += counts.missing;
    }
    return missing;
}

// ---- tests

static uint64_t fewest_bytes(const struct file * file) {
    const struct tsffn_neuron_source source = {
        .path = file->path,
        .fd = file->fd,
        .n_layer = N_LAYER,
        .n_ffns = N_FFNS,
        .n_ff = N_FF,
        .bundled = file->bundled,
        .layers = file->layers,
    };
    char error[256] = "";
    CHECK(tsffn_neuron_cache_new(&source, 1000, error, sizeof(error)) == NULL, "a cache of 1000 bytes");
    unsigned long long fewest, found;
    const char * at = strstr(error, ": the memory");
    CHECK(at != NULL &&
              sscanf(at, ": the memory for neurons is too small: expected at least %llu bytes, found %llu", &fewest,
                     &found) == 2 &&
              found == 1000,
          "%s", error);
    return fewest;
}

static void test_bytes(const struct file * file, enum fault fault) {
    const uint64_t fewest = fewest_bytes(file);
    const uint64_t budgets[] = {fewest, fewest + 1500001, fewest + MAX_FILE};
    fault_of_next = fault;
    for (int k = 0; k < 3; ++k) {
        struct call call = {.file = file, .cache = open_cache(file, budgets[k])};
        uint64_t filled = 0;
        char error[256] = "";
        for (uint64_t before = 1; k > 0 && filled != before;) {
            before = filled;
            CHECK(tsffn_neuron_cache_fill(call.cache, 100000, &filled, error, sizeof(error)), "%s", error);
        }
        CHECK(filled <= tsffn_neuron_cache_room(call.cache), "filled beyond its room");
        call.share = 1;
        const uint64_t missing = run_calls(&call, N_LAYER);
        CHECK((missing == 0) == (k == 2), "%d neurons were missing", (int)missing);
        call.share = 9;
        run_calls(&call, 4 * N_LAYER);
        call.share = 2;
        call.alone = true;
        run_calls(&call, N_LAYER);
        call.alone = false;
        call.expects = true;
        run_calls(&call, 4 * N_LAYER);
        CHECK(tsffn_neuron_cache_fill(call.cache, 100000, &filled, error, sizeof(error)), "%s", error);
        run_calls(&call, N_LAYER + 1);
        tsffn_neuron_cache_free(call.cache); // reads are on their way
    }
}

// A call of one thread that needs some neurons of the first FFN of a layer and expects some of the next layer's.
static struct tsffn_cache_counts call_and_expect(struct tsffn_neuron_cache * cache, int64_t layer, const int32_t * list,
                                                 const int32_t * next, int64_t n) {
    const struct tsffn_neurons neurons = tsffn_neuron_cache_neurons(cache, layer, 0);
    const struct tsffn_neurons others = tsffn_neuron_cache_neurons(cache, (layer + 1) % N_LAYER, 0);
    struct tsffn_cache_counts counts;
    char error[256] = "";
    tsffn_neuron_cache_begin(cache, layer, 1);
    tsffn_neurons_announce(&neurons, list, NULL, n);
    tsffn_neurons_expect(&others, next, n);
    tsffn_neurons_await(&neurons, list, n);
    tsffn_neurons_release(&neurons, list, n);
    CHECK(tsffn_neuron_cache_end(cache, &counts, error, sizeof(error)), "%s", error);
    return counts;
}

// What was expected is there, or comes, when it is announced; the rest goes before others.
static void test_expected(const struct file * file) {
    enum { N = 24 };
    fault_of_next = NONE;
    struct tsffn_neuron_cache * cache = open_cache(file, fewest_bytes(file));
    int32_t first[N], second[N];
    for (int32_t k = 0; k < N; ++k) {
        first[k] = 2 * k;
        second[k] = 2 * k + 1;
    }
    struct tsffn_cache_counts counts = call_and_expect(cache, 0, first, first, N);
    CHECK(counts.missing == N && counts.ahead == 0 && counts.in_vain == 0, "%d missing, %d ahead, %d in vain",
          (int)counts.missing, (int)counts.ahead, (int)counts.in_vain);
    counts = call_and_expect(cache, 1, first, first, N);
    CHECK(counts.missing == N && counts.ahead == N && counts.in_vain == 0, "%d missing, %d ahead, %d in vain",
          (int)counts.missing, (int)counts.ahead, (int)counts.in_vain);
    counts = call_and_expect(cache, 2, second, first, N);
    CHECK(counts.missing == N && counts.ahead == 0 && counts.in_vain == N, "%d missing, %d ahead, %d in vain",
          (int)counts.missing, (int)counts.ahead, (int)counts.in_vain);
    counts = call_and_expect(cache, 0, first, second, N);
    CHECK(counts.missing == 0 && counts.ahead == 0 && counts.in_vain == 0, "%d missing, %d ahead, %d in vain",
          (int)counts.missing, (int)counts.ahead, (int)counts.in_vain);
    tsffn_neuron_cache_free(cache);
}

// A disk so slow that what was read ahead still comes when nobody expects it any more: a call that needs those slots
// waits for them.
static void test_late(const struct file * file) {
    fault_of_next = LATE;
    struct call call = {.file = file, .cache = open_cache(file, fewest_bytes(file))};
    int32_t list[N_FF];
    for (int32_t i = 0; i < N_FF; ++i) {
        list[i] = i;
    }
    struct tsffn_cache_counts counts;
    char error[256] = "";
    for (int k = 0; k < 4; ++k) {
        const struct tsffn_neurons others = tsffn_neuron_cache_neurons(call.cache, 1 + k / 2, k % 2);
        tsffn_neuron_cache_begin(call.cache, k / 2, 1);
        tsffn_neurons_expect(&others, list, N_FF);
        CHECK(tsffn_neuron_cache_end(call.cache, &counts, error, sizeof(error)), "%s", error);
    }
    alarm(60); // what waits for ever ends
    tsffn_neuron_cache_begin(call.cache, 0, 1);
    struct tsffn_neurons needed[N_FFNS];
    for (int ffn = 0; ffn < N_FFNS; ++ffn) {
        needed[ffn] = tsffn_neuron_cache_neurons(call.cache, 0, ffn);
    }
    int64_t n[N_FFNS], room = needed[0].memory->room(&needed[0]);
    for (int ffn = 0; ffn < N_FFNS; ++ffn) {
        n[ffn] = room < N_FF ? room : N_FF;
        room -= n[ffn];
        tsffn_neurons_announce(&needed[ffn], list, NULL, n[ffn]);
    }
    for (int ffn = 0; ffn < N_FFNS; ++ffn) {
        look_at(&call, &needed[ffn], ffn, list, n[ffn]);
        tsffn_neurons_release(&needed[ffn], list, n[ffn]);
    }
    CHECK(tsffn_neuron_cache_end(call.cache, &counts, error, sizeof(error)), "%s", error);
    alarm(0);
    tsffn_neuron_cache_free(call.cache);
}

// What something else computes makes room for the neurons behind it.
static void test_left_out(const struct file * file) {
    enum { LEFT_OUT = N_FF / 2 };
    const uint64_t fewest = fewest_bytes(file);
    struct tsffn_neuron_cache * cache = open_cache(file, fewest + file->size * 6 / 10);
    uint64_t filled = 0;
    char error[256] = "";
    for (int pass = 0; pass < 2; ++pass) {
        for (uint64_t before = filled + 1; filled != before;) {
            before = filled;
            CHECK(tsffn_neuron_cache_fill(cache, UINT64_MAX, &filled, error, sizeof(error)), "%s", error);
        }
        for (int64_t layer = 0; layer < N_LAYER; ++layer) {
            struct tsffn_cache_counts counts;
            int32_t list[N_FF - LEFT_OUT];
            tsffn_neuron_cache_begin(cache, layer, 0);
            for (int64_t e = 0; e < N_FFNS; ++e) {
                const struct tsffn_neurons neurons = tsffn_neuron_cache_neurons(cache, layer, e);
                for (int32_t i = LEFT_OUT; i < N_FF; ++i) {
                    list[i - LEFT_OUT] = i;
                }
                tsffn_neurons_announce(&neurons, list, NULL, N_FF - LEFT_OUT);
                tsffn_neurons_await(&neurons, list, N_FF - LEFT_OUT);
                tsffn_neurons_release(&neurons, list, N_FF - LEFT_OUT);
            }
            CHECK(tsffn_neuron_cache_end(cache, &counts, error, sizeof(error)), "%s", error);
            CHECK((counts.missing == 0) == (pass == 1), "pass %d: %d neurons were missing", pass, (int)counts.missing);
        }
        for (int64_t layer = 0; pass == 0 && layer < N_LAYER; ++layer) {
            for (int64_t e = 0; e < N_FFNS; ++e) {
                tsffn_neuron_cache_leave_out(cache, layer, e, LEFT_OUT);
            }
        }
    }
    tsffn_neuron_cache_free(cache);
}

// A failed call has a line, and the next one begins anew.
static void test_failing(const struct file * file) {
    fault_of_next = FAILING;
    struct call call = {.file = file, .cache = open_cache(file, fewest_bytes(file)), .share = 3};
    for (int k = 0; k < 8 * N_LAYER; ++k) {
        struct tsffn_cache_counts counts;
        char error[256] = "", expected[128];
        call.expects = k >= 4 * N_LAYER;
        fails_now = call.may_fail = k % 2 == 0;
        const bool ok = run_call(&call, k % N_LAYER, &counts, error, sizeof(error));
        snprintf(expected, sizeof(expected), "cannot be read: %s", strerror(EIO));
        CHECK(ok == !fails_now || counts.missing == 0 || call.expects, "%s", error);
        CHECK(ok || (strstr(error, file->path) == error && strstr(error, expected) != NULL), "%s", error);
    }
    fails_now = false;
    tsffn_neuron_cache_free(call.cache);
}

// Frequent neurons stay: of a tenth that every call needs, beside others that come and go, few are read again.
static void test_what_stays(const struct file * file) {
    fault_of_next = NONE;
    struct tsffn_neuron_cache * cache = open_cache(file, fewest_bytes(file) | 1);
    int32_t often[N_FF / 10], once[N_FF / 10];
    struct tsffn_cache_counts counts = {0};
    for (int token = 0; token < 60; ++token) {
        for (int64_t layer = 0; layer < N_LAYER; ++layer) {
            const struct tsffn_neurons neurons = tsffn_neuron_cache_neurons(cache, layer, 0);
            int n = 0;
            for (int i = 0; i < N_FF / 10; ++i) {
                often[i] = 10 * i;
                once[n] = 10 * i + 1 + (int)(random_bits() % 9);
                ++n;
            }
            tsffn_neuron_cache_begin(cache, layer, 1);
            tsffn_neurons_announce(&neurons, often, NULL, N_FF / 10);
            tsffn_neurons_announce(&neurons, once, NULL, n);
            tsffn_neurons_await(&neurons, often, N_FF / 10);
            tsffn_neurons_await(&neurons, once, n);
            tsffn_neurons_release(&neurons, often, N_FF / 10);
            tsffn_neurons_release(&neurons, once, n);
            char error[256] = "";
            CHECK(tsffn_neuron_cache_end(cache, &counts, error, sizeof(error)), "%s", error);
        }
    }
    CHECK(counts.missing <= N_FF / 10, "%d of %d that are used often and as many others were missing",
          (int)counts.missing, N_FF / 10);
    tsffn_neuron_cache_free(cache);
}

// Tokens of two layers that take `with` or `without` ns, as they look ahead or not; returns how many did.
static int decode_for(struct tsffn_look_ahead * l, int n_tokens, uint64_t with, uint64_t without, uint64_t * now) {
    int n = 0;
    for (int token = 0; token < n_tokens; ++token) {
        const bool on = tsffn_look_ahead_begin(l, 0, 1, *now);
        tsffn_look_ahead_end(l, 0, *now);
        *now += on ? with : without;
        CHECK(!tsffn_look_ahead_begin(l, 1, 1, *now), "there is nothing behind the last layer");
        tsffn_look_ahead_end(l, 1, *now);
        *now += 12345678; // what happens between tokens is nobody's fault
        n += on;
    }
    return n;
}

// The faster way is kept, until it is not the faster one any more.
static void test_what_is_faster(void) {
    enum { TRIAL = 2 * TSFFN_AHEAD_TRIALS, MANY = 1000 };
    struct tsffn_look_ahead l;
    uint64_t now = 1;
    unsetenv("TSFFN_LOOK_AHEAD");
    tsffn_look_ahead_init(&l, 2);
    CHECK(!tsffn_look_ahead_begin(&l, 0, 0, now) && !tsffn_look_ahead_begin(&l, 0, 64, now), "of one token only");
    CHECK(decode_for(&l, TRIAL, 100, 200, &now) == TSFFN_AHEAD_TRIALS, "each way is tried as often");
    CHECK(decode_for(&l, TRIAL, 100, 200, &now) == TRIAL, "it was faster");
    CHECK(decode_for(&l, MANY, 200, 100, &now) < MANY / 2, "it is not any more");
    CHECK(decode_for(&l, MANY, 200, 100, &now) < MANY / 10, "nor does it become so");
    CHECK(decode_for(&l, MANY, 100, 200, &now) > MANY / 2, "now it is");
    setenv("TSFFN_LOOK_AHEAD", "on", 1);
    tsffn_look_ahead_init(&l, 2);
    CHECK(decode_for(&l, MANY, 200, 100, &now) == MANY, "on");
    setenv("TSFFN_LOOK_AHEAD", "off", 1);
    tsffn_look_ahead_init(&l, 2);
    CHECK(decode_for(&l, MANY, 100, 200, &now) == 0, "off");
    unsetenv("TSFFN_LOOK_AHEAD");
}

static void expect_failure(struct call * call, const char * text) {
    struct tsffn_cache_counts counts;
    char error[256] = "";
    CHECK(!run_call(call, 0, &counts, error, sizeof(error)), "the file is another one, and nobody noticed");
    CHECK(strstr(error, text) != NULL, "expected '%s', found '%s'", text, error);
}

static void test_files_that_change(bool bundled) {
    fault_of_next = NONE;
    struct file file, other;
    write_file(&file, bundled);
    write_file(&other, bundled);
    struct call call = {.file = &file, .cache = open_cache(&file, fewest_bytes(&file)), .share = 1};
    run_calls(&call, 1);
    CHECK(rename(other.path, file.path) == 0, "%s", strerror(errno)); // the cache goes on with its own
    run_calls(&call, N_LAYER);
    const uint8_t byte = (uint8_t)~file.bytes[file.size - 1];
    CHECK(pwrite(file.fd, &byte, 1, (off_t)file.size - 1) == 1, "%s", strerror(errno));
    struct timespec times[2] = {{.tv_sec = 1}, {.tv_sec = 1}};
    CHECK(futimens(file.fd, times) == 0, "%s", strerror(errno));
    expect_failure(&call, "the file was changed while the model is in use");
    CHECK(ftruncate(file.fd, HEADER) == 0, "%s", strerror(errno));
    call.may_fail = true;
    expect_failure(&call, "the file is truncated");
    tsffn_neuron_cache_free(call.cache);
    strcpy(other.path, file.path);
    remove_file(&file);
    remove_file(&other);
}

int main(void) {
    static const char * const kinds[] = {"io_uring", "threads"};
    test_what_is_faster();
    for (int k = 0; k < 2; ++k) {
        kind_of_next = kinds[k];
        for (int bundled = 0; bundled < 2; ++bundled) {
            struct file file;
            write_file(&file, bundled == 1);
            for (int fault = NONE; fault < FAILING; ++fault) {
                test_bytes(&file, (enum fault)fault);
            }
            test_left_out(&file);
            test_expected(&file);
            test_late(&file);
            test_failing(&file);
            test_what_stays(&file);
            remove_file(&file);
            test_files_that_change(bundled == 1);
        }
        printf("%s: ok\n", kinds[k]);
    }
    return 0;
}
