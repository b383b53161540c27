// Reads by threads, each of which waits for one read at a time: where io_uring is not allowed.
#define _DEFAULT_SOURCE // pthread attributes
#include "reader.h"

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

enum { MAX_THREADS = 32, STACK_BYTES = 64 << 10 };

// A queue of at most `depth`; `first` and `n` count modulo that.
struct queue {
    int first, n;
};

struct pool {
    struct tsffn_reader reader;
    int fd, depth, n_threads;
    pthread_t threads[MAX_THREADS];
    pthread_mutex_t mutex; // all below
    pthread_cond_t asked, ended;
    bool ending;
    struct tsffn_read * reads; // [depth]
    struct queue waiting;
    struct tsffn_read_result * results; // [depth]
    struct queue done;
};

static int place(const struct pool * p, const struct queue * queue, int k) {
    return (queue->first + k) % p->depth;
}

// All of it, but at the end of the file.
static int64_t read_all(int fd, const struct tsffn_read * read) {
    uint32_t done = 0;
    while (done < read->bytes) {
        const ssize_t n = pread(fd, (char *)read->to + done, read->bytes - done, (off_t)(read->offset + done));
        if (n < 0 && errno != EINTR) {
            return -errno;
        }
        if (n == 0) {
            break;
        }
        done += n > 0 ? (uint32_t)n : 0;
    }
    return done;
}

static void * work(void * pool) {
    struct pool * p = pool;
    pthread_mutex_lock(&p->mutex);
    for (;;) {
        while (p->waiting.n == 0 && !p->ending) {
            pthread_cond_wait(&p->asked, &p->mutex);
        }
        if (p->ending) {
            break;
        }
        const struct tsffn_read read = p->reads[p->waiting.first];
        p->waiting.first = place(p, &p->waiting, 1);
        p->waiting.n -= 1;
        pthread_mutex_unlock(&p->mutex);
        const int64_t n = read_all(p->fd, &read);
        pthread_mutex_lock(&p->mutex);
        p->results[place(p, &p->done, p->done.n)] = (struct tsffn_read_result){.id = read.id, .n = n};
        p->done.n += 1;
        pthread_cond_signal(&p->ended);
    }
    pthread_mutex_unlock(&p->mutex);
    return NULL;
}

static void close_pool(struct tsffn_reader * reader) {
    struct pool * p = (struct pool *)reader;
    pthread_mutex_lock(&p->mutex);
    p->ending = true;
    pthread_cond_broadcast(&p->asked);
    pthread_mutex_unlock(&p->mutex);
    for (int k = 0; k < p->n_threads; ++k) {
        pthread_join(p->threads[k], NULL);
    }
    pthread_mutex_destroy(&p->mutex);
    pthread_cond_destroy(&p->asked);
    pthread_cond_destroy(&p->ended);
    free(p->reads);
    free(p->results);
    free(p);
}

// Signals are the host's: none of these threads takes one.
static int start_threads(struct pool * p) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES > PTHREAD_STACK_MIN ? STACK_BYTES : PTHREAD_STACK_MIN);
    int failure = 0;
    while (failure == 0 && p->n_threads < p->depth && p->n_threads < MAX_THREADS) {
        failure = pthread_create(&p->threads[p->n_threads], &attributes, work, p);
        p->n_threads += failure == 0;
    }
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return p->n_threads > 0 ? 0 : failure;
}

static struct tsffn_reader * open_pool(int fd, int depth, void * memory, size_t bytes) {
    (void)memory;
    (void)bytes;
    struct pool * p = calloc(1, sizeof(*p));
    if (p == NULL) {
        return NULL;
    }
    p->reader.kind = &tsffn_pool;
    p->fd = fd;
    p->depth = depth;
    p->reads = malloc((size_t)depth * sizeof(*p->reads));
    p->results = malloc((size_t)depth * sizeof(*p->results));
    pthread_mutex_init(&p->mutex, NULL);
    pthread_cond_init(&p->asked, NULL);
    pthread_cond_init(&p->ended, NULL);
    const int failure = p->reads != NULL && p->results != NULL ? start_threads(p) : ENOMEM;
    if (failure != 0) {
        close_pool(&p->reader);
        errno = failure;
        return NULL;
    }
    return &p->reader;
}

static int start(struct tsffn_reader * reader, const struct tsffn_read * reads, int n) {
    struct pool * p = (struct pool *)reader;
    pthread_mutex_lock(&p->mutex);
    for (int k = 0; k < n; ++k) { // at most `depth` are on their way
        p->reads[place(p, &p->waiting, p->waiting.n)] = reads[k];
        p->waiting.n += 1;
        pthread_cond_signal(&p->asked);
    }
    pthread_mutex_unlock(&p->mutex);
    return n;
}

static int finish(struct tsffn_reader * reader, struct tsffn_read_result * results, int n) {
    struct pool * p = (struct pool *)reader;
    pthread_mutex_lock(&p->mutex);
    int taken = 0;
    for (; p->done.n > 0 && taken < n; ++taken) {
        results[taken] = p->results[p->done.first];
        p->done.first = place(p, &p->done, 1);
        p->done.n -= 1;
    }
    pthread_mutex_unlock(&p->mutex);
    return taken;
}

static void wait_for_some(struct tsffn_reader * reader, int n) {
    struct pool * p = (struct pool *)reader;
    pthread_mutex_lock(&p->mutex);
    while (p->done.n < n) {
        pthread_cond_wait(&p->ended, &p->mutex);
    }
    pthread_mutex_unlock(&p->mutex);
}

const struct tsffn_reader_kind tsffn_pool = {
    .name = "threads",
    .open = open_pool,
    .close = close_pool,
    .start = start,
    .finish = finish,
    .wait = wait_for_some,
};
