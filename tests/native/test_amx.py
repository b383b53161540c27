"""What compilers may do around AMX's tile loads (native/src/cpu/kernels/amx.h): seen in machine code, without AMX."""

from __future__ import annotations

import platform
import re
import subprocess

import pytest

from support.native_build import ROOT

CPU = ROOT / "native" / "src" / "cpu" / "kernels"
SOURCE = """
#include "amx.h"
#include <immintrin.h>

void load_twice(int64_t * memory, int64_t a, int64_t b) {
    *memory = a;
    LOAD(0, memory, 64);
    *memory = b;
    LOAD(1, memory, 64);
}
"""


def instructions(directory, load: str) -> list[str]:
    """Stores (movq to memory) and tile loads of SOURCE, in the order of the machine code."""
    (source := directory / "loads.c").write_text(f"#define LOAD {load}\n{SOURCE}")
    command = ["cc", "-std=c11", "-O3", "-mamx-tile", f"-I{CPU}", "-S", "-o", "-", source]
    assembly = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"^\s+(tileloadd|movq)\s.*\)", assembly, re.MULTILINE)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is of x86-64")
def test_stores_are_before_the_tile_loads_that_need_them(tmp_path):
    assert instructions(tmp_path, "TSFFN_TILE_LOAD") == ["movq", "tileloadd", "movq", "tileloadd"]


def test_no_others_are_used():
    """The compiler's own tile loads do not say that they read memory."""
    used = {
        source.name: re.findall(r"\b_tile_(?:stream_)?(?:load|store)\w*", source.read_text())
        for source in CPU.iterdir()
    }
    assert not any(used.values()), used
