"""`run` and `serve` with --machine: a model loaded as its weights fit the machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tsconv.format.header import Header, read_header
from tsconv.format.kv_cache import padded
from tsconv.format.pair import sidecar_path
from tsconv.format.summary import ffn_bytes
from tsconv.machine.profile import Machine, load_machine
from tsconv.machine.this import this_machine
from tsconv.native.devices import Gpu, gpus
from tsconv.placement.file import GPU, Placement
from tsconv.placement.fit import Fit, fit
from tsconv.runtime.binding import open_model
from tsconv.runtime.model import SparseLlama, load
from tsconv.runtime.offload import MARGIN_BYTES, WHAT_FITS, Wanted
from tsconv.runtime.residency import Residency
from tsconv.runtime.streaming import FEWEST_BYTES, OFF

AUTO = "auto"


@dataclass(frozen=True)
class Choice:
    """How a model is to be loaded: what was read of it, and what was chosen."""

    header: Header
    sparsity: str
    fit: Fit
    machine: Machine
    placement: Placement | None

    def gpu(self, wanted: Wanted, there: Sequence[Gpu]) -> Wanted:
        """What goes to GPUs: what the user wants, else what the placement says, else as much as the machine's GPU
        holds; nothing where the machine has none. `there`: llama.cpp's GPUs."""
        if wanted.n_gpu_layers != AUTO:
            return wanted
        if self.machine.gpu is None:
            return replace(wanted, n_gpu_layers=0)
        most = max(0, self.machine.gpu.memory_bytes - MARGIN_BYTES)
        if self.placement is not None:
            most = min(most, self.placement.budgets.get("vram", most))
        budget = most if wanted.vram_budget is None else min(most, wanted.vram_budget)
        wanted = replace(wanted, vram_budget=budget)
        if self.placement is None:
            return wanted
        n = sum(layer.attention == GPU for layer in self.placement.layers)
        hot = [layer.gpu for layer in self.placement.layers]
        if there:
            wanted = replace(wanted, n_gpu_layers=n + 1 if n or self.placement.output == GPU else 0)
        return replace(wanted, gpu_hot=hot if any(map(any, hot)) else None)

    def ram_budget(self) -> int | str:
        """For SparseLlama: bytes for weights and context where they do not fit, so that neurons are read from disk when
        they are needed; "off" where all fit, or where the neurons are too small for that, or the rest too large."""
        fit, ffn = self.fit, ffn_bytes(self.header)
        room = fit.budget_bytes - fit.margin_bytes
        rest = fit.needed_bytes - fit.margin_bytes - ffn
        streams = fit.strategy != "all" and ffn > FEWEST_BYTES and room >= rest + FEWEST_BYTES
        return room if streams else OFF


def choose(
    model_path: str | os.PathLike[str],
    machine: str | Machine,
    *,
    placement_path: str | os.PathLike[str] | None = None,
    predictor_path: str | os.PathLike[str] | None = None,
    sparsity: str | None = None,
    n_ctx: int = 512,
    n_threads: int | None = None,
    available_bytes: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Choice:
    """Checks a model and its sidecar and fits them to a machine; loads nothing. Arguments and errors as for
    `load_on_machine`."""
    path = Path(model_path)
    named = None if predictor_path is None else Path(predictor_path)
    sidecar = named or sidecar_path(path)
    native = open_model(path, named, sparsity)  # checks both files before anything is decided
    native.close()
    header = read_header(path)
    profile = _machine(machine, say)
    placement = None if placement_path is None else Placement.load(os.fspath(placement_path))
    chosen = fit(
        header,
        profile,
        sidecar_bytes=sidecar.stat().st_size if native.kind == "predictor" else 0,
        sparsity=native.kind,
        n_ctx=padded(n_ctx),
        n_threads=n_threads,
        placement=placement,
        available_bytes=available_bytes,
    )
    return Choice(header, native.sparsity, chosen, profile, placement)


def load_on_machine(
    model_path: str | os.PathLike[str],
    machine: str | Machine,
    *,
    placement_path: str | os.PathLike[str] | None = None,
    predictor_path: str | os.PathLike[str] | None = None,
    sparsity: str | None = None,
    n_ctx: int = 512,
    n_threads: int | None = None,
    available_bytes: int | None = None,
    on_gpus: Wanted = WHAT_FITS,
    say: Callable[[str], None] = lambda line: None,
    **kwargs: Any,
) -> tuple[SparseLlama, Fit, Residency | None]:
    """Loads a model with what `fit` chooses, brings the chosen weights into RAM and computes one token. Where they do
    not fit, neurons are read from disk when they are needed, and those that are used most often stay: there is no
    Residency then, but the model's `budget`.

    Args:
        machine: a profile, its name or path, or "auto" for this machine (`this_machine`).
        placement_path: made by `tsconv place` for this model.
        predictor_path: the sidecar, when it is not `NAME.predictor.gguf` beside the model.
        available_bytes: as for `fit`.
        on_gpus: what the user wants there; "auto" heeds the machine and the placement.
        say: called with one line when something takes a while.
        **kwargs: as `SparseLlama`.

    Raises:
        ModelFileError: model, sidecar or placement missing, damaged, or of another model.
        TsconvError: no such machine profile.
    """
    choice = choose(
        model_path,
        machine,
        placement_path=placement_path,
        predictor_path=predictor_path,
        sparsity=sparsity,
        n_ctx=n_ctx,
        n_threads=n_threads,
        available_bytes=available_bytes,
        say=say,
    )
    chosen = choice.fit
    kwargs = {"ram_budget": choice.ram_budget()} | kwargs
    if chosen.strategy != "all":
        kwargs = {"preload": False} | kwargs
    llama = load(
        model_path,
        sparsity=sparsity,
        predictor_path=predictor_path,
        n_ctx=n_ctx,
        n_threads=chosen.n_threads,
        header=choice.header,
        **vars(choice.gpu(on_gpus, gpus() if on_gpus.n_gpu_layers == AUTO else ())),
        **kwargs,
    )
    residency = None
    try:
        if llama.budget is None:
            residency = llama.place_in_memory(chosen.hot, lock=chosen.lock, read_ahead=chosen.read_ahead)
        llama.warm_up()
    except BaseException:
        llama.close()
        raise
    return llama, chosen, residency


def _machine(machine: str | Machine, say: Callable[[str], None]) -> Machine:
    if machine == AUTO:
        return this_machine(say)
    return load_machine(machine) if isinstance(machine, str) else machine
