"""What training is made of, beside PyTorch, float64 and loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType

from support import q3_nl as expected_q3_nl
from tsconv.errors import TsconvError
from tsconv.predictor.train import objective
from tsconv.predictor.train.calibrate import Curve, Figures, together
from tsconv.predictor.train.fit import adam_
from tsconv.predictor.train.ranks import Layout, candidates, check_budget, choose_ranks
from tsconv.predictor.train.record import groups
from tsconv.predictor.train.rounding import Types
from tsconv.predictor.train.samples import BLOCK, SampleFiles, Samples, codes_of, open_samples, values_of_codes
from tsconv.transform import q3_nl

RNG = np.random.default_rng(5)
F32 = GGMLQuantizationType.F32


def test_the_derivative_is_autograds():
    z = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    e, price = torch.rand(7, 12, dtype=torch.float64), 0.3
    ((e * F.softplus(-z) + price * F.softplus(z)) / price).sum().backward()
    assert z.grad is not None
    found = objective.slope_(z.detach().clone(), e / price)
    torch.testing.assert_close(found, z.grad)


def test_the_least_value_is_the_expected_energy():
    """Where E[e] is above the price, the logit that is best is above 0."""
    e, price = torch.tensor([0.0, 0.0, 0.0, 0.9]), 0.2
    z = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([z], max_iter=100)

    def loss():
        optimizer.zero_grad()
        value = (e * F.softplus(-z) + price * F.softplus(z)).mean()
        value.backward()
        return value

    optimizer.step(loss)
    assert z.item() == pytest.approx(np.log(e.mean().item() / price), abs=1e-3)


def test_shares():
    h, down = torch.tensor([[2.0, 4.0], [0.1, 0.0], [0.0, 0.0]]), torch.tensor([4.0, 1.0])
    # energies 16 + 16 = 32 and 0.04; typical 2: the first token is 16 times as large as most, and counts as 4 of them;
    # the second adds little, and counts little
    torch.testing.assert_close(objective.shares(h, down, 2.0), torch.tensor([[2.0, 2.0], [0.02, 0.0], [0.0, 0.0]]))


def test_tokens_that_add_nothing():
    """They have no part in the median, and no weight that is not a number."""
    h, down = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 1e-3], [0.0, 2.0]]), torch.tensor([4.0, 1.0])
    typical = objective.typical_energy(h, down)
    assert typical == pytest.approx(1e-6)
    assert torch.isfinite(objective.shares(h, down, typical)).all()
    assert objective.typical_energy(torch.zeros(3, 2), down) == 1.0


def test_the_price_of_what_may_be_missed():
    e = torch.tensor([0.0, 1.0, 2.0, 3.0, 94.0])
    assert objective.price_of(e, 0.02) == 2.0  # 1 of 100 is left out, 1 + 2 would be too much
    assert objective.price_of(torch.zeros(3), 0.02) == 1.0


def test_adam_is_pytorchs():
    p = torch.randn(5, 3)
    q, m, v = p.clone(), torch.zeros(5, 3), torch.zeros(5, 3)
    p.requires_grad_()
    optimizer = torch.optim.Adam([p], lr=0.01, betas=(0.9, 0.98), eps=1e-10)
    for step in range(1, 6):
        gradient = torch.randn(5, 3)
        p.grad = gradient.clone()
        optimizer.step()
        adam_([q], [gradient], [m], [v], step, 0.01)
        torch.testing.assert_close(q, p.detach(), rtol=1e-5, atol=1e-6)


def test_codes_of_h():
    h = np.exp(RNG.uniform(-10, 10, 1000)).astype(np.float32)
    found = values_of_codes()[codes_of(h)]
    assert (np.abs(np.log2(found / h)) <= 1 / 16 + 1e-6).all()
    assert codes_of(np.array([0, 1e-30, 1e30], np.float32)).tolist() == [0, 1, 255]


def test_samples_come_back(tmp_path):
    """Rows of experts apart, block by block, in any order."""
    files = SampleFiles(tmp_path, range(1), 2, 8, 4)
    x, h = RNG.normal(size=(3 * BLOCK, 8)).astype(np.float32), RNG.uniform(0.5, 2, (3 * BLOCK, 4)).astype(np.float32)
    ffns = np.array([0] * (BLOCK + 10) + [1] * (2 * BLOCK - 10), np.int32)
    files(0, ffns, x, h)
    files(0, ffns, x, h)
    files.close()
    samples = open_samples(tmp_path, 0, 0, "train", 8, 4)
    rows = np.concatenate([x[: BLOCK + 10]] * 2).astype(np.float16)
    assert (samples.n, samples.n_blocks) == (len(rows), 3)
    found, codes = samples.read([2, 0])
    np.testing.assert_array_equal(found, np.concatenate([rows[2 * BLOCK :], rows[:BLOCK]]))
    assert len(codes) == len(found) and (codes > 0).all()
    assert sum(len(batch) for batch, _ in samples.batches(BLOCK)) == len(rows)
    (tmp_path / "layer-0-ffn-0.train.h").write_bytes(b"")
    with pytest.raises(TsconvError, match="became shorter"):
        Samples(samples.path, samples.n, 8, 4).read([0])


def test_activations_that_are_no_numbers(tmp_path):
    files = SampleFiles(tmp_path, range(1), 1, 2, 2)
    with pytest.raises(TsconvError, match="not finite"):
        files(0, np.zeros(1, np.int32), np.ones((1, 2), np.float32), np.array([[np.nan, 1]], np.float32))


def test_the_curve_counts_what_loops_count():
    logits = np.exp(RNG.normal(size=(40, 30))).astype(np.float32) * RNG.choice([-1, 1], (40, 30))
    e, h = RNG.uniform(0, 1, (40, 30)).astype(np.float32), RNG.integers(0, 2, (40, 30)).astype(np.uint8)
    e *= h
    curve = Curve()
    for part in np.array_split(np.arange(40), 3):
        curve.add(logits[part], e[part], h[part])
    threshold = curve.threshold(0.7)  # negative logits alone miss a half
    found, on = curve.at(threshold), logits >= threshold
    assert found.missed == pytest.approx(e[~on].sum() / e.sum(), abs=1e-6) and found.missed <= 0.7
    assert found.predicted == on.sum() / 40 and found.active == h.sum() / 40 and found.both == (on & (h > 0)).sum() / 40
    assert curve.at(threshold * 2 ** (1 / 64)).missed > 0.6
    assert together([found, Figures(0, 9, 9, 9, 9)]) == found


def test_q3_nl_is_read_as_the_tables_say():
    w = RNG.normal(size=(20, 96)).astype(np.float32)
    rows = q3_nl.quantize(w, np.ones(96, np.float32))
    np.testing.assert_array_equal(q3_nl.dequantize(rows), expected_q3_nl.matrix(rows).astype(np.float32))
    doubled = q3_nl.scaled(rows, np.full(20, 2, np.float32))
    np.testing.assert_array_equal(q3_nl.dequantize(doubled), 2 * q3_nl.dequantize(rows))


@pytest.mark.parametrize("kind", [q3_nl.KIND, GGMLQuantizationType.Q8_0, F32])
def test_a_divided_predictor(kind):
    fc1, fc2 = (RNG.normal(size=shape).astype(np.float32) for shape in ((32, 64), (48, 32)))
    types = Types(F32, kind)
    stored = types.store(fc1, fc2, np.ones(32, np.float32))
    before, after = types.read(stored)[1], types.read(types.divided(stored, 1.7))[1]
    error = np.abs(after - before / 1.7).max()
    assert error <= 2e-2 * np.abs(before).max() and (kind != F32 or error < 1e-6)


def test_ranks_that_cost_least():
    """With a loose budget each layer's own best, with a tight one the cheapest that fits."""
    layout = Layout(n_layer=2, n_ffn=1, n_used=1, n_embd=64, n_ff=128, neuron_bytes=768)
    types = Types(F32, F32)
    size = {rank: layout.predictor_bytes(rank, types) for rank in (32, 64)}
    assert size[32] == 32 * 64 * 4 + 128 * 32 * 4

    def layer(few: float, many: float) -> dict[int, Figures]:
        return {32: Figures(1, many, 10, 5, 0.01), 64: Figures(1, few, 10, 5, 0.01)}

    hard, easy = layer(20, 20 + 4 * size[32] / 768), layer(20, 21)  # only the first gains more than the rank costs
    assert choose_ranks([hard, easy], layout, lambda rank: types, None) == [64, 32]
    assert choose_ranks([hard, easy], layout, lambda rank: types, size[64] + size[32]) == [64, 32]
    assert choose_ranks([hard, easy], layout, lambda rank: types, 2 * size[32]) == [32, 32]
    check_budget(layout, lambda rank: types, 2 * size[32])
    with pytest.raises(TsconvError, match="too small for predictors of rank 32: expected --budget 50kB or more"):
        check_budget(layout, lambda rank: types, 2 * size[32] - 1)
    assert candidates(4096) == [256, 512, 768, 1024, 1536, 2048] and candidates(128) == [32, 64, 96]


def test_layers_that_are_recorded_together():
    assert groups(5, 10, 25) == [range(0, 2), range(2, 4), range(4, 5)]
    assert groups(3, 10, 1) == [range(0, 1), range(1, 2), range(2, 3)]
