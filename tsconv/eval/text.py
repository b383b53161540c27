"""The texts that perplexities are measured on: a file, or one of two on the Hugging Face Hub by its name.

wikitext-2 is the raw test text, byte for byte the wiki.test.raw that llama.cpp's figures are of. On the Hub it is a
dataset with a row for each line; a line that holds only a blank is "" there. fineweb is the beginning of the sample
that `tsconv profile --calib fineweb` counts on. What was downloaded is kept.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tsconv.cache import cache_folder
from tsconv.errors import HubError, OutputError, TsconvError
from tsconv.stats.text import hub_dataset
from tsconv.stats.text.documents import InterruptedReadError, Tally

OFFLINE = "download the text where there is a network, and name the file"
BLANK_LINE = " \n"  # of the raw text
FINEWEB_BYTES = 1 << 20
WIKITEXT_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"  # of wiki.test.raw


@dataclass(frozen=True)
class _Known:
    """A text on the Hub. `join` makes it of the rows; `sha256` is "" where there is no one text to compare with."""

    repo: str
    config: str
    revision: str
    split: str
    join: Callable[[Iterable[str | None]], bytes]
    sha256: str = ""


def _lines(rows: Iterable[str | None]) -> bytes:
    return "".join(row or BLANK_LINE for row in rows).encode()


def _beginning(rows: Iterable[str | None]) -> bytes:
    """Whole documents, each of them ended by a newline, until there are FINEWEB_BYTES."""
    text = bytearray()
    for row in rows:
        if row and row.strip():
            text += row.removesuffix("\n").encode() + b"\n"
        if len(text) >= FINEWEB_BYTES:
            break
    return bytes(text)


KNOWN = {
    "wikitext-2": _Known(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        "test",
        _lines,
        WIKITEXT_SHA256,
    ),
    "fineweb": _Known(
        hub_dataset.FINEWEB, hub_dataset.FINEWEB_CONFIG, hub_dataset.FINEWEB_REVISION, hub_dataset.TRAIN, _beginning
    ),
}


@dataclass(frozen=True)
class Text:
    """`note`: what the user should know of it, None when there is nothing."""

    data: bytes
    note: str | None = None


def read_text(name: str | Path) -> Text:
    """The text of a file, or of KNOWN. A file wins over a name.

    Raises:
        TsconvError: no such file, or it cannot be read.
        HubError: the Hub cannot be reached, or no longer has the text.
        OutputError: what was downloaded cannot be kept.
    """
    path = Path(name)
    known = KNOWN.get(str(name))
    if known is not None and not path.exists():
        return _kept(str(name), known)
    try:
        return Text(path.read_bytes())
    except OSError as error:
        expected = f"a file, or one of {', '.join(KNOWN)}"
        raise TsconvError(f"cannot be read ({error.strerror})", where=path, expected=expected) from None


def _kept(name: str, known: _Known) -> Text:
    path = cache_folder() / "texts" / f"{name}-{known.revision[:12]}.txt"
    if path.exists():
        data = path.read_bytes()
    else:
        data = known.join(_rows(known))
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(data)
            part.replace(path)
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", where=part) from None
    differs = known.sha256 and hashlib.sha256(data).hexdigest() != known.sha256
    note = f"{name} is not the text that published figures are of: {len(data)} bytes, {path}" if differs else None
    return Text(data, note)


def _rows(known: _Known) -> Iterator[str | None]:
    """The rows of the dataset, as they are read. Raises HubError."""
    found = hub_dataset.find(known.repo, known.config, known.revision, split=known.split, offline=OFFLINE)
    tally = Tally()
    try:
        for file in found.files:
            yield from file.documents(None, "text", tally)
            if tally.broken:
                raise HubError(f"damaged: {tally.broken[0]}", where=known.repo, fix=OFFLINE)
    except InterruptedReadError as error:
        raise HubError(f"the network failed at {error}", where=known.repo, fix=OFFLINE) from None
