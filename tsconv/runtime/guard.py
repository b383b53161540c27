"""What a loaded model must not be used for: after `close()`, in a forked process, by two callers at once.

llama.cpp's context belongs to one caller at a time, its pointers are dangling after they were freed, and OpenMP's
threads do not exist in a forked process: there is no error for any of that, but a crash, a hang, or another text.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tsconv.errors import BackendError
from tsconv.native.threads import use_threads

CLOSED = "the model is closed"
FORKED = (
    "the model was loaded before this process was forked, and llama.cpp's threads are not in it; load the model in "
    "this process, or start processes with the method 'spawn'"
)


class Gone:
    """Stands where llama.cpp's objects were: every use of it says why they cannot be used any more."""

    def __init__(self, why: str) -> None:
        self.why = why

    def __getattr__(self, name: str) -> object:
        raise BackendError(self.why)


class Guard:
    """Whose turn a model is.

    Attributes:
        n_threads: those that the model computes with.
        lock: held while llama.cpp works for the model.
        gone: why the model cannot be used any more; None while it can.
        version: of the context: another one after each call that may have changed it.
    """

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self.lock = threading.RLock()
        self.gone: str | None = None
        self.version = 0
        self._calls: list[bool] = []  # of the thread that holds the lock, each within the one before: what `changes` is

    @property
    def is_working(self) -> bool:
        """Whether the model works for the thread that asks; ask while holding the lock."""
        return bool(self._calls)

    @contextmanager
    def alone(self, *, changes: bool = True, continues: int | None = None) -> Iterator[None]:
        """While this holds, no other thread uses the model.

        Args:
            changes: tokens may come into the context, or leave it.
            continues: the version of the context that this goes on from; None: from any.

        Raises:
            BackendError: the model cannot be used any more, or another call changed what was to be continued.
        """
        with self.lock:
            if self.gone is not None:
                raise BackendError(self.gone)
            if changes and not any(self._calls):  # what is called by a call belongs to it
                if continues not in (None, self.version):
                    raise BackendError(
                        "another call has used the model since: this text cannot be continued",
                        fix="end one text before the next, or load the model once for each",
                    )
                use_threads(self.n_threads)
                self.version += 1
            self._calls.append(changes)
            try:
                yield
            finally:
                self._calls.pop()

    def after_fork(self) -> None:
        """In the child: another thread may have held the lock, and it is not there to give it back."""
        self.lock = threading.RLock()
        self.gone = self.gone or FORKED
