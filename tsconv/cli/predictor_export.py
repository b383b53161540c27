"""`tsconv predictor export`: parses options, calls tsconv.commands.predictor_export, prints what came out."""

from __future__ import annotations

import click

from tsconv.cli.output import echo, json_text


@click.command("export")
@click.argument("sidecar")
@click.option("--out", metavar="DIR", required=True, help="Folder to write.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(*, sidecar: str, out: str, as_json: bool) -> None:
    """Write the predictors of SIDECAR, NAME.predictor.gguf, as model_N.pt files, the layout of PowerInfer.

    tsconv convert --predictor DIR reads such folders.
    """
    from tsconv.commands.predictor_export import export

    files = export(sidecar, out)
    echo(json_text({"out": out, "files": [file.name for file in files]}) if as_json else f"{out}: {len(files)} layers")
