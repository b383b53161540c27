"""`tsconv perplexity` against the PyTorch reference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import Reference

import tsconv
from support import CHECKPOINTS, tiny
from support.edited import edited
from support.random_stats import random_stats, save_stats
from tsconv.errors import ModelFileError
from tsconv.eval.estimate import log_softmax
from tsconv.eval.perplexity import check_baseline, measure, pieces
from tsconv.format.header import read_header
from tsconv.format.keys import FINGERPRINT

NAME = "tiny-turbosparse-mistral"
REPO = "turbosparse.source.repo"
HELDOUT = CHECKPOINTS / "heldout.txt"


@pytest.fixture(scope="module")
def model() -> tsconv.SparseLlama:
    model = tsconv.load(tiny.converted(NAME, "f32"), n_ctx=256, n_threads=1)
    yield model
    model.close()


@pytest.fixture(scope="module")
def sequences(model) -> list[list[int]]:
    return pieces(model, HELDOUT.read_bytes()[:4000], 256)


def torch_log_p(sequences: list[list[int]], sparsity: str) -> torch.Tensor:
    """log p of every position of every sequence, float64 [n, n_vocab]."""
    reference = Reference.load(CHECKPOINTS / NAME)
    logits = [reference.logits(sequence, sparsity=sparsity)[:-1].detach().double() for sequence in sequences]
    return torch.log_softmax(torch.cat(logits), dim=1)


def test_perplexity_equals_the_reference(model, sequences):
    log_p = torch_log_p(sequences, "predictor")
    targets = torch.tensor([token for sequence in sequences for token in sequence[1:]])
    expected = torch.nn.functional.nll_loss(log_p, targets).exp().item()
    quality = measure(model, sequences)
    assert quality.perplexity == pytest.approx(expected, rel=1e-4)
    assert quality.n_tokens == len(targets)
    assert (quality.kl, quality.same_top) == (None, None)
    assert 0 < quality.active < quality.predicted < 0.5


def test_divergence_equals_the_reference(model, sequences):
    """Between the two modes, which are two functions."""
    exact = tsconv.load(tiny.converted(NAME, "f32"), n_ctx=256, n_threads=1, sparsity="exact")
    quality = measure(model, sequences, exact)
    exact.close()
    log_p, log_q = torch_log_p(sequences, "exact"), torch_log_p(sequences, "predictor")
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean").item()
    assert expected > 1e-4
    assert quality.kl == pytest.approx(expected, rel=0.02)
    same = (log_p.argmax(1) == log_q.argmax(1)).double().mean().item()
    assert quality.same_top == pytest.approx(same, abs=2e-3)


def test_log_softmax_of_large_logits():
    found = log_softmax(np.array([[1e4, 1e4, -1e4]], dtype=np.float32))
    assert np.exp(found) == pytest.approx(np.array([[0.5, 0.5, 0.0]]))


def test_command():
    model, baseline = tiny.converted(NAME, "q4_0"), tiny.converted(NAME, "f32")
    arguments = ("perplexity", "-m", model, "-f", HELDOUT, "--baseline", baseline, "-c", 256, "--chunks", 4, "-t", 1)
    answer = json.loads(tiny.run(*arguments, "--json").stdout)
    assert answer["n_tokens"] == 4 * 255
    assert 5 < answer["perplexity"] < 60
    assert 0 < answer["kl"] < 0.3
    text = tiny.run(*arguments).stdout.decode()
    assert f"perplexity  {answer['perplexity']:.4f} over 1020 tokens" in text
    assert f"KL          {answer['kl']:.6f} nats" in text


# ---- baselines


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> dict[str, Path]:
    """Models by name that are, and are not, conversions of the checkpoint."""
    folder, source = tmp_path_factory.mktemp("baselines"), tiny.converted(NAME, "f32")
    checkpoint = CHECKPOINTS / NAME
    shutil.copytree(checkpoint, changed := folder / "changed")
    flip_a_bit(changed, "model.layers.0.mlp.gate_proj.weight")
    stats = save_stats(random_stats(source), folder / "stats.gguf")
    unsigned = {"without": [FINGERPRINT]}
    vocabulary = read_header(source).keys["tokenizer.ggml.tokens"]
    return {
        "another type": tiny.converted(NAME, "q4_0"),
        "another layout": tsconv.convert(checkpoint, folder / "rows.gguf", "q8_0", ffn_layout="rows").model,
        "another order": tsconv.reorder(source, stats, folder / "hot.gguf").model,
        "an older converter": edited(source, folder / "old.gguf", **unsigned),
        "another family": tiny.converted("tiny-turbosparse-mixtral"),
        "another training": tsconv.convert(changed, folder / "changed.gguf", "f32").model,
        "another repository, unsigned": edited(source, folder / "repo.gguf", keys={REPO: "a/b"}, **unsigned),
        "another vocabulary, unsigned": edited(
            source, folder / "vocabulary.gguf", keys={"tokenizer.ggml.tokens": [*vocabulary[:-1], "other"]}, **unsigned
        ),
    }


def flip_a_bit(checkpoint: Path, tensor: str) -> None:
    """In the first weight of `tensor`."""
    for shard in checkpoint.glob("*.safetensors"):
        data = bytearray(shard.read_bytes())
        n = int.from_bytes(data[:8], "little")
        if (entry := json.loads(data[8 : 8 + n]).get(tensor)) is not None:
            data[8 + n + entry["data_offsets"][0]] ^= 1
            shard.write_bytes(data)
            return
    raise AssertionError(tensor)


@pytest.mark.parametrize("kind", ["another type", "another layout", "another order", "an older converter"])
def test_baselines_of_the_same_checkpoint(others, kind):
    check_baseline(read_header(tiny.converted(NAME, "f32")), read_header(others[kind]))


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("another family", FINGERPRINT),
        ("another training", FINGERPRINT),
        ("another vocabulary, unsigned", "tokenizer.ggml.tokens"),
    ],
)
def test_baselines_of_another_checkpoint(others, kind, key):
    arguments = ("-f", HELDOUT, "-c", 64, "--chunks", 1, "-t", 1)
    result = tiny.run("perplexity", "-m", tiny.converted(NAME, "f32"), "--baseline", others[kind], *arguments)
    line = tiny.error_line(result)
    assert result.returncode == ModelFileError.exit_code
    assert line.startswith(f"error: {others[kind]}: the baseline is of another checkpoint than ")
    assert f": key {key}" in line
    assert len(line) < 600


def test_repositories_differ(others, tmp_path):
    """Of two models without a fingerprint."""
    mine = edited(others["an older converter"], tmp_path / "m.gguf", keys={REPO: "a/a"})
    with pytest.raises(ModelFileError, match=f"key {REPO}: expected 'a/a', found 'a/b'"):
        check_baseline(read_header(mine), read_header(others["another repository, unsigned"]))
    check_baseline(read_header(others["an older converter"]), read_header(mine))


def test_measuring_checks_too(model, sequences):
    other = tsconv.load(tiny.converted("tiny-turbosparse-mixtral"), n_ctx=256, n_threads=1)
    with pytest.raises(ModelFileError, match="the baseline is of another checkpoint"):
        measure(model, sequences, other)
    other.close()


def test_text_too_short(tmp_path):
    (tmp_path / "short.txt").write_text("In the beginning")
    arguments = ("-m", tiny.converted(NAME, "f32"), "-f", tmp_path / "short.txt", "-t", 1, "--method", "all")
    result = tiny.run("perplexity", *arguments)
    assert "the text is too short: expected at least 511 tokens" in tiny.error_line(result)
