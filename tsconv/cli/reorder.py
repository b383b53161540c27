"""`tsconv reorder`: parses options, calls tsconv.commands.reorder.reorder, prints what it did."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tsconv.cli.options import profile_option
from tsconv.cli.output import echo, json_text, progress_bar, say
from tsconv.cli.text import size, table

if TYPE_CHECKING:
    from tsconv.commands.reorder import ReorderResult


@click.command("reorder")
@click.argument("model", type=click.Path(path_type=Path))
@profile_option
@click.option(
    "--outfile",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Model to write.  [default: NAME-hot.gguf beside MODEL]",
)
@click.option("--force", is_flag=True, help="Replace existing outputs.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(model: Path, profile: Path, outfile: Path | None, force: bool, as_json: bool) -> None:
    """Write MODEL and its sidecar again with the neurons that STATS found hottest first.

    The function stays, and every weight's bytes: only the rows change places.
    """
    from tsconv.commands.reorder import reorder

    with progress_bar("reordering") as progress:
        result = reorder(model, profile, outfile, force=force, progress=progress)
    for note in result.notes:
        say(f"note: {note}")
    echo(json_text(dataclasses.asdict(result), indent=2) if as_json else _summary(result))


def _summary(result: ReorderResult) -> str:
    files = [("model", str(result.model), size(result.model_bytes))]
    if result.sidecar is not None:
        files.append(("sidecar", str(result.sidecar), size(result.sidecar_bytes)))
    return (
        f"{table(files, right=(2,))}\n"
        f"hottest neurons first, sparsity {result.sparsity}, by {result.profile}\n"
        f"next: tsconv run -m {shlex.quote(str(result.model))}"
    )
