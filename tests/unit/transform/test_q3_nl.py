"""The type q3_nl: rounding against a reference from the formulas, and the balance of a predictor's matrices."""

from __future__ import annotations

import numpy as np
import pytest

from support import q3_nl as reference
from tsconv.transform import q3_nl


def random_predictor(n_ff: int, rank: int, n_embd: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """Matrices whose rows and columns differ in size."""
    rng = np.random.default_rng(rank)
    fc1 = rng.standard_normal((rank, n_embd)) * rng.uniform(0.2, 3, (rank, 1))
    fc2 = rng.standard_normal((n_ff, rank)) * rng.uniform(0.2, 3, rank) * rng.uniform(0.1, 10, (n_ff, 1))
    return fc1.astype(np.float32), fc2.astype(np.float32)


@pytest.mark.parametrize(("n_ff", "rank"), [(16, 32), (37, 96), (48, 320)])
def test_rounding(n_ff: int, rank: int) -> None:
    """Nearly all weights are those of the reference, which computes in float64, and errors are as small."""
    rng = np.random.default_rng(rank)
    rows = rng.standard_normal((n_ff, rank)).astype(np.float32)
    mean = rng.uniform(0.3, 2, rank).astype(np.float32)
    found = reference.matrix(q3_nl.quantize(rows, mean))
    expected = np.stack([reference.rounded(row, mean) for row in rows.astype(float)])
    assert found.shape == rows.shape
    assert (np.abs(found - expected) > 1e-6).mean() < 0.03  # what a tie changes is passed on
    errors = [reference.expected_square(rows - q, mean.astype(float)).mean() for q in (found, expected)]
    assert errors[0] < 1.05 * errors[1]


def test_errors_cancel() -> None:
    """Beside non-negative activations the errors of a row are much smaller than with rounding to nearest."""
    rng = np.random.default_rng(1)
    rows, mean = rng.standard_normal((16, 256)).astype(np.float32), np.ones(256, np.float32)
    hidden = np.maximum(rng.standard_normal((256, 4096)), 0)

    def loss(found: np.ndarray) -> float:
        return float((((rows - found) @ hidden) ** 2).mean() / ((rows @ hidden) ** 2).mean())

    found = reference.matrix(q3_nl.quantize(rows, mean))
    nearest = np.stack([reference.rounded(row, mean, pass_on=False) for row in rows.astype(float)])
    assert loss(found) < 0.85 * loss(nearest)


def test_extremes() -> None:
    """A row of zeros stays one, other rows are as good whatever their size, and columns may be without importance."""
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((32, 64)).astype(np.float32)
    rows[3] = 0
    rows[5] *= 1e-4
    rows[7] *= 6e4
    mean = np.ones(64, np.float32)
    mean[10:20] = 0
    found = reference.matrix(q3_nl.quantize(rows, mean))
    assert np.all(found[3] == 0)
    for i in (0, 5, 7):
        assert np.square(rows[i] - found[i]).mean() < 0.06 * np.square(rows[i]).mean()
    assert not np.isnan(found).any()


@pytest.mark.parametrize(("n_ff", "rank"), [(16, 32), (48, 96)])
def test_balance(n_ff: int, rank: int) -> None:
    """Columns are of like size, importances what the divided rows of fc1 are long, and the function stays."""
    fc1, fc2 = random_predictor(n_ff, rank)
    balance = q3_nl.balance(fc1, fc2)
    np.testing.assert_allclose(balance.scale, reference.scale(fc1, fc2), rtol=1e-5)
    small, large = fc1 / balance.scale[:, None], fc2 * balance.scale
    np.testing.assert_allclose(balance.importance, np.sqrt((small**2).sum(1)), rtol=1e-5)
    np.testing.assert_allclose(np.sqrt((large**2).mean(0)), balance.importance, rtol=1e-5)
    p = np.random.default_rng(3).standard_normal(fc1.shape[1])
    np.testing.assert_allclose(large @ np.maximum(small @ p, 0), fc2 @ np.maximum(fc1 @ p, 0), rtol=1e-4, atol=1e-4)


def test_balance_of_what_is_not_there() -> None:
    """Rows and columns of zeros, and what is not a number, are left as they are: others tell of bad weights."""
    fc1, fc2 = random_predictor(16, 32)
    fc1[3], fc2[:, 5], fc1[7, 2], fc2[4, 9] = 0, 0, np.nan, np.inf
    balance = q3_nl.balance(fc1, fc2)
    assert all(balance.scale[k] == 1 for k in (3, 5, 7, 9))
    assert np.all(np.isfinite(balance.scale)) and np.all(balance.importance[[3, 9]] >= 0)


def test_sizes() -> None:
    assert (q3_nl.row_bytes(1280), q3_nl.n_weights(522)) == (522, 1280)
