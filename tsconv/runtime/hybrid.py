"""FFNs that a GPU and the CPU share: predictors and hot neurons there, all others here (native/src/hybrid).

llama.cpp's own backends need not have the GPU: with a llama.cpp for CPUs, FFNs go there all the same. Where they do,
attention and the KV cache come first (`tsconv.runtime.offload`), and FFNs get what they leave of the memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tsconv.errors import TsconvError
from tsconv.native.ffn_gpus import FfnGpu, ffn_gpus
from tsconv.native.library import gpu_module
from tsconv.runtime.offload import MARGIN_BYTES, Offload, Wanted

if TYPE_CHECKING:
    from tsconv.runtime.binding import NativeModel

PREFIX = "CUDA"  # llama.cpp's name of a CUDA device is this and its number


@dataclass(frozen=True)
class Share:
    """What a GPU has of the FFNs.

    Attributes:
        gpu: its name.
        number: of it, as of llama.cpp's "CUDA0".
        predictors, n_predictors: layers whose predictor it has, of those with one.
        neurons, n_neurons: that it has, of all.
        n_bytes: of its memory.
        prefill_tokens: of a prompt, that it takes part in at once; 0: the CPU computes prompts alone.
    """

    gpu: str
    number: int
    predictors: int
    n_predictors: int
    neurons: int
    n_neurons: int
    n_bytes: int
    prefill_tokens: int

    def __str__(self) -> str:
        """One line for the user."""
        predictors = f"predictors of {self.predictors} of {self.n_predictors} layers and " if self.n_predictors else ""
        share = 100 * self.neurons / self.n_neurons
        others = "; other neurons on the CPU" if self.neurons < self.n_neurons else ""
        return f"GPU: {predictors}{share:.1f} % of the neurons on {self.gpu}, {self.n_bytes / 1e9:.2f} GB{others}"


def which(gpus: Sequence[FfnGpu], offload: Offload, wanted: Wanted) -> int:
    """The number of the GPU that FFNs go to: the first of those that attention is on, or that the user named.

    Raises:
        TsconvError: no such GPU.
    """
    names = [gpu.name for gpu in offload.gpus] or ([] if wanted.device is None else wanted.device.split(","))
    numbers = [int(found[1]) for name in names if (found := re.fullmatch(rf"{PREFIX}(\d+)", name.strip(), re.I))]
    if not offload.gpus and wanted.main_gpu is not None:
        numbers = [*(numbers or range(len(gpus)))][wanted.main_gpu :] or [wanted.main_gpu]
    elif not offload.gpus and names and not numbers:
        raise TsconvError("no such GPU", expected=f"some of {_names(gpus)}", found=names[0])
    number = numbers[0] if numbers else 0
    if number >= len(gpus):
        raise TsconvError("no such GPU", expected=f"some of {_names(gpus)}", found=f"{PREFIX}{number}")
    return number


def _names(gpus: Sequence[FfnGpu]) -> str:
    return ", ".join(f"{PREFIX}{i}" for i in range(len(gpus)))


def memory_of(offload: Offload) -> str | None:
    """llama.cpp's device that attention and hot neurons can both be on; None where that is not so."""
    found = [gpu.name for gpu in offload.gpus[:1] if re.fullmatch(rf"{PREFIX}\d+", gpu.name)]
    return found[0] if found and gpu_module() is not None else None


def overlap(layers: Iterable[dict[str, float]]) -> float | None:
    """Of `SparseLlama.ffn_stats`: seconds that GPU and CPU computed, over the seconds that this took; None where no GPU
    took part."""
    layers = list(layers)

    def total(*keys: str) -> float:
        return sum(layer[key] for layer in layers for key in keys)

    here = total("seconds_predictor", "seconds_ffn")
    both, took = here + total("seconds_gpu"), here + total("seconds_gpu_wait")
    return both / max(1e-9, took) if total("gpu_calls") else None


def share(
    native: NativeModel, offload: Offload, wanted: Wanted, progress: Callable[[int, int], None] | None = None
) -> Share:
    """Gives a GPU its share of a model that llama.cpp has loaded.

    Args:
        offload: what llama.cpp has put on GPUs.
        wanted: its budget is for that too; without one, what is free now, but for 1 GiB, is taken.
        progress: called with (bytes copied, bytes in all).

    Raises:
        NoGpuError: no module, no driver, or no GPU.
        BackendError: it fails, or has no room.
        TsconvError: no such GPU.
    """
    gpus = ffn_gpus(native.backend)
    number = which(gpus, offload, wanted)
    free = max(0, gpus[number].free_bytes - MARGIN_BYTES)
    n_bytes = free if wanted.vram_budget is None else max(0, wanted.vram_budget - offload.n_bytes)
    hot = None if wanted.gpu_hot is None else np.asarray(wanted.gpu_hot, dtype=np.int32)
    found = native.share_with_gpu(number, n_bytes, hot, progress)
    return Share(
        gpu=found.name.decode(errors="replace"),
        number=number,
        predictors=found.predictors,
        n_predictors=found.n_predictors,
        neurons=found.neurons,
        n_neurons=found.n_neurons,
        n_bytes=found.bytes,
        prefill_tokens=found.prefill_tokens,
    )
