"""How a model is refused: the one line that the command line and `tsconv.load` both give."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import tsconv
from support import tiny
from tsconv.errors import ModelFileError


def sidecar_of(model: Path) -> Path:
    return model.with_suffix(".predictor.gguf")


def put(model: Path, directory: Path, with_sidecar: bool = True) -> Path:
    """A copy of the model as `directory`/m.gguf, beside it its sidecar."""
    target = directory / "m.gguf"
    shutil.copy(model, target)
    if with_sidecar:
        shutil.copy(sidecar_of(model), sidecar_of(target))
    return target


def refusal(model: Path, error: type = ModelFileError, env: dict[str, str] | None = None, **kwargs: str) -> str:
    """The line that both interfaces refuse the model with."""
    options = [f"--{key}={value}" for key, value in kwargs.items()]
    line = tiny.error_line(result := tiny.run("run", "-m", model, "-p", "x", "-t", 1, *options, env=env))
    assert result.returncode == error.exit_code, line
    assert "\n" not in line, line
    assert line.startswith("error: ")
    if env is None:
        with pytest.raises(error) as caught:
            tsconv.load(model, n_threads=1, **kwargs)
        assert f"error: {caught.value}" == line
    return line


def assert_in(line: str, *parts: object) -> None:
    for part in parts:
        assert str(part) in line, line
