"""The GPU that is none (native/tests/fake_gpu.c), for tests in this process or in one of their own."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from support.native_build import ROOT, build


class Counts(ctypes.Structure):
    """struct fake_gpu_counts."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "n_synchronize",
            "n_upload",
            "upload_bytes",
            "n_download",
            "download_bytes",
            "n_async_upload",
            "n_async_download",
            "n_device_copy",
            "n_graph",
            "n_node",
            "n_too_early",
            "n_event_record",
            "n_event_wait",
        )
    )


@functools.cache
def library() -> Path:
    return build(ROOT / "build" / "tests", "-DTSFFN_TESTS=ON") / "tests" / "libfake_gpu.so"


def take_counts() -> Counts:
    """The counters since the last call, in a process that has loaded the library."""
    take = ctypes.CDLL(str(library())).fake_gpu_take_counts
    take.argtypes, take.restype = [], Counts
    return take()
