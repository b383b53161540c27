// Memory for what llama.cpp loads and nobody reads: the FFN weights of a model whose neurons come from its file.
#ifndef TSFFN_SINK_H
#define TSFFN_SINK_H

#include <stddef.h>

struct tsffn_sink {
    void * base;
    size_t size;
    int fd; // of the memory that is shared
};

// Address space of `size` bytes, without memory until it is written to. Returns 0 or an errno.
int tsffn_sink_open(struct tsffn_sink * sink, size_t size);
void tsffn_sink_close(struct tsffn_sink * sink);

// Whole pages of [at, at + size), a part of it, share a few megabytes of memory from now on: what is written there is
// lost, and costs no more. Returns 0 or an errno.
int tsffn_sink_share(const struct tsffn_sink * sink, void * at, size_t size);
// What was shared is no memory at all any more.
void tsffn_sink_end(void * at, size_t size);

#endif
