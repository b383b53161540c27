"""One sentencepiece BPE model, written in the two forms that checkpoints ship: tokenizer.model and tokenizer.json.

The JSON form is the conversion that Hugging Face applies to Llama and Mistral tokenizers: BPE with byte fallback whose
merges are all splits of every piece into two pieces, ordered by the piece's score.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable
from pathlib import Path

import sentencepiece as spm
from tokenizers import Tokenizer

CONTROL = ("<unk>", "<s>", "</s>")
ADDED = ("<|im_end|>", "<|im_start|>")  # ids right after the model's own, in this order
BOS = 1


def train(texts: Iterable[str], n_piece: int) -> bytes:
    """The serialised sentencepiece model. Llama's options: no normalization, space prefix, bytes for the unknown."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=n_piece,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        character_coverage=1.0,
        num_threads=1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


class SentencePiece:
    """tokenizer.model with the added tokens cut out first; each text between them is encoded by itself."""

    def __init__(self, model: bytes):
        self.sp = spm.SentencePieceProcessor(model_proto=model)
        self.added = {token: self.sp.vocab_size() + i for i, token in enumerate(ADDED)}
        self.split = re.compile("(" + "|".join(map(re.escape, ADDED)) + ")")

    def encode(self, text: str) -> list[int]:
        ids = []
        for part in self.split.split(text):
            ids += [self.added[part]] if part in self.added else self.sp.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.sp.decode([i for i in ids if i < self.sp.vocab_size()])


class HuggingFace:
    """tokenizer.json through the tokenizers library."""

    def __init__(self, text: str):
        self.tokenizer = Tokenizer.from_str(text)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def load(directory: Path) -> SentencePiece | HuggingFace:
    model = directory / "tokenizer.model"
    if model.exists():
        return SentencePiece(model.read_bytes())
    return HuggingFace((directory / "tokenizer.json").read_text())


def added_tokens(n_piece: int) -> dict[str, int]:
    return {token: n_piece + i for i, token in enumerate(ADDED)}


def merges(pieces: dict[str, float], ids: dict[str, int]) -> list[tuple[str, str]]:
    """All splits (left, right) of each piece into two pieces; best score first, then the longer left half."""
    found = []
    for piece, score in pieces.items():
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        halves = [(a, b) for a, b in halves if a in ids and b in ids]
        found += [(score, a, b) for a, b in sorted(halves, key=lambda h: (ids[h[0]], ids[h[1]]))]
    found.sort(key=lambda m: (m[0], len(m[1]), len(m[2])), reverse=True)
    return [(a, b) for _, a, b in found]


def to_json(model: bytes) -> str:
    """The text of tokenizer.json for a sentencepiece BPE model and the added tokens."""
    sp = spm.SentencePieceProcessor(model_proto=model)
    ids = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    scores = {piece: sp.get_score(i) for piece, i in ids.items()}
    special = {token: ids[token] for token in CONTROL} | added_tokens(len(ids))
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    bos, first, second = (
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        [{"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
    )
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": token, **flags} for token, i in special.items()],
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]},
            "pre_tokenizer": None,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [bos, first],
                "pair": [bos, first, *second],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [ids["<s>"]], "tokens": ["<s>"]}},
            },
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": "<unk>",
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": ids,
                "merges": [f"{a} {b}" for a, b in merges(scores, ids)],
            },
        },
        ensure_ascii=False,
        indent=1,
    )


def disagreements(model: bytes, texts: Iterable[str]) -> list[str]:
    """The texts that the two forms encode differently."""
    one, other = SentencePiece(model), HuggingFace(to_json(model))
    return [text for text in texts if one.encode(text) != other.encode(text)]


# No "<s>" among them: it is a special token to tokenizers and plain text to sentencepiece.
ODD_TEXTS = (
    "",
    " ",
    "  ",
    "a",
    " a",
    "a ",
    "  two  spaces  ",
    "\n",
    "\n\n",
    "a\n b\t c",
    "\r\n",
    "1611",
    "3:16",
    "12,345.67",
    "naïve café",
    "日本語",
    "😀 ok",
    "Ünïcödé▁x",
    "x<|im_end|>",
    "<|im_start|>user\nhi<|im_end|>\n",
    "LORD'S",
    "aaaaaaaaaaaaaaaaaaaa",
    "eeeeeeee sssssss tttttt",
    "....",
    "((()))",
    "the" * 50,
    "\u200b\u00a0x",
    "\x00\x01",
)
