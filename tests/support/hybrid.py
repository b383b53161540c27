"""Programs of tests in which a GPU and the CPU share FFNs: the GPU's kernels are compiled for the host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from support import host_gpu, tiny

MODELS = {"dense": "tiny-turbosparse-mistral", "moe": "tiny-turbosparse-mixtral"}
MAX_NMSE = 1e-5

PRELUDE = """
import json, sys
import numpy as np
import tsconv
from support import tiny
from support.host_gpu import Gpu

gpu = Gpu()
tokens = [1, 20, 300, 41, 7, 99]


def load(path, **options):
    return tsconv.load(path, **{"n_threads": 1, "n_ctx": 256, **options})


def logits_of(path, n_batch=1, **options):
    model = load(path, **options)
    logits, stats = model.token_logits(tokens, n_batch=n_batch), model.ffn_stats()
    share, complaint = model.gpu_share, model.gpu_complaint
    used = gpu.used
    model.close()
    assert gpu.allocations == 0
    return logits, stats, share, complaint, used
"""


# Models are loaded with no more memory for neurons than a cache of them needs, whatever fits.
FROM_DISK = """
from pathlib import Path
import tsconv.runtime.model
from support.streamed import fewest_bytes
from tsconv.runtime.streaming import Budget


def read_from_disk(path):
    n_bytes = fewest_bytes(Path(path))
    tsconv.runtime.model.choose_budget = lambda *_, **__: Budget(n_bytes, True, 0, 0, 0, 1 << 40)
"""


def python(program: str, *arguments: object, **env: str) -> Any:
    """The JSON that a program prints, and its stderr. It begins with PRELUDE."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + program, *map(str, arguments)],
        env=os.environ | host_gpu.environment() | env,
        capture_output=True,
        text=True,
        timeout=tiny.TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"stderr": done.stderr}
