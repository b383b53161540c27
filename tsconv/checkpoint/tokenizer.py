"""The tokenizer of a checkpoint folder -> the `tokenizer.*` keys of a GGUF file, as llama.cpp's SPM model.

Read, where present: tokenizer.model or tokenizer.json (with both, tokenizer.model decides and both must agree);
added_tokens.json, tokenizer_config.json and special_tokens_map.json for tokens and special tokens; chat_template.jinja
or tokenizer_config.json for the chat template.

Source of the names and types: llama.cpp, src/llama-vocab.cpp (`llama_vocab::impl::load`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from tsconv.checkpoint.config import read_json
from tsconv.checkpoint.tokenizer_json import TokenizerJson, read_tokenizer_json
from tsconv.checkpoint.tokenizer_model import read_tokenizer_model
from tsconv.checkpoint.vocabulary import Vocabulary, check_tokens
from tsconv.errors import CheckpointError

MODEL_FILE, JSON_FILE = "tokenizer.model", "tokenizer.json"
CONFIG_FILE, SPECIAL_FILE, ADDED_FILE = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TEMPLATE_FILE = "chat_template.jinja"
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
        add_bos, add_eos: whether every text gets them.
        add_space_prefix: whether a space goes before every text, and before the text behind a special token.
        chat_templates: Jinja sources by name; the one in use is "default".
    """

    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[TokenType, ...]
    n_real: int
    bos_id: int
    eos_id: int
    unk_id: int | None
    pad_id: int | None
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_templates: dict[str, str]

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
    specials = _special_contents(config, named, vocabulary)
    tokens, scores, types = list(vocabulary.tokens), list(vocabulary.scores), list(vocabulary.types)
    for added in _added_tokens(directory, config, set(specials.values()) | _additional(config, named), json_form):
        if added.id > len(tokens):
            raise CheckpointError(
                f"the ids of the added tokens have a hole before {added.content!r}",
                where=directory,
                expected=f"id {len(tokens)}",
                found=added.id,
            )
        if added.id == len(tokens):
            tokens.append(added.content)
            scores.append(0.0)
            types.append(TokenType.NORMAL)
        elif tokens[added.id] != added.content:
            raise CheckpointError(
                f"token {added.id} has two texts",
                where=directory,
                expected=repr(tokens[added.id]),
                found=repr(added.content),
            )
        if types[added.id] != TokenType.UNKNOWN:
            types[added.id] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED

    n_real = len(tokens)
    if n_real > vocab_size:
        raise CheckpointError(
            "the tokenizer has more tokens than the model",
            where=directory,
            expected=f"at most {vocab_size} (config.json: vocab_size)",
            found=n_real,
        )
    for i in range(n_real, vocab_size):
        tokens.append(f"[PAD{i}]")
        scores.append(0.0)
        types.append(TokenType.UNUSED)
    check_tokens(tokens, types, directory)
    _check_overlaps([t for t, kind in zip(tokens, types, strict=True) if kind in CUT_OUT], directory)

    ids = {name: _find(content, name, tokens, directory) for name, content in specials.items()}
    for name in ("bos", "eos"):
        if name not in ids:
            raise CheckpointError(
                f"no file names the {name} token", where=directory, expected=f"{name}_token in {CONFIG_FILE}"
            )
    space_prefix = vocabulary.add_space_prefix
    if json_form is None and config.get("add_prefix_space") is False:
        space_prefix = False
    return Tokenizer(
        tokens=tuple(tokens),
        scores=tuple(scores),
        types=tuple(types),
        n_real=n_real,
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        unk_id=ids.get("unk"),
        pad_id=ids.get("pad"),
        add_bos=_flag(config, "add_bos_token", json_form.add_bos if json_form else True, directory),
        add_eos=_flag(config, "add_eos_token", False, directory),
        add_space_prefix=space_prefix,
        chat_templates=_chat_templates(directory, config),
    )


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


def _special_contents(config: dict[str, Any], named: dict[str, Any], vocabulary: Vocabulary) -> dict[str, str]:
    """bos, eos, unk, pad -> token text, from the first file that names it."""
    contents = {}
    for name in SPECIAL_NAMES:
        for source in (config, named):
            content = _content(source.get(f"{name}_token"))
            if content is not None:
                contents[name] = content
                break
        else:
            if name in vocabulary.special:
                contents[name] = vocabulary.special[name]
    return contents


def _additional(config: dict[str, Any], named: dict[str, Any]) -> set[str]:
    """The texts listed as additional_special_tokens."""
    found = set()
    for source in (config, named):
        entries = source.get("additional_special_tokens") or []
        found |= {_content(entry) for entry in entries} if isinstance(entries, list) else set()
    return found - {None}


def _added_tokens(
    directory: Path, config: dict[str, Any], special: set[str], json_form: TokenizerJson | None
) -> list[_Added]:
    """Ordered by id: those of tokenizer.json, or else tokenizer_config.json, then what only added_tokens.json has."""
    found: dict[int, _Added] = {}
    if json_form is not None:
        where = directory / JSON_FILE
        entries = [(entry.get("id"), entry) for entry in json_form.added_tokens]
    else:
        where = directory / CONFIG_FILE
        decoder = config.get("added_tokens_decoder") or {}
        if not isinstance(decoder, dict):
            raise CheckpointError("added_tokens_decoder is damaged", where=where, expected="an object")
        entries = [(int(key) if key.isdecimal() and len(key) < 9 else None, entry) for key, entry in decoder.items()]
    has_model = (directory / MODEL_FILE).exists()
    for token_id, entry in entries:
        content = _content(entry) if isinstance(entry, dict) else None
        if type(token_id) is not int or token_id < 0 or not content:
            raise CheckpointError(
                "an added token is damaged", where=where, expected="id and content", found=str(entry)[:80]
            )
        for flag in UNSUPPORTED_FLAGS:
            # "normalized" means nothing to sentencepiece: its users look for added tokens in the raw text.
            if entry.get(flag, False) and not (flag == "normalized" and has_model):
                raise CheckpointError(
                    f"added token {content!r} has {flag} = true, which llama.cpp's SPM cannot express", where=where
                )
        found[token_id] = _Added(token_id, content, bool(entry.get("special", False)) or content in special)
    for content, token_id in _optional_json(directory / ADDED_FILE).items():
        if type(token_id) is not int or token_id < 0 or not content:
            raise CheckpointError(
                "an added token is damaged", where=directory / ADDED_FILE, found=f"{content}: {token_id}"
            )
        if found.setdefault(token_id, _Added(token_id, content, content in special)).content != content:
            raise CheckpointError(
                f"token {token_id} has two texts",
                where=directory / ADDED_FILE,
                expected=repr(found[token_id].content),
                found=repr(content),
            )
    return [found[token_id] for token_id in sorted(found)]


def _check_overlaps(cut_out: list[str], where: Path) -> None:
    """llama.cpp cuts out the longest tokens first, the tokenizers library the leftmost: equal unless two overlap."""
    for one in cut_out:
        for other in cut_out:
            if one != other and any(one.endswith(other[:n]) for n in range(1, min(len(one), len(other)))):
                raise CheckpointError(f"added tokens {one!r} and {other!r} can overlap in a text", where=where)


def _find(content: str, name: str, tokens: list[str], where: Path) -> int:
    if content not in tokens:
        raise CheckpointError(f"the {name} token is not in the vocabulary", where=where, found=repr(content))
    return tokens.index(content)


def _flag(config: dict[str, Any], key: str, default: bool, directory: Path) -> bool:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"bad {key}", where=directory / CONFIG_FILE, expected="true or false", found=repr(value))
    return value


def _chat_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Templates by name. chat_template.jinja replaces the default one of tokenizer_config.json."""
    value = config.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(value, str):
        templates["default"] = value
    elif isinstance(value, list):
        try:
            templates = {str(entry["name"]): str(entry["template"]) for entry in value}
        except (TypeError, KeyError):
            raise CheckpointError(
                "chat_template is damaged", where=directory / CONFIG_FILE, expected="name and template for each entry"
            ) from None
    elif value is not None:
        raise CheckpointError("chat_template is damaged", where=directory / CONFIG_FILE, expected="a text or a list")
    path = directory / TEMPLATE_FILE
    if path.exists():
        try:
            templates["default"] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"the chat template cannot be read ({error})", where=path) from None
    for name, template in templates.items():
        if any("\ud800" <= character <= "\udfff" for character in name + template):
            raise CheckpointError(f"chat template {name!r} is not valid Unicode", where=directory)
    return templates
