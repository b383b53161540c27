"""Checksums of a file's tensors, which the file carries: what storage or copying changed does not go unnoticed."""

from __future__ import annotations

import zlib
from collections.abc import Callable

from tsconv.errors import ModelFileError
from tsconv.format.header import Header, TensorEntry

KEY = "turbosparse.tensor_crc32"  # uint32 [tensors], in the order of the tensor table (docs/format.md)
PIECE = 16 << 20  # bytes read at once


def verify(header: Header, progress: Callable[[int, int], None] | None = None) -> int:
    """Reads all tensors of a file and compares them with the checksums in its header.

    Args:
        progress: called with (bytes read, bytes in all).

    Returns:
        how many tensors there are.

    Raises:
        ModelFileError: a tensor is not what was written, the file has no checksums, or it cannot be read.
    """
    stored = header.keys.get(KEY)
    if not isinstance(stored, list) or len(stored) != len(header.tensors):
        raise ModelFileError(
            "the file has no checksums of its tensors",
            where=header.path,
            fix="convert again: files of older versions have none",
        )
    total, done, damaged = sum(tensor.n_bytes for tensor in header.tensors), 0, []
    try:
        with open(header.path, "rb", buffering=0) as file:
            for tensor, expected in zip(header.tensors, stored, strict=True):
                found = 0
                file.seek(tensor.offset)
                for start in range(0, tensor.n_bytes, PIECE):
                    found = zlib.crc32(file.read(min(PIECE, tensor.n_bytes - start)), found)
                    done += min(PIECE, tensor.n_bytes - start)
                    if progress is not None:
                        progress(done, total)
                if found != expected:
                    damaged.append(tensor)
    except OSError as error:
        raise ModelFileError(f"cannot be read: {error.strerror}", where=header.path) from None
    if damaged:
        raise _damaged(header, damaged)
    return len(header.tensors)


def _damaged(header: Header, tensors: list[TensorEntry]) -> ModelFileError:
    more = "" if len(tensors) == 1 else f" and {len(tensors) - 1} more"
    return ModelFileError(
        f"{tensors[0].name}{more}: not the bytes that were written",
        where=header.path,
        fix="copy or download the file again, or convert again; the disk or the memory may be faulty",
    )
