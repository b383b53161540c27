"""Reading the order of the neurons from the header of a model or sidecar (docs/format.md)."""

from __future__ import annotations

import numpy as np
from gguf import GGUFValueType

from tsconv.checkpoint.config import MAX_DIM, MAX_EXPERTS, MAX_LAYERS
from tsconv.errors import ModelFileError
from tsconv.format.header import Header, ValueType
from tsconv.transform.neuron_order import Order

KEY = "turbosparse.neuron_order"
CHECKPOINT, HOT_FIRST = "checkpoint", "hot_first"


def layer_key(layer: int) -> str:
    """The key that holds the order of `layer`: i32[n_ffn * n_ff], FFN after FFN."""
    return f"{KEY}.{layer}"


def dimension(header: Header, key: str, most: int, default: int | None = None) -> int:
    """A number of a model or sidecar from 1 to `most`, or `default` where the key is absent.

    Raises:
        ModelFileError: it is missing, or out of its limits.
    """
    value = header.keys.get(key, default)
    least = 1 if default is None else default
    if type(value) is not int or not least <= value <= most:
        found = "nothing" if value is None else repr(value)
        raise ModelFileError(f"bad {key}", where=header.path, expected=f"{least} to {most}", found=found)
    return value


def shape_of(header: Header) -> tuple[int, int, int]:
    """(n_layer, n_ffn, n_ff) of a model or sidecar; raises ModelFileError as `dimension` does."""
    n_layer = dimension(header, "llama.block_count", MAX_LAYERS)
    n_expert = dimension(header, "llama.expert_count", MAX_EXPERTS, 0)
    return n_layer, max(1, n_expert), dimension(header, "llama.feed_forward_length", MAX_DIM)


def kind_of(header: Header) -> str:
    """CHECKPOINT or HOT_FIRST, of a model or sidecar. Raises ModelFileError: something else."""
    kind = header.keys.get(KEY)
    if kind not in (CHECKPOINT, HOT_FIRST):
        raise ModelFileError(
            f"bad {KEY}",
            where=header.path,
            expected=f"{CHECKPOINT!r} or {HOT_FIRST!r}",
            found="nothing" if kind is None else repr(kind),
        )
    return kind


def neuron_order(header: Header) -> Order:
    """The order of a model's neurons: int32 [n_layer, n_ffn, n_ff], the identity where they are as in the checkpoint.

    The identity is a view of one row, not to be written to.

    Raises:
        ModelFileError: the key is missing or unknown, or an array is not there or no permutation.
    """
    n_layer, n_ffn, n_ff = shape_of(header)
    if kind_of(header) == CHECKPOINT:
        return np.broadcast_to(np.arange(n_ff, dtype=np.int32), (n_layer, n_ffn, n_ff))
    return np.stack([_layer_order(header, layer, n_ffn, n_ff) for layer in range(n_layer)])


def _layer_order(header: Header, layer: int, n_ffn: int, n_ff: int) -> Order:
    key, expected = layer_key(layer), ValueType(GGUFValueType.ARRAY, GGUFValueType.INT32, n_ffn * n_ff)
    found = header.types.get(key)
    if found != expected:
        raise ModelFileError(f"bad {key}", where=header.path, expected=expected, found=found or "nothing")
    order = np.array(header.keys[key], np.int32).reshape(n_ffn, n_ff)
    for ffn, neurons in enumerate(order):
        counts = np.bincount(neurons[(neurons >= 0) & (neurons < n_ff)], minlength=n_ff)
        if (counts != 1).any():
            neuron = int(np.flatnonzero(counts != 1)[0])
            raise ModelFileError(
                f"bad {key}",
                where=header.path,
                expected=f"each of {n_ff} neurons once",
                found=f"neuron {neuron} {counts[neuron]} times in FFN {ffn}",
                fix="the file is damaged or was edited: convert and reorder again",
            )
    return order
