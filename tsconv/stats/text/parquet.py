"""Parquet as calibration text, from any fsspec file system: one column, row group by row group."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from tsconv.errors import TsconvError
from tsconv.extras import require
from tsconv.stats.text.documents import InterruptedReadError, Tally, order

if TYPE_CHECKING:
    import fsspec
    import pyarrow.parquet as pq

# Bytes of text decoded, and with a seed shuffled, at a time: a whole row group of most datasets.
BATCH_BYTES = 1 << 25
# Bytes asked of the file at a time: a column is streamed, not read whole before its first page is decoded.
READ_BYTES = 1 << 20
ATTEMPTS = 4  # to read one batch over a network
FIRST_WAIT = 2.0  # seconds before the second attempt, doubled before each further one


class TransportError(Exception):
    """The file system failed to deliver bytes; Arrow hands it through unchanged, unlike an OSError of its own."""


class _Transport(io.RawIOBase):
    """A file whose failures to deliver are TransportErrors, whatever the client library behind it raises."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str) -> None:
        self._file: Any = None  # close() is called by the destructor too
        try:
            self._file = fs.open(path, "rb")
            self._size = self._file.size
        except Exception as error:
            raise TransportError(_reason(error)) from error

    def read(self, size: int = -1) -> bytes:
        try:
            at = self._file.tell()
            data = self._file.read(size)
        except Exception as error:
            raise TransportError(_reason(error)) from error
        wanted = min(size if size >= 0 else self._size, self._size - at)
        if len(data) < wanted:
            raise TransportError(f"{len(data)} of {wanted} bytes arrived")
        return data

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if self._file is not None and not self.closed:
            self._file.close()
        super().close()


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200]


class ParquetFile:
    """A column of strings. Only its bytes, and the footer's, are read.

    A row group that cannot be decoded is skipped and noted in the tally. Over a network a batch that does not arrive is
    asked for again, from its own beginning: no text is lost or given twice.

    Args:
        fs, path: where the file is.
        name: what it is called in messages and in the order of a seed.
        remote: `fs` is a network: try again, then raise InterruptedReadError. Locally a failure is a TsconvError.

    Raises:
        TsconvError: pyarrow is not installed.
    """

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, name: str, remote: bool) -> None:
        require("pyarrow", "reading Parquet")
        self.fs, self.path, self.name, self.remote = fs, path, name, remote
        self._file: pq.ParquetFile | None = None

    def documents(self, seed: int | None, column: str, tally: Tally) -> Iterator[str | None]:
        import pyarrow as pa

        try:
            try:
                groups = next(self._steadily(lambda: iter([self._opened(column).num_row_groups]), "footer"))
            except (pa.ArrowException, OSError) as error:
                tally.broken.append(f"{self.name}: not readable as Parquet ({_reason(error)})")
                return
            for group in order(groups, seed, self.name):
                given = 0
                batches = self._steadily(partial(self._batches, group, column), f"row group {group}")
                try:
                    for number, texts in enumerate(batches):
                        for i in order(len(texts), seed, self.name, group, number):
                            yield texts[i]
                        given += len(texts)
                except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                    after = f" after {given} of its texts" if given else ""
                    tally.broken.append(f"{self.name}, row group {group}{after}: {_reason(error)}")
        finally:
            self._close()

    def _steadily(self, start: Callable[[], Iterator[Any]], what: str) -> Iterator[Any]:
        """The items of start(), begun again behind the last item that came whenever the transport fails."""
        done, failures = 0, 0
        while True:
            try:
                for item in islice(start(), done, None):
                    yield item
                    done, failures = done + 1, 0
                return
            except TransportError as error:
                self._close()
                if not self.remote:
                    raise TsconvError(f"cannot be read ({error})", where=self.path) from None
                failures += 1
                if failures == ATTEMPTS:
                    raise InterruptedReadError(f"{self.name}, {what}: {error}") from None
                time.sleep(FIRST_WAIT * 2 ** (failures - 1))

    def _opened(self, column: str) -> pq.ParquetFile:
        import pyarrow.parquet as pq

        if self._file is None:
            transport = _Transport(self.fs, self.path)
            # pre_buffer would fetch the column of a whole row group before its first page is decoded.
            file = pq.ParquetFile(transport, buffer_size=READ_BYTES, pre_buffer=False, page_checksum_verification=True)
            self._check_column(file, column)
            self._file = file
        return self._file

    def _check_column(self, file: pq.ParquetFile, column: str) -> None:
        import pyarrow.types as t

        schema = file.schema_arrow
        fix = "name the column of the text with --text-field"
        if schema.names.count(column) != 1:
            found = ", ".join(schema.names)
            raise TsconvError(f"no column {column!r}", where=self.name, found=f"columns {found}", fix=fix)
        kind = schema.field(column).type
        plain = kind.value_type if t.is_dictionary(kind) else kind
        if not (t.is_string(plain) or t.is_large_string(plain)):
            raise TsconvError(f"column {column!r}", where=self.name, expected="strings", found=kind, fix=fix)

    def _batches(self, group: int, column: str) -> Iterator[list[str | None]]:
        file = self._opened(column)
        row_group = file.metadata.row_group(group)
        index = next(i for i in range(row_group.num_columns) if row_group.column(i).path_in_schema == column)
        n_bytes = max(1, row_group.column(index).total_uncompressed_size)
        rows = max(1, min(row_group.num_rows, row_group.num_rows * BATCH_BYTES // n_bytes))
        for batch in file.iter_batches(rows, row_groups=[group], columns=[column], use_threads=False):
            yield batch.column(0).to_pylist()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close(force=True)
            self._file = None
