"""Tiny checkpoints of random weights for tests, in any family's layout, with every tensor at hand to spoil."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import gguf
import numpy as np

from tsconv.bench.synthetic import Shape, config, header, tensor_shapes, to_bf16, write_tokenizer
from tsconv.format.header import Header
from tsconv.format.order import shape_of

N_VOCAB = 320  # more than the tokenizer has: checkpoints are padded too

SHAPES = {
    "mistral": Shape(N_VOCAB, 64, 96, 4, 2, 2, ranks=(32, 64)),
    "mixtral": Shape(N_VOCAB, 64, 96, 4, 2, 2, ranks=(32, 64), n_expert=4, rope_theta=1e6),
    "bamboo": Shape(N_VOCAB, 64, 96, 4, 2, 2),
}

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def random_tensors(shape: Shape, dtype: str = "BF16", seed: int = 0) -> dict[str, np.ndarray]:
    """Name -> weights: float32, float16, or bf16 as uint16. Norms are around 1."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, dims in tensor_shapes(shape).items():
        values = rng.standard_normal(dims, dtype=np.float32)
        values = 1 + values / 8 if len(dims) == 1 else values / 8
        tensors[name] = to_bf16(values) if dtype == "BF16" else values.astype("<f4" if dtype == "F32" else "<f2")
    return tensors


def save(directory: Path, shape: Shape, tensors: dict[str, np.ndarray], n_shards: int = 2, **changes: object) -> Path:
    """Writes a checkpoint; `changes` replace fields of config.json. One shard: model.safetensors, no index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config(shape) | changes))
    write_tokenizer(directory)
    names = list(tensors)
    if n_shards == 1:
        write_shard(directory / "model.safetensors", tensors)
        return directory
    weight_map = {}
    for i in range(n_shards):
        file = f"model-{i + 1:05}-of-{n_shards:05}.safetensors"
        part = names[i * len(names) // n_shards : (i + 1) * len(names) // n_shards]
        write_shard(directory / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def write_shard(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """One safetensors file; all tensors have the type of the first."""
    first = next(iter(tensors.values())).dtype
    dtype = {np.dtype("<u2"): "BF16", np.dtype("<f2"): "F16", np.dtype("<f4"): "F32"}[first]
    data = b"".join(tensor.tobytes() for tensor in tensors.values())
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert len(data) == sum(prod(dims) for dims in shapes.values()) * ITEM_BYTES[dtype]
    path.write_bytes(header(shapes, dtype, ITEM_BYTES[dtype]) + data)


def write_predictors(directory: Path, shape: Shape, ranks: list[int], seed: int = 1) -> list[dict[str, np.ndarray]]:
    """Bamboo's separate predictors model_0.pt ..., in bf16. Returns fc1 and fc2 of each layer as float32."""
    import torch

    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    written = []
    for n, rank in enumerate(ranks):
        matrices = {"fc1.weight": (rank, shape.n_embd), "fc2.weight": (shape.n_ff, rank)}
        state = {
            k: torch.from_numpy(rng.standard_normal(dims, dtype=np.float32)).bfloat16() for k, dims in matrices.items()
        }
        torch.save(state, directory / f"model_{n}.pt")
        written.append({key: value.float().numpy() for key, value in state.items()})
    return written


def as_float32(tensor: np.ndarray) -> np.ndarray:
    """Weights of `random_tensors` as float32 values."""
    if tensor.dtype == np.uint16:
        return (tensor.astype(np.uint32) << 16).view(np.float32)
    return tensor.astype(np.float32)


def save_random_adapter(path: Path, model: Header, part: str, rank: int = 4) -> Path:
    """A LoRA adapter that changes gate, up or down of every layer of a dense model."""
    n_layer, _, n_ff = shape_of(model)
    n_embd = model.keys["llama.embedding_length"]
    n_in, n_out = (n_ff, n_embd) if part == "down" else (n_embd, n_ff)
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", rank)  # a scale of alpha / rank = 1
    for n in range(n_layer):
        a = rng.standard_normal((rank, n_in), dtype=np.float32) / n_in**0.5
        b = rng.standard_normal((n_out, rank), dtype=np.float32) / 4
        writer.add_tensor(f"blk.{n}.ffn_{part}.weight.lora_a", a)
        writer.add_tensor(f"blk.{n}.ffn_{part}.weight.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def save_adapter(path: Path, tensor: str, shape: tuple[int, ...], rank: int = 4, **changes: str | float) -> Path:
    """A LoRA adapter that adds nothing to one tensor of that shape, fastest dimension first; `changes` replace keys, in
    whose names __ stands for a dot."""
    n_in, n_out, *experts = shape
    keys = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0}
    keys |= {name.replace("__", "."): value for name, value in changes.items()}
    writer = gguf.GGUFWriter(path, keys.pop("general.architecture", "llama"))
    for key, value in keys.items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_float32(key, value)
    dims_a = (n_out, rank) if tensor == "token_embd.weight" else (*experts, rank, n_in)  # looked up, not multiplied
    dims_b = (n_in, rank) if tensor == "token_embd.weight" else (*experts, n_out, rank)
    for half, dims in (("a", dims_a), ("b", dims_b)):
        writer.add_tensor(f"{tensor}.lora_{half}", np.zeros(dims, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
