"""What of a model goes to GPUs: the attention, keys and values of its last layers, and the output. FFNs stay here.

llama.cpp's own backends compute what is there. It would give them the FFNs too, and they would compute SwiGLU: an
override of their buffer type keeps those on the host, where our backend takes them, as without a GPU
(src/llama-model-loader.cpp: an override to the CPU's type means "as llama.cpp chooses without a GPU").
"""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from tsconv.errors import TsconvError
from tsconv.format.header import Header
from tsconv.format.kv_cache import kv_bytes_per_token, padded
from tsconv.format.order import shape_of
from tsconv.native.devices import Gpu, cpu_buffer_type, gpu_pointer
from tsconv.runtime.programs import FFN_WEIGHTS

AUTO = "auto"
ALL = -1  # as llama.cpp and llama_cpp.Llama have it
MARGIN_BYTES = 1 << 30  # left free on each GPU: compute buffers, a desktop; llama.cpp's own default (--fit-target)
OUTPUT = ("output.weight", "output_norm.weight")
EMBEDDING = "token_embd.weight"
OF_A_LAYER = re.compile(rf"blk\.(\d+)\.({FFN_WEIGHTS})?")


class _Override(ctypes.Structure):
    """struct llama_model_tensor_buft_override (llama.h)."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


@dataclass(frozen=True)
class Wanted:
    """What is to go to GPUs: the arguments of `SparseLlama` of these names."""

    n_gpu_layers: int | str = AUTO
    device: str | None = None
    main_gpu: int | None = None
    vram_budget: int | None = None
    gpu_hot: npt.ArrayLike | None = None

    @property
    def has_names(self) -> bool:
        """Whether some GPUs are named."""
        return self.device is not None or self.main_gpu is not None

    @property
    def ffns(self) -> bool:
        """Whether FFNs may go there."""
        return self.n_gpu_layers != 0 or self.gpu_hot is not None


WHAT_FITS = Wanted()


@dataclass(frozen=True)
class Offload:
    """What was chosen.

    Attributes:
        n_gpu_layers: the last so many, counting the output as one, as llama.cpp's -ngl.
        n_layers: how many there are, counted the same way.
        gpus: those that share them; () for none.
        n_bytes: of weights, keys and values on all of them together, compute buffers not counted.
        named: whether the user named the GPUs, so that llama.cpp must not take others.
        on_host: weights of these layers that do not go there: an expression for their names, as of llama.cpp's -ot.
        room: bytes that these and FFNs together may take; None: not said.
    """

    n_gpu_layers: int
    n_layers: int
    gpus: tuple[Gpu, ...] = ()
    n_bytes: int = 0
    named: bool = False
    on_host: str = FFN_WEIGHTS
    room: int | None = None
    _kept: list[Any] = field(default_factory=list, repr=False, compare=False)

    def apply(self, params: Any) -> None:
        """Writes the choice into a llama_model_params but for n_gpu_layers. What it points to lives as long as self."""
        if not self.gpus:
            return
        if self.on_host:
            overrides = (_Override * 2)(_Override(self.on_host.encode(), cpu_buffer_type()), _Override())
            params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
            self._kept.append(overrides)
        if self.named:
            devices = (ctypes.c_void_p * (len(self.gpus) + 1))(*(gpu_pointer(gpu.name) for gpu in self.gpus), None)
            params.devices = ctypes.cast(devices, ctypes.c_void_p)
            self._kept.append(devices)

    @property
    def device(self) -> str | None:
        """The GPUs' names as `choose` and llama.cpp's --device take them; None for none."""
        return ",".join(gpu.name for gpu in self.gpus) or None

    def arguments(self) -> list[str]:
        """The same as options of llama.cpp's programs, the expression apart: for programs that have GPU backends."""
        devices = ["--device", self.device] if self.named and self.device else []
        return ["--n-gpu-layers", str(self.n_gpu_layers), *devices]

    def __str__(self) -> str:
        """One line for the user."""
        if not self.n_gpu_layers:
            return f"GPU: {' and '.join(map(str, self.gpus)) or 'none'}: nothing is computed there"
        n, names = self.n_gpu_layers - 1, " and ".join(gpu.name for gpu in self.gpus)
        what = f"output and attention of {n} of {self.n_layers - 1} layers" if n else "output"
        return f"GPU: {what} on {names}, {self.n_bytes / 1e9:.2f} GB"


NOTHING = Offload(0, 0)


class Offloading:
    """To be put before llama_cpp.Llama among the bases of a class: what it loads goes where `offload` says, for which
    its constructor has no argument. It sets `model_params` (llama_model_params) first of all."""

    offload: Offload

    @property
    def model_params(self) -> Any:
        return self._model_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        self.offload.apply(params)
        self._model_params = params


def choose(header: Header, there: Sequence[Gpu], wanted: Wanted = WHAT_FITS, *, n_ctx: int) -> Offload:
    """How many layers go to which GPUs.

    Args:
        header: of the model file.
        there: the GPUs of the process or program that will compute.
        wanted: "auto" takes as many layers as fit into the memory that is free but for MARGIN_BYTES of each GPU, and
            into the budget, on GPUs that have memory of their own. Without names, GPUs are those that llama.cpp would
            take.
        n_ctx: tokens of context.

    Raises:
        TsconvError: no such GPU; layers for a GPU where there is none.
        ModelFileError: the header lacks a dimension.
    """
    n_layer = shape_of(header)[0]
    number = _number(wanted.n_gpu_layers)
    if number == 0:
        return Offload(0, n_layer + 1)
    gpus, named = _named(there, wanted.device, wanted.main_gpu), wanted.has_names
    discrete = [gpu for gpu in gpus if not gpu.is_integrated]
    if not named and (number is None or discrete):  # llama.cpp too takes integrated ones only where there is no other
        gpus = discrete
    costs = layer_bytes(header, n_ctx)
    if number is None:
        n = layers_that_fit(costs, room_on(gpus, wanted.vram_budget))
    else:
        n = n_layer + 1 if number < 0 else min(number, n_layer + 1)
        if not gpus:
            raise TsconvError(
                "layers for a GPU",
                expected="a GPU that llama.cpp has a backend for",
                found="none",
                fix="tsconv doctor tells why; -ngl 0 computes without",
            )
    return Offload(n, n_layer + 1, tuple(gpus), sum(costs[:n]), named)


def room_on(gpus: Iterable[Gpu], vram_budget: int | None = None) -> int:
    """Bytes that may be used of their memory."""
    free = sum(max(0, gpu.free_bytes - MARGIN_BYTES) for gpu in gpus)
    return free if vram_budget is None else min(free, vram_budget)


def layers_that_fit(costs: Sequence[int], room: int) -> int:
    """How many of the layers, in the order of `layer_bytes`."""
    return sum(total <= room for total in itertools.accumulate(costs))


def _number(n_gpu_layers: int | str) -> int | None:
    """None for "auto"."""
    if n_gpu_layers == AUTO:
        return None
    if n_gpu_layers == "all":
        return ALL
    if isinstance(n_gpu_layers, int) and n_gpu_layers >= ALL:
        return n_gpu_layers
    raise TsconvError("layers for a GPU", expected="auto, all or a number", found=n_gpu_layers)


def _named(there: Sequence[Gpu], device: str | None, main_gpu: int | None) -> list[Gpu]:
    names = ", ".join(gpu.name for gpu in there) or "none"
    found = list(there)
    if device is not None:
        by_name = {gpu.name.lower(): gpu for gpu in there}
        wanted = [name.strip() for name in device.split(",")]
        for name in wanted:
            if name.lower() not in by_name:
                raise TsconvError("no such GPU", expected=f"some of {names}", found=name)
        found = [by_name[name.lower()] for name in dict.fromkeys(wanted)]
    if main_gpu is not None:
        if not 0 <= main_gpu < len(found):
            raise TsconvError("the main GPU", expected=f"a number below {len(found)}: {names}", found=main_gpu)
        found = [found[main_gpu]]
    return found


def layer_bytes(header: Header, n_ctx: int, with_ffn: bool = False) -> list[int]:
    """Bytes that the output takes on a GPU, then the last layer, the one before it, and so on; without their FFNs, or
    with them, as stock llama.cpp puts them there.

    Raises:
        ModelFileError: the header lacks a dimension.
    """
    n_layer = shape_of(header)[0]
    keys_and_values = padded(n_ctx) * kv_bytes_per_token(header)
    layers = [keys_and_values] * n_layer
    others: dict[str, int] = {}
    for tensor in header.tensors:
        if found := OF_A_LAYER.match(tensor.name):
            layers[int(found[1])] += tensor.n_bytes if with_ffn or not found[2] else 0
        else:
            others[tensor.name] = tensor.n_bytes
    if OUTPUT[0] not in others and EMBEDDING in others:
        others[OUTPUT[0]] = others[EMBEDDING]  # tied: llama.cpp keeps a second copy there
    return [sum(others.get(name, 0) for name in OUTPUT), *reversed(layers)]
