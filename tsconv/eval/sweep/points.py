"""The points of a sweep: a sparsity each, and what was measured there."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tsconv.errors import TsconvError
from tsconv.runtime.sparsity import Sparsity, parse_sparsity

EXACT, PREDICTOR = "exact", "predictor"
DEFAULT_TOPK = ("0", "0.5", "0.7", "0.8", "0.85", "0.9", "0.925", "0.95", "0.975", "0.99")


@dataclass(frozen=True)
class Point:
    """One sparsity, over n_tokens predictions.

    Attributes:
        sparsity: as --sparsity takes it.
        perplexity, error: llama-perplexity's.
        ratio, ratio_error: of the perplexity to that of exact sparsity; the error is that of the paired difference.
        kl, kl_error: mean Kullback-Leibler divergence from exact sparsity, in nats.
        same_top, same_top_error: share of the predictions where both find the same token likeliest.
        predicted, active: mean shares of the neurons that the predictor let through (all without one), and that added
            to the output.
        layers_predicted, layers_active: the same of each layer.
        prefill_tokens_per_s: of the windows of the text, computed as `eval ppl` computes them.
        decode_tokens_per_s: 32 tokens one by one, the fastest of three times.
        n_threads: with which both were measured.
    """

    sparsity: str
    perplexity: float
    error: float
    ratio: float
    ratio_error: float
    kl: float
    kl_error: float
    same_top: float
    same_top_error: float
    predicted: float
    active: float
    layers_predicted: tuple[float, ...]
    layers_active: tuple[float, ...]
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    n_tokens: int
    n_threads: int

    @property
    def reached(self) -> float:
        """The sparsity: the share of the neurons that added nothing to the output."""
        return 1 - self.active

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"reached": self.reached}


FIELDS = {field.name: field.type for field in dataclasses.fields(Point)}


def point_of(values: Any) -> Point:
    """From what `Point.as_dict` gave and JSON kept.

    Raises:
        ValueError: something else.
    """
    if not isinstance(values, dict) or not FIELDS.keys() <= values.keys():
        raise ValueError("a point has other fields")
    found: dict[str, Any] = {}
    for name, kind in FIELDS.items():
        value = values[name]
        if kind == "str":
            good = isinstance(value, str)
        elif kind == "tuple[float, ...]":
            good = isinstance(value, list) and all(map(_is_number, value))
            value = tuple(value) if good else value
        else:
            good = _is_number(value) and (kind == "float" or isinstance(value, int))
        if not good:
            raise ValueError(f"{name} of a point is wrong")
        found[name] = value
    parse_sparsity(found["sparsity"])
    return Point(**found)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def wanted_sparsities(topk: Sequence[str], thresholds: Sequence[str], has_predictor: bool) -> list[str]:
    """Sparsities to measure, each once: exact, top-k, and the model's own predictor with the shifts of its threshold.

    Raises:
        TsconvError: a number that none can be, or a threshold for a model without predictors.
    """
    if thresholds and not has_predictor:
        raise TsconvError("the model has no predictor, whose threshold could be moved", fix="leave --threshold out")
    found = [EXACT, *(f"topk:{value}" for value in topk)]
    found += [PREDICTOR] if has_predictor else []
    found += [f"predictor:{value}" for value in thresholds]
    kinds: dict[Sparsity, str] = {}
    for text in found:
        kinds.setdefault(parse_sparsity(text), text)
    return list(kinds.values())


def in_order(points: Iterable[Point]) -> list[Point]:
    """Exact sparsity first, then top-k and the predictor, with rising sparsity each."""
    kinds = (EXACT, "topk", PREDICTOR)

    def place(point: Point) -> tuple[int, float]:
        sparsity = parse_sparsity(point.sparsity)
        return kinds.index(sparsity.kind), sparsity.value

    return sorted(points, key=place)


def kind_of(point: Point) -> str:
    return parse_sparsity(point.sparsity).kind


def as_csv(points: Sequence[Point]) -> str:
    """A line for each point, without its layers."""
    names = [name for name in FIELDS if not name.startswith("layers_")]
    names.insert(names.index("active") + 1, "reached")
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(point.as_dict() for point in points)
    return text.getvalue()


HEADER = (
    *("sparsity", "dropped", "perplexity", "ratio to exact", "KL divergence", "same top"),
    *("prefill tokens/s", "decode tokens/s"),
)


def cells(point: Point) -> tuple[str, ...]:
    """A row below HEADER."""
    return (
        point.sparsity,
        f"{point.reached:.2%}",
        f"{point.perplexity:.4f} ± {point.error:.4f}",
        f"{point.ratio:.5f} ± {point.ratio_error:.5f}",
        f"{point.kl:z.6f} ± {point.kl_error:.6f}",
        f"{point.same_top:.2%}",
        f"{point.prefill_tokens_per_s:.1f}",
        f"{point.decode_tokens_per_s:.1f}",
    )
