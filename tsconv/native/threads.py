"""OpenMP's threads: they belong to the process that first computed with several."""

from __future__ import annotations

import os

from tsconv.errors import BackendError

SPINS_WHEN_BUSY = "1000"
_pool_of: list[int] = []  # the process that OpenMP's threads were first asked for in; at most one


def check_threads(n_threads: int) -> None:
    """Whether this process can compute with so many threads.

    Raises:
        BackendError: it was forked from one that had several; OpenMP would wait for those forever.
    """
    if n_threads > 1 and _pool_of and _pool_of[0] != os.getpid():
        raise BackendError(
            "this process was forked from one that had computed with several threads, which are not in it",
            expected="1 thread",
            found=n_threads,
            fix="start processes with the method 'spawn', or use 1 thread",
        )


def use_threads(n_threads: int) -> None:
    """To be called before a parallel region of so many threads; raises as `check_threads`."""
    check_threads(n_threads)
    if n_threads > 1 and not _pool_of:
        _pool_of.append(os.getpid())


def wait_asleep() -> None:
    """Lets OpenMP's threads sleep soon when they wait for one another. What the user set counts.

    To be called before llama_cpp is imported: libgomp reads the environment when it is loaded.

    libgomp has them spin for milliseconds, which is best on a machine that has nothing else to do. On a busy one they
    then spin on the very processor that the thread they wait for needs (docs/notes/2026-11-28-busy-machine.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS_WHEN_BUSY)
