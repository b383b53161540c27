"""llama.cpp's log: shown when asked for, otherwise collected so that an error can be told in one line."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import llama_cpp
from llama_cpp import _logger

GGML_LOG_LEVEL_ERROR = 4  # enum ggml_log_level (ggml.h)


@contextmanager
def quiet_unless(verbose: bool) -> Iterator[list[str]]:
    """Unless `verbose`, keeps llama.cpp from logging while this holds; yields the list that its error lines go into."""
    lines: list[str] = []
    if verbose:
        yield lines
        return

    @llama_cpp.llama_log_callback
    def collect(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        if level == GGML_LOG_LEVEL_ERROR:
            lines.append(text.decode(errors="replace").strip())

    llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))
