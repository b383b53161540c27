"""The folder for what can be made again: measured machines, generated models."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """${XDG_CACHE_HOME:-~/.cache}/tsconv, which may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tsconv"
