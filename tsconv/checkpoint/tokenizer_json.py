"""Reads `tokenizer.json` of the tokenizers library: the BPE form of a sentencepiece model (Llama, Mistral).

llama.cpp's SPM merges by the score of the joined piece, BPE by the rank of the pair. The two choose the same merges
when the list of pairs was made from a sentencepiece model, that is when
- every way to join two pieces into a third is in the list (SPM would join them, asked or not), and
- all pairs that make one piece stand together (SPM has one score per piece).
Then `-position of the piece in the merge order` is its score. What is left is the order among pairs that make the
*same* piece: SPM takes the leftmost in the text, BPE the first in the list. They could only differ where two such pairs
overlap ([l][m][r] with l+m = m+r); tests/e2e/test_tokenizer.py tries every such triple of the real vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from tsconv.checkpoint.config import read_json
from tsconv.checkpoint.vocabulary import BYTE_TOKENS, SPACE, Vocabulary, splits
from tsconv.errors import CheckpointError

REQUIRED_MODEL = {  # member of "model" -> the values with which BPE does what SPM does
    "type": ("BPE",),
    "byte_fallback": (True,),
    "dropout": (None, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "ignore_merges": (None, False),
}
PREPEND = {"type": "Prepend", "prepend": SPACE}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
NORMALIZERS = (  # (normalizer, does it put a space before every text)
    ({"type": "Sequence", "normalizers": [PREPEND, REPLACE]}, True),
    ({"type": "Sequence", "normalizers": [REPLACE]}, False),
    (REPLACE, False),
)


@dataclass(frozen=True)
class TokenizerJson:
    """`added_tokens` are the raw entries of the file: id, content, special, lstrip, rstrip, single_word, normalized."""

    vocabulary: Vocabulary
    added_tokens: list[dict[str, Any]]
    add_bos: bool


def read_tokenizer_json(path: Path) -> TokenizerJson:
    """Pieces with scores for llama.cpp's SPM.

    Raises:
        CheckpointError: the file is missing or damaged, its ids have holes, it is not BPE with byte fallback made from
            a sentencepiece model, or it treats spaces in a way that llama.cpp cannot follow.
    """
    root = read_json(path)
    model = _typed(root, "model", dict, path)
    for key, allowed in REQUIRED_MODEL.items():
        if model.get(key) not in allowed:
            raise CheckpointError(
                f"unsupported tokenizer: model.{key}",
                where=path,
                expected=repr(allowed[-1]),
                found=repr(model.get(key)),
                fix="only tokenizers made from a sentencepiece BPE model (Llama, Mistral) can be converted",
            )
    tokens = _tokens(_typed(model, "vocab", dict, path), path)
    scores = _scores(tokens, _merges(_typed(model, "merges", list, path), path), path)
    unknown = model.get("unk_token")
    types = [
        TokenType.UNKNOWN if token == unknown else TokenType.BYTE if token in BYTE_TOKENS else TokenType.NORMAL
        for token in tokens
    ]
    added = root.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(entry, dict) for entry in added):
        raise CheckpointError("added_tokens is damaged", where=path, expected="a list of objects")
    vocabulary = Vocabulary(
        source=path,
        tokens=tokens,
        scores=scores,
        types=types,
        add_space_prefix=_space_prefix(root, path),
        special={"unk": unknown} if isinstance(unknown, str) and unknown in tokens else {},
    )
    return TokenizerJson(vocabulary, added, _begins_with_bos(root.get("post_processor")))


def _typed(parent: dict[str, Any], key: str, kind: type, path: Path) -> Any:
    value = parent.get(key)
    if not isinstance(value, kind):
        raise CheckpointError(
            f"not a tokenizer of the tokenizers library: {key}",
            where=path,
            expected=kind.__name__,
            found=type(value).__name__,
        )
    return value


def _tokens(vocab: dict[str, Any], path: Path) -> list[str]:
    """The pieces ordered by id; the ids must be 0..n-1."""
    by_id = {i: token for token, i in vocab.items() if type(i) is int}
    for i in range(len(vocab)):
        if i not in by_id:
            raise CheckpointError(
                "the ids of the vocabulary have a hole",
                where=path,
                expected=f"ids 0..{len(vocab) - 1}",
                found=f"no {i}",
            )
    return [by_id[i] for i in range(len(vocab))]


def _merges(entries: list[Any], path: Path) -> list[tuple[str, str]]:
    """Pairs in rank order, from both forms of the file: "left right" and ["left", "right"]."""
    merges = []
    for rank, entry in enumerate(entries):
        pair = entry.split(" ") if isinstance(entry, str) else entry
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) and part for part in pair)):
            raise CheckpointError(f"merge {rank} is damaged", where=path, expected="two pieces", found=repr(entry)[:80])
        merges.append((pair[0], pair[1]))
    return merges


def _scores(tokens: list[str], merges: list[tuple[str, str]], path: Path) -> list[float]:
    """Scores with which SPM merges as these pairs do; pieces that no pair makes come last, ordered by id."""
    known = set(tokens)
    position: dict[str, int] = {}
    previous = None
    for rank, (left, right) in enumerate(merges):
        joined = left + right
        if not {left, right, joined} <= known:
            raise CheckpointError(f"merge {rank} ({left} {right}) names a piece outside the vocabulary", where=path)
        if joined != previous and joined in position:
            raise _not_sentencepiece(f"piece {joined!r} is made by merges of different ranks", path)
        previous = joined
        position.setdefault(joined, len(position))
    pairs = set(merges)
    for token in tokens:
        for left, right in splits(token):
            # A character outside the vocabulary becomes bytes before BPE merges, but after SPM does.
            joinable = all(part in known or len(part) == 1 for part in (left, right))
            if joinable and (left, right) not in pairs:
                raise _not_sentencepiece(f"no merge makes {token!r} from {left!r} and {right!r}", path)
    unmade = iter(range(len(position), len(tokens)))
    return [-float(position[token] if token in position else next(unmade)) for token in tokens]


def _not_sentencepiece(what: str, path: Path) -> CheckpointError:
    return CheckpointError(
        f"the merges do not come from a sentencepiece model: {what}",
        where=path,
        fix="put the tokenizer.model that belongs to this checkpoint in its place, if there is one",
    )


def _space_prefix(root: dict[str, Any], path: Path) -> bool:
    """Whether a space goes before every text. Only what llama.cpp's SPM can do is accepted."""
    normalizer, pre_tokenizer = root.get("normalizer"), root.get("pre_tokenizer")
    if pre_tokenizer is None:
        for known, prefix in NORMALIZERS:
            if normalizer == known:
                return prefix
    elif normalizer is None and isinstance(pre_tokenizer, dict):
        never = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": False}
        if pre_tokenizer == never:
            return False
    raise CheckpointError(
        "unsupported treatment of spaces",
        where=path,
        expected=f"a normalizer that prepends {SPACE} to every text and replaces spaces by it, and no pre_tokenizer",
        found=f"normalizer {normalizer}, pre_tokenizer {pre_tokenizer}",
        fix="llama.cpp's SPM tokenizer has no other (in transformers: legacy = true)",
    )


def _begins_with_bos(post_processor: Any) -> bool:
    """Whether the template for one text begins with a special token."""
    try:
        return "SpecialToken" in post_processor["single"][0]
    except (TypeError, KeyError, IndexError):
        return False
