"""How good the predictors are on a text: what they miss of it, and what they compute for nothing.

A neuron is active where gate . x > 0 and up . x > 0. Neuron i adds h_i * down_i to the output of its FFN; the energy of
that is (h_i |down_i|)^2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tsconv.errors import ModelFileError, TsconvError
from tsconv.eval.windows import Windows
from tsconv.format import forms
from tsconv.format.header import Header, TensorEntry
from tsconv.format.order import shape_of
from tsconv.format.rows import ffn_rows
from tsconv.runtime.layers import LayersContext
from tsconv.runtime.model import SparseLlama
from tsconv.runtime.sparsity import parse_sparsity
from tsconv.stats.counts import COUNTS, HISTOGRAMS, N_BINS
from tsconv.transform.bundles import PARTS

Floats = npt.NDArray[np.float64]

PIECE = 1 << 22  # weights that are made floats at a time


@dataclass(frozen=True)
class Sums:
    """Sums over tokens and neurons, of one FFN or of several: float64 arrays of one shape, or numbers.

    Attributes:
        tokens: that an FFN saw.
        neurons: n_ff for each token.
        predicted, active, both: neurons that the predictor lets through, that are active, that are both.
        predicted_gate: predicted, and gate . x > 0: those whose row of up is read.
        energy, missed: of all active neurons, of those that the predictor leaves out.
    """

    tokens: Floats
    neurons: Floats
    predicted: Floats
    active: Floats
    both: Floats
    predicted_gate: Floats
    energy: Floats
    missed: Floats

    def total(self) -> Sums:
        """Of all the FFNs."""
        return Sums(**{name: value.sum() for name, value in vars(self).items()})

    def at(self, *index: int) -> Sums:
        """Of a layer, or of one FFN."""
        return Sums(**{name: value[index] for name, value in vars(self).items()})

    def figures(self) -> dict[str, float]:
        """Of sums that are numbers; nan where there was nothing to divide by.

        recall: share of the active neurons that are predicted. precision: share of the predicted ones that are active.
        energy_missed: share of the output energy. predicted, active: mean shares of the neurons.
        predicted_per_active: how many are predicted for each active one.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            return {
                "recall": float(self.both / self.active),
                "precision": float(self.both / self.predicted),
                "energy_missed": float(self.missed / self.energy),
                "predicted": float(self.predicted / self.neurons),
                "active": float(self.active / self.neurons),
                "predicted_per_active": float(self.predicted / self.active),
            }


def measure_predictor(model: SparseLlama, found: Windows, progress: Callable[[int], None] = lambda n: None) -> Sums:
    """Of each FFN: arrays [n_layer, n_ffn].

    Args:
        found: of the text; every token of a window counts.
        progress: called with the number of windows done.

    Raises:
        TsconvError: the model has no predictor, or runs without it.
        BackendError: llama.cpp cannot compute.
    """
    if parse_sparsity(model.sparsity).kind != "predictor":
        raise TsconvError("the model runs without a predictor", where=model.model_path)
    n_layer, n_ffn, n_ff = shape_of(model.header)
    tokens = np.zeros((n_layer, n_ffn), np.int64)
    neurons = np.zeros((n_layer, len(COUNTS), n_ffn, n_ff), np.int64)
    histograms = np.zeros((len(HISTOGRAMS), N_BINS), np.int64)
    with model.profiling() as native, LayersContext(model, found.n_ctx) as layers:
        for i, row in enumerate(found.tokens.tolist()):
            layers.compute([model.token_bos() if model.token_bos() >= 0 else row[0], *row[1:]])
            progress(i + 1)
        for n in range(n_layer):
            native.read_profile(n, tokens[n], neurons[n], histograms)
        squares = np.stack([native.read_squares(n) for n in range(n_layer)])
    weights = np.stack(list(down_energies(model.header)))
    counted = neurons.sum(axis=-1, dtype=np.float64)

    def of(name: str) -> Floats:
        return counted[:, COUNTS.index(name)]

    energies = np.einsum("lcfn,lfn->lcf", squares, weights)
    return Sums(
        tokens=tokens.astype(np.float64),
        neurons=tokens.astype(np.float64) * n_ff,
        predicted=of("predicted"),
        active=of("active"),
        both=of("predicted_active"),
        predicted_gate=of("predicted_gate"),
        energy=energies[:, 0],
        missed=energies[:, 1],
    )


def bytes_per_token(model: Header, sidecar: Header, sums: Sums) -> tuple[float, float]:
    """Weight bytes that decoding a token reads, on average over the text: of predictors, and of gate, up and down.

    Args:
        sums: [n_layer, n_ffn].

    Raises:
        ModelFileError: tensors are missing.
    """
    n_layer, n_ffn, n_ff = shape_of(model)
    is_moe = bool(model.keys.get("llama.expert_count"))
    named = {tensor.name: tensor for tensor in (*model.tensors, *sidecar.tensors)}
    of_predictors = of_neurons = 0.0
    for n in range(n_layer):
        tokens = sums.tokens[n].sum() / max(1, model.keys.get("llama.expert_used_count", 1) if is_moe else 1)
        scale = named.get(forms.tensor_name(n, "scale"))
        of_predictors += 0 if scale is None else scale.n_bytes
        for e in range(n_ffn):
            names = forms.tensors_of(sidecar, n, e if is_moe else None)
            of_predictors += sums.tokens[n, e] / tokens * sum(_named(named, sidecar, name).n_bytes for name in names)
        for part, count in zip(PARTS, (sums.predicted, sums.predicted_gate, sums.both), strict=True):
            name = f"blk.{n}.ffn_{part}{'_exps' if is_moe else ''}.weight"
            of_neurons += count[n].sum() / tokens * _named(named, model, name).n_bytes / (n_ffn * n_ff)
    return float(of_predictors), float(of_neurons)


def _named(named: dict[str, TensorEntry], header: Header, name: str) -> TensorEntry:
    if name not in named:
        raise ModelFileError("the tensor is missing", where=f"{header.path}: {name}", fix="convert again")
    return named[name]


def down_energies(header: Header) -> Iterator[Floats]:
    """|down_i|^2 of the neurons of each layer, float64 [n_ffn, n_ff], in the order of the file.

    Raises:
        ModelFileError: the file cannot be read.
    """
    n_layer, n_ffn, n_ff = shape_of(header)
    step = max(1, PIECE // header.keys["llama.embedding_length"])
    for n in range(n_layer):
        squares = np.empty(n_ffn * n_ff)
        for start in range(0, len(squares), step):
            rows = ffn_rows(header, n, "down", start, min(step, len(squares) - start))
            squares[start : start + step] = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
        yield squares.reshape(n_ffn, n_ff)
