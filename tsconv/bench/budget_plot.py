"""The picture of a model larger than memory: tokens/s, and what comes from disk, over the memory that it has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tsconv.format.pair import sidecar_path
from tsconv.report.style import BLUE, GREEN, ORANGE, canvas, legend_above, rendered, styled

LINES = (BLUE, ORANGE, GREEN)


def draw(rows: Sequence[dict[str, Any]], model: Path) -> bytes:
    """A PNG of what tsconv.bench.stream measured of `model`, for each engine.

    Args:
        rows: of tsconv.bench.stream.measure; those without a group, and those that were killed, are left out.
    """
    drawn = [row for row in rows if not row["killed"] and row["memory_bytes"] is not None]
    engines = list(dict.fromkeys(row["engine"] for row in drawn))
    files = [path for path in (model, sidecar_path(model)) if path.exists()]
    with styled():
        figure = canvas(7.0, 5.2)
        speed, disk = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for engine, colour in zip(engines, LINES, strict=False):
            points = sorted((row for row in drawn if row["engine"] == engine), key=lambda row: row["memory_bytes"])
            memory = [row["memory_bytes"] / 2**30 for row in points]
            speed.plot(memory, [row["tokens_per_s"] for row in points], "o-", color=colour, label=engine)
            if all("disk_bytes" in row for row in points):
                disk.plot(memory, [row["disk_bytes"] / 1e6 for row in points], "o-", color=colour)
        size = sum(path.stat().st_size for path in files) / 2**30
        for axes in (speed, disk):
            axes.axvline(size, color="#888888", linestyle=":", label=f"the files: {size:.1f} GiB")
            axes.set_ylim(bottom=0)
        speed.set_ylabel("tokens/s")
        disk.set_ylabel("MB/token from disk")
        disk.set_xlabel("memory of the group, GiB")
        legend_above(speed, len(engines) + 1)
        return rendered("budgets", "", "", figure).png
