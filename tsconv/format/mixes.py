"""Mixes: most weights in a K type, and more bits for attention matrices that rounding hurts most.

The names and the choice are llama-quantize's (llama-quant.cpp, llama_tensor_get_type_impl), but for ffn_down, to which
it gives more bits too: gate, up and down of a neuron lie side by side here, and so have one type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gguf import GGMLQuantizationType, LlamaFileType

from tsconv.arch.family import Output
from tsconv.errors import TsconvError
from tsconv.format.types import ROUTER, parse_type
from tsconv.transform.quantize import TYPES, type_name

T = GGMLQuantizationType

ATTENTION = re.compile(r"blk\.(\d+)\.attn_(k|v|output)\.weight")
EIGHT = 8  # experts of Mixtral: beside them attention is small, and takes more bits


@dataclass(frozen=True)
class OutType:
    """What --outtype names: a ggml type, or a mix on top of it.

    Attributes:
        name: as the command line spells it.
        kind: of all weights that the mix says nothing about.
        file_type: `general.file_type` of a mix; None where the type has its own.
        value: (layer, layers) -> the type of attn_v in a mix.
        output: the type of attn_output in a mix.
    """

    name: str
    kind: GGMLQuantizationType
    file_type: LlamaFileType | None = None
    value: Callable[[int, int], GGMLQuantizationType] | None = None
    output: GGMLQuantizationType | None = None


def _more_bits(layer: int, n_layer: int) -> bool:
    """The first and the last eighth of the layers, and every third in between."""
    first = n_layer // 8
    return layer < first or layer >= 7 * n_layer // 8 or (layer - first) % 3 == 2


MIXES = {
    mix.name: mix
    for mix in (
        OutType(
            "q3_K_M",
            T.Q3_K,
            LlamaFileType.MOSTLY_Q3_K_M,
            value=lambda layer, n_layer: T.Q5_K if layer < 2 else T.Q4_K,
            output=T.Q4_K,
        ),
        OutType(
            "q4_K_M",
            T.Q4_K,
            LlamaFileType.MOSTLY_Q4_K_M,
            value=lambda layer, n_layer: T.Q6_K if _more_bits(layer, n_layer) else T.Q4_K,
            output=T.Q4_K,
        ),
        OutType(
            "q5_K_M",
            T.Q5_K,
            LlamaFileType.MOSTLY_Q5_K_M,
            value=lambda layer, n_layer: T.Q6_K if _more_bits(layer, n_layer) else T.Q5_K,
            output=T.Q5_K,
        ),
    )
}


def parse_outtype(text: str) -> OutType:
    """'q4_0', 'Q4_K_M' -> the type or mix. Raises TsconvError that lists the known ones."""
    for name, mix in MIXES.items():
        if name.lower() == text.strip().lower():
            return mix
    try:
        kind = parse_type(text)
    except TsconvError:
        raise TsconvError(f"unknown type {text!r}", expected=f"one of {', '.join([*TYPES, *MIXES])}") from None
    return OutType(type_name(kind), kind)


def mixed(outtype: OutType, outputs: Sequence[Output]) -> dict[str, GGMLQuantizationType]:
    """The types of the tensors that take another one than `outtype.kind`, by name; nothing without a mix."""
    if outtype.value is None or outtype.output is None:
        return {}
    parts = {output.name: match for output in outputs if (match := ATTENTION.fullmatch(output.name))}
    n_layer = 1 + max((int(match[1]) for match in parts.values()), default=-1)
    has_eight = any(ROUTER.search(output.name) and output.shape[0] == EIGHT for output in outputs)
    types = {}
    for name, match in parts.items():
        if match[2] == "output":
            types[name] = T.Q5_K if has_eight else outtype.output
        elif has_eight:
            types[name] = T.Q8_0
        elif match[2] == "v":
            types[name] = outtype.value(int(match[1]), n_layer)
    return {name: kind for name, kind in types.items() if kind != outtype.kind}
