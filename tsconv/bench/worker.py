"""One engine in a process of its own: loads a model once, then runs tests as they are asked for on stdin.

    python -m tsconv.bench.worker ENGINE MODEL.gguf THREADS [OFFLOAD]

Lines of JSON: {"test": "tg128", "n_threads": 2} in, {"seconds": ..., ...} out. `dense-drelu` is our backend with every
weight read and multiplied. `llama.cpp` is the stock library on the same file: told that the architecture is llama, it
computes a dense SwiGLU model of the same shape and types, with the kernels it likes best. (Its text is noise: ffn_down
lies in another layout. Its speed is not.) `tsconv-norepack` and `llama.cpp-norepack` are two of these without
llama.cpp's extra buffer types. All of them have flash attention, with which each is faster. OFFLOAD is what goes to
GPUs (tsconv.bench.gpu.as_argument): `llama.cpp-ngl` and `llama.cpp-n-cpu-ffn` are `llama.cpp` with more or less of it.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as library
from llama_cpp._internals import LlamaBatch, LlamaContext

from tsconv.bench.gpu import CPU_FFN, SHARED, WHOLE_LAYERS, from_argument
from tsconv.bench.workload import MAX_TOKENS, Workload, parse_workload
from tsconv.format.kv_cache import padded
from tsconv.runtime.offload import AUTO, NOTHING, Offload, Offloading

N_UBATCH = 512


@contextmanager
def no_extra_bufts() -> Iterator[None]:
    """While this holds, models are loaded without llama.cpp's extra buffer types (`use_extra_bufts` of
    llama_model_params in llama.h), which keep weights rearranged for this processor's kernels, AMX among them.

    llama_cpp.Llama has no argument for it; it begins with what llama_model_default_params returns, which is replaced.
    """
    default = library.llama_model_default_params

    def without() -> library.llama_model_params:
        params = default()
        params.use_extra_bufts = False
        return params

    library.llama_model_default_params = without
    try:
        yield
    finally:
        library.llama_model_default_params = default


class Stock(Offloading, llama_cpp.Llama):
    """llama_cpp.Llama with what `offload` says on GPUs."""

    def __init__(self, *args: Any, offload: Offload, **kwargs: Any) -> None:
        self.offload = offload
        super().__init__(*args, n_gpu_layers=offload.n_gpu_layers, **kwargs)


def load_stock(path: str, n_threads: int, offload: Offload = NOTHING) -> llama_cpp.Llama:
    """The file in stock llama.cpp, which our backend is not loaded into."""
    from tsconv.runtime.model import FileName

    return Stock(
        FileName(path),
        offload=offload,
        n_ctx=MAX_TOKENS,
        n_batch=N_UBATCH,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        flash_attn=True,
        kv_overrides={"general.architecture": "llama"},
        verbose=False,
    )


def load_sparse(
    path: str,
    n_threads: int,
    offload: Offload = NOTHING,
    sparsity: str | None = None,
    n_gpu_layers: int | str | None = None,
) -> llama_cpp.Llama:
    """The file in llama.cpp with our backend."""
    from tsconv.runtime.model import load

    return load(
        path,
        sparsity=sparsity,
        n_ctx=MAX_TOKENS,
        n_batch=N_UBATCH,
        n_threads=n_threads,
        n_gpu_layers=offload.n_gpu_layers if n_gpu_layers is None else n_gpu_layers,
        device=offload.device,
        vram_budget=offload.room,
        ram_budget=os.environ.get("TSCONV_RAM_BUDGET", "auto"),
    )


def load_shared(path: str, n_threads: int, offload: Offload = NOTHING) -> llama_cpp.Llama:
    """The same, which itself decides what goes to a GPU."""
    return load_sparse(path, n_threads, offload, n_gpu_layers=AUTO)


def load_dense(path: str, n_threads: int, offload: Offload = NOTHING) -> llama_cpp.Llama:
    """The same, without skipping anything."""
    return load_sparse(path, n_threads, offload, "dense")


ENGINES = {
    "tsconv": load_sparse,
    SHARED: load_shared,
    "dense-drelu": load_dense,
    "llama.cpp": load_stock,
    "tsconv-norepack": no_extra_bufts()(load_sparse),
    "llama.cpp-norepack": no_extra_bufts()(load_stock),
    WHOLE_LAYERS: load_stock,
    CPU_FFN: load_stock,
}


class Sequences:
    """A context of `model` for `n_seq` sequences of at most `n` tokens, which are decoded together."""

    def __init__(self, model: llama_cpp.Llama, n: int, n_seq: int, n_threads: int) -> None:
        params = type(model.context_params).from_buffer_copy(model.context_params)
        params.n_ctx = n_seq * padded(n)
        params.n_batch = params.n_ubatch = params.n_seq_max = n_seq
        params.n_threads = params.n_threads_batch = n_threads
        self._context = LlamaContext(model=model._model, params=params, verbose=False)
        self._batch = LlamaBatch(n_tokens=n_seq, embd=0, n_seq_max=1, verbose=False)

    def clear(self) -> None:
        self._context.kv_cache_clear()

    def decode(self, tokens: list[int], position: int) -> None:
        """One token of each sequence, with logits."""
        batch = self._batch.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, True
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = i
        self._context.decode(self._batch)

    def close(self) -> None:
        self._batch.close()
        self._context.close()


def run(model: llama_cpp.Llama, workload: Workload, tokens: npt.NDArray[np.int64], n_threads: int) -> dict[str, Any]:
    """Seconds for the tokens [n, n_seq] from an empty context, and what our backend counted meanwhile."""
    if workload.n_seq > 1:
        sequences = Sequences(model, workload.n, workload.n_seq, n_threads)
        rows = tokens.tolist()
        sequences.decode(rows[0], 0)  # a new context's memory is first touched here
        sequences.clear()
        reset(model)
        started = time.perf_counter()
        for position, row in enumerate(rows):
            sequences.decode(row, position)
        seconds = time.perf_counter() - started
        sequences.close()
    else:
        model._ctx.set_n_threads(n_threads, n_threads)
        model.reset()
        model._ctx.kv_cache_clear()
        reset(model)
        column = tokens[:, 0].tolist()
        started = time.perf_counter()
        if workload.kind == "pp":
            model.eval(column)
        else:
            for token in column:
                model.eval([token])
        seconds = time.perf_counter() - started
    layers = {"layers": model.ffn_stats()} if hasattr(model, "ffn_stats") else {}
    return {"seconds": seconds} | layers


def reset(model: llama_cpp.Llama) -> None:
    """Sets our backend's counters to 0."""
    if hasattr(model, "reset_ffn_stats"):
        model.reset_ffn_stats()


def resident_bytes() -> int:
    """What this program has in memory now, mapped files included, memory that it shares with others left out.

    Source: RssAnon and RssFile in proc(5). While a model is loaded whose neurons stay on disk, many addresses share a
    few megabytes (native/src/memory/sink.h), each counted.
    """
    found = re.findall(r"^Rss(?:Anon|File):\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return sum(1024 * int(n) for n in found)


def peak_bytes() -> int:
    """Largest resident size of this program so far, mapped files included.

    Source: VmHWM in proc(5). ru_maxrss would include what the parent process had when it started this one.
    """
    peak = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert peak is not None
    return 1024 * int(peak[1])


def read_from_disk() -> int:
    """Bytes that this program has made disks read so far (read_bytes of proc(5), /proc/pid/io)."""
    found = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def main(engine: str, path: str, n_threads: int, offload: str | None = None) -> None:
    """Answers lines of stdin until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever llama.cpp prints does not get between the answers
    started = time.perf_counter()
    share = NOTHING if offload is None else from_argument(json.loads(offload))
    model = ENGINES[engine](path, n_threads, share)
    seconds = time.perf_counter() - started
    from_disk = read_from_disk()
    found = getattr(model, "gpu_share", None)
    ffn_gpu, ffn_bytes = ("", 0) if found is None else (str(found), found.n_bytes)
    loaded = {"load_seconds": seconds, "load_disk_bytes": from_disk, "ffn_gpu": ffn_gpu, "ffn_bytes": ffn_bytes}
    loaded["vram_bytes"] = ffn_bytes + getattr(model, "offload", NOTHING).n_bytes
    print(json.dumps(loaded), file=answers, flush=True)
    rng = np.random.default_rng(0)
    for line in sys.stdin:
        command = json.loads(line)
        workload = parse_workload(command["test"])
        tokens = rng.integers(3, min(model.n_vocab(), 256), (workload.n, workload.n_seq))
        answer = run(model, workload, tokens, command["n_threads"])
        memory = {"peak_bytes": peak_bytes(), "resident_bytes": resident_bytes()}
        print(json.dumps(answer | memory), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
