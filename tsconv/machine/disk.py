"""Measures the disk below a folder with a nameless file there, which vanishes with the process whatever happens."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tsconv.machine.profile import Disk, rounded
from tsconv.signals import signals_wait

FILE_BYTES = 256 << 20
BLOCK = 8 << 20  # of one read or write
PAGE = mmap.PAGESIZE
SEQUENTIAL_ROUNDS, SLOW_SECONDS, RANDOM_SECONDS = 3, 1.5, 1.0
DROP_ATTEMPTS, PROBES = 20, 64
IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"}


class _DiskError(Exception):
    """Why the disk cannot be measured."""


def measure_disk(folder: Path, n_threads: int, row_bytes: int) -> tuple[Disk | None, list[str]]:
    """Reads a temporary file past the page cache: all of it, then single rows with `n_threads` reads at once.

    Returns:
        the disk, or None, and notes: what was measured, or why nothing.
    """
    try:
        if (kind := _file_system(folder)) in IN_MEMORY:
            raise _DiskError(f"{folder} is kept in memory ({kind})")
        if (free := shutil.disk_usage(folder).free) < 2 * FILE_BYTES:
            raise _DiskError(f"{folder} has {free:,} bytes free, and {2 * FILE_BYTES:,} are wanted")
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            return _measure(file.fileno(), folder, n_threads, row_bytes)
    except _DiskError as error:
        return None, [f"disk: left out: {error}"]
    except OSError as error:
        return None, [f"disk: left out: {folder}: {error.strerror}"]


def _measure(fd: int, folder: Path, n_threads: int, row_bytes: int) -> tuple[Disk, list[str]]:
    block = os.urandom(BLOCK)  # nothing that a file system could compress
    for offset in range(0, FILE_BYTES, BLOCK):
        view = memoryview(block)
        while view:
            view = view[os.pwrite(fd, view, offset + BLOCK - len(view)) :]
    os.fsync(fd)
    checked = _drop_cache(fd)
    rates = [_sequential(fd)]
    while len(rates) < SEQUENTIAL_ROUNDS and FILE_BYTES / rates[0] < SLOW_SECONDS:
        rates.append(_sequential(fd))
    sequential = statistics.median(rates)
    random_rate = _random(fd, n_threads, row_bytes)
    notes = [
        f"disk: {folder}, a file of {FILE_BYTES >> 20} MiB; random: rows of {row_bytes} bytes, read as whole pages, "
        f"{n_threads} at once; a drive's or a host's own cache is in these figures"
    ]
    if not checked:
        notes.append("disk: this file system does not tell whether the page cache was passed by")
    return Disk(rounded(sequential / 1e9), rounded(min(random_rate, sequential) / 1e9)), notes


def _drop_cache(fd: int) -> bool:
    """Takes the file out of the page cache; False when it cannot be known whether that worked.

    Raises:
        _DiskError: it did not work.
    """
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # the probes below shall not read ahead
    for _ in range(DROP_ATTEMPTS):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            if not _is_cached(fd):
                return True
        except OSError:  # the file system has no reads that do not wait
            return False
        time.sleep(0.05)  # another processor may hold on to some pages for a moment
    raise _DiskError("its pages stay in memory: the page cache cannot be passed by")


def _is_cached(fd: int) -> bool:
    probe = [bytearray(PAGE)]
    for offset in range(0, FILE_BYTES, FILE_BYTES // PROBES):
        with contextlib.suppress(BlockingIOError):  # it would have to wait for the disk
            os.preadv(fd, probe, offset, os.RWF_NOWAIT)
            return True
    return False


def _sequential(fd: int) -> float:
    """Bytes/s of reading all of the file."""
    _drop_cache(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    buffer = [bytearray(BLOCK)]
    start = time.perf_counter()
    for offset in range(0, FILE_BYTES, BLOCK):
        os.preadv(fd, buffer, offset)
    return FILE_BYTES / (time.perf_counter() - start)


def _random(fd: int, n_threads: int, row_bytes: int) -> float:
    """Bytes of rows per second: distinct rows of the file in random order, each read with the pages that hold it."""
    _drop_cache(fd)
    # Rows far enough apart that no page is read twice.
    every = 2 * PAGE // row_bytes + 2
    rows = list(range(0, FILE_BYTES // row_bytes, every))
    random.Random(0).shuffle(rows)
    start = time.perf_counter()

    def read(thread: int) -> int:
        buffer = memoryview(bytearray(row_bytes + 2 * PAGE))
        n = 0
        for row in rows[thread::n_threads]:
            begin = row * row_bytes // PAGE * PAGE
            end = -(-(row + 1) * row_bytes // PAGE) * PAGE
            os.preadv(fd, [buffer[: end - begin]], begin)
            n += 1
            if time.perf_counter() - start > RANDOM_SECONDS:
                break
        return n

    with signals_wait(), ThreadPoolExecutor(n_threads) as pool:
        n_rows = sum(pool.map(read, range(n_threads)))
    return n_rows * row_bytes / (time.perf_counter() - start)


def _file_system(folder: Path) -> str:
    """The type of the file system that a folder is on, "" when unknown. Source: proc(5), mountinfo."""
    device = os.stat(folder).st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(" - ")[2].split()[0] for line in lines if line.split()[2] == name), "")
