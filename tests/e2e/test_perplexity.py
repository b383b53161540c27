"""`tsconv perplexity` against the PyTorch reference."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch
from reference import Reference

import tsconv
from tsconv.eval.perplexity import log_softmax, measure, pieces

NAME = "tiny-turbosparse-mistral"
HELDOUT = tiny.CHECKPOINTS / "heldout.txt"


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
    reference = Reference.load(tiny.CHECKPOINTS / NAME)
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


def test_text_too_short(tmp_path):
    (tmp_path / "short.txt").write_text("In the beginning")
    result = tiny.run("perplexity", "-m", tiny.converted(NAME, "f32"), "-f", tmp_path / "short.txt", "-t", 1)
    assert "the text is too short: expected at least 511 tokens" in tiny.error_line(result)
