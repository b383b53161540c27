// A place where the threads of a call meet.
//
// libgomp's own makes a system call each time, to wake threads that may have gone to sleep. The threads of a layer wait
// for microseconds only, and spin (docs/notes/2026-11-28-threads.md). Who waits longer sleeps: on a busy machine the
// thread that is waited for may need that very processor, and who slept is let in at once when it is woken.
#ifndef TSFFN_BARRIER_H
#define TSFFN_BARRIER_H

#include <stdatomic.h>
#include <stdint.h>

struct tsffn_barrier {
    _Alignas(64) atomic_int n_waiting;
    _Alignas(64) _Atomic(uint32_t) generation; // how often all have met
    atomic_int n_asleep;                       // who may be waiting in the kernel
};

static inline void tsffn_barrier_init(struct tsffn_barrier * barrier) {
    atomic_init(&barrier->n_waiting, 0);
    atomic_init(&barrier->generation, 0);
    atomic_init(&barrier->n_asleep, 0);
}

// Tells the processor that a loop waits.
static inline void tsffn_relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Sleeps until the barrier's generation is another one than this; may also return before.
void tsffn_barrier_sleep(struct tsffn_barrier * barrier, uint32_t generation);
void tsffn_barrier_wake(struct tsffn_barrier * barrier);

// Returns when n_threads threads have called it.
static inline void tsffn_barrier_wait(struct tsffn_barrier * barrier, int n_threads) {
    enum { SPINS = 10000 };
    const uint32_t generation = atomic_load_explicit(&barrier->generation, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&barrier->n_waiting, 1, memory_order_acq_rel) + 1 == n_threads) {
        atomic_store_explicit(&barrier->n_waiting, 0, memory_order_relaxed);
        // In one order with what a sleeper does: it is counted, or it sees the new generation and does not sleep.
        atomic_store(&barrier->generation, generation + 1);
        if (atomic_load(&barrier->n_asleep) > 0) {
            tsffn_barrier_wake(barrier);
        }
        return;
    }
    int n = 0;
    while (atomic_load_explicit(&barrier->generation, memory_order_acquire) == generation) {
        if (n < SPINS) {
            tsffn_relax();
            ++n;
        } else {
            tsffn_barrier_sleep(barrier, generation);
        }
    }
}

#endif
