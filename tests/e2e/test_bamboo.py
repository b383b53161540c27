"""Bamboo: the predictors come in a directory of their own, model_N.pt. Made from the trained checkpoint by taking its
predictors out, so that the function is known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import Reference
from safetensors.torch import load_file, save_file

import tsconv
from support import CHECKPOINTS, tiny
from support.tiny import nmse
from tsconv.errors import CheckpointError, ModelFileError

SOURCE = CHECKPOINTS / "tiny-turbosparse-mistral"


@pytest.fixture(scope="module")
def bamboo(tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint in Bamboo's layout, one shard without predictors, and its predictor directory."""
    checkpoint, predictor = (tmp_path_factory.mktemp(name) for name in ("bamboo", "predictor"))
    tensors = {}
    for shard in SOURCE.glob("*.safetensors"):
        tensors |= load_file(shard)
    parts = {name: tensors.pop(name) for name in list(tensors) if ".predictor." in name}
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    for file in SOURCE.glob("*.json"):
        if "index" not in file.name:
            shutil.copy(file, checkpoint)
    n_layer = json.loads((SOURCE / "config.json").read_text())["num_hidden_layers"]
    for layer in range(n_layer):
        prefix = f"model.layers.{layer}.mlp.predictor."
        state = {name: parts[f"{prefix}{name}.weight"] for name in ("fc1", "fc2")}
        torch.save({f"{name}.weight": weight for name, weight in state.items()}, predictor / f"model_{layer}.pt")
    (predictor / "config.json").write_text(json.dumps({"sparse_threshold": 0}))
    return checkpoint, predictor


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    model = tsconv.load(tiny.converted(), n_threads=1)
    found = model.tokenize((CHECKPOINTS / "heldout.txt").read_bytes()[:2000])[:256]
    model.close()
    return found


def logits(path: Path, tokens: list[int], **kwargs) -> np.ndarray:
    model = tsconv.load(path, n_threads=1, type_k=0, type_v=0, **kwargs)
    found = model.token_logits(tokens)
    model.close()
    return found


def test_with_its_predictors(bamboo, tokens, tmp_path):
    checkpoint, predictor = bamboo
    result = tsconv.convert(checkpoint, tmp_path / "bamboo.gguf", "f32", predictor=predictor)
    assert result.predictor_kind == "external"
    expected = Reference.load(checkpoint, predictor_dir=predictor).logits(tokens).detach().numpy()
    assert nmse(logits(result.model, tokens), expected) <= 1e-5
    # The predictors were the embedded ones': so is the function.
    assert nmse(logits(result.model, tokens), logits(tiny.converted(), tokens)) <= 1e-9


def test_without_predictors_it_runs_exactly(bamboo, tokens, tmp_path):
    checkpoint, _ = bamboo
    result = tsconv.convert(checkpoint, tmp_path / "bamboo.gguf", "f32")
    assert (result.predictor_kind, result.sidecar) == ("none", None)
    expected = Reference.load(SOURCE).logits(tokens, sparsity="exact").detach().numpy()
    assert nmse(logits(result.model, tokens), expected) <= 1e-5
    with pytest.raises(ModelFileError, match="has no predictor; run with exact sparsity"):
        tsconv.load(result.model, sparsity="predictor")


def test_a_threshold_other_than_zero_is_refused(bamboo, tmp_path):
    checkpoint, predictor = bamboo
    copy = tmp_path / "predictor"
    shutil.copytree(predictor, copy)
    (copy / "config.json").write_text(json.dumps({"sparse_threshold": 0.5}))
    with pytest.raises(CheckpointError, match=r"sparse_threshold.*expected 0"):
        tsconv.convert(checkpoint, tmp_path / "bamboo.gguf", "f32", predictor=copy)
    assert not (tmp_path / "bamboo.gguf").exists()
