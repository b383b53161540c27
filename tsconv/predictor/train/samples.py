"""What the FFNs of some layers compute on a text, in files: inputs in half precision, and h in a byte.

A folder holds two files for each FFN and split: NAME.x, float16 [n, n_embd], and NAME.h, uint8 [n, n_ff]. A byte of h
is 0 for h = 0 and else 1 + 8 (log2 h + 16), rounded and within 1 to 255: 2^-16 to 2^15.75 in steps of an eighth of an
octave, so that h^2 is right within 9 %. It weighs a neuron; nothing is computed from it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from tsconv.errors import BackendError, OutputError, TsconvError

PER_OCTAVE, LOWEST = 8, -16  # of the codes of h
BLOCK = 64  # rows that are read together
TRAINED, HELD = "train", "held"
HELD_EVERY = 8  # every so many chunks one is held out of training: thresholds are chosen on it

Bytes = npt.NDArray[np.uint8]


def codes_of(h: npt.NDArray[np.float32]) -> Bytes:
    """The bytes of h, which is at least 0."""
    with np.errstate(divide="ignore"):
        codes = np.rint(np.log2(h) * PER_OCTAVE + (1 - LOWEST * PER_OCTAVE))
    return np.where(h > 0, np.clip(codes, 1, 255), 0).astype(np.uint8)


def values_of_codes() -> npt.NDArray[np.float32]:
    """h of each byte, float32 [256]."""
    values = np.exp2((np.arange(256) - 1) / PER_OCTAVE + LOWEST)
    values[0] = 0
    return values.astype(np.float32)


@dataclass(frozen=True)
class Samples:
    """One FFN's rows of one split.

    Attributes:
        path: of both files, without the ending.
        n: rows.
    """

    path: Path
    n: int
    n_embd: int
    n_ff: int

    def read(self, blocks: Sequence[int]) -> tuple[npt.NDArray[np.float16], Bytes]:
        """x and h of the rows of some blocks of BLOCK rows, the last of which may be shorter.

        Raises:
            TsconvError: the files cannot be read, or became shorter.
        """
        counts = [min(BLOCK, self.n - block * BLOCK) for block in blocks]
        x = np.empty((sum(counts), self.n_embd), np.float16)
        h = np.empty((sum(counts), self.n_ff), np.uint8)
        for ending, rows in ((".x", x), (".h", h)):
            path, start = f"{self.path}{ending}", 0
            try:
                with open(path, "rb", buffering=0) as file:
                    for block, count in zip(blocks, counts, strict=True):
                        part = rows[start : start + count]
                        file.seek(block * BLOCK * part[0].nbytes)
                        if file.readinto(part.reshape(-1).view(np.uint8).data) != part.nbytes:
                            raise TsconvError("became shorter while it was read", where=path, fix="start again")
                        start += count
            except OSError as error:
                raise TsconvError(f"cannot be read: {error.strerror}", where=path) from None
        return x, h

    @property
    def n_blocks(self) -> int:
        return -(-self.n // BLOCK)

    def batches(self, rows: int, order: Sequence[int] | None = None) -> Iterator[tuple[npt.NDArray[np.float16], Bytes]]:
        """x and h, about `rows` rows at a time, in the order of `order`, which names blocks; None: as they came."""
        order = range(self.n_blocks) if order is None else order
        step = max(1, rows // BLOCK)
        for start in range(0, len(order), step):
            yield self.read(order[start : start + step])


class SampleFiles:
    """The files of some layers while they are written, as `NativeModel.recording` wants it.

    Args:
        folder: where they go.
        layers, n_ffn, n_embd, n_ff: what is recorded.
    """

    def __init__(self, folder: Path, layers: range, n_ffn: int, n_embd: int, n_ff: int) -> None:
        self.folder, self.layers, self.n_ffn, self.n_embd, self.n_ff = folder, layers, n_ffn, n_embd, n_ff
        self.split = TRAINED
        self._files: dict[str, BinaryIO] = {}

    def __call__(
        self, layer: int, ffns: npt.NDArray[np.int32], x: npt.NDArray[np.float32], h: npt.NDArray[np.float32]
    ) -> None:
        """Appends rows, which are sorted by FFN.

        Raises:
            BackendError: an activation is not a number.
            OutputError: the disk is full, or cannot be written.
        """
        bounds = np.flatnonzero(np.diff(ffns, prepend=-1, append=-1))
        for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            values = h[start:stop]
            if not np.isfinite(values.max(initial=0)) or not np.isfinite(x[start:stop]).all():
                raise BackendError("the model computes activations that are not finite", found=f"layer {layer}")
            path = sample_path(self.folder, layer, int(ffns[start]), self.split)
            limit = np.finfo(np.float16).max
            self._append(f"{path}.x", np.clip(x[start:stop], -limit, limit).astype(np.float16))
            self._append(f"{path}.h", codes_of(values))

    def _append(self, path: str, rows: np.ndarray) -> None:
        try:
            if path not in self._files:
                self._files[path] = open(path, "ab")  # noqa: SIM115
            self._files[path].write(rows.data)
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", where=path, fix="free some room") from None

    def close(self) -> None:
        """Raises OutputError where what was written last has no room."""
        for path, file in self._files.items():
            try:
                file.close()
            except OSError as error:
                raise OutputError(f"cannot be written: {error.strerror}", where=path, fix="free some room") from None


def sample_path(folder: Path, layer: int, ffn: int, split: str) -> Path:
    return folder / f"layer-{layer}-ffn-{ffn}.{split}"


def open_samples(folder: Path, layer: int, ffn: int, split: str, n_embd: int, n_ff: int) -> Samples:
    """Those that `SampleFiles` wrote; none where an expert saw no token."""
    path = sample_path(folder, layer, ffn, split)
    sizes = [os.path.getsize(f"{path}{end}") if os.path.exists(f"{path}{end}") else 0 for end in (".x", ".h")]
    return Samples(path, min(sizes[0] // (2 * n_embd), sizes[1] // n_ff), n_embd, n_ff)
