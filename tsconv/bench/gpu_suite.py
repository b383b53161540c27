"""`make bench-gpu`: is what a GPU computes right, then how fast is it, beside llama.cpp with the same memory of it.

    python -m tsconv.bench.gpu_suite --kernels build/tests/tests/cuda/test_cuda --save build/bench-gpu.json

1. The kernels alone against the CPU's, on the GPU; the same under compute-sanitizer's memcheck and racecheck, where it
   is installed.
2. Models of a few layers: logits with 0, 10, 50 and 100 % of the neurons on the GPU beside the CPU's, of single tokens
   and of a prompt; 1,000 tokens twice.
3. Speed at real sizes: FFNs shared with the GPU, the CPU alone, and llama.cpp's two ways to use a GPU, where it has a
   backend for one. Engines are measured one after the other: each has the GPU's memory for itself.

Weights are generated. It needs a GPU that `tsconv doctor` finds for hot neurons.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from tsconv.bench.compare import Answer, attention_seconds, middle, take_turns, workers
from tsconv.bench.generate import PRESETS, drop_from_page_cache, generated
from tsconv.bench.gpu import CPU_FFN, SHARED, WHOLE_LAYERS, shares
from tsconv.bench.hybrid import MAX_NMSE, check
from tsconv.bench.sizes import Bytes
from tsconv.bench.suite import SPARE_BYTES
from tsconv.bench.workload import MAX_TOKENS, Workload, parse_workload
from tsconv.errors import TsconvError
from tsconv.format.pair import open_pair
from tsconv.machine.cpu import cpu_model
from tsconv.machine.limits import available_memory, usable_cores
from tsconv.native.devices import gpus_elsewhere
from tsconv.native.ffn_gpus import NoGpuError, ffn_gpus
from tsconv.native.library import gpu_module, load_backend
from tsconv.runtime.hybrid import overlap
from tsconv.runtime.model import SparseLlama, load
from tsconv.runtime.offload import NOTHING, Offload, Wanted

PARTS, STREAMED_PART = (0, 10, 50, 100), 10  # percent of the neurons
STREAM = "TSFFN_CUDA_STREAM"
CHECKED, PROMPT, TWICE = 16, 512, 1000  # tokens
CHECKED_LAYERS = 4
GB = 10**9
# Of a prompt's logits. With weights of 4 bits, the worst, 1e-5 was seen (docs/notes/2026-11-29-prompts-on-a-gpu.md).
MAX_PROMPT_NMSE = 1e-3


@dataclass(frozen=True)
class Item:
    """A model at a size of the GPU's memory: `vram` bytes for all of its layers; None: all there is."""

    preset: str
    outtype: str
    predictor_outtype: str | None
    vram: int | None


ITEMS = (
    Item("turbosparse-mistral-7b", "f16", "q3_nl", 11 * GB),
    Item("turbosparse-mixtral-47b", "q4_0", None, 11 * GB),
    Item("turbosparse-mixtral-47b", "q4_0", None, 16 * GB),
    Item("turbosparse-mistral-7b", "q4_0", None, None),
)

# ---- the kernels


def check_kernels(program: Path, timeout: float) -> Iterator[dict[str, Any]]:
    """Runs native/tests/cuda/test_cuda with the module for GPUs, alone and under each checker.

    Raises:
        TsconvError: no module, or a check fails.
    """
    module = gpu_module()
    if module is None:
        raise TsconvError("CUDA module: none")
    sanitizer = shutil.which("compute-sanitizer")
    checkers = ["memcheck", "racecheck"] if sanitizer else []
    for checker in ["", *checkers]:
        prefix = [sanitizer, "--tool", checker, "--error-exitcode", "9"] if checker else []
        started = time.monotonic()
        try:
            done = subprocess.run(
                [*map(str, prefix), program, module], capture_output=True, text=True, check=False, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            yield {"check": checker or "kernels", "result": f"not ended after {timeout:.0f} s"}
            continue
        if done.returncode != 0:
            lines = (done.stdout + done.stderr).strip().splitlines()
            raise TsconvError(f"{checker or 'kernels'}: a check failed", found=lines[-1] if lines else "no message")
        yield {"check": checker or "kernels", "result": "ok", "seconds": time.monotonic() - started}
    if not checkers:
        yield {"check": "memcheck, racecheck", "result": "not run: compute-sanitizer is not installed"}


# ---- logits


def _continued(model: SparseLlama, tokens: list[int], n: int) -> list[int]:
    """The most likely n tokens after some."""
    model.reset()
    model._ctx.kv_cache_clear()
    model.eval(tokens)
    found: list[int] = []
    for _ in range(n):
        found.append(model.sample(temp=0.0))
        model.eval(found[-1:])
    return found


@contextmanager
def _streaming(wanted: bool) -> Iterator[None]:
    """While this holds, models are opened whose cold neurons are copied to the GPU for every prompt, or never."""
    before = os.environ.get(STREAM)
    os.environ[STREAM] = "1" if wanted else "0"
    try:
        yield
    finally:
        os.environ.pop(STREAM)
        if before is not None:
            os.environ[STREAM] = before


def check_model(path: Path, n_threads: int, n_twice: int, n_prompt: int, room: int | None) -> Iterator[dict[str, Any]]:
    """Logits with shares of the neurons on the GPU beside the CPU's; tokens twice with half of them. With a tenth the
    others are copied there for the prompt.

    Raises:
        TsconvError: the GPU cannot be used, or computes something else.
    """
    open_model = functools.partial(load, path, n_ctx=n_prompt + n_twice + 1, n_batch=n_prompt, n_threads=n_threads)
    tokens: list[int] = np.random.default_rng(0).integers(3, 256, n_prompt).tolist()
    with closing(open_model(n_gpu_layers=0)) as cpu:
        n_layer, n_ffn, n_ff = cpu._native._shape
        prompt = cpu.token_logits(tokens, n_batch=n_prompt)
        for part in PARTS:
            hot = np.full((n_layer, n_ffn), n_ff * part // 100, np.int32)
            with _streaming(part == STREAMED_PART), closing(open_model(gpu_hot=hot, vram_budget=room)) as model:
                if model.gpu_share is None:
                    raise TsconvError("the GPU takes nothing", found=model.gpu_complaint)
                found = check(cpu, model, tokens[:CHECKED])
                errors = ((model.token_logits(tokens, n_batch=n_prompt) - prompt) ** 2).sum(axis=1)
                found["nmse_prompt"] = float(np.median(errors / (prompt**2).sum(axis=1)))
                found["prefill_tokens"] = model.gpu_share.prefill_tokens
                found["bytes_streamed"] = sum(layer["bytes_streamed"] for layer in model.ffn_stats())
                if part == 50:
                    texts = [_continued(model, tokens[:CHECKED], n_twice) for _ in range(2)]
                    found["same_text"] = texts[0] == texts[1] and len(texts[0]) == n_twice
                complaint = model.gpu_complaint
            is_near = found["nmse"] <= MAX_NMSE and found["nmse_prompt"] <= MAX_PROMPT_NMSE
            if complaint is not None or not (is_near and found["same_twice"] and found.get("same_text", True)):
                expected = f"NMSE {MAX_NMSE}, of a prompt {MAX_PROMPT_NMSE}, the same twice"
                raise TsconvError("the GPU computes something else", expected=expected, found=complaint or found)
            yield {"model": path.name, "part": part} | found


# ---- speed


def layers_that_fit(item: Item) -> int:
    """Most layers that an engine can have in the host's memory, beside the copy of another; at least 1."""
    preset = PRESETS[item.preset]

    def fits(n: int) -> bool:
        n_bytes = Bytes.of(preset.shape(n), item.outtype, item.predictor_outtype)
        return n_bytes.file + n_bytes.other + 2 * SPARE_BYTES <= available_memory()

    return next((n for n in range(preset.n_layer, 1, -1) if fits(n)), 1)


def measure(
    path: Path,
    room: int | None,
    tests: Sequence[Workload],
    n_threads: int,
    repetitions: int,
    deadline: float,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A row for each engine. Raises BackendError where one cannot run the model."""
    header = open_pair(path).headers[0]
    offloads = {SHARED: Offload(0, 0, room=room), "tsconv": NOTHING}
    theirs = shares(header, MAX_TOKENS, Wanted(vram_budget=room), gpus_elsewhere())
    offloads |= {name: theirs[name] for name in (WHOLE_LAYERS, CPU_FFN) if name in theirs}
    rows = []
    for engine in offloads:
        with workers([engine], path, n_threads, offloads) as running:
            worker = running[engine]
            cases = [(n_threads, test) for test in tests]
            turns = take_turns(running, cases, repetitions, deadline, progress)
            row = {"model": path.name, "engine": engine, "vram_budget": room, "load_seconds": worker.load_seconds}
            row |= {"gpu_share": worker.ffn_gpu, "vram_bytes": worker.vram_bytes}
            for case, test in zip(cases, tests, strict=True):
                answers = [turn[case][engine] for turn in turns]
                row[test.name] = test.n_tokens * len(middle(answers)) / sum(a["seconds"] for a in middle(answers))
                row |= {f"{test.name}_{key}": value for key, value in parts(answers, test).items()}
            rows.append(row)
    return rows


def parts(answers: Sequence[Answer], test: Workload) -> dict[str, float | None]:
    """Milliseconds of a layer in a step, and what the GPU did, of one of our engines; {} of another's.

    attention (None for a model of one layer); predictor and hot neurons on the GPU; predictor and cold neurons on the
    CPU; wait, in which the CPU did nothing of these; overlap (runtime.hybrid); hot_gbps, the bytes of hot neurons and
    predictors over the GPU's time; streamed_gbps, the bytes of neurons that were copied for a prompt over that time.
    """
    chosen = middle(answers)
    layers = [layer for answer in chosen for layer in answer.get("layers", ())]
    if not layers:
        return {}
    n_layer, steps = len(layers) // len(chosen), len(chosen) * test.n_steps

    def total(key: str) -> float:
        return sum(layer[key] for layer in layers)

    def ms(seconds: float) -> float:
        return 1e3 * seconds / (steps * n_layer)

    attention, on_gpu = attention_seconds(layers, n_layer, steps), max(1e-9, total("seconds_gpu"))
    return {
        "ms_attention": None if attention is None else 1e3 * attention / n_layer,
        "ms_predictor_gpu": ms(total("seconds_gpu_predictor")),
        "ms_hot": ms(total("seconds_gpu") - total("seconds_gpu_predictor")),
        "ms_predictor_cpu": ms(total("seconds_predictor")),
        "ms_cold": ms(total("seconds_ffn")),
        "ms_wait": ms(total("seconds_gpu_wait")),
        "overlap": overlap(layers),
        "hot_gbps": total("bytes_gpu") / on_gpu / 1e9,
        "streamed_gbps": total("bytes_streamed") / on_gpu / 1e9,
        "active_on_gpu": total("gpu_active") / max(1e-9, total("active")),
    }


def table(rows: Sequence[dict[str, Any]], tests: Sequence[Workload]) -> Iterator[str]:
    """The rows of one model and budget, as text: tokens/s, what that is of the faster of llama.cpp's ways (of the CPU
    alone without them), and milliseconds per layer of the first test."""
    first = tests[0].name
    columns = "".join(f"{test.name:>10} {'ratio':>6}" for test in tests)
    yield (
        f"{'engine':>20} {'VRAM':>8}{columns}   {first}, ms per layer: attention, predictor (GPU, CPU), hot, cold, "
        f"wait; overlap; GPU GB/s; {tests[-1].name}: copied GB/s"
    )
    others = [row for row in rows if row["engine"] in (WHOLE_LAYERS, CPU_FFN)]
    others = others or [row for row in rows if row["engine"] == "tsconv"]
    for row in rows:
        line = f"{row['engine']:>20} {row['vram_bytes'] / 1e9:6.2f}GB"
        for test in tests:
            line += f"{row[test.name]:10.2f} {row[test.name] / max(other[test.name] for other in others):6.2f}"
        if f"{first}_ms_hot" in row:
            keys = ("attention", "predictor_gpu", "predictor_cpu", "hot", "cold", "wait")
            values = [row[f"{first}_ms_{key}"] for key in keys]
            values += [row[f"{first}_overlap"], row[f"{first}_hot_gbps"], row[f"{tests[-1].name}_streamed_gbps"]]
            line += "   " + " ".join("-" if value is None else f"{value:.3f}" for value in values)
        yield line


@click.command()
@click.option("--kernels", type=click.Path(path_type=Path), help="native/tests/cuda/test_cuda.  [default: left out]")
@click.option("-m", "--model", "models", multiple=True, type=click.Path(path_type=Path),
              help="Instead of generated ones; several times.")  # fmt: skip
@click.option("--vram-budget", "vram", type=int, help="Bytes, with -m.  [default: what is free]")
@click.option("--test", "tests", multiple=True, default=("tg128", "pp512"), show_default=True)
@click.option("--twice", "n_twice", type=click.IntRange(min=1), default=TWICE, show_default=True)
@click.option("-r", "--repetitions", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("-t", "--threads", "n_threads", type=click.IntRange(min=1), help="[default: cores]")
@click.option("--seconds", type=float, default=480.0, show_default=True, help="Nothing new begins after these.")
@click.option("--save", type=click.Path(path_type=Path), help="Write the results to a file too, as JSON.")
def main(
    kernels: Path | None,
    models: tuple[Path, ...],
    vram: int | None,
    tests: tuple[str, ...],
    n_twice: int,
    repetitions: int,
    n_threads: int | None,
    seconds: float,
    save: Path | None,
) -> None:
    """What a GPU computes: whether it is right, and how fast it is."""
    deadline = time.monotonic() + seconds
    threads = n_threads or usable_cores()
    results: dict[str, Any] = {"cpu": cpu_model(), "n_threads": threads, "checks": [], "rows": [], "left_out": []}
    say = functools.partial(click.echo, err=True)
    try:
        workloads = [parse_workload(test) for test in tests]
        gpus = ffn_gpus(load_backend())
        results["gpu"] = gpus[0].name
        click.echo(f"{gpus[0].name}; {cpu_model()}, {threads} threads")
        for found in check_kernels(kernels, max(1.0, seconds / 8)) if kernels else ():
            results["checks"].append(found)
            click.echo(f"{found['check']}: {found['result']}")
        prompt = max([CHECKED, *(test.n for test in workloads if test.kind == "pp")])
        for path in _checked(models, say):
            for found in check_model(path, threads, n_twice, prompt, vram):
                results["checks"].append(found)
                click.echo(_check_line(found, n_twice))
        for path, room, text in _measured(models, vram, say, deadline, results["left_out"]):
            rows = measure(path, room, workloads, threads, repetitions, deadline, say)
            results["rows"] += rows
            click.echo("\n".join([text, *table(rows, workloads)]))
        for line in results["left_out"]:
            click.echo(line)
    except NoGpuError as reason:
        say(f"skipped: {reason}")
    except TsconvError as error:
        raise click.ClickException(str(error)) from None
    finally:
        if save is not None:
            save.write_text(json.dumps(results, indent=2))


def _check_line(found: dict[str, Any], n_twice: int) -> str:
    streamed = ", others copied there" if found["bytes_streamed"] else ""
    twice = f"; {n_twice} tokens twice the same" if "same_text" in found else ""
    return (
        f"{found['model']}: {found['part']} % of the neurons: NMSE {found['nmse']:.1e}, of a prompt "
        f"{found['nmse_prompt']:.1e}{streamed}{twice}"
    )


def _checked(models: Sequence[Path], say: Callable[[str], None]) -> Iterator[Path]:
    """The models whose logits are compared, each when it is needed."""
    if models:
        yield from models
        return
    for item in {(item.preset, item.outtype): item for item in ITEMS}.values():
        yield generated(item.preset, CHECKED_LAYERS, item.outtype, say, predictor_outtype=item.predictor_outtype)


def _measured(
    models: Sequence[Path], vram: int | None, say: Callable[[str], None], deadline: float, left_out: list[str]
) -> Iterator[tuple[Path, int | None, str]]:
    """The models that are measured, the memory that each may take, and a line about both."""
    for path in models:
        yield path, vram, path.name
    for item in () if models else ITEMS:
        n_layer, whole = layers_that_fit(item), PRESETS[item.preset].n_layer
        room = None if item.vram is None else math.floor(item.vram * n_layer / whole)
        memory = "all of its memory" if room is None else f"{room / 1e9:.1f} GB"
        text = f"{item.preset}, {item.outtype}: {n_layer} of {whole} layers, {memory}"
        if time.monotonic() > deadline:
            left_out.append(f"{text}: left out: no time (--seconds)")
            continue
        path = generated(item.preset, n_layer, item.outtype, say, predictor_outtype=item.predictor_outtype)
        drop_from_page_cache()
        yield path, room, text


if __name__ == "__main__":
    main()
