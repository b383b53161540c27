"""Checksums of tensors: written with every file, compared by `tsconv inspect --verify`."""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest

import tsconv
from support import tiny
from tsconv.errors import ModelFileError
from tsconv.format.checksums import KEY, verify
from tsconv.format.header import read_header
from tsconv.format.pair import sidecar_path


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    model = tmp_path / "m.gguf"
    shutil.copy(tiny.converted(), model)
    shutil.copy(sidecar_path(tiny.converted()), sidecar_path(model))
    return model


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("of", [lambda model: model, sidecar_path])
def test_they_are_those_of_the_bytes(of) -> None:
    path = of(tiny.converted())
    header, data = read_header(path), path.read_bytes()
    assert header.keys[KEY] == [zlib.crc32(data[t.offset : t.offset + t.n_bytes]) for t in header.tensors]
    assert verify(header) == len(header.tensors)


@pytest.mark.parametrize("of", [lambda model: model, sidecar_path])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_a_flipped_bit_is_found(pair: Path, of, place: float) -> None:
    path = of(pair)
    tensor = read_header(path).tensors[2]
    flip(path, tensor.offset + int(place * (tensor.n_bytes - 1)))
    with pytest.raises(ModelFileError, match=rf"{tensor.name}: not the bytes that were written"):
        verify(read_header(path))
    result = tiny.run("inspect", "--verify", pair)
    assert result.returncode == 4
    assert result.stderr.decode().splitlines()[-1].startswith(f"error: {path}: {tensor.name}: not the bytes")


def test_a_whole_pair(pair: Path) -> None:
    result = tiny.run("inspect", "--verify", pair)
    assert result.returncode == 0
    lines = result.stderr.decode().splitlines()
    assert [line.partition(": ")[0] for line in lines] == [str(pair), str(sidecar_path(pair))]


def test_a_reordered_pair_has_its_own(tmp_path: Path, pair: Path) -> None:
    stats = tmp_path / "s.stats.gguf"
    assert tiny.run("profile", pair, "--calib", "builtin", "--tokens", 300, "--outfile", stats).returncode == 0
    hot = tsconv.reorder(pair, stats, tmp_path / "hot.gguf").model
    header = read_header(hot)
    assert header.keys[KEY] != read_header(pair).keys[KEY]
    assert verify(header) == len(header.tensors)
    verify(read_header(sidecar_path(hot)))


def test_files_without(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("a", np.zeros((4, 32), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(ModelFileError, match="has no checksums"):
        verify(read_header(path))
