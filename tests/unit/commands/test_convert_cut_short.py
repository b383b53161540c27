"""Conversions that are cut short: signals, file size limits and full disks, each real and in a process of its own."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import ROOT
from support.synthetic import SHAPES, random_tensors, save
from tsconv.bench.synthetic import Shape, write_checkpoint
from tsconv.signals import sigterm_exits
from tsconv.write.writer import OutputFiles, StreamedFile

OUTPUT = 6
TIMEOUT_S = 240  # beside other programs


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that takes some seconds to q4_K: 42 M weights."""
    directory = tmp_path_factory.mktemp("large") / "c"
    write_checkpoint(directory, Shape(320, 1024, 4096, 8, 8, 2, ranks=(1024, 1024)))
    return directory


def start(checkpoint: Path, outfile: Path, *more: str, **options: object) -> subprocess.Popen[str]:
    """`tsconv convert` to a slow type."""
    arguments = [sys.executable, "-m", "tsconv", "convert", str(checkpoint), "--outfile", str(outfile), *more]
    return subprocess.Popen([*arguments, "--outtype", "q4_K"], stdout=-1, stderr=-1, text=True, cwd=ROOT, **options)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Until `path` has content, so that the conversion is under way."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(number: int, code: int, large: Path, out: Path) -> None:
    process = start(large, out)
    wait_for(out.with_name("m.gguf.part"), process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, stdout) == (code, "")
    assert "Traceback" not in stderr


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_interrupted_while_creating(
    number: int, error: type[BaseException], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes when the file is there but its descriptor is not yet kept."""
    create = os.open

    def create_and_signal(*arguments: object) -> int:
        fd = create(*arguments)
        os.kill(os.getpid(), number)
        return fd

    monkeypatch.setattr(os, "open", create_and_signal)
    with pytest.raises(error), sigterm_exits(), OutputFiles([StreamedFile(out, "llama")], [], False) as files:
        files.files[0].begin()


def test_interrupted_replacement_keeps_the_old_file(large: Path, tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(b"precious")
    process = start(large, model, "--force")
    wait_for(tmp_path / "m.gguf.part", process)
    process.terminate()
    process.communicate(timeout=TIMEOUT_S)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("m.gguf", b"precious")]


def test_file_size_limit(large: Path, out: Path) -> None:
    """A write that fails half-way with EFBIG, which every user can provoke."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, 8 << 20))

    process = start(large, out, preexec_fn=limit)
    stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, stdout) == (OUTPUT, "")
    assert "m.gguf.part: cannot be written: File too large" in stderr and stderr.count("\n") == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_disk_fills_up_while_writing(large: Path, small_disk: Path) -> None:
    """There was room when the conversion began (27 MB and the header's allowance), then another program takes it."""
    process = start(large, small_disk / "m.gguf")
    try:
        wait_for(small_disk / "m.gguf.part", process)
        with open(small_disk / "other", "wb", buffering=0) as other, contextlib.suppress(OSError):
            while True:  # until the disk is full; the conversion takes room at the same time
                other.write(bytes(1 << 20))
        stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, stdout) == (OUTPUT, "")
    assert "No space left on device; free some room" in stderr and stderr.count("\n") == 1
    assert os.listdir(small_disk) == ["other"]


def test_not_enough_room_is_seen_before_writing(tmp_path: Path, small_disk: Path) -> None:
    checkpoint = save(tmp_path / "c", SHAPES["bamboo"], random_tensors(SHAPES["bamboo"]))
    with open(small_disk / "other", "wb") as other:
        os.posix_fallocate(other.fileno(), 0, 60 << 20)
    process = start(checkpoint, small_disk / "m.gguf")
    stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, stdout) == (OUTPUT, "")
    assert "not enough room" in stderr and "bytes free" in stderr and stderr.count("\n") == 1
    assert os.listdir(small_disk) == ["other"]


def test_two_conversions_to_one_output(large: Path, tmp_path: Path) -> None:
    """The second one is refused and leaves the first one's file alone."""
    outfile = tmp_path / "m.gguf"
    first = start(large, outfile)
    wait_for(outfile.with_name("m.gguf.part"), first)
    first.send_signal(signal.SIGSTOP)  # or it may end before the second one begins
    second = start(large, outfile)
    _, stderr = second.communicate(timeout=TIMEOUT_S)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == OUTPUT
    assert "another process is writing this output" in stderr
    _, stderr = first.communicate(timeout=TIMEOUT_S)
    assert first.returncode == 0, stderr
    assert sorted(os.listdir(tmp_path)) == ["m.gguf", "m.predictor.gguf"]
