"""A family's tables against the tensors of a real checkpoint: every output finds its sources, nothing is left over."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tsconv.arch.family import Family, Output
from tsconv.checkpoint.config import MAX_DIM, ModelConfig
from tsconv.checkpoint.safetensors_reader import SourceTensor
from tsconv.errors import CheckpointError

NAMED_IN_MESSAGE = 3  # names listed before "and N more"


@dataclass(frozen=True)
class Matched:
    """An output and the checkpoint tensors it is made of, in order."""

    output: Output
    sources: tuple[SourceTensor, ...]


def has_predictors(family: Family, config: ModelConfig, tensors: Mapping[str, SourceTensor]) -> bool:
    """Whether the checkpoint holds predictor matrices, of any layer."""
    experts: Iterable[int | None] = range(config.n_expert) if family.has_expert_predictors else (None,)
    return any(
        name in tensors for n in range(config.n_layer) for e in experts for name in family.predictor_sources(n, e)
    )


def predictor_ranks(family: Family, config: ModelConfig, tensors: Mapping[str, SourceTensor]) -> list[int]:
    """Rank of each layer's predictors, from the rows of fc1 (of expert 0).

    Raises:
        CheckpointError: a layer has no fc1, or its rank is out of bounds.
    """
    ranks = []
    for n in range(config.n_layer):
        name = family.predictor_sources(n, 0)[0]
        if name not in tensors:
            raise CheckpointError(f"layer {n} has no predictor but others have: {name} is missing")
        rank = tensors[name].shape[0] if tensors[name].shape else 0
        if not 1 <= rank <= MAX_DIM:
            raise CheckpointError("bad predictor rank", where=tensors[name].where, expected=f"1..{MAX_DIM}", found=rank)
        ranks.append(rank)
    return ranks


def match(outputs: Iterable[Output], tensors: Mapping[str, SourceTensor]) -> list[Matched]:
    """Finds the sources of every output.

    Raises:
        CheckpointError: sources are missing, or one has another shape than the configuration says.
    """
    matched, missing = [], []
    for output in outputs:
        found = tuple(tensors[name] for name in output.sources if name in tensors)
        missing += [name for name in output.sources if name not in tensors]
        for source in found:
            if source.shape != output.source_shape:
                raise CheckpointError(
                    "shape does not fit the model", where=source.where, expected=output.source_shape, found=source.shape
                )
        matched.append(Matched(output, found))
    if missing:
        fix = None
        if missing == ["lm_head.weight"]:
            fix = "if the output matrix is the embeddings', set tie_word_embeddings to true in config.json"
        raise CheckpointError(f"{len(missing)} tensors are missing from the checkpoint: {_some(missing)}", fix=fix)
    return matched


def refuse_leftovers(family: Family, config: ModelConfig, tensors: Iterable[str], matched: Iterable[Matched]) -> None:
    """Every tensor of the checkpoint must be used, or be one that is known to hold no weights of the model.

    Raises:
        CheckpointError: it names the tensors that no output uses.
    """
    used = {source.name for item in matched for source in item.sources}
    if config.tied_embeddings:
        used.add("lm_head.weight")
    left = [name for name in tensors if name not in used and not any(re.search(p, name) for p in family.ignored)]
    if left:
        raise CheckpointError(
            f"{len(left)} tensors of the checkpoint have no place in the model: {_some(left)}",
            fix="the model computes something that tsconv does not know; converting would change it",
        )


def _some(names: list[str]) -> str:
    more = len(names) - NAMED_IN_MESSAGE
    return ", ".join(names[:NAMED_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")
