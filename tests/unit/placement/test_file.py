"""The placement file: written whole, read back equal, and refused in one line when anything is wrong with it."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tsconv
from support.edited import edited
from support.placements import placement_for
from support.random_stats import random_stats, save_stats
from support.synthetic import SHAPES, random_tensors, save
from tsconv.errors import ModelFileError, OutputError
from tsconv.format.header import read_header
from tsconv.placement.file import MAX_FILE, LayerPlacement, Placement

LAYERS = (
    LayerPlacement("gpu", "gpu", (3, 0), (5, 96)),
    LayerPlacement("gpu", "cpu", (96, 96), (0, 0)),
    LayerPlacement("cpu", "cpu", (0, 0), (1, 0)),
)
PLACEMENT = Placement(
    fingerprint="0123456789abcdef" * 4,
    pair_id="fedcba9876543210" * 2,
    neuron_order="hot_first",
    sparsity="predictor",
    machine="pc-2080ti ü",
    ctx=4096,
    budgets={"vram": 1 << 33, "ram": 1 << 35, "vram_used": 17, "ram_used": 0},
    predicted={
        "ms_per_token": 24.125,
        "lower_bound_ms_per_token": 24.1,
        "tokens_per_s": 41.45,
        "cpu_only_tokens_per_s": 7.5,
        "all_gpu_tokens_per_s": None,
    },
    output="gpu",
    layers=LAYERS,
)

Change = Callable[[dict[str, Any]], object]


def one_line(path: Path) -> str:
    with pytest.raises(ModelFileError) as error:
        Placement.load(path)
    text = str(error.value)
    assert "\n" not in text
    assert str(path) in text
    assert len(text) < 600
    return text


def test_read_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    assert PLACEMENT.save(path) == path.stat().st_size
    assert Placement.load(path) == PLACEMENT
    assert Placement.load(str(path)).hot_prefix() == [[8, 96], [96, 96], [1, 0]]
    assert os.listdir(tmp_path) == ["p.json"]
    document = json.loads(path.read_text())
    assert document["format_version"] == 1
    assert document["layers"][0] == {"attention": "gpu", "predictor": "gpu", "gpu": [3, 0], "ram": [5, 96]}


def test_does_not_replace_without_force(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text("mine")
    with pytest.raises(OutputError, match="output exists"):
        PLACEMENT.save(path)
    assert path.read_text() == "mine"
    PLACEMENT.save(path, force=True)
    assert Placement.load(path) == PLACEMENT
    with pytest.raises(OutputError, match="is a directory"):
        PLACEMENT.save(tmp_path, force=True)
    with pytest.raises(OutputError, match="folder of the output does not exist"):
        PLACEMENT.save(tmp_path / "none" / "p.json")


def test_nothing_half_written(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    (tmp_path / "p.json.part").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        PLACEMENT.save(path)
    assert not path.exists()


def set_to(*keys: str | int, value: object) -> Change:
    def change(document: dict[str, Any]) -> None:
        at: Any = document
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_to("format_version", value=2), "format_version: expected 1, found 2"),
        (set_to("format_version", value=True), "format_version: expected 1, found true"),
        (set_to("format_version", value=1.0), "format_version: expected 1, found 1.0"),
        (set_to("fingerprint", value="00"), 'fingerprint: expected 64 lower-case hex digits, found "00"'),
        (set_to("fingerprint", value=7), "fingerprint: expected 64 lower-case hex digits"),
        (set_to("pair_id", value="g" * 32), "pair_id: expected 32 lower-case hex digits"),
        (set_to("pair_id", value="0" * 32 + "\n"), "pair_id: expected 32 lower-case hex digits"),
        (set_to("neuron_order", value="checkpoint"), "neuron_order: expected 'hot_first', found \"checkpoint\""),
        (set_to("sparsity", value=["exact"]), "sparsity: expected 'predictor' or 'exact', found a list"),
        (set_to("machine", value=""), "machine: expected a name"),
        (set_to("machine", value="a\x1b[2Jb"), "machine: expected a name"),
        (set_to("machine", value="a\ud800b"), "machine: expected a name"),
        (set_to("ctx", value=0), "ctx: expected an integer, 1 to 16777216, found 0"),
        (set_to("ctx", value=4096.0), "ctx: expected an integer"),
        (set_to("ctx", value=10**4000), "ctx: expected an integer"),
        (set_to("output", value="tpu"), "output: expected 'gpu' or 'cpu', found \"tpu\""),
        (set_to("budgets", value=[]), "budgets: expected an object, found a list"),
        (set_to("budgets", "vram", value=-1), "budgets.vram: expected an integer"),
        (set_to("budgets", "disk", value=1), "budgets: expected the keys vram"),
        (set_to("predicted", "tokens_per_s", value=-1), "predicted.tokens_per_s: expected a number or null"),
        (set_to("predicted", "tokens_per_s", value="fast"), "predicted.tokens_per_s: expected a number or null"),
        (set_to("predicted", "tokens_per_s", value=10**300), "predicted.tokens_per_s: expected a number or null"),
        (set_to("layers", value=[]), "layers: expected a list of 1 to 512 elements, found 0 elements"),
        (set_to("layers", value={}), "layers: expected a list"),
        (set_to("layers", 0, value=None), r"layers\[0\]: expected an object, found null"),
        (set_to("layers", 1, "attention", value="disk"), "attention: expected 'gpu' or 'cpu', found \"disk\""),
        (set_to("layers", 1, "predictor", value=None), "predictor: expected 'gpu' or 'cpu', found null"),
        (set_to("layers", 1, "gpu", value=3), r"layers\[1\]: expected a list"),
        (set_to("layers", 1, "gpu", value=[]), r"layers\[1\]: expected a list of 1 to 1024 elements"),
        (set_to("layers", 1, "gpu", value=[1, 2, 3]), r"layers\[1\].ram: expected 3 elements"),
        (set_to("layers", 1, "gpu", 0, value=-1), r"layers\[1\].gpu: expected an integer, 0 to 1048576, found -1"),
        (set_to("layers", 1, "ram", 1, value=True), r"layers\[1\].ram: expected an integer"),
        (set_to("layers", 1, "ram", 1, value=1 << 21), r"layers\[1\].ram: expected an integer"),
        (set_to("layers", 1, "heat", value=1), r"layers\[1\]: expected the keys"),
        (lambda d: d["layers"][2].update(gpu=[1], ram=[1]), "the same number of FFNs in each"),
        (lambda d: d["layers"][0].pop("ram"), r"layers\[0\]: expected the key ram, found nothing"),
        (lambda d: d.pop("output"), "the file: expected the key output, found nothing"),
        (lambda d: d.update(more=1), "the file: expected the keys"),
    ],
)
def test_refused(change: Change, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    PLACEMENT.save(path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ModelFileError, match=message):
        Placement.load(path)
    one_line(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"GGUF\x03\x00\x00\x00",
        b"null",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"layers": NaN}',
        b'{"layers": Infinity}',
        b'{"ctx": 1' + b"0" * 10_000 + b"}",
        b'{"ctx": 1, "ctx": 2}',
        b'"' + b"x" * 10_000_000 + b'"',
    ],
    ids=range(11),
)
def test_hostile(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(data)
    one_line(path)


def test_numbers_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    for number in ("NaN", "-Infinity", "1e999"):
        PLACEMENT.save(path, force=True)
        path.write_text(path.read_text().replace("24.125", number))
        assert "bad placement" in one_line(path)


def test_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    with open(path, "wb") as file:
        file.truncate(MAX_FILE + 1)
    assert "expected at most" in one_line(path)


def test_missing_and_unreadable(tmp_path: Path) -> None:
    assert "No such file" in one_line(tmp_path / "none.json")
    assert "directory" in one_line(tmp_path)


def test_cut_short_or_with_bytes_changed(tmp_path: Path) -> None:
    """Either it is refused in one line, or it says something valid."""
    path = tmp_path / "p.json"
    PLACEMENT.save(path)
    data = path.read_bytes()
    rng = random.Random(0)
    for n in range(len(data) - 2):
        path.write_bytes(data[:n])
        one_line(path)
    for _ in range(2000):
        spoiled = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            spoiled[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(spoiled)
        try:
            found = Placement.load(path)
        except ModelFileError as error:
            assert "\n" not in str(error)
        else:
            found.save(tmp_path / "again.json", force=True)
            assert Placement.load(tmp_path / "again.json") == found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    shape = SHAPES["mixtral"]
    path = tsconv.convert(save(folder / "c", shape, random_tensors(shape)), folder / "c.gguf", "q4_0").model
    return tsconv.reorder(path, save_stats(random_stats(path), folder / "s.gguf"), folder / "m.gguf").model


def test_belongs_to_its_model_only(model: Path, tmp_path: Path) -> None:
    n_ff = SHAPES["mixtral"].n_ff
    header = read_header(model)
    placement = placement_for(model, [[n_ff, 3, 0, 9]] * 2)
    placement.check_model(header)
    for changes, message in (
        ({"fingerprint": "0" * 64}, "turbosparse.source.fingerprint differs"),
        ({"pair_id": "0" * 32}, "turbosparse.pair_id differs"),
        ({"layers": placement.layers[:1]}, "expected 2 layers of 4 FFNs, found 1 layers of 4"),
        ({"layers": placement_for(model, [[1, 2, 3]] * 2).layers}, "found 2 layers of 3"),
        ({"layers": placement_for(model, [[1, 2, 3, 4], [1, 2, n_ff + 1, 4]]).layers}, "layer 1, FFN 2"),
    ):
        with pytest.raises(ModelFileError, match=message) as error:
            dataclasses.replace(placement, **changes).check_model(header)
        assert str(model) in str(error.value)
    unordered = edited(model, tmp_path / "u.gguf", keys={"turbosparse.neuron_order": "checkpoint"})
    with pytest.raises(ModelFileError, match=r"turbosparse\.neuron_order differs"):
        placement.check_model(read_header(unordered))


def test_prefixes_count_gpu_and_ram_together(model: Path) -> None:
    n_ff = SHAPES["mixtral"].n_ff
    layer = LayerPlacement("gpu", "gpu", (60,) * 4, (n_ff - 59,) * 4)
    keys = read_header(model).keys
    placement = dataclasses.replace(
        PLACEMENT,
        fingerprint=keys["turbosparse.source.fingerprint"],
        pair_id=keys["turbosparse.pair_id"],
        layers=(layer, layer),
    )
    with pytest.raises(ModelFileError, match=f"at most {n_ff} neurons on the GPU and in RAM, found {n_ff + 1}"):
        placement.check_model(read_header(model))
