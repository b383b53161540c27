"""Gate, up and down side by side: the same rows as without, where that can be, and where it is chosen."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import gguf
import numpy as np
import pytest

from support.panels import FFN_LAYOUT, VERSION, bytes_of
from support.reordered import make, tensors
from support.synthetic import SHAPES, random_tensors, save
from tsconv import convert
from tsconv.errors import TsconvError
from tsconv.format.header import read_header
from tsconv.transform.bundles import from_bundles, names_of_layer, to_bundles
from tsconv.write import writer
from tsconv.write.writer import HUGE_PAGE, StreamedFile


def layout(model: Path) -> tuple[int, str | None]:
    keys = read_header(model).keys
    return keys[VERSION], keys.get(FFN_LAYOUT)


def test_there_and_back():
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 256, (7, 18), np.uint8) for _ in range(3)]
    bundles = to_bundles(parts)
    assert bundles.shape == (7, 54)
    for part, k in zip(parts, range(3), strict=True):
        np.testing.assert_array_equal(bundles[:, 18 * k : 18 * (k + 1)], part)
    for found, part in zip(from_bundles(bundles), parts, strict=True):
        np.testing.assert_array_equal(found, part)


def test_names():
    assert names_of_layer("blk.3.ffn_gate_exps.weight") == tuple(
        f"blk.3.ffn_{part}_exps.weight" for part in ("gate", "up", "down")
    )


@pytest.mark.parametrize("outtype", ["f16", "q4_0"])
@pytest.mark.parametrize("family", SHAPES)
def test_same_rows_in_both_layouts(family, outtype, tmp_path):
    for name in ("rows", "bundles"):
        (tmp_path / name).mkdir()
    rows = make(tmp_path / "rows", family, outtype, ffn_layout="rows")
    bundles = make(tmp_path / "bundles", family, outtype, ffn_layout="bundles")
    assert layout(rows) == (1, None)
    assert layout(bundles) == (2, "bundles")
    before, after = tensors(rows), tensors(bundles)
    assert list(before) == list(after)
    for name, (shape, kind, data) in before.items():
        assert after[name][:2] == (shape, kind)
        np.testing.assert_array_equal(after[name][2], data, err_msg=name)
    stored = [{t.name: bytes_of(t) for t in gguf.GGUFReader(path).tensors} for path in (rows, bundles)]
    moved = {name for name in before if not np.array_equal(stored[0][name], stored[1][name])}
    assert moved == {name for name in before if any(f".ffn_{part}" in name for part in ("gate", "up", "down"))} - {
        name for name in before if "ffn_gate_inp" in name
    }


def test_bundles_are_one_piece_of_the_file(tmp_path):
    entries = {tensor.name: tensor for tensor in read_header(make(tmp_path, "mistral")).tensors}
    gate, up, down = (entries[name] for name in names_of_layer("blk.0.ffn_gate.weight"))
    assert gate.offset + gate.n_bytes == up.offset
    assert up.offset + up.n_bytes == down.offset


def test_what_is_chosen(tmp_path):
    def chosen(ranks: tuple[int, ...], *tensor_types: str) -> str:
        shape = dataclasses.replace(SHAPES["mistral"], ranks=ranks)
        source = save(tmp_path / f"c{len(ranks)}", shape, random_tensors(shape))
        return convert(source, tmp_path / "m.gguf", tensor_types=tensor_types, force=True).ffn_layout

    ranks = SHAPES["mistral"].ranks
    assert chosen(ranks) == "bundles"
    assert chosen(()) == "rows", "exact sparsity reads all of gate"
    assert chosen(ranks, "ffn_down=q8_0") == "rows", "rows of different sizes"
    assert chosen(ranks, "ffn_(gate|up|down)=q8_0") == "bundles"


def test_what_cannot_be(tmp_path):
    with pytest.raises(TsconvError, match=r"blk\.0\.ffn_gate\.weight cannot be in bundles: expected one type .* q8_0"):
        make(tmp_path, "mistral", tensor_types=["ffn_down=q8_0"], ffn_layout="bundles")
    with pytest.raises(TsconvError, match="unknown layout 'columns'"):
        make(tmp_path, "mistral", ffn_layout="columns")


def test_files_are_written_in_aligned_pieces(tmp_path, monkeypatch):
    """Whatever is given, and in whatever pieces: all writes end at a multiple of a huge page, but for the last."""
    rng = np.random.default_rng(0)
    sizes = [5, HUGE_PAGE - 1, 3 * HUGE_PAGE + 7, 64, 2 * HUGE_PAGE]
    data = [rng.integers(0, 256, size, np.uint8) for size in sizes]
    ends: list[int] = []

    def write(fd: int, piece: memoryview) -> int:
        n = os.pwrite(fd, piece, at := os.lseek(fd, 0, os.SEEK_CUR))
        ends.append(os.lseek(fd, at + n, os.SEEK_SET))
        return n

    monkeypatch.setattr(writer.os, "write", write)
    file = StreamedFile(tmp_path / "x.gguf", "turbosparse")
    for i, size in enumerate(sizes):
        file.declare(f"t{i}", (size,), gguf.GGMLQuantizationType.I8, size)
    file.begin()
    for values in data[:3]:
        for start in range(0, len(values), 1_000_003):
            file.write(values[start : start + 1_000_003])
    file.write_on(np.concatenate(data[3:]))
    assert file.finish() == file.part.stat().st_size == ends[-1]
    assert all(end % HUGE_PAGE == 0 for end in ends[:-1])
    assert len(ends) <= 2 + sum(sizes) // HUGE_PAGE
    found = {tensor.name: bytes_of(tensor) for tensor in gguf.GGUFReader(file.part).tensors}
    for i, values in enumerate(data):
        np.testing.assert_array_equal(found[f"t{i}"], values)
    file.discard()
