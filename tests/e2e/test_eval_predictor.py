"""`tsconv eval predictor` beside PyTorch: recall, precision and the output energy that is missed, FFN by FFN."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import Reference

import tsconv
from support import CHECKPOINTS, tiny
from tsconv.commands import profile as profiling
from tsconv.errors import TsconvError
from tsconv.eval.predictor import Sums, down_energies, measure_predictor
from tsconv.eval.windows import Windows, windows
from tsconv.format.header import read_header

NAMES = ("tiny-turbosparse-mistral", "tiny-turbosparse-mixtral")
HELDOUT = CHECKPOINTS / "heldout.txt"
N_CTX, CHUNKS = 64, 6


def expected(name: str, texts: Windows, bos: int) -> dict[str, np.ndarray]:
    """The sums of `Sums`, from the formulas: float64 [n_layer, n_ffn]."""
    model = Reference.load(CHECKPOINTS / name)
    shape = model.config.n_layer, max(1, model.config.n_expert)
    sums = {field: np.zeros(shape) for field in Sums.__dataclass_fields__}
    at = {id(ffn): (n, e) for n, block in enumerate(model.model.layers) for e, ffn in enumerate(block.ffns)}

    def probe(ffn, p, gate, h, logit):
        on, active = ffn.predicted(logit), h > 0
        energy = (h.double() * ffn.down_proj.weight.double().norm(dim=0)) ** 2
        for field, value in (
            ("tokens", torch.ones(len(h))),
            ("neurons", torch.ones_like(h)),
            ("predicted", on),
            ("active", active),
            ("both", on & active),
            ("predicted_gate", on & (gate > 0)),
            ("energy", energy),
            ("missed", energy * ~on),
        ):
            sums[field][at[id(ffn)]] += float(value.sum(dtype=torch.float64))

    with torch.no_grad():
        for row in texts.tokens.tolist():
            model(torch.tensor([[bos, *row[1:]]]), True, probe)
    return sums


@pytest.mark.parametrize("name", NAMES)
def test_f32_is_pytorchs(name):
    model = tsconv.load(tiny.converted(name), n_threads=2)
    texts = windows(model, HELDOUT.read_bytes(), N_CTX, CHUNKS)
    found = measure_predictor(model, texts)
    want = expected(name, texts, model.token_bos())
    model.close()
    for field, values in want.items():
        # f32 sums in another order: a neuron may be on either side of 0
        tolerance = {"tokens": 0, "neurons": 0}.get(field, 1e-3)
        np.testing.assert_allclose(getattr(found, field), values, rtol=tolerance, atol=3 if tolerance else 0)
        assert values.sum() > 0, field
    shares = want["missed"].sum(axis=1) / want["energy"].sum(axis=1)
    assert (shares > 0).all()
    for n, share in enumerate(shares):
        assert found.at(n).total().figures()["energy_missed"] == pytest.approx(share, rel=1e-2)
    total = found.total().figures()
    assert total["recall"] == pytest.approx(want["both"].sum() / want["active"].sum(), rel=1e-3)
    assert total["precision"] == pytest.approx(want["both"].sum() / want["predicted"].sum(), rel=1e-3)
    assert total["predicted_per_active"] == pytest.approx(want["predicted"].sum() / want["active"].sum(), rel=1e-3)
    assert total["active"] == pytest.approx(want["active"].sum() / want["neurons"].sum(), rel=1e-3)


def down_of(name: str) -> np.ndarray:
    """|down_i|^2 of the checkpoint: float64 [n_layer, n_ffn, n_ff]."""
    blocks = Reference.load(CHECKPOINTS / name).model.layers
    return np.array([[(f.down_proj.weight.double() ** 2).sum(dim=0).numpy() for f in b.ffns] for b in blocks])


@pytest.mark.parametrize("layout", ["rows", "bundles"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_down(name, layout, tmp_path):
    path = tsconv.convert(CHECKPOINTS / name, tmp_path / "m.gguf", "f32", ffn_layout=layout).model
    np.testing.assert_allclose(np.stack(list(down_energies(read_header(path)))), down_of(name), rtol=1e-6)


def test_rows_that_were_rounded(tmp_path):
    """Of q4_0, which has the sizes of the checkpoint within its rounding."""
    found = np.stack(list(down_energies(read_header(tiny.converted(NAMES[1], "q4_0")))))
    assert 1e-6 < tiny.nmse(found, down_of(NAMES[1])) < 1e-2


def test_hot_neurons_first(tmp_path):
    """Another order of the neurons changes nothing."""
    path, stats = tiny.converted(NAMES[0]), tmp_path / "stats.gguf"
    profiling.profile(path, str(HELDOUT), stats, n_tokens=640, chunk=64, n_threads=1)
    moved = tsconv.reorder(path, stats, tmp_path / "hot.gguf").model
    found, other = (json.loads(evaluate(m)) for m in (path, moved))
    for key in ("recall", "precision", "energy_missed", "predicted_per_active"):
        assert other[key] == pytest.approx(found[key], rel=1e-3), key


def evaluate(model: Path) -> bytes:
    done = tiny.run("eval", "predictor", "-m", model, "--text", HELDOUT, "-c", N_CTX, "--chunks", 3, "--json", "-t", 1)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_table():
    """A line for each layer and expert, and one for all of them: what --json has."""
    arguments = ("-m", tiny.converted(NAMES[1]), "-f", HELDOUT, "-c", N_CTX, "--chunks", 3, "-t", 1)
    done = tiny.run("eval", "predictor", *arguments)
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.decode().splitlines()
    assert head.split()[:6] == ["layer", "expert", "recall", "precision", "energy", "missed"]
    values = json.loads(evaluate(tiny.converted(NAMES[1])))
    assert len(lines) == 3 * (1 + 8) + 1
    assert values["n_tokens"] == 3 * N_CTX and len(values["layers"]) == 3
    assert sum(expert["tokens"] for expert in values["layers"][0]["experts"]) == 2 * values["n_tokens"]
    assert lines[-1].split()[:3] == ["all", f"{100 * values['recall']:.2f}%", f"{100 * values['precision']:.2f}%"]
    assert lines[1].split()[:2] == ["0", f"{100 * values['layers'][0]['experts'][0]['recall']:.2f}%"]


def test_a_moved_threshold():
    """A higher one lets fewer neurons through."""
    figures = []
    for sparsity in ("predictor", "predictor:1"):
        model = tsconv.load(tiny.converted(), sparsity=sparsity, n_threads=1)
        sums = measure_predictor(model, windows(model, HELDOUT.read_bytes(), N_CTX, 1))
        figures.append(sums.total().figures())
        model.close()
    own, higher = figures
    assert 0 < higher["predicted"] < own["predicted"] and higher["recall"] < own["recall"]


# ---- what cannot be


def test_without_a_predictor(tmp_path):
    model = tsconv.load(tiny.converted(), sparsity="exact", n_threads=1)
    texts = windows(model, HELDOUT.read_bytes(), N_CTX, 2)
    with pytest.raises(TsconvError, match="the model runs without a predictor"):
        measure_predictor(model, texts)
    model.close()
    (tmp_path / "m.gguf").write_bytes(tiny.converted().read_bytes())
    line = tiny.error_line(tiny.run("eval", "predictor", "-m", tmp_path / "m.gguf", "-f", HELDOUT))
    assert "m.predictor.gguf" in line and "\n" not in line


def test_short_text(tmp_path):
    (tmp_path / "short").write_text("And it came to pass")
    line = tiny.error_line(tiny.run("eval", "predictor", "-m", tiny.converted(), "-f", tmp_path / "short"))
    assert "the text is too short: expected at least 1024 tokens" in line
