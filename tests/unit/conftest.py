"""Fixtures of the tests that call the command line in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tsconv import cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`tsconv ARGUMENTS`: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tsconv", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return left.value.code, captured.out, captured.err

    return call


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """The output of a conversion that must fail: its folder has to stay empty."""
    folder = tmp_path / "out"
    folder.mkdir()
    yield folder / "m.gguf"
    assert os.listdir(folder) == []
