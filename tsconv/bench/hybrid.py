"""FFNs that a GPU and the CPU share: correctness first, then decoding for several shares, beside the CPU alone.

    python -m tsconv.bench.hybrid --shape turbosparse-mistral-7b --outtype f16 --part 25 --part 50 --part 100

Needs a GPU that `tsconv doctor` finds for hot neurons. Weights are generated. What llama.cpp makes of the same GPU is
another measurement: `tsconv bench -ngl auto --vram-budget SIZE`, where it has a backend for it.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from tsconv.bench.generate import PRESETS, generated
from tsconv.errors import TsconvError
from tsconv.machine.cpu import cpu_model
from tsconv.machine.limits import usable_cores
from tsconv.native.ffn_gpus import NoGpuError, ffn_gpus
from tsconv.native.library import load_backend
from tsconv.runtime.hybrid import Share, overlap
from tsconv.runtime.model import SparseLlama, load

CHECKED = 16  # tokens whose logits are compared
CONTEXT = 1024
MAX_NMSE = 1e-5  # of the median token; where a logit of the predictor is at its threshold, one token may be further off


def check(cpu: SparseLlama, model: SparseLlama, tokens: list[int]) -> dict[str, Any]:
    """Logits with the GPU beside those without, one token at a time; and whether a second run gives the same bits."""
    expected, found, again = (m.token_logits(tokens, n_batch=1) for m in (cpu, model, model))
    errors = ((found - expected) ** 2).sum(axis=1) / (expected**2).sum(axis=1)
    return {
        "nmse": float(np.median(errors)),
        "nmse_max": float(errors.max()),
        "same_twice": bool((found == again).all()),
    }


def decode(model: SparseLlama, tokens: list[int]) -> tuple[float, list[dict[str, float]]]:
    """Seconds for the tokens one by one, and what was counted meanwhile."""
    model.reset()
    model._ctx.kv_cache_clear()
    model.eval(tokens[:1])
    model.reset_ffn_stats()
    started = time.perf_counter()
    for token in tokens[1:]:
        model.eval([token])
    return time.perf_counter() - started, model.ffn_stats()


def per_token(seconds: float, layers: list[dict[str, float]], n: int) -> dict[str, float | None]:
    """Of `decode`, in milliseconds and bytes per token of n. `other` is what is not an FFN: attention, output."""

    def total(key: str) -> float:
        return sum(layer[key] for layer in layers)

    cpu, gpu, wait = total("seconds_predictor") + total("seconds_ffn"), total("seconds_gpu"), total("seconds_gpu_wait")
    return {
        "tokens_per_s": n / seconds,
        "ms": 1e3 * seconds / n,
        "ms_cpu": 1e3 * cpu / n,
        "ms_gpu": 1e3 * gpu / n,
        "ms_wait": 1e3 * wait / n,
        "ms_other": 1e3 * (seconds - cpu - wait) / n,
        "overlap": overlap(layers),
        "gpu_bytes": total("bytes_gpu") / n,
        "gpu_bytes_per_s": total("bytes_gpu") / max(1e-9, gpu),
        "active_on_gpu": total("gpu_active") / max(1e-9, total("active")),
    }


def measure(
    path: Path, parts: tuple[int, ...], n: int, repetitions: int, n_threads: int, most_bytes: int | None
) -> Iterator[dict[str, Any]]:
    """A row for the CPU alone, then one for each part, in percent, of what the whole model takes on the GPU.

    Raises:
        TsconvError: the GPU cannot be used, or computes something else than the CPU.
    """
    rng = np.random.default_rng(0)
    open_model = functools.partial(load, path, n_ctx=CONTEXT, n_threads=n_threads)
    with closing(open_model(n_gpu_layers=0)) as cpu:
        tokens: npt.NDArray[np.int64] = rng.integers(3, cpu.n_vocab(), n + 1)
        text = tokens.tolist()
        decode(cpu, text[:9])
        yield {"part": 0, "gpu": None, **_median([decode(cpu, text) for _ in range(repetitions)], n)}
        with closing(open_model(vram_budget=most_bytes)) as whole:
            most = _share_of(whole).n_bytes
        for part in parts:
            with closing(open_model(vram_budget=most * part // 100)) as model:
                share = _share_of(model)
                found = check(cpu, model, text[:CHECKED])
                if found["nmse"] > MAX_NMSE or not found["same_twice"]:
                    raise TsconvError("the GPU computes something else", expected=f"NMSE {MAX_NMSE}", found=found)
                turns, cpu_turns = [], []
                for _ in range(repetitions):
                    turns.append(decode(model, text))
                    cpu_turns.append(decode(cpu, text))
                row = _median(turns, n)
                ratios = [theirs[0] / ours[0] for ours, theirs in zip(turns, cpu_turns, strict=True)]
                yield {
                    "part": part,
                    "gpu": share.gpu,
                    "vram_bytes": share.n_bytes,
                    "predictors": share.predictors / max(1, share.n_predictors),
                    "neurons": share.neurons / share.n_neurons,
                    **found,
                    **row,
                    "ratio": statistics.median(ratios),
                }


def _share_of(model: SparseLlama) -> Share:
    """Raises TsconvError where the GPU has nothing of the model."""
    if model.gpu_share is None:
        raise TsconvError("the GPU takes nothing", found=model.gpu_complaint)
    return model.gpu_share


def _median(turns: list[tuple[float, list[dict[str, float]]]], n: int) -> dict[str, float | None]:
    seconds, layers = sorted(turns, key=lambda turn: turn[0])[len(turns) // 2]
    return per_token(seconds, layers, n)


HEADER = "   VRAM  neurons  active  tokens/s  of CPU     ms    CPU    GPU   wait  other  overlap   GPU GB/s      NMSE"


def line(row: dict[str, Any]) -> str:
    """One line under HEADER."""
    if row["gpu"] is None:
        text = f"{'CPU':>7} {'-':>8} {'-':>7} {row['tokens_per_s']:9.2f} {'1.00':>7}"
        return f"{text} {row['ms']:6.1f} {row['ms_cpu']:6.1f} {'-':>6} {'-':>6} {row['ms_other']:6.1f}"
    return (
        f"{row['vram_bytes'] / 1e9:5.2f}GB {100 * row['neurons']:7.1f}% {100 * row['active_on_gpu']:6.1f}% "
        f"{row['tokens_per_s']:9.2f} {row['ratio']:7.2f} {row['ms']:6.1f} {row['ms_cpu']:6.1f} {row['ms_gpu']:6.1f} "
        f"{row['ms_wait']:6.1f} {row['ms_other']:6.1f} {row['overlap']:8.2f} {row['gpu_bytes_per_s'] / 1e9:10.1f} "
        f"{row['nmse']:9.1e}"
    )


@click.command()
@click.option("-m", "--model", type=click.Path(path_type=Path), help="Converted model.  [default: --shape, generated]")
@click.option("--shape", type=click.Choice(list(PRESETS)), default="turbosparse-mistral-7b", show_default=True)
@click.option("--layers", type=click.IntRange(min=1), help="Of the generated model.  [default: all]")
@click.option("--outtype", default="q4_0", show_default=True)
@click.option("--part", "parts", multiple=True, type=click.IntRange(1, 100), default=(10, 25, 50, 75, 100),
              show_default=True, help="Percent of what the whole model takes; several times.")  # fmt: skip
@click.option("--most", "most_bytes", type=int, help="Bytes of the GPU at most.  [default: what is free, less 1 GiB]")
@click.option("-n", "--tokens", "n", type=click.IntRange(2, CONTEXT - 1), default=64, show_default=True)
@click.option("-r", "--repetitions", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("-t", "--threads", "n_threads", type=click.IntRange(min=1), help="[default: cores]")
@click.option("--save", type=click.Path(path_type=Path), help="Write the results to a file too, as JSON.")
def main(
    model: Path | None,
    shape: str,
    layers: int | None,
    outtype: str,
    parts: tuple[int, ...],
    most_bytes: int | None,
    n: int,
    repetitions: int,
    n_threads: int | None,
    save: Path | None,
) -> None:
    """Decode with hot neurons on a GPU, for several shares of them, beside the CPU alone."""
    rows = []
    threads = n_threads or usable_cores()
    try:
        gpus = ffn_gpus(load_backend())
        path = model or generated(
            shape, layers or PRESETS[shape].n_layer, outtype, functools.partial(click.echo, err=True)
        )
        click.echo(
            f"{path.name}; {gpus[0].name}; {cpu_model()}, {threads} threads; tg{n}, {repetitions} turns\n{HEADER}"
        )
        for row in measure(path, parts, n, repetitions, threads, most_bytes):
            rows.append({"model": path.name, "cpu": cpu_model(), "n_threads": threads, "test": f"tg{n}"} | row)
            click.echo(line(row))
    except NoGpuError as reason:
        click.echo(f"skipped: {reason}", err=True)
    except TsconvError as error:
        raise click.ClickException(str(error)) from None
    finally:
        if save is not None:
            save.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
