"""Reading the headers of a model and its sidecar as what they are: two files that belong together."""

from __future__ import annotations

from pathlib import Path

from tsconv.errors import ModelFileError
from tsconv.format import order
from tsconv.format.header import Header, read_header
from tsconv.format.keys import ARCHITECTURE, FINGERPRINT
from tsconv.format.summary import check_keys, is_sidecar, sidecar_path

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


def read_sidecar(model: Header) -> Header:
    """The header of the sidecar beside `model`.

    Raises:
        ModelFileError: it is missing, damaged, or another model's.
    """
    path = sidecar_path(model.path)
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


def read_pair(model: Path) -> list[Header]:
    """Headers of the model and, when there is one beside it, its sidecar. Raises as `read_model`, `read_sidecar`."""
    header = read_model(model)
    return [header, read_sidecar(header)] if sidecar_path(model).exists() else [header]
