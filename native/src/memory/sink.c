#define _GNU_SOURCE // memfd_create
#include "sink.h"

#include <errno.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SHARED_BYTES = 16 << 20 };

int tsffn_sink_open(struct tsffn_sink * sink, size_t size) {
    *sink = (struct tsffn_sink){.size = size > 0 ? size : 1, .fd = memfd_create("tsffn", MFD_CLOEXEC)};
    if (sink->fd < 0 || ftruncate(sink->fd, SHARED_BYTES) != 0) {
        return errno;
    }
    const int how = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void * base = mmap(NULL, sink->size, PROT_READ | PROT_WRITE, how, -1, 0);
    if (base == MAP_FAILED) {
        return errno;
    }
    sink->base = base;
    return 0;
}

void tsffn_sink_close(struct tsffn_sink * sink) {
    if (sink->base != NULL) {
        munmap(sink->base, sink->size);
    }
    if (sink->fd >= 0) {
        close(sink->fd);
    }
}

// The whole pages of [at, at + size).
static uintptr_t whole_pages(const void * at, size_t size, uintptr_t * end) {
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    *end = ((uintptr_t)at + size) / page * page;
    return ((uintptr_t)at + page - 1) / page * page;
}

int tsffn_sink_share(const struct tsffn_sink * sink, void * at, size_t size) {
    uintptr_t end;
    for (uintptr_t piece = whole_pages(at, size, &end); piece < end; piece += SHARED_BYTES) {
        const size_t n = end - piece < SHARED_BYTES ? end - piece : SHARED_BYTES;
        // All of it is written to: many pages at once come cheaper than one by one.
        const int how = MAP_SHARED | MAP_FIXED | MAP_NORESERVE | MAP_POPULATE;
        if (mmap((void *)piece, n, PROT_READ | PROT_WRITE, how, sink->fd, 0) == MAP_FAILED) {
            return errno;
        }
    }
    return 0;
}

void tsffn_sink_end(void * at, size_t size) {
    uintptr_t end;
    const uintptr_t begin = whole_pages(at, size, &end);
    if (begin < end) {
        mmap((void *)begin, end - begin, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    }
}
