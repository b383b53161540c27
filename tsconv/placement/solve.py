"""The placement with the least expected time per token (docs/placement.md).

Layer by layer the splits of the neurons (frontier.py) are combined with the devices of attention and predictor to the
options of a chain (search.py), whose last stage is the output matrix. What a grid left unused is given to the neurons
that gain most by it. The result comes with a lower bound that holds for every placement within the budgets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from tsconv.errors import TsconvError
from tsconv.placement.cost import Estimate, Floats, Layer, Rates, Workload, evaluate, exchange, neuron_seconds
from tsconv.placement.file import CPU, GPU, Device, LayerPlacement
from tsconv.placement.frontier import ALL, NONE, SPLIT, HotOrder, Ints, Splits, splits
from tsconv.placement.search import Chain, Options, Prices, Way, best_prices, lower_bound, search

DEVICES = (CPU, GPU)

# (most options, most labels): a quick search whose result bounds the next one, and a thorough one.
SEARCHES = ((48, 256), (256, 1024))
EXACT_LABELS = 30_000  # of the search that proves the optimum, where the splits are complete
ROUNDING = 1e-13  # relative: sums of a few thousand float64


@dataclass(frozen=True)
class Solution:
    """A placement and what is known of it.

    Attributes:
        output: device of the output norm and matrix.
        estimate: what it costs.
        lower_bound: seconds; no placement within the budgets takes less.
        optimal: whether the search was exhaustive: then it is the fastest but for rounding.
    """

    layers: tuple[LayerPlacement, ...]
    output: Device
    estimate: Estimate
    lower_bound: float
    optimal: bool

    @property
    def gap(self) -> float:
        """How much faster than this the fastest placement may be, as a share of the time."""
        return 0.0 if self.optimal else max(0.0, 1 - self.lower_bound / self.estimate.seconds)


def whole(work: Workload, device: Device) -> tuple[LayerPlacement, ...]:
    """Everything on one device; with the CPU, all in RAM."""
    nothing, everything = (0,) * len(work.layers[0].heat), tuple(map(len, work.layers[0].heat))
    on_gpu = device == GPU
    predictor = device if work.has_predictor else CPU
    gpu, ram = (everything, nothing) if on_gpu else (nothing, everything)
    return tuple(LayerPlacement(device, predictor, gpu, ram) for _ in work.layers)


def solve(work: Workload, rates: Rates, vram: int, ram: int) -> Solution:
    """Minimises the expected time per token.

    Args:
        vram, ram: budgets in bytes.

    Raises:
        TsconvError: the model does not fit.
    """
    vram = vram if rates.has_gpu else 0
    ample = ram >= evaluate(work, rates, whole(work, CPU), CPU).ram
    _refuse_too_small(work, rates, vram, ram)
    problem = Problem(work, rates, vram, None if ample else ram)
    chain = problem.chain
    largest = 2 * max(rates.sequential, rates.random, rates.disk)
    prices, bound = best_prices(chain, (largest, largest))

    way: Way | None = None
    for max_options, max_labels in SEARCHES:
        found, optimal = search(chain, prices, way.seconds if way else math.inf, max_options, max_labels)
        way = found or way
        if optimal:
            break
    if problem.complete and not optimal:
        below = way.seconds * (1 - ROUNDING) if way else math.inf
        found, optimal = search(chain, prices, below, None, EXACT_LABELS)
        way = found or way
    if way is None:  # blocks are held whole
        raise TsconvError(
            "what every token reads cannot be divided between the budgets",
            expected="attention and predictor of each layer, and the output, whole in VRAM or in RAM",
            found=f"{vram:,} and {ram:,} bytes for {_always_read(work):,}",
            fix="raise --ram-budget or --vram-budget",
        )
    if not problem.complete:
        optimal = False
        # the grid's best prices may be far from the best of all lengths; without prices the bound is positive
        bounds = [lower_bound(problem.relaxed(p), chain.move, p, (chain.vram, chain.ram)) for p in (prices, (0.0, 0.0))]
        bound = max(bounds)
    layers, output = problem.filled(way)
    estimate = evaluate(work, rates, layers, output)
    bound = min(estimate.seconds, (bound + work.embedding_read * rates.random) * (1 - ROUNDING))
    return Solution(layers, output, estimate, estimate.seconds if optimal else bound, optimal)


def _refuse_too_small(work: Workload, rates: Rates, vram: int, ram: int) -> None:
    """Before anything is computed: what must be held somewhere but is not."""
    if ram < work.embedding_bytes or vram + ram < _always_read(work):
        raise TsconvError(
            "the budgets do not hold what every token reads: embeddings, attention, KV cache, predictors, output",
            expected=f"{_always_read(work):,} bytes in VRAM and RAM, {work.embedding_bytes:,} of them in RAM",
            found=f"{vram:,} and {ram:,}",
            fix="raise --ram-budget or --vram-budget, or lower --ctx-size",
        )
    everything = _always_read(work) + sum(layer.n_neurons * layer.neuron_bytes for layer in work.layers)
    if not rates.has_disk and vram + ram < everything:
        raise TsconvError(
            "the model does not fit, and the machine's profile has no disk to read the rest from",
            expected=f"VRAM and RAM of {everything:,} bytes together",
            found=f"{vram + ram:,}",
            fix="raise --ram-budget or --vram-budget, or add [disk] to the machine profile",
        )


def _always_read(work: Workload) -> int:
    layers = sum(layer.attention_held + layer.predictor_bytes for layer in work.layers)
    return work.embedding_bytes + work.output_ram + layers


class Problem:
    """A workload within budgets as a chain of options. `ram` is None where it is ample."""

    def __init__(self, work: Workload, rates: Rates, vram: int, ram: int | None) -> None:
        self.work, self.rates, self.vram = work, rates, vram
        self.ram = None if ram is None else ram - work.embedding_bytes
        self.hot = [HotOrder(layer.heat) for layer in work.layers]
        self.splits = [
            splits(layer, hot, rates, vram, self.ram) for layer, hot in zip(work.layers, self.hot, strict=True)
        ]
        self.complete = all(s.complete for s in self.splits)
        self.predictors = DEVICES if work.has_predictor else (CPU,)
        stages = [
            (self._options(layer, s, CPU), self._options(layer, s, GPU))
            for layer, s in zip(work.layers, self.splits, strict=True)
        ]
        stages.append((self._output(CPU), self._output(GPU)))
        self.chain = Chain(stages, rates.transfer(work.state_bytes), vram, self.ram or 0)

    def _block(self, device: Device, n_bytes: int) -> tuple[int, int]:
        """(VRAM, RAM) of something that is held whole."""
        return (n_bytes, 0) if device == GPU else (0, n_bytes if self.ram is not None else 0)

    def _dense(self, layer: Layer, attention: Device, predictor: Device) -> tuple[int, int, float]:
        """VRAM, RAM and seconds of attention and predictor."""
        a, p = self._block(attention, layer.attention_held), self._block(predictor, layer.predictor_bytes)
        rate = self.rates.dense
        seconds = layer.attention_read * rate(attention) + layer.predictor_read * rate(predictor)
        return a[0] + p[0], a[1] + p[1], seconds

    def _exchanges(self, attention: Device, predictor: Device) -> Floats:
        """Seconds of the transfers, by kind of split."""
        parts = ((kind != NONE, kind != ALL) for kind in (NONE, SPLIT, ALL))
        return np.array([exchange(self.work, self.rates, attention, predictor, *part)[1] for part in parts])

    def _options(self, layer: Layer, s: Splits, attention: Device) -> Options:
        """For each device of the predictor, in turn, all splits."""
        if attention == GPU and not self.rates.has_gpu:
            return _options([])
        rows = []
        for predictor in self.predictors:
            vram, ram, seconds = self._dense(layer, attention, predictor)
            if predictor == GPU and not self.rates.has_gpu:
                vram = self.vram + 1  # never
            extra = seconds + self._exchanges(attention, predictor)[s.kind]
            rows.append((s.vram_bytes + vram, s.ram_bytes + ram, s.seconds + extra))
        return _options(rows)

    def _output(self, device: Device) -> Options:
        if device == CPU:
            ram = self._block(CPU, self.work.output_ram)[1]
            return _options([(np.zeros(1, np.int64), np.array([ram]), np.array([self._product(CPU)]))])
        if not self.rates.has_gpu:
            return _options([])
        seconds = self._product(GPU) + self.rates.transfer(self.work.logits_bytes)
        return _options([(np.array([self.work.output_bytes]), np.zeros(1, np.int64), np.array([seconds]))])

    def _product(self, device: Device) -> float:
        return self.work.output_bytes * self.rates.dense(device)

    # ---- the bound at full resolution

    def relaxed(self, prices: Prices) -> Floats:
        """Least priced time of each stage on each device, over more than all placements: [n_layer + 1, 2]."""
        costs = np.full((len(self.work.layers) + 1, 2), math.inf)
        for n, layer in enumerate(self.work.layers):
            neurons = self.relaxed_neurons(layer, self.hot[n], prices)
            for a, attention in enumerate(DEVICES[: 1 + self.rates.has_gpu]):
                for predictor in self.predictors[: 1 + self.rates.has_gpu]:
                    vram, ram, seconds = self._dense(layer, attention, predictor)
                    extra = seconds + prices[0] * vram + prices[1] * ram + self._exchanges(attention, predictor)
                    costs[n, a] = min(costs[n, a], float((neurons + extra).min()))
        for a, options in enumerate(self.chain.stages[-1]):
            costs[-1, a] = options.priced(prices).min() if len(options.vram) else math.inf
        return costs

    def relaxed_neurons(self, layer: Layer, hot: HotOrder, prices: Prices) -> Floats:
        """Least priced time of a layer's neurons, by kind of split.

        With K neurons on the GPU that cover the heat S, and D seconds of disk for what is neither there nor in RAM,
        the time is max(S g, (W - S) r + D). S is at most S_K, the first K slopes of the hot order, and up to where
        both balance more is better. So the time is at least max((W - S_K) r + D, b (W r + D)), b = g / (g + r). Both
        grow with D, which is at least that of the slopes beyond the end of the RAM prefix.
        """
        rates, size = self.rates, layer.neuron_bytes
        vram_price, ram_price = prices[0] * size, prices[1] * size if self.ram is not None else 0.0
        heat = hot.slope
        n = len(heat)
        covered = np.concatenate(([0.0], np.cumsum(heat)))
        total = covered[-1]
        disk_rate = rates.disk - rates.random  # beyond what the CPU pays anyway
        k = np.arange(0, min(n, self.vram // size) + 1 if rates.has_gpu else 1)
        b = rates.gpu / (rates.gpu + rates.random)
        if self.ram is None or not rates.has_disk:
            ends = [np.full(len(k), n)]
        else:
            disk = (total - covered) * disk_rate  # by the end of the RAM prefix, falling
            crossing = np.searchsorted(-disk, -((b * total - (total - covered[k])) * rates.random / (1 - b)))
            threshold = [np.searchsorted(-heat * disk_rate * weight, -ram_price) for weight in (1.0, b)]
            lengths = (threshold[0], threshold[1], crossing - 1, crossing)
            ends = [np.asarray(np.clip(length, k, n)) for length in lengths]
        best = np.full(len(k), math.inf)
        for end in ends:
            disk_seconds = (total - covered[end]) * disk_rate
            cpu = (total - covered[k]) * rates.random + disk_seconds
            balanced = np.where(k > 0, b * (total * rates.random + disk_seconds), 0.0)
            best = np.minimum(best, np.maximum(cpu, balanced) + vram_price * k + ram_price * (end - k))
        costs = np.full(3, math.inf)
        costs[NONE] = best[0]
        costs[SPLIT] = best[1:n].min(initial=math.inf)
        if rates.has_gpu and n * size <= self.vram:
            costs[ALL] = total * rates.gpu + vram_price * n
        return costs

    # ---- from options to a placement

    def filled(self, way: Way) -> tuple[tuple[LayerPlacement, ...], Device]:
        """The placement of a way; what it leaves of the budgets goes to the neurons that gain most, hottest first."""
        layers = [
            self._placed(n, DEVICES[a], option) for n, (a, option) in enumerate(way.picks[: len(self.work.layers)])
        ]
        output = DEVICES[way.picks[-1][0]]
        before = tuple(layers)
        self._fill_vram(layers, output)
        if self.ram is not None and self.rates.has_disk:
            self._fill_ram(layers, output, while_it_gains=True)
            self._fill_ram(layers, output, while_it_gains=False)
        after = tuple(layers)
        seconds = [evaluate(self.work, self.rates, places, output).seconds for places in (before, after)]
        return (after if seconds[1] <= seconds[0] else before), output

    def _placed(self, n: int, attention: Device, option: int) -> LayerPlacement:
        s = self.splits[n]
        predictor, k = divmod(option, len(s.kind))
        return LayerPlacement(attention, self.predictors[predictor], tuple(s.gpu[k].tolist()), tuple(s.ram[k].tolist()))

    def _fill_vram(self, layers: list[LayerPlacement], output: Device) -> None:
        """More neurons for the GPU, where it has some already and is not the slower one yet."""
        left = self.vram - evaluate(self.work, self.rates, layers, output).vram
        moves = []
        for n, (layer, place) in enumerate(zip(self.work.layers, layers, strict=True)):
            spare = layer.n_neurons - sum(place.gpu) - 1  # one neuron stays: the layer remains split
            if not sum(place.gpu) or spare <= 0:
                continue
            hot = self.hot[n]
            k = hot.beyond(place.gpu, min(spare, left // layer.neuron_bytes))
            end = np.add(place.gpu, place.ram)
            rate = np.where(hot.row[k] < end[hot.ffn[k]], self.rates.random, self.rates.disk)
            gpu, ram, disk = neuron_seconds(self.rates, layer, place)
            ahead = gpu + np.cumsum(hot.heat[k]) * self.rates.gpu <= ram + disk - np.cumsum(hot.heat[k] * rate)
            k, rate = k[: _true_prefix(ahead)], rate[: _true_prefix(ahead)]
            moves.append((n, hot.ffn[k], hot.slope[k] * rate / layer.neuron_bytes))
        for n, taken in self._take(moves, left):
            place = layers[n]
            n_gpu = np.add(place.gpu, taken)
            n_ram = np.maximum(0, np.add(place.gpu, place.ram) - n_gpu)
            layers[n] = replace(place, gpu=tuple(n_gpu.tolist()), ram=tuple(n_ram.tolist()))

    def _fill_ram(self, layers: list[LayerPlacement], output: Device, while_it_gains: bool) -> None:
        """More neurons for RAM instead of the disk: those the GPU waits for, or any."""
        left = (self.ram or 0) + self.work.embedding_bytes - evaluate(self.work, self.rates, layers, output).ram
        moves = []
        for n, (layer, place) in enumerate(zip(self.work.layers, layers, strict=True)):
            hot = self.hot[n]
            k = hot.beyond(tuple(np.add(place.gpu, place.ram).tolist()), left // layer.neuron_bytes)
            if while_it_gains:
                gpu, ram, disk = neuron_seconds(self.rates, layer, place)
                saved = np.cumsum(hot.heat[k]) * (self.rates.disk - self.rates.random)
                k = k[: _true_prefix(ram + disk - saved > gpu) + 1]
            moves.append((n, hot.ffn[k], hot.slope[k] / layer.neuron_bytes))
        for n, taken in self._take(moves, left):
            layers[n] = replace(layers[n], ram=tuple(np.add(layers[n].ram, taken).tolist()))

    def _take(self, moves: list[tuple[int, Ints, Floats]], left: int) -> list[tuple[int, Ints]]:
        """The most valuable neurons that `left` bytes hold: (layer, neurons of each FFN).

        Args:
            moves: (layer, FFN of each neuron, value of each per byte); within a layer they can only go in this order.
        """
        if not moves:
            return []
        value = np.concatenate([np.minimum.accumulate(v) for _, _, v in moves])
        sizes = [self.work.layers[n].neuron_bytes for n, _, _ in moves]
        owner = np.repeat(np.arange(len(moves)), [len(ffn) for _, ffn, _ in moves])
        order = np.argsort(-value, kind="stable")
        fits = np.cumsum(np.array(sizes)[owner[order]]) <= left
        counts = np.bincount(owner[order[fits]], minlength=len(moves))
        n_ffn = len(self.work.layers[0].heat)
        return [(n, np.bincount(ffn[:c], minlength=n_ffn)) for (n, ffn, _), c in zip(moves, counts, strict=True)]


def _true_prefix(flags: np.ndarray) -> int:
    """Length of the run of True at the beginning."""
    return len(flags) if flags.all() else int(flags.argmin())


def _options(rows: list[tuple[Ints, Ints, Floats]]) -> Options:
    if not rows:
        return Options(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    return Options(*(np.concatenate([row[i] for row in rows]) for i in range(3)))
