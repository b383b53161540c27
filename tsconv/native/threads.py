"""OpenMP's threads: they belong to the process that first computed with several."""

from __future__ import annotations

import os

from tsconv.errors import BackendError

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
