"""The calibration text that ships with the package: data/*.txt; data/README.md says where each comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tsconv.stats.text.documents import Tally, order

FOLDER = Path(__file__).parent / "data"
BUILTIN_VERSION = "1"  # raised whenever the text changes
PIECE = 2500  # characters: about one chunk of tokens


class BuiltinText:
    """The files of FOLDER in pieces of some paragraphs. Without a seed they are dealt out evenly, so that any beginning
    of the text holds a share of every file."""

    name = "builtin"

    def documents(self, seed: int | None, column: str, tally: Tally) -> Iterator[str]:
        dealt = []
        for path in sorted(FOLDER.glob("*.txt")):
            pieces = list(_pieces(path.read_text(encoding="utf-8")))
            dealt += [((i + 0.5) / len(pieces), path.name, text) for i, text in enumerate(pieces)]
        dealt.sort()
        yield from (dealt[i][2] for i in order(len(dealt), seed, self.name))


def _pieces(text: str) -> Iterator[str]:
    """Pieces of PIECE characters or a little more that join to the text; cut between paragraphs, or else lines."""
    start = 0
    while start < len(text):
        at = start + PIECE
        cut = re.compile(r"\n\n+").search(text, at, at + PIECE) or re.compile(r"\n").search(text, at)
        end = cut.end() if cut else len(text)
        yield text[start:end]
        start = end
