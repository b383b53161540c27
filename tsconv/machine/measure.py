"""Measures the machine this runs on: the figures of a machine profile, in some ten seconds. Best on an idle machine."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import mmap
import os
import re
import socket
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import tsconv
from tsconv.cache import cache_folder
from tsconv.errors import BackendError, TsconvError
from tsconv.machine import limits
from tsconv.machine.cpu import cpu_model, physical_cores
from tsconv.machine.disk import measure_disk
from tsconv.machine.gpu import measure_gpu
from tsconv.machine.profile import GIB, Cpu, Machine, check_name, floored, rounded
from tsconv.native.library import Backend, load_backend

ROW_BYTES = 2304  # one neuron's row of 4096 weights in Q4_0

# Threads tried for `cores`, besides the physical cores and the CPUs there are.
THREADS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# A quota of CPU time is granted anew every 100 ms, so a run must be longer than two of these periods.
COMPUTE_SECONDS, MORE_SECONDS = 0.25, 3.0
# A thread counts when it adds at least half of what the ones before it do: hyper-threads add about a quarter, and a
# slow core that the others wait for at every barrier takes something away.
GAIN = 0.5

BUSY = 0.1  # share of the processors' time that others may take before it is worth a note

MIN_BUFFER, SMALLEST_BUFFER = GIB, 64 << 20
SEQUENTIAL_ROUNDS, RANDOM_ROUNDS = 7, 9
EVERY = 10  # an FFN with a tenth of its neurons active


def measure_machine(
    name: str | None = None, disk_folder: Path | None = None, progress: Callable[[str], None] | None = None
) -> Machine:
    """Measures processor, memory, disk and GPU.

    Args:
        name: of the machine; None for the host's name.
        disk_folder: on the disk that models are read from; None for ${XDG_CACHE_HOME:-~/.cache}/tsconv.
        progress: called with one line before each step.

    Returns:
        the machine; its notes say how it was measured, and why a disk or GPU is missing.

    Raises:
        TsconvError: a bad name, no such folder, or less than 256 MiB of memory available.
        BackendError: the native library is missing or broken.
    """
    say = progress or (lambda line: None)
    name = socket.gethostname() or "this machine" if name is None else name
    check_name(name, "name of the machine")
    folder = _made_cache_folder() if disk_folder is None else disk_folder
    if disk_folder is not None and not folder.is_dir():
        raise TsconvError("not a folder", where=folder, fix="name a folder on the disk that models are read from")
    backend = load_backend()
    now = datetime.datetime.now(datetime.UTC)
    notes = [f"Measured on {now:%Y-%m-%d %H:%M} UTC by tsconv {tsconv.__version__}: tsconv profile --machine"]
    if (busy := busy_share()) > BUSY:
        notes.append(f"busy: other programs took {busy:.0%} of the processors' time: figures may be too low")
        say(notes[-1])
    say("cores: which threads make FFNs faster")
    cores, found = measure_cores(backend)
    notes += found
    say(f"memory: reading with {cores} threads")
    sequential, random, found = measure_memory(backend, cores)
    notes += found
    say(f"disk: {folder}")
    disk, found = measure_disk(folder, cores, ROW_BYTES)
    notes += found
    say("GPU")
    gpu, found = measure_gpu()
    notes += found
    cpu = Cpu(cpu_model(), cores, floored(limits.total_memory()), rounded(sequential / 1e9), rounded(random / 1e9))
    return Machine(name, cpu, disk, gpu, notes=tuple(notes))


def _made_cache_folder() -> Path:
    folder = cache_folder()
    with contextlib.suppress(OSError):  # measuring the disk says why
        folder.mkdir(parents=True, exist_ok=True)
    return folder


# ---- cores


def measure_cores(backend: Backend) -> tuple[int, list[str]]:
    """Threads up to which FFN-like work gets faster: dot products of rows from the caches, in phases that end with a
    barrier. Sees hyper-threads, slow cores, CPU affinity and quotas. Returns the number and notes."""
    rates: dict[int, float] = {}

    def measured(n_threads: int) -> float:
        return backend.measure_compute(n_threads, COMPUTE_SECONDS) or 0.0

    for n_threads in candidates(len(os.sched_getaffinity(0)), physical_cores(), limits.usable_cores()):
        if (rate := measured(n_threads)) == 0.0:  # OpenMP grants no more threads
            break
        rates[n_threads] = rate
        if sum(n > computing_cores(rates) for n in rates) == 3:
            break
    if not rates:
        raise BackendError("computing cannot be measured", found="OpenMP grants not even one thread, or no memory")
    # Rounds one after the other: what disturbs one thread count for a moment does not spoil its next round.
    for _ in range(max(1, min(3, int(MORE_SECONDS / COMPUTE_SECONDS / len(rates))))):
        rates = {n: max(rate, measured(n)) for n, rate in rates.items()}
    cores = computing_cores(rates)
    listed = ", ".join(f"{n}: {rate / 1e6:.2f}" for n, rate in rates.items())
    return cores, [f"cores: million Q4_0 rows of 4096 weights per second from the caches, by threads: {listed}"]


def candidates(n_cpus: int, n_physical: int, n_granted: int) -> list[int]:
    """Thread counts to try, ascending: up to the CPUs of the affinity, and one more than a quota of time grants."""
    limit = n_cpus if n_granted >= n_physical else min(n_cpus, n_granted + 1)
    return sorted(n for n in {*THREADS, n_cpus, n_physical, n_granted} if n <= limit)


def computing_cores(rates: Mapping[int, float]) -> int:
    """The largest thread count that was worth it: each step up to it gained at least half of the threads it added.

    Args:
        rates: threads -> work per second.
    """
    best = min(rates)
    for n in sorted(rates):
        if rates[n] / rates[best] - 1 >= GAIN * (n / best - 1):
            best = n
    return best


# ---- memory


def measure_memory(backend: Backend, n_threads: int) -> tuple[float, float, list[str]]:
    """Bytes/s of reading memory far larger than the caches: all of it; one row of ten, the next ones prefetched.

    Raises:
        TsconvError: too little memory is available.
    """
    caches, available = cache_bytes(), limits.available_memory()
    n_bytes = min(max(2 * caches, MIN_BUFFER), available // 4) // mmap.PAGESIZE * mmap.PAGESIZE
    if n_bytes < SMALLEST_BUFFER:
        raise TsconvError(
            "too little memory to measure it",
            expected=f"{4 * SMALLEST_BUFFER:,} bytes available",
            found=f"{available:,}",
            fix="close other programs",
        )
    n_rows = n_bytes // ROW_BYTES
    with mmap.mmap(-1, n_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            memory.madvise(mmap.MADV_NOHUGEPAGE)  # as the page cache, which mapped weights are in
        view = (ctypes.c_char * n_bytes).from_buffer(memory)
        address = ctypes.addressof(view)
        ctypes.memset(address, 1, n_bytes)  # pages that were never written are all the same one

        def rate(every: int, nth: int) -> float:
            seconds, _ = backend.measure_rows(address, n_rows, ROW_BYTES, every=every, nth=nth, n_threads=n_threads)
            return n_rows // every * ROW_BYTES / seconds

        try:
            rate(1, 0)
            sequential = statistics.median(rate(1, 0) for _ in range(SEQUENTIAL_ROUNDS))
            # Other rows each time: those of the round before may still be in a cache.
            random = statistics.median(rate(EVERY, nth) for nth in range(1, 1 + RANDOM_ROUNDS))
        finally:
            del view  # or the mapping cannot be closed
    notes = [
        f"memory: {n_bytes / GIB:.2f} GiB in pages of 4 KB, {n_threads} threads; random: one row of {ROW_BYTES} bytes "
        f"in {EVERY}, the next ones prefetched; medians of {SEQUENTIAL_ROUNDS} and {RANDOM_ROUNDS}"
    ]
    if n_bytes < 1.5 * caches:
        notes.append(
            f"memory: no more was available, and the caches hold {caches / GIB:.2f} GiB: they are in the figures"
        )
    return sequential, min(random, sequential), notes


def cache_bytes() -> int:
    """Bytes of the last-level caches of the CPUs in this process's affinity; 0 when unknown.

    Source: /sys/devices/system/cpu/cpuN/cache (Linux ABI). A virtual machine may be told of more than it gets.
    """
    sizes: dict[tuple[int, str], int] = {}
    for cpu in os.sched_getaffinity(0):
        for index in Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"):
            try:
                level = int((index / "level").read_text())
                size = re.fullmatch(r"(\d+)([KMG]?)\n?", (index / "size").read_text())
                shared = (index / "shared_cpu_list").read_text().strip()
            except (OSError, ValueError):
                continue
            if size is not None:
                sizes[level, shared] = int(size[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[size[2]]
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last)


def busy_share(proc: Path = limits.PROC, seconds: float = 0.25) -> float:
    """Share of all processors' time that is not idle while this process sleeps; 0 when unknown.

    Source: proc(5), /proc/stat: user, nice, system, idle, iowait and so on since the start, in ticks.
    """

    def ticks() -> tuple[int, int]:
        times = [int(field) for field in (proc / "stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(times), times[3] + times[4]

    try:
        total, idle = ticks()
        time.sleep(seconds)
        total_after, idle_after = ticks()
    except (OSError, ValueError, IndexError):
        return 0.0
    return 1 - (idle_after - idle) / max(1, total_after - total) if total_after > total else 0.0
