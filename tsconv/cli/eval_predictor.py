"""`tsconv eval predictor`: how good a model's predictors are on a text."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import click

from tsconv.cli.options import (
    DEFAULT_WINDOW,
    gpu_options,
    model_option,
    predictor_option,
    read_text,
    text_option,
    threads_option,
)
from tsconv.cli.output import echo, json_text
from tsconv.cli.text import table

if TYPE_CHECKING:
    from tsconv.eval.predictor import Sums

HEAD = ("layer", "expert", "recall", "precision", "energy missed", "predicted", "active", "predicted/active")


@click.command("predictor")
@model_option
@text_option("Text to run the model on")
@click.option(
    "-c",
    "--ctx-size",
    "n_ctx",
    type=click.IntRange(min=4),
    default=DEFAULT_WINDOW,
    show_default=True,
    help="Tokens of a window.",
)
@click.option("--chunks", type=click.IntRange(min=1), help="At most so many windows.  [default: all]")
@threads_option
@predictor_option
@gpu_options
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(*, model: str, text: str, n_ctx: int, chunks: int | None, as_json: bool, **options: Any) -> None:
    """Measure what the predictors miss, and what they compute for nothing, in each layer and expert.

    Energy missed is the share of the output's energy, the sum of (h |down row|)^2, that the left out neurons would have
    added.
    """
    from tqdm import tqdm

    from tsconv.eval.predictor import measure_predictor
    from tsconv.eval.windows import windows
    from tsconv.runtime.model import load

    data = read_text(text)
    with contextlib.closing(load(model, sparsity="predictor", n_ctx=1, n_batch=1, **options)) as found:
        texts = windows(found, data, n_ctx, chunks)
        with tqdm(total=len(texts), disable=not sys.stderr.isatty(), leave=False, unit="window") as bar:
            sums = measure_predictor(found, texts, lambda n: bar.update(n - bar.n))
    if as_json:
        about = {"model": model, "text": text, "n_ctx": n_ctx, "n_tokens": int(texts.tokens.size)}
        echo(json_text(about | sums.total().figures() | {"layers": _layers(sums)}))
        return
    echo(table([HEAD, *_rows(sums)], right=tuple(range(len(HEAD)))))


def _layers(sums: Sums) -> list[dict[str, Any]]:
    n_layer, n_ffn = sums.tokens.shape
    return [
        {"layer": n}
        | sums.at(n).total().figures()
        | {"experts": [{"tokens": int(sums.tokens[n, e])} | sums.at(n, e).figures() for e in range(n_ffn)]}
        for n in range(n_layer)
    ]


def _rows(sums: Sums) -> list[tuple[str, ...]]:
    """A row for each layer, and for each of its experts where there are several; all of them at the end."""
    n_layer, n_ffn = sums.tokens.shape
    rows = []
    for n in range(n_layer):
        rows.append(_row(str(n), "", sums.at(n).total()))
        if n_ffn > 1:
            rows += [_row("", str(e), sums.at(n, e)) for e in range(n_ffn)]
    return [*rows, _row("all", "", sums.total())]


def _row(layer: str, expert: str, sums: Sums) -> tuple[str, ...]:
    f = sums.figures()
    names = ("recall", "precision", "energy_missed", "predicted", "active")
    cells = [f"{100 * f[name]:.{4 if name == 'energy_missed' else 2}f}%" for name in names]
    cells.append(f"{f['predicted_per_active']:.3f}")
    return (layer, expert, *(cell.replace("nan%", "-").replace("nan", "-") for cell in cells))
