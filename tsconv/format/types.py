"""Which ggml type each tensor is stored in: one predicate, one table of defaults."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gguf import GGMLQuantizationType

from tsconv.arch.family import Output
from tsconv.errors import TsconvError
from tsconv.transform import q3_nl, qkv
from tsconv.transform.panels import PANEL_ROWS, PANEL_TYPES
from tsconv.transform.quantize import TYPES, block_size, type_name

T = GGMLQuantizationType

# outtype -> (type of output.weight, type of the predictor's matrices).
#
# output.weight is read whole for every token and is the tensor whose rounding moves the logits most. Quantized files
# take q6_K, as llama.cpp's do, so that the two compare like with like: at 32000 x 4096 it is 107 MB where q8_0 is 139,
# and ggml's q6_K product took 9.6 ms where q8_0's took 12.7 (2 cores, Sapphire-Rapids class, weights not in cache).
# The predictor is read whole for every token, so its bytes weigh as much as those of the neurons it saves; only the
# sign of its output counts. Beside 4-bit weights three bits for fc2 and four for fc1 keep that, beside 16-bit weights
# eight: KL divergence 0.0001 nats (docs/measurements.md).
DEFAULTS = {
    T.F32: (T.F32, T.F32),
    T.F16: (T.F16, T.Q8_0),
    T.BF16: (T.BF16, T.Q8_0),
    T.Q8_0: (T.Q8_0, T.Q8_0),
    T.Q4_0: (T.Q6_K, q3_nl.KIND),
    T.Q4_1: (T.Q6_K, q3_nl.KIND),
    T.Q5_0: (T.Q6_K, T.Q8_0),
    T.Q5_1: (T.Q6_K, T.Q8_0),
    T.Q4_K: (T.Q6_K, q3_nl.KIND),
    T.Q5_K: (T.Q6_K, T.Q8_0),
    T.Q6_K: (T.Q6_K, T.Q8_0),
    T.Q3_K: (T.Q6_K, q3_nl.KIND),
    T.IQ4_NL: (T.Q6_K, q3_nl.KIND),
}

# Types of blocks of 256 -> what takes their place where a row is no multiple of that, in blocks of 32.
# Source: llama-quant.cpp, tensor_type_fallback. A predictor takes q8_0, which has kernels for panels.
FALLBACKS = {T.Q3_K: T.Q4_0, T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0}

ROUTER = re.compile(r"\.ffn_gate_inp\.weight$")
PREDICTOR = re.compile(r"\.ffn_pred_(fc[12]|gate|up)\.")
FC1, FC2 = ".ffn_pred_fc1.", ".ffn_pred_fc2."  # in the names of the two matrices
OF_EXPERT = re.compile(r"(\.ffn_pred_fc[12])\.\d+(?=\.weight$)")


@dataclass(frozen=True)
class Override:
    """`--tensor-type REGEX=TYPE`: tensors whose name the expression finds take that type."""

    text: str
    pattern: re.Pattern[str]
    kind: GGMLQuantizationType


@dataclass(frozen=True)
class Choice:
    """The type of a tensor, and the one the user asked for if a row's length ruled that out (else the same)."""

    kind: GGMLQuantizationType
    wanted: GGMLQuantizationType


def parse_type(text: str) -> GGMLQuantizationType:
    """'q4_0', 'Q4_K' -> the ggml type. Raises TsconvError that lists the known ones."""
    for name, kind in TYPES.items():
        if name.lower() == text.strip().lower():
            return kind
    raise TsconvError(f"unknown type {text!r}", expected=f"one of {', '.join(TYPES)}")


def parse_predictor_type(text: str) -> GGMLQuantizationType:
    """As `parse_type`; 'q3_nl' as well."""
    if text.strip().lower() == q3_nl.NAME:
        return q3_nl.KIND
    try:
        return parse_type(text)
    except TsconvError as error:
        raise TsconvError(
            f"unknown predictor type {text!r}", expected=f"one of {', '.join(TYPES)}, {q3_nl.NAME}"
        ) from error


def predictor_matrix_type(kind: GGMLQuantizationType, is_fc2: bool) -> GGMLQuantizationType:
    """The type of a matrix of a predictor of type `kind`: q3_nl is for fc2 only, and fc1 q4_0 beside it."""
    return T.Q4_0 if kind == q3_nl.KIND and not is_fc2 else kind


def parse_override(text: str) -> Override:
    """'REGEX=TYPE' -> Override. Raises TsconvError for a missing '=', a bad expression or an unknown type."""
    pattern, separator, kind = text.rpartition("=")
    if not separator or not pattern:
        raise TsconvError(f"bad tensor type {text!r}", expected="REGEX=TYPE, such as attn_v=q8_0")
    try:
        return Override(text, re.compile(pattern), parse_type(kind))
    except re.error as error:
        raise TsconvError(f"bad regular expression in {text!r}: {error}") from None


def is_fixed(output: Output) -> bool:
    """Vectors (norms, the predictor's scale) and the router are always f32: they are small and steer everything."""
    return len(output.shape) == 1 or ROUTER.search(output.name) is not None


def takes_panels(name: str, kind: GGMLQuantizationType) -> bool:
    """Whether tensor `name`, of type `kind`, is in panels where the sidecar's layout is so (docs/format.md)."""
    return kind in PANEL_TYPES and PREDICTOR.search(name) is not None


def fitting(kind: GGMLQuantizationType, output: Output) -> GGMLQuantizationType:
    """`kind` if its blocks divide the rows of `output`, else what stands in for it (blocks of 32), else f16.

    A neuron-major tensor must fit both ways: its blocks run along n_embd, but the declared rows are n_ff long. q3_nl is
    for whole panels only, q4_0 of as long blocks where they are not.
    """
    lengths = {output.shape[-1], output.row_length}
    if kind == q3_nl.KIND and (output.n_rows % PANEL_ROWS or output.row_length > q3_nl.MAX_COLUMNS):
        kind = T.Q4_0
    instead = T.Q8_0 if PREDICTOR.search(output.name) else FALLBACKS.get(kind, T.Q8_0)
    for candidate in (kind, instead):
        if all(length % block_size(candidate) == 0 for length in lengths):
            return candidate
    return T.F16


def _finds(pattern: re.Pattern[str], name: str) -> bool:
    """Whether the expression finds tensor `name`; q, k and v also by the name of their matrix, if it finds none of the
    three: attn_qkv means all, attn_q does not."""
    if pattern.search(name):
        return True
    if not qkv.PART.match(name):
        return False
    matrix = qkv.together(name)
    return pattern.search(matrix) is not None and not any(pattern.search(part) for part in qkv.parts_of(matrix))


def choose_types(
    outputs: Sequence[Output],
    outtype: GGMLQuantizationType,
    predictor_outtype: GGMLQuantizationType | None,
    overrides: Iterable[Override],
    mixed: Mapping[str, GGMLQuantizationType] | None = None,
) -> list[Choice]:
    """The type of every output, in order. Of several overrides that match, the first wins, as in llama-quantize.

    Args:
        mixed: types that take the place of `outtype`, by name (tsconv.format.mixes).

    Raises:
        TsconvError: an override matches no tensor whose type may be chosen, or not all experts of a layer.
    """
    overrides = list(overrides)
    unused = {override.text for override in overrides}
    output_type, predictor_type = DEFAULTS[outtype]
    tied = all(output.name != "output.weight" for output in outputs)
    choices = []
    texts: dict[str, str] = {}  # tensor -> the override that chose its type
    for output in outputs:
        if is_fixed(output):
            choices.append(Choice(T.F32, T.F32))
            continue
        matching = [override for override in overrides if _finds(override.pattern, output.name)]
        unused -= {override.text for override in matching}
        default = None
        if matching:
            wanted = matching[0].kind
            texts[output.name] = matching[0].text
        elif PREDICTOR.search(output.name):
            # Not `or`: F32 is 0.
            of_all = predictor_outtype if predictor_outtype is not None else (default := predictor_type)
            wanted = predictor_matrix_type(of_all, FC2 in output.name)
        elif output.name == "output.weight" or (tied and output.name == "token_embd.weight"):
            wanted = default = output_type
        else:
            wanted = (mixed or {}).get(output.name, outtype)
        kind = fitting(wanted, output)
        choices.append(Choice(kind, wanted if default is None else kind))
    if unused:
        text = next(override.text for override in overrides if override.text in unused)
        raise TsconvError(
            f"--tensor-type {text} matches no tensor whose type can be chosen",
            fix="list the names with tsconv convert --dry-run; vectors and the router are always f32",
        )
    _refuse_different_experts(outputs, choices, texts)
    return choices


def _refuse_different_experts(outputs: Sequence[Output], choices: Sequence[Choice], texts: Mapping[str, str]) -> None:
    """The predictors of a layer's experts have one type (docs/format.md). `texts`: overrides by tensor."""
    first: dict[str, tuple[str, Choice]] = {}
    for output, choice in zip(outputs, choices, strict=True):
        of_all = OF_EXPERT.sub(r"\1", output.name)
        if of_all == output.name:
            continue
        other, of_other = first.setdefault(of_all, (output.name, choice))
        if choice.kind != of_other.kind:
            text = texts.get(output.name) or texts[other]
            raise TsconvError(
                f"{other} and {output.name} cannot have different types",
                expected=f"one type for {of_all} of all experts",
                found=f"{type_name(of_other.kind)} and {type_name(choice.kind)}",
                fix=f"let --tensor-type {text} match all experts of a layer",
            )


def fallback_note(output: Output, choice: Choice) -> str | None:
    """One line for a tensor that could not have the type asked for, else None."""
    if choice.kind == choice.wanted:
        return None
    reason = f"whose blocks of {block_size(choice.wanted)} do not divide its rows"
    if choice.wanted == q3_nl.KIND and choice.kind == T.Q4_0:
        reason = f"which is for a multiple of {PANEL_ROWS} rows, of at most {q3_nl.MAX_COLUMNS} weights"
    return f"{output.name}: {type_name(choice.kind)} instead of {type_name(choice.wanted)}, {reason}"


def no_gain_notes(choices: Iterable[Choice]) -> list[str]:
    """A line for each type that was asked for of several tensors and that none has, all having the same other one."""
    found: dict[GGMLQuantizationType, list[GGMLQuantizationType]] = {}
    for choice in choices:
        found.setdefault(choice.wanted, []).append(choice.kind)
    return [
        f"no tensor has a shape for {type_name(wanted)}: asking for {type_name(kinds[0])} gives the same weights"
        for wanted, kinds in found.items()
        if wanted not in kinds and len(kinds) > 1 and len(set(kinds)) == 1
    ]
