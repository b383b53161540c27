"""`tsconv eval kld`: how far a model is from another one."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tsconv.cli.machine import say_budget
from tsconv.cli.options import (
    DEFAULT_WINDOW,
    eval_options,
    gpu_options,
    model_option,
    predictor_option,
    ram_budget_option,
    read_text,
    sparsity_option,
    text_option,
    threads_option,
)
from tsconv.cli.output import echo, json_text, say

if TYPE_CHECKING:
    from tsconv.eval.kld import Divergence, Kld
    from tsconv.runtime.model import SparseLlama

HEAD = (
    "chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence"
    "              Δp RMS            Same top p"
)
FIELDS = (
    *("perplexity", "base_perplexity", "log_ratio", "ratio", "difference", "divergence"),
    *("probability_change", "rms_change", "same_top"),
)


@click.command("kld")
@model_option
@click.option(
    "--base",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Log probabilities of the base, of tsconv eval ppl --save-base or llama-perplexity --kl-divergence-base.",
)
@click.option("--baseline", metavar="FILE", help="Instead: the base itself, of the same checkpoint, and -f.")
@text_option("Text to predict, with --baseline", required=False)
@eval_options
@threads_option
@sparsity_option
@predictor_option
@ram_budget_option
@gpu_options
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(
    *,
    model: str,
    base: Path | None,
    baseline: str | None,
    text: str | None,
    n_ctx: int | None,
    chunks: int | None,
    n_batch: int,
    predictor_path: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure the KL divergence of a model from a base, and how the probabilities change.

    The base is a file of log probabilities, which holds its text too, or another model with a text. Threads, sparsity,
    GPUs and --ram-budget are for each of the models.
    """
    from tsconv.eval.base_file import BaseFile
    from tsconv.eval.kld import MIN_TOKENS, check_base, measure_kld, of_model, report
    from tsconv.eval.perplexity import check_baseline
    from tsconv.eval.windows import windows
    from tsconv.format.pair import read_model
    from tsconv.runtime.model import load

    if (base is None) == (baseline is None) or (baseline is None) != (text is None):
        raise click.UsageError("--base FILE is needed, or --baseline MODEL and -f TEXT.")
    if base is not None and n_ctx is not None:
        raise click.UsageError("--base decides about --ctx-size.")
    progress = (lambda n, so_far: None) if as_json else _show
    with contextlib.ExitStack() as stack:
        if base is not None:
            file = BaseFile(base)
            found = stack.enter_context(
                contextlib.closing(load(model, predictor_path=predictor_path, n_ctx=256, **options))
            )
            _say_budgets(found)
            check_base(found, file)
            texts = dataclasses.replace(file.windows, tokens=file.windows.tokens[:chunks])
            result = measure_kld(found, texts, file.log_probabilities(len(texts)), n_batch=n_batch, progress=progress)
        else:
            assert baseline is not None and text is not None
            mine, theirs = read_model(Path(model)), read_model(Path(baseline))
            check_baseline(mine, theirs)
            data = read_text(text)
            llama = load(model, predictor_path=predictor_path, header=mine, n_ctx=256, **options)
            found = stack.enter_context(contextlib.closing(llama))
            other = stack.enter_context(contextlib.closing(load(baseline, header=theirs, n_ctx=256, **options)))
            _say_budgets(found, other)
            texts = windows(found, data, n_ctx or DEFAULT_WINDOW, chunks)
            result = measure_kld(found, texts, of_model(other, texts, n_batch), n_batch=n_batch, progress=progress)
    if as_json:
        echo(json_text({"model": model, "base": str(base or baseline), "n_ctx": texts.n_ctx} | _as_dict(result)))
        return
    echo()
    echo(report(result), nl=False)
    if result.divergence.kld.n < MIN_TOKENS:
        say(f"note: statistics need {MIN_TOKENS} tokens at least: a longer text, or more --chunks")
    echo(f"neurons: {result.predicted:.1%} predicted, {result.active:.1%} active")


def _say_budgets(*models: SparseLlama) -> None:
    for llama in models:
        if llama.budget is not None:
            say_budget(llama.budget)


def _as_dict(result: Kld) -> dict[str, Any]:
    d = result.divergence
    values: dict[str, Any] = {"n_tokens": d.kld.n}
    for name in FIELDS:
        values[name], values[f"{name}_error"] = getattr(d, name)
    klds, changes = d.percentiles()
    return values | {
        "correlation": d.correlation,
        "divergence_percentiles": {str(q): value for q, value in klds.items()},
        "probability_change_percentiles": {str(q): value for q, value in changes.items()},
        "predicted": result.predicted,
        "active": result.active,
    }


def _show(n: int, d: Divergence) -> None:
    """A line of llama-perplexity's table."""
    if n == 1:
        echo(HEAD)
    parts = [f"{n:4d}"]
    for (value, error), shown in (
        (d.perplexity, "{:9.4f} ± {:9.4f}"),
        (d.log_ratio, "{:10.5f} ± {:10.5f}"),
        (d.divergence, "{:10.5f} ± {:10.5f}"),
    ):
        parts.append(shown.format(value, error))
    for value, error in (d.rms_change, d.same_top):
        parts.append(f"{100 * value:6.3f} ± {100 * error:6.3f} %")
    echo("    ".join(parts))
