"""The numbers of a report: what statistics say about sparsity, predictors, hot neurons, experts and texts.

A *pair* is a token and a neuron of an FFN that saw the token; the shares below are shares of pairs, so that a layer of
experts counts each expert by the tokens routed to it. Where a share has nothing to be a share of, it is None.
"Active" is gate . x > 0 and up . x > 0, as in figure 6 of Turbo Sparse (arXiv 2406.05955), which plots 1 - active.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tsconv.stats.counts import COUNTS, HISTOGRAMS, N_BINS, Counts, Part, Source, Stats, Subject, bin_edges

Floats = npt.NDArray[np.float64]

# The hot set: the fewest neurons that together make at least this share of the activations.
HOT_NUMERATOR, HOT_DENOMINATOR = 4, 5

# Points of a concentration curve: the 0, 1, ... 100 % most active neurons.
CURVE = np.linspace(0, 1, 101)

QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Activity:
    """Shares of the pairs of some FFNs.

    Attributes:
        tokens: that the FFNs saw, each counted as often as an FFN saw it.
        gate_positive, up_positive, active, predicted, predicted_gate, predicted_active: see COUNTS of stats.py;
            None without tokens, and the predicted ones without a predictor.
        recall: predicted_active / active, the share of the active pairs that the predictor finds.
        precision: predicted_active / predicted, the share of the predicted pairs that are active.
    """

    tokens: int
    gate_positive: float | None
    up_positive: float | None
    active: float | None
    predicted: float | None
    predicted_gate: float | None
    predicted_active: float | None
    recall: float | None
    precision: float | None


@dataclass(frozen=True)
class Concentration:
    """How unevenly the activations fall on some neurons.

    Attributes:
        neurons: how many there are.
        never: how many were never active.
        hot: the share of them that makes 80 % of the activations: they are sorted by how often they were active, and
            the smallest k whose sum is at least 80 % of all is divided by `neurons`; None without activations.
    """

    neurons: int
    never: int
    hot: float | None


@dataclass(frozen=True)
class Spread:
    """A histogram in a few numbers.

    Attributes:
        values: how many there are, those of the bin that holds 0 included.
        below: the share of them in that bin, which is everything under 2^-20.
        above: the share of them that is 2^12 or more.
        median, p90, p99: quantiles of those that are not below 2^-20: the value that this share of them does not
            pass. A bin is a quarter of an octave, and linear interpolation within one places the quantile no farther
            off than that bin is wide. 2^12 stands for "2^12 or more"; None without such values.
    """

    values: int
    below: float | None
    above: float | None
    median: float | None
    p90: float | None
    p99: float | None


@dataclass(frozen=True)
class Expert:
    """One expert of a layer; `routed` is its share of the tokens that the layer's experts saw."""

    routed: float | None
    activity: Activity
    concentration: Concentration


@dataclass(frozen=True)
class Layer:
    """One layer, all its experts together.

    Attributes:
        activity, concentration: over the neurons of all experts.
        curve: what share of the activations the 0, 1, ... 100 % most active neurons make (linear between whole
            neurons); empty without activations.
        spreads: of |gate . x|, |up . x| and relu(gate . x) * relu(up . x), by the names of HISTOGRAMS.
        experts: empty for a dense layer.
        routing_entropy: -sum p log p / log n_expert of the experts' shares: 1 when all get the same, 0 when one gets
            everything; None for a dense layer.
    """

    activity: Activity
    concentration: Concentration
    curve: tuple[float, ...]
    spreads: dict[str, Spread]
    experts: tuple[Expert, ...]
    routing_entropy: float | None


@dataclass(frozen=True)
class Text:
    """One part of the statistics. `label` tells it from the others."""

    label: str
    source: Source
    n_tokens: int
    n_chunks: int
    seeds: tuple[int, ...]
    activity: Activity


@dataclass(frozen=True)
class Overlap:
    """Whether two texts have the same hot neurons, per layer; None where either text made no activation.

    Attributes:
        first, second: their numbers in StatsSummary.texts.
        jaccard: neurons in both hot sets / neurons in either. A hot set takes neurons by activations, those of
            equal count in the checkpoint's order, expert after expert.
        second_covered: the share of the second text's activations that the first's hot set makes.
        first_covered: the share of the first text's activations that the second's hot set makes.
    """

    first: int
    second: int
    jaccard: tuple[float | None, ...]
    second_covered: tuple[float | None, ...]
    first_covered: tuple[float | None, ...]


@dataclass(frozen=True)
class StatsSummary:
    """Everything a report says in numbers. `overall` is over all layers; `overlaps` has every pair of texts."""

    subject: Subject
    n_tokens: int
    overall: Activity
    texts: tuple[Text, ...]
    layers: tuple[Layer, ...]
    overlaps: tuple[Overlap, ...]

    @property
    def has_predictor(self) -> bool:
        return self.subject.sparsity == "predictor"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self) | {"curve_at": CURVE.round(2).tolist()}


def summarise_stats(stats: Stats) -> StatsSummary:
    """The numbers of `stats`."""
    total = stats.total
    return StatsSummary(
        subject=stats.subject,
        n_tokens=stats.n_tokens,
        overall=overall(stats),
        texts=_texts(stats),
        layers=tuple(_layer(stats.subject, total, n) for n in range(stats.subject.n_layer)),
        overlaps=_overlaps(stats),
    )


def overall(stats: Stats) -> Activity:
    """Of all layers and texts."""
    return _activity(stats.subject, stats.total.tokens, stats.total.neurons)


def hot_size(active: npt.NDArray[np.int64]) -> int | None:
    """The smallest k such that the k most active neurons make at least 80 % of the activations.

    Args:
        active: activations of each neuron, any shape.

    Returns:
        k, or None without activations.
    """
    cumulative = _cumulative(active)
    if not cumulative[-1]:
        return None
    return int(np.searchsorted(HOT_DENOMINATOR * cumulative, HOT_NUMERATOR * cumulative[-1])) + 1


def curve(active: npt.NDArray[np.int64]) -> tuple[float, ...]:
    """The share of the activations that the CURVE most active neurons make; empty without activations."""
    cumulative = _cumulative(active)
    if not cumulative[-1]:
        return ()
    shares = np.insert(cumulative / cumulative[-1], 0, 0.0)
    return tuple(np.interp(CURVE * active.size, np.arange(active.size + 1), shares).tolist())


def quantile(histogram: npt.NDArray[np.int64], share: float) -> float | None:
    """The value that `share` of the values do not pass, of those that are not in the lowest bin.

    Args:
        histogram: [N_BINS] counts, over bin_edges().
        share: 0..1.
    """
    counts = histogram[1:].astype(np.float64)
    cumulative = np.cumsum(counts)
    if not cumulative[-1]:
        return None
    wanted = share * cumulative[-1]
    k = int(np.searchsorted(cumulative, wanted))
    edges = bin_edges()
    if k == N_BINS - 2:
        return float(edges[-1])
    within = (wanted - (cumulative[k] - counts[k])) / counts[k]
    return float(edges[k] + within * (edges[k + 1] - edges[k]))


def _cumulative(active: npt.NDArray[np.int64]) -> Floats:
    """Sums of the 1, 2, ... most active; float64 holds them exactly up to 2^53 and cannot wrap around."""
    return np.cumsum(np.sort(active, axis=None)[::-1], dtype=np.float64)


def _sum(counts: npt.NDArray[Any], axis: tuple[int, ...] | None = None) -> Any:
    return counts.sum(axis=axis, dtype=np.float64)


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole > 0 else None


def _activity(subject: Subject, tokens: npt.NDArray[np.int64], neurons: npt.NDArray[np.int64]) -> Activity:
    """Of the FFNs that `tokens` [...] and `neurons` [6, ..., n_ff] are of."""
    pairs = _sum(tokens) * subject.n_ff
    sums = dict(zip(COUNTS, _sum(neurons, tuple(range(1, neurons.ndim))), strict=True))
    shares = {name: _share(value, pairs) for name, value in sums.items()}
    recall, precision = (_share(sums["predicted_active"], sums[name]) for name in ("active", "predicted"))
    if subject.sparsity != "predictor":
        shares |= dict.fromkeys(("predicted", "predicted_gate", "predicted_active"))
        recall = precision = None
    return Activity(tokens=int(_sum(tokens)), **shares, recall=recall, precision=precision)


def _concentration(active: npt.NDArray[np.int64]) -> Concentration:
    hot = hot_size(active)
    return Concentration(active.size, int((active == 0).sum()), None if hot is None else hot / active.size)


def _spread(histogram: npt.NDArray[np.int64]) -> Spread:
    values = _sum(histogram)
    quantiles = (quantile(histogram, share) for share in QUANTILES)
    return Spread(int(values), _share(histogram[0], values), _share(histogram[-1], values), *quantiles)


def _layer(subject: Subject, total: Counts, n: int) -> Layer:
    tokens, neurons = total.tokens[n], total.neurons[:, n]
    active = neurons[COUNTS.index("active")]
    routed = [_share(seen, _sum(tokens)) for seen in tokens]
    return Layer(
        activity=_activity(subject, tokens, neurons),
        concentration=_concentration(active),
        curve=curve(active),
        spreads={name: _spread(total.histograms[n, k]) for k, name in enumerate(HISTOGRAMS)},
        experts=tuple(
            Expert(routed[e], _activity(subject, tokens[e : e + 1], neurons[:, e : e + 1]), _concentration(active[e]))
            for e in range(subject.n_expert)
        ),
        routing_entropy=_entropy(routed) if subject.n_expert else None,
    )


def _entropy(shares: Sequence[float | None]) -> float | None:
    p = np.array([share for share in shares if share], np.float64)
    if not p.size or len(shares) < 2:
        return None
    return max(0.0, float(-(p * np.log(p)).sum() / np.log(len(shares))))


def _texts(stats: Stats) -> tuple[Text, ...]:
    return tuple(
        Text(
            label,
            part.source,
            part.n_tokens,
            part.n_chunks,
            part.seeds,
            _activity(stats.subject, part.counts.tokens, part.counts.neurons),
        )
        for label, part in zip(labels([part.source for part in stats.parts]), stats.parts, strict=True)
    )


def labels(sources: Sequence[Source]) -> list[str]:
    """A short name for each: the dataset, and of the other fields those without which two would have one name."""
    names = [source.dataset for source in sources]
    for field in ("config", "outtype", "chunk", "revision"):
        taken = Counter(names)
        names = [
            f"{name} {value}" if taken[name] > 1 and (value := getattr(source, field)) else name
            for name, source in zip(names, sources, strict=True)
        ]
    return names


def _overlaps(stats: Stats) -> tuple[Overlap, ...]:
    """Every pair of parts, first < second."""
    n_parts = len(stats.parts)
    pairs = [(a, b) for a in range(n_parts) for b in range(a + 1, n_parts)]
    rows: dict[tuple[int, int], list[tuple[float | None, ...]]] = {pair: [] for pair in pairs}
    for n in range(stats.subject.n_layer if pairs else 0):
        active = [_active(part, n) for part in stats.parts]
        hot = [_hot_set(counts) for counts in active]
        for a, b in pairs:
            if not (hot[a].any() and hot[b].any()):
                rows[a, b].append((None, None, None))
                continue
            both, either = _sum(hot[a] & hot[b]), _sum(hot[a] | hot[b])
            rows[a, b].append((both / either, _made(active[b], hot[a]), _made(active[a], hot[b])))
    return tuple(Overlap(a, b, *map(tuple, zip(*rows[a, b], strict=True))) for a, b in pairs)


def _active(part: Part, n: int) -> npt.NDArray[np.int64]:
    return part.counts.of("active")[n].ravel()


def _hot_set(active: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which neurons are in the hot set: bool, the shape of `active` [n]."""
    hot = np.zeros(active.size, bool)
    hot[np.argsort(-active, kind="stable")[: hot_size(active) or 0]] = True
    return hot


def _made(active: npt.NDArray[np.int64], hot: npt.NDArray[np.bool_]) -> float | None:
    return _share(_sum(active[hot]), _sum(active))
