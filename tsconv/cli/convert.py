"""`tsconv convert`: parses options, calls tsconv.commands.convert.convert, prints what it did."""

from __future__ import annotations

import dataclasses
import shlex
from typing import TYPE_CHECKING

import click

from tsconv.cli.output import echo, json_text, progress_bar, say
from tsconv.cli.text import size, table

if TYPE_CHECKING:
    from tsconv.commands.convert import ConversionResult

TYPES = "f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q4_K, q5_K, q6_K, q3_K, iq4_nl, q3_K_M, q4_K_M, q5_K_M"


@click.command("convert")
@click.argument("src")
@click.option("--outfile", metavar="FILE", help="Model to write.  [default: NAME-OUTTYPE.gguf in this folder]")
@click.option("--outtype", metavar="TYPE", default="q4_0", show_default=True, help=f"Type of the weights: {TYPES}.")
@click.option(
    "--predictor-outtype",
    metavar="TYPE",
    help="Type of the predictor.  [default: q8_0; q3_nl beside 3- and 4-bit weights, f32 beside f32]",
)
@click.option("--predictor", metavar="DIR|REPO", help="Separate predictors (model_N.pt) of a Bamboo model.")
@click.option("--profile", metavar="STATS", help="Statistics of this checkpoint (tsconv profile): hot neurons first.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a Hub repository.")
@click.option(
    "--tensor-type",
    "tensor_types",
    metavar="REGEX=TYPE",
    multiple=True,
    help="Type of the tensors whose name REGEX finds; may be repeated, the first match counts.",
)
@click.option(
    "--ffn-layout",
    type=click.Choice(["auto", "bundles", "rows"]),
    default="auto",
    show_default=True,
    help="bundles: gate, up and down of a neuron side by side; faster with a predictor. rows: faster with exact"
    " sparsity. auto: bundles where there is a predictor.",
)
@click.option(
    "--fuse-qkv/--no-fuse-qkv",
    default=True,
    show_default=True,
    help="q, k and v of a layer in one matrix: faster, but adapters (LoRA) for them do not fit.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--force", is_flag=True, help="Replace existing outputs.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    src: str,
    as_json: bool,
    **options: object,
) -> None:
    """Convert a TurboSparse or Bamboo checkpoint to GGUF and a predictor sidecar.

    SRC is a directory with config.json and *.safetensors, or a repository on the Hugging Face Hub (OWNER/NAME).
    """
    from tsconv.commands.convert import convert

    with progress_bar("converting") as progress:
        result = convert(src, progress=progress, **options)  # type: ignore[arg-type]
    for line in (*(f"note: {note}" for note in result.notes), *_summarised(result.type_notes)):
        say(line)
    echo(_as_json(result) if as_json else _plan(result) if result.dry_run else _summary(result))


def _summarised(notes: tuple[str, ...]) -> list[str]:
    more = len(notes) - 1
    return (
        [f"note: {notes[0]}" + (f" (and {more} more tensors: see --dry-run --json)" if more else "")] if notes else []
    )


def _as_json(result: ConversionResult) -> str:
    fields = dataclasses.asdict(result)
    return json_text(fields | {"mb_per_s": _rate(result)}, indent=2)


def _rate(result: ConversionResult) -> float:
    return round(result.input_bytes / result.seconds / 1e6, 1)


def _plan(result: ConversionResult) -> str:
    rows = [("file", "tensor", "shape", "from", "to", "bytes")]
    rows += [
        (t.file, t.name, " x ".join(map(str, t.shape)), t.source_type, t.type, f"{t.bytes:,}") for t in result.tensors
    ]
    totals = [
        f"{label}: {path}, {sum(t.file == label for t in result.tensors)} tensors,"
        f" {size(sum(t.bytes for t in result.tensors if t.file == label))}"
        for label, path in (("model", result.model), ("sidecar", result.sidecar))
        if path is not None
    ]
    return "\n".join([table(rows, right=(5,)), *totals, f"input: {size(result.input_bytes)}; nothing was written"])


def _summary(result: ConversionResult) -> str:
    files = [("model", str(result.model), size(result.model_bytes))]
    if result.sidecar is not None:
        files.append(("sidecar", str(result.sidecar), size(result.sidecar_bytes)))
    order = "neurons: hottest first\n" if result.neuron_order == "hot_first" else ""
    return (
        f"{table(files, right=(2,))}\n{order}"
        f"{size(result.input_bytes)} of weights in {result.seconds:.1f} s ({_rate(result):.0f} MB/s)\n"
        f"next: tsconv run -m {shlex.quote(str(result.model))}"
    )
