"""Writing GGUF files as a stream: all or nothing, and never a half-written file under the final name.

gguf-py writes the header, keys and tensor table; tensor data follows slab by slab. Files grow as NAME.gguf.part and are
renamed when all of them are whole and on the disk. Any failure, Ctrl-C or SIGTERM removes the .part files. Those that a
crash left are written over. Who holds the lock of a .part file is the only one that writes and renames it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

import gguf
import numpy as np
from gguf import GGUFValueType

from tsconv.errors import ModelFileError, OutputError
from tsconv.format import checksums
from tsconv.format.header import read_header
from tsconv.signals import signals_wait

# Room for keys and the tensor table beyond the tensor data in the check for free space.
HEADER_ROOM = 16 << 20

# Tensor data is written in pieces of so many bytes, at multiples of it: where the file system has large folios (XFS,
# ext4 from Linux 6.16 on), the page cache then holds the file in huge pages, and so does a mapping of it. Random rows
# of a mapped model are read faster so (docs/notes/2026-11-28-pages-and-bundles.md).
HUGE_PAGE = 2 << 20

# How long a small file waits for another process that is writing the same one.
WAIT_SECONDS = 10.0


class StreamedFile:
    """One GGUF file being written. Fill `header`, `declare` every tensor, `begin`, then `write` their data in order.

    `path` is the final name; data goes to `part` until OutputFiles renames it.
    """

    def __init__(self, path: Path, arch: str) -> None:
        self.path = path
        self.part = _part_of(path)
        self.header = gguf.GGUFWriter(None, arch)
        self._sizes: list[int] = []
        self._tensor, self._done, self._crc = 0, 0, 0
        self._crcs: list[int] = []  # of the tensors that are written
        self._lock: int | None = None  # file descriptor of .part while it is ours

    @property
    def data_bytes(self) -> int:
        """Bytes of all declared tensors with their padding."""
        return sum(gguf.GGUFWriter.ggml_pad(size, self.header.data_alignment) for size in self._sizes)

    def declare(self, name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, nbytes: int) -> None:
        """Adds a tensor of `nbytes` bytes to the table; `shape` is slowest dimension first."""
        self.header.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
        self._sizes.append(nbytes)

    def begin(self) -> None:
        """Creates the .part file, locks it against other processes, and writes everything before the tensor data."""
        with _reported(self.part):
            with signals_wait():  # between the file's creation and the note that it is ours
                self._lock = lock(self.part)
            # The last key: its values are at the end of the keys, and are filled in when they are known.
            if self._sizes:
                nothing = [0] * len(self._sizes)
                self.header.add_key_value(checksums.KEY, nothing, GGUFValueType.ARRAY, GGUFValueType.UINT32)
            self.header.write_header_to_file(self.part)
            self.header.write_kv_data_to_file()
            assert self.header.fout is not None
            self._file = self.header.fout[0]
            self._keys_end = self._file.tell()
            self.header.write_ti_data_to_file()
            self.header.write_padding(self._file, self._file.tell())
            self._file.flush()
            self._written = self._file.tell()
            self._waiting = bytearray()

    def write(self, data: np.ndarray) -> None:
        """Appends contiguous `data` to the current tensor, which it must not overfill."""
        self._done += data.nbytes
        size = self._sizes[self._tensor]
        if self._done > size:
            raise ValueError(f"tensor {self._tensor} of {self.path.name} has {size} bytes, got {self._done}")
        with _reported(self.part):
            raw = data.data.cast("B")
            self._crc = zlib.crc32(raw, self._crc)
            self._append(raw)
            if self._done == size:
                self._crcs.append(self._crc)
                self._append(memoryview(bytes(gguf.GGUFWriter.ggml_pad(size, self.header.data_alignment) - size)))
                self._tensor, self._done, self._crc = self._tensor + 1, 0, 0

    def write_on(self, data: np.ndarray) -> None:
        """As `write`, for contiguous bytes (uint8) that may go on in the tensors behind the current one."""
        data = data.reshape(-1)
        while len(data):
            room = self._sizes[self._tensor] - self._done
            self.write(data[:room])
            data = data[room:]

    def _append(self, data: memoryview) -> None:
        while data:
            room = HUGE_PAGE - (self._written + len(self._waiting)) % HUGE_PAGE
            if not self._waiting and len(data) >= room:
                n = room + (len(data) - room) // HUGE_PAGE * HUGE_PAGE
                self._write_out(data[:n])
            else:
                n = min(room, len(data))
                self._waiting += data[:n]
                if n == room:
                    self._flush()
            data = data[n:]

    def _flush(self) -> None:
        self._write_out(memoryview(self._waiting))
        self._waiting = bytearray()

    def _write_out(self, data: memoryview) -> None:
        while data:
            n = os.write(self._file.fileno(), data)
            self._written += n
            data = data[n:]

    def finish(self) -> int:
        """Flushes to the disk and closes. Returns the file's size in bytes."""
        if self._tensor != len(self._sizes):
            raise ValueError(f"{self.path.name}: {self._tensor} of {len(self._sizes)} tensors were written")
        with _reported(self.part):
            self._flush()
            crcs = np.array(self._crcs, "<u4").tobytes()
            with open(self.part, "r+b") as keys:
                keys.seek(self._keys_end - len(crcs))
                keys.write(crcs)
            os.fsync(self._file.fileno())
            # What is written while the input fills the page cache is kept in small pages (a third of a 7B model in huge
            # ones, and its FFNs 6 % slower). The first load reads it again, in huge pages (native: mapping.c).
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._file.close()
        return self._written

    def release(self) -> None:
        """Gives the .part file up: it was renamed or removed."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def discard(self) -> None:
        """Removes the .part file if it is ours; safe at any time."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self.part.unlink()
            self.release()
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self.header.close()


class OutputFiles:
    """The files of one conversion, as a context manager: `commit` renames all of them, leaving without it removes all.

    Two files cannot be renamed at once. What holds at every moment, whenever the process or the machine stops: the old
    files are all in place, or all new ones are on the disk, whole and under their final names but for the model, which
    may still be NAME.gguf.part beside its sidecar, or, where it has none, beside an old model whose sidecar is gone
    already. `pair_id` keeps readers from taking the old model for the sidecar's own, and the next OutputFiles of these
    names renames the model before it does anything else.

    Args:
        files: what will be written; the model first, then its sidecar.
        obsolete: an older output that does not belong beside the new ones; treated as existing, removed by `commit`.
        force: replace what exists.

    Raises:
        OutputError: an output exists without `force`, or its folder is missing, not writable or too full.
    """

    def __init__(self, files: list[StreamedFile], obsolete: list[Path], force: bool) -> None:
        self.files, self.obsolete, self.force = files, obsolete, force
        for sidecar in self._paths()[1:]:
            _end_cut_short_commit(files[0], sidecar)
        self._check()

    def __enter__(self) -> Self:
        folder = self.files[0].path.parent
        needed, free = sum(file.data_bytes + HEADER_ROOM for file in self.files), shutil.disk_usage(folder).free
        if needed > free:
            raise OutputError(
                "not enough room for the output",
                where=folder,
                expected=f"{needed:,} bytes free",
                found=f"{free:,}",
                fix="free some, or write to another folder",
            )
        return self

    def commit(self) -> list[int]:
        """Finishes and renames all files. Returns their sizes in bytes, in order.

        Raises:
            OutputError: an output came to exist meanwhile and there is no `force`, or one cannot be renamed. Nothing is
                replaced then, unless it is the model that cannot be renamed: it stays as NAME.gguf.part.
        """
        sizes = [file.finish() for file in self.files]
        with signals_wait():
            self._check()
            model, *others = self.files
            for file in others:
                _rename(file.part, file.path)
            gone = [path for path in self.obsolete if _remove(path)]  # they belong to the model that is replaced
            try:
                _rename(model.part, model.path)
            except OutputError as error:
                if others or gone:
                    model.release()  # what belonged to the old model is not there any more: all would be lost
                    raise OutputError(f"{error}; the new model is {model.part}") from None
                raise
            for file in self.files:
                file.release()
        return sizes

    def __exit__(self, *_: object) -> None:
        for file in self.files:
            file.discard()

    def _paths(self) -> list[Path]:
        return [*(file.path for file in self.files), *self.obsolete]

    def _check(self) -> None:
        for path in self._paths():
            check_output(path, self.force)


def _end_cut_short_commit(model: StreamedFile, sidecar: Path) -> None:
    """Renames the model of a commit that was cut short when only the sidecar had been renamed, or removed."""
    if not _is_cut_short(model, sidecar):
        return
    try:
        fd = lock(model.part, create=False)
    except (OutputError, FileNotFoundError):
        return  # that commit is under way
    try:
        if _is_cut_short(model, sidecar):
            _rename(model.part, model.path)
    finally:
        os.close(fd)


def _is_cut_short(model: StreamedFile, sidecar: Path) -> bool:
    pair_id, kind = _pair_id(model.part), "turbosparse.predictor.kind"
    if pair_id is None or pair_id == _pair_id(model.path):
        return False
    if sidecar.exists():
        return pair_id == _pair_id(sidecar)
    return _key(model.part, kind) == "none" and _key(model.path, kind) not in (None, "none")


def _pair_id(path: Path) -> object:
    return _key(path, "turbosparse.pair_id")


def _key(path: Path, key: str) -> object:
    """A key of a whole file; None when there is no such file or it is something else."""
    try:
        return read_header(path).keys.get(key) if path.exists() else None
    except (ModelFileError, OSError):
        return None


def _remove(path: Path) -> bool:
    """Whether there was such a file."""
    with _reported(path):
        try:
            path.unlink()
        except FileNotFoundError:
            return False
    return True


def _part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def lock(part: Path, wait_seconds: float = 0.0, create: bool = True) -> int:
    """Opens a .part file, which is made when it is missing, and locks it. Returns the descriptor that holds the lock.

    The file is still there by this name: its last owner may have renamed or removed it between the two steps, and then
    another process can make and lock a new one.

    Raises:
        OutputError: another process holds the lock, and does so for `wait_seconds`.
        OSError: the file cannot be made, or is missing and must not be made.
    """
    deadline = time.monotonic() + wait_seconds
    while True:
        fd = os.open(part, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(part)):
                return fd
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(fd)
                raise OutputError(
                    "another process is writing this output",
                    where=part,
                    fix="wait for it to end, or choose another name",
                ) from None
            time.sleep(0.02)
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _rename(part: Path, path: Path) -> None:
    """Renames a file, and makes sure that what comes after this is on the disk only if this is."""
    with _reported(path):
        os.replace(part, path)
    with contextlib.suppress(OSError):  # a folder that cannot be read; a file system without such a thing
        fd = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def refuse_inputs(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raises OutputError when an output is one of the inputs, which --force would otherwise replace."""
    inputs = [path for path in inputs if path.exists()]
    for output in outputs:
        if output.exists() and any(output.samefile(path) for path in inputs):
            raise OutputError("the output would replace an input", where=output, fix="choose another --outfile")


def check_output(path: Path, force: bool) -> None:
    """Refuses an output before any work is done for it.

    Raises:
        OutputError: it exists without `force` or is no file, or its folder is missing or not writable.
    """
    with _reported(path):  # a name that is too long
        if path.is_dir():
            raise OutputError("output is a directory", where=path, fix="name a file")
        if path.exists() and not path.is_file():
            raise OutputError("output is not a file that could be replaced", where=path, fix="choose another name")
        if os.path.lexists(path) and not force:
            raise OutputError("output exists", where=path, fix="choose another name, or --force to replace it")
        if not path.parent.is_dir():
            raise OutputError("folder of the output does not exist", where=path.parent, fix="make it, or name another")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise OutputError("folder of the output is not writable", where=path.parent)


def write_file(path: Path, data: bytes, force: bool) -> None:
    """Writes a small file, all or nothing, after any other process that is writing it.

    Raises:
        OutputError: see `check_output`; or it cannot be written.
    """
    check_output(path, force)
    part = _part_of(path)
    with _reported(path):
        fd = lock(part, WAIT_SECONDS)
        try:
            check_output(path, force)
            os.ftruncate(fd, 0)
            write_synced(fd, data)
            _rename(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        finally:
            os.close(fd)


def write_synced(file: Path | int, data: bytes) -> None:
    """Writes a whole file (an int: an open, empty one, which stays open) down to the disk. Raises OSError."""
    with open(file, "wb", closefd=isinstance(file, Path)) as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[None]:
    """An operating system's error while writing becomes an OutputError."""
    try:
        yield
    except OSError as error:
        fix = "free some room, or write elsewhere" if error.errno in _FULL else None
        raise OutputError(f"cannot be written: {error.strerror}", where=path, fix=fix) from None


_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
