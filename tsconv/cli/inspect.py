"""`tsconv inspect`: what is in a converted model, sidecar or statistics."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tsconv.cli.output import echo, json_text, progress_bar, say
from tsconv.cli.text import size, table

if TYPE_CHECKING:
    from tsconv.format.header import Header
    from tsconv.format.summary import FileSummary
    from tsconv.report.summary import StatsSummary

SHOWN_CHARACTERS = 72
SHOWN_ELEMENTS = 8
NOTE_WIDTH = 100
DELAY = 1.0  # seconds before a bar shows
ORDER_OF_LAYER = re.compile(r"turbosparse\.neuron_order\.\d+")


@click.command("inspect")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.option("--verify", is_flag=True, help="Compare all tensors, the partner's too, with their checksums.")
def command(file: Path, as_json: bool, verify: bool) -> None:
    """Show what is in a converted model, predictor sidecar or activation statistics FILE."""
    from tsconv.format.header import read_header
    from tsconv.format.summary import summarise_file
    from tsconv.stats import file as stats_file

    header = read_header(file)
    if stats_file.is_stats(header):
        if verify:
            _verify(header)
        _show_stats(file, as_json)
        return
    summary = summarise_file(header)
    if verify:
        _verify(header, *([read_header(summary.partner.path)] if summary.partner else []))
    echo(json_text(summary.as_dict(), indent=2) if as_json else _text(summary))


def _verify(*headers: Header) -> None:
    from tsconv.format.checksums import verify

    for header in headers:
        with progress_bar("verifying", DELAY) as progress:
            n = verify(header, progress)
        say(f"{header.path}: {n} tensors are as they were written")


def _show_stats(file: Path, as_json: bool) -> None:
    from tsconv.report.summary import summarise_stats
    from tsconv.stats.file import load

    summary = summarise_stats(load(file))
    file_bytes = file.stat().st_size
    if as_json:
        head = {"path": str(file), "kind": "statistics", "file_bytes": file_bytes}
        echo(json_text(head | summary.as_dict(), indent=2))
    else:
        echo(_stats_text(file, file_bytes, summary))


def _stats_text(file: Path, file_bytes: int, summary: StatsSummary) -> str:
    from tsconv.report.tables import shortened, tables

    subject = summary.subject
    experts = f" x {subject.n_expert} experts ({subject.n_expert_used} per token)" if subject.n_expert else ""
    head = [
        ("model", shortened(subject.name, SHOWN_CHARACTERS)),
        ("fingerprint", shortened(subject.fingerprint, SHOWN_CHARACTERS)),
        ("shape", f"{subject.n_layer} layers{experts}, n_embd {subject.n_embd}, n_ff {subject.n_ff}"),
        ("sparsity", subject.sparsity),
    ]
    blocks = [f"{file}: statistics, {size(file_bytes)}, {summary.n_tokens:,} tokens", table(head)]
    for shown in tables(summary):
        right = tuple(i for i in range(len(shown.header)) if i not in shown.left)
        note = textwrap.fill(shown.note, NOTE_WIDTH)
        blocks.append(f"{shown.title}\n{note}\n\n{table([shown.header, *shown.rows], right)}")
    return "\n\n".join(blocks)


def _text(summary: FileSummary) -> str:
    orders = {k: v for k, v in summary.keys.items() if ORDER_OF_LAYER.fullmatch(k)}
    own = {k: v for k, v in summary.keys.items() if k.startswith("turbosparse.") and k not in orders}
    other = {k: v for k, v in summary.keys.items() if not k.startswith("turbosparse.")}
    by_type = [("type", "tensors", "weights", "bytes")]
    by_type += [(g.name, f"{g.n_tensors:,}", f"{g.n_weights:,}", f"{g.n_bytes:,}") for g in summary.by_type]
    by_part = [("part", "tensors", "bytes", "share")]
    by_part += [
        (g.name, f"{g.n_tensors:,}", f"{g.n_bytes:,}", f"{100 * g.n_bytes / summary.tensor_bytes:.1f} %")
        for g in summary.by_part
    ]
    layout = "" if summary.layout is None else f" in {summary.layout}"
    blocks = [
        f"{summary.path}: {summary.kind}{layout}, {size(summary.file_bytes)}, {summary.n_weights:,} weights,"
        f" {summary.bits_per_weight:.2f} bits per weight",
        _pairs(own, [("turbosparse.neuron_order.N", _orders(orders))] if orders else []),
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


def _pairs(keys: dict[str, Any], more: Sequence[tuple[str, ...]] = ()) -> str:
    rows = [*((key, _value(value)) for key, value in keys.items()), *more]
    return table(rows) if rows else ""


def _orders(orders: dict[str, Any]) -> str:
    """One line for the arrays of all layers."""
    lengths = sorted({len(order) for order in orders.values() if isinstance(order, list)})
    return f"{len(orders)} arrays of {' or '.join(f'{length:,}' for length in lengths)} neurons"


def _value(value: Any) -> str:
    if isinstance(value, list):
        shown = ", ".join(map(str, value[:SHOWN_ELEMENTS])) if not any(isinstance(v, str) for v in value[:1]) else ""
        more = "" if shown and len(value) <= SHOWN_ELEMENTS else f"{', ...' if shown else ''} ({len(value)} elements)"
        return f"[{shown}]{more}" if shown else more.strip()
    text = repr(value) if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
