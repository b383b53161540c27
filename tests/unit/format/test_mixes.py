"""Mixes of K types: which attention matrices take more bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as T
from gguf import LlamaFileType

import tsconv
from support import synthetic
from tsconv.arch.family import Output
from tsconv.errors import TsconvError
from tsconv.format.header import read_header
from tsconv.format.mixes import MIXES, mixed, parse_outtype
from tsconv.transform.quantize import TYPES


def outputs(n_layer: int, n_expert: int = 0) -> list[Output]:
    names = [f"blk.{n}.{part}.weight" for n in range(n_layer) for part in ("attn_q", "attn_k", "attn_v", "attn_output")]
    names += [f"blk.{n}.ffn_{part}.weight" for n in range(n_layer) for part in ("gate", "up", "down")]
    made = [Output(name, ("x",), (256, 256), (256, 256), "copy") for name in names]
    if n_expert:
        made.append(Output("blk.0.ffn_gate_inp.weight", ("x",), (n_expert, 256), (n_expert, 256), "copy"))
    return made


def layers(types: dict[str, T], part: str, kind: T) -> list[int]:
    return [int(name.split(".")[1]) for name, found in types.items() if f".attn_{part}." in name and found == kind]


def test_q4_k_m_of_32_layers() -> None:
    """As `llama-quantize` says of a llama of 32 layers: attn_v is q6_K in 16 of them."""
    types = mixed(MIXES["q4_K_M"], outputs(32))
    more = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert layers(types, "v", T.Q6_K) == more
    assert set(types) == {f"blk.{n}.attn_v.weight" for n in more}


def test_q3_k_m() -> None:
    types = mixed(MIXES["q3_K_M"], outputs(8))
    assert layers(types, "v", T.Q5_K) == [0, 1]
    assert layers(types, "v", T.Q4_K) == [2, 3, 4, 5, 6, 7]
    assert layers(types, "output", T.Q4_K) == list(range(8))
    assert not any("ffn" in name or "attn_q" in name or "attn_k" in name for name in types)


@pytest.mark.parametrize("name", MIXES)
def test_eight_experts(name: str) -> None:
    types = mixed(MIXES[name], outputs(4, 8))
    assert layers(types, "k", T.Q8_0) == layers(types, "v", T.Q8_0) == [0, 1, 2, 3]
    assert layers(types, "output", T.Q5_K) == ([] if name == "q5_K_M" else [0, 1, 2, 3])


@pytest.mark.parametrize("name", TYPES)
def test_types_are_no_mixes(name: str) -> None:
    outtype = parse_outtype(name.upper())
    assert (outtype.name, outtype.kind) == (name, TYPES[name])
    assert mixed(outtype, outputs(4)) == {}


def test_unknown_type() -> None:
    with pytest.raises(TsconvError, match=r"unknown type 'q4_K_S': expected one of f32, .*, q4_K_M, q5_K_M"):
        parse_outtype("q4_K_S")


def test_converted(tmp_path: Path) -> None:
    shape = synthetic.Shape(320, 256, 512, 4, 2, 4, ranks=(32, 32, 32, 32))
    directory = synthetic.save(tmp_path / "Some-Model", shape, synthetic.random_tensors(shape))
    result = tsconv.convert(directory, tmp_path / "m.gguf", "q4_k_m", fuse_qkv=False)
    assert result.outtype == "q4_K_M"
    assert result.ffn_layout == "bundles"
    header = read_header(result.model)
    assert header.keys["general.file_type"] == LlamaFileType.MOSTLY_Q4_K_M
    kinds = {tensor.name: tensor.kind for tensor in header.tensors}
    more = [n for n in range(4) if kinds[f"blk.{n}.attn_v.weight"] == T.Q6_K]
    assert more == [n for n in range(4) if n >= 3 or n % 3 == 2]
    assert kinds["blk.0.ffn_down.weight"] == kinds["blk.0.ffn_gate.weight"] == T.Q4_K
