"""llama-perplexity's file of log probabilities (--kl-divergence-base; tools/perplexity/perplexity.cpp), little-endian:

    "_logits_", u32 n_ctx, i32 n_vocab, i32 n_windows, i32 tokens [n_windows, n_ctx],
    and for each scored position: f32 scale, f32 minimum, u16 values [n_vocab], padded to a multiple of 4 bytes.

A log probability is scale * value + minimum. What is more than 16 below the likeliest token's is raised to that.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from tsconv.errors import OutputError, TsconvError
from tsconv.eval.estimate import log_sums
from tsconv.eval.windows import Windows

MAGIC = b"_logits_"
HEAD = struct.Struct("<Iii")
LEVELS, DEPTH = 65535, 16.0
MAX_CONTEXT, MAX_VOCABULARY = 1 << 24, 1 << 24


def row_bytes(n_vocab: int) -> int:
    """Of a position."""
    return 8 + 4 * ((n_vocab + 1) // 2)


class BaseWriter:
    """Writes a file, all or nothing: it has its name when the context ends without an exception."""

    def __init__(self, path: Path, found: Windows, n_vocab: int) -> None:
        self._path, self._part = path, path.with_name(path.name + ".part")
        self._n_vocab = n_vocab
        try:
            self._file: BinaryIO = self._part.open("wb")
            self._file.write(MAGIC + HEAD.pack(found.n_ctx, n_vocab, len(found)))
            self._file.write(found.tokens.astype("<i4").tobytes())
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", where=path) from None

    def write(self, logits: npt.NDArray[np.float32]) -> None:
        """The positions of a window: float32 [n_scored, n_vocab]."""
        top = logits.max(axis=1)
        low = np.maximum(logits.min(axis=1), top - np.float32(DEPTH))
        scale = (top - low) / np.float32(LEVELS)
        minimum = (low - log_sums(logits)).astype(np.float32)
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
        values = np.rint(np.clip(logits - low[:, None], 0, None) * inverse[:, None])
        rows = np.zeros((len(logits), row_bytes(self._n_vocab)), dtype=np.uint8)
        rows[:, :4], rows[:, 4:8] = scale.astype("<f4")[:, None].view(np.uint8), minimum[:, None].view(np.uint8)
        rows[:, 8 : 8 + 2 * self._n_vocab] = values.astype("<u2").view(np.uint8)
        try:
            self._file.write(rows.tobytes())
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", where=self._path) from None

    def __enter__(self) -> BaseWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
            if kind is None:
                os.replace(self._part, self._path)
        except OSError as failure:
            raise OutputError(f"cannot be written: {failure.strerror}", where=self._path) from None
        finally:
            self._part.unlink(missing_ok=True)


class BaseFile:
    """A file of log probabilities, read window by window."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            TsconvError: it cannot be read, is something else, or ends early.
        """
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(len(MAGIC) + HEAD.size)
                if len(head) < len(MAGIC) + HEAD.size or not head.startswith(MAGIC):
                    raise TsconvError(
                        "not a file of log probabilities",
                        where=path,
                        fix="write one with tsconv eval ppl --save-base, or llama-perplexity --kl-divergence-base",
                    )
                n_ctx, self.n_vocab, n = HEAD.unpack_from(head, len(MAGIC))
                if not (4 <= n_ctx <= MAX_CONTEXT and 0 < self.n_vocab <= MAX_VOCABULARY and n > 0):
                    raise TsconvError(
                        "a damaged file of log probabilities",
                        where=path,
                        found=f"{n} windows of {n_ctx} tokens, {self.n_vocab} words",
                    )
                expected = len(head) + n * (4 * n_ctx + (n_ctx - 1 - n_ctx // 2) * row_bytes(self.n_vocab))
                if size != expected:
                    raise TsconvError(
                        "a file of log probabilities that was cut short" if size < expected else "bytes too many",
                        where=path,
                        expected=f"{expected:,} bytes",
                        found=f"{size:,}",
                    )
                tokens = np.frombuffer(file.read(4 * n_ctx * n), dtype="<i4").reshape(n, n_ctx)
        except OSError as error:
            raise TsconvError(f"cannot be read: {error.strerror}", where=path) from None
        self.windows = Windows(tokens.astype(np.int32))
        self._data_start = len(head) + tokens.nbytes

    def log_probabilities(self, most: int | None = None) -> Iterator[npt.NDArray[np.float32]]:
        """float32 [n_scored, n_vocab] of each window, the first `most` of them."""
        n, width = self.windows.n_scored, row_bytes(self.n_vocab)
        with self.path.open("rb") as file:
            file.seek(self._data_start)
            for _ in range(len(self.windows) if most is None else most):
                data = file.read(n * width)
                if len(data) != n * width:
                    raise TsconvError("was cut short while it was read", where=self.path)
                rows = np.frombuffer(data, dtype=np.uint8).reshape(n, width)
                scale, minimum = (rows[:, at : at + 4].copy().view("<f4") for at in (0, 4))
                values = rows[:, 8 : 8 + 2 * self.n_vocab].copy().view("<u2")
                yield scale * values.astype(np.float32) + minimum
