"""`tsconv profile`: parses options, calls tsconv.commands.profile or measures this machine, prints what came out."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tsconv.cli.options import gpu_options, predictor_option, sparsity_option, threads_option
from tsconv.cli.output import echo, json_text, say
from tsconv.cli.text import table
from tsconv.signals import interruptible

if TYPE_CHECKING:
    from tsconv.commands.profile import ProfileResult


@click.command("profile")
@click.argument("model", required=False)
@click.option(
    "--calib",
    metavar="TEXT",
    help="Text to count on: builtin, fineweb, a dataset on the Hub (OWNER/NAME[:CONFIG][@REVISION]), a .txt, .jsonl or "
    ".parquet file, or a folder of them.",
)
@click.option("--tokens", metavar="N", default="1M", show_default=True, help="How many to count: 50k, 1M, ...")
@click.option("--chunk", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens computed together.")
@click.option("--seed", type=click.IntRange(min=0), help="Take the text in a random order.  [default: its own]")
@click.option("--text-field", metavar="NAME", help="Column or field that holds the text.  [default: text]")
@click.option("--outfile", metavar="FILE", help="Statistics to write.  [default: NAME.stats.gguf beside MODEL]")
@click.option("--merge", "merge_with", metavar="STATS", multiple=True, help="Statistics to add; may be repeated.")
@click.option("--report", metavar="DIR", help="Write figures and a page of them there.")
@click.option("--machine", metavar="FILE.toml", help="Measure this machine instead, and write its profile.")
@threads_option
@sparsity_option
@predictor_option
@gpu_options
@click.option("--force", is_flag=True, help="Replace existing outputs.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    *,
    model: str | None,
    calib: str | None,
    tokens: str,
    outfile: str | None,
    merge_with: tuple[str, ...],
    report: str | None,
    machine: str | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Count which neurons of MODEL are active on a text, or measure this machine.

    \b
    tsconv profile MODEL.gguf --calib fineweb            counts, and writes MODEL.stats.gguf
    tsconv profile --merge A --merge B --outfile SUM     adds up what was counted before
    tsconv profile --machine mine.toml                   measures this machine

    Ctrl-C ends the counting and writes what was counted.
    """
    if machine is not None:
        if model or calib or merge_with or outfile or report:
            raise click.UsageError("--machine measures this machine and takes no model and no text.")
        _measure(Path(machine), force, as_json)
        return
    if (model is None) != (calib is None) or (model is None and not merge_with):
        raise click.UsageError("A MODEL and a --calib text are needed, or --merge, or --machine.")

    from tsconv.commands.profile import merge, profile
    from tsconv.stats.text.chunks import parse_count

    if model is None or calib is None:  # neither is there
        if outfile is None:
            raise click.UsageError("--merge without a MODEL needs an --outfile.")
        result = merge(merge_with, outfile, report=report, force=force)
    else:
        n_tokens = parse_count(tokens)
        with _progress_bar(n_tokens) as progress, interruptible((signal.SIGINT, signal.SIGTERM)) as interrupted:
            result = profile(
                model,
                calib,
                outfile,
                n_tokens=n_tokens,
                merge_with=merge_with,
                report=report,
                force=force,
                progress=progress,
                should_stop=interrupted,
                **options,
            )
    for note in result.notes:
        say(f"note: {note}")
    echo(json_text(_as_dict(result), indent=2) if as_json else _text(result, model))
    if result.stopped is not None:
        say(f"stopped early: {result.stopped}")
        raise click.exceptions.Exit(result.stopped.exit_code)


@contextmanager
def _progress_bar(n_tokens: int) -> Iterator[Callable[[int], None] | None]:
    """Tokens, tokens/s and the time left on stderr, when that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=n_tokens, unit=" tokens", unit_scale=True, dynamic_ncols=True, desc="counting", leave=False) as bar:

        def show(done: int) -> None:
            bar.update(min(done, n_tokens) - bar.n)

        yield show


def _as_dict(result: ProfileResult) -> dict[str, Any]:
    from tsconv.report.summary import summarise_stats

    return {
        "outfile": str(result.outfile),
        "report": None if result.report is None else str(result.report),
        "n_tokens": result.n_tokens,
        "seconds": result.seconds,
        "tokens_per_s": result.n_tokens / result.seconds if result.seconds else None,
        "notes": result.notes,
        "stopped": None if result.stopped is None else str(result.stopped),
        "stats": summarise_stats(result.stats).as_dict(),
    }


def _text(result: ProfileResult, model: str | None) -> str:
    from tsconv.report.summary import overall
    from tsconv.stats.heat import described

    lines = []
    if result.seconds:
        lines.append(
            f"counted {result.n_tokens:,} tokens in {result.seconds:.1f} s"
            f" ({result.n_tokens / result.seconds:.0f} tokens/s)"
        )
    lines.append(f"{result.outfile}: {described(result.stats)}")
    total = overall(result.stats)
    percent = {
        "active": total.active,
        "predicted": total.predicted,
        "recall of the predictor": total.recall,
        "precision": total.precision,
    }
    lines.append(", ".join(f"{name} {value:.1%}" for name, value in percent.items() if value is not None))
    if result.report is not None:
        lines.append(f"report: {result.report}")
    shown = shlex.quote(str(result.outfile))
    lines.append(f"next: tsconv inspect {shown}")
    if model is not None:
        lines.append(f"      tsconv reorder {shlex.quote(model)} --profile {shown}")
    return "\n".join(lines)


def _measure(path: Path, force: bool, as_json: bool) -> None:
    import dataclasses

    from tsconv.machine.measure import measure_machine
    from tsconv.machine.profile import check_output, described, save_machine

    check_output(path, force)
    machine = measure_machine(path.stem, progress=say)
    save_machine(machine, path, force)
    if as_json:
        echo(json_text(dataclasses.asdict(machine), indent=2))
        return
    echo(table(described(machine)))
    echo(f"next: tsconv place MODEL.gguf --profile MODEL.stats.gguf --machine {shlex.quote(str(path))}")
