"""Models to reorder, and what a reordered pair must hold, by other means than the code that made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from support.panels import stored_rows
from support.refused import sidecar_of
from support.synthetic import SHAPES, random_tensors, save
from tsconv import convert

PAIR_ID = "turbosparse.pair_id"


def make(folder: Path, family: str, outtype: str = "q4_0", **options: Any) -> Path:
    """A converted model of `family` in `folder`, its checkpoint beside it."""
    shape = SHAPES[family]
    return convert(save(folder / "c", shape, random_tensors(shape)), folder / "m.gguf", outtype, **options).model


def tensors(path: Path) -> dict[str, tuple[tuple[int, ...], str, np.ndarray]]:
    """Name -> shape, type and the bytes of the rows, in the order of the table."""
    reader = gguf.GGUFReader(path)
    return {t.name: (tuple(t.shape.tolist()), t.tensor_type.name, stored_rows(reader, t)) for t in reader.tensors}


def order_of(name: str, order: list[list[list[int]]]) -> list[list[int]] | None:
    """The neurons of each FFN of a tensor, or None when its rows are no neurons."""
    parts = name.split(".")
    if parts[0] != "blk":
        return None
    layer = order[int(parts[1])]
    if parts[2].removesuffix("_exps") in ("ffn_gate", "ffn_up", "ffn_down"):
        return layer
    if parts[2] == "ffn_pred_fc2":
        return [layer[int(parts[3])]] if parts[3] != "weight" else layer
    return None


def check_rows(original: Path, reordered: Path, order: list[list[list[int]]]) -> None:
    """Every tensor of `reordered` holds the bytes of `original`, its neurons' rows in `order`."""
    before, after = tensors(original), tensors(reordered)
    assert list(before) == list(after)
    moved = 0
    for name, (shape, kind, data) in before.items():
        assert after[name][:2] == (shape, kind)
        neurons = order_of(name, order)
        if neurons is not None:
            rows = data.reshape(len(neurons), len(neurons[0]), -1)
            data = np.concatenate([rows[e][neurons[e]] for e in range(len(neurons))]).reshape(-1)  # noqa: PLW2901
            moved += not np.array_equal(rows.reshape(-1), data)
        np.testing.assert_array_equal(after[name][2], data, err_msg=name)
    assert moved == sum(order_of(name, order) is not None for name in before) > 0


def check_alike(one: Path, two: Path) -> None:
    """Two pairs are the same bytes but for the pair_id, which is as long in both."""
    for a, b in ((one, two), (sidecar_of(one), sidecar_of(two))):
        assert a.exists() == b.exists()
        if a.exists():
            ids = [gguf.GGUFReader(path).get_field(PAIR_ID).contents().encode() for path in (a, b)]
            assert ids[0] != ids[1]
            assert a.read_bytes().replace(ids[0], ids[1]) == b.read_bytes()
