"""Calibration text from the Hub: huggingface_hub and pyarrow against a small server that speaks the Hub's HTTP API."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from support import fineweb, tiny
from support.dataset_hub import COMMIT, Hub, publish, serve
from tsconv.commands import profile as profiling
from tsconv.errors import HubError, TsconvError
from tsconv.stats.text.corpus import open_corpus
from tsconv.stats.text.hub_dataset import FINEWEB_REVISION

CONVERTED = "fedcba9876543210fedcba9876543210fedcba98"
TEXTS = fineweb.texts(120)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waiting takes no time; how long it was asked for."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> Iterator[type[Hub]]:
    with serve(monkeypatch) as handler:
        yield handler


@pytest.fixture
def fineweb_files(hub: type[Hub], tmp_path: Path) -> list[Path]:
    """FineWeb as it is published, but for its size; TEXTS are the sample."""
    folder = publish(hub, "HuggingFaceFW/fineweb", tmp_path / "fineweb", "main", FINEWEB_REVISION)
    fineweb.write(folder / "data" / "CC-MAIN-2013-20" / "000_00000.parquet", fineweb.texts(10, "crawl"), 5)
    hub.cards["HuggingFaceFW/fineweb"] = {
        "license": "odc-by",
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": "data/*/*"}]},
            {"config_name": "sample-10BT", "data_files": [{"split": "train", "path": "sample/10BT/*"}]},
            {
                "config_name": "CC-MAIN-2013-20",
                "data_files": [{"split": "train", "path": "data/CC-MAIN-2013-20/*"}],
            },
        ],
    }
    names = [folder / "sample" / "10BT" / f"{i:03}_00000.parquet" for i in range(3)]
    return [fineweb.write(name, TEXTS[i * 40 : i * 40 + 40], 10) for i, name in enumerate(names)]


# ---- which files


@pytest.mark.parametrize("calib", ["fineweb", "HuggingFaceFW/fineweb"])
def test_fineweb(calib: str, hub: type[Hub], fineweb_files: list[Path]) -> None:
    corpus = open_corpus(calib)
    assert list(corpus) == TEXTS
    assert (corpus.dataset, corpus.config) == ("HuggingFaceFW/fineweb", "sample-10BT")
    assert (corpus.revision, corpus.notes, corpus.incomplete) == (FINEWEB_REVISION, [], None)
    assert {name for name, _ in hub.served} == {file.name for file in fineweb_files}


def test_other_configurations_and_revisions(hub: type[Hub], fineweb_files: list[Path]) -> None:
    corpus = open_corpus("fineweb:CC-MAIN-2013-20@main")
    assert list(corpus) == fineweb.texts(10, "crawl")
    assert (corpus.config, corpus.revision) == ("CC-MAIN-2013-20", FINEWEB_REVISION)
    with pytest.raises(HubError, match=r"no such configuration: expected CC-.*, default, sample-10BT, found nothing"):
        open_corpus("fineweb:nothing")


def test_seeds_shuffle_files_and_row_groups(fineweb_files: list[Path]) -> None:
    orders = [list(open_corpus("fineweb", seed=seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert all(sorted(order) == sorted(TEXTS) for order in orders)
    assert TEXTS not in orders
    assert orders[0] != orders[2]


@pytest.mark.parametrize(
    ("configs", "found"),
    [
        ([{"config_name": "only", "data_files": "data/train-*"}], ["train0", "train1"]),
        ([{"config_name": "only", "data_files": ["data/train-0*", "data/test*"]}], ["test", "train0"]),
        ([{"config_name": "only", "data_dir": "other"}], ["other"]),
        ([{"config_name": "only", "data_dir": "data", "data_files": "test-*"}], ["test"]),
        ([{"config_name": "only", "data_files": "**/*.parquet"}], ["test", "train0", "train1", "other"]),
        (
            [
                {"config_name": "a", "data_files": [{"split": "train", "path": "other/*"}]},
                {
                    "config_name": "b",
                    "default": True,
                    "data_files": [
                        {"split": "test", "path": "data/te*"},
                        {"split": "train", "path": ["data/train-1*"]},
                    ],
                },
            ],
            ["train1"],
        ),
        ([{"config_name": "only", "data_files": [{"split": "test", "path": "data/test*"}]}], ["test"]),
        (None, ["train0", "train1"]),
    ],
)
def test_files_of_a_configuration(configs: object, found: list[str], hub: type[Hub], tmp_path: Path) -> None:
    folder = publish(hub, "owner/name", tmp_path / "remote")
    hub.cards["owner/name"] = {"license": "mit"} | ({"configs": configs} if configs else {})
    for name in ("train-0-of-2", "train-1-of-2", "test-0-of-1"):
        text = name.split("-of")[0].replace("-", "").replace("test0", "test")
        fineweb.write(folder / "data" / f"{name}.parquet", [text], 1)
    fineweb.write(folder / "other" / "x.parquet", ["other"], 1)
    (folder / "README.md").write_text("not Parquet")
    assert list(open_corpus("owner/name")) == found


def test_folder_as_configuration(hub: type[Hub], tmp_path: Path) -> None:
    folder = publish(hub, "owner/name", tmp_path / "remote")
    for name in ("en", "de"):
        fineweb.write(folder / name / "x.parquet", [name], 1)
    corpus = open_corpus("owner/name:de")
    assert (list(corpus), corpus.config, corpus.revision) == (["de"], "de", COMMIT)


def test_several_configurations_and_none_named(hub: type[Hub], tmp_path: Path) -> None:
    publish(hub, "owner/name", tmp_path)
    hub.cards["owner/name"] = {"configs": [{"config_name": n, "data_files": f"{n}/*"} for n in ("en", "de")]}
    with pytest.raises(HubError, match=r"several configurations: found de, en; choose one as OWNER/NAME:CONFIG"):
        open_corpus("owner/name")


def test_the_hubs_own_conversion(hub: type[Hub], tmp_path: Path) -> None:
    folder = publish(hub, "owner/name", tmp_path / "remote")
    folder.mkdir()
    (folder / "data.csv").write_text("text\n")
    converted = publish(hub, "owner/name", tmp_path / "converted", "refs/convert/parquet", CONVERTED)
    fineweb.write(converted / "default" / "test" / "0000.parquet", ["test"], 1)
    fineweb.write(converted / "default" / "partial-train" / "0000.parquet", ["train"], 1)
    corpus = open_corpus("owner/name")
    assert (list(corpus), corpus.config, corpus.revision) == (["train"], "default", CONVERTED)
    assert corpus.notes == ["owner/name holds no Parquet files of its own: read the Hub's conversion of it"]
    with pytest.raises(HubError, match="no Parquet files"):
        open_corpus(f"owner/name@{COMMIT}")


def test_no_parquet_at_all(hub: type[Hub], tmp_path: Path) -> None:
    publish(hub, "owner/name", tmp_path / "remote").mkdir()
    with pytest.raises(HubError, match=r"owner/name: the dataset has no Parquet files; download .*--calib builtin"):
        open_corpus("owner/name")


@pytest.mark.parametrize(
    ("calib", "parts"),
    [
        ("owner/nothing", ["owner/nothing", "no such dataset"]),
        ("owner/gated", ["owner/gated", "gated", "HF_TOKEN"]),
        ("owner/name@v9", ["owner/name@v9", "no such revision"]),
        ("owner/name--x", ["not a dataset id"]),
    ],
)
def test_refused_by_the_hub(calib: str, parts: list[str], hub: type[Hub], tmp_path: Path) -> None:
    publish(hub, "owner/name", tmp_path)
    with pytest.raises(HubError) as caught:
        open_corpus(calib)
    for part in parts:
        assert part in str(caught.value)


def test_column_that_does_not_exist(fineweb_files: list[Path]) -> None:
    with pytest.raises(TsconvError, match=r"sample/10BT/000_00000.parquet: no column 'body': found columns text, id"):
        list(open_corpus("fineweb", text_field="body"))


# ---- what the network does


def test_the_first_documents_fetch_little(hub: type[Hub], tmp_path: Path) -> None:
    folder = publish(hub, "owner/name", tmp_path / "remote")
    documents = [hashlib.shake_256(bytes([i])).hexdigest(1 << 18) for i in range(40)]
    file = fineweb.write(folder / "train.parquet", documents, 2, compression="none")
    corpus = open_corpus("owner/name")
    assert list(islice(corpus, 3)) == documents[:3]
    assert sum(n for _, n in hub.served) < file.stat().st_size / 3
    assert next(iter(open_corpus("owner/name", seed=4))) in documents
    hub.served.clear()
    assert list(corpus) == documents
    assert sum(n for _, n in hub.served) < file.stat().st_size * 1.5


@pytest.mark.parametrize(
    ("failure", "times"), [("drop", 1), ("drop", 3), ("drop", 8), ("busy", 1), ("busy", 8), ("short", 1), ("short", 3)]
)
def test_failures_are_survived(
    failure: str, times: int, hub: type[Hub], fineweb_files: list[Path], waits: list[float]
) -> None:
    """The connection closes half-way, the server is busy, fewer bytes come than were asked for."""
    hub.fail += [failure] * times
    iterator = iter(corpus := open_corpus("fineweb"))
    first = list(islice(iterator, 15))
    hub.fail += [failure] * times
    assert first + list(iterator) == TEXTS
    assert (corpus.notes, corpus.incomplete, hub.fail) == ([], None, [])
    assert waits


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("ranges", range(1, 12))
def test_network_that_stays_down(
    ranges: int, seed: int | None, hub: type[Hub], fineweb_files: list[Path], waits: list[float]
) -> None:
    whole = list(open_corpus("fineweb", seed=seed))
    needed = len(hub.served)
    hub.served.clear()
    hub.down_after = ranges
    corpus = open_corpus("fineweb", seed=seed)
    if ranges >= needed:
        assert list(corpus) == whole
        return
    try:
        got = list(corpus)
    except HubError as error:
        assert "HuggingFaceFW/fineweb: the network failed at sample/10BT/" in str(error)
        assert "--calib builtin" in str(error)
        assert len({name for name, _ in hub.served}) == 1
    else:
        assert 0 < len(got) < len(TEXTS)
        assert got == whole[: len(got)]
        assert len(got) % 10 == 0
        assert "sample/10BT/" in corpus.incomplete
        assert corpus.notes == [f"{corpus.incomplete}; the {len(got)} documents before it were read"]
    assert sum(waits) > 10


@pytest.mark.parametrize("seed", [None, 2])
def test_failures_within_a_row_group(
    seed: int | None, hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsconv.stats.text.parquet.BATCH_BYTES", 1 << 20)
    folder = publish(hub, "owner/name", tmp_path / "remote")
    documents = [hashlib.shake_256(bytes([i])).hexdigest(1 << 17) for i in range(40)]
    pages = {"write_batch_size": 1, "data_page_size": 1 << 18, "use_dictionary": False}
    fineweb.write(folder / "train.parquet", documents, 40, compression="none", **pages)
    whole = list(open_corpus("owner/name", seed=seed))
    assert sorted(whole) == sorted(documents)

    iterator = iter(corpus := open_corpus("owner/name", seed=seed))
    got = list(islice(iterator, 10))
    hub.fail += ["drop"] * 8
    got += islice(iterator, 10)
    hub.fail += ["short"] * 3
    got += islice(iterator, 10)
    hub.fail += ["short"] * 3
    assert got + list(iterator) == whole
    assert (corpus.notes, hub.fail) == ([], [])

    iterator = iter(corpus)
    got = list(islice(iterator, 10))
    hub.down_after = len(hub.served)
    got += iterator
    assert 10 <= len(got) < 40
    assert got == whole[: len(got)]
    assert "train.parquet, row group 0" in corpus.incomplete


def test_broken_row_group_on_the_hub(fineweb_files: list[Path]) -> None:
    fineweb.damage(fineweb_files[1], 2)
    corpus = open_corpus("fineweb")
    assert list(corpus) == TEXTS[:60] + TEXTS[70:]
    assert len(corpus.notes) == 1
    assert "sample/10BT/001_00000.parquet, row group 2" in corpus.notes[0]


def test_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch, waits: list[float], silent: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", silent)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    with pytest.raises(HubError, match=r"HuggingFaceFW/fineweb@9bb295d.*asking the Hub failed.*--calib builtin"):
        open_corpus("fineweb")


def test_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    try:
        with pytest.raises(HubError, match=r"HF_HUB_OFFLINE.*--calib builtin"):
            open_corpus("fineweb")
    finally:
        huggingface_hub.close_session()


# ---- counting on it


@pytest.fixture
def half_way(hub: type[Hub], fineweb_files: list[Path]) -> int:
    """The network goes down after so many ranges, with some documents read."""
    for ranges in range(1, 12):
        hub.served.clear()
        hub.down_after = ranges
        with contextlib.suppress(HubError):
            corpus = open_corpus("fineweb")
            if 0 < len(list(corpus)) < len(TEXTS):
                hub.served.clear()
                return ranges
    raise AssertionError("it never stopped half-way")


def test_counts_of_a_network_that_stops(hub: type[Hub], half_way: int, tmp_path: Path) -> None:
    """What was counted is exactly the text that came, and the result says where it ended."""
    result = profiling.profile(tiny.converted(), "fineweb", tmp_path / "cut.gguf", chunk=32, n_threads=1)
    assert result.notes[0].startswith("the text ends early, the network failed at sample/10BT/")
    (part,) = result.stats.parts
    assert (part.source.dataset, part.source.config) == ("HuggingFaceFW/fineweb", "sample-10BT")
    assert part.source.revision == FINEWEB_REVISION

    given = int(result.notes[0].split("; the ")[1].split()[0])
    came = tmp_path / "came.jsonl"
    came.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:given]))
    alone = profiling.profile(tiny.converted(), str(came), tmp_path / "came.gguf", chunk=32, n_threads=1)
    assert alone.n_tokens == result.n_tokens > 0
    assert (alone.stats.total.neurons == result.stats.total.neurons).all()


def test_network_that_stops_before_a_chunk(hub: type[Hub], half_way: int, tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"the network failed at .*; the text does not fill one chunk"):
        profiling.profile(tiny.converted(), "fineweb", tmp_path / "s.gguf", chunk=4096, n_threads=1)
    assert not (tmp_path / "s.gguf").exists()
