// Many reads of a file at once, past the page cache where its file system allows.
#ifndef TSFFN_READER_H
#define TSFFN_READER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// A file for reads past the page cache. Offsets and sizes are multiples of `alignment`, memory of MEMORY_ALIGNMENT.
struct tsffn_direct_file {
    int fd;
    bool direct;        // else reads go through the page cache
    uint32_t alignment; // a power of 2
};
enum { TSFFN_MEMORY_ALIGNMENT = 4096 };

// Opens the file behind a descriptor once more; it stays the same file when its name is given to another. Returns 0 or
// an errno.
int tsffn_open_direct(int fd, struct tsffn_direct_file * file);
void tsffn_close_direct(struct tsffn_direct_file * file);

struct tsffn_read {
    int id; // below the reader's depth, of no other read that is on its way
    uint64_t offset;
    uint32_t bytes;
    void * to;
};

struct tsffn_read_result {
    int id;
    int64_t n; // bytes that were read, fewer at the end of the file; or -errno
};

// One way of reading; the first field of what `open` returns is the reader.
struct tsffn_reader {
    const struct tsffn_reader_kind * kind;
};

// What the functions do of one reader may overlap only as said.
struct tsffn_reader_kind {
    const char * name;
    // At most `depth` reads are on their way at a time, all into `memory`. NULL with errno set.
    struct tsffn_reader * (*open)(int fd, int depth, void * memory, size_t bytes);
    // No read is on its way any more.
    void (*close)(struct tsffn_reader * reader);
    // Starts the first reads of a list, as many as the system takes, and returns how many.
    int (*start)(struct tsffn_reader * reader, const struct tsffn_read * reads, int n);
    // Results of reads that have ended, at most n; returns how many. Does not wait.
    int (*finish)(struct tsffn_reader * reader, struct tsffn_read_result * results, int n);
    // Returns when n reads have ended that `finish` has not told of yet, n at most those that are on their way; or
    // earlier. Meanwhile another thread may call `start`, but not `finish`.
    void (*wait)(struct tsffn_reader * reader, int n);
};

extern const struct tsffn_reader_kind tsffn_uring; // io_uring
extern const struct tsffn_reader_kind tsffn_pool;  // threads that read

// The best way that this system allows; TSFFN_READS=pool in the environment leaves io_uring out. NULL with errno set.
struct tsffn_reader * tsffn_reader_open(int fd, int depth, void * memory, size_t bytes);

#endif
