"""Kullback-Leibler divergence of a model from a base, with what llama-perplexity prints of it (--kl-divergence).

p is the base's distribution, q the model's, over the scored positions of a text's windows. The base is a file of log
probabilities, or another model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tsconv.errors import TsconvError
from tsconv.eval.base_file import BaseFile
from tsconv.eval.estimate import Covariance, Mean, log_softmax, log_sums
from tsconv.eval.ppl import neuron_shares, perplexity_of
from tsconv.eval.windows import N_BATCH, Windows, scored_logits
from tsconv.runtime.model import SparseLlama

NEGLIGIBLE = -16.0  # log probabilities of the base below it count as 0
KLD_PERCENTILES = (99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1)
P_PERCENTILES = (99.9, 99.0, 95.0, 90.0, 75.0, 50.0, 25.0, 10.0, 5.0, 1.0, 0.1)
MIN_TOKENS = 100  # for statistics

LogP = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Value = tuple[float, float]  # and its error


@dataclass
class Divergence:
    """Sums over the positions so far; each property is a value and its error.

    Attributes:
        values: KL divergence of each position, in nats.
        changes: q - p of the token that the text has, of each position.
    """

    nll: Mean = field(default_factory=Mean)
    nll_base: Mean = field(default_factory=Mean)
    both: Covariance = field(default_factory=Covariance)
    kld: Mean = field(default_factory=Mean)
    change: Mean = field(default_factory=Mean)
    squared_change: Mean = field(default_factory=Mean)
    n_same_top: int = 0
    values: list[npt.NDArray[np.float32]] = field(default_factory=list)
    changes: list[npt.NDArray[np.float32]] = field(default_factory=list)

    def add(self, log_p: LogP, logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int32]) -> None:
        """A window: the base's log probabilities and the model's logits [n, n_vocab], and the text's tokens [n]."""
        rows = np.arange(len(targets))
        sums = log_sums(logits)
        nll = sums - logits[rows, targets]
        nll_base = -log_p[rows, targets].astype(np.float64)
        # log p - log q where p is not negligible
        ratio = np.where(log_p > NEGLIGIBLE, log_p - logits + sums[:, None], 0.0)
        kld = (np.exp(log_p) * ratio).sum(axis=1, dtype=np.float64)
        change = np.exp(-nll) - np.exp(-nll_base)
        self.nll.add(nll)
        self.nll_base.add(nll_base)
        self.both.add(nll, nll_base)
        self.kld.add(kld)
        self.change.add(change)
        self.squared_change.add(np.square(change))
        self.n_same_top += int((log_p.argmax(axis=1) == logits.argmax(axis=1)).sum())
        self.values.append(kld.astype(np.float32))
        self.changes.append(change.astype(np.float32))

    @property
    def perplexity(self) -> Value:
        return perplexity_of(self.nll)

    @property
    def base_perplexity(self) -> Value:
        return perplexity_of(self.nll_base)

    @property
    def correlation(self) -> float:
        """Of the two log likelihoods."""
        product = self.nll.error * self.nll_base.error
        return self.both.value / product if product else 1.0

    @property
    def log_ratio(self) -> Value:
        """Of the perplexities."""
        variance = self.nll.error**2 + self.nll_base.error**2 - 2 * self.both.value
        return self.nll.mean - self.nll_base.mean, math.sqrt(max(variance, 0.0))

    @property
    def ratio(self) -> Value:
        value, error = self.log_ratio
        return math.exp(value), math.exp(value) * error

    @property
    def difference(self) -> Value:
        """Of the perplexities."""
        (mine, error), (base, base_error) = self.perplexity, self.base_perplexity
        variance = error**2 + base_error**2 - 2 * mine * base * self.both.value
        return mine - base, math.sqrt(max(variance, 0.0))

    @property
    def divergence(self) -> Value:
        """In nats."""
        return self.kld.mean, self.kld.error

    @property
    def probability_change(self) -> Value:
        return self.change.mean, self.change.error

    @property
    def rms_change(self) -> Value:
        value = math.sqrt(self.squared_change.mean)
        return value, 0.5 / value * self.squared_change.error if value else 0.0

    @property
    def same_top(self) -> Value:
        """Share of the positions where both find the same token likeliest."""
        n, share = self.kld.n, self.n_same_top / self.kld.n
        return share, math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else 0.0

    def percentiles(self) -> tuple[dict[float, float], dict[float, float]]:
        """Of the divergences and of the changes of probability, 0 and 100 included."""
        return _percentiles(self.values, KLD_PERCENTILES), _percentiles(self.changes, P_PERCENTILES)


def _percentiles(parts: Sequence[npt.NDArray[np.float32]], wanted: Sequence[float]) -> dict[float, float]:
    shown = (100.0, *wanted, 0.0)
    return dict(zip(shown, np.percentile(np.concatenate(parts), shown).tolist(), strict=True))


@dataclass(frozen=True)
class Kld:
    """What was found, and mean shares of the model's neurons: predicted, active."""

    divergence: Divergence
    predicted: float
    active: float


def measure_kld(
    model: SparseLlama,
    found: Windows,
    base: Iterable[LogP],
    *,
    n_batch: int = N_BATCH,
    progress: Callable[[int, Divergence], None] = lambda n, so_far: None,
) -> Kld:
    """
    Args:
        base: log probabilities [n_scored, n_vocab] of each window, of `BaseFile` or `of_model`.
        n_batch: as for `scored_logits`.
        progress: called with the number of windows done, and what was found until then.

    Raises:
        BackendError: no memory for the context, or llama.cpp cannot compute.
    """
    model.reset_ffn_stats()
    sums = Divergence()
    for i, (log_p, logits) in enumerate(zip(base, scored_logits(model, found, n_batch), strict=False)):
        sums.add(log_p, logits, found.targets(i))
        progress(i + 1, sums)
    return Kld(sums, *neuron_shares(model))


def of_model(model: SparseLlama, found: Windows, n_batch: int = N_BATCH) -> Iterable[LogP]:
    """The base's log probabilities from a model, float64 [n_scored, n_vocab] of each window."""
    return (log_softmax(logits) for logits in scored_logits(model, found, n_batch))


def check_base(model: SparseLlama, base: BaseFile) -> None:
    """Refuses a file of another vocabulary, or of more context than the model may have.

    Raises:
        TsconvError: it is.
    """
    if base.n_vocab != model.n_vocab():
        raise TsconvError(
            "log probabilities of another vocabulary",
            where=base.path,
            expected=f"{model.n_vocab()} words",
            found=base.n_vocab,
        )
    if base.windows.tokens.min() < 0 or base.windows.tokens.max() >= base.n_vocab:
        what = "a damaged file of log probabilities: tokens that its vocabulary does not have"
        raise TsconvError(what, where=base.path)


def report(found: Kld) -> str:
    """llama-perplexity's block of text; "" for fewer than MIN_TOKENS positions, as there."""
    d = found.divergence
    if d.kld.n < MIN_TOKENS:
        return ""
    klds, changes = d.percentiles()

    def both(value: Value) -> str:
        return f"{value[0]:10.6f} ± {value[1]:10.6f}"

    def percent(value: Value) -> str:
        return f"{100 * value[0]:6.3f} ± {100 * value[1]:5.3f} %"

    def name(q: float) -> str:
        return {100.0: "Maximum", 50.0: "Median ", 0.0: "Minimum"}.get(q, f"{q:4.1f}%  ")

    lines = [
        "====== Perplexity statistics ======",
        f"Mean PPL(Q)                   : {both(d.perplexity)}",
        f"Mean PPL(base)                : {both(d.base_perplexity)}",
        f"Cor(ln(PPL(Q)), ln(PPL(base))): {100 * d.correlation:6.2f}%",
        f"Mean ln(PPL(Q)/PPL(base))     : {both(d.log_ratio)}",
        f"Mean PPL(Q)/PPL(base)         : {both(d.ratio)}",
        f"Mean PPL(Q)-PPL(base)         : {both(d.difference)}",
        "",
        "====== KL divergence statistics ======",
        f"Mean    KLD: {both(d.divergence)}",
        *(f"{name(q)} KLD: {value:10.6f}" for q, value in klds.items()),
        "",
        "====== Token probability statistics ======",
        f"Mean    Δp: {percent(d.probability_change)}",
        *(f"{name(q)} Δp: {100 * value:6.3f}%" for q, value in changes.items()),
        f"RMS Δp    : {percent(d.rms_change)}",
        f"Same top p: {percent(d.same_top)}",
    ]
    return "\n".join(lines) + "\n"
