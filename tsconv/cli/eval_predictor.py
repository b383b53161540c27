"""`tsconv eval predictor`: how good a model's predictors are on a text."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tsconv.cli.options import DEFAULT_WINDOW, gpu_options, model_option, read_text, text_option, threads_option
from tsconv.cli.output import echo, json_text
from tsconv.cli.text import table

if TYPE_CHECKING:
    from tsconv.eval.predictor import Sums

FIGURES = ("recall", "precision", "energy missed", "predicted", "active", "predicted/active")
HEAD = ("layer", "expert", *FIGURES)
HEAD_OF_SEVERAL = ("predictor", *FIGURES, "its MB a token", "FFN MB a token")


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
@click.option(
    "--predictor",
    "predictors",
    metavar="FILE",
    multiple=True,
    help="Predictor sidecar of the model; several are compared.  [default: NAME.predictor.gguf beside it]",
)
@gpu_options
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(
    *, model: str, text: str, n_ctx: int, chunks: int | None, predictors: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """Measure what the predictors miss, and what they compute for nothing, in each layer and expert.

    Energy missed is the share of the output's energy, the sum of (h |down row|)^2, that the left out neurons would have
    added. Several --predictor are compared, a line for each.
    """
    data = read_text(text)
    measured = [_measure(model, data, n_ctx, chunks, path, options) for path in predictors or (None,)]
    if as_json:
        about = {"model": model, "text": text, "n_ctx": n_ctx, "n_tokens": measured[0][1]["n_tokens"]}
        found = [figures | {"layers": _layers(sums)} for sums, figures in measured]
        echo(json_text(about | (found[0] if len(found) == 1 else {"predictors": found})))
        return
    if len(measured) == 1:
        echo(table([HEAD, *_rows(measured[0][0])], right=tuple(range(len(HEAD)))))
        return
    rows = [
        (
            str(figures["predictor"]),
            *_cells(sums.total()),
            f"{figures['bytes_predictor'] / 1e6:.3f}",
            f"{figures['bytes_ffn'] / 1e6:.3f}",
        )
        for sums, figures in measured
    ]
    echo(table([HEAD_OF_SEVERAL, *rows], right=tuple(range(1, len(HEAD_OF_SEVERAL)))))


def _measure(
    model: str, data: bytes, n_ctx: int, chunks: int | None, predictor: str | None, options: dict[str, Any]
) -> tuple[Sums, dict[str, Any]]:
    """The sums of one sidecar, and what is said of all of them together."""
    from tqdm import tqdm

    from tsconv.eval.predictor import bytes_per_token, measure_predictor
    from tsconv.eval.windows import windows
    from tsconv.format.header import read_header
    from tsconv.format.pair import sidecar_path
    from tsconv.runtime.model import load

    sidecar = sidecar_path(Path(model)) if predictor is None else Path(predictor)
    loading = options | {"predictor_path": predictor}
    with contextlib.closing(load(model, sparsity="predictor", n_ctx=1, n_batch=1, **loading)) as found:
        texts = windows(found, data, n_ctx, chunks)
        with tqdm(total=len(texts), disable=not sys.stderr.isatty(), leave=False, unit="window") as bar:
            sums = measure_predictor(found, texts, lambda n: bar.update(n - bar.n))
        of_predictor, of_ffn = bytes_per_token(found.header, read_header(sidecar), sums)
    about = {"predictor": str(sidecar), "n_tokens": int(texts.tokens.size)} | sums.total().figures()
    return sums, about | {"bytes_predictor": of_predictor, "bytes_ffn": of_ffn}


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
        rows.append((str(n), "", *_cells(sums.at(n).total())))
        if n_ffn > 1:
            rows += [("", str(e), *_cells(sums.at(n, e))) for e in range(n_ffn)]
    return [*rows, ("all", "", *_cells(sums.total()))]


def _cells(sums: Sums) -> tuple[str, ...]:
    f = sums.figures()
    names = ("recall", "precision", "energy_missed", "predicted", "active")
    cells = [f"{100 * f[name]:.{4 if name == 'energy_missed' else 2}f}%" for name in names]
    cells.append(f"{f['predicted_per_active']:.3f}")
    return tuple(cell.replace("nan%", "-").replace("nan", "-") for cell in cells)
