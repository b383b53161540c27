"""tsconv beside stock llama.cpp, dense: the same file, in turn, in one session.

Both engines run in processes of their own (tsconv.bench.worker) that keep the model loaded and take turns, A B A B, so
that a machine whose speed drifts drifts for both. Field names are those of llama-bench (tools/llama-bench) where it has
them.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tsconv
from tsconv.errors import BackendError
from tsconv.export.pair import read_pair
from tsconv.profile.hardware.measure import measure_memory
from tsconv.runtime.backend import load_backend
from tsconv.runtime.cpu import cpu_model, physical_cores

ENGINES = ("tsconv", "llama.cpp")


@dataclass(frozen=True)
class Test:
    """`pp`: n tokens together; `tg`: n tokens one by one. As llama-bench, pp512 and tg128."""

    kind: str
    n: int

    @property
    def name(self) -> str:
        return f"{self.kind}{self.n}"


@dataclass(frozen=True)
class Row:
    """One test of one model. Times and ratios are medians over the repetitions; ratio_min and ratio_max their spread.

    Attributes:
        avg_ts, dense_avg_ts: tokens/s of tsconv and of stock llama.cpp.
        ratio: of the two, each pair measured one after the other.
        bytes_per_token, dense_bytes_per_token: of weights that are read; for pp, per batch of 512.
        gbps, bandwidth_share: bytes over seconds of tsconv, and their share of the memory bandwidth, measured before
            and after, in the order of addresses.
        roofline_ratio: dense_bytes_per_token / bytes_per_token: the ratio if bytes were all that counts.
        roofline_reached: ratio / roofline_ratio; both None for pp, which is not bound by bytes.
        predicted, active: mean shares of the neurons.
        ms_predictor, ms_ffn, ms_rest: of a token (pp: of the batch); the rest is attention, output and llama.cpp's own.
        peak_bytes, dense_peak_bytes: largest resident sizes, mapped files included.
        load_seconds, dense_load_seconds: with the file in the page cache or not, as it was.
    """

    model_filename: str
    model_size: int
    n_threads: int
    test: str
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


class _Worker:
    """A process of tsconv.bench.worker."""

    def __init__(self, engine: str, path: Path, n_threads: int) -> None:
        command = [sys.executable, "-m", "tsconv.bench.worker", engine, str(path), str(n_threads)]
        self.engine = engine
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.load_seconds: float = self._answer()["load_seconds"]

    def run(self, test: Test) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"test": test.kind, "n": test.n}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
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
def _workers(path: Path, n_threads: int) -> Iterator[dict[str, _Worker]]:
    workers: dict[str, _Worker] = {}
    try:
        for engine in ENGINES:
            workers[engine] = _Worker(engine, path, n_threads)
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def compare(
    path: Path,
    tests: Sequence[Test],
    *,
    repetitions: int = 3,
    n_threads: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Runs every test `repetitions` times on both engines in turn, after one turn that is not counted.

    Args:
        path: a converted model; the dense engine reads its FFNs as SwiGLU of the same shape and types.
        n_threads: None for the physical cores.

    Raises:
        ModelFileError: the model cannot be read.
        BackendError: an engine could not run it.
    """
    n_threads = n_threads or physical_cores()
    headers = read_pair(path)
    tensors = headers[0].tensors
    dense_bytes = sum(t.n_bytes for t in tensors if t.name != "token_embd.weight")
    ffn_bytes = sum(t.n_bytes for t in tensors if ".ffn_" in t.name and "_norm" not in t.name and "_inp" not in t.name)
    n_expert, n_used = (headers[0].keys.get(f"llama.expert{name}", 1) for name in ("_count", "_used_count"))
    backend = load_backend()
    bandwidth = [measure_memory(backend, n_threads)[0]]
    measured: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {test.name: [] for test in tests}
    with _workers(path, n_threads) as workers:
        loads = [workers[engine].load_seconds for engine in ENGINES]
        for number in range(repetitions + 1):
            for test in tests:
                pair = tuple(workers[engine].run(test) for engine in ENGINES)
                speeds = " and ".join(f"{test.n / answer['seconds']:.1f}" for answer in pair)
                progress(f"{test.name}: {speeds} tokens/s")
                if number:
                    measured[test.name].append((pair[0], pair[1]))
    bandwidth.append(measure_memory(backend, n_threads)[0])
    common = {
        "model_filename": path.name,
        "model_size": sum(header.file_bytes for header in headers),
        "n_threads": n_threads,
        "memory_gbps": statistics.fmean(bandwidth) / 1e9,
        "load_seconds": loads[0],
        "dense_load_seconds": loads[1],
        "cpu_info": cpu_model(),
        "backend": f"TSFFN {backend.isa}, ggml {backend.ggml_version}",
        "build": f"tsconv {tsconv.__version__}",
    }
    dense_per_token = dense_bytes - ffn_bytes * (1 - n_used / n_expert)
    return [_row(test, measured[test.name], dense_bytes - ffn_bytes, dense_per_token, common) for test in tests]


def _row(
    test: Test,
    pairs: list[tuple[dict[str, Any], dict[str, Any]]],
    other_bytes: int,
    dense_per_token: float,
    common: dict[str, Any],
) -> Row:
    steps = 1 if test.kind == "pp" else test.n  # a step reads the weights once
    ratios = [dense["seconds"] / ours["seconds"] for ours, dense in pairs]
    seconds = statistics.median(ours["seconds"] for ours, _ in pairs) / steps
    layers = [layer for ours, _ in pairs for layer in ours["layers"]]
    runs = len(pairs) * steps
    read = other_bytes + sum(layer["bytes_read"] for layer in layers) / runs
    dense_read = dense_per_token if test.kind == "tg" else other_bytes + sum(la["bytes_dense"] for la in layers) / runs
    predictor, ffn = (sum(layer[f"seconds_{part}"] for layer in layers) / runs for part in ("predictor", "ffn"))
    n_ff = sum(layer["n_ff"] for layer in layers)
    ratio = statistics.median(ratios)
    roofline = dense_read / read if test.kind == "tg" else None
    return Row(
        test=test.name,
        avg_ts=test.n / (seconds * steps),
        dense_avg_ts=test.n / statistics.median(dense["seconds"] for _, dense in pairs),
        ratio=ratio,
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        repetitions=len(pairs),
        bytes_per_token=read,
        dense_bytes_per_token=dense_read,
        gbps=read / seconds / 1e9,
        bandwidth_share=read / seconds / 1e9 / common["memory_gbps"],
        roofline_ratio=roofline,
        roofline_reached=None if roofline is None else ratio / roofline,
        predicted=sum(layer["predicted"] for layer in layers) / n_ff,
        active=sum(layer["active"] for layer in layers) / n_ff,
        ms_predictor=1e3 * predictor,
        ms_ffn=1e3 * ffn,
        ms_rest=1e3 * (seconds - predictor - ffn),
        peak_bytes=max(ours["peak_bytes"] for ours, _ in pairs),
        dense_peak_bytes=max(dense["peak_bytes"] for _, dense in pairs),
        **common,
    )
