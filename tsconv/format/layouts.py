"""Layouts of weight matrices, as the keys of the two files say them (docs/format.md)."""

from __future__ import annotations

from dataclasses import dataclass

from tsconv.errors import ModelFileError
from tsconv.format.header import Header

ROWS = "rows"
# Format versions: without a layout key, with it; of sidecars with a matrix of q3_nl, and with a form.
PLAIN_VERSION, LAYOUT_VERSION, Q3_NL_VERSION, FORM_VERSION = 1, 2, 3, 4
MODEL_VERSIONS = (PLAIN_VERSION, LAYOUT_VERSION)
SIDECAR_VERSIONS = (PLAIN_VERSION, LAYOUT_VERSION, Q3_NL_VERSION, FORM_VERSION)


@dataclass(frozen=True)
class LayoutKey:
    """A key that says ROWS or `other`."""

    key: str
    other: str

    def of(self, header: Header) -> str:
        """ROWS or the other one, of a file whose version is one of those above.

        Raises:
            ModelFileError: the key is unknown, missing from version 2 on, or there in version 1.
        """
        layout = header.keys.get(self.key)
        known: tuple[str | None, ...]
        if header.keys.get("turbosparse.format_version") == PLAIN_VERSION:
            expected, known = "nothing in format version 1", (None,)
        else:
            expected, known = f"{ROWS!r} or {self.other!r}", (ROWS, self.other)
        if layout not in known:
            raise ModelFileError(
                f"bad {self.key}",
                where=header.path,
                expected=expected,
                found="nothing" if layout is None else repr(layout),
                fix="convert again, or install the tsconv that wrote the file",
            )
        return layout or ROWS


PREDICTOR = LayoutKey("turbosparse.predictor.layout", "panels16")  # of the sidecar's matrices
FFN = LayoutKey("turbosparse.ffn.layout", "bundles")  # of gate, up and down in the model
