"""Versions are said once, in pyproject.toml, or are the same wherever they are said again."""

from __future__ import annotations

import re

import pytest

import tsconv
from support import LLAMA, PYPROJECT, ROOT

VERSION = LLAMA.partition("==")[2]
FOLDERS = ("tsconv", "tests", "checkpoints", "native")
# Pins of everything, and the source distribution that llama.cpp's programs are compiled from.
AGAIN = {
    "constraints.txt": r"^llama_cpp_python==(.+)$",
    "native/programs/CMakeLists.txt": r"/llama_cpp_python-(.+)\.tar",
}


def test_tsconv_says_its_own() -> None:
    assert tsconv.__version__ == PYPROJECT["project"]["version"]


def test_what_builds_tsconv_is_what_it_runs_with() -> None:
    assert LLAMA in PYPROJECT["build-system"]["requires"]


def test_the_version_of_llama_cpp_python_is_in_one_place() -> None:
    files = [ROOT / "Makefile", ROOT / "constraints.txt"]
    files += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".c", ".h")]
    files += (ROOT / "native").rglob("CMakeLists.txt")
    found = {str(path.relative_to(ROOT)) for path in files if VERSION in path.read_text(errors="replace")}
    assert found == set(AGAIN)


@pytest.mark.parametrize("name", AGAIN)
def test_the_places_that_say_it_again(name: str) -> None:
    (said,) = re.findall(AGAIN[name], (ROOT / name).read_text(), re.M)
    assert said == VERSION
