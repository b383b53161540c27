"""Activation predictors: those inside a checkpoint, and Bamboo's separate `model_N.pt` files.

External tensors are given the names that embedded ones have, so that everything after this step sees one kind.
Layout of the separate repositories: PowerInfer/Bamboo-base-v0.1-predictor (one state dict per layer, `fc1.weight`
[r, n_embd] and `fc2.weight` [n_ff, r], no bias, and an optional config.json with `sparse_threshold`).
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tsconv.checkpoint.config import read_json
from tsconv.checkpoint.lfs import refuse_pointer
from tsconv.checkpoint.names import plain_names
from tsconv.checkpoint.safetensors_reader import DTYPES, SourceTensor
from tsconv.errors import CheckpointError
from tsconv.extras import require

FILE = re.compile(r"model_(\d+)\.pt")
KEYS = ("fc1.weight", "fc2.weight")


@dataclass(frozen=True)
class TorchTensor:
    """A matrix of a state dict on disk. Each read loads the file's storage anew; nothing stays in memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    key: str

    @property
    def where(self) -> str:
        return f"{self.path.name}: {self.key}"

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * DTYPES[self.dtype].itemsize

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        import torch

        rows = _load(self.path)[self.key][start:stop].contiguous()
        return (rows.view(torch.int16).numpy().view(np.uint16) if self.dtype == "BF16" else rows.numpy()).copy()


def _load(path: Path) -> dict[str, Any]:
    """The state dict of a .pt file, as tensors only (`weights_only`), mapped where the format allows it."""
    import pickle

    import torch

    refuse_pointer(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"not a readable PyTorch state dict ({reason})", where=path) from None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise CheckpointError("not a state dict of tensors", where=path)
    return state


def external_tensors(
    directory: Path, n_layer: int, names_of_layer: Callable[[int], tuple[str, ...]]
) -> dict[str, SourceTensor]:
    """The predictors of a `model_N.pt` directory; headers only are read.

    Args:
        names_of_layer: layer -> the names that fc1 and fc2 get.

    Raises:
        CheckpointError: a layer's file is missing or there are too many, keys or types are not those expected, or
            `sparse_threshold` is not 0. Shapes are checked when they are matched with the model's.
        TsconvError: torch is not installed.
    """
    require("torch", "reading separate predictors")
    _check_threshold(directory)
    numbered = {int(m[1]): path for path in directory.glob("model_*.pt") if (m := FILE.fullmatch(path.name))}
    if sorted(numbered) != list(range(n_layer)):
        missing = sorted(set(range(n_layer)) - set(numbered))
        raise CheckpointError(
            "wrong set of predictor files",
            where=directory,
            expected=f"model_0.pt to model_{n_layer - 1}.pt",
            found=f"{len(numbered)} of them" + (f", model_{missing[0]}.pt missing" if missing else ""),
            fix="are these the predictors of this model?",
        )
    return {tensor.name: tensor for n in sorted(numbered) for tensor in _layer_tensors(numbered[n], names_of_layer(n))}


def _layer_tensors(path: Path, names: tuple[str, ...]) -> Iterable[TorchTensor]:
    import torch

    dtypes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    state = _load(path)
    stored = {plain: key for key, plain in plain_names(state, path).items()}
    if set(stored) != set(KEYS):
        raise CheckpointError("wrong keys", where=path, expected=" and ".join(KEYS), found=", ".join(sorted(state)))
    for plain, name in zip(KEYS, names, strict=True):
        key = stored[plain]
        if state[key].dtype not in dtypes or state[key].dim() != 2:
            found = f"{state[key].dtype} with {state[key].dim()} dimensions"
            raise CheckpointError(
                "wrong tensor", where=f"{path}: {key}", expected="an f32/f16/bf16 matrix", found=found
            )
        yield TorchTensor(name, dtypes[state[key].dtype], tuple(state[key].shape), path, key)


def _check_threshold(directory: Path) -> None:
    path = directory / "config.json"
    if not path.exists():
        return
    threshold = read_json(path).get("sparse_threshold", 0)
    if type(threshold) not in (int, float) or threshold != 0:
        raise CheckpointError(
            "bad sparse_threshold",
            where=path,
            expected="0",
            found=repr(threshold),
            fix="the runtime feeds a pre-norm predictor its input only up to a positive factor, which keeps the sign of"
            " a logit but not its size",
        )
