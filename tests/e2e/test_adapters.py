"""LoRA adapters on the FFN matrices: the adapted dReLU formula, or a refusal. Never SwiGLU, never a lost adapter."""

from __future__ import annotations

from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
import tiny
import torch
from random_stats import random_stats, save_stats
from reference import Reference
from tiny import nmse

import tsconv
from tsconv.errors import BackendError, ModelFileError

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
    return Reference.load(tiny.CHECKPOINTS / "tiny-turbosparse-mistral")


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


def test_adapted_gate_under_the_mask(tmp_path, reference, capfd):
    """The backend computes the gates of predicted neurons only, and an adapter would add to the others."""
    model = load(write_adapter(tmp_path / "adapter.gguf", ("gate",), reference), "predictor")
    with pytest.raises(BackendError, match="could not compute a batch"):
        model.token_logits(TOKENS)
    assert "an adapter changes the gate of layer 0" in (log := capfd.readouterr().err)
    assert "run with exact sparsity" in log
    model.close()


@pytest.mark.parametrize("part", ["gate", "up", "down"])
def test_neurons_in_another_order(tmp_path, reference, part):
    """The adapter's rows are in the order of the checkpoint; the model's are not."""
    adapter = write_adapter(tmp_path / "adapter.gguf", (part,), reference)
    stats = save_stats(random_stats(tiny.converted()), tmp_path / "stats.gguf")
    model = tsconv.reorder(tiny.converted(), stats, tmp_path / "hot.gguf").model
    with pytest.raises(ModelFileError, match=f"the adapter changes blk.0.ffn_{part}.weight, whose neurons are in"):
        tsconv.load(model, lora_path=str(adapter))
