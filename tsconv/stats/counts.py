"""Activation statistics: how often each neuron was on, over what text.

Neurons are always in the order of the checkpoint, also when the profiled model was reordered, so that statistics of any
conversion of one checkpoint can be merged and applied to any other. All counts are integers: merging is exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from tsconv.errors import ModelFileError, TsconvError
from tsconv.format.header import Header

Ints = npt.NDArray[np.int64]

# What is counted for every neuron; the order of struct tsffn_profile's rows (native/include/tsffn.h).
#   gate_positive      gate . x > 0
#   up_positive        up . x > 0
#   active             both: the neuron adds something to the output of an unmasked dReLU layer
#   predicted          the predictor lets it through (without a predictor: every token)
#   predicted_gate     predicted, and gate . x > 0: its up row is read when the model runs
#   predicted_active   predicted, and active: its down row is read when the model runs
COUNTS = ("gate_positive", "up_positive", "active", "predicted", "predicted_gate", "predicted_active")

# What has a histogram: |gate . x|, |up . x| and relu(gate . x) * relu(up . x), each over all neurons and tokens.
HISTOGRAMS = ("gate", "up", "combined")

# Bins of a histogram: four to an octave from 2^-20 to 2^12, linear within it (their edges are the floats with two bits
# of mantissa); one bin below them, which holds 0, and one above.
FIRST_OCTAVE, LAST_OCTAVE, BINS_PER_OCTAVE = -20, 12, 4
N_BINS = (LAST_OCTAVE - FIRST_OCTAVE) * BINS_PER_OCTAVE + 2

MAX_TOKENS = 1 << 48  # of a part; sums of a few counts over all parts then fit into an int64


def bin_edges() -> npt.NDArray[np.float64]:
    """Edges between the bins: float64 [N_BINS - 1]; bin k holds edges[k - 1] <= v < edges[k]."""
    octaves = np.arange(FIRST_OCTAVE, LAST_OCTAVE)[:, None]
    edges = 2.0**octaves * (1 + np.arange(BINS_PER_OCTAVE) / BINS_PER_OCTAVE)
    return np.append(edges.ravel(), 2.0**LAST_OCTAVE)


@dataclass(frozen=True)
class Subject:
    """Whose neurons they are.

    Attributes:
        fingerprint: `turbosparse.source.fingerprint` of the model: equal for all conversions of one checkpoint.
        name: of the model, for people.
        n_layer, n_embd, n_ff: its shape.
        n_expert: 0 for a dense model.
        n_expert_used: experts per token; 0 for a dense model.
        sparsity: "predictor" or "exact": the function whose activations were counted.
    """

    fingerprint: str
    name: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_expert: int
    n_expert_used: int
    sparsity: str

    @property
    def n_ffn(self) -> int:
        """FFNs of a layer: its experts, 1 when it is dense."""
        return max(1, self.n_expert)


@dataclass(frozen=True)
class Source:
    """The text behind some counts, and how it was run. `config` and `revision` are "" where there are none."""

    dataset: str
    config: str
    revision: str
    chunk: int  # tokens run together, the first of them the begin-of-text token
    outtype: str  # ggml type of the model's FFN weights


@dataclass(frozen=True)
class Counts:
    """int64 arrays: tokens [n_layer, n_ffn], which saw each FFN; neurons [6, n_layer, n_ffn, n_ff], in the order of
    COUNTS; histograms [n_layer, 3, N_BINS], in the order of HISTOGRAMS."""

    tokens: Ints
    neurons: Ints
    histograms: Ints

    @classmethod
    def zeros(cls, subject: Subject) -> Counts:
        layers, ffns = subject.n_layer, subject.n_ffn
        return cls(
            np.zeros((layers, ffns), np.int64),
            np.zeros((len(COUNTS), layers, ffns, subject.n_ff), np.int64),
            np.zeros((layers, len(HISTOGRAMS), N_BINS), np.int64),
        )

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.tokens + other.tokens, self.neurons + other.neurons, self.histograms + other.histograms)

    def of(self, name: str) -> Ints:
        """The count `name` of COUNTS: [n_layer, n_ffn, n_ff]."""
        return self.neurons[COUNTS.index(name)]


@dataclass(frozen=True)
class Part:
    """Counts over one text."""

    source: Source
    n_tokens: int  # run through the model
    n_chunks: int
    seeds: tuple[int, ...]  # of the orders in which the text was taken, sorted; empty: from its beginning
    counts: Counts

    def __add__(self, other: Part) -> Part:
        return Part(
            self.source,
            self.n_tokens + other.n_tokens,
            self.n_chunks + other.n_chunks,
            tuple(sorted({*self.seeds, *other.seeds})),
            self.counts + other.counts,
        )


@dataclass(frozen=True)
class Stats:
    """Statistics of one checkpoint, one part per text, sorted by source."""

    subject: Subject
    parts: tuple[Part, ...]

    @cached_property
    def total(self) -> Counts:
        """The sum over all parts."""
        return sum((part.counts for part in self.parts[1:]), self.parts[0].counts)

    @property
    def n_tokens(self) -> int:
        return sum(part.n_tokens for part in self.parts)

    def check_model(self, header: Header) -> None:
        """Refuses a model that these are not the statistics of.

        Raises:
            ModelFileError: another checkpoint, or a model without a fingerprint.
        """
        found = header.keys.get("turbosparse.source.fingerprint")
        if found != self.subject.fingerprint:
            raise ModelFileError(
                "the statistics are of another model",
                where=header.path,
                expected=f"{self.subject.name}, fingerprint {self.subject.fingerprint[:12]}",
                found=found[:12] if isinstance(found, str) else "none",
                fix="profile this model, or name its own statistics",
            )


def common_subject(subjects: Iterable[Subject]) -> Subject:
    """The subject of statistics that can be merged.

    Raises:
        TsconvError: they are of different checkpoints or of different functions.
    """
    ordered = sorted(set(subjects), key=dataclasses.astuple)
    first = ordered[0]
    for other in ordered[1:]:
        if dataclasses.replace(other, name=first.name) != first:
            raise TsconvError(
                "statistics of different models cannot be merged",
                expected=_described(first),
                found=_described(other),
            )
    return first


def merge(many: Sequence[Stats]) -> Stats:
    """The sum of statistics of one checkpoint; the result does not depend on their order.

    Raises:
        TsconvError: they are of different checkpoints or of different functions.
    """
    subject = common_subject(stats.subject for stats in many)
    parts: dict[Source, Part] = {}
    for part in (part for stats in many for part in stats.parts):
        parts[part.source] = parts[part.source] + part if part.source in parts else part
    return Stats(subject, tuple(parts[source] for source in sorted(parts, key=dataclasses.astuple)))


def _described(subject: Subject) -> str:
    return f"{subject.name} (fingerprint {subject.fingerprint[:12]}, sparsity {subject.sparsity})"
