"""Fits a model to a machine: how many threads, which weights belong in RAM.

A machine profile says what to aim for, possibly of another machine; what is really here caps it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from tsconv.format.header import Header
from tsconv.format.kv_cache import kv_bytes_per_token
from tsconv.format.order import shape_of
from tsconv.format.summary import PARTS
from tsconv.machine.limits import available_memory, usable_cores
from tsconv.machine.profile import Machine
from tsconv.placement.file import Placement
from tsconv.runtime.sparsity import parse_sparsity

MARGIN_BYTES = 1 << 30  # left free: compute buffers, Python, and what other programs come to need

Strategy = Literal["all", "placement", "on_demand"]


@dataclass(frozen=True)
class Fit:
    """What was chosen, and from what.

    Attributes:
        machine: name of the profile, which has machine_cores and machine_bytes of memory.
        n_threads: as given (threads_given), else machine_cores, but not more than usable_cores, those of this process.
        sparsity: as `tsconv.load`.
        model_bytes, sidecar_bytes, context_bytes, margin_bytes: what would have to fit in memory for nothing to be
            read from disk while the model runs.
        available_bytes: what this process can come to use, here and now.
        strategy: "all" (it fits: all of it is brought into RAM), "placement" (a placement says which neurons), or
            "on_demand" (it does not fit: only what every token reads).
        hot: int32 [n_layer, n_ffn], neurons at the front of each FFN that belong in RAM.
        asked_bytes, hot_bytes: of the FFN weights that the placement wants in RAM, and that fit; all or nothing of them
            without a placement.
        gpu_neurons: of `hot`, those that the placement gives to a GPU.
        lock: whether hot weights and predictors are to be locked in RAM.
        read_ahead: whether the kernel may read more around a row that is not in memory.
    """

    machine: str
    machine_cores: int
    machine_bytes: int
    usable_cores: int
    n_threads: int
    threads_given: bool
    sparsity: str
    model_bytes: int
    sidecar_bytes: int
    context_bytes: int
    margin_bytes: int
    available_bytes: int
    strategy: Strategy
    hot: npt.NDArray[np.int32]
    asked_bytes: int
    hot_bytes: int
    gpu_neurons: int
    lock: bool
    read_ahead: bool

    @property
    def needed_bytes(self) -> int:
        return self.model_bytes + self.sidecar_bytes + self.context_bytes + self.margin_bytes

    @property
    def budget_bytes(self) -> int:
        """What may be used: of the memory here, and no more than the profile's machine has."""
        return min(self.available_bytes, self.machine_bytes)


def fit(
    header: Header,
    machine: Machine,
    *,
    sidecar_bytes: int,
    sparsity: str,
    n_ctx: int,
    n_threads: int | None = None,
    placement: Placement | None = None,
    cores: int | None = None,
    available_bytes: int | None = None,
) -> Fit:
    """Chooses threads and the weights that belong in RAM.

    Args:
        header: of the model file.
        sidecar_bytes: size of the predictor sidecar; 0 when it is not used.
        sparsity: "predictor", "exact" or another that needs no predictor.
        n_ctx: tokens of context.
        n_threads: None for the machine's cores.
        cores, available_bytes: what this process may use; None to ask the system.

    Raises:
        ModelFileError: the placement is of another model, or the model lacks a key.
    """
    cores = cores or usable_cores()
    available = available_memory() if available_bytes is None else available_bytes
    rows = _row_bytes(header)  # of a neuron in each layer: gate, up and down
    n_layer, n_ffn, n_ff = shape_of(header)
    ffn_bytes = int(rows.sum()) * n_ffn * n_ff
    context_bytes = n_ctx * n_layer * kv_bytes_per_token(header)
    fixed = header.file_bytes - ffn_bytes + sidecar_bytes + context_bytes + MARGIN_BYTES
    budget = min(available, machine.cpu.memory_bytes)
    strategy, asked = _asked(header, placement, fits=fixed + ffn_bytes <= budget)
    asked_bytes = int((asked * rows[:, None]).sum())
    hot = np.floor(asked * _share(strategy, asked_bytes, room=budget - fixed)).astype(np.int32)
    return Fit(
        machine=machine.name,
        machine_cores=machine.cpu.cores,
        machine_bytes=machine.cpu.memory_bytes,
        usable_cores=cores,
        n_threads=n_threads or min(machine.cpu.cores, cores),
        threads_given=n_threads is not None,
        sparsity=sparsity,
        model_bytes=header.file_bytes,
        sidecar_bytes=sidecar_bytes,
        context_bytes=context_bytes,
        margin_bytes=MARGIN_BYTES,
        available_bytes=available,
        strategy=strategy,
        hot=hot,
        asked_bytes=asked_bytes,
        hot_bytes=int((hot * rows[:, None]).sum()),
        gpu_neurons=0 if placement is None else sum(sum(layer.gpu) for layer in placement.layers),
        # Where everything fits, nothing competes for the memory. Locked memory is taken from all others: only when
        # the rest of what every token needs has room beside it.
        lock=strategy != "all" and fixed <= budget,
        # Without a predictor all gate rows of a token are read one after the other; predictors pick rows.
        read_ahead=strategy == "all" or parse_sparsity(sparsity).kind != "predictor",
    )


def _asked(header: Header, placement: Placement | None, fits: bool) -> tuple[Strategy, npt.NDArray[np.int32]]:
    """What to aim for, and the neurons of each FFN that belong in RAM then: int32 [n_layer, n_ffn].

    Raises:
        ModelFileError: the placement is of another model.
    """
    if placement is not None:
        placement.check_model(header)
        return "placement", np.array(placement.hot_prefix(), dtype=np.int32)
    n_layer, n_ffn, n_ff = shape_of(header)
    return "all" if fits else "on_demand", np.full((n_layer, n_ffn), n_ff, dtype=np.int32)


def _share(strategy: Strategy, asked_bytes: int, room: int) -> float:
    """How much of them: of a placement, what there is room for."""
    if strategy == "all":
        return 1.0
    if strategy == "placement":
        return min(1.0, max(0, room) / max(1, asked_bytes))
    return 0.0  # which neurons are hot is not known: the kernel keeps what was used last


def _row_bytes(header: Header) -> npt.NDArray[np.int64]:
    """Bytes of one neuron's gate, up and down rows: int64 [n_layer]."""
    n_layer, n_ffn, n_ff = shape_of(header)
    totals = np.zeros(n_layer, dtype=np.int64)
    for tensor in header.tensors:
        if re.search(PARTS["ffn"], tensor.name):
            totals[int(tensor.name.split(".")[1])] += tensor.n_bytes
    return totals // (n_ffn * n_ff)
