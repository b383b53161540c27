// Running a test on a thread with a small stack, as hosts other than glibc's main thread have: musl gives threads 128
// KB, OMP_STACKSIZE may give less. What overflows it ends the program.
#ifndef TSFFN_SMALL_STACK_H
#define TSFFN_SMALL_STACK_H

#include "check.h"

#include <pthread.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__) // which makes frames larger
enum { SMALL_STACK_BYTES = 1 << 20 };
#else
enum { SMALL_STACK_BYTES = 64 << 10 };
#endif

// Calls test(argument) on such a thread, and returns when it has.
static inline void on_small_stack(void * (*test)(void *), void * argument) {
    const long least = sysconf(_SC_THREAD_STACK_MIN);
    pthread_attr_t attributes;
    pthread_t thread;
    CHECK(pthread_attr_init(&attributes) == 0, "no attributes");
    CHECK(pthread_attr_setstacksize(&attributes, (size_t)(least > SMALL_STACK_BYTES ? least : SMALL_STACK_BYTES)) == 0,
          "no such stack");
    CHECK(pthread_create(&thread, &attributes, test, argument) == 0, "no thread");
    CHECK(pthread_join(thread, NULL) == 0, "the thread is lost");
    pthread_attr_destroy(&attributes);
}

#endif
