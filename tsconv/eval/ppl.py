"""Perplexity as llama-perplexity measures it: over the second half of each window, with an error."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tsconv.eval.base_file import BaseWriter
from tsconv.eval.estimate import Mean, log_sums
from tsconv.eval.windows import N_BATCH, Windows, scored_logits
from tsconv.runtime.model import SparseLlama


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log likelihood of n_tokens predictions.

    Attributes:
        error: standard error of the perplexity.
        n_windows, n_ctx: of the text.
        seconds: of computing all windows.
        predicted, active: mean shares of the neurons that the predictor let through, and that were not zero.
    """

    perplexity: float
    error: float
    n_tokens: int
    n_windows: int
    n_ctx: int
    seconds: float
    predicted: float
    active: float


def likelihoods(logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """-log p of each target, float64 [n], from logits [n, n_vocab]."""
    return log_sums(logits) - logits[np.arange(len(targets)), targets]


def perplexity_of(nll: Mean) -> tuple[float, float]:
    """Perplexity and its error, from negative log likelihoods."""
    value = math.exp(nll.mean)
    return value, value * nll.error


def measure_ppl(
    model: SparseLlama,
    found: Windows,
    *,
    n_batch: int = N_BATCH,
    base: BaseWriter | None = None,
    progress: Callable[[int, float], None] = lambda n, perplexity: None,
) -> Perplexity:
    """
    Args:
        n_batch: as for `scored_logits`.
        base: where the log probabilities go, for `tsconv eval kld` or llama-perplexity.
        progress: called with the number of windows done and the perplexity until then.

    Raises:
        BackendError: no memory for the context, or llama.cpp cannot compute.
        OutputError: the base cannot be written.
    """
    model.reset_ffn_stats()
    nll, started = Mean(), time.perf_counter()
    for i, logits in enumerate(scored_logits(model, found, n_batch)):
        nll.add(likelihoods(logits, found.targets(i)))
        if base is not None:
            base.write(logits)
        progress(i + 1, math.exp(nll.mean))
    value, error = perplexity_of(nll)
    predicted, active = neuron_shares(model)
    seconds = time.perf_counter() - started
    return Perplexity(value, error, nll.n, len(found), found.n_ctx, seconds, predicted, active)


def neuron_shares(model: SparseLlama) -> tuple[float, float]:
    """Mean shares of the neurons, since the counters were set to 0: predicted, active."""
    stats = model.ffn_stats()
    n_ff = sum(layer["n_ff"] for layer in stats)
    return sum(layer["predicted"] for layer in stats) / n_ff, sum(layer["active"] for layer in stats) / n_ff
