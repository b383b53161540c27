"""Checkpoints of generated weights in the layouts of the real families, of any size, for benchmarks and tests.

Names and shapes are written out here, not taken from tsconv.arch, so that a test which converts such a checkpoint tests
those tables.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 1 << 22  # random weights made once and repeated

# Pieces of the tensor of a name and shape, in order: bf16 bits in uint16.
Weights = Callable[[str, tuple[int, ...]], Iterator[np.ndarray]]


@dataclass(frozen=True)
class Shape:
    """Dimensions of a checkpoint. `ranks` empty: no predictors inside; `n_expert` 0: dense."""

    n_vocab: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_layer: int
    ranks: tuple[int, ...] = ()
    n_expert: int = 0
    rope_theta: float = 10000.0

    @property
    def architecture(self) -> str:
        return "TurboSparseMixtralForCausalLM" if self.n_expert else "BambooForCausalLM"


# Published sizes of TurboSparse-Mixtral-47B; the ranks are those of its 32 layers.
MIXTRAL_47B = Shape(
    n_vocab=32000,
    n_embd=4096,
    n_ff=14336,
    n_head=32,
    n_head_kv=8,
    n_layer=32,
    ranks=(896, 896, *[1024] * 11, 1088, *[1024] * 13, *[1088] * 4, 1344),
    n_expert=8,
    rope_theta=1e6,
)


def mistral_7b(n_layer: int) -> Shape:
    """`n_layer` layers of the size of TurboSparse-Mistral-7B, with predictors of about its average rank."""
    return Shape(32064, 4096, 14336, 32, 8, n_layer, (1280,) * n_layer)


def config(shape: Shape) -> dict[str, object]:
    """config.json as the real repositories have it."""
    fields: dict[str, object] = {
        "architectures": [shape.architecture],
        "model_type": "turbosparsemixtral" if shape.n_expert else "bamboo",
        "hidden_act": "relu",
        "hidden_size": shape.n_embd,
        "intermediate_size": shape.n_ff,
        "max_position_embeddings": 4096,
        "num_attention_heads": shape.n_head,
        "num_hidden_layers": shape.n_layer,
        "num_key_value_heads": shape.n_head_kv,
        "rms_norm_eps": 1e-05,
        "rope_theta": shape.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": shape.n_vocab,
    }
    if shape.n_expert:
        fields |= {"num_local_experts": shape.n_expert, "num_experts_per_tok": 2}
    return fields


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, layer by layer, slowest dimension first."""
    e, f, kv = shape.n_embd, shape.n_ff, shape.n_embd // shape.n_head * shape.n_head_kv
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.n_vocab, e)}
    for n in range(shape.n_layer):
        layer = f"model.layers.{n}."
        shapes |= {
            f"{layer}input_layernorm.weight": (e,),
            f"{layer}self_attn.q_proj.weight": (e, e),
            f"{layer}self_attn.k_proj.weight": (kv, e),
            f"{layer}self_attn.v_proj.weight": (kv, e),
            f"{layer}self_attn.o_proj.weight": (e, e),
            f"{layer}post_attention_layernorm.weight": (e,),
        }
        if shape.n_expert:
            shapes[f"{layer}block_sparse_moe.gate.weight"] = (shape.n_expert, e)
            ffns = [(f"{layer}block_sparse_moe.experts.{i}.", "w1", "w3", "w2") for i in range(shape.n_expert)]
        else:
            ffns = [(f"{layer}mlp.", "gate_proj", "up_proj", "down_proj")]
        for prefix, gate, up, down in ffns:
            shapes |= {
                f"{prefix}{gate}.weight": (f, e),
                f"{prefix}{up}.weight": (f, e),
                f"{prefix}{down}.weight": (e, f),
            }
            if shape.ranks:
                shapes[f"{prefix}predictor.fc1.weight"] = (shape.ranks[n], e)
                shapes[f"{prefix}predictor.fc2.weight"] = (f, shape.ranks[n])
    return shapes | {"model.norm.weight": (e,), "lm_head.weight": (shape.n_vocab, e)}


def write_checkpoint(
    directory: Path,
    shape: Shape,
    shard_bytes: int = 5 << 30,
    random_layers: int | None = None,
    weights: Weights | None = None,
) -> int:
    """Writes config, tokenizer and bf16 shards with an index. Returns the bytes of all tensors.

    Args:
        random_layers: layers below this number get weights, the rest are holes of sparse files (zeros, which take no
            disk); None: all layers do.
        weights: values of the tensors, such as `activity.ActiveWeights`; None: RandomWeights().
    """
    write_without_weights(directory, shape)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, dims in tensor_shapes(shape).items():
        if filled and filled + 2 * prod(dims) > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = dims
        filled += 2 * prod(dims)

    weights = weights or RandomWeights()
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        with open(directory / file, "wb") as out:
            out.write(header(shard))
            for name, dims in shard.items():
                layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
                if random_layers is None or layer < random_layers:
                    for piece in weights(name, dims):
                        out.write(piece.data)
                else:
                    out.seek(2 * prod(dims), 1)
            out.truncate()
    total = sum(2 * prod(dims) for shard in shards for dims in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def write_without_weights(directory: Path, shape: Shape) -> None:
    """Config and tokenizer of a checkpoint."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config(shape), indent=2))
    write_tokenizer(directory)


class RandomWeights:
    """Every tensor from a random place of one block of N(0, 0.02^2), repeated: as fast as the disk."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._block = to_bf16(0.02 * self._rng.standard_normal(BLOCK, dtype=np.float32))

    def __call__(self, name: str, dims: tuple[int, ...]) -> Iterator[np.ndarray]:
        n, start = prod(dims), int(self._rng.integers(BLOCK))
        while n:
            piece = self._block[start : start + n]
            yield piece
            n, start = n - len(piece), 0


def header(shapes: dict[str, tuple[int, ...]], dtype: str = "BF16", itemsize: int = 2) -> bytes:
    """A safetensors header for tensors that follow each other in this order."""
    entries, offset = {}, 0
    for name, dims in shapes.items():
        end = offset + itemsize * prod(dims)
        entries[name] = {"dtype": dtype, "shape": list(dims), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 -> bf16 bits in uint16, rounded to nearest even. For finite values."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_tokenizer(directory: Path) -> None:
    """A byte-level fallback vocabulary without merges, in the shape of Mistral's tokenizer.json."""
    specials = ["<unk>", "<s>", "</s>"]
    tokens = specials + [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            | {"special": True}
            for i, text in enumerate(specials)
        ],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [],
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(names | {"tokenizer_class": "LlamaTokenizer"}))
