"""The texts that perplexities are measured on: files, and two from the Hub, which a small server plays."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from support import fineweb, tiny
from support.dataset_hub import Hub, publish, serve
from tsconv.errors import HubError, TsconvError
from tsconv.eval import text
from tsconv.stats.text import hub_dataset

WIKITEXT = text.KNOWN["wikitext-2"]
# As the raw file has it: the line before and behind a heading holds a blank.
RAW = " \n = Robert <unk> = \n \n An actor , born 1979 – “ Herons ” . \n He wrote : \n \n = = Career = = \n \n Ωmega\n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # before another attempt
    with serve(monkeypatch) as handler:
        yield handler


@pytest.fixture
def wikitext(hub: type[Hub], tmp_path: Path) -> Path:
    """The dataset as it is published: a row for each line, "" for one that holds only a blank. Other configurations and
    splits hold other text."""
    folder = publish(hub, WIKITEXT.repo, tmp_path / "wikitext", "main", WIKITEXT.revision)
    hub.cards[WIKITEXT.repo] = {
        "configs": [
            {
                "config_name": config,
                "data_files": [{"split": s, "path": f"{config}/{s}-*"} for s in ("test", "train", "validation")],
            }
            for config in ("wikitext-103-raw-v1", "wikitext-2-raw-v1", "wikitext-2-v1")
        ]
    }
    rows = ["" if line == " \n" else line for line in RAW.splitlines(keepends=True)]
    for config in ("wikitext-103-raw-v1", "wikitext-2-raw-v1", "wikitext-2-v1"):
        (folder / config).mkdir(parents=True)
        for split in ("test", "train", "validation"):
            mine = rows if (config, split) == ("wikitext-2-raw-v1", "test") else [f"{config} {split}\n"]
            pq.write_table(pa.table({"text": mine}), folder / config / f"{split}-00000-of-00001.parquet")
    return folder


def test_wikitext_is_the_raw_file(wikitext: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte; and it is asked for once."""
    known = text.KNOWN | {"wikitext-2": WIKITEXT.__class__(**vars(WIKITEXT) | {"sha256": digest(RAW)})}
    monkeypatch.setattr(text, "KNOWN", known)
    assert text.read_text("wikitext-2") == text.Text(RAW.encode(), None)
    shutil.rmtree(wikitext)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.served.clear()
    assert text.read_text("wikitext-2") == text.Text(RAW.encode(), None)
    assert hub.served == []


def digest(raw: str) -> str:
    return hashlib.sha256(raw.encode()).hexdigest()


def test_another_text_than_the_published_one_is_said(wikitext: Path) -> None:
    found = text.read_text("wikitext-2")
    assert found.data == RAW.encode()
    assert found.note.startswith(f"wikitext-2 is not the text that published figures are of: {len(RAW.encode())} bytes")


def test_the_lengths_of_both_wikitexts_agree() -> None:
    """The dataset's card gives its size in Arrow's format: text, and four bytes for each of the 4358 rows. 2891 of them
    are not empty. With a blank and a newline in each of the others that is the length of wiki.test.raw."""
    assert 1305088 - 4 * 4358 + len(text.BLANK_LINE) * (4358 - 2891) == 1290590


def test_fineweb(hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole documents from the beginning, each ended by a newline, as long as there is room."""
    monkeypatch.setattr(text, "FINEWEB_BYTES", 300)
    documents = ["one\n", None, " \n", *fineweb.texts(9)]
    folder = publish(hub, hub_dataset.FINEWEB, tmp_path / "fineweb", "main", hub_dataset.FINEWEB_REVISION)
    path = "sample/10BT/{}_00000.parquet"
    hub.cards[hub_dataset.FINEWEB] = {
        "configs": [{"config_name": "sample-10BT", "data_files": [{"split": "train", "path": "sample/10BT/*"}]}]
    }
    fineweb.write(folder / path.format("000"), documents, 4)
    fineweb.write(folder / path.format("001"), ["never"], 4)
    found = text.read_text("fineweb")
    kept = "one\n" + "".join(f"{t}\n" for t in fineweb.texts(6))
    assert found == text.Text(kept.encode(), None)
    assert 300 <= len(found.data) < 300 + len(fineweb.texts(6)[-1])


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wikitext-2").write_bytes(b"\xff mine")
    assert text.read_text("wikitext-2") == text.Text(b"\xff mine", None)
    with pytest.raises(TsconvError, match=r"nothing: cannot be read .* a file, or one of wikitext-2, fineweb"):
        text.read_text("nothing")


def test_a_split_that_is_not_there(hub: type[Hub], tmp_path: Path) -> None:
    """The training split, which everything is where nothing is named, does not stand in for another one."""
    publish(hub, WIKITEXT.repo, tmp_path / "w", "main", WIKITEXT.revision)
    fineweb.write(tmp_path / "w" / WIKITEXT.config / "all.parquet", ["text"], 1)
    with pytest.raises(HubError, match="no Parquet files of configuration 'wikitext-2-raw-v1'; download the text"):
        text.read_text("wikitext-2")


def test_network_that_fails(wikitext: Path, hub: type[Hub], tmp_path: Path) -> None:
    hub.down_after = 0
    with pytest.raises(HubError, match=r"Salesforce/wikitext.*the network failed at .*; download the text where"):
        text.read_text("wikitext-2")
    assert not (tmp_path / "cache").exists()


def test_no_network(silent: str, tmp_path: Path) -> None:
    """One line of the command says so."""
    environment = {"HF_ENDPOINT": silent, "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    line = tiny.error_line(tiny.run("eval", "ppl", "-m", tiny.converted(), "-f", "wikitext-2", env=environment))
    assert "Salesforce/wikitext" in line and "download the text where there is a network, and name the file" in line
    assert "\n" not in line
    environment["HF_HUB_OFFLINE"] = "1"
    line = tiny.error_line(tiny.run("eval", "ppl", "-m", tiny.converted(), "-f", "fineweb", env=environment))
    assert "offline (HF_HUB_OFFLINE)" in line and "name the file" in line


def test_by_name_on_the_command_line(wikitext: Path, hub: type[Hub], tmp_path: Path) -> None:
    """As the file of the same text."""
    (tmp_path / "raw").write_text(RAW)
    found, expected = (
        tiny.run("eval", "ppl", "-m", tiny.converted(), "--text", name, "-c", "16", "-t", "1")
        for name in ("wikitext-2", tmp_path / "raw")
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split(b"neurons")[0] == expected.stdout.split(b"neurons")[0] != b""
    assert found.stderr.startswith(b"note: wikitext-2 is not the text that published figures are of")
    line = tiny.error_line(tiny.run("eval", "ppl", "-m", tiny.converted(), "-f", "wikitext-3"))
    assert "'wikitext-3' is neither a file nor one of wikitext-2, fineweb." in line
