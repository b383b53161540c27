"""The figures of a report, drawn with matplotlib into SVG and PNG; needs no display, leaves nothing global changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from tsconv.report.style import (
    BLACK,
    BLUE,
    GREEN,
    MANY_LAYERS,
    ORANGE,
    RED,
    Plot,
    canvas,
    heat_map,
    layer_axis,
    layer_bar,
    layer_ramp,
    legend_above,
    rendered,
    styled,
)
from tsconv.report.summary import CURVE, Activity, StatsSummary
from tsconv.report.tables import labels_by_number, mean
from tsconv.stats.counts import FIRST_OCTAVE, HISTOGRAMS, Stats, bin_edges

SHOWN_SHARE = 1e-4  # of a layer's values: an octave with less of every layer is not shown

# names of all figures that there can be
NAMES = ("sparsity", "distributions", "concentration", "predictor", "routing", "overlap")


def draw(stats: Stats, summary: StatsSummary) -> list[Plot]:
    """Every figure that these statistics have something for.

    Args:
        summary: of `stats`.
    """
    shaded = " Shaded: the range over the experts." if summary.subject.n_expert > 1 else ""
    wanted: list[tuple[str, str, str, Callable[[], Figure]]] = [
        ("sparsity", "Active neurons of each layer", _SPARSITY + shaded, lambda: sparsity(summary)),
        ("distributions", "Magnitudes before and after the product", _DISTRIBUTIONS, lambda: distributions(stats)),
        ("concentration", "How few neurons make most activations", _CONCENTRATION, lambda: concentration(summary)),
    ]
    if summary.has_predictor:
        wanted.append(("predictor", "How well the predictor predicts", _PREDICTOR + shaded, lambda: predictor(summary)))
    if summary.subject.n_expert:
        wanted.append(("routing", "Tokens routed to each expert", _ROUTING, lambda: routing(summary)))
    if summary.overlaps:
        wanted.append(("overlap", "Are the hot neurons of all texts the same?", _OVERLAP, lambda: overlap(summary)))
    with styled():
        return [rendered(name, title, caption, figure()) for name, title, caption, figure in wanted]


# ---- per layer

_SPARSITY = (
    "Shares of the neurons, mean over the tokens. The sparsity of a dReLU layer (figure 6 of the Turbo Sparse paper) is"
    " the distance of the black line from 100 %, on the right axis."
)


def sparsity(summary: StatsSummary) -> Figure:
    """What share of the neurons is on, per layer; the right axis is its complement, the sparsity."""
    figure = canvas(8.5, 4.2)
    axes = figure.add_subplot()
    lines = [
        ("gate > 0", "gate_positive", BLUE, "^", "--"),
        ("up > 0", "up_positive", GREEN, "v", "--"),
        ("active: both", "active", BLACK, "o", "-"),
    ]
    if summary.has_predictor:
        lines.append(("predicted", "predicted", ORANGE, "s", "-"))
        lines.append(("predicted and active", "predicted_active", RED, "x", ":"))
    _activity_lines(axes, summary, lines, banded=("active",))
    axes.set_ylim(0, None)
    axes.set_ylabel("share of the neurons (%)")
    other = axes.secondary_yaxis("right", functions=(_complement, _complement))
    other.set_ylabel("sparsity (%)")
    other.spines["right"].set_visible(True)
    return figure


_PREDICTOR = (
    "Recall: the share of the active pairs of token and neuron that the predictor finds. Precision: the share of its"
    " predictions that are active."
)


def predictor(summary: StatsSummary) -> Figure:
    """Recall and precision per layer."""
    figure = canvas(8.5, 3.8)
    axes = figure.add_subplot()
    lines = [("recall", "recall", BLUE, "o", "-"), ("precision", "precision", RED, "s", "--")]
    _activity_lines(axes, summary, lines, banded=("recall", "precision"))
    axes.set_ylim(top=102)
    axes.set_ylabel("share (%)")
    return figure


def _complement(share: Any) -> Any:
    return 100 - share


def _activity_lines(
    axes: Axes, summary: StatsSummary, lines: Sequence[tuple[str, str, str, str, str]], banded: Sequence[str]
) -> None:
    """Lines of (label, field of Activity, colour, marker, style) over the layers; for the fields `banded` also the
    range over the experts."""

    def of(activity: Activity, field: str) -> float:
        return _percent([getattr(activity, field)])[0]

    x = np.arange(len(summary.layers))
    for label, field, colour, marker, style in lines:
        if field in banded and summary.subject.n_expert > 1:
            experts = np.array([[of(expert.activity, field) for expert in layer.experts] for layer in summary.layers])
            low, high = _lowest(experts), _highest(experts)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        y = [of(layer.activity, field) for layer in summary.layers]
        axes.plot(x, y, style, color=colour, marker=marker if len(x) <= MANY_LAYERS else None, label=label)
    layer_axis(axes, len(x))
    legend_above(axes, len(lines))


def _percent(values: Sequence[float | None]) -> npt.NDArray[np.float64]:
    return np.array([np.nan if value is None else 100 * value for value in values], np.float64)


def _lowest(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Minimum of each row without its NaNs; NaN where there is nothing else."""
    return np.where(np.isnan(rows).all(axis=1), np.nan, np.where(np.isnan(rows), np.inf, rows).min(axis=1))


def _highest(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return -_lowest(-rows)


# ---- over magnitudes and neurons: one line per layer

_DISTRIBUTIONS = (
    "One line per layer: how the values that are not below 2⁻²⁰ are distributed, per factor of two. What lies below,"
    " zeros included, is given as a number (lowest to highest layer; the table has each). Compare figures 3, 5b and 7"
    " of the Turbo Sparse paper."
)


def distributions(stats: Stats) -> Figure:
    """Densities of |gate|, |up| and relu(gate) relu(up) over the octaves, one line per layer."""
    names = {"gate": "|gate · x|", "up": "|up · x|", "combined": "relu(gate · x) relu(up · x)"}
    histograms = stats.total.histograms.astype(np.float64)
    figure = canvas(11, 4.2)
    panels = figure.subplots(1, len(HISTOGRAMS), sharey=True)
    ramp = layer_ramp(stats.subject.n_layer)
    edges = bin_edges()
    centres, octaves = np.sqrt(edges[1:] * edges[:-1]), np.log2(edges[1:] / edges[:-1])
    for k, (name, axes) in enumerate(zip(HISTOGRAMS, panels, strict=True)):
        counts = histograms[:, k]
        inside = counts[:, 1:-1]
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = inside / counts[:, 1:].sum(axis=1, keepdims=True)
            below = 100 * counts[:, 0] / counts.sum(axis=1)
            above = 100 * counts[:, -1] / counts.sum(axis=1)
        for n, share in enumerate(shares):
            axes.plot(centres, 100 * share / octaves, color=ramp(n), linewidth=1.1)
        axes.set_title(names[name])
        axes.set_xlabel("magnitude")
        notes = [f"below 2{_superscript(FIRST_OCTAVE)}: {_span(below)} %"]
        if np.nansum(above):
            notes.append(f"{edges[-1]:.0f} and above: {_span(above)} %")
        axes.text(0.02, 0.98, "\n".join(notes), transform=axes.transAxes, va="top", fontsize=9)
        _octave_axis(axes, edges, shares)
    panels[0].set_ylim(0, 1.18 * max(1e-9, *(axes.dataLim.y1 for axes in panels)))  # room for the notes
    panels[0].set_ylabel("values per octave (%)")
    layer_bar(figure, list(panels), ramp)
    return figure


def _octave_axis(axes: Axes, edges: npt.NDArray[np.float64], shares: npt.NDArray[np.float64]) -> None:
    """A log axis with powers of two, over the bins in which some layer has a noteworthy share."""
    axes.set_xscale("log", base=2)
    used = np.flatnonzero(np.nan_to_num(shares).max(axis=0) > SHOWN_SHARE)
    first, last = (edges[used[0]], edges[used[-1] + 1]) if used.size else (edges[0], edges[-1])
    low, high = int(np.floor(np.log2(first))), int(np.ceil(np.log2(last)))
    axes.set_xlim(2.0**low, 2.0**high)
    step = max(1, -(-(high - low) // 6))
    axes.xaxis.set_major_locator(FixedLocator([2.0**e for e in range(low, high + 1) if e % step == 0]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"2{_superscript(round(np.log2(x)))}"))
    axes.xaxis.set_minor_locator(FixedLocator([]))


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _span(values: npt.NDArray[np.float64]) -> str:
    there = values[~np.isnan(values)]
    if not there.size:
        return "-"
    low, high = f"{there.min():.2g}", f"{there.max():.2g}"
    return low if low == high else f"{low} to {high}"


_CONCENTRATION = (
    "Neurons sorted by how often they were active, most active first (those of all experts together): the share of all"
    " activations that the first of them make. A layer whose line rises at once has few hot neurons; the diagonal would"
    " be neurons that are all alike. Dots: the fewest neurons that make 80 %."
)


def concentration(summary: StatsSummary) -> Figure:
    """Cumulative activations over neurons, one line per layer."""
    figure = canvas(7.2, 4.8)
    axes = figure.add_subplot()
    ramp = layer_ramp(len(summary.layers))
    axes.plot([0, 100], [0, 100], ":", color="#888888", linewidth=1)
    axes.axhline(80, color="#888888", linewidth=1, linestyle="--")
    for n, layer in enumerate(summary.layers):
        if layer.curve and layer.concentration.hot is not None:
            axes.plot(100 * CURVE, 100 * np.array(layer.curve), color=ramp(n), linewidth=1.3)
            axes.plot(100 * layer.concentration.hot, 80, "o", color=ramp(n), markersize=4, zorder=3)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 101)
    axes.set_xlabel("most active neurons (% of the layer's)")
    axes.set_ylabel("share of the activations (%)")
    axes.text(99, 78.5, "80 %", ha="right", va="top", color="#555555", fontsize=9)
    layer_bar(figure, [axes], ramp)
    return figure


# ---- heat maps

_ROUTING = "The share of the layer's tokens that each expert got. White: its even share. Each row adds up to 100 %."


def routing(summary: StatsSummary) -> Figure:
    """Heat map, layers x experts, of the routing shares, with the even share in the middle of the colours."""
    layers = summary.layers
    shares = np.array([_percent([expert.routed for expert in layer.experts]) for layer in layers])
    even = 100 / summary.subject.n_expert
    width = min(12.0, max(5.0, 1.8 + 0.62 * shares.shape[1]))
    figure = canvas(width, min(11.0, max(2.6, 1.1 + 0.24 * len(layers))))
    axes = figure.add_subplot()
    reach = max(np.nanmax(np.abs(shares - even)) if not np.isnan(shares).all() else 0, 0.1 * even)
    norm = TwoSlopeNorm(even, max(0, even - reach), even + reach)
    mesh = heat_map(axes, shares, matplotlib.colormaps["PuOr_r"], norm, "{:.1f}")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=min(16, shares.shape[1]), integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=min(16, len(layers)), integer=True, min_n_ticks=1))
    figure.colorbar(mesh, ax=axes, label=f"tokens (%); even: {even:.3g} %", pad=0.02).outline.set_visible(False)
    return figure


_OVERLAP = (
    "Hot set: the fewest neurons of a layer that make 80 % of a text's activations. Jaccard index: neurons that are hot"
    " for both texts / for either. Covered: the share of a text's activations that the other's hot set makes; 80 % is"
    " what its own makes."
)


def overlap(summary: StatsSummary) -> Figure:
    """Two texts: lines over the layers. More: heat maps of texts, mean over the layers."""
    return _overlap_of_two(summary) if len(summary.texts) == 2 else _overlap_of_many(summary)


def _overlap_of_two(summary: StatsSummary) -> Figure:
    (pair,) = summary.overlaps
    first, second = labels_by_number(summary)
    figure = canvas(8.5, 4.2)
    axes = figure.add_subplot()
    x = np.arange(len(pair.jaccard))
    lines = (
        ("Jaccard index", pair.jaccard, BLACK, "o", "-"),
        (f"{second}, covered by {first}", pair.second_covered, BLUE, "^", "--"),
        (f"{first}, covered by {second}", pair.first_covered, RED, "v", ":"),
    )
    for label, values, colour, marker, style in lines:
        marked = marker if len(x) <= MANY_LAYERS else None
        axes.plot(x, _percent(values), style, color=colour, label=label, marker=marked)
    axes.axhline(80, color="#888888", linewidth=1, linestyle="--")
    axes.set_ylim(0, 102)
    axes.set_ylabel("share (%)")
    layer_axis(axes, len(x))
    legend_above(axes, 1)
    return figure


def _overlap_of_many(summary: StatsSummary) -> Figure:
    labels = labels_by_number(summary)
    n = len(labels)
    jaccard, covered = np.full((n, n), np.nan), np.full((n, n), np.nan)
    for pair in summary.overlaps:
        a, b = pair.first, pair.second
        jaccard[a, b] = jaccard[b, a] = _percent([mean(pair.jaccard)])[0]
        covered[a, b], covered[b, a] = _percent([mean(pair.second_covered), mean(pair.first_covered)])
    side = min(9.0, max(2.6, 0.55 * n))
    figure = canvas(2 * side + 3.8, side + 1.0)
    left, right = figure.subplots(1, 2, sharey=True)
    found = np.concatenate([values[~np.isnan(values)] for values in (jaccard, covered)])
    norm = Normalize(10 * np.floor(found.min(initial=90) / 10), 100)
    for axes, values, title in (
        (left, jaccard, "Jaccard index"),
        (right, covered, "covered by the hot set of the row"),
    ):
        mesh = heat_map(axes, values, matplotlib.colormaps["cividis"], norm, "{:.0f}")
        axes.set_title(title)
        axes.set_xlabel("text")
        axes.set_xticks(range(n), [str(number) for number in range(1, n + 1)])
        axes.set_yticks(range(n), labels)
        axes.set_aspect("equal")
        axes.tick_params(length=0)
    figure.colorbar(mesh, ax=[left, right], label="mean over the layers (%)", pad=0.02).outline.set_visible(False)
    return figure
