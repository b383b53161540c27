"""The layout of the predictor's matrices, as the keys of a sidecar say it (docs/format.md)."""

from __future__ import annotations

from tsconv.errors import ModelFileError
from tsconv.export.gguf_header import Header

KEY = "turbosparse.predictor.layout"
ROWS, PANELS = "rows", "panels16"
PLAIN_VERSION, LAYOUT_VERSION = 1, 2  # of a sidecar without the key and with it
VERSIONS = (PLAIN_VERSION, LAYOUT_VERSION)


def layout_of(sidecar: Header) -> str:
    """ROWS or PANELS, of a sidecar whose version is one of VERSIONS.

    Raises:
        ModelFileError: the key is unknown, missing from version 2, or there in version 1.
    """
    layout = sidecar.keys.get(KEY)
    if sidecar.keys.get("turbosparse.format_version") == PLAIN_VERSION:
        expected, known = "nothing in format version 1", (None,)
    else:
        expected, known = f"{ROWS!r} or {PANELS!r}", (ROWS, PANELS)
    if layout not in known:
        raise ModelFileError(
            f"bad {KEY}",
            where=sidecar.path,
            expected=expected,
            found="nothing" if layout is None else repr(layout),
            fix="convert again, or install the tsconv that wrote the file",
        )
    return layout or ROWS
