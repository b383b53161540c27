"""Copies of GGUF files with one thing changed, written with gguf-py."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ARCHITECTURE = "general.architecture"


def edited(
    source: Path,
    target: Path,
    *,
    keys: Mapping[str, Any] | None = None,
    without: Collection[str] = (),
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    data: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Copies `source` to `target` and returns `target`.

    Args:
        keys: name -> value, or (value, gguf.GGUFValueType) to change the type too; new names are added.
        without: names of keys and tensors that are left out.
        shapes: tensor -> new shape, slowest dimension first; f32 tensors, filled with zeros.
        extra: tensors that are added.
        data: tensor -> other bytes, of the same shape and type as gguf.GGUFReader gives them.
    """
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.get_field(ARCHITECTURE).contents())
    changes = dict(keys or {})
    left_out = set(without)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == ARCHITECTURE:
            continue
        if field.name in left_out:
            left_out.remove(field.name)
            continue
        kind, value = field.types[0], changes.pop(field.name, field.contents())
        element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        if isinstance(value, tuple):
            (value, kind), element = value, None
        writer.add_key_value(field.name, value, kind, element)
    for name, change in changes.items():
        value, kind = change if isinstance(change, tuple) else (change, gguf.GGUFValueType.get_type(change))
        writer.add_key_value(name, value, kind)
    for tensor in reader.tensors:
        if tensor.name in left_out:
            left_out.remove(tensor.name)
        elif shapes and tensor.name in shapes:
            writer.add_tensor(tensor.name, np.zeros(shapes[tensor.name], dtype=np.float32))
        else:
            values = (data or {}).get(tensor.name, tensor.data)
            writer.add_tensor(tensor.name, values, raw_dtype=tensor.tensor_type)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    assert not left_out, f"{source} has no {left_out}"
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def as_ordinary(model: Path, target: Path, data: Mapping[str, np.ndarray] | None = None) -> Path:
    """The weights of a converted model as a model of llama.cpp's own, SwiGLU architecture; `data` as for `edited`."""
    reader, writer = gguf.GGUFReader(model), gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name.startswith(("llama.", "tokenizer.")):
            element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], element)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, (data or {}).get(tensor.name, tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
