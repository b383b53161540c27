"""`tsconv eval ppl`, of which `tsconv perplexity` is another name: what a conversion costs in quality."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any

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
    warn_of_long_context,
)
from tsconv.cli.output import echo, json_text


@click.command("ppl")
@model_option
@text_option("Text to predict")
@click.option(
    "--method",
    type=click.Choice(["half", "all"]),
    help="half: llama-perplexity's, which scores the second half of each window. all: scores every token.  "
    "[default: half; all with --baseline]",
)
@click.option(
    "--baseline",
    metavar="FILE",
    help="With --method all: another conversion of the same checkpoint, f32 say, to diverge from.",
)
@click.option(
    "--save-base",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write the log probabilities for tsconv eval kld or llama-perplexity --kl-divergence.",
)
@eval_options
@threads_option
@sparsity_option
@predictor_option
@gpu_options
@ram_budget_option
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(
    *,
    model: str,
    text: str,
    method: str | None,
    baseline: str | None,
    save_base: Path | None,
    n_ctx: int | None,
    n_batch: int,
    **options: Any,
) -> None:
    """Measure perplexity on a text: llama-perplexity's figures, with its error.

    tsconv eval kld measures the divergence from another model.
    """
    n_ctx = n_ctx or DEFAULT_WINDOW
    method = method or ("all" if baseline else "half")
    if method == "half" and baseline is not None:
        raise click.UsageError("--baseline goes with --method all; tsconv eval kld compares as llama-perplexity does.")
    if method == "all" and save_base is not None:
        raise click.UsageError("--save-base goes with --method half.")
    if method == "all":
        _all_tokens(model, text, baseline, n_ctx, **options)
    else:
        _second_halves(model, text, save_base, n_ctx, n_batch, **options)


def _second_halves(
    model: str,
    text: str,
    save_base: Path | None,
    n_ctx: int,
    n_batch: int,
    *,
    chunks: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    from tsconv.eval.base_file import BaseWriter
    from tsconv.eval.ppl import measure_ppl
    from tsconv.eval.windows import windows
    from tsconv.runtime.model import load

    data = read_text(text)
    with contextlib.ExitStack() as stack:
        found = stack.enter_context(contextlib.closing(load(model, n_ctx=256, **options)))
        if found.budget is not None:
            say_budget(found.budget)
        texts = windows(found, data, n_ctx, chunks)
        warn_of_long_context(found, n_ctx)
        base = None if save_base is None else stack.enter_context(BaseWriter(save_base, texts, found.n_vocab()))
        show = (lambda n, so_far: None) if as_json else (lambda n, so_far: echo(f"[{n}]{so_far:.4f},", nl=False))
        result = measure_ppl(found, texts, n_batch=n_batch, base=base, progress=show)
    speed = result.n_windows * n_ctx / result.seconds
    if as_json:
        echo(json_text({"model": model} | dataclasses.asdict(result) | {"tokens_per_s": speed}))
        return
    echo()
    echo(f"Final estimate: PPL = {result.perplexity:.4f} +/- {result.error:.5f}")
    echo(f"neurons: {result.predicted:.1%} predicted, {result.active:.1%} active; {speed:.1f} tokens/s")


def _all_tokens(
    model: str,
    text: str,
    baseline: str | None,
    n_ctx: int,
    *,
    chunks: int | None,
    as_json: bool,
    predictor_path: str | None,
    **options: Any,
) -> None:
    from tqdm import tqdm

    from tsconv.eval.perplexity import check_baseline, measure, pieces
    from tsconv.format.pair import read_model
    from tsconv.runtime.model import load

    mine, theirs = (read_model(Path(model)), read_model(Path(baseline))) if baseline else (None, None)
    if mine and theirs:
        check_baseline(mine, theirs)
    options |= {"n_ctx": n_ctx}
    data = read_text(text)
    found = load(model, predictor_path=predictor_path, header=mine, **options)
    other = load(baseline, header=theirs, **options) if baseline else None
    if found.budget is not None:
        say_budget(found.budget)
    sequences = pieces(found, data, n_ctx)[:chunks]
    warn_of_long_context(found, n_ctx)
    with tqdm(total=len(sequences), disable=not sys.stderr.isatty(), leave=False, unit="piece") as bar:
        quality = measure(found, sequences, other, lambda done, _: bar.update(done - bar.n))
    if as_json:
        echo(json_text({"model": model, "baseline": baseline, "n_ctx": n_ctx} | dataclasses.asdict(quality)))
        return
    echo(f"perplexity  {quality.perplexity:.4f} over {quality.n_tokens} tokens in pieces of {n_ctx}")
    if quality.kl is not None and quality.same_top is not None:
        echo(f"KL          {quality.kl:.6f} nats from {baseline}")
        echo(f"same top    {quality.same_top:.2%} of the tokens")
    echo(f"neurons     {quality.predicted:.1%} predicted, {quality.active:.1%} active")
