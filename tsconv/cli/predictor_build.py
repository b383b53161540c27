"""`tsconv predictor build`: parses options, calls tsconv.commands.predictor_build, prints what came out."""

from __future__ import annotations

import sys
from typing import Any

import click

from tsconv.cli.options import target_miss_option, threads_option
from tsconv.cli.output import echo, json_text, say


@click.command("build")
@click.argument("model")
@click.option(
    "--kind",
    type=click.Choice(["sign", "quant", "svd"]),
    required=True,
    help="sign: the signs of gate and up. quant: the gate in a few bits. svd: the gate's approximation of a rank.",
)
@click.option("--out", metavar="FILE", help="Sidecar to write.  [default: NAME.predictor.gguf beside MODEL]")
@click.option(
    "--type",
    "type_",
    metavar="TYPE",
    help="quant: bits1, bits2 or a type of convert; svd: a type of convert.  [default: bits2; svd: q8_0]",
)
@click.option("--both", is_flag=True, help="quant: up beside gate, twice the bytes.")
@click.option("--rank", type=click.IntRange(min=1), help="svd: the rank, a multiple of 32.  [default: n_embd / 4]")
@click.option(
    "--input-bits",
    type=click.IntRange(1, 8),
    help="Bits of what sign, bits1 and bits2 are multiplied with; 1: signs.  [default: sign 1, quant 8]",
)
@click.option(
    "--calib",
    metavar="builtin|fineweb|FILE|FOLDER|OWNER/NAME",
    help="Text on which the neurons' margins are chosen.  [default: none, margins are 0]",
)
@click.option(
    "--tokens", "n_tokens", type=click.IntRange(min=64), default=4096, show_default=True, help="Of that text."
)
@target_miss_option
@threads_option
@click.option("--force", is_flag=True, help="Replace an existing sidecar.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(*, model: str, kind: str, as_json: bool, **options: Any) -> None:
    """Make predictors of MODEL from its weights alone, without training.

    \b
    tsconv predictor build --kind sign NAME.gguf --calib builtin --out sign.predictor.gguf
    tsconv run NAME.gguf --predictor sign.predictor.gguf
    """
    from tqdm import tqdm

    from tsconv.commands.predictor_build import build

    with tqdm(disable=not sys.stderr.isatty(), leave=False, unit="layer") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = build(model, kind, progress=progress, **options)
    for note in result.notes:
        say(f"note: {note}")
    if as_json:
        echo(json_text(vars(result) | {"sidecar": str(result.sidecar), "notes": list(result.notes)}))
        return
    echo(f"{result.sidecar}: {result.kind}")
    echo(f"{result.n_bytes / 1e6:.1f} MB, {result.bytes_per_token / 1e6:.2f} MB a token, {result.seconds:.1f} s")
