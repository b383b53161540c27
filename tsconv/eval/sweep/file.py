"""Where the points of a sweep are kept while it goes on, so that one that was stopped continues."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsconv.errors import OutputError, TsconvError
from tsconv.eval.sweep.points import Point, in_order, point_of
from tsconv.format.header import Header
from tsconv.write.writer import check_output, write_file

FORMAT = 1
SUFFIX = ".sweep.json"
BASE_SUFFIX = ".base"
MAX_BYTES = 1 << 26


def identity_of(header: Header, text: bytes, n_ctx: int, chunks: int | None, n_batch: int) -> dict[str, Any]:
    """What all points of a file have alike."""
    return {
        "model": header.path.name,
        "pair_id": str(header.keys.get("turbosparse.pair_id")),
        "model_bytes": header.file_bytes,
        "text_sha256": hashlib.sha256(text).hexdigest(),
        "n_ctx": n_ctx,
        "chunks": chunks,
        "n_batch": n_batch,
    }


SAME_MODEL = ("pair_id", "model_bytes")
OPTIONS = {"n_ctx": "-c", "chunks": "--chunks", "n_batch": "-b"}


@dataclass
class SweepFile:
    """Points of one model, text and way of measuring.

    Attributes:
        base: size and time of the file of exact sparsity's log probabilities, as it was when it was complete.
    """

    path: Path
    identity: dict[str, Any]
    points: dict[str, Point] = field(default_factory=dict)
    base: list[int] | None = None

    @property
    def base_path(self) -> Path:
        return self.path.with_name(self.path.name + BASE_SUFFIX)

    def add(self, point: Point) -> None:
        """Keeps a point. Raises OutputError."""
        self.points[point.sparsity] = point
        self.save()

    def save(self) -> None:
        """Raises OutputError where the file cannot be written."""
        values = {
            "tsconv_sweep": FORMAT,
            **self.identity,
            "base": self.base,
            "points": [point.as_dict() for point in in_order(self.points.values())],
        }
        write_file(self.path, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode(), force=True)

    # ---- the base

    def base_is_complete(self) -> bool:
        """Whether the base of this sweep is there as it was left."""
        return self.base is not None and self.base == self._stamp()

    def base_is_written(self) -> None:
        """Raises OutputError."""
        self.base = self._stamp()
        self.save()

    def drop_base(self) -> None:
        """Raises OutputError."""
        self.base_path.unlink(missing_ok=True)
        if self.base is not None:
            self.base = None
            self.save()

    def _stamp(self) -> list[int] | None:
        try:
            found = self.base_path.stat()
        except OSError:
            return None
        return [found.st_size, found.st_mtime_ns]


def open_file(path: Path, identity: dict[str, Any]) -> SweepFile:
    """The file at `path`, or a new one.

    Raises:
        TsconvError: it is damaged, something else, or of another model, text or way of measuring.
        OutputError: it cannot be written.
    """
    check_output(path, force=True)
    found = SweepFile(path, identity)
    check_output(found.base_path, force=True)
    if not path.exists():
        return found
    values = _read(path)
    _check_identity(path, identity, values)
    try:
        points = [point_of(value) for value in values["points"]]
        base = values["base"]
        if base is not None and not (isinstance(base, list) and all(isinstance(n, int) for n in base)):
            raise ValueError("its base is wrong")
    except (KeyError, TypeError, ValueError, TsconvError) as error:
        raise _damaged(path, error) from None
    found.points, found.base = {point.sparsity: point for point in points}, base
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES)
        values = json.loads(data)
    except OSError as error:
        raise OutputError(f"the points of a sweep cannot be read: {error.strerror}", where=path) from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from None
    if not isinstance(values, dict) or values.get("tsconv_sweep") != FORMAT:
        raise _damaged(path, "no points of this version of tsconv")
    return values


def _damaged(path: Path, reason: object) -> TsconvError:
    return TsconvError(
        "not the points of a sweep, or damaged", where=path, found=reason, fix="delete it, or name another --points"
    )


def _check_identity(path: Path, identity: dict[str, Any], values: dict[str, Any]) -> None:
    if any(values.get(name) != identity[name] for name in SAME_MODEL):
        expected, found = identity["model"], values.get("model")
        other = "points of another model" if found != expected else "points of another conversion of the model"
        raise TsconvError(other, where=path, expected=expected, found=found, fix="name another --points")
    if values.get("text_sha256") != identity["text_sha256"]:
        raise TsconvError("points of another text", where=path, fix="name another --points")
    for name, option in OPTIONS.items():
        if values.get(name) != identity[name]:
            raise TsconvError(
                f"points with another {option}",
                where=path,
                expected=_shown(identity[name]),
                found=_shown(values.get(name)),
                fix="name another --points",
            )


def _shown(value: Any) -> Any:
    return "all" if value is None else value
