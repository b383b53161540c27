"""Which type each tensor takes."""

from __future__ import annotations

import pytest

from tsconv.arch.family import Output
from tsconv.errors import TsconvError
from tsconv.format.types import choose_types, fallback_note, parse_override, parse_predictor_type, parse_type
from tsconv.transform.quantize import type_name


def output(name: str, *shape: int, op: str = "copy") -> Output:
    return Output(name, ("source",), shape[-2:], shape, op)


EMBEDDING = output("token_embd.weight", 320, 256)
OUTPUT = output("output.weight", 320, 256)
NORM = output("blk.0.ffn_norm.weight", 256)
ROUTER = output("blk.0.ffn_gate_inp.weight", 8, 256)
GATE = output("blk.0.ffn_gate.weight", 512, 256)
DOWN = output("blk.0.ffn_down.weight", 256, 512, op="neuron_major")
FC1 = output("blk.0.ffn_pred_fc1.weight", 64, 256)
FC2 = output("blk.0.ffn_pred_fc2.weight", 512, 64)
SCALE = output("blk.0.ffn_pred_scale.weight", 256)
ALL = [EMBEDDING, OUTPUT, NORM, ROUTER, GATE, DOWN, FC1, FC2, SCALE]


def types(
    outputs: list[Output], outtype: str, predictor: str | None = None, overrides: tuple[str, ...] = ()
) -> list[str]:
    choices = choose_types(
        outputs,
        parse_type(outtype),
        parse_predictor_type(predictor) if predictor else None,
        map(parse_override, overrides),
    )
    return [type_name(choice.kind).lower() for choice in choices]


@pytest.mark.parametrize(
    ("outtype", "expected"),
    [
        ("q4_0", "q4_0 q6_k f32 f32 q4_0 q4_0 q4_0 q3_nl f32"),
        ("q8_0", "q8_0 q8_0 f32 f32 q8_0 q8_0 q8_0 q8_0 f32"),
        ("q4_K", "q4_k q6_k f32 f32 q4_k q4_k q4_0 q3_nl f32"),
        ("q5_0", "q5_0 q6_k f32 f32 q5_0 q5_0 q8_0 q8_0 f32"),
        ("bf16", "bf16 bf16 f32 f32 bf16 bf16 q8_0 q8_0 f32"),
        ("f16", "f16 f16 f32 f32 f16 f16 q8_0 q8_0 f32"),
        ("f32", "f32 f32 f32 f32 f32 f32 f32 f32 f32"),
    ],
)
def test_defaults(outtype: str, expected: str) -> None:
    assert types(ALL, outtype) == expected.split()


def test_tied_embeddings_take_the_output_type() -> None:
    assert types([EMBEDDING, GATE], "q4_0") == ["q6_k", "q4_0"]


@pytest.mark.parametrize("predictor", ["f16", "f32", "q8_0"])
def test_predictor_type(predictor: str) -> None:
    assert types([OUTPUT, FC1, FC2], "q4_0", predictor) == ["q6_k", predictor, predictor]


@pytest.mark.parametrize(
    ("n_ff", "rank", "expected"),
    [(512, 64, "q3_nl"), (512, 48, "f16"), (520, 64, "q4_0"), (512, (1 << 17) + 32, "q4_0")],
)
def test_q3_nl_where_it_fits(n_ff: int, rank: int, expected: str) -> None:
    """Whole panels, whole blocks, and no more columns than the runtime sums; fc1 is q4_0."""
    fc1, fc2 = output("blk.0.ffn_pred_fc1.weight", rank, 256), output("blk.0.ffn_pred_fc2.weight", n_ff, rank)
    assert types([OUTPUT, fc1, fc2], "f16", "Q3_NL") == ["f16", "q4_0", expected]


def test_q3_nl_is_for_predictors() -> None:
    with pytest.raises(TsconvError, match=r"unknown type 'q3_nl'"):
        parse_type("q3_nl")
    with pytest.raises(TsconvError, match=r"unknown predictor type 'q2_k'.*q3_nl"):
        parse_predictor_type("q2_k")


def test_overrides_win_and_the_first_of_them_counts() -> None:
    assert types(ALL, "q4_0", None, (r"ffn_down=Q5_1", r"ffn_=q8_0", "output=f16")) == (
        ["q4_0", "f16", "f32", "f32", "q8_0", "q5_1", "q8_0", "q8_0", "f32"]
    )


@pytest.mark.parametrize(
    ("outtype", "dims", "op", "expected"),
    [
        ("q4_K", (64, 1088), "copy", "q5_0"),  # not a multiple of 256
        ("q3_K", (64, 1088), "copy", "q4_0"),
        ("q5_K", (64, 1088), "copy", "q5_1"),
        ("q6_K", (64, 1088), "copy", "q8_0"),
        ("q4_0", (64, 48), "copy", "f16"),
        ("iq4_nl", (64, 48), "copy", "f16"),
        ("q4_K", (64, 48), "copy", "f16"),
        ("q4_K", (256, 1088), "neuron_major", "q5_0"),  # the declared row does not fit
        ("q4_K", (1088, 256), "neuron_major", "q5_0"),  # the stored row does not fit
        ("q4_0", (48, 64), "neuron_major", "f16"),
        ("q4_K", (256, 512), "neuron_major", "q4_k"),
        ("bf16", (3, 5), "copy", "bf16"),
    ],
)
def test_fallback(outtype: str, dims: tuple[int, int], op: str, expected: str) -> None:
    tensor = output("blk.0.ffn_down.weight", *dims, op=op)
    (choice,) = choose_types([tensor], parse_type(outtype), None, [])
    assert choice.kind.name.lower() == expected
    note = fallback_note(tensor, choice)
    assert (note is None) == (expected == outtype.lower())
    assert note is None or f"{expected} instead of {outtype}" in note


@pytest.mark.parametrize("outtype", ["q3_K", "q4_K", "q5_K", "q6_K"])
def test_fallback_of_a_predictor(outtype: str) -> None:
    """The rank of some layers is no multiple of 256. q8_0 has kernels for panels."""
    fc2 = output("blk.0.ffn_pred_fc2.weight", 96, 1088)
    (choice,) = choose_types([fc2], parse_type("f32"), parse_type(outtype), [])
    assert type_name(choice.kind) == "q8_0"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("attn_q=q9_9", "unknown type 'q9_9'"),
        ("attn_q", "expected REGEX=TYPE"),
        ("=q8_0", "expected REGEX=TYPE"),
        ("(=q8_0", "bad regular expression"),
    ],
)
def test_bad_override(override: str, message: str) -> None:
    with pytest.raises(TsconvError, match=message.replace("(", r"\(")):
        parse_override(override)


EXPERTS = [
    output(f"blk.{layer}.ffn_pred_{kind}.{expert}.weight", *dims)
    for layer in (0, 1)
    for expert in (0, 1, 2)
    for kind, dims in (("fc1", (64, 256)), ("fc2", (512, 64)))
]


@pytest.mark.parametrize(
    ("override", "first", "other", "found"),
    [
        (r"ffn_pred_fc1\.1\.=f16", "blk.0.ffn_pred_fc1.0.weight", "blk.0.ffn_pred_fc1.1.weight", "q4_0 and f16"),
        (r"blk.1.*fc2\.0\.=q8_0", "blk.1.ffn_pred_fc2.0.weight", "blk.1.ffn_pred_fc2.1.weight", "q8_0 and q3_nl"),
    ],
)
def test_override_of_one_expert(override: str, first: str, other: str, found: str) -> None:
    with pytest.raises(TsconvError) as caught:
        types(EXPERTS, "q4_0", None, (override,))
    of_all = first.replace(".0.weight", ".weight")
    assert str(caught.value) == (
        f"{first} and {other} cannot have different types: expected one type for {of_all} of all experts, "
        f"found {found}; let --tensor-type {override} match all experts of a layer"
    )


@pytest.mark.parametrize("override", [r"ffn_pred_fc1=f16", r"blk\.1\.ffn_pred_fc1=f16", r"fc2\.[012]\.=q8_0"])
def test_override_of_all_experts(override: str) -> None:
    kind = override.rpartition("=")[2]
    assert types(EXPERTS, "q4_0", None, (override,)).count(kind) in (3, 6)


@pytest.mark.parametrize("override", ["attn_nothing=q8_0", "ffn_norm=q8_0", "ffn_gate_inp=q8_0"])
def test_override_that_matches_nothing(override: str) -> None:
    with pytest.raises(TsconvError, match=f"--tensor-type {override} matches no tensor"):
        types(ALL, "q4_0", None, (override,))
