"""The keys of machine profiles (profiles/README.md), and the check of a profile against them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tsconv.errors import TsconvError


@dataclass(frozen=True)
class Key:
    """One key of a profile: its type, unit, limits, and the unit `factor` times smaller that is easily taken for it."""

    kind: type[Any]
    unit: str = ""
    low: float = 0.0
    high: float = math.inf
    mistaken: str = ""
    factor: float = 1.0
    required: bool = True

    @property
    def expected(self) -> str:
        if self.kind is str:
            return "text"
        what = self.unit if self.kind is float else "a whole number"
        return f"{what} from {self.low:g} to {self.high:g}"


def _gbps(low: float, high: float, required: bool = True) -> Key:
    return Key(float, "GB/s (1e9 bytes/s)", low, high, "MB/s", 1000, required)


def _gib(low: float, high: float) -> Key:
    return Key(float, "GiB", low, high, "MiB", 1024)


# The limits are far beyond any machine of today, and tell the units apart that are a thousand times smaller.
SCHEMA: dict[str, dict[str, Key]] = {
    "": {
        "name": Key(str),
        "assumed": Key(list, required=False),
        "cpu": Key(dict),
        "disk": Key(dict, required=False),
        "gpu": Key(dict, required=False),
    },
    "cpu": {
        "model": Key(str),
        "cores": Key(int, "", 1, 4096),
        "memory_gib": _gib(0.0625, 16384),
        "memory_gbps": _gbps(0.1, 5000),
        "random_gbps": _gbps(0.001, 5000, False),
    },
    "disk": {
        "sequential_gbps": _gbps(0.001, 200),
        "random_gbps": _gbps(0.000001, 200, False),
    },
    "gpu": {
        "model": Key(str),
        "memory_gib": _gib(0.0625, 2048),
        "memory_gbps": _gbps(1, 20000),
        "pcie": Key(str, required=False),
        "pcie_gbps": _gbps(0.01, 1000, False),
        "pcie_latency_us": Key(float, "us", 0.01, 10000, "ns", 1000, False),
    },
}


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """A question that names the likeliest of `known`; None when none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else None


def check_table(table: str, values: dict[str, Any], where: object) -> None:
    """Checks one table, "" for the whole document. `where` is the file.

    Raises:
        TsconvError: an unknown or missing key, or a value of another type or out of range.
    """
    known = SCHEMA[table]
    place = f"{where}: {table}" if table else str(where)
    for key, value in values.items():
        if key not in known:
            what = "table" if isinstance(value, dict) else "key"
            raise TsconvError(
                f"unknown {what} {key!r}",
                where=place,
                expected=", ".join(known),
                fix=did_you_mean(key, known) or "profiles/README.md says what they mean",
            )
        _check_value(known[key], value, f"{where}: {table}.{key}" if table else f"{where}: {key}")
    for key, rule in known.items():
        if rule.required and key not in values:
            what = "table" if rule.kind is dict else "key"
            raise TsconvError(f"missing {what}", where=place, expected=f"[{key}]" if rule.kind is dict else key)


def _check_value(rule: Key, value: Any, where: str) -> None:
    if rule.kind in (dict, list):
        named = "a table" if rule.kind is dict else "a list of field names"
        if not isinstance(value, rule.kind) or (rule.kind is list and not all(isinstance(v, str) for v in value)):
            raise TsconvError("bad value", where=where, expected=named, found=_shown(value))
        return
    allowed: tuple[type[Any], ...] = (int, float) if rule.kind is float else (rule.kind,)
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise TsconvError("bad value", where=where, expected=rule.expected, found=_shown(value))
    if rule.kind is str:
        if not value.strip():
            raise TsconvError("bad value", where=where, expected="text", found="nothing")
        return
    if not rule.low <= value <= rule.high:  # not for nan either
        smaller = value / rule.factor if rule.mistaken and math.isfinite(value) else math.nan
        fix = f"write {smaller:g} if that is in {rule.mistaken}" if rule.low <= smaller <= rule.high else None
        raise TsconvError("bad value", where=where, expected=rule.expected, found=f"{value:g}", fix=fix)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
