"""What the commands print: results on stdout, everything else on stderr; and streams that are closed, full or without a
reader."""

from __future__ import annotations

import codecs
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from tsconv.errors import OutputError

SHOWN = "tsconv.shown"  # the error handler of both streams


def prepare_streams() -> None:
    """Call it before anything is opened.

    A stream that was closed gets /dev/null: a file that is opened later must not become stdout or stderr, into which
    libraries print. Writing to a stdout that was closed fails, as it would have.
    """
    for fd, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, mode)  # the lowest number that is free: fd
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - for as long as the process lives
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - for as long as the process lives
    codecs.register_error(SHOWN, _shown)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=SHOWN)


def _shown(error: UnicodeError) -> tuple[bytes, int]:
    """The bytes of a path that is not text as they are; a question mark for what the stream's encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return b"".join(bytes([ord(c) - 0xDC00]) if "\udc80" <= c <= "\udcff" else b"?" for c in characters), error.end


def echo(text: str = "", nl: bool = True) -> None:
    """Prints a result on stdout.

    Raises:
        OutputError: stdout is closed, or the disk is full that it is on.
        click.exceptions.Exit: nobody reads any more (`| head`), which is no error.
    """
    try:
        click.echo(text, nl=nl)
    except BrokenPipeError:
        _to_nowhere(1)
        raise click.exceptions.Exit(0) from None
    except OSError as error:
        _to_nowhere(1)
        raise OutputError(f"cannot be written: {error.strerror}", where="stdout") from None


def say(text: str) -> None:
    """Prints a line on stderr, if that can be written."""
    try:
        click.echo(text, err=True)
    except OSError:
        _to_nowhere(2)


def forget_unwritten() -> None:
    """Drops what stdout could not take: the interpreter would try again when it ends, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        _to_nowhere(1)


def _to_nowhere(fd: int) -> None:
    """What is printed from now on, and what is still in the stream, goes to /dev/null."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, fd)
    os.close(null)


@contextmanager
def progress_bar(what: str, delay: float = 0) -> Iterator[Callable[[int, int], None] | None]:
    """Shows (bytes done, bytes in all) as a bar on stderr, when that is a terminal and it takes longer than `delay`
    seconds."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(
        unit="B", unit_scale=True, dynamic_ncols=True, desc=what, file=sys.stderr, leave=False, delay=delay
    ) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: null for numbers that are not finite; paths as strings."""
    return json.dumps(_finite(value), default=os.fspath, indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
