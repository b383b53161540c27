"""What this process may use of the machine it runs on: processors and memory, containers' limits included."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from tsconv.machine.cpu import physical_cores

PROC = Path("/proc")


def usable_cores(proc: Path | None = None) -> int:
    """Physical cores in the CPU affinity, and no more than the CPU time that control groups grant; at least 1."""
    quota = cpu_quota(proc)
    return max(1, physical_cores() if quota is None else min(physical_cores(), int(quota)))


def cpu_quota(proc: Path | None = None) -> float | None:
    """CPUs' worth of time that this process's control groups grant; None without a limit."""
    return min(
        (quota for _, folder in control_groups("cpu", proc or PROC) if (quota := _quota(folder)) is not None),
        default=None,
    )


MAX_BUSY_CORES = 0.5  # of other programs, with which the machine still counts as quiet


def busy_cores(seconds: float, proc: Path = PROC) -> float | None:
    """Processors' worth of time that programs on this machine use while this one sleeps; None where it is not told.

    Source: proc(5), the first line of stat: user, nice, system, idle, iowait, irq, softirq.
    """

    def busy_ticks() -> int:
        user, nice, system, _, _, irq, softirq = map(int, (proc / "stat").read_text().split()[1:8])
        return user + nice + system + irq + softirq

    try:
        before, start = busy_ticks(), time.monotonic()
        time.sleep(seconds)
        return (busy_ticks() - before) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - start)
    except (OSError, ValueError):
        return None


def total_memory(proc: Path = PROC) -> int:
    """Bytes of main memory, or of the smallest limit of this process's control groups (v1 and v2)."""
    total = re.search(r"^MemTotal:\s+(\d+) kB", (proc / "meminfo").read_text(), re.MULTILINE)
    groups = (
        _number(folder / ("memory.max" if is_v2 else "memory.limit_in_bytes"))
        for is_v2, folder in control_groups("memory", proc)
    )
    known = [1024 * int(total[1])] if total else []
    return min([*known, *(limit for limit in groups if limit is not None)])


def available_memory(proc: Path = PROC) -> int:
    """Bytes that this process can come to use without swapping: the kernel's estimate, and what is left in each of its
    control groups (v1 and v2). Page cache counts as free: it is what mapped weights are made of.

    Source: MemAvailable in proc(5); Linux admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
    """
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", (proc / "meminfo").read_text(), re.MULTILINE))
    left = (n for is_v2, folder in control_groups("memory", proc) if (n := _memory_left(folder, is_v2)) is not None)
    return max(0, min([1024 * int(fields["MemAvailable"]), *left]))


def fits_in_memory(n_bytes: int) -> bool:
    """Whether a file of `n_bytes` can stay in memory.

    A quarter of what is available is left for what llama.cpp repacks, for the context and for other programs.
    """
    available = available_memory()
    return n_bytes <= available - available // 4


def control_groups(controller: str, proc: Path) -> Iterator[tuple[bool, Path]]:
    """(is it v2, folder) of every control group that this process is in, innermost first."""
    try:
        memberships = [line.split(":", 2) for line in (proc / "self" / "cgroup").read_text().splitlines()]
        mounts = (proc / "self" / "mountinfo").read_text().splitlines()
    except OSError:
        return
    for line in mounts:
        # id parent device root mount-point options [optional fields] - type source super-options (proc(5))
        before, _, after = line.partition(" - ")
        (root, mount), (kind, *_, options) = before.split()[3:5], after.split()
        is_v2 = kind == "cgroup2"
        if not is_v2 and (kind != "cgroup" or controller not in options.split(",")):
            continue
        for _, controllers, path in memberships:
            if controllers == "" if is_v2 else controller in controllers.split(","):
                inside = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path()
                yield from ((is_v2, Path(mount) / folder) for folder in (inside, *inside.parents))


def _number(path: Path) -> int | None:
    """The number in a file; None for "max", or without the file."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _memory_left(folder: Path, is_v2: bool) -> int | None:
    limit = _number(folder / ("memory.max" if is_v2 else "memory.limit_in_bytes"))
    used = _number(folder / ("memory.current" if is_v2 else "memory.usage_in_bytes"))
    if limit is None or used is None:
        return None
    prefix = "" if is_v2 else "total_"
    statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    cache = sum(int(statistics.get(f"{prefix}{name}", 0)) for name in ("inactive_file", "active_file"))
    return limit - used + cache


def _quota(folder: Path) -> float | None:
    """CPUs' worth of time: "quota period" in cpu.max (v2), or in two files where -1 is no limit (v1)."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        quota, period = (str(_number(folder / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None
