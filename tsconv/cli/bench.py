"""`tsconv bench`: speed beside stock llama.cpp, dense, on the same machine in the same session."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tsconv.cli.options import threads_option
from tsconv.cli.text import size
from tsconv.errors import TsconvError

if TYPE_CHECKING:
    from tsconv.bench.compare import Row, Test

FORMATS = ("md", "json", "jsonl", "csv")


@click.command("bench")
@click.option("-m", "--model", metavar="FILE", help="Converted model.  [default: generate one of --shape]")
@click.option(
    "--shape",
    type=click.Choice(["turbosparse-mistral-7b", "turbosparse-mixtral-47b"]),
    default="turbosparse-mistral-7b",
    show_default=True,
    help="Shape of the generated model.",
)
@click.option("--layers", type=click.IntRange(1, 32), help="Layers of it.  [default: all]")
@click.option("--outtype", metavar="TYPE", default="q4_0", show_default=True, help="Type of its weights.")
@click.option("--test", "tests", metavar="ppN|tgN", multiple=True, help="May be repeated.  [default: pp512 tg128]")
@click.option("-r", "--repetitions", type=click.IntRange(min=1), default=3, show_default=True, help="Turns counted.")
@click.option("-o", "--output", type=click.Choice(FORMATS), default="md", show_default=True, help="Format.")
@click.option("--compare", metavar="OLD.json", type=click.Path(path_type=Path), help="Print the change since OLD.json.")
@threads_option
def command(
    *,
    model: str | None,
    shape: str,
    layers: int | None,
    outtype: str,
    tests: tuple[str, ...],
    repetitions: int,
    output: str,
    compare: Path | None,
    n_threads: int | None,
) -> None:
    """Measure prefill and decoding beside stock llama.cpp computing the same shape and types densely.

    Both run in turn. Generated models are kept in the cache folder.
    """
    from tsconv.bench.compare import compare as measure
    from tsconv.bench.generate import PRESETS, generated

    chosen = [_test(text) for text in tests or ("pp512", "tg128")]
    old = _read(compare) if compare is not None else {}

    def say(line: str) -> None:
        click.echo(line, err=True)

    path = Path(model) if model else generated(shape, layers or PRESETS[shape].n_layer, outtype, say)
    rows = measure(
        path,
        chosen,
        repetitions=repetitions,
        n_threads=n_threads,
        progress=say if sys.stderr.isatty() else lambda line: None,
    )
    click.echo(_formatted(rows, output), nl=False)
    for row in rows:
        before = old.get((row.model_filename, row.test))
        if before is not None:
            change = row.avg_ts / before["avg_ts"] - 1
            say(f"{row.test}: {before['avg_ts']:.2f} -> {row.avg_ts:.2f} tokens/s ({change:+.1%})")
            say(f"{row.test}: ratio {before['ratio']:.2f} -> {row.ratio:.2f}")


def _test(text: str) -> Test:
    from tsconv.bench.compare import Test
    from tsconv.bench.worker import MAX_TOKENS

    match = re.fullmatch(r"(pp|tg)([0-9]{1,6})", text)
    if match is None or not 1 <= int(match[2]) <= MAX_TOKENS:
        raise TsconvError("not a test", expected=f"pp512, tg128, ... with 1 to {MAX_TOKENS} tokens", found=repr(text))
    return Test(match[1], int(match[2]))


def _read(path: Path) -> dict[tuple[str, str], dict[str, float]]:
    """(model, test) -> row of an older result in JSON."""
    try:
        rows = json.loads(path.read_text())
        return {(row["model_filename"], row["test"]): {k: float(row[k]) for k in ("avg_ts", "ratio")} for row in rows}
    except OSError as error:
        raise TsconvError(f"cannot be read: {error.strerror}", where=path) from None
    except (ValueError, TypeError, KeyError):
        raise TsconvError("not a result of tsconv bench", where=path, fix="write one with -o json") from None


def _formatted(rows: list[Row], output: str) -> str:
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
    return _markdown(rows)


def _markdown(rows: list[Row]) -> str:
    head = (
        "model",
        "size",
        "test",
        "t/s",
        "dense t/s",
        "ratio",
        "GB/s",
        "of memory",
        "roofline",
        "reached",
        "predictor ms",
        "FFN ms",
        "rest ms",
        "resident",
    )
    lines = [head, tuple("---" if i < 3 else "---:" for i in range(len(head)))]
    for row in rows:
        roofline = row.roofline_ratio is not None
        lines.append(
            (
                row.model_filename.removesuffix(".gguf"),
                size(row.model_size),
                row.test,
                f"{row.avg_ts:.2f}",
                f"{row.dense_avg_ts:.2f}",
                f"{row.ratio:.2f} ({row.ratio_min:.2f} to {row.ratio_max:.2f})",
                f"{row.gbps:.1f}",
                f"{row.bandwidth_share:.0%} of {row.memory_gbps:.1f}",
                f"{row.roofline_ratio:.2f}" if roofline else "",
                f"{row.roofline_reached:.0%}" if roofline else "",
                f"{row.ms_predictor:.2f}",
                f"{row.ms_ffn:.2f}",
                f"{row.ms_rest:.2f}",
                size(row.peak_bytes),
            )
        )
    first = rows[0]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    neurons = f"{first.predicted:.1%} of the neurons predicted, {first.active:.1%} active"
    return f"{table}\n\n{first.n_threads} threads, {first.cpu_info}; {first.backend}; {first.build}; {neurons}\n"
