"""Models generated for benchmarks are as sparse as asked for: quantized, in llama.cpp, in every layer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import tsconv
from tsconv.bench.activity import CAP, ActiveWeights, frequencies
from tsconv.bench.generate import PRESETS
from tsconv.bench.synthetic import Shape, write_checkpoint
from tsconv.stats.collect import collect
from tsconv.stats.counts import COUNTS

N_VOCAB = 2048
N_TOKENS, N_DECODED = 400, 64
SHAPES = {
    "dense": Shape(N_VOCAB, 512, 1792, 8, 4, 4, ranks=(160,) * 4),
    "deep": Shape(N_VOCAB, 512, 896, 8, 4, 32, ranks=(160,) * 32),
    "moe": Shape(N_VOCAB, 512, 1792, 8, 4, 3, ranks=(128, 160, 192), n_expert=8, rope_theta=1e6),
}
CASES = [("dense", 0.10), ("dense", 0.20), ("deep", 0.10), ("moe", 0.15), ("moe", 0.08)]


@dataclass(frozen=True)
class Measured:
    """What happened in a model: shares of the neurons per layer, and counts.

    Attributes:
        prefill, decoding: of ffn_stats().
        tokens: [n_layer, n_ffn] rows that each FFN computed.
        counts: name -> [n_layer, n_ffn, n_ff] rows for which a neuron was so.
        alone: [n_token, n_layer, n_ffn, n_ff] which neurons are active for each of some tokens.
    """

    active: float
    prefill: list[dict[str, float]]
    decoding: list[dict[str, float]]
    tokens: np.ndarray
    counts: dict[str, np.ndarray]
    alone: np.ndarray


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def measured(request, tmp_path_factory) -> Measured:
    kind, active = request.param
    directory: Path = tmp_path_factory.mktemp("generated")
    write_checkpoint(directory / "checkpoint", SHAPES[kind], weights=ActiveWeights(SHAPES[kind], active))
    model = tsconv.load(tsconv.convert(directory / "checkpoint", directory / "m.gguf", "q4_0").model, n_threads=2)
    tokens = np.random.default_rng(0).integers(3, N_VOCAB, N_TOKENS).tolist()

    model.reset_ffn_stats()
    model.token_logits(tokens)
    prefill = model.ffn_stats()
    model.reset_ffn_stats()
    for token in tokens[:N_DECODED]:
        model.eval([token])
    decoding = model.ffn_stats()

    def counted(chunk: list[int]):
        return collect(model, [chunk], source=("random tokens", "", ""), chunk=len(chunk)).stats.total

    total = counted(tokens)
    alone = np.array([counted([token]).of("predicted_active") for token in tokens[:8]]) > 0
    model.close()
    return Measured(active, prefill, decoding, total.tokens, {name: total.of(name) for name in COUNTS}, alone)


def test_active_share(measured):
    """Within one point in every layer, of many tokens at once and one by one."""
    for n_tokens, layers in ((N_TOKENS, measured.prefill), (N_DECODED, measured.decoding)):
        assert all(layer["tokens"] % n_tokens == 0 for layer in layers)
        shares = np.array([layer["active"] / layer["n_ff"] for layer in layers])
        print(f"active {measured.active}: {shares.min():.4f} to {shares.max():.4f}")
        assert shares == pytest.approx(measured.active, abs=0.01)


def test_predictor_decides_well_but_not_perfectly(measured):
    for layer in measured.prefill + measured.decoding:
        assert 1.05 < layer["predicted"] / layer["active"] < 1.3
        assert 0.84 < layer["gate_positive"] / layer["predicted"] < 0.95
    truly, kept = (measured.counts[name].sum((1, 2)) for name in ("active", "predicted_active"))
    print(f"recall {(kept / truly).min():.3f} to {(kept / truly).max():.3f}")
    assert (kept / truly > 0.9).all() and (kept / truly < 0.99).all()
    gate = measured.counts["gate_positive"].sum((1, 2)) / measured.tokens.sum(1) / measured.alone.shape[-1]
    assert (gate > 1.5 * measured.active).all() and (gate < 0.5).all()


def test_frequencies(measured):
    """Few neurons make most activations, anywhere among the others, and others in each FFN."""
    counts = measured.counts["predicted_active"].reshape(-1, measured.alone.shape[-1])
    falling = -np.sort(-counts, axis=1)
    of_80_percent = (falling.cumsum(1) < 0.8 * falling.sum(1, keepdims=True)).mean(1)
    print(f"{of_80_percent.min():.3f} to {of_80_percent.max():.3f} of the neurons make 80 % of the activations")
    if measured.active in {preset.active for preset in PRESETS.values()}:
        assert (of_80_percent > 0.26).all() and (of_80_percent < 0.43).all()
    correlations = np.corrcoef([np.arange(counts.shape[1]), *counts])
    assert np.abs(correlations - np.eye(len(correlations))).max() < 0.2


def test_tokens_differ(measured):
    if measured.alone.shape[2] > 1:
        share = measured.tokens / measured.tokens.mean(1, keepdims=True)
        print(f"experts have {share.min():.2f} to {share.max():.2f} of their part of the tokens")
        assert (share > 0.6).all() and (share < 1.5).all()
    else:
        now, before = measured.alone[1:], measured.alone[:-1]
        shared = (now & before).sum((0, 2, 3)) / now.sum((0, 2, 3))
        print(f"{shared.min():.2f} to {shared.max():.2f} shared with the token before")
        assert (shared > 0.25).all() and (shared < 0.5).all()


def test_seed(tmp_path):
    shape = Shape(320, 64, 96, 4, 2, 2, ranks=(32, 37), n_expert=2)

    def digest(name: str, active: float, seed: int) -> str:
        write_checkpoint(tmp_path / name, shape, weights=ActiveWeights(shape, active, seed))
        return hashlib.sha256((tmp_path / name / "model-00001-of-00001.safetensors").read_bytes()).hexdigest()

    first = digest("a", 0.1, 0)
    assert digest("b", 0.1, 0) == first
    assert len({first, digest("c", 0.1, 1), digest("d", 0.2, 0)}) == 3


@pytest.mark.parametrize("active", [0.01, 0.1, 0.5])
def test_frequencies_have_the_mean_asked_for(active):
    found = frequencies(active, 1000)
    assert found.mean() == pytest.approx(active)
    assert (np.diff(found) <= 0).all() and found[0] <= CAP


@pytest.mark.parametrize("active", [0.0, CAP, float("nan")])
def test_impossible_share(active):
    with pytest.raises(ValueError, match="active: expected more than 0"):
        ActiveWeights(SHAPES["dense"], active)
