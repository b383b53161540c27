"""The order of the neurons in the files: which tensors follow it, and permuting with it. Pure functions of arrays.

An order is an int32 array [n_layer, n_ffn, n_ff], n_ffn = max(1, n_expert): position i of an FFN holds the neuron
order[layer, ffn, i] of the checkpoint. Gate and up rows, neuron-major down rows and the predictor's rows of neurons
move together, whole, and so does the function stay, and every block of a quantized row.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from tsconv.transform.bundles import PARTS

Order = npt.NDArray[np.int32]


def by_tensor(
    order: Order, is_moe: bool, predictor: Mapping[str, int] = MappingProxyType({"fc2": 1})
) -> tuple[dict[str, Order], dict[str, Order]]:
    """The tensors of the model and of the sidecar whose rows are neurons, each with its part of `order`.

    Such a part is [FFNs of the tensor, n_ff]: all those of the layer, or one expert, as often as the tensor has a row
    for each neuron.

    Args:
        predictor: what the sidecar has rows of neurons of -> how many for each neuron.
    """
    model, sidecar = {}, {}
    for n, ffns in enumerate(order):
        for part in PARTS:
            model[f"blk.{n}.ffn_{part}{'_exps' if is_moe else ''}.weight"] = ffns
        for e, ffn in enumerate(ffns):
            for what, n_rows in predictor.items():
                name = f"blk.{n}.ffn_pred_{what}{f'.{e}' if is_moe else ''}.weight"
                sidecar[name] = np.broadcast_to(ffn, (n_rows, len(ffn)))
    return model, sidecar


def inverse(order: Order) -> Order:
    """Where each neuron is: result[..., order[..., i]] = i."""
    positions = np.empty_like(order)
    np.put_along_axis(positions, order, np.arange(order.shape[-1], dtype=order.dtype), axis=-1)
    return positions


def between(stored: Order, wanted: Order) -> Order:
    """Rows of a file in the order `stored` that make one in the order `wanted`: [..., i] is the row that comes i-th."""
    return np.take_along_axis(inverse(stored), wanted, axis=-1)
