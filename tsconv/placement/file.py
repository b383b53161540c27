"""The placement file: which part of a model lives on the GPU, stays in RAM, or is read from disk (docs/placement.md).

JSON, because a person may want to read and edit it; everything in it is checked when it is read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tsconv.checkpoint.config import MAX_CONTEXT, MAX_DIM, MAX_EXPERTS, MAX_LAYERS
from tsconv.errors import ModelFileError
from tsconv.format.header import Header
from tsconv.format.order import HOT_FIRST, KEY, shape_of
from tsconv.write.writer import write_file

FORMAT_VERSION = 1
GPU, CPU = "gpu", "cpu"

MAX_FILE = 64 << 20  # bytes; the largest model of the format (512 layers, 1024 experts) takes less than 16 MiB
MAX_BYTES = 1 << 62  # of a budget
MAX_NAME = 256  # characters
SHOWN = 72  # characters of a value in a message

Device = str  # GPU or CPU


@dataclass(frozen=True)
class LayerPlacement:
    """Where one layer lives.

    Attributes:
        attention: device of attention, its KV cache, the norms and the router.
        predictor: device of the layer's predictors, all experts; "cpu" in a model that runs without.
        gpu: neurons of each FFN that the GPU holds: a prefix of the hot-first order.
        ram: neurons of each FFN, behind those of the GPU, that stay in RAM. The rest is read from disk.
    """

    attention: Device
    predictor: Device
    gpu: tuple[int, ...]
    ram: tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """A placement and what it was made for.

    Attributes:
        fingerprint, pair_id, neuron_order: the model's keys; the placement fits no other file.
        sparsity: "predictor" or "exact": the function whose cost was minimised.
        machine: name of the machine profile.
        ctx: tokens of KV cache that the budgets hold.
        budgets: "vram" and "ram" in bytes, and what the placement uses of them: "vram_used", "ram_used".
        predicted: expectations of the cost model, for people; None where there is none.
        output: device of the output norm and matrix.
        layers: one entry per layer.
    """

    fingerprint: str
    pair_id: str
    neuron_order: str
    sparsity: str
    machine: str
    ctx: int
    budgets: dict[str, int]
    predicted: dict[str, float | None]
    output: Device
    layers: tuple[LayerPlacement, ...]

    def hot_prefix(self) -> list[list[int]]:
        """Neurons per layer and FFN that are never read from disk: the GPU's and those that stay in RAM."""
        return [[g + r for g, r in zip(layer.gpu, layer.ram, strict=True)] for layer in self.layers]

    def check_model(self, header: Header) -> None:
        """Refuses a model that this placement was not made for.

        Raises:
            ModelFileError: another checkpoint, conversion or neuron order, or counts that do not fit its shape.
        """
        for key, value in (
            ("turbosparse.source.fingerprint", self.fingerprint),
            ("turbosparse.pair_id", self.pair_id),
            (KEY, self.neuron_order),
        ):
            found = header.keys.get(key)
            if found != value:
                raise ModelFileError(
                    f"the placement is of another model: {key} differs",
                    where=header.path,
                    expected=value,
                    found=found if isinstance(found, str) else "nothing",
                    fix="make a placement for this model with tsconv place",
                )
        n_layer, n_ffn, n_ff = shape_of(header)
        found_shape = (len(self.layers), len(self.layers[0].gpu))
        if found_shape != (n_layer, n_ffn):
            raise ModelFileError(
                "the placement does not fit the model",
                where=header.path,
                expected=f"{n_layer} layers of {n_ffn} FFNs",
                found=f"{found_shape[0]} layers of {found_shape[1]}",
            )
        for n, counts in enumerate(self.hot_prefix()):
            for ffn, count in enumerate(counts):
                if count > n_ff:
                    raise ModelFileError(
                        f"the placement does not fit the model: layer {n}, FFN {ffn}",
                        where=header.path,
                        expected=f"at most {n_ff} neurons on the GPU and in RAM",
                        found=count,
                    )

    def save(self, path: str | Path, force: bool = False) -> int:
        """Writes the file, all or nothing. Returns its size in bytes.

        Raises:
            OutputError: it exists without `force`, or cannot be written.
        """
        fields = {"format_version": FORMAT_VERSION} | dataclasses.asdict(self)
        layers = ",\n".join(f"    {json.dumps(layer)}" for layer in fields.pop("layers"))
        head = json.dumps(fields, indent=2, allow_nan=False).removesuffix("\n}")
        data = f'{head},\n  "layers": [\n{layers}\n  ]\n}}\n'.encode()
        write_file(Path(path), data, force)
        return len(data)

    @classmethod
    def load(cls, path: str | Path) -> Placement:
        """Reads a placement file. Counts are checked against a model by `check_model`.

        Raises:
            ModelFileError: it is missing, damaged, or not a placement.
        """
        reader = _Reader(Path(path))
        fields = reader.fields(reader.document(), "the file", ("format_version", *_FIELDS))
        reader.expect(fields, "format_version", (FORMAT_VERSION,))
        reader.matching(fields, "fingerprint", r"[0-9a-f]{64}", "64 lower-case hex digits")
        reader.matching(fields, "pair_id", r"[0-9a-f]{32}", "32 lower-case hex digits")
        reader.expect(fields, "neuron_order", (HOT_FIRST,))
        reader.expect(fields, "sparsity", ("predictor", "exact"))
        reader.matching(fields, "machine", rf"[^\x00-\x1f\x7f\ud800-\udfff]{{1,{MAX_NAME}}}", "a name")
        reader.integer(fields["ctx"], "ctx", 1, MAX_CONTEXT)
        reader.expect(fields, "output", (GPU, CPU))
        budgets = reader.fields(fields["budgets"], "budgets", BUDGETS)
        for name, value in budgets.items():
            reader.integer(value, f"budgets.{name}", 0, MAX_BYTES)
        predicted = reader.fields(fields["predicted"], "predicted", PREDICTED)
        for name, value in predicted.items():
            predicted[name] = reader.number(value, f"predicted.{name}")
        layers = reader.elements(fields["layers"], "layers", 1, MAX_LAYERS)
        fields["layers"] = tuple(reader.layer(layer, f"layers[{n}]") for n, layer in enumerate(layers))
        if len({len(layer.gpu) for layer in fields["layers"]}) > 1:
            reader.refuse("layers", "the same number of FFNs in each", "different ones")
        del fields["format_version"]
        return cls(**fields)


_FIELDS = tuple(field.name for field in dataclasses.fields(Placement))
_LAYER_FIELDS = tuple(field.name for field in dataclasses.fields(LayerPlacement))
BUDGETS = ("vram", "ram", "vram_used", "ram_used")
PREDICTED = (
    "ms_per_token",  # of this placement
    "lower_bound_ms_per_token",  # no placement within the budgets is faster
    "tokens_per_s",
    "cpu_only_tokens_per_s",  # the same model, RAM budget and disk without a GPU
    "all_gpu_tokens_per_s",  # the whole model on the GPU, whether it fits or not
)


class _Reader:
    """Values of one JSON file, checked while they are taken."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def refuse(self, what: str, expected: object, found: object) -> NoReturn:
        raise ModelFileError(
            f"bad placement: {what}",
            where=self.path,
            expected=expected,
            found=found,
            fix="make it again with tsconv place",
        )

    def document(self) -> Any:
        try:
            with open(self.path, "rb") as file:
                data = file.read(MAX_FILE + 1)
        except OSError as error:
            raise ModelFileError(f"cannot be read: {error.strerror}", where=self.path) from None
        if len(data) > MAX_FILE:
            self.refuse("size", f"at most {MAX_FILE} bytes", "more")
        try:
            return json.loads(data.decode(), parse_constant=_no_constant, object_pairs_hook=_unique)
        except RecursionError:
            self.refuse("structure", "an object of flat values", "too deep a nesting")
        except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, numbers of too many digits
            reason = error.reason if isinstance(error, UnicodeDecodeError) else str(error)
            self.refuse("structure", "JSON", reason.partition("\n")[0])

    def fields(self, value: Any, what: str, names: tuple[str, ...]) -> dict[str, Any]:
        """A JSON object with exactly these keys."""
        if not isinstance(value, dict):
            self.refuse(what, "an object", _shown(value))
        if missing := [name for name in names if name not in value]:
            self.refuse(what, f"the key {missing[0]}", "nothing")
        if unknown := [name for name in value if name not in names]:
            self.refuse(what, f"the keys {', '.join(names)}", _shown(unknown[0]))
        return value

    def expect(self, fields: dict[str, Any], name: str, values: tuple[object, ...]) -> None:
        value = fields[name]
        if type(value) not in (int, str) or value not in values:
            self.refuse(name, " or ".join(map(repr, values)), _shown(value))

    def matching(self, fields: dict[str, Any], name: str, pattern: str, expected: str) -> None:
        value = fields[name]
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            self.refuse(name, expected, _shown(value))

    def integer(self, value: Any, what: str, least: int, most: int) -> int:
        if type(value) is not int or not least <= value <= most:
            self.refuse(what, f"an integer, {least} to {most}", _shown(value))
        return value

    def number(self, value: Any, what: str) -> float | None:
        if value is None:
            return None
        if type(value) not in (int, float) or not 0 <= value <= MAX_BYTES or not math.isfinite(value):
            self.refuse(what, "a number or null", _shown(value))
        return float(value)

    def elements(self, value: Any, what: str, least: int, most: int) -> list[Any]:
        if not isinstance(value, list) or not least <= len(value) <= most:
            found = f"{len(value)} elements" if isinstance(value, list) else _shown(value)
            self.refuse(what, f"a list of {least} to {most} elements", found)
        return value

    def layer(self, value: Any, what: str) -> LayerPlacement:
        fields = self.fields(value, what, _LAYER_FIELDS)
        for name in ("attention", "predictor"):
            self.expect(fields, name, (GPU, CPU))
        gpu, ram = (
            tuple(
                self.integer(n, f"{what}.{name}", 0, MAX_DIM) for n in self.elements(fields[name], what, 1, MAX_EXPERTS)
            )
            for name in ("gpu", "ram")
        )
        if len(gpu) != len(ram):
            self.refuse(f"{what}.ram", f"{len(gpu)} elements, like gpu", len(ram))
        return LayerPlacement(fields["attention"], fields["predictor"], gpu, ram)


def _shown(value: Any) -> str:
    """A JSON value for a message: short ones as they are."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key twice in one object")
    return fields
