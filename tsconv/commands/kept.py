"""The models that tsconv keeps: converted from checkpoints on the Hub, or downloaded from there as they are.

They are in `models` of the cache folder as OWNER/REPO-TYPE.gguf, each with its sidecar. A converted model is such a
file. A downloaded one is a link to the Hub's cache. The model's name comes last, so what has one is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tsconv.cache import cache_folder
from tsconv.errors import ModelFileError
from tsconv.format.pair import SIDECAR_SUFFIX, sidecar_path

DEFAULT_TYPE = "q4_0"
NAME = re.compile(r"(?:(?P<owner>[A-Za-z0-9][\w.-]*)/)?(?P<repo>[A-Za-z0-9][\w.-]*?)(?::(?P<type>\w+))?")
FILE = re.compile(r"(?P<repo>.+)-(?P<type>\w+)\.gguf")


@dataclass(frozen=True)
class Name:
    """[OWNER/]REPO[:TYPE], as a user says it; None for what was left out."""

    owner: str | None
    repo: str
    type: str | None

    @property
    def repository(self) -> str | None:
        """OWNER/REPO."""
        return None if self.owner is None else f"{self.owner}/{self.repo}"


def parse_name(text: str) -> Name | None:
    """The name; None when the text cannot be one, as a file that ends in .gguf."""
    match = NAME.fullmatch(text)
    return Name(match["owner"], match["repo"], match["type"]) if match and not text.endswith(".gguf") else None


@dataclass(frozen=True)
class Kept:
    """A model that is kept. `n_bytes` are of both files; `path` is what a model is loaded from."""

    owner: str
    repo: str
    type: str
    path: Path

    @property
    def name(self) -> str:
        return f"{self.owner}/{self.repo}:{self.type}"

    @property
    def is_downloaded(self) -> bool:
        """The files are in the Hub's cache."""
        return self.path.is_symlink()

    @property
    def files(self) -> list[Path]:
        return [path for path in (self.path, sidecar_path(self.path)) if path.exists()]

    @property
    def n_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    @property
    def date(self) -> datetime:
        """When it was converted or downloaded."""
        return datetime.fromtimestamp(self.path.lstat().st_mtime, UTC)


def models_folder() -> Path:
    """Where they are; it may not exist yet. Raises OutputError as `cache_folder`."""
    return cache_folder() / "models"


def model_path(repository: str, kind: str) -> Path:
    """Of OWNER/REPO in the type `kind`."""
    owner, repo = repository.split("/")
    return models_folder() / owner / f"{repo}-{kind}.gguf"


def all_kept() -> list[Kept]:
    """All models that are kept, by name. A file that is still being written, or was left half written, is none."""
    found = []
    for path in sorted(models_folder().glob("*/*.gguf")):
        match = FILE.fullmatch(path.name)
        if match and not path.name.endswith(SIDECAR_SUFFIX) and path.exists():
            found.append(Kept(path.parent.name, match["repo"], match["type"], path))
    return found


def find(name: Name) -> Kept | None:
    """The kept model of a name; without a type the one in DEFAULT_TYPE, or else the only one there is.

    Raises:
        ModelFileError: several models have the name.
    """
    found = _matching(name)
    if len(found) > 1:
        found = [kept for kept in found if kept.type == DEFAULT_TYPE] or found
    return _only(found, name.repo)


def find_to_remove(text: str) -> Kept:
    """The one model of a name, which must not be in doubt.

    Raises:
        ModelFileError: there is none, or several.
    """
    name = parse_name(text)
    found = None if name is None else _only(_matching(name), text)
    if found is None:
        raise ModelFileError("no kept model of this name", where=text, fix="tsconv list shows their names")
    return found


def _matching(name: Name) -> list[Kept]:
    return [
        kept
        for kept in all_kept()
        if kept.repo == name.repo
        and name.owner in (None, kept.owner)
        and (name.type is None or name.type.lower() == kept.type.lower())
    ]


def _only(found: list[Kept], text: str) -> Kept | None:
    if len(found) > 1:
        names = ", ".join(kept.name for kept in found)
        raise ModelFileError("several kept models have this name", where=text, fix=f"name one of {names}")
    return found[0] if found else None


def remove(kept: Kept) -> int:
    """Removes the model and its sidecar, and what they are in the Hub's cache. Returns the bytes that this freed.

    Raises:
        OSError: a file cannot be removed.
    """
    freed = kept.n_bytes
    for path in kept.files:  # the model first: a sidecar alone counts for nothing
        target = path
        while target.is_symlink():  # to the snapshot, and from there to the data
            link, target = target, Path(os.path.abspath(target.parent / os.readlink(target)))
            link.unlink()
        target.unlink(missing_ok=True)
    return freed


def link(path: Path, model: Path) -> None:
    """Keeps a downloaded `model`, with its sidecar, as `path`."""
    for name, target in ((sidecar_path(path), sidecar_path(model)), (path, model)):
        temporary = name.with_name(f"{name.name}.link")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target.absolute())
        os.replace(temporary, name)


@contextlib.contextmanager
def alone(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """While this holds, no other process prepares the model `path`. `waiting` is called when one does and this has to
    wait for it. The folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
