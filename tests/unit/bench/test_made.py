"""Weights that are made when they are read are those of a checkpoint that was written."""

from __future__ import annotations

import numpy as np
import pytest

from tsconv.bench.activity import ActiveWeights
from tsconv.bench.made import made_tensors
from tsconv.bench.synthetic import Shape, write_checkpoint
from tsconv.checkpoint.safetensors_reader import open_checkpoint


@pytest.mark.parametrize("n_expert", [0, 3])
def test_made_tensors_are_those_of_the_checkpoint(tmp_path, n_expert):
    shape = Shape(320, 128, 256, 4, 2, 2, ranks=(32, 64), n_expert=n_expert)
    write_checkpoint(tmp_path, shape, weights=ActiveWeights(shape, 0.1))
    written = open_checkpoint(tmp_path)
    made = made_tensors(shape, ActiveWeights(shape, 0.1))
    assert set(made) == set(written)
    names = [*reversed(written), *written]  # in no particular order, and twice
    for name in names:
        assert (made[name].shape, made[name].dtype) == (written[name].shape, written[name].dtype)
        n_rows = written[name].shape[0] if len(written[name].shape) > 1 else 1
        middle = n_rows // 2
        for span in ((0, n_rows), (middle, n_rows)):
            np.testing.assert_array_equal(made[name].read_rows(*span), written[name].read_rows(*span))
