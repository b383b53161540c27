"""Which rank each layer's predictors get: short trainings say how many neurons a rank lets through.

A token costs a layer the bytes of its predictors and those of the neurons that are let through: gate of all of these,
up and down of the active ones. Chosen are the ranks with which all layers together cost least, or, where the predictors
may take a number of bytes only, those that cost least among those that take no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from tsconv.errors import TsconvError
from tsconv.predictor.train.calibrate import Figures, together
from tsconv.predictor.train.fit import Fit, Recipe, Start, State
from tsconv.predictor.train.rounding import Types
from tsconv.predictor.train.samples import Samples
from tsconv.transform.quantize import row_bytes

SHARES = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)  # of n_embd: the ranks that are tried
STEP = 32  # ranks are multiples of it: blocks of all types that panels have
FIRST_EPOCHS, EPOCHS = 8, 3  # of the highest rank, and of each that is cut from the one above
PROBE_SHARE, PROBE_TOKENS = 8, 65_536  # a probe takes one token in so many, or so many where that is fewer
PROBE_EXPERTS = 2
UNROUNDED = Types(GGMLQuantizationType.F32, GGMLQuantizationType.F32)


@dataclass(frozen=True)
class Layout:
    """Sizes of a model: layers, FFNs (experts) of a layer, those a token uses, dimensions, bytes of a neuron."""

    n_layer: int
    n_ffn: int
    n_used: int
    n_embd: int
    n_ff: int
    neuron_bytes: int

    @property
    def sample_bytes(self) -> int:
        """Of a token's samples in a layer."""
        return self.n_used * (2 * self.n_embd + self.n_ff)

    def predictor_bytes(self, rank: int, types: Types) -> int:
        """Of one FFN's predictor."""
        return rank * row_bytes(types.fc1, self.n_embd) + self.n_ff * row_bytes(types.fc2, rank)

    def read_bytes(self, figures: Figures) -> float:
        """Of the weights of one FFN that a token reads."""
        return self.neuron_bytes * (figures.predicted + 2 * figures.both) / 3


def candidates(n_embd: int) -> list[int]:
    """Ranks that are tried, ascending."""
    found = {max(STEP, round(share * n_embd / STEP) * STEP) for share in SHARES}
    return sorted(rank for rank in found if rank <= max(3 * STEP, n_embd // 2))


def probe_tokens(tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """The chunks of a short training."""
    chunk = tokens.shape[1]
    n = max(min(len(tokens), -(-PROBE_TOKENS // chunk)), len(tokens) // PROBE_SHARE)
    return tokens[:n]


def probe_ranks(
    experts: Sequence[tuple[Samples, Samples, npt.NDArray[np.float64]]],
    n_embd: int,
    missed: float,
    seed: int,
    device: str,
) -> dict[int, Figures]:
    """What predictors of each candidate rank do in a layer.

    The highest rank is trained; each lower one begins with the hidden activations of the one above that add most.

    Args:
        experts: training samples, held-out samples and |down_i|^2 of some FFNs of the layer.
    """
    found: dict[int, list[Figures]] = {}
    for trained, held, down in experts:
        start = None
        for rank in reversed(candidates(n_embd)):
            recipe = Recipe(rank, UNROUNDED, missed, FIRST_EPOCHS if start is None else EPOCHS, seed, device)
            fit = Fit(trained, held, down, recipe, None if start is None else _cut(start, rank))
            found.setdefault(rank, []).append(fit.run().figures)
            start = fit.state
    return {rank: together(parts) for rank, parts in found.items()}


def _cut(state: State, rank: int) -> Start:
    """fc1, fc2 and b of a trained predictor without the hidden activations that add least: by the length of their row
    of fc1 times that of their column of fc2."""
    fc1, fc2, b = (p.cpu().numpy() for p in state.parameters)
    size = np.sqrt(np.square(fc1).sum(axis=1) * np.square(fc2).sum(axis=0))
    kept = np.sort(np.argsort(-size, kind="stable")[:rank])
    return fc1[kept], fc2[:, kept], b


def check_budget(layout: Layout, types_of: Callable[[int], Types], budget: int) -> None:
    """Raises TsconvError where not even predictors of the lowest rank fit into the budget, in bytes."""
    lowest = candidates(layout.n_embd)[0]
    needed = layout.n_layer * layout.n_ffn * layout.predictor_bytes(lowest, types_of(lowest))
    if budget < needed:
        raise TsconvError(
            f"the budget is too small for predictors of rank {lowest}",
            expected=f"--budget {-(-needed // 1000)}kB or more",
            found=f"{budget:,} bytes",
        )


def choose_ranks(
    probes: Sequence[dict[int, Figures]],
    layout: Layout,
    types_of: Callable[[int], Types],
    budget: int | None,
) -> list[int]:
    """The rank of each layer.

    Args:
        probes: of each layer.
        types_of: rank -> the types its matrices are stored in.
        budget: bytes of all predictors, which `check_budget` took, or None.
    """
    ranks = sorted(probes[0])
    sizes = np.array([layout.predictor_bytes(rank, types_of(rank)) for rank in ranks])
    reads = np.array([[layout.read_bytes(probe[rank]) for rank in ranks] for probe in probes])
    cost, taken = layout.n_used * (sizes + reads), layout.n_ffn * sizes

    def chosen(weight: float) -> npt.NDArray[np.int64]:
        return (cost + weight * taken).argmin(axis=1)

    def total(weight: float) -> int:
        return int(taken[chosen(weight)].sum())

    weight = 0.0
    if budget is not None and total(0.0) > budget:
        low, high = 0.0, 1.0
        while total(high) > budget:
            high *= 2
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if total(middle) > budget else (low, middle)
        weight = high
    return [ranks[k] for k in chosen(weight)]
