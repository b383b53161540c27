"""`tsconv bench`: speed beside dense baselines on the same machine in the same session."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from tsconv.cli.options import Rank, gpu_options, ram_budget_option
from tsconv.cli.output import echo, say

if TYPE_CHECKING:
    from tsconv.bench.compare import Row

FORMATS = ("md", "json", "jsonl", "csv")
# What a suite decides itself.
OF_ONE_MODEL = (
    "model",
    "shape",
    "layers",
    "outtype",
    "predictor_outtype",
    "predictor_rank",
    "active",
    "tests",
    "repetitions",
)


@click.command("bench")
@click.option("-m", "--model", metavar="FILE", help="Converted model.  [default: generate one of --shape]")
@click.option(
    "--shape",
    type=click.Choice(["turbosparse-mistral-7b", "turbosparse-mixtral-47b"]),
    default="turbosparse-mistral-7b",
    show_default=True,
    help="Shape of the generated model.",
)
@click.option("--layers", type=click.IntRange(1, 32), help="Layers of it.  [default: all]")
@click.option("--outtype", metavar="TYPE", default="q4_0", show_default=True, help="Type of its weights.")
@click.option("--predictor-outtype", metavar="TYPE", help="Type of its predictor.  [default: as tsconv convert]")
@click.option(
    "--predictor-rank",
    type=Rank(),
    metavar="R",
    help="Rank of its predictor, as one that was trained may have.  [default: as published]",
)
@click.option(
    "--active",
    type=click.FloatRange(0, 0.8, min_open=True, max_open=True),
    help="Mean share of its neurons (of each routed expert's) that a token activates.  [default: as published]",
)
@click.option(
    "--test",
    "tests",
    metavar="ppN|tgN|tgNxB",
    multiple=True,
    help="Prefill or decode N tokens; decode B sequences together. May be repeated.  [default: pp512 tg128]",
)
@click.option("-r", "--repetitions", type=click.IntRange(min=1), default=3, show_default=True, help="Turns counted.")
@click.option(
    "--suite",
    type=click.Choice(["full", "quick"]),
    help="Several generated models instead of one: 10 minutes or 2 on two cores, as large as memory allows.",
)
@click.option(
    "--baseline",
    type=click.Choice(["llama.cpp", "dense-drelu", "llama.cpp-norepack"]),
    default="llama.cpp",
    show_default=True,
    help="dense-drelu: also beside the same weights in this backend with nothing predicted or skipped."
    " llama.cpp-norepack: instead, both without the weights that llama.cpp rearranges for its AMX and other kernels;"
    " TSFFN_ISA limits this backend's.",
)
@click.option(
    "-t",
    "--threads",
    metavar="N[,N...]",
    help="Each number in turn.  [default: physical cores, as far as the CPU quota goes]",
)
@click.option(
    "--clients",
    metavar="N[,N...]",
    help="Instead of tests: llama-server with so many clients at once, beside llama-server dense.",
)
@gpu_options
@ram_budget_option
@click.option("-o", "--output", type=click.Choice(FORMATS), default="md", show_default=True, help="Format.")
@click.option("--save", metavar="FILE", type=click.Path(path_type=Path), help="Write the result there too, as JSON.")
@click.option("--compare", metavar="OLD.json", type=click.Path(path_type=Path), help="Print the change since OLD.json.")
@click.pass_context
def command(
    ctx: click.Context,
    *,
    model: str | None,
    shape: str,
    layers: int | None,
    outtype: str,
    predictor_outtype: str | None,
    predictor_rank: int | None,
    active: float | None,
    tests: tuple[str, ...],
    repetitions: int,
    suite: str | None,
    baseline: str,
    threads: str | None,
    clients: str | None,
    ram_budget: str,
    output: str,
    save: Path | None,
    compare: Path | None,
    **wanted: Any,
) -> None:
    """Measure prefill and decoding beside stock llama.cpp computing the same shape and types densely.

    All engines run in turn. Generated models are kept in the cache folder. With a GPU the baseline is the faster of
    llama.cpp -ngl N and -ngl 99 with FFNs on the CPU, each with as much as fits in the same memory.
    """
    from tsconv.bench.clients import ClientsRow, measure_clients
    from tsconv.bench.compare import DENSE_DRELU, STOCK
    from tsconv.bench.compare import compare as measure
    from tsconv.bench.generate import PRESETS, generated
    from tsconv.bench.gpu import NO_GPU
    from tsconv.bench.suite import run_suite
    from tsconv.bench.workload import parse_counts, parse_workload
    from tsconv.cli.bench_table import changes, formatted, read_results
    from tsconv.runtime.offload import Wanted
    from tsconv.runtime.streaming import parse_budget
    from tsconv.write.writer import check_output, write_file

    given = [name for name in OF_ONE_MODEL if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT]
    if suite and given:
        option = next(parameter.opts[-1] for parameter in command.params if parameter.name == given[0])
        raise click.UsageError(f"--suite decides about {option} itself.")
    if clients is not None and (suite or tests or baseline != STOCK):
        raise click.UsageError("--clients goes with one model, without --test and --baseline.")
    if baseline != STOCK and wanted["n_gpu_layers"] not in ("auto", 0):
        raise click.UsageError(f"-ngl goes with --baseline {STOCK} only.")
    workloads = list(dict.fromkeys(map(parse_workload, tests or ("pp512", "tg128"))))
    n_threads = parse_counts(threads) if threads is not None else None
    gpu = Wanted(**wanted) if baseline == STOCK else NO_GPU
    baselines = (STOCK, DENSE_DRELU) if baseline == DENSE_DRELU else (baseline,)
    old = read_results(compare) if compare is not None else {}
    if save is not None:
        check_output(save, force=True)

    parse_budget(ram_budget)
    os.environ["TSCONV_RAM_BUDGET"] = ram_budget  # of the workers
    progress = say if sys.stderr.isatty() else lambda line: None
    parts: Iterator[Sequence[Row] | Sequence[ClientsRow]]
    if suite:
        parts = run_suite(suite, baselines=baselines, n_threads=n_threads, gpu=gpu, say=say, progress=progress)
    else:
        n_layer = layers or PRESETS[shape].n_layer
        wished: dict[str, Any] = {"predictor_outtype": predictor_outtype, "rank": predictor_rank, "active": active}
        path = Path(model) if model else generated(shape, n_layer, outtype, say, **wished)
        options: dict[str, Any] = {"repetitions": repetitions, "gpu": gpu, "progress": progress}
        if clients is None:
            parts = iter([measure(path, workloads, baselines=baselines, n_threads=n_threads, **options)])
        else:
            most = max(n_threads) if n_threads else None
            parts = iter([measure_clients(path, parse_counts(clients, "clients"), n_threads=most, **options)])
    rows: list[Any] = []
    try:
        for part in parts:
            rows += part
            if save is not None:
                write_file(save, formatted(rows, "json").encode(), force=True)
    finally:  # what was measured is not lost when a later model fails
        if rows:
            echo(formatted(rows, output), nl=False)
    for line in changes(rows, old) if clients is None else []:
        say(line)
