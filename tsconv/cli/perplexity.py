"""`tsconv perplexity`: what a conversion costs in quality."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from tsconv.cli.options import (
    gpu_options,
    model_option,
    predictor_option,
    sparsity_option,
    threads_option,
    warn_of_long_context,
)
from tsconv.cli.output import echo, json_text


@click.command("perplexity")
@model_option
@click.option(
    "-f",
    "--file",
    "text",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text to predict.",
)
@click.option("--baseline", metavar="FILE", help="Another conversion of the same checkpoint, f32 say, to diverge from.")
@click.option("-c", "--ctx-size", "n_ctx", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens.")
@click.option("--chunks", type=click.IntRange(min=1), help="At most so many pieces of the text.  [default: all]")
@threads_option
@sparsity_option
@predictor_option
@gpu_options
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(
    *,
    model: str,
    text: Path,
    baseline: str | None,
    n_ctx: int,
    chunks: int | None,
    n_threads: int | None,
    sparsity: str | None,
    predictor_path: str | None,
    as_json: bool,
    **gpu: Any,
) -> None:
    """Measure perplexity on a text, and the KL divergence from another conversion."""
    from tqdm import tqdm

    from tsconv.eval.perplexity import check_baseline, measure, pieces
    from tsconv.format.pair import read_model
    from tsconv.runtime.model import load

    mine, theirs = (read_model(Path(model)), read_model(Path(baseline))) if baseline else (None, None)
    if mine and theirs:
        check_baseline(mine, theirs)
    options = {"n_ctx": n_ctx, "n_threads": n_threads, "sparsity": sparsity, **gpu}
    found = load(model, predictor_path=predictor_path, header=mine, **options)
    other = load(baseline, header=theirs, **options) if baseline else None
    sequences = pieces(found, text.read_bytes(), n_ctx)[:chunks]
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
