// Reads by io_uring (io_uring(7)), through its system calls: two rings in memory that is shared with the kernel, one of
// what is asked for and one of what has ended.
#define _DEFAULT_SOURCE // syscall
#include "reader.h"

#include <errno.h>
#include <linux/io_uring.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

// A ring's indices: whoever adds moves the tail, whoever takes moves the head.
struct ring {
    _Atomic(uint32_t) * head;
    _Atomic(uint32_t) * tail;
    uint32_t mask;
};

struct uring {
    struct tsffn_reader reader;
    int ring_fd, fd;
    bool fixed; // the memory is registered: the kernel need not look its pages up for each read
    void * rings;
    size_t rings_bytes;
    struct io_uring_sqe * entries; // of what is asked for
    size_t entries_bytes;
    struct ring asked, ended;
    struct io_uring_cqe * results;
};

static int setup(unsigned n, struct io_uring_params * params) {
    return (int)syscall(__NR_io_uring_setup, n, params);
}

static int enter(const struct uring * u, unsigned n_submit, unsigned n_wait) {
    const unsigned flags = n_wait > 0 ? IORING_ENTER_GETEVENTS : 0;
    return (int)syscall(__NR_io_uring_enter, u->ring_fd, n_submit, n_wait, flags, NULL, 0);
}

static void close_uring(struct tsffn_reader * reader) {
    struct uring * u = (struct uring *)reader;
    if (u->entries != NULL) {
        munmap(u->entries, u->entries_bytes);
    }
    if (u->rings != NULL) {
        munmap(u->rings, u->rings_bytes);
    }
    if (u->ring_fd >= 0) {
        close(u->ring_fd);
    }
    free(u);
}

static struct ring ring_at(char * rings, uint32_t head, uint32_t tail, uint32_t mask) {
    return (struct ring){
        .head = (_Atomic(uint32_t) *)(rings + head),
        .tail = (_Atomic(uint32_t) *)(rings + tail),
        .mask = *(const uint32_t *)(rings + mask),
    };
}

static void * map(const struct uring * u, size_t bytes, uint64_t what) {
    void * at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, u->ring_fd, (off_t)what);
    if (at == MAP_FAILED) {
        return NULL;
    }
    madvise(at, bytes, MADV_DONTFORK);
    return at;
}

static bool map_rings(struct uring * u, const struct io_uring_params * p) {
    const size_t asked = p->sq_off.array + p->sq_entries * sizeof(uint32_t);
    const size_t ended = p->cq_off.cqes + p->cq_entries * sizeof(struct io_uring_cqe);
    u->rings_bytes = asked > ended ? asked : ended;
    u->entries_bytes = p->sq_entries * sizeof(struct io_uring_sqe);
    u->rings = map(u, u->rings_bytes, IORING_OFF_SQ_RING);
    u->entries = map(u, u->entries_bytes, IORING_OFF_SQES);
    if (u->rings == NULL || u->entries == NULL) {
        return false;
    }
    char * rings = u->rings;
    u->asked = ring_at(rings, p->sq_off.head, p->sq_off.tail, p->sq_off.ring_mask);
    u->ended = ring_at(rings, p->cq_off.head, p->cq_off.tail, p->cq_off.ring_mask);
    u->results = (struct io_uring_cqe *)(rings + p->cq_off.cqes);
    uint32_t * order = (uint32_t *)(rings + p->sq_off.array);
    for (uint32_t i = 0; i < p->sq_entries; ++i) {
        order[i] = i;
    }
    return true;
}

static struct tsffn_reader * open_uring(int fd, int depth, void * memory, size_t bytes) {
    struct uring * u = calloc(1, sizeof(*u));
    if (u == NULL) {
        return NULL;
    }
    struct io_uring_params params = {0};
    u->reader.kind = &tsffn_uring;
    u->fd = fd;
    u->ring_fd = setup((unsigned)depth, &params);
    // Linux 5.4 and later have one mapping for both rings, 5.6 and later IORING_OP_READ.
    const unsigned needed = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_RW_CUR_POS;
    if (u->ring_fd < 0 || (params.features & needed) != needed || !map_rings(u, &params)) {
        const int reason = u->ring_fd < 0 ? errno : ENOSYS;
        close_uring(&u->reader);
        errno = reason;
        return NULL;
    }
    const struct iovec all = {.iov_base = memory, .iov_len = bytes};
    u->fixed = syscall(__NR_io_uring_register, u->ring_fd, IORING_REGISTER_BUFFERS, &all, 1) == 0; // RLIMIT_MEMLOCK
    return &u->reader;
}

// How many entries of the ring the kernel has not taken yet.
static uint32_t n_asked(const struct uring * u) {
    return atomic_load_explicit(u->asked.tail, memory_order_relaxed) -
           atomic_load_explicit(u->asked.head, memory_order_acquire);
}

static int start(struct tsffn_reader * reader, const struct tsffn_read * reads, int n) {
    struct uring * u = (struct uring *)reader;
    uint32_t tail = atomic_load_explicit(u->asked.tail, memory_order_relaxed);
    int added = 0;
    for (; added < n && n_asked(u) + (uint32_t)added <= u->asked.mask; ++added, ++tail) {
        u->entries[tail & u->asked.mask] = (struct io_uring_sqe){
            .opcode = u->fixed ? IORING_OP_READ_FIXED : IORING_OP_READ,
            .fd = u->fd,
            .off = reads[added].offset,
            .addr = (uint64_t)(uintptr_t)reads[added].to,
            .len = reads[added].bytes,
            .user_data = (uint32_t)reads[added].id,
        };
    }
    atomic_store_explicit(u->asked.tail, tail, memory_order_release);
    // What the kernel does not take now stays in the ring. EBUSY, EAGAIN: it takes it when some reads have ended.
    for (uint32_t left; (left = n_asked(u)) > 0;) {
        const int taken = enter(u, left, 0);
        if (taken < 0 && errno != EINTR) {
            break;
        }
    }
    return added;
}

static int finish(struct tsffn_reader * reader, struct tsffn_read_result * results, int n) {
    struct uring * u = (struct uring *)reader;
    if (n_asked(u) > 0) {
        enter(u, n_asked(u), 0);
    }
    uint32_t head = atomic_load_explicit(u->ended.head, memory_order_relaxed);
    const uint32_t tail = atomic_load_explicit(u->ended.tail, memory_order_acquire);
    int taken = 0;
    for (; head != tail && taken < n; ++head, ++taken) {
        const struct io_uring_cqe * result = &u->results[head & u->ended.mask];
        results[taken] = (struct tsffn_read_result){.id = (int)result->user_data, .n = result->res};
    }
    atomic_store_explicit(u->ended.head, head, memory_order_release);
    return taken;
}

static void wait_for_some(struct tsffn_reader * reader, int n) {
    const struct uring * u = (const struct uring *)reader;
    enter(u, n_asked(u), (unsigned)n); // EINTR: the caller looks and comes again
}

const struct tsffn_reader_kind tsffn_uring = {
    .name = "io_uring",
    .open = open_uring,
    .close = close_uring,
    .start = start,
    .finish = finish,
    .wait = wait_for_some,
};
