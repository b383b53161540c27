"""Activation statistics as a GGUF file (docs/format.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType

from tsconv.errors import ModelFileError
from tsconv.format.header import Header, read_header
from tsconv.format.keys import ARCHITECTURE, FORMAT_VERSION
from tsconv.signals import sigterm_exits
from tsconv.stats.counts import COUNTS, HISTOGRAMS, MAX_TOKENS, N_BINS, Counts, Ints, Part, Source, Stats, Subject
from tsconv.write.writer import OutputFiles, StreamedFile

FILE_KIND = "activation-stats"  # general.type

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
    for attribute, key in _SUBJECT_KEYS.items():
        value = getattr(stats.subject, attribute)
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
