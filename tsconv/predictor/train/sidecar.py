"""Predictors from and to a sidecar (docs/format.md)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from tsconv.errors import ModelFileError
from tsconv.format import forms, layouts, order
from tsconv.format.header import Header, TensorEntry
from tsconv.format.keys import ARCHITECTURE
from tsconv.format.pair import layout_of
from tsconv.format.types import takes_panels
from tsconv.predictor.sidecar import Decision, add_keys
from tsconv.predictor.train.rounding import MIN_BIAS, THRESHOLD, Stored, Types, dequantize
from tsconv.transform import q3_nl
from tsconv.transform.panels import from_panels, to_panels
from tsconv.transform.quantize import row_bytes
from tsconv.write.writer import OutputFiles, StreamedFile

Floats = npt.NDArray[np.float32]
MATRICES = ("fc1", "fc2")
STEEPNESS = 3.0  # standard deviation that logits without a bias are given: a training unit is a factor of e in the odds


def read_ranks(sidecar: Header) -> list[int]:
    """Of each layer. Raises ModelFileError where they do not fit the sidecar."""
    forms.check_is_mlp(sidecar)
    ranks = sidecar.keys.get("turbosparse.predictor.rank")
    n_layer = order.shape_of(sidecar)[0]
    if not isinstance(ranks, list) or len(ranks) != n_layer or not all(type(r) is int and r > 0 for r in ranks):
        raise ModelFileError("bad turbosparse.predictor.rank", where=sidecar.path, expected=f"{n_layer} ranks")
    return ranks


def read_start(sidecar: Header, layer: int, ffn: int) -> tuple[Floats, Floats, Floats]:
    """fc1 [r, n_embd] for normed inputs, fc2 [n_ff, r] and b [n_ff] to begin training with, whose signs of
    fc2 . relu(fc1 . x) - b are what the sidecar's predictor says.

    Raises:
        ModelFileError: matrices are missing, or the file cannot be read.
    """
    keys = sidecar.keys
    fc1, fc2 = read_matrices(sidecar, layer, ffn)
    if keys.get("turbosparse.predictor.input") == "pre_norm":
        name = f"blk.{layer}.ffn_pred_scale.weight"
        fc1 = fc1 * _raw(sidecar, {tensor.name: tensor for tensor in sidecar.tensors}, name).view(np.float32)
    threshold = float(keys["turbosparse.predictor.threshold"][layer])
    # fc1 reads inputs of length sqrt(n_embd): what a logit varies by is told by the matrices
    size = float(np.sqrt(np.einsum("re,re->r", fc1, fc1) @ np.square(fc2).mean(axis=0))) or 1.0
    factor = STEEPNESS / size
    bias = np.full(len(fc2), max(MIN_BIAS, threshold * factor), np.float32)
    return fc1, fc2 * np.float32(factor), bias


def read_matrices(sidecar: Header, layer: int, ffn: int) -> tuple[Floats, Floats]:
    """fc1 [r, n_embd] and fc2 [n_ff, r] as they are stored; raises as `read_start`."""
    forms.check_is_mlp(sidecar)
    n_expert = sidecar.keys.get("llama.expert_count", 0)
    tensors = {tensor.name: tensor for tensor in sidecar.tensors}
    fc1, fc2 = (
        _matrix(sidecar, tensors, forms.tensor_name(layer, what, ffn if n_expert else None)) for what in MATRICES
    )
    return fc1, fc2


def _raw(sidecar: Header, tensors: dict[str, TensorEntry], name: str) -> npt.NDArray[np.uint8]:
    if name not in tensors:
        raise ModelFileError("the tensor is missing", where=f"{sidecar.path}: {name}", fix="make the sidecar again")
    tensor = tensors[name]
    try:
        with open(sidecar.path, "rb") as file:
            file.seek(tensor.offset)
            data = file.read(tensor.n_bytes)
    except OSError as error:
        raise ModelFileError(f"cannot be read: {error.strerror}", where=sidecar.path) from None
    if len(data) != tensor.n_bytes:
        raise ModelFileError("became shorter while it was read", where=sidecar.path, fix="start again")
    return np.frombuffer(data, np.uint8)


def _matrix(sidecar: Header, tensors: dict[str, TensorEntry], name: str) -> Floats:
    raw = _raw(sidecar, tensors, name)
    tensor = tensors[name]
    stored = raw.reshape(tensor.shape[1], -1)
    if layout_of(sidecar) == layouts.PREDICTOR.other and takes_panels(name, tensor.kind):
        stored = from_panels(stored, tensor.kind)
    return dequantize(stored, tensor.kind)


def write(
    path: Path,
    model: Header,
    ranks: Sequence[int],
    types: Sequence[Types],
    predictors: Sequence[Sequence[Stored]],
    about: str,
    force: bool,
    threshold: float = THRESHOLD,
) -> int:
    """Writes the sidecar of a model, all or nothing. Returns its bytes.

    Args:
        ranks, types: of each layer.
        predictors: of each layer and FFN, for normed inputs.
        about: how they were made, for people.
        force: replace an existing file.
        threshold: that their logits must pass.

    Raises:
        OutputError: the file exists, or cannot be written.
    """
    n_layer, n_ffn, _ = order.shape_of(model)
    n_expert, n_embd = model.keys.get("llama.expert_count", 0), model.keys["llama.embedding_length"]
    has_q3_nl = any(q3_nl.KIND in (kinds.fc1, kinds.fc2) for kinds in types)
    file = StreamedFile(path, ARCHITECTURE)
    decision = Decision(forms.MLP, [threshold] * n_layer, about, ranks=list(ranks))
    add_keys(file.header, model, decision, layouts.Q3_NL_VERSION if has_q3_nl else layouts.LAYOUT_VERSION)
    jobs: list[tuple[str, npt.NDArray[np.uint8], GGMLQuantizationType]] = []
    for layer, rank in enumerate(ranks):
        for ffn in range(n_ffn):
            stored, kinds = predictors[layer][ffn], types[layer]
            for what, rows, kind, width in zip(
                MATRICES, (stored.fc1, stored.fc2), (kinds.fc1, kinds.fc2), (n_embd, rank), strict=True
            ):
                name = forms.tensor_name(layer, what, ffn if n_expert else None)
                n_cols = row_bytes(kind, width) if kind == q3_nl.KIND else width
                file.declare(name, (len(rows), n_cols), kind, rows.nbytes)
                jobs.append((name, rows, kind))
    with OutputFiles([file], [], force) as output:
        file.begin()
        for name, rows, kind in jobs:
            file.write(np.ascontiguousarray(to_panels(rows, kind) if takes_panels(name, kind) else rows))
        return output.commit()[0]
