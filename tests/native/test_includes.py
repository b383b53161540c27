"""The folders of native/src build on each other in one direction: what their files include says so."""

from __future__ import annotations

import re
from pathlib import Path

from support import ROOT

SOURCES = ROOT / "native" / "src"
BASE = "."  # error.h, ggml_iface.h
# folder -> the folders that it knows beside itself
KNOWS = {
    "ggml": {"memory", "model", "cache", "hybrid", "ffn", "cpu/kernels", BASE},  # what ggml sees
    "memory": {"model", "cache", BASE},  # where the bytes of a model are
    "model": {"cache", "hybrid", "ffn", BASE},  # files, and the layers that they make
    "cache": {"ffn", BASE},  # neurons that are read from disk
    "cpu": {"cpu/kernels", "ffn", BASE},  # the CPU as a device
    "hybrid": {"cuda", BASE},  # an FFN that a GPU and the CPU share
    "cuda": {"cpu/kernels", "ffn", BASE},  # the FFN on a CUDA device
    "quantize": {"cpu/kernels"},
    "cpu/kernels": {"ffn"},
    "ffn": {BASE},  # what a layer is, and what a device
    BASE: set(),
}
INCLUDE = re.compile(r'^#include "([^"]+\.(?:h|cuh))"', re.MULTILINE)


def sources() -> list[Path]:
    return [path for path in SOURCES.rglob("*") if path.suffix in (".c", ".h", ".cu", ".cuh")]


def arrows() -> dict[tuple[str, str], list[str]]:
    """(folder, folder whose header it includes) -> the includes."""
    found: dict[tuple[str, str], list[str]] = {}
    for source in sources():
        for name in INCLUDE.findall(source.read_text()):
            header = (source.parent / name).resolve()
            if header.is_relative_to(SOURCES):
                ends = tuple(str(path.parent.relative_to(SOURCES)) for path in (source, header))
                found.setdefault(ends, []).append(f"{source.relative_to(SOURCES)}: {name}")
    return found


def test_every_include_follows_the_order():
    folders = {str(path.parent.relative_to(SOURCES)) for path in sources()}
    assert folders <= set(KNOWS)
    wrong = {ends: what for ends, what in arrows().items() if ends[0] != ends[1] and ends[1] not in KNOWS[ends[0]]}
    assert not wrong


def test_the_order_has_no_circle():
    left = {folder: set(known) for folder, known in KNOWS.items()}
    while left:
        lowest = {folder for folder, known in left.items() if not known}
        assert lowest, f"a circle among {sorted(left)}"
        left = {folder: known - lowest for folder, known in left.items() if folder not in lowest}


def test_nothing_is_allowed_that_is_not_used():
    used = set(arrows())
    assert {(folder, other) for folder, known in KNOWS.items() for other in known} <= used
