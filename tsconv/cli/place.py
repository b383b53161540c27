"""`tsconv place`: parses options, calls tsconv.commands.place.place, prints the placement."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tsconv.cli.options import DEFAULT_CONTEXT, Size, profile_option
from tsconv.cli.output import echo, json_text, say
from tsconv.cli.text import size, table

if TYPE_CHECKING:
    from tsconv.commands.place import Placed
    from tsconv.placement.cost import LayerTime

MAX_CONTEXT = 1 << 24  # TSFFN_MAX_CONTEXT
NEGLIGIBLE = 1e-9  # a gap that is rounding


@click.command("place")
@click.argument("model", type=click.Path(path_type=Path))
@profile_option
@click.option("--machine", required=True, metavar="NAME|FILE", help="Machine profile, such as pc-2080ti, or its file.")
@click.option(
    "--vram-budget",
    type=Size(),
    metavar="SIZE",
    help="For weights and KV cache on the GPU, such as 9GiB.  [default: its memory less 1 GiB]",
)
@click.option(
    "--ram-budget",
    type=Size(),
    metavar="SIZE",
    help="For the rest of them.  [default: the machine's memory less 4 GiB]",
)
@click.option(
    "-c",
    "--ctx-size",
    "ctx",
    type=click.IntRange(1, MAX_CONTEXT),
    default=DEFAULT_CONTEXT,
    show_default=True,
    help="Tokens of the KV cache.",
)
@click.option("--ctx", "old_ctx", type=click.IntRange(1, MAX_CONTEXT), hidden=True)  # its name before
@click.option(
    "--outfile",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Placement to write.  [default: NAME.placement.json beside MODEL]",
)
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(model: Path, as_json: bool, old_ctx: int | None, **options: Any) -> None:
    """Decide which neurons of MODEL live on the GPU, in RAM and on disk.

    MODEL has its hot neurons first (tsconv reorder). The placement is the one with the least expected time per token,
    by the cost model of docs/placement.md.
    """
    from tsconv.commands.place import place

    if old_ctx is not None:
        options["ctx"] = old_ctx
    placed = place(model, **options)
    for note in placed.notes:
        say(f"note: {note}")
    echo(json_text(_as_dict(placed), indent=2) if as_json else _text(placed, model, options["machine"]))


def _as_dict(placed: Placed) -> dict[str, Any]:
    """The placement file's content and the expected times."""
    fields = dataclasses.asdict(placed.placement)
    estimate = placed.solution.estimate
    for layer, time in zip(fields["layers"], estimate.layers, strict=True):
        layer["ms"] = _times(time)
    return {
        "outfile": str(placed.outfile),
        **fields,
        "gap": placed.solution.gap,
        "optimal": placed.solution.optimal,
        "outside_layers": {"ms": _times(estimate.outside)},
        "waited_ms": {name: 1e3 * seconds for name, seconds in estimate.waited.items()},
        "assumed": placed.machine.assumed,
        "notes": placed.notes,
    }


def _times(time: LayerTime) -> dict[str, float]:
    return {
        "gpu": 1e3 * time.gpu,
        "cpu": 1e3 * time.cpu,
        "transfer": 1e3 * time.transfer,
        "total": 1e3 * time.seconds,
    }


def _text(placed: Placed, model: Path, machine: str) -> str:
    placement, solution = placed.placement, placed.solution
    estimate = solution.estimate
    proved = solution.gap < NEGLIGIBLE
    quality = "no placement is faster" if proved else f"the best one is at most {_percent(solution.gap)} faster"
    head = (
        f"{model.name} on {placed.machine.name}: {_rate(estimate.seconds)} expected"
        f" ({1e3 * estimate.seconds:.4g} ms per token); {quality}"
    )
    budgets = placement.budgets
    memory = [
        (name, size(budgets[f"{key}_used"]), "of", size(budgets[key]), f"({_percent(_share(budgets, key))})")
        for name, key in (("VRAM", "vram"), ("RAM", "ram"))
    ]
    waited = sorted(estimate.waited.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{name} {_percent(seconds / estimate.seconds)}" for name, seconds in waited if seconds)
    lines = [
        head,
        table(_rows(placed), right=tuple(range(3, 11))),
        table(memory, right=(1, 3)),
        f"CPU only: {_rate(placed.cpu_only.seconds) if placed.cpu_only else 'does not fit'}; {_all_gpu(placed)}",
        f"bound by {waited[0][0]}: {parts}",
    ]
    if placed.machine.assumed:
        lines.append(f"assumed of the machine: {', '.join(placed.machine.assumed)}")
    context = [] if placement.ctx == DEFAULT_CONTEXT else ["-c", str(placement.ctx)]
    run = ["tsconv", "run", "-m", str(model), *context, "--machine", machine, "--placement", str(placed.outfile)]
    lines.append(f"next: {shlex.join(run)}")
    return "\n\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:])


def _rows(placed: Placed) -> list[tuple[str, ...]]:
    """Per layer: where it is, and what it is expected to cost."""
    rows: list[tuple[str, ...]] = [
        (
            *("layer", "attention", "predictor", "GPU neurons", "share", "reads", "RAM neurons"),
            *("GPU ms", "CPU ms", "transfer ms", "ms"),
        )
    ]
    estimate = placed.solution.estimate
    for n, (layer, place) in enumerate(zip(placed.work.layers, placed.solution.layers, strict=True)):
        on_gpu = sum(place.gpu)
        covered = sum(float(heat[:g].sum()) for heat, g in zip(layer.heat, place.gpu, strict=True))
        rows.append(
            (
                str(n),
                place.attention,
                place.predictor if placed.work.has_predictor else "-",
                f"{on_gpu:,}",
                _percent(on_gpu / layer.n_neurons),
                _percent(covered / max(float(layer.heat.sum()), 1e-300)),
                f"{sum(place.ram):,}",
                *_milliseconds(estimate.layers[n]),
            )
        )
    rows.append(("output", placed.placement.output, "", "", "", "", "", *_milliseconds(estimate.outside)))
    return rows


def _milliseconds(time: LayerTime) -> tuple[str, ...]:
    return tuple(f"{1e3 * seconds:.3f}" for seconds in (time.gpu, time.cpu, time.transfer, time.seconds))


def _all_gpu(placed: Placed) -> str:
    if placed.all_gpu is None:
        return "no GPU"
    needed = placed.all_gpu.vram
    verdict = "fits" if needed <= placed.placement.budgets["vram"] else f"does not fit: {size(needed)}"
    return f"all on the GPU: {_rate(placed.all_gpu.seconds)} ({verdict})"


def _rate(seconds: float) -> str:
    return f"{1 / seconds:,.1f} tokens/s"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 or share == 0 else f"{100 * share:.2g} %"


def _share(budgets: dict[str, int], key: str) -> float:
    return budgets[f"{key}_used"] / budgets[key] if budgets[key] else 0.0
