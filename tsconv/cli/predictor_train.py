"""`tsconv predictor train`: parses options, calls tsconv.commands.predictor_train, prints what came out."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from tsconv.cli.options import Rank, Size, target_miss_option, threads_option
from tsconv.cli.output import echo, json_text, say
from tsconv.cli.text import size, table

if TYPE_CHECKING:
    from tsconv.commands.predictor_train import TrainResult
    from tsconv.predictor.train.calibrate import Figures

HEAD = ("layer", "expert", "rank", "bytes", "missed", "recall", "precision", "predicted/active", "predicted")


@click.command("train")
@click.argument("model")
@click.option(
    "--calib",
    metavar="TEXT",
    default="builtin",
    show_default=True,
    help="Text to train on: builtin, fineweb, a dataset on the Hub (OWNER/NAME[:CONFIG][@REVISION]), a .txt, .jsonl or "
    ".parquet file, or a folder of them.",
)
@click.option("--tokens", metavar="N", default="400k", show_default=True, help="How many to take of it: 50k, 1M, ...")
@click.option("--chunk", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens computed together.")
@click.option("--text-field", metavar="NAME", help="Column or field that holds the text.  [default: text]")
@click.option(
    "--rank",
    type=Rank(auto=True),
    metavar="auto|R",
    default="auto",
    show_default=True,
    help="Of the predictors' hidden layer. auto: each layer's own, after short trainings at several.",
)
@click.option("--budget", type=Size(), metavar="SIZE", help="Most that all predictors may take, with --rank auto.")
@target_miss_option
@click.option("--outtype", metavar="TYPE", help="Type of the predictors.  [default: as tsconv convert chooses it]")
@click.option("--refresh", is_flag=True, help="Begin with the predictors that the model has.")
@click.option(
    "--predictor",
    "predictor_path",
    metavar="FILE",
    help="Those of --refresh.  [default: NAME.predictor.gguf beside the model]",
)
@click.option("--out", metavar="FILE", help="Sidecar to write.  [default: NAME.predictor.gguf beside MODEL]")
@click.option("--epochs", type=click.IntRange(min=2), help="Passes through the text at most.  [default: 4 to 24]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all that is drawn.")
@click.option("--device", metavar="NAME", default="cpu", show_default=True, help="Where torch computes: cpu, cuda, ...")
@click.option("--work", metavar="DIR", help="Folder for what is not ready yet.  [default: OUT.work]")
@click.option("--disk", type=Size(), metavar="SIZE", default="20GiB", show_default=True, help="Most for samples there.")
@threads_option
@click.option("--force", is_flag=True, help="Replace an existing sidecar.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(*, model: str, tokens: str, as_json: bool, **options: Any) -> None:
    """Train the predictors of MODEL on a text, and write them as a sidecar of it.

    Ctrl-C or a crash loses nothing: the same command goes on where it was, and ends with the same file.
    """
    from tsconv.commands.predictor_train import train
    from tsconv.stats.text.chunks import parse_count

    with _progress() as count:
        result = train(model, n_tokens=parse_count(tokens), tell=say, count=count, **options)
    for note in result.notes:
        say(f"note: {note}")
    echo(json_text(_as_dict(result), indent=2) if as_json else _text(result, model))


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """What is being done and how far it is, on stderr, when that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from tqdm import tqdm

    with tqdm(leave=False, dynamic_ncols=True) as bar:

        def show(what: str, done: int, total: int) -> None:
            if bar.desc != f"{what}: ":
                bar.reset(total)
                bar.set_description(what)
            bar.update(done - bar.n)

        yield show


def _figures(figures: Figures) -> dict[str, Any]:
    return vars(figures) | {"recall": figures.recall, "precision": figures.precision}


def _as_dict(result: TrainResult) -> dict[str, Any]:
    layers = [
        {
            "layer": layer.layer,
            "rank": layer.rank,
            "bytes": layer.n_bytes,
            "epochs": layer.epochs,
            "seconds": layer.seconds,
            "experts": [_figures(figures) for figures in layer.experts],
        }
        | _figures(layer.figures)
        for layer in result.layers
    ]
    return vars(result) | {"outfile": str(result.outfile), "layers": layers}


def _text(result: TrainResult, model: str) -> str:
    rows: list[tuple[str, ...]] = [HEAD]
    for layer in result.layers:
        rows.append((str(layer.layer), "", str(layer.rank), f"{layer.n_bytes:,}", *_cells(layer.figures)))
        rows += [("", str(e), "", "", *_cells(figures)) for e, figures in enumerate(layer.experts)]
    return "\n".join(
        [
            table(rows, right=tuple(range(len(HEAD)))),
            f"{result.outfile}: {size(result.n_bytes)}, {result.type_fc1} and {result.type_fc2}, trained on"
            f" {result.n_tokens:,} tokens in {result.seconds:.0f} s",
            f"next: tsconv eval kld -m {shlex.quote(model)} --predictor {shlex.quote(str(result.outfile))} ...",
        ]
    )


def _cells(f: Figures) -> tuple[str, ...]:
    ratio = f"{f.predicted / f.active:.3f}" if f.active else "-"
    cells = (f"{f.missed:.3%}", f"{f.recall:.2%}", f"{f.precision:.2%}", ratio, f"{f.predicted:.1f}")
    return tuple(cell.replace("nan%", "-") for cell in cells)
