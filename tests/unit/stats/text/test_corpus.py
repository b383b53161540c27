"""Calibration text from files: what is read, in which order, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support import fineweb
from tsconv.errors import TsconvError
from tsconv.stats.text import corpus as corpus_module
from tsconv.stats.text import text_files
from tsconv.stats.text.builtin import FOLDER
from tsconv.stats.text.corpus import open_corpus
from tsconv.stats.text.parquet import ParquetFile

TEXTS = fineweb.texts(100)


def jsonl(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def refused(calib: Path | str, *parts: object, **options: object) -> None:
    with pytest.raises(TsconvError) as caught:
        list(open_corpus(str(calib), **options))
    for part in parts:
        assert str(part) in str(caught.value), caught.value


# ---- Parquet


def test_parquet_of_fineweb(tmp_path: Path) -> None:
    path = fineweb.write(tmp_path / "a.parquet", TEXTS, 10)
    corpus = open_corpus(str(path))
    assert list(corpus) == TEXTS
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert (corpus.dataset, corpus.config, corpus.revision) == ("a.parquet", "", f"sha256:{digest}")
    assert (corpus.notes, corpus.incomplete) == ([], None)
    assert list(open_corpus(str(path), text_field="url"))[3] == "http://example.org/3"


def test_broken_row_groups_are_skipped_and_named(tmp_path: Path) -> None:
    path = fineweb.write(tmp_path / "a.parquet", TEXTS, 10)
    fineweb.damage(path, 3)
    fineweb.damage(path, 7)
    corpus = open_corpus(str(path))
    assert list(corpus) == TEXTS[:30] + TEXTS[40:70] + TEXTS[80:]
    assert [note.split(":")[:2] for note in corpus.notes] == [
        ["skipped, broken", " a.parquet, row group 3"],
        ["skipped, broken", " a.parquet, row group 7"],
    ]
    assert list(corpus) == TEXTS[:30] + TEXTS[40:70] + TEXTS[80:]
    assert len(corpus.notes) == 2
    assert sorted(open_corpus(str(path), seed=1)) == sorted(TEXTS[:30] + TEXTS[40:70] + TEXTS[80:])


def test_nothing_but_broken_row_groups(tmp_path: Path) -> None:
    path = fineweb.write(tmp_path / "a.parquet", TEXTS[:30], 10)
    for group in range(3):
        fineweb.damage(path, group)
    refused(path, "a.parquet", "nothing in it can be read", "row group 0", "2 more")


def test_a_file_that_is_not_parquet_is_skipped_in_a_folder(tmp_path: Path) -> None:
    fineweb.write(tmp_path / "b.parquet", TEXTS, 10)
    whole = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    corpus = open_corpus(str(tmp_path))
    assert list(corpus) == TEXTS
    assert len(corpus.notes) == 1
    assert "a.parquet: not readable as Parquet" in corpus.notes[0]
    refused(tmp_path / "a.parquet", "a.parquet", "not readable as Parquet")


def test_empty_and_null_texts_are_counted(tmp_path: Path) -> None:
    path = fineweb.write(tmp_path / "a.parquet", ["one", "", None, " \n\t", "two", None], 4)
    corpus = open_corpus(str(path))
    assert list(corpus) == ["one", "two"]
    assert corpus.notes == ["skipped 4 empty texts"]
    refused(fineweb.write(tmp_path / "b.parquet", ["", None], 4), "b.parquet", "no text", "2 empty")
    refused(fineweb.write(tmp_path / "c.parquet", [], 4), "c.parquet", "no text")


def test_column_missing_or_not_of_strings(tmp_path: Path) -> None:
    path = fineweb.write(tmp_path / "a.parquet", TEXTS, 10)
    names = ", ".join(fineweb.SCHEMA.names)
    refused(path, "a.parquet", "no column 'content'", names, "--text-field", text_field="content")
    refused(path, "a.parquet", "token_count", "expected strings", "int64", text_field="token_count")


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_other_kinds_of_strings(kind: pa.DataType, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array(TEXTS).cast(kind)}), tmp_path / "a.parquet")
    assert list(open_corpus(str(tmp_path / "a.parquet"))) == TEXTS


def test_a_large_row_group_is_decoded_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fineweb.write(tmp_path / "a.parquet", TEXTS, 100)
    monkeypatch.setattr("tsconv.stats.text.parquet.BATCH_BYTES", 1000)
    parts = []
    batches = ParquetFile._batches
    monkeypatch.setattr(
        ParquetFile, "_batches", lambda *a: (parts.append(len(texts)) or texts for texts in batches(*a))
    )
    assert list(open_corpus(str(path))) == TEXTS
    assert len(parts) > 4
    assert max(parts) < 25
    assert sorted(open_corpus(str(path), seed=1)) == sorted(TEXTS)


# ---- JSON Lines


def test_json_lines(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"id": i, "text": text} for i, text in enumerate(TEXTS)])
    assert list(open_corpus(str(path))) == TEXTS
    path = jsonl(tmp_path / "b.jsonl", [{"body": "one"}, {"body": None}, {"body": ""}, {"body": "two\ud800"}])
    path.write_text("\n" + path.read_text() + "\r\n" + '{"body": "last"}')
    corpus = open_corpus(str(path), text_field="body")
    assert list(corpus) == ["one", "two\ud800", "last"]
    assert corpus.notes == ["skipped 2 empty texts"]


def test_json_lines_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [0, 5, 300, 63, 64, 65, 1, 1000, 2, 40] * 5
    documents = [f"{i}:" + "x" * length for i, length in enumerate(lengths)]
    path = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in documents])
    for block in (1, 16, 64, 100, 10**6):
        monkeypatch.setattr(text_files, "JSON_BLOCK", block)
        assert list(open_corpus(str(path))) == documents
        assert sorted(open_corpus(str(path), seed=5)) == sorted(documents)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("{'text': 1}", ["not JSON"]),
        ('{"text": "cut', ["not JSON"]),
        ("[" * 100_000, ["not JSON"]),
        ('["text"]', ["expected a JSON object", "list"]),
        ('{"body": "x", "id": 3}', ["no field 'text'", "body, id", "--text-field"]),
        ('{"text": 5}', ["field 'text'", "expected a string", "int"]),
    ],
)
@pytest.mark.parametrize("block", [64, 1 << 20])
def test_bad_line(line: str, parts: list[str], block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "JSON_BLOCK", block)
    path = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS[:10]])
    path.write_text(path.read_text() + "\n" + line + "\n")
    refused(path, "a.jsonl, line 12:", *parts)
    refused(path, "a.jsonl, line 12:", *parts, seed=2)


def test_endless_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_LINE", 1 << 20)
    path = jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"text": "x" * (1 << 20)}])
    refused(path, "a.jsonl", "line at byte 14 is too long", "1 MiB")


# ---- plain text


def test_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfOne.\r\n\r\nTwo, \xc3\xa9t\xc3\xa9.\n")
    corpus = open_corpus(str(tmp_path / "a.txt"))
    assert list(corpus) == ["One.\n\nTwo, été.\n"]
    assert corpus.notes == []


@pytest.mark.parametrize("mark", ["\n\n", "\n", " ", ""])
def test_long_text_is_cut_between_words(mark: str, tmp_path: Path) -> None:
    text = mark.join("überflüssig" + "x" * (i % 7) for i in range(40_000))
    (tmp_path / "a.txt").write_text(text)
    pieces = list(open_corpus(str(tmp_path / "a.txt")))
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert max(len(piece.encode()) for piece in pieces) < 1.5 * text_files.TEXT_PIECE
    assert all(piece.endswith(mark) for piece in pieces[:-1])
    shuffled = list(open_corpus(str(tmp_path / "a.txt"), seed=1))
    assert sorted(shuffled) == sorted(pieces)
    assert shuffled != pieces


def test_binary_file_given_as_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\n" * 20_000 + b"not\0fine")
    refused(tmp_path / "a.txt", "a.txt", "NUL at byte 100003")
    (tmp_path / "b.txt").write_bytes("Größe und Maß\n".encode("latin-1"))
    refused(tmp_path / "b.txt", "b.txt", "not a UTF-8", "0xf6 at byte 2")
    (tmp_path / "c.txt").write_bytes(b"x" * 70_000 + b"\n" + bytes(range(128, 256)))
    refused(tmp_path / "c.txt", "c.txt", "0x80 at byte 70001")
    (tmp_path / "d.txt").write_text("text\n", "utf-16")
    refused(tmp_path / "d.txt", "d.txt", "NUL at byte 3")


def test_a_stray_byte_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"word " * 1000 + b"caf\xe9 " + b"word " * 1000)
    corpus = open_corpus(str(tmp_path / "a.txt"))
    assert "caf\ufffd word" in next(iter(corpus))
    assert corpus.notes == ["replaced 1 invalid UTF-8 sequence"]


# ---- folders, names


def test_name_that_no_file_can_have() -> None:
    refused("x" * 300, "cannot be read", "File name too long")
    refused("a\0", "no such text")


def test_folder(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    fineweb.write(folder / "b" / "one.parquet", TEXTS[:5], 2)
    jsonl(folder / "c.JSONL", [{"text": "json"}])
    (folder / "a.txt").write_text("plain")
    (folder / "notes.md").write_text("ignored")
    (folder / "b" / "model.bin").write_bytes(b"\0")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.txt").write_text("hidden")
    corpus = open_corpus(str(folder))
    assert list(corpus) == ["plain", *TEXTS[:5], "json"]
    assert corpus.dataset == "mine"
    assert corpus.notes == ["ignored 2 files that are not .txt, .jsonl or .parquet"]
    before = corpus.revision
    assert before.startswith("sha256:")
    (folder / "a.txt").rename(folder / "d.txt")
    assert open_corpus(str(folder)).revision != before


def test_nothing_to_read(tmp_path: Path) -> None:
    refused(tmp_path, "no text in this folder", ".jsonl")
    (tmp_path / "a.txt").write_text(" \n\n")
    refused(tmp_path, "no text to calibrate on", "1 empty")
    (tmp_path / "a.txt").write_text("")
    refused(tmp_path / "a.txt", "a.txt", "no text to calibrate on")


@pytest.mark.parametrize("calib", ["", "nothing", "./nothing/here", "/no/such/file", "no/such.txt", "a/b/c", "a b/c"])
def test_no_such_text(calib: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(calib, calib, "builtin, fineweb", ".parquet", "OWNER/NAME")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.zst", "a.json", "a.csv"])
def test_kinds_that_are_not_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    refused(tmp_path / name, name, "files are not read", Path(name).suffix)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_file_without_permission(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("x")
    (tmp_path / name).chmod(0)
    refused(tmp_path / name, name, "cannot be read", "Permission denied")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_file_that_goes_away(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("x")
    corpus = open_corpus(str(tmp_path / name))
    (tmp_path / name).unlink()
    with pytest.raises(TsconvError, match=f"{name}: cannot be read .No such file"):
        list(corpus)


def test_a_pipe_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    refused(tmp_path / "a.txt", "not a file")


def test_a_folder_wins_over_a_dataset_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("fineweb", "HuggingFaceFW/fineweb"):
        Path(name).mkdir(parents=True)
        Path(name, "a.txt").write_text(name)
        assert list(open_corpus(name)) == [name]


def test_large_files_have_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x" * 11)
    monkeypatch.setattr(corpus_module, "HASHED_BYTES", 10)
    assert open_corpus(str(tmp_path / "a.txt")).revision == ""


# ---- seeds


def test_seeds(tmp_path: Path) -> None:
    documents = [f"{i}" for i in range(300)]
    for k in range(3):
        fineweb.write(tmp_path / "one" / f"{k}.parquet", documents[k * 60 : k * 60 + 60], 20)
    jsonl(tmp_path / "one" / "x.jsonl", [{"text": text} for text in documents[180:]])
    (tmp_path / "two").symlink_to("one")
    assert open_corpus(str(tmp_path / "two")).dataset == "two"
    unseeded = list(open_corpus(str(tmp_path / "one")))
    assert unseeded == documents
    orders = [list(open_corpus(str(tmp_path / folder), seed=seed)) for folder in ("one", "two") for seed in (0, 1, 2)]
    assert orders[:3] == orders[3:]
    assert all(sorted(order) == sorted(documents) for order in orders)
    assert len({tuple(order) for order in [documents, *orders]}) == 4
    assert all([text for text in order if text in documents[:20]] != documents[:20] for order in orders)


def test_order_of_a_seed_is_fixed(tmp_path: Path) -> None:
    """Statistics name the seed: it has to mean the same text on another machine, and after an update."""
    path = fineweb.write(tmp_path / "a.parquet", [str(i) for i in range(12)], 4)
    assert " ".join(open_corpus(str(path), seed=7)) == "3 1 2 0 9 8 11 10 6 4 5 7"


# ---- the text that ships


def test_builtin() -> None:
    corpus = open_corpus("builtin")
    documents = list(corpus)
    assert (corpus.dataset, corpus.config, corpus.revision, corpus.notes) == ("builtin", "", "1", [])
    files = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.txt")}
    assert sorted("".join(documents)) == sorted("".join(files.values()))
    readme = (FOLDER / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in files)
    assert 150_000 < sum(len(text.encode()) for text in files.values()) < 400_000
    first = [next(name for name, text in files.items() if document in text) for document in documents]
    assert set(first[: len(first) // 4]) == set(files)
    assert sorted(open_corpus("builtin", seed=1)) == sorted(documents)
    assert list(open_corpus("builtin", seed=1)) != documents


def test_builtin_text_has_a_version() -> None:
    """Who changes the text raises BUILTIN_VERSION: statistics name it."""
    digest = hashlib.sha256()
    for path in sorted(FOLDER.glob("*.txt")):
        digest.update(path.read_bytes())
    assert digest.hexdigest()[:16] == "0a9f20c06fc6662c"
