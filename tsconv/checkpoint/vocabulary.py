"""The pieces of a subword vocabulary, whichever file they came from, and what llama.cpp's SPM demands of them.

llama.cpp's SPM tokenizer (`llm_tokenizer_spm_session` in src/llama-vocab.cpp) starts from the characters of a text and
joins, again and again, the adjacent pair whose concatenation is the token of the highest score, the leftmost first
among equals. It looks the concatenation up among *all* tokens, whatever their type, and writes a character that is no
token as its bytes `<0xNN>`, which must all exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gguf import TokenType

from tsconv.errors import CheckpointError

SPACE = "▁"  # U+2581, stands for a space inside pieces


@dataclass(frozen=True)
class Vocabulary:
    """Pieces 0..n-1 of one tokenizer file, without the tokens that other files add.

    Attributes:
        source: the file.
        tokens, scores, types: n each.
        add_space_prefix: a space is put before every text, and before the text after a control token.
        special: the names the file itself gives, "bos", "eos", "unk", "pad" -> piece; may be empty.
    """

    source: Path
    tokens: list[str]
    scores: list[float]
    types: list[TokenType]
    add_space_prefix: bool
    special: dict[str, str]


def byte_token(value: int) -> str:
    """The piece that stands for one byte, 0 <= value < 256."""
    return f"<0x{value:02X}>"


BYTE_TOKENS = frozenset(byte_token(value) for value in range(256))


def splits(token: str) -> Iterator[tuple[str, str]]:
    """Every way to cut a token into two non-empty parts."""
    return ((token[:i], token[i:]) for i in range(1, len(token)))


def check_tokens(tokens: list[str], types: list[TokenType], where: Path) -> None:
    """Refuses a token list that llama.cpp would not load, or with which it would tokenize differently.

    Raises:
        CheckpointError: a token is empty, repeated or not Unicode; a byte token is missing; or a token that must not
            come from plain text (control, unknown, byte, unused) can be joined from two others.
    """
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if not token:
            raise CheckpointError(f"token {i} is empty", where=where)
        if token in ids:
            raise CheckpointError(f"tokens {ids[token]} and {i} are both {token!r}", where=where)
        if any("\ud800" <= character <= "\udfff" for character in token):
            raise CheckpointError(f"token {i} ({token!r}) is not valid Unicode", where=where)
        ids[token] = i
    for token in sorted(BYTE_TOKENS):
        if token not in ids or types[ids[token]] != TokenType.BYTE:
            raise CheckpointError(
                f"no byte token {token}, so that characters outside the vocabulary cannot be written",
                where=where,
                expected="a tokenizer with byte fallback",
            )
    for token, kind in zip(tokens, types, strict=True):
        # A user-defined token is cut out of the raw text first; only one with U+2581 can still be joined.
        if kind == TokenType.NORMAL or (kind == TokenType.USER_DEFINED and SPACE not in token):
            continue
        for left, right in splits(token):
            if all(part in ids or len(part) == 1 for part in (left, right)):
                raise CheckpointError(
                    f"plain text would turn into the {kind.name.lower()} token {token!r}, because {left!r} and "
                    f"{right!r} are tokens too",
                    where=where,
                )
