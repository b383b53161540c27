"""Local text and JSON Lines as calibration text, in pieces of bounded size and, with a seed, in random order."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tsconv.errors import TsconvError
from tsconv.stats.text.documents import Tally, order

TEXT_PIECE = 1 << 16  # bytes of plain text handed out as one document
TEXT_WINDOW = (
    TEXT_PIECE // 4
)  # how far behind a multiple of TEXT_PIECE the end of a paragraph, line or word is looked for
JSON_BLOCK = 1 << 20  # bytes of JSON Lines that are shuffled together
MAX_LINE = 1 << 26  # bytes of a JSON Lines record
BAD_UTF8 = 1000  # one sequence in so many bytes may be invalid; a text with more is in another encoding


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """The file, for reading bytes.

    Raises:
        TsconvError: it cannot be opened or read.
    """
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise TsconvError(f"cannot be read ({error.strerror or error})", where=path) from None


def decode(data: bytes, path: Path, offset: int, tally: Tally) -> str:
    """UTF-8 bytes found at `offset` of `path`; a few invalid sequences become U+FFFD and are counted.

    Raises:
        TsconvError: a NUL byte, or more than one invalid sequence in BAD_UTF8 bytes.
    """
    fix = "give UTF-8 text, JSON Lines (.jsonl) or Parquet (.parquet)"
    if (nul := data.find(0)) >= 0:
        raise TsconvError(f"not a text file: NUL at byte {offset + nul}", where=path, fix=fix)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        text = data.decode("utf-8", "replace")
        bad = text.count("\ufffd") - data.count("\ufffd".encode())
        if bad * BAD_UTF8 > len(data):
            raise TsconvError(
                f"not a UTF-8 text file: invalid byte {data[error.start]:#04x} at byte {offset + error.start}",
                where=path,
                fix=fix,
            ) from None
        tally.replaced += bad
    return text.removeprefix("\ufeff") if offset == 0 else text


class TextFile:
    """Plain text: one document, handed out in pieces of about TEXT_PIECE bytes that end where a paragraph ends, or
    failing that a line, a word, a character."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name

    def documents(self, seed: int | None, column: str, tally: Tally) -> Iterator[str]:
        with opened(self.path) as file:
            size = os.fstat(file.fileno()).st_size
            for piece in order(-(-size // TEXT_PIECE), seed, self.name):
                start, end = (_text_boundary(file, at, size) for at in (piece * TEXT_PIECE, (piece + 1) * TEXT_PIECE))
                file.seek(start)
                yield decode(file.read(end - start), self.path, start, tally).replace("\r\n", "\n")


def _text_boundary(file: BinaryIO, at: int, size: int) -> int:
    """Where the piece that begins at about byte `at` begins: the same seen from either side of the cut."""
    if at == 0 or at >= size:
        return min(at, size)
    file.seek(at)
    window = file.read(TEXT_WINDOW)
    for mark in (b"\n\n", b"\n", b" "):
        if (found := window.find(mark)) >= 0:
            return at + found + len(mark)
    return at + next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), 0)


class JsonLines:
    """One JSON object a line, the text in one of its fields; blank lines are passed over."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name

    def documents(self, seed: int | None, column: str, tally: Tally) -> Iterator[str | None]:
        with opened(self.path) as file:
            size = os.fstat(file.fileno()).st_size
            for block in order(-(-size // JSON_BLOCK), seed, self.name):
                texts = self._texts(file, block * JSON_BLOCK, (block + 1) * JSON_BLOCK, column, tally)
                if seed is not None:
                    shuffled = list(texts)
                    texts = (shuffled[i] for i in order(len(shuffled), seed, self.name, block))
                yield from texts

    def _texts(self, file: BinaryIO, start: int, end: int, column: str, tally: Tally) -> Iterator[str | None]:
        """Of the lines that begin at byte `start` or later and before byte `end`."""
        file.seek(max(0, start - 1))
        if start:
            self._line(file)
        while (at := file.tell()) < end and (line := self._line(file)):
            text = decode(line, self.path, at, tally)
            if text.strip():
                try:
                    yield self._text(text, column)
                except TsconvError as error:
                    where = f"{self.path}, line {_line_number(file, at)}"
                    raise TsconvError(str(error), where=where) from None

    def _line(self, file: BinaryIO) -> bytes:
        at = file.tell()
        line = file.readline(MAX_LINE + 1)
        if len(line) > MAX_LINE:
            raise TsconvError(
                f"the line at byte {at} is too long", where=self.path, expected=f"at most {MAX_LINE >> 20} MiB"
            )
        return line

    @staticmethod
    def _text(line: str, column: str) -> str | None:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TsconvError(f"not JSON ({error})") from None
        if not isinstance(record, dict):
            raise TsconvError("not a record", expected="a JSON object", found=type(record).__name__)
        fix = "name the field of the text with --text-field"
        if column not in record:
            raise TsconvError(f"no field {column!r}", found=", ".join(map(str, record)) or "no fields", fix=fix)
        text = record[column]
        if text is not None and not isinstance(text, str):
            raise TsconvError(f"field {column!r}", expected="a string", found=type(text).__name__, fix=fix)
        return text


def _line_number(file: BinaryIO, offset: int) -> int:
    """Of the line that begins at byte `offset`, from 1."""
    file.seek(0)
    lines = 1
    while offset and (data := file.read(min(offset, 1 << 20))):
        lines += data.count(b"\n")
        offset -= len(data)
    return lines
