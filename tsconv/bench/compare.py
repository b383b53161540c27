"""tsconv beside dense baselines: the same file, in turn, in one session.

Each engine runs in a process of its own (tsconv.bench.worker) that keeps the model loaded, and they take turns, A B A
B, so that a machine whose speed drifts drifts for all. Field names are those of llama-bench (tools/llama-bench) where
it has them.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tsconv
from tsconv.bench.gpu import CPU_FFN, NO_GPU, WHOLE_LAYERS, as_argument, described, gpus_for, shares
from tsconv.bench.workload import MAX_TOKENS, Workload
from tsconv.errors import BackendError
from tsconv.format.header import Header
from tsconv.format.pair import open_pair
from tsconv.format.types import PREDICTOR
from tsconv.machine.cpu import cpu_model
from tsconv.machine.limits import usable_cores
from tsconv.machine.measure import measure_memory
from tsconv.native.library import load_backend
from tsconv.runtime.offload import NOTHING, Offload, Wanted
from tsconv.transform.quantize import type_name

STOCK, DENSE_DRELU, NOREPACK = "llama.cpp", "dense-drelu", "llama.cpp-norepack"
# baseline -> the engine of ours that is measured beside it
ENGINES = {
    STOCK: "tsconv",
    DENSE_DRELU: "tsconv",
    NOREPACK: "tsconv-norepack",
    WHOLE_LAYERS: "tsconv",
    CPU_FFN: "tsconv",
}
GPU_BASELINES = (WHOLE_LAYERS, CPU_FFN)
WARM_UP_TOKENS = {"pp": 64, "tg": 8}  # in a sequence: touches the weights and the buffers of every test

Answer = dict[str, Any]  # of a worker
Case = tuple[int, Workload]  # threads, test


@dataclass(frozen=True)
class Row:
    """One test of one model beside one baseline, with one number of threads. Times and ratios are medians over the
    repetitions; ratio_min and ratio_max their spread. A step is a token of each sequence; pp: the batch. Bytes, shares
    and parts of a step are those of the repetition whose time is the median.

    Attributes:
        baseline: "llama.cpp" (stock, dense SwiGLU of the same shape and types), "dense-drelu" (our backend, the same
            weights, every one read and multiplied, no predictor), or "llama.cpp-norepack" (stock without the weights
            that llama.cpp rearranges for this processor). With a GPU, the faster of "llama.cpp-ngl" and
            "llama.cpp-n-cpu-ffn" (tsconv.bench.gpu). The fields dense_... are the baseline's.
        engine: what is measured beside it: "tsconv", or beside llama.cpp-norepack "tsconv-norepack", whose weights
            outside the FFNs are not rearranged either.
        predictor_type: of the predictor's matrices in the sidecar, such as "q8_0"; several are joined by "+"; None
            without a sidecar.
        avg_ts, dense_avg_ts: tokens/s of all sequences together.
        ratio: of the two, each pair measured one after the other.
        bytes_per_token, dense_bytes_per_token: of weights that are read in a step.
        gbps, bandwidth_share: bytes over seconds of tsconv, and their share of the memory bandwidth that as many
            threads have, measured before and after, in the order of addresses.
        roofline_ratio: dense_bytes_per_token / bytes_per_token: the ratio if bytes were all that counts.
        roofline_reached: ratio / roofline_ratio; both None for pp, which is not bound by bytes.
        predicted, active: mean shares of the neurons.
        ms_attention, ms_predictor, ms_ffn, ms_rest: of a step. Attention is what llama.cpp computes between two FFNs:
            norms, attention, router. Before layer 0 it cannot be told from the embedding, and is taken to last as long
            as the mean of the other layers; None for a model of one layer. The rest is everything else: embedding,
            output, starting of threads and Python.
        peak_bytes, dense_peak_bytes: largest resident sizes, mapped files included.
        load_seconds, dense_load_seconds: with the file in the page cache or not, as it was.
        gpus: names of those that are used; "" for none. What is on them, of each engine, and its bytes: gpu_share,
            dense_gpu_share, vram_bytes, dense_vram_bytes.
    """

    model_filename: str
    model_size: int
    n_threads: int
    test: str
    baseline: str
    engine: str
    predictor_type: str | None
    avg_ts: float
    dense_avg_ts: float
    ratio: float
    ratio_min: float
    ratio_max: float
    repetitions: int
    bytes_per_token: float
    dense_bytes_per_token: float
    gbps: float
    memory_gbps: float
    bandwidth_share: float
    roofline_ratio: float | None
    roofline_reached: float | None
    predicted: float
    active: float
    ms_attention: float | None
    ms_predictor: float
    ms_ffn: float
    ms_rest: float
    peak_bytes: int
    dense_peak_bytes: int
    load_seconds: float
    dense_load_seconds: float
    cpu_info: str
    backend: str
    build: str
    gpus: str = ""
    gpu_share: str = ""
    dense_gpu_share: str = ""
    vram_bytes: int = 0
    dense_vram_bytes: int = 0


class Worker:
    """A process of tsconv.bench.worker."""

    def __init__(self, engine: str, path: Path, n_threads: int, offload: Offload) -> None:
        command = [sys.executable, "-m", "tsconv.bench.worker", engine, str(path), str(n_threads)]
        command.append(json.dumps(as_argument(offload)))
        self.engine = engine
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        loaded = self._answer()
        self.load_seconds: float = loaded["load_seconds"]
        self.ffn_gpu: str = loaded["ffn_gpu"]  # what a GPU has of the FFNs, in words, and in bytes
        self.ffn_bytes: int = loaded["ffn_bytes"]
        self.vram_bytes: int = loaded["vram_bytes"]  # with what llama.cpp has there

    def run(self, workload: Workload, n_threads: int) -> Answer:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"test": workload.name, "n_threads": n_threads}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Answer:
        assert self._process.stdout is not None and self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            last = self._process.stderr.read().strip().splitlines()[-1:] or ["no message"]
            raise BackendError(f"the benchmark of {self.engine} ended early", found=last[0])
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def workers(
    engines: Sequence[str], path: Path, n_threads: int, offloads: Mapping[str, Offload]
) -> Iterator[dict[str, Worker]]:
    """Processes of these engines, which hold the model until the end."""
    running: dict[str, Worker] = {}
    try:
        for engine in engines:
            running[engine] = Worker(engine, path, n_threads, offloads.get(engine, NOTHING))
        yield running
    finally:
        for worker in running.values():
            worker.close()


def compare(
    path: Path,
    workloads: Sequence[Workload],
    *,
    baselines: Sequence[str] = (STOCK,),
    repetitions: int = 3,
    n_threads: Sequence[int] | None = None,
    gpu: Wanted = NO_GPU,
    seconds: float | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Runs every test `repetitions` times on all engines in turn, after a short turn that is not counted.

    Args:
        path: a converted model; the stock engine reads its FFNs as SwiGLU of the same shape and types.
        baselines: of ENGINES.
        n_threads: each number in turn; None for the physical cores, as far as the CPU quota goes.
        gpu: what goes to GPUs. If anything does, the baselines are llama.cpp's two ways to use them, and the rows are
            those beside the faster one.
        seconds: no further turn is begun that would end later than this after the call; one is always run.

    Returns:
        a row for every number of threads, test and baseline, in this order.

    Raises:
        ModelFileError: the model cannot be read.
        BackendError: an engine could not run it.
    """
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    counts = tuple(n_threads or (usable_cores(),))
    headers = open_pair(path).headers
    backend = load_backend()
    offloads = shares(headers[0], MAX_TOKENS, gpu, gpus_for(gpu))
    if offloads:
        baselines = [name for name in offloads if name in GPU_BASELINES]
    engines = (*dict.fromkeys(ENGINES[baseline] for baseline in baselines), *baselines)
    cases = [(n, workload) for n in counts for workload in workloads]
    bandwidth = {n: [measure_memory(backend, n)[0]] for n in counts}
    with workers(engines, path, max(counts), offloads) as running:
        turns = take_turns(running, cases, repetitions, deadline, progress)
        loads = {engine: worker.load_seconds for engine, worker in running.items()}
        ffns = {engine: (worker.ffn_gpu, worker.ffn_bytes) for engine, worker in running.items()}
    for n in counts:
        bandwidth[n].append(measure_memory(backend, n)[0])
    common = {
        "model_filename": path.name,
        "model_size": sum(header.file_bytes for header in headers),
        "predictor_type": _predictor_type(headers),
        "cpu_info": cpu_model(),
        "backend": f"TSFFN {backend.isa}, ggml {backend.ggml_version}",
        "build": f"tsconv {tsconv.__version__}",
    }
    weights = Weights.of(headers[0])
    rows = [
        _row(
            workload,
            [turn[n, workload][ENGINES[baseline]] for turn in turns],
            [turn[n, workload][baseline] for turn in turns],
            weights,
            statistics.fmean(bandwidth[n]) / 1e9,
            common
            | {"n_threads": n, "baseline": baseline, "engine": ENGINES[baseline]}
            | {"load_seconds": loads[ENGINES[baseline]], "dense_load_seconds": loads[baseline]}
            | _on_gpus(
                offloads.get(ENGINES[baseline], NOTHING), *ffns[ENGINES[baseline]], offloads.get(baseline, NOTHING)
            ),
        )
        for n, workload in cases
        for baseline in baselines
    ]
    return _beside_the_faster(rows) if offloads else rows


def _on_gpus(ours: Offload, ffn_gpu: str, ffn_bytes: int, theirs: Offload) -> dict[str, Any]:
    return {
        "gpus": ", ".join(gpu.name for gpu in ours.gpus),
        "gpu_share": "; ".join(filter(None, [str(ours) if ours.gpus else "", ffn_gpu])),
        "dense_gpu_share": described(theirs) if theirs.gpus else "",
        "vram_bytes": ours.n_bytes + ffn_bytes,
        "dense_vram_bytes": theirs.n_bytes,
    }


def _beside_the_faster(rows: Sequence[Row]) -> list[Row]:
    """Of the rows of each test and number of threads, that of the fastest baseline."""
    found: dict[tuple[int, str], Row] = {}
    for row in rows:
        key = row.n_threads, row.test
        if key not in found or row.dense_avg_ts > found[key].dense_avg_ts:
            found[key] = row
    return list(found.values())


def take_turns(
    running: Mapping[str, Worker],
    cases: Sequence[Case],
    repetitions: int,
    deadline: float,
    progress: Callable[[str], None],
) -> list[dict[Case, dict[str, Answer]]]:
    """What each engine answered in each turn; `deadline` as time.monotonic() has it. The first turn always runs."""

    def run(n: int, workload: Workload) -> dict[str, Answer]:
        answers = {engine: worker.run(workload, n) for engine, worker in running.items()}
        speeds = ", ".join(f"{engine} {workload.n_tokens / a['seconds']:.1f}" for engine, a in answers.items())
        progress(f"{workload.name}, {n} threads: {speeds} tokens/s")
        return answers

    most = max((n for n, _ in cases), default=0)
    for workload in dict.fromkeys(workload.cut(WARM_UP_TOKENS[workload.kind]) for _, workload in cases):
        run(most, workload)
    turns: list[dict[Case, dict[str, Answer]]] = []
    for _ in range(repetitions):
        begun = time.monotonic()
        turns.append({case: run(*case) for case in cases})
        now = time.monotonic()
        if now + (now - begun) > deadline:
            break
    return turns


def _predictor_type(headers: Sequence[Header]) -> str | None:
    """Type of fc1 and fc2 in the sidecar, the second of the headers."""
    matrices = [t for header in headers[1:] for t in header.tensors if PREDICTOR.search(t.name)]
    return "+".join(dict.fromkeys(type_name(t.kind) for t in matrices)) or None


@dataclass(frozen=True)
class Weights:
    """Bytes of weights that a token reads: `dense` by a dense model, `other` of them not of FFNs."""

    dense: float
    other: int

    @classmethod
    def of(cls, header: Header) -> Weights:
        read = [t for t in header.tensors if t.name != "token_embd.weight"]
        ffn = sum(t.n_bytes for t in read if ".ffn_" in t.name and "_norm" not in t.name and "_inp" not in t.name)
        n_expert, n_used = (header.keys.get(f"llama.expert{name}", 1) for name in ("_count", "_used_count"))
        other = sum(t.n_bytes for t in read) - ffn
        return cls(other + ffn * n_used / n_expert, other)


def _row(
    workload: Workload,
    ours: Sequence[Answer],
    theirs: Sequence[Answer],
    weights: Weights,
    memory_gbps: float,
    common: Mapping[str, Any],
) -> Row:
    ratios = [dense["seconds"] / answer["seconds"] for answer, dense in zip(ours, theirs, strict=True)]
    median = middle(ours)
    seconds = statistics.fmean(answer["seconds"] for answer in median) / workload.n_steps
    layers = [layer for answer in median for layer in answer["layers"]]
    steps = len(median) * workload.n_steps
    read = weights.other + sum(layer["bytes_read"] for layer in layers) / steps
    # Which experts the tokens of a step share is known only from the counters.
    one_token = workload.n_tokens == workload.n_steps
    dense_read = weights.dense if one_token else weights.other + sum(la["bytes_dense"] for la in layers) / steps
    predictor, ffn = (sum(layer[f"seconds_{part}"] for layer in layers) / steps for part in ("predictor", "ffn"))
    attention = attention_seconds(layers, len(layers) // len(median), steps)
    n_ff = sum(layer["n_ff"] for layer in layers)
    ratio = statistics.median(ratios)
    roofline = None if workload.kind == "pp" else dense_read / read
    return Row(
        test=workload.name,
        avg_ts=workload.n_tokens / (seconds * workload.n_steps),
        dense_avg_ts=workload.n_tokens / statistics.median(dense["seconds"] for dense in theirs),
        ratio=ratio,
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        repetitions=len(ours),
        bytes_per_token=read,
        dense_bytes_per_token=dense_read,
        gbps=read / seconds / 1e9,
        memory_gbps=memory_gbps,
        bandwidth_share=read / seconds / 1e9 / memory_gbps,
        roofline_ratio=roofline,
        roofline_reached=None if roofline is None else ratio / roofline,
        predicted=sum(layer["predicted"] for layer in layers) / n_ff,
        active=sum(layer["active"] for layer in layers) / n_ff,
        ms_attention=None if attention is None else 1e3 * attention,
        ms_predictor=1e3 * predictor,
        ms_ffn=1e3 * ffn,
        ms_rest=1e3 * (seconds - (attention or 0.0) - predictor - ffn),
        peak_bytes=max(answer["peak_bytes"] for answer in ours),
        dense_peak_bytes=max(answer["peak_bytes"] for answer in theirs),
        **common,
    )


def middle(answers: Sequence[Answer]) -> list[Answer]:
    """The one or two whose (mean) time is the median of all: the parts of a step are those of the same runs."""
    ordered = sorted(answers, key=lambda answer: answer["seconds"])
    return ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1]


def attention_seconds(layers: Sequence[Mapping[str, float]], n_layer: int, steps: int) -> float | None:
    """Seconds of a step, all layers; layer 0, which is not measured, as long as the mean of the others."""
    if n_layer == 1:
        return None
    return sum(layer["seconds_attention"] for layer in layers) / steps * n_layer / (n_layer - 1)
