"""The figures of a sweep, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, ScalarFormatter

from tsconv.eval.sweep.points import EXACT, PREDICTOR, Point, in_order, kind_of
from tsconv.report.style import (
    BLACK,
    BLUE,
    MANY_LAYERS,
    RED,
    Plot,
    canvas,
    layer_axis,
    layer_ramp,
    legend_above,
    rendered,
    styled,
)
from tsconv.runtime.sparsity import parse_sparsity

NAMES = ("quality", "speed", "layers")  # of all figures that there can be
GREY = "#e8e8e8"
FLOOR = 1e-6  # of the divergences that are drawn: what 16 bits of the base leave of nothing
STEEP = 3.0  # largest over smallest perplexity: a logarithmic axis beyond
TICKS = (1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 7.0)

_QUALITY = (
    "Perplexity, and divergence from exact sparsity, over the share of the neurons that is dropped: what Table 3 and"
    " figure 5a of the Turbo Sparse paper show. Dashed: the share that is zero by itself; shaded: from the layer with"
    " the smallest to that with the largest. Bars: standard errors; those of the perplexities are mostly the text's own"
    " and shared by all points. Divergences below 1e-6 are drawn there."
)
_SPEED = (
    "Tokens per second, as measured while the points were. Top-k computes gate and up of every neuron to choose among"
    " them: its speed is the price of measuring, not what such a sparsity gives."
)
_LAYERS = "Share of the neurons that added nothing to the output, mean over the tokens and experts."


def draw(points: Sequence[Point]) -> list[Plot]:
    """All figures.

    Args:
        points: of one sweep, with that of exact sparsity.
    """
    points = in_order(points)
    wanted: list[tuple[str, str, str, Callable[[Sequence[Point]], Figure]]] = [
        ("quality", "What sparsity costs", _QUALITY, quality),
        ("speed", "What it gives", _SPEED, speed),
        ("layers", "Sparsity of each layer", _LAYERS, layers),
    ]
    with styled():
        return [rendered(name, title, caption, figure(points)) for name, title, caption, figure in wanted]


def draw_quality(points: Sequence[Point]) -> Plot:
    """The figure of Table 3 alone."""
    with styled():
        return rendered("quality", "What sparsity costs", _QUALITY, quality(in_order(points)))


def place(point: Point) -> float:
    """Of a point on the axis of sparsity, in %: of top-k what it was asked to drop, else what was dropped."""
    sparsity = parse_sparsity(point.sparsity)
    return 100 * (sparsity.value if sparsity.kind == "topk" else point.reached)


def exact_of(points: Sequence[Point]) -> Point:
    return next(point for point in points if point.sparsity == EXACT)


def quality(points: Sequence[Point]) -> Figure:
    """Perplexity above, divergence below."""
    figure = canvas(8.5, 6.4)
    above, below = figure.subplots(2, 1, sharex=True)
    exact = exact_of(points)
    above.axhline(exact.perplexity, color=BLACK, linestyle=":", linewidth=1.2, label="exact")
    for axes in (above, below):
        shares = [100 * (1 - share) for share in exact.layers_active]
        axes.axvspan(min(shares), max(shares), color=GREY, alpha=0.5, linewidth=0)
        axes.axvline(100 * exact.reached, color=BLACK, linestyle="--", linewidth=0.9)
    for kind, label, colour, marker in _KINDS:
        found = [point for point in points if kind_of(point) == kind]
        if not found:
            continue
        x = [place(point) for point in found]
        style = {"color": colour, "marker": marker, "label": label, "capsize": 2.5, "elinewidth": 0.9}
        above.errorbar(x, [p.perplexity for p in found], yerr=[p.error for p in found], **style)
        kl = np.maximum([p.kl for p in found], FLOOR)
        errors = np.array([p.kl_error for p in found])
        below.errorbar(x, kl, yerr=[np.minimum(errors, kl * 0.9), errors], **style)
    above.set_ylabel("perplexity")
    _perplexity_axis(above, [point.perplexity for point in points])
    below.set_ylabel("KL divergence (nats)")
    below.set_yscale("log")
    below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    below.set_ylim(bottom=FLOOR / 2)
    below.set_xlabel("neurons dropped (%)")
    below.set_xlim(-2, 102)
    legend_above(above, 3)
    return figure


_KINDS = (("topk", "top-k", BLUE, "o"), (PREDICTOR, "predictor", RED, "s"))


def _perplexity_axis(axes: Axes, values: Sequence[float]) -> None:
    if max(values) < STEEP * min(values):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=TICKS))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())


def speed(points: Sequence[Point]) -> Figure:
    """Prefill and decode, a panel each."""
    figure = canvas(8.5, 4.0)
    panels = figure.subplots(1, 2)
    for axes, field, title in zip(
        panels, ("prefill_tokens_per_s", "decode_tokens_per_s"), ("prefill", "decode"), strict=True
    ):
        for kind, label, colour, marker, line in (
            (EXACT, "exact", BLACK, "D", "none"),
            (PREDICTOR, "predictor", RED, "s", "-"),
            ("topk", "top-k", BLUE, "o", ":"),
        ):
            found = [point for point in points if kind_of(point) == kind]
            if found:
                y = [getattr(point, field) for point in found]
                axes.plot([place(p) for p in found], y, marker=marker, color=colour, linestyle=line, label=label)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("neurons dropped (%)")
        axes.set_ylabel(f"{title}, tokens/s")
    legend_above(panels[0], 3)
    return figure


def layers(points: Sequence[Point]) -> Figure:
    """A line for exact sparsity, and for each shift of the predictor's threshold; without predictors for top-k."""
    figure = canvas(8.5, 4.2)
    axes = figure.add_subplot()
    others = [point for point in points if kind_of(point) == PREDICTOR]
    others = others or [point for point in points if kind_of(point) == "topk"]
    exact, colours = exact_of(points), layer_ramp(max(1, len(others)))
    x = range(len(exact.layers_active))
    for k, point in enumerate([exact, *others]):
        colour = BLACK if point is exact else colours(k - 1)
        y = [100 * (1 - share) for share in point.layers_active]
        marker = "o" if len(x) <= MANY_LAYERS else None
        axes.plot(x, y, "--" if point is exact else "-", color=colour, marker=marker, label=point.sparsity)
    layer_axis(axes, len(x))
    axes.set_ylabel("neurons dropped (%)")
    legend_above(axes, 4)
    return figure
