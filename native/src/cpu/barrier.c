#define _DEFAULT_SOURCE // syscall
#include "barrier.h"

#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

void tsffn_barrier_sleep(struct tsffn_barrier * barrier, uint32_t generation) {
    atomic_fetch_add(&barrier->n_asleep, 1);
    syscall(SYS_futex, &barrier->generation, FUTEX_WAIT_PRIVATE, generation, NULL, NULL, 0);
    atomic_fetch_sub(&barrier->n_asleep, 1);
}

void tsffn_barrier_wake(struct tsffn_barrier * barrier) {
    syscall(SYS_futex, &barrier->generation, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}
