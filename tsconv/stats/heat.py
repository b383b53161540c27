"""How hot a neuron is: the weight rows that are read of it, and the order that puts the hottest first."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tsconv.errors import ModelFileError
from tsconv.stats.counts import Counts, Ints, Stats


def rows_read(counts: Counts, sparsity: str) -> Ints:
    """Weight rows read of every neuron while `counts` were taken: int64 [n_layer, n_ffn, n_ff].

    Divided by the tokens that the model ran it is the neuron's heat: the rows expected to be read of it per token, the
    share of tokens that a router sends to its expert included.

        predictor:  gate of the predicted, up where gate > 0 too, down where up > 0 too
        exact:      gate of all, up where gate > 0, down where up > 0 too

    Args:
        counts: in the order of the checkpoint, or any other.
        sparsity: "predictor" or "exact", the function that the model computes.
    """
    if sparsity == "predictor":
        return counts.of("predicted") + counts.of("predicted_gate") + counts.of("predicted_active")
    if sparsity == "exact":
        return counts.tokens[:, :, None] + counts.of("gate_positive") + counts.of("active")
    raise ValueError(f"sparsity {sparsity!r} is neither 'predictor' nor 'exact'")


def hot_first(rows: Ints) -> npt.NDArray[np.int32]:
    """Neurons of each FFN, the hottest first, ties by neuron number: int32 of the shape of `rows`.

    Args:
        rows: integers that grow with heat, [..., n_ff].

    Returns:
        order, of which position i holds neuron order[..., i].
    """
    return np.argsort(-rows, axis=-1, kind="stable").astype(np.int32)


def hot_order(stats: Stats, shape: tuple[int, int, int]) -> npt.NDArray[np.int32]:
    """`hot_first` for the function that was profiled: int32 [n_layer, n_ffn, n_ff], neurons as the checkpoint has them.

    Args:
        shape: (n_layer, n_ffn, n_ff) of the model to be ordered.

    Raises:
        ModelFileError: the statistics are of a model of another shape.
    """
    subject = stats.subject
    found = (subject.n_layer, subject.n_ffn, subject.n_ff)
    if found != shape:
        raise ModelFileError(
            f"the statistics of {subject.name} do not fit the model",
            expected="{} layers of {} x {} neurons".format(*shape),
            found="{} of {} x {}".format(*found),
            fix="profile this model",
        )
    return hot_first(rows_read(stats.total, subject.sparsity))


def described(stats: Stats) -> str:
    """The texts behind `stats` and their tokens, one line for people."""
    texts: dict[str, int] = {}
    for part in stats.parts:
        source = part.source
        name = " ".join(filter(None, (source.dataset, source.config, source.revision and f"at {source.revision}")))
        texts[name] = texts.get(name, 0) + part.n_tokens
    return "; ".join(f"{name}: {n_tokens} tokens" for name, n_tokens in texts.items())
