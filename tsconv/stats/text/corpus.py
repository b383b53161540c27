"""--calib on the command line: the text that activations are counted on, as a lazy stream of documents."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tsconv.errors import HubError, TsconvError
from tsconv.format.keys import as_text
from tsconv.stats.text import hub_dataset
from tsconv.stats.text.builtin import BUILTIN_VERSION, BuiltinText
from tsconv.stats.text.documents import InterruptedReadError, Tally, TextSource, order
from tsconv.stats.text.text_files import JsonLines, TextFile, opened

POSSIBLE = (
    "builtin, fineweb, a file (.txt, .jsonl, .parquet) or a folder of them, "
    "or a dataset on the Hugging Face Hub as OWNER/NAME, OWNER/NAME:CONFIG or OWNER/NAME@REVISION"
)
TEXT_FIELD = "text"
HASHED_BYTES = 1 << 30  # local text up to this size has a revision: hashing more would take longer than it is worth

_HUB = re.compile(r"(fineweb|[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([^:@]+))?(?:@([^:@]+))?", re.ASCII)
_OTHER_SUFFIXES = {
    **dict.fromkeys((".gz", ".zst", ".bz2", ".xz", ".zip", ".7z", ".tar", ".tgz"), "unpack it first"),
    ".json": "write one record a line, as .jsonl",
    ".csv": "write one record a line, as .jsonl",
    ".arrow": "save it as .parquet",
}
_IN_FOLDERS = (".txt", ".jsonl", ".ndjson", ".parquet")


class Corpus:
    """Documents (str, never blank), read while they are taken. Iterating again begins again.

    Attributes:
        dataset: "builtin", the dataset's name on the Hub, or the name (not the path) of the local file or folder.
        config: the dataset's configuration, or "".
        revision: of a dataset, its commit; of the built-in text, its version; of local text, "sha256:" and 16 hex
            digits of its contents, or "" when it is larger than HASHED_BYTES.
        incomplete: why the last iteration gave fewer documents than the corpus has: where and how the network failed.
            None when it did not.
    """

    def __init__(
        self,
        files: Sequence[TextSource],
        *,
        dataset: str,
        config: str = "",
        revision: str = "",
        seed: int | None = None,
        text_field: str | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.dataset, self.config, self.revision, self.seed = dataset, config, revision, seed
        self.incomplete: str | None = None
        self._files, self._text_field = files, text_field or TEXT_FIELD
        self._notes, self._tally = list(notes), Tally()

    @property
    def notes(self) -> list[str]:
        """What the user should know of the text read so far: skipped row groups, empty texts, a stopped network, ..."""
        tally, notes = self._tally, list(self._notes)
        notes += [f"skipped, broken: {what}" for what in tally.broken]
        if tally.empty:
            notes.append(f"skipped {tally.empty} empty text{'s' if tally.empty > 1 else ''}")
        if tally.replaced:
            notes.append(f"replaced {tally.replaced} invalid UTF-8 sequence{'s' if tally.replaced > 1 else ''}")
        if self.incomplete is not None:
            notes.append(f"{self.incomplete}; the {tally.given} documents before it were read")
        return notes

    def __iter__(self) -> Iterator[str]:
        """
        Raises:
            TsconvError: a file cannot be read, is not what its name says, or lacks the field of the text; there is no
                text at all, or every part of it is broken.
            HubError: the network went away before the first document.
        """
        tally = self._tally = Tally()
        self.incomplete = None
        try:
            for i in order(len(self._files), self.seed, "files"):
                for text in self._files[i].documents(self.seed, self._text_field, tally):
                    if text is None or not text.strip():
                        tally.empty += 1
                        continue
                    tally.given += 1
                    yield text
        except InterruptedReadError as error:
            if not tally.given:
                what = f"the network failed at {error}"
                raise HubError(what, where=self.dataset, fix=hub_dataset.OFFLINE_WAYS) from None
            self.incomplete = f"the text ends early, the network failed at {error}"
            return
        if not tally.given and tally.broken:
            more = f", and {len(tally.broken) - 1} more" if len(tally.broken) > 1 else ""
            raise TsconvError(f"nothing in it can be read ({tally.broken[0]}{more})", where=self.dataset)
        if not tally.given:
            found = f"{tally.empty} empty" if tally.empty else "none"
            raise TsconvError("no text to calibrate on", where=self.dataset, expected="documents", found=found)


def open_corpus(calib: str, seed: int | None = None, text_field: str | None = None) -> Corpus:
    """The text that `calib` names. A file or folder wins over a dataset of the same name.

    Args:
        calib: "builtin": the text that ships with this package. "fineweb": hub_dataset.FINEWEB, pinned. A file:
            Parquet and JSON Lines by their suffix, anything else is plain text and one document, handed out in pieces.
            A folder: its .txt, .jsonl and .parquet files and those in folders below, sorted by name. OWNER/NAME, with
            :CONFIG and @REVISION: a dataset on the Hub, of which only what is read is fetched.
        seed: None for the order of the corpus. A number: files in random order, in each its row groups (pieces of plain
            text, blocks of JSON Lines), in each of them the documents; the same order on every machine.
        text_field: column or field that holds the text, "text" by default.

    Raises:
        TsconvError: nothing of that name, or a kind of file that is not read.
        HubError: the dataset does not exist, cannot be reached, or has no Parquet files.
    """
    if calib == "builtin":
        return Corpus([BuiltinText()], dataset="builtin", revision=BUILTIN_VERSION, seed=seed)
    path = Path(calib).expanduser()
    try:
        if calib and path.exists():
            return _local(path, seed, text_field)
    except OSError as error:
        raise TsconvError(f"cannot be read ({error.strerror or error})", where=path) from None
    match = _HUB.fullmatch(calib)
    if match is None or path.suffix.lower() in _IN_FOLDERS:
        raise TsconvError("no such text", where=calib or '""', expected=POSSIBLE)
    repo, config, revision = match.groups()
    if repo in ("fineweb", hub_dataset.FINEWEB):
        repo, config = hub_dataset.FINEWEB, config or hub_dataset.FINEWEB_CONFIG
        revision = revision or hub_dataset.FINEWEB_REVISION
    found = hub_dataset.find(repo, config, revision)
    return Corpus(
        found.files,
        dataset=found.repo,
        config=found.config,
        revision=found.revision,
        seed=seed,
        text_field=text_field,
        notes=found.notes,
    )


def _local(path: Path, seed: int | None, text_field: str | None) -> Corpus:
    # Not the name of what a link points to: in the Hub's cache that is a hash.
    name, notes = Path(os.path.abspath(path)).name, []
    if path.is_dir():
        everything = sorted(_walk(path), key=lambda p: p.relative_to(path).as_posix())
        paths = [p for p in everything if p.suffix.lower() in _IN_FOLDERS]
        ignored = len(everything) - len(paths)
        if ignored:
            notes.append(f"ignored {ignored} file{'s' if ignored > 1 else ''} that are not .txt, .jsonl or .parquet")
        if not paths:
            expected = "files ending in " + ", ".join(_IN_FOLDERS)
            raise TsconvError("no text in this folder", where=path, expected=expected, found=f"{ignored} others")
        files = [_reader(p, p.relative_to(path).as_posix()) for p in paths]
    else:
        paths, files = [path], [_reader(path, name)]
    revision = _fingerprint(paths, [file.name for file in files])
    return Corpus(files, dataset=as_text(name), revision=revision, seed=seed, text_field=text_field, notes=notes)


def _walk(folder: Path) -> Iterator[Path]:
    """All files below `folder`, but for hidden ones."""

    def refuse(error: OSError) -> None:
        raise TsconvError(f"cannot be read ({error.strerror})", where=error.filename)

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _reader(path: Path, name: str) -> TextSource:
    suffix = path.suffix.lower()
    if suffix in _OTHER_SUFFIXES:
        raise TsconvError(f"{suffix} files are not read", where=path, fix=_OTHER_SUFFIXES[suffix])
    if not path.is_file():
        raise TsconvError("not a file", where=path, expected=POSSIBLE)
    if suffix == ".parquet":
        from fsspec.implementations.local import LocalFileSystem

        from tsconv.stats.text.parquet import ParquetFile

        return ParquetFile(LocalFileSystem(), str(path), name, remote=False)
    kind: Callable[[Path, str], TextSource] = JsonLines if suffix in (".jsonl", ".ndjson") else TextFile
    return kind(path, name)


def _fingerprint(paths: Sequence[Path], names: Sequence[str]) -> str:
    """ "sha256:" and 16 hex digits: of a single file's contents; of several files' names and contents."""
    if sum(path.stat().st_size for path in paths) > HASHED_BYTES:
        return ""
    digests = []
    for path in paths:
        with opened(path) as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(paths) > 1:
        lines = "".join(f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True))
        digests = [hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()]
    return f"sha256:{digests[0][:16]}"
