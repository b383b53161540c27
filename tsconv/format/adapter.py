"""Which adapters (LoRA) fit a model."""

from __future__ import annotations

import re

from gguf import GGMLQuantizationType, GGUFValueType

from tsconv.errors import ModelFileError
from tsconv.format.header import Header, TensorEntry
from tsconv.format.order import CHECKPOINT, kind_of
from tsconv.transform import qkv

FFN = re.compile(r"^blk\.\d+\.ffn_(gate|up|down)(_exps)?\.")  # not the router, ffn_gate_inp
LORA = re.compile(r"\.lora_([ab])$")
NORM = "_norm.weight"  # llama.cpp leaves these out: most adapters work without
EMBEDDINGS = "token_embd.weight"  # looked up, not multiplied with: a and b are the other way round
TYPES = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)

# What llama.cpp demands of an adapter's keys (llama-adapter.cpp); a model is a llama to it (docs/format.md).
KEYS = {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
ALPHA = "adapter.lora.alpha"


def refuse_adapter(model: Header, adapter: Header) -> None:
    """Refuses an adapter that is none, or another model's: of an unknown tensor, or of other shapes. llama.cpp would
    refuse some of those, end the process at others, and compute without what it does not know.

    And one that changes FFN tensors of a model whose neurons are not where its training had them, or q, k or v of a
    model that has them in one matrix.

    Raises:
        ModelFileError: it does not fit; names adapter and tensor.
    """
    _check_keys(adapter)
    present = {tensor.name: tensor for tensor in model.tensors}
    halves: dict[str, dict[str, TensorEntry]] = {}
    for tensor in adapter.tensors:
        match = LORA.search(tensor.name)
        if match is None and tensor.name.endswith(NORM):
            continue
        if match is None:
            raise ModelFileError(
                "an adapter's tensor",
                where=f"{adapter.path}: {tensor.name}",
                expected="a name that ends in .lora_a or .lora_b",
            )
        halves.setdefault(tensor.name[: match.start()], {})[match[1]] = tensor
    if not halves:
        raise ModelFileError("the adapter has no tensors", where=adapter.path)
    for name, pair in halves.items():
        if FFN.match(name) and kind_of(model) != CHECKPOINT:
            raise ModelFileError(
                f"the adapter changes {name}, whose neurons are in another order in {model.path}",
                where=adapter.path,
                fix="use it with a model that was converted without --profile and not reordered",
            )
        if qkv.PART.match(name) and name not in present and qkv.together(name) in present:
            raise ModelFileError(
                f"the adapter changes {name}, which is part of {qkv.together(name)} in {model.path}",
                where=adapter.path,
                fix="use it with a model that was converted with --no-fuse-qkv",
            )
        if name not in present:
            raise ModelFileError(
                f"the adapter changes {name}, which {model.path} does not have",
                where=adapter.path,
                fix="use it with the model it was trained on",
            )
        _check_pair(present[name], pair, adapter)


def _check_keys(adapter: Header) -> None:
    for key, expected in KEYS.items():
        if adapter.keys.get(key) != expected:
            raise ModelFileError(
                f"not an adapter for this model: key {key}",
                where=adapter.path,
                expected=repr(expected),
                found=repr(adapter.keys.get(key, "nothing")),
                fix="use a LoRA adapter in GGUF for the llama architecture",
            )
    if ALPHA in adapter.keys and adapter.types[ALPHA].kind != GGUFValueType.FLOAT32:
        raise ModelFileError(f"bad key {ALPHA}", where=adapter.path, expected="float32", found=adapter.types[ALPHA])


def _check_pair(weight: TensorEntry, pair: dict[str, TensorEntry], adapter: Header) -> None:
    """Both halves are there, and b a is of the weight's shape. Shapes are fastest dimension first."""
    where = f"{adapter.path}: {weight.name}"
    if len(pair) < 2:
        raise ModelFileError("half of the adapter's matrix is missing", where=where, expected="lora_a and lora_b")
    if len(weight.shape) < 2:
        raise ModelFileError("llama.cpp has adapters for matrices only", where=where, found=list(weight.shape))
    for tensor in pair.values():
        if tensor.kind not in TYPES:
            raise ModelFileError(
                "type", where=f"{adapter.path}: {tensor.name}", expected="f32, f16 or bf16", found=tensor.kind.name
            )
    n_in, n_out, *experts = weight.shape
    a, b = pair["a"].shape, pair["b"].shape
    rank = b[0] if b else 0
    expected = [(n_in, rank, *experts), (rank, n_out, *experts)]
    if weight.name == EMBEDDINGS:
        expected = [(rank, n_out), (rank, n_in)]
    if [a, b] != expected or rank < 1:
        raise ModelFileError(
            "the adapter is of another shape",
            where=where,
            expected=" and ".join(str(list(shape)) for shape in expected),
            found=f"{list(a)} and {list(b)}",
            fix="use it with the model it was trained on",
        )
