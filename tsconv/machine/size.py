"""Sizes of memory as people write them."""

from __future__ import annotations

import re

SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?(?:([kmgt])(i?b|)|b)", re.IGNORECASE | re.ASCII)
POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
MAX_BYTES = 1 << 62
EXAMPLES = "a number and a unit, such as 9GiB, 9GB or 500MiB"


def parse_size(text: str) -> int | None:
    """Bytes, rounded down: "9GiB" and "9G" are 9 * 1024^3, "9GB" is 9 * 1000^3, "17B" and "0" are themselves. None for
    anything else, and for more than any machine has."""
    if text.strip() == "0":
        return 0
    match = SIZE.fullmatch(text.strip())
    if match is None:
        return None
    number, unit, ending = match.groups()
    base = 1000 if (ending or "").lower() == "b" else 1024
    n_bytes = int(float(number) * base ** POWERS[unit.lower()]) if unit else int(float(number))
    return n_bytes if n_bytes <= MAX_BYTES else None
