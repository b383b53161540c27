"""The processors this process may use."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def physical_cores() -> int:
    """Physical cores in this process's CPU affinity: the hyper-threads of a core share the units that decoding needs.

    Source: /sys/devices/system/cpu/cpuN/topology/thread_siblings_list (Linux ABI); CPUs where it is not readable.
    """
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


def cpu_model() -> str:
    """The processor's name in /proc/cpuinfo, or its architecture."""
    try:
        match = re.search(r"^model name\s*:\s*(\S.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.machine()
