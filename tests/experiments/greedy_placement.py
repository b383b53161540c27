"""A greedy placement, and how far it is from the solver's: docs/notes/2026-11-28-greedy-placement.md.

In tests/: PYTHONPATH=unit/placement:unit/cli python -m experiments.greedy_placement
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from tsconv.placement.cost import Estimate, Floats, Layer, Rates, Workload, evaluate, exchange
from tsconv.placement.file import CPU, GPU, Device, LayerPlacement
from tsconv.placement.frontier import HotOrder, Ints

STEPS = 512  # lengths of a layer's GPU prefix that are looked at; single neurons fill up what they leave
PRICES = 24  # of RAM that are tried
DEVICES = (CPU, GPU)
Found = tuple[list[LayerPlacement], Device, Estimate]


@dataclass(frozen=True)
class Options:
    """What a stage (a layer, or the output) may do, [n].

    Attributes:
        attention, predictor: int64, indices of DEVICES; of the output, `attention` is its device.
        position: int64, neurons of the layer that the GPU has, in its hot order.
        vram, ram: int64, bytes; the latter of what is never read from disk.
        worth: int64, bytes of RAM that the cost assumes.
        cost: float64, seconds, and what the RAM is worth.
    """

    attention: Ints
    predictor: Ints
    position: Ints
    vram: Ints
    ram: Ints
    worth: Ints
    cost: Floats


def greedy(work: Workload, rates: Rates, vram: int, ram: int) -> Found | None:
    """A placement by gain per byte of VRAM, None where none is found that fits.

    It begins with attention, predictors and output on one device each. Then the stage that saves most seconds per
    byte of VRAM takes what saves most, until nothing saves any or fits. RAM has a price: what its last byte would save
    if VRAM and RAM were full. The price doubles until RAM holds what the steps assumed of it.
    """
    vram = vram if rates.has_gpu else 0
    ample = ram >= _ram_needed(work)
    hot = [HotOrder(layer.heat) for layer in work.layers]
    devices = range(2) if rates.has_gpu else range(1)
    starts = [s for s in itertools.product(devices, devices, devices) if work.has_predictor or s[1] == 0]
    best: Found | None = None
    price, ends = 0.0, [layer.n_neurons for layer in work.layers]
    if not ample:
        price, ends = _ram_price(work, rates, hot, vram, ram)
    for _ in range(PRICES):
        stages = [_layer_options(work, rates, *each, price) for each in zip(work.layers, hot, ends, strict=True)]
        stages.append(_output_options(work, rates, price))
        assumed = []  # bytes of RAM
        for start in starts:
            picks = _begin(stages, start)
            if _held(stages, picks) > vram:
                continue
            _upgrade(stages, picks, rates.transfer(work.state_bytes), vram)
            assumed.append(work.embedding_bytes + sum(int(o.worth[k]) for o, k in zip(stages, picks, strict=True)))
            found = _placed(work, rates, hot, stages, picks, vram, ram, ample)
            if found and (best is None or found[2].seconds < best[2].seconds):
                best = found
        if ample or (best and max(assumed) <= 1.01 * ram):
            break
        price = 2 * price or 1e-2 * rates.sequential
        if rates.has_disk:
            saved = rates.disk - rates.random
            ends = [
                int((h.slope / x.neuron_bytes * saved >= price).sum()) for h, x in zip(hot, work.layers, strict=True)
            ]
    return best


def _ram_needed(work: Workload) -> int:
    layers = sum(x.attention_held + x.predictor_bytes + x.n_neurons * x.neuron_bytes for x in work.layers)
    return work.embedding_bytes + work.output_ram + layers


def _ram_price(work: Workload, rates: Rates, hot: list[HotOrder], vram: int, ram: int) -> tuple[float, list[int]]:
    """(seconds per byte that the last byte of RAM saves, neurons of each layer that are worth it)."""
    everywhere = [layer.n_neurons for layer in work.layers]
    if not rates.has_disk:
        return 0.0, everywhere
    left = vram + ram - _ram_needed(work) + sum(x.n_neurons * x.neuron_bytes for x in work.layers)
    value = np.concatenate([h.slope / x.neuron_bytes for h, x in zip(hot, work.layers, strict=True)])
    size = np.repeat([x.neuron_bytes for x in work.layers], everywhere)
    order = np.argsort(-value, kind="stable")
    last = int(np.searchsorted(np.cumsum(size[order]), left, side="right"))
    least = value[order[last]] if last < len(order) else 0.0
    owner = np.repeat(np.arange(len(everywhere)), everywhere)
    ends = np.bincount(owner[order[:last]], minlength=len(everywhere))
    return float(least) * (rates.disk - rates.random), ends.tolist()


def _layer_options(work: Workload, rates: Rates, layer: Layer, hot: HotOrder, end: int, price: float) -> Options:
    n, size = layer.n_neurons, layer.neuron_bytes
    covered = np.concatenate(([0.0], np.cumsum(hot.heat)))
    in_heat = np.searchsorted(covered, np.linspace(0, covered[-1], STEPS))
    balance = int(np.searchsorted(covered * (rates.gpu + rates.random), covered[-1] * rates.random))
    in_number = np.linspace(0, n, STEPS).round().astype(np.int64)
    k = np.unique(np.clip(np.concatenate((in_number, in_heat, [0, 1, n - 1, n, balance - 1, balance, end])), 0, n))
    k = k if rates.has_gpu else k[:1]
    ends = np.maximum(end, k)
    disk = covered[-1] - covered[ends]
    seconds = np.maximum(covered[k] * rates.gpu, (covered[ends] - covered[k]) * rates.random + disk * rates.disk)
    kind = np.where(k == 0, 0, np.where(k == n, 2, 1))
    parts = []
    for a, p in itertools.product(range(1 + rates.has_gpu), range(1 + (rates.has_gpu and work.has_predictor))):
        held = [0, 0]
        held[a] += layer.attention_held
        held[p] += layer.predictor_bytes
        dense = layer.attention_read * rates.dense(DEVICES[a]) + layer.predictor_read * rates.dense(DEVICES[p])
        kinds = ((False, True), (True, True), (True, False))
        moved = [exchange(work, rates, DEVICES[a], DEVICES[p], *neurons)[1] for neurons in kinds]
        ram = held[0] + (0 if rates.has_disk else (n - k) * size)
        worth = held[0] + (ends - k) * size
        cost = seconds + dense + np.array(moved)[kind] + price * worth
        devices = np.full(len(k), a), np.full(len(k), p)
        parts.append((*devices, k, held[1] + k * size, np.broadcast_to(ram, len(k)), worth, cost))
    return Options(*map(np.concatenate, zip(*parts, strict=True)))


def _output_options(work: Workload, rates: Rates, price: float) -> Options:
    cpu = work.output_bytes * rates.sequential + price * work.output_ram
    gpu = work.output_bytes * rates.gpu + rates.transfer(work.logits_bytes)
    n = 1 + rates.has_gpu
    zeros = np.zeros(n, np.int64)
    kept = np.array([work.output_ram, 0])[:n]
    return Options(
        np.arange(n), zeros, zeros, np.array([0, work.output_bytes])[:n], kept, kept, np.array([cpu, gpu])[:n]
    )


def _begin(stages: list[Options], start: tuple[int, ...]) -> list[int]:
    """The options without neurons, attention, predictors and output on the devices of `start`."""
    layers = [np.flatnonzero((o.attention == start[0]) & (o.predictor == start[1])) for o in stages[:-1]]
    return [int(k[0]) for k in layers] + [start[2]]


def _held(stages: list[Options], picks: list[int]) -> int:
    return sum(int(o.vram[k]) for o, k in zip(stages, picks, strict=True))


def _placed(
    work: Workload,
    rates: Rates,
    hot: list[HotOrder],
    stages: list[Options],
    picks: list[int],
    vram: int,
    ram: int,
    ample: bool,
) -> Found | None:
    if not ample and work.embedding_bytes + sum(int(o.ram[k]) for o, k in zip(stages, picks, strict=True)) > ram:
        return None
    layers = []
    for o, k, h, layer in zip(stages, picks, hot, work.layers, strict=False):
        gpu = h.counts(o.position[k : k + 1])[0]
        kept = 0 * gpu if rates.has_disk and not ample else layer.heat.shape[1] - gpu
        devices = DEVICES[o.attention[k]], DEVICES[o.predictor[k]]
        layers.append(LayerPlacement(*devices, tuple(gpu.tolist()), tuple(kept.tolist())))
    output = DEVICES[picks[-1]]
    _fill(work, rates, hot, layers, output, vram, None if ample else ram)
    return layers, output, evaluate(work, rates, layers, output)


def _upgrade(stages: list[Options], picks: list[int], move: float, vram: int) -> None:
    """Changes `picks`, an option of each stage: the most seconds saved per byte first."""
    left = vram - _held(stages, picks)
    offers: list[tuple[float, int] | None] = [None] * len(stages)  # (seconds per byte, option)
    while True:
        for i, options in enumerate(stages):
            if offers[i] is None or options.vram[offers[i][1]] - options.vram[picks[i]] > left:
                offers[i] = _offer(stages, picks, i, move, left)
        i = max(range(len(stages)), key=lambda i: offers[i][0])
        if offers[i][0] <= 0:
            return
        before, k = picks[i], offers[i][1]
        picks[i] = k
        left -= int(stages[i].vram[k] - stages[i].vram[before])
        around = range(i - 1, i + 2) if stages[i].attention[before] != stages[i].attention[k] else (i,)
        for j in around:
            if 0 <= j < len(stages):
                offers[j] = None


def _offer(stages: list[Options], picks: list[int], i: int, move: float, left: int) -> tuple[float, int]:
    options = stages[i]
    before = stages[i - 1].attention[picks[i - 1]] if i else 0
    cost = options.cost + move * (options.attention != before)
    if i + 1 < len(stages):
        cost = cost + move * (options.attention != stages[i + 1].attention[picks[i + 1]])
    saved, more = cost[picks[i]] - cost, options.vram - options.vram[picks[i]]
    real = (saved > 1e-12 * cost[picks[i]]) & (more <= left)
    value = np.where(real, saved / np.maximum(more, 1e-6), 0.0)
    k = int(value.argmax())
    return float(value[k]), k


# ---- single neurons


def _fill(
    work: Workload,
    rates: Rates,
    hot: list[HotOrder],
    layers: list[LayerPlacement],
    output: Device,
    vram: int,
    ram: int | None,
) -> None:
    from tsconv.placement.solve import Problem

    problem = object.__new__(Problem)  # its filling needs no frontiers
    problem.work, problem.rates, problem.hot, problem.vram = work, rates, hot, vram
    problem.ram = None if ram is None else ram - work.embedding_bytes
    for _ in range(2):
        if problem.ram is not None and rates.has_disk:
            problem._fill_ram(layers, output, while_it_gains=True)
            problem._fill_ram(layers, output, while_it_gains=False)
        problem._fill_vram(layers, output)


# ---- comparison

LARGE_BUDGETS = ((0.05, 0.6), (0.15, 0.3), (0.35, 0.6), (0.35, 1.1))  # VRAM and RAM, of the model's size
Case = tuple[str, str, Workload, Rates, int, int]  # group, name, workload, machine, VRAM, RAM


def cases() -> Iterator[Case]:
    from test_solve import budgets, power_law

    from support.workloads import MACHINES, total_bytes, workload
    from tsconv.machine.profile import load_machine

    for machine, shape in itertools.product(MACHINES, [(2, 1, 4), (3, 1, 3), (2, 2, 3)]):
        rng = np.random.default_rng([len(machine), *shape])
        for predictor, hot_first in ((True, True), (False, True), (True, False)):
            work = workload(rng, *shape, predictor, hot_first)
            for pair in budgets(rng, total_bytes(work)):
                yield "6 to 12 neurons", f"{machine} {shape}", work, MACHINES[machine], *pair
    for seed in range(140):
        rng = np.random.default_rng(1000 + seed)
        shape = (int(rng.integers(1, 7)), int(rng.integers(1, 5)), int(rng.integers(2, 60)))
        work = workload(rng, *shape, bool(rng.integers(2)), bool(rng.integers(2)))
        machine = list(MACHINES)[int(rng.integers(len(MACHINES)))]
        vram, ram = (int(total_bytes(work) * share) for share in rng.random(2) * 1.1)
        yield "up to 1,400 neurons", f"{machine} {shape} seed {1000 + seed}", work, MACHINES[machine], vram, ram
    for name, work, rates in small_models():
        for v, r in itertools.product((0.1, 0.3, 0.6, 0.9), (0.3, 0.6, 1.1)):
            yield "small models", name, work, rates, int(v * total_bytes(work)), int(r * total_bytes(work))
    for name, shape in (("7B", (32, 1, 14336, 1)), ("Mixtral", (32, 8, 14336, 2))):
        work = power_law(*shape)
        total = total_bytes(work)
        for machine, (v, r) in itertools.product(("pc-2080ti", "pc-laptop"), LARGE_BUDGETS):
            rates = Rates.of(load_machine(machine))
            if v + r < 1.1:
                rates = replace(rates, disk=1 / 0.35e9, has_disk=True)
            yield name, machine, work, rates, int(v * total), int(r * total)


def small_models() -> Iterator[tuple[str, Workload, Rates]]:
    """The families' smallest models and the checkpoints of the repository, with random counts."""
    import tempfile
    from pathlib import Path

    from test_place import MACHINE

    import tsconv
    from support import CHECKPOINTS
    from support.random_stats import random_stats, save_stats
    from support.refused import sidecar_of
    from support.synthetic import SHAPES, random_tensors, save
    from tsconv.format.header import read_header
    from tsconv.machine.profile import load_machine
    from tsconv.placement.cost import read_workload

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "toy.toml").write_text(MACHINE)
        sources = {name: save(folder / name, s, random_tensors(s)) for name, s in SHAPES.items()}
        sources |= {path.name: path for path in sorted(CHECKPOINTS.glob("tiny-*"))}
        for name, source in sources.items():
            model = tsconv.convert(source, folder / f"{name}.gguf", "q4_0").model
            sparsity = "exact" if name == "bamboo" else "predictor"
            stats = random_stats(model, sparsity)
            path = save_stats(stats, folder / f"{name}.stats.gguf")
            hot = tsconv.reorder(model, path, folder / f"{name}-hot.gguf").model
            sidecar = read_header(sidecar_of(hot)) if sparsity == "predictor" else None
            work = read_workload(read_header(hot), sidecar, stats, 256)
            for machine in (str(folder / "toy.toml"), "pc-2080ti", "pc-laptop", "cpu-only"):
                yield f"{name} on {Path(machine).stem}", work, Rates.of(load_machine(machine))


def main() -> None:
    import sys
    import time

    from tsconv.errors import TsconvError
    from tsconv.placement.solve import solve

    rows: dict[str, list[tuple[float, ...]]] = {}
    labels: dict[str, list[str]] = {}
    missed: dict[str, int] = {}
    for group, name, work, rates, vram, ram in cases():
        if sys.argv[1:] and group not in sys.argv[1:]:
            continue
        began = time.process_time()
        try:
            solved = solve(work, rates, vram, ram)
        except TsconvError:
            continue
        middle = time.process_time()
        found = greedy(work, rates, vram, ram)
        ended = time.process_time()
        if found is None:
            missed[group] = missed.get(group, 0) + 1
            continue
        estimate = found[2]
        assert estimate.vram <= vram, name
        assert estimate.ram <= ram, name
        bound, seconds = solved.lower_bound, solved.estimate.seconds
        row = (estimate.seconds / seconds - 1, estimate.seconds / bound - 1, seconds / bound - 1)
        rows.setdefault(group, []).append((*row, ended - middle, middle - began))
        labels.setdefault(group, []).append(f"{name}, VRAM {vram:,}, RAM {ram:,}")
    heads = ("cases", "n", "none found", "greedy over solver", "within 1 %", "greedy over bound", "solver over bound")
    print(f"| {' | '.join(heads)} | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for group, found_rows in rows.items():
        over_solver, over_bound, solver, greedy_time, solver_time = np.array(found_rows).T
        print(
            f"| {group} | {len(found_rows)} | {missed.get(group, 0)} | {_spread(over_solver)} | "
            f"{100 * np.mean(over_solver <= 0.01):.0f} % | {_spread(over_bound)} | {_spread(solver)} | "
            f"{np.median(greedy_time):.3f}, {np.median(solver_time):.3f} |"
        )
    for group, found_rows in rows.items():
        for row, label in sorted(zip(found_rows, labels[group], strict=True), reverse=True)[:4]:
            print(f"{group}: {100 * row[0]:.2f} %: {label}")


def _spread(ratios: Floats) -> str:
    """Least, median, largest, in percent."""
    return f"{100 * ratios.min():.2f}, {100 * np.median(ratios):.2f}, {100 * ratios.max():.2f}"


if __name__ == "__main__":
    main()
