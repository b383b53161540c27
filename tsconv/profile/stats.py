"""Activation statistics: how often each neuron was on, over what text; a GGUF file (docs/format.md).

Neurons are always in the order of the checkpoint, also when the profiled model was reordered, so that statistics of any
conversion of one checkpoint can be merged and applied to any other. All counts are integers: merging is exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGUFValueType

from tsconv.errors import ModelFileError, TsconvError
from tsconv.export.gguf_header import Header, read_header
from tsconv.export.keys import ARCHITECTURE, FORMAT_VERSION
from tsconv.export.writer import OutputFiles, StreamedFile, sigterm_exits

Ints = npt.NDArray[np.int64]

FILE_KIND = "activation-stats"  # general.type

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


# ---- the file

_SUBJECT_KEYS = {
    "name": "general.name",
    "fingerprint": "turbosparse.source.fingerprint",
    "n_layer": "llama.block_count",
    "n_embd": "llama.embedding_length",
    "n_ff": "llama.feed_forward_length",
    "n_expert": "llama.expert_count",
    "n_expert_used": "llama.expert_used_count",
    "sparsity": "turbosparse.stats.sparsity",
}


def check_output(path: Path, subject: Subject, n_parts: int, force: bool = False) -> None:
    """Makes sure that statistics of so many parts can be written to `path`: call it before hours of counting.

    Raises:
        OutputError: the file exists without `force`, or its folder is missing, not writable or too full.
    """
    file = StreamedFile(path, ARCHITECTURE)
    n_values = n_parts * _n_values(subject)
    file.declare("counts", (n_values,), gguf.GGMLQuantizationType.I64, n_values * np.int64().nbytes)
    with OutputFiles([file], [], force):
        pass


def save(stats: Stats, path: Path, force: bool = False) -> int:
    """Writes `stats` to `path`, all or nothing. Returns the size in bytes.

    Raises:
        OutputError: the file exists without `force`, or cannot be written.
    """
    file = StreamedFile(path, ARCHITECTURE)
    tensors = list(_tensors(stats))
    with sigterm_exits(), OutputFiles([file], [], force) as output:
        _add_keys(file.header, stats)
        for name, data in tensors:
            file.declare(name, data.shape, gguf.GGMLQuantizationType.I64, data.nbytes)
        file.begin()
        for _, data in tensors:
            file.write(np.ascontiguousarray(data))
        return output.commit()[0]


def _n_values(subject: Subject) -> int:
    """Counts of one part."""
    return subject.n_layer * (subject.n_ffn * (1 + len(COUNTS) * subject.n_ff) + len(HISTOGRAMS) * N_BINS)


def _add_keys(writer: gguf.GGUFWriter, stats: Stats) -> None:
    writer.add_type(FILE_KIND)
    writer.add_uint32("turbosparse.format_version", FORMAT_VERSION)
    for field, key in _SUBJECT_KEYS.items():
        value = getattr(stats.subject, field)
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    parts = stats.parts
    writer.add_uint32("turbosparse.stats.part_count", len(parts))
    for field in dataclasses.fields(Source):
        writer.add_array(f"turbosparse.stats.{field.name}", [getattr(part.source, field.name) for part in parts])
    for name, values in (("tokens", [part.n_tokens for part in parts]), ("chunks", [part.n_chunks for part in parts])):
        writer.add_key_value(f"turbosparse.stats.{name}", values, GGUFValueType.ARRAY, GGUFValueType.UINT64)
    writer.add_array("turbosparse.stats.seeds", [" ".join(map(str, part.seeds)) for part in parts])


def _tensors(stats: Stats) -> Iterable[tuple[str, Ints]]:
    """(name, int64 array, slowest dimension first), in the order of the file."""
    for p, part in enumerate(stats.parts):
        for n in range(stats.subject.n_layer):
            yield f"part.{p}.blk.{n}.tokens", part.counts.tokens[n]
            for name in COUNTS:
                yield f"part.{p}.blk.{n}.{name}", part.counts.of(name)[n]
            yield f"part.{p}.blk.{n}.histograms", part.counts.histograms[n]


def is_stats(header: Header) -> bool:
    """Whether a file with this header holds activation statistics."""
    return header.keys.get("general.type") == FILE_KIND


def load(path: Path) -> Stats:
    """Reads a file of statistics.

    Raises:
        ModelFileError: it is missing, damaged, truncated, or something else.
    """
    header = read_header(path)
    if header.keys.get("general.architecture") != ARCHITECTURE or not is_stats(header):
        raise ModelFileError(
            "not activation statistics",
            where=path,
            expected=f"general.type {FILE_KIND!r}",
            found=repr(header.keys.get("general.type", "nothing")),
            fix="make some with tsconv profile",
        )
    reader = _Reader(header)
    reader.expect("turbosparse.format_version", FORMAT_VERSION)
    subject = Subject(**{field: reader.typed(key, _TYPES[field]) for field, key in _SUBJECT_KEYS.items()})
    if subject.sparsity not in ("predictor", "exact"):
        raise reader.error("turbosparse.stats.sparsity", "'predictor' or 'exact'", subject.sparsity)
    n_parts = reader.typed("turbosparse.stats.part_count", int)
    if n_parts < 1 or not subject.n_layer or not subject.n_ff:
        raise reader.error("shape", "at least one part, layer and neuron", (n_parts, subject.n_layer, subject.n_ff))
    reader.expect_room(n_parts * _n_values(subject) * np.int64().nbytes)
    columns = {
        field.name: reader.column(field.name, int if field.name == "chunk" else str, n_parts)
        for field in dataclasses.fields(Source)
    }
    tokens, chunks = reader.column("tokens", int, n_parts), reader.column("chunks", int, n_parts)
    if max(tokens) > MAX_TOKENS:
        raise reader.error("turbosparse.stats.tokens", f"at most {MAX_TOKENS}", max(tokens))
    seeds = reader.column("seeds", str, n_parts)
    parts = []
    for p in range(n_parts):
        try:
            seeds_of_part = tuple(map(int, seeds[p].split()))
        except ValueError:
            raise reader.error("turbosparse.stats.seeds", "integers", repr(seeds[p])) from None
        parts.append(
            Part(
                Source(**{name: column[p] for name, column in columns.items()}),
                tokens[p],
                chunks[p],
                seeds_of_part,
                reader.counts(p, subject, tokens[p]),
            )
        )
    return Stats(subject, tuple(parts))


_TYPES = {field.name: str if field.type == "str" else int for field in dataclasses.fields(Subject)}


class _Reader:
    """Keys and tensors of one file, checked while they are taken."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.tensors = {tensor.name: tensor for tensor in header.tensors}

    def error(self, what: str, expected: object, found: object) -> ModelFileError:
        return ModelFileError(f"bad {what}", where=self.header.path, expected=expected, found=found)

    def expect(self, key: str, value: object) -> None:
        if self.header.keys.get(key) != value:
            raise self.error(key, repr(value), repr(self.header.keys.get(key, "nothing")))

    def expect_room(self, n_bytes: int) -> None:
        """Refuses a shape that the file cannot hold, before memory is asked for."""
        if n_bytes > self.header.file_bytes:
            raise self.error("shape", f"counts of at most {self.header.file_bytes} bytes", n_bytes)

    def typed(self, key: str, kind: type) -> Any:
        value = self.header.keys.get(key)
        if type(value) is not kind:
            raise self.error(key, kind.__name__, "nothing" if value is None else repr(value))
        return value

    def column(self, name: str, kind: type, length: int) -> list[Any]:
        values = self.typed(f"turbosparse.stats.{name}", list)
        if len(values) != length or any(type(value) is not kind for value in values):
            raise self.error(f"turbosparse.stats.{name}", f"{length} of {kind.__name__}", f"{len(values)} elements")
        return values

    def tensor(self, name: str, shape: tuple[int, ...]) -> Ints:
        """int64 counts of this shape, slowest dimension first."""
        entry = self.tensors.get(name)
        if entry is None or entry.shape != shape[::-1] or entry.kind != gguf.GGMLQuantizationType.I64:
            found = "nothing" if entry is None else f"{entry.kind.name} {entry.shape[::-1]}"
            raise self.error(name, f"I64 {shape}", found)
        with open(self.header.path, "rb") as file:
            file.seek(entry.offset)
            values = np.fromfile(file, "<i8", entry.n_weights).reshape(shape)
        if (values < 0).any():
            raise self.error(name, "counts", "a negative one")
        return values

    def counts(self, p: int, subject: Subject, n_tokens: int) -> Counts:
        counts = Counts.zeros(subject)
        for n in range(subject.n_layer):
            prefix = f"part.{p}.blk.{n}"
            counts.tokens[n] = self.tensor(f"{prefix}.tokens", (subject.n_ffn,))
            if (counts.tokens[n] > n_tokens).any():
                raise self.error(f"{prefix}.tokens", f"at most {n_tokens}", counts.tokens[n].max())
            for k, name in enumerate(COUNTS):
                counts.neurons[k, n] = self.tensor(f"{prefix}.{name}", (subject.n_ffn, subject.n_ff))
                if (counts.neurons[k, n] > counts.tokens[n][:, None]).any():
                    raise self.error(f"{prefix}.{name}", "no more than the tokens", "more")
            counts.histograms[n] = self.tensor(f"{prefix}.histograms", (len(HISTOGRAMS), N_BINS))
        return counts
