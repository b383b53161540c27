"""`tsconv inspect`: what is in a converted model or sidecar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tsconv.cli.text import size, table

if TYPE_CHECKING:
    from tsconv.export.summary import Summary

SHOWN_CHARACTERS = 72
SHOWN_ELEMENTS = 8


@click.command("inspect")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(file: Path, as_json: bool) -> None:
    """Show what is in a converted model or predictor sidecar FILE."""
    from tsconv.export.summary import summarise

    summary = summarise(file)
    click.echo(json.dumps(summary.as_dict(), indent=2) if as_json else _text(summary))


def _text(summary: Summary) -> str:
    own = {k: v for k, v in summary.keys.items() if k.startswith("turbosparse.")}
    other = {k: v for k, v in summary.keys.items() if k not in own}
    by_type = [("type", "tensors", "weights", "bytes")]
    by_type += [(g.name, f"{g.n_tensors:,}", f"{g.n_weights:,}", f"{g.n_bytes:,}") for g in summary.by_type]
    by_part = [("part", "tensors", "bytes", "share")]
    by_part += [
        (g.name, f"{g.n_tensors:,}", f"{g.n_bytes:,}", f"{100 * g.n_bytes / summary.tensor_bytes:.1f} %")
        for g in summary.by_part
    ]
    blocks = [
        f"{summary.path}: {summary.kind}, {size(summary.file_bytes)}, {summary.n_weights:,} weights,"
        f" {summary.bits_per_weight:.2f} bits per weight",
        _pairs(own),
        _pairs(other),
        table(by_type, right=(1, 2, 3)),
        table(by_part, right=(1, 2, 3)),
    ]
    if summary.partner is not None:
        verdict = "belongs to this file" if summary.partner.matches else "DOES NOT belong to this file"
        share = summary.partner.file_bytes / (summary.partner.file_bytes + summary.file_bytes)
        blocks.append(
            f"{summary.partner.path}: {size(summary.partner.file_bytes)}, {100 * share:.1f} % of both files, {verdict}"
        )
    return "\n\n".join(block for block in blocks if block)


def _pairs(keys: dict[str, Any]) -> str:
    return table([(key, _value(value)) for key, value in keys.items()]) if keys else ""


def _value(value: Any) -> str:
    if isinstance(value, list):
        shown = ", ".join(map(str, value[:SHOWN_ELEMENTS])) if not any(isinstance(v, str) for v in value[:1]) else ""
        more = "" if shown and len(value) <= SHOWN_ELEMENTS else f"{', ...' if shown else ''} ({len(value)} elements)"
        return f"[{shown}]{more}" if shown else more.strip()
    text = repr(value) if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
