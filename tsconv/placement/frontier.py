"""The ways to split the neurons of one layer among GPU, RAM and disk that are worth considering.

All neurons of a layer have the same size, so a split is its number of neurons in each place and the heat that they
cover. Small layers are enumerated completely; of large ones a grid is taken, along the order in which heat per neuron
falls over all FFNs of the layer together.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tsconv.placement.cost import Floats, Layer, Rates

Ints = npt.NDArray[np.int64]

COMPLETE = 100_000  # splits of a layer that are enumerated
GRID_PAIRS = 96  # positions of the grid where GPU and RAM prefixes are chosen, both: 4,656 splits
GRID = 8192  # where the rest must be in RAM

NONE, SPLIT, ALL = 0, 1, 2  # how many of the neurons the GPU computes


def pooled(heat: Floats) -> Floats:
    """The closest non-increasing sequence: float64 [n], each value the mean of a run of `heat`.

    Its prefix sums are the least concave majorant of those of `heat`, equal to them where a run ends. Neighbours that
    increase are pooled until none do (pool adjacent violators; the order of pooling does not change the result).
    """
    sums, sizes = heat.astype(np.float64), np.ones(len(heat), np.int64)
    while True:
        means = sums / sizes
        starts = np.flatnonzero(np.concatenate(([True], means[1:] <= means[:-1])))
        if len(starts) == len(sums):
            return np.repeat(means, sizes)
        sums, sizes = np.add.reduceat(sums, starts), np.add.reduceat(sizes, starts)


class HotOrder:
    """The neurons of a layer, all FFNs together, so that any beginning of it is a prefix of each FFN.

    Attributes, [n_ffn * n_ff]:
        ffn, row: int32, FFN of the neuron and its position there.
        heat: float64, expected bytes read of it per token.
        slope: float64, `heat` made non-increasing: what the order follows.
    """

    def __init__(self, heat: Floats) -> None:
        slope = np.stack([pooled(ffn) for ffn in heat]).ravel()
        order = np.argsort(-slope, kind="stable")
        self.ffn, self.row = (order // heat.shape[1]).astype(np.int32), (order % heat.shape[1]).astype(np.int32)
        self.heat, self.slope = heat.ravel()[order], slope[order]
        self.n_ffn = heat.shape[0]

    def counts(self, positions: Ints) -> Ints:
        """Neurons of each FFN among the first `positions` of the order: int64 [len(positions), n_ffn]."""
        ends = np.empty((len(positions), self.n_ffn), np.int64)
        for e in range(self.n_ffn):
            ends[:, e] = np.searchsorted(np.flatnonzero(self.ffn == e), positions)
        return ends

    def beyond(self, prefix: tuple[int, ...], limit: int) -> Ints:
        """The first `limit` positions of the order whose neurons lie outside these prefixes of the FFNs."""
        return np.flatnonzero(self.row >= np.array(prefix)[self.ffn])[:limit]


@dataclass(frozen=True)
class Splits:
    """Ways to split a layer's neurons, n of them.

    Attributes:
        gpu, ram: int64 [n, n_ffn], neurons of each FFN, as in LayerPlacement.
        vram_bytes, ram_bytes: int64 [n]; the latter 0 where RAM is ample.
        seconds: float64 [n], GPU and CPU in parallel.
        kind: int8 [n], NONE, SPLIT or ALL.
        complete: whether no way within the budgets is missing but for dominated ones.
    """

    gpu: Ints
    ram: Ints
    vram_bytes: Ints
    ram_bytes: Ints
    seconds: Floats
    kind: npt.NDArray[np.int8]
    complete: bool


def splits(layer: Layer, hot: HotOrder, rates: Rates, vram: int, ram: int | None) -> Splits:
    """The undominated splits that fit into `vram` and `ram` bytes.

    Args:
        ram: None where RAM is ample: it holds all that the GPU does not, and its bytes are not counted.
    """
    n_ffn, n_ff = layer.heat.shape
    pairs = ram is not None and rates.has_disk  # the RAM prefix is to be chosen, too
    per_ffn = (n_ff + 1) * (n_ff + 2) // 2 if pairs else n_ff + 1
    complete = per_ffn**n_ffn <= COMPLETE
    if not rates.has_gpu or vram < layer.neuron_bytes:
        vram = 0  # not one neuron fits
    gpu, ram_end = _all_prefixes(n_ffn, n_ff, pairs) if complete else _grid(layer, hot, rates, pairs, vram)
    heat_gpu, heat_disk = np.zeros(len(gpu)), np.zeros(len(gpu))
    for e in range(n_ffn):
        covered = np.concatenate(([0.0], np.cumsum(layer.heat[e])))
        heat_gpu += covered[gpu[:, e]]
        heat_disk += covered[-1] - covered[ram_end[:, e]]
    n_gpu, n_ram = gpu.sum(axis=1), (ram_end - gpu).sum(axis=1)
    vram_bytes, ram_bytes = n_gpu * layer.neuron_bytes, n_ram * (layer.neuron_bytes if ram is not None else 0)
    heat_cpu = np.maximum(0.0, layer.heat.sum() - heat_gpu - heat_disk)
    seconds = np.maximum(heat_gpu * rates.gpu, heat_cpu * rates.random + heat_disk * rates.disk)
    kind = np.where(n_gpu == 0, NONE, np.where(n_gpu == layer.n_neurons, ALL, SPLIT)).astype(np.int8)
    fits = (vram_bytes <= vram) & (ram_bytes <= (ram or 0))
    kept = [_among(np.flatnonzero(fits & (kind == k)), vram_bytes, ram_bytes, seconds) for k in (NONE, SPLIT, ALL)]
    k = np.concatenate(kept)
    return Splits(gpu[k], ram_end[k] - gpu[k], vram_bytes[k], ram_bytes[k], seconds[k], kind[k], complete)


def _all_prefixes(n_ffn: int, n_ff: int, pairs: bool) -> tuple[Ints, Ints]:
    """Every (GPU prefix, RAM prefix's end) of every FFN: two int64 [n, n_ffn]."""
    if pairs:
        begin, end = np.triu_indices(n_ff + 1)
    else:
        begin = np.arange(n_ff + 1)
        end = np.full(n_ff + 1, n_ff)
    choice = np.indices((len(begin),) * n_ffn).reshape(n_ffn, -1).T
    return begin[choice], end[choice]


def _grid(layer: Layer, hot: HotOrder, rates: Rates, pairs: bool, vram: int) -> tuple[Ints, Ints]:
    """Positions of the hot order, half of them evenly spaced, half evenly in heat, and where GPU and CPU balance."""
    n = layer.n_neurons
    covered = np.concatenate(([0.0], np.cumsum(hot.heat)))
    half = (GRID_PAIRS if pairs else GRID) // 2
    balance = int(np.searchsorted(covered * (rates.gpu + rates.random), covered[-1] * rates.random))
    positions = np.unique(
        np.clip(
            np.concatenate(
                (
                    np.linspace(0, n, half).round().astype(np.int64),
                    np.searchsorted(covered, np.linspace(0, covered[-1], half)),
                    [0, 1, n - 1, n, balance - 1, balance, vram // layer.neuron_bytes],
                )
            ),
            0,
            n,
        )
    )
    counts = hot.counts(positions)
    if pairs:
        begin, end = np.triu_indices(len(positions))
        return counts[begin], counts[end]
    return counts, np.broadcast_to(counts[-1], counts.shape)


def _among(k: Ints, vram: Ints, ram: Ints, seconds: Floats) -> Ints:
    return k[undominated(vram[k], ram[k], seconds[k])]


def undominated(vram: Ints, ram: Ints, seconds: Floats) -> Ints:
    """Indices of the entries that no other one equals or beats in all three; of equals the first is kept.

    A sweep by `vram` over a staircase of the (ram, seconds) that nothing so far beats: ram rises, seconds fall.
    """
    order = np.lexsort((seconds, ram, vram))
    if not len(ram) or ram.min() == ram.max():  # one resource only
        fastest = np.minimum.accumulate(seconds[order])
        return order[np.concatenate(([True], seconds[order][1:] < fastest[:-1]))[: len(order)]]
    kept: list[int] = []
    rams: list[int] = []
    times: list[float] = []
    for k, r, t in zip(order.tolist(), ram[order].tolist(), seconds[order].tolist(), strict=True):
        at = bisect_right(rams, r)
        if at and times[at - 1] <= t:
            continue
        begin = at - 1 if at and rams[at - 1] == r else at
        end = at
        while end < len(times) and times[end] >= t:
            end += 1
        rams[begin:end] = [r]
        times[begin:end] = [t]
        kept.append(k)
    return np.array(kept, np.int64)
