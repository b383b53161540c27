"""What llama-server is started with: a model, checked, and what was chosen for the machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tsconv.commands.load import Choice
from tsconv.format.adapter import refuse_adapter
from tsconv.format.header import Header, read_header
from tsconv.format.kv_cache import padded
from tsconv.machine.limits import usable_cores
from tsconv.native.devices import gpus_elsewhere, may_have_gpus
from tsconv.native.ffn_gpus import ffn_gpus_elsewhere
from tsconv.runtime.binding import open_model
from tsconv.runtime.hybrid import which
from tsconv.runtime.offload import WHAT_FITS, Offload, Wanted, choose
from tsconv.runtime.programs import Command, command, environment, gpu_environment, model_arguments
from tsconv.runtime.streaming import AUTO, OFF, Budget, choose_budget

ALIAS = {"-a", "--alias"}  # llama-server adds names to those before; the model shall have the user's alone
GPU_LAYERS = {"-ngl", "--gpu-layers", "--n-gpu-layers"}
# llama-server's variables for what its command line says here: it would warn that they do not count.
DECIDED = (
    "LLAMA_ARG_MODEL",
    "LLAMA_ARG_ALIAS",
    "LLAMA_ARG_CTX_SIZE",
    "LLAMA_ARG_THREADS",
    "LLAMA_ARG_HOST",
    "LLAMA_ARG_PORT",
    "LLAMA_ARG_N_GPU_LAYERS",
)


@dataclass(frozen=True)
class Serving:
    """A model to serve.

    Attributes:
        model, predictor, sparsity, lora: as for `tsconv.load`.
        n_ctx: tokens that all requests at once have room for; each may use all of it.
        n_threads: None for the cores that this process may use, or those of the machine.
        on_gpus: what is to go to GPUs.
        choice: made for a machine by `tsconv.commands.load.choose`; None without one.
        ram_budget: as for `tsconv.load`; "auto" is what the choice says, if there is one. Where it makes neurons be
            read from disk, `say` is told.
    """

    model: str
    predictor: str | None = None
    sparsity: str | None = None
    lora: str | None = None
    n_ctx: int = 4096
    n_threads: int | None = None
    on_gpus: Wanted = WHAT_FITS
    choice: Choice | None = None
    ram_budget: int | str = AUTO
    say: Callable[[Budget], None] = lambda budget: None

    def gpus(self, header: Header) -> tuple[Offload | None, dict[str, str]]:
        """What goes to which GPUs of llama-server; None where it has no backend for any. And the variables that give
        one a share of the FFNs; {} where none can have it."""
        there = [] if self.on_gpus.n_gpu_layers == 0 else gpus_elsewhere()
        wanted = self.on_gpus if self.choice is None else self.choice.gpu(self.on_gpus, there)
        devices = ffn_gpus_elsewhere() if self.lora is None and wanted.ffns else []
        # Without a GPU of llama.cpp's those that are named are for FFNs.
        of_layers = replace(wanted, device=None, main_gpu=None) if devices and not there else wanted
        offload = choose(header, there, of_layers, n_ctx=self.n_ctx)
        variables = {}
        if devices:
            left = None if wanted.vram_budget is None else max(0, wanted.vram_budget - offload.n_bytes)
            hot = None if wanted.gpu_hot is None else np.array(wanted.gpu_hot, dtype=np.int32)
            variables = gpu_environment(which(devices, offload, wanted), left, hot)
        return offload if may_have_gpus() else None, variables


def prepare(serving: Serving, options: Sequence[str], api_key: str | None = None) -> Command:
    """llama-server with the model and with `options`, which are its own, ready to be run.

    Raises:
        ModelFileError: model, sidecar or adapter missing, damaged, or not of one another.
        BackendError: llama-server is not installed, or does not load the backend.
    """
    path = Path(serving.model)
    choice, ram_budget = serving.choice, serving.ram_budget
    if choice is None:
        # llama-server would say what is wrong with the files too, but only in its log.
        predictor = None if serving.predictor is None else Path(serving.predictor)
        native = open_model(path, predictor, serving.sparsity)
        native.close()
        header, n_threads = native.header, serving.n_threads or usable_cores()
        variables = environment(path, predictor=predictor, sparsity=serving.sparsity)
        sidecar_bytes = native.sidecar_bytes
    else:
        header, n_threads, fit = choice.header, choice.fit.n_threads, choice.fit
        sidecar_bytes = fit.sidecar_bytes
        ram_budget = choice.ram_budget() if ram_budget == AUTO else ram_budget
        kept: dict[str, Any] = {"hot": fit.hot, "lock": fit.lock, "read_ahead": fit.read_ahead}
        variables = environment(
            path, predictor=serving.predictor, sparsity=choice.sparsity, **(kept if ram_budget == OFF else {})
        )
    arguments = model_arguments(path)
    if not ALIAS & set(options):
        arguments += ["--alias", path.stem]
    arguments += ["--ctx-size", str(padded(serving.n_ctx)), "--threads", str(n_threads)]
    offload, of_gpu = (None, {}) if GPU_LAYERS & set(options) else serving.gpus(header)
    variables |= of_gpu
    if offload is not None:
        arguments += offload.arguments()
    on_gpus = 0 if offload is None else offload.n_bytes
    budget = choose_budget(header, sidecar_bytes, serving.n_ctx, ram_budget, on_gpus=on_gpus)
    if budget is not None:
        serving.say(budget)
        variables["TSFFN_NEURON_CACHE"] = str(budget.neurons)
        arguments += ["--load-mode", "dio"]
    if serving.lora is not None:
        refuse_adapter(header, read_header(Path(serving.lora)))
        arguments += ["--lora", serving.lora, "--load-mode", "none"]
    for name in DECIDED:
        variables.pop(name, None)
    if api_key is not None:
        variables["LLAMA_API_KEY"] = api_key  # not on the command line, which everybody can read
    return command("llama-server", [*arguments, *options], variables)
