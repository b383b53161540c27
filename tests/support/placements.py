"""Machine profiles and placements for tests."""

from __future__ import annotations

from pathlib import Path

from tsconv.format.header import read_header
from tsconv.machine.profile import Cpu, Machine
from tsconv.placement.file import BUDGETS, PREDICTED, LayerPlacement, Placement


def machine(cores: int = 8, memory_bytes: int = 64 << 30) -> Machine:
    return Machine("somewhere", Cpu("a CPU", cores, memory_bytes, 30.0, 20.0), None, None)


def placement_for(model: Path, hot: list[list[int]], gpu: int = 0, **changes: object) -> Placement:
    """So many hot neurons per layer and FFN, `gpu` of them on a GPU; `changes` replace fields."""
    keys = read_header(model).keys
    layers = tuple(LayerPlacement("cpu", "cpu", (gpu,) * len(ffns), tuple(n - gpu for n in ffns)) for ffns in hot)
    fields = {
        "fingerprint": keys["turbosparse.source.fingerprint"],
        "pair_id": keys["turbosparse.pair_id"],
        "neuron_order": keys["turbosparse.neuron_order"],
        "sparsity": "predictor",
        "machine": "somewhere",
        "ctx": 512,
        "budgets": dict.fromkeys(BUDGETS, 0),
        "predicted": dict.fromkeys(PREDICTED),
        "output": "cpu",
        "layers": layers,
    }
    return Placement(**fields | changes)
