"""Ctrl-C as a wish to stop soon, for commands that have something to finish."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def interruptible(signals: Sequence[signal.Signals] = (signal.SIGINT,)) -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether one of `signals` came; a second one raises KeyboardInterrupt."""
    came: list[int] = []

    def handler(signum: int, frame: object) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(signum)

    previous = {number: signal.signal(number, handler) for number in signals}
    try:
        yield lambda: bool(came)
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
