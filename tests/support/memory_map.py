"""What /proc and mincore tell about the pages of a mapped file in this process."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import resource
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

PAGE = os.sysconf("SC_PAGESIZE")
PR_CAPBSET_DROP, CAP_IPC_LOCK = 24, 14  # prctl(2), capabilities(7)
MADV_DONTNEED = 4
libc = ctypes.CDLL(None, use_errno=True)


def mappings(path: Path) -> list[tuple[int, int, int, dict[str, str]]]:
    """(begin, end, offset in the file, fields of smaps) of every mapping of `path`."""
    found = []
    fields: dict[str, str] | None = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ \d+ *(.*)", line):
            fields = {} if head[4] == str(path) else None
            if fields is not None:
                found.append((*(int(head[i], 16) for i in (1, 2, 3)), fields))
        elif fields is not None:
            name, value = line.split(":", 1)
            fields[name] = value.strip()
    return found


def locked_bytes(path: Path) -> int:
    """Locked bytes of the mappings of `path`, by smaps."""
    return sum(1024 * int(fields["Locked"].split()[0]) for *_, fields in mappings(path))


def locked_in_process() -> int:
    """VmLck of /proc/self/status, in bytes."""
    return 1024 * int(re.search(r"VmLck:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def page_set(begin: int, end: int, whole: bool = False) -> set[int]:
    """Pages of a file that bytes [begin, end) touch; `whole`: that lie inside of them."""
    return set(range(-(-begin // PAGE), end // PAGE) if whole else range(begin // PAGE, -(-end // PAGE)))


def present(path: Path) -> set[int]:
    """Pages of the file that are in this process's memory (bit 63 of /proc/self/pagemap)."""
    found: set[int] = set()
    with open("/proc/self/pagemap", "rb") as pagemap:
        for begin, end, offset, _ in mappings(path):
            pagemap.seek(begin // PAGE * 8)
            entries = np.frombuffer(pagemap.read((end - begin) // PAGE * 8), dtype=np.uint64)
            found |= {offset // PAGE + int(i) for i in np.flatnonzero(entries >> np.uint64(63))}
    return found


def cached(path: Path) -> set[int]:
    """Pages of the file that are in the page cache (mincore)."""
    found: set[int] = set()
    for begin, end, offset, _ in mappings(path):
        states = np.zeros((end - begin) // PAGE, dtype=np.uint8)
        size = ctypes.c_size_t(end - begin)
        assert libc.mincore(ctypes.c_void_p(begin), size, ctypes.c_void_p(states.ctypes.data)) == 0
        found |= {offset // PAGE + int(i) for i in np.flatnonzero(states & 1)}
    return found


def cached_bytes(path: Path) -> int:
    """Bytes of the file that are in the page cache (mincore), whoever maps it."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as pages:
        states = np.zeros(-(-len(pages) // PAGE), dtype=np.uint8)
        view = np.frombuffer(pages, dtype=np.uint8)
        size = ctypes.c_size_t(len(pages))
        assert libc.mincore(ctypes.c_void_p(view.ctypes.data), size, ctypes.c_void_p(states.ctypes.data)) == 0
        del view
    return int((states & 1).sum()) * PAGE


def drop_cache(path: Path) -> None:
    """Takes the file out of the page cache, but for pages that are mapped into a process or wait to be written."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def release(path: Path, begin: int, end: int) -> None:
    """Takes whole pages inside bytes [begin, end) of the file out of this process; they stay in the page cache."""
    for first, last, offset, _ in mappings(path):
        start = max(first, -(-begin // PAGE) * PAGE - offset + first)
        stop = min(last, end // PAGE * PAGE - offset + first)
        if start < stop:
            assert libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_DONTNEED) == 0


def may_lock(n_bytes: int) -> Callable[[], None]:
    """For `preexec_fn`: a process that may lock so much, whoever starts it."""

    def limit() -> None:
        libc.prctl(PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0)  # root would not be limited
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (n_bytes, n_bytes))

    return limit


def locked_ranges(path: Path) -> Iterable[tuple[int, int]]:
    """(begin, end) in the file of every locked mapping of `path`."""
    return [(offset, offset + end - begin) for begin, end, offset, f in mappings(path) if "lo" in f["VmFlags"].split()]
