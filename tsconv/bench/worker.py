"""One engine in a process of its own: loads a model once, then runs tests as they are asked for on stdin.

    python -m tsconv.bench.worker tsconv|llama.cpp MODEL.gguf THREADS

Lines of JSON: {"test": "pp", "n": 512} or {"test": "tg", "n": 128} in, {"seconds": ..., ...} out. `llama.cpp` is the
stock library on the same file: told that the architecture is llama, it computes a dense SwiGLU model of the same shape
and types, with the kernels it likes best. (Its text is noise: ffn_down lies in another layout. Its speed is not.)
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any

import llama_cpp
import numpy as np

MAX_TOKENS = 1024
N_UBATCH = 512


def load_stock(path: str, n_threads: int) -> llama_cpp.Llama:
    """The file in stock llama.cpp, which our backend is not loaded into."""
    return llama_cpp.Llama(
        path,
        n_ctx=MAX_TOKENS,
        n_batch=N_UBATCH,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        kv_overrides={"general.architecture": "llama"},
        verbose=False,
    )


def load_sparse(path: str, n_threads: int) -> llama_cpp.Llama:
    """The file in llama.cpp with our backend."""
    from tsconv.runtime.model import load

    return load(path, n_ctx=MAX_TOKENS, n_batch=N_UBATCH, n_threads=n_threads)


ENGINES = {"tsconv": load_sparse, "llama.cpp": load_stock}


def run(model: llama_cpp.Llama, test: str, tokens: list[int]) -> float:
    """Seconds for the tokens from an empty context: "pp" together, "tg" one by one."""
    model.reset()
    model._ctx.kv_cache_clear()
    started = time.perf_counter()
    if test == "pp":
        model.eval(tokens)
    else:
        for token in tokens:
            model.eval([token])
    return time.perf_counter() - started


def peak_bytes() -> int:
    """Largest resident size of this process so far, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(engine: str, path: str, n_threads: int) -> None:
    """Answers lines of stdin until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever llama.cpp prints does not get between the answers
    started = time.perf_counter()
    model = ENGINES[engine](path, n_threads)
    print(json.dumps({"load_seconds": time.perf_counter() - started}), file=answers, flush=True)
    rng = np.random.default_rng(0)
    for line in sys.stdin:
        command = json.loads(line)
        tokens = rng.integers(3, min(model.n_vocab(), 256), command["n"]).tolist()
        if engine == "tsconv":
            model.reset_ffn_stats()
        answer: dict[str, Any] = {"seconds": run(model, command["test"], tokens)}
        if engine == "tsconv":
            answer["layers"] = model.ffn_stats()
        print(json.dumps(answer | {"peak_bytes": peak_bytes()}), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
