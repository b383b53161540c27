"""`tsconv inspect` on whole, damaged and foreign files."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from support.edited import edited
from support.panels import FFN_LAYOUT, VERSION, write_rows
from support.synthetic import SHAPES, random_tensors, save
from tsconv import convert
from tsconv.errors import ModelFileError
from tsconv.format.header import read_header

Run = Callable[..., tuple[int, str, str]]
MODEL_FILE = 4


@pytest.fixture
def run(run: Run) -> Run:
    return functools.partial(run, "inspect")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    shape = SHAPES["mixtral"]
    return convert(save(tmp_path / "Tiny", shape, random_tensors(shape)), tmp_path / "m.gguf", "q8_0").model


def test_text(model: Path, run: Run) -> None:
    code, stdout, _ = run(model)
    assert code == 0
    for part in ("m.gguf: model", "turbosparse.pair_id", "llama.expert_count", "q8_0", "ffn", "belongs to this file"):
        assert part in stdout


def test_json_agrees_with_gguf_py(model: Path, run: Run) -> None:
    for path, kind in ((model, "model"), (model.with_suffix(".predictor.gguf"), "sidecar")):
        shown = json.loads(run(path, "--json")[1])
        reader = gguf.GGUFReader(path)
        assert (shown["kind"], shown["file_bytes"]) == (kind, path.stat().st_size)
        assert shown["keys"] == {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
        assert shown["tensors"] == [
            {
                "name": t.name,
                "shape": t.shape.tolist(),
                "type": t.tensor_type.name.lower(),
                "offset": t.data_offset,
                "n_bytes": t.n_bytes,
            }
            for t in reader.tensors
        ]
        assert shown["n_weights"] == sum(t.n_elements for t in reader.tensors)
        for groups in ("by_type", "by_part"):
            assert sum(group["n_bytes"] for group in shown[groups]) == sum(t.n_bytes for t in reader.tensors)
        assert shown["partner"]["matches"] is True


def test_layout_of_a_sidecar(model: Path, run: Run) -> None:
    panels = model.with_suffix(".predictor.gguf")
    plain = [write_rows(panels, panels.with_name(f"{version}.gguf"), version) for version in (1, 2)]
    for path, layout in ((panels, "panels16"), (plain[0], "rows"), (plain[1], "rows")):
        assert run(path)[1].startswith(f"{path}: sidecar in {layout}, ")
        assert json.loads(run(path, "--json")[1])["layout"] == layout


def test_layout_of_a_model(model: Path, run: Run, tmp_path: Path) -> None:
    plain = edited(model, tmp_path / "rows.gguf", keys={VERSION: 1}, without=[FFN_LAYOUT])
    for path, layout in ((model, "bundles"), (plain, "rows")):
        assert run(path)[1].startswith(f"{path}: model in {layout}, ")
        assert json.loads(run(path, "--json")[1])["layout"] == layout


def test_partner_of_another_conversion(model: Path, tmp_path: Path, run: Run) -> None:
    other = convert(tmp_path / "Tiny", tmp_path / "other.gguf").sidecar
    other.replace(model.with_suffix(".predictor.gguf"))
    assert "DOES NOT belong" in run(model)[1]


def test_foreign_gguf(tmp_path: Path, run: Run) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gpt2")
    writer.add_tensor("a", np.zeros((2, 3), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    code, stdout, _ = run(tmp_path / "x.gguf")
    assert code == 0
    assert "another GGUF file" in stdout


def refused(run: Run, path: Path, *parts: str) -> None:
    code, stdout, stderr = run(path)
    assert (code, stdout) == (MODEL_FILE, ""), stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert str(path) in stderr
    for part in parts:
        assert part in stderr


def test_truncated_data(model: Path, run: Run) -> None:
    last = read_header(model).tensors[-1]
    data = model.read_bytes()
    model.write_bytes(data[: last.offset + last.n_bytes - 1])
    refused(run, model, last.name, "beyond the end of the file")


def test_not_gguf(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "x.gguf"
    for content in (b"", b"GG", b"<html>", b"GGUF\x09\x00\x00\x00" + bytes(16)):
        path.write_bytes(content)
        refused(run, path)
    refused(run, tmp_path / "missing.gguf", "No such file")
    refused(run, tmp_path, "Is a directory")


def test_every_truncation_of_the_header(model: Path) -> None:
    """Each shorter file is refused with a ModelFileError, whatever value it ends in."""
    data = model.read_bytes()
    end = read_header(model).tensors[0].offset
    short = model.with_name("short.gguf")
    for n in [*range(0, 400), *range(400, end, 97)]:
        short.write_bytes(data[:n])
        with pytest.raises(ModelFileError, match=r"short\.gguf"):
            read_header(short)


def test_random_damage_never_escapes(model: Path) -> None:
    """Flipped header bytes either change a value or are refused; no other exception, no endless loop."""
    data = model.read_bytes()
    end = read_header(model).tensors[0].offset
    rng = np.random.default_rng(0)
    damaged = model.with_name("damaged.gguf")
    for _ in range(300):
        spoiled = bytearray(data)
        for at in rng.integers(0, end, 3):
            spoiled[at] = rng.integers(256)
        damaged.write_bytes(spoiled)
        try:
            read_header(damaged)
        except ModelFileError:
            continue


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        (b"drelu", b"swish", "turbosparse.activation"),
        (b"neuron_major", b"row_majorxxx", "turbosparse.ffn_down.layout"),
    ],
)
def test_format_violations(old: bytes, new: bytes, part: str, model: Path, run: Run) -> None:
    model.write_bytes(model.read_bytes().replace(old, new))
    refused(run, model, part)


def test_format_version(model: Path, run: Run) -> None:
    data = model.read_bytes()
    at = data.index(b"turbosparse.format_version") + len(b"turbosparse.format_version") + 4
    model.write_bytes(data[:at] + b"\x03" + data[at + 1 :])
    refused(run, model, "turbosparse.format_version", "expected 1 or 2, found 3")
