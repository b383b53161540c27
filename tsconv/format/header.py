"""Reading the header of a GGUF file: keys and tensor table, every length checked against the file.

Format: ggml/src/gguf.cpp and docs/gguf.md of ggml. Only the header is read; tensor data is located, not touched.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from tsconv.errors import ModelFileError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_ENTRIES = 1 << 20  # keys, or tensors: a 512-layer model with 1024 experts has fewer than 2^20 sidecar tensors
MAX_HEADER = 1 << 30  # bytes
READ_BYTES = 64 << 10  # at a time

SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}


@dataclass(frozen=True)
class TensorEntry:
    """A row of the tensor table. `shape` is fastest dimension first; `offset` is from the start of the file."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    n_bytes: int

    @property
    def n_weights(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class ValueType:
    """Type of a key's value; `element` and `length` are those of an array."""

    kind: GGUFValueType
    element: GGUFValueType | None = None
    length: int = 0

    def __str__(self) -> str:
        return self.kind.name.lower() if self.element is None else f"{self.element.name.lower()}[{self.length}]"


@dataclass(frozen=True)
class Header:
    """What stands before the tensor data. Strings are str, arrays are lists; `types` has the type of every key."""

    path: Path
    file_bytes: int
    keys: dict[str, Any]
    types: dict[str, ValueType]
    tensors: tuple[TensorEntry, ...]


class _Cursor:
    """Little-endian values from a file, none of them beyond its end."""

    def __init__(self, file: BinaryIO, path: Path, n_bytes: int) -> None:
        self.file, self.path, self.left = file, path, min(n_bytes, MAX_HEADER)

    def take(self, n: int) -> bytes:
        if n > self.left:
            raise ModelFileError(
                "header ends too early", where=self.path, expected=f"{n} more bytes", found=self.left, fix=DAMAGED
            )
        self.left -= n
        return self.file.read(n)

    def scalars(self, code: str, n: int = 1) -> tuple[Any, ...]:
        return struct.unpack(f"<{n}{code}", self.take(n * struct.calcsize(code)))

    def string(self) -> str:
        (length,) = self.scalars("Q")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise ModelFileError("a string is not UTF-8", where=self.path, fix=DAMAGED) from None

    def count(self, what: str) -> int:
        (n,) = self.scalars("Q")
        if n > MAX_ENTRIES:
            raise ModelFileError(f"too many {what}", where=self.path, expected=f"up to {MAX_ENTRIES}", found=n)
        return n

    def value_type(self) -> GGUFValueType:
        (code,) = self.scalars("I")
        try:
            return GGUFValueType(code)
        except ValueError:
            raise ModelFileError("unknown value type", where=self.path, found=code, fix=DAMAGED) from None

    def value(self) -> tuple[Any, ValueType]:
        kind = self.value_type()
        if kind == GGUFValueType.STRING:
            return self.string(), ValueType(kind)
        if kind != GGUFValueType.ARRAY:
            return self.scalars(SCALARS[kind])[0], ValueType(kind)
        element = self.value_type()
        (n,) = self.scalars("Q")
        if element == GGUFValueType.ARRAY:
            raise ModelFileError("array of arrays", where=self.path, fix=DAMAGED)
        if element == GGUFValueType.STRING:
            return [self.string() for _ in range(n)], ValueType(kind, element, n)
        return list(self.scalars(SCALARS[element], n)), ValueType(kind, element, n)


DAMAGED = "it is truncated or damaged: convert or download it again"


def read_header(path: Path) -> Header:
    """Header of the GGUF file at `path`.

    Raises:
        ModelFileError: it is missing, not GGUF, of an unknown version, damaged, or shorter than its tensors.
    """
    try:
        n_bytes = path.stat().st_size
        with open(path, "rb", buffering=READ_BYTES) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead into the tensor data
            return _parse(_Cursor(file, path, n_bytes), n_bytes)
    except OSError as error:
        raise ModelFileError(f"cannot be read: {error.strerror}", where=path) from None


def _parse(cursor: _Cursor, n_bytes: int) -> Header:
    path = cursor.path
    magic = cursor.take(min(4, n_bytes))
    if magic != MAGIC:
        raise ModelFileError("not a GGUF file", where=path, expected=MAGIC, found=magic)
    (version,) = cursor.scalars("I")
    if version not in VERSIONS:
        raise ModelFileError(
            "GGUF version is not supported", where=path, expected=" or ".join(map(str, VERSIONS)), found=version
        )
    n_tensors, n_keys = cursor.count("tensors"), cursor.count("keys")
    keys: dict[str, Any] = {}
    types: dict[str, ValueType] = {}
    for _ in range(n_keys):
        key = cursor.string()
        if key in keys:
            raise ModelFileError(f"key {key} occurs twice", where=path, fix=DAMAGED)
        keys[key], types[key] = cursor.value()

    rows = [_tensor_row(cursor) for _ in range(n_tensors)]
    alignment = keys.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ModelFileError("bad general.alignment", where=path, expected="a power of two", found=alignment)
    start = -(-cursor.file.tell() // alignment) * alignment
    tensors = tuple(_located(path, n_bytes, start, alignment, row) for row in rows)
    if len({tensor.name for tensor in tensors}) != n_tensors:
        raise ModelFileError("a tensor occurs twice", where=path, fix=DAMAGED)
    return Header(path, n_bytes, keys, types, tensors)


def _tensor_row(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape, type code, offset in the data section)"""
    name = cursor.string()
    (n_dims,) = cursor.scalars("I")
    if not 1 <= n_dims <= MAX_DIMS:
        raise ModelFileError(
            "bad number of dimensions", where=f"{cursor.path}: {name}", expected=f"1..{MAX_DIMS}", found=n_dims
        )
    return name, cursor.scalars("Q", n_dims), *cursor.scalars("I"), *cursor.scalars("Q")


def _located(
    path: Path, file_bytes: int, start: int, alignment: int, row: tuple[str, tuple[int, ...], int, int]
) -> TensorEntry:
    name, shape, code, offset = row
    where = f"{path}: {name}"
    try:
        kind = GGMLQuantizationType(code)
    except ValueError:
        raise ModelFileError("unknown tensor type", where=where, found=code) from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[0] % block:
        raise ModelFileError("row is not whole blocks", where=where, expected=f"a multiple of {block}", found=shape[0])
    if offset % alignment:
        raise ModelFileError("data is not aligned", where=where, expected=f"a multiple of {alignment}", found=offset)
    n_bytes = prod(shape) // block * block_bytes
    end = start + offset + n_bytes
    if end > file_bytes:
        raise ModelFileError(
            "tensor data lies beyond the end of the file",
            where=where,
            expected=f"{end} bytes",
            found=file_bytes,
            fix=DAMAGED,
        )
    return TensorEntry(name, shape, kind, start + offset, n_bytes)
