"""What brings a model's files into the page cache, and what leaves them on the disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import tsconv
from support import synthetic, tiny
from support.memory_map import cached_bytes, drop_cache
from tsconv.bench.synthetic import Shape
from tsconv.format.header import read_header
from tsconv.runtime import model as runtime_model
from tsconv.runtime.binding import open_model

READ_AT_ONCE = 64 << 10  # bytes of a header, which may end just behind the beginning of such a piece
SHAPE = Shape(synthetic.N_VOCAB, 512, 2048, 8, 8, 2, ranks=(128, 128))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """A model of 32 MB and its sidecar, both on the disk only where the file system allows."""
    directory = tmp_path_factory.mktemp("page-cache")
    checkpoint = synthetic.save(directory / "checkpoint", SHAPE, synthetic.random_tensors(SHAPE))
    result = tsconv.convert(checkpoint, directory / "m.gguf", "f32")
    assert result.sidecar is not None
    return result.model, result.sidecar


@pytest.fixture
def dropped(files) -> tuple[Path, Path]:
    for file in files:
        drop_cache(file)
        if cached_bytes(file) != 0:
            pytest.skip("this file system keeps files in memory")
    return files


def only_headers(files: tuple[Path, Path]) -> bool:
    def header_bytes(file: Path) -> int:
        return min(tensor.offset for tensor in read_header(file).tensors)

    return all(cached_bytes(file) <= header_bytes(file) + 2 * READ_AT_ONCE < file.stat().st_size for file in files)


def test_reading_a_header(dropped):
    for file in dropped:
        read_header(file)
    assert only_headers(dropped)


def test_opening_a_model(dropped):
    model = open_model(dropped[0], None, None)
    assert model.file_bytes == dropped[0].stat().st_size
    model.close()
    assert only_headers(dropped)


@pytest.mark.parametrize("command", [["inspect"], ["inspect", "--json"], ["doctor"]], ids=" ".join)
def test_commands_that_compute_nothing(dropped, command):
    model = [dropped[0]] if command[0] == "inspect" else []
    done = subprocess.run(
        [*tiny.TSCONV, *command, *model], capture_output=True, text=True, timeout=tiny.TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert only_headers(dropped)


def test_bringing_a_model_in(dropped, monkeypatch):
    """Piece by piece, to the last byte; what is given up in between stays where it is."""
    monkeypatch.setattr("tsconv.runtime.binding.CACHE_PIECE", 4 << 20)
    file = dropped[0]
    model = open_model(file, None, None)
    seen = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.cache_file(stop)
    assert seen == [(4 << 20, model.file_bytes)]
    assert (4 << 20) <= cached_bytes(file) < file.stat().st_size
    seen.clear()
    model.cache_file(lambda done, total: seen.append((done, total)))
    assert seen == [
        (min(n, model.file_bytes), model.file_bytes) for n in range(4 << 20, model.file_bytes + (4 << 20), 4 << 20)
    ]
    assert cached_bytes(file) >= file.stat().st_size
    model.close()


@pytest.mark.parametrize(
    ("available", "arguments", "brought"),
    [
        (1 << 40, {}, True),
        (1 << 20, {}, False),  # it does not fit
        (1 << 20, {"preload": True}, True),
        (1 << 40, {"preload": False}, False),
        (1 << 40, {"use_mmap": False}, False),  # llama.cpp makes a copy
    ],
)
def test_loading(files, monkeypatch, available, arguments, brought):
    """Before llama.cpp maps the file it is brought in where it fits into what the process may use."""
    monkeypatch.setattr("tsconv.machine.limits.available_memory", lambda: available)
    calls = []
    monkeypatch.setattr(runtime_model.NativeModel, "cache_file", lambda self, progress: calls.append(self.path))
    tsconv.load(files[0], n_threads=1, n_ctx=64, **arguments).close()
    assert calls == [files[0]] * brought


MEMORY = """
import ctypes, sys
from tsconv.native.library import load_backend
from tsconv.machine.limits import available_memory
mine = load_backend().lib.tsffn_available_memory
mine.restype = ctypes.c_uint64
print(available_memory(), mine(None))
"""


def test_available_memory_of_this_process():
    """What the library finds is what Python finds, but for what other processes took in between."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=tiny.TIMEOUT_S, check=False
    )
    python, native = map(int, done.stdout.split())
    assert native == pytest.approx(python, rel=0.1)
