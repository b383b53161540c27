"""Writing a report: a folder with the page and its figures, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tsconv.errors import OutputError
from tsconv.extras import require
from tsconv.report.summary import summarise_stats
from tsconv.signals import sigterm_exits
from tsconv.stats.counts import Stats
from tsconv.write.writer import lock, write_synced

if TYPE_CHECKING:
    from tsconv.report.style import Plot

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
    kind = profile_report()
    from tsconv.report.figures import draw
    from tsconv.report.page import page

    check_writable(directory, kind)
    summary = summarise_stats(stats)
    plots = draw(stats, summary)
    return write_page(directory, kind, plots, page(summary, plots, title))


@dataclass(frozen=True)
class ReportKind:
    """Reports of one command.

    Attributes:
        generator: in the page's <meta name="generator">: how a page is known again.
        figures: names of all figures that there can be.
    """

    generator: str
    figures: tuple[str, ...]


def profile_report() -> ReportKind:
    """Of activation statistics. Raises TsconvError: matplotlib is not installed."""
    require("matplotlib", "a report")
    from tsconv.report.figures import NAMES
    from tsconv.report.page import GENERATOR

    return ReportKind(GENERATOR, NAMES)


def write_page(directory: Path, kind: ReportKind, plots: Sequence[Plot], page: str) -> list[Path]:
    """Writes a page, and its figures as SVG and PNG, in place of the report that is there. Returns what was written,
    the page first.

    Raises:
        OutputError: the directory cannot be made or written; nothing is left behind.
    """
    contents = {f"{plot.name}.svg": plot.svg.encode() for plot in plots}
    contents |= {f"{plot.name}.png": plot.png for plot in plots}
    contents[PAGE] = page.encode()  # last to be renamed: it is what people open
    _write(directory, contents, _names(kind))
    return [directory / name for name in reversed(contents)]


def check_writable(directory: Path, kind: ReportKind | None = None) -> None:
    """Makes sure that a report can be written to `directory`, and leaves nothing there: call it before hours of
    counting.

    Args:
        kind: None: `profile_report`.

    Raises:
        OutputError: it cannot be made or written, or has files by a report's names that are not a report's.
        TsconvError: matplotlib is not installed.
    """
    kind = kind or profile_report()
    with _reported(directory), _made(directory) as made:
        with tempfile.TemporaryFile(dir=directory):
            pass
        others = [directory / name for name in _names(kind) if os.path.lexists(directory / name)]
        for path in reversed(made):
            path.rmdir()
    others = [path for path in others if path.is_dir() or not _is_report(directory / PAGE, kind)]
    if others:
        raise OutputError(
            "not a file of a report, and a report would replace it", where=others[0], fix="choose another --report"
        )


def _names(kind: ReportKind) -> list[str]:
    return [PAGE, *(f"{name}.{suffix}" for name in kind.figures for suffix in ("svg", "png"))]


def _is_report(path: Path, kind: ReportKind) -> bool:
    """Whether a page of this kind is at `path`."""
    try:
        with open(path, "rb") as file:
            return f'<meta name="generator" content="{kind.generator} '.encode() in file.read(1024)
    except OSError:
        return False


def _write(directory: Path, contents: dict[str, bytes], names: Iterable[str]) -> None:
    """Writes all of `contents` beside their names, then renames them in order: the page, whose lock is held, last.
    Others of `names` go."""
    parts = {name: directory / f"{name}.part" for name in contents}
    with sigterm_exits(), _reported(directory), _made(directory) as made:
        fd = lock(parts[PAGE])
        try:
            for name, data in contents.items():
                write_synced(parts[name], data)
            for name in set(names) - set(contents):
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
