"""The fastest way through a chain of stages, each with options on two devices, within two budgets.

A stage (a layer, the output) takes one option; its time adds up, and so do its bytes of VRAM and RAM. Where the device
changes from one stage to the next a move is paid. This is a multiple-choice knapsack with two constraints along a
chain. Its Lagrangian dual, with a price per byte of VRAM and of RAM, gives a lower bound; with the prices at hand, a
search over partial chains (labels) drops those that are dominated, or whose bound shows that they lead to nothing
faster than what is known. Nothing else is dropped if the limits allow it, and then the result is the optimum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tsconv.placement.cost import Floats
from tsconv.placement.frontier import Ints, undominated

Prices = tuple[float, float]  # seconds per byte of VRAM and of RAM

CHUNK = 1 << 21  # label-option pairs at a time
ROUNDS = 60  # of the search for prices: the polygon that holds them shrinks by a third or more in each
SURVIVORS = 8  # labels, as a multiple of the limit, that are looked through for dominated ones
WORK = 10_000_000  # label-option pairs at which an exhaustive search gives up: seconds


@dataclass(frozen=True)
class Options:
    """What a stage may do on one device: int64 [n] bytes, float64 [n] seconds."""

    vram: Ints
    ram: Ints
    seconds: Floats

    def priced(self, prices: Prices) -> Floats:
        return self.seconds + prices[0] * self.vram + prices[1] * self.ram


@dataclass(frozen=True)
class Chain:
    """Stages in order, each with its options on device 0 and on device 1; the way starts on device 0."""

    stages: list[tuple[Options, Options]]
    move: float  # seconds, where the device changes
    vram: int  # budgets, bytes
    ram: int


@dataclass(frozen=True)
class Way:
    """One option per stage: (device, index)."""

    seconds: float
    picks: list[tuple[int, int]]


def reduced(costs: Floats, move: float) -> tuple[Floats, Floats]:
    """Cheapest ways through a chain without budgets.

    Args:
        costs: [n, 2], of the cheapest option of each stage on each device.

    Returns:
        to [n + 1, 2]: up to a stage, having left it on a device; after [n + 1, 2]: through all stages from there.
    """
    moves = np.array([[0.0, move], [move, 0.0]])
    n = len(costs)
    to, after = np.zeros((n + 1, 2)), np.zeros((n + 1, 2))
    to[0] = 0.0, math.inf
    for i in range(n):
        to[i + 1] = (to[i][:, None] + moves).min(axis=0) + costs[i]
    for i in reversed(range(n)):
        after[i] = (moves + (costs[i] + after[i + 1])[None, :]).min(axis=1)
    return to, after


def _cheapest(chain: Chain, prices: Prices) -> Floats:
    return np.array(
        [[o.priced(prices).min() if len(o.vram) else math.inf for o in stage] for stage in chain.stages], np.float64
    )


def lower_bound(costs: Floats, move: float, prices: Prices, budgets: tuple[int, int]) -> float:
    """No way within the budgets takes less than this: `costs` as for `reduced`, with `prices` in them."""
    return float(reduced(costs, move)[1][0, 0]) - prices[0] * budgets[0] - prices[1] * budgets[1]


def best_prices(chain: Chain, most: Prices) -> tuple[Prices, float]:
    """Prices up to `most` with the highest lower bound that was found, and that bound.

    The bound is a concave function of the prices. Its supergradient at a point (bytes used there less the budgets)
    cuts away a half-plane without the maximum; the next point is the centre of gravity of what is left.
    """
    polygon = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    scale = np.array(most)
    best, bound = (0.0, 0.0), -math.inf
    points = [np.zeros(2)]
    for _ in range(ROUNDS):
        point = points.pop() if points else _centroid(polygon)
        prices = (float(point[0] * scale[0]), float(point[1] * scale[1]))
        value, used = _relaxed(chain, prices)
        if value > bound:
            best, bound = prices, value
        slope = (used - (chain.vram, chain.ram)) * scale
        if not slope.any():
            break
        polygon = _clipped(polygon, slope, float(slope @ point))
        if len(polygon) < 3:
            break
    return best, bound


def _relaxed(chain: Chain, prices: Prices) -> tuple[float, Floats]:
    """(lower bound at these prices, bytes of VRAM and RAM of the way that attains it)."""
    costs = _cheapest(chain, prices)
    after = reduced(costs, chain.move)[1]
    used, device = np.zeros(2), 0
    for i, stage in enumerate(chain.stages):
        device = int(np.argmin([costs[i, a] + after[i + 1, a] + chain.move * (a != device) for a in (0, 1)]))
        option = stage[device]
        if not len(option.vram):
            break  # no way at all: the bound is infinite
        k = int(option.priced(prices).argmin())
        used += option.vram[k], option.ram[k]
    return float(after[0, 0]) - prices[0] * chain.vram - prices[1] * chain.ram, used


def _centroid(polygon: Floats) -> Floats:
    x, y = (polygon - polygon[0]).T
    nx, ny = np.roll(x, -1), np.roll(y, -1)
    cross = x * ny - nx * y
    area = cross.sum()
    if abs(area) < 1e-300:
        return polygon.mean(axis=0)
    return polygon[0] + np.array([((x + nx) * cross).sum(), ((y + ny) * cross).sum()]) / (3 * area)


def _clipped(polygon: Floats, normal: Floats, offset: float) -> Floats:
    """The part of a convex polygon [n, 2] where normal . p >= offset."""
    side = polygon @ normal - offset
    kept = []
    for p, q, a, b in zip(polygon, np.roll(polygon, -1, 0), side, np.roll(side, -1), strict=True):
        if a >= 0:
            kept.append(p)
        if (a > 0 > b) or (a < 0 < b):
            kept.append(p + (q - p) * (a / (a - b)))
    return np.array(kept).reshape(-1, 2)


@dataclass(frozen=True)
class _Labels:
    """Ways through the first stages that end on one device. `before` is the device and `parent` the label they extend
    by `option`; `bound`: no whole way from here is faster."""

    vram: Ints
    ram: Ints
    seconds: Floats
    bound: Floats
    before: Ints
    parent: Ints
    option: Ints

    @classmethod
    def start(cls, n: int) -> _Labels:
        zeros = np.zeros(n, np.int64)
        return cls(zeros, zeros, np.zeros(n), np.zeros(n), zeros, zeros, zeros)

    def __len__(self) -> int:
        return len(self.vram)

    def at(self, k: Ints) -> _Labels:
        return _Labels(*(getattr(self, name)[k] for name in self.__dataclass_fields__))

    @staticmethod
    def joined(parts: list[_Labels]) -> _Labels:
        return _Labels(*(np.concatenate([getattr(p, name) for p in parts]) for name in _Labels.__dataclass_fields__))


def search(
    chain: Chain, prices: Prices, below: float, max_options: int | None, max_labels: int
) -> tuple[Way | None, bool]:
    """The fastest way that takes less than `below` seconds.

    Args:
        prices: from `best_prices`; they only steer the search.
        max_options: most options of a stage and device that are tried; None: all, and the search gives up where more
            than `max_labels` labels are left, or when it takes too long.
        max_labels: most labels of a stage and device that are kept.

    Returns:
        the way, None if there is none or it was missed; whether nothing was left out on account of the limits.
    """
    to, after = reduced(_cheapest(chain, prices), chain.move)
    offset = -prices[0] * chain.vram - prices[1] * chain.ram
    labels = (_Labels.start(1), _Labels.start(0))
    history = []
    exhaustive, work = True, 0
    for i, stage in enumerate(chain.stages):
        new = []
        for a, options in enumerate(stage):
            rest = after[i + 1, a] + offset
            bound = min(to[i, s] + chain.move * (s != a) for s in (0, 1)) + options.priced(prices) + rest
            tried = np.flatnonzero(bound < below)
            work += len(tried) * sum(map(len, labels))
            if max_options is None and work > WORK:
                return None, False
            if max_options is not None and len(tried) > max_options:
                k = _spread(options.vram[tried], options.ram[tried], bound[tried], max_options)
                tried, exhaustive = tried[k], False
            found = [_Labels.start(0)]
            for s in (0, 1):
                move = chain.move * (s != a)
                step = max(1, CHUNK // max(1, len(tried)))
                for begin in range(0, len(labels[s]), step):
                    block = np.arange(begin, min(begin + step, len(labels[s])))
                    found.append(_extended(chain, labels[s], s, block, options, tried, move, prices, rest, below))
                    if sum(map(len, found)) > SURVIVORS * max_labels:
                        if max_options is None:
                            found = [_best(_Labels.joined(found))]
                        else:
                            found, exhaustive = [_thinned(_Labels.joined(found), SURVIVORS * max_labels)], False
                    if max_options is None and sum(map(len, found)) > SURVIVORS * max_labels:
                        return None, False
            survivors = _best(_Labels.joined(found))
            if len(survivors) > max_labels:
                if max_options is None:
                    return None, False
                survivors, exhaustive = _thinned(survivors, max_labels), False
            new.append(survivors)
        history.append(tuple(new))
        labels = (new[0], new[1])
    ends = [(float(labels[a].seconds.min()), a) for a in (0, 1) if len(labels[a])]
    seconds, device = min(ends, default=(math.inf, 0))
    if seconds >= below:  # the bounds let such ways through where budgets are left over
        return None, exhaustive
    return Way(seconds, _picks(history, device, int(labels[device].seconds.argmin()))), exhaustive


def _picks(history: list[tuple[_Labels, ...]], device: int, label: int) -> list[tuple[int, int]]:
    """(device, option) of each stage on the way that ends with a label of the last one."""
    picks = []
    for stage_labels in reversed(history):
        labels = stage_labels[device]
        picks.append((device, int(labels.option[label])))
        device, label = int(labels.before[label]), int(labels.parent[label])
    return picks[::-1]


def _extended(
    chain: Chain,
    labels: _Labels,
    device: int,
    block: Ints,
    options: Options,
    tried: Ints,
    move: float,
    prices: Prices,
    rest: float,
    below: float,
) -> _Labels:
    """The labels `block` of `device`, each extended by each option that is tried, if that fits and may be faster."""
    vram = labels.vram[block][:, None] + options.vram[tried]
    ram = labels.ram[block][:, None] + options.ram[tried]
    seconds = (labels.seconds[block] + move)[:, None] + options.seconds[tried]
    bound = seconds + prices[0] * vram + prices[1] * ram + rest
    row, column = np.nonzero((vram <= chain.vram) & (ram <= chain.ram) & (bound < below))
    return _Labels(
        vram[row, column],
        ram[row, column],
        seconds[row, column],
        bound[row, column],
        np.full(len(row), device, np.int64),
        block[row],
        tried[column],
    )


def _best(labels: _Labels) -> _Labels:
    return labels.at(undominated(labels.vram, labels.ram, labels.seconds))


def _thinned(labels: _Labels, n: int) -> _Labels:
    return labels if len(labels) <= n else labels.at(_spread(labels.vram, labels.ram, labels.bound, n))


def _spread(vram: Ints, ram: Ints, bound: Floats, n: int) -> Ints:
    """`n` indices of entries that use different amounts of VRAM and RAM: the best of each cell of a grid.

    By the bound alone they would all be variations of one way, which the budgets may cut off later.
    """
    varied = [values for values in (vram, ram) if values.min() < values.max()]
    side = n if len(varied) < 2 else math.isqrt(n)
    cell = np.zeros(len(vram), np.int64)
    for values in varied:
        least = values.min()
        cell = cell * side + ((values - least) / (values.max() - least) * (side - 1)).round().astype(np.int64)
    best = np.full(side ** len(varied), math.inf)
    np.minimum.at(best, cell, bound)
    chosen = np.flatnonzero(bound == best[cell])
    chosen = chosen[np.unique(cell[chosen], return_index=True)[1]]
    if len(chosen) == n:
        return chosen
    rest = bound.copy()
    rest[chosen] = math.inf
    return np.concatenate((chosen, np.argpartition(rest, n - len(chosen))[: n - len(chosen)]))
