"""This machine: measured once, its profile kept in the cache folder."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path

from tsconv.cache import cache_folder
from tsconv.errors import OutputError, TsconvError
from tsconv.machine.measure import measure_machine
from tsconv.machine.profile import Machine, load_machine, save_machine


def machine_file() -> Path:
    """Where `this_machine` keeps its profile: ${XDG_CACHE_HOME:-~/.cache}/tsconv/machine-HOST.toml."""
    host = re.sub(r"[^\w.-]", "_", socket.gethostname()) or "unnamed"
    return cache_folder() / f"machine-{host}.toml"


def this_machine(progress: Callable[[str], None] = lambda line: None) -> Machine:
    """The profile of this machine: measured once, and kept in `machine_file()`.

    Raises:
        OutputError: the profile cannot be written.
    """
    path = machine_file()
    if path.exists():
        try:
            return load_machine(path)
        except TsconvError:
            pass  # of another version: measured again
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot keep what is measured of this machine: {error.strerror}",
            where=path.parent,
            fix="set XDG_CACHE_HOME",
        ) from None
    progress(f"measuring this machine once: {path}")
    machine = measure_machine(progress=progress)
    if any(note.startswith("busy") for note in machine.notes):
        progress("other programs kept this machine busy: what was measured is used now, and not kept")
    else:
        save_machine(machine, path, force=True)
    return machine
