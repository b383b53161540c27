"""`tsconv profile` as people call it: what it prints, what it refuses, and that nothing counted is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import gguf
import pytest

from support import CHECKPOINTS, tiny
from support.random_stats import random_stats, save_stats
from tsconv.commands import profile as profiling
from tsconv.errors import ModelFileError, OutputError
from tsconv.stats import file as stats_file

QUIET = {"OMP_WAIT_POLICY": "passive"}


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the tiny model in a folder of its own, which the tests look through."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in (tiny.converted(), tiny.converted().with_suffix(".predictor.gguf")):
        shutil.copy(name, folder)
    return folder / tiny.converted().name


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes((CHECKPOINTS / "heldout.txt").read_bytes()[:4000])
    return path


def profile(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    return tiny.run("profile", "-t", 2, *arguments, env=QUIET)


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_from_text_to_a_faster_order(model, text, tmp_path):
    """The whole way: count, look, reorder, run."""
    done = profile(model, "--calib", text, "--chunk", 64, "--report", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    stats = model.with_suffix(".stats.gguf")
    lines = done.stdout.decode().splitlines()
    assert lines[0].startswith("counted ") and "tokens/s" in lines[0]
    assert lines[1].startswith(f"{stats}: text.txt at sha256:")
    assert "active" in lines[2] and "recall of the predictor" in lines[2]
    assert lines[-1] == f"      tsconv reorder {model} --profile {stats}"
    assert b"were asked for" in done.stderr
    assert (tmp_path / "report" / "index.html").stat().st_size > 10_000
    assert b"80 % in" in tiny.run("inspect", stats).stdout
    assert tiny.run("reorder", model, "--profile", stats).returncode == 0
    hot = model.with_name(f"{model.stem}-hot.gguf")
    texts = [tiny.run("run", "-m", path, "-p", "And", "-n", 16, "--temp", 0).stdout for path in (model, hot)]
    assert texts[0] == texts[1] != b""


def test_json(model, text):
    done = profile(model, "--calib", text, "--chunk", 64, "--tokens", "128", "--seed", 3, "--json")
    found = json.loads(done.stdout)
    assert found["n_tokens"] == 128
    assert found["tokens_per_s"] == pytest.approx(128 / found["seconds"])
    assert found["stopped"] is None
    loaded = stats_file.load(Path(found["outfile"]))
    assert loaded.n_tokens == 128
    assert loaded.parts[0].seeds == (3,)


def test_builtin_text(model):
    done = profile(model, "--calib", "builtin", "--tokens", "1k", "--chunk", 100)
    assert done.returncode == 0, done.stderr
    assert stats_file.load(model.with_suffix(".stats.gguf")).n_tokens == 1000


def test_chunks_are_whole(model, text):
    """More tokens than asked for, up to a whole chunk; never half a chunk."""
    profile(model, "--calib", text, "--chunk", 100, "--tokens", 150)
    (part,) = stats_file.load(model.with_suffix(".stats.gguf")).parts
    assert (part.n_tokens, part.n_chunks) == (200, 2)


# ---- nothing is lost


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(model, number):
    command = [*tiny.TSCONV, "profile", str(model), "--calib", "builtin", "--chunk", "32", "-t", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | QUIET)
    maps = Path(f"/proc/{process.pid}/maps")
    while str(model) not in maps.read_text():  # from here on it stops after a chunk
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=tiny.TIMEOUT_S)
    assert process.returncode == 130, err
    assert err.decode().endswith("stopped early: interrupted\n")
    assert out.startswith(b"counted ")
    (part,) = stats_file.load(model.with_suffix(".stats.gguf")).parts
    assert part.n_chunks > 0 and part.n_tokens == 32 * part.n_chunks
    assert (part.counts.tokens == part.n_tokens).all()


def test_text_that_breaks_half_way(model, tmp_path):
    """What came before the bad line is in the file, and the exit code tells."""
    good = json.dumps({"text": (CHECKPOINTS / "heldout.txt").read_text()[:3000]})
    broken = tmp_path / "broken.jsonl"
    broken.write_text(f"{good}\n{good}\n{{not json\n{good}\n")
    done = profile(model, "--calib", broken, "--chunk", 64)
    assert done.returncode == 1
    assert b"stopped early: " in done.stderr and b"line 3" in done.stderr
    assert b"Traceback" not in done.stderr
    assert stats_file.load(model.with_suffix(".stats.gguf")).n_tokens > 0


def test_output_that_cannot_be_written_at_the_end(model, text, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    folder.mkdir()

    def remove() -> bool:
        folder.rmdir()
        return True

    with pytest.raises(OutputError, match="the statistics are in ") as error:
        profiling.profile(model, str(text), folder / "s.gguf", chunk=64, should_stop=remove, n_threads=1)
    rescued = Path(str(error.value).rsplit("the statistics are in ", 1)[1])
    assert stats_file.load(rescued).n_tokens == 64
    shutil.rmtree(rescued.parent)

    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(OutputError, match=r"out: folder of the output does not exist; make it"):
        profiling.profile(model, str(text), folder / "s.gguf", chunk=64, should_stop=remove, n_threads=1)


# ---- what is refused: one line, an exit code, and nothing written


def refused(model: Path, *arguments: object) -> str:
    before = files(model.parent)
    line = tiny.error_line(profile(*arguments))
    assert "\n" not in line
    assert files(model.parent) == before
    return line


def test_text_shorter_than_a_chunk(model, text):
    line = refused(model, model, "--calib", text, "--chunk", 4000)
    assert "the text does not fill one chunk: expected at least 3999 tokens, found" in line
    assert "lower --chunk" in line


def test_empty_text(model, tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    assert "no text to calibrate on" in refused(model, model, "--calib", tmp_path / "empty.txt")


def test_binary_file(model, tmp_path):
    (tmp_path / "weights.txt").write_bytes(b"some words\n" + bytes(range(256)) * 40)
    line = refused(model, model, "--calib", tmp_path / "weights.txt")
    assert str(tmp_path / "weights.txt") in line and "byte 11" in line


def test_text_that_is_not_there(model):
    assert "no such text" in refused(model, model, "--calib", "nowhere.txt")


@pytest.mark.parametrize("tokens", ["0", "many", "1.5", "-3"])
def test_bad_number_of_tokens(model, text, tokens):
    assert "not a number of tokens" in refused(model, model, "--calib", text, f"--tokens={tokens}")


def test_chunk_beyond_the_context(model, text):
    line = refused(model, model, "--calib", text, "--chunk", 5000)
    assert "the chunk is longer than the model's context: expected at most 4096, found 5000" in line


def test_report_that_cannot_be_written(model, text, tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(model, model, "--calib", text, "--report", tmp_path / "file" / "report")


def test_existing_output(model, text):
    stats = model.with_suffix(".stats.gguf")
    stats.write_bytes(b"precious")
    assert "output exists" in refused(model, model, "--calib", text)
    assert stats.read_bytes() == b"precious"
    assert profile(model, "--calib", text, "--chunk", 64, "--force").returncode == 0
    assert stats_file.load(stats).n_tokens > 0


def test_output_without_a_folder(model, text, tmp_path):
    line = refused(model, model, "--calib", text, "--outfile", tmp_path / "missing" / "s.gguf")
    assert "folder of the output does not exist" in line


def test_model_that_is_not_there(model, text, tmp_path):
    assert "cannot be read" in refused(model, tmp_path / "none.gguf", "--calib", text)


def test_model_without_a_fingerprint(model, text):
    """One that an older version converted."""
    reader = gguf.GGUFReader(model)
    field = reader.fields["turbosparse.source.fingerprint"]
    data = bytearray(model.read_bytes())
    key = b"turbosparse.source.fingerprint"
    at = data.index(key)
    data[at : at + len(key)] = b"turbosparse.source.fingerprin_"
    model.write_bytes(data)
    assert len(field.parts) > 0
    line = refused(model, model, "--calib", text)
    assert "turbosparse.source.fingerprint" in line and "convert the checkpoint again" in line


def test_truncated_statistics(model, text, tmp_path):
    whole = save_stats(random_stats(model), tmp_path / "whole.gguf").read_bytes()
    for part in range(16):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[: len(whole) * part // 16])
        line = refused(model, model, "--calib", text, "--merge", cut) if part in (0, 7, 15) else None
        assert line is None or str(cut) in line
        with pytest.raises(ModelFileError):
            stats_file.load(cut)


def test_shape_that_the_file_cannot_hold(model, tmp_path):
    """Refused before memory is asked for."""
    path = save_stats(random_stats(model), tmp_path / "s.gguf")
    data = bytearray(path.read_bytes())
    at = data.index(b"llama.feed_forward_length") + len(b"llama.feed_forward_length") + 4
    data[at : at + 4] = (0xFFFFFFFF).to_bytes(4, "little")
    path.write_bytes(data)
    assert "bad shape" in refused(model, "--merge", path, "--outfile", tmp_path / "sum.gguf")


def test_statistics_of_another_model(model, text, tmp_path):
    other = save_stats(random_stats(tiny.converted("tiny-turbosparse-mixtral")), tmp_path / "other.gguf")
    line = refused(model, model, "--calib", text, "--merge", other)
    assert "statistics of different models cannot be merged" in line
    assert not (tmp_path / "sum.gguf").exists()


def test_statistics_of_another_function(model, text, tmp_path):
    other = save_stats(random_stats(model, "exact"), tmp_path / "other.gguf")
    assert "sparsity exact" in refused(model, model, "--calib", text, "--merge", other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "A MODEL and a --calib text are needed"),
        (("m.gguf",), "A MODEL and a --calib text are needed"),
        (("--calib", "builtin"), "A MODEL and a --calib text are needed"),
        (("--merge", "a.gguf"), "--merge without a MODEL needs an --outfile"),
        (("--machine", "m.toml", "--calib", "builtin"), "--machine measures this machine"),
    ],
)
def test_usage(arguments, message):
    result = tiny.run("profile", *arguments)
    assert result.returncode == 2
    assert message in tiny.error_line(result)


# ---- this machine


def test_machine(tmp_path):
    done = tiny.run("profile", "--machine", tmp_path / "mine.toml")
    assert done.returncode == 0, done.stderr
    assert b"GB/s" in done.stdout
    line = tiny.error_line(tiny.run("profile", "--machine", tmp_path / "mine.toml"))
    assert "mine.toml" in line
