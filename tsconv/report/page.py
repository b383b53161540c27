"""The page of a report: one HTML file that needs nothing else, neither script nor network."""

from __future__ import annotations

from collections.abc import Sequence

from tsconv import __version__
from tsconv.report.html import environment, shown
from tsconv.report.style import Plot
from tsconv.report.summary import StatsSummary
from tsconv.report.tables import tables

TEMPLATE = "page.html.jinja"
GENERATOR = "tsconv profile"  # in the page's <meta name="generator">: how a page of ours is known again

FUNCTIONS = {
    "predictor": "predictor: the activations of the model with its predictor's mask",
    "exact": "exact: every neuron computed, no predictor",
}


def page(summary: StatsSummary, plots: Sequence[Plot], title: str | None = None) -> str:
    """The report as one HTML document.

    Args:
        summary: its numbers.
        plots: its figures, of the same statistics.
        title: of the page; None: the model's name.
    """
    subject = summary.subject
    texts, *others = tables(summary)
    template = environment().get_template(TEMPLATE)
    return template.render(
        heading=title or f"Activations of {subject.name or 'a model without a name'}",
        subject=subject,
        function=FUNCTIONS[subject.sparsity],
        n_tokens=summary.n_tokens,
        tiles=_tiles(summary),
        texts=texts,
        plots=[shown(plot) for plot in plots],
        tables=others,
        generator=GENERATOR,
        version=__version__,
    )


def _tiles(summary: StatsSummary) -> list[tuple[float | None, str]]:
    """The shares of all layers together, and what they are shares of."""
    overall = summary.overall
    never = sum(layer.concentration.never for layer in summary.layers)
    neurons = sum(layer.concentration.neurons for layer in summary.layers)
    tiles = [(overall.active, "of the neurons are active"), (overall.gate_positive, "have gate > 0")]
    if summary.has_predictor:
        tiles.append((overall.predicted, "are predicted"))
        tiles.append((overall.recall, "of the active are predicted (recall)"))
        tiles.append((overall.precision, "of the predicted are active (precision)"))
    return [*tiles, (never / neurons, "were never active")]
