"""What a model family is: tables that say which checkpoint tensors make each tensor of the GGUF files.

A family file holds data only. `{n}` in a name is the layer, `{e}` the expert. An output whose sources have `{e}` but
whose own name has not is the stack of all experts' tensors, expert after expert.
Tensor names on the left are those of llama.cpp's llama architecture (src/models/llama.cpp) and docs/format.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tsconv.checkpoint.config import ModelConfig

# copy          the rows as they are
# rope          rows permuted for llama.cpp's RoPE, within each query or key head (transform/rope.py)
# neuron_major  [n_embd, n_ff] stored as n_ff rows of n_embd (transform/layout.py); the declared shape stays
# reciprocal    1/w of a vector, 0 where that is not finite (transform/layout.py)
Op = Literal["copy", "rope", "neuron_major", "reciprocal"]


@dataclass(frozen=True)
class Template:
    """One row of a family's table. `shape` names dimensions of the source tensor, slowest first."""

    name: str
    source: str
    shape: tuple[str, ...]
    op: Op = "copy"


@dataclass(frozen=True)
class Output:
    """A tensor to write. `shape` is the declared one, slowest dimension first; each source has `source_shape`."""

    name: str
    sources: tuple[str, ...]
    source_shape: tuple[int, ...]
    shape: tuple[int, ...]
    op: Op

    @property
    def row_length(self) -> int:
        """Elements of a stored row: what quantization blocks run along."""
        return self.source_shape[0] if self.op == "neuron_major" else self.source_shape[-1]

    @property
    def n_rows(self) -> int:
        """Stored rows of one source."""
        if self.op == "neuron_major":
            return self.source_shape[1]
        return self.source_shape[0] if len(self.source_shape) > 1 else 1


@dataclass(frozen=True)
class Family:
    """One architecture of checkpoints. `ignored` are patterns of tensors that hold no weights of the model."""

    model_type: str
    whole: tuple[Template, ...]
    layer: tuple[Template, ...]
    predictor: tuple[Template, ...]
    predictor_input: Literal["pre_norm", "normed"]
    ignored: tuple[str, ...] = (r"\.rotary_emb\.inv_freq$",)

    @property
    def is_moe(self) -> bool:
        return any("{e}" in row.source for row in self.layer)

    @property
    def has_expert_predictors(self) -> bool:
        """Whether each expert has its own predictor."""
        return any("{e}" in row.source for row in self.predictor)

    def predictor_sources(self, n: int, e: int | None = None) -> tuple[str, ...]:
        """Names of fc1 and fc2 of layer `n` (and expert `e`) in a checkpoint."""
        return tuple(row.source.format(n=n, e=e) for row in self.predictor if row.op == "copy")

    def model_outputs(self, config: ModelConfig) -> Iterator[Output]:
        """The tensors of the model file, in file order. Tied embeddings leave out output.weight, as llama.cpp does."""
        for row in self.whole:
            if not (config.tied_embeddings and row.name == "output.weight"):
                yield _output(row, config, {}, 0)
        for n in range(config.n_layer):
            for row in self.layer:
                yield _output(row, config, {}, n)

    def predictor_outputs(self, config: ModelConfig, ranks: list[int]) -> Iterator[Output]:
        """The tensors of the sidecar, in file order; `ranks` has one predictor rank per layer."""
        for n, rank in enumerate(ranks):
            for e in range(config.n_expert) if self.has_expert_predictors else (None,):
                for row in self.predictor:
                    yield _output(row, config, {"rank": rank}, n, e)


def _output(row: Template, config: ModelConfig, extra: dict[str, int], n: int, e: int | None = None) -> Output:
    dims = {
        "n_vocab": config.n_vocab,
        "n_embd": config.n_embd,
        "n_embd_kv": config.n_head_kv * config.head_dim,
        "n_ff": config.n_ff,
        "n_expert": config.n_expert,
        **extra,
    }
    shape = tuple(dims[dim] for dim in row.shape)
    if "{e}" in row.source and "{e}" not in row.name:
        sources = tuple(row.source.format(n=n, e=expert) for expert in range(config.n_expert))
        return Output(row.name.format(n=n), sources, shape, (config.n_expert, *shape), row.op)
    return Output(row.name.format(n=n, e=e), (row.source.format(n=n, e=e),), shape, shape, row.op)


# What all families share: embeddings, norms and attention have the names of Hugging Face's Mistral.
WHOLE = (
    Template("token_embd.weight", "model.embed_tokens.weight", ("n_vocab", "n_embd")),
    Template("output_norm.weight", "model.norm.weight", ("n_embd",)),
    Template("output.weight", "lm_head.weight", ("n_vocab", "n_embd")),
)
ATTENTION = (
    Template("blk.{n}.attn_norm.weight", "model.layers.{n}.input_layernorm.weight", ("n_embd",)),
    Template("blk.{n}.attn_q.weight", "model.layers.{n}.self_attn.q_proj.weight", ("n_embd", "n_embd"), "rope"),
    Template("blk.{n}.attn_k.weight", "model.layers.{n}.self_attn.k_proj.weight", ("n_embd_kv", "n_embd"), "rope"),
    Template("blk.{n}.attn_v.weight", "model.layers.{n}.self_attn.v_proj.weight", ("n_embd_kv", "n_embd")),
    Template("blk.{n}.attn_output.weight", "model.layers.{n}.self_attn.o_proj.weight", ("n_embd", "n_embd")),
    Template("blk.{n}.ffn_norm.weight", "model.layers.{n}.post_attention_layernorm.weight", ("n_embd",)),
)
