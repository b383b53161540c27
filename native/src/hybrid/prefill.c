// Calls of many rows: how large they are on the GPU, which of them stream, and how long ones are cut.
#include "state.h"

#include "../error.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum {
    MOST_TOKENS = 512, // of a call on the GPU: what llama.cpp computes at a time, unless it is told otherwise
    LEAST_TOKENS = 32, // for which the memory is worth it
    ROWS_OF_TOKEN = 2, // of a token in a layer of experts, for which there is memory; with more a call has fewer tokens
    PART_OF_MEMORY = 8, // what such a call takes is at most this part of the GPU's share
};

// When neurons that the GPU lacks are copied there instead of being computed by the CPU: when the CPU would need more
// than STREAM_MARGIN times as long as the copy. What both can do is declared, not measured, so that the same call
// gives the same bits: PCI Express 3.0 x16, and a thread of a processor with AVX-512 or AVX2 that computes a prompt
// (docs/measurements.md), in operations of all neurons.
#define COPY_BYTES_PER_S 12e9
#define CPU_FLOPS_OF_THREAD 400e9
#define STREAM_MARGIN 2.0

// ---- sizes

// A whole number from 0 on; *value stays where the variable is not set.
static bool read_number(const char * name, const char * what, int64_t most, int64_t * value, char * error,
                        size_t error_size) {
    const char * text = getenv(name);
    if (text == NULL || text[0] == '\0') {
        return true;
    }
    char * end;
    errno = 0;
    const long long number = strtoll(text, &end, 10);
    if (errno != 0 || *end != '\0' || number < 0 || number > most) {
        return tsffn_fail(error, error_size, "%s: expected a number of %s from 0 to %lld, found '%s'", name, what,
                          (long long)most, text);
    }
    *value = number;
    return true;
}

bool tsffn_prefill_read(struct tsffn_hybrid_prefill * prefill, char * error, size_t error_size) {
    prefill->n_asked = prefill->n_streamed = -1;
    return read_number("TSFFN_CUDA_PREFILL", "tokens", 1 << 16, &prefill->n_asked, error, error_size) &&
           read_number("TSFFN_CUDA_STREAM", "rows", INT32_MAX, &prefill->n_streamed, error, error_size);
}

size_t tsffn_prefill_choose(struct tsffn_hybrid * h, const struct tsffn_cuda_sizes * sizes, size_t bytes) {
    struct tsffn_cuda_sizes * chosen = &h->prefill.sizes;
    *chosen = *sizes;
    chosen->prefill = true;
    const int64_t rows_of_token = chosen->n_ffns > 1 ? ROWS_OF_TOKEN : 1, asked = h->prefill.n_asked;
    for (int64_t n = asked >= 0 ? asked : MOST_TOKENS; n > 0; n = asked < 0 && n > LEAST_TOKENS ? n / 2 : 0) {
        chosen->n_tokens = n;
        chosen->n_rows = n * rows_of_token;
        const size_t needed = h->module->queue_bytes(chosen);
        if (needed <= (asked >= 0 ? bytes - h->module->queue_bytes(sizes) : bytes / PART_OF_MEMORY)) {
            return needed;
        }
    }
    *chosen = (struct tsffn_cuda_sizes){0};
    return 0;
}

// ---- calls

// Tokens of a call that the GPU computes at a time, so that all these calls are about as large.
static int64_t tokens_at_once(const struct tsffn_hybrid * h, const struct tsffn_call * call) {
    const int64_t of_token = (call->n_rows + call->n_tokens - 1) / call->n_tokens;
    const int64_t by_rows = h->prefill.sizes.n_rows / of_token;
    const int64_t most = by_rows < h->prefill.sizes.n_tokens ? by_rows : h->prefill.sizes.n_tokens;
    if (most == 0) {
        return 0;
    }
    const int64_t n_calls = (call->n_tokens + most - 1) / most;
    return (call->n_tokens + n_calls - 1) / n_calls;
}

bool tsffn_prefill_takes(const struct tsffn_hybrid * h, const struct tsffn_call * call) {
    return h->prefill.queue != NULL && tokens_at_once(h, call) > 0;
}

// Whether the neurons that the GPU lacks are copied there for this call.
static bool streams(const struct sharing * s) {
    const int64_t asked = s->h->prefill.n_streamed;
    int64_t n_ffns = 0;
    for (int64_t r = 0; r < s->call->n_rows; ++r) {
        const int32_t ffn = s->call->rows[r].ffn;
        n_ffns += r == 0 || ffn != s->call->rows[r - 1].ffn;
        if (s->layer->ffns[ffn].neurons.memory != NULL) {
            return false; // they may not all be there at once
        }
    }
    const double rows = (double)s->call->n_rows / (double)n_ffns; // that share an FFN
    const double to_copy = (double)s->h->module->neuron_bytes(s->layer) / COPY_BYTES_PER_S;
    const double to_compute = 6.0 * (double)s->layer->n_embd / (CPU_FLOPS_OF_THREAD * s->call->n_threads); // for a row
    return asked >= 0 ? asked > 0 && rows >= (double)asked : rows * to_compute > STREAM_MARGIN * to_copy;
}

// The rows of tokens [first, end) of a call, sorted as they are, numbered from `first` on. Returns how many.
static int64_t rows_of_tokens(const struct tsffn_call * call, int64_t first, int64_t end, struct tsffn_row * rows) {
    int64_t n = 0;
    for (int64_t r = 0; r < call->n_rows; ++r) {
        const struct tsffn_row * row = &call->rows[r];
        if (row->token >= first && row->token < end) {
            rows[n] = *row;
            rows[n++].token = (int32_t)(row->token - first);
        }
    }
    return n;
}

// Copies x to memory that no y overlaps; false without memory.
static bool keep_x(struct sharing * s, struct tsffn_call * call) {
    struct tsffn_hybrid_prefill * prefill = &s->h->prefill;
    const int64_t n = s->layer->n_embd;
    if (call->n_tokens * n > prefill->n_x) {
        free(prefill->x);
        prefill->x = malloc((size_t)(call->n_tokens * n) * sizeof(float));
        prefill->n_x = prefill->x != NULL ? call->n_tokens * n : 0;
    }
    if (prefill->x == NULL) {
        return false;
    }
    for (int64_t t = 0; t < call->n_tokens; ++t) {
        memcpy(prefill->x + t * n, call->x + (size_t)t * call->x_stride, (size_t)n * sizeof(float));
    }
    call->x = (const char *)prefill->x;
    call->x_stride = (size_t)n * sizeof(float);
    return true;
}

// Some rows of the call, from the first to the last. Returns how many.
static int64_t choose_compared(const struct tsffn_call * call, struct tsffn_row chosen[MAX_ROWS]) {
    const int64_t n = call->n_rows < MAX_ROWS ? call->n_rows : MAX_ROWS;
    for (int64_t i = 0; i < n; ++i) {
        chosen[i] = call->rows[i * (call->n_rows - 1) / (n > 1 ? n - 1 : 1)];
    }
    return n;
}

// All tokens, as many at a time as there is memory for. rows [n_rows] is used.
static enum outcome compute_in_turn(struct sharing * s, struct tsffn_row * rows, struct tsffn_counts * of_gpu,
                                    uint64_t * ns_waiting) {
    const struct tsffn_call * whole = s->call;
    const int64_t n = tokens_at_once(s->h, whole);
    enum outcome outcome = DONE;
    for (int64_t first = 0; outcome == DONE && first < whole->n_tokens; first += n) {
        struct tsffn_call call = *whole;
        const int64_t end = first + n < whole->n_tokens ? first + n : whole->n_tokens;
        call.n_rows = rows_of_tokens(whole, first, end, rows);
        call.rows = rows;
        call.x = whole->x + (size_t)first * whole->x_stride;
        call.n_tokens = end - first;
        s->call = &call;
        s->streams = streams(s);
        outcome = tsffn_share_call(s, of_gpu, ns_waiting);
        s->call = whole;
    }
    return outcome;
}

enum outcome tsffn_prefill_compute(struct sharing * s, struct tsffn_counts * of_gpu, uint64_t * ns_waiting) {
    struct tsffn_hybrid * h = s->h;
    const struct tsffn_call * asked = s->call;
    bool * compared = &h->prefill_compared[s->layer - h->layers];
    struct tsffn_call call = *asked;
    struct tsffn_row some[MAX_ROWS];
    struct tsffn_row * rows = malloc((size_t)call.n_rows * sizeof(*rows));
    // y may overlap x, of which it is written before all is known to be right.
    if (rows == NULL || !keep_x(s, &call)) {
        free(rows);
        return NO_MEMORY;
    }
    s->call = &call;
    const int64_t n_some = choose_compared(&call, some);
    enum outcome outcome = *compared || tsffn_compute_expected(s, some, n_some) ? DONE : NO_MEMORY;
    if (outcome == DONE) {
        outcome = compute_in_turn(s, rows, of_gpu, ns_waiting);
    }
    if (outcome == DONE && !*compared && !tsffn_is_as_expected(s, some, n_some)) {
        outcome = tsffn_complain_of_results(s);
    }
    *compared = *compared || outcome == DONE;
    if (outcome == GPU_FAILED || outcome == WRONG) {
        struct tsffn_counts * counts = s->counts;
        *counts = (struct tsffn_counts){0};
        *of_gpu = (struct tsffn_counts){0};
        const bool computed = s->host->device->compute(s->host->scratch, s->host->prepared, &call, counts);
        outcome = computed ? WRONG : NO_MEMORY;
    }
    s->call = asked;
    free(rows);
    return outcome;
}
