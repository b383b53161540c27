// A place where the threads of a call meet.
//
// libgomp's own makes a system call each time, to wake threads that may have gone to sleep. The threads of a layer wait
// for microseconds only, and spin (docs/notes/2026-11-28-threads.md). Who waits longer lets others have the processor.
#ifndef TSFFN_BARRIER_H
#define TSFFN_BARRIER_H

#include <sched.h>
#include <stdatomic.h>

struct tsffn_barrier {
    _Alignas(64) atomic_int n_waiting;
    _Alignas(64) atomic_uint generation; // how often all have met
};

static inline void tsffn_barrier_init(struct tsffn_barrier * barrier) {
    atomic_init(&barrier->n_waiting, 0);
    atomic_init(&barrier->generation, 0);
}

// Tells the processor that a loop waits.
static inline void tsffn_relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Returns when n_threads threads have called it.
static inline void tsffn_barrier_wait(struct tsffn_barrier * barrier, int n_threads) {
    enum { SPINS = 1000 };
    const unsigned generation = atomic_load_explicit(&barrier->generation, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&barrier->n_waiting, 1, memory_order_acq_rel) + 1 == n_threads) {
        atomic_store_explicit(&barrier->n_waiting, 0, memory_order_relaxed);
        atomic_store_explicit(&barrier->generation, generation + 1, memory_order_release);
        return;
    }
    int n = 0;
    while (atomic_load_explicit(&barrier->generation, memory_order_acquire) == generation) {
        if (n < SPINS) {
            tsffn_relax();
            ++n;
        } else {
            sched_yield();
        }
    }
}

#endif
