"""The GPUs that FFNs can be computed on: through our own CUDA module, whatever llama.cpp has for them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass

from tsconv.errors import BackendError
from tsconv.native.devices import LIST_SECONDS
from tsconv.native.library import Backend, gpu_module, load_backend


class NoGpuError(BackendError):
    """There is none that FFNs can be computed on."""


@dataclass(frozen=True)
class FfnGpu:
    """A GPU that FFNs can be computed on."""

    name: str
    free_bytes: int
    total_bytes: int


def ffn_gpus(backend: Backend) -> list[FfnGpu]:
    """Those of this process, in the order of their numbers. Drivers start.

    Raises:
        NoGpuError: none, and why: no module, no driver, or one that is too old.
    """
    try:
        found = backend.ffn_gpus()
    except BackendError as error:
        raise NoGpuError(str(error)) from None
    return [FfnGpu(gpu.name.decode(errors="replace"), gpu.free_bytes, gpu.total_bytes) for gpu in found]


def ffn_gpus_elsewhere() -> list[FfnGpu]:
    """The same, asked in a process that ends; [] for none, whatever the reason."""
    if gpu_module() is None:
        return []
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tsconv.native.ffn_gpus"],
            capture_output=True,
            text=True,
            timeout=LIST_SECONDS,
            check=True,
        )
        return [FfnGpu(**found) for found in json.loads(done.stdout)]
    except (OSError, subprocess.SubprocessError, ValueError, TypeError):
        return []


if __name__ == "__main__":
    print(json.dumps([asdict(gpu) for gpu in ffn_gpus(load_backend())]))
