"""Tokenizers through the GGUF file and llama.cpp, token for token against the libraries they were made for."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import llama_cpp
import pytest
import sentencepiece
import tokenizers
from llama_cpp import Llama

from support import CHECKPOINTS, TESTS
from tsconv.checkpoint.config import read_json
from tsconv.checkpoint.end_tokens import KNOWN_TO_LLAMA_CPP
from tsconv.checkpoint.tokenizer import Tokenizer, load_tokenizer

REAL = TESTS / "data" / "turbosparse-mistral-instruct"
TINY_MISTRAL = CHECKPOINTS / "tiny-turbosparse-mistral"
TINY_MIXTRAL = CHECKPOINTS / "tiny-turbosparse-mixtral"
CONTROL = ("<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>")

HAND_PICKED = (
    "", " ", "  ", "   ", "\t", "\n", "\n\n\n", " \n \n ", "\r\n", "\x00", "a\x00b", "\x7f\x1b[0m", "\ufeff",
    "\ufffd", "a", " a", "a ", "  a  ", "a  b   c    d", "▁", "▁▁", "a▁b", " ▁ ", "\u00a0\u2003\u3000x", "x" * 5000,
    "ab" * 700, "Hello, world!", "The quick brown fox jumps over the lazy dog.",
    "3.14159 1,234,567 0x7fff 1e-9 ½ ⅷ ٣٤ १२", "naïve café", "cafe\u0301", "e\u0301\u0302\u0303" * 20,
    "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤", "ﬁ ﬂ ﷺ", "İstanbul ıI", "ß ẞ", "ǆ ǅ Ǆ", "日本語のテキスト", "中文字符测试，標點。",
    "한국어 문장입니다", "ᄒᆞᆫ글", "שלום עולם", "مرحبا بالعالم ١٢٣", "\u202eabc\u202c", "नमस्ते दुनिया",
    "สวัสดีชาวโลก", "ᏣᎳᎩ", "𐌰𐌱𐌲", "𠜎𠜱𠝹", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "\U0010ffff", "\U000e0001\ue000", "\ud7ff\uffff", "😀",
    "👩‍👩‍👧‍👦 family", "🏳️‍🌈🇩🇪🇯🇵", "👍🏽👍🏿", "1️⃣", "a\u200db", "\u200b\u200c\u2060",
    "def f(x):\n    return x ** 2  # square\n", "if (a->b != NULL && *p++ == '\\0') { goto end; }",
    "\t\tindented\twith tabs", "<html><body>&nbsp;</body></html>", '{"a": [1, 2.5e3, null]}',
    "SELECT * FROM t WHERE x='y';--", "C:\\dir\\file.txt", "https://example.org/a?b=c&d=%20#e", "-" * 77,
    "=" * 33 + "-" * 18, "." * 100, "#" * 20, "((((((((()))))))))", "'''\"\"\"```",
    "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>", "<|im_start|> user", "<|im_start|>  user", "a<|im_end|>b", "a <|im_end|> b", " <|im_end|>",
    "<|im_end|> ", "<|im_start|><|im_start|><|im_end|>", "<|im_start|", "|im_start|>", "<<|im_end|>>", "<s>",
    "</s>", "<unk>", "a<s>b</s>c<unk>d", "<s><s>x", "<S>", "< s>", "<0x0A>", "<0x41><0x42>", "[PAD32005]",
    "[INST] hi [/INST]", "«<s>»", "onddonendden", "ondondon endenden", "fff ffff fffff", "IIII III II",
    "wwwwww.www", "*" * 13 + "/" * 9,
)  # fmt: skip


def character_pools() -> list[str]:
    """Characters of many scripts, from common to rare; the last pool is all of Unicode but the surrogates."""
    ranges = [
        (0x20, 0x7F), (0x00, 0x20), (0x7F, 0x250), (0x250, 0x370), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700),
        (0x900, 0xE00), (0xE00, 0x1000), (0x1100, 0x1200), (0x1E00, 0x2000), (0x2000, 0x2070), (0x2070, 0x2C00),
        (0x3040, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A4), (0xF900, 0xFFFF), (0x10300, 0x10380), (0x1D400, 0x1D800),
        (0x1F300, 0x1FAFF), (0x20000, 0x2A6D0), (0xE000, 0xF8FF),
    ]  # fmt: skip
    pools = ["".join(map(chr, range(*bounds))) for bounds in ranges]
    return [*pools, "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)]


WORDS = """
    the of and sparse neuron activation return std::vector<int> print(x) für été naïve Straße привет мир γειά σου
    שלום مرحبا 你好 世界 こんにちは 안녕하세요 สวัสดี नमस्ते 😀 👩‍💻 🏴‍☠️ 42 1999 3.14 1,000 0xff --- === ... ''' "" ((( )))
""".split()  # noqa: SIM905


def random_lines(seed: int, n: int) -> Iterator[str]:
    """n reproducible lines that mix words, scripts, white space, runs and control tokens."""
    rng = random.Random(seed)
    pools = character_pools()
    spaces = [" "] * 12 + ["", "  ", "   ", "\t", "\n", "\r\n", "\n\n", "\u00a0", " " * 17]
    for _ in range(n):
        parts = []
        for _ in range(rng.choice((1, 2, 3, 5, 8, 13, 40))):
            kind = rng.random()
            if kind < 0.45:
                parts.append(rng.choice(WORDS))
            elif kind < 0.8:
                pool = rng.choice(pools)
                parts.append("".join(rng.choice(pool) for _ in range(rng.choice((1, 2, 4, 9)))))
            elif kind < 0.9:
                parts.append(rng.choice("-=*#. _\t\nax0世é😀") * rng.choice((1, 2, 3, 5, 7, 16, 33)))
            else:
                parts.append(rng.choice(CONTROL))
            parts.append(rng.choice(spaces))
        yield "".join(parts)


def overlapping_merges(directory: Path) -> Iterator[str]:
    """Texts l+m+r of merges (l, m) and (m, r) that make the same piece, the one case in which SPM may part from BPE."""
    merges = [entry.split(" ") if isinstance(entry, str) else entry for entry in
              read_json(directory / "tokenizer.json")["model"]["merges"]]  # fmt: skip
    known = {tuple(pair) for pair in merges}
    for left, middle in merges:
        joined = left + middle
        if left != middle and joined.startswith(middle) and (middle, joined[len(middle) :]) in known:
            text = (joined + joined[len(middle) :]).replace("▁", " ")
            for before in ("", "x", " ", "\n", left, middle, text):
                for after in ("", "x", left, joined):
                    yield (before + text + after).replace("▁", " ")


def write_vocab(tokenizer: Tokenizer, path: Path) -> Path:
    """A GGUF file with nothing but the hyper-parameters that llama.cpp insists on and the tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    tokenizer.add_to(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def open_vocab(directory: Path, tmp: Path) -> tuple[Tokenizer, Llama]:
    tokenizer = load_tokenizer(directory, read_json(directory / "config.json")["vocab_size"])
    return tokenizer, Llama(str(write_vocab(tokenizer, tmp / "vocab.gguf")), vocab_only=True, verbose=False)


def lines_for(directory: Path, n: int) -> list[str]:
    lines = [*HAND_PICKED, *random_lines(20240610, n)]
    return lines + list(overlapping_merges(directory)) if (directory / "tokenizer.json").exists() else lines


def first_difference(lines: list[str], ours: Callable, theirs: Callable) -> str:
    """Empty, or the first line of which the two make different things."""
    for line in lines:
        a, b = ours(line), theirs(line)
        if a != b:
            return f"{line!r}\n  ours   {a}\n  theirs {b}"
    return ""


@pytest.fixture(scope="module", params=[REAL, TINY_MISTRAL], ids=lambda path: path.name)
def from_json(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    directory = request.param
    tokenizer, llama = open_vocab(directory, tmp_path_factory.mktemp("vocab"))
    reference = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    return tokenizer, llama, reference, lines_for(directory, 4000)


def test_tokens_equal_those_of_tokenizers(from_json):
    _, llama, reference, lines = from_json
    assert len(lines) > 4000
    assert not first_difference(
        lines, lambda line: llama.tokenize(line.encode(), special=True), lambda line: reference.encode(line).ids
    )


def test_without_bos(from_json):
    _, llama, reference, lines = from_json
    assert not first_difference(
        lines[:1000],
        lambda line: llama.tokenize(line.encode(), add_bos=False, special=True),
        lambda line: reference.encode(line, add_special_tokens=False).ids,
    )


def test_control_tokens_in_plain_text(from_json):
    """special=False: what a user types must never become a control token."""
    _, llama, reference, lines = from_json
    reference.encode_special_tokens = True
    try:
        assert not first_difference(
            lines, lambda line: llama.tokenize(line.encode(), special=False), lambda line: reference.encode(line).ids
        )
    finally:
        reference.encode_special_tokens = False


@pytest.mark.parametrize("special", [True, False])
def test_detokenize(from_json, special):
    _, llama, reference, lines = from_json
    assert not first_difference(
        [reference.encode(line).ids for line in lines],
        lambda ids: llama.detokenize(ids, special=special).decode(),
        lambda ids: reference.decode(ids, skip_special_tokens=not special),
    )


def test_plain_text_survives(from_json):
    _, llama, _, lines = from_json
    for line in lines:
        if not any(token in line for token in CONTROL) and "▁" not in line:
            assert llama.detokenize(llama.tokenize(line.encode(), special=True)).decode() == line


def test_tiny_mixtral_against_sentencepiece(tmp_path):
    tokenizer, llama = open_vocab(TINY_MIXTRAL, tmp_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(TINY_MIXTRAL / "tokenizer.model"))
    control = {token: tokenizer.tokens.index(token) for token in CONTROL}
    cut = re.compile("(" + "|".join(map(re.escape, control)) + ")")

    def encode(text: str) -> list[int]:
        ids = [model.bos_id()]
        for part in cut.split(text):
            ids += [control[part]] if part in control else model.encode(part)
        return ids

    lines = lines_for(TINY_MIXTRAL, 4000)
    assert not first_difference(lines, lambda line: llama.tokenize(line.encode(), special=True), encode)
    plain = [line for line in lines if not cut.search(line)]
    assert not first_difference(
        plain,
        lambda line: llama.detokenize(llama.tokenize(line.encode())).decode(),
        lambda line: model.decode(model.encode(line)),
    )


@pytest.fixture
def copy(tmp_path):
    """A checkpoint's files without its weights."""
    return shutil.copytree(TINY_MISTRAL, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))


def add_to_config(directory: Path, tokens: dict[int, tokenizers.AddedToken]) -> None:
    """Adds tokens to tokenizer_config.json, which transformers then adds to those of tokenizer.json."""
    path = directory / "tokenizer_config.json"
    config = read_json(path)
    for i, token in tokens.items():
        config["added_tokens_decoder"][str(i)] = token.__getstate__()
    path.write_text(json.dumps(config))


def test_tokens_that_only_tokenizer_config_adds(copy, tmp_path):
    tokens = {
        1026: tokenizers.AddedToken("<think>", normalized=False),
        1027: tokenizers.AddedToken("<|tool|>", normalized=False, special=True),
    }
    add_to_config(copy, tokens)
    _, llama = open_vocab(copy, tmp_path)
    reference = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    reference.add_tokens(list(tokens.values()))
    mixed = [line.replace("<|im_start|>", "<think>").replace("</s>", "<|tool|>") for line in lines_for(copy, 500)]
    assert sum("<think>" in line for line in mixed) > 20 < sum("<|tool|>" in line for line in mixed)
    for special in (True, False):
        reference.encode_special_tokens = not special
        assert not first_difference(
            mixed,
            lambda line, special=special: llama.tokenize(line.encode(), special=special),
            lambda line: reference.encode(line).ids,
        )


def ends(llama: Llama, tokenizer: Tokenizer) -> set[str]:
    """The tokens at which llama.cpp ends a generation."""
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    return {token for i, token in enumerate(tokenizer.tokens) if llama_cpp.llama_vocab_is_eog(vocab, i)}


def test_end_tokens_of_generation_config(copy, tmp_path):
    texts = ["<|turn_over|>", "<|done|>", "<|endoftext|>", "<|no_end|>"]
    add_to_config(copy, {1026 + i: tokenizers.AddedToken(text, special=True) for i, text in enumerate(texts)})
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [1026, 1027, 1028]}))
    tokenizer, llama = open_vocab(copy, tmp_path)
    assert ends(llama, tokenizer) == {"<|im_end|>", "</s>", *texts[:3]}
    assert tokenizer.notes == ()


@pytest.mark.parametrize("text", sorted(KNOWN_TO_LLAMA_CPP))
def test_end_tokens_that_llama_cpp_knows(text, copy, tmp_path):
    if text in ("</s>", "<|im_end|>"):  # of this vocabulary anyway
        add_to_config(copy, {1026: tokenizers.AddedToken("<|x|>", special=True)})
    else:
        add_to_config(copy, {1026: tokenizers.AddedToken(text, special=True)})
    tokenizer, llama = open_vocab(copy, tmp_path)
    assert text in ends(llama, tokenizer)
    assert "<|x|>" not in ends(llama, tokenizer)


def test_the_model_sees_the_real_special_tokens():
    tokenizer = load_tokenizer(REAL, 32064)
    assert tokenizer.notes == ()
    assert (tokenizer.n_real, len(tokenizer.tokens)) == (32002, 32064)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id) == (1, 32000, 0, 0)
    assert (tokenizer.add_bos, tokenizer.add_eos, tokenizer.add_space_prefix) == (True, False, True)
    kinds = {name: {i for i, kind in enumerate(tokenizer.types) if kind == name} for name in gguf.TokenType}
    assert kinds[gguf.TokenType.UNKNOWN] == {0}
    assert kinds[gguf.TokenType.CONTROL] == {1, 2, 32000, 32001}
    assert kinds[gguf.TokenType.BYTE] == set(range(3, 259))
    assert kinds[gguf.TokenType.UNUSED] == set(range(32002, 32064))
    assert tokenizer.chat_template == json.loads((REAL / "tokenizer_config.json").read_text())["chat_template"]


def test_end_of_turn_ends_generation(from_json):
    tokenizer, llama, _, _ = from_json
    assert llama.token_eos() == tokenizer.tokens.index("<|im_end|>")
    assert llama.token_bos() == tokenizer.tokens.index("<s>")
    assert llama.metadata["tokenizer.chat_template"] == tokenizer.chat_template
