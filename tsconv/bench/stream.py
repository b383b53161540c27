"""Models larger than memory: decoding in a memory control group, beside llama.cpp that maps the same file there.

    python -m tsconv.bench.stream --memory 3G --memory 4G

Each engine runs alone, in a group of its own, after the page cache has forgotten the model.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from tsconv.bench.generate import PRESETS, drop_from_page_cache, generated
from tsconv.errors import TsconvError
from tsconv.machine.limits import PROC, control_groups, usable_cores
from tsconv.runtime.streaming import parse_budget

ENGINES = ("tsconv", "llama.cpp-norepack")  # llama.cpp's own copy of rearranged weights would not fit
WARM_UP = "tg32"
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


def measure(path: Path, engine: str, n_bytes: int, test: str, repetitions: int, n_threads: int) -> dict[str, Any]:
    """One engine in a memory of `n_bytes`.

    Returns:
        load_seconds, tokens_per_s (the median), of ours also memory_share, disk_bytes and disk_seconds per token, and
        peak_bytes of the group; `killed` where the kernel ended it.

    Raises:
        NoGroupError: as `memory_group`.
        TsconvError: the engine ended for another reason.
    """
    drop_from_page_cache()
    with memory_group(n_bytes) as (folder, peak):
        command = [sys.executable, "-m", "tsconv.bench.worker", engine, os.fspath(path), str(n_threads)]
        worker = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=functools.partial(_enter, folder),  # noqa: PLW1509 - takes no lock of another thread
        )
        answers = []
        with worker, contextlib.suppress(BrokenPipeError):
            assert worker.stdin is not None and worker.stdout is not None
            for name in (None, WARM_UP, *[test] * repetitions):
                if name is not None:
                    print(json.dumps({"test": name, "n_threads": n_threads}), file=worker.stdin, flush=True)
                line = worker.stdout.readline()
                if not line:
                    break
                answers.append(json.loads(line))
            worker.stdin.close()
        if worker.returncode == KILLED:
            return {"engine": engine, "memory_bytes": n_bytes, "killed": True}
        if worker.returncode != 0:
            raise TsconvError(f"{engine} ended with status {worker.returncode}")
        peak_bytes = int((folder / peak).read_text())
    return {
        "engine": engine,
        "memory_bytes": n_bytes,
        "killed": False,
        "load_seconds": answers[0]["load_seconds"],
        "peak_bytes": peak_bytes,
        **_per_token(answers[2:], int(test.removeprefix("tg"))),
    }


def _enter(folder: Path) -> None:
    (folder / "cgroup.procs").write_text(str(os.getpid()))


def _per_token(answers: list[dict[str, Any]], n_tokens: int) -> dict[str, float]:
    answer = sorted(answers, key=lambda answer: answer["seconds"])[len(answers) // 2]
    found = {"tokens_per_s": n_tokens / answer["seconds"]}
    if "layers" in answer:

        def total(key: str) -> float:
            return sum(layer[key] for layer in answer["layers"])

        found["memory_share"] = 1 - total("neurons_missing") / max(1, total("neurons_needed"))
        found["disk_bytes"] = total("bytes_disk") / n_tokens
        found["disk_reads"] = total("disk_reads") / n_tokens
        found["disk_seconds"] = total("seconds_disk") / n_tokens
    return found


def describe(row: dict[str, Any]) -> str:
    """One line."""
    head = f"{row['memory_bytes'] / 2**30:.3g} GiB  {row['engine']:<20}"
    if row["killed"]:
        return f"{head}killed: out of memory"
    line = f"{head}{row['tokens_per_s']:.2f} tokens/s, loaded in {row['load_seconds']:.1f} s, peak "
    line += f"{row['peak_bytes'] / 2**20:.0f} MiB"
    if row.get("disk_bytes"):
        rate = row["disk_bytes"] / max(1e-9, row["disk_seconds"])
        line += (
            f"; {row['memory_share']:.1%} in memory, {row['disk_bytes'] / 1e6:.1f} MB/token in {row['disk_reads']:.0f} "
            f"reads, waited {1e3 * row['disk_seconds']:.0f} ms/token ({rate / 1e6:.0f} MB/s)"
        )
    return line


@click.command()
@click.option("-m", "--model", type=click.Path(path_type=Path), help="Converted model.  [default: --shape, generated]")
@click.option("--shape", type=click.Choice(list(PRESETS)), default="turbosparse-mistral-7b", show_default=True)
@click.option("--layers", type=click.IntRange(min=1), help="Of the generated model.  [default: all]")
@click.option("--outtype", default="q4_0", show_default=True)
@click.option("--memory", multiple=True, default=("3G",), show_default=True, help="Of the group; several times.")
@click.option("--engine", multiple=True, type=click.Choice(ENGINES), default=ENGINES, show_default=True)
@click.option("--test", default="tg64", show_default=True, help="Tokens to decode, after the first 32.")
@click.option("-r", "--repetitions", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("-t", "--threads", "n_threads", type=click.IntRange(min=1), help="[default: cores]")
@click.option("--save", type=click.Path(path_type=Path), help="Write the results to a file too, as JSON.")
def main(
    model: Path | None,
    shape: str,
    layers: int | None,
    outtype: str,
    memory: tuple[str, ...],
    engine: tuple[str, ...],
    test: str,
    repetitions: int,
    n_threads: int | None,
    save: Path | None,
) -> None:
    """Decode a model larger than memory in memory control groups, with tsconv and with llama.cpp."""
    rows = []
    try:
        with memory_group(1 << 30):
            pass
        path = model or generated(
            shape, layers or PRESETS[shape].n_layer, outtype, functools.partial(click.echo, err=True)
        )
        for size in memory:
            for name in engine:
                rows.append(
                    measure(path, name, int(parse_budget(size)), test, repetitions, n_threads or usable_cores())
                )
                click.echo(describe(rows[-1]))
    except NoGroupError as reason:
        click.echo(f"skipped: no memory control group can be made: {reason}", err=True)
    except TsconvError as error:
        raise click.ClickException(str(error)) from None
    if save is not None:
        save.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
