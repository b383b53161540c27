"""A summary of a converted file: keys, tensors by type and by part of the model, and its partner file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tsconv.errors import ModelFileError
from tsconv.format.header import Header, TensorEntry, read_header
from tsconv.format.keys import ARCHITECTURE
from tsconv.format.pair import SIDECAR_SUFFIX, check_keys, is_sidecar, layout_of, sidecar_path
from tsconv.transform import bits, q3_nl
from tsconv.transform.quantize import type_name

# Part of the model -> expression that finds its tensors; the first that matches counts.
PARTS = {
    "predictor": r"\.ffn_pred_",
    "ffn": r"\.ffn_(gate|up|down)(_exps)?\.weight$",
    "attention": r"\.attn_(q|k|v|qkv|output)\.weight$",
    "embeddings and output": r"^(token_embd|output)\.weight$",
    "norms and router": r"",
}


def ffn_bytes(header: Header) -> int:
    """Bytes of a model's gate, up and down weights."""
    return sum(tensor.n_bytes for tensor in header.tensors if re.search(PARTS["ffn"], tensor.name))


@dataclass(frozen=True)
class Group:
    """Totals of some tensors."""

    name: str
    n_tensors: int
    n_weights: int
    n_bytes: int


@dataclass(frozen=True)
class Partner:
    """The sidecar beside a model, or the model beside a sidecar."""

    path: Path
    file_bytes: int
    matches: bool


@dataclass(frozen=True)
class FileSummary:
    """What `tsconv inspect` shows.

    `kind` is "model", "sidecar" or "another GGUF file"; `layout` that of a model's FFNs, "rows" or "bundles", or of a
    sidecar's matrices, "rows" or "panels16".
    """

    path: Path
    kind: str
    layout: str | None
    file_bytes: int
    keys: dict[str, Any]
    by_type: list[Group]
    by_part: list[Group]
    tensors: list[TensorEntry]
    partner: Partner | None

    @property
    def n_weights(self) -> int:
        return sum(group.n_weights for group in self.by_type)

    @property
    def tensor_bytes(self) -> int:
        return sum(group.n_bytes for group in self.by_type)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.tensor_bytes / max(1, self.n_weights)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the derived ones included."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "layout": self.layout,
            "file_bytes": self.file_bytes,
            "n_weights": self.n_weights,
            "tensor_bytes": self.tensor_bytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "keys": self.keys,
            "by_type": [dataclasses.asdict(group) for group in self.by_type],
            "by_part": [dataclasses.asdict(group) for group in self.by_part],
            "tensors": [
                {"name": t.name, "shape": t.shape, "type": type_name(t.kind), "offset": t.offset, "n_bytes": t.n_bytes}
                for t in self.tensors
            ],
            "partner": None
            if self.partner is None
            else dataclasses.asdict(self.partner) | {"path": str(self.partner.path)},
        }


def summarise_file(header: Header) -> FileSummary:
    """The summary of the file with this header; reads the header of its partner, if that lies beside it.

    Raises:
        ModelFileError: the file is damaged, or breaks a MUST of docs/format.md that its header shows.
    """
    kind = "another GGUF file"
    if header.keys.get("general.architecture") == ARCHITECTURE:
        check_keys(header)
        kind = "sidecar" if is_sidecar(header) else "model"
    tensors = list(header.tensors)
    return FileSummary(
        path=header.path,
        kind=kind,
        layout=layout_of(header) if kind in ("model", "sidecar") else None,
        file_bytes=header.file_bytes,
        keys=header.keys,
        by_type=[_group(name, (t for t in tensors if type_name(t.kind) == name)) for name in _types(tensors)],
        by_part=[group for group in _parts(tensors) if group.n_tensors],
        tensors=tensors,
        partner=_partner(header) if kind in ("model", "sidecar") else None,
    )


def _types(tensors: list[TensorEntry]) -> list[str]:
    return list(dict.fromkeys(type_name(tensor.kind) for tensor in tensors))


def _parts(tensors: list[TensorEntry]) -> list[Group]:
    part_of = {t.name: next(part for part, pattern in PARTS.items() if re.search(pattern, t.name)) for t in tensors}
    return [_group(part, (t for t in tensors if part_of[t.name] == part)) for part in PARTS]


def _group(name: str, tensors: Iterable[TensorEntry]) -> Group:
    members = list(tensors)
    return Group(name, len(members), sum(map(_n_weights, members)), sum(t.n_bytes for t in members))


def _n_weights(tensor: TensorEntry) -> int:
    if tensor.kind == q3_nl.KIND:
        return q3_nl.n_weights(tensor.shape[0]) * prod(tensor.shape[1:])
    return tensor.n_weights * (bits.PER_ELEMENT if tensor.kind in bits.NAMES else 1)


def _partner(header: Header) -> Partner | None:
    """A model's sidecar, or a sidecar's model, if a file has the matching name. A damaged one does not match."""
    name = header.path.name
    if not is_sidecar(header):
        path = sidecar_path(header.path)
    elif name.endswith(SIDECAR_SUFFIX):
        path = header.path.with_name(name.removesuffix(SIDECAR_SUFFIX) + ".gguf")
    else:
        return None
    if not path.exists():
        return None
    try:
        other = read_header(path).keys
    except ModelFileError:
        other = {}
    shared = ("turbosparse.pair_id", "turbosparse.neuron_order")
    return Partner(path, path.stat().st_size, all(other.get(key) == header.keys.get(key) for key in shared))
