"""Models larger than memory: decoding in a memory control group, beside llama.cpp that maps the same file there.

    python -m tsconv.bench.stream --memory 3G --memory 4G
    python -m tsconv.bench.stream --memory all              without a group, with what memory there is

Each engine runs alone, in a group of its own, after the page cache has forgotten the model.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from tsconv.bench.budget_plot import draw
from tsconv.bench.generate import PRESETS, drop_from_page_cache, generated
from tsconv.errors import TsconvError
from tsconv.machine.limits import PROC, control_groups, usable_cores
from tsconv.runtime.streaming import parse_budget

ENGINES = ("tsconv", "llama.cpp-norepack")  # llama.cpp's own copy of rearranged weights would not fit
ALL = "all"  # of the machine's memory
KILLED = -9  # by the kernel: out of memory


class NoGroupError(Exception):
    """Why no memory control group can be made."""


@contextlib.contextmanager
def memory_group(n_bytes: int) -> Iterator[tuple[Path, str]]:
    """A memory control group below this process's own (v1), or beside it (v2), with a limit.

    Yields:
        its folder, and the name of the file in there that has the largest use so far.

    Raises:
        NoGroupError: the system does not allow it.
    """
    for is_v2, own in control_groups("memory", PROC):
        folder = (own.parent if is_v2 else own) / f"tsconv-bench-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError as error:
            raise NoGroupError(f"{folder}: {error.strerror}") from None
        try:
            try:
                (folder / ("memory.max" if is_v2 else "memory.limit_in_bytes")).write_text(str(n_bytes))
            except OSError as error:
                raise NoGroupError(f"{folder}: its memory cannot be limited: {error.strerror}") from None
            yield folder, "memory.peak" if is_v2 else "memory.max_usage_in_bytes"
        finally:
            with contextlib.suppress(OSError):  # page cache of it, if any
                (folder / "memory.force_empty").write_text("0")
            folder.rmdir()
        return
    raise NoGroupError("there is no memory controller")


def measure(
    path: Path, engine: str, memory: str, warm_up: str, test: str, repetitions: int, n_threads: int
) -> dict[str, Any]:
    """One engine in a group with so much memory, or in none.

    Args:
        memory: a size (tsconv.machine.size), or "all".
        warm_up, test: "tg" and a number of tokens.

    Returns:
        load_seconds and load_disk_bytes, what the disk gave meanwhile; tokens_per_s (the median); of ours also
        memory_share, ahead_share (of the neurons that memory did not have, those that were read ahead), disk_bytes,
        disk_reads and disk_seconds per token; peak_bytes of the group, or without one what the program has in the
        end, and with one cache_bytes, by how much the page cache in it grew after the warm-up. `killed` where the
        kernel ended it.

    Raises:
        NoGroupError: as `memory_group`.
        TsconvError: the engine ended for another reason.
    """
    drop_from_page_cache()
    n_bytes = None if memory == ALL else int(parse_budget(memory))
    with contextlib.nullcontext() if n_bytes is None else memory_group(n_bytes) as group:
        enter = None if group is None else functools.partial(_enter, group[0])
        command = [sys.executable, "-m", "tsconv.bench.worker", engine, os.fspath(path), str(n_threads)]
        worker = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=enter,  # noqa: PLW1509 - takes no lock of another thread
        )
        answers, cached = [], []
        with worker, contextlib.suppress(BrokenPipeError):
            assert worker.stdin is not None and worker.stdout is not None
            for name in (None, warm_up, *[test] * repetitions):
                if name is not None:
                    print(json.dumps({"test": name, "n_threads": n_threads}), file=worker.stdin, flush=True)
                line = worker.stdout.readline()
                if not line:
                    break
                answers.append(json.loads(line))
                cached.append(0 if group is None else _page_cache(group[0]))
            worker.stdin.close()
        if worker.returncode == KILLED:
            return {"engine": engine, "memory_bytes": n_bytes, "killed": True}
        if worker.returncode != 0:
            raise TsconvError(f"{engine} ended with status {worker.returncode}")
        peak_bytes = answers[-1]["resident_bytes"] if group is None else int((group[0] / group[1]).read_text())
    return {
        "engine": engine,
        "memory_bytes": n_bytes,
        "killed": False,
        "load_seconds": answers[0]["load_seconds"],
        "load_disk_bytes": answers[0]["load_disk_bytes"],
        "peak_bytes": peak_bytes,
        "cache_bytes": None if group is None else cached[-1] - cached[1],
        **_per_token(answers[2:], int(test.removeprefix("tg"))),
    }


def _enter(folder: Path) -> None:
    (folder / "cgroup.procs").write_text(str(os.getpid()))


def _page_cache(folder: Path) -> int:
    """Bytes of files that a group has in memory: `cache` of memory.stat (v1), `file` (v2)."""
    found = re.search(r"^(?:cache|file) (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
    return 0 if found is None else int(found[1])


def _per_token(answers: list[dict[str, Any]], n_tokens: int) -> dict[str, float]:
    answer = sorted(answers, key=lambda answer: answer["seconds"])[len(answers) // 2]
    found = {"tokens_per_s": n_tokens / answer["seconds"]}
    if "layers" in answer:

        def total(key: str) -> float:
            return sum(layer[key] for layer in answer["layers"])

        found["memory_share"] = 1 - total("neurons_missing") / max(1, total("neurons_needed"))
        found["ahead_share"] = total("neurons_ahead") / max(1, total("neurons_missing"))
        found["disk_bytes"] = total("bytes_disk") / n_tokens
        found["disk_reads"] = total("disk_reads") / n_tokens
        found["disk_seconds"] = total("seconds_disk") / n_tokens
    return found


def describe(row: dict[str, Any]) -> str:
    """One line."""
    memory = ALL if row["memory_bytes"] is None else f"{row['memory_bytes'] / 2**30:.3g} GiB"
    head = f"{memory}  {row['engine']:<20}"
    if row["killed"]:
        return f"{head}killed: out of memory"
    line = f"{head}{row['tokens_per_s']:.3g} tokens/s, loaded in {row['load_seconds']:.1f} s with "
    line += f"{row['load_disk_bytes'] / 1e6:.0f} MB of the disk, peak {row['peak_bytes'] / 2**20:.0f} MiB"
    if row["cache_bytes"] is not None:
        line += f", page cache {row['cache_bytes'] / 2**20:+.0f} MiB"
    if row.get("disk_bytes"):
        rate = row["disk_bytes"] / max(1e-9, row["disk_seconds"])
        line += (
            f"; {row['memory_share']:.1%} in memory, {row['disk_bytes'] / 1e6:.1f} MB/token in {row['disk_reads']:.0f} "
            f"reads, {row['ahead_share']:.0%} of them ahead, waited {1e3 * row['disk_seconds']:.0f} ms/token "
            f"({rate / 1e6:.0f} MB/s)"
        )
    return line


@click.command()
@click.option("-m", "--model", type=click.Path(path_type=Path), help="Converted model.  [default: --shape, generated]")
@click.option("--shape", type=click.Choice(list(PRESETS)), default="turbosparse-mistral-7b", show_default=True)
@click.option("--layers", type=click.IntRange(min=1), help="Of the generated model.  [default: all]")
@click.option("--outtype", default="q4_0", show_default=True)
@click.option(
    "--memory", multiple=True, default=("3G",), show_default=True, help="Of the group, or all; several times."
)
@click.option("--engine", multiple=True, type=click.Choice(ENGINES), default=ENGINES, show_default=True)
@click.option("--warm-up", default="tg32", show_default=True, help="Tokens to decode first.")
@click.option("--test", default="tg64", show_default=True, help="Tokens to decode.")
@click.option("-r", "--repetitions", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("-t", "--threads", "n_threads", type=click.IntRange(min=1), help="[default: cores]")
@click.option("--save", type=click.Path(path_type=Path), help="Write the results to a file too, as JSON.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw tokens/s over memory into a file, PNG.")
@click.option("--saved", multiple=True, type=click.Path(exists=True, path_type=Path), help="Of --save, drawn too.")
def main(
    model: Path | None,
    shape: str,
    layers: int | None,
    outtype: str,
    memory: tuple[str, ...],
    engine: tuple[str, ...],
    warm_up: str,
    test: str,
    repetitions: int,
    n_threads: int | None,
    save: Path | None,
    plot: Path | None,
    saved: tuple[Path, ...],
) -> None:
    """Decode a model larger than memory in memory control groups, with tsconv and with llama.cpp."""
    rows = []
    try:
        if set(memory) != {ALL}:
            with memory_group(1 << 30):
                pass
        path = model or generated(
            shape, layers or PRESETS[shape].n_layer, outtype, functools.partial(click.echo, err=True)
        )
        for size in memory:
            for name in engine:
                rows.append(measure(path, name, size, warm_up, test, repetitions, n_threads or usable_cores()))
                click.echo(describe(rows[-1]))
    except NoGroupError as reason:
        click.echo(f"skipped: no memory control group can be made: {reason}", err=True)
    except TsconvError as error:
        raise click.ClickException(str(error)) from None
    if save is not None:
        save.write_text(json.dumps(rows, indent=2))
    if plot is not None and rows:
        earlier = [row for file in saved for row in json.loads(file.read_text())]
        plot.write_bytes(draw([*earlier, *rows], path))


if __name__ == "__main__":
    main()
