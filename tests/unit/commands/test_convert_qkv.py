"""q, k and v of a layer in one matrix: which layers, which bytes, which types; and adapters that want them apart."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from support.synthetic import SHAPES, random_tensors, save, save_adapter
from tsconv import convert
from tsconv.errors import ModelFileError, TsconvError
from tsconv.format.adapter import refuse_adapter
from tsconv.format.header import read_header

PARTS = ("q", "k", "v")


@pytest.fixture(scope="module", params=["mistral", "mixtral"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = SHAPES[request.param]
    return save(tmp_path_factory.mktemp("checkpoint"), shape, random_tensors(shape))


def stored(path: Path) -> dict[str, tuple[gguf.GGMLQuantizationType, np.ndarray]]:
    """Type and bytes of every tensor."""
    reader = gguf.GGUFReader(path)
    return {t.name: (t.tensor_type, np.asarray(t.data).reshape(-1).view(np.uint8)) for t in reader.tensors}


@pytest.mark.parametrize("outtype", ["f32", "q8_0", "q4_0"])
def test_rows_of_the_three_follow_one_another(checkpoint: Path, tmp_path: Path, outtype: str) -> None:
    """And nothing else differs."""
    together = stored(convert(checkpoint, tmp_path / "together.gguf", outtype).model)
    apart = stored(convert(checkpoint, tmp_path / "apart.gguf", outtype, fuse_qkv=False).model)
    for layer in range(2):
        kind, rows = together.pop(f"blk.{layer}.attn_qkv.weight")
        parts = [apart.pop(f"blk.{layer}.attn_{part}.weight") for part in PARTS]
        assert {part[0] for part in parts} == {kind}
        np.testing.assert_array_equal(rows, np.concatenate([part[1] for part in parts]))
    assert list(together) == list(apart)
    for name, (kind, data) in together.items():
        assert kind == apart[name][0], name
        np.testing.assert_array_equal(data, apart[name][1], err_msg=name)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("attn_v=f16", {"blk.0.attn_q": "q8_0", "blk.0.attn_v": "f16", "blk.1.attn_k": "q8_0"}),
        (r"blk\.0\.attn_q=f16", {"blk.0.attn_q": "f16", "blk.0.attn_k": "q8_0", "blk.1.attn_qkv": "q8_0"}),
        ("attn_[qkv]=f16", {"blk.0.attn_qkv": "f16", "blk.1.attn_qkv": "f16"}),
        ("attn_qkv=f16", {"blk.0.attn_qkv": "f16", "blk.0.attn_output": "q8_0"}),
        (r"blk\.1\.attn_qkv=f16", {"blk.0.attn_qkv": "q8_0", "blk.1.attn_qkv": "f16"}),
    ],
)
def test_types(checkpoint: Path, override: str, expected: dict[str, str]) -> None:
    """Those of one layer that differ stay apart; attn_q means q alone."""
    result = convert(checkpoint, "m.gguf", "q8_0", tensor_types=(override,), dry_run=True)
    types = {tensor.name: tensor.type for tensor in result.tensors}
    assert {name: types.get(f"{name}.weight") for name in expected} == expected
    for layer in range(2):
        names = {part for part in (*PARTS, "qkv") if f"blk.{layer}.attn_{part}.weight" in types}
        assert names in ({"qkv"}, set(PARTS))


def test_an_override_of_nothing(checkpoint: Path) -> None:
    with pytest.raises(TsconvError, match="--tensor-type attn_qkvo=f16 matches no tensor"):
        convert(checkpoint, "m.gguf", tensor_types=("attn_qkvo=f16",), dry_run=True)


@pytest.mark.parametrize("part", PARTS)
def test_adapter_of_a_part(checkpoint: Path, tmp_path: Path, part: str) -> None:
    apart = read_header(convert(checkpoint, tmp_path / "apart.gguf", "q8_0", fuse_qkv=False).model)
    name = f"blk.1.attn_{part}.weight"
    (shape,) = (tensor.shape for tensor in apart.tensors if tensor.name == name)
    adapter = read_header(save_adapter(tmp_path / "lora.gguf", name, shape))
    refuse_adapter(apart, adapter)
    model = convert(checkpoint, tmp_path / "m.gguf", "q8_0").model
    with pytest.raises(ModelFileError) as caught:
        refuse_adapter(read_header(model), adapter)
    changed, matrix = f"blk.1.attn_{part}.weight", "blk.1.attn_qkv.weight"
    assert str(caught.value) == (
        f"{adapter.path}: the adapter changes {changed}, which is part of {matrix} in {model};"
        " use it with a model that was converted with --no-fuse-qkv"
    )
