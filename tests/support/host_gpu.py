"""The CUDA module compiled for the host (native/tests/cuda), as a GPU of the backend's, in this process or another."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from support.native_build import ROOT, build

NAME = "kernels on the host"


@functools.cache
def module() -> Path:
    return build(ROOT / "build" / "tests", "-DTSFFN_TESTS=ON") / "tests" / "cuda" / "libtsffn-cuda-host.so"


def environment() -> dict[str, str]:
    """Variables with which a process has that GPU."""
    return {"TSFFN_CUDA_MODULE": str(module()), "PYTHONPATH": str(ROOT / "tests")}


class Gpu:
    """What tests ask of the GPU of their own process, which has `environment`."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL(str(module()))
        self._lib.tsffn_host_used.restype = ctypes.c_size_t
        self._lib.tsffn_host_limits.argtypes = [ctypes.c_size_t, ctypes.c_size_t]

    def fail(self, call: int, for_good: bool = False) -> None:
        """From now on the call-th CUDA call fails, and with `for_good` all after it; 0: none. They are counted anew."""
        self._lib.tsffn_host_fail(call, for_good)

    def go_wrong(self) -> None:
        """From now on what comes back from the GPU is not what it should be."""
        self._lib.tsffn_host_go_wrong()

    @property
    def calls(self) -> int:
        return self._lib.tsffn_host_calls()

    def limit(self, n_bytes: int) -> None:
        """The GPU has so much memory."""
        self._lib.tsffn_host_limits(n_bytes, 64 << 10)

    @property
    def used(self) -> int:
        """Bytes of its memory that are allocated."""
        return self._lib.tsffn_host_used()

    @property
    def allocations(self) -> int:
        """Of its memory and of the host's, that are not freed."""
        return self._lib.tsffn_host_allocations()
