"""Without the libraries that one command needs: that command says how to install them, the others work."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support import CHECKPOINTS, PYPROJECT, tiny
from support.sampled_stats import sampled
from support.synthetic import SHAPES, random_tensors, save, write_predictors
from tsconv.extras import EXTRAS
from tsconv.stats import file as stats_file

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Hides a library from imports."""
    return lambda library: monkeypatch.setitem(sys.modules, library, None)


@pytest.fixture(params=["--predictor", "--calib", "--report", "tasks"])
def needing(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str, list[object]]:
    """What needs a library, the library, and the arguments of a command that does it, with outputs in tmp_path/out."""
    out = tmp_path / "out"
    out.mkdir()
    if request.param == "--predictor":
        checkpoint = save(tmp_path / "c", SHAPES["bamboo"], random_tensors(SHAPES["bamboo"]))
        write_predictors(tmp_path / "p", SHAPES["bamboo"], [8] * SHAPES["bamboo"].n_layer)
        arguments = ["convert", checkpoint, "--predictor", tmp_path / "p", "--outfile", out / "m.gguf"]
        return "reading separate predictors", "torch", arguments
    if request.param == "--calib":
        (tmp_path / "t.parquet").write_bytes(b"PAR1")
        arguments = ["profile", tiny.converted(), "--calib", tmp_path / "t.parquet", "--outfile", out / "s.gguf"]
        return "reading Parquet", "pyarrow", arguments
    if request.param == "tasks":
        return "tsconv eval tasks", "lm_eval", ["eval", "tasks", "-m", tiny.converted(), "gsm8k"]
    stats_file.save(sampled()[0], tmp_path / "s.gguf")
    merge = ["profile", "--merge", tmp_path / "s.gguf", "--outfile", out / "sum.gguf"]
    return "a report", "matplotlib", [*merge, "--report", out / "report"]


def test_what_is_missing_is_said(
    needing: tuple[str, str, list[object]], without: Callable[[str], None], run: Run, tmp_path: Path
) -> None:
    what, library, arguments = needing
    without(library)
    code, stdout, stderr = run(*arguments)
    assert (code, stdout) == (1, "")
    assert stderr.startswith(f"error: {what} needs {library}, which cannot be imported (")
    assert stderr.endswith(f"); install it: pip install 'tsconv[{EXTRAS[library]}]'\n")
    assert stderr.count("\n") == 1
    assert os.listdir(tmp_path / "out") == []


def test_the_others_work(without: Callable[[str], None], run: Run, tmp_path: Path) -> None:
    for library in EXTRAS:
        without(library)
    model, stats = tmp_path / "m.gguf", tmp_path / "s.gguf"
    calls: list[list[object]] = [
        ["convert", CHECKPOINTS / "tiny-turbosparse-mistral", "--outfile", model],
        ["profile", model, "--calib", "builtin", "--tokens", "1k", "--chunk", "64", "--outfile", stats],
        ["inspect", stats],
        ["reorder", model, "--profile", stats, "--outfile", tmp_path / "hot.gguf"],
        ["run", "-m", tmp_path / "hot.gguf", "-p", "And", "-n", "2"],
    ]
    for arguments in calls:
        code, _, stderr = run(*arguments)
        assert code == 0, stderr


def test_extras_are_those_of_the_package() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    named = {requirement.partition(">=")[0]: name for name in EXTRAS.values() for requirement in extras[name]}
    assert named == EXTRAS
    assert extras["all"] == [f"tsconv[{','.join(sorted(EXTRAS.values()))}]"]
    assert extras["train"] == extras["separate-predictors"]  # torch under the name of what else needs it
    assert "tsconv[all]" in extras["dev"]
