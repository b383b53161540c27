"""How the figures look, and what they are made of: canvases, axes of layers, colour ramps, heat maps.

Colours are those of Okabe and Ito, and viridis for layers: distinct for colour-blind readers, and in grey by line style
and marker. Text stays text in the SVG.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import QuadMesh
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLACK, BLUE, ORANGE, GREEN, RED = "#222222", "#0072b2", "#e69f00", "#009e73", "#d55e00"
GRID = "#d9d9d9"
PNG_DPI = 160
MANY_LAYERS = 48  # no markers beyond
MANY_CELLS = 400  # of a heat map: no numbers beyond
VECTOR_CELLS = 4096  # of a heat map: a bitmap beyond

SETTINGS = {
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 10,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",
    "text.color": BLACK,
    "text.parse_math": False,  # a dataset may have $ in its name
}


@dataclass(frozen=True)
class Plot:
    """A drawn figure. `caption` says what it shows, `svg` is a whole XML document, `png` a whole file."""

    name: str
    title: str
    caption: str
    svg: str
    png: bytes


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """matplotlib's own defaults and SETTINGS, whatever the user's are, while inside."""
    defaults = {k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith(("backend", "interactive"))}
    with warnings.catch_warnings(), matplotlib.rc_context(defaults | SETTINGS):
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the SVG's reader may have one
        yield


def rendered(name: str, title: str, caption: str, figure: Figure) -> Plot:
    """`figure` as SVG and PNG; the same figure gives the same bytes."""
    figure.draw_without_rendering()  # finds the layout, which then is the same in both
    figure.set_layout_engine("none")
    svg, png = io.StringIO(), io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.savefig(png, format="png", dpi=PNG_DPI)
    return Plot(name, title, caption, _distinct(name, svg.getvalue()), png.getvalue())


def _distinct(name: str, svg: str) -> str:
    """`svg` with ids that begin with `name`, so that several can stand in one page, and without what none needs."""
    svg = re.sub(r"<!DOCTYPE.*?>\s*", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, count=1, flags=re.DOTALL)
    return re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", svg)


def canvas(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def layer_axis(axes: Axes, n_layer: int) -> None:
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=min(16, n_layer), integer=True, min_n_ticks=1))
    axes.set_xlim(-0.4, n_layer - 0.6)


def legend_above(axes: Axes, columns: int) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderaxespad=0.2, columnspacing=1.6, handlelength=2.4
    )


def layer_ramp(n_layer: int) -> Colormap:
    """A colour per layer: dark first; the lightest end of viridis, faint on white, is left out."""
    return ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.85, n_layer)), "layers")


def layer_bar(figure: Figure, axes: list[Axes], ramp: Colormap) -> None:
    """The legend of layer_ramp: one field per layer."""
    if ramp.N < 2:
        return
    norm = BoundaryNorm(np.arange(ramp.N + 1) - 0.5, ramp.N)
    ticks = range(0, ramp.N, -(-ramp.N // 16))
    bar = figure.colorbar(ScalarMappable(norm, ramp), ax=axes, label="layer", ticks=ticks, pad=0.015)
    bar.ax.tick_params(length=0)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)


def heat_map(axes: Axes, values: npt.NDArray[np.float64], cmap: Colormap, norm: Normalize, number: str) -> QuadMesh:
    """Cells of values [rows, columns], the first row on top, with their numbers when they are few; NaN stays grey."""
    rows, columns = values.shape
    mesh = axes.pcolormesh(
        np.arange(columns + 1) - 0.5,
        np.arange(rows + 1) - 0.5,
        np.ma.masked_invalid(values),
        cmap=cmap,
        norm=norm,
        edgecolors="white",
        linewidth=0.4 if values.size <= VECTOR_CELLS else 0,
        rasterized=values.size > VECTOR_CELLS,
    )
    axes.grid(False)
    axes.set_facecolor("#e8e8e8")
    axes.set_ylim(rows - 0.5, -0.5)
    if values.size <= MANY_CELLS:
        for row, column in np.argwhere(~np.isnan(values)):
            red, green, blue, _ = mesh.to_rgba(values[row, column])
            ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else BLACK
            text = number.format(values[row, column])
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=7.5)
    return mesh
