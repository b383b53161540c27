"""Writing the sidecar of a model that is there: predictors of any form (docs/format.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType

from tsconv.errors import OutputError
from tsconv.format import forms, layouts
from tsconv.format.header import Header
from tsconv.format.keys import ARCHITECTURE
from tsconv.format.order import shape_of
from tsconv.format.pair import SHARED
from tsconv.format.types import takes_panels
from tsconv.transform.panels import to_panels
from tsconv.write.writer import OutputFiles, StreamedFile, check_output, refuse_inputs

# What a sidecar says as its model does, where the model says it.
COPIED = ("general.name", "general.license", "turbosparse.source.repo", "turbosparse.source.revision", *SHARED)


@dataclass(frozen=True)
class Tensor:
    """One tensor: `rows` uint8 [n_rows, bytes of a row], not in panels, of `shape`, slowest dimension first."""

    what: str
    rows: npt.NDArray[np.uint8]
    kind: GGMLQuantizationType
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Decision:
    """How logits decide, and what they are made of.

    Attributes:
        form: of all predictors.
        thresholds: of each layer.
        comparison: "gt" or "ge".
        ranks: of each layer, for forms with a first matrix.
        input_bits: for matrices of bits1 and bits2.
        about: how the predictors were made, for people.
    """

    form: forms.Form
    thresholds: list[float]
    about: str
    comparison: str = "gt"
    ranks: list[int] | None = None
    input_bits: int | None = None


def check_target(target: Path, model: Path, force: bool) -> None:
    """Before anything is computed. Raises OutputError for a sidecar that could not be written."""
    if target.suffix != ".gguf":
        raise OutputError("bad name of the output", where=target, expected="a name that ends in .predictor.gguf")
    refuse_inputs([target], [model])
    check_output(target, force)


def write(
    path: Path,
    model: Header,
    decision: Decision,
    shapes: list[Tensor],
    tensors_of: Callable[[int], list[list[Tensor]]],
    force: bool,
) -> int:
    """Writes the sidecar of `model`, all or nothing, for predictors that read the FFN's own input. Returns its bytes.

    Args:
        shapes: the tensors of one FFN; only `what`, `kind` and `shape` count, which those of all others share.
        tensors_of: layer -> FFN -> the same with rows. Called once for each layer, in their order, when the file has
            been begun, so that no more than a layer is in memory.
        force: replace an existing file.

    Raises:
        OutputError: the file exists, or cannot be written.
    """
    n_layer, n_ffn, _ = shape_of(model)
    is_moe = bool(model.keys.get("llama.expert_count"))
    file = StreamedFile(path, ARCHITECTURE)
    add_keys(file.header, model, decision, layouts.FORM_VERSION)
    for layer in range(n_layer):
        for e in range(n_ffn):
            for tensor in shapes:
                name = forms.tensor_name(layer, tensor.what, e if is_moe else None)
                file.declare(name, tensor.shape, tensor.kind, tensor.rows.nbytes)
    with OutputFiles([file], [], force) as output:
        file.begin()
        for layer in range(n_layer):
            for e, tensors in enumerate(tensors_of(layer)):
                for tensor in tensors:
                    panels = takes_panels(forms.tensor_name(layer, tensor.what, e if is_moe else None), tensor.kind)
                    file.write(to_panels(tensor.rows, tensor.kind) if panels else tensor.rows)
        return output.commit()[0]


def add_keys(header: gguf.GGUFWriter, model: Header, decision: Decision, version: int) -> None:
    """All keys of a sidecar of `version`; the form is one from FORM_VERSION on."""
    header.add_type("predictor")
    for key in COPIED:
        if key in model.keys:
            header.add_key_value(key, model.keys[key], model.types[key].kind, model.types[key].element)
    header.add_uint32("turbosparse.format_version", version)
    header.add_string(layouts.PREDICTOR.key, layouts.PREDICTOR.other)
    header.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if version >= layouts.FORM_VERSION:
        header.add_string(forms.KEY, decision.form.name)
    header.add_string("turbosparse.predictor.input", "normed")
    if decision.ranks is not None:
        header.add_array("turbosparse.predictor.rank", decision.ranks)
    if decision.input_bits is not None:
        header.add_uint32(forms.INPUT_BITS, decision.input_bits)
    header.add_key_value(
        "turbosparse.predictor.threshold", decision.thresholds, GGUFValueType.ARRAY, GGUFValueType.FLOAT32
    )
    header.add_string("turbosparse.predictor.comparison", decision.comparison)
    header.add_string("turbosparse.predictor.training", decision.about)
