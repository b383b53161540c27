"""Reading the headers of a model and its sidecar as what they are: two files that belong together."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from tsconv.errors import ModelFileError
from tsconv.format import forms, layouts, order
from tsconv.format.header import Header, TensorEntry, read_header
from tsconv.format.keys import ARCHITECTURE, FINGERPRINT, PredictorKind
from tsconv.transform import q3_nl
from tsconv.transform.quantize import type_name

SIDECAR_SUFFIX = ".predictor.gguf"
PAIR_ID = re.compile(r"[0-9a-f]{32}")
DIGEST = re.compile(r"[0-9a-f]{64}")
EXPERTS_MATRIX = re.compile(r"(blk\.\d+\.ffn_pred_(?:fc[12]|gate|up))\.\d+\.weight$")

# What both files have, and have alike.
SHARED = (
    "turbosparse.pair_id",
    order.KEY,
    FINGERPRINT,
    "llama.block_count",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.expert_count",
)


@dataclass(frozen=True)
class Pair:
    """The headers of a model and of the sidecar that was written with it; None where there is no file beside it."""

    model: Header
    sidecar: Header | None

    @property
    def headers(self) -> tuple[Header, ...]:
        """Of the files that there are, the model first."""
        return (self.model,) if self.sidecar is None else (self.model, self.sidecar)


def read_model(path: Path) -> Header:
    """The header of a converted model.

    Raises:
        ModelFileError: it is missing, damaged, or something else.
    """
    header = read_header(path)
    if header.keys.get("general.architecture") != ARCHITECTURE or header.keys.get("general.type") != "model":
        raise ModelFileError(
            "not a converted model",
            where=path,
            expected=f"architecture {ARCHITECTURE!r}, type 'model'",
            found=f"{header.keys.get('general.architecture')!r}, {header.keys.get('general.type')!r}",
            fix="name the NAME.gguf that tsconv convert or tsconv reorder wrote",
        )
    check_keys(header)
    return header


def read_sidecar(model: Header, path: Path | None = None) -> Header:
    """The header of the sidecar beside `model`, or of the one at `path`.

    Raises:
        ModelFileError: it is missing, damaged, or another model's.
    """
    path = path or sidecar_path(model.path)
    header = read_header(path)
    if header.keys.get("general.architecture") != ARCHITECTURE or not is_sidecar(header):
        raise ModelFileError(
            "not a predictor sidecar",
            where=path,
            expected="type 'predictor'",
            found=repr(header.keys.get("general.type")),
            fix=f"put the sidecar that was written with {model.path} there, or nothing",
        )
    check_keys(header)
    for key in SHARED:
        if header.keys.get(key) != model.keys.get(key):
            raise ModelFileError(
                f"is the sidecar of another model than {model.path}: {key}",
                where=path,
                expected=repr(model.keys.get(key)),
                found=repr(header.keys.get(key)),
                fix="use the two files that were written together",
            )
    return header


def open_pair(model: Path) -> Pair:
    """The model and, when there is one beside it, its sidecar. Raises as `read_model`, `read_sidecar`."""
    header = read_model(model)
    return Pair(header, read_sidecar(header) if sidecar_path(model).exists() else None)


def sidecar_path(model: Path) -> Path:
    """Where the sidecar of `model` is: NAME.predictor.gguf beside NAME.gguf."""
    return model.with_name(model.name.removesuffix(".gguf") + SIDECAR_SUFFIX)


def has_predictor(model: Header) -> bool:
    """Whether a model runs with predictors unless something else is asked for: the checkpoint had some, or there is a
    sidecar beside it, which may have been made later."""
    return model.keys.get("turbosparse.predictor.kind") not in (None, "none") or sidecar_path(model.path).exists()


def is_sidecar(header: Header) -> bool:
    return header.keys.get("general.type") == "predictor"


def layout_of(header: Header) -> str:
    """That of a model's FFNs or of a sidecar's matrices; raises ModelFileError as `LayoutKey.of`."""
    return (layouts.PREDICTOR if is_sidecar(header) else layouts.FFN).of(header)


def check_keys(header: Header) -> None:
    """Refuses a turbosparse file whose keys a reader of these format versions must not accept."""
    expected: dict[str, tuple[Any, ...]]
    if is_sidecar(header):
        has_q3_nl = any(tensor.kind == q3_nl.KIND for tensor in header.tensors)
        versions = (layouts.Q3_NL_VERSION, layouts.FORM_VERSION) if has_q3_nl else layouts.SIDECAR_VERSIONS
        expected = {"turbosparse.format_version": versions}
    else:
        expected = {
            "turbosparse.format_version": layouts.MODEL_VERSIONS,
            "turbosparse.activation": ("drelu",),
            "turbosparse.ffn_down.layout": ("neuron_major",),
            "turbosparse.predictor.kind": get_args(PredictorKind),
        }
    for key, values in expected.items():
        if header.keys.get(key) not in values:
            raise ModelFileError(
                f"bad {key}",
                where=header.path,
                expected=" or ".join(map(repr, values)),
                found=repr(header.keys.get(key, "nothing")),
            )
    pair_id = header.keys.get("turbosparse.pair_id")
    if not isinstance(pair_id, str) or not PAIR_ID.fullmatch(pair_id):
        raise ModelFileError(
            "bad turbosparse.pair_id", where=header.path, expected="32 lower-case hex digits", found=repr(pair_id)
        )
    if FINGERPRINT in header.keys:
        fingerprint_of(header)
    _check_types_of_experts(header)
    layout_of(header)
    if is_sidecar(header):
        order.kind_of(header)
        forms.form_of(header)
    else:
        order.neuron_order(header)


def _check_types_of_experts(header: Header) -> None:
    """Refuses predictors of a layer's experts whose matrices have several types."""
    first: dict[str, TensorEntry] = {}
    for tensor in header.tensors:
        if match := EXPERTS_MATRIX.match(tensor.name):
            other = first.setdefault(match[1], tensor)
            if other.kind != tensor.kind:
                raise ModelFileError(
                    "experts whose predictors have different types",
                    where=f"{header.path}: {tensor.name}",
                    expected=f"{type_name(other.kind)}, as {other.name} has",
                    found=type_name(tensor.kind),
                    fix="convert again",
                )


def fingerprint_of(header: Header) -> str:
    """`turbosparse.source.fingerprint`: equal for all conversions of one checkpoint.

    Raises:
        ModelFileError: the file has none, as those of older versions, or it is no SHA-256.
    """
    found = header.keys.get(FINGERPRINT)
    if not isinstance(found, str) or not DIGEST.fullmatch(found):
        raise ModelFileError(
            f"bad {FINGERPRINT}",
            where=header.path,
            expected="64 lower-case hex digits",
            found="nothing" if found is None else repr(found),
            fix="convert the checkpoint again",
        )
    return found
