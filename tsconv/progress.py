"""How far a long task is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]  # (done, in all)


def counter(progress: Progress | None, total: int) -> Callable[[int], None] | None:
    """Turns increments into (done, total)."""
    if progress is None:
        return None
    done = 0

    def count(increment: int) -> None:
        nonlocal done
        done += increment
        progress(done, total)

    return count
