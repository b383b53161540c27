"""Tokens that end a generation besides the tokenizer's own end token, as far as a GGUF file can name them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsconv.checkpoint.config import read_json
from tsconv.errors import CheckpointError

GENERATION_FILE, CONFIG_FILE = "generation_config.json", "config.json"

# What llama.cpp ends a generation at by its text alone. Source: llama.cpp, src/llama-vocab.cpp (special_eog_ids).
KNOWN_TO_LLAMA_CPP = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "[e~["),
        *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>"),
    )
)


@dataclass(frozen=True)
class EndTokens:
    """`eot_id`, `eom_id`: ids for llama.cpp's two further keys. `notes`: what they cannot say."""

    eot_id: int | None
    eom_id: int | None
    notes: tuple[str, ...]


def read_end_tokens(directory: Path, tokens: Sequence[str], bos_id: int, eos_id: int) -> EndTokens:
    """Reads eos_token_id of generation_config.json, which transformers generates by, or else of config.json.

    Args:
        tokens: the whole vocabulary.
        bos_id, eos_id: the tokenizer's.

    Raises:
        CheckpointError: a file is damaged, or eos_token_id is neither an id nor a list of ids.
    """
    file, ids = _end_ids(directory)
    strange = [i for i in ids if not 0 <= i < len(tokens)]
    unknown = [i for i in ids if i not in strange and i != eos_id and tokens[i] not in KNOWN_TO_LLAMA_CPP]
    eot, eom = (*unknown, None, None)[:2]
    rest = unknown[2:]
    notes = []
    if strange:
        notes.append(f"{file}: eos_token_id {', '.join(map(str, strange))} is outside of the vocabulary")
    if rest:
        names = ", ".join(f"{tokens[i]!r} ({i})" for i in rest)
        notes.append(
            f"{file}: a text does not end at {names}, because a GGUF file has room for two end tokens besides the"
            f" tokenizer's: {tokens[unknown[0]]!r} and {tokens[unknown[1]]!r}"
        )
    begin = _optional(directory / CONFIG_FILE).get("bos_token_id")
    if type(begin) is int and begin != bos_id:
        notes.append(
            f"{CONFIG_FILE}: bos_token_id is {begin}; texts begin with the tokenizer's {tokens[bos_id]!r} ({bos_id}),"
            " as in transformers"
        )
    return EndTokens(eot, eom, tuple(notes))


def _end_ids(directory: Path) -> tuple[str, list[int]]:
    """The file that decides, and its ids without repetition."""
    for file in (GENERATION_FILE, CONFIG_FILE):
        value = _optional(directory / file).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(i) is int for i in ids):
            raise CheckpointError(
                "bad eos_token_id", where=directory / file, expected="an id or a list of ids", found=repr(value)[:80]
            )
        return file, list(dict.fromkeys(ids))
    return CONFIG_FILE, []


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
