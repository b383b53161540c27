"""Git LFS pointers: what stands in place of a large file where a repository was cloned without git-lfs."""

from __future__ import annotations

from pathlib import Path

from tsconv.errors import CheckpointError

FIRST_LINE = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path) -> None:
    """Raises CheckpointError when `path` is a pointer. A file that cannot be read is left to its reader."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(FIRST_LINE))
    except OSError:
        return
    if start == FIRST_LINE:
        raise CheckpointError(
            "a Git LFS pointer, not the file itself", where=path, fix="run `git lfs pull` in the folder of the clone"
        )
