"""Ctrl-C and SIGTERM: made to wait, to clean up, or to ask for a stop. Python handles signals in the main thread."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Ctrl-C and SIGTERM that come while inside take effect on leaving.

    For steps of which none may be left out, and around thread pools: an exception inside a pool or a future could leave
    one of its locks held, and the pool's shutdown would wait for ever for a thread that waits for that lock.
    """
    with _waiting((signal.SIGINT, signal.SIGTERM)):
        yield


@contextlib.contextmanager
def calling_c() -> Iterator[None]:
    """Ctrl-C and SIGTERM that Python handles take effect on leaving, when they come while inside.

    For calls of C that may call Python back: what a handler raises in a callback is lost. This delays nothing, as
    Python handles no signals while C runs. A SIGTERM without a handler still ends the process at once.
    """
    with _waiting([n for n in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(n))]):
        yield


@contextlib.contextmanager
def _waiting(numbers: Sequence[signal.Signals]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    came: list[int] = []
    before = {n: signal.signal(n, lambda n, _: came.append(n)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)


@contextlib.contextmanager
def sigterm_exits() -> Iterator[None]:
    """While inside, SIGTERM raises SystemExit(143) in the main thread, so that cleaning up happens as for Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the cleaning short
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def interruptible(signals: Sequence[signal.Signals] = (signal.SIGINT,)) -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether one of `signals` came; a second one raises KeyboardInterrupt.

    For commands that have something to finish. In the main thread only.
    """
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
