"""The tables of a report, as strings: `tsconv inspect` prints them, the page shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tsconv.report.summary import Activity, Concentration, Layer, Spread, StatsSummary
from tsconv.stats.counts import HISTOGRAMS, LAST_OCTAVE

NOTHING = "-"
SHOWN_CHARACTERS = 48

_SHARES = ("gate > 0", "up > 0", "active")
_PREDICTOR = ("predicted", "pred. & gate > 0", "pred. & active", "recall", "precision")


@dataclass(frozen=True)
class Table:
    """Cells of any text. `left` are the numbers of the columns that are words, all others are numbers."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    left: tuple[int, ...] = ()


def printable(text: str) -> str:
    """`text` without control characters and line breaks, which a terminal would obey and XML forbids."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def shortened(text: str, length: int = SHOWN_CHARACTERS) -> str:
    """`text`, printable, in at most `length` characters."""
    text = printable(text)
    return text if len(text) <= length else text[: length - 3] + "..."


def percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.2f}"


def tables(summary: StatsSummary) -> list[Table]:
    """All tables that these statistics have something for."""
    found = [_texts(summary)]
    if len(summary.texts) > 1:
        found.append(_activity_by_text(summary))
    found += [_layers(summary), _spreads(summary)]
    if summary.subject.n_expert:
        found.append(_experts(summary))
    if summary.overlaps:
        found += [_overlaps(summary), _overlaps_by_layer(summary)]
    return found


def _texts(summary: StatsSummary) -> Table:
    rows: list[tuple[str, ...]] = [
        (
            str(number),
            shortened(text.source.dataset),
            shortened(text.source.config) or NOTHING,
            shortened(text.source.revision) or NOTHING,
            f"{text.source.chunk:,}",
            shortened(text.source.outtype),
            f"{text.n_tokens:,}",
            f"{text.n_chunks:,}",
            shortened(" ".join(map(str, text.seeds))) or "in order",
        )
        for number, text in enumerate(summary.texts, 1)
    ]
    header = ("#", "dataset", "config", "revision", "chunk", "FFN type", "tokens", "chunks", "seeds")
    note = "Chunk: tokens run together. FFN type: of the weights. Seeds: of the orders in which the text was taken."
    return Table("Texts", note, header, rows, left=(1, 2, 3, 5, 8))


def _activity_by_text(summary: StatsSummary) -> Table:
    rows = [
        (str(number), shortened(text.label), *_activity(summary, text.activity))
        for number, text in enumerate(summary.texts, 1)
    ]
    header = ("#", "text", *_SHARES, *(_PREDICTOR if summary.has_predictor else ()))
    return Table("Activity by text", "In %, over all layers; the columns are explained below.", header, rows, left=(1,))


def _layers(summary: StatsSummary) -> Table:
    routed = bool(summary.subject.n_expert)
    header = ("layer", *_SHARES, *(_PREDICTOR if summary.has_predictor else ()), "80 % in", "never")
    rows = [
        (
            str(n),
            *_activity(summary, layer.activity),
            *_concentration(layer.concentration),
            *(_routing(layer) if routed else ()),
        )
        for n, layer in enumerate(summary.layers)
    ]
    beyond = 4 if routed else 2
    note = (
        "In %. Active: gate > 0 and up > 0; sparsity is 100 - active. 80 % in: the share of the neurons, the most"
        " active first, that makes 80 % of the activations. Never: neurons that were never active."
    )
    if summary.has_predictor:
        note += " Recall: of the active, the predicted. Precision: of the predicted, the active."
    if routed:
        header += ("busiest expert", "entropy")
        note += (
            " Busiest expert: its share of the tokens. Entropy of the routing: 1 when all experts get as many tokens."
        )
    whole = ("all", *_activity(summary, summary.overall), *([NOTHING] * beyond))
    return Table("Layers", note, header, [*rows, whole])


def _spreads(summary: StatsSummary) -> Table:
    names = {"gate": "|gate|", "up": "|up|", "combined": "product"}
    columns = [f"{names[name]} {column}" for name in HISTOGRAMS for column in ("~0 %", "median", "90 %", "99 %")]
    rows = [
        (str(n), *(cell for name in HISTOGRAMS for cell in _spread(layer.spreads[name])))
        for n, layer in enumerate(summary.layers)
    ]
    note = (
        "Product: relu(gate) * relu(up). ~0: share of the values below 2^-20, zeros included. Quantiles of all others,"
        " estimated from bins: off by no more than a bin's width, which is at most 25 % of the value."
    )
    return Table("Magnitudes", note, ("layer", *columns), rows)


def _experts(summary: StatsSummary) -> Table:
    header = ("layer", "expert", "routed", *_SHARES, *(_PREDICTOR if summary.has_predictor else ()))
    rows = [
        (
            str(n),
            str(e),
            percent(expert.routed),
            *_activity(summary, expert.activity),
            *_concentration(expert.concentration),
        )
        for n, layer in enumerate(summary.layers)
        for e, expert in enumerate(layer.experts)
    ]
    note = (
        "In %. Routed: share of the tokens that the layer's experts saw. The others as above, over the expert's tokens."
    )
    return Table("Experts", note, (*header, "80 % in", "never"), rows)


def _overlaps(summary: StatsSummary) -> Table:
    rows = []
    for overlap in summary.overlaps:
        a, b = (summary.texts[i].label for i in (overlap.first, overlap.second))
        figures = (percent(mean(overlap.jaccard)), _range(overlap.jaccard))
        covered = map(percent, map(mean, (overlap.second_covered, overlap.first_covered)))
        first, second = shortened(f"{overlap.first + 1} {a}"), shortened(f"{overlap.second + 1} {b}")
        rows.append((first, second, *figures, *covered))
    note = (
        "In %, mean over the layers. Hot set: the fewest neurons that make 80 % of a text's activations. Jaccard:"
        " neurons hot in both / hot in either. B by A: the share of B's activations that A's hot set makes."
    )
    header = ("text A", "text B", "Jaccard", "lowest to highest", "B by A", "A by B")
    return Table("Overlap of the hot sets", note, header, rows, left=(0, 1))


def _overlaps_by_layer(summary: StatsSummary) -> Table:
    rows = [
        (str(overlap.first + 1), str(overlap.second + 1), str(n), *map(percent, values))
        for overlap in summary.overlaps
        for n, values in enumerate(zip(overlap.jaccard, overlap.second_covered, overlap.first_covered, strict=True))
    ]
    header = ("A", "B", "layer", "Jaccard", "B by A", "A by B")
    return Table("Overlap by layer", "In %. A and B are the numbers of the texts.", header, rows)


def _activity(summary: StatsSummary, activity: Activity) -> tuple[str, ...]:
    shares = [activity.gate_positive, activity.up_positive, activity.active]
    if summary.has_predictor:
        shares += [activity.predicted, activity.predicted_gate, activity.predicted_active]
        shares += [activity.recall, activity.precision]
    return tuple(map(percent, shares))


def _concentration(concentration: Concentration) -> tuple[str, str]:
    return percent(concentration.hot), percent(concentration.never / concentration.neurons)


def _routing(layer: Layer) -> tuple[str, str]:
    busiest = max((expert.routed for expert in layer.experts if expert.routed is not None), default=None)
    return percent(busiest), NOTHING if layer.routing_entropy is None else f"{layer.routing_entropy:.4f}"


def _spread(spread: Spread) -> tuple[str, ...]:
    quantiles = (spread.median, spread.p90, spread.p99)
    return percent(spread.below), *(NOTHING if value is None else magnitude(value) for value in quantiles)


def magnitude(value: float) -> str:
    """'0.0123'; '>= 4096' for what is in the highest bin."""
    return f">= {value:.0f}" if value >= 2.0**LAST_OCTAVE else f"{value:.3g}"


def known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of those that are there."""
    there = known(values)
    return sum(there) / len(there) if there else None


def _range(values: Sequence[float | None]) -> str:
    there = known(values)
    return f"{percent(min(there))} to {percent(max(there))}" if there else NOTHING


def labels_by_number(summary: StatsSummary) -> list[str]:
    """'1 wikitext', '2 c4', ...: short, printable."""
    return [shortened(f"{number} {text.label}", 28) for number, text in enumerate(summary.texts, 1)]
