"""llama.cpp's programs: missing, or without the backend."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

import tsconv
from tsconv.errors import BackendError
from tsconv.runtime.programs import command, program_path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where programs are looked for; it is empty."""
    monkeypatch.setattr(tsconv, "__path__", [str(tmp_path)])
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


def put(folder: Path, text: str, mode: int = 0o755) -> None:
    (folder / "llama-server").write_text(text)
    (folder / "llama-server").chmod(mode)


def test_missing(folder):
    with pytest.raises(BackendError, match=r"llama-server is not installed.*make setup.*build/programs\.log"):
        program_path("llama-server")


def test_found(folder):
    put(folder, "#!/bin/sh\n")
    assert program_path("llama-server") == folder / "llama-server"


def test_without_the_backend(folder):
    put(folder, "#!/bin/sh\necho 'Available devices:'\necho 'ggml_backend_tsffn: ggml 1 found, 2 expected' >&2\n")
    with pytest.raises(BackendError, match=r"does not load the sparse backend.*ggml 1 found, 2 expected.*make setup"):
        command("llama-server", [], {})


def test_ends_at_once(folder):
    put(folder, "#!/bin/sh\nexit 127\n")
    with pytest.raises(BackendError, match=r"does not load the sparse backend.*exit status 127"):
        command("llama-server", [], {})


def test_no_program(folder):
    put(folder, "not a program")
    with pytest.raises(BackendError, match="llama-server cannot be run"):
        command("llama-server", [], {})


def test_with_the_backend(folder):
    put(folder, "#!/bin/sh\necho '  TSFFN: sparse FFN'\n")
    found = command("llama-server", ["--port", "1"], {"A": "b"})
    assert found.arguments == [str(folder / "llama-server"), "--port", "1"]
    assert found.environment == {"A": "b"}
