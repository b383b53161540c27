"""Parquet files with the columns of HuggingFaceFW/fineweb."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("id", pa.string()),
        ("dump", pa.string()),
        ("url", pa.string()),
        ("date", pa.string()),
        ("file_path", pa.string()),
        ("language", pa.string()),
        ("language_score", pa.float64()),
        ("token_count", pa.int64()),
    ]
)


def texts(n: int, what: str = "document") -> list[str]:
    return [f"This is {what} {i}.\nIt says {i * i} and {i**3}, and little else." for i in range(n)]


def write(path: Path, documents: Sequence[str | None], rows: int, **options: object) -> Path:
    """Writes `documents` to `path`, `rows` of them to a row group; `options` are pyarrow.parquet.write_table's."""
    n = len(documents)
    columns = {
        "text": documents,
        "id": [f"<urn:uuid:{i:032x}>" for i in range(n)],
        "dump": ["CC-MAIN-2013-20"] * n,
        "url": [f"http://example.org/{i}" for i in range(n)],
        "date": ["2013-05-18T05:48:54Z"] * n,
        "file_path": ["s3://commoncrawl/crawl-data/x.warc.gz"] * n,
        "language": ["en"] * n,
        "language_score": [0.9] * n,
        "token_count": [len(d or "") // 4 for d in documents],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=SCHEMA), path, row_group_size=rows, **options)
    return path


def damage(path: Path, group: int) -> None:
    """Overwrites bytes within the pages of the text of one row group."""
    with pq.ParquetFile(path) as file:
        column = file.metadata.row_group(group).column(0)
    data = bytearray(path.read_bytes())
    start = (column.dictionary_page_offset or column.data_page_offset) + 40
    end = start + min(64, column.total_compressed_size - 80)
    data[start:end] = bytes(byte ^ 0xFF for byte in data[start:end])
    path.write_bytes(data)
