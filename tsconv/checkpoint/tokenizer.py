"""The tokenizer of a checkpoint folder -> the `tokenizer.*` keys of a GGUF file, as llama.cpp's SPM model.

Read, where present: tokenizer.model or tokenizer.json (with both, tokenizer.model decides and both must agree);
tokenizer_config.json, added_tokens.json and special_tokens_map.json for tokens and special tokens, with the precedence
that transformers gives them; generation_config.json or config.json for further end tokens; chat_template.jinja or
tokenizer_config.json for the chat template.

Source of the names and types: llama.cpp, src/llama-vocab.cpp (`llama_vocab::impl::load`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from tsconv.checkpoint.chat_templates import read_chat_templates
from tsconv.checkpoint.config import read_json
from tsconv.checkpoint.end_tokens import read_end_tokens
from tsconv.checkpoint.tokenizer_json import TokenizerJson, read_tokenizer_json
from tsconv.checkpoint.tokenizer_model import read_tokenizer_model
from tsconv.checkpoint.vocabulary import Vocabulary, check_tokens
from tsconv.errors import CheckpointError

MODEL_FILE, JSON_FILE = "tokenizer.model", "tokenizer.json"
CONFIG_FILE, SPECIAL_FILE, ADDED_FILE = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
DECODER = "added_tokens_decoder"
SPECIAL_NAMES = ("bos", "eos", "unk", "pad")
CUT_OUT = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)  # found before the rest is tokenized
UNSUPPORTED_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary of `n_vocab` entries, padded with unused tokens to the rows of the embedding matrix.

    Attributes:
        tokens, scores, types: n_vocab each. A space is written as U+2581 in normal pieces, a byte as <0xNN>.
        n_real: how many of them are not padding.
        bos_id, eos_id, unk_id, pad_id: ids; unk and pad may be missing.
        eot_id, eom_id: further tokens that end a generation, besides those that llama.cpp knows by their texts.
        add_bos, add_eos: whether every text gets them.
        add_space_prefix: whether a space goes before every text, and before the text behind a special token.
        chat_templates: Jinja sources by name; the one in use is "default".
        notes: where the checkpoint's files do not agree, or say more than a GGUF file can.
    """

    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[TokenType, ...]
    n_real: int
    bos_id: int
    eos_id: int
    unk_id: int | None
    pad_id: int | None
    eot_id: int | None
    eom_id: int | None
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_templates: dict[str, str]
    notes: tuple[str, ...]

    @property
    def chat_template(self) -> str | None:
        return self.chat_templates.get("default")

    def add_to(self, writer: GGUFWriter) -> None:
        """Adds the `tokenizer.*` keys."""
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(self.tokens)
        writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        writer.add_bos_token_id(self.bos_id)
        writer.add_eos_token_id(self.eos_id)
        if self.unk_id is not None:
            writer.add_unk_token_id(self.unk_id)
        if self.pad_id is not None:
            writer.add_pad_token_id(self.pad_id)
        if self.eot_id is not None:
            writer.add_eot_token_id(self.eot_id)
        if self.eom_id is not None:
            writer.add_eom_token_id(self.eom_id)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.add_space_prefix)
        if self.chat_templates:
            writer.add_chat_template(
                [{"name": name, "template": template} for name, template in self.chat_templates.items()]
            )


@dataclass(frozen=True)
class _Added:
    """A token that is cut out of a text before the rest is tokenized."""

    id: int
    content: str
    special: bool
    source: Path


class _Table:
    """Tokens by id with their scores and types: a vocabulary's pieces, to which added tokens and padding come."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.source = vocabulary.source
        self.tokens, self.scores = list(vocabulary.tokens), list(vocabulary.scores)
        self.types = list(vocabulary.types)

    def put(self, added: _Added) -> None:
        """Appends a token, or makes one that is there an added one.

        Raises:
            CheckpointError: its id is beyond the end, or that of another token.
        """
        if added.id > len(self.tokens):
            raise CheckpointError(
                f"the ids of the added tokens have a hole before {added.content!r}",
                where=added.source,
                expected=f"id {len(self.tokens)}",
                found=added.id,
            )
        if added.id == len(self.tokens):
            self._append(added.content, TokenType.NORMAL)
        elif self.tokens[added.id] != added.content:
            raise _two_texts(added, self.tokens[added.id], self.source)
        if self.types[added.id] != TokenType.UNKNOWN:
            self.types[added.id] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED

    def pad(self, vocab_size: int, directory: Path) -> None:
        """Unused tokens up to the model's number of rows.

        Raises:
            CheckpointError: there are more tokens than that.
        """
        n_real = len(self.tokens)
        if n_real > vocab_size:
            raise CheckpointError(
                "the tokenizer has more tokens than the model",
                where=directory,
                expected=f"at most {vocab_size} (config.json: vocab_size)",
                found=n_real,
            )
        for i in range(n_real, vocab_size):
            self._append(f"[PAD{i}]", TokenType.UNUSED)

    def _append(self, token: str, kind: TokenType) -> None:
        self.tokens.append(token)
        self.scores.append(0.0)
        self.types.append(kind)


def load_tokenizer(directory: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a checkpoint, padded to `vocab_size` (config.json's).

    Raises:
        CheckpointError: files are missing, damaged or contradict each other; there are more tokens than `vocab_size`;
            the ids have holes; or llama.cpp's SPM could not tokenize a text as this tokenizer does.
    """
    config = _optional_json(directory / CONFIG_FILE)
    named = _optional_json(directory / SPECIAL_FILE)
    vocabulary, json_form = _read_vocabulary(directory)
    if json_form is None and config.get("legacy") is False:
        raise CheckpointError(
            "legacy = false: spaces after special tokens are treated in a way that llama.cpp's SPM tokenizer has not",
            where=directory / CONFIG_FILE,
            expected="legacy = true",
        )
    specials, notes = _special_contents(config, named, vocabulary)
    special = set(specials.values()) | _further_specials(config, named)
    table = _Table(vocabulary)
    for added in _added_tokens(directory, config, special, json_form, vocabulary):
        table.put(added)
    n_real = len(table.tokens)
    table.pad(vocab_size, directory)
    tokens = table.tokens
    check_tokens(tokens, table.types, directory)
    _check_overlaps([t for t, kind in zip(tokens, table.types, strict=True) if kind in CUT_OUT], directory)
    ids = _special_ids(specials, special, tokens, directory)
    end = read_end_tokens(directory, tokens, ids["bos"], ids["eos"])
    space_prefix = vocabulary.add_space_prefix
    if json_form is None and config.get("add_prefix_space") is False:
        space_prefix = False
    return Tokenizer(
        tokens=tuple(tokens),
        scores=tuple(table.scores),
        types=tuple(table.types),
        n_real=n_real,
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        unk_id=ids.get("unk"),
        pad_id=ids.get("pad"),
        eot_id=end.eot_id,
        eom_id=end.eom_id,
        add_bos=_flag(config, "add_bos_token", json_form.add_bos if json_form else True, directory),
        add_eos=_flag(config, "add_eos_token", False, directory),
        add_space_prefix=space_prefix,
        chat_templates=read_chat_templates(directory, config),
        notes=(*notes, *end.notes),
    )


def _special_ids(specials: dict[str, str], special: set[str], tokens: list[str], directory: Path) -> dict[str, int]:
    """Ids of bos, eos and of unk and pad where there are such; every text in `special` must be a token."""
    ids = {name: _find(content, name, tokens, directory) for name, content in specials.items()}
    for name in ("bos", "eos"):
        if name not in ids:
            raise CheckpointError(
                f"no file names the {name} token", where=directory, expected=f"{name}_token in {CONFIG_FILE}"
            )
    for content in sorted(special - set(specials.values())):
        _find(content, "special", tokens, directory)
    return ids


def _read_vocabulary(directory: Path) -> tuple[Vocabulary, TokenizerJson | None]:
    """The pieces, and tokenizer.json when there is one."""
    model_path, json_path = directory / MODEL_FILE, directory / JSON_FILE
    json_form = read_tokenizer_json(json_path) if json_path.exists() else None
    if not model_path.exists():
        if json_form is None:
            raise CheckpointError("no tokenizer", where=directory, expected=f"{MODEL_FILE} or {JSON_FILE}")
        return json_form.vocabulary, json_form
    vocabulary = read_tokenizer_model(model_path)
    if json_form is not None:
        _check_agreement(vocabulary, json_form.vocabulary)
    return vocabulary, json_form


def _check_agreement(model: Vocabulary, other: Vocabulary) -> None:
    """Refuses two files with different pieces, priorities or treatment of spaces."""
    if model.tokens != other.tokens[: len(model.tokens)]:
        first = next(
            (i for i, (a, b) in enumerate(zip(model.tokens, other.tokens, strict=False)) if a != b), len(other.tokens)
        )
        raise _disagree(f"token {first}", model, other, model.tokens[first], (*other.tokens, None)[first])
    if model.add_space_prefix != other.add_space_prefix:
        raise _disagree("the space before a text", model, other, model.add_space_prefix, other.add_space_prefix)
    # Equal scores in tokenizer.model leave the order open; the order of the other file must fit all the rest.
    mergeable = [i for i, kind in enumerate(model.types) if kind == TokenType.NORMAL and len(model.tokens[i]) > 1]
    mergeable.sort(key=lambda i: -other.scores[i])
    for before, after in itertools.pairwise(mergeable):
        if model.scores[before] < model.scores[after]:
            pair = f"{model.tokens[before]!r} before {model.tokens[after]!r}"
            raise _disagree("the order of the merges", model, other, "the reverse", pair)


def _disagree(what: str, model: Vocabulary, other: Vocabulary, a: object, b: object) -> CheckpointError:
    return CheckpointError(
        f"differs from {model.source.name} in {what}",
        where=other.source,
        expected=repr(a),
        found=repr(b),
        fix="remove the file that does not belong to this checkpoint",
    )


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _content(value: Any) -> str | None:
    """The text of a token written as a string or as an object with "content"."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _special_contents(
    config: dict[str, Any], named: dict[str, Any], vocabulary: Vocabulary
) -> tuple[dict[str, str], list[str]]:
    """bos, eos, unk, pad -> token text, and notes where two files name different ones.

    As in transformers tokenizer_config.json comes first if it has added_tokens_decoder, else special_tokens_map.json.
    """
    files = ((CONFIG_FILE, config), (SPECIAL_FILE, named))
    contents, notes = {}, []
    for name in SPECIAL_NAMES:
        found = [
            (file, content)
            for file, source in (files if config.get(DECODER) is not None else files[::-1])
            if (content := _content(source.get(f"{name}_token"))) is not None
        ]
        if found:
            contents[name] = found[0][1]
        elif name in vocabulary.special:
            contents[name] = vocabulary.special[name]
        if len({content for _, content in found}) > 1:
            (file, content), (other, ignored) = found
            notes.append(f"{other}: {name}_token {ignored!r} is not read, since {file} says {content!r}")
    return contents, notes


def _further_specials(config: dict[str, Any], named: dict[str, Any]) -> set[str]:
    """The texts of special tokens with other names than SPECIAL_NAMES, and with none (additional_special_tokens)."""
    found = set()
    for source in (config, named):
        for key, value in source.items():
            if key in ("additional_special_tokens", "extra_special_tokens"):
                entries = list(value.values()) if isinstance(value, dict) else value
                found |= {_content(entry) for entry in entries} if isinstance(entries, list) else set()
            elif key.endswith("_token") and key.removesuffix("_token") not in SPECIAL_NAMES:
                found.add(_content(value))
    return {text for text in found if text}


def _added_tokens(
    directory: Path,
    config: dict[str, Any],
    special: set[str],
    json_form: TokenizerJson | None,
    vocabulary: Vocabulary,
) -> list[_Added]:
    """Ordered by id: those of tokenizer.json, tokenizer_config.json and added_tokens.json, and the pieces in `special`.

    A token that several files have must have one id and one text in all of them. It is special when one says so.
    """
    found: dict[str, _Added] = {}
    by_id: dict[int, _Added] = {}
    has_model = (directory / MODEL_FILE).exists()
    for path, token_id, entry in _entries(directory, config, special, json_form):
        content = _content(entry) if isinstance(entry, dict) else None
        if type(token_id) is not int or token_id < 0 or not content:
            raise CheckpointError(
                "an added token is damaged", where=path, expected="id and content", found=str(entry)[:80]
            )
        is_special = bool(entry.get("special", False)) or content in special
        before = found.get(content)
        added = _Added(token_id, content, is_special, path)
        if before is not None:
            added = _Added(token_id, content, is_special or before.special, before.source)
        if before is not None and before.id != token_id:
            raise CheckpointError(
                f"added token {content!r} has two ids",
                where=path,
                expected=f"{before.id}, as in {before.source.name}",
                found=token_id,
                fix="correct the file that does not belong to this checkpoint",
            )
        if (other := by_id.get(token_id)) is not None and other.content != content:
            raise _two_texts(added, other.content, other.source)
        for flag in UNSUPPORTED_FLAGS:
            # "normalized" means nothing to sentencepiece: its users look for added tokens in the raw text.
            default = flag == "normalized" and not entry.get("special", False)
            if entry.get(flag, default) and not (flag == "normalized" and has_model):
                raise CheckpointError(
                    f"added token {content!r} has {flag} = true, which llama.cpp's SPM cannot express", where=path
                )
        found[content] = by_id[token_id] = added
    pieces = {piece: i for i, piece in enumerate(vocabulary.tokens)}
    for content in special - set(found):
        if content in pieces:
            found[content] = _Added(pieces[content], content, True, vocabulary.source)
    return sorted(found.values(), key=lambda added: added.id)


def _entries(
    directory: Path, config: dict[str, Any], special: set[str], json_form: TokenizerJson | None
) -> Iterator[tuple[Path, Any, Any]]:
    """(file, id, entry) of every added token. transformers reads added_tokens.json only where tokenizer_config.json has
    no added_tokens_decoder."""
    known: set[Any] = set()  # texts and ids
    for entry in json_form.added_tokens if json_form is not None else ():
        known |= {_content(entry), entry["id"] if type(entry.get("id")) is int else None}
        yield directory / JSON_FILE, entry.get("id"), entry
    decoder = config.get(DECODER)
    if decoder is not None and not isinstance(decoder, dict):
        raise CheckpointError(f"{DECODER} is damaged", where=directory / CONFIG_FILE, expected="an object")
    for key, entry in (decoder or {}).items():
        token_id = int(key) if key.isdecimal() and len(key) < 9 else None
        known |= {_content(entry), token_id}
        yield directory / CONFIG_FILE, token_id, entry
    path = directory / ADDED_FILE
    for content, token_id in _optional_json(path).items():
        if decoder is not None and content not in known and (type(token_id) is not int or token_id not in known):
            raise CheckpointError(
                f"added token {content!r} is not in the {DECODER} of {CONFIG_FILE}, by which transformers reads it",
                where=path,
                fix="add it there, or remove it here",
            )
        is_special = content in special
        normalized = not is_special and content not in known
        yield path, token_id, {"content": content, "special": is_special, "normalized": normalized}


def _two_texts(added: _Added, other: str, source: Path) -> CheckpointError:
    return CheckpointError(
        f"token {added.id} has two texts",
        where=added.source,
        expected=f"{other!r}, as in {source.name}",
        found=repr(added.content),
        fix="correct the file that does not belong to this checkpoint",
    )


def _check_overlaps(cut_out: list[str], where: Path) -> None:
    """llama.cpp cuts out the longest tokens first, the tokenizers library the leftmost: equal unless two overlap."""
    for one in cut_out:
        for other in cut_out:
            if one != other and any(one.endswith(other[:n]) for n in range(1, min(len(one), len(other)))):
                raise CheckpointError(f"added tokens {one!r} and {other!r} can overlap in a text", where=where)


def _find(content: str, name: str, tokens: list[str], where: Path) -> int:
    if content not in tokens:
        raise CheckpointError(
            f"the {name} token is not in the vocabulary",
            where=where,
            found=repr(content),
            fix=f"give it an id in the {DECODER} of {CONFIG_FILE}, or name another",
        )
    return tokens.index(content)


def _flag(config: dict[str, Any], key: str, default: bool, directory: Path) -> bool:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"bad {key}", where=directory / CONFIG_FILE, expected="true or false", found=repr(value))
    return value
