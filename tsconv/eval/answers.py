"""Answers of a model that were computed before a run ended early: the next run takes them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tsconv.errors import OutputError


class Answers:
    """In a file, each of them written at once. Answers are what JSON has.

    Args:
        path: None keeps nothing.

    Attributes:
        n_found: answers of an earlier run that were asked for.

    Raises:
        OutputError: the file cannot be written, or is damaged.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.n_found = path, 0
        self._mine: set[str] = set()  # the keys of this run's
        self._database: sqlite3.Connection | None = None
        if path is not None:
            with self._errors():
                path.parent.mkdir(parents=True, exist_ok=True)
                self._database = sqlite3.connect(path, isolation_level=None)  # every statement is a transaction
                self._database.execute("PRAGMA journal_mode = WAL")
                self._database.execute("PRAGMA synchronous = NORMAL")
                self._database.execute("CREATE TABLE IF NOT EXISTS answers (request TEXT PRIMARY KEY, answer TEXT)")

    def find(self, kind: str, request: tuple[Any, ...]) -> Any:
        """The answer to a request, None where there is none."""
        if self._database is None:
            return None
        with self._errors():
            key = _key(kind, request)
            row = self._database.execute("SELECT answer FROM answers WHERE request = ?", (key,)).fetchone()
            if row is None:
                return None
            self.n_found += key not in self._mine
            return json.loads(row[0])

    def keep(self, kind: str, request: tuple[Any, ...], answer: Any) -> None:
        if self._database is not None:
            with self._errors():
                key = _key(kind, request)
                self._database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(answer)))
                self._mine.add(key)

    def close(self, remove: bool = False) -> None:
        """`remove`: nobody needs them any more. A file without answers goes too."""
        if self._database is not None and self.path is not None:
            with self._errors():
                remove = remove or self._database.execute("SELECT 1 FROM answers LIMIT 1").fetchone() is None
            self._database.close()
            self._database = None
            if remove:
                for suffix in ("", "-wal", "-shm"):
                    Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, ValueError) as error:
            raise OutputError(
                f"answers cannot be kept ({error})", where=self.path, fix="remove the file, or use --no-resume"
            ) from None


def _key(kind: str, request: tuple[Any, ...]) -> str:
    return hashlib.sha256(json.dumps([kind, *request], sort_keys=True).encode()).hexdigest()
