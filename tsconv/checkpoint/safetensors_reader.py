"""Lazy reading of safetensors checkpoints: names, types and shapes first, rows of data when they are wanted.

The safetensors library checks each shard's header (offsets in range, no gap, no overlap, length of the file); the
data is then read with pread at the header's offsets. Reads go to private buffers that are freed after use, so resident
memory does not grow with the pages of a mapped file, and bf16 needs no torch.
Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import os
import re
import struct
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tsconv.checkpoint.config import read_json
from tsconv.checkpoint.lfs import refuse_pointer
from tsconv.checkpoint.names import MERGE, plain_names
from tsconv.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
ADAPTER = "adapter_model.safetensors"
PYTORCH_PATTERNS = ("pytorch_model*.bin", "*.pth", "consolidated*.pt")
READ_LIMIT = 1 << 30  # pread returns at most 2 GiB - 4 KiB per call

# bf16 travels as its bit pattern in uint16: numpy has no such type, and no checkpoint weight is a uint16.
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


class SourceTensor(Protocol):
    """One weight of a checkpoint, of which rows can be read. `shape` is slowest dimension first."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str:
        """A key of DTYPES."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def where(self) -> str:
        """File and tensor, for messages."""

    @property
    def nbytes(self) -> int: ...

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as a new array [stop - start, shape[-1]] of DTYPES[dtype]; a vector is one row."""


@dataclass(frozen=True)
class SafetensorsTensor:
    """A tensor at a byte offset of a shard. Safe to read from several threads."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def where(self) -> str:
        return f"{self.path.name}: {self.name}"

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        rows = np.empty((stop - start, self.shape[-1]), DTYPES[self.dtype])
        offset, view = self.offset + start * rows.shape[1] * rows.itemsize, rows.data.cast("B")
        try:
            fd = os.open(self.path, os.O_RDONLY)
            try:
                done = 0
                while done < len(view):
                    n = os.preadv(fd, [view[done : done + READ_LIMIT]], offset + done)
                    if n == 0:
                        raise CheckpointError(
                            "shard became shorter while it was read",
                            where=self.where,
                            expected=f"{len(view)} bytes",
                            found=f"{done} bytes",
                        )
                    done += n
            finally:
                os.close(fd)
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", where=self.where) from None
        return rows


def open_checkpoint(directory: Path) -> dict[str, SourceTensor]:
    """All tensors of the checkpoint in `directory`, by name without wrappers' prefixes; no tensor data is read.

    Reads `model.safetensors.index.json` and its shards, or a lone `model.safetensors`.

    Raises:
        CheckpointError: no safetensors, a damaged index, a missing, truncated or damaged shard, a tensor that the
            index names but its shard lacks, that two shards hold, or whose type is not f32, f16 or bf16; weights that
            are left over from another time the folder was written to; names that are not those of a plain model.
    """
    index = directory / INDEX
    if index.exists():
        weight_map = _weight_map(index)
        _refuse_others(directory, INDEX, set(weight_map.values()))
        stored = _indexed(directory, weight_map)
    elif (directory / SINGLE).exists():
        _refuse_others(directory, SINGLE, {SINGLE})
        stored = {tensor.name: tensor for tensor in read_shard(directory / SINGLE)}
    else:
        raise _nothing_to_read(directory)
    plain = plain_names(stored, directory)
    return {plain[name]: replace(tensor, name=plain[name]) for name, tensor in stored.items()}


def _refuse_others(directory: Path, chosen: str, read: set[str]) -> None:
    """Refuses weights that would not be read: one of the two is left over, and nothing says which.

    transformers reads model.safetensors where there is one, else the shards of the index.
    """
    for path in sorted(directory.glob("model*.safetensors")):
        if path.name not in read and (path.name == SINGLE or SHARD.fullmatch(path.name)):
            raise CheckpointError(
                f"weights that {chosen} does not name" if chosen == INDEX else f"a shard beside {chosen}",
                where=path,
                fix=f"remove or move away what is left over: {path.name}, or {chosen} and what belongs to it",
            )


def _indexed(directory: Path, weight_map: dict[str, str]) -> dict[str, SafetensorsTensor]:
    """The tensors of the shards that an index names."""
    tensors: dict[str, SafetensorsTensor] = {}
    for file in sorted(set(weight_map.values())):
        shard = directory / file
        if not shard.exists():
            raise CheckpointError(f"shard is missing, but {INDEX} names it", where=shard, fix="finish the download")
        for tensor in read_shard(shard):
            if tensor.name in tensors:
                first = tensors[tensor.name].where
                raise CheckpointError(f"tensor is in two shards, first in {first.split(':')[0]}", where=tensor.where)
            if weight_map.get(tensor.name) != file:
                found = weight_map.get(tensor.name, "nothing")
                fix = "index and shards are not of one checkpoint: download both again"
                raise CheckpointError(f"{INDEX} disagrees", where=tensor.where, expected=file, found=found, fix=fix)
            tensors[tensor.name] = tensor
    for name, file in weight_map.items():
        if name not in tensors:
            raise CheckpointError(
                f"tensor is not in the shard that {INDEX} names",
                where=f"{file}: {name}",
                fix="download the shard again",
            )
    return tensors


def read_shard(path: Path) -> list[SafetensorsTensor]:
    """The tensors of one safetensors file, in header order. Raises CheckpointError when the file is damaged."""
    from safetensors import SafetensorError, safe_open

    refuse_pointer(path)
    try:
        with safe_open(path, framework="np"):
            pass
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length), object_pairs_hook=_unique)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"not a whole safetensors file ({error})", where=path, fix="it is truncated or damaged: download it again"
        ) from None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", where=path) from None

    tensors = []
    for name, info in header.items():
        if name == "__metadata__":
            continue
        if info["dtype"] not in DTYPES:
            raise CheckpointError(
                "type is not supported",
                where=f"{path}: {name}",
                expected="F32, F16 or BF16",
                found=info["dtype"],
                fix="tsconv converts unquantized checkpoints",
            )
        start = 8 + length + info["data_offsets"][0]
        tensors.append(SafetensorsTensor(name, info["dtype"], tuple(info["shape"]), path, start))
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name occurs twice in the header")
    return names


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("damaged index", where=index, expected="an object weight_map", fix="download it again")
    for name, file in weight_map.items():
        # A plain file name: the index must not lead out of the checkpoint's folder.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"bad shard of {name}", where=index, expected="NAME.safetensors", found=repr(file))
    return weight_map


def _nothing_to_read(directory: Path) -> CheckpointError:
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    if any(SHARD.fullmatch(file) for file in files):
        return CheckpointError(f"shards without {INDEX}", where=directory, fix="download the index too")
    if ADAPTER in files:
        return CheckpointError("an adapter (PEFT), not a model", where=directory / ADAPTER, fix=MERGE)
    if files:
        return CheckpointError(
            "weights of another name",
            where=directory,
            expected=f"{SINGLE}, or {INDEX} and its shards",
            found=", ".join(files[:3]),
            fix=f"if one of them is the whole model, call it {SINGLE}",
        )
    if any(path for pattern in PYTORCH_PATTERNS for path in directory.glob(pattern)):
        return CheckpointError(
            "only PyTorch .bin weights here",
            where=directory,
            expected="safetensors",
            fix="load the model with transformers and write it again with save_pretrained(), or take a --revision"
            " of the repository that has safetensors",
        )
    return CheckpointError("no weights here", where=directory, expected=f"{INDEX} or {SINGLE}")
