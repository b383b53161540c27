"""Workloads and machines for tests of placing, and what a placement costs, calculated a second time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from tsconv.placement.cost import Layer, Rates, Workload
from tsconv.placement.file import CPU, GPU, LayerPlacement

# Seconds per byte: sequential, random, disk, gpu, pcie; latency.
MACHINES = {
    "balanced": Rates(1.0, 1.5, 8.0, 0.1, 0.5, 4.0, True, True),
    "slow GPU": Rates(1.0, 1.2, 5.0, 0.9, 0.2, 1.0, True, True),
    "GPU slower than CPU": Rates(0.2, 0.3, 3.0, 1.0, 0.2, 1.0, True, True),
    "far GPU": Rates(1.0, 1.5, 8.0, 0.1, 2.0, 300.0, True, True),
    "near GPU": Rates(1.0, 1.5, 40.0, 0.1, 0.0, 0.0, True, True),
    "no disk": Rates(1.0, 1.5, 0.0, 0.1, 0.5, 4.0, True, False),
    "no GPU": Rates(1.0, 1.5, 8.0, 0.0, 0.0, 0.0, False, True),
    "neither": Rates(1.0, 1.5, 0.0, 0.0, 0.0, 0.0, False, False),
}


def workload(
    rng: np.random.Generator, n_layer: int, n_ffn: int, n_ff: int, predictor: bool = True, hot_first: bool = True
) -> Workload:
    """Random heats, at most `neuron_bytes` each; layers of different sizes."""
    layers = []
    for _ in range(n_layer):
        size = int(rng.integers(20, 60))
        heat = rng.random((n_ffn, n_ff)) ** rng.integers(1, 6) * size
        if hot_first:
            heat = -np.sort(-heat, axis=1)
        held, kv = int(rng.integers(10, 150)), int(rng.integers(0, 40))
        predicted = int(rng.integers(5, 80)) if predictor else 0
        layers.append(Layer(held, kv, kv / 2, predicted, predicted * float(rng.random()), size, heat))
    output = int(rng.integers(20, 200))
    return Workload(tuple(layers), 16, 3, 24, predictor, int(rng.integers(1, 50)), 2.0, output, output)


def uniform(work: Workload, device: str) -> list[LayerPlacement]:
    """Everything on one device, in RAM on the CPU."""
    n_ffn, n_ff = work.layers[0].heat.shape
    gpu, ram = ((n_ff,), (0,)) if device == GPU else ((0,), (n_ff,))
    predictor = device if work.has_predictor else CPU
    return [LayerPlacement(device, predictor, gpu * n_ffn, ram * n_ffn) for _ in work.layers]


def total_bytes(work: Workload) -> int:
    return held(work, uniform(work, CPU), CPU)[1]


# ---- the second calculation, from docs/placement.md


def layer_seconds(work: Workload, r: Rates, layer: Layer, place: LayerPlacement) -> float:
    """One layer without the way from the layer before."""
    on_gpu = on_cpu = gpu_seconds = cpu_seconds = 0.0
    for ffn, heats in enumerate(layer.heat):
        for i, heat in enumerate(heats):
            if i < place.gpu[ffn]:
                on_gpu += 1
                gpu_seconds += heat * r.gpu
            elif i < place.gpu[ffn] + place.ram[ffn]:
                on_cpu += 1
                cpu_seconds += heat * r.random
            else:
                on_cpu += 1
                cpu_seconds += heat * r.disk
    seconds = max(gpu_seconds, cpu_seconds)
    seconds += (layer.attention_bytes + layer.kv_read) * (r.gpu if place.attention == GPU else r.sequential)
    seconds += layer.predictor_read * (r.gpu if place.predictor == GPU else r.sequential)
    neurons_away = on_cpu if place.attention == GPU else on_gpu
    predictor_away = work.has_predictor and place.predictor != place.attention
    if neurons_away or predictor_away:
        seconds += r.latency + work.state_bytes * r.pcie
    if work.has_predictor and (on_cpu if place.predictor == GPU else on_gpu):
        seconds += r.latency + work.mask_bytes * r.pcie
    if neurons_away:
        seconds += r.latency + work.state_bytes * r.pcie
    return seconds


def seconds_of(work: Workload, r: Rates, layers: Sequence[LayerPlacement], output: str) -> float:
    places = [CPU, *(place.attention for place in layers), output]
    changes = sum(a != b for a, b in itertools.pairwise(places))
    seconds = changes * (r.latency + work.state_bytes * r.pcie) + work.embedding_read * r.random
    seconds += work.output_bytes * (r.gpu if output == GPU else r.sequential)
    if output == GPU:
        seconds += r.latency + work.logits_bytes * r.pcie
    return seconds + sum(layer_seconds(work, r, *pair) for pair in zip(work.layers, layers, strict=True))


def layer_held(layer: Layer, place: LayerPlacement) -> tuple[int, int]:
    vram = sum(place.gpu) * layer.neuron_bytes
    ram = sum(place.ram) * layer.neuron_bytes
    for device, size in (
        (place.attention, layer.attention_bytes + layer.kv_bytes),
        (place.predictor, layer.predictor_bytes),
    ):
        vram, ram = (vram + size, ram) if device == GPU else (vram, ram + size)
    return vram, ram


def held(work: Workload, layers: Sequence[LayerPlacement], output: str) -> tuple[int, int]:
    """(VRAM, RAM)."""
    vram = sum(layer_held(*pair)[0] for pair in zip(work.layers, layers, strict=True))
    ram = sum(layer_held(*pair)[1] for pair in zip(work.layers, layers, strict=True)) + work.embedding_bytes
    return (vram + work.output_bytes, ram) if output == GPU else (vram, ram + work.output_ram)


def placements_of(work: Workload, r: Rates, layer: Layer) -> Iterator[LayerPlacement]:
    """Every placement of one layer."""
    n_ffn, n_ff = layer.heat.shape
    devices = (CPU, GPU) if r.has_gpu else (CPU,)
    per_ffn = [
        (g, m)
        for g in range(n_ff + 1 if r.has_gpu else 1)
        for m in (range(n_ff - g + 1) if r.has_disk else (n_ff - g,))
    ]
    for attention in devices:
        for predictor in devices if work.has_predictor else (CPU,):
            for parts in itertools.product(per_ffn, repeat=n_ffn):
                gpu, ram = zip(*parts, strict=True)
                yield LayerPlacement(attention, predictor, gpu, ram)


class EveryPlacement:
    """(VRAM, RAM, seconds) of all placements of a workload, and the least seconds within given budgets."""

    def __init__(self, work: Workload, r: Rates) -> None:
        self.tables = []
        move = r.latency + work.state_bytes * r.pcie
        for layer in work.layers:
            places = list(placements_of(work, r, layer))
            sizes = np.array([layer_held(layer, place) for place in places])
            seconds = np.array([layer_seconds(work, r, layer, place) for place in places])
            on_gpu = np.array([place.attention == GPU for place in places])
            self.tables.append((sizes, seconds, on_gpu))
        self.start = (work.embedding_bytes, work.embedding_read * r.random, move)
        self.outputs = [(0, work.output_ram, work.output_bytes * r.sequential, False)]
        if r.has_gpu:
            seconds = work.output_bytes * r.gpu + r.latency + work.logits_bytes * r.pcie
            self.outputs.append((work.output_bytes, 0, seconds, True))

    def least(self, vram: int, ram: int) -> float:
        """inf when nothing fits."""
        embedding, read, move = self.start
        best = np.inf
        for out_vram, out_ram, out_seconds, out_gpu in self.outputs:
            v, m, t = np.array([out_vram]), np.array([out_ram + embedding]), np.array([out_seconds + read])
            last = np.array([out_gpu])
            for sizes, seconds, on_gpu in reversed(self.tables):
                v = (v[:, None] + sizes[:, 0]).ravel()
                m = (m[:, None] + sizes[:, 1]).ravel()
                t = (t[:, None] + seconds + move * (last[:, None] != on_gpu)).ravel()
                last = np.broadcast_to(on_gpu, (len(last), len(on_gpu))).ravel()
                fits = (v <= vram) & (m <= ram)  # bytes only grow: what does not fit now never will
                v, m, t, last = v[fits], m[fits], t[fits], last[fits]
            best = min(best, (t + move * last).min(initial=np.inf))
        return float(best)
