"""Texts that are longer than the checkpoint was made for: one line on stderr, once."""

from __future__ import annotations

import json

import gguf
import pytest

import tsconv
from support import CHECKPOINTS, tiny
from support.edited import edited

WINDOW_KEY = "turbosparse.source.sliding_window"
PROMPT = "In the beginning " * 12


@pytest.fixture(scope="module", params=["window", "trained"])
def model(request, tmp_path_factory):
    """(model, what the warning says): an attention window, or a trained context, of 32 tokens."""
    source, folder = tiny.converted(), tmp_path_factory.mktemp(request.param)
    keys = {WINDOW_KEY: 32} if request.param == "window" else {"llama.context_length": 32}
    target = edited(source, folder / "m.gguf", keys=keys)
    target.with_suffix(".predictor.gguf").symlink_to(source.with_suffix(".predictor.gguf"))
    what = (
        "the checkpoint's attention window of 32" if request.param == "window" else "the 32 the checkpoint was trained"
    )
    return target, what


def warnings(*arguments: object, stdin: bytes = b"") -> list[str]:
    result = tiny.run(*arguments, "-t", 1, stdin=stdin)
    assert result.returncode == 0, result.stderr
    return [line for line in result.stderr.decode().splitlines() if line.startswith(("warning: ", "note: "))]


@pytest.mark.parametrize(("prompt", "n", "warned"), [(PROMPT, 1, True), ("In", 60, True), ("In", 4, False)])
def test_run(model, prompt, n, warned):
    """The prompt alone, or the answer behind it."""
    lines = warnings("run", "-m", model[0], "-p", prompt, "-n", n, "--temp", 0, "-c", 256)
    assert len(lines) == warned
    assert all(model[1] in line and "the text may get worse" in line for line in lines)


def test_json_is_not_disturbed(model):
    result = tiny.run("run", "-m", model[0], "-p", PROMPT, "-n", 1, "-c", 256, "-t", 1, "--json")
    assert json.loads(result.stdout)["n_generated"] == 1


def test_perplexity(model):
    arguments = ("perplexity", "-m", model[0], "-f", CHECKPOINTS / "heldout.txt", "--chunks", 3, "-c")
    (line,) = warnings(*arguments, 64)
    assert line.startswith("warning: 64 tokens are more than ")
    assert model[1] in line
    assert warnings(*arguments, 32) == []


def test_profile(model, tmp_path):
    """More than the trained context is refused there."""
    arguments = ("profile", model[0], "--calib", CHECKPOINTS / "heldout.txt", "--tokens", 128, "--chunk", 64)
    if "window" not in model[1]:
        assert "the chunk is longer than the model's context" in tiny.error_line(tiny.run(*arguments))
        return
    (line,) = (line for line in warnings(*arguments, "--outfile", tmp_path / "s.gguf") if "window" in line)
    assert line.startswith("note: 64 tokens are more than the checkpoint's attention window of 32")


def test_a_window_that_is_none(tmp_path):
    model = edited(tiny.converted(), tmp_path / "m.gguf", keys={WINDOW_KEY: ("wide", gguf.GGUFValueType.STRING)})
    llama = tsconv.load(model, n_threads=1, sparsity="exact")
    assert llama.context_warning(100) is None
    llama.close()
