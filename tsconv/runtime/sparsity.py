"""Which neurons a token computes, as a user writes it. native/src/model/sparsity.c reads the same."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tsconv.errors import TsconvError

EXPECTED = (
    "'predictor', 'exact', 'dense', 'topk:S' with S from 0 to below 1, or 'predictor:D' with a number D added to the "
    "threshold"
)
MAX_DIGITS = 15
_TEXT = re.compile(r"(predictor|exact|dense)|(?:(topk)|(predictor)):([+-]?[0-9]+(?:\.[0-9]*)?)", re.ASCII)
_MAX_CHARS = 39


@dataclass(frozen=True)
class Sparsity:
    """
    Attributes:
        kind: "predictor", "exact", "dense" or "topk".
        value: of topk the share of the neurons that is dropped, of predictor what is added to its threshold; else 0.
    """

    kind: str
    value: float = 0.0


def parse_sparsity(text: str) -> Sparsity:
    """
    Raises:
        TsconvError: the text says nothing of the kind.
    """
    found = _TEXT.fullmatch(text)
    if found is not None and found[1]:
        return Sparsity(found[1])
    if found is not None and len(text) <= _MAX_CHARS and sum(map(str.isdigit, found[4])) <= MAX_DIGITS:
        value = float(found[4])
        if found[3] or 0 <= value < 1:
            return Sparsity(found[2] or found[3], value)
    raise TsconvError("sparsity", expected=EXPECTED, found=repr(text))
