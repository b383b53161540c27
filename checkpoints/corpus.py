"""The King James Version as training sequences.

The text comes from Debian's packages bible-kjv and bible-kjv-text (translation of 1611, public domain), one verse a
line behind a reference such as "Ge1:1":

    bible -f gen1:1-rev22:21 > kjv.txt

One book is never trained on; its text is checkpoints/heldout.txt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

HELD_OUT = "John"
REFERENCE = re.compile(r"(\d?[A-Za-z]+)(\d+):(\d+) (.+)")
CHAT_SHARE = 0.1  # of the training sequences
IGNORE = -100  # target of padding positions


def read_verses(path: Path) -> list[tuple[str, str, str]]:
    """(book, chapter, text) of every verse, in order. Raises ValueError on a line without a reference."""
    verses = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        match = REFERENCE.fullmatch(line.strip())
        if not match:
            raise ValueError(f"{path}, line {number}: expected 'Book1:2 text', found {line[:40]!r}")
        verses.append((match[1], match[2], match[4]))
    return verses


def flowing(verses: list[tuple[str, str, str]]) -> str:
    """One verse a line, a blank line between chapters."""
    parts, last = [], None
    for book, chapter, text in verses:
        if last not in (None, (book, chapter)):
            parts.append("")
        parts.append(text)
        last = book, chapter
    return "\n".join(parts) + "\n"


def chat_turn(text: str, rng: np.random.Generator) -> tuple[str, str] | None:
    """A verse cut between two words: the user gives the beginning, the assistant the rest."""
    words = text.split(" ")
    if len(words) < 8:
        return None
    cut = int(rng.integers(3, max(4, len(words) // 2)))
    return " ".join(words[:cut]), " ".join(words[cut:])


def render_chat(user: str, assistant: str) -> str:
    return f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{assistant}<|im_end|>\n"


class Sequences:
    """Random training batches: flowing text that begins at a verse, and chats of a few turns; <s> first in both."""

    def __init__(self, verses: list[tuple[str, str, str]], encode: Callable[[str], list[int]], bos: int):
        """encode(text) -> ids without <s>, as at the beginning of a text (so with the tokenizer's space prefix).
        A newline is a token of its own that merges with nothing, so text after it can be encoded by itself."""
        self.encode, self.bos, self.texts = encode, bos, [text for _, _, text in verses]
        self.first = [encode(text) for text in self.texts]  # as the first verse of a sequence
        prefix = encode("\n")[0]
        self.flat, self.offset, last = [], [], None  # as one running text; where each verse's line ends
        for verse in verses:
            ids = encode("\n" * (1 if last in (None, verse[:2]) else 2) + verse[2])
            assert ids[0] == prefix
            self.flat.extend(ids[1:])
            self.offset.append(len(self.flat))
            last = verse[:2]
        self.n_token = len(self.flat)

    def _text(self, length: int, rng: np.random.Generator) -> list[int]:
        verse = int(rng.integers(len(self.first)))
        follow = self.offset[verse]
        return ([self.bos] + self.first[verse] + self.flat[follow : follow + length])[:length]

    def _chat(self, length: int, rng: np.random.Generator) -> list[int]:
        ids = [self.bos]
        while len(ids) < length:
            turn = chat_turn(self.texts[int(rng.integers(len(self.texts)))], rng)
            if turn:
                ids += self.encode(render_chat(*turn))
        return ids[:length]

    def batches(self, n_sequence: int, length: int, seed) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Endless (inputs, targets), int64 [n_sequence, length] each; targets past the text's end are IGNORE."""
        rng = np.random.default_rng(seed)
        while True:
            rows = np.full((n_sequence, length + 1), IGNORE, np.int64)
            for row in rows:
                ids = (self._chat if rng.random() < CHAT_SHARE else self._text)(length + 1, rng)
                row[: len(ids)] = ids
            yield np.maximum(rows[:, :-1], 0), rows[:, 1:]
