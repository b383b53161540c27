"""What each engine of a comparison puts on GPUs, within the same memory of theirs.

llama.cpp has two ways to use a GPU that does not hold all of a model: its last layers whole (-ngl N), or all attention
and the FFNs of the last layers (-ngl 99 --n-cpu-moe N, for dense models --n-cpu-ffn). Which is faster depends on model
and machine, so both are measured, and the faster one is the baseline.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tsconv.errors import TsconvError
from tsconv.format.header import Header
from tsconv.native.devices import Gpu, gpus, gpus_elsewhere
from tsconv.runtime.offload import Offload, Wanted, choose, layer_bytes, layers_that_fit, room_on
from tsconv.runtime.programs import FFN_WEIGHTS

WHOLE_LAYERS, CPU_FFN = "llama.cpp-ngl", "llama.cpp-n-cpu-ffn"  # engines,
SHARED = "tsconv-gpu"  # and ours that puts as much on a GPU as `room` allows


def gpus_for(wanted: Wanted) -> list[Gpu]:
    """The GPUs to choose from; drivers are asked only when they may be wanted."""
    return [] if wanted.n_gpu_layers == 0 else gpus_elsewhere()


NO_GPU = Wanted(n_gpu_layers=0)


def shares(header: Header, n_ctx: int, wanted: Wanted, there: Sequence[Gpu]) -> dict[str, Offload]:
    """What goes to GPUs with each engine: "tsconv", WHOLE_LAYERS and, when all attention fits, CPU_FFN; {} when it is
    nothing with ours. What ours leaves of the room is for predictors and hot neurons.

    Args:
        n_ctx: tokens of context of each engine.

    Raises:
        TsconvError: no such GPU, or more layers than the budget holds.
        ModelFileError: the header lacks a dimension.
    """
    ours = choose(header, there, wanted, n_ctx=n_ctx)
    if not ours.n_gpu_layers:
        return {}
    room = room_on(ours.gpus, wanted.vram_budget)
    if ours.n_bytes > room:
        raise TsconvError(
            "layers for a GPU",
            expected=f"at most {room:,} bytes, which all engines may use",
            found=f"{ours.n_bytes:,} bytes in {ours.n_gpu_layers} layers",
            fix="lower -ngl, or raise --vram-budget",
        )

    def offload(n: int, n_bytes: int, on_host: str) -> Offload:
        return Offload(n, ours.n_layers, ours.gpus, n_bytes, named=True, on_host=on_host)

    whole, attention = layer_bytes(header, n_ctx, with_ffn=True), layer_bytes(header, n_ctx)
    n_whole = layers_that_fit(whole, room)
    found = {"tsconv": replace(ours, room=room), WHOLE_LAYERS: offload(n_whole, sum(whole[:n_whole]), "")}
    left = room - sum(attention)
    if left >= 0:
        ffns = [a - b for a, b in zip(whole[1:], attention[1:], strict=True)]
        n = layers_that_fit(ffns, left)
        on_cpu = range(len(ffns) - n)
        pattern = rf"blk\.({'|'.join(map(str, on_cpu))})\.{FFN_WEIGHTS}" if on_cpu else ""
        found[CPU_FFN] = offload(ours.n_layers, sum(attention) + sum(ffns[:n]), pattern)
    return found


def described(offload: Offload) -> str:
    """One line about a share of llama.cpp's."""
    what = f"{offload.n_gpu_layers} of {offload.n_layers} layers"
    if offload.on_host:
        ffns = (f"blk.{i}.ffn_up.weight" for i in range(offload.n_layers - 1))
        n_on_cpu = sum(re.match(offload.on_host, name) is not None for name in ffns)
        what += f", the FFNs of {n_on_cpu} on the CPU"
    return f"{what}, {offload.n_bytes / 1e9:.2f} GB"


def as_argument(offload: Offload) -> dict[str, Any]:
    """For a worker, whose process has GPUs of its own."""
    numbers = {key: getattr(offload, key) for key in ("n_gpu_layers", "n_layers", "n_bytes", "on_host", "room")}
    return numbers | {"gpus": [gpu.name for gpu in offload.gpus]}


def from_argument(fields: dict[str, Any]) -> Offload:
    """The same in a worker."""
    by_name = {gpu.name: gpu for gpu in gpus()} if fields["n_gpu_layers"] else {}
    chosen = tuple(by_name[name] for name in fields["gpus"] if name in by_name)
    return Offload(**fields | {"gpus": chosen, "named": True})
