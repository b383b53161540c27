"""llama.cpp's log: shown when asked for, otherwise collected so that an error can be told in one line.

llama.cpp has one logger per process, and calls it from any thread. Here is one callback that stays for good and gives
each line to whoever collects in the thread that it comes from; lines that nobody collects go to the logger that was
there before.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp

from tsconv.errors import BackendError
from tsconv.signals import calling_c

GGML_LOG_LEVEL_ERROR = 4  # enum ggml_log_level (ggml.h)
OWN = "tsffn: "  # begins every message of the native backend (native/src/ggml/log.c)


class _Router:
    """Where lines go.

    Attributes:
        collecting: the lists that collect, the last one of a thread last: (thread, list).
        callback: what llama.cpp calls.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.collecting: list[tuple[int, list[str]]] = []
        self._before: tuple[Any, ctypes.c_void_p] | None = None
        self.callback = llama_cpp.llama_log_callback(self._route)
        # llama.cpp may log while the interpreter ends, when the names of modules are gone: the callback stays for good,
        # and uses nothing but what it holds.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.callback))
        self._ident, self._threads, self._own = threading.get_ident, threading.enumerate, OWN.encode()
        self._write = os.write

    def install(self) -> None:
        """Takes the place of another logger, if there is another one now."""
        callback, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
        llama_cpp.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
        if _address(callback) != _address(self.callback):
            self._before = callback, data
            llama_cpp.llama_log_set(self.callback, ctypes.c_void_p(0))

    def after_fork(self) -> None:
        """In the child: only the thread that forked is there."""
        self.lock = threading.Lock()
        self.collecting = [entry for entry in self.collecting if entry[0] == threading.get_ident()]

    def _route(self, level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        lines = self._collector()
        if lines is None and level == GGML_LOG_LEVEL_ERROR and text.startswith(self._own):
            self._write(2, text)  # llama-cpp-python takes this level for another, and hides it
        elif lines is None:
            if self._before is not None:
                callback, data = self._before
                callback(level, text, data)
        elif level == GGML_LOG_LEVEL_ERROR:
            lines.append(text.decode(errors="replace").strip())

    def _collector(self) -> list[str] | None:
        """The last of this thread, or of all for a thread that llama.cpp started; None without one."""
        collecting = self.collecting[::-1]
        if not collecting:
            return None
        thread = self._ident()
        for owner, lines in collecting:
            if owner == thread:
                return lines
        return None if any(known.ident == thread for known in self._threads()) else collecting[0][1]


def _address(callback: Any) -> int | None:
    return ctypes.cast(callback, ctypes.c_void_p).value


_router = _Router()
os.register_at_fork(after_in_child=_router.after_fork)


@contextmanager
def quiet_unless(verbose: bool) -> Iterator[list[str]]:
    """Unless `verbose`, keeps llama.cpp from logging in this thread while this holds; yields the list that its error
    lines go into. For calls of llama.cpp alone: signals wait, because it may call Python back, if only to log."""
    lines: list[str] = []
    with calling_c():
        if verbose:
            yield lines
            return
        entry = threading.get_ident(), lines
        with _router.lock:
            _router.install()
            _router.collecting = [*_router.collecting, entry]
        try:
            yield lines
        finally:
            with _router.lock:
                _router.collecting = [other for other in _router.collecting if other is not entry]


@contextmanager
def computing(where: object, verbose: bool = False) -> Iterator[None]:
    """Batches are computed while this holds, by the model `where`.

    Raises:
        BackendError: llama.cpp could not compute one; it quotes what the backend says of that.
    """
    with quiet_unless(verbose) as errors:
        try:
            yield
        except RuntimeError as error:
            own = next((line.removeprefix(OWN) for line in errors if line.startswith(OWN)), None)
            raise BackendError("llama.cpp could not compute a batch", where=where, found=own or error) from None
