"""Odd surroundings: paths that are not UTF-8, streams that are closed or full, another native library, no cache folder,
a working directory that is gone. Each command works, or says one line and exits with another code than 0."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from support import CHECKPOINTS, ROOT, tiny
from support.edited import edited
from tsconv.errors import BackendError, OutputError
from tsconv.native.library import library_path

CHECKPOINT = CHECKPOINTS / "tiny-turbosparse-mistral"
LATIN_1 = os.fsdecode("modèle".encode("latin-1"))  # as on old disks


def tsconv(
    *arguments: object, shell: str = "", cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """`tsconv ARGUMENTS` with the redirections of `shell`."""
    command = ["bash", "-o", "pipefail", "-c", f'"$@" {shell}', "bash", *tiny.TSCONV, *map(os.fspath, arguments)]
    return subprocess.run(
        command, capture_output=True, cwd=cwd, env=os.environ | (env or {}), timeout=tiny.TIMEOUT_S, check=False
    )


def output(result: subprocess.CompletedProcess[bytes]) -> bytes:
    assert (result.returncode, b"Traceback" in result.stderr) == (0, False), result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, statistics, a reordered model, a machine and a text, in a folder whose name is not UTF-8."""
    made = tmp_path_factory.mktemp("odd") / LATIN_1
    made.mkdir()
    for end in (".gguf", ".predictor.gguf"):
        shutil.copy(tiny.converted().with_suffix(end), made / f"m{end}")
    shutil.copy(ROOT / "profiles" / "pc-2080ti.toml", made / "pc.toml")
    (made / f"{LATIN_1}.txt").write_text("And it came to pass in the days of the king. " * 100)
    output(tsconv(*profiling(made)))
    output(tsconv("reorder", made / "m.gguf", "--profile", made / "m.stats.gguf"))
    return made


def profiling(folder: Path) -> tuple[object, ...]:
    size = ("--tokens", "500", "--chunk", "64", "-t", "1")
    return "profile", folder / "m.gguf", "--calib", folder / f"{LATIN_1}.txt", *size


def commands(folder: Path) -> dict[str, tuple[object, ...]]:
    """Every command that ends by itself, on `folder`."""
    model, stats = folder / "m.gguf", ("--profile", folder / "m.stats.gguf")
    hot, text = folder / "m-hot.gguf", folder / f"{LATIN_1}.txt"
    return {
        "convert": ("convert", CHECKPOINT, "--outfile", folder / "new.gguf", "--force"),
        "run": ("run", "-m", model, "-t", "1", "-p", f"In {LATIN_1}", "-n", "3"),
        "inspect": ("inspect", model),
        "inspect statistics": ("inspect", folder / "m.stats.gguf"),
        "profile": (*profiling(folder), "--seed", "1", "--outfile", folder / "new.stats.gguf", "--force"),
        "reorder": ("reorder", model, *stats, "--outfile", folder / "new-hot.gguf", "--force"),
        "place": ("place", hot, *stats, "--machine", folder / "pc.toml", "--force"),
        "perplexity": ("perplexity", "-m", model, "-f", text, "--baseline", hot, "-t", "1", "--chunks", "1"),
        "doctor": ("doctor",),
    }


NAMES = list(commands(Path()))

# ---- paths


@pytest.mark.parametrize("name", NAMES)
def test_path_that_is_not_utf8(name: str, folder: Path) -> None:
    output(tsconv(*commands(folder)[name]))
    assert isinstance(json.loads(output(tsconv(*commands(folder)[name], "--json"))), dict)


def test_checkpoint_whose_name_is_not_utf8(tmp_path: Path) -> None:
    """The name of the files is the folder's, byte for byte; keys hold what UTF-8 can hold of it."""
    shutil.copytree(CHECKPOINT, tmp_path / LATIN_1)
    printed = output(tsconv("convert", LATIN_1, "--outtype", "q8_0", cwd=tmp_path))
    model = tmp_path / f"{LATIN_1}-q8_0.gguf"
    assert os.fsencode(model.name) in printed
    assert model.exists()
    summary = json.loads(output(tsconv("inspect", model, "--json")))
    assert summary["path"] == str(model)
    assert summary["keys"]["general.name"] == "mod\ufffdle"


def test_calibration_text_and_report(folder: Path, tmp_path: Path) -> None:
    output(tsconv(*profiling(folder), "--outfile", tmp_path / "s.gguf", "--report", tmp_path / LATIN_1))
    (text,) = json.loads(output(tsconv("inspect", tmp_path / "s.gguf", "--json")))["texts"]
    assert text["source"]["dataset"] == "mod\ufffdle.txt"
    assert "mod\ufffdle.txt" in (tmp_path / LATIN_1 / "index.html").read_text()


def test_server(folder: Path) -> None:
    shutil.copy(folder / "m.gguf", model := folder / f"{LATIN_1}.gguf")
    shutil.copy(folder / "m.predictor.gguf", folder / f"{LATIN_1}.predictor.gguf")
    command = [*tiny.TSCONV, "serve", "-m", model, "-t", "1", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        line = process.stderr.readline()
        assert line.startswith(b"serving " + os.fsencode(model)), line + process.stderr.read()
        with urllib.request.urlopen(f"{line.split()[3].decode()}/models", timeout=tiny.TIMEOUT_S) as answer:
            assert json.load(answer)["data"][0]["id"] == "mod\ufffdle"
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(tiny.TIMEOUT_S) == 0
        process.stderr.close()


def test_placement_and_machine(folder: Path) -> None:
    output(tsconv(*commands(folder)["place"], "--outfile", folder / f"{LATIN_1}.json"))
    options = ("-t", "1", "--machine", folder / "pc.toml", "--placement", folder / f"{LATIN_1}.json")
    output(tsconv("run", "-m", folder / "m-hot.gguf", "-p", "In", "-n", "2", *options))


@pytest.mark.parametrize("name", ["convert", "run", "inspect", "profile", "reorder", "place", "perplexity"])
def test_path_that_is_too_long(name: str) -> None:
    line = tiny.error_line(tsconv(*commands(Path("x" * 300))[name]))
    assert "\n" not in line
    assert "File name too long" in line or "does not exist" in line


def test_numbers_that_json_has_not(tmp_path: Path) -> None:
    model = edited(tiny.converted(), tmp_path / "m.gguf", keys={"llama.rope.scale": np.float32("nan").item()})

    def refuse(name: str) -> None:
        raise AssertionError(name)

    summary = json.loads(output(tsconv("inspect", model, "--json")), parse_constant=refuse)
    assert summary["keys"]["llama.rope.scale"] is None


# ---- streams


@pytest.mark.parametrize("name", [*NAMES, "--help"])
@pytest.mark.parametrize("shell", [">&-", ">/dev/full"])
def test_stdout_that_cannot_be_written(name: str, shell: str, folder: Path) -> None:
    """Also for files: one that is opened later must not become stdout."""
    result = tsconv(*commands(folder).get(name, [name]), shell=shell)
    lines = [line for line in result.stderr.decode().splitlines() if not line.startswith("note: ")]
    reason = "Bad file descriptor" if shell == ">&-" else "No space left on device"
    if name == "--help":  # click prints it
        assert (result.returncode, lines) == (1, [f"error: {reason}"])
    else:
        assert (result.returncode, lines) == (6, [f"error: stdout: cannot be written: {reason}"])


@pytest.mark.parametrize("name", ["convert", "run", "place"])
@pytest.mark.parametrize("shell", ["2>&-", "2>/dev/full"])
def test_stderr_that_cannot_be_written(name: str, shell: str, folder: Path) -> None:
    assert output(tsconv(*commands(folder)[name], shell=shell))
    assert tsconv(*commands(folder)[name], "--nonsense", shell=shell).returncode == 2


def test_no_streams_at_all(folder: Path) -> None:
    """llama.cpp and others print to the first three descriptors, whatever these have become."""
    result = tsconv(*commands(folder)["convert"], shell="<&- >&- 2>&-")
    assert result.returncode == 6
    output(tsconv("run", "-m", folder / "new.gguf", "-t", "1", "-p", "In", "-n", "2"))


def test_closed_stdin(folder: Path) -> None:
    line = tiny.error_line(tsconv("run", "-m", folder / "m.gguf", shell="<&-"))
    assert line.startswith("error: stdin: cannot read the prompt")


@pytest.mark.parametrize("options", [("convert", CHECKPOINT, "--dry-run"), ("inspect", ROOT / "none")])
def test_reader_that_has_seen_enough(options: tuple[object, ...], folder: Path) -> None:
    command, path, *more = options
    path = folder / "m.gguf" if command == "inspect" else path
    result = tsconv(command, path, *more, "--json", shell="| true")
    assert (result.returncode, result.stderr) == (0, b"")


# ---- the native library


def refused(result: subprocess.CompletedProcess[bytes], error: type, *parts: object) -> None:
    line = tiny.error_line(result)
    assert result.returncode == error.exit_code, line
    assert "\n" not in line
    for part in parts:
        assert str(part) in line


def test_another_library() -> None:
    other = np._core._multiarray_umath.__file__
    env = {"TSCONV_BACKEND": other}
    run = tsconv("run", "-m", tiny.converted(), "-p", "In", env=env)
    refused(run, BackendError, f"{other}: is another library", "unset TSCONV_BACKEND")
    doctor = tsconv("doctor", env=env)
    assert doctor.returncode == 1
    assert b"is another library" in doctor.stdout and doctor.stderr == b""


def test_library_by_a_relative_path(tmp_path: Path) -> None:
    (tmp_path / "backend.so").symlink_to(library_path())
    run = ("run", "-m", tiny.converted(), "-t", "1", "-p", "In", "-n", "2")
    output(tsconv(*run, cwd=tmp_path, env={"TSCONV_BACKEND": "backend.so"}))


# ---- folders


RUN_AUTO = ("run", "-t", "1", "--machine", "auto", "-p", "In", "-n", "2", "-m")


@pytest.mark.parametrize(
    ("env", "where"),
    [
        ({"XDG_CACHE_HOME": "/proc/none"}, "/proc/none/tsconv: cannot keep"),
        ({"XDG_CACHE_HOME": __file__}, f"{__file__}/tsconv: cannot keep"),
        ({"XDG_CACHE_HOME": "", "HOME": "home"}, "no cache folder: expected an absolute HOME, found home"),
    ],
)
def test_no_cache_folder(env: dict[str, str], where: str) -> None:
    refused(tsconv(*RUN_AUTO, tiny.converted(), env=env), OutputError, where, "set XDG_CACHE_HOME")
    refused(tsconv("bench", "--layers", "1", env=env), OutputError, "set XDG_CACHE_HOME")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "doctor"])
def test_working_directory_that_is_gone(name: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    script = 'cd "$0" && rmdir "$0" && exec "$@"'
    for arguments, code in ((commands(folder)[name], 0), (commands(Path())[name], None)):
        command = ["bash", "-c", script, tmp_path / "gone", *tiny.TSCONV, *map(os.fspath, arguments)]
        result = subprocess.run(command, capture_output=True, timeout=tiny.TIMEOUT_S, check=False)
        (tmp_path / "gone").mkdir()
        if code == 0:
            output(result)
        else:
            assert "\n" not in tiny.error_line(result)
