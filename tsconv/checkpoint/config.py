"""config.json of a checkpoint -> `ModelConfig`, every value checked while it is read.

A field that would change the computed function without changing a tensor's shape (activation, RoPE scaling, biases,
router normalisation) is either carried into the GGUF file or refused here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsconv.checkpoint.lfs import refuse_pointer
from tsconv.errors import CheckpointError

# Limits of the file format (docs/format.md), as native/include/tsffn.h has them.
MAX_LAYERS = 512  # TSFFN_MAX_LAYERS
MAX_EXPERTS = 1024  # TSFFN_MAX_EXPERTS
MAX_DIM = 1 << 20  # TSFFN_MAX_DIM
MAX_CONTEXT = 1 << 24  # TSFFN_MAX_CONTEXT
MAX_U32 = (1 << 32) - 1  # of keys that nothing computes with

# Fields that must hold the value that the converted model computes with. A missing field or null means that value.
FIXED_FIELDS = {
    "attention_bias": False,
    "mlp_bias": False,
    "norm_topk_prob": True,
    "rope_scaling": None,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
}
FIXES = {"quantization_config": "tsconv converts unquantized checkpoints: name the one that this was made from"}

# What llama.cpp computes for architectures that its own converter takes, whatever their configuration says. No other
# graph of a decoder alone has a ReLU. Source: src/models/*.cpp, conversion/*.py.
LLAMA_CPP_RELU = {
    "ArceeForCausalLM": "relu2",
    "Jais2ForCausalLM": "relu2",
    "NemotronForCausalLM": "relu2",
    "NemotronHForCausalLM": "relu2",
    "NemotronHPuzzleForCausalLM": "relu2",
    "PLMForCausalLM": "relu2",
    "SmallThinkerForCausalLM": "relu",
}
LLAMA_CPP_SILU = frozenset(
    f"{name}ForCausalLM"
    for name in (
        *("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "MiniCPM", "MiniCPM3"),
        *("InternLM2", "StableLm", "Olmo", "Phi3", "Granite"),
    )
)
ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "mlp_hidden_act", "activation_function", "activation")


@dataclass(frozen=True)
class ModelConfig:
    """Hyper-parameters of a checkpoint. Dimensions are counts of elements; `n_ff` is per expert for MoE models."""

    architecture: str
    n_vocab: int
    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_ctx: int
    rope_theta: float
    rms_eps: float
    tied_embeddings: bool
    n_expert: int = 0  # 0: one dense FFN per layer
    n_expert_used: int = 0
    sliding_window: int | None = None  # in positions; llama.cpp's llama graph has none

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`. Raises CheckpointError when the file is missing, not JSON, or not an object."""
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("file is missing", where=path, fix="is this a Hugging Face checkpoint folder?") from None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not valid JSON ({error})", where=path, fix="download the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError("wrong content", where=path, expected="a JSON object", found=type(value).__name__)
    return value


class _Fields:
    """Typed, range-checked access to the fields of one config.json."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path, self.values = path, values

    def error(self, key: str, expected: object, fix: str | None = None) -> CheckpointError:
        found = repr(self.values[key]) if key in self.values else "nothing"
        return CheckpointError(f"bad {key}", where=self.path, expected=expected, found=found, fix=fix)

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self.error(key, f"an integer in {low}..{high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value: Any = self.values.get(key, default)
        if type(value) not in (int, float) or not low < value < high:
            raise self.error(key, f"a number between {low:g} and {high:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if type(value) is not bool:
            raise self.error(key, "true or false")
        return value


def read_config(directory: Path, model_types: dict[str, str], moe: frozenset[str]) -> ModelConfig:
    """Reads and checks `directory`/config.json.

    Args:
        model_types: the known architectures, each with the `model_type` it must come with.
        moe: those of them that have experts.

    Raises:
        CheckpointError: a field is missing, of another type, out of range, or asks for a function that the
            converted model would not compute.
    """
    path = directory / "config.json"
    fields = _Fields(path, read_json(path))
    architecture = _architecture(fields, model_types)
    _check_activation(fields)
    for key, expected in FIXED_FIELDS.items():
        if fields.values.get(key) not in (None, expected):
            raise fields.error(key, repr(expected), FIXES.get(key, "tsconv converts models with no other value"))

    n_embd = fields.integer("hidden_size", 1, MAX_DIM)
    n_head = fields.integer("num_attention_heads", 1, MAX_DIM)
    n_head_kv = fields.integer("num_key_value_heads", 1, n_head, n_head)
    if n_embd % n_head or (n_embd // n_head) % 2:
        raise fields.error("num_attention_heads", f"a divisor of hidden_size {n_embd} that leaves heads of even size")
    if n_head % n_head_kv:
        raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads {n_head}")
    if fields.values.get("head_dim") not in (None, n_embd // n_head):
        raise fields.error("head_dim", f"hidden_size / num_attention_heads = {n_embd // n_head}")

    n_expert = fields.integer("num_local_experts", 2, MAX_EXPERTS) if architecture in moe else 0
    return ModelConfig(
        architecture=architecture,
        n_vocab=fields.integer("vocab_size", 1, 1 << 24),
        n_embd=n_embd,
        n_ff=fields.integer("intermediate_size", 1, MAX_DIM),
        n_layer=fields.integer("num_hidden_layers", 1, MAX_LAYERS),
        n_head=n_head,
        n_head_kv=n_head_kv,
        n_ctx=fields.integer("max_position_embeddings", 1, MAX_CONTEXT),
        rope_theta=_rope_theta(fields),
        rms_eps=fields.number("rms_norm_eps", 0.0, 1.0),
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        n_expert=n_expert,
        n_expert_used=fields.integer("num_experts_per_tok", 1, n_expert) if n_expert else 0,
        sliding_window=(
            None if fields.values.get("sliding_window") is None else fields.integer("sliding_window", 1, MAX_U32)
        ),
    )


def _architecture(fields: _Fields, model_types: dict[str, str]) -> str:
    known = ", ".join(model_types)
    named = fields.values.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise fields.error("architectures", f"a list with one of: {known}")
    if named[0] not in model_types:
        raise CheckpointError(
            f"architecture {named[0]} is not one that tsconv converts",
            where=fields.path,
            expected=f"one of: {known}",
            fix=f"tsconv converts dReLU (TurboSparse, Bamboo) models only; {_other_converter(named[0], fields.values)}",
        )
    if fields.values.get("model_type") != model_types[named[0]]:
        raise fields.error("model_type", repr(model_types[named[0]]))
    return named[0]


def _other_converter(architecture: str, values: dict[str, Any]) -> str:
    """What llama.cpp's own converter makes of a model that is not for tsconv: its graphs do not ask for hidden_act."""
    key, activation = next(((k, values[k]) for k in ACTIVATION_KEYS if isinstance(values.get(k), str)), ("", ""))
    computed = LLAMA_CPP_RELU.get(architecture)
    if "relu" not in activation.lower() or activation == computed:
        return "llama.cpp's own converter takes most others"
    if computed is None:
        computed = "SiLU" if architecture in LLAMA_CPP_SILU else "SiLU or GELU, if it has this architecture at all,"
    return (
        f"nor is this one for llama.cpp's own converter: whatever {key} says, llama.cpp computes {computed} where this"
        f" model needs {activation}, and its text would make no sense"
    )


def _check_activation(fields: _Fields) -> None:
    activation = fields.values.get("hidden_act")
    if activation == "relu":
        return
    kind = "a SwiGLU" if activation in ("silu", "swish") else "not a dReLU"
    raise fields.error(
        "hidden_act",
        "'relu'",
        f"this is {kind} checkpoint and tsconv converts dReLU models only: the sparse runtime would compute it wrongly",
    )


def _rope_theta(fields: _Fields) -> float:
    """`rope_theta`, or the same inside `rope_parameters` as newer transformers write it. Older ones read the first."""
    parameters = fields.values.get("rope_parameters")
    if parameters is None:
        return fields.number("rope_theta", 0.0, 1e12, 10000.0)
    if not isinstance(parameters, dict) or parameters.get("rope_type", "default") != "default":
        raise fields.error("rope_parameters", "rope_type 'default'", "RoPE scaling is not supported")
    theta = _Fields(fields.path, parameters).number("rope_theta", 0.0, 1e12, fields.values.get("rope_theta"))
    if fields.values.get("rope_theta") not in (None, theta):
        raise fields.error(
            "rope_theta", f"{theta}, as in rope_parameters", "leave the one that the model was trained with"
        )
    return theta
