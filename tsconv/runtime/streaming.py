"""Models larger than memory: how much of one is kept, and how llama.cpp loads what is kept.

Neurons are read from disk when they are needed, and those that are used most often are kept (tsffn_model_stream in
native/include/tsffn.h). All other weights, the predictors and the context stay in memory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llama_cpp import llama_cpp

from tsconv.errors import TsconvError
from tsconv.format.header import Header
from tsconv.format.kv_cache import kv_bytes_per_token, padded
from tsconv.format.order import shape_of
from tsconv.format.summary import ffn_bytes
from tsconv.machine.limits import available_memory
from tsconv.machine.size import EXAMPLES, parse_size
from tsconv.runtime.binding import NativeModel

AUTO, OFF = "auto", "off"
# Left free of what is available, for llama.cpp's compute buffers, Python, and what others come to need: so much or a
# twelfth, but at most a quarter. Where less is left, the kernel takes pages of programs away that are in use.
RESERVE_BYTES = 256 << 20
RESERVE_SHARE = 12
FEWEST_BYTES = 32 << 20  # for neurons


@dataclass(frozen=True)
class Budget:
    """What a model's memory goes to, in bytes.

    Attributes:
        total: what the model may use.
        given: by the user; else it is what is available.
        weights: that are always in memory: attention, embeddings, output, norms.
        predictors, context: the same of the sidecar and of keys and values.
        ffn: the neurons, on disk.
    """

    total: int
    given: bool
    weights: int
    predictors: int
    context: int
    ffn: int

    @property
    def neurons(self) -> int:
        """What is left for neurons, at most all of them with what is noted of each."""
        return min(self.total - self.weights - self.predictors - self.context, self.ffn + self.ffn // 20 + FEWEST_BYTES)

    @property
    def missing(self) -> int:
        """Bytes without which the model cannot run, 0 where there are enough."""
        return max(0, FEWEST_BYTES - self.neurons)


def parse_budget(text: str | int) -> int | str:
    """Bytes of "3GiB", "800M" and such (tsconv.machine.size), "auto" or "off".

    Raises:
        TsconvError: another text.
    """
    if isinstance(text, int) or text in (AUTO, OFF):
        return text
    n_bytes = parse_size(text)
    if n_bytes is None:
        raise TsconvError("RAM budget", expected=f"auto, off, or {EXAMPLES}", found=repr(text))
    return n_bytes


def choose_budget(
    header: Header,
    sidecar_bytes: int,
    n_ctx: int,
    ram_budget: str | int,
    *,
    on_gpus: int = 0,
    available: int | None = None,
) -> Budget | None:
    """What a model's memory is to go to; None where all of it fits, or streaming is off.

    Args:
        header: of the model file.
        sidecar_bytes: of the predictors; 0 when they are not used.
        n_ctx: tokens of context, 0 for the model's own.
        ram_budget: bytes, a size as text, "auto" or "off".
        on_gpus: bytes of weights and context that GPUs keep.
        available: bytes that this process can come to use; None asks the system.

    Raises:
        TsconvError: what every token needs does not fit, or no such budget.
    """
    asked = parse_budget(ram_budget)
    if asked == OFF:
        return None
    n_layer, _, _ = shape_of(header)
    n_ctx = n_ctx or int(header.keys.get("llama.context_length", 0))
    if asked == AUTO:
        available = available_memory() if available is None else available
        total = available - min(max(RESERVE_BYTES, available // RESERVE_SHARE), available // 4)
    else:
        total = int(asked)
    ffn, context = ffn_bytes(header), padded(n_ctx) * n_layer * kv_bytes_per_token(header)
    budget = Budget(
        total=total,
        given=asked != AUTO,
        weights=max(0, header.file_bytes - ffn - max(0, on_gpus - context)),
        predictors=sidecar_bytes,
        context=max(0, context - on_gpus),
        ffn=ffn,
    )
    fits = total >= budget.weights + budget.predictors + budget.context + ffn
    if fits or (asked == AUTO and ffn <= FEWEST_BYTES):  # of a small model nothing would be gained
        return None
    if budget.missing:
        raise TsconvError(
            "the model does not fit in memory, even with its neurons on disk",
            where=header.path,
            expected=f"at least {total + budget.missing:,} bytes (attention and output {budget.weights:,}, predictors "
            f"{budget.predictors:,}, context {budget.context:,}, some neurons {FEWEST_BYTES:,})",
            found=f"{max(0, total):,}: {budget.missing:,} are missing",
            fix="take a smaller context (-c), or a model with a smaller type",
        )
    return budget


@contextmanager
def loading_kept_weights(native: NativeModel, path: str) -> Iterator[None]:
    """While this holds, llama_cpp.Llama reads of the model file at `path` only what is kept, in this thread.

    llama_cpp.Llama knows a model by its path only. llama.cpp can load one from a stdio stream too, and ours passes over
    the neurons.
    """
    load_by_path, thread = llama_cpp.llama_model_load_from_file, threading.get_ident()

    def load(name: bytes, params: Any) -> Any:
        if threading.get_ident() != thread or name != os.fsencode(path):
            return load_by_path(name, params)
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        with native.file() as stream:
            return llama_cpp.llama_model_load_from_file_ptr(stream, params)

    llama_cpp.llama_model_load_from_file = load
    try:
        yield
    finally:
        llama_cpp.llama_model_load_from_file = load_by_path
