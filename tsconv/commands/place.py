"""`place`: reads a model, its activation statistics and a machine's profile, and writes the best placement."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tsconv.errors import ModelFileError, OutputError, TsconvError
from tsconv.format.header import Header
from tsconv.format.kv_cache import padded
from tsconv.format.order import HOT_FIRST, kind_of, neuron_order
from tsconv.format.pair import fingerprint_of, read_model, read_sidecar, sidecar_path
from tsconv.machine.profile import ASSUMPTIONS, GIB, Machine, load_machine
from tsconv.placement.cost import Estimate, Rates, Workload, evaluate, read_workload
from tsconv.placement.file import GPU, Placement
from tsconv.placement.solve import Solution, solve, whole
from tsconv.stats import file as stats_file
from tsconv.stats.counts import Stats
from tsconv.stats.heat import hot_order
from tsconv.write.writer import check_output, refuse_inputs

# What a default budget leaves of a machine's memory, bytes. Assumptions, not measurements: llama.cpp's compute buffers,
# the driver's context and a desktop on the GPU; the system and other programs in RAM.
VRAM_RESERVE = 1 * GIB
RAM_RESERVE = 4 * GIB


@dataclass(frozen=True)
class Placed:
    """What `place` decided.

    Attributes:
        placement: as written to `outfile`.
        solution: with the expected times of each layer.
        work, machine: what it was decided for.
        cpu_only: without a GPU, the same RAM budget; None when the model does not fit so.
        all_gpu: everything on the GPU, whether it fits or not; None without a GPU.
        notes: what was assumed or deserves attention, one line each.
    """

    placement: Placement
    solution: Solution
    work: Workload
    machine: Machine
    cpu_only: Estimate | None
    all_gpu: Estimate | None
    notes: tuple[str, ...]
    outfile: Path


def place(
    model: str | Path,
    profile: str | Path,
    machine: str | Machine,
    *,
    vram_budget: int | None = None,
    ram_budget: int | None = None,
    ctx: int = 4096,
    outfile: str | Path | None = None,
    force: bool = False,
) -> Placed:
    """Decides which neurons live on the GPU, in RAM and on disk, so that a token takes the least expected time.

    Args:
        model: NAME.gguf in hot-first order (tsconv reorder); its sidecar is taken from beside it.
        profile: activation statistics of the same checkpoint.
        machine: a profile, its name or its path.
        vram_budget: bytes that weights and KV cache may take on the GPU; default its memory less VRAM_RESERVE.
        ram_budget: bytes that the rest of them may take; default the machine's memory less RAM_RESERVE.
        ctx: tokens of the KV cache.
        outfile: default NAME.placement.json beside the model.
        force: replace it if it exists.

    Raises:
        ModelFileError: model, sidecar or statistics are missing, damaged, not hot first, or do not belong together.
        OutputError: the output exists, is one of the inputs, or cannot be written.
        TsconvError: no such machine, a budget that it does not have, or one too small for the model.
    """
    model, profile = Path(model), Path(profile)
    target = _target(outfile, model, profile, force)
    machine = load_machine(machine) if isinstance(machine, str) else machine
    stats = stats_file.load(profile)
    header = read_model(model)
    stats.check_model(header)
    _check_order(header, profile)
    sidecar = read_sidecar(header) if stats.subject.sparsity == "predictor" else None
    work, rates = read_workload(header, sidecar, stats, ctx), Rates.of(machine)
    vram, ram = _budgets(machine, vram_budget, ram_budget)
    solution = solve(work, rates, vram, ram)
    cpu_only = solution.estimate if vram == 0 else _without_gpu(work, rates, ram)
    all_gpu = evaluate(work, rates, whole(work, GPU), GPU) if rates.has_gpu else None
    notes = [
        *_default_budgets(machine, vram_budget, ram_budget),
        *_notes(header, stats, machine, work, solution, ctx),
    ]
    estimate = solution.estimate
    placement = Placement(
        fingerprint=fingerprint_of(header),
        pair_id=header.keys["turbosparse.pair_id"],
        neuron_order=HOT_FIRST,
        sparsity=stats.subject.sparsity,
        machine=machine.name,
        ctx=ctx,
        budgets={"vram": vram, "ram": ram, "vram_used": estimate.vram, "ram_used": estimate.ram},
        predicted=_predicted(solution, cpu_only, all_gpu),
        output=solution.output,
        layers=solution.layers,
    )
    placement.save(target, force)
    return Placed(placement, solution, work, machine, cpu_only, all_gpu, tuple(notes), target)


def _target(outfile: str | Path | None, model: Path, profile: Path, force: bool) -> Path:
    """The file to write. Raises OutputError where it must not or cannot be."""
    target = model.with_suffix(".placement.json") if outfile is None else Path(outfile)
    if target.suffix.lower() != ".json":
        raise OutputError("bad name of the output", where=target, expected="a name that ends in .json")
    refuse_inputs([target], [model, sidecar_path(model), profile])
    check_output(target, force)
    return target


def _check_order(header: Header, profile: Path) -> None:
    """Raises ModelFileError where the hot neurons are not together."""
    if kind_of(header) != HOT_FIRST:
        command = shlex.join(["tsconv", "reorder", str(header.path), "--profile", str(profile)])
        raise ModelFileError(
            "the neurons are in the checkpoint's order, the hot ones are not together",
            where=header.path,
            fix=f"put them first: {command}",
        )


def _without_gpu(work: Workload, rates: Rates, ram: int) -> Estimate | None:
    try:
        return solve(work, rates, 0, ram).estimate
    except TsconvError:  # does not fit
        return None


def _predicted(solution: Solution, cpu_only: Estimate | None, all_gpu: Estimate | None) -> dict[str, float | None]:
    """What the file says of the speed."""
    estimate = solution.estimate
    return {
        "ms_per_token": 1e3 * estimate.seconds,
        "lower_bound_ms_per_token": 1e3 * solution.lower_bound,
        "tokens_per_s": 1 / estimate.seconds,
        "cpu_only_tokens_per_s": 1 / cpu_only.seconds if cpu_only else None,
        "all_gpu_tokens_per_s": 1 / all_gpu.seconds if all_gpu else None,
    }


def _budgets(machine: Machine, vram: int | None, ram: int | None) -> tuple[int, int]:
    """VRAM and RAM in bytes. Raises TsconvError when the machine has less than was asked for."""
    gpu_bytes = machine.gpu.memory_bytes if machine.gpu else 0
    for name, given, total in (("VRAM", vram, gpu_bytes), ("RAM", ram, machine.cpu.memory_bytes)):
        if given is not None and given > total:
            raise TsconvError(
                f"the {name} budget is more than the machine has",
                where=machine.name,
                expected=f"at most {total:,} bytes",
                found=f"{given:,}",
            )
    return (
        max(0, gpu_bytes - VRAM_RESERVE) if vram is None else vram,
        max(0, machine.cpu.memory_bytes - RAM_RESERVE) if ram is None else ram,
    )


def _default_budgets(machine: Machine, vram: int | None, ram: int | None) -> Iterator[str]:
    if vram is None and machine.gpu is not None:
        yield (
            f"VRAM budget: {machine.gpu.memory_bytes / GIB:.4g} GiB less {VRAM_RESERVE / GIB:g} GiB for compute "
            "buffers, driver and display (--vram-budget)"
        )
    if ram is None:
        yield (
            f"RAM budget: {machine.cpu.memory_bytes / GIB:.4g} GiB less {RAM_RESERVE / GIB:g} GiB for the system and "
            "other programs (--ram-budget)"
        )


def _notes(
    header: Header, stats: Stats, machine: Machine, work: Workload, solution: Solution, ctx: int
) -> Iterator[str]:
    """What the prediction rests on."""
    for field in machine.assumed:
        yield f"{machine.name}: {field} is assumed: {ASSUMPTIONS[field]}"
    yield "bytes over bandwidths are counted; arithmetic, kernel launches and synchronisation are not: it is optimistic"
    yield f"the KV cache of {padded(ctx)} tokens is held; that of {ctx / 2:g} is read"
    if not np.array_equal(neuron_order(header), hot_order(stats, (len(work.layers), *work.layers[0].heat.shape))):
        yield "the model was ordered by other statistics than these: its prefixes are not the hottest neurons here"
    on_gpu = sum(sum(layer.gpu) for layer in solution.layers)
    if solution.output == GPU or on_gpu or any(GPU in (p.attention, p.predictor) for p in solution.layers):
        yield "the GPU's part needs a CUDA GPU where the model runs; without one the CPU computes it (docs/gpu.md)"
    in_ram = sum(sum(layer.ram) for layer in solution.layers)
    on_disk = sum(layer.n_neurons for layer in work.layers) - on_gpu - in_ram
    if on_disk:
        yield f"{on_disk:,} neurons fit neither on the GPU nor in RAM: they are read from disk"
