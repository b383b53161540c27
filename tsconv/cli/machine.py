"""`--machine` and `--placement`: loading a model with what a machine profile suggests, and saying what that was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from tsconv.cli.output import progress_bar, say
from tsconv.cli.text import size

if TYPE_CHECKING:
    from tsconv.commands.load import Choice
    from tsconv.placement.fit import Fit
    from tsconv.runtime.model import SparseLlama
    from tsconv.runtime.residency import Residency
    from tsconv.runtime.streaming import Budget

AUTO_BUDGET = "auto"  # of --ram-budget
DELAY = 1.0  # seconds of loading before a bar shows
RAISE_THE_LIMIT = (
    "raise it with ulimit -l, beyond the hard limit with memlock in /etc/security/limits.conf or LimitMEMLOCK= of a "
    "systemd service"
)


def machine_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options --machine and --placement, passed on as machine, placement."""
    for option in (
        click.option(
            "--placement",
            metavar="FILE",
            help="Placement made by tsconv place: which neurons belong in RAM. Needs --machine.",
        ),
        click.option(
            "--machine",
            metavar="auto|NAME|FILE",
            help="Choose threads and what to keep in RAM for a machine: a profile, or auto for this one.",
        ),
    ):
        function = option(function)
    return function


def load_model(
    *,
    model: str,
    machine: str | None,
    placement: str | None,
    n_ctx: int,
    n_threads: int | None,
    sparsity: str | None,
    predictor_path: str | None,
    verbose: bool,
    ram_budget: str,
    gpu: Mapping[str, Any],
    more: Mapping[str, Any],
) -> tuple[SparseLlama, dict[str, Any] | None]:
    """Loads a model, on a machine when one is named; says on stderr what was chosen.

    The arguments are the options of `model_options` and `machine_options`; `gpu`: those of `gpu_options`; `more` is for
    SparseLlama.

    Returns:
        the model, and what was chosen for --json; None without a machine.

    Raises:
        click.UsageError: a placement without a machine.
    """
    say_cost(sparsity)
    options = {
        "n_ctx": n_ctx,
        "n_threads": n_threads,
        "sparsity": sparsity,
        "predictor_path": predictor_path,
        "verbose": verbose,
        **more,
    }
    if machine is None:
        _refuse_placement(placement)
        from tsconv.runtime.model import load

        with progress_bar("loading", DELAY) as progress:
            llama = load(model, ram_budget=ram_budget, progress=progress, **gpu, **options)
        _say_gpus(llama)
        if llama.budget is not None:
            say_budget(llama.budget)
        return llama, None

    from tsconv.commands.load import AUTO, load_on_machine
    from tsconv.machine.this import machine_file
    from tsconv.runtime.offload import Wanted

    if ram_budget != AUTO_BUDGET:
        options["ram_budget"] = ram_budget
    with progress_bar("loading", DELAY) as progress:
        llama, fit, residency = load_on_machine(
            model, machine, placement_path=placement, say=say, progress=progress, on_gpus=Wanted(**gpu), **options
        )
    notes = describe(fit, residency, str(machine_file()) if machine == AUTO else None, llama.gpu_share is not None)
    for line in notes:
        say(line)
    if llama.budget is not None:
        say_budget(llama.budget)
    _say_gpus(llama)
    return llama, as_dict(fit, residency) | {"placement": placement, "notes": notes}


def say_cost(sparsity: str | None) -> None:
    """Says on stderr what topk costs."""
    if sparsity is not None and sparsity.startswith("topk"):
        say(
            f"note: {sparsity} computes gate and up of every neuron to choose among them: it measures what sparsity "
            "costs in quality, and is no faster than --sparsity exact"
        )


def choose_for_machine(
    model: str,
    machine: str | None,
    placement: str | None,
    n_ctx: int,
    n_threads: int | None,
    sparsity: str | None,
    predictor_path: str | None,
    ram_budget: str,
) -> Choice | None:
    """What to load on a machine, said on stderr; None when none is named. The arguments are those of `load_model`.

    Raises:
        click.UsageError: a placement without a machine.
    """
    if machine is None:
        _refuse_placement(placement)
        return None
    from tsconv.commands.load import AUTO, choose
    from tsconv.format.summary import ffn_bytes
    from tsconv.machine.this import machine_file
    from tsconv.runtime.streaming import OFF

    choice = choose(
        model,
        machine,
        placement_path=placement,
        n_ctx=n_ctx,
        n_threads=n_threads,
        sparsity=sparsity,
        predictor_path=predictor_path,
        say=say,
    )
    measured = str(machine_file()) if machine == AUTO else None
    lines = describe_choice(choice.fit, ffn_bytes(choice.header), measured)
    for line in lines if ram_budget == AUTO_BUDGET and choice.ram_budget() == OFF else lines[:1]:
        say(line)
    return choice


def _say_gpus(llama: SparseLlama) -> None:
    """Nothing where there is no GPU to speak of."""
    if llama.offload.gpus:
        say(str(llama.offload))
    if llama.gpu_share is not None:
        say(str(llama.gpu_share))
    elif llama.gpu_complaint is not None:
        say(f"warning: FFNs stay on the CPU: {llama.gpu_complaint}")


def say_budget(budget: Budget) -> None:
    """One line about a model whose neurons are read from disk."""
    kept = min(1.0, budget.neurons / budget.ffn)
    say(
        f"memory: {size(budget.total)} {'given' if budget.given else 'available'}; attention and output "
        f"{size(budget.weights)}, predictors {size(budget.predictors)} and context {size(budget.context)} stay in it, "
        f"and {size(budget.ffn * kept)} of {size(budget.ffn)} neurons ({100 * kept:.0f} %); others are read from disk "
        "when they are needed"
    )


def _refuse_placement(placement: str | None) -> None:
    if placement is not None:
        raise click.UsageError("--placement needs --machine: auto, or the machine it was made for.")


def as_dict(fit: Fit, residency: Residency | None) -> dict[str, Any]:
    """What was chosen and done, for JSON."""
    chosen = dataclasses.asdict(fit)
    hot = chosen.pop("hot")
    return {
        **chosen,
        "needed_bytes": fit.needed_bytes,
        "budget_bytes": fit.budget_bytes,
        "hot_neurons": int(hot.sum()),
        "residency": None if residency is None else dataclasses.asdict(residency),
    }


def describe(fit: Fit, residency: Residency | None, measured: str | None = None, on_gpu: bool = False) -> list[str]:
    """What was chosen and why, in one to five lines; `measured` is the file of a profile of this machine, `on_gpu`:
    a GPU has a share of the FFNs. Without a residency memory is another's to describe."""
    if residency is None:
        return [_threads(fit, measured)]
    lines = [*describe_choice(fit, residency.ffn_bytes, measured), _residency(residency)]
    if fit.lock and (locking := _locking(residency)):
        lines.append(locking)
    elif residency.failures:
        lines.append(f"the system refused: {'; '.join(residency.failures)}")
    if fit.gpu_neurons and not on_gpu:
        lines.append(f"{fit.gpu_neurons} neurons that the placement gives to a GPU are computed on the CPU, from RAM")
    return lines


def describe_choice(fit: Fit, ffn_bytes: int, measured: str | None = None) -> list[str]:
    """What was chosen and why, in two lines; `ffn_bytes` are the model's gate, up and down weights."""
    return [_threads(fit, measured), _memory(fit, ffn_bytes)]


def _threads(fit: Fit, measured: str | None) -> str:
    has = f"{fit.machine} has {fit.machine_cores} {'core' if fit.machine_cores == 1 else 'cores'}"
    if measured:
        has += f" that compute, as measured once (delete {measured} to measure again)"
    if fit.threads_given:
        return f"threads {fit.n_threads}: as given; {has}, this process may use {fit.usable_cores}"
    if fit.machine_cores > fit.usable_cores:
        return f"threads {fit.n_threads}: {has}, but this process may use {fit.usable_cores}"
    return f"threads {fit.n_threads}: {has}"


def _memory(fit: Fit, ffn_bytes: int) -> str:
    room = f"{size(fit.budget_bytes)} available"
    if fit.available_bytes < fit.machine_bytes and fit.machine_bytes - fit.available_bytes > fit.margin_bytes:
        room += f" here ({fit.machine} has {size(fit.machine_bytes)})"
    elif fit.machine_bytes < fit.available_bytes:
        room = f"{size(fit.budget_bytes)} of {fit.machine}"
    parts = f"model {size(fit.model_bytes)}, predictors {size(fit.sidecar_bytes)}, "
    parts += f"context {size(fit.context_bytes)}, margin {size(fit.margin_bytes)}"
    read_ahead = "read-ahead on: every gate is read" if fit.read_ahead else "read-ahead off"
    if fit.strategy == "all":
        return f"memory: {parts} fit in {room}: all of it is brought into RAM"
    if fit.strategy == "on_demand":
        needed = f"need {size(fit.needed_bytes)} of {room}"
        return f"memory: {parts} {needed}: neurons stay on disk until they are needed, {read_ahead}"
    wanted = f"memory: the placement keeps {size(fit.asked_bytes)} of the FFNs in RAM"
    if fit.hot_bytes < fit.asked_bytes:
        share = fit.hot_bytes / fit.asked_bytes
        wanted += f", of which the hottest {size(fit.hot_bytes)} ({share:.0%}) fit beside the rest in {room}"
    else:
        wanted += f", which fit in {room}"
    if fit.hot_bytes >= ffn_bytes:
        return f"{wanted}: these are all of them"
    return f"{wanted}; others stay on disk until they are needed, {read_ahead}"


def _residency(residency: Residency) -> str:
    # Pages hold bytes of other weights too.
    hot = min(residency.hot_resident_bytes, residency.ffn_bytes)
    line = f"FFN: {size(hot)} of {size(residency.ffn_bytes)} in RAM"
    if residency.sidecar_bytes:
        line += f"; predictors: {size(residency.sidecar_resident_bytes)} of {size(residency.sidecar_bytes)}"
    return line


def _locking(residency: Residency) -> str:
    wanted = residency.hot_bytes + residency.sidecar_bytes
    line = f"locked {size(residency.locked_bytes)} of {size(wanted)}"
    if residency.lock_limit_bytes is not None:
        line += f": the limit (ulimit -l) is {size(residency.lock_limit_bytes)}; {RAISE_THE_LIMIT}"
    elif residency.failures:
        line += f"; the system refused: {'; '.join(residency.failures)}"
    return line
