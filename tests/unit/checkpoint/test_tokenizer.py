"""Tokenizer files that cannot be converted faithfully are refused, naming the file and the reason."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from gguf import TokenType

from support import CHECKPOINTS
from tsconv.checkpoint.tokenizer import load_tokenizer
from tsconv.checkpoint.tokenizer_json import read_tokenizer_json
from tsconv.checkpoint.tokenizer_model import read_tokenizer_model
from tsconv.errors import CheckpointError

TINY_MISTRAL = CHECKPOINTS / "tiny-turbosparse-mistral"
TINY_MIXTRAL = CHECKPOINTS / "tiny-turbosparse-mixtral"
FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
N_VOCAB = json.loads((TINY_MISTRAL / "config.json").read_text())["vocab_size"]


def copy_tokenizer(source: Path, target: Path) -> Path:
    for name in FILES:
        if (source / name).exists():
            shutil.copy(source / name, target / name)
    return target


@pytest.fixture
def from_json(tmp_path: Path) -> Path:
    """A folder with tokenizer.json."""
    return copy_tokenizer(TINY_MISTRAL, tmp_path)


@pytest.fixture
def from_model(tmp_path: Path) -> Path:
    """A folder with tokenizer.model."""
    return copy_tokenizer(TINY_MIXTRAL, tmp_path)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def refused(directory: Path, message: str, vocab_size: int = N_VOCAB) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(directory, vocab_size)


def test_padding_fills_the_embedding_rows(from_json):
    tokenizer = load_tokenizer(from_json, N_VOCAB + 62)
    assert len(tokenizer.tokens) == len(tokenizer.scores) == len(tokenizer.types) == N_VOCAB + 62
    assert tokenizer.tokens[-1] == f"[PAD{N_VOCAB + 61}]"


def test_more_tokens_than_the_model_has(from_json):
    n_real = load_tokenizer(from_json, N_VOCAB).n_real
    assert len(load_tokenizer(from_json, n_real).tokens) == n_real
    refused(from_json, rf"more tokens than the model: expected at most {n_real - 1} .* found {n_real}", n_real - 1)


def test_no_tokenizer(tmp_path):
    refused(tmp_path, r"no tokenizer: expected tokenizer.model or tokenizer.json")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"x"', "\xff", "{}", '{"model": 3}', '{"model": {"type": "BPE"}}'])
def test_damaged_tokenizer_json(from_json, text):
    (from_json / "tokenizer.json").write_bytes(text.encode("latin-1"))
    refused(from_json, "tokenizer.json")


@pytest.mark.parametrize("name", FILES[2:])
def test_damaged_companion_file(from_json, name):
    (from_json / name).write_text('{"a": ')
    refused(from_json, name)


@pytest.mark.parametrize(
    ("key", "value"),
    [("type", "Unigram"), ("type", "WordPiece"), ("byte_fallback", False), ("dropout", 0.1), ("ignore_merges", True),
     ("continuing_subword_prefix", "##"), ("end_of_word_suffix", "</w>")],
)  # fmt: skip
def test_other_kinds_of_tokenizers(from_json, key, value):
    edit(from_json / "tokenizer.json", lambda root: root["model"].update({key: value}))
    refused(from_json, f"model.{key}: expected .* found {value!r}; only tokenizers made from a sentencepiece")


def test_hole_in_the_ids(from_json):
    edit(from_json / "tokenizer.json", lambda root: root["model"]["vocab"].update({"zzz": 5000}))
    refused(from_json, "the ids of the vocabulary have a hole")


def test_hole_before_an_added_token(from_json):
    edit(from_json / "tokenizer.json", lambda root: root["added_tokens"][-1].update(id=1030))
    refused(from_json, "hole before '<|im_start|>': expected id 1025, found 1030", 2000)


def test_two_texts_for_one_id(from_json):
    edit(from_json / "added_tokens.json", lambda added: added.update({"<extra>": 1024}))
    refused(from_json, "added_tokens.json: token 1024 has two texts")


FLAGS = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)


def test_two_ids_for_one_text(from_json):
    edit(from_json / "added_tokens.json", lambda added: added.update({"<|im_end|>": 1026}))
    refused(
        from_json, r"added_tokens.json: added token '<\|im_end\|>' has two ids: expected 1024, as in tokenizer.json"
    )


def add_to_config(directory: Path, token_id: int, content: str, **flags: bool) -> None:
    entry = {"content": content, "special": False} | FLAGS | flags
    edit(
        directory / "tokenizer_config.json",
        lambda config: config["added_tokens_decoder"].update({str(token_id): entry}),
    )


@pytest.mark.parametrize("special", [False, True])
def test_token_that_only_tokenizer_config_adds(from_json, special):
    """transformers adds it to what tokenizer.json holds."""
    add_to_config(from_json, 1026, "<think>", special=special)
    tokenizer = load_tokenizer(from_json, N_VOCAB)
    assert (tokenizer.n_real, tokenizer.tokens[1026]) == (1027, "<think>")
    assert tokenizer.types[1026] == (TokenType.CONTROL if special else TokenType.USER_DEFINED)


def test_token_that_is_special_in_one_file(from_json):
    edit(from_json / "tokenizer.json", lambda root: root["added_tokens"][-1].update(special=False))
    edit(from_json / "tokenizer_config.json", lambda config: config.pop("additional_special_tokens"))
    edit(from_json / "special_tokens_map.json", lambda named: named.pop("additional_special_tokens"))
    assert load_tokenizer(from_json, N_VOCAB).types[1025] == TokenType.CONTROL
    add_to_config(from_json, 1025, "<|im_start|>")
    assert load_tokenizer(from_json, N_VOCAB).types[1025] == TokenType.USER_DEFINED


@pytest.mark.parametrize(
    ("token_id", "content", "flags", "message"),
    [
        (1024, "<think>", {}, "token 1024 has two texts: .* as in tokenizer.json, found '<think>'"),
        (300, "<think>", {}, "token 300 has two texts: .* as in tokenizer.json, found '<think>'"),
        (1026, "<|im_end|>", {}, r"added token '<\|im_end\|>' has two ids: expected 1024, as in tokenizer.json"),
        (1027, "<think>", {}, "the ids of the added tokens have a hole before '<think>'"),
        (1026, "<think>", {"lstrip": True}, "added token '<think>' has lstrip = true"),
        (1026, "<think>", {"normalized": True}, "added token '<think>' has normalized = true"),
        (1024, "<|im_end|>", {"rstrip": True}, r"added token '<\|im_end\|>' has rstrip = true"),
    ],
)  # fmt: skip
def test_files_that_add_tokens_and_disagree(from_json, token_id, content, flags, message):
    add_to_config(from_json, token_id, content, **flags)
    refused(from_json, f"tokenizer_config.json: {message}")


def test_added_tokens_without_a_word_on_normalization(from_json):
    """In the tokenizers library they are normalized unless they are special."""
    decoder = {"1026": {"content": "<think>", "special": False}}
    edit(from_json / "tokenizer_config.json", lambda config: config["added_tokens_decoder"].update(decoder))
    refused(from_json, "added token '<think>' has normalized = true")
    decoder["1026"]["special"] = True
    edit(from_json / "tokenizer_config.json", lambda config: config["added_tokens_decoder"].update(decoder))
    assert load_tokenizer(from_json, N_VOCAB).types[1026] == TokenType.CONTROL


def test_added_tokens_file_beside_other_files(from_json):
    """transformers reads it only where tokenizer_config.json has no added_tokens_decoder."""
    edit(from_json / "added_tokens.json", lambda added: added.update({"<think>": 1026}))
    refused(
        from_json, "added_tokens.json: added token '<think>' is not in the added_tokens_decoder of tokenizer_config"
    )
    edit(from_json / "tokenizer_config.json", lambda config: config.pop("added_tokens_decoder"))
    refused(from_json, "added_tokens.json: added token '<think>' has normalized = true")
    more = ["<|im_start|>", "<think>"]
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        edit(from_json / name, lambda config: config.update(additional_special_tokens=more))
    tokenizer = load_tokenizer(from_json, N_VOCAB)
    assert (tokenizer.tokens[1026], tokenizer.types[1026]) == ("<think>", TokenType.CONTROL)


@pytest.mark.parametrize(
    "named", [{"additional_special_tokens": ["<|im_start|>", "<think>"]}, {"extra_special_tokens": {"x": "<think>"}},
              {"sep_token": "<think>"}, {"image_token": {"content": "<think>"}}],
)  # fmt: skip
def test_special_token_without_an_id(from_json, named):
    """transformers would add it behind all others."""
    edit(from_json / "tokenizer_config.json", lambda config: config.update(named))
    refused(from_json, "the special token is not in the vocabulary: found '<think>'; give it an id")


def test_special_token_that_no_file_adds(from_json):
    """A piece that is named as a special token is cut out of a text before the rest is tokenized."""
    edit(from_json / "tokenizer.json", lambda root: root["added_tokens"].pop(1))  # <s>, a piece too
    edit(from_json / "tokenizer_config.json", lambda config: config["added_tokens_decoder"].pop("1"))
    assert load_tokenizer(from_json, N_VOCAB).types[1] == TokenType.CONTROL


def test_files_that_name_different_special_tokens(from_json):
    """As in transformers: special_tokens_map.json is read only where there is no added_tokens_decoder."""
    edit(from_json / "special_tokens_map.json", lambda named: named.update(eos_token="</s>"))
    tokenizer = load_tokenizer(from_json, N_VOCAB)
    assert tokenizer.tokens[tokenizer.eos_id] == "<|im_end|>"
    assert tokenizer.notes == (
        "special_tokens_map.json: eos_token '</s>' is not read, since tokenizer_config.json says '<|im_end|>'",
    )
    edit(from_json / "tokenizer_config.json", lambda config: config.pop("added_tokens_decoder"))
    tokenizer = load_tokenizer(from_json, N_VOCAB)
    assert tokenizer.tokens[tokenizer.eos_id] == "</s>"
    assert tokenizer.notes == (
        "tokenizer_config.json: eos_token '<|im_end|>' is not read, since special_tokens_map.json says '</s>'",
    )


def add_ends(directory: Path, n: int) -> list[int]:
    """Adds <|end_0|>, <|end_1|>, ... to the vocabulary; returns their ids."""
    for i in range(n):
        add_to_config(directory, 1026 + i, f"<|end_{i}|>", special=True)
    return list(range(1026, 1026 + n))


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, (None, None)),
        (None, {"eos_token_id": 1026}, (1026, None)),
        ({"eos_token_id": [2, 1024, 1027]}, {"eos_token_id": 1026}, (1027, None)),
        ({"eos_token_id": [1027, 1026, 1027]}, {}, (1027, 1026)),
        ({"temperature": 0}, {"eos_token_id": [1026]}, (1026, None)),
        ({"eos_token_id": []}, {"eos_token_id": 1026}, (None, None)),
    ],
)
def test_end_tokens(from_json, generation, config, expected):
    """generation_config.json decides where it names them; llama.cpp knows </s> and <|im_end|> by their texts."""
    add_ends(from_json, 2)
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        if value is not None:
            (from_json / name).write_text(json.dumps(value))
    tokenizer = load_tokenizer(from_json, N_VOCAB)
    assert (tokenizer.eot_id, tokenizer.eom_id, tokenizer.notes) == (*expected, ())


def test_more_end_tokens_than_keys(from_json):
    ids = add_ends(from_json, 4)
    (from_json / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    tokenizer = load_tokenizer(from_json, N_VOCAB)
    assert (tokenizer.eot_id, tokenizer.eom_id) == (1026, 1027)
    (note,) = tokenizer.notes
    assert note.startswith("generation_config.json: a text does not end at '<|end_2|>' (1028), '<|end_3|>' (1029)")


def test_ids_that_name_no_token(from_json):
    (from_json / "config.json").write_text(json.dumps({"eos_token_id": [-1, N_VOCAB], "bos_token_id": 2}))
    assert load_tokenizer(from_json, N_VOCAB).notes == (
        f"config.json: eos_token_id -1, {N_VOCAB} is outside of the vocabulary",
        "config.json: bos_token_id is 2; texts begin with the tokenizer's '<s>' (1), as in transformers",
    )


@pytest.mark.parametrize("value", ["2", True, [2, "3"], {"id": 2}, 2.0])
def test_bad_end_tokens(from_json, value):
    (from_json / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    refused(from_json, "generation_config.json: bad eos_token_id: expected an id or a list of ids")


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized"])
def test_added_tokens_that_eat_spaces(from_json, flag):
    edit(from_json / "tokenizer.json", lambda root: root["added_tokens"][-1].update({flag: True}))
    refused(from_json, f"{flag} = true")


def test_missing_merge(from_json):
    edit(from_json / "tokenizer.json", lambda root: root["model"]["merges"].pop(3))
    refused(
        from_json, "merges do not come from a sentencepiece model: no merge makes.*; put the tokenizer.model .* place"
    )
    shutil.copy(TINY_MIXTRAL / "tokenizer.model", from_json)
    refused(from_json, "no merge makes")
    (from_json / "tokenizer.json").unlink()
    assert load_tokenizer(from_json, N_VOCAB).n_real == 1026


def test_merges_of_one_piece_apart(from_json):
    def move(root: dict[str, Any]) -> None:
        merges = root["model"]["merges"]
        joined = [entry.replace(" ", "") for entry in merges]
        twice = next(i for i in range(1, len(merges)) if joined[i] == joined[i - 1])
        merges.append(merges.pop(twice))

    edit(from_json / "tokenizer.json", move)
    refused(from_json, "is made by merges of different ranks")


def test_merge_outside_the_vocabulary(from_json):
    edit(from_json / "tokenizer.json", lambda root: root["model"]["merges"].append("q zq"))
    refused(from_json, r"\(q zq\) names a piece outside the vocabulary")


def test_merges_written_as_pairs(from_json):
    before = read_tokenizer_json(from_json / "tokenizer.json")

    def as_pairs(root: dict[str, Any]) -> None:
        root["model"]["merges"] = [entry.split(" ") for entry in root["model"]["merges"]]

    edit(from_json / "tokenizer.json", as_pairs)
    assert read_tokenizer_json(from_json / "tokenizer.json") == before


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_spaces_that_llama_cpp_cannot_follow(from_json, scheme):
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    edit(from_json / "tokenizer.json", lambda root: root.update(normalizer=None, pre_tokenizer=space))
    refused(from_json, "unsupported treatment of spaces")


def test_missing_byte(from_json):
    def rename(root: dict[str, Any]) -> None:
        root["model"]["vocab"]["byte41"] = root["model"]["vocab"].pop("<0x41>")

    edit(from_json / "tokenizer.json", rename)
    refused(from_json, "no byte token <0x41>")


def test_control_token_made_of_plain_pieces(from_json):
    def add(root: dict[str, Any]) -> None:
        root["added_tokens"].append(dict(root["added_tokens"][-1], id=1026, content="th;"))

    edit(from_json / "tokenizer.json", add)
    refused(from_json, "plain text would turn into the control token 'th;', because 'th' and ';' are tokens too")


def test_added_tokens_that_overlap(from_json):
    def add(root: dict[str, Any]) -> None:
        root["added_tokens"].append(dict(root["added_tokens"][-1], id=1026, content="<|im_end|><|"))

    edit(from_json / "tokenizer.json", add)
    refused(from_json, "can overlap")


def test_unknown_eos(from_json):
    edit(from_json / "tokenizer_config.json", lambda config: config.update(eos_token="<|nothing|>"))
    refused(from_json, r"the eos token is not in the vocabulary: found '<\|nothing\|>'")


def test_no_file_names_eos(from_json):
    edit(from_json / "tokenizer_config.json", lambda config: config.pop("eos_token"))
    edit(from_json / "special_tokens_map.json", lambda named: named.pop("eos_token"))
    refused(from_json, "no file names the eos token")


def test_special_tokens_map_alone(from_json):
    (from_json / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(from_json, N_VOCAB)
    assert (tokenizer.tokens[tokenizer.eos_id], tokenizer.add_bos) == ("<|im_end|>", True)
    assert tokenizer.chat_template is None


def test_chat_template_file_wins(from_json):
    (from_json / "chat_template.jinja").write_text("{{ messages }}")
    assert load_tokenizer(from_json, N_VOCAB).chat_template == "{{ messages }}"


BROKEN = ("{% for m in messages %}\n{{ m['content']", "{{ 1 | nothing }}", "{% endfor %}", "{% break %}" + "{{" * 9)


@pytest.mark.parametrize("template", BROKEN)
def test_chat_template_that_does_not_parse(from_json, template):
    """llama_cpp parses every template when it loads a model, whether it is used or not."""
    (from_json / "chat_template.jinja").write_text(template)
    refused(from_json, r"chat_template.jinja: chat template 'default' does not parse \(.*\), line \d; correct it")
    (from_json / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": "A"}, {"name": "tools", "template": template}]
    edit(from_json / "tokenizer_config.json", lambda config: config.update(chat_template=named))
    refused(from_json, r"tokenizer_config.json: chat template 'tools' does not parse \(.*\), line \d")


@pytest.mark.parametrize("depth", [30, 5000])
def test_chat_template_that_python_does_not_compile(from_json, depth):
    nested = "{% for m in messages %}" * depth + "{% endfor %}" * depth
    (from_json / "chat_template.jinja").write_text(nested)
    refused(from_json, "chat_template.jinja: chat template 'default' does not parse")


def test_chat_template_with_the_tags_of_transformers(from_json):
    template = "{% for m in messages %}{% if not m %}{% continue %}{% endif %}{% generation %}{{ m | tojson }}"
    template += "{% endgeneration %}{{ strftime_now('%Y') }}{{ raise_exception('x') }}{% endfor %}"
    (from_json / "chat_template.jinja").write_text(template)
    assert load_tokenizer(from_json, N_VOCAB).chat_template == template


def test_chat_template_that_is_a_git_lfs_pointer(from_json):
    (from_json / "chat_template.jinja").write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(from_json, "chat_template.jinja: a Git LFS pointer")


def test_chat_templates_in_files(from_json):
    """Where there are files transformers does not read those of tokenizer_config.json."""
    named = [{"name": "default", "template": "A"}, {"name": "tools", "template": "B"}]
    edit(from_json / "tokenizer_config.json", lambda config: config.update(chat_template=named))
    (from_json / "additional_chat_templates").mkdir()
    (from_json / "additional_chat_templates" / "rag.jinja").write_text("C")
    assert load_tokenizer(from_json, N_VOCAB).chat_templates == {"rag": "C"}
    (from_json / "chat_template.jinja").write_text("D")
    assert load_tokenizer(from_json, N_VOCAB).chat_templates == {"rag": "C", "default": "D"}
    (from_json / "additional_chat_templates" / "rag.jinja").write_text("{{")
    refused(from_json, "rag.jinja: chat template 'rag' does not parse")


def test_chat_templates_of_one_key(from_json):
    named = [{"name": name, "template": "A"} for name in ("tool use", "tool_use")]
    edit(from_json / "tokenizer_config.json", lambda config: config.update(chat_template=named))
    refused(from_json, "chat templates 'tool use' and 'tool_use' would have one key")


def test_named_chat_templates(from_json):
    templates = [{"name": "default", "template": "A"}, {"name": "tools", "template": "B"}]
    edit(from_json / "tokenizer_config.json", lambda config: config.update(chat_template=templates))
    tokenizer = load_tokenizer(from_json, N_VOCAB)
    assert (tokenizer.chat_template, tokenizer.chat_templates["tools"]) == ("A", "B")
    edit(from_json / "tokenizer_config.json", lambda config: config.update(chat_template=[{"name": "x"}]))
    refused(from_json, "chat_template is damaged")


def test_tokenizer_model_without_companions(from_model):
    """A sentencepiece model names its own special tokens."""
    for name in FILES[2:]:
        (from_model / name).unlink()
    tokenizer = load_tokenizer(from_model, N_VOCAB)
    assert tokenizer.n_real == 1024
    assert [tokenizer.tokens[i] for i in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id)] == [
        "<s>",
        "</s>",
        "<unk>",
    ]


def test_added_tokens_file_alone(from_model):
    """Without added_tokens_decoder a token is special when another file calls it so."""
    edit(from_model / "tokenizer_config.json", lambda config: config.pop("added_tokens_decoder"))
    assert load_tokenizer(from_model, N_VOCAB) == load_tokenizer(TINY_MIXTRAL, N_VOCAB)


def test_new_treatment_of_spaces(from_model):
    edit(from_model / "tokenizer_config.json", lambda config: config.update(legacy=False))
    refused(from_model, "legacy = false")


def trained(**options: Any) -> bytes:
    """A sentencepiece model with Llama's options but for those given."""
    model = io.BytesIO()
    text = (CHECKPOINTS / "heldout.txt").read_text().splitlines()[:400]
    llama = dict(
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        vocab_size=500,
        minloglevel=2,
        num_threads=1,
        **(llama | options),
    )
    return model.getvalue()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, None),
        ({"model_type": "unigram"}, "unsupported sentencepiece model type: expected bpe, found unigram"),
        ({"normalization_rule_name": "nmt_nfkc"}, "precompiled_charsmap"),
        ({"remove_extra_whitespaces": True}, "removes repeated spaces"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
        ({"user_defined_symbols": ["<x>"]}, "user-defined"),
        ({"byte_fallback": False}, "no byte token <0x00>"),
    ],
)
def test_sentencepiece_options(tmp_path, options, message):
    (tmp_path / "tokenizer.model").write_bytes(trained(**options))
    if message:
        refused(tmp_path, message)
    else:
        assert load_tokenizer(tmp_path, 500).add_space_prefix


def test_space_prefix_is_read(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(trained(add_dummy_prefix=False))
    assert not load_tokenizer(tmp_path, 500).add_space_prefix


def test_pieces_equal_those_of_the_sentencepiece_library():
    vocabulary = read_tokenizer_model(TINY_MIXTRAL / "tokenizer.model")
    model = sentencepiece.SentencePieceProcessor(model_file=str(TINY_MIXTRAL / "tokenizer.model"))
    ids = range(model.vocab_size())
    assert vocabulary.tokens == [model.id_to_piece(i) for i in ids]
    assert vocabulary.scores == [model.get_score(i) for i in ids]
    assert [kind.name for kind in vocabulary.types] == [
        "UNKNOWN"
        if model.is_unknown(i)
        else "CONTROL"
        if model.is_control(i)
        else "BYTE"
        if model.is_byte(i)
        else "NORMAL"
        for i in ids
    ]


def test_both_files(from_json):
    """tokenizer.model decides when both are there; they must be the same tokenizer."""
    shutil.copy(TINY_MIXTRAL / "tokenizer.model", from_json)
    tokenizer = load_tokenizer(from_json, N_VOCAB)
    assert list(tokenizer.scores[:1024]) == read_tokenizer_model(from_json / "tokenizer.model").scores
    (from_json / "tokenizer.model").write_bytes(trained())
    refused(from_json, "tokenizer.json: differs from tokenizer.model in token")


def test_both_files_with_another_order_of_merges(from_json):
    shutil.copy(TINY_MIXTRAL / "tokenizer.model", from_json)
    edit(from_json / "tokenizer.json", lambda root: root["model"]["merges"].insert(0, root["model"]["merges"].pop()))
    with pytest.raises(CheckpointError):
        load_tokenizer(from_json, N_VOCAB)


def test_damaged_tokenizer_model(tmp_path):
    """Cut short, overwritten or not protobuf at all: always a CheckpointError, never another exception."""
    path = tmp_path / "tokenizer.model"
    good = (TINY_MIXTRAL / "tokenizer.model").read_bytes()
    rng = random.Random(3)
    damaged = [b"", b"\xff" * 64, b"not protobuf", good[:-1], good[: len(good) // 2]]
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.choice((1, 3, 20))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        damaged.append(bytes(data[: rng.choice((len(data), rng.randrange(len(data))))]))
    n_refused = 0
    for data in damaged:
        path.write_bytes(data)
        try:
            load_tokenizer(tmp_path, N_VOCAB)
        except CheckpointError as error:
            n_refused += 1
            assert str(tmp_path) in str(error)
    assert n_refused > 150


def test_wrong_types_everywhere(from_json):
    """Every member of the JSON files replaced by values of other types."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        good = json.loads((from_json / name).read_text())
        members = [(good, key) for key in good]
        if name == "tokenizer.json":
            members += [(good["model"], key) for key in good["model"]]
            members += [(good["added_tokens"][-1], key) for key in good["added_tokens"][-1]]
        for parent, key in members:
            kept = parent[key]
            for value in (None, True, 7, 1e9, "x", "", [], [7], {}, {"content": 7}, "\ud800"):
                parent[key] = value
                (from_json / name).write_text(json.dumps(good))
                try:
                    load_tokenizer(from_json, N_VOCAB)
                except CheckpointError as error:
                    assert str(from_json) in str(error)
            parent[key] = kept
        (from_json / name).write_text(json.dumps(good))
