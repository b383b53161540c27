"""Measures a GPU through the driver's C interface, libcuda.so.1: no CUDA toolkit is needed, and no GPU to import this.

Source: the driver API's reference manual; names and types are those of cuda.h, which maps cuMemAlloc to cuMemAlloc_v2
and so on.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tsconv.machine.profile import Gpu, floored, rounded

LIBRARY = "libcuda.so.1"

MAX_DEVICE_BUFFER = 512 << 20  # several times any GPU's cache
MAX_HOST_BUFFER = 64 << 20
COPIES, ROUNDS, SMALL_COPIES = 8, 5, 200
SMALL_BYTES = 16384  # one token's activations at n_embd 4096, f32

_int, _size, _text, _pointer = ctypes.c_int, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_void_p
_device, _address = ctypes.c_int, ctypes.c_uint64  # CUdevice, CUdeviceptr
_PROTOTYPES = {
    "cuInit": [ctypes.c_uint],
    "cuDeviceGetCount": [ctypes.POINTER(_int)],
    "cuDeviceGet": [ctypes.POINTER(_device), _int],
    "cuDeviceGetName": [_text, _int, _device],
    "cuDeviceTotalMem_v2": [ctypes.POINTER(_size), _device],
    "cuDevicePrimaryCtxRetain": [ctypes.POINTER(_pointer), _device],
    "cuDevicePrimaryCtxRelease_v2": [_device],
    "cuCtxSetCurrent": [_pointer],
    "cuCtxSynchronize": [],
    "cuMemGetInfo_v2": [ctypes.POINTER(_size), ctypes.POINTER(_size)],
    "cuMemAlloc_v2": [ctypes.POINTER(_address), _size],
    "cuMemFree_v2": [_address],
    "cuMemAllocHost_v2": [ctypes.POINTER(_pointer), _size],
    "cuMemFreeHost": [_pointer],
    "cuMemcpyHtoD_v2": [_address, _pointer, _size],
    "cuMemcpyDtoH_v2": [_pointer, _address, _size],
    "cuMemcpyDtoD_v2": [_address, _address, _size],
    "cuGetErrorName": [_int, ctypes.POINTER(_text)],
}


class _GpuError(Exception):
    """Why there is no GPU to measure."""


class _Driver:
    """The functions of the driver; a call that fails raises _GpuError."""

    def __init__(self, library: str) -> None:
        try:
            self._lib = ctypes.CDLL(library)
        except OSError:
            raise _GpuError(f"{library} is not installed") from None
        for name, arguments in _PROTOTYPES.items():
            try:
                function = getattr(self._lib, name)
            except AttributeError:
                raise _GpuError(f"{library} has no {name}: the driver is too old") from None
            function.argtypes, function.restype = arguments, _int  # CUresult

    def call(self, name: str, *arguments: object) -> None:
        result = getattr(self._lib, name)(*arguments)
        if result != 0:
            text = _text()
            known = text.value if self._lib.cuGetErrorName(result, ctypes.byref(text)) == 0 else None
            raise _GpuError(f"{name}: {f'error {result}' if known is None else known.decode()}")

    @contextmanager
    def context(self, device: int) -> Iterator[None]:
        """The device's primary context, current in this thread."""
        context = _pointer()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        try:
            self.call("cuCtxSetCurrent", context)
            yield
        finally:
            self._lib.cuCtxSetCurrent(None)
            self._lib.cuDevicePrimaryCtxRelease_v2(device)

    @contextmanager
    def device_memory(self, n_bytes: int) -> Iterator[int]:
        address = _address()
        self.call("cuMemAlloc_v2", ctypes.byref(address), n_bytes)
        try:
            yield address.value
        finally:
            self._lib.cuMemFree_v2(address)

    @contextmanager
    def host_memory(self, n_bytes: int) -> Iterator[int | None]:
        """Page-locked memory, which the GPU reads and writes by itself."""
        pointer = _pointer()
        self.call("cuMemAllocHost_v2", ctypes.byref(pointer), n_bytes)
        try:
            yield pointer.value
        finally:
            self._lib.cuMemFreeHost(pointer)

    def seconds(self, copy: Callable[[], None], n: int) -> float:
        """Wall time of one of n copies, the device's work included."""
        self.call("cuCtxSynchronize")
        start = time.perf_counter()
        for _ in range(n):
            copy()
        self.call("cuCtxSynchronize")
        return (time.perf_counter() - start) / n


def measure_gpu(library: str = LIBRARY) -> tuple[Gpu | None, list[str]]:
    """Measures the first GPU that the driver shows (CUDA_VISIBLE_DEVICES is the driver's to heed).

    Returns:
        the GPU, or None, and notes: what was measured, or why nothing.
    """
    try:
        return _measure(_Driver(library))
    except _GpuError as error:
        return None, [f"GPU: none: {error}"]


def _measure(driver: _Driver) -> tuple[Gpu, list[str]]:
    driver.call("cuInit", 0)
    count, device = _int(), _device()
    driver.call("cuDeviceGetCount", ctypes.byref(count))
    if count.value < 1:
        raise _GpuError("the driver shows no device")
    driver.call("cuDeviceGet", ctypes.byref(device), 0)
    name, total = ctypes.create_string_buffer(256), _size()
    driver.call("cuDeviceGetName", name, len(name), device)
    driver.call("cuDeviceTotalMem_v2", ctypes.byref(total), device)
    with driver.context(device.value):
        free = _size()
        driver.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(_size()))
        device_bytes = min(MAX_DEVICE_BUFFER, free.value // 4) // 4096 * 4096
        host_bytes = min(MAX_HOST_BUFFER, device_bytes)
        if host_bytes < SMALL_BYTES:
            raise _GpuError(f"only {free.value:,} bytes of its memory are free")
        with (
            driver.device_memory(device_bytes) as a,
            driver.device_memory(device_bytes) as b,
            driver.host_memory(host_bytes) as host,
        ):
            inside = _median(driver, lambda: driver.call("cuMemcpyDtoD_v2", b, a, device_bytes), COPIES)
            up = _median(driver, lambda: driver.call("cuMemcpyHtoD_v2", a, host, host_bytes), COPIES)
            down = _median(driver, lambda: driver.call("cuMemcpyDtoH_v2", host, a, host_bytes), COPIES)
            small = [
                _median(driver, lambda: driver.call("cuMemcpyHtoD_v2", a, host, SMALL_BYTES), SMALL_COPIES),
                _median(driver, lambda: driver.call("cuMemcpyDtoH_v2", host, a, SMALL_BYTES), SMALL_COPIES),
            ]
    pcie = host_bytes / max(up, down)
    latency = max(small) - SMALL_BYTES / pcie  # the rest is the data's own time
    gpu = Gpu(
        name.value.decode(errors="replace").strip() or "unnamed",
        floored(total.value),
        rounded(2 * device_bytes / inside / 1e9),
        rounded(pcie / 1e9),
        rounded(max(latency * 1e6, 0.01), 2),
    )
    notes = [
        f"GPU: copies of {device_bytes >> 20} MiB within its memory, read and written; PCIe: {host_bytes >> 20} MiB "
        f"from and to page-locked memory, the slower way; latency: {SMALL_BYTES} bytes; medians of {ROUNDS}"
    ]
    if count.value > 1:
        notes.append(f"GPU: the first of {count.value}; the others are left out")
    return gpu, notes


def _median(driver: _Driver, copy: Callable[[], None], n: int) -> float:
    driver.seconds(copy, 1)  # the first one pays for what the driver prepares
    return statistics.median(driver.seconds(copy, n) for _ in range(ROUNDS))
