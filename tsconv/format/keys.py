"""Metadata of the two files: llama.cpp's `general.*` and `llama.*` keys, and `turbosparse.*` (docs/format.md)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, LlamaFileType

from tsconv.arch.family import Family
from tsconv.checkpoint.config import ModelConfig
from tsconv.checkpoint.source import Source
from tsconv.format import layouts
from tsconv.format.mixes import OutType
from tsconv.format.order import KEY as NEURON_ORDER
from tsconv.format.order import layer_key
from tsconv.transform.neuron_order import Order

ARCHITECTURE = "turbosparse"
FORMAT_VERSION = 1  # of statistics; models and sidecars: tsconv.format.layouts
FINGERPRINT = "turbosparse.source.fingerprint"

PredictorKind = Literal["none", "embedded", "external"]

# `embedded`: round(sigmoid(z)) is 1 only above 0. `external`: Bamboo's engine counts a logit equal to the threshold.
COMPARISON = {"embedded": "gt", "external": "ge"}

FILE_TYPES = {
    GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
    GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    GGMLQuantizationType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    GGMLQuantizationType.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    GGMLQuantizationType.Q5_0: LlamaFileType.MOSTLY_Q5_0,
    GGMLQuantizationType.Q5_1: LlamaFileType.MOSTLY_Q5_1,
    GGMLQuantizationType.Q4_K: LlamaFileType.MOSTLY_Q4_K_S,
    GGMLQuantizationType.Q5_K: LlamaFileType.MOSTLY_Q5_K_S,
    GGMLQuantizationType.Q6_K: LlamaFileType.MOSTLY_Q6_K,
    GGMLQuantizationType.Q3_K: LlamaFileType.MOSTLY_Q3_K_S,
    GGMLQuantizationType.IQ4_NL: LlamaFileType.MOSTLY_IQ4_NL,
}


@dataclass(frozen=True)
class Provenance:
    """What both files say about where they come from and that they belong together."""

    source: Source
    pair_id: str  # 32 lower-case hex digits
    fingerprint: str  # tsconv.checkpoint.fingerprint
    neuron_order: str  # "checkpoint" or "hot_first"
    card: dict[str, Any]  # front matter of the checkpoint's model card; empty when it has none


def read_card(directory: Path) -> dict[str, Any]:
    """The YAML front matter of `directory`/README.md; {} when there is none that can be read: it is a courtesy."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        return metadata_load(directory / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def add_common(writer: gguf.GGUFWriter, provenance: Provenance, config: ModelConfig, family: Family) -> None:
    """Keys that model and sidecar share."""
    source, card = provenance.source, provenance.card
    writer.add_name(as_text(source.name))
    for key, add in (("license", writer.add_license), ("license_name", writer.add_license_name)):
        value = card.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, str):
            add(value)
    if source.repo is not None:
        writer.add_source_url(f"https://huggingface.co/{source.repo}")
        writer.add_string("turbosparse.source.repo", source.repo)
    if source.revision is not None:
        writer.add_string("turbosparse.source.revision", source.revision)
    writer.add_string(FINGERPRINT, provenance.fingerprint)
    writer.add_string("turbosparse.pair_id", provenance.pair_id)
    writer.add_string(NEURON_ORDER, provenance.neuron_order)
    writer.add_uint32("llama.block_count", config.n_layer)
    writer.add_uint32("llama.embedding_length", config.n_embd)
    writer.add_uint32("llama.feed_forward_length", config.n_ff)
    if family.is_moe:
        writer.add_uint32("llama.expert_count", config.n_expert)


def as_text(name: str) -> str:
    """The name of a file as UTF-8 can hold it: bytes that are not become U+FFFD."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _add_layout(writer: gguf.GGUFWriter, key: layouts.LayoutKey, version: int) -> None:
    """The format version, and from version 2 on the layout, which is not rows: the lowest version that will do, so that
    older readers may have the file."""
    writer.add_uint32("turbosparse.format_version", version)
    if version >= layouts.LAYOUT_VERSION:
        writer.add_string(key.key, key.other)


def add_model(
    writer: gguf.GGUFWriter, config: ModelConfig, kind: PredictorKind, outtype: OutType, in_bundles: bool
) -> None:
    """Keys of the model file: what llama.cpp's llama architecture reads (src/models/llama.cpp), and ours."""
    writer.add_type("model")
    _add_layout(writer, layouts.FFN, layouts.LAYOUT_VERSION if in_bundles else layouts.PLAIN_VERSION)
    writer.add_file_type(FILE_TYPES[outtype.kind] if outtype.file_type is None else outtype.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_uint32("llama.vocab_size", config.n_vocab)
    writer.add_uint32("llama.context_length", config.n_ctx)
    writer.add_uint32("llama.attention.head_count", config.n_head)
    writer.add_uint32("llama.attention.head_count_kv", config.n_head_kv)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.rms_eps)
    writer.add_uint32("llama.rope.dimension_count", config.head_dim)
    writer.add_float32("llama.rope.freq_base", config.rope_theta)
    if config.n_expert:
        writer.add_uint32("llama.expert_used_count", config.n_expert_used)
    writer.add_string("turbosparse.activation", "drelu")
    writer.add_string("turbosparse.ffn_down.layout", "neuron_major")
    writer.add_string("turbosparse.predictor.kind", kind)
    if config.sliding_window is not None:
        # The checkpoint attends to this many positions only; llama.cpp's llama graph attends to all of them.
        writer.add_uint32("turbosparse.source.sliding_window", config.sliding_window)


def add_sidecar(writer: gguf.GGUFWriter, family: Family, kind: PredictorKind, ranks: list[int], version: int) -> None:
    """Keys of the sidecar. Thresholds are 0: others are refused while reading.

    Args:
        ranks: one entry per layer.
        version: of `layouts`; from LAYOUT_VERSION on matrices are in panels.
    """
    writer.add_type("predictor")
    _add_layout(writer, layouts.PREDICTOR, version)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string("turbosparse.predictor.input", family.predictor_input)
    writer.add_array("turbosparse.predictor.rank", ranks)
    writer.add_array("turbosparse.predictor.threshold", [0.0] * len(ranks))
    writer.add_string("turbosparse.predictor.comparison", COMPARISON[kind])


def add_neuron_order(writer: gguf.GGUFWriter, order: Order, profile: str, sparsity: str) -> None:
    """Keys of a model whose neurons are not in the checkpoint's order.

    Args:
        order: int32 [n_layer, n_ffn, n_ff], see tsconv.transform.neuron_order.
        profile: the text whose statistics chose it, for people.
        sparsity: the function that was profiled.
    """
    writer.add_string(f"{NEURON_ORDER}.profile", profile)
    writer.add_string(f"{NEURON_ORDER}.sparsity", sparsity)
    for layer, neurons in enumerate(order):
        values = np.ascontiguousarray(neurons).reshape(-1).data
        writer.add_key_value(layer_key(layer), values, GGUFValueType.ARRAY, GGUFValueType.INT32)
