"""tsconv: TurboSparse dReLU checkpoints to GGUF, run sparsely inside unmodified llama.cpp.

These are imported on first use, so that `import tsconv` stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tsconv.commands.convert import convert
    from tsconv.commands.place import place
    from tsconv.commands.reorder import reorder
    from tsconv.runtime.model import SparseLlama, load

__version__ = "0.1.0"
__all__ = ["SparseLlama", "__version__", "convert", "load", "place", "reorder"]

_LAZY = {
    "SparseLlama": "tsconv.runtime.model",
    "convert": "tsconv.commands.convert",
    "load": "tsconv.runtime.model",
    "place": "tsconv.commands.place",
    "reorder": "tsconv.commands.reorder",
}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'tsconv' has no attribute {name!r}")
