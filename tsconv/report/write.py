"""Writing a report: a folder with the page and its figures, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tsconv.errors import OutputError
from tsconv.extras import require
from tsconv.report.summary import summarise_stats
from tsconv.signals import sigterm_exits
from tsconv.stats.counts import Stats
from tsconv.write.writer import lock, write_synced

PAGE = "index.html"


def write_report(stats: Stats, directory: Path, title: str | None = None) -> list[Path]:
    """Draws the report of `stats` and writes it: index.html, which holds everything, and NAME.svg and NAME.png of each
    figure. A report that is there is replaced, figures that the new one does not have included.

    Args:
        stats: what to report.
        directory: made when it is missing.
        title: of the page; None: the model's name.

    Returns:
        What was written, the page first.

    Raises:
        OutputError: the directory cannot be made or written, or has other files by these names; nothing is left behind.
        TsconvError: matplotlib is not installed.
    """
    require("matplotlib", "a report")
    from tsconv.report.figures import draw
    from tsconv.report.page import page

    check_writable(directory)
    summary = summarise_stats(stats)
    plots = draw(stats, summary)
    contents = {f"{plot.name}.svg": plot.svg.encode() for plot in plots}
    contents |= {f"{plot.name}.png": plot.png for plot in plots}
    contents[PAGE] = page(summary, plots, title).encode()  # last to be renamed: it is what people open
    _write(directory, contents)
    return [directory / name for name in reversed(contents)]


def check_writable(directory: Path) -> None:
    """Makes sure that a report can be written to `directory`, and leaves nothing there: call it before hours of
    counting.

    Raises:
        OutputError: it cannot be made or written, or has files by a report's names that are not a report's.
        TsconvError: matplotlib is not installed.
    """
    require("matplotlib", "a report")
    with _reported(directory), _made(directory) as made:
        with tempfile.TemporaryFile(dir=directory):
            pass
        others = [directory / name for name in _names() if os.path.lexists(directory / name)]
        for path in reversed(made):
            path.rmdir()
    others = [path for path in others if path.is_dir() or not _is_report(directory / PAGE)]
    if others:
        raise OutputError(
            "not a file of a report, and a report would replace it", where=others[0], fix="choose another --report"
        )


def _names() -> list[str]:
    from tsconv.report.figures import NAMES

    return [PAGE, *(f"{name}.{kind}" for name in NAMES for kind in ("svg", "png"))]


def _is_report(path: Path) -> bool:
    """Whether a page of ours is at `path`."""
    from tsconv.report.page import GENERATOR

    try:
        with open(path, "rb") as file:
            return f'<meta name="generator" content="{GENERATOR} '.encode() in file.read(1024)
    except OSError:
        return False


def _write(directory: Path, contents: dict[str, bytes]) -> None:
    """Writes all of `contents` beside their names, then renames them in order: the page, whose lock is held, last."""
    parts = {name: directory / f"{name}.part" for name in contents}
    with sigterm_exits(), _reported(directory), _made(directory) as made:
        fd = lock(parts[PAGE])
        try:
            for name, data in contents.items():
                write_synced(parts[name], data)
            for name in set(_names()) - set(contents):
                (directory / name).unlink(missing_ok=True)
            for name, part in parts.items():
                os.replace(part, directory / name)
            made.clear()
        finally:
            for part in parts.values():
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)
            os.close(fd)


@contextlib.contextmanager
def _made(directory: Path) -> Iterator[list[Path]]:
    """Makes `directory` and those above it; on an error removes those it made, unless the list was emptied."""
    missing = []
    path = directory
    while not os.path.lexists(path) and path != path.parent:
        missing.append(path)
        path = path.parent
    made: list[Path] = []
    try:
        for path in reversed(missing):
            path.mkdir()
            made.append(path)
        yield made
    except BaseException:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def _reported(directory: Path) -> Iterator[None]:
    """An operating system's error becomes an OutputError."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OutputError(f"no report can be written here: {reason}", where=directory) from None
