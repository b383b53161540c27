"""`tsconv eval sweep`: what sparsity costs in quality and gives in speed."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tsconv.cli.models import ModelName, model_name
from tsconv.cli.options import (
    DEFAULT_WINDOW,
    eval_options,
    gpu_options,
    predictor_option,
    ram_budget_option,
    read_text,
    text_option,
    threads_option,
)
from tsconv.cli.output import echo, json_text, say
from tsconv.cli.text import table
from tsconv.signals import sigterm_exits

if TYPE_CHECKING:
    from tsconv.eval.sweep.measure import Progress
    from tsconv.eval.sweep.points import Point

INTERRUPTED = 128 + signal.SIGINT


class Numbers(click.ParamType):
    """'0,0.5,0.9': texts that are numbers with commas in between."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        found = tuple(part.strip() for part in value.split(","))
        return found if found != ("",) else ()


@click.command("sweep")
@model_name
@text_option("Text to predict")
@click.option(
    "--sparsity",
    "topk",
    type=Numbers(),
    metavar="S,S,...",
    help="Shares of each token's neurons to drop, those with the smallest |gate * up|, from 0 to below 1."
    "  [default: 0,0.5,0.7,0.8,0.85,0.9,0.925,0.95,0.975,0.99]",
)
@click.option(
    "--threshold",
    "thresholds",
    type=Numbers(),
    default="",
    metavar="D,D,...",
    help="Numbers to add to the predictor's threshold: more drop more neurons.  [default: none but 0]",
)
@eval_options
@click.option(
    "--points",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Where points are kept: a sweep that was stopped continues.  [default: NAME.sweep.json beside MODEL]",
)
@click.option("--csv", "csv_file", metavar="FILE", type=click.Path(path_type=Path), help="Write the table there.")
@click.option("--plot", metavar="FILE", type=click.Path(path_type=Path), help="Draw it there: .png or .svg.")
@click.option(
    "--report", metavar="DIR", type=click.Path(path_type=Path), help="Write figures and a page of them there."
)
@threads_option
@predictor_option
@gpu_options
@ram_budget_option
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(
    *,
    model: ModelName,
    text: str,
    topk: tuple[str, ...] | None,
    thresholds: tuple[str, ...],
    n_ctx: int | None,
    chunks: int | None,
    n_batch: int,
    points: Path | None,
    csv_file: Path | None,
    plot: Path | None,
    report: Path | None,
    as_json: bool,
    **loading: Any,
) -> None:
    """Measure perplexity, KL divergence from exact sparsity and speed at many sparsities.

    A row is exact sparsity, the neurons that top-k keeps, or those of the model's predictor. Top-k computes gate and up
    of all neurons to choose among them: its speed is the price of measuring, not what such a sparsity gives.

    Points are kept while they are measured. The same command continues after Ctrl-C.
    """
    from tsconv.eval.sweep.file import SUFFIX, identity_of, open_file
    from tsconv.eval.sweep.measure import sweep
    from tsconv.eval.sweep.points import DEFAULT_TOPK, in_order, wanted_sparsities
    from tsconv.format.pair import has_predictor, read_model
    from tsconv.runtime.binding import open_model

    path = Path(model.find())
    header = read_model(path)
    sidecar = None if loading["predictor_path"] is None else Path(loading["predictor_path"])
    predicts = sidecar is not None or has_predictor(header)
    wanted = wanted_sparsities(DEFAULT_TOPK if topk is None else topk, thresholds, predicts)
    for sparsity in wanted:  # before anything is computed
        open_model(path, sidecar, sparsity, header).close()
    _check_outputs(csv_file, plot, report)
    data = read_text(text)
    identity = identity_of(header, data, n_ctx or DEFAULT_WINDOW, chunks, n_batch)
    kept = open_file(points or path.with_suffix(SUFFIX), identity)
    if there := kept.points.keys() & set(wanted):
        say(f"{kept.path}: {len(there)} of {len(wanted)} points are there already")
    try:
        with sigterm_exits(), _progress() as progress:
            sweep(path, data, wanted, kept, progress=progress, say=say, header=header, **loading)
    except KeyboardInterrupt:
        say(f"stopped; the same command continues from {kept.path}")
        raise click.exceptions.Exit(INTERRUPTED) from None
    found = in_order(kept.points[sparsity] for sparsity in wanted)
    _write(found, identity, text, csv_file, plot, report)
    if as_json:
        echo(json_text(identity | {"points": [point.as_dict() for point in found]}))
    else:
        _print(found)


def _check_outputs(csv_file: Path | None, plot: Path | None, report: Path | None) -> None:
    """Before hours of computing. Raises OutputError."""
    from tsconv.eval.sweep.page import check_report
    from tsconv.extras import require
    from tsconv.write.writer import check_output

    for path in (csv_file, plot):
        if path is not None:
            check_output(path, force=True)
    if plot is not None:
        require("matplotlib", "a plot")
        if plot.suffix not in (".png", ".svg"):
            raise click.BadParameter(f"{plot} ends neither in .png nor in .svg.", param_hint="--plot")
    if report is not None:
        check_report(report)


def _write(
    points: list[Point],
    identity: dict[str, Any],
    text: str,
    csv_file: Path | None,
    plot: Path | None,
    report: Path | None,
) -> None:
    """Raises OutputError."""
    from tsconv.eval.sweep.page import write_plot, write_sweep_report
    from tsconv.eval.sweep.points import as_csv
    from tsconv.write.writer import write_file

    if csv_file is not None:
        write_file(csv_file, as_csv(points).encode(), force=True)
    if plot is not None:
        write_plot(points, plot)
    if report is not None:
        write_sweep_report(points, identity, text, report)


@contextmanager
def _progress() -> Iterator[Progress]:
    """Windows of the point that is measured, on stderr, when that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda sparsity, done, total: None
        return
    from tqdm import tqdm

    with tqdm(unit=" windows", dynamic_ncols=True, leave=False) as bar:

        def show(sparsity: str, done: int, total: int) -> None:
            if bar.total != total or done <= bar.n:
                bar.reset(total)
            bar.set_description(sparsity, refresh=False)
            bar.update(done - bar.n)

        yield show


def _print(points: list[Point]) -> None:
    from tsconv.eval.sweep.points import HEADER, cells

    rows = [HEADER, *(cells(point) for point in points)]
    echo(table(rows, right=tuple(range(1, len(HEADER)))))
