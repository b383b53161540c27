"""LoRA adapters on the FFN matrices: the adapted dReLU formula, or a refusal. Never SwiGLU, never a lost adapter."""

from __future__ import annotations

from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from reference import Reference

import tsconv
from support import CHECKPOINTS, tiny
from support.edited import edited
from support.random_stats import random_stats, save_stats
from support.synthetic import save_adapter
from support.tiny import nmse
from tsconv.errors import BackendError, ModelFileError
from tsconv.format.header import read_header

TOKENS = list(range(10, 60))
RANK = 4
F32 = llama_cpp.GGML_TYPE_F32

pytestmark = pytest.mark.sanitized


def write_adapter(path: Path, parts: tuple[str, ...], model: Reference) -> Path:
    """A random adapter for the matrices `parts` of every layer; adds it to the reference's weights: W + B A."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", RANK)  # a scale of alpha / rank = 1
    for n, block in enumerate(model.model.layers):
        for part in parts:
            weight = getattr(block.mlp, f"{part}_proj").weight
            a = rng.standard_normal((RANK, weight.shape[1]), dtype=np.float32) / weight.shape[1] ** 0.5
            b = rng.standard_normal((weight.shape[0], RANK), dtype=np.float32) / 4
            writer.add_tensor(f"blk.{n}.ffn_{part}.weight.lora_a", a)
            writer.add_tensor(f"blk.{n}.ffn_{part}.weight.lora_b", b)
            weight += torch.from_numpy(b @ a)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(adapter: Path, sparsity: str) -> tsconv.SparseLlama:
    return tsconv.load(tiny.converted(), sparsity=sparsity, lora_path=str(adapter), n_threads=1, type_k=F32, type_v=F32)


@pytest.fixture
def reference() -> Reference:
    return Reference.load(CHECKPOINTS / "tiny-turbosparse-mistral")


@pytest.mark.parametrize(
    ("sparsity", "parts"),
    [
        ("exact", ("gate",)),
        ("exact", ("up",)),
        ("exact", ("down",)),
        ("exact", ("gate", "up", "down")),
        ("predictor", ("up",)),
        ("predictor", ("down",)),
        ("predictor", ("up", "down")),
    ],
)
@pytest.mark.parametrize("n_batch", [1, 50])
def test_adapted_formula(tmp_path, reference, sparsity, parts, n_batch):
    without = reference.logits(TOKENS, sparsity=sparsity).numpy()
    adapter = write_adapter(tmp_path / "adapter.gguf", parts, reference)
    expected = reference.logits(TOKENS, sparsity=sparsity).numpy()
    assert nmse(without, expected) > 1e-3, "the adapter matters"
    model = load(adapter, sparsity)
    error = nmse(model.token_logits(TOKENS, n_batch=n_batch), expected)
    model.close()
    assert error <= 1e-9


def test_adapted_gate_under_the_mask(tmp_path, reference):
    """The backend computes the gates of predicted neurons only, and an adapter would add to the others."""
    model = load(write_adapter(tmp_path / "adapter.gguf", ("gate",), reference), "predictor")
    for compute in (model.token_logits, model.eval, lambda tokens: next(model.generate(tokens))):
        with pytest.raises(BackendError, match=r"changes the gate of layer 0.*exact sparsity"):
            compute(TOKENS)
    model.close()


@pytest.mark.parametrize("part", ["gate", "up", "down"])
def test_neurons_in_another_order(tmp_path, reference, part):
    """The adapter's rows are in the order of the checkpoint; the model's are not."""
    adapter = write_adapter(tmp_path / "adapter.gguf", (part,), reference)
    stats = save_stats(random_stats(tiny.converted()), tmp_path / "stats.gguf")
    model = tsconv.reorder(tiny.converted(), stats, tmp_path / "hot.gguf").model
    with pytest.raises(ModelFileError, match=f"the adapter changes blk.0.ffn_{part}.weight, whose neurons are in"):
        tsconv.load(model, lora_path=str(adapter))


KIND = "the adapter is of another shape"


@pytest.mark.parametrize(
    ("tensor", "shape", "changes", "message"),
    [
        (
            "blk.0.attn_output.weight",
            (64, 128),
            {},
            KIND + r": expected \[128, 4\] and \[4, 128\], found \[64, 4\]",
        ),
        ("blk.0.attn_output.weight", (128, 64), {}, KIND),
        ("blk.0.attn_output.weight", (128, 128, 2), {}, KIND),
        ("token_embd.weight", (128, 512), {}, KIND),
        (
            "blk.99.attn_output.weight",
            (128, 128),
            {},
            "changes blk.99.attn_output.weight, which .* not have",
        ),
        ("output_norm.weight", (128, 1), {}, "llama.cpp has adapters for matrices only"),
        ("blk.0.attn_output.weight", (128, 128), {"general__architecture": "qwen2"}, "expected 'llama', found 'qwen2'"),
        ("blk.0.attn_output.weight", (128, 128), {"general__type": "model"}, "expected 'adapter', found 'model'"),
        ("blk.0.attn_output.weight", (128, 128), {"general__type": 1.0}, "expected 'adapter', found 1.0"),
        (
            "blk.0.attn_output.weight",
            (128, 128),
            {"adapter__type": "control_vector"},
            "key adapter.type: expected 'lora'",
        ),
        ("blk.0.attn_output.weight", (128, 128), {"adapter__lora__alpha": "4"}, "bad key adapter.lora.alpha: expected"),
    ],
)
def test_adapters_that_do_not_fit(tmp_path, tensor, shape, changes, message):
    """llama.cpp ends the process for some of these, now or at the first token."""
    adapter = save_adapter(tmp_path / "lora.gguf", tensor, shape, **changes)
    with pytest.raises(ModelFileError, match=message) as caught:
        tsconv.load(tiny.converted(), n_threads=1, lora_path=adapter)
    assert str(caught.value).startswith(str(adapter))


def test_halves_and_other_tensors(tmp_path):
    whole = save_adapter(tmp_path / "lora.gguf", "blk.0.attn_output.weight", (128, 128))
    for name, changes, message in (
        ("half", {"without": ["blk.0.attn_output.weight.lora_b"]}, "half of the adapter's matrix is missing"),
        ("more", {"extra": {"blk.0.attn_output.bias": np.zeros(4, np.float32)}}, "ends in .lora_a or .lora_b"),
        ("none", {"without": [f"blk.0.attn_output.weight.lora_{half}" for half in "ab"]}, "the adapter has no tensors"),
    ):
        adapter = edited(whole, tmp_path / f"{name}.gguf", **changes)
        with pytest.raises(ModelFileError, match=message) as caught:
            tsconv.load(tiny.converted(), n_threads=1, lora_path=adapter)
        assert str(caught.value).startswith(str(adapter))


@pytest.mark.parametrize("what", ["model", "text", "nothing"])
def test_files_that_are_no_adapters(tmp_path, what):
    path = tmp_path / "lora.gguf"
    if what == "model":
        path = tiny.converted()
    elif what == "text":
        path.write_text("no adapter")
    with pytest.raises(ModelFileError) as caught:
        tsconv.load(tiny.converted(), n_threads=1, lora_path=str(path))
    assert str(caught.value).startswith(str(path))


def test_what_llama_cpp_refuses(tmp_path):
    """What the header does not show: llama.cpp's reason, no crash, and the process goes on."""
    adapter = save_adapter(tmp_path / "lora.gguf", "blk.0.attn_output.weight", (128, 128))
    model = tsconv.load(tiny.converted(), n_threads=1)
    adapter.write_bytes(adapter.read_bytes()[:100])
    with pytest.raises(ModelFileError, match=r"cannot use the adapter.* failed"):
        model._use_adapter(adapter)
    with pytest.raises(BackendError, match="the model is closed"):
        model.token_logits(TOKENS)
    other = tsconv.load(tiny.converted(), n_threads=1)
    assert np.isfinite(other.token_logits(TOKENS)).all()
    other.close()


def test_an_adapter_of_zeros_changes_nothing(tmp_path):
    shapes = {tensor.name: tensor.shape for tensor in read_header(tiny.converted()).tensors}
    plain = tsconv.load(tiny.converted(), n_threads=1, use_mmap=False)
    expected = plain.token_logits(TOKENS)
    plain.close()
    for name in ("token_embd.weight", "blk.0.attn_output.weight", "output.weight"):
        adapter = save_adapter(tmp_path / name, name, shapes[name])
        model = tsconv.load(tiny.converted(), n_threads=1, lora_path=adapter)
        np.testing.assert_allclose(model.token_logits(TOKENS), expected, atol=1e-5)
        assert model.lora_path == str(tmp_path / name)
        model.close()
