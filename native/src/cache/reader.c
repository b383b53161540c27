#define _GNU_SOURCE // O_DIRECT, statx
#include "reader.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

// What a file wants of direct reads, where the kernel tells (Linux 6.1); else what every file system is content with.
static uint32_t alignment_of(int fd) {
#ifdef STATX_DIOALIGN
    struct statx info;
    if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &info) == 0 && (info.stx_mask & STATX_DIOALIGN) != 0 &&
        info.stx_dio_offset_align > 0 && info.stx_dio_offset_align <= TSFFN_MEMORY_ALIGNMENT &&
        info.stx_dio_mem_align <= TSFFN_MEMORY_ALIGNMENT) {
        return info.stx_dio_offset_align;
    }
#else
    (void)fd;
#endif
    return TSFFN_MEMORY_ALIGNMENT;
}

// Whether one direct read works: some file systems open files so and then refuse to read.
static bool can_read(int fd) {
    void * page;
    if (posix_memalign(&page, TSFFN_MEMORY_ALIGNMENT, TSFFN_MEMORY_ALIGNMENT) != 0) {
        return false;
    }
    const ssize_t n = pread(fd, page, TSFFN_MEMORY_ALIGNMENT, 0);
    free(page);
    return n >= 0 || errno == EIO; // a disk that fails does so with or without the page cache
}

int tsffn_open_direct(int fd, struct tsffn_direct_file * file) {
    char link[64];
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    *file = (struct tsffn_direct_file){.fd = open(link, O_RDONLY | O_DIRECT | O_CLOEXEC), .direct = true};
    if (file->fd >= 0 && can_read(file->fd)) {
        file->alignment = alignment_of(file->fd);
        return 0;
    }
    tsffn_close_direct(file);
    *file = (struct tsffn_direct_file){.fd = open(link, O_RDONLY | O_CLOEXEC), .alignment = 1};
    if (file->fd < 0) {
        file->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    }
    if (file->fd < 0) {
        return errno;
    }
    posix_fadvise(file->fd, 0, 0, POSIX_FADV_RANDOM); // no read-ahead
    return 0;
}

void tsffn_close_direct(struct tsffn_direct_file * file) {
    if (file->fd >= 0) {
        close(file->fd);
        file->fd = -1;
    }
}

struct tsffn_reader * tsffn_reader_open(int fd, int depth, void * memory, size_t bytes) {
    const char * wanted = getenv("TSFFN_READS");
    const bool only_pool = wanted != NULL && strcmp(wanted, "pool") == 0;
    struct tsffn_reader * reader = only_pool ? NULL : tsffn_uring.open(fd, depth, memory, bytes);
    return reader != NULL ? reader : tsffn_pool.open(fd, depth, memory, bytes);
}
