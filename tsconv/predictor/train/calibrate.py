"""Which threshold misses how much, and lets how many through: from counts of logits, whatever their number."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

LOWEST, HIGHEST, PER_OCTAVE = -12, 12, 64  # logits from 2^-12 to 2^12, in steps of 1.1 %
_EDGES = np.exp2(np.arange(LOWEST * PER_OCTAVE, HIGHEST * PER_OCTAVE + 1) / PER_OCTAVE)
_BINS = len(_EDGES) + 1


@dataclass
class Curve:
    """Counts over tokens and neurons by logit: bin k holds those from 2^(LOWEST + k / PER_OCTAVE) on, after a first
    one for those below.

    Attributes:
        e: sums of what missing costs (tsconv.predictor.train.objective), float64.
        neurons, active: how many, int64.
        tokens: that were counted.
    """

    e: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(_BINS))
    neurons: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    active: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    tokens: int = 0

    def add(self, logits: npt.NDArray[np.float32], e: npt.NDArray[np.float32], h: npt.NDArray[np.uint8]) -> None:
        """Counts rows: all [n, n_ff]."""
        with np.errstate(divide="ignore", invalid="ignore"):
            at = np.floor((np.log2(np.maximum(logits, 0)) - LOWEST) * PER_OCTAVE)
        bins = np.clip(at + 1, 0, _BINS - 1).astype(np.int64).reshape(-1)
        self.e += np.bincount(bins, e.reshape(-1), _BINS)
        self.neurons += np.bincount(bins, minlength=_BINS)
        self.active += np.bincount(bins[h.reshape(-1) > 0], minlength=_BINS)
        self.tokens += len(logits)

    def threshold(self, missed: float) -> float:
        """The highest edge of a bin that misses no more than the share `missed`; the lowest one where none does."""
        below = np.cumsum(self.e)[:-1]  # of the logits under edge k
        fine = np.flatnonzero(below <= missed * self.e.sum())
        return float(_EDGES[fine[-1] if len(fine) else 0])

    def at(self, threshold: float) -> Figures:
        """What a threshold, an edge of a bin, does."""
        k = int(np.searchsorted(_EDGES, threshold * (1 - 1e-9)))
        on, both = self.neurons[k + 1 :].sum(), self.active[k + 1 :].sum()
        n = max(1, self.tokens)
        return Figures(
            tokens=self.tokens,
            predicted=float(on / n),
            active=float(self.active.sum() / n),
            both=float(both / n),
            missed=float(self.e[: k + 1].sum() / self.e.sum()) if self.e.sum() > 0 else 0.0,
        )


@dataclass(frozen=True)
class Figures:
    """Means over tokens of an FFN.

    Attributes:
        tokens: that were looked at.
        predicted, active, both: neurons that are let through, that are active, that are both.
        missed: share of what counts (tsconv.predictor.train.objective) that is left out.
    """

    tokens: int
    predicted: float
    active: float
    both: float
    missed: float

    @property
    def recall(self) -> float:
        return self.both / self.active if self.active else float("nan")

    @property
    def precision(self) -> float:
        return self.both / self.predicted if self.predicted else float("nan")


def together(parts: list[Figures]) -> Figures:
    """Of FFNs that share tokens, as the experts of a layer do: each counts as often as it saw one."""
    n = max(1, sum(part.tokens for part in parts))
    means = (sum(part.tokens * getattr(part, name) for part in parts) / n for name in _MEANS)
    return Figures(sum(part.tokens for part in parts), *means)


_MEANS = ("predicted", "active", "both", "missed")
