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
    """

    def __init__(self, n_threads: int = 1) -> None:
        self.n_threads = n_threads
        self.lock = threading.RLock()
        self.gone: str | None = None
        self._depth = 0  # calls within calls of the thread that holds the lock
        self._changing = 0  # those of them that change the context
        self._user: object = None  # the last one that changed the context

    @property
    def is_working(self) -> bool:
        """Whether the model works for the thread that asks; ask while holding the lock."""
        return self._depth > 0

    @contextmanager
    def alone(self, user: object = None, *, resumed: bool = False, changes: bool = True) -> Iterator[None]:
        """While this holds, no other thread uses the model.

        Args:
            user: who continues later what this begins, so that others may come in between.
            resumed: it continues.
            changes: tokens may come into the context, or leave it.

        Raises:
            BackendError: the model cannot be used any more, or another one changed what was to be continued.
        """
        with self.lock:
            if self.gone is not None:
                raise BackendError(self.gone)
            if changes and not self._changing:
                if resumed and self._user is not user:
                    raise BackendError(
                        "another call has used the model since: this text cannot be continued",
                        fix="end one text before the next, or load the model once for each",
                    )
                use_threads(self.n_threads)
                self._user = object() if user is None else user
            self._depth += 1
            self._changing += changes
            try:
                yield
            finally:
                self._depth -= 1
                self._changing -= changes

    def after_fork(self) -> None:
        """In the child: another thread may have held the lock, and it is not there to give it back."""
        self.lock, self._depth, self._changing = threading.RLock(), 0, 0
        self.gone = self.gone or FORKED
