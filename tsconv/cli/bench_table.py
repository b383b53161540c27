"""Results of `compare` as Markdown, JSON, JSON lines or CSV, and beside an older result."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tsconv.bench.clients import ClientsRow
from tsconv.bench.compare import ENGINES, NOREPACK, STOCK, Row
from tsconv.cli.text import size
from tsconv.errors import TsconvError

NOREPACK_NOTE = (
    f"\nBeside {NOREPACK}, {ENGINES[NOREPACK]}: neither has llama.cpp's extra buffer types (weights rearranged for"
    " its AMX and other kernels). The kernels of our FFNs are those named at the end.\n"
)

Key = tuple[str, str, int, str]  # model, test, threads, baseline


def formatted(rows: Sequence[Row] | Sequence[ClientsRow], output: str) -> str:
    """The rows, at least one, as "md", "json", "jsonl" or "csv"."""
    dicts = [dataclasses.asdict(row) for row in rows]
    if output == "json":
        return json.dumps(dicts, indent=2) + "\n"
    if output == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in dicts)
    if output == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dicts[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(dicts)
        return text.getvalue()
    return _clients([r for r in rows if isinstance(r, ClientsRow)]) + _markdown([r for r in rows if isinstance(r, Row)])


def read_results(path: Path) -> dict[Key, dict[str, float]]:
    """Speed and ratio of every row of an older result in JSON; one without baselines had stock llama.cpp's.

    Raises:
        TsconvError: a file that cannot be read or holds something else.
    """
    try:
        return {
            (row["model_filename"], row["test"], int(row["n_threads"]), row.get("baseline", STOCK)): {
                field: float(row[field]) for field in ("avg_ts", "ratio")
            }
            for row in json.loads(path.read_text())
        }
    except OSError as error:
        raise TsconvError(f"cannot be read: {error.strerror}", where=path) from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise TsconvError("not a result of tsconv bench", where=path, fix="write one with --save") from None


def changes(rows: Sequence[Row], old: Mapping[Key, Mapping[str, float]]) -> list[str]:
    """A line for every row that the older result has too: same model, test, threads and baseline."""
    lines = []
    for row in rows:
        before = old.get((row.model_filename, row.test, row.n_threads, row.baseline))
        if before is not None:
            lines.append(
                f"{_stem(row)} {row.test}, {row.n_threads} threads: {before['avg_ts']:.2f} -> {row.avg_ts:.2f} tokens/s"
                f" ({row.avg_ts / before['avg_ts'] - 1:+.1%}), ratio to {row.baseline} {before['ratio']:.2f} ->"
                f" {row.ratio:.2f}"
            )
    return lines


def _stem(row: Row) -> str:
    return row.model_filename.removesuffix(".gguf")


def _clients(rows: Sequence[ClientsRow]) -> str:
    """A table of llama-server's speed; nothing without rows."""
    lines: list[tuple[str, ...]] = [
        (
            *("model", "clients", "threads", "t/s", "dense llama-server t/s", "ratio (smallest to largest)"),
            *("active", "FFN bytes read"),
        )
    ]
    for row in rows:
        lines.append(
            (
                row.model_filename.removesuffix(".gguf"),
                str(row.n_clients),
                str(row.n_threads),
                f"{row.avg_ts:.2f}",
                f"{row.dense_avg_ts:.2f}",
                f"{row.ratio:.2f} ({row.ratio_min:.2f} to {row.ratio_max:.2f})",
                f"{row.active:.1%}",
                f"{row.bytes_share:.1%}",
            )
        )
    return _table(lines, left=("model",)) if rows else ""


def _markdown(rows: Sequence[Row]) -> str:
    """Two tables, of speed and of where the time goes, and a line about the machine; nothing without rows."""
    if not rows:
        return ""
    speed: list[tuple[str, ...]] = [
        (
            *("model", "size", "predictor", "test", "threads", "t/s", "baseline", "its t/s"),
            *("ratio (smallest to largest)", "roofline", "reached", "resident", "load s"),
        )
    ]
    parts: list[tuple[str, ...]] = [
        (
            *("model", "test", "threads", "ms", "attention", "predictor", "FFN", "rest", "predicted", "active", "GB/s"),
            "of memory",
        )
    ]
    for row in rows:
        speed.append(
            (
                _stem(row),
                size(row.model_size),
                row.predictor_type or "-",
                row.test,
                str(row.n_threads),
                f"{row.avg_ts:.2f}",
                row.baseline,
                f"{row.dense_avg_ts:.2f}",
                f"{row.ratio:.2f} ({row.ratio_min:.2f} to {row.ratio_max:.2f})",
                "-" if row.roofline_ratio is None else f"{row.roofline_ratio:.2f}",
                "-" if row.roofline_reached is None else f"{row.roofline_reached:.0%}",
                size(row.peak_bytes),
                f"{row.load_seconds:.1f}",
            )
        )
        parts.append(
            (
                _stem(row),
                row.test,
                str(row.n_threads),
                f"{(row.ms_attention or 0.0) + row.ms_predictor + row.ms_ffn + row.ms_rest:.2f}",
                "-" if row.ms_attention is None else f"{row.ms_attention:.2f}",
                *(f"{ms:.2f}" for ms in (row.ms_predictor, row.ms_ffn, row.ms_rest)),
                *(f"{share:.1%}" for share in (row.predicted, row.active)),
                f"{row.gbps:.1f}",
                f"{row.bandwidth_share:.0%} of {row.memory_gbps:.1f}",
            )
        )
    shares = dict.fromkeys(f"{row.gpu_share}. {row.baseline}: {row.dense_gpu_share}" for row in rows if row.gpus)
    machine = dict.fromkeys(f"{row.cpu_info}; {row.backend}; {row.build}" for row in rows)
    return (
        _table(speed, left=("model", "size", "predictor", "test", "baseline"))
        + "".join(f"\n{line}\n" for line in shares)
        + (NOREPACK_NOTE if any(row.baseline == NOREPACK for row in rows) else "")
        + "\nWhere the time of a step goes, in ms (a step: a token of each sequence; pp: the batch):\n\n"
        + _table(list(dict.fromkeys(parts)), left=("model", "test"))  # the same beside every baseline
        + "".join(f"\n{line}\n" for line in machine)
    )


def _table(lines: Sequence[tuple[str, ...]], left: Sequence[str]) -> str:
    """Markdown whose columns are aligned in plain text too; the first line is the head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    to_left = [name in left for name in lines[0]]
    rule = ["-" * width if is_left else "-" * (width - 1) + ":" for width, is_left in zip(widths, to_left, strict=True)]
    text = ""
    for line in itertools.chain(lines[:1], [rule], lines[1:]):
        cells = (
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(line, widths, to_left, strict=True)
        )
        text += f"| {' | '.join(cells)} |\n"
    return text
