"""What all readers of calibration text share: what they count, how they stop, and the order in which they go."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass
class Tally:
    """What happened while a corpus was read.

    Attributes:
        given: documents handed out.
        empty: texts that were null or blank, and not handed out.
        replaced: byte sequences that are not UTF-8, handed out as U+FFFD.
        broken: what could not be decoded and was skipped: file, row group, reason.
    """

    given: int = 0
    empty: int = 0
    replaced: int = 0
    broken: list[str] = field(default_factory=list)


class InterruptedReadError(Exception):
    """The network went away and did not come back. The message says where, and why."""


class TextSource(Protocol):
    """A file of a corpus. `name` is relative to the corpus, so that orders do not depend on where it lies."""

    name: str

    def documents(self, seed: int | None, column: str, tally: Tally) -> Iterator[str | None]:
        """Its texts, lazily; null and blank ones too. `column` is the field or column that holds the text."""
        ...


def order(n: int, seed: int | None, *where: object) -> Sequence[int]:
    """0 to n - 1: as they come without a seed, else in the random order that seed and `where` determine.

    Equal on every machine: Python promises that random() of a generator seeded with bytes does not change.
    """
    if seed is None:
        return range(n)
    generator = random.Random("/".join(map(str, (seed, *where))).encode("utf-8", "surrogateescape"))
    keys = [generator.random() for _ in range(n)]
    return sorted(range(n), key=keys.__getitem__)
