"""The report of a sweep: one page, and its figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tsconv import __version__
from tsconv.eval.sweep.points import EXACT, HEADER, PREDICTOR, Point, cells, in_order, kind_of
from tsconv.extras import require
from tsconv.report.tables import Table
from tsconv.report.write import ReportKind, check_writable, write_page
from tsconv.runtime.sparsity import parse_sparsity
from tsconv.write.writer import write_file

GENERATOR = "tsconv eval sweep"
TEMPLATE = "sweep.html.jinja"
LOSSLESS = 1.01  # ratio of perplexities up to which a tile counts a sparsity as without loss

_POINTS = (
    "Dropped: the share of the neurons that added nothing to the output. Perplexity with its standard error; ratio to"
    " exact sparsity with the error of the paired difference. KL divergence from exact sparsity in nats. Same top: how"
    " often both find the same token likeliest. The speed of topk is the price of measuring: it computes gate and up of"
    " every neuron."
)
_LAYERS = "Share of the neurons that added nothing to the output, in %, mean over the tokens and experts."


def sweep_report() -> ReportKind:
    """Raises TsconvError: matplotlib is not installed."""
    require("matplotlib", "a report")
    from tsconv.eval.sweep.figures import NAMES

    return ReportKind(GENERATOR, NAMES)


def check_report(directory: Path) -> None:
    """Before hours of computing. Raises what `write_sweep_report` would."""
    check_writable(directory, sweep_report())


def write_sweep_report(points: Sequence[Point], identity: dict[str, Any], text: str, directory: Path) -> list[Path]:
    """Writes index.html, which holds everything, and NAME.svg and NAME.png of each figure.

    Args:
        points: of one sweep, with that of exact sparsity.
        identity: of their file.
        text: what they were measured on, for the page.

    Returns:
        What was written, the page first.

    Raises:
        OutputError: the directory cannot be made or written, or has other files by these names; nothing is left behind.
        TsconvError: matplotlib is not installed.
    """
    kind = sweep_report()
    from tsconv.eval.sweep.figures import draw
    from tsconv.report.html import environment, shown

    check_writable(directory, kind)
    points = in_order(points)
    plots = draw(points)
    template = environment(Path(__file__).parent).get_template(TEMPLATE)
    page = template.render(
        heading=f"Sparsity of {identity['model']}",
        facts=_facts(points, identity, text),
        tiles=_tiles(points),
        plots=[shown(plot) for plot in plots],
        tables=[Table("Points", _POINTS, HEADER, [cells(p) for p in points], left=(0,)), _layers(points)],
        generator=GENERATOR,
        version=__version__,
    )
    return write_page(directory, kind, plots, page)


def write_plot(points: Sequence[Point], path: Path) -> None:
    """Perplexity and divergence over sparsity, as SVG where the name ends so, else as PNG.

    Raises:
        OutputError: it cannot be written.
        TsconvError: matplotlib is not installed.
    """
    require("matplotlib", "a plot")
    from tsconv.eval.sweep.figures import draw_quality

    plot = draw_quality(points)
    write_file(path, plot.svg.encode() if path.suffix == ".svg" else plot.png, force=True)


def _facts(points: Sequence[Point], identity: dict[str, Any], text: str) -> list[tuple[str, str]]:
    threads = sorted({point.n_threads for point in points})
    return [
        ("model", f"{identity['model']}, {identity['model_bytes']:,} bytes"),
        ("text", text),
        ("scored", f"{points[0].n_tokens:,} predictions in windows of {identity['n_ctx']}"),
        ("threads", ", ".join(map(str, threads))),
    ]


def _tiles(points: Sequence[Point]) -> list[tuple[str, str]]:
    exact = next(point for point in points if point.sparsity == EXACT)
    tiles = [
        (f"{exact.reached:.1%}", "of the neurons are zero by themselves"),
        (f"{exact.perplexity:.3f}", "perplexity with exact sparsity"),
    ]
    free = [p for p in points if kind_of(p) == "topk" and p.ratio <= LOSSLESS]
    if free:
        most = max(free, key=lambda point: parse_sparsity(point.sparsity).value)
        value = parse_sparsity(most.sparsity).value
        tiles.append((f"{value:.1%}", f"can be dropped for less than {LOSSLESS - 1:.0%} of perplexity (top-k)"))
    own = next((point for point in points if point.sparsity == PREDICTOR), None)
    if own is not None:
        tiles.append((f"{own.reached:.1%}", "are dropped by the model's predictor"))
        tiles.append((f"{own.ratio - 1:+.2%}", "is what that changes of the perplexity"))
        tiles.append((f"{own.decode_tokens_per_s / exact.decode_tokens_per_s:.2f} ×", "as fast as exact when decoding"))
    return tiles


def _layers(points: Sequence[Point]) -> Table:
    n_layer = len(points[0].layers_active)
    rows = [(p.sparsity, *(f"{100 * (1 - share):.2f}" for share in p.layers_active)) for p in points]
    return Table("Layers", _LAYERS, ("sparsity", *map(str, range(n_layer))), rows, left=(0,))
