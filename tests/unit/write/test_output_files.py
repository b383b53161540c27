"""Files that are replaced: whoever writes at the same time, and wherever the process is killed."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from support.sampled_stats import sampled
from support.synthetic import SHAPES, random_tensors, save
from tsconv import convert
from tsconv.bench.synthetic import Shape
from tsconv.errors import ModelFileError, OutputError
from tsconv.report.write import PAGE, write_report
from tsconv.runtime.binding import open_model
from tsconv.write import writer
from tsconv.write.writer import OutputFiles, StreamedFile, write_file

OUTPUT = 6
PAIR, ALONE = SHAPES["mistral"], SHAPES["bamboo"]  # with a sidecar, without
FILES = {PAIR: ["m.gguf", "m.predictor.gguf"], ALONE: ["m.gguf"]}

# ---- killed while files are put in their places

# `tsconv ARGUMENTS`, killed when it is about to rename or remove a file for the n-th time.
KILLED = """
import os, pathlib, signal, sys
left = int(sys.argv.pop(1))
def counted(step):
    def call(*arguments, **options):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return step(*arguments, **options)
    return call
os.replace, pathlib.Path.unlink = counted(os.replace), counted(pathlib.Path.unlink)
from tsconv.cli import main
main()
"""


def opens(model: Path) -> bool:
    """Whether model and sidecar can be run; if not, one line says why."""
    try:
        open_model(model, None, None).close()
    except ModelFileError as error:
        assert "\n" not in str(error)
        return False
    return True


@pytest.mark.parametrize(
    ("old", "new", "step"),
    [
        (None, PAIR, 0),
        (None, PAIR, 1),
        (PAIR, PAIR, 0),
        (PAIR, PAIR, 1),
        (ALONE, PAIR, 1),
        (PAIR, ALONE, 0),
        (PAIR, ALONE, 1),
    ],
)
def test_killed(old: Shape | None, new: Shape, step: int, run: Callable, tmp_path: Path) -> None:
    """The old model or the new one is whole, at the latest when the next conversion begins; nothing is in its way."""
    model = tmp_path / "out" / "m.gguf"
    model.parent.mkdir()
    checkpoints = {shape: save(tmp_path / str(shape.ranks), shape, random_tensors(shape)) for shape in (PAIR, ALONE)}
    if old is not None:
        convert(checkpoints[old], model)
    arguments = ["convert", checkpoints[new], "--outfile", model]
    command = [sys.executable, "-c", KILLED, str(step), *map(str, arguments), "--force"]
    killed = subprocess.run(command, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()

    opens(model)
    code, _, err = run(*arguments)
    if old is None and step == 0:
        assert code == 0, err
    else:
        assert code == OUTPUT
        assert "output exists" in err and err.count("\n") == 1
    assert opens(model)

    code, _, err = run(*arguments, "--force")
    assert (code, err) == (0, "")
    assert opens(model)
    assert sorted(os.listdir(model.parent)) == FILES[new]


def begun(model: Path, force: bool = False) -> OutputFiles:
    """A model and a sidecar without tensors, ready to be renamed."""
    files = [StreamedFile(path, "turbosparse") for path in (model, model.with_suffix(".predictor.gguf"))]
    output = OutputFiles(files, [], force)
    for file in files:
        file.header.add_string("turbosparse.pair_id", str(id(files)))
        file.begin()
    return output


def test_model_that_cannot_be_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sidecar is in place already: the model is kept, and the next conversion puts it there."""
    model, rename = tmp_path / "m.gguf", os.replace
    model.write_text("old")

    def only_the_sidecar(source: Path, target: Path) -> None:
        if target == model:
            raise OSError(1, "Operation not permitted")
        rename(source, target)

    monkeypatch.setattr(os, "replace", only_the_sidecar)
    line = r"m\.gguf: cannot be written: .*; the new model is .*m\.gguf\.part"
    with pytest.raises(OutputError, match=line), begun(model, force=True) as output:
        output.commit()
    new = (tmp_path / "m.gguf.part").read_bytes()
    monkeypatch.undo()
    with pytest.raises(OutputError, match="output exists"):
        begun(model)
    assert model.read_bytes() == new
    assert sorted(os.listdir(tmp_path)) == FILES[PAIR]


def test_interrupted_between_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.replace

    def rename_and_signal(source: Path, target: Path) -> None:
        rename(source, target)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(os, "replace", rename_and_signal)
    with pytest.raises(KeyboardInterrupt), begun(tmp_path / "m.gguf") as output:
        output.commit()
    assert sorted(os.listdir(tmp_path)) == FILES[PAIR]


def test_output_that_came_to_exist(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="output exists"), begun(tmp_path / "m.gguf") as output:
        (tmp_path / "m.gguf").write_text("precious")
        output.commit()
    assert os.listdir(tmp_path) == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_text() == "precious"


# ---- several processes


@pytest.mark.parametrize("last", [os.unlink, lambda part: os.replace(part, part.with_suffix(""))])
def test_lock_of_a_file_that_is_gone(
    last: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last owner removes or renames the .part file when the next one has opened it and not yet locked it."""
    flock, owner = fcntl.flock, [last]

    def after_the_owner(fd: int, operation: int) -> None:
        if owner:
            owner.pop()(tmp_path / "m.gguf.part")
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", after_the_owner)
    first, second = (StreamedFile(tmp_path / "m.gguf", "llama") for _ in range(2))
    first.begin()
    with pytest.raises(OutputError, match="another process is writing this output"):
        second.begin()
    first.discard()
    assert not (tmp_path / "m.gguf.part").exists()


def test_small_file_by_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "WAIT_SECONDS", 600.0)  # a slow disk, beside other programs
    path, failures = tmp_path / "small.json", []

    def write(letter: bytes) -> None:
        try:
            for _ in range(30):
                write_file(path, letter * 5000, force=True)
        except OutputError as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert path.read_bytes() in (b"a" * 5000, b"b" * 5000, b"c" * 5000)
    assert os.listdir(tmp_path) == ["small.json"]


def locked(part: Path) -> int:
    fd = os.open(part, os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def test_small_file_that_stays_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "WAIT_SECONDS", 0.0)
    fd = locked(tmp_path / "small.json.part")
    with pytest.raises(OutputError, match=r"small\.json\.part: another process is writing this output"):
        write_file(tmp_path / "small.json", b"{}", force=True)
    assert os.listdir(tmp_path) == ["small.json.part"]
    os.close(fd)
    write_file(tmp_path / "small.json", b"{}", force=True)
    assert os.listdir(tmp_path) == ["small.json"]


def test_report_that_another_process_writes(tmp_path: Path) -> None:
    fd = locked(tmp_path / f"{PAGE}.part")
    with pytest.raises(OutputError, match="another process is writing this output"):
        write_report(sampled()[0], tmp_path)
    assert os.listdir(tmp_path) == [f"{PAGE}.part"]
    os.close(fd)
    write_report(sampled()[0], tmp_path)
    assert not list(tmp_path.glob("*.part"))


# ---- what cannot be replaced


def test_output_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    with pytest.raises(OutputError, match=r"pipe: output is not a file that could be replaced"):
        write_file(pipe, b"{}", force=True)
    assert pipe.is_fifo()


def test_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written: File name too long"):
        write_file(tmp_path / ("x" * 300), b"{}", force=False)
