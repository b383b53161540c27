"""`tsconv eval tasks`: downstream tasks of lm-evaluation-harness."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tsconv.cli.machine import say_budget
from tsconv.cli.options import (
    gpu_options,
    predictor_option,
    ram_budget_option,
    sparsity_option,
    threads_option,
    warn_of_long_context,
)
from tsconv.cli.output import echo, json_text, say

if TYPE_CHECKING:
    from tsconv.eval.tasks import Score, TaskResult

WIDTHS = (32, 6, 22, 16, 18, 8, 9)
HEAD = ("task", "shots", "metric", "filter", "value", "active", "tokens/s")


@click.command("tasks")
@click.option("-m", "--model", metavar="FILE", help="Converted model, NAME.gguf.")
@click.argument("names", metavar="TASK...", nargs=-1)
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Examples before each question.  [default: the task's]")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many questions of each task.")
@click.option(
    "--include-path",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder with tasks of your own, as lm_eval's YAML files.",
)
@click.option("--list", "listed", is_flag=True, help="List the tasks there are; TASK may then be a pattern: 'arc*'.")
@click.option(
    "-c",
    "--ctx-size",
    "n_ctx",
    type=click.IntRange(min=16),
    help="Most tokens of a text; longer ones lose their beginning.  [default: 4096, or what the model has]",
)
@click.option(
    "-b",
    "--batch-size",
    "n_batch",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help="Tokens computed together.",
)
@click.option(
    "-np",
    "--parallel",
    "n_seq",
    type=click.IntRange(1, 255),
    default=64,
    show_default=True,
    help="Most texts computed together.",
)
@click.option("--no-resume", is_flag=True, help="Forget the answers of a run that was interrupted.")
@threads_option
@sparsity_option
@predictor_option
@gpu_options
@ram_budget_option
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(
    *,
    model: str | None,
    names: tuple[str, ...],
    include_path: Path | None,
    num_fewshot: int | None,
    limit: int | None,
    listed: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure a model on tasks of lm-evaluation-harness.

    \b
    open-llm      ARC (25 examples), HellaSwag (10), MMLU (5), TruthfulQA, WinoGrande (5), GSM8K (8)
    commonsense   PIQA, SciQ, ARC easy, OpenBookQA
    or any task or group of lm_eval; names may be joined by commas

    An interrupted run continues where it was when it is started again.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # lm_eval's own bars; read when tqdm is imported
    from tsconv.eval.tasks import PRESETS, task_manager, wanted

    split = [name for argument in names for name in argument.split(",") if name]
    if listed:
        known = [*PRESETS, *task_manager(include_path).all_tasks]
        echo("\n".join(name for name in known if not split or any(fnmatch.fnmatch(name, p) for p in split)))
        return
    if model is None or not split:
        raise click.UsageError("A model (-m FILE) and a TASK are needed, or --list.")
    manager = task_manager(include_path, split)
    results = _run(model, wanted(split, manager, num_fewshot), manager, limit=limit, shows=not as_json, **options)
    if as_json:
        found = [dataclasses.asdict(r) | {"tokens_per_s": r.tokens_per_s} for r in results]
        echo(json_text({"model": model, "limit": limit, "tasks": [_without(r, "samples") for r in found]}, indent=2))


def _run(
    model: str,
    tasks: list[Any],
    manager: Any,
    *,
    limit: int | None,
    shows: bool,
    n_ctx: int | None,
    n_batch: int,
    n_seq: int,
    no_resume: bool,
    **options: Any,
) -> list[TaskResult]:
    """Prints each task's lines when it is done, if it `shows`. The answers are removed when all are."""
    from tsconv.eval.answers import Answers
    from tsconv.eval.harness import TsconvLM
    from tsconv.eval.tasks import answers_path, files_of, run_task
    from tsconv.runtime.model import load

    results = []
    with contextlib.ExitStack() as stack:
        llama = stack.enter_context(contextlib.closing(load(model, n_ctx=256, **options)))
        if llama.budget is not None:
            say_budget(llama.budget)
        predictor = options["predictor_path"]
        files = files_of(Path(model), None if predictor is None else Path(predictor), llama.sparsity)
        about = {"sparsity": [llama.sparsity, options["sparsity"]], "n_ctx": n_ctx, "gpu": llama.offload.n_gpu_layers}
        path = answers_path(about, files)
        if no_resume:
            Answers(path).close(remove=True)
        answers = Answers(path)
        stack.callback(answers.close)
        lm = stack.enter_context(
            contextlib.closing(TsconvLM(llama, n_ctx=n_ctx, n_batch=n_batch, n_seq=n_seq, answers=answers))
        )
        warn_of_long_context(llama, lm.max_length)
        say(f"every text begins with {lm.bos_text} (token {lm.prefix_token_id})")
        for task in tasks:
            result = run_task(lm, task, manager, limit=limit, known=lambda: answers.n_found)
            results.append(result)
            if result.n_known:
                rest = "active and tokens/s are of the others"
                say(f"note: {task.name}: {result.n_known} answers are from a run that was interrupted; {rest}")
            if shows:
                _show(result, first=len(results) == 1)
        answers.close(remove=True)
    return results


def _show(result: TaskResult, first: bool) -> None:
    """The lines of a task, or of a group without its members; `first`: below the names of the columns."""
    if first:
        echo(_line(HEAD))
    mine = [score for score in result.scores if score.task == result.name] or list(result.scores)
    active = "-" if result.active is None else f"{result.active:.1%}"
    speed = "-" if result.tokens_per_s is None else f"{result.tokens_per_s:.1f}"
    for score in mine:
        shots = "-" if score.n_shot is None else str(score.n_shot)
        echo(_line((score.task, shots, score.metric, score.filter, _value(score), active, speed)))


def _value(score: Score) -> str:
    return f"{score.value:.4f}" + (f" ± {score.error:.4f}" if score.error is not None else "")


def _line(cells: tuple[str, ...]) -> str:
    return " ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}
