"""Limits of the file format are the same in Python, in C and in docs/format.md, and `convert` writes within them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import tsconv
from support import ROOT
from support.synthetic import SHAPES, random_tensors, save
from tsconv.checkpoint import config
from tsconv.cli import place
from tsconv.format import layouts
from tsconv.placement import file as placement_file
from tsconv.runtime import binding
from tsconv.stats import counts
from tsconv.transform import q3_nl

DEFINITION = re.compile(r"^#define TSFFN_(\w+_VERSION|MAX_\w+|N_\w+) +(\(1 << \d+\)|\d+)", re.M)
ROW = re.compile(r"^\| `TSFFN_(MAX_\w+)` \| (?:2\^)?(\d+) \|", re.M)

Run = Callable[..., tuple[int, str, str]]


def in_c() -> dict[str, int]:
    """What native/include/tsffn.h defines, without TSFFN_."""
    text = (ROOT / "native" / "include" / "tsffn.h").read_text()
    found = {}
    for name, value in DEFINITION.findall(text):
        base, _, shift = value.strip("()").partition(" << ")
        found[name] = int(base) << int(shift or 0)
    return found


# name in the header -> where Python says the same
IN_PYTHON = {
    "MODEL_VERSION": (max(layouts.MODEL_VERSIONS),),
    "SIDECAR_VERSION": (max(layouts.SIDECAR_VERSIONS),),
    "Q3_NL_VERSION": (layouts.Q3_NL_VERSION,),
    "FORM_VERSION": (layouts.FORM_VERSION,),
    "MAX_LAYERS": (config.MAX_LAYERS,),
    "MAX_EXPERTS": (config.MAX_EXPERTS,),
    "MAX_DIM": (config.MAX_DIM,),
    "MAX_CONTEXT": (config.MAX_CONTEXT, place.MAX_CONTEXT, placement_file.MAX_CONTEXT),
    "N_COUNTS": (len(counts.COUNTS),),
    "N_HISTOGRAMS": (len(counts.HISTOGRAMS),),
    "N_BINS": (counts.N_BINS,),
    "N_SQUARES": (binding.N_SQUARES,),
}


def test_python_has_the_constants_of_the_header() -> None:
    assert {name: set(values) for name, values in IN_PYTHON.items()} == {name: {n} for name, n in in_c().items()}


def test_predictors_of_q3_nl_have_the_columns_that_the_reader_takes() -> None:
    text = "".join(path.read_text() for path in sorted((ROOT / "native" / "src").rglob("*.h")))
    (shift,) = re.findall(r"TSFFN_Q3_NL_MAX_COLUMNS = 1 << (\d+)", text)
    assert 1 << int(shift) == q3_nl.MAX_COLUMNS


def test_the_specification_has_the_limits_of_the_header() -> None:
    text = (ROOT / "docs" / "format.md").read_text()
    rows = {name: int(digits) for name, digits in ROW.findall(text)}
    limits = {name: value for name, value in in_c().items() if name.startswith("MAX_")}
    assert rows == {name: value if value < 1 << 20 else value.bit_length() - 1 for name, value in limits.items()}


def test_the_longest_context_that_convert_takes_is_one_that_loads(tmp_path: Path, run: Run) -> None:
    shape = SHAPES["bamboo"]
    changes = {"max_position_embeddings": config.MAX_CONTEXT, "sliding_window": config.MAX_U32}
    directory = save(tmp_path / "c", shape, random_tensors(shape), **changes)
    model = tmp_path / "m.gguf"
    assert run("convert", directory, "--outfile", model)[0] == 0
    tsconv.load(model, n_threads=1, n_ctx=256).close()
