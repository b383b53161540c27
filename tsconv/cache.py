"""The folder for what can be made again: measured machines, generated models."""

from __future__ import annotations

import os
from pathlib import Path

from tsconv.errors import OutputError


def cache_folder() -> Path:
    """${XDG_CACHE_HOME:-~/.cache}/tsconv, which may not exist yet. As the XDG specification has it, a relative path
    there counts for nothing.

    Raises:
        OutputError: this user has no home.
    """
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):
        return Path(named) / "tsconv"
    home = os.path.expanduser("~")
    if not os.path.isabs(home):
        raise OutputError("no cache folder", expected="an absolute HOME", found=home, fix="set XDG_CACHE_HOME")
    return Path(home) / ".cache" / "tsconv"
